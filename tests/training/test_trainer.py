"""Whole trainings on a toy: the files they leave, the vectors they save, what stops them and what they refuse."""

import argparse
import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from crashes import read_outcome
from rich.console import Console
from toys import make_dataset, train_until

from koret.commands import train as commands
from koret.config import TrainingConfig
from koret.evaluation.selection import find_runs as find_runs_behind
from koret.retrieval import products
from koret.retrieval.encoder import TextEncoder, load_encoder
from koret.runs import RunBusy, find_runs, lock_run, read_run
from koret.training import trainer as trainers
from koret.training.batch_gradients import BatchGradients
from koret.training.measurements import NumericFault
from koret.training.resume import SettingsChanged
from koret.training.signals import StopSignals
from koret.training.trainer import EmbeddingTrainer

MODEL_FILES = {
    "1_Pooling/config.json", "config.json", "config_sentence_transformers.json", "model.safetensors", "modules.json",
    "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json", "training_config.json",
    "README.md", "lora_weights/adapter_config.json", "lora_weights/adapter_model.safetensors",
}  # fmt: skip


def train(config, data, console=None, **options):
    trainer = EmbeddingTrainer(config, dataset=data, console=console or Console(file=io.StringIO()), **options)
    return trainer, trainer.train()


@pytest.fixture
def trained(make_config, toy_data, silent):
    trainer, run = train(make_config(), toy_data, silent)
    return trainer, run, silent.file.getvalue()


def test_five_steps_leave_exactly_the_promised_files(trained):
    _, run, _ = trained
    found = {str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file()}
    events = [name for name in found if name.startswith("events.out.tfevents.")]
    checkpoints = set()
    for step in (4, 5):
        names = ("weights.safetensors", "optimizer.safetensors", "random.safetensors", "progress.json", "manifest.json")
        checkpoints |= {f"checkpoints/step-{step:08d}/{name}" for name in names}
        progress = json.loads((run.path / "checkpoints" / f"step-{step:08d}" / "progress.json").read_text())
        best = f"checkpoints/best-{progress['best']['step']:08d}"
        checkpoints |= {f"{best}/weights.safetensors", f"{best}/manifest.json"}
    assert len(events) == 1
    assert found - set(events) == checkpoints | {f"model/{name}" for name in MODEL_FILES} | {
        "metrics.jsonl", "environment.json", "data.json", "status.json", "evaluation/verdict.json",
        "evaluation/report.json", "evaluation/queries-question-passage.jsonl",
        *(f"evaluation/{name}.{kind}" for name in ("base", "best", "final") for kind in ("json", "safetensors")),
    }  # fmt: skip
    assert run.state == "finished" and run.status["step"] == 5


def test_the_promised_numbers_are_recorded_twice(trained):
    _, run, _ = trained
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    curves = read_outcome(str(run.path.parent))["tensorboard"]
    names = {name for line in lines for name in line} - {"step", "time"}
    assert names >= {
        "train/loss", "train/learning_rate", "train/epoch", "train/pairs_per_second", "train/masked_negatives",
        "eval/score", "eval/ndcg@10", "eval/map", "eval/recall@10", "eval/mrr@10",
        "gradients/encoder.layer.0.attention.self.query_weight_norm",
    }  # fmt: skip
    for name, points in curves.items():
        written = [(line["step"], line[name]) for line in lines if name in line]
        assert [step for step, _ in points] == [step for step, _ in written]
        assert [v for _, v in points] == pytest.approx([v for _, v in written], rel=1e-6)
    assert [s for s, _ in curves["train/loss"]] == [1, 2, 3, 4, 5]
    assert [s for s, _ in curves["eval/score"]] == [0, 2, 4, 5]
    assert curves["eval/score"] == curves["eval/ndcg@10"]


def test_epoch_loss_is_the_mean_of_the_epochs_steps(make_config, toy_data):
    _, run = train(make_config(num_epochs=2, max_steps=None, save_steps=1000), toy_data)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    epochs = [line["train/epoch_loss"] for line in lines if "train/epoch_loss" in line]
    half = len(losses) // 2
    assert epochs == pytest.approx([np.mean(losses[:half]), np.mean(losses[half:])], rel=1e-9)


