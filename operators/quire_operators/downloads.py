"""Downloads in progress: which parts of which commits models need, who fetches them, and what is told of it.

Level-based like everything here. Each pass over a model says what it needs (`demand`); a part that somebody
needs and that is not whole on disk has one task, which runs `fetch` in a worker process. After a failure it is
tried again when the reason of the failure allows it. A part that nobody needs any more has its worker killed.
Nothing of this is stored: after a restart of the control plane the same demands come again, and a fetch goes on
from what lies on disk.

    reason of a failure                        next try
    HubUnreachable, FetchFailed                after 1 s, doubling to 5 min, with jitter
    Unauthorized, NotFound, SecretNotFound     after 5 min: a person has to act, perhaps elsewhere
    DiskFull                                   after 1 min
    ChecksumMismatch, a checkpoint's own fault not before a new intent asks for it
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec

from quire_operators.cache import HubCache, Need
from quire_operators.fleet import worker
from quire_operators.secrets import SecretNotFound, Secrets
from quire_operators.sources import SourceError
from quire_schemas.hub import FetchEvent, FetchJob, Part
from quire_schemas.resource import Key

log = logging.getLogger(__name__)

AT_ONCE = 3
"""Downloads that run at the same time; each has several connections."""
BACKOFF_BASE, BACKOFF_MAX, JITTER = 1.0, 300.0, 0.2
RECHECK = {"Unauthorized": 300.0, "NotFound": 300.0, "SecretNotFound": 300.0, "DiskFull": 60.0}
"""Seconds after which a failure that a person has to mend is looked at again."""
RETRIED = ("HubUnreachable", "FetchFailed")
LOOK_SECONDS = 45.0
LOOKS_AT_ONCE = 4
"""Each is a process of its own."""
RATE_SECONDS = 5.0
_events = msgspec.json.Decoder(FetchEvent)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the last try ended. `retry_at` is unix seconds, None when only a new intent brings another try."""

    reason: str
    message: str
    hint: str
    retry_at: float | None

    @property
    def stuck(self) -> bool:
        """Whether a person has to do something."""
        return self.reason not in RETRIED


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a fetch stands. Bytes; `rate` is bytes a second over the last seconds; 0 when none is known."""

    done: int
    total: int
    rate: float = 0.0
    failure: Failure | None = None
    retry_at: float | None = None
    """When what failed is due to be tried again; None while it is, or when it is not to be."""


@dataclass(slots=True)
class _Fetch:
    """One part that somebody needs. `for_` are the models, with the generation that asked for it, `auths` how they
    say that it is to be had."""

    need: Need
    for_: dict[Key, int] = field(default_factory=dict)
    auths: dict[Key, Mapping[str, Any] | None] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None
    failure: Failure | None = None
    tries: int = 0
    samples: list[tuple[float, int]] = field(default_factory=list)
    total: int = 0


class Downloads:
    """The fetches of one control plane. `changed` is told of models whose fetch moved; `clock` is unix seconds."""

    def __init__(
        self,
        cache: HubCache,
        secrets: Secrets,
        environ: Mapping[str, str],
        changed: Callable[[Key], None],
        clock: Callable[[], float],
        rng: random.Random | None = None,
    ) -> None:
        self.cache = cache
        self._secrets = secrets
        self._environ = {
            **environ,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }
        self._changed = changed
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 - jitter, not a secret
        self._fetches: dict[Need, _Fetch] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        """Fetches that nobody needs any more, until their workers are gone."""
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._looks = asyncio.Semaphore(LOOKS_AT_ONCE)

    # ── what models need ──────────────────────────────────────────────────────────────────────────────────

    def demand(
        self, model: Key, generation: int, needs: Sequence[Need], auth: Mapping[str, Any] | None
    ) -> Progress | None:
        """Say all that `model` needs now; gives how far it is, or None when all of it is whole."""
        for need, fetch in list(self._fetches.items()):
            if model in fetch.for_ and need not in needs:
                del fetch.for_[model], fetch.auths[model]
                self._drop_unwanted(fetch)
        missing = [need for need in needs if not self.cache.is_whole(need)]
        if not missing:
            return None
        for need in missing:
            known = self._fetches.get(need)
            if known is None:
                known = self._fetches[need] = _Fetch(need)
            known.auths[model] = auth
            if known.for_.get(model, 0) < generation:
                known.for_[model] = generation
                known.failure, known.tries = None, 0  # a new intent is a new chance
            self._keep_running(known)
        return self._progress([self._fetches[need] for need in missing])

    def look_again(self) -> None:
        """Something that a person had to do may have been done: try again what waits for it."""
        for fetch in self._fetches.values():
            if fetch.failure is not None and fetch.failure.reason in RECHECK:
                fetch.failure = None
                for model in fetch.for_:
                    self._changed(model)

    def retry(self, model: Key) -> None:
        """Somebody wants the failed fetches of a model tried again now."""
        for fetch in self._fetches.values():
            if model in fetch.for_ and fetch.failure is not None:
                fetch.failure, fetch.tries = None, 0
                self._changed(model)

    def forget(self, model: Key) -> None:
        """The model needs nothing more."""
        self.demand(model, 0, (), None)

    def _drop_unwanted(self, fetch: _Fetch) -> None:
        if fetch.for_:
            return
        del self._fetches[fetch.need]
        if fetch.task is not None:
            log.info("%s: nobody needs it any more", fetch.need)
            fetch.task.cancel()
            self._leaving.add(fetch.task)
            fetch.task.add_done_callback(self._leaving.discard)

    def _keep_running(self, fetch: _Fetch) -> None:
        if fetch.task is not None and not fetch.task.done():
            return
        failure = fetch.failure
        if failure is not None and (failure.retry_at is None or failure.retry_at > self._clock()):
            return
        fetch.task = asyncio.create_task(self._run(fetch), name=f"fetch {fetch.need}")

    def _progress(self, fetches: Sequence[_Fetch]) -> Progress:
        done = sum(f.samples[-1][1] if f.samples else self.cache.present(f.need) for f in fetches)
        total = sum(f.total or self._total(f.need) for f in fetches)
        failures = [f.failure for f in fetches if f.failure is not None]
        stuck = [failure for failure in failures if failure.stuck]
        waiting = [f.failure.retry_at for f in fetches if f.failure and (f.task is None or f.task.done())]
        return Progress(
            done,
            total,
            sum(_rate(f.samples) for f in fetches),
            next(iter(stuck + failures), None),
            min((at for at in waiting if at is not None), default=None),
        )

    def _total(self, need: Need) -> int:
        record = self.cache.record(need)
        return record.size if record is not None else 0

    # ── the work ──────────────────────────────────────────────────────────────────────────────────────────

    async def _run(self, fetch: _Fetch) -> None:
        """One try. What came of it is read off the disk and `fetch.failure` by the next pass."""
        fetch.samples.clear()
        async with self._slots:
            log.info("%s: fetching its %s", fetch.need, fetch.need.part)
            try:
                # a model beside it that names no token does not take it away
                token = self._token(next((auth for auth in fetch.auths.values() if auth is not None), None))
                job = FetchJob(
                    "fetch",
                    fetch.need.repository,
                    fetch.need.commit,
                    fetch.need.part,
                    str(self.cache.root),
                    str(self.cache.records),
                    token,
                )
                event = await self._work(job, fetch)
            except SecretNotFound as error:
                event = FetchEvent("failed", reason="SecretNotFound", message=error.message, hint=error.hint)
            except (worker.WorkerEnded, OSError) as error:
                log.error("%s: %s", fetch.need, error)
                event = FetchEvent("failed", reason="FetchFailed", message=f"the download {error}")
        if event.event == "failed":
            self._note_failure(fetch, event)
        else:
            log.info("%s: verified", fetch.need)
            fetch.failure, fetch.tries = None, 0
            self._fetches.pop(fetch.need, None)
        fetch.task = None
        for model in fetch.for_:
            self._changed(model)

    def _note_failure(self, fetch: _Fetch, event: FetchEvent) -> None:
        now = self._clock()
        if event.reason in RETRIED:
            moved = len({done for _, done in fetch.samples}) > 1
            fetch.tries = 1 if moved else fetch.tries + 1
            delay = min(BACKOFF_BASE * 2.0 ** min(fetch.tries - 1, 30), BACKOFF_MAX)
            retry_at: float | None = now + delay * (1 + JITTER * self._rng.uniform(-1, 1))
        elif event.reason in RECHECK:
            retry_at = now + RECHECK[event.reason]
        else:
            retry_at = None
        fetch.failure = Failure(event.reason, event.message, event.hint, retry_at)
        log.warning("%s: %s: %s", fetch.need, event.reason, event.message)

    async def _work(self, job: FetchJob, fetch: _Fetch | None = None) -> FetchEvent:
        """Run one worker; gives its last event."""
        argv = [sys.executable, "-P", "-m", "quire_operators.fetch"]
        async with aclosing(worker.lines(argv, self._environ, msgspec.json.encode(job))) as lines:
            async for line in lines:
                try:
                    event = _events.decode(line)
                except msgspec.MsgspecError as error:
                    raise worker.WorkerEnded(f"said {line[:200]!r}") from error
                if event.event != "progress":
                    return event
                if fetch is not None:
                    self._note_progress(fetch, event)
        raise worker.WorkerEnded("ended without a word")

    def _note_progress(self, fetch: _Fetch, event: FetchEvent) -> None:
        now = time.monotonic()
        fetch.total = event.total
        if fetch.failure is not None and fetch.samples and event.done > fetch.samples[0][1]:
            fetch.failure = None  # it goes on
        fetch.samples.append((now, event.done))
        while len(fetch.samples) > 2 and fetch.samples[1][0] < now - RATE_SECONDS:
            fetch.samples.pop(0)
        for model in fetch.for_:
            self._changed(model)

    def _token(self, auth: Mapping[str, Any] | None) -> str | None:
        return self._secrets.value(auth) if auth is not None else None

    # ── looks ─────────────────────────────────────────────────────────────────────────────────────────────

    async def look(
        self, repository: str, revision: str, part: Part, auth: Mapping[str, Any] | None
    ) -> SourceError | None:
        """Have a record of `part` at `revision`, and its small files; gives why there is none."""
        event = await self._ask("look", repository, revision, part, auth)
        if event.event == "done":
            return None
        hint = event.hint
        if event.reason in RETRIED:
            hint = "apply it again when the hub can be reached; nothing was changed"
        return SourceError(event.reason, event.message, hint, event.path)

    async def moved_to(self, repository: str, revision: str, auth: Mapping[str, Any] | None) -> str | None:
        """The commit that the hub has for a branch or tag now; None when it does not say."""
        event = await self._ask("commit", repository, revision, "model", auth)
        return event.commit or None

    async def _ask(
        self, op: Any, repository: str, revision: str, part: Part, auth: Mapping[str, Any] | None
    ) -> FetchEvent:
        try:
            token = self._token(auth)
            job = FetchJob(op, repository, revision, part, str(self.cache.root), str(self.cache.records), token)
            async with self._looks, asyncio.timeout(LOOK_SECONDS):
                return await self._work(job)
        except SecretNotFound as error:
            return FetchEvent(
                "failed",
                reason="SecretNotFound",
                message=error.message,
                hint=error.hint,
                path="spec.sourceAuth",
            )
        except TimeoutError:
            return FetchEvent(
                "failed", reason="HubUnreachable", message=f"hf://{repository}: the hub takes too long to answer"
            )
        except (worker.WorkerEnded, OSError) as error:
            log.error("hf://%s: %s", repository, error)
            return FetchEvent("failed", reason="FetchFailed", message=f"hf://{repository}: the look {error}")

    async def close(self) -> None:
        """Kill every worker. What they fetched stays, and is gone on from."""
        tasks = [fetch.task for fetch in self._fetches.values() if fetch.task is not None]
        self._fetches.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._leaving, return_exceptions=True)


def _rate(samples: Sequence[tuple[float, int]]) -> float:
    """Bytes a second between the oldest and the newest sample."""
    if len(samples) < 2:
        return 0.0
    (first, begin), (last, end) = samples[0], samples[-1]
    return max(0.0, (end - begin) / (last - first)) if last > first else 0.0
