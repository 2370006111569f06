"""What the admin API answers when it cannot do what was asked: one table for its handlers and its spans.

ApiError      an answer that is not a success
"""

from __future__ import annotations

from typing import Any

from litestar.exceptions import HTTPException

from quire_operators.store import StoreError, StoreUnavailable


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
    if isinstance(error, StoreError):
        return ApiError(409, "conflict", error.message, error.hint, exit_code=5)
    if isinstance(error, HTTPException):  # an unknown path, a wrong query parameter, a body that is too large
        code = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}.get(
            error.status_code, "bad_request"
        )
        return ApiError(error.status_code, code, error.detail)
    return ApiError(500, "internal", f"{type(error).__name__}: {error}", "platform logs controlplane")
