"""The oracle itself: what it lets pass and what it must not."""

from __future__ import annotations

import socket
import threading

import pytest
from tests.oracle import Reading, check, read

REFERENCE = "one two three"
BROKEN = [{"code": "engine_died"}]


@pytest.mark.parametrize(
    "reading",
    [
        Reading("p", REFERENCE, 200, "length", done=True),
        Reading("p", "one tw", 200, errors=BROKEN),
        Reading("p", "", 200, errors=BROKEN),
        Reading("p", "", 503, errors=BROKEN),
    ],
)
def test_a_whole_answer_a_declared_end_and_a_refusal_pass(reading: Reading) -> None:
    check(reading, REFERENCE)


@pytest.mark.parametrize(
    "reading",
    [
        Reading("p", "one tow three", 200, "length", done=True),
        Reading("p", "one two", 200, "length", done=True),
        Reading("p", "one two three four", 200, "length", done=True),
        Reading("p", REFERENCE, 200, "length"),
        Reading("p", REFERENCE, 200, "length", done=True, errors=BROKEN),
        Reading("p", "one", 200, done=True),
        Reading("p", "one", 200, errors=[*BROKEN, *BROKEN]),
        Reading("p", "one", 200, errors=BROKEN, done=True),
        Reading("p", "one", 200),
        Reading("p", "one"),
        Reading("p", "one", 503, errors=BROKEN),
        Reading("p", "", 503),
        Reading("p", "one", 200, errors=BROKEN, hung=True),
    ],
)
def test_what_is_altered_short_silent_or_said_twice_does_not(reading: Reading) -> None:
    with pytest.raises(AssertionError):
        check(reading, REFERENCE)


def test_a_cut_passes_where_the_router_was_killed() -> None:
    check(Reading("p", "one", 200), REFERENCE, cut_allowed=True)
    with pytest.raises(AssertionError, match="altered"):
        check(Reading("p", "two", 200), REFERENCE, cut_allowed=True)


def test_a_stream_that_hangs_passes_nowhere() -> None:
    event = b'data: {"choices": [{"text": "one", "finish_reason": null}]}\n\n'
    let_go = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + event)
                let_go.wait(20)

        thread = threading.Thread(target=serve)
        thread.start()
        port = server.getsockname()[1]
        reading = read(f"http://127.0.0.1:{port}", {}, Reading("p"), patience=0.5)
        let_go.set()
        thread.join()
    assert (reading.text, reading.hung) == ("one", True)
    with pytest.raises(AssertionError, match="it hangs"):
        check(reading, REFERENCE, cut_allowed=True)
