"""What `spec.quantization` becomes for a checkpoint, and the bytes that it leaves."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from tests.unit.schemas.test_sizing import LLAMA_8B, QWEN_HALF_B, ask, gpu, offers

from quire_schemas.checkpoint import ModelProfile, expected_tensors, is_packed, profile_from_config
from quire_schemas.fp8 import Fp8Profile
from quire_schemas.quantization import FLOATS, GROUP_SIZES, Unquantizable, resolve
from quire_schemas.sizing import GIB, activation_bytes, fit, weight_bytes
from quire_schemas.wire import Quantization

ODD = replace(QWEN_HALF_B, intermediate_size=4864 + 32)
"""Of which groups of 64 do not fit one weight; groups of 128 do not fit 896 either."""

MIXTRAL = profile_from_config({"architectures": ["MixtralForCausalLM"], "num_hidden_layers": 2})
GPT_OSS = profile_from_config({"architectures": ["GptOssForCausalLM"], "num_hidden_layers": 2})


def section(method: str, activations: str = "auto", groups: int | None = None) -> dict[str, Any]:
    return {"method": method, "format": "auto", "activations": activations, "groupSize": groups}


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        (section("none"), None),
        (section("int8"), Quantization("int8", "int8", None)),
        (section("int8", "bf16"), Quantization("int8", "bf16", None)),
        (section("int4"), Quantization("int4", "int8", 32)),
        (section("int4", "int8", 128), Quantization("int4", "int8", 128)),
        (section("int4", "bf16", 64), Quantization("int4", "bf16", 64)),
    ],
)
def test_auto_follows_the_method(declared: dict[str, Any], expected: Quantization | None) -> None:
    found = resolve(declared, LLAMA_8B, dtype="bfloat16", device="cpu")
    assert found == expected
    assert msgspec.json.decode(msgspec.json.encode(found), type=Quantization | None) == found


@pytest.mark.parametrize(
    ("declared", "profile", "dtype", "device", "field", "words", "hint"),
    [
        (
            section("int4", "int8"),
            *(LLAMA_8B, "bfloat16", "cuda", "activations", "on a GPU", "activations: auto, or method: int8"),
        ),
        (section("int4", "bf16"), LLAMA_8B, "float16", "cpu", "activations", "are float16", "bfloat16"),
        (
            section("int4", groups=64),
            ODD,
            "bfloat16",
            "cpu",
            "groupSize",
            "4896 inputs of .*layers.0.mlp.down",
            "32",
        ),
        (
            section("int4"),
            replace(QWEN_HALF_B, hidden_size=900),
            *("bfloat16", "cpu", "groupSize", "900 inputs of model.embed_tokens", "declare method: int8"),
        ),
        (
            section("int8"),
            profile_from_config({"architectures": ["GptOssForCausalLM"]}),
            *("bfloat16", "cpu", "method", "quantized experts of GptOssForCausalLM", "declare method: none"),
        ),
        (
            section("int8"),
            replace(QWEN_HALF_B, hidden_size=902),
            *("bfloat16", "cpu", "method", "902 inputs of model.embed_tokens.weight are no multiple of 4", "none"),
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    declared: dict[str, Any], profile: ModelProfile, dtype: str, device: Any, field: str, words: str, hint: str
) -> None:
    with pytest.raises(Unquantizable, match=words) as refused:
        resolve(declared, profile, dtype=dtype, device=device)
    assert refused.value.field == field
    assert hint in refused.value.hint
    if "groupSize: " in refused.value.hint:
        assert resolve(section("int4"), profile, dtype=dtype, device=device) is not None


INT8 = Quantization("int8")


def in_fp8(profile: ModelProfile, *kept: str) -> ModelProfile:
    return replace(profile, fp8=Fp8Profile(frozenset(kept)))


@pytest.mark.parametrize("declared", [section("none"), section("fp8"), section("fp8", "fp8")])
def test_a_checkpoint_in_fp8_is_that_on_a_gpu(declared: dict[str, Any]) -> None:
    found = resolve(declared, in_fp8(LLAMA_8B), dtype="bfloat16", device="cuda")
    assert found == Quantization("fp8", "fp8")
    assert str(found) == "fp8, fp8 activations"
    assert msgspec.json.decode(msgspec.json.encode(found), type=Quantization) == found


def test_a_checkpoint_in_fp8_is_widened_on_a_cpu_unless_it_is_made_integers() -> None:
    coded = in_fp8(LLAMA_8B)
    assert resolve(section("none"), coded, dtype="bfloat16", device="cpu") is None
    assert weight_bytes(coded, "bfloat16") == weight_bytes(LLAMA_8B, "bfloat16")
    said = "weights in fp8 are widened to bfloat16, for nothing on a CPU multiplies them"
    assert said in "".join(fit(coded, ask()).lines())
    assert "widened" not in "".join(fit(LLAMA_8B, ask()).lines() + fit(coded, ask(quantization=INT8)).lines())
    for device in ("cpu", "cuda"):
        found = resolve(section("int8"), coded, dtype="bfloat16", device=device)
        assert found == Quantization("int8")
        assert weight_bytes(coded, "bfloat16", found) == weight_bytes(LLAMA_8B, "bfloat16", found)


@pytest.mark.parametrize(
    ("declared", "profile", "dtype", "device", "field", "words", "hint"),
    [
        (section("fp8"), LLAMA_8B, "bfloat16", "cpu", "method", "on a GPU alone", "method: int8"),
        (section("fp8"), in_fp8(LLAMA_8B), "bfloat16", "cpu", "method", "on a GPU alone", "method: none, which"),
        (
            section("fp8"),
            MIXTRAL,
            "bfloat16",
            "cpu",
            "method",
            "on a GPU alone",
            "declare engine.device: cuda, or method: none",
        ),
        (section("int8", "int8"), MIXTRAL, "bfloat16", "cuda", "activations", "experts in int8 meet", "auto"),
        (section("int4", "int8"), MIXTRAL, "bfloat16", "cuda", "activations", "int4 weights meet", "auto"),
        (section("none", "int8"), in_fp8(LLAMA_8B), "bfloat16", "cuda", "activations", "do not meet int8", "bf16"),
        (section("fp8", "int8"), LLAMA_8B, "bfloat16", "cuda", "activations", "do not meet int8", "auto, or bf16"),
        (section("int8", "fp8"), LLAMA_8B, "bfloat16", "cuda", "activations", "do not meet fp8", "auto, or bf16"),
        (section("fp8", "bf16"), LLAMA_8B, "float16", "cuda", "activations", "are float16", "bfloat16"),
        (
            section("none"),
            in_fp8(LLAMA_8B, "layers.3.self_attn.k_proj"),
            *(
                "bfloat16",
                "cuda",
                "method",
                "3.self_attn.q_proj.weight is in fp8 and .*k_proj",
                "engine.device: cpu",
            ),
        ),
        (
            section("none"),
            in_fp8(MIXTRAL, "experts.3.w2"),
            *(
                "bfloat16",
                "cuda",
                "method",
                "experts.0.w1.weight is in fp8 and .*experts.3.w2",
                "engine.device: cpu",
            ),
        ),
    ],
)
def test_fp8_that_cannot_be_is_refused_by_name(
    declared: dict[str, Any], profile: ModelProfile, dtype: str, device: Any, field: str, words: str, hint: str
) -> None:
    with pytest.raises(Unquantizable, match=words) as refused:
        resolve(declared, profile, dtype=dtype, device=device)
    assert refused.value.field == field
    assert hint in refused.value.hint


@pytest.mark.parametrize("activations", ["bf16", "fp8"])
def test_activations_without_a_method_are_those_of_a_checkpoint_in_fp8(activations: Any) -> None:
    """As ADR 0044 has it: who wants inputs as they are says so."""
    declared = section("none", activations)
    found = resolve(declared, in_fp8(LLAMA_8B), dtype="bfloat16", device="cuda")
    assert found == Quantization("fp8", activations)
    for profile, device, words in (
        (LLAMA_8B, "cuda", "nothing of it is quantized"),
        (LLAMA_8B, "cpu", "nothing of it is quantized"),
        (MIXTRAL, "cuda", "nothing of it is quantized"),
        (in_fp8(LLAMA_8B), "cpu", "in fp8 are widened on a CPU"),
    ):
        with pytest.raises(Unquantizable, match=words) as refused:
            resolve(declared, profile, dtype="bfloat16", device=device)  # type: ignore[arg-type]
        assert refused.value.field == "activations"
        taken(refused.value.hint, declared, profile, device)


def taken(hint: str, declared: dict[str, Any], profile: ModelProfile, device: Any) -> None:
    """Does what each alternative of a hint says; nothing may be refused then."""
    assert hint.startswith("declare ")
    for offer in hint.removeprefix("declare ").replace(", which widens them", "").split(", or "):
        changed, where = dict(declared), device
        for part in offer.split(" and "):
            key, value = part.split(": ")
            where = value if key == "engine.device" else where
            changed |= {} if key == "engine.device" else {key: value}
        resolve(changed, profile, dtype="bfloat16", device=where)


HALF = "layers.1.self_attn.k_proj"
PACKED = profile_from_config({**GPT_OSS.raw, "quantization_config": {"quant_method": "mxfp4"}})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("method", ["none", "int8", "int4", "fp8"])
@pytest.mark.parametrize(
    "profile",
    [LLAMA_8B, in_fp8(LLAMA_8B, HALF), MIXTRAL, in_fp8(MIXTRAL), in_fp8(MIXTRAL, HALF), GPT_OSS, PACKED],
    ids=["dense", "half in fp8", "experts", "experts in fp8", "experts half in fp8", "gpt-oss", "in mxfp4"],
)
def test_no_hint_leads_into_the_next_refusal(profile: ModelProfile, method: str, device: Any) -> None:
    declared = section(method)
    try:
        resolve(declared, profile, dtype="bfloat16", device=device)
    except Unquantizable as refused:
        taken(refused.hint, declared, profile, device)


def test_experts_in_mxfp4_stay_so_on_a_gpu_and_are_widened_on_a_cpu() -> None:
    for declared in (section("none"), section("none", "bf16")):
        found = resolve(declared, PACKED, dtype="bfloat16", device="cuda")
        assert found == Quantization("mxfp4", "bf16")
        assert str(found) == "experts in mxfp4, bf16 activations"
        assert msgspec.json.decode(msgspec.json.encode(found), type=Quantization) == found
    assert resolve(section("none"), PACKED, dtype="bfloat16", device="cpu") is None
    assert resolve(section("none"), GPT_OSS, dtype="bfloat16", device="cuda") is None
    shapes = dict(expected_tensors(PACKED))
    packed = [name for name in shapes if is_packed(PACKED, name)]
    assert len(packed) == 2 * PACKED.num_layers
    numbers = sum(math.prod(shapes[name]) for name in packed)
    saved = weight_bytes(PACKED, "bfloat16") - weight_bytes(PACKED, "bfloat16", found)
    assert saved == numbers * 2 - numbers * 17 // 32, "a byte for two codes, and one for 32"
    lines = "".join(fit(PACKED, gpu(80, max_model_len=64, quantization=found)).lines())
    assert "experts in mxfp4" in lines
    assert "widened" not in lines


def test_the_gpt_oss_of_117_billion_fits_a_card_of_80_gib() -> None:
    """As ADR 0049 has it; widened it fits none of 141 either."""
    shape = {"num_hidden_layers": 36, "num_local_experts": 128, "hidden_size": 2880, "intermediate_size": 2880}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201_088}
    large = profile_from_config({**PACKED.raw, **shape, **heads})
    kept = fit(large, gpu(80, quantization=Quantization("mxfp4", "bf16")))
    assert kept.fits
    assert 60 * GIB < kept.weights < 61 * GIB
    assert not fit(large, gpu(141)).fits


@pytest.mark.parametrize(
    ("activations", "device", "words"),
    [
        *((one, "cuda", "multiplied by numbers of the engine's dtype") for one in ("int8", "fp8", "fp16")),
        *((one, "cpu", "widened on a CPU, where no input is rounded") for one in ("int8", "bf16")),
    ],
)
def test_experts_in_mxfp4_meet_numbers_of_the_engine_alone(activations: str, device: Any, words: str) -> None:
    with pytest.raises(Unquantizable, match=words) as refused:
        resolve(section("none", activations), PACKED, dtype="bfloat16", device=device)
    assert (refused.value.field, refused.value.hint) == ("activations", "declare activations: auto")


def test_experts_in_fp8_have_pairs_of_inputs_and_are_never_rounded_for() -> None:
    odd = replace(MIXTRAL, experts=replace(MIXTRAL.experts, intermediate_size=97))  # type: ignore[type-var]
    for profile, method in ((odd, "fp8"), (in_fp8(odd), "none"), (in_fp8(odd), "fp8")):
        with pytest.raises(Unquantizable, match="experts have 97 inputs, and in fp8 two are multiplied at once"):
            resolve(section(method), profile, dtype="bfloat16", device="cuda")
    assert resolve(section("none"), in_fp8(odd, "experts"), dtype="bfloat16", device="cuda") is not None
    said = "experts meet their input in bfloat16"
    for profile, tells in (
        (in_fp8(MIXTRAL), True),
        (in_fp8(LLAMA_8B), False),
        (in_fp8(MIXTRAL, "experts"), False),
    ):
        lines = fit(profile, gpu(80, quantization=Quantization("fp8", "fp8"))).lines()
        assert (said in "".join(lines)) is tells
    assert said not in "".join(fit(in_fp8(MIXTRAL), gpu(80, quantization=Quantization("fp8", "bf16"))).lines())


def test_what_is_widened_is_said_of_either_format() -> None:
    said = "experts in MXFP4 are widened to bfloat16, for nothing on a CPU multiplies them"
    assert said in "".join(fit(PACKED, ask(max_model_len=64)).lines())
    assert "widened" not in "".join(fit(GPT_OSS, ask(max_model_len=64)).lines())
    coded = "weights in fp8 are widened to bfloat16, for nothing on a CPU multiplies them"
    assert coded in "".join(fit(in_fp8(MIXTRAL), ask(max_model_len=64)).lines())


class Counting(Fp8Profile):
    """Knows how often it was asked."""

    asked = 0

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        type(self).asked += 1
        return super().holds(name, shape)


class Looked(frozenset[str]):
    """Names that are looked up, and gone through by nobody."""

    def __iter__(self) -> Any:
        raise AssertionError("went through all names")


def test_experts_in_fp8_that_do_not_fit_are_counted_once() -> None:
    """A fit tries many contexts, and none changes what a weight is: this runs where requests of everybody wait."""
    shape = {"num_hidden_layers": 6, "num_experts": 16, "hidden_size": 4096, "moe_intermediate_size": 16_384}
    plain = profile_from_config({"architectures": ["Qwen3MoeForCausalLM"], **shape})
    kept = Looked({"lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(6)), "layers.3.self_attn"})
    profile, tensors = replace(plain, fp8=Counting(kept)), [name for name, _ in expected_tensors(plain)]
    Counting.asked = 0
    quantization = resolve(section("none"), replace(plain, fp8=Counting(kept)), dtype="bfloat16", device="cuda")
    report = fit(profile, gpu(24, quantization=quantization))
    assert not report.fits
    assert report.counter_offers
    assert Counting.asked <= len(tensors)
    assert not profile.fp8.holds("model.layers.3.self_attn.q_proj.weight", (4, 4))  # type: ignore[union-attr]
    assert profile.fp8.holds("model.layers.2.self_attn.q_proj.weight", (4, 4))  # type: ignore[union-attr]


def test_bytes_of_fp8() -> None:
    """By hand, as below: a float32 for each 128 × 128 numbers of the linear layers; a head has no whole number of
    them in general, but 128,256 = 1002 × 128."""
    linear, head, norms = 6_979_321_856, 525_336_576, 266_240
    found = weight_bytes(LLAMA_8B, "bfloat16", Quantization("fp8", "fp8"))
    assert found == (linear + head) + 4 * (linear + head) // 16384 + 2 * (head + norms)
    coded = weight_bytes(in_fp8(LLAMA_8B), "bfloat16", Quantization("fp8", "fp8"))
    assert coded == linear + 4 * linear // 16384 + 2 * (2 * head + norms), (
        "embedding and head as the file has them"
    )
    kept = in_fp8(LLAMA_8B, "mlp.down_proj")
    more = weight_bytes(kept, "bfloat16", Quantization("fp8", "fp8")) - coded
    assert more == 32 * (4096 * 14336 - 4 * 32 * 112)
    gpu_report = fit(LLAMA_8B, replace(gpu(16), quantization=Quantization("fp8", "fp8")))
    assert gpu_report.weights == found
    assert "(fp8, fp8 activations)" in gpu_report.lines()[0]


def test_bytes_of_known_checkpoints() -> None:
    """By hand: Llama 8B has 525,336,576 numbers in its embedding, as many in its head and 266,240 in norms. Its
    linear layers have 6,979,321,856 numbers for 32 × 43,008 outputs, its head has 128,256 outputs."""
    linear, head, outputs = 6_979_321_856, 525_336_576, 32 * 43_008 + 128_256
    kept = 2 * (head + 266_240)
    assert LLAMA_8B.num_parameters == linear + 2 * head + 266_240
    assert weight_bytes(LLAMA_8B, "bfloat16", Quantization("int8")) == linear + head + 4 * outputs + kept
    for size in GROUP_SIZES:
        found = weight_bytes(LLAMA_8B, "bfloat16", Quantization("int4", group_size=size))
        assert found == (linear + head) // 2 + (linear + head) * 2 // size + kept


def test_a_tied_embedding_is_quantized_and_biases_are_wide() -> None:
    numbers = QWEN_HALF_B.num_parameters
    norms, biases = 24 * 2 * 896 + 896, 24 * (896 + 2 * 128)
    outputs = 24 * (896 + 2 * 128 + 896 + 2 * 4864 + 896) + 151_936
    expected = numbers - norms - biases + 4 * outputs + 2 * norms + 4 * biases
    assert weight_bytes(QWEN_HALF_B, "bfloat16", Quantization("int8")) == expected
    four = expected + 2 * norms  # of float32
    assert weight_bytes(QWEN_HALF_B, "float32", Quantization("int8")) == four


def test_the_report_counts_by_the_method_and_says_so() -> None:
    plain = fit(QWEN_HALF_B, ask())
    for method, share in ((Quantization("int8"), 0.51), (Quantization("int4", group_size=32), 0.28)):
        report = fit(QWEN_HALF_B, ask(quantization=method))
        assert report.fits
        assert report.weights == weight_bytes(QWEN_HALF_B, "bfloat16", method)
        assert report.weights == pytest.approx(share * plain.weights, rel=0.02)
        assert f"({method})" in report.lines()[0]
        assert report.activations == activation_bytes(
            QWEN_HALF_B, "bfloat16", 512, 64, report.max_model_len, quantization=method
        )
        assert report.activations >= plain.activations
    wide = activation_bytes(QWEN_HALF_B, "bfloat16", 4096, 1, 64, quantization=method)
    assert wide > activation_bytes(QWEN_HALF_B, "bfloat16", 4096, 1, 64)
    assert "int" not in plain.lines()[0]
    assert str(method) == "int4 in groups of 32, int8 activations"


@pytest.mark.parametrize(
    ("gib", "profile", "expected"),
    [
        (12, LLAMA_8B, "int8"),
        (8, LLAMA_8B, "int4"),
        (8, replace(LLAMA_8B, intermediate_size=14_340), None),
        (4, LLAMA_8B, None),
    ],
)
def test_weights_above_a_machine_are_offered_the_method_that_fits(
    gib: int, profile: ModelProfile, expected: str | None
) -> None:
    request = ask(device_bytes_total=gib * GIB, device_bytes_available=gib * GIB, max_model_len=1024)
    found = offers(fit(profile, request)).get("spec.quantization.method")
    assert (found or " ").split()[0] == expected if expected else found is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_on_a_gpu_four_bits_leave_activations_alone(dtype: str) -> None:
    found = resolve(section("int4"), LLAMA_8B, dtype=dtype, device="cuda")
    assert found == Quantization("int4", FLOATS[dtype], 32)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Quantization) == found
    assert resolve(section("int8"), LLAMA_8B, dtype=dtype, device="cuda") == Quantization("int8")
    if dtype == "bfloat16":
        assert resolve(section("int8", "bf16"), LLAMA_8B, dtype=dtype, device="cuda") == Quantization(
            "int8", "bf16"
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_on_a_gpu_experts_in_fewer_bits_meet_activations_as_they_are(dtype: str) -> None:
    floats = FLOATS[dtype]
    for declared, expected in (
        (section("int8"), Quantization("int8", floats)),
        (section("int4"), Quantization("int4", floats, 32)),
        (section("int4", groups=128), Quantization("int4", floats, 128)),
    ):
        assert resolve(declared, MIXTRAL, dtype=dtype, device="cuda") == expected
    for method in ("none", "int8", "int4"):
        declared = section(method, "int8")
        with pytest.raises(Unquantizable) as refused:
            resolve(declared, MIXTRAL, dtype=dtype, device="cuda")
        taken(refused.value.hint, declared, MIXTRAL, "cuda")
    assert resolve(section("int8"), MIXTRAL, dtype=dtype, device="cpu") == Quantization("int8")


@pytest.mark.parametrize(
    ("gib", "expected"), [(6, Quantization("int8", "bf16")), (4, Quantization("int4", "bf16", 32)), (2, None)]
)
def test_a_gpu_that_is_too_small_for_experts_is_offered_fewer_bits(
    gib: int, expected: Quantization | None
) -> None:
    found = offers(fit(MIXTRAL, gpu(gib, max_model_len=256))).get("spec.quantization.method")
    assert (found or "none").split()[0] == (expected.method if expected else "none")
    if expected:
        assert fit(MIXTRAL, gpu(gib, max_model_len=256, quantization=expected)).fits


@pytest.mark.parametrize(
    ("gib", "expected"), [(12, Quantization("int8")), (9, Quantization("int4", "bf16", 32)), (4, None)]
)
def test_a_gpu_that_is_too_small_is_offered_fewer_bits(gib: int, expected: Quantization | None) -> None:
    found = offers(fit(LLAMA_8B, gpu(gib))).get("spec.quantization.method")
    assert (found or "none").split()[0] == (expected.method if expected else "none")
    if expected:
        assert fit(LLAMA_8B, replace(gpu(gib), quantization=expected)).fits


def test_nothing_that_is_quantized_is_offered_it() -> None:
    small = {"device_bytes_total": 8 * GIB, "device_bytes_available": 8 * GIB, "max_model_len": 1024}
    assert "spec.quantization.method" not in offers(fit(LLAMA_8B, ask(**small, quantization=Quantization("int8"))))
