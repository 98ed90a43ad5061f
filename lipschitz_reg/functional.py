"""
The arithmetic of the penalty on parameters as functions over lists of tensors: readable references first, then the
fast forms. Holds no state and no hooks: which tensors, with which coefficients and when is decided in terms.py.

In the notation of "Preserve and Personalize" (arXiv 2505.19519, Algorithm 1) the penalty is ``sum_i c_i * ||theta_i -
anchor_i||^2`` with ``c_i = lambda * r_i``. Its gradient is ``2 * c_i * (theta_i - anchor_i)``; the functions take
``c_i`` and apply the 2 themselves.

Parameters are float16, bfloat16, float32 or float64, of any shape and strides. An anchor has the shape of its
parameter and a dtype that is no wider; if it lies on another device, it is copied over, one tensor at a time. A
coefficient is a number, a tensor of no dimensions, or a tensor that broadcasts to its parameter (a weight for each
element). Where a parameter has a `Moment`, ``||theta_i - anchor_i||^2`` is ``tr(D M D^T)``, with the
difference D as a matrix of the parameter's rows, and the coefficient is a number or a tensor of no dimensions.

The fast forms take the difference first, in float32 or wider: ``theta`` and ``anchor`` agree in most of their digits,
so that adding ``c * theta`` and then subtracting ``c * anchor`` would leave little but rounding errors.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


Coefficient = float | Tensor

# Elements per piece. On a CPU the difference must still be in the cache when it is added (2**18 is 1 MiB of float32).
_CPU_BLOCK = 1 << 18
_ACCELERATOR_BLOCK = 1 << 24

_LAYOUTS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


class Moment(NamedTuple):
    """
    The second moment of a layer's inputs, ``M = root root^T + rest * I``, by which displacements of one of its
    parameters are measured (recording.py says why).

    Args:
        root (`torch.Tensor`):
            (n, rank), float32, where n is the number of elements in a row of the weight: in * kernel. (1, 0) where all
            elements of the parameter count alike.
        rest (`torch.Tensor`): No dimensions, float32.
    """

    root: Tensor
    rest: Tensor

    def apply(self, displacement: Tensor) -> Tensor:
        """``displacement M``, on flattened rows. Keeps shape and dtype, which should be float32 or wider."""
        if not self.root.numel():
            return displacement * self.rest.to(displacement)
        rows, root, rest = displacement.flatten(1), self.root.to(displacement), self.rest.to(displacement)
        with torch.autocast(displacement.device.type, enabled=False):
            return torch.addmm(rows * rest, rows @ root, root.T).view_as(displacement)

    def squared_norm(self, displacement: Tensor) -> Tensor:
        """``tr(displacement M displacement^T)``, of no dimensions, in float32 or wider."""
        square = squared_norm(displacement) * self.rest.to(displacement)
        if not self.root.numel():
            return square
        with torch.autocast(displacement.device.type, enabled=False):
            return square + squared_norm(displacement.flatten(1) @ self.root.to(displacement))

    def gradient(self, displacement: Tensor, c: Coefficient) -> tuple[Tensor, Tensor]:
        """``2 c D M`` and ``c tr(D M D^T)`` of a displacement D that is not needed afterwards, in few passes."""
        rest = self.rest.to(displacement)
        square = squared_norm(displacement) * rest
        if not self.root.numel():
            return displacement.mul_(rest * (2 * c)), c * square
        rows, root = displacement.flatten(1), self.root.to(displacement)
        with torch.autocast(displacement.device.type, enabled=False):
            product = rows @ root
            square = square + squared_norm(product)
            change = rows.mul_(rest * (2 * c)).addmm_(product.mul_(2 * c), root.T)
        return change.view_as(displacement), c * square

    def to(self, device: torch.device) -> "Moment":
        return Moment(self.root.to(device), self.rest.to(device))


def reductions(numels: Sequence[int], reduction: str) -> list[float]:
    """
    The r_i of each tensor in the penalty.

    Args:
        numels (`Sequence[int]`): The number of elements of each penalized tensor.
        reduction (`str`):
            `"sum"`: 1, the paper's formula. `"tensor_mean"`: one over the elements of the tensor, which is what the
            authors' code computes and what their lambdas mean. `"mean"`: one over the elements of all tensors.

    Returns:
        `list[float]`: A number for each tensor; for an empty tensor any number will do, and it is finite.
    """
    if reduction == "sum":
        return [1.0] * len(numels)
    if reduction == "tensor_mean":
        return [1 / max(n, 1) for n in numels]
    if reduction == "mean":
        return [1 / max(sum(numels), 1)] * len(numels)
    raise ValueError(f"`reduction` must be one of sum, tensor_mean, mean, not {reduction!r}.")


def penalty(
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    coefficients: Sequence[Coefficient],
    moments: Sequence[Moment | None] | None = None,
) -> Tensor:
    """
    Reference: ``sum_i c_i * ||theta_i - anchor_i||^2``, a tensor of no dimensions, differentiable in the parameters.

    This is the term as the paper writes it. `add_penalty_gradient_` adds its gradient.
    """
    terms = []
    for p, a, c, moment in zip(parameters, anchors, coefficients, moments or [None] * len(parameters), strict=True):
        difference = p - a.to(p)
        measured = difference if moment is None else moment.apply(difference)
        terms.append((c * difference * measured).sum())
    return sum(terms)


def proximal_step(
    parameters: Sequence[Tensor], anchors: Sequence[Tensor], coefficients: Sequence[Coefficient]
) -> list[Tensor]:
    """
    Reference: ``(theta_i + 2 c_i anchor_i) / (1 + 2 c_i)``, the minimum over x of ``||x - theta_i||^2 / 2 + c_i ||x -
    anchor_i||^2``.

    With ``c_i = lr * lambda * r_i`` it is an implicit gradient step on the penalty, which cannot overshoot the anchor.
    """
    return [(p + 2 * c * a.to(p)) / (1 + 2 * c) for p, a, c in zip(parameters, anchors, coefficients, strict=True)]


def project(parameters: Sequence[Tensor], anchors: Sequence[Tensor], radius: float) -> list[Tensor]:
    """Reference: the nearest parameters that are, as one vector, at most `radius` away from the anchors."""
    distance = penalty(parameters, anchors, [1.0] * len(parameters)).sqrt()
    remaining = (radius / distance).clamp(max=1)
    return [a.to(p) + remaining * (p - a.to(p)) for p, a in zip(parameters, anchors, strict=True)]


@torch.no_grad()
def add_penalty_gradient_(
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    coefficients: Sequence[Coefficient],
    moments: Sequence[Moment | None] | None = None,
) -> list[Tensor]:
    """
    Add ``2 c_i (theta_i - anchor_i)``, the gradient of `penalty`, to each gradient in place.

    A finite float16 gradient stays finite, at 65504 or less: a `GradScaler` has looked for overflow before the hooks
    of an optimizer run, and would not see one that arose here.

    Returns:
        `list[torch.Tensor]`: The terms of the penalty, ``c_i * ||theta_i - anchor_i||^2``, from the same pass: no
        dimensions, float32 or wider, on the parameter's device.
    """
    terms = []
    moments = moments or [None] * len(parameters)
    for parameter, anchor, gradient, c, moment in zip(
        parameters, anchors, gradients, coefficients, moments, strict=True
    ):
        c = _on_device(c, parameter.device)
        if moment is not None:
            difference = _difference(parameter, anchor.to(parameter.device, non_blocking=True))
            change, term = moment.gradient(difference, c)
            terms.append(term)
            saturating_add_(gradient, change)
            continue
        add_piece = _fused_add_piece(parameter.device) if parameter.is_cuda else _add_piece
        pieces = _pieces(parameter, anchor, gradient, cut=_is_scalar(c))
        sums = [add_piece(gradient_piece, piece, anchor_piece, c) for piece, anchor_piece, gradient_piece in pieces]
        terms.append(sums[0] if len(sums) == 1 else torch.stack(sums).sum())
    return terms


@torch.no_grad()
def proximal_step_(
    parameters: Sequence[Tensor], anchors: Sequence[Tensor], coefficients: Sequence[Coefficient]
) -> None:
    """`proximal_step` in place."""
    for parameter, anchor, c in zip(parameters, anchors, coefficients, strict=True):
        pull_(parameter, anchor, 2 * c / (1 + 2 * c))


@torch.no_grad()
def project_(parameters: Sequence[Tensor], anchors: Sequence[Tensor], radius: float) -> None:
    """`project` in place. Nothing is read back from an accelerator."""
    if parameters:
        fraction = ball_fraction(squared_distances(parameters, anchors), radius)
        for parameter, anchor in zip(parameters, anchors, strict=True):
            pull_(parameter, anchor, fraction)


def ball_fraction(squares: Sequence[Tensor], radius: float) -> Tensor:
    """The fraction of the way to the centre at which the square root of the sum is at most the radius: 0 if it is."""
    total = torch.stack([square.to(squares[0].device) for square in squares]).sum()
    return (1 - radius / total.sqrt()).clamp(min=0)


@torch.no_grad()
def squared_distances(
    parameters: Sequence[Tensor], anchors: Sequence[Tensor], moments: Sequence[Moment | None] | None = None
) -> list[Tensor]:
    """``||theta_i - anchor_i||^2`` of each tensor: no dimensions, float32 or wider, on the parameter's device."""
    squares = []
    for parameter, anchor, moment in zip(parameters, anchors, moments or [None] * len(parameters), strict=True):
        if moment is None:
            pieces = [_difference(piece, other).square_().sum() for piece, other in _pieces(parameter, anchor)]
            squares.append(torch.stack(pieces).sum())
        else:
            difference = _difference(parameter, anchor.to(parameter.device, non_blocking=True))
            squares.append(moment.squared_norm(difference))
    return squares


