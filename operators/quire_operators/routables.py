"""What the router is to know of one model, by what is to run of it and what does: pure, the input of
`routes.build`.

A model whose next revision is tried comes as two, itself and its canary, each with the replicas that are its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from quire_operators.desired import (
    Canary,
    Effective,
    as_canary,
    breaker_rules,
    comes_and_goes,
    own_rows,
    stall_timeout,
)
from quire_operators.overrides import Kind
from quire_operators.placement import Placement
from quire_operators.rollout import Goal, Process, Row, Seen
from quire_operators.routes import Routable, Text
from quire_schemas import wire
from quire_schemas.quantities import parse_duration, parse_money

Pairs = tuple[tuple[Row, Seen], ...]


@dataclass(frozen=True, slots=True)
class Standing:
    """One model as it stands."""

    wanted: Effective
    replicas: Sequence[tuple[Row, Seen]]
    """All of them, its canary's too."""
    placements: Mapping[str, Placement]
    """By template hash, of the revisions on record."""
    sockets: Mapping[str, str]
    """By replica id."""
    tried: int
    """Replicas of its canary that serve."""
    now: float
    """Unix seconds."""


def routables(standing: Standing) -> list[Routable]:
    """The model with its replicas, and its canary if it has one."""
    wanted = standing.wanted
    mine = own_rows(wanted, [row for row, _ in standing.replicas])
    pairs = tuple(
        # what is left of a canary that was given up is on its way out before a pass has said so
        (replace(row, goal=Goal.DRAIN) if row.template_hash == wanted.set_aside else row, seen)
        for row, seen in standing.replicas
        if row in mine
    )
    found = [_routable(standing, _route(standing, wanted, pairs), pairs)]
    canary = wanted.canary
    if canary is not None:
        pairs = tuple((row, seen) for row, seen in standing.replicas if row not in mine)
        route, paper = _route(standing, as_canary(wanted, canary), pairs), canary.policy.paper
        route = msgspec.structs.replace(
            route,
            model=canary_name(route.model),
            names=(),
            canary_of=route.model,
            percent=_share(standing, canary),
            exam=paper.exam if paper is not None and canary.stage is None else None,
        )
        found.append(_routable(standing, route, pairs))
    return found


def canary_name(model: str) -> str:
    """The name of a model's canary in the routing table."""
    return model + wire.CANARY_MARK


def _routable(standing: Standing, route: wire.ModelRoute, pairs: Pairs) -> Routable:
    placed = {
        row.id: standing.placements[row.template_hash]
        for row, _ in pairs
        if row.template_hash in standing.placements
    }
    texts = {
        replica: Text(each.tokenizer_dir, each.chat_template_file, each.runner == "scripted", each.chat_template)
        for replica, each in placed.items()
    }
    adapters = {replica: tuple(adapter.name for adapter in each.adapters) for replica, each in placed.items()}
    return Routable(route, pairs, {row.id: standing.sockets[row.id] for row, _ in pairs}, texts, adapters)


def _share(standing: Standing, canary: Canary) -> int:
    """Percent of the requests that a canary has: its step's, and no more than its part of the replicas."""
    if canary.stage is None or canary.stage.failed:
        return 0
    full = max(standing.wanted.stored.resolved["replicas"], 1)
    return min(canary.policy.steps[canary.step].weight, int(100 * standing.tried // full))


def _route(standing: Standing, wanted: Effective, pairs: Pairs) -> wire.ModelRoute:
    """A table entry without replicas, with the current revision's text. Bounds are the narrowest among the
    revisions that are ready."""
    stored, revision = wanted.stored, wanted.revision
    placement = Placement.from_dict(revision.placement)
    ready = {row.template_hash for row, seen in pairs if seen.process is Process.READY}
    narrow = [placed for template, placed in standing.placements.items() if template in ready] or [placement]
    batching, parsers = stored.resolved["batching"], stored.resolved["parsers"] or {}
    return wire.ModelRoute(
        model=stored.key.name,
        names=tuple(stored.resolved["servedModelNames"]),
        revision=revision.n,
        template_hash=revision.template_hash,
        tokenizer_dir=placement.tokenizer_dir,
        chat_template_file=placement.chat_template_file,
        chat_template=placement.chat_template,
        max_model_len=min(p.max_model_len for p in narrow),
        kv_tokens=min(p.kv_tokens for p in narrow),
        max_queue_length=batching["maxQueueLength"],
        max_queue_wait=parse_duration(batching["maxQueueWait"]),
        created=int(stored.created_at),
        replicas=(),
        eta=_eta(standing, wanted, pairs) if not ready else None,
        stopped=wanted.full == 0,
        paused=Kind.PAUSE in wanted.overrides,
        wanted=0 if wanted.standby else wanted.full,
        restarts=max((row.restarts for row, _ in pairs if row.ready_since is None), default=0),
        on_demand=comes_and_goes(stored.resolved),
        scripted=placement.runner == "scripted",
        stall_seconds=stall_timeout(stored.resolved),
        policy=batching["policy"],
        prefix_caching=batching["prefixCaching"],
        tool_dialect=parsers.get("tools"),
        reasoning_dialect=parsers.get("reasoning"),
        max_migrations=stored.resolved.get("maxMigrations", 0),
        breaker=breaker_rules(stored.resolved),
        prices=_prices(stored.resolved.get("prices")),
        adapters=tuple(
            wire.AdapterRoute(
                each.name, tuple(f"{name}:{each.name}" for name in stored.resolved["servedModelNames"])
            )
            for each in placement.adapters
        ),
    )


def _eta(standing: Standing, wanted: Effective, pairs: Pairs) -> float | None:
    """Seconds until the first starting replica should be ready, by how long the last one took."""
    revision = wanted.revision
    if wanted.standby:
        return revision.load_seconds
    started = [row.launched_at for row, seen in pairs if seen.process is Process.STARTING]
    if revision.load_seconds is None or not started:
        return None
    return max(1.0, revision.load_seconds - (standing.now - min(started)))


def _prices(declared: Mapping[str, Any] | None) -> wire.Prices | None:
    """What one token costs, by what a million does."""
    if declared is None:
        return None
    cached = declared["cachedInput"] if declared["cachedInput"] is not None else declared["input"]
    parts = [
        int(parse_money(each) * wire.TICKS) // 1_000_000
        for each in (declared["input"], cached, declared["output"])
    ]
    return wire.Prices(*parts)
