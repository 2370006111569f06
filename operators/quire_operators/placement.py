"""What `auto` becomes: one model's resolved spec, checkpoint and machine in, an engine's exact figures out.

Pure. `plan` prints what `place` says, `apply` freezes it into the revision, and the reconciler writes it into
the `EngineSpec` of every replica: nothing is worked out twice. A spec is refused (`TooLarge`, `NoDevice`) only
if it could not run on this machine even with all of Quire's other replicas gone; if it merely does not fit
beside them now, it is accepted and waits, and `fits_now` says so.

Exceptions:

    PlacementError         has path of the field, reason (a word of `status.Reason`), message and hint
    ├── NoDevice           the kind of device that is asked for is not there
    ├── NoSuchBound        a bound was declared that nothing would keep on this device
    ├── NoSuchPromise      the same numbers in any company were asked for where no kernels keep to it
    ├── NoSuchAdapters     adapters were declared for a device whose products nothing is added to
    ├── NoSuchNumbers      a quantization or a cache that the checkpoint, the dtype or the device cannot have
    ├── TooLong            more context is asked for than the checkpoint has positions
    └── TooLarge           weights, activations and cache do not fit; `fit` is the report with counter-offers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import msgspec

from quire_operators.devices import Inventory
from quire_operators.nvml import OLDEST
from quire_schemas import wire
from quire_schemas.adapters import AdapterProfile
from quire_schemas.checkpoint import ModelProfile
from quire_schemas.model import prefill_share, runs_ahead
from quire_schemas.quantities import format_bytes, parse_duration, parse_percent, parse_quantity
from quire_schemas.quantization import Unquantizable
from quire_schemas.quantization import resolve as resolve_quantization
from quire_schemas.sizing import FitReport, SizingRequest, fit, kv_misfit
from quire_schemas.update import EngineLimits

FOREIGN_BYTES = 64 << 20
"""What others hold of a GPU is worth a word from here on: less than a CUDA context, and it is no process."""


class PlacementError(Exception):
    """The spec cannot run on this machine."""

    def __init__(
        self, reason: str, message: str, hint: str, report: FitReport | None = None, path: str = "spec.engine"
    ) -> None:
        super().__init__(message)
        self.path = path
        self.reason = reason
        self.message = message
        self.hint = hint
        self.fit = report


class NoDevice(PlacementError):
    """There is no device of the kind that is asked for."""


class NoSuchBound(PlacementError):
    """A bound that this kind of device has nothing to keep it with."""


class NoSuchPromise(PlacementError):
    """Batch-invariant numbers on a kind of device whose kernels do not give them."""


class NoSuchAdapters(PlacementError):
    """Adapters on a kind of device whose products nothing is added to."""


class NoSuchNumbers(PlacementError):
    """A quantization or a cache that the checkpoint, the dtype or the device cannot have."""


class TooLong(PlacementError):
    """More context than the checkpoint has positions, whatever the machine."""


class TooLarge(PlacementError):
    """It does not fit, whatever else runs."""


@dataclass(frozen=True, slots=True)
class Placement:
    """All that an engine of one revision is told besides its identity and its hot values. Sizes are bytes.

    `max_num_seqs` and `max_num_batched_tokens` are the bounds that the engine allocates for.
    """

    model_dir: str
    tokenizer_dir: str
    chat_template_file: str | None
    commit: str | None
    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16", "float16"]
    kv_dtype: wire.KvDtype
    threads: int
    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    memory: int
    weights: int
    kv: int
    seed: int
    template: str
    """`update.template_hash` of the spec this was made for, without the bounds."""
    kv_tokens: int
    """Of the longest sequence that the KV cache holds."""
    runner: wire.RunnerKind = "model"
    step_time: float = 0.0
    spare_core: bool = False
    quantization: wire.Quantization | None = None
    async_scheduling: bool = False
    enforce_eager: bool = False
    chat_template: str | None = None
    """What `chat_template_file` held when this was made. None: there is no such file, or it was made by a version
    that did not keep it."""
    adapters: tuple[wire.Adapter, ...] = ()

    def limits(self) -> EngineLimits:
        """The bounds below which hot values may move."""
        return EngineLimits(self.max_num_seqs, self.max_num_batched_tokens, self.max_model_len)

    def as_dict(self) -> dict[str, Any]:
        structs = {name: msgspec.to_builtins(getattr(self, name)) for name in ("quantization", "adapters")}
        return {**asdict(self), **structs}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Placement:
        # what was stored before layers had groups has one
        fields = {"kv_tokens": document["num_blocks"] * document["block_size"], **document}
        quantization = msgspec.convert(fields.get("quantization"), wire.Quantization | None)
        adapters = msgspec.convert(fields.get("adapters", ()), tuple[wire.Adapter, ...])
        return cls(**fields | {"quantization": quantization, "adapters": adapters})

    def resolved(self, declared: Mapping[str, Any]) -> dict[str, Any]:
        """What `auto` became, for `status.resolved`; hot values are those of the resolved spec `declared`."""
        batching = declared["batching"]
        prefill = prefill_share(batching.get("maxPrefillTokens"), self.device)
        shown: dict[str, Any] = {
            "device": self.device,
            "dtype": self.dtype,
            "kvDtype": self.kv_dtype,
            "maxModelLen": self.max_model_len,
            "kvCacheSize": self.kv,
            "kvTokensPerReplica": self.kv_tokens,
            "threads": self.threads,
            "asyncScheduling": self.async_scheduling,
            "maxPrefillTokens": batching["maxNumBatchedTokens"] if prefill is None else prefill,
            "memoryPerReplica": self.memory,
            "modelDir": self.model_dir,
        }
        if self.runner != "model":
            shown["runner"] = self.runner
        if self.quantization is not None:
            shown["quantization"] = str(self.quantization)
        if self.commit is not None:
            shown["commit"] = self.commit
        if self.adapters:
            shown["adapters"] = {each.name: each.digest for each in self.adapters}
        return shown

    def engine_spec(
        self,
        model: str,
        replica_id: str,
        incarnation: int,
        socket: str,
        resolved: Mapping[str, Any],
        hot_hash: str,
        *,
        adoption_window: float,
    ) -> wire.EngineSpec:
        """The spec of one engine. Hot values are those declared in `resolved`, which `hot_hash` stands for: a new
        incarnation begins where a running one was moved to. Blocks and the memory limit are those of the bounds,
        so that hot values can move up to them again.
        """
        batching = resolved["batching"]
        return wire.EngineSpec(
            model=model,
            replica_id=replica_id,
            incarnation=incarnation,
            socket=socket,
            model_dir=self.model_dir,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            device=self.device,
            threads=self.threads,
            spare_core=self.spare_core,
            max_model_len=self.max_model_len,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            max_num_seqs=batching["maxNumSeqs"],
            max_num_batched_tokens=batching["maxNumBatchedTokens"],
            chunked_prefill=batching["chunkedPrefill"],
            policy=batching["policy"],
            max_waiting=batching["maxQueueLength"],
            max_prefill_tokens=prefill_share(batching.get("maxPrefillTokens"), self.device),
            prefix_caching=batching["prefixCaching"],
            # placements from before it could be auto leave it to what was declared
            async_scheduling=self.async_scheduling or batching.get("asyncScheduling") is True,
            enforce_eager=self.enforce_eager,
            batch_invariant=resolved.get("determinism") == "batchInvariant",
            seed=self.seed,
            memory_limit=self.memory,
            hot_hash=hot_hash,
            adoption_window=adoption_window,
            runner=self.runner,
            step_time=self.step_time,
            quantization=self.quantization,
            adapters=self.adapters,
        )


@dataclass(frozen=True, slots=True)
class Placed:
    """A placement with its arithmetic. `fits_now` is false when it has to wait for others to leave."""

    placement: Placement
    fit: FitReport
    fits_now: bool
    notes: tuple[str, ...]


def place(
    resolved: Mapping[str, Any],
    profile: ModelProfile,
    folders: tuple[str, str],
    commit: str | None,
    inventory: Inventory,
    own: Mapping[str, int],
    everyone: Mapping[str, int],
    template: str,
    chat_template: str | None = None,
    adapters: Sequence[tuple[wire.Adapter, AdapterProfile]] = (),
) -> Placed:
    """Resolve every `auto` of one spec. Raises `PlacementError`.

    `folders` are those of the model and of the tokenizer, `chat_template` is what the declared file holds,
    `adapters` what the declared folders do. `own`
    and `everyone` are bytes held on each device by this model's replicas (which its rollout replaces) and by all
    of Quire's.
    """
    engine = resolved["engine"]
    device_ids = resolved["placement"]["deviceIds"]
    runner: wire.RunnerKind = engine["runner"]
    kind = "cpu" if runner == "scripted" else _kind(engine["device"], device_ids, inventory)
    host_limit = resolved["resources"]["memory"]
    if host_limit is not None and kind == "cuda":
        raise NoSuchBound(
            "ConfigRejected",
            f"spec.resources.memory {host_limit} bounds host memory, and this model runs on a GPU, where no such "
            "bound is kept",
            "remove it; on a GPU spec.engine.memory bounds a replica. Or declare spec.engine.device: cpu",
            path="spec.resources.memory",
        )
    if resolved.get("determinism") == "batchInvariant" and kind == "cuda":
        raise NoSuchPromise(
            "ConfigRejected",
            "batchInvariant is kept on CPUs alone, and this model runs on a GPU, where products and attention are "
            "cut by how many sequences a step has",
            "declare spec.engine.device: cpu, or determinism: none",
            path="spec.determinism",
        )
    if adapters and kind == "cuda":
        raise NoSuchAdapters(
            "ConfigRejected",
            "adapters are added on CPUs alone, and this model runs on a GPU",
            "declare spec.engine.device: cpu, or serve a checkpoint that the adapter is merged into",
            path="spec.lora.adapters",
        )
    name = "cpu" if kind == "cpu" else _gpu(inventory, device_ids, own)
    total = inventory.usable(name)
    free = inventory.available if kind == "cpu" else _available(inventory, name)
    dtype = profile.dtype if engine["dtype"] == "auto" else engine["dtype"]
    cache = engine["kvCache"]
    request = SizingRequest(
        dtype=dtype,
        kv_dtype=dtype if cache["dtype"] == "auto" else cache["dtype"],
        block_size=cache["blockSize"],
        max_num_seqs=resolved["batching"]["maxNumSeqs"],
        max_num_batched_tokens=resolved["batching"]["maxNumBatchedTokens"],
        device=kind,
        device_bytes_total=total,
        device_bytes_available=min(total, free + own.get(name, 0)),
        memory_share=parse_percent(engine["memory"]),
        max_model_len=None if engine["maxModelLen"] == "auto" else engine["maxModelLen"],
        kv_size=None if cache["size"] == "auto" else parse_quantity(cache["size"]),
        memory_limit=parse_quantity(host_limit) if host_limit is not None else None,
        device_name=_device_name(inventory, name),
        chunked_prefill=resolved["batching"]["chunkedPrefill"],
        runner=runner,
        quantization=_quantization(resolved["quantization"], profile, dtype, kind),
        enforce_eager=engine["enforceEager"],
        adapters=tuple(profile for _, profile in adapters),
    )
    if problem := kv_misfit(profile, request.kv_dtype, kind):
        unfit = kv_misfit(profile, "int8", kind)
        raise NoSuchNumbers(
            "ConfigRejected",
            problem,
            f"declare kvCache.dtype: {'auto' if unfit else 'int8, auto'}, or a float type",
            path="spec.engine.kvCache.dtype",
        )
    longest = profile.max_position_embeddings
    if request.max_model_len is not None and request.max_model_len > longest:
        raise TooLong(
            "ConfigRejected",
            f"{request.max_model_len:,} is above the checkpoint's {longest:,} positions",
            f"set it to {longest} or less, or to auto for the most that fits",
            path="spec.engine.maxModelLen",
        )
    report = fit(profile, request)
    fits_now = report.fits
    notes: list[str] = []
    if not report.fits:
        freed = min(total, free + everyone.get(name, 0))
        later = fit(profile, replace(request, device_bytes_available=freed))
        if not later.fits:
            offers = "; ".join(str(offer) for offer in later.counter_offers)
            raise TooLarge(
                "InsufficientMemory",
                f"does not fit on {request.device_name}: {later.reason}",
                f"any one of these fits: {offers}" if offers else "use a machine with more memory",
                later,
            )
        report = later
        notes.append(
            f"does not fit beside what other models hold now ({format_bytes(everyone.get(name, 0))}); "
            "it starts when they have left"
        )
    neighbours = inventory.foreign(name, everyone.get(name, 0))
    if neighbours >= FOREIGN_BYTES:
        notes.append(
            f"processes that are none of Quire's hold {format_bytes(neighbours)} of {request.device_name}"
        )
    threads = resolved["resources"]["cpu"] or inventory.cores
    if threads > inventory.cores:
        notes.append(f"spec.resources.cpu {threads} is more than this machine's {inventory.cores} physical cores")
    return Placed(
        Placement(
            model_dir=folders[0],
            tokenizer_dir=folders[1],
            chat_template_file=resolved["tokenizer"]["chatTemplateFile"],
            commit=commit,
            device=kind,
            dtype=_float(report.request.dtype),
            kv_dtype=_kv_dtype(report.request.kv_dtype),
            threads=threads,
            spare_core=threads < inventory.cores,
            max_model_len=report.max_model_len,
            block_size=report.request.block_size,
            num_blocks=report.num_blocks,
            max_num_seqs=report.request.max_num_seqs,
            max_num_batched_tokens=report.request.max_num_batched_tokens,
            memory=report.used,
            weights=report.weights,
            kv=report.kv,
            seed=engine["seed"],
            template=template,
            kv_tokens=report.kv_tokens,
            runner=runner,
            step_time=parse_duration(engine.get("stepTime") or "0s"),
            quantization=request.quantization,
            async_scheduling=runs_ahead(resolved["batching"]["asyncScheduling"], kind),
            enforce_eager=engine["enforceEager"],
            chat_template=chat_template,
            adapters=tuple(adapter for adapter, _ in adapters),
        ),
        report,
        fits_now,
        tuple(notes),
    )


def _quantization(
    declared: Mapping[str, Any], profile: ModelProfile, dtype: str, kind: Literal["cpu", "cuda"]
) -> wire.Quantization | None:
    try:
        return resolve_quantization(declared, profile, dtype=dtype, device=kind)
    except Unquantizable as found:
        raise NoSuchNumbers(
            "ConfigRejected", found.message, found.hint, path=f"spec.quantization.{found.field}"
        ) from found


def _kind(asked: str, device_ids: Sequence[int], inventory: Inventory) -> Literal["cpu", "cuda"]:
    """Who names GPUs asks for one: `auto` with device ids is cuda."""
    if asked == "cuda" and not inventory.gpus:
        raise NoDevice(
            "InsufficientDevices",
            "cuda is asked for, and this machine has no GPU that NVML reports",
            "use spec.engine.device: cpu or auto, or check the GPU's driver with nvidia-smi",
            path="spec.engine.device",
        )
    if asked == "auto" and device_ids and not inventory.gpus:
        raise NoDevice(
            "InsufficientDevices",
            f"{list(device_ids)} names GPUs, and this machine has none that NVML reports",
            "remove spec.placement.deviceIds to run on the CPU, or check the GPU's driver with nvidia-smi",
            path="spec.placement.deviceIds",
        )
    return "cuda" if asked == "cuda" or (asked == "auto" and inventory.gpus) else "cpu"


def _gpu(inventory: Inventory, device_ids: list[int], own: Mapping[str, int]) -> str:
    """The allowed GPU with the most room for this model."""
    allowed = [gpu for gpu in inventory.gpus if not device_ids or gpu.index in device_ids]
    if not allowed:
        there = ", ".join(str(gpu.index) for gpu in inventory.gpus)
        raise NoDevice(
            "InsufficientDevices",
            f"none of spec.placement.deviceIds {device_ids} is on this machine",
            f"its GPUs are: {there}",
            path="spec.placement.deviceIds",
        )
    serving = [gpu for gpu in allowed if not gpu.too_old]
    if not serving:
        old = ", ".join(
            f"{gpu.name} (GPU {gpu.index}, {gpu.capability[0]}.{gpu.capability[1]})"
            for gpu in allowed
            if gpu.capability is not None
        )
        raise NoDevice(
            "InsufficientDevices",
            f"the kernels need compute capability {OLDEST[0]}.{OLDEST[1]} or later, and older is {old}",
            "use an Ampere card or a newer one (A10, L4, RTX 30 and later), or declare spec.engine.device: cpu",
            path="spec.engine.device",
        )
    best = max(serving, key=lambda gpu: gpu.available + own.get(f"cuda:{gpu.index}", 0))
    return f"cuda:{best.index}"


def _available(inventory: Inventory, name: str) -> int:
    return next(gpu.available for gpu in inventory.gpus if f"cuda:{gpu.index}" == name)


def _device_name(inventory: Inventory, name: str) -> str:
    if name == "cpu":
        return "this machine's memory"
    gpu = next(gpu for gpu in inventory.gpus if f"cuda:{gpu.index}" == name)
    return f"{gpu.name} (GPU {gpu.index})"


def _kv_dtype(name: str) -> wire.KvDtype:
    match name:
        case "int8" | "fp8":
            return name
    return _float(name)


def _float(name: str) -> Literal["float32", "bfloat16", "float16"]:
    match name:
        case "float32" | "bfloat16" | "float16":
            return name
    raise ValueError(f"{name} is no float type of an engine")
