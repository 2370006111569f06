"""One request as the fleet sees it (`Job`), and each of its sequences on the way from ids to text (`Choice`)."""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgspec

from quire.errors import ContextLengthExceeded, InternalError, InvalidRequest, OutOfTime, QueueFull, TimedOut
from quire.router import engine_client
from quire.router.access import EVERYBODY, Caller
from quire.router.fleet import ServedModel
from quire.router.spans import RequestSpan
from quire.router.traffic import PLAIN, Terms
from quire.text import AnswerText, Markup, Tokenizer
from quire.text.dialects.parts import CallArguments, CallBegins, Content, Part, Plain, Reasoning
from quire_schemas import wire
from quire_schemas.failures import Retried

log = logging.getLogger("quire.router")
T = TypeVar("T")
AT_ONCE: Final = 32
"""Texts of one request whose vectors are made at a time, so that a long list leaves room for others."""
INLINE_NUMBERS: Final = 4096
"""Log-probabilities, or numbers of vectors, of an answer that is written on the event loop: some milliseconds."""
VECTOR_BYTES: Final = 4
"""Of each number of a vector, as engines send it."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What an answer shows besides text."""

    logprobs: int | None = None
    """Alternatives at each position, as the request counts them."""
    prompt_logprobs: int | None = None
    token_ids: bool = False
    tokens_as_ids: bool = False
    reasoning: bool = True
    """What the model thought, apart from its answer."""
    prompt_text: bool = False
    ending: bool = False
    """Among the log-probabilities those of the token that ended the text."""
    metrics: bool = False
    """Where the time of the request went."""


@dataclass(slots=True)
class Job:
    """One request, ready for engines. It is made its caller's before a run has it; nothing changes it then."""

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
    """Sequences of each prompt."""
    kept: int
    """Those of them that the answer has: the best, where it is not all."""
    sampling: wire.Sampling
    shown: Shown
    stops: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    stream: bool
    arrived_at: float
    span: RequestSpan
    priority: int = 0
    cache_salt: str = ""
    timeout: float | None = None
    """Seconds from `arrived_at` that all of it may take."""
    pooling: wire.Pooling | None = None
    """Vectors are wanted instead of text."""
    background: bool = False
    """Nobody waits for it."""
    caller: Caller = EVERYBODY
    beam: wire.BeamSearch | None = None
    """The `n` texts of each prompt are looked for together."""
    as_base64: bool = False
    """How vectors are to be written."""
    pairs: tuple[tuple[int, int], ...] = ()
    """The prompts whose vectors are compared, by their places."""
    prompt_alone: bool = False
    """No text is wanted: the one token that an engine draws is left out."""
    constrained_by: str = ""
    """The field of the request that the answer is held to, if one is."""
    markup: Markup | None = None
    """How thoughts and calls are read out of the answer's text; None: it is content and nothing else."""
    terms: Terms = PLAIN
    adapter: str = ""
    """The one of the model's that is asked for."""
    begun_at: float | None = None
    """When it was given to this model, if another one had it before."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def target(self) -> str:
        """What answers: the model, or it with its adapter."""
        return self.model.target(self.adapter)

    @property
    def drawn(self) -> int:
        """Sequences that an engine is asked for, for each prompt."""
        return self.n if self.beam is None else 1

    @property
    def at_once(self) -> int:
        """Sequences of it that are begun before any has ended."""
        return AT_ONCE if self.pooling is not None else len(self.prompts) * self.drawn

    @property
    def width_field(self) -> str:
        """The field of the request that says how many texts are made of each prompt."""
        return "best_of" if self.kept < self.n else "n"

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def most_tokens(self) -> int:
        """Tokens that it can come to: its prompts, and all that may be written to them."""
        written = 0 if self.prompt_alone or self.pooling is not None else self.sampling.max_tokens
        return self.prompt_tokens + len(self.prompts) * self.n * written

    @property
    def ends_at(self) -> float | None:
        """When its time is over, if it set itself one, or its route does; the smaller counts."""
        given = [seconds for seconds in (self.timeout, self.terms.request) if seconds is not None]
        return self.arrived_at + min(given) if given else None

    @property
    def first_by(self) -> float | None:
        """When its first token has to be there, if its route says so."""
        if self.terms.first_token is None:
            return None
        return (self.arrived_at if self.begun_at is None else self.begun_at) + self.terms.first_token

    def out_of_time(self) -> OutOfTime:
        """The error that it ends with at `ends_at`."""
        if self.timeout is not None and (self.terms.request is None or self.timeout <= self.terms.request):
            return OutOfTime(f"The request was not complete within the {self.timeout:g} seconds of its 'timeout'.")
        return OutOfTime(
            f"The request was not complete within the {self.terms.request:g} seconds that its route allows."
        )

    def without_first(self) -> TimedOut:
        """The error that it ends with at `first_by`."""
        return TimedOut(f"No token came within the {self.terms.first_token:g} seconds that its route allows.")

    @property
    def is_large(self) -> bool:
        """Whether writing its answer may take so long that others would notice."""
        scored = self.sampling.asks_for_many or self.sampling.prompt_logprobs is not None
        return scored or bool(self.pairs) or self.shown.prompt_text

    async def written(self, write: Callable[[], T], updates: Sequence[Update] = ()) -> T:
        """What `write` gives of the answer, or of these updates of it, without others having to wait for it."""
        return await asyncio.to_thread(write) if self.is_large or self._is_much(updates) else write()

    def _is_much(self, updates: Sequence[Update]) -> bool:
        """Whether updates, each with little, come to what takes long to write."""
        if self.pooling is not None:
            return sum(len(update.embedding or b"") for update in updates) > INLINE_NUMBERS * VECTOR_BYTES
        entries = 1 + (self.shown.logprobs or 0)
        return (
            self.shown.logprobs is not None
            and entries * sum(len(update.scores) for update in updates) > INLINE_NUMBERS
        )

    def token_text(self, index: int) -> str:
        """A token's name in log-probabilities."""
        return f"token_id:{index}" if self.shown.tokens_as_ids else self.tokenizer.token_text(index)

    def token_key(self, index: int) -> str:
        """A token's name where each must have its own."""
        if self.shown.tokens_as_ids:
            return f"token_id:{index}"
        return self.tokenizer.keys.get(index) or f"token_id:{index}"

    def new_call_id(self) -> str:
        """An id for a call of an answer."""
        if self.markup is None:
            raise InternalError("An answer that is not read has no calls.")
        return self.markup.new_call_id()

    @property
    def fingerprint(self) -> str:
        """Names the revision that serves, by its number and by the hash of what it declares for its replicas."""
        route = self.model.route
        return f"fp_{route.revision}_{route.template_hash[:10]}"


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token of an answer with its log-probabilities; `offset` counts characters from the answer's start."""

    offset: int
    until: int
    """The token may be shown once this many characters are out: all of its own, and at least one."""
    scores: wire.TokenLogprobs


