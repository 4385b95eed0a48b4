"""Errors as HTTP responses, in OpenAI's format."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from .errors import RequestError
from .writers import Error, ErrorBody


def error_response(error: RequestError) -> JSONResponse:
    """The response for a request that is refused or has failed."""
    return _response(error.status, str(error), error.param, error.code, error.headers)


def error_body(error: RequestError) -> ErrorBody:
    """The same for an event of a stream."""
    return _body(error.status, str(error), error.param, error.code)


def _request_error(_: Request, error: RequestError) -> JSONResponse:
    return error_response(error)


def _http_exception(_: Request, error: HTTPException) -> JSONResponse:
    """Starlette's own: no such path, or not with this method."""
    return _response(error.status_code, f"{error.detail}.", headers=error.headers)


def _unexpected(_: Request, error: Exception) -> JSONResponse:
    return _response(500, "Something went wrong. See the server's log.")


EXCEPTION_HANDLERS = {RequestError: _request_error, HTTPException: _http_exception, Exception: _unexpected}


def _response(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(_body(status, message, param, code).model_dump(), status, headers)


def _body(status: int, message: str, param: str | None, code: str | None) -> ErrorBody:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return ErrorBody(error=Error(message=message, type=kind, param=param, code=code))
