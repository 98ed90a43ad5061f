"""
The recorded calls of a model: what it was given, in whatever form, and its answer; and how to repeat one. Works with
any architecture. recording.py decides which calls are recorded; replay.py and drift.py use them.
"""

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


Autocast = tuple[str, bool, torch.dtype]

_TIMESTEPS = ("timestep", "timesteps", "t")  # what denoisers call their noise level


class Store:
    """Tensors by number. Each is kept only once, however often it is added."""

    def __init__(self, tensors: dict[int, Tensor] | None = None, device: torch.device | str | None = None):
        self.tensors, self.device = tensors or {}, device
        self._numbers: dict[tuple, int] = {}

    def add(self, tensor: Tensor) -> int:
        host = tensor.detach().cpu().contiguous()
        key = (tuple(host.shape), host.dtype, hashlib.sha256(host.flatten().view(torch.uint8).numpy()).digest())
        if key not in self._numbers:
            self._numbers[key] = len(self.tensors)
            with torch.inference_mode(False):
                kept = tensor.detach().to(self.device) if self.device is not None else tensor.detach()
                # What a model was given may be overwritten by what comes next.
                self.tensors[len(self.tensors)] = kept.clone()
        return self._numbers[key]


class Call(NamedTuple):
    """
    A call of a model.

    Args:
        args, kwargs: What it was given: tensors, numbers, strings, and lists, tuples and dicts of these.
        answer (`torch.Tensor`): The first tensor of its output.
        held_out (`bool`): Whether it only measures drift.
        autocast: Device, whether autocast was on there, and its dtype.
    """

    args: tuple
    kwargs: dict[str, Any]
    answer: Tensor
    held_out: bool
    autocast: Autocast

    @classmethod
    def of(cls, store: Store, args: tuple, kwargs: dict, output: Any, held_out: bool, autocast: Autocast) -> "Call":
        def keep(tensor: Tensor) -> Tensor:
            return store.tensors[store.add(tensor)]

        return cls(map_tensors(keep, args), map_tensors(keep, kwargs), keep(answer_of(output)), held_out, autocast)

    def timestep(self, model: nn.Module) -> float | None:
        """The noise level of the first row of its batch, if the model has an argument for it."""
        value = self._timestep(model)
        return float(value.flatten()[0]) if isinstance(value, Tensor) else value

    def _timestep(self, model: nn.Module) -> Any:
        try:
            signature = inspect.signature(unwrapped_model(model).forward)
            given = signature.bind_partial(*self.args, **self.kwargs).arguments
        except TypeError:
            given = self.kwargs
        return next((given[name] for name in _TIMESTEPS if name in given), None)

    def row(self, index: int) -> "Call":
        """One row of a batch. Tensors that do not have the batch's size are for all rows."""
        size = len(self.answer)

        def cut(tensor: Tensor) -> Tensor:
            return tensor[index : index + 1] if tensor.dim() and len(tensor) == size else tensor

        rows = map_tensors(cut, self.args), map_tensors(cut, self.kwargs), cut(self.answer)
        return Call(*rows, self.held_out, self.autocast)

    def again(self, model: nn.Module, autocast: Autocast | None = None) -> Tensor:
        """The model's answer to the same call now, under the autocast of the recording or another one."""
        kind, enabled, dtype = autocast or self.autocast
        parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
        device = self.answer.device if parameter is None else parameter.device
        wanted = None if enabled or parameter is None else parameter.dtype
        timestep, kwargs = self._timestep(model), _taken(model, self.kwargs)
        enabled = enabled and kind == device.type

        def call(kept: Any) -> Tensor:
            def fit(tensor: Tensor) -> Tensor:
                cast = tensor.is_floating_point() and tensor is not kept
                # From host memory that nobody changes: a GPU need not be waited for.
                return tensor.to(device, wanted if cast else None, non_blocking=device.type == "cuda")

            # A cache would keep a copy of all weights, although each is used once.
            with torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False):
                return answer_of(model(*map_tensors(fit, self.args), **map_tensors(fit, kwargs)))

        try:
            return call(timestep)  # which keeps its bits: in bfloat16, 901 would be 900
        except RuntimeError as error:
            if wanted is None or not isinstance(timestep, Tensor) or "dtype" not in str(error):
                raise
            return call(None)  # a model that does not cast it

    def to_json(self, store: Store) -> dict[str, Any]:
        answer, given = store.add(self.answer), [_to_json(part, store) for part in (self.args, self.kwargs)]
        kind, enabled, dtype = self.autocast
        autocast = [kind, enabled, str(dtype).removeprefix("torch.")]
        return {"given": given, "answer": answer, "held_out": self.held_out, "autocast": autocast}

    @classmethod
    def from_json(cls, row: dict[str, Any], store: Store) -> "Call":
        kind, enabled, dtype = row["autocast"]
        given = [_from_json(part, store) for part in row["given"]]
        return cls(*given, store.tensors[row["answer"]], row["held_out"], (kind, enabled, getattr(torch, dtype)))


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The model in wrappers of DDP, torch.compile and peft."""
    parts = vars(model)["_modules"]
    if parts.keys() in ({"module"}, {"_orig_mod"}):
        return unwrapped_model(next(iter(parts.values())))
    inner = getattr(parts.get("base_model"), "model", None)  # peft's
    return unwrapped_model(inner) if isinstance(inner, nn.Module) and parts.keys() == {"base_model"} else model


def _taken(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Without arguments of None that the model does not have: a trainer's own class for a model of diffusers may leave
    out what its pipelines do not use either.
    """
    if not any(value is None for value in kwargs.values()):
        return kwargs
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return kwargs
    return {name: value for name, value in kwargs.items() if value is not None or name in parameters}


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The same structure of lists, tuples and dicts with the function applied to each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def answer_of(output: Any) -> Tensor:
    """The first tensor of what a model returned: a tensor, a tuple, or an output of diffusers or transformers."""
    if isinstance(output, Tensor):
        return output
    first = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return answer_of(first)


