"""What `/metrics` says, once more in the names and labels that dashboards and schedulers made for vLLM look for.

A second spelling of the same numbers, made at the scrape: `signals.VLLM_NAMES` has the names, `translated` the few
things that are cut differently there. What has no counterpart here (adapters, speculation, offloading, sleeping)
has no series.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.samples import Sample

from quire_schemas import signals


def translated(families: Iterable[Metric], no_model: str) -> Iterator[Metric]:
    """The families that have other names there; requests for `no_model` have no place in them."""
    for family in families:
        for name in signals.VLLM_NAMES.get(family.name, ()):
            yield _renamed(family, name, no_model)
        if family.name == signals.REQUESTS:
            yield _successes(family, no_model)
        elif family.name == signals.PROMPT_TOKENS_BY_SOURCE:
            yield from _cached(family)
        elif family.name == signals.TOOL_CALL_PARSER_INVOCATIONS:
            yield _read_for_calls(family)
        elif family.name == signals.NUM_REQUESTS_RUNNING:
            yield from _absent(family)


def _renamed(family: Metric, name: str, no_model: str) -> Metric:
    made = Metric(name, family.documentation, family.type)
    made.samples = [
        Sample(name + sample.name.removeprefix(family.name), _labels(sample.labels), sample.value)
        for sample in family.samples
        if sample.labels[signals.LABEL_MODEL] != no_model
    ]
    return made


def _labels(ours: dict[str, str]) -> dict[str, str]:
    theirs = {signals.VLLM_LABELS.get(name, name): value for name, value in ours.items()}
    return {signals.VLLM_LABELS[signals.LABEL_REPLICA]: signals.VLLM_WHOLE, **theirs}


def _successes(requests: Metric, no_model: str) -> Metric:
    """All operations together, without what no engine had."""
    counts: dict[tuple[str, str], float] = {}
    for sample in requests.samples:
        model, finish = sample.labels[signals.LABEL_MODEL], sample.labels[signals.LABEL_FINISH]
        if model != no_model and finish != "refused":
            counts[model, finish] = counts.get((model, finish), 0) + sample.value
    labels = _names(signals.VLLM_FINISHED_REASON)
    made = CounterMetricFamily(signals.VLLM_REQUEST_SUCCESS, "Requests by how they ended.", labels=labels)
    for (model, finish), count in counts.items():
        made.add_metric([model, signals.VLLM_WHOLE, finish], count)
    return made


def _cached(by_source: Metric) -> Iterator[Metric]:
    text = "Tokens of prompts that were in the cache."
    whole = CounterMetricFamily(signals.VLLM_PROMPT_TOKENS_CACHED, text, labels=_names())
    name = signals.VLLM_PROMPT_TOKENS_CACHED_BY_SOURCE
    split = CounterMetricFamily(name, text, labels=_names(signals.LABEL_SOURCE))
    for sample in by_source.samples:
        if (source := sample.labels[signals.LABEL_SOURCE]) == "local_cache_hit":
            key = [sample.labels[signals.LABEL_MODEL], signals.VLLM_WHOLE]
            whole.add_metric(key, sample.value)
            split.add_metric([*key, source], sample.value)
    yield from (whole, split)


def _read_for_calls(ours: Metric) -> Metric:
    """Without an `engine`: an answer is read in the router."""
    kept = (signals.LABEL_MODE, signals.LABEL_OUTCOME)
    labels = [signals.VLLM_LABELS[signals.LABEL_MODEL], *kept, signals.VLLM_REQUEST_TYPE]
    made = CounterMetricFamily(signals.VLLM_TOOL_CALL_PARSER_INVOCATIONS, ours.documentation, labels=labels)
    for sample in ours.samples:
        of = sample.labels
        asked = signals.VLLM_REQUEST_TYPES[of[signals.LABEL_OPERATION]]
        made.add_metric([of[signals.LABEL_MODEL], *(of[name] for name in kept), asked], sample.value)
    return made


def _absent(running: Metric) -> Iterator[Metric]:
    """Gauges of what no engine here ever does."""
    for name, text in (
        (signals.VLLM_REQUESTS_SWAPPED, "Nothing is swapped out."),
        (signals.VLLM_CPU_CACHE_USAGE, "There is no second cache."),
    ):
        made = GaugeMetricFamily(name, text, labels=_names())
        for sample in running.samples:
            made.add_metric([sample.labels[signals.LABEL_MODEL], sample.labels[signals.LABEL_REPLICA]], 0)
        yield made


def _names(*more: str) -> list[str]:
    return [*(signals.VLLM_LABELS[name] for name in (signals.LABEL_MODEL, signals.LABEL_REPLICA)), *more]
