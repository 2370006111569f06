"""Who is in memory: cases by hand, and random worlds: no memory is promised twice, and nobody starves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

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
    leaving = replace(old, resident=False, missing=1)
    assert moves([new, leaving, asked]) == [], "its room is on its way"
    gone = replace(leaving, holds={})
    assert moves([new, gone, asked]) == [Load("a")]


def test_one_in_use_leaves_only_when_somebody_has_waited_long_enough() -> None:
    busy = [tenant(name, inside=True, busy=True, used_at=float(n)) for n, name in enumerate("bc")]
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


def test_only_who_makes_room_on_the_right_device_has_to_go() -> None:
    machine = Inventory(10 * GIB, 10 * GIB, 4, (Gpu(0, "G", 10 * GIB, 10 * GIB),))
    on_cpu = tenant("c", inside=True, need=8, used_at=1.0)
    on_gpu = tenant("g", inside=True, need=8, kind="cuda", used_at=2.0)
    asked = tenant("a", kind="cuda", asked_since=3.0)
    assert moves([on_cpu, on_gpu, asked], inventory=machine) == [Unload("g", "a")]


def test_as_many_leave_as_are_needed_and_no_more() -> None:
    small = [tenant(f"s{n}", inside=True, need=2, used_at=float(n)) for n in range(5)]
    assert moves([*small, tenant("a", need=4, asked_since=9.0)]) == [Unload("s0", "a"), Unload("s1", "a")]


def test_a_model_whose_replicas_are_still_leaving_takes_them_back() -> None:
    leaving = tenant("a", holds={"cpu": 4 * GIB}, asked_since=1.0)
    other = tenant("b", inside=True, busy=True)
    assert moves([leaving, other]) == [Load("a")]


@dataclass
class World:
    """Models that are asked for and used at random; a load takes its memory at once, an unload a while later."""

    tenants: dict[str, Tenant]
    now: float = 0.0

    def step(self) -> None:
        planned = plan(list(self.tenants.values()), CPU, held(list(self.tenants.values())), self.now)
        for move in planned.moves:
            own = self.tenants[move.model]
            if isinstance(move, Unload):
                assert own.on_demand
                assert own.resident
                asker = self.tenants[move.because]
                assert asker.asked_since is not None
                assert not own.busy or self.now >= asker.asked_since + PATIENCE, "it is in use"
                self.tenants[move.model] = replace(own, resident=False, missing=1)
            else:
                assert own.asked_since is not None
                self.tenants[move.model] = replace(own, resident=True)
        for own in list(self.tenants.values()):
            if own.resident and own.missing:
                free = CPU.memory - held(list(self.tenants.values())).get("cpu", 0)
                mine = own.holds.get("cpu", 0)
                assert free + mine >= own.need or not own.on_demand, "loaded into room that is not there"
                if free + mine >= own.need:
                    self.tenants[own.model] = replace(
                        own, missing=0, holds={"cpu": own.need}, asked_since=None, busy=True, used_at=self.now
                    )

    def rest(self) -> None:
        """What was unloaded ends; nobody uses anything any more."""
        for own in list(self.tenants.values()):
            holds = own.holds if own.resident else {}
            self.tenants[own.model] = replace(own, holds=holds, busy=False)


@given(
    needs=st.lists(st.integers(1, 10), min_size=2, max_size=6),
    steps=st.lists(
        st.tuples(st.sampled_from(["ask", "use", "idle", "wait", "leave"]), st.integers(0, 5)), max_size=40
    ),
    always=st.integers(0, 3),
)
@settings(max_examples=examples(200), deadline=None, derandomize=EFFORT == 1)
def test_memory_is_never_promised_twice_and_who_asks_is_served_in_the_end(
    needs: list[int], steps: list[tuple[str, int]], always: int
) -> None:
    world = World({f"m{n}": tenant(f"m{n}", need=need) for n, need in enumerate(needs)})
    if always < len(needs) and needs[always] <= 4:
        name = f"m{always}"
        world.tenants[name] = replace(world.tenants[name], on_demand=False, resident=True, asked_since=0.0)
    for what, which in steps:
        name = f"m{which % len(needs)}"
        own = world.tenants[name]
        world.now += 1.0
        if what == "ask" and own.missing and own.asked_since is None:
            world.tenants[name] = replace(own, asked_since=world.now)
        elif what == "use" and own.resident and not own.missing:
            world.tenants[name] = replace(own, busy=True, used_at=world.now)
        elif what == "idle":
            world.tenants[name] = replace(own, busy=False)
        elif what == "wait":
            world.now += PATIENCE
        elif what == "leave" and not own.resident:
            world.tenants[name] = replace(own, holds={})
        world.step()
        assert held(list(world.tenants.values())).get("cpu", 0) <= CPU.memory
    fixed = sum(own.need for own in world.tenants.values() if not own.on_demand)
    for name, own in list(world.tenants.items()):
        if own.asked_since is None or own.need + (fixed if own.on_demand else 0) > CPU.memory:
            continue
        for _ in range(12):
            world.now += PATIENCE
            world.step()
            world.rest()
        assert world.tenants[name].missing == 0, f"{name} is never loaded: {world.tenants}"
