"""What every command prints on standard output, as `transcripts.txt` has it: plain text, no colour.

What differs from run to run or from machine to machine is replaced by words in capitals. To write the file anew
after a change that is meant, and then look at its difference:

    QUIRE_WRITE_TRANSCRIPTS=1 python -m pytest tests/e2e/test_transcripts.py
"""

from __future__ import annotations

import getpass
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tests.e2e.conftest import ROOT

from quire.cli.program import COMMANDS

if TYPE_CHECKING:
    from tests.e2e.conftest import Platform

GOLDEN = Path(__file__).with_name("transcripts.txt")
ELSEWHERE = {
    "backup": "tests/e2e/test_storage.py; its counts are of the moment",
    "restore": "tests/e2e/test_storage.py",
    "quickstart": "tests/e2e/test_cli.py",
    "doctor": "tests/e2e/test_doctor.py; its words are of the machine",
    "logs": "tests/unit/platform/test_cli_commands.py; its words are the engine's",
    "reference": "docs/reference, which is compared by make check",
    "schema": "the JSON Schema has tests of its own",
    "chat": "tests/e2e/test_chat_and_bench.py",
    "bench": "tests/e2e/test_chat_and_bench.py; its figures are of the moment",
    "completion": "the script is click's",
    "console": "tests/integration/test_console.py; its word is a link",
    "key": "tests/e2e/test_output_shapes.py; a key is drawn",
    "source": "tests/e2e/test_gitops.py; its commits are of the moment",
    "monitoring": "tests/unit/platform/test_monitoring.py",
}
"""Commands without a transcript, and what has their words instead."""
SCRIPT = """\
validate m.yaml
validate bad.yaml -o github   # 3
explain model.spec.residency
explain reason/RolledBack
init other --file -
convert --from vllm "serve acme/model --max-model-len 32k --served-model-name a b"
convert --from vllm "serve acme/model -tp 2 --uvloop"   # 3
get
plan m.yaml --devices one.yaml
diff m.yaml   # 10
apply gateway.yaml m.yaml
apply m.yaml
get
get -o wide
get -o name
get replicas
get revisions
get gateway
describe model/m
explain model/m
export model/m
export model/m --resolved
diff changed.yaml   # 10
plan changed.yaml --devices one.yaml
plan changed.yaml --save kept.json
apply --plan kept.json
apply --plan kept.json   # 5
rollout history model/m
rollout undo model/m --reason 'it was better before'
rollout status model/m   # 5
rollout history model/m
apply changed.yaml   # 5
rollout retry model/m
rollout pause model/m --reason 'a demo'
describe model/m
rollout resume model/m
scale model/m 0
scale model/m --reset
pause model/m --for 2h --reason training
get model/m
resume model/m
rollout restart model/m
wait model/m --for ready
events --for model/m
top
usage
secret set token --from-env TOKEN
secret list
secret delete token
cache list
cache prune --dry-run
daemon status
daemon restart
daemon stop
daemon start
daemon unit
version
delete model/m
get
down --grace 1s
get   # 7
up
down --grace 1s
"""
MANIFEST = """\
apiVersion: quire.dev/v1alpha1
kind: Model
metadata: {{name: m, annotations: {{quire.dev/change-cause: {cause}}}}}
spec:
  source: builtin://tiny
  engine: {{maxModelLen: {length}, kvCache: {{size: 16Mi}}}}
  resources: {{cpu: 1}}
"""
DEVICES = "devices: []\ncpu: {memory: 8Gi, cores: 4}\n"
BAD = "apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {name: m}\nspec: {sauce: builtin://tiny}\n"


def plain(text: str, platform: Platform) -> str:
    """The text without what is not the same everywhere and always."""
    text = re.sub(r"[^\s\"']*/bin/platform", "PLATFORM", text)
    for path, word in ((platform.root, "FOLDER"), (platform.state.runtime, "RUNTIME"), (ROOT, "SOURCE")):
        text = text.replace(str(path), word)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+(Z|\+00:00)", "TIME", text)
    text = re.sub(r"\b[0-9a-f]{12}\b", "HASH", text)
    text = re.sub(r"(127\.0\.0\.1):\d+", r"\1:PORT", text)
    text = re.sub(r"\(pid \d+", "(pid PID", text)
    text = re.sub(r"(?<=Ready  )\d+", "PID", re.sub(r" {2,}", "  ", text))
    text = re.sub(r"\b\d+(s|m|h|d)(\d+(s|m))?(?=\s|$)", "AGE", text)
    text = re.sub(r"about \S+ each", "about AGE each", text)
    text = re.sub(r"[\d.]+ GiB \((90%|free) of [\d.]+ GiB", "SIZE (SHARE of SIZE", text)
    text = re.sub(rf"\bby {re.escape(getpass.getuser())}\b", "by USER", text)
    text = re.sub(r"(asyncScheduling  )\w+", r"\1BOOL", text)
    return "\n".join(line.rstrip() for line in text.splitlines())


def test_every_command_prints_what_its_transcript_has(platform: Platform) -> None:
    platform.write("m.yaml", MANIFEST.format(cause="first", length=1024))
    platform.write("changed.yaml", MANIFEST.format(cause="second", length=512))
    platform.write("one.yaml", DEVICES)
    platform.write("bad.yaml", BAD)
    platform.environment["TOKEN"] = "xyzzy-1234"
    found, used = [], set()
    for line in SCRIPT.splitlines():
        command, _, exits = line.partition("   # ")
        words = [word.strip("\"'") for word in re.findall(r"""'[^']*'|"[^"]*"|\S+""", command)]
        used.add(words[0])
        code = int(exits) if exits.isdigit() else 0
        said = platform.run(*words, code=code).stdout
        assert "\x1b" not in said, command
        assert "xyzzy" not in said, command
        found.append(f"$ platform {command}{f'   # exit {code}' if code else ''}\n{plain(said, platform)}")
    assert used | set(ELSEWHERE) == set(COMMANDS), "a command has no transcript"
    text = "\n\n".join(found) + "\n"
    if os.environ.get("QUIRE_WRITE_TRANSCRIPTS"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()
