"""Rolling updates, rollbacks and hot changes under clients that know every answer: none fails, none is altered."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.effort import times
from tests.oracle import Oracle
from tests.waiting import eventually

from quire.client import Client

if TYPE_CHECKING:
    from tests.e2e.conftest import Platform

MODEL = """\
apiVersion: quire.dev/v1alpha1
kind: Model
metadata: {{name: busy}}
spec:
  source: builtin://tiny
  engine: {{dtype: float32, maxModelLen: 1024, kvCache: {{size: 16Mi}}}}
  resources: {{cpu: 1}}
  restartPolicy: {{backoffBase: 100ms, backoffMax: {most}ms}}
  env: [{{name: ROUND, value: '{round}'}}{bad}]
{hot}"""
WRONG = ", {name: PYTHONHOME, value: /nowhere}"
HOT = (
    "  batching: {{maxNumSeqs: {n}}}\n",
    "  batching: {{maxNumBatchedTokens: 1{n}}}\n",
    "  batching: {{maxPrefillTokens: {n}}}\n",
    "  batching: {{maxQueueLength: {n}}}\n",
    "  batching: {{maxQueueWait: {n}s}}\n",
    "  batching: {{policy: {policy}}}\n",
    "  servedModelNames: [busy, also-{n}]\n",
    "  drainTimeout: {n}s\n",
    "  maxMigrations: {n}\n",
    "  rollout: {{minReadyDuration: {n}ms}}\n",
    "  probes: {{liveness: {{timeout: {n}s}}}}\n",
)


class World:
    """One model under change."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.round = 0
        platform.run("apply", platform.gateway, self.manifest())
        self.client = Client(platform.state)

    def manifest(self, **fields: Any) -> Path:
        words = {"most": 200, "round": self.round, "bad": "", "hot": "", **fields}
        return self.platform.write("busy.yaml", MODEL.format(**words))

    def apply(self, reason: str = "UpToDate", **fields: Any) -> None:
        """Apply it so, and wait until the model is rolled out, or is not for that reason."""
        text = self.manifest(**fields).read_text()
        generation = self.client.post("/v1/apply", {"files": [{"name": "busy.yaml", "text": text}]})["results"][0][
            "generation"
        ]

        def so() -> bool:
            status = self.client.get("/v1/objects/model/busy")["status"]
            (rolled,) = [each for each in status["conditions"] if each["type"] == "RolledOut"]
            there = status["rollout"]["settled"] and rolled["observedGeneration"] == generation
            return bool(there and rolled["reason"] == reason)

        eventually(so, f"generation {generation}: {reason}", logs=self.platform.logs)

    def pids(self) -> list[int]:
        return [replica["pid"] for replica in self.client.get("/v1/objects/model/busy")["replicas"]]

    def update(self) -> None:
        """A rolling update, rolled out when this returns."""
        before = self.pids()
        self.round += 1
        self.apply()
        assert not set(before) & set(self.pids())


def test_changes_of_every_kind_alter_no_stream(platform: Platform) -> None:
    world = World(platform)
    oracle = Oracle(platform.base_url("busy"), "busy", tokens=120)
    with oracle.clients(8) as clients:
        clients.wait_streaming()
        for _ in range(times(1, 20)):
            world.update()
        for _ in range(times(1, 5)):
            before = world.pids()
            world.apply("RolledBack", bad=WRONG)
            assert world.pids() == before, "the old revision served all the time"
            world.update()
        before = world.pids()
        for number in range(times(1, 10)):
            for field in HOT[:: times(4, 1)]:
                world.apply(hot=field.format(n=30 + number, policy=("priority", "fcfs")[number % 2]))
                assert world.pids() == before, field
        world.apply()
    assert set(oracle.check(clients.readings)) == {"finished"}, "no request failed"
