"""From logits to tokens, over all rows of a step at once.

Order of operations, per row: repetition, frequency and presence penalty; logit bias; the ids that are allowed;
the ban on ending ids below `min_tokens` and on what would complete a bad word; the end of a thought that has used
up its budget, which wins over all before; what a grammar forbids; temperature; top-k, top-p, min-p, each on what
the one before it left; one draw. Temperature 0 takes the lowest id of the largest value after all but temperature
and filters. What is reported of a token is of the raw logits, or of those at the draw (`logprobs_mode`).

A draw needs one number in [0, 1): where it falls in the cumulative probabilities decides. That number is a hash of
(seed, position), so the sampler has no state: what a request draws depends neither on its neighbours in the batch
nor on how often it was preempted and computed again, and nothing is left behind when it ends.

Legend: R rows (requests that draw in this step), V vocabulary, F rows that are filtered, K length of a list.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from quire_engine.masks import Masks
from quire_engine.step import Draw, Scheduled
from quire_kernels import Kernels
from quire_schemas.wire import WHOLE_VOCABULARY, Sampling, Thinking, TokenLogprobs

SHORTLISTS = (1024, 16384)
"""Filters look at so many of the likeliest tokens first, and sort the whole vocabulary only if they must."""

_KEY = struct.Struct("<QQ")


@dataclass(slots=True)
class Drawn:
    """Per row: the token, its log-probabilities if asked for. `broken` are rows without a usable distribution,
    `stuck` those that had one until the request's own wishes left no token of it.
    """

    tokens: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    broken: tuple[int, ...] = ()
    stuck: tuple[int, ...] = ()


class Drawer(Protocol):
    """What draws once everything that the host has to say about logits is said."""

    def __call__(self, scores: Tensor, draws: Sequence[Draw], positions: Sequence[int]) -> Tensor:
        """One token per row at its temperature, of what its filters leave; it depends on seed and position alone.

        `scores` [R, V] float32, which become something else; returns [R] int64.
        """


def likeliest(peaks: Tensor, tokens: Tensor) -> Drawn:
    """What plain rows draw. `peaks` [R] are the logits of `tokens` [R], the likeliest."""
    return Drawn(tokens.tolist(), broken=_not_finite(peaks))


def sample(
    logits: Tensor,
    rows: Sequence[Scheduled],
    kernels: Kernels,
    masks: Masks | None = None,
    drawer: Drawer | None = None,
) -> Drawn:
    """Choose a token for each row. `logits` [R, V] float32, dense, which become something else; every one of
    `rows` has a draw. `drawer` None: `draw_tokens`.

    A row with NaN or +inf among its logits, or with nothing but -inf, is broken: its token has no meaning; nor has
    that of a row that is stuck. `masks` are those of all rows with a matcher.
    """
    draws = [draw for row in rows if (draw := row.draw) is not None]
    if len(draws) != len(rows) or logits.shape[0] != len(rows):
        raise ValueError(f"{len(rows)} rows, {len(draws)} with a draw, {logits.shape[0]} rows of logits")
    peaks, best = kernels.largest(logits)
    if all(draw.is_plain for draw in draws):
        return likeliest(peaks, best)
    broken = _not_finite(peaks)
    asked = [r for r, draw in enumerate(draws) if draw.sampling.logprobs is not None]
    table = logits[asked] if asked else logits
    tokens = best
    stuck: tuple[int, ...] = ()
    if _shape(logits, rows, draws, kernels, masks):
        peaks, tokens = kernels.largest(logits)
        stuck = tuple(r for r in _not_finite(peaks) if r not in broken)
    lost = {*broken, *stuck}
    random = [r for r, draw in enumerate(draws) if draw.sampling.temperature > 0.0 and r not in lost]
    if random:
        own = logits[random] if len(random) < len(rows) or _is_processed(draws) else logits
        picked = (drawer or draw_tokens)(own, [draws[r] for r in random], [rows[r].end for r in random])
        tokens = tokens.index_copy(0, torch.tensor(random, device=tokens.device), picked)
    chosen: list[int] = tokens.tolist()
    if lost.intersection(asked):
        table = table[[at for at, r in enumerate(asked) if r not in lost]]
        asked = [r for r in asked if r not in lost]
    if not asked:
        return Drawn(chosen, broken=broken, stuck=stuck)
    wanted = [draws[r].sampling for r in asked]
    processed = [at for at, sampling in enumerate(wanted) if sampling.logprobs_mode.startswith("processed")]
    if processed:
        table[processed] = _processed(logits[[asked[at] for at in processed]], [wanted[at] for at in processed])
    found = _report(table, [chosen[r] for r in asked], wanted, [sampling.logprobs or 0 for sampling in wanted])
    return Drawn(chosen, dict(zip(asked, found, strict=True)), broken, stuck)


def _not_finite(peaks: Tensor) -> tuple[int, ...]:
    """Places in `peaks` [R]. There are so few that the host is done before torch has begun."""
    return tuple(r for r, peak in enumerate(peaks.tolist()) if not math.isfinite(peak))


# ── before the draw ───────────────────────────────────────────────────────────────────────────────────────


def _shape(
    logits: Tensor, rows: Sequence[Scheduled], draws: Sequence[Draw], kernels: Kernels, masks: Masks | None
) -> bool:
    """All that a draw changes in `logits` [R, V] before temperature, in place. False if no row asks for any.

    Only what rows name is touched, at places in the flat [R * V], all rows' places at once.
    """
    vocabulary = logits.shape[1]
    repeated: list[int] = []  # places of prompt and output, and of output, with repeats
    said: list[int] = []
    biased: list[int] = []
    biases: list[float] = []
    allowed: dict[int, tuple[int, ...]] = {}
    banned: list[int] = []
    forced: dict[int, int] = {}
    for r, (row, draw) in enumerate(zip(rows, draws, strict=True)):
        if draw.is_plain:
            continue
        sampling, base = draw.sampling, r * vocabulary
        if draw.has_penalty:
            if sampling.repetition_penalty != 1.0:
                repeated += [base + token for token in row.history]
            if sampling.frequency_penalty or sampling.presence_penalty:
                said += [base + token for token in row.history[draw.num_prompt :]]
        if sampling.logit_bias:
            biased += [base + token for token in sampling.logit_bias]
            biases += sampling.logit_bias.values()
        if sampling.allowed_token_ids:
            allowed[r] = sampling.allowed_token_ids
        if row.end - draw.num_prompt < sampling.min_tokens and draw.matcher is None:
            banned += [base + token for token in draw.ending_ids if token < vocabulary]
        if sampling.bad_words:
            banned += [base + token for token in _completing(draw, row)]
        if sampling.thinking is not None:
            closing = _closing(sampling.thinking, row.history, draw.num_prompt)
            if closing is not None:
                forced[r] = closing
    if not (repeated or said or biased or allowed or banned or forced or masks is not None):
        return False
    flat = logits.view(-1)
    if repeated or said:
        _penalise(flat, vocabulary, draws, repeated, said)
    if biased:
        flat[_places(biased, flat)] += torch.tensor(biases, device=flat.device)
    if allowed:
        kept = _places([r * vocabulary + token for r, ids in allowed.items() for token in ids], flat)
        values = flat[kept]
        logits[list(allowed)] = -math.inf
        flat[kept] = values
    if banned:
        flat[_places(banned, flat)] = -math.inf
    if forced:
        logits[list(forced)] = -math.inf
        flat[_places([r * vocabulary + token for r, token in forced.items()], flat)] = 0.0
    if masks is not None:
        masks.apply(logits, kernels)
    return True


def _places(places: Sequence[int], beside: Tensor) -> Tensor:
    return torch.tensor(places, dtype=torch.int64, device=beside.device)


def _penalise(
    flat: Tensor, vocabulary: int, draws: Sequence[Draw], repeated: Sequence[int], said: Sequence[int]
) -> None:
    """Penalties, in place. `flat` [R * V]; places of each row's known tokens and of its output, with repeats.

    Repetition divides positive and multiplies negative scores of every token in prompt or output (as in CTRL,
    arXiv:1909.05858). Frequency subtracts once per occurrence in the output, presence once if there is any.
    """

    def of_rows(places: Tensor, name: str) -> Tensor:
        per_row = torch.tensor([getattr(draw.sampling, name) for draw in draws], device=flat.device)
        return per_row[places.div(vocabulary, rounding_mode="floor")]

    if repeated:
        places = torch.unique(_places(repeated, flat))
        penalty, picked = of_rows(places, "repetition_penalty"), flat[places]
        flat[places] = torch.where(picked > 0, picked / penalty, picked * penalty)
    if said:
        places, counts = torch.unique(_places(said, flat), return_counts=True)
        flat[places] -= of_rows(places, "frequency_penalty") * counts + of_rows(places, "presence_penalty")


def _completing(draw: Draw, row: Scheduled) -> list[int]:
    """The ids with which a bad word would be whole in the output."""
    output = row.history[max(0, len(row.history) - (row.end - draw.num_prompt)) :]
    return [
        word[-1]
        for word in draw.sampling.bad_words
        if len(word) <= len(output) + 1 and output[len(output) + 1 - len(word) :] == word[:-1]
    ]


def _closing(thinking: Thinking, history: tuple[int, ...], num_prompt: int) -> int | None:
    """The id that must come next because an open thought has used up the budget; None when nothing must.

    Tokens of the output between `opening` and `closing` count, over all thoughts. What the prompt has opened is
    open.
    """
    opening, closing = thinking.opening, thinking.closing
    spent = at = 0
    while True:
        began = _behind(history, opening, at)
        if began is None:
            return None
        ended = _behind(history, closing, began)
        until = len(history) if ended is None else ended - len(closing)
        spent += max(0, until - max(began, num_prompt))
        if ended is None:
            break
        at = ended
    said = next((n for n in range(len(closing) - 1, 0, -1) if history[began:][-n:] == closing[:n]), 0)
    return closing[said] if spent - said >= thinking.budget else None


def _behind(history: tuple[int, ...], run: tuple[int, ...], at: int) -> int | None:
    """The place behind the first `run` in `history` from place `at` on."""
    while True:
        try:
            at = history.index(run[0], at)
        except ValueError:
            return None
        if history[at : at + len(run)] == run:
            return at + len(run)
        at += 1


# ── the draw ──────────────────────────────────────────────────────────────────────────────────────────────


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that belongs to (seed, position): bits of a hash, a counter-based generator.

    52 bits and not 53, so that its product with any sum s stays below s after rounding."""
    digest = hashlib.blake2b(_KEY.pack(seed & 0xFFFFFFFFFFFFFFFF, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 12) * 2.0**-52


def draw_tokens(scores: Tensor, draws: Sequence[Draw], positions: Sequence[int]) -> Tensor:
    """`Drawer` on the host: where a number of (seed, position) falls in the cumulative probabilities."""
    device = scores.device
    # below the floor the likeliest token has all the probability anyhow, and float32 would make it zero
    temperature = torch.tensor([draw.sampling.temperature for draw in draws], device=device).clamp_(min=1e-6)
    # the peak first: then a small temperature sends losers to -inf and never makes inf - inf
    scaled = scores.sub_(scores.amax(dim=-1, keepdim=True)).div_(temperature.unsqueeze(1))
    numbers = [uniform(draw.seed, position) for draw, position in zip(draws, positions, strict=True)]
    points = torch.tensor(numbers, dtype=torch.float64, device=device)
    filtered = [r for r, draw in enumerate(draws) if _has_filter(draw.sampling)]
    if not filtered:
        return _pick(scaled, points)
    tokens = torch.empty(len(draws), dtype=torch.int64, device=device)
    free = [r for r, draw in enumerate(draws) if not _has_filter(draw.sampling)]
    if free:
        tokens[free] = _pick(scaled[free], points[free])
    # a list is lengthened for its own row alone: a neighbour's filters must not change what a row draws
    vocabulary = scores.shape[1]
    for size in (*(length for length in SHORTLISTS if length < vocabulary), vocabulary):
        fitting = [r for r in filtered if size == vocabulary or 2 * draws[r].sampling.top_k <= size]
        if not fitting:
            continue
        some = scaled if len(fitting) == len(draws) else scaled[fitting]
        ids, left, complete = shortlist(some, [draws[r].sampling for r in fitting], size)
        tokens[fitting] = ids.gather(1, _pick(left, points[fitting]).unsqueeze(1)).squeeze(1)
        done = {r for r, whole in zip(fitting, complete.tolist(), strict=True) if whole}
        filtered = [r for r in filtered if r not in done]
    return tokens


def _pick(scores: Tensor, points: Tensor) -> Tensor:
    """Where `points` [R] fall in the cumulative probabilities of `scores` [R, K]; indices [R]."""
    # summed in double, so that a vocabulary's worth of additions cannot shift a boundary noticeably
    reach = torch.softmax(scores, dim=-1).cumsum(dim=-1, dtype=torch.float64)
    # the first index whose reach is above the target has a probability of its own: none that is excluded is hit
    target = points.unsqueeze(1) * reach[:, -1:]
    return torch.searchsorted(reach, target, right=True).squeeze(1).clamp_(max=scores.shape[1] - 1)


def _has_filter(sampling: Sampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def shortlist(scores: Tensor, filters: Sequence[Sampling], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the filters leave of the `size` likeliest tokens. `scores` [F, V] at temperature; K = `size`.

    Returns ids [F, K] in ascending order, their scores [F, K] with -inf for those left out, and [F] whether the
    row's list is complete: if even its last token stays, more may have to, and a longer list must be made.
    top_k 0 is off; all that tie with the k-th stay. top_p keeps the likeliest tokens up to the one with which
    their sum reaches p, of what top-k left. min_p keeps tokens with at least that share of the likeliest one's
    probability.
    """
    device, vocabulary = scores.device, scores.shape[1]
    if size < vocabulary:
        values, ids = scores.topk(size, dim=-1)
    else:
        values, ids = scores.sort(dim=-1, descending=True, stable=True)
    kept = torch.ones_like(values, dtype=torch.bool)
    limits = [f.top_k for f in filters]
    if any(limits):
        last = torch.tensor([min(k, size) - 1 if k else size - 1 for k in limits], device=device)
        kept &= values >= values.gather(1, last.unsqueeze(1))
    if any(f.top_p < 1.0 for f in filters):
        probs = values.masked_fill(~kept, -math.inf)
        limited = torch.tensor([k > 0 for k in limits], device=device)
        total = torch.where(limited, probs.logsumexp(dim=-1), scores.logsumexp(dim=-1))
        probs.sub_(total.unsqueeze(1)).exp_()
        # rows without top_p get a bound that no rounding of the sum can pass
        bound = torch.tensor([f.top_p if f.top_p < 1.0 else 2.0 for f in filters], device=device)
        kept &= probs.cumsum(dim=-1, dtype=torch.float64).sub_(probs) < bound.double().unsqueeze(1)
    if any(f.min_p > 0.0 for f in filters):
        # exp(score - peak) is the share; the comparison in logs needs no softmax, and log(0) = -inf is "off"
        share = torch.tensor([math.log(f.min_p) if f.min_p else -math.inf for f in filters], device=device)
        kept &= values - values[:, :1] >= share.unsqueeze(1)
    kept[:, 0] = True
    values.masked_fill_(~kept, -math.inf)
    if size < vocabulary:
        ids, order = ids.sort(dim=-1)
        return ids, values.gather(1, order), ~kept[:, -1]
    every = torch.arange(vocabulary, device=device).expand_as(values)
    return every, torch.empty_like(values).scatter_(1, ids, values), torch.ones_like(kept[:, 0])


# ── what is reported ──────────────────────────────────────────────────────────────────────────────────────


def score(logits: Tensor, targets: Sequence[int], samplings: Sequence[Sampling]) -> list[TokenLogprobs]:
    """What `prompt_logprobs` of each row's sampling reports of its target. `logits` [R, V], not changed."""
    counts = [sampling.prompt_logprobs or 0 for sampling in samplings]
    return _report(logits, targets, samplings, counts, ranked=True)


def _is_processed(draws: Sequence[Draw]) -> bool:
    """Whether the scores at the draw are looked at once more after it."""
    return any(
        draw.sampling.logprobs is not None and draw.sampling.logprobs_mode.startswith("processed")
        for draw in draws
    )


def _processed(shaped: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Logits at the draw, of `shaped` [F, V], which is changed; -inf for what the filters leave out."""
    temperature = torch.tensor(
        [max(s.temperature, 1e-6) if s.temperature > 0.0 else 1.0 for s in samplings], device=shaped.device
    )
    shaped.div_(temperature.unsqueeze(1))
    filtered = [r for r, sampling in enumerate(samplings) if sampling.temperature > 0.0 and _has_filter(sampling)]
    if len(filtered) == len(samplings):
        return shortlist(shaped, samplings, shaped.shape[1])[1]
    if filtered:
        shaped[filtered] = shortlist(shaped[filtered], [samplings[r] for r in filtered], shaped.shape[1])[1]
    return shaped


def _report(
    table: Tensor,
    tokens: Sequence[int],
    samplings: Sequence[Sampling],
    counts: Sequence[int],
    *,
    ranked: bool = False,
) -> list[TokenLogprobs]:
    """Per row of logits `table` [R, V]: its token, the `counts` likeliest, the named ones, in its mode."""
    vocabulary = table.shape[1]
    as_logits = [r for r, sampling in enumerate(samplings) if sampling.logprobs_mode.endswith("logits")]
    logprobs = torch.log_softmax(table, dim=-1)
    if as_logits:
        logprobs[as_logits] = table[as_logits]
    own = logprobs.gather(1, torch.tensor(tokens, device=table.device).unsqueeze(1))
    ranks = [0] * len(tokens)
    if ranked:
        ranks = ((logprobs > own).sum(dim=-1, dtype=torch.int32) + 1).tolist()
    # one list for each length: of equals at its end, which are in it depends on how long it is
    lengths: defaultdict[int, list[int]] = defaultdict(list)
    for r, count in enumerate(counts):
        lengths[vocabulary if count == WHOLE_VOCABULARY else min(count, vocabulary)].append(r)
    top: list[tuple[tuple[int, float], ...]] = [()] * len(tokens)
    for length, members in lengths.items():
        if length:
            values, ids = logprobs[members].topk(length, dim=-1)
            for r, row_ids, row_values in zip(members, ids.tolist(), values.tolist(), strict=True):
                top[r] = tuple(zip(row_ids, row_values, strict=True))
    named: list[tuple[float, ...]] = [()] * len(tokens)
    for r, sampling in enumerate(samplings):
        if sampling.logprob_token_ids:
            named[r] = tuple(logprobs[r, list(sampling.logprob_token_ids)].tolist())
    return [TokenLogprobs(*entry) for entry in zip(tokens, own.flatten().tolist(), top, ranks, named, strict=True)]
