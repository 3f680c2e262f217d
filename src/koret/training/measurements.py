"""The numbers of every step: kept on the device, fetched in one copy, checked, averaged for the record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from koret.training.batches import Batch


class NumericFault(RuntimeError):
    """Numbers that are not finite. The step they appeared in was not applied; ``record_ids`` name its questions."""

    def __init__(self, message: str, step: int, record_ids: list[str]) -> None:
        super().__init__(message)
        self.step, self.record_ids = step, record_ids


class Measurements:
    """Collects (loss, masked pairs, skipped questions, gradient norm) of the steps since the last record."""

    def __init__(
        self, question_ids: Callable[[np.ndarray], list[str]], scaling: bool, extras: tuple[str, ...] = ()
    ) -> None:
        """``question_ids`` names the records of pair rows; ``scaling``: float16, where gradients may overflow.

        ``extras`` name values that stand between the skipped questions and the gradient norm.
        """
        self._question_ids, self._scaling, self._extras = question_ids, scaling, extras
        self._waiting: list[tuple[int, list[np.ndarray], torch.Tensor]] = []  # on the device: step, rows, values
        self._recent: list[list[float]] = []  # fetched, not yet recorded: loss, masked, skipped, pairs, extras
        self._seconds = 0.0
        self._epoch: list[float] = [0.0, 0]  # sum of losses, steps
        self.totals = {"steps": 0, "pairs": 0, "masked": 0, "skipped": 0, "overflows": 0}

    def add(self, step: int, batches: list[Batch], values: torch.Tensor) -> None:
        """Remember the values (4 + extras,) of a step without waiting for the device."""
        self._waiting.append((step, [batch.rows for batch in batches], values))

    def skip(self, batches: list[Batch]) -> None:
        """Count the questions of batches in which no text serves as a negative: they are not trained on."""
        self.totals["skipped"] += sum(len(batch.rows) for batch in batches)

    def add_seconds(self, seconds: float) -> None:
        self._seconds += seconds

    def collect(self, extra: torch.Tensor | None = None) -> np.ndarray:
        """Fetch what waits, and ``extra`` with it, in one copy; returns ``extra``. Raises NumericFault."""
        pieces = [values for _, _, values in self._waiting] + ([] if extra is None else [extra.flatten()])
        if not pieces:
            return np.zeros(0)
        fetched = torch.cat([piece.float() for piece in pieces]).cpu().numpy().astype(float)
        waiting, self._waiting = self._waiting, []
        width = 4 + len(self._extras)
        for i, (step, rows, _) in enumerate(waiting):
            self._take(step, rows, *fetched[width * i : width * (i + 1)].tolist())
        return fetched[width * len(waiting) :]

    def _take(
        self, step: int, rows: list[np.ndarray], loss: float, masked: float, skipped: float, *more: float
    ) -> None:
        *extras, norm = more
        if not np.isfinite(loss) or not (np.isfinite(norm) or self._scaling):
            self._stop(step, rows, loss, norm)
        pairs, masked, skipped = sum(map(len, rows)), masked * len(rows), skipped * len(rows)  # were means
        self._recent.append([loss, masked, skipped, pairs, *extras])
        self._epoch = [self._epoch[0] + loss, self._epoch[1] + 1]
        for name, count in (("steps", 1), ("pairs", pairs), ("masked", masked), ("skipped", skipped)):
            self.totals[name] += round(count)
        self.totals["overflows"] += not np.isfinite(norm)

    def _stop(self, step: int, rows: list[np.ndarray], loss: float, norm: float) -> None:
        what = f"the loss is {loss}" if not np.isfinite(loss) else f"the gradient norm is {norm}"
        ids = self._question_ids(np.concatenate(rows))
        shown = ", ".join(ids[:16]) + (f" and {len(ids) - 16} more" if len(ids) > 16 else "")
        raise NumericFault(
            f"step {step}: {what}, so it was not applied and the run stops; nothing of it was saved. "
            f"Questions of the batch: {shown}. Try a lower --learning-rate, --precision fp32, or a smaller --scale; "
            "if it is always these questions, look at their texts",
            step,
            ids,
        )

    def summarize(self) -> dict[str, float]:
        """Means over the steps since the last call, under the names they are recorded by; empty without a step."""
        if not self._recent:
            return {}
        losses, masked, skipped, pairs, *extras = np.array(self._recent).T
        values = {
            "train/loss": losses.mean(),
            "train/pairs_per_second": pairs.sum() / max(self._seconds, 1e-9),
            "train/masked_negatives": masked.mean(),
            "train/questions_without_negatives": skipped.mean(),
        }
        values |= {f"train/{name}": found.mean() for name, found in zip(self._extras, extras, strict=True)}
        if self._scaling:
            values["train/overflows"] = self.totals["overflows"]  # steps so far that float16 could not hold
        self._recent, self._seconds = [], 0.0
        return {name: float(value) for name, value in values.items()}

    def close_epoch(self) -> dict[str, float]:
        """The mean loss of the epoch's steps."""
        total, steps = self._epoch
        self._epoch = [0.0, 0]
        return {"train/epoch_loss": total / steps} if steps else {}

    def describe_losses(self) -> str:
        """In words, what was masked and what was not trained on in the whole run; empty where nothing was."""
        said = {
            "masked": "{:,} known positives were kept out of the negatives",
            "skipped": "{:,} times a question had no negative in its batch and was left out",
            "overflows": "{:,} steps overflowed in float16 and were skipped, as usual at the start",
        }
        return "; ".join(text.format(self.totals[name]) for name, text in said.items() if self.totals[name])

    def state(self) -> dict[str, Any]:
        """Plain JSON values for a checkpoint; nothing may be waiting on the device."""
        return {"recent": self._recent, "seconds": self._seconds, "epoch": self._epoch, "totals": self.totals}

    def restore(self, state: dict[str, Any]) -> None:
        self._recent, self._seconds = state["recent"], state["seconds"]
        self._epoch, self.totals = state["epoch"], state["totals"]
