"""Mutated manifests, as files: nothing raises, every problem has its place and remedy, what is taken can be kept.

A failure prints the case and how to replay it: `QUIRE_FUZZ_CASE=seed:number pytest <this file>`.
"""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import yaml
from tests.effort import fuzz_cases, replay
from tests.mutations import as_json, as_yaml, damaged, generator, scarred

from quire.controlplane.wiring import text_facts
from quire_operators.admission import Admission
from quire_operators.cache import HubCache
from quire_operators.devices import Inventory
from quire_operators.review import problems as refusals
from quire_operators.sources import Sources
from quire_operators.store import Store
from quire_schemas.manifest import Manifest, Problem, intent_hash, load_paths, parse_intent
from quire_schemas.model import Model, resolve_defaults
from quire_schemas.yaml_tree import compose

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = [path.read_text() for path in sorted((ROOT / "manifests").glob("*.yaml"))]
OTHERS = """\
{apiVersion: quire.dev/v1alpha1, kind: Route, metadata: {name: r},
 spec: {match: {modelNames: [a], headers: [{name: x, exact: y}]}, backends: [{model: m, weight: 1}],
        sticky: {by: user}, fallbacks: [{model: n, when: [Timeout]}], timeouts: {request: 10m}}}
---
{apiVersion: quire.dev/v1alpha1, kind: AccessPolicy, metadata: {name: p, labels: {a: b}},
 spec: {keys: [{name: k, hash: abc}], allow: {models: [m]}, limits: [{requests: 5, per: 1m}], priority: 3,
        budgets: [{name: b, cost: '1.5', per: month}, {name: c, tokens: 5, per: 24h, warnAt: 90%}]}}
---
{apiVersion: quire.dev/v1alpha1, kind: GitSource, metadata: {name: g},
 spec: {url: 'https://example.org/x.git', ref: {branch: main}, path: a, interval: 1m}}
---
{apiVersion: quire.dev/v1alpha1, kind: Model, metadata: {name: full, annotations: {quire.dev/change-cause: why}},
 spec: {source: 'builtin://tiny', servedModelNames: [a, b], engine: {dtype: bfloat16, maxModelLen: 512,
        memory: 90%, kvCache: {blockSize: 16, size: 16Mi}, seed: 3}, batching: {maxNumSeqs: 8,
        maxNumBatchedTokens: 512, maxQueueWait: 60s}, replicas: 1, rollout: {strategy: Auto, maxSurge: 1},
        drainTimeout: 10s, restartPolicy: {backoffBase: 1s, backoffMax: 5m}, env: [{name: A, value: b}],
        resources: {cpu: 1}}}
"""
DOCUMENTS = [document for text in [*EXAMPLES, OTHERS] for document in yaml.safe_load_all(text)]
SECONDS = 5.0
"""Of processor time for one file. Most take milliseconds; no text may take for ever."""
MACHINE = Inventory(memory=64 << 30, available=64 << 30, cores=8)
BREAKS = re.compile("\r\n|[\n\r\x85\u2028\u2029]")


def lines_of(data: bytes) -> int:
    """Lines as YAML counts them."""
    return len(BREAKS.split(data.decode("utf-8", "replace")))


def case(seed: int, number: int) -> bytes:
    """The bytes of one mutated manifest."""
    rng = generator(seed, number)
    if rng.random() < 0.15:  # an example as it is written, comments and all, with damage to its text alone
        data = rng.choice(EXAMPLES).encode()
        return scarred(rng, data)
    chosen = rng.sample(DOCUMENTS, rng.choice((1, 1, 1, 2)))
    trees = [damaged(rng, tree) if index == 0 or rng.random() < 0.5 else tree for index, tree in enumerate(chosen)]
    if rng.random() < 0.15:
        data = as_json(rng, trees[0])
    else:
        data = "---\n".join(as_yaml(rng, tree) for tree in trees).encode("utf-8", "surrogatepass")
    return scarred(rng, data) if rng.random() < 0.15 else data


def sound(manifest: Manifest, file: Path, data: bytes) -> None:
    """Every problem has a place in the file, our words and a remedy; what has none can be kept."""
    lines = lines_of(data)
    if not manifest.problems:
        documents, _ = compose(data.decode())
        assert len(manifest.resources) == len(documents), "a document was lost without a word"
    for problem in manifest.problems:
        printable(problem, str(file), lines)
    for located in manifest.resources:
        assert parse_intent(located.intent) == located.resource
        assert intent_hash(located.intent) == intent_hash(located.resource)
        assert json.loads(json.dumps(located.intent, ensure_ascii=False).encode()) == located.intent
        if isinstance(located.resource, Model):
            json.dumps(resolve_defaults(located.resource), allow_nan=False)


def printable(problem: Problem, file: str, lines: int) -> None:
    assert problem.file == file
    assert 1 <= problem.line <= lines, problem
    assert problem.col >= 1, problem
    assert problem.message, problem
    assert problem.hint, problem
    text = f"{problem.path}{problem.message}{problem.hint}"
    assert text.isprintable(), f"characters that a terminal acts upon: {text!r}"
    assert len(text) < 2_000, "nobody reads that"
    ours = re.sub(r"\".*?\"|'.*?'", "''", text)  # without what it quotes of the file
    assert not re.search(r"Input should|Value error|\bNone\b", ours), text


def test_mutated_manifests_give_problems_in_places_or_resources(tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    store = Store(tmp_path / "state.db")
    tiny = ROOT / "platform/quire/builtin/tiny"
    sources = Sources({"tiny": tiny}, HubCache(tmp_path / "hub", tmp_path / "records"))
    admission = Admission(store, sources, lambda: MACHINE, text_facts)
    taken = refused = 0
    for seed, number in fuzz_cases():
        data = case(seed, number)
        file.write_bytes(data)
        begun = time.process_time()
        try:
            manifest = load_paths([file])
            sound(manifest, file, data)
            for problem in refusals(admission.review(manifest.resources)):
                printable(problem, str(file), lines_of(data))
            assert time.process_time() - begun < SECONDS
        except Exception as error:
            raise AssertionError(f"{replay(seed, number)}\n{data[:3000]!r}") from error
        taken += bool(manifest.resources)
        refused += bool(manifest.problems)
    store.close()
    assert taken > 5, "the mutations leave nothing whole: they test the front door only"
    assert refused > 5


def test_the_same_seed_gives_the_same_cases() -> None:
    assert [case(7, number) for number in range(50)] == [case(7, number) for number in range(50)]
    assert len({case(7, number) for number in range(50)}) > 45
    assert random.Random("7:3").random() == generator(7, 3).random()
