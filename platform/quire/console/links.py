"""Who may ask the console: the tokens of the links that were printed, of which only hashes are kept."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import deque
from typing import Final

KEPT: Final = 8
"""Links that count at a time; one more, and the oldest counts no longer."""


class Links:
    """Tokens of 256 random bits, in the memory of this process alone."""

    def __init__(self) -> None:
        self._hashes: deque[bytes] = deque(maxlen=KEPT)
        self.newest_used = False
        """Whether somebody came by the newest link."""

    def mint(self) -> str:
        """A fresh token. It is not kept, and cannot be told again."""
        token = secrets.token_urlsafe(32)
        self._hashes.append(_hash(token))
        self.newest_used = False
        return token

    def knows(self, token: str) -> bool:
        """Whether this token counts. How long that takes does not tell how near it is to one that does."""
        given = _hash(token)
        found = [hmac.compare_digest(given, known) for known in self._hashes]
        if found and found[-1]:
            self.newest_used = True
        return any(found)


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
