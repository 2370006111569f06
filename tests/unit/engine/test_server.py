"""The server on a real Unix socket in this process: frames, connections that come and go, who may speak."""

from __future__ import annotations

import asyncio
import os
import queue
import random
import signal
import socket
import stat
import struct
import threading
import time
from pathlib import Path

import msgspec
import pytest
import torch
from tests.effort import EFFORT, examples
from tests.unit.engine.serving import LONG, SHORT, Client, greeted, serving, spec_in, until_idle

from quire_engine import server as server_module
from quire_engine.driver import Died, Driver
from quire_engine.errors import InvalidSpec, InvariantBroken, OutOfMemory, SocketTaken
from quire_engine.request import Request
from quire_engine.scheduler import Scheduler
from quire_engine.server import Server, Status, prepare_socket
from quire_engine.step import StepPlan
from quire_schemas.wire import (
    ADOPTION_WINDOW,
    MAX_FRAME,
    PROTOCOL,
    Abort,
    Deltas,
    EngineEvent,
    Generate,
    GetStats,
    Hello,
    Limits,
    Sampling,
    Stats,
    Welcome,
    frame,
)


def always(token: int) -> Sampling:
    """Three times the same token, whatever the model thinks."""
    return Sampling(max_tokens=3, temperature=0.0, ignore_eos=True, logit_bias={token: 100.0})


# ── a conversation ────────────────────────────────────────────────────────────────────────────────────────


async def test_hello_is_answered_with_the_bounds_and_the_state(folder: Path) -> None:
    spec = spec_in(folder)
    async with serving(spec):
        client = await Client.connect(spec.socket)
        client.send(Hello("router"))
        assert await client.next(Welcome) == Welcome(
            "tiny-0", 3, PROTOCOL, 2048, (2041, 2039), 512, 16, 128, 8, ADOPTION_WINDOW, goes_on=True
        )
        stats = await client.next(Stats)
        assert (stats.blocks_total, stats.blocks_used, stats.hot_hash) == (128, 0, "h0")
        client.close()


async def test_one_frame_a_step_carries_what_all_requests_of_a_connection_got(folder: Path) -> None:
    spec = spec_in(folder)
    async with serving(spec):
        client = await greeted(spec)
        client.send(*(Generate(name, [5, 6, ord(name)], SHORT) for name in "abc"))
        steps: list[int] = []
        got: dict[str, list[int]] = {}
        ended: set[str] = set()
        while ended != set("abc"):
            deltas = await client.next(Deltas)
            steps.append(deltas.step)
            assert len({delta.id for delta in deltas.items}) == len(deltas.items)
            for delta in deltas.items:
                got.setdefault(delta.id, []).extend(delta.token_ids)
                if delta.finish_reason:
                    ended.add(delta.id)
                    assert delta.timings is not None
                    assert delta.timings.finished_at is not None
                    assert delta.timings.received_at <= delta.timings.finished_at <= time.monotonic()
        assert steps == sorted(set(steps)), "at most one frame a step"
        assert {name: len(ids) for name, ids in got.items()} == {"a": 3, "b": 3, "c": 3}
        client.close()


