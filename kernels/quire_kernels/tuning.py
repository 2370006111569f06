"""Tilings that are timed once per machine, and kept.

    family       a kernel, what its speed depends on (dtypes, sizes, weight format), and a rung of rows
    candidates   the tilings worth trying; the first is the default, found on an H200
    trial        a family with something to launch its candidates on

A launcher asks `Choices` for the tiling of its family, one look-up, and takes its default where there is none; so
it does until `tune` was called, which is before anything is captured, and never again in the life of an engine.

`tune` takes from disk (`quire_kernels.tilings`) what is decided, and measures the rest as far as its time lasts:
all candidates are compiled first, on several processors, for that is what takes the time. Then those of one family
are timed in turns, so that what else goes on strikes all of them, and one is taken if it beats the default by more
than the noise. One process does so at a time on cards of one kind; the others wait, and take what it found.
Families that no time was left for are decided as well, for their default, and so are those of somebody who waited
in vain: who starts later must not launch something else. The first decision holds, also for who found another.

Nothing is chosen that cannot be kept, for the same reason.

What is launched to be timed may end the process. So each family is noted before, and no more when control comes
back, be it by an exception. One that a process died with is compiled by itself the next time, not ahead with all
the others, of which each may have been the reason; one that two died with has its default. A device that is lost
counts as a death, for a process can do no more with it.

No Triton here, and nothing of a device but how `tune` says which.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import statistics
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from quire_kernels.errors import KernelError
from quire_kernels.tilings import Entry, Record, Spelled, folder

log = logging.getLogger(__name__)

ROUNDS = 7
"""Times that each candidate is timed."""
_LEAST_ROUNDS = 3
"""Fewer say nothing."""
_HOPELESS = 1.3
"""A candidate that takes this times as long as the best, each time, is timed no more."""
_WORTH = 0.03
"""What a candidate must save to be taken for the default, as a share; and three times what times vary by."""
COLD_BYTES = 256 << 20
"""That lie between two readings of the same memory: no cache holds them."""
_TURNS = (4, 16)
"""Launches that are timed together, at least and at most."""
_COMPILING = 0.7
"""Of the time, at most, is for compiling."""
_PATIENCE = 3
"""Times as long as measuring may take somebody waits for another who measures: what has begun ends behind its
time, and there may be a third one."""
_TRIES = 2
"""Times that a process may die while it measures a family."""


class Family(NamedTuple):
    """What has a tiling of its own."""

    kernel: str
    facts: tuple[str | int, ...]
    rung: int

    @property
    def file(self) -> str:
        """Whose file it is in: its kernel's, up to a dot."""
        return self.kernel.partition(".")[0]

    @property
    def name(self) -> str:
        return " ".join(map(str, (self.kernel, *self.facts, *((f"<={self.rung}",) if self.rung else ()))))


@functools.cache
def named(dtype: torch.dtype) -> str:
    """A dtype in a family's facts."""
    return str(dtype).removeprefix("torch.")


class Choices:
    """Tilings that are not the default, by family. Empty at first."""

    def __init__(self) -> None:
        self._found: dict[Family | tuple[Hashable, ...], Any] = {}

    def get(self, kernel: str, facts: tuple[str | int, ...], rung: int) -> Any:
        """The tiling of a family, or None: the default's."""
        return self._found.get((kernel, facts, rung))

    def take(self, family: Family, tiling: Any) -> None:
        self._found[family] = tiling

    def leave(self, family: Family) -> None:
        """To its default."""
        self._found.pop(family, None)

    def __len__(self) -> int:
        return len(self._found)


@dataclass(slots=True, frozen=True)
class Trial:
    """A family with something to launch it on. Several of one family differ in the memory they read alone."""

    family: Family
    candidates: tuple[Any, ...]
    given: Callable[[], Any]
    """Makes what is read besides, when its turn comes: the first trial's for all of a family."""
    launch: Callable[[Any, Any], object]
    """Launches a candidate on it."""
    nbytes: int
    """That a launch reads: so many launches on different memory are timed that no cache holds it."""


