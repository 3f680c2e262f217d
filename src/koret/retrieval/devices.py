"""Tensors on their way to a device that works on its own while the program goes on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PINNED = {"cuda"}  # types of devices that copy from pinned memory alone without holding the program up


def send(x: Tensor | np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``x``, of the CPU, on ``device``; a copy is queued there behind the work before it, and not waited for.

    A CUDA copy from memory that may be paged out can wait for that work (CUDA Runtime API, "API synchronization
    behavior"), so the numbers go by way of pinned memory, which torch keeps for the next copy.
    """
    x = torch.as_tensor(x, dtype=dtype)  # before it is pinned: a copy that converts takes memory of its own
    return (x.pin_memory() if device.type in PINNED else x).to(device, non_blocking=True)
