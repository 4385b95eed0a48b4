"""Why a request is refused or fails, each with its HTTP status.

The engine raises these as well, so nothing here needs the server's libraries. ``http_errors`` turns them into
responses.
"""

from __future__ import annotations

import re
from typing import ClassVar

from ..errors import GlassError


class RequestError(GlassError):
    """A request cannot be answered. Any client may see the message: it names no path of this machine.

    Attributes:
        status: the HTTP status.
        code: OpenAI's error code, where there is one.
        param: the field of the request that is wrong, if one is.
        headers: further headers of the response.
    """

    status: ClassVar[int] = 500
    code: str | None = None
    headers: ClassVar[dict[str, str]] = {}

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class EngineFailed(RequestError):
    """Loading or generating failed, or the engine was closed."""


class BadRequest(RequestError):
    """A field of the request is invalid, or the model cannot take it: its chat template rejects the messages, the
    prompt is too long, a token does not exist."""

    status = 400


class UnknownModel(RequestError):
    """The request names a model that the engine may not serve."""

    status, code = 404, "model_not_found"

    def __init__(self, message: str):
        super().__init__(message, "model")


class QueueFull(RequestError):
    """Too many requests are waiting."""

    status, code, headers = 429, "queue_full", {"Retry-After": "2"}


class BodyTimeout(RequestError):
    """The body took too long to arrive."""

    status, headers = 408, {"Connection": "close"}


class BodyTooLarge(RequestError):
    """The body is larger than the server accepts."""

    status, code, headers = 413, "request_too_large", {"Connection": "close"}


class Forbidden(RequestError):
    """The Host or Origin header is not allowed; ``code`` says which."""

    status = 403

    def __init__(self, message: str, code: str):
        super().__init__(message)
        self.code = code


class InvalidKey(RequestError):
    """The API key is missing or wrong."""

    status, code, headers = 401, "invalid_api_key", {"WWW-Authenticate": "Bearer"}


_PATH = re.compile(r"(?<![\w.])(?:[~.]{0,2}[/\\]|[A-Za-z]:\\)")


def shown_reason(error: Exception) -> str:
    """Why something failed, as any client may see it: the error's own words, unless they name a path."""
    reason = str(error).rstrip(".")
    return f": {reason}." if isinstance(error, GlassError) and not _PATH.search(reason) else ". See the log."
