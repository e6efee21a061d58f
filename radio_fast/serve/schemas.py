"""Requests and answers as the OpenAPI description shows them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_IMAGES = 256
MAX_ADAPTORS = 16

ImageText = Annotated[
    str,
    Field(
        min_length=1,
        description="An image file (JPEG, PNG, WebP, …) as a data URI or bare base64. URLs are not fetched.",
    ),
]


class EmbeddingsRequest(BaseModel):
    """OpenAI's, with images in place of texts."""

    input: ImageText | Annotated[list[ImageText], Field(min_length=1, max_length=MAX_IMAGES)]
    model: str = Field(description="One of GET /v1/models: the model's name, or NAME:ADAPTOR for an adaptor's summary.")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="base64: little-endian float32, as OpenAI's."
    )
    dimensions: Annotated[int, Field(strict=True, ge=1)] | None = Field(
        None, description="The summary's own width; it can't be cut."
    )
    user: str | None = Field(None, description="Ignored.")


class EmbedQuery(BaseModel):
    """Of /embed. What is not of these is an error: a word misspelt would go unnoticed."""

    model_config = ConfigDict(extra="forbid")

    output: Literal["summary", "features", "both"] = "summary"
    adaptor: list[str] = Field(
        [], description="'backbone' or adaptors' names; the backbone by default.", max_length=MAX_ADAPTORS
    )
    format: Literal["json", "safetensors", "npy"] | None = Field(
        None, description="json, of summaries alone, is their default; safetensors that of features. npy: one array."
    )
    resolution: str | None = Field(
        None,
        pattern="^[1-9][0-9]{0,4}(x[1-9][0-9]{0,4})?$",
        description="Pixels, 432 or 384x512 (HEIGHTxWIDTH), that fit a batch; the server's own by default.",
    )
    deadline: float | None = Field(None, gt=0, description="Seconds, at most the server's own.")


class EmbeddingItem(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    prompt_tokens: int = Field(description="Patches of all images.")
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"]
    data: list[EmbeddingItem]
    model: str
    usage: Usage


class ModelItem(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelItem]


class Seconds(BaseModel):
    """Where the time went: decoding, waiting for a batch, the model, all of it."""

    decode: float
    wait: float
    compute: float
    total: float


class ImageItem(BaseModel):
    index: int
    height: int = Field(description="Pixels that the model saw.")
    width: int
    grid: tuple[int, int] = Field(description="Rows and columns of features.")
    summary: dict[str, list[float]] = Field(description="By output: backbone, or an adaptor's name.")
    seconds: Seconds


class EmbedAnswer(BaseModel):
    model: str
    images: list[ImageItem]


class Health(BaseModel):
    status: str


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    model_config = ConfigDict(json_schema_extra={"description": "Every error has this form."})

    error: ErrorDetail
