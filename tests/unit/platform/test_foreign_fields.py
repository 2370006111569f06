"""Fields that clients of vLLM and SGLang send: each is honoured, refused by name, or on the list of those without
effect, at every endpoint that there knows it. None is taken for a slip.
"""

from __future__ import annotations

import json
from typing import Final

import pytest

from quire.router.openapi import ENDPOINTS
from quire_schemas.openai.body import WITHOUT_EFFECT, BadRequest, read

SAMPLING: Final = (
    "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty", "response_format",
    "seed", "stop", "stream", "stream_options", "temperature", "top_p", "user", "use_beam_search", "top_k",
    "min_p", "repetition_penalty", "watermarking", "length_penalty", "stop_token_ids",
    "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens",
    "spaces_between_special_tokens", "truncate_prompt_tokens", "truncation_side", "prompt_logprobs",
    "logprob_token_ids", "allowed_token_ids", "bad_words", "thinking_token_budget", "repetition_detection",
    "stream_interval", "structured_outputs",
)  # fmt: skip
EXTRAS: Final = (
    "echo", "add_special_tokens", "priority", "request_id", "session_id", "return_tokens_as_token_ids",
    "return_token_ids", "return_weight_versions", "routed_experts_prompt_start", "return_token_offsets",
    "return_prompt_text", "cache_salt", "kv_transfer_params", "ec_transfer_params", "vllm_xargs",
)  # fmt: skip
CHAT: Final = (
    "messages", "top_logprobs", "max_completion_tokens", "tools", "tool_choice", "reasoning_effort",
    "include_reasoning", "parallel_tool_calls", "add_generation_prompt", "continue_final_message", "documents",
    "chat_template", "chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs", "mm_payload",
    "return_mm_kwargs",
)  # fmt: skip
ENGINE: Final = (
    "prompt_logprob_token_ids", "prompt_logprob_start", "flat_logprobs", "detokenize", "output_kind",
    "extra_args", "skip_reading_prefix_cache", "trace_decode_token_ids",
)  # fmt: skip
SGLANG: Final = (
    "regex", "ebnf", "json_schema", "stop_regex", "no_stop_trim", "lora_path", "session_params",
    "separate_reasoning", "stream_reasoning", "custom_logit_processor", "custom_params", "rid", "extra_key",
    "return_hidden_states", "return_cached_tokens_details", "custom_labels",
)  # fmt: skip
FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "/v1/chat/completions": (*SAMPLING, *EXTRAS, *CHAT, *ENGINE, *SGLANG),
    "/v1/completions": (*SAMPLING, *EXTRAS, *ENGINE, *SGLANG, "prompt", "suffix", "prompt_embeds"),
    "/v1/responses": (
        *SAMPLING, *EXTRAS, *CHAT, *ENGINE, *SGLANG, "background", "include", "input", "instructions",
        "max_output_tokens", "max_tool_calls", "metadata", "previous_response_id", "prompt", "reasoning",
        "service_tier", "store", "text", "truncation", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "safety_identifier", "enable_response_messages", "previous_input_messages",
    ),
    "/v1/embeddings": (
        "input", "messages", "encoding_format", "embed_dtype", "endianness", "dimensions", "user",
        "truncate_prompt_tokens", "truncation_side", "padding", "request_id", "priority", "cache_salt",
        "use_activation", "add_special_tokens", "chat_template", "chat_template_kwargs",
    ),
    "/v1/score": (
        "queries", "documents", "items", "text_1", "text_2", "data_1", "data_2", "max_tokens_per_query",
        "max_tokens_per_doc", "instruction", "user",
    ),
    "/tokenize": (
        "prompt", "messages", "add_special_tokens", "return_token_strs", "add_generation_prompt",
        "continue_final_message", "chat_template", "chat_template_kwargs", "tools",
    ),
    "/detokenize": ("tokens",),
    "/v1/messages": (
        "messages", "max_tokens", "metadata", "output_config", "thinking", "stop_sequences", "stream", "system",
        "temperature", "tool_choice", "tools", "top_k", "top_p", "cache_salt", "vllm_xargs",
        "chat_template_kwargs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("path", FIELDS)
def test_no_field_of_other_servers_is_unknown(path: str) -> None:
    (row,) = [each for each in ENDPOINTS if path in (each.path, *each.aliases) and "POST" in each.methods]
    assert row.request is not None
    unknown: list[str] = []
    for name in ("model", *FIELDS[path]):
        body = json.dumps({name: {"a": [1]}}).encode()  # of no type that any field has
        try:
            read(body, row.request, row.refused, without_effect=row.without_effect)
        except BadRequest as error:
            unknown += [name] if error.message.startswith("Unknown field") else []
    assert unknown == []


def test_a_field_that_nobody_has_is_unknown() -> None:
    (row,) = [each for each in ENDPOINTS if each.path == "/v1/responses"]
    assert row.request is not None
    with pytest.raises(BadRequest, match="Unknown field 'streaming_reasoning'"):
        read(b'{"streaming_reasoning": true}', row.request, row.refused, without_effect=WITHOUT_EFFECT)


@pytest.mark.parametrize(
    ("path", "name", "neutral", "asking"),
    [
        ("/v1/responses", "mm_payload", None, {"a": 1}),
        ("/v1/responses", "return_mm_kwargs", False, True),
        ("/v1/responses", "stream_reasoning", True, False),
        ("/v1/completions", "separate_reasoning", False, True),
        ("/v1/completions", "stream_reasoning", True, False),
    ],
)
def test_they_are_refused_by_name_unless_they_ask_for_nothing(
    path: str, name: str, neutral: object, asking: object
) -> None:
    (row,) = [each for each in ENDPOINTS if each.path == path and "POST" in each.methods]
    assert row.request is not None
    least = {"model": "m", "prompt": "x"} if path == "/v1/completions" else {"model": "m", "input": "x"}
    read(json.dumps({**least, name: neutral}).encode(), row.request, row.refused)
    with pytest.raises(BadRequest, match=f"'{name}' is not honoured"):
        read(json.dumps({**least, name: asking}).encode(), row.request, row.refused)
