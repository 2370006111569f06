"""The schema for people and for editors: `explain` prints one field, `json_schema` exports them all.

The export is JSON Schema draft-07, which is what editors read, in one document for all kinds: `if kind is X
then X`, since a failed `oneOf` tells its reader nothing. Pydantic writes the newer draft 2020-12; what differs
is rewritten here: `$defs` become `definitions`, a `$ref` with neighbours (which draft-07 ignores) moves into
`allOf`, `null` goes, because an empty value in a manifest is an error, and so do generated titles.

Exceptions:

    UnknownField(LookupError)     no field of that path; `.hint` names the closest one
"""

from __future__ import annotations

import difflib
import json
import textwrap
from typing import Any

from quire_schemas.fields import SchemaField, default_of, fields_of, walk
from quire_schemas.kinds import KINDS
from quire_schemas.resource import API_VERSION, HONOURED, Resource, honoured_values, support, update_tag

SCHEMA_ID = "https://quire.dev/schema/v1alpha1.json"


class UnknownField(LookupError):
    """No field has that path."""

    def __init__(self, path: str, hint: str) -> None:
        super().__init__(f"there is no field {path!r}")
        self.hint = hint


def explain(path: str) -> str:
    """Text about a kind (`model`), a section (`model.spec.batching`) or a field of one.

    Lists are stepped into by name or with brackets: `model.spec.env.name`, `model.spec.env[].name`. The kind may
    be in any case. Raises `UnknownField`.
    """
    parts = [p for p in path.replace("[]", "").split(".") if p]
    kinds = {name.lower(): kind for name, kind in KINDS.items()}
    if not parts or parts[0].lower() not in kinds:
        raise UnknownField(path, _kind_hint(parts, list(kinds)))
    kind = kinds[parts[0].lower()]
    if len(parts) == 1:
        return _explain_kind(kind)
    wanted = tuple(parts[1:])
    for known, field in walk(kind):
        if known == wanted:
            return _explain_field(kind, known, field)
    raise UnknownField(path, _field_hint(kind, wanted))


def json_schema() -> dict[str, Any]:
    """Draft-07 JSON Schema of a manifest document of any kind, with `x-quire-update` on every field."""
    definitions: dict[str, Any] = {}
    for name, kind in KINDS.items():
        schema = kind.model_json_schema(by_alias=True)
        for inner, definition in schema.pop("$defs", {}).items():
            definitions[inner] = _draft_07(definition)
        definitions[name] = _draft_07(schema)
    for definition in definitions.values():
        # Pydantic leaves out a field's description where the section itself is described alike.
        for field in definition["properties"].values():
            if "description" not in field:
                section = field["allOf"][0]["$ref"].removeprefix("#/definitions/")
                field["description"] = definitions[section]["description"]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": SCHEMA_ID,
        "title": "Quire manifest",
        "type": "object",
        "required": ["apiVersion", "kind", "metadata"],
        "properties": {"apiVersion": {"const": API_VERSION}, "kind": {"enum": list(KINDS)}},
        "allOf": [
            {
                "if": {"properties": {"kind": {"const": name}}, "required": ["kind"]},
                "then": {"$ref": f"#/definitions/{name}"},
            }
            for name in KINDS
        ],
        "definitions": definitions,
    }


def _explain_kind(kind: type[Resource]) -> str:
    name = kind.__name__
    lines = [f"KIND     {name}   apiVersion {API_VERSION}", f"  {(kind.__doc__ or '').strip()}"]
    lines += ["", "FIELDS", *_children(list(fields_of(kind).values()))]
    return "\n".join(lines)


