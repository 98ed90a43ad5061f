"""
The penalty on LoRA: a readable reference on the formed product, then the same from Gram matrices, and the search for
adapters in a model. Holds no state and no hooks, and never imports peft: its layers are known by their attributes.

An adapter adds ``delta = s B A`` to a frozen weight W; A (`down`) is rank x in, B (`up`) out x rank, and s the
scaling, alpha / rank. Full fine-tuning that moved W by delta would pay ``c ||delta||^2`` ("Preserve and Personalize",
arXiv 2505.19519, Algorithm 1), so LoRA pays the same: nothing in the first step, where B is 0, and the same for every
split of a delta into factors. As ``||B A||^2 = tr((B^T B) (A A^T))``, this costs O(rank^2 (in + out)).

The factors of a convolution are matrices too: A, a convolution to `rank` channels, is rank x (in * kernel), and B,
whose kernel is 1, is out x rank.
"""

import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .functional import Coefficient, Moment, _block, _on_device, _to_tensor, saturating_add_, stack_moments


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """
    What one adapter adds to one weight, ``scaling * up @ down``.

    Args:
        name (`str`): What `LipschitzRegularizer.metrics` calls it.
        down (`torch.Tensor`): A, of shape (rank, in) or (rank, in, *kernel).
        up (`torch.Tensor`): B, of shape (out, rank) or (out, rank, 1, ...), on the device of A.
        scaling (`float`): s; alpha / rank, or alpha / sqrt(rank) in rank-stabilized LoRA. It stays as it is here.
        weight (`torch.Tensor`, *optional*):
            W, to which the product is added. It is read for the relative drift and for the fingerprint of the base.
        quantized (`torch.Tensor`, *optional*): W as it is stored, where its numbers are codes: for the fingerprint.

    Raises:
        `ValueError`: If the shapes do not fit each other, as in a grouped convolution.
    """

    name: str
    down: Tensor
    up: Tensor
    scaling: float
    weight: Tensor | None = None
    quantized: Tensor | None = None

    def __post_init__(self):
        if self.up.numel() != self.up.shape[0] * self.down.shape[0]:
            shapes = [tuple(tensor.shape) for tensor in (self.down, self.up)]
            raise ValueError(f"The factors of the LoRA adapter {self.name} do not fit each other: {shapes}.")

    def codes(self) -> Tensor | None:
        """The bytes of a quantized weight, by which it is recognized."""
        if self.quantized is None or hasattr(self.quantized, "placements"):
            return None
        return self.quantized.detach().as_subclass(Tensor).contiguous().view(torch.uint8)

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
    adapters = [a for name, module in model.named_modules(prefix=prefix) for a in lora_adapters(module, name)]
    if not adapters:
        raise ValueError(f"{type(model).__name__} has no active LoRA adapter: add the adapters first.")
    return adapters


def lora_adapters(module: nn.Module, name: str) -> list[LoraAdapter]:
    """The active adapters of a layer: peft's, or those of kohya's scripts and LyCORIS, which are modules beside it."""
    if all(hasattr(module, attribute) for attribute in ("lora_A", "lora_B", "scaling", "active_adapters")):
        layer = getattr(module, "base_layer", None)
        active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
        names = [name if len(active) == 1 else f"{name}.{adapter}" for adapter in active]
        parts = [(module.lora_A[adapter], module.lora_B[adapter], module.scaling[adapter]) for adapter in active]
        if getattr(module, "num_experts", 1) > 1 or not all(hasattr(a, "weight") for a, _, _ in parts):
            return []  # one product for each expert, or of three factors (AdaLoRA)
    elif all(hasattr(module, attribute) for attribute in ("lora_down", "lora_up", "alpha", "scale")):
        if getattr(module, "lora_mid", None) is not None or isinstance(getattr(module, "scalar", None), nn.Parameter):
            return []  # not a product of two factors: each of its parameters has an anchor
        scaling = float(module.scale) * float(getattr(module, "multiplier", 1.0))
        downs, ups = ([m] if hasattr(m, "weight") else list(m) for m in (module.lora_down, module.lora_up))
        layer = _wrapped_layer(module) if len(downs) == 1 else None
        names = [name] if len(downs) == 1 else [f"{name}.{index}" for index in range(len(downs))]
        parts = [(down, up, scaling) for down, up in zip(downs, ups, strict=True)]
    else:
        return []
    if getattr(layer, "groups", 1) > 1:
        raise ValueError(f"The LoRA adapter {name} is on a grouped convolution, which cannot be penalized.")
    weight, codes = getattr(layer, "weight", None), None
    if weight is not None and (not weight.is_floating_point() or weight.dtype.itemsize == 1):
        weight, codes = None, weight
    named = zip(names, parts, strict=True)
    return [LoraAdapter(n, down.weight, up.weight, s, weight, codes) for n, (down, up, s) in named]


