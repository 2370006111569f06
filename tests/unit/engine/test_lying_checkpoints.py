"""Checkpoints that are cut off, damaged or lie: each kind is refused by its name, before a weight is handed out.

Each kind is a function that spoils a good folder and gives words (patterns) that the refusal must say: the file,
and the tensor where there is one. All go through `read_profile`, by which plan and apply decide, and through
`Weights`, by which an engine loads; the last few can only be seen in the data, by the engine alone.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.effort import examples

from quire_engine.weights import Weights
from quire_schemas.checkpoint import expected_tensors, profile_from_config, read_config, read_profile
from quire_schemas.checkpoint_files import CheckpointError, OutsideFolder, opened

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FIRST = "model.embed_tokens.weight"
SECOND = "model.layers.0.input_layernorm.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
Header = dict[str, Any]
Kind = Callable[[Path], str]


def image(header: Header | bytes, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def parts(path: Path) -> tuple[Header, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def packed(shapes: list[tuple[str, tuple[int, ...]]]) -> bytes:
    header: Header = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes:
        end = at + math.prod(shape) * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return image(header, bytes(at))


def single(folder: Path) -> Path:
    """A good checkpoint in one file."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / FILE).write_bytes(packed(list(expected_tensors(profile_from_config(CONFIG)))))
    return folder


