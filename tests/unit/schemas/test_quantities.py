"""Durations, byte quantities and percentages: what is taken, what is refused, and what the refusal suggests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire_schemas.quantities import (
    BadQuantity,
    format_bytes,
    format_duration,
    parse_duration,
    parse_percent,
    parse_quantity,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("5m", 300), ("1h30m", 5400), ("250ms", 0.25), ("2d", 172800), ("0s", 0), ("1m5s250ms", 65.25)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("0Gi", 0), ("1Ki", 1024), ("512Mi", 512 << 20), ("40Gi", 40 << 30), ("1.5Ti", 3 << 39)],
)
def test_quantities(text: str, size: int) -> None:
    assert parse_quantity(text) == size


@pytest.mark.parametrize(("text", "share"), [("90%", 0.9), ("100%", 1.0), ("0%", 0.0), ("87.5%", 0.875)])
def test_percentages(text: str, share: float) -> None:
    assert parse_percent(text) == share


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("30", "durations need a unit, for example '30s'"),
        ("", "'30s'"),
        ("1.5h", "whole numbers"),
        ("5min", "units d, h, m, s and ms"),
        ("-1ms", "cannot be negative"),
        ("99999999", "for example '30s'"),
        ("1.5h", "'1h30m'"),
        ("5 m", "'5m'"),
        ("-3s", "'30s'"),
        ("30m1h", "'1h30m'"),
        ("400d", "366d"),
        ("9999999999999d", "366d"),
        ("٣s", "'30s'"),
        ("1s\n", "'30s'"),
    ],
)
def test_bad_durations_say_what_would_do(text: str, hint: str) -> None:
    with pytest.raises(BadQuantity) as caught:
        parse_duration(text)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("40GB", "'40Gi'"),
        ("40g", "'40Gi'"),
        ("1.5 M", "'1.5Mi'"),
        ("1024", "need a unit"),
        ("", "need a unit"),
        ("-1Gi", "negative"),
    ],
)
def test_bad_quantities_say_what_would_do(text: str, hint: str) -> None:
    with pytest.raises(BadQuantity) as caught:
        parse_quantity(text)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("0.9", "'90%'"),
        (".85", "'85%'"),
        ("90", "'90%'"),
        ("1.5", "'1.5%'"),
        ("0.015", "'1.5%'"),
        ("101%", "100%"),
        ("-5%", "from 0%"),
    ],
)
def test_bad_percentages_say_what_would_do(text: str, hint: str) -> None:
    with pytest.raises(BadQuantity) as caught:
        parse_percent(text)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (4_300_000, "4.1 MiB"),
        ((1 << 30) - 1, "1.0 GiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_bytes_for_people(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (-1, "0ms"),
        (0.35, "350ms"),
        (0.9999, "1.0s"),
        (3.42, "3.4s"),
        (59.97, "1m00s"),
        (125, "2m05s"),
        (3780, "1h03m"),
        (12 * 86400 + 5, "12d"),
    ],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.text(max_size=12))
def test_any_text_is_parsed_or_refused_with_a_hint(text: str) -> None:
    for parse in (parse_duration, parse_quantity, parse_percent):
        hint = "parsed"
        try:
            parse(text)
        except BadQuantity as error:
            hint = error.hint
        assert hint
