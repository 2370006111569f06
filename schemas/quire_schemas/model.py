"""Kind `Model`: one served model. Its source, how one replica runs, how many run, how a change is rolled out.

Every field states its update class and whether this version honours it (see `resource.declared`); a field
that is not honoured may be declared only with a value that means what this version does anyway. Rules between
fields, and rules of one field that its type cannot state, are in `rules.py`; here stand only shapes, bounds
and defaults.

`resolve_defaults` turns a `Model` into the resolved spec: a plain camelCase dict in which every field has a
value. `auto` stays `auto` there: it needs the checkpoint and the machine, and is resolved at admission or
placement. `DEFAULTS_VERSION` goes into the dict and is frozen with it into the revision, so that a release
with other defaults changes no running model.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from quire_schemas.dialects import ReasoningDialect, ToolDialect
from quire_schemas.quantities import Duration, Money, Percent, Quantity, parse_quantity
from quire_schemas.resource import Invalid, Resource, Strict, Text, declared, section

DEFAULTS_VERSION = 3
MAX_MODEL_LEN = 16_777_216
MAX_STEP_TOKENS = 1_048_576
_CPU_PREFILL_TOKENS = 64
"""A step of that many takes a few times as long as one that reads the weights for a token of each sequence."""

_NO_SECRETS = "variables of engines are written in the manifest alone"
_ONE_DEVICE = "a replica runs on one device"
_NO_FORMAT = (
    "the engine makes int8, int4 or fp8 of a checkpoint in a float type, and reads no other but fp8 and MXFP4"
)
_NO_GROUPS = "a scale is shared by 32, 64 or 128 weights"
_NO_SPECULATION = "there is no speculative decoding yet"
_NO_SLO = "there is no scheduling by a declared latency yet"
_STALL_CHECK = "progress is watched all the time, not probed now and then; liveness.timeout bounds its absence"


def _auto_or_count(value: Any) -> Any:
    """Says in one sentence what the two members of the union would say in two."""
    if value == "auto" or (type(value) is int and 1 <= value <= MAX_MODEL_LEN):
        return value
    raise Invalid(
        f"should be 'auto' or a whole number from 1 to {MAX_MODEL_LEN}", "for example 8192; 'auto' takes what fits"
    )


def _auto_or_flag(value: Any) -> Any:
    if value == "auto" or isinstance(value, bool):
        return value
    raise Invalid("should be 'auto', true or false", "'auto' decides by the device")


def _auto_or_tokens(value: Any) -> Any:
    if value == "auto" or (type(value) is int and 1 <= value <= MAX_STEP_TOKENS):
        return value
    raise Invalid(
        f"should be 'auto' or a whole number from 1 to {MAX_STEP_TOKENS}",
        "for example 64; 'auto' decides by the device",
    )


def _auto_or_quantity(value: Any) -> Any:
    if not isinstance(value, str):
        raise Invalid("should be 'auto' or a byte quantity", "for example '2Gi'")
    if value != "auto":
        parse_quantity(value)
    return value


AutoCount = Annotated[
    Annotated[int, Field(ge=2, le=MAX_MODEL_LEN)] | Literal["auto"], BeforeValidator(_auto_or_count)
]
AutoTokens = Annotated[
    Annotated[int, Field(ge=1, le=MAX_STEP_TOKENS)] | Literal["auto"], BeforeValidator(_auto_or_tokens)
]
AutoFlag = Annotated[bool | Literal["auto"], BeforeValidator(_auto_or_flag)]
AutoQuantity = Annotated[Literal["auto"] | Quantity, BeforeValidator(_auto_or_quantity)]
Source = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
ServedName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}$")]
AdapterName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]


SECRET_NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"


class SecretReference(Strict):
    """Where a secret value comes from, by one of these fields; the value itself never stands in a manifest."""

    secret_ref: Annotated[str, StringConstraints(pattern=SECRET_NAME)] | None = declared(
        "Name of a secret stored with the platform: platform secret set NAME.", None, update="rolling"
    )
    file: str | None = declared(
        "Absolute path of a file that holds the value, read when it is needed.",
        None,
        update="rolling",
        min_length=1,
        max_length=4096,
    )
    env: EnvName | None = declared(
        "Variable of the control plane's environment that holds the value. A control plane that started by itself "
        "has only part of the environment of the shell that started it.",
        None,
        update="rolling",
    )


class Tokenizer(Strict):
    """Which tokenizer and chat template stand before the model."""

    source: Source | None = declared(
        "Where the tokenizer comes from, written like spec.source. Left out: the model's own folder.",
        None,
        update="rolling",
    )
    chat_template_file: str | None = declared(
        "Absolute path of a Jinja file that replaces the chat template of the tokenizer. It runs in a sandbox. "
        "What it holds when it is applied stays with the revision; applied with another text, it is another one.",
        None,
        update="rolling",
        min_length=1,
        max_length=4096,
    )


class KvCache(Strict):
    """The paged store of attention keys and values."""

    dtype: Literal["auto", "fp8", "int8", "bfloat16", "float16", "float32"] = declared(
        "Number format of cached keys and values. 'auto' is the engine's dtype. 'int8' and 'fp8' (e4m3) have a "
        "scale for each head of a token: about half the bytes of bfloat16, other numbers. 'fp8' is for GPUs "
        "alone.",
        "auto",
        update="rolling",
    )
    block_size: Literal[8, 16, 32] = declared(
        "Tokens in one block. Smaller blocks waste fewer slots at the end of a sequence; larger ones need "
        "shorter block tables.",
        16,
        update="rolling",
    )
    size: AutoQuantity = declared(
        "Bytes for the cache alone. 'auto' on a GPU is what engine.memory leaves after weights and activations; "
        "on CPU the smallest of 4Gi, what maxNumSeqs sequences of maxModelLen need, and a quarter of the "
        "available memory.",
        "auto",
        update="rolling",
    )
    swap_space: Quantity = declared(
        "Host memory that blocks of preempted sequences may be moved to.",
        "0",
        update="rolling",
        refused="a preempted sequence is recomputed, never swapped",
        honours=("0",),
    )


class Engine(Strict):
    """How one replica computes."""

    runner: Literal["model", "scripted"] = declared(
        "'model' computes; 'scripted' answers what each request brings as its script, or its own prompt, for "
        "tests of clients. It loads no weights, allocates no cache and runs on the CPU; config.json, tokenizer, "
        "scheduler and API are the model's.",
        "model",
        update="rolling",
    )
    step_time: Duration | None = declared(
        "Time that each step of the scripted runner takes. Left out: as little as it can.",
        None,
        update="rolling",
    )
    device: Literal["auto", "cpu", "cuda"] = declared(
        "Kind of device that a replica runs on. 'auto' takes a free GPU if the machine has one, else the CPU.",
        "auto",
        update="rolling",
    )
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = declared(
        "Number format of weights and activations. 'auto' is the checkpoint's own.", "auto", update="rolling"
    )
    max_model_len: AutoCount = declared(
        "Longest sequence, prompt and answer together, in tokens; at least 2, one of each. 'auto' is the "
        "checkpoint's own limit, or as much of it as the cache can hold. A number that does not fit is refused, "
        "not reduced.",
        "auto",
        update="rolling",
    )
    memory: Percent = declared(
        "Share of the device's memory that one replica may take for everything: weights, activations and cache. "
        "engine.kvCache.size is the cache alone.",
        "90%",
        update="rolling",
    )
    kv_cache: KvCache = section(KvCache, "The paged store of attention keys and values.")
    seed: int = declared(
        "Seed of the random numbers for requests that bring none of their own.",
        0,
        update="rolling",
        ge=0,
        le=2**63 - 1,
    )
    enforce_eager: bool = declared(
        "Never capture CUDA graphs: every kernel of every step is launched by itself, which takes a little less "
        "memory of a GPU and more time. A CPU has no such graphs, so there true changes nothing.",
        False,
        update="rolling",
    )
    extra_args: Annotated[tuple[str, ...], Field(strict=False)] = declared(
        "Engine arguments outside of this schema.",
        (),
        update="rolling",
        refused="every argument of the engine is a field of this schema",
        honours=([],),
    )


class Parallelism(Strict):
    """How one replica is spread over devices."""

    tensor: int = declared(
        "Devices that share every layer.",
        1,
        update="rolling",
        refused=_ONE_DEVICE,
        honours=(1,),
        ge=1,
        le=1024,
    )
    pipeline: int = declared(
        "Groups of layers on devices of their own.",
        1,
        update="rolling",
        refused=_ONE_DEVICE,
        honours=(1,),
        ge=1,
        le=1024,
    )
    data: int = declared(
        "Copies of the attention layers inside one replica.",
        1,
        update="rolling",
        refused=_ONE_DEVICE,
        honours=(1,),
        ge=1,
        le=1024,
    )
    expert: bool = declared(
        "Spread the experts of a mixture-of-experts model over the devices.",
        False,
        update="rolling",
        refused=_ONE_DEVICE,
        honours=(False,),
    )


class Quantization(Strict):
    """Number format of the weights, where it is not that of the checkpoint."""

    method: Literal["none", "int8", "int4", "fp8", "awq", "gptq"] = declared(
        "How weights are quantized. 'none' takes them as the checkpoint has them; those in fp8 or MXFP4 are "
        "widened to engine.dtype on a CPU. 'int8' and 'int4' make integers of those of all linear layers and of "
        "the head while the engine loads: less memory, more speed, other numbers; 'fp8', on GPUs alone, floats of "
        "8 bits with a scale for each block of 128 x 128. An untied embedding and norms stay in engine.dtype.",
        "none",
        update="rolling",
        refused=_NO_FORMAT,
        honours=("none", "int8", "int4", "fp8"),
    )
    format: Literal["auto"] = declared(
        "Layout of quantized weights in the checkpoint; 'auto' reads it there.", "auto", update="rolling"
    )
    activations: Literal["auto", "int8", "fp8", "bf16"] = declared(
        "Number format of what enters a quantized layer. 'int8' has one scale for each token, found as it "
        "comes, and products of integers; 'fp8', for fp8 weights, one for each 128 inputs of a token; 'bf16' "
        "leaves it as it is. 'auto' is int8, with fp8 weights fp8, and with int4 on a GPU engine.dtype, for "
        "there nothing would be gained, and experts on a GPU always meet it as it is. With method none only a "
        "checkpoint in fp8 or MXFP4 on a GPU has any.",
        "auto",
        update="rolling",
    )
    group_size: int | None = declared(
        "Weights of an output, next to each other, that share one scale with int4: 32, 64 or 128. Left out: 32. "
        "With int8 an output has one.",
        None,
        update="rolling",
        refused=_NO_GROUPS,
        honours=(32, 64, 128),
        ge=8,
        le=4096,
    )


class Slo(Strict):
    """Latency that the scheduler aims for."""

    ttft_p95: Duration | None = declared(
        "95th percentile of the time to the first token.", None, update="hot", refused=_NO_SLO
    )
    itl_p95: Duration | None = declared(
        "95th percentile of the time between two tokens.", None, update="hot", refused=_NO_SLO
    )


class Batching(Strict):
    """What the scheduler puts into one step, and how long requests may queue for it."""

    max_num_seqs: int = declared(
        "Sequences that run at the same time. Raising it above the number the engine was started with starts "
        "new replicas.",
        64,
        update="hot",
        ge=1,
        le=4096,
    )
    max_num_batched_tokens: int = declared(
        "Tokens computed in one step, over all sequences. Larger values speed up long prompts, smaller ones "
        "keep the time between tokens even. Raising it above the number the engine was started with starts new "
        "replicas.",
        512,
        update="hot",
        ge=1,
        le=MAX_STEP_TOKENS,
    )
    max_prefill_tokens: AutoTokens = declared(
        "Prompt tokens computed in one step while other sequences write: a step that carries a part of a prompt "
        "takes longer, and they all wait for it. Fewer make the pace even, more bring the first token sooner. "
        "With nobody writing, prompts may fill the step. 'auto' is 64 on a CPU and what maxNumBatchedTokens "
        "leaves on a GPU.",
        "auto",
        update="hot",
    )
    chunked_prefill: bool = declared(
        "Split long prompts into chunks that share steps with running sequences. Lowers the time between tokens "
        "under mixed load at a small cost in prompt throughput. Without it a whole prompt has to fit into "
        "maxNumBatchedTokens.",
        True,
        update="hot",
    )
    prefix_caching: bool = declared(
        "Keep the blocks of finished prompts and reuse them for prompts that begin alike. Takes no memory of its "
        "own: blocks are kept until something else needs them. No answer depends on it (by rounding alone where "
        "there are no native kernels), but its time does, from which a client could learn what others asked: give "
        "each tenant a cache_salt.",
        True,
        update="rolling",
    )
    async_scheduling: AutoFlag = declared(
        "Decide each step while the one before it is computed, and hand its tokens out while the next one is. The "
        "same tokens (but for rounding where there are no native kernels), a step later; it pays where the host "
        "is slow beside the device. 'auto' does so on a GPU, and not on a CPU.",
        "auto",
        update="rolling",
    )
    policy: Literal["fcfs", "priority", "slo"] = declared(
        "Who is scheduled first: 'fcfs' is first come, first served; 'priority' goes by the requests' priority "
        "(lower first), then by arrival, and takes room for them from running requests of a higher number.",
        "fcfs",
        update="hot",
        refused=_NO_SLO,
        honours=("fcfs", "priority"),
    )
    slo: Slo | None = section(Slo, "Latency that the scheduler aims for.", refused=_NO_SLO, optional=True)
    max_queue_length: int = declared(
        "Requests that may wait for this model; the next one is answered 429 with Retry-After.",
        512,
        update="hot",
        ge=0,
        le=1_000_000,
    )
    max_queue_wait: Duration = declared(
        "How long a request may wait before it starts, also while a stop-first update runs or a replica comes "
        "up. After that it is answered 503 with Retry-After if no replica became ready, and 504 if it was queued "
        "for a free place at a ready one.",
        "60s",
        update="hot",
    )


class Speculative(Strict):
    """Guessing tokens with a cheaper model and checking them all at once."""

    method: Literal["draft", "ngram", "eagle"] = declared(
        "Where the guesses come from.", update="rolling", refused=_NO_SPECULATION
    )
    source: Source | None = declared(
        "The draft model, written like spec.source.", None, update="rolling", refused=_NO_SPECULATION
    )
    num_tokens: int = declared(
        "Tokens guessed at a time.", 4, update="rolling", refused=_NO_SPECULATION, ge=1, le=64
    )


class Adapter(Strict):
    """One LoRA adapter."""

    name: AdapterName = declared(
        "Requests ask for it by a name of the model, a colon, and this name: llama:sql.", update="rolling"
    )
    source: Source = declared(
        "The folder that PEFT's save_pretrained wrote, as file:///absolute/path. What is in it is part of the "
        "revision: where that changes, applying the same manifest is an update.",
        update="rolling",
    )


class Lora(Strict):
    """Low-rank adapters on top of the model."""

    max_rank: int = declared("No adapter of a larger rank is taken.", 64, update="rolling", ge=1, le=1024)
    max_loaded: int = declared(
        "Adapters in memory at a time. All that are declared are, so no more may be declared.",
        8,
        update="rolling",
        ge=1,
        le=1024,
    )
    adapters: Annotated[tuple[Adapter, ...], Field(strict=False, max_length=1024)] = declared(
        "The adapters, by name.", (), update="rolling"
    )


class Parsers(Strict):
    """How tool calls and reasoning are read out of the text."""

    tools: ToolDialect | None = declared(
        "How the model writes tool calls. 'none': they are not read, and the markup stays in the text. Left out: "
        "what the chat template shows.",
        None,
        update="hot",
    )
    reasoning: ReasoningDialect | None = declared(
        "How the model marks its thoughts. 'none': they are not told apart from the answer. Left out: what the "
        "chat template shows.",
        None,
        update="hot",
    )


class Accelerator(Strict):
    """Which devices one replica needs."""

    type: Text = declared(
        "Kind of accelerator, for example nvidia-h100. 'any' takes what the machine has.",
        "any",
        update="rolling",
        refused="any device of the kind that engine.device names is taken",
        honours=("any",),
    )
    count_per_replica: int = declared(
        "Devices of one replica.", 1, update="rolling", refused=_ONE_DEVICE, honours=(1,), ge=1, le=1024
    )


class Resources(Strict):
    """What one replica may take of the machine."""

    accelerator: Accelerator = section(Accelerator, "Which devices one replica needs.")
    cpu: int | None = declared(
        "Threads that one replica computes with. Left out: all cores of the machine for a replica on CPU.",
        None,
        update="rolling",
        ge=1,
        le=4096,
    )
    memory: Quantity | None = declared(
        "Host memory that one replica may hold for weights, activations and, on CPU, its cache. A replica that "
        "needs more is refused before it starts. Left out: bounded by engine.memory alone. Refused for a model "
        "that runs on a GPU, where nothing would keep the bound.",
        None,
        update="rolling",
    )


class Placement(Strict):
    """Where replicas run."""

    backend: Literal["local", "ray"] = declared(
        "'local' is this machine.",
        "local",
        update="immutable",
        refused="replicas run on this machine alone",
        honours=("local",),
    )
    device_ids: Annotated[
        tuple[Annotated[int, Field(ge=0, le=1023)], ...], Field(strict=False, max_length=1024)
    ] = declared(
        "Indices of the GPUs that may be used. Empty: any. With indices, engine.device auto means cuda.",
        (),
        update="rolling",
    )
    priority: int = declared(
        "Who comes first where room is short: replicas of a model of higher priority have it before others, start "
        "before others on a GPU, and are unloaded after others on demand. Nobody is ended for it who is always "
        "there.",
        0,
        update="hot",
        ge=-1000,
        le=1000,
    )


class AutoscalingTarget(Strict):
    """The load at which the number of replicas is right; of several measures the one counts that asks for most."""

    in_flight_per_replica: int | None = declared(
        "Requests running or waiting, per replica. Nothing declared at all: four fifths of batching.maxNumSeqs.",
        None,
        update="scale",
        ge=1,
        le=1_000_000,
    )
    kv_cache_usage: Percent | None = declared("Share of cache blocks in use.", None, update="scale")
    queue_time: Duration | None = declared("Time that requests wait before they start.", None, update="scale")


class Autoscaling(Strict):
    """A number of replicas that follows the load."""

    min_replicas: int = declared(
        "Fewest replicas; 0 lets the model stop when nobody asks. The first request brings it back, and waits for "
        "that as long as batching.maxQueueWait says.",
        1,
        update="scale",
        ge=0,
        le=1000,
    )
    max_replicas: int = declared("Most replicas.", update="scale", ge=1, le=1000)
    target: AutoscalingTarget = section(AutoscalingTarget, "The load at which the number of replicas is right.")
    scale_up_delay: Duration = declared(
        "How long the load must be high: replicas come as many as it called for all that time.",
        "0s",
        update="scale",
    )
    scale_down_delay: Duration = declared(
        "How long the load must be low: replicas go down to the most that it called for during that time.",
        "5m",
        update="scale",
    )
    idle_timeout: Duration | None = declared(
        "Time without a request after which the last replica stops, when minReplicas is 0. Left out: "
        "scaleDownDelay. A model that never was ready is not stopped.",
        None,
        update="scale",
    )


class CanaryStep(Strict):
    """One stage of a canary."""

    weight: int = declared("Percent of requests that go to the new revision.", update="hot", ge=0, le=100)
    hold: Duration | None = declared(
        "Time before the next step. Left out: none, the requests decide.", None, update="hot"
    )


class SmokePrompt(Strict):
    """A prompt whose answer is known."""

    prompt: str = declared(
        "What is asked, as a user's message; of a model without chat template, as the text that it goes on with.",
        update="hot",
        min_length=1,
        max_length=100_000,
    )
    expect_contains: str | None = declared(
        "What the answer must contain, letter by letter; the model's thoughts are part of it. Left out: it is "
        "asked for maxDrift alone.",
        None,
        update="hot",
        min_length=1,
        max_length=10_000,
    )
    max_tokens: int = declared("Longest answer in tokens.", 16, update="hot", ge=1, le=4096)


class CanaryAnalysis(Strict):
    """What the new revision must keep to."""

    min_requests: int = declared(
        "Requests of the new revision that a step needs before the next one begins.",
        200,
        update="hot",
        ge=1,
        le=1_000_000_000,
    )
    max_error_rate: Percent = declared(
        "Share of the new revision's requests that may fail; and how much larger its share of answers that are "
        "empty or cut may be than the stable one's.",
        "1%",
        update="hot",
    )
    max_ttft_p95_increase: Percent = declared(
        "How much longer the 95th percentile of the time to the first token may be.", "20%", update="hot"
    )
    max_itl_p95_increase: Percent = declared(
        "How much longer the 95th percentile of the time between tokens may be.", "20%", update="hot"
    )
    max_drift: Percent | None = declared(
        "How far the new revision may be from the stable one before it has any request, as a share of tokens: of "
        "those that it would write otherwise along the stable one's answers to the smoke prompts (to some of "
        "Quire's own where there are none), and of the divergence that belongs to it. Left out: not compared.",
        None,
        update="hot",
    )
    on_inconclusive: Literal["Hold", "Rollback", "Promote"] = declared(
        "What happens when a step's time is over and its requests were too few.", "Hold", update="hot"
    )
    smoke_prompts: Annotated[tuple[SmokePrompt, ...], Field(strict=False, max_length=100)] = declared(
        "Prompts that the new revision is asked, greedily, before it has any request. It is given up where an "
        "answer lacks what it must contain.",
        (),
        update="hot",
    )


class Canary(Strict):
    """A new revision that takes over step by step."""

    steps: Annotated[tuple[CanaryStep, ...], Field(strict=False)] = declared(
        "The stages, with rising weights. After the last one the new revision replaces the old one.",
        (),
        update="hot",
    )
    analysis: CanaryAnalysis = section(CanaryAnalysis, "What the new revision must keep to.")


class Rollout(Strict):
    """How a new revision replaces the old one."""

    strategy: Literal["Auto", "RollingUpdate", "Recreate", "Canary"] = declared(
        "'Auto' starts new replicas first while devices are free and stops old ones first when they are not; "
        "'RollingUpdate' keeps to maxSurge and maxUnavailable strictly; 'Recreate' stops all, then starts; "
        "'Canary' has the new revision serve a share of the requests beside the old one, step by step, and then "
        "replaces as 'Auto' does.",
        "Auto",
        update="hot",
    )
    max_surge: int = declared(
        "Replicas above the declared number during a rollout.", 1, update="hot", ge=0, le=1000
    )
    max_unavailable: int = declared(
        "Replicas below the declared number during a rollout.", 0, update="hot", ge=0, le=1000
    )
    min_ready_duration: Duration = declared(
        "How long a new replica must stay ready before it counts as available.", "0s", update="hot"
    )
    progress_deadline: Duration = declared(
        "Time without progress after which a rollout has failed: it is reported as stalled, and rolled back if "
        "autoRollback says so.",
        "20m",
        update="hot",
    )
    auto_rollback: bool = declared(
        "Go back to the last revision that was rolled out as a whole when a new one fails: its engine refuses "
        "its configuration, crashes too often (restartPolicy.maxRestartsBeforeRollback), or it makes no progress "
        "for progressDeadline. What failed is not started again until the manifest changes or "
        "`platform rollout retry`. Where this is false, a canary that fails is kept without requests until a "
        "person promotes or aborts it.",
        True,
        update="hot",
    )
    canary: Canary | None = section(Canary, "Steps and judgement of strategy Canary.", optional=True)


class StartupProbe(Strict):
    """When a starting replica counts as failed."""

    timeout: Duration = declared(
        "A replica that makes no progress for this long while it starts has failed; every byte of weights that "
        "is loaded is progress.",
        "10m",
        update="hot",
    )


class ReadinessProbe(Strict):
    """When a running replica gets no new requests."""

    period: Duration = declared("Time between two checks.", "2s", update="hot", refused=_STALL_CHECK)
    failure_threshold: int = declared(
        "Failed checks in a row.", 3, update="hot", refused=_STALL_CHECK, ge=1, le=1000
    )


class LivenessProbe(Strict):
    """When a running replica is replaced."""

    period: Duration = declared("Time between two checks.", "10s", update="hot", refused=_STALL_CHECK)
    timeout: Duration = declared(
        "A replica whose engine completes no step for this long, with requests to compute or asked for a sign of "
        "life, gets no more requests and is replaced. It must be longer than the longest step.",
        "30s",
        update="hot",
    )
    failure_threshold: int = declared(
        "Failed checks in a row.", 3, update="hot", refused=_STALL_CHECK, ge=1, le=1000
    )


class BreakerProbe(Strict):
    """When a replica that fails its requests gets no more, and is tried again. Of one request at a time."""

    consecutive_failures: int = declared(
        "So many failures in a row: errors that are the engine's, connections that break, stalls.",
        5,
        update="hot",
        ge=1,
        le=1_000_000,
    )
    error_share: Percent = declared(
        "The share of requests that fail, of those that end within window, if they are minRequests or more.",
        "50%",
        update="hot",
    )
    window: Duration = declared("The time in which requests are counted for errorShare.", "30s", update="hot")
    min_requests: int = declared("How few requests errorShare says nothing of.", 20, update="hot", ge=1, le=4096)
    open_for: Duration = declared(
        "How long it gets no requests before one tries it; twice as long each further time.", "5s", update="hot"
    )
    max_open_for: Duration = declared("The longest of these times.", "5m", update="hot")
    max_ejected: Percent = declared(
        "The share of the model's replicas that get no requests for this at the same time, at least one. When all "
        "fail, none does, and requests are refused at once.",
        "50%",
        update="hot",
    )


class Probes(Strict):
    """How the health of replicas is judged."""

    startup: StartupProbe = section(StartupProbe, "When a starting replica counts as failed.")
    readiness: ReadinessProbe | None = section(
        ReadinessProbe, "When a running replica gets no new requests.", refused=_STALL_CHECK, optional=True
    )
    liveness: LivenessProbe = section(LivenessProbe, "When a running replica is replaced.")
    breaker: BreakerProbe = section(BreakerProbe, "When a replica that fails its requests gets no more.")


class RestartPolicy(Strict):
    """How soon a replica that crashed is started again."""

    backoff_base: Duration = declared(
        "Wait after the first crash; it doubles with each further one.", "1s", update="hot"
    )
    backoff_max: Duration = declared("Longest wait.", "5m", update="hot")
    max_restarts_before_rollback: int | None = declared(
        "Crashes of one replica of a new revision after which it has failed (see rollout.autoRollback). "
        "Left out: 3.",
        None,
        update="hot",
        ge=1,
        le=1000,
    )


class EnvVar(Strict):
    """One environment variable of the engine process."""

    name: EnvName = declared("Name of the variable.", update="rolling")
    value: Annotated[Text, Field(max_length=4096)] | None = declared("Its value.", None, update="rolling")
    value_from: SecretReference | None = section(
        SecretReference, "Take the value from a secret.", refused=_NO_SECRETS, optional=True
    )
    restart_on_change: bool = declared(
        "Roll the model out again when the secret changes.",
        False,
        update="rolling",
        refused=_NO_SECRETS,
        honours=(False,),
    )


class Prices(Strict):
    """What requests cost, for budgets of AccessPolicies and for usage figures: money for a million tokens, in
    quotes. All Models have theirs in the same money."""

    input: Money = declared("For a million tokens of prompts.", "0", update="hot")
    cached_input: Money | None = declared(
        "For a million tokens of prompts that were found in the cache. Left out: as input.", None, update="hot"
    )
    output: Money = declared("For a million tokens of answers.", "0", update="hot")


class ModelSpec(Strict):
    """All that is declared about one served model."""

    source: Source = declared(
        "Where the checkpoint is: builtin://tiny (ships with the platform), file:///absolute/path (a folder in "
        "Hugging Face format), or hf://organisation/name (a Hugging Face repository: downloaded into the Hugging "
        "Face cache if it is not there, and verified by its digests).",
        update="rolling",
    )
    revision: Text | None = declared(
        "Branch, tag or commit of an hf:// source. It is resolved to a commit once, by the cache if it has that "
        "revision and else by the hub, and recorded: a branch that moves later changes nothing that runs. "
        "Left out: main.",
        None,
        update="rolling",
        min_length=1,
        max_length=256,
    )
    source_auth: SecretReference | None = section(
        SecretReference,
        "Token for the hub of an hf:// source, by reference. Left out: HF_TOKEN of the control plane's "
        "environment, else the token that `hf auth login` saved.",
        optional=True,
    )
    tokenizer: Tokenizer = section(Tokenizer, "Which tokenizer and chat template stand before the model.")
    trust_remote_code: bool = declared(
        "Run Python code that comes with the checkpoint.",
        False,
        update="rolling",
        refused="no code from a checkpoint is ever run",
        honours=(False,),
    )
    served_model_names: Annotated[tuple[ServedName, ...], Field(strict=False, max_length=64)] = declared(
        "Model names that requests may ask for. Left out: metadata.name. No two models may claim one name.",
        (),
        update="hot",
    )
    engine: Engine = section(Engine, "How one replica computes.")
    parallelism: Parallelism = section(Parallelism, "How one replica is spread over devices.")
    quantization: Quantization = section(
        Quantization, "Number format of the weights, where it is not that of the checkpoint."
    )
    batching: Batching = section(
        Batching, "What the scheduler puts into one step, and how long requests may queue for it."
    )
    speculative: Speculative | None = section(
        Speculative,
        "Guessing tokens with a cheaper model and checking them all at once.",
        refused=_NO_SPECULATION,
        optional=True,
    )
    lora: Lora | None = section(Lora, "Low-rank adapters on top of the model. On CPUs alone.", optional=True)
    parsers: Parsers | None = section(
        Parsers, "How tool calls and reasoning are read out of the text.", optional=True
    )
    determinism: Literal["none", "batchInvariant"] = declared(
        "'batchInvariant': a sequence gets the same numbers, bit by bit, whatever else runs in its steps; each "
        "engine finds out at its start, and refuses to serve if it is not so. On CPUs alone.",
        "none",
        update="rolling",
    )
    resources: Resources = section(Resources, "What one replica may take of the machine.")
    placement: Placement = section(Placement, "Where replicas run.")
    residency: Literal["always", "onDemand"] = declared(
        "'always' keeps the replicas running; 'onDemand' loads the model when a request for it comes, which waits "
        "for that as long as batching.maxQueueWait says, and unloads it when another model needs the room: the "
        "least recently used first, and one in use only after ten seconds; its requests then have drainTimeout.",
        "always",
        update="scale",
    )
    replicas: int | None = declared(
        "How many replicas run; 0 stops the model. Left out: 1. Not together with autoscaling.",
        None,
        update="scale",
        ge=0,
        le=1000,
    )
    autoscaling: Autoscaling | None = section(
        Autoscaling,
        "A number of replicas that follows the load; not together with replicas. platform scale puts another "
        "number in its place.",
        optional=True,
    )
    rollout: Rollout = section(Rollout, "How a new revision replaces the old one.")
    drain_timeout: Duration = declared(
        "How long a replica that is to stop may finish the requests it runs; after that they end in an error.",
        "30s",
        update="hot",
    )
    max_migrations: int = declared(
        "How often a stream whose engine died or stands still goes on at another replica of the same revision, "
        "behind what its client has of it; 0: it ends in an error. Nothing is sent twice. With temperature 0 or a "
        "seed the text is that of an undisturbed stream where determinism is batchInvariant, else as near as two "
        "engines are.",
        0,
        update="hot",
        ge=0,
        le=100,
    )
    prices: Prices | None = section(Prices, "What requests cost.", optional=True)
    probes: Probes = section(Probes, "How the health of replicas is judged.")
    restart_policy: RestartPolicy = section(RestartPolicy, "How soon a crashed replica is started again.")
    revision_history_limit: int = declared("Old revisions that stay on record.", 10, update="hot", ge=0, le=1000)
    env: Annotated[tuple[EnvVar, ...], Field(strict=False, max_length=256)] = declared(
        "Environment variables of the engine process, by name. Of those that begin with QUIRE_ only "
        "QUIRE_SCHEDULE_TRACE may be given: the absolute path of a file to record the schedule to.",
        (),
        update="rolling",
    )


class Model(Resource):
    """One served model."""

    kind: Literal["Model"] = declared("Which kind of object this is.", update="immutable")
    spec: ModelSpec = Field(
        ...,
        description="All that is declared about the model.",
        json_schema_extra={"x-quire-update": "immutable", "x-quire-support": "honoured"},
    )


def resolve_defaults(model: Model) -> dict[str, Any]:
    """The spec with every default filled in, as plain camelCase values: `resolved["engine"]["maxModelLen"]`.

    Optional sections and values that stay without one are None. `servedModelNames` and `replicas` are filled
    (the latter stays None under autoscaling), `auto` values are kept, and `defaultsVersion` says whose
    defaults these are. Pure: the same Model gives the same dict.
    """
    resolved = model.spec.model_dump(mode="json", by_alias=True)
    resolved["servedModelNames"] = resolved["servedModelNames"] or [model.metadata.name]
    if resolved["replicas"] is None and resolved["autoscaling"] is None:
        resolved["replicas"] = 1
    resolved["defaultsVersion"] = DEFAULTS_VERSION
    return resolved


def prefill_share(declared: int | Literal["auto"] | None, device: Literal["cpu", "cuda"]) -> int | None:
    """What `batching.maxPrefillTokens` is on a device. None: as many as there is room for, as revisions have that
    are older than the field."""
    if declared != "auto":
        return declared
    return _CPU_PREFILL_TOKENS if device == "cpu" else None


def runs_ahead(declared: bool | Literal["auto"], device: Literal["cpu", "cuda"]) -> bool:
    """What `batching.asyncScheduling` is on a device: a GPU does nothing while its host plans."""
    return device == "cuda" if declared == "auto" else declared
