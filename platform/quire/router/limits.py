"""How much a tenant may ask for: requests and tokens per time, and requests at once.

**Buckets.** A bound of N per time is a bucket that holds N, is full at first, and is filled evenly, N in that
time. What is asked for is taken out; without enough in it the request is refused, and told when there will be. So
N may come at once, and in any span of time no more than N and what flows in during it. The arithmetic is in whole
numbers (nanoseconds times amount), so nothing is lost to rounding.

**Tokens** are taken when a request is let in, as many as it could come to (its prompt, and the most it may write),
and what it did not use is given back at its end, however it ends. Who could come to more than the bucket holds
waits until it is full, and then leaves it with a debt if he must. So a limit below one request's size slows down
and locks nobody out.

**Budgets** (`budgets`) are looked at where limits are: when a request is let in, and when it is known what it may
come to, which it then holds until it ends. What it came to is counted by the ledger.

A limit of scope `key` has a bucket for each key, one of scope `policy` a bucket for all. A limit that is changed
begins with a full bucket, as does a router that starts: nothing of this is on the disk. Budgets have what the
ledger has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from quire.errors import RateLimited
from quire.router.budgets import Amount, Budgets
from quire_schemas import wire

SECOND: Final = 1_000_000_000
CONCURRENCY_RETRY: Final = 1.0
"""Seconds after which a place may be free; nobody knows when one is."""


class Bucket:
    """Holds up to `size`, and gains so much in `per` nanoseconds. Times are nanoseconds that never go back."""

    __slots__ = ("_at", "_credit", "per", "size")

    def __init__(self, size: int, per: int, now: int) -> None:
        self.size = size
        self.per = per
        self._credit = size * per  # of one unit, `per` parts
        self._at = now

    def _fill(self, now: int) -> int:
        self._credit = min(self.size * self.per, self._credit + self.size * max(now - self._at, 0))
        self._at = max(now, self._at)
        return self._credit

    def wait(self, amount: int, now: int) -> int:
        """Nanoseconds until `amount` can be taken: what is above the size counts as the size."""
        missing = min(amount, self.size) * self.per - self._fill(now)
        return max(-(-missing // self.size), 0)

    def take(self, amount: int, now: int) -> None:
        """Take it out, whether it is there or not. A negative amount is given back."""
        self._credit = min(self._fill(now) - amount * self.per, self.size * self.per)

    def left(self, now: int) -> int:
        """How much can be taken."""
        return max(self._fill(now) // self.per, 0)

    def full_in(self, now: int) -> int:
        """Nanoseconds until it is full."""
        return -(-(self.size * self.per - self._fill(now)) // self.size)


@dataclass(slots=True)
class Ticket:
    """One request that was let in, until it ends."""

    used: int = 0
    """Tokens that it came to; the owner keeps it up to date."""
    _limiter: Limiter | None = None
    _requests: Sequence[Bucket] = ()
    _tokens: Sequence[tuple[wire.AccessLimit, Bucket]] = ()
    _reserved: int = 0
    _whose: tuple[str, str] = ("", "")
    """The policy and the key."""
    _held: list[Amount] = field(default_factory=list)

    def reserve(self, most: Amount) -> None:
        """Take as much as it may come to from here on. What tokens it took before and has not used count: who is
        given to one model after another takes no more than he may use. Of budgets it holds the most at each model.
        Raises `RateLimited`, `BudgetSpent` and `StorageUnavailable`."""
        limiter = self._limiter
        if limiter is None:
            return
        more = self.used + most.tokens - self._reserved
        if more > 0:
            limiter.check(self._tokens, more)
        if not self._held:  # else it was let in, and what it holds itself is nothing to be refused for
            limiter.budgets.check(*self._whose, limiter.wall())
        if limiter.budgets.hold(*self._whose, most):
            self._held.append(most)
        for _, bucket in self._tokens:
            bucket.take(more, limiter.now())
        self._reserved += more

    def uncount(self) -> None:
        """It is no request of its own: another one stands for it."""
        for bucket in self._requests:
            bucket.take(-1, self._limiter.now() if self._limiter is not None else 0)

    def settle(self) -> None:
        """It has ended."""
        if self._limiter is None:
            return
        for _, bucket in self._tokens:
            bucket.take(self.used - self._reserved, self._limiter.now())
        self._reserved = self.used
        for amount in self._held:
            self._limiter.budgets.free(*self._whose, amount)
        self._held.clear()


@dataclass(slots=True)
class _Scope:
    """What is counted of one key, or of all keys of a policy."""

    running: int = 0
    buckets: dict[wire.AccessLimit, Bucket] = field(default_factory=dict)


class Limiter:
    """Of all tenants of one router. `clock` gives nanoseconds that never go back, `wall` what time people have."""

    def __init__(
        self, clock: Callable[[], int] = time.monotonic_ns, wall: Callable[[], float] = time.time
    ) -> None:
        self.now = clock
        self.wall = wall
        self.budgets = Budgets()
        self._scopes: dict[tuple[str, str | None], _Scope] = {}

    def act_by(self, tenants: Iterable[wire.Tenant]) -> None:
        """Forget what is counted of those that are no more, and of limits that they have no more."""
        kept: dict[tuple[str, str | None], _Scope] = {}
        for tenant in tenants:
            for (name, key), scope in self._scopes.items():
                if name == tenant.name and (scope.running or key is None or key in {k.name for k in tenant.keys}):
                    scope.buckets = {each: b for each, b in scope.buckets.items() if each in tenant.limits}
                    kept[name, key] = scope
        self._scopes = kept

    @contextmanager
    def entered(self, tenant: wire.Tenant | None, key: str) -> Iterator[Ticket]:
        """Let a request in and hold its place. Raises `RateLimited`, `BudgetSpent` and `StorageUnavailable`: then
        nothing is counted of it."""
        if tenant is None:
            yield Ticket()
            return
        if (full := self._full(tenant, key)) is not None:
            raise RateLimited(
                f"{full.concurrency} requests of this {full.scope} run already, as many as may at a time.",
                retry_after=CONCURRENCY_RETRY,
            )
        scopes = [self._scope(tenant, scope, key) for scope in ("key", "policy")]
        requests, tokens = self._buckets(tenant, key, "requests"), self._buckets(tenant, key, "tokens")
        self.check([*requests, *tokens], 1)
        self.budgets.check(tenant.name, key, self.wall())
        for _, bucket in requests:
            bucket.take(1, self.now())
        ticket = Ticket(
            _limiter=self,
            _requests=[bucket for _, bucket in requests],
            _tokens=tokens,
            _whose=(tenant.name, key),
        )
        for scope in scopes:
            scope.running += 1
        try:
            yield ticket
        finally:
            for scope in scopes:
                scope.running -= 1
            ticket.settle()

    def has_place(self, tenant: wire.Tenant, key: str) -> bool:
        """Whether one more may run at this moment."""
        return self._full(tenant, key) is None and self.budgets.has_room(tenant.name, key, self.wall())

    def _full(self, tenant: wire.Tenant, key: str) -> wire.AccessLimit | None:
        """The first bound that as many run as may."""
        for limit in tenant.limits:
            if (
                limit.concurrency is not None
                and self._scope(tenant, limit.scope, key).running >= limit.concurrency
            ):
                return limit
        return None

    def check(self, buckets: Sequence[tuple[wire.AccessLimit, Bucket]], amount: int) -> None:
        """Raises `RateLimited` when one of the buckets has less; it tells of the first one, and when all have."""
        waits = [(bucket.wait(amount, self.now()), limit) for limit, bucket in buckets]
        hit = next((limit for wait, limit in waits if wait), None)
        if hit is None:
            return
        wait = max(wait for wait, _ in waits) / SECOND
        what, bound = ("requests", hit.requests) if hit.requests is not None else ("tokens", hit.tokens)
        raise RateLimited(
            f"The limit of {bound} {what} in {_seconds(hit.per * 1_000_000)} for this {hit.scope} is reached. "
            f"Try again in {_seconds(round(wait * SECOND))}.",
            retry_after=wait,
        )

    def all_budgets(self) -> Iterator[wire.BudgetStanding]:
        """How all budgets stand."""
        return self.budgets.standing(self.wall())

    def low_budgets(self) -> list[wire.BudgetStanding]:
        """Those that are spent, or nearly."""
        return self.budgets.low(self.wall())

    def headers(self, tenant: wire.Tenant | None, key: str) -> list[tuple[bytes, bytes]]:
        """What an answer tells of the limits: of requests and of tokens the one that leaves least, and of the
        budget that is spent furthest, if it is to be warned of."""
        if tenant is None:
            return []
        now, told = self.now(), []
        for kind in ("requests", "tokens"):
            found = [bucket for _, bucket in self._buckets(tenant, key, kind)]
            if not found:
                continue
            least = min(found, key=lambda bucket: bucket.left(now))
            for word, value in (
                ("limit", str(least.size)),
                ("remaining", str(least.left(now))),
                ("reset", _seconds(least.full_in(now))),
            ):
                told.append((f"x-ratelimit-{word}-{kind}".encode(), value.encode()))
        if warning := self.budgets.warning(tenant.name, key, self.wall()):
            told.append((b"x-quire-budget", warning.encode()))
        return told

    def _scope(self, tenant: wire.Tenant, scope: str, key: str) -> _Scope:
        return self._scopes.setdefault((tenant.name, key if scope == "key" else None), _Scope())

    def _buckets(self, tenant: wire.Tenant, key: str, kind: str) -> list[tuple[wire.AccessLimit, Bucket]]:
        """The buckets of a tenant's limits of a kind, in the order of the manifest."""
        found = []
        for limit in dict.fromkeys(tenant.limits):
            size: int | None = getattr(limit, kind)
            if size is None:
                continue
            buckets = self._scope(tenant, limit.scope, key).buckets
            bucket = buckets.get(limit)
            if bucket is None:
                bucket = buckets[limit] = Bucket(size, limit.per * 1_000_000, self.now())
            found.append((limit, bucket))
        return found


def _seconds(nanoseconds: int) -> str:
    """A time as OpenAI's headers write it: `120ms`, `6.5s`, `1m30s`, `2h0m0s`."""
    milliseconds = -(-nanoseconds // 1_000_000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    seconds = f"{rest / 1000:g}s"
    if not minutes:
        return seconds
    return f"{minutes // 60}h{minutes % 60}m{seconds}" if minutes >= 60 else f"{minutes}m{seconds}"
