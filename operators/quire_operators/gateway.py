"""Keeps the router running where the Gateway says: one shim that holds the listening socket, one router under it,
whose workers are its own.

There is one gateway, named `default`; without a manifest it has its defaults. The router is started with the
first object and then runs until `down`, with or without a control plane. Its shim starts it again when it ends,
and keeps the listening socket meanwhile, so that connections queue instead of being refused.

A gateway that asks for another router (its workers, TLS, telemetry, metrics) gets one beside the one there is:
they share the socket, the old one takes nothing more as soon as the new one serves, and has its grace for what
runs. One that does not come to serve changes nothing. A gateway with another address replaces shim and router:
running requests finish first, within the router's own grace. Port 0 is any free one, and then the same again as
long as nobody else took it.
"""

from __future__ import annotations

import hashlib
import logging
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire_operators import certificates, status
from quire_operators.certificates import BadCertificate
from quire_operators.clock import on_the_wall
from quire_operators.fleet.local import Life, LocalFleet, Observation, RenewFailed, StartFailed, Unit
from quire_operators.host import address_problem
from quire_operators.paths import StateDir
from quire_operators.records import StoredObject
from quire_operators.rollout import Router
from quire_operators.router_ends import RouterEnds, error_of, said
from quire_operators.routes import Routes
from quire_operators.secrets import without_tokens
from quire_operators.status import Fact, Reason
from quire_operators.store import Store
from quire_operators.tracing import acted
from quire_schemas import wire
from quire_schemas.gateway import Gateway, is_loopback
from quire_schemas.quantities import parse_duration, parse_quantity
from quire_schemas.resource import API_VERSION, Key

log = logging.getLogger(__name__)

KEY = Key("gateway", "default")
UNIT = "gateway"
RETRY_SECONDS = 3.0
STOP_GRACE = 35.0
"""Above the router's own grace for running requests, so that it is the router that ends them."""
RENEW_SECONDS = 120.0
"""How long a router that is to take the place of another one may take until it serves."""
RENEW_AGAIN_SECONDS = 30.0
"""From the end of one that did not."""
NOT_RETRYABLE = 78


@dataclass(frozen=True, slots=True)
class RouterCommand:
    """How a router is started: its argv for a config file, and that file's bytes for a gateway's resolved spec."""

    argv: Callable[[Path], Sequence[str]]
    config: Callable[[Mapping[str, Any]], bytes]


def resolved_spec(stored: StoredObject | None) -> dict[str, Any]:
    """The gateway's spec with defaults, camelCase."""
    if stored is not None and stored.deletion_time is None:
        return stored.resolved
    default = Gateway.model_validate(
        {"apiVersion": API_VERSION, "kind": "Gateway", "metadata": {"name": "default"}}
    )
    return default.spec.model_dump(mode="json", by_alias=True)


def http_settings(spec: Mapping[str, Any]) -> wire.HttpSettings:
    """What of a resolved spec changes while the router runs."""
    return wire.HttpSettings(
        max_body_bytes=parse_quantity(spec["maxBodySize"]),
        allow_origins=tuple((spec.get("cors") or {}).get("allowOrigins", ())),
        ignore_unknown=spec["unknownFields"] == "ignore",
        hosts=tuple(spec.get("hosts", ())),
        **{f"{name}_seconds": parse_duration(value) for name, value in (spec.get("timeouts") or {}).items()},
        access_log=spec["accessLog"],
    )


def tls_problem(tls: Mapping[str, Any]) -> tuple[str, str] | None:
    """The field of a `tls` section whose file the router could not use, and why; None when it could."""
    for name in ("certFile", "keyFile"):
        path = Path(tls[name])
        if not path.is_absolute():
            return name, f"{path} is not an absolute path"
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                return name, f"{path} is not a file"
            path.read_bytes()
        except (OSError, ValueError) as error:
            return name, f"{path}: {getattr(error, 'strerror', None) or error}"
    try:
        certificates.read(tls["certFile"], tls["keyFile"])
    except BadCertificate as problem:
        return "certFile", str(problem)
    return None


