"""Routing tables, and what is believed of a router: only what it acknowledged, over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from quire_operators.rollout import Goal, Process, Router, Row, Seen
from quire_operators.routes import FRESH_SECONDS, Routable, Routes, Text, build, serving_text
from quire_operators.status import ADVICE, Fact, Reason, conditions, progress, remedies, timestamp
from quire_operators.store import Store
from quire_schemas import wire
from quire_schemas.resource import Key

ROUTE = wire.ModelRoute("m", ("m",), 1, "t", "/t", None, 1024, 4096, 512, 60.0, 1, ())
ROW = Row("m-r1-0", "m", 0, 1, "t", Goal.RUN, 0.0, incarnation=1)
READY = Seen(Process.READY)
HTTP = wire.HttpSettings()


def table(*pairs: tuple[Row, Seen], eta: float | None = None, http: wire.HttpSettings = HTTP) -> wire.RoutingTable:
    route = msgspec.structs.replace(ROUTE, eta=eta)
    models = build([Routable(route, pairs, {row.id: f"/{row.id}" for row, _ in pairs})])
    return wire.RoutingTable(0, models, http)


def test_a_table_holds_who_may_carry_requests() -> None:
    pairs = (
        (ROW, READY),
        (replace(ROW, id="drains", goal=Goal.DRAIN), READY),
        (replace(ROW, id="starts"), Seen(Process.STARTING)),
        (replace(ROW, id="gone"), Seen(Process.EXITED)),
        (replace(ROW, id="stops", goal=Goal.DRAIN, stop_sent=1.0), READY),
        (replace(ROW, id="silent", ready_since=1.0), Seen(Process.UNKNOWN)),
        (replace(ROW, id="silent-and-never-ready"), Seen(Process.UNKNOWN)),
    )
    (route,) = table(*pairs).models
    assert [(e.replica_id, e.draining) for e in route.replicas] == [
        ("m-r1-0", False),
        ("drains", True),
        ("silent", False),
    ]


OLD, NEW = Text("/old", None), Text("/new", None)


def mixed(*replicas: tuple[str, Text, str]) -> Routable:
    """A model whose current revision has NEW; a replica is (id, text, state)."""
    pairs = []
    for name, text, state in replicas:
        row = replace(ROW, id=name, revision=2 if text == NEW else 1, ready_since=None if state == "new" else 1.0)
        row = replace(row, goal=Goal.DRAIN if state == "drains" else Goal.RUN)
        pairs.append((row, Seen(Process.STARTING) if state == "starts" else READY))
    route = msgspec.structs.replace(ROUTE, tokenizer_dir="/new")
    texts = {name: text for name, text, _ in replicas}
    return Routable(route, tuple(pairs), {name: f"/{name}" for name in texts}, texts)


@pytest.mark.parametrize(
    ("replicas", "served"),
    [
        ([], NEW),
        ([("a", OLD, "ready"), ("b", OLD, "ready"), ("c", NEW, "ready")], OLD),
        ([("a", OLD, "ready"), ("b", NEW, "ready")], NEW),
        ([("a", OLD, "ready"), ("b", NEW, "new")], OLD),
        ([("a", OLD, "ready"), ("b", OLD, "drains"), ("c", NEW, "ready")], NEW),
        ([("a", OLD, "ready"), ("b", NEW, "starts"), ("c", NEW, "starts")], OLD),
        ([("a", OLD, "drains"), ("b", NEW, "starts")], OLD),
        ([("a", OLD, "drains"), ("b", OLD, "drains"), ("c", NEW, "new")], NEW),
        ([("a", NEW, "new")], NEW),
    ],
)
def test_one_tokenizer_at_a_time_serves_and_the_other_replicas_stand_by(
    replicas: list[tuple[str, Text, str]], served: Text
) -> None:
    model = mixed(*replicas)
    assert serving_text(model) == served
    (route,) = build([model])
    assert route.tokenizer_dir == served.tokenizer_dir
    shown = {name: text for name, text, state in replicas if state != "starts"}
    assert {e.replica_id: e.standby for e in route.replicas} == {n: text != served for n, text in shown.items()}


def test_revisions_of_one_text_serve_together() -> None:
    (route,) = build([mixed(("a", NEW, "ready"), ("b", Text("/new", None), "new"))])
    assert not any(endpoint.standby for endpoint in route.replicas)


def test_scripted_replicas_and_computing_ones_do_not_serve_together() -> None:
    scripted = Text("/new", None, scripted=True)
    (route,) = build([mixed(("a", scripted, "ready"), ("b", NEW, "new"))])
    assert route.scripted
    assert [endpoint.standby for endpoint in route.replicas] == [False, True]
    (route,) = build([mixed(("a", scripted, "new"), ("b", NEW, "ready"))])
    assert not route.scripted


class Counterpart:
    """A router's control socket that keeps the table and answers with what the test says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table = wire.RoutingTable(0)
        self.loads: list[wire.ReplicaLoad] = []
        self.tables = 0
        self.limits: list[wire.SetLimits] = []
        self.grace: float | None = None
        self.pid = 1
        self.older = False
        """It is of a version that says nothing of settings."""
        self.parts = wire.PARTS

    async def open(self) -> None:
        self.server = await asyncio.start_unix_server(self.talk, str(self.path))

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames: wire.Reader[wire.ToRouter] = wire.Reader(reader, wire.ToRouter)
        while (message := await frames.read()) is not None:
            if isinstance(message, wire.RoutingTable) and message.version > self.table.version:
                self.table = msgspec.structs.replace(message, http=HTTP) if self.older else message
                self.tables += 1
            if isinstance(message, wire.SetLimits):
                self.limits.append(message)
            if isinstance(message, wire.Finish):
                self.grace = message.grace
            http = None if self.older else self.table.http
            parts = () if self.older else self.parts
            status = wire.RouterStatus(self.table.version, self.pid, "http://x", self.loads, http, parts)
            writer.write(wire.frame(status))
        writer.close()


