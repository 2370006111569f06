"""What a field of the schema is, read off its annotation once: section, list, map or scalar.

The YAML reader resolves scalars by it, `explain` and the refusals walk it, diffs and hashes compare by it.
Pydantic stays the judge of values; this is only the map of the fields.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from quire_schemas.quantities import Unit
from quire_schemas.resource import Strict

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """`section` is set for a group of fields, `item` for a list and for the values of a map.

    A scalar has the Python types it may take, the values if they are enumerated, and its unit if it has one.
    """

    kind: Literal["section", "list", "map", "scalar"]
    section: type[Strict] | None = None
    item: Shape | None = None
    types: frozenset[type] = frozenset()
    values: tuple[Any, ...] = ()
    unit: Unit | None = None

    @property
    def word(self) -> str:
        """The type in one word, for people."""
        if self.kind == "section":
            return "object"
        if self.kind == "list" and self.item is not None:
            return f"list of {self.item.word}"
        if self.kind == "map":
            return "map of text"
        if self.values and self.types <= {str}:
            return " | ".join(str(v) for v in self.values) if self.unit is None else f"auto | {self.unit.name}"
        if self.unit is not None:
            return self.unit.name
        if self.types == {int, str}:
            return "auto | int"
        if self.types == {bool, str}:
            return "auto | true | false"
        return {str: "text", int: "int", bool: "bool"}[next(iter(self.types))]


@dataclass(frozen=True, slots=True)
class SchemaField:
    """One field as YAML sees it: its camelCase name, Pydantic's record of it, and its shape."""

    name: str
    info: FieldInfo
    shape: Shape


@cache
def fields_of(section: type[Strict]) -> dict[str, SchemaField]:
    """The fields of a section by their YAML names, in order of declaration."""
    found = {}
    for python_name, info in section.model_fields.items():
        name = info.alias or python_name
        found[name] = SchemaField(name, info, _shape(info.annotation, tuple(info.metadata)))
    return found


def default_of(field: SchemaField) -> Any:
    """The default as a plain YAML value (a section gives a dict); None where there is none."""
    default = field.info.default
    if field.info.is_required():
        return None
    if isinstance(default, Strict):
        return default.model_dump(mode="json", by_alias=True)
    return list(default) if isinstance(default, tuple) else default


def walk(section: type[Strict], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], SchemaField]]:
    """Every field below a section, parents before children; items of lists count as children of the list."""
    for name, field in fields_of(section).items():
        path = (*prefix, name)
        yield path, field
        inner = field.shape.item if field.shape.kind == "list" and field.shape.item else field.shape
        if inner.section is not None:
            yield from walk(inner.section, path)


def dotted(path: Path) -> str:
    """`("spec", "env", 0, "name")` -> `spec.env[0].name`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _shape(annotation: Any, metadata: tuple[Any, ...] = ()) -> Shape:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _shape(inner, (*metadata, *more))
    if origin in (Union, types.UnionType):
        members = [_shape(a, metadata) for a in get_args(annotation) if a is not type(None)]
        return members[0] if len(members) == 1 else _union(members)
    if origin is Literal:
        values = get_args(annotation)
        return Shape("scalar", types=frozenset(type(v) for v in values), values=values)
    if origin is tuple:
        return Shape("list", item=_shape(get_args(annotation)[0]))
    if origin is dict:
        return Shape("map", item=_shape(get_args(annotation)[1]))
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return Shape("section", section=annotation)
    if annotation in (str, int, bool):
        unit = next((m for m in metadata if isinstance(m, Unit)), None)
        return Shape("scalar", types=frozenset({annotation}), unit=unit)
    raise TypeError(f"a manifest field cannot be of type {annotation!r}")


def _union(members: list[Shape]) -> Shape:
    if any(m.kind != "scalar" for m in members):
        raise TypeError("only scalars can be one of several types in a manifest")
    return Shape(
        "scalar",
        types=frozenset().union(*(m.types for m in members)),
        values=tuple(v for m in members for v in m.values),
        unit=next((m.unit for m in members if m.unit is not None), None),
    )
