"""Adapters: attached where asked, counted, saved as PEFT does, merged without changing a vector."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from koret.retrieval.encoder import load_encoder
from koret.training.lora import get_lora_info, merge_lora, print_lora_info, save_adapter, setup_lora_model

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


def test_all_linear(encoder):
    setup_lora_model(encoder, r=2, target_modules=("all-linear",))
    assert len(get_lora_info(encoder).modules) == 2 * 6 + 1  # and the pooler


def test_a_sentence_transformer_can_be_given(tiny_model):
    model = SentenceTransformer(str(tiny_model), device="cpu")
    assert setup_lora_model(model, r=2) is model
    assert get_lora_info(model).trainable == 2 * 3 * (2 * 32 + 32 * 2)


@pytest.mark.parametrize("targets", [("query", "key", "value"), ("all-linear",)])
def test_merged_saved_and_adapted_give_the_same_vectors(encoder, tiny_model, tmp_path, targets):
    base = encoder.encode(TEXTS, "passage")
    setup_lora_model(encoder, r=4, alpha=8, target_modules=targets)
    stir(encoder)
    tuned = encoder.encode(TEXTS, "passage")
    assert np.abs(tuned - base).max() > 1e-3

    merged = merge_lora(encoder)
    assert not any("lora" in name for name, _ in merged.model.named_parameters())
    assert np.abs(merged.encode(TEXTS, "passage") - tuned).max() < 1e-6
    assert np.abs(encoder.encode(TEXTS, "passage") - tuned).max() == 0  # the original kept its adapters

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
