"""What an engine really allocates against the arithmetic of `quire_schemas.sizing`.

Weights and cache must be equal to the byte. What a step allocates, counted by torch's profiler (every allocation
of the CPU allocator, those inside operations too), must stay below the bound, and the bound must not be idle talk.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.adapters import write_adapter
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from quire_engine.engine import KV_DTYPES
from quire_engine.masks import MaskMaker
from quire_engine.models import DecoderModel, KVCache, load_model
from quire_engine.runner import ModelRunner
from quire_engine.sampler import sample
from quire_engine.step import Draw, Scheduled, StepPlan
from quire_kernels import Kernels, PagedBatch, load
from quire_kernels.cpu import CpuKernels
from quire_kernels.reference import GATHER_BYTES, ReferenceKernels
from quire_kernels.reference.product import WIDENED
from quire_schemas import sizing
from quire_schemas.adapters import AdapterProfile, read_adapter
from quire_schemas.checkpoint import (
    ARCHITECTURES,
    DTYPE_BYTES,
    ModelProfile,
    expected_tensors,
    is_packed,
    profile_from_config,
    read_profile,
)
from quire_schemas.mxfp4 import packed_shapes
from quire_schemas.wire import WHOLE_VOCABULARY, Quantization, Sampling

torch.set_num_threads(1)
CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def config(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "dtype": "bfloat16",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 8192,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 192,
    } | changes


def write_checkpoint(folder: Path, description: dict[str, Any]) -> ModelProfile:
    """A folder with random weights of that description."""
    described = profile_from_config(description)
    stored = DTYPES[described.dtype]
    torch.manual_seed(0)
    tensors = dict[str, Tensor]()
    for name, shape in expected_tensors(described):
        if is_packed(described, name):
            codes, powers = packed_shapes(shape)
            tensors[f"{name}_blocks"] = torch.randint(256, codes, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(119, 123, powers, dtype=torch.uint8)
        else:
            tensors[name] = (torch.randn(shape) * 0.1).to(stored)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(description))
    return read_profile(folder)


def open_model(
    folder: Path,
    described: ModelProfile,
    dtype: str,
    kernels: Kernels | None = None,
    quantization: Quantization | None = None,
    adapters: Sequence[AdapterProfile] = (),
) -> DecoderModel:
    return load_model(
        folder,
        described,
        dtype=DTYPES[dtype],
        device=CPU,
        kernels=kernels or load("reference"),
        on_progress=lambda done, total: None,
        quantization=quantization,
        adapters=adapters,
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("tied", "kv_heads"), [(True, 1), (False, 2), (True, 4)])
@pytest.mark.parametrize(("dtype", "kv_dtype"), [("float32", "bfloat16"), ("bfloat16", "int8")])
def test_weights_and_cache_are_what_the_report_says(
    architecture: str, tied: bool, kv_heads: int, dtype: str, kv_dtype: str, tmp_path: Path
) -> None:
    described = write_checkpoint(
        tmp_path, config(architecture, tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    )
    model = open_model(tmp_path, described, dtype)
    for block_size in (8, 16, 32):
        report = sizing.fit(
            described,
            sizing.SizingRequest(
                dtype=dtype,
                kv_dtype=kv_dtype,
                block_size=block_size,
                max_num_seqs=3,
                max_num_batched_tokens=64,
                device="cpu",
                device_bytes_total=4 << 30,
                device_bytes_available=4 << 30,
                memory_share=0.9,
                max_model_len=100,
            ),
        )
        assert report.fits
        kv = KVCache.allocate(described, report.num_blocks, block_size, KV_DTYPES[kv_dtype], CPU)
        assert sum(parameter.nbytes for parameter in model.parameters()) == model.bytes == report.weights
        assert sum(tensor.nbytes for tensor in kv.tensors) == kv.bytes == report.kv
        assert report.num_blocks * sizing.kv_block_bytes(described, kv_dtype, block_size) == report.kv


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MixtralForCausalLM"])
def test_parameters_lie_in_memory_of_exactly_their_size(architecture: str, tmp_path: Path) -> None:
    """A parameter that is a view of something larger would hold more than it counts."""
    described = write_checkpoint(tmp_path, config(architecture, tie_word_embeddings=True))
    model = open_model(tmp_path, described, "float32")
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == model.bytes == sizing.weight_bytes(described, "float32")


INT8 = Quantization("int8")
INT4 = Quantization("int4", group_size=32)
METHODS = [INT8, Quantization("int8", "bf16"), INT4, Quantization("int4", "bf16", 64)]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES.keys() - {"GptOssForCausalLM"}))
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantization", [INT8, INT4], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_quantized_weights_are_what_the_report_says(
    architecture: str, tied: bool, quantization: Quantization, backend: str, tmp_path: Path
) -> None:
    described = write_checkpoint(tmp_path, config(architecture, tie_word_embeddings=tied))
    for dtype in ("float32", "bfloat16"):
        model = open_model(tmp_path, described, dtype, load(backend), quantization)
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
        assert sum(storages.values()) == model.bytes == sizing.weight_bytes(described, dtype, quantization)


@pytest.mark.parametrize(
    ("quantization", "stored", "backend"),
    [
        (INT8, "bfloat16", "cpu"),
        (INT8, "float32", "reference"),
        (INT4, "bfloat16", "reference"),
        (INT4, "float32", "cpu"),
    ],
)
def test_no_weight_is_there_twice_while_a_model_loads(
    quantization: Quantization, stored: str, backend: str, tmp_path: Path
) -> None:
    """What loading holds besides the weights is less than the largest of them, and part of the plan."""
    shape = config(dtype=stored, hidden_size=256, vocab_size=60_000, tie_word_embeddings=True)
    described = write_checkpoint(tmp_path, shape)
    kernels = load(backend)
    weights = sizing.weight_bytes(described, "bfloat16", quantization)
    found = peak(lambda: open_model(tmp_path, described, "bfloat16", kernels, quantization)) - weights
    if isinstance(kernels, CpuKernels):
        found += kernels.kept_bytes
    assert found <= sizing.activation_bytes(described, "bfloat16", 1, 1, 64, quantization=quantization)
    largest = max(math.prod(shape) for _, shape in expected_tensors(described))
    assert found < largest * DTYPE_BYTES[stored]


def test_the_two_sides_agree_on_the_gather_bound() -> None:
    assert sizing.GATHER_BYTES == GATHER_BYTES
    assert sizing.WIDENED == WIDENED


def peak(work: Callable[[], object]) -> int:
    """The most bytes that `work` holds at any time above what was held before."""
    work()  # caches of operations that are filled once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    changes: list[tuple[int, int]] = []

    def collect(events: Iterable[Any]) -> None:
        for event in events:
            if event.tag.name == "Allocation":
                changes.append((event.start_time_ns, event.extra_fields.alloc_size))
            collect(event.children)

    assert trace.profiler is not None
    collect(trace.profiler.kineto_results.experimental_event_tree())
    return max(itertools.accumulate((size for _, size in sorted(changes, key=lambda c: c[0])), initial=0))


SMALL: dict[str, Any] = {}
WIDE_HEAD = {"vocab_size": 20_000}
WIDE_MLP = {"intermediate_size": 3000}
MANY_HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
QWEN3 = {"architecture": "Qwen3ForCausalLM", "num_attention_heads": 8}
SLIDING = {"architecture": "MistralForCausalLM", "sliding_window": 200}
EXPERTS = {"architecture": "Qwen3MoeForCausalLM", "num_experts": 16, "num_experts_per_tok": 8}
GEMMA2 = {"architecture": "Gemma2ForCausalLM", "sliding_window": 200, "intermediate_size": 300}
GPT_OSS = {"architecture": "GptOssForCausalLM", "sliding_window": 200}
LONG_HEADS = {  # of which no gather holds all
    "architecture": "GptOssForCausalLM",
    "num_hidden_layers": 1,
    "layer_types": ["full_attention"],
    "num_attention_heads": 64,
    "num_key_value_heads": 32,
    "head_dim": 64,
}
GEMMA3 = {"architecture": "Gemma3ForCausalLM", "sliding_window": 200, "head_dim": 64}
WIDE_EXPERTS = {"architecture": "MixtralForCausalLM", "num_experts": 3, "intermediate_size": 2000}
MIXED = SLIDING | {
    "architecture": "Qwen2ForCausalLM",
    "use_sliding_window": True,
    "max_window_layers": 1,
}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "steps", "length"),
    [
        # steps: (sequences, tokens in the cache of each, new tokens of each)
        (SMALL, [(1, 0, 256)], 1024),
        (SMALL, [(32, 200, 1)], 1024),
        (SMALL, [(30, 1000, 1), (1, 0, 226)], 1024),
        (SMALL, [(1, 7000, 64)], 8192),
        (SMALL, [(4, 8000, 1)], 8192),
        (WIDE_HEAD, [(16, 20, 1)], 64),
        (WIDE_MLP, [(1, 0, 300)], 512),
        (WIDE_MLP | WIDE_HEAD | {"hidden_size": 512}, [(1, 0, 450), (31, 20, 1)], 512),
        (SMALL, [(1, 0, 1)], 64),
        (MANY_HEADS, [(1, 0, 200), (6, 700, 1)], 1024),
        (MANY_HEADS, [(2, 8000, 1), (1, 8000, 30)], 8192),
        (QWEN3, [(1, 0, 300), (3, 40, 1)], 512),
        (MIXED, [(1, 0, 500), (12, 900, 1)], 1024),
        (SLIDING, [(1, 0, 500), (8, 900, 1)], 1024),
        (EXPERTS, [(1, 0, 300), (3, 40, 1)], 512),
        (WIDE_EXPERTS, [(1, 0, 300)], 512),
        (GEMMA2, [(1, 0, 500), (12, 900, 1)], 1024),
        (GEMMA2, [(2, 8000, 1), (1, 8000, 30)], 8192),
        (GEMMA3, [(1, 0, 300), (3, 40, 1)], 512),
        (GPT_OSS, [(1, 0, 500), (12, 900, 1)], 1024),
        pytest.param(LONG_HEADS, [(1, 8100, 16)], 8192, marks=pytest.mark.nightly),
    ],
)
def test_a_step_stays_below_the_activation_bound(
    shape: dict[str, Any],
    steps: list[tuple[int, int, int]],
    length: int,
    dtype: str,
    backend: str,
    tmp_path: Path,
) -> None:
    a_step_stays_below_the_bound(shape, steps, length, dtype, backend, tmp_path)


def a_step_stays_below_the_bound(
    shape: dict[str, Any],
    steps: list[tuple[int, int, int]],
    length: int,
    dtype: str,
    backend: str,
    folder: Path,
    quantization: Quantization | None = None,
    ranks: Sequence[int] = (),
    kernels: Kernels | None = None,
) -> None:
    """`ranks` are those of adapters, which sequences have in turns; `kernels` are others of that back-end."""
    described = write_checkpoint(folder, config(**shape))
    kernels = kernels or load(backend)
    written = [write_adapter(folder / f"a{at}", at, rank=rank, base=folder) for at, rank in enumerate(ranks)]
    adapters = [read_adapter(each, described) for each in written]
    model = open_model(folder, described, dtype, kernels, quantization, adapters)
    sequences = [(start, count) for many, start, count in steps for _ in range(many)]
    tokens = sum(count for _, count in sequences)
    blocks = -(-length // 16)
    kv = KVCache.allocate(described, blocks, 16, DTYPES[dtype], CPU)
    # all sequences may read the same blocks: what they hold does not matter here
    sampling = Sampling(max_tokens=9, temperature=0.7, top_p=0.9, frequency_penalty=0.1)
    draws = [Draw(sampling, seed=1, num_prompt=1, ending_ids=()) for _ in sequences]
    rows = [
        Scheduled(
            str(at), at, (1,) * count, start, start + count, (tuple(range(blocks)),), draw, (1,) * (start + count)
        )
        for at, ((start, count), draw) in enumerate(zip(sequences, draws, strict=True))
    ]

    numbers = [1 + at % len(ranks) for at in range(len(sequences))] if ranks else []

    @torch.inference_mode()
    def step() -> None:
        batches = [
            PagedBatch.build(
                starts=[start for start, _ in sequences],
                query_lens=[count for _, count in sequences],
                block_tables=[list(range(blocks))] * len(sequences),
                logits=[True] * len(sequences),
                block_size=16,
            )
            for _ in kv.groups
        ]
        hidden = model.forward(torch.ones(tokens, dtype=torch.int64), batches, kv, numbers)
        sample(model.logits(hidden), rows, model.kernels)

    found = peak(step)
    if isinstance(kernels, CpuKernels):
        found += kernels.kept_bytes
    bound = sizing.activation_bytes(described, dtype, tokens, len(sequences), length, quantization=quantization)
    assert found <= bound + sizing.adapter_step_bytes(described, dtype, tokens, adapters)
    # native attention gathers nothing, and native buffers are for 64 tokens at least
    if backend == "reference" and tokens > 1:
        assert found >= bound / 8


def test_key_heads_that_are_taken_in_turns_stay_below_the_activation_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `LONG_HEADS`, with a gather that is smaller than that and not heads that are more. The bound is that of
    the heads of a turn: those of all would have twice as many scores."""
    monkeypatch.setattr(sizing, "GATHER_BYTES", 1 << 20)
    shape = LONG_HEADS | {"num_key_value_heads": 8, "head_dim": 16}
    kernels = ReferenceKernels(1 << 20)
    a_step_stays_below_the_bound(shape, [(1, 2000, 20)], 2048, "float32", "reference", tmp_path, kernels=kernels)
    described = read_profile(tmp_path)
    bound = sizing.activation_bytes(described, "float32", 20, 1, 2048)
    assert bound < 3 * 4 * 16 * 2048 * described.num_heads


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("quantization", METHODS, ids=str)
@pytest.mark.parametrize(
    ("shape", "steps", "length"),
    [
        (SMALL, [(1, 0, 256)], 1024),
        (WIDE_MLP | {"hidden_size": 256, "intermediate_size": 3072}, [(1, 0, 300)], 512),
        (EXPERTS | {"moe_intermediate_size": 64}, [(1, 0, 300)], 512),
        pytest.param(WIDE_HEAD | {"hidden_size": 1024}, [(3, 20, 1)], 64, marks=pytest.mark.nightly),
        pytest.param(
            MANY_HEADS | {"hidden_size": 2048}, [(1, 0, 200), (6, 700, 1)], 1024, marks=pytest.mark.nightly
        ),
    ],
    ids=["small", "wide mlp", "experts", "large head", "many heads"],
)
def test_a_quantized_step_stays_below_the_activation_bound(
    shape: dict[str, Any],
    steps: list[tuple[int, int, int]],
    length: int,
    quantization: Quantization,
    backend: str,
    tmp_path: Path,
) -> None:
    for dtype in ("bfloat16", "float32"):
        a_step_stays_below_the_bound(shape, steps, length, dtype, backend, tmp_path, quantization)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "steps", "ranks"),
    [
        (SMALL, [(1, 0, 256)], [8]),
        (SMALL, [(32, 200, 1)], [8, 64]),
        (SMALL, [(30, 200, 1), (1, 0, 226)], [64]),
        (WIDE_MLP, [(1, 0, 300)], [16, 256]),
        (MANY_HEADS, [(1, 0, 200), (6, 700, 1)], [8]),
    ],
)
def test_a_step_with_adapters_stays_below_the_activation_bound(
    shape: dict[str, Any],
    steps: list[tuple[int, int, int]],
    ranks: list[int],
    dtype: str,
    backend: str,
    tmp_path: Path,
) -> None:
    a_step_stays_below_the_bound(shape, steps, 1024, dtype, backend, tmp_path, ranks=ranks)


