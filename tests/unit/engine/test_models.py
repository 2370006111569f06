"""Logits of every supported architecture against transformers, on tiny random checkpoints written by it.

float32, eager attention on the other side. The tolerance is max|d| <= 1e-4 on logits of up to 10: on these models
the float32 logits of transformers lie up to 6e-5 from its own in double precision, ours up to 4e-5, as measured.
Processors sum in orders of their own: 6e-5 apart on an AMD EPYC, below 5e-5 on a Xeon.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.utils import logging

from quire import LLM, SamplingParams
from quire_engine.layers.rotary import Rotary
from quire_engine.models import DecoderModel, KVCache, load_model
from quire_kernels import PagedBatch, load
from quire_schemas.checkpoint import ModelProfile, profile_from_config, read_profile
from quire_schemas.checkpoint_files import BadHeader, UnsupportedFeature, WrongTensors
from quire_schemas.sizing import kv_groups, weight_bytes
from quire_schemas.wire import Quantization

logging.disable_progress_bar()
torch.set_num_threads(1)

CPU = torch.device("cpu")
VOCAB = 97
SIZE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
GPT_OSS: dict[str, Any] = SIZE | {
    "head_dim": 16,
    "num_hidden_layers": 3,
    "sliding_window": 20,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "swiglu_limit": 1.5,
    "rope_parameters": YARN | {"truncate": False},
}
GEMMA: dict[str, Any] = SIZE | {"num_hidden_layers": 3, "head_dim": 24, "sliding_window": 20, "pad_token_id": None}
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}
"""So low that they bite."""
CASES: dict[str, Any] = {
    "gpt-oss": (GptOssForCausalLM, GptOssConfig(**GPT_OSS)),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**GEMMA, **CAPS, query_pre_attn_scalar=40)),
    "gemma2-uncapped": (
        Gemma2ForCausalLM,
        Gemma2Config(
            **GEMMA | {"num_key_value_heads": 1, "pad_token_id": 0},  # whose embedding is zeros
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            attention_bias=True,
            tie_word_embeddings=False,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        ),
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **GEMMA | {"num_hidden_layers": 4},
            sliding_window_pattern=3,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        ),
    ),
    "gemma3-capped": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **GEMMA | {"num_key_value_heads": 4, "head_dim": 16},
            final_logit_softcapping=2.0,
            attention_bias=True,
            query_pre_attn_scalar=7,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZE)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**SIZE, tie_word_embeddings=True)),
    "llama-biases": (LlamaForCausalLM, LlamaConfig(**SIZE, attention_bias=True, mlp_bias=True)),
    "llama-head-dim": (LlamaForCausalLM, LlamaConfig(**SIZE, head_dim=32)),
    "llama-mha": (LlamaForCausalLM, LlamaConfig(**SIZE | {"num_key_value_heads": 4})),
    "llama-mqa": (LlamaForCausalLM, LlamaConfig(**SIZE | {"num_key_value_heads": 1})),
    "llama-odd": (LlamaForCausalLM, LlamaConfig(**SIZE | {"intermediate_size": 45})),
    "llama-rope-llama3": (LlamaForCausalLM, LlamaConfig(**SIZE, rope_parameters=LLAMA3)),
    "llama-rope-linear": (
        LlamaForCausalLM,
        LlamaConfig(**SIZE, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    ),
    "llama-rope-dynamic": (
        LlamaForCausalLM,
        LlamaConfig(**SIZE, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}),
    ),
    "llama-rope-yarn": (LlamaForCausalLM, LlamaConfig(**SIZE, rope_parameters=YARN)),
    "llama-rope-yarn-full": (
        LlamaForCausalLM,
        LlamaConfig(
            **SIZE,
            rope_parameters=YARN
            | {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.8, "mscale_all_dim": 0.4, "truncate": False},
        ),
    ),
    "llama-rope-yarn-factor": (
        LlamaForCausalLM,
        LlamaConfig(**SIZE, rope_parameters=YARN | {"attention_factor": 1.3}),
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZE)),
    "qwen2-tied": (Qwen2ForCausalLM, Qwen2Config(**SIZE, tie_word_embeddings=True)),
    "qwen2-sliding": (
        Qwen2ForCausalLM,
        Qwen2Config(**SIZE, use_sliding_window=True, sliding_window=24, max_window_layers=1),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZE, head_dim=24)),
    "qwen3-bias": (Qwen3ForCausalLM, Qwen3Config(**SIZE, head_dim=16, attention_bias=True)),
    "qwen3-mqa-sliding": (
        Qwen3ForCausalLM,
        Qwen3Config(
            **SIZE | {"num_key_value_heads": 1, "num_hidden_layers": 3},
            head_dim=16,
            use_sliding_window=True,
            sliding_window=9,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            tie_word_embeddings=True,
        ),
    ),
    "mistral-sliding": (MistralForCausalLM, MistralConfig(**SIZE, sliding_window=20)),
    "mistral-full": (MistralForCausalLM, MistralConfig(**SIZE | {"num_key_value_heads": 4}, sliding_window=None)),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**SIZE, num_local_experts=6)),
    "mixtral-sliding": (
        MixtralForCausalLM,
        MixtralConfig(**SIZE, num_local_experts=3, num_experts_per_tok=1, sliding_window=20),
    ),
    "qwen3-moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **SIZE,
            head_dim=16,
            num_experts=12,
            num_experts_per_tok=5,
            moe_intermediate_size=32,
            norm_topk_prob=True,
        ),
    ),
    "qwen3-moe-mixed": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **SIZE | {"num_hidden_layers": 5},
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            decoder_sparse_step=2,
            mlp_only_layers=[1],
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=15,
            tie_word_embeddings=True,
        ),
    ),
}


def build(name: str, folder: Path, **save: Any) -> Any:
    """A random model of one case, saved to `folder`; biases and norms random too, so that none is overlooked."""
    kind, config = CASES[name]
    torch.manual_seed(7)
    model = kind._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("bias", "sinks")) or "norm" in key:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder, **save)
    return model


def open_model(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    backend: str = "reference",
    quantization: Quantization | None = None,
) -> tuple[DecoderModel, ModelProfile]:
    profile = read_profile(folder)
    seen: list[tuple[int, int]] = []
    model = load_model(
        folder,
        profile,
        dtype=dtype,
        device=CPU,
        kernels=load(backend, 2),
        on_progress=lambda done, total: seen.append((done, total)),
        quantization=quantization,
    )
    assert seen[-1][0] == seen[-1][1] == profile.weight_bytes
    assert seen == sorted(seen)
    return model, profile


class Server:
    """The smallest thing that runs sequences through a model in steps of any make-up."""

    def __init__(self, model: DecoderModel, block_size: int = 8, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.size = model, block_size
        self.kv = KVCache.allocate(model.profile, 400, block_size, dtype, CPU)
        for tensor in self.kv.tensors:
            tensor.fill_(torch.nan)
        self.free = list(range(400))
        random.Random(0).shuffle(self.free)
        self.tables: dict[int, list[list[int]]] = {}
        self.done: dict[int, int] = {}

    def step(self, items: list[tuple[int, list[int]]]) -> Tensor:
        """New tokens of sequences, by number; logits after the last one of each, [S, V]."""
        for number, tokens in items:
            tables = self.tables.setdefault(number, [[] for _ in self.kv.groups])
            for table in tables:
                while len(table) * self.size < self.done.get(number, 0) + len(tokens):
                    table.append(self.free.pop())
        batches = [
            PagedBatch.build(
                starts=[self.done.get(number, 0) for number, _ in items],
                query_lens=[len(tokens) for _, tokens in items],
                block_tables=[self.tables[number][group] for number, _ in items],
                logits=[True] * len(items),
                block_size=self.size,
            )
            for group in range(len(self.kv.groups))
        ]
        for number, tokens in items:
            self.done[number] = self.done.get(number, 0) + len(tokens)
        ids = torch.tensor([token for _, tokens in items for token in tokens])
        return self.model.logits(self.model.forward(ids, batches, self.kv))


def prompts(count: int, low: int, high: int, seed: int = 3) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(VOCAB) for _ in range(source.randrange(low, high))] for _ in range(count)]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_at_every_position(name: str, backend: str, tmp_path: Path) -> None:
    theirs = build(name, tmp_path)
    model, profile = open_model(tmp_path, backend=backend)
    text = prompts(1, 120, 121)[0]
    with torch.no_grad():
        expected = theirs(torch.tensor([text])).logits[0]
    server = Server(model)
    found = []
    for begin, end in ((0, 1), (1, 40), (40, 41), (41, 100), *((at, at + 1) for at in range(100, 120))):
        found.append((end - 1, server.step([(0, text[begin:end])])[0]))
    assert expected.abs().max() > 1
    # of logits around ten: float32 adds up in another order on each kind of processor, and experts amplify it
    bound = 2e-5 * expected.abs().max().item()
    for row, logits in found:
        torch.testing.assert_close(logits, expected[row], atol=bound, rtol=0)
    assert model.bytes == sum(parameter.nbytes for parameter in theirs.parameters())
    if profile.logit_softcap is not None:
        assert expected.abs().max() > 0.99 * profile.logit_softcap, "the cap bites"
    assert profile.num_parameters * 4 == model.bytes


@pytest.mark.parametrize(
    "name",
    [
        "llama-rope-llama3",
        "qwen2-sliding",
        "qwen3-mqa-sliding",
        "mistral-sliding",
        "mixtral",
        "qwen3-moe-mixed",
        "gemma2",
        # their logits are those of transformers, in steps of any make-up, by the test above
        pytest.param("gemma3-capped", marks=pytest.mark.nightly),
        pytest.param("gpt-oss", marks=pytest.mark.nightly),
    ],
)
def test_greedy_tokens_equal_generate_alone_and_batched(name: str, tmp_path: Path) -> None:
    theirs = build(name, tmp_path)
    texts = prompts(5, 3, 60)
    new = 24
    expected = [
        theirs.generate(
            torch.tensor([text]),
            attention_mask=torch.ones(1, len(text), dtype=torch.long),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(text) :].tolist()
        for text in texts
    ]
    model, _ = open_model(tmp_path)

    def generate(texts: list[list[int]], chunk: int) -> list[list[int]]:
        """All at once, prompts in chunks: steps mix decoding and prefilling sequences."""
        server, known = Server(model), [list(text) for text in texts]
        done = [0] * len(texts)
        while any(len(all_) - len(text) < new for all_, text in zip(known, texts, strict=True)):
            live = [i for i, text in enumerate(texts) if len(known[i]) - len(text) < new]
            items = [(i, known[i][done[i] : done[i] + chunk]) for i in live]
            logits = server.step(items)
            for (i, tokens), row in zip(items, logits, strict=True):
                done[i] += len(tokens)
                if done[i] == len(known[i]):
                    known[i].append(int(row.argmax()))
        return [all_[len(text) :] for all_, text in zip(known, texts, strict=True)]

    for chunk in (1, 7, 16, 1000):
        assert generate(texts, chunk) == expected
    assert generate(texts[:1], 7) == expected[:1]


@pytest.mark.parametrize(
    "name",
    [
        "qwen2-sliding",
        "qwen3-mqa-sliding",
        "mistral-sliding",
        "mixtral-sliding",
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("gemma2", "gemma3", "gpt-oss")),
    ],
)
@pytest.mark.parametrize(("blocks", "ahead"), [(96, False), (28, True)], ids=["roomy", "tight and ahead"])
def test_windows_that_let_go_of_blocks_change_nothing(name: str, blocks: int, ahead: bool, tmp_path: Path) -> None:
    """The engine trims, shares and preempts; twice the same prompts, the second time behind cached prefixes."""
    theirs = build(name, tmp_path)
    texts, new = (prompts(6, 6, 12), 60) if ahead else (prompts(6, 40, 70), 24)
    texts[3:] = [texts[0][:32] + text for text in texts[3:]]
    expected = [
        theirs.generate(
            torch.tensor([text]),
            attention_mask=torch.ones(1, len(text), dtype=torch.long),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(text) :].tolist()
        for text in texts
    ]
    profile = read_profile(tmp_path)
    groups = kv_groups(profile)
    llm = LLM(
        str(tmp_path),
        dtype="float32",
        threads=1,
        max_model_len=160,
        block_size=4,
        num_blocks=blocks * len(groups),
        max_num_batched_tokens=24,
        prefix_caching=True,
        async_scheduling=ahead,
    )
    greedy = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, detokenize=False)
    for _ in range(2):
        for output, tokens in zip(llm.generate(texts, greedy), expected, strict=True):
            assert output.outputs[0].token_ids == tokens
        llm.engine.check_integrity()
    stats = llm.engine.stats()
    if not ahead:
        assert stats.prefix_hit_tokens > 32 * 3
    elif any(group.window is None for group in groups):
        assert stats.preemptions > 0, "what grows runs out of room"
    assert stats.blocks_used == 0


def test_caps_reach_whatever_is_asked_of_logits(tmp_path: Path) -> None:
    """Log-probabilities, of prompts too, draws, and plain answers, alone and beside who asks for more."""
    theirs = build("gemma2", tmp_path)
    llm = LLM(str(tmp_path), dtype="float32", threads=1, max_model_len=160, block_size=4, num_blocks=200)
    text = prompts(1, 30, 31)[0]
    common: dict[str, Any] = {"max_tokens": 4, "ignore_eos": True, "detokenize": False}
    plain = SamplingParams(**common, temperature=0.0)
    told = SamplingParams(**common, temperature=0.0, logprobs=3, prompt_logprobs=2)
    warm = SamplingParams(**common, temperature=1.0, seed=5, logprobs=1)
    (alone,) = llm.generate([text], plain)
    beside, answer, drawn = llm.generate([text, text, text[:9]], [plain, told, warm])
    said = answer.outputs[0]
    assert said.token_ids == beside.outputs[0].token_ids == alone.outputs[0].token_ids
    for output, known in ((answer, text), (drawn, text[:9])):
        whole = known + output.outputs[0].token_ids
        with torch.no_grad():
            logprobs = theirs(torch.tensor([whole])).logits[0].log_softmax(-1)
        assert output.outputs[0].logprobs is not None
        told_of: list[Any] = list(enumerate(output.outputs[0].logprobs, len(known) - 1))
        told_of += enumerate(output.prompt_logprobs[1:] if output.prompt_logprobs else ())
        for row, entries in told_of:
            assert entries
            for token, entry in entries.items():
                assert abs(entry.logprob - float(logprobs[row, token])) < 1e-4


def test_who_is_first_of_what_a_cap_makes_equal_does_not_depend_on_company(tmp_path: Path) -> None:
    build("gemma2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"final_logit_softcapping": 0.02}
    (tmp_path / "config.json").write_text(json.dumps(config))
    llm = LLM(str(tmp_path), dtype="float32", threads=1, max_model_len=160, block_size=4, num_blocks=200)
    common: dict[str, Any] = {"max_tokens": 3, "temperature": 0.0, "ignore_eos": True, "detokenize": False}
    plain, told = SamplingParams(**common), SamplingParams(**common, logprobs=5)
    text = prompts(1, 30, 31)[0]
    (alone,) = llm.generate([text], plain)
    beside, answer = llm.generate([text, text], [plain, told])
    assert alone.outputs[0].token_ids == beside.outputs[0].token_ids == answer.outputs[0].token_ids
    assert answer.outputs[0].logprobs is not None
    for entries in answer.outputs[0].logprobs:
        assert len({entry.logprob for entry in entries.values()}) == 1, "several are at the cap"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_half_precision_stays_close_to_float32(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    build(name, tmp_path)
    text = prompts(1, 60, 61)[0]
    exact = Server(open_model(tmp_path)[0]).step([(0, text)])[0]
    model, _ = open_model(tmp_path, dtype)
    found = Server(model, dtype=dtype).step([(0, text)])[0]
    assert found.dtype == torch.float32
    # each of two layers rounds a handful of times to 8 (11) bits: a few per cent (a few per mille) of the scale
    scale = exact.abs().max()
    assert (found - exact).abs().max() / scale < (0.08 if dtype == torch.bfloat16 else 0.01)
    assert int(exact.argmax()) in found.topk(5).indices.tolist()


def test_a_step_without_wanted_logits_still_fills_the_cache(tmp_path: Path) -> None:
    theirs = build("llama", tmp_path)
    model, profile = open_model(tmp_path)
    text = prompts(1, 30, 31)[0]
    kv = KVCache.allocate(profile, 8, 8, torch.float32, CPU)
    for begin, end, wanted in ((0, 20, False), (20, 30, True)):
        batch = PagedBatch.build(
            starts=[begin],
            query_lens=[end - begin],
            block_tables=[[5, 0, 3, 1]],
            logits=[wanted],
            block_size=8,
        )
        logits = model.logits(model.forward(torch.tensor(text[begin:end]), [batch], kv))
        assert logits.shape == (int(wanted), VOCAB)
    with torch.no_grad():
        expected = theirs(torch.tensor([text])).logits[0, -1]
    torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=0)


def test_sharded_checkpoints_load_like_whole_ones(tmp_path: Path) -> None:
    build("qwen3", tmp_path / "whole")
    build("qwen3", tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    text = prompts(1, 20, 21)[0]
    whole, shards = (Server(open_model(tmp_path / name)[0]).step([(0, text)]) for name in ("whole", "shards"))
    assert torch.equal(whole, shards)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe-mixed"])
def test_experts_that_are_stored_together_load_like_single_ones(name: str, tmp_path: Path) -> None:
    build(name, tmp_path / "single")
    build(name, tmp_path / "together", save_original_format=False)
    stored = load_file(tmp_path / "together" / "model.safetensors")
    assert "model.layers.3.mlp.experts.gate_up_proj" in stored or "model.layers.1.mlp.experts.down_proj" in stored
    text = prompts(1, 20, 21)[0]
    single, together = (
        Server(open_model(tmp_path / kind)[0]).step([(0, text)]) for kind in ("single", "together")
    )
    assert torch.equal(single, together)
    assert read_profile(tmp_path / "single") == read_profile(tmp_path / "together")


def in_mxfp4(folder: Path, change: Any = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Writes a gpt-oss whose experts are random codes, and returns these; `change` may change what is stored."""
    build("gpt-oss", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    path, packed = folder / "model.safetensors", dict[str, tuple[Tensor, Tensor]]()
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        count, inputs, outputs = tensors.pop(name).shape
        codes = torch.randint(256, (count, outputs, inputs // 32, 16), dtype=torch.uint8)
        packed[name] = codes, torch.randint(121, 125, codes.shape[:3], dtype=torch.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = packed[name]
    if change is not None:
        change(tensors)
    save_file(tensors, path)
    return packed


def test_experts_in_mxfp4_are_what_their_codes_stand_for(tmp_path: Path) -> None:
    packed = in_mxfp4(tmp_path)
    theirs = build("gpt-oss", tmp_path / "float")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name in packed:
                parameter.copy_(convert_moe_packed_tensors(*packed[name], dtype=torch.float32))
        text = prompts(1, 40, 41)[0]
        expected = theirs(torch.tensor([text])).logits[0, -1]
    for backend in ("reference", "cpu"):
        model, profile = open_model(tmp_path, backend=backend)
        torch.testing.assert_close(Server(model).step([(0, text)])[0], expected, atol=1e-4, rtol=0)
    assert model.bytes == sum(parameter.nbytes for parameter in theirs.parameters())
    assert profile_from_config(profile.raw).weight_bytes == profile.weight_bytes < model.bytes
    kept = open_model(tmp_path, quantization=MXFP4)[0]
    torch.testing.assert_close(Server(kept).step([(0, text)])[0], expected, atol=1e-4, rtol=0)
    assert kept.bytes == weight_bytes(profile, "float32", MXFP4)
    held = sum(part.nbytes for part in kept.parameters() if part.dtype == torch.uint8)
    assert held == sum(part.nbytes for pair in packed.values() for part in pair)
    half = open_model(tmp_path, torch.bfloat16)[0]
    ours, halves = (list(each.parameters()) for each in (open_model(tmp_path)[0], half))
    experts = [at for at, weight in enumerate(ours) if weight.dim() == 2 and tuple(weight.shape) == (96, 64)]
    assert experts
    assert all(torch.equal(ours[at], halves[at].float()) for at in experts), "every number is one of bfloat16"


MXFP4 = Quantization("mxfp4", "fp32")


def spoil_a_power(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.experts.down_proj_scales"][2, 5, 1] = 255


def lose_powers(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]


def cut_codes(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj_blocks"
    tensors[name] = tensors[name][:, :, :1].contiguous()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (spoil_a_power, r"layers\.1\.mlp\.experts\.down_proj_scales has powers that are no numbers"),
        (lose_powers, r"layers\.1\.mlp\.experts\.down_proj_scales is in none of the files"),
        (cut_codes, r"gate_up_proj_blocks is U8 \[6, 192, 1, 16\], expected U8 \[6, 192, 2, 16\]"),
    ],
)
def test_mxfp4_that_is_not_whole_is_refused(change: Any, named: str, tmp_path: Path) -> None:
    in_mxfp4(tmp_path, change)
    for quantization in (None, MXFP4):
        with pytest.raises(WrongTensors, match=f"{named}(.|\n)*hint:"):
            open_model(tmp_path, quantization=quantization)


@pytest.mark.parametrize(("dtype", "power"), [(torch.float32, 253), (torch.bfloat16, 253), (torch.float16, 141)])
def test_mxfp4_whose_numbers_a_dtype_cannot_hold_is_refused(
    dtype: torch.dtype, power: int, tmp_path: Path
) -> None:
    """6 times the power of two is infinite; 1 times it is not, nor is 6 times half of it."""
    name = "model.layers.1.mlp.experts.down_proj"

    def lie(code: int, power: int, quantization: Quantization | None = None) -> DecoderModel:
        def change(tensors: dict[str, Tensor]) -> None:
            tensors[f"{name}_blocks"][2, 5, 1] = code * 17
            tensors[f"{name}_scales"][2, 5, 1] = power

        in_mxfp4(tmp_path, change)
        return open_model(tmp_path, dtype, quantization=quantization)[0]

    stands = f"{name}_blocks stands for numbers that {str(dtype)[6:]} cannot hold"
    for code, more in ((7, 0), (15, 0), (7, 1)):
        with pytest.raises(WrongTensors, match=f"{stands}(.|\n)*hint:"):
            lie(code, power + more)
    for code, less in ((7, 1), (2, 0)):
        model = lie(code, power - less)
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    # what stays as it is meets float32
    with pytest.raises(WrongTensors, match=f"{name}_blocks stands for numbers that float32 cannot hold"):
        lie(7, 253, MXFP4)
    assert any(part.dtype == torch.uint8 for part in lie(7, 252, MXFP4).parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_checkpoints_in_half_precision_are_widened_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build("llama-tied", tmp_path / "a")
    model.to(dtype).save_pretrained(tmp_path / "b")
    loaded, profile = open_model(tmp_path / "b")
    assert profile.dtype == str(dtype).removeprefix("torch.")
    text = prompts(1, 20, 21)[0]
    # opened anew: `to` has rounded the rotary frequencies of the old one too
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = theirs(torch.tensor([text])).logits[0, -1]
    torch.testing.assert_close(Server(loaded).step([(0, text)])[0], expected, atol=1e-4, rtol=0)


def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path: Path) -> None:
    build("llama-tied", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, path)
    open_model(tmp_path)
    save_file(tensors | {"lm_head.weight": embedding + 1}, path)
    with pytest.raises(WrongTensors, match=r"differs(.|\n)*hint:"):
        open_model(tmp_path)


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    build("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, path)
    with pytest.raises(WrongTensors, match=r"model\.norm\.weight(.|\n)*float16(.|\n)*hint:"):
        open_model(tmp_path, torch.float16)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    build("llama", tmp_path)
    profile = read_profile(tmp_path)
    path = tmp_path / "model.safetensors"

    def cut(done: int, total: int) -> None:
        with path.open("r+b") as file:
            file.truncate(9000)

    with pytest.raises(BadHeader, match="ended inside tensor"):
        load_model(tmp_path, profile, dtype=torch.float32, device=CPU, kernels=load("reference"), on_progress=cut)


@pytest.fixture(scope="module")
def one_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("checkpoint")
    build("llama", folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "mrope"}, "rope_parameters": None}, "mrope"),
        ({"hidden_act": "gelu"}, "hidden_act: gelu"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised by awq"),
        ({"auto_map": {"AutoModel": "modeling.Mine"}}, "auto_map"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ],
)
def test_variants_that_are_not_supported_are_refused_by_name(
    change: dict[str, Any], named: str, one_checkpoint: Path, tmp_path: Path
) -> None:
    config = json.loads((one_checkpoint / "config.json").read_text())
    shutil.copy(one_checkpoint / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedFeature, match=f"{named}(.|\n)*hint:"):
        read_profile(tmp_path)


def test_a_rope_type_that_slipped_through_does_not_become_the_default() -> None:
    with pytest.raises(ValueError, match="spiral"):
        Rotary(
            {"rope_type": "spiral", "rope_theta": 1.0, "factor": 2, "original_max_position_embeddings": 4},
            8,
            CPU,
            load("reference"),
        )
