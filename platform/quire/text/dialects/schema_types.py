"""What a JSON Schema says of the type of a value, for dialects that write values without JSON's signs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final
from urllib.parse import unquote

from quire.text.dialects.literals import is_number, python_or_json

_MAX_DEPTH: Final = 16
_NAMES: Final = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}
_BEYOND: Final = (
    *("$ref", "allOf", "anyOf", "oneOf", "not", "if", "const", "enum", "patternProperties", "propertyNames"),
    *("minProperties", "maxProperties", "dependentRequired", "dependentSchemas", "unevaluatedProperties"),
)
ALL: Final = frozenset({"string", "boolean", "integer", "number", "object", "array", "null"})


def properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schemas of an object's properties, by name."""
    found = schema.get("properties")
    return found if isinstance(found, Mapping) else {}


@dataclass(frozen=True, slots=True)
class Members:
    """What an object may have, for dialects that write its members one by one."""

    named: Mapping[str, Any]
    """Schemas by name: those that are declared, and those that are required and are not."""
    required: frozenset[str]
    others: Any
    """The schema of members without a declaration; None where there are to be none."""
    beyond: str | None
    """A word of the schema that says more than this."""
    demanding: bool
    """What it says may be that there must be a member."""
    _types: _Types

    def of(self, key: str) -> Any:
        """The schema of a member."""
        return self.named.get(key, self.others)

    def types(self, key: str) -> frozenset[str]:
        """The types that a member may have; none if the schema does not say."""
        return self._types.of(self.of(key))


def members(root: Mapping[str, Any]) -> Members:
    """The members of the object that a whole schema describes. Where nothing is declared any may come, unless the
    schema says that there are none.
    """
    top = _resolved(root)
    named, further = properties(top), top.get("additionalProperties")
    if further is None and not named and "properties" not in top and root:
        further = True
    stated = top.get("required")
    required = [key for key in stated if isinstance(key, str)] if isinstance(stated, list) else []
    known = {**named, **{key: further or {} for key in required if key not in named}}
    beyond = next((word for word in _BEYOND if word in top), None)
    branches = json.dumps([top.get(word) for word in ("allOf", "anyOf", "oneOf")], default=str)
    demanding = "$ref" in top or '"$ref"' in branches or '"required"' in branches
    others = None if further is False else further
    return Members(known, frozenset(required), others, beyond, demanding, _Types(root))


def _resolved(root: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema with what its `$ref` refers to in that one's place, if there is such a thing."""
    found = root
    for _ in range(_MAX_DEPTH):
        ref = found.get("$ref")
        target = _target(ref, root) if isinstance(ref, str) else None
        if not isinstance(target, Mapping):
            break
        found = {**target, **{word: given for word, given in found.items() if word != "$ref"}}
    return found


class _Types:
    """What types values may have by the schemas of one document. Each `$ref` is followed once, however often it
    stands; what leads back to itself, or on and on, says nothing.
    """

    __slots__ = ("_known", "_root")

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._known: dict[str, frozenset[str]] = {}

    def of(self, schema: Any, depth: int = 0) -> frozenset[str]:
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
            return frozenset()
        stated = schema.get("type")
        if isinstance(stated, str):
            return frozenset({stated})
        if isinstance(stated, list):
            return frozenset(kind for kind in stated if isinstance(kind, str))
        if isinstance(ref := schema.get("$ref"), str):
            if ref not in self._known:
                self._known[ref] = frozenset()
                self._known[ref] = self.of(_target(ref, self._root), depth + 1)
            return self._known[ref]
        if "const" in schema:
            return frozenset({_NAMES.get(type(schema["const"]), "null")})
        if isinstance(values := schema.get("enum"), list):
            return frozenset(_NAMES.get(type(value), "null") for value in values)
        for word in ("anyOf", "oneOf", "allOf"):
            if isinstance(branches := schema.get(word), list):
                found = [self.of(branch, depth + 1) for branch in branches]
                if word != "allOf" and not all(found):
                    return frozenset()
                return frozenset().union(*found)
        return frozenset()


def as_schema(schema: Any) -> Mapping[str, Any]:
    """The schema of a member as an object; where it is none it says nothing."""
    return schema if isinstance(schema, Mapping) else {}


def as_json(written: str, kinds: frozenset[str]) -> str:
    """A value that stands in a text as it is, as JSON of one of these types; a string if it is none of them."""
    bare = written.strip()
    low = bare.lower()
    if "null" in kinds and low in ("null", "none"):
        return "null"
    if "boolean" in kinds and low in ("true", "false"):
        return low
    if kinds & {"integer", "number"} and is_number(bare, whole="number" not in kinds):
        return bare
    if bare.startswith('"') and kinds != {"string"} and python_or_json(bare) == bare:
        return bare
    if kinds & {"object", "array"} and bare[:1] in ("{", "["):
        found = python_or_json(bare)
        if found is not None and found[:1] in [{"object": "{", "array": "["}.get(kind) for kind in kinds]:
            return found
    return json.dumps(written, ensure_ascii=False)


def _target(ref: str, root: Mapping[str, Any]) -> Any:
    found: Any = root
    if not ref.startswith("#"):
        return None
    for step in unquote(ref[1:]).split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping):
            found = found.get(key)
        elif isinstance(found, list) and key.isdecimal() and key.isascii():
            found = next(islice(found, int(key[:9]), None), None)
        else:
            return None
    return found
