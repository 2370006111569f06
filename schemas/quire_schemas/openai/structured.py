"""Structured output. What a request says becomes one `Structured`; whether it compiles, the engine knows."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Final, Literal

import msgspec
from pydantic import AfterValidator, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from quire_schemas.openai.body import depth_and_keys
from quire_schemas.openai.request import Shape
from quire_schemas.wire import MAX_STRUCTURED, Structured

MAX_SCHEMA_DEPTH: Final = 64
"""Levels of a schema."""
MAX_CHOICE_TEXTS: Final = 4096
MAX_STRUCTURES: Final = 128
MAX_TRIGGERS: Final = 128

_SPACE: Final = r"(?:[ \n\r\t]|\\[nrt]|\\x(?:20|0[9AaDd]))"
_SPACES: Final = re.compile(rf"(?:{_SPACE}|\[{_SPACE}+\]|\{{\d{{1,4}}(?:,\d{{0,4}})?\}}|[*+?|()])*")


def _schema(value: object) -> dict[str, Any]:
    """A JSON Schema, given as an object or as the text of one."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (ValueError, RecursionError) as error:
            raise PydanticCustomError("schema", "must be a JSON Schema: an object, or the text of one") from error
    if not isinstance(value, dict):
        raise PydanticCustomError("schema", "must be a JSON Schema: an object, or the text of one")
    if depth_and_keys(value)[0] > MAX_SCHEMA_DEPTH:
        raise PydanticCustomError("schema", f"must not be nested deeper than {MAX_SCHEMA_DEPTH} levels")
    _written(value)
    return value


def _written(value: object) -> str:
    """JSON of no more bytes than a constraint may have."""
    # what is far too long is found so at a twentieth of the time, all of which others wait
    size = len(msgspec.json.encode(value))
    if size > 2 * MAX_STRUCTURED:
        raise _too_long(size)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise PydanticCustomError("schema", "must have no NaN and no infinite number") from error
    return _short(text)


def _short(text: str) -> str:
    size = len(text.encode())
    if size > MAX_STRUCTURED:
        raise _too_long(size)
    return text


def _too_long(size: int) -> PydanticCustomError:
    return PydanticCustomError("schema", f"must not have more than {MAX_STRUCTURED} bytes, not {size}")


def _spaces(value: str) -> str:
    if len(value) > 256 or not _SPACES.fullmatch(value):
        raise PydanticCustomError("schema", "must be a regular expression of blanks, \\n, \\r and \\t alone")
    return value


Schema = Annotated[dict[str, Any], PlainValidator(_schema, json_schema_input_type=dict[str, Any] | str)]
ConstraintText = Annotated[str, AfterValidator(_short)]


class TagStructure(Shape):
    """A structure in free text: its opening, JSON by `schema`, its end."""

    begin: Annotated[str, Field(min_length=1, max_length=1024)]
    schema_: Annotated[Schema, Field(alias="schema")]
    end: Annotated[str, Field(max_length=1024)]


class StructuralTag(Shape):
    """Free text in which each of `triggers` begins one of the structures whose `begin` starts with it."""

    type: Literal["structural_tag"] | None = None
    structures: Annotated[list[TagStructure], Field(min_length=1, max_length=MAX_STRUCTURES)]
    triggers: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]], Field(min_length=1, max_length=MAX_TRIGGERS)
    ]

    @property
    def text(self) -> str:
        """As a `Structured` has it."""
        structures = [{"begin": s.begin, "schema": s.schema_, "end": s.end} for s in self.structures]
        return _written({"structures": structures, "triggers": self.triggers})


