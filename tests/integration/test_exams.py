"""Canaries are asked before they have any request: a real router, and real engines on the built-in checkpoint and
on copies of it that something is wrong with.

By default the weights are the same, in another batch shape, behind the right and a wrong template; a night asks
checkpoints with a perturbed matrix and another rope base, too.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import waiting
from tests.integration.engine_process import engine_running
from tests.integration.forked import ForkedPlane
from tests.integration.plane import GATEWAY
from tests.integration.router_world import World, eventually
from tests.integration.test_canary import given_up
from tests.integration.test_exam_standins import NEW, endpoint, examined, verdict
from tests.integration.test_rollouts import reasons, wait_settled
from tests.integration.wire_engine import TEMPLATE_HASH

from quire import builtin
from quire_operators.exam import DRIFTED, SMOKE_FAILED, Failed, Paper, Passed, Waits, judge
from quire_schemas import signals, wire

HELLO = wire.Question("Hello! Who are you?", 24, "I am the small model that ships with Quire")


def copy_of_tiny(folder: Path, change: Callable[[Path], None]) -> str:
    shutil.copytree(builtin.path("tiny"), folder)
    change(folder)
    return str(folder)


def perturb(folder: Path) -> None:
    """Add noise of half its own spread to one matrix."""
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    matrix, seeded = weights[name].float(), torch.Generator().manual_seed(7)
    noise = torch.randn(matrix.shape, generator=seeded) * 0.5 * matrix.std()
    weights[name] = (matrix + noise).to(weights[name].dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def move_rope(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 2 * config["rope_theta"]}))


@pytest.fixture(scope="module")
def stable() -> Iterator[wire.EngineSpec]:
    with engine_running(replica_id="old", dtype="bfloat16") as spec:
        yield spec


@pytest.fixture(scope="module")
def same() -> Iterator[wire.EngineSpec]:
    """The same weights; prompts are computed in pieces that the other's are not, and with a cache of prefixes."""
    with engine_running(
        replica_id="new", dtype="bfloat16", max_num_batched_tokens=48, prefix_caching=True
    ) as spec:
        yield spec


async def put(
    world: World, old: wire.EngineSpec | None, new: wire.EngineSpec, exam: wire.Exam, **change: Any
) -> None:
    """The table of a canary that has no request yet; without `old` no stable replica is ready."""
    tiny = str(builtin.path("tiny"))
    replicas = () if old is None else (endpoint(old, TEMPLATE_HASH),)
    wide = {"max_model_len": new.max_model_len, "kv_tokens": new.num_blocks * new.block_size}
    canary = {"model": "tiny~", "names": (), "canary_of": "tiny", "template_hash": NEW, "exam": exam, **wide}
    await world.table(
        world.route(*replicas, tokenizer_dir=tiny, **wide),
        world.route(endpoint(new, NEW), **{"tokenizer_dir": new.model_dir, **canary, **change}),
    )


async def generated(world: World) -> float:
    """Tokens of clients' answers that the router has counted."""
    return (await world.metrics())[f'{signals.GENERATION_TOKENS}_total{{model="tiny"}}']


async def test_the_same_weights_pass_and_another_template_is_stopped(
    world: World, stable: wire.EngineSpec, same: wire.EngineSpec, tmp_path: Path
) -> None:
    paper = Paper((), 0.01)
    await put(world, None, same, paper.exam)

    async def waits() -> bool:
        return "the stable revision is ready" in (await examined(world)).waits

    await eventually(waits)
    assert isinstance(judge(paper, await examined(world)), Waits), (
        "with nothing to compare it with it does not pass"
    )

    await put(world, stable, same, paper.exam)
    passed = await verdict(world, paper)
    assert isinstance(passed, Passed), passed
    assert passed.text.startswith("0.0% of ")
    assert "divergence 0.000" in passed.text, "rounding is far within what counts as none"
    assert sum(each.tokens for each in (await examined(world)).drift) > 100

    wrong = tmp_path / "wrong.jinja"
    wrong.write_text("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}")
    both = Paper((HELLO,), 0.5)
    await put(world, stable, same, both.exam, chat_template_file=str(wrong))
    failed = await verdict(world, both)
    assert isinstance(failed, Failed)
    assert failed.reason == SMOKE_FAILED
    assert "without 'I am the small model" in failed.text


