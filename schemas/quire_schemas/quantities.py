"""Durations, byte quantities and ratios: strings with units on the outside, plain numbers inside.

A manifest spells `30s`, `40Gi`, `90%`, `'0.15'`, never a bare number: a reader should not have to know whether a
field counts seconds or milliseconds, and money has no rounding. The intent keeps the user's spelling; whoever
needs the number calls `parse_duration` (seconds), `parse_quantity` (bytes), `parse_percent` (0..1) or
`parse_money` (an exact Decimal). The types `Duration`, `Quantity`, `Percent` and `Money` are for Pydantic fields:
they check the spelling and keep the string.

Exceptions:

    BadQuantity(ValueError)     the text is not of that form; `.hint` says what would be
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import AfterValidator, WithJsonSchema

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
_DURATION = re.compile(
    r"(?:(\d{1,20})d)?(?:(\d{1,20})h)?(?:(\d{1,20})m)?(?:(\d{1,20})s)?(?:(\d{1,20})ms)?", re.ASCII
)
_QUANTITY = re.compile(r"(\d{1,9})(?:\.(\d{1,6}))?(Ki|Mi|Gi|Ti)", re.ASCII)
_PERCENT = re.compile(r"(\d{1,3})(?:\.(\d{1,4}))?%", re.ASCII)
_MONEY = re.compile(r"\d{1,9}(?:\.\d{1,4})?", re.ASCII)
MAX_DURATION = 366 * 86400.0
MAX_QUANTITY = 1 << 50


class BadQuantity(ValueError):
    """The text has the wrong form or lies out of range. `hint` shows a spelling that would do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def parse_duration(text: str) -> float:
    """Seconds of `30s`, `5m`, `1h30m`, `250ms`, `2d`: whole numbers, units from large to small."""
    found = _DURATION.fullmatch(text)
    if found is None or not text:
        raise BadQuantity(f"{_shown(text)} is not a duration", _duration_hint(text))
    units = ("d", "h", "m", "s", "ms")
    seconds = sum(int(n) * _SECONDS[unit] for n, unit in zip(found.groups(), units, strict=True) if n)
    if seconds > MAX_DURATION:
        raise BadQuantity(f"{_shown(text)} is longer than a year", "give 366d or less")
    return round(seconds, 3)


def parse_money(text: str) -> Decimal:
    """The exact amount of `250`, `0.15`: up to nine digits, and four behind the point."""
    if _MONEY.fullmatch(text) is None:
        raise BadQuantity(
            f"{_shown(text)} is no amount of money",
            "write digits, and up to four behind a point, in quotes: for example '250' or '0.15'",
        )
    return Decimal(text)


