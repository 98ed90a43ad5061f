"""
LipschitzRegularizer: the hooks through which an optimizer's step carries the penalty, its metrics and its state. Holds
no arithmetic and knows no loss or loop. What is penalized is in groups.py and terms.py, how it acts in modes.py.
"""

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .anchors import fingerprint
from .engines import ddp_groups, engine_of, unwrapped
from .functional import reductions
from .groups import Terms, by_space
from .lora import LoraAdapter
from .modes import MODES, Row
from .recording import Recording
from .replay import Replay
from .terms import Anchor, LoraTerm, Term, checked, pull, squares, to_floats


class _Defaults(dict):
    """
    The defaults of an optimizer. torch copies and pickles them with the optimizer, unlike hooks, so they carry the
    regularizer along. It is an attribute, not an item: items are copied into added param groups, and so into
    checkpoints.
    """

    regularizer: "LipschitzRegularizer"


class LipschitzRegularizer:
    """
    Keeps a model near its base: ``weight * sum_i r_i * ||theta_i - anchor_i||^2`` is added to the loss at each
    `optimizer.step()`, whoever calls it ("Preserve and Personalize", arXiv 2505.19519, Algorithm 1). The anchors are
    the present values of the parameters.

    Nearness can be measured in three spaces. Use one or several, each with a weight of its own:

    - `"parameters"`: their distance, as above.
    - `"layers"`: how much a displacement changes the outputs of its layer, on recorded inputs (recording.py).
    - `"predictions"`: ``weight * mean (f_theta - f_base)^2`` on recorded calls of the denoiser, `replays` of which
      each step repeats (replay.py).

    Build it while the parameters are the pretrained ones, that is, before a checkpoint is loaded, and after whatever
    replaces the parameters of the optimizer (FSDP2, DeepSpeed), in all processes. A param group may carry its own
    `lipschitz_weight`, as it may carry its own `lr`; 0 leaves the group alone. Both are read anew at each step. A
    parameter without a gradient is moved at that step neither by the optimizer nor by the penalty; only `"projected"`
    mode moves it.

    Args:
        optimizer (`torch.optim.Optimizer`):
            The optimizer, or the wrapper that accelerate or DeepSpeed made of it.
        weight (`float` or `Mapping[str, float]`):
            The paper's lambda, at least 0: a number in the space of parameters, or one for each space, such as
            `{"layers": 4.0, "predictions": 3.0}`. If no group has a weight above 0, nothing is attached, and training
            is bit-identical to training without. In `"projected"` mode, a weight above 0 in the space of parameters
            only says that a group takes part.
        reduction (`str`, *optional*, defaults to `"tensor_mean"`):
            The paper's r_i. `"sum"`: 1, the paper's formula. `"tensor_mean"`: one over the elements of the tensor,
            which is what the authors' code computes and what their lambdas mean. `"mean"`: one over the elements of
            all penalized tensors.
        mode (`str`, *optional*, defaults to `"coupled"`):
            How nearness of parameters acts. `"coupled"` adds the gradient, ``2 * weight * r_i * (theta_i -
            anchor_i)``, before the optimizer reads it: the paper's loss. `"proximal"` moves each parameter after the
            step to ``(theta + 2 c anchor) / (1 + 2 c)`` with ``c = lr * weight * r_i``: it cannot overshoot, and Adam
            does not rescale it. `"projected"` moves all parameters after the step to a distance of at most `radius`
            from the anchors. Layers and predictions are always coupled.
        radius (`float`, *optional*):
            The largest distance, over all penalized parameters together, above 0. `"projected"` mode needs it.
        anchor_device (`torch.device` or `str`, *optional*):
            Where the anchors are kept; with their parameters by default. `"cpu"` frees the memory of an accelerator,
            to which each step then copies them, one tensor at a time.
        anchors (`Mapping[torch.Tensor, torch.Tensor]`, *optional*):
            Anchors for parameters, and for weights that adapters act on, where these are not the present values: for a
            model that was fine-tuned before and should stay near the one that it began as. They are whole, also where
            the parameters are sharded, and are copied; an `Anchor` (terms.py) is used as it is.
        adapters (`Sequence[LoraAdapter]`, *optional*):
            The LoRA adapters of the model, from `find_lora_adapters`. Their factors are penalized as `lora_form` says;
            every other parameter, such as the magnitudes of DoRA, has its anchor as always.
        lora_form (`str`, *optional*, defaults to `"delta"`):
            `"delta"` penalizes what acts on the model, ``||s B A||^2``, with the elements of that product in r_i, and
            keeps no anchor. It has no `"proximal"` mode, which has no closed form there. `"factors"` penalizes
            ``||A||^2 + ||B||^2``, as the authors' code does.
        recording (`Recording`, *optional*):
            The base's, from `record`. The spaces of layers and predictions need it.
        replays (`int`, *optional*, defaults to 1):
            How many recorded calls each step repeats in the space of predictions. Each row of a batch counts as one.
        parameters (`Collection[torch.Tensor]`, *optional*):
            What to penalize of the optimizer's parameters; all of them by default. The others need no anchors.

    A copy of the optimizer, by `copy.deepcopy` or `pickle`, has a copy of the regularizer attached, anchors and all.

    Raises:
        `ValueError`: If an argument is out of range, if a parameter is not a dense floating-point tensor, or if the
            optimizer has a LipschitzRegularizer already.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        weight: float | Mapping[str, float],
        reduction: str = "tensor_mean",
        mode: str = "coupled",
        radius: float | None = None,
        anchor_device: torch.device | str | None = None,
        anchors: Mapping[Tensor, Tensor | Anchor] | None = None,
        adapters: Sequence[LoraAdapter] = (),
        lora_form: str = "delta",
        recording: Recording | None = None,
        replays: int = 1,
        parameters: Collection[Tensor] | None = None,
    ):
        # accelerate's wrapper is an Optimizer too, but has no hooks of its own.
        self.optimizer = unwrapped(optimizer)
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise ValueError(f"`optimizer` must be a torch.optim.Optimizer, not {type(self.optimizer).__name__}.")
        hooks = getattr(self.optimizer, "_optimizer_step_pre_hooks", {}).values()
        if any(isinstance(getattr(hook, "__self__", None), LipschitzRegularizer) for hook in hooks):
            raise ValueError(
                "This optimizer has a LipschitzRegularizer already, and the penalties of two would add up: call "
                "remove() on the first, or build the model and the optimizer anew."
            )
        if mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)}, not {mode!r}.")
        if radius is not None and checked("radius", radius) == 0:
            raise ValueError("`radius` must be above 0.")
        reductions([], reduction)  # an unknown one is refused here, not in the first step
        if lora_form not in ("delta", "factors"):
            raise ValueError(f"`lora_form` must be one of delta, factors, not {lora_form!r}.")
        self.reduction = reduction
        self.mode = mode
        self.recording = recording
        self._mode = MODES[mode](radius)
        options = (anchor_device, anchors or {}, adapters, lora_form, recording, parameters)
        self._engine = engine_of(self.optimizer)
        self._terms = Terms(self._engine, weight, self._mode, *options)
        self._replay = Replay(recording, replays) if "predictions" in self.spaces else None
        self._steps = 0
        self._gradient_added = False
        self._checked_processes = False
        # The terms of the loss in the last step: of weights, and of replays.
        self._values: list[Tensor] | None = None
        self._replayed: list[Tensor] = []
        self._fingerprint: str | None = None
        # With anchors of their own, or adapters that were loaded, the parameters may be away before the first step.
        self._distance_at_start = self._terms.distance() if anchors or adapters else 0.0
        self._handles = []
        if self._terms.is_shared or adapters:
            # While all processes are here, and before adapters are merged for a while, which rounds the weights, or
            # bitsandbytes packs codes in another way (on CPUs, in eval mode).
            self._anchors_fingerprint()
        if self.spaces:
            self._attach()
            self.optimizer.defaults = _Defaults(self.optimizer.defaults)
            self.optimizer.defaults.regularizer = self

    @property
    def weight(self) -> dict[str, float]:
        """The weight in each space, for the param groups that have none of their own. It can be set."""
        return self._terms.weight

    @weight.setter
    def weight(self, weight: float | Mapping[str, float]) -> None:
        self._terms.weight = by_space("weight", weight)

    @property
    def spaces(self) -> list[str]:
        """The spaces that were in use when this was built."""
        return self._terms.spaces

    @property
    def radius(self) -> float | None:
        """Of `"projected"` mode."""
        return self._mode.radius

    def add_gradient(self) -> None:
        """
        Add the penalty's gradient now instead of in the next `optimizer.step()`, for `"coupled"` mode.

        Called before the gradients are clipped, it lets the norm count the penalty, as in the authors' code; without
        the call, the penalty is added after clipping, at its full size. Call it in every step or in none: once, after
        the last backward pass of the step, and with a `GradScaler` after `scaler.unscale_(optimizer)`.
        """
        if self._engine.is_deepspeed:
            raise ValueError("`add_gradient` does not work with DeepSpeed, which clips in its own step.")
        if not self._uses_gradients():
            raise ValueError(f"`add_gradient` is for mode 'coupled'; mode {self.mode!r} acts after the step.")
        self._add_gradient(self._steps + 1)
        self._gradient_added = True

    def metrics(self, per_adapter: bool = False) -> dict[str, float]:
        """
        Where the model is now. Reads all penalized parameters and waits for the device: call it when you log. Where
        processes share parameters, all have to call it, and get the same numbers.

        Args:
            per_adapter (`bool`, *optional*, defaults to `False`):
                Whether to add `lipschitz/distance/<name>`, ``||s B A||``, for each LoRA adapter.

        Returns:
            `dict[str, float]`: `lipschitz/penalty`, as from `penalty`; `lipschitz/distance`, ``||theta - anchor||``
            over all penalized parameters, whatever the space, where an adapter counts as the weight that it acts on,
            in either `lora_form`; `lipschitz/relative_distance`, the distance over ``||anchor||``. Where nothing is
            penalized, the penalty is 0 and the distances are NaN, and so is the relative distance where an adapter's
            weight is not known.
        """
        terms = self._terms.measured()
        names = ("lipschitz/penalty", "lipschitz/distance", "lipschitz/relative_distance")
        if not terms:
            return dict(zip(names, (0.0, math.nan, math.nan), strict=True))
        of_terms = to_floats(squares(terms))
        distance = math.sqrt(sum(of_terms))
        if self._steps == 0 and not math.isclose(distance, self._distance_at_start, rel_tol=1e-4):
            warnings.warn(
                "The parameters have moved, but the penalty has acted in no step: this loop does not call step() of "
                "the optimizer that LipschitzRegularizer was given (those that are fused into the backward pass do "
                "not), or weights were loaded after the anchors were taken.",
                stacklevel=2,
            )
        norm = self._terms.anchor_norm(terms)
        metrics = dict(zip(names, (self.penalty(), distance, distance / norm if norm else math.nan), strict=True))
        if per_adapter:
            for term, square in zip(terms, of_terms, strict=True):
                if isinstance(term, LoraTerm):
                    metrics[f"lipschitz/distance/{term.adapter.name}"] = math.sqrt(square)
        return metrics

    def penalty(self) -> float:
        """
        What the penalty added to the loss in the last `optimizer.step()`, summed over the spaces, as computed there.
        Waits for the device, but reads no parameter. Before the first step it is computed here, without predictions.
        In `"projected"` mode the loss has no term for parameters.
        """
        return float(self.penalty_tensor())

    def penalty_tensor(self) -> Tensor:
        """`penalty` as a tensor of no dimensions, without waiting for the device: to log many steps in one go."""
        values = self._mode.values(self._rows()) if self._values is None else self._values + self._replayed
        if not values:
            return torch.zeros(())
        return torch.stack([value.to(values[0].device, non_blocking=True) for value in values]).sum()

    def state_dict(self) -> dict[str, Any]:
        """
        The configuration, the number of steps taken, and fingerprints of the anchors and of the recording, but not
        these themselves.
        """
        return {
            "weight": self.weight,
            "reduction": self.reduction,
            "mode": self.mode,
            "radius": self.radius,
            "steps": self._steps,
            "anchors": self._anchors_fingerprint(),
            "recording": self._recorded(),
            "replays": self._replay.count if self._replay else None,
            "loss_scale": self._replay.loss_scale if self._replay else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Restore what `state_dict` returned. (A `lipschitz_weight` of a param group is in the state of the optimizer.)

        Raises:
            `ValueError`: If the state was saved with other anchors, that is, in training from another base model, or
                with another recording, or in a space that is not in use here.
        """
        if state_dict["anchors"] != self.state_dict()["anchors"]:
            raise ValueError(
                "The checkpoint was trained from another base model, or other parameters were penalized: its anchors "
                "are not those of this LipschitzRegularizer. Load the base model that the checkpoint began with, then "
                "build the regularizer, then load the checkpoint."
            )
        if state_dict["recording"] != self._recorded():
            how = "another recording" if state_dict["recording"] and self._recorded() else "no recording"
            how = "a recording" if state_dict["recording"] and not self._recorded() else how
            raise ValueError(f"The checkpoint was trained with {how}: use the same spaces and recording.")
        missing = [space for space, weight in state_dict["weight"].items() if weight > 0 and space not in self.spaces]
        if missing:
            raise ValueError(f"The checkpoint was trained in the space of {missing[0]}: give it a weight.")
        self.weight = state_dict["weight"]
        self.reduction = state_dict["reduction"]
        self.mode = state_dict["mode"]
        self._mode = MODES[self.mode](state_dict["radius"])
        self._steps = state_dict["steps"]
        if self._replay and state_dict["replays"]:
            self._replay.count, self._replay.loss_scale = state_dict["replays"], state_dict["loss_scale"]

    def remove(self) -> None:
        """Detach from the optimizer and free the anchors. The optimizer may get another regularizer then."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._replay:
            self._replay.remove()
        if getattr(self.optimizer.defaults, "regularizer", None) is self:
            self.optimizer.defaults = dict(self.optimizer.defaults)
        self._terms.clear()
        self._replay, self.recording, self._values, self._replayed = None, None, None, []

    @property
    def steps(self) -> int:
        """How many steps have carried the penalty."""
        return self._steps

    def pull(self, fraction: float) -> None:
        """Move everything that is penalized this fraction of the way back to the base, or away from it if below 0."""
        if self._engine.is_deepspeed:
            raise ValueError("`pull` does not work with DeepSpeed, which keeps a second copy of the parameters.")
        pull(self._terms.all, [fraction] * len(self._terms.all), measured=False)

    def check_processes(self) -> None:
        """
        Raise a ValueError if the anchors are not the same in all processes of DDP, which makes parameters equal when
        it wraps them. The first step does this; all processes have to call it.
        """
        self._checked_processes = True
        parameters = [p for param_group in self.optimizer.param_groups for p in param_group["params"]]
        for group, own in ddp_groups(parameters).items():
            terms, wanted = self._all_terms(), set(own)
            inside = [term for term in terms if not wanted.isdisjoint(term.tensors())]
            digest = self._anchors_fingerprint() if inside == terms else _fingerprint_of(inside)
            number = int(digest[:15], 16)
            ends = torch.tensor([number, -number], device=own[0].device)
            torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX, group)
            if ends[0] != -ends[1]:  # the largest and the smallest
                raise ValueError(
                    "The processes have different anchors: each built the model with its own random weights, before "
                    "DDP copied those of rank 0. Set the same seed in all processes before the model is built, or "
                    "build the regularizer after DDP."
                )

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

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not self._checked_processes:
            self.check_processes()
        if self._engine.part() == 0:
            self._steps += 1
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if self._uses_gradients():
            if closure is not None:
                closure = self._penalized(closure)
                by_name = (args, {**kwargs, "closure": closure})
                return ((args[0], closure, *args[2:]), kwargs) if len(args) > 1 else by_name
            if not self._gradient_added:
                # Fused optimizers get the gradients of a GradScaler still multiplied by this.
                self._add_gradient(self._steps, getattr(optimizer, "grad_scale", None))
        self._gradient_added = False
        return None

    def _penalized(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure with the penalty: each time, its gradient is added to those that the closure computes."""

        def penalized() -> Any:
            loss = closure()
            self._add_gradient(self._steps)
            terms = (self._values if self._mode.uses_gradients else []) + self._replayed
            return loss if loss is None else loss + sum(terms)  # what LBFGS searches along a line

        return penalized

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        # Fused optimizers are stepped on overflow too, and leave the parameters as they were when this is 1.
        found_inf = getattr(optimizer, "found_inf", None)
        taken = 1.0 if found_inf is None else 1.0 - found_inf
        if not self._mode.uses_gradients:
            self._set_values(self._mode.after_step(self._stepped_rows(), taken))

    def _add_gradient(self, step: int, scale: Tensor | None = None) -> None:
        scale = 1.0 if scale is None else scale
        if self._mode.uses_gradients:
            self._set_values(self._mode.before_step(self._stepped_rows(), scale))
        if self._replay and self._engine.part() == 0:
            self._replayed = []
            weights = {p: weight for p, weight in self._terms.weights("predictions").items() if weight > 0}
            if len(set(weights.values())) > 1:
                raise ValueError("In the space of predictions all param groups need one weight, or 0.")
            with self._engine.whole_gradients(list(weights)) as parameters:
                if parameters:
                    averages = not self._engine.is_deepspeed
                    replayed = self._replay.add_gradient(weights[parameters[0]], parameters, scale, step, averages)
                    self._replayed = [replayed]
        self._engine.add_kept_gradients()

    def _anchors_fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = _fingerprint_of(self._all_terms())
        return self._fingerprint

    def _all_terms(self) -> list[Term]:
        # The second is what lora_form "factors" adds.
        return list(dict.fromkeys([*self._terms.all, *self._terms.in_space.get("parameters", [])]))

    def _uses_gradients(self) -> bool:
        return self._mode.uses_gradients or self._replay is not None

    def _rows(self) -> list[Row]:
        return self._terms.rows(self.reduction)

    def _stepped_rows(self) -> list[Row]:
        """Those of the part of the step that is being taken."""
        rows, part = self._rows(), self._engine.part()
        return [row for row in rows if row.term.part == part] if self._engine.parts > 1 else rows

    def _set_values(self, values: list[Tensor]) -> None:
        earlier = self._values if self._engine.part() > 0 else None
        self._values = [*(earlier or []), *values]

    def _recorded(self) -> str | None:
        return self.recording.digest() if self.recording is not None and self.spaces else None


def _fingerprint_of(terms: Sequence[Term]) -> str:
    return fingerprint(anchor for term in terms for anchor in term.anchors())
