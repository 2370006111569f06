"""YAML text -> resources, or problems that name file, line and column. Entirely offline, and it raises nothing.

1. `yaml_tree` gives trees of nodes with positions.
2. `_Reader` walks each tree along the schema of its kind. A bare scalar becomes what its field needs, so
   `revision: 1234567` is text and `chunkedPrefill: no` is no boolean. Unknown and repeated keys, empty values
   and wrong structure are reported here, where the position is at hand.
3. Pydantic judges the values, and its errors are mapped back to positions.
4. `rules` runs over whatever parsed: fields against each other, documents against each other, fields that
   this version refuses.

All problems of all files come out of one run. A document yields a resource only if it has none.

The *intent* of a resource is the document as submitted: the plain camelCase values the user wrote, without
defaults. `intent_hash` is its identity: key order, comments and quoting do not change it.

Exceptions:

    ManifestInvalid     at least one problem; `.problems` has them all
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path as FilePath
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from quire_schemas.access import AccessPolicy
from quire_schemas.explain import UnknownField, explain, json_schema
from quire_schemas.fields import Path, SchemaField, Shape, dotted, fields_of, walk
from quire_schemas.keys import MIN_LENGTH, masked
from quire_schemas.kinds import KINDS, READ_ONLY_KINDS
from quire_schemas.model import Model
from quire_schemas.resource import API_VERSION, Key, Resource, Strict
from quire_schemas.rules import Facts, check, claims
from quire_schemas.yaml_tree import MAX_BYTES, Node, bare_value, compose

MAX_PROBLEMS = 100
MANIFEST_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. `line` and `column` count from 1; `path` is dotted, empty for the whole file.

    Path, message and hint are short and printable whatever the file holds: they quote it, and a terminal obeys
    the control characters that it is sent. They have no API key of ours, wherever in the file somebody put one.
    """

    file: str
    line: int
    col: int
    path: str
    message: str
    hint: str = ""

    def __post_init__(self) -> None:
        for name in ("path", "message", "hint"):
            object.__setattr__(self, name, _printable(getattr(self, name)))

    def __str__(self) -> str:
        path = f"{self.path}: " if self.path else ""
        text = f"{self.file}:{self.line}:{self.col}: error: {path}{self.message}"
        return f"{text}\n    hint: {self.hint}" if self.hint else text

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `Problem(**d)` is the way back."""
        return asdict(self)


MAX_WORDS = 600


def _printable(text: str) -> str:
    text = masked(text)
    if len(text) > MAX_WORDS:
        text = f"{text[: MAX_WORDS - 3]}..."
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class ManifestInvalid(Exception):
    """At least one problem was found."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(p) for p in problems))
        self.problems = list(problems)


@dataclass(frozen=True, slots=True)
class Located:
    """A resource and where it was written. `document` counts the non-empty documents of its file from 0.

    `places` has the line and column of the value of every field that the document has, by dotted path.
    """

    resource: Resource
    file: str
    line: int
    document: int
    intent: dict[str, Any]
    places: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def problem(self, path: str, message: str, hint: str) -> Problem:
        """A problem with a field, at its value; at its nearest declared ancestor if the document lacks it."""
        known = path
        while known and known not in self.places:
            known = known[: max(known.rfind("."), known.rfind("["), 0)]
        line, column = self.places.get(known, (self.line, 1))
        return Problem(self.file, line, column, path, message, hint)

    @property
    def key(self) -> Key:
        """Kind and name."""
        return Key.of(self.resource)


@dataclass(slots=True)
class Manifest:
    """What a set of files declares, and what is wrong with it. Apply nothing while there are problems."""

    resources: list[Located] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def load(texts: Sequence[tuple[str, str]]) -> Manifest:
    """Read (file name, YAML text) pairs into one set. Never raises for what the texts contain."""
    manifest = Manifest()
    documents: list[_Document] = []
    for file, text in texts:
        nodes, flaws = compose(text)
        found = [_Document(file, index, node) for index, node in enumerate(nodes)]
        problems = [Problem(file, f.line, f.column, "", f.message, f.hint) for f in flaws]
        for document in found:
            document.read()
            document.usable = document.usable and not flaws
        _problems_of_file(manifest, file, problems, found)
        documents += found
    _conflicts(manifest, documents)
    manifest.resources = [d.located() for d in documents if d.resource is not None and d.usable]
    return manifest


