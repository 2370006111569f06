"""The OpenAI-compatible HTTP shapes, a module for each endpoint: what requests and answers may say.

Every field that clients of this kind of server know is in exactly one of three places:

- a field of the endpoint's request, such as `ChatRequest`: it is honoured;
- the endpoint's table of refusals, such as `CHAT_REFUSED`: it asks for something this version does not do. A
  value that asks for nothing (null, an empty list, the default) is let through, any other is a `BadRequest` that
  names the field and the reason;
- `body.WITHOUT_EFFECT`: accepted, and held to `body.IDLE`, the values by which it changes nothing of the answer.
  These describe the caller or the billing, or are hints; what asks for another price, place or keeping is a
  `BadRequest`. An endpoint that writes no text has a shorter list, or none.

Anything else is a `BadRequest` with a guess at what was meant. `read_chat` and its like take the body's bytes and
give a request in which every bound holds, so that nothing behind them checks again.

    BadRequest        the body is not a request we can honour; has `message` and `param`
    └── BadStandIn    nor is the chat request that it stands for, whose field `param` names
"""