def sharded(folder: Path) -> Path:
    """The same in two shards with their index."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = list(expected_tensors(profile_from_config(CONFIG)))
    weight_map: dict[str, str] = {}
    for name, part in ((ONE, shapes[:4]), (TWO, shapes[4:])):
        (folder / name).write_bytes(packed(part))
        weight_map |= {tensor: name for tensor, _ in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


KINDS: dict[str, tuple[Callable[[Path], Path], Kind]] = {}


def kind(good: Callable[[Path], Path]) -> Callable[[Kind], Kind]:
    def register(function: Kind) -> Kind:
        KINDS[function.__name__] = (good, function)
        return function

    return register


def family(prefix: str, cases: dict[str, tuple[Callable[[Header], object], str]]) -> None:
    """Kinds that differ in what they do to the header."""
    for name, (change, words) in cases.items():

        def spoil(folder: Path, change: Callable[[Header], object] = change, words: str = words) -> str:
            header, data = parts(folder / FILE)
            change(header)
            (folder / FILE).write_bytes(image(header, data))
            return words

        KINDS[f"{prefix}_{name}"] = (single, spoil)


def announce(name: str, length: Callable[[int], int]) -> None:
    """Kinds that lie about the length of the header."""

    def spoil(folder: Path) -> str:
        content = (folder / FILE).read_bytes()
        true = int.from_bytes(content[:8], "little")
        (folder / FILE).write_bytes(struct.pack("<Q", length(true) % 2**64) + content[8:])
        return FILE

    KINDS[f"header_length_{name}"] = (single, spoil)


for _name, _length in {
    "zero": lambda true: 0,
    "one_less": lambda true: true - 1,
    "one_more": lambda true: true + 1,
    "half": lambda true: true // 2,
    "beyond_the_file": lambda true: 1_000_000,
    "negative_as_signed": lambda true: -1,
    "smallest_signed": lambda true: 2**63,
    "big_endian": lambda true: int.from_bytes(true.to_bytes(8, "little"), "big"),
}.items():
    announce(_name, _length)


def raw(name: str, content: Callable[[bytes], bytes]) -> None:
    """Kinds that replace the whole file."""

    def spoil(folder: Path) -> str:
        (folder / FILE).write_bytes(content((folder / FILE).read_bytes()))
        return FILE

    KINDS[f"file_{name}"] = (single, spoil)


for _name, _content in {
    "empty": lambda good: b"",
    "of_seven_bytes": lambda good: good[:7],
    "of_a_length_alone": lambda good: good[:8],
    "cut_in_the_header": lambda good: good[:40],
    "cut_in_the_data": lambda good: good[:-1],
    "with_a_byte_at_the_end": lambda good: good + b"\0",
    "of_html": lambda good: b"<!DOCTYPE html><html><body>404: not found</body></html>",
    "of_a_pickle": lambda good: b"PK\x03\x04archive/data.pkl" + bytes(100),
    "of_a_git_lfs_pointer": lambda good: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "header_not_utf8": lambda good: image(b'{"\xff": 1}', b""),
    "header_not_json": lambda good: image(b"{'a': 1}", b""),
    "header_a_list": lambda good: image(b"[]", b""),
    "header_null": lambda good: image(b"null", b""),
    "header_nested_deeply": lambda good: image(b"[" * 100_000, b""),
    "header_with_a_number_of_5000_digits": lambda good: image(b'{"a": ' + b"9" * 5000 + b"}", b""),
    "header_with_a_name_twice": lambda good: image(
        b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": 1}', b""
    ),
    "with_a_flipped_bit_in_the_header": lambda good: good[:9] + bytes([good[9] ^ 0x40]) + good[10:],
}.items():
    raw(_name, _content)


def at(header: Header, name: str, key: str, value: Any) -> None:
    header[name][key] = value


family(
    "entry",
    {
        "a_number": (lambda h: h.update({FIRST: 3}), f"{FILE}.*{FIRST}"),
        "without_dtype": (lambda h: h[FIRST].pop("dtype"), f"{FILE}.*{FIRST}"),
        "with_another_key": (lambda h: at(h, FIRST, "strides", [1]), f"{FILE}.*{FIRST}"),
        "with_an_unknown_dtype": (lambda h: at(h, FIRST, "dtype", "BF17"), f"{FILE}.*{FIRST}.*BF17"),
        "with_a_list_as_dtype": (lambda h: at(h, FIRST, "dtype", ["BF16"]), f"{FILE}.*{FIRST}"),
        "with_a_wider_dtype": (lambda h: at(h, FIRST, "dtype", "F32"), f"{FILE}.*{FIRST}.*bytes for shape"),
        "with_a_narrower_dtype": (lambda h: at(h, FIRST, "dtype", "U8"), f"{FILE}.*{FIRST}.*bytes for shape"),
        "with_integers": (lambda h: at(h, FIRST, "dtype", "I16"), f"{FILE}.*{FIRST}.*I16"),
    },
)
family(
    "shape",
    {
        "negative": (lambda h: at(h, FIRST, "shape", [-20, -8]), f"{FILE}.*{FIRST}"),
        "of_booleans": (lambda h: at(h, FIRST, "shape", [True, 160]), f"{FILE}.*{FIRST}"),
        "of_fractions": (lambda h: at(h, FIRST, "shape", [20.0, 8]), f"{FILE}.*{FIRST}"),
        "of_nan": (lambda h: at(h, FIRST, "shape", [float("nan"), 8]), f"{FILE}.*{FIRST}"),
        "a_text": (lambda h: at(h, FIRST, "shape", "20,8"), f"{FILE}.*{FIRST}"),
        "of_33_sizes": (lambda h: at(h, FIRST, "shape", [1] * 31 + [20, 8]), f"{FILE}.*{FIRST}"),
        "that_overflows": (lambda h: at(h, FIRST, "shape", [2**32, 2**32]), f"{FILE}.*{FIRST}"),
        "that_overflows_to_the_truth": (lambda h: at(h, FIRST, "shape", [2**64 + 20, 8]), f"{FILE}.*{FIRST}"),
        "of_more": (lambda h: at(h, FIRST, "shape", [21, 8]), f"{FILE}.*{FIRST}"),
        "transposed": (lambda h: at(h, FIRST, "shape", [8, 20]), f"{FILE}.*{FIRST}.*expected"),
        "flattened": (lambda h: at(h, FIRST, "shape", [160]), f"{FILE}.*{FIRST}.*expected"),
    },
)
family(
    "offsets",
    {
        "beyond_the_file": (lambda h: at(h, FIRST, "data_offsets", [10**6, 10**6 + 320]), f"{FILE}.*{FIRST}"),
        "reversed": (lambda h: at(h, FIRST, "data_offsets", [320, 0]), f"{FILE}.*{FIRST}"),
        "negative": (lambda h: at(h, FIRST, "data_offsets", [-320, 0]), f"{FILE}.*{FIRST}"),
        "of_one": (lambda h: at(h, FIRST, "data_offsets", [0]), f"{FILE}.*{FIRST}"),
        "of_fractions": (lambda h: at(h, FIRST, "data_offsets", [0.0, 320.0]), f"{FILE}.*{FIRST}"),
        "beyond_64_bits": (lambda h: at(h, FIRST, "data_offsets", [2**70, 2**70 + 320]), f"{FILE}.*{FIRST}"),
        "that_overlap": (lambda h: at(h, SECOND, "data_offsets", [304, 320]), f"{FILE}.*(overlaps|hole)"),
        "that_share_all": (lambda h: h.update({"copy": dict(h[FIRST])}), f"{FILE}.*overlaps"),
        "with_a_hole": (lambda h: h.pop(SECOND), f"{FILE}.*hole"),
        "with_a_hole_at_the_start": (lambda h: h.pop(FIRST), f"{FILE}.*hole"),
    },
)
family(
    "tensor",
    {
        "renamed": (lambda h: h.update({"x": h.pop(FIRST)}), FIRST),
        "of_another_layer": (lambda h: h.update({Q.replace(".0.", ".1."): h.pop(Q)}), Q),
        "too_many": (
            lambda h: h.update({"v": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
            f"{FILE}.*tensor v",
        ),
    },
)


@kind(single)
def header_above_the_limit(folder: Path) -> str:
    with (folder / FILE).open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)  # sparse
    return FILE


@kind(single)
def file_that_is_a_folder(folder: Path) -> str:
    (folder / FILE).unlink()
    (folder / FILE).mkdir()
    return "safetensors"


@kind(single)
def file_that_is_a_pipe(folder: Path) -> str:
    (folder / FILE).unlink()
    os.mkfifo(folder / FILE)
    return "safetensors"


@kind(single)
def link_to_nowhere(folder: Path) -> str:
    (folder / FILE).unlink()
    (folder / FILE).symlink_to(folder / "gone")
    return "safetensors"


def move_out(folder: Path, name: str) -> str:
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / name).rename(outside / name)
    (folder / name).symlink_to(outside / name)
    return f"{name}.*outside of the checkpoint"


@kind(single)
def link_out_of_the_folder(folder: Path) -> str:
    return move_out(folder, FILE)


@kind(single)
def config_that_is_a_link_out_of_the_folder(folder: Path) -> str:
    return move_out(folder, "config.json")


@kind(sharded)
def shard_that_is_a_link_out_of_the_folder(folder: Path) -> str:
    return move_out(folder, TWO)


@kind(sharded)
def shard_cut_off(folder: Path) -> str:
    (folder / TWO).write_bytes((folder / TWO).read_bytes()[:-3])
    return TWO


@kind(sharded)
def shard_missing(folder: Path) -> str:
    (folder / TWO).unlink()
    return f"{TWO}.*{INDEX}"


@kind(sharded)
def shard_too_many(folder: Path) -> str:
    (folder / "model-00003-of-00003.safetensors").write_bytes(packed([("x", (1,))]))
    return f"{INDEX}.*model-00003-of-00003"


@kind(sharded)
def shards_that_swapped_names(folder: Path) -> str:
    (folder / ONE).rename(folder / "x")
    (folder / TWO).rename(folder / ONE)
    (folder / "x").rename(folder / TWO)
    return f"{INDEX}.*{FIRST}"


@kind(sharded)
def tensor_in_two_shards(folder: Path) -> str:
    shapes = list(expected_tensors(profile_from_config(CONFIG)))
    (folder / TWO).write_bytes(packed([shapes[0], *shapes[4:]]))
    return f"{INDEX}.*{FIRST}.*{TWO}"


def index(name: str, change: Callable[[dict[str, Any]], object], words: str) -> None:
    def spoil(folder: Path) -> str:
        document = json.loads((folder / INDEX).read_text())
        change(document)
        (folder / INDEX).write_text(json.dumps(document))
        return f"{INDEX}.*{words}" if words != FIRST else words

    KINDS[f"index_{name}"] = (sharded, spoil)


def point(file: object) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["weight_map"].update({FIRST: file})


index("without_a_map", lambda d: d.pop("weight_map"), "weight_map")
index("with_a_list", lambda d: d.update(weight_map=[]), "weight_map")
index("that_climbs_out", point("../outside.safetensors"), f"{FIRST}.*not the name of a file")
index("that_climbs_out_deeply", point("../../../../etc/passwd"), f"{FIRST}.*not the name of a file")
index("with_an_absolute_path", point("/etc/passwd.safetensors"), f"{FIRST}.*not the name of a file")
index("with_a_path_of_windows", point("..\\outside.safetensors"), f"{FIRST}.*not the name of a file")
index("with_a_dot_file", point(".hidden.safetensors"), f"{FIRST}.*not the name of a file")
index("with_a_nul", point("x\0.safetensors"), f"{FIRST}.*not the name of a file")
index("with_a_pickle", point("pytorch_model.bin"), f"{FIRST}.*not the name of a file")
index("with_a_number", point(7), f"{FIRST}.*not the name of a file")
index("that_names_the_other_shard", point(TWO), f"{FIRST}.*holds no such tensor")
index("that_leaves_a_tensor_out", lambda d: d["weight_map"].pop(FIRST), f"{FIRST}.*does not list it")
index("that_adds_a_tensor", lambda d: d["weight_map"].update(x=ONE), "x.*holds no such tensor")


@kind(sharded)
def index_not_json(folder: Path) -> str:
    (folder / INDEX).write_text('{"weight_map": {')
    return INDEX


@kind(sharded)
def index_above_the_limit(folder: Path) -> str:
    os.truncate(folder / INDEX, 65 * 2**20)  # sparse
    return INDEX


def load(folder: Path, config: Path, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """Load all that an engine loads; what it said of its progress."""
    done: list[str] = []
    profile = read_config(config)
    weights = Weights(
        folder,
        profile,
        dtype=dtype,
        device=torch.device("cpu"),
        on_progress=lambda have, total: done.append(f"{have} of {total}"),
    )
    for name, _ in expected_tensors(profile):
        weights.tensor(name)
    return done


def test_there_are_enough_kinds_and_the_good_ones_pass(tmp_path: Path) -> None:
    assert len(KINDS) >= 50
    for name, good in (("one", single), ("two", sharded)):
        (tmp_path / name).mkdir()
        folder = good(tmp_path / name)
        assert read_profile(folder).num_layers == 1
        assert load(folder, folder)[-1].split(" of ")[0] == str(read_profile(folder).weight_bytes)


@pytest.mark.parametrize("name", KINDS)
def test_a_lying_checkpoint_is_refused_before_anything_is_loaded(name: str, tmp_path: Path) -> None:
    good, spoil = KINDS[name]
    (tmp_path / "bad").mkdir()
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps(CONFIG))
    words = spoil(good(tmp_path / "bad"))
    with pytest.raises(CheckpointError) as seen:
        read_profile(tmp_path / "bad")
    assert seen.value.hint
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        raise seen.value
    if "config" in name:
        return  # an engine does not get as far as the weights
    progress: list[object] = []
    with pytest.raises(CheckpointError) as refused:
        Weights(
            tmp_path / "bad",
            read_config(tmp_path / "config"),
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            on_progress=lambda *_: progress.append(_),
        )
    assert refused.value.message == seen.value.message
    assert not progress


def test_a_tied_head_that_differs_is_seen_by_the_engine_alone(tmp_path: Path) -> None:
    tied = CONFIG | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(tied))
    shapes = [*expected_tensors(profile_from_config(tied)), ("lm_head.weight", (20, 8))]
    content = bytearray(packed(shapes))
    (tmp_path / FILE).write_bytes(content)
    read_profile(tmp_path)
    load(tmp_path, tmp_path)
    content[-1] ^= 1
    (tmp_path / FILE).write_bytes(content)
    read_profile(tmp_path)  # arithmetic cannot see it
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        load(tmp_path, tmp_path)


def test_a_number_that_float16_cannot_hold_is_seen_by_the_engine_alone(tmp_path: Path) -> None:
    single(tmp_path)
    content = bytearray((tmp_path / FILE).read_bytes())
    content[-2:] = torch.tensor([1e30], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    (tmp_path / FILE).write_bytes(content)
    read_profile(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{FILE}: tensor lm_head\.weight has numbers that float16"):
        load(tmp_path, tmp_path, torch.float16)


def looked_at(folder: Path) -> Weights:
    """Weights whose headers were read, and nothing else yet."""
    profile, cpu = read_config(folder), torch.device("cpu")
    return Weights(folder, profile, dtype=torch.bfloat16, device=cpu, on_progress=lambda *_: None)


def test_a_file_cut_off_after_it_was_looked_at_is_no_read_past_its_end(tmp_path: Path) -> None:
    single(tmp_path)
    weights = looked_at(tmp_path)
    os.truncate(tmp_path / FILE, (tmp_path / FILE).stat().st_size - 4)
    with pytest.raises(CheckpointError, match=rf"{FILE}: ended inside tensor lm_head\.weight"):
        weights.tensor("lm_head.weight")


def test_a_link_that_is_put_in_place_after_the_look_leads_nowhere(tmp_path: Path) -> None:
    single(tmp_path)
    weights = looked_at(tmp_path)
    move_out(tmp_path, FILE)
    with pytest.raises(OutsideFolder, match="outside of the checkpoint"):
        weights.tensor("lm_head.weight")


def test_a_name_that_leads_here_and_there_in_turns_is_never_read_from_outside(tmp_path: Path) -> None:
    """Whoever writes the folder changes a link while it is looked at and opened, as fast as he can."""
    folder, secret = tmp_path / "checkpoint", tmp_path / "secret"
    folder.mkdir()
    secret.write_text("of this machine")
    (folder / "own").write_text("of the checkpoint")
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            for target in (folder / "own", secret):
                (folder / "next").symlink_to(target)
                os.replace(folder / "next", folder / "config.json")

    (folder / "config.json").symlink_to(folder / "own")
    changing = threading.Thread(target=change)
    changing.start()
    told = {"own": 0, "refused": 0}
    try:
        for _ in range(examples(2000)):
            try:
                with opened(folder / "config.json") as file:
                    assert file.read() == b"of the checkpoint"
                told["own"] += 1
            except OutsideFolder:
                told["refused"] += 1
    finally:
        ended.set()
        changing.join()
    assert min(told.values()) > 0, "he was at it all along"
