"""Models that have a new revision beside the stable one: whose turn a request is, and how both fare.

A canary is an entry of the table of its own, under a name that nobody can ask for (`ModelRoute.canary_of`). Its
share of the model's requests is exact (`traffic.Shares`), of those that come while it has a replica that is ready
and a place for them; all others are the stable one's. What a request came to is counted for whichever had it, from
the same moment on (`Tally`), so that the two can be compared. Both are the head's to do, for all workers (`desk`).

What it is asked before it has any share is put to it by `exams`; how far that is stands here (`Sitting`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire.router.traffic import Shares
from quire_schemas import wire
from quire_schemas.workers import Fared

if TYPE_CHECKING:
    from quire.router.fleet import ServedModel


@dataclass(slots=True)
class Tally:
    """What is counted of one revision."""

    requests: int = 0
    failed: int = 0
    answers: int = 0
    void: int = 0
    first_token: Counter[int] = field(default_factory=Counter)
    between_tokens: Counter[int] = field(default_factory=Counter)

    def add(self, fared: Fared) -> None:
        """One request has ended."""
        self.requests += fared.end != "left"
        self.failed += fared.end == "failed"
        self.answers += fared.end == "whole"
        self.void += fared.end == "whole" and fared.void
        if fared.first_token is not None:
            self.first_token[wire.time_bucket(fared.first_token)] += 1
        if fared.between_tokens is not None:
            self.between_tokens[wire.time_bucket(fared.between_tokens)] += 1

    def told(self) -> wire.Measured:
        return wire.Measured(
            self.requests, self.failed, self.answers, self.void, dict(self.first_token), dict(self.between_tokens)
        )


@dataclass(slots=True, eq=False)
class Sitting:
    """One exam of a canary of `stable`: what is to be asked, and what came of it so far."""

    exam: wire.Exam
    stable: ServedModel
    new: ServedModel
    smoke: list[wire.Answered] = field(default_factory=list)
    drift: list[wire.Drifted] = field(default_factory=list)
    waits: str = ""

    @property
    def question_is_smoke(self) -> bool:
        """Whether the next question is one of those whose answers count."""
        return len(self.smoke) < len(self.exam.smoke)

    @property
    def question(self) -> wire.Question:
        """The next one."""
        return self.exam.smoke[len(self.smoke)] if self.question_is_smoke else self.exam.drift[len(self.drift)]

    @property
    def is_over(self) -> bool:
        return not self.question_is_smoke and len(self.drift) == len(self.exam.drift)

    def told(self) -> wire.Examined:
        return wire.Examined(self.exam, tuple(self.smoke), tuple(self.drift), self.waits)


@dataclass(slots=True)
class _Canary:
    """One model's."""

    stable: ServedModel
    new: ServedModel
    template_hash: str
    shares: Shares
    of_stable: Tally = field(default_factory=Tally)
    of_new: Tally = field(default_factory=Tally)
    compared_with: str = ""
    """The template of the stable revision."""
    sitting: Sitting | None = None

    def sit(self) -> None:
        """Have the exam that the table has now; the one that is on goes on."""
        exam, stable = self.new.route.exam, self.stable.route.template_hash
        is_on = self.sitting is not None and (self.sitting.exam, self.compared_with) == (exam, stable)
        if exam is None:
            self.sitting = None
        elif not is_on:
            self.sitting, self.compared_with = Sitting(exam, self.stable, self.new), stable


class Canaries:
    """Those of one table."""

    def __init__(self) -> None:
        self._of: dict[str, _Canary] = {}

    def set(self, by_model: Mapping[str, ServedModel]) -> None:
        """Act by these models. What was counted of a canary is kept as long as it is in the table."""
        found: dict[str, _Canary] = {}
        for new in by_model.values():
            route = new.route
            stable = by_model.get(route.canary_of)
            if stable is None:
                continue
            weights = (route.percent, 100 - route.percent)
            known = self._of.get(route.canary_of)
            if known is None or known.template_hash != route.template_hash:
                known = _Canary(stable, new, route.template_hash, Shares(weights))
            if known.shares.weights != weights:
                known.shares = Shares(weights)
            known.stable, known.new = stable, new
            known.sit()
            found[route.canary_of] = known
        self._of = found

    def turn(self, served: ServedModel) -> ServedModel:
        """Who has the next request for this model: itself, or its canary."""
        canary = self._of.get(served.route.model)
        if canary is None or not canary.new.has_place:
            return served
        return canary.new if canary.shares.take() == 0 else served

    def beside(self, served: ServedModel) -> ServedModel | None:
        """The canary of this model, if it has one."""
        canary = self._of.get(served.route.model)
        return canary.new if canary is not None else None

    def compares(self, served: ServedModel) -> bool:
        """Whether it is counted how requests of this model fare."""
        return served.name in self._of

    def note(self, model: str, fared: Fared) -> None:
        """Count how a request fared that this entry of the table had, if it is compared with another."""
        for canary in self._of.values():
            if canary.new.route.model == model:
                canary.of_new.add(fared)
            elif canary.stable.route.model == model:
                canary.of_stable.add(fared)

    def sittings(self) -> list[Sitting]:
        """The exams that are in the table."""
        return [canary.sitting for canary in self._of.values() if canary.sitting is not None]

    def told(self) -> dict[str, wire.Comparison]:
        """What was counted, and what was asked, by model."""
        return {
            model: wire.Comparison(
                canary.template_hash,
                canary.of_stable.told(),
                canary.of_new.told(),
                canary.sitting.told() if canary.sitting is not None else None,
            )
            for model, canary in self._of.items()
        }
