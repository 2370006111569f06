"""What of a checkpoint surprises people once it serves, said before it runs. Pure.

Nothing here is wrong enough to be refused: the files contradict each other where the engine follows one of them,
or they decide something that a manifest does not show. Each finding is a sentence with the figures it rests on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from quire_schemas.checkpoint import ModelProfile


@dataclass(frozen=True, slots=True)
class TextFacts:
    """What findings need to know of a tokenizer's folder, its chat template and its generation_config.json."""

    vocab_size: int
    """Ids, added ones included."""
    has_template: bool
    end: tuple[str, int] | None
    """The token that the tokenizer calls the end of a text, and its id."""
    advised: Mapping[str, float] = field(default_factory=dict)
    """Sampling for requests that leave it out, by the API's names; temperature 0 is greedy."""


def of_positions(profile: ModelProfile, max_model_len: int) -> list[str]:
    """Findings about how far a context of at most `max_model_len` tokens reaches."""
    rope, longest = profile.rope_parameters, profile.max_position_embeddings
    found = []
    if rope["rope_type"] == "yarn":
        trained = int(rope["original_max_position_embeddings"])
        stretch, reach = f"yarn, {rope['factor']:g} × {trained:,}", int(trained * rope["factor"])
        if reach != longest:
            found.append(
                f"config.json allows {longest:,} positions, and its rope parameters ({stretch}) are made for "
                f"{reach:,}"
            )
        if max_model_len <= trained:
            found.append(
                f"positions are stretched ({stretch}) at every length, also for a context of {max_model_len:,}; "
                "where that was added for serving and never trained, rope_type default with the same rope_theta "
                "is better"
            )
    elif rope["rope_type"] == "dynamic":
        found.append(
            f"positions would be stretched (dynamic, {rope['factor']:g} ×) beyond {longest:,}, where every "
            "context ends"
        )
    window = profile.sliding_window
    if window is not None and window < max_model_len:
        sliding = sum(layer == "sliding" for layer in profile.layer_kinds)
        layers = (
            "every layer sees"
            if sliding == profile.num_layers
            else f"{sliding} of {profile.num_layers} layers see"
        )
        found.append(f"{layers} the last {window:,} tokens alone, of a context of {max_model_len:,}")
    return found


def of_text(profile: ModelProfile, facts: TextFacts) -> list[str]:
    """Findings about what requests become: chat, the end of an answer, sampling."""
    found = []
    if not facts.has_template:
        found.append(
            "there is no chat template, so chat requests are refused; spec.tokenizer.chatTemplateFile names one"
        )
    if facts.vocab_size > profile.vocab_size:
        found.append(
            f"the tokenizer has {facts.vocab_size:,} ids and the model {profile.vocab_size:,}: those beyond are "
            "refused"
        )
    if not profile.eos_token_ids:
        found.append("no file names a token that ends an answer: each goes on to its max_tokens")
    elif facts.end is not None and facts.end[1] not in profile.eos_token_ids:
        ids = ", ".join(map(str, profile.eos_token_ids))
        found.append(
            f"answers end with token {ids}, as generation_config.json or config.json says, and not with the "
            f"tokenizer's own end {facts.end[0]} ({facts.end[1]}): a model that writes that one goes on behind it"
        )
    if facts.advised:
        greedy = facts.advised.get("temperature") == 0
        ways = ", ".join(f"{name} {value:g}" for name, value in facts.advised.items())
        found.append(
            f"requests that leave sampling out are {'greedy' if greedy else f'drawn with {ways}'}, as "
            "generation_config.json advises"
        )
    return found
