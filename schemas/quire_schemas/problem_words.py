"""Problems in words: what Pydantic finds in our schemas, said to whoever wrote the manifest, with a hint."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic_core import ErrorDetails

from quire_schemas.access import AccessPolicy
from quire_schemas.fields import Path, Shape, fields_of
from quire_schemas.keys import masked
from quire_schemas.resource import Resource
from quire_schemas.yaml_tree import Node


def explained(kind: type[Resource], path: Path) -> str:
    """The path as `platform explain` takes it."""
    return ".".join([kind.__name__.lower(), *(p for p in path if isinstance(p, str))])


def field_at(kind: type[Resource], path: Path) -> Shape | None:
    """The shape of what stands at a path, None below maps."""
    shape: Shape | None = Shape("section", section=kind)
    for part in path:
        if shape is None:
            return None
        if isinstance(part, int):
            shape = shape.item
        elif shape.section is not None:
            child = fields_of(shape.section).get(part)
            shape = child.shape if child is not None else None
        else:
            shape = shape.item
    return shape


ERROR_WORDS: Mapping[str, str] = {
    "missing": "is required",
    "value_error": "{error}",
    "extra_forbidden": "unknown field",
    "model_type": "should be a mapping of fields, not {given}",
    "dict_type": "should be a mapping, not {given}",
    "tuple_type": "should be a list, not {given}",
    "too_short": "should have {min_length} or more entries, not {actual_length}",
    "too_long": "should have {max_length} or fewer entries, not {actual_length}",
    "string_type": "should be text, not {given}",
    "string_unicode": "has characters that are no text",
    "string_too_short": "should have {min_length} or more characters",
    "string_too_long": "should have {max_length} or fewer characters",
    "string_pattern_mismatch": "{given} does not have the form of this field",
    "int_type": "should be a whole number, not {given}",
    "int_from_float": "should be a whole number, not {given}",
    "int_parsing_size": "is too large a number",
    "finite_number": "should be a finite number",
    "bool_type": "should be a boolean, not {given}",
    "literal_error": "should be {expected}, not {given}",
    "greater_than_equal": "should be {ge} or more, not {given}",
    "less_than_equal": "should be {le} or less, not {given}",
}
"""Each kind of error that Pydantic can find in our schemas, in our words. What they name is Pydantic's context,
and what was given."""


def in_words(error: ErrorDetails, *, hidden: bool = False) -> str:
    """What Pydantic found, as a predicate of the field; `hidden`: without what stands there."""
    words = ERROR_WORDS.get(error["type"], "does not suit this field")
    given = "what stands here" if hidden else _brief(error.get("input"))
    return words.format(**{**error.get("ctx", {}), "given": given})


def hides(kind: type[Resource], path: Sequence[int | str]) -> bool:
    """Whether what stands at a path is never shown: people put keys themselves among those of a policy."""
    return kind is AccessPolicy and tuple(path[:2]) == ("spec", "keys")


def key_hint(path: Path, given: object) -> str:
    """What to write for a key that stands where its value must not; empty if that is not the trouble."""
    write = "put what platform key create printed behind hash here, or valueFrom: {secretRef: NAME}"
    if isinstance(given, str) and masked(given) != given:
        return f"that is the key itself: {write}, and replace the key if others may have seen this"
    return f"a key itself never stands here: {write}" if path[-1] == "hash" else ""


def own_hint(error: ErrorDetails) -> str:
    """The hint that one of our own checks brought along."""
    cause = error.get("ctx", {}).get("error")
    return str(getattr(cause, "hint", ""))


_PATTERN_HINTS = {
    r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$": "lower-case letters, digits, '-' and '.', at most 63 characters",
    r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}$": "letters, digits and . _ : / @ -, starting with a letter or digit",
    r"^[A-Za-z_][A-Za-z0-9_]{0,127}$": "letters, digits and '_', not starting with a digit",
    r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d)$": "for example '2027-01-01T00:00:00Z'",
    r"^(none|prefix|user|header:[A-Za-z0-9!#$%&'*+.^_`|~-]+)$": "one of none, prefix, user, header:<name>",
}


def value_hint(error: ErrorDetails, shape: Shape | None) -> str:
    """What to write instead of a value; empty if there is nothing more to say than the message did."""
    kind, given = error["type"], error.get("input")
    if kind == "missing":
        return "add it"
    if kind == "literal_error" and shape is not None and str not in shape.types:
        return f"one of {', '.join(str(v) for v in shape.values)}"
    if kind == "literal_error" and shape is not None:
        return _closest(str(given), [str(v) for v in shape.values])
    if kind == "string_pattern_mismatch":
        pattern = str(error["ctx"]["pattern"])
        hint = _PATTERN_HINTS.get(pattern, f"it must match {pattern}")
        slug = re.sub(r"[^a-z0-9.-]+", "-", str(given).lower()).strip("-.")[:63].strip("-.")
        return f"{hint}: did you mean '{slug}'?" if "lower-case" in hint and slug else hint
    if kind == "bool_type":
        yes_no = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
        meant = yes_no.get(str(given).lower())
        return f"write {meant}: in YAML 1.2 '{given}' is text" if meant else "write true or false"
    if kind in ("int_type", "int_from_float"):
        if isinstance(given, str) and re.fullmatch(r"[-+]?\d+", given):
            return f"remove the quotes: {given}"
        return "write a whole number"
    if kind in ("too_long", "string_too_long"):
        return "make it shorter"
    if kind in ("too_short", "string_too_short"):
        return "it cannot be empty" if error["ctx"]["min_length"] == 1 else "make it longer"
    return ""


def _closest(given: str, values: list[str]) -> str:
    by_word = {v.lower(): v for v in values}
    short = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "gpu": "cuda"}
    alias = short.get(given.lower())
    if alias in values:
        return f"did you mean '{alias}'?"
    near = difflib.get_close_matches(given.lower()[:64], list(by_word), 1, 0.5)
    return f"did you mean '{by_word[near[0]]}'?" if near else f"one of {', '.join(values)}"


def quoted(node: Node) -> str:
    """A node as a message names it: what a scalar says, else what kind of thing it is."""
    if node.kind != "scalar":
        return f"a {node.kind}"
    return "nothing" if node.is_null else _brief(node.text)


def _brief(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def article(shape: Shape) -> str:
    """What a shape is, with its article."""
    words: dict[Literal["section", "list", "map", "scalar"], str] = {
        "section": "a mapping of fields",
        "map": "a mapping of names to text",
        "list": "a list",
        "scalar": "a single value",
    }
    return words[shape.kind]


def structure_hint(shape: Shape) -> str:
    """How what has this shape is written."""
    if shape.section is not None:
        return f"its fields are {', '.join(list(fields_of(shape.section))[:12])}"
    if shape.kind == "list" and shape.item is not None and shape.item.section is not None:
        names = list(fields_of(shape.item.section))
        return f"write [{{{names[0]}: …}}], one mapping for each; their fields are {', '.join(names[:12])}"
    if shape.kind == "list":
        return "write [one, two], or a line with '- ' for each"
    return "write {key: value}" if shape.kind == "map" else f"expected {shape.word}"


def plain_word(name: str) -> str:
    """A name without what spellings differ by."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


