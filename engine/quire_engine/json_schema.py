"""JSON Schema as the compiler is given it: what it would take too loosely is narrowed here, or refused by name.

The compiler refuses most of what it does not know and is exact about most of what it does; this is the rest, as
the official test suite and tests of our own have found it. Formats of dates and times become patterns that know
leap years. A pattern is read as ECMA-262 has it, and where engines differ about a class of signs, as the narrowest
of them does. Bounds are numbers of double precision to the compiler: whole numbers that are none move inwards.
Strings are written in one way only (`ESCAPES`), for a name that is written in another is no longer found among
`properties`; and what cannot be written so is refused, for the compiler would leave it out.

Only places where the standard has a schema are read as one: what stands under `enum`, `const`, `default` and
`examples`, or under the name of a property, is data, and a `$ref` into it is refused.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

from quire_engine.errors import RequestRefused

REFUSED = "invalid_grammar"
"""Error code of a request whose constraint cannot be honoured, or not any further."""

ESCAPES = '"\\nrtbf'
"""Signs behind a backslash in a string. As `u` is not among them, other control characters cannot be written."""

_DAY = (
    r"(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    r"|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
_HOUR = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = _HOUR + r":[0-5][0-9](?:\.[0-9]+)?(?:[Zz]|[+-]" + _HOUR + ")"
_FORMATS = {"date": f"^{_DAY}$", "time": f"^{_TIME}$", "date-time": f"^{_DAY}[Tt]{_TIME}$"}
"""RFC 3339, without leap seconds: which minutes have one no pattern knows."""

_EXACT = 2**53
_EXACT_WHOLE = 2**63 - 1024
"""The largest bounds that the compiler keeps exactly, of numbers and of whole numbers."""

_STEP = 1e-15
"""From a bound that a number is not to have to the next that it may have: what is nearer has too many digits."""

_ONE = ("items", "additionalItems", "additionalProperties", "contains", "not", "if", "then", "else")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Where a schema has schemas."""
_OF_A_DOCUMENT = ("$defs", "definitions", "$anchor", "$id", "$schema")

_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_MOST = 2**31 - 1
"""No count of the compiler's is larger."""

_KEYWORDS = frozenset(
    {
        *_ONE, *_LISTS, *_MAPS, *_COUNTS,
        "$anchor", "$comment", "$dynamicAnchor", "$dynamicRef", "$id", "$recursiveAnchor", "$recursiveRef", "$ref",
        "$schema", "$vocabulary", "const", "contentEncoding", "contentMediaType", "contentSchema", "default",
        "dependencies", "dependentRequired", "deprecated", "description", "discriminator", "enum", "example",
        "examples", "exclusiveMaximum", "exclusiveMinimum", "format", "id", "maxContains", "maximum",
        "minContains", "minimum", "multipleOf", "pattern", "propertyNames", "readOnly", "required", "title",
        "type", "unevaluatedItems", "unevaluatedProperties", "uniqueItems", "writeOnly",
    }
)  # fmt: skip
"""What the drafts know, and two notes of OpenAPI that change nothing. What begins with `x-` is a note, too."""

_SPACE = r"\t-\r \u{a0}\u{1680}\u{2000}-\u{200a}\u{2028}\u{2029}\u{202f}\u{205f}\u{3000}"
_CLASSES = {
    # what all take for one of the class, and what some do
    "s": (_SPACE, _SPACE + r"\u{1c}-\u{1f}\u{85}\u{feff}"),
    "d": ("0-9", r"\p{Nd}"),
    "w": ("0-9A-Za-z_", r"\p{Alphabetic}\p{M}\p{N}\p{Pc}\u{200c}\u{200d}"),
}
_KNOWN_ESCAPES = frozenset("bBcdDfknpPrsStuvwWx")
_CONTROL = r"\x00-\x07\x0b\x0e-\x1f\x7f"
_unwritable = re.compile(f"[{_CONTROL}]")
_coded = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]{1,8})\}|(v)")
_group = re.compile(r"\?(?:[:=!<]|P<|[is]+[:)])")
"""What begins with `(` and all engines know, or others refuse and the rest read as Rust does."""
_DOT = r"[^\n\r\u{2028}\u{2029}]"


