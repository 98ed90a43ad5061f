# The arithmetic of the penalty, as functions over lists of tensors: readable references first, then the fast in-place forms.
# Holds no state, no hooks and no weights schedule: which tensors, with which coefficients and when is the caller's affair.
"""
Notation of "Preserve and Personalize" (arXiv 2505.19519), Algorithm 1: the penalty is
``sum_i c_i * ||theta_i - anchor_i||^2`` with ``c_i = lambda * r_i``. Its gradient is ``2 * c_i * (theta_i - anchor_i)``; the
functions below take ``c_i`` and apply the factor 2 themselves.

A coefficient is a number, a tensor of no dimensions, or a tensor that broadcasts to its parameter (a weight for each element).
Parameters may be float16, bfloat16, float32 or float64 and of any strides. An anchor has its parameter's shape and any of
these dtypes that is no wider; on another device it is copied over, one tensor at a time.

Differences are formed first, in float32 or wider. ``theta`` and ``anchor`` agree in most of their digits, so adding
``c * theta`` and subtracting ``c * anchor`` would leave little but rounding errors.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


Coefficient = float | Tensor

# Elements handled at a time on a CPU: the difference stays in the cache until it is used, and is never as large as a tensor.
_CPU_BLOCK = 1 << 17
_DEVICE_BLOCK = 1 << 24
_LAYOUTS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


def reduction_factors(numels: Sequence[int], reduction: str) -> list[float]:
    """
    The factor r_i of each tensor in the penalty.

    Args:
        numels (`Sequence[int]`): The number of elements of each penalized tensor.
        reduction (`str`):
            `"sum"`: 1, the paper's formula. `"tensor_mean"`: one over the tensor's elements, which is what the authors' code
            computes and what their lambdas mean. `"mean"`: one over the elements of all tensors together.

    Returns:
        `list[float]`: One factor for each tensor; 0 for an empty tensor.
    """
    if reduction == "sum":
        return [1.0] * len(numels)
    if reduction == "tensor_mean":
        return [1 / n if n else 0.0 for n in numels]
    if reduction == "mean":
        return [1 / max(sum(numels), 1)] * len(numels)
    raise ValueError(f'`reduction` must be "sum", "tensor_mean" or "mean", not {reduction!r}.')


def penalty(parameters: Sequence[Tensor], anchors: Sequence[Tensor], coefficients: Sequence[Coefficient]) -> Tensor:
    """
    Reference: ``sum_i c_i * ||theta_i - anchor_i||^2`` as a tensor of no dimensions, differentiable in the parameters.

    This is the term of the paper's loss as written there (Algorithm 1); what the in-place functions do is defined by it.
    """
    return sum((c * (p - a.to(p)).square()).sum() for p, a, c in zip(parameters, anchors, coefficients, strict=True))


def proximal_step(
    parameters: Sequence[Tensor], anchors: Sequence[Tensor], coefficients: Sequence[Coefficient]
) -> list[Tensor]:
    """
    Reference: ``argmin_x ||x - theta_i||^2 / 2 + c_i * ||x - anchor_i||^2``, that is ``(theta + 2 c anchor) / (1 + 2 c)``.

    With ``c_i = lr * lambda * r_i`` this is the implicit gradient step on the penalty: it never overshoots the anchor.
    """
    return [
        (p + 2 * c * a.to(p)) / (1 + 2 * c) for p, a, c in zip(parameters, anchors, coefficients, strict=True)
    ]


def project(parameters: Sequence[Tensor], anchors: Sequence[Tensor], radius: float) -> list[Tensor]:
    """Reference: the point nearest to the parameters, taken as one vector, at a distance of at most `radius` from the anchors."""
    distance = penalty(parameters, anchors, [1.0] * len(parameters)).sqrt()
    keep = (radius / distance).clamp(max=1)
    return [a.to(p) + keep * (p - a.to(p)) for p, a in zip(parameters, anchors, strict=True)]


@torch.no_grad()
def add_penalty_gradient_(
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    coefficients: Sequence[Coefficient],
) -> None:
    """
    Add ``2 * c_i * (theta_i - anchor_i)``, the gradient of `penalty`, to the gradients in place.

    A float16 gradient that was finite stays finite: it saturates at 65504. A `GradScaler` has looked for overflow before an
    optimizer's hooks run, and would miss one that is made here.
    """
    for gradient, parameter, anchor, coefficient in zip(gradients, parameters, anchors, coefficients, strict=True):
        for piece, anchor_piece, gradient_piece, c in _pieces(parameter, anchor, gradient, coefficient):
            difference = piece.to(_wide(piece)) - anchor_piece
            if gradient.dtype == torch.float16:
                total = difference.mul_(2 * c).add_(gradient_piece)
                limit = torch.finfo(torch.float16).max
                gradient_piece.copy_(torch.where(gradient_piece.isfinite(), total.clamp_(-limit, limit), gradient_piece))
            elif isinstance(c, Tensor):
                gradient_piece.add_(difference.mul_(2 * c))
            else:
                gradient_piece.add_(difference, alpha=2 * c)


@torch.no_grad()
def proximal_step_(
    parameters: Sequence[Tensor], anchors: Sequence[Tensor], coefficients: Sequence[Coefficient]
) -> None:
    """`proximal_step` in place."""
    for parameter, anchor, c in zip(parameters, anchors, coefficients, strict=True):
        _pull_(parameter, anchor, 2 * c / (1 + 2 * c))


@torch.no_grad()
def project_(parameters: Sequence[Tensor], anchors: Sequence[Tensor], radius: float) -> None:
    """
    `project` in place, over all tensors together. Nothing is read back from an accelerator.

    The distance is exact to a few units of float32; parameters of 16 bits are rounded once more when they are stored.
    """
    if not parameters:
        return
    device = parameters[0].device
    distance = torch.stack([d.to(device) for d in squared_distances(parameters, anchors)]).sum().sqrt()
    fraction = (1 - radius / distance).clamp(min=0)
    if device.type == "cpu" and fraction == 0:
        return
    for parameter, anchor in zip(parameters, anchors, strict=True):
        _pull_(parameter, anchor, fraction)


@torch.no_grad()
def squared_distances(parameters: Sequence[Tensor], anchors: Sequence[Tensor]) -> list[Tensor]:
    """``||theta_i - anchor_i||^2`` for each tensor: tensors of no dimensions, float32 or wider, on the parameters' devices."""
    return [
        sum(
            (torch.linalg.vector_norm(piece.to(_wide(piece)) - anchor_piece).square()
             for piece, anchor_piece in _pieces(parameter, anchor)),
            torch.zeros((), device=parameter.device),
        )
        for parameter, anchor in zip(parameters, anchors, strict=True)
    ]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _pull_(parameter: Tensor, anchor: Tensor, fraction: Coefficient) -> None:
    """Move the parameter this fraction of the way to its anchor, in place."""
    dtype = _wide(parameter)
    for piece, anchor_piece, k in _pieces(parameter, anchor, fraction):
        widened = piece.to(dtype)
        widened.lerp_(anchor_piece.to(dtype), k.to(dtype) if isinstance(k, Tensor) else k)
        if widened is not piece:
            piece.copy_(widened)


