"""`quire.LLM` and the HTTP API, asked the same: the same tokens, text, numbers and refusals."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from tests.integration.engine_process import engine_running
from tests.integration.router_world import World

from quire import LLM, BeamSearchParams, RequestOutput, SamplingParams
from quire.text import ParamRefused
from quire_schemas import wire

TEXT = "The scheduler gives each request a share of the step."
ASK: list[dict[str, Any]] = [{"role": "user", "content": "What is PagedAttention?"}]
SUM: list[dict[str, Any]] = [{"role": "user", "content": "What is 17 + 25?"}]
THINK, UNTHINK = 2042, 2043


@pytest.fixture(scope="module")
def engine_spec() -> Iterator[wire.EngineSpec]:
    with engine_running(replica_id="offline", num_blocks=64, max_num_batched_tokens=128) as spec:
        yield spec


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("builtin://tiny", dtype="float32", max_model_len=512, num_blocks=64, max_num_seqs=8, threads=1)


@pytest.fixture
async def http(world: World, engine_spec: wire.EngineSpec, llm: LLM) -> AsyncIterator[httpx.AsyncClient]:
    await world.serve_process(engine_spec)
    async with httpx.AsyncClient(base_url=world.url, timeout=60) as client:
        yield client
    assert not llm.engine.has_work
    assert llm.engine.stats().blocks_used == 0
    llm.engine.check_integrity()


async def asked(
    http: httpx.AsyncClient, llm: LLM, prompt: Any, fields: dict[str, Any]
) -> tuple[Any, RequestOutput]:
    """The HTTP answer and the one of `llm`; a list of messages is a chat, anything else a completion."""
    body: dict[str, Any] = {"model": "tiny", "return_token_ids": True, **fields}
    if isinstance(prompt, list):
        if "logprobs" in body:
            body.update(logprobs=True, top_logprobs=body["logprobs"])
        body["separate_reasoning"] = False  # in one process the text is as the model writes it
        answer = await http.post("/v1/chat/completions", json={**body, "messages": prompt})
        (output,) = llm.chat(prompt, SamplingParams(**fields))
    else:
        answer = await http.post("/v1/completions", json={**body, "prompt": prompt})
        (output,) = llm.generate(prompt, SamplingParams(**fields))
    assert answer.status_code == 200, answer.text
    return answer.json(), output


def same(body: Any, output: RequestOutput) -> None:
    """All of what both can tell is the same."""
    whole = body if "prompt_token_ids" in body else body["choices"][0]
    assert whole["prompt_token_ids"] == output.prompt_token_ids
    assert [numbers(entry) for entry in whole.get("prompt_logprobs") or ()] == [
        numbers(entry) for entry in output.prompt_logprobs or ()
    ]
    assert len(body["choices"]) == len(output.outputs)
    for choice, made in zip(body["choices"], output.outputs, strict=True):
        stop = [] if made.stop_token_id is None else [made.stop_token_id]
        assert choice["token_ids"] == [*made.token_ids, *stop]
        assert (choice["message"]["content"] if "message" in choice else choice["text"]) == made.text
        assert choice["finish_reason"] == made.finish_reason
        if made.logprobs is None:
            assert choice["logprobs"] is None
            continue
        found = choice["logprobs"].get("token_logprobs")
        if found is None:
            found = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        values = [entry[token].logprob for entry, token in zip(made.logprobs, made.token_ids, strict=True)]
        assert found == pytest.approx([value if math.isfinite(value) else -9999.0 for value in values], abs=2e-4)


def numbers(entry: Any) -> Any:
    """A position of a prompt's log-probabilities, in a form that both have."""
    if entry is None:
        return None
    values = {
        int(token): (score["rank"], score["logprob"]) if isinstance(score, dict) else (score.rank, score.logprob)
        for token, score in entry.items()
    }
    return {token: (rank, pytest.approx(value, abs=2e-4)) for token, (rank, value) in values.items()}


GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 16}
DRAWN: dict[str, Any] = {"temperature": 0.9, "seed": 11, "max_tokens": 10, "ignore_eos": True}
CASES: list[tuple[str, Any, dict[str, Any], dict[str, Any]]] = [
    ("drawn", TEXT, DRAWN, {"n": 3, "seed": 7}),
    ("filters", TEXT, DRAWN, {"top_p": 0.8, "top_k": 3, "min_p": 0.05}),
    ("penalties", ASK, GREEDY, {"repetition_penalty": 1.9, "presence_penalty": 1, "frequency_penalty": 1.5}),
    ("bias", TEXT, GREEDY, {"logit_bias": {300: 60, 301: 60}}),
    ("allowed", TEXT, DRAWN, {"allowed_token_ids": [300, 301, 302]}),
    ("bad words", ASK, GREEDY, {"bad_words": ["PagedAttention", "the", "\n"]}),
    ("bad words, drawn", TEXT, DRAWN, {"bad_words": ["e", "a", "."]}),
    ("thinking", SUM, {**GREEDY, "max_tokens": 120}, {"thinking_token_budget": 4}),
    ("thinking, drawn", SUM, {**DRAWN, "max_tokens": 24}, {"thinking_token_budget": 0, "n": 2}),
    (
        "repetition",
        TEXT,
        {**GREEDY, "ignore_eos": True, "allowed_token_ids": [70, 80]},
        {"repetition_detection": {"max_pattern_size": 3, "min_count": 3}},
    ),
    ("truncated", TEXT, DRAWN, {"truncate_prompt_tokens": 4}),
    ("truncated on the right", TEXT, DRAWN, {"truncate_prompt_tokens": 4, "truncation_side": "right"}),
    ("truncated chat", ASK, DRAWN, {"truncate_prompt_tokens": 9}),
    ("raw logits", TEXT, DRAWN, {"logprobs": 3, "prompt_logprobs": 2, "logprobs_mode": "raw_logits"}),
    ("processed", TEXT, DRAWN, {"logprobs": 3, "top_k": 2, "logprobs_mode": "processed_logprobs"}),
    ("processed logits", ASK, DRAWN, {"logprobs": 3, "top_k": 2, "logprobs_mode": "processed_logits"}),
    ("raw, with a named id", ASK, DRAWN, {"logprobs": 0, "logprob_token_ids": [9], "prompt_logprobs": 1}),
    ("stop string", ASK, GREEDY, {"stop": ["the"], "min_tokens": 3}),
    ("stop string kept", ASK, GREEDY, {"stop": "the", "include_stop_str_in_output": True}),
    ("special tokens", SUM, {**GREEDY, "max_tokens": 60}, {"skip_special_tokens": False}),
    (
        "structured",
        TEXT,
        DRAWN,
        {"structured_outputs": {"choice": ["tea", "coffee", "water"]}, "ignore_eos": False},
    ),
]


