"""`platform apply --watch`: manifests are applied again whenever their files change, until Ctrl-C.

What the system tells of files (by way of watchfiles) is a hint and no more: after each, all files are read again.
What they hold together is an *edition*, and only one that differs from the last does anything. So a burst of
writes, a file that is saved by renaming another one onto it, and a save that changes nothing are one apply, or
none. Folders are watched, not files: of a file that was replaced nothing more would be heard. A chat template that
a manifest names as a file belongs to its edition: the control plane reads it at each apply.

There is one loop. `progress.wait` follows a rollout; its sleep is `Watch._pause`, which listens meanwhile and
raises `Edited`: that ends the wait, and a rollout that a newer edition takes the place of is followed no further.
An edition that cannot be applied is reported as apply reports it, and what was followed is followed on.

Nothing is ever deleted: an object that is in no file any more is named, and stays.

Exceptions:

    Edited                 the files hold something else; has the edition
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import watchfiles

from quire.cli import offline, render
from quire.cli.change import announce, changes, finish, hand_over
from quire.cli.outcome import CommandFailed, ExitCode, interruptible, spelled, usage_error
from quire.cli.program import report_client
from quire.cli.progress import POLL_SECONDS, Display, Judge, View, fetch, wait
from quire.cli.session import connect, notice
from quire.client import ClientError, InvalidManifest, Refused
from quire_schemas.manifest import Manifest, Problem
from quire_schemas.manifest_files import TooMany, manifests_below
from quire_schemas.model import Model

STEP_MS = 50
"""How long the library waits for more to tell at once. It counts files that changed, not how often they did."""
QUIET = 2
"""So many times `POLL_SECONDS` without a change, and files are read: until then somebody may still be writing."""
LONGEST_SECONDS = 1.5
"""They are read after this, however busy their folder is."""
RETRY_SECONDS = 0.3
"""Between two questions to a control plane that does not answer."""
LONGEST_RETRY_SECONDS = 5.0
"""Between two to one that answers that it cannot now: each pause is twice the last one, up to this."""
NAMED = 4
"""Files of an edition that a line names."""


class Edited(Exception):
    """The files hold something else than they did."""

    def __init__(self, edition: Edition) -> None:
        super().__init__()
        self.edition = edition


@dataclass(frozen=True, slots=True)
class Edition:
    """What all files hold at one moment. Two are equal where applying them is the same."""

    files: tuple[tuple[str, str], ...] = ()
    """Name and text; none where one of them cannot be read."""
    problems: tuple[Problem, ...] = ()
    templates: tuple[tuple[str, str | None], ...] = ()
    """Path and SHA-256 of each file that a manifest names; None for one that cannot be read."""
    gone: tuple[str, ...] = ()
    """Paths that were given, and are not there, or are folders without a manifest."""
    manifest: Manifest = field(default_factory=Manifest, compare=False)

    def objects(self) -> dict[str, str]:
        """Key of each object -> its file."""
        return {str(each.key): each.file for each in self.manifest.resources}

    def changed_from(self, before: Edition) -> list[str]:
        """The files in which this one differs."""
        texts, templates = dict(before.files), dict(before.templates)
        files = [name for name, text in self.files if texts.get(name) != text]
        return files + [name for name, held in self.templates if templates.get(name, held) != held]


def look(paths: Sequence[str]) -> Edition:
    """What the files hold now."""
    there = [path for path in paths if _holds(path)]
    files, manifest = offline.load(there) if there else ([], Manifest())
    named = dict.fromkeys(
        file
        for each in manifest.resources
        if isinstance(each.resource, Model)
        if (file := each.resource.spec.tokenizer.chat_template_file) is not None
    )
    return Edition(
        tuple((file["name"], file["text"]) for file in files),
        tuple(manifest.problems),
        tuple((file, _digest(Path(file))) for file in named),
        tuple(path for path in paths if path not in there),
        manifest,
    )


def _holds(path: str) -> bool:
    """Whether there is something to read: a file, or a folder with a manifest."""
    if not os.path.isdir(path):
        return os.path.exists(path)
    try:
        return any(True for _ in manifests_below(Path(path)))
    except (OSError, TooMany):
        return True  # reading it says why it cannot be


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    except OSError:
        return None


def folders(paths: Sequence[str], edition: Edition) -> frozenset[str]:
    """The folders in which a change may be one of the edition: those of all files, also where a link leads, and
    all below a folder that was given. What is not there is waited for in the folder above."""
    files = [Path(name) for name in (*paths, *dict(edition.files), *dict(edition.templates))]
    wanted = {place.parent for file in files for place in (Path(os.path.abspath(file)), file.resolve())}
    for path in map(Path, paths):
        if path.is_dir():
            wanted.update(_below(path.resolve()))
    return frozenset(str(_there(folder)) for folder in wanted)


def _below(folder: Path) -> Iterator[Path]:
    """A folder and all in it but what is hidden, of which manifests are not read either."""
    for place, names, _ in os.walk(folder):
        names[:] = [name for name in names if not name.startswith(".")]
        yield Path(place)


def _there(folder: Path) -> Path:
    return next((each for each in (folder, *folder.parents) if each.is_dir()), Path("/"))


def _known_by(paths: frozenset[str]) -> frozenset[tuple[str, int, int]]:
    found = []
    for path in paths:
        with suppress(OSError):
            status = os.stat(path)
            found.append((path, status.st_dev, status.st_ino))
    return frozenset(found)


class Files:
    """Paths that were given to apply, and what the system tells of them."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        self._folders: frozenset[tuple[str, int, int]] = frozenset()
        """Those that are listened to. The system knows them by their numbers: another folder of the same name is
        another one."""
        self._hints: Generator[set[tuple[Any, str]], None, None] | None = None

    def read(self) -> Edition:
        """What they hold now; `changed` tells of whatever comes later. Raises `CommandFailed` where the system
        lets nobody watch them."""
        while True:
            edition = look(self.paths)
            wanted = folders(self.paths, edition)
            if _known_by(wanted) == self._folders:
                return edition
            with suppress(FileNotFoundError):  # one that has just gone: the next look knows
                self._listen(wanted)

    def changed(self) -> bool:
        """Whether anything near them changed; waits for it for `POLL_SECONDS`, and if so until it is over."""
        if self._hints is None:
            time.sleep(POLL_SECONDS)
            return True
        if not next(self._hints):
            return False
        latest, quiet = time.monotonic() + LONGEST_SECONDS, 0
        while quiet < QUIET and time.monotonic() < latest:
            quiet = 0 if next(self._hints) else quiet + 1
        return True

    def _listen(self, wanted: frozenset[str]) -> None:
        if self._hints is not None:
            self._hints.close()
        self._hints, self._folders = None, frozenset()
        known = _known_by(wanted)  # before it listens: whatever is put there since is another one
        hints = watchfiles.watch(
            *sorted(wanted),
            watch_filter=None,
            debounce=round(POLL_SECONDS * 1000),
            step=STEP_MS,
            rust_timeout=round(POLL_SECONDS * 1000),
            yield_on_timeout=True,
            recursive=False,
            ignore_permission_denied=True,
        )
        try:
            next(hints)  # from here on it listens
        except FileNotFoundError:
            raise
        except (OSError, RuntimeError) as error:  # the latter is the library's own, which it does not export
            raise CommandFailed(
                f"the files cannot be watched: {error}",
                "name fewer folders, raise fs.inotify.max_user_watches, or set WATCHFILES_FORCE_POLLING=1",
                ExitCode.UNEXPECTED,
            ) from error
        self._hints, self._folders = hints, known


