"""The decoder family: pre-norm residual layers of attention and a gated MLP, configured by a `ModelProfile`.

Llama, Qwen2, Qwen3 and Mistral differ in four switches: biases, norms on queries and keys, a sliding window, a
tied head. Mixtral and Qwen3-MoE have layers with experts in place of the MLP; those of gpt-oss have biases, and
its heads sinks. Gemma 2 and 3 norm what attention and MLP give, too, before it is added, scale their embeddings,
cap scores and logits, and turn the heads of sliding layers by other angles. The residual is one tensor that
every layer adds to in place. After the last attention only the rows whose logits are wanted go on: the keys and
values of the others are written by then, and nothing else of them is needed.

Legend: T tokens of the step, W hidden width, V vocabulary, R rows whose logits are wanted, N blocks, P slots a
block, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quire_engine.adapters import Company
from quire_engine.layers.attention import Attention
from quire_engine.layers.experts import RoutedExperts
from quire_engine.layers.mlp import GatedMLP
from quire_engine.layers.norm import RMSNorm
from quire_engine.layers.rotary import Rotary
from quire_engine.quantization import LinearMethod, Plain
from quire_engine.weights import TensorSource
from quire_kernels import Body, Clamp, HeadNorms, Kernels, PagedBatch, Product
from quire_kernels.memory import large_pages
from quire_schemas.checkpoint import ModelProfile
from quire_schemas.sizing import KV_SCALE_BYTES, KVGroup, group_size, kv_groups


class KVCache:
    """The keys and values of all sequences.

    `tensors[i]` [2, N, P, K, D] holds layer `group.layers[i]` of every group: a block is a slice of all of them,
    and which group it serves is told by the block tables it is in. In int8 and fp8 they are [2, N, P, K,
    D + 4]: the bytes of a scale lie behind the numbers.
    """

    def __init__(self, groups: tuple[KVGroup, ...], tensors: tuple[Tensor, ...]) -> None:
        self.groups = groups
        self.tensors = tensors
        places = {
            layer: (number, at) for number, group in enumerate(groups) for at, layer in enumerate(group.layers)
        }
        self.places = tuple(places[layer] for layer in range(len(places)))
        """Of each layer: its group, and its tensor."""

    @classmethod
    def allocate(
        cls, profile: ModelProfile, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """A cache for `profile`, zeroed: the memory is touched now, so a lack of it shows now."""
        groups = kv_groups(profile)
        kept = profile.head_dim + (KV_SCALE_BYTES if dtype.itemsize == 1 else 0)
        shape = (2, num_blocks, block_size, profile.num_kv_heads, kept)
        tensors = (
            large_pages(torch.empty(shape, dtype=dtype, device=device)).zero_() for _ in range(group_size(groups))
        )
        return cls(groups, tuple(tensors))

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Makes each second block of `copies` what the first of its pair is."""
        source, target = (torch.tensor(side, device=self.tensors[0].device) for side in zip(*copies, strict=True))
        for tensor in self.tensors:
            # as bytes, for not every torch can index fp8
            side = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
            side[:, target] = side[:, source]

    @property
    def bytes(self) -> int:
        """What the tensors hold."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(slots=True, frozen=True)
class _Layer:
    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP | RoutedExperts
    post_norms: tuple[RMSNorm, RMSNorm] | None
    """Of what attention and what the MLP gives."""
    rope: int
    """Which of a step's angles its heads are turned by."""

    def attended(self, heads: Tensor) -> Tensor:
        """What attention adds to the residual, of the heads' results."""
        given = self.attention.out(heads)
        return given if self.post_norms is None else self.post_norms[0](given)

    def thought(self, x: Tensor) -> Tensor:
        """What the MLP adds to the residual."""
        given = self.mlp(x)
        return given if self.post_norms is None else self.post_norms[1](given)

    def parameters(self) -> Iterator[Tensor]:
        for norm in (self.attention_norm, self.mlp_norm, *(self.post_norms or ())):
            yield norm.weight
        yield from self.attention.parameters()
        yield from self.mlp.parameters()


