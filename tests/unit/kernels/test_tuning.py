"""Choosing tilings: the decision by times that are given, and what is kept of it on disk."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from quire_kernels import KernelError, cache, tilings, tuning
from quire_kernels.__main__ import main
from quire_kernels.tilings import Entry, Record
from quire_kernels.tuning import Choices, Family, Trial, choose, tune

ABOUT: dict[str, str | int] = {"kernel": "product", "source": "abc", "card": "A", "multiprocessors": 132}
FAST, SLOW, DEFAULT = (8, 256, 4), (16, 512, 4), (4, 512, 2)
FAMILY = Family("product", ("bfloat16", 64, 32), 1)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "quire" / "tilings"


def steady(*times: float) -> dict[int, Callable[[], float]]:
    return {at: partial(float, time) for at, time in enumerate(times)}


def series(times: Iterable[float]) -> Callable[[], float]:
    return iter(times).__next__


# ── the decision ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("times", "taken"),
    [
        ((1.0, 0.9, 0.8), 2),
        ((1.0, 0.98, 1.1), 0),  # not worth it
        ((1.0, 1.0, 1.0), 0),
        ((1.0,), 0),
        ((1.0, 0.8, 0.8), 1),  # of equals the first
    ],
)
def test_the_fastest_is_taken_if_it_is_worth_it(times: tuple[float, ...], taken: int) -> None:
    assert choose(steady(*times)).at == taken


def test_what_varies_by_more_than_it_saves_is_not_taken() -> None:
    noisy = [1.0, 1.2, 0.8, 1.1, 0.9, 1.3, 1.0]
    assert choose({0: series(noisy), 1: lambda: 0.9}).at == 0
    assert choose({0: lambda: 1.0, 1: series(0.9 * one for one in noisy)}).at == 0
    assert choose({0: lambda: 1.0, 1: lambda: 0.9}).at == 1


def test_one_slow_launch_decides_nothing() -> None:
    assert choose({0: lambda: 1.0, 1: series([5.0, *[0.8] * 9])}).at == 1
    assert choose({0: series([5.0, *[0.8] * 9]), 1: lambda: 0.9}).at == 0


def test_what_is_hopeless_is_timed_no_more_and_the_default_always() -> None:
    counts = [0, 0, 0]

    def timer(at: int, seconds: float) -> Callable[[], float]:
        def time() -> float:
            counts[at] += 1
            return seconds

        return time

    verdict = choose({0: timer(0, 3.0), 1: timer(1, 1.0), 2: timer(2, 2.0)})
    assert verdict.at == 1
    assert counts == [tuning.ROUNDS, tuning.ROUNDS, 2]


def test_without_time_the_default_stays_and_nothing_is_told() -> None:
    for turns in (0, 2):
        left = iter([True] * turns + [False] * 9)
        verdict = choose(steady(1.0, 0.5), more=left.__next__)
        assert (verdict.at, verdict.seconds) == (0, {})


# ── on disk ───────────────────────────────────────────────────────────────────────────────────────────────


class Bench:
    """Launches that take the seconds they are given, and who was launched."""

    def __init__(self, seconds: dict[Any, float], record: Record | None = None) -> None:
        self.seconds = seconds
        self.record = record or Record(ABOUT)
        self.choices = Choices()
        self.launched: list[Any] = []
        self.report = tuning.Report()
        self.pause = 0.0
        self.ends: Callable[[Any], object] = lambda tiling: None
        """What a launch does besides."""
        self._time = 0.0

    def trial(self, family: Family = FAMILY, candidates: Sequence[Any] = (DEFAULT, FAST, SLOW)) -> Trial:
        return Trial(family, tuple(candidates), lambda: "given", self._launch, 1 << 40)

    def _launch(self, given: object, tiling: Any) -> None:
        assert given == "given"
        time.sleep(self.pause)
        self.ends(tiling)
        self.launched.append(tiling)
        if tiling not in self.seconds:
            raise RuntimeError(f"out of resource: {tiling}")
        self._time += self.seconds[tiling]

    def timer(self, launches: Sequence[Callable[[], object]]) -> Callable[[], float]:
        launches[0]()

        def seconds() -> float:
            before = self._time
            for launch in launches:
                launch()
            return (self._time - before) / len(launches)

        return seconds

    def tune(
        self, *trials: Trial, seconds: float = 60.0, timed: bool = True, ahead: tuning.Ahead | None = None
    ) -> tuning.Report:
        return tune(
            trials or [self.trial()],
            self.choices,
            lambda _: self.record,
            seconds=seconds,
            timer=self.timer if timed else None,
            compile_ahead=ahead,
        )

    @property
    def taken(self) -> Any:
        return self.choices.get(*FAMILY)


ALL = {DEFAULT: 3e-6, FAST: 2e-6, SLOW: 5e-6}


def test_a_second_start_launches_nothing_and_chooses_the_same(home: Path) -> None:
    first, second, reads = Bench(ALL), Bench(ALL), Bench(ALL)
    report = first.tune()
    assert first.taken == FAST
    assert [found[:3] for found in report.measured] == [(FAMILY.name, DEFAULT, FAST)]
    assert report.measured[0][3:] == pytest.approx((3e-6, 2e-6))
    assert str(report).startswith("tilings: 0 families known, 1 measured in ")
    assert Record(ABOUT).read() == {FAMILY.name: Entry([8, 256, 4], 2.0, 3.0, 3)}
    assert second.tune().known == 1
    assert reads.tune(timed=False).known == 1
    assert second.taken == reads.taken == FAST
    assert not second.launched + reads.launched
    assert [path.name for path in home.iterdir()] == [Record(ABOUT).path.name], "nothing is left beside it"


def test_who_only_reads_decides_nothing() -> None:
    bench = Bench(ALL)
    report = bench.tune(timed=False)
    assert (bench.taken, bench.launched, report.left) == (None, [], [FAMILY.name])
    assert str(report).endswith("1 keep the default: only a warm-up that captures times them")
    assert not Record(ABOUT).path.exists()


def test_the_default_is_a_decision_too() -> None:
    Bench(ALL | {FAST: 4e-6}).tune()
    later = Bench(ALL)
    assert later.tune().known == 1
    assert later.taken is None
    assert not later.launched


def test_what_is_known_no_more_is_launched_no_more() -> None:
    """An engine reads when it is made, and again before it measures."""
    Bench(ALL).tune()
    bench = Bench(ALL | {FAST: 4e-6})
    bench.tune(timed=False)
    assert bench.taken == FAST
    tilings.clear()
    bench.tune()
    assert bench.taken is None


def test_another_card_and_a_changed_kernel_are_measured_anew() -> None:
    Bench(ALL).tune()
    changes: tuple[dict[str, str | int], ...] = ({"card": "B"}, {"multiprocessors": 108}, {"source": "abd"})
    for changed in changes:
        other = Bench(ALL, Record(ABOUT | changed))
        assert other.tune().known == 0
        assert other.taken == FAST


def test_what_there_was_no_time_for_keeps_its_default_until_it_is_forgotten() -> None:
    bench = Bench(ALL)
    assert bench.tune(seconds=0.0).left == [FAMILY.name]
    assert bench.taken is None
    assert Bench(ALL).tune().known == 1, "who starts later launches the same"
    assert tilings.clear(unmeasured=True) == 1
    again = Bench(ALL)
    again.tune()
    assert again.taken == FAST
    assert tilings.clear(unmeasured=True) == 0
    assert tilings.clear() == 1
    assert not Record(ABOUT).read()


def test_a_candidate_that_cannot_be_launched_is_left_out_by_name() -> None:
    bench = Bench({DEFAULT: 3e-6, SLOW: 2e-6})
    report = bench.tune()
    assert bench.taken == SLOW
    assert list(report.skipped) == [f"{FAMILY.name} [8, 256, 4]"]
    assert "out of resource" in report.skipped[f"{FAMILY.name} [8, 256, 4]"]
    alone = Bench({DEFAULT: 3e-6}, Record(ABOUT | {"card": "B"}))
    assert alone.tune().left == []
    assert alone.taken is None
    broken = Bench({FAST: 1.0}, Record(ABOUT | {"card": "C"}))
    assert broken.tune().left == [FAMILY.name], "nothing is known of a default that cannot be launched"
    assert broken.taken is None


class Tensors:
    """What a launch reads, which somebody counts."""


def test_a_candidate_that_does_not_fit_keeps_nothing_in_memory() -> None:
    """Triton raises so what is told of shared memory: the frame that does has a name for the error, and the error
    the frame."""
    kept = list[weakref.ref[object]]()

    def raise_(error: Exception) -> None:
        raise error

    def given() -> Tensors:
        made = Tensors()
        kept.append(weakref.ref(made))
        return made

    def launch(given: Tensors, tiling: Any) -> None:
        if tiling == FAST:
            raise_(RuntimeError("out of resource: shared memory"))

    def timer(launches: Sequence[Callable[[], object]]) -> Callable[[], float]:
        launches[0]()

        def seconds() -> float:
            return 1.0

        kept.append(weakref.ref(seconds))
        return seconds

    gc.collect()
    gc.disable()
    try:
        trial = Trial(FAMILY, (DEFAULT, FAST, SLOW), given, launch, 1 << 40)
        tune([trial], Choices(), lambda _: Record(ABOUT), seconds=60.0, timer=timer, compile_ahead=start_all)
        assert len(kept) == 6, "three to compile, one to time, and two that were timed"
        assert [found() for found in kept] == [None] * 6
    finally:
        gc.enable()


OTHER = Family("product", ("bfloat16", 128, 32), 1)
LETHAL = (9, 9, 9)


def dies(work: Callable[[], object]) -> bool:
    """Whether a process dies of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's threads are not needed there
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def lethal(tiling: Any) -> None:
    if tiling == LETHAL:
        os.kill(os.getpid(), signal.SIGKILL)


