"""Embeddings over HTTP: OpenAI's /v1/embeddings, /embed with dense maps, health, metrics, a page to try it on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from radio_fast.serve.embedder import Embedder
from radio_fast.serve.errors import ApiError
from radio_fast.serve.gate import METRICS, Gate
from radio_fast.serve.payload import arrays, as_json, as_npy, as_safetensors, embedding_list, read_request
from radio_fast.serve.payload import server_timing as timing_of
from radio_fast.serve.prometheus import Prometheus
from radio_fast.serve.schemas import (
    MAX_IMAGES,
    EmbedAnswer,
    EmbeddingList,
    EmbeddingsRequest,
    EmbedQuery,
    ErrorBody,
    Health,
    ModelList,
)
from radio_fast.serve.service import Service
from radio_fast.serve.types import Embedding
from radio_fast.version import __version__

PAGE = Path(__file__).parent / "page"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
ERRORS = {
    400: "The request is wrong; the message says what would be right",
    401: "The key is missing or wrong (of a server that has one)",
    404: "No such model, adaptor or path",
    408: "The body took too long to arrive",
    413: "The body or an image is too large, or there are too many images",
    415: "No image, or no multipart or JSON body",
    429: "Full: try again after Retry-After seconds",
    500: "The model failed",
    503: "Loading, or shutting down",
    504: "The deadline passed",
}
JSON_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": EmbeddingsRequest.model_json_schema()}},
    }
}
IMAGES_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["images"],
                    "additionalProperties": False,
                    "properties": {
                        "images": {
                            "type": "array",
                            "minItems": 1,
                            "maxItems": MAX_IMAGES,
                            "items": {"type": "string", "format": "binary"},
                            "description": "Image files: JPEG, PNG, WebP, …",
                        }
                    },
                }
            }
        },
    }
}
BINARY = {"schema": {"type": "string", "format": "binary"}}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    found: dict[int | str, dict[str, Any]] = {s: {"model": ErrorBody, "description": ERRORS[s]} for s in statuses}
    for status in found.keys() & {429, 503}:
        found[status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    return found


def create_app(
    embedder: Embedder | Callable[[], Embedder],
    *,
    model_name: str,
    api_key: str | None = None,
    max_body_bytes: int = 64 * 2**20,
    deadline: float = 30.0,
) -> FastAPI:
    """The application, for uvicorn or another ASGI server; `radio-fast serve` runs it.

    Args:
        embedder: what embeds, or a function that makes it. It is called, and the embedder warmed up, once the server
            runs: /health/live answers 200 at once, /health/ready when that is done. One made here is closed at the end.
        model_name: what clients call the model; NAME:ADAPTOR is the adaptor's summary.
        api_key: `Authorization: Bearer KEY` is then needed for all but health, the page and the description.
        max_body_bytes: of a request; all bodies together may have eight times as much.
        deadline: seconds for a request's images, from when they have arrived; a request may ask for less.

    Raises:
        ValueError: an empty name, an empty or no ASCII key, a limit that is not positive.
    """
    if not model_name:
        raise ValueError("model_name must not be empty")
    if api_key is not None and not (api_key.strip() and api_key.isascii() and api_key.isprintable()):
        raise ValueError("api_key must be printable ASCII, and not empty; None is for a server without one")
    for name, value in (("max_body_bytes", max_body_bytes), ("deadline", deadline)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a positive number, got {value}")
    service = Service(embedder, model_name, deadline)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="radio_fast",
        version=__version__,
        summary="Image embeddings by NVIDIA's RADIO models",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    app.add_exception_handler(HTTPException, _plain_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _unexpected)
    # For the description; it is the gate that checks the key.
    guarded = [] if api_key is None else [Depends(HTTPBearer(auto_error=False, description="The server's key."))]
    prometheus = Prometheus(service)
    _add_health(app, service)
    _add_metrics(app, prometheus, guarded)
    _add_page(app)
    _add_embedding(app, service, guarded)
    prometheus.paths = frozenset(route.path for route in app.routes)
    app.openapi = partial(_description, app)
    app.add_middleware(Gate, service=service, prometheus=prometheus, api_key=api_key, max_body_bytes=max_body_bytes)
    return app


def _description(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # FastAPI's own form of what is a 400 here
        app.openapi_schema = schema
    return app.openapi_schema


def _add_metrics(app: FastAPI, prometheus: Prometheus, guarded: list) -> None:
    @app.get(
        METRICS,
        tags=["health"],
        dependencies=guarded,
        response_class=PlainTextResponse,
        responses=_errors(401),
    )
    def metrics() -> Response:
        """For Prometheus."""
        return Response(prometheus.render(), media_type=prometheus.content_type)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health/live", tags=["health"])
    @app.head("/health/live", include_in_schema=False)
    async def live() -> Health:
        """The process answers."""
        return Health(status="ok")

    @app.get("/health/ready", tags=["health"], responses=_errors(503))
    @app.head("/health/ready", include_in_schema=False)
    async def ready() -> Health:
        """The model is loaded and warm, and the server not told to stop."""
        if reason := service.why_not_ready:
            raise ApiError(503, "not_ready", reason, retry_after=1)
        return Health(status="ok")


def _add_page(app: FastAPI) -> None:
    names = {"/": "index.html", "/docs": "docs.html"} | {f"/{n}": n for n in ("page.js", "page.css", "docs.js")}
    for path, name in names.items():
        app.add_api_route(path, partial(_file, name), methods=["GET", "HEAD"], include_in_schema=False)

    @app.head("/openapi.json", include_in_schema=False)
    async def description() -> None:
        """FastAPI's own is for GET alone."""