class DecoderModel:
    """A loaded model. It holds no state of any request: the cache is handed to every call."""

    def __init__(
        self,
        profile: ModelProfile,
        *,
        embedding: Tensor | None,
        layers: tuple[_Layer, ...],
        norm: RMSNorm,
        head: Product,
        rotaries: Sequence[Rotary],
        kernels: Kernels,
        dtype: torch.dtype,
        company: Company | None = None,
    ) -> None:
        self.profile = profile
        self.dtype = dtype
        """Of activations: a parameter may have another one."""
        self._company = company
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        self._rotaries = rotaries
        self.kernels = kernels
        self._body: tuple[KVCache, Body] | None = None
        """All layers over the cache of the last call."""

    @classmethod
    def build(
        cls,
        profile: ModelProfile,
        weights: TensorSource,
        *,
        device: torch.device,
        kernels: Kernels,
        method: LinearMethod | None = None,
        company: Company | None = None,
    ) -> DecoderModel:
        """The model of `profile`, its parameters handed out by `weights` on `device`; without a `method` in the
        dtype that they come in. `company` is that of a method with adapters."""
        method = method or Plain(weights, kernels)

        def norm_weight(name: str) -> Tensor:
            if not profile.norms_add_one:
                return weights.tensor(f"{name}.weight")
            return weights.tensor(f"{name}.weight", torch.float32).add_(1.0)

        def norm(name: str) -> RMSNorm:
            return RMSNorm(norm_weight(name), profile.rms_norm_eps, kernels)

        def head_norms(at: str) -> HeadNorms:
            return HeadNorms(norm_weight(f"{at}.q_norm"), norm_weight(f"{at}.k_norm"), profile.rms_norm_eps)

        def mlp(index: int) -> GatedMLP | RoutedExperts:
            experts, at = profile.experts, f"model.layers.{index}.mlp"
            if experts is None or not experts.layers[index]:
                return GatedMLP(
                    gate_up=method.linear(at, ("gate_proj", "up_proj"), bias=profile.mlp_bias),
                    down=method.linear(at, ("down_proj",), bias=profile.mlp_bias),
                    act=kernels.gelu_mul if profile.activation == "gelu" else kernels.silu_mul,
                )
            router = weights.tensor(f"{experts.router(index)}.weight")
            if experts.turned:
                return RoutedExperts(
                    router=kernels.product(router, weights.tensor(f"{experts.router(index)}.bias")),
                    experts=method.turned_experts(f"{at}.experts", experts.clamp and Clamp(*experts.clamp)),
                    num_experts_per_tok=experts.num_experts_per_tok,
                    norm_topk_prob=experts.norm_topk_prob,
                    kernels=kernels,
                )
            names = [experts.expert(index, number) for number in range(experts.num_experts)]
            gate, up, down = (
                [f"{name}.{projection}.weight" for name in names] for projection in experts.projections
            )
            return RoutedExperts(
                router=kernels.product(router, None),
                experts=method.experts(gate, up, down),
                num_experts_per_tok=experts.num_experts_per_tok,
                norm_topk_prob=experts.norm_topk_prob,
                kernels=kernels,
            )

        def layer(index: int) -> _Layer:
            prefix = f"model.layers.{index}"
            at = f"{prefix}.self_attn"
            after, before = f"{prefix}.post_attention_layernorm", f"{prefix}.pre_feedforward_layernorm"
            return _Layer(
                attention_norm=norm(f"{prefix}.input_layernorm"),
                attention=Attention(
                    qkv=method.linear(at, ("q_proj", "k_proj", "v_proj"), bias=profile.qkv_bias),
                    out=method.linear(at, ("o_proj",), bias=profile.output_bias),
                    norms=head_norms(at) if profile.qk_norm else None,
                    num_heads=profile.num_heads,
                    head_dim=profile.head_dim,
                    scale=profile.attention_scale,
                    sinks=weights.tensor(f"{at}.sinks", torch.float32) if profile.sinks else None,
                    kernels=kernels,
                ),
                mlp_norm=norm(before if profile.post_norms else after),
                mlp=mlp(index),
                post_norms=(norm(after), norm(f"{prefix}.post_feedforward_layernorm"))
                if profile.post_norms
                else None,
                rope=int(profile.sliding_rope is not None and profile.layer_kinds[index] == "sliding"),
            )

        tied = profile.tie_word_embeddings
        ropes = [rope for rope in (profile.rope_parameters, profile.sliding_rope) if rope is not None]
        return cls(
            profile,
            embedding=None if tied else weights.tensor("model.embed_tokens.weight"),
            layers=tuple(layer(index) for index in range(profile.num_layers)),
            norm=norm("model.norm"),
            head=method.product("model.embed_tokens.weight" if tied else "lm_head.weight"),
            rotaries=[Rotary(rope, profile.head_dim, device, kernels) for rope in ropes],
            kernels=kernels,
            dtype=weights.dtype,
            company=company,
        )

    def parameters(self) -> Iterator[Tensor]:
        """Every parameter once: a tied head is the embedding."""
        if self._embedding is not None:
            yield self._embedding
        for layer in self._layers:
            yield from layer.parameters()
        yield self._norm.weight
        yield from self._head.parameters()

    @property
    def bytes(self) -> int:
        """What the parameters hold."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def forward(
        self, token_ids: Tensor, batches: Sequence[PagedBatch], kv: KVCache, adapters: Sequence[int] = ()
    ) -> Tensor:
        """Computes one step: `token_ids` [T] int64 at the places `batches` say, keys and values into `kv`.

        `batches` has the addresses of the same tokens in each group of the cache, `adapters` the number of each
        sequence's; none given: nobody has one. Returns the final states of `logits_rows`, normed, [R, W], which
        hold until the next step.
        """
        if self._company is not None and any(adapters):
            with self._company.present(adapters, batches[0]):
                return self._compute(kv, token_ids, batches)
        return self._body_over(kv)(token_ids, batches)

    def _body_over(self, kv: KVCache) -> Body:
        if self._body is None or self._body[0] is not kv:
            self._body = kv, self.kernels.recorded(partial(self._compute, kv))
        return self._body[1]

    def _compute(self, kv: KVCache, token_ids: Tensor, batches: Sequence[PagedBatch]) -> Tensor:
        """All layers; a `Body` that is told its cache."""
        batch = batches[0]
        rows = batch.logits_rows
        turns = [rotary(batch.positions) for rotary in self._rotaries]
        attentions = [
            self.kernels.paged_attention(addresses, window=group.window, softcap=self.profile.attention_softcap)
            for addresses, group in zip(batches, kv.groups, strict=True)
        ]
        if self._embedding is None:
            residual = self._head.rows(token_ids)
        else:
            residual = self.kernels.take(self._embedding, token_ids)
        if self.profile.embedding_scale is not None:
            residual = self.kernels.multiply(residual, self.profile.embedding_scale)
        x = self._layers[0].attention_norm(residual)
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            group, place = kv.places[index]
            heads = layer.attention.attend(
                x, *turns[layer.rope], kv.tensors[place], batches[group].slot_mapping, attentions[group]
            )
            if index == last and not batch.every_row:
                heads, residual = self.kernels.take(heads, rows), self.kernels.take(residual, rows)
                if self._company is not None:
                    self._company.narrow()
            x = layer.mlp_norm.add(layer.attended(heads), residual)
            following = self._norm if index == last else self._layers[index + 1].attention_norm
            x = following.add(layer.thought(x), residual)
        return x

    def logits(self, states: Tensor) -> Tensor:
        """Of final states [R, W]: the logits [R, V], float32."""
        logits = self._head.wide(states)
        if self.profile.logit_softcap is not None:
            self.kernels.cap_logits(logits, self.profile.logit_softcap)
        return logits

    def best(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Of final states [R, W]: the largest logit of each, [R] float32, and its token, [R] int64."""
        if self.profile.logit_softcap is not None:
            # a cap keeps the order, but makes equals of near ones: who is first must not depend on who asks
            return self.kernels.largest(self.logits(states))
        return self.kernels.largest_of(self._head, states)

    def narrow_logits(self, states: Tensor) -> Tensor:
        """The same before any cap, in the model's own number format, where that is all that is wanted of them."""
        return self._head(states)
