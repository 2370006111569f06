"""Whose turn it is on a GPU, by hand."""

from __future__ import annotations

from dataclasses import replace

from quire_operators.devices import Inventory
from quire_operators.nvml import Gpu
from quire_operators.rollout import Goal, Process, Row
from quire_operators.turns import MEMORY_SECONDS, QUEUE_SECONDS, READING_SECONDS, TURN_SECONDS, Neighbour, Turns

GIB = 1 << 30
NOW = 1000.0


def machine(free: int = 80) -> Inventory:
    return Inventory(64 * GIB, 64 * GIB, 4, (Gpu(0, "G", 80 * GIB, free * GIB),))


def row(name: str, device: str = "cuda:0", **more: object) -> Row:
    due = Row(f"{name}-r1-0", name, 0, 1, "t", Goal.RUN, 0.0, memory=10 * GIB, device=device)
    return replace(due, **more)  # type: ignore[arg-type]


def neighbour(process: Process, progress_at: float, **more: object) -> Neighbour:
    launched = replace(row("other"), incarnation=1, launched_at=NOW - 500)
    return Neighbour(replace(launched, **more), process, progress_at)  # type: ignore[arg-type]


def test_one_starts_after_another_and_who_does_not_get_on_holds_nobody_up() -> None:
    loading = neighbour(Process.STARTING, NOW - 1)
    assert Turns().bar(row("a"), 0, [loading], machine(), NOW) == "starts on cuda:0 after other-r1-0"
    assert Turns().bar(row("a"), 0, [loading], machine(), NOW + TURN_SECONDS) is None
    launched = neighbour(Process.NONE, 0.0, launched_at=NOW - 1)
    assert Turns().bar(row("a"), 0, [launched], machine(), NOW) is not None, "its shim is on its way"


def test_nobody_waits_for_another_device_nor_for_what_has_ended_nor_on_a_cpu() -> None:
    loading = neighbour(Process.STARTING, NOW - 1)
    assert Turns().bar(row("a", "cuda:1"), 0, [loading], machine(), NOW) is None
    assert Turns().bar(row("a"), 0, [neighbour(Process.EXITED, NOW - 1)], machine(), NOW) is None
    assert Turns().bar(row("a"), 0, [neighbour(Process.NONE, NOW, exited=1)], machine(), NOW) is None
    beside = neighbour(Process.STARTING, NOW - 1, device="cpu")
    assert Turns().bar(row("a", "cpu"), 0, [beside], machine(), NOW) is None


def test_who_became_ready_a_moment_ago_may_not_be_in_the_reading_of_memory() -> None:
    ready = neighbour(Process.READY, NOW)
    assert Turns().bar(row("a"), 0, [ready], machine(), NOW + READING_SECONDS / 2) is not None
    assert Turns().bar(row("a"), 0, [ready], machine(), NOW + READING_SECONDS) is None


def test_an_engine_waits_for_the_memory_that_it_was_given() -> None:
    """Whoever holds it: a stranger, or what was stopped and shows in NVML for a moment longer."""
    turns = Turns()
    assert turns.bar(row("a"), 5, [], machine(9), NOW) == ("cuda:0 has 9.0 GiB free of the 10.0 GiB it is to have")
    assert turns.bar(row("b", memory=GIB), 0, [], machine(9), NOW) is None, "and takes nobody's turn meanwhile"
    assert turns.bar(row("a"), 5, [], machine(10), NOW) is None
    assert turns.bar(row("a"), 5, [], machine(9), NOW + 1) is not None
    assert turns.bar(row("a"), 5, [], machine(9), NOW + 1 + MEMORY_SECONDS) is None, "it may need less than that"
    again = row("a", incarnation=1, exited=1)
    assert turns.bar(again, 5, [], machine(9), NOW + 2 + MEMORY_SECONDS) is not None, "the next try waits anew"
    assert turns.bar(row("a", "cuda:7"), 0, [], machine(), NOW) is None, "what is lost is the engine's to tell"


def test_after_a_reboot_who_is_due_in_a_moment_and_has_priority_goes_first() -> None:
    soon = Neighbour(row("high", incarnation=1, exited=1, not_before=NOW + 1), Process.NONE, 0.0, priority=5)
    assert Turns().bar(row("low"), 0, [soon], machine(), NOW) == (
        "starts on cuda:0 after high-r1-0, which has priority"
    )
    assert Turns().bar(row("low"), 5, [soon], machine(), NOW) is None
    assert Turns().bar(row("low"), 0, [soon], machine(), NOW + 1 + QUEUE_SECONDS) is None, "something keeps it"


def test_the_highest_priority_comes_next_as_long_as_it_asks() -> None:
    turns, loading = Turns(), [neighbour(Process.STARTING, NOW)]
    assert turns.bar(row("high"), 5, loading, machine(), NOW) is not None
    assert turns.bar(row("low"), 0, loading, machine(), NOW) is not None
    assert turns.bar(row("low"), 0, [], machine(), NOW + 1) == (
        "starts on cuda:0 after high-r1-0, which has priority"
    )
    assert turns.bar(row("high"), 5, [], machine(), NOW + 1) is None
    assert turns.bar(row("low"), 0, [], machine(), NOW + 1) is None, "it has had its turn"
    turns.bar(row("high"), 5, loading, machine(), NOW)
    assert turns.bar(row("low"), 0, [], machine(), NOW + QUEUE_SECONDS) is None, "it asks no more"
