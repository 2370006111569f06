"""The input of a batch, line by line, before any of it is sent: a `Plan`, or what is wrong with which line.

Each body is read as the endpoint would read it, so that what could never be answered is told before the first
token is paid for. What only a tokenizer or an engine finds is the answer of that line.

`Reading` goes on for a moment at a time and gives the interpreter to others in between: fifty thousand lines take
seconds, and streams must not wait for them.
"""

from __future__ import annotations

import time
from codecs import BOM_UTF8
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from quire.router.batches import Plan
from quire.router.formats import Format
from quire_schemas.openai.batches import MAX_ERRORS, MAX_LINES, BadLine, read_line
from quire_schemas.openai.body import BadRequest

A_MOMENT: Final = 0.002
"""Seconds."""


_NOT_FOR_BATCHES: Final = {
    "stream": "an answer is whole",
    "background": "an answer is awaited, and all of a batch is in the background",
}
"""Fields of a request, and why a line has them not."""


class Reading:
    """Reads the input at `path` for an endpoint. `max_body` is what a request's body may have, in bytes."""

    def __init__(
        self, path: Path, endpoint: str, form: Format[Any], *, max_body: int, ignore_unknown: bool
    ) -> None:
        self.plan = Plan()
        self.errors: list[dict[str, Any]] = []
        """As a batch shows them."""
        self._file = path.open("rb")
        self._offset = len(BOM_UTF8) if self._file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
        self._file.seek(self._offset)
        self._endpoint = endpoint
        self._form = form
        self._max_body = max_body
        self._max_line = max_body + 8192
        """A body, and what stands around it."""
        self._ignore_unknown = ignore_unknown
        self._seen: dict[str, int] = {}
        self._models: dict[str, int] = {}
        self._number = 0

    def close(self) -> None:
        self._file.close()

    def go_on(self, clock: Callable[[], float] = time.monotonic) -> bool:
        """Read for a moment; whether there is more. Blocks."""
        until = clock() + A_MOMENT
        while clock() < until:
            if not self._next():
                if not self.plan and not self.errors:
                    self._wrong("empty_file", "The file has no line.", None, line=None)
                return False
        return True

    def _next(self) -> bool:
        """Take one line; whether there may be another."""
        line = self._file.readline(self._max_line + 1)
        if not line or len(self.errors) >= MAX_ERRORS:
            return False
        offset, self._offset = self._offset, self._offset + len(line)
        if len(line) > self._max_line:
            self._number += 1
            self._wrong("line_too_long", f"The line is longer than {self._max_line} bytes.")
            while line and not line.endswith(b"\n"):
                line = self._file.readline(self._max_line)
                self._offset += len(line)
            return True
        self._number += 1
        if not line.strip():
            return True
        if len(self.plan) >= MAX_LINES:
            self._wrong("too_many_lines", f"A batch has at most {MAX_LINES} lines.", None)
            return False
        try:
            self._take(line, offset)
        except BadLine as error:
            self._wrong(error.code, error.message, error.param)
        except BadRequest as error:
            param = f"body.{error.param}" if error.param else "body"
            self._wrong("invalid_request", f"The body is no request: {error.message}", param)
        return True

    def _take(self, line: bytes, offset: int) -> None:
        custom_id, body = read_line(line, self._endpoint)
        if custom_id in self._seen:
            text = f"'custom_id' is that of line {self._seen[custom_id]} as well."
            raise BadLine("duplicate_custom_id", text, "custom_id")
        self._seen[custom_id] = self._number
        if len(body) > self._max_body:
            raise BadLine("line_too_long", f"The body is larger than the limit of {self._max_body} bytes.", "body")
        request = self._form.read(body, self._ignore_unknown)
        for name, reason in _NOT_FOR_BATCHES.items():
            if getattr(request, name, None):
                raise BadLine("invalid_request", f"'{name}' is not for batches: {reason}.", f"body.{name}")
        plan = self.plan
        at = self._models.setdefault(request.model, len(plan.models))
        if at == len(plan.models):
            plan.models.append(request.model)
        plan.offsets.append(offset)
        plan.lengths.append(len(line))
        plan.of_model.append(at)
        plan.sequences.append(self._form.sequences(request))

    def _wrong(self, code: str, message: str, param: str | None = None, **at: int | None) -> None:
        line = at.get("line", self._number)
        self.errors.append({"code": code, "message": message, "param": param, "line": line})
