"""Which replica takes a request, and what that is worth: by prefixes, against ways that know nothing of them.

    virtual   the router's own rule, memory and arithmetic (`quire.router.balancer`) on hundreds of replicas that
              are formulas, in virtual time
    real      the real router before engines that follow a script, with caches of their own; round robin is a
              model for each replica, which the client takes in turns

**A replica as a formula** (`Replica`). It reads one prompt at a time, `prefill_rate` tokens a second less those
in its cache, and writes for all others meanwhile: a token each in `step_ms` and `per_sequence_ms` for each, and in
the time of `budget` prompt tokens more while a prompt is read. Nothing happens between two events but this, so
time goes from event to event. Its cache forgets what was not used for longest.

**The traffic.** Conversations come by chance; a turn's prompt is all that was said before and what is new; each
begins with one of a few system prompts, some of them far more popular than others. It is drawn before, so that
every policy gets the same requests at the same moments.

**A trace of one's own** (`--trace FILE`): a CSV with the header `arrived_at,num_prefill_tokens,num_decode_tokens`,
in seconds from its beginning, in order. Its arrivals are compressed until they are `--rate` a second for each
replica; its lengths stay. Such files do not tell which requests belong together: a request goes on with an earlier
conversation when its prompt has room for all of that, as often as `--linked` says.

    by-prefix    the rule of the router
    least        the same rule without what is cached: the least outstanding tokens
    round-robin  one after the other
    random       any
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import heapq
import itertools
import math
import random
import statistics
import tempfile
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from benchmarks import service
from benchmarks.client import pieces, request
from benchmarks.rounds import in_turns
from benchmarks.rows import NO_KERNELS, RESULTS, Row, provenance, write
from benchmarks.workload import Lengths
from quire import builtin
from quire.router.balancer import PREFIX_BLOCK, Burden, Candidate, Prefixes, choose, prefix_chain
from quire_schemas import wire

POLICIES: Final = ("by-prefix", "least", "round-robin", "random")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="*", choices=["virtual", "real"], default=["virtual", "real"])
    parser.add_argument("--replicas", type=int, nargs="*", default=[4, 16, 64, 400])
    parser.add_argument("--requests", type=int, default=400, help="for each replica")
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second for each replica")
    parser.add_argument("--trace", type=Path, help="arrivals and lengths from a file")
    parser.add_argument("--linked", type=float, default=0.7, help="share of a trace's requests that go on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--conversations", type=int, default=60, help="of the real part")
    parser.add_argument("--rounds", type=int, default=2, help="of the real part")
    parser.add_argument("--out", type=Path, default=RESULTS / "balancer.jsonl")


def run(args: argparse.Namespace) -> None:
    common = provenance(NO_KERNELS) | {"benchmark": "balancer", "seed": args.seed}
    rows: list[Row] = []

    def note(row: Row) -> None:
        rows.append(common | row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)

    if "virtual" in args.parts:
        for count in args.replicas:
            for row in _virtual(count, args):
                note(row)
    if "real" in args.parts:
        for row in _real(args):
            note(row)
    write(args.out, rows)


# ── traffic ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a trace. Its prompt is runs of ids, each by its first one and its length; nobody else has the
    ids of `answer`."""

    at: float
    prompt: tuple[tuple[int, int], ...]
    answer: tuple[int, int]

    def ids(self, *, whole: bool = False) -> array[int]:
        """The prompt's ids; with `whole` those of the answer behind them."""
        ids: array[int] = array("q")
        for first, count in (*self.prompt, *((self.answer,) if whole else ())):
            ids.extend(range(first, first + count))
        return ids


