"""`from quire import LLM, SamplingParams`: batches on the built-in model in this process, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import quire
from quire import LLM, BeamSearchParams, RequestOutput, SamplingParams, builtin
from quire.llm import DoesNotFit
from quire.text import BadTokenizer, ParamRefused, Tokenizer
from quire_engine.errors import RequestRefused
from quire_schemas.wire import Sampling

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
ASK: list[dict[str, Any]] = [{"role": "user", "content": "What is PagedAttention?"}]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("builtin://tiny", dtype="float32", max_model_len=256, num_blocks=64, threads=1)


@pytest.fixture(autouse=True)
def _left_empty(llm: LLM) -> Any:
    yield
    assert not llm.engine.has_work
    assert llm.engine.stats().blocks_used == 0
    llm.engine.check_integrity()


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [answer.text for output in outputs for answer in output.outputs]


# ── prompts in, outputs in their order ────────────────────────────────────────────────────────────────────


def test_prompts_are_text_or_ids_alone_or_several(llm: LLM) -> None:
    said = ["When the", "A list is"]
    ids = [llm.tokenizer.encode(text) for text in said]
    by_text = llm.generate(said, GREEDY)
    assert [output.prompt for output in by_text] == said
    assert [output.prompt_token_ids for output in by_text] == ids
    assert all(output.finished for output in by_text)
    assert len({output.request_id for output in by_text}) == 2
    by_ids = llm.generate(ids, [GREEDY, SamplingParams(max_tokens=2, temperature=0)])
    assert [output.prompt for output in by_ids] == [None, None]
    assert by_ids[0].outputs[0].token_ids == by_text[0].outputs[0].token_ids
    assert by_ids[1].outputs[0].token_ids == by_text[1].outputs[0].token_ids[:2]
    assert [output.outputs[0].finish_reason for output in by_ids] == ["length", "length"]
    for output in by_text:
        assert output.outputs[0].text == llm.tokenizer.decode(output.outputs[0].token_ids)
    one: Any
    for one in ("When the", ids[0], {"prompt": "When the"}, {"prompt_token_ids": ids[0]}, [ids[0]]):
        assert texts(llm.generate(one, GREEDY)) == texts(by_text)[:1]
    assert llm.generate([], GREEDY) == []


def test_a_chat_is_rendered_as_the_router_renders_it(llm: LLM) -> None:
    prompt = llm.tokenizer.render(ASK)
    (output,) = llm.chat(ASK, GREEDY)
    assert (output.prompt, texts([output])) == (prompt, texts(llm.generate(prompt, GREEDY)))
    parts: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    several = llm.chat([ASK, parts], GREEDY)
    assert [output.prompt for output in several] == [prompt, prompt.replace("What is PagedAttention?", "Hi")]
    begun = [*ASK, {"role": "assistant", "content": "It is"}]
    (output,) = llm.chat(begun, GREEDY, continue_final_message=True)
    assert (output.prompt or "").endswith("It is")
    (output,) = llm.chat(ASK, GREEDY, add_generation_prompt=False)
    assert prompt.startswith(output.prompt or "?")
    assert output.prompt != prompt
    (output,) = llm.chat(ASK)  # the checkpoint advises greedy, and its answer ends
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_token_id in llm.profile.eos_token_ids
    assert output.outputs[0].stop_reason is None


@pytest.mark.parametrize(
    ("messages", "options", "words"),
    [
        ([{"role": "user"}], {}, "must have content"),
        ([{"role": "king", "content": "a"}], {}, "'messages[0].role' must be"),
        (ASK, {"chat_template_kwargs": {"messages": []}}, "'messages' may not be set"),
        (ASK, {"chat_template_kwargs": {"_x": 1}}, "'_x' may not be set"),
        (ASK, {"continue_final_message": True, "add_generation_prompt": True}, "exclude each other"),
    ],
)
def test_a_conversation_that_is_none_is_refused(llm: LLM, messages: Any, options: Any, words: str) -> None:
    with pytest.raises(ValueError) as error:
        llm.chat(messages, **options)
    assert words in str(error.value)


def test_several_answers_differ_repeat_and_share_their_prompt(llm: LLM) -> None:
    params = SamplingParams(n=3, max_tokens=12, temperature=1.5, seed=7, ignore_eos=True)
    (first,) = llm.generate("When the", params)
    assert [answer.index for answer in first.outputs] == [0, 1, 2]
    assert len({tuple(answer.token_ids) for answer in first.outputs}) == 3
    (again,) = llm.generate("When the", params)
    assert texts([again]) == texts([first])
    (alone,) = llm.generate("When the", SamplingParams(max_tokens=12, temperature=1.5, seed=8, ignore_eos=True))
    assert alone.outputs[0].token_ids == first.outputs[1].token_ids, "as the router numbers them"


def test_stop_strings_end_an_answer(llm: LLM) -> None:
    (plain,) = llm.generate("When the", GREEDY)
    text = plain.outputs[0].text
    stop = text[3:6]
    (cut,) = llm.generate("When the", SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, stop=stop))
    answer = cut.outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == (text[: text.index(stop)], "stop", stop)
    assert plain.outputs[0].token_ids[: len(answer.token_ids)] == answer.token_ids
    assert len(answer.token_ids) < 8
    kept = SamplingParams(max_tokens=8, temperature=0, stop=["§", stop], include_stop_str_in_output=True)
    assert texts(llm.generate("When the", kept)) == [text[: text.index(stop)] + stop]
    late = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, stop=stop, min_tokens=8)
    assert texts(llm.generate("When the", late)) == [text]
    token = plain.outputs[0].token_ids[2]
    (ended,) = llm.generate("When the", SamplingParams(max_tokens=8, temperature=0, stop_token_ids=[token]))
    assert (ended.outputs[0].stop_reason, ended.outputs[0].stop_token_id) == (token, token)


def test_logprobs_are_by_id_with_their_rank(llm: LLM) -> None:
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, logprobs=3)
    (output,) = llm.generate("When the", params)
    answer = output.outputs[0]
    assert answer.logprobs is not None
    assert [len(entry) for entry in answer.logprobs] == [3] * 4
    chosen = [entry[token] for entry, token in zip(answer.logprobs, answer.token_ids, strict=True)]
    assert [entry.rank for entry in chosen] == [1] * 4
    assert answer.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in chosen))
    assert "".join(entry.decoded_token or "" for entry in chosen) == answer.text
    (bare,) = llm.generate("When the", SamplingParams(max_tokens=4, temperature=0, logprobs=0, detokenize=False))
    assert bare.outputs[0].text == ""
    assert bare.outputs[0].logprobs is not None
    assert [(e.rank, e.decoded_token) for entry in bare.outputs[0].logprobs for e in entry.values()] == [
        (None, None)
    ] * 4
    assert (plain := llm.generate("When the", GREEDY)[0].outputs[0]).logprobs is None
    assert plain.cumulative_logprob is None


def test_log_probabilities_of_prompts_named_ids_and_the_whole_vocabulary(llm: LLM) -> None:
    params = SamplingParams(
        n=2, max_tokens=3, temperature=0, ignore_eos=True, prompt_logprobs=2, logprobs=0, logprob_token_ids=[9]
    )
    (output,) = llm.generate("When the moon", params)
    scores = output.prompt_logprobs
    assert scores is not None
    assert len(scores) == len(output.prompt_token_ids) > 2
    assert scores[0] is None
    for token, entry in zip(output.prompt_token_ids[1:], scores[1:], strict=True):
        assert entry is not None
        assert entry[token].rank is not None
        assert {9, token} <= set(entry)
    for answer in output.outputs:
        assert answer.logprobs is not None
        assert [9 in entry for entry in answer.logprobs] == [True] * 3
    (all_,) = llm.generate("When", SamplingParams(max_tokens=2, temperature=0, logprobs=-1))
    assert [len(entry) for entry in all_.outputs[0].logprobs or ()] == [2048] * len(all_.outputs[0].token_ids)
    assert all_.prompt_logprobs is None
    few = SamplingParams(max_tokens=6, temperature=2, ignore_eos=True, allowed_token_ids=[70, 80])
    assert set(llm.generate("When", few)[0].outputs[0].token_ids) <= {70, 80}


def test_a_second_prompt_finds_the_first_ones_blocks() -> None:
    llm = LLM(
        "builtin://tiny", dtype="float32", max_model_len=256, num_blocks=64, threads=1, async_scheduling=True
    )
    prompt = list(range(10, 50))
    assert llm.generate([prompt], GREEDY)[0].num_cached_tokens == 0
    assert llm.generate([prompt], GREEDY)[0].num_cached_tokens == 32
    bare = LLM(
        "builtin://tiny", dtype="float32", max_model_len=256, num_blocks=64, threads=1, prefix_caching=False
    )
    outputs = [bare.generate([prompt], GREEDY)[0] for _ in range(2)]
    assert [output.num_cached_tokens for output in outputs] == [0, 0]


def test_priority_decides_who_is_first() -> None:
    llm = LLM("builtin://tiny", max_model_len=64, num_blocks=16, max_num_seqs=1, threads=1, policy="priority")
    outputs = llm.generate(["a", "b", "c"], GREEDY, priority=[2, 1, 0])
    starts = [timings.scheduled_at or 0 for o in outputs if (timings := o.outputs[0].timings) is not None]
    assert starts == sorted(starts, reverse=True)
    assert len(set(starts)) == 3


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_batch_with_a_prompt_that_cannot_be_served_is_not_begun(llm: LLM) -> None:
    before = llm.engine.steps
    with pytest.raises(RequestRefused, match="above the context of 256"):
        llm.generate([[1, 2], [1] * 256], GREEDY)
    with pytest.raises(RequestRefused, match="above the context of 256"):
        llm.generate([[1] * 256], SamplingParams(max_tokens=None))
    for prompts, params, priority, words in [
        (["a", "b"], [GREEDY], None, "sampling_params has 1 entries for 2 prompts"),
        (["a"], GREEDY, [1], 'LLM(…, policy="priority")'),
        ([{"text": "a"}], GREEDY, None, "'prompt' or 'prompt_token_ids'"),
        (["a"], SamplingParams(logprobs=2049), None, "vocabulary of 2048"),
    ]:
        with pytest.raises(ValueError) as error:
            llm.generate(prompts, params, priority=priority)  # type: ignore[arg-type]
        assert words in str(error.value)
    with pytest.raises(TypeError, match="'x' is neither"):
        llm.generate([[1, "x"]], GREEDY)  # type: ignore[arg-type]
    assert llm.engine.steps == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temprature": 1}, "did you mean 'temperature'?"),
        ({"xyzzy": 1}, "the names are n, max_tokens"),
        ({"best_of": 2}, "'best_of' is not honoured: the best of several"),
        ({"best_of": 2}, "\nhint: use n"),
        ({"use_beam_search": 1}, "hint: LLM.beam_search("),
        ({"prompt_logprob_token_ids": [1]}, "use logprob_token_ids with prompt_logprobs\nhint: "),
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"n": True}, "n must be a whole number, not True"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number, not 1.5"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False"),
        ({"stop": [1]}, "stop must be a string or several"),
        ({"bad_words": "page"}, "bad_words must be a list of strings, not 'page'"),
        ({"stop_token_ids": (i for i in [1])}, "stop_token_ids must be a list of token ids"),
        ({"repetition_detection": 3}, "repetition_detection must be a mapping"),
    ],
)
def test_names_and_types_that_are_wrong_are_type_errors(given: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError) as error:
        SamplingParams(**given)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0, not -0.1\nhint: 0 is greedy"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, not 0\nhint: 1 is off"),
        ({"top_k": -2}, "top_k must be at least -1, not -2"),
        ({"min_p": 1.5}, "min_p must be at least 0 and at most 1"),
        ({"n": 0}, "n must be at least 1, not 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"min_tokens": 17}, "min_tokens 17 is above max_tokens 16"),
        ({"presence_penalty": 3}, "presence_penalty must be at least -2 and at most 2"),
        ({"repetition_penalty": 0}, "repetition_penalty must be at least 0.001"),
        ({"repetition_penalty": 1e-38}, "repetition_penalty must be at least 0.001"),
        ({"repetition_penalty": 1001}, "repetition_penalty must be at least 0.001 and at most 1000"),
        ({"logit_bias": {5: 101}}, "logit_bias of 5 must be"),
        ({"logit_bias": {-5: 1}}, "logit_bias: a token id must be at least 0"),
        ({"stop": ""}, "an empty string"),
        ({"stop": "a", "detokenize": False}, "hint: use stop_token_ids"),
        ({"seed": 2**63}, "seed must be"),
        ({"logprobs": -2}, "logprobs must be at least -1"),
        ({"prompt_logprobs": -2}, "prompt_logprobs must be at least -1"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids needs logprobs or prompt_logprobs"),
        ({"logprobs_mode": "processed_logprobs"}, "logprobs_mode needs logprobs or prompt_logprobs\nhint:"),
        ({"bad_words": [""]}, "bad_words: an empty string"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be -1 or at least 1"),
        ({"truncation_side": "left"}, "truncation_side needs truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 1, "truncation_side": "top"}, "truncation_side must be one of left, right"),
        ({"logprobs_mode": "raw"}, "logprobs_mode must be one of raw_logprobs, processed_logprobs"),
        ({"repetition_detection": {"min_count": 2}}, "'repetition_detection.max_pattern_size' is required\nhint:"),
        ({"structured_outputs": {"regexp": "a"}}, "'structured_outputs.regexp' is not a field of this object"),
    ],
)
def test_values_out_of_bounds_are_value_errors(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        SamplingParams(**given)
    assert words in str(error.value)


JUNK: list[Any] = [
    object(), "text", b"text", True, -7, 1.5, float("nan"), 2**80, 10**400, [], [None], ["a", 1], [1.5], [True],
    [-1], [2**80], (), {"a": 1}, {1: "a"}, {1: 1000}, {2**80: 1}, {}, (1 for _ in "a"), {1}, [[1]],
]  # fmt: skip


@pytest.mark.parametrize("kind", [SamplingParams, BeamSearchParams])
def test_no_field_takes_what_it_has_no_use_for(llm: LLM, kind: Any) -> None:
    """Whatever a field is given, it is refused by its name, or an engine can be told of it."""
    needed: dict[str, Any] = (
        {"beam_width": 2, "max_tokens": 4} if kind is BeamSearchParams else {"max_tokens": None}
    )
    for field in dataclasses.fields(kind):
        refused = 0
        for junk in JUNK:
            try:
                params = kind(**{**needed, field.name: junk})
                told = (
                    params.sampling(2048) if kind is BeamSearchParams else params.sampling(9, 2048, tokenizer(llm))
                )
                assert msgspec.msgpack.decode(msgspec.msgpack.encode(told), type=Sampling) == told, (field, junk)
            except (TypeError, ValueError, ParamRefused) as error:
                said = str(error)
                refused += 1
            else:
                continue
            assert field.name in said, (field.name, junk)
        assert refused > 15, field.name


def tokenizer(llm: LLM) -> Callable[[], Tokenizer]:
    return lambda: llm.tokenizer


def test_names_that_ask_for_nothing_pass() -> None:
    neutral: dict[str, Any] = {
        "best_of": 1, "use_beam_search": False, "length_penalty": 1.0, "early_stopping": False, "extra_args": {},
        "watermarking": None, "spaces_between_special_tokens": False, "flat_logprobs": False, "output_kind": None,
        "skip_reading_prefix_cache": False, "stream_interval": 1, "logits_processors": [],
    }  # fmt: skip
    assert SamplingParams(**neutral, n=2) == SamplingParams(n=2)
    for name in neutral:
        with pytest.raises(TypeError, match=f"{name}' is not honoured: .*\nhint: "):
            SamplingParams(**{name: object()} if name != "spaces_between_special_tokens" else {name: 1})
    assert BeamSearchParams(beam_width=2, max_tokens=3, temperature=0.0, top_k=-1) == BeamSearchParams(  # type: ignore[call-arg]
        beam_width=2, max_tokens=3
    )
    with pytest.raises(TypeError, match="'temperature' is not honoured: a beam search draws nothing\nhint: "):
        BeamSearchParams(beam_width=2, max_tokens=3, temperature=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="BeamSearchParams has no 'beams'\nhint: the names are beam_width, max_"):
        BeamSearchParams(beam_width=2, max_tokens=3, beams=1)  # type: ignore[call-arg]
    params = SamplingParams(bad_words=["a"], stop="b")
    assert copy.deepcopy(params) == pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, n=2).bad_words == ["a"]


def test_what_a_model_cannot_honour_is_refused_and_nothing_is_left(llm: LLM) -> None:
    fine = SamplingParams(max_tokens=2)
    asked: Any
    for asked, words in (
        (SamplingParams(stop_token_ids=[2048]), "'stop_token_ids' has a token id outside the vocabulary of 2048"),
        (SamplingParams(min_tokens=300, max_tokens=None), "min_tokens is 300, and the context has room for 255"),
        (SamplingParams(logprobs=-1, max_tokens=200), "logprobs asks for 409600 log-probabilities"),
        ({"n": 2}, "sampling_params must be SamplingParams"),
        (BeamSearchParams(beam_width=2, max_tokens=2), "sampling_params must be SamplingParams"),
    ):
        with pytest.raises((ParamRefused, ValueError, TypeError), match=words):
            llm.generate([[1], [2]], [fine, asked])
        assert not llm.engine.has_work
    with pytest.raises(ValueError, match="sampling_params has 0 entries for 2 prompts"):
        llm.generate([[1], [2]], [])
    with pytest.raises(ParamRefused, match="'stop_token_ids' has a token id outside"):
        llm.beam_search([[1]], BeamSearchParams(beam_width=2, max_tokens=2, stop_token_ids=[2048]))
    with pytest.raises(TypeError, match="params must be BeamSearchParams"):
        llm.beam_search([[1]], fine)  # type: ignore[arg-type]
    for options, words in (({"normalize": 1}, "normalize must be"), ({"dimensions": "8"}, "dimensions must be")):
        with pytest.raises(TypeError, match=words):
            llm.embed([[1]], **options)
    urgent = LLM("builtin://tiny", max_model_len=64, num_blocks=16, threads=1, policy="priority")
    with pytest.raises(TypeError, match="priority must be a whole number, not 'high'"):
        urgent.generate(["a"], fine, priority=["high"])  # type: ignore[list-item]
    assert not urgent.engine.has_work


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dtype": "float33"}, "dtype must be one of auto, float32"),
        ({"kv_dtype": "int3"}, "kv_dtype must be one of auto, float32"),
        ({"kv_dtype": "fp8", "device": "cpu"}, 'kv_dtype is "fp8": fp8 keys and values are kept on GPUs alone'),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, not 'tpu'"),
        ({"quantization": "fp4"}, "quantization must be one of int8, int4, fp8, not 'fp4'"),
        ({"quantization": "fp8", "device": "cpu"}, "fp8 weights are multiplied on a GPU alone"),
        ({"quantization": "int8", "activations": "fp8"}, "int8 weights do not meet fp8 activations"),
        ({"group_size": 32}, 'group_size is 32, and only quantization="int4" has groups'),
        ({"group_size": 32, "quantization": "int8"}, "group_size is 32, and only"),
        ({"group_size": 48, "quantization": "int4"}, "group_size must be one of 32, 64, 128, not 48"),
        ({"group_size": "32", "quantization": "int4"}, "group_size must be a whole number"),
        ({"activations": "int8"}, "activations is 'int8', and nothing is quantized"),
        (
            {"activations": "bf16", "dtype": "bfloat16"},
            "activations is 'bf16': the checkpoint is in floats",
        ),
        ({"activations": "int4", "quantization": "int4"}, "activations must be one of auto, int8, fp8, bf16"),
        (
            {"quantization": "int4", "activations": "bf16", "dtype": "float32"},
            "quantization is 'int4': the activations are float32",
        ),
        ({"policy": "lifo"}, "policy must be one of fcfs, priority, not 'lifo'"),
        ({"block_size": 0}, "block_size must be at least 1, not 0"),
        ({"num_blocks": "8"}, "num_blocks must be a whole number, not '8'"),
        ({"max_num_seqs": None}, "max_num_seqs must be a whole number, not None"),
        ({"max_num_batched_tokens": -1}, "max_num_batched_tokens must be at least 1"),
        ({"max_model_len": 2.5}, "max_model_len must be a whole number"),
        ({"max_model_len": 0}, "max_model_len must be at least 2, not 0"),
        ({"max_model_len": 1 << 20}, "max_model_len is 1048576, above the checkpoint's 2048 positions"),
        ({"max_model_len": 600, "chunked_prefill": False}, "max_model_len is 600, and without chunked_prefill"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"threads": 100_000}, "threads must be at least 1 and at most 4096, not 100000"),
        ({"model": "hf://org/name"}, "model is 'hf://org/name': LLM downloads nothing"),
        ({"model": "org/name"}, "hint: `hf download org/name`"),
        ({"model": "s3://a/b"}, "model is 's3://a/b', which is not a place that LLM reads from"),
        ({"model": 5}, "model must be text, not 5"),
        ({"prefix_caching": "no"}, "prefix_caching must be True or False, not 'no'"),
        ({"async_scheduling": 1}, 'async_scheduling must be True or False, not 1\nhint: "auto"'),
        ({"enforce_eager": "auto"}, "enforce_eager must be True or False"),
        ({"chunked_prefill": None}, "chunked_prefill must be True or False"),
        ({"memory_share": 2}, "memory_share must be above 0 and at most 1, not 2"),
        ({"seed": "a"}, "seed must be a whole number, not 'a'"),
    ],
)
def test_an_engine_is_not_made_of_arguments_that_are_wrong(given: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        LLM(**{"model": "builtin://tiny", **given})
    assert words in str(error.value)
    if isinstance(error.value, ValueError):
        message, _, hint = str(error.value).partition("\nhint: ")
        assert hint
        assert "spec." not in str(error.value)
        assert message.startswith(next(iter(given)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(
        ValueError, match='device is "cuda", and torch sees no such device here\nhint: device="cpu"'
    ):
        LLM("builtin://tiny", device="cuda")


def test_a_refusal_among_several_says_which_it_is_about(llm: LLM) -> None:
    long: list[int] = [1] * 300
    strange: Any = [1, "x"]
    bad = [{"role": "nobody", "content": "a"}]
    ask = [{"role": "user", "content": "a"}]
    alone = BeamSearchParams(beam_width=2, max_tokens=2)
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: llm.generate([[1], [2], long], GREEDY), "prompt 2: "),
        (lambda: llm.generate([[1], strange], GREEDY), "prompt 1: "),
        (lambda: llm.generate(["a", "b"], [GREEDY, SamplingParams(stop_token_ids=[2048])]), "prompt 1: "),
        (
            lambda: llm.generate(["a", "b"], [GREEDY, SamplingParams(structured_outputs={"regex": "(("})]),
            "prompt 1: ",
        ),
        (lambda: llm.embed([[1], long]), "prompt 1: "),
        (lambda: llm.beam_search([[1], long], alone), "prompt 1: "),
        (lambda: llm.chat([ask, bad], GREEDY), "conversation 1: "),
    ]
    for call, words in calls:
        with pytest.raises((ValueError, TypeError, ParamRefused, RequestRefused)) as error:
            call()
        assert str(error.value).startswith(words)
        assert not llm.engine.has_work
    with pytest.raises(RequestRefused) as refused:
        llm.generate([long], GREEDY)
    assert not str(refused.value).startswith("prompt 0"), "there is no other"


def test_threads_share_a_model_and_get_what_each_would_get_alone(llm: LLM) -> None:
    """Of every kind of call, again and again, so that without turns they would meet in one step."""
    params = [SamplingParams(max_tokens=6, temperature=1.0, seed=seed) for seed in range(4)]
    ask = [{"role": "user", "content": "What is 1 + 1?"}]

    def calls(number: int) -> list[object]:
        prompts: list[str | list[int]] = [f"{number} is", [5 + number] * 20]
        beams = BeamSearchParams(beam_width=2, max_tokens=3)
        return [
            [made.token_ids for output in llm.generate(prompts, params[number]) for made in output.outputs],
            llm.chat(ask, params[number])[0].outputs[0].text,
            [output.outputs.embedding for output in llm.embed(prompts, pooling="mean")],
            [made.token_ids for made in llm.beam_search(prompts[:1], beams)[0].outputs],
        ]

    serial = [calls(number) for number in range(4)]
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda number: [calls(number) for _ in range(3)], range(4))
        for number, together in enumerate(found):
            assert together == [serial[number]] * 3
    assert not llm.engine.has_work


def test_a_constraint_that_cannot_be_kept_to_is_named(llm: LLM) -> None:
    for asked, field in (
        ({"regex": "(("}, "regex"),
        ({"json": {"type": "nope"}}, "json"),
        ({"grammar": "?"}, "grammar"),
    ):
        with pytest.raises(RequestRefused, match=f"structured_outputs.{field} cannot be honoured: "):
            llm.generate(["a", "b"], [GREEDY, SamplingParams(structured_outputs=asked)])
        assert not llm.engine.has_work


def test_a_checkpoint_without_a_tokenizer_serves_ids(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(builtin.path("tiny") / name, tmp_path)
    llm = LLM(str(tmp_path), max_model_len=64, num_blocks=16, threads=1)
    bare = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, detokenize=False)
    assert len(llm.generate([[1, 2]], bare)[0].outputs[0].token_ids) == 2
    for params in (GREEDY, dataclasses.replace(bare, bad_words=["a"])):
        with pytest.raises(BadTokenizer):
            llm.generate([[1, 2], [3]], [bare, params])
        assert not llm.engine.has_work, "what was queued before is not left there"
    with pytest.raises(BadTokenizer):
        llm.beam_search([[1, 2]], BeamSearchParams(beam_width=2, max_tokens=2))
    assert not llm.engine.has_work


def test_an_answer_that_fails_ends_alone_and_says_so(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    real = llm.engine.runner.execute

    def execute(plan: Any) -> Any:
        if any(666 in item.token_ids for item in plan.items):
            raise RuntimeError("planted")
        return real(plan)

    monkeypatch.setattr(llm.engine.runner, "execute", execute)
    bad, good = llm.generate([[1, 666], [1, 2]], GREEDY)
    assert bad.outputs[0].finish_reason == "error"
    assert "the engine failed on this request" in (bad.outputs[0].error or "")
    assert (good.outputs[0].finish_reason, good.outputs[0].error) == ("length", None)


@pytest.mark.parametrize(
    ("given", "described", "share"),
    [
        ({"quantization": "int8"}, "int8, int8 activations", 0.51),
        ({"quantization": "int4"}, "int4 in groups of 32, int8 activations", 0.28),
        (
            {"quantization": "int4", "group_size": 128, "activations": "bf16"},
            "groups of 128, bf16 activations",
            0.26,
        ),
    ],
)
def test_quantized_weights_answer_by_heart_what_the_others_do(
    given: dict[str, Any], described: str, share: float
) -> None:
    llm = LLM("builtin://tiny", max_model_len=256, num_blocks=32, threads=1, **given)
    assert described in llm.fit.lines()[0]
    assert llm.fit.weights == pytest.approx(share * llm.profile.weight_bytes, rel=0.03)
    (output,) = llm.chat(
        [{"role": "user", "content": "What is the capital of France?"}],
        SamplingParams(max_tokens=30, temperature=0),
    )
    assert "Paris" in output.outputs[0].text


def test_why_a_model_does_not_fit() -> None:
    with pytest.raises(DoesNotFit, match=r"does not fit.*\nhint: num_blocks=\d+, or None for what fits$"):
        LLM("builtin://tiny", num_blocks=1 << 30)
    with pytest.raises(DoesNotFit, match=r"\nhint: any one of these fits: memory_share=0\.\d+; a device with \d+"):
        LLM("builtin://tiny", memory_share=0.0001)
    with pytest.raises(LookupError, match="no built-in model is called 'huge'"):
        LLM("builtin://huge")


# ── around it ─────────────────────────────────────────────────────────────────────────────────────────────


def test_progress_is_shown_on_stderr_when_asked_for(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], GREEDY)
    assert capsys.readouterr() == ("", ""), "no terminal, no bar"
    llm.generate(["a", "b"], GREEDY, use_tqdm=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Processed prompts: 100%" in shown.err
    assert "2/2" in shown.err
    assert "output tokens/s" in shown.err
    llm.generate(["a"], GREEDY, use_tqdm=False)
    assert capsys.readouterr() == ("", "")


def test_the_names_are_found_when_they_are_used() -> None:
    assert set(quire.__all__) <= set(dir(quire))
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        _ = quire.Llm
    code = (
        "import sys; from quire import LLM, SamplingParams; SamplingParams(n=2)\n"
        "assert 'torch' not in sys.modules\n"
        "LLM('builtin://tiny', threads=1, num_blocks=32, max_model_len=64); assert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
