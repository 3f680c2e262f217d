"""A layer's parts compiled by torch: the gradients of the Hugging Face forward, compiled once, the same dropout twice.

What torch.compile makes on a CPU is C++ instead of a GPU's kernels, of the same graphs.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_packed import FAMILIES, ODD_LENGTHS, adapt, build, draw_ids, pool_padded

from koret.retrieval import packed

# The first layer's beginning, the others', their end where the input needs a gradient, and where it does not.
GRAPHS = 4


@pytest.fixture(autouse=True)
def counters(compiles_here):
    """torch's counts of what it compiled, from nothing."""
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters


def take_gradients(vectors, trained):
    weights = torch.linspace(-1, 2, vectors.numel(), dtype=vectors.dtype).view_as(vectors)
    return torch.autograd.grad((vectors * weights).sum(), trained)


CASES = {
    "adapters": (lambda: adapt(target_modules=["query", "value"]), "mean", 0),
    "DoRA on all, first tokens": (lambda: adapt(target_modules=["query", "dense"], use_dora=True), "cls", 0),
    "mixed again": (lambda: adapt(target_modules=["query", "key", "value"]), "mean", 1),
    "checkpointed": (lambda: adapt(target_modules=["key"]), "mean", "layers"),
    **{f"{family}, all weights": (lambda family=family: build(family), "mean", 0) for family in FAMILIES},
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_the_padded_forward(case, counters):
    make, pooling, recompute = CASES[case]
    module = make()
    ids = draw_ids(ODD_LENGTHS)
    trained = [p for n, p in module.named_parameters() if p.requires_grad and "pooler" not in n]
    encoder = packed.PackedEncoder(module, pooling, torch.float64, recompute, compiles=True)
    ours, theirs = encoder.forward(ids), pool_padded(module, ids, pooling)
    assert torch.allclose(ours, theirs, atol=1e-12, rtol=0)
    for mine, reference in zip(take_gradients(ours, trained), take_gradients(theirs, trained), strict=True):
        assert torch.allclose(mine, reference, atol=1e-10, rtol=1e-9)
    assert counters["stats"]["unique_graphs"] >= 2 and not counters["graph_break"]


def test_a_part_is_compiled_once_for_all_layers_and_batches(counters):
    module = adapt(target_modules=["query", "key", "value"])
    encoder = packed.PackedEncoder(module, "mean", torch.float64, compiles=True)
    for lengths in ([3, 5], [49, 49, 49], range(1, 30), [64], [7]):
        ids = draw_ids(lengths)
        assert torch.allclose(encoder.forward(ids), pool_padded(module, ids), atol=1e-12, rtol=0)
    assert counters["stats"]["unique_graphs"] == GRAPHS


def test_a_pass_without_gradients_draws_the_dropout_of_the_one_with_them():
    module = adapt(target_modules=["query", "value", "dense"], lora_dropout=0.5).train()
    ids = draw_ids(ODD_LENGTHS)
    encoder = packed.PackedEncoder(module, "mean", torch.float64, compiles=True)
    found = []
    for seed, grad in ((1, True), (1, False), (2, False), (2, True)):
        torch.manual_seed(seed)
        with torch.set_grad_enabled(grad):
            found.append(encoder.forward(ids).detach())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[2], found[3], rtol=0, atol=1e-12)
    assert (found[0] - found[2]).abs().max() > 1e-3


def test_dropout_has_its_rate_and_scale():
    """A is the identity and B too, so what an adapter adds is x behind dropout."""
    module = adapt(r=32, lora_alpha=32, lora_dropout=0.25, target_modules=["query"]).train()
    attention = module.get_base_model().encoder.layer[0].attention.self
    for factors in (attention.query.lora_A, attention.query.lora_B):
        factors["default"].weight.data = torch.eye(32, dtype=torch.float64)
    encoder = packed.PackedEncoder(module, "mean", torch.float64, compiles=True)
    x = torch.rand(1000, 32, dtype=torch.float64) + 1
    (layer, _), parts = encoder._read_layers(len(x)), encoder._parts
    added = parts.begin(layer, None, encoder.epsilon, parts.kernel, x)[1] - layer.linears[0].multiply(x)
    times = (added[:, :32] / x).detach().numpy()
    kept = times > 0.5
    assert np.allclose(times[kept], 1 / 0.75) and np.allclose(times[~kept], 0, atol=1e-9)
    assert abs(kept.mean() - 0.75) < 0.015  # 6 standard deviations


def test_what_is_encoded_without_training_is_not_compiled(counters):
    module = adapt(target_modules=["query"]).eval()
    encoder = packed.PackedEncoder(module, "mean", torch.float64, compiles=True)
    with torch.no_grad():
        encoder.forward(draw_ids([3, 5]))
    assert not counters["stats"]
