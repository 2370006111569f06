"""Errors of the HTTP side: which exception becomes which answer, in one table.

    ApiError                          carries the words for the client, and the parameter they are about
    ├── InvalidRequest                the request says something that is wrong or not understood
    │   ├── ContextLengthExceeded     prompt and asked tokens do not fit, now or ever
    │   └── ThreadsUnsupported        the conversation is to be kept here, which is for responses alone
    ├── HostRefused                   the Host or Origin is not one we answer to
    ├── Unauthenticated               no key, or none that is known
    ├── PermissionDenied              the key is not for this model or operation
    ├── RateLimited                   the key or its policy has had as much as it may for now
    │   └── BudgetSpent               until a day, a month or another time is over
    ├── NotFound                      no such path, or nothing kept by that id
    │   └── EndpointNotServed         a path that other servers have; the message says why not here
    ├── ModelNotFound                 no such model
    ├── MethodNotAllowed
    ├── Conflict                      what is there does not allow it
    ├── BodyTooLarge
    ├── BodyTimeout                   the client did not finish sending
    ├── UnsupportedMediaType
    ├── QueueFull                     as many requests wait as the manifest allows
    ├── MemoryShort                   the router has no memory for more than what runs
    ├── ServiceUnavailable            no replica is ready; one may be soon
    │   └── ModelStopped              no replica is wanted: none will be ready until the manifest changes
    ├── StorageUnavailable            the router's store cannot be read or written; what needs no store goes on
    │   └── StorageFull               for want of room
    ├── EngineUnavailable             engines died under the request, retries are used up
    │   └── RequestQuarantined        each time before its first token: it is not tried again
    ├── EngineDied                    the engine died after the first byte: only ever sent inside a stream
    ├── TimedOut                      waited longer than allowed for its turn, or for its first token
    │   └── OutOfTime                 all of its time is over, which it or its route set
    └── InternalError                 ours, or the engine's; details are in the log

    TextError                         of `quire.text`: what a checkpoint's template or tokenizer cannot do
    └── ParamRefused                  a sampling parameter, which it names, that the model cannot honour

The messages are our own words: nothing that a library said, no path, no address. Anything not in the table is an
`InternalError`. Codes are stable; clients branch on them. `x-should-retry` is what the official clients obey.

Status, headers and words are the same whatever API the request speaks (`Api`, told by its path); the body has the
shape that this API's clients read.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from quire.text.errors import (
    BadTemplate,
    BadTokenizer,
    NoChatTemplate,
    ParamRefused,
    TemplateFailed,
    TemplateRefused,
)
from quire_schemas.failures import Failure


class ApiError(Exception):
    """An error with words for the client. `param` names the field of the request, when there is one."""

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        """Seconds after which trying again makes sense."""


class InvalidRequest(ApiError):
    """The request is wrong."""


class ContextLengthExceeded(InvalidRequest):
    """The request can never fit."""


class ThreadsUnsupported(InvalidRequest):
    """Messages are to be kept here."""


class HostRefused(ApiError):
    """Host or Origin is not one of ours."""


class Unauthenticated(ApiError):
    """No key that is known."""


class PermissionDenied(ApiError):
    """The key is not for this."""


class RateLimited(ApiError):
    """A limit of the key or of its policy is reached."""


class BudgetSpent(RateLimited):
    """A budget of the key or of its policy is spent."""


class NotFound(ApiError):
    """No such path, or nothing that is kept by that id."""


class EndpointNotServed(NotFound):
    """Other servers have the path."""


class ModelNotFound(ApiError):
    """No such model."""


class MethodNotAllowed(ApiError):
    """The path exists, the method does not."""


class Conflict(ApiError):
    """What is there does not allow it."""


class BodyTooLarge(ApiError):
    """The body is above the limit."""


class BodyTimeout(ApiError):
    """The body did not arrive in time."""


class UnsupportedMediaType(ApiError):
    """The body is not declared as what it must be."""


class QueueFull(ApiError):
    """The queue is full."""


class MemoryShort(ApiError):
    """The router has no memory for more work."""


class ServiceUnavailable(ApiError):
    """No replica is ready."""


class ModelStopped(ServiceUnavailable):
    """The manifest asks for no replica."""


class StorageUnavailable(ApiError):
    """The router's store cannot be used now."""


