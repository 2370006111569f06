"""R39: whatever happens to others, an answer is to the letter what it would have been alone.

A real engine with room for hardly three of its sequences behind the real router, so that all day long somebody is
thrown out and computed again; prompts that begin alike; stop strings; several answers to a prompt; streams and
whole answers; and clients that leave. What each question is answered alone is learned first, one after the other.
What must come with a stop string is not learned: it is the answer without one, up to where the string is.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from tests.effort import EFFORT, times
from tests.figures import record
from tests.integration.engine_process import engine_running
from tests.integration.router_world import World, eventually

from quire_schemas import signals, wire

REQUESTS = times(100, 20_000)
CASES = times(10, 80)
CLIENTS = 24
SHARED = list(range(300, 360))
"""What some prompts begin with: more than three blocks."""
WORDS = (
    "What is Quire?",
    "naïve café — 你好 🦊🙂",
    "Count from one to ten.",
    "The night was",
    "ein Bogen Papier: ",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One question, and what it is answered: a text for each choice."""

    body: dict[str, Any]
    texts: tuple[str, ...] = ()
    finish: tuple[str, ...] = ()


@dataclass
class Heard:
    """What came of one request."""

    texts: dict[int, str] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    done: bool = False
    left: bool = False


@pytest.fixture(scope="module")
def tight() -> Iterator[wire.EngineSpec]:
    fields = {
        "num_blocks": 20,
        "block_size": 8,
        "max_num_seqs": 6,
        "prefix_caching": True,
        "batch_invariant": True,
    }
    with engine_running(replica_id="tight", **fields) as spec:
        yield spec


@pytest.fixture
async def http(world: World, tight: wire.EngineSpec) -> AsyncIterator[httpx.AsyncClient]:
    await world.serve_process(
        tight, prefix_caching=True, max_queue_length=4 * CLIENTS, kv_tokens=tight.num_blocks * tight.block_size
    )
    async with httpx.AsyncClient(base_url=world.url, timeout=120) as http:
        yield http


def question(rng: random.Random) -> dict[str, Any]:
    """A question that no other chance but its seed has a part in."""
    prompt: str | list[int] = rng.choice(WORDS) * rng.randint(1, 3)
    if rng.random() < 0.6:
        prompt = SHARED[: rng.choice((16, 33, 60))] + [rng.randrange(100, 2000) for _ in range(rng.randint(1, 30))]
    body: dict[str, Any] = {
        "model": "tiny", "prompt": prompt, "max_tokens": rng.randint(1, 32), "n": rng.choice((1, 1, 1, 1, 2, 3)),
    }  # fmt: skip
    if rng.random() < 0.5:
        return {**body, "temperature": 0, "ignore_eos": rng.random() < 0.5}
    return {**body, "temperature": rng.choice((0.7, 1.2)), "top_p": 0.95, "seed": rng.randrange(1 << 30)}


async def ask(
    http: httpx.AsyncClient, body: dict[str, Any], *, stream: bool, leave_after: int | None = None
) -> Heard:
    """Ask, and read to the end, or only `leave_after` lines of a stream. Every byte has to be UTF-8."""
    heard = Heard()
    if not stream:
        answer = await http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        for choice in json.loads(answer.content.decode("utf-8", "strict"))["choices"]:
            heard.texts[choice["index"]], heard.finish[choice["index"]] = choice["text"], choice["finish_reason"]
        heard.done = True
        return heard
    raw = b""
    async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for piece in answer.aiter_raw():
            raw += piece
            if leave_after is not None and raw.count(b"\n\n") > leave_after:
                heard.left = True
                break
    for event in raw.decode("utf-8", "ignore" if heard.left else "strict").split("\n\n")[:-1]:
        data = event.removeprefix("data: ")
        if data == "[DONE]":
            heard.done = True
            continue
        told = json.loads(data)
        assert "error" not in told, told
        for choice in told["choices"]:
            index = choice["index"]
            assert index not in heard.finish, "nothing comes after the end"
            heard.texts[index] = heard.texts.get(index, "") + choice["text"]
            if choice["finish_reason"]:
                heard.finish[index] = choice["finish_reason"]
    return heard


