"""What a review says before anything is written: where a refusal lies, and what does not fit together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from quire import builtin
from quire_operators.admission import Admission, Review
from quire_operators.devices import Inventory
from quire_operators.sources import Sources
from quire_operators.store import Store
from quire_schemas import manifest

GIB = 1 << 30
MACHINE = Inventory(16 * GIB, 16 * GIB, 4)


@pytest.fixture
def admission(tmp_path: Path) -> Iterator[Admission]:
    store = Store(tmp_path / "s.db")
    yield Admission(store, Sources({"tiny": builtin.path("tiny")}, tmp_path / "hub"), lambda: MACHINE)
    store.close()


def review(admission: Admission, *specs: str) -> list[Review]:
    texts = [
        (
            f"{number}.yaml",
            f"apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {{name: m{number}}}\n"
            f"spec: {{source: 'builtin://tiny', {spec}}}\n",
        )
        for number, spec in enumerate(specs)
    ]
    loaded = manifest.load(texts)
    assert not loaded.problems, loaded.problems
    return admission.review(loaded.resources)


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ("tokenizer: {source: 'hf://nobody/nothing'}", "spec.tokenizer.source"),
        ("placement: {deviceIds: [0]}", "spec.placement.deviceIds"),
        ("engine: {device: cuda}", "spec.engine.device"),
    ],
)
def test_a_refusal_names_the_field_it_is_about(admission: Admission, spec: str, path: str) -> None:
    (found,) = review(admission, spec)
    assert found.refusal is not None
    assert found.refusal.path == path
    assert found.refusal.hint


def test_models_that_fit_alone_and_not_together_say_so(admission: Admission) -> None:
    half = "engine: {maxModelLen: 256, kvCache: {size: 8Gi}}"
    small = "engine: {maxModelLen: 256, kvCache: {size: 1Gi}}"
    first, second, third = review(admission, half, half, small)
    assert first.notes == third.notes == []
    assert second.notes == ["fits alone; together with model/m0 it will wait as InsufficientMemory"]
    (alone,) = review(admission, half)
    assert alone.notes == []


def test_replicas_that_do_not_fit_beside_others_are_counted(admission: Admission) -> None:
    four = "engine: {maxModelLen: 256, kvCache: {size: 4Gi}}, replicas: 3"
    first, second = review(admission, "engine: {maxModelLen: 256, kvCache: {size: 4Gi}}", four)
    assert first.notes == []
    assert second.notes == [
        "fits alone; together with model/m0 1 of its 3 replicas will wait as InsufficientMemory"
    ]
