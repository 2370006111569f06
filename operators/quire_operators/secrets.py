"""Secrets by reference: a manifest says where a value is, never what it is.

    secretRef: NAME    <state directory>/secrets/NAME, mode 0600, written by `platform secret set`
    file: PATH         a file of the user, read when the value is needed
    env: NAME          a variable of the control plane's environment

A value is read at the moment of its use and kept nowhere else.

Exceptions:

    SecretNotFound         has message and hint; neither ever holds a value
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire_schemas.model import SECRET_NAME

MAX_SECRET = 64 * 1024


class SecretNotFound(Exception):
    """A reference leads to no value."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def without_tokens(environ: Mapping[str, str], specs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What may be handed down to engines and the router, and so to files: `environ` without the variables that a
    model's `sourceAuth` takes its token from, or an access policy its keys. `specs` are the resolved specs of all
    objects."""
    references = [auth for spec in specs if (auth := spec.get("sourceAuth"))]
    for spec in specs:
        references += [source for key in spec.get("keys", ()) if (source := key.get("valueFrom"))]
    tokens = {reference["env"] for reference in references if reference.get("env")}
    return {name: value for name, value in environ.items() if name not in tokens}


@dataclass(frozen=True, slots=True)
class Secrets:
    """The values behind references. `folder` need not exist; `environ` is the control plane's."""

    folder: Path
    environ: Mapping[str, str]

    def value(self, reference: Mapping[str, Any]) -> str:
        """What a reference (secretRef, file or env) leads to, without the line break at its end. Raises
        `SecretNotFound`."""
        if (name := reference.get("secretRef")) is not None:
            return self._read(
                self._path(name),
                f"there is no secret {name}",
                f"platform secret set {name}   reads it from the terminal or from a pipe",
            )
        if (file := reference.get("file")) is not None:
            return self._read(Path(file), f"{file} cannot be read", "give the path of a file that holds the value")
        variable = reference["env"]
        found = self.environ.get(variable, "").strip()
        if not found:
            raise SecretNotFound(
                f"{variable} is not set in the environment of the control plane (process {os.getpid()})",
                "it has the environment of the shell that started it, in part; "
                f"platform secret set NAME --from-env {variable}, and refer to it by secretRef",
            )
        return found

    def names(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if re.fullmatch(SECRET_NAME, path.name))

    def put(self, name: str, value: str) -> None:
        """Keep a value, mode 0600."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._path(name)
        temporary = path.with_name(f".{name}.new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "w") as file:
                file.write(value)
            os.replace(temporary, path)
        except OSError:  # a full disk: half a value is none
            temporary.unlink(missing_ok=True)
            raise

    def remove(self, name: str) -> bool:
        """Forget a value; gives whether there was one."""
        try:
            self._path(name).unlink()
        except FileNotFoundError:
            return False
        return True

    def _path(self, name: str) -> Path:
        if not re.fullmatch(SECRET_NAME, name):
            raise SecretNotFound(
                f"{name!r} is no name of a secret", "use lower-case letters, digits, dots and dashes"
            )
        return self.folder / name

    @staticmethod
    def _read(path: Path, message: str, hint: str) -> str:
        try:
            with path.open("rb") as file:
                value = file.read(MAX_SECRET).decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SecretNotFound(f"{message}: {getattr(error, 'strerror', None) or 'not text'}", hint) from error
        if not value or "\n" in value:
            raise SecretNotFound(f"{message}: it should hold one line", hint)
        return value


NO_SECRETS = Secrets(Path("/nonexistent"), {})
"""Where every reference leads nowhere."""
