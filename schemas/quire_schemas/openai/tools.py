"""Functions that a model may call: what a chat request says of them, and the calls in messages and answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Protocol, TypeVar, get_args

import msgspec
from pydantic import Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from quire_schemas.openai.answer import Answer
from quire_schemas.openai.request import Shape
from quire_schemas.openai.structured import Schema

MAX_TOOLS: Final = 128
FunctionName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]
NO_PARAMETERS: Final[Mapping[str, Any]] = {"type": "object", "properties": {}}
"""The arguments of a function that declares none."""


class Named(Protocol):
    """A tool of any API."""

    @property
    def called(self) -> str:
        """The name of its function."""
        ...


class Function(Shape):
    """A function that the model may call. `parameters` is a JSON Schema of its arguments, an object."""

    name: FunctionName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None
    """Whether calls are held to the schema by a grammar."""


class Tool(Shape):
    """A tool of a request; functions are the only kind."""

    type: Literal["function"]
    function: Function

    @property
    def called(self) -> str:
        return self.function.name

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates know it."""
        shown: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            shown["description"] = self.function.description
        shown["parameters"] = dict(self.function.parameters or NO_PARAMETERS)
        return {"type": "function", "function": shown}


class FunctionRef(Shape):
    """A function by its name."""

    name: FunctionName


class NamedTool(Shape):
    """The tool that is to be called, or one of those that may be."""

    type: Literal["function"]
    function: FunctionRef


class AllowedTools(Shape):
    """Those of the tools that may be called now, and whether one must be."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedChoice(Shape):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolMode = Literal["none", "auto", "required"]


def choice_kind(value: object) -> str | None:
    """Which kind of choice it is: a word, or an object of a type. They are no names of fields."""
    if isinstance(value, str):
        return "a mode" if value in get_args(ToolMode) else None
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return {"function": "a function", "allowed_tools": "some tools"}.get(kind) if isinstance(kind, str) else None


ToolChoice = Annotated[
    Annotated[ToolMode, Tag("a mode")]
    | Annotated[NamedTool, Tag("a function")]
    | Annotated[AllowedChoice, Tag("some tools")],
    Discriminator(
        choice_kind,
        custom_error_type="choice",
        custom_error_message="must be none, auto, required, a function ('type' and 'function' with its 'name') "
        "or allowed_tools",
    ),
]


T = TypeVar("T", bound=Named)


def check_tools(tools: list[T]) -> list[T]:
    """For the validation of a request's tools: each has a name of its own."""
    names = [tool.called for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise PydanticCustomError("tool", f"must not have two functions named {twice}")
    return tools


class FunctionCall(Shape):
    """The function in a tool call of an earlier turn."""

    name: str
    arguments: str
    parsed_arguments: Any = None
    """Without effect: what a client has made of them."""

    @property
    def parsed(self) -> dict[str, Any] | str:
        """The arguments as templates expect them, an object; what a model wrote that is none stays a text."""
        try:
            return msgspec.json.decode(self.arguments or "{}", type=dict[str, Any])
        except (ValueError, RecursionError):
            return self.arguments


class ToolCall(Shape):
    """A tool call of an earlier turn, for the template to show."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class CalledFunction(Answer):
    """The function of a call in an answer; `arguments` are JSON as the model wrote it."""

    name: str
    arguments: str


class AnsweredCall(Answer):
    """A call in an answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class CalledFunctionDelta(Answer):
    """A piece of a call's function: the name at first, then its arguments."""

    name: str | None = None
    arguments: str | None = None


class CallDelta(Answer):
    """A piece of the call at `index` of an answer; `id`, `type` and the name come once."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunctionDelta
