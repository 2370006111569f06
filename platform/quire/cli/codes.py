"""What `platform explain` says of the codes of API errors. Their status, and whether trying again can help, is
told from the table of errors itself (`quire.errors`); these are the words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from quire.errors import TABLE

MEANING: Final[Mapping[str, str]] = {
    "thread_unsupported_request": "No conversation is kept at /v1/messages: send the whole of it, without thread.",
    "context_length_exceeded": "Prompt and max_tokens together are longer than the model's context: shorten "
    "one, or raise spec.engine.maxModelLen.",
    "no_chat_template": "The checkpoint has none: use /v1/completions, or set spec.tokenizer.chatTemplateFile.",
    "template_refused": "The model's chat template does not take these messages; the message has its words.",
    "template_failed": "The model's chat template does not get through with these messages.",
    "host_not_allowed": "The Host or Origin is not this server's: the Gateway's spec.hosts and "
    "spec.cors.allowOrigins name those that are.",
    "not_found": "There is no such path, or nothing that is kept by this id. A base URL ends with /v1.",
    "endpoint_not_served": "Other servers have the path; the message says why not here, and what to use instead.",
    "model_not_found": "No model has this name: GET /v1/models lists the names.",
    "method_not_allowed": "The path does not take this method; the message has those that it takes.",
    "request_timeout": "The body was not there within the Gateway's spec.timeouts.body.",
    "conflict": "What is there does not allow it, and the message says what.",
    "request_too_large": "The body is above the Gateway's spec.maxBodySize, or a file above the limit for files.",
    "unsupported_media_type": "Send Content-Type: application/json; for a file, multipart/form-data.",
    "invalid_api_key": "No key, or none that is known or still valid: platform get accesspolicies.",
    "permission_denied": "spec.allow of the key's AccessPolicy has not this model or this operation.",
    "rate_limit_exceeded": "A limit of the key or its AccessPolicy is reached, which the message names.",
    "insufficient_quota": "A budget of the key or its AccessPolicy is spent: platform usage shows all of them.",
    "queue_full": "As many requests wait as spec.batching.maxQueueLength allows: more replicas, or a larger "
    "maxNumSeqs, serve more at once.",
    "memory_short": "The router has no memory for more than what runs: give it more, or let fewer requests wait.",
    "model_unusable": "The tokenizer or chat template of the checkpoint cannot be loaded: platform logs router.",
    "service_unavailable": "No replica is ready, or none is wanted: platform get, platform describe model/NAME.",
    "storage_unavailable": "Files, batches and responses cannot be read or written: platform logs router.",
    "storage_full": "The disk of the state directory has no room for files, batches and responses.",
    "engine_unavailable": "Engines ended under the request before anything was sent, and retries are used up.",
    "request_quarantined": "The request ended several engines before its first token: platform logs model/NAME.",
    "engine_died": "The engine ended in the middle of a stream; what came before it holds. Ask again.",
    "timeout": "The request waited longer than allowed, or was not complete in its time; the message says which.",
    "internal_error": "A fault of ours: platform logs router has the details.",
}


def lines(code: str) -> list[str]:
    """What is known of a code of `MEANING`."""
    rows = [row for row in TABLE.values() if row.code == code]
    status = ", ".join(sorted({str(row.status) for row in rows}))
    words = {True: "can help", False: "does not help", None: "is up to the client"}
    again = " or ".join(dict.fromkeys(words[row.retry] for row in rows))
    return [
        f"CODE     {code}",
        f"STATUS   {status} ({rows[0].type})",
        f"AGAIN    trying again {again} (x-should-retry)",
        f"  {MEANING[code]}",
    ]
