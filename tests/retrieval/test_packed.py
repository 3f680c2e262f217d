"""The padding-free forward against the Hugging Face forward it replaces: values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertModel,
    CamembertConfig,
    CamembertModel,
    ElectraConfig,
    ElectraModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from koret.retrieval import linear, packed, products

SHAPE = dict(
    vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    max_position_embeddings=160, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=1,
)  # fmt: skip
FAMILIES = {
    "bert": (BertConfig, BertModel),
    "roberta": (RobertaConfig, RobertaModel),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel),
    "camembert": (CamembertConfig, CamembertModel),
    "electra": (ElectraConfig, ElectraModel),
}
ODD_LENGTHS = [1, 2, 3, 5, 7, 31, 33, 47, 48, 49, 49, 63, 64, 65, 127, 128, 129, 151]


def build(family: str, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    config, model = FAMILIES[family]
    extra = {"embedding_size": 24} if family == "electra" else {}
    module = model(config(**SHAPE, **extra)).to(dtype).eval()
    for parameter in module.parameters():  # zero biases and unit norms would hide a swapped parameter
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return module


def adapt(**settings):
    """A BERT with adapters that do something, in float64."""
    module = get_peft_model(build("bert"), LoraConfig(**{"r": 4, "lora_dropout": 0.0, **settings})).double()
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return module


def draw_ids(lengths, seed=0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 120, n).astype(np.int32) for n in lengths]


def pool_padded(module, ids, pooling="mean") -> torch.Tensor:
    """The reference: the Hugging Face forward on padded input, pooled with its mask."""
    longest = max(map(len, ids))
    tokens = torch.ones(len(ids), longest, dtype=torch.long)
    mask = torch.zeros(len(ids), longest, dtype=torch.long)
    for row, x in enumerate(ids):
        tokens[row, : len(x)] = torch.from_numpy(x)
        mask[row, : len(x)] = 1
    hidden = module(input_ids=tokens, attention_mask=mask).last_hidden_state
    if pooling == "cls":
        return hidden[:, 0]
    weight = mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_equals_the_padded_forward_at_odd_lengths(family, pooling):
    module, ids = build(family), draw_ids(ODD_LENGTHS)
    with torch.no_grad():
        ours = packed.PackedEncoder(module, pooling, torch.float64).forward(ids)
        theirs = pool_padded(module, ids, pooling)
    assert torch.allclose(ours, theirs, atol=1e-12, rtol=0)


def test_each_length_alone_and_any_order_give_the_same_vectors():
    module, ids = build("bert"), draw_ids(range(1, 150))
    forward = packed.PackedEncoder(module, "mean", torch.float64).forward
    with torch.no_grad():
        together, backwards = forward(ids), forward(ids[::-1]).flip(0)
        alone = torch.cat([forward([x]) for x in ids])
    assert torch.allclose(together, alone, atol=1e-12, rtol=0)
    assert torch.allclose(together, backwards, atol=1e-12, rtol=0)


def test_bf16_stays_close_to_float64():
    module, ids = build("xlm-roberta"), draw_ids(ODD_LENGTHS)
    with torch.no_grad():
        exact = pool_padded(module, ids)
        half = packed.PackedEncoder(module.float(), "mean", torch.bfloat16).forward(ids)
    similarity = torch.cosine_similarity(half.double(), exact, dim=1)
    assert similarity.min() > 0.999


@pytest.mark.parametrize("targets", [["query", "key", "value"], ["query", "value"], ["query", "dense"]])
@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("recompute", [0, 1, 2, "layers"])
def test_adapter_gradients_equal_those_of_the_peft_forward(targets, variant, recompute):
    module = adapt(lora_alpha=8, target_modules=targets, **variant)
    for name, parameter in module.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.3 * torch.rand_like(parameter))
    trained = [p for n, p in module.named_parameters() if p.requires_grad and "pooler" not in n]
    ids = draw_ids(ODD_LENGTHS)
    weights = torch.randn(len(ids), 32, dtype=torch.float64)

    def gradients(vectors):
        return torch.autograd.grad((vectors * weights).sum(), trained)

    ours = gradients(packed.PackedEncoder(module, "mean", torch.float64, recompute).forward(ids))
    for mine, reference in zip(ours, gradients(pool_padded(module, ids)), strict=True):
        assert reference.abs().max() > 0
        assert torch.allclose(mine, reference, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize(
    "uneven, shapes",
    [
        ({"rank_pattern": {"key": 2, r"layer\.0\.attention\.self\.value": 7}, "alpha_pattern": {"query": 3}}, 6),
        ({"target_modules": ["query", "dense"], "layers_to_transform": [1], "layers_pattern": "layer"}, 4),
    ],
    ids=["ranks and scales", "one layer"],
)
def test_adapters_that_differ_between_layers_have_the_gradients_of_the_peft_forward(uneven, shapes):
    """``shapes``: how many the trained factors have; A and B of three ranks, or of layers of three pairs of widths."""
    module = adapt(**{"target_modules": ["query", "key", "value"], **uneven})
    trained = [p for p in module.parameters() if p.requires_grad]
    assert len({p.shape for p in trained}) == shapes
    ids = draw_ids(ODD_LENGTHS)
    weights = torch.randn(len(ids), 32, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad((vectors * weights).sum(), trained)
        for vectors in (packed.PackedEncoder(module, "mean", torch.float64).forward(ids), pool_padded(module, ids))
    )
    for mine, reference in zip(ours, theirs, strict=True):
        assert reference.abs().max() > 0
        assert torch.allclose(mine, reference, atol=1e-10, rtol=1e-9)


class CountOperations(TorchDispatchMode):
    """Counts what torch runs, forward and backward; views move nothing and do not count."""

    VIEWS = ("view", "unbind", "detach", "t", "slice", "split", "split_with_sizes", "alias", "select", "transpose")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation.overloadpacket.__name__ not in self.VIEWS
        return operation(*args, **(kwargs or {}))


def test_adapters_of_all_layers_are_made_ready_in_as_many_operations_as_those_of_one():
    def count(layers: int) -> int:
        module = BertModel(BertConfig(**{**SHAPE, "num_hidden_layers": layers})).requires_grad_(False)
        module = get_peft_model(module, LoraConfig(r=4, target_modules=["query", "value", "dense"]))
        groups = [group for layer in packed.find_core(module).encoder.layer for group in packed.list_linears(layer)]
        counted = CountOperations()
        with counted:
            factors = [
                f for adapters in linear.read_adapters(groups, torch.bfloat16) for f in (adapters.down, adapters.up)
            ]
        gradients = [torch.ones_like(factor) for factor in factors]
        with counted:
            torch.autograd.backward(factors, gradients)
        assert all(
            p.grad is not None for name, p in module.named_parameters() if "lora" in name and "pooler" not in name
        )
        return counted.count

    assert 0 < count(1) == count(2) == count(7)


@pytest.mark.parametrize("device, kept", [("cpu", torch.float32), ("meta", torch.bfloat16)])
def test_factors_are_cast_together_where_a_batch_is_not_cut_into_slices(device, kept):
    module = get_peft_model(build("bert", torch.float32), LoraConfig(r=4, target_modules=["query"])).to(device)
    groups = [group for layer in packed.find_core(module).encoder.layer for group in packed.list_linears(layer)]
    found = [adapters for adapters in linear.read_adapters(groups, torch.bfloat16) if adapters is not None]
    assert [(a.down.dtype, a.up.dtype) for a in found] == [(kept, kept)] * 2
    assert [tuple(a.up.shape) for a in found] == [(3 * 32, 4)] * 2  # zeros for key and value


def test_gradients_of_slices_add_up_unrounded_in_bf16(monkeypatch):
    """The sum of many slices' gradients is as near to float64's as a single slice's, for both factors."""
    module = adapt(target_modules=["query", "value"])
    trained = [p for p in module.parameters() if p.requires_grad]
    ids, weights = draw_ids([64] * 200), torch.randn(200, 32, dtype=torch.float64)

    def gradients(dtype):
        vectors = packed.PackedEncoder(module, "mean", dtype).forward(ids)
        return torch.autograd.grad((vectors * weights).sum(), trained)

    exact = gradients(torch.float64)
    module.float()
    trained = [p for p in module.parameters() if p.requires_grad]
    errors = []
    for size in (10**6, 64):
        monkeypatch.setattr(packed, "SLICE", size)
        errors.append(
            [((g - e).norm() / e.norm()).item() for g, e in zip(gradients(torch.bfloat16), exact, strict=True)]
        )
    assert max(many / one for one, many in zip(*errors, strict=True)) < 1.5, errors


