from __future__ import annotations

import threading
from collections import OrderedDict

from torch import Tensor


class TensorCache:
    """Tensors computed once per key, least recently used out first, at most `max_bytes` of them.

    A copied or unpickled model starts with an empty one.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self.entries: OrderedDict[tuple, Tensor] = OrderedDict()
        self.lock = threading.Lock()

    def __reduce__(self):
        return TensorCache, (self.max_bytes,)

    def get(self, key: tuple) -> Tensor | None:
        with self.lock:
            if key in self.entries:
                self.entries.move_to_end(key)
            return self.entries.get(key)

    def put(self, key: tuple, value: Tensor) -> None:
        size = value.untyped_storage().nbytes()
        with self.lock:
            if key in self.entries or size > self.max_bytes:
                return
            self.entries[key] = value
            self.bytes += size
            while self.bytes > self.max_bytes:
                _, old = self.entries.popitem(last=False)
                self.bytes -= old.untyped_storage().nbytes()

    def clear(self) -> None:
        with self.lock:
            self.entries.clear()
            self.bytes = 0
