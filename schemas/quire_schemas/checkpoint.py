"""What a checkpoint folder holds, from its `config.json` and its safetensors headers alone: no weight is read.

`config.json` is read by one Pydantic class per supported architecture; the defaults are those of transformers,
whose files leave out every key that equals its default. What would change the numbers and is not supported is
refused by name: other activations, partly rotated heads, rope variants, tokens that see later ones, code in the
folder, weights quantised in another way than is read here (`fp8`, and MXFP4 of gpt-oss).

How files are read, and all that can be wrong with them, is in `checkpoint_files`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quire_schemas import fp8, mxfp4
from quire_schemas.checkpoint_files import (
    MissingFile,
    TensorInfo,
    UnsupportedArchitecture,
    UnsupportedFeature,
    WrongTensors,
    invalid,
    read_json,
    read_tensors,
)

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The number formats an engine computes in, and their size."""

_WEIGHT_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


LayerKind = Literal["full", "sliding"]
Activation = Literal["silu", "gelu"]
"""Of the gate of an MLP; `gelu` is approximated by tanh."""


@dataclass(frozen=True, slots=True)
class ExpertsProfile:
    """Layers whose MLP is several, of which a router chooses some for each token."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    """Of each expert."""
    norm_topk_prob: bool
    """Whether the shares of the chosen ones are made to sum to one."""
    layers: tuple[bool, ...]
    """Of each layer of the model, whether it is one."""
    block: str
    """What the checkpoint calls it within a layer."""
    projections: tuple[str, str, str]
    """Its names for gate, up and down."""
    router_name: str = "gate"
    turned: bool = False
    """All of a layer lie in one tensor for gate and up, in turns, and one for down, both with inputs before
    outputs; they have biases, and so has the router."""
    packed: bool = False
    """These two are stored in MXFP4, with outputs before inputs: `_blocks`, a byte for two numbers of a row, and
    `_scales`, one for the power of two of every 32."""
    clamp: tuple[float, float] | None = None
    """Alpha and limit of a gate that is clamped (`quire_kernels.Clamp`); None is silu."""

    def router(self, layer: int) -> str:
        """The name of a layer's router, without `.weight`."""
        return f"model.layers.{layer}.{self.block}.{self.router_name}"

    def expert(self, layer: int, number: int) -> str:
        """The name that the projections of an expert begin with."""
        return f"model.layers.{layer}.{self.block}.experts.{number}"


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """All that planning and loading need to know of a checkpoint. Sizes count numbers unless named bytes."""

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    """The checkpoint's own: a key of `DTYPE_BYTES`."""
    rope_parameters: Mapping[str, Any] = field(hash=False)
    """`rope_type` and `rope_theta`, and what that type needs, every default filled in."""
    rms_norm_eps: float
    qk_norm: bool
    """RMS norm over each head of queries and keys."""
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    layer_kinds: tuple[LayerKind, ...]
    eos_token_ids: tuple[int, ...]
    weight_bytes: int = 0
    """Bytes of the weights as the checkpoint stores them."""
    experts: ExpertsProfile | None = None
    activation: Activation = "silu"
    norms_add_one: bool = False
    """Norms multiply by 1 + their weight. The sum is float32, and so is what an engine keeps."""
    post_norms: bool = False
    """What attention and MLP give is normed, too, before it is added to the residual."""
    embedding_scale: float | None = None
    """What embeddings are multiplied by, in the number format that the engine computes in."""
    query_scalar: float | None = None
    """Products of queries and keys are divided by its root; None is the head size."""
    attention_softcap: float | None = None
    """c makes c · tanh(s / c) of such a product s."""
    logit_softcap: float | None = None
    """The same of logits."""
    sinks: bool = False
    """Each head has a number that joins what its softmaxes divide by."""
    sliding_rope: Mapping[str, Any] | None = field(default=None, hash=False)
    """As `rope_parameters`, of sliding layers, where theirs are others."""
    fp8: fp8.Fp8Profile | None = None
    """Which weights are stored in fp8, if any are."""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)
    """config.json as it stands."""

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together; the values have the same."""
        return self.num_kv_heads * self.head_dim

    @property
    def attention_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return float((self.query_scalar or self.head_dim) ** -0.5)

    @property
    def num_ropes(self) -> int:
        """How many sets of angles a step has."""
        return 1 if self.sliding_rope is None else 2

    @property
    def num_parameters(self) -> int:
        """Numbers that the engine holds; a tied head counts once."""
        return sum(math.prod(shape) for _, shape in expected_tensors(self))


# ── config.json ───────────────────────────────────────────────────────────────────────────────────────────

Count = Annotated[int, Field(gt=0, le=2**31 - 1)]
TokenIds = int | list[int] | None


class _DecoderConfig(BaseModel):
    """Keys that every decoder of the family shares. Keys without effect on the numbers are not declared."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)
    qk_norm: ClassVar[bool] = False
    stored_as: ClassVar[tuple[str, ...]] = ("fp8",)
    """Methods of `quantization_config` that are read."""
    activation_key: ClassVar[str] = "hidden_act"
    activations: ClassVar[Mapping[str, Activation]] = {"silu": "silu"}
    """What the key may say."""

    vocab_size: Count
    hidden_size: Count = 4096
    intermediate_size: Count
    num_hidden_layers: Annotated[int, Field(gt=0, le=4096)] = 32
    num_attention_heads: Count = 32
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    hidden_act: str = "silu"
    max_position_embeddings: Count
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: Count | None = None
    eos_token_id: TokenIds = None
    dtype: str | None = None
    torch_dtype: str | None = None

    def biases(self) -> tuple[bool, bool, bool]:
        """Whether the q/k/v, the attention output and the MLP projections add a bias."""
        return False, False, False

    def windows(self) -> tuple[int | None, tuple[LayerKind, ...]]:
        """The sliding window, if any layer has one, and each layer's kind."""
        full: LayerKind = "full"
        return None, (full,) * self.num_hidden_layers

    def experts(self) -> ExpertsProfile | None:
        """What layers of experts are like, if there are any."""
        return None

    def ropes(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The rope parameters, and those of sliding layers where they are others, in one spelling: transformers 5
        nests them, older files have `rope_scaling` beside."""
        where = "rope_parameters" if self.rope_parameters is not None else "rope_scaling"
        given = self.rope_parameters or self.rope_scaling or {}
        if any(isinstance(value, dict) for value in given.values()):
            raise UnsupportedFeature(
                f"config.json: {where}: rope parameters per kind of layer are not supported for this architecture",
                "use a checkpoint with one set of rope parameters",
            )
        return _rope(self, given, where, self.rope_theta), None

    def extras(self) -> dict[str, Any]:
        """Fields of the profile that only some architectures have. Raises for what would change the numbers and is
        not supported."""
        return {}


class _Llama(_DecoderConfig):
    vocab_size: Count = 32_000
    intermediate_size: Count = 11_008
    max_position_embeddings: Count = 2048
    eos_token_id: TokenIds = 2
    attention_bias: bool = False
    mlp_bias: bool = False

    def biases(self) -> tuple[bool, bool, bool]:
        return self.attention_bias, self.attention_bias, self.mlp_bias


LayerTypes = list[Literal["full_attention", "sliding_attention"]]


class _OfKinds(Protocol):
    """A config whose layers may be of several kinds."""

    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def layer_types(self) -> LayerTypes | None: ...


def _windows(
    config: _OfKinds, window: int | None, slides: Callable[[int], bool]
) -> tuple[int | None, tuple[LayerKind, ...]]:
    """As of `_DecoderConfig.windows`; without `layer_types` a layer, by its number, `slides` or not."""
    if config.layer_types is not None:
        sliding = [kind == "sliding_attention" for kind in config.layer_types]
        if len(sliding) != config.num_hidden_layers:
            raise invalid("layer_types", f"has {len(sliding)} entries for {config.num_hidden_layers} layers")
    else:
        sliding = [slides(layer) for layer in range(config.num_hidden_layers)]
    if window is None and any(sliding):
        if config.layer_types is None:
            raise invalid(
                "sliding_window", "is null, and this architecture has sliding layers without layer_types"
            )
        raise invalid("layer_types", "names sliding layers, but no sliding window is in use")
    return (window if any(sliding) else None), tuple("sliding" if it else "full" for it in sliding)


class _Qwen2(_DecoderConfig):
    vocab_size: Count = 151_936
    intermediate_size: Count = 22_016
    num_key_value_heads: Count | None = 32
    max_position_embeddings: Count = 32_768
    use_sliding_window: bool = False
    sliding_window: Count | None = 4096
    max_window_layers: Annotated[int, Field(ge=0)] = 28
    layer_types: LayerTypes | None = None

    def biases(self) -> tuple[bool, bool, bool]:
        return True, False, False

    def windows(self) -> tuple[int | None, tuple[LayerKind, ...]]:
        window = self.sliding_window if self.use_sliding_window else None
        return _windows(self, window, lambda layer: window is not None and layer >= self.max_window_layers)


class _Qwen3(_Qwen2):
    qk_norm: ClassVar[bool] = True
    head_dim: Count | None = 128
    attention_bias: bool = False

    def biases(self) -> tuple[bool, bool, bool]:
        return self.attention_bias, self.attention_bias, False


class _Mistral(_DecoderConfig):
    vocab_size: Count = 32_000
    intermediate_size: Count = 14_336
    num_key_value_heads: Count | None = 8
    max_position_embeddings: Count = 131_072
    eos_token_id: TokenIds = 2
    sliding_window: Count | None = 4096
    layer_types: list[str] | None = None

    def windows(self) -> tuple[int | None, tuple[LayerKind, ...]]:
        if self.layer_types is not None and len(set(self.layer_types)) > 1:
            raise UnsupportedFeature(
                "config.json: layer_types: a Mistral with layers of several kinds is not supported",
                "checkpoints of the Ministral architectures need their own class; use a plain Mistral",
            )
        kind: LayerKind = "full" if self.sliding_window is None else "sliding"
        return self.sliding_window, (kind,) * self.num_hidden_layers


class _WithExperts(_DecoderConfig):
    """transformers writes `num_local_experts`; who publishes a checkpoint of the Qwen family has `num_experts`."""

    num_experts: Annotated[int, Field(ge=0)] | None = None
    num_local_experts: Annotated[int, Field(ge=0)] | None = None
    num_experts_per_tok: Count

    def count(self, default: int) -> int:
        """The number of experts."""
        local, count = self.num_local_experts, self.num_experts
        if None not in (local, count) and local != count:
            raise invalid("num_local_experts", f"{local}, but num_experts is {count}")
        count = local if count is None else count
        count = default if count is None else count
        if 0 < count < self.num_experts_per_tok:
            raise invalid("num_experts_per_tok", f"{self.num_experts_per_tok} of {count} experts")
        return count


class _Mixtral(_Mistral, _WithExperts):
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    rope_theta: float = 1_000_000.0
    sliding_window: Count | None = None
    num_experts_per_tok: Count = 2

    def experts(self) -> ExpertsProfile:
        count = self.count(8)
        if count == 0:
            raise invalid("num_local_experts", "is 0; every layer has experts")
        return ExpertsProfile(
            num_experts=count,
            num_experts_per_tok=self.num_experts_per_tok,
            intermediate_size=self.intermediate_size,
            norm_topk_prob=True,
            layers=(True,) * self.num_hidden_layers,
            block="block_sparse_moe",
            projections=("w1", "w3", "w2"),
        )


class _Qwen3Moe(_WithExperts):
    qk_norm: ClassVar[bool] = True
    vocab_size: Count = 151_936
    hidden_size: Count = 2048
    intermediate_size: Count = 6144
    num_hidden_layers: Annotated[int, Field(gt=0, le=4096)] = 24
    num_key_value_heads: Count | None = 4
    max_position_embeddings: Count = 32_768
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: Count | None = 4096
    decoder_sparse_step: Count = 1
    mlp_only_layers: list[int] | None = None
    moe_intermediate_size: Count = 768
    num_experts_per_tok: Count = 8
    norm_topk_prob: bool = False

    def biases(self) -> tuple[bool, bool, bool]:
        return self.attention_bias, self.attention_bias, False

    def windows(self) -> tuple[int | None, tuple[LayerKind, ...]]:
        window = self.sliding_window if self.use_sliding_window else None
        kind: LayerKind = "full" if window is None else "sliding"
        return window, (kind,) * self.num_hidden_layers

    def experts(self) -> ExpertsProfile | None:
        count, dense = self.count(128), set(self.mlp_only_layers or ())
        layers = tuple(
            count > 0 and layer not in dense and (layer + 1) % self.decoder_sparse_step == 0
            for layer in range(self.num_hidden_layers)
        )
        if not any(layers):
            return None
        return ExpertsProfile(
            num_experts=count,
            num_experts_per_tok=self.num_experts_per_tok,
            intermediate_size=self.moe_intermediate_size,
            norm_topk_prob=self.norm_topk_prob,
            layers=layers,
            block="mlp",
            projections=("gate_proj", "up_proj", "down_proj"),
        )


Positive = Annotated[float, Field(gt=0)]


class _Gemma2(_DecoderConfig):
    """Embeddings by the root of the width, norms around attention and MLP that multiply by 1 + their weight, soft
    caps, every other layer a sliding one."""

    activation_key: ClassVar[str] = "hidden_activation"
    activations: ClassVar[Mapping[str, Activation]] = {"gelu_pytorch_tanh": "gelu"}

    vocab_size: Count = 256_000
    hidden_size: Count = 2304
    intermediate_size: Count = 9216
    num_hidden_layers: Annotated[int, Field(gt=0, le=4096)] = 26
    num_attention_heads: Count = 8
    num_key_value_heads: Count | None = 4
    head_dim: Count | None = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: Count = 8192
    tie_word_embeddings: bool = True
    eos_token_id: TokenIds = 1
    attention_bias: bool = False
    query_pre_attn_scalar: Positive = 256
    sliding_window: Count | None = 4096
    layer_types: LayerTypes | None = None
    attn_logit_softcapping: Positive | None = 50.0
    final_logit_softcapping: Positive | None = 30.0
    use_bidirectional_attention: bool | None = None

    def biases(self) -> tuple[bool, bool, bool]:
        return self.attention_bias, self.attention_bias, False

    def windows(self) -> tuple[int | None, tuple[LayerKind, ...]]:
        return _windows(self, self.sliding_window, lambda layer: layer % 2 == 0)

    def extras(self) -> dict[str, Any]:
        if self.use_bidirectional_attention:
            raise UnsupportedFeature(
                "config.json: use_bidirectional_attention: true: tokens that see later ones are not supported by "
                "this version",
                "use a checkpoint that generates text: such a one is an encoder",
            )
        return {
            "norms_add_one": True,
            "post_norms": True,
            "embedding_scale": self.hidden_size**0.5,
            "query_scalar": float(self.query_pre_attn_scalar),
            "attention_softcap": self.attn_logit_softcapping,
            "logit_softcap": self.final_logit_softcapping,
        }


class _Gemma3(_Gemma2):
    """Norms of queries and keys in place of the cap on scores; five sliding layers to a full one, and rope
    parameters of their own for either."""

    qk_norm: ClassVar[bool] = True

    vocab_size: Count = 262_208
    max_position_embeddings: Count = 131_072
    rope_theta: float = 1_000_000.0
    rope_local_base_freq: float = 10_000.0
    sliding_window_pattern: Count = 6
    attn_logit_softcapping: Positive | None = None
    final_logit_softcapping: Positive | None = None

    def windows(self) -> tuple[int | None, tuple[LayerKind, ...]]:
        return _windows(self, self.sliding_window, lambda layer: (layer + 1) % self.sliding_window_pattern != 0)

    def ropes(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        given = self.rope_parameters or {}
        kinds = ("full_attention", "sliding_attention")
        for key, value in given.items():
            if key not in kinds or not isinstance(value, dict | None):
                raise invalid(
                    "rope_parameters", f"expected parameters for {' and '.join(kinds)}, got {key}: {value!r}"
                )
        full, sliding = ({"rope_type": "default"} if given.get(kind) is None else given[kind] for kind in kinds)
        where = [f"rope_parameters.{kind}" for kind in kinds]
        if self.rope_scaling is not None:
            where[0] = "rope_scaling" if not given else where[0]
            full = self.rope_scaling if not given else {**full, **self.rope_scaling}
        of_full = _rope(self, full, where[0], self.rope_theta)
        of_sliding = _rope(self, sliding, where[1], self.rope_local_base_freq)
        return of_full, None if of_sliding == of_full else of_sliding

    def extras(self) -> dict[str, Any]:
        if self.attn_logit_softcapping is not None:
            raise UnsupportedFeature(
                f"config.json: attn_logit_softcapping: {self.attn_logit_softcapping:g} is not supported by this "
                "version for this architecture, which transformers computes without it, too",
                "set it to null, if the model was trained without it, too",
            )
        return super().extras()


class _GptOss(_WithExperts):
    """Heads with sinks, every other layer a sliding one, experts with biases and a clamped gate, or in MXFP4."""

    stored_as: ClassVar[tuple[str, ...]] = ("mxfp4",)

    quantization_config: dict[str, Any] | None = None
    vocab_size: Count = 201_088
    hidden_size: Count = 2880
    intermediate_size: Count = 2880
    num_hidden_layers: Annotated[int, Field(gt=0, le=4096)] = 36
    num_attention_heads: Count = 64
    num_key_value_heads: Count | None = 8
    head_dim: Count | None = 64
    max_position_embeddings: Count = 131_072
    rms_norm_eps: Positive = 1e-5
    rope_theta: float = 150_000.0
    attention_bias: bool = True
    sliding_window: Count | None = 128
    layer_types: LayerTypes | None = None
    num_experts_per_tok: Count = 4
    swiglu_alpha: Positive = 1.702
    swiglu_limit: Positive = 7.0

    def biases(self) -> tuple[bool, bool, bool]:
        return self.attention_bias, self.attention_bias, False

    def windows(self) -> tuple[int | None, tuple[LayerKind, ...]]:
        return _windows(self, self.sliding_window, lambda layer: layer % 2 == 0)

    def ropes(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        if self.rope_parameters is None and self.rope_scaling is None:
            given = {
                "rope_type": "yarn",
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "truncate": False,
            }
            given |= {"beta_fast": 32.0, "beta_slow": 1.0}
            return _rope(self, given, "rope_parameters", self.rope_theta), None
        return super().ropes()

    def experts(self) -> ExpertsProfile:
        count = self.count(128)
        if count == 0:
            raise invalid("num_local_experts", "is 0; every layer has experts")
        layers = range(self.num_hidden_layers)
        packed = bool(self.quantization_config)
        if self.quantization_config:
            mxfp4.read_mxfp4(self.quantization_config, (f"model.layers.{layer}.mlp.experts" for layer in layers))
        for key in ("hidden_size", "intermediate_size") if packed else ():
            if getattr(self, key) % mxfp4.GROUP:
                raise invalid(
                    key, f"{getattr(self, key)} is no whole number of groups of {mxfp4.GROUP}, as mxfp4 needs"
                )
        return ExpertsProfile(
            num_experts=count,
            num_experts_per_tok=self.num_experts_per_tok,
            intermediate_size=self.intermediate_size,
            norm_topk_prob=True,
            layers=(True,) * self.num_hidden_layers,
            block="mlp",
            packed=packed,
            projections=("gate_up_proj", "gate_up_proj", "down_proj"),
            router_name="router",
            turned=True,
            clamp=(float(self.swiglu_alpha), float(self.swiglu_limit)),
        )

    def extras(self) -> dict[str, Any]:
        return {"sinks": True}


ARCHITECTURES: dict[str, type[_DecoderConfig]] = {
    "Gemma2ForCausalLM": _Gemma2,
    "Gemma3ForCausalLM": _Gemma3,
    "GptOssForCausalLM": _GptOss,
    "LlamaForCausalLM": _Llama,
    "MistralForCausalLM": _Mistral,
    "MixtralForCausalLM": _Mixtral,
    "Qwen2ForCausalLM": _Qwen2,
    "Qwen3ForCausalLM": _Qwen3,
    "Qwen3MoeForCausalLM": _Qwen3Moe,
}
"""What this version runs, by the name in config.json's `architectures`."""


_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_ROPE_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
}


