"""The self-check of `determinism: batchInvariant`: it holds for the native kernels, and notices what does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine_specs import run, tiny_spec
from tests.unit.engine.test_models import CPU, build
from torch import Tensor

from quire_engine import engine as engine_module
from quire_engine.attest import attest
from quire_engine.engine import Engine
from quire_engine.errors import NotInvariant
from quire_engine.models import KVCache, load_model
from quire_kernels import Body, Kernels, Product, load
from quire_kernels.cpu import CpuKernels
from quire_schemas.checkpoint import read_profile
from quire_schemas.wire import Generate, Sampling


def check(
    folder: Path, kernels: Kernels, dtype: torch.dtype = torch.float32, blocks: int = 40, block_size: int = 16
) -> None:
    profile = read_profile(folder)
    model = load_model(
        folder, profile, dtype=dtype, device=CPU, kernels=kernels, on_progress=lambda done, total: None
    )
    kv = KVCache.allocate(profile, blocks, block_size, dtype, CPU)
    attest(model, kv, block_size=block_size, backend=kernels.name)


@pytest.mark.parametrize(
    "name", ["llama-biases", "llama-mqa", "qwen2-sliding", "qwen3-mqa-sliding", "llama-tied", "mixtral"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_native_kernels_keep_to_it(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    build(name, tmp_path)
    for blocks, block_size in ((40, 16), (120, 1), (24, 8)):
        check(tmp_path, load("cpu", 2), dtype, blocks, block_size)


def test_a_cache_too_small_to_find_out_is_no_proof(tmp_path: Path) -> None:
    build("llama", tmp_path)
    check(tmp_path, load("cpu"), blocks=8, block_size=16)
    with pytest.raises(NotInvariant, match="a cache of 3 blocks is too small"):
        check(tmp_path, load("cpu"), blocks=3)


@dataclass
class _Shifted:
    """A product that rounds otherwise where there are many rows."""

    product: Product
    when: Callable[[int], bool]

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x) * (1 + 1e-6 * self.when(x.shape[0]))

    def wide(self, x: Tensor) -> Tensor:
        return self.product.wide(x)

    def rows(self, ids: Tensor) -> Tensor:
        return self.product.rows(ids)

    def parameters(self) -> Iterator[Tensor]:
        return self.product.parameters()


@pytest.mark.parametrize(
    ("when", "noticed"),
    [
        (lambda rows: rows == 1, "token by token"),
        (lambda rows: rows > 45, "in company"),
        (lambda rows: rows in (5, 7), "in chunks"),
    ],
)
def test_a_product_that_rounds_by_the_number_of_rows_is_noticed(
    when: Callable[[int], bool], noticed: str, tmp_path: Path
) -> None:
    class Planted(CpuKernels):
        def product(self, weight: Tensor, bias: Tensor | None) -> Any:
            return _Shifted(super().product(weight, bias), when)

        def recorded(self, body: Body) -> Body:
            return body  # torch multiplies in it

    build("llama", tmp_path)
    with pytest.raises(NotInvariant, match=f"the cpu kernels give a sequence other numbers .*{noticed}"):
        check(tmp_path, Planted(1))


def test_an_engine_that_has_to_keep_to_it_serves_or_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Generate("a", [5, 6, 7], Sampling(max_tokens=4, temperature=0.0))
    engine = Engine.load(tiny_spec(batch_invariant=True))
    assert run(engine, ask)["a"][-1].finish_reason == "length"
    monkeypatch.setattr(engine_module, "best_kernels", lambda device, threads: (load("reference"), "no compiler"))
    with pytest.raises(NotInvariant, match="cannot be used: no compiler"):
        Engine.load(tiny_spec(batch_invariant=True))
    assert Engine.load(tiny_spec()).backend_lacking == "no compiler"
