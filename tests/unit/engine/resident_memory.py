"""What a resident engine holds besides weights and cache, against `quire_schemas.gpu_sizing`.

`test_resident` runs this file in a process of its own, where torch's profiler sees every allocation of the CPU;
on a machine with a GPU `pytest tests/unit/engine/resident_memory.py` counts the real ones.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.engine.test_footprint import config, peak, write_checkpoint
from triton.runtime.interpreter import InterpretedFunction

from quire_engine.masks import MaskMaker
from quire_engine.models import KVCache, load_model
from quire_engine.resident.program import DECODE_SIZES, MIXED_ITEMS, MIXED_TOKENS, mixed_sizes
from quire_engine.resident.runner import ResidentRunner
from quire_engine.resident.table import RequestTable
from quire_engine.runner import ModelRunner
from quire_engine.step import Draw, Scheduled, StepPlan
from quire_kernels import load
from quire_kernels.reference import ReferenceKernels
from quire_kernels.triton import INTERPRETED, TritonKernels, attention, experts, sample
from quire_kernels.triton.attention import num_splits
from quire_kernels.tuning import Choices
from quire_schemas import gpu_sizing, sizing
from quire_schemas.checkpoint import ModelProfile
from quire_schemas.wire import Quantization, Sampling

torch.set_num_threads(1)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SMALL: dict[str, Any] = {"max_position_embeddings": 2048}
WIDE_MLP = SMALL | {"intermediate_size": 1500}
WIDE_HEAD = SMALL | {"vocab_size": 9000}
MANY_HEADS = SMALL | {"num_attention_heads": 16, "num_key_value_heads": 2}
SLIDING = SMALL | {
    "architecture": "Qwen2ForCausalLM",
    "sliding_window": 40,
    "use_sliding_window": True,
    "max_window_layers": 1,
}
WIDE_QUANTIZED = SMALL | {"intermediate_size": 1504}
EXPERTS = SMALL | {"architecture": "MixtralForCausalLM"}
MANY_EXPERTS = SMALL | {
    "architecture": "Qwen3MoeForCausalLM",
    "mlp_only_layers": [1],
    "num_experts": 400,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
GEMMA3 = SMALL | {"architecture": "Gemma3ForCausalLM", "sliding_window": 40, "final_logit_softcapping": 2.0}
GPT_OSS = SMALL | {"architecture": "GptOssForCausalLM", "sliding_window": 40}
PACKED = GPT_OSS | {"quantization_config": {"quant_method": "mxfp4"}}
SHAPES = [SMALL, WIDE_MLP, WIDE_HEAD, MANY_HEADS, SLIDING, EXPERTS, MANY_EXPERTS, GEMMA3, GPT_OSS]
SEATS, LENGTH, BLOCK = 3, 2048, 16
MXFP4 = Quantization("mxfp4", "fp32")


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the GPU no kernel runs: the interpreter would keep hold of tensors, and what a launcher allocates does
    not depend on what its kernel computes.
    """
    if INTERPRETED:
        monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **__: None)


def highest(work: Callable[[], object]) -> int:
    """The most bytes that `work` holds at any time above what was held before: those asked for. What the allocator
    hands out is up to a MiB more each, which the plan's overhead counts.
    """
    if INTERPRETED:
        return peak(work)
    work()
    gc.collect()  # a model of the test before, collected meanwhile, would count as less
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    work()
    return int(torch.cuda.memory_stats()["requested_bytes.all.peak"] - before)


