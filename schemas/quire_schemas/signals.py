"""Every metric, span and attribute name of the product, in one place.

No other module spells such a name. Prometheus names use underscores (colons are reserved for recording rules);
units are seconds, bytes, tokens, and of GPUs degrees Celsius and watts. Buckets follow what dashboards of
comparable servers expect. What vLLM has for the same is at the end.
"""

from __future__ import annotations

from typing import Final

# ── metrics: name, then what it counts ────────────────────────────────────────────────────────────────────
REQUESTS: Final = "quire_requests"
"""Counter by model (`-`: one that is not served), operation and finish: stop, length or repetition; abort (the
client left); refused (for what it asks, or for want of a place or a replica); error."""
ADMISSION_REJECTIONS: Final = "quire_admission_rejections"
"""Counter by model and reason: the refused ones, by the code that the client was told."""
POLICY_REFUSALS: Final = "quire_policy_refusals"
"""Counter by policy and reason: answers to requests with a key that were refused for what the policy allows
(permission_denied), for its limits and budgets, or for a queue that is full. Batches and background work apart."""
RETRIES: Final = "quire_retries"
"""Counter by model: sequences that were started again because their engine was lost."""
CORRUPTED_REQUESTS: Final = "quire_corrupted_requests"
"""Counter by model: sequences that ended because the model's numbers were not finite."""
PROMPT_TOKENS: Final = "quire_prompt_tokens"
"""Counter by model: tokens of prompts."""
PROMPT_TOKENS_BY_SOURCE: Final = "quire_prompt_tokens_by_source"
"""Counter by model and source, of prompts that were computed: local_cache_hit (found in the prefix cache) or
local_compute."""
GENERATION_TOKENS: Final = "quire_generation_tokens"
"""Counter by model: tokens generated."""
REQUESTS_IN_FLIGHT: Final = "quire_requests_in_flight"
"""Gauge by model: requests the router has accepted and not answered in full."""
REQUESTS_HELD: Final = "quire_requests_held"
"""Requests that wait in the router for a replica to become ready."""
STREAM_MIGRATIONS: Final = "quire_stream_migrations"
"""Streams that went on at another replica when an engine was lost."""
TOOL_CALL_PARSER_INVOCATIONS: Final = "quire_tool_call_parser_invocations"
"""Counter by model, operation, mode (streaming, non_streaming) and outcome (tool_call, no_tool_call): answers that
came to their end and were read for calls, as their requests offered tools."""
REPLICAS_WANTED: Final = "quire_replicas_wanted"
"""Gauge by model: replicas that there are to be now; 0 for one that is paused, or on demand and not in memory."""
REPLICAS_READY: Final = "quire_replicas_ready"
"""Gauge by model: replicas that a request could be given to."""
REPLICA_RESTARTS: Final = "quire_replica_restarts"
"""Gauge by model: how often in a row the replica that fares worst was started again and has not served since."""
REPLICA_EJECTIONS: Final = "quire_replica_ejections"
"""Counter by model and reason: a replica that served gets no new request, because its connection was lost
(disconnected) or it makes no progress (stalled). One that was told to leave does not count."""
TIME_TO_FIRST_TOKEN: Final = "quire_time_to_first_token_seconds"
"""Histogram by model, from the arrival at the router."""
INTER_TOKEN_LATENCY: Final = "quire_inter_token_latency_seconds"
"""Histogram by model, between tokens of one answer as the router sees them."""
TIME_PER_OUTPUT_TOKEN: Final = "quire_request_time_per_output_token_seconds"
"""Histogram by model, one value a sequence: its decode time by its tokens, without the first."""
E2E_LATENCY: Final = "quire_e2e_request_latency_seconds"
"""Histogram by model, from arrival to the last token."""
QUEUE_TIME: Final = "quire_request_queue_time_seconds"
"""Histogram by model: from the engine's receipt of a request to its first step."""
PREFILL_TIME: Final = "quire_request_prefill_time_seconds"
"""Histogram by model: from a sequence's first step to its first token. This and the next two are of sequences that
came to their end."""
DECODE_TIME: Final = "quire_request_decode_time_seconds"
"""Histogram by model: from a sequence's first token to its last."""
INFERENCE_TIME: Final = "quire_request_inference_time_seconds"
"""Histogram by model: from a sequence's first step to its last token."""
ROUTER_ADDED_TIME: Final = "quire_router_added_seconds"
"""Histogram by model and part, what the router itself adds: request (from the body's last byte to the engine's
socket, without the time held for a replica) and answer (from an engine's frame to the client's socket, one value
for all that one wake-up brought)."""
REQUEST_PROMPT_TOKENS: Final = "quire_request_prompt_tokens"
"""Histogram by model: tokens of a request's prompt."""
REQUEST_GENERATION_TOKENS: Final = "quire_request_generation_tokens"
"""Histogram by model: tokens of a sequence that came to its end."""
REQUEST_MAX_GENERATION_TOKENS: Final = "quire_request_max_num_generation_tokens"
"""Histogram by model: of a request's sequences the most tokens."""
REQUEST_PARAMS_N: Final = "quire_request_params_n"
"""Histogram by model: sequences that a request asks for, for each prompt."""
REQUEST_PARAMS_MAX_TOKENS: Final = "quire_request_params_max_tokens"
"""Histogram by model: tokens that each of a request's answers may have."""
REQUEST_NUM_PREEMPTIONS: Final = "quire_request_num_preemptions"
"""Histogram by model: how often a sequence that came to its end had lost its blocks."""
REQUEST_COMPUTED_TOKENS: Final = "quire_request_prefill_kv_computed_tokens"
"""Histogram by model: tokens of a sequence's prompt that were computed, not found in the cache."""
NUM_REQUESTS_RUNNING: Final = "quire_num_requests_running"
"""Gauge by model and replica."""
NUM_REQUESTS_WAITING: Final = "quire_num_requests_waiting"
"""Gauge by model and replica: in the engine's queue."""
NUM_REQUESTS_WAITING_BY_REASON: Final = "quire_num_requests_waiting_by_reason"
"""Gauge by model, replica and reason: for room (capacity), or for a grammar to be compiled (deferred)."""
CACHE_CONFIG_INFO: Final = "quire_cache_config_info"
"""Gauge, always 1, by model, replica, and what its KV cache is: block_size, num_blocks, max_num_seqs,
max_model_len and enable_prefix_caching."""
KV_CACHE_USAGE: Final = "quire_kv_cache_usage_ratio"
"""Gauge by model and replica: blocks in use, 0 to 1."""
KV_BLOCKS_SAVED: Final = "quire_kv_blocks_saved"
"""Gauge by model and replica: blocks that would be in use besides if running sequences did not share any."""
PREEMPTIONS: Final = "quire_preemptions"
"""Counter by model and replica."""
PREFIX_CACHE_QUERIES: Final = "quire_prefix_cache_queries"
"""Counter by model and replica, in tokens: of sequences that were let in and might have found them computed."""
PREFIX_CACHE_HITS: Final = "quire_prefix_cache_hits"
"""Counter by model and replica, in tokens: those of the queried ones that were found."""
PREFIX_CACHE_BLOCKS: Final = "quire_prefix_cache_blocks"
"""Gauge by model and replica: free KV blocks that a prompt which begins alike would find."""
ENGINE_STEPS: Final = "quire_engine_steps"
"""Counter by model and replica."""
ITERATION_TOKENS: Final = "quire_iteration_tokens"
"""Histogram by model and replica: tokens that a step computed, of prompts and of answers."""
ENGINE_CPU: Final = "quire_engine_cpu_seconds"
"""Counter by model and replica: processor time of the engine's process."""
ENGINE_RESIDENT_MEMORY: Final = "quire_engine_resident_memory_bytes"
"""Gauge by model and replica: memory of the host that the engine's process has."""
REPLICA_UP: Final = "quire_replica_up"
"""Gauge by model and replica: 1 while the router is connected to it and it makes progress."""
REPLICA_TRIPPED: Final = "quire_replica_tripped"
"""Gauge by model and replica: 1 while it gets no requests because it fails them, 0.5 while it is tried again."""
ROUTE_REQUESTS: Final = "quire_route_requests"
"""Counter by route and model: requests that a Route sent to a model, those included for which it stepped in."""
ROUTE_FALLBACKS: Final = "quire_route_fallbacks"
"""Counter by route, model and failure: times that the model stepped in for one that had failed in that way."""
ROUTE_MIRRORED: Final = "quire_route_mirrored"
"""Counter by route, model and finish: copies of requests; completed, failed, or dropped for want of a place."""
STORE_FREE: Final = "quire_store_free_bytes"
"""Gauge: room on the disk that has the files, batches and responses of clients. At 64 MiB nothing more is kept."""
ROUTER_CPU: Final = "process_cpu_seconds"
"""Counter: processor time of the router's process. This and the next four are where the system tells (Linux)."""
ROUTER_RESIDENT_MEMORY: Final = "process_resident_memory_bytes"
"""Gauge: memory that the router's process has."""
ROUTER_VIRTUAL_MEMORY: Final = "process_virtual_memory_bytes"
"""Gauge."""
ROUTER_START_TIME: Final = "process_start_time_seconds"
"""Gauge: when it was started, in Unix seconds."""
ROUTER_OPEN_FDS: Final = "process_open_fds"
"""Gauge: descriptors that it has open; connections are among them."""
ROUTER_MAX_FDS: Final = "process_max_fds"
"""Gauge: descriptors that it may have open."""
BUDGET_SPENT: Final = "quire_budget_spent_ratio"
"""Gauge by policy, budget and key (empty where it is the policy's): the share of a budget that is spent."""
CONNECTIONS_REFUSED: Final = "quire_connections_refused"
"""Counter: connections turned away because the descriptors that connections may have were in use."""
MEMORY_SHARE: Final = "quire_router_memory_share"
"""Gauge: of the memory that the router could have now, the part that it has. From 0.85 on it refuses work."""
BATCHES_RUNNING: Final = "quire_batches_running"
"""Gauge: batches whose lines this router works off."""
BATCH_LINES: Final = "quire_batch_lines"
"""Counter by finish: lines of batches that have their answer on disk; completed (a 200) or failed (any other)."""
SPANS_EXPORTED: Final = "quire_spans_exported"
"""Counter: spans of the router that its trace exporter has delivered."""
SPANS_DROPPED: Final = "quire_spans_dropped"
"""Counter by reason: spans lost for want of room (queue_full), or because the collector failed (export_failed)."""

