"""Reported log-probabilities against Hugging Face's logits, and wishes about tokens, through the whole engine.

The reference is one forward pass over prompt and answer of the built-in model in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tests.engine_specs import run, tiny_spec
from torch import Tensor
from transformers import AutoModelForCausalLM

from quire.builtin import path as builtin_path
from quire.text import Tokenizer
from quire_engine.engine import MAX_LIVE_ENTRIES, Engine
from quire_engine.errors import RequestRefused
from quire_schemas.wire import (
    MAX_LOGPROB_ENTRIES,
    WHOLE_VOCABULARY,
    Generate,
    Repetition,
    Sampling,
    Thinking,
    TokenLogprobs,
)

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY = 2048
TEXT = "The scheduler gives each request a share of the step. " * 4


@dataclass
class Answer:
    """All that the engine said to one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt: list[TokenLogprobs] = field(default_factory=list)
    finish: str | None = None
    code: str | None = None
    preempted: int = 0
    cached: int = 0


def answers_to(engine: Engine, requests: dict[str, tuple[list[int], Sampling]]) -> dict[str, Answer]:
    """Every request's answer; they run together."""
    answers = {name: Answer() for name in requests}
    heard = run(engine, *(Generate(name, list(prompt), sampling) for name, (prompt, sampling) in requests.items()))
    for name, answer in answers.items():
        for delta in heard[name]:
            answer.token_ids += delta.token_ids
            answer.logprobs += delta.logprobs or []
            answer.prompt += delta.prompt_logprobs or []
            answer.finish, answer.code = delta.finish_reason, delta.error_code
            if delta.finish_reason is not None and delta.timings is not None:
                answer.preempted, answer.cached = len(delta.timings.preempted_at), delta.timings.cached_tokens
    return answers


def greedy(tokens: int = 6, **fields: Any) -> Sampling:
    return Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True, **fields)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return Tokenizer.load(builtin_path()).encode(TEXT)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(tiny_spec())


def close(value: Any) -> Any:
    """Equal up to the rounding of float32 sums in another order."""
    return pytest.approx(value, rel=0, abs=2e-4)


class Reference:
    """Hugging Face's logits of every place of a text."""

    def __init__(self) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(str(builtin_path()), dtype=torch.float32)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:
        """[len(ids), V]: at each place, of the token that comes behind it."""
        found: Tensor = self._model(torch.tensor([ids])).logits[0].double()
        return found


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def check(entry: TokenLogprobs, values: Tensor, token: int, top: int, named: tuple[int, ...] = ()) -> None:
    """`entry` is what `values` [V] say of `token`."""
    assert entry.token_id == token
    assert entry.logprob == close(float(values[token]))
    if entry.rank:
        above = int((values > values[token] + 1e-4).sum())
        assert above < entry.rank <= int((values >= values[token] - 1e-4).sum())
    best = values.topk(top).values.tolist() if top else []
    assert [value for _, value in entry.top] == close(best)
    assert [value for _, value in entry.top] == close([float(values[i]) for i, _ in entry.top])
    assert len({token for token, _ in entry.top}) == top
    assert list(entry.named) == close([float(values[i]) for i in named])


