"""One sequence on its way through the engine.

`token_ids` holds prompt and output in one list that only grows: what is *known*. Two counts run after it:

    num_planned    tokens whose keys and values are in the cache once every step given out so far is carried out
    num_computed   those of steps that have come back

and `num_drawing` counts the steps given out that draw a token: the next one can be planned for before anybody
knows it. Preemption sets the counts back and loses nothing that is known. Only the scheduler changes a
request.

Requests that all advance by one token a step keep a common *pace*: each count is then the request's own part and
that of the pace, and a step changes the pace alone.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire_engine.blocks import Tables, chain, root
from quire_engine.pooling import Pool
from quire_engine.step import Draw
from quire_schemas.wire import Generate, Repetition, Sampling, Timings

if TYPE_CHECKING:
    from quire_engine.grammar import Grammar

NEVER = 1 << 62


class State(enum.Enum):
    """Where a request is. A preempted one is waiting again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Pace:
    """Steps that requests have in common: those planned, and those of them that have come back."""

    planned: int = 0
    computed: int = 0


_ALONE = Pace()
"""Of requests that are counted one by one; it stays zero."""


@dataclass(slots=True, eq=False)
class Request:
    """A live request; identity, not value, makes two of them equal."""

    id: str
    token_ids: list[int]
    num_prompt: int
    draw: Draw
    ending_ids: frozenset[int]
    full_at: int
    """Known tokens at which it has all that it may have."""
    received_at: float
    priority: int = 0
    background: bool = False
    lent: bool = False
    deadline: float | None = None
    """When it ends with `timeout` if it has not ended before, by the scheduler's clock."""
    root: bytes | None = None
    """First link of its blocks' hashes; None when nobody may share them."""
    adapter: int = 0
    """The number of its adapter; 0: it has none."""
    pool: Pool | None = None
    """Where its final states go if it draws nothing and ends with its prompt."""

    width: int = 0
    """Of the beam search that it is a beam of. It is *held* then: told what it would draw, it draws what it is
    told.
    """

    held: bool = field(init=False)
    """Whether `Scheduler.extend` gives it its tokens."""

    told: bool = False
    """A held one knows what it would draw and has not been told yet what it does."""

    key: tuple[int, int] = (0, 0)
    """Its place among all requests: smaller goes first. Set once, when it is queued."""
    ticket: int = 0
    """Drawn anew each time it is let in; what a step says to another ticket is not for this life of it."""
    state: State = State.WAITING
    pace: Pace = _ALONE
    _planned: int = 0
    _computed: int = 0
    _drawing: int = 0
    tables: Tables = field(default_factory=list)
    capacity: int = 0
    """Tokens that its tables hold."""
    frozen_tables: tuple[tuple[int, ...], ...] | None = None
    """`tables` as a plan shows them; None when they have changed since."""
    digests: list[bytes] = field(default_factory=list)
    """Of its full blocks, as far as they were asked for."""
    num_sealed: int = 0
    """Its leading blocks that others can find."""
    seal_at: int = NEVER
    """Computed tokens at which the next block can be found; `NEVER` without a root."""
    is_plain: bool = field(init=False)
    """It draws, and nothing but its draw goes with its last token: no adapter either."""
    repetition: Repetition | None = field(init=False)
    num_unscored: int = field(init=False)
    """Tokens of its prompt whose log-probabilities are wanted and have not been given out."""
    num_cached: int = 0
    """Prompt tokens that it did not have to compute when it was first let in."""
    scheduled_at: float | None = None
    first_token_at: float | None = None
    is_steady: bool = False
    """It has had its first token, and only what is drawn or how long it is can end it."""
    preempted_at: list[float] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        message: Generate,
        *,
        eos_token_ids: tuple[int, ...],
        seed: int,
        received_at: float,
        grammar: Grammar | None = None,
        adapter: int = 0,
    ) -> Request:
        """The request that `message` asks for, `adapter` the number of the one that it names. Its list of ids is
        taken over, not copied.

        One that another engine has begun is as one that was preempted: all that is known is computed anew.
        """
        sampling = message.sampling
        without_eos = sampling.ignore_eos and grammar is None
        ending = sampling.stop_token_ids if without_eos else sampling.stop_token_ids + eos_token_ids
        ending = tuple(dict.fromkeys(ending))
        num_prompt = len(message.token_ids)
        message.token_ids += message.written
        return cls(
            id=message.id,
            token_ids=message.token_ids,
            num_prompt=num_prompt,
            draw=Draw(
                sampling,
                seed,
                num_prompt,
                ending,
                matcher=None if grammar is None else grammar.matcher(ending),
            ),
            ending_ids=frozenset(ending),
            full_at=full_at(num_prompt, sampling),
            received_at=received_at,
            priority=message.priority,
            background=message.background,
            lent=message.lent,
            width=0 if message.beam is None else message.beam.width,
            deadline=None if message.timeout is None else received_at + message.timeout,
            pool=None if message.pooling is None else Pool(message.pooling, num_prompt),
            adapter=adapter,
        )

    def __post_init__(self) -> None:
        self.held = self.width > 0
        self.is_plain = self.pool is None and not self.draw.needs_history and not self.adapter
        self.repetition = self.draw.sampling.repetition
        self.num_unscored = 0 if self.draw.sampling.prompt_logprobs is None else self.num_prompt - 1

    def share_with(self, *kin: str) -> None:
        """From now on its blocks can be found by requests that begin alike and were given the same `kin`."""
        self.root = root(*kin)

    @property
    def num_known(self) -> int:
        return len(self.token_ids)

    @property
    def num_planned(self) -> int:
        return self._planned + self.pace.planned

    @num_planned.setter
    def num_planned(self, count: int) -> None:
        self._planned = count - self.pace.planned

    @property
    def num_computed(self) -> int:
        return self._computed + self.pace.computed

    @num_computed.setter
    def num_computed(self, count: int) -> None:
        self._computed = count - self.pace.computed

    @property
    def num_drawing(self) -> int:
        return self._drawing + self.pace.planned - self.pace.computed

    @num_drawing.setter
    def num_drawing(self, count: int) -> None:
        self._drawing = count - self.pace.planned + self.pace.computed

    def keep(self, pace: Pace = _ALONE) -> int:
        """From now on it is counted by `pace`; its counts stay what they are. What it has planned besides."""
        planned, computed, drawing = self.num_planned, self.num_computed, self.num_drawing
        self.pace = pace
        self.num_planned, self.num_computed, self.num_drawing = planned, computed, drawing
        return self._planned

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def max_cached(self) -> int:
        """Tokens that can ever lie in the cache: the last one drawn is never computed."""
        return self.full_at - 1

    def chain_of(self, count: int, block_size: int) -> list[bytes]:
        """The digests of at least its first `count` blocks, which are full of known tokens; none without a
        root.
        """
        digests = self.digests
        if len(digests) < count and self.root is not None:
            before = digests[-1] if digests else self.root
            for at in range(len(digests) * block_size, count * block_size, block_size):
                before = chain(before, self.token_ids[at : at + block_size])
                digests.append(before)
        return digests

    def timings(self, finished_at: float | None = None) -> Timings:
        """Where its time went until now; `finished_at` when this was its last step."""
        return Timings(
            received_at=self.received_at,
            scheduled_at=self.scheduled_at,
            first_token_at=self.first_token_at,
            finished_at=finished_at,
            preempted_at=tuple(self.preempted_at),
            cached_tokens=self.num_cached,
        )


def full_at(num_prompt: int, sampling: Sampling) -> int:
    """Known tokens at which a request has all that it may have; one that draws nothing has its whole prompt
    computed, as if one were to follow."""
    return num_prompt + max(sampling.max_tokens, 1)
