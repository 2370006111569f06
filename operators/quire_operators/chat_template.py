"""The file that a manifest names as its chat template: what it holds, and in what that differs from a revision's.

A revision keeps the text, so that going back to it goes back to that text; the file is read when a manifest is
reviewed, and never again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quire_operators.placement import Placement
from quire_operators.records import Revision
from quire_operators.sources import SourceError
from quire_schemas.update import FieldChange, UpdateClass

MAX_BYTES = 1 << 20
"""Revisions keep it, and each routing table has it."""
FIELD = "spec.tokenizer.chatTemplateFile"


def read(spec: Mapping[str, Any]) -> str | None:
    """What the file of a resolved spec's chat template holds; None where it names none. Raises `SourceError`."""
    declared = spec["tokenizer"]["chatTemplateFile"]
    if declared is None:
        return None
    path, hint = Path(declared), "give the absolute path of a Jinja template"
    if not path.is_file():  # a pipe would not end
        raise SourceError("NotFound", f"{path} is not a file", hint, FIELD)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise SourceError("InvalidReference", f"{path} is larger than 1 MiB", hint, FIELD)
        if b"\0" in content:
            raise SourceError("InvalidReference", f"{path} has a zero byte", hint, FIELD)
        return content.decode()
    except OSError as error:
        text = f"{path} cannot be read: {error.strerror or error}"
        raise SourceError("InvalidReference", text, hint, FIELD) from error
    except UnicodeDecodeError as error:
        raise SourceError("InvalidReference", f"{path} is not UTF-8", hint, FIELD) from error


def change(spec: Mapping[str, Any], current: Revision | None) -> tuple[FieldChange, ...]:
    """What differs where a template's file has the name that it had, and holds something else."""
    if current is None:
        return ()
    placement = Placement.from_dict(current.placement)
    before, file = placement.chat_template, spec["tokenizer"]["chatTemplateFile"]
    if before is None or placement.chat_template_file != file:
        return ()
    now = read(spec)
    if now is None or now == before:
        return ()
    old, new = (f"{file} (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})" for text in (before, now))
    return (FieldChange(FIELD, old, new, UpdateClass.ROLLING),)