def _rope(config: _DecoderConfig, given: Mapping[str, Any], where: str, theta: float) -> dict[str, Any]:
    """Rope parameters as they are `given` at `where`, every default filled in; `theta` is that of rope_theta."""
    rope_type = given.get("rope_type", given.get("type", "default"))
    if rope_type not in _ROPE_NEEDS:
        raise UnsupportedFeature(
            f"config.json: {where}: rope type {rope_type!r} is not supported by this version",
            f"supported rope types: {', '.join(_ROPE_NEEDS)}",
        )
    share = given.get("partial_rotary_factor", config.partial_rotary_factor)
    if share not in (None, 1, 1.0):
        raise UnsupportedFeature(
            f"config.json: partial_rotary_factor: {share}: partly rotated heads are not supported by this version",
            "use a checkpoint whose heads are rotated in full",
        )
    rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": given.get("rope_theta", theta)}
    for key in _ROPE_NEEDS[rope_type]:
        value = given.get(key)
        if value is None and key == "original_max_position_embeddings":
            value = config.original_max_position_embeddings or config.max_position_embeddings
        if value is None:
            raise invalid(f"{where}.{key}", f"is missing; rope type {rope_type} needs it")
        rope[key] = value
    for key in _ROPE_OPTIONAL.get(rope_type, ()):
        if given.get(key) is not None:
            rope[key] = given[key]
    for key, value in rope.items():
        if key != "rope_type" and (
            isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0
        ):
            raise invalid(f"{where}.{key}", f"expected a positive number, got {value!r}")
    if rope_type == "yarn":
        rope["truncate"] = given.get("truncate", True) is not False
    if rope_type == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise invalid(f"{where}.high_freq_factor", "must be above low_freq_factor")
    return rope


