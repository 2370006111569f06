"""`POST /v1/score`: how alike texts are. Clients know the two sides by four pairs of names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

import msgspec
from pydantic import PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from quire_schemas.openai.body import NOT_YET, OF_CALLERS, Refusal, read
from quire_schemas.openai.embeddings import EmbeddingUsage, PooledFields
from quire_schemas.openai.request import Prompt, PromptsAsSent, read_prompts

SIDES: Final = (("queries", "documents"), ("text_1", "text_2"), ("data_1", "data_2"), ("queries", "items"))
"""What is compared with what."""

SCORE_REFUSED: Final[Mapping[str, Refusal]] = {
    "truncate_prompt_tokens": Refusal("a text is never cut short here; send a shorter one", (-1,)),
    "truncation_side": Refusal("a text is never cut short here"),
    "max_tokens_per_query": Refusal("a text is never cut short here", (0,)),
    "max_tokens_per_doc": Refusal("a text is never cut short here", (0,)),
    "instruction": Refusal("write it into the queries: it is for models that read both texts together"),
    "use_activation": Refusal("a score is the cosine itself", (False,)),
    "activation": Refusal("a score is the cosine itself", (False,)),
    "softmax": Refusal("a score is the cosine itself", (False,)),
    "chat_template": Refusal("texts are compared as they are"),
    "chat_template_kwargs": Refusal("texts are compared as they are", ({},)),
    "mm_processor_kwargs": Refusal("what is compared is text", ({},)),
    "priority": Refusal(f"priorities of scores {NOT_YET}".replace("is not", "are not"), (0,)),
    "cache_salt": Refusal(f"it {NOT_YET} for scores"),
    "request_id": Refusal("send the header X-Request-Id"),
    "label_token_ids": Refusal("it is for models that answer with a token; a score is a cosine here"),
    "item_first": Refusal("each text is read by itself", (False,)),
    "stream": Refusal("scores are not streamed", (False,)),
}


def _texts(value: object) -> list[Prompt]:
    try:
        return read_prompts(value)
    except PydanticCustomError as error:
        raise PydanticCustomError("input", error.message().replace(" prompts", " texts")) from None


Texts = Annotated[list[Prompt], PlainValidator(_texts, json_schema_input_type=PromptsAsSent)]


class ScoreRequest(PooledFields):
    """Body of `POST /v1/score`: one text and several, or as many on both sides, which make pairs."""

    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    """Another name of `documents`."""
    text_1: Texts | None = None
    text_2: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None

    @model_validator(mode="after")
    def _two_sides(self) -> ScoreRequest:
        given = {name for names in SIDES for name in names if getattr(self, name) is not None}
        if given not in [set(names) for names in SIDES]:
            known = ", or ".join(f"{left} and {right}" for left, right in SIDES[1:])
            raise PydanticCustomError("queries", f"and documents must be given, or {known}; and nothing else")
        (left, queries), (right, documents) = self.sides
        if len(queries) not in (1, len(documents)):
            raise PydanticCustomError(
                left, f"must be one text, or as many as {right}: {len(queries)} and {len(documents)}"
            )
        return self

    @property
    def sides(self) -> tuple[tuple[str, list[Prompt]], tuple[str, list[Prompt]]]:
        """Both sides with the names that the request has for them."""
        for left, right in SIDES:
            queries, documents = getattr(self, left), getattr(self, right)
            if queries is not None and documents is not None:
                return (left, queries), (right, documents)
        raise AssertionError("a request has two sides")


def read_score(body: bytes, ignore_unknown: bool = False) -> ScoreRequest:
    """The request for scores in `body`. Raises `BadRequest`."""
    return read(body, ScoreRequest, SCORE_REFUSED, ignore_unknown, OF_CALLERS)


class Score(msgspec.Struct, kw_only=True):
    """How alike one pair is: the cosine between the vectors of its texts, from -1 to 1."""

    object: Literal["score"] = "score"
    index: int
    """The place of the pair, which is that of its document."""
    score: float


class ScoreList(msgspec.Struct, kw_only=True):
    """Answer to `POST /v1/score`."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: EmbeddingUsage