def _explain_field(kind: type[Resource], path: tuple[str, ...], field: SchemaField) -> str:
    head = [f"FIELD    {'.'.join(path)}", f"<{field.shape.word}>"]
    shown = _default(field)
    if shown:
        head.append(shown)
    head.append(f"update: {update_tag(field.info)}")
    lines = ["   ".join(head), *_wrapped(field.info.description or "")]
    lines += _wrapped(_support(kind, path, field))
    inner = field.shape.item if field.shape.kind == "list" and field.shape.item else field.shape
    if inner.section is not None:
        lines += ["", "FIELDS", *_children(list(fields_of(inner.section).values()))]
    return "\n".join(lines)


def _default(field: SchemaField) -> str:
    if field.info.is_required():
        return "required"
    if field.shape.section is not None:
        return ""
    value = default_of(field)
    return "no default" if value is None else f"default {value if isinstance(value, str) else json.dumps(value)}"


def _support(kind: type[Resource], path: tuple[str, ...], field: SchemaField) -> str:
    """What this version does with the field, its sections considered."""
    by_path = dict(walk(kind))
    for length in range(2, len(path) + 1):
        part = by_path[path[:length]]
        reason = support(part.info)
        if reason != HONOURED:
            allowed = honoured_values(part.info)
            word = ", ".join(json.dumps(v) if not isinstance(v, str) else v for v in allowed)
            return (
                f"Support: this version takes only {word}: {reason}" if allowed else f"Support: refused: {reason}"
            )
    return "Support: honoured"


def _children(fields: list[SchemaField]) -> list[str]:
    width = max(len(f.name) for f in fields)
    types = max((len(f.shape.word) for f in fields if len(f.shape.word) <= 24), default=0) + 2
    lines = []
    for field in fields:
        mark = "" if support(field.info) == HONOURED else "  (limited or refused by this version)"
        summary = (field.info.description or "").split(". ")[0].rstrip(".")
        lines.append(f"  {field.name:<{width}}  {'<' + field.shape.word + '>':<{types}}  {summary}{mark}")
    return lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="  ")


def _kind_hint(parts: list[str], kinds: list[str]) -> str:
    first = parts[0].lower() if parts else ""
    if first in ("spec", "metadata"):
        return f"paths begin with a kind: model.{'.'.join(parts)}"
    near = difflib.get_close_matches(first, kinds, 1, 0.6)
    if near:
        return f"did you mean '{'.'.join([near[0], *parts[1:]])}'?"
    return f"paths begin with a kind: {', '.join(kinds)}"


def _field_hint(kind: type[Resource], wanted: tuple[str, ...]) -> str:
    known = [path for path, _ in walk(kind)]
    last = wanted[-1].lower().replace("_", "").replace("-", "")
    same_name = [p for p in known if p[-1].lower() == last]
    if not same_name:
        texts = {".".join(p).lower(): p for p in known}
        same_name = [texts[t] for t in difflib.get_close_matches(".".join(wanted).lower(), list(texts), 1, 0.6)]
    prefix = kind.__name__.lower()
    if same_name:
        return f"did you mean '{prefix}.{'.'.join(same_name[0])}'?"
    return f"list what there is with: platform explain {prefix}.spec"


def _draft_07(schema: Any) -> Any:
    """One schema, rewritten from draft 2020-12 to draft-07 as the module's docstring says."""
    if isinstance(schema, list):
        return [_draft_07(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "definitions"):
            out[key] = {name: _draft_07(s) for name, s in value.items()}
        elif key == "$ref":
            out[key] = value.replace("#/$defs/", "#/definitions/")
        elif key in ("anyOf", "allOf", "items", "additionalProperties", "propertyNames"):
            out[key] = _draft_07(value)
        elif key == "title" or (key == "default" and (value is None or isinstance(value, dict))):
            continue
        else:
            out[key] = value
    members = [m for m in out.get("anyOf", []) if m != {"type": "null"}]
    if len(members) == 1:
        del out["anyOf"]
        out = {**members[0], **out}
    elif members:
        out["anyOf"] = members
    if "$ref" in out and len(out) > 1:
        out = {"allOf": [{"$ref": out.pop("$ref")}], **out}
    return out