async def test_what_may_wait_is_told_with_the_end_and_is_the_same(folder: Path) -> None:
    spec = spec_in(folder)
    scored = Sampling(max_tokens=12, temperature=1.0, seed=7, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    async with serving(spec):
        client = await greeted(spec)
        client.send(Generate("now", [5, 6, 7], scored), Generate("later", [5, 6, 7], scored, patience=60.0))
        heard = await client.hear("now", "later")
        assert len(heard["now"]) >= 12, "as each comes"
        first, *rest = [delta for delta in heard["later"] if delta.token_ids]
        assert len(first.token_ids) == 1, "the first token waits for nothing"
        assert first.timings is not None
        (last,) = rest
        assert (last.finish_reason, len(last.token_ids)) == ("length", 11)
        assert last.timings is not None
        assert last.timings.finished_at is not None
        for field in ("token_ids", "logprobs", "prompt_logprobs"):
            now, later = (
                [each for delta in heard[name] for each in getattr(delta, field) or ()]
                for name in ("now", "later")
            )
            assert now == later, field
            assert later
        client.close()


async def test_what_waits_is_told_when_its_time_is_over(folder: Path) -> None:
    spec = spec_in(folder)
    async with serving(spec):
        client = await greeted(spec)
        client.send(Generate("a", [5, 6], LONG, patience=0.05))
        arrived: list[tuple[float, int]] = []
        while not arrived or sum(count for _, count in arrived) < LONG.max_tokens:
            for delta in (await client.next(Deltas)).items:
                arrived.append((time.monotonic(), len(delta.token_ids)))
        took = arrived[-1][0] - arrived[0][0]
        assert len(arrived) <= 2 + took / 0.05 + 1, "not before, but for the first token and the end"
        if took > 0.5:  # a step is much shorter than what waits
            assert len(arrived) >= 4
        client.close()


async def test_an_end_without_tokens_brings_what_has_waited(folder: Path) -> None:
    spec = spec_in(folder)
    async with serving(spec):
        client = await greeted(spec)
        client.send(Generate("a", [5, 6], LONG, patience=60.0, timeout=0.2))
        heard = (await client.hear("a"))["a"]
        assert len(heard) == 2
        assert (heard[-1].finish_reason, heard[-1].error_code) == ("error", "timeout")
        assert len(heard[-1].token_ids) > 0
        client.close()


async def test_two_connections_may_use_the_same_ids(folder: Path) -> None:
    spec = spec_in(folder)
    async with serving(spec):
        first, second = await greeted(spec), await greeted(spec)
        first.send(Generate("same", [5], always(10)))
        second.send(Generate("same", [5], always(20)))
        for client, token in ((first, 10), (second, 20)):
            assert [d.token_ids for d in (await client.hear("same"))["same"]] == [(token,)] * 3
        first.close()
        second.close()


async def test_a_refusal_is_the_first_and_last_delta(folder: Path) -> None:
    spec = spec_in(folder)
    async with serving(spec):
        client = await greeted(spec)
        client.send(Generate("long", [5] * 600, SHORT), Generate("fine", [5], SHORT))
        heard = await client.hear("long", "fine")
        (refusal,) = heard["long"]
        assert (refusal.finish_reason, refusal.error_code) == ("error", "context_length_exceeded")
        assert heard["fine"][-1].finish_reason == "length"
        client.send(Generate("long", [5], SHORT))
        assert (await client.hear("long"))["long"][-1].finish_reason == "length", "the id is free again"
        client.close()


async def test_an_abort_ends_a_request_at_once_and_its_id_can_be_used_again(folder: Path) -> None:
    spec = spec_in(folder)
    async with serving(spec):
        client = await greeted(spec)
        client.send(Generate("a", [5, 6], LONG))
        await client.next(Deltas)
        client.send(Abort("a"), Abort("a"), Abort("never seen"), Generate("a", [7], SHORT))
        heard = await client.hear("a")
        assert len([delta for delta in heard["a"] if delta.finish_reason]) == 1
        assert (await until_idle(client)).blocks_used == 0
        client.close()


async def test_a_connection_that_goes_away_takes_its_requests_with_it(folder: Path) -> None:
    spec = spec_in(folder)
    async with serving(spec):
        leaving, staying = await greeted(spec), await greeted(spec)
        leaving.send(*(Generate(f"{i}", [5, i], LONG) for i in range(6)))
        await leaving.next(Deltas)
        leaving.writer.transport.abort()
        staying.send(Generate("mine", [9], SHORT))
        assert (await staying.hear("mine"))["mine"][-1].finish_reason == "length"
        started = time.monotonic()
        assert (await until_idle(staying)).blocks_used == 0
        assert time.monotonic() - started < 0.5, "400 tokens would take longer"
        staying.close()


async def test_limits_are_answered_with_their_hash_or_the_old_one(folder: Path) -> None:
    spec = spec_in(folder)
    async with serving(spec):
        client = await greeted(spec)
        client.send(Limits("h1", 2, 16, False))
        assert (await client.next(Stats)).hot_hash == "h1"
        client.send(Limits("h2", 0, 16, True))
        assert (await client.next(Stats)).hot_hash == "h1"
        client.close()


async def test_stats_come_at_most_four_times_a_second_and_end_with_the_idle_engine(folder: Path) -> None:
    spec = spec_in(folder)
    async with serving(spec):
        client = await greeted(spec)
        client.send(Generate("a", [5, 6], msgspec.structs.replace(LONG, max_tokens=150)))
        times: list[float] = []
        last = None
        deadline = time.monotonic() + 10
        while (last is None or last.running or not last.steps) and time.monotonic() < deadline:
            last = await client.next(Stats)
            times.append(time.monotonic())
        assert last is not None
        assert (last.running, last.blocks_used, last.steps) == (0, 0, 150)
        assert len(times) <= 4 * (times[-1] - times[0]) + 2
        client.close()


async def test_a_ping_is_answered_by_the_thread_that_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_in(folder)
    async with serving(spec):
        client = await greeted(spec)
        client.send(GetStats())
        idle = await client.next(Stats)
        assert (idle.running, idle.waiting, idle.oldest_running_at) == (0, 0, None)
        let_go = threading.Event()
        schedule = Scheduler.schedule

        def stuck(scheduler: Scheduler) -> StepPlan:
            assert let_go.wait(20)
            return schedule(scheduler)

        monkeypatch.setattr(Scheduler, "schedule", stuck)
        client.send(Generate("a", [5], LONG), GetStats(), GetStats())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.next(Stats), 0.5)
        let_go.set()
        running = await client.next(Stats)
        while not running.running:
            running = await client.next(Stats)
        assert running.oldest_running_at is not None
        assert running.oldest_running_at <= running.last_step_at <= time.monotonic()
        client.close()


