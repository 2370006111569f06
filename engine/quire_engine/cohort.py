"""Requests that do nothing but draw, planned and taken over all at once.

A step of such requests differs from the one before in a number: each is one token further. So the cohort counts
steps (it is the `Pace` of its members), and what happens to a member now and then is filed under the number of the
step in which it is due: the step for which it needs another block, the one behind which others can find a block,
the one that draws its last token. A step looks at what is due and at nobody else.

The members are the first of the running requests, in their order, so a plan that begins with them is the plan that
asking one by one would have given. Who joins has had its first token, and nothing but tokens and length ends it.
The scheduler disbands the cohort whenever order, room or budget are not as simple as that, and begins another.

What plans show of the members are columns that are copied when somebody joins or leaves, and are else the same
from plan to plan.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import attrgetter, eq

from quire_engine.errors import InvariantBroken
from quire_engine.request import NEVER, Pace, Request
from quire_engine.step import Drawn, Members, Steady
from quire_schemas.wire import Delta

_KEY = attrgetter("key")
_TABLES = attrgetter("frozen_tables")
_TICKET = attrgetter("ticket")

_Entry = tuple[Request, int]
"""A life of a request: with its ticket."""


@dataclass(slots=True)
class Roster(Members):
    """`Members` with the requests that they are."""

    requests: list[Request] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    """The known tokens of each."""

    def copy(self) -> Roster:
        return Roster(
            self.names.copy(),
            self.tickets.copy(),
            self.draws.copy(),
            self.origins.copy(),
            self.requests.copy(),
            self.texts.copy(),
        )

    def append(self, request: Request, origin: int) -> None:
        self.names.append(request.id)
        self.tickets.append(request.ticket)
        self.draws.append(request.draw)
        self.origins.append(origin)
        self.requests.append(request)
        self.texts.append(request.token_ids)

    def remove(self, request: Request) -> int:
        """Its origin."""
        at = self.requests.index(request)
        del self.names[at], self.tickets[at], self.draws[at], self.requests[at], self.texts[at]
        return self.origins.pop(at)


@dataclass(frozen=True, slots=True, eq=False)
class Share(Steady):
    """`Steady` with what its cohort has to know to take it over."""

    cohort: Cohort
    roster: Roster
    """`members`."""
    left: int
    """`Cohort.left` when it was planned."""
    ending: Sequence[_Entry]
    """Members whose last token it draws."""


class Cohort(Pace):
    """The members, and what is due. It changes counts and tokens of requests; the scheduler all else."""

    __slots__ = (
        "_block_size",
        "_ending",
        "_endings",
        "_ends",
        "_grows",
        "_is_shown",
        "_kinds",
        "_roster",
        "_seals",
        "_tables",
        "last_key",
        "left",
    )

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.last_key: tuple[int, ...] = ()
        """Running requests up to this key are members, or have their last token drawn; empty if there is none."""
        self.left = 0
        """How many have left before their end was due."""
        self._block_size = block_size
        self._roster = Roster()
        self._is_shown = False
        """A plan has the roster."""
        self._tables: list[tuple[tuple[int, ...], ...]] | None = None
        """Of the members, if nothing has changed."""
        self._ending: list[_Entry] = []
        """Whose last token is being drawn: they are counted alone."""
        # by the number of the step
        self._grows: dict[int, list[_Entry]] = {}
        self._seals: dict[int, list[_Entry]] = {}
        self._ends: dict[int, list[_Entry]] = {}
        self._kinds: dict[frozenset[int], int] = {}
        """Of the ids that end a text, how many members have each set."""
        self._endings: frozenset[int] = frozenset()
        """All of these ids."""

    def __len__(self) -> int:
        return len(self._roster.names)

    # ── who belongs to it ─────────────────────────────────────────────────────────────────────────────

    def covered(self, running: Sequence[Request]) -> int:
        """How many of the first `running` requests need not be asked."""
        return bisect_right(running, self.last_key, key=_KEY)

    def invite(self, candidates: Iterable[Request], seats: int, given_out: int) -> int:
        """Take in those who come next as long as they fit, and have no more than `seats` members. How many of
        them need not be asked from now on.

        `given_out` steps have not come back.
        """
        if self.planned - self.computed not in (0, given_out):
            return 0
        count = 0
        for request in candidates:
            drawing = request.num_drawing
            known = request.num_known + drawing
            if drawing != given_out or known - request.num_planned != 1 or not request.is_steady:
                break
            if known < request.full_at:  # else it is not planned any more
                if (
                    len(self) >= seats
                    or not request.draw.is_free
                    or request.num_output < request.draw.sampling.min_tokens
                ):
                    break
                self._join(request, request.full_at - known)
            self.last_key = request.key
            count += 1
        return count

    def _join(self, request: Request, left: int) -> None:
        """It has `left` tokens to draw."""
        entry, planned = (request, request.ticket), request.num_planned
        self._grows.setdefault(self.planned + request.capacity - planned + 1, []).append(entry)
        self._ends.setdefault(self.planned + left, []).append(entry)
        if request.seal_at != NEVER:  # blocks that steps before fill are not the cohort's affair
            missing = self._block_size - planned % self._block_size
            self._seals.setdefault(self.planned + missing, []).append(entry)
        self._own().append(request, request.keep(self))
        self._count(request.ending_ids, 1)

    def leave(self, request: Request) -> None:
        """A request ends, or loses its blocks."""
        if request.pace is self:
            self._drop(request)
            self.left += 1
        elif self._ending and any(other is request for other, _ in self._ending):
            self.left += 1

    def disband(self) -> None:
        """Everybody is counted alone again."""
        for request in self._roster.requests:
            request.keep()

    def _drop(self, request: Request) -> None:
        due = request.full_at - 1 - self._own().remove(request)
        if due in self._ends:  # it may be far away, and a request is large
            self._ends[due] = [entry for entry in self._ends[due] if entry[0] is not request]
            if not self._ends[due]:
                del self._ends[due]
        request.keep()
        self._count(request.ending_ids, -1)

    def _own(self) -> Roster:
        """The roster, to be changed."""
        if self._is_shown:
            self._roster, self._is_shown = self._roster.copy(), False
        self._tables = None
        return self._roster

    def _count(self, endings: frozenset[int], change: int) -> None:
        count = self._kinds.get(endings, 0) + change
        self._kinds[endings] = count
        if not count:
            del self._kinds[endings]
        if count == 0 or count == change:  # the last one, or the first
            self._endings = frozenset().union(*self._kinds)

    # ── a step ────────────────────────────────────────────────────────────────────────────────────────

    def growing(self) -> list[Request]:
        """Members that need another block for the next step."""
        return [request for request, ticket in self._grows.get(self.planned + 1, ()) if self._has(request, ticket)]

    def advance(self, grown: Sequence[Request], *, pending: bool) -> Share:
        """Everybody's share of the next step; those that are `growing` have got their blocks."""
        self.planned = number = self.planned + 1
        self._grows.pop(number, None)
        if grown:
            self._grows.setdefault(number + self._block_size, []).extend(
                [(request, request.ticket) for request in grown]
            )
        roster = self._roster
        if grown or self._tables is None:
            self._tables = list(map(_TABLES, roster.requests))
        tokens = None if pending else [text[-1] for text in roster.texts]
        ending = [entry for entry in self._ends.pop(number, ()) if self._has(*entry)]
        self._is_shown = True
        share = Share(roster, number, self._tables, tokens, self, roster, self.left, ending)
        for request, _ in ending:
            self._drop(request)
        self._ending += ending
        return share

    def come_back(self, share: Share) -> list[Request]:
        """A step has come back; of whom others can find another block now."""
        self.computed = number = self.computed + 1
        for request in self._ending_in(share):
            request.num_computed += 1
            request.num_drawing -= 1
        sealing = [entry for entry in self._seals.pop(number, ()) if entry[0].ticket == entry[1]]
        if sealing:
            self._seals.setdefault(number + self._block_size, []).extend(sealing)
        # of blocks that are the same the first one's is found; who joined a moment ago may have been filed first
        return sorted([request for request, _ in sealing], key=_KEY)

    def hand_out(
        self, share: Share, drawn: Mapping[str, int]
    ) -> tuple[list[Delta], list[tuple[int, Request, int]]]:
        """What a step that has come back gave to those who are still there.

        Besides the place, request and token of each for whom this may be the end: the delta there is to be made
        anew, and the token is not known yet.
        """
        roster = share.roster
        names, requests, texts = roster.names, roster.requests, roster.texts
        column = drawn.tokens if isinstance(drawn, Drawn) and drawn.names is names else None
        if share.left != self.left:
            there = list(map(eq, roster.tickets, map(_TICKET, requests)))
            names, requests = list(compress(names, there)), list(compress(requests, there))
            texts = list(compress(texts, there))
            column = None if column is None else list(compress(column, there))
        tokens = list(map(drawn.__getitem__, names)) if column is None else column
        deltas = list(map(Delta, names, zip(tokens, strict=True)))
        ends = set(map(requests.index, self._ending_in(share)))
        for entry in share.ending:
            self._ending.remove(entry)
        if not self._endings.isdisjoint(tokens):
            ends.update(at for at, token in enumerate(tokens) if token in requests[at].ending_ids)
        if ends:
            texts = texts.copy()
            for at in ends:
                texts[at] = []
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        return deltas, [(at, requests[at], tokens[at]) for at in sorted(ends)]

    def check_integrity(self, running: Sequence[Request]) -> None:
        """Raise `InvariantBroken` unless it knows of all that it has to do for the first of those that run."""
        roster = self._roster
        if [r for r in running if r.pace is self] != roster.requests or (
            self.last_key < max((r.key for r in roster.requests), default=())
        ):
            raise InvariantBroken("the cohort is not who is counted with it")
        covered = running[: self.covered(running)]
        alone = [request for request in covered if request.pace is not self]
        if any(r.num_known + r.num_drawing < r.full_at for r in alone):
            raise InvariantBroken("a request that still has tokens to draw is passed over")
        for at, request in enumerate(roster.requests):
            shown = roster.names[at], roster.tickets[at], roster.draws[at], roster.origins[at], roster.texts[at]
            if shown != (
                request.id,
                request.ticket,
                request.draw,
                request.num_planned - self.planned,
                request.token_ids,
            ):
                raise InvariantBroken(f"{request.id} is another one than the cohort shows")
            entry = (request, request.ticket)
            if entry not in self._grows.get(self.planned + 1 + request.capacity - request.num_planned, ()):
                raise InvariantBroken(f"{request.id} would not get its next block")
            if entry not in self._ends.get(
                self.planned + request.full_at - request.num_known - request.num_drawing, ()
            ):
                raise InvariantBroken(f"{request.id} would not end")

    def _ending_in(self, share: Share) -> list[Request]:
        """Who is counted alone, and has a token of this step: the last step of some was the first they had."""
        tickets = share.roster.tickets
        return [
            request for request, ticket in self._ending if request.ticket == ticket and request.ticket in tickets
        ]

    def _has(self, request: Request, ticket: int) -> bool:
        return request.pace is self and request.ticket == ticket