class GatewayReconciler:
    """One pass: what runs, what should, one step, status."""

    def __init__(
        self,
        store: Store,
        fleet: LocalFleet,
        state: StateDir,
        command: RouterCommand,
        environ: Mapping[str, str],
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._state = state
        self._command = command
        self._environ = environ
        self._clock = clock
        self._ends = RouterEnds(store, KEY, clock)
        self._failure: Fact | None = None
        self._tries = False
        """One that is to take over was asked for, and nothing is known of what came of it."""
        self._refused_at = float("-inf")
        self.routes: Routes | None = None

    # ── questions ─────────────────────────────────────────────────────────────────────────────────────────

    def current(self) -> Observation | None:
        """The router's shim that lives or may live."""
        alive = [seen for seen in self._fleet.observed(UNIT) if seen.life is not Life.GONE]
        return max(alive, key=lambda seen: seen.incarnation, default=None)

    def router_runs(self) -> bool | None:
        """Whether a router process exists that takes requests; None when its shim does not answer, or there is one
        only that still finishes what it has."""
        seen = self.current()
        if seen is None:
            return False
        if seen.life is Life.UNKNOWN or (seen.leaving and not seen.running):
            return None
        return seen.running

    def address(self) -> tuple[str, int]:
        """Where it listens, or would."""
        seen = self.current()
        if seen is not None and seen.listen is not None:
            return seen.listen
        spec = resolved_spec(self._store.get(KEY))
        return spec["bind"], spec["port"]

    def base_url(self) -> str:
        host, port = self.address()
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 (a comparison, not a bind)
        scheme = "http" if self.certificate() is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    def certificate(self) -> str | None:
        """The file of the certificate that the router shows, or would; None where it speaks plain HTTP."""
        seen = self.current()
        tls = _labels(resolved_spec(self._store.get(KEY))) if seen is None else seen.labels
        found: str | None = (tls.get("tls") or {}).get("certFile")
        return found

    def endpoints(self) -> dict[str, Any]:
        """Where requests go, and the certificate to trust there, if it speaks https."""
        found = {"openai": f"{self.base_url()}/v1"}
        return found if (certificate := self.certificate()) is None else {**found, "certificate": certificate}

    def adoption_window(self) -> float:
        """Seconds that an engine started now lives without a word from a router or a control plane."""
        declared = resolved_spec(self._store.get(KEY)).get("adoptionWindow")
        if declared is None:  # stored by a version in which there was none
            declared = resolved_spec(None)["adoptionWindow"]
        return parse_duration(declared)

    def http_settings(self) -> wire.HttpSettings:
        """What the router is told while it runs."""
        return http_settings(resolved_spec(self._store.get(KEY)))

    def ready(self) -> bool:
        """Whether a router runs where the gateway says, and has answered the control plane."""
        seen, wanted = self.current(), _labels(resolved_spec(self._store.get(KEY)))
        if seen is None or seen.stopping or _moves(seen, wanted) or self.routes is None:
            return False
        return bool(self.router_runs()) and self.routes.knowledge() is Router.KNOWN

    def has_process(self, pid: int) -> bool:
        """Whether the process with that number may be a router: the last answer may be of the one before."""
        seen = self.current()
        return seen is not None and pid in (seen.child_pid, seen.following_pid, *seen.leaving)

    def overlaps(self) -> bool:
        """Whether a router beside the one that answers may have requests: one that finishes, or the one there is
        where the next one answers already."""
        seen = self.current()
        if seen is None or seen.life is Life.GONE:
            return False
        if seen.life is Life.UNKNOWN or seen.leaving:
            return True
        told = None if self.routes is None or self.routes.status is None else self.routes.status.pid
        return seen.following is not None and told != seen.child_pid

    def workers(self) -> tuple[int, int]:
        """How many processes the router is to have, and how many of them take requests."""
        wanted = int(resolved_spec(self._store.get(KEY))["workers"])
        if not self.ready() or self.routes is None or self.routes.status is None:
            return wanted, 0
        return wanted, max(len(self.routes.status.workers), 1)  # a router of before does not tell

    def failure(self) -> Fact | None:
        """What keeps the router from listening, as a Stalled condition."""
        return self._failure

    def unavailable(self) -> str | None:
        """Why no request can be sent to `base_url` now; None when it listens."""
        if self.ready():
            return None
        if self._failure is not None:
            return f"{self._failure.reason}: {self._failure.message}"
        seen = self.current()
        if seen is None and not self._store.objects():
            return "the router starts with the first model"
        if seen is not None and seen.stopping:
            return f"the router on {self.base_url()} drains: it takes no more, and has {STOP_GRACE:g} s to finish"
        return "the router starts"

    def conflict(self, spec: Mapping[str, Any]) -> str | None:
        """Why a gateway with `spec` could not listen; None when it could, or when it already does."""
        seen = self.current()
        if seen is not None and _labels(spec) == dict(seen.labels):
            return None
        if seen is not None and seen.listen is not None and seen.listen[1] == spec["port"]:
            return None  # the address is held by the router that would be replaced
        return address_problem(spec["bind"], spec["port"])

    # ── the pass ──────────────────────────────────────────────────────────────────────────────────────────

    async def reconcile(self) -> float | None:
        """Seconds until it wants to run again, or None."""
        stored = self._store.get(KEY)
        spec = resolved_spec(stored)
        if stored is not None and stored.deletion_time is not None:
            self._store.remove(KEY)
            self._store.add_event(KEY, "Normal", "Deleted", "the gateway has its defaults again")
            acted("the gateway has its defaults again")
            stored = None
        seen = self.current()
        again: float | None = None
        self._ends.look(seen, max(self._fleet.observed(UNIT), key=lambda old: old.incarnation, default=None))
        if self.routes is not None and self.routes.status is not None:
            self._ends.look_at_workers(self.routes.status)
        if seen is not None:
            again = await self._check(seen, spec)
        elif self._store.objects():
            again = await self._start(spec)
        else:
            self._failure = None
        self._tell_that_it_listens()
        if stored is not None:
            before = self._store.status(stored.uid).get("conditions", ())
            self._store.put_status(stored.uid, self.status(before, stored.generation))
        return again

    def _tell_that_it_listens(self) -> None:
        """An event once the router of a shim answers, and not when its shim has the socket."""
        seen = self.current()
        if seen is not None and self.ready() and self._store.note("listening").get("nonce") != seen.nonce:
            self._store.add_event(KEY, "Normal", "Listening", f"the router listens on {self.base_url()}")
            self._store.set_note("listening", {"nonce": seen.nonce})

    async def _check(self, seen: Observation, spec: Mapping[str, Any]) -> float | None:
        if seen.life is Life.UNKNOWN:
            return RETRY_SECONDS
        wanted = _labels(spec)
        if seen.stopping:
            self._tell_why_it_does_not_start(seen)
            return None
        if dict(seen.labels) == wanted:
            return await self._stay(seen)
        if not _moves(seen, wanted):
            return await self._renew(seen, spec)
        await self._stop(seen, f"the router moves from {self.base_url()} to {spec['bind']}:{spec['port']}")
        return RETRY_SECONDS

    async def _stop(self, seen: Observation, why: str) -> None:
        self._store.add_event(KEY, "Normal", "Replacing", why)
        acted(why)
        self._failure = None
        await self._fleet.stop(seen.folder, STOP_GRACE)

    async def _stay(self, seen: Observation) -> float | None:
        """The router is what is wanted: one that was to take its place is not."""
        if self._tries and seen.following is None:
            self._tries = False
            self._store.add_event(KEY, "Normal", "Replaced", "the router has the settings that were declared")
        self._tell_why_it_does_not_start(seen)
        if seen.following is None:
            return self._ends.loop_left() or None
        text, self._tries = "the change is taken back: no other router takes over", False
        try:
            await self._fleet.keep(seen.folder)
        except RenewFailed as error:
            log.warning("the next router cannot be given up: %s", error)
            return RETRY_SECONDS
        self._store.add_event(KEY, "Normal", "Kept", text)
        acted(text)
        return None

    async def _renew(self, seen: Observation, spec: Mapping[str, Any]) -> float | None:
        """Have another router take the place of this one at the same address."""
        wanted = _labels(spec)
        if seen.following == wanted:
            return None
        if seen.following is None and seen.refused is not None and seen.refused.labels == wanted:
            if self._tries:
                self._tries, self._refused_at = False, self._clock()
            serves = ", and the old one serves" if seen.running else ""
            why = said(seen.refused.ended)
            text = f"a router with these settings does not start: {why}; it is tried again{serves}"
            self._fail(Reason.ROUTER_FAILED, text)
            left = self._refused_at + RENEW_AGAIN_SECONDS - self._clock()
            if left > 0:
                return left
        else:
            self._failure = None
        text = "a router with other settings for TLS, traces, metrics or workers is to take over"
        try:
            await self._fleet.renew(self._unit(seen.folder, seen.incarnation, seen.nonce, spec), RENEW_SECONDS)
        except RenewFailed as error:
            if not error.unable:
                self._fail(Reason.ROUTER_FAILED, f"no other router can be started: {error}; it is tried again")
                return RETRY_SECONDS
            await self._stop(
                seen, "the router starts again with other settings for TLS, traces, metrics or workers"
            )
            return RETRY_SECONDS
        self._tries = True
        self._store.add_event(KEY, "Normal", "Replacing", text)
        acted(text)
        return None

    def _tell_why_it_does_not_start(self, seen: Observation) -> None:
        """A router that says why, or refuses for good, is a failure until one answers: the next try may end like
        the last one. Any other end is its shim's to repair; one after the other is a failure, too, for as long as
        they count, whatever the router does in between.
        """
        ended = seen.ended
        if seen.stopping or (self.ready() and not self._ends.loop_left()):
            self._failure = None
        if seen.stopping or ended is None:
            return
        if not seen.running and (error_of(ended) or ended.code == NOT_RETRYABLE):
            again = "" if ended.code == NOT_RETRYABLE else "; it is tried again"
            self._fail(Reason.ROUTER_FAILED, f"the router does not start: {said(ended)}{again}")
        elif self._ends.loop_left():
            text = f"the router ends again and again, and is started again each time: {said(ended)}"
            if self._failure is None or self._failure.message != text:
                self._fail(Reason.ROUTER_CRASH_LOOP, text)
        elif not seen.running:
            self._failure = None

    def _listen_on(self, host: str, port: int) -> tuple[str, int]:
        """The declared address; for port 0 the one that was found last, if it is free: whoever has the base URL of
        a router that was lost or brought down keeps it."""
        last = self._ends.listened_on()
        if port == 0 and last is not None and last[0] == host and address_problem(*last) is None:
            return last
        return host, port

    async def _start(self, spec: Mapping[str, Any]) -> float | None:
        host, port = spec["bind"], spec["port"]
        incarnation = self._store.next_incarnation(UNIT)
        folder = self._state.gateway / "router" / str(incarnation)
        try:
            await self._fleet.start(self._unit(folder, incarnation, Store.new_nonce(), spec))
        except StartFailed as error:
            if error.code == "address_in_use":
                self._fail(
                    Reason.ADDRESS_IN_USE,
                    f"{host}:{port} is in use by another program; apply a Gateway with another port, or port 0",
                )
            else:
                self._fail(Reason.ROUTER_FAILED, error.message)
            return RETRY_SECONDS
        self._failure = None
        where = f"{host}:{port}" if port else f"a free port of {host}, which its status shows"
        self._store.add_event(KEY, "Normal", "Starting", f"the router starts on {where}")
        acted(f"the router starts on {where}")
        return None

    def _unit(self, folder: Path, incarnation: int, nonce: str, spec: Mapping[str, Any]) -> Unit:
        """A router as the gateway wants it. Its file has a name of its own: one beside it reads another one."""
        config = self._command.config(spec)
        name = f"router-{hashlib.sha256(config).hexdigest()[:12]}.json"
        return Unit(
            folder=folder,
            name=UNIT,
            incarnation=incarnation,
            nonce=nonce,
            argv=self._command.argv(folder / name),
            env=without_tokens(self._environ, [each.resolved for each in self._store.objects()]),
            cwd=self._state.root,
            log=self._state.log("router"),
            labels=_labels(spec),
            files={name: config},
            listen=self._listen_on(spec["bind"], spec["port"]),
            restart=True,
            grace=STOP_GRACE,
        )

    def _rolled_out(self, *, ready: bool) -> Fact:
        if not ready or self.routes is None:
            return Fact("RolledOut", False, Reason.ROUTER_NOT_READY, self.unavailable() or "")
        seen = self.current()
        labels = _labels(resolved_spec(self._store.get(KEY)))
        if seen is not None and (dict(seen.labels) != labels or seen.following is not None):
            text = "another router is to take over; this one serves as before"
            return Fact("RolledOut", False, Reason.ROUTER_NOT_READY, text)
        wanted, serving = self.workers()
        if serving < wanted:
            text = f"{serving} of {wanted} workers take requests; the others start"
            return Fact("RolledOut", False, Reason.WORKERS_STARTING, text)
        if self.routes.takes("http", self.http_settings()):
            return Fact("RolledOut", True, Reason.UP_TO_DATE)
        text = "the router has not taken its newest settings"
        if self.routes.is_older("http"):
            text = "the router is of an earlier version; platform down and platform up start a new one"
        return Fact("RolledOut", False, Reason.HOT_UPDATE_PENDING, text)

    def _fail(self, reason: Reason, message: str) -> None:
        if self._failure is None or self._failure.message != message:
            log.warning("%s: %s", reason, message)
        self._failure = Fact("Stalled", True, reason, message)
        self._store.add_event(KEY, "Warning", reason.value, message)

    def status(self, before: Sequence[Mapping[str, Any]], generation: int) -> dict[str, Any]:
        """Its status at `generation`, after the conditions `before`."""
        ready = self.ready()
        failure = self._failure
        facts = [
            Fact("Accepted", True, Reason.VALID),
            self._rolled_out(ready=ready),
            Fact("Ready", True, Reason.LISTENING, f"on {self.base_url()}")
            if ready
            else Fact(
                "Ready",
                False,
                failure.reason if failure else Reason.ROUTER_NOT_READY,
                failure.message if failure else self.unavailable() or "",
            ),
            failure or Fact("Stalled", False, Reason.PROGRESS_MADE),
        ]
        if not is_loopback(self.address()[0]) and not any(
            each.deletion_time is None for each in self._store.objects("accesspolicy")
        ):
            text = f"{self.address()[0]} can be reached by others; all of them get 401"
            facts.append(Fact("Protected", False, Reason.NO_ACCESS_POLICY, text))
        shown = status.conditions(facts, before, generation, on_the_wall(self._clock(), self._clock))
        idle = self.current() is None and not self._store.objects()
        wanted, serving = self.workers()
        listening = "Listening" if serving >= wanted else f"Listening, {serving} of {wanted} workers"
        words = f"Stalled: {failure.reason}" if failure else listening if ready else "Starting"
        return {
            "observedGeneration": generation,
            "summary": "Not started" if idle else words,
            "endpoints": self.endpoints(),
            "workers": {"wanted": wanted, "serving": serving},
            "conditions": shown,
            "remedies": [] if idle else status.remedies(str(KEY), shown),
        }


def _moves(seen: Observation, wanted: Mapping[str, Any]) -> bool:
    """Whether the address that was declared is another one."""
    return any(seen.labels.get(name) != wanted[name] for name in ("host", "port"))


def _labels(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What a running router was started with; a gateway that says otherwise replaces it."""
    labels = {"host": spec["bind"], "port": spec["port"]}
    # labels only where they differ: a router of before goes on
    if spec["metrics"]["compat"] != "none":
        labels["metrics"] = spec["metrics"]
    if spec["workers"] != 1:
        labels["workers"] = spec["workers"]
    return labels | {name: spec[name] for name in ("tls", "telemetry") if spec.get(name) is not None}
