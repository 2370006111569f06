"""The engine in one process, for scripts, tests and benchmarks: no router, no sockets, no manifest.

    from quire import LLM, SamplingParams

    llm = LLM("builtin://tiny")
    for output in llm.generate(["What is PagedAttention?"], SamplingParams(max_tokens=40, temperature=0)):
        print(output.outputs[0].text)

`LLM` sizes itself by the same arithmetic as `platform plan`, and drives the same engine, text side included: what
it says is what a served model says. No other module of the package loads the engine, and with it torch.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, cast, get_args

import msgspec
import psutil

from quire import arguments
from quire.builtin import path as builtin_path
from quire.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    RequestOutput,
)
from quire.sampling import BeamSearchParams, SamplingParams
from quire_schemas.checkpoint import ModelProfile, read_profile
from quire_schemas.model import runs_ahead
from quire_schemas.openai.body import BadRequest
from quire_schemas.openai.chat import read_conversation
from quire_schemas.quantities import parse_percent, parse_quantity
from quire_schemas.quantization import GROUP_SIZES, METHODS, Unquantizable, resolve
from quire_schemas.sizing import FitReport, SizingRequest, fit, kv_block_bytes, kv_misfit
from quire_schemas.wire import (
    MAX_LOGPROB_ENTRIES,
    BeamResult,
    BeamSearch,
    Delta,
    EngineSpec,
    Generate,
    KvDtype,
    Policy,
    Pooling,
    Sampling,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from quire.text import Tokenizer
    from quire_engine.engine import Engine

__all__ = ["LLM", "DoesNotFit", "RequestOutput", "SamplingParams"]

Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["cpu", "cuda"]


class DoesNotFit(Exception):
    """The model does not fit this machine as asked; the message has the arithmetic and what would fit."""


Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`."""
Conversation = Sequence[Mapping[str, Any]]
"""Messages as the HTTP API has them."""
_V = TypeVar("_V")
_P = ParamSpec("_P")

MAX_THREADS = 4096
"""As `spec.resources.cpu` of a manifest."""


def _one_at_a_time(
    method: Callable[Concatenate[LLM, _P], _V],
) -> Callable[Concatenate[LLM, _P], _V]:
    """A method that steps the engine, which is not thread-safe: calls from other threads wait until it is done."""

    @wraps(method)
    def alone(self: LLM, /, *args: _P.args, **kwargs: _P.kwargs) -> _V:
        with self._lock:
            return method(self, *args, **kwargs)

    return alone