def test_every_step_finds_the_model_in_training_mode_whatever_was_scored_before(
    make_config, toy_data, tiny_model, monkeypatch
):
    modes, plain = [], BatchGradients.add

    def add(self, batches):
        modes.append({module.training for module in self.encoder.model.modules()})
        return plain(self, batches)

    monkeypatch.setattr(BatchGradients, "add", add)
    encoder = load_encoder(tiny_model, device="cpu", max_seq_length=48)
    encoder.model.eval()
    config = make_config(save_steps=1, remine_every=1, num_epochs=2, max_steps=None)
    trainer, _ = train(config, toy_data, encoder=encoder)
    assert len(modes) == trainer.at.step > 20 and all(mode == {True} for mode in modes)


def test_an_overflow_in_float16_is_counted_where_it_is_recorded(make_config, toy_data, silent):
    trainer = EmbeddingTrainer(make_config(log_gradients=True), dataset=toy_data, console=silent)
    trainer._prepare()
    trainer.optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=3e38)  # as on CUDA; the first steps overflow
    trainer.measurements._scaling = True
    run = trainer.train()
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    norms = [any(name.startswith("gradients/") for name in line) for line in lines if "train/loss" in line]
    assert trainer.measurements.totals["overflows"] == norms.count(False) > 0 and norms[-1]
    assert lines[-1]["step"] == 5 and run.state == "finished"


def test_training_learns_the_toy(make_config):
    """Twice the score: what the last bits of a processor make of a run is much less."""
    config = make_config(num_epochs=15, max_steps=None, learning_rate=5e-3, batch_size=16, save_steps=100)
    _, run = train(config, make_dataset(articles=24))
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    assert run.final["ndcg@10"] > 2 * run.base["ndcg@10"]


def test_saved_model_adapter_on_base_and_trainer_give_the_same_vectors(trained, toy_data, tiny_model):
    from peft import PeftModel
    from sentence_transformers import SentenceTransformer

    trainer, run, _ = trained
    texts = toy_data.passages.column("text").to_pylist()[:20]
    ours = trainer.encoder.encode(texts, "passage")
    plain = SentenceTransformer(str(run.path / "model"), device="cpu")
    assert plain.prompts["query"] == "query: " and plain.prompts["passage"] == "passage: "
    assert plain.max_seq_length == 48
    base = SentenceTransformer(str(tiny_model), device="cpu")
    base.max_seq_length = 48
    untouched = base.encode(texts, prompt="passage: ", normalize_embeddings=True)
    base[0].model = PeftModel.from_pretrained(base[0].model, str(run.path / "model" / "lora_weights")).eval()
    adapted = base.encode(texts, prompt="passage: ", normalize_embeddings=True)
    merged = plain.encode(texts, prompt_name="passage", normalize_embeddings=True)
    loaded = load_encoder(run.path / "model").encode(texts, "passage")
    for other in (merged, adapted, loaded):
        assert np.abs(other - ours).max() < 1e-5
    assert np.abs(untouched - ours).max() > 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_saved_model_scores_what_the_run_says(make_config, toy_data, precision):
    trainer, run = train(make_config(precision=precision), toy_data)
    scores = trainer.job.evaluators[0].score(load_encoder(run.model, precision=precision))
    assert scores.metrics == pytest.approx(run.final, abs=1e-9)
    in_memory = trainer.evaluate()
    assert in_memory["ndcg@10"] == pytest.approx(run.final["ndcg@10"], abs=0.02 if precision == "bf16" else 1e-9)


def test_full_fine_tuning_behind_the_same_switch(make_config, toy_data):
    trainer, run = train(make_config(use_lora=False), toy_data)
    assert not (run.path / "model" / "lora_weights").exists()
    texts = ["가나 다라", "마바"]
    saved, ours = load_encoder(run.model).encode(texts, "query"), trainer.encoder.encode(texts, "query")
    assert np.abs(saved - ours).max() < 1e-6