GPU_MEMORY: Final = "quire_gpu_memory_bytes"
"""Gauge by device: memory in total. Series of GPUs are there for what NVML tells of the card."""
GPU_MEMORY_USED: Final = "quire_gpu_memory_used_bytes"
"""Gauge by device: what processes hold, whoever started them."""
GPU_UTILIZATION: Final = "quire_gpu_utilization_ratio"
"""Gauge by device: share of the last moments in which some kernel ran, 0 to 1."""
GPU_TEMPERATURE: Final = "quire_gpu_temperature_celsius"
"""Gauge by device."""
GPU_POWER: Final = "quire_gpu_power_watts"
"""Gauge by device."""
GPU_SLOWED: Final = "quire_gpu_slowed"
"""Gauge by device: 1 while heat or a power brake holds its clocks back."""
GPU_ECC_ERRORS: Final = "quire_gpu_ecc_uncorrected_errors"
"""Gauge by device: memory errors that could not be corrected, since the driver was loaded."""
GPU_XID_ERRORS: Final = "quire_gpu_xid_errors"
"""Counter by device and xid: errors that the driver has reported since the router started."""

LABEL_MODEL: Final = "model"
LABEL_REPLICA: Final = "replica"
LABEL_OPERATION: Final = "operation"
LABEL_FINISH: Final = "finish"
LABEL_REASON: Final = "reason"
LABEL_ROUTE: Final = "route"
LABEL_POLICY: Final = "policy"
LABEL_BUDGET: Final = "budget"
LABEL_KEY: Final = "key"
LABEL_FAILURE: Final = "failure"
LABEL_DEVICE: Final = "device"
"""`cuda:0`, by the number that NVML gives it."""
LABEL_XID: Final = "xid"
LABEL_SOURCE: Final = "source"
LABEL_PART: Final = "part"
LABEL_MODE: Final = "mode"
LABEL_OUTCOME: Final = "outcome"
LABEL_BLOCK_SIZE: Final = "block_size"
LABEL_NUM_BLOCKS: Final = "num_blocks"
LABEL_MAX_NUM_SEQS: Final = "max_num_seqs"
LABEL_MAX_MODEL_LEN: Final = "max_model_len"
LABEL_PREFIX_CACHING: Final = "enable_prefix_caching"

