"""Beam search: against the definition, on a pretend model and on the built-in one, and what it does to blocks."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import msgspec
import pytest
import torch
from tests.engine_specs import run, tiny_spec
from transformers import AutoModelForCausalLM

from quire import LLM, BeamSearchParams, SamplingParams
from quire.builtin import path as builtin_path
from quire_engine.beam import BeamGroup
from quire_engine.engine import Engine
from quire_engine.errors import RequestRefused
from quire_engine.runner import ModelRunner
from quire_engine.step import StepPlan, StepResult
from quire_engine.trace import replay
from quire_schemas.wire import BeamResult, BeamSearch, Generate, Sampling, TokenLogprobs

VOCABULARY = 7
EOS = 6


def table_model(seed: int) -> Any:
    """Log-probabilities of the next token as a fixed function of the text."""

    def logprobs(text: tuple[int, ...]) -> list[float]:
        rng = random.Random(f"{seed}{text}")
        weights = [rng.expovariate(1.0) + 1e-3 for _ in range(VOCABULARY)]
        return [math.log(weight / sum(weights)) for weight in weights]

    return logprobs


def search(model: Any, beam: BeamSearch, sampling: Sampling, ending: frozenset[int]) -> list[BeamResult]:
    """A `BeamGroup` on a pretend model, its moves carried out on lists."""
    group = BeamGroup("s", beam, sampling, ending)
    texts: dict[str, tuple[int, ...]] = {"s": ()}
    while True:
        moves = None
        for name in list(group.members):
            row = sorted(enumerate(model(texts[name])), key=lambda pair: (-pair[1], pair[0]))
            told = TokenLogprobs(row[0][0], row[0][1], tuple(row[: 2 * beam.width]))
            assert moves is None, "it decides when all have told"
            moves = group.hear(name, told)
        assert moves is not None
        if moves.results is not None:
            return list(moves.results)
        for parent, child in moves.forks:
            texts[child] = texts[parent]
        for name, token in moves.extensions:
            texts[name] += (token,)
        for name in moves.drops:
            del texts[name]
        assert set(texts) == set(group.members)


def by_definition(model: Any, beam: BeamSearch, max_tokens: int, ending: frozenset[int]) -> list[BeamResult]:
    """The search without any end before `max_tokens`, as it is defined."""
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished: list[tuple[float, BeamResult]] = []
    for length in range(1, max_tokens + 1):
        ways = sorted(
            (-(total + logprob), place, token)
            for place, (total, text) in enumerate(beams)
            for token, logprob in enumerate(model(text))
        )[: 2 * beam.width]
        following: list[tuple[float, tuple[int, ...]]] = []
        for negative, place, token in ways:
            text = beams[place][1]
            score = -negative / length**beam.length_penalty
            if token in ending:
                finished.append((score, BeamResult(list(text), -negative, "stop", token)))
            elif len(following) < beam.width:
                following.append((-negative, (*text, token)))
                if length == max_tokens:
                    finished.append((score, BeamResult([*text, token], -negative, "length")))
        beams = following
    return [result for _, result in sorted(finished, key=lambda one: -one[0])[: beam.width]]


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
def test_a_search_finds_what_its_definition_says_however_early_it_ends(width: int, penalty: float) -> None:
    for seed in range(30):
        model, ending = table_model(seed), frozenset({EOS})
        found = search(model, BeamSearch(width, penalty), Sampling(max_tokens=6), ending)
        expected = by_definition(model, BeamSearch(width, penalty), 6, ending)
        assert [(r.token_ids, r.finish_reason) for r in found] == [
            (r.token_ids, r.finish_reason) for r in expected
        ]
        assert [r.logprob for r in found] == pytest.approx([r.logprob for r in expected])


def test_a_search_that_is_wide_enough_finds_the_best_text_of_all() -> None:
    for seed in range(5):
        model = table_model(seed)
        every = itertools.product(range(VOCABULARY), repeat=3)
        scores = {text: sum(model(text[:at])[token] for at, token in enumerate(text)) for text in every}
        best = search(model, BeamSearch(VOCABULARY**2, 0.0), Sampling(max_tokens=3), frozenset())[0]
        assert tuple(best.token_ids) == max(scores, key=lambda text: scores[text])


def test_no_text_ends_before_its_least_number_of_tokens() -> None:
    sampling = Sampling(max_tokens=8, min_tokens=4)
    for seed in range(20):
        for result in search(table_model(seed), BeamSearch(2), sampling, frozenset({EOS, 5})):
            assert len(result.token_ids) >= 4


# ── in the engine ─────────────────────────────────────────────────────────────────────────────────────────

PROMPT = [50, 60, 70, 80, 90, 11, 12, 13, 14, 15, 16]


def ask(name: str = "s", width: int = 3, max_tokens: int = 12, **fields: Any) -> Generate:
    return Generate(name, list(PROMPT), Sampling(max_tokens=max_tokens, **fields), beam=BeamSearch(width))


@pytest.fixture(scope="module")
def expected() -> list[BeamResult]:
    """The same search by its definition on transformers' logits."""
    model: Any = AutoModelForCausalLM.from_pretrained(str(builtin_path()), dtype=torch.float32)

    def logprobs(text: tuple[int, ...]) -> list[float]:
        with torch.no_grad():
            row = model(torch.tensor([[*PROMPT, *text]])).logits[0, -1]
        return list(row.log_softmax(-1).tolist())

    ending = frozenset(model.generation_config.eos_token_id)
    return by_definition(logprobs, BeamSearch(3), 12, ending)


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"block_size": 1},
        {"prefix_caching": True, "block_size": 4},
        {"max_num_batched_tokens": 4},
        {"max_num_seqs": 3, "block_size": 4},
        {"num_blocks": 14, "block_size": 4},
    ],
    ids=["alone", "small blocks", "shared", "chunks", "few seats", "little room"],
)
def test_the_engine_finds_the_same_in_company_short_of_seats_and_short_of_blocks(
    fields: dict[str, Any], ahead: bool, expected: list[BeamResult]
) -> None:
    engine = Engine.load(tiny_spec(**{"max_model_len": 64, "async_scheduling": ahead, **fields}))
    others = [Generate(f"n{i}", [100 + i] * 5, Sampling(max_tokens=20, temperature=0.0)) for i in range(3)]
    heard = run(engine, others[0], ask(), *others[1:], ask("t"))
    for name in "st":
        begun, delta = heard[name]
        assert begun.beams is None
        assert begun.timings is not None
        assert begun.timings.first_token_at is not None
        assert delta.beams is not None
        assert [r.token_ids for r in delta.beams] == [r.token_ids for r in expected]
        assert [r.logprob for r in delta.beams] == pytest.approx([r.logprob for r in expected], abs=1e-3)
        assert delta.finish_reason == expected[0].finish_reason
        assert delta.timings is not None
        assert delta.timings.finished_at is not None
    if "num_blocks" in fields:
        assert engine.stats().preemptions > 0


