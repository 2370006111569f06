"""The events of a response: what its items have in the end, in linear time, and how one that breaks off ends."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
from tests.effort import bound
from tests.unit.platform.test_conversation import serving

from quire import builtin
from quire.errors import InternalError, describe
from quire.router.api.responses import ResponsesStream
from quire.router.job import Job, Shown, Update
from quire.router.responses import Responses
from quire.router.spans import RequestSpan
from quire.router.store import Store
from quire.text import Tokenizer
from quire.text.dialects import CallArguments, CallBegins, Content, Dialects, Part, Reasoning
from quire.text.markup import Markup
from quire_schemas import wire
from quire_schemas.openai.answer import Usage
from quire_schemas.openai.responses import ResponsesRequest

USAGE = Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = Store(tmp_path / "router")
    yield store
    await store.close()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(builtin.path())


def stream_of(store: Store, tokenizer: Tokenizer, **options: Any) -> ResponsesStream:
    job = Job(
        id="resp_1",
        asked_model="m",
        model=serving(tokenizer, Dialects()),
        tokenizer=tokenizer,
        operation="responses",
        prompts=([1],),
        echoes=(),
        n=1,
        kept=1,
        sampling=wire.Sampling(max_tokens=1),
        shown=Shown(),
        stops=(),
        include_stop=False,
        skip_special_tokens=True,
        stream=True,
        arrived_at=0.0,
        span=RequestSpan(None),
        markup=Markup(Dialects(), (), frozenset()),
    )
    asked = {"model": "m", "input": "?", "store": False, "stream": True, **options}
    return ResponsesStream(Responses(store), job, ResponsesRequest.model_validate(asked))


def updates(*parts: Part) -> list[Update]:
    return [Update(0, "", (), None, parts=(part,)) for part in parts]


def told(events: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in events.decode().splitlines() if line.startswith("data: ")]


SAID: list[Part] = [
    *map(Reasoning, ("Hm", ", so.")),
    *map(Content, ("I ", "look.")),
    CallBegins(0, "f"),
    *(CallArguments(0, piece) for piece in ('{"a"', ": ", "1}")),
    CallBegins(1, "g"),
    CallArguments(1, "{}"),
]


def items(output: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """Items by their status, and their text."""
    found = []
    for item in output:
        parts = item.get("summary") or item.get("content")
        found.append((item["status"], parts[0]["text"] if parts else item["arguments"]))
    return found


@pytest.mark.parametrize("options", [{}, {"reasoning": {"summary": "auto"}}])
async def test_items_have_what_their_events_brought(
    store: Store, tokenizer: Tokenizer, options: dict[str, Any]
) -> None:
    stream = stream_of(store, tokenizer, **options)
    events = told(stream.events(updates(*SAID), lambda: USAGE)) + told(await stream.end(USAGE))
    texts = ["Hm, so.", "I look.", '{"a": 1}', "{}"]
    assert items(events[-1]["response"]["output"]) == [("completed", text) for text in texts]
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert items(event["item"] for event in done) == [("completed", text) for text in texts]
    kinds = ("reasoning_text", "reasoning_summary_text", "output_text", "function_call_arguments")
    ended = [event for event in events if event["type"] in {f"response.{kind}.done" for kind in kinds}]
    assert [event.get("text", event.get("arguments")) for event in ended] == texts


@pytest.mark.parametrize("at", range(1, len(SAID) + 1))
async def test_what_broke_off_has_what_had_come(store: Store, tokenizer: Tokenizer, at: int) -> None:
    stream = stream_of(store, tokenizer)
    events = told(stream.events(updates(*SAID[:at]), lambda: USAGE))
    [last] = told(await stream.broken(describe(InternalError("It broke."))))
    assert (last["type"], last["sequence_number"]) == ("response.failed", len(events))
    *before, (status, _) = items(last["response"]["output"])
    assert {state for state, _ in before} <= {"completed"}
    assert status == "incomplete"
    brought = "".join(event["delta"] for event in events if event["type"].endswith(".delta"))
    assert "".join(text for _, text in items(last["response"]["output"])) == brought


async def test_a_stream_that_text_breaks_is_told_to_be_broken(store: Store, tokenizer: Tokenizer) -> None:
    """Text that cannot be written is a fault of ours; the client hears of it all the same."""
    stream = stream_of(store, tokenizer)
    stream.events(updates(Content("a")), lambda: USAGE)
    with pytest.raises(UnicodeEncodeError) as raised:
        stream.events(updates(Content("\ud800")), lambda: USAGE)
    [last] = told(await stream.broken(describe(raised.value)))
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["message"]


@pytest.mark.parametrize("part", [Content("x" * 4096), Reasoning("x" * 4096), CallArguments(0, "x" * 4096)])
async def test_a_long_item_takes_linear_time(store: Store, tokenizer: Tokenizer, part: Part) -> None:
    stream = stream_of(store, tokenizer)
    brought = updates(*([CallBegins(0, "f")] if isinstance(part, CallArguments) else []), *[part] * 8_000)
    began = time.process_time()
    for update in brought:
        stream.events([update], lambda: USAGE)
    assert time.process_time() - began < bound(0.5), "what has come is not copied for each piece"
