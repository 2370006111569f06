"""From a valid request to a `Job`: model, prompts as ids, sampling, limits.

Everything that can be wrong with a request is found here, before an engine hears of it. Whether there is room for
it is the desk's word (`desk`), and what becomes of a job is `run`'s part.

What takes longer than a hop to a thread is done on one, the longest on few threads of their own (`Gateway.aside`),
by its length, and by the time that it turns out to take.
A text whose length alone tells that it cannot fit is never tokenized. So no prompt holds up the streams of others.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import msgspec

from quire.errors import ContextLengthExceeded, InvalidRequest
from quire.router import conversation
from quire.router.conversation import Rendered
from quire.router.desk import Desk
from quire.router.fleet import Fleet, ServedModel
from quire.router.job import Job, Shown
from quire.router.memory import Memory
from quire.router.mirror import Mirrors
from quire.router.spans import RequestSpan
from quire.router.usage import Ledger
from quire.text import Tokenizer, params
from quire.text.templates import TakesLong, briefly
from quire_schemas import signals, wire
from quire_schemas.openai.chat import ChatRequest
from quire_schemas.openai.completions import CompletionRequest
from quire_schemas.openai.embeddings import EmbeddingRequest, PooledFields
from quire_schemas.openai.request import Prompt
from quire_schemas.openai.sampling import SamplingFields
from quire_schemas.openai.score import ScoreRequest

W = TypeVar("W")

INLINE_BYTES: Final = 16 * 1024
"""The bodies of which all is done on the event loop: above this it takes longer than the hop to a thread."""
INLINE_SECONDS: Final = 0.02
"""Processor time that a template has on the event loop, before it is begun again on a thread."""
LONG_BYTES: Final = 256 * 1024
"""Larger bodies have threads of their own, and wait for each other there."""
READING_BYTES: Final = 32
"""Of memory, that reading a byte of a body may take at its height: token ids are the worst."""
ENCODING_BYTES: Final = 256
"""The same for a character that is made into token ids: the library notes more of each token than its id."""


@dataclass(frozen=True, slots=True)
class _Read:
    """The prompts of one request as ids, with the fields that they are from."""

    tokenizer: Tokenizer
    prompts: tuple[list[int], ...]
    fields: tuple[str, ...]
    echoes: tuple[str, ...] = ()
    script: tuple[int, ...] | None = None
    rendered: Rendered | None = None
    """Of a conversation."""


class Gateway:
    """Makes jobs of requests, which ask `desk` for room, and notes in `usage` what they came to."""

    def __init__(self, fleet: Fleet, desk: Desk, usage: Ledger) -> None:
        self.fleet = fleet
        self.desk = desk
        self.usage = usage
        self.mirrors = Mirrors(fleet, desk)
        self._for_long = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2), thread_name_prefix="long")

    async def aside(self, work: Callable[[], W], size: int) -> W:
        """What `work` gives for a body of `size` bytes, without others having to wait meanwhile.

        That takes work which leaves the interpreter to them, as tokenizing does. Raises `MemoryShort`.
        """
        if size <= INLINE_BYTES:
            try:
                with briefly(INLINE_SECONDS):
                    return work()
            except TakesLong:  # a template can make much of little
                return await asyncio.get_running_loop().run_in_executor(self._for_long, work)

        def reserved() -> W:
            with self.fleet.memory.reserved(READING_BYTES * size):
                return work()

        if size <= LONG_BYTES:
            return await asyncio.to_thread(reserved)
        return await asyncio.get_running_loop().run_in_executor(self._for_long, reserved)

    async def chat(
        self, request: ChatRequest, served: ServedModel, size: int, arrived_at: float, span: RequestSpan
    ) -> Job:
        """The job of a chat request; `size` is its body's, in bytes. Raises `InvalidRequest` and `TextError`."""
        tokenizer = served.usable

        def ids() -> tuple[Rendered, list[int], tuple[int, ...] | None]:
            rendered = conversation.render(request, served)
            bound = _limit(served.route) if request.truncate_prompt_tokens is None else None
            whole = _encoded(
                self.fleet.memory, tokenizer, rendered.text, bool(request.add_special_tokens), bound, "messages"
            )
            prompt = _truncated(whole, served.route, request)
            return (
                rendered,
                prompt,
                _script(self.fleet.memory, request, request.messages[-1].content or "", served, tokenizer),
            )

        began = time.monotonic()
        rendered, prompt, script = await self.aside(ids, size)
        _tokenized(span, began, len(prompt))
        read = _Read(tokenizer, (prompt,), ("messages",), script=script, rendered=rendered)
        return self._job(request, served, read, f"chatcmpl-{secrets.token_hex(16)}", arrived_at, span)

    async def completion(
        self,
        request: CompletionRequest,
        served: ServedModel,
        size: int,
        arrived_at: float,
        span: RequestSpan,
    ) -> Job:
        """The job of a completion request. Raises `InvalidRequest` and `TextError`."""
        tokenizer = served.usable
        special = request.add_special_tokens is not False
        skip = request.skip_special_tokens is not False
        vocab = served.vocab_size
        bound = _limit(served.route) if request.truncate_prompt_tokens is None else None

        def read(given: Prompt, field: str) -> tuple[list[int], str]:
            """A prompt's ids, and its text if that is to be in the answer."""
            whole = (
                _encoded(self.fleet.memory, tokenizer, given, special, bound, field)
                if isinstance(given, str)
                else given
            )
            prompt = _truncated(whole, served.route, request)
            _room(served.route, prompt, request, field)
            if not isinstance(given, str) and max(prompt) >= vocab:
                raise InvalidRequest(f"'{field}' has a token id outside the vocabulary of {vocab}.", param=field)
            if not request.echo:
                return prompt, ""
            return prompt, given if isinstance(given, str) and prompt is whole else tokenizer.decode(prompt, skip)

        def ids() -> tuple[list[tuple[list[int], str]], tuple[int, ...] | None]:
            named = _named(request.prompt, "prompt")
            return [read(prompt, field) for field, prompt in named], _script(
                self.fleet.memory, request, None, served, tokenizer
            )

        began = time.monotonic()
        found, script = await self.aside(ids, size)
        prompts = tuple(prompt for prompt, _ in found)
        echoes = tuple(text for _, text in found) if request.echo else ()
        _tokenized(span, began, sum(map(len, prompts)))
        if request.logprobs is not None:
            await asyncio.to_thread(lambda: tokenizer.keys)  # made once, and not on the event loop
        fields = tuple(field for field, _ in _named(request.prompt, "prompt"))
        prepared = _Read(tokenizer, prompts, fields, echoes, script)
        return self._job(request, served, prepared, f"cmpl-{secrets.token_hex(16)}", arrived_at, span)

    async def embedding(
        self,
        request: EmbeddingRequest,
        served: ServedModel,
        size: int,
        arrived_at: float,
        span: RequestSpan,
    ) -> Job:
        """The job of a request for vectors. Raises `InvalidRequest`."""
        named = tuple(_named(request.input, "input"))
        job = await self._pooled(request, named, served, size, arrived_at, span)
        return replace(job, as_base64=request.encoding_format == "base64")

    async def score(
        self,
        request: ScoreRequest,
        served: ServedModel,
        size: int,
        arrived_at: float,
        span: RequestSpan,
    ) -> Job:
        """The job of a request for scores: the vectors of all texts, each made once. Raises `InvalidRequest`."""
        (left, queries), (right, documents) = request.sides
        named = (*_named(queries, left), *_named(documents, right))
        job = await self._pooled(request, named, served, size, arrived_at, span)
        count = len(queries)
        pairs = tuple((place if count > 1 else 0, count + place) for place in range(len(documents)))
        return replace(job, id=f"score-{secrets.token_hex(16)}", operation="score", pairs=pairs)

    async def _pooled(
        self,
        request: PooledFields,
        named: Sequence[tuple[str, Prompt]],
        served: ServedModel,
        size: int,
        arrived_at: float,
        span: RequestSpan,
    ) -> Job:
        """The job that makes a vector of each prompt; they come with their names for errors."""
        tokenizer = served.usable
        if served.route.scripted:
            raise InvalidRequest(
                "This model's spec.engine.runner is scripted: it has no hidden states to make a vector of.",
                param="model",
            )
        special = request.add_special_tokens is not False
        limit = _limit(served.route)

        def read(given: Prompt, field: str) -> list[int]:
            ids = (
                _encoded(self.fleet.memory, tokenizer, given, special, limit, field)
                if isinstance(given, str)
                else given
            )
            if not ids:
                raise InvalidRequest(f"'{field}' is empty: it has no token.", param=field)
            if len(ids) > limit:
                raise ContextLengthExceeded(
                    f"This model takes {limit} tokens; '{field}' has {len(ids)}.", param=field
                )
            if max(ids) >= served.vocab_size:
                raise InvalidRequest(
                    f"'{field}' has a token id outside the vocabulary of {served.vocab_size}.", param=field
                )
            return ids

        began = time.monotonic()
        prompts = await self.aside(lambda: tuple(read(given, field) for field, given in named), size)
        _tokenized(span, began, sum(map(len, prompts)))
        return Job(
            id=f"embd-{secrets.token_hex(16)}",
            asked_model=request.model,
            model=served,
            tokenizer=tokenizer,
            operation="embeddings",
            prompts=prompts,
            echoes=(),
            n=1,
            kept=1,
            sampling=wire.Sampling(max_tokens=0),
            shown=Shown(),
            stops=(),
            include_stop=False,
            skip_special_tokens=True,
            stream=False,
            arrived_at=arrived_at,
            span=span,
            pooling=wire.Pooling(request.pooling or "last", dimensions=request.dimensions),
        )

    def _job(
        self,
        request: SamplingFields,
        served: ServedModel,
        read: _Read,
        job_id: str,
        arrived_at: float,
        span: RequestSpan,
    ) -> Job:
        tokenizer, prompts, rendered = read.tokenizer, read.prompts, read.rendered
        named = zip(prompts, read.fields, strict=True)
        max_tokens = min(_room(served.route, prompt, request, field) for prompt, field in named)
        if request.min_tokens is not None and request.min_tokens > max_tokens:
            raise InvalidRequest(
                f"'min_tokens' is {request.min_tokens}, and the context has room for {max_tokens}.",
                param="min_tokens",
            )
        vocabulary = served.vocab_size
        bias = request.logit_bias or {}
        if request.priority and served.route.policy != "priority":
            raise InvalidRequest(
                f"'priority' is {request.priority}, and this model serves requests in the order of their arrival: "
                "its batching.policy is not 'priority'.",
                param="priority",
            )
        params.check_ids(
            {
                "logit_bias": bias,
                "stop_token_ids": request.stop_token_ids or (),
                "allowed_token_ids": request.allowed_token_ids or (),
                "logprob_token_ids": request.logprob_token_ids or (),
            },
            vocabulary,
        )
        pattern = request.repetition_detection
        budget = request.thinking_token_budget if rendered is None else rendered.thinking_budget
        logprobs = request.wanted_logprobs
        beam = None
        if request.use_beam_search:
            beam = wire.BeamSearch(request.sequences, _first(request.length_penalty, None, 1.0))
        elif logprobs is None and request.sequences > (request.n or 1):
            logprobs = 0  # what the best are told by
        constraint = request.constraint if rendered is None else rendered.constraint
        advised = tokenizer.advised
        top_k = _first(request.top_k, advised.top_k, 0)
        sampling = wire.Sampling(
            max_tokens=max(max_tokens, 1),
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
            allowed_token_ids=tuple(dict.fromkeys(request.allowed_token_ids or ())),
            bad_words=params.bad_words(tokenizer, request.bad_words or (), vocabulary),
            thinking=None if budget is None else params.thinking(tokenizer, budget, vocabulary),
            repetition=None if pattern is None else pattern.repetition,
            logprobs=logprobs,
            script=read.script,
            logprob_token_ids=tuple(dict.fromkeys(request.logprob_token_ids or ())),
            prompt_logprobs=request.scored_prompt,
            logprobs_mode=request.logprobs_mode or "raw_logprobs",
            structured=constraint.structured if constraint is not None else None,
        )
        _check_entries(request, sampling, prompts, vocabulary)
        return Job(
            id=job_id,
            asked_model=request.model,
            model=served,
            tokenizer=tokenizer,
            operation="chat" if isinstance(request, ChatRequest) else "text_completion",
            prompts=prompts,
            echoes=read.echoes,
            n=request.sequences,
            kept=request.n or 1,
            sampling=sampling,
            shown=Shown(
                request.wanted_logprobs,
                request.prompt_logprobs,
                bool(request.return_token_ids),
                bool(request.return_tokens_as_token_ids),
                reasoning=rendered is None or rendered.shows_reasoning,
                prompt_text=isinstance(request, ChatRequest) and bool(request.return_prompt_text),
                ending=isinstance(request, CompletionRequest),
                metrics=bool(request.return_metrics),
            ),
            stops=tuple(request.stop or ()),
            include_stop=bool(request.include_stop_str_in_output),
            skip_special_tokens=request.skip_special_tokens is not False,
            stream=bool(request.stream),
            arrived_at=arrived_at,
            span=span,
            priority=request.priority or 0,
            cache_salt=request.cache_salt or "",
            timeout=request.timeout,
            beam=beam,
            prompt_alone=max_tokens == 0,
            constrained_by=constraint.field if constraint is not None else "",
            markup=rendered.markup if rendered is not None else None,
        )