ALIEN_NAMES = {
    "model": "spec.source",
    "model_path": "spec.source",
    "tokenizer_path": "spec.tokenizer.source",
    "chat_template": "spec.tokenizer.chatTemplateFile",
    "hf_token": "spec.sourceAuth",
    "served_model_name": "spec.servedModelNames",
    "max_model_len": "spec.engine.maxModelLen",
    "context_length": "spec.engine.maxModelLen",
    "max_seq_len": "spec.engine.maxModelLen",
    "ctx_size": "spec.engine.maxModelLen",
    "n_ctx": "spec.engine.maxModelLen",
    "gpu_memory_utilization": "spec.engine.memory",
    "mem_fraction_static": "spec.engine.memory",
    "kv_cache_dtype": "spec.engine.kvCache.dtype",
    "kv_cache_memory_bytes": "spec.engine.kvCache.size",
    "block_size": "spec.engine.kvCache.blockSize",
    "page_size": "spec.engine.kvCache.blockSize",
    "swap_space": "spec.engine.kvCache.swapSpace",
    "enforce_eager": "spec.engine.enforceEager",
    "disable_cuda_graph": "spec.engine.enforceEager",
    "random_seed": "spec.engine.seed",
    "tensor_parallel_size": "spec.parallelism.tensor",
    "tp_size": "spec.parallelism.tensor",
    "tp": "spec.parallelism.tensor",
    "pipeline_parallel_size": "spec.parallelism.pipeline",
    "pp_size": "spec.parallelism.pipeline",
    "data_parallel_size": "spec.parallelism.data",
    "dp_size": "spec.parallelism.data",
    "enable_expert_parallel": "spec.parallelism.expert",
    "max_num_seqs": "spec.batching.maxNumSeqs",
    "max_running_requests": "spec.batching.maxNumSeqs",
    "max_num_batched_tokens": "spec.batching.maxNumBatchedTokens",
    "chunked_prefill_size": "spec.batching.maxNumBatchedTokens",
    "enable_chunked_prefill": "spec.batching.chunkedPrefill",
    "enable_prefix_caching": "spec.batching.prefixCaching",
    "scheduling_policy": "spec.batching.policy",
    "trust_remote_code": "spec.trustRemoteCode",
    "speculative_config": "spec.speculative",
    "num_speculative_tokens": "spec.speculative.numTokens",
    "enable_lora": "spec.lora",
    "max_lora_rank": "spec.lora.maxRank",
    "max_loras": "spec.lora.maxLoaded",
    "lora_modules": "spec.lora.adapters",
    "tool_call_parser": "spec.parsers.tools",
    "reasoning_parser": "spec.parsers.reasoning",
    "replica_count": "spec.replicas",
    "host": "spec.bind of kind Gateway",
    "port": "spec.port of kind Gateway",
    "uvicorn_host": "spec.bind of kind Gateway",
    "api_key": "spec.keys of kind AccessPolicy",
}
"""Flags of vLLM, SGLang and llama.cpp, dashes as underscores -> the field here."""
