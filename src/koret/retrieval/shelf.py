"""Memory for what is kept until the backward pass, side by side and used again by the next step.

The C library leaves holes between tensors of many sizes, a fifth as large as they are and more (forecast.HOLES), and
asks the system for fresh pages where they are large. A shelf is one piece of memory that many tensors are put on; it
comes back to its store when the last of them is gone, and the next shelf is made of it.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch
from torch import Tensor

LINE = 64  # bytes of a cache line


class Shelf:
    """One piece of memory that tensors take places on, one behind the other, none of them ever given back alone."""

    def __init__(self, memory: np.ndarray) -> None:
        """``memory``: bytes, which every tensor on it holds on to."""
        self._memory, self._at, self._end = torch.from_numpy(memory), -memory.ctypes.data % LINE, len(memory)
        self._storage = self._memory.untyped_storage()

    def take(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of this size, not initialised, at a cache line; of other memory where the shelf is full."""
        number, at = dtype.itemsize, self._at
        end = at + math.prod(size) * number
        if end > self._end:
            return torch.empty(size, dtype=dtype)
        self._at = end + -(end - at) % LINE
        place = torch.empty(0, dtype=dtype)  # not a view: what is written to one says nothing of the others
        return place.set_(self._storage, at // number, size, [math.prod(size[n:]) for n in range(1, len(size) + 1)])


class ShelfStore:
    """Keeps the memory of shelves that nothing is left on.

    The oldest of it is lent first: where shelves are opened from the fullest to the emptiest, the ends of the last ones
    are never written to, and never taken from the system.
    """

    def __init__(self) -> None:
        self._free: dict[int, np.ndarray] = {}  # by age
        self._made = 0

    def clear(self) -> None:
        """Let go of all that is kept."""
        self._free.clear()

    def open(self, size: int, places: int) -> Shelf:
        """A shelf for ``places`` tensors of ``size`` bytes in all; of memory that is not twice as large."""
        size += LINE * (places + 1)
        fitting = [age for age, memory in self._free.items() if size <= len(memory) <= 2 * size]
        if fitting:
            age = min(fitting)
            memory = self._free.pop(age)
        else:
            self.clear()  # of another time
            age, memory = self._made, np.empty(size, np.uint8)
            self._made += 1
        lent = memory.view()
        weakref.finalize(lent, self._free.__setitem__, age, memory).atexit = False
        return Shelf(lent)
