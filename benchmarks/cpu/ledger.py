"""The rows of one run: each is written when it is measured, and what is there is not measured again.

A row says how quiet the machine was meanwhile. `foreign` is the share of the machine's processor time that went to
others than this benchmark and what it started; `steal_s` what the hypervisor kept; `spin` how many times as long a
fixed loop took before and after as it took at its fastest in this process.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.rows import Row

QUIET = 0.03
"""Rows with a larger `foreign` share say little."""
_TICK = os.sysconf("SC_CLK_TCK")


class Ledger:
    """A JSONL file and, in it, the run that is going on."""

    def __init__(self, path: Path, common: Mapping[str, object], resume: bool) -> None:
        """With `resume` the file's last run goes on, if it has one; else a run begins. `common` is in each row."""
        self.path = path
        runs = [row["run"] for row in read(path)]
        self.run = runs[-1] if resume and runs else datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
        self._common = {"run": self.run, **common}
        self.rows = [row for row in read(path) if row["run"] == self.run]

    def find(self, **key: object) -> Row | None:
        """The row that has all these columns."""
        return next(iter(self.find_all(**key)), None)

    def find_all(self, **key: object) -> list[Row]:
        """All rows that have these columns."""
        return [row for row in self.rows if key.items() <= row.items()]

    def measured(self, action: Callable[[], Row], **key: object) -> Row:
        """The row of this key; if there is none yet, what `action` gives is written as one."""
        if (found := self.find(**key)) is not None:
            return found
        watch = Watch()
        more = action()
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = {**self._common, "date": date, **key, **more, **watch.row()}
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print("  ".join(f"{name} {value}" for name, value in {**key, **more}.items()), flush=True)
        return row


def read(path: Path) -> list[Row]:
    """All rows of a file; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_quiet(row: Row) -> bool:
    return bool(row["foreign"] <= QUIET)


class Watch:
    """What else happens on the machine from here to `row`. Children must have ended by then to be counted ours."""

    def __init__(self) -> None:
        self._spin = _spin()
        self._began, self._busy, self._steal, self._own = time.perf_counter(), *_machine(), _own()

    def row(self) -> Row:
        wall = time.perf_counter() - self._began
        busy, steal = _machine()
        foreign = busy - self._busy - (_own() - self._own)
        spin = max(self._spin, _spin()) / min(_spins)
        return {
            "wall_s": round(wall, 2),
            "foreign": round(max(0.0, foreign) / (wall * (os.cpu_count() or 1)), 4),
            "steal_s": round(steal - self._steal, 2),
            "spin": round(spin, 3),
        }


_spins: list[float] = []


def _spin() -> float:
    began = time.perf_counter()
    for _ in range(2_000_000):
        pass
    _spins.append(time.perf_counter() - began)
    return _spins[-1]


def _machine() -> tuple[float, float]:
    """Seconds that all processors were busy, and that were stolen, since the machine started."""
    user, nice, system, _, _, irq, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + soft) / _TICK, steal / _TICK


def _own() -> float:
    """Processor seconds of this process and of its children that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def tree_seconds(pid: int) -> float:
    """Processor seconds so far of a process, of those that it has started, and of those that have ended."""
    fields = [said.rpartition(")")[2].split() for said in _told(pid, "stat")]
    return sum(sum(map(int, each[11:15])) for each in fields) / _TICK


def peak_bytes(pid: int) -> int:
    """The most resident memory so far, of a process and those it has started, added up."""
    lines = [line.split() for said in _told(pid, "status") for line in said.splitlines()]
    return sum(int(line[1]) << 10 for line in lines if line[:1] == ["VmHWM:"])


def _told(pid: int, name: str) -> list[str]:
    """What /proc/PID/`name` says of a process and of those it has started; some may end meanwhile."""
    pids, said = [pid], []
    for each in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            said.append(Path(f"/proc/{each}/{name}").read_text())
            for task in Path(f"/proc/{each}/task").glob("*/children"):
                pids += map(int, task.read_text().split())
    return said
