"""What canaries are asked before they have any request (`wire.Exam`).

An exam comes with the table, and how far it is goes back with the status (`canaries.Sitting`). Questions are put
one after the other to a ready replica of each revision that they concern, straight to its engine: they are
nobody's requests, are counted nowhere, and take one seat. A question is what a user would send: rendered by the
revision's own template, made into ids by its own tokenizer, and answered greedily.

    smoke    the canary answers, and the answer contains what it is to contain, or not
    drift    the stable revision answers; then both read their own rendering of the question and this answer behind
             it, and tell how likely they held each of its tokens (`drift`)

Both read the answer the same way, as a prompt, so that equals differ by no more than rounding. What a revision
cannot do is the result of its question; what it cannot do now (no replica is ready, one ends) is waited for, and
told. An engine that ends under a question is asked once more, and then no other one. The canary has no requests
yet: that it does not answer in time is its failure. The stable revision has all of them, so it is asked again.

    _Failed           the result of the question
      _NoRoom         it does not fit
      _Late           it was not answered in time
    _NotNow           it is asked again
      _Lost           the engine ended under it
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable
from typing import Final, TypeVar

from quire.router import drift
from quire.router.canaries import Sitting
from quire.router.engine_client import EngineClient, NotConnected
from quire.router.fleet import Fleet, ServedModel
from quire.router.run import ENGINE_GONE
from quire.text import TextError, Tokenizer
from quire_schemas import wire

log = logging.getLogger("quire.router")

AGAIN_SECONDS: Final = 1.0
"""Until what is waited for is looked at again, if nothing tells of it."""
FIRST_SECONDS: Final = 60.0
"""That a replica has for a prompt; and a second for each token of the answer."""
LOSSES: Final = 2
"""Engines that one question may end."""
SHOWN: Final = 200
"""Characters of an answer that are told."""


class _NotNow(Exception):
    """It cannot be asked now."""


class _Lost(_NotNow):
    """The engine that was asked has ended."""


class _Failed(Exception):
    """The revision cannot do it."""


class _NoRoom(_Failed):
    """The question does not fit."""


class _Late(_Failed):
    """There was no answer in its time."""


T = TypeVar("T")


class Examiner:
    """Examines the canaries of a fleet, from `start` to `close`."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._at: dict[Sitting, asyncio.Task[None]] = {}
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._watch = asyncio.create_task(self._look(), name="exams")

    async def close(self) -> None:
        """Leave all of them where they are."""
        tasks = [*self._at.values(), *([self._watch] if self._watch is not None else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _look(self) -> None:
        """Begin the exams that are in the table, and end those that are not any more."""
        while True:
            changed, sittings = self._fleet.changed, self._fleet.canaries.sittings()
            for sitting, task in list(self._at.items()):
                if sitting not in sittings:
                    task.cancel()
                    del self._at[sitting]
            for sitting in sittings:
                if sitting not in self._at:
                    self._at[sitting] = asyncio.create_task(self._examine(sitting), name="exam")
            await changed.wait()

    async def _examine(self, sitting: Sitting) -> None:
        losses = 0
        while not sitting.is_over:
            changed = self._fleet.changed
            try:
                await self._next(sitting)
                losses, sitting.waits = 0, ""
                continue
            except _Lost as lost:
                losses += 1
                if losses >= LOSSES:
                    self._note(sitting, str(lost))
                    losses = 0
                sitting.waits = str(lost)
            except _NotNow as why:
                sitting.waits = str(why)
            except Exception:  # whatever it is, the canary has not passed
                log.exception("the canary of %s cannot be examined", sitting.stable.name)
                self._note(sitting, "the router failed on it")
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(AGAIN_SECONDS):
                    await changed.wait()

    def _note(self, sitting: Sitting, problem: str) -> None:
        """There is no better result to the question whose turn it is."""
        if sitting.question_is_smoke:
            sitting.smoke.append(wire.Answered(problem=problem))
        else:
            sitting.drift.append(wire.Drifted(problem=problem))

    async def _next(self, sitting: Sitting) -> None:
        """Put one question. Raises `_NotNow`."""
        question = sitting.question
        try:
            if sitting.question_is_smoke:
                sitting.smoke.append(await _smoke(sitting.new, question))
            else:
                sitting.drift.append(await _drift(sitting.stable, sitting.new, question))
        except _NoRoom as why:
            if sitting.question_is_smoke:
                self._note(sitting, str(why))
            else:
                sitting.drift.append(wire.Drifted())
        except (_Failed, TextError) as why:
            self._note(sitting, str(why))


async def _smoke(new: ServedModel, question: wire.Question) -> wire.Answered:
    client, tokenizer = _replica(new, "the canary"), new.usable
    ids = await asyncio.to_thread(_ids, tokenizer, question.prompt)
    _check_room(new, len(ids) + question.max_tokens)
    answer, ends, _ = await _run(client, ids, _greedy(new, question, tokenizer.advised.repetition_penalty or 1.0))
    text = tokenizer.decode(answer[: len(answer) - ends])
    return wire.Answered(text[:SHOWN], question.expects in text)


async def _drift(stable: ServedModel, new: ServedModel, question: wire.Question) -> wire.Drifted:
    mine, its = _replica(stable, "the stable revision"), _replica(new, "the canary")
    old_ids, new_ids = await asyncio.to_thread(
        lambda: (_ids(stable.usable, question.prompt), _ids(new.usable, question.prompt))
    )
    for served, ids in ((stable, old_ids), (new, new_ids)):
        _check_room(served, len(ids) + question.max_tokens + 1)
        if (len(ids) + question.max_tokens) * (drift.TOP + 1) > wire.MAX_LOGPROB_ENTRIES:
            raise _NoRoom("the prompt is too long to be compared")
    answer, _, _ = await _of_stable(_run(mine, old_ids, _greedy(stable, question)))
    if not answer:
        raise _NotNow("the stable revision gave no answer")
    _check_same(stable.usable, new.usable, answer)
    if max(answer) >= new.vocab_size:
        raise _Failed(f"its vocabulary has {new.vocab_size} tokens, and the stable revision answers with others")
    old_scores = await _of_stable(_scores(mine, stable, question, old_ids, answer))
    new_scores = await _scores(its, new, question, new_ids, answer)
    _check_same(
        stable.usable, new.usable, [token for each in (*old_scores, *new_scores) for token in drift.told(each)]
    )
    agreed, kl = drift.compare(old_scores, new_scores)
    return wire.Drifted(len(answer), agreed, kl)


async def _of_stable(asked: Awaitable[T]) -> T:
    """What the stable revision tells; that it is late says nothing of the canary. Raises `_NotNow`, `_Failed`."""
    try:
        return await asked
    except _Late as late:
        raise _NotNow(f"the stable revision is busy: {late}") from None
    except _Failed as why:
        raise _Failed(f"of the stable revision, {why}") from None


async def _scores(
    client: EngineClient, served: ServedModel, question: wire.Question, prompt: list[int], answer: list[int]
) -> list[wire.TokenLogprobs]:
    """What a replica holds of each token of an answer."""
    one = _greedy(served, question)
    sampling = wire.Sampling(
        max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=drift.TOP, script=one.script
    )
    _, _, scores = await _run(client, [*prompt, *answer], sampling)
    found = scores[len(prompt) - 1 :]
    if len(found) != len(answer) or not all(each.top for each in found):
        raise _Failed("its engine did not tell how likely the tokens are")
    return found


def _replica(served: ServedModel, whose: str) -> EngineClient:
    """The ready replica of a revision that has least to do. Raises `_NotNow`."""
    wanted = served.route.template_hash
    ready = [client for client in served.clients if client.ready and client.endpoint.template_hash == wanted]
    if not ready:
        raise _NotNow(f"no replica of {whose} is ready")
    return min(ready, key=lambda client: client.in_flight)


def _ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The question as the model sees it. Raises `TextError`."""
    if tokenizer.template is None:
        return tokenizer.encode(prompt)
    return tokenizer.encode(tokenizer.render([{"role": "user", "content": prompt}]), False)


def _greedy(served: ServedModel, question: wire.Question, repetition_penalty: float = 1.0) -> wire.Sampling:
    script = tuple(served.usable.encode(question.prompt, False)) if served.route.scripted else None
    return wire.Sampling(
        max_tokens=question.max_tokens, temperature=0.0, repetition_penalty=repetition_penalty, script=script
    )


def _check_room(served: ServedModel, tokens: int) -> None:
    limit = min(served.route.max_model_len, served.route.kv_tokens)
    if tokens > limit:
        raise _NoRoom(f"its context holds {limit} tokens, and the question and its answer need {tokens}")


def _check_same(stable: Tokenizer, new: Tokenizer, ids: list[int]) -> None:
    """Raises `_Failed` where an id is one token here and another one there: probabilities of them say nothing."""
    each = sorted(set(ids))
    for token, was, is_now in zip(each, stable.spell(each), new.spell(each), strict=True):
        if was != is_now:
            raise _Failed(f"the tokenizers differ: token {token} is {was!r}, and {is_now!r} in the canary")


async def _run(
    client: EngineClient, ids: list[int], sampling: wire.Sampling
) -> tuple[list[int], bool, list[wire.TokenLogprobs]]:
    """The tokens of an answer, whether the last one ended it, and what is told of the prompt's.

    Raises `_NotNow` and `_Failed`.
    """
    bell, name = asyncio.Event(), client.endpoint.replica_id
    answer: list[int] = []
    scores: list[wire.TokenLogprobs] = []
    patience = FIRST_SECONDS + sampling.max_tokens
    request = wire.Generate(id=f"exam-{uuid.uuid4().hex}", token_ids=ids, sampling=sampling, timeout=patience)
    try:
        sequence = client.ask(request, bell)
    except NotConnected:
        raise _NotNow(f"{name} is not connected") from None
    try:
        async with asyncio.timeout(patience):
            while True:
                deltas = sequence.take()
                for delta in deltas:
                    answer += delta.token_ids
                    scores += delta.prompt_logprobs or ()
                    if delta.finish_reason == "error" and delta.error_code in ENGINE_GONE:
                        raise _Lost(f"{name} ended while it was asked")
                    if delta.finish_reason == "error" and delta.error_code == "queue_full":
                        raise _NotNow(f"{name} has no room for a question")
                    if delta.finish_reason == "error" and delta.error_code == "timeout":
                        raise TimeoutError  # the engine's clock was first
                    if delta.finish_reason == "error":
                        raise _Failed(f"its engine says {delta.error_code}")
                    if delta.finish_reason is not None:
                        ends = delta.stop_token_id is not None
                        return (
                            answer + ([delta.stop_token_id] if delta.stop_token_id is not None else []),
                            ends,
                            scores,
                        )
                if sequence.lost:
                    raise _Lost(f"{name} ended while it was asked")
                await bell.wait()
                bell.clear()
    except TimeoutError:
        raise _Late(f"there is no answer within {patience:g} seconds") from None
    finally:
        sequence.abort()
