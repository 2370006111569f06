"""LoRA adapters beside their model: read once, added to the products of the rows that ask for them.

    y = W x + scale · B (A x)        for the tokens of a sequence with an adapter, and W x for all others

The model's own product is computed for all rows as ever, of whatever weight; what an adapter adds is computed for
its rows alone, gathered, by the same kernels, and added where they lie. So rows without an adapter have the very
bits that they have without adapters, quantized weights need nothing of their own, and rows of several adapters
share a step. Projections that are fused are added to side by side, each at its own columns. The scale is in B.

`WithAdapters` is the method that a model gets its linears from: whatever is targeted comes as `Adapted`. Who is in
a step is told through one `Company`, which all of them look at. A step with adapters is computed operation by
operation: its rows differ from step to step, so it cannot be recorded (`quire_kernels.cpu.program`).

Legend: T tokens, R rows of one adapter, K inputs, N outputs, r rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from quire_engine.layers.linear import Linear
from quire_engine.quantization import LinearMethod
from quire_kernels import Clamp, Experts, Kernels, PagedBatch, Product
from quire_schemas.adapters import AdapterProfile, digest_of, even, read_adapter
from quire_schemas.checkpoint import ModelProfile
from quire_schemas.checkpoint_files import BadHeader, TensorInfo, WrongTensors
from quire_schemas.wire import Adapter

NONE = 0
"""The number of a sequence without an adapter; the others count from 1, in the order of the spec."""

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_Rows = tuple[tuple[int, Tensor], ...]
"""Adapters of a step, each with its rows [R] int64."""


class Company:
    """Whose rows a step has: none, but inside of `present`."""

    def __init__(self) -> None:
        self.rows: _Rows = ()
        self._wanted: _Rows = ()

    @contextlib.contextmanager
    def present(self, adapters: Sequence[int], batch: PagedBatch) -> Iterator[None]:
        """A step of sequences with these adapters. Until `narrow` its rows are the batch's tokens."""
        of_token = torch.repeat_interleave(torch.tensor(adapters), torch.tensor(batch.query_lens))
        numbers = sorted({number for number in adapters if number != NONE})
        of_row = of_token[batch.logits_rows]
        self._wanted = _rows(of_row, numbers)
        self.rows = _rows(of_token, numbers)
        try:
            yield
        finally:
            self.rows = self._wanted = ()

    def narrow(self) -> None:
        """From here on its rows are those whose logits are wanted."""
        self.rows = self._wanted


def _rows(of: Tensor, numbers: Sequence[int]) -> _Rows:
    found = ((number, (of == number).nonzero().view(-1)) for number in numbers)
    return tuple((number, rows) for number, rows in found if rows.shape[0])


@dataclass(slots=True, frozen=True)
class Addition:
    """What one adapter adds to outputs `first` to `last`, exclusive, of a linear."""

    first: int
    last: int
    down: Product
    """[r, K]."""
    up: Product
    """[N, r], times the scale."""

    def add(self, x: Tensor, rows: Tensor, out: Tensor) -> None:
        """Of `x` [R, K], which are `rows` [R] of the step, to these rows of `out` [T, all outputs]."""
        out[:, self.first : self.last].index_add_(0, rows, self.up(self.down(x)))


@dataclass(slots=True, frozen=True)
class Adapted:
    """A linear with what adapters add to it, by their numbers."""

    base: Linear
    additions: Mapping[int, Sequence[Addition]]
    company: Company

    def __call__(self, x: Tensor) -> Tensor:
        out = self.base(x)
        for number, rows in self.company.rows:
            if mine := self.additions.get(number):
                gathered = x[rows]
                for addition in mine:
                    addition.add(gathered, rows, out)
        return out

    def parameters(self) -> Iterator[Tensor]:
        yield from self.base.parameters()
        for additions in self.additions.values():
            for addition in additions:
                yield from addition.down.parameters()
                yield from addition.up.parameters()


@dataclass(slots=True, frozen=True)
class Loaded:
    """An adapter of a spec, read and checked."""

    name: str
    profile: AdapterProfile


def read_adapters(adapters: Sequence[Adapter], base: ModelProfile) -> tuple[Loaded, ...]:
    """The adapters of a spec. Raises `CheckpointError`, also for one that is not what it was when planned."""
    found = []
    for adapter in adapters:
        folder = Path(adapter.folder)
        if digest_of(folder) != adapter.digest:
            raise WrongTensors(
                f"{folder}: adapter {adapter.name} is not what it was when the model was applied",
                "apply the manifest again: that makes a revision with what is there now",
            )
        found.append(Loaded(adapter.name, read_adapter(folder, base)))
    return tuple(found)


@dataclass(slots=True, frozen=True)
class WithAdapters:
    """The `LinearMethod` of a model with adapters, which come in the order of their numbers."""

    base: LinearMethod
    adapters: Sequence[AdapterProfile]
    kernels: Kernels
    dtype: torch.dtype
    company: Company = field(default_factory=Company)

    def linear(self, prefix: str, parts: Sequence[str], *, bias: bool) -> Linear:
        linear = self.base.linear(prefix, parts, bias=bias)
        additions: dict[int, list[Addition]] = {}
        for number, adapter in enumerate(self.adapters, NONE + 1):
            if mine := [part for part in parts if f"{prefix}.{part}" in adapter.parts]:
                additions[number] = [self._addition(adapter, prefix, parts, part) for part in mine]
        return Adapted(linear, additions, self.company) if additions else linear

    def outputs(self, name: str) -> int:
        return self.base.outputs(name)

    def product(self, name: str) -> Product:
        return self.base.product(name)

    def experts(self, gate: Sequence[str], up: Sequence[str], down: Sequence[str]) -> Experts:
        return self.base.experts(gate, up, down)

    def turned_experts(self, at: str, clamp: Clamp | None) -> Experts:
        return self.base.turned_experts(at, clamp)

    def _addition(self, adapter: AdapterProfile, prefix: str, parts: Sequence[str], part: str) -> Addition:
        first = sum(self.base.outputs(f"{prefix}.{before}.weight") for before in parts[: parts.index(part)])
        low = adapter.parts[f"{prefix}.{part}"]
        outputs, inputs = low.up.shape[0], low.down.shape[1]
        rank = even(low.rank)
        down = torch.zeros(rank, inputs, dtype=self.dtype)
        up = torch.zeros(outputs, rank, dtype=self.dtype)
        down[: low.rank] = self._finite(_read(low.down), low.down)
        up[:, : low.rank] = self._finite(_read(low.up) * low.scale, low.up)
        product = self.kernels.product
        return Addition(first, first + outputs, product(down, None), product(up, None))

    def _finite(self, numbers: Tensor, info: TensorInfo) -> Tensor:
        numbers = numbers.to(self.dtype)
        if not bool(torch.isfinite(numbers).all()):
            raise WrongTensors(
                f"{info.file}: tensor {info.name} has numbers that {str(self.dtype).removeprefix('torch.')} "
                "cannot hold",
                "the file is damaged; or set spec.engine.dtype to bfloat16 or float32",
            )
        return numbers


def _read(info: TensorInfo) -> Tensor:
    """A tensor of a file, in float32."""
    with info.file.open("rb") as file:
        file.seek(info.offset)
        data = bytearray(file.read(info.nbytes))
    if len(data) < info.nbytes:
        raise BadHeader(f"{info.file}: ended inside tensor {info.name}", "the file changed while it was read")
    return torch.frombuffer(data, dtype=_DTYPES[info.dtype]).view(info.shape).float()
