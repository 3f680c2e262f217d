"""The schedule against transformers, the guard against numbers that are not finite."""

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from koret.training.optimization import GuardedOptimizer, cap_warmup, find_learning_rate


@pytest.mark.parametrize(("total", "warmup"), [(50, 0), (50, 5), (7, 3), (1, 0)])
def test_schedule_is_that_of_transformers(total, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, total)
    for step in range(1, total + 1):
        assert find_learning_rate(step, total, warmup, 3e-4) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        schedule.step()


def test_warmup_is_capped_to_a_tenth():
    assert cap_warmup(500, 5000) == 500 and cap_warmup(500, 4999) == 499 and cap_warmup(500, 5) == 0


def make(max_grad_norm=1.0, scaling=False):
    torch.manual_seed(0)
    parameters = {"a": torch.nn.Parameter(torch.randn(4, 3)), "b": torch.nn.Parameter(torch.randn(5))}
    return parameters, GuardedOptimizer(parameters, weight_decay=0.01, max_grad_norm=max_grad_norm, scaling=scaling)


def test_steps_equal_plain_adamw_with_clipping():
    parameters, guarded = make(max_grad_norm=0.5)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in parameters.values()]
    plain = torch.optim.AdamW(twins, weight_decay=0.01)
    for step in range(5):
        for p, twin in zip(parameters.values(), twins, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            twin.grad = p.grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(twins, 0.5)
        plain.param_groups[0]["lr"] = 0.1
        plain.step()
        guarded.unscale()
        norm = guarded.step(0.1, torch.tensor(True))
        assert norm == expected
        for p, twin in zip(parameters.values(), twins, strict=True):
            torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fault", ["gradient", "loss"])
def test_a_bad_step_and_everything_after_it_changes_nothing(fault):
    parameters, optimizer = make()
    for step in range(4):
        for p in parameters.values():
            p.grad = torch.ones_like(p)
        if step == 2 and fault == "gradient":
            parameters["a"].grad[0, 0] = float("nan")
        if step == 2:
            before = {n: p.detach().clone() for n, p in parameters.items()}
            moments = {n: optimizer.adamw.state[p]["exp_avg"].clone() for n, p in parameters.items()}
        optimizer.unscale()
        optimizer.step(0.1, torch.tensor(not (step == 2 and fault == "loss")))
    for name, p in parameters.items():
        assert torch.equal(p, before[name]) and torch.equal(optimizer.adamw.state[p]["exp_avg"], moments[name])


def test_float16_overflow_skips_one_step_and_lowers_the_scale():
    parameters, optimizer = make(scaling=True)
    before = optimizer.scaler.get_scale()
    for step in range(2):
        loss = optimizer.scale(sum((p**2).sum() for p in parameters.values()))
        loss.backward()
        if step == 0:
            parameters["a"].grad[0, 0] = float("inf")
        weights = parameters["a"].detach().clone()
        optimizer.unscale()
        norm = optimizer.step(0.1, torch.tensor(True))
        assert torch.equal(parameters["a"], weights) == (step == 0)
        assert torch.isfinite(norm) == (step == 1)
    assert optimizer.scaler.get_scale() == before / 2
