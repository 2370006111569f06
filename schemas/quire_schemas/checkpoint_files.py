"""The files of a checkpoint folder, which are foreign input: bounded JSON, and the headers of safetensors.

A safetensors file is eight bytes (little-endian length of the header), the header (JSON: tensor name to dtype,
shape and byte range), and the data. The header is bounded, every range must fit its shape and its file, and the
ranges must cover the data without overlap or hole, so a cut-off file is found here. No file is read that lies
elsewhere than in its folder.

Exceptions, all with a `hint`:

    CheckpointError
    ├── MissingFile               config.json, a shard, or the weights altogether
    ├── UnsupportedArchitecture   no class of this version runs it
    ├── UnsupportedFeature        the architecture is known, this variant of it is not
    ├── InvalidConfig             config.json or the index is not what it should be
    ├── OutsideFolder             a file is a link to a place outside of the checkpoint
    ├── BadHeader                 a safetensors file is cut off or contradicts itself
    └── WrongTensors              tensors are missing, unexpected, or of another shape than config.json says
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

MAX_HEADER = 100_000_000
MAX_JSON = 64 * 1024 * 1024
"""Bytes of config.json or of an index that are read at most."""
_HEADER_DTYPES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][\w.+-]*\.safetensors")


class CheckpointError(Exception):
    """A checkpoint cannot be used. `str()` is the message and the hint on a line of its own."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n    hint: {self.hint}"


class MissingFile(CheckpointError):
    """A file that a checkpoint needs is not in the folder."""


class UnsupportedArchitecture(CheckpointError):
    """No class of this version runs the architecture."""


class UnsupportedFeature(CheckpointError):
    """The architecture is supported, something else that the checkpoint asks for is not."""


class InvalidConfig(CheckpointError):
    """A JSON file of the checkpoint is malformed or contradicts itself."""


class OutsideFolder(CheckpointError):
    """A file of the folder is a symbolic link that leaves it."""


class BadHeader(CheckpointError):
    """A safetensors file is not one, is cut off, or has a header that contradicts its data."""


