"""safetensors files to parameters: read in pieces, converted, fused, placed.

Bytes go from the file straight into the parameter when its number format is the file's and it lies in host
memory; otherwise through one staging buffer. Nothing is mapped into memory: a file that is cut off while it is
read ends in an error, not in a signal. Several tensors can be stacked into one parameter (queries, keys and
values; gate and up), because one wide matrix product costs less than several narrow ones.

What the file has in fp8 is widened in float32, code times scale of its block, and rounded once to what is asked
for; or its codes and scales are handed out as they are, to who multiplies by them. The same goes for MXFP4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quire_kernels import mxfp4
from quire_kernels.errors import KernelError
from quire_kernels.memory import large_pages
from quire_kernels.mxfp4 import Mxfp4Weight
from quire_kernels.quantized import check_codes, check_scales, widened
from quire_schemas import fp8
from quire_schemas.checkpoint import ModelProfile, check_tensors, each_expert
from quire_schemas.checkpoint_files import BadHeader, TensorInfo, WrongTensors, opened, read_tensors
from quire_schemas.quantization import QUANTIZED_AT_A_TIME

PIECE = 16 * 1024 * 1024
"""Bytes read at a time: small enough to stay in cache between reading and converting, and to report often."""

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class TensorSource(Protocol):
    """Where a model's parameters come from, by the names that its checkpoint has for them."""

    @property
    def dtype(self) -> torch.dtype:
        """That of parameters which ask for no other, and of activations."""

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor as a parameter of its own, in the dtype of all others or another one."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""

    def stack(self, names: Sequence[str], dtype: torch.dtype | None = None) -> Tensor:
        """Tensors that agree in all but the first dimension, one after the other along it; `dtype` as of
        `tensor`."""

    def turned(self, name: str, parts: int = 1) -> list[Tensor]:
        """A tensor [E, K, N], whose matrices have inputs before outputs, as parameters [E, N / parts, K]: output n
        is number n // parts of part n % parts."""