Timer = Callable[[Sequence[Callable[[], object]]], Callable[[], float]]
"""Makes ready to launch all of these, one after the other; each call then gives mean seconds of one."""
Ahead = Callable[[Iterable[Callable[[], object]], float], None]
"""Compiles what these launches need, until then by the monotonic clock: it may leave some out."""


# ── deciding ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True, frozen=True)
class Verdict:
    """Which candidate is taken, and the median seconds of each that was timed often enough to tell."""

    at: int
    seconds: Mapping[int, float]


def choose(timers: Mapping[int, Callable[[], float]], *, more: Callable[[], bool] = lambda: True) -> Verdict:
    """Times candidates, by number, in turns: each as often as `ROUNDS`, as long as there is `more` time and it is
    not hopeless. 0 is the default, and stays it unless another is faster by more than the noise.
    """
    found: dict[int, list[float]] = {at: [] for at in timers}
    live = list(timers)
    for turn in range(ROUNDS):
        if not more():
            break
        for at in live if turn % 2 == 0 else reversed(live):
            found[at].append(timers[at]())
        if turn > 0:
            best = min(statistics.median(found[at]) for at in live)
            live = [at for at in live if at == 0 or min(found[at]) <= _HOPELESS * best]
    told = {at: statistics.median(times) for at, times in found.items() if len(times) >= _LEAST_ROUNDS}
    if 0 not in told:
        return Verdict(0, {})
    best_at = min(told, key=lambda at: (told[at], at))
    noise = 3 * max(_spread(found[0]), _spread(found[best_at]))
    faster = told[best_at] < told[0] * (1 - max(_WORTH, noise))
    return Verdict(best_at if faster else 0, told)


def _spread(times: Sequence[float]) -> float:
    """How far times lie from their median, in the median, as a share of it."""
    middle = statistics.median(times)
    return statistics.median(abs(one - middle) for one in times) / middle if middle > 0 else 0.0


def spelled(tiling: Any) -> Spelled:
    """A tiling as it is written down."""
    if isinstance(tiling, tuple):
        return [spelled(part) for part in tiling]
    return None if tiling is None else int(tiling)


def known_as(candidates: Sequence[Any], said: Spelled) -> int | None:
    """Which of the candidates is meant; None: no such tiling is proposed."""
    return next((at for at, tiling in enumerate(candidates) if spelled(tiling) == said), None)


# ── carrying out ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Report:
    """What came of it."""

    families: int = 0
    known: int = 0
    """Families that were decided before."""
    measured: list[tuple[str, Any, Any, float, float]] = field(default_factory=list)
    """Name, default, what was taken, and the seconds of both."""
    left: list[str] = field(default_factory=list)
    """Families that there was no time for."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Candidates that cannot be launched here, and why."""
    seconds: float = 0.0
    why_not: str = ""
    """What kept all that was not known from being measured."""

    def __str__(self) -> str:
        changed = [one for one in self.measured if one[1] != one[2]]
        said = f"tilings: {self.known} families known, {len(self.measured)} measured in {self.seconds:.1f} s"
        if self.measured:
            said += f", {len(changed)} of them better than the default"
        if self.left:
            said += f"; {len(self.left)} keep the default: {self.why_not or 'the time was up'}"
        return said


