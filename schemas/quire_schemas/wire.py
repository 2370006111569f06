"""What crosses between processes: messages and their framing.

Three conversations use this module.

- **router -> engine** (Unix socket `engine.sock` in the replica's folder): `Hello`/`Welcome`, then
  `Generate`, `Abort`, `Limits` and `GetStats` one way, `Deltas` (one frame a step for all requests) and `Stats`
  the other. The control plane is a client of the same socket that sends `GetStats` alone. The answer, which the
  engine's loop gives between two steps, is the replica's sign of life; the question, that somebody is above it.
- **control plane -> router** (Unix socket `control.sock`): `RoutingTable` one way, `RouterStatus` back. A table
  is absolute and versioned; sending the same one twice changes nothing.
- **control plane -> engine** at start: an `EngineSpec`, written as JSON into the replica's folder; back: one
  `EngineEvent` a line (JSON) on the descriptor the shim handed down, which the shim keeps and passes on unread.

Framing on sockets: four bytes, big-endian length, then that many bytes of MessagePack. A frame that announces
more than `MAX_FRAME` bytes, or that does not decode to one of the expected types, ends the connection: the
peer is not one of ours. Who may speak at all is the kernel's word: `is_same_user`. Times are seconds; those named
`*_at` are `time.monotonic()` of the engine's machine, which routers on the same machine share.

Exceptions:

    WireError
    ├── FrameTooLarge      the announced length is above MAX_FRAME
    └── BadMessage         the bytes are not a message of the expected kinds
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import struct
import sys
from collections.abc import Sequence
from typing import Any, Final, Generic, Literal, TypeVar

import msgspec

from quire_schemas.failures import DEFAULT_ATTEMPTS, Failure, Retried

PROTOCOL = 1
MAX_FRAME = 64 * 1024 * 1024
ADOPTION_WINDOW = 120.0
"""Seconds of the lease of an engine that no Gateway stands above; a Gateway's default is the same."""
_LENGTH = struct.Struct(">I")
_UCRED = struct.Struct("3i")


class WireError(Exception):
    """The peer broke the protocol; the connection cannot go on."""


class FrameTooLarge(WireError):
    """A frame announced more than `MAX_FRAME` bytes."""


class BadMessage(WireError):
    """A frame's bytes are not a message of the kinds expected here."""


# ── router -> engine ──────────────────────────────────────────────────────────────────────────────────────


RunnerKind = Literal["model", "scripted"]
KvDtype = Literal["float32", "bfloat16", "float16", "int8", "fp8"]
"""What carries out an engine's steps: a model, or a script that each request brings."""

Policy = Literal["fcfs", "priority"]
"""Who is scheduled first: by arrival, or by priority and then arrival."""


LogprobsMode = Literal["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"]
"""What is reported of a token: of the model's logits as they are, or as the draw sees them, after penalties, bias,
bans, temperature and filters; as log-probabilities or as logits.
"""

WHOLE_VOCABULARY = -1
"""A number of log-probabilities: all of them."""
MAX_LOGPROB_ENTRIES = 1 << 18
"""Log-probabilities that one request may ask for, where it asks for many at a position or for the prompt's."""
FEW_LOGPROBS = 20
"""More at a position are many."""


MIN_REPETITION_PENALTY = 0.001
MAX_REPETITION_PENALTY = 1000.0
"""A logit times or divided by one of them stays far inside what float32 holds."""


class Repetition(msgspec.Struct, frozen=True, array_like=True):
    """An output ends when its last tokens are one run of `shortest` to `longest` tokens, `count` times over."""

    shortest: int
    longest: int
    count: int


class Thinking(msgspec.Struct, frozen=True, array_like=True):
    """At most `budget` tokens between the ids that open and those that close a thought, over all thoughts of an
    output; then `closing` is forced."""

    budget: int
    opening: tuple[int, ...]
    closing: tuple[int, ...]


MAX_STRUCTURED = 64 * 1024
"""Bytes of UTF-8 that the text of a `Structured` may have."""


