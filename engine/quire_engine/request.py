"""One sequence on its way through the engine.

`token_ids` holds prompt and output in one list that only grows: what is *known*. `num_computed` says how many of
them have keys and values in the cache, and the scheduler's whole work is to let it catch up. Preemption sets it
back to zero and loses nothing that is known. Only the scheduler changes a request.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from quire_engine.step import Draw
from quire_schemas.wire import Generate, Timings


class State(enum.Enum):
    """Where a request is. A preempted one is waiting again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """A live request; identity, not value, makes two of them equal."""

    id: str
    token_ids: list[int]
    num_prompt: int
    draw: Draw
    ending_ids: frozenset[int]
    received_at: float
    state: State = State.WAITING
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    scheduled_at: float | None = None
    first_token_at: float | None = None
    preempted_at: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, message: Generate, *, eos_token_ids: tuple[int, ...], seed: int, received_at: float) -> Request:
        """The request that `message` asks for. Its list of ids is taken over, not copied."""
        sampling = message.sampling
        ending = sampling.stop_token_ids if sampling.ignore_eos else sampling.stop_token_ids + eos_token_ids
        ending = tuple(dict.fromkeys(ending))
        return cls(
            id=message.id,
            token_ids=message.token_ids,
            num_prompt=len(message.token_ids),
            draw=Draw(sampling, seed, len(message.token_ids), ending),
            ending_ids=frozenset(ending),
            received_at=received_at,
        )

    @property
    def num_known(self) -> int:
        return len(self.token_ids)

    @property
    def num_pending(self) -> int:
        """Known tokens that the cache does not hold yet; at least one while the request lives."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def max_cached(self) -> int:
        """Tokens that can ever lie in the cache: the last one drawn is never computed."""
        return self.num_prompt + self.draw.sampling.max_tokens - 1

    def timings(self, finished_at: float | None = None) -> Timings:
        """Where its time went until now; `finished_at` when this was its last step."""
        return Timings(
            received_at=self.received_at,
            scheduled_at=self.scheduled_at,
            first_token_at=self.first_token_at,
            finished_at=finished_at,
            preempted_at=tuple(self.preempted_at),
        )
