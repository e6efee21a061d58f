"""radio-fast serve."""

from __future__ import annotations

import gc
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

import radio_fast
from radio_fast.cli_common import parse_resolution
from radio_fast.models.registry import DEFAULT_VERSION

MISSING = (
    "radio-fast serve needs FastAPI, uvicorn, python-multipart and prometheus-client: pip install 'radio_fast[serve]'"
)
# How OpenMP's threads wait for each other; libgomp and libomp read these when torch loads them.
WAIT_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
KEY = "RADIO_FAST_API_KEY"
LEVELS = ("debug", "info", "warning", "error")


def leave_cores_to_others() -> None:
    """Begin the process anew with OpenMP's threads asleep while they wait, unless the environment says how they do.

    They spin by default. Where HTTP and decoding want the same cores, a thread of the model then waits for another one
    that can't run because of it: on two cores under load, batches took forty times as long.
    """
    if not any(name in os.environ for name in WAIT_SETTINGS):
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def serve(
    version: Annotated[
        str, typer.Argument(metavar="VERSION|FILE", help="A version name, checkpoint file or folder.")
    ] = DEFAULT_VERSION,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    model_name: Annotated[str | None, typer.Option(help="What clients call it (VERSION, or the file's name).")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint file to use for VERSION.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … (a GPU where there is one).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16, bfloat16, int8 (as the file says).")] = None,
    adaptors: Annotated[str | None, typer.Option(help="Adaptors to run too, separated by commas.")] = None,
    resolution: Annotated[
        str | None, typer.Option(help="Pixels (432, 384x512), or 'native': each image's nearest legal size.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Patches in a batch.")] = None,
    max_queue: Annotated[int, typer.Option(min=1, help="Images held at a time; more are answered 429.")] = 1024,
    max_wait_ms: Annotated[float, typer.Option(min=0, help="How long an image waits for others to join it.")] = 5.0,
    max_body_mb: Annotated[float, typer.Option(help="MiB of a request; more is answered 413.")] = 64,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Of an image; more are answered 413.")] = None,
    deadline: Annotated[float, typer.Option(help="Seconds for a request's images; then 504.")] = 30,
    drain_seconds: Annotated[float, typer.Option(min=0, help="For requests in flight, after SIGTERM.")] = 30,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=KEY,
            help="The key that requests need. A command line is seen by others: set it there.",
        ),
    ] = None,
    random_init: Annotated[
        bool, typer.Option(help="Random weights: for trying out; the result has no meaning.")
    ] = False,
    log_level: Annotated[str, typer.Option(help=f"One of {', '.join(LEVELS)}; requests are logged at info.")] = "info",
) -> None:
    """Answer embedding requests over HTTP: /v1/embeddings as OpenAI's, /embed, /docs, and a page to try it on at /.

    SIGTERM and Ctrl-C let the requests in flight finish. One process serves one GPU.
    """
    if api_key is None and KEY in os.environ:  # typer takes an empty one for none
        raise ValueError(f"{KEY} must not be empty; unset it for a server without a key")
    if log_level not in LEVELS:
        raise ValueError(f"--log-level must be one of {', '.join(LEVELS)}, got {log_level!r}")
    try:
        from radio_fast.serve.embedder import Embedder
        from radio_fast.serve.listen import Server, listen
        from radio_fast.serve.server import create_app
    except ImportError as error:
        raise ValueError(f"{MISSING} ({error})") from error

    def load() -> Embedder:
        model = radio_fast.load(
            version,
            checkpoint=checkpoint,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            dtype=dtype,
            adaptor_names=[name for name in (adaptors or "").split(",") if name] or None,
            random_init=random_init,
        )
        limits = {} if max_pixels is None else {"max_pixels": max_pixels}
        embedder = Embedder(
            model,
            max_tokens=max_tokens,
            max_queue=max_queue,
            max_wait_ms=max_wait_ms,
            resolution=parse_resolution(resolution, model) or "native",
            **limits,
        )
        # What is there now stays; a collection that looks at all of it makes every request wait a tenth of a second.
        gc.collect()
        gc.freeze()
        return embedder

    name = model_name or (Path(version).name if Path(version).exists() else version)
    app = create_app(load, model_name=name, api_key=api_key, max_body_bytes=int(max_body_mb * 2**20), deadline=deadline)
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    bound = listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    server = Server(app, drain_seconds=drain_seconds)
    with server.capture_signals():  # before anybody is told that it is there
        typer.echo(f"{name} on http://{shown}:{bound.getsockname()[1]} (Ctrl-C stops it)")
        server.run([bound])
    if app.state.service.failure is not None:
        raise app.state.service.failure
