"""Requests of Anthropic's and OpenAI's newer API, as the chat requests that they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from quire_schemas.anthropic import MESSAGES_REFUSED, MESSAGES_WITHOUT_EFFECT, MessagesRequest, read_messages
from quire_schemas.openai.body import BadRequest
from quire_schemas.openai.chat import ChatRequest
from quire_schemas.openai.responses import (
    RESPONSES_REFUSED,
    RESPONSES_WITHOUT_EFFECT,
    ResponsesRequest,
    read_response,
)

RESPONSES_FIELDS = """
    background include input instructions max_output_tokens max_tool_calls metadata model logit_bias
    parallel_tool_calls previous_response_id prompt reasoning include_reasoning service_tier store
    stream temperature text tool_choice tools top_logprobs top_p top_k min_p truncation user
    prompt_cache_key prompt_cache_options prompt_cache_retention safety_identifier presence_penalty
    frequency_penalty repetition_penalty seed stop stop_token_ids ignore_eos enable_response_messages
    previous_input_messages conversation stream_options cache_salt priority request_id
    chat_template_kwargs structured_outputs kv_transfer_params vllm_xargs
""".split()  # noqa: SIM905 (easier to read)
MESSAGES_FIELDS = """
    model messages max_tokens metadata output_config thinking stop_sequences stream system temperature
    tool_choice tools top_k top_p cache_salt vllm_xargs chat_template_kwargs service_tier container
    mcp_servers context_management cache_control
