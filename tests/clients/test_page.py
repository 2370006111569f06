"""The programs of docs/clients.md, run as they stand there but for the address."""

from __future__ import annotations

import re
import subprocess
from typing import Any, Final

import anthropic
import openai
import pytest
from tests.clients.node import HERE
from tests.clients.server import Server

PAGE: Final = HERE.parent.parent / "docs" / "clients.md"
PROGRAMS: Final = re.findall(r"^```(python|js)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
OF_PAGE: Final = "http://127.0.0.1:8000"


def written(language: str) -> list[str]:
    """The programs in a language."""
    found = [text for kind, text in PROGRAMS if kind == language]
    assert all(OF_PAGE in text for text in found)
    return found


@pytest.mark.parametrize("number", range(len(written("python"))))
def test_programs_in_python(server: Server, capsys: pytest.CaptureFixture[str], number: int) -> None:
    program = written("python")[number].replace(OF_PAGE, server.world.url)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(program, str(PAGE), "exec", dont_inherit=True), names)  # here, as loading a client takes seconds
    for value in names.values():
        client = getattr(value, "root_client", value)
        if isinstance(client, openai.OpenAI | anthropic.Anthropic):
            client.close()
    assert len(capsys.readouterr().out) > 3


@pytest.mark.parametrize("number", range(len(written("js"))))
def test_programs_for_node(server: Server, node_packages: None, number: int) -> None:
    program = written("js")[number].replace(OF_PAGE, server.world.url)
    command = ["node", "--input-type=module", "-e", program]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{program}\n{done.stderr}"
    assert len(done.stdout) > 3