TTFT_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_BUCKETS: Final = (
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0,
)  # fmt: skip
LATENCY_BUCKETS: Final = (
    0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
ADDED_BUCKETS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
ITERATION_TOKENS_BUCKETS: Final = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TOKENS_BUCKETS: Final = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000,
    1_000_000,
)  # fmt: skip
FEW_BUCKETS: Final = (0, 1, 2, 5, 10, 20)

# ── spans: name, then what it covers ──────────────────────────────────────────────────────────────────────────
SPAN_REQUEST: Final = "{operation} {model}"
"""Router, server: one request, from its arrival to the last byte of its answer; the parent of the six below it."""
SPAN_TOKENIZE: Final = "tokenize"
"""Router: the template rendered and the text made token ids."""
SPAN_HOLD: Final = "hold"
"""Router: no replica was ready, and the request waited for one."""
SPAN_QUEUE: Final = "queue"
"""Engine: from the receipt of a sequence to the first step it has a part in."""
SPAN_PREFILL: Final = "prefill"
"""Engine: from that step to the sequence's first token."""
SPAN_DECODE: Final = "decode"
"""Engine: from the first token to the last."""
SPAN_ATTEMPT: Final = "attempt"
"""Router: a sequence that ended before the engine told anything of it: lost with its engine, or aborted early."""
SPAN_COMMAND: Final = "platform {command}"
"""Command: from sending a change to the end of waiting for it; the parent of the next."""
SPAN_ADMIN: Final = "{method} {route}"
"""Control plane, server: a request of the admin API that changes something."""
SPAN_RECONCILE: Final = "reconcile {kind}"
"""Control plane: one pass over one object, linked to the request that made its generation."""

