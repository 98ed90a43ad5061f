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

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


Coefficient = float | Tensor

# Elements per piece. On a CPU the difference must still be in the cache when it is added (2**18 is 1 MiB of float32).
_CPU_BLOCK = 1 << 18
_ACCELERATOR_BLOCK = 1 << 24
# Tensors of at most so many elements are computed together, in batches of a block: by `torch._foreach` operations,
# since a call for each would take longer than the arithmetic.
_SMALL = 1 << 18

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
    scale: Tensor | float = 1.0,
) -> list[Tensor]:
    """
    Add ``2 c_i (theta_i - anchor_i)``, the gradient of `penalty`, to each gradient in place, multiplied by `scale`.

    A finite float16 gradient stays finite, at 65504 or less: a `GradScaler` has looked for overflow before the hooks
    of an optimizer run, and would not see one that arose here.

    Returns:
        `list[torch.Tensor]`: What sums up to the `penalty`, from the same pass: no dimensions, float32 or wider, on
        the devices of the parameters. It is not multiplied by `scale`.
    """
    moments = moments or [None] * len(parameters)
    rows = list(zip(gradients, parameters, anchors, coefficients, moments, strict=True))
    small, alike, large = [], defaultdict(list), []
    for index, (gradient, parameter, _, c, moment) in enumerate(rows):
        # float16 needs `saturating_add_`.
        together = gradient.dtype != torch.float16 and not isinstance(c, Tensor) and parameter.numel() <= _SMALL
        if together and moment is None:
            small.append(index)
        elif together and isinstance(moment, Moment) and moment.root.numel():
            alike[parameter.shape, gradient.dtype, moment.root.shape].append(index)
        else:
            large.append(index)
    terms, norms = [], defaultdict(list)
    for batch in (batch for of_shape in alike.values() for batch in _batches(of_shape, parameters)):
        if len(batch) == 1:
            large += batch
        else:
            terms.append(_add_gradients([rows[index] for index in batch], scale))
    # A coefficient that many have needs no pass of its own. Those of one tensor each make up batches without one.
    shared = Counter(coefficients[index] for index in small)
    common = [c if not isinstance(c, Tensor) and shared[c] > 1 else None for c in coefficients]
    for batch in _batches(small, parameters, common):
        parts, c = [parameters[index] for index in batch], common[batch[0]]
        differences = _differences(parts, [anchors[index] for index in batch])
        norms[parts[0].device, differences[0].dtype] += zip(torch._foreach_norm(differences), batch)
        if isinstance(scale, Tensor):
            torch._foreach_mul_(differences, _on_device(scale, parts[0].device))
        if c is None:
            torch._foreach_mul_(differences, [coefficients[index] for index in batch])
        factor = (2 if c is None else 2 * c) * (1 if isinstance(scale, Tensor) else scale)
        torch._foreach_add_([gradients[index] for index in batch], differences, alpha=factor)
    for of_kind in norms.values():
        squares = torch.stack([norm for norm, _ in of_kind]).square()
        terms.append(torch.dot(squares, _to_tensor([coefficients[index] for _, index in of_kind], squares)))
    for gradient, parameter, anchor, c, moment in (rows[index] for index in large):
        term = _add_gradient(gradient, parameter, anchor, _on_device(c, parameter.device), moment, scale)
        terms.append(term)
    return terms


def _add_gradients(rows: Sequence[tuple[Tensor, Tensor, Tensor, float, Moment]], scale: Tensor | float) -> Tensor:
    """`add_penalty_gradient_` for small parameters of one shape, device and dtype that have moments of one shape."""
    gradients, parameters, anchors, coefficients, moments = zip(*rows)
    anchors = [anchor.to(parameters[0].device, non_blocking=True) for anchor in anchors]
    differences = _difference(torch.stack(parameters), torch.stack(anchors)).flatten(2)
    c, (roots, rests) = _to_tensor(coefficients, differences), stack_moments(moments, differences)
    factors = (2 * _on_device(scale, c.device) * c).to(differences)[:, None, None]
    with torch.autocast(differences.device.type, enabled=False):
        products = differences @ roots
        squares = squared_norms(differences) * rests + squared_norms(products)
        changes = differences.mul_(rests[:, None, None] * factors).baddbmm_(products.mul_(factors), roots.mT)
    changes = changes.view(len(rows), *parameters[0].shape).to(gradients[0].dtype)
    torch._foreach_add_(gradients, changes.unbind())
    return torch.dot(c, squares)


def stack_moments(moments: Sequence[Moment], like: Tensor) -> tuple[Tensor, Tensor]:
    """The roots (k, n, rank) and the rests (k), in the dtype and on the device of another tensor."""
    roots, rests = (torch.stack(parts).to(like) for parts in zip(*moments, strict=True))
    return roots, rests


