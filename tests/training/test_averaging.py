"""Averaged weights: trained parameters by plain arithmetic, buffers as they are."""

from __future__ import annotations

import torch
from torch import nn

from percov2.training.averaging import AveragedWeights


class Network(nn.Module):
    """A trained and a frozen parameter, a buffer, and one that checkpoints leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.left_out = nn.Parameter(torch.ones(1))
        self.register_buffer("counts", torch.zeros(2))


def test_averages_follow_trained_parameters_and_copy_buffers():
    network = Network()
    averaged = AveragedWeights(network, 0.9, {"trained", "frozen", "counts"})
    expected = torch.zeros(3, dtype=torch.float64)
    for step in range(200):
        with torch.no_grad():
            network.trained.copy_(torch.tensor([1.0, step, (-1.0) ** step]))
            network.counts += 1
        averaged.update(network, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * network.trained.detach().double()
        assert torch.allclose(averaged.state["trained"].double(), expected, rtol=1e-5)
        assert torch.equal(averaged.state["counts"], network.counts)
    assert set(averaged.state) == {"trained", "frozen", "counts"}
    assert averaged.state["frozen"].tolist() == [1, 1]
    with averaged.applied_to(network):
        assert torch.equal(network.trained, averaged.state["trained"])
    assert network.trained.tolist() == [1, 199, -1]


def test_nothing_may_be_trained():
    network = Network()
    averaged = AveragedWeights(network, 0.9, {"frozen", "counts"})
    network.counts += 1
    averaged.update(network, 0)
    assert averaged.state["counts"].tolist() == [1, 1]
