"""What a resumed run keeps: its settings, its numbers' sources, and a refusal by name of what would change them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from koret.config import TrainingConfig
from koret.runs import Run, read_run

# Settings that decide where things lie and what is shown, never a weight.
HARMLESS = (
    "dataset_root",  # the fingerprints of data, base model and negatives are compared instead
    "model_name",
    "hard_negatives",
    "max_bad",
    "num_workers",
    "cache_dir",
    "log_dir",
    "log_every_n_steps",
    "log_gradients",
    "log_gradient_histograms",
    "save_total_limit",
)
PATHS = ("dataset_root", "model_name", "guide_model", "hard_negatives", "log_dir", "cache_dir")


class SettingsChanged(ValueError):
    """A run cannot go on with other settings than it began with."""


def read_resumed_config(run: Path, changes: dict[str, Any]) -> tuple[TrainingConfig, dict[str, Any], list[str]]:
    """The run's settings with ``changes``, its environment, and the names of harmless settings that changed.

    Raises SettingsChanged naming every change that would alter the result.
    """
    record = read_run(run)
    saved = {k: os.path.expanduser(v) if k in PATHS and isinstance(v, str) else v for k, v in record.config.items()}
    before, after = TrainingConfig(**saved), TrainingConfig(**{**saved, **changes})
    old, new = before.to_dict(), after.to_dict()
    changed = [name for name in new if new[name] != old[name]]
    refused = [f"{name} ({old[name]} -> {new[name]})" for name in changed if name not in HARMLESS]
    if refused:
        raise SettingsChanged(
            f"{record.name} cannot go on with changed settings: {', '.join(refused)}; "
            "leave them out to go on as before, or start a new run"
        )
    return after, record.environment, changed


def require_same(run: Run, what: str, recorded: str | None, found: str | None) -> None:
    """Raise SettingsChanged when the data or the base model is not the one the run began with."""
    if recorded != found:
        raise SettingsChanged(f"{run.name} cannot go on: {what} changed since it began (fingerprints differ)")
