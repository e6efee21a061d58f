"""Embedding for many concurrent callers: in process (`Embedder`), over HTTP (`server`), on Ray (`ray`)."""
