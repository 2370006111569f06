"""Who asks, and what he may: the tenants of the routing table, and the keys that requests bring.

**Default-deny.** Without a tenant everybody may do everything, as long as only this machine can reach the router.
With the first one, and from the start where others can reach it, whoever has no key is nobody: he gets what is
`PUBLIC`, and 401 for all else, paths that lead nowhere included. What a request wants is the operation of the
route that it matched (`opt["operation"]` of its handler, which every handler has), never a guess from its URL.

**/metrics** tells of all tenants together. It is open to this machine: to a connection from loopback that is
addressed to loopback and went through no proxy. Others need a key whose policy names the operation.

**Keys** come as `Authorization: Bearer KEY`, or as `x-api-key`, where Anthropic's clients put them. They are known
by id and SHA-256 alone (`quire_schemas.keys`); an id that nobody has costs the same comparison as one that
somebody has. Nothing here logs, counts or repeats a key.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from quire.errors import TABLE, BudgetSpent, PermissionDenied, RateLimited, Unauthenticated
from quire.router.limits import Limiter
from quire_schemas import wire
from quire_schemas.keys import MAX_LENGTH, Digest
from quire_schemas.wire import METRICS

PUBLIC: Final = "public"
"""Operation of what needs no key: whether the process is alive, and whether it knows what to serve."""
ANY: Final = "any"
"""Operation of what any key may do."""
OF_LINES: Final[Mapping[str, str]] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
    "/v1/responses": "responses",
}
"""The operations of the endpoints that are also called from inside, for batches and in the background."""
RATE_LIMITED: Final = TABLE[RateLimited].code
"""The code of a refusal that a short time undoes."""
BUDGET_SPENT: Final = TABLE[BudgetSpent].code
"""That of one that lasts until a budget's time is over, or somebody raises it."""
VISIT: Final = "quire.visit"
_NOBODYS: Final = "0" * 64
_LOOPBACK: Final = frozenset({b"localhost", b"127.0.0.1", b"[::1]"})
_FORWARDED: Final = frozenset({b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip", b"via"})


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who may ask."""

    tenant: wire.Tenant | None = None
    """None where there are no tenants: then everybody may do everything."""
    key: str = ""
    """The name of the key that he has."""

    @property
    def owner(self) -> str:
        """To whom belongs what he makes."""
        return self.tenant.name if self.tenant is not None else ""

    def may_use(self, model: str) -> bool:
        """Whether he may ask a model, by the name that requests give it."""
        return self.tenant is None or not self.tenant.models or model in self.tenant.models

    def check_model(self, model: str) -> None:
        """Raises `PermissionDenied`, whether or not there is such a model."""
        if not self.may_use(model):
            shown = "".join(c if c.isprintable() else "?" for c in model[:64])
            raise PermissionDenied(f"This key may not use the model '{shown}'.", param="model")

    def check_operation(self, operation: str) -> None:
        """Raises `PermissionDenied`."""
        if self.tenant is None or operation in (PUBLIC, ANY) or operation in self.tenant.operations:
            return
        if self.tenant.operations or operation in ("", METRICS):
            raise PermissionDenied(f"This key is not for the operation '{operation}'.")

    def salted(self, salt: str) -> str:
        """A request's cache salt, such that no two tenants share what is cached. A tenant's name has no NUL."""
        return salt if self.tenant is None else f"{self.tenant.name}\0{salt}"

    def rank(self, asked: int) -> int:
        """An engine's priority, where lower goes first: that of his policy, behind which he may put himself."""
        return asked - self.tenant.priority if self.tenant is not None else asked


EVERYBODY: Final = Caller()


@dataclass(slots=True)
class Visit:
    """One request and who sent it; in the scope as `VISIT`."""

    caller: Caller | None
    """None: nobody who is known."""
    local: bool = False
    """It comes from this machine, and through no proxy."""
    limited: bool = False
    """It counts towards limits, and its answer tells of them."""
    unread: bool = False
    """It was refused before its body was read."""
    operation: str = ANY
    """What it does, where no route says so."""

    @property
    def known(self) -> Caller:
        """Raises `Unauthenticated`, and `PermissionDenied` for what he may not do."""
        if self.caller is None:
            raise Unauthenticated(NO_KEY)
        self.caller.check_operation(self.operation)
        return self.caller


NO_KEY: Final = (
    "This server needs an API key that it knows. Send it as Authorization: Bearer KEY, or as x-api-key: KEY."
)


def visit_of(scope: Mapping[str, Any]) -> Visit:
    """The visit of a request that came through `guard` or from inside. Raises `KeyError` for any other."""
    found: Visit = scope[VISIT]
    return found


async def authorize(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """The application's guard: whether a request may have the route that it matched. Raises `Unauthenticated` and
    `PermissionDenied`. A handler without an operation is for nobody.

    It is a coroutine though it awaits nothing: the framework takes what is none to a thread, for each request.
    """
    visit, operation = visit_of(connection.scope), _operation(handler)
    if operation == PUBLIC or (operation == METRICS and visit.local and visit.caller is None):
        return
    try:
        visit.known.check_operation(operation)
    except (Unauthenticated, PermissionDenied):
        visit.unread = True
        raise


def may_have(visit: Visit, handler: BaseRouteHandler) -> bool:
    """Whether somebody who is known may have a route."""
    try:
        visit.known.check_operation(_operation(handler))
    except (Unauthenticated, PermissionDenied):
        return False
    return True


def _operation(handler: BaseRouteHandler) -> str:
    return str(handler.opt.get("operation", ""))


@dataclass(slots=True)
class _Known:
    """One key that is known."""

    tenant: wire.Tenant
    key: wire.AccessKey


@dataclass(slots=True)
class Access:
    """The tenants of one router. `closed`: others than this machine can reach it, so nobody is let in without a
    key, whatever tenants there are. `clock` is the wall's.
    """

    closed: bool = False
    clock: Callable[[], float] = time.time
    limiter: Limiter = field(default_factory=Limiter)
    read_spending: Callable[[], Awaitable[None]] | None = None
    """Has the budgets know what was spent, as far as it can be read."""
    _tenants: dict[str, wire.Tenant] = field(default_factory=dict)
    _by_id: dict[str, _Known] = field(default_factory=dict)
    _by_digest: dict[str, _Known] = field(default_factory=dict)

    async def prepare(self, budgets: Iterable[wire.AccessBudget]) -> None:
        """Find out what was spent of budgets that are about to be in force, so that nobody has to wait for it."""
        self.limiter.budgets.prepare(budgets)
        if self.read_spending is not None:
            await self.read_spending()

    def act_by(self, tenants: Iterable[wire.Tenant], budgets: Iterable[wire.AccessBudget] = ()) -> None:
        """Let in these from now on, and hold them to these budgets. Of two that have one key, the first has it."""
        self._tenants = {tenant.name: tenant for tenant in tenants}
        self.limiter.budgets.act_by(budgets, self._tenants.values())
        self._by_id, self._by_digest = {}, {}
        for tenant in self._tenants.values():
            for key in tenant.keys:
                known, name = (self._by_id, key.id) if key.id else (self._by_digest, key.sha256)
                known.setdefault(name, _Known(tenant, key))
        self.limiter.act_by(self._tenants.values())

    @property
    def is_shared(self) -> bool:
        """Whether several tenants share the models."""
        return len(self._tenants) > 1

    @property
    def is_open(self) -> bool:
        """Whether nobody needs a key."""
        return not self._tenants and not self.closed

    def visit(self, scope: Mapping[str, Any]) -> Visit:
        """Who sent a request, by its headers."""
        headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        if self.is_open:
            return Visit(EVERYBODY)
        presented = _presented(headers)
        caller = self._caller(presented) if presented is not None else None
        return Visit(caller, local=presented is None and _is_local(scope, headers))

    def inside(self, owner: str, key: str, operation: str) -> Visit:
        """For work that goes on after its request: the caller it is done for, as he is now. One that is not let in
        any more is nobody; one who may not do this any more is told so when he does it."""
        tenant = self._tenants.get(owner)
        if tenant is None or self._has_expired(tenant):
            return Visit(EVERYBODY if not owner and self.is_open else None, operation=operation)
        return Visit(Caller(tenant, key), operation=operation)

    def tenant(self, name: str) -> wire.Tenant | None:
        """The tenant of that name, if there is one."""
        return self._tenants.get(name)

    def has_place(self, owner: str, key: str) -> bool:
        """Whether a request of the owner's may run beside those of his that do."""
        tenant = self._tenants.get(owner)
        return tenant is None or self.limiter.has_place(tenant, key)

    def _caller(self, presented: str) -> Caller | None:
        digest = Digest.of(presented)
        known = self._by_id.get(digest.id) if digest.id else None
        if known is None:  # a key of our form may be declared by its digest alone
            known = self._by_digest.get(digest.sha256)
        # always one comparison, which takes as long wherever the two differ
        same = hmac.compare_digest(known.key.sha256 if known is not None else _NOBODYS, digest.sha256)
        if known is None or not same or self._has_expired(known.tenant):
            return None
        return Caller(known.tenant, known.key.name)

    def _has_expired(self, tenant: wire.Tenant) -> bool:
        return tenant.expires_at is not None and self.clock() >= tenant.expires_at


def _presented(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The key that a request brings; None for none. One that is given twice is none that anybody has."""
    bearers, plain = [], []
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            bearers.append(value[7:].strip())
        elif name == b"x-api-key":
            plain.append(value.strip())
    found = bearers or plain
    if not found:
        return None
    return found[0].decode("latin-1") if len(found) == 1 and len(found[0]) <= MAX_LENGTH else ""


def _is_local(scope: Mapping[str, Any], headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a request is of this machine alone."""
    client = scope.get("client")
    if client is None or str(client[0]) not in ("127.0.0.1", "::1"):
        return False
    hosts = [value for name, value in headers if name == b"host"]
    return not any(name in _FORWARDED for name, _ in headers) and all(
        _without_port(host.lower()) in _LOOPBACK for host in hosts
    )


def _without_port(host: bytes) -> bytes:
    name, _, port = host.rpartition(b":")
    return name if name and port.isdigit() else host