def squared_norms(matrices: Tensor) -> Tensor:
    """`squared_norm` of each of the matrices in a tensor (k, rows, columns): (k)."""
    return torch.linalg.vector_norm(matrices, dim=(1, 2)).square()


def _add_gradient(
    gradient: Tensor,
    parameter: Tensor,
    anchor: Tensor,
    c: Coefficient,
    moment: Moment | None,
    scale: Tensor | float,
) -> Tensor:
    """`add_penalty_gradient_` for one tensor, piece by piece."""
    scaled = isinstance(scale, Tensor) or scale != 1
    c = c * _on_device(scale, parameter.device) if scaled else c
    if moment is not None:
        difference = _difference(parameter, anchor.to(parameter.device, non_blocking=True))
        change, term = moment.gradient(difference, c)
        saturating_add_(gradient, change)
    else:
        pieces = _pieces(parameter, anchor, gradient, cut=_is_scalar(c))
        sums = [_add_piece(gradient_piece, piece, anchor_piece, c) for piece, anchor_piece, gradient_piece in pieces]
        term = sums[0] if len(sums) == 1 else torch.stack(sums).sum()
    return term / _on_device(scale, parameter.device) if scaled else term


@torch.no_grad()
def proximal_step_(
    parameters: Sequence[Tensor], anchors: Sequence[Tensor], coefficients: Sequence[Coefficient]
) -> None:
    """`proximal_step` in place."""
    pull_all_(parameters, anchors, [2 * c / (1 + 2 * c) for c in coefficients])


@torch.no_grad()
def project_(parameters: Sequence[Tensor], anchors: Sequence[Tensor], radius: float) -> None:
    """`project` in place. Nothing is read back from an accelerator."""
    if parameters:
        fraction = ball_fraction(squared_distances(parameters, anchors), radius)
        pull_all_(parameters, anchors, [fraction] * len(parameters), measured=False)


def ball_fraction(squares: Sequence[Tensor], radius: float) -> Tensor:
    """The fraction of the way to the centre at which the square root of the sum is at most the radius: 0 if it is."""
    total = torch.stack([square.to(squares[0].device) for square in squares]).sum()
    return (1 - radius / total.sqrt()).clamp(min=0)


@torch.no_grad()
def squared_distances(
    parameters: Sequence[Tensor], anchors: Sequence[Tensor], moments: Sequence[Moment | None] | None = None
) -> list[Tensor]:
    """``||theta_i - anchor_i||^2`` of each tensor: no dimensions, float32 or wider, on the parameter's device."""
    squares: list[Tensor | None] = [None] * len(parameters)
    rows = list(zip(parameters, anchors, moments or [None] * len(parameters), strict=True))
    small = [index for index, (p, _, moment) in enumerate(rows) if moment is None and p.numel() <= _SMALL]
    for batch in _batches(small, parameters):
        differences = _differences([parameters[index] for index in batch], [anchors[index] for index in batch])
        norms = torch._foreach_norm(differences)
        for index, square in zip(batch, torch._foreach_mul(norms, norms)):
            squares[index] = square
    for index, (parameter, anchor, moment) in enumerate(rows):
        if squares[index] is None and moment is None:
            pieces = [_square(_difference(piece, other)) for piece, other in _pieces(parameter, anchor)]
            squares[index] = torch.stack(pieces).sum()
        elif squares[index] is None:
            difference = _difference(parameter, anchor.to(parameter.device, non_blocking=True))
            squares[index] = moment.squared_norm(difference)
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


def _square(tensor: Tensor) -> Tensor:
    """`squared_norm` of what is in float32 or wider already, and at most a block."""
    if tensor.device.type == "cpu":  # twice as fast there
        flat = tensor.flatten()
        return torch.dot(flat, flat)
    return torch.linalg.vector_norm(tensor).square()


def _batches(
    indices: Sequence[int], parameters: Sequence[Tensor], coefficients: Sequence[Coefficient] | None = None
) -> list[list[int]]:
    """
    The indices of small parameters in groups, each of one device, dtype and coefficient, and of at most a block of
    elements.
    """
    batches, last = [], {}  # by kind, the group that is being filled, and its elements
    for index in indices:
        parameter = parameters[index]
        n, c = parameter.numel(), coefficients[index] if coefficients else None
        kind = parameter.device, parameter.dtype, c
        batch, filled = last.get(kind, (None, 0))
        if batch is None or filled + n > _block(parameter.device):
            batch, filled = [], 0
            batches.append(batch)
        batch.append(index)
        last[kind] = batch, filled + n
    return batches