def runner_of(
    folder: Path,
    shape: dict[str, Any],
    tokens: int,
    quantization: Quantization | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[ModelProfile, ResidentRunner]:
    described = write_checkpoint(folder, config(**shape))
    model = load_model(
        folder,
        described,
        dtype=dtype,
        device=DEVICE,
        kernels=load("triton"),
        on_progress=lambda *_: None,
        quantization=quantization,
    )
    assert model.dtype == dtype
    assert model.bytes == sizing.weight_bytes(described, str(dtype).removeprefix("torch."), quantization)
    kv = KVCache.allocate(described, 512, BLOCK, dtype, DEVICE)
    general = ModelRunner(
        model, kv, block_size=BLOCK, head_rows=SEATS, device=DEVICE, masks=MaskMaker(meanwhile=False)
    )
    runner = ResidentRunner(
        general, seats=SEATS, max_num_batched_tokens=tokens, max_model_len=LENGTH, captures=False
    )
    return described, runner


def plan_of(groups: int, tokens: int, **sampling: Any) -> StepPlan:
    """A long prompt beside two sequences that have one new token each."""
    draw = Draw(Sampling(max_tokens=9, **sampling), seed=1, num_prompt=1, ending_ids=())
    blocks = -(-LENGTH // BLOCK)
    items = []
    for at, (start, count) in enumerate(((0, tokens - 2), (LENGTH - 1, 1), (100, 1))):
        tables = tuple(tuple(range(at * blocks, (at + 1) * blocks)) for _ in range(groups))
        history = (1,) * (start + count)
        items.append(Scheduled(str(at), at, (1,) * count, start, start + count, tables, draw, history))
    return StepPlan(1, tuple(items))


@pytest.mark.parametrize("tokens", [100, 1000, 2000], ids=["padded", "program", "launched"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_stays_below_the_plan(shape: dict[str, Any], tokens: int, tmp_path: Path) -> None:
    described, runner = runner_of(tmp_path, shape, tokens)
    parts = sizing.gpu_activations(
        described, "float32", tokens, SEATS, LENGTH, block_size=BLOCK, enforce_eager=True
    )
    plan = plan_of(len(sizing.kv_groups(described)), tokens, temperature=0.8, top_p=0.9)
    assert runner.takes(plan)
    found = highest(lambda: runner.execute(plan))
    assert found <= parts["step"]
    # with a few tokens the room of splits counts, which is that of the largest GPU
    assert found >= (0.5 if tokens == 100 else 0.75) * parts["step"], "the bound is no idle talk"


@pytest.mark.parametrize("tokens", [100, 1000, 2000], ids=["padded", "program", "launched"])
@pytest.mark.parametrize(
    "quantization",
    [
        Quantization("int8"),
        Quantization("int8", "fp32"),
        Quantization("int4", "fp32", 32),
        Quantization("fp8", "fp8"),
        pytest.param(Quantization("fp8", "fp32"), marks=pytest.mark.nightly),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "shape", [WIDE_HEAD, WIDE_QUANTIZED, pytest.param(GEMMA3, marks=pytest.mark.nightly)], ids=str
)
def test_a_quantized_step_stays_below_the_plan(
    shape: dict[str, Any], quantization: Quantization, tokens: int, tmp_path: Path
) -> None:
    described, runner = runner_of(tmp_path, shape, tokens, quantization)
    parts = sizing.gpu_activations(
        described,
        "float32",
        tokens,
        SEATS,
        LENGTH,
        block_size=BLOCK,
        enforce_eager=True,
        quantization=quantization,
    )
    plan = plan_of(len(sizing.kv_groups(described)), tokens, temperature=0.8, top_p=0.9)
    found = highest(lambda: runner.execute(plan))
    assert found <= parts["step"]
    # room for the partial sums of the largest chip, and for part of a large weight unpacked, is counted whole
    constant = gpu_sizing.ROOM_BYTES + (
        0 if quantization.activations in ("int8", "fp8") else gpu_sizing.SCRATCH_BYTES
    )
    assert found >= 0.6 * (parts["step"] - constant)


@pytest.mark.nightly
@pytest.mark.parametrize("tokens", [100, 1000, 2000], ids=["padded", "program", "launched"])
@pytest.mark.parametrize(
    "quantization",
    [Quantization("int8", "fp32"), Quantization("int4", "fp32", 32), Quantization("fp8", "fp8")],
    ids=str,
)
def test_a_step_of_experts_in_fewer_bits_stays_below_the_plan(
    quantization: Quantization, tokens: int, tmp_path: Path
) -> None:
    test_a_quantized_step_stays_below_the_plan(EXPERTS, quantization, tokens, tmp_path)


@pytest.mark.parametrize(
    "tokens", [100, pytest.param(2000, marks=pytest.mark.nightly)], ids=["padded", "launched"]
)
def test_a_step_of_experts_in_mxfp4_stays_below_the_plan(tokens: int, tmp_path: Path) -> None:
    described, runner = runner_of(tmp_path, PACKED, tokens, MXFP4)
    sizes: dict[str, Any] = {"block_size": BLOCK, "enforce_eager": True}
    parts = sizing.gpu_activations(described, "float32", tokens, SEATS, LENGTH, **sizes, quantization=MXFP4)
    widened = sizing.gpu_activations(described, "float32", tokens, SEATS, LENGTH, **sizes)
    assert parts == widened | {"loading": parts["loading"]}, "only weights are others"
    plan = plan_of(len(sizing.kv_groups(described)), tokens, temperature=0.8, top_p=0.9)
    assert 0.5 * parts["step"] <= highest(lambda: runner.execute(plan)) <= parts["step"]


@pytest.mark.parametrize(
    "quantization",
    [
        Quantization("int8"),
        Quantization("int4", "fp32", 32),
        Quantization("fp8", "fp8"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [{}, EXPERTS], ids=["dense", "experts"])
def test_quantizing_stays_below_the_plan(kind: dict[str, Any], quantization: Quantization, tmp_path: Path) -> None:
    if kind:
        quantization = Quantization(quantization.method, "fp32", quantization.group_size)
    described = write_checkpoint(tmp_path, config(**WIDE_HEAD | {"vocab_size": 40_000} | kind))
    found, planned = loading(tmp_path, described, quantization), gpu_sizing.loading_bytes(described, quantization)
    assert 0.1 * planned <= found <= planned
    parts = sizing.gpu_activations(described, "float32", 64, 1, 64, block_size=BLOCK, quantization=quantization)
    assert sum(parts.values()) >= planned


def test_loading_mxfp4_stays_below_the_plan(tmp_path: Path) -> None:
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 1, "num_local_experts": 2}
    described = write_checkpoint(
        tmp_path, config(**PACKED | wide | {"num_experts": None, "num_experts_per_tok": 1})
    )
    planned = gpu_sizing.loading_bytes(described, MXFP4)
    assert 0.2 * planned <= loading(tmp_path, described, MXFP4) <= planned


def loading(folder: Path, described: ModelProfile, quantization: Quantization) -> int:
    """The most that is there beside weights while they are read."""
    models: list[Any] = []  # all stay: when one that is dropped is collected, nobody can tell

    def load_it() -> None:
        models.append(
            load_model(
                folder,
                described,
                dtype=torch.float32,
                device=DEVICE,
                kernels=load("triton"),
                on_progress=lambda *_: None,
                quantization=quantization,
            )
        )

    return highest(load_it) - sizing.weight_bytes(described, "float32", quantization)


@pytest.mark.parametrize(("shape", "tokens"), [(WIDE_HEAD, 20), (WIDE_HEAD, 900), (WIDE_MLP, 900)], ids=str)
def test_a_step_by_way_of_the_host_stays_below_the_plan(
    shape: dict[str, Any], tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described, runner = runner_of(tmp_path, shape, tokens)
    parts = sizing.gpu_activations(
        described, "float32", tokens, SEATS, LENGTH, block_size=BLOCK, enforce_eager=True
    )
    if INTERPRETED:  # what no kernel has computed is no logits
        model = runner._general.model
        monkeypatch.setattr(model, "logits", lambda states: torch.randn(states.shape[0], described.vocab_size))
        monkeypatch.setattr(model.kernels, "largest", ReferenceKernels().largest, raising=False)
    plan = plan_of(1, tokens, temperature=0.7, top_p=0.9, frequency_penalty=0.1)
    assert not runner.takes(plan)
    found = highest(lambda: runner.execute(plan))
    assert found <= parts["step"] + parts["general"]
    assert found >= 0.4 * (parts["step"] + parts["general"])


def test_what_lies_there_all_the_time_is_what_the_plan_says(tmp_path: Path) -> None:
    described, runner = runner_of(tmp_path, SLIDING, 64)
    groups = len(sizing.kv_groups(described))
    parts = sizing.gpu_activations(described, "float32", 64, SEATS, LENGTH, block_size=BLOCK)
    table = RequestTable(SEATS, groups, -(-LENGTH // BLOCK), BLOCK, DEVICE)
    assert parts["table"] == table.bytes + sample.scratch(SEATS, described.vocab_size, DEVICE).bytes
    held: set[int] = set()
    total = 0
    program = runner.program
    shapes = [
        *(program._decode_shape(size) for size in program._decode_sizes),
        *(
            program._mixed_shape(tokens, items)
            for items, sizes in program._mixed_tokens.items()
            for tokens in sizes
        ),
    ]
    for shape in shapes:
        buffers = shape.buffers
        tensors = [shape.tokens, *(getattr(buffers, name) for name in buffers.__slots__ if name != "batches")]
        for batch in buffers.batches:
            tensors += [batch.positions, batch.query_starts, batch.context_lens, batch.logits_rows]
        for tensor in tensors:
            if tensor.untyped_storage().data_ptr() not in held:
                held.add(tensor.untyped_storage().data_ptr())
                total += tensor.untyped_storage().nbytes()
    assert total <= parts["buffers"]


@pytest.mark.parametrize("seats", [1, 64, 256, 1024])
def test_the_two_sides_agree_on_the_shapes_of_programs(seats: int) -> None:
    assert MIXED_TOKENS[-1] == gpu_sizing.CAPTURED_TOKENS
    assert len({*DECODE_SIZES, seats}) <= gpu_sizing.DECODE_SHAPES
    assert len(MIXED_TOKENS) * len({*MIXED_ITEMS, seats}) <= gpu_sizing.MIXED_SHAPES
    for tokens in range(1, 4096):
        assert mixed_sizes(tokens)[-1] == min(gpu_sizing._filled(tokens), gpu_sizing.CAPTURED_TOKENS)


def test_the_two_sides_agree_on_experts() -> None:
    assert gpu_sizing.AT_ONCE == experts.AT_ONCE
    for every in (experts.GATED, experts.DOWN):
        assert min(tiling.rows for tiling in every) == gpu_sizing.LEAST_ROWS


@pytest.mark.parametrize("tokens", [1000, 2000])
def test_experts_of_some_tokens_after_the_others_stay_below_the_plan(
    tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for side in (experts, gpu_sizing):
        monkeypatch.setattr(side, "AT_ONCE", 900 * 2 * (128 + 64))
    test_a_step_stays_below_the_plan(EXPERTS, tokens, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("shape", "quantization"),
    [
        *itertools.product(
            (MANY_HEADS, WIDE_QUANTIZED),
            (None, Quantization("int8"), Quantization("int4", "bf16", 32), Quantization("fp8", "fp8")),
        ),
        (EXPERTS, None),
        (EXPERTS, Quantization("int4", "fp32", 32)),
        (PACKED, MXFP4),
    ],
    ids=str,
)
def test_timing_tilings_stays_below_the_plan(
    shape: dict[str, Any], quantization: Quantization | None, tmp_path: Path
) -> None:
    """Before the first step there is room for the widest one, and that is all there is."""
    described, runner = runner_of(tmp_path, shape, 1000, quantization)
    parts = sizing.gpu_activations(
        described,
        "float32",
        1000,
        SEATS,
        LENGTH,
        block_size=BLOCK,
        enforce_eager=True,
        quantization=quantization,
    )
    kernels = runner._model.kernels
    assert isinstance(kernels, TritonKernels)
    families = {trial.family: trial for trial in kernels.trials(runner.served)}
    assert len(families) >= 4
    for trial in families.values():
        for tiling in trial.candidates:
            found = highest(lambda trial=trial, tiling=tiling: trial.launch(trial.given(), tiling))  # type: ignore[misc]
            assert found <= parts["step"], (trial.family, tiling)


@pytest.mark.parametrize("shape", [SLIDING, GEMMA3, GPT_OSS], ids=str)
def test_tilings_are_timed_of_what_steps_look_up(
    shape: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, runner = runner_of(tmp_path, shape, 40, dtype=torch.float16)
    kernels = runner._model.kernels
    assert isinstance(kernels, TritonKernels)
    timed = {trial.family for trial in kernels.trials(runner.served)}
    asked = set[Any]()
    monkeypatch.setattr(Choices, "get", lambda _, *family: asked.add(family))
    with torch.inference_mode():
        for singles in range(SEATS):
            for longest in (1, 2, 12, 25, 40 - singles):
                runner._rehearse(singles, longest)
    # the head has as few rows as there are sequences, which nobody tells its product
    products = {family for family in timed if family.kernel == "product"}
    assert asked - products == timed - products
    assert {family.kernel for family in timed} >= {"attention.decode", "attention.prompts", "product"}
    assert any(family[0] == "product" for family in asked)
    assert asked <= timed


class Watched:
    """A kernel, and by which of its constants it is another one for other numbers and lengths of sequences."""

    def __init__(self, kernel: Any, seen: set[tuple[Any, ...]]) -> None:
        self._kernel, self._seen = kernel, seen

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*given: Any, **options: Any) -> Any:
            self._seen.add(tuple(options.get(name) for name in ("ITEMS", "SPLITS", "BLOCK_N", "num_warps")))
            return self._kernel[grid](*given, **options)

        return launch


@pytest.mark.parametrize("length", [50, 150, LENGTH])
def test_no_launched_step_needs_a_kernel_that_was_not_rehearsed(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some step would wait until it is compiled, and everybody with it."""
    _, runner = runner_of(tmp_path, MANY_HEADS, 100)
    runner._resize(99)
    seen = set[tuple[Any, ...]]()
    for name in ("_decode", "_prefill"):
        monkeypatch.setattr(attention, name, Watched(getattr(attention, name), seen))
    with torch.inference_mode():
        for sequences in runner._crowds():
            runner._rehearse(sequences - 1, 2)
        rehearsed = frozenset(seen)
        for sequences in range(2, 100):
            counts = (*(1,) * (sequences - 1), 9)
            words = torch.tensor([(-1, length - count, count, 1) for count in counts], dtype=torch.int32)
            runner.program.launched(words, sequences, torch.zeros(sum(counts), dtype=torch.int32))
    assert seen == rehearsed
    assert len(rehearsed) >= 2 + 2 + (not INTERPRETED), "of prompts for more than 64, and of several splits"


def test_the_two_sides_agree_on_the_room_of_splits() -> None:
    for multiprocessors in (8, 108, 132, 148, 192):
        for pairs in range(1, 700):
            splits = num_splits(multiprocessors, pairs, 1 << 20)
            assert splits == 1 or splits * pairs <= gpu_sizing.SPLIT_PAIRS
