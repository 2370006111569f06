"""`platform chat`: a conversation with a served model, in the terminal.

What the model says goes to stdout, as plain text, and nothing else does: prompts of line editing, thoughts,
notices and errors are for the terminal. Each answer is a stream of its own; Ctrl-C cancels it, which closes its
connection, and the server stops.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quire.cli.outcome import CommandEnded, CommandFailed, ExitCode, Interrupted, report, usage_error
from quire.cli.session import notice
from quire.cli.target import choose, failed, open_server, target_options

if TYPE_CHECKING:
    from quire.chat import Conversation
    from quire.remote import RemoteError, Server

PROMPT, MORE = ">>> ", "... "
BLOCK = '"""'
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
HELP = """\
/help          this
/reset         forget what was said
/system TEXT   set the system text; without a text there is none
/model NAME    go on with another model
/retry         ask the last question again
/save FILE     write the conversation as JSON
/exit          leave, as Ctrl-D does
A line that ends in \\ goes on in the next one; a line that begins with \"\"\" begins a text that ends with \"\"\".
Ctrl-C stops an answer. A line that begins with a blank is no command."""


@click.command(short_help="Talk to a served model.")
@click.argument("model", required=False)
@target_options
@click.option("-m", "--message", metavar="TEXT", help="Ask one question, print the answer and end; - reads stdin.")
@click.option("--system", metavar="TEXT", help="What the model is told first.")
@click.option(
    "--temperature", type=float, metavar="T", help="0 is greedy. Left out, as the rest: the model's own."
)
@click.option("--top-p", type=float, metavar="P")
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="Longest answer.")
@click.option("--seed", type=int, metavar="N", help="The same seed gives the same answer.")
@click.option(
    "--reasoning/--no-reasoning", default=True, show_default=True, help="Show what the model thinks, on stderr."
)
def chat(
    model: str | None,
    url: str | None,
    api_key: str | None,
    message: str | None,
    system: str | None,
    temperature: float | None,
    top_p: float | None,
    max_tokens: int | None,
    seed: int | None,
    reasoning: bool,
) -> int:
    """Talk to MODEL, which may be left out where one is served. /help tells what can be typed.

    With --message, or with a text on stdin, one question is asked and its answer printed. Control characters in an
    answer are shown as pictures, so that a model cannot steer the terminal.
    """
    from quire.chat import Conversation
    from quire.remote import RemoteError

    question = _question(message)
    server = open_server(url, api_key)
    given = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    sampling = {name: value for name, value in given.items() if value is not None}
    with asyncio.Runner() as runner:
        try:
            conversation = Conversation(runner.run(choose(server, model)), sampling, system)
            talk = Talk(server, runner, conversation, Screen(reasoning))
            if question is None:
                return talk.go_on()
            if not talk.ask(question):
                raise Interrupted("the answer was cut, and its request aborted")
        except RemoteError as error:
            raise failed(error) from error
        finally:
            server.close()
    return ExitCode.OK


def _question(message: str | None) -> str | None:
    """The one question of a command that asks only one; None for a conversation."""
    if message is None and sys.stdin.isatty():
        return None
    if message is None or message == "-":
        message = sys.stdin.read()
    if not message.strip():
        usage_error("there is no question", "platform chat -m 'What is a quire?'")
    return message


def _may_colour(stream: Any) -> bool:
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