def refuse(paths: Sequence[str]) -> None:
    """End with exit code 2 where one of the paths is nothing that can change and be read again, and with 3 where
    one is not there: a name that is wrong would be waited for forever."""
    for path in paths:
        if path == "-":
            usage_error(
                "--watch cannot watch standard input (-), which is read once",
                "write the manifests to a file and watch that: kustomize build DIR > all.yaml",
            )
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            usage_error(
                f"--watch cannot watch {path}, which is no file and no folder", "write what it holds to a file"
            )
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        _, manifest = offline.load(missing)
        raise InvalidManifest([problem.as_dict() for problem in manifest.problems])


def watch(paths: Sequence[str], *, waits: bool, timeout: float, take_ownership: bool) -> NoReturn:
    """Apply what the files hold now, and whatever they come to hold. Ends with Ctrl-C, or as `refuse` says."""
    if not paths:
        offline.load(())  # which says so
    refuse(paths)
    Watch(Files(paths), waits=waits, timeout=timeout, take_ownership=take_ownership).run()


class Watch:
    """Applies what `files` hold, follows that for `timeout` seconds where it `waits`, and does so again after each
    change."""

    def __init__(self, files: Files, *, waits: bool, timeout: float, take_ownership: bool) -> None:
        self._files = files
        self._more = {"takeOwnership": True} if take_ownership else {}
        self._waits, self._timeout = waits, timeout
        self._seen = Edition()
        self._objects: dict[str, str] = {}
        """Of the last edition that was applied, each with its file."""
        self._targets: Mapping[str, Judge] = {}
        """What is followed now, until `_deadline`."""
        self._generations: dict[str, int] = {}
        self._changes = False
        self._told: set[str] = set()
        """Objects of which it was said where requests go."""
        self._deadline = 0.0
        self._display = Display.on_stderr()
        self._said = ""
        """The last that was said of a control plane that does not answer; empty while it does."""
        self._pauses = _pauses()
        """Before each further try of an edition that was not taken."""

    def run(self) -> NoReturn:
        """Until Ctrl-C, which is `Interrupted`, or `CommandFailed`."""
        with interruptible("nothing was applied, and nothing that runs was stopped"):
            edition = self._seen = self._files.read()
        while True:
            taken = self._deal(edition)
            edition = self._next(edition, taken=taken)

    # ── an edition ────────────────────────────────────────────────────────────────────────────────────────

    def _deal(self, edition: Edition) -> bool:
        """Apply an edition, or say why it cannot be. False where that may change: it is to be tried again."""
        if edition.problems:
            report_client(InvalidManifest([problem.as_dict() for problem in edition.problems]))
            return True
        if not edition.files:
            notice(f"there is no manifest now: {_listed(edition.gone)}")
            self._name_what_left(edition)
            return True
        body = {"files": [{"name": name, "text": text} for name, text in edition.files], **self._more}
        try:
            answer = hand_over(connect(wakes=True), body)
        except ClientError as error:
            if not _may_pass(error):
                self._hear()
                report_client(error)
                return True
            self._miss(error)
            return False
        self._hear()
        self._take(answer)
        self._name_what_left(edition)
        return True

    def _take(self, answer: View) -> None:
        """Follow what was applied, in place of what was followed before."""
        before = self._generations
        self._generations = {item["key"]: item["generation"] for item in answer["results"]}
        for key in self._targets:
            now = self._generations.get(key)
            if now is None or now != before[key]:
                what = "it is in no manifest here any more" if now is None else f"generation {now} is in its place"
                notice(f"{key}  generation {before[key]} is followed no further: {what}")
        self._changes = changes(answer) or (self._changes and bool(self._targets))
        targets = announce(answer)
        if self._waits:
            self._targets, self._display = targets, Display.on_stderr()
            self._deadline = time.monotonic() + self._timeout

    def _name_what_left(self, edition: Edition) -> None:
        here, names = edition.objects(), dict(edition.files)
        for key, file in self._objects.items():
            if key not in here:
                why = f"is in {file} no more" if file in names else f"was in {file}, which is gone"
                notice(spelled(f"{key}  {why}: it stays as it is; to stop it: platform delete {key}"))
        self._objects = here

    # ── between two ───────────────────────────────────────────────────────────────────────────────────────

    def _next(self, edition: Edition, *, taken: bool) -> Edition:
        """The edition to deal with next: another one, or the same once more where it was not `taken`."""
        with interruptible("no longer watching; what was applied goes on"):
            if not taken:
                try:
                    self._sleep(next(self._pauses))
                except Edited as found:
                    return found.edition
                return edition
            while True:
                try:
                    if self._targets:
                        self._follow()
                    notice(
                        f"watching {_listed(self._files.paths)}; Ctrl-C ends that, and what was applied goes on"
                    )
                    while True:
                        self._pause(POLL_SECONDS)
                except Edited as found:
                    return found.edition
                except ClientError as error:
                    if not _may_pass(error):
                        raise
                    self._miss(error)

    def _follow(self) -> None:
        """Show a rollout until its end. Raises `Edited`, and `ClientError` where nobody answers."""
        client = connect()  # after a `down` it is not for a mere look to start everything again
        with interruptible(
            f"detached: the rollout continues. Follow with: platform wait {' '.join(self._targets)}"
        ):
            while self._said:
                self._sleep(RETRY_SECONDS)
                fetch(client, f"/v1/objects/{next(iter(self._targets))}")
                self._hear()
            left = max(self._deadline - time.monotonic(), 0.0)
            results = wait(client, self._targets, timeout=left, display=self._display, sleep=self._pause)
        self._targets = {}
        told = self._told.issuperset(results)
        if finish(results, self._timeout, changed=self._changes and not told) == ExitCode.OK:
            self._told.update(results)

    def _pause(self, _: float) -> None:
        """Sleep for `POLL_SECONDS`, and raise `Edited` if the files hold something else than before."""
        if not self._files.changed():
            return
        edition = self._files.read()
        if edition == self._seen:
            return
        before, self._seen = self._seen, edition
        self._display.release()
        if changed := edition.changed_from(before):
            notice(f"changed: {_listed(changed)}")
        if gone := [path for path in edition.gone if path not in before.gone]:
            notice(f"gone: {_listed(gone)}")
        raise Edited(edition)

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._pause(POLL_SECONDS)

    # ── a control plane that comes and goes ───────────────────────────────────────────────────────────────

    def _miss(self, error: ClientError) -> None:
        """Say, once, that nobody answers, or why it cannot be now."""
        if not isinstance(error, Refused):  # a look at a socket costs nobody anything
            self._pauses = _pauses()
        if error.message != self._said:
            self._said = error.message
            self._display.release()
            report_client(error)
            notice("it is asked again until it answers, and the files are watched meanwhile")

    def _hear(self) -> None:
        self._pauses = _pauses()
        if self._said:
            self._said = ""
            notice("control plane  answers again")


def _pauses() -> Iterator[float]:
    seconds = RETRY_SECONDS
    while True:
        yield seconds
        seconds = min(2 * seconds, LONGEST_RETRY_SECONDS)


def _may_pass(error: ClientError) -> bool:
    """Whether asking again may be answered otherwise. Of what was refused with a reason only an edit may be, but
    for an object that somebody else has just changed, or that is being deleted."""
    return not isinstance(error, Refused) or error.status >= 500 or error.code == "conflict"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {render.count(len(names) - NAMED, 'more file')}"
