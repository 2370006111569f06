"""The rules and dashboards at a real Prometheus: its checks, its tests of rules, and a scrape of a live router.

They run where the binaries are (Debian: `apt-get install prometheus`), in `make nightly` alone.
"""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import signal
import socket
import subprocess
import urllib.parse
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from tests.integration.router_world import ASK, CHAT, World, eventually

from quire.monitoring import alerts, files
from quire.monitoring.dashboards import BOARDS, GPUS
from quire.monitoring.promql import WINDOW
from quire_schemas import signals, wire

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        shutil.which("promtool") is None or shutil.which("prometheus") is None,
        reason="needs prometheus and promtool",
    ),
]
LABELS = '{instance="r", job="quire", model="m"'
MIB = 1 << 20


def promtool(*arguments: str, folder: Path) -> str:
    done = subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def of(metric: str, values: str, **labels: str) -> dict[str, str]:
    more = "".join(f', {name}="{value}"' for name, value in labels.items())
    return {"series": f"{metric}{LABELS}{more}}}", "values": values}


def histogram(metric: str, share: int, at: str, all_at: str, **labels: str) -> list[dict[str, str]]:
    """Of a hundred values a minute so many up to the bound `at`, and the rest up to `all_at`."""
    counts = ((at, share), (all_at, 100), ("+Inf", 100))
    return [of(f"{metric}_bucket", f"0+{count}x30", le=bound, **labels) for bound, count in counts]


REPLICA = {"replica": "m-0"}
ERROR, STOP = {"finish": "error", "operation": "chat"}, {"finish": "stop", "operation": "chat"}
REFUSED = {"finish": "refused", "operation": "chat"}
CASES: dict[str, tuple[list[dict[str, str]], list[dict[str, str]]]] = {
    "QuireRouterDown": (
        [{"series": 'up{instance="r", job="quire"}', "values": "0x30"}],
        [{"series": 'up{instance="r", job="quire"}', "values": "1x30"}],
    ),
    "QuireNoReadyReplica": (
        [of(signals.REPLICAS_WANTED, "2x30"), of(signals.REPLICAS_READY, "0x30")],
        [of(signals.REPLICAS_WANTED, "0x30"), of(signals.REPLICAS_READY, "0x30")],
    ),
    "QuireReplicasMissing": (
        [of(signals.REPLICAS_WANTED, "2x30"), of(signals.REPLICAS_READY, "1x30")],
        [of(signals.REPLICAS_WANTED, "2x30"), of(signals.REPLICAS_READY, "2x30")],
    ),
    "QuireCrashLoop": ([of(signals.REPLICA_RESTARTS, "3x30")], [of(signals.REPLICA_RESTARTS, "2x30")]),
    "QuireReplicaEjected": (
        [of(f"{signals.REPLICA_EJECTIONS}_total", "0x20 1x10", reason="stalled")],
        [of(f"{signals.REPLICA_EJECTIONS}_total", "4x30", reason="stalled")],
    ),
    "QuireNoProgress": (
        [
            of(signals.NUM_REQUESTS_RUNNING, "3x30", **REPLICA),
            of(f"{signals.ENGINE_STEPS}_total", "9x30", **REPLICA),
        ],
        [
            of(signals.NUM_REQUESTS_RUNNING, "3x30", **REPLICA),
            of(f"{signals.ENGINE_STEPS}_total", "0+9x30", **REPLICA),
        ],
    ),
    "QuireErrors": (
        [of(f"{signals.REQUESTS}_total", "0+6x30", **ERROR), of(f"{signals.REQUESTS}_total", "0+94x30", **STOP)],
        [
            of(f"{signals.REQUESTS}_total", "0+4x30", **ERROR),
            of(f"{signals.REQUESTS}_total", "0+96x30", **STOP),
            of(f"{signals.REQUESTS}_total", "0+900x30", **REFUSED),
        ],
    ),
    "QuireNumbersNotFinite": (
        [of(f"{signals.CORRUPTED_REQUESTS}_total", "0x20 1x10")],
        [of(f"{signals.CORRUPTED_REQUESTS}_total", "0x30")],
    ),
    "QuireQueueFull": (
        [of(f"{signals.ADMISSION_REJECTIONS}_total", "0+3x30", reason="queue_full")],
        [of(f"{signals.ADMISSION_REJECTIONS}_total", "0+3x30", reason="invalid_request")],
    ),
    "QuireSlowFirstToken": (
        histogram(signals.TIME_TO_FIRST_TOKEN, 90, "10.0", "20.0"),
        histogram(signals.TIME_TO_FIRST_TOKEN, 96, "10.0", "20.0"),
    ),
    "QuireSlowRouter": (
        histogram(signals.ROUTER_ADDED_TIME, 90, "0.1", "0.25", part="answer"),
        histogram(signals.ROUTER_ADDED_TIME, 100, "0.05", "0.25", part="answer"),
    ),
    "QuireKvCachePressure": (
        [
            of(signals.KV_CACHE_USAGE, "0.99x30", **REPLICA),
            of(f"{signals.PREEMPTIONS}_total", "0+2x30", **REPLICA),
        ],
        [of(signals.KV_CACHE_USAGE, "0.99x30", **REPLICA), of(f"{signals.PREEMPTIONS}_total", "7x30", **REPLICA)],
    ),
    "QuireStoreNearlyFull": (
        [of(signals.STORE_FREE, f"{512 * MIB}x30")],
        [of(signals.STORE_FREE, f"{4096 * MIB}x30")],
    ),
    "QuireStoreFull": ([of(signals.STORE_FREE, f"{100 * MIB}x30")], [of(signals.STORE_FREE, f"{512 * MIB}x30")]),
    "QuireGpuErrors": (
        [of(f"{signals.GPU_XID_ERRORS}_total", "0x20 1x10", device="cuda:0", xid="79")],
        [of(f"{signals.GPU_XID_ERRORS}_total", "1x30", device="cuda:0", xid="79")],
    ),
    "QuireGpuSlowed": (
        [of(signals.GPU_SLOWED, "1x30", device="cuda:0")],
        [of(signals.GPU_SLOWED, "0x30", device="cuda:0")],
    ),
}
"""For each rule series that make it fire after half an hour, and series that do not; one value a minute."""


