"""How much a model is asked to think, in the words that its template or its vocabulary has for it.

A template that looks at `reasoning_effort` is told the effort as it is. Any other model that marks its thoughts is
given a bound on their tokens (`BUDGETS`), and its template is told whether to think at all where it has a name for
that. What a request sets itself in `chat_template_kwargs` or `thinking_token_budget` goes before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from quire.text.errors import NoChatTemplate, ParamRefused
from quire.text.tokenizer import Tokenizer

BUDGETS: Final[Mapping[str, int | None]] = {
    "none": 0,
    "minimal": 512,
    "low": 1024,
    "medium": 4096,
    "high": None,
    "xhigh": None,
}
"""Tokens that thoughts may have, by effort; None is no bound."""
SWITCHES: Final = ("enable_thinking", "thinking")
"""Names by which templates are told whether the model is to think."""


def effort(tokenizer: Tokenizer, wanted: str) -> tuple[dict[str, Any], int | None]:
    """Variables of the template, and the bound on the tokens of thoughts, that stand for an effort.

    Raises `ParamRefused` for a model that has no words for it, and `NoChatTemplate`.
    """
    if tokenizer.template is None:
        raise NoChatTemplate("this model has no chat template")
    looked_at = tokenizer.template.variables
    variables: dict[str, Any] = {name: wanted != "none" for name in SWITCHES if name in looked_at}
    if "reasoning_effort" in looked_at:
        return {**variables, "reasoning_effort": wanted}, None
    budget = BUDGETS[wanted]
    if wanted == "none" and (variables or tokenizer.thinking is None):
        return variables, None  # it is told not to think, or never does
    if tokenizer.thinking is None:
        raise ParamRefused(
            "'reasoning_effort' is not honoured for this model: its template knows no effort, and no tokens of it "
            "open and close a thought.",
            param="reasoning_effort",
        )
    return variables, budget
