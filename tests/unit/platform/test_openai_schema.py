"""Request shapes: every known field is honoured, refused by name or without effect; every bound holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.effort import examples

from quire.router.openapi import ENDPOINTS
from quire_schemas.anthropic import read_messages
from quire_schemas.openai.batches import read_create
from quire_schemas.openai.body import IDLE, OF_CALLERS, WITHOUT_EFFECT, BadRequest
from quire_schemas.openai.chat import CHAT_REFUSED, ChatRequest, read_chat
from quire_schemas.openai.completions import COMPLETION_REFUSED, CompletionRequest, read_completion
from quire_schemas.openai.embeddings import EMBEDDING_REFUSED, EmbeddingRequest
from quire_schemas.openai.responses import read_response
from quire_schemas.openai.score import SCORE_REFUSED, ScoreRequest, read_score
from quire_schemas.openai.tokens import (
    DETOKENIZE_REFUSED,
    TOKENIZE_REFUSED,
    DetokenizeRequest,
    TokenizeRequest,
    read_detokenize,
    read_tokenize,
)

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "x"}

# What clients of servers of this kind send, as published by those servers and by OpenAI.
SAMPLING = [
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "n",
    "presence_penalty",
    "response_format",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "user",
    "use_beam_search",
    "top_k",
    "min_p",
    "repetition_penalty",
    "watermarking",
    "length_penalty",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "truncate_prompt_tokens",
    "truncation_side",
    "prompt_logprobs",
    "logprob_token_ids",
    "allowed_token_ids",
    "bad_words",
    "repetition_detection",
    "stream_interval",
    "structured_outputs",
    "priority",
    "request_id",
    "session_id",
    "return_tokens_as_token_ids",
    "return_token_ids",
    "return_weight_versions",
    "routed_experts_prompt_start",
    "return_token_offsets",
    "return_prompt_text",
    "cache_salt",
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
    "model",
    "add_special_tokens",
    "metadata",
    "service_tier",
    "store",
    "regex",
    "ebnf",
    "json_schema",
    "stop_regex",
    "no_stop_trim",
    "lora_path",
    "session_params",
    "custom_logit_processor",
    "custom_params",
    "rid",
    "extra_key",
    "return_hidden_states",
    "return_cached_tokens_details",
    "custom_labels",
    "safety_identifier",
    "prompt_cache_key",
]
CHAT_ONLY = [
    "messages",
    "top_logprobs",
    "max_completion_tokens",
    "tools",
    "tool_choice",
    "reasoning_effort",
    "thinking_token_budget",
    "include_reasoning",
    "parallel_tool_calls",
    "echo",
    "add_generation_prompt",
    "continue_final_message",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "mm_payload",
    "return_mm_kwargs",
    "separate_reasoning",
    "stream_reasoning",
    "modalities",
    "audio",
    "prediction",
    "web_search_options",
    "verbosity",
    "functions",
    "function_call",
]
COMPLETION_ONLY = ["prompt", "echo", "suffix", "prompt_embeds", "best_of"]
EMBEDDING = [
    *["input", "messages", "model", "encoding_format", "embed_dtype", "endianness", "dimensions", "user"],
    *["truncate_prompt_tokens", "truncation_side", "padding", "request_id", "priority", "cache_salt"],
    *["use_activation", "add_special_tokens", "chat_template", "chat_template_kwargs", "add_generation_prompt"],
]
SCORE = [
    *["model", "queries", "documents", "items", "text_1", "text_2", "data_1", "data_2", "user", "use_activation"],
    *["truncate_prompt_tokens", "truncation_side", "max_tokens_per_query", "max_tokens_per_doc", "instruction"],
    *["priority", "request_id", "mm_processor_kwargs", "cache_salt", "add_special_tokens", "chat_template"],
]
TOKENIZE = [
    *["model", "prompt", "messages", "add_special_tokens", "return_token_strs", "add_generation_prompt", "tools"],
    *["continue_final_message", "chat_template", "chat_template_kwargs", "mm_processor_kwargs", "user"],
]


def chat(**changes: object) -> ChatRequest:
    return read_chat(json.dumps({**CHAT, **changes}).encode())


def completion(**changes: object) -> CompletionRequest:
    return read_completion(json.dumps({**COMPLETION, **changes}).encode())


def refused(call: Any, **changes: object) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        call(**changes)
    return caught.value


def test_every_known_field_is_in_exactly_one_place() -> None:
    for fields, model, refusals in (
        (SAMPLING + CHAT_ONLY, ChatRequest, CHAT_REFUSED),
        (SAMPLING + COMPLETION_ONLY, CompletionRequest, COMPLETION_REFUSED),
        (EMBEDDING, EmbeddingRequest, EMBEDDING_REFUSED),
        (SCORE, ScoreRequest, SCORE_REFUSED),
        (TOKENIZE, TokenizeRequest, TOKENIZE_REFUSED),
        (["model", "tokens"], DetokenizeRequest, DETOKENIZE_REFUSED),
    ):
        for name in fields:
            places = [name in model.model_fields, name in refusals, name in WITHOUT_EFFECT]
            assert sum(places) == 1, name
        for name in [*refusals, *WITHOUT_EFFECT]:
            assert name not in model.model_fields, name


@pytest.mark.parametrize("name", sorted(CHAT_REFUSED))
def test_a_refused_field_is_named_and_its_neutral_values_pass(name: str) -> None:
    error = refused(chat, **{name: {"surely": "not neutral"}})
    assert error.param == name
    assert f"'{name}' is not honoured: " in error.message
    for neutral in (None, *CHAT_REFUSED[name].neutral):
        chat(**{name: neutral})


def test_fields_without_effect_take_what_asks_for_nothing_and_are_refused_by_name_for_the_rest() -> None:
    taken: dict[str, list[Any]] = {
        "user": ["me"], "metadata": [{"a": "b"}, {}], "service_tier": ["auto", "default"], "store": [False],
        "safety_identifier": ["me"], "prompt_cache_key": ["k"], "prompt_cache_retention": ["24h"],
        "session_id": ["s"], "prediction": [{"type": "content", "content": "x"}],
    }  # fmt: skip
    assert taken.keys() == WITHOUT_EFFECT.keys()
    for name, values in taken.items():
        for value in (None, *values):
            assert chat(**{name: value}) == chat()
        for value in (5, True, [1], *(["priority", "flex", "x"] if name in ("service_tier", "store") else [])):
            error = refused(chat, **{name: value})
            assert (error.param, f"'{name}' must be " in error.message) == (name, True)
    assert "only those of /v1/responses can be kept" in refused(chat, store=True).message
    assert refused(chat, service_tier="flex").message == (
        "'service_tier' must be 'auto', 'default' or 'standard_only': there is one tier."
    )
    everywhere = {name for each in ENDPOINTS for name in each.without_effect}
    assert everywhere == IDLE.keys()


def test_what_is_guessed_at_is_honoured() -> None:
    assert refused(chat, logits_processors=[]).message == "Unknown field 'logits_processors'."


def test_where_no_text_is_written_only_what_says_who_asks_is_without_effect() -> None:
    asks = (
        (read_tokenize, {"prompt": "x"}),
        (read_detokenize, {"tokens": [1]}),
        (read_score, {"model": "m", "queries": "x", "documents": "y"}),
    )
    for read, body in asks:
        read(json.dumps({**body, "user": "me", "metadata": {}}).encode())
        for name in WITHOUT_EFFECT.keys() - OF_CALLERS.keys():
            with pytest.raises(BadRequest) as caught:
                read(json.dumps({**body, name: "x"}).encode())
            assert caught.value.param == name
    batch = {"input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "24h"}
    assert read_create(json.dumps({**batch, "metadata": {"a": "b"}}).encode()).metadata == {"a": "b"}
    for name in WITHOUT_EFFECT.keys() - {"metadata"}:
        with pytest.raises(BadRequest) as caught:
            read_create(json.dumps({**batch, name: "x"}).encode())
        assert caught.value.param == name


@pytest.mark.parametrize("field", sorted(ChatRequest.model_fields.keys() - {"model", "messages"}))
def test_null_is_the_default_everywhere(field: str) -> None:
    assert chat(**{field: None}) == chat()


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("temperature", [0, 2, 0.5], [-0.1, 2.1, "1", True, float("nan"), float("inf")]),
        ("top_p", [0.01, 1], [0, 1.1, float("nan")]),
        ("top_k", [-1, 0, 1_000_000], [-2, 1_000_001, 1.5, 2**70]),
        ("min_p", [0, 1], [-0.1, 1.1]),
        ("repetition_penalty", [0.001, 10, 1000], [0, 1e-38, 0.0009, 1000.1]),
        ("presence_penalty", [-2, 2], [-2.1, 2.1, float("-inf")]),
        ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
        ("n", [1, 16], [0, 17, "2", 1.5, True]),
        ("seed", [-(2**63), 2**63 - 1], [2**63, 1.5, 10**300]),
        ("max_tokens", [1, 2**31 - 1], [0, -1, 2**31, "5", 10.5]),
        ("max_completion_tokens", [1], [0]),
        ("min_tokens", [0], [-1]),
        ("stop", ["a", ["a"] * 16, "é" * 128, []], ["", [""], ["a"] * 17, "é" * 128 + "a", [1], {"a": 1}]),
        ("stop_token_ids", [[0], []], [[-1], ["1"], list(range(65))]),
        (
            "logit_bias",
            [{}, {"0": 100, "5": -100}],
            [{"05": 1, "5": 1}, {"a": 1}, {"-1": 1}, {"1": 101}, {"1": "1"}, [1]],
        ),
        (
            "logit_bias",
            [{str(i): 1 for i in range(1024)}],
            [{str(i): 1 for i in range(1025)}, {"1": float("nan")}],
        ),
        ("stream", [True, False], ["true", 1]),
        ("model", ["m", "a" * 256], ["", "a" * 257, 1, None]),
        ("chat_template_kwargs", [{}, {"enable_thinking": False}], [[], {str(i): 1 for i in range(65)}]),
    ],
)
def test_bounds(field: str, good: list[object], bad: list[object]) -> None:
    for value in good:
        chat(**{field: value})
    for value in bad:
        error = refused(chat, **{field: value})
        assert error.param is not None
        assert error.param.startswith(field), (value, error.message)
        assert error.message.startswith(f"'{field}"), (value, error.message)


def test_top_logprobs_need_logprobs_and_stay_in_bounds() -> None:
    assert chat(logprobs=True, top_logprobs=20).wanted_logprobs == 20
    assert chat(logprobs=True).wanted_logprobs == 0
    assert chat().wanted_logprobs is None
    assert refused(chat, logprobs=True, top_logprobs=21).param == "top_logprobs"
    assert refused(chat, top_logprobs=3).param == "top_logprobs"
    assert refused(completion, logprobs=21).param == "logprobs"


def test_fields_that_must_agree() -> None:
    assert chat(max_tokens=5, max_completion_tokens=5).asked_tokens == 5
    assert refused(chat, max_tokens=5, max_completion_tokens=6).param == "max_tokens"
    assert refused(chat, min_tokens=6, max_tokens=5).param == "min_tokens"
    assert refused(chat, stream_options={"include_usage": True}).param == "stream_options"
    assert refused(chat, stream=True, stream_options={"usage": True}).param == "stream_options.usage"
    assert refused(chat, continue_final_message=True, add_generation_prompt=True).param == "continue_final_message"
    assert completion(echo=True, logprobs=1, prompt_logprobs=3).scored_prompt == 3
    assert completion().asked_tokens == 16
    assert chat().asked_tokens is None


def test_messages() -> None:
    def message(**fields: object) -> dict[str, Any]:
        return chat(messages=[{"role": "user", "content": "x", **fields}]).messages[0].for_template()

    assert message(role="developer") == {"role": "system", "content": "x"}
    assert message(content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])["content"] == "a\nb"
    assert message(role="tool", tool_call_id="1", name="f") == {
        "role": "tool",
        "content": "x",
        "tool_call_id": "1",
        "name": "f",
    }
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
    called = message(role="assistant", content=None, tool_calls=calls, refusal=None, audio=None, annotations=[])
    assert called["content"] == ""
    assert called["tool_calls"] == [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    ]
    for broken in ("[1]", '{"a": '):  # a model's own words: they are shown, not refused
        calls[0]["function"] = {"name": "f", "arguments": broken}
        again = message(role="assistant", content=None, tool_calls=calls)["tool_calls"][0]
        assert again["function"]["arguments"] == broken
    assert message(role="assistant", reasoning="r")["reasoning_content"] == "r"
    for fields, param in (
        ({"content": None}, "messages[0]"),
        ({"content": 5}, "messages[0].content"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages[0].content"),
        ({"role": "robot"}, "messages[0].role"),
        ({"colour": 1}, "messages[0].colour"),
        ({"tool_calls": calls}, "messages[0]"),
        ({"audio": {"id": "1"}}, "messages[0].audio"),
    ):
        assert refused(message, **fields).param == param, fields
    assert refused(chat, messages=[]).param == "messages"
    assert refused(chat, messages=[{"role": "user", "content": ""}] * 1025).param == "messages"
    assert len(chat(messages=[{"role": "user", "content": ""}] * 1024).messages) == 1024


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_in_their_four_forms(prompt: object, expected: object) -> None:
    assert completion(prompt=prompt).prompt == expected


@pytest.mark.parametrize("prompt", [None, 5, [], [1, "a"], [1.5], [-1], [[1], "a"], [True], ["a"] * 65, {}])
def test_a_prompt_in_no_form_is_refused(prompt: object) -> None:
    assert refused(completion, prompt=prompt).param == "prompt"


def test_several_prompts_times_n_are_bounded() -> None:
    completion(prompt=["a"] * 4, n=16)
    assert refused(completion, prompt=["a"] * 5, n=16).param == "n"


def test_a_missing_field_is_named() -> None:
    with pytest.raises(BadRequest, match="'messages' is required"):
        read_chat(b'{"model": "m"}')


@pytest.mark.parametrize(
    ("name", "guess"), [("temprature", "temperature"), ("max_token", "max_tokens"), ("toolz", "tools")]
)
def test_an_unknown_field_is_guessed(name: str, guess: str) -> None:
    error = refused(chat, **{name: 1})
    assert error.message == f"Unknown field '{name}'. Did you mean '{guess}'?"
    assert error.param == name


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"null", "JSON object"),
        (b"{'a': 1}", "not valid JSON (line 1, column 2)"),
        (b'{"a": ' + b"[" * 256 + b"]" * 256 + b"}", "256 levels"),
        (b"[" * 200_000, "256 levels"),
        (b'{"model": "' + b"\xff" + b'"}', "UTF-8"),
        (b'{"model": "\\ud800", "messages": []}', "UTF-8"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "too long"),
    ],
)
def test_a_body_that_is_no_json_object(body: bytes, words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read_chat(body)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("body", "key"),
    [
        (b'{"model":"a","model":"b","prompt":"x"}', "model"),
        (b'{"model":"a","prompt":"x","\\u006dodel" \n: "b"}', "model"),
        (b'{"model":"a","prompt":"x","logit_bias":{"5":1,"5":-1}}', "5"),
        (b'{"model":"a","prompt":"x","n":1,"n":NaN}', "n"),
    ],
)
def test_a_key_that_is_there_twice_is_named(body: bytes, key: str) -> None:
    with pytest.raises(BadRequest, match=f"'{key}' twice"):
        read_completion(body)


def test_text_that_looks_like_keys_is_text() -> None:
    text = '{"a": 1, "a": 2} ": '
    assert read_completion(json.dumps({**COMPLETION, "prompt": text}).encode()).prompt == [text]


@pytest.mark.parametrize(("number", "shown"), [("1e9", "exponent: 1000000000."), ("1.5", "number, not 1.5.")])
def test_a_number_that_is_not_whole_is_shown_plainly(number: str, shown: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read_completion(f'{{"model":"a","prompt":"x","max_tokens":{number}}}'.encode())
    assert caught.value.message.endswith(shown)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"echo": True, "use_beam_search": True},
        {"echo": True, "script": "a"},
        {"echo": True, "structured_outputs": {"regex": "a"}},
    ],
)
def test_no_tokens_are_for_the_prompts_own_sake(more: dict[str, Any]) -> None:
    assert refused(completion, max_tokens=0, **more).param == "max_tokens"


def test_no_tokens_may_be_asked_for_beside_an_echo() -> None:
    assert completion(max_tokens=0, echo=True, logprobs=1, response_format={"type": "text"}).asked_tokens == 0
    assert completion(max_tokens=0, prompt_logprobs=0).asked_tokens == 0
    assert refused(completion, max_tokens=0, echo=True, best_of=2).param == "best_of"
    assert refused(completion, max_tokens=0, echo=True, min_tokens=1).param == "min_tokens"


@pytest.mark.parametrize("kind", ["function", "allowed_tools"])
def test_a_choice_of_tools_keeps_what_is_known_of_it(kind: str) -> None:
    named = {"type": "function", "foo": 1, "function": {"name": "f", "foo": 1}}
    choice = named if kind == "function" else {"type": kind, kind: {"mode": "auto", "foo": 1, "tools": [named]}}
    body = {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": choice}
    with pytest.raises(BadRequest, match=r"'tool_choice.*\.foo' is not a field"):
        read_chat(json.dumps(body).encode())
    assert read_chat(json.dumps(body).encode(), ignore_unknown=True).allowed_names == ("f",)


@pytest.mark.parametrize(
    ("read", "body", "said"),
    [
        (read_chat, {**CHAT, "stop": 5}, "'stop' must be a string or a list of strings."),
        (read_chat, {**CHAT, "messages": [{"role": "user", "content": ["x"]}]}, "text parts, which are objects."),
        (read_chat, {**CHAT, "logit_bias": {"5": 200}}, "as that of 5 is not."),
        (read_chat, {**CHAT, "stream": True, "stream_options": {"include_obfuscation": True}}, "must be false."),
        (read_response, {"model": "m", "input": 5}, "'input' must be a string or a list of items."),
        (read_messages, {**CHAT, "max_tokens": 1, "system": 5}, "'system' must be a string or a list."),
        (
            read_messages,
            {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": []}]},
            "'messages[0].content' must have at least 1 item.",
        ),
        (read_messages, {**CHAT, "max_tokens": 1, "output_format": {}}, "send that."),
        (read_score, {"model": "m", "queries": "x", "documents": []}, "'documents' must not be empty."),
        (read_chat, {**CHAT, "stream_reasoning": False}, "not honoured: it is not offered by this version."),
    ],
)
def test_what_a_field_may_be_is_said_in_full(read: Any, body: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read(json.dumps(body).encode())
    assert caught.value.message.endswith(said)


def test_what_a_client_parsed_belongs_to_an_answer() -> None:
    assert refused(chat, messages=[{"role": "user", "content": "x", "parsed": {"a": 1}}]).param == "messages[0]"


def test_an_unknown_part_is_named_without_its_value() -> None:
    said = refused(completion, repetition_detection={"max_pattern_size": 1, "min_count": 2, "x": 1}).message
    assert said == "'repetition_detection.x' is not a field of this object."


def test_a_body_of_allowed_depth_is_read() -> None:
    deep = json.dumps({**CHAT, "metadata": "METADATA"}).replace(
        '"METADATA"', '{"a":' + "[" * 254 + "]" * 254 + "}"
    )
    read_chat(deep.encode())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=examples(400), deadline=None)
@given(st.dictionaries(st.sampled_from(SAMPLING + CHAT_ONLY + COMPLETION_ONLY), JSON, max_size=4), JSON, JSON)
def test_whatever_comes_it_is_a_request_or_a_bad_request(fields: dict[str, Any], first: Any, second: Any) -> None:
    for read, base in (
        (read_chat, {**CHAT, "messages": [first]}),
        (read_completion, {**COMPLETION, "prompt": second}),
    ):
        for body in ({**base, **fields}, {**(CHAT if read is read_chat else COMPLETION), **fields}, fields):
            said = "."
            try:
                read(json.dumps(body).encode("utf-8", "surrogatepass"))
            except BadRequest as error:
                said = error.message
            assert said.endswith((".", "?"))
            assert "pydantic" not in said


@settings(max_examples=examples(200), deadline=None)
@given(st.binary(max_size=60))
def test_random_bytes_are_a_bad_request(body: bytes) -> None:
    with pytest.raises(BadRequest):
        read_chat(body)
