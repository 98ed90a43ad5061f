# LipschitzRegularizer: holds the anchors, and the hooks through which an optimizer's step carries the penalty.
# Holds no arithmetic (functional.py) and knows no model, loss or training loop.
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from .anchors import fingerprint, make_anchor
from .functional import add_penalty_gradient_, project_, proximal_step_, reduction_factors, squared_distances


class LipschitzRegularizer:
    """
    Keeps the parameters of an optimizer near their present values, the anchors: ``weight * sum_i r_i * ||theta_i -
    anchor_i||^2`` joins the loss at each `optimizer.step()`, whoever calls it ("Preserve and Personalize", arXiv
    2505.19519, Algorithm 1).

    Build it while the parameters are the pretrained ones, that is, before a checkpoint is loaded, and after whatever
    replaces the parameters of the optimizer (FSDP). A param group may carry its own `lipschitz_weight`, as it may
    carry its own `lr`; 0 leaves the group alone. Both are read anew at each step. A parameter without a gradient is
    moved at that step neither by the optimizer nor by the penalty; only `"projected"` mode moves it.

    Args:
        optimizer (`torch.optim.Optimizer`):
            The optimizer, or accelerate's wrapper of it.
        weight (`float`):
            The paper's lambda, at least 0. If no group has a weight above 0, nothing is attached, and training is
            bit-identical to training without. In `"projected"` mode, a weight above 0 only says that a group takes
            part.
        reduction (`str`, *optional*, defaults to `"tensor_mean"`):
            The paper's r_i. `"sum"`: 1, the paper's formula. `"tensor_mean"`: one over the elements of the tensor,
            which is what the authors' code computes and what their lambdas mean. `"mean"`: one over the elements of
            all penalized tensors.
        mode (`str`, *optional*, defaults to `"coupled"`):
            `"coupled"` adds the gradient, ``2 * weight * r_i * (theta_i - anchor_i)``, before the optimizer reads it:
            the paper's loss. `"proximal"` moves each parameter after the step to ``(theta + 2 c anchor) / (1 + 2 c)``
            with ``c = lr * weight * r_i``: it cannot overshoot, and Adam does not rescale it. `"projected"` moves all
            parameters after the step to a distance of at most `radius` from the anchors.
        radius (`float`, *optional*):
            The largest distance, over all penalized parameters together, above 0. `"projected"` mode needs it.
        anchor_device (`torch.device` or `str`, *optional*):
            Where the anchors are kept; with their parameters by default. `"cpu"` frees the memory of an accelerator,
            to which each step then copies them, one tensor at a time.

    Raises:
        `ValueError`: If an argument is out of range, or a parameter is not a dense floating-point tensor.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        weight: float,
        reduction: str = "tensor_mean",
        mode: str = "coupled",
        radius: float | None = None,
        anchor_device: torch.device | str | None = None,
    ):
        # accelerate's wrapper is an Optimizer too, but has no hooks of its own.
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise ValueError(f"`optimizer` must be a torch.optim.Optimizer, not {type(self.optimizer).__name__}.")
        if mode not in ("coupled", "proximal", "projected"):
            raise ValueError(f"`mode` must be one of coupled, proximal, projected, not {mode!r}.")
        if radius is None and mode == "projected":
            raise ValueError("mode 'projected' needs a `radius`, the largest distance from the anchors.")
        if radius is not None and _checked("radius", radius) == 0:
            raise ValueError("`radius` must be above 0.")
        reduction_factors([], reduction)  # an unknown one is refused here, not in the first step
        self.weight = _checked("weight", weight)
        self.reduction = reduction
        self.mode = mode
        self.radius = radius
        self.anchor_device = anchor_device
        self._steps = 0
        self._gradient_added = False
        self._anchors = {p: make_anchor(p, anchor_device) for p, _, _ in self._weighted_parameters()}
        self._fingerprint: str | None = None
        self._squared_norms: dict[Tensor, float] = {}
        self._handles = []
        if self._anchors:
            self._handles = [
                self.optimizer.register_step_pre_hook(self._before_step),
                self.optimizer.register_step_post_hook(self._after_step),
            ]

    def add_gradient(self) -> None:
        """
        Add the penalty's gradient now, and not in the next `optimizer.step()`, for `"coupled"` mode.

        Called before the gradients are clipped, it lets the norm count the penalty, as in the authors' code; without
        the call, the penalty is added after clipping, at its full size. Call it in every step or in none: once, after
        the last backward pass of the step, and with a `GradScaler` after `scaler.unscale_(optimizer)`.
        """
        if self.mode != "coupled":
            raise ValueError(f"`add_gradient` is for mode 'coupled'; mode {self.mode!r} acts after the step.")
        self._add_gradient()
        self._gradient_added = True

    def metrics(self) -> dict[str, float]:
        """
        Where the penalized parameters are now. Reads all of them and waits for the device: call it when you log.

        Returns:
            `dict[str, float]`: `lipschitz/penalty`, the term of the loss, ``sum_i weight_i * r_i * ||theta_i -
            anchor_i||^2`` (0 in `"projected"` mode, whose loss has no such term); `lipschitz/drift`, ``||theta -
            anchor||`` over all penalized parameters; `lipschitz/relative_drift`, the drift over ``||anchor||``. Where
            nothing is penalized, the penalty is 0 and the drifts are NaN.
        """
        parameters, anchors, coefficients, _ = self._penalized()
        if not parameters:
            return {"lipschitz/penalty": 0.0, "lipschitz/drift": math.nan, "lipschitz/relative_drift": math.nan}
        squares = _to_floats(squared_distances(parameters, anchors))
        drift = math.sqrt(sum(squares))
        if drift > 0 and self._steps == 0:
            warnings.warn(
                "The parameters have moved, but the penalty has acted in no step: this loop does not call step() of "
                "the optimizer that LipschitzRegularizer was given (DeepSpeed and optimizers that are fused into the "
                "backward pass do not), or weights were loaded after the anchors were taken.",
                stacklevel=2,
            )
        if not self._squared_norms:
            anchored = list(self._anchors.values())
            origins = [torch.zeros((), device=anchor.device).expand_as(anchor) for anchor in anchored]
            squared_norms = squared_distances(anchored, origins)
            self._squared_norms = dict(zip(self._anchors, _to_floats(squared_norms), strict=True))
        norm = math.sqrt(sum(self._squared_norms[parameter] for parameter in parameters))
        penalty = sum(c * square for c, square in zip(coefficients, squares, strict=True))
        return {
            "lipschitz/penalty": 0.0 if self.mode == "projected" else penalty,
            "lipschitz/drift": drift,
            "lipschitz/relative_drift": drift / norm if norm else math.nan,
        }

    def state_dict(self) -> dict[str, Any]:
        """The configuration, the number of steps taken, and a fingerprint of the anchors, which are not in it."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self._anchors.values())
        return {
            "weight": self.weight,
            "reduction": self.reduction,
            "mode": self.mode,
            "radius": self.radius,
            "steps": self._steps,
            "anchors": self._fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Restore what `state_dict` returned. (A `lipschitz_weight` of a param group is in the state of the optimizer.)

        Raises:
            `ValueError`: If the state was saved with other anchors, that is, in training from another base model.
        """
        if state_dict["anchors"] != self.state_dict()["anchors"]:
            raise ValueError(
                "The checkpoint was trained from another base model, or other parameters were penalized: its anchors "
                "are not those of this LipschitzRegularizer. Load the base model that the checkpoint began with, then "
                "build the regularizer, then load the checkpoint."
            )
        self.weight = state_dict["weight"]
        self.reduction = state_dict["reduction"]
        self.mode = state_dict["mode"]
        self.radius = state_dict["radius"]
        self._steps = state_dict["steps"]

    def remove(self) -> None:
        """Detach from the optimizer and free the anchors."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._anchors = {}

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._steps += 1
        if self.mode != "coupled":
            return
        if any(closure is not None for closure in (*args[1:2], kwargs.get("closure"))):
            raise ValueError(
                "mode 'coupled' cannot reach gradients that a closure computes inside step(): call step() without a "
                "closure, after the backward pass, or use mode 'proximal'."
            )
        if not self._gradient_added:
            # Fused optimizers get the gradients of a GradScaler still multiplied by this.
            self._add_gradient(getattr(optimizer, "grad_scale", None))
        self._gradient_added = False

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self.mode == "projected":
            parameters, anchors, _, _ = self._penalized()
            project_(parameters, anchors, self.radius)
        elif self.mode == "proximal":
            parameters, anchors, coefficients, rates = self._penalized(with_gradient=True)
            # Fused optimizers are stepped on overflow too, and leave the parameters as they were when this is 1.
            found_inf = getattr(optimizer, "found_inf", None)
            taken = 1.0 if found_inf is None else 1.0 - found_inf
            steps = [rate * taken * c for rate, c in zip(rates, coefficients, strict=True)]
            proximal_step_(parameters, anchors, steps)

    def _add_gradient(self, scale: Tensor | None = None) -> None:
        parameters, anchors, coefficients, _ = self._penalized(with_gradient=True)
        gradients = [parameter.grad for parameter in parameters]
        if any(gradient.layout != torch.strided for gradient in gradients):
            raise ValueError(
                "mode 'coupled' cannot add to sparse gradients: build the embedding with sparse=False, use mode "
                "'proximal', or set `lipschitz_weight` to 0 in its param group."
            )
        if scale is not None:
            coefficients = [c * scale for c in coefficients]
        add_penalty_gradient_(gradients, parameters, anchors, coefficients)

    def _weighted_parameters(self) -> list[tuple[Tensor, float, Any]]:
        """Each parameter of a group with a weight above 0, once, with weight and learning rate of the group."""
        rows = {}
        for index, group in enumerate(self.optimizer.param_groups):
            weight = _checked(f"lipschitz_weight of param group {index}", group.get("lipschitz_weight", self.weight))
            if weight > 0:
                rows |= {parameter: (parameter, weight, group.get("lr")) for parameter in group["params"]}
        return list(rows.values())

    def _penalized(self, with_gradient: bool = False) -> tuple[list[Tensor], list[Tensor], list[float], list[Any]]:
        """Parameters, anchors, coefficients ``weight * r_i`` and learning rates, as the param groups say now."""
        weighted = self._weighted_parameters()
        factors = reduction_factors([parameter.numel() for parameter, _, _ in weighted], self.reduction)
        parameters, anchors, coefficients, rates = [], [], [], []
        for (parameter, weight, rate), factor in zip(weighted, factors, strict=True):
            if parameter not in self._anchors:
                raise ValueError(
                    "A param group with a weight above 0 has a parameter without an anchor: it came into the "
                    "optimizer, or its group got the weight, after LipschitzRegularizer was built, or after remove(). "
                    "Build it when the param groups are complete and have their weights."
                )
            if with_gradient and parameter.grad is None:
                continue
            if self.anchor_device is None and self._anchors[parameter].device != parameter.device:
                self._anchors[parameter] = self._anchors[parameter].to(parameter.device)  # follows a model.to(device)
            parameters.append(parameter)
            anchors.append(self._anchors[parameter])
            coefficients.append(weight * factor)
            rates.append(rate)
        return parameters, anchors, coefficients, rates


def _checked(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"`{name}` must be a finite number and at least 0, not {value}.")
    return float(value)


def _to_floats(scalars: list[Tensor]) -> list[float]:
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).tolist()
