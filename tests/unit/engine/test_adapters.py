"""Adapters in an engine: exact against the merged checkpoint, together as alone, and nothing to who has none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests.adapters import merge, write_adapter
from tests.engine_specs import run, tiny_spec
from transformers import AutoModelForCausalLM

from quire_engine.engine import Engine
from quire_engine.errors import RequestRefused
from quire_schemas.adapters import TARGETS, digest_of
from quire_schemas.checkpoint_files import WrongTensors
from quire_schemas.wire import Adapter, BeamResult, BeamSearch, Delta, Generate, Pooling, Quantization, Sampling

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=3)
PLAIN = msgspec.structs.replace(GREEDY, logprobs=None)
"""What most requests are."""
PROMPT = [11 + 7 * at % 900 for at in range(40)]
PATTERNS: dict[str, Any] = {"rank_pattern": {"layers.0.self_attn.q_proj": 6, "up_proj": 3}, "use_rslora": True}
"""Ranks of its own for some projections, an odd one among them, and the other rule of scaling."""


def scale_b(module: str) -> float:
    rank = 6 if module.endswith("layers.0.self_attn.q_proj") else 3 if module.endswith("up_proj") else 4
    return (5.0 if module.endswith("v_proj") else 8.0) / math.sqrt(rank)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "a": write_adapter(folder / "a", 1),
        "b": write_adapter(folder / "b", 2, alpha_pattern={"v_proj": 5.0}, **PATTERNS),
    }


@pytest.fixture(scope="module")
def merged(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    into = tmp_path_factory.mktemp("merged")
    scales = {f"layers.{n}.{block}.{t}": scale_b(f"layers.{n}.{block}.{t}")
              for n in range(6) for block in ("self_attn", "mlp") for t in TARGETS}  # fmt: skip
    return {
        "a": merge(folders["a"], into / "a", scale=2.0),
        "b": merge(folders["b"], into / "b", scale=scales),
    }


def adapted(folders: dict[str, Path], **fields: Any) -> Engine:
    found = tuple(Adapter(name, str(folder), digest_of(folder)) for name, folder in folders.items())
    return Engine.load(tiny_spec(adapters=found, **{"prefix_caching": True, **fields}))


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> Engine:
    return adapted(folders)


def ask(name: str, adapter: str = "", prompt: list[int] = PROMPT, **fields: Any) -> Generate:
    return Generate(name, list(prompt), GREEDY, adapter=adapter, **fields)


def told(deltas: list[Delta]) -> tuple[list[int], list[Any]]:
    """Tokens, and the log-probabilities of each with those of the likeliest, bit by bit."""
    assert all(delta.error is None for delta in deltas), deltas
    return [t for delta in deltas for t in delta.token_ids], [s for delta in deltas for s in delta.logprobs or ()]


@pytest.mark.parametrize("name", ["a", "b"])
def test_an_adapter_says_what_the_merged_checkpoint_says(
    engine: Engine, merged: dict[str, Path], name: str
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(str(merged[name]), dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    said = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12, do_sample=False,
        eos_token_id=[], return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    tokens, scores = told(run(engine, ask("x", name))["x"])
    assert tokens == said.sequences[0, len(PROMPT) :].tolist()
    for score, logits in zip(scores, said.logits, strict=True):
        expected = torch.log_softmax(logits[0], -1)
        for token, logprob in score.top:
            assert logprob == pytest.approx(float(expected[token]), abs=2e-4)
    assert tokens != told(run(engine, ask("y"))["y"])[0]


@pytest.mark.parametrize(
    "fields", [{}, {"async_scheduling": True}, {"max_num_batched_tokens": 7}, {"max_num_seqs": 2}]
)
def test_who_shares_steps_says_what_each_says_alone(folders: dict[str, Path], fields: dict[str, Any]) -> None:
    """Base and two adapters take turns, all with the same beginning, which none may find in another's cache."""
    engine = adapted(folders, **fields)
    names = ["", "a", "b", "a", "", "b"]
    prompts = {f"{n}": [*PROMPT, 100 + n] for n in range(len(names))}
    asked = [ask(str(n), name, prompts[str(n)]) for n, name in enumerate(names)]
    mixed = {name: told(deltas) for name, deltas in run(engine, *asked).items()}
    for number, name in enumerate(names):
        fresh = adapted(folders, prefix_caching=False)
        alone = told(run(fresh, ask("alone", name, prompts[str(number)]))["alone"])
        assert mixed[str(number)] == alone, name


