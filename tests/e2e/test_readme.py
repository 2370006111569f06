"""What README.md shows in the terminal is what the commands print. (`make quickstart` has its own test.)"""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

from tests.e2e.conftest import COMMAND, ROOT

if TYPE_CHECKING:
    from tests.e2e.conftest import Platform

README = (ROOT / "README.md").read_text()
BAD = """\
apiVersion: quire.dev/v1alpha1
kind: Model
metadata: {name: bad}
spec:
  source: builtin://tiny
  paralelism: {tensor: 2}
  engine: {memory: 90.0%, max_model_len: 4096}
  batching: {maxNumSeqs: 8}
  speculative: {method: ngram}
"""


def shown(command: str) -> tuple[str, str]:
    """A whole command line that begins with `command`, and what README shows below it."""
    found = re.search(rf"^\$ ({re.escape(command)}[^\n]*)\n(.*?)(?=^\$ |^```)", README, re.MULTILINE | re.DOTALL)
    assert found is not None, command
    return found[1], found[2]


def test_the_plan_for_a_described_machine_is_as_shown(platform: Platform) -> None:
    line, wanted = shown("platform plan")
    words = [str(COMMAND), *line.split()[1:]]
    done = subprocess.run(words, cwd=ROOT, env=platform.environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == wanted


def test_mistakes_are_shown_as_shown(platform: Platform) -> None:
    platform.write("bad.yaml", BAD)
    line, wanted = shown("platform validate")
    assert platform.run(*line.split()[1:], code=3).stdout == wanted


def test_every_command_in_the_table_exists() -> None:
    from quire.cli.program import COMMANDS

    rows = re.findall(r"^\| (`platform .*?) \|", README, re.MULTILINE)
    named = {word for row in rows for word in re.findall(r"`(?:platform )?([a-z]+)", row)}
    assert len(rows) > 6
    assert named - {"model"} <= set(COMMANDS)
