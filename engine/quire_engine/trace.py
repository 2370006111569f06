"""What a scheduler was told and what it decided, as lines of JSON; and the same decided again.

    QUIRE_SCHEDULE_TRACE in a model's spec.env, or Engine.record, names the file that an engine records to
    python -m quire_engine.trace FILE decides it all again

A scheduler decides by nothing but its calls, so the calls are the whole trace: requests with their token ids,
aborts, deadlines, limits, and the tokens that steps drew. Replaying needs no model; a plan that comes out
otherwise is named, which is how a change of the scheduler, or a suspicion about it, is tried on what really
happened. Traces hold prompts and answers as token ids: they are written with mode 0600. A file that is there is
kept as FILE.1, be it of an engine that was killed, whose last line may be cut, or of one that still records, as
during a rollout.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from quire_engine.blocks import BlockPool
from quire_engine.config import BatchLimits
from quire_engine.errors import RequestRefused
from quire_engine.pooling import Pool
from quire_engine.request import Request, full_at
from quire_engine.scheduler import Scheduler
from quire_engine.step import Draw, StepPlan, StepResult
from quire_schemas.wire import Delta, Policy, Pooling, Sampling, TokenLogprobs

log = logging.getLogger(__name__)


class Limits(msgspec.Struct, tag=True):
    max_num_seqs: int
    max_num_batched_tokens: int
    chunked_prefill: bool
    policy: Policy
    max_waiting: int | None
    max_prefill_tokens: int | None = None

    @classmethod
    def of(cls, limits: BatchLimits) -> Limits:
        return cls(
            limits.max_num_seqs,
            limits.max_num_batched_tokens,
            limits.chunked_prefill,
            limits.policy,
            limits.max_waiting,
            limits.max_prefill_tokens,
        )

    def restored(self) -> BatchLimits:
        return BatchLimits(*msgspec.structs.astuple(self))


class Built(msgspec.Struct, tag=True):
    """The first line: what the scheduler was made with."""

    num_blocks: int
    block_size: int
    windows: list[int | None]
    max_model_len: int
    limits: Limits
    tickets: int = 0
    """Given out by a scheduler before it."""


class Added(msgspec.Struct, tag=True, omit_defaults=True):
    id: str
    token_ids: list[int]
    sampling: Sampling
    seed: int
    ending_ids: list[int]
    received_at: float
    priority: int = 0
    deadline: float | None = None
    root: bytes | None = None
    width: int = 0
    pooling: Pooling | None = None
    background: bool = False
    written: int = 0
    """Of its tokens the last ones, which another engine drew."""
    lent: bool = False
    adapter: int = 0

    @classmethod
    def of(cls, request: Request) -> Added:
        return cls(
            request.id,
            list(request.token_ids),
            request.draw.sampling,
            request.draw.seed,
            list(request.draw.ending_ids),
            request.received_at,
            request.priority,
            request.deadline,
            request.root,
            request.width,
            request.pool.pooling if request.pool is not None else None,
            request.background,
            request.num_output,
            request.lent,
            request.adapter,
        )

    def restored(self) -> Request:
        num_prompt = len(self.token_ids) - self.written
        draw = Draw(self.sampling, self.seed, num_prompt, tuple(self.ending_ids))
        return Request(
            id=self.id,
            token_ids=self.token_ids,
            num_prompt=num_prompt,
            draw=draw,
            ending_ids=frozenset(self.ending_ids),
            full_at=full_at(num_prompt, self.sampling),
            received_at=self.received_at,
            priority=self.priority,
            background=self.background,
            lent=self.lent,
            deadline=self.deadline,
            root=self.root,
            width=self.width,
            pool=None if self.pooling is None else Pool(self.pooling, num_prompt),
            adapter=self.adapter,
        )


class Aborted(msgspec.Struct, tag=True):
    id: str


class Extended(msgspec.Struct, tag=True):
    id: str
    token: int


class Forked(msgspec.Struct, tag=True):
    id: str
    child: str


class Expired(msgspec.Struct, tag=True):
    now: float


class Item(msgspec.Struct, array_like=True):
    """A `Scheduled` but for how it draws, which is the request's."""

    request_id: str
    ticket: int
    token_ids: tuple[int, ...]
    start: int
    tables: tuple[tuple[int, ...], ...]
    draws: bool


class Planned(msgspec.Struct, tag=True):
    step: int
    items: list[Item]
    preempted: list[str]
    copies: list[tuple[int, int]]

    @classmethod
    def of(cls, plan: StepPlan) -> Planned:
        items = [
            Item(i.request_id, i.ticket, i.token_ids, i.start, i.tables, i.draw is not None) for i in plan.items
        ]
        return cls(plan.step, items, list(plan.preempted), list(plan.copies))


class Committed(msgspec.Struct, tag=True, omit_defaults=True):
    """The result of the oldest plan whose result had not come."""

    tokens: dict[str, int]
    failures: dict[str, tuple[str, str]] = {}


_NO_STATE = bytes(4)
Line = Built | Limits | Added | Aborted | Extended | Forked | Expired | Planned | Committed


