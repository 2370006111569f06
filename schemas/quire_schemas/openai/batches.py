"""`/v1/batches`: many requests in a file, answered when there is room.

A line of the input is `{"custom_id", "method", "url", "body"}`; `read_line` takes it apart. A line of what a batch
leaves is an `OutputLine`: in the output file those answered with 200, in the error file all others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from pydantic import Field

from quire_schemas.openai.answer import Answer
from quire_schemas.openai.body import MAYBE_KEY, read, shown
from quire_schemas.openai.files import ExpiresAfter
from quire_schemas.openai.request import Shape

MAX_LINES: Final = 50_000
MAX_CUSTOM_ID: Final = 512
MAX_ERRORS: Final = 100
"""After so many wrong lines the rest of a file is not looked at."""
BATCHES_LISTED: Final = 20
MAX_BATCHES_LISTED: Final = 100
MAX_PAIRS: Final = 16
MAX_KEY: Final = 64
MAX_VALUE: Final = 512
WINDOW_SECONDS: Final = 86400
KEPT_SECONDS: Final = 30 * 86400
"""How long a batch is remembered after its end."""

Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=MAX_KEY)], Annotated[str, Field(max_length=MAX_VALUE)]],
    Field(max_length=MAX_PAIRS),
]


class CreateBatch(Shape):
    """Body of `POST /v1/batches`."""

    input_file_id: Annotated[str, Field(min_length=1, max_length=128)]
    endpoint: Annotated[str, Field(max_length=64)]
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


def read_create(body: bytes, ignore_unknown: bool = False) -> CreateBatch:
    """The request in a body. Raises `BadRequest`."""
    return read(body, CreateBatch, {}, ignore_unknown, {})


class ListBatches(Shape):
    """Parameters of `GET /v1/batches`."""

    limit: Annotated[int, Field(ge=1, le=MAX_BATCHES_LISTED)] = BATCHES_LISTED
    after: str | None = None
    """The last batch of the page before."""


class BatchError(Answer):
    """What is wrong with a line of the input."""

    code: str
    message: str
    param: str | None
    line: int | None
    """From 1."""


class BatchErrors(Answer):
    """What is wrong with the input."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(Answer):
    """Lines of a batch. Those that a cancelled or expired batch never got to are in `total` alone."""

    total: int
    completed: int
    failed: int


class InputTokensDetails(Answer):
    """Where prompt tokens came from."""

    cached_tokens: int


class OutputTokensDetails(Answer):
    """What was written."""

    reasoning_tokens: int = 0


class BatchUsage(Answer):
    """Tokens of all answers so far."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class BatchObject(Answer):
    """One batch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    """The name that all lines ask for, where it is one."""
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage | None
    metadata: dict[str, str] | None


class BatchList(Answer):
    """Answer to `GET /v1/batches`."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class LineResponse(msgspec.Struct):
    """What the endpoint answered."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class LineError(msgspec.Struct):
    """Why a line has no answer."""

    code: str
    message: str


class OutputLine(msgspec.Struct):
    """One line of what a batch leaves; exactly one of `response` and `error` is there."""

    id: str
    custom_id: str
    response: LineResponse | None
    error: LineError | None


class BadLine(Exception):
    """A line that is none of a batch's."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


_FIELDS: Final = ("custom_id", "method", "url", "body")
_raw: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_any: Final = msgspec.json.Decoder()


def read_line(line: bytes, endpoint: str) -> tuple[str, bytes]:
    """The custom id and the body's bytes of one line for `endpoint`. Raises `BadLine`."""
    try:
        found = _raw.decode(line)
        values: dict[str, Any] = {
            name: bytes(raw) if name == "body" else _any.decode(raw) for name, raw in found.items()
        }
        twice = _twice(line, found)
    except (ValueError, RecursionError):  # covers msgspec's errors and broken UTF-8
        raise BadLine("invalid_json_line", "This line is not a JSON object.") from None
    if twice is not None:
        raise BadLine("invalid_json_line", f"This line has the key '{shown(twice)}' twice.", shown(twice))
    for name in found:
        if name not in _FIELDS:
            raise BadLine(
                "unknown_parameter", f"A line has no field '{shown(name)}'; it has {_LISTED}.", shown(name)
            )
    for name in _FIELDS:
        if name not in found:
            raise BadLine("missing_required_parameter", f"'{name}' is required; a line has {_LISTED}.", name)
    custom_id = values["custom_id"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        text = f"'custom_id' must be a string of 1 to {MAX_CUSTOM_ID} characters."
        raise BadLine("invalid_custom_id", text, "custom_id")
    if values["method"] != "POST":
        raise BadLine("invalid_method", "'method' must be 'POST'.", "method")
    if values["url"] != endpoint:
        raise BadLine("invalid_url", f"'url' must be the batch's endpoint, '{endpoint}'.", "url")
    return custom_id, values["body"]


def _twice(line: bytes, found: Mapping[str, msgspec.Raw]) -> str | None:
    """A key that the line itself has twice, of which `found` has the last value; None: there is none.

    Where nothing was lost, what is kept has as many places that look like keys as the line: each has a key of its
    own before it. Only where that is not so is the line read again, by a reader that shows every pair.
    """
    kept = len(found) + sum(len(MAYBE_KEY.findall(bytes(raw))) for raw in found.values())
    if len(MAYBE_KEY.findall(line)) == kept:
        return None
    seen: set[str] = set()
    for name, _ in json.loads(line, object_pairs_hook=list, parse_int=float):
        if name in seen:
            return str(name)
        seen.add(name)
    return None


_LISTED: Final = ", ".join(f"'{name}'" for name in _FIELDS)
