"""The console's listener as a browser and as an attacker meet it: the real control plane and router, a stand-in
for the engine, and requests over TCP.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import trustme
from tests.integration.forked import ForkedPlane
from tests.integration.plane import GATEWAY, Plane, model
from tests.waiting import eventually

from quire.client import Refused
from quire.console.files import FILES
from quire_schemas.keys import Digest, new_key

COMMAND = Path(sys.executable).parent / "platform"
CHAT = {"model": "m", "stream": True, "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
CHAT_PATH = "/router/v1/chat/completions"


class Page:
    """What a browser with a link can do."""

    def __init__(self, link: str) -> None:
        address, _, self.token = link.partition("#token=")
        self.base = address.rstrip("/")
        self.port = urlsplit(address).port or 0
        self.http = httpx.Client(base_url=self.base, timeout=30, verify=False)  # no TLS: nothing to load
        self.allowed = {"authorization": f"Bearer {self.token}"}

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.http.get(path, headers={**self.allowed, **headers})

    def json(self, path: str) -> Any:
        answer = self.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture(scope="module")
def page(plane: Plane) -> Iterator[Page]:
    plane.apply(model("m"))
    plane.wait_served("m")
    own = Page(plane.client.post("/v1/console", {"port": 0})["url"])
    with own.http:
        yield own


def test_a_link_opens_what_the_command_shows_and_the_token_is_told_once(plane: Plane, page: Page) -> None:
    assert len(page.token) >= 43, "256 bits"
    assert page.json("/v1/objects") == plane.client.get("/v1/objects")
    assert page.json("/v1/objects/model/m")["name"] == "m"
    assert page.json("/v1/events") == plane.client.get("/v1/events")
    assert page.json("/v1/ping")["pid"] == plane.client.get("/v1/ping")["pid"]
    told = plane.client.get("/v1/console")
    assert told == {"listening": True, "url": f"http://127.0.0.1:{page.port}/", "used": True}
    assert page.token not in plane.state.log("controlplane").read_text()
    assert page.token.encode() not in plane.state.store.read_bytes()


def test_without_a_token_there_are_the_files_of_the_page_and_nothing_else(page: Page) -> None:
    for path, (_, kind) in FILES.items():
        answer = page.http.get(path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
    wrong = page.token[:-1] + ("A" if page.token[-1] != "A" else "B")
    attempts: list[dict[str, str]] = [
        {},
        {"authorization": f"Bearer {wrong}"},
        {"authorization": page.token},
        {"authorization": f"Basic {page.token}"},
        {"authorization": "Bearer"},
        {"cookie": f"token={page.token}"},
    ]
    for path in (
        "/v1/ping",
        "/v1/objects",
        "/v1/load",
        "/router/v1/models",
        "/none",
        "/page/app.js",
    ):
        for headers in attempts:
            answer = page.http.get(path, headers=headers)
            assert answer.status_code == 401, (path, headers)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["hint"] == "platform console prints one that does"
    for name in ("token", "access_token"):
        assert page.http.get(f"/v1/ping?{name}={page.token}").status_code == 401, "no token in a log or a history"
    for path in ("/../page/app.js", "/%2e%2e/files.py", "//app.js", "/app.js/", "/./app.js"):
        asked = http.client.HTTPConnection("127.0.0.1", page.port, timeout=10)
        with closing(asked):
            asked.request("GET", path)
            assert asked.getresponse().status == 401, path
    two = [("authorization", f"Bearer {page.token}")] * 2
    assert page.http.get("/v1/ping", headers=two).status_code == 401


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.", "0.0.0.0", "[::2]:80", ""]
)
@pytest.mark.parametrize("path", ["/", "/v1/ping"])
def test_a_name_that_is_not_of_loopback_is_turned_away(page: Page, host: str, path: str) -> None:
    answer = page.get(path, host=host)
    assert answer.status_code in (400, 403)
    assert answer.status_code == 400 or answer.json()["error"]["code"] == "host_refused"


def test_only_the_consoles_own_page_may_ask(page: Page) -> None:
    own = f"127.0.0.1:{page.port}"
    for good in (f"http://{own}",):
        assert page.get("/v1/ping", origin=good).status_code == 200
    for bad in (
        "http://evil.example",
        f"https://{own}",
        "http://127.0.0.1:1",
        f"http://localhost:{page.port}",
        "null",
    ):
        refused = page.get("/v1/ping", origin=bad)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "origin_refused")
        assert not any(name.startswith("access-control") for name in refused.headers)
    forwarded = {"host": "localhost:9000", "origin": "http://localhost:9000"}
    assert page.get("/v1/ping", **forwarded).status_code == 200, "through a tunnel of ssh"
    asked = page.http.options(
        "/v1/ping", headers={"origin": "http://evil.example", "access-control-request-method": "GET"}
    )
    assert asked.status_code == 403
    simple = {**page.allowed, "content-type": "text/plain"}
    sent = page.http.post(CHAT_PATH, headers=simple, content=json.dumps(CHAT))
    assert sent.status_code == 415, "what a form of another page could send"


def test_every_answer_keeps_the_page_to_itself(page: Page) -> None:
    answers = [
        page.http.get("/"),
        page.get("/v1/objects"),
        page.http.get("/v1/objects"),
        page.get("/none"),
        page.get("/v1/ping", origin="http://evil.example"),
        page.get("/router/v1/models"),
    ]
    for answer in answers:
        policy = dict(
            part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";")
        )
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == ("no-cache" if answer is answers[0] else "no-store")
        assert "server" not in answer.headers
    html = answers[0].text
    assert "<style" not in html
    assert " style=" not in html
    assert " on" not in {part[:3] for part in html.split('"')}
    assert html.count("<script") == html.count("<script src=") + html.count('<script type="module" src=')
    assert "//" not in html.replace("<!doctype", ""), "nothing comes from elsewhere"


def test_who_has_the_same_already_is_not_sent_it_again(page: Page) -> None:
    for path in ("/app.js", "/v1/objects"):
        first = page.get(path)
        again = page.get(path, **{"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert page.get(path, **{"if-none-match": '"other"'}).content == first.content


def test_there_is_nothing_by_which_to_change_what_is_served(plane: Plane, page: Page) -> None:
    before = plane.client.get("/v1/objects")
    json_ = {**page.allowed, "content-type": "application/json"}
    for path in ("apply", "plan", "down", "up", "objects/model/m/scale", "secrets/a", "cache/prune", "console"):
        assert page.http.post(f"/v1/{path}", headers=json_, content=b"{}").status_code in (404, 405), path
    for path in ("/v1/objects/model/m", "/v1/secrets/a", "/v1/console"):
        assert page.http.request("DELETE", path, headers=json_).status_code in (404, 405)
    for path in ("/v1/secrets", "/v1/logs?name=router", "/v1/cache", "/v1/console"):
        assert page.get(path).status_code == 404, path
    assert page.http.put("/v1/objects", headers=json_, content=b"{}").status_code in (404, 405)
    assert page.http.post("/", headers=json_, content=b"{}").status_code == 405
    assert plane.client.get("/v1/objects") == before


def test_the_gateway_has_none_of_the_admin_api(plane: Plane, page: Page) -> None:
    router = plane.base_url.removesuffix("/v1")
    for path in ("/v1/objects", "/v1/console", "/v1/ping", "/v1/events", "/v1/load", "/app.js", "/console"):
        assert page.get(router + path).status_code == 404, path
    assert page.get(router).status_code == 404
    assert "Quire" not in page.get(router).text


def test_a_chat_passes_through_as_the_gateway_streams_it(plane: Plane, page: Page) -> None:
    with page.http.stream("POST", CHAT_PATH, json=CHAT, headers=page.allowed) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert page.json("/router/v1/models")["data"][0]["id"] == "m"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({**CHAT, "model": "none"}, 404, "none"),
        ({**CHAT, "temperature": 9}, 400, "temperature"),
        ({**CHAT, "stream": False}, 400, "streams only"),
        ([CHAT], 400, "streams only"),
    ],
)
def test_what_is_refused_is_refused_in_the_gateways_words(page: Page, body: Any, status: int, said: str) -> None:
    answer = page.http.post(CHAT_PATH, json=body, headers=page.allowed)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]
    assert answer.headers["content-type"] == "application/json"


def test_a_key_for_the_gateway_is_passed_on_and_the_links_token_is_not(page: Page) -> None:
    bad = page.http.post(CHAT_PATH, json=CHAT, headers={**page.allowed, "x-gateway-key": "a b"})
    assert bad.status_code == 400
    good = page.http.post(CHAT_PATH, json=CHAT, headers={**page.allowed, "x-gateway-key": "sk-1"})
    assert good.status_code == 200


def test_a_page_that_leaves_stops_its_answer(plane: Plane, page: Page) -> None:
    plane.apply(model("slow", STEP=0.05))
    plane.wait_served("slow")
    body = {**CHAT, "model": "slow", "max_tokens": 400}
    router = plane.base_url.removesuffix("/v1")

    def running() -> bool:
        metrics = page.get(f"{router}/metrics").text
        return 'quire_requests_in_flight{model="slow"} 1.0' in metrics

    with page.http.stream("POST", CHAT_PATH, json=body, headers=page.allowed) as answer:
        assert answer.status_code == 200, answer.read()
        eventually(running, "the router answers it")
    eventually(lambda: not running(), "the router heard that nobody reads", 5)
    plane.delete("slow")


def test_load_is_told_from_the_routers_own_figures(plane: Plane, page: Page) -> None:
    first = page.json("/v1/load")
    fields = first["fields"]
    assert {"outTokensPerSecond", "ttftP50", "ttftP95", "waiting", "running", "kv"} <= set(fields)
    last = max((item["n"] for item in first["items"]), default=0)
    assert plane.complete("m", 40).status_code == 200

    def busy() -> Any:
        items = page.json(f"/v1/load?after={last}")["items"]
        assert all(item["n"] > last for item in items)
        found = [dict(zip(fields, item["models"]["m"], strict=True)) for item in items]
        return next((each for each in found if each["outTokensPerSecond"] > 0), None)

    seen = eventually(busy, "the tokens are seen", 15, 0.2)
    assert 0 < seen["ttftP50"] <= seen["ttftP95"]
    assert seen["up"] == 1
    assert page.json("/v1/load?after=1000000")["items"], "who has numbers of another time gets all"


def test_where_keys_are_asked_for_the_playground_needs_one_and_the_figures_do_not(
    plane: Plane, page: Page
) -> None:
    key = new_key()
    plane.apply(
        "apiVersion: quire.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: team}\n"
        f"spec: {{keys: [{{name: ci, hash: '{Digest.of(key)}'}}]}}\n"
    )
    try:
        eventually(lambda: page.get("/router/v1/models").status_code == 401, "the gateway asks for a key")
        assert page.http.post(CHAT_PATH, json=CHAT, headers=page.allowed).status_code == 401
        with_key = {**page.allowed, "x-gateway-key": key}
        assert page.http.post(CHAT_PATH, json=CHAT, headers=with_key).status_code == 200
        assert [each["id"] for each in page.http.get("/router/v1/models", headers=with_key).json()["data"]] == [
            "m"
        ]
        last = max((item["n"] for item in page.json("/v1/load")["items"]), default=0)
        eventually(lambda: page.json(f"/v1/load?after={last}")["items"], "figures that are new", 15, 0.2)
    finally:
        plane.client.delete("/v1/objects/accesspolicy/team")
        eventually(lambda: page.get("/router/v1/models").status_code == 200, "the gateway is open again")


def platform(plane: Plane, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "QUIRE_STATE_DIR": str(plane.state.root), **env}
    return subprocess.run([COMMAND, *args], env=environment, capture_output=True, text=True, timeout=60)


BROWSER = """\
#!{python}
import os, re, stat, sys, urllib.request
(address,) = sys.argv[1:]
path = address.removeprefix("file://")
assert "token" not in address and stat.S_IMODE(os.stat(path).st_mode) == 0o600
link = re.search(r"url=(http://127[^\\"]+)", open(path).read())[1]
base, _, token = link.partition("/#token=")
asked = urllib.request.Request(base + "/v1/ping", headers={{"authorization": "Bearer " + token}})
urllib.request.urlopen(asked).read()
open({out!r}, "w").write(path)
"""


def test_the_command_prints_links_and_leads_a_browser_there(plane: Plane, page: Page, tmp_path: Path) -> None:
    done = platform(plane, "console")
    assert (done.returncode, done.stderr) == (0, "")
    other = Page(done.stdout.strip())
    with other.http:
        assert other.port == page.port
        assert other.token != page.token
        assert other.get("/v1/ping").status_code == page.get("/v1/ping").status_code == 200

    script, out = tmp_path / "browser", tmp_path / "out"
    script.write_text(BROWSER.format(python=sys.executable, out=str(out)))
    script.chmod(0o755)
    done = platform(plane, "console", "--open", BROWSER=f"{script} %s")
    assert done.returncode == 0, done.stderr
    assert out.exists(), done
    assert not Path(out.read_text()).exists(), "the file with the link is gone"

    done = platform(plane, "console", "--port", str(page.port + 1 if page.port < 65535 else 1024))
    assert done.returncode == 5
    assert f"listens on port {page.port} already" in done.stderr
    assert "hint: " in done.stderr
    assert platform(plane, "console", "--stop", "--open").returncode == 2


def test_eight_links_count_at_a_time(plane: Plane, page: Page) -> None:
    oldest = Page(plane.client.post("/v1/console", {})["url"])
    with oldest.http:
        for _ in range(7):
            newest = Page(plane.client.post("/v1/console", {})["url"])
            newest.http.close()
        assert oldest.get("/v1/ping").status_code == 200
        page.token = Page(plane.client.post("/v1/console", {})["url"]).token
        page.allowed = {"authorization": f"Bearer {page.token}"}
        assert oldest.get("/v1/ping").status_code == 401


def test_a_port_that_is_taken_is_said_and_the_listener_ends_when_told_and_with_its_process(
    plane: Plane, page: Page
) -> None:
    assert platform(plane, "console", "--stop").stdout == "the console is closed\n"
    assert platform(plane, "console", "--stop").stdout == "the console was not open\n"
    assert plane.client.get("/v1/console")["listening"] is False
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = platform(plane, "console", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 6
    assert "is in use by another program" in done.stderr
    assert "platform console --port 0 takes any free port" in done.stderr
    for port in (-1, 65536, "80", True, 1.5):
        with pytest.raises(Refused, match="port is a whole number"):
            plane.client.post("/v1/console", {"port": port})

    old = Page(plane.client.post("/v1/console", {"port": 0})["url"])
    with old.http:
        assert old.get("/v1/ping").status_code == 200
        assert old.http.get("/v1/ping", headers=page.allowed).status_code == 401, "closed, and its links forgotten"
        plane.kill(signal.SIGTERM)
        with pytest.raises(httpx.ConnectError):
            old.get("/v1/ping")
        plane.start()
        with pytest.raises(httpx.ConnectError):
            old.get("/v1/ping")
        plane.client.post("/v1/console", {"port": old.port})
        assert old.get("/v1/ping").status_code == 401, "its link went with the process"


@pytest.mark.nightly
def test_a_gateway_that_speaks_https_is_asked_by_its_certificate(tmp_path: Path) -> None:
    leaf = trustme.CA().issue_cert("chat.example.org")
    leaf.private_key_pem.write_to_path(tmp_path / "key.pem")
    leaf.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    plane = ForkedPlane(tmp_path / "plane")
    plane.start()
    try:
        tls = f"tls: {{certFile: {tmp_path}/cert.pem, keyFile: {tmp_path}/key.pem}}"
        plane.apply(GATEWAY.replace("port: 0", f"port: 0, {tls}"), model("m"))
        plane.wait_served("m")
        assert plane.base_url.startswith("https://")
        page = Page(plane.client.post("/v1/console", {"port": 0})["url"])
        with page.http:
            assert page.json("/router/v1/models")["data"][0]["id"] == "m"
            answer = page.http.post(CHAT_PATH, json=CHAT, headers=page.allowed)
            assert answer.text.endswith("data: [DONE]\n\n")
            eventually(lambda: page.json("/v1/load")["items"], "figures over https", 15, 0.2)
            assert page.json("/v1/load")["problem"] is None
    finally:
        plane.end()