@dataclass(frozen=True, slots=True)
class Times:
    """When the tokens of a sequence that has ended came, by the router's clock, and how many."""

    first_at: float
    last_at: float
    queued: float
    """Seconds that it waited in the engine's queue."""
    tokens: int


@dataclass(slots=True)  # not frozen: there is one for each piece of a stream, and that takes three times as long
class Update:
    """What one choice gained since its last update. The last has a finish reason: `stop`, `tool_calls` (as `stop`,
    and there were calls), `length`, `repetition`.

    `token_ids` are all that were drawn, also one that ended the text. `prompt_scores` come with the first one.
    """

    index: int
    text: str
    scores: tuple[TokenScore, ...]
    finish_reason: str | None
    token_ids: tuple[int, ...] = ()
    parts: tuple[Part, ...] = ()
    """What the text says once its markup is read."""
    prompt_scores: tuple[wire.TokenLogprobs, ...] = ()
    embedding: bytes | None = None
    """The vector, where one was asked for."""
    beams: tuple[Update, ...] = ()
    """What a beam search found, the best first: the updates that stand for this one."""
    stop_reason: str | int | None = None
    """The stop string, or the id among the request's `stop_token_ids`, that ended the text."""
    times: Times | None = None
    """Of the last update, where the answer is to tell."""