class Structured(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a sequence's text must be, from its first token to its end.

    `text` is, by kind: a JSON Schema; a regular expression without look-around, for the whole text; a JSON list
    of strings, one of which the text is; a grammar in Lark's notation as llguidance reads it; a JSON object
    with `structures` (each with `begin`, `schema`, `end`) and `triggers`; or a form.

    A form is a tree of JSON objects, each with one of these:

        {"text": "…"}                         exactly this; special tokens named in it are such tokens
        {"through": "…", "least": 0, "most": null}
                                              any text, of so many characters, and this, where it first comes
        {"schema": {…}, "lenient": false}     JSON that fits; where it is lenient, and the engine cannot hold
                                              to the schema, JSON of the schema's type
        {"regex": "…"}                        what matches
        {"sequence": [form, …]}               one after the other
        {"any": [form, …]}                    one of them
        {"repeat": form, "least": 0, "most": null, "between": form}
        {"some": [form, …], "between": form}  some of them, or none, in their order
        {"root": {…}, "form": form}           the form; each `$ref` in its schemas is into this schema, of which
                                              nothing else holds. Roots in it are of what is in them
        {"structured": {"kind": …, "text": …, "whitespace": …}, "begins": […]}
                                              what another constraint allows; free text has `begins`, as below
        {"free": [{"mark": "…", "then": form}, …], "begins": [{"mark": "…", "then": form, "again": false}, …]}
                                              any text; each mark in it begins its form, as do those of `begins` at
                                              the text's beginning, white space aside. Behind a form of the latter
                                              nothing follows, or `again` such a text, from its beginning

    An engine refuses a shape that it does not know, but does not notice what else is in one that it knows: a new
    shape has words of its own.
    """

    kind: Literal["json_schema", "regex", "choice", "grammar", "structural_tag", "form"]
    text: str
    whitespace: str | None = None
    """In JSON: a regular expression for what may stand, once, between two of its signs. None: a blank, or a line
    end and an indent; empty: nothing.
    """


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one request's tokens are chosen. The router has already checked every bound.

    `temperature` 0 is greedy (lowest id wins a tie). `top_k` 0 is off. `seed` None draws one per request.
    `stop_token_ids` end the text and are not part of it; `eos` handling is the engine's unless `ignore_eos`.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] = ()
    """No other id is chosen; none given: any may be."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Runs of ids that never come whole into the output: the last one is not chosen after all before it."""
    thinking: Thinking | None = None
    repetition: Repetition | None = None
    logprobs: int | None = None
    """None: off. k >= 0: the chosen token's log-probability and those of the k likeliest. -1: of all."""
    logprob_token_ids: tuple[int, ...] = ()
    """Ids whose log-probabilities are reported at every position, besides those that `logprobs` asks for."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, but for its first. The prompt is then computed, not read from a
    cache. Nothing is processed there: `logprobs_mode` decides between logits and log-probabilities alone."""
    logprobs_mode: LogprobsMode = "raw_logprobs"
    script: tuple[int, ...] | None = None
    """The tokens of the answer, for an engine with the scripted runner alone; None: those of the prompt."""
    structured: Structured | None = None
    """With it an end-of-sequence token comes where, and only where, the constraint lets the text end."""

    def numbered(self, index: int) -> Sampling:
        """That of the `index`-th answer: those of one seeded request differ, and repeat from run to run."""
        if self.seed is None or index == 0:
            return self
        return msgspec.structs.replace(self, seed=(self.seed + index) % 2**63)

    @property
    def narrowing(self) -> list[str]:
        """What may leave no token to choose, by the names that requests have for it."""
        names = ("allowed_token_ids", "bad_words", "min_tokens", "logit_bias")
        named = [name for name in names if getattr(self, name)]
        return named + (["thinking_token_budget"] if self.thinking is not None else [])

    @property
    def asks_for_many(self) -> bool:
        """Whether a position may have more log-probabilities than `FEW_LOGPROBS` of each kind."""
        return (
            WHOLE_VOCABULARY in (self.logprobs, self.prompt_logprobs) or len(self.logprob_token_ids) > FEW_LOGPROBS
        )

    def logprob_entries(self, num_prompt: int, vocab_size: int) -> int:
        """What counts against `MAX_LOGPROB_ENTRIES`, for a prompt of so many tokens."""
        named = len(self.logprob_token_ids)

        def each(count: int) -> int:
            return (vocab_size if count == WHOLE_VOCABULARY else count + 1) + named

        entries = 0
        if self.logprobs is not None and (self.logprobs == WHOLE_VOCABULARY or named > FEW_LOGPROBS):
            entries += self.max_tokens * each(self.logprobs)
        if self.prompt_logprobs is not None:
            entries += (num_prompt - 1) * each(self.prompt_logprobs)
        return entries


class Pooling(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which vector is made of a prompt's final hidden states, behind the model's last norm."""

    kind: Literal["mean", "last"]
    """Of all tokens, or of the last one."""
    normalize: bool = True
    """To length 1, after `dimensions`."""
    dimensions: int | None = None
    """The leading ones alone; None for all."""


class Hello(msgspec.Struct, tag=True):
    """First frame of a client of an engine."""

    role: Literal["router", "control", "script"]
    protocol: int = PROTOCOL


class Welcome(msgspec.Struct, tag=True):
    """The engine's answer to `Hello`: who it is and the bounds it was built with."""

    replica_id: str
    incarnation: int
    protocol: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    lease: float = ADOPTION_WINDOW
    """A router or control plane that stays silent this many seconds is taken for gone."""
    goes_on: bool = False
    """It knows `Generate.written`."""


class BeamSearch(msgspec.Struct, frozen=True, omit_defaults=True):
    """Look for the `width` best texts instead of drawing one. Score: log-probability ÷ tokens ^
    `length_penalty`.
    """

    width: int
    length_penalty: float = 1.0


class BeamResult(msgspec.Struct, frozen=True, array_like=True):
    """One text that a beam search found. `logprob` is the sum over its tokens, the stop token included."""

    token_ids: list[int]
    logprob: float
    finish_reason: Literal["stop", "length"]
    stop_token_id: int | None = None


class Generate(msgspec.Struct, tag=True):
    """Start one sequence. `id` is unique among the connection's live requests."""

    id: str
    token_ids: list[int]
    sampling: Sampling
    beam: BeamSearch | None = None
    """The whole answer is then the last delta's `beams`; of `sampling` only the bounds and stop ids count."""
    priority: int = 0
    """Lower goes first, where the policy is `priority`."""
    background: bool = False
    """Nobody waits for it: whatever the policy, it comes after all that is not, and makes room for it."""
    lent: bool = False
    """Its tenant has his part of the seats without it: where the policy is `fcfs` it comes after those of which
    that is not so, and makes room for them."""
    timeout: float | None = None
    """Seconds from its receipt after which it ends with the error `timeout`."""
    cache_salt: str = ""
    """Its blocks are found only by requests of the same salt."""
    family: str | None = None
    """Sequences of one request, which have one family, share the blocks of their prompt, also without a prefix
    cache.
    """
    trace: str | None = None
    """W3C traceparent of the request's span; the engine's log shows it with a request that fails."""
    pooling: Pooling | None = None
    """Draw nothing: the one delta has the `embedding` of the prompt. `sampling` means nothing then."""
    written: tuple[int, ...] = ()
    """Tokens of the answer that another engine has drawn: it goes on behind them. `sampling` is still that of the
    whole answer. Only for engines that say `Welcome.goes_on`."""
    adapter: str = ""
    """Name of one of `EngineSpec.adapters`; empty: the model as it is. Only for engines that are known to have it:
    an older one would pass over the field."""
    patience: float = 0.0
    """Seconds that what is drawn behind the first token may wait, to be told together with what follows. What ends
    the sequence is told at once, with all that has waited."""


class Abort(msgspec.Struct, tag=True):
    """Stop a sequence and free its blocks within one step. Unknown ids are no error: it may just have ended."""

    id: str


class Limits(msgspec.Struct, tag=True):
    """The hot knobs of a running engine. The answer is a `Stats` that carries the same `hot_hash`."""

    hot_hash: str
    max_num_seqs: int
    max_num_batched_tokens: int
    chunked_prefill: bool
    policy: Policy = "fcfs"
    max_waiting: int | None = None
    max_prefill_tokens: int | None = None


class GetStats(msgspec.Struct, tag=True):
    """Ask for a `Stats`. It is answered between two steps, so an engine that makes no step gives no answer."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, or logits, as `Sampling.logprobs_mode` says.

    `top` are the likeliest, in order. `named` belong to `Sampling.logprob_token_ids`, one by one. `rank` is the
    place among all of a prompt's token, from 1; 0 for one that was drawn.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0
    named: tuple[float, ...] = ()


class Timings(msgspec.Struct, frozen=True, omit_defaults=True):
    """When one request went where. Monotonic seconds of the engine's machine.

    Sent with the delta of its first token, so that a request which is aborted later has told where its time went,
    and with its last delta, which alone has `finished_at`.
    """

    received_at: float
    scheduled_at: float | None = None
    """When it was first let into a step."""
    first_token_at: float | None = None
    finished_at: float | None = None
    preempted_at: tuple[float, ...] = ()
    """Each time it lost its blocks to another request, to be computed again."""
    cached_tokens: int = 0
    """Tokens of its prompt that were in the cache when it was first let in."""


FinishReason = Literal["stop", "length", "repetition", "abort", "error"]


class Delta(msgspec.Struct, omit_defaults=True, gc=False):
    """What one step gave one request: new ids (a stop token is not among them), and its end if it ended."""

    id: str
    token_ids: tuple[int, ...] = ()
    logprobs: list[TokenLogprobs] | None = None
    """Of the ids, and behind them of the stop token, if one ended the text."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Of the next tokens of the prompt, in order, beginning with its second."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The id that ended the text when `finish_reason` is stop."""
    error_code: str | None = None
    """Set when `finish_reason` is error: a word of the error contract, such as `context_length_exceeded`."""
    error: str | None = None
    """What went wrong. With `invalid_request`, `invalid_grammar` and `queue_full` it is for the client to read."""
    error_param: str | None = None
    """The part of `BeamSearch` or `Pooling` that is at fault, if one is."""
    timings: Timings | None = None
    beams: list[BeamResult] | None = None
    """Of a beam search that has ended: the texts found, the best first."""
    embedding: bytes | None = None
    """The vector that `Generate.pooling` asked for, little-endian float32; `finish_reason` is stop."""


def joined(deltas: Sequence[Delta]) -> Delta:
    """What several deltas of one sequence say, as one; only the last may be its end."""
    *before, last = deltas
    if not before:
        return last
    scores = [each for delta in deltas for each in delta.logprobs or ()]
    of_prompt = [each for delta in deltas for each in delta.prompt_logprobs or ()]
    last.token_ids = tuple([token for delta in deltas for token in delta.token_ids])
    last.logprobs, last.prompt_logprobs = scores or None, of_prompt or None
    last.timings = next((delta.timings for delta in reversed(deltas) if delta.timings is not None), None)
    return last


class Deltas(msgspec.Struct, tag=True):
    """All that one step gave to the requests of this connection."""

    step: int
    items: list[Delta]


class Stats(msgspec.Struct, tag=True):
    """The engine's state: sent after `Hello`, `Limits` and `GetStats`, and at most four times a second while it
    runs."""

    steps: int
    max_num_seqs: int
    """The limit in force, which `Limits` may have changed since `Welcome`."""
    last_step_at: float
    running: int
    waiting: int
    blocks_total: int
    blocks_used: int
    kv_slots_used: int
    """Tokens that lie in allocated blocks; waste is allocated slots minus this."""
    preemptions: int
    prompt_tokens: int
    generation_tokens: int
    hot_hash: str
    prefix_queried_tokens: int = 0
    """Tokens of requests that might have found them computed, counted each time one was let in."""
    prefix_hit_tokens: int = 0
    """Those of them that were found."""
    blocks_cached: int = 0
    """Free blocks that a request which begins alike would find."""
    oldest_running_at: float | None = None
    """When the running request that was let in first was let in."""
    blocks_saved: int = 0
    """Blocks that would be in use besides if no running requests shared one."""
    deferred: int = 0
    """Of those that wait: not for room, but for their constraint to be compiled."""
    computed_tokens: int = 0
    """Those of all steps, of prompts and of answers."""
    steps_by_tokens: tuple[int, ...] = ()
    """Steps by how many tokens they computed, between the bounds of `signals.ITERATION_TOKENS_BUCKETS`."""
    cpu_seconds: float = 0.0
    """Processor time of the engine's process."""
    resident_bytes: int = 0
    """Its memory on the host; 0 where the system does not tell."""


ToEngine = Hello | Generate | Abort | Limits | GetStats
FromEngine = Welcome | Deltas | Stats


# ── control plane -> router ───────────────────────────────────────────────────────────────────────────────


class ReplicaEndpoint(msgspec.Struct, frozen=True):
    """Where one replica listens. `draining` replicas keep their streams and get no new request.

    `standby` replicas are connected and get no new request either: their revision has another tokenizer or
    template than the route's, so ids made for one would be nonsense to the other. During a rollout the group
    with the most ready replicas serves, the newer one in a tie.
    """

    replica_id: str
    incarnation: int
    socket: str
    draining: bool = False
    standby: bool = False
    template_hash: str = ""
    """Of what it runs: answers go on only where that is the same."""
    adapters: tuple[str, ...] = ()
    """Those that it has."""


class Prices(msgspec.Struct, frozen=True):
    """What one token costs, in `TICKS` of one unit of money."""

    input: int
    cached_input: int
    output: int


class BreakerRules(msgspec.Struct, frozen=True):
    """When a replica that fails gets no requests, and for how long. Times are seconds."""

    failures: int = 5
    """In a row."""
    share: float = 0.5
    """Of the last ones, where there are `requests` of them in `window`."""
    window: float = 30.0
    requests: int = 20
    pause: float = 5.0
    """The first time, doubled each time after it, up to `longest`."""
    longest: float = 300.0
    out: float = 0.5
    """Share of a model's replicas that are kept out at most, unless all fail."""


BreakerState = Literal["closed", "open", "trying"]


class Question(msgspec.Struct, frozen=True, omit_defaults=True):
    """What somebody might ask, as the one message of a conversation; of a model without template as its text."""

    prompt: str
    max_tokens: int
    expects: str = ""
    """What the answer must contain."""


class Exam(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a canary is asked before it has any request."""

    smoke: tuple[Question, ...] = ()
    """Its own answers count."""
    drift: tuple[Question, ...] = ()
    """What it makes of the stable revision's answers."""


class ModelRoute(msgspec.Struct, frozen=True):
    """All the router needs to serve one model by its names."""

    model: str
    names: tuple[str, ...]
    revision: int
    template_hash: str
    tokenizer_dir: str
    """Folder with tokenizer.json, tokenizer_config.json and generation_config.json."""
    chat_template_file: str | None
    max_model_len: int
    kv_tokens: int
    """Tokens that one replica's whole KV pool holds: no request can need more."""
    max_queue_length: int
    max_queue_wait: float
    created: int
    """Unix seconds, for /v1/models."""
    replicas: tuple[ReplicaEndpoint, ...]
    eta: float | None = None
    """Seconds until a replica is expected ready, when none is; None when not known."""
    stopped: bool = False
    """No replica is wanted: waiting for one is in vain."""
    paused: bool = False
    """Because somebody paused it, for a time or until it is resumed."""
    scripted: bool = False
    """The runner of its replicas is `scripted`: requests may bring their script."""
    stall_seconds: float = 30.0
    """Seconds without progress (deltas, a step, or an answer to `GetStats`) after which a replica is not ready."""
    policy: Policy = "fcfs"
    """Whether requests may have a priority."""
    prefix_caching: bool = False
    """Whether engines keep the blocks of prompts: a request then goes where its beginning is known."""
    tool_dialect: str | None = None
    reasoning_dialect: str | None = None
    """How calls and thoughts are written, by the manifest; None: as the chat template shows."""
    wanted: int = 0
    """Replicas that there are to be now."""
    restarts: int = 0
    """How often in a row the replica that fares worst has ended without having served."""
    on_demand: bool = False
    """The router tells of its use (`RouterStatus.uses`), because replicas come and go by it."""
    max_migrations: int = 0
    """How often a stream whose engine died goes on at another one."""
    prices: Prices | None = None
    """None: requests cost nothing."""
    breaker: BreakerRules = BreakerRules()
    canary_of: str = ""
    """Of a new revision that has a share of a model's requests, that model. Nobody asks for it by a name."""
    percent: int = 0
    """That share."""
    exam: Exam | None = None
    """What it is asked now, while it has none of them."""
    chat_template: str | None = None
    """What `chat_template_file` held when the revision was made. None: there is no such file, or a version that
    did not keep it made the revision."""
    adapters: tuple[AdapterRoute, ...] = ()
    """Those that requests may ask for."""


ADAPTER_MARK: Final = ":"
"""Stands between the name of a Model, which has none, and that of one of its adapters."""


class AdapterRoute(msgspec.Struct, frozen=True):
    """An adapter of a model, and the names of its own that requests have for it."""

    name: str
    names: tuple[str, ...] = ()


class Backend(msgspec.Struct, frozen=True):
    """A share of a route's requests. `model` is the name of a Model, here and below; one of its adapters may stand
    behind `ADAPTER_MARK`."""

    model: str
    weight: int


class Fallback(msgspec.Struct, frozen=True):
    """A model that steps in for one that failed in one of these ways."""

    model: str
    when: tuple[Failure, ...]


class Mirror(msgspec.Struct, frozen=True):
    """A model that gets copies of a share of the requests."""

    model: str
    percent: int


class TrafficRoute(msgspec.Struct, frozen=True):
    """A Route: which requests it takes, and where they go. Its models need not be in the table."""

    route: str
    names: tuple[str, ...]
    created: int
    """Unix seconds, for /v1/models; of two that match alike the older has the request."""
    backends: tuple[Backend, ...]
    headers: tuple[tuple[str, str], ...] = ()
    """Names, in small letters, and values."""
    sticky: str = "prefix"
    """prefix, none, user, or header: with the name of one in small letters."""
    fallbacks: tuple[Fallback, ...] = ()
    first_token: float | None = None
    request: float | None = None
    """Seconds."""
    attempts: int = DEFAULT_ATTEMPTS
    retried: tuple[Retried, ...] = ("ConnectionError", "503")
    mirror: Mirror | None = None


AccessLogged = Literal["none", "errors", "all"]
"""Which requests have a line in the router's log."""


class HttpSettings(msgspec.Struct, frozen=True):
    """What of the gateway's manifest changes while its router runs."""

    max_body_bytes: int = 4 * 1024 * 1024
    allow_origins: tuple[str, ...] = ()
    """Origins whose web pages may call besides those of the router's own names; `*` is any."""
    ignore_unknown: bool = False
    """Unknown fields of requests are dropped, not refused."""
    hosts: tuple[str, ...] = ()
    """Names that requests may have as their Host besides those that the router was started with."""
    head_seconds: float = 10.0
    """For the whole head of a request, from its first byte on; for a connection's first one from the start."""
    body_seconds: float = 30.0
    """For the whole body behind it; of a file, for the next piece of it."""
    send_seconds: float = 30.0
    """For a client to make room, once what it has not read fills the buffers."""
    idle_seconds: float = 75.0
    """That a connection is kept without a request."""
    access_log: AccessLogged = "errors"


class AccessKey(msgspec.Struct, frozen=True, omit_defaults=True):
    """One key of a policy, by what is known of it without knowing it (`keys.Digest`)."""

    name: str
    sha256: str
    id: str = ""


class AccessLimit(msgspec.Struct, frozen=True, omit_defaults=True):
    """One bound: `requests` or `tokens` in `per` milliseconds, or `concurrency`."""

    scope: Literal["key", "policy"]
    requests: int | None = None
    tokens: int | None = None
    per: int = 0
    concurrency: int | None = None


METRICS: Final = "metrics"
"""The one operation that an empty list does not include: /metrics tells of all tenants together."""


class Tenant(msgspec.Struct, frozen=True, omit_defaults=True):
    """One tenant: who he is, what he may do, and how much."""

    name: str
    keys: tuple[AccessKey, ...] = ()
    models: tuple[str, ...] = ()
    """Names as requests give them; none: all."""
    operations: tuple[str, ...] = ()
    """None: all but `METRICS`."""
    limits: tuple[AccessLimit, ...] = ()
    priority: int = 0
    """Higher goes first."""
    expires_at: float | None = None
    """Unix seconds."""


TICKS: Final = 10**10
"""Parts of one unit of money. A price for a million tokens has four digits behind the point, so that of one token
is a whole number of them."""
BudgetTime = Literal["day", "week", "month"] | int
BudgetState = Literal["open", "warned", "spent"]


class AccessBudget(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a tenant, or each of his keys, may spend in a time: `tokens`, or `cost` in ticks."""

    policy: str
    name: str
    scope: Literal["key", "policy"]
    per: BudgetTime
    """A number is the last so many hours."""
    tokens: int | None = None
    counts: Literal["total", "prompt", "completion"] = "total"
    cached: Literal["full", "free"] = "full"
    cost: int | None = None
    warn_at: int = 8000
    """In ten thousandths."""

    @property
    def size(self) -> int:
        """Tokens or ticks."""
        return self.tokens if self.tokens is not None else self.cost or 0


class BudgetStanding(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a budget stands; for each key where it is one of keys. Amounts are tokens, or ticks of money."""

    policy: str
    name: str
    unit: Literal["tokens", "cost"]
    size: int
    spent: int
    held: int = 0
    """What requests that run may come to."""
    key: str = ""
    state: BudgetState = "open"
    resets: float = 0
    """Unix seconds: when the time of the calendar is over; where the last hours count, when something of it is
    there again, or 0 if there is."""


class RoutingTable(msgspec.Struct, tag=True, frozen=True):
    """Everything routable, absolute. The router acts on it only if `version` is above the one it has.

    All fields but `version` are its parts, each with a default that says what a router does which does not know
    it. A router says which ones it knows (`RouterStatus.parts`); version 0 is a table that is not numbered yet.
    """

    version: int
    models: tuple[ModelRoute, ...] = ()
    http: HttpSettings = HttpSettings()
    routes: tuple[TrafficRoute, ...] = ()
    access: tuple[Tenant, ...] = ()
    """The tenants, in the order of their names. With one of them there, requests need a key."""
    budgets: tuple[AccessBudget, ...] = ()
    """Of the tenants, in the order of their manifests."""


PARTS: tuple[str, ...] = tuple(name for name in RoutingTable.__struct_fields__ if name != "version")
"""The parts of a table that this version knows."""


class Finish(msgspec.Struct, tag=True):
    """Take no new request, let those in flight go on for at most `grace` seconds, then end them and exit."""

    grace: float


class GetRouterStatus(msgspec.Struct, tag=True):
    """Ask for a `RouterStatus` without changing anything."""


UsageColumn = Literal["day", "policy", "key", "model"]


class GetUsage(msgspec.Struct, tag=True):
    """Ask for a `UsageReport`: what was used from the day `since` on (YYYY-MM-DD), added up by these columns."""

    since: str
    by: tuple[UsageColumn, ...] = ()


class ReplicaLoad(msgspec.Struct, frozen=True):
    """What the router sees of one replica of its table."""

    replica_id: str
    incarnation: int
    connected: bool
    in_flight: int
    hot_hash: str | None = None
    breaker: BreakerState = "closed"
    """Whether requests go there, as far as they have not failed."""


class ModelUse(msgspec.Struct, frozen=True):
    """Whether a model is asked for: sequences that run or wait, those that no replica has, and seconds since the
    last one came or ended; None if there was none since the router began."""

    in_flight: int
    waiting: int = 0
    idle: float | None = None
    ready: int = 0
    """Replicas that serve."""
    queue_time: float = 0.0
    """Seconds that the first one that waits, here or in an engine, has waited."""
    kv_usage: float = 0.0
    """Mean share of cache blocks in use, of those replicas."""


CANARY_MARK: Final = "~"
"""What the name of a canary's entry ends with: no name of a manifest has it."""
TIME_BUCKET: Final = math.log(1.01)
"""Times are told apart by one percent."""


def time_bucket(seconds: float) -> int:
    """The bucket of a time: its logarithm in steps of one percent."""
    return math.floor(math.log(max(seconds, 1e-6)) / TIME_BUCKET)


class Measured(msgspec.Struct, frozen=True):
    """What one revision of a model did, of requests that somebody waited for."""

    requests: int = 0
    """Those that had a whole answer, or failed by no fault of the client."""
    failed: int = 0
    answers: int = 0
    void: int = 0
    """Of the answers those without text, or cut by the length that the model has."""
    first_token: dict[int, int] = {}
    """How many times to the first token lie in which `time_bucket`; below: mean times between tokens."""
    between_tokens: dict[int, int] = {}


class Answered(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a canary said to a question."""

    text: str = ""
    """The beginning of it."""
    as_expected: bool = False
    problem: str = ""
    """Why there is none."""


class Drifted(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far a canary is from the stable revision along that one's answer to a question."""

    tokens: int = 0
    """Of the answer, with the one that ended it; none where a context has no room for the question."""
    agreed: int = 0
    """Those at which both would have written the same."""
    kl: float = 0.0
    """The sum of KL(stable || new) at each of them, in nats; a lower bound."""
    problem: str = ""
    """Why the two cannot be compared."""


class Examined(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far an exam is: an answer for each question that was put."""

    exam: Exam
    smoke: tuple[Answered, ...] = ()
    drift: tuple[Drifted, ...] = ()
    waits: str = ""
    """What it waits for."""


class Comparison(msgspec.Struct, frozen=True):
    """What a model's stable revision and its canary did since that has been in the table."""

    template_hash: str
    """Of the canary."""
    stable: Measured
    new: Measured
    examined: Examined | None = None
    """None where it is asked nothing, and of a router whose version asks nothing."""


class WorkerStatus(msgspec.Struct, frozen=True):
    """One process of the router that takes requests, and how many it was given."""

    pid: int
    requests: int


class WorkerEnd(msgspec.Struct, frozen=True):
    """How a process of the router besides its head ended that was not told to."""

    number: int
    """Of this end among all of the router's, from 1 on."""
    worker: int
    code: int | None
    """Its exit status; below 0 the signal that killed it; None if it never ran, or nobody waited for it."""
    because: str
    """Why the head killed it; "" if it did not."""
    restarts: int
    """Of this worker, one after the other, with the one that follows."""
    pause: float
    """Seconds until that."""


class RouterStatus(msgspec.Struct, tag=True):
    """The router's acknowledgement: the table it acts by, and each replica in it or still draining from it.

    `unusable` maps models whose tokenizer or template cannot be loaded to the reason.
    """

    version: int
    pid: int
    base_url: str
    replicas: list[ReplicaLoad]
    http: HttpSettings | None = None
    """Those in force; None from a router of a version that knows none."""
    parts: tuple[str, ...] = ()
    """The parts of a table that it knows; none from a router of a version that does not tell."""
    unusable: dict[str, str] = {}
    uses: dict[str, ModelUse] = {}
    """Of each model whose replicas come and go by it."""
    budgets: list[BudgetStanding] = []
    """Those that are spent, or nearly, a hundred at most."""
    canaries: dict[str, Comparison] = {}
    """By model."""
    workers: tuple[WorkerStatus, ...] = ()
    """The head, whose pid is the router's, and behind it the others. All of them have the table, and are connected
    to the replicas that are called so. None from a router of a version that has one process."""
    worker_ends: tuple[WorkerEnd, ...] = ()
    """The last of them, oldest first."""


class UsageRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was used; columns that were not asked for are empty."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    day: str = ""
    policy: str = ""
    key: str = ""
    model: str = ""
    cost: int = 0
    """In ticks, of the prices that were declared when it was used."""


class UsageReport(msgspec.Struct, tag=True):
    """The answer to `GetUsage`; `problem` is why there is none."""

    rows: list[UsageRow] = []
    problem: str = ""
    budgets: list[BudgetStanding] = []
    """How all budgets stand now."""


class SetLimits(msgspec.Struct, tag=True):
    """Pass `limits` on to the engines of these replicas; their hash shows in the next `RouterStatus`."""

    replica_ids: tuple[str, ...]
    limits: Limits


ToRouter = RoutingTable | GetRouterStatus | GetUsage | SetLimits | Finish
FromRouter = RouterStatus | UsageReport


# ── control plane -> engine, at start ─────────────────────────────────────────────────────────────────────


class Quantization(msgspec.Struct, frozen=True):
    """Weights that are made integers or fp8 at load: of all linear layers and the head. Those of a checkpoint that
    is in fp8 are taken as they are, and so are experts in MXFP4, beside which nothing is quantized."""

    method: Literal["int8", "int4", "fp8", "mxfp4"]
    activations: Literal["int8", "fp8", "bf16", "fp16", "fp32"] = "int8"
    """What enters them: integers with a scale for each token, fp8 with one for each 128 inputs of a token, or the
    model's own numbers."""
    group_size: int | None = None
    """Weights that share a scale; None, with int8: all of an output."""

    def __str__(self) -> str:
        groups = "" if self.group_size is None else f" in groups of {self.group_size}"
        which = "experts in " if self.method == "mxfp4" else ""
        return f"{which}{self.method}{groups}, {self.activations} activations"


class EngineSpec(msgspec.Struct, frozen=True):
    """One engine, fully resolved: no `auto` is left. Written as JSON; the engine allocates exactly this."""

    model: str
    replica_id: str
    incarnation: int
    socket: str
    model_dir: str
    dtype: Literal["float32", "bfloat16", "float16"]
    kv_dtype: KvDtype
    device: Literal["cpu", "cuda"]
    threads: int
    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    chunked_prefill: bool
    seed: int
    memory_limit: int
    """Bytes the engine may hold for weights, activations and KV; it refuses to start above it."""
    hot_hash: str
    policy: Policy = "fcfs"
    max_waiting: int | None = None
    """Requests that may wait in the engine; None for any number."""
    max_prefill_tokens: int | None = None
    """Prompt tokens of a step while others write; None for as many as it has room for."""
    prefix_caching: bool = False
    async_scheduling: bool = False
    """Plan a step while the one before it runs."""
    enforce_eager: bool = False
    """Capture no graphs."""
    spare_core: bool = False
    """The machine has more cores than `threads`: what can be done beside the model need not wait for it."""
    batch_invariant: bool = False
    """Refuse to start unless a sequence gets the same numbers whatever else is in its steps."""
    adoption_window: float = ADOPTION_WINDOW
    """Seconds without a word from a router or a control plane after which the engine leaves by itself."""
    runner: RunnerKind = "model"
    step_time: float = 0.0
    """Seconds that a step of the scripted runner takes at least."""
    quantization: Quantization | None = None
    """None: weights in `dtype`."""
    adapters: tuple[Adapter, ...] = ()


class Adapter(msgspec.Struct, frozen=True):
    """A LoRA adapter that an engine loads beside its model. `digest` is `adapters.digest_of` its folder: the
    engine refuses to start with anything else."""

    name: str
    folder: str
    digest: str


class EngineEvent(msgspec.Struct, omit_defaults=True):
    """A line on the engine's status descriptor.

    `loading` comes at least once a second while weights load and carries bytes done; `ready` once the socket
    listens and a token has been generated; `failed` before a deliberate exit, with a reason the control plane
    shows unchanged. `retryable` False means that trying again with the same spec is pointless.
    """

    event: Literal["starting", "loading", "ready", "failed"]
    at: float
    """`time.time()`, for display only."""
    bytes_done: int = 0
    bytes_total: int = 0
    reason: str = ""
    message: str = ""
    retryable: bool = True
    load_seconds: float = 0.0
    backend: str = ""
    """Whose kernels compute; empty for a script."""
    batch_invariant: bool = False
    """It was found, with the model and the cache that serve, that company changes no number."""
    backend_lacking: str = ""
    """What keeps the back-end that was made for the device from being used; empty if it is."""


# ── framing ───────────────────────────────────────────────────────────────────────────────────────────────

T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()


def frame(message: msgspec.Struct) -> bytes:
    """The message as one frame, ready to write."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise FrameTooLarge(f"a {type(message).__name__} of {len(body)} bytes is above {MAX_FRAME}")
    return _LENGTH.pack(len(body)) + body


class Reader(Generic[T]):
    """Reads frames of one union of message types from an asyncio stream.

    `await reader.read()` gives the next message, or None at a clean end between two frames. A connection that
    ends inside a frame raises `asyncio.IncompleteReadError`; a breach of protocol raises `WireError`.
    """

    __slots__ = ("_decoder", "_stream")

    def __init__(self, stream: asyncio.StreamReader, kinds: Any) -> None:
        self._stream = stream
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kinds)

    async def read(self) -> T | None:
        try:
            head = await self._stream.readexactly(_LENGTH.size)
        except asyncio.IncompleteReadError as end:
            if end.partial:
                raise
            return None
        (length,) = _LENGTH.unpack(head)
        if length > MAX_FRAME:
            raise FrameTooLarge(f"a frame of {length} bytes was announced; the limit is {MAX_FRAME}")
        body = await self._stream.readexactly(length)
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise BadMessage(f"{type(error).__name__}: {error}") from error


def is_same_user(peer: socket.socket) -> bool:
    """Whether the kernel says that the process at the other end of a Unix socket runs as our user."""
    if sys.platform != "linux":
        return True  # no SO_PEERCRED; the folder's mode already keeps others out
    _, uid, _ = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return bool(uid == os.getuid())
