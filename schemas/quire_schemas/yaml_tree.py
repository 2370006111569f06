"""YAML text -> trees of nodes that know their line and column. Nothing is interpreted here.

libyaml's parser (through PyYAML) gives events; this module builds the trees itself, with a stack of its own
rather than recursion, so that hostile nesting meets a limit and not the interpreter's stack. A scalar keeps
its text and whether it was written bare or quoted; what the text means is decided by the field it is meant
for (`manifest.py`), not by its looks: `revision: 1234567` stays the text the user typed, and `no` is no
boolean. Only names must look like names: a bare `true` or `1.5` is refused there, and quoted it is taken.

Refused with a position: tags, tabs in indentation, characters that YAML forbids, aliases to nothing or to
what contains them, more than `MAX_DEPTH` levels, `MAX_NODES` nodes (each alias counts as all it stands for, so
a bomb of nested aliases is counted, never expanded), `MAX_BYTES` bytes or `MAX_DOCUMENTS` documents, and
whatever libyaml itself cannot read. After a mistake that libyaml cannot get past, the documents before it are
still given.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_NODES = 100_000
MAX_DOCUMENTS = 256

_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")


@dataclass(slots=True)
class Node:
    """One node. `line` and `column` count from 1. `size` is the number of nodes it expands to, itself included.

    A scalar has `text` and `bare` (written without quotes); a mapping has `entries`, a list `items`.
    """

    kind: Literal["scalar", "mapping", "list"]
    line: int
    column: int
    text: str = ""
    bare: bool = False
    entries: list[tuple[Node, Node]] = field(default_factory=list)
    items: list[Node] = field(default_factory=list)
    size: int = 1
    height: int = 1

    @property
    def is_null(self) -> bool:
        """Nothing at all, `~` or `null`, written bare."""
        return self.kind == "scalar" and self.bare and self.text in ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True, slots=True)
class Flaw:
    """What is wrong with the text as YAML, and where."""

    line: int
    column: int
    message: str
    hint: str = ""


@dataclass(slots=True)
class _Frame:
    node: Node
    anchor: str | None
    key: Node | None = None


def compose(text: str) -> tuple[list[Node], list[Flaw]]:
    """The documents of a YAML text, empty ones left out, and its flaws in order of position."""
    text = text.removeprefix("\ufeff")
    flaw = _unreadable(text)
    if flaw is not None:
        return [], [flaw]
    composer = _Composer(text)
    composer.run()
    return composer.documents, sorted(composer.flaws, key=lambda f: (f.line, f.column))


def bare_value(text: str) -> str | int | float | bool | None:
    """A bare scalar by YAML 1.2's core schema, for fields that are not text."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE"):
        return True
    if text in ("false", "False", "FALSE"):
        return False
    if len(text) <= 64:
        if re.fullmatch(r"[-+]?[0-9]+", text):
            return int(text)
        if re.fullmatch(r"0o[0-7]+", text):
            return int(text[2:], 8)
        if re.fullmatch(r"0x[0-9a-fA-F]+", text):
            return int(text[2:], 16)
        if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
            return float(text)
        if re.fullmatch(r"[-+]?\.(inf|Inf|INF)", text):
            return float(text.replace(".", "", 1))
        if text in (".nan", ".NaN", ".NAN"):
            return float("nan")
    return text


