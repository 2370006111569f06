"""From logits to tokens, over all rows of a step at once.

Order of operations, per row: repetition, frequency and presence penalty; logit bias; the ban on ending ids below
`min_tokens`; temperature; top-k, top-p, min-p, each on what the one before it left; one draw. Reported
log-probabilities are those of the raw logits. Temperature 0 takes the lowest id of the largest value after bias
and penalties.

A draw needs one number in [0, 1): where it falls in the cumulative probabilities decides. That number is a hash of
(seed, position), so the sampler has no state: what a request draws depends neither on its neighbours in the batch
nor on how often it was preempted and computed again, and nothing is left behind when it ends.

Legend: R rows (requests that draw in this step), V vocabulary, F rows that are filtered, K length of a list.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quire_engine.step import Draw, Scheduled
from quire_schemas.wire import Sampling, TokenLogprobs

SHORTLISTS = (1024, 16384)
"""Filters look at so many of the likeliest tokens first, and sort the whole vocabulary only if they must."""

_KEY = struct.Struct("<QQ")


@dataclass(slots=True)
class Drawn:
    """Per row: the token, its log-probabilities if asked for. `broken` are rows without a usable distribution."""

    tokens: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    broken: tuple[int, ...] = ()


def sample(logits: Tensor, rows: Sequence[Scheduled]) -> Drawn:
    """Choose a token for each row. `logits` [R, V] float32, not changed; every one of `rows` has a draw.

    A row with NaN or +inf among its logits, or with nothing but -inf, is broken: its token has no meaning.
    """
    draws = [draw for row in rows if (draw := row.draw) is not None]
    if len(draws) != len(rows) or logits.shape[0] != len(rows):
        raise ValueError(f"{len(rows)} rows, {len(draws)} with a draw, {logits.shape[0]} rows of logits")
    peaks, best = logits.max(dim=-1)
    usable = torch.isfinite(peaks)
    broken = () if bool(usable.all()) else tuple(torch.nonzero(~usable).flatten().tolist())
    if all(draw.is_plain for draw in draws):
        return Drawn(best.tolist(), broken=broken)

    shaped = _shape(logits, rows, draws)
    tokens = best if shaped is logits else shaped.argmax(dim=-1)
    random = [r for r, draw in enumerate(draws) if draw.sampling.temperature > 0.0 and r not in broken]
    if random:
        own = shaped if shaped is not logits and len(random) == len(rows) else shaped[random]
        picked = _draw(own, [draws[r] for r in random], [rows[r].end for r in random])
        tokens = tokens.index_copy(0, torch.tensor(random, device=tokens.device), picked)
    chosen: list[int] = tokens.tolist()
    asked = [r for r, draw in enumerate(draws) if draw.sampling.logprobs is not None and r not in broken]
    return Drawn(chosen, _logprobs(logits, draws, chosen, asked) if asked else {}, broken)


# ── before the draw ───────────────────────────────────────────────────────────────────────────────────────


def _shape(logits: Tensor, rows: Sequence[Scheduled], draws: Sequence[Draw]) -> Tensor:
    """Logits after penalties, bias and ban; the very same tensor if no row asks for any. [R, V]."""
    shaped = logits
    for r, (row, draw) in enumerate(zip(rows, draws, strict=True)):
        sampling = draw.sampling
        banned = draw.ending_ids if row.end - draw.num_prompt < sampling.min_tokens else ()
        if not (draw.has_penalty or sampling.logit_bias or banned):
            continue
        if shaped is logits:
            shaped = logits.clone()
        if draw.has_penalty:
            _penalise(shaped[r], row.history, draw)
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
            shaped[r, ids] += torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
        if banned:
            inside = [token for token in banned if token < logits.shape[1]]
            shaped[r, inside] = -math.inf
    return shaped


def _penalise(scores: Tensor, history: Sequence[int], draw: Draw) -> None:
    """Penalties on one row, in place. `scores` [V]; `history` is the prompt and then the output.

    Repetition divides positive and multiplies negative scores of every token in prompt or output (as in CTRL,
    arXiv:1909.05858). Frequency subtracts once per occurrence in the output, presence once if there is any.
    """
    sampling = draw.sampling
    seen = torch.tensor(history, device=scores.device)
    if sampling.repetition_penalty != 1.0:
        ids = torch.unique(seen)
        picked = scores[ids]
        scores[ids] = torch.where(
            picked > 0, picked / sampling.repetition_penalty, picked * sampling.repetition_penalty
        )
    output = seen[draw.num_prompt :]
    if (sampling.frequency_penalty or sampling.presence_penalty) and len(output):
        ids, counts = torch.unique(output, return_counts=True)
        scores[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty


# ── the draw ──────────────────────────────────────────────────────────────────────────────────────────────


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that belongs to (seed, position): bits of a hash, a counter-based generator.

    52 bits and not 53, so that its product with any sum s stays below s after rounding."""
    digest = hashlib.blake2b(_KEY.pack(seed & 0xFFFFFFFFFFFFFFFF, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 12) * 2.0**-52


def _draw(scores: Tensor, draws: Sequence[Draw], positions: Sequence[int]) -> Tensor:
    """One token per row at its temperature. `scores` [R, V], which become something else; returns [R] int64."""
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
    free = [r for r in range(len(draws)) if r not in set(filtered)]
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


def _logprobs(
    logits: Tensor, draws: Sequence[Draw], chosen: Sequence[int], asked: Sequence[int]
) -> dict[int, TokenLogprobs]:
    """By row: the log-probability of the chosen token and of the likeliest ones, of the raw logits."""
    longest = min(max(draws[r].sampling.logprobs or 0 for r in asked), logits.shape[1])
    table = torch.log_softmax(logits[list(asked)], dim=-1)
    own = table.gather(1, torch.tensor([[chosen[r]] for r in asked], device=table.device)).flatten().tolist()
    values, ids = table.topk(longest, dim=-1)
    found: dict[int, TokenLogprobs] = {}
    for r, logprob, row_ids, row_values in zip(asked, own, ids.tolist(), values.tolist(), strict=True):
        count = draws[r].sampling.logprobs or 0
        top = tuple(zip(row_ids[:count], row_values[:count], strict=True))
        found[r] = TokenLogprobs(chosen[r], logprob, top)
    return found
