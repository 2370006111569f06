"""What the control plane costs with many models: a resync of all, one change, and what `platform get` asks.

Store, admission, reconcilers, planner, routing table and views are the product's own, in one process. The fleet is
played: a start is an observation that says so, and so is the router, which acknowledges every table at once. One
process is measured, by its own processor time.

    resync     each model reconciled once, and the routes, with nothing to do
    change     one model of all is applied with another template, until it is rolled out: the longest pass
    get        the answer to GET /v1/objects?kind=model, as bytes
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from benchmarks.rows import NO_KERNELS, RESULTS, Row, provenance, write
from quire import builtin
from quire.controlplane.views import Views
from quire.controlplane.wiring import router_command, text_facts
from quire_operators.admission import Admission
from quire_operators.cache import HubCache
from quire_operators.devices import Inventory
from quire_operators.downloads import Downloads
from quire_operators.fleet.local import Life, LocalFleet, Observation, Unit
from quire_operators.gateway import GatewayReconciler
from quire_operators.models import ModelReconciler
from quire_operators.paths import StateDir
from quire_operators.routes import Routes, build
from quire_operators.secrets import Secrets
from quire_operators.sources import Sources
from quire_operators.store import Store
from quire_schemas import manifest, wire
from quire_schemas.resource import Key

MACHINE = Inventory(1 << 50, 1 << 50, 64)
READY = ('{"event":"starting","at":1}', '{"event":"ready","at":2,"load_seconds":1.0,"backend":"cpu"}')
MODEL = """\
apiVersion: quire.dev/v1alpha1
kind: Model
metadata: {{name: m{number}}}
spec: {{source: 'builtin://tiny', replicas: {replicas}, env: [{{name: ROUND, value: '{round}'}}]}}
"""


class PlayedFleet(LocalFleet):
    """Starts nothing: what was to be started is observed as an engine that is ready."""

    hot: dict[tuple[str, int], str]
    """The hash of the hot settings that each was started with."""

    async def start(self, unit: Unit) -> Observation:
        spec = msgspec.json.decode(unit.files["engine.json"], type=wire.EngineSpec)
        self.hot[unit.name, unit.incarnation] = spec.hot_hash
        seen = Observation(
            unit.folder, unit.name, unit.incarnation, unit.nonce, unit.labels, Life.LIVE, self._clock(),
            running=True, child_pid=1, shim_pid=1, starts=1, lines=READY,
        )  # fmt: skip
        self._put(seen)
        return seen

    async def stop(self, folder: Path, grace: float) -> None:
        for seen in self.observed():
            if seen.folder == folder:
                self._put(replace(seen, life=Life.GONE, running=False))


class PlayedRoutes(Routes):
    """A router that is connected to all that it was told of."""

    hot: dict[tuple[str, int], str]
    _table = wire.RoutingTable(0, ())

    async def _ask(self, message: wire.ToRouter) -> wire.RouterStatus:
        if isinstance(message, wire.RoutingTable):
            self._table = message
        loads = [
            wire.ReplicaLoad(
                each.replica_id, each.incarnation, True, 0, self.hot[each.replica_id, each.incarnation]
            )
            for route in self._table.models
            for each in route.replicas
        ]
        return wire.RouterStatus(self._table.version, 1, "http://127.0.0.1:8000", loads)


class NoHeartbeats:
    """Engines that are played have no sockets."""

    def keep(self, model: str, sockets: Mapping[Any, str]) -> None:
        """Nobody is asked."""

    def silent_since(self, name: Any) -> None:
        return None


@dataclass(slots=True)
class World:
    """A control plane without processes."""

    store: Store
    admission: Admission
    routes: PlayedRoutes
    models: ModelReconciler
    views: Views

    def apply(self, texts: list[str]) -> None:
        loaded = manifest.load([(f"{number}.yaml", text) for number, text in enumerate(texts)])
        reviews = self.admission.review(loaded.resources)
        self.store.apply(self.admission.changes(reviews))

    async def reconcile_all(self) -> int:
        """One pass of each model and of the routes; how many models want to go on."""
        busy = 0
        for stored in self.store.objects("model"):
            busy += await self.models.reconcile(stored.key) == 0.0
        await self.routes.reconcile(wire.RoutingTable(0, build(self.models.routables())))
        return busy + self.models.awaits_router()

    async def settle(self) -> None:
        for _ in range(20):
            if not await self.reconcile_all():
                return
        raise RuntimeError("no fixed point")


def world(folder: Path) -> World:
    """A store in `folder` and what works on it, put together as `ControlPlane` does."""
    state = StateDir(folder / "state")
    state.create()
    store = Store(state.store)
    sources = Sources({"tiny": builtin.path("tiny")}, HubCache(folder / "hub", folder / "records"))
    admission = Admission(store, sources, lambda: MACHINE, text_facts)
    fleet = PlayedFleet((state.replicas, state.gateway), store.install_id, lambda name: None, store.clock)
    gateway = GatewayReconciler(store, fleet, state, router_command(state), {}, store.clock)
    routes = PlayedRoutes(state.router_control, store, lambda: True, store.clock)
    gateway.routes = routes
    fleet.hot = routes.hot = {}
    downloads = Downloads(sources.cache, Secrets(state.secrets, {}), {}, lambda key: None, store.clock)
    models = ModelReconciler(
        store, fleet, routes, gateway, state, lambda: MACHINE, lambda path: ["engine"], {}, lambda key: None,
        downloads, store.clock,
    )  # fmt: skip
    models._heartbeats = NoHeartbeats()  # type: ignore[assignment]
    plane: Any = SimpleNamespace(store=store, models=models, gateway=gateway, refuse_when_down=lambda: None)
    return World(store, admission, routes, models, Views(plane))


async def measure(models: int, replicas: int) -> Row:
    """Processor seconds with so many models of so many replicas each."""
    with tempfile.TemporaryDirectory(prefix="qb") as folder:
        made = world(Path(folder))
        made.apply([MODEL.format(number=number, replicas=replicas, round=0) for number in range(models)])
        await made.settle()
        began = time.process_time()
        await made.reconcile_all()
        resync = time.process_time() - began

        changed = manifest.load(
            [("m.yaml", MODEL.format(number=models // 2, replicas=replicas, round=1))]
        ).resources
        began = time.process_time()
        made.admission.together(made.admission.review(changed, MACHINE), MACHINE)
        planned = time.process_time() - began

        key = Key("model", f"m{models // 2}")
        made.apply([MODEL.format(number=models // 2, replicas=replicas, round=1)])
        passes = []
        for _ in range(20 * replicas):
            began = time.process_time()
            again = await made.models.reconcile(key)
            passes.append(time.process_time() - began)
            await made.routes.reconcile(wire.RoutingTable(0, build(made.models.routables())))
            if again != 0.0 and not made.models.awaits_router():
                break
        began = time.process_time()
        answer = json.dumps(made.views.objects("model")).encode()
        get = time.process_time() - began
        return {
            "models": models, "replicas": models * replicas, "resync_s": round(resync, 4),
            "plan_ms": round(planned * 1000, 2),
            "change_longest_pass_ms": round(max(passes) * 1000, 2), "change_passes": len(passes),
            "get_s": round(get, 4), "get_bytes": len(answer),
        }  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="*", type=int, default=[50, 100, 200, 500])
    parser.add_argument("--replicas", type=int, default=4, help="of each model")
    parser.add_argument("--out", type=Path, default=RESULTS / "control_plane.jsonl")


def run(args: argparse.Namespace) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows: list[Row] = []
    for models in args.models:
        row = provenance(NO_KERNELS) | {"benchmark": "control-plane"} | asyncio.run(measure(models, args.replicas))
        write(args.out, [row])
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items() if name not in ("commit", "machine")))
    print("\n" + "\n".join(plot(rows)))


WIDTH = 60


def plot(rows: Sequence[Row]) -> list[str]:
    """The processor time of a resync over the number of models: where it is linear, no bar goes beyond the line
    that the first row draws.
    """
    most = max(row["resync_s"] for row in rows)
    a_model = rows[0]["resync_s"] / rows[0]["models"]
    most = max(most, *(a_model * row["models"] for row in rows))
    lines = []
    for row in rows:
        bar = round(WIDTH * row["resync_s"] / most)
        line = round(WIDTH * a_model * row["models"] / most)
        marks = ["█" if at < bar else " " for at in range(WIDTH + 1)]
        marks[line] = "│"
        lines.append(f"{row['models']:>5} {''.join(marks)} {row['resync_s']:.3f} s")
    return [*lines, f"{'':>5} │: {a_model * 1000:.2f} ms a model, as with {rows[0]['models']}"]