class World:
    def __init__(self, tmp_path: Path) -> None:
        self.now = 1000.0
        self.runs: bool | None = True
        self.store = Store(tmp_path / "s.db")
        self.router = Counterpart(tmp_path / "r.sock")
        self.routes = self.control_plane()

    def control_plane(self) -> Routes:
        return Routes(self.router.path, self.store, lambda: self.runs, lambda: self.now)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    await world.router.open()
    yield world
    world.router.server.close()
    world.store.close()


async def test_a_table_is_sent_when_it_differs_and_believed_when_acknowledged(world: World) -> None:
    content = table((ROW, READY))
    assert world.routes.knowledge() is Router.UNKNOWN
    assert not world.routes.view(ROW, READY).released
    assert await world.routes.reconcile(content)
    assert world.routes.knowledge() is Router.KNOWN
    assert not world.routes.view(ROW, READY).routed, "in the table, but not connected"
    world.router.loads = [wire.ReplicaLoad("m-r1-0", 1, True, 3, "hot")]
    assert await world.routes.reconcile(content)
    seen = world.routes.view(ROW, READY)
    assert (seen.connected, seen.routed, seen.released, seen.in_flight, seen.hot_hash) == (
        True,
        True,
        False,
        3,
        "hot",
    )
    assert not world.routes.view(replace(ROW, incarnation=2), READY).connected, (
        "another incarnation is another one"
    )
    world.router.loads = [wire.ReplicaLoad("m-r1-0", 1, True, 5, "hot")]
    assert not await world.routes.reconcile(content), "more requests in flight are no news"
    assert world.router.tables == 1
    await world.routes.reconcile(table((replace(ROW, goal=Goal.DRAIN), READY)))
    seen = world.routes.view(ROW, READY)
    assert (seen.connected, seen.routed, seen.released) == (True, False, True)


