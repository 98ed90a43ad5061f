# The penalty on LoRA: a readable reference on the formed product, then the same from Gram matrices, and the search for
# adapters in a model. Holds no state and no hooks, and never imports peft: its layers are known by their attributes.
"""
An adapter adds ``delta = s B A`` to a frozen weight W; A (`down`) is rank x in, B (`up`) out x rank, and s the
scaling, alpha / rank. Full fine-tuning that moved W by delta would pay ``c ||delta||^2`` ("Preserve and Personalize",
arXiv 2505.19519, Algorithm 1), so LoRA pays the same: nothing in the first step, where B is 0, and the same for every
split of a delta into factors. As ``||B A||^2 = tr((B^T B) (A A^T))``, this costs O(rank^2 (in + out)).

The factors of a convolution are matrices too: A, a convolution to `rank` channels, is rank x (in * kernel), and B,
whose kernel is 1, is out x rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .functional import Coefficient, InputMoment, _on_device, saturating_add_


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """
    What one adapter adds to one weight, ``scaling * up @ down``.

    Args:
        name (`str`): What `LipschitzRegularizer.metrics` calls it.
        down (`torch.Tensor`): A, of shape (rank, in) or (rank, in, *kernel).
        up (`torch.Tensor`): B, of shape (out, rank) or (out, rank, 1, ...), on the device of A.
        scaling (`float`): s; alpha / rank, or alpha / sqrt(rank) in rank-stabilized LoRA.
        weight (`torch.Tensor`, *optional*):
            W, to which the product is added. It is read for the relative drift and for the fingerprint of the base.
        offset (`torch.Tensor`, *optional*):
            W minus its anchor, of shape (out, in) or (out, in, *kernel), where W itself is not the anchor: the penalty
            is then on ``offset + scaling * up @ down``.
        moment (`InputMoment`, *optional*):
            M of the layer's inputs: the penalty on D is then on ``tr(D M D^T)`` in place of ``||D||^2``.
            `LipschitzRegularizer` finds it in its `inputs`.

    Raises:
        `ValueError`: If the shapes do not fit each other, as in a grouped convolution.
    """

    name: str
    down: Tensor
    up: Tensor
    scaling: float
    weight: Tensor | None = None
    offset: Tensor | None = None
    moment: InputMoment | None = None

    def __post_init__(self):
        shape, offset = (self.up.shape[0], *self.down.shape[1:]), self.offset
        if self.up.numel() != self.up.shape[0] * self.down.shape[0] or (offset is not None and offset.shape != shape):
            shapes = [tuple(tensor.shape) for tensor in (self.down, self.up, offset) if tensor is not None]
            raise ValueError(f"The tensors of the LoRA adapter {self.name} do not fit each other: {shapes}.")

    def numel(self) -> int:
        """The number of elements of the product."""
        return self.up.shape[0] * self.down[0].numel()


def find_lora_adapters(model: nn.Module, prefix: str = "") -> list[LoraAdapter]:
    """
    The active LoRA adapters of linear and convolution layers, as peft makes them, for `LipschitzRegularizer`.

    Args:
        model (`torch.nn.Module`): A model with adapters, peft's or diffusers' or one whose layers look the same.
        prefix (`str`, *optional*): Goes before the names, to tell the adapters of two models apart.

    Raises:
        `ValueError`: If there is none, or one is on a grouped convolution.
    """
    adapters = []
    for module_name, module in model.named_modules(prefix=prefix):
        if not all(hasattr(module, name) for name in ("lora_A", "lora_B", "scaling", "active_adapters")):
            continue
        if getattr(getattr(module, "base_layer", None), "groups", 1) > 1:
            raise ValueError(f"The LoRA adapter {module_name} is on a grouped convolution, which cannot be penalized.")
        weight = getattr(getattr(module, "base_layer", None), "weight", None)
        if weight is not None and (not weight.is_floating_point() or weight.dtype.itemsize == 1):
            weight = None  # quantized: its numbers are not those of W
        active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
        for adapter in active:
            name = module_name if len(active) == 1 else f"{module_name}.{adapter}"
            down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            adapters.append(LoraAdapter(name, down, up, module.scaling[adapter], weight))
    if not adapters:
        raise ValueError(f"{type(model).__name__} has no active LoRA adapter: add the adapters first.")
    return adapters


def lora_factors(module: nn.Module) -> Iterator[Tensor]:
    """What trains in a layer with adapters, the magnitudes of DoRA too."""
    for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
        if isinstance(getattr(module, name, None), nn.Module):
            yield from getattr(module, name).parameters()


def adapted_weight(module: nn.Module) -> Tensor | None:
    """The weight to which the adapters of a layer add."""
    return getattr(getattr(module, "base_layer", None), "weight", None) if hasattr(module, "lora_A") else None


def lora_penalty(adapters: Sequence[LoraAdapter], coefficients: Sequence[Coefficient]) -> Tensor:
    """
    Reference: ``sum_i c_i * ||offset_i + s_i B_i A_i||^2``, a tensor of no dimensions, differentiable in the factors.

    `add_lora_penalty_gradient_` adds its gradient, ``2 c s^2 B^T B A M`` for A and ``2 c s^2 B A M A^T`` for B, and
    with an offset D ``2 c s B^T D M`` and ``2 c s D M A^T`` besides. M is 1 without a moment.
    """
    deltas = [adapter.scaling * adapter.up.flatten(1) @ adapter.down.flatten(1) for adapter in adapters]
    for index, adapter in enumerate(adapters):
        if adapter.offset is not None:
            deltas[index] = adapter.offset.flatten(1).to(deltas[index]) + deltas[index]
    moments = [adapter.moment for adapter in adapters]
    weighed = [delta if m is None else m.apply(delta) for delta, m in zip(deltas, moments, strict=True)]
    return sum(c * (delta * other).sum() for c, delta, other in zip(coefficients, deltas, weighed, strict=True))


@torch.no_grad()
def add_lora_penalty_gradient_(
    gradients: Sequence[tuple[Tensor | None, Tensor | None]],
    adapters: Sequence[LoraAdapter],
    coefficients: Sequence[Coefficient],
) -> None:
    """
    Add the gradient of `lora_penalty` in place to the gradients of `down` and `up`, a pair for each adapter; a factor
    whose gradient is `None` is left out. The sums are in float32 or wider, and a finite float16 gradient stays finite.
    """
    for adapter, pair, c in zip(adapters, gradients, coefficients, strict=True):
        down, up, offset = _matrices(adapter)
        factor = _on_device(2 * c * adapter.scaling, down.device)
        with torch.autocast(down.device.type, enabled=False):
            for gradient, is_down in zip(pair, (True, False), strict=True):
                if gradient is None:
                    continue
                if is_down:
                    change = (up.T @ up * adapter.scaling) @ down
                    change = _weigh(adapter, change if offset is None else change.addmm_(up.T, offset))
                else:
                    weighed = _weigh(adapter, down).T
                    change = up @ (down @ weighed * adapter.scaling)
                    change = change if offset is None else change.addmm_(offset, weighed)
                saturating_add_(gradient, change.mul_(factor).view_as(gradient))


@torch.no_grad()
def squared_deltas(adapters: Sequence[LoraAdapter]) -> list[Tensor]:
    """``||offset_i + s_i B_i A_i||^2`` of each adapter: no dimensions, float32 or wider, on its factors' device."""
    squares = []
    for adapter in adapters:
        down, up, offset = _matrices(adapter)
        with torch.autocast(down.device.type, enabled=False):
            weighed = _weigh(adapter, down)
            square = adapter.scaling**2 * ((up.T @ up) * (down @ weighed.T)).sum()
            if offset is not None:
                own = offset.square().sum() if adapter.moment is None else adapter.moment.squared_norm(offset)
                square += own + 2 * adapter.scaling * ((up.T @ offset) * weighed).sum()
        squares.append(square.clamp_(min=0))  # a small difference of large terms may be rounded below
    return squares


def _weigh(adapter: LoraAdapter, rows: Tensor) -> Tensor:
    return rows if adapter.moment is None else adapter.moment.apply(rows)


def _matrices(adapter: LoraAdapter) -> tuple[Tensor, Tensor, Tensor | None]:
    """A, B and the offset as matrices in float32 or wider."""
    dtype = torch.promote_types(adapter.down.dtype, torch.float32)
    down, up = (factor.detach().flatten(1).to(dtype) for factor in (adapter.down, adapter.up))
    offset = adapter.offset
    return down, up, None if offset is None else offset.flatten(1).to(down.device, dtype, non_blocking=True)
