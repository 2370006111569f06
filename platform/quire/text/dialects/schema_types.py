"""What a JSON Schema says of the type of a value, for dialects that write values without JSON's signs."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

_NUMBER: Final = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?\Z")
_MAX_DEPTH: Final = 16
_MAX_LITERAL: Final = 1 << 20
"""Characters of a Python literal that are parsed; a longer one stays a string."""
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

    def of(self, key: str) -> Any:
        return self.named.get(key, self.others)


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
    return Members(known, frozenset(required), None if further is False else further, beyond, demanding)


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


def types(schema: Any, root: Mapping[str, Any], depth: int = 0) -> frozenset[str]:
    """The types that a value may have; none if the schema does not say."""
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return frozenset()
    stated = schema.get("type")
    if isinstance(stated, str):
        return frozenset({stated})
    if isinstance(stated, list):
        return frozenset(kind for kind in stated if isinstance(kind, str))
    if isinstance(ref := schema.get("$ref"), str):
        return types(_target(ref, root), root, depth + 1)
    if "const" in schema:
        return frozenset({_NAMES.get(type(schema["const"]), "null")})
    if isinstance(values := schema.get("enum"), list):
        return frozenset(_NAMES.get(type(value), "null") for value in values)
    for word in ("anyOf", "oneOf", "allOf"):
        if isinstance(branches := schema.get(word), list):
            found = [types(branch, root, depth + 1) for branch in branches]
            if word != "allOf" and not all(found):
                return frozenset()
            return frozenset().union(*found)
    return frozenset()


def inlined(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a property as one that stands alone, with the definitions that it may refer to."""
    if not isinstance(schema, Mapping):
        return {}
    named = {word: root[word] for word in ("$defs", "definitions") if word in root}
    return {**named, **schema} if named and '"$ref"' in json.dumps(schema, default=str) else schema


def as_json(written: str, kinds: frozenset[str]) -> str:
    """A value that stands in a text as it is, as JSON of one of these types; a string if it is none of them."""
    bare = written.strip()
    low = bare.lower()
    if "null" in kinds and low in ("null", "none"):
        return "null"
    if "boolean" in kinds and low in ("true", "false"):
        return low
    if kinds & {"integer", "number"} and _NUMBER.match(bare):
        return bare
    if bare.startswith('"') and kinds != {"string"} and python_or_json(bare) == bare:
        return bare
    if kinds & {"object", "array"} and bare[:1] in ("{", "["):
        found = python_or_json(bare)
        if found is not None and found[:1] in [{"object": "{", "array": "["}.get(kind) for kind in kinds]:
            return found
    return json.dumps(written, ensure_ascii=False)


def python_or_json(written: str) -> str | None:
    """A literal of JSON or of Python as JSON; None if it is neither."""
    try:
        json.loads(written, parse_constant=_refuse)
    except (ValueError, RecursionError):
        pass
    else:
        return written
    if len(written) > _MAX_LITERAL:
        return None
    try:
        return json.dumps(ast.literal_eval(written), ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _target(ref: str, root: Mapping[str, Any]) -> Any:
    found: Any = root
    if not ref.startswith("#"):
        return None
    for step in ref[1:].split("/")[1:]:
        if not isinstance(found, Mapping):
            return None
        found = found.get(step.replace("~1", "/").replace("~0", "~"))
    return found
