"""Draws on the device against an oracle: what filters leave, as the host's sampler has it, and the same noise.

See `triton_ops` for how it is run. The noise of a token is computed here too, from what the kernel's docstring
says of it, so what has to be drawn is known; and a place is looked for where a token at the edge of what filters
leave would win, so that one token too many or too few is seen.

Legend: V vocabulary, R rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire_engine.sampler import shortlist
from quire_kernels.triton import INTERPRETED, TritonKernels, sample
from quire_schemas.wire import Sampling

torch.set_num_threads(1)
# exp(1000) is inf, on purpose; numpy, which interprets, tells each time
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cpu" if INTERPRETED else "cuda"
kernels = TritonKernels()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def draw(
    logits: Tensor,
    samplings: list[Sampling],
    seeds: list[int],
    positions: list[int],
    slots: list[int] | None = None,
    cap: float | None = None,
) -> tuple[list[int], list[int]]:
    """Tokens of the rows, and the last tokens of the table, of one call."""

    def column(values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    table = sample.DrawTable(
        column([asked.temperature for asked in samplings], torch.float32),
        column([asked.top_k for asked in samplings], torch.int32),
        column([asked.top_p for asked in samplings], torch.float32),
        column([asked.min_p for asked in samplings], torch.float32),
        column(seeds, torch.int64),
    )
    rows, vocabulary = logits.shape
    out, last = column([-9] * rows, torch.int32), column([-9] * len(samplings), torch.int32)
    places = column(list(range(rows)) if slots is None else slots, torch.int32)
    room = sample.scratch(rows, vocabulary, DEVICE)
    sample.draw(logits, places, column(positions, torch.int32), table, out, last, room, cap)
    return out.tolist(), last.tolist()


def noise(seed: int, positions: NDArray[Any], tokens: NDArray[Any]) -> NDArray[Any]:
    """The noise of `tokens` at `positions`, which broadcast: Philox 4x32-10 (Salmon et al., 2011) and its Gumbel
    numbers, in double precision, from what `quire_kernels.triton.sample` says of them."""
    low = np.uint64(0xFFFFFFFF)
    positions, tokens = np.broadcast_arrays(np.uint64(positions), np.uint64(tokens))
    lanes = np.uint64(1024)
    c = [tokens // (4 * lanes) * lanes + tokens % lanes, positions, np.zeros_like(tokens), np.zeros_like(tokens)]
    k = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (second >> np.uint64(32)) ^ c[1] ^ k[0],
            second & low,
            (first >> np.uint64(32)) ^ c[3] ^ k[1],
            first & low,
        ]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    bits = np.choose((tokens // lanes % np.uint64(4)).astype(int), c)
    return np.asarray(-np.log(-np.log1p(-(bits + 0.5) * 2.0**-32)))


def test_what_the_noise_picks_is_distributed_as_the_softmax() -> None:
    logits = 1.5 * random(40).cpu().double().numpy()
    draws = 40_000
    tokens = (logits + noise(11, np.arange(draws)[:, None], 600 * np.arange(40))).argmax(-1)
    counts = np.bincount(tokens, minlength=40)
    wanted = np.exp(logits) / np.exp(logits).sum() * draws
    assert wanted.min() > 5
    statistic = ((counts - wanted) ** 2 / wanted).sum()
    assert abs(statistic - 39) < 4 * (2 * 39) ** 0.5


@pytest.mark.parametrize("programs", [1024, 6])
def test_seed_position_and_token_decide_and_nothing_else_does(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "_PROGRAMS", programs)
    logits, asked = 2 * random(3, 9000), Sampling(max_tokens=1, temperature=0.8)
    seeds, positions = [7, 1 << 40, (1 << 63) - 1], [100, 0, 2**31 - 1]
    scores = logits.cpu().double().numpy() / 0.8
    expected = [
        int((scores[r] + noise(seeds[r], np.array(positions[r]), np.arange(9000))).argmax()) for r in range(3)
    ]
    slots = [2, -1, 0]
    tokens, last = draw(logits, [asked] * 3, seeds[::-1], positions, slots)
    assert tokens == [expected[0], sample.PADDING, expected[2]]
    assert last == [expected[2], -9, expected[0]]
    assert draw(logits[1:2], [asked], seeds[1:2], positions[1:2])[0] == expected[1:2]


def test_a_score_of_before_is_not_kept_when_a_lane_finds_a_higher_logit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "_PROGRAMS", 1)
    logits = torch.zeros((1, 9000), device=DEVICE)
    logits[0, 4103] = 20.0
    favours_7 = int(noise(5, np.arange(1 << 16), np.array(7)).argmax())
    assert draw(logits, [Sampling(max_tokens=1, temperature=1.0)], [5], [favours_7])[0] == [4103]


def test_a_vocabulary_is_cut_into_whole_tiles_and_no_more_programs_than_there_is_room_for() -> None:
    for vocabulary in (1, 4096, 4097, 151936, 262144):
        room = sample.scratch(1000, vocabulary, "meta")
        for rows in range(1, 1001):
            splits = sample.num_splits(rows, vocabulary)
            assert rows * splits <= room.numbers.shape[0]
            assert 1 <= splits <= -(-vocabulary // 4096)
        assert sample.num_splits(1, vocabulary) == -(-vocabulary // 4096)


def test_a_cap_is_that_of_logits_which_were_capped_before() -> None:
    logits = 4 * random(4, 1100)
    logits[3, 7] = torch.nan
    capped = logits.clone()
    kernels.cap_logits(capped, 3.0)
    common: dict[str, Any] = {"max_tokens": 1}
    asked = [
        Sampling(**common, temperature=0.0),
        Sampling(**common, temperature=1.0),
        Sampling(**common, temperature=0.7, top_k=40, top_p=0.8),
        Sampling(**common, temperature=0.7, min_p=0.1),
    ]
    seeds, positions = [1, 2, 3, 4], [5, 6, 7, 8]
    found = draw(logits, asked, seeds, positions, cap=3.0)
    assert found == draw(capped, asked, seeds, positions)
    assert found[0][3] == sample.BROKEN
    assert found[0][1] != draw(logits, asked, seeds, positions)[0][1], "the cap is what is looked at"


@pytest.mark.nightly  # the interpreter cannot err here: what is asked is how a compiler joins products and sums
def test_where_filters_leave_one_token_it_is_the_largest_also_of_capped_logits() -> None:
    """Two kernels cap each logit, each for itself. Did their results differ in a bit, the largest might be
    nowhere."""
    rows, vocabulary = (2, 1100) if INTERPRETED else (512, 20_000)
    logits = 4 * random(rows, vocabulary)
    # what is drawn must be a token, of those that are all at the cap, too
    logits[0, 5:9] = 1e4
    greedy = draw(logits, [Sampling(max_tokens=1, temperature=0.0)] * rows, [1] * rows, [2] * rows, cap=30.0)[0]
    for asked in (
        Sampling(max_tokens=1, temperature=1.0, top_k=1),
        Sampling(max_tokens=1, temperature=0.5, top_p=1e-6),
        Sampling(max_tokens=1, temperature=0.5, min_p=1.0),
    ):
        found = draw(logits, [asked] * rows, [1] * rows, [2] * rows, cap=30.0)[0]
        assert 5 <= found[0] < 9
        assert found[1:] == greedy[1:]


def test_greedy_rows_take_the_first_of_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "_PROGRAMS", 8)  # two splits, of two tiles and one
    logits = random(4, 9001).half()
    logits[1, 4000:] = 9.0
    logits[2] = -torch.inf
    logits[2, 77] = -1e4
    tokens, last = draw(logits, [Sampling(max_tokens=1, temperature=0.0, top_k=3)] * 4, [1] * 4, [1] * 4)
    assert tokens == last == kernels.largest(logits.float())[1].tolist()
    assert tokens[1:3] == [4000, 77]


@pytest.mark.parametrize(
    "asked",
    [
        Sampling(max_tokens=1, temperature=0.0),
        Sampling(max_tokens=1, temperature=1.0),
        Sampling(max_tokens=1, temperature=1.0, top_k=5),
    ],
)
def test_rows_without_a_distribution_are_broken(asked: Sampling) -> None:
    logits = random(5, 5000)
    logits[0, 4500] = torch.nan
    logits[1, 3] = torch.inf
    logits[2] = -torch.inf
    logits[3, 1:] = -torch.inf
    tokens, last = draw(logits, [asked] * 5, [1] * 5, [1] * 5)
    assert tokens[:4] == [sample.BROKEN] * 3 + [0]
    assert tokens[4] >= 0
    assert last[:4] == [0] * 4


@pytest.mark.parametrize("temperature", [1e-9, 1e-3, 1e6])
def test_extreme_temperatures(temperature: float) -> None:
    logits = 30 + 10 * random(1, 5000)
    asked = Sampling(max_tokens=1, temperature=temperature)
    tokens = set(draw(logits.expand(3, -1), [asked] * 3, [1, 2, 3], [1] * 3)[0])
    if temperature < 1:
        assert tokens == {int(logits.argmax())}
    else:
        assert len(tokens) > 1


def kept(logits: Tensor, asked: Sampling) -> list[int]:
    """What `shortlist` leaves of a row of logits, the likeliest first."""
    scores = (logits - logits.amax()) / asked.temperature
    ids, left, _ = shortlist(scores[None].cpu().float(), [asked], logits.shape[0])
    stay = ids[0][left[0] > -torch.inf]
    return [int(token) for token in stay[scores.cpu()[stay].argsort(descending=True)]]


@pytest.mark.parametrize(
    ("spread", "asked"),
    [
        # few are listed
        pytest.param(3.0, Sampling(max_tokens=1, temperature=0.7, top_k=1), marks=pytest.mark.nightly),
        (3.0, Sampling(max_tokens=1, temperature=0.6, top_k=20, top_p=0.95)),
        pytest.param(3.0, Sampling(max_tokens=1, temperature=1.0, top_p=0.5), marks=pytest.mark.nightly),
        (3.0, Sampling(max_tokens=1, temperature=1.5, top_k=300, top_p=0.9, min_p=0.1)),
        (2.0, Sampling(max_tokens=1, temperature=1.0, min_p=0.02)),
        # more than a list holds: of one filter, of the next, of all
        pytest.param(1.0, Sampling(max_tokens=1, temperature=1.0, top_p=0.6), marks=pytest.mark.nightly),
        pytest.param(1.0, Sampling(max_tokens=1, temperature=1.0, top_k=6000), marks=pytest.mark.nightly),
        (1.0, Sampling(max_tokens=1, temperature=1.0, top_k=7000, top_p=0.9, min_p=0.001)),
    ],
)
def test_filters_leave_what_a_shortlist_has(
    spread: float, asked: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last that stays and the first that does not, each where the noise prefers it to all others."""
    monkeypatch.setattr(sample, "_PROGRAMS", 4)  # two splits, of two tiles and one
    vocabulary = 9000
    logits = spread * random(vocabulary)
    scores = (logits / asked.temperature).cpu().double().numpy()
    stay = kept(logits, asked)
    gone = next(int(token) for token in logits.argsort(descending=True) if int(token) not in set(stay))
    expected, positions = [], []
    for boundary in (stay[-1], gone):
        tried = noise(5, np.arange(1 << 18), np.array(boundary))
        positions.append(int(tried.argmax()))
        whole = scores + noise(5, np.array(positions[-1]), np.arange(vocabulary))
        assert max([*stay, gone], key=lambda token: whole[token]) == boundary
        expected.append(max(stay, key=lambda token: whole[token]))
    tokens, _ = draw(logits.expand(2, -1), [asked] * 2, [5] * 2, positions)
    assert tokens == expected


