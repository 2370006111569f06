"""What `/metrics` says: series that are there from the start, with labels that no request decides."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from quire.router.metrics import Metrics
from quire.router.model_metrics import (
    EJECTIONS,
    FINISHES,
    NO_MODEL,
    OPERATIONS,
    REASONS,
    Distribution,
    ReplicaSample,
    Standing,
)
from quire_schemas import signals, wire
from quire_schemas.workers import Counts

WELCOME = wire.Welcome("m-0", 1, wire.PROTOCOL, 100, (0,), 2048, 16, 500, 8)
STATS = wire.Stats(
    steps=7,
    max_num_seqs=8,
    last_step_at=0.0,
    running=2,
    waiting=5,
    blocks_total=500,
    blocks_used=125,
    kv_slots_used=0,
    preemptions=3,
    prompt_tokens=0,
    generation_tokens=0,
    hot_hash="h",
    prefix_queried_tokens=1000,
    prefix_hit_tokens=750,
    deferred=1,
    computed_tokens=40,
    steps_by_tokens=(3, 4, *[0] * 12),
    cpu_seconds=1.5,
    resident_bytes=4096,
)


def made(
    *models: str, replicas: Iterable[ReplicaSample] = (), standings: Iterable[Standing] = (), vllm: bool = False
) -> Metrics:
    metrics = Metrics(lambda: replicas, lambda: standings)
    metrics.set_models(models)
    if vllm:
        metrics.add_vllm_names()
    return metrics


def families(metrics: Metrics) -> dict[str, Metric]:
    """What a scraper reads, by name; a name that came twice is an error."""
    found = list(text_string_to_metric_families(metrics.render().decode()))
    assert len({family.name for family in found}) == len(found)
    return {family.name: family for family in found}


def value(found: dict[str, Metric], name: str, suffix: str = "", **labels: str) -> float:
    (sample,) = [s for s in found[name].samples if s.name == name + suffix and s.labels == labels]
    return sample.value


def keys(metrics: Metrics) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    return {(s.name, tuple(s.labels.items())) for family in families(metrics).values() for s in family.samples}


# ── existing at zero, and nothing but what is declared ────────────────────────────────────────────────────────


def test_every_series_of_a_model_exists_at_zero_and_leaves_with_it() -> None:
    metrics = made("m")
    found = families(metrics)
    mine = [s for family in found.values() for s in family.samples if s.labels.get("model") == "m"]
    assert {s.value for s in mine} == {0}
    assert len([s for s in mine if s.name == f"{signals.REQUESTS}_total"]) == len(OPERATIONS) * len(FINISHES)
    assert {s.labels["reason"] for s in mine if s.name == f"{signals.ADMISSION_REJECTIONS}_total"} == set(REASONS)
    assert {s.labels["reason"] for s in mine if s.name == f"{signals.REPLICA_EJECTIONS}_total"} == set(EJECTIONS)
    for name, bounds in (
        (signals.TIME_TO_FIRST_TOKEN, signals.TTFT_BUCKETS),
        (signals.INTER_TOKEN_LATENCY, signals.ITL_BUCKETS),
        (signals.PREFILL_TIME, signals.LATENCY_BUCKETS),
        (signals.REQUEST_GENERATION_TOKENS, signals.TOKENS_BUCKETS),
    ):
        edges = [float(s.labels["le"]) for s in mine if s.name == f"{name}_bucket"]
        assert edges == [*bounds, float("inf")], name
    metrics.set_models(())
    assert not any(s.labels.get("model") == "m" for family in families(metrics).values() for s in family.samples)


def test_hostile_names_of_models_make_no_series() -> None:
    metrics = made("m")
    before = keys(metrics)
    for name in ("no\nsuch", 'x"} 1e9\nevil{a="', "m\x00", "ü" * 1000, "", "' OR 1=1", NO_MODEL):
        numbers = metrics.model(name)
        numbers.requests["chat", "refused"].inc()
        numbers.rejections["model_not_found"].inc()
    assert keys(metrics) == before
    assert value(families(metrics), signals.REQUESTS, "_total", model="-", operation="chat", finish="refused") == 7
    assert (
        value(families(metrics), signals.ADMISSION_REJECTIONS, "_total", model="-", reason="model_not_found") == 7
    )


def test_a_declared_name_with_every_sign_that_a_format_knows_is_read_back_as_it_is() -> None:
    name = 'a"b\\c\nd{e="f"} 1'
    metrics = made(name)
    metrics.model(name).prompt_tokens.inc(3)
    assert value(families(metrics), signals.PROMPT_TOKENS, "_total", model=name) == 3


def test_what_an_engine_tells_is_shown_as_it_is_now() -> None:
    sample = ReplicaSample("m", "m-0", True, STATS, WELCOME, prefix_caching=True)
    replicas = [sample]
    metrics = made("m", replicas=replicas, standings=[Standing("m", 2, 1, 4)])
    found = families(metrics)
    of = {"model": "m", "replica": "m-0"}
    assert value(found, signals.NUM_REQUESTS_WAITING, **of) == 5
    assert value(found, signals.NUM_REQUESTS_WAITING_BY_REASON, **of, reason="capacity") == 4
    assert value(found, signals.NUM_REQUESTS_WAITING_BY_REASON, **of, reason="deferred") == 1
    assert value(found, signals.KV_CACHE_USAGE, **of) == 0.25
    assert value(found, signals.ENGINE_CPU, "_total", **of) == 1.5
    assert value(found, signals.ITERATION_TOKENS, "_bucket", **of, le="1.0") == 3
    assert value(found, signals.ITERATION_TOKENS, "_bucket", **of, le="+Inf") == 7
    assert value(found, signals.ITERATION_TOKENS, "_sum", **of) == 40
    facts = {"block_size": "16", "num_blocks": "500", "max_num_seqs": "8", "max_model_len": "2048"}
    assert value(found, signals.CACHE_CONFIG_INFO, **of, **facts, enable_prefix_caching="True") == 1
    assert [value(found, name, model="m") for name in (signals.REPLICAS_WANTED, signals.REPLICAS_READY)] == [2, 1]
    assert value(found, signals.REPLICA_RESTARTS, model="m") == 4
    replicas[0] = ReplicaSample("m", "m-0", False, None)
    found = families(metrics)
    for name in (signals.REPLICA_UP, signals.NUM_REQUESTS_RUNNING, signals.NUM_REQUESTS_WAITING):
        assert value(found, name, **of) == 0, "nothing is left of what it said while it was there"
    replicas.clear()
    assert not families(metrics)[signals.REPLICA_UP].samples


def test_an_engine_of_another_version_has_the_histogram_it_cannot_tell_at_zero() -> None:
    old = wire.Stats(7, 8, 0.0, 0, 0, 9, 0, 0, 0, 0, 0, "h")
    found = families(made("m", replicas=[ReplicaSample("m", "m-0", True, old)]))
    assert value(found, signals.ITERATION_TOKENS, "_count", model="m", replica="m-0") == 0
    assert value(found, signals.ENGINE_STEPS, "_total", model="m", replica="m-0") == 7


# ── vLLM's names ──────────────────────────────────────────────────────────────────────────────────────────────

REQUEST: Final = {"model_name", "engine"}
VLLM: Final[dict[str, tuple[str, set[str]]]] = {
    "vllm:num_requests_running": ("gauge", REQUEST),
    "vllm:num_requests_waiting": ("gauge", REQUEST),
    "vllm:num_requests_waiting_by_reason": ("gauge", REQUEST | {"reason"}),
    "vllm:num_requests_swapped": ("gauge", REQUEST),
    "vllm:kv_cache_usage_perc": ("gauge", REQUEST),
    "vllm:gpu_cache_usage_perc": ("gauge", REQUEST),
    "vllm:cpu_cache_usage_perc": ("gauge", REQUEST),
    "vllm:cache_config_info": (
        "gauge",
        REQUEST | {"block_size", "num_gpu_blocks", "max_num_seqs", "max_model_len", "enable_prefix_caching"},
    ),
    "vllm:prefix_cache_queries": ("counter", REQUEST),
    "vllm:prefix_cache_hits": ("counter", REQUEST),
    "vllm:gpu_prefix_cache_queries": ("counter", REQUEST),
    "vllm:gpu_prefix_cache_hits": ("counter", REQUEST),
    "vllm:num_preemptions": ("counter", REQUEST),
    "vllm:prompt_tokens": ("counter", REQUEST),
    "vllm:prompt_tokens_by_source": ("counter", REQUEST | {"source"}),
    "vllm:prompt_tokens_cached": ("counter", REQUEST),
    "vllm:prompt_tokens_cached_by_source": ("counter", REQUEST | {"source"}),
    "vllm:generation_tokens": ("counter", REQUEST),
    "vllm:request_success": ("counter", REQUEST | {"finished_reason"}),
    "vllm:admission_rejections": ("counter", REQUEST | {"reason"}),
    "vllm:corrupted_requests": ("counter", REQUEST),
    "vllm:tool_call_parser_invocations": ("counter", {"model_name", "mode", "outcome", "request_type"}),
    **{
        f"vllm:{name}": ("histogram", REQUEST)
        for name in (
            "time_to_first_token_seconds",
            "inter_token_latency_seconds",
            "time_per_output_token_seconds",
            "request_time_per_output_token_seconds",
            "e2e_request_latency_seconds",
            "request_queue_time_seconds",
            "request_inference_time_seconds",
            "request_prefill_time_seconds",
            "request_decode_time_seconds",
            "request_prompt_tokens",
            "request_generation_tokens",
            "request_max_num_generation_tokens",
            "request_params_n",
            "request_params_max_tokens",
            "request_num_preemptions",
            "request_prefill_kv_computed_tokens",
            "iteration_tokens_total",
        )
    },
}
"""What a dashboard, a scheduler or an autoscaler made for vLLM finds: names, types, labels."""


def test_vllms_names_types_and_labels() -> None:
    replicas = [ReplicaSample("m", "m-0", True, STATS, WELCOME)]
    ours, both = families(made("m", replicas=replicas)), families(made("m", replicas=replicas, vllm=True))
    assert not any(name.startswith("vllm:") for name in ours)
    assert {name for name in both if not name.startswith("vllm:")} == ours.keys()
    theirs = {name: family for name, family in both.items() if name.startswith("vllm:")}
    labels = {
        name: (family.type, {label for s in family.samples for label in s.labels} - {"le"})
        for name, family in theirs.items()
    }
    assert labels == VLLM
    for name, family in theirs.items():
        suffixes = {s.name.removeprefix(name) for s in family.samples}
        expected = {"counter": {"_total"}, "gauge": {""}, "histogram": {"_bucket", "_sum", "_count"}}
        assert suffixes == expected[family.type], name
        assert {s.labels["model_name"] for s in family.samples} == {"m"}, "no series of requests for no model"


def test_vllms_numbers_are_ours() -> None:
    metrics = made("m", replicas=[ReplicaSample("m", "m-0", True, STATS, WELCOME)], vllm=True)
    numbers = metrics.model("m")
    for operation, finish in (("chat", "stop"), ("responses", "stop"), ("chat", "length"), ("chat", "refused")):
        numbers.requests[operation, finish].inc()
    numbers.tokens_by_source["local_cache_hit"].inc(16)
    numbers.tokens_by_source["local_compute"].inc(5)
    numbers.inter_token.observe(0.02, 4)
    numbers.calls["chat", "streaming", "tool_call"].inc(3)
    found = families(metrics)
    of = {"model_name": "m", "engine": "0"}
    success = {s.labels["finished_reason"]: s.value for s in found["vllm:request_success"].samples}
    assert success == {"stop": 2, "length": 1, "repetition": 0, "abort": 0, "error": 0}
    assert value(found, "vllm:prompt_tokens_cached", "_total", **of) == 16
    assert value(found, "vllm:prompt_tokens_by_source", "_total", **of, source="local_compute") == 5
    calls = {"model_name": "m", "request_type": "chat_completions", "outcome": "tool_call"}
    for mode, count in (("streaming", 3), ("non_streaming", 0)):
        assert value(found, "vllm:tool_call_parser_invocations", "_total", **calls, mode=mode) == count
    for name in ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"):
        assert value(found, name, "_count", **of) == 4
    of = {"model_name": "m", "engine": "m-0"}
    assert (
        value(found, "vllm:kv_cache_usage_perc", **of) == value(found, "vllm:gpu_cache_usage_perc", **of) == 0.25
    )
    assert value(found, "vllm:num_requests_waiting", **of) == 5
    assert value(found, "vllm:iteration_tokens_total", "_sum", **of) == 40
    info = found["vllm:cache_config_info"].samples[0].labels
    assert (info["block_size"], info["num_gpu_blocks"]) == ("16", "500")


# ── distributions, and what they cost ─────────────────────────────────────────────────────────────────────────


def test_a_value_belongs_to_the_first_bucket_whose_bound_it_does_not_exceed() -> None:
    seen = Distribution((1, 2, 5))
    for observed in (0, 1, 1.5, 2, 5, 6):
        seen.observe(observed)
    seen.observe(2, 10)
    assert seen.counts == [2, 12, 1, 1]
    assert (seen.count, seen.total) == (16, 15.5 + 20)


def test_counting_costs_next_to_nothing_for_each_wake_up_of_a_stream() -> None:
    """A wake-up counts the tokens it brought, the time between them, and the router's own, each once. Of the 80 µs
    that a chunk may cost in all that takes 1; 3 are allowed here.
    """
    numbers, rounds = made("m").model("m"), 20_000
    best = float("inf")
    for _ in range(5):
        began = time.process_time()
        for _ in range(rounds):
            numbers.generation_tokens.inc(8)
            numbers.inter_token.observe(0.01, 8)
            numbers.added_to_answer.observe(0.0003)
        best = min(best, (time.process_time() - began) / rounds)
    assert best < 3e-6, f"{best * 1e6:.2f} µs"
    assert numbers.inter_token.count == 5 * rounds * 8


async def test_budgets_are_looked_at_where_they_are_spent() -> None:
    looked: list[threading.Thread] = []

    def standing() -> Iterator[wire.BudgetStanding]:
        looked.append(threading.current_thread())
        yield wire.BudgetStanding("p", "b", "tokens", 2, 1)

    metrics = Metrics(list, list)
    metrics.watch_budgets(standing)
    told = (await metrics.scraped()).decode()
    assert f'{signals.BUDGET_SPENT}{{budget="b",key="",policy="p"}} 0.5' in told
    assert set(looked) == {threading.main_thread()}


async def test_processor_time_of_a_workers_ended_children_is_told_and_the_sum_never_falls() -> None:
    metrics = Metrics(list, list)

    async def told(*others: Counts) -> float:
        (line,) = re.findall(r"^process_cpu_seconds_total (.*)$", (await metrics.scraped(others)).decode(), re.M)
        return float(line)

    before = await told(Counts({}))
    ended = await told(Counts({}, ended=1000.0), Counts({}, ended=500.0))
    assert 1499.999 < ended - before < 1560, "to the rounding of floats"
    assert await told() == ended, "of a worker that died nobody knows what its children had"
