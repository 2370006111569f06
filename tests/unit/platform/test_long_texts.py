"""Long texts: others run while one is tokenized, and what cannot fit is told by its length."""

from __future__ import annotations

import threading
import time
import unicodedata
from collections.abc import Callable

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.effort import examples
from tests.unit.platform import tokenizers_for_tests as made
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from quire import builtin
from quire.text import Tokenizer
from quire.text.tokenizer import _COMPOSED, AdvisedSampling


def of(backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(backend, {}, None, AdvisedSampling())


def composing() -> Tokenizer:
    backend = made.byte_level()
    backend.normalizer = normalizers.NFC()
    return of(backend)


BOUNDED = {"bytes": of(made.byte_level()), "fallback": of(made.byte_fallback()), "NFC": composing()}
TINY = Tokenizer.load(builtin.path("tiny"))


def _standstill(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that `work` takes on a thread, and the longest that this one stood still meanwhile."""
    took: list[float] = []

    def timed() -> None:
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)

    thread = threading.Thread(target=timed)
    last, longest = time.perf_counter(), 0.0
    thread.start()
    while not took:
        time.sleep(0.0005)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    thread.join()
    return took[0], longest


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_others_run_while_a_long_text_is_tokenized(way: str) -> None:
    text = "a block of the pool " * 20_000
    ids = TINY.encode(text)
    work: Callable[[], object] = (lambda: TINY.encode(text)) if way == "encode" else (lambda: TINY.decode(ids * 4))
    for _ in range(3):  # a busy machine may stop us for as long as that; the interpreter's lock would each time
        took, longest = _standstill(work)
        if longest < took / 2:
            return
    raise AssertionError(f"stood still for {longest:.3f} s of {took:.3f}")


@pytest.mark.parametrize("length", [10, 20_000])
def test_long_texts_have_the_ids_of_short_ones(length: int) -> None:
    text = "naïve 🙂 words, " * (length // 16 + 1)
    assert TINY.encode(text) == TINY._backend.encode(text).ids
    assert TINY.decode(TINY.encode(text)) == text


@settings(max_examples=examples(150), deadline=None)
@given(st.text() | st.text("aá\u0301\u1fbe\u0308\u0301 <|im_end>\u2581"), st.sampled_from(sorted(BOUNDED)))
def test_no_text_has_fewer_tokens_than_its_length_tells(text: str, kind: str) -> None:
    tokenizer = BOUNDED[kind]
    assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))


def test_the_bound_is_of_use() -> None:
    assert TINY.least_tokens("a " * 100_000) >= 200_000 // 16
    assert all(tokenizer.least_tokens("ab" * 10_000) >= 200 for tokenizer in BOUNDED.values())


def test_composing_leaves_as_many_bytes_as_is_said() -> None:
    def size(text: str) -> int:
        return len(text.encode())

    apart = {
        char: unicodedata.normalize("NFD", char)
        for char in map(chr, range(0x110000))
        if unicodedata.decomposition(char) or "\uac00" <= char <= "\ud7a3"
    }
    dearest: dict[str, int] = {}
    for char, parts in apart.items():
        if len(parts) == 1:
            dearest[parts] = max(dearest.get(parts, size(parts)), size(char))

    def price(parts: str) -> int:
        return sum(dearest.get(part, size(part)) for part in parts)

    composed = [(unicodedata.normalize("NFC", char), parts) for char, parts in apart.items()]
    assert all(size(char) <= price(parts) for char, parts in apart.items())
    assert all(price(parts) <= _COMPOSED * size(whole) for whole, parts in composed)


def test_where_text_may_vanish_there_is_no_bound() -> None:
    def lowercased(backend: tokenizers.Tokenizer) -> None:
        backend.normalizer = normalizers.Lowercase()

    def stripped(backend: tokenizers.Tokenizer) -> None:
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])

    def shortened(backend: tokenizers.Tokenizer) -> None:
        backend.normalizer = normalizers.Replace("  ", " ")

    def removed(backend: tokenizers.Tokenizer) -> None:
        split = pre_tokenizers.Split(" ", "removed")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])

    def swallowed(backend: tokenizers.Tokenizer) -> None:
        backend.add_tokens([AddedToken("<mask>", lstrip=True)])

    def incomplete(backend: tokenizers.Tokenizer) -> None:
        backend.model = models.BPE({"a": 0, "b": 1}, [])

    def of_words(backend: tokenizers.Tokenizer) -> None:
        backend.model = models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")

    for change in (lowercased, stripped, shortened, removed, swallowed, incomplete, of_words):
        backend = made.byte_level()
        change(backend)
        assert of(backend).least_tokens("a" * 1000) == 0, change.__name__