def test_all_that_tie_at_a_threshold_stay() -> None:
    logits = -20.0 + random(5000)
    logits[[7, 1030, 2055, 4999]] = 3.0
    for asked in (
        Sampling(max_tokens=1, temperature=1.0, top_k=2),
        Sampling(max_tokens=1, temperature=1.0, top_p=0.3),
    ):
        positions = [int(noise(5, np.arange(4096), np.array(token)).argmax()) for token in (7, 1030, 2055, 4999)]
        assert draw(logits.expand(4, -1), [asked] * 4, [5] * 4, positions)[0] == [7, 1030, 2055, 4999]


@pytest.mark.skipif(INTERPRETED, reason="thousands of rows take minutes in the interpreter")
@pytest.mark.parametrize(
    "asked",
    [
        Sampling(max_tokens=1, temperature=0.7),
        Sampling(max_tokens=1, temperature=1.3, top_k=7),
        Sampling(max_tokens=1, temperature=1.0, top_p=0.8),
        Sampling(max_tokens=1, temperature=1.1, top_k=12, top_p=0.9, min_p=0.05),
    ],
)
def test_what_is_drawn_is_distributed_as_the_softmax_of_what_is_left(asked: Sampling) -> None:
    logits, rows = 1.5 * random(40), 20_000
    tokens = draw(logits.expand(rows, -1), [asked] * rows, list(range(rows)), [3] * rows)[0]
    stay = kept(logits, asked)
    assert set(tokens) <= set(stay)
    counts = torch.bincount(torch.tensor(tokens), minlength=40)[stay].double()
    wanted = (logits[stay].cpu().double() / asked.temperature).softmax(-1) * rows
    freedom = max(1, len(stay) - 1)
    assert abs(((counts - wanted) ** 2 / wanted).sum() - freedom) < 5 * (2 * freedom) ** 0.5
