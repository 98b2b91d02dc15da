"""Adam: torch's optimiser as oracle."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from quantitron.recon.algorithms.adam import Adam, ParameterGroup


def parameters():
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,), (2, 2))]


def descend(optimizer, values, rates, set_rate):
    """Steps in a quartic bowl at given rates; the third parameter takes part in every other one."""
    for number, rate in enumerate(rates):
        set_rate(rate)
        optimizer.zero_grad()
        taking_part = values if number % 2 else values[:2]
        sum((value**4).sum() for value in taking_part).backward()
        optimizer.step()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.7, 0.9)])
def test_steps_are_those_of_torch(betas):
    ours, theirs = parameters(), parameters()
    groups = [ParameterGroup(ours[:1], rate=0.5, weight_decay=0.1), ParameterGroup(iter(ours[1:]))]
    optimizer = Adam(groups, 0.1, betas, 1e-12)
    described = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:]}]
    oracle = torch.optim.Adam(described, lr=0.1, betas=betas, eps=1e-12)

    def rate_of_oracle(rate):
        for group, factor in zip(oracle.param_groups, (0.5, 1.0), strict=True):
            group["lr"] = factor * rate

    rates = [0.1, 0.1, 0.05, 0.02, 0.02]
    descend(optimizer, ours, rates, lambda rate: setattr(optimizer, "learning_rate", rate))
    descend(oracle, theirs, rates, rate_of_oracle)
    for mine, other, start in zip(ours, theirs, parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=1e-6, atol=1e-7)
        assert not torch.allclose(mine, start, atol=1e-2)


def test_without_a_gradient_nothing_moves():
    values = parameters()
    optimizer = Adam([ParameterGroup(values)], 0.1)
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(value, start) for value, start in zip(values, parameters(), strict=True))


def test_torchs_compiler_is_not_imported():
    program = """
import sys, torch
from quantitron.recon.algorithms.adam import Adam, ParameterGroup
value = torch.nn.Parameter(torch.ones(3))
optimizer = Adam([ParameterGroup([value])], 0.1)
optimizer.zero_grad()
value.square().sum().backward()
optimizer.step()
sys.exit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_no_parameter_or_one_twice_is_refused():
    values = parameters()
    with pytest.raises(ValueError, match="no parameter"):
        Adam([ParameterGroup([])], 0.1)
    with pytest.raises(ValueError, match="two groups"):
        Adam([ParameterGroup(values), ParameterGroup(values[1:2])], 0.1)