# ── those who do not keep to it ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "sent",
    [
        frame(Generate("a", [1], SHORT)),
        frame(Hello("router", protocol=PROTOCOL + 1)),
        frame(Hello("router")) + frame(Hello("router")),
        frame(Hello("router")) + frame(Generate("a", [1], LONG)) + frame(Generate("a", [2], LONG)),
        frame(Hello("router")) + struct.pack(">I", MAX_FRAME + 1),
        frame(Hello("router")) + struct.pack(">I", 3) + b"\xc1\xc1\xc1",
        frame(Hello("router")) + frame(Welcome("r", 1, 1, 1, (), 1, 1, 1, 1, 1.0)),
        frame(Hello("router")) + struct.pack(">I", 5) + b"\x81\xa3a\xff\xfe",
        frame(Hello("router")) + struct.pack(">I", 100_000) + b"\x91" * 100_000,
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=[
        "no hello",
        "protocol",
        "hello twice",
        "id twice",
        "huge",
        "garbage",
        "wrong way",
        "no utf8",
        "deep",
        "http",
    ],
)
async def test_a_breach_of_protocol_cuts_that_connection_alone(folder: Path, sent: bytes) -> None:
    spec = spec_in(folder)
    async with serving(spec):
        good = await greeted(spec)
        bad = await Client.connect(spec.socket)
        bad.writer.write(sent)
        assert await bad.is_cut()
        bad.close()
        good.send(Generate("a", [5], SHORT))
        assert (await good.hear("a"))["a"][-1].finish_reason == "length"
        assert (await until_idle(good)).blocks_used == 0
        good.close()