@pytest.mark.parametrize("positives", ["answer", "both"])
def test_other_positives_train_and_are_scored_on_both_tasks(make_config, toy_data, positives):
    _, run = train(make_config(positives=positives), toy_data)
    lines = (run.path / "metrics.jsonl").read_text()
    assert '"eval/ndcg@10"' in lines and '"eval_answer/ndcg@10"' in lines
    assert json.loads((run.path / "evaluation" / "final.json").read_text())["others"][0]["task"] == "question → answer"


def test_the_best_model_is_kept_not_the_last(make_config, toy_data):
    """A rate that spoils the model after the first evaluation: the saved one is the best of those scored.

    Not one that ruins it: where all vectors are nearly one, the last bits of a merged weight change the ranking.
    """
    _, run = train(make_config(num_epochs=4, max_steps=None, learning_rate=0.02, save_steps=4), toy_data)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["eval/score"] for line in lines if "eval/score" in line}
    best = run.status["best"]["step"]
    assert scores[best] == max(score for step, score in scores.items() if step > 0) > list(scores.values())[-1]
    assert run.final["ndcg@10"] == pytest.approx(scores[best], abs=1e-6)


def test_patience_stops_early(make_config, toy_data, silent):
    config = make_config(num_epochs=20, max_steps=None, learning_rate=1.0, save_steps=2, patience=2)
    _, run = train(config, toy_data, silent)
    assert run.state == "finished" and run.status["step"] < run.status["total_steps"]
    assert "stopped early: 2 evaluations without a better score" in silent.file.getvalue()


def test_the_plan_is_explained_without_leaving_anything(make_config, toy_data, silent, tmp_path):
    trainer = EmbeddingTrainer(make_config(micro_batch_tokens=64), dataset=toy_data, console=silent)
    trainer.explain_plan()
    said = silent.file.getvalue()
    assert "5 steps; a query sees at most 7 negatives" in said
    assert re.search(r"cost: \d+\.\d\d s a step, 5 steps to go; .* 5 to go; about \d+:\d\d to the end", said)
    assert re.search(
        r"memory: about \d+\.\d\d GB at the peak: .* \(\d+\.\d KB a token, 64 tokens at a time at most, a batch",
        said,
    )
    assert not (tmp_path / "runs").exists()
    trainer.train()
    unasked, _ = train(make_config(micro_batch_tokens=64), toy_data)
    for name, parameter in trainer.parameters.items():
        assert torch.equal(parameter, unasked.parameters[name])


def test_accumulation_equals_the_mean_of_its_batches(make_config, toy_data, silent):
    """Two summed batches at one rate: the first update is that of the averaged gradient."""
    trainer, _ = train(make_config(gradient_accumulation_steps=2, max_steps=1, lora_dropout=0.0), toy_data, silent)
    assert "which adds no negatives" in silent.file.getvalue()
    reference = EmbeddingTrainer(trainer.config, dataset=toy_data, console=silent)
    reference._prepare()
    step = next(reference.job.schedule.steps_after(0))
    assert len(step.batches) == 2
    for rows in step.batches:
        reference.gradients._add(reference.job.maker.make(rows), share=0.5)
    reference.optimizer.step(trainer.config.learning_rate, torch.tensor(True))
    for name, parameter in reference.parameters.items():
        torch.testing.assert_close(parameter, trainer.parameters[name], rtol=0, atol=0)


def test_micro_batches_do_not_change_the_training(make_config, toy_data):
    whole, chunked = (train(make_config(micro_batch_tokens=n, lora_dropout=0.0), toy_data)[0] for n in (4096, 64))
    for name, parameter in whole.parameters.items():
        torch.testing.assert_close(parameter, chunked.parameters[name], rtol=1e-4, atol=1e-6)


