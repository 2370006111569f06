"""The sampler against Hugging Face's processors, against exact distributions, and against its neighbours.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from quire_engine import sampler
from quire_engine.sampler import Drawn, shortlist, uniform
from quire_engine.step import PENDING, Draw, Scheduled
from quire_kernels import load
from quire_schemas.wire import WHOLE_VOCABULARY, Sampling, Thinking

REFERENCE = load("reference")


def sample(logits: Tensor, rows: Sequence[Scheduled]) -> Drawn:
    """As the sampler does, which makes something else of its logits."""
    return sampler.sample(logits.clone(memory_format=torch.contiguous_format), rows, REFERENCE)


def row(
    sampling: Sampling,
    *,
    seed: int = 0,
    prompt: Sequence[int] = (0,),
    output: Sequence[int] = (),
    ending: tuple[int, ...] = (),
) -> Scheduled:
    """An item that draws after `prompt` and `output`."""
    known = (*prompt, *output)
    draw = Draw(sampling, seed, len(prompt), ending)
    return Scheduled("r", 1, (known[-1],), len(known) - 1, len(known), (), draw, draw.history(known))


def params(**fields: Any) -> Sampling:
    return Sampling(max_tokens=64, **fields)


def logits_of(rows: int, size: int = 97, seed: int = 1) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def test_greedy_takes_the_largest_and_the_lowest_id_of_a_tie() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0], [7.0, 7.0, 7.0, 7.0]])
    greedy = params(temperature=0.0)
    assert sample(logits, [row(greedy), row(greedy)]).tokens == [1, 0]
    # the same on the road that also handles bias and draws
    biased = params(temperature=0.0, logit_bias={3: 3.0})
    assert sample(logits, [row(biased), row(greedy)]).tokens == [1, 0]


def kept_by(scores: Tensor, filters: Sequence[Sampling], size: int | None = None) -> Tensor:
    """The mask [R, V] of what `shortlist` leaves, of as many tokens as it takes."""
    ids, left, complete = shortlist(scores, filters, size or scores.shape[1])
    if not complete.all():
        return kept_by(scores, filters)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, torch.isfinite(left))


@pytest.mark.parametrize("top_k", [0, 1, 5, 200])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.9])
@pytest.mark.parametrize("size", [None, 40], ids=["sorted", "short"])
def test_the_filters_leave_what_those_of_hugging_face_leave(
    top_k: int, top_p: float, min_p: float, size: int | None
) -> None:
    if size is not None and 2 * top_k > size:
        size = None  # as the sampler does it
    scores = logits_of(8)
    warpers = LogitsProcessorList()
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    ids: Any = torch.zeros(8, 1, dtype=torch.long)
    expected = torch.isfinite(torch.as_tensor(warpers(ids, scores.clone())))
    assert torch.equal(kept_by(scores, [params(top_k=top_k, top_p=top_p, min_p=min_p)] * 8, size), expected)


def test_tokens_that_tie_with_the_last_of_top_k_all_stay() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    expected = torch.tensor([[False, True, True, True, True, False]])
    assert torch.equal(kept_by(scores, [params(top_k=2)]), expected)
    assert torch.equal(kept_by(scores, [params(top_k=2)], size=3), expected), "3 are too few"


def test_rows_with_other_filters_do_not_disturb_each_other() -> None:
    scores = logits_of(3)
    filters = [params(top_k=5), params(top_p=0.5), params(min_p=0.1)]
    alone = [kept_by(scores[r : r + 1], filters[r : r + 1]) for r in range(3)]
    assert torch.equal(kept_by(scores, filters), torch.cat(alone))


def test_a_short_list_draws_what_the_whole_vocabulary_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steep and flat rows over a large vocabulary: some lists suffice, others have to be made again in full."""
    monkeypatch.setattr(sampler, "SHORTLISTS", (64, 512))
    steepness = torch.tensor([0.1, 1.0, 3.0, 6.0]).repeat(16).unsqueeze(1)
    logits = logits_of(64, size=6000, seed=4) / 3 * steepness
    choices: list[dict[str, Any]] = [
        {"top_p": 0.9},
        {"top_k": 20, "top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 900},
        {},
    ]
    rows = [row(params(**choices[seed % 5]), seed=seed) for seed in range(64)]
    short = sample(logits, rows).tokens
    monkeypatch.setattr(sampler, "SHORTLISTS", ())
    assert sample(logits, rows).tokens == short


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_is_the_one_of_hugging_face_over_prompt_and_output(penalty: float) -> None:
    logits = logits_of(1, seed=3)
    prompt, output = [4, 8, 8, 15], [16, 23, 42, 16]
    ids: Any = torch.tensor([prompt + output])
    processed = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    expected = int(torch.as_tensor(processed).argmax())
    item = row(params(temperature=0.0, repetition_penalty=penalty), prompt=prompt, output=output)
    assert sample(logits, [item]).tokens == [expected]


def distribution(item: Scheduled, logits: Tensor, draws: int = 6000) -> Tensor:
    """How often each token is drawn by `draws` requests like `item` that differ in their seed."""
    assert item.draw is not None
    rows = [
        Scheduled(
            "r",
            1,
            item.token_ids,
            item.start,
            item.end,
            (),
            Draw(item.draw.sampling, seed, item.draw.num_prompt, item.draw.ending_ids),
            item.history,
        )
        for seed in range(draws)
    ]
    tokens = sample(logits.expand(draws, -1), rows).tokens
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]).double()


