"""
The space of predictions: ``weight * mean (f_theta - f_base)^2`` on recorded calls of the denoiser, a few of which
each step repeats. Holds no recording (recording.py) and no optimizer (regularizer.py).
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Autocast, Call, evaluating
from .engines import is_shared
from .lora import living_modules
from .recording import Recording


_WATCHED = 8  # how many of a model's parts are watched for the autocast


class Replay:
    """
    Replays `count` of the recorded calls in each step, drawn without replacement, the same in all processes.

    The gradient is added directly to those already there, so that it takes no memory of its own. The parameters' hooks
    (DDP's, or a fused backward's) do not see it, and no random number of the training is drawn.
    """

    def __init__(self, recording: Recording, count: int):
        if not [call for call in recording.calls if not call.held_out]:
            raise ValueError(
                "The recording holds no calls of the denoiser to replay: in the `with` block of `record` the model "
                "has to run, and not only in `held_out()`."
            )
        if count < 1:
            raise ValueError(f"`replays` must be at least 1, not {count}.")
        self.recording, self.count = recording, count
        self.loss_scale = 2.0**16  # where activations are float16, as a GradScaler begins
        self.autocast: Autocast | None = None
        self._replaying = False
        self._outside: list[nn.Module] | None = None
        self._watch()

    def add_gradient(
        self, weight: float, parameters: Sequence[Tensor], scale: Tensor | float, step: int, averages: bool = True
    ) -> Tensor:
        """
        Add the gradient of the term to those of the parameters.

        Args:
            averages: Whether several processes step each parameter, so that they need the same bits.
            scale: What the gradients are multiplied by.
            step: Its number, which decides the calls that are drawn.

        Returns:
            `torch.Tensor`: ``weight * mean (f_theta - f_base)^2`` over these calls.
        """
        model, value = self.recording.model, 0.0
        half, sharded = self._is_half(model), any(map(is_shared, parameters))
        if sharded and half:
            raise ValueError("The space of predictions does not work with float16 under FSDP2: use bfloat16.")
        loss_scale = self.loss_scale if half else 1.0
        factor = weight / loss_scale * scale
        overflow = []

        def to_gradient(gradient: Tensor) -> Tensor:
            if half:
                finite = gradient.isfinite()
                overflow.append(~finite.all())
                gradient = torch.where(finite, gradient, 0)
            return gradient * factor

        self._replaying = True
        try:
            whole = nn.ModuleList([model, *self._beside(model, parameters)])
            prepared = _Alone(whole, parameters) if sharded else _Standins(whole, parameters, to_gradient)
            with prepared, evaluating(whole), torch.enable_grad():
                for call in self._draw(step):
                    answer = call.again(model, self.autocast)
                    answer = answer.to(torch.promote_types(answer.dtype, torch.float32))
                    wanted = call.answer.to(answer, non_blocking=answer.is_cuda)
                    loss = (answer - wanted).square().mean() / self.count
                    if loss.requires_grad:
                        (loss * (factor if sharded else loss_scale)).backward()
                    value = value + loss.detach()
        finally:
            self._replaying = False
        if overflow and torch.stack([flag.to(overflow[0].device) for flag in overflow]).any():
            self.loss_scale /= 2
        if averages and not sharded:
            self._average(parameters)
        return weight * value

    def _beside(self, model: nn.Module, parameters: Sequence[Tensor]) -> list[nn.Module]:
        """Layers with parameters that are not in the model: adapters of kohya's scripts act on it from outside."""
        if self._outside is None:
            missing = set(parameters) - set(model.parameters())
            modules = living_modules() if missing else []
            self._outside = [m for m in modules if any(p in missing for p in m.parameters(recurse=False))]
        return self._outside

    def _draw(self, step: int) -> list[Call]:
        rows = [call for call in self.recording.calls if not call.held_out]
        if self.recording.splits:
            rows = [(call, index) for call in rows for index in range(len(call.answer))]
        drawn = []
        for number in range((step - 1) * self.count, step * self.count):
            generator = torch.Generator().manual_seed(number // len(rows))
            order = torch.randperm(len(rows), generator=generator)
            row = rows[order[number % len(rows)]]
            drawn.append(row[0].row(row[1]) if self.recording.splits else row)
        return drawn

    def _watch(self) -> None:
        """Watch for the training's autocast in parts of the model: accelerate turns it on inside the forward pass."""
        containers = (nn.ModuleList, nn.ModuleDict)  # which are never called
        parts = [part for part in self.recording.model.modules() if not isinstance(part, containers)]
        parts = [part for part in parts if any(True for _ in part.parameters())]  # whose device says which autocast
        parts = parts[1:_WATCHED] or parts
        self.handles = [part.register_forward_hook(_Remember(self)) for part in parts]

    def _remember(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self._replaying and torch.is_grad_enabled():
            kind = next(module.parameters()).device.type
            self.autocast = kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def _is_half(self, model: nn.Module) -> bool:
        enabled = self.autocast is not None and self.autocast[1] and self.autocast[2] == torch.float16
        return enabled or any(parameter.dtype == torch.float16 for parameter in model.parameters())

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _average(self, parameters: Sequence[Tensor]) -> None:
        """All processes replay the same calls, but GPUs may round differently, and the copies would grow apart."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return
        size = torch.distributed.get_world_size()
        for parameter in parameters if size > 1 else ():
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad.div_(size)

    def __getstate__(self) -> dict:
        return {**vars(self), "handles": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class _Remember:
    """A hook that calls `Replay._remember`. Copies of the model, which may be saved, have one that does nothing."""

    def __init__(self, replay: Replay | None = None):
        self.replay = replay and weakref.ref(replay)

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        replay = self.replay and self.replay()
        if replay is not None:
            replay._remember(module, args, output)

    def __reduce__(self) -> tuple:
        return _Remember, ()


class _Alone:
    """
    Lets an ordinary backward pass add to the gradients of the parameters only. FSDP2 gathers parameters and shares
    gradients out by hooks, which have to run; their mean over processes, all of which replay the same call, is right.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]):
        wanted = set(parameters)
        self.others = [(p, p.grad) for p in model.parameters() if p.requires_grad and p not in wanted]

    def __enter__(self) -> None:
        for parameter, _ in self.others:
            parameter.grad = None

    def __exit__(self, *_) -> None:
        for parameter, gradient in self.others:
            parameter.grad = gradient


class _Standins:
    """
    Replaces parameters in the model by tensors that share their values and gradients, so that a backward pass adds to
    these gradients without calling the parameters' hooks.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor], to_gradient: Callable[[Tensor], Tensor]):
        wanted = set(parameters)
        self.places = [
            (module, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter in wanted
        ]
        self.frozen = [p for p in model.parameters() if p.requires_grad and p not in wanted]
        self.to_gradient = to_gradient

    def __enter__(self) -> None:
        standins = {}
        for _, _, parameter in self.places:
            if parameter not in standins:
                standin = parameter.detach().requires_grad_()
                standin.grad = parameter.grad
                standin.register_hook(self.to_gradient)
                standins[parameter] = standin
        for module, name, parameter in self.places:
            module._parameters[name] = standins[parameter]
        for parameter in self.frozen:
            parameter.requires_grad_(False)

    def __exit__(self, *_) -> None:
        for module, name, parameter in self.places:
            module._parameters[name] = parameter
        for parameter in self.frozen:
            parameter.requires_grad_(True)
