# What the penalty acts on: the parameters of an optimizer with their anchors, and LoRA adapters, as the param groups
# say at each step. Holds no arithmetic (functional.py, lora.py) and no hooks (regularizer.py).
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .anchors import fingerprint, make_anchor
from .functional import InputMoment, reduction_factors, squared_distances
from .lora import LoraAdapter


class Penalized(NamedTuple):
    """Tensors with their anchors, coefficients ``weight * r_i``, learning rates and moments; adapters with theirs."""

    parameters: list[Tensor]
    anchors: list[Tensor]
    coefficients: list[float]
    rates: list[Any]
    moments: list[InputMoment | None]
    adapters: list[LoraAdapter]
    adapter_coefficients: list[float]


class Targets:
    """
    Holds the anchors of the parameters that are in the optimizer when it is built. In `lora_form` `"delta"` the
    factors of the adapters have none; in `"factors"` they are parameters with anchor 0, and the adapters have no term.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weight: float,
        anchor_device: torch.device | str | None,
        anchors: Mapping[Tensor, Tensor],
        adapters: Sequence[LoraAdapter],
        lora_form: str,
        inputs: Mapping[Tensor, InputMoment] | None,
    ):
        for tensor, anchor in anchors.items():
            if tensor.shape != anchor.shape:
                raise ValueError(f"An anchor of shape {tuple(anchor.shape)} is for a tensor of {tuple(tensor.shape)}.")
        if any(adapter.moment is not None for adapter in adapters):
            raise ValueError("Give the moments of adapters in `inputs`, by the weights on which the adapters act.")
        self.optimizer = optimizer
        self.anchor_device = anchor_device
        self.inputs = dict(inputs or {})
        self.adapters = [_with_offset(adapter, anchors, anchor_device) for adapter in adapters]
        self.of_product = lora_form == "delta"
        self.factors = {factor for adapter in adapters for factor in (adapter.down, adapter.up)}
        self.weighted = self._weighted_parameters(weight)
        self.anchors = {p: _make_anchor(p, anchors, anchor_device) for p in self.weighted if p not in self.factors}
        if not self.of_product:
            self.anchors |= {p: zeros_like(p) for p in self.weighted if p in self.factors}
        known = (*self.anchors, *(adapter.weight for adapter in adapters))
        if inputs is not None and self.weighted and not any(tensor in self.inputs for tensor in known):
            raise ValueError(
                "`inputs` hold nothing of what is penalized. In the `with` block of `record_inputs`, at whose end "
                "they come, the model that trains has to run, not yet compiled, with its adapters in place and "
                "`requires_grad` as in the training; weights under adapters other than peft's need it there too. "
                "Quantized weights are not recorded."
            )
        self._squared_norms: dict[Tensor, float] = {}

    def penalized(self, weight: float, reduction: str, with_gradient: bool = False) -> Penalized:
        """All that is penalized, or only the parameters that have a gradient now."""
        self.adapters = [self._with_moment(adapter) for adapter in self.adapters]
        weighted = self._weighted_parameters(weight)
        weights = {adapter: _adapter_weight(adapter, weighted) for adapter in self.adapters}
        adapters = [adapter for adapter in self.adapters if weights[adapter] > 0]
        if self.of_product:
            weighted = {p: row for p, row in weighted.items() if p not in self.factors}
        numels = [adapter.numel() for adapter in adapters] if self.of_product else []
        factors = reduction_factors([p.numel() for p in weighted] + numels, reduction)
        of_adapters = factors[len(weighted) :] or [0.0] * len(adapters)
        of_adapters = [weights[adapter] * factor for adapter, factor in zip(adapters, of_adapters, strict=True)]
        penalized = Penalized([], [], [], [], [], adapters, of_adapters)
        for (parameter, (weight, rate)), factor in zip(weighted.items(), factors):
            if parameter not in self.anchors:
                raise ValueError(
                    "A param group with a weight above 0 has a parameter without an anchor: it came into the "
                    "optimizer, or its group got the weight, after LipschitzRegularizer was built, or after remove(). "
                    "Build it when the param groups are complete and have their weights."
                )
            if with_gradient and parameter.grad is None:
                continue
            if self.anchor_device is None and self.anchors[parameter].device != parameter.device:
                self.anchors[parameter] = self.anchors[parameter].to(parameter.device)  # follows a model.to(device)
            penalized.parameters.append(parameter)
            penalized.anchors.append(self.anchors[parameter])
            penalized.coefficients.append(weight * factor)
            penalized.rates.append(rate)
            penalized.moments.append(self._moment(parameter, parameter))
        return penalized

    def fingerprint(self) -> str:
        """A digest of the anchors; that of an adapter is the weight on which it acts."""
        weights = [tensor for adapter in self.adapters for tensor in (adapter.weight, adapter.offset)]
        return fingerprint([*self.anchors.values(), *(tensor.detach() for tensor in weights if tensor is not None)])

    def norm(self, penalized: Penalized) -> float:
        """The norm of the anchors, an adapter's being its weight; NaN if such a weight is not known."""
        weights = [adapter.weight for adapter in penalized.adapters]
        if any(weight is None for weight in weights):
            return math.nan
        tensors = dict(zip(penalized.parameters, penalized.anchors, strict=True)) | {w: w.detach() for w in weights}
        new = [key for key in tensors if key not in self._squared_norms]
        values = [tensors[key] for key in new]
        squares = squared_distances(values, [zeros_like(value) for value in values])
        self._squared_norms |= zip(new, to_floats(squares), strict=True)
        return math.sqrt(sum(self._squared_norms[key] for key in tensors))

    def _with_moment(self, adapter: LoraAdapter) -> LoraAdapter:
        moment = self._moment(adapter.weight, adapter.down)
        return adapter if adapter.moment is moment else replace(adapter, moment=moment)

    def _moment(self, weight: Tensor | None, moved: Tensor) -> InputMoment | None:
        moment = self.inputs.get(weight)
        if moment is not None and moment.factor.device != moved.device:
            moment = self.inputs[weight] = moment.to(moved.device)
        return moment

    def _weighted_parameters(self, weight: float) -> dict[Tensor, tuple[float, Any]]:
        """Each parameter of a group with a weight above 0, with weight and learning rate of the group."""
        rows = {}
        for index, group in enumerate(self.optimizer.param_groups):
            own = checked(f"lipschitz_weight of param group {index}", group.get("lipschitz_weight", weight))
            if own > 0:
                rows |= {parameter: (own, group.get("lr")) for parameter in group["params"]}
        return rows