class LLM:
    """One model in this process. `None` and "auto" resolve as they do in a manifest; `fit` keeps the arithmetic.

    `model` is `builtin://NAME`, `file:///PATH` or a folder. `num_blocks` fixes the size of the KV cache, and
    `threads` those that compute: torch's, of the whole process, and the kernels' own. `quantization`, `group_size`
    and `activations` are what `spec.quantization` has. Threads may share one `LLM`; their calls take turns.
    Raises ValueError and TypeError for arguments, `DoesNotFit`, `CheckpointError`, `LookupError`.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: Literal["auto"] | Dtype = "auto",
        kv_dtype: Literal["auto"] | KvDtype = "auto",
        device: Literal["auto"] | Device = "auto",
        quantization: Literal["int8", "int4", "fp8"] | None = None,
        group_size: int | None = None,
        activations: Literal["auto", "int8", "fp8", "bf16"] = "auto",
        max_model_len: int | None = None,
        block_size: int = 16,
        num_blocks: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        chunked_prefill: bool = True,
        memory_share: float = 0.9,
        prefix_caching: bool = True,
        async_scheduling: Literal["auto"] | bool = "auto",
        enforce_eager: bool = False,
        policy: Policy = "fcfs",
        seed: int = 0,
        threads: int | None = None,
    ) -> None:
        arguments.one_of("dtype", dtype, ("auto", *get_args(Dtype)), '"auto" is the checkpoint\'s own')
        arguments.one_of("kv_dtype", kv_dtype, ("auto", *get_args(KvDtype)), '"auto" is what dtype is')
        arguments.one_of("device", device, ("auto", *get_args(Device)), '"auto" takes a GPU if there is one')
        _check_quantization(quantization, group_size, activations)
        arguments.one_of("policy", policy, get_args(Policy), '"fcfs" goes by arrival')
        for name, count, least, most, hint in (
            ("block_size", block_size, 1, None, "16 tokens are usual"),
            ("max_num_seqs", max_num_seqs, 1, None, "how many sequences a step computes; 64 unless given"),
            ("max_num_batched_tokens", max_num_batched_tokens, 1, None, "tokens of a step; 512 unless given"),
            ("max_model_len", max_model_len, 2, None, "prompt and answer together; None is what fits"),
            ("num_blocks", num_blocks, 1, None, "None is what fits"),
            ("threads", threads, 1, MAX_THREADS, "None: as many as torch takes"),
        ):
            if count is not None or name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
                arguments.whole(name, count, least, most, hint)
        for name, choice in (
            ("chunked_prefill", chunked_prefill),
            ("prefix_caching", prefix_caching),
            ("enforce_eager", enforce_eager),
        ):
            arguments.flag(name, choice)
        if async_scheduling != "auto":
            arguments.flag("async_scheduling", async_scheduling, '"auto", the default, does so on a GPU')
        arguments.number("memory_share", memory_share, 0, 1, above=True, hint="0.9 is nine tenths of the device")
        arguments.whole("seed", seed, -(2**63), 2**63 - 1, hint="0 unless given")
        if max_model_len is not None and not chunked_prefill and max_model_len > max_num_batched_tokens:
            raise ValueError(
                f"max_model_len is {max_model_len}, and without chunked_prefill a prompt has to fit "
                f"max_num_batched_tokens ({max_num_batched_tokens})\n"
                f"hint: max_num_batched_tokens={max_model_len}, or chunked_prefill=True"
            )
        folder = _folder(model)

        import torch

        from quire_engine.engine import Engine

        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError('device is "cuda", and torch sees no such device here\nhint: device="cpu" or "auto"')
        profile = read_profile(folder)
        if max_model_len is not None and max_model_len > profile.max_position_embeddings:
            raise ValueError(
                f"max_model_len is {max_model_len}, above the checkpoint's {profile.max_position_embeddings} "
                f"positions\nhint: max_model_len={profile.max_position_embeddings} or less; None is what fits"
            )
        resolved = cast(Dtype, profile.dtype) if dtype == "auto" else dtype
        kind: Device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            numbers = resolve(
                {"method": quantization or "none", "activations": activations, "groupSize": group_size},
                profile,
                dtype=resolved,
                device=kind,
            )
        except Unquantizable as found:
            if quantization is None and found.field == "activations":
                plain = kind == "cpu" or profile.fp8 is None  # there is nothing that another dtype would meet
                instead = 'activations="auto"' if plain else _INSTEAD[found.field]
                raise ValueError(f"activations is {activations!r}: {found}\nhint: {instead}") from None
            instead = 'device="cpu"' if quantization is None else _INSTEAD[found.field]
            raise ValueError(f"quantization is {quantization!r}: {found}\nhint: {instead}") from None
        if kv_dtype != "auto" and (problem := kv_misfit(profile, kv_dtype, kind)):
            other = "" if kv_misfit(profile, "int8", kind) else ' or "int8"'
            raise ValueError(f'kv_dtype is "{kv_dtype}": {problem}\nhint: kv_dtype="auto"{other}')
        total, available = torch.cuda.mem_get_info()[::-1] if kind == "cuda" else _memory()
        request = SizingRequest(
            dtype=resolved,
            kv_dtype=resolved if kv_dtype == "auto" else kv_dtype,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            device=kind,
            device_bytes_total=total,
            device_bytes_available=available,
            memory_share=memory_share,
            max_model_len=max_model_len,
            chunked_prefill=chunked_prefill,
            quantization=numbers,
            enforce_eager=enforce_eager,
        )
        self.fit = _fit(profile, request, num_blocks)
        threads = threads or torch.get_num_threads()
        spec = EngineSpec(
            model=model,
            replica_id="in-process",
            incarnation=1,
            socket="",
            model_dir=str(folder),
            dtype=resolved,
            kv_dtype=cast(KvDtype, request.kv_dtype),
            device=kind,
            threads=threads,
            spare_core=threads < len(os.sched_getaffinity(0)),
            max_model_len=self.fit.max_model_len,
            block_size=block_size,
            num_blocks=self.fit.num_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            chunked_prefill=chunked_prefill,
            seed=seed,
            memory_limit=self.fit.limit,
            hot_hash="",
            prefix_caching=prefix_caching,
            async_scheduling=runs_ahead(async_scheduling, kind),
            enforce_eager=enforce_eager,
            policy=policy,
            quantization=numbers,
        )
        self.engine: Engine = Engine.load(spec)
        self.profile = profile
        self._folder = folder
        self._tokenizer: Tokenizer | None = None
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, read on first use. Raises `quire.text.TextError`."""
        if self._tokenizer is None:
            from quire.text import Tokenizer

            self._tokenizer = Tokenizer.load(self._folder)
        return self._tokenizer

    def default_sampling(self, max_tokens: int | None = 16) -> SamplingParams:
        """What the checkpoint's makers advise (`generation_config.json`), as a request to the HTTP API has it."""
        advised = self.tokenizer.advised
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = {name: value for name in names if (value := getattr(advised, name)) is not None}
        return SamplingParams(max_tokens=max_tokens, **given)

    @_one_at_a_time
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt, all in one batch; outputs in the order of the prompts.

        Text is encoded as it stands (special tokens may be written out). `sampling_params` is one for all or one
        for each; None is `default_sampling`. `priority`, one for each prompt, lower first, needs
        `policy="priority"`. `use_tqdm` shows progress on stderr; None does if that is a terminal.

        Raises ValueError and TypeError for arguments that make no sense, `quire.text.TextError`, and
        `quire_engine.errors.RequestRefused` if a prompt cannot be served: all before anything is computed. An
        answer that fails on its own has the finish reason `error`.
        """
        whole = self._encoded(prompts)
        asked = self.default_sampling() if sampling_params is None else sampling_params
        params = _for_each(asked, len(whole), "sampling_params")
        return self._generate(whole, params, priority, use_tqdm)

    @_one_at_a_time
    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        priority: Sequence[int] | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several, rendered by the checkpoint's chat template.

        `add_generation_prompt` is true unless the final message is to be continued. `tools` are shown to the
        template; calls come back as the text that the model writes. `sampling_params` None is
        `default_sampling(max_tokens=None)`. Otherwise as `generate`.
        """
        from quire.text.templates import RESERVED

        if not isinstance(chat_template_kwargs, Mapping | None):
            raise TypeError(f"chat_template_kwargs must be a mapping, not {chat_template_kwargs!r}")
        variables = dict(chat_template_kwargs or {})
        for name in variables:
            if not name.isidentifier() or name.startswith("_") or name in RESERVED:
                raise ValueError(f"chat_template_kwargs: {name!r} may not be set")
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Conversation], messages if several else [messages])
        prompted = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        whole: list[tuple[str | None, list[int]]] = []
        for place, conversation in enumerate(conversations):
            with _of_several("conversation", place, len(conversations)):
                text = self.tokenizer.render(
                    _messages(conversation),
                    tools,
                    add_generation_prompt=prompted,
                    continue_final_message=continue_final_message,
                    **variables,
                )
            whole.append((text, self.tokenizer.encode(text, add_special_tokens=False)))
        asked = self.default_sampling(None) if sampling_params is None else sampling_params
        params = _for_each(asked, len(whole), "sampling_params")
        return self._generate(whole, params, priority, use_tqdm)

    @_one_at_a_time
    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Literal["last", "mean"] = "last",
        normalize: bool = True,
        dimensions: int | None = None,
        use_tqdm: bool | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """A vector for every prompt: its final hidden states, of the last token or the mean over all of them.

        `dimensions` keeps that many leading ones, which means something for models that were trained for it;
        `normalize` brings what is kept to length 1. Raises as `generate` does.
        """
        arguments.one_of("pooling", pooling, ("last", "mean"))
        arguments.flag("normalize", normalize)
        if dimensions is not None:
            arguments.whole("dimensions", dimensions, 1, hint="None keeps all")
        wanted = Pooling(pooling, normalize, dimensions)
        vectors: dict[str, EmbeddingRequestOutput] = {}
        ended = 0
        whole = [ids for _, ids in self._encoded(prompts)]
        try:
            for place, ids in enumerate(whole):
                name = str(next(self._numbers))
                with _of_several("prompt", place, len(whole)):
                    self.engine.add(Generate(name, list(ids), Sampling(max_tokens=0), pooling=wanted))
                vectors[name] = EmbeddingRequestOutput(name, ids, EmbeddingOutput([]))
            with _progress(len(whole), use_tqdm) as bar:
                while self.engine.has_work:
                    for delta in self.engine.step():
                        made = vectors[delta.id].outputs
                        made.embedding = [*memoryview(delta.embedding or b"").cast("f")]
                        made.error, made.timings = delta.error, delta.timings
                        ended += 1
                        if bar is not None:
                            bar.update()
        finally:
            if ended < len(vectors):
                for name in vectors:
                    self.engine.abort(name)
        return list(vectors.values())

    @_one_at_a_time
    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """The likeliest continuations of every prompt, `beam_width` of each, the best first.

        `cumulative_logprob` is over all tokens, one that ended the text included. Raises as `generate` does.
        """
        if not isinstance(params, BeamSearchParams):
            raise TypeError(f"params must be BeamSearchParams, not {params!r}\nhint: BeamSearchParams(…)")
        outputs: dict[str, RequestOutput] = {}
        whole = self._encoded(prompts)
        sampling, tokenizer = params.sampling(self.profile.vocab_size), self.tokenizer
        try:
            for place, (text, ids) in enumerate(whole):
                name = str(next(self._numbers))
                search = BeamSearch(params.beam_width, params.length_penalty)
                with _of_several("prompt", place, len(whole)):
                    self.engine.add(Generate(name, list(ids), sampling, beam=search))
                outputs[name] = RequestOutput(name, text, ids, [])
            with _progress(len(whole), use_tqdm) as bar:
                while self.engine.has_work:
                    for delta in self.engine.step():
                        if delta.finish_reason is None:
                            continue  # it has begun
                        outputs[delta.id].outputs += self._found(delta, params, tokenizer)
                        if bar is not None:
                            bar.update()
        finally:
            for name, output in outputs.items():
                if not output.outputs:
                    self.engine.abort(name)
        return list(outputs.values())

    def _found(self, delta: Delta, params: BeamSearchParams, tokenizer: Tokenizer) -> list[CompletionOutput]:
        """The texts of a search that has ended; one that has the error, if it failed."""
        from quire.text import AnswerText

        def text(beam: BeamResult) -> str:
            read = AnswerText(
                tokenizer,
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
            )
            return "".join(map(read.push, beam.token_ids)) + read.finish(beam.stop_token_id)

        if delta.beams is None:
            return [
                CompletionOutput(0, finish_reason=delta.finish_reason, error=delta.error, timings=delta.timings)
            ]
        return [
            CompletionOutput(
                index,
                text(beam),
                beam.token_ids,
                beam.logprob,
                finish_reason=beam.finish_reason,
                stop_reason=None if beam.stop_token_id in self.profile.eos_token_ids else beam.stop_token_id,
                stop_token_id=beam.stop_token_id,
                timings=delta.timings,
            )
            for index, beam in enumerate(delta.beams)
        ]

    # ── the way of a batch ────────────────────────────────────────────────────────────────────────────────

    def _encoded(self, prompts: Prompt | Sequence[Prompt]) -> list[tuple[str | None, list[int]]]:
        """Every prompt as `_prompt` gives it."""
        several, whole = _prompts(prompts), []
        for place, prompt in enumerate(several):
            with _of_several("prompt", place, len(several)):
                whole.append(self._prompt(prompt))
        return whole

    def _prompt(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """The prompt as text, if it was given as that, and as ids."""
        if isinstance(prompt, Mapping):
            if set(prompt) == {"prompt"}:
                prompt = prompt["prompt"]
            elif set(prompt) == {"prompt_token_ids"}:
                prompt = prompt["prompt_token_ids"]
            else:
                raise ValueError(
                    f"a prompt has 'prompt' or 'prompt_token_ids' and nothing else, not {set(prompt)}"
                )
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt)
        return None, [_id(index) for index in prompt]

    def _generate(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],
        each: Sequence[SamplingParams],
        priority: Sequence[int] | None,
        use_tqdm: bool | None,
    ) -> list[RequestOutput]:
        if priority is not None and self.engine.limits.policy != "priority":
            raise ValueError('priority needs the policy of that name\nhint: LLM(…, policy="priority")')
        priorities = _for_each(0 if priority is None else priority, len(prompts), "priority")
        for number, (params, place) in enumerate(zip(each, priorities, strict=True)):
            with _of_several("prompt", number, len(prompts)):
                if not isinstance(params, SamplingParams):
                    raise TypeError(
                        f"sampling_params must be SamplingParams, not {params!r}\nhint: SamplingParams(…)"
                    )
                arguments.whole("priority", place, -arguments.MAX_INT, hint="lower goes first")
        told: dict[tuple[int, int], Sampling] = {}  # parameters are often the same for all prompts
        outputs: list[RequestOutput] = []
        answers: dict[str, _Answer] = {}
        try:
            for number, ((text, given), params, place) in enumerate(zip(prompts, each, priorities, strict=True)):
                with _of_several("prompt", number, len(prompts)):
                    outputs.append(self._begin(text, given, params, place, told, answers))
            self._compute(answers, len(prompts), use_tqdm)
        finally:
            for name, answer in answers.items():
                if answer.made.finish_reason is None:
                    self.engine.abort(name)
        return outputs

    def _begin(
        self,
        text: str | None,
        given: list[int],
        params: SamplingParams,
        priority: int,
        told: dict[tuple[int, int], Sampling],
        answers: dict[str, _Answer],
    ) -> RequestOutput:
        """Queue the sequences of a prompt, which `answers` has from then on; `told` remembers parameters."""
        from quire.text.params import truncated

        limit, vocabulary = min(self.fit.max_model_len, self.fit.kv_tokens), self.profile.vocab_size
        ids = truncated(given, params.truncate_prompt_tokens, params.truncation_side, limit, params.max_tokens)
        room = max(1, limit - len(ids))
        key = (id(params), room if params.max_tokens is None else 0)
        sampling = told.get(key)
        if sampling is None:
            sampling = told[key] = params.sampling(room, vocabulary, lambda: self.tokenizer)
        _check_entries(sampling, len(ids), vocabulary)
        output = RequestOutput(str(next(self._numbers)), text, ids, [])
        family = output.request_id if params.n > 1 else None
        for index in range(params.n):
            if index:  # the prompt is one, and so are its log-probabilities
                sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
            name = f"{output.request_id}-{index}"
            answers[name] = _Answer(self, index, params, sampling, output)
            numbered = sampling.numbered(index)
            self._add(Generate(name, list(ids), numbered, priority=priority, family=family), params)
        return output

    def _add(self, message: Generate, params: SamplingParams) -> None:
        """Queue a sequence. Raises `RequestRefused`, which names the constraint if that is to blame."""
        from quire_engine.errors import RequestRefused

        try:
            self.engine.add(message)
        except RequestRefused as error:
            if error.code != "invalid_grammar":
                raise
            raise RequestRefused(error.code, f"{params.constrained_by} cannot be honoured: {error}") from None

    def _compute(self, answers: Mapping[str, _Answer], total: int, use_tqdm: bool | None) -> None:
        """Step until every answer has its finish reason."""
        began, tokens = time.monotonic(), 0
        with _progress(total, use_tqdm) as bar:
            while self.engine.has_work:
                for delta in self.engine.step():
                    answer = answers[delta.id]
                    if answer.take(delta):
                        self.engine.abort(delta.id)
                    tokens += len(delta.token_ids)
                    if bar is not None and answer.made.finish_reason is not None and answer.whole.finished:
                        rate = tokens / (time.monotonic() - began)
                        bar.set_postfix_str(f"{rate:.0f} output tokens/s", refresh=False)
                        bar.update()


