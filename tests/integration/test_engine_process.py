"""The real process, `python -m quire_engine`, over its socket and status descriptor: birth, work, every end."""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from tests.effort import bound, times
from tests.engine_specs import run, tiny_spec
from tests.integration.engine_process import Process

from quire_engine.engine import Engine
from quire_engine.grammar import KEPT_BYTES, MAX_BYTES
from quire_schemas.checkpoint import ModelProfile, expected_tensors, profile_from_config, read_profile
from quire_schemas.sizing import FOOTPRINT, activation_bytes, kv_block_bytes, weight_bytes
from quire_schemas.wire import (
    Deltas,
    FromEngine,
    Generate,
    GetStats,
    Hello,
    Pooling,
    Quantization,
    Sampling,
    Stats,
    Structured,
    Welcome,
    frame,
)

LONG = Sampling(max_tokens=1500, temperature=0.0, ignore_eos=True)
SHORT = Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)
M = TypeVar("M")
_decode = msgspec.msgpack.Decoder[Any](FromEngine)


class Client:
    """A blocking connection."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(path)

    def send(self, *messages: msgspec.Struct) -> None:
        self.socket.sendall(b"".join(frame(message) for message in messages))

    def _exactly(self, count: int) -> bytes:
        got = b""
        while len(got) < count:
            piece = self.socket.recv(count - len(got))
            if not piece:
                raise EOFError("the engine closed the connection")
            got += piece
        return got

    def next(self, kind: type[M]) -> M:
        while True:
            (length,) = struct.unpack(">I", self._exactly(4))
            message = _decode.decode(self._exactly(length))
            if isinstance(message, kind):
                return message

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="q-") as name:
        yield Path(name)


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Process]]:
    """Starts engines of the built-in model; fields of the spec can be changed."""
    processes: list[Process] = []

    def starter(**fields: Any) -> Process:
        spec = tiny_spec(
            socket=str(folder / "r" / "engine.sock"),
            dtype="bfloat16",
            kv_dtype="bfloat16",
            max_model_len=2048,
            num_blocks=512,
            max_num_batched_tokens=128,
        )
        processes.append(Process({**msgspec.to_builtins(spec), **fields}, folder))
        return processes[-1]

    yield starter
    for process in processes:
        process.close()


def connect(folder: Path) -> Client:
    client = Client(str(folder / "r" / "engine.sock"))
    client.send(Hello("script"))
    client.next(Welcome)
    return client


def test_without_a_compiler_it_serves_all_the_same_and_says_why(folder: Path) -> None:
    spec = tiny_spec(socket=str(folder / "r" / "engine.sock"))
    engine = Process(msgspec.to_builtins(spec), folder, CXX="/nowhere/c++", XDG_CACHE_HOME=str(folder / "cache"))
    try:
        ready = engine.wait_for("ready")
        assert ready.backend == "reference"
        assert ready.backend_lacking == "CXX names /nowhere/c++, which is not there"
        client = connect(folder)
        client.send(Generate("a", [5, 6, 7], SHORT))
        assert client.next(Deltas).items[0].error is None
        client.close()
    finally:
        engine.close()


def test_a_life_from_starting_to_a_clean_end(start: Callable[..., Process], folder: Path) -> None:
    engine = start()
    ready = engine.wait_for("ready")
    assert ready.load_seconds > 0
    assert (ready.backend, ready.backend_lacking) == ("cpu", "")
    names = [event.event for event in engine.events]
    assert names[0] == "starting"
    assert set(names[1:-1]) == {"loading"}
    last = engine.events[-2]
    assert last.bytes_done == last.bytes_total > 10_000_000
    gaps = [after - before for before, after in zip(engine.seen_at[1:], engine.seen_at[2:], strict=False)]
    assert statistics.median(gaps) < 1.0, "loading is reported at least once a second"
    assert max(gaps) < bound(1.0)

    client = connect(folder)
    client.send(Generate("a", [5, 6, 7], SHORT))
    tokens: list[int] = []
    while True:
        (delta,) = client.next(Deltas).items
        tokens += delta.token_ids
        if delta.finish_reason:
            break
    assert len(tokens) == 4
    assert delta.finish_reason == "length"
    client.send(Generate("v", [5, 6, 7], SHORT, pooling=Pooling("mean", dimensions=8)))
    (delta,) = client.next(Deltas).items
    vector = struct.unpack("<8f", delta.embedding or b"")
    assert (delta.id, delta.token_ids, delta.finish_reason) == ("v", (), "stop")
    assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-5)
    other = connect(folder)
    leaving = connect(folder)
    leaving.send(Generate("gone", [8], LONG))
    leaving.next(Deltas)
    leaving.close()

    client.send(Generate("cut", [9], LONG))
    client.next(Deltas)
    engine.child.send_signal(signal.SIGTERM)
    while (delta := client.next(Deltas).items[0]).finish_reason is None:
        pass
    assert (delta.id, delta.finish_reason, delta.error_code) == ("cut", "error", "engine_shutdown")
    with pytest.raises(EOFError):
        other.next(Deltas)
    assert engine.wait() == 0
    assert not (folder / "r" / "engine.sock").exists()
    client.close()
    other.close()


def test_a_killed_client_frees_its_blocks(start: Callable[..., Process], folder: Path) -> None:
    start().wait_for("ready")
    watcher = connect(folder)
    code = (
        "import socket, sys, time; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        "s.sendall(bytes.fromhex(sys.argv[2])); s.recv(1); print('on', flush=True); time.sleep(60)"
    )
    sent = frame(Hello("router")) + b"".join(frame(Generate(f"{i}", [5, i], LONG)) for i in range(5))
    path = str(folder / "r" / "engine.sock")
    client = subprocess.Popen([sys.executable, "-c", code, path, sent.hex()], stdout=subprocess.PIPE)
    assert client.stdout is not None
    client.stdout.readline()
    while watcher.next(Stats).running < 5:
        pass
    client.kill()
    client.communicate()
    killed = time.monotonic()
    while (stats := watcher.next(Stats)).running:
        assert time.monotonic() - killed < 2.0
    assert (stats.blocks_used, stats.kv_slots_used) == (0, 0)
    watcher.close()


@pytest.mark.parametrize(
    ("fields", "reason", "message"),
    [
        ({"num_blocks": 0}, "InvalidSpec", "num_blocks is 0"),
        ({"block_size": "many"}, "InvalidSpec", "block_size"),
        ({"device": "abacus"}, "InvalidSpec", "device"),
        ({"model_dir": "/nonexistent"}, "MissingFile", "hint:"),
        ({"memory_limit": 1 << 20}, "MemoryMismatch", "above the limit of 1048576"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_said_once_and_not_to_be_tried_again(
    start: Callable[..., Process], fields: dict[str, Any], reason: str, message: str
) -> None:
    engine = start(**fields)
    failed = engine.wait_for("failed")
    assert engine.wait() == 78
    assert (failed.reason, failed.retryable) == (reason, False)
    assert message in failed.message


@pytest.mark.parametrize(
    "quantization",
    [
        pytest.param(Quantization("int8"), marks=pytest.mark.nightly),  # the examples have one: tests/e2e
        Quantization("int4", group_size=32),
    ],
    ids=str,
)
def test_a_quantized_engine_says_what_one_in_this_process_does(
    start: Callable[..., Process], folder: Path, quantization: Quantization
) -> None:
    sampling = msgspec.structs.replace(SHORT, logprobs=2)

    def asked() -> list[Generate]:
        return [Generate(f"r{first}", list(range(first, 60)), sampling) for first in range(5, 50, 9)]

    engine = start(quantization=msgspec.to_builtins(quantization), batch_invariant=True)
    assert engine.wait_for("ready").batch_invariant
    client = connect(folder)
    client.send(*asked())
    said: dict[str, list[Any]] = {message.id: [] for message in asked()}
    while any(len(entries) < sampling.max_tokens for entries in said.values()):
        for delta in client.next(Deltas).items:
            assert delta.error is None
            said[delta.id] += delta.logprobs or []
    client.close()
    here = {
        method: Engine.load(tiny_spec(dtype="bfloat16", kv_dtype="bfloat16", quantization=method))
        for method in (quantization, None)
    }
    for message in asked():
        alone = [entry for delta in run(here[quantization], message)[message.id] for entry in delta.logprobs or []]
        assert alone == said[message.id], "to the last bit, whoever else is there"
    for message in asked():
        plain = [entry for delta in run(here[None], message)[message.id] for entry in delta.logprobs or []]
        assert plain != said[message.id]


@pytest.mark.nightly
@pytest.mark.parametrize("quantization", [Quantization("int8"), Quantization("int4", group_size=32)], ids=str)
def test_the_memory_of_loading_is_that_of_the_result(
    start: Callable[..., Process], tmp_path: Path, quantization: Quantization
) -> None:
    """The most that a process ever held, against one with a small model: the difference is the plan's."""
    shape = {
        "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "vocab_size": 200_000, "hidden_size": 512,
        "intermediate_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8,
        "max_position_embeddings": 256, "tie_word_embeddings": True,
    }  # fmt: skip
    large = profile_from_config(shape)
    (tmp_path / "config.json").write_text(json.dumps(shape))
    save_file(
        {name: torch.randn(sizes).bfloat16() for name, sizes in expected_tensors(large)},
        tmp_path / "model.safetensors",
    )
    sizes = {"max_num_batched_tokens": 8, "max_num_seqs": 2, "max_model_len": 64, "num_blocks": 16}

    def most(**fields: Any) -> int:
        engine = start(quantization=msgspec.to_builtins(quantization), **sizes, **fields)
        engine.wait_for("ready")
        status = Path(f"/proc/{engine.child.pid}/status").read_text()
        engine.child.kill()
        engine.wait()
        return int(status.split("VmHWM:")[1].split()[0]) << 10

    def planned(profile: ModelProfile) -> int:
        return (
            weight_bytes(profile, "bfloat16", quantization)
            + activation_bytes(profile, "bfloat16", 8, 2, 64, quantization=quantization)
            + 16 * kv_block_bytes(profile, "bfloat16", 16)
        )

    found = most(model_dir=str(tmp_path), memory_limit=1 << 32) - most()
    expected = planned(large) - planned(read_profile(Path(tiny_spec().model_dir)))
    print(f"{found >> 20} MiB, planned {expected >> 20}; in bfloat16 {large.weight_bytes >> 20}")
    assert found < expected + (16 << 20)
    assert expected + (16 << 20) < large.weight_bytes, "in both forms it would show"


