"""What tenants may spend in a day, a month or the last hours: decided here, counted by the ledger (`usage`).

**What is spent** is never a number of its own: it is the sum of what the ledger has of the hours that a budget is
for. So a budget that is declared, lowered or raised counts what was spent before, and a router that starts reads
it back. The sums are kept here by policy and key for the hours that some budget may be for, and kept up as the
ledger is told of requests; which policies are followed is `wanted`. Before the ledger was read for a policy,
nobody spends from its budgets: an amount that is not known is not taken for nothing.

**Times.** `day`, `week` and `month` are those of the calendar, in UTC, by the wall clock; a number is the last so
many hours, of which one that is partly over counts whole, so that nothing is forgotten early.

**Who gets in.** A request does while something is left of every budget after what those that run may still come
to: it *holds* the most that it can come to until it ends. So of all that were let in at most the last one goes
beyond what was left, and a budget is overdrawn by less than the most of one request. Where only what is held is
missing the refusal is a limit's (try again in a moment), not that of a budget that is spent.

Amounts are whole numbers: tokens, and ticks of money (`wire.TICKS`). Nothing here reads a clock or a disk.
"""

from __future__ import annotations

import calendar
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field
from typing import Final

from quire.errors import BudgetSpent, RateLimited, StorageUnavailable
from quire_schemas import wire

HOUR: Final = 3600
LONGEST_HOURS: Final = 32 * 24
"""No budget is for more hours than this, the one that is partly over included."""
HELD_RETRY: Final = 1.0
"""Seconds after which what is held may be free; nobody knows when it is."""
MOST_TOLD: Final = 100
"""Budgets in a status of the router."""


