"""`platform quickstart MANIFEST`: apply, wait, and have one answer streamed; what `make quickstart` runs.

The request is an ordinary one to the OpenAI-compatible API, sent with the standard library, so that what is
shown is what any client gets.
"""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from typing import Any
from urllib.parse import urlsplit

import click

from quire import endpoint
from quire.cli.change import read, run_apply
from quire.cli.outcome import CommandFailed, ExitCode, interruptible, spelled
from quire.cli.render import curl_trust
from quire.cli.session import connect, seconds

QUESTION = "What is PagedAttention?"
MAX_TOKENS = 200


@click.command(short_help="Serve a manifest's model and ask it one question.")
@click.argument("manifest", metavar="PATH")
@click.option("--question", default=QUESTION, show_default=True, help="What the model is asked.")
@click.option(
    "--timeout",
    metavar="DURATION",
    callback=seconds,
    default="10m",
    show_default=True,
    help="How long to wait for the model.",
)
def quickstart(manifest: str, question: str, timeout: float) -> int:
    """Apply a manifest, then ask its first model one question through the OpenAI-compatible API."""
    files, parsed = read((manifest,), ())
    names = [item.resource.metadata.name for item in parsed.resources if item.resource.kind == "Model"]
    if not names:
        raise CommandFailed(f"{manifest} declares no model", "use manifests/quickstart.yaml", ExitCode.INVALID)
    client = connect(wakes=True)
    code = run_apply(client, {"files": files}, waits=True, timeout=timeout)
    if code != ExitCode.OK:
        return code
    with interruptible(f"the answer was cut; model/{names[0]} stays served. To stop it: platform down"):
        endpoints = client.get(f"/v1/objects/model/{names[0]}")["status"]["endpoints"]
        base, model = endpoints["openai"], endpoints["modelNames"][0]
        print(f"\n> {question}", flush=True)
        for piece in chat(base, model, question, endpoints.get("certificate")):
            print(piece, end="", flush=True)
    print("\n\nTry next")
    for line in next_commands(endpoints, names[0], manifest):
        print(f"  {spelled(line)}")
    return ExitCode.OK


def next_commands(endpoints: Mapping[str, Any], name: str, manifest: str) -> list[str]:
    """What to type after the first answer."""
    return [
        "platform get",
        f"platform describe model/{name}",
        f"platform plan {manifest}",
        f"platform logs model/{name}",
        f"curl -s{curl_trust(endpoints)} {endpoints['openai']}/models",
        "platform down",
    ]


def chat(base: str, model: str, question: str, certificate: str | None) -> Iterator[str]:
    """The text of a streamed chat completion, piece by piece. Anything but a whole answer is `CommandFailed`.

    `certificate` is the file that the endpoint's has to be in, where it speaks https.
    """
    url = urlsplit(base)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
    }
    with ExitStack() as stack:
        try:
            asked = stack.enter_context(closing(endpoint.connection(base, 120, certificate)))
            asked.request(
                "POST", f"{url.path}/chat/completions", json.dumps(body), {"content-type": "application/json"}
            )
            answer = asked.getresponse()
            if answer.status != 200:
                raise _failed(
                    f"the endpoint answered {answer.status}: {answer.read(2000).decode(errors='replace')}"
                )
            yield from _pieces(answer)
        except (OSError, http.client.HTTPException) as error:
            raise _failed(f"the request to {base} failed: {error or type(error).__name__}") from error


def _pieces(answer: http.client.HTTPResponse) -> Iterator[str]:
    """Text of the events of a stream that ends with [DONE]."""
    for line in answer:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event: Mapping[str, Any] = json.loads(data)
        if "error" in event:
            raise _failed(f"the stream broke off: {event['error'].get('message')}")
        for choice in event.get("choices", ()):
            yield choice["delta"].get("content") or ""
    raise _failed("the stream ended without [DONE]")


def _failed(message: str) -> CommandFailed:
    sys.stdout.flush()
    return CommandFailed(message, "see: platform logs router", ExitCode.FAILED)
