"""Answers of the admin API as the command line gets them."""

from __future__ import annotations

from typing import Any

NOW = 1_800_000_000.0


def condition(
    kind: str, status: str, reason: str = "Because", message: str = "", generation: int = 1
) -> dict[str, Any]:
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": "2027-01-15T07:59:30Z",
        "observedGeneration": generation,
    }


def model(**changes: Any) -> dict[str, Any]:
    """A model as the API shows it: one replica, served."""
    view: dict[str, Any] = {
        "kind": "model",
        "name": "quickstart",
        "generation": 1,
        "intent": {"kind": "Model", "metadata": {"name": "quickstart"}, "spec": {"source": "builtin://tiny"}},
        "resolved": {},
        "createdAt": NOW - 240,
        "deleting": False,
        "status": {
            "observedGeneration": 1,
            "summary": "Serving",
            "servedRevision": 1,
            "replicas": {"desired": 1, "live": 1, "ready": 1, "updated": 1, "draining": 0},
            "endpoints": {"openai": "http://127.0.0.1:8000/v1", "modelNames": ["quickstart"]},
            "resolved": {"dtype": "bfloat16", "maxModelLen": 2048},
            "progress": {
                "accepted": {"ok": True, "seconds": 0.01},
                "weights": {"ok": True, "seconds": 0.1, "bytes": 4_300_000},
                "device": {"ok": True, "seconds": 0.1, "device": "cpu"},
                "loaded": {"ok": True, "seconds": 1.23},
                "ready": {"ok": True, "seconds": 3.41},
            },
            "conditions": [condition("Ready", "True"), condition("RolledOut", "True")],
        },
        "replicas": [],
    }
    status = changes.pop("status", {})
    return {**view, **changes, "status": {**view["status"], **status}}