async def _file(name: str) -> Response:
    headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}
    return FileResponse(PAGE / name, headers=headers)


def _add_embedding(app: FastAPI, service: Service, guarded: list) -> None:
    parsing = asyncio.Lock()  # holds the interpreter, and memory: one at a time

    @app.get("/v1/models", tags=["embeddings"], dependencies=guarded, responses=_errors(401, 503))
    async def models() -> ModelList:
        """The names that `model` may have."""
        names = [service.name_of(output) for output in service.outputs]
        return ModelList(
            object="list",
            data=[{"id": name, "object": "model", "created": 0, "owned_by": "radio_fast"} for name in names],
        )

    @app.post(
        "/v1/embeddings",
        tags=["embeddings"],
        dependencies=guarded,
        openapi_extra=JSON_BODY,
        response_model=EmbeddingList,
        responses=_errors(400, 401, 404, 408, 413, 415, 429, 500, 503, 504),
    )
    async def embeddings(request: Request) -> Response:
        """Summaries of images, in OpenAI's form."""
        by_name = {service.name_of(output): output for output in service.outputs}
        if "json" not in request.headers.get("content-type", "").lower():
            raise ApiError(415, "not_json", "the body must be application/json")
        body = bytearray()
        async for part in request.stream():
            body += part
        async with parsing:
            asked, images = await asyncio.to_thread(read_request, body)
        del body
        if asked.model not in by_name:
            raise ApiError(
                404, "model_not_found", f"model must be one of {', '.join(by_name)}, got {asked.model[:80]!r}",
                param="model",
            )  # fmt: skip
        output = by_name[asked.model]
        if asked.dimensions not in (None, width := service.width_of(output)):
            raise ApiError(400, "invalid_value", f"dimensions must be {width}", param="dimensions")
        results = await service.embed(request, images)
        as_base64 = asked.encoding_format == "base64"
        content = await _encoded(results, embedding_list, results, output, asked.model, as_base64)
        return Response(content, media_type="application/json", headers={"Server-Timing": timing_of(results)})

    @app.post(
        "/embed",
        tags=["embeddings"],
        dependencies=guarded,
        openapi_extra=IMAGES_BODY,
        response_model=EmbedAnswer,
        responses={200: {"content": {"application/octet-stream": BINARY}}}
        | _errors(400, 401, 404, 408, 413, 415, 429, 500, 503, 504),
    )
    async def embed(request: Request, query: Annotated[EmbedQuery, Query()]) -> Response:
        """Summaries and dense features of image files. One file that fails fails the request; the error names it.

        safetensors: "0.summary" (S·D,), "0.features" (rows, columns, D), "0.ADAPTOR.summary", …; float32. npy: one
        image's one array.
        """
        embedder = service.embedder
        names = list(dict.fromkeys(query.adaptor or ["backbone"]))
        for name in names:
            if name not in service.outputs:
                legal = ", ".join(service.outputs)
                raise ApiError(
                    404, "adaptor_not_found", f"adaptor must be of {legal}, got {name[:80]!r}", param="adaptor"
                )
        if query.deadline is not None and query.deadline > service.deadline:
            raise ApiError(
                400, "invalid_value", f"deadline must be at most {service.deadline:g} seconds", param="deadline"
            )
        dense = query.output != "summary"
        kinds = ("summary", "features") if query.output == "both" else (query.output,)
        form = query.format or ("safetensors" if dense else "json")
        if form == "json" and dense:
            raise ApiError(400, "invalid_value", "features come as safetensors or npy, not as json", param="format")
        resolution = _size(query.resolution, embedder)
        several = ApiError(
            400, "invalid_value", "npy holds one array: one image, adaptor and output; take safetensors", param="format"
        )
        if form == "npy" and not len(names) == len(kinds) == 1:
            raise several
        images = await _uploaded(request)
        if form == "npy" and len(images) != 1:
            raise several
        results = await service.embed(request, images, deadline=query.deadline, features=dense, resolution=resolution)
        headers = {"Server-Timing": timing_of(results)}
        if form == "json":
            content = await _encoded(results, as_json, results, names, service.model_name)
            return Response(content, media_type="application/json", headers=headers)

        def encoded() -> bytes:
            found = arrays(results, names, kinds)
            return as_npy(*found.values()) if form == "npy" else as_safetensors(found, results, service.model_name)

        headers["Content-Disposition"] = f'attachment; filename="embedding.{form}"'
        content = await _encoded([] if dense else results, encoded)
        return Response(content, media_type="application/octet-stream", headers=headers)


