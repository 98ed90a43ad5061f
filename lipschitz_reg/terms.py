"""
What is penalized: a list of terms, each with its space and its anchor. A parameter is a term, and so is the product of
a LoRA adapter. Holds no arithmetic (functional.py, lora.py), no hooks (regularizer.py), and does not say how a term
acts (modes.py).

The functions at the end act on many terms at once, as many small parameters take few operations together. Given their
coefficients ``c = weight * r_i``:

- `add_gradients`: add ``2 c (theta - anchor)`` to the gradients, and return what ``c ||theta - anchor||^2`` add up to;
- `squares`: each ``||theta - anchor||^2`` in its space;
- `pull`: move a fraction of the way to the anchors, and return what `squares` were before.

Where processes share a tensor (engines.py), each has the piece of it and of its anchor that it moves, and what is
returned is that of the whole. All processes have to call the functions, with the same terms.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .anchors import make_anchor
from .engines import Engine, Piece, PieceMoment, all_reduce_, sum_over, whole_of
from .functional import (
    Coefficient,
    Moment,
    add_penalty_gradient_,
    pull_,
    pull_all_,
    saturating_add_,
    squared_distances,
)
from .lora import LoraAdapter, add_lora_penalty_gradient_, add_lora_penalty_gradients_, squared_delta


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

    def __init__(self, parameter: Tensor, anchor: Anchor, piece: Piece, moment: Moment | None = None):
        self.parameter, self.anchor, self.piece = parameter, anchor, piece
        # A multiple of the identity is a number, and terms with numbers take few operations together.
        is_number = moment is not None and not moment.root.numel()
        self.factor, self.moment = (float(moment.rest), None) if is_number else (1.0, moment)
        self.part = piece.part  # of the engine's step

    def numel(self) -> int:
        return self.piece.numel()

    def weight(self, weights: Mapping[Tensor, float]) -> float:
        return weights.get(self.parameter, 0.0)

    def group(self, groups: Mapping[Tensor, Any]) -> Any:
        """The param group that it is in."""
        return groups.get(self.parameter)

    def has_gradient(self) -> bool:
        return self.piece.gradient() is not None

    def squared_anchor(self) -> Tensor | None:
        """``||anchor||^2``."""
        return _squared_norm(self.anchor.value, self.piece)

    def tensors(self) -> tuple[Tensor, ...]:
        """What an optimizer may have of it."""
        return (self.parameter,)

    def anchors(self) -> list[tuple[Tensor, Piece]]:
        return [(self.anchor.value, self.piece)]

    def place(self) -> tuple[Tensor, Tensor, Moment | PieceMoment | None]:
        """The piece of the parameter, that of its anchor, and its moment, which is on the same device."""
        held = self.piece.value()
        self.moment = on_device(self.moment, held)
        moment = PieceMoment(self.moment, self.piece) if self.moment is not None and self.piece.flat else self.moment
        return held, self.anchor.of(held), moment


class LoraTerm:
    """
    What a LoRA adapter adds to a weight, plus the difference between that weight and its anchor. If processes share
    the factors, each computes with the whole ones, which are small, and moves its pieces.
    """

    def __init__(
        self, adapter: LoraAdapter, engine: Engine, offset: Tensor | None = None, moment: Moment | None = None
    ):
        self.adapter, self.offset, self.moment = adapter, offset, moment
        self.pieces = [engine.piece(factor) for factor in (adapter.down, adapter.up)]
        self.weight_piece = None if adapter.weight is None else engine.piece(adapter.weight)
        self.is_shared = any(piece.group is not None for piece in self.pieces)
        self.parts = {piece.part for piece in self.pieces if piece.tensor.requires_grad}
        self.part = min(self.parts, default=0)

    def numel(self) -> int:
        down, up = self.pieces
        return up.shape[0] * math.prod(down.shape[1:])

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
        return any(piece.gradient() is not None for piece in self.pieces)

    def kind(self) -> tuple | None:
        """What those have in common that are computed together; `None` for one that is computed alone."""
        gradients = [piece.gradient() for piece in self.pieces]
        alone = self.is_shared or self.offset is not None or self.moment is not None and not self.moment.root.numel()
        if alone or any(gradient is None or gradient.dtype == torch.float16 for gradient in gradients):
            return None
        factors = [(f.shape, f.dtype, f.device, f.stride()) for f in (self.adapter.down, self.adapter.up)]
        return *factors, None if self.moment is None else self.moment.root.shape

    def add_gradient(self, coefficient: Coefficient, adapter: LoraAdapter) -> Tensor:
        """`adapter` has the whole factors."""
        gradients = [piece.gradient() for piece in self.pieces]
        whole = gradients
        if self.is_shared:
            factors = (adapter.down, adapter.up)
            whole = [None if g is None else torch.zeros_like(f) for g, f in zip(gradients, factors, strict=True)]
        value = add_lora_penalty_gradient_(whole, adapter, coefficient, self.offset, self._moment(adapter))
        for gradient, change, piece in zip(gradients, whole, self.pieces, strict=True):
            if gradient is not change:
                saturating_add_(gradient, piece.cut(change).to(gradient))
        return value

    def squared(self, adapter: LoraAdapter) -> Tensor:
        return squared_delta(adapter, self.offset, self._moment(adapter))

    def pull(self, fraction: Coefficient) -> None:
        """The nearest product in a ball around 0 is the product made smaller, and scaling one factor does that."""
        down, up = self.pieces
        factor = (up if up.tensor.requires_grad else down).value()
        pull_(factor, zeros_like(factor), fraction)

    def squared_anchor(self) -> Tensor | None:
        """``||W||^2``; `None` where W is not known."""
        piece = self.weight_piece
        return None if piece is None else _squared_norm(piece.value(), piece)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.adapter.down, self.adapter.up

    def anchors(self) -> list[tuple[Tensor, Piece]]:
        own = [tensor for tensor in (self.adapter.codes(), self.offset) if tensor is not None]
        anchors = [(tensor, Piece(tensor)) for tensor in own]
        if self.weight_piece is not None:
            anchors.insert(0, (self.weight_piece.value().detach(), self.weight_piece))
        return anchors

    def _moment(self, adapter: LoraAdapter) -> Moment | None:
        self.moment = on_device(self.moment, adapter.down)
        return self.moment


Term = ParameterTerm | LoraTerm


def add_gradients(terms: Sequence[Term], coefficients: Sequence[float], scale: Tensor | float) -> list[Tensor]:
    """The gradients are still multiplied by `scale`; what is returned is not."""
    columns, values, alike, batched = defaultdict(list), [], defaultdict(list), set()
    adapters = _whole_adapters(terms)
    for term, c in zip(terms, coefficients, strict=True):
        if isinstance(term, LoraTerm):
            kind, factors = term.kind(), term.tensors()
            # A factor that adapters share must not be in one operation twice.
            alike[kind if kind and batched.isdisjoint(factors) else term].append((term, c))
            batched.update(factors)
            continue
        gradient = term.piece.gradient()
        if gradient.layout != torch.strided:
            raise ValueError(
                "mode 'coupled' cannot add to sparse gradients: build the embedding with sparse=False, use mode "
                "'proximal', or set `lipschitz_weight` to 0 in its param group."
            )
        parameter, anchor, moment = term.place()
        columns[term.piece.group].append((gradient, parameter, anchor, c * term.factor, moment))
    for rows in alike.values():
        if len(rows) == 1:
            values += [term.add_gradient(c * scale, adapters[term]) / scale for term, c in rows]
            continue
        gradients = [[piece.gradient() for piece in term.pieces] for term, _ in rows]
        moments = [term._moment(term.adapter) for term, _ in rows]
        products = [term.adapter for term, _ in rows]
        values += add_lora_penalty_gradients_(gradients, products, [c for _, c in rows], moments, scale)
    for group, rows in columns.items():
        own = add_penalty_gradient_(*zip(*rows), scale)
        values += own if group is None else [all_reduce_(torch.stack(own).sum(), group)]
    return values


def squares(terms: Sequence[Term]) -> list[Tensor]:
    def of_parameters(terms: Sequence[ParameterTerm]) -> list[Tensor]:
        own = squared_distances(*zip(*(term.place() for term in terms)))
        own = [square if term.factor == 1 else square * term.factor for term, square in zip(terms, own, strict=True)]
        return sum_over([term.piece.group for term in terms], own)

    adapters = _whole_adapters(terms)
    return _together(of_parameters, lambda term: term.squared(adapters[term]), terms)


def pull(terms: Sequence[Term], fractions: Sequence[Coefficient], measured: bool = True) -> list[Tensor]:
    """Returns nothing unless `measured`."""

    def of_parameters(terms: Sequence[ParameterTerm], fractions: Sequence[Coefficient]) -> list[Tensor]:
        parameters, anchors, _ = zip(*(term.place() for term in terms))
        own = pull_all_(parameters, anchors, fractions, measured)
        return sum_over([term.piece.group for term in terms], own) if measured else [None] * len(terms)

    adapters = _whole_adapters(terms) if measured else {}

    def of_product(term: LoraTerm, fraction: Coefficient) -> Tensor | None:
        square = term.squared(adapters[term]) if measured else None
        term.pull(fraction)
        return square

    before = _together(of_parameters, of_product, terms, fractions)
    return before if measured else []


def _whole_adapters(terms: Sequence[Term]) -> dict[LoraTerm, LoraAdapter]:
    """The adapters of the terms with whole factors."""
    products = [term for term in terms if isinstance(term, LoraTerm)]
    shared = [term for term in products if term.is_shared]
    factors = iter(whole_of([piece for term in shared for piece in term.pieces]))
    whole = {term: replace(term.adapter, down=next(factors), up=next(factors)) for term in shared}
    return {term: whole.get(term, term.adapter) for term in products}


def _squared_norm(held: Tensor, piece: Piece) -> Tensor:
    """Of the whole tensor."""
    return sum_over([piece.group], squared_distances([held], [zeros_like(held)]))[0]


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