def _limit(route: wire.ModelRoute) -> int:
    """Tokens that a prompt and its answer may have together."""
    return min(route.max_model_len, route.kv_tokens)


def _named(entries: Sequence[Prompt], field: str) -> Iterator[tuple[str, Prompt]]:
    """Each entry with its name for errors: the field's, and where there are several its place."""
    for place, entry in enumerate(entries):
        yield (f"{field}[{place}]" if len(entries) > 1 else field), entry


def _encoded(
    memory: Memory, tokenizer: Tokenizer, text: str, special: bool, bound: int | None, field: str
) -> list[int]:
    """The ids of `text`. Raises before they are made if its length alone says that they are above `bound`, or if
    there is no memory to make them."""
    least = tokenizer.least_tokens(text) if bound is not None else 0
    if bound is not None and least > bound:
        raise ContextLengthExceeded(
            f"This model takes {bound} tokens; '{field}' has at least {least}. Shorten it.", param=field
        )
    with memory.reserved(ENCODING_BYTES * len(text)):
        return tokenizer.encode(text, special)


def _truncated(prompt: list[int], route: wire.ModelRoute, request: SamplingFields) -> list[int]:
    return params.truncated(
        prompt,
        request.truncate_prompt_tokens,
        request.truncation_side,
        _limit(route),
        request.asked_tokens,
    )