@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "ahead"])
@pytest.mark.parametrize("caching", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize("chunk", [16, None], ids=["chunks of 16", "whole"])
def test_log_probabilities_of_prompt_and_answer_are_those_of_the_reference(
    reference: Reference, prompt: list[int], chunk: int | None, caching: bool, ahead: bool
) -> None:
    engine = Engine.load(
        tiny_spec(
            max_num_batched_tokens=chunk or 512,
            chunked_prefill=chunk is not None,
            prefix_caching=caching,
            async_scheduling=ahead,
        )
    )
    if caching:  # what is there already must not be taken: then nobody would compute these rows
        answers_to(engine, {"before": (prompt, greedy(1))})
        assert answers_to(engine, {"again": (prompt, greedy(1))})["again"].cached > 0
    named = (3, 2044)
    answers = answers_to(
        engine,
        {
            "both": (prompt, greedy(logprobs=4, prompt_logprobs=2, logprob_token_ids=named)),
            "other": (prompt[5:40], greedy(prompt_logprobs=0)),
            "plain": (prompt[3:60], greedy()),
        },
    )
    both, other, plain = answers["both"], answers["other"], answers["plain"]
    assert both.cached == 0
    table = reference.logits(prompt + both.token_ids).log_softmax(dim=-1)
    assert len(both.prompt) == len(prompt) - 1
    for at, entry in enumerate(both.prompt):
        check(entry, table[at], prompt[at + 1], 2, named)
        assert entry.rank
    assert len(both.logprobs) == len(both.token_ids) == 6
    for at, entry in enumerate(both.logprobs):
        check(entry, table[len(prompt) - 1 + at], both.token_ids[at], 4, named)
    short = reference.logits(prompt[5:40]).log_softmax(dim=-1)
    assert len(other.prompt) == 34
    for at, entry in enumerate(other.prompt):
        check(entry, short[at], prompt[6 + at], 0)
    assert not plain.prompt
    assert not plain.logprobs


@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "ahead"])
def test_a_preempted_prompt_reports_each_of_its_tokens_once(
    reference: Reference, prompt: list[int], ahead: bool
) -> None:
    spec = tiny_spec(max_num_batched_tokens=16, block_size=1, num_blocks=130, async_scheduling=ahead)
    engine = Engine.load(spec)
    ballast = {f"old {n}": ([n + 5], greedy(60)) for n in range(3)}
    requests = {**ballast, "late": (prompt[:50], greedy(20, prompt_logprobs=1))}
    late = answers_to(engine, requests)["late"]
    assert late.preempted, "this test is about preemption"
    table = reference.logits(prompt[:50]).log_softmax(dim=-1)
    assert len(late.prompt) == 49
    for at, entry in enumerate(late.prompt):
        check(entry, table[at], prompt[at + 1], 1)


def test_a_prompt_lost_in_its_middle_reports_each_of_its_tokens_once(
    reference: Reference, prompt: list[int]
) -> None:
    """One of higher priority throws it out between two of its chunks."""
    engine = Engine.load(tiny_spec(max_num_batched_tokens=16, policy="priority", max_num_seqs=1))
    engine.add(Generate("low", prompt[:60], greedy(2, prompt_logprobs=0), priority=5))
    deltas = [delta for _ in range(2) for delta in engine.step()]
    assert sum(len(delta.prompt_logprobs or ()) for delta in deltas) == 32
    engine.add(Generate("high", [7, 8], greedy(2), priority=0))
    while engine.has_work:
        deltas += engine.step()
    preempted = [d.timings.preempted_at for d in deltas if d.id == "low" and d.finish_reason and d.timings]
    assert len(preempted[0]) == 1
    entries = [entry for delta in deltas for entry in delta.prompt_logprobs or ()]
    table = reference.logits(prompt[:60]).log_softmax(dim=-1)
    assert len(entries) == 59
    for at, entry in enumerate(entries):
        check(entry, table[at], prompt[at + 1], 0)


def test_each_mode_reports_its_own_numbers(reference: Reference, engine: Engine, prompt: list[int]) -> None:
    prompt = prompt[:20]
    raw = reference.logits(prompt)[-1]
    wishes: dict[str, Any] = {"temperature": 0.7, "top_k": 4, "logit_bias": {9: 6.5}, "seed": 3}
    at_draw = raw.clone()
    at_draw[9] += 6.5
    at_draw /= 0.7
    at_draw[at_draw < at_draw.topk(4).values[-1]] = -torch.inf
    expected = {
        "raw_logits": raw,
        "raw_logprobs": raw.log_softmax(-1),
        "processed_logits": at_draw,
        "processed_logprobs": at_draw.log_softmax(-1),
    }
    answers = answers_to(
        engine,
        {
            mode: (
                prompt,
                Sampling(max_tokens=1, logprobs=6, logprob_token_ids=(9, 1), logprobs_mode=mode, **wishes),  # type: ignore[arg-type]
            )
            for mode in expected
        },
    )
    tokens = {answer.token_ids[0] for answer in answers.values()}
    assert len(tokens) == 1, "the mode changes what is told, not what is drawn"
    token = tokens.pop()
    for mode, values in expected.items():
        entry = answers[mode].logprobs[0]
        known = values.topk(6).values.tolist()
        assert [value for _, value in entry.top] == close(known), mode
        assert entry.logprob == close(float(values[token])), mode
        assert list(entry.named) == close([float(values[9]), float(values[1])]), mode


