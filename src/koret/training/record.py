"""What a training writes into its run directory, and in which order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from koret.config import TrainingConfig
from koret.evaluation.model_card import format_model_card
from koret.evaluation.outputs import save_report
from koret.evaluation.report import EvaluationReport
from koret.evaluation.scores import Scores
from koret.files import remove_leftovers, stage_folder, write_json
from koret.privacy import scrub
from koret.retrieval.encoder import TextEncoder
from koret.runs import describe_environment, find_origin, read_run
from koret.training import scorebook
from koret.training.checkpoint import CheckpointFolder, Snapshot, take_snapshot
from koret.training.logbook import Logbook, Terminal, describe_config
from koret.training.lora import save_adapter
from koret.training.preparation import Job
from koret.training.resume import require_same


@dataclass
class Progress:
    """Where a training stands, in plain JSON values."""

    step: int = 0  # optimizer steps taken
    evaluated: int | None = None  # the step whose model was scored last
    best: dict[str, Any] | None = None  # step and deciding metrics of the best model
    stale: int = 0  # evaluations since the best one
    budget: int | None = None  # tokens encoded at a time, once memory ran out
    files: dict[str, int] = field(default_factory=dict)  # how long each file of the logbook is


class RunRecord:
    """The files of one run. ``status.json`` is written last at every turn, so it never promises too much."""

    def __init__(self, path: Path, config: TrainingConfig, job: Job, terminal: Terminal) -> None:
        self.path, self.config, self.job, self.terminal = path, config, job, terminal
        self.checkpoints = CheckpointFolder(path / "checkpoints", config.save_total_limit, terminal.say)
        self.logbook: Logbook | None = None

    # ------------------------------------------------------------ begin

    def describe(self, resolved: dict[str, Any], encoder: TextEncoder, fingerprint: str) -> None:
        """A new run: what it runs with and on, before the first step."""
        (self.path / "evaluation").mkdir()
        name, origin = self.config.model_name, find_origin(self.config.model_name)
        environment = describe_environment(
            config=self.config.to_dict(),
            seed=self.config.seed,
            resolved=resolved,
            model={"name": name, "run": origin and origin.name, "fingerprint": fingerprint, "forward": encoder.path},
            accelerator=torch.cuda.get_device_name(encoder.device) if encoder.device.type == "cuda" else None,
        )
        write_json(self.path / "environment.json", environment)
        write_json(self.path / "data.json", self.job.report)

    def require_same(self, fingerprint: str) -> None:
        """Raise SettingsChanged unless data and base model are those the run began with."""
        run = read_run(self.path)
        require_same(run, "the data", run.data["fingerprint"], self.job.report["fingerprint"])
        before, now = ((report.get("mined") or {}).get("sha256") for report in (run.data, self.job.report))
        require_same(run, "the file of hard negatives", before, now)
        before, now = ((report.get("guide") or {}).get("fingerprint") for report in (run.data, self.job.report))
        require_same(run, "the guide model", before, now)
        require_same(run, "the base model", run.environment["model"]["fingerprint"], fingerprint)

    def reopen(self, resolved: dict[str, Any]) -> Snapshot | None:
        """A run begun before: note what is different now, clean up, and read the newest good checkpoint."""
        environment = json.loads((self.path / "environment.json").read_bytes())
        now = describe_environment()
        for what, old, new in (
            ("the machine's settings", environment["resolved"], resolved),
            ("versions", environment["versions"], now["versions"]),
        ):
            if changed := [f"{k} {old.get(k)} -> {new.get(k)}" for k in new if old.get(k) != new.get(k)]:
                self.terminal.say(f"{what} changed, so the result may differ in the last bits: {', '.join(changed)}")
        environment["config"] = scrub(self.config.to_dict())
        environment["resumed"] = [*environment.get("resumed", []), now["started"]]
        write_json(self.path / "environment.json", environment)
        for folder in (self.path, self.path / "evaluation", self.path / "negatives"):
            if folder.is_dir():
                remove_leftovers(folder)
        return self.checkpoints.load_newest()

    def open(self, at: Progress) -> None:
        """Start recording after the step ``at`` stands at."""
        self.write_status("running", at)
        self.logbook = Logbook(self.path, at.step, at.files)
        if not at.files:
            self.logbook.record_text("config", describe_config(scrub(self.config.to_dict())))

    # ------------------------------------------------------------ along the way

    def save_checkpoint(
        self,
        at: Progress,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        random_states: Sequence[Mapping[str, torch.Tensor]],
    ) -> None:
        """Everything a resume needs; the logbook first, so that it is never behind its checkpoint."""
        at.files = self.logbook.flush()
        snapshot = take_snapshot(parameters, optimizer, {"at": asdict(at), "best": at.best, **state}, random_states)
        self.checkpoints.save(at.step, snapshot)
        self.write_status("running", at)

    def write_numbers(
        self, step: int, values: Mapping[str, float], histograms: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Numbers and histograms of a step, where there are any, into the logbook."""
        if values:
            self.logbook.record(step, values)
        self.logbook.record_histograms(step, histograms or {})

    def write_scores(self, name: str, step: int, scores: list[Scores]) -> None:
        tasks = [evaluator.task for evaluator in self.job.evaluators]
        scorebook.write_scores(self.path / "evaluation", name, step, scores, tasks)

    def read_scores(self, name: str) -> list[Scores]:
        return scorebook.read_scores(self.path / "evaluation", name)

    def write_report(self, report: EvaluationReport) -> None:
        """The whole comparison, and verdict.json with what it comes to."""
        save_report(report, self.path / "evaluation", figures=False)
        first = report.sections[0]
        verdict = {
            **first.verdict.to_dict(),
            "conclusion": report.conclusion,
            "against_bm25": first.lexical.to_dict() if first.lexical else None,
            "clean": report.audit.clean if report.audit else None,
        }
        write_json(self.path / "evaluation" / "verdict.json", verdict)

    def write_status(self, state: str, at: Progress, reason: str | None = None) -> None:
        status = {
            "state": state,
            "step": at.step,
            "total_steps": self.job.schedule.total,
            "best": {"step": at.best["step"], "metrics": at.best["metrics"]} if at.best else None,
            "reason": reason,
            "updated": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        write_json(self.path / "status.json", scrub(status))

    # ------------------------------------------------------------ end

    def publish_model(self, merged: TextEncoder, trained: TextEncoder, report: EvaluationReport) -> None:
        """``model/`` in one rename: merged weights, settings, model card, and the adapters in ``lora_weights``."""
        config = scrub(self.config.to_dict())
        card = format_model_card(config, self.job.report, report, dimensions=merged.dimensions)
        with stage_folder(self.path / "model") as folder:
            merged.save(folder)
            write_json(folder / "training_config.json", config)
            (folder / "README.md").write_text(card, encoding="utf-8")
            if self.config.use_lora:
                save_adapter(trained, folder / "lora_weights", self.config.model_name)

    def close_finished(self, at: Progress) -> None:
        self.logbook.close()
        self.write_status("finished", at)

    def close_unfinished(self, error: BaseException, at: Progress) -> None:
        """Say in status.json why the run stopped. What went wrong first matters more than what goes wrong here."""
        state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        try:
            if self.logbook is not None:
                self.logbook.close()
            if (self.path / "data.json").exists():
                self.write_status(state, at, str(error) or type(error).__name__)
        except (OSError, RuntimeError) as second:
            self.terminal.say(f"status.json could not be written: {second}")