def _check_entries(
    request: SamplingFields, sampling: wire.Sampling, prompts: Sequence[list[int]], vocabulary: int
) -> None:
    """Raises when more log-probabilities are asked for than an answer may have."""
    if sampling.logprobs is None and sampling.prompt_logprobs is None:
        return
    later = sampling if request.stream else msgspec.structs.replace(sampling, prompt_logprobs=None)
    entries = sum(
        sampling.logprob_entries(len(prompt), vocabulary)
        + (request.sequences - 1) * later.logprob_entries(len(prompt), vocabulary)
        for prompt in prompts
    )
    if entries > wire.MAX_LOGPROB_ENTRIES:
        field = "prompt_logprobs" if request.prompt_logprobs is not None else request.logprobs_field
        if (
            wire.WHOLE_VOCABULARY not in (sampling.logprobs, sampling.prompt_logprobs)
            and request.logprob_token_ids
        ):
            field = "logprob_token_ids"
        raise InvalidRequest(
            f"'{field}' asks for {entries} log-probabilities in all; an answer has at most "
            f"{wire.MAX_LOGPROB_ENTRIES}. Ask for fewer at each position, or lower '{request.limit_field}'.",
            param=field,
        )


def _room(route: wire.ModelRoute, prompt: Sequence[int], request: SamplingFields, field: str) -> int:
    """Tokens that may follow the prompt in `field`: those asked for, else what is left. Raises when that can never
    fit.
    """
    if not prompt:
        raise InvalidRequest(f"'{field}' is empty: it has no token.", param=field)
    asked = request.asked_tokens
    limit = _limit(route)
    if len(prompt) + (asked or 1) > limit:
        what = "context" if route.max_model_len <= route.kv_tokens else "KV cache"
        raise ContextLengthExceeded(
            f"The {what} of this model holds {limit} tokens; the request needs {len(prompt) + (asked or 1)}: "
            f"{len(prompt)} in '{field}' and {asked or 'at least 1'} for the answer. "
            "Shorten the prompt or lower the number of tokens asked for.",
            param=field if len(prompt) >= limit else request.limit_field,
        )
    return asked if asked is not None else limit - len(prompt)