@pytest.mark.parametrize(
    ("prompt", "plain", "fields"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
async def test_what_is_asked_is_done_alike(
    http: httpx.AsyncClient, llm: LLM, prompt: Any, plain: dict[str, Any], fields: dict[str, Any]
) -> None:
    body, output = await asked(http, llm, prompt, {**plain, **fields})
    same(body, output)
    without = (llm.chat if isinstance(prompt, list) else llm.generate)(prompt, SamplingParams(**plain))
    assert without[0] != output, "what was asked for changed something"


async def test_a_stop_token_is_in_the_text_of_both_or_of_neither(http: httpx.AsyncClient, llm: LLM) -> None:
    (free,) = llm.generate(TEXT, SamplingParams(**GREEDY, ignore_eos=True))
    stop = free.outputs[0].token_ids[5]
    texts = []
    for include in (False, True):
        body, output = await asked(
            http, llm, TEXT, {**GREEDY, "stop_token_ids": [stop], "include_stop_str_in_output": include}
        )
        same(body, output)
        texts.append(output.outputs[0].text)
        assert output.outputs[0].stop_reason == stop
    assert texts[1] == texts[0] + llm.tokenizer.token_text(stop)


async def test_a_prompt_is_cut_to_the_room_there_is(http: httpx.AsyncClient, llm: LLM) -> None:
    body, output = await asked(http, llm, TEXT * 60, {**GREEDY, "truncate_prompt_tokens": -1})
    same(body, output)
    assert len(output.prompt_token_ids) == 512 - 16
    assert output.prompt == TEXT * 60, "as it was given"


async def test_what_each_parameter_does_shows(llm: LLM) -> None:
    word = llm.chat(ASK, SamplingParams(**GREEDY))[0].outputs[0].text.split()[2]
    text = llm.chat(ASK, SamplingParams(**GREEDY, bad_words=[word]))[0].outputs[0].text
    assert word not in text.split()
    thought = SamplingParams(temperature=0, max_tokens=120, thinking_token_budget=4, detokenize=False)
    ids = llm.chat(SUM, thought)[0].outputs[0].token_ids
    assert ids.index(UNTHINK) - ids.index(THINK) == 5
    rule = {"max_pattern_size": 3, "min_count": 3}
    few = SamplingParams(temperature=0, max_tokens=30, allowed_token_ids=[70], repetition_detection=rule)
    (output,) = llm.generate(TEXT, few)
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == ([70] * 3, "repetition")
    modes = {}
    for mode in ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"):
        params = SamplingParams(max_tokens=1, temperature=0.5, seed=3, top_k=4, logprobs=8, logprobs_mode=mode)
        answer = llm.generate(TEXT, params)[0].outputs[0]
        assert answer.logprobs is not None
        modes[mode] = [entry.logprob for entry in answer.logprobs[0].values()][:8]
        assert (answer.cumulative_logprob is None) == mode.endswith("logits"), (
            "logits have no sum that says a thing"
        )
    assert math.fsum(map(math.exp, modes["processed_logprobs"])) == pytest.approx(1, abs=1e-4)
    assert modes["processed_logprobs"][4:] == [-math.inf] * 4
    assert [v / 0.5 for v in modes["raw_logits"][:4]] == pytest.approx(modes["processed_logits"][:4], abs=1e-3)
    gaps = [a - b for a, b in zip(modes["raw_logits"], modes["raw_logprobs"], strict=True)]
    assert gaps == pytest.approx([gaps[0]] * 8, abs=1e-3)


async def test_a_beam_search_finds_the_same_texts(http: httpx.AsyncClient, llm: LLM) -> None:
    (free,) = llm.beam_search(TEXT, BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True))
    stop = free.outputs[0].token_ids[3]
    fields: dict[str, Any] = {
        "max_tokens": 8,
        "min_tokens": 2,
        "length_penalty": 0.5,
        "stop_token_ids": [stop],
        "include_stop_str_in_output": True,
    }
    body = {"model": "tiny", "prompt": TEXT, "use_beam_search": True, "n": 3, "return_token_ids": True, **fields}
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    (output,) = llm.beam_search(TEXT, BeamSearchParams(beam_width=3, **fields))
    same(answer.json(), output)
    assert stop in [made.stop_reason for made in output.outputs]
    assert output.outputs != free.outputs


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("bad_words", {"bad_words": "page"}),
    ("bad_words", {"bad_words": [""]}),
    ("bad_words", {"bad_words": [5]}),
    ("thinking_token_budget", {"thinking_token_budget": -1}),
    ("thinking_token_budget", {"thinking_token_budget": "all"}),
    ("repetition_detection.min_count", {"repetition_detection": {"max_pattern_size": 2}}),
    ("repetition_detection.min_count", {"repetition_detection": {"max_pattern_size": 2, "min_count": 1}}),
    ("repetition_detection.size", {"repetition_detection": {"max_pattern_size": 2, "min_count": 2, "size": 1}}),
    (
        "repetition_detection",
        {"repetition_detection": {"max_pattern_size": 2, "min_pattern_size": 3, "min_count": 2}},
    ),
    ("repetition_detection", {"repetition_detection": 3}),
    ("truncate_prompt_tokens", {"truncate_prompt_tokens": 0}),
    ("truncate_prompt_tokens", {"truncate_prompt_tokens": -2}),
    ("truncate_prompt_tokens", {"truncate_prompt_tokens": "all"}),
    ("truncation_side", {"truncation_side": "left"}),
    ("truncation_side", {"truncate_prompt_tokens": 3, "truncation_side": "middle"}),
    ("logprobs_mode", {"logprobs_mode": "raw"}),
    ("logprobs_mode", {"logprobs_mode": 1}),
    ("logprobs_mode", {"logprobs_mode": "raw_logits"}),
    ("stop_token_ids", {"stop_token_ids": [2048]}),
    ("stop_token_ids", {"stop_token_ids": [1.5]}),
    ("stop_token_ids", {"stop_token_ids": 5}),
    ("logit_bias", {"logit_bias": {2048: 1}}),
    ("logit_bias", {"logit_bias": [1]}),
    ("allowed_token_ids", {"allowed_token_ids": [2048]}),
    ("structured_outputs", {"structured_outputs": {}}),
    ("structured_outputs", {"structured_outputs": "json"}),
    ("min_tokens", {"min_tokens": 600, "max_tokens": None}),
    ("prompt_logprob_start", {"prompt_logprob_start": 2}),
    ("flat_logprobs", {"flat_logprobs": True}),
    ("skip_reading_prefix_cache", {"skip_reading_prefix_cache": True}),
    ("trace_decode_token_ids", {"trace_decode_token_ids": True}),
    ("watermarking", {"watermarking": True}),
]


async def test_what_cannot_be_honoured_is_refused_alike_and_leaves_nothing(
    http: httpx.AsyncClient, llm: LLM
) -> None:
    steps = llm.engine.steps
    for param, fields in REFUSED:
        for path, prompt in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": ASK})):
            answer = await http.post(f"/v1/{path}", json={"model": "tiny", **prompt, **fields})
            error = answer.json()["error"]
            assert answer.status_code == 400, (fields, error)
            assert error["param"].partition("[")[0] == param, (fields, error)
        with pytest.raises((TypeError, ValueError, ParamRefused)) as caught:
            # a neighbour that is fine is not begun either
            llm.generate(["a", "b"], [SamplingParams(**GREEDY), SamplingParams(**fields)])
        assert param in str(caught.value), fields
        assert not llm.engine.has_work, fields
    assert llm.engine.steps == steps


async def test_an_answer_without_a_token_to_choose_names_the_reasons(http: httpx.AsyncClient, llm: LLM) -> None:
    fields: dict[str, Any] = {
        "allowed_token_ids": [70],
        "bad_words": [llm.tokenizer.token_text(70)],
        "max_tokens": 2,
    }
    answer = await http.post("/v1/completions", json={"model": "tiny", "prompt": "a", **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "allowed_token_ids"
    bad, good = llm.generate(["a", "b"], [SamplingParams(**fields), SamplingParams(**GREEDY)])
    assert bad.outputs[0].finish_reason == "error"
    assert bad.outputs[0].error == "allowed_token_ids with bad_words leaves no token to choose"
    assert good.outputs[0].finish_reason in ("stop", "length")
