from __future__ import annotations

import threading
from collections import OrderedDict

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from radio_fast.ops._state import capturing, settle


def size_of(tensor: Tensor) -> int:
    """The bytes that it keeps; of an opaque tensor, which shows no storage, those of its values."""
    return tensor.nbytes if tensor.is_mkldnn else tensor.untyped_storage().nbytes()


def state_of(*sources: Tensor) -> tuple:
    """Which values the tensors have, as far as torch counts changes: a stamp for `TensorCache`.

    An address alone is another tensor's as soon as this one is freed; a weak reference to its storage, while it is
    kept, is no other's.
    """
    return tuple((StorageWeakRef(t.untyped_storage()), t.data_ptr(), t._version, t.shape) for t in sources)


class TensorCache:
    """Tensors computed from weights, one per key, least recently used out first, at most `max_bytes` of them.

    A stamp says which state of the weights a tensor belongs to; one of another state is replaced. A copied or unpickled
    model starts with an empty cache.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self.entries: OrderedDict[tuple, tuple[tuple, Tensor]] = OrderedDict()
        self.lock = threading.Lock()

    def __reduce__(self):
        return TensorCache, (self.max_bytes,)

    def get(self, key: tuple, stamp: tuple) -> Tensor | None:
        with self.lock:
            found = self.entries.get(key)
            if found is None or found[0] != stamp:
                return None
            self.entries.move_to_end(key)
            return found[1]

    def put(self, key: tuple, stamp: tuple, value: Tensor) -> None:
        if capturing(value.device):
            return  # it belongs to a graph, and is not there before that is replayed
        settle(value)
        size = size_of(value)
        with self.lock:
            if key in self.entries:
                self._drop(key)
            if size > self.max_bytes:
                return
            self.entries[key] = stamp, value
            self.bytes += size
            while self.bytes > self.max_bytes:
                self._drop(next(iter(self.entries)))

    def _drop(self, key: tuple) -> None:
        _, old = self.entries.pop(key)
        self.bytes -= size_of(old)

    def clear(self) -> None:
        with self.lock:
            self.entries.clear()
            self.bytes = 0
