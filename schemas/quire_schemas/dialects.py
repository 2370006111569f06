"""Names of the ways in which families of models write tool calls and reasoning, as manifests spell them.

What they mean is `quire.text.dialects`. Left out of a manifest, a model's are those that its chat template shows.
"""

from __future__ import annotations

from typing import Literal

ToolDialect = Literal[
    "none", "hermes", "llama3_json", "mistral", "mistral_args", "qwen3_coder", "seed", "pythonic", "deepseek_v3",
    "deepseek_v31", "kimi_k2", "harmony",
]  # fmt: skip
ReasoningDialect = Literal[
    "none", "think", "deepseek_r1", "mistral", "seed", "cohere", "thinking", "granite", "harmony"
]
NONE = "none"
"""Nothing is read: the markup stays in the text."""
HARMONY = "harmony"
"""One markup for both."""
