"""Every value in force for an object, and where it comes from: what `platform explain model/NAME` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.cli.render import flatten, scalar, size, table

AUTO = {
    "revision": ("commit", "the commit that was found"),
    "engine.device": ("device", "this machine"),
    "engine.dtype": ("dtype", "the checkpoint"),
    "engine.kvCache.dtype": ("kvDtype", "the dtype"),
    "engine.kvCache.size": ("kvCacheSize", "what engine.memory leaves"),
    "engine.maxModelLen": ("maxModelLen", "the checkpoint and the cache"),
    "resources.cpu": ("threads", "the cores of this machine"),
    "batching.maxPrefillTokens": ("maxPrefillTokens", "the device"),
}
"""Fields that are worked out when they are left out or `auto`: the name in `status.resolved`, and what of."""


def lines(view: Mapping[str, Any]) -> list[str]:
    """One row a field of the resolved spec: its value now, and its origin."""
    declared = {path for path, _ in flatten(view["intent"].get("spec", {}))}
    found = view["status"].get("resolved") or {}
    other = view.get("inForce")
    written = dict(flatten(view["resolved"]))
    rows = []
    for path, value in flatten(other["resolved"] if other else view["resolved"]):
        if path == "defaultsVersion":
            continue
        origin = "manifest" if _is_declared(path, declared) else "default"
        if other and value != written.get(path):
            origin = f"revision {other['revision']}, which serves instead"
        shown = scalar(value)
        if path in AUTO and (value in (None, "auto") or path == "revision"):
            name, of = AUTO[path]
            if name in found and found[name] != value:
                shown, origin = _spelled(name, found[name]), f"{origin}, from {of}"
        rows.append([path, shown, origin])
    decided = {item["kind"]: item for item in view["status"].get("overrides") or ()}
    for row in rows:
        if row[0] != "replicas":
            continue
        if (autoscale := decided.get("autoscale")) is not None:
            row[1:] = [str(autoscale["replicas"]), "autoscaling, by the load"]
        if (scale := decided.get("scale")) is not None:
            row[1:] = [str(scale["replicas"]), f"scaled by {scale['by']}; {row[2]}: {row[1]}"]
        if (pause := decided.get("pause")) is not None:
            row[1:] = ["0", f"paused by {pause['by']}; {row[2]}: {row[1]}"]
    return table(("FIELD", "VALUE", "ORIGIN"), rows)


def _is_declared(path: str, declared: set[str]) -> bool:
    return any(path == each or path.startswith((f"{each}.", f"{each}[")) for each in declared)


def _spelled(name: str, value: Any) -> str:
    return size(value) if name == "kvCacheSize" else scalar(value)
