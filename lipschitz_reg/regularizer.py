# LipschitzRegularizer: the hooks through which an optimizer's step carries the penalty, its metrics and its state.
# Holds no arithmetic (functional.py, lora.py), chooses no parameters (targets.py), knows no model, loss or loop.
import math
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .functional import (
    InputMoment,
    add_penalty_gradient_,
    project_,
    proximal_step_,
    reduction_factors,
    squared_distances,
)
from .lora import LoraAdapter, add_lora_penalty_gradient_, squared_deltas
from .targets import Penalized, Targets, checked, to_floats, zeros_like


class _Defaults(dict):
    """
    The defaults of an optimizer. torch copies and pickles them with the optimizer, unlike hooks, so they carry the
    regularizer along. It is an attribute, not an item: items are copied into added param groups, and so into
    checkpoints.
    """

    regularizer: "LipschitzRegularizer"


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
        anchors (`Mapping[torch.Tensor, torch.Tensor]`, *optional*):
            The anchors of parameters, and of the weights that adapters act on, for which they are not the values of
            now: of a model that was fine-tuned before, to stay near that from which it began.
        adapters (`Sequence[LoraAdapter]`, *optional*):
            The LoRA adapters of the model, from `find_lora_adapters`. Their factors are penalized as `lora_form` says;
            every other parameter, such as the magnitudes of DoRA, has its anchor as always.
        lora_form (`str`, *optional*, defaults to `"delta"`):
            `"delta"` penalizes what acts on the model, ``||s B A||^2``, with the elements of that product in r_i, and
            keeps no anchor. It has no `"proximal"` mode, which has no closed form there. `"factors"` penalizes
            ``||A||^2 + ||B||^2``, as the authors' code does.
        inputs (`Mapping[torch.Tensor, InputMoment]`, *optional*):
            From `record_inputs`: a displacement counts by how much it changes what its layer gives for these inputs,
            not by its length (inputs.py), and another `weight` fits. For mode `"coupled"` and `lora_form` `"delta"`.

    A copy of the optimizer, by `copy.deepcopy` or `pickle`, has a copy of the regularizer attached, anchors and all.

    Raises:
        `ValueError`: If an argument is out of range, if a parameter is not a dense floating-point tensor, or if the
            optimizer has a LipschitzRegularizer already.
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
        anchors: Mapping[Tensor, Tensor] | None = None,
        adapters: Sequence[LoraAdapter] = (),
        lora_form: str = "delta",
        inputs: Mapping[Tensor, InputMoment] | None = None,
    ):
        # accelerate's wrapper is an Optimizer too, but has no hooks of its own.
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise ValueError(f"`optimizer` must be a torch.optim.Optimizer, not {type(self.optimizer).__name__}.")
        hooks = getattr(self.optimizer, "_optimizer_step_pre_hooks", {}).values()
        if any(isinstance(getattr(hook, "__self__", None), LipschitzRegularizer) for hook in hooks):
            raise ValueError(
                "This optimizer has a LipschitzRegularizer already, and the penalties of two would add up: call "
                "remove() on the first, or build the model and the optimizer anew."
            )
        if mode not in ("coupled", "proximal", "projected"):
            raise ValueError(f"`mode` must be one of coupled, proximal, projected, not {mode!r}.")
        if radius is None and mode == "projected":
            raise ValueError("mode 'projected' needs a `radius`, the largest distance from the anchors.")
        if radius is not None and checked("radius", radius) == 0:
            raise ValueError("`radius` must be above 0.")
        reduction_factors([], reduction)  # an unknown one is refused here, not in the first step
        if lora_form not in ("delta", "factors"):
            raise ValueError(f"`lora_form` must be one of delta, factors, not {lora_form!r}.")
        if adapters and lora_form == "delta" and mode == "proximal":
            raise ValueError(
                "mode 'proximal' has no closed form for the product of LoRA factors: use mode 'coupled' or "
                "'projected', or `lora_form` 'factors'."
            )
        if inputs is not None and (mode != "coupled" or lora_form != "delta"):
            raise ValueError("`inputs` need mode 'coupled' and `lora_form` 'delta'.")
        self.weight = checked("weight", weight)
        self.reduction = reduction
        self.mode = mode
        self.radius = radius
        self.anchor_device = anchor_device
        self.lora_form = lora_form
        self._steps = 0
        self._gradient_added = False
        self._targets = Targets(self.optimizer, self.weight, anchor_device, anchors or {}, adapters, lora_form, inputs)
        if mode == "projected" or lora_form == "factors":
            if any(adapter.offset is not None for adapter in self._targets.adapters):
                raise ValueError(
                    "LoRA on weights that are not their own anchors needs mode 'coupled' and `lora_form` 'delta'."
                )
        # With anchors of their own, or adapters that were loaded, the parameters are away before the first step.
        self._drift_at_start = self._drift(self._penalized())[0] if anchors or adapters else 0.0
        self._fingerprint: str | None = None
        self._handles = []
        if self._targets.weighted:
            self._attach()
            self.optimizer.defaults = _Defaults(self.optimizer.defaults)
            self.optimizer.defaults.regularizer = self

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

    def metrics(self, per_adapter: bool = False) -> dict[str, float]:
        """
        Where the penalized parameters are now. Reads all of them and waits for the device: call it when you log.

        Args:
            per_adapter (`bool`, *optional*, defaults to `False`):
                Whether `lipschitz/drift/<name>`, ``||s B A||``, comes too for each LoRA adapter.

        Returns:
            `dict[str, float]`: `lipschitz/penalty`, the term of the loss, ``sum_i weight_i * r_i * ||theta_i -
            anchor_i||^2``, or what `inputs` put in its place (0 in `"projected"` mode, whose loss has no such term);
            `lipschitz/drift`, ``||theta - anchor||`` over all penalized parameters, where an adapter counts as the
            weight that it acts on, in either `lora_form`; `lipschitz/relative_drift`, the drift over ``||anchor||``.
            Where nothing is penalized, the penalty is 0 and the drifts are NaN, and so is the relative drift where an
            adapter's weight is not known.
        """
        penalized = self._penalized()
        if not penalized.parameters and not penalized.adapters:
            return {"lipschitz/penalty": 0.0, "lipschitz/drift": math.nan, "lipschitz/relative_drift": math.nan}
        drift, squares = self._drift(penalized)
        if self._steps == 0 and not math.isclose(drift, self._drift_at_start, rel_tol=1e-4):
            warnings.warn(
                "The parameters have moved, but the penalty has acted in no step: this loop does not call step() of "
                "the optimizer that LipschitzRegularizer was given (DeepSpeed and optimizers that are fused into the "
                "backward pass do not), or weights were loaded after the anchors were taken.",
                stacklevel=2,
            )
        deltas = squares[len(penalized.parameters) :]
        norm = self._targets.norm(penalized)
        metrics = {
            "lipschitz/penalty": self._penalty(penalized, None if self._targets.inputs else squares),
            "lipschitz/drift": drift,
            "lipschitz/relative_drift": drift / norm if norm else math.nan,
        }
        if per_adapter:
            names = [f"lipschitz/drift/{adapter.name}" for adapter in penalized.adapters]
            metrics |= zip(names, map(math.sqrt, deltas), strict=True)
        return metrics

    def penalty(self) -> float:
        """`lipschitz/penalty` of `metrics` alone, which with `inputs` spares a pass over the parameters."""
        return self._penalty(self._penalized())

    def state_dict(self) -> dict[str, Any]:
        """The configuration, the number of steps taken, and a fingerprint of the anchors, which are not in it."""
        if self._fingerprint is None:
            self._fingerprint = self._targets.fingerprint()
        return {
            "weight": self.weight,
            "reduction": self.reduction,
            "mode": self.mode,
            "radius": self.radius,
            "steps": self._steps,
            "anchors": self._fingerprint,
            "inputs": bool(self._targets.inputs),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Restore what `state_dict` returned. (A `lipschitz_weight` of a param group is in the state of the optimizer.)

        Raises:
            `ValueError`: If the state was saved with other anchors, that is, in training from another base model, or
            with `inputs` where there are none, or the other way round.
        """
        if state_dict["anchors"] != self.state_dict()["anchors"]:
            raise ValueError(
                "The checkpoint was trained from another base model, or other parameters were penalized: its anchors "
                "are not those of this LipschitzRegularizer. Load the base model that the checkpoint began with, then "
                "build the regularizer, then load the checkpoint."
            )
        if state_dict.get("inputs", False) != bool(self._targets.inputs):
            saved, now = ("without", "leave out") if self._targets.inputs else ("with", "give")
            raise ValueError(f"The checkpoint was trained {saved} `inputs`: {now} `inputs`, then load it.")
        self.weight = state_dict["weight"]
        self.reduction = state_dict["reduction"]
        self.mode = state_dict["mode"]
        self.radius = state_dict["radius"]
        self._steps = state_dict["steps"]

    def remove(self) -> None:
        """Detach from the optimizer and free the anchors. The optimizer may get another regularizer then."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if getattr(self.optimizer.defaults, "regularizer", None) is self:
            self.optimizer.defaults = dict(self.optimizer.defaults)
        self._targets.anchors, self._targets.adapters, self._targets.factors = {}, [], set()
        self._targets.inputs = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handles": bool(self._handles)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _handles=[])
        if state["_handles"]:
            # The optimizer may not have its own state yet, and keeps the hooks that it finds when it gets it.
            for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
                vars(self.optimizer).setdefault(name, OrderedDict())
            self._attach()

    def _attach(self) -> None:
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]

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
            penalized = self._penalized()
            parameters, anchors, squares = penalized.parameters, penalized.anchors, None
            if penalized.adapters and self.lora_form == "delta":
                # The nearest product in the ball is the product made smaller, and one factor carries that.
                squares = squared_distances(parameters, anchors) + squared_deltas(penalized.adapters)
                ups = [adapter.up for adapter in penalized.adapters]
                parameters, anchors = parameters + ups, anchors + [zeros_like(up) for up in ups]
            project_(parameters, anchors, self.radius, squares)
        elif self.mode == "proximal":
            penalized = self._penalized(with_gradient=True)
            # Fused optimizers are stepped on overflow too, and leave the parameters as they were when this is 1.
            found_inf = getattr(optimizer, "found_inf", None)
            taken = 1.0 if found_inf is None else 1.0 - found_inf
            steps = [rate * taken * c for rate, c in zip(penalized.rates, penalized.coefficients, strict=True)]
            proximal_step_(penalized.parameters, penalized.anchors, steps)

    def _add_gradient(self, scale: Tensor | None = None) -> None:
        penalized = self._penalized(with_gradient=True)
        gradients = [parameter.grad for parameter in penalized.parameters]
        if any(gradient.layout != torch.strided for gradient in gradients):
            raise ValueError(
                "mode 'coupled' cannot add to sparse gradients: build the embedding with sparse=False, use mode "
                "'proximal', or set `lipschitz_weight` to 0 in its param group."
            )
        scale = 1.0 if scale is None else scale
        coefficients = [c * scale for c in penalized.coefficients]
        add_penalty_gradient_(gradients, penalized.parameters, penalized.anchors, coefficients, penalized.moments)
        if self.lora_form == "delta":
            pairs = [(adapter.down.grad, adapter.up.grad) for adapter in penalized.adapters]
            add_lora_penalty_gradient_(pairs, penalized.adapters, [c * scale for c in penalized.adapter_coefficients])

    def _penalized(self, with_gradient: bool = False) -> Penalized:
        return self._targets.penalized(self.weight, self.reduction, with_gradient)

    def _penalty(self, penalized: Penalized, squares: list[float] | None = None) -> float:
        if self.mode == "projected":
            return 0.0
        if squares is None:
            terms = squared_distances(penalized.parameters, penalized.anchors, penalized.moments)
            squares = to_floats(terms + squared_deltas(penalized.adapters))
        coefficients = penalized.coefficients + penalized.adapter_coefficients
        return sum(c * square for c, square in zip(coefficients, squares, strict=True))

    def _drift(self, penalized: Penalized) -> tuple[float, list[float]]:
        """The distance from the anchors, and the squares that it comes from: of parameters, then of adapters."""
        adapters = [replace(adapter, moment=None) for adapter in penalized.adapters]
        terms = squared_distances(penalized.parameters, penalized.anchors) + squared_deltas(adapters)
        squares = to_floats(terms)
        # A factor acts through its product only.
        own = zip(penalized.parameters, squares[: len(penalized.parameters)], strict=True)
        counted = [square for parameter, square in own if parameter not in self._targets.factors]
        return math.sqrt(sum(counted) + sum(squares[len(penalized.parameters) :])), squares
