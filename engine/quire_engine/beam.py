"""Beam search: which of all continuations of some sequences go on.

`BeamGroup` decides and is pure; `Searches` carries its moves out on the scheduler, where a beam is a request that
is *held*: it is told what it would draw, and waits until it is told what it does draw. Beams share the blocks of
what they have in common; the block in which they part is copied.

A group keeps `width` sequences, the beams. In each round every beam tells its `2 · width` likeliest next tokens;
of all these continuations, by cumulative log-probability, those that end the text become *finished* and the best
`width` others are the next beams. A beam that goes on in one way is extended, each further way is a fork of it,
one that goes on in none is dropped. `2 · width` are enough: even if `width` of them end the text, `width` remain.

Score: cumulative log-probability ÷ (generated tokens ^ length penalty), a token that ends the text included. The
group ends at `max_tokens`, or when no beam can come to a better score than the `width`-th finished one: a
log-probability only falls, and with a penalty of 0 or more its divisor is at most that of the longest text.

Ties go to the beam that came first, then to the smaller token id, so that a search is reproducible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from quire_engine.request import Request
from quire_engine.scheduler import Scheduler
from quire_schemas.wire import BeamResult, BeamSearch, Delta, Sampling, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Moves:
    """What becomes of the beams, to be carried out in this order."""

    forks: tuple[tuple[str, str], ...]
    """(beam, new beam that begins as its copy)."""
    extensions: tuple[tuple[str, int], ...]
    """(beam, old or new; its next token)."""
    drops: tuple[str, ...]
    results: tuple[BeamResult, ...] | None = None
    """The best sequences, when the search is over; all beams are dropped then."""


@dataclass(slots=True)
class _Beam:
    name: str
    token_ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    candidates: Sequence[tuple[int, float]] | None = None
    """(token, log-probability) of this round, once they are known."""


class BeamGroup:
    """One search. `name` is its request's and its first beam's; beams made later have names of their own."""

    def __init__(self, name: str, search: BeamSearch, sampling: Sampling, ending_ids: frozenset[int]) -> None:
        self.name = name
        self._search = search
        self._max_tokens = sampling.max_tokens
        self._min_tokens = sampling.min_tokens
        self._ending_ids = ending_ids
        self._beams = [_Beam(name)]
        self._finished: list[tuple[float, BeamResult]] = []
        self._made = 0

    @property
    def members(self) -> tuple[str, ...]:
        """The names of its beams."""
        return tuple(beam.name for beam in self._beams)

    def hear(self, name: str, told: TokenLogprobs) -> Moves | None:
        """Take a beam's likeliest next tokens; the moves, once every beam has told its own."""
        for beam in self._beams:
            if beam.name == name:
                beam.candidates = told.top
        if any(beam.candidates is None for beam in self._beams):
            return None
        return self._decide()

    def _decide(self) -> Moves:
        width, ending = self._search.width, self._ending_ids
        if len(self._beams[0].token_ids) < self._min_tokens:
            ways = self._ways(without=ending)
            ending = frozenset()
        else:
            ways = self._ways(without=frozenset())
        kept: list[tuple[float, int, int]] = []
        for negative, place, token in sorted(ways)[: 2 * width]:
            if token in ending:
                beam = self._beams[place]
                self._finish(beam.token_ids, -negative, "stop", token)
            elif len(kept) < width:
                kept.append((-negative, place, token))
        length = len(self._beams[0].token_ids) + 1
        if length >= self._max_tokens:
            for logprob, place, token in kept:
                self._finish([*self._beams[place].token_ids, token], logprob, "length", None)
            kept = []
        if not kept or self._is_settled(kept[0][0]):
            best = sorted(self._finished, key=lambda one: -one[0])[: self._search.width]
            return Moves((), (), self.members, tuple(result for _, result in best))
        return self._go_on(kept)

    def _ways(self, without: frozenset[int]) -> list[tuple[float, int, int]]:
        """Every continuation told, as (−log-probability, place of the beam, token)."""
        return [
            (-(beam.logprob + logprob), place, token)
            for place, beam in enumerate(self._beams)
            for token, logprob in beam.candidates or ()
            if token not in without
        ]

    def _go_on(self, kept: Sequence[tuple[float, int, int]]) -> Moves:
        forks, extensions, beams = [], [], []
        used: set[int] = set()
        for logprob, place, token in kept:
            parent = self._beams[place]
            name = parent.name
            if place in used:
                self._made += 1
                name = f"{self.name}#{self._made}"
                forks.append((parent.name, name))
            used.add(place)
            extensions.append((name, token))
            beams.append(_Beam(name, [*parent.token_ids, token], logprob))
        drops = tuple(beam.name for place, beam in enumerate(self._beams) if place not in used)
        self._beams = beams
        return Moves(tuple(forks), tuple(extensions), drops)

    def _finish(self, token_ids: list[int], logprob: float, reason: str, stop: int | None) -> None:
        generated = len(token_ids) + (stop is not None)
        result = BeamResult(list(token_ids), logprob, "stop" if reason == "stop" else "length", stop)
        self._finished.append((logprob / float(generated) ** self._search.length_penalty, result))

    def _is_settled(self, best: float) -> bool:
        """Whether no beam, the best of which has the log-probability `best`, can still get among the results."""
        width, penalty = self._search.width, self._search.length_penalty
        if len(self._finished) < width or penalty < 0:
            return False
        worst = sorted((score for score, _ in self._finished), reverse=True)[width - 1]
        bound: float = best / float(self._max_tokens) ** penalty
        return bound <= worst