async def test_a_replica_that_fails_what_it_is_given_is_told_of_once(world: World) -> None:
    content = table((ROW, READY))

    async def stands(breaker: wire.BreakerState) -> tuple[bool, bool]:
        world.router.loads = [wire.ReplicaLoad("m-r1-0", 1, True, 0, "hot", breaker)]
        news = await world.routes.reconcile(content)
        return news, world.routes.view(ROW, READY).failing

    await world.routes.reconcile(content)
    assert [await stands(each) for each in ("closed", "open", "trying", "open", "closed", "closed")] == [
        (True, False), (True, True), (False, True), (False, True), (True, False), (False, False),
    ]  # fmt: skip
    events = world.store.events(Key("model", "m"))
    assert [(each.type, each.reason, each.count) for each in events] == [
        ("Warning", "ReplicaTripped", 1), ("Normal", "ReplicaRecovered", 1),
    ]  # fmt: skip


async def test_settings_of_the_gateway_are_sent_and_acknowledged_like_routes(world: World) -> None:
    content = table((ROW, READY))
    await world.routes.reconcile(content)
    assert world.routes.takes("http", HTTP)
    wider = wire.HttpSettings(allow_origins=("https://a.example",))
    other = table((ROW, READY), http=wider)
    assert not world.routes.takes("http", wider)
    assert await world.routes.reconcile(other)
    assert world.routes.takes("http", wider)
    assert world.router.table.http == wider
    await world.routes.reconcile(other)
    assert world.router.tables == 2
    world.router.older = True
    await world.routes.reconcile(other)
    assert not world.routes.takes("http", wider), (
        "a router of a version without settings took the table and not these"
    )
    assert world.routes.is_older("http")
    await world.routes.reconcile(content)
    assert world.routes.takes("http", HTTP), "what it does is what the defaults say"
    await world.routes.reconcile(other)
    tables = world.router.tables
    await world.routes.reconcile(other)
    assert world.router.tables == tables, "it would not hear them any better"
    world.router.older = False  # it was started again, by the version that is installed now, with what it had kept
    world.router.pid += 1
    assert not world.routes.takes("http", wider)
    await world.routes.reconcile(other)
    await world.routes.reconcile(other)
    assert world.routes.takes("http", wider)


async def test_a_part_that_a_router_does_not_know_is_not_in_force_and_not_sent_for_ever(world: World) -> None:
    content = msgspec.structs.replace(table((ROW, READY)), routes=(wire.TrafficRoute("r", ("x",), 1, ()),))
    world.router.parts = ("models", "http")
    for _ in range(3):
        await world.routes.reconcile(content)
    assert world.router.tables == 1
    assert world.routes.is_older("routes")
    assert not world.routes.takes("routes", content.routes)
    assert world.routes.takes("routes", ()), "without any it does what is wanted"
    assert world.routes.takes("http", HTTP)
    in_force = world.routes.in_force()
    assert in_force is not None
    assert (in_force.models, in_force.routes) == (content.models, ())
    assert world.routes.knowledge() is Router.KNOWN, "models are served all the same"
    world.router.parts, world.router.pid = wire.PARTS, 2
    await world.routes.reconcile(content)
    assert world.routes.takes("routes", content.routes)
    assert world.router.tables == 2


async def test_an_estimate_alone_is_no_reason_for_a_new_table(world: World) -> None:
    for eta in (9.0, 8.0, 7.5):
        await world.routes.reconcile(table(eta=eta))
    assert world.router.tables == 1
    await world.routes.reconcile(table(eta=None))
    assert world.router.tables == 2


async def test_versions_grow_over_restarts_on_either_side(world: World) -> None:
    await world.routes.reconcile(table((ROW, READY)))
    world.router.table = msgspec.structs.replace(world.router.table, version=41)
    again = world.control_plane()
    await again.reconcile(table((ROW, READY)))
    assert world.router.table.version == 42
    assert again.knowledge() is Router.KNOWN
    world.router.table = wire.RoutingTable(0)  # a router that lost its snapshot
    await again.reconcile(table((ROW, READY)))
    assert world.router.table.version == 43
    assert world.store.routing_version() == 43