@dataclass(frozen=True, slots=True)
class Traffic:
    """Conversations by chance."""

    systems: int = 32
    """System prompts; the n-th is asked for 1/n as often as the first."""
    system: Lengths = field(default_factory=lambda: Lengths(mean=600, sigma=0.5, low=100, high=2000))
    said: Lengths = field(default_factory=lambda: Lengths(mean=120, high=1500))
    answer: Lengths = field(default_factory=lambda: Lengths(mean=200, high=1000))
    turns: float = 5.0
    """On average, at least one."""
    pause: float = 15.0
    """Seconds on average from an answer to the next turn; an answer takes 20 ms a token until then."""

    def trace(self, requests: int, rate: float, seed: int) -> list[Asked]:
        """So many requests, `rate` a second, in the order of their arrival."""
        rng = random.Random(seed)
        unused = itertools.count(1 << 20, 1 << 12)  # the next run of ids nobody has; none is longer
        prompts = [((next(unused), self.system.draw(rng)),) for _ in range(self.systems)]
        weights = [1 / place for place in range(1, self.systems + 1)]
        made: list[Asked] = []
        began = 0.0
        while len(made) < requests:
            began += rng.expovariate(rate / self.turns)
            at = began
            prompt: tuple[tuple[int, int], ...] = rng.choices(prompts, weights)[0]
            while True:
                prompt = (*prompt, (next(unused), self.said.draw(rng)))
                answer = (next(unused), self.answer.draw(rng))
                made.append(Asked(at, prompt, answer))
                if rng.random() < 1 / self.turns:
                    break
                prompt = (*prompt, answer)
                at += 0.02 * answer[1] + rng.expovariate(1 / self.pause)
        # Conversations begin evenly, but few turns have come in the first minutes: what counts is behind them.
        made.sort(key=lambda each: each.at)
        return made[:requests]


def read_trace(path: Path, requests: int, rate: float, linked: float, seed: int) -> list[Asked]:
    """The first `requests` of a file, `rate` a second on average. Raises `ValueError` for one that is no trace."""
    rng = random.Random(seed)
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        wanted = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")
        if not set(wanted) <= set(reader.fieldnames or ()):
            raise ValueError(f"{path}: the first line must name the columns {', '.join(wanted)}")
        lines = [tuple(float(line[name]) for name in wanted) for line in itertools.islice(reader, requests)]
    if len(lines) < 2 or lines[-1][0] <= lines[0][0]:
        raise ValueError(f"{path}: two requests or more, at different moments")
    pace = (len(lines) - 1) / (lines[-1][0] - lines[0][0]) / rate
    unused = itertools.count(1 << 20, 1 << 20)
    open_ones: deque[tuple[tuple[int, int], ...]] = deque(maxlen=256)
    made: list[Asked] = []
    for at, prefill, decode in lines:
        size, fits = max(int(prefill), 1), None
        if rng.random() < linked:
            lengths = [(sum(count for _, count in said), place) for place, said in enumerate(open_ones)]
            fits = max((each for each in lengths if each[0] < size), default=None)
        prompt: tuple[tuple[int, int], ...] = ()
        if fits is not None:
            prompt = open_ones[fits[1]]
            del open_ones[fits[1]]
            size -= fits[0]
        prompt = (*prompt, (next(unused), size))
        answer = (next(unused), max(int(decode), 1))
        open_ones.append((*prompt, answer))
        made.append(Asked((at - lines[0][0]) * pace, prompt, answer))
    return made


# ── replicas as formulas ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Speeds:
    """Of every replica: about those of a model of 8 billion parameters on one large GPU."""

    prefill_rate: float = 20_000.0
    step_ms: float = 10.0
    per_sequence_ms: float = 0.1
    budget: int = 2048
    seats: int = 64
    queue: int = 4096
    kv_tokens: int = 200_000


@dataclass(slots=True, eq=False)
class Placed:
    """A request on a replica, as the replica has it and as the router sees it."""

    asked: Asked
    prompt_tokens: int
    chain: tuple[bytes, ...]
    unknown: int = 0
    """Prompt tokens that the router expects to be computed."""
    generated: int = 0
    cached: int = 0
    first_at: float = math.inf
    begins: float = 0.0
    """The count of tokens, of those who began with the replica, at its first one."""