def stopped(case: Case, rng: random.Random) -> Case:
    """The same question with a stop string out of its answers and one that is in none.

    Of two that overlap in an answer the one that is complete first counts, which is a matter of its tokens: a
    reference without them cannot tell.
    """
    text = rng.choice(case.texts)
    at = rng.randrange(len(text)) if text else 0
    stops = ["never said \x00", text[at : at + rng.randint(1, 8)] or "nor this \x00"]
    rng.shuffle(stops)
    texts, finish = [], []
    for whole, end in zip(case.texts, case.finish, strict=True):
        found = [at for at in map(whole.find, stops) if at >= 0]
        texts.append(whole[: min(found)] if found else whole)
        finish.append("stop" if found else end)
    return Case({**case.body, "stop": stops}, tuple(texts), tuple(finish))


def check(case: Case, heard: Heard) -> None:
    for index, text in heard.texts.items():
        wanted = case.texts[index]
        assert wanted.startswith(text), f"altered: {case.body} gave {text!r}, not {wanted!r}"
        if index in heard.finish:
            assert (text, heard.finish[index]) == (wanted, case.finish[index]), case.body
    if not heard.left:
        assert heard.done, case.body
        assert set(heard.finish) == set(range(len(case.texts))), case.body


async def test_r39_no_answer_is_altered_by_what_happens_to_others(world: World, http: httpx.AsyncClient) -> None:
    seed = 1 if EFFORT == 1 else secrets.randbelow(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    cases = []
    for _ in range(CASES):
        body = question(rng)
        alone = await ask(http, body, stream=False)
        choices = range(body["n"])
        cases.append(Case(body, tuple(alone.texts[i] for i in choices), tuple(alone.finish[i] for i in choices)))
    told: Counter[str] = Counter()
    turns = iter(range(REQUESTS))

    async def client() -> None:
        for _ in turns:
            case, stream = rng.choice(cases), rng.random() < 0.6
            if rng.random() < 0.35:
                case = stopped(case, rng)
            if rng.random() < 0.08:  # one that waits for a whole answer, and does not
                asked = asyncio.create_task(ask(http, case.body, stream=False))
                await asyncio.wait([asked], timeout=rng.uniform(0, 0.1))
                asked.cancel()
                await asyncio.wait([asked])
                told["left whole"] += 1
                continue
            heard = await ask(
                http,
                case.body,
                stream=stream,
                leave_after=rng.randint(0, 30) if stream and rng.random() < 0.15 else None,
            )
            check(case, heard)
            told["left" if heard.left else "stream" if stream else "whole"] += 1
            told["with stop strings"] += "stop" in case.body
            told["of several answers"] += case.body["n"] > 1

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(client())

    async def is_empty() -> bool:
        now = await world.metrics()
        return now[f'{signals.KV_CACHE_USAGE}{{model="tiny",replica="tight"}}'] == 0

    await eventually(is_empty)
    found = await world.metrics()
    preempted = found[f'{signals.PREEMPTIONS}_total{{model="tiny",replica="tight"}}']
    hits = found[f'{signals.PREFIX_CACHE_HITS}_total{{model="tiny",replica="tight"}}']
    print(dict(told), f"{preempted:.0f} preemptions, {hits:.0f} tokens found in the cache")
    record(
        {
            "system": "answers against what they are alone", "requests": REQUESTS, "cases": CASES, "seed": seed,
            "mismatches": 0, "preemptions": preempted, "cached_tokens": hits, **told,
        }
    )  # fmt: skip
    assert preempted > 0 if EFFORT == 1 else preempted > REQUESTS / 100
    assert hits > REQUESTS
    assert min(told[kind] for kind in ("left whole", "left", "stream", "whole", "with stop strings")) > 2
