"""What a person decides about a git source beside its manifest: look now, stop, go on.

A suspension is one row of the store beside the source's intent (`quire_operators.overrides`), so nothing that a
repository says, and no apply of the source's own manifest, ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quire.controlplane.errors import ApiError, not_found
from quire.controlplane.plane import ControlPlane
from quire.controlplane.steering import text_of
from quire.controlplane.views import Views
from quire_operators.overrides import Kind, Override
from quire_operators.records import StoredObject
from quire_schemas.resource import Key


class Following:
    """The decisions about git sources of one control plane's users."""

    def __init__(self, plane: ControlPlane, views: Views) -> None:
        self._plane = plane
        self._views = views
        self._verbs: dict[str, Callable[[StoredObject, Mapping[str, Any]], tuple[str, str]]] = {
            "look": self._look,
            "sync": self._sync,
            "suspend": self._suspend,
            "resume": self._resume,
        }

    def decide(self, key: Key, verb: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out one verb on a source: what was decided, in a sentence, and the source as it is now."""
        decide = self._verbs.get(verb)
        if decide is None:
            raise ApiError(404, "not_found", f"{key} knows no {verb}", f"sources know {', '.join(self._verbs)}")
        self._plane.refuse_while_going_down()
        self._plane.refuse_when_down()
        stored = self._plane.store.get(key)
        if stored is None:
            raise not_found(key)
        if stored.deletion_time is not None:
            raise ApiError(409, "conflict", f"{key} is being deleted", "wait until it is gone", exit_code=5)
        at = self._plane.store.clock()
        reason, text = decide(stored, body)
        self._plane.wake(key)
        self._plane.note(key, reason, text)
        return {"key": str(key), "message": text, "at": at, "object": self._views.of(stored)}

    def _look(self, stored: StoredObject, body: Mapping[str, Any]) -> tuple[str, str]:
        self._plane.sources.hint(stored.key.name)
        return "LookRequested", "the repository is asked now"

    def _sync(self, stored: StoredObject, body: Mapping[str, Any]) -> tuple[str, str]:
        if self._plane.sources.suspended(stored):
            hint = f"platform source resume {stored.key.name}; or spec.suspend: false"
            raise ApiError(409, "conflict", f"{stored.key} is suspended", hint, exit_code=5)
        self._plane.sources.ask(stored)
        return "SyncRequested", "it is looked at now, and everything put as it is there"

    def _suspend(self, stored: StoredObject, body: Mapping[str, Any]) -> tuple[str, str]:
        by, why = text_of(body, "by") or "the admin API", text_of(body, "reason")
        override = Override(Kind.SUSPEND, by, self._plane.store.clock(), why)
        self._plane.store.set_override(stored.uid, override)
        return "Suspended", "nothing is applied from it until it is resumed"

    def _resume(self, stored: StoredObject, body: Mapping[str, Any]) -> tuple[str, str]:
        was = self._plane.sources.suspended(stored)
        self._plane.store.end_overrides(stored.uid, (Kind.SUSPEND,))
        if stored.resolved["suspend"]:
            return "Resumed", "its manifest says suspend: true, so it stays suspended"
        return "Resumed", "it is followed again" if was else "it was not suspended"
