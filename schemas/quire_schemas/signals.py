"""Every metric, span and attribute name of the product, in one place.

No other module spells such a name. Prometheus names use underscores (colons are reserved for recording rules);
units are seconds, bytes and tokens. Buckets follow what dashboards of comparable servers expect.
"""

from __future__ import annotations

from typing import Final

# ── metrics: name, then what it counts ────────────────────────────────────────────────────────────────────
REQUESTS: Final = "quire_requests"
"""Counter by model, operation and finish (stop, length, abort, error, refused)."""
PROMPT_TOKENS: Final = "quire_prompt_tokens"
"""Counter by model: tokens of prompts."""
GENERATION_TOKENS: Final = "quire_generation_tokens"
"""Counter by model: tokens generated."""
REQUESTS_IN_FLIGHT: Final = "quire_requests_in_flight"
"""Gauge by model: requests the router has accepted and not answered in full."""
REQUESTS_HELD: Final = "quire_requests_held"
"""Requests that wait in the router for a replica to become ready."""
TIME_TO_FIRST_TOKEN: Final = "quire_time_to_first_token_seconds"
"""Histogram by model, from the arrival at the router."""
INTER_TOKEN_LATENCY: Final = "quire_inter_token_latency_seconds"
"""Histogram by model, between tokens of one answer as the router sees them."""
E2E_LATENCY: Final = "quire_e2e_request_latency_seconds"
"""Histogram by model, from arrival to the last token."""
QUEUE_TIME: Final = "quire_request_queue_time_seconds"
"""Histogram by model: from the engine's receipt of a request to its first step."""
NUM_REQUESTS_RUNNING: Final = "quire_num_requests_running"
"""Gauge by model and replica."""
NUM_REQUESTS_WAITING: Final = "quire_num_requests_waiting"
"""Gauge by model and replica: in the engine's queue."""
KV_CACHE_USAGE: Final = "quire_kv_cache_usage_ratio"
"""Gauge by model and replica: blocks in use, 0 to 1."""
PREEMPTIONS: Final = "quire_preemptions"
"""Counter by model and replica."""
ENGINE_STEPS: Final = "quire_engine_steps"
"""Counter by model and replica."""
REPLICA_UP: Final = "quire_replica_up"
"""Gauge by model and replica: 1 while the router is connected to it."""

LABEL_MODEL: Final = "model"
LABEL_REPLICA: Final = "replica"
LABEL_OPERATION: Final = "operation"
LABEL_FINISH: Final = "finish"

TTFT_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
ITL_BUCKETS: Final = (
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
LATENCY_BUCKETS: Final = (
    0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0,
)  # fmt: skip

# ── spans: one a request, `<operation> <model>`, attributes by the GenAI semantic conventions ─────────────────
SERVICE_NAME: Final = "quire-router"
GEN_AI_OPERATION: Final = "gen_ai.operation.name"
GEN_AI_PROVIDER: Final = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL: Final = "gen_ai.request.model"
GEN_AI_REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
GEN_AI_REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
GEN_AI_REQUEST_TOP_P: Final = "gen_ai.request.top_p"
GEN_AI_REQUEST_CHOICES: Final = "gen_ai.request.choice.count"
GEN_AI_REQUEST_STREAM: Final = "gen_ai.request.stream"
GEN_AI_RESPONSE_ID: Final = "gen_ai.response.id"
GEN_AI_RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
GEN_AI_USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
GEN_AI_USAGE_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
GEN_AI_TIME_TO_FIRST_TOKEN: Final = "gen_ai.latency.time_to_first_token"
ERROR_TYPE: Final = "error.type"
