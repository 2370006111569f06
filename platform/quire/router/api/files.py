"""`/v1/files`: uploads that go to the disk as they come, and what is kept there.

A body of an upload is `multipart/form-data`, its parts in any order. The file's part is written while it comes, so
that no file is ever whole in memory, and it is there only once the last byte of the body has been understood.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final, cast

import msgspec
import multipart
from litestar import Request, delete, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp, Receive, Scope, Send
from pydantic import ValidationError

from quire.errors import ApiError, BodyTimeout, BodyTooLarge, InvalidRequest, UnsupportedMediaType
from quire.router.access import visit_of
from quire.router.api.query import cursor, descends, whole
from quire.router.api.reply import Reply, named, owner_of
from quire.router.files import PREFIX, Files, StoredFile
from quire.router.fleet import Fleet
from quire.router.reception import ClientGone, send_json
from quire.router.store import Incoming, refusal
from quire_schemas.openai.body import explained
from quire_schemas.openai.files import (
    KEPT_SECONDS,
    MAX_FILE_BYTES,
    MAX_FILENAME,
    MAX_FILES_LISTED,
    ExpiresAfter,
    FileDeleted,
    FileList,
    FileObject,
    Purpose,
)
from quire_schemas.wire import HttpSettings

MAX_FIELD: Final = 1024
"""Bytes of a field that is not the file."""
BEARABLE: Final = 2 * MAX_FILE_BYTES
"""A body of up to so many bytes is read to its end before it is refused."""
UPLOAD_SECONDS: Final = 3600.0
PIECE: Final = 256 * 1024
_encode = msgspec.json.encode
_FIELDS: Final = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")


class Form:
    """The parts of one upload, taken apart as they come. Its methods block."""

    def __init__(self, content_type: str, incoming: Incoming) -> None:
        kind, options = multipart.parse_options_header(content_type)
        if kind != "multipart/form-data" or not options.get("boundary"):
            raise UnsupportedMediaType("The body must be declared as a form: Content-Type: multipart/form-data.")
        self.fields: dict[str, str] = {}
        self.filename = ""
        self._incoming = incoming
        self._parser = multipart.PushMultipartParser(
            options["boundary"], max_header_size=4096, max_segment_count=8, strict=True
        )
        self._name = ""
        self._value = b""
        self._seen: set[str] = set()

    def feed(self, content: bytes) -> None:
        """Take the next bytes. Raises `InvalidRequest`, `BodyTooLarge` and `StorageUnavailable`."""
        try:
            for event in self._parser.parse(content):
                if event is None:
                    self._end()
                elif isinstance(event, multipart.MultipartSegment):
                    self._start(event)
                elif self._name == "file":
                    if self._incoming.size + len(event) > MAX_FILE_BYTES:
                        raise _too_large()
                    self._incoming.write(bytes(event))
                else:
                    self._value += event
                    if len(self._value) > MAX_FIELD:
                        raise InvalidRequest(f"'{self._name}' has more than {MAX_FIELD} bytes.", param=self._name)
        except multipart.MultipartError:
            raise InvalidRequest("The body is not a proper form (multipart/form-data).") from None

    def end(self) -> None:
        """There are no more bytes. Raises `InvalidRequest` when that is too early, or the file is missing."""
        try:
            self._parser.close()
        except multipart.MultipartError:
            raise InvalidRequest("The form has no end: its last boundary is missing.") from None
        for name in ("file", "purpose"):
            if name not in self._seen:
                raise InvalidRequest(f"'{name}' is required.", param=name)

    def _start(self, segment: multipart.MultipartSegment) -> None:
        name = str(segment.name)
        if name not in _FIELDS:
            shown = "".join(c if c.isprintable() else "?" for c in name[:64])
            raise InvalidRequest(f"Unknown field '{shown}'. There are: {', '.join(_FIELDS)}.", param=shown)
        if name in self._seen:
            raise InvalidRequest(f"The form has '{name}' twice.", param=name)
        if name == "file":
            given = segment.filename or ""
            self.filename = "".join(c if c.isprintable() else "?" for c in given)[:MAX_FILENAME]
            if not self.filename:
                raise InvalidRequest("'file' must be a file with a name.", param="file")
        self._seen.add(name)
        self._name, self._value = name, b""

    def _end(self) -> None:
        if self._name != "file":
            try:
                self.fields[self._name] = self._value.decode()
            except UnicodeDecodeError:
                raise InvalidRequest(f"'{self._name}' is not valid UTF-8 text.", param=self._name) from None


class Upload:
    """Answers `POST /v1/files`. Call it as an ASGI application."""

    def __init__(self, files: Files, settings: HttpSettings) -> None:
        self._files = files
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, owner = dict(scope["headers"]), visit_of(scope).known.owner
        stated = int(headers.get(b"content-length", b"0"))
        if stated > BEARABLE:
            raise _too_large()
        try:
            async with self._files.incoming() as (file_id, incoming):
                form = Form(headers.get(b"content-type", b"").decode("latin-1"), incoming)
                async with asyncio.timeout(UPLOAD_SECONDS):
                    await self._take(form, receive)
                await asyncio.to_thread(form.end)
                expires_after = _checked(form.fields)
                await asyncio.to_thread(incoming.keep)
                kept = await self._files.add(file_id, "batch", form.filename, incoming.size, expires_after, owner)
        except TimeoutError:
            raise BodyTimeout(f"The file did not arrive within {UPLOAD_SECONDS:g} seconds.") from None
        except ClientGone:
            return
        await send_json(send, _encode(file_object(kept)))

    async def _take(self, form: Form, receive: Receive) -> None:
        """Read the body, in larger pieces than it comes in."""
        more, taken, wrong = True, 0, None
        patience = self._settings.body_seconds
        while more:
            piece = bytearray()
            while more and len(piece) < PIECE:
                try:
                    async with asyncio.timeout(patience):
                        message = await receive()
                except TimeoutError:
                    raise BodyTimeout(f"Nothing of the file came for {patience:g} seconds.") from None
                if message["type"] != "http.request":
                    raise ClientGone
                piece += message["body"]
                more = message["more_body"]
            taken += len(piece)
            if taken > BEARABLE:
                raise wrong or _too_large()
            if piece and wrong is None:
                try:
                    await asyncio.to_thread(form.feed, bytes(piece))
                except ApiError as error:  # a client cut off while it sends never sees why
                    wrong = error
        if wrong is not None:
            raise wrong


class Content:
    """Answers `GET /v1/files/{id}/content`. Call it as an ASGI application."""

    def __init__(self, files: Files, file_id: str) -> None:
        self._files = files
        self._id = file_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kept = await self._files.get(self._id, visit_of(scope).known.owner)
        try:
            file = await asyncio.to_thread(self._files.path(kept.id).open, "rb")
        except OSError as error:
            raise refusal(error) from error
        headers = [
            (b"content-type", b"application/octet-stream"),
            (b"content-length", str(kept.bytes).encode()),
            (b"cache-control", b"no-store"),
        ]
        with file:  # whoever deletes it meanwhile takes nothing away from this answer
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while piece := await asyncio.to_thread(file.read, PIECE):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _too_large() -> BodyTooLarge:
    return BodyTooLarge(f"The file is larger than the limit of {MAX_FILE_BYTES} bytes.")


def _checked(fields: Mapping[str, str]) -> int | None:
    """Seconds after which the file expires. Raises `InvalidRequest` for what the form must not say."""
    purpose = fields["purpose"]
    if purpose != "batch":
        shown = "".join(c if c.isprintable() else "?" for c in purpose[:64])
        raise InvalidRequest(f"'purpose' is '{shown}'; files are kept for 'batch' alone.", param="purpose")
    given: dict[str, Any] = {
        name.removeprefix("expires_after[").removesuffix("]"): value
        for name, value in fields.items()
        if name.startswith("expires_after[")
    }
    if not given:
        return KEPT_SECONDS
    if given.get("seconds", "").isdecimal():
        given["seconds"] = int(given["seconds"])
    try:
        return ExpiresAfter.model_validate(given).seconds
    except ValidationError as error:
        bad = explained(error.errors(include_url=False)[0], "expires_after")
        raise InvalidRequest(bad.message, param=bad.param) from None


def file_object(file: StoredFile) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=file.created_at,
        expires_at=file.expires_at,
        filename=file.filename,
        purpose=cast(Purpose, file.purpose),
    )


async def listed(files: Files, owner: str, query: Mapping[str, str]) -> bytes:
    """Answer to `GET /v1/files`. Raises `InvalidRequest`."""
    limit = whole(query, "limit", MAX_FILES_LISTED, MAX_FILES_LISTED)
    newest_first = descends(query)
    after = cursor(query, PREFIX)
    found, more = await files.page(owner, limit, after, newest_first=newest_first, purpose=query.get("purpose"))

    def written() -> bytes:
        return _encode(
            FileList(
                data=[file_object(each) for each in found],
                first_id=found[0].id if found else None,
                last_id=found[-1].id if found else None,
                has_more=more,
            )
        )

    return await asyncio.to_thread(written)


async def one(files: Files, owner: str, file_id: str) -> bytes:
    return _encode(file_object(await files.get(file_id, owner)))


async def deleted(files: Files, owner: str, file_id: str) -> bytes:
    await files.delete(file_id, owner)
    return _encode(FileDeleted(id=file_id))


def routes(files: Files, fleet: Fleet) -> list[HTTPRouteHandler]:
    """What `/v1/files` answers."""

    @post("/v1/files", operation="batches")
    async def upload() -> ASGIApp:
        return Upload(files, fleet.table.http)

    @get("/v1/files", operation="batches")
    async def list_files(request: Request[Any, Any, Any]) -> ASGIApp:
        return Reply(200, await listed(files, owner_of(request), dict(request.query_params)))

    @get("/v1/files/{file_id:str}", operation="batches")
    async def get_file(request: Request[Any, Any, Any]) -> ASGIApp:
        return Reply(200, await one(files, owner_of(request), named(request, "file_id")))

    @delete("/v1/files/{file_id:str}", status_code=200, operation="batches")
    async def delete_file(request: Request[Any, Any, Any]) -> ASGIApp:
        return Reply(200, await deleted(files, owner_of(request), named(request, "file_id")))

    @get("/v1/files/{file_id:str}/content", operation="batches")
    async def get_content(request: Request[Any, Any, Any]) -> ASGIApp:
        return Content(files, named(request, "file_id"))

    return [upload, list_files, get_file, delete_file, get_content]
