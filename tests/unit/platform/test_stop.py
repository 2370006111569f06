"""Stop strings: nothing of one gets out, and how the text was cut makes no difference."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.effort import examples

from quire.text import StopStrings

ALPHABET = "ab\nX"
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=0, max_size=4)
PIECES = st.lists(st.text(ALPHABET, max_size=6), max_size=12)


def reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Character by character: the first stop string that is complete ends the text."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            hit = max(hits, key=len)
            return text[: end if include else end - len(hit)], hit
    return text, None


def run(pieces: list[str], stops: list[str], include: bool) -> tuple[list[str], str | None]:
    machine = StopStrings(stops, include)
    out = []
    for piece in pieces:
        emitted, hit = machine.push(piece)
        out.append(emitted)
        if hit is not None:
            return out, hit
    return [*out, machine.finish()], None


@settings(max_examples=examples(500), deadline=None)
@given(PIECES, STOPS, st.booleans())
def test_any_chunking_gives_what_reading_by_character_gives(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    out, hit = run(pieces, stops, include)
    expected, expected_hit = reference("".join(pieces), stops, include)
    assert ("".join(out), hit) == (expected, expected_hit)


@settings(max_examples=examples(300), deadline=None)
@given(PIECES, STOPS.filter(bool))
def test_nothing_is_out_that_a_stop_string_could_still_take_back(pieces: list[str], stops: list[str]) -> None:
    """Whatever follows, the text given out so far begins the final text; and no more is held than needed."""
    machine = StopStrings(stops)
    out = seen = ""
    for piece in pieces:
        emitted, hit = machine.push(piece)
        out, seen = out + emitted, seen + piece
        if hit is not None:
            break
        for end in (stop[cut:] for stop in stops for cut in range(len(stop))):
            assert reference(seen + end, stops, False)[0].startswith(out)
        held = seen[len(out) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_over_three_pieces_is_cut_whole() -> None:
    machine = StopStrings(["</answer>"])
    assert machine.push("42</a") == ("42", None)
    assert machine.push("nswe") == ("", None)
    assert machine.push("r> and more") == ("", "</answer>")
    assert machine.push("later") == ("", "</answer>")
    assert machine.finish() == ""


def test_a_false_start_comes_out_once_it_is_one() -> None:
    machine = StopStrings(["END"])
    assert machine.push("the EN") == ("the ", None)
    assert machine.push("ERGY") == ("ENERGY", None)
    assert machine.push(" E") == (" ", None)
    assert machine.finish() == "E"


def test_the_found_string_stays_when_asked_for() -> None:
    assert StopStrings(["."], include=True).push("One. Two.") == ("One.", ".")


def test_without_stop_strings_nothing_is_held() -> None:
    assert StopStrings([]).push("abc") == ("abc", None)
