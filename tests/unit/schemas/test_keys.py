"""Keys and what is told of them."""

from __future__ import annotations

import hashlib
import re

from hypothesis import given
from hypothesis import strategies as st

from quire_schemas.keys import HASH, MAX_LENGTH, MIN_LENGTH, Digest, is_usable, key_id, new_key


def test_a_key_has_256_random_bits_behind_an_id() -> None:
    keys = [new_key() for _ in range(100)]
    assert len({key_id(key) for key in keys}) == 100
    assert len({key.rsplit("_", 1)[1] for key in keys}) == 100
    for key in keys:
        assert re.fullmatch(r"qk_[0-9a-f]{12}_[0-9a-f]{64}", key)
        assert is_usable(key)
        line = str(Digest.of(key))
        assert line == f"sha256:{key_id(key)}:{hashlib.sha256(key.encode()).hexdigest()}"
        assert re.fullmatch(HASH, line)
        assert Digest.read(line) == Digest.of(key)
        assert key.rsplit("_", 1)[1] not in line


@given(st.text(min_size=1, max_size=80))
def test_any_other_string_has_a_digest_alone(text: str) -> None:
    digest = Digest.of(text)
    assert digest.id == ""
    assert re.fullmatch(HASH, str(digest))
    assert Digest.read(str(digest)) == digest


def test_what_is_too_short_or_fits_no_header_is_no_key() -> None:
    assert [is_usable("x" * length) for length in (MIN_LENGTH - 1, MIN_LENGTH, MAX_LENGTH, MAX_LENGTH + 1)] == [
        False, True, True, False,
    ]  # fmt: skip
    for odd in (" ", "\n", "\x7f", "é", "\0"):
        assert not is_usable("x" * 20 + odd)
