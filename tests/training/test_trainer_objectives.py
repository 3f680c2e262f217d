"""Whole trainings with every objective: what each is worth, that a resume keeps its bits, and what is refused."""

import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from toys import make_dataset, train_until

from koret.config import TrainingConfig
from koret.retrieval.encoder import load_encoder
from koret.runs import find_runs, read_run
from koret.training import guide as guide_module
from koret.training.checkpoint import hash_weights
from koret.training.guide import embed_with_guide
from koret.training.mining import MiningSettings, mine_negatives
from koret.training.negatives import write_negatives
from koret.training.objectives import MOST_SCALE
from koret.training.resume import SettingsChanged
from koret.training.trainer import EmbeddingTrainer


def start(config, data, **options):
    return EmbeddingTrainer(config, dataset=data, console=Console(file=io.StringIO()), **options)


def read_weights(trainer):
    return {name: p.detach().numpy().tobytes() for name, p in trainer.parameters.items()}


def read_steps(run):
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


@pytest.fixture
def mined(toy_data, tiny_model, make_config, tmp_path):
    """A file of negatives with the base's cosines, for the split of ``make_config``."""
    from koret.data.pairs import split_articles

    config = make_config()
    train, _ = split_articles(toy_data, config.train_split, config.seed)
    encoder = load_encoder(tiny_model, max_seq_length=48, device="cpu")
    settings = MiningSettings(per_question=3, margin_relative=None)
    found = mine_negatives(toy_data, train, encoder, settings)
    path = tmp_path / "negatives.jsonl"
    write_negatives(path, found, toy_data, settings, {"model": "base", "train_split": 0.7, "seed": 42})
    return str(path)


# Every setting beside the plain loss that changes what is minimised; "mined" stands for the file above, "base" for
# the base model as guide.
OBJECTIVES = {
    "several positives": {"multi_positive": True, "positives": "both"},
    "both directions": {"symmetric": True},
    "own side": {"same_tower_negatives": True},
    "hardness": {"hardness_weight": 3.0},
    "truncations": {"matryoshka_dims": (8, 16)},
    "learned scale": {"learn_scale": True},
    "guide": {"guide_model": "base"},
    "guide, relative margin": {"guide_model": "base", "guide_margin": 0.05, "guide_margin_kind": "relative"},
    "guide as the teacher only": {"guide_model": "base", "guide_margin": None, "distillation": "kl"},
    "guide and margins": {"guide_model": "base", "distillation": "margin_mse", "distillation_weight": 0.5},
    "mined scores, margins": {"hard_negatives": "mined", "negatives_per_question": 2, "distillation": "margin_mse"},
    "mined scores, kl": {"hard_negatives": "mined", "negatives_per_question": 3, "distillation": "kl"},
    "all at once": {
        "guide_model": "base", "hard_negatives": "mined", "symmetric": True, "same_tower_negatives": True,
        "multi_positive": True, "matryoshka_dims": (16,), "learn_scale": True, "distillation": "kl",
    },
}  # fmt: skip


@pytest.fixture
def settle(mined, tiny_model):
    places = {"mined": mined, "base": str(tiny_model)}

    def fill(settings):
        return {name: places.get(value, value) if isinstance(value, str) else value for name, value in settings.items()}

    return fill


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_resumes_and_is_not_the_plain_one(make_config, toy_data, tmp_path, settle, name):
    """The same bits with and without a stop after the third step, other bits than the plain loss has."""
    settings = settle(OBJECTIVES[name])
    whole = start(make_config(**settings, log_dir=str(tmp_path / "whole")), toy_data)
    run = whole.train()
    assert run.state == "finished" and len(read_steps(run)) == 5
    assert all(math.isfinite(line["train/loss"]) for line in read_steps(run))

    plain = {k: v for k, v in settings.items() if k in ("positives", "hard_negatives", "negatives_per_question")}
    other = start(make_config(**plain, log_dir=str(tmp_path / "plain")), toy_data)
    other.train()
    assert read_weights(whole) != read_weights(other)

    broken = start(make_config(**settings, log_dir=str(tmp_path / "broken")), toy_data)
    train_until(broken, 4)
    (stopped,) = find_runs(tmp_path / "broken")
    again = EmbeddingTrainer.resume(stopped.path, dataset=toy_data, console=Console(file=io.StringIO()))
    again.train()
    assert read_weights(again) == read_weights(whole)
    kept = ("train/loss", "train/scale", "train/guided_out")
    for one, two in zip(read_steps(run), read_steps(read_run(stopped.path)), strict=True):
        assert {n: one.get(n) for n in kept} == {n: two.get(n) for n in kept}