class Replica:
    """One replica from event to event; `due` is the moment of its next one."""

    def __init__(self, name: str, speeds: Speeds) -> None:
        self.name = name
        self.due = math.inf
        self.burden = Burden()
        blocks = speeds.kv_tokens // PREFIX_BLOCK
        self.remembered = Prefixes(blocks)
        """What the router believes."""
        self.served = 0
        self._speeds = speeds
        self._cache = Prefixes(blocks)
        self._waiting: deque[Placed] = deque()
        self._reading: Placed | None = None
        self._read_at = math.inf
        self._writing: list[tuple[float, int, Placed]] = []
        self._count, self._at = 0.0, 0.0
        self._order = itertools.count()

    def candidate(self, chain: Sequence[bytes]) -> Candidate:
        """As `EngineClient.candidate` makes it."""
        return Candidate(
            self.name,
            True,
            self.burden.tokens,
            self.burden.width,
            self.served,
            self._speeds.seats + self._speeds.queue,
            self.remembered.known(chain),
        )

    def give(self, placed: Placed, now: float) -> None:
        self._advance(now)
        self.served += 1
        self.burden.add(placed.unknown, placed.asked.answer[1], 1)
        self._waiting.append(placed)
        self._begin(now)

    def step(self, now: float) -> Iterator[Placed]:
        """What is due: gives those that have ended."""
        self._advance(now)
        if self._reading is not None and self._read_at <= now:
            placed, self._reading, self._read_at = self._reading, None, math.inf
            placed.first_at = now
            placed.begins = self._count
            self._cache.add(placed.chain)
            heapq.heappush(self._writing, (self._count + placed.asked.answer[1] - 1, next(self._order), placed))
        while self._writing and self._writing[0][0] <= self._count + 1e-6:
            _, _, placed = heapq.heappop(self._writing)
            self._told(placed, placed.asked.answer[1])
            self.burden.end(placed.unknown, placed.asked.answer[1], placed.generated, 1)
            self._cache.add(prefix_chain(placed.asked.ids(whole=True), ""))
            yield placed
        self._begin(now)

    def _told(self, placed: Placed, generated: int) -> None:
        if generated > placed.generated:
            self.burden.gain(placed.unknown, placed.asked.answer[1], placed.generated, generated)
            placed.generated = generated

    def _begin(self, now: float) -> None:
        if self._reading is None and self._waiting and len(self._writing) < self._speeds.seats:
            placed = self._reading = self._waiting.popleft()
            placed.cached = self._cache.known(placed.chain)
            self._read_at = now + (placed.prompt_tokens - placed.cached) / self._speeds.prefill_rate
        for _, _, placed in self._writing:  # what its deltas would have told
            self._told(placed, min(1 + int(self._count - placed.begins), placed.asked.answer[1]))
        ends = math.inf
        if self._writing:
            ends = now + max(self._writing[0][0] - self._count, 0.0) / self._pace()
        self.due = min(self._read_at, ends)

    def _pace(self) -> float:
        """Tokens a second of each that writes."""
        speeds = self._speeds
        seconds = (speeds.step_ms + speeds.per_sequence_ms * len(self._writing)) / 1000
        if self._reading is not None:
            seconds += speeds.budget / speeds.prefill_rate
        return 1 / seconds

    def _advance(self, now: float) -> None:
        if self._writing:
            self._count += (now - self._at) * self._pace()
        self._at = now


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one policy. Times are in seconds; `decisions` are processor time, the prompt's hashes included."""

    hit_rate: float
    ttft: list[float]
    decisions: list[float]


def simulate(
    trace: Sequence[Asked], count: int, policy: str, speeds: Speeds, seed: int, warm: float = 0.2
) -> Outcome:
    """All of `trace` on `count` replicas. The first share `warm` of it does not count: caches are empty then."""
    rng = random.Random(seed)
    replicas = {f"{number:03}": Replica(f"{number:03}", speeds) for number in range(count)}
    names = list(replicas)
    turns = itertools.cycle(names)
    events: list[tuple[float, str]] = []
    counted: list[Placed] = []
    decisions: list[float] = []

    def happen(until: float) -> None:
        while events and events[0][0] <= until:
            at, name = heapq.heappop(events)
            replica = replicas[name]
            if replica.due <= at:
                deque(replica.step(at), maxlen=0)
                if replica.due < math.inf:
                    heapq.heappush(events, (replica.due, name))

    for number, asked in enumerate(trace):
        happen(asked.at)
        ids = asked.ids()
        began = time.thread_time()
        if policy in ("by-prefix", "least"):
            chain = prefix_chain(ids, "") if policy == "by-prefix" else ()
            name = choose(replica.candidate(chain) for replica in replicas.values())
        else:
            chain = ()
            name = next(turns) if policy == "round-robin" else rng.choice(names)
        if name is None:
            raise RuntimeError("no replica has a place: lower --rate")
        replica = replicas[name]
        known = replica.remembered.known(chain)
        replica.remembered.add(chain)
        decisions.append(time.thread_time() - began)
        placed = Placed(asked, len(ids), chain or prefix_chain(ids, ""), len(ids) - known)
        replica.give(placed, asked.at)
        heapq.heappush(events, (replica.due, name))
        if number >= warm * len(trace):
            counted.append(placed)
    happen(math.inf)
    late = [placed for placed in counted if placed.first_at == math.inf]
    if late:
        raise RuntimeError(f"{len(late)} requests were never read")
    return Outcome(
        sum(placed.cached for placed in counted) / sum(placed.prompt_tokens for placed in counted),
        sorted(placed.first_at - placed.asked.at for placed in counted),
        sorted(decisions),
    )


