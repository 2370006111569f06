"""Paths that servers of this kind have and this one has not, each with the reason and with what to use instead.

A path that leads nowhere may be a slip, and is answered with what there is. One of these is none: its client
speaks to the right server and wants what it does not do. It is a 404 with a code of its own rather than a 501,
which clients and proxies take for a failure that may pass, and try again. An entry stands for everything below
its path, too, in any method; the longest that fits counts. A route that is made for a path takes it from here by
itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from quire.errors import EndpointNotServed

_RERANK: Final = (
    "Reranking needs a cross-encoder, a model that reads both texts together, and none is served yet. "
    "POST /v1/score compares the embeddings of texts"
)
_POOLING: Final = "Models with a head of their own are not served yet. POST /v1/embeddings gives pooled vectors"
_AUDIO: Final = "Audio is neither read nor written here: requests and answers are text"
_IMAGES: Final = "Images and videos are not made here: answers are text"
_STORED: Final = (
    "Conversations have no names here. POST /v1/responses goes on from a response with previous_response_id"
)
_CLASSIFY: Final = (
    "Classifiers are not served yet. POST /v1/completions with structured_outputs.choice picks one of your labels"
)
_TRAINING: Final = "Nothing is trained here. A trained checkpoint is served by a manifest"
_MANIFEST: Final = "What is served, and how, is decided by manifests: platform apply, not the HTTP API"
_LORA: Final = "Adapters are declared in spec.lora of their model's manifest, and asked for as model:adapter"
_OPENAI_ONLY: Final = "Use POST /v1/chat/completions or POST /v1/completions"

ABSENT: Final[Mapping[str, str]] = {
    "/rerank": _RERANK,
    "/v1/rerank": _RERANK,
    "/v2/rerank": _RERANK,
    "/classify": _CLASSIFY,
    "/v1/classify": _CLASSIFY,
    "/pooling": _POOLING,
    "/v1/pooling": _POOLING,
    "/encode": _POOLING,
    "/embed": _POOLING,
    "/embedding": _POOLING,
    "/v2/embed": _POOLING,
    "/v1/audio": _AUDIO,
    "/v1/realtime": _AUDIO,
    "/v1/images": _IMAGES,
    "/v1/videos": _IMAGES,
    "/v1/moderations": "No moderation model is served here",
    "/v1/conversations": _STORED,
    "/v1/responses/compact": "A conversation is taken as it is sent. Send fewer items",
    "/v1/messages/batches": "POST /v1/batches takes a file of chat requests",
    "/v1/assistants": _STORED,
    "/v1/threads": _STORED,
    "/v1/vector_stores": "Nothing is searched here. POST /v1/embeddings makes vectors for a store of yours",
    "/v1/uploads": "Files are not taken in parts",
    "/v1/fine_tuning": _TRAINING,
    "/v1/fine-tunes": _TRAINING,
    "/v1/evals": "Evaluations run at the client. POST /v1/completions with echo and logprobs scores texts",
    "/v1/containers": "No code of requests is run here",
    "/v1/organization": _MANIFEST,
    "/v1/edits": _OPENAI_ONLY,
    "/v1/engines": "GET /v1/models lists what is served",
    "/v1/complete": _OPENAI_ONLY,
    "/v1/load_lora_adapter": _LORA,
    "/v1/unload_lora_adapter": _LORA,
    "/lora-adapters": _LORA,
    "/v1/chat/completions/render": "POST /tokenize gives the ids of a conversation, POST /detokenize their text",
    "/v1/completions/render": "POST /tokenize gives the ids of a prompt",
    "/apply-template": "POST /tokenize gives the ids of a conversation, POST /detokenize their text",
    "/tokenizer_info": "POST /tokenize and POST /detokenize are offered; a checkpoint's files are not handed out",
    "/invocations": _OPENAI_ONLY,
    "/inference": "POST /v1/completions takes token ids as prompt and gives them with return_token_ids",
    "/generate": "POST /v1/completions takes text or token ids",
    "/generate_stream": "POST /v1/completions with stream: true takes text or token ids",
    "/completion": "POST /v1/completions takes text or token ids",
    "/completions": "A base URL ends with /v1: POST /v1/completions",
    "/chat/completions": "A base URL ends with /v1: POST /v1/chat/completions",
    "/embeddings": "A base URL ends with /v1: POST /v1/embeddings",
    "/models": "A base URL ends with /v1: GET /v1/models",
    "/infill": "Filling in the middle is not offered by this version",
    "/api/chat": "This is another server's API. " + _OPENAI_ONLY,
    "/api/generate": "This is another server's API. " + _OPENAI_ONLY,
    "/api/tags": "This is another server's API. GET /v1/models lists what is served",
    "/api/embed": "This is another server's API. Use POST /v1/embeddings",
    "/api/embeddings": "This is another server's API. Use POST /v1/embeddings",
    "/ping": "GET /livez says whether the server answers, GET /health whether it can serve",
    "/health_generate": "GET /health has a token generated where none was lately",
    "/load": "GET /metrics tells how many requests run and wait",
    "/slots": "GET /metrics tells how many requests run and wait",
    "/version": "platform version tells it",
    "/server_info": "platform describe model/NAME tells how a model is served",
    "/get_server_info": "platform describe model/NAME tells how a model is served",
    "/get_model_info": "GET /v1/models tells what is served",
    "/props": "GET /v1/models tells what is served",
    "/reset_prefix_cache": "A cache_salt of a request's own keeps it from what others have cached",
    "/flush_cache": "A cache_salt of a request's own keeps it from what others have cached",
    "/sleep": _MANIFEST,
    "/wake_up": _MANIFEST,
    "/is_sleeping": _MANIFEST,
    "/pause": _MANIFEST,
    "/resume": _MANIFEST,
    "/abort_request": "A request ends when its client closes the connection",
    "/abort_requests": "A request ends when its client closes the connection",
    "/start_profile": _MANIFEST,
    "/stop_profile": _MANIFEST,
    "/collective_rpc": "Code and calls of requests are never run",
}
"""By path; each reason is a sentence without its full stop."""


def refusal(path: str) -> EndpointNotServed | None:
    """The answer to a path of the table, or to one below it."""
    known = path.rstrip("/")
    while known and known not in ABSENT:
        known = known.rpartition("/")[0]
    return EndpointNotServed(f"{known} is not served here. {ABSENT[known]}.") if known else None