def test_a_limit_of_memory_does_not_change_the_training(make_config, toy_data, silent):
    """With dropout: what is computed again draws the same."""
    found = {}
    for name, changes in {"free": {}, "limited": {"max_memory_gb": 0.01}}.items():
        found[name], run = train(make_config(**changes), toy_data, silent)
        assert run.config["max_memory_gb"] == changes.get("max_memory_gb")
    assert (found["free"].encoder.recompute, found["limited"].encoder.recompute) == (0, 2)
    said = silent.file.getvalue()
    assert "q, k and v of 2 layers computed again instead of kept" in said
    assert re.search(r"max_memory_gb: 0.01 is less than the \d\.\d\d this run will hold; the line above", said)
    for name, parameter in found["free"].parameters.items():
        assert torch.equal(parameter, found["limited"].parameters[name])


def run_out_of_memory(trainer, above):
    """From its second step on, embedding more than ``above`` tokens fails as on a full device."""
    plain = trainer.encoder.embed

    def embed(ids):
        if trainer.at.step >= 1 and torch.is_grad_enabled() and sum(map(len, ids)) > above:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(ids)

    trainer.encoder.embed = embed


def test_out_of_memory_once_goes_on_in_smaller_pieces_with_the_same_result(make_config, toy_data, silent):
    config = make_config(lora_dropout=0.0)
    trainer = EmbeddingTrainer(config, dataset=toy_data, console=silent)
    trainer._prepare()
    run_out_of_memory(trainer, above=150)  # a batch holds about 260
    assert trainer.train().state == "finished"
    assert silent.file.getvalue().count("out of memory: from here on") == 1 and trainer.gradients.budget <= 150
    undisturbed, _ = train(config, toy_data)
    for name, parameter in undisturbed.parameters.items():
        torch.testing.assert_close(parameter, trainer.parameters[name], rtol=1e-4, atol=1e-6)


def test_out_of_memory_twice_stops_with_what_to_change(make_config, toy_data, silent):
    trainer = EmbeddingTrainer(make_config(), dataset=toy_data, console=silent)
    trainer._prepare()
    run_out_of_memory(trainer, above=10)
    with pytest.raises(MemoryError, match=r"out of memory again.*--micro-batch-tokens \d+"):
        trainer.train()
    assert read_run(trainer.run_dir).state == "failed"


