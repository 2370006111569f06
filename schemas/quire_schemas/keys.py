"""API keys: what one looks like, and the two things that are told of it, its id and its SHA-256.

    qk_3f9c0d12ab47_<64 hexadecimal digits>     a key: 256 random bits behind a public id
    sha256:3f9c0d12ab47:<digest>                 its line in a manifest, `spec.keys[].hash`
    sha256:<digest>                              the same without an id, as sha256sum tells it: for a string of
                                                 the user's own, which has none, or for one of ours

A digest with an id is found by the id and compared in constant time. One without is found by itself, which nobody
can steer towards that of another key. No slow hash is needed for 256 random bits; who brings a string of his own
answers for how hard it is to guess.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass

_KEY = re.compile(r"qk_([0-9a-f]{12})_[0-9a-f]{64}")
HASH = r"^sha256:([0-9a-f]{12}:)?[0-9a-f]{64}$"
MIN_LENGTH = 16
"""Characters of a key that users bring: what is shorter can be guessed."""
MAX_LENGTH = 512


@dataclass(frozen=True, slots=True)
class Digest:
    """What is known of a key without knowing it."""

    sha256: str
    id: str = ""
    """Empty for a key that is not of our form."""

    def __str__(self) -> str:
        """Its line in a manifest."""
        return f"sha256:{self.id}:{self.sha256}" if self.id else f"sha256:{self.sha256}"

    @classmethod
    def of(cls, key: str) -> Digest:
        """That of a key of either form."""
        return cls(hashlib.sha256(key.encode()).hexdigest(), key_id(key))

    @classmethod
    def read(cls, line: str) -> Digest:
        """The digest in a line that matches `HASH`."""
        *_, middle, digest = ("", *line.removeprefix("sha256:").split(":"))
        return cls(digest, middle)


def key_id(key: str) -> str:
    """The public id in a key of our form; empty for any other string."""
    found = _KEY.fullmatch(key)
    return found[1] if found is not None else ""


_LIKE = re.compile(r"(?i)(qk_(?:[0-9a-f]{12}(?=_))?)[0-9a-z_]{13,}|(qk-[0-9a-f]{12})-[0-9a-f]+")


def masked(text: str) -> str:
    """A text without what is secret of keys of our form, whole or in part, that stand in it."""
    return _LIKE.sub(lambda found: f"{found[1] or found[2]}…", text)


def new_key() -> str:
    """A key that nobody has."""
    return f"qk_{secrets.token_hex(6)}_{secrets.token_hex(32)}"


def is_usable(key: str) -> bool:
    """Whether a string can be sent in a header, and is long enough to be a key."""
    return MIN_LENGTH <= len(key) <= MAX_LENGTH and re.fullmatch(r"[\x21-\x7e]+", key) is not None
