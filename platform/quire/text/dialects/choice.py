"""Which dialects a model speaks, and what follows from it for one answer.

The chat template is the witness: it spells the marks that the model was trained on, to put earlier calls and
thoughts into a prompt. Where a template says nothing the added tokens of the vocabulary may.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from quire.text.dialects.forms import constrained, held_to, literal, sequence
from quire.text.dialects.harmony import Harmony, HarmonyReader, HarmonyThoughts
from quire.text.dialects.json_calls import Hermes, Llama3, Mistral
from quire.text.dialects.parts import Plain, Reader, Tool
from quire.text.dialects.pythonic import Pythonic
from quire.text.dialects.sections import Fenced, Numbered, Sections
from quire.text.dialects.tags import Qwen3Coder
from quire.text.dialects.thoughts import ReasoningDialect, Thoughts
from quire.text.dialects.tools import ToolDialect
from quire_schemas.wire import Structured

NONE: Final = "none"
"""The name of no dialect: markup stays in the text."""

_DEEPSEEK: Final = {
    "section": "<｜tool▁calls▁begin｜>",
    "call": "<｜tool▁call▁begin｜>",
    "arguments": "<｜tool▁sep｜>",
    "call_end": "<｜tool▁call▁end｜>",
    "section_end": "<｜tool▁calls▁end｜>",
}
_KIMI: Final = {
    "section": "<|tool_calls_section_begin|>",
    "call": "<|tool_call_begin|>",
    "arguments": "<|tool_call_argument_begin|>",
    "call_end": "<|tool_call_end|>",
    "section_end": "<|tool_calls_section_end|>",
}

TOOLS: Final[Mapping[str, ToolDialect]] = MappingProxyType(
    {
        dialect.name: dialect
        for dialect in (
            Hermes(),
            Llama3(),
            Mistral("mistral", listed=True),
            Mistral("mistral_args", listed=False),
            Qwen3Coder(),
            Pythonic(),
            Fenced("deepseek_v3", **_DEEPSEEK),
            Sections("deepseek_v31", **_DEEPSEEK),
            Numbered("kimi_k2", **_KIMI),
            Harmony(),
        )
    }
)
REASONING: Final[Mapping[str, ReasoningDialect]] = MappingProxyType(
    {
        dialect.name: dialect
        for dialect in (
            Thoughts("think", "<think>", "</think>"),
            Thoughts("deepseek_r1", "<think>", "</think>", begins_open=True),
            Thoughts("mistral", "[THINK]", "[/THINK]"),
            Thoughts("seed", "<seed:think>", "</seed:think>"),
            Thoughts("cohere", "<|START_THINKING|>", "<|END_THINKING|>"),
            Thoughts("thinking", "<thinking>", "</thinking>"),
            Thoughts("granite", "Here is my thought process:", "Here is my response:"),
            HarmonyThoughts(),
        )
    }
)

_PYTHONIC: Final = re.compile(r"\[\s*func_?name\d*\(")
"""How templates explain that calls are written as Python does."""
_LLAMA3: Final = re.compile(r"""\{\s*\\?"name\\?"\s*:[^{}]*\\?"parameters\\?"\s*:""")
"""How they explain objects with a name and parameters."""
_COMMENT: Final = re.compile(r"\{#.*?#\}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Dialects:
    """The dialects of one model; None where its text is left as it is."""

    tools: str | None = None
    reasoning: str | None = None

    def overridden(self, tools: str | None, reasoning: str | None) -> Dialects:
        """With what a manifest says instead; None there leaves what was detected."""
        return Dialects(_chosen(tools, self.tools), _chosen(reasoning, self.reasoning))

    @property
    def marks(self) -> tuple[str, ...]:
        """Tokens that must be in the text that the reader gets, special or not."""
        calls = TOOLS[self.tools].marks if self.tools is not None else ()
        thoughts = REASONING[self.reasoning].marks if self.reasoning is not None else ()
        return tuple(dict.fromkeys((*calls, *thoughts)))

    def opens_thought(self, prompt: str, continued: str | None = None) -> bool:
        """Whether the answer to a rendered prompt begins inside a thought. `continued` is the text of the message
        that it goes on with, if it does.
        """
        if self.reasoning is None:
            return False
        thoughts = REASONING[self.reasoning]
        return thoughts.opens(prompt) if continued is None else thoughts.left_open(continued)

    def reader(self, tools: Sequence[Tool] | None, *, opened: bool = False) -> Reader:
        """Reads one answer. Without `tools` no calls are read, and their markup is content. `opened`: it begins
        inside a thought (`opens_thought`).
        """
        if self.reasoning == Harmony.name:
            return HarmonyReader(tools if self.tools == Harmony.name else None, opened)
        calls: Reader = Plain() if self.tools is None or tools is None else TOOLS[self.tools].reader(tools)
        if self.reasoning is None:
            return calls
        return REASONING[self.reasoning].reader(calls, opened=opened)

    def forced(self, tools: Sequence[Tool], *, parallel: bool, opened: bool = False) -> Structured:
        """The constraint that an answer is a call of one of `tools`, after a thought if the model has any.

        The model must have a dialect of tools.
        """
        return self._held(TOOLS[self.tools or ""].calls(tools, parallel=parallel), opened)

    def guided(self, tools: Sequence[Tool], *, opened: bool = False) -> Structured:
        """The constraint that calls in an answer are of `tools`, with arguments that fit where they are strict."""
        form = TOOLS[self.tools or ""].guided(tools)
        if self.reasoning is None:
            return held_to(form)
        return held_to(REASONING[self.reasoning].before_free(form, opened=opened))

    def after_thought(self, structured: Structured, *, opened: bool = False) -> Structured:
        """The same constraint, for what follows the thought."""
        if self.reasoning is None:
            return structured
        reasoning = REASONING[self.reasoning]
        form = constrained(structured)
        if structured.kind == "structural_tag" and not reasoning.answer:
            return held_to(reasoning.before_free(form, opened=opened))
        return self._held(sequence(literal(reasoning.answer), form) if reasoning.answer else form, opened)

    def _held(self, form: dict[str, object], opened: bool) -> Structured:
        if self.reasoning is None:
            return held_to(form)
        return held_to(sequence(REASONING[self.reasoning].before(opened=opened), form))


def _chosen(declared: str | None, detected: str | None) -> str | None:
    return detected if declared is None else None if declared == NONE else declared


def detect(template: str | None, tokens: Container[str]) -> Dialects:
    """The dialects that a chat template's source shows; `tokens` are the added tokens of the vocabulary.

    Nothing is shown by a mark that only stands in a comment.
    """
    source = _COMMENT.sub("", template or "")
    if "<|channel|>" in source and "<|message|>" in source:
        return Dialects(Harmony.name, Harmony.name)
    return Dialects(_tools(source, tokens), _reasoning(source))


def _tools(source: str, tokens: Container[str]) -> str | None:
    if _DEEPSEEK["section"] in source:
        return "deepseek_v3" if "```json" in source else "deepseek_v31"
    if _KIMI["section"] in source:
        return "kimi_k2"
    if Mistral.opening in source:
        newer = Mistral.arguments_mark in source or Mistral.arguments_mark in tokens
        return "mistral_args" if newer else "mistral"
    if "<function=" in source and "<parameter=" in source:
        return Qwen3Coder.name
    if Hermes.opening in source:
        return None if "<arg_key>" in source else Hermes.name  # another family puts tags of its own inside
    if Pythonic.opening in source or _PYTHONIC.search(source):
        return Pythonic.name
    if Llama3.opening in source or _LLAMA3.search(source):
        return Llama3.name
    return None


def _reasoning(source: str) -> str | None:
    for name, dialect in REASONING.items():
        if all(mark in source for mark in dialect.marks):
            return name
    return "deepseek_r1" if "</think>" in source else None
