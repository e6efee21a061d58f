"""Images out of requests, results into answers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence

import numpy as np
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from safetensors.numpy import save
from torch import Tensor

from radio_fast.serve.errors import ApiError
from radio_fast.serve.schemas import EmbeddingsRequest
from radio_fast.serve.types import Embedding


def image_of_text(text: str, index: int) -> bytes:
    """The file in a data URI or bare base64, the usual or the one of URLs, with or without its padding.

    Raises:
        ApiError: 400 for a URL to fetch and what is no base64, 415 for a data URI of something else.
    """
    param = f"input[{index}]"
    if text[:5].lower() == "data:":
        head, _, text = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise ApiError(400, "invalid_image", f"{param}: a data URI must be data:image/…;base64,…", param=param)
        if not head[5:].lower().startswith("image/"):
            raise ApiError(415, "not_an_image", f"{param}: the data URI is of no image", param=param)
    elif "://" in text[:64]:
        raise ApiError(
            400, "url_not_fetched", f"{param}: URLs are not fetched, send the image as a data URI", param=param
        )
    text = "".join(text.split()).replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        raise ApiError(400, "invalid_image", f"{param}: no data URI and no base64", param=param) from None


def read_request(body: bytearray) -> tuple[EmbeddingsRequest, list[bytes]]:
    """OpenAI's request and its images, whose text is dropped.

    Raises:
        RequestValidationError: as FastAPI's own, of what is no such request.
        ApiError: as `image_of_text`.
    """
    try:
        request = EmbeddingsRequest.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([one | {"loc": ("body", *one["loc"])} for one in found]) from None
    texts, request.input = [request.input] if isinstance(request.input, str) else request.input, ""
    return request, [image_of_text(text, i) for i, text in enumerate(texts)]


def vector(tensor: Tensor) -> np.ndarray:
    """float32, little-endian, as it is sent."""
    return np.ascontiguousarray(tensor.float().numpy(), dtype="<f4")


def embedding_list(results: Sequence[Embedding], output: str, model: str, as_base64: bool) -> bytes:
    """OpenAI's answer."""
    data = []
    for index, result in enumerate(results):
        row = vector(result.outputs[output].summary)
        embedding = base64.b64encode(row.tobytes()).decode() if as_base64 else row.tolist()
        data.append({"object": "embedding", "index": index, "embedding": embedding})
    tokens = sum(rows * columns for rows, columns in (result.grid for result in results))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return _json({"object": "list", "data": data, "model": model, "usage": usage})


def arrays(results: Sequence[Embedding], outputs: Sequence[str], kinds: Sequence[str]) -> dict[str, np.ndarray]:
    """ "0.summary" (S·D,), "0.features" (h, w, D), "0.clip.summary", …: float32."""
    found = {}
    for index, result in enumerate(results):
        for name in outputs:
            prefix = f"{index}." if name == "backbone" else f"{index}.{name}."
            summary, features = result.outputs[name]
            if "summary" in kinds:
                found[f"{prefix}summary"] = vector(summary)
            if "features" in kinds:
                found[f"{prefix}features"] = vector(features).reshape(*result.grid, -1)
    return found


def as_safetensors(found: dict[str, np.ndarray], results: Sequence[Embedding], model: str) -> bytes:
    sizes = {f"{index}.size": f"{result.height}x{result.width}" for index, result in enumerate(results)}
    return save(found, metadata={"model": model} | sizes)


def as_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def as_json(results: Sequence[Embedding], outputs: Sequence[str], model: str) -> bytes:
    images = []
    for index, result in enumerate(results):
        times = result.timings
        images.append(
            {
                "index": index,
                "height": result.height,
                "width": result.width,
                "grid": list(result.grid),
                "summary": {name: vector(result.outputs[name].summary).tolist() for name in outputs},
                "seconds": {part: getattr(times, part) for part in ("decode", "wait", "compute", "total")},
            }
        )
    return _json({"model": model, "images": images})


def server_timing(results: Sequence[Embedding]) -> str:
    """The longest of each part, in milliseconds, as a Server-Timing header has them."""
    parts = ("decode", "wait", "compute", "total")
    return ", ".join(f"{p};dur={1000 * max(getattr(r.timings, p) for r in results):.2f}" for p in parts)


def _json(content: object) -> bytes:
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
