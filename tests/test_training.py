"""The training loop of the network solvers."""

import logging
import math

import pytest
import torch
from torch import nn

from quantitron.recon.algorithms.adam import ParameterGroup
from quantitron.recon.solvers.training import (
    Schedule,
    TrainingDiverged,
    TrainingRecord,
    adam,
    train,
    train_with_restart,
)


class Numbers(nn.Module):
    """Three numbers that are to become 1, 2, 3."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(3))

    def loss(self) -> torch.Tensor:
        return (self.values - torch.tensor([1.0, 2.0, 3.0])).square().sum()

    def epoch(self, optimizer, number):
        total = 0.0
        for _ in range(10):
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) / 10
        return {"data": total}


def test_the_rate_is_halved_in_steps():
    schedule = Schedule(100, 1e-3, 20)
    assert [schedule.rate(epoch) for epoch in (0, 19, 20, 40, 99)] == [1e-3, 1e-3, 5e-4, 2.5e-4, 6.25e-5]
    assert schedule.at_half_rate().rate(20) == 2.5e-4
    assert Schedule(5, 1e-2).rate(4) == 1e-2


def test_training_reaches_the_minimum_and_tells_of_it():
    numbers, told = Numbers(), []
    record = train(
        numbers,
        numbers.epoch,
        Schedule(60, 0.1, 20),
        progress=lambda doing, share: told.append((doing, share)),
    )
    assert torch.allclose(numbers.values, torch.tensor([1.0, 2.0, 3.0]), atol=1e-2)
    assert len(record.losses) == record.epochs_kept == len(told) == 60
    assert record.losses[-1]["data"] < 1e-3 < record.losses[0]["data"]
    assert not record.stopped_early
    assert record.held_out == ()
    assert told[0][0].startswith("epoch 1/60, data ")
    assert told[0][0].endswith(" s for the others")
    assert told[-1][1] == 1.0


def test_groups_learn_at_rates_of_their_own():
    pair = nn.ModuleList([Numbers(), Numbers()])
    slow, quick = pair
    groups = [ParameterGroup(slow.parameters(), 0.0), ParameterGroup(quick.parameters(), 2.0)]
    seen = []

    def epoch(optimizer, number):
        seen.append(optimizer.learning_rate)
        optimizer.zero_grad()
        (slow.loss() + quick.loss()).backward()
        optimizer.step()
        return {}

    train(pair, epoch, Schedule(2, 0.1, 1), groups=groups)
    assert seen == [0.1, 0.05]
    assert not slow.values.any()
    # Adam's first steps are as long as the rate.
    assert torch.allclose(quick.values, torch.full((3,), 0.3), atol=0.02)


def test_gradients_far_below_the_usual_epsilon_still_move():
    numbers = Numbers()
    optimizer = adam([ParameterGroup(numbers.parameters())], Schedule(1, 0.1))
    (1e-11 * numbers.loss()).backward()
    optimizer.step()
    assert torch.allclose(numbers.values.detach(), torch.full((3,), 0.1), rtol=1e-3)


@pytest.mark.parametrize(("patience", "epochs"), [(0, 9), (2, 6)])
def test_the_networks_return_to_where_they_predicted_best(patience, epochs):
    numbers = Numbers()
    residuals = iter([5.0, 3.0, 2.0, 2.5, 2.25, 2.125, 2.0625, 2.0])

    def epoch(optimizer, number):
        with torch.no_grad():
            numbers.values.fill_(number + 1)
        return {"data": 0.0}

    record = train(
        numbers,
        epoch,
        Schedule(9),
        held_out=lambda: next(residuals),
        first_check=1,
        patience=patience,
    )
    assert len(record.losses) == epochs
    assert record.stopped_early == (patience > 0)
    assert record.epochs_kept == 4
    assert record.held_out[2] == (4, 2.0)
    assert numbers.values.tolist() == [4.0, 4.0, 4.0]


def test_checks_come_at_their_intervals_and_at_the_end():
    numbers = Numbers()
    record = train(
        numbers, numbers.epoch, Schedule(8, 0.1), held_out=lambda: float(numbers.loss()), check_every=3
    )
    assert [epochs for epochs, _ in record.held_out] == [3, 6, 8]


def _nan_parameter(numbers):
    with torch.no_grad():
        numbers.values[1] = math.nan
    return {"data": 0.0}


@pytest.mark.parametrize(
    ("epoch", "held_out", "sentence"),
    [
        (lambda numbers: {"data": 1.0, "wnnm": math.inf}, None, "loss 'wnnm' is not finite in epoch 1"),
        (lambda numbers: {"data": 1.0}, lambda: math.nan, "loss 'held out' is not finite in epoch 1"),
        (_nan_parameter, None, "a network parameter is not finite after epoch 1"),
    ],
)
def test_what_is_not_finite_ends_training_at_once(epoch, held_out, sentence):
    numbers = Numbers()
    with pytest.raises(TrainingDiverged, match=sentence):
        train(numbers, lambda optimizer, number: epoch(numbers), Schedule(3), held_out=held_out)


def _attempts(diverge):
    rates = []

    def run(numbers, schedule):
        assert not numbers.values.any()  # made anew
        rates.append(schedule.learning_rate)
        with torch.no_grad():
            numbers.values.fill_(1)
        if len(rates) <= diverge:
            raise TrainingDiverged("loss 'data' is not finite in epoch 3")
        return TrainingRecord(epochs_kept=7)

    return rates, run


def test_training_that_diverges_starts_again_once_at_half_the_rate(caplog):
    rates, run = _attempts(1)
    with caplog.at_level(logging.WARNING, "quantitron"):
        numbers, record = train_with_restart(Numbers, run, Schedule(10, 0.1))
    assert rates == [0.1, 0.05]
    assert record.epochs_kept == 7
    assert numbers.values.all()
    assert "not finite in epoch 3; training starts again at half the learning rate, 0.05" in caplog.text

    rates, run = _attempts(2)
    with pytest.raises(
        TrainingDiverged, match=r"diverged at learning rate 0.1 and again at half of it: loss"
    ):
        train_with_restart(Numbers, run, Schedule(10, 0.1))
    assert rates == [0.1, 0.05]

    rates, run = _attempts(0)
    train_with_restart(Numbers, run, Schedule(10, 0.1))
    assert rates == [0.1]
