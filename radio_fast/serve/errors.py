"""What a request is refused or fails with: a status, a code for programs and a text for people."""

from __future__ import annotations

import json
import math

from fastapi import HTTPException
from fastapi.responses import Response

from radio_fast.images import ImageError, ImageTooLarge
from radio_fast.serve.types import DeadlineExceeded, EmbedderClosed, QueueFull

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """An answer in OpenAI's form: {"error": {"message", "type", "param", "code"}}.

    `retry_after`: seconds, sent as a whole number of them from 1 on. An HTTPException, as FastAPI lets no other one
    through that is raised while it reads a body.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after: float | None = None
    ):
        headers = {}
        if retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, message, headers)
        self.code = code
        self.param = param

    def response(self) -> Response:
        kind = _TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        error = {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        # In ASCII, as json.dumps has it: half of a surrogate pair, which a message may quote, has no UTF-8.
        return Response(
            json.dumps({"error": error}), self.status_code, dict(self.headers), media_type="application/json"
        )


def client_gone() -> ApiError:
    """For the metrics: nobody is there to read it."""
    return ApiError(499, "client_gone", "the client closed the connection")


def shutting_down() -> ApiError:
    return ApiError(503, "shutting_down", "the server is shutting down", retry_after=1)


def api_error(error: Exception, image: int) -> ApiError | None:
    """The answer for what the embedder failed an image with; None for what is no fault of the request's."""
    if isinstance(error, ImageTooLarge):
        return ApiError(413, "image_too_large", f"image {image} has more pixels than this server takes")
    if isinstance(error, ImageError):  # its text may hold what decoders say of memory and files
        return ApiError(415, "not_an_image", f"image {image} is no readable image")
    if isinstance(error, QueueFull):
        return ApiError(429, "queue_full", "the server is full, try again later", retry_after=error.retry_after)
    if isinstance(error, DeadlineExceeded):
        return ApiError(504, "deadline_exceeded", "the deadline passed before the result was there")
    if isinstance(error, EmbedderClosed):
        return shutting_down()
    return None
