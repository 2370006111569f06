"""What requests say about the structure of an answer: one constraint, from one field, or a 400 that names it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quire_schemas.openai.body import BadRequest
from quire_schemas.openai.chat import read_chat
from quire_schemas.openai.completions import read_completion
from quire_schemas.wire import MAX_STRUCTURED, Structured

INTEGER = {"type": "integer"}
TAG = {"structures": [{"begin": "<f=a>", "schema": INTEGER, "end": "</f>"}], "triggers": ["<f="]}
TAG_TEXT = '{"structures":[{"begin":"<f=a>","schema":{"type":"integer"},"end":"</f>"}],"triggers":["<f="]}'
OBJECT = Structured("json_schema", '{"type":"object"}')


def chat(**body: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], **body}).encode()


def json_format(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **more}}


def nested(levels: int) -> dict[str, Any]:
    """An object so many levels deep."""
    return {"not": nested(levels - 1)} if levels > 1 else {}


@pytest.mark.parametrize(
    ("body", "field", "structured"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format", OBJECT),
        (
            {"response_format": json_format({"properties": {"b": {}, "a": {"const": "é"}}}, strict=False)},
            "response_format.json_schema.schema",
            Structured("json_schema", '{"properties":{"b":{},"a":{"const":"é"}}}'),  # in the order it was sent
        ),
        (
            {"response_format": {"type": "structural_tag", **TAG}},
            "response_format",
            Structured("structural_tag", TAG_TEXT),
        ),
        (
            {"structured_outputs": {"json": INTEGER}, "response_format": {"type": "text"}},
            "structured_outputs.json",
            Structured("json_schema", '{"type":"integer"}'),
        ),
        (
            {"structured_outputs": {"json": '{"type": "integer"}', "disable_any_whitespace": True}},
            "structured_outputs.json",
            Structured("json_schema", '{"type":"integer"}', ""),
        ),
        ({"structured_outputs": {"json": {}}}, "structured_outputs.json", Structured("json_schema", "{}")),
        (
            {"structured_outputs": {"json_object": True, "whitespace_pattern": r"[ \n]{0,3}"}},
            "structured_outputs.json_object",
            Structured("json_schema", '{"type":"object"}', r"[ \n]{0,3}"),
        ),
        ({"structured_outputs": {"regex": "a+"}}, "structured_outputs.regex", Structured("regex", "a+")),
        (
            {"structured_outputs": {"choice": ["a", "é"], "json_object": False, "regex": None}},
            "structured_outputs.choice",
            Structured("choice", '["a","é"]'),
        ),
        (
            {"structured_outputs": {"grammar": 'start: "a"'}},
            "structured_outputs.grammar",
            Structured("grammar", 'start: "a"'),
        ),
        *(
            (
                {"structured_outputs": {"structural_tag": tag}},
                "structured_outputs.structural_tag",
                Structured("structural_tag", TAG_TEXT),
            )
            for tag in (TAG, json.dumps(TAG), {"type": "structural_tag", **TAG})
        ),
    ],
)
def test_a_constraint_is_read_from_its_field(body: dict[str, Any], field: str, structured: Structured) -> None:
    for request in (
        read_chat(chat(**body)),
        read_completion(json.dumps({"model": "m", "prompt": "x", **body}).encode()),
    ):
        assert request.constraint is not None
        assert (request.constraint.field, request.constraint.structured) == (field, structured)


@pytest.mark.parametrize("body", [{}, {"response_format": {"type": "text"}}, {"structured_outputs": None}])
def test_without_a_constraint_there_is_none(body: dict[str, Any]) -> None:
    assert read_chat(chat(**body)).constraint is None


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "must be 'text'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is required"),
        (
            {"response_format": {"type": "json_object", "json_schema": {"name": "n", "schema": {}}}},
            "response_format.json_schema",
            "has no place with type json_object",
        ),
        ({"response_format": json_format([])}, "response_format.json_schema.schema", "must be a JSON Schema"),
        (
            {"response_format": {"type": "structural_tag", "format": {"type": "any_text"}}},
            "response_format.format",
            "is not a field",
        ),
        (
            {"response_format": {"type": "structural_tag", "structures": [], "triggers": ["a"]}},
            "response_format.structures",
            "at least 1",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "it has none"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "it has json and regex"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn", "is not a field"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "must be a JSON Schema"),
        (
            {"structured_outputs": {"json": '{"a":' * 99 + "1" + "}" * 99}},
            "structured_outputs.json",
            "deeper than 64",
        ),
        ({"structured_outputs": {"json": nested(65)}}, "structured_outputs.json", "deeper than 64"),
        ({"structured_outputs": {"json": nested(240)}}, "structured_outputs.json", "deeper than 64"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": nested(65)}}},
            "response_format.json_schema.schema",
            "deeper than 64",
        ),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        ({"structured_outputs": {"regex": "é" * MAX_STRUCTURED}}, "structured_outputs.regex", "65536 bytes"),
        ({"structured_outputs": {"choice": ["x" * MAX_STRUCTURED]}}, "structured_outputs", "65536 bytes"),
        ({"structured_outputs": {"json": {"enum": ["x" * 10**7]}}}, "structured_outputs.json", "65536 bytes"),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
            "has no place with regex",
        ),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": "x*"}},
            "structured_outputs.whitespace_pattern",
            "blanks",
        ),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}},
            "structured_outputs.whitespace_pattern",
            "exclude each other",
        ),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            "structured_outputs.structural_tag.structures",
            "required",
        ),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "exclude each other",
        ),
        ({"guided_json": {}}, "guided_json", "send structured_outputs with 'json'"),
        ({"guided_regex": "a"}, "guided_regex", "send structured_outputs with 'regex'"),
        ({"guided_choice": ["a"]}, "guided_choice", "send structured_outputs with 'choice'"),
        ({"guided_grammar": "a"}, "guided_grammar", "send structured_outputs with 'grammar'"),
        ({"ebnf": "a"}, "ebnf", "send structured_outputs with 'grammar'"),
    ],
)
def test_what_is_no_constraint_is_refused_by_name(body: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        read_chat(chat(**body))
    assert refusal.value.param == param
    assert words in refusal.value.message


@pytest.mark.parametrize("bytes_too_many", [1, MAX_STRUCTURED + 1, 30 * MAX_STRUCTURED])
def test_a_schema_that_is_too_long_is_refused_by_its_size(bytes_too_many: int) -> None:
    """Of what is far too long the size is known before it is written."""
    bare = len('{"const":""}')
    schema = {"const": "é" + "a" * (MAX_STRUCTURED + bytes_too_many - bare - len("é".encode()))}
    with pytest.raises(BadRequest) as caught:
        read_chat(chat(response_format=json_format(schema)))
    assert caught.value.param == "response_format.json_schema.schema"
    size = MAX_STRUCTURED + bytes_too_many
    assert str(caught.value).endswith(f"must not have more than {MAX_STRUCTURED} bytes, not {size}.")
