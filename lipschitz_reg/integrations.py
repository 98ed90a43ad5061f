"""
Callbacks that attach the penalty in trainers: `TransformersCallback` for the Trainer of transformers and those made of
it, `LightningCallback` for that of Lightning. Each package is imported when its class is first used. accelerate needs
no callback: `accelerator.register_for_checkpointing(regularizer)`. Holds no penalty (regularizer.py).
"""

import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .anchors import make_anchor
from .engines import trained_by, unwrapped
from .lora import find_adapters
from .regularizer import LipschitzRegularizer
from .terms import ParameterTerm


class _Callback:
    """
    What the callbacks have in common. They take the same arguments as `LipschitzRegularizer`, but for `optimizer`,
    `anchors` and `adapters`, which they find: the anchors are the weights before a checkpoint is loaded.

    Attributes:
        regularizers (`list[LipschitzRegularizer]`): One for each optimizer, from the beginning of the training on.
    """

    def __init__(self, weight: Any, **options: Any):
        super().__init__()
        self.options = {"weight": weight, **options}
        self.regularizers: list[LipschitzRegularizer] = []
        self._anchors: dict[Tensor, Tensor] = {}

    def _take_anchors(self, model: nn.Module) -> None:
        device = self.options.get("anchor_device")
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        factors = {factor for adapter in find_adapters(parameters) for factor in (adapter.down, adapter.up)}
        terms = [term for regularizer in self.regularizers for term in regularizer._terms.all]
        known = {t.parameter: t.anchor.value for t in terms if isinstance(t, ParameterTerm)}  # of an earlier training
        self._anchors = {p: known[p] if p in known else make_anchor(p, device) for p in parameters if p not in factors}

    def _attach(self, optimizers: Iterable[torch.optim.Optimizer], states: list[dict[str, Any]] | None) -> None:
        """`states` are those of a checkpoint that was loaded."""
        for optimizer in optimizers:
            parameters = trained_by(optimizer)
            adapters = find_adapters(parameters)
            anchors = {p: self._anchors.pop(p) for p in parameters if p in self._anchors}
            known = {*anchors, *(factor for adapter in adapters for factor in (adapter.down, adapter.up))}
            if states is not None and not known.issuperset(parameters):
                raise ValueError(
                    "The base of this checkpoint is not known: the model was replaced since it was built."
                )
            options = {"anchors": anchors, "adapters": adapters, **self.options}
            self.regularizers.append(LipschitzRegularizer(optimizer, **options))
        self._anchors = {}
        if states is not None:
            if len(states) != len(self.regularizers):
                raise ValueError(
                    f"The checkpoint was saved by a training without {type(self).__name__}, or with other optimizers: "
                    "its base is not known."
                )
            for regularizer, state in zip(self.regularizers, states, strict=True):
                regularizer.load_state_dict(state)

    def _states(self) -> list[dict[str, Any]]:
        return [regularizer.state_dict() for regularizer in self.regularizers]


def _transformers_callback() -> type:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    class TransformersCallback(_Callback, TrainerCallback, ExportableState):
        __doc__ = _Callback.__doc__

        def on_init_end(self, args, state, control, model=None, **kwargs):
            self._take_anchors(model)

        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            if any(r.optimizer is unwrapped(optimizer) for r in self.regularizers):
                return  # a second call of train()
            if self.regularizers:  # with another optimizer, but from the same base
                self._take_anchors(model)
            self.regularizers = []
            saved = state.stateful_callbacks.get(type(self).__name__, {}) if state.global_step else None
            self._attach([optimizer], saved if saved is None else saved.get("attributes", {}).get("states", []))

        def state(self) -> dict[str, Any]:
            """What a checkpoint of the Trainer holds."""
            return {"args": {}, "attributes": {"states": self._states()}}

    return TransformersCallback


def _lightning_callback() -> type:
    # Those who import the older name have its classes.
    name = "pytorch_lightning" if "pytorch_lightning" in sys.modules else "lightning.pytorch"
    if "lightning.pytorch" in sys.modules:
        name = "lightning.pytorch"

    class LightningCallback(_Callback, import_module(name).Callback):
        __doc__ = _Callback.__doc__
        _loaded: list[dict[str, Any]] | None = None

        def setup(self, trainer, pl_module, stage):
            if stage == "fit":
                self._take_anchors(pl_module)

        def on_load_checkpoint(self, trainer, pl_module, checkpoint):
            if trainer.state.fn == "fit":
                self._loaded = checkpoint["callbacks"].get(self.state_key, {}).get("regularizers", [])

        def on_fit_start(self, trainer, pl_module):
            self.regularizers = []
            self._attach(trainer.optimizers, self._loaded)
            self._loaded = None

        def state_dict(self) -> dict[str, Any]:
            return {"regularizers": self._states()}

    return LightningCallback


_CALLBACKS = {"TransformersCallback": _transformers_callback, "LightningCallback": _lightning_callback}


def __getattr__(name: str) -> type:
    if name not in _CALLBACKS:
        raise AttributeError(f"lipschitz_reg.integrations has no {name}. It has: {', '.join(_CALLBACKS)}.")
    made = _CALLBACKS[name]()
    made.__module__, made.__qualname__ = __name__, name
    return globals().setdefault(name, made)
