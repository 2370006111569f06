"""`/v1/files`: what is uploaded for batches, and what they leave. Lists are long, so their shapes are Structs."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from pydantic import Field

from quire_schemas.openai.request import Shape

MAX_FILE_BYTES: Final = 200 * 1024 * 1024
"""Of one uploaded file."""
MAX_FILENAME: Final = 255
MAX_FILES_LISTED: Final = 10_000
KEPT_SECONDS: Final = 30 * 86400
"""How long an input of batches is kept whose upload does not say."""
SHORTEST_SECONDS: Final = 3600
LONGEST_SECONDS: Final = 30 * 86400

Purpose = Literal["batch", "batch_output"]
"""An input of batches, and what they leave."""


class ExpiresAfter(Shape):
    """When a file is removed: seconds after it was made."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=SHORTEST_SECONDS, le=LONGEST_SECONDS)]


class UploadForm(Shape):
    """The parts of an upload, in any order. `read` takes them apart as they come (`quire.router.api.files`)."""

    file: Annotated[bytes, Field(json_schema_extra={"format": "binary"})]
    purpose: Literal["batch"]
    expires_after_anchor: Annotated[Literal["created_at"] | None, Field(alias="expires_after[anchor]")] = None
    expires_after_seconds: Annotated[int | None, Field(alias="expires_after[seconds]")] = None


class ListFiles(Shape):
    """Parameters of `GET /v1/files`."""

    limit: Annotated[int, Field(ge=1, le=MAX_FILES_LISTED)] = MAX_FILES_LISTED
    after: str | None = None
    """The last file of the page before."""
    order: Literal["asc", "desc"] = "desc"
    """By age: the newest first, or last."""
    purpose: str | None = None


class FileObject(msgspec.Struct, kw_only=True):
    """One file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    """None: it stays until it is deleted."""
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(msgspec.Struct, kw_only=True):
    """Answer to `GET /v1/files`."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(msgspec.Struct, kw_only=True):
    """Answer to `DELETE /v1/files/{id}`."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True
