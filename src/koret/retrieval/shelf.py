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
        self._memory, self._at = torch.from_numpy(memory), -memory.ctypes.data % LINE

    def take(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of this size, not initialised, at a cache line; of other memory where the shelf is full."""
        place = torch.empty(0, dtype=dtype)  # not a view: what is written to one says nothing of the others
        number, at = place.element_size(), self._at
        end = at + math.prod(size) * number
        if end > len(self._memory):
            return torch.empty(size, dtype=dtype)
        self._at = end + -(end - at) % LINE
        stride = torch.empty(size, device="meta").stride()
        return place.set_(self._memory.untyped_storage(), at // number, size, stride)


class ShelfStore:
    """Keeps the memory of shelves that nothing is left on.

    The oldest of it is lent first: where shelves are opened from the fullest to the emptiest, the ends of the last ones
    are never written to, and never taken from the system.
    """

    def __init__(self) -> None:
        self._free: dict[int, np.ndarray] = {}  # by age
        self._made = 0

    def open(self, size: int, places: int) -> Shelf:
        """A shelf for ``places`` tensors of ``size`` bytes in all; of memory that is not twice as large."""
        size += LINE * (places + 1)
        fitting = [age for age, memory in self._free.items() if size <= len(memory) <= 2 * size]
        if fitting:
            age = min(fitting)
            memory = self._free.pop(age)
        else:
            self._free.clear()  # of another time
            age, memory = self._made, np.empty(size, np.uint8)
            self._made += 1
        lent = memory.view()
        weakref.finalize(lent, self._free.__setitem__, age, memory).atexit = False
        return Shelf(lent)


class SumOnShelf(torch.autograd.Function):
    """a + x, written to a place on a shelf."""

    @staticmethod
    def forward(ctx, a: Tensor, x: Tensor, shelf: Shelf) -> Tensor:
        """a and x of one shape -> the same."""
        return torch.add(a, x, out=shelf.take(a.shape, a.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, gradient, None


class NormOnShelf(torch.autograd.Function):
    """The norm of a + x over its last dimension (Ba et al. 2016, arXiv 1607.06450); all that it keeps is on a shelf."""

    @staticmethod
    def forward(ctx, a: Tensor, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, shelf: Shelf) -> Tensor:
        """a and x (T, C), weight and bias (C,) -> (T, C)."""
        total = torch.add(a, x, out=shelf.take(a.shape, a.dtype))
        y, *found = torch.native_layer_norm(total, weight.shape, weight, bias, epsilon)
        ctx.save_for_backward(total, weight, bias, *(shelf.take(part.shape, part.dtype).copy_(part) for part in found))
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, bias, mean, factor = ctx.saved_tensors
        wanted = [any(ctx.needs_input_grad[:2]), *ctx.needs_input_grad[2:4]]
        backward = torch.ops.aten.native_layer_norm_backward
        found, *rest = backward(gradient.contiguous(), total, weight.shape, mean, factor, weight, bias, wanted)
        return found, found, *rest, None, None
