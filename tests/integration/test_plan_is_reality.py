"""What a plan says an engine will hold is what an engine holds: a matrix of manifests, planned and then loaded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from quire import builtin
from quire.controlplane.wiring import text_facts
from quire_engine.engine import Engine
from quire_engine.errors import StartError
from quire_operators.admission import Admission
from quire_operators.cache import HubCache
from quire_operators.devices import Inventory
from quire_operators.review import Review
from quire_operators.sources import Sources
from quire_operators.store import Store
from quire_schemas import manifest
from quire_schemas.update import hot_hash
from quire_schemas.wire import EngineSpec

MIB = 1 << 20
MACHINE = Inventory(8192 * MIB, 8192 * MIB, 2)
PLAIN = [
    f"engine: {{dtype: {dtype}, maxModelLen: {length}, "
    f"kvCache: {{dtype: {kv}, size: {size}, blockSize: {block}}}}}, "
    f"batching: {{maxNumSeqs: {seqs}, maxNumBatchedTokens: 512}}"
    for (dtype, kv), length, size, (block, seqs) in itertools.product(
        (("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "int8"), ("float32", "bfloat16")),
        (192, 1000),
        ("8Mi", "auto"),
        ((16, 4), (32, 9)),
    )
]
QUANTIZED = [
    f"engine: {{maxModelLen: 512, kvCache: {{dtype: {kv}, size: 8Mi}}}}, quantization: {{{how}}}"
    for how, kv in itertools.product(
        ("method: int8", "method: int8, activations: bf16", "method: int4", "method: int4, groupSize: 64"),
        ("auto", "int8"),
    )
]
TOO_LARGE = [
    f"engine: {{dtype: {dtype}, maxModelLen: 512, kvCache: {{size: {size}}}}}"
    for dtype, size in itertools.product(("float32", "bfloat16"), ("600Mi", "2Gi", "20Gi"))
] + [
    f"engine: {{maxModelLen: 512, kvCache: {{dtype: int8, size: {size}}}}}, quantization: {{method: {method}}}"
    for size, method in itertools.product(("700Mi", "4Gi"), ("int8", "int4"))
]
SMALL = Inventory(512 * MIB, 512 * MIB, 2)


@pytest.fixture(scope="module")
def admission(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admission]:
    folder = tmp_path_factory.mktemp("store")
    store = Store(folder / "state.db")
    sources = Sources({"tiny": builtin.path("tiny")}, HubCache(folder / "hub", folder / "records"))
    yield Admission(store, sources, lambda: MACHINE, text_facts)
    store.close()


def review(admission: Admission, spec: str, machine: Inventory) -> Review:
    head = "apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {name: m}\n"
    text = f"{head}spec: {{source: 'builtin://tiny', {spec}}}\n"
    loaded = manifest.load([("m.yaml", text)])
    assert loaded.problems == []
    (found,) = admission.review(loaded.resources, machine)
    return found


def engine_spec(found: Review, folder: Path) -> EngineSpec:
    """What a replica of it would be started with."""
    assert found.placement is not None
    digest = hot_hash(found.resolved)
    socket = str(folder / "engine.sock")
    return found.placement.engine_spec("m", "m-r1-0", 1, socket, found.resolved, digest, adoption_window=60.0)


def test_the_matrix_is_as_large_as_promised() -> None:
    assert len(set(PLAIN + QUANTIZED)) == 40
    assert len(set(TOO_LARGE)) == 10


@pytest.mark.parametrize("spec", PLAIN + QUANTIZED)
def test_an_engine_allocates_the_blocks_that_were_planned(admission: Admission, spec: str, tmp_path: Path) -> None:
    found = review(admission, spec, MACHINE)
    assert found.refusal is None
    assert found.fit is not None
    assert found.placement is not None
    engine = Engine.load(engine_spec(found, tmp_path))
    assert engine.stats().blocks_total == found.placement.num_blocks == found.fit.num_blocks
    assert found.fit.used <= found.fit.limit


@pytest.mark.parametrize("spec", TOO_LARGE)
def test_what_a_plan_refuses_no_engine_starts_with(admission: Admission, spec: str, tmp_path: Path) -> None:
    found = review(admission, spec, SMALL)
    assert found.refusal is not None
    assert found.fit is not None
    assert not found.fit.fits
    assert found.fit.counter_offers, "what would fit is offered"
    forced = engine_spec(review(admission, spec, Inventory(64 << 30, 64 << 30, 2)), tmp_path)
    with pytest.raises(StartError):
        Engine.load(msgspec.structs.replace(forced, memory_limit=found.fit.limit))
