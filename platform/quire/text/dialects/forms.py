"""Forms: what a text may be, for an engine to hold a model to.

A form is a small tree of plain values, the text of a `wire.Structured` of kind `form`, where its shapes are told.
The engine writes it as a grammar: it knows which tokens are special and how JSON Schema is read, and whoever makes
a form need not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from quire_schemas.wire import Structured

Form = dict[str, Any]


def literal(text: str) -> Form:
    return {"text": text}


def through(mark: str, *, least: int = 0, most: int | None = None) -> Form:
    return {"through": mark, "least": least, "most": most}


def fits(schema: Mapping[str, Any], *, lenient: bool = False) -> Form:
    return {"schema": dict(schema)} | ({"lenient": True} if lenient else {})


def regex(pattern: str) -> Form:
    return {"regex": pattern}


def sequence(*forms: Form) -> Form:
    return {"sequence": list(forms)}


def any_of(forms: Sequence[Form]) -> Form:
    return forms[0] if len(forms) == 1 else {"any": list(forms)}


def maybe(form: Form) -> Form:
    return {"repeat": form, "most": 1}


def repeat(form: Form, *, least: int = 0, most: int | None = None, between: Form | None = None) -> Form:
    return {"repeat": form, "least": least, "most": most, "between": between}


def some(forms: Sequence[Form], between: Form) -> Form:
    return {"some": list(forms), "between": between}


def within(root: Mapping[str, Any], form: Form) -> Form:
    """`form` with the schema that references in its schemas are into; once, however many there are."""
    return {"root": dict(root), "form": form} if b'"$ref"' in msgspec.json.encode(root) else form


def constrained(structured: Structured) -> Form:
    return {"structured": msgspec.to_builtins(structured)}


def free(starts: Sequence[tuple[str, Form]], begins: Sequence[tuple[str, Form]] = ()) -> Form:
    return {
        "free": [{"mark": mark, "then": form} for mark, form in starts],
        "begins": [{"mark": mark, "then": form} for mark, form in begins],
    }


def is_free(form: Form) -> bool:
    """Whether a form is free text, to whose `begins` one can be added."""
    return "free" in form or form.get("structured", {}).get("kind") == "structural_tag"


def held_to(form: Form) -> Structured:
    """The constraint that a text is of this form."""
    return Structured("form", msgspec.json.encode(form).decode())
