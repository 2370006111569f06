"""Detokenizing and stop strings, exhaustively: every character, every place where bytes may be cut into tokens.

Characters are packed into long texts, and ids are pushed one at a time where each is one byte, so that a text is
cut at every byte boundary. By day every 41st character and the edges of all planes; by night all 1,112,064.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.effort import EFFORT, times
from tests.unit.platform import tokenizers_for_tests as made
from tests.unit.platform.test_stop import reference
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from quire.text import AnswerText, Detokenizer, Tokenizer
from quire.text.tokenizer import _BYTE_OF

PACKED = 1024
"""Characters of one text."""
EDGES = sorted(
    {0, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFD, 0x2581}
    | {plane << 16 for plane in range(17)}
    | {plane << 16 | 0xFFFF for plane in range(17)}
)
BYTE_CHARS = {byte: char for char, byte in _BYTE_OF.items()}


def texts() -> Iterator[str]:
    """All characters that are tried, in their order, a long text at a time."""
    stride = times(41, 1)
    points = sorted({*range(0, 0x110000, stride), *EDGES})
    chars = [chr(point) for point in points if not 0xD800 <= point < 0xE000]
    for at in range(0, len(chars), PACKED):
        yield "".join(chars[at : at + PACKED])


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte_level": Tokenizer.load(made.write(root / "bl", made.byte_level())),
        "byte_fallback": Tokenizer.load(
            made.write(root / "bf", made.byte_fallback(), config={"eos_token": "</s>"})
        ),
    }


def of_bytes(tokenizer: Tokenizer) -> Callable[[bytes], list[int]]:
    """Ids that are one byte each."""
    ids = {
        raw[0]: index
        for index in reversed(range(tokenizer.vocab_size))
        if len(raw := tokenizer.token_bytes(index)) == 1 and index not in tokenizer.special_ids
        if tokenizer.byte_level or index in tokenizer.byte_tokens
    }
    assert len(ids) == 256
    return lambda raw: [ids[byte] for byte in raw]


def pieces(tokenizer: Tokenizer, ids: list[int], size: int = 1) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    out = [detokenizer.push(ids[at : at + size]) for at in range(0, len(ids), size)]
    return [*out, detokenizer.finish()]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_every_character_cut_at_every_byte(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    by_bytes = of_bytes(tokenizer)
    for text in texts():
        ids = by_bytes(text.encode())
        whole = tokenizer.decode(ids)
        parts = pieces(tokenizer, ids)
        assert "".join(parts) == whole
        assert whole == text
        if tokenizer.byte_level:
            assert parts == [*_due(text), ""], "each comes out with its last byte, not before and not later"
        for size in (2, 3, 5, 7):
            assert "".join(pieces(tokenizer, ids, size)) == whole


def _due(text: str) -> Iterator[str]:
    for char in text:
        yield from [""] * (len(char.encode()) - 1)
        yield char


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_every_character_as_the_tokenizer_splits_it(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    """Among words that are tokens of more than a byte, so that runs of bytes begin and end in the middle."""
    tokenizer = tokenizers[kind]
    draw = random.Random(5)
    for packed in texts():
        words = ["the ", "cat", " a", "", "", ".", "é", "\n", " "]
        text = "".join(char + draw.choice(words) for char in packed)
        ids = tokenizer.encode(text, add_special_tokens=False)
        whole = tokenizer.decode(ids)
        if tokenizer.byte_level:
            assert whole == text
        for size in (1, 3):
            assert "".join(pieces(tokenizer, ids, size)) == whole


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_broken_characters_come_out_as_in_the_whole(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    """Pairs of high bytes, and longer runs: characters cut short, surrogates, overlong ones, some too high."""
    tokenizer = tokenizers[kind]
    by_bytes = of_bytes(tokenizer)
    high = range(0x80, 0x100, times(3, 1))
    runs = [bytes(pair) for pair in itertools.product(high, high)]
    draw = random.Random(9)
    runs += [
        bytes(draw.choices([0x80, 0xA0, 0xBF, 0xC0, 0xE0, 0xED, 0xF0, 0xF4, 0xF8, 0xFF, 0x41], k=4)) for _ in runs
    ]
    runs += [char.encode()[:cut] for char in "é你🦊\U0010ffff" for cut in range(1, len(char.encode()))]
    for at in range(0, len(runs), 128):
        ids = [index for run in runs[at : at + 128] for index in [*by_bytes(run), *_plain(tokenizer)]]
        whole = tokenizer.decode(ids)
        assert "".join(pieces(tokenizer, ids)) == whole
        assert "".join(pieces(tokenizer, ids, 3)) == whole


def _plain(tokenizer: Tokenizer) -> list[int]:
    """A token that is text by itself."""
    return tokenizer.encode("b", add_special_tokens=False)[-1:]


# ── stop strings ──────────────────────────────────────────────────────────────────────────────────────────


CASES: list[tuple[str, list[str]]] = [
    ("a🦊b🙂", ["🦊b"]),
    ("é你é你é", ["你é你"]),
    ("ababacab", ["abac", "bab"]),  # one begins inside the other's false start
    ("xSTOPy", ["STOP", "TO", "STO"]),  # nested: the inner one is complete first
    ("aaaaab", ["aab", "aaaa"]),
    ("…—…“”", ["—…“", "…“"]),  # characters that share their first bytes
    ("a</s>b", ["</s>b", "</", "b"]),
    ("你好你们好", ["好你们", "你们"]),
    ("ab🦊", ["🦊"]),
    ("🦊🦊", ["🦊🙂"]),  # a stop string that shares bytes and never comes
    ("\U0010ffff\U0010fffe", ["\U0010fffe"]),
]


@pytest.fixture(scope="module")
def splitter(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], tuple[Tokenizer, dict[bytes, int]]]:
    """Byte-level tokenizers in which every run of bytes in a text is a token."""
    folder: Path = tmp_path_factory.mktemp("splitter")

    def make(raw: bytes) -> tuple[Tokenizer, dict[bytes, int]]:
        runs = {raw[a:b] for a in range(len(raw)) for b in range(a + 1, len(raw) + 1)}
        ids = {run: index for index, run in enumerate(sorted(runs))}
        vocab: dict[str, Any] = {"".join(BYTE_CHARS[byte] for byte in run): index for run, index in ids.items()}
        backend = Backend(models.BPE(vocab=vocab, merges=[]))
        backend.decoder = decoders.ByteLevel()
        return Tokenizer.load(made.write(folder / raw.hex(), backend, config={"eos_token": None})), ids

    return make


def splits(raw: bytes, most: int) -> Iterator[list[bytes]]:
    """Every way to cut `raw` into runs, or `most` of them drawn where there are more."""
    places = range(1, len(raw))
    every = 1 << len(places)
    draw = random.Random(len(raw))
    for mask in range(every) if every <= most else (draw.randrange(every) for _ in range(most)):
        cuts = [0, *(place for place in places if mask >> (place - 1) & 1), len(raw)]
        yield [raw[a:b] for a, b in itertools.pairwise(cuts)]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(("text", "stops"), CASES)
def test_no_part_of_a_stop_string_gets_out_however_tokens_cut_it(
    splitter: Callable[[bytes], tuple[Tokenizer, dict[bytes, int]]], text: str, stops: list[str], include: bool
) -> None:
    raw = text.encode()
    tokenizer, ids = splitter(raw)
    expected, hit = reference(text, stops, include)
    for runs in splits(raw, times(4096, 1 << 18)):
        answer = AnswerText(tokenizer, stops=stops, include_stop=include)
        out = ""
        for run in runs:
            out += answer.push(ids[run])
            assert expected.startswith(out), f"{out!r} of {runs} is out too early"
            if answer.hit is not None:
                break
        else:
            out += answer.finish()
        assert (out, answer.hit) == (expected, hit), runs


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_random_stop_strings_in_random_texts(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    """Cut out of the text and out of each other; every byte a token, and as the tokenizer splits the text."""
    tokenizer = tokenizers[kind]
    by_bytes = of_bytes(tokenizer)
    draw = random.Random(11 if EFFORT == 1 else None)
    for number in range(times(400, 40_000)):
        alphabet = draw.choice(["ab", "ab\n é", "你好们", "🦊🙂a", "…—“”é", "aé你🦊 \u0301\u200d"])
        text = "".join(draw.choices(alphabet, k=draw.randrange(1, 24)))
        stops: list[str] = []
        for _ in range(draw.randrange(1, 5)):
            source = draw.choice([text, *stops])
            begin = draw.randrange(len(source))
            stop = source[begin : begin + draw.randrange(1, 6)] + draw.choice(["", "", draw.choice(alphabet)])
            stops.append(stop)
        include = draw.random() < 0.5
        for ids in (by_bytes(text.encode()), tokenizer.encode(text, add_special_tokens=False)):
            expected, hit = reference(tokenizer.decode(ids), stops, include)
            answer = AnswerText(tokenizer, stops=stops, include_stop=include)
            out = ""
            for index in ids:
                out += answer.push(index)
                assert expected.startswith(out), (number, text, stops)
                if answer.hit is not None:
                    break
            else:
                out += answer.finish()
            assert (out, answer.hit) == (expected, hit), (number, text, stops, include)
