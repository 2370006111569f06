"""The request table: one row on the device for each request that draws there.

A row holds what outlives a step: the block tables, how tokens are drawn, and the token drawn last. The host knows
what it has sent, so that a step sends only what is new: for most requests nothing but a position.

Rows follow tickets, and a ticket is one life of a request: a preempted one comes back with another and gets a row
of its own. Nobody says when a life ends; when rows run out, the least recently used one goes. There are twice as
many as a step has requests, so that is never one of the step before, whose token may be waited for. Should such
a life go on after all, it is sent again.

Those who draw beside each other step after step (`Steady`) have their rows looked up once; what changes for them
is computed by columns.

Legend: S rows, X groups of layers, W blocks of the longest sequence, B items of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress, repeat

import numpy as np
import numpy.typing as npt
import torch

from quire_engine.resident.draws import words_of
from quire_engine.step import PENDING, Draw, Members, StepPlan
from quire_kernels.paging import integers
from quire_kernels.triton.sample import DrawTable
from quire_kernels.triton.step import LAST

_Ints = npt.NDArray[np.int32]


_Tables = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class _Late:
    """Items whose tables have grown."""

    places: npt.NDArray[np.int64]
    """In the plan."""
    sent: _Ints
    """Blocks of each table that the device has."""
    held: _Ints
    """Blocks of each table."""
    tables: Sequence[_Tables]

    def where(self, chosen: npt.NDArray[np.bool_]) -> _Late:
        tables = list(compress(self.tables, chosen.tolist()))
        return _Late(self.places[chosen], self.sent[chosen], self.held[chosen], tables)


class RequestTable:
    """Rows for steps of up to `seats` requests of at most `width` blocks in each of `groups` block tables."""

    def __init__(self, seats: int, groups: int, width: int, block_size: int, device: torch.device) -> None:
        self.device = device
        self._block_size = block_size
        self.seats = seats
        num_rows = 2 * seats
        self._store = torch.zeros((6 + groups * width) * num_rows, dtype=torch.int32, device=device)
        """Draws by column, and behind them the tables: what a step sends goes there by one operation."""
        draws, tables = self._store[: 6 * num_rows], self._store[6 * num_rows :]
        columns = draws[: 4 * num_rows].view(4, num_rows)
        self.tables = tables.view(groups, num_rows, width)
        self.last_token = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.draws = DrawTable(
            temperature=columns[0].view(torch.float32),
            top_k=columns[1],
            top_p=columns[2].view(torch.float32).fill_(1.0),
            min_p=columns[3].view(torch.float32),
            seed=draws[4 * num_rows :].view(torch.int64),
        )
        self._places: list[int] = []
        """In the store, of words that have to be sent."""
        self._values: list[int] = []
        self._rows: dict[int, int] = {}
        """By ticket."""
        self._owners = [0] * num_rows
        """The ticket of each row."""
        self._free: list[int] = []
        self._step = 0
        self._used = np.zeros(num_rows, dtype=np.int64)
        """The step that used each row last, but for those of the last step."""
        self._sent = np.zeros(num_rows, dtype=np.int32)
        """Blocks of each table that are there, but for those of the last step."""
        self._told = np.zeros(num_rows, dtype=np.bool_)
        """Whether how it draws is there."""
        self._members: Members | None = None
        self._asked: list[tuple[int, Draw | None]] = []
        """Tickets and draws of the other items, of the last step, whose rows are `_placed`."""
        self._tables: Sequence[_Tables] | None = None
        self._own_tables: list[_Tables] = []
        """Those that were looked at last."""
        self._there = np.zeros(0, dtype=np.int32)
        """Of the items of the last step, what `_sent` is of rows."""
        self._grown: npt.NDArray[np.int64] | None = None
        """Places in `_words` that have a new block."""
        self._placed = self._origins = np.zeros(0, dtype=np.int32)
        self._words = np.zeros((seats, 3 + 2 * groups), dtype=np.int32)
        self._spans = np.zeros((seats, 4), dtype=np.int32)
        self.forget()

    @property
    def bytes(self) -> int:
        """What the tensors hold."""
        return self._store.nbytes + self.last_token.nbytes

    def addresses(self, plan: StepPlan) -> _Ints:
        """What `StepBuffers.items` wants of a plan whose items have one new token and a draw each, [B, 3 + 2 · X].

        Block tables that have grown by more than one block are sent at once. The next call overwrites the result.
        """
        rows, ends = self._locate(plan)
        steady, others, words = plan.steady, plan.others, self._words[: len(rows)]
        np.subtract(ends, 1, out=words[:, 1])
        words[:, 2] = LAST
        if steady is not None and steady.tokens is not None:
            words[: len(steady), 2] = steady.tokens
        if others:
            words[-len(others) :, 2] = [_sent_token(item.token_ids) for item in others]
        if self._grown is not None:
            words[self._grown, 3::2] = -1
            self._grown = None
        late = self._late(plan, ends)
        if late is not None:
            near = (late.held == late.sent + 1).tolist()
            if not all(near):
                self._put_blocks(late.where(np.logical_not(near)))
                late = late.where(np.array(near))
            self._grown = late.places
            for group in range(self.tables.shape[0]):
                words[late.places, 3 + 2 * group] = late.sent
                words[late.places, 4 + 2 * group] = [tables[group][-1] for tables in late.tables]
        self._send()
        return words

    def spans(self, plan: StepPlan) -> _Ints:
        """What `MixedBuffers.items` wants of items of any kind, [B, 4]. All blocks that the device lacks are sent.
        The next call overwrites the result.
        """
        rows, ends = self._locate(plan)
        others, spans = plan.others, self._spans[: len(rows)]
        spans[:, 0] = rows
        np.subtract(ends, 1, out=spans[:, 1])
        spans[:, 2:] = 1
        if others:
            counts = [len(item.token_ids) for item in others]
            spans[-len(others) :, 1] -= np.array(counts, dtype=np.int32) - 1
            spans[-len(others) :, 2] = counts
            spans[-len(others) :, 3] = [item.draw is not None for item in others]
        late = self._late(plan, ends)
        if late is not None:
            self._put_blocks(late)
        self._send()
        return spans

    def forget(self) -> None:
        """All rows are free again."""
        self._rows.clear()
        self._free = list(range(self.tables.shape[1] - 1, -1, -1))
        self._members, self._asked, self._tables = None, [], None
        self._places, self._values = [], []

    def _locate(self, plan: StepPlan) -> tuple[_Ints, _Ints]:
        """The row of each item, and the position after its last token; [B] each."""
        steady, others = plan.steady, plan.others
        members, asked = None if steady is None else steady.members, [(item.ticket, item.draw) for item in others]
        self._step += 1
        if members is not self._members or asked != self._asked:
            self._look_up(members, asked)
        if steady is None:
            return self._placed, np.array([item.end for item in others], dtype=np.int32)
        ends = self._origins + steady.number
        if others:
            ends = np.concatenate((ends, np.array([item.end for item in others], dtype=np.int32)))
        return self._placed, ends

    def _look_up(self, members: Members | None, asked: list[tuple[int, Draw | None]]) -> None:
        """Find a row for each item of a plan of other items than the one before."""
        tickets = [ticket for ticket, _ in asked]
        draws = [draw for _, draw in asked]
        if members is not None:
            tickets, draws = members.tickets + tickets, [*members.draws, *draws]
            self._origins = np.array(members.origins, dtype=np.int32)
        self._used[self._placed], self._sent[self._placed] = self._step - 1, self._there
        placed = np.array(list(map(self._rows.get, tickets, repeat(-1))), dtype=np.int32)
        new = (placed < 0).nonzero()[0].tolist()
        if new:
            self._used[placed[placed >= 0]] = self._step  # before any row is given to somebody else
            for at in new:
                placed[at] = self._new_row(tickets[at])
        untold = (~self._told[placed]).nonzero()[0].tolist()
        for at in untold:
            if (draw := draws[at]) is not None:
                self._put_draw(int(placed[at]), draw)
        self._placed, self._members, self._asked, self._tables = placed, members, asked, None
        words = self._words[: len(placed)]
        words[:, 0], words[:, 3::2] = placed, -1
        self._there, self._grown = self._sent[placed], None

    def _new_row(self, ticket: int) -> int:
        """A row for it; if none is left, the one that was not used for longest, which no item of the step has."""
        if self._free:
            row = self._free.pop()
        else:
            row = int(self._used.argmin())
            del self._rows[self._owners[row]]
        self._rows[ticket], self._owners[row] = row, ticket
        self._used[row], self._sent[row], self._told[row] = self._step, 0, False
        return row

    def _late(self, plan: StepPlan, ends: _Ints) -> _Late | None:
        """Items whose tables have blocks that the device has not; it counts as having them now."""
        steady, others = plan.steady, plan.others
        tables, own = () if steady is None else steady.tables, [item.tables for item in others]
        if tables is self._tables and own == self._own_tables:
            return None
        self._tables, self._own_tables = tables, own
        held = (ends + (self._block_size - 1)) // self._block_size
        places = (held > self._there).nonzero()[0]
        if not places.size:
            return None
        sent, now, count = self._there[places], held[places], len(tables)
        self._there[places] = now
        grown = [tables[at] if at < count else own[at - count] for at in places.tolist()]
        return _Late(places, sent, now, grown)

    def _put_draw(self, row: int, draw: Draw) -> None:
        rows, seed = len(self._owners), 4 * len(self._owners) + 2 * row
        self._places += (row, rows + row, 2 * rows + row, 3 * rows + row, seed, seed + 1)
        self._values += words_of(draw)
        self._told[row] = True

    def _put_blocks(self, late: _Late) -> None:
        groups, rows, width = self.tables.shape
        lives = zip(self._placed[late.places].tolist(), late.sent.tolist(), late.tables, strict=True)
        for row, first, tables in lives:
            for group in range(groups):
                at = 6 * rows + (group * rows + row) * width
                self._places += range(at + first, at + len(tables[group]))
                self._values += tables[group][first:]

    def _send(self) -> None:
        """What has been put, without waiting for what runs on the device."""
        if not self._places:
            return
        host = integers(self._places + self._values, torch.int32)
        self._places, self._values = [], []
        if self.device.type == "cuda":
            host = host.pin_memory()
        places, values = host.to(self.device, non_blocking=True).view(2, -1)
        self._store.index_copy_(0, places.long(), values)


def _sent_token(token_ids: tuple[int, ...]) -> int:
    return LAST if token_ids[0] == PENDING else token_ids[0]