def _token_ids(value: TokenIds) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def profile_from_config(config: Mapping[str, Any]) -> ModelProfile:
    """The profile by `config.json` alone; `weight_bytes` is then what the architecture needs in that dtype.

    Raises `UnsupportedArchitecture`, `UnsupportedFeature` or `InvalidConfig`, naming the key.
    """
    names = config.get("architectures")
    supported = f"this version runs {', '.join(ARCHITECTURES)}"
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        found = "is missing" if names is None else f"should be a list with one name, not {names!r}"
        raise UnsupportedArchitecture(f"config.json: architectures: {found}", supported)
    if names[0] not in ARCHITECTURES:
        raise UnsupportedArchitecture(
            f"config.json: architectures: {names[0]} is not supported by this version", supported
        )
    stored = _in_fp8_as(config, names[0])
    if config.get("auto_map"):
        raise UnsupportedFeature(
            "config.json: auto_map: the checkpoint asks for Python code of its own, which is never run",
            f"use a checkpoint that a built-in architecture runs: {', '.join(ARCHITECTURES)}",
        )
    try:
        read = ARCHITECTURES[names[0]].model_validate(dict(config))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise invalid(".".join(map(str, first["loc"])), f"{first['msg']}, got {first['input']!r}") from error
    activation = str(getattr(read, read.activation_key))
    if activation not in read.activations:
        raise UnsupportedFeature(
            f"config.json: {read.activation_key}: {activation} is not supported by this version",
            f"{names[0]} is run with {', '.join(read.activations)} only",
        )
    dtype = read.dtype or read.torch_dtype or "float32"
    if dtype not in DTYPE_BYTES:
        raise UnsupportedFeature(
            f"config.json: dtype: {dtype} is not supported by this version", f"one of {', '.join(DTYPE_BYTES)}"
        )
    heads, kv_heads = read.num_attention_heads, read.num_key_value_heads or read.num_attention_heads
    if heads % kv_heads:
        raise invalid("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    if read.head_dim is None and read.hidden_size % heads:
        raise invalid("hidden_size", f"{read.hidden_size} is no multiple of num_attention_heads {heads}")
    head_dim = read.head_dim or read.hidden_size // heads
    if head_dim % 2:
        raise invalid("head_dim", f"{head_dim} is odd; rotary embedding needs an even size")
    window, kinds = read.windows()
    rope, sliding_rope = read.ropes()
    qkv_bias, output_bias, mlp_bias = read.biases()
    profile = ModelProfile(
        architecture=names[0],
        hidden_size=read.hidden_size,
        num_layers=read.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=read.intermediate_size,
        vocab_size=read.vocab_size,
        max_position_embeddings=read.max_position_embeddings,
        tie_word_embeddings=read.tie_word_embeddings,
        dtype=dtype,
        rope_parameters=rope,
        rms_norm_eps=read.rms_norm_eps,
        qk_norm=read.qk_norm,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        sliding_window=window,
        layer_kinds=kinds,
        eos_token_ids=_token_ids(read.eos_token_id),
        experts=read.experts(),
        activation=read.activations[activation],
        sliding_rope=sliding_rope,
        fp8=stored,
        raw=dict(config),
        **read.extras(),
    )
    return replace(profile, weight_bytes=sum(_stored_bytes(profile)))


def _in_fp8_as(config: Mapping[str, Any], architecture: str) -> fp8.Fp8Profile | None:
    """What is stored in fp8, if anything is. Raises for what `quantization_config` says and is not read."""
    quantised = config.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
    stored_as = ARCHITECTURES[architecture].stored_as
    if method == "mxfp4" and method in stored_as:
        return None
    found = fp8.read_fp8(config)
    if found is not None and method not in stored_as:
        raise UnsupportedFeature(
            f"config.json: quantization_config: {architecture} in {method} is not supported by this version",
            f"it is read in {', '.join(stored_as)}, or in bfloat16",
        )
    return found


def _stored_bytes(profile: ModelProfile) -> Iterator[int]:
    """Of each tensor, as config.json says that it is stored."""
    for name, shape in expected_tensors(profile):
        if is_packed(profile, name):
            yield mxfp4.stored_bytes(shape)
        elif profile.fp8 is not None and profile.fp8.holds(name, shape):
            yield fp8.stored_bytes(shape)
        else:
            yield math.prod(shape) * DTYPE_BYTES[profile.dtype]


def read_profile(model_dir: Path) -> ModelProfile:
    """The profile of a folder, its safetensors headers checked against its config.json.

    `eos_token_ids` come from generation_config.json when it has them, as transformers' `generate` does it.
    Raises a `CheckpointError` that names the file.
    """
    if not model_dir.is_dir():
        raise MissingFile(f"{model_dir}: not a folder", "give the folder that holds config.json")
    if not (model_dir / "config.json").is_file():
        raise MissingFile(
            f"{model_dir}: no config.json",
            "a checkpoint folder holds config.json, tokenizer.json and *.safetensors",
        )
    profile = read_config(model_dir)
    tensors = read_tensors(model_dir)
    needed = check_tensors(profile, each_expert(profile, tensors))
    if not names_dtype(profile.raw):
        profile = replace(profile, dtype=_WEIGHT_DTYPES[needed[0].dtype])
    return replace(profile, weight_bytes=sum(tensor.nbytes for tensor in needed))


def names_dtype(config: Mapping[str, Any]) -> bool:
    """Whether config.json says in which number format the checkpoint computes; if not, its tensors do."""
    return config.get("dtype") is not None or config.get("torch_dtype") is not None


def read_config(model_dir: Path) -> ModelProfile:
    """The profile by config.json and generation_config.json alone: for a folder whose weights are to come."""
    profile = profile_from_config(read_json(model_dir / "config.json"))
    eos = profile.eos_token_ids
    if (model_dir / "generation_config.json").is_file():
        value = read_json(model_dir / "generation_config.json").get("eos_token_id")
        if isinstance(value, int) or (isinstance(value, list) and all(isinstance(item, int) for item in value)):
            eos = _token_ids(value)
        elif value is not None:
            raise invalid("eos_token_id", f"expected ids, got {value!r}", "generation_config.json")
    return replace(profile, eos_token_ids=eos)


def expected_tensors(profile: ModelProfile) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor an engine loads, in the order of the computation."""
    hidden, q, kv = profile.hidden_size, profile.q_size, profile.kv_size
    yield "model.embed_tokens.weight", (profile.vocab_size, hidden)
    for layer in range(profile.num_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        for name, rows, columns, bias in (
            ("self_attn.q_proj", q, hidden, profile.qkv_bias),
            ("self_attn.k_proj", kv, hidden, profile.qkv_bias),
            ("self_attn.v_proj", kv, hidden, profile.qkv_bias),
            ("self_attn.o_proj", hidden, q, profile.output_bias),
        ):
            yield f"{prefix}{name}.weight", (rows, columns)
            if bias:
                yield f"{prefix}{name}.bias", (rows,)
        if profile.sinks:
            yield prefix + "self_attn.sinks", (profile.num_heads,)
        if profile.qk_norm:
            yield prefix + "self_attn.q_norm.weight", (profile.head_dim,)
            yield prefix + "self_attn.k_norm.weight", (profile.head_dim,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        if profile.post_norms:
            yield prefix + "pre_feedforward_layernorm.weight", (hidden,)
        yield from _mlp_tensors(profile, layer)
        if profile.post_norms:
            yield prefix + "post_feedforward_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not profile.tie_word_embeddings:
        yield "lm_head.weight", (profile.vocab_size, hidden)


def _mlp_tensors(profile: ModelProfile, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, experts = profile.hidden_size, profile.experts
    if experts is None or not experts.layers[layer]:
        inner = profile.intermediate_size
        for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            yield f"model.layers.{layer}.mlp.{name}_proj.weight", (rows, columns)
            if profile.mlp_bias:
                yield f"model.layers.{layer}.mlp.{name}_proj.bias", (rows,)
        return
    inner = experts.intermediate_size
    yield f"{experts.router(layer)}.weight", (experts.num_experts, hidden)
    if experts.turned:
        at, count = f"model.layers.{layer}.{experts.block}", experts.num_experts
        yield f"{at}.{experts.router_name}.bias", (count,)
        yield f"{at}.experts.gate_up_proj", (count, hidden, 2 * inner)
        yield f"{at}.experts.gate_up_proj_bias", (count, 2 * inner)
        yield f"{at}.experts.down_proj", (count, inner, hidden)
        yield f"{at}.experts.down_proj_bias", (count, hidden)
        return
    shapes = tuple(zip(experts.projections, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True))
    for number in range(experts.num_experts):
        at = experts.expert(layer, number)
        for name, shape in shapes:
            yield f"{at}.{name}.weight", shape


def each_expert(profile: ModelProfile, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The same tensors, with those of experts one by one.

    transformers can also write the experts of a layer as they lie in its memory: `mlp.experts.gate_up_proj`
    [E, 2 · I, W] and `mlp.experts.down_proj` [E, W, I], beside `mlp.gate.weight`, whatever the architecture. Each
    expert's are then parts of these. E experts, W hidden width, I width inside.
    """
    found, experts = dict(tensors), profile.experts
    if experts is None or experts.turned:
        return found
    count, inner, hidden = experts.num_experts, experts.intermediate_size, profile.hidden_size
    gate, up, down = experts.projections
    for layer in (number for number, routed in enumerate(experts.layers) if routed):
        at = f"model.layers.{layer}.mlp"
        for name, parts in (("gate_up_proj", (gate, up)), ("down_proj", (down,))):
            shape = (inner, hidden) if name == "gate_up_proj" else (hidden, inner)
            whole = found.get(f"{at}.experts.{name}")
            if whole is None or whole.shape != (count, len(parts) * shape[0], shape[1]):
                continue
            del found[whole.name]
            size = whole.nbytes // (count * len(parts))
            for place in range(count * len(parts)):
                number, part = divmod(place, len(parts))
                own = f"{experts.expert(layer, number)}.{parts[part]}.weight"
                found[own] = replace(whole, name=own, shape=shape, offset=whole.offset + place * size, nbytes=size)
            router = found.pop(f"{at}.gate.weight", None)
            if router is not None:
                own = f"{experts.router(layer)}.weight"
                found[own] = replace(router, name=own)
    return found


def is_packed(profile: ModelProfile, name: str) -> bool:
    """Whether a tensor is stored in MXFP4."""
    packed = profile.experts is not None and profile.experts.packed
    return packed and name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def _in_mxfp4(name: str, shape: tuple[int, ...], tensors: Mapping[str, TensorInfo]) -> Iterator[TensorInfo]:
    for kind, expected in zip(("blocks", "scales"), mxfp4.packed_shapes(shape), strict=True):
        tensor = tensors.get(f"{name}_{kind}")
        hint = "by quantization_config of config.json experts are in mxfp4: a file is missing, or it is wrong"
        if tensor is None:
            raise WrongTensors(f"tensor {name}_{kind} is in none of the files", hint)
        if (tensor.dtype, tensor.shape) != ("U8", expected):
            raise WrongTensors(
                f"{tensor.file.name}: tensor {tensor.name} is {tensor.dtype} {list(tensor.shape)}, expected U8 "
                f"{list(expected)}",
                hint,
            )
        yield tensor


def check_tensors(profile: ModelProfile, tensors: Mapping[str, TensorInfo]) -> list[TensorInfo]:
    """The tensors that `profile` needs, in the order of the computation. Raises `WrongTensors`.

    A tensor nobody expects means that the architecture computes something else than its name says, so it is
    refused; rotary frequencies of old files and the copy of a tied head are the known exceptions.
    """
    hint = "config.json and the weights do not belong together, or the architecture is a variant of its own"
    needed: list[TensorInfo] = []
    for name, shape in expected_tensors(profile):
        if is_packed(profile, name):
            needed += _in_mxfp4(name, shape, tensors)
            continue
        tensor = tensors.get(name)
        if tensor is None:
            raise WrongTensors(f"tensor {name} is in none of the files", hint)
        if tensor.shape != shape:
            raise WrongTensors(
                f"{tensor.file.name}: tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}",
                hint,
            )
        if profile.fp8 is not None and profile.fp8.holds(name, shape):
            needed += _in_fp8(tensor, tensors)
            continue
        if tensor.dtype not in _WEIGHT_DTYPES:
            raise WrongTensors(
                f"{tensor.file.name}: tensor {name} is stored as {tensor.dtype}",
                f"this version loads {', '.join(_WEIGHT_DTYPES)}"
                + (
                    ", and of linear layers F8_E4M3 where quantization_config says so"
                    if "F8" in tensor.dtype
                    else ""
                ),
            )
        needed.append(tensor)
    known = {tensor.name for tensor in needed} | {"lm_head.weight"}
    for name, tensor in tensors.items():
        if name not in known and not name.endswith("rotary_emb.inv_freq"):
            raise WrongTensors(f"{tensor.file.name}: tensor {name} has no place in {profile.architecture}", hint)
    return needed


def _in_fp8(weight: TensorInfo, tensors: Mapping[str, TensorInfo]) -> list[TensorInfo]:
    """A weight in fp8, and its scales."""
    name = weight.name + fp8.SCALE
    if weight.dtype != fp8.CODES:
        raise WrongTensors(
            f"{weight.file.name}: tensor {weight.name} is stored as {weight.dtype}, and by quantization_config of "
            f"config.json it is {fp8.CODES}",
            "modules_to_not_convert there names the modules that are not in fp8",
        )
    scales = tensors.get(name)
    if scales is None:
        raise WrongTensors(
            f"tensor {name} is in none of the files, and {weight.name} is in fp8",
            "a weight in fp8 needs the scales of its blocks; the download may be incomplete",
        )
    if scales.shape != fp8.scales_shape(weight.shape):
        raise WrongTensors(
            f"{scales.file.name}: tensor {name} has shape {list(scales.shape)}, expected "
            f"{list(fp8.scales_shape(weight.shape))} for blocks of {fp8.BLOCK} × {fp8.BLOCK}",
            "config.json and the weights do not belong together",
        )
    if scales.dtype not in _WEIGHT_DTYPES:
        raise WrongTensors(
            f"{scales.file.name}: tensor {name} is stored as {scales.dtype}",
            f"scales are read as {', '.join(_WEIGHT_DTYPES)}",
        )
    return [weight, scales]
