"""The router against raw bytes: requests that two servers could read in two ways, targets and hosts made to look
like others, limits of heads and bodies to the byte, floods of invented names, and addresses to be fetched.

Where framing is tried, another request is hidden behind the first or in its body: it must never be answered.
"""

from __future__ import annotations

import ast
import asyncio
import re
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.effort import times
from tests.integration.router_world import CHAT, World
from tests.integration.test_router_access import TEAM, headed, limited, serve

from quire.controlplane import app as controlplane
from quire.router.guard import MAX_HEADERS
from quire.router.http import MAX_HEADER_BYTES
from quire_schemas import wire

HIDDEN = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""Its answer cannot be taken for another's."""
TELLTALE = b'"openapi"'
BODY = b'{"model": "no-such-model", "prompt": "x"}'
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)


def request(
    *lines: bytes, body: bytes = b"", target: bytes = b"/v1/completions", host: bytes = b"localhost"
) -> bytes:
    """A POST with these header lines, each as it is."""
    head = [b"POST " + target + b" HTTP/1.1", b"Host: " + host, b"Content-Type: application/json", *lines]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def length(value: bytes) -> bytes:
    return b"Content-Length: " + value


TE = b"Transfer-Encoding: chunked"
REFUSED: dict[str, bytes] = {
    "CL.TE": request(length(b"6"), TE, body=b"0\r\n\r\nG"),
    "TE.CL": request(TE, length(b"4"), body=b"5c\r\n"),
    "TE.TE twice": request(TE, TE, body=CHUNKED),
    "TE.TE of two kinds": request(TE, b"Transfer-Encoding: identity", body=CHUNKED),
    "TE in a list": request(b"Transfer-Encoding: identity, chunked", body=CHUNKED),
    "TE in a list, not last": request(b"Transfer-Encoding: chunked, identity", body=CHUNKED),
    "TE that is none": request(b"Transfer-Encoding: xchunked", body=CHUNKED),
    "TE in quotes": request(b'Transfer-Encoding: "chunked"', body=CHUNKED),
    "TE with a vertical tab": request(b"Transfer-Encoding: \x0bchunked", body=CHUNKED),
    "TE with a blank before the colon": request(b"Transfer-Encoding : chunked", body=CHUNKED),
    "CL with a blank before the colon": request(b"Content-Length : 5", body=b"01234"),
    "a name with a NUL": request(b"Transfer\x00-Encoding: chunked", body=CHUNKED),
    "a value with a NUL": request(b"X-A: a\x00b", length(b"%d" % len(BODY)), body=BODY),
    "a line without a colon": request(b"Transfer-Encoding chunked", body=CHUNKED),
    "a folded TE": request(b"Transfer-Encoding:\r\n chunked", body=CHUNKED),
    "a folded header": request(b"X-A: b\r\n\tc", length(b"%d" % len(BODY)), body=BODY),
    "a folded first header": b"GET /health HTTP/1.1\r\n Host: localhost\r\n\r\n",
    "a bare LF in the head": request(b"X-A: b\nX-B: c", length(b"%d" % len(BODY)), body=BODY),
    "a hidden TE behind a bare LF": request(b"X-A: b\nTransfer-Encoding: chunked", length(b"0"), body=CHUNKED),
    "a hidden TE behind a bare CR": request(b"X-A: b\rTransfer-Encoding: chunked", length(b"0"), body=CHUNKED),
    "a head of bare LFs": b"GET /health HTTP/1.1\nHost: localhost\n\n",
    "an end of a bare LF": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\n",
    "two lengths": request(length(b"5"), length(b"6"), body=b"012345"),
    "a list of lengths": request(length(b"5, 6"), body=b"012345"),
    "a length with a plus": request(length(b"+5"), body=b"01234"),
    "a length below nothing": request(length(b"-5"), body=b"01234"),
    "a length in base 16": request(length(b"0x5"), body=b"01234"),
    "a length with an underscore": request(length(b"1_0"), body=b"0123456789"),
    "a length with a blank": request(length(b"1 0"), body=b"0123456789"),
    "a length of foreign digits": request(length("٥".encode()), body=b"01234"),
    "a length that is empty": request(length(b""), body=b"01234"),
    "a length beyond counting": request(length(b"9" * 30), body=b"01234"),
    "a size with 0x": request(TE, body=b"0x5\r\n01234\r\n0\r\n\r\n"),
    "a size with a plus": request(TE, body=b"+5\r\n01234\r\n0\r\n\r\n"),
    "a size below nothing": request(TE, body=b"-5\r\n01234\r\n0\r\n\r\n"),
    "a size with an underscore": request(TE, body=b"1_0\r\n0123456789012345\r\n0\r\n\r\n"),
    "a size beyond counting": request(TE, body=b"f" * 40 + b"\r\n01234\r\n0\r\n\r\n"),
    "a chunk that ends otherwise": request(TE, body=b"5\r\n01234XX0\r\n\r\n"),
    "no size at all": request(TE, body=b"\r\n01234\r\n0\r\n\r\n"),
    "chunks in HTTP/1.0": request(TE, body=CHUNKED).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "two hosts": request(b"Host: localhost", length(b"%d" % len(BODY)), body=BODY),
    "a version that is none": request(length(b"0")).replace(b"HTTP/1.1", b"HTTP/1.11"),
    "a target with a blank": request(length(b"0"), target=b"/v1/completions x"),
    "a method with a blank": b" " + request(length(b"0")),
}
"""What no two servers agree on."""
READ_WHOLE: dict[str, tuple[bytes, int]] = {
    "a GET with a body": (
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        + length(b"%d" % len(HIDDEN)) + b"\r\n\r\n" + HIDDEN, 200,
    ),
    "a HEAD with a body": (
        b"HEAD /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        + length(b"%d" % len(HIDDEN)) + b"\r\n\r\n" + HIDDEN, 200,
    ),
    "a request in a chunk": (
        request(TE, b"Connection: close", body=b"%x\r\n%s\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN)), 400,
    ),
    "a chunk with an extension": (
        request(TE, b"Connection: close", body=b"%x;a=b\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)), 404,
    ),
    "headers behind the chunks": (
        request(TE, b"Connection: close", body=CHUNKED[:-2] + b"Host: evil.com\r\nX-A: b\r\n\r\n"), 404,
    ),
    "TE under another name": (
        request(b"Transfer_Encoding: chunked", length(b"%d" % len(BODY)), b"Connection: close", body=BODY), 404,
    ),
    "what a proxy would drop": (
        request(length(b"%d" % len(BODY)), b"Connection: close, content-length", body=BODY), 404,
    ),
    "one length, said twice": (
        request(length(b"%d" % len(BODY)), length(b"%d" % len(BODY)), b"Connection: close", body=BODY), 404,
    ),
}  # fmt: skip
"""What is one thing only, to whoever reads it by the book."""


def answers(raw: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"(?:^|(?<=[\r\n}\]]))HTTP/1\.1 (\d{3}) ", raw)]


async def test_what_can_be_read_in_two_ways_is_refused_and_ends_the_connection(world: World) -> None:
    found = await asyncio.gather(*(world.raw(each + HIDDEN) for each in REFUSED.values()))
    for name, raw in zip(REFUSED, found, strict=True):
        assert answers(raw) == [400], (name, raw[:600])
        assert b"connection: close" in raw.lower(), name
        assert TELLTALE not in raw, name


async def piece_by_piece(world: World, data: bytes) -> bytes:
    """The answer to bytes that come seven at a time, and the hidden request at once."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw = b""
    try:
        for at in range(0, len(data), 7):
            writer.write(data[at : at + 7])
            await asyncio.sleep(0)
        writer.write(HIDDEN)
        while piece := await asyncio.wait_for(reader.read(65536), 10):
            raw += piece
    except ConnectionError:
        pass  # cut off while the rest of it was on its way
    finally:
        writer.close()
    return raw


async def test_so_it_is_in_pieces_behind_a_good_one(world: World) -> None:
    """What was looked at is not looked at in parts, and not only on a fresh connection."""
    good = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    found = await asyncio.gather(*(piece_by_piece(world, good + each) for each in REFUSED.values()))
    for name, raw in zip(REFUSED, found, strict=True):
        assert answers(raw) in ([200, 400], [200], []), (name, raw[:600])
        assert TELLTALE not in raw, name
    assert sum(answers(raw) == [200, 400] for raw in found) > len(found) / 2


async def test_what_is_one_request_is_read_as_one(world: World) -> None:
    await world.table(world.route())
    found = await asyncio.gather(*(world.raw(sent + HIDDEN) for sent, _ in READ_WHOLE.values()))
    for (name, (_, status)), raw in zip(READ_WHOLE.items(), found, strict=True):
        assert answers(raw) == [status], (name, raw[:600])
        assert TELLTALE not in raw, name


# ── targets and hosts ─────────────────────────────────────────────────────────────────────────────────────

LEADS = ("/livez", "/readyz")
"""Open to everybody."""
GOALS = ("/v1/models", "/v1/chat/completions", "/metrics", "/openapi.json", "/v1/files", "/health")
TARGETS = [
    *GOALS,
    *(f"{lead}{how}{goal}" for lead in LEADS for goal in GOALS[:2] for how in (
        "/..", "/../", "/.;", ";", "%2f..", "%2e%2e", "/%2e%2e", "/..%2f..", "\\..", "%5c..", "//", "/./..", "%00",
        "%0d%0a", "%23", "%3f", "/%252e%252e",
    )),
    *(how + goal for goal in GOALS[:3] for how in (
        "/", "//", "/.", "/x/..", "/livez/../..", "/%2e", "//localhost", "///", "/livez//..", "/%2flivez%2f..",
    )),
    *(goal + how for goal in GOALS[:3] for how in (
        "/", "//", "/.", "/..", "%20", "%09", "%00", "%2f", ";a=b", "?", "?a=/livez", "/livez", "/../livez",
        "?/livez", ".json", "~", "%3b", "\\",
    )),
    "*", "localhost:80", "livez", "http:/v1/models", "http:///v1/models", "http://localhost", "http://@/v1/models",
    "http://localhost@evil.com/v1/models", "http://evil.com/v1/models", "http://evil.com#localhost/v1/models",
    "http://localhost:80:80/v1/models", "https://localhost/v1/models", "ftp://localhost/v1/models",
    "http://localhost/livez/../v1/models", "http://localhost//v1/models", "http://[::1]/v1/models",
    "http://localhost\\@evil.com/v1/models", "http://localhost?/v1/models", "HTTP://LOCALHOST/v1/models",
]  # fmt: skip
HOSTS = [
    "localhost/?x=", "localhost/#", "localhost/livez?", "localhost?", "localhost#/livez", "localhost:80/livez",
    "localhost\\livez", "a@localhost", "localhost@evil.com", "evil.com", "localhost.evil.com", "evil.com:80",
    "localhost:", "localhost:x", "localhost:999999", "127.0.0.1.", "127.1", "0x7f.0.0.1", "2130706433", "[::1",
    "::1", "[::1]evil", "localhost evil.com", "localhost,evil.com", "localhost\t", "", " ", "%6cocalhost",
    "localhost%00", "ｌocalhost", "0.0.0.0", "[::ffff:127.0.0.1]", "[::]", "livez", "/livez",
]  # fmt: skip


@pytest.fixture
async def closed(world: World) -> World:
    """A router that gives nothing without a key."""
    await serve(world)
    return world


async def statuses(world: World, sent: list[bytes]) -> list[tuple[int, bytes]]:
    """What becomes of each, a few at a time, and the bytes of the answer."""
    found: list[tuple[int, bytes]] = []
    for start in range(0, len(sent), 16):
        for raw in await asyncio.gather(*(world.raw(each) for each in sent[start : start + 16])):
            found.append((next(iter(answers(raw)), 0), raw))
    return found


async def test_no_way_of_writing_a_target_opens_what_needs_a_key(closed: World) -> None:
    """However it is written: 401 for what leads somewhere and for what does not, 400 and 421 for what is no target
    of ours, and 200 for what is open to all, which tells nothing."""
    assert len(TARGETS) > 150
    sent = [
        f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: 203.0.113.9\r\n"
        "Content-Length: 0\r\nConnection: close\r\n\r\n".encode()
        for target in TARGETS
        for method in ("GET", "POST")
    ]
    for asked, (status, raw) in zip(sent, await statuses(closed, sent), strict=True):
        target = asked.split(b" ")[1]
        body = raw.partition(b"\r\n\r\n")[2]
        if status == 200:
            assert target.partition(b"?")[0].rstrip(b"/") in (b"/livez", b"/readyz"), (asked, raw)
            assert body in (b"", b"ok\n"), body
        else:
            assert status in (400, 401, 421), (asked, raw)
        assert b"tiny" not in raw
        assert b"quire_" not in body
        assert TELLTALE not in raw


async def test_no_host_opens_what_needs_a_key(closed: World) -> None:
    """Neither instead of ours, nor beside it, nor in a header that proxies add."""
    head = "GET /v1/models HTTP/1.1\r\n{}Connection: close\r\n\r\n"
    sent = [head.format(f"Host: {host}\r\n").encode() for host in HOSTS]
    sent += [head.format(f"Host: localhost\r\nHost: {host}\r\n").encode() for host in HOSTS]
    sent += [head.format(f"Host: {host}\r\nX-Forwarded-Host: localhost\r\n").encode() for host in HOSTS]
    sent += [head.format(f"X-Forwarded-Host: localhost\r\nForwarded: host={host}\r\n").encode() for host in HOSTS]
    for asked, (status, raw) in zip(sent, await statuses(closed, sent), strict=True):
        assert status in (400, 401, 421), (asked, raw)
        assert b"tiny" not in raw
    good = await statuses(closed, [head.format(f"Host: localhost\r\nAuthorization: Bearer {TEAM}\r\n").encode()])
    assert good[0][0] == 200
    assert b"tiny" in good[0][1]


DEVELOPERS = [
    "/debug", "/debug/pprof", "/debug/vars", "/start_profile", "/stop_profile", "/sleep", "/wake_up",
    "/is_sleeping", "/pause", "/resume", "/abort_request", "/reset_prefix_cache", "/reset_mm_cache",
    "/flush_cache", "/invocations", "/ping", "/update_weights", "/update_weights_from_disk",
    "/update_weights_from_tensor", "/init_weights_update_group", "/release_memory_occupation",
    "/collective_rpc", "/server_info", "/get_server_info", "/get_internal_state", "/set_internal_state",
    "/configure_logging", "/dump_metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load",
    "/scale_elastic_ep", "/slots/0", "/props", "/admin", "/config", "/key/generate", "/user/new",
    "/prompts/test", "/docs", "/redoc", "/schema", "/schema/openapi.json", "/openapi.yaml", "/static/x",
    "/.env", "/.git/config", "/favicon.ico", "/index.html", "/console", "/app.js",
]  # fmt: skip
"""What others leave open for themselves."""


def admin_paths() -> list[str]:
    """Each path of the control plane's API, from its source, something in place of its parameters."""
    assert controlplane.__file__ is not None
    marks = [
        mark
        for node in ast.walk(ast.parse(Path(controlplane.__file__).read_text()))
        for mark in getattr(node, "decorator_list", ())
        if isinstance(mark, ast.Call) and getattr(mark.func, "id", "") in ("get", "post", "put", "patch", "delete")
    ]
    return [re.sub(r"{\w+:?\w*}", "x", str(ast.literal_eval(mark.args[0]))) for mark in marks]


async def test_nothing_of_the_admin_api_and_nothing_for_developers_is_on_the_port(closed: World) -> None:
    """Not even with a key. The admin API has a socket of its own."""
    paths = {*admin_paths(), *DEVELOPERS}
    assert {"/v1/apply", "/v1/secrets/x", "/v1/objects/x/x/x", "/v1/down"} < paths
    async with httpx.AsyncClient(base_url=closed.url, headers=headed(TEAM)) as http:
        for path in sorted(paths):
            for answer in (await http.get(path), await http.post(path, json={})):
                assert answer.status_code == 404, (path, answer.text)


async def test_what_proxies_add_moves_no_limit_and_opens_nothing(world: World) -> None:
    """A limit counts keys: whoever makes addresses up has the same one. Nobody becomes local by saying so."""
    await serve(world, limited(wire.AccessLimit("key", requests=3, per=3_600_000)))
    async with httpx.AsyncClient(base_url=world.url) as http:
        seen = []
        for number in range(12):
            address = f"198.51.100.{number}"
            made_up = {"X-Forwarded-For": address, "X-Real-IP": address, "Forwarded": f"for={address}"}
            answer = await http.post(
                "/v1/chat/completions", json={**CHAT, "max_tokens": 1}, headers={**headed(TEAM), **made_up}
            )
            seen.append(answer.status_code)
        assert seen == [200] * 3 + [429] * 9
        for name in ("X-Forwarded-For", "X-Real-IP", "X-Forwarded-Host"):
            for value in ("127.0.0.1", "localhost", "127.0.0.1, 127.0.0.1", "::1"):
                assert (await http.get("/metrics", headers={name: value})).status_code == 401, (name, value)


# ── limits to the byte ────────────────────────────────────────────────────────────────────────────────────


def with_headers(count: int, size: int) -> bytes:
    """A GET with so many headers, whose names and values have so many bytes together."""
    lines = [
        (b"host", b"localhost"),
        (b"connection", b"close"),
        *((b"x-%03d" % at, b"") for at in range(count - 3)),
    ]
    spent = sum(len(name) + len(value) for name, value in lines) + 1
    lines.append((b"y", b"a" * (size - spent)))
    return b"GET /livez HTTP/1.1\r\n" + b"".join(b"%s: %s\r\n" % line for line in lines) + b"\r\n"


async def test_heads_and_bodies_have_the_size_that_they_may_have_and_not_a_byte_more(world: World) -> None:
    most = 1 << 20
    await world.table(world.route(), max_body_bytes=most)
    filler = b" " * (most - len(BODY))
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (filler, BODY))
    cases = [
        (with_headers(MAX_HEADERS, 4000), 200),
        (with_headers(MAX_HEADERS + 1, 4000), 400),
        (with_headers(10, MAX_HEADER_BYTES), 200),
        (with_headers(10, MAX_HEADER_BYTES + 1), 400),
        (world.post("/v1/completions", filler + BODY), 404),
        (world.post("/v1/completions", b" " + filler + BODY), 413),
        (request(TE, b"Connection: close", body=chunks + b"0\r\n\r\n"), 404),
        (request(TE, b"Connection: close", body=chunks + b"1\r\n \r\n0\r\n\r\n"), 413),
    ]
    for (sent, wanted), (status, raw) in zip(
        cases, await statuses(world, [sent for sent, _ in cases]), strict=True
    ):
        assert status == wanted, (sent[:200], raw[:300])


