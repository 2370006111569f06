"""Slabs: the same numbers in another place, several in one piece of memory."""

from __future__ import annotations

import torch

from quire_kernels.memory import Slabs


def test_weights_share_a_slab_and_keep_their_numbers() -> None:
    torch.manual_seed(0)
    slabs = Slabs()
    given = [
        torch.randn(300, 333),
        torch.randn(1000, 101).bfloat16(),
        torch.randint(-9, 9, (411, 777)).to(torch.int8),
    ]
    settled = [slabs.settle(tensor) for tensor in given]
    for before, after in zip(given, settled, strict=True):
        assert after.dtype == before.dtype
        assert torch.equal(after, before)
        assert after.data_ptr() % 64 == 0
        assert after.is_contiguous()
    assert len({tensor.untyped_storage().data_ptr() for tensor in settled}) == 1
    settled[1].zero_()
    assert torch.equal(settled[0], given[0])
    assert torch.equal(settled[2], given[2])


def test_a_slab_that_is_full_is_followed_by_another() -> None:
    slabs = Slabs()
    settled = [slabs.settle(torch.full((12 << 20,), number, dtype=torch.uint8)) for number in range(6)]
    assert [int(tensor[0]) for tensor in settled] == [int(tensor[-1]) for tensor in settled] == list(range(6))
    assert len({tensor.untyped_storage().data_ptr() for tensor in settled}) == 2


def test_what_would_gain_nothing_stays_where_it_is() -> None:
    slabs = Slabs()
    for size in (0, 1, (1 << 16) - 1, 1 << 24):
        tensor = torch.empty(size, dtype=torch.uint8)
        assert slabs.settle(tensor) is tensor
    for part in torch.empty(1 << 24, dtype=torch.uint8).chunk(4):
        assert slabs.settle(part) is part
