"""What the admin API answers when it cannot do what was asked: one table for its handlers and its spans.

ApiError      an answer that is not a success
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from litestar.exceptions import HTTPException

from quire_operators.database import Deposed
from quire_operators.sqlite import StoreError, StoreUnavailable
from quire_schemas.manifest import Problem
from quire_schemas.resource import Key


class ApiError(Exception):
    """An answer that is not a success."""

    def __init__(
        self, status_code: int, code: str, message: str, hint: str = "", exit_code: int = 1, **extra: Any
    ) -> None:
        super().__init__(message)
        self.status = status_code
        self.body: dict[str, Any] = {
            "error": {"code": code, "message": message, "hint": hint or None, "exitCode": exit_code},
            **extra,
        }


def answer(error: Exception) -> ApiError:
    """What the API answers when `error` ends a request: the one table for its handlers and its spans."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, StoreUnavailable):
        return ApiError(507 if error.full else 503, "store_unavailable", error.message, error.hint, exit_code=7)
    if isinstance(error, Deposed):
        return ApiError(503, "deposed", error.message, error.hint, exit_code=7)
    if isinstance(error, StoreError):
        return ApiError(409, "conflict", error.message, error.hint, exit_code=5)
    if isinstance(error, HTTPException):  # an unknown path, a wrong query parameter, a body that is too large
        code = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}.get(
            error.status_code, "bad_request"
        )
        return ApiError(error.status_code, code, error.detail)
    return ApiError(500, "internal", f"{type(error).__name__}: {error}", "platform logs controlplane")


def invalid(problems: Sequence[Problem]) -> ApiError:
    """Manifests with problems: 422, with each problem's place."""
    number = len(problems)
    return ApiError(
        422,
        "invalid_manifest",
        f"{number} error{'' if number == 1 else 's'}",
        exit_code=3,
        problems=[problem.as_dict() for problem in problems],
    )


def crowded() -> ApiError:
    """There is no descriptor for one more command."""
    return ApiError(
        503,
        "too_many_connections",
        "the control plane has as many connections as it can hold",
        "try again in a moment; `ulimit -Hn` says how many there may be",
        exit_code=7,
    )


def address_in_use(message: str, hint: str) -> ApiError:
    """The router cannot listen there: 409."""
    return ApiError(409, "address_in_use", message, hint, exit_code=6)


def not_found(key: Key) -> ApiError:
    """No such object: 404."""
    return ApiError(404, "not_found", f"there is no {key}", "platform get shows what there is", exit_code=8)
