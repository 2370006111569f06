"""From the bytes of a body to a request, or to a `BadRequest` that names the field.

A field is one of the request's own, or refused for what it asks, or on the list of those without effect (which are
held to their values all the same: one that asks for something is refused by name); any other is taken for a slip.
A body that is nested too deep, has a key twice or is not Unicode is refused before its fields are looked at. What
Pydantic finds wrong with a field is told in our words.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeVar

import msgspec
from pydantic import BaseModel, TypeAdapter, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails


class BadRequest(Exception):
    """The body is not a request we can honour. `param` names the field, where one is to blame."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class BadStandIn(BadRequest):
    """The request that another one stands for is none. `param` is a field of that."""


class NoThreads(BadRequest):
    """A conversation is to be kept here: clients who know that error send the whole of it instead."""


class Refusal(msgspec.Struct, frozen=True):
    """Why a field is refused, the values that ask for nothing, and the error that it is."""

    reason: str
    neutral: tuple[Any, ...] = ()
    kind: type[BadRequest] = BadRequest


NOT_YET = "is not offered by this version"

WITHOUT_EFFECT: Final[Mapping[str, str]] = {
    "user": "names the end user, whom a Route may keep with one replica",
    "metadata": "the caller's own labels",
    "service_tier": "there is one tier",
    "store": "nothing is stored",
    "safety_identifier": "names the end user, as `user`",
    "prompt_cache_key": "a hint for routing to a prompt cache; requests go by their prompts here",
    "prompt_cache_retention": "a hint for a prompt cache",
    "session_id": "a hint for routing",
    "prediction": "a text that the answer may be like, for speed alone",
}
"""Fields accepted without effect, and what they are for."""
OF_CALLERS: Final = {
    name: WITHOUT_EFFECT[name] for name in ("user", "metadata", "service_tier", "safety_identifier")
}
"""Those that say nothing of a text that is to be written."""


class Idle(msgspec.Struct, frozen=True):
    """What a field without effect may say: a type of Python's, and its words for people."""

    kind: TypeAdapter[Any]
    words: str
    why: str = ""
    """Why nothing else is taken, where a value could ask for something."""


_TEXT: Final = Idle(TypeAdapter(str | None), "a string")
_OBJECT: Final = Idle(TypeAdapter(dict[str, Any] | None), "an object")
IDLE: Final[Mapping[str, Idle]] = {
    "user": _TEXT,
    "metadata": _OBJECT,
    "service_tier": Idle(
        TypeAdapter(Literal["auto", "default", "standard_only"] | None),
        "`auto`, `default` or `standard_only`",
        "there is one tier",
    ),
    "store": Idle(
        TypeAdapter(Literal[False] | None), "`false`", "of all answers only those of /v1/responses can be kept"
    ),
    "safety_identifier": _TEXT,
    "prompt_cache_key": _TEXT,
    "prompt_cache_retention": _TEXT,
    "prompt_cache_options": _OBJECT,
    "session_id": _TEXT,
    "prediction": _OBJECT,
    "max_tool_calls": Idle(TypeAdapter(int | None), "a whole number"),
    "inference_geo": Idle(
        TypeAdapter(Literal["global"] | None), "`global`", "where requests are served is the operator's choice"
    ),
    "speed": Idle(TypeAdapter(Literal["standard"] | None), "`standard`", "there is one speed"),
    "betas": Idle(TypeAdapter(list[str] | None), "a list of strings"),
    "diagnostics": _OBJECT,
    "user_profile_id": _TEXT,
    "workspace_id": _TEXT,
    "cache_control": _OBJECT,
}
"""By the names of all fields without effect, of any API."""

MAX_DEPTH: Final = 256
"""Far above what a field may have, so that the field's own check answers and names it."""

_IGNORE_UNKNOWN: Final = "ignore_unknown"
P = TypeVar("P", bound=BaseModel)


def read(
    body: bytes,
    kind: type[P],
    refused: Mapping[str, Refusal],
    ignore_unknown: bool = False,
    without_effect: Mapping[str, str] = WITHOUT_EFFECT,
) -> P:
    """The request of that kind in `body`, every bound of which holds. Raises `BadRequest`.

    What is refused by name stays refused where unknown fields are ignored.
    """
    stated = _json_object(body)
    honoured = kind.model_fields
    kept: dict[str, Any] = {}
    for name, value in stated.items():
        if name in honoured:
            kept[name] = value
        elif name in refused:
            refusal = refused[name]
            if not asks_for_nothing(value, refusal.neutral):
                raise refusal.kind(f"'{name}' is not honoured: {refusal.reason}.", name)
        elif name in without_effect:
            _check_idle(name, value)
        elif not ignore_unknown:
            raise BadRequest(_unknown(name, [*honoured, *without_effect]), shown(name))
    while True:
        try:
            return kind.model_validate(kept, context={_IGNORE_UNKNOWN: ignore_unknown})
        except ValidationError as error:
            details = error.errors(include_url=False)
            if not ignore_unknown or not _drop_unknown(kept, details):
                raise explained(_foremost(details, kept)) from None