class Choice:
    """One sequence's way from ids to text, over all its attempts."""

    __slots__ = (
        "_arguments",
        "_called",
        "_marks",
        "_out",
        "_reader",
        "_thinking",
        "attempts",
        "avoid",
        "cached_tokens",
        "came",
        "deadline",
        "fingerprint",
        "first_token_at",
        "generated",
        "ids",
        "index",
        "job",
        "kept",
        "last_token_at",
        "lost_by",
        "migrations",
        "num_scored",
        "prompt",
        "prompt_index",
        "prompt_scores",
        "reasoning_tokens",
        "sampling",
        "scores",
        "sent",
        "sent_at",
        "sequence",
        "template_hash",
        "text",
        "timings",
        "turn_at",
        "where",
        "written",
    )

    def __init__(self, job: Job, index: int) -> None:
        self.job = job
        self.index = index
        self.prompt_index = index // job.drawn
        self.prompt = job.prompts[self.prompt_index]
        self.sampling = job.sampling.numbered(index)
        if index % job.drawn and not job.stream and job.sampling.prompt_logprobs is not None:
            # the first choice of a prompt brings its log-probabilities, for all
            self.sampling = msgspec.structs.replace(self.sampling, prompt_logprobs=None)
        self.lost_by: Retried = "ConnectionError"
        """How the last attempt failed, if one did."""
        self.attempts = 0
        self.fingerprint: bytes | None = None
        self.avoid: set[str] = set()
        self.deadline = 0.0
        """When it has waited for its turn as long as the manifest allows; being computed is not waiting."""
        self.came = False
        """An engine has computed its prompt, or is at it."""
        self.migrations = 0
        """How often it has gone on elsewhere."""
        self.template_hash = ""
        """Of what its engine runs."""
        self.sent = False
        self.sent_at = 0.0
        """When the attempt that runs was handed to its engine."""
        self.where: dict[str, Any] = {}
        """What spans say of the last attempt that ended."""
        self.sequence: engine_client.Sequence | None = None
        self.begin()

    def begin(self) -> None:
        """Forget what an attempt before has brought."""
        self.text = self._new_text(self.sampling.min_tokens)
        self.reasoning_tokens = 0
        self.scores: list[TokenScore] = []
        self.prompt_scores: list[wire.TokenLogprobs] = []
        self.num_scored = 0
        self.ids: list[int] = []
        self.written = array("q") if self.job.stream and self.job.model.route.max_migrations else None
        """All that were drawn, where another engine may have to go on behind them."""
        self.kept: list[Update] = []
        self.generated = 0
        self.turn_at: float | None = None  # first seen to have its turn
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.timings: wire.Timings | None = None
        self.cached_tokens = 0
        """Of its prompt, when it was first computed."""
        self._out = 0  # characters given out
        markup = self.job.markup
        self._reader = markup.reader() if markup is not None else Plain()
        self._marks = markup.thought_ids if markup is not None else None
        self._thinking = markup is not None and markup.opened
        self._called = False
        self._arguments: list[str] = []

    def read(self, deltas: Sequence[wire.Delta]) -> Update | None:
        """The update that `deltas` make; None when all they bring is held back. Raises what the engine reports."""
        pieces: list[str] = []
        parts: list[Part] = []
        finish: str | None = None
        embedding: bytes | None = None
        stop: str | int | None = None
        for delta in deltas:
            if delta.timings is not None:
                self.timings = delta.timings
                self.came |= delta.timings.scheduled_at is not None
                if not self.migrations:  # else part of it is what an engine before computed
                    self.cached_tokens = delta.timings.cached_tokens
            scores = delta.logprobs or []
            self.prompt_scores += delta.prompt_logprobs or []
            self.num_scored += len(delta.prompt_logprobs or ())
            if self.job.prompt_alone:
                if delta.finish_reason is not None:
                    self._raise_if_failed(delta)
                    finish = "length"
                continue
            text = self.text
            for position, token in enumerate(delta.token_ids):
                self.generated += 1
                self.ids.append(token)
                if self.written is not None:
                    self.written.append(token)
                offset = text.made
                piece = text.push(token)
                if piece:
                    pieces.append(piece)
                    if self._understand(parts, self._reader.push(piece)):
                        finish = "tool_calls"
                self._count_thought(token)
                if position < len(scores):
                    until = max(text.made, offset + 1)
                    self.scores.append(TokenScore(offset, until, scores[position]))
                if finish is not None or text.hit is not None:
                    break
            if finish is not None:
                break
            if self.text.hit is not None:
                finish = "stop"
                break
            if delta.finish_reason is not None:
                self._raise_if_failed(delta)
                if delta.beams is not None:
                    return self._found(delta.beams)
                embedding = delta.embedding
                if delta.stop_token_id is not None:
                    self.generated += 1
                    self.ids.append(delta.stop_token_id)
                    if self.job.shown.ending and len(scores) > len(delta.token_ids):
                        self.scores.append(TokenScore(self.text.made, self.text.made, scores[-1]))
                pieces.append(self.text.finish(delta.stop_token_id))
                self._understand(parts, self._reader.push(pieces[-1]))
                stop = self._named(delta.stop_token_id)
                finish = "stop" if self.text.hit is not None else delta.finish_reason
        made = "".join(pieces)
        self._out += len(made)
        if finish in ("stop", "length", "repetition"):
            last, markup = self._reader.finish(), self.job.markup
            if finish == "length" and markup is not None and not markup.verbatim:
                last = [part for part in last if not markup.is_head(part)]  # markup is nothing to read
            self._understand(parts, last)
        if finish == "stop" and self._called and not (self.text.hit is not None and self._is_cut()):
            finish = "tool_calls"
        ready = tuple(self._ready_scores(ended=finish is not None)) if self.scores else ()
        if not (made or ready or finish):
            return None
        ids, self.ids = tuple(self.ids), []
        prompt_scores, self.prompt_scores = tuple(self.prompt_scores), []
        if self.text.hit is not None:
            stop = self.text.hit
        return Update(
            self.index, made, ready, finish, ids, tuple(parts), prompt_scores, embedding, stop_reason=stop
        )

    def _count_thought(self, token: int) -> None:
        """Count the tokens between the marks of a thought, by their ids where they are tokens."""
        marks = self._marks
        if marks is None:
            self.reasoning_tokens += self._thinking
        elif token in marks:
            self._thinking = token == marks[0]
        else:
            self.reasoning_tokens += self._thinking

    def _is_cut(self) -> bool:
        """Whether the last call is not whole: a stop string may come anywhere."""
        try:
            msgspec.json.decode("".join(self._arguments))
        except msgspec.DecodeError:
            return True
        return False

    def _understand(self, parts: list[Part], read: Sequence[Part]) -> bool:
        """Add to `parts` what was read; whether the answer is to end here, as it has the one call that it may."""
        for part in read:
            match part:
                case Content():
                    self._thinking = False
                case Reasoning():
                    self._thinking = True
                case CallBegins():
                    self._thinking = False
                    if self._called and self.job.markup is not None and self.job.markup.one_call:
                        return True
                    self._called = True
                    self._arguments = []
                case CallArguments():
                    self._arguments.append(part.text)
            parts.append(part)
        return False

    @property
    def may_end_early(self) -> bool:
        """Whether each piece may be the last, as this router sees where the answer ends, or is waited for by the
        client: then the engine may keep nothing back."""
        markup = self.job.markup
        return self.job.stream or bool(self.job.stops) or (markup is not None and markup.one_call)

    @property
    def sampling_left(self) -> wire.Sampling:
        """What is asked of the engine that has it next: log-probabilities of the prompt come once."""
        if self.sent and self.sampling.prompt_logprobs is not None:
            return msgspec.structs.replace(self.sampling, prompt_logprobs=None)
        return self.sampling

    @property
    def times(self) -> Times | None:
        """When its tokens came; None before there are any."""
        if self.first_token_at is None or self.last_token_at is None:
            return None
        return Times(self.first_token_at, self.last_token_at, self.queue_time or 0.0, self.generated)

    @property
    def queue_time(self) -> float | None:
        """Seconds that it waited in the engine's queue; None until that has told."""
        told = self.timings
        if told is None or told.scheduled_at is None:
            return None
        return max(told.scheduled_at - told.received_at, 0.0)

    @property
    def decode_time(self) -> float:
        """Seconds from its first token to its last: by the engine; where a stop string ended it, as seen here."""
        told = self.timings
        if told is not None and told.finished_at is not None and told.first_token_at is not None:
            return max(told.finished_at - told.first_token_at, 0.0)
        if self.first_token_at is None or self.last_token_at is None:
            return 0.0
        return self.last_token_at - self.first_token_at

    @property
    def outcome(self) -> str | None:
        """Whether it has called a tool; None where nobody looked for that."""
        markup = self.job.markup
        if markup is None or markup.verbatim or not markup.tools:
            return None
        return "tool_call" if self._called else "no_tool_call"

    def _named(self, stop_token_id: int | None) -> int | None:
        """The id, if it is one of those that the request named for this."""
        return stop_token_id if stop_token_id in self.sampling.stop_token_ids else None

    def _found(self, beams: Sequence[wire.BeamResult]) -> Update:
        """The update that stands for the texts of a beam search."""
        found: list[Update] = []
        for place, beam in enumerate(beams):
            stop = () if beam.stop_token_id is None else (beam.stop_token_id,)
            self.generated += len(beam.token_ids) + len(stop)
            text = self._new_text()
            whole = "".join(map(text.push, beam.token_ids)) + text.finish(beam.stop_token_id)
            ids = (*beam.token_ids, *stop)
            reader = self.job.markup.reader() if self.job.markup is not None else Plain()
            parts = (*reader.push(whole), *reader.finish())
            self._called = self._called or any(isinstance(part, CallBegins) for part in parts)
            found.append(
                Update(
                    self.index * self.job.n + place,
                    whole,
                    (),
                    beam.finish_reason,
                    ids,
                    parts,
                    stop_reason=self._named(beam.stop_token_id),
                )
            )
        return Update(self.index, "", (), beams[0].finish_reason, beams=tuple(found))

    def _new_text(self, min_tokens: int = 0) -> AnswerText:
        return AnswerText(
            self.job.tokenizer,
            stops=self.job.stops,
            include_stop=self.job.include_stop,
            skip_special_tokens=self.job.skip_special_tokens,
            visible=self.job.markup.visible if self.job.markup is not None else (),
            min_tokens=min_tokens,
        )

    def _ready_scores(self, ended: bool) -> Iterator[TokenScore]:
        """Scores of the tokens whose text is out. What a stop string cut off never shows, in no field."""
        while self.scores and (self.scores[0].until <= self._out or (ended and self.text.hit is None)):
            yield self.scores.pop(0)

    def _strict_tools(self) -> str:
        """Whose parameters an answer is held to, to the letter: the engine knows no names of tools."""
        names = [tool.name for tool in self.job.markup.tools if tool.strict] if self.job.markup is not None else []
        return f" Among tools, it is held to the strict ones: {', '.join(names)}." if names else ""

    def _raise_if_failed(self, delta: wire.Delta) -> None:
        if delta.finish_reason in ("stop", "length", "repetition"):
            if self.sampling.prompt_logprobs is not None and self.num_scored != len(self.prompt) - 1:
                log.error("request %s: %d log-probabilities of its prompt came", self.job.id, self.num_scored)
                raise InternalError("The engine did not tell the log-probabilities of the prompt.")
            return
        if delta.error_code == "invalid_request" and delta.error_param is not None:
            param = self.job.width_field if delta.error_param == "width" else delta.error_param
            raise InvalidRequest(f"'{param}' cannot be honoured: {delta.error}.", param=param)
        if delta.error_code == "invalid_request":
            raise InvalidRequest(f"A replica of this model refuses the request: {delta.error}.")
        if delta.error_code == "no_token_left":
            named = self.sampling.narrowing
            named += [self.job.constrained_by] if self.job.constrained_by else []
            if not named:
                raise InternalError("The engine found no token that it could choose.")
            raise InvalidRequest(
                f"'{named[0]}' leaves no token to choose"
                + (f", with {' and '.join(named[1:])}." if named[1:] else "."),
                param=named[0],
            )
        if delta.error_code == "context_length_exceeded":
            raise ContextLengthExceeded("The request needs more context than a replica of this model has.")
        if delta.error_code == "queue_full":
            raise QueueFull(
                f"A replica of this model has no room for the request now: {delta.error}.", retry_after=1.0
            )
        if delta.error_code == "timeout" and self.job.timeout is not None:
            raise self.job.out_of_time()
        if delta.error_code == "invalid_grammar":
            field = self.job.constrained_by
            raise InvalidRequest(
                f"'{field}' cannot be honoured: {delta.error}.{self._strict_tools()}", param=field
            )
        log.error("request %s: the engine ended it: %s %s", self.job.id, delta.error_code, delta.error)
        raise InternalError("The engine failed on this request.")