def _script(
    memory: Memory, request: SamplingFields, default: str | None, served: ServedModel, tokenizer: Tokenizer
) -> tuple[int, ...] | None:
    """What a scripted model is to answer: the request's script, else `default`; None is the prompt, word for word.

    Raises `InvalidRequest` for a script that no replica of `served` would follow.
    """
    if not served.route.scripted:
        if request.script is not None:
            raise InvalidRequest(
                "'script' is for models whose spec.engine.runner is scripted; this one computes its answers.",
                param="script",
            )
        return None
    if request.use_beam_search:
        raise InvalidRequest(
            "'use_beam_search' is not for this model: its spec.engine.runner is scripted, and says one thing.",
            param="use_beam_search",
        )
    script = default if request.script is None else request.script
    if script is None:
        return None
    made = (
        _encoded(memory, tokenizer, script, False, _limit(served.route), "script")
        if isinstance(script, str)
        else script
    )
    ids = tuple(made)
    if not ids and (request.ignore_eos or request.min_tokens):
        raise InvalidRequest("'script' is empty, and the answer is not to end with it.", param="script")
    if ids and max(ids) >= served.vocab_size:
        raise InvalidRequest(
            f"'script' has a token id outside the vocabulary of {served.vocab_size}.", param="script"
        )
    return ids


V = TypeVar("V", int, float)


def _first(asked: V | None, advised: V | None, default: V) -> V:
    """The request's word, else the checkpoint's, else OpenAI's default."""
    if asked is not None:
        return asked
    return advised if advised is not None else default


def _tokenized(span: RequestSpan, began: float, tokens: int) -> None:
    span.phase(signals.SPAN_TOKENIZE, began, time.monotonic(), {signals.QUIRE_TOKENS: tokens})