def chi_square_bound(freedom: int) -> float:
    """Upper 1e-4 quantile of chi-square (Wilson and Hilferty's cube; 3.719 is the quantile of the normal)."""
    spread = 2.0 / (9.0 * freedom)
    return freedom * (1.0 - spread + 3.719 * math.sqrt(spread)) ** 3


def processed(scores: Tensor, sampling: Sampling, prompt: list[int], output: list[int], ends: list[int]) -> Tensor:
    """What Hugging Face's processors make of one row [V]; what it has none for is written out here."""
    ids: Any = torch.tensor([prompt + output])
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    row: Any = scores.unsqueeze(0).clone()
    found = torch.as_tensor(processors(ids, row))[0]
    for token in output:
        found[token] -= sampling.frequency_penalty
    for token in set(output):
        found[token] -= sampling.presence_penalty
    for token, bias in sampling.logit_bias.items():
        found[token] += bias
    processors = LogitsProcessorList()
    if sampling.allowed_token_ids:
        allowed = list(sampling.allowed_token_ids)
        processors.append(PrefixConstrainedLogitsProcessor(lambda batch, known: allowed, num_beams=1))
    if sampling.bad_words:
        processors.append(NoBadWordsLogitsProcessor([list(word) for word in sampling.bad_words], eos_token_id=-1))
    if sampling.min_tokens:
        processors.append(MinNewTokensLengthLogitsProcessor(len(prompt), sampling.min_tokens, ends))
    if sampling.temperature:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            processors.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            processors.append(MinPLogitsWarper(sampling.min_p))
    row = found.unsqueeze(0)
    return torch.as_tensor(processors(ids, row))[0]


PROMPT, OUTPUT, ENDS = [1, 2], [3, 3, 5], [4, 7]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 6},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 7, "top_p": 0.9},
        {"top_p": 0.95, "min_p": 0.05},
        {"top_k": 5, "min_p": 0.03},
        {"temperature": 1.2, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
        {"logit_bias": {0: 2.0, 3: -1.5}},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"allowed_token_ids": (0, 3, 5, 8, 9)},
        {"bad_words": ((8,), (5, 9), (3, 5, 10), (3, 0))},
        {"min_tokens": 4},
        {"thinking": Thinking(9, (1,), (11,))},
        {
            "temperature": 1.1,
            "top_k": 6,
            "top_p": 0.95,
            "min_p": 0.01,
            "presence_penalty": 0.3,
            "frequency_penalty": -0.4,
            "repetition_penalty": 1.3,
            "logit_bias": {0: 1.0, 5: 0.5},
            "allowed_token_ids": tuple(range(10)),
            "bad_words": ((9,), (5, 2)),
            "min_tokens": 4,
        },
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(fields: dict[str, Any]) -> None:
    sampling = params(**fields)
    logits = logits_of(1, size=12, seed=5) / 2
    expected = torch.softmax(processed(logits[0], sampling, PROMPT, OUTPUT, ENDS).double(), dim=-1)
    item = row(sampling, prompt=PROMPT, output=OUTPUT, ending=tuple(ENDS))
    seen = distribution(item, logits)
    assert seen[expected == 0].sum() == 0, "an excluded token was drawn"
    possible = expected > 0
    wanted = expected[possible] * seen.sum()
    statistic = float(((seen[possible] - wanted) ** 2 / wanted).sum())
    assert statistic < chi_square_bound(max(int(possible.sum()) - 1, 1))