def test_the_padded_path_trains_the_same(make_config, toy_data, tiny_model):
    encoders = [load_encoder(tiny_model, max_seq_length=48, device="cpu") for _ in range(2)]
    encoders[1].slow_path_reason = "asked for"
    for module in encoders[1].backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    config = make_config(lora_dropout=0.0)
    packed, padded = (train(config, toy_data, encoder=encoder)[0] for encoder in encoders)
    for name, parameter in packed.parameters.items():
        torch.testing.assert_close(parameter, padded.parameters[name], rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- numbers that are not finite


def poison(trainer, at_step, what):
    """Make the embeddings, or only the gradient, of one step NaN."""
    calls, plain = [0], trainer.gradients._add

    def add_gradients(batch, share):
        calls[0] += 1
        if calls[0] == at_step and what != "gradient":
            embed = trainer.encoder.embed
            trainer.encoder.embed = lambda ids: embed(ids) * {"embedding": math.nan, "inf": math.inf}[what]
            values = plain(batch, share)
            trainer.encoder.embed = embed
            return values
        values = plain(batch, share)
        if calls[0] == at_step:
            next(iter(trainer.parameters.values())).grad[0, 0] = math.nan
        return values

    trainer.gradients._add = add_gradients


@pytest.mark.parametrize("log_every", [1, 5])
@pytest.mark.parametrize("what", ["embedding", "inf", "gradient"])
def test_a_non_finite_number_stops_the_run_before_it_is_applied(make_config, toy_data, silent, what, log_every):
    trainer = EmbeddingTrainer(make_config(log_every_n_steps=log_every, save_steps=3), dataset=toy_data, console=silent)
    trainer._prepare()
    poison(trainer, at_step=2, what=what)
    with pytest.raises(NumericFault) as caught:
        trainer.train()
    rows = next(trainer.job.schedule.steps_after(1)).batches[0]
    assert caught.value.step == 2 and caught.value.record_ids == trainer.job.question_ids(rows)
    assert "step 2" in str(caught.value) and caught.value.record_ids[0] in str(caught.value)
    run = read_run(trainer.run_dir)
    assert run.state == "failed" and "step 2" in run.status["reason"] and run.model is None
    assert all(torch.isfinite(p).all() for p in trainer.parameters.values())
    assert not re.search(rb"NaN|Infinity", b"".join(p.read_bytes() for p in run.path.rglob("*.json*")))
    assert not list(run.path.glob("checkpoints/step-*[1-9]"))


def test_a_learning_rate_that_blows_up_leaves_no_nan(make_config, toy_data, tiny_model):
    """Weights driven to infinity are found by the next loss or score, whichever comes first."""
    config = make_config(max_steps=20, num_epochs=3)
    trainer = EmbeddingTrainer(config, dataset=toy_data, console=Console(file=io.StringIO()))
    trainer._prepare()
    plain = trainer.optimizer.step
    trainer.optimizer.step = lambda rate, finite: plain(1e38, finite)
    with pytest.raises(NumericFault):
        trainer.train()
    for file in trainer.run_dir.rglob("weights.safetensors"):
        from safetensors.torch import load_file

        assert all(torch.isfinite(t).all() for t in load_file(file).values())


def test_scoring_a_broken_model_is_an_error(make_config, toy_data):
    trainer = EmbeddingTrainer(make_config(), dataset=toy_data, console=Console(file=io.StringIO()))
    trainer._prepare()
    with torch.no_grad():
        next(iter(trainer.parameters.values())).fill_(math.nan)
    with pytest.raises(NumericFault, match="non-finite"):
        trainer.evaluate()


def test_data_that_cannot_train_is_refused_before_the_model_trains(make_config, tmp_path):
    few = make_dataset(articles=3, paragraphs=1, questions=2)
    with pytest.raises(ValueError, match="fewer than one batch of 64"):
        train(make_config(batch_size=64), few)
    one = make_dataset(articles=2, paragraphs=1, questions=12)
    with pytest.raises(ValueError, match="same target"):
        train(make_config(train_split=0.5), one)
    assert find_runs(tmp_path / "runs") == []


def test_float16_is_for_cuda(make_config, toy_data):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ValueError, match="fp16 trains on CUDA only"):
        train(make_config(precision="fp16"), toy_data)


# ---------------------------------------------------------------- resume


@pytest.fixture
def stopped(make_config, toy_data, silent):
    """A run stopped by Ctrl-C after its third step."""
    config = make_config()
    trainer = EmbeddingTrainer(config, dataset=toy_data, console=silent)
    plain = EmbeddingTrainer._take_step

    def take_step(step):
        plain(trainer, step)
        if step.number == 3:
            import signal

            signal.raise_signal(signal.SIGINT)

    trainer._take_step = take_step
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.train()
    assert caught.value.exit_code == 130
    assert read_run(trainer.run_dir).state == "interrupted" and read_run(trainer.run_dir).status["step"] == 3
    with pytest.raises(RuntimeError, match="go on with EmbeddingTrainer.resume"):
        trainer.train()
    return trainer.run_dir


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-4}, {"seed": 7}, {"batch_size": 9}, {"gradient_accumulation_steps": 2}, {"scale": 50.0},
        {"num_epochs": 9}, {"max_steps": 4}, {"lora_r": 2}, {"positives": "answer"}, {"max_seq_length": 32},
        {"mask_false_negatives": False}, {"save_steps": 3}, {"warmup_steps": 3}, {"weight_decay": 0.5},
        {"precision": "bf16"}, {"train_split": 0.5}, {"max_samples": 50}, {"patience": 9}, {"use_lora": False},
        {"micro_batch_tokens": 128},
    ],
)  # fmt: skip
def test_changed_settings_are_refused_by_name(stopped, toy_data, change):
    with pytest.raises(SettingsChanged, match=next(iter(change))):
        EmbeddingTrainer.resume(stopped, changes=change, dataset=toy_data)