def test_the_whole_vocabulary_is_reported_within_a_bound(engine: Engine, prompt: list[int]) -> None:
    answer = answers_to(engine, {"a": (prompt[:9], greedy(3, logprobs=WHOLE_VOCABULARY))})["a"]
    for entry in answer.logprobs:
        assert sorted(token for token, _ in entry.top) == list(range(VOCABULARY))
        values = [value for _, value in entry.top]
        assert values == sorted(values, reverse=True)
        assert float(torch.tensor(values).exp().sum()) == pytest.approx(1.0, abs=1e-4)
    most = MAX_LOGPROB_ENTRIES // VOCABULARY
    fits, over = greedy(most, logprobs=WHOLE_VOCABULARY), greedy(most + 1, logprobs=WHOLE_VOCABULARY)
    with pytest.raises(RequestRefused, match="log-probabilities are asked for") as caught:
        engine.add(Generate("b", [5], over))
    assert caught.value.code == "invalid_request"
    many = greedy(400, logprobs=0, logprob_token_ids=tuple(range(700)))
    with pytest.raises(RequestRefused, match="280400 log-probabilities are asked for"):
        engine.add(Generate("b", [5], many))
    for number in range(MAX_LIVE_ENTRIES // MAX_LOGPROB_ENTRIES):
        engine.add(Generate(f"c{number}", [5], fits))
    with pytest.raises(RequestRefused) as caught:
        engine.add(Generate("d", [5], greedy(1, logprobs=WHOLE_VOCABULARY)))
    assert caught.value.code == "queue_full"
    engine.add(Generate("e", [5], greedy(1, logprobs=20)))
    for name in ("c0", "c1", "e"):
        assert engine.abort(name)


def test_what_is_allowed_is_all_that_comes_and_bad_words_never_come_whole(engine: Engine) -> None:
    free = answers_to(engine, {"a": ([5, 6], greedy(12))})["a"].token_ids
    bad = (tuple(free[2:4]), (free[7],), tuple(free[4:7]))
    answers = answers_to(
        engine,
        {
            "allowed": ([5, 6], greedy(30, allowed_token_ids=(11, 12, 13))),
            "banned": ([5, 6], greedy(30, bad_words=bad)),
            "free": ([5, 6], greedy(12)),
        },
    )
    assert set(answers["allowed"].token_ids) <= {11, 12, 13}
    said = answers["banned"].token_ids
    assert said[:3] == free[:3], "the beginning of a bad word is no bad word"
    for word in bad:
        runs = [tuple(said[at : at + len(word)]) for at in range(len(said))]
        assert word not in runs
    assert answers["free"].token_ids == free


def test_wishes_that_leave_no_token_end_their_request_alone(engine: Engine) -> None:
    answers = answers_to(
        engine,
        {
            "stuck": ([5, 6], greedy(4, allowed_token_ids=(7,), bad_words=((7,),), logprobs=1)),
            "free": ([5, 6], greedy(4)),
        },
    )
    assert (answers["stuck"].finish, answers["stuck"].code) == ("error", "no_token_left")
    assert len(answers["free"].token_ids) == 4


@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "ahead"])
@pytest.mark.parametrize("closing", [(30,), (30, 31, 32)], ids=["one id", "three ids"])
def test_a_thought_is_closed_when_its_budget_is_spent(ahead: bool, closing: tuple[int, ...]) -> None:
    engine = Engine.load(tiny_spec(async_scheduling=ahead))
    open_prompt = [5, 6, 2042]
    answers = answers_to(
        engine,
        {
            f"{budget}": (open_prompt, greedy(12, thinking=Thinking(budget, (2042,), closing), bad_words=((30,),)))
            for budget in (0, 1, 5, 40)
        }
        | {
            "none": ([5, 6], greedy(12, thinking=Thinking(0, (2042,), closing))),
            "free": (open_prompt, greedy(12)),
        },
    )
    free = answers["free"].token_ids
    assert not set(free) & {2042, *closing}
    for budget in (0, 1, 5):
        said = answers[f"{budget}"].token_ids
        assert said[: budget + len(closing)] == [*free[:budget], *closing]
        assert not set(said[budget + len(closing) :]) & set(closing), "closed once"
    assert answers["40"].token_ids == free
    assert answers["none"].token_ids == answers_to(engine, {"x": ([5, 6], greedy(12))})["x"].token_ids


