"""The engine against Hugging Face `generate` on the built-in model: the same greedy tokens for 50 prompts.

The reference generates without padding. The engine then has to say the same when it takes prompts
one by one, all together, in chunks of 16 or 64 tokens or whole, and with a pool so small that it preempts.
In bfloat16 rounding may turn a near tie: there each side's token must be among the other's five likeliest.
"""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.effort import EFFORT
from transformers import AutoModelForCausalLM

from quire import LLM, RequestOutput, SamplingParams
from quire.builtin import path as builtin_path
from quire.text import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
NEW_TOKENS = 20
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
BALLAST = SamplingParams(max_tokens=70, temperature=0.0, ignore_eos=True)
BALLAST_PROMPTS = [[5], [6], [7], [8], [9], [10]]
"""Older requests that alone outgrow a small pool, so that everybody else is thrown out now and then."""
PROMPTS_FILE = Path(__file__).with_name("prompts.jsonl")


@dataclass(frozen=True)
class Reference:
    """What Hugging Face says to one prompt: tokens up to an end of the text, and the five likeliest at each."""

    tokens: list[int]
    ended_by: int | None
    top: list[set[int]]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = Tokenizer.load(builtin_path())
    texts = [json.loads(line)["text"] for line in PROMPTS_FILE.read_text().splitlines()]
    assert len(texts) == 50
    return [tokenizer.encode(text) for text in texts]


def generate(dtype: str, prompts: list[list[int]]) -> list[Reference]:
    """Hugging Face's greedy answers; the one run that all tests of a dtype share. Same lengths go as one batch."""
    model: Any = AutoModelForCausalLM.from_pretrained(str(builtin_path()), dtype=getattr(torch, dtype))
    ends = set(model.generation_config.eos_token_id)
    references: dict[int, Reference] = {}
    for length in {len(prompt) for prompt in prompts}:
        numbers = [number for number, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[number] for number in numbers])
        said = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        top = torch.stack(said.logits).float().topk(5).indices.tolist()
        for row, number in enumerate(numbers):
            tokens = said.sequences[row, length:].tolist()
            end = next((at for at, token in enumerate(tokens) if token in ends), None)
            references[number] = Reference(
                tokens[:end], None if end is None else tokens[end], [set(step[row]) for step in top]
            )
    return [references[number] for number in range(len(prompts))]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[Reference]:
    return generate("float32", prompts)


def check(outputs: list[RequestOutput], expected: list[Reference]) -> None:
    for number, (output, reference) in enumerate(zip(outputs, expected, strict=True)):
        (answer,) = output.outputs
        assert answer.token_ids == reference.tokens, f"prompt {number}"
        assert answer.stop_token_id == reference.ended_by
        assert answer.finish_reason == ("length" if reference.ended_by is None else "stop")


def test_alone_every_prompt_continues_as_hugging_face_does(
    prompts: list[list[int]], expected: list[Reference]
) -> None:
    llm = LLM("builtin://tiny", dtype="float32", threads=1, max_model_len=512, max_num_seqs=4)
    check([llm.generate([prompt], GREEDY)[0] for prompt in prompts], expected)


@pytest.mark.parametrize("chunk", [16, 64, None], ids=lambda chunk: f"chunk {chunk or 'whole'}")
@pytest.mark.parametrize("preempted", [False, True], ids=["roomy", "preempted"])
def test_together_in_any_chunks_preempted_or_not_nothing_changes(
    prompts: list[list[int]], expected: list[Reference], chunk: int | None, preempted: bool
) -> None:
    llm = LLM(
        "builtin://tiny",
        dtype="float32",
        threads=1,
        max_model_len=512,
        max_num_seqs=50,
        max_num_batched_tokens=chunk or 512,
        chunked_prefill=chunk is not None,
        block_size=1 if preempted else 16,
        num_blocks=300 if preempted else None,  # just above the longest prompt and its answer
    )
    ballast = BALLAST_PROMPTS if preempted else []
    params = [BALLAST] * len(ballast) + [GREEDY] * len(prompts)
    outputs = llm.generate(ballast + prompts, params)[len(ballast) :]
    check(outputs, expected)
    llm.engine.check_integrity()
    stats = llm.engine.stats()
    assert stats.blocks_used == 0
    assert stats.prompt_tokens == sum(map(len, ballast + prompts))
    timings = [output.outputs[0].timings for output in outputs]
    assert any(times is not None and times.preempted_at for times in timings) == preempted