class Weights:
    """The tensors of one checkpoint folder, handed out in `dtype` on `device`.

    `on_progress(done, total)` counts bytes of the files. Raises `CheckpointError` when the folder does not hold
    what `profile` describes.
    """

    def __init__(
        self,
        model_dir: Path,
        profile: ModelProfile,
        *,
        dtype: torch.dtype,
        device: torch.device,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._tensors = each_expert(profile, read_tensors(model_dir))
        self._total = sum(tensor.nbytes for tensor in check_tensors(profile, self._tensors))
        self._done = 0
        self._in_fp8 = profile.fp8 is not None
        self.dtype = dtype
        self.device = device
        self._on_progress = on_progress
        if profile.tie_word_embeddings and "lm_head.weight" in self._tensors:
            self._require_equal("lm_head.weight", "model.embed_tokens.weight")

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """See `TensorSource`."""
        return self.stack([name], dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor as the file has it."""
        return self._tensors[name].shape

    def stack(self, names: Sequence[str], dtype: torch.dtype | None = None) -> Tensor:
        """See `TensorSource`."""
        infos = [self._tensors[name] for name in names]
        rows = sum(info.shape[0] for info in infos)
        shape = (rows, *infos[0].shape[1:])
        result = large_pages(torch.empty(shape, dtype=dtype or self.dtype, device=self.device))
        at = 0
        for info in infos:
            self._fill(result[at : at + info.shape[0]].view(-1), info)
            at += info.shape[0]
        return result

    def turned(self, name: str, parts: int = 1) -> list[Tensor]:
        """See `TensorSource`. One matrix at a time is there as the file has it. What is in MXFP4 is widened."""
        info = self._tensors.get(name)
        if info is None:
            return self._widened(name, parts)
        count, inputs, outputs = info.shape
        shape, size = (count, outputs // parts, inputs), info.nbytes // count
        found = [large_pages(torch.empty(shape, dtype=self.dtype, device=self.device)) for _ in range(parts)]
        staging = torch.empty(size, dtype=torch.uint8)
        # `_read` fills a buffer that holds the whole tensor further along: of one matrix that is the same
        for number, length in enumerate(self._read(info, staging, size)):
            matrix = staging.view(_DTYPES[info.dtype]).view(inputs, outputs).T
            for part, target in enumerate(found):
                target[number].copy_(matrix[part::parts])
                self._check(target[number], info)
            self._advance(length)
        return found

    def packed(self, name: str, parts: int = 1) -> list[Mxfp4Weight]:
        """What `turned` gives of a tensor in MXFP4, but as it is stored, the matrices one after the other along
        the outputs."""
        count, outputs, groups, _ = self._tensors[f"{name}_blocks"].shape
        rows, width = outputs // parts, groups * mxfp4.GROUP
        found = [Mxfp4Weight.empty(count * rows, width, self.device) for _ in range(parts)]
        for number, codes, powers in self._matrices(name, torch.float32):
            for part, target in enumerate(found):
                target.put(number * rows, codes[part::parts], powers[part::parts])
        return found

    def _widened(self, name: str, parts: int) -> list[Tensor]:
        count, outputs, groups, _ = self._tensors[f"{name}_blocks"].shape
        shape = count, outputs // parts, groups * mxfp4.GROUP
        found = [large_pages(torch.empty(shape, dtype=self.dtype, device=self.device)) for _ in range(parts)]
        for number, codes, powers in self._matrices(name, self.dtype):
            for some in _some(outputs, shape[2], parts):
                wide = mxfp4.widened(codes[some], powers[some])
                for part, target in enumerate(found):
                    target[number, some.start // parts : some.stop // parts].copy_(wide[part::parts])
        return found

    def _matrices(self, name: str, dtype: torch.dtype) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Of each matrix of a tensor in MXFP4 its number, codes [N, K / 2] and powers [N, K / 32], uint8, on the
        host, whose numbers `dtype` can hold; codes are written over when the next is asked for."""
        info, scales = self._tensors[f"{name}_blocks"], self._tensors[f"{name}_scales"]
        powers = torch.empty(scales.nbytes, dtype=torch.uint8)
        for length in self._read(scales, powers):
            self._advance(length)
        if bool((powers == mxfp4.NO_POWER).any()):
            raise WrongTensors(
                f"{scales.file.name}: tensor {scales.name} has powers that are no numbers",
                "the file is damaged, or its numbers were never right",
            )
        # hardly any file has such powers, and the products need not be looked at then
        suspect = mxfp4.largest(int(powers.amax())) > torch.finfo(dtype).max
        powers = powers.view(scales.shape)
        size = info.nbytes // info.shape[0]
        staging = torch.empty(size, dtype=torch.uint8)
        for number, length in enumerate(self._read(info, staging, size)):
            codes = staging.view(info.shape[1], -1)
            for some in _some(info.shape[1], 2 * codes.shape[1]) if suspect else ():
                _require_finite(mxfp4.widened(codes[some], powers[number, some]).to(dtype), info)
            yield number, codes, powers[number]
            self._advance(length)

    def is_coded(self, name: str) -> bool:
        """Whether the file has a matrix in fp8."""
        return self._tensors[name].dtype == fp8.CODES

    def stays(self, name: str) -> bool:
        """Whether a matrix is one that the checkpoint, which is in fp8, keeps in floats."""
        return self._in_fp8 and not self.is_coded(name)

    def rows(self, name: str, whole: int = 1) -> Iterator[Tensor]:
        """The rows of a matrix in the file's number format, of fp8 in float32, in order, some of them at a time, a
        multiple of `whole` unless they are the last, and on the host. What is given out is written over when the
        next is asked for.
        """
        info = self._tensors[name]
        if info.dtype != fp8.CODES:
            for piece in self._rows(info, whole):
                yield piece.view(_DTYPES[info.dtype]).view(-1, info.shape[1])
            return
        scales, at = self.scales(name), 0
        for codes in self.codes(name):
            _checked(check_codes, codes, info)
            yield widened(codes, scales, first=at)
            at += codes.shape[0]

    def codes(self, name: str) -> Iterator[Tensor]:
        """The rows of a matrix in fp8 as `rows` gives them, but their codes, uint8, any of which may be NaN."""
        info = self._tensors[name]
        for piece in self._rows(info):
            yield piece.view(-1, info.shape[1])

    def scales(self, name: str) -> Tensor:
        """Of a matrix in fp8 the scales of its blocks, [⌈N / 128⌉, ⌈K / 128⌉] float32, on the host. Raises
        `WrongTensors` for one that no weight has."""
        info = self._tensors[name + fp8.SCALE]
        staging = torch.empty(info.nbytes, dtype=torch.uint8)
        for length in self._read(info, staging):
            self._advance(length)
        found = staging.view(_DTYPES[info.dtype]).view(info.shape).float()
        _checked(check_scales, found, info)
        return found

    def _rows(self, info: TensorInfo, whole: int = 1) -> Iterator[Tensor]:
        """Bytes of the rows of a matrix, some of them at a time."""
        count, width = info.shape
        rows = max(whole, QUANTIZED_AT_A_TIME // width // whole * whole)
        size = info.nbytes // count * min(count, rows)
        staging = torch.empty(size, dtype=torch.uint8)
        for length in self._read(info, staging, size):
            yield staging[:length]
            self._advance(length)

    def _fill(self, target: Tensor, info: TensorInfo) -> None:
        """Writes the tensor at `info` into the flat `target`, which has as many numbers."""
        if info.dtype == fp8.CODES:
            self._widen(target, info)
            return
        stored = _DTYPES[info.dtype]
        if stored == target.dtype and target.device.type == "cpu":
            for length in self._read(info, target.view(torch.uint8)):
                self._advance(length)
            return
        staging = torch.empty(min(PIECE, info.nbytes), dtype=torch.uint8)
        at = 0
        for length in self._read(info, staging):
            numbers = staging[:length].view(stored)
            piece = target[at : at + numbers.shape[0]]
            piece.copy_(numbers)
            self._check(piece, info)
            at += numbers.shape[0]
            self._advance(length)

    def _check(self, piece: Tensor, info: TensorInfo) -> None:
        """Of numbers that were read."""
        narrowed = piece.dtype == torch.float16 and info.dtype != "F16"
        if narrowed and not bool(torch.isfinite(piece).all()):
            raise WrongTensors(
                f"{info.file.name}: tensor {info.name} has numbers that float16 cannot hold",
                "set spec.engine.dtype to bfloat16 or float32",
            )

    def _widen(self, target: Tensor, info: TensorInfo) -> None:
        """As `_fill`, of a matrix in fp8."""
        at = 0
        for rows in self.rows(info.name):
            piece = target[at : at + rows.numel()]
            piece.copy_(rows.view(-1))
            _require_finite(piece, info)
            at += rows.numel()

    def _read(self, info: TensorInfo, buffer: Tensor, size: int = PIECE) -> Iterator[int]:
        """Fills `buffer` in pieces of `size` bytes: further along it if it holds the tensor, else from its start.

        Yields the length of each piece after it was read.
        """
        whole = buffer.shape[0] == info.nbytes
        view = buffer.numpy().data
        with opened(info.file) as file:
            file.seek(info.offset)
            done = 0
            while done < info.nbytes:
                want = min(size, info.nbytes - done)
                start = done if whole else 0
                got = 0
                while got < want:
                    more = file.readinto(view[start + got : start + want])
                    if not more:
                        raise BadHeader(
                            f"{info.file}: ended inside tensor {info.name}",
                            "the file changed while it was read; fetch it again",
                        )
                    got += more
                done += want
                yield want

    def _advance(self, length: int) -> None:
        self._done += length
        self._on_progress(self._done, self._total)

    def _require_equal(self, first: str, second: str) -> None:
        """A tied head that is stored all the same must be the embedding, or config.json is wrong about it."""
        one, other = self._tensors[first], self._tensors[second]
        differs = WrongTensors(
            f"tie_word_embeddings is true, but {first} differs from {second}",
            "set tie_word_embeddings to false in config.json to use both",
        )
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            raise differs
        size = min(PIECE, one.nbytes)
        left, right = torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
        for length, _ in zip(self._read(one, left), self._read(other, right), strict=True):
            if not torch.equal(left[:length], right[:length]):
                raise differs


def _some(outputs: int, width: int, whole: int = 1) -> Iterator[slice]:
    """Rows of a matrix that is widened, some at a time, a multiple of `whole`."""
    step = whole * max(1, QUANTIZED_AT_A_TIME // (whole * width))
    return (slice(first, min(first + step, outputs)) for first in range(0, outputs, step))


def _require_finite(piece: Tensor, info: TensorInfo) -> None:
    """Of numbers that were widened."""
    if not bool(piece.abs().amax().isfinite()):
        dtype = str(piece.dtype).removeprefix("torch.")
        raise WrongTensors(
            f"{info.file.name}: tensor {info.name} stands for numbers that {dtype} cannot hold",
            ("set spec.engine.dtype to bfloat16 or float32; or " if dtype == "float16" else "")
            + "the file is damaged, or its numbers were never right",
        )


def _checked(check: Callable[[Tensor], None], numbers: Tensor, info: TensorInfo) -> None:
    try:
        check(numbers)
    except KernelError as error:
        raise WrongTensors(
            f"{info.file.name}: tensor {info.name}: {error}",
            "the file is damaged, or its numbers were never right",
        ) from error
