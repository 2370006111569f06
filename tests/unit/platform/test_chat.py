"""Events out of bytes, and text that a terminal can only show."""

from __future__ import annotations

import io
import itertools
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.effort import examples

from quire.chat import Conversation, harmless
from quire.cli.chat import Screen
from quire.cli.program import run
from quire.remote.sse import Events

STREAM = (
    b": a comment\r\ndata: one\r\n\r\nevent: error\nid: 7\ndata:two\r\ndata: more\r\ndata\n\n"
    b"retry: 3\n\ndata:  three \r\rdata: \xf0\x9f\xa6\x8a\n\r\ndata: not ended"
)
EVENTS = [b"one", b"two\nmore\n", b" three ", "🦊".encode()]


def fed(*pieces: bytes) -> list[bytes]:
    events = Events()
    return [data for piece in pieces for data in events.feed(piece)]


def test_events_are_found_however_the_bytes_are_cut() -> None:
    assert fed(STREAM) == EVENTS
    assert fed(*[bytes([byte]) for byte in STREAM]) == EVENTS
    for first, second in itertools.combinations_with_replacement(range(len(STREAM) + 1), 2):
        assert fed(STREAM[:first], STREAM[first:second], STREAM[second:]) == EVENTS, (first, second)


@settings(max_examples=examples(50))
@given(
    st.lists(st.text("ab: é🦊", max_size=8), max_size=4),
    st.sampled_from(["\n", "\r", "\r\n"]),
    st.lists(st.integers(0, 60), max_size=4),
)
def test_every_stream_of_every_line_end_is_read(texts: list[str], end: str, cuts: list[int]) -> None:
    stream = "".join(f"data: {text}{end}{end}" for text in texts).encode()
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    assert fed(*[stream[a:b] for a, b in itertools.pairwise(places)]) == [text.encode() for text in texts]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\nand 🦊 é", "plain\ttext\nand 🦊 é"),
        ("\x1b[31mred\x1b]0;title\x07", "␛[31mred␛]0;title␇"),
        ("over\rwritten\x08\x7f", "over␍written␈␡"),
        ("\x9b31m \x90 \x85", "\ufffd31m \ufffd \ufffd"),
        ("\x00\x0b\x0c", "␀␋␌"),
    ],
)
def test_control_characters_become_pictures(text: str, shown: str) -> None:
    assert harmless(text) == shown


@given(st.text())
def test_no_text_has_a_control_character_left(text: str) -> None:
    shown = harmless(text)
    assert all(c in "\t\n" or not (ord(c) < 32 or 127 <= ord(c) < 160) for c in shown)
    assert len(shown) == len(text)
    assert "".join(map(harmless, text)) == shown, "it matters where a text is cut"


@pytest.mark.parametrize(
    ("words", "code", "message", "hint"),
    [
        (("--url", "http://127.0.0.1:9/v1"), 7, "connection refused", "does the server run"),
        (("--url", "127.0.0.1:8000"), 2, "is not a URL", "http://host:8000/v1"),
        (("--url", "http://h:x/v1"), 2, "is not a URL", "http://host:8000/v1"),
        (("--url", "http://me:secret@h/v1"), 2, "has a user or a password", "--api-key"),
        (("--url", "http://h/v1?a=b"), 2, "is not a base URL", "http://host:8000/v1"),
        (("--url", "http://h/v1", "--api-key", "secret\nx: y"), 2, "the API key has characters", "line end"),
        (("--url", "http://h/v1", "--message", " "), 2, "there is no question", "-m"),
    ],
)
def test_where_nobody_can_be_asked_the_command_says_why(
    words: tuple[str, ...], code: int, message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["chat", "m", "-m", "hi", *words]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert hint in err.partition("hint: ")[2]
    assert "secret" not in err


@pytest.mark.parametrize(
    ("shows", "dims", "seen"),
    [(True, True, "\x1b[2mhm␛[0m\x1b[0m\n\n"), (True, False, "thought: hm␛[0m\n\n"), (False, True, "")],
)
def test_thoughts_are_apart_from_the_answer(
    shows: bool, dims: bool, seen: str, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Screen(shows, dims)
    screen.thought("hm")
    screen.thought("\x1b[0m")
    screen.text("so")
    screen.end()
    assert capsys.readouterr() == ("so\n", seen)


def test_nothing_is_dimmed_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Screen(True).dims
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Screen(True).dims
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not Screen(True).dims


def test_a_reset_forgets_all_but_the_system_text() -> None:
    talk = Conversation("m", system="s", turns=[("a", "b")], asked="a", is_answered=True)
    talk.reset()
    assert talk.messages("q") == [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert talk.again() is None
