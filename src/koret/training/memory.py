"""How many tokens fit into memory at a time."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from koret.retrieval.encoder import DTYPES, TextEncoder
from koret.retrieval.processes import Process

SHARE = 0.5  # of the memory that is free may be filled with activations
ALONE = Process()
FALLBACK = 4 << 30  # bytes taken for free where the system does not say


def choose_micro_batch_tokens(encoder: TextEncoder, process: Process = ALONE) -> int:
    """Tokens whose activations fill half of the device's free memory; a whole power of two, at least 1024.

    Processes that compute on one machine's CPU share its memory.
    """
    free = read_free_memory(encoder.device) // (process.local_count if encoder.device.type == "cpu" else 1)
    tokens = max(1024, int(SHARE * free / estimate_bytes_per_token(encoder)))
    return 1 << (tokens.bit_length() - 1)


def estimate_bytes_per_token(encoder: TextEncoder) -> int:
    """Activations kept for the backward pass per token.

    A layer of width H and inner width F keeps about 10 H + 3 F numbers; the padded path also keeps attention
    probabilities (heads times length, twice with dropout) and works in float32 where it sums.
    """
    config = encoder.backbone.config
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    numbers = 10 * config.hidden_size + 3 * inner
    size = torch.finfo(DTYPES[encoder.precision]).bits // 8
    if encoder.slow_path_reason is not None:
        numbers, size = 2 * numbers + 3 * config.num_attention_heads * encoder.max_seq_length, 4
    layers = 2 if encoder.gradient_checkpointing else config.num_hidden_layers
    return layers * numbers * size


def read_free_memory(device: torch.device) -> int:
    """Bytes that can be taken on the device now; on the CPU within the limits of its control group."""
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
    return max(free, 64 * os.sysconf("SC_PAGE_SIZE"))