EVENT_FIRST_TOKEN: Final = "first_token"
"""On the request: the router has the first token of the answer."""
EVENT_PREEMPTED: Final = "preempted"
"""On prefill or decode: the sequence lost its blocks to an older one and is computed again."""
EVENT_RETRY: Final = "retry"
"""On the request: an engine was lost, which is named, and a sequence starts again."""
EVENT_MIGRATE: Final = "migrate"
"""On the request: an engine was lost, which is named, and a stream goes on elsewhere behind what it has sent."""
EVENT_FALLBACK: Final = "fallback"
"""On the request: a model has failed it, and another one, which is named, steps in."""
EVENT_STEP: Final = "step"
"""On a reconcile: something was done."""

SERVICE_ROUTER: Final = "quire-router"
SERVICE_CONTROL_PLANE: Final = "quire-controlplane"
SERVICE_COMMAND: Final = "quire-cli"
PROVIDER: Final = "quire"

# ── attributes: those of the semantic conventions, then our own ───────────────────────────────────────────────
SERVICE_NAME: Final = "service.name"
SERVICE_VERSION: Final = "service.version"
PROCESS_PID: Final = "process.pid"
PROCESS_EXIT_CODE: Final = "process.exit.code"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"
HTTP_METHOD: Final = "http.request.method"
HTTP_ROUTE: Final = "http.route"
HTTP_STATUS: Final = "http.response.status_code"
ERROR_TYPE: Final = "error.type"
GEN_AI_OPERATION: Final = "gen_ai.operation.name"
GEN_AI_PROVIDER: Final = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL: Final = "gen_ai.request.model"
GEN_AI_REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
GEN_AI_REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
GEN_AI_REQUEST_TOP_P: Final = "gen_ai.request.top_p"
GEN_AI_REQUEST_TOP_K: Final = "gen_ai.request.top_k"
GEN_AI_REQUEST_SEED: Final = "gen_ai.request.seed"
GEN_AI_REQUEST_FREQUENCY_PENALTY: Final = "gen_ai.request.frequency_penalty"
GEN_AI_REQUEST_PRESENCE_PENALTY: Final = "gen_ai.request.presence_penalty"
GEN_AI_REQUEST_CHOICES: Final = "gen_ai.request.choice.count"
GEN_AI_REQUEST_STREAM: Final = "gen_ai.request.stream"
GEN_AI_REQUEST_ENCODINGS: Final = "gen_ai.request.encoding_formats"
"""Of embeddings: float or base64."""
GEN_AI_EMBEDDINGS_DIMENSIONS: Final = "gen_ai.embeddings.dimension.count"
"""Of embeddings, where the request names a number."""
GEN_AI_OUTPUT_TYPE: Final = "gen_ai.output.type"
"""json, where the answer is held to a JSON Schema from its first token: not behind a thought."""
GEN_AI_CONVERSATION_ID: Final = "gen_ai.conversation.id"
"""Of responses: the id of the first one of those that this one goes on from, or its own."""
GEN_AI_RESPONSE_ID: Final = "gen_ai.response.id"
GEN_AI_RESPONSE_MODEL: Final = "gen_ai.response.model"
GEN_AI_RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
"""Seconds, of streams alone."""
GEN_AI_USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
GEN_AI_USAGE_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
GEN_AI_USAGE_CACHE_READ: Final = "gen_ai.usage.cache_read.input_tokens"
"""Input tokens that were found in the prefix cache, as the answer's `cached_tokens`."""
GEN_AI_USAGE_REASONING: Final = "gen_ai.usage.reasoning.output_tokens"
"""Output tokens that were thought, of chats alone."""
GEN_AI_TOKEN_TYPE: Final = "gen_ai.token.type"
"""On the metric of tokens: input or output."""
GEN_AI_TIME_TO_FIRST_TOKEN: Final = "gen_ai.latency.time_to_first_token"
"""Seconds from the arrival to the first token at the router."""
GEN_AI_E2E: Final = "gen_ai.latency.e2e"
"""Seconds from the arrival to the end of the answer."""
GEN_AI_TIME_IN_QUEUE: Final = "gen_ai.latency.time_in_queue"
"""Seconds in the engine's queue; of several sequences the longest, here and in the three that follow."""
GEN_AI_TIME_IN_PREFILL: Final = "gen_ai.latency.time_in_model_prefill"
"""Seconds from the first step to the first token."""
GEN_AI_TIME_IN_DECODE: Final = "gen_ai.latency.time_in_model_decode"
"""Seconds from the first token to the last."""
GEN_AI_TIME_IN_INFERENCE: Final = "gen_ai.latency.time_in_model_inference"
"""Seconds from the first step to the last token."""
QUIRE_REPLICA: Final = "quire.replica.id"
"""On queue, prefill, decode, attempt and retry: where."""
QUIRE_CHOICE: Final = "quire.choice.index"
"""Which of several sequences of one request."""
QUIRE_ATTEMPT: Final = "quire.attempt"
"""2 and above: the sequence had been started before, at an engine that was lost."""
QUIRE_ROUTE: Final = "quire.route"
"""On the request: the Route that it went by."""
QUIRE_MODEL: Final = "quire.model"
"""On fallback: the Model that steps in."""
QUIRE_TOKENS: Final = "quire.tokens"
"""Token ids that tokenizing made, or of the prompt (on prefill), or of the answer (on decode)."""
QUIRE_RESOURCE: Final = "quire.resource"
"""On a reconcile: the object's key."""
QUIRE_GENERATION: Final = "quire.generation"
"""On a reconcile: the generation it worked towards."""
QUIRE_OUTCOME: Final = "quire.reconcile.outcome"
"""acted, waiting (it comes back by itself), idle (nothing to do until something changes), failed or cancelled."""
QUIRE_STEP: Final = "quire.reconcile.step"
"""On the event of that name: what was done."""