def _wrapped_layer(module: nn.Module) -> nn.Module | None:
    """The layer whose `forward` kohya's or LyCORIS' module replaced by its own."""
    layer = getattr(module, "org_module", None)
    if layer is None:  # kohya's module gives it up once it has taken its place
        layer = getattr(getattr(module, "org_forward", None), "__self__", None)
    return layer[0] if isinstance(layer, list) else layer


def lora_factors(module: nn.Module) -> Iterator[Tensor]:
    """What trains in a layer with adapters, the magnitudes of DoRA too."""
    for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
        if isinstance(getattr(module, name, None), nn.Module):
            yield from getattr(module, name).parameters()


def adapted_weight(module: nn.Module) -> Tensor | None:
    """The weight to which the adapters of a layer add."""
    return getattr(getattr(module, "base_layer", None), "weight", None) if hasattr(module, "lora_A") else None


def find_adapters(parameters: Iterable[Tensor]) -> list[LoraAdapter]:
    """
    The LoRA adapters whose factors are among the parameters, in the order of these, wherever in this process they are:
    an optimizer knows parameters, but no modules. Both peft's and those that `lora_adapters` knows besides.
    """
    order = {parameter: index for index, parameter in enumerate(parameters)}
    modules = living_modules()
    children = {child for module in modules for child in vars(module)["_modules"].values()}
    names: dict[nn.Module, str] = {}
    for root in modules:
        if root not in children:
            for name, module in root.named_modules():
                names.setdefault(module, getattr(module, "lora_name", name))
    found = []
    for module, name in names.items():
        for adapter in lora_adapters(module, name):
            places = [order[factor] for factor in (adapter.down, adapter.up) if factor in order]
            if places:
                found.append((min(places), adapter))
    return [adapter for _, adapter in sorted(found, key=lambda pair: pair[0])]


def living_modules() -> list[nn.Module]:
    """All modules of this process. They are known by their type, so that lazy stand-ins are left asleep."""
    modules = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
    return [module for module in modules if "_modules" in vars(module)]  # a half-built one has none


def lora_penalty(
    adapter: LoraAdapter, coefficient: Coefficient, offset: Tensor | None = None, moment: Moment | None = None
) -> Tensor:
    """
    Reference: ``c ||D||^2`` with ``D = offset + s B A``, a tensor of no dimensions, differentiable in the factors;
    with a moment M ``c tr(D M D^T)``.

    Args:
        offset (`torch.Tensor`, *optional*):
            W minus its anchor, (out, in) or (out, in, *kernel), where W itself is not the anchor.

    `add_lora_penalty_gradient_` adds its gradient, ``2 c s B^T D M`` for A and ``2 c s D M A^T`` for B.
    """
    delta = adapter.scaling * adapter.up.flatten(1) @ adapter.down.flatten(1)
    if offset is not None:
        delta = offset.flatten(1).to(delta) + delta
    return coefficient * (delta * (delta if moment is None else moment.apply(delta))).sum()


@torch.no_grad()
def add_lora_penalty_gradient_(
    gradients: tuple[Tensor | None, Tensor | None],
    adapter: LoraAdapter,
    coefficient: Coefficient,
    offset: Tensor | None = None,
    moment: Moment | None = None,
) -> Tensor:
    """
    Add the gradient of `lora_penalty` in place to the gradients of `down` and `up`; a factor whose gradient is `None`
    is left out. The sums are in float32 or wider, and a finite float16 gradient stays finite.

    Returns:
        `torch.Tensor`: `lora_penalty` itself, from the same products: no dimensions, float32 or wider, on the factors'
        device.
    """
    down, up, offset = _matrices(adapter, offset)
    c = _on_device(coefficient, down.device)
    with torch.autocast(down.device.type, enabled=False):
        measured, gram = _measure(down, moment), up.T @ up * adapter.scaling
        if gradients[0] is not None:
            change = gram @ measured
            if offset is not None:
                change += _measure(up.T @ offset, moment)
            saturating_add_(gradients[0], change.mul_(2 * c * adapter.scaling).view_as(gradients[0]))
        if gradients[1] is not None:
            change = up @ (down @ measured.T * adapter.scaling)
            if offset is not None:
                change += offset @ measured.T
            saturating_add_(gradients[1], change.mul_(2 * c * adapter.scaling).view_as(gradients[1]))
        return c * _squared_delta(adapter.scaling, gram, down, up, measured, offset, moment)


