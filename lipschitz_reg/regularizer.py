# LipschitzRegularizer: holds the anchors, and hooks that make an optimizer's step carry the penalty.
# Holds no arithmetic (functional.py) and knows no model, loss or training loop.
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from .anchors import fingerprint, make_anchor
from .functional import add_penalty_gradient_, project_, proximal_step_, reduction_factors, squared_distances


MODES = ("coupled", "proximal", "projected")
REDUCTIONS = ("sum", "tensor_mean", "mean")


class LipschitzRegularizer:
    """
    Keeps the parameters of an optimizer close to what they are now: ``weight * sum_i r_i * ||theta_i - anchor_i||^2`` joins the
    loss ("Preserve and Personalize", arXiv 2505.19519, Algorithm 1), at each `optimizer.step()`, whoever calls it.

    Build it before a checkpoint is loaded, so that the anchors are the pretrained weights, and after anything that replaces the
    optimizer's parameters (FSDP). A param group may carry a `lipschitz_weight` of its own, as it may carry its own `lr`; 0
    leaves the group alone. Learning rates and weights are read anew at each step. A parameter that has no gradient at a step is
    moved neither by the optimizer nor by the penalty, except into the ball of `"projected"`.

    Args:
        optimizer (`torch.optim.Optimizer`):
            The optimizer, or accelerate's wrapper of it.
        weight (`float`):
            lambda of the paper, at least 0. If it is 0 in all groups, nothing is attached, and training is bit-identical to
            training without. In `"projected"` mode it only says which groups take part (those above 0).
        reduction (`str`, *optional*, defaults to `"tensor_mean"`):
            r_i: 1 (`"sum"`, the paper's formula), one over the elements of tensor i (`"tensor_mean"`, what the authors' code
            computes and what their lambdas mean) or one over the elements of all penalized tensors (`"mean"`).
        mode (`str`, *optional*, defaults to `"coupled"`):
            `"coupled"` adds the gradient, 2 * weight * r_i * (theta_i - anchor_i), before the optimizer reads it: the paper's
            loss. `"proximal"` moves each parameter, after the step, to (theta + 2 c anchor) / (1 + 2 c) with
            c = lr * weight * r_i: it never overshoots and is not rescaled by Adam. `"projected"` moves them back, after the
            step, to a distance of at most `radius` from the anchors.
        radius (`float`, *optional*):
            For `"projected"`, which needs it: the largest distance, above 0, of all penalized parameters together.
        anchor_device (`torch.device` or `str`, *optional*):
            Where the anchors are kept: with each parameter by default. `"cpu"` frees the accelerator's memory, and each step
            copies them over, one tensor at a time.

    Raises:
        `ValueError`: If an argument is out of range, or the optimizer is none that takes step hooks.
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
            raise ValueError(
                f"LipschitzRegularizer needs a torch.optim.Optimizer, not {type(self.optimizer).__name__}: it acts through step hooks."
            )
        if mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)}, not {mode!r}.")
        if reduction not in REDUCTIONS:
            raise ValueError(f"`reduction` must be one of {', '.join(REDUCTIONS)}, not {reduction!r}.")
        if radius is None and mode == "projected":
            raise ValueError("`radius` is missing: mode 'projected' needs the largest distance from the anchors.")
        if radius is not None and _non_negative("radius", radius) == 0:
            raise ValueError("`radius` must be above 0.")
        self.weight = _non_negative("weight", weight)
        self.reduction, self.mode, self.radius = reduction, mode, radius
        self._steps = 0  # optimizer steps that carried the penalty
        self._gradient_added = False
        self._fingerprint: str | None = None
        self._anchors: dict[Tensor, Tensor] = {}
        for parameter, _, _ in self._weighted_parameters():
            if not parameter.is_floating_point() or parameter.layout != torch.strided or hasattr(parameter, "to_local"):
                raise ValueError(
                    "LipschitzRegularizer penalizes dense floating-point parameters that are not sharded, not "
                    f"{parameter.dtype} {type(parameter).__name__}: set `lipschitz_weight` to 0 in its param group."
                )
            self._anchors[parameter] = make_anchor(parameter, anchor_device)
        self._handles = []
        if self._anchors:
            self._handles = [
                self.optimizer.register_step_pre_hook(self._before_step),
                self.optimizer.register_step_post_hook(self._after_step),
            ]

    def add_gradient(self) -> None:
        """
        Add the penalty's gradient now instead of at the next `optimizer.step()`, so that clipping by norm sees it, as it does in
        the authors' code. For `"coupled"` mode; call it once per step, at every step, after the last backward pass, and with a
        `GradScaler` after `scaler.unscale_(optimizer)`.
        """
        if self.mode != "coupled":
            raise ValueError(f"`add_gradient` is for mode 'coupled': mode {self.mode!r} adds no gradient.")
        self._add_gradient()
        self._gradient_added = True

    def metrics(self) -> dict[str, float]:
        """
        Where the penalized parameters are now. Reads them once, and waits for the device: call it as often as you log.

        Returns:
            `dict[str, float]`: `lipschitz/penalty`, the term of the loss, ``sum_i weight_i * r_i * ||theta_i - anchor_i||^2`` (0 in
            `"projected"` mode, which has none); `lipschitz/drift`, ``||theta - anchor||`` over all penalized parameters; and
            `lipschitz/relative_drift`, the drift over ``||anchor||``. Without penalized parameters the drifts are NaN.
        """
        parameters, anchors, coefficients, _ = self._penalized()
        if not parameters:
            return {"lipschitz/penalty": 0.0, "lipschitz/drift": math.nan, "lipschitz/relative_drift": math.nan}
        squares = _to_floats(squared_distances(parameters, anchors))
        drift = math.sqrt(sum(squares))
        if drift > 0 and self._steps == 0:
            warnings.warn(
                "The parameters have moved, but no optimizer.step() has carried the penalty: this training loop does not call "
                "step() of the optimizer that LipschitzRegularizer was given (a backward pass with a fused optimizer does not), "
                "or weights were loaded after the anchors were taken.",
                stacklevel=2,
            )
        scale = math.sqrt(sum(_to_floats([torch.linalg.vector_norm(a, dtype=torch.float32).square() for a in anchors])))
        penalty = sum(c * square for c, square in zip(coefficients, squares, strict=True))
        return {
            "lipschitz/penalty": penalty if self.mode != "projected" else 0.0,
            "lipschitz/drift": drift,
            "lipschitz/relative_drift": drift / scale if scale else math.nan,
        }

    def state_dict(self) -> dict[str, Any]:
        """The configuration, the number of steps, and a fingerprint of the anchors (not the anchors: they are the base model)."""
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
        Restore what `state_dict` gave. The weights of param groups are part of the optimizer's own state.

        Raises:
            `ValueError`: If the state was saved with other anchors, that is, with another base model.
        """
        if state_dict["anchors"] != self.state_dict()["anchors"]:
            raise ValueError(
                "This checkpoint was trained from another base model, or with other parameters penalized: its anchors are not "
                "the ones here. Resume from the base model that it began with, and build the regularizer before loading."
            )
        self.weight, self.reduction = state_dict["weight"], state_dict["reduction"]
        self.mode, self.radius = state_dict["mode"], state_dict["radius"]
        self._steps = state_dict["steps"]

    def remove(self) -> None:
        """Detach from the optimizer and free the anchors. What the penalty did to the parameters stays."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._anchors = [], {}

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._steps += 1
        if self.mode != "coupled":
            return
        if any(argument is not None for argument in (*args[1:], *kwargs.values())):
            raise ValueError(
                "Mode 'coupled' cannot add to gradients that a closure computes inside step(): call step() without a closure, "
                "or use mode 'proximal'."
            )
        if self._gradient_added:
            self._gradient_added = False
        else:
            # A fused optimizer under a GradScaler gets its gradients still scaled, with the scale in this attribute.
            self._add_gradient(getattr(optimizer, "grad_scale", None))

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self.mode == "coupled":
            return
        parameters, anchors, coefficients, rates = self._penalized(with_gradient=self.mode == "proximal")
        if self.mode == "projected":
            project_(parameters, anchors, self.radius)
            return
        # A fused optimizer under a GradScaler is stepped on overflow too, and leaves the parameters as they were.
        found_inf = getattr(optimizer, "found_inf", None)
        applied = 1.0 if found_inf is None else 1 - found_inf
        proximal_step_(
            parameters, anchors, [rate * c * applied for rate, c in zip(rates, coefficients, strict=True)]
        )

    def _add_gradient(self, scale: Tensor | None = None) -> None:
        parameters, anchors, coefficients, _ = self._penalized(with_gradient=True)
        if any(parameter.grad.layout != torch.strided for parameter in parameters):
            raise ValueError(
                "Mode 'coupled' cannot add a dense penalty to sparse gradients: build the embedding with sparse=False, use mode "
                "'proximal', or set `lipschitz_weight` to 0 in its param group."
            )
        if scale is not None:
            coefficients = [c * scale for c in coefficients]
        add_penalty_gradient_([parameter.grad for parameter in parameters], parameters, anchors, coefficients)

    def _weighted_parameters(self) -> list[tuple[Tensor, float, Any]]:
        """Each parameter whose group has a weight, once, with that weight and the group's learning rate."""
        found = {}
        for index, group in enumerate(self.optimizer.param_groups):
            weight = _non_negative(
                f"lipschitz_weight of param group {index}", group.get("lipschitz_weight", self.weight)
            )
            if weight > 0:
                found |= {parameter: (parameter, weight, group.get("lr")) for parameter in group["params"]}
        return list(found.values())

    def _penalized(self, with_gradient: bool = False) -> tuple[list[Tensor], list[Tensor], list[float], list[Any]]:
        """Parameters, anchors, coefficients weight * r_i and learning rates, as the param groups are at this moment."""
        entries = self._weighted_parameters()
        if any(parameter not in self._anchors for parameter, _, _ in entries):
            raise ValueError(
                "A param group with a `lipschitz_weight` above 0 has parameters without anchors: they joined the optimizer, or got "
                "their weight, after LipschitzRegularizer was built, or it was removed. Build it when the groups are complete."
            )
        factors = reduction_factors([parameter.numel() for parameter, _, _ in entries], self.reduction)
        rows = [
            (parameter, self._anchors[parameter], weight * factor, rate)
            for (parameter, weight, rate), factor in zip(entries, factors, strict=True)
            if parameter.grad is not None or not with_gradient
        ]
        return tuple(map(list, zip(*rows, strict=True))) if rows else ([], [], [], [])


def _non_negative(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"`{name}` must be a finite number and at least 0, not {value}.")
    return float(value)


def _to_floats(scalars: list[Tensor]) -> list[float]:
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).tolist()