def test_a_settings_file_counts_on_resume_too(stopped, toy_data, tmp_path, monkeypatch):
    parser = argparse.ArgumentParser()
    commands.add_train(parser)
    resume = EmbeddingTrainer.resume
    monkeypatch.setattr(EmbeddingTrainer, "resume", lambda run, **named: resume(run, dataset=toy_data, **named))
    file = tmp_path / "new.yaml"
    file.write_text("learning_rate: 0.5\nlog_dir: elsewhere\n")
    options = parser.parse_args(["--resume", str(stopped), "--config", str(file), "--dry-run"])
    with pytest.raises(SettingsChanged, match=r"learning_rate \(0.001 -> 0.5\)"):
        commands.train(options)
    file.write_text("learning_rate: 0.001\nno_such_setting: 3\n")
    with pytest.raises(ValueError, match="no_such_setting"):
        commands.train(options)


def test_a_resumed_trainer_trains_once(stopped, toy_data, silent, monkeypatch):
    trainer = EmbeddingTrainer.resume(stopped, dataset=toy_data, console=silent)

    def fail(*_):
        raise OSError("no space")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space"):
        patched.setattr(trainer, "_take_step", fail)
        trainer.train()
    with pytest.raises(RuntimeError, match="go on with EmbeddingTrainer.resume"):
        trainer.train()


def test_a_prefix_that_looks_like_a_path_stays_as_it_is(make_config, toy_data, silent):
    config = make_config(query_prefix="[/INST] ", passage_prefix="</s>글: ")
    begun = train_until(EmbeddingTrainer(config, dataset=toy_data, console=silent), 1)
    run = EmbeddingTrainer.resume(begun, dataset=toy_data, console=silent).train()
    assert run.config["query_prefix"] == "[/INST] " and run.config["passage_prefix"] == "</s>글: "
    saved = json.loads((run.path / "model" / "training_config.json").read_text())
    assert saved["query_prefix"] == "[/INST] "


def test_another_pooling_is_another_base(make_config, toy_data, tiny_model, tmp_path, silent):
    model, prepared = tmp_path / "model", tmp_path / "prepared"
    prepared.mkdir()
    load_encoder(tiny_model, device="cpu", max_seq_length=48).save(model)
    data = dataclasses.replace(toy_data, directory=prepared)  # where scores of bases are kept
    config, pooling = make_config(model_name=str(model)), model / "1_Pooling" / "config.json"
    _, first = train(config, data)
    begun = train_until(EmbeddingTrainer(config, dataset=data, console=silent), 1)
    pooling.write_text(json.dumps(json.loads(pooling.read_text()) | {"pooling_mode": "cls"}))
    with pytest.raises(SettingsChanged, match="the base model changed"):
        EmbeddingTrainer.resume(begun, dataset=data, console=silent).train()
    _, second = train(config, data)
    _, alone = train(config, toy_data)
    assert second.base == alone.base != first.base


def read_audit(run):
    return json.loads((run.path / "evaluation" / "report.json").read_text())["audit"]["sentence"]


def test_what_the_base_was_trained_on_counts_in_the_audit(make_config, toy_data):
    _, first = train(make_config(), toy_data)
    again = make_config(model_name=str(first.path))
    assert read_audit(train(again, toy_data)[1]).startswith("Clean")
    other_split = make_config(model_name=str(first.path), seed=5)
    assert read_audit(train(other_split, toy_data)[1]).startswith("NOT CLEAN")
    _, third = train(make_config(model_name=str(first.path)), make_dataset(seed=9))
    assert first.name in read_audit(third) and "cannot be called clean" in read_audit(third)
    assert [run.path.resolve() for run in find_runs_behind(third.path)] == [third.path, first.path]
    assert third.base_run == first.name and first.base_run is None
    first.path.rename(first.path.with_name("moved"))
    fourth = make_config(model_name=str(third.path))
    assert f"What {first.name} was trained on is not known here" in read_audit(train(fourth, make_dataset(seed=9))[1])


