"""One span for each reconcile worth one, linked to the request that is stored with the object."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from quire_operators.records import Change, Origin
from quire_operators.store import Store
from quire_operators.tracing import Passes, acted
from quire_schemas.resource import Key

KEY = Key("model", "m")
FIRST = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECOND = "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01"


def change(text: str, expected: int | None) -> Change:
    return Change(KEY, {"text": text}, text, {"text": text}, expected)


def test_the_origin_is_stored_with_each_generation_and_survives(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.db")
    assert store.origin(KEY) is None
    store.apply([change("a", None)], FIRST)
    store.apply([change("a", 1)], SECOND)  # nothing changed: the first is still why
    store.close()
    store = Store(tmp_path / "store.db")
    assert store.origin(KEY) == Origin(1, FIRST)
    store.apply([change("b", 1)])
    assert store.origin(KEY) == Origin(2, None)
    store.mark_deleting(KEY, SECOND)
    assert store.origin(KEY) == Origin(3, SECOND)
    store.remove(KEY)
    assert store.origin(KEY) is None
    store.close()


class World:
    """Passes over one object whose origin, steps and results the test sets."""

    def __init__(self) -> None:
        self.kept = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.kept))
        self.origin: Origin | None = Origin(1, FIRST)
        self.again: float | None = None
        self.steps: list[str] = []
        self.error: BaseException | None = None
        self.passes = Passes(provider.get_tracer("test"), lambda _: self.origin)

    async def reconcile(self, key: Key) -> float | None:
        assert key == KEY
        for step in self.steps:
            acted(step)
        if self.error is not None:
            raise self.error
        return self.again

    async def outcomes(self, times: int = 1) -> list[object]:
        """What the spans of so many passes say became of them."""
        self.kept.clear()
        for _ in range(times):
            assert await self.passes.run(KEY, self.reconcile) == self.again
        return [(span.attributes or {})["quire.reconcile.outcome"] for span in self.kept.get_finished_spans()]


async def test_a_pass_that_repeats_the_last_leaves_no_span() -> None:
    world = World()
    world.again = 0.1
    assert await world.outcomes(5) == ["waiting"]
    world.steps = ["start m-0"]
    assert await world.outcomes(2) == ["acted", "acted"]
    world.steps, world.again = [], None
    assert await world.outcomes(5) == ["idle"]
    world.origin = Origin(2, None)
    assert await world.outcomes(5) == ["idle"]


async def test_a_span_says_what_was_done_for_which_generation_and_why() -> None:
    world = World()
    world.steps = ["start m-0", "start m-1"]
    await world.outcomes()
    (span,) = world.kept.get_finished_spans()
    assert span.name == "reconcile model"
    assert span.attributes is not None
    assert (span.attributes["quire.resource"], span.attributes["quire.generation"]) == ("model/m", 1)
    assert [(event.attributes or {})["quire.reconcile.step"] for event in span.events] == world.steps
    assert span.parent is None
    assert [f"00-{link.context.trace_id:032x}-{link.context.span_id:016x}-01" for link in span.links] == [FIRST]


async def test_a_failure_is_told_each_time_and_an_end_never() -> None:
    world = World()
    world.error = ValueError("broken")
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            await world.outcomes()
        (span,) = world.kept.get_finished_spans()
        assert (span.attributes or {})["error.type"] == "ValueError"
        assert not span.status.is_ok
    world.error = asyncio.CancelledError()
    with pytest.raises(asyncio.CancelledError):
        await world.outcomes()
    assert world.kept.get_finished_spans() == ()


async def test_without_a_tracer_the_store_is_not_even_asked() -> None:
    def never(_: Key) -> Origin | None:
        raise AssertionError

    world = World()
    world.again = 2.0
    world.steps = ["unheard"]
    assert await Passes(None, never).run(KEY, world.reconcile) == 2.0
