"""How one request's answers are read, and what they are held to.

A constraint of the request holds for what follows the thought. Where tools are offered besides, the answer may be
calls instead; where a call is asked for, it is calls and nothing else.
"""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass
from typing import Final

from quire.text.dialects import REASONING, TOOLS, Content, Dialects, Part, Plain, Reader, Tool
from quire.text.dialects.forms import Form, any_of, constrained, held_to, literal, sequence
from quire.text.errors import ParamRefused
from quire_schemas.wire import MAX_STRUCTURED, Structured

_SHORT_IDS: Final = frozenset({"mistral", "mistral_args"})
"""Dialects whose templates take ids of nine letters and digits alone."""


@dataclass(frozen=True, slots=True)
class Markup:
    """The same for all answers of a request; each is read by a reader of its own."""

    dialects: Dialects
    tools: tuple[Tool, ...]
    """Those that the request offers."""
    visible: frozenset[int]
    """Special tokens that have a meaning here, and so must be seen."""
    opened: bool = False
    """The prompt ends inside a thought."""
    thought: bool = False
    """The prompt ends behind one: there is no other before the answer."""
    verbatim: bool = False
    """Answers are content as the model writes them, whatever is in them."""
    thought_ids: tuple[int, int] | None = None
    """The tokens that open and close a thought, where each is one."""
    thinks: bool = False
    """The request asks for thoughts."""
    must_call: bool = False
    one_call: bool = False
    """An answer ends before its second call."""

    def reader(self) -> Reader:
        """A reader for one answer."""
        if self.verbatim:
            return Plain()
        one = self.dialects.reasoning is not None and not REASONING[self.dialects.reasoning].apart
        dialects = self.dialects if one or not self.thought else Dialects(self.dialects.tools, None)
        return dialects.reader(self.tools or None, opened=self.opened)

    def is_head(self, part: Part) -> bool:
        """Whether a part is the head of a call or a thought, whose rest is missing where an answer was cut off."""
        return isinstance(part, Content) and part.text.lstrip().startswith(self.dialects.marks)

    def new_call_id(self) -> str:
        """An id for a call, in the form that the model's template takes in a later turn."""
        size = 9 if self.dialects.tools in _SHORT_IDS else 24
        made = "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(size))
        return made if size == 9 else f"call_{made}"

    def held_to(self, wanted: Structured | None, *, field: str = "tools") -> Structured | None:
        """What an answer is held to whose content is to be `wanted`. `field` of the request asks for it, and is
        named where it is too large. Raises `ParamRefused`.
        """
        form = self._form(wanted)
        if form is None:
            return None
        if self.dialects.reasoning is not None and not self.thought and self._may_think(wanted):
            form = REASONING[self.dialects.reasoning].behind(form, opened=self.opened)
        held = held_to(form)
        if (size := len(held.text.encode())) > MAX_STRUCTURED:
            tools = f" with {len(self.tools)} tools" if self.tools and field != "tools" else ""
            raise ParamRefused(
                f"'{field}'{tools} holds the answer to a form of {size} bytes, of at most {MAX_STRUCTURED}: "
                "shorten schemas, or leave tools out.",
                param=field,
            )
        return held

    def _may_think(self, wanted: Structured | None) -> bool:
        """Whether an answer may begin with a thought.

        A model that thinks or not, as it likes, would be lured into it where there is nothing else to say but what
        it is held to; so it has to be asked for then.
        """
        always = self.dialects.reasoning is not None and REASONING[self.dialects.reasoning].always
        free = wanted is None and not self.must_call
        return free or always or self.opened or self.thinks

    def _form(self, wanted: Structured | None) -> Form | None:
        """Behind the thought."""
        said = self._said(wanted) if wanted is not None else None
        calls = TOOLS[self.dialects.tools] if self.tools and self.dialects.tools is not None else None
        if calls is None:
            return said
        if said is None and not self.must_call:
            return calls.guided(self.tools) if any(tool.strict for tool in self.tools) else None
        form = calls.calls(self.tools, parallel=not self.one_call)
        return form if said is None else any_of([said, form])

    def _said(self, wanted: Structured) -> Form:
        """An answer that is no call."""
        begun = self.thought or self.dialects.reasoning is None
        answer = "" if begun else REASONING[self.dialects.reasoning or ""].answer
        return sequence(literal(answer), constrained(wanted)) if answer else constrained(wanted)