def test_in_a_large_batch_each_says_what_it_says_alone(engine: Engine, folders: dict[str, Path]) -> None:
    """So many that plain requests are planned as one, and those with adapters beside them."""
    alone = {name: told(run(engine, ask("x", name))["x"])[0] for name in ("", "a", "b")}
    large = adapted(folders, max_num_seqs=64, num_blocks=512)
    names = {f"{n}": ("", "a", "", "b", "", "")[n % 6] for n in range(48)}
    heard = run(large, *(Generate(n, list(PROMPT), PLAIN, adapter=name) for n, name in names.items()))
    for number, name in names.items():
        assert told(heard[number])[0] == alone[name], (number, name)


@pytest.mark.parametrize("quantization", [None, Quantization("int8", "fp32"), Quantization("int4", "fp32", 32)])
def test_rows_without_an_adapter_have_the_bits_of_an_engine_without(
    folders: dict[str, Path], quantization: Quantization | None
) -> None:
    plain = Engine.load(tiny_spec(quantization=quantization))
    expected = told(run(plain, ask("x"))["x"])
    engine = adapted(folders, quantization=quantization)
    heard = run(engine, ask("1", "a"), ask("x"), ask("2", "b"))
    assert told(heard["x"]) == expected
    assert told(heard["1"])[0] != expected[0] != told(heard["2"])[0]


def test_blocks_are_found_by_requests_of_the_same_adapter_alone(engine: Engine) -> None:
    prompt = [900 - at for at in range(48)]

    def cached(adapter: str) -> int:
        before = engine.stats().prefix_hit_tokens
        run(engine, ask("x", adapter, prompt))
        return engine.stats().prefix_hit_tokens - before

    assert [cached(name) for name in ("", "a", "b")] == [0, 0, 0]
    assert [cached(name) for name in ("", "a", "b")] == [32, 32, 32]


def test_the_same_contents_by_another_name_and_other_contents_by_the_same_have_caches_of_their_own(
    folders: dict[str, Path],
) -> None:
    engine = adapted({"a": folders["a"], "again": folders["a"]})
    roots = {engine._adapter(name)[1] for name in ("", "a", "again")}
    assert len(roots) == 3
    assert adapted({"a": folders["b"]})._adapter("a")[1] not in roots


def test_vectors_are_those_of_the_adapter(engine: Engine, merged: dict[str, Path]) -> None:
    reference = Engine.load(tiny_spec(model_dir=str(merged["a"])))

    def vector(engine: Engine, adapter: str) -> list[float]:
        asked = msgspec.structs.replace(ask("v", adapter), pooling=Pooling("mean"))
        (delta,) = run(engine, asked)["v"]
        assert delta.embedding is not None
        return torch.frombuffer(bytearray(delta.embedding), dtype=torch.float32).tolist()

    assert vector(engine, "a") == pytest.approx(vector(reference, ""), abs=1e-4)
    assert vector(engine, "") != pytest.approx(vector(reference, ""), abs=1e-2)


def test_an_unknown_adapter_is_refused_and_disturbs_nobody(engine: Engine) -> None:
    with pytest.raises(RequestRefused, match="no adapter 'c' here; those that are: a, b") as refused:
        engine.add(ask("x", "c"))
    assert refused.value.code == "model_not_found"
    assert not engine.has_work


def test_an_adapter_that_changed_since_it_was_planned_is_not_loaded(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", 1)
    spec = tiny_spec(adapters=(Adapter("a", str(folder), digest_of(folder)),))
    write_adapter(folder, 2)
    with pytest.raises(WrongTensors, match="is not what it was"):
        Engine.load(spec)


def test_a_batch_invariant_engine_keeps_to_it_with_adapters(folders: dict[str, Path]) -> None:
    engine = adapted(folders, batch_invariant=True)
    heard = run(engine, ask("x", "b"), ask("y"), ask("z", "a"))
    assert told(heard["x"]) == told(run(adapted(folders), ask("x", "b"))["x"])


def test_a_search_is_that_of_the_merged_checkpoint(engine: Engine, merged: dict[str, Path]) -> None:
    reference = Engine.load(tiny_spec(model_dir=str(merged["a"])))

    def beams(engine: Engine, adapter: str) -> list[BeamResult]:
        sampling = Sampling(max_tokens=8, temperature=0.0)
        deltas = run(engine, Generate("s", list(PROMPT), sampling, adapter=adapter, beam=BeamSearch(3)))["s"]
        assert deltas[-1].beams is not None, deltas[-1]
        return list(deltas[-1].beams)

    found, expected = beams(engine, "a"), beams(reference, "")
    assert [beam.token_ids for beam in found] == [beam.token_ids for beam in expected]
    assert [beam.logprob for beam in found] == pytest.approx([beam.logprob for beam in expected], abs=2e-3)
    assert [beam.token_ids for beam in beams(engine, "")] != [beam.token_ids for beam in expected]
