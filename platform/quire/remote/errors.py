"""What can go wrong between a client and a server; the tree is drawn in `quire.remote`."""

from __future__ import annotations


class RemoteError(Exception):
    """A request did not get its answer. `kind` is a few words that are the same for errors of one sort."""

    def __init__(self, message: str, hint: str | None = None, kind: str = "error") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.kind = kind


class Unreachable(RemoteError):
    """There is no connection."""


class Lost(RemoteError):
    """The answer is not whole."""


class TimedOut(RemoteError):
    """The answer did not come in time."""


class Unreadable(RemoteError):
    """The answer is not one of this API."""


class Refused(RemoteError):
    """The server said no, by the HTTP status `status`."""

    def __init__(self, status: int, message: str, hint: str | None, kind: str) -> None:
        super().__init__(message, hint, kind)
        self.status = status


class BrokenOff(RemoteError):
    """The server ended a stream with an error."""
