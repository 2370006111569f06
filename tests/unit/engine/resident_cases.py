"""Engines whose steps stay on the device, against engines whose steps come back to the host.

`test_resident` runs this file in a process of its own, in Triton's interpreter: in CI requests that stay on the
device, some that go by the host, one that fails, and what needs no engine; all by night. On a machine with a GPU
`pytest -m '' tests/unit/engine/resident_cases.py` runs it there, graphs and all.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from tests.effort import times
from tests.engine_specs import run, tiny_spec
from tests.unit.engine.test_models import build, in_mxfp4
from torch import Tensor

from quire_engine.blocks import BlockPool
from quire_engine.config import BatchLimits
from quire_engine.engine import DTYPES, KV_DTYPES, Engine
from quire_engine.models import KVCache, load_model
from quire_engine.request import Request
from quire_engine.resident import program as resident_program
from quire_engine.resident import runner as resident_runner
from quire_engine.resident.program import StepProgram
from quire_engine.resident.runner import ResidentRunner
from quire_engine.resident.table import RequestTable
from quire_engine.scheduler import Scheduler
from quire_engine.step import PENDING, Draw, Scheduled, StepPlan, StepResult
from quire_kernels import HeadNorms, Kernels, Product, load
from quire_kernels.reference import ReferenceKernels
from quire_kernels.tilings import Entry
from quire_kernels.triton import INTERPRETED, TritonKernels, quantized
from quire_kernels.triton.timing import records_of
from quire_kernels.tuning import spelled
from quire_schemas.checkpoint import read_profile
from quire_schemas.sizing import weight_bytes
from quire_schemas.wire import Delta, EngineSpec, Generate, Limits, Quantization, Sampling

torch.set_num_threads(1)
# rows of padding hold whatever memory held, and numpy, which interprets, tells when that overflows
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
WHOLE = "QUIRE_WHOLE" in os.environ
"""Every kernel is Triton's own: by night, and on a GPU."""


