"""TrainingConfig: the published defaults, one message for all problems, the same door for YAML and the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from koret.config import TrainingConfig, read_settings

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml"))


def test_defaults_are_the_documented_ones():
    config = TrainingConfig()
    documented = {
        "model_name": "intfloat/multilingual-e5-small", "max_seq_length": 256, "batch_size": 16, "num_epochs": 3,
        "learning_rate": 2e-5, "warmup_steps": 500, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.1,
        "lora_target_modules": ("query", "key", "value"), "train_split": 0.9, "precision": "auto",
        "log_dir": "./logs/tensorboard", "log_every_n_steps": 10, "log_gradients": True,
        "log_gradient_histograms": False, "save_steps": 1000, "scale": 20.0, "positives": "passage",
        "mask_false_negatives": True,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in documented} == documented
    assert not hasattr(config, "output_dir") and not hasattr(config, "checkpoint_dir")


def test_baseline_recipe_is_the_original_one():
    values = read_settings(Path(__file__).resolve().parents[1] / "recipes" / "baseline.yaml")
    config = TrainingConfig(**values)
    assert (config.positives, config.batch_size, config.num_epochs, config.learning_rate) == ("answer", 16, 3, 2e-5)
    assert (config.warmup_steps, config.lora_r, config.lora_alpha, config.lora_dropout) == (500, 8, 16, 0.1)
    assert config.lora_target_modules == ("query", "key", "value")
    assert (config.max_seq_length, config.train_split, config.scale) == (256, 0.9, 20.0)
    assert config.gradient_checkpointing


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads(recipe):
    TrainingConfig.from_file(recipe)


def test_every_problem_stands_in_one_message():
    with pytest.raises(ValueError) as caught:
        TrainingConfig(
            batch_sise=8, learning_rate="fast", train_split=1.0, positives="context", num_epochs=0, lora_dropout=1.0,
            save_steps=2.5, log_gradients="maybe", lora_target_modules=[1],
        )  # fmt: skip
    message = str(caught.value)
    assert message.startswith("9 configuration problems")
    for part in (
        "'batch_sise' (did you mean 'batch_size'?)", "learning_rate: must be a number", "less than 1.0",
        "one of passage, answer, both", "num_epochs: must be at least 1", "lora_dropout: must be less than 1.0",
        "save_steps: must be a whole number", "log_gradients: must be true or false", "lora_target_modules",
    ):  # fmt: skip
        assert part in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan", True, None])
def test_numbers_must_be_numbers(value):
    with pytest.raises(ValueError, match="learning_rate"):
        TrainingConfig(learning_rate=value)


def test_text_is_read_as_the_command_line_gives_it():
    config = TrainingConfig(
        batch_size="32", learning_rate="1e-3", log_gradients="false", lora_target_modules="query,value",
        max_steps="none", patience="3",
    )  # fmt: skip
    assert (config.batch_size, config.learning_rate, config.log_gradients) == (32, 1e-3, False)
    assert (config.lora_target_modules, config.max_steps, config.patience) == (("query", "value"), None, 3)


def test_what_is_saved_reads_back_the_same(tmp_path):
    config = TrainingConfig(batch_size=8, lora_target_modules=("dense",), cache_dir=str(tmp_path))
    (tmp_path / "a.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert TrainingConfig.from_file(tmp_path / "a.json") == TrainingConfig.from_file(tmp_path / "a.yaml") == config
    assert TrainingConfig.from_file(tmp_path / "a.yaml", batch_size=4).batch_size == 4
    assert dataclasses.replace(config, seed=7).seed == 7


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    for name in ("list.yaml", "broken.yaml", "absent.yaml"):
        with pytest.raises(ValueError, match=name):
            TrainingConfig.from_file(tmp_path / name)
    (tmp_path / "empty.yaml").write_text("")
    assert TrainingConfig.from_file(tmp_path / "empty.yaml") == TrainingConfig()


def test_summary_marks_what_differs(capsys):
    TrainingConfig(batch_size=8).print_summary()
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if "batch_size" in line).split() == ["*", "batch_size", "8"]
    assert next(line for line in lines if "num_epochs" in line).split() == ["num_epochs", "3"]
    assert sum(line.startswith("[") for line in lines) == 5
