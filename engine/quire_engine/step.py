"""The step: all that scheduler and runner share.

The scheduler decides and writes a `StepPlan`; the runner carries it out and answers with a `StepResult`. Neither
sees the other's state, so a plan can be printed, stored and replayed, and the scheduler can be tested with
results that no model computed. No torch in here.

There is no prefill phase and no decode phase. An item computes `token_ids` at positions `start`,
`start + 1`, …; when that makes all known tokens computed, the item also carries a `Draw` and the step chooses the
next token.

A plan may be made while the step before it still runs: that step's token is then `PENDING`, and whoever carries
the plan out puts it in with `resolve`.

Most of a large plan is requests that compute and draw one token each, the same as in the plan before. They are one
value, `Steady`: columns, most of which the next plan has again. Who wants items gets them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING

import msgspec

from quire_schemas.wire import Sampling, TokenLogprobs

if TYPE_CHECKING:
    from quire_engine.grammar import Matcher

PENDING = -1
"""In a plan: the token that the step before it draws. No vocabulary has such an id."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How one request's next token is chosen. Built once per request; the step adds position and history.

    `seed` is the request's own or the one drawn for it. `ending_ids` are the ids that end the text (stop ids, and
    the checkpoint's end-of-sequence ids unless ignored); the sampler bans them below `sampling.min_tokens`.
    With a `matcher` the end-of-sequence ids are always among them, and it says where they may come. It has a state
    of its own, which goes with the request, and all of which follows from the request and the tokens so far.
    """

    sampling: Sampling
    seed: int
    num_prompt: int
    ending_ids: tuple[int, ...]
    matcher: Matcher | None = field(default=None, repr=False, compare=False)
    is_plain: bool = field(init=False)
    """Greedy with nothing that changes or reports logits: the arg-max alone decides."""
    is_free: bool = field(init=False)
    """Once `min_tokens` are there, logits, temperature, filters, seed and position decide, and nothing else is
    reported."""
    has_penalty: bool = field(init=False)
    reach: int = field(init=False)
    """The choice depends on so many of the tokens before it: items carry them."""
    needs_history: bool = field(init=False)

    def __post_init__(self) -> None:
        sampling = self.sampling
        has_penalty = (
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
        )
        reach = max(map(len, sampling.bad_words), default=1) - 1
        if has_penalty or sampling.thinking is not None:
            reach = sys.maxsize
        object.__setattr__(self, "has_penalty", has_penalty)
        if self.matcher is not None:
            reach = sys.maxsize
        object.__setattr__(self, "reach", reach)
        object.__setattr__(self, "needs_history", reach > 0)
        is_free = (
            self.matcher is None
            and not has_penalty
            and not sampling.logit_bias
            and not sampling.allowed_token_ids
            and not sampling.bad_words
            and sampling.thinking is None
            and sampling.logprobs is None
        )
        object.__setattr__(self, "is_free", is_free)
        object.__setattr__(self, "is_plain", is_free and sampling.temperature == 0.0 and sampling.min_tokens == 0)

    def history(self, token_ids: Sequence[int], *, pending: bool = False) -> tuple[int, ...]:
        """What an item carries of the known `token_ids`, behind which one more may be `PENDING`."""
        most = self.reach - pending
        tail = token_ids if most >= len(token_ids) else token_ids[len(token_ids) - most :]
        return (*tail, PENDING) if pending else tuple(tail)


class Scheduled(msgspec.Struct, frozen=True, gc=False):
    """One request's share of a step.

    `token_ids` lie at positions `start`, `start + 1`, … and attend to all before them; `PENDING` stands for the
    one that the step before draws for this request. `tables` is its block table in each group of layers, long
    enough for the last of these positions. `draw` is None while known tokens remain uncomputed after this step.
    `history` is the end of prompt and output so far, as long as the draw needs it. `targets` are tokens of the
    prompt whose log-probabilities are wanted as `scoring` says: those that follow the item's first token, its
    second, and so on. `ticket` tells lives of a request apart.

    A msgspec.Struct, although it stays in the process: a step makes hundreds of them, and these are made in C.
    """

    request_id: str
    ticket: int
    token_ids: tuple[int, ...]
    start: int
    end: int
    """Position after the last computed one: where a drawn token will lie."""
    tables: tuple[tuple[int, ...], ...]
    draw: Draw | None = None
    history: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()
    scoring: Sampling | None = None
    pooled: int = 0
    """Of so many of the last of these tokens the final states are wanted, summed."""
    adapter: int = 0
    """Which one is added to the model's products; 0: none."""

    @property
    def num_rows(self) -> int:
        """Of how many of its last tokens the logits are wanted."""
        return len(self.token_ids) if self.targets else self.pooled or int(self.draw is not None)


