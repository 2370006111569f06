"""Detokenizing piece by piece gives exactly the text of the whole, and never half a character on the way."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.effort import examples
from tests.unit.platform import tokenizers_for_tests as made

from quire.text import Detokenizer, Tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte_level": Tokenizer.load(made.write(root / "bl", made.byte_level())),
        "byte_fallback": Tokenizer.load(
            made.write(root / "bf", made.byte_fallback(), config={"eos_token": "</s>"})
        ),
    }


def in_pieces(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    out = []
    at = 0
    for cut in cuts:
        out.append(detokenizer.push(ids[at : at + cut]))
        at += cut
    return [*out, detokenizer.push(ids[at:]), detokenizer.finish()]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@settings(max_examples=examples(400), deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_pieces_of_random_ids_join_to_the_text_of_the_whole(
    tokenizers: dict[str, Tokenizer], kind: str, data: st.DataObject, skip: bool
) -> None:
    tokenizer = tokenizers[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=24))
    cuts = data.draw(st.lists(st.integers(0, 4), max_size=24))
    assert "".join(in_pieces(tokenizer, ids, cuts, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@settings(max_examples=examples(150), deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁�"), max_size=20))
def test_no_piece_of_a_real_text_has_a_replacement_character(
    tokenizers: dict[str, Tokenizer], kind: str, text: str
) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = in_pieces(tokenizer, ids, [1] * len(ids), skip=True)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_emoji_comes_out_whole_with_its_last_byte(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = [
        next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == bytes([b]))
        for b in "🦊".encode()
    ]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([index]) for index in ids] == ["", "", "", "🦊"]
    assert detokenizer.finish() == ""


def test_an_unfinished_character_is_given_up_at_the_end_only(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    first = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xf0")
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push([first]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_special_tokens_are_left_out_or_shown(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode("<think>hi<|im_end|>", add_special_tokens=False)
    assert Detokenizer(tokenizer).push(ids) == "<think>hi"
    assert Detokenizer(tokenizer, skip_special_tokens=False).push(ids) == "<think>hi<|im_end|>"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_each_token_has_a_name_of_its_own(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    keys = tokenizer.keys
    assert len(set(keys.values())) == len(keys) == tokenizer.vocab_size
    for index, key in keys.items():
        raw = tokenizer.token_bytes(index)
        if key.startswith("bytes:"):
            assert bytes.fromhex(key.removeprefix("bytes:").replace("\\x", "")) == raw
            assert "\ufffd" in raw.decode(errors="replace")
        elif key != f"token_id:{index}":
            assert key.encode() == raw
        else:
            assert raw.decode() in keys.values()
    assert tokenizer.vocab_size not in keys


def test_a_byte_token_gives_way_to_the_token_of_its_text(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_fallback"]
    vocabulary = tokenizer._backend.get_vocab()
    keys = tokenizer.keys
    assert keys[vocabulary["b"]] == "b"
    assert keys[vocabulary["<0x62>"]] == f"token_id:{vocabulary['<0x62>']}"
    assert (keys[vocabulary["\u2581a"]], keys[vocabulary["a"]]) == (" a", "a")
    assert keys[vocabulary["<0xE2>"]] == "bytes:\\xe2"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", ["the cat, the dog", "naïve 🙂 a  b"])
def test_the_bytes_of_tokens_join_to_the_text(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(map(tokenizer.token_bytes, ids))
    assert joined.removeprefix(b" " if kind == "byte_fallback" else b"").decode() == text
