"""The envelope of every resource: version, kind, metadata, keys, and how a field is declared.

Fields are camelCase in YAML and snake_case in Python. Every field carries, inside the JSON Schema itself, three
statements beside its type: a description, the update class of a change to it (`x-quire-update`), and what
this version does with it (`x-quire-support`: `honoured`, or the reason why a declared value is refused).
`x-quire-honoured-values` lists the values that are taken although the field as a whole is refused: a declared
value that equals what this version does anyway is no lie. `platform explain`, the JSON Schema, the refusals
and the hashes all read these same statements.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema
from pydantic.alias_generators import to_camel
from pydantic.fields import FieldInfo

API_VERSION = "quire.dev/v1alpha1"
HONOURED = "honoured"
UPDATE_CLASSES = ("hot", "scale", "rolling", "immutable")
Update = Literal["hot", "scale", "rolling", "immutable"]


class Invalid(ValueError):
    """A value breaks a rule that its type alone cannot state; `hint` says what would do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class Strict(BaseModel):
    """Base of every shape in a manifest: no unknown field, no coercion, no change after parsing."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, alias_generator=to_camel, use_attribute_docstrings=False
    )


def declared(
    description: str,
    default: Any = ...,
    *,
    update: Update,
    refused: str | None = None,
    honours: Iterable[Any] = (),
    **constraints: Any,
) -> Any:
    """A leaf field. `refused` is why this version cannot honour it, `honours` the values it takes all the same.

    Without `default` the field is required. `constraints` are Pydantic's (`ge`, `le`, `min_length`, …).
    """
    extra: dict[str, Any] = {"x-quire-update": update, "x-quire-support": refused or HONOURED}
    if refused is not None:
        extra["x-quire-honoured-values"] = list(honours)
    return Field(default, description=description, json_schema_extra=extra, **constraints)


def section(kind: type[Strict], description: str, *, refused: str | None = None, optional: bool = False) -> Any:
    """A field that groups others. Its update class is the strongest among its children's.

    An `optional` section is absent (None) unless declared; any other stands with its children's defaults.
    """
    classes = {update_tag(field) for field in kind.model_fields.values()}
    extra: dict[str, Any] = {
        "x-quire-update": max(classes, key=UPDATE_CLASSES.index),
        "x-quire-support": refused or HONOURED,
    }
    return Field(None if optional else kind(), description=description, json_schema_extra=extra)


def update_tag(field: FieldInfo) -> Update:
    """The update class stated on a field."""
    tag: Update = _extra(field)["x-quire-update"]
    return tag


def support(field: FieldInfo) -> str:
    """`honoured`, or the reason why this version refuses the field."""
    reason: str = _extra(field)["x-quire-support"]
    return reason


def honoured_values(field: FieldInfo) -> list[Any]:
    """The values that a refused field may be declared with all the same."""
    values: list[Any] = _extra(field).get("x-quire-honoured-values", [])
    return values


def _extra(field: FieldInfo) -> dict[str, Any]:
    extra = field.json_schema_extra
    if not isinstance(extra, dict):
        raise TypeError(f"a field is declared without its update class and support: {field!r}")
    return extra


def _no_line_break(text: str) -> str:
    if any(c in text for c in "\n\r\0"):
        raise Invalid("should be one line", "remove the line breaks")
    return text


Text = Annotated[
    str,
    StringConstraints(max_length=4096),
    AfterValidator(_no_line_break),
    WithJsonSchema({"type": ["string", "number", "boolean"]}),
]
"""Free text of one line. Written bare in YAML, `1234567` and `true` are taken as the text they look like."""

NAME_PATTERN = r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
"""Name of an object: lower-case letters, digits, `-` and `.`, at most 63, starting and ending with one of the
first two."""


class Metadata(Strict):
    """Who the object is, and notes on it."""

    name: Name = declared(
        "Name of the object, unique among objects of its kind. Lower-case letters, digits, '-' and '.', at most "
        "63 characters. It is also the model name in requests unless servedModelNames says otherwise.",
        update="immutable",
    )
    labels: dict[str, Text] = declared(
        "Key-value pairs to select objects by. They change nothing about how the object runs.",
        {},
        update="hot",
        max_length=64,
    )
    annotations: dict[str, Text] = declared(
        "Key-value notes for people and tools, such as quire.dev/change-cause. They change nothing about how the "
        "object runs.",
        {},
        update="hot",
        max_length=64,
    )


class Resource(Strict):
    """What every kind has: the envelope without its spec."""

    api_version: Literal["quire.dev/v1alpha1"] = declared(
        "Version of the schema this document is written in.", update="immutable"
    )
    kind: str = declared("Which kind of object this is.", update="immutable")
    metadata: Metadata = Field(
        ...,
        description="Name, labels and annotations.",
        json_schema_extra={"x-quire-update": "immutable", "x-quire-support": HONOURED},
    )

    def intent(self) -> dict[str, Any]:
        """The document as it was submitted: plain camelCase values, no defaults."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """Identity of an object: lower-case kind and name. `str()` gives `model/quickstart`."""

    kind: str
    name: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", self.kind.lower())

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"

    @classmethod
    def of(cls, resource: Resource) -> Key:
        """The key of a resource."""
        return cls(resource.kind, resource.metadata.name)

    @classmethod
    def parse(cls, text: str) -> Key:
        """`model/quickstart` -> Key. Raises ValueError when there is no kind or no name."""
        kind, slash, name = text.partition("/")
        if not (kind and slash and name):
            raise Invalid(f"{text!r} is not an object", "write it as kind/name, for example model/quickstart")
        return cls(kind, name)
