"""How far the next-token distributions of two revisions are apart, from what engines tell of them.

At each place of one text both tell their `TOP` likeliest tokens, P (of the stable revision) and Q (of the new
one), and each the token that stands there. Of all others only the sum is known. So tokens are put into buckets:

    each token that both tell                    P and Q are known
    all that the stable one alone tells          P is known; Q of each is at most that of the new one's last
    all others                                   what is left of P and of Q

The divergence of the buckets is never above that of the tokens (data processing), and Q of the second bucket is
taken as the allowed value that makes it least. What comes out is a lower bound of KL(P || Q) in nats, 0 for
equals: it never says that a revision drifts which does not, and what it leaves out lies among tokens that neither
would draw but rarely.

They *agree* at a place when the new one's likeliest token is the stable one's, or one that the stable one itself
holds for as likely, by `TIE`: which of two equals comes first is rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from quire_schemas import wire

TOP: Final = 20
"""Tokens that are told at each place."""
TIE: Final = 0.1
"""Nats that two tokens of one distribution may be apart and still be equals. Logits in bfloat16 between 16 and 32
are multiples of an eighth, and those of another order of summation round otherwise."""


def told(scores: wire.TokenLogprobs) -> dict[int, float]:
    """The log-probabilities that an engine tells at one place, by token."""
    return {**dict(scores.top), scores.token_id: scores.logprob}


def agree(stable: wire.TokenLogprobs, new: wire.TokenLogprobs) -> bool:
    """Whether both would write the same token here. Each has a `top`."""
    first, chosen = stable.top[0], new.top[0][0]
    return told(stable).get(chosen, -math.inf) >= first[1] - TIE


def divergence(told_by_stable: wire.TokenLogprobs, told_by_new: wire.TokenLogprobs) -> float:
    """A lower bound of KL(stable || new) in nats, from what each tells of one place."""
    stable, new = told(told_by_stable), told(told_by_new)
    both = stable.keys() & new.keys()
    alone = stable.keys() - new.keys()
    kl = sum(math.exp(stable[token]) * (stable[token] - new[token]) for token in both)
    left = max(1.0 - sum(math.exp(stable[token]) for token in both), 0.0)
    new_left = max(1.0 - sum(math.exp(new[token]) for token in both), 0.0)
    new_others = max(1.0 - sum(map(math.exp, new.values())), 0.0)
    own = min(sum(math.exp(stable[token]) for token in alone), left)
    # none of these is likelier than the last of its likeliest, nor all of them than what it does not tell
    most = min(len(alone) * math.exp(told_by_new.top[-1][1]), new_others)
    share = min(most, new_left * own / left) if left > 0 else 0.0
    return max(kl + _term(own, share) + _term(left - own, new_left - share), 0.0)


def _term(p: float, q: float) -> float:
    if p <= ROUNDING:
        return 0.0
    return p * math.log(p / max(q, ROUNDING))


ROUNDING: Final = 1e-9
"""A share that is less is none: log-probabilities come in single precision."""


def compare(stable: Sequence[wire.TokenLogprobs], new: Sequence[wire.TokenLogprobs]) -> tuple[int, float]:
    """At how many of these places they agree, and the sum of the divergences in nats."""
    pairs = list(zip(stable, new, strict=True))
    return sum(agree(*pair) for pair in pairs), sum(divergence(*pair) for pair in pairs)