def wishes(seed: int, vocabulary: int) -> Sampling:
    """Some wishes of a request, drawn by `seed`; they leave tokens to choose."""
    rng = random.Random(seed)
    some: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.5, 1.0, 1.5]),
        "top_k": rng.choice([0, 3, 20]),
        "top_p": rng.choice([1.0, 0.9, 0.5]),
        "min_p": rng.choice([0.0, 0.02]),
        "repetition_penalty": rng.choice([1.0, 0.8, 1.4]),
        "presence_penalty": rng.choice([0.0, 1.5]),
        "frequency_penalty": rng.choice([0.0, -0.5, 0.7]),
        "min_tokens": rng.choice([0, 6]),
        "logprobs": WHOLE_VOCABULARY,
        "logprobs_mode": "processed_logits",
    }
    if rng.random() < 0.5:
        some["logit_bias"] = {rng.randrange(vocabulary): rng.uniform(-3, 3) for _ in range(6)}
    if rng.random() < 0.4:
        some["allowed_token_ids"] = tuple(rng.sample(range(vocabulary), vocabulary // 2))
    if rng.random() < 0.5:
        some["bad_words"] = tuple(tuple(rng.choices(range(40, 50), k=rng.randrange(1, 4))) for _ in range(5))
    return params(**some)


def test_all_wishes_make_of_the_logits_what_hugging_face_makes_of_them() -> None:
    """Many rows at once, each with wishes of its own; the reference takes them one by one."""
    logits = logits_of(30, seed=8)
    rows, expected = [], []
    for r in range(30):
        rng = random.Random(f"history {r}")
        prompt, output = rng.choices(range(40), k=5), rng.choices(range(40, 50), k=rng.randrange(1, 8))
        sampling = wishes(r, logits.shape[1])
        rows.append(row(sampling, prompt=prompt, output=output, ending=(3, 60), seed=r))
        expected.append(processed(logits[r], sampling, prompt, output, [3, 60]))
    drawn = sample(logits, rows)
    assert not drawn.stuck
    assert sum(bool(torch.isneginf(values).any()) for values in expected) > 15, "the wishes matter"
    for r, values in enumerate(expected):
        entry = drawn.logprobs[r]
        found = torch.empty_like(values)
        found[[token for token, _ in entry.top]] = torch.tensor([value for _, value in entry.top])
        torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-5)
        assert torch.isfinite(values[entry.token_id])
        if rows[r].draw is not None and wishes(r, logits.shape[1]).temperature == 0.0:
            assert entry.token_id == int(values.argmax())


def test_what_a_row_draws_and_reports_does_not_change_with_its_neighbours() -> None:
    """To the last bit, whoever is beside it, in whatever order."""
    logits = logits_of(20, seed=12, size=150)
    rows: list[Scheduled] = []
    for r in range(20):
        rng = random.Random(f"row {r}")
        sampling = msgspec.structs.replace(
            wishes(r, 150),
            logprobs=rng.choice([None, 0, 4, 9, WHOLE_VOCABULARY]),
            logprobs_mode=rng.choice(["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"]),
            logprob_token_ids=rng.choice([(), (5, 120)]),
            thinking=rng.choice([None, Thinking(2, (45,), (7, 8))]),
        )
        output = rng.choices(range(40, 50), k=rng.randrange(1, 8))
        rows.append(row(sampling, seed=r, prompt=[1, 2, 3], output=output, ending=(3, 60)))
    rows[4] = row(params(temperature=0.0))
    alone = [sample(logits[r : r + 1], [rows[r]]) for r in range(20)]
    for shuffle in range(4):
        order = random.Random(shuffle).sample(range(20), 20 if shuffle < 2 else 7)
        together = sample(logits[order], [rows[r] for r in order])
        for place, r in enumerate(order):
            assert together.tokens[place] == alone[r].tokens[0]
            assert together.logprobs.get(place) == alone[r].logprobs.get(0)


def test_greedy_rows_without_wishes_take_the_short_way() -> None:
    """No copy of the logits, whatever their number; nor is a history asked for where nothing needs it."""
    assert Draw(params(temperature=0.0), 0, 1, (3,)).is_plain
    for fields, reach in (
        ({"allowed_token_ids": (1,)}, 0),
        ({"bad_words": ((1,),)}, 0),
        ({"bad_words": ((1, 2, 3), (4,))}, 2),
        ({"thinking": Thinking(1, (1,), (2,))}, sys.maxsize),
        ({"repetition_penalty": 1.1}, sys.maxsize),
        ({"logprobs": 0}, 0),
        ({"min_tokens": 1}, 0),
    ):
        draw = Draw(params(temperature=0.0, **fields), 0, 1, (3,))
        assert not draw.is_plain
        assert (draw.reach, draw.needs_history) == (reach, reach > 0)
    draw = Draw(params(bad_words=((1, 2, 3),)), 0, 1, ())
    assert draw.history([5, 6, 7, 8]) == (7, 8)
    assert draw.history([5, 6, 7, 8], pending=True) == (8, PENDING)
    assert Draw(params(bad_words=((1, 2),)), 0, 1, ()).history([5, 6], pending=True) == (PENDING,)


def test_a_thought_is_closed_over_all_thoughts_together() -> None:
    logits = logits_of(1)
    best = int(logits.argmax())
    thinking = Thinking(4, (50, 51), (60, 61))

    def next_token(prompt: list[int], output: list[int]) -> int:
        return sample(
            logits, [row(params(temperature=0.0, thinking=thinking), prompt=prompt, output=output)]
        ).tokens[0]

    assert next_token([1], [2, 3, 4, 5, 6, 7]) == best, "no thought is open"
    assert next_token([50, 51, 1, 2, 3, 4, 5], []) == best, "what the prompt thought costs nothing"
    assert next_token([50, 51], [1, 2, 3]) == best
    assert next_token([50, 51], [1, 2, 3, 4]) == 60
    assert next_token([50, 51], [1, 2, 3, 4, 60]) == 61, "the closing ids come whole"
    assert next_token([50, 51], [1, 2, 3, 4, 60, 61]) == best
    assert next_token([50, 51], [1, 60, 61, 9, 50, 51, 2, 3]) == best
    assert next_token([50, 51], [1, 60, 61, 9, 50, 51, 2, 3, 4]) == 60, "one and three are four"
    assert next_token([50, 51, 7, 60, 61], [1, 2, 3, 4, 5]) == best, "the prompt's thought is closed"


def test_wishes_that_contradict_each_other_are_told_from_broken_logits() -> None:
    logits = logits_of(3)
    logits[1, 4] = math.nan
    stuck = params(allowed_token_ids=(5,), bad_words=((5,),), logprobs=1)
    drawn = sample(logits, [row(stuck), row(stuck), row(params(allowed_token_ids=(5,)))])
    assert (drawn.broken, drawn.stuck) == ((1,), (0,))
    assert drawn.tokens[2] == 5
    assert not drawn.logprobs


def test_a_seeded_draw_depends_on_seed_and_position_alone() -> None:
    logits = logits_of(6, seed=9)
    item = row(params(seed=7, top_p=0.95), seed=7, prompt=[1, 2, 3])
    others = [row(params(temperature=1.5, top_k=3), seed=s) for s in range(5)]
    alone = sample(logits[:1], [item]).tokens[0]
    for place in range(6):
        order = [*others[:place], item, *others[place:]]
        shifted = torch.cat([logits[1 : 1 + place], logits[:1], logits[1 + place :]])
        assert sample(shifted, order).tokens[place] == alone
    later = [row(params(), seed=7, prompt=[0] * n) for n in range(1, 40)]
    flat = torch.zeros(39, 50)
    assert len(set(sample(flat, later).tokens)) > 15, "another position is another number"
    assert len(set(sample(flat, [row(params(), seed=s) for s in range(39)]).tokens)) > 15


def test_the_numbers_behind_the_draws_are_uniform_over_seeds_and_positions() -> None:
    for numbers in ([uniform(s, 5) for s in range(20_000)], [uniform(-3, p) for p in range(20_000)]):
        counts = torch.histc(torch.tensor(numbers, dtype=torch.float64), bins=100, min=0.0, max=1.0)
        assert float(((counts - 200) ** 2 / 200).sum()) < chi_square_bound(99)
        assert all(0.0 <= number < 1.0 for number in numbers)


def test_ending_ids_cannot_be_chosen_below_min_tokens() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 3] = 9.0
    logits[0, 4] = 8.0
    eager = params(temperature=0.0, min_tokens=2)
    assert sample(logits, [row(eager, ending=(3, 4, 99))]).tokens == [0]
    assert sample(logits, [row(eager, output=[5], ending=(3,))]).tokens == [4]
    assert sample(logits, [row(eager, output=[5, 6], ending=(3,))]).tokens == [3]
    drawn = params(temperature=1.0, min_tokens=1)
    assert {sample(logits, [row(drawn, seed=s, ending=(3, 4))]).tokens[0] for s in range(40)}.isdisjoint({3, 4})


