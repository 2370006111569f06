"""The request table: one row on the device for each request that draws there.

A row holds what outlives a step: the block tables, how tokens are drawn, and the token drawn last. The host knows
what it has sent, so that a step sends only what is new: for most requests nothing but a position.

Rows follow tickets, and a ticket is one life of a request: a preempted one comes back with another and gets a row
of its own. Nobody says when a life ends; when rows run out, the least recently used one goes. There are twice as
many as a step has requests, so that is never one of the step before, whose token may be waited for. Should such
a life go on after all, it is sent again.

Legend: S rows, X groups of layers, W blocks of the longest sequence, B items of a step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire_engine.resident.draws import columns, table_of
from quire_engine.step import PENDING, Draw, Scheduled
from quire_kernels.triton.sample import DrawTable
from quire_kernels.triton.step import LAST

_Tables = tuple[tuple[int, ...], ...]
_UNSENT: _Tables = ()
_WAITING = (PENDING,)


def _sent_token(token_ids: tuple[int, ...]) -> int:
    return LAST if token_ids[0] == PENDING else token_ids[0]


class _Row:
    """What the device knows of one life."""

    __slots__ = ("draws", "index", "sent")

    def __init__(self, index: int) -> None:
        self.index = index
        self.sent = 0
        """Blocks of each table that are there."""
        self.draws = False
        """How it draws is there."""


class RequestTable:
    """Rows for steps of up to `seats` requests of at most `width` blocks in each of `groups` block tables."""

    def __init__(self, seats: int, groups: int, width: int, device: torch.device) -> None:
        self.device = device
        self.seats = seats
        num_rows = 2 * seats
        self.tables = torch.zeros((groups, num_rows, width), dtype=torch.int32, device=device)
        self.last_token = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.draws = DrawTable(
            temperature=torch.zeros(num_rows, dtype=torch.float32, device=device),
            top_k=torch.zeros(num_rows, dtype=torch.int32, device=device),
            top_p=torch.ones(num_rows, dtype=torch.float32, device=device),
            min_p=torch.zeros(num_rows, dtype=torch.float32, device=device),
            seed=torch.zeros(num_rows, dtype=torch.int64, device=device),
        )
        self._rows: OrderedDict[int, _Row] = OrderedDict()
        """By ticket, the least recently used first."""
        self._free: list[int] = []
        self._tickets: list[int] = []
        """Of the items whose words are there."""
        self._seen: list[_Tables] = []
        self._words = np.empty((0, 0), dtype=np.int32)
        self.forget()

    @property
    def bytes(self) -> int:
        """What the tensors hold."""
        draws = self.draws
        held = (draws.temperature, draws.top_k, draws.top_p, draws.min_p, draws.seed)
        return sum(tensor.nbytes for tensor in (self.tables, self.last_token, *held))

    def rows(self, items: Sequence[Scheduled]) -> list[int]:
        """The row of each of `items`; of those that draw for the first time it is sent how they do."""
        self._tickets = []  # whoever comes next has to be looked up, so that it counts as used
        rows = self._rows
        new: list[tuple[int, Draw]] = []
        found: list[int] = []
        for item in items:
            row = rows.get(item.ticket)
            if row is None:
                row = rows[item.ticket] = _Row(self._free_row())
            else:
                rows.move_to_end(item.ticket)
            if item.draw is not None and not row.draws:
                row.draws = True
                new.append((row.index, item.draw))
            found.append(row.index)
        if new:
            self._send_draws(new)
        return found

    def addresses(self, items: Sequence[Scheduled]) -> npt.NDArray[np.int32]:
        """What `StepBuffers.items` wants of items with one new token and a draw each, [B, 3 + 2 · X].

        Block tables that have grown by more than one block are sent at once. The result is overwritten by the next
        call: from step to step mostly positions change, and all of them at once.
        """
        tickets = [item.ticket for item in items]
        if tickets != self._tickets:
            groups = self.tables.shape[0]
            self._words = np.empty((len(items), 3 + 2 * groups), dtype=np.int32)
            self._words[:, 0] = self.rows(items)
            self._tickets = tickets
            self._seen = [_UNSENT] * len(items)
        words = self._words
        words[:, 1] = [item.start for item in items]
        tokens = [item.token_ids for item in items]
        words[:, 2] = LAST if tokens.count(_WAITING) == len(tokens) else list(map(_sent_token, tokens))
        words[:, 3::2] = -1
        tables = [item.tables for item in items]
        if tables != self._seen:
            self._grow(tables)
            self._seen = tables
        return words

    def spans(self, items: Sequence[Scheduled]) -> list[tuple[int, int, int, bool]]:
        """What `MixedBuffers.items` wants of items of any kind. All blocks that the device lacks are sent."""
        late: list[tuple[int, int, int, tuple[int, ...]]] = []
        found: list[tuple[int, int, int, bool]] = []
        for item, index in zip(items, self.rows(items), strict=True):
            row, held = self._rows[item.ticket], len(item.tables[0])
            if held > row.sent:
                late += [(group, index, row.sent, table[row.sent :]) for group, table in enumerate(item.tables)]
                row.sent = held
            found.append((index, item.start, len(item.token_ids), item.draw is not None))
        if late:
            self._send_blocks(late)
        return found

    def _grow(self, tables: Sequence[_Tables]) -> None:
        """Put into the words, or send, what the tables of the last step's items have that the device has not."""
        late: list[tuple[int, int, int, tuple[int, ...]]] = []
        words = self._words
        for at, (ticket, now, before) in enumerate(zip(self._tickets, tables, self._seen, strict=True)):
            if now is before:
                continue
            row = self._rows[ticket]
            sent, held = row.sent, len(now[0])
            row.sent = held
            if held == sent + 1:
                for group, table in enumerate(now):
                    words[at, 3 + 2 * group : 5 + 2 * group] = sent, table[sent]
            elif held > sent:
                late += [(group, row.index, sent, table[sent:]) for group, table in enumerate(now)]
        if late:
            self._send_blocks(late)

    def forget(self) -> None:
        """All rows are free again."""
        self._rows.clear()
        self._tickets = []
        self._free = list(range(self.tables.shape[1] - 1, -1, -1))

    def _free_row(self) -> int:
        return self._free.pop() if self._free else self._rows.popitem(last=False)[1].index

    def _send_draws(self, new: Sequence[tuple[int, Draw]]) -> None:
        indices = torch.tensor([[index for index, _ in new]], dtype=torch.int32)
        sent = self._send(torch.cat((indices, columns([draw for _, draw in new]))))
        index, own, added = sent[0].long(), self.draws, table_of(sent[1:])
        own.temperature.index_copy_(0, index, added.temperature)
        own.top_k.index_copy_(0, index, added.top_k)
        own.top_p.index_copy_(0, index, added.top_p)
        own.min_p.index_copy_(0, index, added.min_p)
        own.seed.index_copy_(0, index, added.seed)

    def _send_blocks(self, late: Sequence[tuple[int, int, int, tuple[int, ...]]]) -> None:
        _, rows, width = self.tables.shape
        places: list[int] = []
        blocks: list[int] = []
        for group, index, first, table in late:
            at = (group * rows + index) * width + first
            places += range(at, at + len(table))
            blocks += table
        sent = self._send(torch.tensor([places, blocks], dtype=torch.int32))
        self.tables.view(-1).index_copy_(0, sent[0].long(), sent[1])

    def _send(self, host: Tensor) -> Tensor:
        """`host` on the device, without waiting for what runs there."""
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)
