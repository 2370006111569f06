"""What a person decides about a model beside its manifest: how many, whether at all, which revision, once more.

Nothing here touches an intent. A decision is one row of the store (`quire_operators.overrides`) that the
reconciler takes into account from its next pass on, and that an apply of the same manifest leaves alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from quire.controlplane.errors import ApiError, not_found
from quire.controlplane.plane import ControlPlane
from quire.controlplane.views import Views
from quire_operators.canary import PROMOTED, Stage
from quire_operators.desired import Canary, Effective, last_stable
from quire_operators.overrides import Kind, Override
from quire_operators.placement import Placement
from quire_operators.records import Revision
from quire_operators.rollout import Goal
from quire_operators.room import most_replicas
from quire_operators.routes import ROUTES
from quire_schemas.quantities import format_duration
from quire_schemas.resource import Key

MAX_TEXT = 500
MAX_SECONDS = 366 * 86400
MAX_REPLICAS = 1000


class Steering:
    """The decisions of one control plane's users."""

    def __init__(self, plane: ControlPlane, views: Views) -> None:
        self._plane = plane
        self._views = views
        self._verbs: dict[str, Callable[[Effective, Mapping[str, Any]], tuple[str, str]]] = {
            "scale": self._scale,
            "pause": self._pause,
            "resume": self._resume,
            "rollout-pause": self._hold,
            "rollout-resume": self._release,
            "promote": self._promote,
            "abort": self._abort,
            "undo": self._undo,
            "retry": self._retry,
            "restart": self._restart,
        }

    def decide(self, key: Key, verb: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out one verb on a model: what was decided, in a sentence, and the model as it is now."""
        decide = self._verbs.get(verb)
        if decide is None or key.kind != "model":
            raise ApiError(404, "not_found", f"{key} knows no {verb}", f"models know {', '.join(self._verbs)}")
        self._plane.refuse_while_going_down()
        self._plane.refuse_when_down()
        stored = self._plane.store.get(key)
        if stored is None:
            raise not_found(key)
        if stored.deletion_time is not None:
            raise ApiError(409, "conflict", f"{key} is being deleted", "wait until it is gone", exit_code=5)
        reason, text = decide(self._plane.models.effective(stored), body)
        self._plane.wake(key)
        self._plane.wake(ROUTES)
        self._plane.note(key, reason, text)
        self._plane.refresh(key)
        return {"key": str(key), "message": text, "object": self._views.of(stored)}

    def _set(self, wanted: Effective, kind: Kind, body: Mapping[str, Any], **values: Any) -> None:
        by, why = text_of(body, "by") or "the admin API", text_of(body, "reason")
        override = Override(kind, by, self._plane.store.clock(), why, **values)
        self._plane.store.set_override(wanted.stored.uid, override)

    @staticmethod
    def _refuse_while_held(wanted: Effective) -> None:
        """Nothing can be replaced while rollouts are paused, and nobody shall wait for it."""
        if Kind.HOLD in wanted.overrides:
            key = wanted.stored.key
            text = f"the rollouts of {key} are paused by {wanted.overrides[Kind.HOLD].by}"
            raise ApiError(409, "conflict", text, f"platform rollout resume {key}, then again", exit_code=5)

    def _end(self, wanted: Effective, *kinds: Kind) -> None:
        self._plane.store.end_overrides(wanted.stored.uid, kinds)

    # ── how many ──────────────────────────────────────────────────────────────────────────────────────────

    def _scale(self, wanted: Effective, body: Mapping[str, Any]) -> tuple[str, str]:
        replicas = body.get("replicas")
        spec = wanted.newest.resolved
        declared = spec["replicas"]
        if (range_ := spec["autoscaling"]) is not None:
            declared = f"{range_['minReplicas']} to {range_['maxReplicas']}, by the load"
        if replicas is None:
            self._end(wanted, Kind.SCALE)
            return "Scaled", f"as many replicas as the manifest says: {declared}"
        if not isinstance(replicas, int) or isinstance(replicas, bool) or not 0 <= replicas <= MAX_REPLICAS:
            text = f"replicas is a whole number from 0 to {MAX_REPLICAS}"
            hint = f"platform scale {wanted.stored.key} --reset goes by the manifest"
            raise ApiError(400, "bad_request", text, hint, exit_code=2)
        placement = Placement.from_dict(wanted.revision.placement)
        most = most_replicas(wanted.stored.resolved, placement, self._plane.inventory())
        if replicas > most:
            raise ApiError(
                422,
                "does_not_fit",
                f"{replicas} replicas do not fit on this machine, even with nothing else on it",
                f"at most {most} fit",
                exit_code=3,
            )
        self._set(wanted, Kind.SCALE, body, replicas=replicas)
        if replicas == 0:
            self._end(wanted, Kind.RESIDENT)
        return "Scaled", f"{replicas} replicas, where the manifest says {declared}"

    def _pause(self, wanted: Effective, body: Mapping[str, Any]) -> tuple[str, str]:
        seconds = body.get("seconds")
        if seconds is not None and (
            not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 < seconds <= MAX_SECONDS
        ):
            raise ApiError(400, "bad_request", "seconds is a number above 0, of at most a year", exit_code=2)
        until = None if seconds is None else self._plane.store.clock() + seconds
        self._set(wanted, Kind.PAUSE, body, until=until)
        self._end(wanted, Kind.RESIDENT)
        return "Paused", "it stops" + (f" for {format_duration(seconds)}" if seconds else " until it is resumed")

    def _resume(self, wanted: Effective, body: Mapping[str, Any]) -> tuple[str, str]:
        self._end(wanted, Kind.PAUSE)
        return "Resumed", "it starts again" if Kind.PAUSE in wanted.overrides else "it was not paused"

    # ── rollouts ──────────────────────────────────────────────────────────────────────────────────────────

    def _hold(self, wanted: Effective, body: Mapping[str, Any]) -> tuple[str, str]:
        self._set(wanted, Kind.HOLD, body, revision=wanted.revision.n)
        return "RolloutPaused", "no rollout begins or goes on until it is resumed"

    def _release(self, wanted: Effective, body: Mapping[str, Any]) -> tuple[str, str]:
        self._end(wanted, Kind.HOLD)
        return "RolloutResumed", "rollouts go on" if Kind.HOLD in wanted.overrides else "they were not paused"

    def _canary(self, wanted: Effective) -> Canary:
        """The canary that is on. Raises `ApiError` where there is none."""
        if wanted.canary is None:
            key = wanted.stored.key
            text = f"{key} has no canary now"
            raise ApiError(409, "conflict", text, f"platform rollout status {key} shows what goes on", exit_code=5)
        return wanted.canary

    def _promote(self, wanted: Effective, body: Mapping[str, Any]) -> tuple[str, str]:
        self._refuse_while_held(wanted)
        tried, skips = self._canary(wanted), body.get("skipExam", False)
        if not isinstance(skips, bool):
            raise ApiError(400, "bad_request", "skipExam is true or false", exit_code=2)
        self._check_serves(wanted, tried)
        if tried.stage is None or (tried.stage.failed and not tried.stage.examined):
            self._check_exam(wanted, tried, skips=skips)
        at = self._plane.store.clock()
        by, why = text_of(body, "by") or "the admin API", text_of(body, "reason")
        kept = Stage(PROMOTED, at).kept(tried.revision.template_hash, at)
        self._plane.store.set_override(wanted.stored.uid, replace(kept, by=by, reason=why))
        text = f"revision {tried.revision.n} takes over, before its steps are done"
        if tried.stage is not None and tried.stage.failed:
            text += f", although it failed: {tried.stage.failed}"
        if tried.stage is None and tried.policy.paper is not None:
            text += ", and without having passed its exam"
        return "CanaryPromoted", text

    def _check_serves(self, wanted: Effective, tried: Canary) -> None:
        """Nothing that cannot answer takes over. Raises `ApiError`."""
        key, n = wanted.stored.key, tried.revision.n
        if not self._plane.models.serving(key.name, tried.revision.template_hash):
            text = (
                f"revision {n} does not serve yet" if tried.stage is None else f"revision {n} does not serve now"
            )
            hint = f"platform rollout status {key} shows what it waits for, or why it fails"
            raise ApiError(409, "conflict", text, hint, exit_code=5)

    def _check_exam(self, wanted: Effective, tried: Canary, *, skips: bool) -> None:
        """Of a canary that has not passed one. Raises `ApiError`."""
        if tried.policy.paper is not None and not skips:
            text = f"revision {tried.revision.n} has not passed its exam"
            hint = (
                f"platform rollout status {wanted.stored.key} shows how it goes; "
                "rollout promote --skip-exam does without"
            )
            raise ApiError(409, "conflict", text, hint, exit_code=5)

    def _abort(self, wanted: Effective, body: Mapping[str, Any]) -> tuple[str, str]:
        tried = self._canary(wanted)
        n, template = tried.revision.n, tried.revision.template_hash
        by, why = text_of(body, "by") or "the admin API", text_of(body, "reason")
        override = Override(
            Kind.QUARANTINE, by, self._plane.store.clock(), why, revision=n, template_hash=template
        )
        told = self._plane.store.status(wanted.stored.uid).get("rollout", {}).get("canary") or {}
        failure = f"aborted by {by}" + (f": {why}" if why else "")
        if told.get("revision") == n and told.get("failure"):
            failure += f"; it had failed: {told['failure']}"
        self._plane.store.set_override(wanted.stored.uid, override, failed=(n, failure))
        return (
            "CanaryAborted",
            f"revision {n} is given up until the manifest changes; {wanted.revision.n} serves on",
        )

    def _undo(self, wanted: Effective, body: Mapping[str, Any]) -> tuple[str, str]:
        self._refuse_while_held(wanted)
        if wanted.canary is not None and body.get("revision") in (None, wanted.canary.revision.n):
            key = wanted.stored.key
            text = f"revision {wanted.canary.revision.n} of {key} is a canary, and another one serves already"
            raise ApiError(409, "conflict", text, f"platform rollout abort {key} gives the canary up", exit_code=5)
        to = self._earlier(wanted, body.get("revision"))
        if to.n == wanted.newest.n:
            self._end_what_keeps_away(wanted)
            return "Unpinned", f"revision {to.n} serves, as the manifest says"
        self._set(wanted, Kind.PIN, body, revision=to.n)
        return "Pinned", f"pinned to revision {to.n} until the manifest changes, which it was not"

    def _end_what_keeps_away(self, wanted: Effective) -> None:
        """Let the newest revision be what is to serve; as a canary from its first step, unless it is one now."""
        again = (Kind.CANARY,) if wanted.canary is None else ()
        self._end(wanted, Kind.PIN, Kind.QUARANTINE, *again)

    def _earlier(self, wanted: Effective, named: object) -> Revision:
        """The revision to go back to: the one that was named, else the last that was rolled out before."""
        key, history = wanted.stored.key, self._plane.store.revisions(wanted.stored.uid)
        hint = f"platform rollout history {key} shows which there are"
        if named is not None and (not isinstance(named, int) or isinstance(named, bool)):
            raise ApiError(400, "bad_request", "revision is a whole number, or null", exit_code=2)
        if named is not None:
            found = next((each for each in history if each.n == named), None)
            if found is None:
                raise ApiError(404, "not_found", f"{key} has no revision {named!r} on record", hint, exit_code=8)
            return found
        older = [each for each in history if each.n < wanted.revision.n]
        found = last_stable(older, wanted.revision.template_hash)
        if found is None:
            text = f"no revision of {key} before {wanted.revision.n} was ever rolled out as a whole"
            raise ApiError(409, "conflict", text, f"{hint}; --to-revision N names one all the same", exit_code=5)
        return found

    def _retry(self, wanted: Effective, body: Mapping[str, Any]) -> tuple[str, str]:
        """Try what failed again: the revision that was given up, replicas that failed or wait, files."""
        tried = wanted.canary
        if tried is not None and tried.stage is not None and tried.stage.failed:
            text, key = f"revision {tried.revision.n} has failed as a canary, and is kept", wanted.stored.key
            hint = f"platform rollout abort {key}, then platform rollout retry {key} tries it from the beginning"
            raise ApiError(409, "conflict", text, hint, exit_code=5)
        kept_away = not wanted.is_newest and tried is None
        if kept_away:
            self._refuse_while_held(wanted)
        self._end_what_keeps_away(wanted)
        if kept_away:
            return "Retried", f"revision {wanted.newest.n} is rolled out once more"
        again = 0
        for row in self._plane.store.replicas(wanted.stored.key.name):
            waits = row.goal is Goal.RUN and row.restarts > 0 and row.exited == row.incarnation
            if row.failed_generation is None and not waits:
                continue
            # a failure under another intent is forgotten, and its replica made anew
            failed = None if row.failed_generation is None else 0
            new = replace(row, failed_generation=failed, restarts=0, not_before=0.0)
            self._plane.store.update_replica(row, new)
            again += 1
        self._plane.downloads.retry(wanted.stored.key)
        return "Retried", f"what failed is tried now; replicas that had: {again}"

    def _restart(self, wanted: Effective, body: Mapping[str, Any]) -> tuple[str, str]:
        self._refuse_while_held(wanted)
        if not wanted.stored.resolved["replicas"]:
            text = f"{wanted.stored.key} has no replicas to restart"
            raise ApiError(409, "conflict", text, f"platform describe {wanted.stored.key}", exit_code=5)
        self._set(wanted, Kind.RESTART, body)
        return "Restarted", "its replicas are replaced by new ones, as in a rollout"


def text_of(body: Mapping[str, Any], name: str) -> str:
    """A short text of a request's body. Raises `ApiError` for anything else."""
    value = body.get(name) or ""
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ApiError(400, "bad_request", f"{name} is a text of at most {MAX_TEXT} characters", exit_code=2)
    return value
