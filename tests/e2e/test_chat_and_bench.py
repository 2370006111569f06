"""`platform chat`, also in a terminal of its own, and `platform bench`, against a platform and its router."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from pydantic import ConfigDict, TypeAdapter
from tests.e2e.conftest import COMMAND
from tests.waiting import eventually

from quire.cli import shapes

if TYPE_CHECKING:
    from tests.e2e.conftest import Platform

PARROT = "  engine: {maxModelLen: 1024, kvCache: {size: 64Mi}, runner: scripted, stepTime: 20ms}\n"
QUESTION = "What is PagedAttention?"
LONG = "word " * 200
FAREWELL = "\x04"


@pytest.fixture(scope="module")
def served(shared_platform: Platform) -> Platform:
    """A real model, and one that says what it is asked, a token each 20 ms."""
    platform = shared_platform
    parrot = platform.write("parrot.yaml", platform.model("parrot").read_text().replace(
        "  engine: {maxModelLen: 1024, kvCache: {size: 16Mi}}\n", PARROT
    ))  # fmt: skip
    platform.run("apply", platform.gateway, platform.model("m"), parrot)
    return platform


@pytest.fixture(scope="module")
def base(served: Platform) -> str:
    return served.base_url("m")


def piped(platform: Platform, text: str, *args: str) -> subprocess.CompletedProcess[str]:
    """A command with `text` on its standard input."""
    return subprocess.run(
        [COMMAND, *args],
        input=text,
        capture_output=True,
        text=True,
        env=platform.environment,
        timeout=60,
        check=False,
    )


def in_flight(base: str) -> float:
    """Requests that the router is at work on."""
    with urllib.request.urlopen(base.removesuffix("/v1") + "/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return sum(float(n) for n in re.findall(r"^quire_requests_in_flight\{[^}]*\} (\S+)$", text, re.M))


class Terminal:
    """A command whose standard streams are a terminal."""

    def __init__(self, platform: Platform, *args: str, **environment: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [COMMAND, *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_controlling_terminal,
            cwd=platform.root,
            env={**platform.environment, "TERM": "xterm", **environment},
        )
        os.close(slave)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, words: str, seconds: float = 30) -> str:
        """What is shown up to `words`, from where the last call ended."""
        deadline = time.monotonic() + seconds
        while words not in self.shown:
            assert time.monotonic() < deadline, f"{words!r} is not in {self.shown!r}"
            if select.select([self._master], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self._master, 65536).decode(errors="replace")
                except OSError:  # the other side is gone
                    assert words in self.shown, f"{words!r} is not in {self.shown!r}"
        found, _, self.shown = self.shown.partition(words)
        return found

    def ask(self, text: str, end: str = ">>> ") -> str:
        """What is shown for a line until the next prompt, without the line itself."""
        self.type(text + "\n")
        found = self.until(end).replace("\r\n", "\n")
        return re.sub(r"\x1b\[\?2004[hl]\r?", "", found).partition("\n")[2]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


def _controlling_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 400, 0, 0))
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def talk(served: Platform) -> Iterator[Terminal]:
    terminal = Terminal(served, "chat", "parrot")
    terminal.until(">>> ")
    yield terminal
    terminal.close()


# ── chat ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_question_is_answered_and_nothing_else_is_printed(served: Platform, base: str) -> None:
    by_name = served.run("chat", "m", "-m", QUESTION, "--temperature", "0")
    assert "PagedAttention" in by_name.stdout
    assert by_name.stderr == ""
    by_url = served.run("chat", "m", "--url", base, "-m", QUESTION, "--temperature", "0")
    assert by_url.stdout == by_name.stdout
    cut = served.run("chat", "m", "-m", QUESTION, "--temperature", "0", "--max-tokens", "3")
    assert by_name.stdout.startswith(cut.stdout.rstrip("\n"))
    assert "limit" in cut.stderr


def test_a_text_on_standard_input_is_the_question(served: Platform) -> None:
    assert piped(served, "two\nlines", "chat", "parrot").stdout == "two\nlines\n"
    assert piped(served, "by a dash", "chat", "parrot", "-m", "-").stdout == "by a dash\n"
    empty = piped(served, "", "chat", "parrot")
    assert (empty.returncode, empty.stdout) == (2, "")
    assert "hint: " in empty.stderr


def test_a_model_cannot_steer_the_terminal(served: Platform) -> None:
    said = piped(served, "\x1b[31mred\x1b]0;title\x07 \x9b2J", "chat", "parrot").stdout
    assert said == "␛[31mred␛]0;title␇ \ufffd2J\n"


def test_what_goes_wrong_is_said_with_a_hint(served: Platform) -> None:
    for words, code, message, hint in (
        (("-m", "hi"), 2, "several models are served", "m, parrot"),
        (("nobody", "-m", "hi"), 8, "no model 'nobody'", "m, parrot"),
        (("m", "-m", "hi", "--temperature", "9"), 6, "'temperature' must be", ""),
    ):
        done = served.run("chat", *words, code=code)
        assert done.stdout == ""
        assert message in done.stderr
        assert hint in done.stderr


def test_a_conversation_in_a_terminal(served: Platform, talk: Terminal) -> None:
    assert talk.ask("hello there") == "hello there\n"
    assert "/save FILE" in talk.ask("/help")
    assert "hint: /help lists them" in talk.ask("/nonsense")
    assert talk.ask(" /help") == " /help\n", "behind a blank it is no command"
    talk.ask("one \\", "... ")
    assert talk.ask("line") == "one \nline\n"
    talk.ask('"""a', "... ")
    talk.ask("", "... ")
    assert talk.ask('block"""') == "a\n\nblock\n"
    assert talk.ask("/retry") == "a\n\nblock\n"
    talk.ask("/system Be brief")
    assert "(saved to talk.json)" in talk.ask("/save talk.json")
    saved = json.loads((served.root / "talk.json").read_text())
    assert [message["role"] for message in saved["messages"]] == ["system", *["user", "assistant"] * 4]
    assert saved["messages"][0]["content"] == "Be brief"
    assert [message["content"] for message in saved["messages"][1::2]] == [
        "hello there", " /help", "one \nline", "a\n\nblock",
    ]  # fmt: skip
    assert "no model 'nobody'" in talk.ask("/model nobody")
    assert "m answers from now on" in talk.ask("/model m")
    talk.ask("/reset")
    talk.ask("/save talk.json")
    assert json.loads((served.root / "talk.json").read_text()) == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief"}],
    }
    talk.type("\x1b[A")
    talk.until("/save talk.json")  # the line before
    # Python looks at signals where it waits for a key: one that comes while a key is shown waits for the next
    eventually(
        lambda: psutil.Process(talk.process.pid).status() == psutil.STATUS_SLEEPING, "it waits for a key", 5
    )
    talk.type("\x03")
    assert "Ctrl-D leaves" in talk.until(">>> ")
    talk.type(FAREWELL)
    assert talk.process.wait(20) == 0


