"""What a canary is asked before it has any request, and whether it passes.

The router puts the questions and tells what came of them (`wire.Examined`); here is what is asked, and the
verdict.

- Each *smoke prompt* must be answered by what its manifest expects to be in the answer.
- *Drift*, where `maxDrift` bounds it by a share d, is looked at along the stable revision's greedy answers to the
  smoke prompts (one that expects nothing is asked for this alone), to `PROMPTS` where there are none. Of all their
  tokens taken together

      the share at which the canary would have written another one is at most d, and
      the mean of KL(stable || canary) is at most 2 d^2, or NOISE where that is more.

  The second is the first for answers that are drawn: by Pinsker's inequality two distributions whose divergence is
  2 d^2 differ by d in total variation at most, which is the share of draws that have to come out otherwise. What
  is told of the divergence is a lower bound (the router's `drift.py`).

A canary that is asked nothing passes. One that cannot be asked now waits, and no request goes to it meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from quire_schemas import wire
from quire_schemas.quantities import parse_percent

NOISE: Final = 0.001
"""Nats a token that are no drift: the same weights in another order of summation, ten times over."""
LEAST_TOKENS: Final = 32
"""Of each answer along which drift is looked at, if it is as long; a smoke prompt may ask for more."""
PROMPTS: Final = (
    "Hello! Who are you, and what can you do?",
    "What is 17 + 25? Answer with the number alone.",
    "Explain in one sentence why the sky is blue.",
    "Write a Python function that reverses a string.",
    "Translate into English: Guten Morgen, wie geht es dir heute?",
    "List three animals that live in the sea, one a line.",
    "用一句话介绍北京。",
    "Summarise this in one sentence: "
    "A harbour town keeps its old lighthouse, although ships have long found their way without it. Every "
    "evening its keeper climbs the two hundred steps, cleans the glass, and notes wind and weather in a "
    "book that nobody reads. When the town council wished to sell the tower, the fishermen said that they "
    "did not need its light, but that they would not know which way home was if they could not see it. So "
    "it was kept, and on the first Sunday of each month children may climb up with the keeper, who shows "
    "them the book and lets them write a line of it.",
)
"""Of different kinds, and one of them long: what is wrong with positions shows far from the beginning."""
QUOTED: Final = 60
"""Characters of a prompt or an answer that a reason repeats."""


@dataclass(frozen=True, slots=True)
class Paper:
    """`smokePrompts` and `maxDrift` of a resolved spec."""

    smoke: tuple[wire.Question, ...]
    max_drift: float | None
    unknown: tuple[wire.Question, ...] = ()
    """Prompts that expect nothing: drift is looked at along their answers, too."""

    @classmethod
    def of(cls, analysis: Mapping[str, Any]) -> Paper | None:
        """That of `rollout.canary.analysis`; None where nothing is to be asked."""
        given = [
            wire.Question(each["prompt"], each["maxTokens"], each["expectContains"] or "")
            for each in analysis.get("smokePrompts") or ()
        ]
        smoke, declared = tuple(each for each in given if each.expects), analysis.get("maxDrift")
        if declared is None:
            return cls(smoke, None) if smoke else None
        return cls(smoke, parse_percent(declared), tuple(each for each in given if not each.expects))

    def says(self, stable: int) -> str:
        """What it asks, for a plan; `stable` is the revision that it is compared with."""
        parts = []
        if self.smoke:
            parts.append(f"{_count(len(self.smoke), 'smoke prompt')} answered as expected")
        if self.max_drift is not None:
            given = len(self.smoke) + len(self.unknown)
            which = _count(given, "given prompt") if given else f"{len(PROMPTS)} prompts of Quire's own"
            most = f"{self.max_drift:.1%} of tokens and {most_divergence(self.max_drift):.4f} nats a token"
            parts.append(f"drift from revision {stable}'s answers to {which} of at most {most}")
        return "; ".join(parts)

    @property
    def exam(self) -> wire.Exam:
        """The questions."""
        if self.max_drift is None:
            return wire.Exam(self.smoke)
        given = [(each.prompt, each.max_tokens) for each in (*self.smoke, *self.unknown)]
        asked = given or [(each, 0) for each in PROMPTS]
        return wire.Exam(
            self.smoke, tuple(wire.Question(prompt, max(most, LEAST_TOKENS)) for prompt, most in asked)
        )


@dataclass(frozen=True, slots=True)
class Waits:
    """There is no verdict yet. `on` is what keeps it from being asked now; empty while it is being asked."""

    asked: int
    questions: int
    on: str = ""
    so_far: str = ""
    """The drift over what was compared, in words."""

    @property
    def text(self) -> str:
        told = f"asked {self.asked} of {self.questions} questions before it has any request"
        if self.so_far:
            told += f"; so far {self.so_far}"
        return f"{told}; waits: {self.on}" if self.on else told


@dataclass(frozen=True, slots=True)
class Passed:
    """It may have requests."""

    text: str


@dataclass(frozen=True, slots=True)
class Failed:
    """It may not: a reason and a sentence."""

    reason: str
    text: str


SMOKE_FAILED: Final = "SmokePromptFailed"
DRIFTED: Final = "AnswersDrifted"
Verdict = Waits | Passed | Failed


def judge(paper: Paper, told: wire.Examined | None) -> Verdict:
    """The verdict by what the router tells; what it tells of another exam says nothing."""
    exam = paper.exam
    questions = len(exam.smoke) + len(exam.drift)
    if told is None:
        return Waits(0, questions, "the router has not begun; one of an older version never does")
    if told.exam != exam:
        return Waits(0, questions)
    for question, answer in zip(exam.smoke, told.smoke, strict=False):
        if answer.problem:
            return Failed(SMOKE_FAILED, f"{_quoted(question.prompt)} was not answered: {answer.problem}")
        if not answer.as_expected:
            text = f"{_quoted(question.prompt)} was answered {_quoted(answer.text)}"
            return Failed(SMOKE_FAILED, f"{text}, without {_quoted(question.expects)}")
    for question, drifted in zip(exam.drift, told.drift, strict=False):
        if drifted.problem:
            text = f"answers to {_quoted(question.prompt)} cannot be compared: {drifted.problem}"
            return Failed(DRIFTED, text)
    asked, drift = len(told.smoke) + len(told.drift), Drift.of(told.drift)
    if asked < questions:
        so_far = drift.text(paper.max_drift) if drift.tokens and paper.max_drift is not None else ""
        return Waits(asked, questions, told.waits, so_far)
    words = [f"{_count(len(exam.smoke), 'smoke prompt')} answered as expected"] if exam.smoke else []
    if paper.max_drift is not None:
        if not drift.tokens:
            return Failed(DRIFTED, "none of the prompts fits into the context, so nothing was compared")
        if drift.beyond(paper.max_drift):
            return Failed(DRIFTED, drift.text(paper.max_drift))
        words.append(drift.text(paper.max_drift))
    return Passed("; ".join(words))


@dataclass(frozen=True, slots=True)
class Drift:
    """Of all answers together."""

    tokens: int
    share: float
    """Of tokens that the canary would have written otherwise."""
    kl: float
    """Nats a token."""

    @classmethod
    def of(cls, told: Sequence[wire.Drifted]) -> Drift:
        tokens = sum(each.tokens for each in told)
        if not tokens:
            return cls(0, 0.0, 0.0)
        agreed, kl = sum(each.agreed for each in told), sum(each.kl for each in told)
        return cls(tokens, (tokens - agreed) / tokens, kl / tokens)

    def beyond(self, limit: float) -> bool:
        # not `>`: what is no number is no drift that was bounded
        return not (self.share <= limit and self.kl <= most_divergence(limit))

    def text(self, limit: float) -> str:
        return (
            f"{self.share:.1%} of {self.tokens} tokens would be others, {limit:.1%} at most; "
            f"divergence {self.kl:.4f} nats a token, {most_divergence(limit):.4f} at most"
        )


def most_divergence(limit: float) -> float:
    """Nats a token that belong to a share of tokens."""
    return max(2 * limit**2, NOISE)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= QUOTED else text[: QUOTED - 1] + "…")
