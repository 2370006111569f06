"""The API's description against the router that serves it.

Schemathesis makes requests of the description, and holds the answers to it, streams included. It is given two
narrower ones: the same with the names of models that are there, without which everything would be a 404, and one
of fields that go with each other, for which the router must not find anything to refuse.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import sys
from pathlib import Path
from typing import Any, Final

import httpx
from tests.effort import EFFORT, times
from tests.integration.router_world import World

from quire.router.openapi import ENDPOINTS, as_json
from quire_schemas import signals

ROOT: Final = Path(__file__).resolve().parent.parent.parent
SEED: Final = 1 if EFFORT == 1 else secrets.randbelow(2**32)
NAMES: Final = {"enum": ["tiny", "org/tiny"]}
TOKEN: Final = {"type": "integer", "minimum": 0, "maximum": 200}
TEXT: Final = {"type": "string", "minLength": 1, "maxLength": 40}
SAID: Final = {
    "type": "object",
    "properties": {"role": {"const": "user"}, "content": TEXT},
    "required": ["role", "content"],
    "additionalProperties": False,
}
FEW: Final = {"type": "integer", "minimum": 1, "maximum": 8}
REPETITION: Final = {"enum": [None, {"max_pattern_size": 3, "min_count": 9}]}
SHARED: Final = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "seed", "n", "stop", "include_stop_str_in_output", "skip_special_tokens", "cache_salt", "return_token_ids",
    "user", "metadata", "service_tier", "store",
)  # fmt: skip
"""Fields of requests for text that go with each other whatever their values."""
AGREEING: Final[dict[str, dict[str, Any]]] = {
    "ChatRequest": {
        "messages": {
            "type": "array",
            "minItems": 1,
            "maxItems": 3,
            "items": SAID,
        },
        "max_completion_tokens": FEW,
        "repetition_detection": REPETITION,
        "logprobs": {"type": "boolean"},
        "logit_bias": {"enum": [{}, {"7": -100, "8": 1.5}]},
    },
    "CompletionRequest": {
        "prompt": {
            "anyOf": [
                TEXT,
                {"type": "array", "items": TOKEN, "minItems": 1, "maxItems": 8},
            ]
        },
        "max_tokens": FEW,
        "repetition_detection": REPETITION,
        "logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
        "echo": {"type": "boolean"},
    },
    "ResponsesRequest": {
        "input": {"anyOf": [TEXT, {"type": "array", "minItems": 1, "maxItems": 3, "items": SAID}]},
        "instructions": TEXT,
        "max_output_tokens": FEW,
    },
    "MessagesRequest": {
        "messages": {"type": "array", "minItems": 1, "maxItems": 3, "items": SAID},
        "max_tokens": FEW,
        "system": TEXT,
        "stop_sequences": {"type": "array", "maxItems": 2, "items": TEXT},
    },
    "ScoreRequest": {"queries": TEXT, "documents": {"type": "array", "minItems": 1, "maxItems": 3, "items": TEXT}},
    "EmbeddingRequest": {
        "input": {"type": "array", "items": TEXT, "minItems": 1,
                  "maxItems": 4},
        "encoding_format": {"enum": ["float", "base64"]},
    },
}  # fmt: skip

REQUIRED: Final[dict[str, tuple[str, ...]]] = {"ScoreRequest": ("queries", "documents")}
"""Fields that must be there though the schema cannot say so."""


def described() -> Any:
    """The description, with the names of the models that are there."""
    document = json.loads(as_json())
    for each in ENDPOINTS:
        for alias in each.aliases:
            del document["paths"][alias]
        if each.takes == "multipart/form-data" and each.request is not None:
            schema = document["components"]["schemas"][each.request.__name__]
            schema["properties"] = {
                name: schema["properties"][name] for name in schema["required"]
            }  # [] is no part
        if each.request is not None and "model" in each.request.model_fields:
            schema = document["components"]["schemas"][each.request.__name__]
            schema["properties"]["model"] = (
                NAMES if "model" in schema.get("required", ()) else {"enum": [*NAMES["enum"], None]}
            )
            schema["properties"].pop("timeout", None)  # one that is too short is a 504, and rightly so
    return plain(document)


def plain(schema: Any) -> Any:
    """A schema without discriminators: at arrays of what they tell apart Schemathesis gives up now and then."""
    if isinstance(schema, list):
        return [plain(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key != "discriminator"}
    return {"anyOf" if key == "oneOf" else key: plain(value) for key, value in kept.items()}


def exact(schema: Any) -> Any:
    """A schema with a few numbers in place of each range of whole ones: to JSON Schema 5.0 is one, too."""
    if isinstance(schema, list):
        return [exact(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") == "integer":
        low, high = schema["minimum"], schema["maximum"]
        return {"enum": sorted({low, (low + high) // 2, high})}
    return {key: exact(value) for key, value in schema.items()}


def agreeing() -> Any:
    """The description of requests for which there is nothing to refuse."""
    document = described()
    for name, fields in AGREEING.items():
        schema = document["components"]["schemas"][name]
        known = schema["properties"]
        assert set(fields) <= set(known), "a field that is gone"
        shared = {field: known[field] for field in SHARED if field in known}
        schema["properties"] = {"model": NAMES, **exact(shared), **exact(fields)}
        if "stream" in known:
            schema["properties"]["stream"] = {"type": "boolean"}
            schema["required"].append("stream")
        schema["required"] = list(dict.fromkeys([*schema["required"], *REQUIRED.get(name, ())]))
    document["paths"] = {
        each.path: document["paths"][each.path]
        for each in ENDPOINTS
        if each.request is not None and each.request.__name__ in AGREEING
    }
    return document


async def judge(world: World, folder: Path, document: Any, *options: str) -> dict[str, float]:
    """Have Schemathesis hold the router to a description; how many requests the model `tiny` then had, by end."""
    engine = await world.engine(text="one two three", tokens_per_step=4, pace=0.0005)
    await world.serve(engine)
    before = await world.metrics()
    file = folder / "described.json"
    file.write_text(json.dumps(document))
    command = (
        "-m", "schemathesis.cli", "run", str(file), "--url", world.url, f"--seed={SEED}", "--no-color",
        "--continue-on-failure", "--generation-database=none", "--warnings=off", "--request-timeout=20",
    )  # fmt: skip
    judging = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        *options,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=folder,
    )
    said, _ = await judging.communicate()
    assert judging.returncode == 0, said.decode()
    after = await world.metrics()
    ends = {
        name: count - before.get(name, 0.0)
        for name, count in after.items()
        if f"{signals.REQUESTS}_total{{" in name
    }
    assert not [name for name, count in ends.items() if count and 'finish="error"' in name]
    return {name: count for name, count in ends.items() if 'model="tiny"' in name and count}


def answered(ends: dict[str, float], operation: str) -> float:
    """Requests of an operation that had a whole answer."""
    whole = ('finish="stop"', 'finish="length"', 'finish="repetition"')
    mine = {name: count for name, count in ends.items() if f'operation="{operation}"' in name}
    return sum(count for name, count in mine.items() if any(word in name for word in whole))


async def test_no_request_of_the_described_shapes_is_answered_otherwise_than_described(
    world: World, tmp_path: Path
) -> None:
    phases = "fuzzing" if EFFORT == 1 else "examples,coverage,fuzzing"
    await judge(
        world, tmp_path, described(), f"--phases={phases}", f"--max-examples={times(5, 1000)}",
        "--exclude-checks=positive_data_acceptance",
    )  # fmt: skip


async def test_what_goes_together_is_never_refused(world: World, tmp_path: Path) -> None:
    ends = await judge(
        world, tmp_path, agreeing(), "--phases=fuzzing", f"--max-examples={times(20, 1000)}", "--mode=positive"
    )
    for operation in ("chat", "text_completion", "embeddings", "score", "responses"):
        paths = 2 if operation == "chat" else 1  # messages are chats
        assert answered(ends, operation) >= paths * times(15, 800), ends


async def test_the_described_paths_are_there_in_the_described_methods(world: World) -> None:
    async with httpx.AsyncClient(base_url=world.url) as http:
        for path in {path for each in ENDPOINTS for path in (each.path, *each.aliases)}:
            mine = [each for each in ENDPOINTS if path in (each.path, *each.aliases)]
            for method in ("PATCH", "OPTIONS"):
                answer = await http.request(method, re.sub(r"{\w+}", "any", path))
                assert answer.status_code == (405 if method == "PATCH" else 204)
                allowed = set(answer.headers["allow"].split(", ")) - {"OPTIONS"}
                assert allowed == {method for each in mine for method in each.methods}, path


async def test_a_path_that_leads_nowhere_is_told_what_was_meant(world: World) -> None:
    async with httpx.AsyncClient(base_url=world.url) as http:
        slip = (await http.post("/v1/chat/completion", json={})).json()["error"]
        lost = (await http.get("/a/b/c")).json()["error"]
    assert slip["code"] == lost["code"] == "not_found"
    assert slip["message"].endswith("Did you mean /v1/chat/completions?")
    assert lost["message"].endswith("GET /openapi.json describes those that there are.")


async def test_the_served_description_is_the_published_one(world: World) -> None:
    async with httpx.AsyncClient(base_url=world.url) as http:
        answer = await http.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    assert answer.content == as_json()
    assert answer.json() == json.loads((ROOT / "docs" / "reference" / "openapi.json").read_bytes())
