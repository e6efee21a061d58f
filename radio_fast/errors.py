from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that can't be used; the message says what is wrong with it."""


class DownloadError(RuntimeError):
    """Weights that could not be fetched; the message says why and what else can be done."""
