"""Gradient norms against torch, and histograms that never crash."""

import numpy as np
import pytest
import torch

from koret.training.gradients import collect_values, group_by_module, measure_norms


@pytest.fixture
def parameters():
    shapes = {"layer.query.lora_A.default.weight": (2, 4), "layer.query.lora_B.default.weight": (4, 2),
              "layer.dense.weight": (3, 3), "layer.dense.bias": (3,)}  # fmt: skip
    made = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    for seed, p in enumerate(made.values()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    return made


def test_both_halves_of_an_adapter_count_for_its_layer(parameters):
    groups = group_by_module(parameters)
    assert list(groups) == ["layer.query", "layer.dense"]
    expected = [torch.cat([p.grad.flatten() for p in group]).norm() for group in groups.values()]
    torch.testing.assert_close(measure_norms(groups), torch.stack(expected))
    values = collect_values(groups)
    assert np.array_equal(values["layer.dense"], torch.cat([p.grad.flatten() for p in groups["layer.dense"]]).numpy())


@pytest.mark.parametrize("fault", ["none", "zero", "nan", "inf", "empty"])
def test_odd_gradients_are_left_out_of_histograms_and_never_crash(parameters, fault, tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    bias = parameters["layer.dense.bias"]
    parameters.pop("layer.dense.weight")
    if fault == "empty":
        bias = parameters["layer.dense.bias"] = torch.nn.Parameter(torch.zeros(0))
    bias.grad = {
        "none": None, "zero": torch.zeros(3), "nan": torch.tensor([1.0, float("nan"), 0]),
        "inf": torch.tensor([1.0, float("inf"), 0]), "empty": torch.zeros(0),
    }[fault]  # fmt: skip
    groups = group_by_module(parameters)
    values = collect_values(groups)
    assert set(values) == {"layer.query"}
    assert measure_norms(groups).shape == (2,)
    with SummaryWriter(str(tmp_path)) as writer:
        for name, array in values.items():
            writer.add_histogram(name, array, 1)


def test_nothing_to_draw(parameters):
    for p in parameters.values():
        p.grad = None
    groups = group_by_module(parameters)
    assert collect_values(groups) == {} and measure_norms(groups).tolist() == [0.0, 0.0]
