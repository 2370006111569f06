"""What stands behind the question mark of a list: read, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping

from quire.errors import InvalidRequest


def known(query: Mapping[str, str], names: tuple[str, ...]) -> None:
    """Raise `InvalidRequest` for a parameter that is none of `names`."""
    for name in query:
        if name not in names:
            shown = "".join(c if c.isprintable() else "?" for c in name[:64])
            there = f"There are: {', '.join(names)}." if names else "This path takes none."
            raise InvalidRequest(f"Unknown parameter '{shown}'. {there}", param=shown)


def whole(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    """A number of 1 to `most`. Raises `InvalidRequest`."""
    given = query.get(name)
    if given is None:
        return default
    if not (given.isascii() and given.isdecimal() and len(given) < 10 and 1 <= int(given) <= most):
        raise InvalidRequest(f"'{name}' must be a whole number of 1 to {most}.", param=name)
    return int(given)


def descends(query: Mapping[str, str]) -> bool:
    """Whether the last one is listed first, as is the default. Raises `InvalidRequest`."""
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("'order' must be 'asc' or 'desc'.", param="order")
    return order == "desc"


def cursor(query: Mapping[str, str], prefix: str) -> str | None:
    """The id that a page begins behind. Raises `InvalidRequest`."""
    after = query.get("after")
    if after is not None and not after.startswith(prefix):
        raise InvalidRequest(f"'after' must be an id, which begins with '{prefix}'.", param="after")
    return after
