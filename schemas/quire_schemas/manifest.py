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
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from quire_schemas.explain import UnknownField, explain, json_schema
from quire_schemas.fields import Path, SchemaField, Shape, dotted, fields_of, walk
from quire_schemas.keys import MIN_LENGTH
from quire_schemas.kinds import KINDS, READ_ONLY_KINDS
from quire_schemas.manifest_files import decode, read_files
from quire_schemas.model import Model
from quire_schemas.problem_words import (
    ALIEN_NAMES,
    article,
    explained,
    field_at,
    hides,
    in_words,
    key_hint,
    own_hint,
    plain_word,
    quoted,
    structure_hint,
    value_hint,
)
from quire_schemas.problems import ManifestInvalid, Problem
from quire_schemas.resource import API_VERSION, Key, Resource, Strict
from quire_schemas.rules import Facts, check, claims
from quire_schemas.yaml_tree import Node, bare_value, compose

MAX_PROBLEMS = 100


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
    texts, unread = read_files(paths)
    manifest = load(texts)
    manifest.problems = [*unread, *manifest.problems]
    return manifest


def load_contents(contents: Sequence[tuple[str, bytes]]) -> Manifest:
    """As `load`, of files' bytes: what is too large or not UTF-8 is a problem beside those of the others."""
    texts: list[tuple[str, str]] = []
    unread: list[Problem] = []
    for name, content in contents:
        decode(name, content, texts, unread)
    manifest = load(texts)
    manifest.problems = [*unread, *manifest.problems]
    return manifest


def read_paths(paths: Sequence[FilePath | str]) -> list[tuple[str, str]]:
    """(name, text) of each file; `-` is standard input, a folder all *.yaml and *.yml below it, sorted; what
    is hidden (`.git`, `.venv`) is left out.

    Raises `ManifestInvalid` with a problem for each one that is missing, unreadable, larger than 1 MiB or not
    UTF-8, and for a folder without manifests.
    """
    texts, problems = read_files(paths)
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
                Problem("intent", 1, 1, dotted(e["loc"]), in_words(e, hidden=hides(kind, e["loc"])), own_hint(e))
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
                    f"{quoted(version)} is newer than this version of Quire ({_product()}), "
                    f"which reads {API_VERSION}",
                    f"upgrade Quire, or write the document as {API_VERSION}",
                )
            else:
                hint = f"this version reads {API_VERSION}"
                self.report(("apiVersion",), f"{quoted(version)} is not known", hint)
        if kind is None:
            self.report(("kind",), "is required", f"one of {', '.join(KINDS)}")
        elif kind.kind != "scalar" or kind.text not in KINDS:
            self.report(("kind",), f"{quoted(kind)} is not a kind of resource", self._kind_hint(kind.text))
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
            hint = own_hint(error)
            shape = field_at(kind, path)
            hidden = hides(kind, path)
            if hidden:
                hint = hint or key_hint(path, error["input"])
                error["input"] = ""
            if not hint:
                hint = value_hint(error, shape) or f"see: platform explain {explained(kind, path)}"
            self.report(path, in_words(error, hidden=hidden), hint)


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
                if hides(self._kind, path):
                    hint = key_hint(path, name) or hint
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
            hidden = node.kind == "scalar" and not node.is_null and hides(self._kind, path)
            shown = "a single value" if hidden else quoted(node)
            hint = (key_hint(path, node.text) if hidden else "") or structure_hint(shape)
            self._document.report(path, f"should be {article(shape)}, not {shown}", hint)
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
        return path if hides(self._kind, path) and len(name) >= MIN_LENGTH else (*path, name)

    def _unknown_hint(self, name: str, path: Path, fields: Mapping[str, SchemaField]) -> str:
        if len(self._document.problems) >= MAX_PROBLEMS:
            return ""
        if not path and name == "status":
            return "status is written by the platform; remove it"
        word = plain_word(name)
        alien = ALIEN_NAMES.get(name.lstrip("-").replace("-", "_").lower())
        sibling = next((f for f in fields if plain_word(f) == word), None)
        if alien is not None and self._kind is Model:
            return f"that is the engine flag spelling; here it is {alien}"
        if sibling is not None:
            return f"did you mean '{sibling}'?"
        elsewhere = [p for p, f in walk(self._kind) if plain_word(f.name) == word]
        if elsewhere:
            return f"did you mean {dotted(elsewhere[0])}?"
        near = difflib.get_close_matches(name.lower(), [f.lower() for f in fields], 1, 0.6)
        if near:
            return f"did you mean '{next(f for f in fields if f.lower() == near[0])}'?"
        if self._document.newer:
            return f"a newer version may have it; {API_VERSION} does not"
        listed = ", ".join(fields) if len(fields) <= 12 else f"see: platform explain {explained(self._kind, path)}"
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


def _known_path(loc: tuple[int | str, ...], places: Mapping[Path, _Place], *, missing: bool) -> Path:
    """A Pydantic location without the parts that name members of unions and validators."""
    path: Path = ()
    for part in loc:
        if (*path, part) in places:
            path = (*path, part)
    return (*path, loc[-1]) if missing and (not path or path[-1] != loc[-1]) else path


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
