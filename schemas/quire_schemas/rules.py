"""Rules that a field's type cannot state: between fields, between documents, and what this version refuses.

They run as a pass of their own over whatever parsed, so that a user with a typo in one field still learns in
the same run that two others contradict each other. A rule asks `Facts` for values; asking for one that did
not parse ends that rule without a finding, since its answer would be a guess.

A declared field is honoured or refused by name. `refusals` walks the declared fields and compares each with
what its declaration says (`resource.declared`): data, not code.
"""

from __future__ import annotations

import difflib
import ipaddress
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from quire_schemas.dialects import HARMONY, NONE
from quire_schemas.fields import Path, SchemaField, Shape, default_of, fields_of
from quire_schemas.gateway import is_loopback
from quire_schemas.quantities import parse_duration, parse_money, parse_percent
from quire_schemas.resource import HONOURED, Resource, Strict, honoured_values, support
from quire_schemas.windows import MAX_SECONDS, BadSchedule, Schedule, zone

BUILTIN_MODELS = ("tiny",)
MAX_PRICE = 10_000_000
"""For a million tokens: what a key spends in an hour is a number of 64 bits."""
REFUSED = "not honoured by this version"
ENGINE_VARIABLES = ("QUIRE_SCHEDULE_TRACE",)
"""Variables of our own that a manifest may set for an engine; each names a file."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that is broken. `path` is where it shows; `at_key` puts it at the field's name, not its value."""

    path: Path
    message: str
    hint: str
    at_key: bool = False


class Unknown(Exception):
    """A value that did not parse was asked for."""


class Facts:
    """One document's values: those declared, and defaults for the rest."""

    def __init__(self, kind: type[Resource], tree: dict[str, Any], bad: set[Path]) -> None:
        self.kind = kind
        self.tree = tree
        self._bad = bad

    def __getitem__(self, path: str) -> Any:
        """The value at a dotted path, or its default. Raises `Unknown` if anything at or below it is bad."""
        parts = tuple(path.split("."))
        if any(bad[: len(parts)] == parts or parts[: len(bad)] == bad for bad in self._bad):
            raise Unknown(path)
        value: Any = self.tree
        default: Any = None
        section: type[Strict] | None = self.kind
        for part in parts:
            if section is None:
                raise KeyError(path)
            field = fields_of(section)[part]
            default = default_of(field)
            value = value.get(part) if isinstance(value, dict) else None
            section = field.shape.section
        return default if value is None else value

    def entries(self, path: str, *fields: str) -> list[tuple[int, Any]]:
        """Entries of the list at a dotted path, with their places: those in which nothing is bad, or none of
        `fields`. So a rule about each entry, or about two of them, holds whatever is wrong with a third.
        """
        parts = tuple(path.split("."))
        if any(parts[: len(bad)] == bad for bad in self._bad):
            raise Unknown(path)
        value: Any = self.tree
        for part in parts:
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, list):
            return list(enumerate(self[path] or ()))
        found = []
        for index, entry in enumerate(value):
            at: Path = (*parts, index)
            asked = [(*at, name) for name in fields] or [at]
            inside = any(bad[: len(each)] == each for bad in self._bad for each in asked)
            if at not in self._bad and not inside:
                found.append((index, entry))
        return found

    def known(self, *paths: str) -> Iterator[tuple[Path, Any]]:
        """Those of these fields that parsed, with their values: for a rule about each of them alone."""
        for path in paths:
            try:
                yield tuple(path.split(".")), self[path]
            except Unknown:
                continue

    def declares(self, path: str) -> bool:
        """Whether the document itself has the field."""
        value: Any = self.tree
        for part in path.split("."):
            if not isinstance(value, dict) or part not in value:
                return False
            value = value[part]
        return True

    def first_declared(self, *paths: str) -> Path:
        """The first of these fields that the document has; the first of all if it has none."""
        return tuple(next((p for p in paths if self.declares(p)), paths[0]).split("."))


def check(facts: Facts) -> Iterator[Finding]:
    """All findings in one document. A path that the caller calls bad meanwhile is bad to the rules that follow."""
    yield from refusals(facts.kind, facts.tree)
    for rule in _RULES.get(facts.kind.__name__, ()):
        try:
            yield from rule(facts)
        except Unknown:
            continue


def refusals(section: type[Strict], tree: dict[str, Any], prefix: Path = ()) -> Iterator[Finding]:
    """Declared fields that this version does not honour, unless declared as what it does anyway."""
    fields = fields_of(section)
    for name, value in tree.items():
        field, path = fields[name], (*prefix, name)
        if not prefix and name in ("metadata", "spec"):
            inner = field.shape.section
            if inner is not None and isinstance(value, dict):
                yield from refusals(inner, value, path)
            continue
        reason = support(field.info)
        if reason != HONOURED:
            if not _is_honoured(field, value):
                allowed = honoured_values(field.info)
                hint = f"remove it, or declare {_choice(allowed)}" if allowed else "remove it"
                yield Finding(path, f"{REFUSED}: {reason}", hint)
        else:
            yield from _refusals_inside(field.shape, value, path)


