"""Quire and transformers in turns, in one process, on the same requests.

First each way is tried for a moment, and the best of its kind is taken: of static batches by what a step of each
size takes, times the steps there would be; of continuous batching by all requests cut to a few tokens. Then rounds
follow: Quire, the peer, Quire again. A ratio is taken within a round; that of the two Quires is the noise. A way
that fails, does not fit or finds no time is a row that says so.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.device import Device, Readings, spread
from benchmarks.gpu.figures import REPEATS, seconds_of
from benchmarks.gpu.peers import CONTINUOUS, STATIC, Continuous, Peers, Took, by_output, static_tokens
from benchmarks.gpu.workloads import Pairs
from benchmarks.rounds import Against
from quire_schemas.sizing import kv_bytes_per_token

KINDS = ("sequential", "static", "continuous")
_TRIAL_TOKENS = 32
"""Of a static batch that is tried."""
_CUT = 96
"""Tokens of each answer when a configuration of continuous batching is tried."""
_ALONE = 12.0
"""Seconds of requests one after the other, each round."""
_TRIALS = 0.45
"""Of the time, for trying configurations."""
Way = Callable[[float], Took]
"""Does all requests, until then at the latest."""


class Rounds:
    """Quire beside one way after the other, until `limit` seconds have gone by."""

    def __init__(
        self,
        device: Device,
        name: str,
        readings: Readings,
        whole: Pairs,
        *,
        limit: float,
        kv_bytes: int,
        seqs: int,
    ) -> None:
        self._start = time.perf_counter()
        self.until = self._start + limit
        self._limit = limit
        self._device, self._readings, self._whole = device, readings, whole
        self.pairs = device.scale.pairs(whole)
        tokens = 16384 if name == "qwen3-0.6b" else 8192
        self._bench = Bench(device, name, seqs=seqs, tokens=tokens, length=2304, kv_bytes=kv_bytes)
        self.peers = Peers(device, self._bench.config, kv_bytes_per_token(self._bench.profile, device.dtype))
        seconds_of(self._bench, self.pairs)  # untimed, as the peers' first times are

    def close(self) -> None:
        self._bench.close()

    def rows(self, kinds: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """Of these kinds, in the order in which they are worth having."""
        of: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
            "sequential": self._sequential, "static": self._static, "continuous": self._continuous
        }  # fmt: skip
        for kind in kinds:
            yield from of[kind]()

    def _sequential(self) -> Iterator[dict[str, Any]]:
        def alone(until: float) -> Took:
            return self.peers.static(self.pairs, 1, min(until, time.perf_counter() + _ALONE))

        yield self._against("sequential", "one at a time", alone)

    def _static(self) -> Iterator[dict[str, Any]]:
        tried = yield from self._tried({}, "", self._trial_end())
        ordered = by_output(self.pairs)
        best = None
        for size in sorted(tried, key=tried.__getitem__):
            row = self._against("static", f"batches of {size}, by output", partial(self._batches, ordered, size))
            yield row
            if "error" not in row:
                best = size
                break
        if best is None:
            return
        yield self._against(
            "static", f"batches of {best}, in order", partial(self._batches, self.pairs, best), repeats=1
        )
        # last, for it compiles, and nobody knows how long
        kept = yield from self._tried({"cache_implementation": "static"}, ", static cache", self.until, (best,))
        if best in kept and kept[best] < tried[best]:
            way = partial(self._batches, ordered, best, cache_implementation="static")
            yield self._against("static", f"batches of {best}, by output, static cache", way)

    def _batches(self, pairs: Pairs, size: int, until: float, **options: Any) -> Took:
        return self.peers.static(pairs, size, until, **options)

    def _tried(
        self, options: dict[str, Any], name: str, until: float, sizes: tuple[int, ...] = STATIC
    ) -> Generator[dict[str, Any], None, dict[int, float]]:
        """Rows of trials; returns by size how long all would take."""
        ordered, found = by_output(self.pairs), dict[int, float]()
        for given in sizes:
            size = min(given, len(ordered))
            if size in found:
                continue
            row: dict[str, Any] = self._row("peer trial", "static", f"batches of {size}{name}")
            batch = ordered[len(ordered) - size :]
            try:
                if not all(self.peers.fits(ordered[at : at + size]) for at in range(0, len(ordered), size)):
                    raise MemoryError("keys and values of a batch do not fit")
                tokens = self._device.scale.at_most(_TRIAL_TOKENS, 3)
                step = self.peers.step_seconds(batch, tokens, until, **options)
                found[size] = step * static_tokens(ordered, size)
                row |= {"ms": round(step * 1000, 2), "seconds_expected": round(found[size], 1)}
            except Exception as error:  # noqa: BLE001 - of a peer, and the row says it
                row |= _failed(error)
            self._device.release()
            yield row
        return found

    def _continuous(self) -> Iterator[dict[str, Any]]:
        few = self._device.scale.at_most(_CUT, 2)
        cut = [(prompt, min(output, few)) for prompt, output in self.pairs]
        found: list[tuple[float, dict[str, Any]]] = []
        for options in CONTINUOUS[:2] if self._device.scale.small else CONTINUOUS:
            row = self._row("peer trial", "continuous", _spelled(options))
            try:
                if time.perf_counter() > self._trial_end():
                    raise TimeoutError("no time was left to try it")
                with self.peers.continuous(self.pairs, options) as running:
                    took = running.run(cut, self._trial_end())
                    row |= {"tokens_per_second": round(took.rate, 1), "attention": self.peers.attention}
                if took.finished:
                    found.append((took.rate, options))
                else:
                    row["unfinished"] = True
            except Exception as error:  # noqa: BLE001 - of a peer, and the row says it
                row |= _failed(error)
            self._device.release()
            yield row
        for _, options in sorted(found, key=lambda pair: -pair[0]):
            with contextlib.ExitStack() as stack:
                entered: list[Continuous] = []

                def way(
                    until: float,
                    stack: contextlib.ExitStack = stack,
                    entered: list[Continuous] = entered,
                    options: dict[str, Any] = options,
                ) -> Took:
                    if not entered:
                        entered.append(stack.enter_context(self.peers.continuous(self.pairs, options)))
                        entered[0].run(cut, until)  # untimed
                    return entered[0].run(self.pairs, until)

                row = self._against("continuous", _spelled(options), way)
            self._device.release()
            yield row
            if "error" not in row:
                return

    def _trial_end(self) -> float:
        return self._start + _TRIALS * self._limit

    def _against(self, kind: str, peer: str, way: Way, repeats: int = REPEATS) -> dict[str, Any]:
        """Rounds, as many as there is time for, but one; none if there is none left at all."""
        row = self._row("against", kind, peer)
        began = time.perf_counter()
        ours, again, theirs = list[float](), list[float](), list[Took]()
        asked = sum(output for _, output in self.pairs)
        try:
            for _ in range(repeats):
                then = time.perf_counter()
                if then + (then - began if theirs else 0) / max(len(theirs), 1) > self.until:
                    break
                first = seconds_of(self._bench, self.pairs)
                took = way(self.until)
                theirs.append(took)
                ours.append(first)
                again.append(seconds_of(self._bench, self.pairs))
                if not took.finished and kind != "sequential":
                    break
            if not theirs:
                raise TimeoutError("no time was left for it")
            if not all(took.tokens for took in theirs):
                raise TimeoutError("it finished nothing within its time")
        except Exception as error:  # noqa: BLE001 - of a peer, and the row says it
            return row | _failed(error)
        # of a token that was asked for: a way that was stopped did not do all
        each = [took.seconds / took.tokens for took in theirs]
        compared = Against.of(each, [one / asked for one in ours], [one / asked for one in again])
        return row | {
            "requests": len(self.pairs),
            "output_tokens": asked,
            "repeats": len(theirs),
            "finished": all(took.finished for took in theirs),
            **spread("tokens_per_second", [took.rate for took in theirs]),
            **spread("quire_tokens_per_second", [asked / one for one in (*ours, *again)]),
            **compared.row("quire"),
            "attention": self.peers.attention,
            **self._readings.since(began),
            **self._device.scale.stands_for(requests=len(self._whole)),
        }

    def _row(self, part: str, kind: str, peer: str) -> dict[str, Any]:
        return {
            "part": part, "model": self._bench.name, "kind": kind, "peer": peer, "transformers": self.peers.version
        }  # fmt: skip


def _spelled(options: dict[str, Any]) -> str:
    return "generate_batch, " + (", ".join(f"{name} {value}" for name, value in options.items()) or "its defaults")


def _failed(error: Exception) -> dict[str, Any]:
    return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