def test_beams_share_what_they_have_in_common() -> None:
    engine = Engine.load(tiny_spec(block_size=4, max_model_len=128))
    engine.add(Generate("s", list(range(40)), Sampling(max_tokens=9, ignore_eos=True), beam=BeamSearch(4)))
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, engine.stats().blocks_used)
    alone = -(-(40 + 8) // 4)
    assert most <= 10 + 4 * 3, "the prompt's ten blocks are there once"
    assert most < 4 * alone / 2


def test_a_search_can_be_aborted_fails_as_one_and_is_refused_by_name() -> None:
    engine = Engine.load(tiny_spec(block_size=4, num_blocks=40, max_num_seqs=4))
    engine.add(ask(max_tokens=30))
    for _ in range(5):
        engine.step()
    assert engine.abort("s")
    assert not engine.abort("s")
    assert not engine.has_work
    engine.check_integrity()
    assert engine.stats().blocks_used == 0
    with pytest.raises(RequestRefused, match="width 5 needs as many seats; the engine has 4"):
        engine.add(ask(width=5))
    with pytest.raises(RequestRefused, match="in each of 4 beams; the whole KV cache"):
        engine.add(ask(width=4, max_tokens=40))

    real = engine.runner
    assert isinstance(real, ModelRunner)

    class Faulty(ModelRunner):
        def execute(self, plan: StepPlan) -> StepResult:
            if any(item.start >= len(PROMPT) + 2 for item in plan.items):
                raise RuntimeError("planted")
            return super().execute(plan)

    engine.runner = Faulty(
        real.model,
        real.kv,
        block_size=real.block_size,
        head_rows=real.head_rows,
        device=real.device,
        masks=real.masks,
    )
    _, delta = run(engine, ask())["s"]
    assert (delta.finish_reason, delta.error_code) == ("error", "internal_error")


def test_a_search_is_replayed_from_its_trace(tmp_path: Any) -> None:
    engine = Engine.load(msgspec.structs.replace(tiny_spec(block_size=4, num_blocks=14), max_model_len=64))
    engine.record(tmp_path / "trace")
    run(engine, ask(), ask("t"))
    pairs = list(replay((tmp_path / "trace").read_bytes().splitlines()))
    assert all(recorded == decided for recorded, decided in pairs)
    assert any(recorded.copies for recorded, _ in pairs)


def test_the_class_for_scripts_gives_the_texts_of_a_search(expected: list[BeamResult]) -> None:
    llm = LLM(str(builtin_path()), dtype="float32", threads=1, max_model_len=64)
    params = BeamSearchParams(beam_width=3, max_tokens=12)
    prompts: list[Any] = [PROMPT, "What is Quire?"]
    first, second = llm.beam_search(prompts, params)
    assert [output.token_ids for output in first.outputs] == [result.token_ids for result in expected]
    assert [output.finish_reason for output in first.outputs] == [result.finish_reason for result in expected]
    scores = [output.cumulative_logprob for output in first.outputs]
    assert scores == pytest.approx([result.logprob for result in expected], abs=1e-3)
    assert len({output.text for output in second.outputs}) == 3
    with pytest.raises(ValueError, match="beam_width must be at least 1"):
        BeamSearchParams(beam_width=0, max_tokens=4)
    with pytest.raises(TypeError, match=r"LLM\.beam_search"):
        SamplingParams(use_beam_search=True)  # type: ignore[call-arg]
