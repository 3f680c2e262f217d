"""torch.compile in a training: chosen by what it takes, checked before it is believed, the same training with it."""

import json

import pytest
import torch
from toys import train_until

from koret.retrieval import packed, tokenwise
from koret.retrieval.encoder import load_encoder
from koret.retrieval.processes import Group, Process
from koret.training import compilation
from koret.training.compilation import choose_compiling
from koret.training.lora import setup_lora_model
from koret.training.trainer import EmbeddingTrainer

pytestmark = pytest.mark.usefixtures("compiles_here")


@pytest.fixture
def encoder(tiny_model):
    encoder = load_encoder(tiny_model, max_seq_length=48, device="cpu")
    torch.manual_seed(0)
    setup_lora_model(encoder, 4, 8, 0.1)
    return encoder


@pytest.fixture
def tried_here(monkeypatch):
    """Tries on the CPU too, for trainings of any length."""
    monkeypatch.setattr(compilation, "DEVICES", ("cpu",))
    monkeypatch.setattr(compilation, "WORTH", 0.0)


class Steps:
    """Steps of a few texts that take ``seconds`` a token, the first without torch.compile and the second with it."""

    def __init__(self, encoder, monkeypatch, *seconds):
        self.encoder, self.seconds, self.seen = encoder, list(seconds), []
        monkeypatch.setattr(compilation, "time_steps", self.time)

    def make(self):
        class Texts:
            texts = self.encoder.tokenize(["한국의 서울", "부산"], "query")

        return iter([[Texts()]])

    def time(self, steps, add_gradients):
        self.seen.append(self.encoder.compiles)
        torch.rand(3)
        return self.seconds[len(self.seen) - 1]

    def choose(self, group=None, tokens=1000):
        return choose_compiling(self.encoder, self.make, None, tokens, group or Group())


@pytest.mark.parametrize(("compiled", "used"), [(0.5, True), (0.94, True), (0.96, False), (2.0, False)])
def test_it_is_used_where_a_step_takes_clearly_less(encoder, tried_here, monkeypatch, compiled, used):
    steps, before = Steps(encoder, monkeypatch, 1.0, compiled), torch.get_rng_state()
    said = steps.choose()
    assert steps.seen == [False, True] and encoder.compiles is used
    assert f"{'used' if used else 'left alone'}: a step takes {compiled:.2f} of its time" in said and "16:40" in said
    assert torch.equal(torch.get_rng_state(), before)
    assert ("torch.compile" in encoder.path) is used


def test_the_slowest_process_decides_for_all(encoder, tried_here, monkeypatch):
    steps, group = Steps(encoder, monkeypatch, 1.0, 0.5), Group(Process(0, 2))
    monkeypatch.setattr(group, "gather", lambda own: [own, own * 2 if own == 0.5 else own])
    assert "left alone" in steps.choose(group) and not encoder.compiles


def test_a_cpu_and_a_short_training_are_not_tried(encoder, monkeypatch):
    steps = Steps(encoder, monkeypatch, 1.0)
    assert steps.choose() is None and steps.seen == []
    monkeypatch.setattr(compilation, "DEVICES", ("cpu",))
    assert steps.choose(tokens=compilation.WORTH * 0.99) is None and steps.seen == [False]
    assert not encoder.compiles


def test_gradients_that_differ_are_left_alone(encoder, tried_here, monkeypatch):
    plain = tokenwise.compile_parts

    def break_parts(activation):
        parts = plain(activation)
        return parts._replace(end=lambda *arguments: parts.end(*arguments) + 0.01 * arguments[-1])

    monkeypatch.setattr(packed, "compile_parts", break_parts)
    steps = Steps(encoder, monkeypatch, 1.0)
    said = steps.choose()
    assert "left alone: its gradients differ by" in said and "0.2% are allowed" in said
    assert steps.seen == [False] and not encoder.compiles


@pytest.mark.parametrize(("words", "told"), [("no compiler\nfound", "OSError: no compiler"), ("", "OSError: no words")])
def test_a_compiler_that_fails_is_left_alone(encoder, tried_here, monkeypatch, words, told):
    def fail(activation):
        raise OSError(words)

    monkeypatch.setattr(packed, "compile_parts", fail)
    said = Steps(encoder, monkeypatch, 1.0).choose()
    assert said.endswith(told) and not encoder.compiles
    assert encoder.embed(encoder.tokenize(["서울"], "query")).requires_grad  # goes on as it did


def test_a_training_tries_it_and_keeps_to_what_it_found(make_config, toy_data, silent, tried_here, monkeypatch):
    monkeypatch.setattr(compilation, "KEPT", float("inf"))
    trainer = EmbeddingTrainer(make_config(lora_dropout=0.0), dataset=toy_data, console=silent)
    train_until(trainer, 1)
    said = silent.file.getvalue()
    assert "torch.compile was tried and is used" in said and "fused by torch.compile" in said
    assert json.loads((trainer.run_dir / "environment.json").read_text())["resolved"]["torch_compile"] is True
    monkeypatch.setattr(compilation, "KEPT", 0.0)  # another trial would find otherwise
    resumed = EmbeddingTrainer.resume(trainer.run_dir, dataset=toy_data, console=silent)
    run = resumed.train()
    assert resumed.encoder.compiles and run.is_finished
    assert silent.file.getvalue().count("was tried") == 1 and "settings changed" not in silent.file.getvalue()
    plain = EmbeddingTrainer(make_config(lora_dropout=0.0, torch_compile=False), dataset=toy_data, console=silent)
    plain.train()
    for name, parameter in plain.parameters.items():
        torch.testing.assert_close(parameter, resumed.parameters[name], rtol=1e-4, atol=1e-6)


def test_a_compiled_training_resumes_to_the_same_bits(make_config, toy_data, silent):
    """With dropout and GradCache, whose two passes draw alike."""
    config = make_config(torch_compile=True, micro_batch_tokens=64)
    whole = EmbeddingTrainer(config, dataset=toy_data, console=silent)
    whole.train()
    cut = EmbeddingTrainer(config, dataset=toy_data, console=silent)
    resumed = EmbeddingTrainer.resume(train_until(cut, 4), dataset=toy_data, console=silent)
    resumed.train()
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name])


def test_memory_of_compiled_layers_is_counted(encoder):
    from koret.training.memory import measure_bytes_per_token

    found = {}
    for encoder.compiles in (False, True):
        found[encoder.compiles] = measure_bytes_per_token(encoder)
    assert 0.5 * found[False] < found[True] < 2 * found[False]


def test_what_cannot_be_compiled_is_refused_in_words(make_config, toy_data, silent, monkeypatch):
    monkeypatch.setattr(packed, "FAMILIES", ())
    with pytest.raises(ValueError, match="torch_compile: it needs the padding-free forward, and architecture 'bert'"):
        EmbeddingTrainer(make_config(torch_compile=True), dataset=toy_data, console=silent).train()
    trainer = EmbeddingTrainer(make_config(max_steps=1), dataset=toy_data, console=silent)
    monkeypatch.setattr(compilation, "DEVICES", ("cpu",))
    assert trainer.train().is_finished and not trainer.encoder.compiles
    parameter = next(iter(trainer.parameters.values()))
    parameter.quant_state = object()
    monkeypatch.setattr(trainer.encoder, "slow_path_reason", None)
    assert compilation.explain_uncompiled(trainer.encoder) == "weights in 4 bits are not compiled"