def test_one_socket_has_one_engine_and_a_dead_one_is_replaced(start: Callable[..., Process], folder: Path) -> None:
    first = start()
    first.wait_for("ready")
    second = start()
    failed = second.wait_for("failed")
    assert second.wait() == 1
    assert (failed.reason, failed.retryable) == ("SocketTaken", True)
    connect(folder).close()
    first.child.kill()
    first.wait()
    assert (folder / "r" / "engine.sock").exists()
    third = start()
    third.wait_for("ready")
    connect(folder).close()
    os.close(third.status)
    third.status = -1
    assert third.wait(10) == 0, "an engine that nobody watches any more ends"
    assert not (folder / "r" / "engine.sock").exists()


# ── KV exhaustion ─────────────────────────────────────────────────────────────────────────────────────────

CROWD, PROMPT, OUTPUT = 32, 48, times(48, 208)
CROWDED: dict[str, Any] = {
    "dtype": "float32", "kv_dtype": "float32", "max_num_seqs": CROWD, "max_num_batched_tokens": 64,
    "num_blocks": (PROMPT + OUTPUT) // 16 * 3 // 2,
}  # fmt: skip


def crowd() -> list[Generate]:
    """Requests that begin alike for a block and then go their own ways."""
    sampling = Sampling(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)
    begin, own = list(range(100, 116)), PROMPT - 16
    return [
        Generate(str(n), [*begin, *(64 + (37 * n + 11 * at) % 1900 for at in range(own))], sampling)
        for n in range(CROWD)
    ]