async def test_a_status_grows_old_and_a_router_that_does_not_run_holds_nothing(world: World) -> None:
    await world.routes.reconcile(table((ROW, READY)))
    world.now += FRESH_SECONDS + 1
    assert world.routes.knowledge() is Router.UNKNOWN
    world.runs = False
    assert world.routes.knowledge() is Router.DOWN
    seen = world.routes.view(ROW, READY)
    assert (seen.connected, seen.released, seen.in_flight) == (False, True, 0)
    assert world.routes.load_of("m-r1-0", 1) == (True, 0)


async def test_nobody_listening_is_no_error(tmp_path: Path, world: World) -> None:
    lonely = Routes(tmp_path / "nobody.sock", world.store, lambda: True, lambda: 0.0)
    assert not await lonely.reconcile(wire.RoutingTable(0))
    assert lonely.knowledge() is Router.UNKNOWN
    await lonely.set_limits(("m-r1-0",), wire.Limits("h", 1, 1, True))
    assert not await lonely.finish(1.0)


async def test_the_router_is_told_how_long_running_requests_may_go_on(world: World) -> None:
    assert await world.routes.finish(2.5)
    assert world.router.grace == 2.5


async def test_limits_are_passed_on(world: World) -> None:
    await world.routes.set_limits(("m-r1-0",), wire.Limits("h", 4, 64, False))
    assert world.router.limits == [wire.SetLimits(("m-r1-0",), wire.Limits("h", 4, 64, False))]


# ── status ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_condition_keeps_the_time_of_its_last_change() -> None:
    first = conditions([Fact("Ready", False, Reason.STARTING)], [], 1, 100.0)
    same = conditions([Fact("Ready", False, Reason.NO_REPLICA_AVAILABLE, "x")], first, 2, 200.0)
    assert same[0]["lastTransitionTime"] == timestamp(100.0) == "1970-01-01T00:01:40.000Z"
    assert (same[0]["reason"], same[0]["observedGeneration"]) == ("NoReplicaAvailable", 2)
    changed = conditions([Fact("Ready", True, Reason.SERVING)], same, 2, 300.0)
    assert changed[0]["lastTransitionTime"] == timestamp(300.0)


def test_progress_keeps_what_was_reached_until_the_next_generation() -> None:
    reached = {"accepted": True, "weights": True, "device": False, "loaded": False, "ready": False}
    first = progress(None, 1, reached, 0.5, weights={"bytes": 7})
    assert first["weights"] == {"ok": True, "seconds": 0.5, "bytes": 7}
    assert first["device"] is None
    later = progress(first, 1, {**reached, "device": True, "weights": False}, 2.0, loaded={"bytesDone": 3})
    assert later["weights"]["seconds"] == 0.5
    assert later["device"]["seconds"] == 2.0
    assert later["loaded"] == {"ok": False, "seconds": None, "bytesDone": 3}
    assert progress(later, 2, reached, 0.1)["weights"]["seconds"] == 0.1


def test_every_reason_that_is_not_good_says_what_one_can_do() -> None:
    good = {
        "Valid",
        "Verified",
        "Scheduled",
        "Serving",
        "UpToDate",
        "Progressing",
        "Stopped",
        "Listening",
        "NativeKernels",
        "Attested",
        "Enforced",
        "Synced",
        "Healthy",
        "InStep",
        "Deleting",
    }
    assert {reason for reason in Reason if reason.value not in good} == set(ADVICE)
    shown = conditions(
        [Fact("Ready", False, Reason.STARTING), Fact("Stalled", True, Reason.CRASH_LOOP, "boom")], [], 1, 0.0
    )
    lines = remedies("model/m", shown)
    assert lines[0] == "platform logs model/m   what the engine said last"
    assert all(line for line in lines)
