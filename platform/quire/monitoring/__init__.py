"""What people look at and are woken by: dashboards for Grafana, rules and a scrape for Prometheus.

They are values, made of the names in `quire_schemas.signals`, so that none can ask for a series that is not there:

    promql.py       expressions
    dashboards.py   panels, and the JSON that Grafana imports
    alerts.py       rules, and the YAML that Prometheus loads
"""

from __future__ import annotations

from quire.monitoring import alerts, dashboards


def files(target: str = alerts.TARGET) -> dict[str, str]:
    """The content of every file, by its name; `target` is the host and port that is scraped."""
    made = {f"{board.uid}.json": dashboards.as_json(board) for board in dashboards.BOARDS}
    return {**made, "alerts.yaml": alerts.as_yaml(), "prometheus.yaml": alerts.scrape(target)}


__all__ = ["files"]
