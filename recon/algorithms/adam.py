"""Adam (Kingma and Ba 2015), with torch's own step and without its optimiser class.

The first optimiser of a process makes torch import its compiler, about a second: a tenth of what a slice of
fingerprints takes from raw data to maps. The step itself is torch's function, fused into one kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adam import adam


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that learn at a rate of their own."""

    parameters: Iterable[nn.Parameter]
    rate: float = 1.0
    """Factor on the learning rate."""
    weight_decay: float = 0.0
    """L2 penalty."""


@dataclass(frozen=True)
class _Group:
    parameters: list[nn.Parameter]
    rate: float
    weight_decay: float


class Adam:
    """Steps for groups of parameters; those without a gradient stay where they are."""

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
    ) -> None:
        """Set up the means, empty until the first gradients.

        Args:
            groups: all parameters.
            learning_rate: of the next steps, times each group's factor.
            betas: decay of the means of the gradient and of its square.
            epsilon: added to the root of the latter.

        Raises:
            ValueError: if there is no parameter, or one in two groups.
        """
        self.learning_rate = learning_rate
        self._groups = [_Group(list(group.parameters), group.rate, group.weight_decay) for group in groups]
        every = [id(parameter) for group in self._groups for parameter in group.parameters]
        if not every:
            raise ValueError("there is no parameter to learn")
        if len(set(every)) < len(every):
            raise ValueError("a parameter stands in two groups, or twice in one: it would take two steps")
        self._betas = betas
        self._epsilon = epsilon
        self._means: dict[nn.Parameter, tuple[Tensor, Tensor, Tensor]] = {}

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for group in self._groups:
            for parameter in group.parameters:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradients that the parameters hold."""
        for group in self._groups:
            moved = [parameter for parameter in group.parameters if parameter.grad is not None]
            if not moved:
                continue
            state = [self._state(parameter) for parameter in moved]
            adam(
                [*moved],
                [parameter.grad for parameter in moved if parameter.grad is not None],
                [mean for mean, _, _ in state],
                [square for _, square, _ in state],
                [],
                [count for _, _, count in state],
                fused=True,
                amsgrad=False,
                beta1=self._betas[0],
                beta2=self._betas[1],
                lr=group.rate * self.learning_rate,
                weight_decay=group.weight_decay,
                eps=self._epsilon,
                maximize=False,
            )

    def _state(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of the gradient, of its square, and the number of steps."""
        if parameter not in self._means:
            count = torch.zeros((), dtype=torch.float32, device=parameter.device)
            self._means[parameter] = (torch.zeros_like(parameter), torch.zeros_like(parameter), count)
        return self._means[parameter]