class RecordingScheduler(Scheduler):
    """A scheduler that writes its calls to a new file `path`; what is there becomes `path`.1. Raises OSError."""

    def __init__(
        self, pool: BlockPool, limits: BatchLimits, *, max_model_len: int, path: Path, tickets: int = 0
    ) -> None:
        super().__init__(pool, limits, max_model_len=max_model_len, tickets=tickets)
        self._path = path
        if path.is_file():  # another engine may still write to it: two traces in one file would be none
            path.replace(path.with_name(f"{path.name}.1"))
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._encoder = msgspec.json.Encoder()
        windows = list(pool.windows)
        self._write(Built(pool.num_blocks, pool.block_size, windows, max_model_len, Limits.of(limits), tickets))

    def add(self, request: Request) -> None:
        self._write(Added.of(request))
        super().add(request)

    def abort(self, request_id: str) -> bool:
        self._write(Aborted(request_id))
        return super().abort(request_id)

    def extend(self, name: str, token: int) -> None:
        self._write(Extended(name, token))
        super().extend(name, token)

    def fork(self, name: str, child: str) -> None:
        self._write(Forked(name, child))
        super().fork(name, child)

    def expire(self, now: float) -> list[Delta]:
        deltas = super().expire(now)
        if deltas:  # every step asks, and only this is a decision
            self._write(Expired(now))
        return deltas

    def set_limits(self, limits: BatchLimits) -> None:
        self._write(Limits.of(limits))
        super().set_limits(limits)

    def schedule(self) -> StepPlan:
        plan = super().schedule()
        self._write(Planned.of(plan))
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[Delta]:
        self._write(Committed(dict(result.tokens), dict(result.failures)))
        return super().commit(plan, result)

    def close(self) -> None:
        """Write no more."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, line: Line) -> None:
        if self._file is None:
            return
        try:
            left = memoryview(self._encoder.encode(line) + b"\n")
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:  # a full disk ends the trace and not the engine
            log.error("%s: the trace of the schedule ends here: %s", self._path, error)
            self.close()


class _Untold(dict[str, TokenLogprobs]):
    """What beams were told is not in a trace: what they were given then is."""

    def __missing__(self, name: str) -> TokenLogprobs:
        return TokenLogprobs(0, 0.0)


class Cut(ValueError):
    """The last line of a trace is not whole, which ends it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"line {number} is cut")


def replay(lines: Iterable[bytes]) -> Iterator[tuple[Planned, Planned]]:
    """Each plan as it was recorded, and as it is decided now; `lines` keep their ends.

    Raises `ValueError` for lines that are no trace; `Cut` where only the end of the last line is missing.
    """
    decoder = msgspec.json.Decoder(Line)
    scheduler: Scheduler | None = None
    given_out: list[StepPlan] = []
    for number, text in enumerate(lines, 1):
        try:
            line = decoder.decode(text)
        except msgspec.MsgspecError as error:
            if scheduler is not None and not text.endswith(b"\n"):
                raise Cut(number) from error
            raise ValueError(f"line {number}: {error}") from error
        if isinstance(line, Built):
            pool = BlockPool(line.num_blocks, line.block_size, line.windows)
            limits = line.limits.restored()
            scheduler = Scheduler(pool, limits, max_model_len=line.max_model_len, tickets=line.tickets)
            continue
        if scheduler is None:
            raise ValueError(f"line {number}: a trace begins with what its scheduler was built with")
        match line:
            case Added():
                try:
                    scheduler.add(line.restored())
                except RequestRefused:
                    continue  # as it was then: a refusal changes nothing
            case Aborted(id=name):
                scheduler.abort(name)
            case Extended(id=name, token=token):
                scheduler.extend(name, token)
            case Forked(id=name, child=child):
                scheduler.fork(name, child)
            case Expired(now=now):
                scheduler.expire(now)
            case Limits():
                scheduler.set_limits(line.restored())
            case Planned():
                plan = scheduler.schedule()
                if plan.items:
                    given_out.append(plan)
                yield line, Planned.of(plan)
            case Committed(tokens=tokens, failures=failures):
                if not given_out:
                    raise ValueError(f"line {number}: a result without a plan")
                plan = given_out.pop(0)
                # nothing is decided by what states are
                states = {item.request_id: _NO_STATE for item in plan.items if item.pooled}
                scheduler.commit(plan, StepResult(tokens, _Untold(), failures, states))
    if scheduler is None:
        raise ValueError("the file is empty")


def main(arguments: Sequence[str]) -> int:
    """Replay the trace named; 0 when every plan comes out as recorded, 1 at the first that does not."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m quire_engine.trace TRACE.jsonl\n")
        return 2
    plans, cut = 0, ""
    try:
        with Path(arguments[0]).open("rb") as lines:
            for recorded, decided in replay(lines):
                if recorded != decided:
                    sys.stdout.write(
                        f"step {recorded.step} differs\n  recorded {recorded}\n  decided  {decided}\n"
                    )
                    return 1
                plans += 1
    except Cut as error:
        cut = f"; {error}, and not replayed"
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {arguments[0]}: {error}\n    hint: name a file that an engine recorded\n")
        return 2
    sys.stdout.write(f"{plans} plans, each as recorded{cut}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
