"""Dialects: how tool calls and reasoning are read out of a model's text.

Each family of models has its own way to write them. `ToolDialect` reads calls, `Thoughts` thoughts; `Dialects` is
the choice for one model, by its manifest or by what its chat template shows (`detect`), and makes the reader of an
answer. Both kinds also tell the forms that an engine holds an answer to. Pure: text in, parts out.
"""

from __future__ import annotations

from quire.text.dialects.choice import REASONING, TOOLS, Dialects, detect
from quire.text.dialects.parts import (
    CallArguments,
    CallBegins,
    Content,
    Part,
    Plain,
    Reader,
    Reasoning,
    Tool,
    joined,
)
from quire.text.dialects.thoughts import ReasoningDialect, Thoughts
from quire.text.dialects.tools import ToolDialect

__all__ = [
    "REASONING",
    "TOOLS",
    "CallArguments",
    "CallBegins",
    "Content",
    "Dialects",
    "Part",
    "Plain",
    "Reader",
    "Reasoning",
    "ReasoningDialect",
    "Thoughts",
    "Tool",
    "ToolDialect",
    "detect",
    "joined",
]
