"""The models that ship with the product, as checkpoint folders in the Hugging Face format beside this file."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def names() -> tuple[str, ...]:
    """The names that `builtin://` accepts, in alphabetical order."""
    return tuple(sorted(folder.name for folder in _HERE.iterdir() if (folder / "config.json").is_file()))


def path(name: str = "tiny") -> Path:
    """The checkpoint folder of a built-in model.

    Raises LookupError, with the known names in its hint, when no model of that name ships with the product.
    """
    known = names()
    if name not in known:
        raise LookupError(
            f"no built-in model is called {name!r}\nhint: the built-in models are: {', '.join(known)}"
        )
    return _HERE / name
