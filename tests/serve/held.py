"""A worker of a job that can be held in the middle of a file."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from radio_fast.serve.ray import _EmbedFiles


class Held(_EmbedFiles):
    """Beside an image there may be a pipe of its name: whoever decodes the image reads that to its end first."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        engine = self._embedder._engine
        read = engine._read

        def held(source: Any, size_of: Any):
            if isinstance(source, (str, Path)):
                with contextlib.suppress(FileNotFoundError):
                    Path(source).with_suffix(".pipe").read_bytes()
            return read(source, size_of)

        engine._read = held
