"""CUDA graphs: the kernels of a whole call, launched in one go."""

from radio_fast.graphs.cache import GraphCache, resolve_graphs

__all__ = ["GraphCache", "resolve_graphs"]