@dataclass(slots=True)
class Screen:
    """Where an answer is shown: text on stdout, thoughts on stderr, dimmed where that is a terminal."""

    shows_thoughts: bool
    dims: bool = field(default_factory=lambda: _may_colour(sys.stderr))
    _thinking: bool = False
    _last: str = "\n"

    def thought(self, text: str) -> None:
        from quire.chat import harmless

        if not self.shows_thoughts:
            return
        if not self._thinking:
            self._thinking = True
            print(DIM if self.dims else "thought: ", end="", file=sys.stderr)
        print(harmless(text), end="", file=sys.stderr, flush=True)

    def text(self, text: str) -> None:
        from quire.chat import harmless

        self.end_thought()
        print(harmless(text), end="", flush=True)
        self._last = text[-1]

    def end_thought(self) -> None:
        if self._thinking:
            self._thinking = False
            print(f"{PLAIN if self.dims else ''}\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        """The next line begins anew."""
        self.end_thought()
        if self._last != "\n":
            print(flush=True)
        self._last = "\n"


@dataclass(slots=True)
class Talk:
    """One conversation with one server. `runner` has the event loop, which is at work while an answer comes."""

    server: Server
    runner: asyncio.Runner
    conversation: Conversation
    screen: Screen

    def ask(self, question: str) -> bool:
        """Ask and show the answer; False where Ctrl-C stopped it. Raises `RemoteError`."""
        try:
            ended = self.runner.run(self._stream(question))
        except KeyboardInterrupt:
            return False
        finally:
            self.screen.end()
        if ended == "length":
            notice("(the answer is cut at its limit of tokens)")
        return True

    async def _stream(self, question: str) -> str:
        ended = ""
        async with aclosing(self.conversation.answer(self.server, question)) as pieces:
            async for piece in pieces:
                match piece.kind:
                    case "thought":
                        self.screen.thought(piece.text)
                    case "text":
                        self.screen.text(piece.text)
                    case "end":
                        ended = piece.text
        return ended

    def go_on(self) -> int:
        """Until the person leaves."""
        read = _reader()
        notice(f"{self.conversation.model} at {self.server.url}; /help tells what can be typed, Ctrl-D leaves")
        while True:
            try:
                line = _read_text(read)
            except EOFError:
                notice("")
                return ExitCode.OK
            except KeyboardInterrupt:
                notice("\n(Ctrl-D leaves)")
                continue
            try:
                if self._takes(line):
                    return ExitCode.OK
            except CommandEnded as error:
                if not isinstance(error, CommandFailed):
                    raise
                report(error.message, error.hint)

    def _takes(self, line: str) -> bool:
        """Do what a line says; True to leave."""
        command = re.fullmatch(r"/([a-z]+)(?:\s+(.*?))?\s*", line, re.DOTALL)
        if command is None:
            if line.strip():
                self._try(line)
            return False
        word, rest = command[1], command[2] or ""
        if word == "exit":
            return True
        known = self._commands().get(word)
        if known is None:
            raise CommandFailed(f"no such command: /{word}", "/help lists them", ExitCode.USAGE)
        known(rest)
        return False

    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "help": lambda _: notice(HELP),
            "reset": lambda _: self._reset(),
            "system": self._system,
            "model": self._model,
            "retry": lambda _: self._retry(),
            "save": self._save,
        }

    def _try(self, question: str) -> None:
        from quire.remote import RemoteError

        try:
            if not self.ask(question):
                notice("(stopped; the conversation goes on)")
        except RemoteError as error:
            raise self._in_words(error) from error

    def _in_words(self, error: RemoteError) -> CommandFailed:
        told = failed(error)
        return CommandFailed(told.message, told.hint or "/retry asks again", told.exit_code)

    def _reset(self) -> None:
        self.conversation.reset()
        notice("(all is forgotten)")

    def _system(self, text: str) -> None:
        self.conversation.system = text or None
        notice("(the system text is set)" if text else "(there is no system text now)")

    def _model(self, name: str) -> None:
        from quire.remote import RemoteError

        if not name:
            notice(f"({self.conversation.model})")
            return
        try:
            self.conversation.model = self.runner.run(choose(self.server, name))
        except RemoteError as error:
            raise self._in_words(error) from error
        notice(f"({name} answers from now on)")

    def _retry(self) -> None:
        question = self.conversation.again()
        if question is None:
            raise CommandFailed("nothing was asked yet", None, ExitCode.USAGE)
        self._try(question)

    def _save(self, name: str) -> None:
        if not name:
            raise CommandFailed("no file is named", "/save FILE", ExitCode.USAGE)
        path = Path(name).expanduser()
        try:
            self.conversation.save(path)
        except OSError as error:
            raise CommandFailed(f"cannot write {path}: {error.strerror}", None, ExitCode.UNEXPECTED) from error
        notice(f"(saved to {path})")


def _reader() -> Callable[[str], str]:
    """Reads a line after a prompt: with editing and history where stdout is a terminal, too."""
    if sys.stdout.isatty():
        import readline  # noqa: F401 - `input` edits lines with it

        return input

    def plain(prompt: str) -> str:
        # `input` would write the prompt among the answers.
        print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    return plain


def _read_text(read: Callable[[str], str]) -> str:
    """One text: a line, lines that end in a backslash, or a block between triple quotes. Raises EOFError."""
    line = read(PROMPT)
    if line.lstrip().startswith(BLOCK):
        lines = [line.lstrip()[len(BLOCK) :]]
        while not lines[-1].rstrip().endswith(BLOCK):
            lines.append(read(MORE))
        lines[-1] = lines[-1].rstrip()[: -len(BLOCK)]
        return "\n".join(lines).strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read(MORE))
    return "\n".join(lines)