def _check_idle(name: str, value: object) -> None:
    """Raises `BadRequest` where a field without effect says what it cannot, or asks for something."""
    idle = IDLE[name]
    try:
        idle.kind.validate_python(value, strict=True)
    except ValidationError:
        said = idle.words.replace("`", "'") if idle.why else idle.words
        raise BadRequest(f"'{name}' must be {said}{': ' if idle.why else ''}{idle.why}.", name) from None


def ignores_unknown(info: ValidationInfo) -> bool:
    """For validators of a request's fields: whether what they do not know is to be left out, not refused."""
    return bool(info.context and info.context[_IGNORE_UNKNOWN])


def _foremost(details: Sequence[ErrorDetails], request: Mapping[str, Any]) -> ErrorDetails:
    """The first of what is wrong; where a field may have several shapes, with the one that it comes nearest to.

    Its place is as the client wrote it: the library's names for shapes are left out.
    """
    places = [_place(detail, request) for detail in details]
    near = [at for at in range(len(details)) if places[at][: len(places[0])] == places[0]]
    deepest = max(near, key=lambda at: len(places[at]))
    here = [at for at in near if places[at] == places[deepest]]
    fits = [at for at in here if details[at]["type"] not in _SHAPES]
    found = details[fits[0] if fits else deepest].copy()
    shapes = list(dict.fromkeys(_SHAPES[details[at]["type"]] for at in here if at not in fits))
    if not fits and len(shapes) > 1:
        found["type"], found["msg"] = "shape", f"must be {' or '.join(shapes)}"
    found["loc"] = places[deepest]
    return found


_SHAPES: Final[Mapping[str, str]] = {
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}
"""What a value is not at all, by what the library says. Whoever sent another shape meant that one."""


def _place(detail: ErrorDetails, request: Mapping[str, Any]) -> tuple[int | str, ...]:
    place: list[int | str] = []
    at: Any = request
    for number, step in enumerate(detail["loc"], 1):
        missing = number == len(detail["loc"]) and detail["type"] == "missing"
        if missing or (isinstance(at, Mapping) and step in at and not _is_shape(at, detail["loc"][number - 1 :])):
            at = None if missing else at[step]
        elif isinstance(at, list) and isinstance(step, int) and step < len(at):
            at = at[step]
        else:
            continue
        place.append(step)
    return tuple(place)


def _is_shape(at: Mapping[str, Any], left: Sequence[int | str]) -> bool:
    """Whether the first step is a shape that has the name of a field: it leads nowhere, and the next does."""
    return len(left) > 1 and not isinstance(at[str(left[0])], Mapping | list) and left[1] in at


def _drop_unknown(request: dict[str, Any], details: Sequence[ErrorDetails]) -> bool:
    """Take out of `request` what `details` call fields of no object; whether there was any."""
    dropped = False
    for detail in details:
        if detail["type"] != "extra_forbidden":
            continue
        at: Any = request
        *path, last = _place(detail, request)
        for step in path:
            at = at[step]
        if isinstance(at, dict) and last in at:
            del at[last]
            dropped = True
    return dropped


def read_part(name: str, value: Mapping[str, Any], shape: type[P]) -> P:
    """The object that requests have as field `name`, from nowhere but this process. Raises `BadRequest`."""
    try:
        return shape.model_validate(dict(value))
    except ValidationError as error:
        raise explained(error.errors(include_url=False)[0], name) from None


def standing_for(kind: type[P], stated: Mapping[str, Any]) -> P:
    """The request that another one, which was read before, stands for. Raises `BadRequest` in this one's words."""
    try:
        return kind.model_validate(stated)
    except ValidationError as error:
        told = explained(_foremost(error.errors(include_url=False), stated))
        raise BadStandIn(told.message, told.param) from None


def asks_for_nothing(value: object, neutral: tuple[object, ...]) -> bool:
    """Whether `value` is None or one of `neutral`, by an equality that keeps true and 1 apart."""
    return value is None or any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral
    )


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name[:64], known, n=1, cutoff=0.7)
    return f"Unknown field '{shown(name)}'." + (f" Did you mean '{near[0]}'?" if near else "")


def shown(name: str) -> str:
    """A name that a client gave, fit for a message."""
    return "".join(c if c.isprintable() else "?" for c in name[:64])


