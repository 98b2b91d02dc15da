"""Stacked multilayer perceptrons: N networks of one shape, evaluated in one call.

As in tiny-cuda-nn: rectified linear hidden layers, a linear output layer, no biases unless asked for, and
weights Xavier-uniform. On the CPU the points pass through all layers in chunks that stay in the cache. For
many points the backward pass works the hidden layers out anew instead of storing them: a quarter of the time
of the form layer by layer at 200 000 points, and no memory beyond the result. For the few points of a batch
they are kept, which saves a seventh of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_CHUNK = 4096
"""Points that pass through all layers together on the CPU."""
_KEPT = 16384
"""Most points whose hidden layers are kept for the backward pass. Changes no result."""


class StackedMLP(nn.Module):
    """N perceptrons of one shape, each with weights of its own."""

    def __init__(
        self,
        networks: int,
        inputs: int,
        outputs: int,
        generator: torch.Generator,
        width: int = 64,
        hidden: int = 3,
        biases: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Draw the weights.

        Args:
            networks: perceptrons.
            inputs: numbers that each takes.
            outputs: numbers that each gives.
            generator: the source of chance, on the CPU: every device starts from the same weights.
            width: neurons of a hidden layer.
            hidden: number of hidden layers.
            biases: whether the layers add a constant; it starts at 0.
            device: where the weights live.
            dtype: of the weights.

        Raises:
            ValueError: if a number is below 1, or ``hidden`` below 0.
        """
        if min(networks, inputs, outputs, width) < 1 or hidden < 0:
            raise ValueError(
                f"no perceptrons: {networks} networks of {inputs} inputs, {outputs} outputs and"
                f" {hidden} hidden layers of {width}"
            )
        super().__init__()
        self.networks = networks
        self.outputs = outputs
        sizes = [inputs, *[width] * hidden, outputs]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for source, target in pairwise(sizes):
            bound = math.sqrt(6 / (source + target))
            weight = torch.rand(networks, source, target, generator=generator, dtype=dtype)
            self.weights.append(nn.Parameter(((2 * weight - 1) * bound).to(device)))
            if biases:
                self.biases.append(nn.Parameter(torch.zeros(networks, 1, target, dtype=dtype, device=device)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Evaluate all networks.

        Args:
            inputs: (networks, v, inputs), or (1, v, inputs) that all networks share.

        Returns:
            (networks, v, outputs).
        """
        if inputs.device.type == "cpu":
            weights, biases = list(self.weights), list(self.biases)
            return _InChunks.apply(inputs, len(weights), *weights, *biases)  # type: ignore
        return self.layer_by_layer(inputs)

    def layer_by_layer(self, inputs: Tensor) -> Tensor:
        """The same, every layer for all points of all networks at once: the way of a GPU.

        Args:
            inputs: (networks, v, inputs), or (1, v, inputs) that all networks share.

        Returns:
            (networks, v, outputs).
        """
        for layer, weight in enumerate(self.weights):
            inputs = inputs @ weight
            if len(self.biases):
                inputs = inputs + self.biases[layer]
            if layer < len(self.weights) - 1:
                inputs = torch.relu(inputs)
        return inputs


class _InChunks(torch.autograd.Function):
    """All layers of one network for one chunk of points after the other."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layers: int, *parameters: Tensor) -> Tensor:
        ctx.layers = layers
        ctx.save_for_backward(inputs, *parameters)
        weights, biases = parameters[:layers], parameters[layers:]
        networks, _, outputs = weights[-1].shape
        voxels = inputs.shape[1]
        result = inputs.new_empty(networks, voxels, outputs)
        ctx.kept = []
        keep = voxels <= _KEPT and any(ctx.needs_input_grad)
        for network, source, first, last in _chunks(networks, len(inputs), voxels):
            states = _states(inputs[source, first:last], weights, biases, network)
            _affine(states[-1], weights, biases, layers - 1, network, out=result[network, first:last])
            if keep:
                ctx.kept.append(states)
        return result

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, *parameters = ctx.saved_tensors
        layers: int = ctx.layers
        weights, biases = parameters[:layers], parameters[layers:]
        for_inputs = torch.zeros_like(inputs) if ctx.needs_input_grad[0] else None
        for_parameters = [torch.zeros_like(parameter) for parameter in parameters]
        chunks = _chunks(len(weights[-1]), len(inputs), inputs.shape[1])
        for number, (network, source, first, last) in enumerate(chunks):
            states = (
                ctx.kept[number]
                if ctx.kept
                else _states(inputs[source, first:last], weights, biases, network)
            )
            slope = gradient[network, first:last]
            for layer in reversed(range(layers)):
                for_parameters[layer][network].addmm_(states[layer].T, slope)
                if biases:
                    for_parameters[layers + layer][network] += slope.sum(dim=0)
                back = weights[layer][network].T
                if layer:
                    # A rectifier passes the slope where its result is above 0.
                    slope = torch.ops.aten.threshold_backward(slope @ back, states[layer], 0)
                elif for_inputs is not None:
                    for_inputs[source, first:last].addmm_(slope, back)
        return for_inputs, None, *for_parameters


def _chunks(networks: int, sources: int, voxels: int) -> list[tuple[int, int, int, int]]:
    """(network, its input, first point, one after the last) of every piece of work."""
    return [
        (network, min(network, sources - 1), first, min(first + _CHUNK, voxels))
        for network in range(networks)
        for first in range(0, voxels, _CHUNK)
    ]


def _states(
    inputs: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], network: int
) -> list[Tensor]:
    """What every layer of one network takes in, (points, width)."""
    states = [inputs]
    for layer in range(len(weights) - 1):
        states.append(_affine(states[-1], weights, biases, layer, network).relu_())
    return states


def _affine(
    state: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layer: int,
    network: int,
    out: Tensor | None = None,
) -> Tensor:
    """One layer before its rectifier."""
    if biases:
        return torch.addmm(biases[layer][network], state, weights[layer][network], out=out)
    return torch.mm(state, weights[layer][network], out=out)