@pytest.fixture(autouse=True)
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few they are, those who only draw are planned as one."""
    monkeypatch.setattr(Scheduler, "fewest", 1)


needs_no_graphs = pytest.mark.skipif(not INTERPRETED, reason="a graph does not come by what is planted here")


class Quick(TritonKernels):
    """The Triton back-end with torch for what neither begins nor ends a step: the interpreter takes milliseconds a
    program, and `triton_ops` has tried those."""

    def __init__(self) -> None:
        super().__init__()
        self.reference = ReferenceKernels()

    def product(self, weight: Tensor, bias: Tensor | None) -> Product:
        return self.reference.product(weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.reference.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.reference.add_rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self.reference.silu_mul(gate_up)

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        return self.reference.gelu_mul(gate_up)

    def place_heads(
        self,
        qkv: Tensor,
        num_heads: int,
        norms: HeadNorms | None,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        slots: Tensor,
    ) -> Tensor:
        if cache.dtype.itemsize == 1:
            return super().place_heads(qkv, num_heads, norms, cos, sin, cache, slots)
        _, blocks, size, kv_heads, head = cache.shape
        query, key = qkv[:, :num_heads], qkv[:, num_heads : num_heads + kv_heads]
        if norms is not None:
            query = self.rms_norm(query, norms.query, norms.eps)
            key = self.rms_norm(key, norms.key, norms.eps)
        key, real = self.reference.rotary(key, cos, sin), slots >= 0
        for side, new in zip(cache, (key, qkv[:, num_heads + kv_heads :]), strict=True):
            inside = side.view(blocks, kv_heads, size, head)
            inside[slots[real] // size, :, slots[real] % size] = new[real]
        return self.reference.rotary(query, cos, sin)


def kernels_of(backend: str) -> Kernels:
    return Quick() if backend == "triton" and INTERPRETED and not WHOLE else load(backend)


def engine_of(spec: EngineSpec, backend: str) -> Engine:
    folder, device = Path(spec.model_dir), DEVICE if backend == "triton" else torch.device("cpu")
    profile, kernels = read_profile(folder), kernels_of(backend)
    model = load_model(
        folder,
        profile,
        dtype=DTYPES[spec.dtype],
        device=device,
        kernels=kernels,
        on_progress=lambda *_: None,
        quantization=spec.quantization,
    )
    if spec.quantization is not None:
        assert model.bytes == weight_bytes(profile, spec.dtype, spec.quantization)
        assert all(part.device.type == device.type for part in model.parameters())
    kv = KVCache.allocate(profile, spec.num_blocks, spec.block_size, KV_DTYPES[spec.kv_dtype], device)
    return Engine.assemble(spec, profile, model, kv)


def spec_of(folder: Path, **fields: Any) -> EngineSpec:
    return tiny_spec(
        model_dir=str(folder),
        max_model_len=128,
        num_blocks=64,
        max_num_seqs=3,
        max_num_batched_tokens=16,
        **fields,
    )


def texts(deltas: dict[str, list[Delta]]) -> dict[str, tuple[list[int], str | None]]:
    return {
        name: ([token for delta in heard for token in delta.token_ids], heard[-1].finish_reason)
        for name, heard in deltas.items()
    }


def requests(count: int, **sampling: Any) -> list[Generate]:
    rng = random.Random(3)
    return [
        Generate(
            str(number),
            [rng.randrange(1, 90) for _ in range(rng.randint(2, 14))],
            Sampling(
                max_tokens=rng.randint(2, 6), **{"temperature": 0.0, "ignore_eos": number % 2 == 0} | sampling
            ),
        )
        for number in range(count)
    ]


BY_NIGHT = [pytest.param(name, marks=pytest.mark.nightly) for name in ("llama-biases", "gemma2", "gemma3-capped")]


@pytest.mark.parametrize("name", ["qwen3-mqa-sliding", *BY_NIGHT])
def test_greedy_answers_are_those_of_the_host(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    expected = texts(run(engine_of(spec_of(tmp_path), "cpu"), *requests(5)))
    for ahead, fits in ((True, True), (False, True), (True, False))[: times(1, 3) if INTERPRETED else 3]:
        engine = engine_of(spec_of(tmp_path, async_scheduling=ahead), "triton")
        assert isinstance(engine.runner, ResidentRunner)
        if not fits:  # as if its prompts were long: kernel by kernel
            engine.runner.program.fits = lambda num_tokens: False  # type: ignore[method-assign]
        assert texts(run(engine, *requests(5))) == expected


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_experts_stay_on_the_device(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    count = 5 if WHOLE or not INTERPRETED else 2
    expected = texts(run(engine_of(spec_of(tmp_path), "reference"), *requests(count)))
    engine = engine_of(spec_of(tmp_path, async_scheduling=True), "triton")
    assert isinstance(engine.runner, ResidentRunner)
    assert texts(run(engine, *requests(count))) == expected


def test_an_engine_launches_the_tilings_that_are_known_warm_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build("gemma2", tmp_path)

    def assembled() -> tuple[ResidentRunner, TritonKernels]:
        runner = engine_of(spec_of(tmp_path, enforce_eager=True), "triton").runner
        assert isinstance(runner, ResidentRunner)
        assert isinstance(runner._model.kernels, TritonKernels)
        return runner, runner._model.kernels

    runner, kernels = assembled()
    assert (runner.tuned.known, len(kernels._chip.choices)) == (0, 0)
    trial = next(trial for trial in kernels.trials(runner.served) if trial.family.file == "attention")
    record = records_of(kernels.card)("attention")
    assert not record.path.exists(), "who only reads decides nothing"
    entry = Entry(spelled(trial.candidates[-1]), 1.0, 2.0, 2)
    record.add({trial.family.name: entry})
    runner, kernels = assembled()
    assert kernels._chip.choices.get(*trial.family) == trial.candidates[-1]
    assert runner.tuned.known == 1
    assert record.read() == {trial.family.name: entry}


@pytest.mark.nightly
def test_preempted_and_sent_again(tmp_path: Path) -> None:
    build("llama-mqa", tmp_path)
    spec = msgspec.structs.replace(spec_of(tmp_path, async_scheduling=True), block_size=4)

    def long() -> list[Generate]:
        sampling = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
        return [Generate(str(number), [number + 1] * 9, sampling) for number in range(3)]

    expected = texts(run(engine_of(spec, "cpu"), *long()))
    crowded = engine_of(msgspec.structs.replace(spec, num_blocks=12), "triton")
    assert texts(run(crowded, *long())) == expected
    assert crowded.stats().preemptions > 0


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["llama-tied", "gemma2"])
def test_a_seed_gives_the_same_answer_in_any_company(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    asked = {"temperature": 0.9, "seed": 11, "top_k": 20, "top_p": 0.9}
    alone = engine_of(spec_of(tmp_path), "triton")
    one = requests(1, **asked)[0]
    expected = texts(run(alone, one))["0"]
    together = engine_of(spec_of(tmp_path, async_scheduling=True), "triton")
    assert texts(run(together, *requests(4, **asked)))["0"] == expected
    other = engine_of(spec_of(tmp_path), "triton")
    assert texts(run(other, requests(1, **asked | {"seed": 12})[0]))["0"] != expected


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("llama", Quantization("int4", "fp32", 32)),
        ("qwen2-tied", Quantization("int8")),
        ("llama-biases", Quantization("int8", "fp32")),
        ("qwen2-tied", Quantization("int4", "fp32", 32)),
        ("mixtral", Quantization("int8", "fp32")),
        ("mixtral", Quantization("int4", "fp32", 32)),
        ("mixtral", Quantization("fp8", "fp32")),
        pytest.param(
            *("llama-biases", Quantization("fp8", "fp8")),
            marks=pytest.mark.skipif(not INTERPRETED, reason="tensor cores keep few bits of a sum in fp8"),
        ),
        ("qwen2-tied", Quantization("fp8", "fp32")),
    ],
    ids=str,
)
def test_quantized_weights_give_the_answers_of_the_reference(
    name: str, quantization: Quantization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole numbers are the same anywhere, and what they are multiplied with is rounded in the same places."""
    build(name, tmp_path)
    if INTERPRETED:  # which takes its time for each program
        monkeypatch.setattr(quantized, "line_for", lambda outputs, width: quantized.Line(128, 64, 4, 1))
    spec = spec_of(tmp_path, quantization=quantization, async_scheduling=True)
    expected = texts(run(engine_of(spec, "reference"), *requests(3)))
    engine = engine_of(spec, "triton")
    assert isinstance(engine.runner, ResidentRunner)
    assert texts(run(engine, *requests(3))) == expected