def source_finding(text: str, path: Path) -> Finding | None:
    """What is wrong with a source, if anything: its form, or a place this version cannot read from."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        if text.startswith(("/", ".", "~")):
            return Finding(path, "is not a source", "a folder is written file:///absolute/path")
        hint = f"did you mean 'hf://{text}'?" if _HUB_NAME.fullmatch(text) else _SOURCE_FORMS
        return Finding(path, "is not a source: it has no scheme", hint)
    if scheme == "builtin":
        if rest in BUILTIN_MODELS:
            return None
        return Finding(path, f"there is no built-in model {rest!r}", "the built-in model is builtin://tiny")
    if scheme == "file":
        if rest.startswith("/"):
            return None
        return Finding(
            path, "a file:// source needs an absolute path", f"for example file:///{rest or 'models/llama'}"
        )
    if scheme == "hf":
        if _HUB_NAME.fullmatch(rest):
            return None
        name, _, revision = rest.partition("@")
        if revision and _HUB_NAME.fullmatch(name):
            return Finding(path, "a revision does not belong in the source", f"declare revision: {revision}")
        return Finding(path, "is not the name of a Hugging Face repository", "write hf://organisation/name")
    if scheme in ("s3", "gs", "oci"):
        reason = f"it cannot read from {scheme}://"
        return Finding(path, f"{REFUSED}: {reason}", "download the files and declare file:///absolute/path")
    hub = re.fullmatch(r"(?:www\.)?huggingface\.co/([^/?#]+/[^/?#]+).*", rest)
    if scheme in ("http", "https") and hub:
        return Finding(path, "a web address is not a source", f"did you mean 'hf://{hub.group(1)}'?")
    near = difflib.get_close_matches(scheme.lower(), ("builtin", "file", "hf"), 1, 0.5)
    hint = f"did you mean '{near[0]}://{rest}'?" if near else _SOURCE_FORMS
    return Finding(path, f"unknown kind of source {scheme!r}", hint)


_SOURCE_FORMS = "sources are builtin://tiny, file:///absolute/path and hf://organisation/name"


def _refusals_inside(shape: Shape, value: Any, path: Path) -> Iterator[Finding]:
    if shape.section is not None and isinstance(value, dict):
        yield from refusals(shape.section, value, path)
    elif shape.kind == "list" and shape.item is not None and isinstance(value, list):
        for index, item in enumerate(value):
            yield from _refusals_inside(shape.item, item, (*path, index))


def _is_honoured(field: SchemaField, value: Any) -> bool:
    unit = field.shape.unit
    if value in honoured_values(field.info):
        return True
    if unit is None or not isinstance(value, str):
        return False
    try:
        amounts = [unit.number(v) for v in honoured_values(field.info)]
        return unit.number(value) in amounts
    except ValueError:
        # The value itself is malformed, and reported as that; a second message would say less.
        return True


def _choice(values: list[Any]) -> str:
    words = [str(v).lower() if isinstance(v, bool) else str(v) for v in values]
    return words[0] if len(words) == 1 else f"one of {', '.join(words)}"


# ── kind Model ────────────────────────────────────────────────────────────────────────────────────────────


def _sources(facts: Facts) -> Iterator[Finding]:
    found = source_finding(facts["spec.source"], ("spec", "source"))
    if found:
        yield found


def _tokenizer_source(facts: Facts) -> Iterator[Finding]:
    source = facts["spec.tokenizer.source"]
    found = source_finding(source, ("spec", "tokenizer", "source")) if source is not None else None
    if found:
        yield found


def _template_path(facts: Facts) -> Iterator[Finding]:
    file = facts["spec.tokenizer.chatTemplateFile"]
    if file is not None and not file.startswith("/"):
        yield Finding(
            ("spec", "tokenizer", "chatTemplateFile"),
            f"{REFUSED}: a relative path, which would mean another file from another folder",
            "give the absolute path",
        )


def _revision(facts: Facts) -> Iterator[Finding]:
    if facts["spec.revision"] is not None and not facts["spec.source"].startswith("hf://"):
        yield Finding(
            ("spec", "revision"),
            "only an hf:// source has revisions",
            "remove it, or declare an hf:// source",
            True,
        )


def _source_auth(facts: Facts) -> Iterator[Finding]:
    reference, path = facts["spec.sourceAuth"], ("spec", "sourceAuth")
    if reference is None:
        return
    given = [name for name in ("secretRef", "file", "env") if reference.get(name) is not None]
    if len(given) != 1:
        said = f"{' and '.join(given)} are given" if given else "nothing is given"
        yield Finding(path, f"one place of the token is needed, and {said}", "declare secretRef, file or env")
    elif given == ["file"] and not reference["file"].startswith("/"):
        yield Finding((*path, "file"), "is a relative path", "give the absolute path")
    tokenizer = facts["spec.tokenizer.source"] or ""
    if not facts["spec.source"].startswith("hf://") and not tokenizer.startswith("hf://"):
        yield Finding(path, "only an hf:// source needs a token", "remove it, or declare an hf:// source", True)


def _replicas(facts: Facts) -> Iterator[Finding]:
    if facts.declares("spec.replicas") and facts.declares("spec.autoscaling"):
        yield Finding(
            ("spec", "autoscaling"),
            "replicas and autoscaling exclude each other",
            "declare only one of them",
            True,
        )


def _autoscaling_range(facts: Facts) -> Iterator[Finding]:
    if not facts.declares("spec.autoscaling"):
        return
    if facts["spec.autoscaling.minReplicas"] > facts["spec.autoscaling.maxReplicas"]:
        yield Finding(
            ("spec", "autoscaling", "minReplicas"), "is above maxReplicas", "minReplicas is the smaller one"
        )


def _autoscaling_to_none(facts: Facts) -> Iterator[Finding]:
    if not facts.declares("spec.autoscaling"):
        return
    to_none = facts["spec.autoscaling.minReplicas"] == 0
    if to_none and facts["spec.residency"] == "onDemand":
        yield Finding(
            ("spec", "autoscaling", "minReplicas"),
            "a model on demand is unloaded when another one needs its room, not when it is idle",
            "declare minReplicas of 1 or more, or residency: always",
        )
    if not to_none and facts.declares("spec.autoscaling.idleTimeout"):
        yield Finding(
            ("spec", "autoscaling", "idleTimeout"),
            "has no effect: the last replica stops only where minReplicas is 0",
            "remove it, or declare minReplicas: 0",
            True,
        )


def _autoscaling_target(facts: Facts) -> Iterator[Finding]:
    if not facts.declares("spec.autoscaling.target.kvCacheUsage"):
        return
    if not parse_percent(facts["spec.autoscaling.target.kvCacheUsage"]):
        path = ("spec", "autoscaling", "target", "kvCacheUsage")
        yield Finding(path, "0% would call for replicas without end", "for example 80%")


def _token_budget(facts: Facts) -> Iterator[Finding]:
    seqs, tokens = facts["spec.batching.maxNumSeqs"], facts["spec.batching.maxNumBatchedTokens"]
    if tokens < seqs:
        yield Finding(
            facts.first_declared("spec.batching.maxNumBatchedTokens", "spec.batching.maxNumSeqs"),
            f"maxNumBatchedTokens ({tokens}) is below maxNumSeqs ({seqs}): "
            "a step could not give every running sequence its token",
            f"raise maxNumBatchedTokens to {seqs} or more, or lower maxNumSeqs",
        )


def _whole_prompts(facts: Facts) -> Iterator[Finding]:
    length, tokens = facts["spec.engine.maxModelLen"], facts["spec.batching.maxNumBatchedTokens"]
    if facts["spec.batching.chunkedPrefill"] or length == "auto" or tokens >= length:
        return
    yield Finding(
        ("spec", "batching", "chunkedPrefill"),
        f"without chunks a prompt of maxModelLen ({length}) does not fit maxNumBatchedTokens ({tokens})",
        f"raise maxNumBatchedTokens to {length}, lower engine.maxModelLen, or leave chunkedPrefill on",
    )


def _parts_of_prompts(facts: Facts) -> Iterator[Finding]:
    if facts["spec.batching.chunkedPrefill"] or facts["spec.batching.maxPrefillTokens"] == "auto":
        return
    yield Finding(
        ("spec", "batching", "maxPrefillTokens"),
        "without chunks a prompt is computed whole, however long it is",
        "remove it, or leave chunkedPrefill on",
    )


def _memory_share(facts: Facts) -> Iterator[Finding]:
    if parse_percent(facts["spec.engine.memory"]) == 0:
        yield Finding(("spec", "engine", "memory"), "leaves the replica no memory", "for example 90%")


def _surge(facts: Facts) -> Iterator[Finding]:
    surge, unavailable = facts["spec.rollout.maxSurge"], facts["spec.rollout.maxUnavailable"]
    if facts["spec.rollout.strategy"] == "RollingUpdate" and surge == 0 and unavailable == 0:
        yield Finding(
            facts.first_declared("spec.rollout.maxSurge", "spec.rollout.maxUnavailable"),
            "with maxSurge 0 and maxUnavailable 0 a rolling update can never begin",
            "raise one of them, or declare strategy Auto",
        )


def _backoff(facts: Facts) -> Iterator[Finding]:
    base, longest = facts["spec.restartPolicy.backoffBase"], facts["spec.restartPolicy.backoffMax"]
    if parse_duration(base) > parse_duration(longest):
        yield Finding(
            facts.first_declared("spec.restartPolicy.backoffBase", "spec.restartPolicy.backoffMax"),
            f"backoffBase ({base}) is longer than backoffMax ({longest})",
            "backoffBase is the shorter one",
        )
    elif parse_duration(base) < 0.1:
        yield Finding(
            ("spec", "restartPolicy", "backoffBase"),
            "is shorter than 100ms",
            "a crashing engine needs a pause: 1s",
        )


def _deadlines(facts: Facts) -> Iterator[Finding]:
    for path, time in facts.known("spec.rollout.progressDeadline", "spec.probes.startup.timeout"):
        if parse_duration(time) < 1:
            yield Finding(path, "is shorter than a second", "no replica starts that fast: 10m")
    for path, time in facts.known("spec.probes.liveness.timeout"):
        if parse_duration(time) < 1:
            yield Finding(path, "is shorter than a second", "a step of a busy engine may take that long: 30s")


def _served_names(facts: Facts) -> Iterator[Finding]:
    yield from _repeated(facts, "spec.servedModelNames", "name")


def _device_ids(facts: Facts) -> Iterator[Finding]:
    yield from _repeated(facts, "spec.placement.deviceIds", "device")
    if facts.entries("spec.placement.deviceIds") and facts["spec.engine.device"] == "cpu":
        yield Finding(
            ("spec", "placement", "deviceIds"),
            "names GPUs, but engine.device is cpu",
            "remove deviceIds, or declare engine.device cuda",
            True,
        )


def _scripted(facts: Facts) -> Iterator[Finding]:
    if facts["spec.engine.runner"] != "scripted":
        if facts["spec.engine.stepTime"] is not None:
            yield Finding(
                ("spec", "engine", "stepTime"),
                "only the scripted runner takes a declared time",
                "remove it, or declare engine.runner scripted",
                True,
            )
        return
    if facts["spec.engine.device"] == "cuda":
        yield Finding(
            ("spec", "engine", "device"), "the scripted runner computes on no GPU", "remove it, or declare cpu"
        )
    if facts["spec.placement.deviceIds"]:
        yield Finding(
            ("spec", "placement", "deviceIds"),
            "names GPUs, and the scripted runner computes on none",
            "remove deviceIds",
            True,
        )
    step_time, patience = facts["spec.engine.stepTime"], facts["spec.probes.liveness.timeout"]
    if step_time is not None and parse_duration(step_time) >= parse_duration(patience):
        yield Finding(
            ("spec", "engine", "stepTime"),
            "is as long as probes.liveness.timeout: the engine would be killed as stalled",
            "declare a shorter time, for example 20ms",
        )


def _adapters(facts: Facts) -> Iterator[Finding]:
    yield from _repeated(facts, "spec.lora.adapters", "the adapter", "name")
    for index, adapter in facts.entries("spec.lora.adapters", "source"):
        path: Path = ("spec", "lora", "adapters", index, "source")
        source = adapter["source"]
        if (found := source_finding(source, path)) is not None:
            yield found
        elif not source.startswith("file://"):
            yield Finding(
                path,
                f"{REFUSED}: adapters are read from folders alone",
                "download it, for example with hf download, and declare file:///absolute/path",
            )


def _adapters_loaded(facts: Facts) -> Iterator[Finding]:
    declared, most = facts.entries("spec.lora.adapters"), facts["spec.lora.maxLoaded"]
    if len(declared) > most:
        yield Finding(
            ("spec", "lora", "adapters"),
            f"{REFUSED}: adapters that come and go; {len(declared)} are declared, and lora.maxLoaded is {most}",
            f"declare maxLoaded: {len(declared)}",
        )


def _adapters_device(facts: Facts) -> Iterator[Finding]:
    if not facts.entries("spec.lora.adapters"):
        return
    if facts["spec.engine.runner"] == "scripted":
        yield Finding(
            ("spec", "lora", "adapters"), "the scripted runner has no weights to add to", "remove them", True
        )
    elif facts["spec.engine.device"] == "cuda":
        yield Finding(
            ("spec", "lora", "adapters"),
            f"{REFUSED}: adapters on a GPU",
            "declare engine.device cpu, or serve a checkpoint that the adapter is merged into",
        )


def _environment(facts: Facts) -> Iterator[Finding]:
    for index, entry in facts.entries("spec.env"):
        path: Path = ("spec", "env", index)
        if "value" in entry and "valueFrom" in entry:
            yield Finding(path, "value and valueFrom exclude each other", "declare only one of them")
        elif "value" not in entry and "valueFrom" not in entry:
            yield Finding(path, "has no value", "declare value; for an empty one write value: ''")
        if entry["name"] in ENGINE_VARIABLES:
            if not entry.get("value", "/").startswith("/"):
                yield Finding((*path, "value"), f"{entry['name']} names a file", "give the absolute path")
        elif entry["name"].startswith("QUIRE_"):
            yield Finding(
                (*path, "name"),
                "names that begin with QUIRE_ are set by the platform",
                f"choose another name; only {', '.join(ENGINE_VARIABLES)} may be given",
            )
    yield from _repeated(facts, "spec.env", "variable", "name")


def _quantization(facts: Facts) -> Iterator[Finding]:
    at: Path = ("spec", "quantization")
    method, groups = facts["spec.quantization.method"], facts["spec.quantization.groupSize"]
    activations = facts["spec.quantization.activations"]
    if groups is not None and method in ("none", "int8", "fp8"):
        why = {
            "none": "there are no groups with method none",
            "int8": "int8 has one scale for each output",
            "fp8": "fp8 has one scale for each block of 128 × 128",
        }[method]
        yield Finding((*at, "groupSize"), why, "remove groupSize, or declare method: int4", True)
    if method == "none":
        # a checkpoint in fp8 or MXFP4 is that on a GPU: fp8 and bf16 are left to `quantization.resolve`, which
        # knows it
        scripted, device = facts["spec.engine.runner"] == "scripted", facts["spec.engine.device"]
        if activations != "auto" and (activations == "int8" or scripted or device == "cpu"):
            why = "nothing is quantized with method none" + (" on a CPU" if device == "cpu" else "")
            hint = "remove activations" + ("" if scripted else ", or declare method: int8")
            yield Finding((*at, "activations"), why, hint, True)
            return
    elif method not in ("int8", "int4", "fp8"):
        return
    elif facts["spec.engine.runner"] == "scripted":
        yield Finding((*at, "method"), "a scripted model has no weights", "remove it, or runner: scripted")
    elif facts["spec.engine.device"] == "cpu" and method == "fp8":
        yield Finding(
            (*at, "method"),
            f"{REFUSED}: fp8 weights are multiplied on GPUs alone",
            "declare engine.device: cuda, or method: int8; a checkpoint in fp8 runs on a CPU with method: none",
        )
    elif activations in ("int8", "fp8") and (activations == "fp8") != (method == "fp8"):
        yield Finding(
            (*at, "activations"),
            f"{REFUSED}: {method} weights do not meet {activations} activations",
            "declare activations: auto, or bf16",
        )
    elif facts["spec.engine.device"] == "cuda" and method == "int4" and activations == "int8":
        yield Finding(
            (*at, "activations"),
            f"{REFUSED}: int4 weights meet int8 activations on a CPU alone",
            "declare engine.device: cpu, activations: auto, or method: int8",
        )
    dtype = facts["spec.engine.dtype"]
    if activations == "bf16" and dtype not in ("auto", "bfloat16"):
        yield Finding(
            (*at, "activations"),
            f"the activations are {dtype}, by engine.dtype",
            "declare engine.dtype: bfloat16, or activations: auto",
        )


def _keys_and_values(facts: Facts) -> Iterator[Finding]:
    if facts["spec.engine.kvCache.dtype"] == "fp8" and facts["spec.engine.device"] == "cpu":
        yield Finding(
            ("spec", "engine", "kvCache", "dtype"),
            f"{REFUSED}: fp8 keys and values on a CPU",
            "declare int8, which has the same size and which CPUs multiply, or engine.device: cuda",
        )


def _determinism(facts: Facts) -> Iterator[Finding]:
    if facts["spec.determinism"] == "none":
        return
    if facts["spec.engine.device"] == "cuda":
        yield Finding(
            ("spec", "determinism"),
            f"{REFUSED}: there are no batch-invariant kernels for GPUs yet",
            "declare engine.device: cpu, or determinism: none",
        )
    if facts["spec.engine.runner"] == "scripted":
        yield Finding(
            ("spec", "determinism"), "a scripted model computes nothing", "remove it, or runner: scripted", True
        )


def _canary(facts: Facts) -> Iterator[Finding]:
    if facts.declares("spec.rollout.canary") and facts["spec.rollout.strategy"] != "Canary":
        yield Finding(
            ("spec", "rollout", "canary"),
            "has no effect unless strategy is Canary",
            "remove it, or the strategy",
            True,
        )


def _canary_steps(facts: Facts) -> Iterator[Finding]:
    if facts["spec.rollout.strategy"] != "Canary":
        return
    declared = facts.declares("spec.rollout.canary")
    steps = [(place, step["weight"]) for place, step in facts.entries("spec.rollout.canary.steps", "weight")]
    if not steps and not facts["spec.rollout.canary.steps"]:
        yield Finding(
            ("spec", "rollout", "canary") if declared else ("spec", "rollout", "strategy"),
            "strategy Canary needs steps, and none are declared",
            "declare rollout.canary.steps: [{weight: 10, hold: 5m}, {weight: 50, hold: 5m}]",
        )
    for (_, before), (place, after) in itertools.pairwise(steps):
        if after <= before:
            yield Finding(
                ("spec", "rollout", "canary", "steps", place, "weight"),
                f"{after} comes after {before}: each step gives the new revision more",
                "write the steps with rising weights",
            )


def _canary_prompts(facts: Facts) -> Iterator[Finding]:
    if facts["spec.rollout.canary.analysis.maxDrift"] is not None:
        return
    for place, asked in facts.entries("spec.rollout.canary.analysis.smokePrompts"):
        if asked.get("expectContains") is None:
            yield Finding(
                ("spec", "rollout", "canary", "analysis", "smokePrompts", place),
                "asks for nothing: without expectContains it counts for maxDrift alone, which is not declared",
                "add expectContains, or declare rollout.canary.analysis.maxDrift",
            )


def _parsers(facts: Facts) -> Iterator[Finding]:
    """Harmony has one markup for calls and thoughts, which no other reads half of."""
    tools, reasoning = facts["spec.parsers.tools"], facts["spec.parsers.reasoning"]
    both = tools is not None and reasoning is not None
    if both and (tools == HARMONY) != (reasoning == HARMONY) and not (tools == NONE and reasoning == HARMONY):
        yield Finding(
            ("spec", "parsers"),
            f"tools: {tools} and reasoning: {reasoning} exclude each other: harmony writes both in one markup",
            "leave one of them out",
            True,
        )


def _repeated(facts: Facts, path: str, noun: str, field: str | None = None) -> Iterator[Finding]:
    """Entries of a list, or their `field`, that stand there a second time."""
    named = facts.entries(path) if field is None else facts.entries(path, field)
    yield from _again([(index, entry if field is None else entry[field]) for index, entry in named], path, noun)


def _again(values: list[tuple[int, Any]], path: str, noun: str) -> Iterator[Finding]:
    seen: set[Any] = set()
    for index, value in values:
        if value in seen:
            at: Path = (*path.split("."), index)
            yield Finding(at, f"{noun} {value!r} stands here twice", "remove one of them")
        seen.add(value)


# ── kind Gateway ──────────────────────────────────────────────────────────────────────────────────────────


def _gateway_name(facts: Facts) -> Iterator[Finding]:
    if facts["metadata.name"] != "default":
        yield Finding(("metadata", "name"), "there is one Gateway, and its name is default", "name: default")


def _bind(facts: Facts) -> Iterator[Finding]:
    bind = facts["spec.bind"]
    if bind == "localhost":
        return
    try:
        ipaddress.ip_address(bind)
    except ValueError:
        yield Finding(("spec", "bind"), "is not an IP address", "for example 127.0.0.1")
        return
    if not is_loopback(bind) and facts["spec.tls"] is None and not facts["spec.insecurePlaintext"]:
        yield Finding(
            ("spec", "bind"),
            "other machines can reach this address, and there is no spec.tls: keys could be read on the way",
            "add spec.tls; or insecurePlaintext: true, where something else encrypts",
        )


# ── kind Route ────────────────────────────────────────────────────────────────────────────────────────────


def _route_lists(facts: Facts) -> Iterator[Finding]:
    yield from _repeated(facts, "spec.match.modelNames", "the name")
    yield from _repeated(facts, "spec.retries.when", "the failure")


def _route_fallbacks(facts: Facts) -> Iterator[Finding]:
    for index, fallback in facts.entries("spec.fallbacks", "when"):
        seen: set[str] = set()
        for place, failure in enumerate(fallback["when"]):
            if failure in seen:
                at: Path = ("spec", "fallbacks", index, "when", place)
                yield Finding(at, f"the failure {failure!r} stands here twice", "remove one of them")
            seen.add(failure)


_FIELD_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


def _is_field_value(text: str) -> bool:
    """Whether a header can have it: one line, and none of the blanks around it, which are no part of it."""
    return text == text.strip() and text.replace("\t", " ").isprintable()


def _route_headers(facts: Facts) -> Iterator[Finding]:
    for index, header in facts.entries("spec.match.headers", "exact"):
        if not _is_field_value(header["exact"]):
            why = "is no value of a header: no request could carry it"
            hint = "one line of visible characters, with blanks only between them"
            yield Finding(("spec", "match", "headers", index, "exact"), why, hint)
    for index, header in facts.entries("spec.match.headers", "name"):
        if not _FIELD_NAME.fullmatch(header["name"]):
            why = "is no name of a header: no request could carry it"
            yield Finding(
                ("spec", "match", "headers", index, "name"), why, "letters, digits and -, such as x-team"
            )
    seen: set[str] = set()
    for index, header in facts.entries("spec.match.headers", "name"):
        name = header["name"].lower()
        if name in seen:
            path: Path = ("spec", "match", "headers", index, "name")
            yield Finding(path, f"header {name!r} stands here twice", "a header has one value: remove one of them")
        seen.add(name)


def _route_backends(facts: Facts) -> Iterator[Finding]:
    seen: set[tuple[str, str | None]] = set()
    for index, backend in facts.entries("spec.backends", "model", "adapter"):
        model, adapter = backend["model"], backend.get("adapter")
        if (model, adapter) in seen:
            path: Path = ("spec", "backends", index, "model")
            named = f"model {model!r}" + (f" with adapter {adapter!r}" if adapter is not None else "")
            yield Finding(path, f"{named} stands here twice", "give it once, with the sum of the weights")
        seen.add((model, adapter))


def _route_timeouts(facts: Facts) -> Iterator[Finding]:
    for path, value in facts.known("spec.timeouts.firstToken", "spec.timeouts.request"):
        if value is not None and parse_duration(value) <= 0:
            yield Finding(path, "no request could be served", "give a time, such as 30s")
    first, whole = facts["spec.timeouts.firstToken"], facts["spec.timeouts.request"]
    if first is not None and whole is not None and parse_duration(first) > parse_duration(whole):
        yield Finding(
            ("spec", "timeouts", "firstToken"),
            f"{first} is above spec.timeouts.request ({whole}), which ends the request before",
            "lower it, or raise spec.timeouts.request",
        )


def _breaker(facts: Facts) -> Iterator[Finding]:
    at = "spec.probes.breaker"
    for path, first in facts.known(f"{at}.openFor"):
        if not parse_duration(first):
            yield Finding(path, "is no time", "for example 5s")
    for path, share in facts.known(f"{at}.errorShare"):
        if not parse_percent(share):
            hint = "to hold it by failures in a row alone, declare 100%"
            yield Finding(path, "0% would keep out every replica", hint)
    for path, window in facts.known(f"{at}.window"):
        if not parse_duration(window):
            yield Finding(path, "nothing ends within no time", "for example 30s")
    first, longest = facts[f"{at}.openFor"], facts[f"{at}.maxOpenFor"]
    if parse_duration(longest) < parse_duration(first):
        path = facts.first_declared(f"{at}.maxOpenFor", f"{at}.openFor")
        yield Finding(
            path, f"maxOpenFor ({longest}) is shorter than openFor ({first})", "raise it, or lower openFor"
        )


def _prices(facts: Facts) -> Iterator[Finding]:
    for path, price in facts.known("spec.prices.input", "spec.prices.cachedInput", "spec.prices.output"):
        if price is not None and parse_money(price) > MAX_PRICE:
            why = f"is above {MAX_PRICE} for a million tokens, which is more than is counted"
            yield Finding(path, why, "declare prices in a larger unit of money")


# ── kind AccessPolicy ─────────────────────────────────────────────────────────────────────────────────────


def _keys(facts: Facts) -> Iterator[Finding]:
    path: Path = ("spec", "keys")
    keys = facts.entries("spec.keys", "hash", "valueFrom")  # before names that stand there twice count as bad
    yield from _repeated(facts, "spec.keys", "the name", "name")
    for index, key in keys:
        source, digest = key.get("valueFrom"), key.get("hash")
        if (source is None) == (digest is None):
            hint = "keep valueFrom or hash"
            yield Finding((*path, index), "a key has exactly one of valueFrom and hash", hint)
        elif source is not None and sum(value is not None for value in source.values()) != 1:
            hint = "for example secretRef: NAME"
            yield Finding((*path, index, "valueFrom"), "exactly one of secretRef, file and env", hint)
        elif source is not None and source.get("file") is not None and not source["file"].startswith("/"):
            hint = "begin it with /"
            yield Finding((*path, index, "valueFrom", "file"), "is not an absolute path", hint)
    hashed = [(index, key["hash"]) for index, key in facts.entries("spec.keys", "hash") if key.get("hash")]
    yield from _again(hashed, "spec.keys", "the hash")


def _limits(facts: Facts) -> Iterator[Finding]:
    for index, limit in facts.entries("spec.limits"):
        path: Path = ("spec", "limits", index)
        bounds = [name for name in ("requests", "tokens", "concurrency") if limit.get(name) is not None]
        if len(bounds) != 1:
            hint = "one item for each, for example {requests: 600, per: 1m}"
            yield Finding(path, "a limit has exactly one of requests, tokens and concurrency", hint)
        elif bounds == ["concurrency"] and limit.get("per") is not None:
            yield Finding((*path, "per"), "concurrency is not counted per time", "remove per", True)
        elif bounds != ["concurrency"] and limit.get("per") is None:
            yield Finding(path, f"{bounds[0]} are counted per time, and per is missing", "for example per: 1m")


# ── kind GitSource ────────────────────────────────────────────────────────────────────────────────────────

_SSH_KEY = re.compile(
    r"(ssh-ed25519|ecdsa-sha2-nistp(256|384|521)|ssh-rsa|sk-ssh-ed25519@openssh\.com) [A-Za-z0-9+/=]+"
)
_REF = re.compile(r"[^\x00-\x20\x7f~^:?*\[\\]+")
SHORTEST_INTERVAL = 1.0


def _git_url(facts: Facts) -> Iterator[Finding]:
    url, path = facts["spec.url"], ("spec", "url")
    scheme, separator, _ = url.partition("://")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        yield Finding(path, "is not a URL", _GIT_URL)
        return
    if scp := re.fullmatch(r"(?:[\w.-]+@)?([\w-]+(?:\.[\w-]+)+):([\w./~-]+)", url):
        hint = f"https://{scp[1]}/{scp[2]}, with a token in spec.auth if it is private"
        yield Finding(path, f"{REFUSED}: ssh as a way to a repository", hint)
    elif not separator or scheme == "file" or "::" in scheme:
        yield Finding(path, "files of this machine are not followed, nor anything but a URL", _GIT_URL)
    elif scheme in ("ssh", "git", "git+ssh"):
        instead = f"https://{host}{parts.path}" if host else _GIT_URL.removeprefix("for example ")
        hint = f"{instead}, with a token in spec.auth if it is private"
        yield Finding(path, f"{REFUSED}: {scheme}:// as a way to a repository", hint)
    elif scheme not in ("http", "https") or not host or port == 0 or not re.fullmatch(r"[\x21-\x7e]+", url):
        yield Finding(path, "is not a URL of a repository", _GIT_URL)
    elif parts.username is not None or parts.password is not None:
        hint = "platform secret set NAME, and spec.auth: {secretRef: NAME}"
        yield Finding(path, "a credential does not belong in a manifest", hint)
    elif parts.query or parts.fragment:
        yield Finding(path, "a repository's URL has no query and no fragment", _GIT_URL)
    elif scheme == "http" and not _is_this_machine(host):
        hint = "write https"
        yield Finding(path, "http is for repositories on this machine alone: nothing protects it on its way", hint)


_GIT_URL = "for example https://example.org/team/manifests.git"


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or is_loopback(host)
    except ValueError:  # a name
        return False


def _git_ref(facts: Facts) -> Iterator[Finding]:
    ref, path = facts["spec.ref"] or {}, ("spec", "ref")
    given = [name for name in ("branch", "tag", "commit") if ref.get(name) is not None]
    if len(given) > 1:
        yield Finding(path, "at most one of branch, tag and commit", f"keep {given[0]}")
        return
    for name in given:
        value = ref[name]
        if name == "commit" and not re.fullmatch(r"[0-9a-f]{40}", value):
            hint = "git rev-parse COMMIT prints it"
            yield Finding((*path, name), "is not a commit's 40 digits", hint)
        bad = not _REF.fullmatch(value) or value.startswith(("-", "/", ".")) or value.endswith(("/", ".", ".lock"))
        if name != "commit" and (bad or ".." in value or "//" in value or "@{" in value):
            example = "main" if name == "branch" else "v1.2"
            yield Finding((*path, name), f"is not the name of a {name}", f"for example {example}")


def _git_path(facts: Facts) -> Iterator[Finding]:
    given, path = facts["spec.path"], ("spec", "path")
    parts = [part for part in given.split("/") if part]
    if given.startswith("/") or ".." in parts or not given.isprintable() or "\\" in given:
        yield Finding(
            path, "is not a folder inside the repository", "for example clusters/prod, or . for all of it"
        )


def _git_sync(facts: Facts) -> Iterator[Finding]:
    for path, time in facts.known("spec.interval", "spec.sync.retryInterval"):
        if parse_duration(time) < SHORTEST_INTERVAL:
            example = "1m" if path[-1] == "interval" else "30s"
            yield Finding(path, "is shorter than a second", f"for example {example}")


def _git_windows(facts: Facts) -> Iterator[Finding]:
    path: Path = ("spec", "sync", "windows")
    for index, window in facts.entries("spec.sync.windows", "schedule"):
        try:
            opens = Schedule.parse(window["schedule"]).ever_opens
        except BadSchedule as error:
            yield Finding((*path, index, "schedule"), str(error), error.hint)
        else:
            if not opens:
                hint = "days and months that go together: '0 18 28 2 *' is the 28th of February at 18:00"
                yield Finding((*path, index, "schedule"), "never opens: none of its months has such a day", hint)
    for index, window in facts.entries("spec.sync.windows", "timeZone"):
        try:
            zone(window.get("timeZone", "UTC"))
        except BadSchedule as error:
            yield Finding((*path, index, "timeZone"), str(error), error.hint)
    for index, window in facts.entries("spec.sync.windows", "duration"):
        if not 60 <= parse_duration(window["duration"]) <= MAX_SECONDS:
            hint = "for example 8h"
            yield Finding((*path, index, "duration"), "a window is open from a minute to 7 days", hint)


def _git_signers(facts: Facts) -> Iterator[Finding]:
    for index, key in facts.entries("spec.verify.signedBy"):
        if not _SSH_KEY.fullmatch(" ".join(key.split()[:2])) or "\n" in key:
            hint = "a line as in id_ed25519.pub, with or without the comment at its end"
            yield Finding(("spec", "verify", "signedBy", index), "is not a public key of ssh", hint)


def _budgets(facts: Facts) -> Iterator[Finding]:
    budgets = facts.entries("spec.budgets")
    yield from _repeated(facts, "spec.budgets", "the name", "name")
    for index, budget in budgets:
        path: Path = ("spec", "budgets", index)
        tokens, cost = budget.get("tokens"), budget.get("cost")
        counts, cached = budget.get("counts", "total"), budget.get("cached", "full")
        if (tokens is None) == (cost is None):
            hint = "one item for each, for example {name: month, tokens: 50000000, per: month}"
            yield Finding(path, "a budget has exactly one of tokens and cost", hint)
        elif cost is not None and not parse_money(cost):
            yield Finding(
                (*path, "cost"), "is nothing, and would let nobody in", "to close a policy, remove its keys"
            )
        for name, value, default in (("counts", counts, "total"), ("cached", cached, "full")):
            if cost is not None and tokens is None and value != default:
                why = "is about tokens, and this is a budget of money"
                yield Finding((*path, name), why, f"remove {name}; prices say what tokens cost", True)
        if cached == "free" and counts == "completion":
            why = "tokens of answers are never found in a cache"
            yield Finding((*path, "cached"), why, "remove cached, or counts", True)
        if parse_percent(budget.get("warnAt", "80%")) == 0:
            yield Finding((*path, "warnAt"), "would warn from the first moment on", "for example warnAt: 80%")


Rule = Callable[[Facts], Iterator[Finding]]
_RULES: dict[str, tuple[Rule, ...]] = {
    "Model": (
        _sources,
        _tokenizer_source,
        _template_path,
        _revision,
        _source_auth,
        _replicas,
        _autoscaling_range,
        _autoscaling_to_none,
        _autoscaling_target,
        _token_budget,
        _whole_prompts,
        _parts_of_prompts,
        _memory_share,
        _surge,
        _backoff,
        _deadlines,
        _served_names,
        _device_ids,
        _scripted,
        _adapters,
        _adapters_loaded,
        _adapters_device,
        _environment,
        _quantization,
        _keys_and_values,
        _determinism,
        _canary,
        _canary_steps,
        _canary_prompts,
        _parsers,
        _prices,
        _breaker,
    ),
    "Gateway": (_gateway_name, _bind),
    "Route": (_route_lists, _route_fallbacks, _route_headers, _route_backends, _route_timeouts),
    "AccessPolicy": (_keys, _limits, _budgets),
    "GitSource": (_git_url, _git_ref, _git_path, _git_sync, _git_windows, _git_signers),
}


# ── between documents ─────────────────────────────────────────────────────────────────────────────────────


def claims(facts: Facts) -> list[tuple[str, Path]]:
    """What a document claims for itself alone: its key, for a Model each name it is served by, for a Route each
    name with the headers that it wants beside it.

    Two documents with one claim contradict each other. A claim whose value did not parse is left out.
    """
    kind = facts.kind.__name__
    claimed: list[tuple[str, Path]] = []
    try:
        name = facts["metadata.name"]
        claimed.append((f"{kind.lower()}/{name}", ("metadata", "name")))
        if kind == "Model":
            served = facts.entries("spec.servedModelNames")
            if served or facts["spec.servedModelNames"]:
                claimed += [(f"served model name {n!r}", ("spec", "servedModelNames", i)) for i, n in served]
            else:
                served = [(0, name)]
                claimed.append((f"served model name {name!r}", ("metadata", "name")))
            claimed += [
                (f"served model name '{own}:{adapter['name']}'", ("spec", "lora", "adapters", index, "name"))
                for index, adapter in facts.entries("spec.lora.adapters", "name")
                for _, own in served
            ]
        if kind == "Route":
            told = headers_text(facts["spec.match.headers"])
            names = facts.entries("spec.match.modelNames")
            claimed += [(f"served model name {n!r}{told}", ("spec", "match", "modelNames", i)) for i, n in names]
    except Unknown:
        return claimed
    return claimed


def headers_text(headers: Sequence[Mapping[str, Any]]) -> str:
    """The headers that a Route wants, behind the name that it wants them with; empty without any."""
    told = sorted(f"{header['name'].lower()}: {header['exact']}" for header in headers)
    return f" with {', '.join(told)}" if told else ""
