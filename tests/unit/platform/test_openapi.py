"""The API's description: valid, complete, and of one mind with the readers of requests."""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemathesis
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from quire import errors
from quire.router import app
from quire.router.openapi import ENDPOINTS, as_json, as_text, document
from quire_schemas.openai.body import WITHOUT_EFFECT, BadRequest
from quire_schemas.openai.chat import CHAT_REFUSED, ChatRequest, read_chat
from quire_schemas.openai.completions import read_completion
from quire_schemas.openai.embeddings import read_embedding

READERS = {"ChatRequest": read_chat, "CompletionRequest": read_completion, "EmbeddingRequest": read_embedding}
SAID = [{"role": "user", "content": "x"}]
CHAT: dict[str, Any] = {"model": "m", "messages": SAID}
PART = {"type": "text", "text": "x"}
PROMPT: dict[str, Any] = {"model": "m", "prompt": "x"}
INPUT: dict[str, Any] = {"model": "m", "input": "x"}


@functools.cache
def described() -> dict[str, Any]:
    """The document, made by the first test that reads it: every process of a run imports this module."""
    return document()


def schemas() -> dict[str, Any]:
    return dict(described()["components"]["schemas"])


@functools.cache
def registry() -> Registry[Any]:
    resource: Resource[Any] = Resource.from_contents(described(), default_specification=DRAFT202012)
    found: Registry[Any] = Registry().with_resource("urn:quire", resource)
    return found


def takes(shape: str, body: dict[str, Any]) -> bool:
    """Whether the document's schema of that name takes a body."""
    schema = {"$ref": f"urn:quire#/components/schemas/{shape}"}
    return jsonschema.Draft202012Validator(schema, registry=registry()).is_valid(body)


def reads(shape: str, body: dict[str, Any]) -> bool:
    """Whether the router's own reader takes it."""
    try:
        READERS[shape](json.dumps(body).encode())
    except BadRequest:
        return False
    return True


def parts(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in the document."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from parts(each)


def test_it_is_openapi_3_1_and_every_schema_is_one() -> None:
    assert described()["openapi"] == "3.1.0"
    schemathesis.openapi.from_dict(json.loads(as_json())).validate()
    for schema in schemas().values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for part in parts(described()):
        for place in part.values():
            if isinstance(place, str) and place.startswith("#/"):
                registry().resolver("urn:quire").lookup(place)
    assert all(name.isalnum() for name in schemas())
    names = [
        each["operationId"]
        for path in described()["paths"].values()
        for each in parts(path)
        if "operationId" in each
    ]
    assert len(names) == len(set(names))
    assert json.loads(as_json()) == json.loads(as_text())


def routes_of_the_router() -> Iterator[tuple[str, str]]:
    """Method and path of every route in the sources of `quire.router.app` and `quire.router.api`."""
    assert app.__file__ is not None
    sources = [Path(app.__file__), *Path(app.__file__).with_name("api").glob("*.py")]
    for node in (node for source in sources for node in ast.walk(ast.parse(source.read_text()))):
        for mark in getattr(node, "decorator_list", ()):
            word = mark.func.id if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) else ""
            of_all = word == "route" and isinstance(mark.args[0], ast.Name)  # OPTIONS, which every path has
            if word in ("get", "post", "put", "patch", "delete", "route") and not of_all:
                paths = ast.literal_eval(mark.args[0])
                for path in [paths] if isinstance(paths, str) else paths:
                    for method in ("GET", "HEAD") if word == "route" else (word.upper(),):
                        yield method, re.sub(r":\w+}", "}", path)


def test_every_route_of_the_router_has_a_row_and_every_row_a_route() -> None:
    routes = list(routes_of_the_router())
    assert len(routes) > 15
    rows = [(method, path) for each in ENDPOINTS for path in (each.path, *each.aliases) for method in each.methods]
    assert sorted(routes) == sorted(rows)


def test_every_error_is_declared_where_it_may_come() -> None:
    never_an_answer = {errors.EngineDied}  # comes as the event of a stream
    of_no_endpoint = {errors.NotFound, errors.EndpointNotServed, errors.MethodNotAllowed}
    declared = {
        (int(status), code)
        for path in described()["paths"].values()
        for operation in path.values()
        if isinstance(operation, dict)
        for status, response in operation["responses"].items()
        for part in parts(response)
        for name in ("code", "error_code")
        for code in part.get(name, {}).get("enum", ())
    }
    wanted = {
        (row.status, row.code)
        for kind, row in errors.TABLE.items()
        if kind not in never_an_answer | of_no_endpoint
    }
    assert wanted - declared == set()