def start(*families: Family, ahead: bool = False) -> Bench:
    """An engine that times these, `OTHER` without knowing that one of its candidates is no good."""
    bench = Bench(ALL | {LETHAL: 1e-6})
    bench.ends = lethal

    def trial(family: Family) -> Trial:
        return bench.trial(family, (DEFAULT, LETHAL if family == OTHER else FAST))

    bench.report = bench.tune(*map(trial, families), ahead=start_all if ahead else None)
    return bench


def test_what_two_processes_died_with_has_its_default_and_nothing_else_has(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for _ in range(2):
        assert dies(lambda: start(OTHER, FAMILY))
    assert Record(ABOUT).attempts() == {OTHER.name: 2}
    assert not Record(ABOUT).read(), "nothing is decided of what nobody tried"
    another = start(FAMILY)
    assert another.taken == FAST, "another model's"
    assert Record(ABOUT).attempts() == {OTHER.name: 2}
    bench = start(OTHER, FAMILY)
    assert (bench.report.known, bench.report.left) == (1, [OTHER.name])
    assert not bench.launched
    assert f"did not come to its end 2 times: the default is taken of {OTHER.name}" in caplog.text
    assert Record(ABOUT).read()[OTHER.name] == Entry(list(DEFAULT), 0.0, 0.0, 0)
    assert start(OTHER, FAMILY).report.known == 2


def test_what_a_process_died_with_is_not_compiled_ahead_again() -> None:
    """There nobody knows which it was."""
    assert dies(lambda: start(FAMILY, OTHER, ahead=True))
    assert Record(ABOUT).attempts() == {FAMILY.name: 1, OTHER.name: 1}
    assert dies(lambda: start(FAMILY, OTHER, ahead=True))
    assert Record(ABOUT).attempts() == {FAMILY.name: 1, OTHER.name: 2}
    bench = start(FAMILY, OTHER, ahead=True)
    assert bench.taken == FAST
    assert bench.report.left == [OTHER.name]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_is_interrupted_died_of_nothing(error: type[BaseException], ahead: bool, home: Path) -> None:
    def interrupt(tiling: Any) -> None:
        raise error

    for _ in range(3):
        bench = Bench(ALL)
        bench.ends = interrupt
        with pytest.raises(error):
            bench.tune(ahead=start_all if ahead else None)
        assert not list(home.iterdir())
    bench = Bench(ALL)
    bench.tune()
    assert bench.taken == FAST


def start_all(launches: Iterable[Callable[[], object]], until: float) -> None:
    for launch in launches:
        launch()


def test_a_device_that_is_lost_is_a_death() -> None:
    """Else an engine would lose it at every start."""

    def lost(tiling: Any) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    for _ in range(2):
        bench = Bench(ALL)
        bench.ends = lost
        with pytest.raises(torch.AcceleratorError):
            bench.tune()
    assert Record(ABOUT).attempts() == {FAMILY.name: 2}
    bench.tune()
    assert bench.taken is None


def test_who_is_told_to_end_while_a_thread_measures_died_of_nothing(home: Path) -> None:
    def told_to_end() -> None:
        began = threading.Event()
        bench = Bench(ALL)

        def hang(tiling: Any) -> None:
            began.set()
            time.sleep(60)

        bench.ends = hang
        threading.Thread(target=bench.tune, daemon=True).start()
        began.wait(30)
        noted = Record(ABOUT).attempts()
        tilings.take_back()
        os._exit(7 if noted == {FAMILY.name: 1} else 0)

    assert dies(told_to_end), "it had noted what it measures"
    assert not list(home.glob("*.attempts"))


def test_what_was_noted_is_forgotten_by_command(home: Path) -> None:
    for unmeasured in (False, True):
        Record(ABOUT).attempt(["a"])
        assert tilings.clear(unmeasured=unmeasured) == 0
        assert not list(home.glob("*.attempts"))
        Record(ABOUT).attempted(["a"], ended=False)
    (home / Record(ABOUT).path.with_suffix(".attempts").name).write_text("[" * 9)
    assert Record(ABOUT).attempts() == {}


def test_a_defect_is_told_of_in_full_and_what_does_not_fit_by_name(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def defect(tiling: Any) -> None:
        if tiling == FAST:
            raise AttributeError("no such thing")

    for ahead in (None, start_all):
        bench = Bench({DEFAULT: 3e-6, FAST: 1e-6}, Record(ABOUT | {"card": str(ahead)}))
        bench.ends = defect
        report = bench.tune(ahead=ahead)
        assert bench.taken is None
        assert [name.removeprefix(FAMILY.name) for name in report.skipped] == [" [8, 256, 4]", " [16, 512, 4]"]
        told = [record for record in caplog.records if "a defect in what is timed" in record.message]
        assert {record.levelname for record in told} == {"WARNING"}
        assert all(record.exc_info for record in told)
        assert all("out of resource" not in record.message for record in told)
        caplog.clear()


def good() -> dict[str, Any]:
    entry = {"tiling": list(FAST), "us": 2.0, "default_us": 3.0, "tried": 3}
    return {"about": ABOUT, "families": {FAMILY.name: entry}}


def _without(name: str) -> str:
    return json.dumps({key: value for key, value in good().items() if key != name})


def _entry(**changed: Any) -> str:
    content = good()
    content["families"][FAMILY.name] |= changed
    return json.dumps(content)


@pytest.mark.parametrize(
    "content",
    [
        "",
        json.dumps(good())[:-9],
        "[" * 100_000,
        "[]",
        "\x00\xff",
        _without("about"),
        _without("families"),
        json.dumps(good() | {"about": ABOUT | {"card": "B"}}),
        json.dumps(good() | {"families": {FAMILY.name: 5}}),
        _entry(us="x"),
        _entry(us=float("nan")),
        _entry(us=float("inf")),
        _entry(more=1),
        " " * (tilings.MOST_BYTES + 1),
    ],
)
def test_a_file_that_is_not_understood_is_told_of_and_measured_anew(
    content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = Record(ABOUT).path
    path.parent.mkdir(parents=True)
    path.write_text(content)
    bench = Bench(ALL)
    bench.tune()
    assert bench.taken == FAST
    assert str(path) in caplog.text
    assert list(Record(ABOUT).read()) == [FAMILY.name]


@pytest.mark.parametrize("said", [[1, 1, 1], [8, 256], None, "rm", {"a": []}, [[8, 256, 4]], [8.5, 256, 4]])
def test_a_tiling_that_the_kernel_does_not_propose_is_never_launched(
    said: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = Record(ABOUT).path
    path.parent.mkdir(parents=True)
    path.write_text(_entry(tiling=said))
    reads, bench = Bench(ALL), Bench(ALL)
    reads.tune(timed=False)
    assert reads.taken is None
    assert f"{path} names no tiling of {FAMILY.name}" in caplog.text
    bench.tune()
    assert bench.taken == FAST
    assert set(bench.launched) == set(ALL)


def test_a_file_that_is_good_is_believed() -> None:
    """Else the tests of bad ones say nothing."""
    path = Record(ABOUT).path
    path.parent.mkdir(parents=True)
    path.write_text(_entry())
    assert Bench(ALL).tune().known == 1


def test_a_pipe_in_place_of_the_file_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    path = Record(ABOUT).path
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert Record(ABOUT).read() == {}
    assert "it is no file" in caplog.text


def test_what_others_wrote_meanwhile_stays() -> None:
    one, other = Record(ABOUT), Record(ABOUT)
    one.add({"a": Entry([1], 1.0, 2.0, 2)})
    other.add({"b": Entry([2], 1.0, 2.0, 2)})
    assert sorted(one.read()) == ["a", "b"]


def test_without_a_place_to_keep_it_nothing_is_chosen(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    home.parent.mkdir()
    home.write_text("no folder")
    bench = Bench(ALL)
    report = bench.tune()
    assert bench.taken is None
    assert report.left == [FAMILY.name]
    assert str(home) in str(report)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", _nobody)
    choices = Choices()
    report = tune([bench.trial()], choices, lambda _: Record(ABOUT), seconds=60.0, timer=bench.timer)
    assert "XDG_CACHE_HOME names one" in report.why_not
    assert len(choices) == 0


def _nobody() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_who_waited_in_vain_decides_for_all(home: Path) -> None:
    """Who measures all the while, too, whatever it finds."""
    waits = Bench(ALL)

    def gives_up(tiling: Any) -> None:
        if not waits.record.path.exists():
            report = waits.tune(seconds=0.0)
            assert "another process measures" in report.why_not
            assert report.left == [FAMILY.name]

    slow, later = Bench(ALL), Bench(ALL)
    slow.ends = gives_up
    slow.tune()
    assert slow.launched
    assert waits.record.path.exists()
    assert not waits.launched
    later.tune()
    assert (slow.taken, waits.taken, later.taken) == (None, None, None)
    assert not later.launched


def test_who_has_another_card_waits_for_nobody() -> None:
    with Record(ABOUT).alone(0.0) as mine, Record(ABOUT | {"kernel": "attention"}).alone(0.0) as too:
        assert (mine, too) == (True, False)
        bench = Bench(ALL, Record(ABOUT | {"card": "B"}))
        bench.tune(seconds=60.0)
        assert bench.taken == FAST


def test_the_first_decision_holds() -> None:
    record, default, fast = Record(ABOUT), Entry(list(DEFAULT), 0.0, 0.0, 0), Entry(list(FAST), 2.0, 3.0, 3)
    record.add({"a": default, "void": default})
    record.add({"a": fast, "void": fast, "b": fast}, {"void": default})
    assert record.read() == {"a": default, "void": fast, "b": fast}


def test_two_that_start_at_once_choose_the_same() -> None:
    """Though to one of them the default is the fastest."""
    both = Bench(ALL), Bench(ALL | {FAST: 4e-6})
    for bench in both:
        bench.pause = 0.002
    with ThreadPoolExecutor(2) as pool:
        known = sorted(report.known for report in pool.map(Bench.tune, both))
    assert both[0].taken == both[1].taken
    assert sorted(bool(bench.launched) for bench in both) == [False, True]
    assert known == [0, 0], "neither knew anything when it began"


def test_families_are_told_apart_and_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    other = Family("product", ("bfloat16", 64, 32), 16)
    bench = Bench(ALL)
    bench.tune(bench.trial(), bench.trial(other, [FAST, DEFAULT]))
    assert bench.choices.get(*FAMILY) == FAST
    assert bench.choices.get(*other) is None, "its default"
    assert sorted(Record(ABOUT).read()) == ["product bfloat16 64 32 <=1", "product bfloat16 64 32 <=16"]


def test_the_command_shows_and_forgets(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Bench(ALL).tune()

    def says(*words: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["quire_kernels", "tilings", *words])
        main()
        return json.loads(capsys.readouterr().out)

    shown = says()
    assert shown["folder"] == str(home)
    assert shown["files"][Record(ABOUT).path.name]["families"][FAMILY.name]["us"] == 2.0
    assert says("--unmeasured")["forgotten"] == 0
    assert says("--clear")["forgotten"] == 1
    assert says()["files"] == {}
    monkeypatch.setattr(cache, "folder", _homeless)
    with pytest.raises(SystemExit, match="hint: XDG_CACHE_HOME"):
        says()


def _homeless(name: str) -> Path:
    raise KernelError(f"there is no home for {name}")
