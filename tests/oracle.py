"""An oracle: clients that know what the answer must be, so that nothing which happens to the platform can hide.

Answers at temperature 0 are computed once from the running engine, each prompt alone and then all at once; only
prompts whose answers agree are asked. From then on every stream must be an exact prefix of its reference:

    finished    finish_reason and `[DONE]`, and the text is the whole reference
    broken      one error event, then the end of the connection; no finish_reason, no `[DONE]`
    refused     a status of 400 or above before any text
    cut         the connection ended without a word: allowed only where the router itself was killed

A stream that hangs is none of these, whatever it brought before.

    oracle = Oracle(base_url, "quickstart", tokens=200)
    with oracle.clients(8) as clients:
        ...kill something...
        clients.wait_streaming()    every client is in the middle of an answer
    oracle.check(clients.readings)
"""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

PROMPTS = (
    "What is Quire?", "What is PagedAttention?", "What is the KV cache?", "What does platform apply do?",
    "What is continuous batching?", "What is chunked prefill?", "What is a manifest?", "What does the router do?",
    "How does a stream end?", "Who are you?", "Count from one to ten.", "The night was",
)  # fmt: skip


@dataclass
class Reading:
    """One answer as it was received. Times are `time.monotonic()`."""

    prompt: str
    text: str = ""
    status: int | None = None
    finish_reason: str | None = None
    done: bool = False
    errors: list[dict[str, Any]] = field(default_factory=list)
    hung: bool = False
    """Nothing came for so long that the client gave up."""
    first_at: float | None = None
    """When the first event of a stream came."""
    error_at: float | None = None
    ended_at: float = 0.0
    stream: bool = True
    """Whether it was asked for as a stream."""

    @property
    def outcome(self) -> str:
        """finished, broken, refused or cut."""
        if self.status is not None and self.status >= 400:
            return "refused"
        if self.finish_reason is not None:
            return "finished"
        return "broken" if self.errors else "cut"


def read(
    base_url: str,
    body: dict[str, Any],
    reading: Reading,
    give_up: threading.Event | None = None,
    patience: float = 120.0,
) -> Reading:
    """Send one streamed completion and note what comes back, until its end or until `give_up`.

    A stream that brings nothing for `patience` seconds is noted as hung.
    """
    body = {**body, "stream": True}
    try:
        with httpx.stream("POST", f"{base_url}/completions", json=body, timeout=patience) as answer:
            reading.status = answer.status_code
            if answer.status_code != 200:
                note_whole(reading, answer.read())
            for line in answer.iter_lines() if answer.status_code == 200 else ():
                note_line(reading, line)
                if give_up is not None and give_up.is_set():
                    break
    except httpx.TimeoutException:
        reading.hung = True
    except httpx.HTTPError:
        pass  # an error event is followed by a broken connection; without one `outcome` says cut
    reading.ended_at = time.monotonic()
    return reading


def note_whole(reading: Reading, body: bytes) -> None:
    """Note an answer that is no stream: a completion, or an error."""
    answer = json.loads(body)
    if "error" in answer:
        reading.errors.append(answer["error"])
        return
    (choice,) = answer["choices"]
    reading.text, reading.finish_reason, reading.done = choice["text"], choice["finish_reason"], True


def note_line(reading: Reading, line: str) -> None:
    """Note one line of a stream."""
    if not line.startswith("data: "):
        return
    if reading.first_at is None:
        reading.first_at = time.monotonic()
    data = line.removeprefix("data: ")
    if data == "[DONE]":
        reading.done = True
        return
    event = json.loads(data)
    if "error" in event:
        reading.errors.append(event["error"])
        reading.error_at = time.monotonic()
    for choice in event.get("choices", ()):
        reading.text += choice["text"]
        reading.finish_reason = choice["finish_reason"] or reading.finish_reason


