"""Routers for tests, one that all share and one of a test's own; and the control plane of a module's tests."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.integration.engine_process import engine_running, without_weights
from tests.integration.forked import ForkedPlane
from tests.integration.plane import GATEWAY, Plane
from tests.integration.router_world import World, end_world, make_world

from quire_schemas import wire


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    """A control plane with the stand-in for engines, and a router on any free port; in the end nothing is left."""
    plane = ForkedPlane(tmp_path_factory.mktemp("plane"))
    plane.start()
    plane.apply(GATEWAY)
    yield plane
    plane.end()
    assert plane.ours() == []


@pytest.fixture(scope="session")
def shared_world() -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="qr") as name:  # short: a Unix socket's path has 107 bytes
        world = make_world(Path(name))
        yield world
        end_world(world)


@pytest.fixture(scope="session")
def scripted_spec(tmp_path_factory: pytest.TempPathFactory) -> Iterator[wire.EngineSpec]:
    """A scripted engine with the built-in tokenizer: it says what it is told to."""
    checkpoint = str(without_weights(tmp_path_factory.mktemp("checkpoint")))
    spec = {"model_dir": checkpoint, "runner": "scripted", "step_time": 0.001, "max_model_len": 1024}
    # between two modules that use it there may be minutes without a word to it
    with engine_running(replica_id="scripted", adoption_window=3600.0, **spec) as running:
        yield running


@pytest.fixture
async def world(shared_world: World) -> AsyncIterator[World]:
    """The shared router, with an empty table before and after."""
    yield shared_world
    for engine in shared_world.engines:
        await engine.stop()
    shared_world.engines.clear()
    await shared_world.table()
    log = (shared_world.folder / "router.log").read_text()
    (shared_world.folder / "router.log").write_text("")
    assert "Traceback" not in log, log


@pytest.fixture
async def own_world() -> AsyncIterator[World]:
    """A router of the test's own, to be killed and started again."""
    with tempfile.TemporaryDirectory(prefix="qr") as name:
        world = make_world(Path(name))
        yield world
        for engine in world.engines:
            await engine.stop()
        end_world(world)
        log = (world.folder / "router.log").read_text()
        assert "Traceback" not in log, log
