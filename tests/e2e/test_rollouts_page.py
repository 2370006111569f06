"""docs/rollouts.md, followed from its first command to its last: each prints what is shown, exits as is said."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.e2e.conftest import COMMAND, ROOT

if TYPE_CHECKING:
    from tests.e2e.conftest import Platform

PAGE = (ROOT / "docs" / "rollouts.md").read_text()


def alike(line: str) -> str:
    """A line without what differs from run to run: ages, hashes, and the width of their columns."""
    line = re.sub(r"\b[0-9a-f]{12}\b", "HASH", line)
    line = re.sub(r"\b\d+[smh](\d+[sm])?\b", "AGE", line)
    return re.sub(r" {2,}", "  ", line).rstrip()


# in CI: test_transcripts.py has what these commands print, tests/integration/test_rollouts.py what they do
@pytest.mark.nightly
def test_row_22_every_command_of_the_page_does_what_it_shows(platform: Platform) -> None:
    platform.run("apply", platform.gateway)
    (manifest,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    platform.write("chat.yaml", manifest)
    blocks = "".join(re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL))
    followed = 0
    for part in re.split(r"^\$ ", blocks, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        exits = re.search(r"# exit (\d+)$", command)
        done = subprocess.run(
            command.replace("platform ", f"{COMMAND} ", 1),
            shell=True, cwd=platform.root, env=platform.environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        said = f"$ {command}\n{done.stdout}{done.stderr}\n{platform.logs()}"
        assert done.returncode == (int(exits[1]) if exits else 0), said
        for wanted in shown.splitlines():
            assert alike(wanted) in [alike(line) for line in done.stdout.splitlines()], f"{wanted}\n{said}"
        followed += 1
    assert followed > 15