async def test_another_template_drifts(
    world: World, stable: wire.EngineSpec, same: wire.EngineSpec, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.jinja"
    wrong.write_text("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}")
    paper = Paper((), 0.2)
    await put(world, stable, same, paper.exam, chat_template_file=str(wrong))
    before = await generated(world)
    failed = await verdict(world, paper)
    assert isinstance(failed, Failed)
    assert failed.reason == DRIFTED
    assert await generated(world) == before, "questions are nobody's requests"
    async with world.client() as client:
        await client.completions.create(
            model="tiny", prompt="Hello", max_tokens=3, extra_body={"ignore_eos": True}
        )
    assert await generated(world) == before + 3


@pytest.mark.nightly
@pytest.mark.parametrize("change", [perturb, move_rope])
async def test_another_checkpoint_is_stopped(
    world: World, stable: wire.EngineSpec, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    folder = copy_of_tiny(tmp_path / "changed", change)
    paper = Paper((HELLO,), 0.05)
    with engine_running(replica_id="new", dtype="bfloat16", model_dir=folder) as spec:
        await put(world, stable, spec, paper.exam)
        both = await verdict(world, paper)
        alone = Paper((), 0.05)
        await put(world, stable, spec, alone.exam)
        failed = await verdict(world, alone)
    assert isinstance(failed, Failed), (both, failed)
    assert failed.reason == DRIFTED


async def test_what_its_engine_or_its_tokenizer_cannot_do_is_the_canarys_failure(world: World) -> None:
    old = await world.engine("old", "the old one says this")
    new = await world.engine("new", "the new one says that", template_hash=NEW)
    routes = world.route(old.endpoint())
    asked = Paper((wire.Question("Say", 64, "new one says"),), None)

    async def sit(paper: Paper, **change: Any) -> Passed | Failed:
        canary = {"model": "tiny~", "names": (), "canary_of": "tiny", "template_hash": NEW, "exam": paper.exam}
        await world.table(routes, world.route(new.endpoint(), **{**canary, **change}))
        return await verdict(world, paper)

    assert isinstance(await sit(asked), Passed)
    assert (len(old.generates), len(new.generates)) == (0, 1), "the stable one is not needed for this"
    assert new.generates[0].sampling.temperature == 0
    assert await sit(Paper((wire.Question("Say it", 64, "old one"),), None)) == Failed(
        SMOKE_FAILED, "'Say it' was answered 'the new one says that', without 'old one'"
    )
    long = await sit(Paper((wire.Question("word " * 600, 8, "x"),), None))
    assert isinstance(long, Failed)
    assert "its context holds 512 tokens" in long.text
    new.fail_with = "numerical_error"
    broken = await sit(Paper((wire.Question("Say more", 8, "x"),), None))
    assert broken == Failed(SMOKE_FAILED, "'Say more' was not answered: its engine says numerical_error")
    new.fail_with, new.poison = None, lambda request: request.id.startswith("exam-")
    killed = await sit(Paper((wire.Question("Die", 8, "x"),), None))
    assert killed == Failed(SMOKE_FAILED, "'Die' was not answered: new ended while it was asked")
    assert new.deaths == 2, "it is asked once more, and then no other engine is ended"
    new.poison = None
    old_template = Path(world.folder / "ck" / "tokenizer.json")
    other = world.folder / "other"
    shutil.copytree(world.folder / "ck", other)
    described = json.loads(old_template.read_text())
    vocab = described["model"]["vocab"]
    first, second = next(iter(pair for pair in zip(vocab, list(vocab)[1:], strict=False) if pair[0].isalpha()))
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(described))
    old.script = new.script = lambda _: [vocab[first], vocab[second]]
    mixed = await sit(Paper((wire.Question("Say", 8, ""),), 1.0), tokenizer_dir=str(other))
    assert isinstance(mixed, Failed)
    assert "the tokenizers differ: token" in mixed.text


async def test_a_table_without_it_ends_an_exam_and_another_one_is_put_from_its_beginning(world: World) -> None:
    new = await world.engine("new", "hm", template_hash=NEW)
    old = await world.engine("old", "hm")
    canary: dict[str, Any] = {"model": "tiny~", "names": (), "canary_of": "tiny", "template_hash": NEW}
    new.stalled = True
    exam = wire.Exam((wire.Question("Say", 8, "hm"),))
    with contextlib.suppress(TimeoutError):
        await world.table(world.route(old.endpoint()), world.route(new.endpoint(), exam=exam, **canary))

    async def asked() -> bool:
        return bool(new.generates)

    await eventually(asked)
    await world.table(world.route(old.endpoint()), world.route(new.endpoint(), **canary))

    async def aborted() -> bool:
        return len(new.aborts) == 1

    await eventually(aborted)
    status = await world.control(wire.GetRouterStatus())
    assert status.canaries["tiny"].examined is None
    new.stalled = False
    await world.table(world.route(old.endpoint()), world.route(new.endpoint(), exam=exam, **canary))
    assert isinstance(await verdict(world, Paper(exam.smoke, None)), Passed)


@pytest.mark.nightly
def test_of_four_revisions_the_one_that_answers_alike_takes_over(tmp_path: Path) -> None:
    """The whole of it: a control plane with real engines."""
    (tmp_path / "wrong.jinja").write_text("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}")
    steps = (
        "steps: [{weight: 100, hold: 100ms}], analysis: {minRequests: 1, onInconclusive: Promote, maxDrift: 5%}"
    )
    plane = ForkedPlane(tmp_path)
    plane.env.pop("PYTHONPATH")  # no stand-in

    def manifest(source: str, more: str = "") -> str:
        return (
            "apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {name: chat}\n"
            f"spec:\n  source: {source}\n{more}  rollout: {{strategy: Canary, canary: {{{steps}}}}}\n"
        )

    right = f"file://{copy_of_tiny(tmp_path / 'right', lambda _: None)}"
    wrong = [
        manifest(f"file://{copy_of_tiny(tmp_path / 'perturbed', perturb)}"),
        manifest(f"file://{copy_of_tiny(tmp_path / 'rope', move_rope)}"),
        manifest(right, f"  tokenizer: {{chatTemplateFile: {tmp_path / 'wrong.jinja'}}}\n"),
    ]
    plane.start()
    try:
        plane.apply(GATEWAY)
        plane.apply(manifest(right))
        stable = plane.wait_served("chat")["status"]["servedRevision"]
        for each in wrong:
            tried = plane.apply(each)["model/chat"]["revision"]
            why = given_up(plane, "chat", tried)
            assert why.startswith("AnswersDrifted: "), why
            assert "CanaryStep" not in reasons(plane, "chat"), "before it had any request"
            wait_settled(plane, "chat", "RolledBack", stable)
        same = plane.apply(manifest(right, "  env: [{name: ROUND, value: '2'}]\n"))["model/chat"]["revision"]
        served = waiting.eventually(
            lambda: plane.view("chat")["status"]["servedRevision"] == same, "it passes", 120
        )
        assert served
        assert "CanaryExamined" in reasons(plane, "chat")
    finally:
        plane.end()