def test_prometheus_takes_the_rules_and_each_fires_when_it_should_and_not_otherwise(tmp_path: Path) -> None:
    for name, text in files().items():
        (tmp_path / name).write_text(text)
    assert f"{len(alerts.RULES)} rules found" in promtool("check", "rules", "alerts.yaml", folder=tmp_path)
    assert "SUCCESS" in promtool("check", "config", "prometheus.yaml", folder=tmp_path)
    assert CASES.keys() == {rule.name for rule in alerts.RULES}
    tests: list[dict[str, Any]] = []
    for name, both in CASES.items():
        for fires, series in zip((True, False), both, strict=True):
            # whether it fires is asked of the series that Prometheus writes for it, whatever its annotations say
            query = f'count(ALERTS{{alertname="{name}", alertstate="firing"}}) or vector(0)'
            expected = [{"labels": "{}", "value": int(fires)}]
            tests.append(
                {
                    "interval": "1m",
                    "input_series": series,
                    "promql_expr_test": [{"expr": query, "eval_time": "30m", "exp_samples": expected}],
                }
            )
    (tmp_path / "tests.yaml").write_text(
        yaml.safe_dump({"rule_files": ["alerts.yaml"], "evaluation_interval": "1m", "tests": tests})
    )
    assert "SUCCESS" in promtool("test", "rules", "tests.yaml", folder=tmp_path)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