def load_paths(paths: Sequence[FilePath | str]) -> Manifest:
    """`read_paths` and `load` in one: files that cannot be read are problems beside those of the others."""
    texts, unread = _read(paths)
    manifest = load(texts)
    manifest.problems = [*unread, *manifest.problems]
    return manifest


def load_contents(contents: Sequence[tuple[str, bytes]]) -> Manifest:
    """As `load`, of files' bytes: what is too large or not UTF-8 is a problem beside those of the others."""
    texts: list[tuple[str, str]] = []
    unread: list[Problem] = []
    for name, content in contents:
        _decode(name, content, texts, unread)
    manifest = load(texts)
    manifest.problems = [*unread, *manifest.problems]
    return manifest


def read_paths(paths: Sequence[FilePath | str]) -> list[tuple[str, str]]:
    """(name, text) of each file; `-` is standard input, a folder all *.yaml and *.yml below it, sorted; what
    is hidden (`.git`, `.venv`) is left out.

    Raises `ManifestInvalid` with a problem for each one that is missing, unreadable, larger than 1 MiB or not
    UTF-8, and for a folder without manifests.
    """
    texts, problems = _read(paths)
    if problems:
        raise ManifestInvalid(problems)
    return texts


def parse_intent(intent: Mapping[str, Any]) -> Resource:
    """The resource of a stored intent. Raises `ManifestInvalid` if this version no longer takes it."""
    kind = KINDS.get(str(intent.get("kind")))
    if kind is None:
        raise ManifestInvalid([Problem("intent", 1, 1, "kind", f"unknown kind {intent.get('kind')!r}")])
    try:
        return kind.model_validate(dict(intent))
    except ValidationError as error:
        raise ManifestInvalid(
            [
                Problem("intent", 1, 1, dotted(e["loc"]), _message(e, hidden=_hides(kind, e["loc"])), _own_hint(e))
                for e in error.errors()
            ]
        ) from error


