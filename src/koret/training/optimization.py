"""AdamW with warm-up and linear decay, and a step that never applies a number that is not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def cap_warmup(warmup: int, total: int) -> int:
    """Warm-up steps for a run of ``total`` steps: a tenth of a run shorter than ten times the warm-up."""
    return min(warmup, total // 10)


def find_learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Rate of optimizer step ``step`` (from 1): linear from 0 to ``peak`` over the warm-up, then linear to 0.

    The schedule of ``transformers.get_linear_schedule_with_warmup``.
    """
    done = step - 1
    if done < warmup:
        return peak * done / warmup
    return peak * (total - done) / max(1, total - warmup)


class GuardedOptimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) behind a guard that lives on the device.

    From the first non-finite loss or gradient on no step is applied any more, and nothing has to be copied to the
    host for that: the caller reads the flags when it reads the loss. With float16 an overflowing gradient is
    expected; the scaler skips that step and lowers its scale.
    """

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], *, weight_decay: float, max_grad_norm: float, scaling: bool
    ) -> None:
        self.parameters = list(parameters.values())
        self.max_grad_norm = max_grad_norm
        groups = [{"params": [p for p in self.parameters if p.dim()]}]
        if scalars := [p for p in self.parameters if not p.dim()]:  # a learned scale does not decay
            groups.append({"params": scalars, "weight_decay": 0.0})
        self.adamw = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
        device = self.parameters[0].device
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaling)
        self._broken = torch.zeros((), device=device)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to differentiate: multiplied by the float16 scale where there is one."""
        return self.scaler.scale(loss)

    def unscale(self) -> None:
        """Bring the gradients to their true size; call it before looking at them or stepping."""
        self.scaler.unscale_(self.adamw)

    def step(self, rate: float, finite: torch.Tensor) -> torch.Tensor:
        """Clip and apply the gradients; ``finite`` () says whether the loss was. Returns their norm () before that."""
        for group in self.adamw.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        if self.scaler.is_enabled():
            self.scaler.step(self.adamw)
            self.scaler.update()
        else:
            self._broken = torch.maximum(self._broken, (~(finite & torch.isfinite(norm))).float())
            self.adamw.found_inf = self._broken  # what the fused kernel asks before it changes anything
            self.adamw.step()
        self.adamw.zero_grad()
        return norm

    def scaler_state(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def restore_scaler(self, state: dict[str, Any]) -> None:
        if state:
            self.scaler.load_state_dict(state)