def squared_norm(tensor: Tensor) -> Tensor:
    """The sum of the squares of all elements: no dimensions, float32 or wider."""
    return torch.linalg.vector_norm(tensor, dtype=_wide(tensor)).square()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _difference(parameter: Tensor, anchor: Tensor) -> Tensor:
    return parameter.to(_wide(parameter)) - anchor


def saturating_add_(gradient: Tensor, change: Tensor) -> None:
    """gradient += change, in which a finite float16 gradient stays finite."""
    if gradient.dtype == torch.float16:
        limit = torch.finfo(torch.float16).max
        change = torch.where(gradient.isfinite(), (gradient + change).clamp(-limit, limit), gradient)
        gradient.copy_(change)
    else:
        gradient.add_(change)


def _add_piece(gradient: Tensor, parameter: Tensor, anchor: Tensor, c: Coefficient) -> Tensor:
    """gradient += 2 c (parameter - anchor). Returns the sum of c (parameter - anchor)^2."""
    difference = _difference(parameter, anchor)
    if _is_scalar(c):
        term = torch.linalg.vector_norm(difference).square() * c
    else:
        term = (c * difference * difference).sum()
    saturating_add_(gradient, difference.mul_(2 * c))
    return term


@functools.cache
def _fused_add_piece(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Coefficient], Tensor]:
    """`_add_piece` as one kernel, which reads and writes each element once; uncompiled where that cannot be made."""
    trial = [torch.zeros(2, device=device) for _ in range(3)]
    try:
        compiled = torch.compile(_add_piece, dynamic=True)
        compiled(*trial, torch.zeros((), dtype=torch.float64))  # as below
    except Exception as error:  # no Triton, no C compiler, a GPU or a Python that it does not know: each of its kind
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"lipschitz_reg adds its gradient in three passes, because torch.compile failed: {reason}")
        return _add_piece

    def add_piece(gradient: Tensor, parameter: Tensor, anchor: Tensor, c: Coefficient) -> Tensor:
        # A kernel would be made for each number, and for each tensor of one element.
        if not isinstance(c, Tensor):
            c = torch.tensor(c, dtype=torch.float64)
        return (compiled if gradient.numel() > 1 else _add_piece)(gradient, parameter, anchor, c)

    return add_piece


