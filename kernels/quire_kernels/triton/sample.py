"""Drawing tokens where the logits are: no sort, no wait for the host, shapes that a captured graph can keep.

A random row takes, of the tokens v that its filters leave,

    argmax over v of (logit[v] - peak) / temperature + g(seed, position, v),   g = -log(-log(u)),  0 < u < 1

which is a draw from the softmax (the Gumbel-max trick). The noise g is Philox 4x32-10 with the seed as its key and
(counter, position) as its counter. One counter gives four numbers, for tokens `_LANES` apart, so token v has
number v // 1024 % 4 of counter v // 4096 · 1024 + v % 1024. The same seed and position give the same noise,
whatever else is in the batch and however the vocabulary is cut. A temperature of 0 takes the lowest of the
largest.

Filters leave what is at or above a threshold:

    top-k    the k-th largest logit; all that tie with it stay
    top-p    the largest logit t such that tokens at or above t hold p of what top-k left; ties stay
    min-p    that share of the likeliest token's probability

`_survey` reads everything once, the vocabulary cut into splits. For a row without filters it draws in passing, for
one with filters it gathers what bounds the thresholds: the peak, the sum of all exponentials, and the maxima of
4096 groups, of which the k-th largest cannot be above the k-th largest logit. `_settle`, one program a row, lets
splits meet, and that is all for rows without filters. For the others it lists the tokens at or above the bound,
most often a few hundred, and finds the thresholds among them by bisection in registers. If there are more than the
list holds, bisection reads the row again until it does.

Bisection is over the bits of a logit as a whole number in the same order.

Where a model caps its logits, each is capped when it is loaded, in float32; all of the above is of capped ones.

Legend: R rows, V vocabulary, X splits, S rows of the request table, C length of a list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.triton.launch import dependent, wait
from quire_kernels.triton.tanh import capped

BROKEN = -2
"""Instead of a token: the row has NaN, +inf, or nothing but -inf."""
PADDING = -1
"""Instead of a token: the row is padding."""
_LANES = tl.constexpr(1024)
_TILE = tl.constexpr(4096)
_LIST = tl.constexpr(4096)
_NOWHERE = tl.constexpr(2**31 - 1)
_PROGRAMS = 1024
"""Programs that fill a GPU, with some to spare."""


@dataclass(slots=True, frozen=True)
class DrawTable:
    """How each request draws: a row of the request table each, on the device."""

    temperature: Tensor
    """[S] float32, 0 for the largest."""
    top_k: Tensor
    """[S] int32, 0 for off."""
    top_p: Tensor
    """[S] float32, 1 for off."""
    min_p: Tensor
    """[S] float32, 0 for off."""
    seed: Tensor
    """[S] int64."""


@dataclass(slots=True, frozen=True)
class DrawScratch:
    """Room that `draw` needs between its kernels; what is left in it means nothing."""

    numbers: Tensor
    """[programs, 3] float32: of each split the peak, the best score relative to it, the sum of exponentials."""
    places: Tensor
    """[programs, 2] int32: of each split the place of the best score, and whether it is broken."""
    maxima: Tensor
    """[programs, 1024] float32: of each split its lanes' largest logits."""
    listed: Tensor
    """[R, C] float32."""
    listed_ids: Tensor
    """[R, C] int32."""

    @property
    def bytes(self) -> int:
        """What it holds."""
        return sum(t.nbytes for t in (self.numbers, self.places, self.maxima, self.listed, self.listed_ids))


def scratch(num_rows: int, vocabulary: int, device: torch.device | str) -> DrawScratch:
    """Room for steps of up to `num_rows` rows."""
    # of any number of rows up to these, no more programs than the larger of the two
    programs = min(num_rows * triton.cdiv(vocabulary, _TILE.value), max(num_rows, _PROGRAMS))

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return DrawScratch(
        room(programs, 3),
        room(programs, 2, dtype=torch.int32),
        room(programs, _LANES.value),
        room(num_rows, _LIST.value),
        room(num_rows, _LIST.value, dtype=torch.int32),
    )