def _json_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`, nested at most `MAX_DEPTH` deep, all of its text proper Unicode."""
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # covers msgspec's errors and broken UTF-8
        value = _json_object_slowly(body)
    if not isinstance(value, dict):
        raise BadRequest("The body must be a JSON object.")
    depth, keys = depth_and_keys(value)
    if depth > MAX_DEPTH:
        raise _too_deep()
    _check_keys(body, keys)
    return value


MAYBE_KEY: Final = re.compile(rb'"\s*+:')
"""What every key in JSON ends with; texts may have it, too."""


def _check_keys(body: bytes, keys: int) -> None:
    """Refuse a body with a key twice in one object; `keys` are left of it after decoding.

    Every key in the body has a colon behind it, so with as many such places as keys left, none was lost. Texts
    may have more of them; only then is the body read again, by a reader that shows every pair.
    """
    if sum(1 for _ in MAYBE_KEY.finditer(body)) != keys:  # one by one, so that other threads get their turns
        json.loads(body, object_pairs_hook=_distinct, parse_int=float)


def _distinct(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise BadRequest(f"The body has the key '{shown(key)}' twice in one object.", shown(key))
        seen.add(key)


def _json_object_slowly(body: bytes) -> object:
    """What the fast reader refused, read once more by one that takes NaN, Infinity and 1e999.

    They are no JSON, but clients send them, and the models can then name the field that has one.
    """
    try:
        value = json.loads(body)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is a string that is no text
    except UnicodeError:
        raise BadRequest(
            "The body has text that is no Unicode: broken UTF-8, or half of a surrogate pair."
        ) from None
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        raise BadRequest(f"The body is not valid JSON (line {error.lineno}, column {error.colno}).") from None
    except ValueError:
        raise BadRequest("The body has a number that is too long.") from None
    return value


def _too_deep() -> BadRequest:
    return BadRequest(f"The body is nested deeper than {MAX_DEPTH} levels.")


def depth_and_keys(value: object) -> tuple[int, int]:
    """How deep objects and lists are nested, counted to just above the limit, and the keys of all objects."""
    level, depth, keys = [value], 0, 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            break
        keys += sum(len(item) for item in level if isinstance(item, dict))
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
            if isinstance(child, dict | list)
        ]
    return depth, keys


_WORDS: Final[Mapping[str, str]] = {
    "missing": "is required",
    "string_type": "must be a string",
    "string_too_short": "must not be empty",
    "string_too_long": "must not be longer than {max_length} characters",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "is too large",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "none_required": "must be null",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must have at least {min_length} item",
    "too_long": "must not have more than {max_length} items",
    "literal_error": "must be {expected}",
    "extra_forbidden": "is not a field of this object",
    "string_pattern_mismatch": "must match {pattern}",
    "union_tag_not_found": "must have a {discriminator}",
    "union_tag_invalid": "must have as {discriminator} one of {expected_tags}",
}

_CONSTANTS: Final[Mapping[str, str]] = {"True": "true", "False": "false"}
"""As the library writes them, and as JSON does."""

_CROSS_FIELD: Final = frozenset(
    {
        "stream_options",
        "top_logprobs",
        "max_tokens",
        "continue_final_message",
        "min_tokens",
        "n",
        "best_of",
        "prompt_logprobs",
        "logprob_token_ids",
        "logprobs_mode",
        "return_tokens_as_token_ids",
        "truncate_prompt_tokens",
        "truncation_side",
        "length_penalty",
        "use_beam_search",
        "structured_outputs",
        "json_schema",
        "structures",
        "triggers",
        "whitespace_pattern",
        "disable_any_whitespace",
        "separate_reasoning",
        "tool_choice",
        "budget_tokens",
        "background",
        "messages",
        "tools",
        "add_generation_prompt",
        "chat_template_kwargs",
        "queries",
        "text_1",
        "data_1",
    }
)
"""Checks over several fields: the error's type is the field to name."""


def explained(detail: ErrorDetails, *within: str) -> BadRequest:
    """Our words for the first thing that Pydantic found, in the field `within` of a request or in all of it."""
    where = [*within, *detail["loc"]]
    kind = detail["type"]
    words = _WORDS.get(kind)
    if words is None:  # our own checks bring their words; any other kind of the library has none here
        ours = kind in _CROSS_FIELD | {
            "stop",
            "bias",
            "content",
            "content_missing",
            "tool_calls",
            "tools",
            "choice",
            "item",
            "system",
            "arguments",
            "prompt",
            "input",
            "ids",
            "tool",
            "script",
            "schema",
            "one_constraint",
            "pattern",
            "shape",
        }
        text = detail["msg"] if ours else "is not valid"
        if kind in _CROSS_FIELD:
            where.append(kind)
        if "inside" in detail.get("ctx", {}):  # a check of an object, about one of its fields
            where.append(detail["ctx"]["inside"])
    else:
        context = dict(detail.get("ctx", {}))
        if context.get("expected") in _CONSTANTS:
            context["expected"] = _CONSTANTS[context["expected"]]
        text = words.format(**context)
        given = detail["input"] if kind != "extra_forbidden" else None
        if isinstance(given, int | float) and not isinstance(given, bool) and abs(given) < 1e18:
            whole = isinstance(given, float) and given.is_integer()
            if whole and kind in {"int_type", "int_from_float"}:
                text += f", written without a point or an exponent: {int(given)}"
            else:
                text += f", not {int(given) if whole else given}"
    param = ""
    for step in where:
        word = f"[{step}]" if isinstance(step, int) else shown(str(step))
        param += f".{word}" if param and isinstance(step, str) else word
    return BadRequest(f"'{param}' {text}.", param or None)
