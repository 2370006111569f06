"""What a Gateway's manifest declares for all requests, at a real router: some of it while streams run, some by a
new router.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import trustme
from tests.integration.plane import GATEWAY, Plane, Stream, model
from tests.waiting import alive, eventually

from quire.client import InvalidManifest
from quire.endpoint import NoCertificate, connection
from quire.router.config import load
from quire.router.tls import Certificate, TlsFiles
from quire_operators.certificates import BadCertificate

PAGE = "https://chat.example.org"


def gateway(fields: str) -> str:
    return GATEWAY.replace("port: 0", f"port: 0, {fields}")


def settled(plane: Plane) -> dict[str, Any]:
    """The gateway once its router has all that was applied."""

    def found() -> dict[str, Any] | None:
        view: dict[str, Any] = plane.client.get("/v1/objects/gateway/default")
        now = {c["type"] for c in view["status"].get("conditions", ()) if c["status"] == "True"}
        same = view["status"].get("observedGeneration") == view["generation"]
        return view if same and {"Ready", "RolledOut"} <= now else None

    return dict(eventually(found, "the gateway is settled"))


def happened(plane: Plane, reason: str) -> list[dict[str, Any]]:
    """Events of the gateway, the latest last."""
    items = plane.client.get("/v1/events", **{"for": "gateway/default"})["items"]
    return [item for item in items if item["reason"] == reason]


@pytest.fixture
def served(plane: Plane, tmp_path: Path) -> Iterator[str]:
    plane.apply(GATEWAY, model("asked", RUSH=tmp_path / "rush"))
    plane.wait_served("asked")
    yield f"{plane.base_url}/completions"
    plane.apply(GATEWAY)
    settled(plane)
    plane.delete("asked")


def ask(url: str, *, origin: str | None = None, **more: Any) -> httpx.Response:
    headers = {} if origin is None else {"origin": origin}
    body = {"model": "asked", "prompt": "hi", "max_tokens": 1, **more}
    return httpx.post(url, json=body, headers=headers, timeout=30)


def test_hot_settings_reach_the_running_router_and_no_stream_notices(
    plane: Plane, served: str, tmp_path: Path
) -> None:
    router = plane.client.get("/v1/ping")["router"]
    stream = Stream(plane.base_url, "asked", 1900)
    stream.wait_running()
    assert ask(served, origin=PAGE).status_code == 421
    assert ask(served, maxtokens=3).status_code == 400
    assert ask(served, metadata={"label": "x" * 3000}).status_code == 200

    wanted = gateway(
        f"cors: {{allowOrigins: ['{PAGE}']}}, maxBodySize: 2Ki, unknownFields: ignore, accessLog: all"
    )
    planned = plane.client.post("/v1/plan", {"files": [{"name": "g.yaml", "text": wanted}]})["items"][0]
    assert {change["path"]: change["update"] for change in planned["changes"]} == {
        "spec.cors": "hot", "spec.maxBodySize": "hot", "spec.unknownFields": "hot", "spec.accessLog": "hot",
    }  # fmt: skip
    plane.apply(wanted)
    settled(plane)
    answer = ask(served, origin=PAGE)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    assert answer.headers["vary"] == "Origin"
    line = f"request={answer.headers['x-request-id']} "
    eventually(lambda: line in plane.state.log("router").read_text(), "the request is in the log")
    assert ask(served, origin="https://other.example.org").status_code == 421
    assert ask(served, maxtokens=3).status_code == 200
    refused = ask(served, metadata={"label": "x" * 3000})
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
    assert "spec.maxBodySize" in refused.json()["error"]["message"]
    assert plane.client.get("/v1/ping")["router"] == router, "the router is the same process"
    assert stream.is_alive(), "it ran all the while"
    (tmp_path / "rush").touch()
    stream.finish()


def test_a_browser_that_asks_beforehand_is_told_what_a_page_may_send(plane: Plane, served: str) -> None:
    asks = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
        "access-control-request-private-network": "true",
    }
    assert httpx.options(served, headers=asks).status_code == 421
    plane.apply(gateway(f"cors: {{allowOrigins: ['{PAGE}']}}"))
    settled(plane)
    answer = httpx.options(served, headers=asks)
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert answer.headers["access-control-allow-methods"] == "GET, POST, DELETE"
    assert answer.headers["access-control-allow-headers"] == asks["access-control-request-headers"]
    assert answer.headers["access-control-allow-private-network"] == "true"
    assert "access-control-allow-credentials" not in answer.headers
    assert httpx.options(served, headers={**asks, "origin": "https://other.example.org"}).status_code == 421
    assert "access-control-allow-methods" not in httpx.options(served, headers={"origin": PAGE}).headers
    plane.apply(gateway("cors: {allowOrigins: ['HTTPS://Chat.Example.org:443']}"))
    settled(plane)
    assert ask(served, origin=PAGE).status_code == 200, "as browsers spell it"
    plane.apply(gateway("cors: {allowOrigins: ['*']}"))
    settled(plane)
    assert ask(served, origin="https://any.example.org").headers["access-control-allow-origin"] == "*"
    rebound = httpx.post(served, json={}, headers={"host": "evil.example.org", "origin": PAGE})
    assert rebound.status_code == 421, "a name that leads here is refused whatever its page may do"


def test_a_field_that_is_known_and_not_honoured_is_refused_even_where_unknown_ones_are_ignored(
    plane: Plane, served: str
) -> None:
    plane.apply(gateway("unknownFields: ignore"))
    settled(plane)
    refused = ask(served, suffix="behind")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "suffix")
    chat = plane.base_url + "/chat/completions"
    message = {"role": "user", "content": "hi", "weight": 1, "kind": {"a": 1}}
    told = {"model": "asked", "messages": [message], "max_tokens": 1, "stream_options": None, "nonsense": [1]}
    assert httpx.post(chat, json=told, timeout=30).status_code == 200
    told["max_tokens"] = "one"
    wrong = httpx.post(chat, json=told, timeout=30)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "max_tokens")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("cors: {allowOrigins: ['chat.example.org']}", "is no origin"),
        ("cors: {allowOrigins: ['https://a.example/x']}", "is no origin"),
        ("cors: {allowOrigins: ['https://a.example:99999']}", "is no origin"),
        ("maxBodySize: 100Mib", "is not a byte quantity"),
        ("maxBodySize: '0'", "is below 1Ki"),
        ("workers: 0", "spec.workers"),
        ("workers: 65", "spec.workers"),
        ("maxBodySize: 2Gi", "above 1Gi"),
        ("tls: {certFile: cert.pem, keyFile: /k}", "spec.tls.certFile: cert.pem is not an absolute path"),
        ("tls: {certFile: /nowhere/c, keyFile: /nowhere/k}", "spec.tls.certFile: /nowhere/c: No such file"),
        ("tls: {certFile: /etc/hostname, keyFile: /etc/hostname}", "cannot be used"),
    ],
)
def test_settings_that_cannot_be_are_refused_where_they_stand(plane: Plane, fields: str, said: str) -> None:
    with pytest.raises(InvalidManifest) as wrong:
        plane.apply(gateway(fields))
    (problem,) = wrong.value.problems
    assert said in f"{problem['path']}: {problem['message']}"
    assert problem["hint"]
    assert problem["line"]


# ── workers ───────────────────────────────────────────────────────────────────────────────────────────────


class Clients:
    """Some that ask one question after the other, each on a connection that it keeps, and one that keeps none."""

    def __init__(self, url: str, count: int = 3) -> None:
        self.url = url
        self.told: Counter[str] = Counter()
        """What came of each question."""
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number > 0,)) for number in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self, keeps: bool) -> None:
        body = {"model": "asked", "prompt": "hi", "max_tokens": 1}
        headers = {} if keeps else {"connection": "close"}
        with httpx.Client(timeout=30) as http:
            while not self._over.wait(0.01):
                try:
                    answer = http.post(self.url, json=body, headers=headers)
                    self.told[str(answer.status_code)] += 1
                except httpx.HTTPError as error:
                    self.told[repr(error)] += 1


def test_another_router_takes_over_beside_the_one_there_is_and_nobody_is_refused(
    plane: Plane, served: str, tmp_path: Path
) -> None:
    router, held = plane.client.get("/v1/ping")["router"], partial(model, RUSH=tmp_path / "rush", STEP=0.05)
    plane.apply(held("held"))
    plane.wait_served("held")
    with Clients(served) as clients:
        stream = Stream(plane.base_url, "held", 1900)
        stream.wait_running()
        for fields in ("workers: 2", "metrics: {compat: vllm}"):
            plane.apply(gateway(fields))
            settled(plane)
            now = plane.client.get("/v1/ping")["router"]
            assert (now["baseUrl"], now["pid"] == router["pid"]) == (router["baseUrl"], False)
            assert ask(served).status_code == 200
            router = now
        assert "vllm:num_requests_running" in httpx.get(plane.base_url.replace("/v1", "/metrics")).text
        assert stream.is_alive(), "the first of three routers has it"

        # a rollout: the router that answers knows nothing of the stream, and its replica stays until it ends
        before = {replica["id"] for replica in plane.view("held")["replicas"]}
        plane.apply(held("held", ROUND=1))

        def moved() -> bool:
            replicas = {replica["id"]: replica["state"] for replica in plane.view("held")["replicas"]}
            return any(state == "Ready" for name, state in replicas.items() if name not in before)

        eventually(moved, "another replica serves")
    assert set(clients.told) == {"200"}, clients.told
    os.kill(router["pid"], signal.SIGKILL)  # then there is none for a moment but those that finish
    time.sleep(1.0)
    assert stream.is_alive(), stream.problem
    assert before <= {replica["id"] for replica in plane.view("held")["replicas"]}
    (tmp_path / "rush").touch()
    stream.finish()
    plane.wait_served("held")
    eventually(
        lambda: not before & {replica["id"] for replica in plane.view("held")["replicas"]},
        "the one before is gone",
    )
    plane.delete("held")


def test_a_router_that_does_not_come_to_serve_changes_nothing(plane: Plane, served: str) -> None:
    router, site = plane.client.get("/v1/ping")["router"], Path(plane.env["PYTHONPATH"]) / "sitecustomize.py"
    before, routers = site.read_text(), "import os, sys, time\nif 'quire.router' in sys.orig_argv:\n    "

    def conditions() -> dict[str, dict[str, Any]]:
        view: dict[str, Any] = plane.client.get("/v1/objects/gateway/default")
        return {c["type"]: c for c in view["status"]["conditions"]}

    try:
        site.write_text(f"{routers}time.sleep(60)\n")
        plane.apply(gateway("workers: 2"))
        eventually(lambda: conditions()["RolledOut"]["status"] == "False", "another one starts")
        assert conditions()["Ready"]["status"] == "True"
        plane.apply(GATEWAY)  # it is taken back meanwhile
        settled(plane)
        site.write_text(f"{routers}os.write(2, b'error: not today\\n'), os._exit(78)\n")
        plane.apply(gateway("workers: 2"))
        now = dict(eventually(lambda: (c := conditions())["Stalled"]["status"] == "True" and c, "it says why"))
    finally:
        site.write_text(before)
    assert now["Stalled"]["reason"] == "RouterFailed"
    assert "not today" in now["Stalled"]["message"]
    assert (now["Ready"]["status"], now["RolledOut"]["status"]) == ("True", "False")
    assert ask(served).status_code == 200
    assert plane.client.get("/v1/ping")["router"] == router
    assert plane.condition("asked", "Ready")["status"] == "True"
    plane.apply(gateway("metrics: {compat: vllm}"))
    settled(plane)
    assert plane.client.get("/v1/ping")["router"]["pid"] != router["pid"]


def test_while_routers_end_one_after_the_other_gateway_and_model_say_so_and_nothing_else(
    plane: Plane, served: str
) -> None:
    site, shown = Path(plane.env["PYTHONPATH"]) / "sitecustomize.py", []
    before = site.read_text()

    def now() -> tuple[str, str, str, str]:
        view, gateway = plane.view("asked")["status"], plane.client.get("/v1/objects/gateway/default")["status"]
        ready = next(c for c in view["conditions"] if c["type"] == "Ready")
        return view["summary"], ready["reason"], ready["message"], gateway["summary"]

    try:
        # it gets on for a while each time, as one does that the system takes the memory from
        site.write_text("import os, sys, time\nif 'quire.router' in sys.orig_argv: time.sleep(0.3), os.abort()\n")
        os.kill(plane.client.get("/v1/ping")["router"]["pid"], signal.SIGKILL)
        eventually(lambda: now()[3] == "Stalled: RouterCrashLoop" and now()[0] != "Serving", "it is seen")
        end = time.monotonic() + 3.0
        while time.monotonic() < end:
            shown.append(now())
            time.sleep(0.02)
    finally:
        site.write_text(before)
    why = "the router ends again and again, and is started again each time: killed by SIGABRT"
    message = f"1 of 1 replicas are ready, and no router serves: {why}"
    assert set(shown) == {
        ("Stalled: RouterCrashLoop", "RouterNotReady", message, "Stalled: RouterCrashLoop"),
    }  # fmt: skip
    remedies = plane.view("asked")["status"]["remedies"]
    assert any(line.startswith("platform events --for gateway/default") for line in remedies), remedies
    told = plane.client.get("/v1/events", **{"for": "model/asked"})["items"]
    assert [event["count"] for event in told if event["reason"] == "RouterCrashLoop"] == [1]
    ends = [event["message"] for event in happened(plane, "RouterEnded")]
    assert re.search(r"ended: killed by SIGKILL; .*restart \d+", ends[0]), ends
    assert re.search(r"killed by SIGABRT; restart \d follows in [\d.]+ s", " ".join(ends)), ends
    settled(plane)
    assert ask(served).status_code == 200
    assert plane.condition("asked", "Ready")["status"] == "True"


def test_a_gateway_that_moves_says_that_the_old_address_drains_and_listens_once_it_serves(
    plane: Plane, served: str, tmp_path: Path
) -> None:
    before, listened = plane.base_url, happened(plane, "Listening")
    stream = Stream(plane.base_url, "asked", 1900)
    stream.wait_running()
    plane.apply(GATEWAY.replace("port: 0", "port: 0, bind: 127.0.0.2"))

    def why() -> str:
        conditions = plane.client.get("/v1/objects/gateway/default")["status"]["conditions"]
        return str(next(c["message"] for c in conditions if c["type"] == "Ready"))

    eventually(lambda: why().startswith(f"the router on {before.removesuffix('/v1')} drains"), "it says so")
    assert happened(plane, "Listening") == listened
    (tmp_path / "rush").touch()
    stream.finish()
    settled(plane)
    assert happened(plane, "Listening")[-1]["message"] == f"the router listens on {plane.base_url[:-3]}"
    assert plane.base_url.startswith("http://127.0.0.2:")


@pytest.mark.nightly
def test_several_workers_come_and_go_without_a_stream_and_their_head_is_killed_without_a_refusal(
    plane: Plane, served: str
) -> None:
    stream = Stream(plane.base_url, "asked", 300)
    stream.wait_running()
    planned = plane.client.post("/v1/plan", {"files": [{"name": "g.yaml", "text": gateway("workers: 2")}]})[
        "items"
    ]
    assert {change["path"]: change["update"] for change in planned[0]["changes"]} == {"spec.workers": "rolling"}
    plane.apply(gateway("workers: 2"))
    stream.finish()
    view = settled(plane)
    assert view["status"]["workers"] == {"wanted": 2, "serving": 2}
    assert view["status"]["summary"] == "Listening"
    url, head = f"{plane.base_url}/completions", plane.client.get("/v1/ping")["router"]["pid"]
    children = Path(f"/proc/{head}/task/{head}/children").read_text().split()
    assert len(children) == 1
    assert ask(url).status_code == 200
    os.kill(head, signal.SIGKILL)
    assert ask(url).status_code == 200, "who comes meanwhile waits"
    again = settled(plane)
    assert again["status"]["workers"] == {"wanted": 2, "serving": 2}
    assert plane.client.get("/v1/ping")["router"]["pid"] != head
    assert not any(alive(int(pid)) for pid in children)
    head = plane.client.get("/v1/ping")["router"]["pid"]
    os.kill(int(Path(f"/proc/{head}/task/{head}/children").read_text()), signal.SIGKILL)
    (end,) = eventually(lambda: happened(plane, "WorkerEnded"), "it is told of")
    assert end["message"] == "worker 1 of the router ended: killed by SIGKILL; restart 1 follows in 0.2 s"
    settled(plane)
    both = [Stream(plane.base_url, "asked", 300) for _ in range(2)]
    for each in both:
        each.wait_running()
    plane.apply(GATEWAY)
    for each in both:
        each.finish()
    assert settled(plane)["status"]["workers"] == {"wanted": 1, "serving": 1}


# ── TLS ───────────────────────────────────────────────────────────────────────────────────────────────────


def certify(authority: trustme.CA, folder: Path) -> None:
    leaf = authority.issue_cert("127.0.0.1", "localhost")
    leaf.private_key_pem.write_to_path(folder / "key.pem")
    leaf.cert_chain_pems[0].write_to_path(folder / "cert.pem")


def shown(port: int) -> str:
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=10)


def test_https_alone_with_the_declared_certificate_and_a_renewed_one_without_a_restart(
    plane: Plane, served: str, tmp_path: Path
) -> None:
    authority = trustme.CA()
    certify(authority, tmp_path)
    own_names = httpx.get(f"{plane.base_url.removesuffix('/v1')}/metrics").text
    tls = f"tls: {{certFile: {tmp_path}/cert.pem, keyFile: {tmp_path}/key.pem}}"
    plane.apply(gateway(f"{tls}, metrics: {{compat: vllm}}, timeouts: {{head: 1s}}"))
    endpoints = settled(plane)["status"]["endpoints"]
    assert endpoints["openai"].startswith("https://127.0.0.1:")
    assert endpoints["certificate"] == f"{tmp_path}/cert.pem"
    eventually(
        lambda: plane.view("asked")["status"]["endpoints"]["openai"] == endpoints["openai"],
        "the model says so, too",
    )
    plane.wait_served("asked")
    router = plane.client.get("/v1/ping")["router"]

    context = ssl.create_default_context()
    authority.configure_trust(context)
    with openai.OpenAI(
        base_url=endpoints["openai"], api_key="none", http_client=openai.DefaultHttpxClient(verify=context)
    ) as client:
        words = client.completions.create(model="asked", prompt="hi", max_tokens=5, stream=True)
        assert len([part for part in words if part.choices]) >= 5
    url = httpx.URL(endpoints["openai"])
    assert url.port is not None
    both = httpx.get(str(url.copy_with(path="/metrics")), verify=context).text
    running = 'vllm:num_requests_running{engine="asked-'
    assert (running in own_names, running in both) == (False, True)
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://127.0.0.1:{url.port}/v1/models")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{endpoints['openai']}/models", timeout=10)  # nobody vouches for it
    for path in ("nothing", "moderations"):  # refused while its body comes
        assert (
            httpx.post(f"{endpoints['openai']}/{path}", content=b"x" * 200_000, verify=context).status_code == 404
        )
    with socket.create_connection(("127.0.0.1", url.port), timeout=20) as silent:
        began = time.monotonic()
        assert silent.recv(1) == b"", "who begins no handshake is cut"
        assert 0.5 < time.monotonic() - began < 10
    own = connection(endpoints["openai"], 10, endpoints["certificate"])
    own.request("GET", "/livez")
    assert own.getresponse().status == 200
    own.close()

    before = shown(url.port)
    certify(authority, tmp_path)
    eventually(lambda: shown(url.port or 0) != before, "the new certificate is shown", 30)
    assert "Traceback" not in plane.state.log("router").read_text()
    assert plane.client.get("/v1/ping")["router"] == router
    assert httpx.get(f"{endpoints['openai']}/models", verify=context).status_code == 200

    # connections stay open, and nobody reads from them: of one that is idle, and of one with an answer on its way
    with httpx.Client(verify=context, timeout=30) as idle, httpx.Client(verify=context, timeout=30) as busy:
        assert idle.get(f"{endpoints['openai']}/models").status_code == 200
        body = {"model": "asked", "prompt": "hi", "max_tokens": 200}
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(busy.post, f"{endpoints['openai']}/completions", json=body)
            time.sleep(0.5)
            began = time.monotonic()
            plane.apply(GATEWAY)
            settled(plane)
            assert plane.base_url.startswith("http://")
            assert time.monotonic() - began < 20, "a client that asks nothing does not hold the end up"
            assert answer.result().status_code == 200


def test_a_router_whose_certificate_is_no_pair_says_so_and_starts_when_it_is_one(
    plane: Plane, served: str, tmp_path: Path
) -> None:
    authority = trustme.CA()
    certify(authority, tmp_path)
    plane.apply(gateway(f"tls: {{certFile: {tmp_path}/cert.pem, keyFile: {tmp_path}/key.pem}}"))
    settled(plane)
    key = (tmp_path / "key.pem").read_bytes()
    (tmp_path / "key.pem").unlink()
    os.kill(plane.client.get("/v1/ping")["router"]["pid"], signal.SIGKILL)

    def stalled() -> dict[str, Any] | None:
        view = plane.client.get("/v1/objects/gateway/default")
        return next(
            (c for c in view["status"]["conditions"] if c["type"] == "Stalled" and c["status"] == "True"), None
        )

    found = eventually(stalled, "the gateway says why")
    with pytest.raises(NoCertificate, match=r"none\.pem, the certFile of spec\.tls, cannot be read: No such file"):
        connection(plane.base_url, 1, f"{tmp_path}/none.pem")
    assert found["reason"] == "RouterFailed"
    assert f"{tmp_path / 'key.pem'} cannot be read: No such file" in found["message"]
    (tmp_path / "key.pem").write_bytes(key)
    settled(plane)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    assert httpx.get(f"{plane.base_url}/models", verify=context).status_code == 200

    (tmp_path / "key.pem").unlink()
    os.kill(plane.client.get("/v1/ping")["router"]["pid"], signal.SIGKILL)
    eventually(stalled, "the gateway says why")
    generation = plane.apply(GATEWAY)["gateway/default"]["generation"]
    while True:
        status = plane.client.get("/v1/objects/gateway/default")["status"]
        now = {c["type"]: c for c in status["conditions"] if c["observedGeneration"] == generation}
        assert now.get("Stalled", {"status": "False"})["status"] == "False", (
            "what is replaced says nothing of the new"
        )
        if now and now["Ready"]["status"] == now["RolledOut"]["status"] == "True":
            break
        time.sleep(0.01)


async def test_a_pair_that_is_none_changes_nothing_and_another_kind_of_key_takes_the_place_of_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority = trustme.CA()
    files = TlsFiles(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))

    def put(kind: trustme.KeyType) -> None:
        leaf = authority.issue_cert("localhost", key_type=kind)
        leaf.private_key_pem.write_to_path(files.key_file)
        leaf.cert_chain_pems[0].write_to_path(files.cert_file)

    with pytest.raises(BadCertificate, match="No such file"):
        Certificate(files)
    put(trustme.KeyType.RSA)
    certificate = Certificate(files)
    async with await asyncio.start_server(
        lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=certificate.context
    ) as server:
        address = server.sockets[0].getsockname()

        async def kind_shown() -> str:
            """To a client that would rather have RSA."""
            context = ssl.create_default_context()
            authority.configure_trust(context)
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.set_ciphers("ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES128-GCM-SHA256")
            _, writer = await asyncio.open_connection(*address, ssl=context, server_hostname="localhost")
            name: str = writer.get_extra_info("cipher")[0]
            writer.close()
            return name.split("-")[1]

        assert await kind_shown() == "RSA"
        put(trustme.KeyType.ECDSA)
        key = Path(files.key_file).read_bytes()
        Path(files.key_file).write_bytes(trustme.CA().issue_cert("localhost").private_key_pem.bytes())
        certificate.look()
        assert "the certificate stays the old one" in caplog.text
        assert await kind_shown() == "RSA"
        Path(files.key_file).write_bytes(key)
        certificate.look()
        assert await kind_shown() == "ECDSA"


def test_the_file_of_an_earlier_versions_router_is_read(tmp_path: Path) -> None:
    path = tmp_path / "router.json"
    path.write_text('{"control_socket": "c", "snapshot_file": "s", "max_body_bytes": 4194304, "port": 7}')
    assert load(path).port == 7
