"""`platform backup` and `platform restore`: what they print, refuse, and leave as it was."""

from __future__ import annotations

import fcntl
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.postgres import Postgres
from tests.unit.operators.test_store import change

from quire.cli import main
from quire_operators import backup
from quire_operators.paths import StateDir
from quire_operators.store import Store


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StateDir:
    monkeypatch.setenv("QUIRE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("QUIRE_DATABASE", raising=False)
    state = StateDir(tmp_path / "state")
    state.root.mkdir(mode=0o700)
    return state


def fill(place: Path | sa.URL) -> None:
    with closing(Store(place)) as store:
        store.apply([change()])


def test_a_backup_says_what_is_in_it_and_takes_no_files_place(
    state: StateDir, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kept"
    assert main(["backup", str(file)]) == 6
    assert f"there is no store {state.store}" in capfd.readouterr().err
    assert not state.store.exists()
    fill(state.store)
    assert main(["backup", str(file)]) == 0
    said = capfd.readouterr().out
    assert said.startswith(f"{state.store}: 1 object, 1 revision, 0 replicas, 0 events\nverified: restored into")
    assert file.stat().st_mode & 0o777 == 0o600
    assert main(["backup", str(file)]) == 5
    assert main(["backup", str(tmp_path / "none" / "kept")]) == 6
    assert "cannot write" in capfd.readouterr().err


def test_a_restore_is_refused_while_a_control_plane_runs_and_over_what_is_there(
    state: StateDir, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kept"
    fill(state.store)
    assert main(["backup", str(file)]) == 0
    before = backup.take(state.store, "1").lines
    with open(state.daemon_lock, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["restore", str(file), "--replace"]) == 5
        assert "a control plane runs on" in capfd.readouterr().err
    assert main(["restore", str(file)]) == 5
    assert "is not empty (objects: 1, replicas: 0)" in capfd.readouterr().err
    assert main(["restore", str(tmp_path / "nothing")]) == 6
    assert "hint: name a file that platform backup wrote" in capfd.readouterr().err
    odd = tmp_path / "odd"
    odd.write_bytes(file.read_bytes()[:-90])
    assert main(["restore", str(odd), "--replace"]) == 6
    assert backup.take(state.store, "1").lines == before
    assert main(["restore", str(file), "--replace"]) == 0
    assert "what was there is in" in capfd.readouterr().out
    (aside,) = state.root.glob("before-restore-*.backup")
    assert backup.read(aside).lines == before
    assert backup.take(state.store, "1").lines == before
    state.store.unlink()
    assert main(["restore", str(file), "--replace"]) == 0, "where nothing is, nothing is put aside"
    assert backup.take(state.store, "1").lines == before
    assert [each.name for each in state.root.glob("before-restore-*")] == [aside.name]


def test_a_store_moves_to_a_database_and_the_state_directory_keeps_to_it(
    state: StateDir, tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file, url = tmp_path / "kept", postgres.database()
    fill(state.store)
    assert main(["backup", str(file)]) == 0
    monkeypatch.setenv("QUIRE_DATABASE", url.render_as_string(hide_password=False))
    other = postgres.database()
    fill(other)
    monkeypatch.setenv("QUIRE_DATABASE", other.render_as_string(hide_password=False))
    assert main(["restore", str(file)]) == 5
    assert not state.database.exists(), "what failed binds nobody"
    monkeypatch.setenv("QUIRE_DATABASE", url.render_as_string(hide_password=False))
    with open(state.daemon_lock, "wb") as lock:  # a control plane leads from the file
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["restore", str(file)]) == 5
        assert "a control plane runs on" in capfd.readouterr().err
    assert not state.database.exists()
    assert main(["restore", str(file)]) == 0
    assert backup.take(url, "1").lines == backup.read(file).lines
    assert main(["backup", str(tmp_path / "again")]) == 0
    assert backup.read(tmp_path / "again").lines == backup.read(file).lines
    monkeypatch.delenv("QUIRE_DATABASE")
    capfd.readouterr()
    assert main(["backup", str(tmp_path / "third")]) == 6
    assert "and QUIRE_DATABASE is not set" in capfd.readouterr().err