class WrongTensors(CheckpointError):
    """The files do not hold the tensors that config.json describes."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` from `offset` of `file`."""

    name: str
    file: Path
    dtype: str
    """As the header spells it: F32, BF16, …"""
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def invalid(key: str, problem: str, file: str = "config.json") -> InvalidConfig:
    """Says what is wrong at a key of a JSON file."""
    return InvalidConfig(
        f"{file}: {key}: {problem}", "compare the file with the one its publisher offers; it may be damaged"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size."""
    hint = "download the file again; it may be damaged"
    try:
        with opened(path) as file:
            data = file.read(MAX_JSON + 1)
    except OSError as error:
        raise MissingFile(f"{path}: {error.strerror or error}", "a checkpoint folder must be readable") from error
    if len(data) > MAX_JSON:
        raise InvalidConfig(f"{path}: larger than {MAX_JSON} bytes", hint)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidConfig(f"{path}: not JSON: {error}", hint) from error
    if not isinstance(value, dict):
        raise InvalidConfig(f"{path}: not a JSON object", hint)
    return value


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """A file of a checkpoint, to be read. Raises `OSError`, also for what is no file, and `OutsideFolder` for a
    link that leads out of the folder: who publishes a checkpoint shall not choose what else of this machine is
    read. The snapshots of the Hugging Face cache are links by design, into that same cache.

    Where it leads is asked of what is open, not of the name, which may lead elsewhere a moment later.
    """
    folder = path.parent.resolve()
    root = folder.parents[2] if folder.parent.name == "snapshots" and len(folder.parents) > 2 else folder
    # without waiting for the other end of a pipe
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        found = Path(os.readlink(f"/proc/self/fd/{file.fileno()}"))
        if not found.is_relative_to(root):
            raise OutsideFolder(
                f"{path}: is a link to {found}, outside of the checkpoint",
                "put the file itself, or a hard link to it, into the folder",
            )
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "is not a file", str(path))
        yield file


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the name {key!r} occurs twice")
        found[key] = value
    return found


def _natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, by name, in the order of their data. Raises `BadHeader`."""

    def bad(problem: str) -> BadHeader:
        return BadHeader(f"{path}: {problem}", "the file is damaged or was not downloaded in full; fetch it again")

    try:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            if len(head) < 8:
                raise bad(f"{size} bytes are too few for a safetensors file")
            length = int.from_bytes(head, "little")
            if length > MAX_HEADER or length > size - 8:
                raise bad(f"announces a header of {length} bytes in a file of {size}")
            text = file.read(length)
    except OSError as error:
        raise MissingFile(f"{path}: {error.strerror or error}", "every shard must be readable") from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise bad(f"the header is not valid: {error}") from error
    if not isinstance(header, dict):
        raise bad("the header is not a JSON object")
    header.pop("__metadata__", None)
    data_start, data_size = 8 + length, size - 8 - length
    tensors: list[TensorInfo] = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise bad(f"tensor {name!r}: expected dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _HEADER_DTYPES:
            raise bad(f"tensor {name!r}: unknown dtype {dtype!r}")
        if not isinstance(shape, list) or len(shape) > 32 or not all(map(_natural, shape)):
            raise bad(f"tensor {name!r}: shape {shape!r} is not a list of sizes")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
            raise bad(f"tensor {name!r}: data_offsets {offsets!r} are not two positions")
        begin, end = offsets
        if not begin <= end <= data_size:
            raise bad(f"tensor {name!r}: bytes {begin} to {end} of {data_size}")
        if math.prod(shape) * _HEADER_DTYPES[dtype] != end - begin:
            raise bad(f"tensor {name!r}: {end - begin} bytes for shape {shape} of {dtype}")
        tensors.append(TensorInfo(name, path, dtype, tuple(shape), data_start + begin, end - begin))
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            kind = "overlaps the one before it" if tensor.offset < position else "leaves a hole before it"
            raise bad(f"tensor {tensor.name!r} {kind}")
        position += tensor.nbytes
    if position != size:
        raise bad(f"{size - position} bytes at the end belong to no tensor")
    return {tensor.name: tensor for tensor in tensors}


def read_tensors(model_dir: Path) -> dict[str, TensorInfo]:
    """All tensors of a folder: `model.safetensors`, or else the shards that `model.safetensors.index.json` lists.

    Raises `MissingFile`, `InvalidConfig` (the index) or `BadHeader`.
    """
    single, index = model_dir / "model.safetensors", model_dir / INDEX
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        others = sorted(p.name for s in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in model_dir.glob(s))
        if others:
            raise UnsupportedFeature(
                f"{model_dir}: no safetensors; {others[0]} is of a format that is not read",
                "only safetensors are read, because the others can carry code; convert the checkpoint first",
            )
        raise MissingFile(
            f"{model_dir}: no model.safetensors and no model.safetensors.index.json",
            "a checkpoint in several files needs the index that lists them",
        )
    weight_map = read_index(index)
    shards: dict[str, dict[str, TensorInfo]] = {}
    for name, file in weight_map.items():
        if file not in shards:
            if not (model_dir / file).is_file():
                raise MissingFile(
                    f"{model_dir / file}: listed in {index.name}, but not there", "download the missing shard"
                )
            shards[file] = read_header(model_dir / file)
        if name not in shards[file]:
            raise invalid(f"weight_map.{name}", f"{file} holds no such tensor", index.name)
    for file, tensors in shards.items():
        for name in tensors:
            if weight_map.get(name) != file:
                place = f"places it in {weight_map[name]}" if name in weight_map else "does not list it"
                raise invalid(f"weight_map.{name}", f"in {file}, but the index {place}", index.name)
    for path in sorted(model_dir.glob("*.safetensors")):
        if _SHARD.fullmatch(path.name) and path.name not in shards:
            raise invalid("weight_map", f"{path.name} is a shard that it does not list", index.name)
    return {name: shards[file][name] for name, file in weight_map.items()}


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> name of the shard beside the index that holds it. Raises `MissingFile` or `InvalidConfig`."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise invalid("weight_map", "is missing or no object", path.name)
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
            raise invalid(f"weight_map.{name}", f"{file!r} is not the name of a file beside it", path.name)
    return weight_map
