"""Adapters: attached where asked, counted, saved as PEFT does, merged without changing a vector."""

import io
import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from toys import SYLLABLES, build_tiny_model

from koret.retrieval import encoder as encoder_module
from koret.retrieval.encoder import load_encoder
from koret.training.lora import get_lora_info, merge_lora, print_lora_info, save_adapter, setup_lora_model
from koret.training.signals import Interrupted
from koret.training.trained import TrainedWeights, count_trained, setup_full_model
from koret.training.trainer import EmbeddingTrainer

SILENT = Console(file=io.StringIO())
TEXTS = ["가개 갸걔 거게", "나내", "도 되 두"]


@pytest.fixture
def encoder(tiny_model):
    return load_encoder(tiny_model, max_seq_length=48, device="cpu")


def stir(encoder):
    """Give fresh adapters an effect."""
    torch.manual_seed(5)
    for name, parameter in encoder.backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        elif "magnitude" in name or ("embeddings" in name and parameter.requires_grad):
            parameter.data.mul_(1 + 0.3 * torch.rand_like(parameter))


def test_fresh_adapters_change_nothing_and_train_alone(encoder):
    before = encoder.encode(TEXTS, "query")
    assert setup_lora_model(encoder, r=4, alpha=8, dropout=0.1, target_modules=("query", "value")) is encoder
    assert np.abs(encoder.encode(TEXTS, "query") - before).max() < 1e-6
    trainable = {n for n, p in encoder.backbone.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 2 * 2 and all(".lora_" in n for n in trainable)


def test_report_counts_by_hand(encoder, capsys):
    setup_lora_model(encoder, r=4, alpha=8)
    info = get_lora_info(encoder)
    assert info.trainable == 2 * 3 * (4 * 32 + 32 * 4)  # layers x q, k, v x (A + B)
    assert info.total == sum(p.numel() for p in encoder.model.parameters())
    assert isinstance(info.weights, TrainedWeights) and info.weights.table == 87 * 32
    print_lora_info(encoder)
    said = capsys.readouterr().out
    assert f"{info.trainable:,} of {info.total:,} weights train" in said
    assert "2 x query, 2 x key, 2 x value" in said and f"{info.share:.2%}" in said


def test_unknown_targets_are_refused_with_what_there_is(encoder):
    with pytest.raises(ValueError, match=r"no linear layer is called q_proj, foo; this model has: .*query.*dense"):
        setup_lora_model(encoder, target_modules=("query", "q_proj", "foo"))
    with pytest.raises(ValueError, match="already has adapters"):
        setup_lora_model(setup_lora_model(encoder))
    with pytest.raises(ValueError, match="has no adapters"):
        get_lora_info(SentenceTransformer(encoder.name, device="cpu"))


def test_all_linear_means_the_layers_that_vectors_pass_through(encoder):
    setup_lora_model(encoder, r=2, target_modules=("all-linear",))
    modules = get_lora_info(encoder).modules
    assert len(modules) == 2 * 6 and not any("pooler" in name for name in modules)
    encoder.embed(encoder.tokenize(TEXTS, "query")).sum().backward()
    assert all(p.grad is not None for p in encoder.backbone.parameters() if p.requires_grad)


def test_a_sentence_transformer_can_be_given(tiny_model):
    model = SentenceTransformer(str(tiny_model), device="cpu")
    assert setup_lora_model(model, r=2) is model
    assert get_lora_info(model).trainable == 2 * 3 * (2 * 32 + 32 * 2)


@pytest.mark.parametrize("train_embeddings", [False, True])
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("targets", [("query", "key", "value"), ("all-linear",)])
def test_merged_saved_and_adapted_give_the_same_vectors(
    encoder, tiny_model, tmp_path, targets, variant, train_embeddings
):
    base = encoder.encode(TEXTS, "passage")
    setup_lora_model(encoder, 4, 8, target_modules=targets, variant=variant, train_embeddings=train_embeddings)
    stir(encoder)
    tuned = encoder.encode(TEXTS, "passage")
    assert np.abs(tuned - base).max() > 1e-3

    merged = merge_lora(encoder)
    assert not any("lora" in name for name, _ in merged.model.named_parameters())
    assert np.abs(merged.encode(TEXTS, "passage") - tuned).max() < 1e-6
    assert np.abs(encoder.encode(TEXTS, "passage") - tuned).max() == 0  # the original kept its adapters
    theirs = {p.data_ptr() for p in merged.model.parameters()}
    assert all(
        (p.data_ptr() in theirs) == (not p.requires_grad)
        for n, p in encoder.backbone.named_parameters()
        if "lora_" not in n and "base_layer" not in n
    )  # frozen: one memory; trained: two

    save_adapter(encoder, tmp_path / "adapter", "base/name")
    plain = SentenceTransformer(str(tiny_model), device="cpu")
    plain[0].model = PeftModel.from_pretrained(plain[0].model, str(tmp_path / "adapter")).eval()
    adapted = plain.encode([f"passage: {text}" for text in TEXTS], normalize_embeddings=True)
    assert np.abs(adapted - tuned).max() < 1e-6


def test_saved_adapter_is_what_peft_itself_writes(encoder, tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    setup_lora_model(encoder, r=4, alpha=8)
    save_adapter(encoder, tmp_path / "ours", str(tiny_model))
    base = SentenceTransformer(str(tiny_model), device="cpu")[0].model
    targets = ["query", "key", "value"]
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=targets, task_type="FEATURE_EXTRACTION")
    get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
    shapes = [
        {name: tuple(t.shape) for name, t in load_file(tmp_path / who / "adapter_model.safetensors").items()}
        for who in ("ours", "theirs")
    ]
    assert shapes[0] == shapes[1]
    ours, theirs = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    ours["target_modules"].sort(), theirs["target_modules"].sort()
    assert {**ours, "base_model_name_or_path": 0} == {**theirs, "base_model_name_or_path": 0}
    assert not ours["base_model_name_or_path"].startswith("/")


def test_a_broken_adapter_is_not_merged(encoder):
    setup_lora_model(encoder, r=2)
    with torch.no_grad():
        next(p for n, p in encoder.backbone.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="query is broken"):
        merge_lora(encoder)


def test_each_variant_is_its_papers_formula(tiny_model):
    for variant in ("lora", "rslora", "dora"):
        encoder = load_encoder(tiny_model, max_seq_length=48, device="cpu")
        before = encoder.backbone.encoder.layer[1].attention.self.key.weight.double().numpy()
        setup_lora_model(encoder, r=4, alpha=6, variant=variant)
        stir(encoder)
        layer = encoder.backbone.encoder.layer[1].attention.self.key
        down, up = (half["default"].weight.detach().double().numpy() for half in (layer.lora_A, layer.lora_B))
        expected = before + {"lora": 6 / 4, "rslora": 6 / 2, "dora": 6 / 4}[variant] * up @ down
        if variant == "dora":
            lengths = layer.lora_magnitude_vector["default"].weight.detach().double().numpy()
            expected *= (lengths / np.sqrt((expected**2).sum(axis=1)))[:, None]
        merged = merge_lora(encoder).backbone.encoder.layer[1].attention.self.key.weight.double().numpy()
        assert np.abs(merged - expected).max() < 1e-5
        assert f"{ {'lora': 'LoRA', 'rslora': 'rsLoRA', 'dora': 'DoRA'}[variant] } r=4" in str(get_lora_info(encoder))


def test_fresh_dora_changes_nothing(encoder):
    before = encoder.encode(TEXTS, "query")
    setup_lora_model(encoder, variant="dora")
    assert np.abs(encoder.encode(TEXTS, "query") - before).max() < 1e-6


def test_full_fine_tuning_leaves_out_what_no_vector_depends_on(encoder):
    named = dict(encoder.backbone.named_parameters())
    assert setup_full_model(encoder) is encoder
    encoder.embed(encoder.tokenize(TEXTS, "query")).sum().backward()
    assert {n for n, p in named.items() if p.requires_grad} == {n for n in named if not n.startswith("pooler.")}
    assert {n for n, p in named.items() if p.grad is not None} == {n for n, p in named.items() if p.requires_grad}
    setup_full_model(encoder, train_embeddings=False)
    frozen = {n for n, p in named.items() if not p.requires_grad}
    assert frozen == {"embeddings.word_embeddings.weight", "pooler.dense.weight", "pooler.dense.bias"}


def test_memory_is_what_gradients_and_adamw_really_hold(encoder):
    """Counted on the tensors that are there after a step, not by the formula."""
    ids = encoder.tokenize(TEXTS, "query")
    found = {}
    for kind in ("lora", "lora with table", "full", "full without table"):
        model = load_encoder(encoder.name, max_seq_length=48, device="cpu")
        if kind.startswith("lora"):
            setup_lora_model(model, r=4, train_embeddings=kind != "lora")
        else:
            setup_full_model(model, train_embeddings=kind == "full")
        trained = [p for p in model.backbone.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        model.embed(ids).sum().backward()
        optimizer.step()
        moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
        held = sum(t.numel() * t.element_size() for t in [*moments, *(p.grad for p in trained)])
        counted = count_trained(model)
        assert counted.state_bytes == held
        assert counted.table_trains == (kind in ("lora with table", "full"))
        found[kind] = counted, held
    assert found["lora"][0].full_state_bytes == found["full"][1]
    saved = (found["full"][1] - found["lora"][1]) / 2**20
    base = sum(p.numel() for p in encoder.backbone.parameters())
    said = str(found["lora"][0])
    assert f"LoRA saves {saved:,.1f} MB" in said
    assert f"the embedding table ({87 * 32 / base:.0%} of the base's weights) stays frozen" in said
    assert "trains too" in str(found["full"][0]) and "stays frozen" in str(found["full without table"][0])


def test_four_bits_without_bitsandbytes_say_what_is_missing(tiny_model, monkeypatch):
    monkeypatch.setattr(encoder_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"quantize_base nf4 needs bitsandbytes: pip install 'koret\[qlora\]'"):
        load_encoder(tiny_model, quantize="nf4", device="cpu")


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_base_in_four_bits(tmp_path, variant):
    """QLoRA: the values are bitsandbytes' own, gradients those of the same values in float32, the merge exact."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path / "wider"  # one block of 64 values a row at least
    build_tiny_model(folder, ["query", "passage", ":", *SYLLABLES, *(f"##{s}" for s in SYLLABLES)])
    four = load_encoder(folder, max_seq_length=48, device="cpu", quantize="nf4")
    exact = load_encoder(folder, max_seq_length=48, device="cpu")
    setup_lora_model(four, r=4, alpha=8, dropout=0.0, variant=variant)
    stir(four)
    info = get_lora_info(four)
    assert info.quantized and info.weights.base == sum(p.numel() for p in exact.backbone.parameters())
    ids = four.tokenize(TEXTS, "passage")
    four.model.eval()
    fresh = np.abs(exact.encode(TEXTS, "passage") - four.encode(TEXTS, "passage")).max()
    assert fresh > 1e-3  # four bits and adapters do change something
    merged = merge_lora(four)
    assert type(merged.backbone.encoder.layer[0].intermediate.dense) is torch.nn.Linear
    assert np.abs(merged.encode(TEXTS, "passage") - four.encode(TEXTS, "passage")).max() < 1e-6
    with torch.no_grad():
        padded = torch.nn.functional.normalize(four._forward_padded(ids), dim=-1)  # bitsandbytes' own products
        assert (padded - four.embed(ids)).abs().max() < 1e-5
    trained = [p for p in four.backbone.parameters() if p.requires_grad]
    weights = torch.randn(len(ids), 32)
    ours, theirs = (
        torch.autograd.grad((vectors * weights).sum(), trained)
        for vectors in (four.embed(ids), torch.nn.functional.normalize(four._forward_padded(ids), dim=-1))
    )
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(ours, theirs, strict=True))
    merged.save(tmp_path / "saved")
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    again = plain.encode([f"passage: {text}" for text in TEXTS], normalize_embeddings=True)
    assert np.abs(again - four.encode(TEXTS, "passage")).max() < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_variant": "rslora"},
        {"lora_variant": "dora"},
        {"train_embeddings": True},
        {"lora_variant": "dora", "lora_target_modules": ["all-linear"], "train_embeddings": True},
        {"use_lora": False, "train_embeddings": False},
    ],
    ids=str,
)
def test_a_resumed_training_of_every_kind_saves_what_an_unbroken_one_does(make_config, toy_data, tiny_model, changes):
    whole = EmbeddingTrainer(make_config(max_steps=4, **changes), dataset=toy_data, progress=False, console=SILENT)
    finished = whole.train()
    broken = EmbeddingTrainer(make_config(max_steps=4, **changes), dataset=toy_data, progress=False, console=SILENT)
    evaluate = broken._evaluate

    def stop_at_two(stop):
        evaluate(stop)
        if broken.at.step == 2:
            raise Interrupted(2)

    broken._evaluate = stop_at_two
    with pytest.raises(Interrupted):
        broken.train()
    resumed = EmbeddingTrainer.resume(broken.run_dir, dataset=toy_data, progress=False, console=SILENT).train()
    kept = [load_file(run.model / "model.safetensors") for run in (finished, resumed)]
    assert kept[0].keys() == kept[1].keys() and all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    loaded = load_encoder(finished.model).encode(TEXTS, "query")
    assert np.abs(loaded - whole.encoder.encode(TEXTS, "query")).max() < 1e-5
    base = load_file(tiny_model / "model.safetensors")["embeddings.word_embeddings.weight"]
    moved = not torch.equal(kept[0]["embeddings.word_embeddings.weight"], base)
    assert moved == bool(changes.get("train_embeddings"))
    if changes.get("use_lora", True):
        plain = SentenceTransformer(str(tiny_model), device="cpu")
        plain[0].model = PeftModel.from_pretrained(plain[0].model, str(finished.model / "lora_weights")).eval()
        adapted = plain.encode([f"query: {text}" for text in TEXTS], normalize_embeddings=True)
        assert np.abs(adapted - loaded).max() < 1e-5


def test_a_training_over_four_bits_saves_an_ordinary_model_and_resumes(make_config, toy_data):
    pytest.importorskip("bitsandbytes")
    trainer = EmbeddingTrainer(
        make_config(max_steps=3, quantize_base="nf4"), dataset=toy_data, progress=False, console=SILENT
    )
    run = trainer.train()
    saved = load_file(run.model / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert "quantization_config" not in json.loads((run.model / "config.json").read_text())
    assert np.abs(load_encoder(run.model).encode(TEXTS, "query") - trainer.encoder.encode(TEXTS, "query")).max() < 1e-5
    fresh = EmbeddingTrainer.resume(run.path, dataset=toy_data, progress=False, console=SILENT)
    fresh._prepare()  # the same 4 bits again: what a resume compares
    assert fresh.model_fingerprint == trainer.model_fingerprint


def test_weights_in_four_bits_cannot_train_themselves(make_config):
    with pytest.raises(ValueError, match="quantize_base: weights in 4 bits cannot train"):
        make_config(use_lora=False, quantize_base="nf4")
