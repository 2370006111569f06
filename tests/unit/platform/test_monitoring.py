"""Dashboards and alert rules: well made, and speaking of nothing that the router does not say.

That a real Prometheus takes the rules and has an answer to every expression is `integration/test_prometheus.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from quire.cli import main
from quire.cli.outcome import ExitCode
from quire.monitoring import alerts, dashboards, files
from quire.monitoring.dashboards import BOARDS, Board
from quire.router.metrics import Metrics
from quire.router.model_metrics import ReplicaSample, Standing
from quire.tracing import Counts
from quire_operators.nvml import Watch
from quire_schemas import signals, wire

ROOT = Path(__file__).parents[3]
SAMPLES = re.compile(r"\b((?:quire|process)_[a-z0-9_]+)")
LABELS = re.compile(r"(?:by \(|, )([a-z_]+)(?=[,)])")


def told() -> dict[str, str]:
    """The name of every sample that a router can have, and the type of its family."""
    metrics = Metrics(lambda: [ReplicaSample("m", "m-0", True, None)], lambda: [Standing("m", 1, 1, 0)])
    metrics.set_models(["m"])
    metrics.watch(Counts())
    metrics.watch_gpus(Watch())
    metrics.watch_store(Path("/"))
    metrics.watch_budgets(lambda: [wire.BudgetStanding("p", "b", "tokens", 2, 1)])
    metrics.watch_room(lambda: 0, lambda: 0.0)
    found: dict[str, str] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        found |= {family.name + suffix: family.type for suffix in suffixes}
    return found


def expressions() -> Iterator[tuple[str, str]]:
    for board in BOARDS:
        yield from ((board.uid, expression) for expression in board.expressions)
    yield from ((rule.name, rule.expression) for rule in alerts.RULES)


def test_every_expression_speaks_of_series_that_the_router_has() -> None:
    known = told()
    for where, expression in expressions():
        names = SAMPLES.findall(expression)
        assert names or 'up{job="quire"}' in expression, expression
        assert set(names) <= known.keys(), (where, set(names) - known.keys())
        for name in names:
            counted = re.search(rf"(rate|increase)\({name}[{{\[]", expression) is not None
            shown_as_is = name == f"{signals.GPU_XID_ERRORS}_total"
            is_counter = known[name] in ("counter", "histogram")
            assert counted == is_counter or shown_as_is, f"{where}: a gauge has no rate, and a counter needs one"


def test_every_metric_is_on_some_dashboard() -> None:
    shown = {name for board in BOARDS for e in board.expressions for name in SAMPLES.findall(e)}
    bare = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in shown} | shown
    names = {value for value in signals.__dict__.values() if isinstance(value, str) and SAMPLES.fullmatch(value)}
    names -= {"quire_schemas"}
    assert names <= bare, names - bare


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: str(board.uid))
def test_a_dashboard_is_what_grafana_imports(board: Board) -> None:
    made = json.loads(dashboards.as_json(board))
    assert (made["uid"], made["schemaVersion"]) == (board.uid, 39)
    variables = {variable["name"] for variable in made["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(made))) - {"__rate_interval", "__all"}
    assert used == variables
    ids = [panel["id"] for panel in made["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in made["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & taken, f"{panel['title']} lies on another"
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert (panel["type"] == "row") == ("targets" not in panel)
        assert all(target["expr"] and target["legendFormat"] for target in panel.get("targets", ()))


def test_rules_and_scrape_are_what_prometheus_loads() -> None:
    (group,) = yaml.safe_load(alerts.as_yaml())["groups"]
    assert [rule["alert"] for rule in group["rules"]] == [rule.name for rule in alerts.RULES]
    page = (ROOT / alerts.RUNBOOK).read_text()
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["runbook"] == f"{alerts.RUNBOOK}#{rule['alert'].lower()}"
        assert f"### {rule['alert']}\n" in page, "it says what to do about each"
    assert yaml.safe_load(alerts.scrape())["scrape_configs"][0]["job_name"] == alerts.JOB


def test_the_command_lists_prints_and_writes_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    made = files()
    assert main(["monitoring"]) == ExitCode.OK
    assert capsys.readouterr().out.splitlines() == list(made)
    assert main(["monitoring", "alerts.yaml"]) == ExitCode.OK
    assert capsys.readouterr().out == made["alerts.yaml"]
    assert main(["monitoring", "--to", str(tmp_path / "new")]) == ExitCode.OK
    assert {path.name: path.read_text() for path in (tmp_path / "new").iterdir()} == made
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    assert main(["monitoring", "--to", str(tmp_path / "file" / "below")]) == ExitCode.UNEXPECTED
    assert "cannot be written: Not a directory" in capsys.readouterr().err
    for wrong in (["nothing.json"], ["alerts.yaml", "--to", str(tmp_path)]):
        assert main(["monitoring", *wrong]) == ExitCode.USAGE
        assert "hint:" in capsys.readouterr().err