class _Composer:
    """Builds the trees of one text; `documents` and `flaws` are what comes of it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.documents: list[Node] = []
        self.flaws: list[Flaw] = []
        self._stack: list[_Frame] = []
        self._anchors: dict[str, Node] = {}
        self._nodes = 0
        self._started = 0
        self._multiline: list[tuple[int, int]] = []

    def run(self) -> None:
        try:
            for event in yaml.parse(self.text, Loader=yaml.CSafeLoader):
                if not self._take(event):
                    return
        except yaml.MarkedYAMLError as error:
            self.flaws.append(_syntax_flaw(error, self.text))
            return
        except yaml.YAMLError as error:
            self.flaws.append(Flaw(1, 1, f"not YAML: {_one_line(str(error))}"))
            return
        self._find_tabs()

    def _take(self, event: Any) -> bool:
        """Work in one event. False: go no further."""
        if isinstance(event, yaml.DocumentStartEvent):
            return self._start_document(event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            return self._open(event)
        if isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            self._close(self._stack.pop())
        return True

    def _start_document(self, event: Any) -> bool:
        self._anchors = {}
        line, column = _place(event)
        self._started += 1
        if self._started > MAX_DOCUMENTS:
            message = f"more than {MAX_DOCUMENTS} documents in one file"
            self.flaws.append(Flaw(line, column, message, "split the file"))
            return False
        if event.version is not None and tuple(event.version) != (1, 2):
            self.flaws.append(
                Flaw(line, column, "manifests are YAML 1.2", "remove the %YAML line, or write %YAML 1.2")
            )
        return True

    def _alias(self, event: Any) -> bool:
        line, column = _place(event)
        target = self._anchors.get(event.anchor)
        if target is None:
            message = f"alias '*{event.anchor}' stands for nothing that is complete at this point"
            self.flaws.append(Flaw(line, column, message, "define the anchor before the alias, and not around it"))
            return False
        return self._add(target, line, column)

    def _scalar(self, event: Any) -> bool:
        line, column = _place(event)
        node = Node("scalar", line, column, text=event.value, bare=not event.style)
        if event.end_mark.line > event.start_mark.line:
            self._multiline.append((event.start_mark.line, event.end_mark.line))
        self._refuse_tag(event)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return self._add(node, line, column)

    def _open(self, event: Any) -> bool:
        line, column = _place(event)
        self._refuse_tag(event)
        if len(self._stack) >= MAX_DEPTH:
            self.flaws.append(_too_deep(line, column))
            return False
        if not self._count(1, line, column):
            return False
        kind: Literal["mapping", "list"] = "mapping" if isinstance(event, yaml.MappingStartEvent) else "list"
        self._stack.append(_Frame(Node(kind, line, column), event.anchor))
        return True

    def _close(self, frame: _Frame) -> None:
        if frame.anchor is not None:
            self._anchors[frame.anchor] = frame.node
        self._attach(frame.node)

    def _add(self, node: Node, line: int, column: int) -> bool:
        """Count and attach a node that is complete: a scalar, or what an alias stands for."""
        if len(self._stack) + node.height - 1 > MAX_DEPTH:
            self.flaws.append(_too_deep(line, column))
            return False
        if not self._count(node.size, line, column):
            return False
        self._attach(node)
        return True

    def _count(self, nodes: int, line: int, column: int) -> bool:
        self._nodes += nodes
        if self._nodes <= MAX_NODES:
            return True
        message = f"more than {MAX_NODES:,} values in one file, aliases counted as what they stand for"
        self.flaws.append(Flaw(line, column, message, "split the file, and spell out what aliases repeat"))
        return False

    def _attach(self, node: Node) -> None:
        if not self._stack:
            if not node.is_null:
                self.documents.append(node)
            return
        frame = self._stack[-1]
        parent = frame.node
        parent.size += node.size
        parent.height = max(parent.height, node.height + 1)
        if parent.kind == "list":
            parent.items.append(node)
        elif frame.key is None:
            frame.key = node
        else:
            parent.entries.append((frame.key, node))
            frame.key = None

    def _refuse_tag(self, event: Any) -> None:
        if event.tag is not None:
            line, column = _place(event)
            self.flaws.append(
                Flaw(
                    line,
                    column,
                    f"tags such as {_one_line(event.tag)!r} are not taken",
                    "remove the tag; quote a value to make it text",
                )
            )

    def _find_tabs(self) -> None:
        """Tabs that libyaml lets pass in indentation, outside of text that spans lines."""
        if "\t" not in self.text:
            return
        inside = {n for first, last in self._multiline for n in range(first + 1, last + 1)}
        for number, line in enumerate(_LINE_BREAK.split(self.text)):
            indent = line[: len(line) - len(line.lstrip(" \t"))]
            if "\t" in indent and number not in inside and line.strip() and not line.lstrip().startswith("#"):
                self.flaws.append(_tab(number + 1, indent.index("\t") + 1))


def _unreadable(text: str) -> Flaw | None:
    """Too large, or with a character that no YAML file may hold."""
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        return Flaw(1, 1, "the file is larger than 1 MiB", "split it")
    found = _FORBIDDEN.search(text)
    if found is None:
        return None
    before = _LINE_BREAK.split(text[: found.start()])
    message = f"character U+{ord(found.group()):04X} is not allowed in YAML"
    return Flaw(len(before), len(before[-1]) + 1, message, "save the file as plain UTF-8 text")


def _syntax_flaw(error: yaml.MarkedYAMLError, text: str) -> Flaw:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
    lines = _LINE_BREAK.split(text)
    if line > len(lines):  # libyaml puts what is missing at the end of a text behind its last line
        line, column = len(lines), len(lines[-1]) + 1
    source = lines[line - 1]
    indent = source[: len(source) - len(source.lstrip(" \t"))]
    if "\t" in indent:
        return _tab(line, indent.index("\t") + 1)
    message = _one_line(error.problem or str(error))
    hint = "values that begin with one of @ ` % & * ! | > [ ] { } or contain ': ' need quotes"
    if error.context and error.context_mark is not None and error.context_mark.line + 1 != line:
        message += f" ({_one_line(error.context)} that starts at line {error.context_mark.line + 1})"
        hint = "check the indentation, and that every quote and bracket is closed"
    return Flaw(line, column, f"not YAML: {message}", hint)


def _tab(line: int, column: int) -> Flaw:
    return Flaw(line, column, "tab in the indentation", "YAML is indented with spaces")


def _too_deep(line: int, column: int) -> Flaw:
    return Flaw(line, column, f"nested more than {MAX_DEPTH} levels deep", "no manifest needs that")


def _place(event: Any) -> tuple[int, int]:
    return event.start_mark.line + 1, event.start_mark.column + 1


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