def intent_hash(resource: Resource | Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the submitted document in canonical JSON; takes the resource or its intent."""
    intent = resource.intent() if isinstance(resource, Resource) else resource
    text = json.dumps(intent, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


_VERSION = re.compile(r"quire\.dev/v([0-9]{1,4})(?:(alpha|beta)([0-9]{1,4}))?")


def is_newer(api_version: str) -> bool:
    """Whether it is a version of our API that comes after ours: v1alpha1 < v1alpha2 < v1beta1 < v1 < v2alpha1."""

    def rank(found: re.Match[str]) -> tuple[int, int, int]:
        major, stage, minor = found.groups()
        return int(major), {"alpha": 0, "beta": 1, None: 2}[stage], int(minor or 0)

    given, own = _VERSION.fullmatch(api_version), _VERSION.fullmatch(API_VERSION)
    return given is not None and own is not None and rank(given) > rank(own)


def _product() -> str:
    # Only for a message that is rarely needed; the import would cost every start.
    from importlib.metadata import version

    return version("quire")


# ── one document ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a field's name and its value stand."""

    key: tuple[int, int]
    value: tuple[int, int]


class _Document:
    """One YAML document on its way to a resource."""

    def __init__(self, file: str, index: int, node: Node) -> None:
        self.file = file
        self.index = index
        self.node = node
        self.usable = True
        self.newer = False
        """Written for a version of the API that comes after ours."""
        self.resource: Resource | None = None
        self.facts: Facts | None = None
        self.problems: list[Problem] = []
        self.bad: set[Path] = set()
        start = (node.line, node.column)
        self.places: dict[Path, _Place] = {(): _Place(start, start)}

    def located(self) -> Located:
        if self.resource is None:
            raise RuntimeError("a document with problems has no resource")
        places = {dotted(path): place.value for path, place in self.places.items()}
        return Located(self.resource, self.file, self.node.line, self.index, self.resource.intent(), places)

    def read(self) -> None:
        kind = self._kind()
        if kind is None:
            return
        tree = _Reader(self, kind).read()
        try:
            resource: Resource | None = kind.model_validate(tree)
        except ValidationError as error:
            resource = None
            self._take_errors(error.errors(), kind)
        self.facts = Facts(kind, tree, self.bad)
        for finding in check(self.facts):
            if not any(finding.path[: len(bad)] == bad for bad in self.bad):
                self.report(finding.path, finding.message, finding.hint, at_key=finding.at_key)
        self.resource = None if self.problems else resource

    def report(self, path: Path, message: str, hint: str, *, at_key: bool = False) -> None:
        """A problem at a path; at its closest ancestor's position if the document lacks it."""
        self.bad.add(path)
        self.problems.append(self.problem(path, message, hint, at_key=at_key))

    def problem(self, path: Path, message: str, hint: str, *, at_key: bool = False) -> Problem:
        known = path
        while known not in self.places:
            known = known[:-1]
        place = self.places[known]
        line, column = place.key if at_key or known != path else place.value
        return Problem(self.file, line, column, dotted(path), message, hint)

    def report_at(self, node: Node, path: Path, message: str, hint: str) -> None:
        """A problem at a node of its own, such as a key that belongs to no field."""
        self.problems.append(Problem(self.file, node.line, node.column, dotted(path), message, hint))

    def _kind(self) -> type[Resource] | None:
        """The schema to read by; None after reporting why there is none."""
        if self.node.kind != "mapping":
            self.report((), "a document is a mapping of fields", f"it starts with apiVersion: {API_VERSION}")
            return None
        heads: dict[str, Node] = {}
        for key, value in self.node.entries:
            if key.text in ("apiVersion", "kind") and key.text not in heads:
                heads[key.text] = value
                at = (key.line, key.column)
                self.places[(key.text,)] = _Place(at, (value.line, value.column))
        version, kind = heads.get("apiVersion"), heads.get("kind")
        if version is not None and (version.kind != "scalar" or version.text != API_VERSION):
            self.newer = is_newer(version.text)
            if self.newer:
                self.report(
                    ("apiVersion",),
                    f"{_shown(version)} is newer than this version of Quire ({_product()}), "
                    f"which reads {API_VERSION}",
                    f"upgrade Quire, or write the document as {API_VERSION}",
                )
            else:
                hint = f"this version reads {API_VERSION}"
                self.report(("apiVersion",), f"{_shown(version)} is not known", hint)
        if kind is None:
            self.report(("kind",), "is required", f"one of {', '.join(KINDS)}")
        elif kind.kind != "scalar" or kind.text not in KINDS:
            self.report(("kind",), f"{_shown(kind)} is not a kind of resource", self._kind_hint(kind.text))
        else:
            return KINDS[kind.text]
        return None

    def _kind_hint(self, given: str) -> str:
        by_word = {k.lower(): k for k in KINDS}
        if given.lower() in (k.lower() for k in READ_ONLY_KINDS):
            return "objects of that kind are written by the platform; read them with: platform get"
        near = difflib.get_close_matches(given.lower()[:64], list(by_word), 1, 0.6)
        if near:
            return f"did you mean '{by_word[near[0]]}'?"
        known = f"one of {', '.join(KINDS)}"
        return f"a newer version may have it; {API_VERSION} has {known}" if self.newer else known

    def _take_errors(self, errors: list[ErrorDetails], kind: type[Resource]) -> None:
        # Deepest first: a list whose items are bad also counts as too short, which nobody needs to hear.
        for error in sorted(errors, key=lambda e: -len(e["loc"])):
            path = _known_path(error["loc"], self.places, missing=error["type"] == "missing")
            if any(path[: len(bad)] == bad or bad[: len(path)] == path for bad in self.bad):
                continue
            hint = _own_hint(error)
            shape = _field_at(kind, path)
            hidden = _hides(kind, path)
            if hidden:
                hint = hint or _key_hint(path, error["input"])
                error["input"] = ""
            if not hint:
                hint = _value_hint(error, shape) or f"see: platform explain {_explained(kind, path)}"
            self.report(path, _message(error, hidden=hidden), hint)


class _Reader:
    """Walks one document along its schema: checks structure, gives each scalar the type its field needs."""

    def __init__(self, document: _Document, kind: type[Resource]) -> None:
        self._document = document
        self._kind = kind

    def read(self) -> dict[str, Any]:
        """The document as plain values. What is not in place is reported and left out."""
        return self._section(self._document.node, self._kind, ())

    def _section(self, node: Node, section: type[Strict], path: Path) -> dict[str, Any]:
        fields = fields_of(section)
        values: dict[str, Any] = {}
        for name, key, value in self._entries(node, path):
            if name not in fields:
                hint = self._unknown_hint(name, path, fields)
                if _hides(self._kind, path):
                    hint = _key_hint(path, name) or hint
                self._document.report_at(key, self._below(path, name), "unknown field", hint)
                continue
            child = (*path, name)
            self._document.places[child] = _Place((key.line, key.column), (value.line, value.column))
            if value.is_null:
                self._document.report(child, "has no value", "give it one, or remove the line", at_key=True)
                continue
            read = self._value(value, fields[name].shape, child)
            if read is not None:
                values[name] = read
        return values

    def _entries(self, node: Node, path: Path) -> list[tuple[str, Node, Node]]:
        """Keys and values of a mapping, without keys that are no words, merge keys and repeated keys."""
        first: dict[str, int] = {}
        kept = []
        for key, value in node.entries:
            if key.kind != "scalar":
                self._document.report_at(key, path, "a field's name is a word", "remove it")
            elif key.bare and key.text == "<<":
                self._document.report_at(key, path, "merge keys are not taken", "spell the fields out")
            elif key.text in first:
                message = f"duplicate key (first at line {first[key.text]})"
                self._document.report_at(key, self._below(path, key.text), message, "remove one of them")
            else:
                first[key.text] = key.line
                kept.append((key.text, key, value))
        return kept

    def _value(self, node: Node, shape: Shape, path: Path) -> Any:
        """The plain value; None after reporting that there is none."""
        expected = {"section": "mapping", "map": "mapping", "list": "list", "scalar": "scalar"}[shape.kind]
        if node.kind != expected:
            hidden = node.kind == "scalar" and not node.is_null and _hides(self._kind, path)
            shown = "a single value" if hidden else _shown(node)
            hint = (_key_hint(path, node.text) if hidden else "") or _structure_hint(shape)
            self._document.report(path, f"should be {_article(shape)}, not {shown}", hint)
            return None
        if shape.section is not None:
            return self._section(node, shape.section, path)
        if shape.kind == "map" and shape.item is not None:
            return self._map(node, shape.item, path)
        if shape.kind == "list" and shape.item is not None:
            return self._list(node, shape.item, path)
        if _names(path) and node.bare and isinstance(value := bare_value(node.text), bool | float):
            kind = "a boolean" if isinstance(value, bool) else "a number with a fraction"
            self._document.report(path, f"{node.text} is {kind}, not a name", f'put it in quotes: "{node.text}"')
            return None
        return _scalar(node, shape)

    def _map(self, node: Node, item: Shape, path: Path) -> dict[str, Any]:
        values = {}
        for name, key, value in self._entries(node, path):
            child = (*path, name)
            self._document.places[child] = _Place((key.line, key.column), (value.line, value.column))
            if value.is_null:
                self._document.report(child, "has no value", "for an empty one write ''", at_key=True)
                continue
            read = self._value(value, item, child)
            if read is not None:
                values[name] = read
        return values

    def _list(self, node: Node, item: Shape, path: Path) -> list[Any]:
        values: list[Any] = []
        for index, value in enumerate(node.items):
            child = (*path, index)
            at = (value.line, value.column)
            self._document.places[child] = _Place(at, at)
            if value.is_null:
                self._document.report(child, "has no value", "give it one, or remove it")
            read = None if value.is_null else self._value(value, item, child)
            values.append(read)
        # None stands for a bad item, which Pydantic then refuses once more where it was refused already:
        # what follows keeps its place, and is judged in the same run.
        return values

    def _below(self, path: Path, name: str) -> Path:
        """The path of a name that no field has; that of its mapping, where the name might be a key itself."""
        return path if _hides(self._kind, path) and len(name) >= MIN_LENGTH else (*path, name)

    def _unknown_hint(self, name: str, path: Path, fields: Mapping[str, SchemaField]) -> str:
        if len(self._document.problems) >= MAX_PROBLEMS:
            return ""
        if not path and name == "status":
            return "status is written by the platform; remove it"
        word = _plain_word(name)
        alien = ALIEN_NAMES.get(name.lstrip("-").replace("-", "_").lower())
        sibling = next((f for f in fields if _plain_word(f) == word), None)
        if alien is not None and self._kind is Model:
            return f"that is the engine flag spelling; here it is {alien}"
        if sibling is not None:
            return f"did you mean '{sibling}'?"
        elsewhere = [p for p, f in walk(self._kind) if _plain_word(f.name) == word]
        if elsewhere:
            return f"did you mean {dotted(elsewhere[0])}?"
        near = difflib.get_close_matches(name.lower(), [f.lower() for f in fields], 1, 0.6)
        if near:
            return f"did you mean '{next(f for f in fields if f.lower() == near[0])}'?"
        if self._document.newer:
            return f"a newer version may have it; {API_VERSION} does not"
        listed = (
            ", ".join(fields) if len(fields) <= 12 else f"see: platform explain {_explained(self._kind, path)}"
        )
        return f"fields here: {listed}" if len(fields) <= 12 else listed


def _names(path: Path) -> bool:
    """Whether the scalar at this path is a name that requests or commands use."""
    return path == ("metadata", "name") or path[:2] == ("spec", "servedModelNames")


def _scalar(node: Node, shape: Shape) -> str | int | float | bool | None:
    """The scalar as its field needs it; what does not suit stays as it is, for Pydantic to refuse."""
    if not node.bare or shape.types == {str}:
        return node.text
    value = bare_value(node.text)
    return node.text if str in shape.types and type(value) not in shape.types else value


# ── problems in words ─────────────────────────────────────────────────────────────────────────────────────


def _known_path(loc: tuple[int | str, ...], places: Mapping[Path, _Place], *, missing: bool) -> Path:
    """A Pydantic location without the parts that name members of unions and validators."""
    path: Path = ()
    for part in loc:
        if (*path, part) in places:
            path = (*path, part)
    return (*path, loc[-1]) if missing and (not path or path[-1] != loc[-1]) else path


def _explained(kind: type[Resource], path: Path) -> str:
    """The path as `platform explain` takes it."""
    return ".".join([kind.__name__.lower(), *(p for p in path if isinstance(p, str))])


def _field_at(kind: type[Resource], path: Path) -> Shape | None:
    """The shape of what stands at a path, None below maps."""
    shape: Shape | None = Shape("section", section=kind)
    for part in path:
        if shape is None:
            return None
        if isinstance(part, int):
            shape = shape.item
        elif shape.section is not None:
            child = fields_of(shape.section).get(part)
            shape = child.shape if child is not None else None
        else:
            shape = shape.item
    return shape


ERROR_WORDS: Mapping[str, str] = {
    "missing": "is required",
    "value_error": "{error}",
    "extra_forbidden": "unknown field",
    "model_type": "should be a mapping of fields, not {given}",
    "dict_type": "should be a mapping, not {given}",
    "tuple_type": "should be a list, not {given}",
    "too_short": "should have {min_length} or more entries, not {actual_length}",
    "too_long": "should have {max_length} or fewer entries, not {actual_length}",
    "string_type": "should be text, not {given}",
    "string_unicode": "has characters that are no text",
    "string_too_short": "should have {min_length} or more characters",
    "string_too_long": "should have {max_length} or fewer characters",
    "string_pattern_mismatch": "{given} does not have the form of this field",
    "int_type": "should be a whole number, not {given}",
    "int_from_float": "should be a whole number, not {given}",
    "int_parsing_size": "is too large a number",
    "finite_number": "should be a finite number",
    "bool_type": "should be a boolean, not {given}",
    "literal_error": "should be {expected}, not {given}",
    "greater_than_equal": "should be {ge} or more, not {given}",
    "less_than_equal": "should be {le} or less, not {given}",
}
"""Each kind of error that Pydantic can find in our schemas, in our words. What they name is Pydantic's context,
and what was given."""


def _message(error: ErrorDetails, *, hidden: bool = False) -> str:
    words = ERROR_WORDS.get(error["type"], "does not suit this field")
    given = "what stands here" if hidden else _brief(error.get("input"))
    return words.format(**{**error.get("ctx", {}), "given": given})


def _hides(kind: type[Resource], path: Sequence[int | str]) -> bool:
    """Whether what stands at a path is never shown: people put keys themselves among those of a policy."""
    return kind is AccessPolicy and tuple(path[:2]) == ("spec", "keys")


def _key_hint(path: Path, given: object) -> str:
    """What to write for a key that stands where its value must not; empty if that is not the trouble."""
    write = "put what platform key create printed behind hash here, or valueFrom: {secretRef: NAME}"
    if isinstance(given, str) and masked(given) != given:
        return f"that is the key itself: {write}, and replace the key if others may have seen this"
    return f"a key itself never stands here: {write}" if path[-1] == "hash" else ""


def _own_hint(error: ErrorDetails) -> str:
    """The hint that one of our own checks brought along."""
    cause = error.get("ctx", {}).get("error")
    return str(getattr(cause, "hint", ""))


_PATTERN_HINTS = {
    r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$": "lower-case letters, digits, '-' and '.', at most 63 characters",
    r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}$": "letters, digits and . _ : / @ -, starting with a letter or digit",
    r"^[A-Za-z_][A-Za-z0-9_]{0,127}$": "letters, digits and '_', not starting with a digit",
    r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d)$": "for example '2027-01-01T00:00:00Z'",
    r"^(none|prefix|user|header:[A-Za-z0-9!#$%&'*+.^_`|~-]+)$": "one of none, prefix, user, header:<name>",
}


