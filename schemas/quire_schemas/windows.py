"""Times that open by a cron schedule and stay open for a while. Pure; the clock is the caller's.

A schedule has the five fields of cron: minute, hour, day of the month, month, day of the week (0 and 7 are
Sunday). A field is `*`, a number, a range `1-5`, any of them with a step (`*/15`), or several with commas. Where
both days are given, either will do, as in cron. The fields are those of the clock on the wall in the window's
zone: an hour that a change of the clocks leaves out never comes, one that it repeats comes twice.

Exceptions:

    BadSchedule(ValueError)     the text is no schedule, or the zone is not known; `.hint` says what would do
"""

from __future__ import annotations

from calendar import monthrange
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from quire_schemas.quantities import parse_duration

MAX_SECONDS = 7 * 86400.0
"""The longest a window may stay open: every look goes back over so many minutes."""
_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day of the month", 1, 31), ("month", 1, 12), ("weekday", 0, 7))
_MINUTE = timedelta(minutes=1)


class BadSchedule(ValueError):
    """The text has the wrong form."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Schedule:
    """When something opens. `both_days`: a day must be of the month's and of the week's, since one of them is
    *."""

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    both_days: bool

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Raises `BadSchedule`."""
        fields = text.split()
        if len(fields) != len(_FIELDS):
            hint = "minute, hour, day of the month, month, weekday: '0 18 * * 5' is Friday at 18:00"
            raise BadSchedule(f"has {len(fields)} fields where cron has five", hint)
        minutes, hours, days, months, weekdays = (
            _numbers(field, *about) for field, about in zip(fields, _FIELDS, strict=True)
        )
        both = fields[2].startswith("*") or fields[4].startswith("*")
        return cls(minutes, hours, days, months, frozenset(day % 7 for day in weekdays), both)

    @property
    def ever_opens(self) -> bool:
        """Whether there is a year with such a day."""
        return not self.both_days or any(min(self.days) <= monthrange(2000, month)[1] for month in self.months)

    def opens_on(self, day: datetime) -> bool:
        """Whether it opens at all on that day."""
        if day.month not in self.months:
            return False
        of_month, of_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return of_month and of_week if self.both_days else of_month or of_week

    def opens_at(self, local: datetime) -> bool:
        """Whether it opens in that minute."""
        return local.minute in self.minutes and local.hour in self.hours and self.opens_on(local)


def _numbers(field: str, name: str, low: int, high: int) -> frozenset[int]:
    found: set[int] = set()
    for part in field.split(","):
        span, slash, step = part.partition("/")
        first, dash, last = span.partition("-")
        bounds = (str(low), str(high)) if span == "*" else (first, last if dash else first)
        if slash and span != "*" and not dash:
            bounds = (first, str(high))
        if not all(each.isascii() and each.isdigit() and len(each) < 4 for each in (*bounds, step or "1")):
            raise BadSchedule(f"{field[:32]!r} is no {name}", f"numbers from {low} to {high}, as in *, 1-5, */15")
        begin, end, every = int(bounds[0]), int(bounds[1]), int(step or "1")
        if not (low <= begin <= end <= high and every >= 1):
            raise BadSchedule(f"{field[:32]!r} is no {name}", f"it goes from {low} to {high}")
        found.update(range(begin, end + 1, every))
    return frozenset(found)


def zone(name: str) -> ZoneInfo:
    """Raises `BadSchedule`."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise BadSchedule(f"{name[:64]!r} is no time zone", "for example UTC or Europe/Berlin") from error


def is_open(window: Mapping[str, Any], now: float) -> bool:
    """Whether a window (its resolved spec) is open at `now`, Unix seconds of the wall clock."""
    schedule, where = Schedule.parse(window["schedule"]), zone(window["timeZone"])
    moment = datetime.fromtimestamp(now, UTC)
    oldest = moment - timedelta(seconds=parse_duration(window["duration"]))
    at = moment.replace(second=0, microsecond=0)
    while at > oldest:
        local = at.astimezone(where)
        if schedule.opens_at(local):
            return True
        at -= _MINUTE
    return False


def closed_by(windows: Sequence[Mapping[str, Any]], now: float) -> str | None:
    """What forbids a change at `now`, in words; None if nothing does."""
    for window in windows:
        if window["kind"] == "Deny" and is_open(window, now):
            return f"the window {_words(window)} denies changes"
    allowed = [window for window in windows if window["kind"] == "Allow"]
    if allowed and not any(is_open(window, now) for window in allowed):
        return f"no window that allows changes is open: {', '.join(map(_words, allowed))}"
    return None


def _words(window: Mapping[str, Any]) -> str:
    return f"'{window['schedule']}' for {window['duration']} ({window['timeZone']})"