@dataclass(slots=True)
class Amount:
    """What requests came to. `cached_tokens` are among those of prompts; `cost` is in ticks."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost: int = 0

    def add(self, other: Amount) -> None:
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.completion_tokens += other.completion_tokens
        self.cost += other.cost

    def take(self, other: Amount) -> None:
        self.requests -= other.requests
        self.prompt_tokens -= other.prompt_tokens
        self.cached_tokens -= other.cached_tokens
        self.completion_tokens -= other.completion_tokens
        self.cost -= other.cost

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def priced(self, prices: wire.Prices | None) -> Amount:
        """The same with what it costs."""
        if prices is None:
            return self
        fresh = self.prompt_tokens - self.cached_tokens
        cost = fresh * prices.input + self.cached_tokens * prices.cached_input
        cost += self.completion_tokens * prices.output
        return Amount(self.requests, self.prompt_tokens, self.cached_tokens, self.completion_tokens, cost)


def most(prompt_tokens: int, tokens: int, prices: wire.Prices | None) -> Amount:
    """The most that a request can come to, `tokens` in all, whether or not its prompt is cached."""
    amount = Amount(1, prompt_tokens, 0, tokens - prompt_tokens)
    if prices is not None:
        dearer = max(prices.input, prices.cached_input)
        amount.cost = prompt_tokens * dearer + amount.completion_tokens * prices.output
    return amount


def value(budget: wire.AccessBudget, amount: Amount) -> int:
    """What of an amount a budget counts: tokens, or ticks."""
    if budget.tokens is None:
        return amount.cost
    prompt = amount.prompt_tokens - (amount.cached_tokens if budget.cached == "free" else 0)
    match budget.counts:
        case "prompt":
            return prompt
        case "completion":
            return amount.completion_tokens
    return prompt + amount.completion_tokens


def first_hour(per: wire.BudgetTime, now: float) -> int:
    """The first hour since 1970 that counts at this moment, in unix seconds."""
    if isinstance(per, int):
        return int(now - per * HOUR) // HOUR
    at = time.gmtime(now)
    midnight = calendar.timegm((at.tm_year, at.tm_mon, at.tm_mday, 0, 0, 0))
    days = {"day": 0, "week": at.tm_wday, "month": at.tm_mday - 1}[per]
    return midnight // HOUR - days * 24


def ends(per: wire.BudgetTime, now: float) -> float:
    """When the day, week or month is over. Raises `ValueError` for a number of hours, which has no end."""
    begun = first_hour(per, now) * HOUR
    match per:
        case "day":
            return begun + 24 * HOUR
        case "week":
            return begun + 7 * 24 * HOUR
        case "month":
            at = time.gmtime(begun)
            return begun + calendar.monthrange(at.tm_year, at.tm_mon)[1] * 24 * HOUR
    raise ValueError(f"{per} hours have no end of their own")


@dataclass(slots=True)
class _Spent:
    """What was spent by one key, or by all of a policy: by hour, and the sums that are asked for again."""

    hours: dict[int, Amount] = field(default_factory=dict)
    held: Amount = field(default_factory=Amount)
    _sums: dict[wire.BudgetTime, tuple[int, Amount]] = field(default_factory=dict)

    def add(self, hour: int, amount: Amount) -> None:
        if hour not in self.hours:
            for old in [each for each in self.hours if each < hour - LONGEST_HOURS]:
                del self.hours[old]
        self.hours.setdefault(hour, Amount()).add(amount)
        for first, total in self._sums.values():
            if hour >= first:
                total.add(amount)

    def forget(self) -> None:
        """Begin anew with nothing spent; what is held stays."""
        self.hours, self._sums = {}, {}

    def since(self, per: wire.BudgetTime, now: float) -> Amount:
        first = first_hour(per, now)
        known = self._sums.get(per)
        if known is None or known[0] != first:
            total = Amount()
            for hour, amount in self.hours.items():
                if hour >= first:
                    total.add(amount)
            known = self._sums[per] = (first, total)
        return known[1]


Scope = tuple[str, str | None]
"""A policy and one of its keys; None for all of them."""


class Budgets:
    """Those of all tenants of one router."""

    def __init__(self) -> None:
        self._budgets: dict[str, tuple[wire.AccessBudget, ...]] = {}
        self._keys: dict[str, tuple[str, ...]] = {}
        self._spent: dict[Scope, _Spent] = {}
        self._read: frozenset[str] = frozenset()
        self._coming: frozenset[str] = frozenset()

    # ── which, and what the ledger says ───────────────────────────────────────────────────────────────────

    def prepare(self, budgets: Iterable[wire.AccessBudget]) -> None:
        """Follow the policies of these, too, which are about to be in force."""
        self._coming = frozenset(budget.policy for budget in budgets)

    def act_by(self, budgets: Iterable[wire.AccessBudget], tenants: Iterable[wire.Tenant]) -> None:
        """Hold these tenants to these budgets from now on."""
        found: dict[str, list[wire.AccessBudget]] = {}
        for budget in budgets:
            found.setdefault(budget.policy, []).append(budget)
        self._budgets = {policy: tuple(each) for policy, each in found.items()}
        self._keys = {tenant.name: tuple(key.name for key in tenant.keys) for tenant in tenants}
        self._coming = frozenset()
        self._read &= self.wanted
        for scope in [each for each in self._spent if each[0] not in self._budgets]:
            if not any(astuple(self._spent[scope].held)):
                del self._spent[scope]

    @property
    def wanted(self) -> frozenset[str]:
        """Policies whose spending is followed."""
        return self._coming.union(self._budgets)

    @property
    def unread(self) -> frozenset[str]:
        """Those of them of which it is not known what was spent."""
        return self.wanted - self._read

    def begin(self, policies: Iterable[str], spent: Iterable[tuple[int, str, str, Amount]]) -> None:
        """Of these policies all that was spent is: hour, policy, key, amount."""
        known = frozenset(policies) & self.wanted
        for (policy, _), each in self._spent.items():
            if policy in known:
                each.forget()
        self._read |= known
        for hour, policy, key, amount in spent:
            self.add(hour, policy, key, amount)

    def add(self, hour: int, policy: str, key: str, amount: Amount) -> None:
        """A request of that hour has come to this; nothing, where nobody asks for it."""
        if policy in self._read:
            for scope in ((policy, None), (policy, key)):
                self._of(scope).add(hour, amount)

    # ── who gets in ───────────────────────────────────────────────────────────────────────────────────────

    def check(self, policy: str, key: str, now: float) -> None:
        """Raises `BudgetSpent` when nothing is left of a budget, `RateLimited` when what is left is held by
        requests that run, and `StorageUnavailable` while it is not known what was spent."""
        if policy not in self._budgets:
            return
        if policy not in self._read:
            raise StorageUnavailable(
                "What was spent of this policy's budgets cannot be read now.", retry_after=5.0
            )
        standing = [self._standing(budget, key, now) for budget in self._budgets[policy]]
        hit = next((each for each in standing if each.state == "spent"), None)
        if hit is not None:
            until = max((each.resets for each in standing if each.state == "spent"), default=now)
            raise BudgetSpent(
                f"The budget '{hit.name}' of this {_whose(hit)} is spent, until {_moment(until)}.",
                retry_after=max(until - now, 1.0),
            )
        if held := next((each for each in standing if each.spent + each.held >= each.size), None):
            raise RateLimited(
                f"What is left of the budget '{held.name}' of this {_whose(held)} may be needed by requests that "
                "run. Try again in a moment.",
                retry_after=HELD_RETRY,
            )

    def has_room(self, policy: str, key: str, now: float) -> bool:
        """Whether `check` would raise nothing."""
        try:
            self.check(policy, key, now)
        except (RateLimited, StorageUnavailable):
            return False
        return True

    def hold(self, policy: str, key: str, amount: Amount) -> bool:
        """A request that was let in may come to this. Whether it is noted, which ends by `free`."""
        if policy not in self._budgets:
            return False
        for scope in ((policy, None), (policy, key)):
            self._of(scope).held.add(amount)
        return True

    def free(self, policy: str, key: str, amount: Amount) -> None:
        """What was held of it is so no more."""
        for scope in ((policy, None), (policy, key)):
            self._of(scope).held.take(amount)

    # ── how they stand ────────────────────────────────────────────────────────────────────────────────────

    def standing(self, now: float) -> Iterator[wire.BudgetStanding]:
        """All budgets; those of keys once for each key that there is."""
        for policy, budgets in sorted(self._budgets.items()):
            for budget in budgets if policy in self._read else ():
                for key in self._keys.get(policy, ()) if budget.scope == "key" else ("",):
                    yield self._standing(budget, key, now)

    def low(self, now: float) -> list[wire.BudgetStanding]:
        """Those that are spent, or nearly; the spent ones first."""
        found = [each for each in self.standing(now) if each.state != "open"]
        found.sort(key=lambda each: each.state != "spent")
        return found[:MOST_TOLD]

    def warning(self, policy: str, key: str, now: float) -> str:
        """What an answer says of the budget that is spent furthest, if it is to be warned of; "" else."""
        if policy not in self._read:
            return ""
        found = [self._standing(budget, key, now) for budget in self._budgets[policy]]
        low = [each for each in found if each.state != "open"]
        if not low:
            return ""
        least = max(low, key=lambda each: (each.spent * 10_000 // each.size, each.name))
        left = max(10_000 - least.spent * 10_000 // least.size, 0)
        until = f"; until={_moment(least.resets)}" if least.resets else ""
        return f"{least.name}; left={left // 100}.{left % 100:02d}%{until}"

    def _of(self, scope: Scope) -> _Spent:
        return self._spent.setdefault(scope, _Spent())

    def _standing(self, budget: wire.AccessBudget, key: str, now: float) -> wire.BudgetStanding:
        of = self._spent.get((budget.policy, key if budget.scope == "key" else None), _NOTHING)
        spent, held = value(budget, of.since(budget.per, now)), value(budget, of.held)
        state: wire.BudgetState = "open"
        if spent >= budget.size:
            state = "spent"
        elif spent * 10_000 >= budget.size * budget.warn_at:
            state = "warned"
        return wire.BudgetStanding(
            policy=budget.policy,
            name=budget.name,
            unit="cost" if budget.tokens is None else "tokens",
            size=budget.size,
            spent=spent,
            held=held,
            key=key if budget.scope == "key" else "",
            state=state,
            resets=_resets(budget, of.hours, spent, now),
        )


_NOTHING: Final = _Spent()


def _resets(budget: wire.AccessBudget, hours: Mapping[int, Amount], spent: int, now: float) -> float:
    """When the time of the calendar is over; of the last hours when the first of what is missing is forgotten."""
    if not isinstance(budget.per, int):
        return ends(budget.per, now)
    first, missing = first_hour(budget.per, now), spent - budget.size
    if missing < 0:
        return 0.0
    for hour in sorted(each for each in hours if each >= first):
        missing -= value(budget, hours[hour])
        if missing < 0:
            return float((hour + 1 + budget.per) * HOUR)
    return now


def _whose(budget: wire.BudgetStanding) -> str:
    return "key" if budget.key else "policy"


def _moment(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