def parse_quantity(text: str) -> int:
    """Bytes of `512Mi`, `40Gi`, `1.5Ti` (powers of 1024); `0` needs no unit."""
    if text == "0":
        return 0
    found = _QUANTITY.fullmatch(text)
    if found is None:
        raise BadQuantity(f"{_shown(text)} is not a byte quantity", _quantity_hint(text))
    whole, fraction, unit = found.groups()
    scale = _BYTES[unit]
    size = int(whole) * scale + (int(fraction) * scale // 10 ** len(fraction) if fraction else 0)
    if size > MAX_QUANTITY:
        raise BadQuantity(f"{_shown(text)} is more than 1024Ti", "give 1024Ti or less")
    return size


def parse_percent(text: str) -> float:
    """The share, 0..1, of `90%` or `87.5%`."""
    found = _PERCENT.fullmatch(text)
    if found is None:
        if text.startswith("-"):
            raise BadQuantity(f"{_shown(text)} is not a percentage", "give a percentage from 0% to 100%")
        if re.fullmatch(r"0?\.\d{1,6}", text, re.ASCII):
            hint = f"write it as '{float(text) * 100:g}%'"
        elif re.fullmatch(r"\d{1,3}(?:\.\d{1,4})?", text, re.ASCII):
            hint = f"a percentage has its sign: '{text}%'"
        else:
            hint = "for example '90%'"
        raise BadQuantity(f"{_shown(text)} is not a percentage", hint)
    share = float(text[:-1]) / 100
    if share > 1:
        raise BadQuantity(f"{_shown(text)} is more than 100%", "give a percentage from 0% to 100%")
    return share


def format_bytes(size: int) -> str:
    """For people: `4.1 MiB`, `14.9 GiB`; below one KiB exact, `512 B`."""
    sign, rest = ("-", -size) if size < 0 else ("", size)
    if rest < 1024:
        return f"{sign}{rest} B"
    value = float(rest)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        value /= 1024
        if value < 1023.95 or unit == "PiB":
            return f"{sign}{value:.1f} {unit}"
    return f"{sign}{rest} B"


def format_duration(seconds: float) -> str:
    """For people: `350ms`, `3.4s`, `2m05s`, `1h03m`, `12d`. Negative times show as `0ms`."""
    if seconds < 0.9995:
        return f"{max(0.0, seconds) * 1000:.0f}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d"


@dataclass(frozen=True, slots=True)
class Unit:
    """Marks a field's type: two spellings of one amount (`60s`, `1m`) are then one value to diffs and hashes."""

    name: Literal["duration", "quantity", "percent", "money"]

    def number(self, text: str) -> float | Decimal:
        """What the text amounts to: seconds, bytes, a share or an exact sum of money."""
        parse: dict[str, Callable[[str], float | Decimal]] = {
            "duration": parse_duration,
            "quantity": parse_quantity,
            "percent": parse_percent,
            "money": parse_money,
        }
        return parse[self.name](text)


def _checked(parse: Callable[[str], float | Decimal]) -> Callable[[str], str]:
    def check(text: str) -> str:
        parse(text)
        return text

    return check


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _duration_hint(text: str) -> str:
    examples = "for example '30s', '5m' or '1h30m'"
    if re.fullmatch(r"\d*", text, re.ASCII):
        return f"durations need a unit, for example '{text}s'" if 0 < len(text) < 8 else f"give one, {examples}"
    if text.startswith("-"):
        return f"a duration cannot be negative: {examples}"
    return f"whole numbers with the units d, h, m, s and ms, the largest first and without blanks: {examples}"


def _quantity_hint(text: str) -> str:
    if text.startswith("-"):
        return "an amount of bytes cannot be negative: for example '512Mi' or '40Gi'"
    wrong = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)\s*([KMGTkmgt])(?:i?[bB]|i)?", text, re.ASCII)
    if wrong:
        example = f"{wrong.group(1)}{wrong.group(2).upper()}i"
        return f"units are Ki, Mi, Gi and Ti (powers of 1024), for example '{example}'"
    return "byte quantities need a unit, for example '512Mi' or '40Gi'"


Duration = Annotated[
    str,
    Unit("duration"),
    AfterValidator(_checked(parse_duration)),
    WithJsonSchema({"type": "string", "pattern": r"^(?=\d)(\d+d)?(\d+h)?(\d+m)?(\d+s)?(\d+ms)?$"}),
]
Quantity = Annotated[
    str,
    Unit("quantity"),
    AfterValidator(_checked(parse_quantity)),
    WithJsonSchema({"type": "string", "pattern": r"^(0|\d+(\.\d+)?(Ki|Mi|Gi|Ti))$"}),
]
Percent = Annotated[
    str,
    Unit("percent"),
    AfterValidator(_checked(parse_percent)),
    WithJsonSchema({"type": "string", "pattern": r"^\d{1,3}(\.\d+)?%$"}),
]
Money = Annotated[
    str,
    Unit("money"),
    AfterValidator(_checked(parse_money)),
    WithJsonSchema({"type": "string", "pattern": r"^\d{1,9}(\.\d{1,4})?$"}),
]
