"""From a valid request to token ids at a replica, and from a replica's token ids back to text.

On the way down (`Gateway.chat`, `Gateway.completion`) a request becomes a `Job`: model, prompts as ids, sampling,
limits. Everything that can be wrong with it is found here, before an engine hears of it. Admission is a bound on
sequences per model: what the ready replicas compute at once, plus the manifest's queue length; while no replica is
ready, the queue length alone, and at least one request.

On the way up (`Run.updates`) one bell rings whenever any of the job's sequences has news; all that has come by
then goes out in one batch of `Update`s, so a slow reader gets fewer and larger pieces and holds nothing but
token ids. Each sequence has its own detokenizer and stop strings. A stop string found is an abort to the engine.

A sequence whose engine dies or stalls is started again elsewhere as long as nothing of it went to the client
(nothing ever has, of an answer that is sent whole): at most `MAX_RETRIES` times, and within the fleet-wide budget
of `balancer.may_retry`, for which it waits if it must, while the job's other sequences go on. After that, or after
the first byte, the request fails. It also fails when the model's tokenizer or template has become another since
its ids were made: they would be nonsense to the replicas that serve now. A request that may be what engines die
of is tried with no other such beside it on the replica, and not at all once it has died there too (`quarantine`).
Whatever way a run ends, `updates` aborts what still runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgspec

from quire.errors import (
    ContextLengthExceeded,
    EngineDied,
    EngineUnavailable,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    QueueFull,
    QueueTimeout,
    RequestQuarantined,
    ServiceUnavailable,
)
from quire.router import engine_client, quarantine
from quire.router.balancer import choose, may_retry
from quire.router.engine_client import EngineClient, NotConnected
from quire.router.fleet import Fleet, Pulse, ServedModel
from quire.router.quarantine import Suspects
from quire.router.spans import RequestSpan, SequenceTimes
from quire.text import Detokenizer, StopStrings, TextError, Tokenizer
from quire.text.templates import RESERVED
from quire_schemas import signals, wire
from quire_schemas.openai import ChatRequest, CompletionRequest, SamplingFields

log = logging.getLogger("quire.router")
W = TypeVar("W")

MAX_RETRIES: Final = 2
INLINE_CHARS: Final = 16 * 1024
"""Longer texts are rendered and tokenized on a thread: above this it takes longer than the hop there."""
DEFAULT_RETRY_AFTER: Final = 5.0
RECHECK_SECONDS: Final = 0.5
"""How often something that no event tells of (a stall, a place in an engine's queue) is looked at again."""
_QUARANTINED: Final = (
    f"{quarantine.DEATHS_TO_CONDEMN} engines died when they were given this request, so it is not tried again for "
    f"{quarantine.REMEMBERED_SECONDS / 60:g} minutes. Other requests are served."
)
ENGINE_GONE: Final = frozenset({"engine_shutdown", "engine_died"})
"""Error codes of sequences that end because their engine does."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request, ready for engines."""

    id: str
    asked_model: str
    """The name the request used; answers repeat it."""
    model: ServedModel
    tokenizer: Tokenizer
    """What made the prompts' ids, and reads the answer's."""
    operation: str
    prompts: tuple[list[int], ...]
    echoes: tuple[str, ...]
    """The prompts' texts, when the answer is to begin with them."""
    n: int
    sampling: wire.Sampling
    stops: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    stream: bool
    arrived_at: float
    span: RequestSpan
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def fingerprint(self) -> str:
        """Changes when the model behind the name does."""
        return f"fp_{self.model.route.template_hash[:10] or self.model.route.revision}"


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token of an answer with its log-probabilities; `offset` counts characters from the answer's start."""

    offset: int
    until: int
    """The token may be shown once this many characters are out: all of its own, and at least one."""
    scores: wire.TokenLogprobs


@dataclass(frozen=True, slots=True)
class Update:
    """What one choice gained since its last update. The last one has a finish reason, `stop` or `length`."""

    index: int
    text: str
    scores: tuple[TokenScore, ...]
    finish_reason: str | None


class _Choice:
    """One sequence's way from ids to text, over all its attempts."""

    __slots__ = (
        "_made",
        "_out",
        "attempts",
        "avoid",
        "deadline",
        "fingerprint",
        "generated",
        "index",
        "job",
        "kept",
        "last_token_at",
        "prompt",
        "retrying",
        "sampling",
        "scores",
        "sent",
        "sent_at",
        "sequence",
        "stops",
        "text",
        "timings",
        "trial",
        "where",
    )

    def __init__(self, job: Job, index: int) -> None:
        self.job = job
        self.index = index
        self.prompt = job.prompts[index // job.n]
        seed = job.sampling.seed
        self.sampling = (
            job.sampling
            if seed is None or index == 0
            # The choices of one seeded request must differ from each other and repeat from run to run.
            else msgspec.structs.replace(job.sampling, seed=(seed + index) % 2**63)
        )
        self.attempts = 0
        self.fingerprint: bytes | None = None
        self.trial: str | None = None
        """The replica where it is tried although engines may die of it."""
        self.avoid: set[str] = set()
        self.deadline = 0.0
        self.retrying = False
        self.sent = False
        self.sent_at = 0.0
        """When the attempt that runs was handed to its engine."""
        self.where: dict[str, Any] = {}
        """What spans say of the last attempt that ended."""
        self.sequence: engine_client.Sequence | None = None
        self.begin()

    def begin(self) -> None:
        """Forget what an attempt before has brought."""
        self.text = Detokenizer(self.job.tokenizer, self.job.skip_special_tokens)
        self.stops = StopStrings(self.job.stops, self.job.include_stop)
        self.scores: list[TokenScore] = []
        self.kept: list[Update] = []
        self.generated = 0
        self.last_token_at: float | None = None
        self.timings: wire.Timings | None = None
        self._made = self._out = 0  # characters detokenized, and given out

    def read(self, deltas: Sequence[wire.Delta]) -> Update | None:
        """The update that `deltas` make; None when all they bring is held back. Raises what the engine reports."""
        pieces: list[str] = []
        finish: str | None = None
        for delta in deltas:
            scores = delta.logprobs or []
            for position, token in enumerate(delta.token_ids):
                self.generated += 1
                piece = self.text.push((token,))
                if position < len(scores):
                    until = self._made + max(len(piece), 1)
                    self.scores.append(TokenScore(self._made, until, scores[position]))
                pieces.append(self._through_stops(piece))
                if self.stops.hit is not None:
                    break
            if self.stops.hit is not None:
                finish = "stop"
                break
            if delta.timings is not None:
                self.timings = delta.timings
            if delta.finish_reason is not None:
                self.generated += delta.stop_token_id is not None
                self._raise_if_failed(delta)
                pieces.append(self._through_stops(self.text.finish()))
                pieces.append(self.stops.finish())
                finish = "stop" if self.stops.hit is not None else delta.finish_reason
        text = "".join(pieces)
        self._out += len(text)
        ready = tuple(self._ready_scores(ended=finish is not None))
        if not (text or ready or finish):
            return None
        return Update(self.index, text, ready, finish)

    def _through_stops(self, piece: str) -> str:
        self._made += len(piece)
        if self.generated <= self.sampling.min_tokens:
            return piece  # too early for a stop string to count
        return self.stops.push(piece)[0]

    def _ready_scores(self, ended: bool) -> Iterator[TokenScore]:
        """Scores of the tokens whose text is out. What a stop string cut off never shows, in no field."""
        while self.scores and (self.scores[0].until <= self._out or (ended and self.stops.hit is None)):
            yield self.scores.pop(0)

    def _raise_if_failed(self, delta: wire.Delta) -> None:
        if delta.finish_reason in ("stop", "length"):
            return
        if delta.error_code == "context_length_exceeded":
            raise ContextLengthExceeded("The request needs more context than a replica of this model has.")
        log.error("request %s: the engine ended it: %s %s", self.job.id, delta.error_code, delta.error)
        raise InternalError("The engine failed on this request.")


def _was_asked_to_end(deltas: Sequence[wire.Delta]) -> bool:
    return any(delta.error_code == "engine_shutdown" for delta in deltas)


class Gateway:
    """Makes jobs of requests and runs them on the fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.in_flight = 0
        self.retrying = 0
        """Sequences on a further attempt that has not brought a token yet."""
        self.settled = Pulse()
        """One of those, or of those on trial, has brought its token, or ended."""
        self.suspects = Suspects()
        self.trials: set[str] = set()
        """Replicas on which a suspect is tried now."""

    # ── down: a request becomes a job ─────────────────────────────────────────────────────────────────────

    @contextmanager
    def admit(self, served: ServedModel, sequences: int) -> Iterator[None]:
        """Hold places for `sequences` in the model's queue.

        Raises `ModelStopped`, `QueueFull`, and `InvalidRequest` when there are more sequences than places.
        """
        served.check_wanted()
        places = served.slots + served.route.max_queue_length
        if served.ready and sequences > places:
            raise InvalidRequest(
                f"The request asks for {sequences} sequences ('n' for each prompt); this model takes at most "
                f"{places} at a time. Lower 'n', or send fewer prompts at once.",
                param="n",
            )
        full = served.in_flight + sequences > places
        if full and (served.ready or served.in_flight):  # with none ready, one request may always wait for one
            raise QueueFull(
                f"{served.in_flight} requests run or wait for this model, as many as it takes.", retry_after=1.0
            )
        served.in_flight += sequences
        self.in_flight += sequences
        try:
            yield
        finally:
            served.in_flight -= sequences
            self.in_flight -= sequences

    async def chat(
        self, request: ChatRequest, served: ServedModel, size: int, arrived_at: float, span: RequestSpan
    ) -> Job:
        """The job of a chat request; `size` is its body's, in bytes. Raises `InvalidRequest` and `TextError`."""
        tokenizer = served.usable
        variables = request.chat_template_kwargs or {}
        for name in variables:
            if not name.isidentifier() or name.startswith("_") or name in RESERVED:
                raise InvalidRequest(
                    "'chat_template_kwargs' has a name that requests may not set.", param="chat_template_kwargs"
                )
        goes_on = bool(request.continue_final_message)
        prompted = request.add_generation_prompt if request.add_generation_prompt is not None else not goes_on

        def ids() -> list[int]:
            text = tokenizer.render(
                [message.for_template() for message in request.messages],
                add_generation_prompt=prompted,
                continue_final_message=goes_on,
                **variables,
            )
            return tokenizer.encode(text, add_special_tokens=bool(request.add_special_tokens))

        began = time.monotonic()
        prompt = await _off_loop_if_long(ids, size)
        _tokenized(span, began, len(prompt))
        return self._job(
            request,
            served,
            tokenizer,
            (prompt,),
            (),
            request.wanted_logprobs,
            f"chatcmpl-{uuid.uuid4().hex}",
            arrived_at,
            span,
        )

    async def completion(
        self,
        request: CompletionRequest,
        served: ServedModel,
        size: int,
        arrived_at: float,
        span: RequestSpan,
    ) -> Job:
        """The job of a completion request. Raises `InvalidRequest`."""
        tokenizer = served.usable
        special = request.add_special_tokens is not False
        skip = request.skip_special_tokens is not False

        def ids() -> tuple[list[int], ...]:
            return tuple(
                tokenizer.encode(prompt, add_special_tokens=special) if isinstance(prompt, str) else list(prompt)
                for prompt in request.prompt
            )

        began = time.monotonic()
        prompts = await _off_loop_if_long(ids, size)
        _tokenized(span, began, sum(map(len, prompts)))
        vocab = served.vocab_size
        for given, prompt in zip(request.prompt, prompts, strict=True):
            if not isinstance(given, str) and any(index >= vocab for index in prompt):
                raise InvalidRequest(f"'prompt' has a token id outside the vocabulary of {vocab}.", param="prompt")
        echoes = tuple(
            given if isinstance(given, str) else tokenizer.decode(given, skip_special_tokens=skip)
            for given in (request.prompt if request.echo else ())
        )
        return self._job(
            request,
            served,
            tokenizer,
            prompts,
            echoes,
            request.wanted_logprobs,
            f"cmpl-{uuid.uuid4().hex}",
            arrived_at,
            span,
        )

    def _job(
        self,
        request: SamplingFields,
        served: ServedModel,
        tokenizer: Tokenizer,
        prompts: tuple[list[int], ...],
        echoes: tuple[str, ...],
        logprobs: int | None,
        job_id: str,
        arrived_at: float,
        span: RequestSpan,
    ) -> Job:
        max_tokens = min(_room(served.route, prompt, request) for prompt in prompts)
        if request.min_tokens is not None and request.min_tokens > max_tokens:
            raise InvalidRequest(
                f"'min_tokens' is {request.min_tokens}, and the context has room for {max_tokens}.",
                param="min_tokens",
            )
        bias = request.logit_bias or {}
        if any(index >= served.vocab_size for index in bias):
            raise InvalidRequest(
                f"'logit_bias' has a token id outside the vocabulary of {served.vocab_size}.", param="logit_bias"
            )
        advised = tokenizer.advised
        top_k = _first(request.top_k, advised.top_k, 0)
        sampling = wire.Sampling(
            max_tokens=max_tokens,
            min_tokens=request.min_tokens or 0,
            temperature=_first(request.temperature, advised.temperature, 1.0),
            top_p=_first(request.top_p, advised.top_p, 1.0),
            top_k=max(top_k, 0),
            min_p=_first(request.min_p, advised.min_p, 0.0),
            seed=request.seed,
            stop_token_ids=tuple(request.stop_token_ids or ()),
            ignore_eos=bool(request.ignore_eos),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            repetition_penalty=_first(request.repetition_penalty, advised.repetition_penalty, 1.0),
            logit_bias=bias,
            logprobs=logprobs,
        )
        return Job(
            id=job_id,
            asked_model=request.model,
            model=served,
            tokenizer=tokenizer,
            operation="chat" if isinstance(request, ChatRequest) else "text_completion",
            prompts=prompts,
            echoes=echoes,
            n=request.n or 1,
            sampling=sampling,
            stops=tuple(request.stop or ()),
            include_stop=bool(request.include_stop_str_in_output),
            skip_special_tokens=request.skip_special_tokens is not False,
            stream=bool(request.stream),
            arrived_at=arrived_at,
            span=span,
        )


def _room(route: wire.ModelRoute, prompt: Sequence[int], request: SamplingFields) -> int:
    """Tokens that may follow `prompt`: those asked for, else what is left. Raises when that can never fit."""
    if not prompt:
        raise InvalidRequest("The prompt is empty: it has no token.", param=request.prompt_field)
    asked = request.asked_tokens
    limit = min(route.max_model_len, route.kv_tokens)
    if len(prompt) + (asked or 1) > limit:
        what = "context" if route.max_model_len <= route.kv_tokens else "KV cache"
        raise ContextLengthExceeded(
            f"The {what} of this model holds {limit} tokens; the request needs {len(prompt) + (asked or 1)}: "
            f"{len(prompt)} in the prompt and {asked or 'at least 1'} for the answer. "
            "Shorten the prompt or lower the number of tokens asked for.",
            param=request.prompt_field if len(prompt) >= limit else request.limit_field,
        )
    return asked if asked is not None else limit - len(prompt)


V = TypeVar("V", int, float)


def _first(asked: V | None, advised: V | None, default: V) -> V:
    """The request's word, else the checkpoint's, else OpenAI's default."""
    if asked is not None:
        return asked
    return advised if advised is not None else default


def _tokenized(span: RequestSpan, began: float, tokens: int) -> None:
    span.phase(signals.SPAN_TOKENIZE, began, time.monotonic(), {signals.QUIRE_TOKENS: tokens})


async def _off_loop_if_long(work: Callable[[], W], size: int) -> W:
    return await asyncio.to_thread(work) if size > INLINE_CHARS else work()


# ── up: tokens become text ────────────────────────────────────────────────────────────────────────────────


class Run:
    """One job on the fleet, from its first sequence to its last token."""

    def __init__(self, gateway: Gateway, job: Job) -> None:
        self.job = job
        self.first_token_at: float | None = None
        self._gateway = gateway
        self._metrics = gateway.fleet.metrics.model(job.model.route.model)
        self._choices = [_Choice(job, index) for index in range(len(job.prompts) * job.n)]
        self._bell = asyncio.Event()
        self._held = 0
        self._alarm: asyncio.TimerHandle | None = None
        """Rings the bell when the choices of which nothing has gone out are to be looked after."""
        self._starts: set[asyncio.Task[None]] = set()
        """Choices that are being placed while others go on."""

    @property
    def completion_tokens(self) -> int:
        return sum(choice.generated for choice in self._choices)

    async def updates(self) -> AsyncGenerator[list[Update], None]:
        """Batches of updates until every choice has its finish reason.

        Raises `ServiceUnavailable`, `QueueTimeout`, `EngineUnavailable`, `EngineDied`, `InternalError`,
        `ModelNotFound`. However it ends, no sequence of the job is left running.
        """
        live = {choice.index: choice for choice in self._choices}
        self._metrics.prompt_tokens.inc(self.job.prompt_tokens)
        try:
            if len(self._choices) > 1:
                for choice in self._choices:  # one may have to wait until another has brought its token
                    self._begin(self._place(choice))
            else:
                await self._place(self._choices[0])
            while live:
                await self._ring(live.values())
                batch: list[Update] = []
                lost: list[_Choice] = []
                for choice in list(live.values()):
                    update = self._read(choice, lost)
                    if update is None:
                        continue
                    if not self.job.stream:  # until it is whole, another attempt may have to replace it
                        choice.kept.append(update)
                        if update.finish_reason is None:
                            continue
                    batch += choice.kept or [update]
                    if update.finish_reason is not None:
                        self._end(choice)
                        del live[choice.index]
                if batch:
                    yield batch
                self._recover(lost)
        finally:
            if self._alarm is not None:
                self._alarm.cancel()
            for start in self._starts:
                start.cancel()
            if self._starts:
                await asyncio.gather(*self._starts, return_exceptions=True)
            for choice in self._choices:
                self._end(choice)

    def _begin(self, start: Coroutine[Any, Any, None]) -> None:
        """Place a choice while others go on."""
        task = asyncio.create_task(start)
        task.add_done_callback(lambda _: self._bell.set())
        self._starts.add(task)

    def _recover(self, lost: Sequence[_Choice]) -> None:
        """Begin to start lost choices again, and raise what earlier starts have ended in."""
        if any(choice.sent for choice in lost):
            raise EngineDied("The engine died while it was writing this answer.")
        for choice in lost:
            self._begin(self._again(choice))
        for start in [start for start in self._starts if start.done()]:
            self._starts.discard(start)
            start.result()

    def _read(self, choice: _Choice, lost: list[_Choice]) -> Update | None:
        """The choice's news, counted; a choice whose engine is gone goes to `lost`."""
        sequence = choice.sequence
        if sequence is None:
            return None
        deltas = sequence.take()
        if sequence.lost or any(delta.error_code in ENGINE_GONE for delta in deltas):
            # Leaving the table excuses nobody: a replica that hangs is taken out of it before it is killed.
            if not (sequence.generated or sequence.client.endpoint.draining or _was_asked_to_end(deltas)):
                death = (
                    sequence.client.endpoint.replica_id,
                    sequence.client.endpoint.incarnation,
                    sequence.connection,
                )
                self._gateway.suspects.blame(self._fingerprint(choice), death, tried=choice.trial is not None)
            self._trace(choice, sequence, lost=True)
            choice.sequence = None
            choice.avoid.add(sequence.client.endpoint.replica_id)
            level = logging.INFO if sequence.client.leaving else logging.WARNING
            log.log(level, "request %s: engine gone, attempt %d", self.job.id, choice.attempts)
            lost.append(choice)
            return None
        if not deltas:
            return None
        before = choice.generated
        update = choice.read(deltas)
        if choice.generated and not before:
            if choice.trial is not None:
                self._gateway.suspects.clear(self._fingerprint(choice))
            self._settle(choice)
        self._count(choice, choice.generated - before)
        if update is not None:
            choice.sent = self.job.stream
        return update

    def _count(self, choice: _Choice, tokens: int) -> None:
        if not tokens:
            return
        now = time.monotonic()
        self._metrics.generation_tokens.inc(tokens)
        if self.first_token_at is None:
            self.first_token_at = now
            self.job.span.event(signals.EVENT_FIRST_TOKEN, now)
            self._metrics.time_to_first_token.observe(now - self.job.arrived_at)
        if choice.last_token_at is not None:
            for _ in range(tokens):
                self._metrics.inter_token.observe((now - choice.last_token_at) / tokens)
        choice.last_token_at = now

    async def _ring(self, choices: Iterable[_Choice]) -> None:
        """Wait for news. Raises `QueueTimeout` when a sequence has waited too long for its first step."""
        if self._alarm is None:
            unsent = [choice for choice in choices if not choice.sent]
            if unsent:
                until = min(self._look_after(choice) for choice in unsent)
                self._alarm = asyncio.get_running_loop().call_later(until, self._sound)
        await self._bell.wait()
        self._bell.clear()

    def _sound(self) -> None:
        self._alarm = None
        self._bell.set()

    def _look_after(self, choice: _Choice) -> float:
        """Nothing of a choice has gone out yet: is there hope where it is? Seconds until the next look."""
        sequence = choice.sequence
        if sequence is None or sequence.lost:
            return RECHECK_SECONDS  # it is on its way to another replica
        if sequence.client.stalled and self._choose(choice) is not None:
            sequence.abort()
            sequence.lost = True
            self._bell.set()
            return RECHECK_SECONDS
        if choice.generated:
            return RECHECK_SECONDS
        until_overdue = choice.deadline - time.monotonic()
        if until_overdue > 0:
            return min(max(until_overdue, 0.01), RECHECK_SECONDS)
        if sequence.client.queued(sequence):
            raise QueueTimeout(
                f"The request waited longer for its turn than the {self.job.model.route.max_queue_wait:g} "
                "seconds that this model's manifest allows."
            )
        return RECHECK_SECONDS  # it is being computed: a long prompt is no reason to give up

    async def _place(self, choice: _Choice) -> None:
        """Give the choice's sequence to a replica; while none is ready, hold it as long as the manifest says.

        Raises `EngineUnavailable` when its ids are not those that the model's replicas now understand, and
        `RequestQuarantined` when engines die of it.
        """
        served, suspects = self.job.model, self._gateway.suspects
        choice.deadline = time.monotonic() + served.route.max_queue_wait
        held_since: float | None = None
        try:
            while True:
                changed, settled = self._gateway.fleet.changed, self._gateway.settled.event
                serving = served.tokenizer
                if isinstance(serving, TextError) or serving.fingerprint != self.job.tokenizer.fingerprint:
                    raise EngineUnavailable("The model was changed while the request waited.", retry_after=1.0)
                suspected = bool(suspects) and suspects.is_suspected(self._fingerprint(choice))
                if suspected and suspects.is_condemned(self._fingerprint(choice)):
                    log.warning("request %s is refused: engines have died of it", self.job.id)
                    raise RequestQuarantined(_QUARANTINED)
                client = self._choose(choice, suspected)
                if client is not None and self._start(choice, client, suspected):
                    return
                if self._gateway.fleet.models.get(self.job.asked_model) is not served:
                    raise ModelNotFound(f"The model '{self.job.asked_model}' was taken down.", param="model")
                served.check_wanted()
                left = choice.deadline - time.monotonic()
                if left <= 0:
                    raise ServiceUnavailable(
                        "No replica of this model is ready.", retry_after=served.route.eta or DEFAULT_RETRY_AFTER
                    )
                if held_since is None:
                    held_since = time.monotonic()
                    self._hold(1)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left, RECHECK_SECONDS)):
                        await (settled if suspected and served.ready else changed).wait()
        finally:
            if held_since is not None:
                self._hold(-1)
                until = choice.sent_at if choice.sequence is not None else time.monotonic()
                self.job.span.phase(signals.SPAN_HOLD, held_since, until, self._which(choice))

    def _hold(self, choices: int) -> None:
        """Count the choices that are held; the gauge counts requests."""
        before, self._held = self._held, self._held + choices
        self._metrics.held.inc(bool(self._held) - bool(before))

    def _choose(self, choice: _Choice, suspected: bool = False) -> EngineClient | None:
        """The replica that is to have the choice now; a suspect gets none on which another one is tried."""
        clients = {
            client.endpoint.replica_id: client
            for client in self.job.model.clients
            if not (suspected and client.endpoint.replica_id in self._gateway.trials)
        }
        chosen = choose((client.candidate() for client in clients.values()), choice.avoid)
        return clients[chosen] if chosen is not None else None

    def _fingerprint(self, choice: _Choice) -> bytes:
        """Made when there is somebody to suspect, and not before."""
        if choice.fingerprint is None:
            route = self.job.model.route
            choice.fingerprint = quarantine.fingerprint(
                route.model, route.template_hash, choice.prompt, choice.sampling
            )
        return choice.fingerprint

    def _start(self, choice: _Choice, client: EngineClient, suspected: bool) -> bool:
        """Whether the sequence is on its way; a connection that broke this moment says no."""
        request = wire.Generate(
            id=f"{self.job.id}-{choice.index}-{choice.attempts}",
            token_ids=choice.prompt,
            sampling=choice.sampling,
            trace=self.job.span.traceparent,
        )
        choice.sent_at = time.monotonic()
        try:
            choice.sequence = client.start(request, self._bell)
        except NotConnected:
            return False
        if suspected:
            choice.trial = client.endpoint.replica_id
            self._gateway.trials.add(choice.trial)
        choice.attempts += 1
        return True

    async def _again(self, choice: _Choice) -> None:
        """Start a lost choice once more. Raises `EngineUnavailable` after too many, and as `_place` does."""
        self._settle(choice)
        deadline = time.monotonic() + self.job.model.route.max_queue_wait
        while choice.attempts <= MAX_RETRIES and time.monotonic() < deadline:
            settled = self._gateway.settled.event
            if may_retry(self._gateway.retrying, self._gateway.in_flight):
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECHECK_SECONDS):
                    await settled.wait()
        else:
            raise EngineUnavailable(
                f"The engine died under this request, at attempt {choice.attempts}.", retry_after=1.0
            )
        self.job.span.event(signals.EVENT_RETRY, time.monotonic(), choice.where)
        choice.retrying = True
        self._gateway.retrying += 1
        choice.begin()
        await self._place(choice)

    def _settle(self, choice: _Choice) -> None:
        """The choice is no longer on a further attempt, nor on trial."""
        if choice.retrying:
            choice.retrying = False
            self._gateway.retrying -= 1
            self._gateway.settled.fire()
        if choice.trial is not None:
            self._gateway.trials.discard(choice.trial)
            choice.trial = None
            self._gateway.settled.fire()

    def _end(self, choice: _Choice) -> None:
        """Nothing of the choice runs on; may be called twice."""
        self._settle(choice)
        sequence, choice.sequence = choice.sequence, None
        if sequence is None:
            return
        sequence.abort()
        self._trace(choice, sequence, lost=sequence.lost)
        timings = choice.timings
        if timings is not None and timings.scheduled_at is not None:
            self._metrics.queue_time.observe(max(timings.scheduled_at - timings.received_at, 0.0))

    def _which(self, choice: _Choice) -> dict[str, Any]:
        """Attributes that tell one sequence of the job from its others; none where there is one."""
        return {signals.QUIRE_CHOICE: choice.index} if len(self._choices) > 1 else {}

    def _trace(self, choice: _Choice, sequence: engine_client.Sequence, *, lost: bool) -> None:
        """Note where the time of the attempt that ends now went."""
        where = {signals.QUIRE_REPLICA: sequence.client.endpoint.replica_id, **self._which(choice)}
        if choice.attempts > 1:
            where[signals.QUIRE_ATTEMPT] = choice.attempts
        if lost:
            where[signals.ERROR_TYPE] = "engine_died"
        self.job.span.sequence(
            SequenceTimes(choice.sent_at, time.monotonic(), choice.timings, len(choice.prompt), choice.generated),
            where,
        )
        choice.where = where
