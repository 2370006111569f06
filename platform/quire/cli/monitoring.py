"""`platform monitoring`: dashboards for Grafana, and alert rules and a scrape for Prometheus."""

from __future__ import annotations

from pathlib import Path

import click

from quire.cli.outcome import CommandFailed, ExitCode
from quire.cli.session import notice


@click.command(short_help="Dashboards for Grafana, and alert rules for Prometheus.")
@click.argument("name", required=False)
@click.option(
    "--to", "folder", type=click.Path(file_okay=False, path_type=Path), help="Write every file into this folder."
)
def monitoring(name: str | None, folder: Path | None) -> int:
    """Print the file NAME, or write all of them with --to; without either, list their names.

    Dashboards are imported into Grafana as they are; alerts.yaml is a rule file of Prometheus, and prometheus.yaml
    a configuration that scrapes the router and loads it.
    """
    from urllib.parse import urlsplit

    from quire.cli.session import connect
    from quire.monitoring import files

    client = connect(start=False)
    base = (client.get("/v1/ping").get("router") or {}).get("baseUrl") if client.is_running() else None
    made = files(urlsplit(base).netloc) if base else files()
    if name is not None and folder is not None:
        raise CommandFailed("NAME and --to exclude each other", "leave one out", ExitCode.USAGE)
    if name is not None and name not in made:
        raise CommandFailed(f"there is no file '{name}'", f"one of {', '.join(made)}", ExitCode.USAGE)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for each, text in made.items():
                (folder / each).write_text(text)
                notice(f"wrote {folder / each}")
        except OSError as error:
            raise CommandFailed(
                f"{error.filename or folder} cannot be written: {error.strerror or error}",
                "name a folder that you may write to",
                ExitCode.UNEXPECTED,
            ) from error
    elif name is not None:
        print(made[name], end="")
    else:
        print("\n".join(made))
    return ExitCode.OK
