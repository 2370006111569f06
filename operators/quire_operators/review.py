"""What applying a set of resources would do: a review of each, and the document that `plan` prints of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quire_operators.desired import Effective
from quire_operators.placement import Placement
from quire_operators.records import NewRevision, StoredObject
from quire_operators.rollout import Budget
from quire_schemas.manifest import Located, Problem
from quire_schemas.resource import Key
from quire_schemas.sizing import FitReport
from quire_schemas.update import FieldChange


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a resource cannot be applied. `path` is the field it is about."""

    path: str
    reason: str
    message: str
    hint: str


@dataclass(slots=True)
class Review:
    """What applying one resource would do."""

    located: Located
    old: StoredObject | None
    action: str
    cause: str = ""
    """What a new revision is for, if the manifest does not say it."""
    resolved: dict[str, Any] = field(default_factory=dict)
    revision: NewRevision | None = None
    placement: Placement | None = None
    fit: FitReport | None = None
    changes: tuple[FieldChange, ...] = ()
    rollout: str = ""
    budget: Budget | None = None
    """What the rollout may do as things stand; None where none begins."""
    replaces: int = 0
    """Running replicas that others take the place of."""
    ends: tuple[str, ...] = ()
    """Kinds of what was decided beside the intent that this ends."""
    wanted: Effective | None = None
    """What is to run once this is applied; None for what is refused, unchanged, or no model."""
    findings: list[str] = field(default_factory=list)
    """What of the checkpoint may surprise."""
    notes: list[str] = field(default_factory=list)
    download: int = 0
    """Bytes that are to be fetched from a hub."""
    warnings: list[str] = field(default_factory=list)
    """What goes against the wish, though it is accepted."""
    refusal: Refusal | None = None

    @property
    def key(self) -> Key:
        return self.located.key

    def refuse(self, refusal: Refusal) -> None:
        self.action, self.refusal = "refused", refusal


def problems(reviews: Sequence[Review]) -> list[Problem]:
    """The refusals as problems of the files they come from."""
    return [
        review.located.problem(found.path, found.message, found.hint)
        for review in reviews
        if (found := review.refusal) is not None
    ]


def report(reviews: Sequence[Review]) -> dict[str, Any]:
    """The reviews as the document that `platform plan` prints."""
    items = []
    for review in reviews:
        old = review.old.revision if review.old is not None else None
        new = old if review.revision is None else (old or 0) + 1
        item: dict[str, Any] = {
            "key": str(review.key),
            "action": review.action,
            "revision": [old, new],
            "changes": _changes(review),
            "fit": _fit(review.fit) if review.fit is not None else None,
            "resolved": review.placement.resolved(review.resolved) if review.placement is not None else None,
            "rollout": review.rollout,
            "budget": _budget(review.budget),
            "replaces": review.replaces,
            "ends": list(review.ends),
            "findings": review.findings,
            "notes": review.notes,
            "warnings": review.warnings,
        }
        if (found := review.refusal) is not None:
            problem = review.located.problem(found.path, found.message, found.hint)
            item["problem"] = {**problem.as_dict(), "reason": found.reason}
        items.append(item)
    actions = [review.action for review in reviews]
    return {
        "items": items,
        "summary": {
            "create": actions.count("create"),
            "update": actions.count("update"),
            "delete": 0,
            "refused": actions.count("refused"),
        },
    }


def differences(reviews: Sequence[Review]) -> dict[str, Any]:
    """The reviews as the document that `platform diff` prints: of what is new, all that its manifest declares."""
    return {
        "items": [
            {
                "key": str(review.key),
                "action": review.action,
                "changes": _changes(review),
                "intent": review.located.intent if review.old is None else None,
            }
            for review in reviews
        ]
    }


def _changes(review: Review) -> list[dict[str, Any]]:
    return [
        {
            "path": change.path,
            "old": change.old,
            "new": change.new,
            "update": change.update.value,
            "note": change.note,
        }
        for change in review.changes
    ]


def moved(planned: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str | None:
    """What of a plan that was kept no longer holds, in a sentence; None if all of it does.

    Compared is what would be done, and how it could be carried out: not notes, nor how long something takes.
    """
    if [item["key"] for item in planned] != [item["key"] for item in now]:
        return "the manifests are not those that were planned"
    for before, after in zip(planned, now, strict=True):
        for name in ("action", "revision", "changes", "resolved", "budget", "replaces", "ends"):
            if before.get(name) != after.get(name):
                return (
                    f"{after['key']}: {name} was {json.dumps(before.get(name), ensure_ascii=False)} when it was "
                    f"planned, and is {json.dumps(after.get(name), ensure_ascii=False)} now"
                )
    return None


def _budget(found: Budget | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "strategy": found.strategy.value,
        "surge": found.surge,
        "unavailable": found.unavailable,
        "serving": found.floor,
        "stopFirst": found.stop_first,
    }


def _fit(found: FitReport) -> dict[str, Any]:
    return {
        "fits": found.fits,
        "weights": found.weights,
        "activations": found.activations,
        "overhead": found.overhead,
        "kv": found.kv,
        "used": found.used,
        "limit": found.limit,
        "numBlocks": found.num_blocks,
        "kvTokens": found.kv_tokens,
        "maxModelLen": found.max_model_len,
        "reason": found.reason,
        "counterOffers": [str(offer) for offer in found.counter_offers],
        "lines": [line[9:] for line in found.lines()],  # the label is the printer's
    }