class Searches:
    """The searches that run."""

    def __init__(self) -> None:
        self._groups: dict[str, BeamGroup] = {}
        self._group_of: dict[str, BeamGroup] = {}

    def __bool__(self) -> bool:
        return bool(self._groups)

    @staticmethod
    def asks(search: BeamSearch, sampling: Sampling) -> Sampling:
        """What a beam is to be told: its likeliest next tokens, and one more for each that might be banned."""
        told = 2 * search.width + (len(sampling.stop_token_ids) + 8 if sampling.min_tokens else 0)
        return Sampling(
            max_tokens=sampling.max_tokens,
            temperature=0.0,
            stop_token_ids=sampling.stop_token_ids,
            ignore_eos=sampling.ignore_eos,
            logprobs=told,
        )

    def begin(self, request: Request, search: BeamSearch, sampling: Sampling) -> None:
        """`request` is queued and held: it is the first beam of a search of its name."""
        group = BeamGroup(request.id, search, sampling, request.ending_ids)
        self._groups[request.id] = self._group_of[request.id] = group

    def abort(self, name: str, scheduler: Scheduler) -> bool:
        """End the search `name` without a delta. False if there is none."""
        group = self._groups.pop(name, None)
        if group is None:
            return False
        for member in group.members:
            scheduler.abort(member)
            del self._group_of[member]
        return True

    def follow(self, deltas: Sequence[Delta], scheduler: Scheduler) -> list[Delta]:
        """Carry out what beams were told; the deltas of everybody else, and of searches that began or ended."""
        passed: list[Delta] = []
        gone: set[str] = set()
        for delta in deltas:
            group = self._group_of.get(delta.id)
            if group is None:
                if delta.id not in gone:
                    passed.append(delta)
            elif delta.finish_reason is not None:
                gone.update(group.members)
                self.abort(group.name, scheduler)
                delta.id = group.name
                passed.append(delta)
            elif delta.logprobs:
                moves = group.hear(delta.id, delta.logprobs[0])
                if moves is not None:
                    ended = self._carry_out(group, moves, scheduler)
                    if ended is not None:
                        passed.append(ended)
                    elif delta.timings is not None:
                        passed.append(Delta(group.name, timings=delta.timings))
        return passed

    def _carry_out(self, group: BeamGroup, moves: Moves, scheduler: Scheduler) -> Delta | None:
        if moves.results is not None:
            timings = scheduler.timings(moves.drops[0])
            self.abort(group.name, scheduler)
            reason = moves.results[0].finish_reason
            return Delta(group.name, finish_reason=reason, timings=timings, beams=list(moves.results))
        for parent, child in moves.forks:
            scheduler.fork(parent, child)
            self._group_of[child] = group
        for name, token in moves.extensions:
            scheduler.extend(name, token)
        for name in moves.drops:
            scheduler.abort(name)
            del self._group_of[name]
        return None