def tune(
    trials: Iterable[Trial],
    choices: Choices,
    records: Callable[[str], Record],
    *,
    seconds: float,
    timer: Timer | None,
    compile_ahead: Ahead | None = None,
    unfit: tuple[type[Exception], ...] = (RuntimeError,),
) -> Report:
    """Fills `choices` with what is known of the families of `trials`, and measures what is not for `seconds` at
    most; without a `timer` nothing is. Trials come in the order of their weight. `records` gives the file of a
    kernel, all of one card. `unfit` is what launches raise of a candidate that does not fit it. Raises
    `torch.AcceleratorError`.
    """
    cases: dict[Family, list[Trial]] = {}
    for trial in trials:
        if len(trial.candidates) > 1:
            cases.setdefault(trial.family, []).append(trial)
    report, began = Report(), time.monotonic()
    report.families = len(cases)
    try:
        unknown = _take(cases, choices, records)
    except KernelError as error:
        report.why_not, report.left = str(error), [family.name for family in cases]
        log.warning("all tilings are the default: %s", error)
        return report
    report.known = len(cases) - len(unknown)
    if timer is None:
        report.why_not = "only a warm-up that captures times them"
    elif unknown:
        try:
            with records(next(iter(unknown)).file).alone(_PATIENCE * seconds) as mine:
                unknown = _take(unknown, choices, records)  # somebody else may have measured meanwhile
                if unknown and not mine:
                    report.why_not = f"another process measures, or nothing can be locked beside {folder()}"
                    log.warning("tilings are not measured: %s", report.why_not)
                    unknown = _settle(dict.fromkeys(unknown), unknown, choices, records)
                elif unknown:
                    work = _Measuring(records, report, timer, compile_ahead, unfit)
                    unknown = _settle(work.decide(unknown, seconds), unknown, choices, records)
        except OSError as error:
            report.why_not = f"{folder()} cannot be written: {error.strerror or error}"
            log.warning("tilings are the default where none is known: %s", report.why_not)
            unknown = _take(unknown, choices, records)
    report.left = [family.name for family in unknown]
    report.seconds = time.monotonic() - began
    return report


def _take(
    cases: Mapping[Family, list[Trial]], choices: Choices, records: Callable[[str], Record]
) -> dict[Family, list[Trial]]:
    """Takes over what is on disk; gives the families that are not. Raises `KernelError`."""
    files: dict[str, dict[str, Entry]] = {}
    unknown = dict[Family, list[Trial]]()
    for family, trials in cases.items():
        if family.file not in files:
            files[family.file] = records(family.file).read()
        entry = files[family.file].get(family.name)
        at = None if entry is None else known_as(trials[0].candidates, entry.tiling)
        if not at:
            choices.leave(family)
        if at is None:
            unknown[family] = trials
            if entry is not None:
                path = records(family.file).path
                log.warning("%s names no tiling of %s: %s", path, family.name, entry.tiling)
        elif at:
            choices.take(family, trials[0].candidates[at])
    return unknown


def _settle(
    found: Mapping[Family, Entry | None],
    cases: Mapping[Family, list[Trial]],
    choices: Choices,
    records: Callable[[str], Record],
) -> dict[Family, list[Trial]]:
    """Writes down what was decided, None: for the default unmeasured, and takes what holds then; gives the
    families that nothing was measured of. Raises `OSError`."""
    entries: dict[str, dict[str, Entry]] = {}
    for family, entry in found.items():
        default = Entry(spelled(cases[family][0].candidates[0]), 0.0, 0.0, 0)
        entries.setdefault(family.file, {})[family.name] = entry or default
    usable = {family.name: trials[0].candidates for family, trials in cases.items()}
    for kernel, mine in entries.items():
        # what names no candidate is no decision
        there = records(kernel).read()
        void = {
            name: there[name] for name in mine.keys() & there if known_as(usable[name], there[name].tiling) is None
        }
        records(kernel).add(mine, void)
    _take(cases, choices, records)
    return {family: cases[family] for family, entry in found.items() if entry is None}