def _virtual(count: int, args: argparse.Namespace) -> Iterator[Row]:
    """A row for each policy; that of another seed beside it is the noise."""
    speeds = Speeds()
    requests, rate = args.requests * count, args.rate * count
    for policy in POLICIES:
        found: list[Outcome] = []
        for seed in (args.seed, args.seed + 1):
            if args.trace is not None:
                trace = read_trace(args.trace, requests, rate, args.linked, seed)
            else:
                trace = Traffic().trace(requests, rate, seed)
            found.append(simulate(trace, count, policy, speeds, seed))
        one, again = found
        yield {
            "part": "virtual", "replicas": count, "policy": policy, "requests": len(trace), "rate": args.rate,
            "trace": args.trace.name if args.trace is not None else "conversations",
            "hit_rate": round(one.hit_rate, 4), "hit_rate_again": round(again.hit_rate, 4),
            **_spread("ttft", one.ttft, 1000, "ms"),
            "ttft_p50_ms_again": round(1000 * at(again.ttft, 0.5), 2),
            **_spread("decision", one.decisions, 1e6, "us"),
        }  # fmt: skip


def at(ordered: Sequence[float], part: float) -> float:
    return ordered[math.ceil(part * len(ordered)) - 1]


def _spread(name: str, ordered: Sequence[float], scale: float, unit: str) -> Row:
    return {f"{name}_p{percent}_{unit}": round(scale * at(ordered, percent / 100), 2) for percent in (50, 90, 99)}


# ── the real thing ────────────────────────────────────────────────────────────────────────────────────────

ENGINES: Final = 4
STEP_SECONDS: Final = 0.005
BUDGET: Final = 128
"""Prompt tokens of a step: with the step's time what makes a prompt take time that no model needs."""
_TALKERS: Final = 12


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details


class _Choice(msgspec.Struct):
    text: str = ""


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None


@dataclass(frozen=True, slots=True)
class Pass:
    """One way of placing over all conversations."""

    prompt_tokens: int
    cached_tokens: int
    ttft: list[float]

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Turn:
    """What is new in a turn, and what is answered, as ids."""

    said: tuple[int, ...]
    answer: tuple[int, ...]


def conversations(count: int, vocab_size: int, seed: int) -> list[list[Turn]]:
    """Each of two to six turns; the first one has one of four system prompts at its head."""
    rng = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(32, vocab_size) for _ in range(length))

    systems = [ids(320) for _ in range(4)]
    said, answer = Lengths(mean=64, low=16, high=160), Lengths(mean=24, low=8, high=64)
    made = []
    for _ in range(count):
        turns = [Turn(ids(said.draw(rng)), ids(answer.draw(rng))) for _ in range(rng.randint(2, 6))]
        made.append([Turn(rng.choice(systems) + turns[0].said, turns[0].answer), *turns[1:]])
    return made


