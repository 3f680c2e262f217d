"""EmbeddingTrainer: the training loop, readable in one sitting."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from koret.config import TrainingConfig
from koret.data.loader import Dataset
from koret.evaluation.metrics import PRIMARY
from koret.evaluation.scores import Scores
from koret.evaluation.tables import format_report
from koret.retrieval.encoder import TextEncoder, choose_precision, load_encoder
from koret.retrieval.processes import SharedEncoder, choose_device, join_group
from koret.retrieval.products import prefers_order
from koret.runs import Run, create_run, is_run, lock_run, read_run
from koret.training.batch_gradients import BatchGradients
from koret.training.batches import Batch
from koret.training.checkpoint import copy_to_cpu, copy_weights, hash_weights, read_random_states
from koret.training.compilation import TRIED, choose_compiling, explain_uncompiled
from koret.training.forecast import Forecast, Pace, count_scorings, forecast_peak, time_scoring, time_steps
from koret.training.gradcache import keep_random_state
from koret.training.gradients import collect_values, group_by_module, measure_norms
from koret.training.logbook import Terminal
from koret.training.lora import merge_lora, setup_lora_model
from koret.training.measurements import Measurements, NumericFault
from koret.training.memory import keep_freed, return_freed
from koret.training.memory_plan import plan_memory
from koret.training.objectives import Objective
from koret.training.optimization import GuardedOptimizer, cap_warmup, find_learning_rate
from koret.training.plan import describe_plan
from koret.training.preparation import (
    Job,
    load_data,
    mine_into,
    prepare_job,
    replace_negatives,
    require_source,
)
from koret.training.record import Progress, RunRecord
from koret.training.resume import PATHS, read_resumed_config
from koret.training.schedule import Step
from koret.training.scorebook import conclude, find_base_scores, keep_base_scores
from koret.training.signals import Interrupted, StopSignals
from koret.training.trained import setup_full_model

TIMED_STEPS = 3  # of a plan


class EmbeddingTrainer:
    """Fine-tunes an embedder as a ``TrainingConfig`` says, in a run directory of its own.

    ``train()`` returns the finished run, ``evaluate()`` the metrics of the model as it is. ``dataset`` and ``encoder``
    may be given ready-made. ``console`` is where a person reads along; without ``progress`` neither a bar nor a line
    per record is shown.

    Several processes (accelerate launch, torchrun) that run the same program train one model: they share the texts of
    every batch, so losses and gradients are those of one process with the same ``batch_size``. Only process 0 writes
    and speaks; the folder of the runs need not be seen by the others.
    """

    def __init__(
        self,
        config: TrainingConfig | None = None,
        *,
        dataset: Dataset | None = None,
        encoder: TextEncoder | None = None,
        console: Console | None = None,
        progress: bool = True,
    ) -> None:
        self.config = config or TrainingConfig()
        self.group = join_group()
        self.terminal = Terminal(console if self.group.leads else Console(quiet=True), progress and self.group.leads)
        self.run_dir: Path | None = None
        self.job: Job | None = None
        self._dataset, self._encoder = dataset, encoder
        self._resumed: dict[str, Any] | None = None  # the environment a resumed run began with
        self._used = False

    @classmethod
    def resume(cls, run: str | Path, *, changes: dict[str, Any] | None = None, **options: Any) -> EmbeddingTrainer:
        """A trainer that goes on with an interrupted run; ``options`` are the constructor's.

        ``changes`` are settings to change. Raises SettingsChanged when one of them would alter the result, and
        FileNotFoundError when ``run`` is no run directory.
        """
        run_dir, (config, environment, changed) = join_group().lead(
            lambda: (path := read_run(run).path, read_resumed_config(path, changes or {}))
        )
        trainer = cls(config, **options)
        trainer.run_dir, trainer._resumed = run_dir, environment
        if changed:
            trainer.terminal.say(f"changed, without effect on the result: {', '.join(changed)}")
        return trainer

    # ------------------------------------------------------------ the story

    def train(self) -> Run:
        """Train, keep the best model, score it against its base, save it; returns the run.

        Raises Interrupted after Ctrl-C or SIGTERM (the state is saved), NumericFault on numbers that are not finite,
        ValueError on settings or data that cannot work, DiskFull, RunBusy.
        """
        if self._is_finished():
            return self.group.lead(read_run, self.run_dir)
        if self._used:
            raise RuntimeError(f"this trainer has been used: go on with EmbeddingTrainer.resume({str(self.run_dir)!r})")
        keep_freed()
        self._prepare()
        self.run_dir, self._used = self.run_dir or self.group.lead(create_run, self.config.log_dir), True
        agree = None if self.group.alone else self.group.find_largest
        with contextlib.ExitStack() as held, StopSignals(agree) as stop:
            self.group.lead(lambda: held.enter_context(lock_run(self.run_dir)))
            if self._is_finished():
                return self.group.lead(read_run, self.run_dir)
            self.record = RunRecord(self.run_dir, self.config, self.job, self.terminal)  # process 0 alone writes in it
            if self._resumed is not None:
                self.group.lead(self.record.require_same, self.model_fingerprint)
            try:
                self._start()
                self._fit(stop)
                self._finish(stop)
            except BaseException as error:
                if self.group.leads:
                    self.record.close_unfinished(error, self.at)
                raise
            finally:
                self.terminal.stop()
        return self.group.lead(read_run, self.run_dir)

    def explain_plan(self) -> None:
        """Say what ``train`` would do and what it would cost, by trying a few steps; nothing is written."""
        keep_freed()
        self._prepare()
        self._say_plan()
        self.encoder.model.train()
        total = self.job.schedule.total
        with keep_random_state():  # a training that follows draws what it would have drawn
            seconds = time_steps(self._make_first(TIMED_STEPS), self.gradients.add) * self.pace.step_tokens
        self.optimizer.adamw.zero_grad()
        scorings = count_scorings(0, total, self.config.save_steps) + 1  # and one of the base
        self.terminal.say(f"cost: {Forecast(total, seconds, scorings, self._time_scorings())}")

    def evaluate(self) -> dict[str, float]:
        """Metrics of the model as it is now, on the held-out questions."""
        self._prepare()
        return self._score("model")[0].metrics

    def _fit(self, stop: StopSignals) -> None:
        """Score when it is time, stop when it is time, otherwise take a step."""
        steps = self.job.schedule.steps_after(self.at.step)
        self.encoder.model.train()  # once: encoding without gradients leaves it as it was, and it takes a while
        try:
            while True:
                if self._is_evaluation_due():
                    self._evaluate(stop)
                    self._save_checkpoint()
                if self._is_done():
                    return
                stop.check()
                self._renew_negatives(stop)
                self._take_step(next(steps))
        except Interrupted:
            if self._saved != (self.at.step, self.at.evaluated):
                self._save_checkpoint()
            raise

    def _renew_negatives(self, stop: StopSignals) -> None:
        """After every so many epochs (``remine_every``), train on negatives that the model of that moment chose."""
        epoch = self.job.schedule.find_mining(self.at.step, self.config.remine_every)
        if epoch == self._mined:
            return
        path = self.run_dir / "negatives" / f"epoch-{epoch:04d}.jsonl"
        if not self.group.lead(path.exists):
            if self.job.schedule.epochs_done(self.at.step) != epoch:
                raise FileNotFoundError(f"{path} is gone, and the model that mined it has moved on: start a new run")
            with stop.at_once():  # a resume finds this model again
                shared = SharedEncoder(self.encoder, self.group)
                self.terminal.say(mine_into(path, self.job, self.config, shared, self.group))
        self.job = replace_negatives(path, self.job, self.config, self.encoder, self.group)
        self._mined = epoch

    def _take_step(self, step: Step) -> None:
        """One optimizer step: batches, embeddings, loss, gradients, update, and now and then a record."""
        began = time.perf_counter()
        made = [self.job.maker.make(rows) for rows in step.batches]
        batches = [batch for batch in made if batch.has_negatives]
        self.measurements.skip([batch for batch in made if not batch.has_negatives])
        due = step.number % self.config.log_every_n_steps == 0 or step.number == self.job.schedule.total
        norms, histograms = None, {}
        if batches:
            values = self.gradients.add(batches)
            self.optimizer.unscale()
            if due and self.config.log_gradients:
                norms = measure_norms(self.modules)
            if due and self.config.log_gradient_histograms:
                histograms = collect_values(self.modules)
            rate = find_learning_rate(step.number, self.job.schedule.total, self.warmup, self.config.learning_rate)
            norm = self.optimizer.step(rate, finite=torch.isfinite(values).all())
            self.measurements.add(step.number, batches, torch.cat([values, norm.reshape(1).to(values.dtype)]))
            self.pace.hold_to(self.encoder.device)
        self.at.step = step.number
        if due or step.ends_epoch:
            found = self.measurements.collect(norms)
            self.measurements.add_seconds(time.perf_counter() - began)
            self._report(step, due, found, histograms)
        else:
            self.measurements.add_seconds(time.perf_counter() - began)
        self.terminal.advance(step.number)
        if self._resumed is None and (
            forecast := self.pace.watch(step.number, batches, self.encoder.device, self._wait)
        ):
            self.terminal.say(forecast)

    # ------------------------------------------------------------ before the first step

    def _prepare(self) -> None:
        """Data, model, adapters, plan. Nothing is written before all of it is in order."""
        if self.job is not None:
            return
        config, resolved = self.config, (self._resumed or {}).get("resolved", {})
        require_source(config)
        device, precision = choose_device(self.group.process), resolved.get("precision", config.precision)
        if precision == "auto" and self._encoder is None:
            precision = self.group.lead(choose_precision, device or "cpu")
        self.encoder = self._encoder or load_encoder(
            config.model_name,
            device=device,
            precision=precision,
            max_seq_length=config.max_seq_length,
            query_prefix=config.query_prefix,
            passage_prefix=config.passage_prefix,
            gradient_checkpointing=config.gradient_checkpointing,
            quantize=config.quantize_base,
        )
        if self.encoder.precision == "fp16" and self.encoder.device.type != "cuda":
            raise ValueError("precision: fp16 trains on CUDA only; use bf16, fp32 or auto here")
        if self.encoder.device.type == "cpu" and self.encoder.precision == "fp32":
            known = resolved.get("prefers_order")
            self.encoder.prefers_order = self.group.lead(prefers_order) if known is None else known
        self.job = self.group.in_turn(
            lambda: prepare_job(
                config, self.encoder, self._dataset or load_data(config, self.encoder, self.terminal.progress)
            )
        )
        self.model_fingerprint = self.encoder.fingerprint()
        seed_everything(config.seed)
        if config.use_lora:
            setup_lora_model(
                self.encoder,
                config.lora_r,
                config.lora_alpha,
                config.lora_dropout,
                config.lora_target_modules,
                config.lora_variant,
                bool(config.train_embeddings),
            )
        else:
            setup_full_model(self.encoder, config.train_embeddings is not False)
        self.parameters = {n: p for n, p in self.encoder.backbone.named_parameters() if p.requires_grad}
        log_scale = None
        if config.learn_scale:
            log_scale = torch.nn.Parameter(torch.full((), math.log(config.scale), device=self.encoder.device))
            self.parameters["log_scale"] = log_scale
        self.group.require_same(
            settings={name: value for name, value in config.to_dict().items() if name not in PATHS},
            data=self.job.dataset.fingerprint,
            model=self.model_fingerprint,
            adapters=hash_weights(copy_to_cpu(self.parameters)),
        )
        self._seed_process()
        self.modules = group_by_module(self.parameters)
        self.optimizer = GuardedOptimizer(
            self.parameters,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            scaling=self.encoder.precision == "fp16",
        )
        self.warmup = cap_warmup(config.warmup_steps, self.job.schedule.total)
        self._plan_steps(resolved, log_scale)
        self.measurements = Measurements(
            self.job.question_ids, self.optimizer.scaler.is_enabled(), self.gradients.extras
        )
        self.at, self._saved, self._mined = Progress(), None, 0

    def _plan_steps(self, resolved: dict[str, Any], log_scale: torch.nn.Parameter | None) -> None:
        """How steps are taken on the device and in the memory there are, and what that will cost."""
        config, total, batches = self.config, self.job.schedule.total, self.job.report["batches"]
        heaviest = batches["tokens_of_the_heaviest"] // self.group.process.count
        step_tokens = batches["tokens_of_an_epoch"] / self.job.schedule.steps_of_epoch[0]
        limit = None if config.max_memory_gb is None else int(config.max_memory_gb * 2**30)

        def plan() -> tuple[int, int]:
            """Bytes kept per token, and tokens at a time."""
            found = plan_memory(
                self.encoder,
                heaviest,
                merges=config.use_lora,
                asked=resolved.get("micro_batch_tokens") or config.micro_batch_tokens,
                limit=limit,
                process=self.group.process,
            )
            return found.per_token, min(self.group.gather(found.budget))

        compiles = resolved.get("torch_compile", config.torch_compile)
        if compiles and (reason := explain_uncompiled(self.encoder)):
            raise ValueError(f"torch_compile: {reason}; leave the setting out")
        self.encoder.compiles = bool(compiles)
        per_token, budget = plan()
        self.gradients = BatchGradients(
            self.encoder,
            self.optimizer,
            Objective.from_config(config),
            budget,
            self.terminal.say,
            log_scale=log_scale,
            guided=config.guide_model is not None,
            group=self.group,
        )
        if compiles is None:
            make = partial(self._make_first, TRIED)
            tried = choose_compiling(self.encoder, make, self.gradients.add, total * step_tokens, self.group)
            self.optimizer.adamw.zero_grad()
            if tried:
                self.terminal.say(tried)
            if self.encoder.compiles and not self.gradients.was_halved:
                per_token, self.gradients.budget = plan()
        peak = forecast_peak(self.encoder, per_token, self.gradients.budget, heaviest, merges=config.use_lora)
        self.pace = Pace(total, config.save_steps, step_tokens, peak, self._time_scorings, limit)

    def _make_first(self, count: int) -> Iterator[list[Batch]]:
        """The batches of the first steps."""
        for step in itertools.islice(self.job.schedule.steps_after(0), count):
            yield [self.job.maker.make(rows) for rows in step.batches]

    def _seed_process(self, step: int = 0) -> None:
        """Let the processes draw different dropout; process 0 draws what a process alone would."""
        if self.group.process.rank:
            torch.manual_seed(hash((self.config.seed, self.group.process.rank, step)))

    def _is_finished(self) -> bool:
        if self.run_dir is None:
            return False
        finished = self.group.lead(lambda: is_run(self.run_dir) and read_run(self.run_dir).is_finished)
        if finished:
            self.terminal.say(f"{self.run_dir.name} is already finished: nothing to do")
        return finished

    def _start(self) -> None:
        """Open the run directory and, when the run was begun before, put everything back as it was."""
        resolved = {
            "device": self.encoder.device.type,
            "precision": self.encoder.precision,
            "micro_batch_tokens": self.gradients.budget,
            "torch_compile": self.encoder.compiles,
            "prefers_order": self.encoder.prefers_order,
            "threads": torch.get_num_threads(),
            "processes": self.group.process.count,
        }
        if self._resumed is None:
            self.group.lead(self.record.describe, resolved, self.encoder, self.model_fingerprint)
            self.terminal.say(f"run {self.run_dir}")
            self._say_plan()
            self.group.lead(self.record.open, self.at)
            self.terminal.start(self.at.step, self.job.schedule.total)
            return
        snapshot = self.group.lead(self.record.reopen, resolved)
        if snapshot is not None:
            self._seed_process(snapshot.progress["at"]["step"])
            snapshot.restore(self.parameters, self.optimizer.adamw, self.group.process.rank)
            self.at = Progress(**snapshot.progress["at"])
            self.gradients.halved_to(self.at.budget)
            self.measurements.restore(snapshot.progress["measurements"])
            self.optimizer.restore_scaler(snapshot.progress["scaler"])
        self.terminal.say(f"{self.run_dir.name} goes on after step {self.at.step} of {self.job.schedule.total}")
        self.group.lead(self.record.open, self.at)
        self.terminal.start(self.at.step, self.job.schedule.total)

    def _say_plan(self) -> None:
        for line in describe_plan(self.config, self.encoder, self.job, self.warmup, self.group.process.count):
            self.terminal.say(line)
        self.terminal.say(str(self.pace.peak))
        limit = self.config.max_memory_gb
        if limit is not None and self.pace.peak.peak > limit * 2**30:
            self.terminal.say(
                f"max_memory_gb: {limit:g} is less than the {self.pace.peak.peak / 2**30:.2f} this run will hold; "
                "the line above says what for"
            )

    def _wait(self) -> None:
        if self.encoder.device.type == "cuda":
            torch.cuda.synchronize(self.encoder.device)

    def _time_scorings(self) -> float:
        shared = SharedEncoder(self.encoder, self.group)
        try:
            return sum(time_scoring(shared, evaluator.task) for evaluator in self.job.evaluators)
        finally:
            self.encoder.release()

    # ------------------------------------------------------------ now and then

    def _report(self, step: Step, due: bool, norms: np.ndarray, histograms: dict[str, np.ndarray]) -> None:
        """Record the numbers of the steps since the last record, and of the epoch when it ends."""
        values = self.measurements.summarize() if due else {}
        return_freed()
        if values:
            done = self.job.schedule.epochs_done(step.number)
            rate = find_learning_rate(step.number, self.job.schedule.total, self.warmup, self.config.learning_rate)
            values |= {"train/learning_rate": rate, "train/epoch": done}
            found = zip(self.modules, norms, strict=False)
            values |= {f"gradients/{m}_weight_norm": float(n) for m, n in found if np.isfinite(n)}  # else it overflowed
            self.terminal.show(step.number, values["train/loss"], values["train/pairs_per_second"])
        if step.ends_epoch:
            values |= self.measurements.close_epoch()
        named = {f"gradients/{module}_weight": array for module, array in histograms.items()}
        self.group.lead(self.record.write_numbers, step.number, values, named)

    def _is_evaluation_due(self) -> bool:
        step = self.at.step
        return self.at.evaluated != step and (step % self.config.save_steps == 0 or step == self.job.schedule.total)

    def _is_done(self) -> bool:
        patience = self.config.patience
        return self.at.step == self.job.schedule.total or (patience is not None and self.at.stale >= patience)

    def _evaluate(self, stop: StopSignals) -> None:
        """Score the model on the held-out questions; the best so far is kept."""
        with stop.at_once():  # scoring changes nothing: nobody has to wait for its end to stop
            base = (self.job, self.encoder, self.model_fingerprint)
            kept = None if self.at.step else self.group.lead(find_base_scores, *base)
            scores = kept or self._score("tuned" if self.at.step else "base")
        first = scores[0]
        self.group.lead(self.record.write_numbers, self.at.step, name_metrics(scores))
        deciding = dict(zip(PRIMARY, first.sort_key, strict=True))
        shown = ", ".join(f"{name} {value:.4f}" for name, value in deciding.items())
        if self.at.step == 0:
            self.group.lead(self.record.write_scores, "base", 0, scores)
            if not kept:
                self.group.lead(keep_base_scores, *base, scores)
        elif self.at.best is None or first.sort_key > tuple(self.at.best["metrics"][name] for name in PRIMARY):
            weights = copy_to_cpu(self.parameters)
            self.group.lead(self.record.checkpoints.save_best, self.at.step, weights)
            self.group.lead(self.record.write_scores, "best", self.at.step, scores)
            self.at.best, self.at.stale = {"step": self.at.step, "metrics": deciding}, 0
            shown += ", the best so far"
        else:
            self.at.stale += 1
        self.at.evaluated = self.at.step
        when = f"step {self.at.step}" if self.at.step else "before training"
        self.terminal.say(f"{when}: {shown}{', as measured in an earlier run' if kept else ''}")
        if self._is_done() and self.at.step < self.job.schedule.total:
            self.terminal.say(f"stopped early: {self.at.stale} evaluations without a better score")

    def _score(self, name: str, encoder: TextEncoder | None = None) -> list[Scores]:
        """All processes encode, process 0 ranks; what steps alone need memory for is let go of."""
        self.encoder.release_shelves()
        return_freed()
        shared, scores = SharedEncoder(encoder or self.encoder, self.group), []
        try:
            for evaluator in self.job.evaluators:
                began = time.perf_counter()
                vectors = evaluator.encode(shared)
                scores.append(self.group.lead(evaluator.score_vectors, name, *vectors, time.perf_counter() - began))
            return scores
        except FloatingPointError as error:
            raise NumericFault(f"scoring after step {self.at.step}: {error}", self.at.step, []) from error
        finally:
            (encoder or self.encoder).release()  # what scoring alone has the weights in

    def _save_checkpoint(self) -> None:
        self.measurements.collect()
        return_freed()
        self.at.budget = self.gradients.budget if self.gradients.was_halved else None
        state = {"measurements": self.measurements.state(), "scaler": self.optimizer.scaler_state()}
        if not self.group.alone:
            self.group.require_same(weights=hash_weights(copy_to_cpu(self.parameters)))
        random_states = self.group.gather(read_random_states())
        self.group.lead(
            self.record.save_checkpoint, self.at, self.parameters, self.optimizer.adamw, state, random_states
        )
        self._saved = (self.at.step, self.at.evaluated)

    # ------------------------------------------------------------ the end

    def _finish(self, stop: StopSignals) -> None:
        """Take the best weights back, save the model, score what was saved, and say whether it is better."""
        best = self.at.best["step"]
        weights = self.group.lead(self.record.checkpoints.load_best, best)
        copy_weights(weights, self.parameters)
        if hash_weights(copy_to_cpu(self.parameters)) != hash_weights(weights):
            raise RuntimeError(f"the best weights, of step {best}, did not arrive in the model unchanged")
        del weights
        self.optimizer.adamw.state.clear()  # no step follows
        return_freed()
        merged = merge_lora(self.encoder) if self.config.use_lora else self.encoder
        with stop.at_once():
            scores = self._score("tuned", merged)
            report = self.group.lead(
                lambda: conclude(self.job, self.config.model_name, self.record.read_scores("base"), scores)
            )
        self.group.lead(self.record.write_scores, "final", best, scores)
        self.group.lead(self.record.write_report, report)
        self.group.lead(self.record.publish_model, merged, self.encoder, report)
        self.group.lead(self.record.close_finished, self.at)
        self.terminal.stop()
        self.terminal.console.print(format_report(report, slices=False))
        if losses := self.measurements.describe_losses():
            self.terminal.say(losses)
        if self.at.step == self.job.schedule.total and (truth := self.pace.compare(self.encoder.device)):
            self.terminal.say(truth)
        self.terminal.say(f"model of step {best}: {self.run_dir / 'model'}")


def name_metrics(scores: list[Scores]) -> dict[str, float]:
    """Every metric under the name it is recorded by: eval/score decides, eval_answer/... is the second task."""
    first, *others = scores
    values = {"eval/score": first.sort_key[0]} | {f"eval/{name}": value for name, value in first.metrics.items()}
    return values | {f"eval_answer/{name}": value for other in others for name, value in other.metrics.items()}


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
