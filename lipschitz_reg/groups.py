"""
Which terms are penalized, in which space and with which coefficient, as the param groups of an optimizer say at each
step. Holds the anchors. Holds no hooks (regularizer.py) and does not say how a term acts (modes.py).
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .anchors import check_whole
from .engines import Engine, Piece, is_shared
from .functional import Moment, reductions
from .lora import LoraAdapter
from .modes import Mode, Row
from .recording import Recording
from .terms import Anchor, LoraTerm, ParameterTerm, Term, build_offset, checked, squares, to_floats, zeros_like


SPACES = ("parameters", "layers", "predictions")


class Terms:
    """
    Everything that is penalized in an optimizer's param groups, as they were when this was built. `engine` steps that
    optimizer (engines.py); the other arguments are as in `LipschitzRegularizer`.

    In `lora_form` `"delta"` the factors of adapters have no term of their own; in `"factors"` they are parameters with
    anchor 0, but distance is still measured by the products.

    Attributes:
        weight (`dict[str, float]`): By space, for the groups that have none of their own.
        spaces (`list[str]`): Those in which a group has a weight above 0.
        all (`list[Term]`): What is penalized in any space, as terms of the space of parameters.
    """

    def __init__(
        self,
        engine: Engine,
        weight: float | Mapping[str, float],
        mode: Mode,
        anchor_device: torch.device | str | None,
        anchors: Mapping[Tensor, Tensor | Anchor],
        adapters: Sequence[LoraAdapter],
        lora_form: str,
        recording: Recording | None,
        parameters: Collection[Tensor] | None = None,
    ):
        self.engine = engine
        self.penalized = None if parameters is None else set(parameters)
        self.weight = by_space("weight", weight)
        groups = engine.groups()
        of_groups = [self._group_weights(index, group) for index, (group, _) in enumerate(groups)]
        self.spaces = [space for space in SPACES if any(weights[space] > 0 for weights in of_groups)]
        self._check(mode, anchors, adapters, lora_form, recording)

        factors = {factor for adapter in adapters for factor in (adapter.down, adapter.up)}
        entered = [
            p for (_, own), weights in zip(groups, of_groups) if any(weights.values()) for p in self._penalized(own)
        ]
        trained = [parameter for parameter in entered if parameter.requires_grad]
        if trained and anchors and not {*trained, *(adapter.weight for adapter in adapters)} & anchors.keys():
            raise ValueError("None of `anchors` is for a parameter of this optimizer: use the parameters as keys.")
        for parameter in trained:
            check_whole(parameter)  # the factors of adapters too, which have no anchor
        pieces = {p: engine.piece(p) for p in trained}
        own = {p: _anchor(pieces[p], anchors.get(p), anchor_device) for p in trained if p not in factors}
        offsets = {adapter: build_offset(adapter, anchors.get(adapter.weight), anchor_device) for adapter in adapters}
        plain = [ParameterTerm(p, anchor, pieces[p]) for p, anchor in own.items()]
        products = [LoraTerm(adapter, engine, offset) for adapter, offset in offsets.items()]
        split = [term.adapter.name for term in products if len(term.parts) > 1]
        if split and lora_form == "delta":
            raise ValueError(
                f"DeepSpeed steps the factors of the LoRA adapter {split[0]} one after the other: put both into one "
                "param group, and set `sub_group_size` of ZeRO 3 to more than the parameters of all adapters."
            )
        self.all: list[Term] = plain + products
        self.in_space: dict[str, list[Term]] = {}
        if "parameters" in self.spaces:
            zeros = {p: Anchor.copy(zeros_like(pieces[p].value()), anchor_device) for p in trained if p in factors}
            of_factors = [ParameterTerm(p, anchor, pieces[p]) for p, anchor in zeros.items()]
            self.in_space["parameters"] = plain + (of_factors if lora_form == "factors" else products)
        if "layers" in self.spaces:
            moments = _moments(recording, {*own, *(adapter.weight for adapter in adapters)})
            self.in_space["layers"] = [ParameterTerm(p, a, pieces[p], moments.get(p)) for p, a in own.items()]
            self.in_space["layers"] += [LoraTerm(a, engine, o, moments.get(a.weight)) for a, o in offsets.items()]
        self.is_shared = any(piece.group is not None for piece in pieces.values())
        self._anchored = {*own, *factors}
        self._squared_anchors: dict[Term, float] = {}
        self._may_freeze = [*factors, *(parameter for parameter in entered if not parameter.requires_grad)]
        self._known: tuple[list, dict] = [], {}  # for `_cached`

    def weights(self, space: str) -> dict[Tensor, float]:
        """Each parameter of the optimizer with its weight in a space."""
        return self._cached(space, lambda: self._read_weights(space))

    def _read_weights(self, space: str) -> dict[Tensor, float]:
        weights = {}
        for index, (group, own) in enumerate(self.engine.groups()):
            weights |= dict.fromkeys(self._penalized(own), self._group_weights(index, group)[space])
        if any(weight > 0 and p.requires_grad and p not in self._anchored for p, weight in weights.items()):
            raise ValueError(
                "A param group with a weight above 0 has a parameter without an anchor: it came into the optimizer, "
                "was unfrozen, or its group got the weight, after LipschitzRegularizer was built, or after remove(), "
                "or FSDP2 or DeepSpeed replaced it. Build it when the param groups are complete and have their "
                "weights, and after `accelerator.prepare`, `fully_shard` or `deepspeed.initialize`; freeze only then."
            )
        if any(weights.values()) and space not in self.spaces:
            raise ValueError(
                f"A weight in the space of {space} came after LipschitzRegularizer was built without one: give it one "
                "there."
            )
        for parameter, weight in weights.items():
            if weight > 0:
                check_whole(parameter)  # it may have been sharded since
        return weights

    def rows(self, reduction: str) -> list[Row]:
        """The terms that have a weight above 0 now, in all spaces but predictions."""
        return self._cached(("rows", reduction), lambda: self._read_rows(reduction))

    def _read_rows(self, reduction: str) -> list[Row]:
        groups = {p: group for group, own in self.engine.groups() for p in own}
        rows = []
        for space in SPACES:
            weights = self.weights(space)
            weighted = [(term, term.weight(weights)) for term in self.in_space.get(space, [])]
            weighted = [(term, weight) for term, weight in weighted if weight > 0]
            scales = reductions([term.numel() for term, _ in weighted], reduction)
            rows += [Row(t, weight * r, t.group(groups)) for (t, weight), r in zip(weighted, scales, strict=True)]
        return rows

    def measured(self) -> list[Term]:
        """The terms by which distance is measured: those that have a weight above 0 now."""
        weights: dict[Tensor, float] = {}
        for space in self.spaces:
            for parameter, weight in self.weights(space).items():
                weights[parameter] = max(weights.get(parameter, 0.0), weight)
        return [term for term in self.all if term.weight(weights) > 0]

    def distance(self) -> float:
        return math.sqrt(sum(to_floats(squares(self.measured()))))

    def anchor_norm(self, terms: Sequence[Term]) -> float:
        """The norm of the anchors; an adapter's anchor is its weight. NaN if such a weight is not known."""
        new = {term: term.squared_anchor() for term in terms if term not in self._squared_anchors}
        if None in new.values():
            return math.nan
        self._squared_anchors |= zip(new, to_floats(list(new.values())), strict=True)
        return math.sqrt(sum(self._squared_anchors[term] for term in terms))

    def clear(self) -> None:
        """Free the anchors. From here on, parameters with a weight above 0 have none."""
        self.all, self._anchored, self._squared_anchors, self._known = [], set(), {}, ([], {})
        self.in_space = {space: [] for space in self.in_space}

    def _penalized(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        return [p for p in parameters if self.penalized is None or p in self.penalized]

    def _cached(self, key: Any, read: Callable[[], Any]) -> Any:
        """What `read` gave before, unless something has changed since that it depends on: it takes long every step."""
        groups = self.engine.groups()
        state = [[id(group), self._group_weights(i, group), *map(id, own)] for i, (group, own) in enumerate(groups)]
        state.append([parameter.requires_grad for parameter in self._may_freeze])
        if state != self._known[0]:
            self._known = state, {}
        if key not in self._known[1]:
            self._known[1][key] = read()
        return self._known[1][key]

    def _group_weights(self, index: int, group: Mapping[str, Any]) -> dict[str, float]:
        """The weight of a param group in each space. Its own number is for the space that there is, or 0 for all."""
        own = group.get("lipschitz_weight", self.weight)
        name = f"lipschitz_weight of param group {index}"
        if isinstance(own, Mapping):
            return by_space(name, own)
        spaces = [space for space, weight in self.weight.items() if weight > 0] or ["parameters"]
        if checked(name, own) > 0 and len(spaces) > 1:
            raise ValueError(f"`{name}` must say for which space it is, such as {{{spaces[0]!r}: {own}}}.")
        return {space: float(own) if space in spaces else 0.0 for space in SPACES}

    def _check(
        self,
        mode: Mode,
        anchors: Mapping[Tensor, Tensor | Anchor],
        adapters: Sequence[LoraAdapter],
        lora_form: str,
        recording: Recording | None,
    ) -> None:
        """Refuse combinations that do not work."""
        groups = [group for group, _ in self.engine.groups()] if "parameters" in self.spaces else []
        if not mode.uses_gradients and any("train_mode" in group for group in groups):
            raise ValueError(
                "Schedule-free optimizers train one point and save an average, which only mode 'coupled' holds."
            )
        # D-Adaptation and Prodigy keep their estimate of the step size under "d", and the step under "k".
        if mode.uses_rates and any(group.get("lr") is None or {"d", "k"} <= group.keys() for group in groups):
            raise ValueError(
                "mode 'proximal' reads `lr` from the param group, but this optimizer chooses its own step size: use "
                "mode 'coupled'."
            )
        # Prodigy measures how far parameters have come. D-Adaptation adds up its steps, and never sees them undone.
        if mode.at_once and any({"d", "k"} <= group.keys() and "d_max" not in group for group in groups):
            raise ValueError(
                "mode 'projected' takes back steps that D-Adaptation counts, so that its step size would grow without "
                "bound: use mode 'coupled'."
            )
        recorded = [space for space in self.spaces if space != "parameters"]
        if recorded and recording is None:
            raise ValueError(f"The space of {recorded[0]} needs a `recording` of the base, from `record`.")
        if recording is not None and self.spaces and not recorded:
            raise ValueError(
                "A `recording` does nothing in the space of parameters: give `weight` for others, such as "
                "{'layers': 4.0, 'predictions': 1.0}."
            )
        if "layers" in self.spaces and (not mode.layers or lora_form == "factors"):
            raise ValueError("The space of layers needs mode 'coupled' and `lora_form` 'delta'.")
        if adapters and lora_form == "delta" and not mode.products:
            raise ValueError(
                "mode 'proximal' has no closed form for the product of LoRA factors: use mode 'coupled' or "
                "'projected', or `lora_form` 'factors'."
            )
        if self.engine.parts > 1 and groups and mode.at_once:
            raise ValueError(
                "mode 'projected' moves all parameters together, but DeepSpeed steps them one param group after the "
                "other: use one param group, and with ZeRO 3 a `sub_group_size` above the number of parameters."
            )
        if not self.engine.replays and "predictions" in self.spaces:
            raise ValueError(
                "The space of predictions does not work with ZeRO 3, which has given up the parameters when it steps: "
                "use DDP, FSDP2 or ZeRO 2."
            )
        if any(adapter.weight in anchors and is_shared(adapter.weight) for adapter in adapters):
            raise ValueError("LoRA on sharded weights that are not their own anchors cannot be penalized: use DDP.")
        if any(adapter.weight in anchors for adapter in adapters) and not (mode.offsets and lora_form == "delta"):
            raise ValueError(
                "LoRA on weights that are not their own anchors needs mode 'coupled' and `lora_form` 'delta'."
            )
        for tensor, given in anchors.items():
            anchor = given.value if isinstance(given, Anchor) else given
            shape = self.engine.piece(tensor).shape
            if shape != anchor.shape and not (isinstance(given, Anchor) and is_shared(tensor)):
                shapes = tuple(anchor.shape), tuple(shape)
                raise ValueError(f"An anchor of shape {shapes[0]} is for a tensor of {shapes[1]}.")


def _anchor(piece: Piece, value: Tensor | Anchor | None, device: torch.device | str | None) -> Anchor:
    """Of the parameter as it is, unless there is a value: an anchor, or a whole tensor."""
    if isinstance(value, Anchor):
        return value
    held = piece.value()
    return Anchor.copy(held if value is None else piece.cut(value).to(held.device), device)


def by_space(name: str, weight: float | Mapping[str, float]) -> dict[str, float]:
    """A weight for each space; a plain number is for the space of parameters."""
    given = weight if isinstance(weight, Mapping) else {"parameters": weight}
    unknown = [space for space in given if space not in SPACES]
    if unknown:
        raise ValueError(f"`{name}` must be for {', '.join(SPACES)}, not {unknown[0]!r}.")
    return {space: checked(name, given.get(space, 0.0)) for space in SPACES}


def _moments(recording: Recording, penalized: set[Tensor | None]) -> dict[Tensor, Moment]:
    moments = {tensor: moment for tensor, moment in recording.moments().items() if tensor in penalized}
    if not moments:
        raise ValueError(
            "The recording holds nothing of the layers that are penalized: in the `with` block of `record` the model "
            "that trains has to run, with its adapters in place or without any. Weights under "
            "adapters other than peft's need `requires_grad` there. Quantized weights are not recorded."
        )
    return moments