def test_objectives_left_at_their_defaults_change_nothing(make_config, toy_data, tmp_path):
    """Each default, spelled out, is the plain loss to the last bit; a temperature of it, too."""
    spelled = dict(
        multi_positive=False, symmetric=False, same_tower_negatives=False, hardness_weight=0.0, matryoshka_dims=(32,),
        learn_scale=False, guide_model=None, distillation="none",
    )  # fmt: skip
    trainers = [
        start(make_config(**values, log_dir=str(tmp_path / name)), toy_data)
        for name, values in (("plain", {}), ("spelled", spelled))
    ]
    for trainer in trainers:
        trainer.train()
    assert read_weights(trainers[0]) == read_weights(trainers[1])


# ---------------------------------------------------------------- the learned scale


def test_the_scale_moves_is_recorded_never_decays_and_stays_out_of_the_model(make_config, toy_data):
    trainer = start(make_config(learn_scale=True, learning_rate=1e-2, max_steps=8), toy_data)
    run = trainer.train()
    scales = [line["train/scale"] for line in read_steps(run)]
    assert scales[0] == pytest.approx(20.0) and len(set(scales)) > 4
    (alone,) = [group for group in trainer.optimizer.adamw.param_groups if group["weight_decay"] == 0]
    assert [p is trainer.parameters["log_scale"] for p in alone["params"]] == [True]
    from safetensors.torch import load_file

    assert not any("scale" in name for name in load_file(run.path / "model" / "model.safetensors"))
    assert any("gradients/log_scale_weight_norm" in line for line in read_steps(run))


def test_the_first_step_of_the_scale_is_what_finite_differences_say(make_config, toy_data):
    trainer = start(make_config(learn_scale=True, lora_dropout=0.0), toy_data)
    trainer._prepare()
    for module in trainer.encoder.backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = trainer.job.maker.make(next(trainer.job.schedule.steps_after(0)).batches[0])
    trainer.gradients.add([batch])
    scale = trainer.parameters["log_scale"]
    found, at, values = scale.grad.item(), scale.item(), []
    for shift in (1e-2, -1e-2):
        with torch.no_grad():
            scale.fill_(at + shift)
        values.append(trainer.gradients.add([batch])[0].item())
    assert found == pytest.approx((values[0] - values[1]) / 2e-2, rel=1e-2)


def test_a_learned_scale_stays_at_or_below_the_most(make_config, toy_data):
    run = start(make_config(learn_scale=True, scale=99.9, learning_rate=0.5, max_steps=8), toy_data).train()
    scales = [line["train/scale"] for line in read_steps(run)]
    assert max(scales) <= MOST_SCALE * (1 + 1e-6) and min(scales) >= 1


def test_numbers_without_a_dimension_are_hashed_too():
    one, two = {"s": torch.tensor(1.5)}, {"s": torch.tensor(1.25)}
    assert hash_weights(one) == hash_weights({"s": torch.tensor(1.5)}) != hash_weights(two)


# ---------------------------------------------------------------- the guide


def test_the_guide_takes_out_what_its_own_cosines_say(make_config, toy_data, tiny_model):
    """Against loops over the guide's plain encodings of the batch's texts."""
    trainer = start(make_config(guide_model=str(tiny_model), guide_margin=0.02, lora_dropout=0.0), toy_data)
    trainer._prepare()
    job, encoder = trainer.job, load_encoder(tiny_model, max_seq_length=48, device="cpu")
    rows = next(job.schedule.steps_after(0)).batches[0]
    batch = job.maker.make(rows)
    wanted = 0
    ids = np.unique(job.pairs.targets[rows])
    texts = encoder.encode([job.pairs.texts[i] for i in ids], "passage")
    for row in rows.tolist():
        asked = encoder.encode([job.pairs.queries[row]], "query")[0]
        own = float(asked @ texts[int(np.searchsorted(ids, job.pairs.targets[row]))])
        spared = set(job.pairs.known_of(row).tolist()) | {int(job.pairs.targets[row])}
        scores = (asked @ texts.T).tolist()
        wanted += sum(s > own - 0.02 for i, s in zip(ids.tolist(), scores, strict=True) if i not in spared)
    values = trainer.gradients.add([batch])
    assert values[3].item() == wanted > 0