ALL_OF_IT: dict[str, Any] = {"logprobs": WHOLE_VOCABULARY, "logprob_token_ids": (3, 4)}


@pytest.mark.parametrize(
    ("fields", "many", "count"),
    [
        (ALL_OF_IT | {"logprobs_mode": "processed_logprobs"}, 8, 1),
        (ALL_OF_IT | {"allowed_token_ids": tuple(range(500)), "bad_words": ((7,), (8, 9))}, 8, 1),
        ({"prompt_logprobs": WHOLE_VOCABULARY, "logprob_token_ids": (3, 4)}, 3, 20),
    ],
    ids=["processed", "wishes", "prompts"],
)
def test_what_is_reported_stays_below_the_activation_bound(
    fields: dict[str, Any], many: int, count: int, tmp_path: Path
) -> None:
    """Where the vocabulary is what counts. Prompts are scored a few rows at a time."""
    described = write_checkpoint(tmp_path, config(vocab_size=20_000))
    model = open_model(tmp_path, described, "float32")
    kv = KVCache.allocate(described, 8, 16, torch.float32, CPU)
    runner = ModelRunner(model, kv, block_size=16, head_rows=many, device=CPU, masks=MaskMaker(meanwhile=False))
    sampling = Sampling(max_tokens=9, temperature=0.7, top_p=0.9, frequency_penalty=0.1, **fields)
    draw = Draw(sampling, seed=1, num_prompt=1, ending_ids=())
    known = (1,) * count
    targets = known[1:] if sampling.prompt_logprobs is not None else ()
    plan = StepPlan(
        1,
        tuple(
            Scheduled(str(at), at, known, 0, count, (tuple(range(8)),), draw, known, targets, sampling)
            for at in range(many)
        ),
    )
    found = peak(lambda: runner.execute(plan))
    bound = sizing.activation_bytes(described, "float32", many * count, many, 128)
    assert found <= bound
    assert found >= bound / 8
