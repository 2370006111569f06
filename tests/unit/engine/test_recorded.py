"""A recorded step gives what its operations give one by one, bit by bit, whatever the step is.

The same model runs twice over caches of its own: on kernels that record its body, and on kernels that do not.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tests.unit.engine.test_models import CPU, build
from torch import Tensor

from quire_engine.models import DecoderModel, KVCache, load_model
from quire_kernels import Body, KernelError, PagedBatch
from quire_kernels.cpu import CpuKernels
from quire_kernels.cpu.program import Recorded
from quire_schemas.checkpoint import read_profile
from quire_schemas.wire import Quantization

BLOCKS, BLOCK = 90, 8

torch.set_num_threads(1)


class OneByOne(CpuKernels):
    def recorded(self, body: Body) -> Body:
        return body


class Watched(CpuKernels):
    """Keeps what it records."""

    def recorded(self, body: Body) -> Body:
        self.made = super().recorded(body)
        return self.made


class Model:
    def __init__(self, folder: Path, kernels: CpuKernels, dtype: torch.dtype, quantization: Quantization | None):
        profile = read_profile(folder)
        self.model: DecoderModel = load_model(
            folder,
            profile,
            dtype=dtype,
            device=CPU,
            kernels=kernels,
            on_progress=lambda done, total: None,
            quantization=quantization,
        )
        self.kv = KVCache.allocate(profile, BLOCKS, BLOCK, dtype, CPU)

    def step(self, ids: list[int], starts: list[int], lens: list[int], wanted: list[int]) -> Tensor:
        """One step of sequences whose blocks are theirs by their place in it."""
        batches = [
            PagedBatch.build(
                starts=starts,
                query_lens=lens,
                block_tables=[
                    [10 * s + 30 * g + b for b in range(10 if len(starts) > 1 else 30)] for s in range(len(starts))
                ],
                logits=wanted,
                block_size=BLOCK,
            )
            for g in range(len(self.kv.groups))
        ]
        return self.model.forward(torch.tensor(ids), batches, self.kv).clone()


STEPS: list[tuple[list[int], list[int], list[int]]] = [
    ([0], [9], [1]),  # a prompt, of which the last row is wanted
    ([9], [1], [1]),
    ([10, 0, 0], [1, 40, 3], [1, 0, 3]),  # a token, a part of a prompt, a prompt of which all is wanted
    ([11, 40], [1, 5], [0, 0]),  # nothing is wanted
    ([12, 45, 3], [1, 1, 1], [1, 1, 1]),
    ([0], [200], [2]),  # more than the buffers hold
    ([200], [1], [1]),
]


@pytest.mark.parametrize(
    ("name", "dtype", "quantization"),
    [
        ("llama", torch.float32, None),
        ("llama-biases", torch.bfloat16, None),
        ("qwen2-sliding", torch.bfloat16, None),
        ("qwen3-mqa-sliding", torch.float16, None),
        ("qwen2-tied", torch.bfloat16, Quantization("int8")),
        ("qwen2-tied", torch.bfloat16, Quantization("int4", group_size=32)),
        ("mixtral", torch.float32, None),
        ("qwen3-moe-mixed", torch.bfloat16, None),
        ("mixtral", torch.bfloat16, Quantization("int8")),
        ("gemma2", torch.bfloat16, None),
        ("gemma3-capped", torch.bfloat16, Quantization("int8")),
        ("gpt-oss", torch.bfloat16, None),
    ],
)
def test_a_recorded_step_is_the_same_to_the_bit(
    name: str, dtype: torch.dtype, quantization: Quantization | None, tmp_path: Path
) -> None:
    build(name, tmp_path)
    kernels = Watched(2)
    recorded = Model(tmp_path, kernels, dtype, quantization)
    plain = Model(tmp_path, OneByOne(2), dtype, quantization)
    rng = random.Random(0)
    kept: list[tuple[Tensor, Tensor]] = []
    for starts, lens, wanted in STEPS:
        ids = [rng.randrange(recorded.model.profile.vocab_size) for _ in range(sum(lens))]
        kept.append((recorded.step(ids, starts, lens, wanted), plain.step(ids, starts, lens, wanted)))
        assert kept[-1][0].shape[0] == sum(wanted)
    for found, expected in kept:
        assert torch.equal(found, expected)
    assert isinstance(kernels.made, Recorded)
    assert kernels.made.tokens == 256


def test_another_cache_has_it_recorded_anew(tmp_path: Path) -> None:
    build("llama", tmp_path)
    one = Model(tmp_path, CpuKernels(1), torch.float32, None)
    first = one.step([1, 2, 3], [0], [3], [1])
    one.kv = KVCache.allocate(one.model.profile, BLOCKS, BLOCK, torch.float32, CPU)
    assert torch.equal(one.step([1, 2, 3], [0], [3], [1]), first)
    assert one.kv.tensors[0].any(), "the keys went to the other cache"


def test_a_weight_that_torch_multiplies_is_not_recorded(tmp_path: Path) -> None:
    build("llama-odd", tmp_path)
    kernels = Watched(1)
    one, plain = (Model(tmp_path, it, torch.float32, None) for it in (kernels, OneByOne(1)))
    assert torch.equal(one.step([1, 2, 3], [0], [3], [1]), plain.step([1, 2, 3], [0], [3], [1]))
    assert isinstance(kernels.made, Recorded)
    assert kernels.made.tokens == 0


def test_a_body_that_computes_by_itself_is_refused() -> None:
    kernels = CpuKernels(1)
    weight = torch.ones(8)
    batch = PagedBatch.build(starts=[0], query_lens=[2], block_tables=[[0]], logits=[1], block_size=8)
    ids, table = torch.tensor([1, 2]), torch.randn(5, 8)

    def body(scale: float) -> Body:
        def run(ids: Tensor, batches: object) -> Tensor:
            x = kernels.take(table, ids)
            return kernels.rms_norm(x if scale == 1.0 else x * scale, weight, 1e-6)

        return run

    with torch.inference_mode():
        kernels.recorded(body(1.0))(ids, [batch])
        with pytest.raises(KernelError, match="a tensor that is not of the step"):
            kernels.recorded(body(2.0))(ids, [batch])
        # and the kernels compute at once again
        assert torch.equal(kernels.take(table, ids), table[ids])


def test_buffers_are_used_again(tmp_path: Path) -> None:
    build("llama", tmp_path)
    kernels = Watched(1)
    one = Model(tmp_path, kernels, torch.float32, None)
    one.step([1, 2, 3], [0], [3], [1])
    assert isinstance(kernels.made, Recorded)
    profile = one.model.profile
    widths = 4 * (4 * profile.hidden_size + 4 * profile.q_size + 4 * profile.intermediate_size)
    assert kernels.made.bytes < 64 * (widths + 1000), "as much as if no layer took the buffers of the one before"
