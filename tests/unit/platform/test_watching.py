"""What `apply --watch` holds for one edition, which folders tell of a change, and what it refuses to watch."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from quire.cli.program import run
from quire.cli.watching import Files, folders, look

MODEL = "apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {name: %s}\nspec:\n  source: builtin://tiny\n"


def hears(files: Files) -> bool:
    """Whether a change is told of within a second."""
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        if files.changed():
            return True
    return False


def test_an_edition_is_what_the_files_hold(tmp_path: Path) -> None:
    path, template = tmp_path / "m.yaml", tmp_path / "t.jinja"
    template.write_text("one")
    path.write_text(MODEL % "m" + f"  tokenizer: {{chatTemplateFile: {template}}}\n")
    first = look([str(path)])
    os.utime(path)
    assert look([str(path)]) == first
    assert first.objects() == {"model/m": str(path)}

    template.write_text("two")
    second = look([str(path)])
    assert second != first
    assert second.changed_from(first) == [str(template)]
    template.unlink()
    assert look([str(path)]).changed_from(second) == [str(template)]

    path.write_text("kind: [")
    bad = look([str(path)])
    assert bad.problems
    assert bad.changed_from(second) == [str(path)]
    path.unlink()
    assert look([str(path)]).gone == (str(path),)


def test_folders_are_those_of_files_and_of_what_links_lead_to(tmp_path: Path) -> None:
    real, links, given, elsewhere = (tmp_path / name for name in ("real", "links", "given", "templates"))
    for folder in (real, links, given / "a" / "b", given / ".git" / "c", elsewhere):
        folder.mkdir(parents=True)
    (real / "m.yaml").write_text(
        MODEL % "m" + f"  tokenizer: {{chatTemplateFile: {elsewhere}/not/here/t.jinja}}\n"
    )
    (links / "m.yaml").symlink_to(real / "m.yaml")
    (given / "a" / "n.yaml").write_text(MODEL % "n")
    paths = [str(links / "m.yaml"), str(given), str(tmp_path / "gone" / "too" / "x.yaml")]
    assert folders(paths, look(paths)) == {
        str(each) for each in (tmp_path, real, links, given, given / "a", given / "a" / "b", elsewhere)
    }


def test_what_happens_behind_a_link_is_heard(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "m.yaml").write_text(MODEL % "m")
    (tmp_path / "now").symlink_to("v1")
    files = Files([str(tmp_path / "now")])
    assert set(files.read().objects()) == {"model/m"}
    (tmp_path / "v2").mkdir()
    (tmp_path / "v2" / "o.yaml").write_text(MODEL % "o")
    (tmp_path / "next").symlink_to("v2")
    (tmp_path / "next").rename(tmp_path / "now")  # as a folder is published whole
    assert hears(files)
    assert set(files.read().objects()) == {"model/o"}


def test_a_folder_that_is_put_in_the_place_of_another_is_heard(tmp_path: Path) -> None:
    given = tmp_path / "manifests"
    given.mkdir()
    (given / "m.yaml").write_text(MODEL % "m")
    files = Files([str(given)])
    files.read()
    given.rename(tmp_path / "old")
    given.mkdir()
    (given / "o.yaml").write_text(MODEL % "o")
    assert hears(files)
    assert set(files.read().objects()) == {"model/o"}
    (given / "p.yaml").write_text(MODEL % "p")
    assert hears(files)
    assert set(files.read().objects()) == {"model/o", "model/p"}


@pytest.mark.nightly
def test_files_that_never_rest_are_read_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(MODEL % "m")
    files = Files([str(path)])
    files.read()
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            (tmp_path / "log").write_text("more")
            time.sleep(0.02)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        begun = time.monotonic()
        assert files.changed()
        assert time.monotonic() - begun < 3
    finally:
        over.set()
        writer.join()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["-"], 2, "cannot watch standard input"),
        (["PIPE"], 2, "is no file and no folder"),
        (["ABSENT"], 3, "ABSENT:1:1: error: cannot be read: No such file"),
        ([], 2, "no manifest given"),
        (["--plan", "M"], 2, "a plan that was kept"),
        (["M", "--prune"], 2, "--prune"),
    ],
)
def test_what_cannot_be_watched_is_refused_by_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("M").write_text(MODEL % "m")
    os.mkfifo("PIPE")
    assert run(["apply", "--watch", *words]) == code
    heard = capsys.readouterr()
    assert said in heard.err
    assert "hint:" in heard.err
    assert not heard.out