class _Answer:
    """One sequence on its way from ids to text, as the router does it."""

    def __init__(
        self, llm: LLM, index: int, params: SamplingParams, sampling: Sampling, whole: RequestOutput
    ) -> None:
        from quire.text import AnswerText

        self.whole = whole
        self.made = CompletionOutput(index)
        whole.outputs.append(self.made)
        self._tokenizer = llm.tokenizer if params.detokenize else None
        self._eos = llm.profile.eos_token_ids
        self._text = None
        if params.detokenize:
            self._text = AnswerText(
                llm.tokenizer,
                stops=params.stops,
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                min_tokens=params.min_tokens,
            )
        self._params, self._sampling = params, sampling
        self._logs = sampling.logprobs_mode in ("raw_logprobs", "processed_logprobs")
        self._named = tuple(dict.fromkeys(params.logprob_token_ids or ()))
        if params.prompt_logprobs is not None and index == 0:
            whole.prompt_logprobs = [None]
        if params.logprobs is not None:
            self.made.logprobs, self.made.cumulative_logprob = [], 0.0 if self._logs else None

    def take(self, delta: Delta) -> bool:
        """Take over what a step gave; whether a stop string has ended it, which the engine does not know."""
        made = self.made
        if self.whole.prompt_logprobs is not None:
            self.whole.prompt_logprobs += map(self._shown, delta.prompt_logprobs or ())
        scores = delta.logprobs or ()
        for position, token in enumerate(delta.token_ids):
            made.token_ids.append(token)
            if made.logprobs is not None:
                self._score(scores[position])
            if self._text is not None:
                made.text += self._text.push(token)
                if self._text.hit is not None:
                    break
        if delta.timings is not None:
            made.timings = delta.timings
        if self._hit is None and delta.finish_reason is not None:
            if self._text is not None:
                made.text += self._text.finish(delta.stop_token_id)
            made.finish_reason, made.error = delta.finish_reason, self._error(delta)
            made.stop_token_id = delta.stop_token_id
            if delta.stop_token_id not in self._eos:
                made.stop_reason = delta.stop_token_id
        if self._hit is None:
            return False
        made.finish_reason, made.stop_reason = "stop", self._hit
        return delta.finish_reason is None

    @property
    def _hit(self) -> str | None:
        """The stop string that ended it."""
        return None if self._text is None else self._text.hit

    def _error(self, delta: Delta) -> str | None:
        named = self._sampling.narrowing + ([self._params.constrained_by] if self._sampling.structured else [])
        if delta.error_code != "no_token_left" or not named:
            return delta.error
        return f"{' with '.join(named)} leaves no token to choose"

    def _score(self, scores: TokenLogprobs) -> None:
        made = self.made
        if made.logprobs is not None:
            made.logprobs.append(self._shown(scores))
        if self._logs:
            made.cumulative_logprob = (made.cumulative_logprob or 0.0) + scores.logprob

    def _shown(self, scores: TokenLogprobs) -> dict[int, Logprob]:
        shown = {token: self._logprob(token, value, rank) for rank, (token, value) in enumerate(scores.top, 1)}
        shown.setdefault(scores.token_id, self._logprob(scores.token_id, scores.logprob, scores.rank or None))
        for token, value in zip(self._named, scores.named, strict=True):
            shown.setdefault(token, self._logprob(token, value, None))
        return shown

    def _logprob(self, token: int, value: float, rank: int | None) -> Logprob:
        return Logprob(value, rank, None if self._tokenizer is None else self._tokenizer.token_text(token))