@pytest.mark.nightly
def test_experts_in_mxfp4_give_the_answers_of_the_reference(tmp_path: Path) -> None:
    in_mxfp4(tmp_path)
    spec = spec_of(tmp_path, quantization=Quantization("mxfp4", "fp32"), async_scheduling=True)
    expected = texts(run(engine_of(spec, "reference"), *requests(3)))
    engine = engine_of(spec, "triton")
    assert texts(run(engine, *requests(3))) == expected
    widened = engine_of(spec_of(tmp_path, async_scheduling=True), "triton")
    assert texts(run(widened, *requests(3))) == expected


@pytest.mark.nightly
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_keys_and_values_in_8_bits_give_the_answers_of_the_reference(kv_dtype: str, tmp_path: Path) -> None:
    build("llama", tmp_path)
    spec = spec_of(tmp_path, kv_dtype=kv_dtype, async_scheduling=True)
    expected = texts(run(engine_of(spec, "reference"), *requests(3)))
    engine = engine_of(spec, "triton")
    assert texts(run(engine, *requests(3))) == expected


def test_what_the_device_cannot_do_goes_by_the_host_and_back(tmp_path: Path) -> None:
    """Penalties and log-probabilities need the host: a step with such a request goes there, the next one not."""
    build("qwen2", tmp_path)

    def mixed() -> list[Generate]:
        plain, special = requests(4), requests(4, repetition_penalty=1.3, logprobs=2)
        return [*plain[:2], Generate("special", special[2].token_ids, special[2].sampling), plain[3]]

    expected = texts(run(engine_of(spec_of(tmp_path), "cpu"), *mixed()))
    for ahead in (True, False)[: times(1, 2) if INTERPRETED else 2]:
        engine = engine_of(spec_of(tmp_path, async_scheduling=ahead), "triton")
        begun: list[int] = []
        executed: list[int] = []
        runner: Any = engine.runner
        begin, general = runner.begin, runner._general.execute
        runner.begin = lambda plan, begin=begin, begun=begun: begun.append(plan.step) or begin(plan)
        runner._general.execute = lambda plan, go=general, to=executed: to.append(plan.step) or go(plan)
        assert texts(run(engine, *mixed())) == expected
        assert begun
        assert executed