@pytest.mark.parametrize("lengths", [[1], [1, 1], [2], [64, 64], [65], ODD_LENGTHS * 9], ids=str)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("recompute", [0, 1, 2, "layers"])
def test_slices_give_the_gradients_of_the_peft_forward(lengths, pooling, recompute, monkeypatch):
    monkeypatch.setattr(packed, "SLICE", 130)
    module = adapt(target_modules=["query", "dense"])
    trained = [p for n, p in module.named_parameters() if p.requires_grad and "pooler" not in n]
    ids = draw_ids(lengths)
    weights = torch.randn(len(ids), 32, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad((vectors * weights).sum(), trained)
        for vectors in (
            packed.PackedEncoder(module, pooling, torch.float64, recompute).forward(ids),
            pool_padded(module, ids, pooling),
        )
    )
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, reference, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("size", [130, 10**6])
def test_behind_the_last_attention_only_first_tokens_are_computed_where_they_are_all_that_counts(size, monkeypatch):
    monkeypatch.setattr(packed, "SLICE", size)
    module, ids, seen = build("bert"), draw_ids(ODD_LENGTHS), []
    encoder = packed.PackedEncoder(module, "cls", torch.float64)
    plain = encoder.activation
    encoder.activation = lambda x: seen.append(len(x)) or plain(x)
    with torch.no_grad():
        vectors = encoder.forward(ids)
    assert torch.allclose(vectors, pool_padded(module, ids, "cls"), atol=1e-12, rtol=0)
    layers = SHAPE["num_hidden_layers"]
    assert sum(seen[layers - 1 :: layers]) == len(ids)  # a slice goes through all layers before the next one
    assert sum(seen[::layers]) >= sum(ODD_LENGTHS)