def test_frequency_and_presence_look_at_the_output_alone() -> None:
    logits = torch.tensor([[3.0, 2.9, 0.0]])
    for fields in ({"presence_penalty": 0.5}, {"frequency_penalty": 0.5}):
        sampling = params(temperature=0.0, **fields)
        assert sample(logits, [row(sampling, prompt=[0, 0, 0])]).tokens == [0]
        assert sample(logits, [row(sampling, prompt=[1], output=[0])]).tokens == [1]
    mild = params(temperature=0.0, frequency_penalty=0.06)
    assert sample(logits, [row(mild, output=[0])]).tokens == [0]
    assert sample(logits, [row(mild, output=[0, 0])]).tokens == [1], "frequency counts every occurrence"


def test_a_bias_of_a_hundred_forces_or_forbids_a_token() -> None:
    logits = logits_of(1)
    best = int(logits.argmax())
    assert sample(logits, [row(params(temperature=0.0, logit_bias={5: 100.0}))]).tokens == [5]
    assert sample(logits, [row(params(temperature=0.0, logit_bias={best: -100.0}))]).tokens != [best]


def test_reported_logprobs_are_those_of_the_raw_logits() -> None:
    logits = logits_of(3)
    raw = torch.log_softmax(logits.double(), dim=-1)
    rows = [
        row(params(temperature=0.0, logprobs=3, logit_bias={5: 100.0})),
        row(params(temperature=0.3, top_k=1)),
        row(params(temperature=2.0, logprobs=0), seed=3),
    ]
    drawn = sample(logits, rows)
    assert set(drawn.logprobs) == {0, 2}
    first, last = drawn.logprobs[0], drawn.logprobs[2]
    assert first.token_id == 5 == drawn.tokens[0]
    assert first.logprob == pytest.approx(float(raw[0, 5]), abs=1e-5)
    values, ids = raw[0].topk(3)
    assert [token for token, _ in first.top] == ids.tolist()
    assert [value for _, value in first.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert last.top == ()
    assert last.logprob == pytest.approx(float(raw[2, drawn.tokens[2]]), abs=1e-5)


def test_the_logits_are_left_as_they_were() -> None:
    logits = logits_of(2)
    before = logits.clone()
    sample(logits, [row(params(logit_bias={1: 5.0}, top_p=0.5, presence_penalty=1.0), output=[1]), row(params())])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_reported_and_the_others_are_drawn(bad: float) -> None:
    logits = logits_of(3)
    expected = sample(logits, [row(params(), seed=s) for s in range(3)]).tokens
    logits[1, 4] = bad
    for sampling in (params(temperature=0.0), params(logprobs=2)):
        drawn = sample(logits, [row(sampling, seed=s) for s in range(3)])
        assert drawn.broken == (1,)
    assert [drawn.tokens[0], drawn.tokens[2]] == [expected[0], expected[2]]


@pytest.mark.parametrize("temperature", [1e-45, 1e-6, 1e-3])
def test_a_very_small_temperature_is_greedy_and_not_a_division_by_zero(temperature: float) -> None:
    logits = logits_of(4)
    rows = [row(params(temperature=temperature, top_p=0.9), seed=s) for s in range(4)]
    assert sample(logits, rows).tokens == logits.argmax(dim=-1).tolist()