def test_guide_vectors_are_kept_found_again_and_made_anew_when_damaged(toy_data, tiny_model, make_config, tmp_path):
    trainer = start(make_config(), toy_data)
    trainer._prepare()
    pairs = trainer.job.pairs
    first = embed_with_guide(str(tiny_model), "fp32", pairs, tmp_path)
    files = sorted(tmp_path.glob("guide-*.safetensors"))
    assert len(files) == 2
    encoder = load_encoder(tiny_model, device="cpu")
    assert np.abs(first.texts.astype(np.float32) - encoder.encode(pairs.texts, "passage")).max() < 1e-3
    assert np.abs(first.queries.astype(np.float32) - encoder.encode(pairs.queries, "query")).max() < 1e-3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guide_module.TextEncoder, "encode", lambda *a, **k: pytest.fail("encoded again"))
        second = embed_with_guide(str(tiny_model), "fp32", pairs, tmp_path)
    assert np.array_equal(first.texts, second.texts) and np.array_equal(first.queries, second.queries)
    for file in files:
        file.write_bytes(file.read_bytes()[:-7])
    third = embed_with_guide(str(tiny_model), "fp32", pairs, tmp_path)
    assert np.array_equal(first.texts, third.texts) and np.array_equal(first.queries, third.queries)


def test_a_run_goes_on_with_the_guide_it_began_with_only(make_config, toy_data, tiny_model, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "guide"
    shutil.copytree(tiny_model, folder)
    trainer = start(make_config(guide_model=str(folder)), toy_data)
    trainer._take_step = lambda step: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.LayerNorm.bias"] += 0.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingsChanged, match="the guide model changed"):
        EmbeddingTrainer.resume(trainer.run_dir, dataset=toy_data, console=Console(file=io.StringIO())).train()


def test_empty_texts_and_equal_questions_pass_through_a_guide(make_config, tiny_model):
    data = make_dataset(articles=12, paragraphs=2, questions=4)
    column = data.questions.schema.get_field_index("text")
    texts = data.questions.column("text").to_pylist()
    texts[1], texts[2] = texts[0], " "
    import dataclasses

    import pyarrow as pa

    data = dataclasses.replace(data, questions=data.questions.set_column(column, "text", pa.array(texts)))
    run = start(make_config(guide_model=str(tiny_model), same_tower_negatives=True, symmetric=True), data).train()
    assert run.state == "finished" and all(math.isfinite(line["train/loss"]) for line in read_steps(run))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guide_margin": 0.1}, "guide_margin: does nothing without guide_model"),
        ({"guide_margin_kind": "relative"}, "guide_margin_kind: does nothing without guide_model"),
        ({"distillation_weight": 2.0}, "distillation_weight: does nothing without distillation"),
        ({"distillation": "margin_mse", "distillation_temperature": 0.1}, "does nothing without distillation kl"),
        ({"distillation": "kl", "remine_every": 1}, "the model's own and teach nothing"),
        ({"guide_model": "x", "guide_margin": None}, "guide_model: has nothing to do"),
        ({"learn_scale": True, "scale": 200.0}, "a learned scale is at most 100"),
        ({"matryoshka_dims": (0, 8)}, "every length must be at least 1"),
        ({"multi_positive": True, "mask_false_negatives": False}, "leave mask_false_negatives at true"),
    ],
)
def test_settings_that_do_nothing_or_contradict_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)


def test_a_teacher_and_vectors_that_are_not_there_are_refused_before_a_run_begins(make_config, toy_data, tmp_path):
    for settings, message in (
        ({"distillation": "kl"}, "needs a teacher's scores"),
        ({"matryoshka_dims": (16, 33)}, "33 is more than the 32 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            start(make_config(**settings), toy_data).train()
    assert find_runs(tmp_path / "runs") == []
