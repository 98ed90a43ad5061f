# The trainings by which engines are compared: a tiny model, on one process or on several. Holds no tests: those of DDP
# and FSDP2 are in test_engines.py, those of DeepSpeed, which CI does not install, in benchmarks/engines.py.
import math
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn

from lipschitz_reg import LipschitzRegularizer, find_lora_adapters, record


STEPS, ROWS, CLIP = 4, 6, 0.1


class Case(NamedTuple):
    """One training; the defaults are those of most."""

    space: str = "parameters"
    mode: str = "coupled"
    reduction: str = "tensor_mean"
    lora: str | None = None  # the `lora_form`
    clips: str | None = None  # the gradient of the "loss", or "both" gradients together
    groups: int = 2
    moved: bool = False  # the anchors are half the present values


CASES = {
    **{
        f"{mode} {reduction}": Case(mode=mode, reduction=reduction, groups=1 if mode == "projected" else 2)
        for mode in ("coupled", "proximal", "projected")
        for reduction in ("sum", "tensor_mean", "mean")
    },
    "coupled, other anchors": Case(moved=True),
    "coupled, both clipped": Case(clips="both"),
    "coupled, loss clipped": Case(clips="loss"),
    **{f"lora coupled {reduction}": Case(lora="delta", reduction=reduction) for reduction in ("sum", "mean")},
    "lora projected": Case(lora="delta", mode="projected", groups=1),
    "lora factors proximal": Case(lora="factors", mode="proximal"),
    "layers": Case("layers"),
    "layers lora": Case("layers", lora="delta"),
    "predictions": Case("predictions"),
    "predictions lora": Case("predictions", lora="delta"),
}
WEIGHTS = {"sum": 2.0, "tensor_mean": 30.0, "mean": 300.0}


class Lora(nn.Module):
    """A layer with an adapter, with the attributes that peft's have."""

    def __init__(self, base_layer, rank=3):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base_layer.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)
        self.scaling, self.active_adapters = {"default": 2.0}, ["default"]

    def forward(self, x):
        return self.base_layer(x) + 2.0 * self.lora_B["default"](self.lora_A["default"](x))


class Net(nn.Module):
    """Its sizes are odd, so that shares of it end within rows; one tensor has fewer rows than there are processes."""

    def __init__(self, lora=False):
        super().__init__()
        wrap = Lora if lora else lambda layer: layer
        self.conv = nn.Conv2d(2, 3, 3, padding=1).requires_grad_(not lora)
        self.first = wrap(nn.Linear(48, 7))
        self.norm = nn.LayerNorm(7).requires_grad_(not lora)
        self.last = wrap(nn.Linear(7, 1))

    def forward(self, x):
        hidden = self.first(torch.relu(self.conv(x)).flatten(1))
        return self.last(torch.tanh(self.norm(hidden)))


def make_model(case, dtype):
    torch.manual_seed(0)
    return Net(case.lora is not None).to(dtype)  # its values are those of float32 numbers


def make_optimizer(model, case, lr=3e-2):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": trained}]
    if case.groups == 2:  # the factors of an adapter belong together
        groups = [{"params": trained[:2]}, {"params": trained[2:], "lr": 2 * lr}]
    # So large an eps makes the steps smooth functions of the gradients.
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, eps=1e-2)


def record_base(model, case, dtype):
    if case.space == "parameters":
        return None
    with record(model, rank=4) as recording, torch.no_grad():
        for call in range(3):
            model(batch(100 + call, dtype))
        with recording.held_out():
            model(batch(200, dtype))
    return recording


def make_regularizer(model, optimizer, case, recording, strength=1.0):
    model = getattr(model, "module", model)  # out of DDP
    base = dict(make_model(case, torch.float32).named_parameters()) if case.moved else {}
    return LipschitzRegularizer(
        optimizer,
        weight={case.space: strength * (3.0 if case.space != "parameters" else WEIGHTS[case.reduction])},
        reduction=case.reduction,
        mode=case.mode,
        radius=0.05 / strength if case.mode == "projected" else None,
        anchors={
            parameter: base[name].detach() / 2
            for name, parameter in model.named_parameters()
            if name in base and (case.lora is None or name.endswith("base_layer.weight"))
        },
        adapters=find_lora_adapters(model) if case.lora else (),
        lora_form=case.lora or "delta",
        recording=recording,
    )


def batch(step, dtype, rank=0, size=1):
    """The rows of one process."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, 2, 4, 4, generator=generator).to(dtype).chunk(size)[rank]


def loss_of(model, step, dtype, rank=0, size=1):
    return (model(batch(step, dtype, rank, size)) - 1).square().mean()


def train(model, optimizer, regularizer, case, steps, dtype, rank=0, size=1):
    """Plain torch: as written for one process."""
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, dtype, rank, size).backward()
        if case.clips == "both":
            regularizer.add_gradient()
        if case.clips:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()


def outcome(model, regularizer, case, gather=lambda parameter: parameter):
    """What engines have to agree on."""
    result = {"metrics": regularizer.metrics(per_adapter=case.lora is not None)}
    result["state"] = regularizer.state_dict()
    weights = {name.removeprefix("module."): gather(p).detach().clone() for name, p in model.named_parameters()}
    if case.space != "parameters":
        result["metrics"]["drift"] = regularizer.recording.drift().prediction
    return {**result, "weights": weights}


def run_alone(case, strength=1.0):
    """The reference: one process, float64."""
    dtype = torch.float64
    model = make_model(case, dtype)
    recording = record_base(model, case, dtype)
    optimizer = make_optimizer(model, case)
    regularizer = make_regularizer(model, optimizer, case, recording, strength)
    train(model, optimizer, regularizer, case, range(STEPS), dtype)
    return outcome(model, regularizer, case)


def saved_weights(folder):
    """All weights that a training script saved, but for checkpoints and recordings."""
    files = [path for path in folder.rglob("*.safetensors") if "-" not in str(path.relative_to(folder))]
    return {f"{path.relative_to(folder)} {key}": value for path in files for key, value in load_file(path).items()}


def differences(result, expected):
    """The largest difference of weights, and of metrics, relative to the largest value."""
    weights = [
        (result["weights"][name].double() - weight.double()).abs().max().item()
        for name, weight in expected["weights"].items()
    ]
    metrics = [
        abs(result["metrics"][name] - value) / max(abs(value), 1e-3) if not math.isnan(value) else 0.0
        for name, value in expected["metrics"].items()
    ]
    return max(weights), max(metrics)