WAYS = list(itertools.product(["miss", "hit"], ["roomy", "preempted"], ["", "ahead"]))
MATRIX = [
    pytest.param(batch, chunk, *way, marks=() if number == (3 * i + 5 * j) % len(WAYS) else pytest.mark.nightly)
    for i, batch in enumerate([1, 2, 7, 32])
    for j, chunk in enumerate([16, 64, None])
    for number, way in enumerate(WAYS)
]
"""Every combination by night; in CI every batch with every chunk, and the rest in turns."""


@pytest.mark.parametrize(
    ("batch", "chunk", "prefix", "pool", "ahead"), MATRIX, ids=lambda value: str(value or "whole")
)
def test_no_way_of_running_it_changes_what_is_said(
    prompts: list[list[int]],
    expected: list[Reference],
    batch: int,
    chunk: int | None,
    prefix: str,
    pool: str,
    ahead: str,
) -> None:
    """Batch, chunk, prefix hit, preemption and planning ahead, together."""
    size = 1 if pool == "preempted" else 4
    llm = LLM(
        "builtin://tiny",
        dtype="float32",
        threads=1,
        max_model_len=512,
        max_num_seqs=batch if pool == "roomy" else batch + len(BALLAST_PROMPTS),
        max_num_batched_tokens=chunk or 512,
        chunked_prefill=chunk is not None,
        block_size=size,
        num_blocks=300 if pool == "preempted" else 2000,
        prefix_caching=prefix == "hit",
        async_scheduling=bool(ahead),
    )
    rng = random.Random(f"{batch}{chunk}{prefix}{pool}{ahead}{EFFORT}")
    chosen = rng.sample(range(len(prompts)), max(batch, 8 if EFFORT > 1 else 1))
    ballast = BALLAST_PROMPTS if pool == "preempted" else []
    for turn in ("first", "second"):
        outputs: list[RequestOutput] = []
        for at in range(0, len(chosen), batch):
            some = [prompts[number] for number in chosen[at : at + batch]]
            params = [BALLAST] * len(ballast) + [GREEDY] * len(some)
            outputs += llm.generate(ballast + some, params)[len(ballast) :]
        check(outputs, [expected[number] for number in chosen])
        llm.engine.check_integrity()
        if turn == "second" and prefix == "hit" and pool == "roomy":
            for output in outputs:
                assert output.num_cached_tokens >= (len(output.prompt_token_ids) - 1) // size * size
    stats = llm.engine.stats()
    assert stats.blocks_used == 0
    assert bool(stats.prefix_hit_tokens) == (prefix == "hit")
    if pool == "preempted":
        assert stats.preemptions > 0


def test_blocks_of_another_size_change_nothing(prompts: list[list[int]], expected: list[Reference]) -> None:
    llm = LLM("builtin://tiny", dtype="float32", threads=1, max_model_len=512, block_size=8)
    check(llm.generate(prompts[:20], GREEDY), expected[:20])


@pytest.fixture(scope="module")
def in_bfloat16(prompts: list[list[int]]) -> list[Reference]:
    return generate("bfloat16", prompts)


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"max_num_batched_tokens": 16, "async_scheduling": True, "block_size": 4},
        {"max_num_seqs": 7, "num_blocks": 170, "block_size": 2},
    ],
    ids=["at once", "in chunks and ahead", "few at a time and short of blocks"],
)
def test_in_bfloat16_the_first_difference_is_a_near_tie(
    way: dict[str, Any], prompts: list[list[int]], in_bfloat16: list[Reference]
) -> None:
    references = in_bfloat16
    llm = LLM("builtin://tiny", dtype="bfloat16", threads=1, max_model_len=320, prefix_caching=True, **way)
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, logprobs=5, ignore_eos=True)
    llm.generate(prompts[:7], params)  # so that some prefixes are there
    outputs = llm.generate(prompts, params)
    differing = 0
    for number, (output, reference) in enumerate(zip(outputs, references, strict=True)):
        theirs = reference.tokens if reference.ended_by is None else [*reference.tokens, reference.ended_by]
        (answer,) = output.outputs
        assert answer.logprobs is not None
        for position, (their, our) in enumerate(zip(theirs, answer.token_ids, strict=False)):
            if their == our:
                continue
            differing += 1
            ours_top = {token for token, found in answer.logprobs[position].items() if found.rank}
            assert their in ours_top, f"prompt {number}, position {position}"
            assert our in reference.top[position], f"prompt {number}, position {position}"
            break
    assert differing < len(prompts) // 2, "rounding turns few ties; more is another computation"