def _differences(parameters: Sequence[Tensor], anchors: Sequence[Tensor]) -> list[Tensor]:
    """``theta_i - anchor_i`` of a batch, in float32 or wider."""
    dtype, device = _wide(parameters[0]), parameters[0].device
    anchors = [anchor.to(device, non_blocking=True) for anchor in anchors]
    return torch._foreach_sub(_widened(parameters, dtype), _widened(anchors, dtype))


def _widened(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    wide = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(wide, tensors)
    return wide


def _to_tensor(numbers: Sequence[float], like: Tensor) -> Tensor:
    """On the device of another tensor, which is not waited for."""
    tensor = torch.tensor(numbers, dtype=like.dtype)
    return tensor.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else tensor.to(like.device)


def _add_piece(gradient: Tensor, parameter: Tensor, anchor: Tensor, c: Coefficient) -> Tensor:
    """gradient += 2 c (parameter - anchor). Returns the sum of c (parameter - anchor)^2."""
    difference = _difference(parameter, anchor)
    if _is_scalar(c):
        term = _square(difference) * c
    else:
        term = (c * difference * difference).sum()
    if isinstance(c, Tensor) or gradient.dtype == torch.float16:
        saturating_add_(gradient, difference.mul_(2 * c))
    else:
        gradient.add_(difference, alpha=2 * c)
    return term


@torch.no_grad()
def pull_all_(
    parameters: Sequence[Tensor], anchors: Sequence[Tensor], fractions: Sequence[Coefficient], measured: bool = True
) -> list[Tensor]:
    """
    Move each parameter its fraction of the way to its anchor.

    Returns:
        `list[torch.Tensor]`: ``||theta_i - anchor_i||^2`` before the move, or nothing unless `measured`.
    """
    squares: dict[int, Tensor | None] = {}
    # Numbers take fewer passes than tensors, and to read one from host memory costs nothing.
    scalars = {id(f): f for f in fractions if isinstance(f, Tensor) and f.device.type == "cpu" and f.dim() == 0}
    numbers = {key: float(scalar) for key, scalar in scalars.items()}
    fractions = [numbers.get(id(fraction), fraction) for fraction in fractions]
    small = [
        index
        for index, (parameter, fraction) in enumerate(zip(parameters, fractions, strict=True))
        if parameter.numel() <= _SMALL and _is_scalar(fraction) and parameter.dtype.itemsize >= 4
    ]
    for batch in _batches(small, parameters, fractions):
        parts, fraction = [parameters[index] for index in batch], fractions[batch[0]]
        differences = _differences(parts, [anchors[index] for index in batch])
        norms = torch._foreach_norm(differences) if measured else [None] * len(parts)
        if isinstance(fraction, Tensor):
            torch._foreach_mul_(differences, _on_device(fraction, parts[0].device).to(parts[0].dtype))
            fraction = 1.0
        torch._foreach_sub_(parts, differences, alpha=fraction)
        squares |= zip(batch, torch._foreach_mul(norms, norms) if measured else norms)
    for index in sorted({*range(len(parameters))} - squares.keys()):
        squares[index] = _pull(parameters[index], anchors[index], fractions[index], measured)
    return [squares[index] for index in range(len(parameters))] if measured else []


@torch.no_grad()
def pull_(parameter: Tensor, anchor: Tensor, fraction: Coefficient) -> Tensor:
    """`pull_all_` for one."""
    return pull_all_([parameter], [anchor], [fraction])[0]


def _pull(parameter: Tensor, anchor: Tensor, fraction: Coefficient, measured: bool) -> Tensor | None:
    dtype, squares = _wide(parameter), []
    if isinstance(fraction, Tensor):
        fraction = _on_device(fraction, parameter.device).to(dtype)
    for piece, anchor_piece in _pieces(parameter, anchor, cut=_is_scalar(fraction)):
        moved, other = piece.to(dtype), anchor_piece.to(dtype)
        if measured:
            squares.append(_square(moved - other))
        moved = moved.lerp_(other, fraction)
        if moved is not piece:
            piece.copy_(moved)
    return torch.stack(squares).sum() if measured else None


def weighted_sum(values: Sequence[Tensor], factors: Sequence[Coefficient]) -> Tensor:
    """The sum of ``factor_i * value_i`` over tensors of no dimensions, on the device of the first."""
    device = values[0].device
    if any(isinstance(factor, Tensor) for factor in factors):
        return torch.stack([(factor * value).to(device) for factor, value in zip(factors, values, strict=True)]).sum()
    stacked = torch.stack([value.to(device) for value in values])
    return torch.dot(stacked, _to_tensor(factors, stacked))


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
        block = _block(device)
        return zip(*(t.as_strided((t.numel(),), (1,)).split(block) for t in tensors), strict=True)
    return [tuple(tensors)]


def _block(device: torch.device) -> int:
    return _CPU_BLOCK if device.type == "cpu" else _ACCELERATOR_BLOCK
