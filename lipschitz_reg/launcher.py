"""
Launcher: sees the parameters of all optimizers that are built while it is on, takes their anchors at once, and
attaches a LipschitzRegularizer to each optimizer in its first step. Holds no command line and runs no script (run.py);
what it says is in report.py.

What it knows of torch: every optimizer of every library passes its parameters through `Optimizer.add_param_group`, and
every class whose instances do so fires the global hooks around `step`. Of accelerate: with FSDP2,
`Accelerator.prepare` replaces the optimizer's parameters with sharded ones.
"""

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import unserializable_hook
from torch.utils.weak import WeakIdKeyDictionary

from .anchors import fingerprint
from .commands import one_line
from .engines import engine_of
from .found import BaseWeights, find_models, names_in
from .lora import LoraAdapter, find_adapters, squared_delta
from .recording import Recording, sample
from .regularizer import LipschitzRegularizer
from .report import Report, describe
from .terms import Anchor, to_floats


# Keys in param groups, saved with every checkpoint: the base's fingerprint, and the number of penalized steps.
_KEY, _STEPS = "lipschitz_fingerprint", "lipschitz_steps"


class Stop(SystemExit):
    """Ends the script with one line and exit code 1, past handlers of `Exception`."""

    def __init__(self, message: str):
        super().__init__(f"python -m lipschitz_reg.run: error: {one_line(message)}")


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """What cannot be as the user wants it ends the script in one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise Stop(str(error)) from error


class _Tracked:
    """An optimizer: its param groups as they came, what of them is penalized, and which parameters were frozen."""

    def __init__(self, name: str):
        self.name = name
        self.groups: list[dict[str, Any]] = []
        self.fingerprints: list[str | None] = []
        self.penalized: list[Tensor] = []
        self.frozen: list[Tensor] = []
        self.attached = 0  # groups
        self.regularizer: weakref.ref | None = None  # it holds the optimizer, which must be free to go
        self.recording: Recording | None = None  # loaded before sharding
        # Whether its anchors may be too early: taken before the script loaded the base. Settled at the first step.
        self.may_be_early = True

    def has_gradients(self) -> bool:
        gradients = (p.grad for p in self.penalized if p.grad is not None)
        return any(gradient.layout != torch.strided or bool(gradient.any()) for gradient in gradients)


class _Watch:
    """Of a parameter: its hook, which others are watched with it, and a sample of it when it last got a gradient."""

    def __init__(self, handle: Any, together: object):
        self.handle, self.together = handle, together
        self.before: Tensor | None = None


def steps_in(groups: Sequence[dict[str, Any]]) -> int:
    """The number of penalized steps that a checkpoint stores."""
    return max(group.get(_STEPS, 0) for group in groups)


class Launcher:
    """
    A context in which optimizers get the penalty. Raises `Stop` where they cannot have it.

    Args:
        weight (`dict[str, float]`): By space, as in `LipschitzRegularizer`.
        recording (`Path`, *optional*): The base's, for layers, predictions and drift.
        include, exclude (`Sequence[str]`):
            Patterns, as of files, for names such as `UNet2DConditionModel.conv_in.weight`.
        exclude_optimizers (`Sequence[str]`): Patterns for names such as `AdamW`, or `AdamW.1` for the second one.
        anchor (`Path`, *optional*): Safetensors with the base's weights; by default they are those that come in.
        anchor_device (`str`, *optional*): `"cpu"`, or `"disk"`, where `anchor` is read again at each step.
        log (`Path`, *optional*): Gets a line of JSON every `log_every` steps.
        options: Further arguments of `LipschitzRegularizer`.
    """

    def __init__(
        self,
        weight: dict[str, float],
        *,
        recording: Path | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        exclude_optimizers: Sequence[str] = (),
        anchor: Path | None = None,
        anchor_device: str | None = None,
        log: Path | None = None,
        log_every: int = 50,
        **options: Any,
    ):
        self.weight, self.options, self.recording_file = weight, options, recording
        self.include, self.exclude, self.exclude_optimizers = include, exclude, exclude_optimizers
        self.on_disk = anchor_device == "disk"
        self.anchor_device = None if self.on_disk else anchor_device
        self.base = BaseWeights(anchor) if anchor else None
        self.report = Report(log, log_every)
        self.optimizers: weakref.WeakKeyDictionary[Optimizer, _Tracked] = weakref.WeakKeyDictionary()
        self.counts: dict[str, int] = {}  # optimizers of each class
        # Keys are parameters. What began as LoRA has no anchor: `factors` has the adapter's name if its product was
        # not 0 then, else None.
        self.names, self.anchors, self.factors, self.watches = (WeakIdKeyDictionary() for _ in range(4))
        self.announced = WeakIdKeyDictionary()
        self.matched: set[str] = set()  # patterns
        self.kept: list[LipschitzRegularizer] = []  # of the optimizers that are in use, for metrics
        self.recordings: weakref.WeakKeyDictionary[LipschitzRegularizer, Recording] = weakref.WeakKeyDictionary()
        # While an optimizer is being built: for the parameters of all models, the model and the name in it; and for
        # the factors of adapters, the adapter.
        self.walk: tuple[dict[Tensor, tuple[nn.Module, str]], dict[Tensor, LoraAdapter]] | None = None
        self.has_penalized = False
        self.has_finished = False
        self.wrapped: dict[str, tuple[Any, Any]] = {}  # by name: the owner of a function, and the function itself

    def __enter__(self) -> "Launcher":
        original, launcher = Optimizer.add_param_group, self

        @functools.wraps(original)
        def add_param_group(optimizer: Optimizer, param_group: dict[str, Any]) -> None:
            original(optimizer, param_group)
            launcher.enter_group(optimizer, optimizer.param_groups[-1])

        build = Optimizer.__init__

        @functools.wraps(build)
        def __init__(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            outer, launcher.walk = launcher.walk, ({}, {})
            try:
                build(optimizer, *args, **kwargs)
            finally:
                launcher.walk = outer  # nothing here may keep models in memory

        Optimizer.add_param_group, self.original = add_param_group, original
        Optimizer.__init__, self.build = __init__, build
        self.handles = [
            register_optimizer_step_pre_hook(self.before_step),
            register_optimizer_step_post_hook(self.after_step),
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        Optimizer.add_param_group, Optimizer.__init__ = self.original, self.build
        for name, (owner, function) in self.wrapped.items():
            setattr(owner, name, function)
        for handle in self.handles:
            handle.remove()
        left = isinstance(error, SystemExit) and error.code in (None, 0)
        if error is None or left:
            self.finish(left)

    def enter_group(self, optimizer: Optimizer, group: dict[str, Any]) -> None:
        """Take the anchors of what comes into an optimizer, before anything can change it."""
        with _stopping():
            self._enter_group(optimizer, group)

    def _enter_group(self, optimizer: Optimizer, group: dict[str, Any]) -> None:
        tracked = self.optimizers.get(optimizer)
        if tracked is None:
            # A script may begin again with another model: nothing here may keep the last one in memory.
            if any(regularizer.steps for regularizer in self.kept):
                self.kept.clear()
            tracked = self.optimizers[optimizer] = _Tracked(self.name_optimizer(optimizer))
        tracked.groups.append(group)
        if "accelerate" in sys.modules:
            self.wrap(sys.modules["accelerate"].Accelerator, "prepare", self.follow_into)
        known, adapters_of = self.walk or ({}, {})
        if any(p not in known for p in group["params"]):  # each walk takes as long as a garbage collection
            known = names_in(find_models())
            adapters_of = {factor: a for a in find_adapters(known) for factor in (a.down, a.up)}
            if self.walk is not None:
                self.walk = known, adapters_of
        for index, parameter in enumerate(group["params"]):
            if parameter not in self.names:
                model, name = known.get(parameter, (None, f"{len(tracked.groups) - 1}.{index}"))
                self.names[parameter] = f"{tracked.name if model is None else type(model).__name__}.{name}"
        penalized = [p for p in group["params"] if self.is_penalized(tracked, group, p)]
        tracked.frozen += [p for p in penalized if not p.requires_grad]
        penalized = [p for p in penalized if p.requires_grad]
        tracked.penalized += penalized
        if any(p in self.anchors or p in self.factors for p in penalized):
            tracked.may_be_early = False  # those of another optimizer, which may have trained them
        adapters = {p: adapters_of[p] for p in penalized if p in adapters_of}
        self.note_factors(adapters)
        self.take_anchors([p for p in penalized if p not in adapters and p not in self.anchors], known)
        if not penalized:
            tracked.fingerprints.append(None)
            return
        # An optimizer that another one builds for itself may copy its groups into that one's.
        inner = self.is_inside_another(optimizer)
        tracked.fingerprints.append(None if inner else self.fingerprint(penalized, adapters, known))
        if not inner:
            group[_KEY] = tracked.fingerprints[-1]
        self.has_penalized = True
        self.watch(penalized)

    def wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Replace a function until the launcher ends. The wrapper gets the original as its first argument."""
        if name not in self.wrapped:
            function = getattr(owner, name)
            self.wrapped[name] = owner, function

            @functools.wraps(function)
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                return wrapper(function, *args, **kwargs)

            setattr(owner, name, wrapped)

    def follow_into(self, prepare: Callable[..., Any], accelerator: Any, *args: Any, **kwargs: Any) -> Any:
        """Call `prepare`, then move names and anchors to the sharded parameters."""
        shards = getattr(accelerator, "is_fsdp2", False) and any(isinstance(arg, nn.Module) for arg in args)
        if not shards:
            return prepare(accelerator, *args, **kwargs)
        if self.on_disk:
            raise Stop("--lipschitz_anchor_device disk is not supported with FSDP2: use cpu, or leave it out.")
        if self.base and self.factors:
            raise Stop("--lipschitz_anchor is not supported for LoRA with FSDP2: use DDP.")
        if accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            raise Stop(
                "With fsdp_cpu_ram_efficient_loading, only one process has the base's weights when the optimizer is "
                "built: set it to false in accelerate's configuration."
            )
        with _stopping():
            entered = self.before_sharding()
        prepared = prepare(accelerator, *args, **kwargs)
        with _stopping():
            for optimizer, groups in entered.items():
                self.follow(optimizer, groups)
        return prepared

    def before_sharding(self) -> dict[Optimizer, list[list[Tensor]]]:
        """
        The parameters of the optimizers that have taken no step. Also loads recordings, which cannot be loaded after
        sharding.
        """
        waiting = {o: tracked for o, tracked in self.optimizers.items() if not tracked.attached}
        for tracked in waiting.values() if self.recording_file else ():
            if not tracked.penalized or tracked.recording is not None:
                continue
            anchors = {p: self.anchors[p] for p in tracked.penalized if p in self.anchors}
            tracked.recording = self.load_recording(self.models_of(tracked), anchors)
        return {optimizer: [list(group["params"]) for group in optimizer.param_groups] for optimizer in waiting}

    def follow(self, optimizer: Optimizer, groups: list[list[Tensor]]) -> None:
        """Move what is known of the original parameters to the sharded ones."""
        tracked, engine = self.optimizers[optimizer], engine_of(optimizer)
        places = zip(chain(*groups), chain(*(group["params"] for group in optimizer.param_groups)), strict=True)
        now = {old: new for old, new in places if old is not new}
        for old, new in now.items():
            self.names[new] = self.names[old]
            if old in self.factors:
                self.factors[new] = self.factors[old]
            if old in self.anchors:
                piece = engine.piece(new)
                value = piece.cut(self.anchors.pop(old).value)
                self.anchors[new] = Anchor.copy(value.to(piece.value().device), self.anchor_device)
            self.unwatch(old)
        tracked.groups = list(optimizer.param_groups)
        tracked.may_be_early &= not now  # to look for gradients, processes would have to agree
        tracked.penalized = [now.get(parameter, parameter) for parameter in tracked.penalized]
        tracked.frozen = [now.get(parameter, parameter) for parameter in tracked.frozen]
        if now:
            # Metrics need all processes, and scripts may destroy the process group before they end.
            self.report.needs_all = True
            self.wrap(torch.distributed, "destroy_process_group", self.finish_before)

    def finish_before(self, destroy: Callable[..., Any], group: Any = None) -> Any:
        # After an error in one process, the others may never come.
        if self.kept and group is None and sys.exc_info()[0] is None:
            self.finish(exited=False)
        return destroy(group)

    def models_of(self, tracked: _Tracked) -> list[nn.Module]:
        """All models; those that train come before copies of them, such as a moving average."""
        wanted = set(tracked.penalized)
        return sorted(find_models(), key=lambda model: not any(p in wanted for p in model.parameters()))

    def is_inside_another(self, optimizer: Optimizer) -> bool:
        """Whether a method of another optimizer is running."""
        frame = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if owner is not optimizer and issubclass(type(owner), Optimizer) and owner in self.optimizers:
                return True
            frame = frame.f_back
        return False

    def name_optimizer(self, optimizer: Optimizer) -> str:
        kind = type(optimizer).__name__
        self.counts[kind] = self.counts.get(kind, -1) + 1
        return f"{kind}.{self.counts[kind]}" if self.counts[kind] else kind

    def is_penalized(self, tracked: _Tracked, group: dict[str, Any], parameter: Tensor) -> bool:
        """Whether the user wants it, and its group has no weight of 0."""
        if self.matches(tracked.name, self.exclude_optimizers) | self.matches(
            tracked.name.partition(".")[0], self.exclude_optimizers
        ):
            return False
        included = not self.include or self.matches(self.names[parameter], self.include)
        excluded = self.matches(self.names[parameter], self.exclude)
        return included and not excluded and group.get("lipschitz_weight") != 0

    def matches(self, name: str, patterns: Sequence[str]) -> bool:
        matching = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        self.matched.update(matching)
        return bool(matching)

    def note_factors(self, adapters: dict[Tensor, LoraAdapter]) -> None:
        """Remember factors of adapters, and which products are not 0 to begin with."""
        new = list(dict.fromkeys(adapter for factor, adapter in adapters.items() if factor not in self.factors))
        for adapter, product in zip(new, to_floats([squared_delta(adapter) for adapter in new]), strict=True):
            for factor in (adapter.down, adapter.up):
                self.factors.setdefault(factor, adapter.name if product else None)

    def take_anchors(self, parameters: list[Tensor], known: dict[Tensor, tuple[nn.Module, str]]) -> None:
        values = self.read_base(parameters, known) if self.base else {}
        for parameter in parameters:
            if parameter.is_meta:
                raise Stop(
                    f"{self.names[parameter]} is on the meta device: its optimizer was built before its weights."
                )
            if self.on_disk:
                self.anchors[parameter] = Anchor(values[parameter])
                continue
            value = values[parameter].to(parameter.device, parameter.dtype) if values else parameter.detach()
            try:
                self.anchors[parameter] = Anchor.copy(value, self.anchor_device)
            except ValueError as error:
                raise Stop(f"{self.names[parameter]}: {error} Or use --lipschitz_exclude.") from error

    def read_base(self, tensors: Sequence[Tensor], known: dict[Tensor, tuple[nn.Module, str]]) -> dict[Tensor, Tensor]:
        """The base's values of these, memory-mapped."""
        values = {}
        for model in {id(known[t][0]): known[t][0] for t in tensors if t in known}.values():
            named = {known[t][1]: t for t in tensors if t in known and known[t][0] is model}
            found = self.base.find({name: tuple(t.shape) for name, t in named.items()})
            values |= {named[name]: value for name, value in found.items()}
        unknown = [t for t in tensors if t not in values]
        if unknown:
            raise Stop(
                f"--lipschitz_anchor: {self.names.get(unknown[0])} is in no model, and has no name to find it by."
            )
        return values

    def fingerprint(
        self,
        penalized: list[Tensor],
        adapters: dict[Tensor, LoraAdapter],
        known: dict[Tensor, tuple[nn.Module, str]],
    ) -> str:
        """Of the anchors of a param group, and of the frozen weights that its adapters act on."""
        own = dict.fromkeys(adapters[p] for p in penalized if p in adapters)
        weights = [w for w in dict.fromkeys(adapter.weight for adapter in own) if w is not None]
        base = self.read_base(weights, known) if self.base else {}
        values = [base.get(w, w).detach().to(w.dtype) for w in weights]
        values += [codes for codes in (adapter.codes() for adapter in own) if codes is not None]
        anchors = (self.anchors[p].value.to(p.dtype) for p in penalized if p not in adapters)
        return fingerprint(chain(anchors, values))

    def watch(self, parameters: Sequence[Tensor]) -> None:
        """
        Tell, until the first step, whether one of them moves although nobody steps its optimizer: the first that gets
        a gradient.
        """
        together = object()

        def watch_one(parameter: Tensor) -> None:
            @unserializable_hook
            def on_gradient(gradient: Tensor) -> None:
                watch = self.watches.get(parameter)
                if watch is not None:
                    self.check_unmoved(parameter)
                    watch.before = sample(parameter)
                    for other in [p for p, w in self.watches.items() if w.together is together and w is not watch]:
                        self.unwatch(other)

            self.watches[parameter] = _Watch(parameter.register_hook(on_gradient), together)

        for parameter in parameters:
            if parameter not in self.watches:
                watch_one(parameter)

    def unwatch(self, parameter: Tensor) -> None:
        watch = self.watches.pop(parameter, None)
        if watch is not None:
            watch.handle.remove()

    def check_unmoved(self, parameter: Tensor) -> None:
        before = self.watches[parameter].before
        if before is not None and not torch.equal(before, sample(parameter)):
            raise Stop(
                f"{self.names[parameter]} was trained, but step() of its optimizer was never called, in which the "
                "penalty acts: nothing was penalized. Optimizers that are fused into the backward pass (LOMO) cannot "
                "be used."
            )

    def before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        tracked = self.optimizers.get(optimizer)
        if tracked is None or not tracked.penalized or self.is_inner(tracked, sys._getframe(1)):
            return
        unfrozen = next((p for p in tracked.frozen if p.grad is not None), None)
        if unfrozen is not None:
            raise Stop(
                f"{self.names[unfrozen]} was frozen when its optimizer was built, and trains now: leave it out with "
                "--lipschitz_exclude."
            )
        groups = optimizer.param_groups
        loaded = [id(group) for group in groups] != [id(group) for group in tracked.groups]
        with _stopping():
            if loaded or tracked.attached < len(groups):
                self.check_groups(optimizer, tracked)
            if tracked.attached < len(groups):
                self.attach(optimizer, tracked, loaded)
        regularizer = tracked.regularizer() if tracked.regularizer else None
        if loaded and regularizer is not None:
            # It selects the recorded call. Loading may itself step the optimizer, as with FSDP2.
            regularizer._steps = steps_in(groups)
        tracked.may_be_early &= not loaded and self.base is None
        # Engines take a step without gradients to make room for a state that they load next.
        if tracked.may_be_early and tracked.has_gradients():
            tracked.may_be_early = False
            # Rounding in another dtype moves weights by less.
            if regularizer is not None and regularizer.metrics()["lipschitz/relative_distance"] > 0.01:
                raise Stop(
                    f"The parameters of {tracked.name} changed between its construction and its first step. If the "
                    "base was loaded in between, name its weights with --lipschitz_anchor."
                )
        if regularizer is not None and regularizer not in self.kept:  # it goes on beside one that came later
            self.check_alone()
            self.kept.append(regularizer)
        tracked.groups, tracked.attached = list(groups), len(groups)

    def is_inner(self, tracked: _Tracked, frame: Any) -> bool:
        """
        Whether an optimizer that wraps this one is being stepped, and penalizes the same parameters. The call stack
        tells: unlike a counter it is right after a step that raised.
        """
        code, frame = frame.f_code, frame.f_back
        while frame is not None:
            if frame.f_code is code:
                outer = self.optimizers.get(frame.f_locals.get("self"))
                if outer is not None and outer.attached and not set(tracked.penalized).isdisjoint(outer.penalized):
                    return True
            frame = frame.f_back
        return False

    def check_groups(self, optimizer: Optimizer, tracked: _Tracked) -> None:
        """Stop if other parameters took the place of those that came in, or a checkpoint has another base."""
        for group, entered in zip(optimizer.param_groups, tracked.fingerprints, strict=False):
            if any(p not in self.names for p in group["params"]):
                raise Stop(
                    f"The parameters of {tracked.name} were replaced after it was built (as DeepSpeed and FSDP1 do), "
                    "and the new ones have no anchors: use DDP, or FSDP2 through accelerate's prepare."
                )
            if entered is None or group.get(_KEY) == entered:
                continue
            if _KEY not in group and self.base is not None:
                group[_KEY] = entered
            elif _KEY not in group:
                raise Stop(
                    "The checkpoint that was loaded was saved without this launcher, so that the base is not known: "
                    "name its weights with --lipschitz_anchor."
                )
            else:
                raise Stop(
                    "The checkpoint that was loaded was trained from another base, or other parameters were "
                    "penalized. If the script loads a checkpoint's weights before it builds its optimizer "
                    "(transformers' Trainer does), name the base's with --lipschitz_anchor."
                )

    def attach(self, optimizer: Optimizer, tracked: _Tracked, loaded: bool) -> None:
        old = tracked.regularizer() if tracked.regularizer else None
        if old is not None:  # a param group came later
            old.remove()
            self.kept = [regularizer for regularizer in self.kept if regularizer is not old]
        self.check_alone()
        models = self.models_of(tracked)
        known = names_in(models)
        adapters = find_adapters(tracked.penalized)
        factors = {factor for adapter in adapters for factor in (adapter.down, adapter.up)}
        anchors = {p: self.anchors[p] for p in tracked.penalized if p in self.anchors}
        lost = [p for p in tracked.penalized if p not in anchors and p not in factors]
        if lost:
            raise Stop(f"{self.names[lost[0]]} came in as part of a LoRA adapter, which is gone or not active now.")
        adapted = self.adapted_weights(adapters, known, loaded)
        recording = tracked.recording
        if recording is None and self.recording_file:
            recording = self.load_recording(models, anchors)
        held = recording if self.weight["layers"] or self.weight["predictions"] else None
        regularizer = LipschitzRegularizer(
            optimizer,
            weight=self.weight,
            anchor_device=self.anchor_device,
            anchors=anchors | adapted,
            adapters=adapters,
            recording=held,
            parameters=tracked.penalized,
            **self.options,
        )
        regularizer.check_processes()
        if old is not None:
            regularizer._steps = old.steps
        if recording is not None:
            self.recordings[regularizer] = recording
        tracked.regularizer = weakref.ref(regularizer)
        self.kept.append(regularizer)
        for parameter in tracked.penalized:
            self.unwatch(parameter)
        self.announce(optimizer, regularizer, adapters)

    def check_alone(self) -> None:
        one = self.options["reduction"] == "mean" or self.options["mode"] == "projected"
        if one and self.kept:
            raise Stop(
                "--lipschitz_reduction mean and --lipschitz_mode projected span all parameters, but this script has "
                "several optimizers: leave some out with --lipschitz_exclude_optimizer."
            )

    def adapted_weights(
        self, adapters: list[LoraAdapter], known: dict[Tensor, tuple[nn.Module, str]], loaded: bool
    ) -> dict[Tensor, Tensor]:
        """The base's weights under adapters, where they are not those that the adapters act on."""
        if self.base is None:
            odd = next((self.factors[a.up] for a in adapters if self.factors.get(a.up) is not None), None)
            if odd is not None and not loaded:
                raise Stop(
                    f"The LoRA adapter {odd} was not 0 when its optimizer was built. If it was loaded, or began with "
                    "another product (PiSSA), name the base's weights with --lipschitz_anchor."
                )
            return {}
        weights = [adapter.weight for adapter in adapters if adapter.weight is not None]
        values = self.read_base(weights, known)
        return {w: v for w, v in values.items() if not torch.equal(v.to(w.device, w.dtype), w)}

    def load_recording(self, models: list[nn.Module], anchors: dict[Tensor, Anchor]) -> Recording:
        found = Recording.match(self.recording_file, models)
        for recording in self.recordings.values():
            if recording.models == found:
                return recording
        values = {parameter: anchor.value for parameter, anchor in anchors.items()}
        return Recording.load(self.recording_file, found.pop(""), anchors=values, **found)

    def announce(self, optimizer: Optimizer, regularizer: LipschitzRegularizer, adapters: list[LoraAdapter]) -> None:
        """One line about what is penalized, of all optimizers that are there."""
        optimizers = [tracked for tracked in self.optimizers.values() if tracked.penalized]
        new = dict.fromkeys(p for tracked in optimizers for p in tracked.penalized if p not in self.announced)
        if not new:
            return
        for parameter in new:
            self.announced[parameter] = True
        anchors = {p: self.anchors[p].value for p in new if p in self.anchors}
        notes = []
        if any(group.get("weight_decay") for group in optimizer.param_groups):
            notes.append("turn weight decay off, which pulls to 0 and not to the base")
        if "layers" in regularizer.spaces and regularizer.recording.share() < 0.995:
            share = regularizer.recording.share()
            notes.append(f"{share:.0%} of the weights were recorded, and the rest is hardly held")
        patterns = [*self.include, *self.exclude, *self.exclude_optimizers]
        unmatched = [repr(pattern) for pattern in patterns if pattern not in self.matched]
        notes += [f"nothing matches {', '.join(unmatched)}"] if unmatched else []
        self.report.say(describe(list(new), anchors, len(adapters), regularizer, self.on_disk, notes))
        seen = {self.names[p] for t in self.optimizers.values() for g in t.groups for p in g["params"]}
        left = sorted(seen - {self.names[p] for p in self.announced})
        self.report.write({"penalized": [self.names[p] for p in new], "left_out": left})

    def after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        tracked = self.optimizers.get(optimizer)
        regularizer = tracked.regularizer() if tracked and tracked.regularizer else None
        for group in optimizer.param_groups if regularizer else ():
            group[_STEPS] = regularizer.steps
        if tracked and tracked.may_be_early and tracked.has_gradients():  # which a closure computed
            tracked.may_be_early = False
        if self.kept and regularizer is self.kept[0]:
            self.report.after_step(self.kept)

    def finish(self, exited: bool) -> None:
        """The last line, once; or `Stop`, if the script trained and nothing was penalized."""
        if self.has_finished:
            return
        self.has_finished = True
        if self.kept and self.report.needs_all and not torch.distributed.is_initialized():
            return self.report.say(f"{self.kept[0].steps} steps; the distance needs all processes, which have ended")
        for parameter in list(self.watches):
            self.check_unmoved(parameter)
        if self.kept:
            return self.report.finish(self.kept, next(iter(self.recordings.values()), None))
        if not self.counts:
            what = "no optimizer was built in this process"
        else:
            what = "no step was taken" if self.has_penalized else "all that trained was left out"
        if not (exited or self.has_penalized):  # a script that exits may have been asked for --help
            raise Stop(f"nothing was penalized: {what}.")
        self.report.say(f"nothing was penalized: {what}")
