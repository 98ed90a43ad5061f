"""
The well-known optimizers with the penalty attached, for trainers that import an optimizer by its dotted name, such as
lipschitz_reg.optim.AdamW, and hand it `key=value` arguments: `lipschitz_weight=500`. Each class is a subclass of the
one that has its name, whose package is imported when the class is first used. Holds no penalty (regularizer.py).
"""

import ast
import inspect
import logging
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .engines import is_shared
from .lora import find_adapters, living_modules
from .recording import Recording
from .regularizer import LipschitzRegularizer


logger = logging.getLogger(__name__)

_PACKAGES = {
    "torch.optim": "AdamW Adam SGD Adamax NAdam RAdam Adagrad RMSprop",
    "bitsandbytes.optim": "AdamW8bit Adam8bit Lion8bit SGD8bit AdEMAMix8bit PagedAdamW PagedAdamW8bit PagedAdamW32bit "
    "PagedLion8bit PagedAdEMAMix8bit",
    "transformers.optimization": "Adafactor",
    "prodigyopt": "Prodigy",
    "schedulefree": "AdamWScheduleFree RAdamScheduleFree SGDScheduleFree",
    "lion_pytorch": "Lion",
    "dadaptation": "DAdaptAdam DAdaptLion DAdaptSGD DAdaptAdaGrad DAdaptAdan",
}
_MODULES = {name: module for module, names in _PACKAGES.items() for name in names.split()}
_OPTIONS = ("weight", "reduction", "mode", "radius", "anchor_device", "lora_form", "recording", "replays")
_PREFIX = "lipschitz_"


def penalized(base: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """
    A subclass of an optimizer class that attaches a `LipschitzRegularizer` to itself.

    Its constructor also takes the arguments of `LipschitzRegularizer` with the prefix `lipschitz_`, as values or as
    the strings of a command line: `lipschitz_weight`, which is needed, and `lipschitz_reduction`, `_mode`, `_radius`,
    `_anchor_device`, `_lora_form`, `_replays` and `_recording`, which is the path of a file. LoRA adapters are found
    by their factors. The anchors are the values of the parameters when the optimizer is made.

    `weight_decay` is 0 unless it is given, as it would pull to zero what the penalty pulls to the base. With a weight
    of 0, nothing differs from the optimizer itself.
    """

    def __init__(self, params, *args, **options):
        own = {name: options.pop(name) for name in list(options) if name.startswith(_PREFIX)}
        own = _parse(own)
        if _any_above_zero(own["weight"]):
            names = inspect.signature(base).parameters
            given = inspect.signature(base).bind_partial(params, *args, **options).arguments
            if "weight_decay" in names and "weight_decay" not in given:
                options["weight_decay"] = 0.0
        base.__init__(self, params, *args, **options)
        _attach(self, **own)

    def regularizer(self) -> LipschitzRegularizer | None:
        """`None` with a weight of 0."""
        return getattr(self.defaults, "regularizer", None)

    def state_dict(self) -> dict[str, Any]:
        """With the state of the regularizer, by which another base is known."""
        state = base.state_dict(self)
        return state if self.regularizer is None else {**state, "lipschitz": self.regularizer.state_dict()}

    def load_state_dict(self, state_dict, *args, **kwargs):
        state = dict(state_dict)
        own = state.pop("lipschitz", None)
        if own is not None and self.regularizer is not None:
            self.regularizer.load_state_dict(own)
        return base.load_state_dict(self, state, *args, **kwargs)

    body = {
        "__doc__": f"{base.__name__} with the penalty attached. `penalized` says how.",
        "__module__": __name__,
        "__init__": __init__,
        "regularizer": property(regularizer),
        "state_dict": state_dict,
        "load_state_dict": load_state_dict,
    }
    return type(base.__name__, (base,), body)


def __getattr__(name: str) -> type[torch.optim.Optimizer]:
    if name not in _MODULES:
        raise AttributeError(f"lipschitz_reg.optim has no {name}. It has: {', '.join(_MODULES)}.")
    try:
        base = getattr(import_module(_MODULES[name]), name)
    except ImportError as error:
        package = _MODULES[name].partition(".")[0].replace("_", "-")
        raise ImportError(f"lipschitz_reg.optim.{name} needs {package}: pip install {package}") from error
    return globals().setdefault(name, penalized(base))


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])