@pytest.mark.parametrize("each", [each for each in ENDPOINTS if each.request], ids=lambda each: each.name)
def test_a_request_has_what_is_honoured_and_what_is_without_effect_and_nothing_else(each: Any) -> None:
    schema = schemas()[each.request.__name__]
    honoured = {field.alias or name for name, field in each.request.model_fields.items()}
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == honoured | set(each.without_effect)
    for name in set(each.without_effect) - honoured:
        assert schema["properties"][name]["description"].startswith("Accepted without effect")
    assert not set(each.refused) & set(schema["properties"])


def test_notes_of_the_source_are_the_descriptions_of_fields() -> None:
    assert schemas()["ChatRequest"]["properties"]["temperature"]["description"] == "0 is greedy."
    assert "vocabulary" in schemas()["CompletionRequest"]["properties"]["logprobs"]["description"]
    assert schemas()["StructuredOutputs"]["properties"]["json"]["description"] == "A JSON Schema."
    assert "description" not in schemas()["ChatRequest"]["properties"]["logprobs"], "of another class's field"


@pytest.mark.parametrize(
    ("shape", "body"),
    [
        ("ChatRequest", CHAT | {"stop": "a", "logit_bias": {"7": -100}, "script": [1, 2], "seed": -5}),
        ("ChatRequest", CHAT | {"stop": ["a", "b"], "script": "x", "user": "u", "metadata": {"a": 1}}),
        ("ChatRequest", CHAT | {"messages": [{"role": "user", "content": [PART]}]}),
        ("ChatRequest", CHAT | {"messages": [{"role": "user", "content": [PART | {"cache_control": {}}]}]}),
        ("ChatRequest", CHAT | {"response_format": {"type": "json_schema",
            "json_schema": {"name": "a", "schema": {}}}}),
        ("ChatRequest", CHAT | {"structured_outputs": {"json": '{"type": "object"}'}}),
        ("ChatRequest", CHAT | {"structured_outputs": {"structural_tag": {
            "structures": [{"begin": "<", "schema": {}, "end": ">"}], "triggers": ["<"]}}}),
        ("ChatRequest", CHAT | {"temperature": None, "stream": True, "stream_options": {"include_usage": True}}),
        ("CompletionRequest", PROMPT | {"prompt": ["a", "b"]}),
        ("CompletionRequest", PROMPT | {"prompt": [1, 2]}),
        ("CompletionRequest", PROMPT | {"prompt": [[1], [2]], "best_of": 2}),
        ("EmbeddingRequest", INPUT | {"input": [[1], [2]], "encoding_format": "base64"}),
    ],
)  # fmt: skip
def test_what_is_read_is_in_the_schema(shape: str, body: dict[str, Any]) -> None:
    assert reads(shape, body)
    assert takes(shape, body)


@pytest.mark.parametrize(
    ("shape", "body"),
    [
        ("ChatRequest", {"model": "m"}),
        ("ChatRequest", CHAT | {"messages": []}),
        ("ChatRequest", CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("ChatRequest", CHAT | {"messages": [{"role": "user", "content": [PART | {"bold": True}]}]}),
        ("ChatRequest", CHAT | {"temperature": 2.5}),
        ("ChatRequest", CHAT | {"stop": ""}),
        ("ChatRequest", CHAT | {"stop": ["a"] * 17}),
        ("ChatRequest", CHAT | {"logit_bias": {"a": 1}}),
        ("ChatRequest", CHAT | {"logit_bias": {"1": 101}}),
        ("ChatRequest", CHAT | {"script": ["a"]}),
        ("ChatRequest", CHAT | {"no_such_field": 1}),
        ("ChatRequest", CHAT | {"lora_path": "a"}),
        ("ChatRequest", CHAT | {"structured_outputs": {"json": 5}}),
        ("CompletionRequest", PROMPT | {"prompt": []}),
        ("CompletionRequest", PROMPT | {"prompt": ["a"] * 65}),
        ("CompletionRequest", PROMPT | {"prompt": ["a", 1]}),
        ("EmbeddingRequest", INPUT | {"input": [-1]}),
        ("EmbeddingRequest", INPUT | {"dimensions": 0}),
    ],
)
def test_what_the_schema_refuses_is_refused(shape: str, body: dict[str, Any]) -> None:
    assert not takes(shape, body)
    assert not reads(shape, body)


def test_unknown_fields_of_parts_are_left_out_where_the_gateway_says_so() -> None:
    body = CHAT | {"messages": [{"role": "user", "content": [PART | {"bold": True}]}]}
    with pytest.raises(BadRequest, match="must not have the field 'bold' in a text part"):
        read_chat(json.dumps(body).encode())
    assert read_chat(json.dumps(body).encode(), ignore_unknown=True).messages[0].content == "x"


def test_the_refused_fields_of_chat_are_none_of_its_fields() -> None:
    assert not set(CHAT_REFUSED) & (set(ChatRequest.model_fields) | set(WITHOUT_EFFECT))
