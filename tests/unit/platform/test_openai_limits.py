"""The table of limits is what the shapes do: each limit is taken, and one more is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from quire.cli.reference import api_page
from quire_schemas.openai.body import BadRequest
from quire_schemas.openai.chat import read_chat
from quire_schemas.openai.completions import read_completion
from quire_schemas.openai.embeddings import read_embedding
from quire_schemas.openai.limits import LIMITS, Limit
from quire_schemas.openai.responses import read_response
from quire_schemas.openai.score import read_score

TURN = {"role": "user", "content": "x"}


def function(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def nested(levels: int) -> Any:
    return {"not": nested(levels - 1)} if levels > 1 else {}


def structures(count: int) -> list[Any]:
    return [{"begin": f"<{number}", "schema": {}, "end": ""} for number in range(count)]


def tag(begins: int, triggers: int) -> dict[str, Any]:
    return {"structural_tag": {"structures": structures(begins), "triggers": ["<"] * triggers}}


CHATS: dict[str, Callable[[int], dict[str, Any]]] = {
    "`messages`": lambda n: {"messages": [TURN] * n},
    "`chat_template_kwargs`": lambda n: {"chat_template_kwargs": {f"a{i}": 1 for i in range(n)}},
    "`top_logprobs`": lambda n: {"logprobs": True, "top_logprobs": n},
    "`tools`": lambda n: {"tools": [function(f"f{i}") for i in range(n)]},
    "`documents`": lambda n: {"documents": [{"text": "x"}] * n},
}
EMBEDDINGS: dict[str, Callable[[int], dict[str, Any]]] = {"`input`": lambda n: {"input": ["x"] * n}}
SCORES: dict[str, Callable[[int], dict[str, Any]]] = {
    "each side of a score": lambda n: {"queries": ["x"] * n, "documents": ["x"] * n}
}
RESPONSES: dict[str, Callable[[int], dict[str, Any]]] = {
    "`metadata` of a response": lambda n: {"metadata": {str(i): "x" for i in range(n)}}
}
COMPLETIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "a body": lambda n: {"metadata": nested(n - 1)},
    "`model`": lambda n: {"model": "m" * n},
    "`prompt`": lambda n: {"prompt": ["x"] * n},
    "`n`": lambda n: {"n": n},
    "`best_of`": lambda n: {"best_of": n},
    "`n`, or `best_of`, times the prompts": lambda n: {"n": 4, "prompt": ["x"] * -(-n // 4)},
    "`temperature`": lambda n: {"temperature": n},
    "`top_k`": lambda n: {"top_k": n},
    "`logit_bias`": lambda n: {"logit_bias": {str(i): 1 for i in range(n)}},
    "`allowed_token_ids`": lambda n: {"allowed_token_ids": [1] * n},
    "`bad_words`": lambda n: {"bad_words": ["x"] * n},
    "a word of `bad_words`": lambda n: {"bad_words": ["x" * n]},
    "`stop`": lambda n: {"stop": ["x"] * n},
    "a string of `stop`": lambda n: {"stop": "x" * n},
    "`stop_token_ids`": lambda n: {"stop_token_ids": [1] * n},
    "`repetition_detection.max_pattern_size`": lambda n: {
        "repetition_detection": {"max_pattern_size": n, "min_count": 2}
    },
    "`repetition_detection.min_count`": lambda n: {
        "repetition_detection": {"max_pattern_size": 1, "min_count": n}
    },
    "`logprobs` of completions": lambda n: {"logprobs": n},
    "`prompt_logprobs`": lambda n: {"prompt_logprobs": n},
    "`logprob_token_ids`": lambda n: {"logprobs": 1, "logprob_token_ids": [1] * n},
    "the text of a constraint": lambda n: {"structured_outputs": {"regex": "x" * n}},
    "a schema": lambda n: {"structured_outputs": {"json": nested(n)}},
    "`structured_outputs.choice`": lambda n: {"structured_outputs": {"choice": ["x"] * n}},
    "`structures` of a structural tag": lambda n: {"structured_outputs": tag(n, 1)},
    "`triggers` of a structural tag": lambda n: {"structured_outputs": tag(1, n)},
    "`cache_salt`": lambda n: {"cache_salt": "x" * n},
    "`timeout`": lambda n: {"timeout": n},
}


def read(limit: Limit, count: int) -> object:
    if limit.what in CHATS:
        body = {"model": "m", "messages": [TURN], **CHATS[limit.what](count)}
        return read_chat(json.dumps(body).encode())
    if limit.what in EMBEDDINGS:
        return read_embedding(json.dumps({"model": "m", **EMBEDDINGS[limit.what](count)}).encode())
    if limit.what in SCORES:
        return read_score(json.dumps({"model": "m", **SCORES[limit.what](count)}).encode())
    if limit.what in RESPONSES:
        return read_response(json.dumps({"model": "m", "input": "x", **RESPONSES[limit.what](count)}).encode())
    return read_completion(json.dumps({"model": "m", "prompt": "x", **COMPLETIONS[limit.what](count)}).encode())


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.what)
def test_a_limit_is_where_the_table_has_it(limit: Limit) -> None:
    read(limit, limit.most)
    with pytest.raises(BadRequest):
        read(limit, limit.most + 1)


def test_the_page_has_every_limit() -> None:
    lines = api_page().splitlines()
    assert "| a body | the Gateway's `maxBodySize`, 4,194,304 bytes by default; above it a 413 |" in lines
    assert all(any(line.startswith(f"| {limit.what} | {limit.most:,}") for line in lines) for limit in LIMITS)
    assert {limit.what for limit in LIMITS} == set().union(CHATS, EMBEDDINGS, COMPLETIONS, SCORES, RESPONSES)