async def _ask(
    port: int, model: str, prompt: Sequence[int], answer: Sequence[int], salt: str
) -> tuple[float, _Usage]:
    """Seconds to the first piece, and what was counted. Raises if the answer is not whole."""
    body = {
        "model": model, "prompt": prompt, "script": answer, "max_tokens": len(answer), "ignore_eos": True,
        "cache_salt": salt, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    sent = time.perf_counter()
    reader, writer = await request(port, "POST", "/v1/completions", msgspec.json.encode(body))
    first, usage, rest = 0.0, None, b""
    async for part in pieces(reader):
        *events, rest = (rest + part).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: {"):
                first = first or time.perf_counter() - sent
                usage = msgspec.json.decode(event[6:], type=_Event).usage or usage
    writer.close()
    if usage is None or usage.completion_tokens != len(answer):
        raise RuntimeError(f"an answer of {len(answer)} tokens is not whole: {usage}")
    return first, usage


async def talk(port: int, models: Sequence[str], talks: Sequence[Sequence[Turn]], salt: str) -> Pass:
    """All conversations, some at a time, their turns one after the other; `models` are taken in turns."""
    names, places = itertools.cycle(models), asyncio.Semaphore(_TALKERS)
    ttft: list[float] = []
    used: list[_Usage] = []

    async def one(turns: Sequence[Turn]) -> None:
        async with places:
            prompt: tuple[int, ...] = ()
            for turn in turns:
                prompt += turn.said
                first, usage = await _ask(port, next(names), prompt, turn.answer, salt)
                ttft.append(first)
                used.append(usage)
                prompt += turn.answer

    await asyncio.gather(*(one(turns) for turns in talks))
    return Pass(
        sum(usage.prompt_tokens for usage in used),
        sum(usage.prompt_tokens_details.cached_tokens for usage in used),
        sorted(ttft),
    )


def _real(args: argparse.Namespace) -> Iterator[Row]:
    tiny = builtin.path("tiny")
    from benchmarks.quire_systems import engine_spec
    from quire_schemas.checkpoint import read_profile

    vocab_size = read_profile(tiny).vocab_size
    spec = msgspec.structs.replace(
        engine_spec(tiny, "float32", threads=1, max_num_seqs=32, max_num_batched_tokens=BUDGET, max_model_len=2048,
                    prefix_caching=True),
        runner="scripted", step_time=STEP_SECONDS,
    )  # fmt: skip
    talks = conversations(args.conversations, vocab_size, args.seed)
    passes = itertools.count()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qb")))
        endpoints = [
            stack.enter_context(service.engine(folder, spec, f"r{number}"))[0] for number in range(ENGINES)
        ]
        plain = msgspec.structs.replace(service.route(spec, endpoints[0]), scripted=True)
        every = tuple(endpoints)
        routes: Mapping[str, tuple[wire.ModelRoute, ...]] = {
            "by-prefix": (msgspec.structs.replace(plain, replicas=every, prefix_caching=True),),
            "least": (msgspec.structs.replace(plain, replicas=every),),
            "round-robin": tuple(
                msgspec.structs.replace(plain, model=f"{plain.model}-{number}", names=(f"{plain.model}-{number}",),
                                        replicas=(endpoint,))
                for number, endpoint in enumerate(endpoints)
            ),
        }  # fmt: skip
        measures: dict[str, Callable[[], Pass]] = {}
        for name, table in routes.items():
            router = stack.enter_context(service.router(folder, name, {}))
            asyncio.run(service.connect(folder, name, *table))
            models = [route.model for route in table]

            def measure(port: int, models: Sequence[str]) -> Pass:
                return asyncio.run(talk(port, models, talks, f"pass {next(passes)}"))  # an empty cache each

            measures[name] = partial(measure, router.port, models)
            if name == "by-prefix":
                measures["again"] = measures[name]
        found = in_turns(measures, args.rounds, lambda each: f"{each.hit_rate:.3f}")
    for name, each in found.items():
        ttft = sorted(seconds for one in each for seconds in one.ttft)
        yield {
            "part": "real", "replicas": ENGINES, "policy": name, "conversations": len(talks),
            "rounds": args.rounds, "requests": len(each[0].ttft), "prompt_tokens": each[0].prompt_tokens,
            "hit_rate": round(statistics.median(one.hit_rate for one in each), 4),
            **_spread("ttft", ttft, 1000, "ms"),
        }  # fmt: skip


__all__ = ["Replica", "Speeds", "Traffic", "arguments", "read_trace", "run", "simulate"]