def test_harmless_changes_are_reported_and_change_nothing(stopped, make_config, toy_data, silent):
    changes = {"num_workers": 3, "log_gradients": False, "save_total_limit": 5}
    trainer = EmbeddingTrainer.resume(stopped, changes=changes, dataset=toy_data, console=silent)
    run = trainer.train()
    said = silent.file.getvalue()
    assert all(name in said for name in changes) and "goes on after step 3 of 5" in said
    undisturbed, _ = train(make_config(log_dir=str(stopped.parent.parent / "other")), toy_data)
    for name, parameter in undisturbed.parameters.items():
        assert torch.equal(parameter, trainer.parameters[name])
    assert run.config["save_total_limit"] == 5


def test_other_data_and_another_base_are_refused(stopped, toy_data, tiny_model, tmp_path, silent):
    before = (stopped / "status.json").read_bytes()
    with pytest.raises(SettingsChanged, match="the data changed"):
        EmbeddingTrainer.resume(stopped, dataset=make_dataset(seed=1), console=silent).train()
    other = load_encoder(tiny_model, max_seq_length=48, device="cpu")
    with torch.no_grad():
        other.backbone.embeddings.LayerNorm.bias[0] += 1e-3
    with pytest.raises(SettingsChanged, match="the base model changed"):
        EmbeddingTrainer.resume(stopped, dataset=toy_data, encoder=other, console=silent).train()
    assert (stopped / "status.json").read_bytes() == before


def test_a_finished_run_is_left_untouched(trained, toy_data, silent):
    _, run, _ = trained
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.path.rglob("*") if p.is_file()}
    assert trained[0].train().path == run.path
    again = EmbeddingTrainer.resume(run.path, dataset=toy_data, console=silent).train()
    assert again.path == run.path and "already finished" in silent.file.getvalue()
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.path.rglob("*") if p.is_file()} == before


def test_a_second_process_is_refused(stopped, toy_data, silent):
    with lock_run(stopped), pytest.raises(RunBusy, match="in use by another process"):
        EmbeddingTrainer.resume(stopped, dataset=toy_data, console=silent).train()
    assert EmbeddingTrainer.resume(stopped, dataset=toy_data, console=silent).train().state == "finished"


def test_a_second_signal_leaves_at_once():
    pid = os.fork()
    if pid == 0:
        import signal

        with StopSignals():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130


# ---------------------------------------------------------------- determinism, privacy, terminal


@pytest.mark.parametrize("changes", [{}, {"use_lora": False}, {"precision": "bf16"}, {"micro_batch_tokens": 64}])
def test_the_same_seed_gives_the_same_bits(make_config, toy_data, tmp_path, changes):
    outcomes = []
    for name in ("a", "b"):
        trainer, run = train(make_config(log_dir=str(tmp_path / name), **changes), toy_data)
        weights = {n: p.detach().numpy().tobytes() for n, p in trainer.parameters.items()}
        outcomes.append({**weights, "final": run.final})
    assert outcomes[0] == outcomes[1]
    other, _ = train(make_config(log_dir=str(tmp_path / "c"), seed=43, **changes), toy_data)
    assert any(outcomes[0][n] != p.detach().numpy().tobytes() for n, p in other.parameters.items())


