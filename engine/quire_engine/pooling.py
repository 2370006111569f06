"""One vector out of a prompt's final states: what a request that draws nothing is computed for. No torch in here.

A step gives the sum of the states that it was asked for, in float32: those of all tokens of a chunk for `mean`,
the last token's alone for `last`. Sums of chunks are added up here in float64, so that the cut of the chunks makes
no difference worth the name. The vector is cut to its leading `dimensions` first (models trained for it keep their
meaning there: Matryoshka embeddings), and brought to length 1 then.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quire_schemas.wire import Pooling


class Pool:
    """The states of one request so far."""

    __slots__ = ("_num_tokens", "_sum", "pooling")

    def __init__(self, pooling: Pooling, num_tokens: int) -> None:
        self.pooling = pooling
        self._num_tokens = num_tokens
        self._sum: npt.NDArray[np.float64] | None = None

    def rows(self, start: int, end: int) -> int:
        """Of how many of the last tokens from `start` to `end` the states are wanted."""
        if self.pooling.kind == "mean":
            return end - start
        return int(end == self._num_tokens)

    def add(self, states: bytes) -> None:
        """Take a step's sum, float32."""
        summed = np.frombuffer(states, dtype="<f4").astype(np.float64)
        self._sum = summed if self._sum is None else self._sum + summed

    def clear(self) -> None:
        """Everything is to be computed again."""
        self._sum = None

    def vector(self) -> bytes:
        """The request's vector, little-endian float32, once all that is wanted was added.

        A vector without length stays as it is. Raises ValueError when nothing was added.
        """
        if self._sum is None:
            raise ValueError("no state was added")
        vector = self._sum[: self.pooling.dimensions]
        if self.pooling.kind == "mean":
            vector = vector / self._num_tokens
        if self.pooling.normalize and (length := float(np.linalg.norm(vector))) > 0:
            vector = vector / length
        return vector.astype("<f4").tobytes()