@dataclass(slots=True)
class Members:
    """Requests that one plan after the other has, by columns; once a plan has it, it never changes."""

    names: list[str] = field(default_factory=list)
    tickets: list[int] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)
    """Each is free, and has its `min_tokens`."""
    origins: list[int] = field(default_factory=list)
    """What the number of a step adds to: the position after the one that it computes."""


@dataclass(frozen=True, slots=True, eq=False)
class Steady:
    """Shares of a step of requests that compute and draw one token each."""

    members: Members
    number: int
    tables: Sequence[tuple[tuple[int, ...], ...]]
    """Of each member, as in `Scheduled`."""
    tokens: Sequence[int] | None
    """Of each member; None: all are `PENDING`."""

    def __len__(self) -> int:
        return len(self.members.names)

    def items(self) -> list[Scheduled]:
        """The same as items."""
        members, number = self.members, self.number
        ends = [origin + number for origin in members.origins]
        tokens = repeat((PENDING,)) if self.tokens is None else zip(self.tokens, strict=True)
        starts = [end - 1 for end in ends]
        return list(
            map(Scheduled, members.names, members.tickets, tokens, starts, ends, self.tables, members.draws)
        )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class StepPlan:
    """What one step computes, in the order of the batch, and who lost its blocks to make room."""

    step: int
    others: tuple[Scheduled, ...]
    """Items behind those of `steady`."""
    preempted: tuple[str, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()
    """Blocks, (from, to), to be copied before anything is computed."""
    steady: Steady | None = None
    _items: list[tuple[Scheduled, ...]] = field(default_factory=list)
    """All of them, once somebody asked."""

    @property
    def items(self) -> tuple[Scheduled, ...]:
        """Everybody's share."""
        if self.steady is None:
            return self.others
        if not self._items:
            self._items.append((*self.steady.items(), *self.others))
        return self._items[0]

    @property
    def num_items(self) -> int:
        return len(self.others) if self.steady is None else len(self.steady) + len(self.others)

    @property
    def num_tokens(self) -> int:
        steady = 0 if self.steady is None else len(self.steady)
        return steady + sum([len(item.token_ids) for item in self.others])

    def __eq__(self, other: object) -> bool:
        """Whether it asks for the same, however it is kept."""
        if not isinstance(other, StepPlan):
            return NotImplemented
        return (self.step, self.items, self.preempted, self.copies) == (
            other.step, other.items, other.preempted, other.copies,
        )  # fmt: skip

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        asked = f"step={self.step}, items={self.items}, preempted={self.preempted}, copies={self.copies}"
        return f"StepPlan({asked})"

    def __str__(self) -> str:
        parts = [f"{item.request_id}[{item.start}:{item.end}]{'*' if item.draw else ''}" for item in self.items]
        lost = f"; preempted {', '.join(self.preempted)}" if self.preempted else ""
        return f"step {self.step}: {self.num_tokens} tokens: {' '.join(parts)}{lost}"


class Drawn(Mapping[str, int]):
    """Tokens by request id, of which those of `names` stay a column until somebody asks for one of them."""

    __slots__ = ("_found", "_others", "names", "tokens")

    def __init__(self, names: Sequence[str], tokens: Sequence[int], others: dict[str, int]) -> None:
        self.names = names
        self.tokens = tokens
        self._others = others
        self._found: dict[str, int] | None = None

    def __getitem__(self, name: str) -> int:
        token = self._others.get(name)
        return self._all()[name] if token is None else token

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self.names) + len(self._others)

    def __repr__(self) -> str:
        return repr(self._all())

    def _all(self) -> dict[str, int]:
        if self._found is None:
            self._found = dict(zip(self.names, self.tokens, strict=True)) | self._others
        return self._found


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a plan, by request id: items with a draw have a token, and log-probabilities if asked for;
    those with `pooled` tokens have the sum of their final states as float32, those with targets the
    log-probabilities of these.

    `failures` gives (code, message) of requests that cannot go on; their tokens, if any, do not count.
    """

    tokens: Mapping[str, int]
    logprobs: Mapping[str, TokenLogprobs] = field(default_factory=dict)
    failures: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    states: Mapping[str, bytes] = field(default_factory=dict)
    prompt_logprobs: Mapping[str, list[TokenLogprobs]] = field(default_factory=dict)


def resolve(plan: StepPlan, drawn: Mapping[str, int]) -> StepPlan:
    """`plan` with its pending tokens as `drawn` by the step before; items without one, whose request ended, left
    out.
    """
    items: list[Scheduled] = []
    for item in plan.items:
        if item.token_ids[-1] != PENDING:
            items.append(item)
        elif (token := drawn.get(item.request_id)) is not None:
            history = (*item.history[:-1], token) if item.history else ()
            items.append(
                Scheduled(
                    item.request_id,
                    item.ticket,
                    (*item.token_ids[:-1], token),
                    item.start,
                    item.end,
                    item.tables,
                    item.draw,
                    history,
                    adapter=item.adapter,
                )
            )
    return StepPlan(plan.step, tuple(items), plan.preempted, plan.copies)
