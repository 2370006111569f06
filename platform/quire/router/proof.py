"""Whether a replica generates, proved by a token: what lies behind `/health`.

That a socket is open and an engine answers questions does not say that it can compute. A token does. Three cases:

- A token (or a vector) came lately: proof, at no cost. Lately is `PROOF_SECONDS`, or the model's stall time where
  that is shorter: for so long the replica counts as able.
- Sequences run or wait at the replica: they are the proof to be. That it makes progress with them is watched all
  the time (`EngineClient.stalled`), and one more sequence would only wait behind them.
- It is idle and has shown nothing lately: it is asked for one token, by a prompt of one, as background work, for
  which no request waits, whatever the policy. What comes of that within `ASKED_SECONDS` (or the stall time) is
  its verdict. One question at a time for each replica: whoever comes meanwhile waits for the same
  one. A verdict of failure holds until a token comes; after `AGAIN_SECONDS` the next look asks once
  more, and does not wait for the answer.

So looks are bounded in time, and however many there are, an idle replica computes one token in `PROOF_SECONDS`.
Nothing here changes where requests go, or counts as use of a model that is there on demand.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

from quire.router.engine_client import EngineClient, NotConnected
from quire.router.run import ENGINE_GONE
from quire_schemas import wire

log = logging.getLogger("quire.router")

PROOF_SECONDS: Final = 30.0
ASKED_SECONDS: Final = 5.0
AGAIN_SECONDS: Final = 2.0
ID_PREFIX: Final = "health-"
"""Of the ids that the questions have at engines."""
_PROMPT: Final = [0]


@dataclass(slots=True)
class _Asked:
    """What came of the last question to one replica."""

    question: asyncio.Task[None] | None = None
    failed_at: float | None = None
    """When it failed last; None after a success, and where the question could not be put."""
    connection: int = 0
    """The life of the engine that was asked."""


class Prover:
    """Asks replicas for a token where none came lately."""

    def __init__(self) -> None:
        self._asked: WeakKeyDictionary[EngineClient, _Asked] = WeakKeyDictionary()

    async def look(self, clients: Iterable[EngineClient]) -> None:
        """Ask those that have to be asked, and wait for it: `ASKED_SECONDS` at most. Then `failing` knows."""
        awaited = [question for client in clients if (question := self._ask(client)) is not None]
        if awaited:
            await asyncio.wait(awaited)

    def failing(self, client: EngineClient) -> bool:
        """Whether the replica was asked for a token, gave none, and has shown none since."""
        asked = self._asked.get(client)
        if asked is None or asked.failed_at is None or asked.connection != client.connection:
            return False
        return client.proved_at is None or client.proved_at < asked.failed_at

    def _ask(self, client: EngineClient) -> asyncio.Task[None] | None:
        """The question to wait for, begun if there is none; None where there is nothing to wait for."""
        if not client.ready:
            return None
        asked = self._asked.setdefault(client, _Asked())
        if asked.question is not None:
            return None if self.failing(client) else asked.question
        now = time.monotonic()
        if client.busy or (
            client.proved_at is not None and now - client.proved_at < min(PROOF_SECONDS, client.stall_seconds)
        ):
            return None
        known = self.failing(client)
        if known and asked.failed_at is not None and now - asked.failed_at < AGAIN_SECONDS:
            return None
        asked.question = asyncio.create_task(self._question(client, asked))
        return None if known else asked.question

    async def _question(self, client: EngineClient, asked: _Asked) -> None:
        try:
            patience = min(ASKED_SECONDS, client.stall_seconds)
            failure = await _one_token(client, patience)
            asked.connection = client.connection
            if failure and not self.failing(client):
                log.warning("replica %s does not generate: %s", client.endpoint.replica_id, failure)
            asked.failed_at = time.monotonic() if failure else None
        finally:
            asked.question = None


async def _one_token(client: EngineClient, patience: float) -> str:
    """Have one token generated. Why there is none; empty after a success, and where the question tells nothing."""
    bell = asyncio.Event()
    request = wire.Generate(
        id=f"{ID_PREFIX}{uuid.uuid4().hex}",
        token_ids=_PROMPT,
        sampling=wire.Sampling(max_tokens=1, temperature=0.0, ignore_eos=True),
        background=True,
    )
    steps = client.steps
    try:
        sequence = client.ask(request, bell)
    except NotConnected:
        return ""
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while not sequence.lost:
                    for delta in sequence.take():
                        if delta.finish_reason == "error" and delta.error_code not in ENGINE_GONE:
                            return f"the engine says {delta.error_code}"
                        if delta.finish_reason is not None:
                            return ""
                    await bell.wait()
                    bell.clear()
                return ""
        if client.steps > steps and client.has_others(sequence):
            return ""  # it computes for others who came meanwhile
        return f"no token within {patience:g} seconds"
    finally:
        sequence.abort()
