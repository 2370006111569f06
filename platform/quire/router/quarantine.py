"""Which requests may be what engines die of, so that none of them takes down one replica after the other.

A request is *suspected* when its engine died, or stopped making steps, before it had brought a token, or a beam
search word that it could have: something that kills on sight was among those. It is *condemned*, and not sent
again, when that has happened to it twice, at least once on trial. The first token of a request with the same
fingerprint clears it. To keep the innocent apart from the guilty, the gateway tries suspects one at a time on each
replica: no other suspect was beside what died on trial, though requests that nobody suspects yet may have been.
And it tries none at a replica that has died under it before, as long as there is another one: a replica that dies
of everything would else condemn all that it is given.

Remembered are fingerprints, never contents; at most `MAX_REMEMBERED`, the oldest are forgotten first, and each for
`REMEMBERED_SECONDS` after its last death. The router alone knows them, and forgets them when it starts anew.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from quire_schemas.wire import Sampling

MAX_REMEMBERED: Final = 1024
REMEMBERED_SECONDS: Final = 600.0
DEATHS_TO_CONDEMN: Final = 2
_encoder: Final = msgspec.msgpack.Encoder()


def fingerprint(model: str, template_hash: str, token_ids: Sequence[int], sampling: Sampling) -> bytes:
    """What makes two requests the same to an engine, seeds aside: 16 bytes."""
    seedless = msgspec.structs.replace(sampling, seed=None)
    digest = hashlib.blake2b(_encoder.encode((model, template_hash, seedless)), digest_size=16)
    digest.update(array("q", token_ids).tobytes())
    return digest.digest()


@dataclass(slots=True)
class _Record:
    last_at: float
    deaths: set[Hashable] = field(default_factory=set)
    replicas: set[str] = field(default_factory=set)
    tried: bool = False


class Suspects:
    """The table. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._records: dict[bytes, _Record] = {}  # the one that died last is last

    def __len__(self) -> int:
        return len(self._records)

    def blame(self, fingerprint: bytes, death: Hashable, *, tried: bool, replica: str = "") -> None:
        """An engine died under the request before its first token. One `death`, of this `replica`, counts once.

        `tried`: the request was there on trial, with no other suspect beside it.
        """
        record = self._find(fingerprint) or _Record(0.0)
        record.last_at = self._clock()
        record.deaths.add(death)
        record.replicas.add(replica)
        record.tried |= tried
        self._records.pop(fingerprint, None)
        self._records[fingerprint] = record
        while len(self._records) > MAX_REMEMBERED or self._is_over(next(iter(self._records.values()))):
            del self._records[next(iter(self._records))]

    def clear(self, fingerprint: bytes) -> None:
        """An engine has survived the request."""
        self._records.pop(fingerprint, None)

    def is_suspected(self, fingerprint: bytes) -> bool:
        return self._find(fingerprint) is not None

    def died_at(self, fingerprint: bytes) -> Collection[str]:
        """The replicas that died under it."""
        record = self._find(fingerprint)
        return record.replicas if record is not None else ()

    def is_condemned(self, fingerprint: bytes) -> bool:
        record = self._find(fingerprint)
        return record is not None and record.tried and len(record.deaths) >= DEATHS_TO_CONDEMN

    def _find(self, fingerprint: bytes) -> _Record | None:
        record = self._records.get(fingerprint)
        if record is not None and self._is_over(record):
            del self._records[fingerprint]
            return None
        return record

    def _is_over(self, record: _Record) -> bool:
        return self._clock() - record.last_at > REMEMBERED_SECONDS
