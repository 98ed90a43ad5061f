"""
What is penalized: a list of terms, each with its space and its anchor. A parameter is a term, and so is the product of
a LoRA adapter. Holds no arithmetic (functional.py, lora.py), no hooks (regularizer.py), and does not say how a term
acts (modes.py).

The functions at the end act on many terms at once, as many small parameters take few operations together. Given their
coefficients ``c = weight * r_i``:

- `add_gradients`: add ``2 c (theta - anchor)`` to the gradients, and return what ``c ||theta - anchor||^2`` add up to;
- `squares`: each ``||theta - anchor||^2`` in its space;
- `pull`: move a fraction of the way to the anchors, and return what `squares` were before.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .anchors import make_anchor
from .functional import Coefficient, Moment, add_penalty_gradient_, pull_, pull_all_, squared_distances
from .lora import LoraAdapter, add_lora_penalty_gradient_, squared_delta


class Anchor:
    """A pretrained value, which follows its parameter to its device or stays where it is."""

    def __init__(self, value: Tensor, follows: bool = False):
        self.value, self.follows = value, follows

    @classmethod
    def copy(cls, value: Tensor, device: torch.device | str | None) -> "Anchor":
        """Of a value as it is now: kept with its parameter, or on a device of its own."""
        return cls(make_anchor(value, device), follows=device is None)

    def of(self, parameter: Tensor) -> Tensor:
        if self.follows and self.value.device != parameter.device:
            self.value = self.value.to(parameter.device)
        return self.value


class ParameterTerm:
    """A parameter and its anchor. With a moment, displacements are measured by what they do to a layer's outputs."""

    def __init__(self, parameter: Tensor, anchor: Anchor, moment: Moment | None = None):
        self.parameter, self.anchor, self.moment = parameter, anchor, moment

    def numel(self) -> int:
        return self.parameter.numel()

    def weight(self, weights: Mapping[Tensor, float]) -> float:
        return weights.get(self.parameter, 0.0)

    def group(self, groups: Mapping[Tensor, Any]) -> Any:
        """The param group that it is in."""
        return groups.get(self.parameter)

    def has_gradient(self) -> bool:
        return self.parameter.grad is not None

    def squared_anchor(self) -> Tensor | None:
        """``||anchor||^2``."""
        return squared_distances([self.anchor.value], [zeros_like(self.anchor.value)])[0]

    def anchors(self) -> list[Tensor]:
        return [self.anchor.value]

    def place(self) -> tuple[Tensor, Tensor, Moment | None]:
        """The parameter, its anchor, and its moment, which is on the same device."""
        self.moment = on_device(self.moment, self.parameter)
        return self.parameter, self.anchor.of(self.parameter), self.moment


class LoraTerm:
    """What a LoRA adapter adds to a weight, plus the difference between that weight and its anchor."""

    def __init__(self, adapter: LoraAdapter, offset: Tensor | None = None, moment: Moment | None = None):
        self.adapter, self.offset, self.moment = adapter, offset, moment

    def numel(self) -> int:
        return self.adapter.numel()

    def weight(self, weights: Mapping[Tensor, float]) -> float:
        """The weight of the param groups in which the factors are; a frozen factor has no say."""
        trained = [factor for factor in (self.adapter.down, self.adapter.up) if factor.requires_grad]
        own = {weights.get(factor, 0.0) for factor in trained}
        if len(own) > 1:
            raise ValueError(
                f"The factors of the LoRA adapter {self.adapter.name} have different weights, {sorted(own)}: give "
                "their param groups the same `lipschitz_weight`, and put both into the optimizer or freeze one."
            )
        return own.pop() if own else 0.0

    def group(self, groups: Mapping[Tensor, Any]) -> Any:
        return None  # only `Proximal` uses it, which is not for products

    def has_gradient(self) -> bool:
        return self.adapter.down.grad is not None or self.adapter.up.grad is not None

    def add_gradient(self, coefficient: Coefficient) -> Tensor:
        gradients = self.adapter.down.grad, self.adapter.up.grad
        return add_lora_penalty_gradient_(gradients, self.adapter, coefficient, self.offset, self._moment())

    def squared(self) -> Tensor:
        return squared_delta(self.adapter, self.offset, self._moment())

    def pull(self, fraction: Coefficient) -> Tensor:
        """The nearest product in a ball around 0 is the product made smaller, and scaling one factor does that."""
        square = self.squared()
        pull_(self.adapter.up, zeros_like(self.adapter.up), fraction)
        return square

    def squared_anchor(self) -> Tensor | None:
        """``||W||^2``; `None` where W is not known."""
        weight = self.adapter.weight
        return None if weight is None else squared_distances([weight], [zeros_like(weight)])[0]

    def anchors(self) -> list[Tensor]:
        return [tensor.detach() for tensor in (self.adapter.weight, self.offset) if tensor is not None]

    def _moment(self) -> Moment | None:
        self.moment = on_device(self.moment, self.adapter.down)
        return self.moment


