"""An engine that computes nothing: tests of what stands around an engine run it as `python -m quire_engine`.

It speaks the real protocol (`wire`), reports the real events, and misbehaves on demand, by environment variables
that a manifest sets in `spec.env`:

    STANDIN_LOAD       seconds until it is ready (0)
    STANDIN_STEP       seconds between two tokens (0.01)
    STANDIN_FIRST      seconds until the first token, besides (0)
    STANDIN_RUSH       a file; once it is there, tokens come without a pause
    STANDIN_FAIL       if not 0: of so many requests one fails before its first token
    STANDIN_EXIT       exit status that it ends with instead of becoming ready
    STANDIN_REASON     reason of the `failed` event before that (StandinRefuses); "none": no event
    STANDIN_SIGNAL     number of the signal that it sends itself instead of becoming ready
    STANDIN_REPEAT     if set: reports the same progress for ever instead of becoming ready
    STANDIN_LACKING    what keeps the native kernels from being used
    STANDIN_SAY        text for stderr at the start
    STANDIN_CHATTY     if set: writes a line to its log every 10 ms
    STANDIN_CHILD      if set: starts a grandchild in a session of its own that ignores SIGTERM

Every request is answered with `max_tokens` tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from quire_schemas import wire


class Engine:
    def __init__(self, spec: wire.EngineSpec, status_fd: int) -> None:
        self.spec = spec
        self.status_fd = status_fd
        self.hot_hash = spec.hot_hash
        self.running: dict[str, asyncio.Task[None]] = {}
        self.steps = 0
        self.asked = 0
        self.ended = asyncio.Event()

    def say(self, event: wire.EngineEvent) -> None:
        os.write(self.status_fd, msgspec.json.encode(event) + b"\n")

    async def run(self) -> int:
        self.say(wire.EngineEvent("starting", time.time()))
        if os.environ.get("STANDIN_CHILD"):
            stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
            subprocess.Popen([sys.executable, "-c", stubborn], start_new_session=True)
        total = 1000
        load = float(os.environ.get("STANDIN_LOAD", "0"))
        for part in range(5):
            self.say(wire.EngineEvent("loading", time.time(), bytes_done=total * part // 4, bytes_total=total))
            await asyncio.sleep(load / 5)
        while os.environ.get("STANDIN_REPEAT"):
            self.say(wire.EngineEvent("loading", time.time(), bytes_done=total, bytes_total=total))
            await asyncio.sleep(0.1)
        if number := os.environ.get("STANDIN_SIGNAL"):
            os.kill(os.getpid(), int(number))
        if code := os.environ.get("STANDIN_EXIT"):
            reason = os.environ.get("STANDIN_REASON", "StandinRefuses")
            if reason != "none":
                retryable = code != "78"
                event = wire.EngineEvent(
                    "failed", time.time(), reason=reason, message="told to", retryable=retryable
                )
                self.say(event)
            return int(code)
        mask = os.umask(0o177)
        server = await asyncio.start_unix_server(self.serve, self.spec.socket)
        os.umask(mask)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.ended.set)
        lacking = os.environ.get("STANDIN_LACKING", "")
        backend = "reference" if lacking else "cpu"
        self.say(
            wire.EngineEvent("ready", time.time(), load_seconds=load, backend=backend, backend_lacking=lacking)
        )
        while os.environ.get("STANDIN_CHATTY") and not self.ended.is_set():
            print("x" * 99, flush=True)
            await asyncio.sleep(0.01)
        await self.ended.wait()
        server.close()
        os.unlink(self.spec.socket)
        return 0

    def stats(self) -> wire.Stats:
        return wire.Stats(
            steps=self.steps,
            max_num_seqs=self.spec.max_num_seqs,
            last_step_at=time.monotonic(),
            running=len(self.running),
            waiting=0,
            blocks_total=self.spec.num_blocks,
            blocks_used=0,
            kv_slots_used=0,
            preemptions=0,
            prompt_tokens=0,
            generation_tokens=0,
            hot_hash=self.hot_hash,
        )

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames: wire.Reader[wire.ToEngine] = wire.Reader(reader, wire.ToEngine)
        beat = asyncio.create_task(self.beat(writer))
        with contextlib.suppress(OSError, EOFError, wire.WireError):
            while (message := await frames.read()) is not None:
                match message:
                    case wire.Hello():
                        writer.write(wire.frame(self.welcome()))
                        writer.write(wire.frame(self.stats()))
                    case wire.Generate():
                        task = asyncio.create_task(self.generate(message, writer))
                        self.running[message.id] = task
                    case wire.Abort():
                        if message.id in self.running:
                            self.running.pop(message.id).cancel()
                    case wire.GetStats():
                        writer.write(wire.frame(self.stats()))
                    case wire.Limits():
                        self.hot_hash = message.hot_hash
                        writer.write(wire.frame(self.stats()))
        beat.cancel()
        writer.close()

    async def beat(self, writer: asyncio.StreamWriter) -> None:
        while True:
            await asyncio.sleep(0.25)
            writer.write(wire.frame(self.stats()))

    def welcome(self) -> wire.Welcome:
        return wire.Welcome(
            replica_id=self.spec.replica_id,
            incarnation=self.spec.incarnation,
            protocol=wire.PROTOCOL,
            vocab_size=1000,
            eos_token_ids=(0,),
            max_model_len=self.spec.max_model_len,
            block_size=self.spec.block_size,
            num_blocks=self.spec.num_blocks,
            max_num_seqs=self.spec.max_num_seqs,
            lease=self.spec.adoption_window,
        )

    async def generate(self, request: wire.Generate, writer: asyncio.StreamWriter) -> None:
        pause = float(os.environ.get("STANDIN_STEP", "0.01"))
        count = request.sampling.max_tokens
        await asyncio.sleep(float(os.environ.get("STANDIN_FIRST", "0")))
        self.asked += 1
        often = int(os.environ.get("STANDIN_FAIL", "0"))
        if often and self.asked % often == 0:
            failed = wire.Delta(request.id, finish_reason="error", error_code="internal_error", error="told to")
            writer.write(wire.frame(wire.Deltas(self.steps, [failed])))
            self.running.pop(request.id, None)
            return
        rush = os.environ.get("STANDIN_RUSH", "")
        for number in range(count):
            await asyncio.sleep(0 if rush and os.path.exists(rush) else pause)
            self.steps += 1
            last = number == count - 1
            delta = wire.Delta(request.id, (65 + number % 26,), finish_reason="length" if last else None)
            if last:
                delta.timings = wire.Timings(received_at=time.monotonic())
            writer.write(wire.frame(wire.Deltas(self.steps, [delta])))
        self.running.pop(request.id, None)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("--status-fd", type=int, required=True)
    given = parser.parse_args()
    spec = msgspec.json.decode(given.spec.read_bytes(), type=wire.EngineSpec)
    print(f"stand-in for {spec.replica_id}, incarnation {spec.incarnation}", flush=True)
    print(os.environ.get("STANDIN_SAY", ""), file=sys.stderr, flush=True)
    return asyncio.run(Engine(spec, given.status_fd).run())


if __name__ == "__main__":
    sys.exit(main())
