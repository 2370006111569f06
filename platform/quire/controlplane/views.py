"""What is shown: the control plane itself, objects with their status, events, logs. Writes nothing.

Statuses are as the reconcilers left them in the store; only what may have changed since without a word of theirs,
whether the router can be reached, is added here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, cast, get_args

from quire.controlplane.errors import ApiError, not_found
from quire.controlplane.plane import ControlPlane
from quire_operators import status
from quire_operators.access import amount, shown
from quire_operators.clock import on_the_wall
from quire_operators.gateway import KEY as GATEWAY
from quire_operators.gateway import resolved_spec
from quire_operators.overrides import Kind
from quire_operators.records import Revision, StoredObject
from quire_schemas import wire
from quire_schemas.resource import NAME_PATTERN, Key

MAX_LOG = 4 * 1024 * 1024
"""Bytes of one log in one answer."""
_NAME = re.compile(NAME_PATTERN)
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_START = re.compile(r"^(?=\S+Z shim: starting )", re.MULTILINE)
"""Before the line with which a shim begins the log of each process that it starts."""


class Views:
    """Answers about one control plane and what it knows."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    def ping(self) -> dict[str, Any]:
        runner = self._plane.gateway.current()
        return {
            "version": self._plane.version,
            "pid": os.getpid(),
            "startedAt": status.timestamp(self._plane.started_at),
            "stateDir": str(self._plane.state.root),
            "installId": self._plane.store.install_id,
            "store": self._plane.store.place,
            "epoch": self._plane.lease.epoch if self._plane.lease is not None else None,
            # what a command starts does not inherit this variable of systemd's
            "supervisor": "systemd" if "INVOCATION_ID" in os.environ else None,
            "router": {
                "baseUrl": f"{self._plane.gateway.base_url()}/v1",
                "certificate": self._plane.gateway.certificate(),
                "ready": self._plane.gateway.ready(),
                "pid": runner.child_pid if runner is not None else None,
            },
            "down": self._plane.is_down,
            "downFailed": self._plane.down_failed,
        }

    def objects(self, kind: str | None) -> dict[str, Any]:
        self._plane.refuse_when_down()
        items = [self.of(stored) for stored in self._plane.store.objects(kind)]
        if kind == GATEWAY.kind and not items:
            items = [self._default_gateway()]
        return {"items": items}

    def object(self, key: Key) -> dict[str, Any]:
        stored = self._plane.store.get(key)
        if stored is not None or key == GATEWAY:
            self._plane.refuse_when_down()
        if stored is None and key == GATEWAY:
            return self._default_gateway()
        if stored is None:
            raise not_found(key)
        return self.of(stored)

    def _default_gateway(self) -> dict[str, Any]:
        """The gateway that there is without a manifest: generation 0, never created."""
        report = self._plane.gateway.status((), 0)
        self._tell_of_endpoints(report)
        return {
            "kind": GATEWAY.kind,
            "name": GATEWAY.name,
            "generation": 0,
            "intent": {},
            "resolved": resolved_spec(None),
            "createdAt": None,
            "deleting": False,
            "status": report,
            "replicas": [],
            "revisions": [],
        }

    def _tell_of_endpoints(self, report: dict[str, Any]) -> None:
        """Say in a status why its endpoints cannot be reached now, and whether they take keys, whatever was true
        when it was written."""
        why = self._plane.gateway.unavailable()
        if "endpoints" not in report:
            return
        if why is not None:
            report["endpoints"] = {**report["endpoints"], "unavailable": why}
        if self._plane.store.objects("accesspolicy"):
            report["endpoints"] = {**report["endpoints"], "keys": True}

    def of(self, stored: StoredObject) -> dict[str, Any]:
        """An object with its status, replicas and revisions."""
        report = self._plane.store.status(stored.uid)
        if stored.key == GATEWAY and not report:  # its first pass is not over
            report = self._plane.gateway.status((), 0)
        self._tell_of_endpoints(report)
        replicas = report.pop("replicaList", [])
        for name in ("signature", "progressAt"):
            report.pop(name, None)
        return {
            "kind": stored.key.kind,
            "name": stored.key.name,
            "generation": stored.generation,
            "intent": stored.intent,
            "resolved": stored.resolved,
            "createdAt": self._shown(stored.created_at),
            "deleting": stored.deletion_time is not None,
            "status": report,
            "replicas": [{**item, "since": self._shown(item["since"])} for item in replicas],
            "revisions": self._revisions(stored, report),
            "inForce": self._in_force(stored),
            "managedBy": self._managed_by(stored),
        }

    def _managed_by(self, stored: StoredObject) -> dict[str, str] | None:
        """The git source that the object is of, and where it comes from there."""
        row = self._plane.store.inventory.manager(stored.key)
        return None if row is None else {"source": str(row.owner), "commit": row.commit, "file": row.file}

    def _in_force(self, stored: StoredObject) -> dict[str, Any] | None:
        """The revision that is to serve and the spec that it serves by, where that is not the newest one's."""
        if stored.revision is None:
            return None
        wanted = self._plane.models.effective(stored)
        if wanted.is_newest:
            return None
        return {"revision": wanted.revision.n, "resolved": wanted.stored.resolved}

    def _shown(self, at: float) -> str:
        """A time of the store for people."""
        return status.timestamp(on_the_wall(at, self._plane.store.clock))

    def _revisions(self, stored: StoredObject, report: Mapping[str, Any]) -> list[dict[str, Any]]:
        """All kept revisions, newest first, each with where it stands: `Current` is what the manifest says,
        `Pinned` or `Stable` what serves instead of it. `report` tells of one that failed and is kept."""
        if stored.revision is None:
            return []
        wanted = self._plane.models.effective(stored)
        alive = {row.revision for row in self._plane.store.replicas(stored.key.name)}
        tried = report.get("rollout", {}).get("canary") or {}
        conditions = report.get("conditions", ())
        stalled = next(
            (each for each in conditions if (each["type"], each["status"]) == ("Stalled", "True")), None
        )

        def state(revision: Revision) -> str:
            if revision.n == wanted.revision.n and wanted.is_newest:
                return "Current"
            if revision.n == wanted.revision.n:
                return "Pinned" if Kind.PIN in wanted.overrides else "Stable"
            if wanted.canary is not None and revision.n == wanted.canary.revision.n:
                return "Canary"
            if revision.failure is not None:
                return "RolledBack"
            if revision.n == wanted.newest.n:
                return "Current"
            if revision.n in alive:
                return "Leaving"
            return "Old" if revision.stable_at is not None else "NeverRolledOut"

        def failure(revision: Revision) -> str | None:
            if state(revision) == "Canary" and revision.n == tried.get("revision"):
                return tried.get("failure") or revision.failure
            if stalled is not None and not tried and state(revision) == "Current":
                return f"{stalled['reason']}: {stalled['message']}"
            return revision.failure

        return [
            {
                "revision": revision.n,
                "templateHash": revision.template_hash,
                "state": state(revision),
                "cause": revision.cause,
                "createdAt": self._shown(revision.created_at),
                "stableAt": None if revision.stable_at is None else self._shown(revision.stable_at),
                "failure": failure(revision),
                "loadSeconds": revision.load_seconds,
            }
            for revision in self._plane.store.revisions(stored.uid)
        ]

    def events(self, key: Key | None, after: int) -> dict[str, Any]:
        self._plane.refuse_when_down()
        return {
            "items": [
                {
                    "id": event.id,
                    "type": event.type,
                    "reason": event.reason,
                    "object": event.object,
                    "message": event.message,
                    "count": event.count,
                    "firstSeen": self._shown(event.first_seen),
                    "lastSeen": self._shown(event.last_seen),
                }
                for event in self._plane.store.events(key, after)
            ]
        }

    async def usage(self, since: str, by: str) -> dict[str, Any]:
        """Requests and tokens from the day `since` on, added up by columns with commas between them."""
        self._plane.refuse_when_down()
        columns = tuple(each for each in by.split(",") if each)
        known = get_args(wire.UsageColumn)
        if not _DAY.fullmatch(since) or not set(columns) <= set(known):
            text = f"since is a day such as 2027-01-31, and by some of {', '.join(known)}"
            raise ApiError(400, "bad_request", text, exit_code=2)
        found = await self._plane.routes.usage(wire.GetUsage(since, cast(tuple[wire.UsageColumn, ...], columns)))
        if found is None or found.problem:
            why = found.problem if found is not None else "the router does not tell what was used"
            raise ApiError(503, "router_unavailable", why, "platform describe gateway/default", exit_code=7)
        return {
            "since": since,
            "items": [
                {
                    **{name: getattr(row, name) for name in known if name in columns},
                    "requests": row.requests,
                    "promptTokens": row.prompt_tokens,
                    "cachedTokens": row.cached_tokens,
                    "completionTokens": row.completion_tokens,
                    "cost": amount("cost", row.cost),
                }
                for row in found.rows
            ],
            "budgets": [shown(budget) for budget in found.budgets],
        }

    def logs(
        self,
        name: str,
        replica: str | None,
        tail: int,
        offset: int | None,
        *,
        previous: bool = False,
        since: float = 0.0,
    ) -> dict[str, Any]:
        """Text of logs: the last `tail` lines, or everything from byte `offset` on. `previous`: of what the
        process before the present one wrote; nothing of a log that has only one. `since`: only what was written
        from then on, in Unix seconds."""
        self._plane.refuse_when_down()
        if name in ("controlplane", "router"):
            files = [(name, self._plane.state.log(name))]
        else:
            key = parse_key(name)
            folder = self._plane.state.logs / "replicas" / key.name
            if key.kind != "model" or (self._plane.store.get(key) is None and not folder.is_dir()):
                raise not_found(key)
            files = [(path.stem, path) for path in sorted(folder.glob("*.log"))]
            if replica is not None:
                known = {stem for stem, _ in files} | {row.id for row in self._plane.store.replicas(key.name)}
                if replica not in known:
                    hint = f"there are {', '.join(sorted(known))}" if known else "platform get replicas"
                    raise ApiError(404, "not_found", f"{key} has no replica {replica[:80]!r}", hint, exit_code=8)
                files = [(stem, path) for stem, path in files if stem == replica]
        found = [
            _read_log(source, path, tail, offset, previous, since) for source, path in files if path.is_file()
        ]
        return {"sources": [each for each in found if each["text"] or not previous]}


