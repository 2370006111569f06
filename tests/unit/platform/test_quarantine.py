"""Who is suspected, condemned, cleared and forgotten."""

from __future__ import annotations

from quire.router.quarantine import MAX_REMEMBERED, REMEMBERED_SECONDS, Suspects, fingerprint
from quire_schemas.wire import Sampling

GREEDY = Sampling(max_tokens=4, temperature=0.0)


class Clock:
    now = 5.0

    def __call__(self) -> float:
        return self.now


def test_two_deaths_condemn_and_one_death_counts_once() -> None:
    suspects = Suspects(Clock())
    assert not suspects
    for _ in range(3):
        suspects.blame(b"a", ("r1", 1, 1), tried=True)
    assert suspects.is_suspected(b"a")
    assert not suspects.is_condemned(b"a")
    suspects.blame(b"a", ("r1", 1, 2), tried=True)
    assert suspects.is_condemned(b"a")
    assert not suspects.is_suspected(b"b")


def test_deaths_in_the_crowd_condemn_nobody_until_one_on_trial() -> None:
    suspects = Suspects(Clock())
    for death in range(3):
        suspects.blame(b"a", death, tried=False)
    assert suspects.is_suspected(b"a")
    assert not suspects.is_condemned(b"a")
    suspects.blame(b"a", 3, tried=True)
    assert suspects.is_condemned(b"a")
    suspects.blame(b"b", 1, tried=True)
    assert not suspects.is_condemned(b"b"), "one death is not two"
    suspects.blame(b"b", 2, tried=False)
    assert suspects.is_condemned(b"b")


def test_where_it_has_died_is_known_for_as_long_as_it_is_suspected() -> None:
    suspects = Suspects(Clock())
    assert not suspects.died_at(b"a")
    for replica in ("r1", "r1", "r2"):
        suspects.blame(b"a", replica, tried=False, replica=replica)
    assert set(suspects.died_at(b"a")) == {"r1", "r2"}
    suspects.clear(b"a")
    assert not suspects.died_at(b"a")


def test_whoever_brings_a_token_is_cleared() -> None:
    suspects = Suspects(Clock())
    suspects.blame(b"a", 1, tried=True)
    suspects.clear(b"a")
    suspects.clear(b"never seen")
    suspects.blame(b"a", 2, tried=True)
    assert not suspects.is_condemned(b"a")


def test_all_is_forgotten_after_its_time_and_the_oldest_first() -> None:
    clock = Clock()
    suspects = Suspects(clock)
    suspects.blame(b"a", 1, tried=True)
    suspects.blame(b"a", 2, tried=True)
    clock.now += REMEMBERED_SECONDS
    assert suspects.is_condemned(b"a")
    clock.now += 0.1
    assert not suspects.is_suspected(b"a")
    assert len(suspects) == 0
    for number in range(3):
        suspects.blame(b"old%d" % number, 1, tried=True)
    clock.now += REMEMBERED_SECONDS + 1
    suspects.blame(b"new", 1, tried=True)
    assert len(suspects) == 1, "what nobody asks for any more goes, too"
    for number in range(MAX_REMEMBERED - 1):
        suspects.blame(b"%d" % number, 1, tried=True)
    assert suspects.is_suspected(b"new")
    suspects.blame(b"new", 2, tried=True)
    suspects.blame(b"one more", 1, tried=True)
    assert len(suspects) == MAX_REMEMBERED
    assert suspects.is_condemned(b"new"), "it died last"
    assert not suspects.is_suspected(b"0")


def test_a_fingerprint_is_of_all_that_an_engine_gets_but_the_seed() -> None:
    base = fingerprint("m", "t", [1, 2], GREEDY)
    assert base == fingerprint("m", "t", (1, 2), Sampling(max_tokens=4, temperature=0.0, seed=7))
    others = {
        fingerprint("n", "t", [1, 2], GREEDY),
        fingerprint("m", "u", [1, 2], GREEDY),
        fingerprint("m", "t", [1, 2, 0], GREEDY),
        fingerprint("m", "t", [2, 1], GREEDY),
        fingerprint("m", "t", [1, 2], Sampling(max_tokens=5, temperature=0.0)),
    }
    assert len(others | {base}) == 6
