# record_inputs: what the layers of a model get while it runs, as the second moments in which displacements of their
# weights are measured. Holds no penalty (functional.py, lora.py) and no anchors.
"""
A layer ``y = W x + b`` whose W moves by D gives ``y + D x``. ``||D||^2`` bounds that change for the worst x; for the x
that the layer does meet it is ``E||D x||^2 = tr(D C D^T)`` with ``C = E[x x^T]``. Most of what comes into a layer of a
trained network lies in few directions. A displacement across them hardly changes what the base does.

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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import InputMoment, squared_norm
from .lora import adapted_weight, lora_factors


_LEAST = 1e-3  # the least that a direction counts, relative to the mean
_CUTOFF = 1e-5  # eigenvalues of the sketch below this, relative to the largest, are taken for rounding errors


@contextmanager
def record_inputs(*models: nn.Module, rank: int = 256) -> Iterator[dict[Tensor, InputMoment]]:
    """
    Record what the layers of models get while the models run, for `LipschitzRegularizer`.

        with record_inputs(unet) as inputs:
            pipeline(prompts)  # pictures that the model should go on drawing as it does
        regularizer = LipschitzRegularizer(optimizer, weight=5, inputs=inputs)

    Recorded are parameters that train, and the frozen weights to which LoRA adapters add: the weights of linear layers
    and of 2-d convolutions (not grouped, padded with zeros); and biases, embeddings and the weights of norms, whose
    elements all count alike, by the size of what the layer gives. All others are left out, among them quantized
    weights, the magnitudes of DoRA, and layers that do not run or give nothing but zeros. Of a weight that several
    layers share, the last layer counts. A model that has run compiled does not call the hooks: record first. Frozen
    weights to which adapters other than peft's add have to have `requires_grad` inside the block.

    Args:
        models (`torch.nn.Module`): The models as they were pretrained, with `requires_grad` as in the training.
        rank (`int`, *optional*, defaults to 256):
            Columns of `InputMoment.factor`, at most. In a layer of no more inputs the sketch is C itself. The factors
            take 4 bytes * rank * (in * kernel) a layer, and as much again while they are recorded.

    Returns:
        `dict[torch.Tensor, InputMoment]`: By parameter. It is empty until the end of the `with` block.

    Raises:
        `ValueError`: If the rank is below 1. At the end of the block, if what came out of a layer was not finite.
    """
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, not {rank}.")
    modules = [row for model in models for row in model.named_modules(prefix=type(model).__name__)]
    factors = {factor for _, module in modules for factor in lora_factors(module)}
    weights = {adapted_weight(module) for _, module in modules}
    bases: dict[int, Tensor] = {}
    recorders, handles = [], []
    for name, module in modules:
        own = [p for p in module.parameters(recurse=False) if p in weights or (p.requires_grad and p not in factors)]
        own = [p for p in own if p.dim() == 1 or isinstance(module, nn.Embedding) or p is _matrix_of(module)]
        if own:
            recorders.append(_Recorder(name, own, _matrix_of(module), rank, bases))
            handles.append(module.register_forward_hook(recorders[-1], with_kwargs=True))
    inputs: dict[Tensor, InputMoment] = {}
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
    for recorder in recorders:
        inputs |= recorder.moments()
        recorder.sketch = None  # its memory


class _Recorder:
    """The forward hook of one layer: sums over its inputs and outputs."""

    def __init__(
        self, name: str, parameters: list[Tensor], matrix: Tensor | None, rank: int, bases: dict[int, Tensor]
    ):
        self.name, self.parameters, self.rank, self.bases = name, parameters, rank, bases
        self.matrix = matrix if any(parameter is matrix for parameter in parameters) else None
        self.outputs = self.squared_output = 0
        self.count = self.trace = 0
        self.sketch: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        # Sums that began in inference mode could not go on outside it.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            self.outputs += output.numel()
            self.squared_output = self.squared_output + squared_norm(output)
            if self.matrix is None:
                return
            for rows in _rows(module, args[0] if args else kwargs["input"]):
                rows = rows.float()
                projected = self._project(rows)
                if self.sketch is None:
                    self.sketch = rows.new_zeros(rows.shape[1], projected.shape[1])
                self.count += len(rows)
                self.trace = self.trace + squared_norm(rows)
                self.sketch.addmm_(rows.T, projected)

    def _project(self, rows: Tensor) -> Tensor:
        """The rows times (n, rank) orthonormal columns, the same in each run and process; times 1 if n is no more."""
        n = rows.shape[1]
        if n <= self.rank:
            return rows
        if n not in self.bases:
            basis = torch.linalg.qr(torch.randn(n, self.rank, generator=torch.Generator().manual_seed(0)))[0]
            self.bases[n] = basis.to(rows.device)
        return rows @ self.bases[n].to(rows)

    @torch.no_grad()
    def moments(self) -> dict[Tensor, InputMoment]:
        if not self.outputs:
            return {}
        device = self.squared_output.device
        where = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        output = self.squared_output.to(where).double() / self.outputs
        if not torch.isfinite(output):
            raise ValueError(
                f"{self.name} gave NaN or infinity while its inputs were recorded: run it in float32 or bfloat16."
            )
        if output == 0:
            return {}  # no change is small beside it
        result = {}
        for parameter in self.parameters:
            if parameter is not self.matrix:
                result[parameter] = InputMoment(torch.zeros(1, 0, device=device), (1 / output).float().to(device))
            elif self.trace > 0:
                sketch, n = self.sketch.to(where).double() / self.count, len(self.sketch)
                core = self._project(sketch.T)
                values, vectors = torch.linalg.eigh((core + core.T) / 2)
                inverse = torch.where(values > _CUTOFF * values[-1], values, torch.inf).rsqrt()
                factor = sketch @ vectors * inverse
                mean = self.trace.to(where).double() / self.count / n
                rest = torch.maximum(mean - factor.square().sum() / n, _LEAST * mean)
                scale = n / output
                factor, rest = factor * scale.sqrt(), rest * scale
                result[parameter] = InputMoment(factor.float().to(device), rest.float().to(device))
        return result


def _matrix_of(module: nn.Module) -> Tensor | None:
    """The weight, if its rows are multiplied with what `_rows` returns."""
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return module.weight if plain else None
    return module.weight if isinstance(module, nn.Linear) else None


def _rows(module: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """What a row of the weight is multiplied with, (positions, n); image by image where it is a convolution."""
    if isinstance(module, nn.Linear):
        yield inputs.reshape(-1, inputs.shape[-1])
        return
    for image in inputs:
        yield F.unfold(image[None], module.kernel_size, module.dilation, module.padding, module.stride)[0].T