def replace_answer(output: Any, answer: Tensor) -> Any:
    """The output with another tensor in place of its first."""
    if isinstance(output, Tensor):
        return answer.to(output)
    if isinstance(output, dict):
        key, first = next(iter(output.items()))
        changed = copy.copy(output)
        changed[key] = replace_answer(first, answer)
        return changed
    return (replace_answer(output[0], answer), *output[1:])


def autocast_of(output: Any) -> Autocast:
    """The autocast that is on now, for the output's device."""
    kind = answer_of(output).device.type
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, nor anything else that draws random numbers. Afterwards each module is back in its own mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def rows_agree(model: nn.Module, calls: Sequence[Call]) -> bool:
    """
    Whether the rows of a batch, each called alone, get the answers that they had together. Where an argument is a list
    with an item for each row, or has the batch's size by chance, they do not, and calls are replayed whole.
    """
    call = next((call for call in calls if len(call.answer) > 1), None)
    if call is None:
        return False
    with evaluating(model), torch.no_grad():
        for index in range(len(call.answer)):
            row = call.row(index)
            try:
                answer = row.again(model).to(row.answer)
            except (RuntimeError, ValueError, TypeError, IndexError):
                return False
            if answer.shape != row.answer.shape or (answer - row.answer).norm() > 0.02 * row.answer.norm():
                return False
    return True


def _to_json(value: Any, store: Store) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": store.add(value)}
    if isinstance(value, dict):
        return {"dict": {key: _to_json(item, store) for key, item in value.items()}}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_to_json(item, store) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"A call with an argument of type {type(value).__name__} cannot be saved.")


def _from_json(value: Any, store: Store) -> Any:
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "tensor":
        return store.tensors[content]
    if kind == "dict":
        return {key: _from_json(item, store) for key, item in content.items()}
    return {"list": list, "tuple": tuple}[kind](_from_json(item, store) for item in content)
