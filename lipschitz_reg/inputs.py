# What the inputs of a layer say of its weights: the second moment in which a displacement is measured by how much it
# changes the layer's output, and the recording of it. Holds no penalty (functional.py, lora.py) and no anchors.
"""
A layer ``y = W x + b`` whose W moves by D gives ``y + D x``. ``||D||^2`` bounds that change for the worst x; for the x
that the layer does meet it is ``E||D x||^2 = tr(D C D^T)`` with ``C = E[x x^T]``. Most of what comes into a layer of a
trained network lies in few directions. A displacement across them leaves what the base does as it was, and is free.

This is the quantity that layerwise quantization and pruning keep small ("Optimal Brain Compression", arXiv 2208.11580)
and the input half of K-FAC (arXiv 1503.05671). In place of ``||D||^2`` in the penalty of "Preserve and Personalize"
(arXiv 2505.19519, Algorithm 1) stands ``tr(D M D^T)``, ``M = n C / E[y^2]`` with n columns of W and the mean of y^2
over the elements of y. With the reduction `tensor_mean` that is ``E||D x||^2 / E||y||^2``, the relative change of the
output; where all directions carry the same, it is ``||D||^2 / ||W||^2``.

M is kept as ``F F^T + rest * I``. F comes from a random sketch of C, of which only ``C G`` is ever held, for a matrix
G of orthonormal columns: ``C G (G^T C G)^(-1) G^T C``, the Nystroem approximation (Tropp et al. 2017, arXiv
1706.05736). What it misses of the trace of C is spread over all directions, and no direction counts less than a
thousandth of the mean: pictures that were not recorded may need what the recorded ones leave out altogether.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


_LEAST = 1e-3  # the least that a direction counts, relative to the mean
_CUTOFF = 1e-5  # eigenvalues of the sketch below this, relative to the largest, are rounding errors


class InputMoment(NamedTuple):
    """
    ``M = factor factor^T + rest * I``, in which displacements of one parameter are measured.

    Args:
        factor (`torch.Tensor`):
            (n, rank), float32, n being the elements of a row of the weight: in * kernel. (n, 0) for parameters of one
            dimension, whose elements all count alike.
        rest (`torch.Tensor`): No dimensions, float32.
    """

    factor: Tensor
    rest: Tensor

    def apply(self, displacement: Tensor) -> Tensor:
        """``displacement M``, in the shape of the displacement, whose rows are flattened; float32 or wider."""
        if not self.factor.numel():
            return displacement * self.rest.to(displacement)
        rows, factor, rest = displacement.flatten(1), self.factor.to(displacement), self.rest.to(displacement)
        with torch.autocast(displacement.device.type, enabled=False):
            return torch.addmm(rows * rest, rows @ factor, factor.T).view_as(displacement)

    def squared_norm(self, displacement: Tensor) -> Tensor:
        """``tr(displacement M displacement^T)``, of no dimensions, in float32 or wider."""
        square = _squared_norm(displacement) * self.rest.to(displacement)
        if not self.factor.numel():
            return square
        with torch.autocast(displacement.device.type, enabled=False):
            return square + _squared_norm(displacement.flatten(1) @ self.factor.to(displacement))

    def to(self, device: torch.device) -> "InputMoment":
        return InputMoment(self.factor.to(device), self.rest.to(device))


@contextmanager
def record_inputs(*models: nn.Module, rank: int = 256) -> Iterator[dict[Tensor, InputMoment]]:
    """
    Record what the layers of models get while the models run, for `LipschitzRegularizer`.

        with record_inputs(unet) as inputs:
            pipeline(prompts)  # pictures that the model should go on drawing as it does
        regularizer = LipschitzRegularizer(optimizer, weight=5, inputs=inputs)

    Recorded are the weights of linear layers and of 2-d convolutions (not grouped, padded with zeros), and all
    parameters of one dimension: biases, and the weights of norms, whose inputs are taken to be 1. Of these, those that
    train, and the frozen ones to which LoRA adapters add. Other parameters, and layers that do not run, are left out.

    Args:
        models (`torch.nn.Module`): The models as they were pretrained, with `requires_grad` as in the training.
        rank (`int`, *optional*, defaults to 256):
            Columns of `InputMoment.factor`, at most. A layer of no more inputs is recorded exactly. The factors take 4
            bytes * rank * (in * kernel) a layer, and twice that while they are recorded.

    Returns:
        `dict[torch.Tensor, InputMoment]`: By parameter. It is empty until the end of the `with` block.

    Raises:
        `ValueError`: At the end of the block, if what came out of a layer was not finite.
    """
    factors = {p for model in models for module in model.modules() for p in _lora_factors(module)}
    weights = {p for model in models for module in model.modules() for p in _lora_weights(module)}
    bases: dict[int, Tensor] = {}
    recorders = {}
    for module in (module for model in models for module in model.modules()):
        own = [p for p in module.parameters(recurse=False) if p in weights or (p.requires_grad and p not in factors)]
        own = [p for p in own if p.dim() == 1 or (_has_rows(module) and p is module.weight)]
        if own:
            recorders[module] = _Recorder(own, rank, bases)
    handles = [module.register_forward_hook(recorder, with_kwargs=True) for module, recorder in recorders.items()]
    inputs: dict[Tensor, InputMoment] = {}
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
    for recorder in recorders.values():
        inputs |= recorder.moments()


class _Recorder:
    """The forward hook of one layer: sums over its inputs and outputs."""

    def __init__(self, parameters: list[Tensor], rank: int, bases: dict[int, Tensor]):
        self.parameters, self.rank, self.bases = parameters, rank, bases
        self.has_rows = any(parameter.dim() > 1 for parameter in parameters)
        self.outputs = self.squared_output = 0
        self.count = self.trace = 0
        self.sketch: Tensor | None = None

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        with torch.autocast(output.device.type, enabled=False):
            self.outputs += output.numel()
            self.squared_output = self.squared_output + _squared_norm(output)
            for rows in _rows(module, args[0] if args else kwargs["input"]) if self.has_rows else ():
                rows = rows.float()
                projected = self._project(rows)
                if self.sketch is None:
                    self.sketch = rows.new_zeros(rows.shape[1], projected.shape[1])
                self.count += len(rows)
                self.trace = self.trace + _squared_norm(rows)
                self.sketch.addmm_(rows.T, projected)

    def _project(self, rows: Tensor) -> Tensor:
        """The rows times (n, rank) orthonormal columns, the same in each run and process; times 1 if n is no more."""
        n = rows.shape[1]
        if n <= self.rank:
            return rows
        if n not in self.bases:
            basis = torch.linalg.qr(torch.randn(n, self.rank, generator=torch.Generator().manual_seed(0)))[0]
            self.bases[n] = basis.to(rows.device)
        return rows @ self.bases[n].to(rows.dtype)

    @torch.no_grad()
    def moments(self) -> dict[Tensor, InputMoment]:
        if not self.outputs:
            return {}
        output = self.squared_output.double() / self.outputs
        if not torch.isfinite(output):
            raise ValueError("A layer gave numbers that are not finite while its inputs were recorded.")
        if output == 0:
            return {}  # no change is small beside it
        result = {}
        for parameter in self.parameters:
            if parameter.dim() == 1:
                result[parameter] = InputMoment(parameter.new_zeros(1, 0).float(), (1 / output).float())
                continue
            sketch, n = self.sketch.double() / self.count, len(self.sketch)
            core = self._project(sketch.T)
            values, vectors = torch.linalg.eigh((core + core.T) / 2)
            inverse = torch.where(values > _CUTOFF * values[-1], values, torch.inf).rsqrt()
            factor = sketch @ vectors * inverse
            mean = self.trace.double() / self.count / n
            rest = torch.maximum(mean - factor.square().sum() / n, _LEAST * mean)
            scale = n / output
            result[parameter] = InputMoment((factor * scale.sqrt()).float(), (rest * scale).float())
        return result


def _squared_norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)).square()


def _has_rows(module: nn.Module) -> bool:
    """Whether the weight of the module is a matrix that acts on what `_rows` returns."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear)


def _rows(module: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """What a row of the weight is multiplied with, (positions, n); image by image where it is a convolution."""
    if isinstance(module, nn.Linear):
        yield inputs.reshape(-1, inputs.shape[-1])
        return
    for image in inputs:
        yield F.unfold(image[None], module.kernel_size, module.dilation, module.padding, module.stride)[0].T


def _lora_factors(module: nn.Module) -> Iterator[Tensor]:
    for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
        if isinstance(getattr(module, name, None), nn.Module):
            yield from getattr(module, name).parameters()


def _lora_weights(module: nn.Module) -> Iterator[Tensor]:
    weight = getattr(getattr(module, "base_layer", None), "weight", None)
    if hasattr(module, "lora_A") and weight is not None:
        yield weight
