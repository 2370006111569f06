"""What of PEFT's format is read, and what is refused by name before anything is loaded."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from tests.adapters import TINY, write_adapter

from quire_schemas.adapters import CONFIG, WEIGHTS, digest_of, read_adapter
from quire_schemas.checkpoint import expected_tensors, read_config
from quire_schemas.checkpoint_files import CheckpointError

BASE = read_config(TINY)


def test_ranks_and_scales_are_those_of_the_config(tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path / "a",
        rank=4,
        lora_alpha=12,
        rank_pattern={"layers.1.mlp.up_proj": 7, "up_proj": 3},
        alpha_pattern={"model.layers.0.self_attn.q_proj": 2},
    )
    found = read_adapter(folder, BASE)
    assert len(found.parts) == 7 * BASE.num_layers
    up = [found.parts[f"model.layers.{layer}.mlp.up_proj"] for layer in (0, 1)]
    assert [(part.rank, part.scale) for part in up] == [(3, 4.0), (7, 12 / 7)]
    assert found.parts["model.layers.0.self_attn.q_proj"].scale == 0.5
    assert found.parts["model.layers.1.self_attn.q_proj"].scale == 3.0
    assert found.rank == 7
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"use_rslora": True}))
    assert read_adapter(folder, BASE).parts["model.layers.1.mlp.up_proj"].scale == 12 / math.sqrt(7)


def test_a_base_may_have_a_head_of_its_own(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((TINY / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    untied = read_config(base)
    assert "lm_head.weight" in dict(expected_tensors(untied))
    assert len(read_adapter(write_adapter(tmp_path / "a", base=base), untied).parts) == 7 * BASE.num_layers


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "LOHA"}, "peft_type: 'LOHA'"),
        ({"task_type": "SEQ_CLS"}, "task_type: 'SEQ_CLS'"),
        ({"bias": "all"}, "bias: 'all'"),
        ({"use_dora": True}, "use_dora: True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: \['lm_head'\]"),
        ({"lora_bias": True}, "lora_bias: True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
        ({"of_a_later_version": "on"}, "of_a_later_version: 'on'"),
        ({"rank_pattern": {"(a+)+$": 4}}, "is an expression"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern.q_proj: 'x' is not a number"),
        ({"r": 0}, "r: 0 is not a whole number"),
        ({"r": 65}, "rank 65, above maxRank 64"),
        ({"lora_alpha": float("nan")}, "lora_alpha: nan"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules: 'lm_head' has no tensor"),
    ],
)
def test_what_would_change_the_numbers_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    folder = write_adapter(tmp_path / "a", targets=["q_proj"])
    whole = json.loads((folder / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match=said) as error:
        read_adapter(folder, BASE, 64)
    assert CONFIG in error.value.message
    assert error.value.hint


@pytest.mark.parametrize(
    "config", [{"use_dora": None}, {"of_a_later_version": False}, {"layers_to_transform": [0]}]
)
def test_what_is_off_or_only_tells_of_training_is_passed_over(tmp_path: Path, config: dict[str, Any]) -> None:
    assert read_adapter(write_adapter(tmp_path / "a", layers=[0], **config), BASE).parts


def rewrite(folder: Path, change: Any) -> None:
    """The weights with their header changed: names and shapes are all that is looked at."""
    data = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (f"{Q}.lora_A.weight", "base_model.model.model.embed_tokens.lora_embedding_A", "is neither lora_A nor"),
        (f"{Q}.lora_A.weight", f"{Q}.lora_magnitude_vector.weight", "is neither lora_A nor"),
        (f"{Q}.lora_", "base_model.model.lm_head.lora_", "lm_head is not added to"),
        (f"{Q}.lora_", f"{Q.replace('.0.', '.17.')}.lora_", "the base has no model.layers.17"),
        (f"{Q}.lora_", "base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_", "is not added to"),
        (f"{Q}.lora_", "base_model.model.model.layers.0.self_attn.k_proj.lora_", "lora_B is"),
        (f"{Q}.lora_A.weight", f"{Q.replace('.0.', '.1.')}.lora_A.weight", "has no lora_"),
    ],
)
def test_tensors_that_are_not_those_of_the_base_are_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    folder = write_adapter(tmp_path / "a", targets=["q_proj"], layers=[0], target_modules="q_proj")
    rewrite(folder, lambda header: {name.replace(old, new): entry for name, entry in header.items()})
    with pytest.raises(CheckpointError, match=said):
        read_adapter(folder, BASE)


def test_a_file_that_is_cut_or_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="the file is damaged"):
        read_adapter(folder, BASE)
    (tmp_path / "elsewhere").write_bytes(data)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        read_adapter(folder, BASE)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=WEIGHTS):
        digest_of(folder)


def test_a_digest_is_of_the_contents(tmp_path: Path) -> None:
    one, same = write_adapter(tmp_path / "a", 1), write_adapter(tmp_path / "b", 1)
    before = digest_of(one)
    assert before == digest_of(same)
    stat = (one / CONFIG).stat()
    (one / CONFIG).write_text((one / CONFIG).read_text().replace("0.1", "0.2"))
    os.utime(one / CONFIG, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert digest_of(one) != before
