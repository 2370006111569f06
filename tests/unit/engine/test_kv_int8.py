"""Keys and values in 8 bits, through whole models and engines: on both back-ends, in any company, shared.

An fp8 cache on a GPU: `resident_cases.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.engine_specs import run, tiny_spec
from tests.unit.engine.test_models import build
from torch import Tensor

from quire_engine.attest import attest
from quire_engine.engine import KV_DTYPES, Engine
from quire_engine.errors import InvalidSpec
from quire_engine.models import KVCache, load_model
from quire_kernels import PagedBatch, load
from quire_schemas.checkpoint import read_profile
from quire_schemas.sizing import kv_block_bytes, kv_bytes_per_token
from quire_schemas.wire import BeamSearch, Generate, Sampling

CPU = torch.device("cpu")
FIELDS = {"dtype": "bfloat16", "kv_dtype": "int8"}


def logits(folder: Path, backend: str, kv_dtype: torch.dtype) -> Tensor:
    """Of 50 tokens, the last 10 of which come one by one."""
    profile = read_profile(folder)
    model = load_model(
        folder, profile, dtype=torch.float32, device=CPU, kernels=load(backend), on_progress=lambda *_: None
    )
    kv = KVCache.allocate(profile, 40, 16, kv_dtype, CPU)
    if backend == "cpu":
        attest(model, kv, block_size=16, backend=backend)
    ids = torch.arange(50) % profile.vocab_size
    found: list[Tensor] = []
    for start, end in ((0, 40), *((at, at + 1) for at in range(40, 50))):
        batches = [
            PagedBatch.build(
                starts=[start],
                query_lens=[end - start],
                block_tables=[[first + 3, first + 1, first, first + 2]],
                logits=[1],
                block_size=16,
            )
            for first in range(0, 4 * len(kv.groups), 4)
        ]
        found.append(model.logits(model.forward(ids[start:end], batches, kv)))
    return torch.cat(found)


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "qwen3-mqa-sliding"])
def test_both_back_ends_agree_and_are_near_to_floats(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    native, reference = (logits(tmp_path, backend, torch.int8) for backend in ("cpu", "reference"))
    exact = logits(tmp_path, "reference", torch.float32)
    away = (reference - exact).norm() / exact.norm()
    assert 1e-4 < away < 0.05
    # a number may fall on the other side of a rounding
    assert (native - reference).norm() / exact.norm() < away / 5


def test_fp8_is_near_to_floats_and_not_for_cpus(tmp_path: Path) -> None:
    build("qwen2-sliding", tmp_path)
    exact, eight, found = (
        logits(tmp_path, "reference", kept) for kept in (torch.float32, torch.int8, torch.float8_e4m3fn)
    )
    # numbers that have four bits where the largest of int8 have seven
    assert 1 < (found - exact).norm() / (eight - exact).norm() < 6
    with pytest.raises(InvalidSpec, match="fp8 keys and values are kept on GPUs alone"):
        Engine.load(tiny_spec(dtype="bfloat16", kv_dtype="fp8"))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_blocks_are_copied_in_every_format(kv_dtype: str) -> None:
    profile = read_profile(Path(tiny_spec().model_dir))
    kv = KVCache.allocate(profile, 5, 16, KV_DTYPES[kv_dtype], CPU)
    assert kv.bytes == 5 * kv_block_bytes(profile, kv_dtype, 16)
    octets = [tensor.view(torch.uint8) for tensor in kv.tensors]
    for tensor in octets:
        tensor.copy_(torch.randint(0, 256, tensor.shape))
    before = [tensor.clone() for tensor in octets]
    kv.copy_blocks([(1, 3), (4, 0)])
    for tensor, old in zip(octets, before, strict=True):
        assert torch.equal(tensor, old[:, [4, 1, 2, 1, 4]])


def test_an_engine_attests_shares_and_copies_blocks_in_8_bits() -> None:
    profile = read_profile(Path(tiny_spec().model_dir))
    heads = 2 * profile.num_layers * profile.num_kv_heads
    assert kv_bytes_per_token(profile, "int8") == heads * (profile.head_dim + 4)
    engine = Engine.load(tiny_spec(**FIELDS, batch_invariant=True, prefix_caching=True))

    def ask(name: str, beams: BeamSearch | None = None) -> Generate:
        return Generate(
            name, list(range(9, 59)), Sampling(max_tokens=12, temperature=0.0, ignore_eos=True), beam=beams
        )

    first = run(engine, ask("a"))["a"]
    again = run(engine, ask("b"), ask("c", BeamSearch(width=3)))
    tokens = [token for delta in first for token in delta.token_ids]
    assert len(tokens) == 12
    assert [token for delta in again["b"] for token in delta.token_ids] == tokens
    assert again["b"][0].timings is not None
    assert again["b"][0].timings.cached_tokens == 48
    short = tiny_spec(
        **FIELDS, num_blocks=6, prefix_caching=False
    )  # two of them do not fit: one is computed again
    crowd = run(Engine.load(short), ask("d"), ask("e"))
    for name in ("d", "e"):
        assert [token for delta in crowd[name] for token in delta.token_ids] == tokens


def test_a_token_takes_little_more_than_half() -> None:
    profile = read_profile(Path(tiny_spec().model_dir))
    assert kv_block_bytes(profile, "int8", 16) < 0.6 * kv_block_bytes(profile, "bfloat16", 16)
