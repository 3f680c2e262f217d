"""Gradient norms and histograms per module, without stalling the device."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch


def group_by_module(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, list[torch.nn.Parameter]]:
    """Trained parameters by the layer they belong to: both halves of an adapter count for the layer it sits on."""
    groups: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        module = name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0] or name
        groups.setdefault(module, []).append(parameter)
    return groups


def measure_norms(groups: Mapping[str, list[torch.nn.Parameter]]) -> torch.Tensor:
    """(len(groups),) L2 norm of every module's gradient, left on the device; 0 where there is none."""
    norms = [
        torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))).float()
        if (gradients := [p.grad for p in parameters if p.grad is not None and p.grad.numel()])
        else torch.zeros((), device=parameters[0].device)
        for parameters in groups.values()
    ]
    return torch.stack(norms)


def collect_values(groups: Mapping[str, list[torch.nn.Parameter]]) -> dict[str, np.ndarray]:
    """Every module's gradient as flat float32 on the CPU, in one copy; modules without a drawable one are left out.

    A histogram needs values that are finite and not all zero (TensorBoard raises on empty ones).
    """
    flat = {
        module: torch.cat([p.grad.detach().flatten().float() for p in parameters if p.grad is not None])
        for module, parameters in groups.items()
        if any(p.grad is not None for p in parameters)
    }
    if not flat:
        return {}
    values = torch.cat(list(flat.values())).cpu().numpy()
    pieces = np.split(values, np.cumsum([len(v) for v in flat.values()])[:-1])
    named = zip(flat, pieces, strict=True)
    return {module: piece for module, piece in named if piece.size and np.isfinite(piece).all() and piece.any()}