def _parse(own: dict[str, Any]) -> dict[str, Any]:
    """The arguments without their prefix, and strings as what they spell."""
    known = [_PREFIX + name for name in _OPTIONS]
    unknown = next((name for name in own if name not in known), None)
    if unknown:
        raise ValueError(f"There is no `{unknown}`, only {', '.join(known)}.")
    values = {name.removeprefix(_PREFIX): _value(value) for name, value in own.items()}
    values = {name: value for name, value in values.items() if value is not None}
    if "weight" not in values:
        raise ValueError(
            "`lipschitz_weight` is missing: how strongly to hold the model, such as lipschitz_weight=500."
        )
    weights = values["weight"].values() if isinstance(values["weight"], dict) else [values["weight"]]
    for name, value in (("weight", next(iter(weights), None)), *[(n, values.get(n)) for n in ("radius", "replays")]):
        if value is not None and not isinstance(value, (int, float)):
            raise ValueError(f"`lipschitz_{name}` must be a number, not {value!r}.")
    return values


def _value(value: Any) -> Any:
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value


def _any_above_zero(weight: Any) -> bool:
    return any(value > 0 for value in (weight.values() if isinstance(weight, dict) else [weight]))


class _Watch:
    """
    Ends a training that moves parameters in its backward pass, as fused backward passes do: no step would carry the
    penalty. It looks at the first parameter that gets a gradient, until the first step that has a gradient.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[Tensor]):
        self.parameters, self.parameter, self.before = parameters, None, None
        handles = [parameter.register_post_accumulate_grad_hook(self._after_backward) for parameter in parameters]
        self.handles = [optimizer.register_step_pre_hook(self._before_step), *handles]

    def _after_backward(self, parameter: Tensor) -> None:
        if self.parameter is None and not is_shared(parameter):
            self.parameter = parameter
        if self.parameter is parameter:
            self._check_unmoved()
            self.before = parameter.detach().clone()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self.parameter is not None and self.parameter.grad is None:  # dropped, or taken by a fused backward pass
            self._check_unmoved()
        if any(parameter.grad is not None for parameter in self.parameters):
            self.remove()

    def _check_unmoved(self) -> None:
        if self.before is not None and not torch.equal(self.before, self.parameter):
            self._stop()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.parameters, self.before = [], [], None

    def _stop(self) -> None:
        self.remove()
        raise ValueError(
            "This training moves parameters without step() of the optimizer, so that the penalty cannot act: switch "
            "its fused backward pass off."
        )


def _models_of(trained: set[Tensor]) -> list[nn.Module]:
    """The modules that hold what is trained, without wrappers before with them."""
    models = [module for module in living_modules() if any(p in trained for p in module.parameters())]
    return sorted(models, key=lambda model: sum(1 for _ in model.modules()))


def _attach(optimizer: torch.optim.Optimizer, recording: str | None = None, **options: Any) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    adapters = find_adapters(parameters)
    loaded = None
    if recording is not None:
        models = Recording.match(recording, _models_of({*parameters, *(adapter.weight for adapter in adapters)}))
        loaded = Recording.load(recording, models.pop(""), **models)
    regularizer = LipschitzRegularizer(optimizer, adapters=adapters, recording=loaded, **options)
    if regularizer.spaces:
        watched = [parameter for parameter in parameters if parameter.requires_grad]
        if watched:
            _Watch(optimizer, watched)
        numel = sum(parameter.numel() for parameter in parameters)
        logger.info(
            f"lipschitz_reg holds {len(parameters)} tensors with {numel:,} parameters, {len(adapters)} LoRA adapters; "
            f"weight {options['weight']}, mode {regularizer.mode}"
        )