def _value_hint(error: ErrorDetails, shape: Shape | None) -> str:
    kind, given = error["type"], error.get("input")
    if kind == "missing":
        return "add it"
    if kind == "literal_error" and shape is not None and str not in shape.types:
        return f"one of {', '.join(str(v) for v in shape.values)}"
    if kind == "literal_error" and shape is not None:
        return _closest(str(given), [str(v) for v in shape.values])
    if kind == "string_pattern_mismatch":
        pattern = str(error["ctx"]["pattern"])
        hint = _PATTERN_HINTS.get(pattern, f"it must match {pattern}")
        slug = re.sub(r"[^a-z0-9.-]+", "-", str(given).lower()).strip("-.")[:63].strip("-.")
        return f"{hint}: did you mean '{slug}'?" if "lower-case" in hint and slug else hint
    if kind == "bool_type":
        yes_no = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
        meant = yes_no.get(str(given).lower())
        return f"write {meant}: in YAML 1.2 '{given}' is text" if meant else "write true or false"
    if kind in ("int_type", "int_from_float"):
        if isinstance(given, str) and re.fullmatch(r"[-+]?\d+", given):
            return f"remove the quotes: {given}"
        return "write a whole number"
    if kind in ("too_long", "string_too_long"):
        return "make it shorter"
    if kind in ("too_short", "string_too_short"):
        return "it cannot be empty" if error["ctx"]["min_length"] == 1 else "make it longer"
    return ""


