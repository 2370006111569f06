"""`platform reference FOLDER`: the reference pages, written from the product itself; --check compares.

Pages: the command line (click's own help), every manifest field and every reason (what `platform explain` prints),
what commands print for programs, what the HTTP API takes and answers (for people, and as the OpenAPI document that
the router serves), the metrics that the router exports, and the spans of a trace. `make docs` writes them,
`make docs-check` fails when a page is not what would be written.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints

import click
from typing_extensions import is_typeddict

from quire.cli.outcome import CommandFailed, ExitCode
from quire.cli.session import notice

WIDTH = 100


@click.command(hidden=True)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--check", is_flag=True, help="Write nothing; fail if a page is not what would be written.")
def reference(folder: Path, check: bool) -> int:
    """Write the reference pages into FOLDER: commands, manifests, reasons, output, HTTP API, metrics, spans."""
    pages = {
        "cli.md": cli_page(),
        "manifest.md": manifest_page(),
        "reasons.md": reasons_page(),
        "api.md": api_page(),
        "output.md": output_page(),
        "metrics.md": metrics_page(),
        "spans.md": spans_page(),
        "openapi.json": openapi_page(),
    }
    if check:
        stale = [name for name, text in pages.items() if _read(folder / name) != text]
        if stale:
            raise CommandFailed(f"stale in {folder}: {', '.join(stale)}", "make docs", ExitCode.UNEXPECTED)
        return ExitCode.OK
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        (folder / name).write_text(text)
        notice(f"wrote {folder / name}")
    return ExitCode.OK


def _read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


def _head(title: str) -> list[str]:
    return [f"# {title}", "", "Written by `make docs`; edit the source it comes from.", ""]


def cli_page() -> str:
    """Every command's help, and the exit codes."""
    from quire.cli.program import COMMANDS, cli

    lines = _head("Command line")
    root = click.Context(cli, info_name="platform", terminal_width=WIDTH, help_option_names=["-h", "--help"])
    lines += ["```", cli.get_help(root), "```", ""]
    for name in COMMANDS:
        command = cli.get_command(root, name)
        if command is None or command.hidden:
            continue
        context = click.Context(command, info_name=name, parent=root, terminal_width=WIDTH)
        lines += [f"## platform {name}", "", "```", command.get_help(context), "```", ""]
        for part, inner in command.commands.items() if isinstance(command, click.Group) else ():
            below = click.Context(inner, info_name=part, parent=context, terminal_width=WIDTH)
            lines += [f"### platform {name} {part}", "", "```", inner.get_help(below), "```", ""]
    lines += ["## Exit codes", "", "| code | meaning |", "|---|---|"]
    lines += [f"| {code.value} | {code.meaning} |" for code in ExitCode]
    return "\n".join(lines) + "\n"


def output_page() -> str:
    """What `-o json` and `-o yaml` print, shape by shape."""
    from quire.cli import shapes

    lines = _head("Output for programs")
    lines += [inspect.cleandoc(shapes.__doc__ or "").partition("\n\n")[2], "", "| command | shape |", "|---|---|"]
    lines += [
        f"| `{command}` | [{shape.__name__}](#{shape.__name__.lower()}) |"
        for command, shape in shapes.ANSWERS.items()
    ]
    lines.append("")
    for shape in vars(shapes).values():
        if not (is_typeddict(shape) and shape.__module__ == shapes.__name__):
            continue
        lines += [
            f"## {shape.__name__}",
            "",
            inspect.getdoc(shape) or "",
            "",
            "| field | type | |",
            "|---|---|---|",
        ]
        for name, kind in get_type_hints(shape, include_extras=True).items():
            optional = get_origin(kind) is NotRequired
            word, said = _spelled(get_args(kind)[0] if optional else kind)
            there = "may be absent. " if optional else ""
            lines.append(f"| `{name}` | {word} | {there}{said} |")
        lines.append("")
    return "\n".join(lines)


def _spelled(kind: Any) -> tuple[str, str]:
    """A field's type for people, and what is said of it."""
    said = ""
    if get_origin(kind) is Annotated:
        kind, *notes = get_args(kind)
        said = " ".join(notes)
    if kind is Any:
        return "any", said
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts), said
    if origin in (Union, UnionType):
        words = [_spelled(part)[0] for part in parts]
        return " or ".join(words), said
    if origin is list:
        return f"list of {_spelled(parts[0])[0]}", said
    if origin is dict or kind is dict:
        return "object", said
    if is_typeddict(kind):
        return f"[{kind.__name__}](#{kind.__name__.lower()})", said
    return {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}[
        kind
    ], said


