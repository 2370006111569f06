"""Command lines of other servers as manifests: what each flag becomes here, and which have no counterpart.

`from_vllm` reads what stands behind `vllm serve`. The names of fields are `manifest.ALIEN_NAMES`, the table that
explains a flag's spelling in an error; here is only how values are spelled. Nothing is dropped: a flag that is no
field is told of, and so is one whose value this version does not take, which the rules of a manifest find.

Exceptions:

    BadCommand(ValueError)     the command line is none of that server's
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from quire_schemas.explain import SCHEMA_ID
from quire_schemas.manifest import ALIEN_NAMES, load
from quire_schemas.resource import API_VERSION

_THOUSANDS = {"k": 1000, "m": 1000**2, "g": 1000**3, "K": 1024, "M": 1024**2, "G": 1024**3}
_SHORT = {
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "dp": "data_parallel_size",
    "q": "quantization",
}
_LISTS = {"served_model_name", "lora_modules"}
_HERE = {
    "seed": "spec.engine.seed",
    "dtype": "spec.engine.dtype",
    "revision": "spec.revision",
    "tokenizer": "spec.tokenizer.source",
    "quantization": "spec.quantization.method",
}
"""Flags of vLLM that are spelled as the field here is, and so in no table of other spellings."""


class BadCommand(ValueError):
    """What was given is no command line of that server."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(slots=True)
class Converted:
    """A manifest's text, and what of the command line is not in it or is not honoured, a sentence each."""

    text: str
    left_out: list[str] = field(default_factory=list)


def from_vllm(command: str) -> Converted:
    """`vllm serve MODEL --flag value ...`, with or without its first words, as a manifest. Raises `BadCommand`."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError as error:
        raise BadCommand(f"the command line cannot be read: {error}", "check its quotes") from error
    source, flags = _flags(_without_program(words))
    if source is None:
        raise BadCommand(
            "the command line names no model", 'platform convert --from vllm "serve MODEL --flag ..."'
        )
    left_out: list[str] = []
    spec: dict[str, Any] = {}
    gateway: dict[str, Any] = {}
    _put(spec, "spec.source", _source(source))
    for name, values in flags:
        try:
            _take(name, values, spec, gateway, left_out)
        except ValueError:
            given = " ".join(values)
            left_out.append(f"--{name.replace('_', '-')} {given}: the value is not one that can be converted")
    name = _name(source, spec)
    if "servedModelNames" not in spec and source != name and _source(source).startswith("hf://"):
        spec["servedModelNames"] = [source]  # what clients of that server ask for
    documents = [_document("Model", name, spec)]
    if gateway:
        documents.append(_document("Gateway", "default", gateway))
    text = "---\n".join(yaml.safe_dump(each, sort_keys=False, allow_unicode=True) for each in documents)
    text = f"# yaml-language-server: $schema={SCHEMA_ID}\n{text}"
    problems = load([("converted", text)]).problems
    left_out += [f"{problem.path}: {problem.message}" + _hint(problem.hint) for problem in problems]
    return Converted(text, left_out)


def _without_program(words: Sequence[str]) -> Sequence[str]:
    """The words behind the program, however it is started: with variables, as a module, in a container."""
    words = list(words)
    while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0], re.DOTALL):
        del words[0]
    module = next((n for n, word in enumerate(words) if word.startswith("vllm.entrypoints.")), None)
    image = next((n for n, word in enumerate(words) if "vllm-openai" in word), None)
    if module is not None and words[module - 1] == "-m":
        return words[module + 1 :]
    if image is not None and words[0].rsplit("/", 1)[-1] in ("docker", "podman", "nerdctl"):
        return words[image + 1 :]
    if words and words[0].rsplit("/", 1)[-1] == "vllm":
        del words[0]
    return words[1:] if words[:1] == ["serve"] else words


def _flags(words: Sequence[str]) -> tuple[str | None, list[tuple[str, list[str]]]]:
    """The model, and each flag (dashes as underscores) with its values."""
    source: str | None = None
    flags: list[tuple[str, list[str]]] = []
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            name, equals, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            flags.append((_SHORT.get(name, name), [value] if equals else []))
        elif source is None and not flags:
            source = word
        elif flags and (not flags[-1][1] or flags[-1][0] in _LISTS):
            flags[-1][1].append(word)
        else:
            raise BadCommand(f"{word!r} belongs to no flag", "quote values that have spaces in them")
    named = [values[0] for name, values in flags if name == "model" and values]
    rest = [(name, values) for name, values in flags if name != "model"]
    return source or next(iter(named), None), rest


def _take(
    name: str, values: list[str], spec: dict[str, Any], gateway: dict[str, Any], left_out: list[str]
) -> None:
    shown = f"--{name.replace('_', '-')}"
    negated = name.startswith("no_") and (ALIEN_NAMES.get(name[3:]) or _HERE.get(name[3:]))
    path = negated or ALIEN_NAMES.get(name) or _HERE.get(name)
    if path is None:
        left_out.append(f"{shown}: there is no such field; platform explain model.spec lists them")
        return
    target, _, kind = path.partition(" of kind ")
    if kind == "Gateway":
        (value,) = values
        _put(gateway, target, int(value) if target == "spec.port" else value)
        return
    if kind or name in ("speculative_config", "enable_lora", "hf_token"):
        left_out.append(f"{shown}: write {target} by hand" + (f", in an object of kind {kind}" if kind else ""))
        return
    _put(spec, target, _value(name, target, values, negated=bool(negated)))


def _value(name: str, path: str, values: list[str], *, negated: bool) -> Any:
    """A flag's value as the field spells it. Raises `ValueError`."""
    if name in _LISTS:
        return values
    if not values:
        return not negated
    (value,) = values
    if path == "spec.engine.memory":
        return f"{round(float(value) * 100, 4):g}%"
    if path == "spec.engine.kvCache.swapSpace":
        return f"{float(value):g}Gi"
    if path in ("spec.tokenizer.source",):
        return _source(value)
    if value.lower() in ("true", "false"):
        return (value.lower() == "true") != negated
    if path in _TEXTS:
        return _DTYPES.get(value, value) if path.endswith(".dtype") else value
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG]?)", value):
        return round(float(found[1]) * _THOUSANDS.get(found[2], 1))
    return value


_DTYPES = {"half": "float16", "float": "float32", "fp8_e4m3": "fp8"}
"""Other spellings of number formats."""
_TEXTS = {"spec.revision", "spec.engine.dtype", "spec.engine.kvCache.dtype", "spec.quantization.method"}
"""Fields whose values look like numbers now and then and are none."""


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *sections, name = path.removeprefix("spec.").split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[name] = value


def _source(text: str) -> str:
    """A repository's name or a folder as a source."""
    if "://" in text:
        return text
    return f"file://{text}" if text.startswith(("/", "./", "../", "~")) else f"hf://{text}"


def _name(source: str, spec: dict[str, Any]) -> str:
    """A name for the object: the first served name, else the last part of the source, as names are spelled."""
    served = spec.get("servedModelNames") or [source.rstrip("/").rsplit("/", 1)[-1]]
    name = re.sub(r"[^a-z0-9.-]+", "-", str(served[0]).rsplit("/", 1)[-1].lower()).strip(".-")
    return name[:63].rstrip(".-") or "model"


def _document(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec}


def _hint(hint: str | None) -> str:
    return f" ({hint})" if hint else ""


READERS: dict[str, Callable[[str], Converted]] = {"vllm": from_vllm}
"""The servers whose command lines can be read."""