def test_bf16_gradients_stay_close_to_float64():
    module = get_peft_model(build("xlm-roberta"), LoraConfig(r=4, lora_dropout=0.0, target_modules=["query", "value"]))
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trained = [p for n, p in module.named_parameters() if p.requires_grad and "pooler" not in n]
    ids = draw_ids(ODD_LENGTHS * 9)
    weights = torch.randn(len(ids), 32, dtype=torch.float64)
    exact = torch.autograd.grad((pool_padded(module.double(), ids) * weights).sum(), trained)
    vectors = packed.PackedEncoder(module.float(), "mean", torch.bfloat16).forward(ids)
    half = torch.autograd.grad((vectors * weights).sum(), trained)
    for mine, reference in zip(half, exact, strict=True):
        assert torch.cosine_similarity(mine.double().flatten(), reference.flatten(), dim=0) > 0.995


@pytest.mark.parametrize(
    ("recompute", "compiled", "torchs"), [(0, 7, 10.375), (2, 5.5, 8.2), (4, 4, 6), ("layers", 1, 1)]
)
def test_activations_kept_for_the_backward_pass_are_few(recompute, compiled, torchs):
    """Of a layer of width H: two norms' inputs and the 4 H GELU reads; what adapters read, its mask, q, k and v.

    Layers by hand keep a byte for a number of GELU's, and nothing of what adapters read but a bit for each number. The
    first of the four layers keeps less: nothing before it trains.
    """
    shape = {**SHAPE, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    module = BertModel(BertConfig(**shape)).requires_grad_(False)
    config = LoraConfig(r=4, lora_dropout=0.1, target_modules=["query", "key", "value"])
    module = get_peft_model(module, config).train()
    forward, kept = packed.PackedEncoder(module, "mean", torch.bfloat16, recompute), {}
    expected = torchs if forward._kernel is None else compiled
    forward.forward(draw_ids([64] * 2))  # frozen weights are prepared once

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward.forward(draw_ids([64] * 96))  # whole slices: a shelf has room for one
    numbers = sum(kept.values()) / (2 * 256 * 4 * 64 * 96)
    # bf16 numbers in units of H; what is more: the embedding, statistics
    assert expected <= numbers < expected * 1.1 + 0.3, numbers


def test_full_training_gradients_equal_those_of_the_padded_forward():
    module, ids = build("roberta"), draw_ids([3, 50, 50, 90, 64])
    weights = torch.randn(len(ids), 32, dtype=torch.float64)
    trained = [p for n, p in module.named_parameters() if "pooler" not in n]
    grads = [
        torch.autograd.grad((vectors * weights).sum(), trained, allow_unused=True)
        for vectors in (packed.PackedEncoder(module, "mean", torch.float64).forward(ids), pool_padded(module, ids))
    ]
    for mine, reference in zip(*grads, strict=True):
        assert torch.allclose(mine, reference, atol=1e-10, rtol=1e-9)


def test_weights_changed_in_place_are_seen():
    module, ids = build("bert"), draw_ids([5, 60])
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    forward = packed.PackedEncoder(module, "mean", torch.float64).forward
    before = forward(ids)
    module.encoder.layer[0].attention.self.query.weight.mul_(2)
    assert not torch.allclose(before, forward(ids))
    assert torch.allclose(forward(ids), pool_padded(module, ids), atol=1e-12, rtol=0)


@pytest.mark.parametrize("adapted", [False, True])
def test_frozen_weights_in_onednn_order_give_the_same_vectors(adapted, monkeypatch):
    module, ids = build("bert", torch.float32).requires_grad_(False), draw_ids(ODD_LENGTHS)
    if adapted:
        module = get_peft_model(module, LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False))
        module.eval()
    encoder = packed.PackedEncoder(module, "mean", torch.float32)
    forward = encoder.forward
    monkeypatch.setattr(products, "FEW", 10**6)
    with torch.no_grad():
        fast, padded = forward(ids), pool_padded(module, ids)
        assert torch.allclose(fast, padded, atol=2e-5, rtol=0)
        packed.find_core(module).encoder.layer[1].output.dense.weight.mul_(2)  # what was reordered is stale now
        changed = forward(ids)
        assert torch.allclose(changed, pool_padded(module, ids), atol=2e-5, rtol=0)
        assert not torch.allclose(changed, fast, atol=1e-3)
        assert any(use != "plain" for use, *_ in encoder._frozen)
        monkeypatch.setattr(products, "can_order", lambda x, weights: False)
        assert torch.allclose(forward(ids), changed, atol=5e-6, rtol=0)