def _closest(given: str, values: list[str]) -> str:
    by_word = {v.lower(): v for v in values}
    short = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "gpu": "cuda"}
    alias = short.get(given.lower())
    if alias in values:
        return f"did you mean '{alias}'?"
    near = difflib.get_close_matches(given.lower()[:64], list(by_word), 1, 0.5)
    return f"did you mean '{by_word[near[0]]}'?" if near else f"one of {', '.join(values)}"


def _shown(node: Node) -> str:
    if node.kind != "scalar":
        return f"a {node.kind}"
    return "nothing" if node.is_null else _brief(node.text)


def _brief(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _article(shape: Shape) -> str:
    words: dict[Literal["section", "list", "map", "scalar"], str] = {
        "section": "a mapping of fields",
        "map": "a mapping of names to text",
        "list": "a list",
        "scalar": "a single value",
    }
    return words[shape.kind]


def _structure_hint(shape: Shape) -> str:
    if shape.section is not None:
        return f"its fields are {', '.join(list(fields_of(shape.section))[:12])}"
    if shape.kind == "list" and shape.item is not None and shape.item.section is not None:
        names = list(fields_of(shape.item.section))
        return f"write [{{{names[0]}: …}}], one mapping for each; their fields are {', '.join(names[:12])}"
    if shape.kind == "list":
        return "write [one, two], or a line with '- ' for each"
    return "write {key: value}" if shape.kind == "map" else f"expected {shape.word}"


def _plain_word(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _problems_of_file(manifest: Manifest, file: str, flaws: list[Problem], documents: list[_Document]) -> None:
    found = sorted((p for d in documents for p in d.problems), key=lambda p: (p.line, p.col))
    if len(found) > MAX_PROBLEMS:
        more, last = len(found) - MAX_PROBLEMS, found[MAX_PROBLEMS]
        found = found[:MAX_PROBLEMS]
        found.append(Problem(file, last.line, last.col, "", f"{more} more problems", "fix the first ones"))
    problems = sorted([*flaws, *found], key=lambda p: (p.line, p.col))
    manifest.problems += problems


def _conflicts(manifest: Manifest, documents: list[_Document]) -> None:
    """Two documents of the set that claim one object or one served name."""
    owners: dict[str, _Document] = {}
    for document in documents:
        if document.facts is None:
            continue
        for claim, path in claims(document.facts):
            owner = owners.setdefault(claim, document)
            if owner is document or (
                path == ("metadata", "name") and claim.startswith("served") and _twins(owner, document)
            ):
                continue
            place = f"{owner.file}:{owner.node.line}"
            manifest.problems.append(
                document.problem(path, f"{claim} is declared twice (first at {place})", "rename or remove one")
            )
            document.usable = False


def _twins(one: _Document, other: _Document) -> bool:
    """Whether two documents have one key: their names clash too, and that need not be said twice."""
    if one.facts is None or other.facts is None:
        return False
    return claims(one.facts)[0] == claims(other.facts)[0]


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────


def _read(paths: Sequence[FilePath | str]) -> tuple[list[tuple[str, str]], list[Problem]]:
    texts: list[tuple[str, str]] = []
    problems: list[Problem] = []
    for path in paths:
        if str(path) == "-":
            _decode("<stdin>", sys.stdin.buffer.read(MAX_BYTES + 1), texts, problems)
            continue
        if not str(path):
            problems.append(Problem("''", 1, 1, "", "the path is empty", "name a file or a folder; . is this one"))
            continue
        for file in _files(FilePath(path), problems):
            try:
                with file.open("rb") as opened:
                    content = opened.read(MAX_BYTES + 1)
            except OSError as error:
                message = f"cannot be read: {error.strerror or error}"
                problems.append(Problem(str(file), 1, 1, "", message, "check the path and its permissions"))
                continue
            _decode(str(file), content, texts, problems)
    return texts, problems


MAX_ENTRIES = 100_000


class TooMany(Exception):
    """A folder holds more than anybody would keep manifests in."""


def manifests_below(folder: FilePath) -> Iterator[FilePath]:
    """The manifests of a folder and of those below it, but of hidden ones. Raises OSError where one cannot be read
    and `TooMany` after `MAX_ENTRIES` files and folders."""

    def refuse(error: OSError) -> None:
        raise error

    seen = 0
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        seen += len(folders) + len(names)
        if seen > MAX_ENTRIES:
            raise TooMany(f"there are more than {MAX_ENTRIES:,} files in it and below")
        for name in names:
            path = FilePath(place, name)
            if not name.startswith(".") and path.suffix in MANIFEST_SUFFIXES and path.is_file():
                yield path


def _files(path: FilePath, problems: list[Problem]) -> list[FilePath]:
    if not path.is_dir():
        return [path]
    hint = "name the manifests, or a folder that holds only them"
    try:
        files = sorted(manifests_below(path))
    except TooMany as error:
        problems.append(Problem(str(path), 1, 1, "", str(error), hint))
        return []
    except OSError as error:
        message = f"cannot be read: {error.strerror or error} ({error.filename})"
        problems.append(Problem(str(path), 1, 1, "", message, hint))
        return []
    if not files:
        hint = "manifests end in .yaml or .yml"
        problems.append(Problem(str(path), 1, 1, "", "the folder holds no manifests", hint))
    return files


def _decode(name: str, content: bytes, texts: list[tuple[str, str]], problems: list[Problem]) -> None:
    if len(content) > MAX_BYTES:
        problems.append(Problem(name, 1, 1, "", "the file is larger than 1 MiB", "split it"))
        return
    try:
        texts.append((name, content.decode("utf-8")))
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8", "replace")
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        byte = content[error.start]
        problems.append(
            Problem(name, line, column, "", f"byte 0x{byte:02x} is not UTF-8", "save the file as UTF-8 text")
        )


# ── spellings of engine flags ─────────────────────────────────────────────────────────────────────────────

ALIEN_NAMES = {
    "model": "spec.source",
    "model_path": "spec.source",
    "tokenizer_path": "spec.tokenizer.source",
    "chat_template": "spec.tokenizer.chatTemplateFile",
    "hf_token": "spec.sourceAuth",
    "served_model_name": "spec.servedModelNames",
    "max_model_len": "spec.engine.maxModelLen",
    "context_length": "spec.engine.maxModelLen",
    "max_seq_len": "spec.engine.maxModelLen",
    "ctx_size": "spec.engine.maxModelLen",
    "n_ctx": "spec.engine.maxModelLen",
    "gpu_memory_utilization": "spec.engine.memory",
    "mem_fraction_static": "spec.engine.memory",
    "kv_cache_dtype": "spec.engine.kvCache.dtype",
    "kv_cache_memory_bytes": "spec.engine.kvCache.size",
    "block_size": "spec.engine.kvCache.blockSize",
    "page_size": "spec.engine.kvCache.blockSize",
    "swap_space": "spec.engine.kvCache.swapSpace",
    "enforce_eager": "spec.engine.enforceEager",
    "disable_cuda_graph": "spec.engine.enforceEager",
    "random_seed": "spec.engine.seed",
    "tensor_parallel_size": "spec.parallelism.tensor",
    "tp_size": "spec.parallelism.tensor",
    "tp": "spec.parallelism.tensor",
    "pipeline_parallel_size": "spec.parallelism.pipeline",
    "pp_size": "spec.parallelism.pipeline",
    "data_parallel_size": "spec.parallelism.data",
    "dp_size": "spec.parallelism.data",
    "enable_expert_parallel": "spec.parallelism.expert",
    "max_num_seqs": "spec.batching.maxNumSeqs",
    "max_running_requests": "spec.batching.maxNumSeqs",
    "max_num_batched_tokens": "spec.batching.maxNumBatchedTokens",
    "chunked_prefill_size": "spec.batching.maxNumBatchedTokens",
    "enable_chunked_prefill": "spec.batching.chunkedPrefill",
    "enable_prefix_caching": "spec.batching.prefixCaching",
    "scheduling_policy": "spec.batching.policy",
    "trust_remote_code": "spec.trustRemoteCode",
    "speculative_config": "spec.speculative",
    "num_speculative_tokens": "spec.speculative.numTokens",
    "enable_lora": "spec.lora",
    "max_lora_rank": "spec.lora.maxRank",
    "max_loras": "spec.lora.maxLoaded",
    "lora_modules": "spec.lora.adapters",
    "tool_call_parser": "spec.parsers.tools",
    "reasoning_parser": "spec.parsers.reasoning",
    "replica_count": "spec.replicas",
    "host": "spec.bind of kind Gateway",
    "port": "spec.port of kind Gateway",
    "uvicorn_host": "spec.bind of kind Gateway",
    "api_key": "spec.keys of kind AccessPolicy",
}
"""Flags of vLLM, SGLang and llama.cpp, dashes as underscores -> the field here."""

__all__ = [
    "ALIEN_NAMES",
    "KINDS",
    "Located",
    "Manifest",
    "ManifestInvalid",
    "Problem",
    "UnknownField",
    "explain",
    "intent_hash",
    "json_schema",
    "load",
    "load_contents",
    "load_paths",
    "parse_intent",
    "read_paths",
]
