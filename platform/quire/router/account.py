"""What is known of one request: an account, opened when it arrives, filled in on its way, told at its end.

The guard opens one for every request and tells it as a line of the access log; who answers the request fills it
in, and tells it to a collector of metrics (`quire.metering`). All that it has are numbers, names of the routing
table, words of our own, and two ids that were checked: nothing a client wrote as text ever gets into it.

A line is logfmt, in the log where everything else is:

    request=req_1f… trace=0af7… method=POST route=/v1/chat/completions operation=chat policy=team key=ci model=m
    replica=m-0-x status=200 finish=stop prompt_tokens=21 cached_tokens=16 completion_tokens=9 queue_ms=0.2
    ttft_ms=41.5 total_ms=180.3

What does not apply is left out. `status` is what was sent, also for a stream that broke later: then there is an
`error`. `client=gone` says that the client closed the connection before its answer was complete, `client=slow`
that we did, as it read nothing.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from quire_schemas.wire import AccessLogged

log = logging.getLogger("quire.access")


def new_request_id() -> bytes:
    """An id for a request that has brought none."""
    return b"req_" + secrets.token_hex(16).encode()


PROBES: Final = frozenset({"/livez", "/readyz", "/health", "/metrics"})
"""Routes that machines ask all day, and whose answer, whatever it is, is no failure: they are not logged."""
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_PLAIN: Final = re.compile(r"[!#-<>-\[\]-~]+")
"""A value that needs no quotes: visible ASCII without quote, equals sign and backslash."""
_STATE: Final = "account"


@dataclass(slots=True)
class Account:
    """One request. Times are seconds; what is not known, or does not apply, is empty or None."""

    request_id: str = ""
    method: str = ""
    arrived_at: float = field(default_factory=time.monotonic)
    trace_id: str = ""
    route: str = ""
    """The path as the API has it, with names in place of what a client puts there."""
    operation: str = ""
    policy: str = ""
    """That of the key that it came with."""
    key: str = ""
    """The name of that key."""
    model: str = ""
    asked: str = ""
    """The name that the request has for the model; one of those that it is served by."""
    replica: str = ""
    status: int | None = None
    """Of the answer that was sent."""
    finish: str = ""
    error: str = ""
    """A code of the error contract, or how else it ended before its time."""
    failed: bool = False
    """By no fault of the client."""
    client: str = ""
    """How it left before the end: `gone` by itself, `slow` where it was cut off."""
    stream: bool = False
    background: bool = False
    """Nobody waits for it."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    queue: float | None = None
    first_token: float | None = None
    """From the arrival to the first token."""
    writing: float | None = None
    """From the first token to the end."""
    total: float | None = None

    @classmethod
    def of(cls, scope: Mapping[str, Any]) -> Account:
        """That of an ASGI request; a new one for a client inside this process, whom no guard has seen."""
        found = scope.get("state", {}).get(_STATE)
        return found if isinstance(found, cls) else cls()

    def open(self, scope: Mapping[str, Any]) -> None:
        """Let those who answer the request find it."""
        scope["state"][_STATE] = self

    def line(self) -> str:
        """As the access log has it."""
        return " ".join(f"{name}={_written(value)}" for name, value in self._told() if value not in ("", None))

    def _told(self) -> Iterator[tuple[str, str | int | None]]:
        yield "request", self.request_id
        yield "trace", self.trace_id
        yield "method", self.method
        yield "route", self.route
        yield "operation", self.operation
        yield "policy", self.policy
        yield "key", self.key
        yield "model", self.model
        yield "replica", self.replica
        yield "status", self.status
        yield "finish", self.finish
        yield "error", self.error
        yield "client", self.client
        yield "stream", "true" if self.stream else ""
        yield "prompt_tokens", self.prompt_tokens
        yield "cached_tokens", self.cached_tokens
        yield "completion_tokens", self.completion_tokens
        yield "queue_ms", _milliseconds(self.queue)
        yield "ttft_ms", _milliseconds(self.first_token)
        yield "total_ms", _milliseconds(self.total)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.1f}"


def _written(value: str | int | None) -> str:
    """A value that is one word of one line, whatever is in it."""
    text = str(value)
    if _PLAIN.fullmatch(text):
        return text
    return '"' + "".join(_escaped(sign) for sign in text) + '"'


def _escaped(sign: str) -> str:
    if sign in '"\\':
        return "\\" + sign
    return sign if sign == " " or (sign.isprintable() and sign.isascii()) else f"\\u{ord(sign):04x}"


def is_logged(account: Account, which: AccessLogged) -> bool:
    """Whether the access log has a line for it."""
    if which == "none" or account.route in PROBES:
        return False
    return which == "all" or account.failed or (account.status or 0) >= 500


class AccessLog:
    """Writes the lines. `which` says which requests have one now."""

    def __init__(self, which: Callable[[], AccessLogged]) -> None:
        self._which = which

    def tell(self, account: Account) -> None:
        """The request has ended."""
        if is_logged(account, self._which()):
            account.total = time.monotonic() - account.arrived_at
            log.info("%s", account.line())