# ── floods ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_invented_methods_paths_and_models_make_no_series(world: World) -> None:
    """By night ten thousand of each. The router keeps nothing of what it does not know."""
    engine = await world.engine()
    await world.serve(engine)
    count = times(120, 10_000)
    before = await world.metrics()

    async def send(first: int, last: int) -> None:
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(base_url=world.url, limits=limits, timeout=60) as http:
            for at in range(first, last):
                assert (await http.request(f"MADE{at}", "/v1/models")).status_code == 405
                assert (await http.get(f"/v1/made/{at}")).status_code == 404
                unknown = await http.post("/v1/chat/completions", json={**CHAT, "model": f"made-{at}"})
                assert unknown.status_code == 404
                assert (
                    await http.get(f"/v1/models/made-{at}", headers={"x-request-id": f"m{at}"})
                ).status_code == 404

    await asyncio.gather(*(send(count * part // 4, count * (part + 1) // 4) for part in range(4)))
    after = await world.metrics()
    assert after.keys() == before.keys()
    assert not any("made" in name.lower() for name in after)


# ── addresses in requests ─────────────────────────────────────────────────────────────────────────────────


def fetching(url: str) -> list[tuple[str, dict[str, Any]]]:
    """Every way of the APIs to have a server fetch something, or tell somebody."""
    image = {"type": "image_url", "image_url": {"url": url}}
    chats: list[Any] = [
        image, {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
        {"type": "file", "file": {"file_data": url}}, {"type": "video_url", "video_url": {"url": url}},
        {"type": "audio_url", "audio_url": {"url": url}}, {"type": "image_pil", "image_pil": url},
    ]  # fmt: skip
    blocks: list[Any] = [
        {"type": "image", "source": {"type": "url", "url": url}},
        {"type": "document", "source": {"type": "url", "url": url}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}},
    ]
    items: list[Any] = [
        {"type": "input_image", "image_url": url}, {"type": "input_file", "file_url": url},
        {"type": "input_file", "file_data": url}, {"type": "input_image", "file_id": url},
    ]  # fmt: skip
    tools: list[Any] = [
        {"type": "mcp", "server_label": "x", "server_url": url}, {"type": "web_search"},
        {"type": "computer_use_preview"}, {"type": "file_search", "vector_store_ids": [url]},
    ]  # fmt: skip
    return [
        *(("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": [each]}]}) for each in chats),
        *(
            ("/v1/messages", {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": [each]}]})
            for each in blocks
        ),
        *(
            ("/v1/responses", {"model": "tiny", "input": [{"role": "user", "content": [each]}]})
            for each in items
        ),
        *(("/v1/responses", {"model": "tiny", "input": "x", "tools": [each]}) for each in tools),
        ("/v1/messages", {
            "model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}],
            "mcp_servers": [{"type": "url", "name": "x", "url": url}],
        }),
        ("/v1/embeddings", {"model": "tiny", "input": [{"image": url}]}),
        ("/v1/score", {"model": "tiny", "text_1": {"content": [image]}, "text_2": "x"}),
        ("/v1/chat/completions", {**CHAT, "chat_template": url}),
        ("/v1/chat/completions", {**CHAT, "media_io_kwargs": {"image": {"url": url}}}),
        ("/v1/chat/completions", {**CHAT, "web_search_options": {}}),
        ("/v1/batches", {"input_file_id": url, "endpoint": "/v1/completions", "completion_window": "24h"}),
    ]  # fmt: skip


async def test_no_request_makes_the_router_fetch_anything(world: World) -> None:
    """Images, files, tools on other servers: each is refused by name, and nobody is called."""
    await world.serve(await world.engine())
    called = 0

    def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal called
        called += 1
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x.png"
    async with server, httpx.AsyncClient(base_url=world.url, timeout=20) as http:
        for path, body in fetching(url):
            answer = await http.post(path, json=body)
            assert 400 <= answer.status_code < 500, (path, body, answer.text)
            assert answer.status_code != 401
            assert url not in answer.text, "what a client wrote is not repeated at length"
        await asyncio.sleep(0.1)
    assert called == 0
