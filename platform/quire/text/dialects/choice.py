"""Which dialects a model speaks, and the reader of its answers.

The chat template is the witness: it spells the marks that the model was trained on, to put earlier calls and
thoughts into a prompt. Where a template says nothing the added tokens of the vocabulary may.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from quire.text.dialects.harmony import Harmony, HarmonyReader, HarmonyThoughts
from quire.text.dialects.json_calls import Hermes, Llama3, Mistral
from quire.text.dialects.parts import Plain, Reader, Tool
from quire.text.dialects.pythonic import Pythonic
from quire.text.dialects.sections import Fenced, Numbered, Sections
from quire.text.dialects.tags import Tags
from quire.text.dialects.thoughts import ReasoningDialect, Thoughts
from quire.text.dialects.tools import ToolDialect
from quire_schemas.dialects import HARMONY, NONE

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
            Tags("qwen3_coder", opening="<tool_call>", closing="</tool_call>", gap="\n"),
            Tags("seed", opening="<seed:tool_call>", closing="</seed:tool_call>", gap=""),
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

_HERMES: Final = re.compile(
    re.escape(Hermes.opening)
    + r"""(?:\\+[nrt]|\s|['"+~(-]|\{\{|\}\}|\{%(?s:.*?)%\})*+"""  # what templates are glued with
    + r"""(?:\{\s*\\*['"]|[\w.\[\]'"]+\s*\|\s*tojson)"""
)
"""How templates begin an object behind the mark: others use the same mark, and some only speak of it."""
_LISTED: Final = re.compile(r"\[TOOL_CALLS\]\s*\[")
"""How templates of the older way begin a list."""
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
        """With what a manifest says instead; None there leaves what was detected. Harmony, which is both, is
        declared by either, and left out as a whole for another.
        """
        chosen = Dialects(_chosen(tools, self.tools), _chosen(reasoning, self.reasoning))
        if (chosen.tools == HARMONY) == (chosen.reasoning == HARMONY):
            return chosen
        if tools == HARMONY:
            return Dialects(HARMONY, HARMONY)
        if reasoning == HARMONY:
            return Dialects(None if tools == NONE else HARMONY, HARMONY)
        if reasoning is None and tools == NONE:
            return Dialects(None, HARMONY)
        return Dialects(
            None if chosen.tools == HARMONY else chosen.tools,
            None if chosen.reasoning == HARMONY else chosen.reasoning,
        )

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
        thoughts = REASONING[self.reasoning] if self.reasoning is not None else None
        if isinstance(thoughts, HarmonyThoughts):
            return HarmonyReader(tools if self.tools == HARMONY else None, opened)
        calls: Reader = Plain() if self.tools is None or tools is None else TOOLS[self.tools].reader(tools)
        return thoughts.reader(calls, opened=opened) if isinstance(thoughts, Thoughts) else calls


def _chosen(declared: str | None, detected: str | None) -> str | None:
    return detected if declared is None else None if declared == NONE else declared


def detect(template: str | None, tokens: Container[str]) -> Dialects:
    """The dialects that a chat template's source shows; `tokens` are the added tokens of the vocabulary.

    Nothing is shown by a mark that only stands in a comment.
    """
    source = _COMMENT.sub("", template or "")
    if "<|channel|>" in source and "<|message|>" in source:
        return Dialects(HARMONY, HARMONY)
    return Dialects(_tools(source, tokens), _reasoning(source))


def _tools(source: str, tokens: Container[str]) -> str | None:
    if _DEEPSEEK["section"] in source:
        return "deepseek_v3" if "```json" in source else "deepseek_v31"
    if _KIMI["section"] in source:
        return "kimi_k2"
    if Mistral.opening in source:
        newer = Mistral.arguments_mark in source or Mistral.arguments_mark in tokens
        return "mistral_args" if newer and not _LISTED.search(source) else "mistral"
    if "<function=" in source and "<parameter=" in source:
        return "seed" if "<seed:tool_call>" in source else "qwen3_coder"
    if _HERMES.search(source) and "arguments" in source:
        return Hermes.name
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