def _progress(total: int, use_tqdm: bool | None) -> AbstractContextManager[Any]:
    """A bar over `total` prompts on stderr, or None where none is wanted."""
    if not (sys.stderr.isatty() if use_tqdm is None else use_tqdm):
        return nullcontext()
    from tqdm import tqdm

    bar: AbstractContextManager[Any] = tqdm(
        total=total, desc="Processed prompts", unit="prompt", file=sys.stderr, dynamic_ncols=True
    )
    return bar


def _prompts(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt as a list of one."""
    if isinstance(prompts, str | Mapping) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return cast(Sequence[Prompt], prompts)


def _check_entries(sampling: Sampling, num_prompt: int, vocabulary: int) -> None:
    """Raises ValueError when more log-probabilities are asked for than an answer may have."""
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(sampling, name) or 0) > vocabulary:
            raise ValueError(f"{name} must be at most the vocabulary of {vocabulary}\nhint: -1 is all of it")
    entries = sampling.logprob_entries(num_prompt, vocabulary)
    if entries > MAX_LOGPROB_ENTRIES:
        name = "logprobs" if sampling.prompt_logprobs is None else "prompt_logprobs"
        raise ValueError(
            f"{name} asks for {entries} log-probabilities; an answer has at most {MAX_LOGPROB_ENTRIES}\n"
            "hint: ask for fewer at each position, or for fewer tokens"
        )


@contextmanager
def _of_several(noun: str, place: int, count: int) -> Iterator[None]:
    """A refusal in here says which of `count` prompts or conversations it is about; the first is 0."""
    from quire.text import ParamRefused, TemplateFailed, TemplateRefused
    from quire_engine.errors import RequestRefused

    try:
        yield
    except (ValueError, TypeError, ParamRefused, TemplateFailed, TemplateRefused, RequestRefused) as error:
        if count > 1:
            error.args = (f"{noun} {place}: {error}",)
        raise


def _id(index: object) -> int:
    if isinstance(index, bool) or not isinstance(index, int):
        raise TypeError(f"a prompt is text or token ids; {index!r} is neither")
    return index


def _for_each(values: _V | Sequence[_V], count: int, name: str) -> Sequence[_V]:
    """One value for all, or as many as there are prompts."""
    if not isinstance(values, Sequence):
        return [values] * count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} prompts")
    return values


def _messages(conversation: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation as templates know it. Raises ValueError."""
    try:
        return [message.for_template() for message in read_conversation(list(conversation))]
    except BadRequest as error:
        raise ValueError(error.message) from None


def _folder(model: str) -> Path:
    """The folder of a checkpoint. Raises ValueError for a place that only a served model is fetched from."""
    if not isinstance(model, str):
        raise TypeError(f"model must be text, not {model!r}\nhint: 'builtin://tiny', or the path of a folder")
    scheme, separator, rest = model.partition("://")
    if scheme == "builtin" and separator:
        return builtin_path(rest)
    if scheme == "file" and separator:
        return Path(rest)
    folder = Path(model)
    hub = rest if scheme == "hf" and separator else model
    if re.fullmatch(r"[\w.-]+/[\w.-]+", hub) and not folder.exists():
        raise ValueError(
            f"model is {model!r}: LLM downloads nothing, and there is no such folder\n"
            f"hint: `hf download {hub}` fetches it and prints the folder to give; or serve it: "
            f"a Model with source: hf://{hub} is downloaded"
        )
    if separator:
        raise ValueError(
            f"model is {model!r}, which is not a place that LLM reads from\n"
            "hint: give a folder, file:///PATH, or builtin://tiny"
        )
    return folder


def _check_quantization(method: object, group_size: object, activations: object) -> None:
    if method is not None:
        arguments.one_of("quantization", method, METHODS, "None computes with the checkpoint's own numbers")
    arguments.one_of("activations", activations, ("auto", "int8", "fp8", "bf16"), '"auto" suits method and device')
    if group_size is not None:
        arguments.whole("group_size", group_size, 1, hint="None is 32")
        if group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise ValueError(f"group_size must be one of {sizes}, not {group_size}\nhint: None is 32")
        if method != "int4":
            raise ValueError(
                f'group_size is {group_size}, and only quantization="int4" has groups\nhint: group_size=None'
            )
    if method is None and activations == "int8":  # the others may be those of a checkpoint in fp8 or MXFP4
        raise ValueError(
            f"activations is {activations!r}, and nothing is quantized\n"
            'hint: quantization="int8" or "int4", or activations="auto"'
        )


_INSTEAD = {
    "method": "quantization=None",
    "activations": 'activations="auto", or for bf16 dtype="bfloat16"',
    "groupSize": 'another group_size, or quantization="int8"',
}
"""By field of `spec.quantization`: what to pass where it cannot be had."""


def _memory() -> tuple[int, int]:
    """Total and available bytes of this machine."""
    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _fit(profile: ModelProfile, request: SizingRequest, num_blocks: int | None) -> FitReport:
    """The report that the engine is built by. A fixed number of blocks may be less than one full context."""
    report = fit(profile, request)
    if num_blocks is not None:
        per_block = kv_block_bytes(profile, request.kv_dtype, request.block_size)
        room = report.limit - report.weights - report.activations - report.overhead
        reason = "" if num_blocks * per_block <= room else f"{num_blocks} blocks are more than the limit leaves"
        if report.max_model_len > profile.max_position_embeddings:
            reason = report.reason
        report = replace(
            report, fits=not reason, reason=reason, num_blocks=num_blocks, kv=num_blocks * per_block, notes=()
        )
    if not report.fits:
        told = [*replace(report, counter_offers=()).lines(), f"hint: {_remedy(profile, report)}"]
        raise DoesNotFit("\n".join(told))
    return report


def _remedy(profile: ModelProfile, report: FitReport) -> str:
    """What would fit, in arguments of `LLM`."""
    per_block = kv_block_bytes(profile, report.request.kv_dtype, report.request.block_size)
    arguments_of: dict[str, Callable[[str], str]] = {
        "spec.engine.maxModelLen": lambda value: f"max_model_len={value}",
        "spec.engine.memory": lambda value: f"memory_share={parse_percent(value):g}",
        "spec.engine.kvCache.size": lambda value: f"num_blocks={parse_quantity(value) // per_block}",
        "spec.engine.kvCache.dtype": lambda value: f'kv_dtype="{value}"',
        "spec.engine.dtype": lambda value: f'dtype="{value.split()[0]}"',
        "spec.quantization.method": lambda value: f'quantization="{value.split()[0]}"',
        "spec.batching.maxNumBatchedTokens": lambda value: f"max_num_batched_tokens={value}",
        "spec.batching.maxNumSeqs": lambda value: f"max_num_seqs={value}",
        "device": lambda value: f"a device with {value}",
    }
    if report.num_blocks * per_block > report.room >= per_block:
        return f"num_blocks={report.room // per_block}, or None for what fits"
    fitting = [arguments_of[offer.field](offer.value) for offer in report.counter_offers]
    return f"any one of these fits: {'; '.join(fitting)}" if fitting else "use a machine with more memory"
