"""The limits of requests, as a table for the reference: each is checked where its field is declared."""

from __future__ import annotations

from typing import Final

import msgspec

from quire_schemas import wire
from quire_schemas.openai.body import MAX_DEPTH
from quire_schemas.openai.chat import MAX_DOCUMENTS, MAX_MESSAGES, MAX_TEMPLATE_VARIABLES
from quire_schemas.openai.request import MAX_INPUTS, MAX_MODEL_NAME, MAX_PROMPTS
from quire_schemas.openai.responses import MAX_METADATA
from quire_schemas.openai.sampling import (
    MAX_ALLOWED_IDS,
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROB_IDS,
    MAX_PATTERN,
    MAX_PATTERN_COUNT,
    MAX_SALT,
    MAX_STOP_BYTES,
    MAX_STOP_IDS,
    MAX_STOPS,
    MAX_TEMPERATURE,
    MAX_TIMEOUT,
    MAX_TOP_K,
    MAX_TOP_LOGPROBS,
)
from quire_schemas.openai.structured import MAX_CHOICE_TEXTS, MAX_SCHEMA_DEPTH, MAX_STRUCTURES, MAX_TRIGGERS
from quire_schemas.openai.tools import MAX_TOOLS


class Limit(msgspec.Struct, frozen=True):
    """What is limited, the most there may be, and of what."""

    what: str
    most: int
    of: str = ""


LIMITS: Final = (
    Limit("a body", MAX_DEPTH, "levels"),
    Limit("`model`", MAX_MODEL_NAME, "characters"),
    Limit("`messages`", MAX_MESSAGES, "messages"),
    Limit("`chat_template_kwargs`", MAX_TEMPLATE_VARIABLES, "entries"),
    Limit("`prompt`", MAX_PROMPTS, "prompts"),
    Limit("`input`", MAX_INPUTS, "inputs"),
    Limit("each side of a score", MAX_PROMPTS, "texts"),
    Limit("`tools`", MAX_TOOLS, "tools"),
    Limit("`documents`", MAX_DOCUMENTS, "documents"),
    Limit("`metadata` of a response", MAX_METADATA, "pairs"),
    Limit("`n`", MAX_CHOICES),
    Limit("`best_of`", MAX_CHOICES),
    Limit("`n`, or `best_of`, times the prompts", MAX_PROMPTS),
    Limit("`temperature`", MAX_TEMPERATURE),
    Limit("`top_k`", MAX_TOP_K),
    Limit("`logit_bias`", MAX_LOGIT_BIAS, "entries"),
    Limit("`allowed_token_ids`", MAX_ALLOWED_IDS, "ids"),
    Limit("`bad_words`", MAX_BAD_WORDS, "words"),
    Limit("a word of `bad_words`", MAX_STOP_BYTES, "bytes"),
    Limit("`stop`", MAX_STOPS, "strings"),
    Limit("a string of `stop`", MAX_STOP_BYTES, "bytes"),
    Limit("`stop_token_ids`", MAX_STOP_IDS, "ids"),
    Limit("`repetition_detection.max_pattern_size`", MAX_PATTERN, "tokens"),
    Limit("`repetition_detection.min_count`", MAX_PATTERN_COUNT),
    Limit("`logprobs` of completions", MAX_TOP_LOGPROBS),
    Limit("`top_logprobs`", MAX_TOP_LOGPROBS),
    Limit("`prompt_logprobs`", MAX_TOP_LOGPROBS),
    Limit("`logprob_token_ids`", MAX_LOGPROB_IDS, "ids"),
    Limit("the text of a constraint", wire.MAX_STRUCTURED, "bytes"),
    Limit("a schema", MAX_SCHEMA_DEPTH, "levels"),
    Limit("`structured_outputs.choice`", MAX_CHOICE_TEXTS, "texts"),
    Limit("`structures` of a structural tag", MAX_STRUCTURES),
    Limit("`triggers` of a structural tag", MAX_TRIGGERS),
    Limit("`cache_salt`", MAX_SALT, "characters"),
    Limit("`timeout`", MAX_TIMEOUT, "seconds"),
)