def check(reading: Reading, reference: str, *, cut_allowed: bool = False) -> None:
    """Fail unless the stream is one of the four kinds, and a prefix of `reference`."""
    text, outcome = reading.text, reading.outcome
    assert not reading.hung, f"it hangs: {reading}"
    assert reference.startswith(text), f"altered: {reading.prompt!r} gave {text!r}, not {reference!r}"
    if outcome == "finished":
        assert text == reference, f"cut short and called whole: {reading}"
        assert reading.done, f"no [DONE]: {reading}"
        assert not reading.errors, f"an error in a stream that finished: {reading}"
        return
    assert not reading.done, f"[DONE] without a finish_reason: {reading}"
    if outcome == "broken":
        assert len(reading.errors) == 1, f"more than one error event: {reading}"
    if outcome == "refused":
        assert not text, f"refused with a text: {reading}"
        assert len(reading.errors) == 1, f"refused without a word: {reading}"
    if outcome == "cut":
        assert cut_allowed, f"cut without a word: {reading}"


class Clients:
    """Threads that stream one answer after the other until they are told to stop."""

    def __init__(self, oracle: Oracle, count: int) -> None:
        self._oracle = oracle
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.readings: list[Reading] = []
        """Streams that have ended."""
        self.running: list[Reading] = [Reading("") for _ in range(count)]
        """What each client receives now."""
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        turn = number
        while not self._stop.is_set():
            prompt = self._oracle.prompts[turn % len(self._oracle.prompts)]
            reading = self.running[number] = Reading(prompt)
            read(self._oracle.base_url, self._oracle.body(prompt), reading)
            with self._lock:
                self.readings.append(reading)
            turn += 1
            if reading.outcome in ("refused", "cut"):
                self._stop.wait(0.02)  # nobody is there: not a reason to ask without a pause

    def wait_streaming(self, seconds: float = 60.0) -> None:
        """Until every client has text of a stream that still runs."""
        deadline = time.monotonic() + seconds
        while not all(reading.text and not reading.ended_at for reading in self.running):
            assert time.monotonic() < deadline, f"not all clients stream: {self.running}"
            time.sleep(0.01)

    def last_turn(self) -> None:
        """No client begins another stream."""
        self._stop.set()

    def stop(self) -> list[Reading]:
        """Let every client finish its stream; all readings."""
        self.last_turn()
        for thread in self._threads:
            thread.join(180)
            assert not thread.is_alive(), "a stream hangs"
        return self.readings


class Oracle:
    """References for a model that runs. `tokens` is the length of every answer, beyond the model's own end."""

    def __init__(self, base_url: str, model: str, tokens: int = 160, count: int = 8) -> None:
        self.base_url = base_url
        self.model = model
        self.tokens = tokens
        alone = {prompt: self._ask(prompt) for prompt in PROMPTS}
        with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
            together = dict(zip(PROMPTS, pool.map(self._ask, PROMPTS), strict=True))
        self.references = {prompt: alone[prompt] for prompt in PROMPTS if alone[prompt] == together[prompt]}
        self.prompts: Sequence[str] = list(self.references)
        assert len(self.prompts) >= count, "too few answers are the same in every batch; declare dtype: float32"

    def body(self, prompt: str) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.tokens,
            "temperature": 0,
            "ignore_eos": True,
        }

    def _ask(self, prompt: str) -> str:
        answer = httpx.post(f"{self.base_url}/completions", json=self.body(prompt), timeout=180)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        assert text
        return text

    def check(self, readings: Sequence[Reading], *, cut_allowed: bool = False) -> dict[str, int]:
        """`check` every stream; how many ended in which way."""
        outcomes: dict[str, int] = {}
        for reading in readings:
            check(reading, self.references[reading.prompt], cut_allowed=cut_allowed)
            outcomes[reading.outcome] = outcomes.get(reading.outcome, 0) + 1
        return outcomes

    @contextmanager
    def clients(self, count: int) -> Iterator[Clients]:
        """`count` clients that stream until the end of the block."""
        clients = Clients(self, count)
        try:
            yield clients
        finally:
            clients.stop()