def checked(name: str, value: float) -> float:
    """The value, if it is a finite number and at least 0."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"`{name}` must be a finite number and at least 0, not {value}.")
    return float(value)


def zeros_like(tensor: Tensor) -> Tensor:
    """Zeros in the shape of the tensor, which take the memory of one."""
    return torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand_as(tensor)


def to_floats(scalars: list[Tensor]) -> list[float]:
    """The numbers in tensors of no dimensions, read in one transfer."""
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).tolist() if scalars else []


def _make_anchor(parameter: Tensor, anchors: Mapping[Tensor, Tensor], device: torch.device | str | None) -> Tensor:
    return make_anchor(anchors[parameter].to(parameter.device) if parameter in anchors else parameter, device)


def _with_offset(
    adapter: LoraAdapter, anchors: Mapping[Tensor, Tensor], device: torch.device | str | None
) -> LoraAdapter:
    if adapter.weight not in anchors:
        return adapter
    weight = adapter.weight.detach()
    offset = weight.to(torch.promote_types(weight.dtype, torch.float32)) - anchors[adapter.weight].to(weight.device)
    return replace(adapter, offset=make_anchor(offset, device))


def _adapter_weight(adapter: LoraAdapter, weighted: dict[Tensor, tuple[float, Any]]) -> float:
    """The weight of the param groups in which the factors are; a frozen factor has no say."""
    trained = [factor for factor in (adapter.down, adapter.up) if factor.requires_grad]
    weights = {weighted[factor][0] if factor in weighted else 0.0 for factor in trained}
    if len(weights) > 1:
        raise ValueError(
            f"The factors of the LoRA adapter {adapter.name} have different weights, {sorted(weights)}: give their "
            "param groups the same `lipschitz_weight`, and put both into the optimizer or freeze one."
        )
    return weights.pop() if weights else 0.0