@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "ahead"])
def test_an_output_that_goes_round_is_ended(ahead: bool) -> None:
    engine = Engine.load(tiny_spec(async_scheduling=ahead))
    round_trip = {10: 100.0}
    answers = answers_to(
        engine,
        {
            "round": ([10, 10, 10], greedy(40, logit_bias=round_trip, repetition=Repetition(1, 2, 3))),
            "pairs": ([10, 10, 10], greedy(40, logit_bias=round_trip, repetition=Repetition(2, 2, 4))),
            "free": ([10, 10, 10], greedy(9, logit_bias=round_trip)),
        },
    )
    assert (answers["round"].token_ids, answers["round"].finish) == ([10] * 3, "repetition")
    assert (answers["pairs"].token_ids, answers["pairs"].finish) == ([10] * 8, "repetition")
    assert (answers["free"].token_ids, answers["free"].finish) == ([10] * 9, "length")


@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "ahead"])
def test_every_wish_gives_the_same_alone_and_among_others(ahead: bool, prompt: list[int]) -> None:
    engine = Engine.load(tiny_spec(max_num_seqs=16, async_scheduling=ahead))
    rest: dict[str, Any] = {"max_tokens": 10, "ignore_eos": True, "seed": 11}
    wishes: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 5, "logprobs": 3, "logprobs_mode": "processed_logprobs"},
        {"temperature": 1.3, "top_p": 0.7, "repetition_penalty": 1.3},
        {"temperature": 0.0, "frequency_penalty": 1.5, "presence_penalty": 0.5},
        {"temperature": 1.0, "min_p": 0.1, "logit_bias": {9: 5.0, 12: -50.0}},
        {"temperature": 1.0, "allowed_token_ids": tuple(range(100, 140)), "logprobs": 2},
        {"temperature": 0.0, "bad_words": ((9,), (20, 21)), "prompt_logprobs": 1},
        {"temperature": 1.0, "thinking": Thinking(3, (20,), (30, 31)), "logprob_token_ids": (4,), "logprobs": 0},
        {"temperature": 0.0, "min_tokens": 4, "logprobs": 5, "logprobs_mode": "raw_logits"},
    ]
    requests = {
        str(n): ([*prompt[n : n + 20 + 3 * n], 20], Sampling(**rest, **wish)) for n, wish in enumerate(wishes)
    }
    together = answers_to(engine, requests)
    for name, request in requests.items():
        alone = answers_to(engine, {name: request})[name]
        assert alone.token_ids == together[name].token_ids, wishes[int(name)]
        for one, other in zip(
            alone.logprobs + alone.prompt, together[name].logprobs + together[name].prompt, strict=True
        ):
            assert one.logprob == close(other.logprob)
            assert [value for _, value in one.top] == close([v for _, v in other.top])


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": (5, VOCABULARY)},
        {"logprob_token_ids": (-1,)},
        {"bad_words": ((5, VOCABULARY),)},
        {"bad_words": ((),)},
        {"thinking": Thinking(1, (5,), (VOCABULARY,))},
    ],
    ids=str,
)
def test_ids_that_would_break_the_step_are_refused(engine: Engine, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestRefused, match=next(iter(fields))) as caught:
        engine.add(Generate("a", [5], greedy(**fields)))
    assert caught.value.code == "invalid_request"