def manifest_page() -> str:
    """What `platform explain` says of every kind, section and field."""
    from quire_schemas.explain import explain
    from quire_schemas.fields import walk
    from quire_schemas.kinds import KINDS

    lines = _head("Manifest fields")
    for name, kind in KINDS.items():
        lines += [f"## {name}", "", "```", explain(name), "```", ""]
        for path, _ in walk(kind):
            dotted = ".".join((name.lower(), *map(str, path)))
            lines += ["```", explain(dotted), "```", ""]
    return "\n".join(lines)


def reasons_page() -> str:
    """Every reason of a condition."""
    from quire.cli.offline import explain_reason
    from quire_operators.status import Reason

    lines = _head("Reasons")
    for reason in Reason:
        lines += ["```", *explain_reason(reason.value), "```", ""]
    return "\n".join(lines)


def api_page() -> str:
    """The fields of each request, by what becomes of them, and every error."""
    from quire.errors import TABLE
    from quire.router.api.absent import ABSENT
    from quire.router.openapi import ENDPOINTS
    from quire_schemas import wire
    from quire_schemas.openai.body import IDLE, WITHOUT_EFFECT
    from quire_schemas.openai.limits import LIMITS
    from quire_schemas.openai.sampling import MAX_SALT

    def idle(fields: Mapping[str, str]) -> list[str]:
        head = ["| accepted without effect | what it is for | taken |", "|---|---|---|"]
        return head + [f"| `{name}` | {purpose} | {IDLE[name].words} |" for name, purpose in fields.items()]

    lines = _head("HTTP API")
    lines += [
        "The same for programs: [openapi.json](openapi.json), which the router serves at `/openapi.json`.",
        "",
        "A sampling field that a request leaves out has the value of the checkpoint's `generation_config.json`, "
        "else OpenAI's default. `builtin://tiny` says `do_sample: false` there, so it is greedy unless the "
        "request gives a `temperature`.",
        "",
        "Fields beyond OpenAI's that are not about sampling:",
        "",
        "- `timeout`: seconds, counted from the arrival of the request. What is not complete by then ends with "
        "the error `timeout`: a 504, or in a stream that has begun its one error event. It shortens "
        "`batching.maxQueueWait` and never lengthens it.",
        "- `priority`: a whole number, lower goes first. Other than 0 it is refused for a model whose "
        "`batching.policy` is not `priority`.",
        f"- `cache_salt`: up to {MAX_SALT} characters. Cached beginnings of prompts are shared only among "
        "requests of the same salt: with one for each tenant, the time of an answer does not tell what others "
        "asked.",
        "",
        "`usage.prompt_tokens_details.cached_tokens` counts the prompt tokens that the prefix cache had. Of `n` "
        "choices, which share their prompt, it counts what was there before the first of them; like "
        "`prompt_tokens` it counts each prompt once.",
        "",
    ]
    for each in ENDPOINTS:
        if each.request is None:
            continue
        honoured = ", ".join(f"`{name}`" for name in each.request.model_fields)
        paths = " and ".join((each.path, *each.aliases))
        lines += [f"## {each.methods[0]} {paths}", "", f"Honoured: {honoured}.", ""]
        if each.refused:
            lines += ["| refused, unless it asks for nothing | why |", "|---|---|"]
            lines += [f"| `{name}` | {refusal.reason} |" for name, refusal in each.refused.items()]
            lines.append("")
        if not each.without_effect:
            lines += ["Nothing is accepted without effect.", ""]
        elif each.without_effect is not WITHOUT_EFFECT:
            lines += [*idle(each.without_effect), ""]
    lines += [
        "## Accepted without effect",
        "",
        "Where nothing else is said above. OpenAI's clients send these few whatever server they speak to: they "
        "are the caller's labels, hints for speed, or name a tier and a keeping of answers of which there is one "
        "here. With the values in the last column they would change nothing of an answer, so they are taken, and "
        "nothing comes of them, but that a Route may go by `user`. Any other value is a 400 that names the field: "
        "`store: true` asks for what is not kept, `service_tier: flex` for another price.",
        "",
        *idle(WITHOUT_EFFECT),
        "",
        "Any other field is a 400 with a guess at what was meant, or nothing where the Gateway's `unknownFields` "
        "is `ignore`.",
        "",
    ]
    body = wire.HttpSettings().max_body_bytes
    lines += ["## Limits", "", "What is above one of them is a 400 that names the field.", ""]
    lines += [
        "| of | at most |",
        "|---|---|",
        f"| a body | the Gateway's `maxBodySize`, {body:,} bytes by default; above it a 413 |",
    ]
    lines += [f"| {limit.what} | {limit.most:,} {limit.of}".rstrip() + " |" for limit in LIMITS]
    lines.append("")
    lines += [
        "## Paths of other servers",
        "",
        "Each is a 404 with the code `endpoint_not_served`, and so is what is below it.",
        "",
        "| path | why not, and what to use instead |",
        "|---|---|",
    ]
    lines += [f"| `{path}` | {reason} |" for path, reason in ABSENT.items()]
    lines.append("")
    lines += ["## Errors", "", 'Body: `{"error": {"message", "type", "param", "code"}}`.', ""]
    lines += ["| status | type | code | x-should-retry |", "|---|---|---|---|"]
    rows = []
    for row in TABLE.values():
        retry = "" if row.retry is None else str(row.retry).lower()
        rows.append(f"| {row.status} | `{row.type}` | {f'`{row.code}`' if row.code else ''} | {retry} |")
    lines += dict.fromkeys(rows)  # several exceptions are one error to a client
    return "\n".join(lines) + "\n"


