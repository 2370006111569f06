"""From a chat request to the text that the model is shown, and what is to be made of its answer.

Whatever a conversation asks for beyond sampling is settled here: tools and how they are called, how much is
thought, what the answer is held to. What the model's template or vocabulary cannot do is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from quire.errors import InvalidRequest
from quire.router.fleet import ServedModel
from quire.text import Markup, Tokenizer
from quire.text.dialects import REASONING, Dialects, Tool
from quire.text.effort import SWITCHES, effort
from quire.text.templates import RESERVED
from quire_schemas.openai.chat import ChatRequest
from quire_schemas.openai.structured import Constraint
from quire_schemas.openai.tools import NO_PARAMETERS


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the model sees it."""

    text: str
    markup: Markup | None
    constraint: Constraint | None
    thinking_budget: int | None
    """Tokens that thoughts may have."""
    shows_reasoning: bool


def render(request: ChatRequest, served: ServedModel) -> Rendered:
    """The request's conversation. Raises `InvalidRequest` and `TextError`."""
    text, budget = prompt_text(request, served.usable)
    markup = _begun(_markup(request, served), text, request)
    return Rendered(text, markup, _constraint(request, markup), budget, request.include_reasoning is not False)


def prompt_text(request: ChatRequest, tokenizer: Tokenizer) -> tuple[str, int | None]:
    """What the model is shown, and the tokens that thoughts may have. Raises `InvalidRequest` and `TextError`."""
    variables, budget = _thinking(request, tokenizer)
    if request.offered and tokenizer.template is not None and "tools" not in tokenizer.template.variables:
        raise InvalidRequest(
            "'tools' is not honoured for this model: its chat template shows none.", param="tools"
        )
    if request.documents and tokenizer.template is not None and "documents" not in tokenizer.template.variables:
        raise InvalidRequest(
            "'documents' is not honoured for this model: its chat template shows none.", param="documents"
        )
    goes_on = bool(request.continue_final_message)
    text = tokenizer.render(
        [message.for_template() for message in request.messages],
        [tool.for_template() for tool in request.offered],
        request.documents,
        add_generation_prompt=not goes_on
        if request.add_generation_prompt is None
        else request.add_generation_prompt,
        continue_final_message=goes_on,
        **variables,
    )
    return text, budget


def _thinking(request: ChatRequest, tokenizer: Tokenizer) -> tuple[dict[str, Any], int | None]:
    """Variables of the template, and the bound on thoughts."""
    given = request.chat_template_kwargs or {}
    for name in given:
        if not name.isidentifier() or name.startswith("_") or name in RESERVED:
            raise InvalidRequest(
                "'chat_template_kwargs' has a name that requests may not set.", param="chat_template_kwargs"
            )
    if request.reasoning_effort is None:
        return dict(given), request.thinking_token_budget
    variables, budget = effort(tokenizer, request.reasoning_effort)
    asked = request.thinking_token_budget
    return {**variables, **given}, asked if asked is not None else budget


def _asks_to_think(request: ChatRequest) -> bool:
    """Whether thoughts are wished for: an effort, a budget, or the template's own switch."""
    variables = request.chat_template_kwargs or {}
    return bool(
        request.reasoning_effort not in (None, "none")
        or request.thinking_token_budget
        or any(variables.get(name) is True for name in SWITCHES)
    )


def _markup(request: ChatRequest, served: ServedModel) -> Markup | None:
    """How the answer is read; None where it is text as the model writes it."""
    tokenizer, dialects = served.usable, served.dialects
    offered, verbatim = request.offered, request.separate_reasoning is False
    if offered and dialects.tools is None:
        raise InvalidRequest(
            "'tools' is not honoured for this model: its chat template does not tell how calls are written. "
            "Set spec.parsers.tools in the model's manifest.",
            param="tools",
        )
    used = dialects if offered or verbatim else Dialects(None, dialects.reasoning)
    if used.tools is None and used.reasoning is None:
        return None
    return Markup(
        used,
        tuple(
            Tool(tool.function.name, tool.function.parameters or NO_PARAMETERS, bool(tool.function.strict))
            for tool in offered
        ),
        tokenizer.special_among(used.marks),
        verbatim=verbatim,
        thought_ids=tokenizer.thinking if used.reasoning is not None else None,
        thinks=_asks_to_think(request),
        must_call=request.must_call,
        one_call=request.one_call,
    )


def _begun(markup: Markup | None, text: str, request: ChatRequest) -> Markup | None:
    """The markup of an answer that begins at the end of the prompt."""
    if markup is None or markup.dialects.reasoning is None:
        return markup
    continued = (request.messages[-1].content or "") if request.continue_final_message else None
    opened = markup.dialects.opens_thought(text, continued)
    closed = continued is not None or REASONING[markup.dialects.reasoning].closed(text)
    thought = not opened and closed
    return replace(markup, opened=opened, thought=thought)


def _constraint(request: ChatRequest, markup: Markup | None) -> Constraint | None:
    """What the answer is held to, by the field that a client would look at when that cannot be done."""
    wanted = request.constraint
    if markup is None:
        return wanted
    field = wanted.field if wanted is not None else "tools"
    held = markup.held_to(wanted.structured if wanted is not None else None, field=field)
    return Constraint(field, held) if held is not None else None