@dataclass(slots=True, frozen=True)
class _Measuring:
    """Who measures."""

    records: Callable[[str], Record]
    report: Report
    timer: Timer
    compile_ahead: Ahead | None
    unfit: tuple[type[Exception], ...]

    def decide(self, cases: Mapping[Family, list[Trial]], seconds: float) -> dict[Family, Entry | None]:
        """Of each family what was found; None: there was no time, or processes died of it. Raises `OSError`."""
        began, until = time.monotonic(), time.monotonic() + seconds
        noted = {kernel: self.records(kernel).attempts() for kernel in {family.file for family in cases}}
        deaths = {family: noted[family.file].get(family.name, 0) for family in cases}
        if self.compile_ahead is not None:
            alive = {family: trials for family, trials in cases.items() if not deaths[family]}
            with self._noted(alive):
                self.compile_ahead(self._ahead(alive), began + seconds * _COMPILING)
        found = dict[Family, Entry | None]()
        for family, trials in cases.items():
            found[family] = None
            if deaths[family] >= _TRIES:
                self.report.why_not = f"measuring did not come to its end {deaths[family]} times"
                log.warning("%s: the default is taken of %s", self.report.why_not, family.name)
            elif time.monotonic() < until:
                with self._noted([family]):
                    found[family] = self._entry_of(trials, until)
        return found

    @contextlib.contextmanager
    def _noted(self, families: Iterable[Family]) -> Iterator[None]:
        """What a process that dies meanwhile has died of. Raises `OSError`."""
        names: dict[str, list[str]] = {}
        for family in families:
            names.setdefault(family.file, []).append(family.name)
        begun, ended = list[tuple[Record, list[str]]](), False
        try:
            for kernel, mine in names.items():
                self.records(kernel).attempt(mine)
                begun.append((self.records(kernel), mine))
            yield
        except torch.AcceleratorError:
            ended = True
            raise
        finally:
            for record, mine in begun:
                record.attempted(mine, ended=ended)

    def _entry_of(self, trials: Sequence[Trial], until: float) -> Entry | None:
        """The decision about one family."""
        family, candidates = trials[0].family, trials[0].candidates
        turns = list(trials[: min(_TURNS[1], -(-COLD_BYTES // max(trials[0].nbytes, 1)))])
        turns *= -(-_TURNS[0] // len(turns))
        timers = dict[int, Callable[[], float]]()
        given: Any = None
        for at, tiling in enumerate(candidates):
            if time.monotonic() >= until:
                return None
            with self._told(family, tiling):
                given = trials[0].given() if given is None else given
                timers[at] = self.timer([_bound(trial, given, tiling) for trial in turns])
        if 0 not in timers:
            return None
        verdict = choose(timers, more=lambda: time.monotonic() < until)
        if not verdict.seconds:
            return None
        taken, seconds = candidates[verdict.at], verdict.seconds
        self.report.measured.append((family.name, candidates[0], taken, seconds[0], seconds[verdict.at]))
        return Entry(spelled(taken), _us(seconds[verdict.at]), _us(seconds[0]), len(timers))

    def _ahead(self, cases: Mapping[Family, list[Trial]]) -> Iterator[Callable[[], object]]:
        """Launches that need all the code that there will be, on the least that there is for each candidate."""
        wanted: dict[Hashable, tuple[Trial, Any]] = {}
        for family, (trial, *_) in cases.items():
            for tiling in trial.candidates:
                # of a number of rows the code knows whether it is a multiple of 16
                key = family.kernel, family.facts, tiling, family.rung % 16 == 0
                if key not in wanted or family.rung < wanted[key][0].family.rung:
                    wanted[key] = trial, tiling

        def launch(trial: Trial, tiling: Any) -> None:
            with self._told(trial.family, tiling):
                trial.launch(trial.given(), tiling)

        for trial, tiling in wanted.values():
            yield functools.partial(launch, trial, tiling)

    @contextlib.contextmanager
    def _told(self, family: Family, tiling: Any) -> Iterator[None]:
        """A candidate that cannot be compiled, launched or held in memory is left out by name; what is wrong with
        a default the engine's own steps will say. What nobody expects is left out, too, for it must not keep an
        engine from serving, and told of in full. A device that is lost is lost."""
        try:
            yield
        except torch.AcceleratorError:
            raise
        except Exception as error:  # the compiler, the driver and torch each have their own
            name = f"{family.name} {spelled(tiling)}"
            said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            self.report.skipped[name] = said
            if isinstance(error, self.unfit):
                log.info("no candidate here: %s: %s", name, said)
            else:
                log.warning("a defect in what is timed: %s: %s", name, said, exc_info=error)
            # who raises what he has a name for keeps all these frames, and with them graphs and tensors, until
            # Python collects, which may be in the middle of a capture: so does Triton where a kernel does not fit
            traceback.clear_frames(error.__traceback__)


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 2)


def _bound(trial: Trial, given: Any, tiling: Any) -> Callable[[], object]:
    return lambda: trial.launch(given, tiling)
