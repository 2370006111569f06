"""Command lines of other servers: each flag becomes a field, or is named as one that does not."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from quire_schemas.convert import BadCommand, from_vllm
from quire_schemas.manifest import load


def converted(flags: str) -> tuple[dict[str, Any], list[str]]:
    """The spec of the model, and what was left out."""
    found = from_vllm(f"vllm serve acme/model {flags}")
    return next(iter(yaml.safe_load_all(found.text)))["spec"], found.left_out


@pytest.mark.parametrize(
    ("flags", "section"),
    [
        ("", {}),
        ("--dtype half", {"engine": {"dtype": "float16"}}),
        ("--max-model-len 4096", {"engine": {"maxModelLen": 4096}}),
        ("--max-model-len=32k", {"engine": {"maxModelLen": 32000}}),
        ("--max_model_len 32K", {"engine": {"maxModelLen": 32768}}),
        ("--gpu-memory-utilization 0.925", {"engine": {"memory": "92.5%"}}),
        ("--served-model-name one two", {"servedModelNames": ["one", "two"]}),
        ("--enforce-eager", {"engine": {"enforceEager": True}}),
        ("--no-enable-prefix-caching", {"batching": {"prefixCaching": False}}),
        ("--enable-chunked-prefill false", {"batching": {"chunkedPrefill": False}}),
        (
            "--max-num-seqs 64 --max-num-batched-tokens 8192",
            {"batching": {"maxNumSeqs": 64, "maxNumBatchedTokens": 8192}},
        ),
        ("--kv-cache-dtype int8 --seed 7", {"engine": {"kvCache": {"dtype": "int8"}, "seed": 7}}),
        ("--kv-cache-dtype fp8_e4m3", {"engine": {"kvCache": {"dtype": "fp8"}}}),
        ("--revision 1234567", {"revision": "1234567"}),
        ("--tokenizer /tok -q int8", {"tokenizer": {"source": "file:///tok"}, "quantization": {"method": "int8"}}),
        ("--scheduling-policy priority", {"batching": {"policy": "priority"}}),
    ],
)  # fmt: skip
def test_flags_become_fields(flags: str, section: dict[str, Any]) -> None:
    spec, left_out = converted(flags)
    assert spec == {"source": "hf://acme/model", "servedModelNames": ["acme/model"], **section}
    assert left_out == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--uvloop", "--uvloop: there is no such field"),
        ("--api-key secret", "--api-key: write spec.keys by hand, in an object of kind AccessPolicy"),
        ("-tp 2", "spec.parallelism.tensor: not honoured by this version"),
        ("--gpu-memory-utilization high", "--gpu-memory-utilization high: the value is not one"),
        ("--port", "--port : the value is not one"),
        ("--max-model-len many", "spec.engine.maxModelLen: "),
    ],
)
def test_what_has_no_counterpart_is_named(flags: str, said: str) -> None:
    _, left_out = converted(flags)
    assert [line for line in left_out if line.startswith(said)] == left_out
    assert len(left_out) == 1


@pytest.mark.parametrize(
    "command",
    [
        "CUDA_VISIBLE_DEVICES=0 HF_HOME='/a b' vllm serve acme/model --seed 7",
        "python3 -m vllm.entrypoints.openai.api_server --seed 7 --model acme/model",
        "docker run --gpus all -p 8000:8000 -v /x:/y vllm/vllm-openai:latest --model acme/model --seed 7",
        "serve acme/model --seed 7",
        "acme/model --seed=7",
    ],
)
def test_a_server_may_be_started_in_any_way(command: str) -> None:
    found = from_vllm(command)
    assert found.left_out == []
    (document,) = yaml.safe_load_all(found.text)
    assert document["metadata"]["name"] == "model"
    named = {"source": "hf://acme/model", "servedModelNames": ["acme/model"], "engine": {"seed": 7}}
    assert document["spec"] == named


def test_the_whole_text_is_a_manifest_that_names_its_objects() -> None:
    found = from_vllm("/opt/bin/vllm serve /models/My_Llama --port 8080 --host 127.0.0.1")
    manifest = load([("x.yaml", found.text)])
    assert manifest.problems == []
    assert [str(item.key) for item in manifest.resources] == ["model/my-llama", "gateway/default"]
    assert found.text.startswith("# yaml-language-server: $schema=")


@pytest.mark.parametrize("command", ["vllm serve", "serve --max-model-len 3", "serve 'open", "serve a --seed 1 2"])
def test_what_is_no_command_line_is_refused(command: str) -> None:
    with pytest.raises(BadCommand):
        from_vllm(command)