""".split()  # noqa: SIM905 (easier to read)


@pytest.mark.parametrize(
    ("names", "kind", "refused", "without_effect"),
    [
        (RESPONSES_FIELDS, ResponsesRequest, RESPONSES_REFUSED, RESPONSES_WITHOUT_EFFECT),
        (MESSAGES_FIELDS, MessagesRequest, MESSAGES_REFUSED, MESSAGES_WITHOUT_EFFECT),
    ],
    ids=["responses", "messages"],
)
def test_every_field_that_clients_know_is_in_exactly_one_place(
    names: list[str], kind: Any, refused: Mapping[str, Any], without_effect: Mapping[str, str]
) -> None:
    for name in names:
        assert (name in kind.model_fields) + (name in refused) + (name in without_effect) == 1, name


def messages(**body: Any) -> ChatRequest:
    return read_messages(json.dumps({"model": "m", "max_tokens": 9, **body}).encode())


def responses(**body: Any) -> ChatRequest:
    request = read_response(json.dumps({"model": "m", **body}).encode())
    return request.chat(request.input)


def turns(request: ChatRequest) -> list[dict[str, Any]]:
    return [message.for_template() for message in request.messages]


HI = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def test_blocks_of_a_turn_become_the_messages_that_templates_know() -> None:
    request = messages(
        system=[{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}],
        messages=[
            HI,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "So?"},
                    {"type": "tool_result", "tool_use_id": "c1", "content": "7", "is_error": False},
                ],
            },
            {"role": "system", "content": "In French now."},
        ],
    )
    assert turns(request) == [
        {"role": "system", "content": "Be\nbrief."},
        HI,
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
        {"role": "user", "content": "So?"},
        {"role": "system", "content": "In French now."},
    ]


def test_items_of_one_turn_are_one_message() -> None:
    function = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
    request = responses(
        instructions="Be brief.",
        input=[
            HI,
            {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
            function,
            {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "7"}]},
            {"role": "assistant", "content": "Seven."},
            {"role": "assistant", "content": "Yes."},
            {"role": "developer", "content": "In French now."},
            function,
        ],
    )
    assert turns(request) == [
        {"role": "system", "content": "Be brief."},
        HI,
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
        {"role": "assistant", "content": "Seven."},
        {"role": "assistant", "content": "Yes."},
        {"role": "system", "content": "In French now."},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, ("high", 1024)),
        ({"thinking": {"type": "disabled"}}, ("none", None)),
        ({"thinking": {"type": "adaptive"}}, (None, None)),
        ({"output_config": {"effort": "max"}}, ("xhigh", None)),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, ("low", None)),
    ],
    ids=str,
)
def test_how_much_is_thought(asked: dict[str, Any], expected: tuple[str | None, int | None]) -> None:
    request = messages(messages=[HI], **asked)
    assert (request.reasoning_effort, request.thinking_token_budget) == expected


TOOL = {"name": "f", "input_schema": {"type": "object"}}


@pytest.mark.parametrize(
    ("choice", "must", "one"),
    [
        ({"type": "auto"}, False, False),
        ({"type": "any"}, True, False),
        ({"type": "any", "disable_parallel_tool_use": True}, True, True),
        ({"type": "tool", "name": "f"}, True, True),
    ],
    ids=str,
)
def test_choices_of_tools(choice: dict[str, Any], must: bool, one: bool) -> None:
    request = messages(messages=[HI], tools=[TOOL], tool_choice=choice)
    assert (request.must_call, request.one_call) == (must, one)
    assert [tool.function.name for tool in request.offered] == ["f"]
    assert not messages(messages=[HI], tools=[TOOL], tool_choice={"type": "none"}).offered


@pytest.mark.parametrize(
    ("read", "body", "param"),
    [
        (messages, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]"),
        (messages, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (messages, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0]"),
        (messages, {"messages": [HI], "tools": [TOOL, TOOL]}, "tools"),
        (messages, {"messages": [HI], "tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        (messages, {"messages": [HI], "tool_choice": {"type": "any"}}, "tool_choice"),
        (messages, {"messages": [HI], "thinking": {"type": "adaptive", "budget_tokens": 9}}, "thinking"),
        (messages, {"messages": [HI], "system": [{"type": "image"}]}, "system"),
        (responses, {"input": [{"type": "web_search_call"}]}, "input[0]"),
        (responses, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        (
            responses,
            {"input": "x", "text": {"format": {"type": "json_schema", "name": "a"}}},
            "text.format.schema",
        ),
        (responses, {"input": "x", "metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        (responses, {"input": "x", "include": ["file_search_call.results"]}, "include[0]"),
        (responses, {"input": "x", "top_logprobs": 2}, "top_logprobs"),
        (responses, {"input": "x", "reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ],
)
def test_what_is_wrong_is_named_as_the_client_wrote_it(read: Any, body: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read(**body)
    assert (refused.value.param or "").startswith(param)
    assert param.split("[")[0].split(".")[0] in refused.value.message


TEXT = {"type": "text", "text": "x", "foo": 1}
CACHED = {"type": "ephemeral", "foo": 1}
NAMED = {"type": "function", "foo": 1, "name": "f"}
OFFERED: dict[str, Any] = {"tools": [{"type": "function", "name": "f"}]}


@pytest.mark.parametrize(
    ("read", "body", "place"),
    [
        (read_messages, {"messages": [{"role": "user", "content": [TEXT]}]}, "messages[0].content[0].foo"),
        (read_messages, {"messages": [HI], "system": [TEXT]}, "system[0].foo"),
        (
            read_messages,
            {"messages": [{"role": "user", "content": [{**TEXT, "foo": None, "cache_control": CACHED}]}]},
            "messages[0].content[0].",
        ),
        (
            read_messages,
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "thinking", "thinking": "x", "foo": 1}]},
                    HI,
                ]
            },
            "messages[0].content[0].foo",
        ),
        (read_response, {"input": [{"role": "user", "content": [TEXT]}]}, "input[0].content[0].foo"),
        (
            read_response,
            {"input": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "x", "foo": 1}]}]},
            "input[0].content[0].foo",
        ),
        (read_response, {"input": "x", **OFFERED, "tool_choice": NAMED}, "tool_choice.foo"),
        (
            read_response,
            {"input": "x", **OFFERED, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [NAMED]}},
            "tool_choice.tools[0].foo",
        ),
    ],
)
def test_a_field_that_nobody_knows_is_named_or_left_out_wherever_it_is(
    read: Any, body: dict[str, Any], place: str
) -> None:
    sent = json.dumps({"model": "m", **body, **({"max_tokens": 9} if read is read_messages else {})}).encode()
    with pytest.raises(BadRequest, match="is not a field of this object") as refused:
        read(sent)
    assert (refused.value.param or "").startswith(place)
    made = read(sent, ignore_unknown=True)
    known = json.loads(sent.replace(b', "foo": 1', b"").replace(b', "foo": null', b""))
    assert made == read(json.dumps(known).encode())