def test_nothing_in_a_run_tells_secrets_or_where_it_ran(make_config, toy_data, tmp_path, monkeypatch):
    token = "hf_planted0Token1For2Test3"
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("SOME_API_KEY", "another-planted-secret")
    monkeypatch.setattr(sys, "argv", ["koret", "train", "--hub-token", token, "--api-key=another-planted-secret"])
    monkeypatch.setenv("HOME", str(tmp_path))
    _, run = train(make_config(), toy_data)
    content = b"".join(p.read_bytes() for p in run.path.rglob("*") if p.is_file())
    for secret in (token, "another-planted-secret", str(tmp_path)):
        assert secret.encode() not in content
    pickled = [p for p in run.path.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert pickled == [] and b"torch._utils" not in content


def test_plain_lines_when_piped_a_bar_on_a_terminal_and_quiet_on_request(make_config, toy_data):
    piped, terminal, quiet = (Console(file=io.StringIO(), force_terminal=t, width=120) for t in (False, True, False))
    train(make_config(), toy_data, piped)
    train(make_config(), toy_data, terminal)
    train(make_config(), toy_data, quiet, progress=False)
    assert re.search(r"step 5/5  loss \d\.\d+  [\d,.]+ pairs/s  \d:\d\d left", piped.file.getvalue())
    assert "\x1b[" not in piped.file.getvalue()
    assert "\x1b[" in terminal.file.getvalue() and "5/5" in terminal.file.getvalue()
    assert "pairs/s" not in quiet.file.getvalue() and "not distinguishable" in quiet.file.getvalue()


def test_every_setting_as_used_is_saved(trained):
    trainer, run, _ = trained
    saved = json.loads((run.path / "model" / "training_config.json").read_text())
    assert set(saved) == set(trainer.config.to_dict())
    assert {**saved, "model_name": 0, "log_dir": 0} == {**trainer.config.to_dict(), "model_name": 0, "log_dir": 0}
    assert TrainingConfig(**saved)


def test_importing_the_trainer_does_not_start_anything():
    code = "import koret.training.trainer, signal; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_workers_do_not_change_the_weights(make_config, toy_data, tmp_path):
    """The same files read by 0, 1 and 4 processes: the same data set, the same batches, the same bits."""
    passages = toy_data.passages.to_pylist()
    for number, article in enumerate(toy_data.articles.to_pylist()):
        first, count = article["first_passage"], article["passage_count"]
        paragraphs = [
            {
                "context": passages[row]["text"],
                "qas": [
                    {
                        "id": q["id"],
                        "question": q["text"],
                        "answers": [{"text": q["answers"][0], "answer_start": q["answer_start"]}],
                    }  # fmt: skip
                    for q in toy_data.questions.to_pylist()
                    if q["best"] == row
                ],
            }
            for row in range(first, first + count)
        ]
        file = tmp_path / "data" / f"part{number:02d}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"data": [{"title": article["title"], "paragraphs": paragraphs}]}), encoding="utf-8")
    weights = []
    for workers in (0, 1, 4):
        config = make_config(
            dataset_root=str(tmp_path / "data"), num_workers=workers, cache_dir=str(tmp_path / f"cache{workers}")
        )
        trainer, run = train(config, None)
        weights.append({n: p.detach().numpy().tobytes() for n, p in trainer.parameters.items()})
    assert run.data["questions"] == toy_data.questions.num_rows
    assert weights[0] == weights[1] == weights[2]


def test_a_resumed_training_multiplies_float32_as_it_began(make_config, toy_data, silent, monkeypatch):
    """Which way is faster is measured, and might be found otherwise again; the merged model is scored the same way."""

    def fail():
        raise AssertionError("measured again")

    monkeypatch.setattr(trainers, "prefers_order", lambda: False)
    stopped = EmbeddingTrainer(make_config(), dataset=toy_data, console=silent)
    train_until(stopped, 3)
    assert json.loads((stopped.run_dir / "environment.json").read_text())["resolved"]["prefers_order"] is False
    for module in (trainers, products):
        monkeypatch.setattr(module, "prefers_order", fail)
    resumed = EmbeddingTrainer.resume(stopped.run_dir, dataset=toy_data, console=silent)
    resumed.train()
    assert resumed.encoder.prefers_order is False and "settings changed" not in silent.file.getvalue()


def test_scoring_begins_without_what_steps_alone_need_memory_for(make_config, toy_data, silent, monkeypatch):
    trainer = EmbeddingTrainer(make_config(max_steps=2), dataset=toy_data, console=silent)
    trainer._prepare()
    trainer.gradients.add(next(iter(trainer._make_first(1))))
    if not trainer.encoder.keeps_on_shelves:
        pytest.skip("nothing is kept on shelves here")
    shelves, encode, seen = trainer.encoder._packed[1].shelves, TextEncoder.encode, []
    assert shelves._free
    monkeypatch.setattr(trainers, "return_freed", lambda: seen.append("given back"))

    def look(self, *texts, **options):
        seen.append(len(shelves._free))
        return encode(self, *texts, **options)

    monkeypatch.setattr(TextEncoder, "encode", look)
    trainer.evaluate()
    assert seen[:2] == ["given back", 0]