@torch.no_grad()
def add_lora_penalty_gradients_(
    gradients: Sequence[Sequence[Tensor]],
    adapters: Sequence[LoraAdapter],
    coefficients: Sequence[float],
    moments: Sequence[Moment | None],
    scale: Tensor | float,
) -> list[Tensor]:
    """
    `add_lora_penalty_gradient_` for adapters without offsets whose factors, and moments if they have any, are of one
    shape, device and dtype: for many of them as few operations as for one. The gradients are still multiplied by
    `scale`.

    Returns:
        `list[torch.Tensor]`: What sums up to the `lora_penalty` of all, not multiplied by `scale`.
    """
    first, root = adapters[0], 0 if moments[0] is None else moments[0].root.numel()
    size = max(_block(first.down.device) // (first.down.numel() + first.up.numel() + root), 1)
    rows = list(zip(gradients, adapters, coefficients, moments, strict=True))
    return [_add_gradients(*zip(*rows[start : start + size]), scale) for start in range(0, len(rows), size)]


def _add_gradients(
    gradients: Sequence[Sequence[Tensor]],
    adapters: Sequence[LoraAdapter],
    coefficients: Sequence[float],
    moments: Sequence[Moment | None],
    scale: Tensor | float,
) -> Tensor:
    dtype = torch.promote_types(adapters[0].down.dtype, torch.float32)
    down = torch.stack([adapter.down.detach().flatten(1) for adapter in adapters]).to(dtype)
    up = torch.stack([adapter.up.detach().flatten(1) for adapter in adapters]).to(dtype)
    c, scaling = _to_tensor([coefficients, [adapter.scaling for adapter in adapters]], down)
    factors = (2 * _on_device(scale, c.device) * c * scaling.square()).to(dtype)[:, None, None]
    with torch.autocast(down.device.type, enabled=False):
        measured = down
        if moments[0] is not None:
            roots, rests = stack_moments(moments, down)
            measured = torch.baddbmm(down * rests[:, None, None], down @ roots, roots.mT)
        gram, outer = up.mT @ up, down @ measured.mT
        squares = scaling.square() * (gram * outer).sum((1, 2))
        changes = (gram @ measured).mul_(factors), (up @ outer).mul_(factors)
    for own, change in zip(zip(*gradients, strict=True), changes, strict=True):
        parts = change.view(len(own), *own[0].shape).to(own[0].dtype).unbind()
        torch._foreach_add_(own, parts)
    return torch.dot(c, squares.clamp_(min=0))


@torch.no_grad()
def squared_delta(adapter: LoraAdapter, offset: Tensor | None = None, moment: Moment | None = None) -> Tensor:
    """`lora_penalty` with a coefficient of 1: no dimensions, float32 or wider, on the factors' device."""
    down, up, offset = _matrices(adapter, offset)
    with torch.autocast(down.device.type, enabled=False):
        gram = up.T @ up * adapter.scaling
        return _squared_delta(adapter.scaling, gram, down, up, _measure(down, moment), offset, moment)


def _squared_delta(
    scaling: float,
    gram: Tensor,
    down: Tensor,
    up: Tensor,
    measured: Tensor,
    offset: Tensor | None,
    moment: Moment | None,
) -> Tensor:
    square = scaling * (gram * (down @ measured.T)).sum()
    if offset is not None:
        own = offset.square().sum() if moment is None else moment.squared_norm(offset)
        square += own + 2 * scaling * ((up.T @ offset) * measured).sum()
    return square.clamp_(min=0)  # a small difference of large terms may be rounded below 0


def _measure(rows: Tensor, moment: Moment | None) -> Tensor:
    return rows if moment is None else moment.apply(rows)


def _matrices(adapter: LoraAdapter, offset: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """A, B and the offset as matrices in float32 or wider."""
    dtype = torch.promote_types(adapter.down.dtype, torch.float32)
    down, up = (factor.detach().flatten(1).to(dtype) for factor in (adapter.down, adapter.up))
    return down, up, None if offset is None else offset.flatten(1).to(down.device, dtype, non_blocking=True)
