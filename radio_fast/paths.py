"""Where this package keeps files of its own."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """RADIO_FAST_CACHE, else `radio_fast` under XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("RADIO_FAST_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "radio_fast"
