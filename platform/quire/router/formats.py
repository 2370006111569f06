"""What is particular to one endpoint family: how a body is read, how a `Job` is made of it, and how an answer
looks, whole (`Format`) and in pieces (`StreamFormat`). The families are in `api/`; `exchange` and the lines of
batches know these shapes alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol, TypeVar

from quire.errors import Api, HttpError
from quire.router.access import Caller
from quire.router.fleet import ServedModel
from quire.router.job import Job, Update
from quire.router.spans import RequestSpan
from quire_schemas.openai.answer import Usage
from quire_schemas.openai.request import ModelRequest

R = TypeVar("R", bound=ModelRequest)
NO_NAMES: Final[Mapping[str, str]] = MappingProxyType({})
"""Of an API whose fields are our own."""


class Format(Protocol[R]):
    """What is particular to one endpoint family."""

    operation: str
    api: Api
    """Whose clients read the answers, errors among them."""
    names: Mapping[str, str]
    """Its fields, by the names of those of the chat request that they stand for, the longer ones first."""

    def read(self, body: bytes, ignore_unknown: bool) -> R:
        """The request in a body, without the fields that are unknown if they are to be ignored. Raises
        `BadRequest`.
        """

    def sequences(self, request: R) -> int:
        """How many sequences it will run."""

    def job(
        self, request: R, served: ServedModel, size: int, arrived_at: float, span: RequestSpan, caller: Caller
    ) -> Awaitable[Job]:
        """The request as a job."""

    def whole(self, job: Job, request: R, updates: Sequence[Update], usage: Usage) -> Awaitable[bytes]:
        """The answer in one piece, as JSON, from all updates of the run."""

    def stream(self, job: Job, request: R) -> StreamFormat:
        """The answer in pieces."""


class StreamFormat(Protocol):
    """Writes the events of one stream."""

    ping: bytes
    """Says that the stream goes on; it may stand between any two events."""
    cut: bool
    """Whether clients tell a stream that broke off from a whole one by its connection alone, which is cut then."""

    def events(self, updates: Sequence[Update], usage: Callable[[], Usage]) -> bytes:
        """Events for one batch; `usage` tells the tokens so far."""

    def end(self, usage: Usage) -> Awaitable[bytes]:
        """What tells the client that the answer is complete."""

    def broken(self, error: HttpError) -> Awaitable[bytes]:
        """The one event that says that it never will be."""


__all__ = ["NO_NAMES", "Format", "StreamFormat"]