def _pieces(parameter: Tensor, anchor: Tensor, *others: Coefficient) -> Iterator[tuple]:
    """
    Matching pieces of a parameter, its anchor and what goes with them: short flat views where all share one memory layout,
    or else the tensors whole. Numbers and tensors of no dimensions are repeated with each piece.
    """
    if parameter.numel() == 0:
        return
    device = parameter.device
    constants, tensors = {}, {0: parameter, 1: anchor.to(device, non_blocking=True)}
    for position, other in enumerate(others, start=2):
        if not isinstance(other, Tensor):
            constants[position] = other
        elif other.dim() == 0 and parameter.dim() > 0:
            constants[position] = other.to(device, non_blocking=True)
        else:
            tensors[position] = other.to(device, non_blocking=True).expand_as(parameter)
    width = 2 + len(others)
    for layout in _LAYOUTS:
        if all(tensor.is_contiguous(memory_format=layout) for tensor in tensors.values()):
            block = _CPU_BLOCK if device.type == "cpu" else _DEVICE_BLOCK
            flat = [tensor.as_strided((tensor.numel(),), (1,)).split(block) for tensor in tensors.values()]
            break
    else:
        flat = [(tensor,) for tensor in tensors.values()]
    for pieces in zip(*flat, strict=True):
        row = constants | dict(zip(tensors, pieces, strict=True))
        yield tuple(row[position] for position in range(width))