def _read_log(
    name: str, path: Path, tail: int, offset: int | None, previous: bool, since: float
) -> dict[str, Any]:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        begin = max(size - MAX_LOG, 0) if offset is None or offset > size else offset
        file.seek(begin)
        data = file.read(MAX_LOG)
    end = begin + len(data)
    text = data.decode(errors="replace")
    if previous:
        text = (["", *_START.split(text)[1:]])[-2:][0]
    if since:
        text = _since(text, since)
    if offset is None:
        text = "".join(text.splitlines(keepends=True)[-tail:]) if tail > 0 else ""
    return {"name": name, "path": str(path), "text": text, "offset": end}


def _since(text: str, when: float) -> str:
    """What follows the last line that says it is older than `when`: the lines below a stamp may be younger than
    it, as those of a process that ends with a traceback are.
    """
    lines = text.splitlines(keepends=True)
    older = [at for at, line in enumerate(lines) if (_written(line) or when) < when]
    return "".join(lines[older[-1] + 1 :] if older else lines)


def _written(line: str) -> float | None:
    """When a line of a log was written, in Unix seconds: processes begin theirs with the local time, a shim with
    that of Greenwich. None for a line that goes on another one."""
    word = line.partition(" ")[0]
    try:
        return datetime.fromisoformat(word if word.endswith("Z") else line[:23]).timestamp()
    except ValueError:
        return None


def parse_key(text: str) -> Key:
    """`model/quickstart` as a key whose name an object could have: names become parts of paths here."""
    hint = "write it as kind/name, for example model/quickstart"
    try:
        key = Key.parse(text)
    except ValueError as error:
        raise ApiError(400, "bad_request", str(error), hint, exit_code=2) from error
    if not _NAME.fullmatch(key.name):
        raise ApiError(400, "bad_request", f"{key.name!r} is not the name of an object", hint, exit_code=2)
    return key
