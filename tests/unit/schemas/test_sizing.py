"""The arithmetic of memory: public check vectors, the rules for auto, and counter-offers that hold.

The vectors are figures that operators of other engines have printed in public; each names its source. Where a log
rounds, the tolerance is half a unit of its last digit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.effort import examples

from quire_schemas.checkpoint import LayerKind, ModelProfile, profile_from_config
from quire_schemas.sizing import (
    FOOTPRINT,
    GIB,
    MIB,
    MOST_GROUPS,
    FitReport,
    SizingRequest,
    activation_bytes,
    blocks_held,
    fit,
    gpu_activations,
    group_size,
    kv_bytes_per_token,
    kv_groups,
    kv_room,
    longest_held,
    weight_bytes,
)

LLAMA_8B = profile_from_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
    }
)
QWEN_HALF_B = profile_from_config(
    {
        "architectures": ["Qwen2ForCausalLM"],
        "torch_dtype": "bfloat16",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    }
)


def ask(**changes: Any) -> SizingRequest:
    request = SizingRequest(
        dtype="bfloat16",
        kv_dtype="bfloat16",
        block_size=16,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        device="cpu",
        device_bytes_total=32 * GIB,
        device_bytes_available=28 * GIB,
        memory_share=0.9,
    )
    return replace(request, **changes)


def gpu(gib: int, **changes: Any) -> SizingRequest:
    """A declared device: nothing of it has to be there."""
    return ask(
        device="cuda",
        device_bytes_total=gib * GIB,
        device_bytes_available=gib * GIB,
        device_name=f"GPU with {gib} GiB",
        **changes,
    )


# ── public vectors ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("total", "share", "weights", "activations", "overhead", "expected", "rounding"),
    [
        (8.00, 0.70, 5.20, 1.42, 0.03, -1.05, 0.005),  # vllm issue 13882
        (79.11, 0.92, 7.39, 1.54, 0.60, 63.25, 0.005),  # vllm pull request 48601, eager
        (79.11, 0.92, 7.39, 1.54, 0.60 + 2.04, 61.06, 0.16),  # the same with graphs; its log counts 0.15 GiB more
    ],
)
def test_room_for_kv(
    total: float,
    share: float,
    weights: float,
    activations: float,
    overhead: float,
    expected: float,
    rounding: float,
) -> None:
    room = kv_room(*(round(gib * GIB) for gib in (total * share, weights, activations, overhead)))
    assert room / GIB == pytest.approx(expected, abs=rounding)


def test_concurrency_of_613024_tokens() -> None:
    """vllm issue 20264: 4.68 sequences of 131 072 tokens."""
    report = fit(LLAMA_8B, gpu(180, kv_size=613_024 * 131_072, max_model_len=131_072))
    assert report.kv_tokens == 613_024
    assert report.concurrency == pytest.approx(4.68, abs=0.005)
    assert "= 4.7 sequences of 131,072" in "\n".join(report.lines())


def test_ten_million_tokens_over_eight_ranks() -> None:
    """vllm issue 19407: Llama-4-Scout, 240.0 GiB a rank; 88.38 GiB hold 3 861 381 tokens (its log: 3 861 424)."""
    scout = replace(LLAMA_8B, num_layers=48, layer_kinds=("full",) * 48, num_kv_heads=8, head_dim=128)
    per_token = kv_bytes_per_token(scout, "bfloat16", tensor_parallel=8)
    assert per_token * 10_485_760 / GIB == 240.0
    assert round(88.38 * GIB / per_token) == pytest.approx(3_861_381, abs=1)
    assert kv_bytes_per_token(scout, "bfloat16", tensor_parallel=16) == per_token  # heads are replicated then


def test_llama_8b() -> None:
    assert LLAMA_8B.num_parameters == 8_030_261_248
    assert weight_bytes(LLAMA_8B, "bfloat16") == LLAMA_8B.weight_bytes == 16_060_522_496
    assert kv_bytes_per_token(LLAMA_8B, "bfloat16") == 128 * 1024
    assert kv_bytes_per_token(LLAMA_8B, "bfloat16") * 131_072 == 16 * GIB
    assert kv_bytes_per_token(LLAMA_8B, "float32") == 256 * 1024


def test_the_second_of_two_models_gets_what_the_ledger_leaves() -> None:
    """vllm issue 55827: two engines that probe a device at the same time both misjudge it."""
    first = fit(QWEN_HALF_B, gpu(16, kv_size=4 * GIB, max_model_len=4096))
    left = 16 * GIB - first.used
    second = fit(QWEN_HALF_B, replace(gpu(16, max_model_len=4096), device_bytes_available=left))
    assert first.fits
    assert second.fits
    assert second.limit == left
    assert left - second.kv_bytes_per_token * 16 < second.used <= left
    third = fit(QWEN_HALF_B, replace(gpu(16), device_bytes_available=left - second.used))
    assert not third.fits


# ── the limit and the budget ──────────────────────────────────────────────────────────────────────────────


def test_the_limit_is_the_least_of_share_free_and_declared() -> None:
    assert fit(QWEN_HALF_B, ask(device_bytes_total=20 * GIB)).limit == 18 * GIB
    assert fit(QWEN_HALF_B, ask(device_bytes_available=7 * GIB)).limit == 7 * GIB
    assert fit(QWEN_HALF_B, ask(memory_limit=5 * GIB)).limit == 5 * GIB


def test_kv_auto_on_a_cpu() -> None:
    block = 16 * kv_bytes_per_token(QWEN_HALF_B, "bfloat16")
    # what the sequences need
    small = fit(QWEN_HALF_B, ask(max_model_len=1000, max_num_seqs=4))
    assert small.num_blocks == 4 * 63
    # four GiB
    assert fit(QWEN_HALF_B, ask()).num_blocks == 4 * GIB // block
    # a quarter of what is free
    assert fit(QWEN_HALF_B, ask(device_bytes_available=8 * GIB)).num_blocks == 2 * GIB // block
    # the room
    tight = fit(QWEN_HALF_B, ask(memory_limit=3 * GIB))
    assert tight.num_blocks == tight.room // block


def test_kv_auto_on_a_gpu_is_all_that_is_left() -> None:
    report = fit(LLAMA_8B, gpu(80))
    assert report.limit == int(80 * GIB * 0.9)
    assert 0 <= report.room - report.kv < 16 * report.kv_bytes_per_token
    assert report.used <= report.limit


def test_a_declared_kv_size_is_taken_whole_blocks_only() -> None:
    report = fit(QWEN_HALF_B, ask(kv_size=100 * MIB, max_model_len=4096))
    assert report.num_blocks == 100 * MIB // (16 * report.kv_bytes_per_token)
    assert report.kv <= 100 * MIB


# ── the context ───────────────────────────────────────────────────────────────────────────────────────────


def test_auto_context_is_the_checkpoints_own_if_it_fits() -> None:
    report = fit(QWEN_HALF_B, ask())
    assert report.max_model_len == 32768
    assert report.notes == ("maxNumSeqs 64 will preempt when sequences get long",)


def test_auto_context_shrinks_to_what_fits_and_says_so() -> None:
    request = gpu(24)
    report = fit(LLAMA_8B, request)
    assert report.fits
    assert 20_000 < report.max_model_len < 131_072
    assert report.max_model_len % 16 == 0
    assert "131,072" in report.notes[0]
    assert fit(LLAMA_8B, replace(request, max_model_len=report.max_model_len)).fits
    assert not fit(LLAMA_8B, replace(request, max_model_len=report.max_model_len + 16)).fits


def test_without_chunks_the_auto_context_is_what_a_step_holds_or_less_and_says_why() -> None:
    whole = fit(QWEN_HALF_B, ask(max_model_len=None, chunked_prefill=False, max_num_batched_tokens=600))
    assert whole.fits
    assert whole.max_model_len == 600
    assert whole.notes[0] == (
        "maxModelLen auto is 600; the checkpoint would allow 32,768: "
        "without chunkedPrefill a prompt has to fit maxNumBatchedTokens"
    )
    # what the memory bounds is not laid at the chunks' door, and is found without them, too
    small = {"max_model_len": None, "kv_size": 8 * MIB, "max_num_batched_tokens": 4096}
    bounded = fit(QWEN_HALF_B, ask(chunked_prefill=False, **small))
    assert bounded.fits
    assert bounded.max_model_len == fit(QWEN_HALF_B, ask(**small)).max_model_len < 4096
    assert bounded.notes[0].endswith("the checkpoint would allow 32,768")


def test_auto_context_is_not_shrunk_to_nothing() -> None:
    report = fit(LLAMA_8B, gpu(24, kv_size=16 * MIB))
    assert "one sequence of 256 tokens needs 32.0 MiB (the least that maxModelLen auto gives)" in report.reason
    assert offers(report)["spec.engine.kvCache.size"] == "32Mi"


def test_a_context_beyond_the_checkpoint_is_refused() -> None:
    report = fit(QWEN_HALF_B, ask(max_model_len=65536))
    assert not report.fits
    assert report.reason == "maxModelLen 65,536 is above the checkpoint's 32,768 positions"
    assert [str(offer) for offer in report.counter_offers] == ["spec.engine.maxModelLen: 32768"]


# ── what does not fit ─────────────────────────────────────────────────────────────────────────────────────


def offers(report: FitReport) -> dict[str, str]:
    assert not report.fits
    assert 1 <= len(report.counter_offers) <= 3
    text = "\n".join(report.lines())
    assert report.reason in text
    assert all(str(offer) in text for offer in report.counter_offers)
    return {offer.field: offer.value for offer in report.counter_offers}


def test_a_context_too_long_for_the_device_gets_one_that_fits() -> None:
    request = gpu(24, max_model_len=131_072)
    report = fit(LLAMA_8B, request)
    found = offers(report)
    assert fit(LLAMA_8B, replace(request, max_model_len=int(found["spec.engine.maxModelLen"]))).fits
    assert found["device"].endswith("GiB free")
    larger = int(found["device"].split()[0])
    assert fit(LLAMA_8B, gpu(larger, max_model_len=131_072)).fits
    assert not fit(LLAMA_8B, gpu(larger - 2, max_model_len=131_072)).fits


def test_too_many_sequences_and_tokens_for_the_memory_get_fewer() -> None:
    request = ask(memory_limit=2 * GIB, max_num_seqs=512, max_num_batched_tokens=4096, max_model_len=1024)
    found = offers(fit(QWEN_HALF_B, request))
    assert fit(QWEN_HALF_B, replace(request, max_num_seqs=int(found["spec.batching.maxNumSeqs"]))).fits


def test_a_batch_too_wide_gets_a_narrower_one() -> None:
    request = ask(memory_limit=2 * GIB, max_num_seqs=8, max_num_batched_tokens=16384, max_model_len=1024)
    found = offers(fit(QWEN_HALF_B, request))
    narrower = int(found["spec.batching.maxNumBatchedTokens"])
    assert fit(QWEN_HALF_B, replace(request, max_num_batched_tokens=narrower)).fits


def test_a_sequence_above_the_cpu_default_is_offered_its_size() -> None:
    request = ask(
        device_bytes_total=64 * GIB, device_bytes_available=60 * GIB, max_model_len=65536, dtype="bfloat16"
    )
    report = fit(LLAMA_8B, request)
    assert "one sequence of 65,536 tokens needs 8.0 GiB" in report.reason
    assert offers(report)["spec.engine.kvCache.size"] == "8192Mi"
    assert fit(LLAMA_8B, replace(request, kv_size=8 * GIB)).fits


def test_a_kv_size_above_the_room_gets_the_room() -> None:
    request = ask(kv_size=40 * GIB)
    report = fit(QWEN_HALF_B, request)
    assert "kvCache.size 40.0 GiB is more than" in report.reason
    size = int(offers(report)["spec.engine.kvCache.size"].removesuffix("Mi")) * MIB
    assert fit(QWEN_HALF_B, replace(request, kv_size=size)).fits


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_cache_too_small_for_a_sequence_is_offered_fewer_bits(device: Literal["cpu", "cuda"]) -> None:
    request = ask(kv_size=16 * MIB, max_model_len=2048, dtype="bfloat16", kv_dtype="bfloat16", device=device)
    found = offers(fit(QWEN_HALF_B, request))
    assert found["spec.engine.kvCache.dtype"] == "int8 (other numbers)"
    assert fit(QWEN_HALF_B, replace(request, kv_dtype="int8")).fits


def test_weights_above_the_device_name_the_device_that_would_do() -> None:
    report = fit(LLAMA_8B, gpu(16))
    assert "alone are" in report.reason
    assert set(offers(report)) == {"device", "spec.quantization.method"}


def test_a_declared_memory_limit_too_small_gets_one_that_does() -> None:
    request = ask(memory_limit=1 * GIB, max_model_len=2048)
    found = offers(fit(QWEN_HALF_B, request))
    limit = int(found["spec.resources.memory"].removesuffix("Mi")) * MIB
    assert fit(QWEN_HALF_B, replace(request, memory_limit=limit)).fits


def test_float32_is_offered_half_precision() -> None:
    found = offers(fit(LLAMA_8B, gpu(32, dtype="float32", kv_dtype="float32", max_model_len=4096)))
    assert found["spec.engine.dtype"].startswith("bfloat16")


# ── properties ────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=examples(150), deadline=None)
@given(
    profile=st.sampled_from([LLAMA_8B, QWEN_HALF_B]),
    gib=st.integers(1, 200),
    device=st.sampled_from(["cpu", "cuda"]),
    seqs=st.integers(1, 512),
    tokens=st.integers(1, 8192),
    block_size=st.sampled_from([8, 16, 32]),
    length=st.none() | st.integers(1, 140_000),
    kv_size=st.none() | st.integers(0, 50 * GIB),
    limit=st.none() | st.integers(0, 100 * GIB),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_what_fits_lies_within_the_limit_and_holds_a_sequence(
    profile: ModelProfile,
    gib: int,
    device: Any,
    seqs: int,
    tokens: int,
    block_size: int,
    length: int | None,
    kv_size: int | None,
    limit: int | None,
    dtype: str,
) -> None:
    report = fit(
        profile,
        SizingRequest(
            dtype=dtype,
            kv_dtype=dtype,
            block_size=block_size,
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            device=device,
            device_bytes_total=gib * GIB,
            device_bytes_available=gib * GIB * 7 // 8,
            memory_share=0.9,
            max_model_len=length,
            kv_size=kv_size,
            memory_limit=limit,
        ),
    )
    assert report.lines()
    assert report.fits != bool(report.reason)
    assert report.overhead == FOOTPRINT[device].overhead
    if report.fits:
        assert report.used <= report.limit
        assert report.concurrency >= 1
        assert report.max_model_len <= profile.max_position_embeddings
        assert length in (None, report.max_model_len)
        assert not report.counter_offers
    else:
        assert report.counter_offers


def test_activations_grow_with_every_dimension() -> None:
    base = activation_bytes(QWEN_HALF_B, "bfloat16", 512, 64, 4096)
    assert activation_bytes(QWEN_HALF_B, "bfloat16", 4096, 64, 4096) > base
    assert activation_bytes(QWEN_HALF_B, "bfloat16", 512, 256, 4096) > base
    assert activation_bytes(QWEN_HALF_B, "bfloat16", 512, 64, 32768) > base


# ── layers in groups ──────────────────────────────────────────────────────────────────────────────────────


def test_scores_of_sinks_are_those_of_the_heads_that_are_taken_together() -> None:
    """Of 131,072 keys that is one key head of eight, with its eight heads: 16 rows of scores three times over, the
    keys once for each of them, and what is gathered whatever heads have."""
    shape = {"num_hidden_layers": 24, "num_local_experts": 32}
    profile = profile_from_config({"architectures": ["GptOssForCausalLM"], **shape})
    without = replace(profile, sinks=False)
    plain = activation_bytes(without, "bfloat16", 64, 1, 131_072)
    assert activation_bytes(profile, "bfloat16", 64, 1, 131_072) - plain == (131_072 + 64) * 8 * (3 * 16 + 64) * 4
    plain = activation_bytes(without, "bfloat16", 64, 1, 4096)
    many = activation_bytes(profile, "bfloat16", 64, 1, 4096) - plain
    assert many == (4096 + 64) * 64 * (3 * 16 + 64) * 4, "of a shorter one all heads are"


def of_kinds(kinds: str, window: int = 64) -> ModelProfile:
    """A model with a layer for each letter: f sees everything, s a window."""
    layer_kinds: tuple[LayerKind, ...] = tuple("full" if kind == "f" else "sliding" for kind in kinds)
    return replace(LLAMA_8B, num_layers=len(kinds), layer_kinds=layer_kinds, sliding_window=window)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("ffff", [(None, (0, 1, 2, 3))]),
        ("ssss", [(64, (0, 1, 2, 3))]),
        ("sfsf", [(None, (1, 3)), (64, (0, 2))]),
        ("sssf" * 2, [(None, (3, 7)), (64, (0, 1)), (64, (2, 4)), (64, (5, 6))]),
        ("f" + "s" * 4, [(None, (0,)), (64, (1,)), (64, (2,)), (64, (3,)), (64, (4,))]),
        ("f" * 7 + "s" * 29, None),
    ],
)
def test_groups_are_of_one_kind_equally_large_and_few(kinds: str, expected: list[Any] | None) -> None:
    groups = kv_groups(of_kinds(kinds))
    if expected is not None:
        assert [(group.window, group.layers) for group in groups] == expected
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(kinds)))
    assert len(groups) <= MOST_GROUPS
    assert len(groups) * group_size(groups) < 1.2 * len(kinds), "little is padding"


def test_a_window_bounds_what_a_sequence_holds() -> None:
    assert blocks_held([None], 1000, 512, 16) == 63
    assert blocks_held([100], 1000, 32, 16) == 10, (
        "99 + 32 tokens touch nine blocks, or ten if they begin within one"
    )
    assert blocks_held([100], 40, 32, 16) == 3, "and never more than there are"
    assert blocks_held([None, 100, 100], 1000, 32, 16) == 63 + 20
    assert longest_held([None], 63, 512, 16, 10_000) == 1008
    assert longest_held([100], 10, 32, 16, 10_000) == 10_000
    assert longest_held([100], 9, 32, 16, 10_000) == 144


def test_windows_let_a_context_fit_that_would_not_without_them() -> None:
    ask_long = ask(
        max_model_len=100_000, kv_size=GIB, device_bytes_total=64 * GIB, device_bytes_available=64 * GIB
    )
    whole = fit(of_kinds("f" * 32), ask_long)
    assert not whole.fits
    windowed = fit(of_kinds("f" + "s" * 7 + "f" + "s" * 7, window=1024), ask_long)
    assert windowed.fits
    assert windowed.windows.count(1024) == 7
    assert windowed.kv_tokens == 100_000
    assert windowed.concurrency == windowed.num_blocks / windowed.blocks_per_sequence > 1
    assert "of which 7 of 8 groups of layers keep 1,024 tokens" in "\n".join(windowed.lines())


# ── GPUs ──────────────────────────────────────────────────────────────────────────────────────────────────


def parts_of(tokens: int, seqs: int, length: int = 8448, **more: Any) -> dict[str, int]:
    return gpu_activations(LLAMA_8B, "bfloat16", tokens, seqs, length, block_size=16, **more)


def test_the_parts_of_a_gpu_are_its_activations() -> None:
    parts = parts_of(8192, 256)
    assert list(parts) == ["table", "buffers", "workspaces", "step", "general", "graphs"]
    total = activation_bytes(LLAMA_8B, "bfloat16", 8192, 256, 8448, device="cuda", block_size=16)
    assert total == sum(parts.values())
    # the residual, the normed input, cosines and sines, the heads' results, and the three halves of the MLP
    mlp = 8192 * ((2 * 4096 + 4096 + 3 * 14336) * 2 + 2 * 128 * 4)
    assert 0 <= parts["step"] - mlp < 4 * MIB
    assert parts["table"] == 2 * 256 * (528 * 4 + 28) + 1024 * (20 + 4096) + 256 * 4096 * 8


def test_no_graphs_no_memory_for_them() -> None:
    captured, eager = parts_of(8192, 256), parts_of(8192, 256, enforce_eager=True)
    assert captured["graphs"] > 100 * MIB
    assert eager["graphs"] == 0
    assert eager["workspaces"] < captured["workspaces"]
    with_graphs, without = (fit(LLAMA_8B, gpu(80, enforce_eager=eager)) for eager in (False, True))
    assert with_graphs.activations - without.activations > 100 * MIB
    assert with_graphs.kv < without.kv


def test_small_steps_are_filled_up_to_captured_ones() -> None:
    assert parts_of(1025, 8)["step"] == parts_of(1280, 8)["step"] < parts_of(1281, 8)["step"]
    assert parts_of(64, 8, enforce_eager=True)["step"] == parts_of(64, 8)["step"], "no size is above the budget's"
    assert parts_of(2049, 8)["step"] < parts_of(2050, 8)["step"], "launched as they are"
    assert parts_of(64, 2048)["step"] > parts_of(64, 1024)["step"], "a decode step has all seats"