@pytest.mark.parametrize("prefers", [False, True])
def test_many_tokens_are_multiplied_in_onednn_order_where_that_is_faster(prefers, monkeypatch):
    monkeypatch.setattr(products, "prefers_order", lambda: not prefers)  # what is known comes first
    module = build("bert", torch.float32).requires_grad_(False)
    encoder = packed.PackedEncoder(module, "mean", torch.float32, prefers_order=prefers)
    with torch.no_grad():
        encoder.forward(draw_ids([products.FEW + 1]))
        assert any(use != "plain" for use, *_ in encoder._frozen) == prefers
        encoder.forward(draw_ids([products.FEW]))
        assert any(use != "plain" for use, *_ in encoder._frozen)


@pytest.mark.parametrize("gains", [False, True])
def test_gradients_through_frozen_weights_in_onednn_order_equal_those_of_the_padded_forward(gains, monkeypatch):
    monkeypatch.setattr(packed, "gains_from_order", lambda dtype, weights, tokens, prefers: gains)
    ids, targets = draw_ids(ODD_LENGTHS), ["query", "value", "dense"]
    module = adapt(target_modules=targets, bias="lora_only")
    aim = torch.randn(len(ids), SHAPE["hidden_size"], dtype=torch.float64)
    (pool_padded(module, ids) * aim).sum().backward()
    exact = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    assert any("lora_" in name for name in exact) and any("bias" in name for name in exact)
    module.float().zero_grad()
    encoder = packed.PackedEncoder(module, "mean", torch.float32)
    (encoder.forward(ids) * aim.float()).sum().backward()
    assert any(use == "backward" for use, *_ in encoder._frozen) == gains
    for name, expected in exact.items():
        found = module.get_parameter(name).grad
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max(), name


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_spare_rows_of_a_slice_change_nothing(pooling, monkeypatch):
    """Whatever memory held before: here it holds NaN."""
    module, ids = adapt(target_modules=["query", "value", "dense"]), draw_ids([5, 40, 50, 50, 70, 90])
    monkeypatch.setattr(packed, "SLICE", 128)
    monkeypatch.setattr(packed, "ROWS", 32)
    counts = []
    run_layer = packed.PackedEncoder._run_layer
    monkeypatch.setattr(
        packed.PackedEncoder, "_run_layer", lambda *given: (counts.append(len(given[-1])), run_layer(*given))[1]
    )
    found = []
    for by_onednn in (False, True):
        monkeypatch.setattr(packed.PackedEncoder, "_multiplies_by_onednn", lambda *_, answer=by_onednn: answer)
        torch.use_deterministic_algorithms(True)  # fills what is not initialised
        try:
            vectors = packed.PackedEncoder(module, pooling, torch.float64).forward(ids)
            gradients = torch.autograd.grad(
                vectors.square().sum(), [p for n, p in module.named_parameters() if "lora" in n], allow_unused=True
            )
        finally:
            torch.use_deterministic_algorithms(False)
        found.append([vectors, *(g for g in gradients if g is not None)])
    spared = counts[len(counts) // 2 :]
    assert {n % 32 for n in spared} == {0} and {n % 32 for n in counts[: len(counts) // 2]} != {0}
    for plain, padded in zip(*found, strict=True):
        assert plain.isfinite().all() and torch.allclose(plain, padded, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 1 - 1e-9])
def test_fast_dropout_scales_values_and_gradients_by_one_mask(dtype, p):
    torch.manual_seed(3)
    x = torch.randn(37, 53, dtype=dtype, requires_grad=True)
    found = linear.drop_fast(x, p)
    aim = torch.randn_like(found)
    (gradient,) = torch.autograd.grad(found, x, aim)
    kept, factor = found != 0, 1 / (1 - p)
    assert torch.equal(found, torch.where(kept, x * factor, 0.0))
    assert torch.equal(gradient, torch.where(kept, aim * factor, 0.0))
    assert abs(kept.double().mean().item() - (1 - p)) < 0.06  # five standard deviations


def test_fast_dropout_keeps_its_rate_and_repeats_with_the_generator():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = linear.drop_fast(torch.ones(400_000), 0.1)
    torch.set_rng_state(state)
    assert torch.equal(first, linear.drop_fast(torch.ones(400_000), 0.1))
    kept = (first > 0).double().mean().item()
    assert abs(kept - 0.9) < 0.003  # five standard deviations are 0.0024
    assert torch.allclose(first[first > 0], torch.tensor(1 / 0.9))


def test_unsupported_architectures_are_named():
    class Config:
        model_type = "deberta-v2"

    class Module(torch.nn.Module):
        config = Config()

    assert "deberta-v2" in packed.explain_unsupported(Module())
    with pytest.raises(ValueError, match="deberta-v2"):
        packed.PackedEncoder(Module())
