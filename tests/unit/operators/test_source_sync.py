"""What a git source decides, for any repository, any inventory and any hand in between."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.effort import examples

from quire_operators.inventory import Managed
from quire_operators.source_sync import Declared, Present, SyncPlan, decide, rank
from quire_schemas.resource import Key

KEYS = tuple(Key(kind, name) for kind in ("model", "route", "accesspolicy") for name in "abc")
SYNC = {"prune": True, "maxPrune": "50%"}


@dataclass
class World:
    """Two sources, what they have, and what is stored."""

    managed: dict[Key, Managed] = field(default_factory=dict)
    stored: dict[Key, Present] = field(default_factory=dict)

    def plan(
        self, source: str, commit: dict[Key, str], sync: dict[str, Any], *, heal: bool, whole: int
    ) -> SyncPlan:
        declared = [Declared(key, "f", digest) for key, digest in commit.items()]
        return decide(source, declared, self.managed, self.stored, sync, heal=heal, whole=whole)

    def carry_out(self, source: str, commit: dict[Key, str], plan: SyncPlan, steps: int = 10**6) -> None:
        """As the reconciler does it: one transaction, then deletions one by one; a crash after `steps` of them."""
        if plan.conflicts or steps == 0:
            return
        for key in plan.write:
            self.stored[key] = Present(commit[key])
        for key in (*plan.write, *plan.adopt, *plan.note):
            self.managed[key] = Managed(key, source, source, "c", "f", commit[key])
        for key in plan.delete[: steps - 1]:
            del self.stored[key]
        if steps > len(plan.delete) + 1:
            for key in (*plan.delete, *plan.forget):
                del self.managed[key]

    def whole(self, source: str) -> int:
        return sum(row.source == source for row in self.managed.values())


def commits(names: str = "abc") -> st.SearchStrategy[dict[Key, str]]:
    keys = [key for key in KEYS if key.name in names]
    return st.dictionaries(st.sampled_from(keys), st.sampled_from("123"), max_size=7)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """What several commits of two sources and a few hands leave."""
    world = World()
    for _ in range(draw(st.integers(0, 4))):
        source = draw(st.sampled_from(("one", "two")))
        commit = draw(commits("ab" if source == "one" else "c"))  # or hardly ever both would have something
        plan = world.plan(source, commit, SYNC, heal=True, whole=world.whole(source))
        world.carry_out(source, commit, plan)
        for key in draw(st.lists(st.sampled_from(KEYS), max_size=3)):
            what = draw(st.sampled_from(("gone", "4", "deleting")))
            if what == "gone":
                world.stored.pop(key, None)
            else:
                world.stored[key] = Present("4", deleting=what == "deleting")
    return world


@settings(max_examples=examples(200), deadline=None)
@given(
    worlds(),
    st.one_of(commits("ab"), commits()),
    st.sampled_from(("0%", "34%", "50%", "100%")),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_no_plan_deletes_what_is_not_its_own_or_above_the_cap_and_every_plan_ends(
    world: World, commit: dict[Key, str], cap: str, prune: bool, heal: bool, data: st.DataObject
) -> None:
    sync = {"prune": prune, "maxPrune": cap}
    whole, before = world.whole("one"), dict(world.stored)
    mine = {key for key, row in world.managed.items() if row.source == "one"}
    theirs = {key for key, row in world.managed.items() if row.source != "one"}
    deleted: set[Key] = set()
    blocked = None
    for _ in range(20):
        plan = world.plan("one", commit, sync, heal=heal, whole=whole)
        assert not set(plan.delete) - mine
        assert not set(plan.delete) & set(commit)
        assert not {*plan.write, *plan.adopt, *plan.note} & theirs
        assert [rank(key) for key in plan.write] == sorted(rank(key) for key in plan.write)
        assert [rank(key) for key in plan.delete] == sorted((rank(key) for key in plan.delete), reverse=True)
        assert set(plan.conflicts) == set(commit) & theirs
        deleted |= set(plan.delete)
        blocked = blocked or plan.blocked
        if plan.is_empty or plan.conflicts:
            break
        for key in plan.wait:
            del world.stored[key]
        world.carry_out("one", commit, plan, data.draw(st.integers(0, 4), label="steps before a crash"))
    else:
        plan = world.plan("one", commit, sync, heal=heal, whole=whole)
        world.carry_out("one", commit, plan)
        plan = world.plan("one", commit, sync, heal=heal, whole=whole)
        world.carry_out("one", commit, plan)
        plan = world.plan("one", commit, sync, heal=heal, whole=whole)
        deleted |= set(plan.delete)
    assert len(deleted) <= float(cap[:-1]) / 100 * whole + 1e-9
    assert blocked is None or not deleted, "nothing at all, once it was too much"
    if plan.conflicts:
        assert world.stored == before
        return
    assert plan.is_empty, "what was carried out is not asked for again"
    for key, digest in commit.items():
        assert world.stored.get(key) == Present(digest) or key in plan.drift
    assert not (heal and plan.drift)
    for key in set(before) - mine - set(commit):
        assert world.stored.get(key) == before[key], "what nobody's repository says stays as it is"


@pytest.mark.parametrize(
    ("git", "applied", "stored", "heal", "wanted"),
    [
        ("2", "1", "1", False, "write"),
        ("1", None, None, False, "write"),
        ("1", None, "9", False, "write"),
        ("1", "1", "9", False, "drift"),
        ("1", "1", None, False, "drift"),
        ("1", "1", "9", True, "healed"),
        ("1", "1", None, True, "healed"),
        ("2", "1", "9", False, "write"),
        ("2", "1", "2", False, "note"),
        ("1", None, "1", False, "adopt"),
        ("1", "1", "1", True, ""),
        (None, "1", "1", False, "delete"),
        (None, "1", "9", False, "delete"),
        (None, "1", None, False, "forget"),
        (None, None, "1", True, ""),
    ],
)
def test_three_hashes_decide(
    git: str | None, applied: str | None, stored: str | None, heal: bool, wanted: str
) -> None:
    key, other = KEYS[0], KEYS[1]
    world = World({other: Managed(other, "one", "one", "c", "f", "1")}, {other: Present("1")})
    if applied is not None:
        world.managed[key] = Managed(key, "one", "one", "c", "f", applied)
    if stored is not None:
        world.stored[key] = Present(stored)
    commit = {other: "1"} | ({key: git} if git is not None else {})
    plan = world.plan("one", commit, SYNC, heal=heal, whole=2)
    for name in ("write", "healed", "drift", "note", "adopt", "delete", "forget"):
        expected = [key] if name == wanted or (name, wanted) == ("write", "healed") else []
        assert list(getattr(plan, name)) == expected, name
