"""Quire: the command, the control plane, the router and the text side of the house.

    from quire import LLM, SamplingParams

runs a model in this process (`quire.llm`). These names are looked up when they are used: who imports this package
for anything else loads neither torch nor the engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.llm import LLM as LLM
    from quire.outputs import CompletionOutput as CompletionOutput
    from quire.outputs import EmbeddingOutput as EmbeddingOutput
    from quire.outputs import EmbeddingRequestOutput as EmbeddingRequestOutput
    from quire.outputs import Logprob as Logprob
    from quire.outputs import RequestOutput as RequestOutput
    from quire.sampling import BeamSearchParams as BeamSearchParams
    from quire.sampling import SamplingParams as SamplingParams

_WHERE = {
    "LLM": "quire.llm",
    "CompletionOutput": "quire.outputs",
    "EmbeddingOutput": "quire.outputs",
    "EmbeddingRequestOutput": "quire.outputs",
    "Logprob": "quire.outputs",
    "RequestOutput": "quire.outputs",
    "BeamSearchParams": "quire.sampling",
    "SamplingParams": "quire.sampling",
}

__all__ = [
    "LLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    where = _WHERE.get(name)
    if where is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(where), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