def num_splits(rows: int, vocabulary: int) -> int:
    """Into how many parts the vocabulary is cut for that many rows, each of whole tiles."""
    tiles: int = triton.cdiv(vocabulary, _TILE.value)
    splits: int = triton.cdiv(tiles, triton.cdiv(tiles, max(1, min(tiles, _PROGRAMS // rows))))
    return splits


# ── numbers ───────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _gumbel(bits):
    """Gumbel noise of 32 random bits: -log(e), e = -log(1 - w), w in (0, 1). What decides is small e: exact."""
    w = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    e = -tl.log(tl.maximum(1.0 - w, 2.9802322387695312e-08))
    e = tl.where(w < 1e-3, w * (1.0 + w * (0.5 + w * 0.3333333)), e)
    return -tl.log(e)


@triton.jit
def _noise(seed, position, counters):
    """Of `counters` the noise of the four tokens that each one stands for."""
    nothing = counters * 0
    a, b, c, d = tl.philox(seed, counters, nothing + position, nothing, nothing)
    return _gumbel(a), _gumbel(b), _gumbel(c), _gumbel(d)


@triton.jit
def _ordered(x):
    """float32 as int32 in the same order; the zeros are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _middle(low, high):
    """floor((low + high) / 2), without overflow: `low` itself where nothing lies between."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _load(logits, at, inside, CAP: tl.constexpr):
    x = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
    if CAP > 0.0:
        x = tl.where(inside, capped(x, CAP), float("-inf"))
    return x


@triton.jit
def _better(best, place, score, at):
    """Keeps the first of the largest scores."""
    wins = score > best
    return tl.where(wins, score, best), tl.where(wins, at, place)


@triton.jit
def _first_of_largest(best, place):
    """Over all lanes: the largest score and the lowest place of it."""
    peak = tl.max(best, 0)
    return peak, tl.min(tl.where(best == peak, place, _NOWHERE), 0)


# ── one reading of everything ─────────────────────────────────────────────────────────────────────────────


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["slots", "positions"])
def _survey(
    numbers,
    places,
    maxima,
    logits,
    stride,
    vocabulary,
    share,
    splits,
    slots,
    positions,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    CAP: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row, split = tl.program_id(0), tl.program_id(1)
    wait(DEPENDENT)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        return
    temperature = tl.load(temperatures + slot)
    filtered = (tl.load(top_ks + slot) > 0) | (tl.load(top_ps + slot) < 1.0) | (tl.load(min_ps + slot) > 0.0)
    logits += row.to(tl.int64) * stride
    lanes = tl.arange(0, _LANES)
    begin = split * share
    end = tl.minimum(begin + share, vocabulary)
    peak = tl.full([_LANES], float("-inf"), tl.float32)
    best = tl.full([_LANES], float("-inf"), tl.float32)
    place = begin + lanes
    total = tl.zeros([_LANES], tl.float32)
    broken = tl.zeros([_LANES], tl.int32)
    program = row * splits + split
    if temperature <= 0.0:
        for start in tl.range(begin, end, _LANES):
            at = start + lanes
            x = _load(logits, at, at < end, CAP)
            broken |= ((x != x) | (x == float("inf"))).to(tl.int32)
            best, place = _better(best, place, x, at)
        peak = best
        tl.store(numbers + program * 3 + 1, 0.0)
        _, lowest = _first_of_largest(best, place)
        tl.store(places + program * 2, lowest)
    else:
        # what is told of a lane is relative to the lane's own peak, so that a small temperature loses nothing
        cold = 1.0 / tl.maximum(temperature, 1e-6)
        seed = tl.load(seeds + slot)
        position = tl.load(positions + row).to(tl.int32)
        for start in tl.range(begin, end, _TILE):
            at = start + lanes
            x0 = _load(logits, at, at < end, CAP)
            x1 = _load(logits, at + _LANES, at + _LANES < end, CAP)
            x2 = _load(logits, at + 2 * _LANES, at + 2 * _LANES < end, CAP)
            x3 = _load(logits, at + 3 * _LANES, at + 3 * _LANES < end, CAP)
            broken |= ((x0 != x0) | (x1 != x1) | (x2 != x2) | (x3 != x3)).to(tl.int32)
            higher = tl.maximum(peak, tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)))
            broken |= (higher == float("inf")).to(tl.int32)
            level = tl.where(higher == float("-inf"), 0.0, higher)
            s0, s1, s2, s3 = (x0 - level) * cold, (x1 - level) * cold, (x2 - level) * cold, (x3 - level) * cold
            if filtered:
                fade = tl.exp((peak - level) * cold)
                total = total * fade + ((tl.exp(s0) + tl.exp(s1)) + (tl.exp(s2) + tl.exp(s3)))
            else:
                best += (peak - level) * cold
                g0, g1, g2, g3 = _noise(seed, position, start // 4 + lanes)
                best, place = _better(best, place, s0 + g0, at)
                best, place = _better(best, place, s1 + g1, at + _LANES)
                best, place = _better(best, place, s2 + g2, at + 2 * _LANES)
                best, place = _better(best, place, s3 + g3, at + 3 * _LANES)
            peak = higher
        top = tl.max(peak, 0)
        level = tl.where(top == float("-inf"), 0.0, top)
        if filtered:
            tl.store(maxima + program.to(tl.int64) * _LANES + lanes, peak)
            tl.store(numbers + program * 3 + 2, tl.sum(total * tl.exp((peak - level) * cold), 0))
        else:
            score, lowest = _first_of_largest(best + (peak - level) * cold, place)
            tl.store(numbers + program * 3 + 1, score)
            tl.store(places + program * 2, lowest)
    tl.store(numbers + program * 3, tl.max(peak, 0))
    tl.store(places + program * 2 + 1, tl.max(broken, 0))


# ── thresholds ────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _bisect(keys, weights, above, low, high, target):
    """The largest key t from `low` up, below `high`, with `above` and the weights of `keys` from t up at least
    `target`; `low` if there is none."""
    middle = _middle(low, high)
    while middle > low:
        reached = above + tl.sum(tl.where(keys >= middle, weights, 0.0), 0) >= target
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
        middle = _middle(low, high)
    return low


@triton.jit
def _gather(listed, listed_ids, logits, vocabulary, low, high, CAP: tl.constexpr):
    """Lists the tokens of a row whose keys are from `low` up and below `high`, and counts them all."""
    lanes = tl.arange(0, _TILE)
    count = 0
    tl.debug_barrier()
    for start in tl.range(0, vocabulary, _TILE):
        at = start + lanes
        x = _load(logits, at, at < vocabulary, CAP)
        key = _ordered(x)
        wanted = ((key >= low) & (key < high) & (at < vocabulary)).to(tl.int32)
        found = tl.sum(wanted, 0)
        if (found > 0) & (count < _LIST):
            place = count + tl.cumsum(wanted, 0) - 1
            room = (wanted > 0) & (place < _LIST)
            tl.store(listed + place, x, mask=room)
            tl.store(listed_ids + place, at, mask=room)
        count += found
    # what other threads have stored is read next
    tl.debug_barrier()
    return count


@triton.jit
def _measure(logits, vocabulary, key, peak, cold, CAP: tl.constexpr):
    """Over a row's tokens from `key` up: how many they are, and the sum of their exponentials."""
    lanes = tl.arange(0, _TILE)
    number = tl.zeros([_TILE], tl.float32)
    mass = tl.zeros([_TILE], tl.float32)
    for start in tl.range(0, vocabulary, _TILE):
        at = start + lanes
        x = _load(logits, at, at < vocabulary, CAP)
        over = (_ordered(x) >= key) & (at < vocabulary)
        number += tl.where(over, 1.0, 0.0)
        mass += tl.where(over, tl.exp((x - peak) * cold), 0.0)
    return tl.sum(number, 0), tl.sum(mass, 0)


@triton.jit
def _search(
    listed,
    listed_ids,
    logits,
    vocabulary,
    low,
    high,
    count,
    peak,
    cold,
    target,
    MASS: tl.constexpr,
    CAP: tl.constexpr,
):
    """`_bisect` over a whole row that has at most `count` tokens from `low` up and none from `high` up; of mass,
    or of tokens. It reads the row again for each step until what is between fits a list."""
    more, above = 0.0, 0.0
    middle = _middle(low, high)
    while (middle > low) & (count - more > _LIST):
        number, mass = _measure(logits, vocabulary, middle, peak, cold, CAP)
        measure = number
        if MASS:
            measure = mass
        reached = measure >= target
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
        count = tl.where(reached, number, count)
        more = tl.where(reached, more, number)
        above = tl.where(reached, above, measure)
        middle = _middle(low, high)
    if middle > low:
        found = _gather(listed, listed_ids, logits, vocabulary, low, high, CAP)
        lanes = tl.arange(0, _LIST)
        there = lanes < found
        x = tl.load(listed + lanes, mask=there, other=float("-inf"))
        weights = tl.where(there, 1.0, 0.0)
        if MASS:
            weights = tl.where(there, tl.exp((x - peak) * cold), 0.0)
        low = _bisect(_ordered(x), weights, above, low, high, target)
    return low


@triton.jit
def _bound(maxima, row, splits, peak, cold, top_k, top_p, min_p, vocabulary):
    """A key below which no token can stay."""
    low = -2147483647 - 1
    if (top_k > 0) & (top_k <= _TILE):
        lanes = tl.arange(0, _TILE)
        groups = tl.full([_TILE], float("-inf"), tl.float32)
        mine = maxima + row.to(tl.int64) * splits * _LANES
        for start in tl.range(0, splits * _LANES, _TILE):
            at = start + lanes
            groups = tl.maximum(groups, tl.load(mine + at, mask=at < splits * _LANES, other=float("-inf")))
        weights = tl.full([_TILE], 1.0, tl.float32)
        low = _bisect(_ordered(groups), weights, 0.0, low, _ordered(peak) + 1, top_k.to(tl.float32))
    # where top-p is of what top-k leaves, all of that has to be there to be summed
    whole = (top_k > 0) & (top_k < vocabulary) & (top_p < 1.0)
    if (top_p < 1.0) & (not whole):
        # V tokens of exp(-x) each, x = log(V / (1 - p)), have 1 - p of what the peak has; 1.0 is for rounding
        depth = tl.log(vocabulary.to(tl.float32)) - tl.log(tl.maximum(1.0 - top_p, 1e-7)) + 1.0
        low = tl.maximum(low, _ordered(peak - depth / cold))
    if (min_p > 0.0) & (not whole):
        depth = 0.1 - tl.log(min_p)
        low = tl.maximum(low, _ordered(peak - depth / cold))
    return tl.minimum(low, _ordered(peak))


@triton.jit
def _choose_listed(scores, ids, stays, seed, position):
    """The token that wins of those of a list that stay, by their scores at temperature."""
    counters = ids // _TILE * _LANES + ids % _LANES
    nothing = counters * 0
    a, b, c, d = tl.philox(seed, counters, nothing + position, nothing, nothing)
    which = ids // _LANES % 4
    bits = tl.where(which < 2, tl.where(which == 0, a, b), tl.where(which == 2, c, d))
    _, lowest = _first_of_largest(tl.where(stays, scores + _gumbel(bits), float("-inf")), ids)
    return lowest


@triton.jit
def _choose(logits, vocabulary, threshold, share, seed, position, peak, warm, CAP: tl.constexpr):
    """The place of the best of a whole row's tokens from the key `threshold` up and of at least `share`."""
    lanes = tl.arange(0, _LANES)
    best = tl.full([_LANES], float("-inf"), tl.float32)
    place = tl.full([_LANES], _NOWHERE, tl.int32)
    for start in tl.range(0, vocabulary, _TILE):
        g0, g1, g2, g3 = _noise(seed, position, start // 4 + lanes)
        for quarter in tl.static_range(4):
            at = start + quarter * _LANES + lanes
            x = _load(logits, at, at < vocabulary, CAP)
            noise = g0
            if quarter == 1:
                noise = g1
            if quarter == 2:
                noise = g2
            if quarter == 3:
                noise = g3
            s = (x - peak) / warm
            stays = (_ordered(x) >= threshold) & (s >= share)
            best, place = _better(best, place, tl.where(stays, s + noise, float("-inf")), at)
    _, lowest = _first_of_largest(best, place)
    return lowest


@triton.jit
def _draw_filtered(
    listed,
    listed_ids,
    logits,
    vocabulary,
    maxima,
    row,
    splits,
    peak,
    warm,
    top_k,
    top_p,
    min_p,
    total,
    seed,
    position,
    CAP: tl.constexpr,
):
    cold = 1.0 / warm
    share = float("-inf")
    if min_p > 0.0:
        share = tl.log(min_p)
    high = _ordered(peak) + 1
    low = _bound(maxima, row, splits, peak, cold, top_k, top_p, min_p, vocabulary)
    count = _gather(listed, listed_ids, logits, vocabulary, low, high, CAP)
    limited = (top_k > 0) & (top_k < vocabulary)
    if count <= _LIST:
        lanes = tl.arange(0, _LIST)
        there = lanes < count
        x = tl.load(listed + lanes, mask=there, other=float("-inf"))
        ids = tl.load(listed_ids + lanes, mask=there, other=_NOWHERE)
        keys, s = _ordered(x), (x - peak) / warm
        if limited:
            low = _bisect(keys, tl.where(there, 1.0, 0.0), 0.0, low, high, top_k.to(tl.float32))
        if top_p < 1.0:
            weights = tl.where(there & (keys >= low), tl.exp(s), 0.0)
            if limited:
                total = tl.sum(weights, 0)
            low = _bisect(keys, weights, 0.0, low, high, top_p * total)
        token = _choose_listed(s, ids, there & (keys >= low) & (s >= share), seed, position)
    else:
        many = count.to(tl.float32)
        if limited:
            low = _search(
                listed, listed_ids, logits, vocabulary, low, high, many, peak, cold, top_k.to(tl.float32), False,
                CAP,
            )  # fmt: skip
        if top_p < 1.0:
            if limited:
                many, total = _measure(logits, vocabulary, low, peak, cold, CAP)
            low = _search(
                listed, listed_ids, logits, vocabulary, low, high, many, peak, cold, top_p * total, True, CAP
            )
        token = _choose(logits, vocabulary, low, share, seed, position, peak, warm, CAP)
    return token


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["slots", "positions"])
def _settle(
    tokens_out,
    last_token,
    numbers,
    places,
    maxima,
    listed,
    listed_ids,
    logits,
    stride,
    vocabulary,
    splits,
    slots,
    positions,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    CAP: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0)
    wait(DEPENDENT)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        tl.store(tokens_out + row, -1)
        return
    temperature = tl.load(temperatures + slot)
    top_k, top_p, min_p = tl.load(top_ks + slot), tl.load(top_ps + slot), tl.load(min_ps + slot)
    warm = tl.maximum(temperature, 1e-6)
    cold = 1.0 / warm
    lanes = tl.arange(0, SPLITS)
    there = lanes < splits
    programs = row * splits + lanes
    peaks = tl.load(numbers + programs * 3, mask=there, other=float("-inf"))
    peak = tl.max(peaks, 0)
    broken = tl.max(tl.load(places + programs * 2 + 1, mask=there, other=0), 0) > 0
    if broken | (peak == float("-inf")):
        tl.store(tokens_out + row, -2)
        tl.store(last_token + slot, 0)
        return
    token = 0
    if (temperature > 0.0) & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0)):
        totals = tl.load(numbers + programs * 3 + 2, mask=there, other=0.0)
        total = tl.sum(totals * tl.exp((peaks - peak) * cold), 0)
        token = _draw_filtered(
            listed + row.to(tl.int64) * _LIST, listed_ids + row.to(tl.int64) * _LIST,
            logits + row.to(tl.int64) * stride, vocabulary, maxima, row, splits, peak, warm, top_k, top_p, min_p,
            total, tl.load(seeds + slot), tl.load(positions + row).to(tl.int32), CAP,
        )  # fmt: skip
    else:
        scores = tl.load(numbers + programs * 3 + 1, mask=there, other=float("-inf"))
        where = tl.load(places + programs * 2, mask=there, other=_NOWHERE)
        _, token = _first_of_largest(scores + (peaks - peak) * cold, where)
    tl.store(tokens_out + row, token)
    tl.store(last_token + slot, token)


def draw(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    table: DrawTable,
    tokens_out: Tensor,
    last_token: Tensor,
    room: DrawScratch,
    cap: float | None = None,
) -> None:
    """Chooses a token for each row. `room` is what `scratch` gives; `cap` is as of `Kernels.cap_logits`.

    `logits` [R, V] of any float dtype, which are not changed; `slots` [R] int32, each row's place in `table`, or
    negative for padding; `positions` [R] integers. Tokens go to `tokens_out` [R] int32 and to `last_token` [S]
    int32 at the row's slot. A row with NaN, +inf or nothing but -inf gets `BROKEN`, and 0 as its last token; with
    a cap, which the infinite reach, one with NaN alone. Padding gets `PADDING` and has no last token.
    """
    rows, vocabulary = logits.shape
    splits = num_splits(rows, vocabulary)
    share = triton.cdiv(triton.cdiv(vocabulary, _TILE.value), splits) * _TILE.value
    how = (table.temperature, table.top_k, table.top_p, table.min_p, table.seed)
    _survey[(rows, splits)](
        room.numbers, room.places, room.maxima, logits, logits.stride(0), vocabulary, share, splits, slots,
        positions, *how, CAP=cap or 0.0, num_warps=4, **dependent(),
    )  # fmt: skip
    _settle[(rows,)](
        tokens_out, last_token, room.numbers, room.places, room.maxima, room.listed,
        room.listed_ids, logits, logits.stride(0), vocabulary, splits, slots, positions, *how, CAP=cap or 0.0,
        SPLITS=triton.next_power_of_2(triton.cdiv(vocabulary, _TILE.value)), num_warps=16, **dependent(),
    )  # fmt: skip
