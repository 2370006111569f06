"""The client of other servers over real sockets: every way in which an answer is cut into bytes, and every way in
which it is not whole."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import trustme
from tests.integration.raw_server import DONE, Raw, chunked, event, serving, text, usage, whole

from quire.chat import Conversation, Piece
from quire.remote import BrokenOff, Lost, Refused, Server, TimedOut, Unreachable, Unreadable, http

STREAM = [text("Grüße"), text(", 🦊", finish_reason="stop"), event({"choices": [], "usage": usage(3)}), DONE]


async def read(server: Server) -> str:
    """The text of one stream."""
    said = ""
    async with aclosing(server.stream("/chat/completions", b"{}")) as chunks:
        async for chunk in chunks:
            said += "".join(choice.delta.text for choice in chunk.choices if choice.delta)
    return said


async def answering(*pieces: bytes, closes: bool = False, timeout: float | None = 10) -> str:
    """What a client reads of an answer that is sent in these pieces."""

    async def answer(raw: Raw, writer: asyncio.StreamWriter, line: str, body: Any) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if closes:
            writer.close()

    async with serving(answer) as raw:
        server = Server(raw.url, timeout=timeout)
        try:
            return await read(server)
        finally:
            server.close()


@pytest.mark.parametrize(
    ("answer", "closes"),
    [
        (chunked(STREAM), False),
        (chunked([bytes([byte]) for byte in b"".join(STREAM)]), False),
        (whole(b"".join(STREAM)), False),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + whole(b"".join(STREAM)), False),
        (b"HTTP/1.0 200 OK\r\n\r\n" + b"".join(STREAM), True),
    ],
    ids=["chunked", "a byte a chunk", "whole", "after an interim answer", "to the end"],
)
async def test_an_answer_is_read_however_it_is_cut(answer: bytes, closes: bool) -> None:
    assert await answering(answer, closes=closes) == "Grüße, 🦊"
    assert await answering(*[bytes([byte]) for byte in answer], closes=closes) == "Grüße, 🦊"


@pytest.mark.parametrize(
    ("answer", "error", "words", "kind"),
    [
        (chunked(STREAM[:2], end=False), Lost, "the connection broke", "connection lost"),
        (chunked(STREAM[:3]), Lost, "without [DONE]", "cut off"),
        (whole(b"".join(STREAM))[:-3], Lost, "the connection broke", "connection lost"),
        (
            chunked([STREAM[0], event({"error": {"message": "the engine died", "code": "engine_died"}})]),
            BrokenOff, "the engine died", "stream error engine_died",
        ),
        (chunked([event(b"{nonsense")]), Unreadable, "what is no answer", "unreadable answer"),
        (chunked([event({"choices": 1})]), Unreadable, "what is no answer", "unreadable answer"),
        (chunked([], end=False) + b"zz\r\n", Unreadable, "no length", "unreadable answer"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", Unreadable, "not HTTP", "unreadable answer"),
        (
            whole(b'{"error": {"message": "too much", "type": "rate_limit", "code": null}}', 429),
            Refused, "too much", "429 rate_limit",
        ),
        (whole(b'{"object": "error", "message": "older", "code": 40}', 400), Refused, "older", "400 40"),
        (whole(b'{"detail": "Not Found"}', 404), Refused, "Not Found", "404"),
        (whole(b"<html>", 502), Refused, "the server answered 502: <html>", "502"),
        (whole(b"", 500), Refused, "the server answered 500", "500"),
    ],
)  # fmt: skip
async def test_an_answer_that_is_not_whole_is_an_error_that_says_so(
    answer: bytes, error: type[Exception], words: str, kind: str
) -> None:
    with pytest.raises(error, match=words.replace("[", r"\[")) as told:
        await answering(answer, closes=True)
    assert type(told.value) is error
    assert getattr(told.value, "kind") == kind  # noqa: B009 - any RemoteError has it


async def test_hints_say_what_to_do() -> None:
    with pytest.raises(Refused) as told:
        await answering(whole(b'{"error": {"message": "no key"}}', 401))
    assert "--api-key" in (told.value.hint or "")
    with pytest.raises(Refused) as told:
        await answering(whole(b"", 404))
    assert "/v1" in (told.value.hint or "")


async def test_no_answer_in_time_and_nobody_there() -> None:
    with pytest.raises(TimedOut, match=r"within 0\.2 s"):
        await answering(b"HTTP/1.1 200 OK\r\n", timeout=0.2)
    async with serving(lambda *_: asyncio.sleep(0)) as raw:
        url = raw.url
    with pytest.raises(Unreachable, match="connection refused"):
        await read(Server(url))


async def test_a_connection_is_used_again_while_it_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(raw: Raw, writer: asyncio.StreamWriter, line: str, body: Any) -> None:
        writer.write(whole(b"".join(STREAM)))
        if len(raw.asked) == 2:
            await writer.drain()
            writer.close()  # without a word before

    async with serving(answer) as raw:
        server = Server(raw.url)
        for connections in (1, 1, 2, 2):
            assert await read(server) == "Grüße, 🦊"
            assert raw.connections == connections
            await asyncio.sleep(0.05)
        monkeypatch.setattr(http, "REUSED_FOR", 0.01)
        assert await read(server) == "Grüße, 🦊"
        assert raw.connections == 3, "one that was idle for long may be closing"
        server.close()


async def test_no_request_is_sent_twice() -> None:
    async def answer(raw: Raw, writer: asyncio.StreamWriter, line: str, body: Any) -> None:
        if len(raw.asked) == 2:
            writer.close()  # takes the request on a used connection, and leaves without a byte
        else:
            writer.write(whole(b"".join(STREAM)))

    async with serving(answer) as raw:
        server = Server(raw.url)
        await read(server)
        with pytest.raises(Lost):
            await read(server)
        assert len(raw.asked) == 2
        server.close()


async def test_by_https_the_certificate_has_to_be_trusted(tmp_path: Path) -> None:
    async def answer(raw: Raw, writer: asyncio.StreamWriter, line: str, body: Any) -> None:
        writer.write(whole(b"".join(STREAM)))

    authority, other = trustme.CA(), trustme.CA()
    shown = authority.issue_cert("router.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    shown.configure_cert(context)
    for name, pem in (("its", shown.cert_chain_pems[0]), ("other", other.cert_pem)):
        pem.write_to_path(str(tmp_path / name))
    async with serving(answer, context) as raw:
        url = raw.url.replace("http", "https")
        server = Server(url, certificate=str(tmp_path / "its"))
        assert await read(server) == "Grüße, 🦊"
        server.close()
        for certificate in (str(tmp_path / "other"), None):
            with pytest.raises(Unreachable) as told:
                await read(Server(url, certificate=certificate))
            assert told.value.kind == "no TLS"
    with pytest.raises(Unreachable, match="cannot read the certificate"):
        Server(url, certificate=str(tmp_path / "nothing"))


async def test_leaving_a_stream_closes_its_connection() -> None:
    async def answer(raw: Raw, writer: asyncio.StreamWriter, line: str, body: Any) -> None:
        writer.write(chunked(STREAM[:1], end=False))
        await writer.drain()

    async with serving(answer) as raw:
        server = Server(raw.url)
        async with aclosing(server.stream("/chat/completions", b"{}")) as chunks:
            await anext(chunks)
        async with asyncio.timeout(5):
            while not raw.left:
                await asyncio.sleep(0.01)


async def test_a_conversation_keeps_what_was_said_when_an_answer_breaks_off() -> None:
    thought = event({"choices": [{"delta": {"reasoning": "hm"}}]})
    older = event({"choices": [{"delta": {"reasoning_content": "m"}}]})
    answers = [
        chunked([thought, older, *STREAM]),
        chunked([text("half"), event({"error": {"message": "the engine died"}})]),
        chunked([text("half"), event({"error": {"message": "the engine died"}})]),
        chunked([text("half"), text(" of it")], end=False),
    ]

    async def answer(raw: Raw, writer: asyncio.StreamWriter, line: str, body: Any) -> None:
        writer.write(answers[len(raw.asked) - 1])

    async with serving(answer) as raw:
        server = Server(raw.url)
        talk = Conversation("m", {"seed": 4}, "Be brief")
        async with aclosing(talk.answer(server, "one")) as pieces:
            assert [piece async for piece in pieces] == [
                Piece("thought", "hm"), Piece("thought", "m"), Piece("text", "Grüße"), Piece("text", ", 🦊"),
                Piece("end", "stop"),
            ]  # fmt: skip
        first = [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "Grüße, 🦊"},
        ]
        assert talk.messages() == first
        with pytest.raises(BrokenOff):
            [_ async for _ in talk.answer(server, "two")]
        assert talk.messages() == first
        with pytest.raises(BrokenOff):
            [_ async for _ in talk.answer(server, "one")]
        assert talk.again() == "one"
        assert talk.messages() == first, "an answer to the same question before it stays"
        async with aclosing(talk.answer(server, "two")) as pieces:
            assert [(await anext(pieces)).text for _ in range(2)] == ["half", " of it"]
        assert talk.messages()[3:] == [
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": "half of it"},
        ]
        assert talk.again() == "two", "to ask again is to take the answer back"
        assert talk.messages() == first
        server.close()
    assert raw.asked[1][1] == {
        "model": "m", "messages": [*first, {"role": "user", "content": "two"}], "stream": True, "seed": 4,
    }  # fmt: skip