@needs_no_graphs
def test_logits_that_are_not_finite_end_one_request(tmp_path: Path) -> None:
    build("llama", tmp_path)
    expected = texts(run(engine_of(spec_of(tmp_path), "cpu"), *requests(3)))
    engine = engine_of(spec_of(tmp_path, async_scheduling=True), "triton")
    runner: Any = engine.runner
    model, calls = runner._model, [0]
    narrow = model.narrow_logits

    def spoiled(states: Tensor) -> Tensor:
        calls[0] += 1
        logits: Tensor = narrow(states)
        if calls[0] == 3:
            logits[0] = torch.nan
        return logits

    model.narrow_logits = spoiled
    heard = run(engine, *requests(3))
    assert [name for name, deltas in heard.items() if deltas[-1].error_code == "numerical_error"] == ["0"]
    assert texts(heard)["1"] == expected["1"]
    assert texts(heard)["2"] == expected["2"]


@pytest.mark.nightly
def test_a_step_that_cannot_be_begun_harms_nobody_else(tmp_path: Path) -> None:
    build("llama", tmp_path)
    expected = texts(run(engine_of(spec_of(tmp_path), "cpu"), *requests(4)))
    engine = engine_of(spec_of(tmp_path, async_scheduling=True), "triton")
    runner: Any = engine.runner
    begin, left = runner._begin, [2, 5]

    def sometimes(plan: Any) -> Any:
        if plan.step in left:
            left.remove(plan.step)
            runner._table.spans(plan)
            raise RuntimeError("planted")
        return begin(plan)

    runner._begin = sometimes
    assert texts(run(engine, *requests(4))) == expected
    assert not left