# ── metrics that go to a collector, by the conventions of OpenTelemetry ───────────────────────────────────────
METER_REQUEST_DURATION: Final = "gen_ai.server.request.duration"
"""Seconds from the arrival to the end; with error.type where it did not go well."""
METER_FIRST_TOKEN: Final = "gen_ai.server.time_to_first_token"
"""Seconds from the arrival to the first token."""
METER_PER_TOKEN: Final = "gen_ai.server.time_per_output_token"
"""Seconds for each token behind the first."""
METER_TOKENS: Final = "gen_ai.client.token.usage"
"""Tokens, with gen_ai.token.type."""
METER_DURATION_BUCKETS: Final = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
)  # fmt: skip
METER_TTFT_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
METER_TPOT_BUCKETS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
METER_TOKENS_BUCKETS: Final = tuple(float(4**power) for power in range(14))

# ── names that are known from vLLM, for `Gateway.metrics.compat: vllm` ────────────────────────────────────────
VLLM_NAMES: Final = {
    NUM_REQUESTS_RUNNING: ("vllm:num_requests_running",),
    NUM_REQUESTS_WAITING: ("vllm:num_requests_waiting",),
    NUM_REQUESTS_WAITING_BY_REASON: ("vllm:num_requests_waiting_by_reason",),
    KV_CACHE_USAGE: ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    CACHE_CONFIG_INFO: ("vllm:cache_config_info",),
    PREFIX_CACHE_QUERIES: ("vllm:prefix_cache_queries", "vllm:gpu_prefix_cache_queries"),
    PREFIX_CACHE_HITS: ("vllm:prefix_cache_hits", "vllm:gpu_prefix_cache_hits"),
    PREEMPTIONS: ("vllm:num_preemptions",),
    PROMPT_TOKENS: ("vllm:prompt_tokens",),
    PROMPT_TOKENS_BY_SOURCE: ("vllm:prompt_tokens_by_source",),
    GENERATION_TOKENS: ("vllm:generation_tokens",),
    ADMISSION_REJECTIONS: ("vllm:admission_rejections",),
    CORRUPTED_REQUESTS: ("vllm:corrupted_requests",),
    TIME_TO_FIRST_TOKEN: ("vllm:time_to_first_token_seconds",),
    INTER_TOKEN_LATENCY: ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    TIME_PER_OUTPUT_TOKEN: ("vllm:request_time_per_output_token_seconds",),
    E2E_LATENCY: ("vllm:e2e_request_latency_seconds",),
    QUEUE_TIME: ("vllm:request_queue_time_seconds",),
    PREFILL_TIME: ("vllm:request_prefill_time_seconds",),
    DECODE_TIME: ("vllm:request_decode_time_seconds",),
    INFERENCE_TIME: ("vllm:request_inference_time_seconds",),
    REQUEST_PROMPT_TOKENS: ("vllm:request_prompt_tokens",),
    REQUEST_GENERATION_TOKENS: ("vllm:request_generation_tokens",),
    REQUEST_MAX_GENERATION_TOKENS: ("vllm:request_max_num_generation_tokens",),
    REQUEST_PARAMS_N: ("vllm:request_params_n",),
    REQUEST_PARAMS_MAX_TOKENS: ("vllm:request_params_max_tokens",),
    REQUEST_NUM_PREEMPTIONS: ("vllm:request_num_preemptions",),
    REQUEST_COMPUTED_TOKENS: ("vllm:request_prefill_kv_computed_tokens",),
    ITERATION_TOKENS: ("vllm:iteration_tokens_total",),
}
"""By our names, the ones that have the same meaning; the later of two are what older dashboards look for."""
VLLM_REQUEST_SUCCESS: Final = "vllm:request_success"
"""Counter by finished_reason: what `quire_requests` counts, but for the refused."""
VLLM_PROMPT_TOKENS_CACHED: Final = "vllm:prompt_tokens_cached"
"""Counter: those with the source local_cache_hit."""
VLLM_PROMPT_TOKENS_CACHED_BY_SOURCE: Final = "vllm:prompt_tokens_cached_by_source"
"""Counter by source, which is local_cache_hit."""
VLLM_TOOL_CALL_PARSER_INVOCATIONS: Final = "vllm:tool_call_parser_invocations"
"""Counter by mode, outcome and request_type. Here each answer counts once, streamed or whole."""
VLLM_REQUEST_TYPE: Final = "request_type"
VLLM_REQUEST_TYPES: Final = {"chat": "chat_completions", "responses": "responses"}
"""By our operations."""
VLLM_REQUESTS_SWAPPED: Final = "vllm:num_requests_swapped"
"""Gauge: 0, as nothing is swapped out here."""
VLLM_CPU_CACHE_USAGE: Final = "vllm:cpu_cache_usage_perc"
"""Gauge: 0, as there is no second cache."""
VLLM_LABELS: Final = {LABEL_MODEL: "model_name", LABEL_REPLICA: "engine", LABEL_NUM_BLOCKS: "num_gpu_blocks"}
"""Labels with another name there."""
VLLM_FINISHED_REASON: Final = "finished_reason"
VLLM_WHOLE: Final = "0"
"""The `engine` of what is told of a model and not of a replica."""