@pytest.fixture(scope="module")
def unhurried() -> list[list[int]]:
    """What an engine says that has room for the whole crowd."""
    engine = Engine.load(tiny_spec(max_num_seqs=CROWD, num_blocks=CROWD * (PROMPT + OUTPUT) // 16))
    heard = run(engine, *crowd()).values()
    found = [[token for delta in deltas for token in delta.token_ids] for deltas in heard]
    assert engine.stats().preemptions == 0
    return found


@pytest.mark.parametrize(
    ("prefix_caching", "async_scheduling"),
    [
        (True, True),
        pytest.param(True, False, marks=pytest.mark.nightly),
        pytest.param(False, True, marks=pytest.mark.nightly),
        pytest.param(False, False, marks=pytest.mark.nightly),
    ],
)
def test_a_crowd_in_a_pool_of_one_and_a_half_sequences_is_served_in_turn_and_unaltered(
    start: Callable[..., Process],
    folder: Path,
    unhurried: list[list[int]],
    prefix_caching: bool,
    async_scheduling: bool,
) -> None:
    """All finish, in the order in which they came, none later than if each had had the pool for itself in turn."""
    start(**CROWDED, prefix_caching=prefix_caching, async_scheduling=async_scheduling).wait_for("ready")
    client = connect(folder)
    _, ended, _ = serve(client, crowd()[-1:])
    alone = ended[0]
    tokens, ended, preempted = serve(client, crowd())
    client.send(GetStats())
    while (stats := client.next(Stats)).running:
        pass
    client.close()
    assert tokens == unhurried
    assert preempted == stats.preemptions > 0
    assert (stats.waiting, stats.blocks_used) == (0, 0)
    assert ended == sorted(ended), "the first to come is the first to end"
    late = [turn for turn, steps in enumerate(ended, 1) if steps > turn * (alone + 1)]
    assert not late, f"of the crowd, those at {late} waited longer than for those before them"


def serve(client: Client, requests: list[Generate]) -> tuple[list[list[int]], list[int], int]:
    """Per request its tokens, and after how many steps it had ended; how often one lost its blocks."""
    client.send(GetStats())
    began = client.next(Stats).steps
    client.send(*requests)
    tokens = {request.id: list[int]() for request in requests}
    ended: dict[str, int] = {}
    preempted = 0
    while len(ended) < len(requests):
        deltas = client.next(Deltas)
        for delta in deltas.items:
            tokens[delta.id] += delta.token_ids
            if delta.finish_reason is not None:
                assert delta.finish_reason == "length", delta
                assert delta.timings is not None
                ended[delta.id] = deltas.step - began
                preempted += len(delta.timings.preempted_at)
    return list(tokens.values()), [ended[request.id] for request in requests], preempted


def test_a_signal_during_the_start_is_heard(start: Callable[..., Process], folder: Path) -> None:
    engine = start()
    engine.wait_for("loading")
    engine.child.send_signal(signal.SIGTERM)
    assert engine.wait(10) == 0
    assert "failed" not in [event.event for event in engine.events]


def in_memory(process: Process) -> int:
    """Bytes of the engine's own, not of the files it has open."""
    fields = Path(f"/proc/{process.child.pid}/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGESIZE")


def large_grammars(count: int) -> Iterator[Structured]:
    """Distinct ones of some MiB each, by turns with one whose requests make it grow."""
    for number in range(count):
        words = [f"{number:04}{word * 7919 % 100_003:05}" for word in range(2000)]
        yield Structured("choice", msgspec.json.encode(words).decode())
        yield Structured("regex", f"([ab]*a[ab]{{18}}){{1,20}}{number}")


def test_grammars_are_kept_within_the_footprint(start: Callable[..., Process], folder: Path) -> None:
    """What an engine takes grows by no more than what it may keep, however many grammars it has seen, and stays
    below what the plan gives it.
    """
    process = start()
    process.wait_for("ready")
    client = connect(folder)
    plain = Sampling(max_tokens=20, temperature=1.0, seed=1)
    client.send(Generate("first", [5, 6, 7], msgspec.structs.replace(plain, structured=Structured("regex", "a+"))))
    while not any(delta.id == "first" and delta.finish_reason for delta in client.next(Deltas).items):
        pass
    before, most = in_memory(process), 0
    for number, structured in enumerate(large_grammars(times(8, 200))):
        client.send(Generate(f"g{number}", [5, 6, 7], msgspec.structs.replace(plain, structured=structured)))
        ended = False
        while not ended:
            for delta in client.next(Deltas).items:
                if delta.id == f"g{number}" and delta.finish_reason:
                    assert delta.finish_reason != "error", delta.error
                    ended = True
        most = max(most, in_memory(process))
    print(f"{before >> 20} MiB before, {most >> 20} MiB at most")
    # kept, one that is compiled and one that runs, and what the allocator does not give back
    assert most - before < KEPT_BYTES + 3 * MAX_BYTES
    assert most < FOOTPRINT["cpu"].overhead
    client.close()
