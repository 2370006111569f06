"""`platform quickstart MANIFEST`: apply, wait, and have one answer streamed; what `make quickstart` runs.

The question is asked as `platform chat` asks it, by an ordinary request to the OpenAI-compatible API, so that what
is shown is what any client gets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import click

from quire.cli.change import read, run_apply
from quire.cli.chat import Screen, Talk
from quire.cli.outcome import CommandFailed, ExitCode, Interrupted, interruptible, spelled
from quire.cli.render import curl_options
from quire.cli.session import connect, seconds

QUESTION = "What is PagedAttention?"
MAX_TOKENS = 200
ANSWER_SECONDS = 600.0


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
    stays = f"the answer was cut; model/{names[0]} stays served. To stop it: platform down"
    with interruptible(stays):
        endpoints = client.get(f"/v1/objects/model/{names[0]}")["status"]["endpoints"]
        print(f"\n> {question}", flush=True)
        if not ask(endpoints, question):
            raise Interrupted(stays)
    print("\nTry next")
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
        f"curl -s{curl_options(endpoints)} {endpoints['openai']}/models",
        "platform down",
    ]


def ask(endpoints: Mapping[str, Any], question: str) -> bool:
    """Have `question` answered and show the answer as it comes; False where Ctrl-C stopped it.

    Anything but a whole answer is `CommandFailed`.
    """
    from quire.chat import Conversation, harmless
    from quire.remote import RemoteError, Server

    conversation = Conversation(endpoints["modelNames"][0], {"temperature": 0, "max_tokens": MAX_TOKENS})
    with asyncio.Runner() as runner:
        try:
            server = Server(endpoints["openai"], certificate=endpoints.get("certificate"), timeout=ANSWER_SECONDS)
            try:
                return Talk(server, runner, conversation, Screen(shows_thoughts=False)).ask(question)
            finally:
                server.close()
        except RemoteError as error:
            raise CommandFailed(
                f"no answer from {endpoints['openai']}: {harmless(error.message)}",
                "see: platform logs router",
                ExitCode.FAILED,
            ) from error
