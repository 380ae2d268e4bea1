"""Batch-norm statistics taken anew."""

import pytest
import torch
from torch import nn

from structconv_cli.calibrate import reestimate_batch_norm


@pytest.mark.parametrize("momentum", [0.1, 0.9, None])
@pytest.mark.parametrize("training", [False, True])
def test_one_batch_gives_its_own_statistics(momentum: float | None, training: bool) -> None:
    norm = nn.BatchNorm2d(3, momentum=momentum).train(training)
    with torch.no_grad():  # what was there before leaves no trace
        norm.running_mean.fill_(50)
        norm.running_var.fill_(70)
        norm.num_batches_tracked.fill_(9)
    x = 3 + 2 * torch.randn(8, 3, 5, 5)
    assert reestimate_batch_norm(norm, [x]) == 1
    assert torch.allclose(norm.running_mean, x.mean((0, 2, 3)), rtol=1e-5)
    assert torch.allclose(norm.running_var, x.var((0, 2, 3)), rtol=1e-5)
    assert norm.momentum == momentum
    assert norm.training is training


def test_equal_batches_weigh_equally() -> None:
    norm = nn.BatchNorm1d(2)
    batches = list((torch.randn(60, 2) * torch.tensor([1.0, 4.0]) + 1).split(20))
    reestimate_batch_norm(norm, iter(batches))
    mean = torch.cat(batches).mean(0)
    variance = torch.stack([batch.var(0) for batch in batches]).mean(0)
    assert torch.allclose(norm.running_mean, mean, rtol=1e-5)
    assert torch.allclose(norm.running_var, variance, rtol=1e-5)


def test_a_second_norm_sees_what_the_first_puts_out() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2))
    x = torch.randn(16, 2, 4, 4) * 7 - 3
    assert reestimate_batch_norm(model, [x]) == 2
    between = ((x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)).relu()
    assert torch.allclose(model[2].running_mean, between.mean((0, 2, 3)), rtol=1e-2)


def test_dropout_stays_off_and_parameters_stay() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3, momentum=0.3)).train()
    before = [parameter.clone() for parameter in model.parameters()]
    x = torch.randn(40, 3)
    reestimate_batch_norm(model, [x])
    assert torch.allclose(model[1].running_mean, x.mean(0), atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert model[1].momentum == 0.3
    assert all(module.training for module in model.modules())


def test_momentum_and_mode_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.3)).eval()
    with pytest.raises(ValueError, match="expected 2D or 3D"):
        reestimate_batch_norm(model, [torch.zeros(2, 3, 4, 4)])
    assert model[0].momentum == 0.3
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    "model", [nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.GroupNorm(1, 3)]
)
def test_nothing_to_estimate(model: nn.Module) -> None:
    assert reestimate_batch_norm(model, [torch.zeros(2, 3)]) == 0
