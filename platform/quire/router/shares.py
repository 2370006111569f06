"""Fair shares of a model between tenants: who may enter its queue, whose turn it is at its engines, and whose seat
there is lent.

All rules are about tenants (`AccessPolicy`) and hold as soon as there are two; one alone may have all there is.

**To enter.** A tenant may hold `EAGER` times as many places as are left. So one that floods fills four fifths of
them and no more, two that do four ninths each, and who comes next finds some: he is not refused for what others
do. Nobody's part is set aside for him, so none is idle.

**At the engines.** An engine takes its queue in the order of arrival: a request that comes behind a hundred of
somebody else's waits for a hundred. So a tenant has no more sequences at the engines than they compute at once,
less those of others, and at least his part of it; the rest of his waits here, in its order, until one of his has
ended. A few more than that are let through (`AHEAD`), so that no engine waits for the router.

**Seats.** As many of a tenant's sequences as are his part of the seats are his; the seats of those beyond it
are *lent*, because nobody else wants them. When somebody does, the engine takes one back
(`wire.Generate.lent`): that sequence waits with all that it has, is computed again as far as the cache has lost
it, and goes on as if nothing had been. So who has his part free waits for one step and not for the end of
somebody else's answer, and no seat is kept empty for him. His part is that of two at least: another may come at
any time.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from typing import Final

EAGER: Final = 4
AHEAD: Final = 8
"""One more is let through for each so many that are computed at once, and one in any case."""


def may_enter(asked: int, own: int, held: int, places: int) -> bool:
    """Whether a tenant with `own` places may have `asked` more, where `held` of all `places` are taken. Who has
    none may have any that is left."""
    left = places - held - asked
    return left >= 0 and (not own or own + asked <= EAGER * left)


def most_at_engines(slots: int, others: int, tenants: int) -> int:
    """Sequences that a tenant may have at engines that compute `slots` at once: `others` are there of others, and
    so many `tenants` have any there or wait, he among them."""
    return max(slots - others, -(-slots // max(tenants, 1))) + 1 + slots // AHEAD


def part(slots: int, tenants: int) -> int:
    """Seats that are a tenant's own of those of engines that compute `slots` at once, where so many share them."""
    return max(slots // max(tenants, 2), 1)


class Turns:
    """Whose turn it is at the engines of one model."""

    def __init__(self) -> None:
        self._there: Counter[str] = Counter()
        self._own: Counter[str] = Counter()
        """Of those there, how many have a seat that is not lent."""
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._since: dict[asyncio.Future[None], float] = {}

    @property
    def waits_since(self) -> float | None:
        """When who waits longest came, by the monotonic clock; None if nobody waits."""
        return min(self._since.values(), default=None)

    def take(self, owner: str, slots: int) -> bool:
        """Whether a sequence may go at once, which it then does; `end` says when it is no more."""
        if self._waiting.get(owner) or not self._may_go(owner, slots):
            return False
        self._there[owner] += 1
        return True

    def queue(self, owner: str) -> asyncio.Future[None]:
        """What is done once it is the turn of a sequence that has come now, which then goes."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        self._since[turn] = time.monotonic()
        return turn

    def leave(self, owner: str, turn: asyncio.Future[None], slots: int) -> None:
        """The sequence that waits for `turn` does not go."""
        if turn.done():
            self.end(owner, slots)
            return
        self._waiting[owner].remove(turn)
        del self._since[turn]
        if not self._waiting[owner]:
            del self._waiting[owner]

    def lend(self, owner: str, slots: int) -> bool:
        """Whether the seat of a sequence that goes is lent; else it is its tenant's own, until `end`."""
        if self._own[owner] >= part(slots, len({owner, *self._there, *self._waiting})):
            return True
        self._own[owner] += 1
        return False

    def end(self, owner: str, slots: int, *, own: bool = False) -> None:
        """A sequence that went has ended, in a seat of its tenant's `own` or not: others may go."""
        self._there[owner] -= 1
        self._own[owner] -= own
        for counter in (self._there, self._own):
            if not counter[owner]:
                del counter[owner]
        self.look(slots)

    def look(self, slots: int) -> None:
        """Let those go whose turn it is; by tenants one after the other, who has fewest there first."""
        while True:
            able = [owner for owner in self._waiting if self._may_go(owner, slots)]
            if not able:
                return
            owner = min(able, key=lambda each: self._there[each])
            turn = self._waiting[owner].popleft()
            del self._since[turn]
            turn.set_result(None)
            if not self._waiting[owner]:
                del self._waiting[owner]
            self._there[owner] += 1

    def _may_go(self, owner: str, slots: int) -> bool:
        own = self._there[owner]
        tenants = {owner, *self._there, *self._waiting}
        return not own or own < most_at_engines(slots, self._there.total() - own, len(tenants))