@torch.no_grad()
def pull_(parameter: Tensor, anchor: Tensor, fraction: Coefficient) -> Tensor:
    """Move the parameter this fraction of the way to its anchor. Returns ``||theta - anchor||^2`` before the move."""
    dtype, squares = _wide(parameter), []
    if isinstance(fraction, Tensor):
        fraction = _on_device(fraction, parameter.device).to(dtype)
    for piece, anchor_piece in _pieces(parameter, anchor, cut=_is_scalar(fraction)):
        moved, other = piece.to(dtype), anchor_piece.to(dtype)
        squares.append(torch.linalg.vector_norm(moved - other).square())
        moved = moved.lerp_(other, fraction)
        if moved is not piece:
            piece.copy_(moved)
    return squares[0] if len(squares) == 1 else torch.stack(squares).sum()


def _on_device(coefficient: Coefficient, device: torch.device) -> Coefficient:
    return coefficient.to(device, non_blocking=True) if isinstance(coefficient, Tensor) else coefficient


def _is_scalar(coefficient: Coefficient) -> bool:
    return not isinstance(coefficient, Tensor) or coefficient.dim() == 0


def _pieces(parameter: Tensor, *others: Tensor, cut: bool = True) -> Iterable[tuple[Tensor, ...]]:
    """Matching pieces of tensors of one shape, on the parameter's device: flat views where the tensors share a memory
    layout, and the tensors whole where they do not or are not to be cut."""
    device = parameter.device
    tensors = [parameter.detach(), *(other.to(device, non_blocking=True) for other in others)]
    if cut and any(all(t.is_contiguous(memory_format=layout) for t in tensors) for layout in _LAYOUTS):
        block = _CPU_BLOCK if device.type == "cpu" else _ACCELERATOR_BLOCK
        return zip(*(t.as_strided((t.numel(),), (1,)).split(block) for t in tensors), strict=True)
    return [tuple(tensors)]
