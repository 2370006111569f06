"""How engines and models fail requests, in the words of a Route's manifest, which the router acts by."""

from __future__ import annotations

from typing import Final, Literal

Failure = Literal["Unavailable", "QueueFull", "Timeout", "ContextLengthExceeded"]
"""In what ways a model fails a request, so that another one can step in."""
Retried = Literal["ConnectionError", "503"]
"""In what ways an engine fails a request, so that another one can be tried."""
DEFAULT_ATTEMPTS: Final = 3
"""At one model, of a request that nobody decided otherwise for."""