class StorageFull(StorageUnavailable):
    """The router's store has no room."""


class EngineUnavailable(ApiError):
    """Engines died under the request before anything was sent."""


class RequestQuarantined(EngineUnavailable):
    """Engines die of this request."""


class EngineDied(ApiError):
    """The engine died in the middle of a stream."""


class TimedOut(ApiError):
    """The request waited too long for its turn, or for its first token."""


class OutOfTime(TimedOut):
    """All of the request's time is over."""


class InternalError(ApiError):
    """Something of ours broke."""


@dataclass(frozen=True, slots=True)
class Row:
    """How one kind of exception is answered. `message` None: the exception's own words are for the client."""

    status: int
    type: str
    code: str | None
    retry: bool | None = None
    """The `x-should-retry` header; None leaves it to the client's habits."""
    message: str | None = None
    close: bool = False
    """Close the connection after the answer."""
    challenge: bool = False
    """Say how to prove who one is."""


_BAD: Final = "invalid_request_error"
_OURS: Final = "server_error"

TABLE: Final[dict[type[Exception], Row]] = {
    InvalidRequest: Row(400, _BAD, None),
    ContextLengthExceeded: Row(400, _BAD, "context_length_exceeded"),
    ThreadsUnsupported: Row(400, _BAD, "thread_unsupported_request"),
    NoChatTemplate: Row(
        400,
        _BAD,
        "no_chat_template",
        message="This model has no chat template, so it cannot take messages. Use /v1/completions, or set "
        "spec.tokenizer.chatTemplateFile in the model's manifest.",
    ),
    TemplateRefused: Row(400, _BAD, "template_refused"),
    TemplateFailed: Row(400, _BAD, "template_failed"),
    ParamRefused: Row(400, _BAD, None),
    Unauthenticated: Row(401, "authentication_error", "invalid_api_key", retry=False, challenge=True),
    PermissionDenied: Row(403, "permission_error", "permission_denied", retry=False),
    RateLimited: Row(429, "rate_limit_exceeded", "rate_limit_exceeded", retry=True),
    BudgetSpent: Row(429, "insufficient_quota", "insufficient_quota", retry=False),
    HostRefused: Row(421, _BAD, "host_not_allowed"),
    NotFound: Row(404, _BAD, "not_found"),
    EndpointNotServed: Row(404, _BAD, "endpoint_not_served"),
    ModelNotFound: Row(404, _BAD, "model_not_found"),
    MethodNotAllowed: Row(405, _BAD, "method_not_allowed"),
    BodyTimeout: Row(408, _BAD, "request_timeout", retry=False, close=True),
    Conflict: Row(409, _BAD, "conflict", retry=False),
    BodyTooLarge: Row(413, _BAD, "request_too_large", close=True),
    UnsupportedMediaType: Row(415, _BAD, "unsupported_media_type"),
    QueueFull: Row(429, "rate_limit_exceeded", "queue_full", retry=True),
    MemoryShort: Row(429, "rate_limit_exceeded", "memory_short", retry=True),
    BadTokenizer: Row(
        503, _OURS, "model_unusable", retry=False, message="The tokenizer of this model could not be loaded."
    ),
    BadTemplate: Row(
        503, _OURS, "model_unusable", retry=False, message="The chat template of this model does not compile."
    ),
    ServiceUnavailable: Row(503, _OURS, "service_unavailable", retry=True),
    ModelStopped: Row(503, _OURS, "service_unavailable", retry=False),
    StorageUnavailable: Row(503, _OURS, "storage_unavailable", retry=True),
    StorageFull: Row(507, _OURS, "storage_full", retry=False),
    EngineUnavailable: Row(502, _OURS, "engine_unavailable", retry=True),
    RequestQuarantined: Row(502, _OURS, "request_quarantined", retry=False),
    EngineDied: Row(502, _OURS, "engine_died", retry=True),
    TimedOut: Row(504, _OURS, "timeout", retry=False),
    OutOfTime: Row(504, _OURS, "timeout", retry=False),
    InternalError: Row(500, _OURS, "internal_error"),
}
_UNKNOWN: Final = Row(
    500, _OURS, "internal_error", message="The server had an error of its own. It is in its log."
)


