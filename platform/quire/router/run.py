"""One job on the fleet, from its first sequence to its last token.

One bell rings whenever any of the job's sequences has news; all that has come by then goes out in one batch of
`Update`s (`Run.updates`), so a slow reader gets fewer and larger pieces and holds nothing but token ids. Each
sequence has its own detokenizer and stop strings. A stop string found is an abort to the engine.

The `n` sequences of one prompt go to one replica, as one family, and compute their prompt once (`placing` says
where that is, and when). A sequence that has to start again takes those that follow it along.

A sequence waits for its turn, before a replica takes it and in the engine's queue, as long as the manifest's
`maxQueueWait` says, over all its attempts together; background work waits for as long as it takes. A request that
set itself a `timeout`, or whose route sets it one, ends when that is over, wherever it is: the engines know of it,
too, but the run does not wait for their word. A route may also say when the first token has to be there.

A sequence whose engine dies or stalls is started again elsewhere as long as nothing of it went to the client
(nothing ever has, of an answer that is sent whole): as often as its terms allow, and within the model's budget,
for which it waits if it must, while the job's other sequences go on. After that, or after
the first byte, the request fails, unless the manifest lets streams *migrate*: then the sequence goes on at another
replica of the same revision, behind the tokens that were read of it (`wire.Generate.written`), up to
`maxMigrations` times, and waits for one as long as `maxQueueWait` says. A request also fails when the model's
tokenizer or template has become another since its ids were made: they would be nonsense to the replicas that serve
now. Whatever way a run ends, `updates` aborts what still runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from typing import Any, Final, Literal

from quire.errors import (
    ApiError,
    EngineDied,
    EngineUnavailable,
    ModelNotFound,
    ServiceUnavailable,
    TimedOut,
)
from quire.router import engine_client, quarantine
from quire.router.balancer import prefix_chain
from quire.router.desk import Claim, Desk
from quire.router.engine_client import EngineClient, NotConnected
from quire.router.fleet import Fleet
from quire.router.job import Choice, Job, Update
from quire.router.placing import RECHECK_SECONDS, News, gave_up, waited
from quire_schemas import signals, telling, wire
from quire_schemas.workers import Fared, Wanted

log = logging.getLogger("quire.router")

ENGINE_GONE: Final = frozenset({"engine_shutdown", "engine_died"})
"""Error codes of sequences that end because their engine does."""
PATIENCE: Final = 0.25
"""Seconds that tokens of an answer that is sent whole may wait at the engine for others: each piece wakes a run.
Loads, time-outs and what was used when a client leaves are known to within so much."""
_DIED: Final = "The engine died while it was writing this answer."


def _was_asked_to_end(deltas: Sequence[wire.Delta]) -> bool:
    return any(delta.error_code == "engine_shutdown" for delta in deltas)


class Run:
    """One job on the fleet, from its first sequence to its last token."""

    def __init__(self, fleet: Fleet, desk: Desk, job: Job, received_at: float) -> None:
        """`received_at`: when the request's body was there."""
        self.job = job
        self._desk = desk
        self.first_token_at: float | None = None
        self._heard_at = math.inf
        """When the oldest of what the last wake-up found came from an engine."""
        self.replica = ""
        """The one that was given a sequence last."""
        self._received_at = math.inf if job.background else received_at
        """Infinite once what the router added to the request is counted."""
        self._metrics = fleet.metrics.model(job.target)
        self._choices = [Choice(job, index) for index in range(len(job.prompts) * job.drawn)]
        self._claims: dict[int, Claim] = {}
        """By the index of the choice; of those that are begun and have not ended."""
        self._bell = asyncio.Event()
        self._held = 0
        self._homes: dict[int, str] = {}
        """By prompt, the replica that was given one of its sequences last."""
        self._chains: dict[int, tuple[bytes, ...]] = {}
        self._alarm: asyncio.TimerHandle | None = None
        """Rings the bell when the choices of which nothing has gone out are to be looked after."""
        self._starts: set[asyncio.Task[None]] = set()
        """Choices that are being placed while others go on."""
        self._came = False
        """Some prompt is computed: there is a token, or could be."""

    @property
    def _patience(self) -> float:
        """Seconds that a sequence waits for its turn."""
        return math.inf if self.job.background else self.job.model.route.max_queue_wait

    @property
    def queue_time(self) -> float | None:
        """Seconds in engines' queues, of several sequences the longest; None until one has told."""
        return max((queued for choice in self._choices if (queued := choice.queue_time) is not None), default=None)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.generated for choice in self._choices)

    def fared(self, end: Literal["whole", "failed", "left"]) -> Fared:
        """How it went, to be compared with what another revision does: its time to the first token since its model
        had it, and the mean one between the tokens of its first answer."""
        job, first, times = self.job, self._choices[0], self._choices[0].times
        begun = job.arrived_at if job.begun_at is None else job.begun_at
        between = None
        if times is not None and first.generated > 1:
            between = (times.last_at - times.first_at) / (first.generated - 1)
        until_first = None if self.first_token_at is None else self.first_token_at - begun
        return Fared(end, self._is_void(), until_first, between)

    def _is_void(self) -> bool:
        """Whether an answer of it has no text, or was cut by the length that the model has."""
        job, route = self.job, self.job.model.route
        if job.pooling is not None or job.beam is not None or job.prompt_alone:
            return False
        longest = min(route.max_model_len, route.kv_tokens)
        return any(
            not choice.text.made or len(choice.prompt) + choice.generated >= longest for choice in self._choices
        )

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts that engines have come to, as far as can be told."""
        came = {choice.prompt_index for choice in self._choices if choice.came}
        return sum(len(self.job.prompts[index]) for index in came)

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of thoughts among those completed."""
        return sum(choice.reasoning_tokens for choice in self._choices)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were there before the job: of each prompt as many as none of its sequences computed.

        A prompt counts as soon as all of its sequences have their first token.
        """
        found = 0
        for first in range(0, len(self._choices), self.job.drawn):
            found += min(choice.cached_tokens for choice in self._choices[first : first + self.job.drawn])
        return found

    async def updates(self) -> AsyncGenerator[list[Update], None]:
        """Batches of updates until every choice has its finish reason.

        Raises `ServiceUnavailable`, `TimedOut`, `EngineUnavailable`, `EngineDied`, `InternalError`,
        `ModelNotFound`, `ModelStopped`, `RequestQuarantined`, `QueueFull`. However it ends, no
        sequence of the job is left running.
        """
        live = {choice.index: choice for choice in self._choices}
        for choice in self._choices:
            choice.deadline = time.monotonic() + self._patience
        self._count_request()
        ends = [
            asyncio.get_running_loop().call_later(max(at - time.monotonic(), 0.0), self._bell.set)
            for at in (self.job.ends_at, self.job.first_by)
            if at is not None
        ]
        try:
            later = deque(self._choices[self.job.at_once :])
            if len(self._choices) > 1:
                for choice in self._choices[
                    : self.job.at_once
                ]:  # one may wait until another has brought its token
                    self._begin(self._place(choice))
            else:
                await self._place(self._choices[0])
            while live:
                await self._ring(live.values())
                self._heard_at = math.inf
                batch: list[Update] = []
                lost: list[Choice] = []
                for choice in list(live.values()):
                    update = self._read(choice, lost)
                    if update is None:
                        continue
                    if not self.job.stream:  # until it is whole, another attempt may have to replace it
                        choice.kept.append(update)
                        if update.finish_reason is None:
                            continue
                    batch += update.beams or choice.kept or [update]
                    if update.finish_reason is not None:
                        self._end(choice)
                        self._count_end(choice)
                        del live[choice.index]
                        if later:
                            following = later.popleft()
                            following.deadline = time.monotonic() + self._patience
                            self._begin(self._place(following))
                if batch:
                    yield batch
                if live:
                    self._check_time()
                self._recover(lost)
            self._metrics.most_generated.observe(max(choice.generated for choice in self._choices))
        finally:
            for timer in (self._alarm, *ends):
                if timer is not None:
                    timer.cancel()
            for start in self._starts:
                start.cancel()
            try:
                if self._starts:
                    await asyncio.gather(*self._starts, return_exceptions=True)
                await self._note_turns()
            finally:
                for choice in self._choices:
                    self._end(choice)
                self._count_sources()

    async def _note_turns(self) -> None:
        """Note which choices an engine is at, of those that have brought nothing: who leaves an engine's queue has
        used nothing, and who leaves the engine at work has."""
        waiting = [
            (choice, choice.sequence, self._claims[choice.index])
            for choice in self._choices
            if not choice.came and choice.sequence is not None and choice.index in self._claims
            if not (choice.sequence.ended or choice.sequence.lost)
        ]
        for choice, _, _ in waiting:
            choice.came = True  # unless it is told otherwise, and in time
        with contextlib.suppress(ApiError, TimeoutError):
            async with asyncio.timeout(RECHECK_SECONDS):
                for choice, sequence, claim in waiting:
                    choice.came = not await claim.is_queued(sequence)

    def delivered(self) -> None:
        """What was made of the last updates is on its way to the client."""
        if not self.job.background and math.isfinite(self._heard_at):
            self._metrics.added_to_answer.observe(time.monotonic() - self._heard_at)

    def _check_time(self) -> None:
        """Raises `TimedOut` when the job's own time is over, or that until its first token."""
        now = time.monotonic()
        if self.job.ends_at is not None and now >= self.job.ends_at:
            raise self.job.out_of_time()
        if self.job.first_by is not None and now >= self.job.first_by and not self._came:
            raise self.job.without_first()

    def _begin(self, start: Coroutine[Any, Any, None]) -> None:
        """Place a choice while others go on."""
        task = asyncio.create_task(start)
        task.add_done_callback(lambda _: self._bell.set())
        self._starts.add(task)

    def _recover(self, lost: Sequence[Choice]) -> None:
        """Begin to start lost choices again, and raise what earlier starts have ended in."""
        if any(choice.sent and not self._may_migrate(choice) for choice in lost):
            raise EngineDied(_DIED)
        for choice in lost:
            self._begin(self._again(choice))
        for start in [start for start in self._starts if start.done()]:
            self._starts.discard(start)
            start.result()

    def _read(self, choice: Choice, lost: list[Choice]) -> Update | None:
        """The choice's news, counted; a choice whose engine is gone goes to `lost`."""
        sequence = choice.sequence
        if sequence is None:
            return None
        if sequence.deltas:
            self._heard_at = min(self._heard_at, sequence.heard_at)
        deltas = sequence.take()
        errors = {delta.error_code for delta in deltas if delta.error_code is not None}
        if sequence.lost or errors & ENGINE_GONE:
            # Leaving the table excuses nobody: a replica that hangs is taken out of it before it is killed.
            if not (sequence.begun or sequence.client.endpoint.draining or _was_asked_to_end(deltas)):
                self._claims[choice.index].blame(self._fingerprint(choice))
            self._trace(choice, sequence, lost=True)
            choice.sequence = None
            choice.lost_by = "503" if _was_asked_to_end(deltas) else "ConnectionError"
            if choice.turn_at is not None:
                choice.deadline += time.monotonic() - choice.turn_at
            choice.avoid.add(sequence.client.endpoint.replica_id)
            level = logging.INFO if sequence.client.leaving else logging.WARNING
            log.log(level, "request %s: engine gone, attempt %d", self.job.id, choice.attempts)
            lost.append(choice)
            return None
        if not deltas:
            return None
        if "numerical_error" in errors:
            self._metrics.corrupted.inc()
        before = choice.generated
        update = choice.read(deltas)
        if sequence.begun:
            self._came = choice.came = True
            self._claims[choice.index].begun()
        self._count(choice, choice.generated - before)
        if update is None:
            return None
        self._came = choice.came = True
        choice.sent = self.job.stream
        if update.finish_reason is not None and self.job.shown.metrics:
            return dataclasses.replace(update, times=choice.times)
        return update

    def _count(self, choice: Choice, tokens: int) -> None:
        if not tokens:
            return
        now = time.monotonic()
        self._metrics.generation_tokens.inc(tokens)
        if self.first_token_at is None:
            self.first_token_at = now
            self.job.span.event(signals.EVENT_FIRST_TOKEN, now)
            if not self.job.background:
                self._metrics.time_to_first_token.observe(now - self.job.arrived_at)
        if choice.first_token_at is None:
            choice.first_token_at = now
        if choice.last_token_at is not None and not self.job.background:
            self._metrics.inter_token.observe((now - choice.last_token_at) / tokens, tokens)
        choice.last_token_at = now

    def _count_request(self) -> None:
        """What is asked for."""
        job, metrics = self.job, self._metrics
        metrics.prompt_tokens.inc(job.prompt_tokens)
        for prompt in job.prompts:
            metrics.tokens_of_prompt.observe(len(prompt))
        if job.pooling is None:
            metrics.n.observe(job.n)
            metrics.max_tokens.observe(job.sampling.max_tokens)

    def _count_sources(self) -> None:
        """Where the tokens of those prompts came from that were computed."""
        metrics, drawn = self._metrics, self.job.drawn
        for first in range(0, len(self._choices), drawn):
            choices = self._choices[first : first + drawn]
            told = [choice.timings.cached_tokens for choice in choices if choice.timings is not None]
            if told:
                metrics.tokens_by_source["local_cache_hit"].inc(min(told))
                metrics.tokens_by_source["local_compute"].inc(len(choices[0].prompt) - min(told))

    def _count_end(self, choice: Choice) -> None:
        """A sequence has come to its end: where its time went."""
        metrics, timings = self._metrics, choice.timings
        metrics.tokens_generated.observe(choice.generated)
        if (outcome := choice.outcome) is not None:
            mode = "streaming" if self.job.stream else "non_streaming"
            metrics.calls[self.job.operation, mode, outcome].inc()
        if timings is None or timings.scheduled_at is None or timings.first_token_at is None:
            return
        metrics.computed_tokens.observe(len(choice.prompt) - timings.cached_tokens)
        metrics.preemptions.observe(len(timings.preempted_at))
        if self.job.background:  # nobody waits for it
            return
        prefill = max(timings.first_token_at - timings.scheduled_at, 0.0)
        decode = choice.decode_time
        metrics.prefill_time.observe(prefill)
        metrics.inference_time.observe(prefill + decode)
        if choice.generated:
            metrics.decode_time.observe(decode)
        if choice.generated > 1:
            metrics.per_output_token.observe(decode / (choice.generated - 1))

    async def _ring(self, choices: Iterable[Choice]) -> None:
        """Wait for news. Raises `TimedOut` when a sequence has waited too long for its first step."""
        if self._alarm is None:
            looked_after = [choice for choice in choices if not choice.sent or self._may_migrate(choice)]
            if looked_after:
                until = min([await self._look_after(choice) for choice in looked_after])
                self._alarm = asyncio.get_running_loop().call_later(until, self._sound)
        await self._bell.wait()
        self._bell.clear()

    def _sound(self) -> None:
        self._alarm = None
        self._bell.set()

    async def _look_after(self, choice: Choice) -> float:
        """Is there hope for a choice where it is, which might be elsewhere? Seconds until the next look."""
        sequence = choice.sequence
        if sequence is None or sequence.lost:
            return RECHECK_SECONDS  # it is on its way to another replica
        claim = self._claims[choice.index]
        if sequence.client.stalled and await claim.has_other(self._wanted(choice)):
            sequence.abort()
            sequence.lost = True
            self._bell.set()
            return RECHECK_SECONDS
        if choice.sent:
            return RECHECK_SECONDS
        now = time.monotonic()
        if not await claim.is_queued(sequence):
            choice.turn_at = choice.turn_at or now
            return RECHECK_SECONDS  # it is being computed: a long prompt is no reason to give up
        choice.turn_at = None
        if now >= choice.deadline:
            raise waited(self.job.model.route.max_queue_wait)
        return min(max(choice.deadline - now, 0.01), RECHECK_SECONDS)

    async def _place(self, choice: Choice) -> None:
        """Give the choice's sequence to a replica, as soon as there is one that may have it.

        Raises what `Seat.find` does, and `TimedOut` when the job's own time is over.
        """
        self._check_time()
        claim, prompt = self._claims.get(choice.index), choice.prompt_index
        held_since: float | None = None

        def hear(news: News) -> None:
            nonlocal held_since
            if news == "retrying":
                self.job.span.event(signals.EVENT_RETRY, time.monotonic(), choice.where)
            elif held_since is None:
                held_since = time.monotonic()
                self._hold(1)

        if claim is None:
            owner, background = self.job.caller.owner, self.job.background
            claim = self._desk.seat(self.job.model, owner, background=background)
            self._claims[choice.index] = claim
        try:
            async with asyncio.timeout_at(self._until(choice)):
                while True:
                    client = await claim.find(
                        self._wanted(choice),
                        lambda: self._fingerprint(choice),
                        lambda: self._homes.get(prompt),
                        hear,
                    )
                    if self._start(choice, client, claim):
                        break
            self._count_start(choice, held_since)
        except TimeoutError:
            self._check_time()
            raise
        finally:
            if held_since is not None:
                self._hold(-1)
                until = choice.sent_at if choice.sequence is not None else time.monotonic()
                self.job.span.phase(signals.SPAN_HOLD, held_since, until, self._which(choice))

    def _until(self, choice: Choice) -> float | None:
        """When the job's own time is over for a choice that waits. That of the first token does not count for one
        beside which another may bring it: then the loop of `updates` looks at the clock."""
        alone = len(self._choices) == 1 and not self._came
        ends = [at for at in (self.job.ends_at, self.job.first_by if alone else None) if at is not None]
        return min(ends, default=None)

    def _wanted(self, choice: Choice) -> Wanted:
        """What a replica is looked for by."""
        written = len(choice.written or ()) if choice.sent else 0
        return Wanted(
            request=self.job.id,
            asked_model=self.job.asked_model,
            tokenizer=self.job.tokenizer.fingerprint,
            deadline=choice.deadline,
            prompt_tokens=len(choice.prompt) + written,
            max_tokens=choice.sampling.max_tokens - written,
            attempts=choice.attempts,
            priority=self.job.priority,
            width=1 if self.job.beam is None else self.job.beam.width,
            begun_with=choice.template_hash if choice.sent else None,
            avoid=tuple(choice.avoid),
            prompt=choice.prompt_index,
            caller=self.job.terms.caller,
            adapter=self.job.adapter,
            chain=self._chain(choice),
        )

    def _hold(self, choices: int) -> None:
        """Count the choices that are held; the gauge counts requests."""
        before, self._held = self._held, self._held + choices
        self._metrics.held.inc(bool(self._held) - bool(before))

    def _chain(self, choice: Choice) -> tuple[bytes, ...]:
        """The hashes of the choice's prompt, where there are several replicas of which one may have it cached."""
        served, index = self.job.model, choice.prompt_index
        if not (self.job.terms.by_prefix and served.route.prefix_caching) or len(served.clients) < 2:
            return ()
        chain = self._chains.get(index)
        if chain is None:
            chain = self._chains[index] = prefix_chain(choice.prompt, self._salt)
        return chain

    @property
    def _salt(self) -> str:
        """What besides tokens decides where a prompt is cached."""
        return f"{self.job.cache_salt}\0\0{self.job.adapter}" if self.job.adapter else self.job.cache_salt

    def _fingerprint(self, choice: Choice) -> bytes:
        """Made when there is somebody to suspect, and not before."""
        if choice.fingerprint is None:
            route = self.job.model.route
            choice.fingerprint = quarantine.fingerprint(
                self.job.target, route.template_hash, choice.prompt, choice.sampling
            )
        return choice.fingerprint

    def _start(self, choice: Choice, client: EngineClient, claim: Claim) -> bool:
        """Whether the sequence is on its way; a connection that broke this moment says no."""
        choice.sent_at = time.monotonic()
        ends_at = self.job.ends_at
        request = wire.Generate(
            id=f"{self.job.id}-{choice.index}-{choice.attempts}",
            token_ids=choice.prompt,
            sampling=choice.sampling_left,
            written=tuple(choice.written or ()) if choice.sent else (),
            priority=self.job.priority,
            background=self.job.background,
            lent=claim.is_lent,
            timeout=None if ends_at is None else max(ends_at - choice.sent_at, 0.0),
            cache_salt=self.job.cache_salt,
            adapter=self.job.adapter,
            family=self.job.id if self.job.drawn > 1 else None,
            beam=self.job.beam,
            trace=self.job.span.traceparent,
            pooling=self.job.pooling,
            patience=0.0 if choice.may_end_early else PATIENCE,
        )
        try:
            choice.sequence = client.start(request, self._bell, self._chain(choice))
        except NotConnected:
            return False
        claim.given(choice.sequence)
        self.replica = self._homes[choice.prompt_index] = client.endpoint.replica_id
        choice.template_hash = client.endpoint.template_hash
        choice.attempts += 1
        return True

    def _count_start(self, choice: Choice, held_since: float | None) -> None:
        """The first sequence of the request is on its way: what that took, but for the time it was held."""
        if choice.index == 0 and math.isfinite(self._received_at):
            until = choice.sent_at if held_since is None else held_since
            self._metrics.added_to_request.observe(until - self._received_at)
            self._received_at = math.inf

    async def _again(self, choice: Choice) -> None:
        """Start a lost choice once more, or go on with it. Raises as `_place` does, and `EngineDied`."""
        self._claims[choice.index].settle()
        if choice.sent:
            await self._migrate(choice)
            return
        if choice.attempts >= self.job.terms.attempts or choice.lost_by not in self.job.terms.retried:
            raise gave_up(choice.attempts)
        choice.begin()
        await self._place(choice)

    def _may_migrate(self, choice: Choice) -> bool:
        """Whether a choice of which something has gone out may go on at another engine."""
        return choice.written is not None and choice.migrations < self.job.model.route.max_migrations

    async def _migrate(self, choice: Choice) -> None:
        """Go on with a choice behind what was read of it. Raises `EngineDied` when nobody can in time."""
        choice.migrations += 1
        choice.turn_at = None
        choice.deadline = time.monotonic() + self.job.model.route.max_queue_wait
        self.job.span.event(signals.EVENT_MIGRATE, time.monotonic(), choice.where)
        try:
            await self._place(choice)
        except (ServiceUnavailable, EngineUnavailable, TimedOut, ModelNotFound) as error:
            self._check_time()
            raise EngineDied(f"{_DIED} It could not go on elsewhere: {error}") from error
        self._metrics.migrations.inc()
        log.info("request %s: goes on behind %d tokens", self.job.id, choice.generated)

    def _end(self, choice: Choice) -> None:
        """Nothing of the choice runs on; may be called twice."""
        if (claim := self._claims.pop(choice.index, None)) is not None:
            claim.end()
        sequence, choice.sequence = choice.sequence, None
        if sequence is None:
            return
        sequence.abort()
        self._trace(choice, sequence, lost=sequence.lost)
        queued = choice.queue_time
        if queued is not None and not self.job.background:
            self._metrics.queue_time.observe(queued)

    def _which(self, choice: Choice) -> dict[str, Any]:
        """Attributes that tell one sequence of the job from its others; none where there is one."""
        return {signals.QUIRE_CHOICE: choice.index} if len(self._choices) > 1 else {}

    def _trace(self, choice: Choice, sequence: engine_client.Sequence, *, lost: bool) -> None:
        """Note where the time of the attempt that ends now went."""
        if not self.job.span.is_recorded:
            return
        where = {signals.QUIRE_REPLICA: sequence.client.endpoint.replica_id, **self._which(choice)}
        if choice.attempts > 1:
            where[signals.QUIRE_ATTEMPT] = choice.attempts
        if lost:
            where[signals.ERROR_TYPE] = "engine_died"
        ended = (choice.sent_at, time.monotonic(), choice.timings, len(choice.prompt), choice.generated)
        self.job.span.sequence(telling.Sequence(*ended, where))
        choice.where = where