def test_ctrl_c_stops_an_answer_and_its_request_and_not_the_conversation(
    served: Platform, base: str, talk: Terminal
) -> None:
    talk.type(LONG + "\n")
    talk.until("word word word word")  # what was typed is echoed
    talk.until("\n")
    talk.until("word word word")
    assert in_flight(base) == 1
    talk.type("\x03")
    assert "(stopped" in talk.until(">>> ", 2)
    eventually(lambda: in_flight(base) == 0, "the request is aborted", 2)
    assert talk.ask("and now?") == "and now?\n"
    talk.ask("/save cut.json")
    messages = json.loads((served.root / "cut.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert LONG.startswith(messages[1]["content"])
    assert 0 < len(messages[1]["content"]) < len(LONG) / 2, "what was there when it was stopped"
    talk.type("/exit\n")
    assert talk.process.wait(20) == 0


def test_ctrl_c_ends_a_single_question(served: Platform, base: str) -> None:
    asking = served.start("chat", "parrot", "-m", LONG)
    assert asking.stdout is not None
    assert asking.stdout.read(4) == "word"
    asking.send_signal(signal.SIGINT)
    out, err = asking.communicate(timeout=5)
    assert (asking.returncode, out.endswith("\n")) == (130, True)
    assert "its request aborted" in err
    eventually(lambda: in_flight(base) == 0, "the request is aborted", 2)


# ── bench ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", autouse=True)
def _exact() -> None:
    for name, shape in vars(shapes).items():
        if name.startswith("Bench") or name == "Spread":
            shape.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)


def result(path: Path) -> Any:
    """A saved result, held to its shape."""
    found = json.loads(path.read_text())
    TypeAdapter(shapes.Bench).validate_python(found)
    return found


def _runs(bench: subprocess.Popen[str]) -> None:
    """Wait for the first answer that counts."""
    assert bench.stderr is not None
    assert bench.stderr.readline().startswith("concurrency ")


SMALL = ("--input-tokens", "60", "--output-tokens", "8")


def test_a_closed_loop_measures_what_the_server_counts(served: Platform, base: str) -> None:
    before = served.run("bench", "m", "--concurrency", "1,4", "--requests", "5", *SMALL, "--save", "a.json",
                        "--plot", "a.png", "--warmup", "2", "--goodput", "ttft:10s,e2e:1ms")  # fmt: skip
    found = result(served.root / "a.json")
    assert [run["load"] for run in found["runs"]] == ["concurrency 1", "concurrency 4"]
    assert found["tokensBy"] == "usage"
    for run in found["runs"]:
        assert (run["answered"], run["failed"], len(run["rows"])) == (5, 0, 5)
        assert run["inputTokens"] == 5 * 60, "prompts have the wanted length by the server's count"
        assert run["outputTokens"] == 5 * 8
        assert run["goodput"]["share"] == 0
        assert 0 < run["ttft"]["p50"] < run["e2e"]["p50"] < run["seconds"]
        for row in run["rows"]:
            assert row["finishReason"] == "length"
            assert 0 < row["ttft"] < row["e2e"]
            assert row["tpot"] == pytest.approx(sum(row["itl"]) / 7, rel=0.5)
    assert "TTFT" in before.stdout
    assert "10 requests" not in before.stdout
    first = [run["rows"][0]["cachedTokens"] for run in found["runs"]]
    assert first == [0, 0], "no run is helped by the prompts of another"

    picture = (served.root / "a.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    assert width > 1200
    assert height > 400

    served.run("bench", "m", "--url", base, "--concurrency", "4", "--requests", "4", *SMALL, "--save", "b.json")
    compared = served.json("bench", "--compare", "a.json", "b.json")
    TypeAdapter(shapes.BenchComparison).validate_python(compared)
    assert (compared["onlyA"], compared["onlyB"]) == (["concurrency 1"], [])
    assert {each["name"] for each in compared["differences"]} == {"requests", "warmup", "goodput"}
    ratios = {each["name"]: each for each in compared["runs"][0]["figures"]}
    assert ratios["ttft p50"]["a"] == found["runs"][1]["ttft"]["p50"]


def test_an_open_loop_keeps_to_its_schedule(served: Platform) -> None:
    trace = served.write(
        "trace.csv", "arrived_at,num_prefill_tokens,num_decode_tokens\n10,40,4\n10.2,50,6\n10.9,60,8\n"
    )
    printed = served.json("bench", "parrot", "--trace", str(trace), "--speed", "2", "--save", "t.json")
    TypeAdapter(shapes.Bench).validate_python(printed)
    (run,) = result(served.root / "t.json")["runs"]
    assert [row["due"] for row in run["rows"]] == [0.0, 0.1, 0.45]
    assert [row["inputTokens"] for row in run["rows"]] == [40, 50, 60]
    assert [row["outputTokens"] for row in run["rows"]] == [4, 6, 8]
    assert all(0 <= row["sent"] - row["due"] < 1 for row in run["rows"])
    assert {**run, "rows": None} == {**printed["runs"][0], "rows": None}
    assert run["itl"]["mean"] > 0.012, "a token comes each 20 ms"

    served.run(
        *(
            "bench",
            "parrot",
            "--rate",
            "40",
            "--duration",
            "500ms",
            "--endpoint",
            "completions",
            "--save",
            "p.json",
        ),
        *("--input-tokens", "uniform:20:40", "--output-tokens", "lognormal:4:0.5", "--prefix-tokens", "32"),
    )
    (run,) = result(served.root / "p.json")["runs"]
    assert 5 < len(run["rows"]) < 45
    assert all(row["due"] < 0.5 for row in run["rows"])
    assert run["rows"][-1]["cachedTokens"] == 32, "all prompts begin alike"
    assert run["failed"] == 0
    assert run["inputTokens"] == run["inputTokensAsked"]


def test_a_data_set_is_sent_as_it_is(served: Platform) -> None:
    lines = [
        {"messages": [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "kept back"}]},
        {"messages": [{"role": "user", "content": "three"}], "output_tokens": 1},
    ]
    path = served.write("set.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    served.run("bench", "parrot", "--dataset", str(path), "--requests", "3", "--concurrency", "1", "--no-stream",
               "--save", "s.json")  # fmt: skip
    found = result(served.root / "s.json")
    first, second, third = found["runs"][0]["rows"]
    assert (first["finishReason"], second["finishReason"]) == ("stop", "length")
    assert first["outputTokens"] == third["outputTokens"] > second["outputTokens"] == 1
    assert first["ttft"] is None
    assert found["tokensBy"] is None


def test_what_the_server_refuses_ends_it_before_anything_is_measured(served: Platform) -> None:
    refused = served.run("bench", "m", "--extra-body", '{"temperature": 9}', code=6)
    assert "'temperature' must be" in refused.stderr
    assert refused.stdout == ""
    unnamed = served.run("bench", code=2)
    assert "hint: name one of: m, parrot" in unnamed.stderr


def test_without_matplotlib_a_plot_is_refused_before_anything_is_sent(served: Platform) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None; from quire.cli.program import run;"
        "sys.exit(run(['bench', 'm', '--url', 'http://127.0.0.1:9/v1', '--plot', 'x.png']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=served.root, check=False
    )
    assert done.returncode == 2
    assert (
        done.stderr == "error: --plot needs matplotlib, which is not installed\nhint: pip install 'quire[bench]'\n"
    )


