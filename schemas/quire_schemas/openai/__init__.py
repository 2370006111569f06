"""The OpenAI-compatible HTTP shapes, a module for each endpoint: what requests and answers may say.

Every field that clients of this kind of server know is in exactly one of three places:

- a field of `ChatRequest`, `CompletionRequest` or `EmbeddingRequest`: it is honoured;
- `CHAT_REFUSED`, `COMPLETION_REFUSED` or `EMBEDDING_REFUSED`: it asks for something this version does not do. A
  value that asks for nothing (null, an empty list, the default) is let through, any other is a `BadRequest` that
  names the field and the reason;
- `body.WITHOUT_EFFECT`: accepted and not looked at. These describe the caller or the billing, not the answer.

Anything else is a `BadRequest` with a guess at what was meant. `read_chat`, `read_completion` and `read_embedding`
take the body's bytes and give a request in which every bound holds, so that nothing behind them checks again.

    BadRequest        the body is not a request we can honour; has `message` and `param`
"""
