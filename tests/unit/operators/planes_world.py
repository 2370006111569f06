"""Several control planes, one after the other, on one store and one machine: real store, lease and decisions.

What is played is what runs: a process is a name in a dictionary, with a shim that looks at the epochs as the real
one does. A pass is a list of things to do, each row before its side effect: a plane can stand still between any
two of them, and go on when another one leads.

The invariants are those of the design's list (I9 to I11).
"""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.unit.operators.rollout_world import BETTER, CRASHES, GOOD

from quire_operators import rollout
from quire_operators.database import Conflict, Deposed
from quire_operators.desired import Effective, desired_of
from quire_operators.fleet.shim import Shim
from quire_operators.lease import Election, Home, enter
from quire_operators.models import ModelReconciler
from quire_operators.overrides import Kind, Override
from quire_operators.placement import Placement
from quire_operators.records import Change, NewRevision, StoredObject
from quire_operators.rollout import Exit, Goal, Process, Row, Seen, World
from quire_operators.store import Store
from quire_schemas import wire
from quire_schemas.model import Model, resolve_defaults
from quire_schemas.resource import Key

KEY = Key("model", "m")
CAPACITY = 8
PLACEMENT = Placement(
    device="cpu", dtype="bfloat16", kv_dtype="bfloat16", model_dir="/m", tokenizer_dir="/m", commit=None,
    template="", max_model_len=512, max_num_seqs=64, max_num_batched_tokens=512, num_blocks=8, block_size=16,
    kv=1, kv_tokens=128, weights=1, memory=4, threads=1, seed=0, chat_template_file=None,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Manifest:
    """A template, and how many of it: a number, or a range that the load chooses from."""

    template: str
    least: int
    most: int | None = None

    def count(self, decided: int | None) -> int:
        """How many there are to be, worked out apart from `desired`."""
        if self.most is None:
            return self.least
        return min(max(max(self.least, 1) if decided is None else decided, self.least), self.most)


@cache
def resolved(manifest: Manifest) -> dict[str, Any]:
    seed = (GOOD, BETTER, CRASHES).index(manifest.template)
    count: dict[str, Any] = {"replicas": manifest.least}
    if manifest.most is not None:
        count = {
            "autoscaling": {
                "minReplicas": manifest.least,
                "maxReplicas": manifest.most,
                "target": {"inFlightPerReplica": 1},
                "scaleUpDelay": "0s",
                "scaleDownDelay": "0s",
            }
        }
    document = {
        "apiVersion": "quire.dev/v1alpha1", "kind": "Model", "metadata": {"name": "m"},
        "spec": {"source": "builtin://tiny", "engine": {"seed": seed}, **count},
    }  # fmt: skip
    return resolve_defaults(Model.model_validate(document))


@dataclass
class Machine:
    """What runs here, and which epochs acted here."""

    epochs: Path
    processes: dict[tuple[str, int], str] = field(default_factory=dict)
    """(replica, incarnation) -> template."""
    exits: dict[tuple[str, int], Exit] = field(default_factory=dict)

    def refuses(self, epoch: int) -> bool:
        """What a shim says to this epoch, before it starts its child and before it ends it."""
        shim = Shim.__new__(Shim)
        shim.spec = {"epochs": str(self.epochs)}
        return shim.deposed(epoch)

    def start(self, row: Row, epoch: int) -> None:
        if not self.refuses(epoch):
            self.processes[row.id, row.incarnation] = row.template_hash

    def stop(self, row: Row, epoch: int) -> None:
        if (row.id, row.incarnation) in self.processes and not self.refuses(epoch):
            self.end((row.id, row.incarnation), Exit("Stopped", ""))

    def end(self, name: tuple[str, int], how: Exit) -> None:
        del self.processes[name]
        self.exits[name] = how


@dataclass
class Asked:
    """What a router tells of the load."""

    in_flight: int = 0
    status: Any = field(default_factory=lambda: SimpleNamespace(pid=1))

    def use(self, model: str) -> wire.ModelUse:
        return wire.ModelUse(self.in_flight, idle=0.0)


class Plane:
    """One control plane, which led from when it was made until the next one is."""

    def __init__(self, path: Path, machine: Machine, clock: Callable[[], float]) -> None:
        with closing(Election(path, "a test", lambda: Home("here", "/", "m"), machine.epochs)) as election:
            lease = election.take(locked=True)
        assert lease is not None
        self.epoch, self.machine = lease.epoch, machine
        enter(machine.epochs, lease.epoch)
        self.store = Store(path, clock, lease)
        self.load = Asked()
        unused: Any = SimpleNamespace(cache=None)
        routes: Any = self.load
        self.models = ModelReconciler(
            self.store, unused, routes, unused, unused, unused, unused, {}, lambda key: None, unused, clock
        )
        self.begun: deque[Callable[[], None]] = deque()
        """What is left of its pass."""

    # ── what others have it do ────────────────────────────────────────────────────────────────────────────

    @property
    def stored(self) -> StoredObject:
        found = self.store.get(KEY)
        assert found is not None
        return found

    def wanted(self) -> Effective:
        return self.models.effective(self.stored)

    def apply(self, manifest: Manifest) -> str:
        """As `platform apply` does; what became of it."""
        old = self.store.get(KEY)
        revisions = self.store.revisions(old.uid) if old is not None else ()
        same = revisions and revisions[0].template_hash == manifest.template
        new = None if same else NewRevision(manifest.template, 1, PLACEMENT.as_dict(), "")
        change = Change(
            KEY, {}, str(manifest), resolved(manifest), old.resource_version if old is not None else None, new
        )
        (applied,) = self.store.apply([change])
        return applied.result

    def follow_the_load(self, in_flight: int) -> None:
        self.load.in_flight = in_flight
        self.models.demand.settle_scaling()

    def decide(self, kind: Kind, **more: Any) -> None:
        self.store.set_override(self.stored.uid, Override(kind, "ada", self.store.clock(), **more))

    def take_back(self, *kinds: Kind) -> None:
        self.store.end_overrides(self.stored.uid, kinds)

    def decided(self, kind: Kind) -> Override | None:
        return next((each for each in self.store.overrides(self.stored.uid) if each.kind is kind), None)

    # ── its passes ────────────────────────────────────────────────────────────────────────────────────────

    def begin_pass(self, rolled_back: Callable[[str], None]) -> None:
        """Observe and plan; nothing of it is done yet. `rolled_back` is told the template that is given up."""
        wanted, now = self.wanted(), self.store.clock()
        desired = desired_of(wanted)
        pairs = []
        for row in self.store.replicas(KEY.name):
            seen = self._seen(row, desired.hot_hash)
            if seen.routed and row.ready_since is None:
                row = self.store.update_replica(row, replace(row, ready_since=now))
            pairs.append((row, seen))
        world = World(tuple(pairs), room=max(CAPACITY - len(pairs), 0))
        is_new = wanted.stable is None or wanted.stable.n != wanted.revision.n
        if is_new and desired.replicas and rollout.is_settled(desired, world, now):
            self.store.mark_stable(wanted.stored.uid, wanted.revision.n)
            wanted = self.wanted()
            desired = desired_of(wanted)
        self.begun.clear()
        for step in rollout.plan(desired, world, now).steps:
            self.begun.extend(self._of(step, wanted, rolled_back))

    def whole_pass(self) -> None:
        """One that nobody is told of."""
        self.begin_pass(lambda template: None)
        self.go_on()

    def _seen(self, row: Row, hot_hash: str) -> Seen:
        name = (row.id, row.incarnation)
        process = Process.READY if name in self.machine.processes else Process.NONE
        if name in self.machine.exits:
            process = Process.EXITED
        serves = process is Process.READY and row.goal is Goal.RUN
        return Seen(
            process,
            progress_at=row.launched_at,
            exit=self.machine.exits.get(name),
            connected=process is Process.READY,
            routed=serves,
            released=not serves,
            hot_hash=hot_hash,
        )

    def _of(
        self, step: rollout.Step, wanted: Effective, rolled_back: Callable[[str], None]
    ) -> Iterator[Callable[[], None]]:
        """A step as what is written, and what is done to processes behind it."""
        match step:
            case rollout.Create():
                row = Row(
                    step.replica, KEY.name, step.index, wanted.revision.n, wanted.revision.template_hash, Goal.RUN,
                    self.store.clock(), memory=1,
                )  # fmt: skip
                yield lambda: self._create(row)
            case rollout.Forget():
                yield lambda: self.store.delete_replica(self._row(step.replica))
            case rollout.RollBack():

                def give_up() -> None:
                    self.models._roll_back(wanted.stored, step)
                    rolled_back(step.template_hash)

                yield give_up
            case rollout.PushLimits() | rollout.StopOrphan():
                pass
            case _:
                written: list[Row] = []
                yield lambda: written.append(self._move(step))
                if isinstance(step, rollout.Launch):
                    yield lambda: self.machine.start(written[0], self.epoch)
                elif isinstance(step, rollout.Stop):
                    yield lambda: self.machine.stop(written[0], self.epoch)

    def _create(self, row: Row) -> None:
        self.store.create_replica(row)

    def _row(self, replica: str) -> Row:
        row = next((row for row in self.store.replicas(KEY.name) if row.id == replica), None)
        if row is None:
            raise Conflict(f"replica {replica} is gone", "")
        return row

    def _move(self, step: rollout.RowStep) -> Row:
        row = self._row(step.replica)
        return self.store.update_replica(row, rollout.after(row, step, self.store.clock()))

    def go_on(self, parts: int = 99) -> None:
        """Do so much of what is left of the pass; it ends where another one leads, or something changed."""
        for _ in range(min(parts, len(self.begun))):
            try:
                self.begun.popleft()()
            except (Conflict, Deposed):
                self.begun.clear()
                return


@contextmanager
def copied(path: Path, folder: Path, clock: Callable[[], float]) -> Iterator[Plane]:
    """A control plane on a copy of the store, beside a machine of its own."""
    twin = folder / "twin.db"
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(twin)) as copy:
        source.backup(copy)
    plane = Plane(twin, Machine(folder / "twin-epochs"), clock)
    try:
        yield plane
    finally:
        plane.store.close()


def contents(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All that is in a store, whoever reads it."""
    with closing(sqlite3.connect(path)) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: db.execute(f'SELECT * FROM "{name}"').fetchall() for name in tables}