def test_ctrl_c_tells_what_was_measured_until_then(served: Platform, base: str) -> None:
    running = served.start(
        *("bench", "parrot", "--concurrency", "2,4", "--requests", "10000", "--save", "cut.json"),
        *("--input-tokens", "30", "--output-tokens", "4"),
    )
    _runs(running)
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=10)
    assert running.returncode == 130
    assert "concurrency 2: " in out
    assert "^C " in err
    found = result(served.root / "cut.json")
    assert found["interrupted"]
    (run,) = found["runs"]
    assert run["answered"] == run["requests"] == len(run["rows"]) > 0
    assert run["unfinished"] == 2
    eventually(lambda: in_flight(base) == 0, "requests are aborted", 2)


def test_what_a_killed_router_cuts_is_counted(served: Platform) -> None:
    """Last of the module: it has the router killed."""
    running = served.start("bench", "parrot", "--concurrency", "4", "--requests", "24", "--input-tokens", "30",
                           "--output-tokens", "8", "--save", "k.json", "--fail-on-errors")  # fmt: skip
    _runs(running)
    (router,) = [process for process in served.processes() if "quire.router" in process.cmdline()]
    router.kill()
    out, err = running.communicate(timeout=60)
    found = result(served.root / "k.json")
    (run,) = found["runs"]
    assert run["requests"] == 24
    assert 4 <= run["failed"] < 24, "its connections break; later ones wait for the next router"
    assert {error["kind"] for error in run["errors"]} <= {
        "connection lost",
        "connection refused",
        "503 service_unavailable",
    }
    assert sum(error["count"] for error in run["errors"]) == run["failed"]
    assert all(row["outputTokens"] == 8 for row in run["rows"] if row["error"] is None)
    assert "Failed" in out
    assert (running.returncode, err.splitlines()[-2]) == (6, f"error: {run['failed']} of 24 requests failed")