def openapi_page() -> str:
    """The OpenAPI document, as the router serves it."""
    from quire.router.openapi import as_text

    return as_text()


def metrics_page() -> str:
    """Every metric name, with the note that stands below it in the source."""
    from quire_schemas import signals

    lines = [
        *_head("Metrics"),
        "Counters end in `_total` on the wire. Which names there are besides, and with which",
    ]
    lines += ["labels, is the Gateway's `metrics.compat`.", "", "| metric | note | with `compat: vllm` also |"]
    lines.append("|---|---|---|")
    found = [(getattr(signals, name), note) for name, note in _documented(Path(signals.__file__).read_text())]
    named = [(value, note) for value, note in found if isinstance(value, str)]
    for value, note in named:
        if value.startswith(("quire_", "process_")):
            also = ", ".join(f"`{name}`" for name in signals.VLLM_NAMES.get(value, ()))
            lines.append(f"| `{value}` | {note} | {also} |")
    lines += ["", "## Of vLLM alone", "", "| metric | note |", "|---|---|"]
    lines += [f"| `{value}` | {note} |" for value, note in named if value.startswith("vllm:")]
    lines += ["", "## For a collector of OpenTelemetry", "", "| metric | note |", "|---|---|"]
    lines += [f"| `{value}` | {note} |" for value, note in named if value.startswith(_METERS)]
    return "\n".join(lines) + "\n"


_METERS = ("gen_ai.server.", "gen_ai.client.")


def spans_page() -> str:
    """Every span, event and attribute, with the note that stands below it in the source."""
    from quire_schemas import signals

    found = list(_documented(Path(signals.__file__).read_text()))
    lines = _head("Spans")
    for title, prefixes in (
        ("span", ("SPAN_",)),
        ("event", ("EVENT_",)),
        (
            "attribute",
            ("SERVICE_NAME", "SERVICE_VERSION", "PROCESS_", "SERVER_", "HTTP_", "ERROR_", "GEN_AI_", "QUIRE_"),
        ),
    ):
        lines += [f"| {title} | note |", "|---|---|"]
        lines += [f"| `{getattr(signals, name)}` | {note} |" for name, note in found if name.startswith(prefixes)]
        lines.append("")
    return "\n".join(lines)


def _documented(source: str) -> Iterator[tuple[str, str]]:
    """Each module-level annotated name and the string that follows it, if one does."""
    body = ast.parse(source).body
    for statement, following in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            is_note = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            note = str(following.value.value) if is_note else ""  # type: ignore[attr-defined]
            yield statement.target.id, " ".join(note.split())
