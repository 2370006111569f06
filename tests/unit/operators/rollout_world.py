"""A world of processes, memory and a router for the rollout planner: it carries out steps and checks each one.

The invariants are those of the design's list (I1 to I8).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from quire_operators import rollout
from quire_operators.rollout import (
    Backoff,
    Cause,
    Create,
    Desired,
    Drain,
    Exit,
    Fail,
    Forget,
    Goal,
    Launch,
    Process,
    PushLimits,
    RollBack,
    Router,
    Row,
    Seen,
    Step,
    Stop,
    StopOrphan,
    Strategy,
    Undrain,
    World,
    after,
    plan,
)

CRASHES, HOPELESS, GOOD, BETTER = "crashes", "hopeless", "good", "better"


@dataclass
class Running:
    template: str
    ready: bool = False
    in_flight: int = 0


@dataclass
class Simulation:
    """Rows, processes and a router; `capacity` replicas fit, those of `neighbours` among them. Carries out steps
    and checks each as it is done.
    """

    capacity: int = 3
    neighbours: list[Simulation] = field(default_factory=list)
    desired: Desired = field(default_factory=lambda: Desired("m", 1, 1, GOOD, 1, hot_hash="h1"))
    now: float = 1000.0
    rows: dict[str, Row] = field(default_factory=dict)
    processes: dict[tuple[str, int], Running] = field(default_factory=dict)
    exits: dict[tuple[str, int], Exit] = field(default_factory=dict)
    table: dict[tuple[str, int], bool] = field(default_factory=dict)
    """What the router acknowledged: (id, incarnation) -> draining."""
    router: Router = Router.KNOWN
    lost: dict[str, float] = field(default_factory=dict)
    lives: dict[str, int] = field(default_factory=dict)
    # what `desired.effective` makes of the store, worked out apart from it
    auto_rollback: bool = False
    newest: tuple[str, int] = (GOOD, 1)
    """Template and revision of the intent."""
    stable: list[tuple[str, int]] = field(default_factory=list)
    quarantined: str = ""
    late: bool = False

    # ── what is seen ──────────────────────────────────────────────────────────────────────────────────────

    def seen(self, row: Row) -> Seen:
        name = (row.id, row.incarnation)
        running = self.processes.get(name)
        if running is not None:
            process = Process.READY if running.ready else Process.STARTING
        else:
            process = Process.EXITED if name in self.exits else Process.NONE
        if self.router is Router.DOWN:
            return Seen(process, exit=self.exits.get(name))
        if self.router is Router.UNKNOWN:
            return Seen(process, exit=self.exits.get(name), released=False)
        connected = name in self.table and running is not None and running.ready
        routed = connected and not self.table[name]
        if routed:
            self.lost.pop(row.id, None)
        elif row.ready_since is not None:
            self.lost.setdefault(row.id, self.now)
        return Seen(
            process,
            progress_at=row.launched_at,
            exit=self.exits.get(name),
            connected=connected,
            routed=routed,
            released=self.table.get(name, True),
            in_flight=running.in_flight if running is not None else 0,
            hot_hash=self.desired.hot_hash if connected else None,
            unready_since=self.lost.get(row.id),
        )

    def holding(self) -> int:
        return sum(row.failed_generation is None for row in self.rows.values())

    def world(self) -> World:
        if self.router is Router.DOWN:  # its end cut its streams off
            for running in self.processes.values():
                running.in_flight = 0
        for row in list(self.rows.values()):
            if self.seen(row).routed and row.ready_since is None and row.goal is Goal.RUN:
                self.rows[row.id] = replace(row, ready_since=self.now)
        pairs = tuple((row, self.seen(row)) for row in self.rows.values())
        return World(pairs, room=max(self.own_capacity() - self.holding(), 0), router=self.router, late=self.late)

    def own_capacity(self) -> int:
        """How many replicas fit beside those of others."""
        return self.capacity - sum(other.holding() for other in self.neighbours)

    def live(self) -> int:
        """Processes on the device, whoever's they are."""
        return len(self.processes) + sum(len(other.processes) for other in self.neighbours)

    def is_current(self, row: Row) -> bool:
        of_now = row.template_hash == self.desired.template_hash
        return of_now and row.created_at >= self.desired.restarted_at

    def available(self) -> int:
        """By the router's word alone, whatever the planner thinks."""
        return sum(
            self.router is Router.KNOWN
            and row.goal is Goal.RUN
            and self.table.get((row.id, row.incarnation)) is False
            and (running := self.processes.get((row.id, row.incarnation))) is not None
            and running.ready
            for row in self.rows.values()
        )

    def floor(self) -> int:
        """How many must stay available, worked out apart from the planner."""
        desired = self.desired
        if desired.strategy is Strategy.RECREATE:
            return 0
        failed = len(self.rows) - self.holding()
        surge = max(0, min(desired.max_surge, self.own_capacity() + failed - desired.replicas))
        stop_first = desired.strategy is Strategy.AUTO and surge == 0 and desired.max_unavailable == 0
        return max(desired.replicas - (1 if stop_first else desired.max_unavailable), 0)

    # ── what happens by itself ────────────────────────────────────────────────────────────────────────────

    def tick(self, seconds: float) -> None:
        self.now += seconds
        for name, running in list(self.processes.items()):
            if running.template == CRASHES:
                self.end(name, Exit("ProcessEnded", "ended with exit status 1"))
            elif running.template == HOPELESS:
                self.end(name, Exit("BadConfig", "no", Cause.CONFIG))
            else:
                running.ready = True

    def end(self, name: tuple[str, int], how: Exit) -> None:
        del self.processes[name]
        self.exits[name] = how

    def sync(self) -> None:
        """The router takes over the table that the rows make."""
        if self.router is not Router.KNOWN:
            return
        self.table = {
            (row.id, row.incarnation): row.goal is Goal.DRAIN
            for row in self.rows.values()
            if row.stop_sent is None
            and (running := self.processes.get((row.id, row.incarnation))) is not None
            and running.ready
        }

    # ── steps ─────────────────────────────────────────────────────────────────────────────────────────────

    def reconcile(self, steps: int = 99, *, cut_off: bool = False) -> int:
        """Plan, carry out at most `steps` steps; `cut_off`: the last one's row is written and nothing else."""
        if (
            self.desired.replicas
            and not self.desired.deleting
            and rollout.is_settled(self.desired, self.world(), self.now)
        ):
            self.late = False
            if not self.stable or self.stable[-1] != self.aim():
                self.stable.append(self.aim())
            self.take_aim()
        planned = plan(self.desired, self.world(), self.now).steps[:steps]
        for number, step in enumerate(planned):
            self.execute(step, only_row=cut_off and number == len(planned) - 1)
        return len(planned)

    def execute(self, step: Step, *, only_row: bool = False) -> None:
        match step:
            case Create():
                others = [row for row in self.rows.values() if row.goal is Goal.RUN and not self.is_current(row)]
                assert not (self.desired.held and others), "a rollout that is paused goes on"
                last = self.lives.get(step.replica, 0)
                self.rows[step.replica] = Row(
                    step.replica, "m", step.index, self.desired.revision, self.desired.template_hash, Goal.RUN,
                    self.now, memory=1, incarnation=last, exited=last,
                )  # fmt: skip
                want = 0 if self.desired.deleting else self.desired.replicas
                surge = 0 if self.desired.strategy is Strategy.RECREATE else self.desired.max_surge
                assert len(self.rows) <= want + surge, "I3: more rows than the surge allows"
            case Launch():
                assert not [name for name in self.processes if name[0] == step.replica], "I5: a twin"
                row = self.rows[step.replica] = after(self.rows[step.replica], step, self.now)
                assert row.template_hash != self.quarantined, "I9: what was given up is started again"
                self.lives[row.id] = row.incarnation
                if not only_row:
                    self.processes[row.id, row.incarnation] = Running(row.template_hash)
                    assert self.live() <= self.capacity, "I2: more processes than memory"
            case Drain():
                wanted = sum(row.goal is Goal.RUN for row in self.rows.values())
                want = 0 if self.desired.deleting else self.desired.replicas
                kinds = {self.is_current(row) for row in self.rows.values() if row.goal is Goal.RUN}
                most = want + self.desired.max_surge if len(kinds) == 2 and want else want
                assert not self.desired.held or wanted > most, "a rollout that is paused goes on"
                row = self.rows[step.replica]
                if not self.desired.deleting and self.table.get((row.id, row.incarnation)) is False:
                    running = self.processes.get((row.id, row.incarnation))
                    if running is not None and running.ready and row.ready_since is not None:
                        assert self.router is Router.KNOWN or self.desired.replicas == 0, "a blind drain"
                        after_drain = max(0, self.available() - 1)  # none is, as long as the router is down
                        assert after_drain >= min(self.floor(), self.desired.replicas), "I1: below the floor"
                self.rows[step.replica] = after(row, step, self.now)
            case Stop():
                row = self.rows[step.replica]
                running = self.processes.get((row.id, row.incarnation))
                if step.because in ("Drained", "DrainTimeout") and self.router is not Router.DOWN:
                    assert self.table.get((row.id, row.incarnation), True), "I4: the router still routes to it"
                    late = row.drain_since is not None and self.now >= row.drain_since + self.desired.drain_timeout
                    assert late or running is None or running.in_flight == 0, "I4: requests are cut off"
                self.rows[step.replica] = after(row, step, self.now)
                if running is not None and not only_row:
                    self.end((row.id, row.incarnation), Exit("Stopped", ""))
            case Forget():
                row = self.rows.pop(step.replica)
                assert (row.id, row.incarnation) not in self.processes, "a live process is forgotten"
            case Undrain() | Backoff() | Fail():
                self.rows[step.replica] = after(self.rows[step.replica], step, self.now)
            case RollBack():
                assert self.auto_rollback, "nobody asked for it"
                assert (step.template_hash, step.revision) not in self.stable, "it was rolled out before"
                self.quarantined, self.late = step.template_hash, False
                self.take_aim()
                assert self.desired.revision == step.to
            case PushLimits() | StopOrphan():
                pass

    def intend(self, *, template_hash: str | None = None, **changes: object) -> None:
        template, revision = self.newest
        if template_hash not in (None, template):
            self.newest = (str(template_hash), revision + 1)
        self.quarantined, self.late = "", False
        self.desired = replace(self.desired, **changes, generation=self.desired.generation + 1)  # type: ignore[arg-type]
        self.take_aim()

    def before(self, template: str) -> tuple[str, int] | None:
        """The last revision of another template that was rolled out."""
        return next((each for each in reversed(self.stable) if each[0] != template), None)

    def aim(self) -> tuple[str, int]:
        """Template and revision that are to serve."""
        template, _ = self.newest
        return (self.before(template) if self.quarantined == template else None) or self.newest

    def take_aim(self) -> None:
        template, revision = self.aim()
        behind = self.before(template) if self.auto_rollback and self.aim() == self.newest else None
        self.desired = replace(
            self.desired,
            template_hash=template,
            revision=revision,
            proven=(template, revision) in self.stable,
            fallback=behind[1] if behind is not None else None,
            quarantined=self.quarantined if self.quarantined != template else "",
        )

    def settle(self) -> None:
        """No more faults, the router answers: run until nothing is left to do, here and at the neighbours.

        I6, I7, I8.
        """
        worlds = [self, *self.neighbours]
        for world in worlds:
            world.router = Router.KNOWN
            world.desired = replace(world.desired, held=False)
        for _ in range(300):
            done = sum(world.reconcile() for world in worlds)
            for world in worlds:
                world.sync()
                for running in world.processes.values():
                    running.in_flight = 0
                world.tick(0.0 if done else 20.0)
            if all(rollout.is_settled(world.desired, world.world(), world.now) for world in worlds):
                break
        else:
            raise AssertionError(f"I6: no fixed point: {[(world.rows, world.desired) for world in worlds]}")
        for world in worlds:
            world.check_settled()

    def check_settled(self) -> None:
        assert plan(self.desired, self.world(), self.now).steps == (), "I7: work at the fixed point"
        others = [running for running in self.processes.values() if running.template != self.desired.template_hash]
        assert not others, "I8: rolled out, and another revision lives"
        assert len(self.processes) == self.desired.replicas, "I8: rolled out, and not in full number"
        assert all(row.created_at >= self.desired.restarted_at for row in self.rows.values()), "I8: not restarted"


def settled(capacity: int = 3, **intent: Any) -> Simulation:
    world = Simulation(capacity)
    world.intend(**intent)
    world.settle()
    return world