def prepared(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema as the compiler is to have it. Raises `RequestRefused`."""
    try:
        reader = _Reader()
        made = reader.read(schema, schema, root=True)
        for resource, pointer in reader.refs:
            _check_target(resource, pointer, reader.schemas)
    except RecursionError:
        raise RequestRefused(REFUSED, "it is too deeply nested to compile") from None
    return made


class _Reader:
    """Goes through all places where a schema stands."""

    def __init__(self) -> None:
        self.schemas: set[int] = set()
        """Ids of the objects that are schemas."""
        self.refs: list[tuple[Mapping[str, Any], str]] = []
        """What references point to: a document, and the way in it."""

    def read(
        self, schema: Mapping[str, Any], resource: Mapping[str, Any], *, root: bool = False
    ) -> dict[str, Any]:
        if isinstance(schema.get("$id"), str):
            resource = schema
            if "$ref" in schema and not root:  # drafts differ on what the reference is relative to
                raise RequestRefused(REFUSED, "not supported in a schema: $ref beside $id")
        _check_names(schema)
        self.schemas.add(id(schema))
        if isinstance(reference := schema.get("$ref"), str):
            self._refer(reference, resource)
        _check_counts(schema)
        for name in ("enum", "const"):
            if name in schema:
                _check_value(name, schema[name])
        made = {name: _whole(value) if name in _COUNTS else value for name, value in schema.items()}
        if made.get("uniqueItems") is False:
            del made["uniqueItems"]
        for name in _ONE:
            if isinstance(part := schema.get(name), dict):
                made[name] = self.read(part, resource)
        for name in _LISTS:
            if isinstance(parts := schema.get(name), list):
                made[name] = [self._any(part, resource) for part in parts]
        for name in _MAPS:
            if isinstance(named := schema.get(name), dict):
                made[name] = {key: self._any(part, resource) for key, part in named.items()}
        if isinstance(named := made.get("patternProperties"), dict):
            made["patternProperties"] = _renamed(named)
        _bound(made)
        _shape(made)
        return made

    def _any(self, part: object, resource: Mapping[str, Any]) -> object:
        return self.read(part, resource) if isinstance(part, dict) else part

    def _refer(self, reference: str, resource: Mapping[str, Any]) -> None:
        document, _, fragment = reference.partition("#")
        if not fragment.startswith("/"):
            return  # a whole document, or a schema by its anchor
        own = resource.get("$id")
        if document and document != (own.rstrip("#") if isinstance(own, str) else None):
            raise RequestRefused(REFUSED, f"not supported in a schema: $ref to another document, {reference}")
        self.refs.append((resource, fragment))


class Root:
    """A document whose parts refer to one another, and are wanted one by one. Each is read once."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document
        self._schemas: set[int] = set()
        """Ids of the objects in it that are schemas."""
        self._anchors: dict[str, object] = {}
        self._names: dict[int, str] = {}
        """Of what is referred to, by its id."""
        self._targets: dict[str, object] = {}
        self._read: dict[str, tuple[object, list[str]] | RequestRefused] = {}
        """What is referred to, with the names of what that refers to; or why it cannot be."""
        pending: list[Mapping[str, Any]] = [document]
        while pending:
            schema = pending.pop()
            self._schemas.add(id(schema))
            if isinstance(anchor := schema.get("$anchor"), str):
                self._anchors.setdefault(anchor, schema)
            pending += _parts(schema)

    def standing_alone(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """A schema whose references are into the document, as a document of its own: it has what it refers to, and
        what that refers to, among its definitions. Raises `RequestRefused`.
        """
        made, names = self._renamed(schema)
        defined: dict[str, object] = {}
        while names:
            name = names.pop()
            if name not in defined:
                defined[name], further = self._defined(name)
                names += further
        return {**made, "$defs": defined} if defined else dict(made)

    def _renamed(self, schema: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
        """A schema whose references are to definitions by our names, and the names."""
        names: list[str] = []

        def renamed(reference: str) -> str:
            name = self._name(reference)
            if name is None:
                return reference
            names.append(name)
            return f"#/$defs/{name}"

        if isinstance(schema.get("$id"), str) and schema is not self._document:
            return schema, names
        return _with_references(schema, renamed), names

    def _defined(self, name: str) -> tuple[object, list[str]]:
        if name not in self._read:
            target = self._targets[name]
            try:
                self._read[name] = self._renamed(target) if isinstance(target, dict) else (target, [])
            except RequestRefused as refused:
                self._read[name] = refused
        found = self._read[name]
        if isinstance(found, RequestRefused):
            raise RequestRefused(found.code, str(found))
        return found

    def _name(self, reference: str) -> str | None:
        """The name of what a reference means; None where that is not in the document. Raises `RequestRefused`."""
        document, _, fragment = reference.partition("#")
        own = self._document.get("$id")
        if document and document != (own.rstrip("#") if isinstance(own, str) else None):
            return None
        if fragment and not fragment.startswith("/"):
            target = self._anchors.get(fragment, _NOWHERE)
        else:
            target = _at(self._document, fragment)
        if target is _NOWHERE:
            raise RequestRefused(REFUSED, f"not supported in a schema: $ref to what is not there, {reference}")
        if not isinstance(target, bool) and id(target) not in self._schemas:
            raise RequestRefused(REFUSED, f"not supported in a schema: $ref to what is no schema, {reference}")
        name = self._names.setdefault(id(target), f"d{len(self._names)}")
        self._targets[name] = target
        return name


_NOWHERE = object()


def _parts(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The schemas that are parts of a schema."""
    found = [schema.get(name) for name in _ONE]
    for name in _LISTS:
        if isinstance(parts := schema.get(name), list):
            found += parts
    for name in _MAPS:
        if isinstance(named := schema.get(name), dict):
            found += named.values()
    return [part for part in found if isinstance(part, dict)]


def _with_references(schema: Mapping[str, Any], renamed: Callable[[str], str]) -> dict[str, Any]:
    """A schema with its references as `renamed` says, and without definitions: what of them is wanted, a reference
    names. A part that is a resource of its own stays as it is, for there references are into that.
    """

    def again(part: object) -> object:
        if not isinstance(part, dict) or isinstance(part.get("$id"), str):
            return part
        return _with_references(part, renamed)

    made = {name: value for name, value in schema.items() if name not in _OF_A_DOCUMENT}
    if isinstance(reference := schema.get("$ref"), str):
        made["$ref"] = renamed(reference)
    for name in _ONE:
        if name in made:
            made[name] = again(made[name])
    for name in _LISTS:
        if isinstance(parts := made.get(name), list):
            made[name] = [again(part) for part in parts]
    for name in _MAPS:
        if isinstance(named := made.get(name), dict):
            made[name] = {key: again(part) for key, part in named.items()}
    return made


def _at(document: object, pointer: str) -> object:
    """What stands in a document at a JSON pointer as a reference has it; `_NOWHERE` if nothing does."""
    found = document
    for part in unquote(pointer).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return _NOWHERE
    return found


def _check_target(resource: object, pointer: str, schemas: set[int]) -> None:
    """Refuse a reference to what is no schema; to what is not there the compiler objects."""
    found = _at(resource, pointer)
    if found is not _NOWHERE and not isinstance(found, bool) and id(found) not in schemas:
        raise RequestRefused(REFUSED, f"not supported in a schema: $ref to what is no schema, #{pointer}")


def _check_names(schema: Mapping[str, Any]) -> None:
    """Refuse what no draft knows: to the standard it says nothing, and to who wrote it something."""
    for name in schema:
        if name in _KEYWORDS or name.startswith("x-"):
            continue
        close = difflib.get_close_matches(name[:100], _KEYWORDS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        if name == "nullable":
            hint = "; a type may be a list of types, one of which is null"
        raise RequestRefused(
            REFUSED, f"not supported in a schema: {name[:100]} is no keyword of JSON Schema{hint}"
        )


def _check_counts(schema: Mapping[str, Any]) -> None:
    """Refuse what is too large, or no step between multiples; and a count of properties that only distinct names
    fulfil: free names may be written twice.
    """
    for name in _COUNTS:
        if isinstance(count := schema.get(name), int | float) and count > _MOST:
            raise RequestRefused(REFUSED, f"not supported in a schema: {name} above {_MOST}")
    if isinstance(step := schema.get("multipleOf"), int | float) and step <= 0:
        raise RequestRefused(REFUSED, f"not supported in a schema: multipleOf {step}; it has to be above 0")
    least, required = schema.get("minProperties"), schema.get("required")
    names = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
    if isinstance(least, int | float) and least > max(1, len(names)):
        raise RequestRefused(REFUSED, "not supported in a schema: minProperties above 1 and what is required")


def _check_value(name: str, value: object) -> None:
    """Refuse data that the compiler would write as something else."""
    match value:
        case dict():
            for key, part in value.items():
                _check_value(name, key)
                _check_value(name, part)
        case list():
            for part in value:
                _check_value(name, part)
        case str():
            if _unwritable.search(value):
                raise RequestRefused(REFUSED, f"not supported in a schema: {name} with a control character")
        case int():
            if not _is_double(value):
                raise RequestRefused(
                    REFUSED,
                    f"not supported in a schema: {name} with {value}, which is not exact in double precision",
                )


def _is_double(value: int) -> bool:
    try:
        return int(float(value)) == value
    except OverflowError:
        return False


def _whole(value: object) -> object:
    """2 for 2.0, which the standard takes for the same."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _bound(schema: dict[str, Any]) -> None:
    """Move bounds inwards to what the compiler keeps exactly. Raises `RequestRefused` if nothing is left."""
    most = _EXACT_WHOLE if schema.get("type") == "integer" else _EXACT
    for name in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
        value = schema.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        lower = name in ("minimum", "exclusiveMinimum")
        if value > most if lower else value < -most:
            raise RequestRefused(REFUSED, f"not supported in a schema: {name} beyond {most if lower else -most}")
        kept = min(max(value, -most), most)
        if isinstance(kept, int):
            near = float(kept)
            if near != kept and (near < kept) == lower:
                near = math.nextafter(near, math.inf if lower else -math.inf)
            kept = int(near)
        schema[name] = kept
    if schema.get("type") != "integer":
        _include(schema)


def _include(schema: dict[str, Any]) -> None:
    """Bounds of numbers that exclude themselves become ones close by that do not.

    The compiler lets 2 pass where 2 is excluded and the other bound begins with 2, too. And a text of many digits
    that is read as the bound itself is outside then.
    """
    for exclusive, inclusive, outer, towards in (
        ("exclusiveMinimum", "minimum", max, 1),
        ("exclusiveMaximum", "maximum", min, -1),
    ):
        value, other = schema.get(exclusive), schema.get(inclusive)
        if isinstance(value, int | float) and not isinstance(value, bool):
            del schema[exclusive]
            near = value + towards * max(math.ulp(value), _STEP)
            schema[inclusive] = outer(near, other) if isinstance(other, int | float) else near


def _shape(schema: dict[str, Any]) -> None:
    """Give strings the patterns that the compiler is to have."""
    patterns: list[str] = []
    if isinstance(pattern := schema.get("pattern"), str):
        patterns.append(ecma(pattern))
    if isinstance(known := schema.get("format"), str) and known in _FORMATS:
        del schema["format"]
        patterns.append(_FORMATS[known])
    if patterns:
        schema["pattern"], *others = patterns
        if others:
            also = [{"pattern": other} for other in others]
            schema["allOf"] = [{"allOf": schema["allOf"]}, *also] if "allOf" in schema else also


def _renamed(named: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for pattern, part in named.items():
        name = ecma(pattern)
        made[name] = {"allOf": [made[name], part]} if name in made else part
    return made


# ── patterns ──────────────────────────────────────────────────────────────────────────────────────────────


def ecma(pattern: str) -> str:
    """A pattern of ECMA-262 in the compiler's notation, which is Rust's. Raises `RequestRefused`.

    Where they, or Python, differ on which signs belong to a class, it has those on which they agree.
    """
    out: list[str] = []
    negated: bool | None = None  # of the class that is open
    at = 0
    while at < len(pattern):
        char = pattern[at]
        at += 1
        if char == "\\" and at < len(pattern):
            coded, escaped = _coded.match(pattern, at), pattern[at]
            at = coded.end() if coded else at + 1
            meant = "" if coded is None else "\v" if coded[4] else _char(coded[1] or coded[2] or coded[3])
            if _unwritable.match(meant) and negated is None:
                out.append(f"[{_CONTROL}]")
            else:
                out.append("\\" + coded[0] if coded else _escape(escaped, negated))
        elif negated is None:
            if char == "[":
                negated = pattern.startswith("^", at)
                at += negated
                if pattern.startswith("]", at):
                    raise _not_in_a_pattern("[]")
                char = "[^" if negated else "["
            elif char == "(" and pattern.startswith("?", at) and not _group.match(pattern, at):
                raise _not_in_a_pattern("(" + pattern[at : at + 2])
            elif _unwritable.match(char):
                char = f"[{_CONTROL}]"
            out.append(_DOT if char == "." else char)
        elif char == "]":
            # a class of one sign would be a literal, and what cannot be written is left out of those
            out.append("]" if negated else _CONTROL + "]")
            negated = None
        else:
            if char == "-" and pattern.startswith("-", at):
                raise _not_in_a_pattern("--")
            out.append("\\" + char if char in "[&~" else char)  # sets within sets are Rust's alone
    return "".join(out)


def _char(code: str) -> str:
    return chr(min(int(code, 16), 0x10FFFF))


def _escape(char: str, negated: bool | None) -> str:
    if char.lower() in _CLASSES:
        certain, possible = _CLASSES[char.lower()]
        inverse = char.isupper()
        # what is taken away from is to be small, and what is taken away large
        signs = possible if inverse != bool(negated) else certain
        if negated is None:
            return f"[^{signs}]" if inverse else f"[{signs}]"
        return f"[^{signs}]" if inverse else signs
    if char.isascii() and char.isalpha() and char not in _KNOWN_ESCAPES:
        raise _not_in_a_pattern("\\" + char)
    return "\\" + char


def _not_in_a_pattern(what: str) -> RequestRefused:
    return RequestRefused(REFUSED, f"not supported in a pattern: {what}")
