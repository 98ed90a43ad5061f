# LipschitzRegularizer on real optimizers, against the same optimizer fed with the penalty by autograd in float64.
# The arithmetic itself is in test_functional.py, the anchors in test_anchors.py.
import copy
import gc
import math
import pickle
import warnings
import weakref

import bitsandbytes
import prodigyopt
import pytest
import schedulefree
import torch
import transformers
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from test_functional import sum_error
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lipschitz_reg import LipschitzRegularizer, functional


LR = 1e-2
EPS = 1e-4  # Adam's default is 0 in float16
WEIGHT = 200.0
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, weight_decay=0.01),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=LR, eps=EPS, foreach=False),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=LR, eps=EPS, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=LR, eps=EPS, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=LR, eps=EPS, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=LR, eps=EPS, fused=True),
    "AdamW8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=LR),
}
if hasattr(torch.optim, "Adafactor"):  # from torch 2.5 on
    OPTIMIZERS["Adafactor"] = lambda p: torch.optim.Adafactor(p, lr=LR)
REDUCTIONS = ["sum", "tensor_mean", "mean"]
MODES = ["coupled", "proximal", "projected"]


class Net(nn.Module):
    """Tied, frozen, unused, empty, channels_last, transposed and 0-dim parameters, and one of more than 4096 elements:
    in smaller ones bitsandbytes keeps 32 bits."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1).to(memory_format=torch.channels_last)
        self.wide = nn.Linear(8, 640)
        self.tied = nn.Linear(8, 640, bias=False)
        self.tied.weight = self.wide.weight
        self.transposed = nn.Parameter(torch.randn(4, 640).t() / 25)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.unused = nn.Parameter(torch.randn(5))
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        return ((self.wide(x) + self.tied(x)) @ self.transposed + self.frozen) * self.scale


def make_net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def backward(net, seed, scaler=None):
    """The gradients of a loss on a batch that the seed determines."""
    batch = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed)).to(net.scale.dtype)
    loss = net(batch).square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()


def train(net, optimizer, steps=4, first=0, before_step=lambda: None):
    for seed in range(first, first + steps):
        optimizer.zero_grad()
        backward(net, seed)
        before_step()
        optimizer.step()
    return net


def make_scheduler(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))


class Reference:
    """What the penalty does, by hand in float64 around the steps of a plain optimizer."""

    def __init__(self, optimizer, weight=WEIGHT, reduction="tensor_mean", mode="coupled", radius=None):
        self.optimizer, self.weight, self.reduction = optimizer, weight, reduction
        self.mode, self.radius = mode, radius
        self.anchors = {p: p.detach().double() for group in optimizer.param_groups for p in group["params"]}

    def rows(self, moved_only):
        groups = [g for g in self.optimizer.param_groups if g.get("lipschitz_weight", self.weight) > 0]
        parameters = [(p, g) for g in groups for p in g["params"] if p.requires_grad]
        factors = functional.reductions([p.numel() for p, _ in parameters], self.reduction)
        rows = [(p, g.get("lipschitz_weight", self.weight) * f, g["lr"]) for (p, g), f in zip(parameters, factors)]
        return [row for row in rows if not moved_only or row[0].grad is not None]

    def before_step(self):
        if self.mode != "coupled":
            return
        parameters, coefficients, _ = zip(*self.rows(moved_only=True))
        points = [p.detach().double().requires_grad_() for p in parameters]
        penalty = functional.penalty(points, [self.anchors[p] for p in parameters], coefficients)
        for p, gradient in zip(parameters, torch.autograd.grad(penalty, points)):
            p.grad.copy_(p.grad.double() + gradient)

    @torch.no_grad()
    def after_step(self):
        if self.mode == "coupled":
            return
        parameters, coefficients, rates = zip(*self.rows(moved_only=self.mode == "proximal"))
        points, anchors = [p.double() for p in parameters], [self.anchors[p] for p in parameters]
        if self.mode == "proximal":
            steps = [lr * c for lr, c in zip(rates, coefficients)]
            results = functional.proximal_step(points, anchors, steps)
        else:
            results = functional.project(points, anchors, self.radius)
        for p, result in zip(parameters, results):
            p.copy_(result)

    def train(self, net, steps=4, first=0):
        for seed in range(first, first + steps):
            self.optimizer.zero_grad()
            backward(net, seed)
            self.before_step()
            self.optimizer.step()
            self.after_step()
        return net


def distance(net, other):
    pairs = zip(net.parameters(), other.parameters(), strict=True)
    return math.sqrt(sum((p.detach().double() - q.detach().double()).square().sum().item() for p, q in pairs))


def rounding(net, name=""):
    """How far the parameters of two trainings may part that are the same but for roundings."""
    sizes = [p.detach().double().abs() for p in net.parameters() if p.requires_grad and p.numel()]
    eps = torch.finfo(net.scale.dtype).eps
    if net.scale.dtype == torch.float32:
        bound = 4 * eps * math.sqrt(sum(size.square().sum().item() for size in sizes))  # a few of each parameter
    else:
        bound = eps * max(size.max().item() for size in sizes)  # one that falls to the other side
    # A state of 8 bits that falls to the other side changes the step of its parameter by a part.
    return bound + LR / 4 if name == "AdamW8bit" else bound


def assert_same_training(net, reference, name="", plain=None):
    """Equal up to roundings, which must be small beside what the penalty does: `plain` was trained without it."""
    bound = rounding(reference, name)
    assert distance(net, reference) <= bound
    assert plain is None or distance(plain, reference) > 3 * bound


def assert_identical(net, other):
    assert all(p.isfinite().all() for p in net.parameters())
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_equals_autograd(name, dtype, mode):
    net, reference = make_net(dtype), make_net(dtype)
    options = {"weight": WEIGHT, "mode": mode, "radius": 0.05}
    optimizer = OPTIMIZERS[name](net.parameters())
    LipschitzRegularizer(optimizer, **options)
    train(net, optimizer)
    Reference(OPTIMIZERS[name](reference.parameters()), **options).train(reference)
    plain = make_net(dtype)
    train(plain, OPTIMIZERS[name](plain.parameters()))
    assert_same_training(net, reference, name, plain)


@pytest.mark.parametrize("mode", ["coupled", "proximal"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_equal_autograd(reduction, mode):
    net, reference = make_net(), make_net()
    optimizer = OPTIMIZERS["SGD"](net.parameters())
    LipschitzRegularizer(optimizer, weight=0.5, reduction=reduction, mode=mode)
    train(net, optimizer)
    Reference(OPTIMIZERS["SGD"](reference.parameters()), 0.5, reduction, mode).train(reference)
    assert_same_training(net, reference)


def two_groups(net):
    first = {"params": [net.conv.weight, net.conv.bias], "lr": LR / 2, "lipschitz_weight": 3.0}
    rest = [p for p in net.parameters() if all(p is not q for q in first["params"])]
    return [first, {"params": rest[:2], "lipschitz_weight": 0.0}, {"params": rest[2:]}]


@pytest.mark.parametrize("mode", MODES)
def test_groups_have_their_own_weight_and_rate(mode):
    net, reference = make_net(), make_net()
    options = {"weight": WEIGHT, "mode": mode, "radius": 0.05}
    optimizer = OPTIMIZERS["SGD"](two_groups(net))
    LipschitzRegularizer(optimizer, **options)
    train(net, optimizer)
    Reference(OPTIMIZERS["SGD"](two_groups(reference)), **options).train(reference)
    assert_same_training(net, reference)


@pytest.mark.parametrize("mode", ["coupled", "proximal"])
def test_weights_and_rates_are_read_at_each_step(mode):
    nets, trained = [make_net(), make_net()], []
    for net, use_reference in zip(nets, (False, True)):
        optimizer = OPTIMIZERS["SGD"](two_groups(net))
        scheduler = make_scheduler(optimizer)
        if use_reference:
            runner = Reference(optimizer, WEIGHT, mode=mode)
        else:
            LipschitzRegularizer(optimizer, weight=WEIGHT, mode=mode)
        for step in range(4):
            optimizer.param_groups[0]["lipschitz_weight"] = float(step)  # 0 at first
            runner.train(net, 1, step) if use_reference else train(net, optimizer, 1, step)
            scheduler.step()
        trained.append(net)
    assert_same_training(*trained)


def test_gradient_accumulation_carries_one_penalty_per_step():
    net, reference = make_net(), make_net()
    optimizer = OPTIMIZERS["AdamW foreach"](net.parameters())
    LipschitzRegularizer(optimizer, weight=WEIGHT)
    runner = Reference(OPTIMIZERS["AdamW foreach"](reference.parameters()))
    for step in range(3):
        for micro_batch in range(4):
            backward(net, 4 * step + micro_batch)
            backward(reference, 4 * step + micro_batch)
        optimizer.step()
        runner.before_step()
        runner.optimizer.step()
        optimizer.zero_grad()
        runner.optimizer.zero_grad()
    assert_same_training(net, reference)


def train_scaled(net, optimizer, overflow_at=None, steps=4):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for seed in range(steps):
        optimizer.zero_grad()
        backward(net, seed, scaler)
        if seed == overflow_at:
            net.wide.weight.grad.view(-1)[7] = math.inf
        scaler.step(optimizer)
        scaler.update()
    return net


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["SGD", "SGD fused", "Adam foreach", "AdamW fused", "AdamW8bit"])
def test_with_grad_scaler_training_equals_autograd(name, mode):
    net, reference, plain = make_net(), make_net(), make_net()
    options = {"weight": WEIGHT, "mode": mode, "radius": 0.05}
    optimizer = OPTIMIZERS[name](net.parameters())
    LipschitzRegularizer(optimizer, **options)
    train_scaled(net, optimizer)
    Reference(OPTIMIZERS[name](reference.parameters()), **options).train(reference)
    assert_same_training(net, reference, name, train(plain, OPTIMIZERS[name](plain.parameters())))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["Adam foreach", "AdamW fused"])
def test_overflowing_step_changes_nothing(name, mode):
    net = make_net()
    optimizer = OPTIMIZERS[name](net.parameters())
    LipschitzRegularizer(optimizer, weight=WEIGHT, mode=mode, radius=0.05)
    train(net, optimizer, steps=2)  # away from the anchors
    before = copy.deepcopy(net)
    train_scaled(net, optimizer, overflow_at=0, steps=1)
    # On the ball, a projection may move a parameter once more, by a rounding.
    assert distance(net, before) <= (rounding(net) if mode == "projected" else 0)


@pytest.mark.parametrize("name", ["Adam foreach", "AdamW fused"])
def test_training_goes_on_after_an_overflowing_step(name):
    net, reference = make_net(), make_net()
    optimizer = OPTIMIZERS[name](net.parameters())
    LipschitzRegularizer(optimizer, weight=WEIGHT)
    train_scaled(net, optimizer, overflow_at=0)
    Reference(OPTIMIZERS[name](reference.parameters())).train(reference, steps=3, first=1)
    assert_same_training(net, reference)


def test_float16_parameters_of_a_fused_optimizer_under_a_grad_scaler():
    parameters = [nn.Parameter(torch.tensor([1.0, 1.0, 1.0], dtype=torch.float16)) for _ in range(2)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for parameter, scaled in zip(parameters, (True, False)):
        optimizer = torch.optim.SGD([parameter], lr=0.25, fused=True)
        LipschitzRegularizer(optimizer, weight=1.0, reduction="sum")
        parameter.data.copy_(torch.tensor([1.0, 2.0, 0.5]))
        parameter.grad = torch.full_like(parameter, 0.25 * (scaler.get_scale() if scaled else 1))
        if scaled:
            scaler.scale(torch.zeros(()))
            scaler.step(optimizer)
        else:
            optimizer.step()
        assert parameter.tolist() == [1 - 0.0625, 2 - 0.0625 - 0.5, 0.5 - 0.0625 + 0.25]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["everywhere", "in each group", "with a weight elsewhere"])
def test_weight_zero_is_bit_identical_to_training_without(where, mode):
    net, plain = make_net(), make_net()
    if where == "with a weight elsewhere":
        other = nn.Parameter(torch.randn(3))
        other.grad = torch.randn(3)
        groups = [{"params": net.parameters(), "lipschitz_weight": 0}, {"params": [other]}]
        weight = WEIGHT
    else:
        in_groups = where == "in each group"
        groups = [{"params": net.parameters()} | ({"lipschitz_weight": 0.0} if in_groups else {})]
        weight = WEIGHT if in_groups else 0
    optimizer = OPTIMIZERS["AdamW foreach"](groups)
    LipschitzRegularizer(optimizer, weight=weight, mode=mode, radius=1e-3)
    assert bool(optimizer._optimizer_step_pre_hooks) == (where == "with a weight elsewhere")
    train(net, optimizer)
    train(plain, OPTIMIZERS["AdamW foreach"](plain.parameters()))
    assert_identical(net, plain)


@pytest.mark.parametrize("mode", MODES)
def test_parameters_that_did_not_take_part_stay_where_they_are(mode):
    net, base = make_net(), make_net()
    optimizer = OPTIMIZERS["AdamW foreach"](net.parameters())
    LipschitzRegularizer(optimizer, weight=WEIGHT, mode=mode, radius=0.05)
    train(net, optimizer)
    assert torch.equal(net.frozen, base.frozen) and torch.equal(net.unused, base.unused)
    assert net.unused.grad is None and net.frozen.grad is None
    assert net.unused not in optimizer.state


@pytest.mark.parametrize("mode", ["coupled", "proximal"])
def test_without_a_gradient_a_parameter_that_has_moved_waits(mode):
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    LipschitzRegularizer(optimizer, weight=1.0, mode=mode)
    parameter.data.fill_(1.0)
    optimizer.step()
    assert parameter.tolist() == [1, 1, 1]


def test_projection_holds_at_every_step():
    net = make_net()
    optimizer = OPTIMIZERS["AdamW foreach"](net.parameters())
    regularizer = LipschitzRegularizer(optimizer, weight=1.0, mode="projected", radius=0.02)
    for step in range(5):
        train(net, optimizer, 1, step)
        assert regularizer.metrics()["lipschitz/distance"] == pytest.approx(0.02, abs=rounding(net))


def test_proximal_step_never_overshoots():
    net, base = make_net(), make_net()
    optimizer = OPTIMIZERS["AdamW foreach"](net.parameters())
    regularizer = LipschitzRegularizer(optimizer, weight=1e12, mode="proximal")
    train(net, optimizer)
    assert distance(net, base) <= rounding(base)
    assert regularizer.metrics()["lipschitz/relative_distance"] < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_anchors_on_the_cpu_train_the_same(mode):
    nets = [make_net(), make_net()]
    for net, device in zip(nets, (None, "cpu")):
        optimizer = OPTIMIZERS["AdamW foreach"](net.parameters())
        LipschitzRegularizer(optimizer, weight=WEIGHT, mode=mode, radius=0.05, anchor_device=device)
        train(net, optimizer)
    assert_identical(*nets)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_tied_parameters_are_penalized_once():
    net = make_net()
    optimizer = torch.optim.SGD([net.wide.weight, net.tied.weight], lr=0.1)
    regularizer = LipschitzRegularizer(optimizer, weight=3.0, reduction="sum")
    net.wide.weight.data.add_(2.0)
    net.wide.weight.grad = torch.zeros_like(net.wide.weight)
    regularizer.add_gradient()
    torch.testing.assert_close(net.tied.weight.grad, torch.full((640, 8), 2 * 3 * 2.0))


def clip(net):
    return torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)


def test_penalty_is_added_after_clipping():
    net, reference = make_net(), make_net()
    optimizer = OPTIMIZERS["SGD"](net.parameters())
    LipschitzRegularizer(optimizer, weight=WEIGHT)
    train(net, optimizer, before_step=lambda: clip(net))
    runner = Reference(OPTIMIZERS["SGD"](reference.parameters()))
    train(reference, runner.optimizer, before_step=lambda: (clip(reference), runner.before_step()))
    assert_same_training(net, reference)


def test_add_gradient_lets_clipping_see_the_penalty():
    net, reference = make_net(), make_net()
    optimizer = OPTIMIZERS["SGD"](net.parameters())
    regularizer = LipschitzRegularizer(optimizer, weight=WEIGHT)
    train(net, optimizer, before_step=lambda: (regularizer.add_gradient(), clip(net)))
    runner = Reference(OPTIMIZERS["SGD"](reference.parameters()))
    train(reference, runner.optimizer, before_step=lambda: (runner.before_step(), clip(reference)))
    assert_same_training(net, reference)


@pytest.mark.parametrize("name", ["SGD", "AdamW fused"])
def test_add_gradient_after_unscaling(name):
    net, reference = make_net(), make_net()
    optimizer = OPTIMIZERS[name](net.parameters())
    regularizer = LipschitzRegularizer(optimizer, weight=WEIGHT)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for seed in range(4):
        optimizer.zero_grad()
        backward(net, seed, scaler)
        scaler.unscale_(optimizer)
        regularizer.add_gradient()
        clip(net)
        scaler.step(optimizer)
        scaler.update()
    runner = Reference(OPTIMIZERS[name](reference.parameters()))
    train(reference, runner.optimizer, before_step=lambda: (runner.before_step(), clip(reference)))
    assert_same_training(net, reference)


def test_add_gradient_is_refused_where_no_gradient_is_added():
    regularizer = LipschitzRegularizer(OPTIMIZERS["SGD"](make_net().parameters()), weight=1.0, mode="proximal")
    with pytest.raises(ValueError, match="coupled"):
        regularizer.add_gradient()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_scaler", [False, True])
def test_prepared_by_accelerate_it_trains_the_same(with_scaler, mode):
    accelerator = Accelerator(cpu=True)
    net, reference = make_net(), make_net()
    options = {"weight": WEIGHT, "mode": mode, "radius": 0.05}
    optimizer = OPTIMIZERS["AdamW fused"](net.parameters())
    scheduler = make_scheduler(optimizer)
    if with_scaler:  # accelerate makes a scaler on GPUs only
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        prepared = AcceleratedOptimizer(optimizer, scaler=scaler)
    else:
        net, prepared, scheduler = accelerator.prepare(net, optimizer, scheduler)
    regularizer = LipschitzRegularizer(prepared, **options)
    assert regularizer.optimizer is optimizer
    for seed in range(4):
        backward(net, seed, prepared.scaler)
        prepared.step()
        scheduler.step()
        prepared.zero_grad()
    runner = Reference(OPTIMIZERS["AdamW fused"](reference.parameters()), **options)
    scheduler = make_scheduler(runner.optimizer)
    for seed in range(4):
        runner.train(reference, 1, seed)
        scheduler.step()
    assert_same_training(net, reference)


def test_accelerate_saves_it_and_refuses_another_base(tmp_path):
    accelerator = Accelerator(cpu=True)
    net = make_net()
    net, optimizer = accelerator.prepare(net, OPTIMIZERS["AdamW foreach"](net.parameters()))
    regularizer = LipschitzRegularizer(optimizer, weight=WEIGHT)
    accelerator.register_for_checkpointing(regularizer)
    train(net, optimizer)
    accelerator.save_state(tmp_path)
    trained = copy.deepcopy(net)
    train(net, optimizer)
    accelerator.load_state(tmp_path)
    assert_identical(net, trained)

    accelerator = Accelerator(cpu=True)
    other = make_net()
    with torch.no_grad():
        other.scale.add_(1e-6)
    other, optimizer = accelerator.prepare(other, OPTIMIZERS["AdamW foreach"](other.parameters()))
    accelerator.register_for_checkpointing(LipschitzRegularizer(optimizer, weight=WEIGHT))
    with pytest.raises(ValueError, match="another base model"):
        accelerator.load_state(tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_resumed_training_is_bit_identical(mode):
    def start():
        net = make_net()
        optimizer = OPTIMIZERS["AdamW foreach"](two_groups(net))
        return net, optimizer, LipschitzRegularizer(optimizer, weight=WEIGHT, mode=mode, radius=0.05)

    net, optimizer, regularizer = start()
    train(net, optimizer)
    checkpoint = copy.deepcopy([net.state_dict(), optimizer.state_dict(), regularizer.state_dict()])
    train(net, optimizer, first=4)
    resumed, optimizer, regularizer = start()
    for part, state in zip((resumed, optimizer, regularizer), checkpoint, strict=True):
        part.load_state_dict(state)
    train(resumed, optimizer, first=4)
    assert_identical(resumed, net)


def test_loading_the_optimizer_midway_keeps_the_penalty():
    net, straight = make_net(), make_net()
    optimizer = OPTIMIZERS["AdamW foreach"](net.parameters())
    LipschitzRegularizer(optimizer, weight=WEIGHT)
    train(net, optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, first=4)
    optimizer = OPTIMIZERS["AdamW foreach"](straight.parameters())
    LipschitzRegularizer(optimizer, weight=WEIGHT)
    train(straight, optimizer, steps=8)
    assert_identical(net, straight)


def test_checkpoints_of_the_optimizer_are_those_of_plain_training():
    states = []
    for penalized in (False, True):
        net = make_net()
        optimizer = OPTIMIZERS["AdamW foreach"](net.parameters())
        if penalized:
            LipschitzRegularizer(optimizer, weight=WEIGHT)
        train(net, optimizer)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lipschitz_weight": 0.0})
        states.append(optimizer.state_dict())
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "AdamW8bit"])  # whose copies cannot step
def test_copy_of_an_optimizer_trains_as_the_optimizer_does(name, duplicate):
    net, plain = make_net(), make_net()
    optimizer = OPTIMIZERS[name](net.parameters())
    LipschitzRegularizer(optimizer, weight=WEIGHT)
    train(net, optimizer, steps=2)
    train(plain, OPTIMIZERS[name](plain.parameters()), steps=4)
    copied_net, copied_optimizer = duplicate((net, optimizer))
    train(net, optimizer, steps=2, first=2)
    assert distance(net, copied_net) > 1e-3
    train(copied_net, copied_optimizer, steps=2, first=2)
    assert_identical(net, copied_net)
    assert distance(net, plain) > 0.01


@pytest.mark.parametrize("order", ["model, optimizer, regularizer", "regularizer, optimizer, model"])
def test_copied_along_a_regularizer_is_the_one_of_the_copied_optimizer(order):
    parts = {"model": make_net()}
    parts["optimizer"] = OPTIMIZERS["AdamW foreach"](parts["model"].parameters())
    parts["regularizer"] = LipschitzRegularizer(parts["optimizer"], weight=WEIGHT)
    train(parts["model"], parts["optimizer"])
    copied = copy.deepcopy({name: parts[name] for name in order.split(", ")})
    assert copied["regularizer"].optimizer is copied["optimizer"]
    assert copied["regularizer"].metrics() == parts["regularizer"].metrics()
    assert copied["regularizer"].state_dict() == parts["regularizer"].state_dict()
    before = parts["regularizer"].metrics()
    copied["regularizer"].remove()
    train(copied["model"], copied["optimizer"])
    assert parts["regularizer"].metrics() == before
    assert not copied["optimizer"]._optimizer_step_pre_hooks and parts["optimizer"]._optimizer_step_pre_hooks
    assert type(copied["optimizer"].defaults) is dict


def test_copy_after_remove_is_plain():
    net = make_net()
    optimizer = OPTIMIZERS["SGD"](net.parameters())
    LipschitzRegularizer(optimizer, weight=WEIGHT).remove()
    copied = pickle.loads(pickle.dumps(optimizer))
    assert not copied._optimizer_step_pre_hooks and type(copied.defaults) is dict


def test_shallow_copy_is_not_penalized_and_may_get_its_own():
    optimizer = OPTIMIZERS["SGD"](make_net().parameters())
    first = LipschitzRegularizer(optimizer, weight=WEIGHT)
    copied = copy.copy(optimizer)
    assert not copied._optimizer_step_pre_hooks  # docs/lipschitz_reg.md warns of it
    LipschitzRegularizer(copied, weight=WEIGHT).remove()
    assert optimizer._optimizer_step_pre_hooks and optimizer.defaults.regularizer is first


def test_removed_it_is_freed():
    optimizer = OPTIMIZERS["SGD"](make_net().parameters())
    regularizer = LipschitzRegularizer(optimizer, weight=WEIGHT)
    trace = weakref.ref(regularizer)
    regularizer.remove()
    del regularizer
    gc.collect()
    assert trace() is None


@pytest.mark.parametrize("weight", [2.0, 0.0])
def test_second_on_one_optimizer_is_refused_until_the_first_is_removed(weight):
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    first = LipschitzRegularizer(optimizer, weight=1.0, reduction="sum")
    with pytest.raises(ValueError, match=r"already.*remove\(\) on the first"):
        LipschitzRegularizer(optimizer, weight=weight, reduction="sum")
    parameter.data.fill_(1.0)
    parameter.grad = torch.zeros(3)
    optimizer.step()
    assert parameter.tolist() == pytest.approx([0.8] * 3)  # 1 - lr * 2 * weight: of the first alone
    first.remove()
    LipschitzRegularizer(optimizer, weight=weight, reduction="sum")
    parameter.data.add_(1.0)
    parameter.grad = torch.zeros(3)
    optimizer.step()
    assert parameter.tolist() == pytest.approx([1.8 - 0.1 * 2 * weight] * 3)


def test_state_is_small_and_loads_without_trusting_pickle(tmp_path):
    options = {"weight": 3.0, "reduction": "mean", "mode": "projected", "radius": 0.5}
    regularizer = LipschitzRegularizer(OPTIMIZERS["SGD"](make_net().parameters()), **options)
    torch.save(regularizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(pickle.dumps(state)) < 500
    other = LipschitzRegularizer(OPTIMIZERS["SGD"](make_net().parameters()), weight=1.0)
    other.load_state_dict(state)
    options["weight"] = {"parameters": 3.0, "layers": 0.0, "predictions": 0.0}
    assert {name: getattr(other, name) for name in options} == options


def test_removed_it_leaves_plain_training():
    net, plain = make_net(), make_net()
    optimizer = OPTIMIZERS["AdamW foreach"](net.parameters())
    regularizer = LipschitzRegularizer(optimizer, weight=WEIGHT)
    regularizer.remove()
    train(net, optimizer)
    train(plain, OPTIMIZERS["AdamW foreach"](plain.parameters()))
    assert_identical(net, plain)
    with pytest.raises(ValueError, match="remove"):
        regularizer.metrics()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_metrics_equal_their_definition(reduction):
    net = make_net()
    optimizer = OPTIMIZERS["AdamW foreach"](two_groups(net))
    runner = Reference(optimizer, WEIGHT, reduction)
    regularizer = LipschitzRegularizer(optimizer, weight=WEIGHT, reduction=reduction)
    train(net, optimizer, steps=3)
    parameters, coefficients, _ = zip(*runner.rows(moved_only=False))
    anchors = [runner.anchors[p] for p in parameters]

    def distances(coefficients):
        return functional.penalty([p.detach().double() for p in parameters], anchors, coefficients).item()

    penalty = distances(coefficients)
    train(net, optimizer, steps=1, first=3)
    drift = math.sqrt(distances([1.0] * len(parameters)))
    norm = math.sqrt(sum(anchor.square().sum().item() for anchor in anchors))
    metrics = regularizer.metrics()
    assert all(type(value) is float for value in metrics.values())
    assert metrics == pytest.approx(
        {
            "lipschitz/penalty": penalty,  # in the loss of the last step
            "lipschitz/distance": drift,
            "lipschitz/relative_distance": drift / norm,
        },
        rel=sum_error(sum(parameter.numel() for parameter in parameters)),
    )


@pytest.mark.parametrize("name", ["SGD", "AdamW fused"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_penalty_is_that_of_the_last_step(reduction, mode, name):
    """Of the parameters that the gradient was added to, or that the move after the step led to; first that of now."""
    net = make_net()
    optimizer = OPTIMIZERS[name](two_groups(net))
    runner = Reference(optimizer, WEIGHT, reduction)
    regularizer = LipschitzRegularizer(optimizer, weight=WEIGHT, reduction=reduction, mode=mode, radius=0.05)
    parameters, coefficients, _ = zip(*runner.rows(moved_only=False))

    def penalty():
        points, anchors = [p.detach().double() for p in parameters], [runner.anchors[p] for p in parameters]
        return 0.0 if mode == "projected" else functional.penalty(points, anchors, coefficients).item()

    rel = sum_error(sum(p.numel() for p in parameters))
    assert regularizer.penalty() == 0
    train_scaled(net, optimizer, steps=1)
    if mode == "coupled":
        assert regularizer.penalty() == 0
    before = penalty()
    train_scaled(net, optimizer, steps=1)
    after = penalty()
    expected = {"coupled": before, "proximal": after, "projected": 0.0}[mode]
    assert regularizer.penalty() == regularizer.metrics()["lipschitz/penalty"] == pytest.approx(expected, rel=2 * rel)
    net.scale.data.add_(1.0)
    assert regularizer.penalty() == pytest.approx(expected, rel=2 * rel)


def test_penalty_before_the_first_step_is_computed():
    parameter = nn.Parameter(torch.zeros(4))
    regularizer = LipschitzRegularizer(torch.optim.SGD([parameter], lr=0.1), weight=3.0, reduction="sum")
    parameter.data.fill_(2.0)
    assert regularizer.penalty() == 3.0 * 4 * 2**2


def test_metrics_where_nothing_is_penalized():
    metrics = LipschitzRegularizer(OPTIMIZERS["SGD"](make_net().parameters()), weight=0).metrics()
    assert metrics.pop("lipschitz/penalty") == 0 and all(math.isnan(value) for value in metrics.values())


def test_metrics_warn_of_a_loop_that_bypasses_the_optimizer():
    net = make_net()
    regularizer = LipschitzRegularizer(OPTIMIZERS["SGD"](net.parameters()), weight=1.0)
    net.scale.data.add_(1.0)
    with pytest.warns(UserWarning, match="step"):
        regularizer.metrics()


def test_metrics_do_not_warn_in_training_or_after_resuming():
    net = make_net()
    optimizer = OPTIMIZERS["SGD"](net.parameters())
    regularizer = LipschitzRegularizer(optimizer, weight=1.0)
    resumed = make_net()
    resumed_regularizer = LipschitzRegularizer(OPTIMIZERS["SGD"](resumed.parameters()), weight=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regularizer.metrics()
        train(net, optimizer)
        resumed.load_state_dict(net.state_dict())
        resumed_regularizer.load_state_dict(regularizer.state_dict())
        metrics, resumed_metrics = regularizer.metrics(), resumed_regularizer.metrics()
    del metrics["lipschitz/penalty"], resumed_metrics["lipschitz/penalty"]  # of the last step, and of now
    assert resumed_metrics == metrics


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weight": -1.0}, "`weight`"),
        ({"weight": math.nan}, "`weight`"),
        ({"weight": math.inf}, "`weight`"),
        ({"weight": 1.0, "mode": "decoupled"}, "coupled, proximal, projected, not 'decoupled'"),
        ({"weight": 1.0, "reduction": "average"}, "sum, tensor_mean, mean, not 'average'"),
        ({"weight": 1.0, "mode": "projected"}, "`radius`"),
        ({"weight": 1.0, "mode": "projected", "radius": 0.0}, "`radius`"),
        ({"weight": 1.0, "mode": "projected", "radius": -1.0}, "`radius`"),
        ({"weight": 1.0, "radius": math.nan}, "`radius`"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LipschitzRegularizer(OPTIMIZERS["SGD"](make_net().parameters()), **options)


@pytest.mark.parametrize(
    "weight, message",
    [
        ({"weights": 1.0}, "`weight` must be for parameters, layers, predictions, not 'weights'"),
        ({"parameters": -1.0}, "`weight`"),
        ({"layers": 1.0}, "space of layers needs a `recording`"),
        ({"parameters": 1.0, "predictions": 1.0}, "space of predictions needs a `recording`"),
    ],
)
def test_spaces_out_of_range_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        LipschitzRegularizer(OPTIMIZERS["SGD"](make_net().parameters()), weight=weight)


def test_weight_by_space_is_the_number_for_parameters():
    nets = [make_net(), make_net()]
    for net, weight in zip(nets, (WEIGHT, {"parameters": WEIGHT})):
        optimizer = OPTIMIZERS["AdamW foreach"](net.parameters())
        regularizer = LipschitzRegularizer(optimizer, weight=weight)
        assert regularizer.weight == {"parameters": WEIGHT, "layers": 0.0, "predictions": 0.0}
        assert regularizer.spaces == ["parameters"]
        train(net, optimizer)
    assert_identical(*nets)


def test_weight_may_be_set_to_another():
    net, reference = make_net(), make_net()
    optimizer = OPTIMIZERS["SGD"](net.parameters())
    regularizer = LipschitzRegularizer(optimizer, weight=1.0)
    regularizer.weight = WEIGHT
    train(net, optimizer)
    Reference(OPTIMIZERS["SGD"](reference.parameters())).train(reference)
    assert_same_training(net, reference)
    with pytest.raises(ValueError, match="`weight`"):
        regularizer.weight = -1.0


def test_weight_in_a_space_that_was_not_built_is_refused():
    regularizer = LipschitzRegularizer(OPTIMIZERS["SGD"](make_net().parameters()), weight=1.0)
    regularizer.weight = {"parameters": 1.0, "layers": 2.0}
    with pytest.raises(ValueError, match="space of layers came after"):
        regularizer.optimizer.step()


def test_group_weight_out_of_range_is_refused_by_its_number():
    optimizer = OPTIMIZERS["SGD"]([{"params": [nn.Parameter(torch.ones(1))], "lipschitz_weight": -2.0}])
    with pytest.raises(ValueError, match="param group 0.*-2.0"):
        LipschitzRegularizer(optimizer, weight=1.0)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(ValueError, match="torch.optim.Optimizer, not Net"):
        LipschitzRegularizer(make_net(), weight=1.0)


def test_parameters_that_join_later_are_refused():
    optimizer = OPTIMIZERS["SGD"]([nn.Parameter(torch.ones(1))])
    LipschitzRegularizer(optimizer, weight=1.0)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(ValueError, match="without an anchor"):
        optimizer.step()


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused(use_orig_params, one_process):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: with one process, nothing is sharded
        net = FullyShardedDataParallel(nn.Linear(3, 3), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="FSDP1"):
        LipschitzRegularizer(torch.optim.SGD(net.parameters(), lr=LR), weight=1.0)


@pytest.mark.parametrize("mode", MODES)
def test_fsdp1_around_parameters_that_have_anchors_is_refused_in_the_first_step(mode, one_process):
    net = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    LipschitzRegularizer(optimizer, weight=1.0, mode=mode, radius=1.0 if mode == "projected" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
        net(torch.ones(1, 3)).sum().backward()
    with pytest.raises(ValueError, match="FSDP1"):
        optimizer.step()


SCHEDULE_FREE = {
    "AdamW": lambda p: schedulefree.AdamWScheduleFree(p, lr=LR, eps=EPS),
    "RAdam": lambda p: schedulefree.RAdamScheduleFree(p, lr=LR, eps=EPS),
    "SGD": lambda p: schedulefree.SGDScheduleFree(p, lr=LR),
}


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_schedule_free_optimizers_keep_what_they_save_near_the_base(name):
    distances = []
    for weight in (0.0, WEIGHT):
        net = make_net()
        start = copy.deepcopy(net)
        optimizer = SCHEDULE_FREE[name](net.parameters())
        LipschitzRegularizer(optimizer, weight=weight, reduction="sum")
        optimizer.train()
        train(net, optimizer, steps=10)
        optimizer.eval()
        distances.append(distance(net, start))
    assert distances[1] < 0.5 * distances[0]


@pytest.mark.parametrize("mode", ["proximal", "projected"])
@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_schedule_free_optimizers_are_refused_where_only_the_trained_point_would_move(name, mode):
    optimizer = SCHEDULE_FREE[name](make_net().parameters())
    with pytest.raises(ValueError, match="Schedule-free"):
        LipschitzRegularizer(optimizer, weight=1.0, mode=mode, radius=1.0 if mode == "projected" else None)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: transformers.Adafactor(p, lr=None, relative_step=True),
        lambda p: prodigyopt.Prodigy(p, lr=1.0),
    ],
)
def test_proximal_needs_a_learning_rate(make):
    optimizer = make(make_net().parameters())
    with pytest.raises(ValueError, match="'proximal' reads `lr`"):
        LipschitzRegularizer(optimizer, weight=1.0, mode="proximal")
    LipschitzRegularizer(optimizer, weight=1.0)


def test_sparse_gradients_are_refused_where_a_gradient_is_added():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(embedding.parameters())
    LipschitzRegularizer(optimizer, weight=1.0)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        optimizer.step()


@pytest.mark.parametrize("mode", ["proximal", "projected"])
def test_sparse_gradients_do_not_matter_where_parameters_are_moved_after_the_step(mode):
    ends = []
    for sparse in (True, False):
        torch.manual_seed(0)
        embedding = nn.Embedding(5, 3, sparse=sparse)
        optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
        radius = 0.05 if mode == "projected" else None
        LipschitzRegularizer(optimizer, weight=1.0, mode=mode, reduction="sum", radius=radius)
        for _ in range(3):
            embedding(torch.tensor([1, 4])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(embedding.weight.detach())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_with_a_closure_gives_the_same_bits(make, mode, by_name):
    def train(with_closure):
        parameter = nn.Parameter(torch.linspace(-1, 1, 8))
        optimizer = make([parameter])
        radius = 0.01 if mode == "projected" else None
        regularizer = LipschitzRegularizer(optimizer, weight=1.0, mode=mode, radius=radius)

        def closure():
            optimizer.zero_grad()
            loss = (parameter - 2).square().sum()
            loss.backward()
            return loss

        for _ in range(3):
            if with_closure:
                optimizer.step(closure=closure) if by_name else optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        return parameter.detach(), regularizer.metrics()["lipschitz/distance"], regularizer.penalty()

    (with_closure, distance, penalty), (without, *same) = train(True), train(False)
    assert torch.equal(with_closure, without) and [distance, penalty] == same
    assert distance == pytest.approx(0.01, rel=1e-4) if mode == "projected" else penalty > 0


@pytest.mark.parametrize("mode, found", [("coupled", 2 / (1 + 3)), ("proximal", 2 / (1 + 2 * 3)), ("projected", 0.1)])
def test_lbfgs_finds_the_minimum_of_loss_and_penalty(mode, found):
    """With the other modes that of the loss, which is then moved."""
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.LBFGS([parameter], line_search_fn="strong_wolfe")
    radius = 0.2 if mode == "projected" else None
    LipschitzRegularizer(optimizer, weight=3.0, reduction="sum", mode=mode, radius=radius)

    def closure():
        optimizer.zero_grad()
        loss = (parameter - 2).square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    torch.testing.assert_close(parameter.detach(), torch.full((4,), found))
    assert loss.item() == 4 * 4  # at the start, where the penalty is 0


def test_what_is_frozen_has_no_anchor_and_may_not_begin_to_train():
    net = make_net()
    optimizer = OPTIMIZERS["AdamW foreach"](net.parameters())
    regularizer = LipschitzRegularizer(optimizer, weight=WEIGHT)
    assert net.frozen not in {tensor for term in regularizer._terms.all for tensor in term.tensors()}
    train(net, optimizer, steps=1)
    net.frozen.requires_grad_()
    with pytest.raises(ValueError, match="was unfrozen"):
        train(net, optimizer, steps=1)


def test_anchors_of_another_copy_of_the_model_are_refused():
    net, other = make_net(), make_net()
    with pytest.raises(ValueError, match="None of `anchors` is for a parameter"):
        LipschitzRegularizer(
            OPTIMIZERS["AdamW foreach"](net.parameters()), weight=WEIGHT, anchors={p: p for p in other.parameters()}
        )