async def prometheus(world: World, tmp_path: Path) -> AsyncIterator[str]:
    """The URL of a server that scrapes the router five times a second, and has the rules."""
    (tmp_path / "alerts.yaml").write_text(alerts.as_yaml())
    (tmp_path / "prometheus.yaml").write_text(alerts.scrape(f"127.0.0.1:{world.port}", "200ms"))
    port = free_port()
    arguments = [
        "prometheus",
        f"--config.file={tmp_path / 'prometheus.yaml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(arguments, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"

        async def ready() -> bool:
            assert server.poll() is None, (tmp_path / "log").read_text()
            async with httpx.AsyncClient() as http:
                try:
                    return (await http.get(f"{url}/-/ready")).status_code == 200
                except httpx.HTTPError:
                    return False

        await eventually(ready, 60)
        yield url
    finally:
        server.send_signal(signal.SIGTERM)
        await asyncio.to_thread(server.wait, 30)


async def ask(url: str, expression: str) -> list[float]:
    """The values of an expression now; those that are no number (0 / 0) left out."""
    query = urllib.parse.urlencode({"query": expression})
    async with httpx.AsyncClient(timeout=30) as http:
        answer = (await http.get(f"{url}/api/v1/query?{query}")).json()
    assert answer["status"] == "success", (expression, answer)
    values = [float(entry["value"][1]) for entry in answer["data"]["result"]]
    return [value for value in values if not math.isnan(value)]


async def test_every_panel_has_data_of_a_live_router_under_traffic(world: World, prometheus: str) -> None:
    engine = await world.engine(cached=lambda _: 4, pace=0.005, max_num_seqs=2, looked_up=3)
    world.version += 1
    route = world.route(engine.endpoint(), wanted=1)
    alias = wire.TrafficRoute(
        "r", ("alias",), 1, (wire.Backend("gone", 1),), fallbacks=(wire.Fallback("tiny", ("Unavailable",)),),
        mirror=wire.Mirror("tiny", 100),
    )  # fmt: skip
    budget = wire.AccessBudget(policy="p", name="month", scope="policy", per="month", tokens=1_000)
    await world.control(wire.RoutingTable(world.version, (route,), routes=(alias,), budgets=(budget,)))
    await world.connected("r1")
    expressions = [
        expression.replace(WINDOW, "20s").replace("$model", ".*")
        for board in BOARDS
        if board is not GPUS
        for expression in board.expressions
    ]
    lacking = expressions

    async def traffic() -> None:
        async with world.client() as client:
            while True:
                await asyncio.gather(
                    *(client.chat.completions.create(model="tiny", messages=ASK, max_tokens=20) for _ in range(4))
                )
                with pytest.raises(openai.NotFoundError):
                    await client.chat.completions.create(model="nobody", messages=ASK)
                await client.chat.completions.create(model="alias", messages=ASK, max_tokens=4)
                await asyncio.sleep(0.1)

    async def has_data() -> bool:
        nonlocal lacking
        lacking = [expression for expression in lacking if not await ask(prometheus, expression)]
        return not lacking

    busy = asyncio.create_task(traffic())
    try:
        await eventually(has_data, 60)
    except AssertionError:
        raise AssertionError("no data for:\n" + "\n".join(lacking)) from None
    finally:
        busy.cancel()
        await asyncio.wait([busy])
    for expression in GPUS.expressions:
        await ask(prometheus, expression)  # understood, whether there is a GPU or not
    assert await ask(prometheus, 'ALERTS{alertstate="firing", severity="critical"}') == []
    async with httpx.AsyncClient() as http:
        groups = (await http.get(f"{prometheus}/api/v1/rules")).json()["data"]["groups"]
    rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert rules.keys() == {rule.name for rule in alerts.RULES}
    assert {rule["health"] for rule in rules.values()} == {"ok"}, json.dumps(rules)


async def test_what_a_scrape_finds_is_declared_with_its_type_and_has_few_series(
    world: World, prometheus: str
) -> None:
    await world.serve(await world.engine())
    async with httpx.AsyncClient() as http:
        for model in ("tiny", 'x"} 1\n', "nobody", "CANARY" * 20):
            await http.post(f"{world.url}/v1/chat/completions", json={**CHAT, "model": model, "max_tokens": 2})

    async def scraped() -> bool:
        return bool(await ask(prometheus, f'{signals.REPLICA_UP}{{model="tiny"}}'))

    await eventually(scraped, 60)
    (series,) = await ask(prometheus, 'scrape_samples_scraped{job="quire"}')
    assert 300 < series < 1000
    (models,) = await ask(prometheus, f"count(count by (model) ({signals.REQUESTS}_total))")
    assert models == 2, "the one that is served, and the others together"
