"""What a git source does about a commit: pure, from what the commit declares, what the source applied before, and
what is stored now.

Three hashes of one object decide: of the document in git, of what this source applied last, of what is stored.

    git ≠ stored, and git ≠ applied     git has something new: written
    git ≠ stored, and git = applied     a hand changed or deleted it: drift, written back only if it is to heal
    git = stored                        nothing to do; taken into the inventory if it is not there yet
    not in git, in the inventory        left the repository: deleted, within the cap

The inventory is the source's own: an object that another source has is a conflict, and one that nobody has is
never deleted. Nothing is read from a program counter: after a crash between any two writes the same decision goes
on.

What becomes of the objects when the source itself is deleted is decided here, too (`depart`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quire_operators.inventory import Managed
from quire_schemas.quantities import parse_percent
from quire_schemas.resource import Key

ORDER = ("accesspolicy", "gateway", "model", "route")
"""Keys before who needs one, models before the routes to them; deletions the other way round."""


@dataclass(frozen=True, slots=True)
class Declared:
    """One document of a commit."""

    key: Key
    file: str
    intent_hash: str


@dataclass(frozen=True, slots=True)
class Present:
    """One stored object."""

    intent_hash: str
    deleting: bool = False


@dataclass(frozen=True, slots=True)
class SyncPlan:
    """What is to be done, in order."""

    write: tuple[Key, ...] = ()
    """Objects to store as git has them."""
    healed: tuple[Key, ...] = ()
    """Those of `write` that a hand had changed or deleted."""
    adopt: tuple[Key, ...] = ()
    """Objects that were nobody's, are as git has them, and come into the inventory."""
    note: tuple[Key, ...] = ()
    """Objects of the inventory that a hand made what git has by now."""
    delete: tuple[Key, ...] = ()
    forget: tuple[Key, ...] = ()
    """Objects of the inventory that are gone, or going."""
    wait: tuple[Key, ...] = ()
    """Objects that git has, and that are being deleted: they come when they are gone."""
    drift: Mapping[Key, str] = field(default_factory=dict)
    """What is left as a hand made it, and how it differs."""
    kept: tuple[Key, ...] = ()
    """Objects that left the repository and stay."""
    blocked: str | None = None
    """Why the cap keeps them; None where spec.sync.prune does, or nothing is kept."""
    conflicts: Mapping[Key, Key] = field(default_factory=dict)
    """Objects that another source has, and which."""

    @property
    def moves(self) -> bool:
        """Whether there is something to do now."""
        return bool(self.write or self.adopt or self.note or self.delete or self.forget)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do; what is left or kept is nothing to do."""
        return not (self.moves or self.wait or self.conflicts)


@dataclass(frozen=True, slots=True)
class Departure:
    """What becomes of the objects of a source that is deleted."""

    take: tuple[Key, ...] = ()
    """Objects to delete, in order."""
    going: tuple[Key, ...] = ()
    """Objects that are being deleted already."""
    stay: Mapping[Key, str] = field(default_factory=dict)
    """Objects that are nobody's from then on, and why they stay."""
    blocked: str | None = None
    """Why nobody deletes so many without saying so; None within the cap."""


def depart(
    source: str, managed: Mapping[Key, Managed], stored: Mapping[Key, Present], spec: Mapping[str, Any]
) -> Departure:
    """What becomes of the objects of a source, by its uid and its resolved spec. One that a hand changed stays:
    somebody took it, and no repository says any more what it should be. A source without the field is of a version
    that had none, and orphans."""
    mine = {key: own for key, own in managed.items() if own.source == source}
    there = {key: stored[key] for key in sorted(mine, key=rank, reverse=True) if key in stored}
    going = tuple(key for key, each in there.items() if each.deleting)
    alive = {key: each for key, each in there.items() if not each.deleting}
    if spec.get("deletionPolicy", "Orphan") == "Orphan":
        return Departure(stay=dict.fromkeys(alive, "spec.deletionPolicy is Orphan"))
    take = tuple(key for key, each in alive.items() if each.intent_hash == mine[key].intent_hash)
    blocked = None
    if _above_cap(len(take), len(mine), spec["sync"]):
        blocked = (
            f"{len(take)} of its {len(mine)} objects would be deleted with it, and spec.sync.maxPrune lets "
            f"{spec['sync']['maxPrune']} be deleted at once"
        )
    return Departure(take, going, {key: "it was changed by hand" for key in alive if key not in take}, blocked)


def _above_cap(number: int, whole: int, sync: Mapping[str, Any]) -> bool:
    """Whether so many of `whole` objects are more than may be deleted at once."""
    return number > round(parse_percent(sync["maxPrune"]) * whole, 6)


def rank(key: Key) -> tuple[int, Key]:
    """The order in which objects are written."""
    return (ORDER.index(key.kind) if key.kind in ORDER else len(ORDER), key)


def decide(
    source: str,
    declared: Sequence[Declared],
    managed: Mapping[Key, Managed],
    stored: Mapping[Key, Present],
    sync: Mapping[str, Any],
    *,
    heal: bool,
    whole: int,
) -> SyncPlan:
    """The plan of one source. `source` is its uid, `managed` the inventories of all, `sync` its resolved
    `spec.sync`. `heal`: what a hand changed is written back. `whole`: what the cap is a
    share of, how many objects the source had when it came to this commit; what the commit brings does not
    count."""
    write, healed, adopt, note, wait = [], [], [], [], []
    drift: dict[Key, str] = {}
    conflicts: dict[Key, Key] = {}
    for document in sorted(declared, key=lambda each: rank(each.key)):
        key, own, there = document.key, managed.get(document.key), stored.get(document.key)
        if own is not None and own.source != source:
            conflicts[key] = own.owner
        elif there is not None and there.deleting:
            wait.append(key)
        elif there is not None and there.intent_hash == document.intent_hash:
            if own is None:
                adopt.append(key)
            elif own.intent_hash != document.intent_hash:
                note.append(key)
        elif own is None or own.intent_hash != document.intent_hash:
            write.append(key)
        elif heal:
            write.append(key)
            healed.append(key)
        else:
            drift[key] = "it was deleted" if there is None else "it was changed"
    wanted = {document.key for document in declared}
    left = [key for key, own in managed.items() if own.source == source and key not in wanted]
    alive = [key for key in left if (there := stored.get(key)) is not None and not there.deleting]
    alive.sort(key=rank, reverse=True)
    blocked = None
    if sync["prune"] and _above_cap(len(alive), whole, sync):
        blocked = (
            f"{len(alive)} of {whole} objects left the repository, and spec.sync.maxPrune lets "
            f"{sync['maxPrune']} be "
            "deleted at once"
        )
    prune = sync["prune"] and blocked is None
    return SyncPlan(
        write=tuple(write),
        healed=tuple(healed),
        adopt=tuple(adopt),
        note=tuple(note),
        delete=tuple(alive) if prune else (),
        forget=tuple(key for key in left if key not in alive),
        wait=tuple(wait),
        drift=drift,
        kept=() if prune else tuple(alive),
        blocked=blocked,
        conflicts=conflicts,
    )