async def test_frames_that_are_cut_off_or_changed_hurt_nobody_else(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes of a real conversation, cut anywhere and then gone, or with some of them changed."""
    spec = spec_in(folder)
    rng = random.Random(EFFORT)
    whole = (
        frame(Hello("router"))
        + frame(Generate("a", [5, 6], LONG))
        + frame(Limits("h", 8, 64, True))
        + frame(GetStats())
    )
    async with serving(spec):
        good = await greeted(spec)
        good.send(Generate("long", [7], LONG))
        for number in range(examples(40)):
            sent = bytearray(whole[: rng.randrange(len(whole))])
            for _ in range(rng.randrange(4) if number % 2 and sent else 0):
                sent[rng.randrange(len(sent))] = rng.randrange(256)
            bad = await Client.connect(spec.socket)
            bad.writer.write(bytes(sent))
            if number % 3:
                await bad.writer.drain()
                await asyncio.sleep(0.001)
            bad.writer.transport.abort()
        good.send(Generate("a", [5], SHORT))
        heard = await good.hear("a", "long")
        assert {deltas[-1].finish_reason for deltas in heard.values()} == {"length"}
        assert sum(len(delta.token_ids) for delta in heard["long"]) == LONG.max_tokens
        assert (await until_idle(good)).blocks_used == 0
        good.close()
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


async def test_a_request_that_cannot_even_be_taken_in_ends_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_in(folder)
    async with serving(spec):
        client = await greeted(spec)

        def broken(*_: object, **__: object) -> None:
            raise ZeroDivisionError

        with monkeypatch.context() as planted:
            planted.setattr(Request, "of", broken)
            client.send(Generate("bad", [5], SHORT))
            (refusal,) = (await client.hear("bad"))["bad"]
        assert (refusal.error_code, refusal.error) == (
            "internal_error",
            "the engine failed on this request: ZeroDivisionError",
        )
        client.send(Generate("good", [5], SHORT))
        assert (await client.hear("good"))["good"][-1].finish_reason == "length"
        client.close()


async def test_a_client_that_says_nothing_is_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HELLO_PATIENCE", 0.05)
    spec = spec_in(folder)
    async with serving(spec):
        client = await Client.connect(spec.socket)
        assert await client.is_cut()
        client.close()


async def test_a_client_that_does_not_read_is_cut_and_the_others_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "MAX_UNREAD", 20_000)
    spec = spec_in(folder)
    async with serving(spec):
        good, slow = await greeted(spec), await greeted(spec)
        slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
        wordy = Sampling(max_tokens=400, temperature=0.0, ignore_eos=True, logprobs=500)
        slow.send(*(Generate(f"{i}", [5, i], wordy) for i in range(3)))
        while not (stats := await until_idle(good)).steps:
            pass
        assert stats.generation_tokens < 1200, "cut before its requests had ended"
        assert stats.blocks_used == 0
        good.send(Generate("a", [5], SHORT))
        assert (await good.hear("a"))["a"][-1].finish_reason == "length"
        good.close()
        slow.close()


async def test_the_process_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_in(folder)
    async with serving(spec):
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        client = await Client.connect(spec.socket)
        client.send(Hello("router"))
        assert await client.is_cut()
        monkeypatch.undo()
        client.close()


# ── the socket ────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_socket_is_for_our_user_alone(folder: Path) -> None:
    spec = spec_in(folder)
    async with serving(spec):
        assert stat.S_IMODE(os.stat(spec.socket).st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        with pytest.raises(SocketTaken):
            prepare_socket(Path(spec.socket))


def test_a_folder_that_others_may_enter_is_refused(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    folder.chmod(0o750)
    with pytest.raises(InvalidSpec, match="mode 0700"):
        prepare_socket(folder / "engine.sock")


def test_a_socket_left_by_a_dead_process_is_replaced_and_a_file_is_not(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    path = folder / "engine.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    prepare_socket(path)
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(InvalidSpec, match="in the way"):
        prepare_socket(path)
    assert path.read_text() == "precious"


def test_a_trace_that_cannot_be_written_is_a_spec_that_cannot_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUIRE_SCHEDULE_TRACE", "/nonexistent/trace.jsonl")
    news: queue.SimpleQueue[object] = queue.SimpleQueue()
    Driver(spec_in(folder), news.put).start()
    died = news.get(timeout=20)
    assert isinstance(died, Died)
    assert isinstance(died.error, InvalidSpec)
    assert str(died.error) == "QUIRE_SCHEDULE_TRACE: /nonexistent/trace.jsonl: No such file or directory"


async def test_the_end_of_the_engine_ends_every_stream_with_an_error(folder: Path) -> None:
    spec = spec_in(folder)
    async with serving(spec):
        client = await greeted(spec)
        client.send(Generate("a", [5, 6], LONG), Generate("b", [7], LONG))
        client.send(Generate("c", [5, 6], LONG, patience=60.0))
        for _ in range(5):
            await client.next(Deltas)
        os.kill(os.getpid(), signal.SIGTERM)
        heard = await client.hear("a", "b", "c")
        for name in "abc":
            assert (heard[name][-1].finish_reason, heard[name][-1].error_code) == ("error", "engine_shutdown")
        assert heard["c"][-1].token_ids, "what has waited is told with the end"
        assert await client.is_cut()
        client.close()
        # the second signal, from the fixture, must find a process that is already ending
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


async def test_an_engine_that_cannot_go_on_says_so_and_ends_with_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_in(folder)
    reading, writing = os.pipe()
    server = Server(spec, Status(writing))
    task = asyncio.create_task(server.run())
    while not Path(spec.socket).exists():
        await asyncio.sleep(0.01)
    client = await greeted(spec)
    client.send(Generate("a", [5, 6], LONG))
    await client.next(Deltas)

    def broken(scheduler: Scheduler) -> None:
        raise InvariantBroken("planted")

    monkeypatch.setattr(Scheduler, "schedule", broken)
    last = (await client.hear("a"))["a"][-1]
    assert (last.finish_reason, last.error_code) == ("error", "engine_died")
    assert await asyncio.wait_for(task, 10) == 1
    assert server.stop_driver()
    event = msgspec.json.decode(os.read(reading, 65536).splitlines()[-1], type=EngineEvent)
    assert (event.event, event.reason, event.message, event.retryable) == (
        "failed",
        "InvariantBroken",
        "planted",
        True,
    )
    client.close()
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize(
    ("error", "reason", "retryable"),
    [
        (torch.OutOfMemoryError("needs 3 GiB"), "OutOfMemory", True),
        (MemoryError("needs 3 GiB"), "OutOfMemory", True),
        (OutOfMemory("memory ran out"), "OutOfMemory", True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "OutOfMemory", True),
        (RuntimeError("other"), "RuntimeError", True),
        (InvalidSpec("bad"), "InvalidSpec", False),
    ],
)
def test_why_an_engine_failed(error: BaseException, reason: str, retryable: bool) -> None:
    reading, writing = os.pipe()
    code = Status(writing).failed(error)
    event = msgspec.json.decode(os.read(reading, 65536), type=EngineEvent)
    os.close(reading)
    os.close(writing)
    assert (event.reason, event.retryable, code) == (reason, retryable, 1 if retryable else 78)


async def test_of_the_loading_events_the_log_has_the_first_and_the_last(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "PROGRESS_INTERVAL", 0.001)
    with caplog.at_level("INFO"):
        async with serving(spec_in(folder)):
            pass
    assert sum('"event":"loading"' in record.getMessage() for record in caplog.records) == 2


async def test_a_failed_request_is_in_the_log_with_its_trace(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = spec_in(folder)
    async with serving(spec):
        client = await greeted(spec)
        client.send(Generate("long", [5] * 600, SHORT, trace="00-0af7-b7ad-01"))
        await client.hear("long")
        client.close()
    assert any("long" in r.getMessage() and "00-0af7-b7ad-01" in r.getMessage() for r in caplog.records)