@pytest.mark.nightly
@pytest.mark.parametrize("fails", [False, True])
def test_more_seats_than_the_table_was_made_for(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room is made once, for all of them; where memory is short at first, no answer is wrong."""
    build("llama", tmp_path)
    expected = texts(run(engine_of(spec_of(tmp_path), "cpu"), *requests(5)))
    engine = engine_of(spec_of(tmp_path, async_scheduling=True), "triton")
    made: list[int] = []
    runner: Any = engine.runner
    stream = runner.program._stream
    assert (stream is not None) is (DEVICE.type == "cuda")

    def planted(model: Any, kv: Any, table: RequestTable, **sizes: Any) -> StepProgram:
        made.append(table.seats)
        if fails and len(made) == 1:
            raise torch.OutOfMemoryError("planted")
        return StepProgram(model, kv, table, **sizes)

    monkeypatch.setattr(resident_runner, "StepProgram", planted)
    engine.set_limits(Limits("h1", 5, 16, True))
    assert texts(run(engine, *requests(5))) == expected
    assert made == [5] * (1 + fails)
    assert runner.program._stream is stream, "cuBLAS keeps tens of megabytes for each stream that it meets"


def test_a_size_that_takes_no_less_than_a_larger_one_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {64: 3.0, 128: 5.0, 192: 9.0, 256: 6.0, 512: 6.01}
    monkeypatch.setattr(resident_program, "_seconds", lambda graph: seconds[graph])
    shapes: Any = {size: SimpleNamespace(graph=size) for size in seconds}
    # of 320 there is no graph: nobody knows
    sizes = (64, 128, 192, 256, 320, 512)
    assert resident_program._worth_having(sizes, shapes) == (64, 128, 256, 320, 512)
    seconds[256] = 6.2
    assert resident_program._worth_having(sizes, shapes) == (64, 128, 320, 512)


def test_a_row_whose_token_is_awaited_is_given_to_nobody() -> None:
    table = RequestTable(2, 1, 8, 16, DEVICE)
    draw = Draw(Sampling(max_tokens=1, temperature=0.0), 0, 1, ())

    def item(ticket: int, tokens: tuple[int, ...], start: int, block: int) -> Scheduled:
        return Scheduled(str(ticket), ticket, tokens, start, start + len(tokens), ((block,),), draw)

    def plan(*items: Scheduled) -> StepPlan:
        return StepPlan(0, items)

    row = int(table.addresses(plan(item(1, (5,), 3, 0)))[0, 0])
    for other in (2, 3, 4):  # prompts of a step of their own, each of which takes a row
        table.spans(plan(item(other, (1, 2, 3), 0, other)))
        table.addresses(plan(item(1, (7,), other + 2, 0)))
    assert table.spans(plan(item(5, (1, 2), 0, 9), item(1, (PENDING,), 7, 0)))[1, 0] == row


def test_columns_say_what_items_say() -> None:
    """Two tables are told the same plans, one by columns: both send the same, whoever joins or leaves."""
    rng = random.Random(5)
    scheduler = Scheduler(BlockPool(200, 4, [None, None]), BatchLimits(6, 64, True), max_model_len=200)
    tables = [RequestTable(6, 2, 50, 4, DEVICE) for _ in range(2)]
    given_out: list[StepPlan] = []
    seen, number = 0, 0
    for _ in range(300):
        if rng.random() < 0.1:
            number += 1
            asked = Sampling(rng.randint(5, 90), temperature=number / 4, top_k=3, top_p=0.5, min_p=0.25)
            message = Generate(str(number), [1] * rng.randint(1, 20), asked)
            scheduler.add(Request.of(message, eos_token_ids=(2,), seed=number << 40, received_at=0.0))
        if rng.random() < 0.02:
            scheduler.abort(str(rng.randint(1, number + 1)))
        plan = scheduler.schedule()
        if plan.num_items and rng.random() < 0.95:  # else it goes by the host
            items = StepPlan(plan.step, plan.items)
            singles = all(len(item.token_ids) == 1 and item.draw is not None for item in plan.others)
            one, other = (
                table.addresses(same) if singles else table.spans(same)
                for table, same in zip(tables, (plan, items), strict=True)
            )
            assert one.tolist() == other.tolist()
            assert torch.equal(tables[0].tables, tables[1].tables)
            how = tables[0].draws
            assert torch.equal(how.seed, tables[1].draws.seed)
            for table in tables if singles else ():  # as the device does
                for row, _, _, *grown in one.tolist():
                    for group, (place, block) in enumerate(zip(grown[::2], grown[1::2], strict=True)):
                        if place >= 0:
                            table.tables[group, row, place] = block
            for item, row in zip(plan.items, one[:, 0].tolist(), strict=True):
                held = tables[0].tables[:, row, : len(item.tables[0])]
                assert held.tolist() == [list(table) for table in item.tables]
                if item.draw is not None:
                    told = [column[row].item() for column in (how.top_k, how.top_p, how.min_p, how.seed)]
                    assert told == [3, 0.5, 0.25, item.draw.seed]
                    assert how.temperature[row].item() == item.draw.sampling.temperature
            seen += plan.steady is not None
        given_out += [plan] if plan.num_items else []
        if len(given_out) > 1 or not plan.num_items:
            done = given_out.pop(0) if given_out else plan
            tokens = {item.request_id: 2 if rng.random() < 0.01 else 3 for item in done.items if item.draw}
            if done.num_items:
                scheduler.commit(done, StepResult(tokens))
    assert seen > 100


@pytest.mark.nightly
def test_a_recording_begins_with_rows_that_nobody_had(tmp_path: Path) -> None:
    build("llama", tmp_path)
    asked: dict[str, Any] = {"temperature": 0.9, "seed": 11, "ignore_eos": True}
    expected = texts(run(engine_of(spec_of(tmp_path), "triton"), *requests(1, **asked)))
    engine = engine_of(spec_of(tmp_path, async_scheduling=True), "triton")
    engine.warm_up()
    engine.record(tmp_path / "trace")
    assert texts(run(engine, *requests(1, **asked))) == expected


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["llama-tied", "gemma2"])
def test_who_needs_the_host_changes_nobody_elses_draws(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    seeded = Sampling(max_tokens=8, temperature=0.9, seed=11, top_p=0.95, ignore_eos=True)
    special = Sampling(max_tokens=5, temperature=0.7, seed=3, logprobs=1, ignore_eos=True)
    alone = texts(run(engine_of(spec_of(tmp_path), "triton"), Generate("a", [1, 2, 3, 4], seeded)))["a"]
    for ahead in (False, True):
        engine = engine_of(spec_of(tmp_path, async_scheduling=ahead), "triton")
        both = run(engine, Generate("a", [1, 2, 3, 4], seeded), Generate("b", [5, 6, 7], special))
        assert texts(both)["a"] == alone


@pytest.mark.nightly
@needs_no_graphs
def test_what_is_no_token_goes_into_no_step(tmp_path: Path) -> None:
    build("llama", tmp_path)
    engine = engine_of(spec_of(tmp_path, async_scheduling=True), "triton")
    runner: Any = engine.runner
    model, calls, seen = runner._model, [0], list[int]()
    narrow, forward = model.narrow_logits, model.forward

    def spoiled(states: Tensor) -> Tensor:
        calls[0] += 1
        logits: Tensor = narrow(states)
        if calls[0] == 2:
            logits[0] = torch.nan
        return logits

    def watched(ids: Tensor, *rest: Any) -> Any:
        seen.extend(ids.tolist())
        return forward(ids, *rest)

    model.narrow_logits, model.forward = spoiled, watched
    engine.add(Generate("a", [1, 2, 3], Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)))
    heard = engine.step() + engine.step()
    engine.add(Generate("b", [4, 5], Sampling(max_tokens=3, temperature=0.0, logprobs=1, ignore_eos=True)))
    while engine.has_work:
        heard += engine.step()
    assert [delta.id for delta in heard if delta.error_code == "numerical_error"] == ["a"]
    assert min(seen) >= 0


@pytest.mark.nightly
@pytest.mark.parametrize("eager", [False, True])
def test_steps_are_captured_unless_that_is_forbidden(eager: bool, tmp_path: Path) -> None:
    build("llama", tmp_path)
    expected = texts(run(engine_of(spec_of(tmp_path), "cpu"), *requests(3)))
    engine = engine_of(spec_of(tmp_path, async_scheduling=True, enforce_eager=eager), "triton")
    assert texts(run(engine, *requests(3))) == expected
    runner = engine.runner
    assert isinstance(runner, ResidentRunner)
    assert (runner.program.captured > 0) is (DEVICE.type == "cuda" and not eager)
