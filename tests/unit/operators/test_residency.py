"""Who is in memory: cases by hand, and random worlds: no memory is promised twice, and nobody starves."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.effort import EFFORT, examples

from quire_operators.devices import Inventory
from quire_operators.nvml import Gpu
from quire_operators.residency import PATIENCE, Load, Tenant, Unload, plan

GIB = 1 << 30
CPU = Inventory(10 * GIB, 10 * GIB, 4)


def tenant(model: str, *, inside: bool = False, need: int = 4, kind: str = "cpu", **more: Any) -> Tenant:
    """A model on demand of one replica of `need` GiB; `inside`: it is in memory."""
    device = "cpu" if kind == "cpu" else "cuda:0"
    base = Tenant(model, True, inside, 0 if inside else 1, kind, need * GIB, 1.0)
    return replace(base, **{"holds": {device: need * GIB} if inside else {}, **more})


def moves(tenants: list[Tenant], now: float = 5.0, inventory: Inventory = CPU) -> list[Load | Unload]:
    return list(plan(tenants, inventory, held(tenants), now).moves)


def held(tenants: list[Tenant]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for each in tenants:
        for device, size in each.holds.items():
            sums[device] = sums.get(device, 0) + size
    return sums


def test_who_is_asked_for_is_loaded_where_there_is_room_and_nobody_else_is() -> None:
    assert moves([tenant("a", asked_since=1.0), tenant("b")]) == [Load("a")]


def test_the_least_recently_used_leaves_and_the_load_waits_until_it_has_left() -> None:
    old, new = tenant("old", inside=True, used_at=1.0), tenant("new", inside=True, used_at=2.0)
    asked = tenant("a", asked_since=4.0)
    assert moves([new, old, asked]) == [Unload("old", "a")]
    leaving = replace(old, resident=False, missing=1, leaving=old.holds)
    assert moves([new, leaving, asked]) == [], "its room is on its way"
    gone = replace(leaving, holds={}, leaving={})
    assert moves([new, gone, asked]) == [Load("a")]


def test_one_in_use_leaves_only_when_somebody_has_waited_long_enough() -> None:
    busy = [
        tenant(name, inside=True, busy=True, used_at=float(n), serving_since=0.0) for n, name in enumerate("bc")
    ]
    asked = tenant("a", asked_since=100.0)
    waiting = plan([*busy, asked], CPU, held(busy), 100.0 + PATIENCE - 1)
    assert (waiting.moves, waiting.short, waiting.look_at) == ((), (), 100.0 + PATIENCE)
    assert moves([*busy, asked], 100.0 + PATIENCE) == [Unload("b", "a")]
    idle = tenant("d", inside=True, need=2, used_at=99.0)
    assert moves([*busy, idle, replace(asked, need=2 * GIB)], 101.0) == [Unload("d", "a")], "it is not in use"


def test_those_that_are_always_there_come_first_and_never_leave() -> None:
    always = tenant("always", on_demand=False, resident=True, missing=1, asked_since=9.0)
    guest = tenant("guest", inside=True, need=8)
    assert moves([guest, always, tenant("b", asked_since=1.0)], 20.0) == [Unload("guest", "always")]
    fixed = tenant("fixed", inside=True, on_demand=False, need=8)
    stuck = plan([fixed, tenant("b", asked_since=1.0)], CPU, held([fixed]), 99.0)
    assert (stuck.moves, stuck.short, stuck.look_at) == ((), ("b",), None)


def test_priority_decides_who_is_loaded_and_who_leaves() -> None:
    first, second = tenant("first", asked_since=1.0), tenant("second", asked_since=2.0, priority=1)
    assert moves([first, second, tenant("full", inside=True, need=6, on_demand=False)]) == [Load("second")]
    old, new = tenant("old", inside=True, used_at=1.0, priority=1), tenant("new", inside=True, used_at=2.0)
    assert moves([old, new, tenant("a", asked_since=4.0)]) == [Unload("new", "a")]


def test_one_in_use_leaves_for_nobody_of_lower_priority_until_it_is_idle() -> None:
    busy = tenant("b", inside=True, need=8, busy=True, serving_since=0.0, priority=1)
    asked = tenant("a", asked_since=0.0)
    kept_out = plan([busy, asked], CPU, held([busy]), 100.0)
    assert (kept_out.moves, kept_out.short) == ((), ("a",)), "and that it waits for nobody is said"
    assert moves([busy, replace(asked, priority=1)], 100.0) == [Unload("b", "a")]
    assert moves([replace(busy, busy=False), asked], 100.0) == [Unload("b", "a")]


def test_only_who_makes_room_on_the_right_device_has_to_go() -> None:
    machine = Inventory(10 * GIB, 10 * GIB, 4, (Gpu(0, "G", 10 * GIB, 2 * GIB),))
    on_cpu = tenant("c", inside=True, need=8, used_at=1.0)
    on_gpu = tenant("g", inside=True, need=8, kind="cuda", used_at=2.0)
    asked = tenant("a", kind="cuda", asked_since=3.0)
    assert moves([on_cpu, on_gpu, asked], inventory=machine) == [Unload("g", "a")]


def test_as_many_leave_as_are_needed_and_no_more() -> None:
    small = [tenant(f"s{n}", inside=True, need=2, used_at=float(n)) for n in range(5)]
    assert moves([*small, tenant("a", need=4, asked_since=9.0)]) == [Unload("s0", "a"), Unload("s1", "a")]


def test_a_model_whose_replicas_are_still_leaving_takes_them_back() -> None:
    leaving = tenant("a", holds={"cpu": 4 * GIB}, leaving={"cpu": 4 * GIB}, asked_since=1.0)
    other = tenant("b", inside=True, busy=True)
    assert moves([leaving, other]) == [Load("a")]


def test_what_a_gpu_is_measured_to_hold_does_not_hide_the_room_that_a_leaving_model_makes() -> None:
    engine = tenant("g", inside=True, need=8, kind="cuda")
    asked = tenant("a", kind="cuda", need=8, asked_since=3.0)
    machine = Inventory(10 * GIB, 10 * GIB, 4, (Gpu(0, "G", 10 * GIB, 2 * GIB),))
    assert moves([engine, asked], inventory=machine) == [Unload("g", "a")]
    beside = Inventory(10 * GIB, 10 * GIB, 4, (Gpu(0, "G", 10 * GIB, 0),))
    stuck = plan([engine, replace(asked, need=9 * GIB)], beside, held([engine]), 99.0)
    assert (stuck.moves, stuck.short) == ((), ("a",)), "another process holds 2 GiB, whoever of us leaves"


def test_one_that_loads_is_not_sent_away_by_the_next() -> None:
    loading = tenant("b", inside=True, busy=True)
    asked = tenant("a", need=8, asked_since=0.0)
    waiting = plan([loading, asked], CPU, held([loading]), 100.0)
    assert (waiting.moves, waiting.short) == ((), ())
    assert waiting.look_at == 100.0 + PATIENCE
    served = replace(loading, serving_since=95.0)
    assert plan([served, asked], CPU, held([served]), 100.0).look_at == 95.0 + PATIENCE
    assert moves([served, asked], 95.0 + PATIENCE) == [Unload("b", "a")]


def test_room_that_was_promised_is_not_taken_back_by_who_leaves() -> None:
    leaving = tenant("b", need=8, holds={"cpu": 8 * GIB}, leaving={"cpu": 8 * GIB}, asked_since=50.0)
    first = tenant("a", need=8, asked_since=1.0)
    assert moves([leaving, first], 60.0) == []
    assert moves([leaving, replace(first, asked_since=None)], 60.0) == [Load("b")]


@dataclass
class Model:
    """One model on demand in a simulated world."""

    need: int
    waiting: int = 0
    running: int = 0
    resident: bool = False
    row: str = ""
    """Empty, `run` or `drain`."""
    since: float = 0.0
    """When the row began to load, or to drain."""
    ready: float | None = None
    asked: float | None = None
    used: float = 0.0
    turns: list[float] = field(default_factory=list)
    """How long each of its turns served."""


@dataclass
class World:
    """Engines that take `load` seconds to load, and streams that outlast a drain of `DRAIN` seconds."""

    models: dict[str, Model]
    load: float
    now: float = 0.0
    unloads: int = 0

    DRAIN = 5.0

    def tenants(self) -> list[Tenant]:
        found = []
        for name, model in self.models.items():
            asks = model.waiting > 0 and model.row != "run"
            model.asked = (model.asked if model.asked is not None else self.now) if asks else None
            holds = {"cpu": model.need * GIB} if model.row else {}
            leaving = holds if model.row == "drain" or not model.resident else {}
            found.append(
                tenant(
                    name, need=model.need, resident=model.resident, missing=int(model.row != "run"), holds=holds,
                    leaving=leaving, asked_since=model.asked, busy=model.waiting + model.running > 0,
                    used_at=model.used, serving_since=model.ready,
                )
            )  # fmt: skip
        return found

    def fits(self, need: int) -> bool:
        return held(self.tenants()).get("cpu", 0) + need * GIB <= CPU.memory

    def tick(self, seconds: float = 0.5) -> None:
        self.now += seconds
        tenants = self.tenants()
        for move in plan(tenants, CPU, held(tenants), self.now).moves:
            model = self.models[move.model]
            if isinstance(move, Unload):
                busy = model.waiting + model.running > 0
                assert not busy or (model.ready is not None and self.now >= model.ready + PATIENCE), (
                    "it has no turn"
                )
                self.unloads += 1
                model.resident = False
            else:
                model.resident = True
        for model in self.models.values():
            if model.row == "run" and not model.resident:
                if model.ready is not None:
                    model.turns.append(self.now - model.ready)
                model.row, model.since, model.ready = "drain", self.now, None
            elif model.row == "drain" and model.resident:
                model.row, model.ready = "run", self.now
            elif model.row == "drain" and (not model.running or self.now >= model.since + self.DRAIN):
                model.row, model.running = "", 0
            elif (
                not model.row
                and model.resident
                and held(self.tenants()).get("cpu", 0) + model.need * GIB <= CPU.memory
            ):
                model.row, model.since = "run", self.now
            elif model.row == "run" and model.ready is None and self.now >= model.since + self.load:
                model.ready = self.now
            if model.ready is not None and model.waiting:
                model.running, model.waiting, model.used = model.running + model.waiting, 0, self.now
        assert held(self.tenants()).get("cpu", 0) <= CPU.memory, "memory was promised twice"


@pytest.mark.parametrize("load", [0.5, 5.0, 30.0])
def test_two_that_are_always_wanted_take_turns(load: float) -> None:
    world = World({"a": Model(8), "b": Model(8)}, load)
    for _ in range(1200):
        for model in world.models.values():
            model.waiting += 1
        world.tick()
    turns = [turn for model in world.models.values() for turn in model.turns]
    assert min(turns) >= PATIENCE
    assert all(
        len(model.turns) >= 600 / (load + PATIENCE + World.DRAIN + 3) / 2 - 1 for model in world.models.values()
    )


@given(
    needs=st.lists(st.integers(1, 10), min_size=2, max_size=6),
    load=st.sampled_from([0.5, 3.0, 20.0]),
    steps=st.lists(st.tuples(st.sampled_from(["ask", "ask", "end", "wait"]), st.integers(0, 5)), max_size=60),
)
@settings(max_examples=examples(60), deadline=None, derandomize=EFFORT == 1)
def test_memory_is_never_promised_twice_and_who_asks_is_served_in_the_end(
    needs: list[int], load: float, steps: list[tuple[str, int]]
) -> None:
    world = World({f"m{n}": Model(need) for n, need in enumerate(needs)}, load)
    for what, which in steps:
        model = world.models[f"m{which % len(needs)}"]
        if what == "ask":
            model.waiting += 1
        elif what == "end":
            model.running, model.used = 0, world.now
        world.tick(PATIENCE if what == "wait" else 0.5)
    for _ in range(int(len(needs) * 2 * (load + PATIENCE + World.DRAIN + 5) / 0.5)):
        world.tick()
    assert not any(model.waiting for model in world.models.values()), world