async def _encoded(results: list[Embedding], function: Callable[..., bytes], *arguments: Any) -> bytes:
    """In a thread, but where that would take longer than the summary of one image does."""
    return function(*arguments) if len(results) == 1 else await asyncio.to_thread(function, *arguments)


class _Parser(MultiPartParser):
    """Knows whether the closing boundary was there; a body cut short would only have fewer files."""

    ended = False

    def on_end(self) -> None:
        self.ended = True


async def _uploaded(request: Request) -> list[bytes]:
    """The files of the parts named images."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise ApiError(415, "not_multipart", "the body must be multipart/form-data with files named 'images'")
    parser = _Parser(request.headers, request.stream(), max_files=MAX_IMAGES, max_fields=0)
    parser.spool_max_size = 2**62  # the body is small enough for memory; the disk would be slower
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError) as error:
        raise ApiError(400, "invalid_multipart", str(getattr(error, "message", error))[:200]) from None
    try:
        if not parser.ended:
            raise ApiError(400, "invalid_multipart", "the multipart body has no end")
        images = [part for name, part in form.multi_items() if name == "images" and isinstance(part, UploadFile)]
        if not images or len(images) != len(form.multi_items()):
            raise ApiError(400, "no_images", "the body must have files named 'images', and nothing else")
        return [await image.read() for image in images]
    finally:
        await form.close()


def _size(text: str | None, embedder: Embedder) -> tuple[int, int] | None:
    """Held to one batch, as the embedder would compute a larger image all the same."""
    if text is None:
        return None
    height, _, width = text.partition("x")
    size = int(height), int(width or height)
    patches = size[0] * size[1] // embedder.model.patch_size**2
    if patches > embedder.max_tokens:
        raise ApiError(
            400, "invalid_value", f"resolution {text} has {patches} patches, at most {embedder.max_tokens} are allowed",
            param="resolution",
        )  # fmt: skip
    return size


async def _plain_error(request: Request, error: HTTPException) -> Response:
    if not isinstance(error, ApiError):  # the framework's own: no such path, method, or no readable body
        own = ApiError(error.status_code, "not_found" if error.status_code == 404 else "invalid_request", error.detail)
        own.headers |= error.headers or {}
        error = own
    return error.response()


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    """One thing that is wrong, rather not that a list is no string; what came is not quoted."""
    wrong = min(error.errors(), key=lambda one: one["type"] == "string_type")
    param = next((part for part in wrong["loc"][1:2] if isinstance(part, str)), None)
    return ApiError(400, "invalid_value", f"{param or 'body'}: {wrong['msg']}", param=param).response()


async def _unexpected(request: Request, error: Exception) -> Response:
    return ApiError(500, "internal_error", "internal error; the server's log says more").response()