Term = ParameterTerm | LoraTerm


def add_gradients(terms: Sequence[Term], coefficients: Sequence[float], scale: Tensor | float) -> list[Tensor]:
    """The gradients are still multiplied by `scale`; what is returned is not."""
    columns, values = [], []
    for term, c in zip(terms, coefficients, strict=True):
        if isinstance(term, LoraTerm):
            values.append(term.add_gradient(c * scale) / scale)
            continue
        gradient = term.parameter.grad
        if gradient.layout != torch.strided:
            raise ValueError(
                "mode 'coupled' cannot add to sparse gradients: build the embedding with sparse=False, use mode "
                "'proximal', or set `lipschitz_weight` to 0 in its param group."
            )
        parameter, anchor, moment = term.place()
        columns.append((gradient, parameter, anchor, c, moment))
    return values + (add_penalty_gradient_(*zip(*columns), scale) if columns else [])


def squares(terms: Sequence[Term]) -> list[Tensor]:
    def of_parameters(terms: Sequence[ParameterTerm]) -> list[Tensor]:
        return squared_distances(*zip(*(term.place() for term in terms)))

    return _together(of_parameters, lambda term: term.squared(), terms)


def pull(terms: Sequence[Term], fractions: Sequence[Coefficient], measured: bool = True) -> list[Tensor]:
    """Returns nothing unless `measured`."""

    def of_parameters(terms: Sequence[ParameterTerm], fractions: Sequence[Coefficient]) -> list[Tensor]:
        parameters, anchors, _ = zip(*(term.place() for term in terms))
        return pull_all_(parameters, anchors, fractions, measured) or [None] * len(terms)

    before = _together(of_parameters, lambda term, fraction: term.pull(fraction), terms, fractions)
    return before if measured else []


def _together(of_parameters: Callable, of_product: Callable, terms: Sequence[Term], *columns: Sequence) -> list:
    """What a function of many parameters, and one of a single LoRA product, give for terms, in their order."""
    rows = list(zip(terms, *columns, strict=True))
    plain = [index for index, term in enumerate(terms) if isinstance(term, ParameterTerm)]
    results = dict(zip(plain, of_parameters(*zip(*(rows[index] for index in plain))) if plain else []))
    return [results[index] if index in results else of_product(*row) for index, row in enumerate(rows)]


def build_offset(adapter: LoraAdapter, anchor: Tensor | None, device: torch.device | str | None) -> Tensor | None:
    """The weight of the adapter minus its anchor, if that is not the weight itself."""
    if anchor is None:
        return None
    weight = adapter.weight.detach()
    shape = (adapter.up.shape[0], *adapter.down.shape[1:])
    if anchor.shape != shape:
        raise ValueError(f"An anchor of shape {tuple(anchor.shape)} is for a LoRA adapter of {shape}.")
    offset = weight.to(torch.promote_types(weight.dtype, torch.float32)) - anchor.to(weight.device)
    return make_anchor(offset, device)


def on_device(moment: Moment | None, parameter: Tensor) -> Moment | None:
    return moment if moment is None or moment.root.device == parameter.device else moment.to(parameter.device)


def checked(name: str, value: float) -> float:
    """The value, if it is a finite number and at least 0."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"`{name}` must be a finite number and at least 0, not {value}.")
    return float(value)


def zeros_like(tensor: Tensor) -> Tensor:
    """Zeros in the shape of the tensor, in the memory of a single element."""
    return torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand_as(tensor)


def to_floats(scalars: Sequence[Tensor]) -> list[float]:
    """The numbers in tensors of no dimensions, read in one transfer."""
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).tolist() if scalars else []