def _tag(value: object) -> StructuralTag:
    """A structural tag, given as an object or as the text of one."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (ValueError, RecursionError) as error:
            raise PydanticCustomError("schema", "must be a structural tag: an object, or its text") from error
    tag = StructuralTag.model_validate(value)
    _short(tag.text)
    return tag


class JsonSchemaFormat(Shape):
    """The schema of `response_format`. It is kept to the letter, with `strict` or without."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Shape):
    """What the answer is to be, in OpenAI's words."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: list[TagStructure] | None = None
    triggers: list[str] | None = None

    @model_validator(mode="after")
    def _fields_fit_the_type(self) -> ResponseFormat:
        wanted = {"json_schema": ("json_schema",), "structural_tag": ("structures", "triggers")}.get(self.type, ())
        for name in ("json_schema", "structures", "triggers"):
            if (getattr(self, name) is not None) != (name in wanted):
                word = "is required with" if name in wanted else "has no place with"
                raise PydanticCustomError(name, f"{word} type {self.type}")
        if self.type == "structural_tag":
            _tag(
                {
                    "structures": [s.model_dump(by_alias=True) for s in self.structures or ()],
                    "triggers": self.triggers,
                }
            )
        return self

    @property
    def constraint(self) -> Constraint | None:
        if self.type == "json_object":
            return Constraint("response_format", Structured("json_schema", _ANY_OBJECT))
        if self.json_schema is not None:
            text = _written(self.json_schema.schema_)
            return Constraint("response_format.json_schema.schema", Structured("json_schema", text))
        if self.structures is not None and self.triggers is not None:
            tag = StructuralTag(structures=self.structures, triggers=self.triggers)
            return Constraint("response_format", Structured("structural_tag", tag.text))
        return None


_CONSTRAINTS: Final = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_ANY_OBJECT: Final = '{"type":"object"}'


class StructuredOutputs(Shape):
    """What the text is to be: exactly one constraint, and for JSON what may stand between its signs."""

    json_: Annotated[Schema | None, Field(alias="json")] = None
    """A JSON Schema."""
    regex: ConstraintText | None = None
    """A regular expression for the whole text; without look-around and back-references."""
    choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICE_TEXTS)] | None = None
    """The text is one of these."""
    grammar: ConstraintText | None = None
    """A grammar in Lark's notation."""
    json_object: bool | None = None
    """Any JSON object."""
    structural_tag: (
        Annotated[StructuralTag, PlainValidator(_tag, json_schema_input_type=StructuralTag | str)] | None
    ) = None
    """Free text with structures in it."""
    disable_any_whitespace: bool | None = None
    """No blank and no line end between the signs of JSON."""
    whitespace_pattern: Annotated[str, AfterValidator(_spaces)] | None = None
    """A regular expression for what may stand between two of them."""

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        given = [name for name in _CONSTRAINTS if self._value(name) not in (None, False)]
        if len(given) != 1:
            what = "none" if not given else " and ".join(given)
            raise PydanticCustomError(
                "one_constraint", f"must have exactly one of {', '.join(_CONSTRAINTS)}; it has {what}"
            )
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise PydanticCustomError("whitespace_pattern", "and disable_any_whitespace exclude each other")
        spaces = self.disable_any_whitespace or self.whitespace_pattern is not None
        if spaces and given[0] in ("regex", "choice", "grammar"):
            name = "disable_any_whitespace" if self.disable_any_whitespace else "whitespace_pattern"
            raise PydanticCustomError(name, f"is for JSON, and has no place with {given[0]}")
        if self.choice is not None:
            _written(self.choice)
        return self

    def _value(self, name: str) -> object:
        return self.json_ if name == "json" else getattr(self, name)

    @property
    def constraint(self) -> Constraint:
        name = next(name for name in _CONSTRAINTS if self._value(name) not in (None, False))
        spaces = "" if self.disable_any_whitespace else self.whitespace_pattern
        value = self._value(name)
        match name:
            case "json":
                structured = Structured("json_schema", _written(value), spaces)
            case "json_object":
                structured = Structured("json_schema", _ANY_OBJECT, spaces)
            case "choice":
                structured = Structured("choice", _written(value))
            case "structural_tag" if isinstance(value, StructuralTag):
                structured = Structured("structural_tag", value.text, spaces)
            case "regex":
                structured = Structured("regex", str(value))
            case _:
                structured = Structured("grammar", str(value))
        return Constraint(f"structured_outputs.{name}", structured)


class Constraint(msgspec.Struct, frozen=True):
    """What an answer is held to, and the field of the request that says so."""

    field: str
    structured: Structured
