"""How many tokens fit into memory at a time."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from koret.retrieval.encoder import TextEncoder
from koret.retrieval.processes import Process
from koret.training.gradcache import keep_random_state

SHARE = 0.5  # of the memory that is free may be filled with activations
LEAST = 1024  # tokens at a time, however little is free
PROBE = 64  # tokens of a text that is only there to be counted
ALONE = Process()
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
LARGEST_KEPT = 32 << 20  # bytes: glibc takes no more
FALLBACK = 4 << 30  # bytes taken for free where the system does not say


def count_free_tokens(encoder: TextEncoder, per_token: int, process: Process = ALONE) -> int:
    """Tokens whose activations, ``per_token`` bytes each, fill half of the device's free memory.

    Processes that compute on one machine's CPU share its memory.
    """
    free = read_free_memory(encoder.device) // (process.local_count if encoder.device.type == "cpu" else 1)
    return int(SHARE * free / per_token)


def choose_micro_batch_tokens(room: int, heaviest: int) -> int:
    """Tokens encoded at a time where there is room for so many, and batches have up to ``heaviest``.

    A power of two or half as much again, at least ``LEAST``: a coarse measure, so that a run and the next one cut their
    batches alike. Below ``room``, or just above ``heaviest`` where there is room for that.
    """
    tokens = LEAST
    while (
        larger := tokens * 4 // 3 if _is_half_more(tokens) else tokens * 3 // 2
    ) <= room or tokens < heaviest <= room:
        tokens = larger
    return tokens


def choose_fewer(tokens: int) -> int:
    """The next smaller of the numbers that ``choose_micro_batch_tokens`` gives."""
    return tokens * 2 // 3 if _is_half_more(tokens) else tokens * 3 // 4


def _is_half_more(tokens: int) -> bool:
    """Whether this is half as much again as a power of two."""
    return tokens % 3 == 0


def measure_bytes_per_token(encoder: TextEncoder) -> int:
    """Bytes that a training step keeps for its backward pass per token: counted in two small forward passes.

    The passes differ in the number of texts, so what does not grow with it cancels. Where the model pads, attention
    keeps more for longer texts, and they are as long as texts may be. Adapters, precision, quantised bases and
    gradient checkpointing are counted as they are set up now; no random number is used up.
    """
    length = encoder.max_seq_length
    if encoder.slow_path_reason is None:  # any length that packs without a gap costs the same
        length = PROBE if length >= PROBE else max(1, min(length, PROBE // 4))
    was_training = encoder.model.training
    encoder.model.train()
    try:
        with keep_random_state():
            few, many = (_count_kept(encoder, count, length) for count in (1, 3))
    finally:
        encoder.model.train(was_training)
    return max(1, (many - few) // (2 * length))


def _count_kept(encoder: TextEncoder, texts: int, length: int) -> int:
    """Bytes of every piece of memory that the backward pass of ``texts`` texts holds on to."""
    kept: dict[int, int] = {}
    encoder.release_shelves()  # a larger one of another count would be used, and counted

    def note(tensor: torch.Tensor) -> torch.UntypedStorage:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return storage  # not the tensor: a node that holds its own output holds itself, and is never freed

    ids = np.arange(length, dtype=np.int32) % len(encoder.tokenizer)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda storage: storage):
        vectors = encoder.embed([ids] * texts)
    del vectors
    return sum(kept.values())


def read_free_memory(device: torch.device) -> int:
    """Bytes that can be taken on the device now; on the CPU within its control group's limits and the process's own."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return FALLBACK
    group = Path("/sys/fs/cgroup")
    try:
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no control group, or one without a limit
    for limit, column in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):  # columns of statm, in pages
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY:
            taken = int(Path("/proc/self/statm").read_text().split()[column])
            free = min(free, most - taken * os.sysconf("SC_PAGE_SIZE"))
    return max(free, 64 * os.sysconf("SC_PAGE_SIZE"))


def read_held(device: torch.device) -> int:
    """Bytes held now: on the GPU where one is used, else by this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return read_peak(device)


def read_peak(device: torch.device) -> int:
    """Most bytes held so far: on the GPU where one is used, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_freed() -> None:
    """From now on keep what is freed for what is taken next, where the C library can; ``return_freed`` gives it back.

    A step takes and frees the same tensors again and again. As it comes, the library hands memory that is free at the
    end of its heap, and single large pieces, back to the system, and a fifth of a step on a CPU goes into clearing
    fresh pages.
    """
    adjust = _find_in_c_library("mallopt")
    if adjust is not None:
        adjust(M_MMAP_THRESHOLD, LARGEST_KEPT)
        adjust(M_TRIM_THRESHOLD, 1 << 30)


def return_freed() -> None:
    """Give pages that were freed back to the system, where the C library can.

    Batches of many sizes leave holes that nothing fits into, and a training would hold more from step to step.
    """
    trim = _find_in_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def _find_in_c_library(name: str) -> Callable[..., int] | None:
    """A function of glibc; None on other systems."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
