"""The engine that tests start unless they need another, the built-in model, small, on one thread; and its run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from quire.builtin import path as builtin_path
from quire_schemas.wire import Delta, EngineSpec, Generate

if TYPE_CHECKING:  # which loads torch, and tests of the router do without
    from quire_engine.engine import Engine


def tiny_spec(**fields: Any) -> EngineSpec:
    """A spec of the built-in model in float32 with 128 blocks of 16; `fields` replace its own."""
    spec = EngineSpec(
        model="tiny",
        replica_id="tiny-0",
        incarnation=1,
        socket="",
        model_dir=str(builtin_path()),
        dtype="float32",
        kv_dtype="float32",
        device="cpu",
        threads=1,
        max_model_len=512,
        block_size=16,
        num_blocks=128,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        chunked_prefill=True,
        seed=0,
        memory_limit=1 << 30,
        hot_hash="h0",
    )
    return msgspec.structs.replace(spec, **fields)


def run(engine: Engine, *messages: Generate) -> dict[str, list[Delta]]:
    """All deltas by request, once everybody has ended; books are right after each step, empty at the end."""
    for message in messages:
        engine.add(message)
    heard: dict[str, list[Delta]] = {message.id: [] for message in messages}
    while engine.has_work:
        for delta in engine.step():
            heard[delta.id].append(delta)
        engine.check_integrity()
    assert engine.stats().blocks_used == 0
    return heard
