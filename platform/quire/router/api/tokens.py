"""`POST /tokenize` and `POST /detokenize`, which the router answers by itself: no replica has to be there for it.

Nothing bounds the length but the body's: to find out that a text is too long is what the first one is for. Long
ones are worked on aside, so that streams go on meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from litestar.types import Send

from quire.errors import InvalidRequest
from quire.router import conversation
from quire.router.fleet import ServedModel
from quire.router.gateway import Gateway
from quire.router.reception import Reception, send_json
from quire.router.spans import RequestSpan, RequestSpans
from quire_schemas.openai.tokens import (
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
    read_detokenize,
    read_tokenize,
)

_json = msgspec.json.Encoder()


class Tokens(Reception):
    """One request of either kind."""

    def __init__(self, gateway: Gateway, spans: RequestSpans, *, back: bool = False) -> None:
        super().__init__(gateway, spans, "detokenize" if back else "tokenize")
        self._read: Callable[[bytes, bool], Any] = read_detokenize if back else read_tokenize
        self._write: Callable[[Any, ServedModel], bytes] = detokenized if back else tokenized

    async def _answer(self, body: bytes, arrived_at: float, span: RequestSpan, send: Send) -> str:
        request = await self._gateway.aside(lambda: self._read(body, self._settings.ignore_unknown), len(body))
        sole = request.model is None
        served = self._gateway.fleet.sole(self._caller) if sole else self._resolve(request.model, body)
        self._serves(served, request.model or served.route.model, span)
        await send_json(send, await self._gateway.aside(lambda: self._write(request, served), len(body)))
        return "stop"


def tokenized(request: TokenizeRequest, served: ServedModel) -> bytes:
    """The ids that a completion of the prompt, or a chat of these messages, would begin with."""
    tokenizer, special = served.usable, request.add_special_tokens
    if request.prompt is not None:
        ids = tokenizer.encode(request.prompt, special is not False)
    else:
        ids = tokenizer.encode(conversation.prompt_text(request.chat, tokenizer)[0], bool(special))
    return _json.encode(
        Tokenized(
            count=len(ids),
            max_model_len=min(served.route.max_model_len, served.route.kv_tokens),
            tokens=ids,
            token_strs=tokenizer.spell(ids) if request.return_token_strs else None,
        )
    )


def detokenized(request: DetokenizeRequest, served: ServedModel) -> bytes:
    """The text of the ids, special tokens included. Raises `InvalidRequest` for one that the model has not."""
    tokenizer = served.usable
    vocabulary = max(served.vocab_size, tokenizer.vocab_size)
    if request.tokens and max(request.tokens) >= vocabulary:
        raise InvalidRequest(f"'tokens' has a token id outside the vocabulary of {vocabulary}.", param="tokens")
    return _json.encode(Detokenized(tokenizer.decode(request.tokens, skip_special_tokens=False)))