class Api(enum.Enum):
    """Whose clients read an answer."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"

    @classmethod
    def of(cls, path: str, headers: Iterable[tuple[bytes, bytes]]) -> Api:
        """The API that a request is for: models are listed by both, and Anthropic's clients name their version."""
        if _is_at("/v1/messages", path):
            return cls.ANTHROPIC
        names_version = _is_at("/v1/models", path) and any(name == b"anthropic-version" for name, _ in headers)
        return cls.ANTHROPIC if names_version else cls.OPENAI


def _is_at(place: str, path: str) -> bool:
    """Whether a path is that place or below it."""
    return path == place or path.startswith(f"{place}/")


def failure_of(error: BaseException) -> Failure | None:
    """In which way a model has failed a request, so that another one may step in for it; None where no other one
    should be asked: the request is wrong, engines die of it, or its time is over."""
    match error:
        case RequestQuarantined() | OutOfTime():
            return None
        case ContextLengthExceeded():
            return "ContextLengthExceeded"
        case QueueFull():
            return "QueueFull"
        case TimedOut():
            return "Timeout"
        case ServiceUnavailable() | EngineUnavailable() | ModelNotFound() | BadTokenizer() | BadTemplate():
            return "Unavailable"
    return None


_ANTHROPIC_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""By status; below 500 the others are invalid_request_error, from there api_error."""


@dataclass(frozen=True, slots=True)
class HttpError:
    """An answer, ready to send, for any web framework."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    """`{"error": {"message", "type", "param", "code"}}`, or what else the API has; inside a stream it is what
    its error event says.
    """
    code: str | None
    message: str


def describe(error: BaseException, api: Api = Api.OPENAI) -> HttpError:
    """The answer for `error`: the row of its class or of the nearest base class in the table."""
    row = next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), _UNKNOWN)
    param = error.param if isinstance(error, ApiError | ParamRefused) else None
    message = row.message if row.message is not None else str(error)
    body = msgspec.json.encode(_shaped(api, row, message, param))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    retry_after = error.retry_after if isinstance(error, ApiError) else None
    if retry_after is not None:
        seconds = max(retry_after, 0.001)
        if row.retry is not False:
            seconds = min(seconds, 120.0)  # above 120 s the official clients ignore the header
        headers.append((b"retry-after", str(math.ceil(seconds)).encode()))
        headers.append((b"retry-after-ms", str(math.ceil(seconds * 1000)).encode()))
    if row.retry is not None:
        headers.append((b"x-should-retry", b"true" if row.retry else b"false"))
    if row.challenge:
        headers.append((b"www-authenticate", b"Bearer"))
    if row.close:
        headers.append((b"connection", b"close"))
    return HttpError(row.status, tuple(headers), body, row.code, message)


def renamed(error: Exception, names: Mapping[str, str]) -> Exception:
    """The error with fields under the names that the client knows: `names` has them by ours."""
    if not isinstance(error, ApiError | ParamRefused) or not names:
        return error
    message, param = error.message, error.param
    ours = next(
        (name for name in names if param == name or (param or "").startswith((f"{name}.", f"{name}["))), None
    )
    if ours is not None:
        message, param = message.replace(f"'{param}'", f"'{names[ours]}'"), names[ours]
    for name, theirs in names.items():
        message = message.replace(f"'{name}'", f"'{theirs}'")
    if isinstance(error, ParamRefused):
        return ParamRefused(message, param=param or "")
    return type(error)(message, param=param, retry_after=error.retry_after)


def _shaped(api: Api, row: Row, message: str, param: str | None) -> dict[str, object]:
    if api is Api.OPENAI:
        return {"error": {"message": message, "type": row.type, "param": param, "code": row.code}}
    kind = _ANTHROPIC_TYPES.get(row.status, "invalid_request_error" if row.status < 500 else "api_error")
    details = {"details": {"error_code": row.code}} if row.code is not None else {}
    return {"type": "error", "error": {"type": kind, "message": message, **details}}
