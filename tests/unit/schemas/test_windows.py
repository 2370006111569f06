"""Windows: cron's fields as cron has them, and the zone's own clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from quire_schemas.windows import BadSchedule, Schedule, closed_by, is_open, zone


def window(kind: str, schedule: str, duration: str, zone_: str = "UTC") -> dict[str, Any]:
    return {"kind": kind, "schedule": schedule, "duration": duration, "timeZone": zone_}


def at(text: str, zone_: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone_)).timestamp()


def test_a_window_opens_with_its_minute_and_closes_after_its_time() -> None:
    weekend = window("Deny", "0 18 * * 5", "62h", "Europe/Berlin")
    for text, wanted in (
        ("2026-11-27T17:59:59", False), ("2026-11-27T18:00:00", True), ("2026-11-30T07:59:59", True),
        ("2026-11-30T08:00:01", False), ("2026-11-29T12:00:00", True), ("2026-11-26T18:00:00", False),
    ):  # fmt: skip
        assert is_open(weekend, at(text, "Europe/Berlin")) is wanted, text


@pytest.mark.parametrize(
    ("schedule", "opens"),
    [
        ("0 0 1 * *", {1}),
        ("0 0 * * 0", {1, 8, 15, 22, 29}),
        ("0 0 * * 7", {1, 8, 15, 22, 29}),
        ("0 0 10-12 * *", {10, 11, 12}),
        ("0 0 */10 * *", {1, 11, 21}),
        ("0 0 13 * 5", {6, 13, 20, 27}),  # either day, as in cron
        ("0 0 5/10 * *", {5, 15, 25}),
        ("0 0 */2 * 1", {9, 23}),  # a field that begins with * does not say either
        ("0 0 31 10 *", set()),
    ],
)
def test_days_are_those_of_cron(schedule: str, opens: set[int]) -> None:
    parsed = Schedule.parse(schedule)
    november = [datetime(2026, 11, day, tzinfo=UTC) for day in range(1, 31)]
    assert {day.day for day in november if parsed.opens_at(day)} == opens


def test_an_hour_that_the_clocks_leave_out_never_comes_and_one_that_they_repeat_comes_twice() -> None:
    night = window("Deny", "30 2 * * *", "10m", "Europe/Berlin")
    for day, times in ((datetime(2026, 3, 29, tzinfo=UTC), 0), (datetime(2026, 10, 25, tzinfo=UTC), 2)):
        open_ = [is_open(night, (day + timedelta(minutes=minute)).timestamp()) for minute in range(-60, 300)]
        assert sum(now and not before for before, now in pairwise(open_)) == times


def test_deny_wins_and_where_something_is_allowed_all_else_is_not() -> None:
    work, lunch = window("Allow", "0 9 * * 1-5", "8h"), window("Deny", "0 12 * * *", "1h")
    assert closed_by([], at("2026-11-27T10:00:00")) is None
    assert closed_by([work, lunch], at("2026-11-27T10:00:00")) is None
    assert "'0 12 * * *' for 1h" in str(closed_by([work, lunch], at("2026-11-27T12:30:00")))
    assert "no window that allows" in str(closed_by([work, lunch], at("2026-11-28T10:00:00")))
    assert closed_by([lunch], at("2026-11-28T10:00:00")) is None


@pytest.mark.parametrize(
    "text", ["", "* * * *", "60 * * * *", "a * * * *", "5-1 * * * *", "*/0 * * * *", "-1 * * * *"]
)
def test_what_is_no_schedule_is_told(text: str) -> None:
    with pytest.raises(BadSchedule) as caught:
        Schedule.parse(text)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["Mars/Base", "../../etc/passwd", "", "/etc/localtime"])
def test_what_is_no_zone_is_told(name: str) -> None:
    with pytest.raises(BadSchedule):
        zone(name)
