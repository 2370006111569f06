"""Text in, tokens out, and back: tokenizer, chat template, incremental detokenizing, stop strings.

Used by the router and by `quire.llm`. Engines know tokens only; nothing here loads torch or transformers.
"""

from __future__ import annotations

from quire.text.answer import AnswerText
from quire.text.detokenizer import Detokenizer
from quire.text.errors import (
    BadTemplate,
    BadTokenizer,
    NoChatTemplate,
    ParamRefused,
    TemplateFailed,
    TemplateRefused,
    TextError,
)
from quire.text.markup import Markup
from quire.text.stop import StopStrings
from quire.text.templates import ChatTemplate
from quire.text.tokenizer import AdvisedSampling, Tokenizer

__all__ = [
    "AdvisedSampling",
    "AnswerText",
    "BadTemplate",
    "BadTokenizer",
    "ChatTemplate",
    "Detokenizer",
    "Markup",
    "NoChatTemplate",
    "ParamRefused",
    "StopStrings",
    "TemplateFailed",
    "TemplateRefused",
    "TextError",
    "Tokenizer",
]
