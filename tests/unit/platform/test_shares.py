"""Fair shares: nobody is starved by who floods, and nothing lies idle for nobody."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.router.shares import Turns, may_enter, most_at_engines, part


@given(st.integers(9, 600), st.integers(1, 8))
def test_those_who_flood_leave_room_for_who_comes_next(places: int, tenants: int) -> None:
    held = Counter[str]()
    for _ in range(places):
        for name in map(str, range(tenants)):
            if may_enter(1, held[name], held.total(), places):
                held[name] += 1
    assert held.total() < places
    assert may_enter(1, 0, held.total(), places)
    assert max(held.values()) - min(held.values()) <= 1 + places // 5
    if tenants == 1:
        assert held["0"] >= 4 * (places - 1) // 5


def test_no_more_are_let_in_than_there_are_places() -> None:
    assert may_enter(2, 0, 8, 10)
    assert not may_enter(3, 0, 8, 10)


@given(st.integers(1, 256), st.integers(0, 256), st.integers(1, 20))
def test_a_tenant_has_what_others_leave_and_at_least_his_part(slots: int, others: int, tenants: int) -> None:
    most = most_at_engines(slots, others, tenants)
    assert most >= slots - others
    assert most * tenants > slots
    assert most <= slots + 1 + slots // 8


async def test_one_that_floods_does_not_stand_before_others() -> None:
    turns, slots = Turns(), 4
    gone = [turns.take("a", slots) for _ in range(20)]
    assert gone == [True] * 5 + [False] * 15, "as many as are computed at once, and one more"
    waits = [turns.queue("a") for _ in range(15)]
    assert turns.take("b", slots), "at once"
    assert turns.take("b", slots)
    turns.end("a", slots)
    assert not any(wait.done() for wait in waits), "a has more than its part while b is there"
    turns.end("a", slots)
    turns.end("a", slots)
    assert [wait.done() for wait in waits[:2]] == [True, False]
    assert not turns.take("a", slots), "who waits goes first"
    for _ in range(2):
        turns.end("b", slots)
    assert sum(wait.done() for wait in waits) == 3, "and has all again"


@given(st.integers(1, 256), st.integers(1, 20))
def test_the_parts_of_all_are_no_more_than_there_is_and_another_may_always_come(slots: int, tenants: int) -> None:
    mine = part(slots, tenants)
    assert mine >= 1
    assert mine * max(tenants, 2) <= max(slots, tenants, 2)
    assert (mine + 1) * max(tenants, 2) > slots


async def test_seats_beyond_ones_part_are_lent_and_own_ones_are_taken_first() -> None:
    turns, slots = Turns(), 4
    assert all(turns.take("a", slots) for _ in range(4))
    assert [turns.lend("a", slots) for _ in range(4)] == [False, False, True, True]
    turns.end("a", slots, own=True)
    assert turns.take("a", slots)
    assert not turns.lend("a", slots), "who has less than his part gets his own"
    assert turns.take("b", slots)
    assert not turns.lend("b", slots)
    turns.end("a", slots)
    assert turns.take("b", slots)
    assert turns.take("b", slots)
    assert [turns.lend("b", slots) for _ in range(2)] == [False, True]
    for owner, own in (("a", True), ("a", True), ("a", False), ("b", True), ("b", True), ("b", False)):
        turns.end(owner, slots, own=own)
    assert not turns._there
    assert not turns._own


async def test_who_leaves_takes_no_turn_from_others() -> None:
    turns = Turns()
    while turns.take("a", 2):
        continue
    first, second, third = (turns.queue("a") for _ in range(3))
    turns.leave("a", first, 2)
    turns.end("a", 2)
    assert second.done()
    turns.leave("a", second, 2)  # it was cancelled when its turn came
    assert third.done()
    turns.leave("a", third, 2)
    assert turns.take("a", 2)


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_happens_nobody_waits_for_nothing_and_all_is_given_back(seed: int) -> None:
    draw, turns, slots = random.Random(seed), Turns(), 6
    there: list[str] = []
    waiting: list[tuple[str, asyncio.Future[None]]] = []
    for _ in range(2000):
        owner = draw.choice("aaaabc")
        match draw.randrange(4):
            case 0 | 1:
                if turns.take(owner, slots):
                    there.append(owner)
                else:
                    waiting.append((owner, turns.queue(owner)))
            case 2 if there:
                turns.end(there.pop(draw.randrange(len(there))), slots)
            case 3 if waiting:
                name, turn = waiting.pop(draw.randrange(len(waiting)))
                turns.leave(name, turn, slots)
        for name, turn in [each for each in waiting if each[1].done()]:
            waiting.remove((name, turn))
            there.append(name)
        assert Counter(there) == turns._there
        assert not waiting or len(there) >= slots, "an engine is idle and somebody waits"
        for name in {name for name, _ in waiting}:
            assert there.count(name) >= 1, "nobody is kept out altogether"
    for name in there:
        turns.end(name, slots)
    for name, turn in waiting:
        turns.leave(name, turn, slots)
    assert not turns._waiting
