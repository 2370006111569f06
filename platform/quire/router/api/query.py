"""What stands behind the question mark: read, or refused by name.

`checked` holds for every path of the API, before its route has a look. Clients write a list as `name[]=a&name[]=b`
or as `name=a&name=b`; everything else stands there once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import get_args, get_origin

from pydantic import BaseModel

from quire.errors import InvalidRequest
from quire_schemas.openai.body import shown


def checked(query: Iterable[tuple[str, str]], shape: type[BaseModel] | None, *, ignore_unknown: bool) -> None:
    """Raise `InvalidRequest` for a parameter that is none of `shape`'s, or stands there twice and is no list."""
    lists = {
        name: is_list for name, is_list in _fields(shape) for name in ((name, f"{name}[]") if is_list else (name,))
    }
    seen: set[str] = set()
    for name, _ in query:
        if name in lists:
            if name in seen and not lists[name]:
                raise InvalidRequest(f"The parameter '{name}' stands there twice.", param=name)
            seen.add(name)
        elif not ignore_unknown:
            raise unknown(name, [known for known, _ in _fields(shape)])


def unknown(name: str, names: Collection[str]) -> InvalidRequest:
    """What to say of a parameter that is none of `names`."""
    there = f"There are: {', '.join(names)}." if names else "This path takes none."
    return InvalidRequest(f"Unknown parameter '{shown(name)}'. {there}", param=shown(name))


def _fields(shape: type[BaseModel] | None) -> list[tuple[str, bool]]:
    """Names, and whether they stand for lists."""
    fields = shape.model_fields if shape is not None else {}
    return [
        (name, any(get_origin(kind) is list for kind in (field.annotation, *get_args(field.annotation))))
        for name, field in fields.items()
    ]


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
