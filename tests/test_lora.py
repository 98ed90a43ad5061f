# The penalty on LoRA: its arithmetic against autograd on the formed product, then the class on peft's layers.
# The penalty on other parameters is in test_functional.py and test_regularizer.py.
import copy
import dataclasses
import math
import warnings

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from test_functional import LargestTensor, Operations, assert_rounded, sum_error
from test_regularizer import LR, MODES, OPTIMIZERS, assert_identical, assert_same_training, distance
from torch import nn

from lipschitz_reg import LipschitzRegularizer, LoraAdapter, Moment, find_lora_adapters, functional, lora, terms


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# About that at which the gradients of penalty and loss are of one size.
WEIGHT = 200.0


class Net(nn.Module):
    """A convolution of kernel 3, one of kernel 1, a linear layer that is adapted and one that is not."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1).to(memory_format=torch.channels_last)
        self.mix = nn.Conv2d(8, 6, 1)
        self.wide = nn.Linear(6, 640)
        self.scale = nn.Parameter(torch.tensor(1.5))  # test_regularizer's `train` reads its dtype

    def forward(self, x):
        return self.wide(self.mix(self.conv(x)).mean((2, 3))) * self.scale


def make_net(dtype=torch.float32, started=True, **options):
    """With adapters; `started` means that B is not 0 any more."""
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["conv", "mix", "wide"], **options}
    inject_adapter_in_model(LoraConfig(**options), net)
    for name, parameter in net.named_parameters():
        if started and "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return net.to(dtype)


def trained(net):
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def make_optimizer(net, name="Adam foreach"):
    return OPTIMIZERS[name](trained(net))


def product(adapter):
    return (adapter.scaling * adapter.up.flatten(1) @ adapter.down.flatten(1)).detach()


def random_offsets(adapters):
    generator = torch.Generator().manual_seed(5)
    shapes = [(len(adapter.up), *adapter.down.shape[1:]) for adapter in adapters]
    return [0.01 * torch.randn(shape, generator=generator).to(a.down.dtype) for shape, a in zip(shapes, adapters)]


def in_float64(adapter):
    """A copy whose factors are leaves of a float64 graph."""
    down, up = (factor.detach().double().requires_grad_() for factor in (adapter.down, adapter.up))
    return dataclasses.replace(adapter, down=down, up=up)


def autograd(adapter, coefficient, offset=None, moment=None):
    """The penalty on the formed product and its gradients, in float64."""
    adapter = in_float64(adapter)
    term = lora.lora_penalty(adapter, coefficient, offset, moment)
    return term.detach(), torch.autograd.grad(term, (adapter.down, adapter.up))


def sizes(adapter, coefficient, offset=None, moment=None):
    """The same without signs: what the terms of a sum over them come to where none cancels another."""
    adapter = dataclasses.replace(adapter, down=adapter.down.detach().abs(), up=adapter.up.detach().abs())
    offset = None if offset is None else offset.abs()
    moment = None if moment is None else Moment(moment.root.abs(), moment.rest)
    return autograd(adapter, coefficient, offset, moment)


def terms_of(adapter, moment=None):
    """The most that one element of a gradient adds up."""
    columns = 0 if moment is None else moment.root.numel() // len(moment.root)
    return sum(adapter.up.shape[:2]) + adapter.down[0].numel() + columns


def assert_gradients_grew(gradients, before, adapter, *options):
    """By the gradients of the penalty, `None` being those that are not asked for."""
    changes, size = autograd(adapter, *options)[1], sizes(adapter, *options)[1]
    moment = options[2] if len(options) > 2 else None
    for gradient, start, change, own in zip(gradients, before, changes, size, strict=True):
        if gradient is not None:
            start = start.double()
            assert_rounded([gradient], [start + change], [start.abs() + own], terms_of(adapter, moment))


def assert_value(value, adapter, *options):
    """It is the penalty on the formed product."""
    assert value.dim() == 0 and value.dtype.itemsize >= 4
    assert_rounded([value], [autograd(adapter, *options)[0]], [sizes(adapter, *options)[0]], adapter.numel())


# The functions


@pytest.mark.parametrize("use_rslora", [False, True])
def test_penalty_is_the_squared_norm_of_what_peft_adds(use_rslora):
    net = make_net(torch.float64, use_rslora=use_rslora)
    layers = [module for module in net.modules() if isinstance(module, LoraLayer)]
    adapters = find_lora_adapters(net)
    assert len(layers) == 3
    for layer, adapter in zip(layers, adapters, strict=True):
        expected = layer.get_delta_weight("default").square().sum()
        torch.testing.assert_close(lora.squared_delta(adapter), expected)
        torch.testing.assert_close(lora.lora_penalty(adapter, 3.0), 3 * expected)


def random_moments(adapters):
    generator = torch.Generator().manual_seed(1)
    rows = [adapter.down[0].numel() for adapter in adapters]
    return [Moment(torch.randn(n, 3, generator=generator), torch.tensor(0.2)) for n in rows]


@pytest.mark.parametrize("with_moment", [False, True], ids=["", "moment"])
@pytest.mark.parametrize("with_offset", [False, True], ids=["", "offset"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_and_value_equal_autograd_on_the_formed_product(dtype, with_offset, with_moment):
    adapters = find_lora_adapters(make_net(dtype))
    offsets = random_offsets(adapters) if with_offset else [None] * 3
    moments = random_moments(adapters) if with_moment else [None] * 3
    for adapter, c, offset, moment in zip(adapters, (0.3, 20.0, torch.tensor(4.0)), offsets, moments, strict=True):
        gradients = torch.rand_like(adapter.down), torch.rand_like(adapter.up)
        before = copy.deepcopy(gradients)
        value = lora.add_lora_penalty_gradient_(gradients, adapter, c, offset, moment)
        assert_gradients_grew(gradients, before, adapter, c, offset, moment)
        assert_value(value, adapter, c, offset, moment)
        assert_value(lora.squared_delta(adapter, offset, moment), adapter, 1.0, offset, moment)


@pytest.mark.parametrize("scale", [1.0, 8.0, torch.tensor(8.0)], ids=["", "number", "tensor"])
@pytest.mark.parametrize("with_moment", [False, True], ids=["", "moment"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_adapters_of_one_shape_equal_those_alone(dtype, with_moment, scale):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    adapters = [LoraAdapter(str(i), randn(2, 3, 2, 2), randn(5, 2, 1, 1), 0.5 + i) for i in range(3)]
    moments = random_moments(adapters) if with_moment else [None] * 3
    coefficients, gradients = [0.3, 2.0, 0.1], [(randn(2, 3, 2, 2), randn(5, 2, 1, 1)) for _ in adapters]
    alone = copy.deepcopy(gradients)
    values = lora.add_lora_penalty_gradients_(gradients, adapters, coefficients, moments, scale)
    expected = [
        lora.add_lora_penalty_gradient_(own, adapter, c * float(scale), None, moment) / scale
        for own, adapter, c, moment in zip(alone, adapters, coefficients, moments, strict=True)
    ]
    torch.testing.assert_close(sum(values), sum(expected), rtol=1e-5, atol=0)
    for own, other in zip(gradients, alone, strict=True):
        for gradient, reference in zip(own, other, strict=True):
            eps = max(torch.finfo(dtype).eps, with_moment * torch.finfo(torch.float32).eps)
            torch.testing.assert_close(gradient, reference, rtol=2 * eps, atol=2000 * eps)


def test_adapters_that_share_a_factor_are_not_added_to_it_in_one_operation(monkeypatch):
    """On a GPU one of the two would be lost."""
    batches, together = [], terms.add_lora_penalty_gradients_
    monkeypatch.setattr(terms, "add_lora_penalty_gradients_", lambda *a: batches.append(a[0]) or together(*a))
    down, ups = torch.randn(2, 6), [torch.randn(4, 2) for _ in range(3)]
    adapters = [LoraAdapter(str(i), down if i < 2 else torch.randn(2, 6), up, 1.0) for i, up in enumerate(ups)]
    factors = list(dict.fromkeys(factor for adapter in adapters for factor in (adapter.down, adapter.up)))
    for factor in factors:
        factor.requires_grad_().grad = torch.zeros_like(factor)
    LipschitzRegularizer(torch.optim.SGD(factors), weight=1.0, adapters=adapters, reduction="sum").add_gradient()
    assert [len(batch) for batch in batches] == [2]
    loss = sum((adapter.up @ adapter.down).square().sum() for adapter in adapters)
    for factor, gradient in zip(factors, torch.autograd.grad(loss, factors), strict=True):
        torch.testing.assert_close(factor.grad, gradient)


def test_operations_do_not_grow_with_the_number_of_adapters():
    counts = []
    for number in (20, 200):
        adapters = [LoraAdapter(str(i), torch.ones(2, 6), torch.ones(4, 2), 1.0) for i in range(number)]
        for factor in (factor for adapter in adapters for factor in (adapter.down, adapter.up)):
            factor.requires_grad_().grad = torch.zeros_like(factor)
        optimizer = torch.optim.SGD([factor for adapter in adapters for factor in (adapter.down, adapter.up)], lr=0.1)
        regularizer = LipschitzRegularizer(optimizer, weight=1.0, adapters=adapters)
        with Operations() as operations:
            regularizer.add_gradient()
        counts.append(operations.count)
    assert counts[0] == counts[1] < 40


def test_reference_is_the_trace_with_the_moment():
    adapter = find_lora_adapters(make_net(torch.float64))[0]
    (moment, *_), (offset, *_) = random_moments([adapter]), random_offsets([adapter])
    delta = offset.flatten(1) + product(adapter)
    dense = moment.root.double() @ moment.root.double().T + moment.rest.double() * torch.eye(len(moment.root)).double()
    expected = 0.7 * torch.trace(delta @ dense @ delta.T)
    torch.testing.assert_close(lora.lora_penalty(adapter, 0.7, offset, moment), expected)


def test_where_up_is_zero_nothing_changes_a_bit():
    for adapter in find_lora_adapters(make_net(started=False)):
        gradients = torch.rand_like(adapter.down), torch.rand_like(adapter.up)
        before = copy.deepcopy(gradients)
        assert lora.add_lora_penalty_gradient_(gradients, adapter, 500.0) == 0
        assert all(torch.equal(gradient, start) for gradient, start in zip(gradients, before, strict=True))
        assert lora.squared_delta(adapter) == 0


def test_the_product_is_never_formed():
    adapter = LoraAdapter("wide", torch.randn(4, 500), torch.randn(600, 4), 1.0)
    gradients = torch.zeros_like(adapter.down), torch.zeros_like(adapter.up)
    with LargestTensor([adapter.down, adapter.up, *gradients]) as largest:
        lora.add_lora_penalty_gradient_(gradients, adapter, 0.1)
        lora.squared_delta(adapter)
    assert 0 < largest.bytes <= 4 * adapter.up.numel()


def test_autocast_costs_no_digits():
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            for adapter in find_lora_adapters(make_net()):
                gradients = torch.zeros_like(adapter.down), torch.zeros_like(adapter.up)
                value = lora.add_lora_penalty_gradient_(gradients, adapter, 0.3)
                results.append((*gradients, value, lora.squared_delta(adapter)))
    plain, under_autocast = results[:3], results[3:]
    for one, other in zip(plain, under_autocast, strict=True):
        assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


def test_float16_gradient_saturates_and_passes_overflow_on():
    adapter = LoraAdapter("x", torch.ones(1, 3, dtype=torch.float16), torch.ones(1, 1, dtype=torch.float16), 1.0)
    gradient = torch.tensor([[65000.0, 1.0, float("inf")]], dtype=torch.float16)
    lora.add_lora_penalty_gradient_((gradient, None), adapter, 10000.0)
    assert gradient.tolist() == [[65504.0, 20000.0, float("inf")]]


def test_only_active_adapters_are_found_and_names_tell_them_apart():
    net = make_net()
    assert [adapter.name for adapter in find_lora_adapters(net)] == ["conv", "mix", "wide"]
    assert [adapter.name for adapter in find_lora_adapters(net, prefix="unet")] == [
        "unet.conv",
        "unet.mix",
        "unet.wide",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of a second adapter
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["wide"]), net, adapter_name="second")
    for layer, active in ((net.conv, "default"), (net.mix, "default"), (net.wide, ["default", "second"])):
        layer.set_adapter(active)
    adapters = find_lora_adapters(net)
    assert [adapter.name for adapter in adapters] == ["conv", "mix", "wide.default", "wide.second"]
    assert adapters[3].up is net.wide.lora_B["second"].weight and adapters[3].scaling == 4
    net.wide.set_adapter(["second"])
    assert [adapter.down for adapter in find_lora_adapters(net)][2] is net.wide.lora_A["second"].weight


def test_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="Net has no active LoRA adapter"):
        find_lora_adapters(Net())


def test_grouped_convolution_is_refused():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), net)
    with pytest.raises(ValueError, match="LoRA adapter 0 is on a grouped convolution"):
        find_lora_adapters(net)


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"LoRA adapter x do not fit.*\(2, 6\), \(4, 3\)"):
        LoraAdapter("x", torch.ones(2, 6), torch.ones(4, 3), 1.0)


# The class


class Reference:
    """The penalty by autograd in float64, on formed products, around the steps of a plain optimizer."""

    def __init__(
        self, net, optimizer, weight=WEIGHT, reduction="tensor_mean", form="delta", mode="coupled", radius=None
    ):
        self.optimizer, self.weight, self.reduction, self.form = optimizer, weight, reduction, form
        self.mode, self.radius = mode, radius
        self.adapters = find_lora_adapters(net)
        factors = [factor for adapter in self.adapters for factor in (adapter.down, adapter.up)]
        self.plain = [p for p in trained(net) if all(p is not factor for factor in factors)]
        self.anchors = [p.detach().double() for p in self.plain]
        if form == "factors":
            self.plain += factors
            self.anchors += [torch.zeros_like(factor, dtype=torch.float64) for factor in factors]

    def penalty(self):
        """The penalty, and the leaves of its graph with the parameters that they stand for."""
        adapters = [in_float64(adapter) for adapter in (self.adapters if self.form == "delta" else [])]
        points = [p.detach().double().requires_grad_() for p in self.plain]
        numels = [p.numel() for p in points] + [product(adapter).numel() for adapter in adapters]
        weights = [self.weight * factor for factor in functional.reductions(numels, self.reduction)]
        term = functional.penalty(points, self.anchors, weights[: len(points)])
        term = term + sum(lora.lora_penalty(*row) for row in zip(adapters, weights[len(points) :]))
        leaves = dict(zip(self.plain, points))
        for adapter, copied in zip(self.adapters, adapters):
            leaves |= {adapter.down: copied.down, adapter.up: copied.up}
        return term, leaves

    def before_step(self):
        if self.mode == "coupled":
            term, leaves = self.penalty()
            for parameter, gradient in zip(leaves, torch.autograd.grad(term, leaves.values())):
                parameter.grad.copy_(parameter.grad.double() + gradient)

    @torch.no_grad()
    def after_step(self):
        if self.mode == "proximal":
            factors = functional.reductions([p.numel() for p in self.plain], self.reduction)
            steps = [LR * self.weight * factor for factor in factors]
            results = functional.proximal_step([p.double() for p in self.plain], self.anchors, steps)
        elif self.mode == "projected":
            results = functional.project([p.double() for p in self.plain], self.anchors, self.radius)
        else:
            return
        for parameter, result in zip(self.plain, results):
            parameter.copy_(result)


def backward(net, seed):
    batch = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed)).to(net.scale.dtype)
    net(batch).square().mean().backward()


def train(net, optimizer, steps=4, first=0, before_step=lambda: None, after_step=lambda: None):
    for seed in range(first, first + steps):
        optimizer.zero_grad()
        backward(net, seed)
        before_step()
        optimizer.step()
        after_step()
    return net


def train_reference(net, name, steps=4, **options):
    optimizer = make_optimizer(net, name)
    runner = Reference(net, optimizer, **options)
    return train(net, optimizer, steps, before_step=runner.before_step, after_step=runner.after_step)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_equals_autograd(name, dtype, use_dora):
    """DoRA's magnitudes are anchored to their start, as any parameter that is no factor."""
    net, reference, plain = (make_net(dtype, use_dora=use_dora) for _ in range(3))
    optimizer = make_optimizer(net, name)
    LipschitzRegularizer(optimizer, weight=WEIGHT, adapters=find_lora_adapters(net))
    train(net, optimizer)
    train_reference(reference, name)
    train(plain, make_optimizer(plain, name))
    assert_same_training(net, reference, name, plain)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["sum", "tensor_mean"])
def test_form_of_the_authors_equals_autograd(reduction, mode):
    options = {"weight": 0.01 if reduction == "sum" else 2.0, "reduction": reduction, "mode": mode, "radius": 1.0}
    net, reference = make_net(use_dora=True), make_net(use_dora=True)
    optimizer = make_optimizer(net, "SGD")
    LipschitzRegularizer(optimizer, adapters=find_lora_adapters(net), lora_form="factors", **options)
    train(net, optimizer)
    train_reference(reference, "SGD", form="factors", **options)
    plain = make_net(use_dora=True)
    assert_same_training(net, reference, plain=train(plain, make_optimizer(plain, "SGD")))


@pytest.mark.parametrize("reduction", ["sum", "tensor_mean", "mean"])
def test_reductions_count_the_elements_of_the_product(reduction):
    net, reference = make_net(use_dora=True), make_net(use_dora=True)
    optimizer = make_optimizer(net, "SGD")
    LipschitzRegularizer(optimizer, weight=0.5, reduction=reduction, adapters=find_lora_adapters(net))
    train(net, optimizer)
    train_reference(reference, "SGD", weight=0.5, reduction=reduction)
    plain = make_net(use_dora=True)
    assert_same_training(net, reference, plain=train(plain, make_optimizer(plain, "SGD")))


@pytest.mark.parametrize("name", ["SGD", "SGD fused", "AdamW fused", "AdamW8bit"])
def test_with_grad_scaler_training_equals_autograd(name):
    net, reference, plain = make_net(), make_net(), make_net()
    optimizer = make_optimizer(net, name)
    LipschitzRegularizer(optimizer, weight=WEIGHT, adapters=find_lora_adapters(net))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for seed in range(4):
        optimizer.zero_grad()
        batch = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
        scaler.scale(net(batch).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same_training(net, train_reference(reference, name), name, train(plain, make_optimizer(plain, name)))


def test_first_step_is_that_of_training_without():
    net, plain = make_net(started=False), make_net(started=False)
    optimizer = make_optimizer(net)
    regularizer = LipschitzRegularizer(optimizer, weight=WEIGHT, adapters=find_lora_adapters(net))
    assert regularizer.metrics()["lipschitz/penalty"] == 0
    assert_identical(train(net, optimizer, steps=1), train(plain, make_optimizer(plain), steps=1))
    assert regularizer.penalty() == 0 and regularizer.metrics()["lipschitz/distance"] > 0


def test_distance_is_smaller_than_without():
    distances = []
    for weight in (1e-9, WEIGHT):
        net = make_net(started=False)
        optimizer = make_optimizer(net)
        regularizer = LipschitzRegularizer(optimizer, weight=weight, adapters=find_lora_adapters(net))
        train(net, optimizer, steps=20)
        distances.append(regularizer.metrics()["lipschitz/distance"])
    assert distances[1] < 0.7 * distances[0]


def test_projection_ends_at_the_nearest_products_in_the_ball():
    """Which are all products, and the way of all other parameters from their anchors, made smaller by one factor."""
    net, plain = make_net(use_dora=True), make_net(use_dora=True)
    optimizer, adapters = make_optimizer(net, "SGD"), find_lora_adapters(net)
    regularizer = LipschitzRegularizer(optimizer, weight=1.0, mode="projected", radius=0.2, adapters=adapters)
    start = {name: p.detach().clone() for name, p in net.named_parameters() if "magnitude" in name}
    train(net, optimizer, steps=1)
    train(plain, make_optimizer(plain, "SGD"), steps=1)
    assert regularizer.metrics()["lipschitz/distance"] == pytest.approx(0.2, rel=1e-5)
    pairs = [(product(a), product(b)) for a, b in zip(adapters, find_lora_adapters(plain))]
    moved = dict(plain.named_parameters())
    pairs += [(p.detach() - start[n], moved[n].detach() - start[n]) for n, p in net.named_parameters() if n in start]
    ratio = 0.2 / math.sqrt(sum(before.square().sum().item() for _, before in pairs))
    assert len(pairs) == 6 and ratio < 1
    for after, before in pairs:
        torch.testing.assert_close(after, ratio * before, rtol=1e-3, atol=1e-6)


def test_groups_have_their_own_weight():
    net = make_net()
    groups = [{"params": [p for n, p in net.named_parameters() if "wide.lora" in n], "lipschitz_weight": 0.0}]
    groups += [{"params": [p for n, p in net.named_parameters() if "conv.lora" in n], "lipschitz_weight": 3.0}]
    groups += [{"params": [p for n, p in net.named_parameters() if "mix.lora" in n]}]
    optimizer, adapters = torch.optim.SGD(groups, lr=LR), find_lora_adapters(net)
    regularizer = LipschitzRegularizer(optimizer, weight=5.0, adapters=adapters)
    backward(net, 0)
    plain = [[factor.grad.clone() for factor in (a.down, a.up)] for a in adapters]
    regularizer.add_gradient()
    for adapter, before, weight in zip(adapters, plain, (3.0, 5.0, 0.0), strict=True):
        assert_gradients_grew((adapter.down.grad, adapter.up.grad), before, adapter, weight / adapter.numel())


def test_factors_in_groups_of_different_weight_are_refused():
    net = make_net()
    downs = [p for n, p in net.named_parameters() if "lora_A" in n]
    ups = [p for n, p in net.named_parameters() if "lora_B" in n]
    optimizer = torch.optim.SGD([{"params": downs, "lipschitz_weight": 0.0}, {"params": ups}], lr=LR)
    with pytest.raises(ValueError, match="adapter conv have different weights"):
        LipschitzRegularizer(optimizer, weight=1.0, adapters=find_lora_adapters(net))


def test_frozen_down_factors_stay_and_up_factors_are_penalized():
    net = make_net()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    start = copy.deepcopy(net)
    optimizer, adapters = make_optimizer(net, "SGD"), find_lora_adapters(net)
    regularizer = LipschitzRegularizer(optimizer, weight=5.0, adapters=adapters)
    backward(net, 0)
    before = [(None, adapter.up.grad.clone()) for adapter in adapters]
    regularizer.add_gradient()
    for adapter, plain in zip(adapters, before, strict=True):
        assert_gradients_grew((adapter.down.grad, adapter.up.grad), plain, adapter, 5.0 / adapter.numel())
    assert all(adapter.down.grad is None for adapter in adapters)
    optimizer.step()
    assert all(torch.equal(net.get_parameter(n), p) for n, p in start.named_parameters() if "lora_A" in n)


def test_adapter_without_gradients_waits():
    net = make_net()
    optimizer = make_optimizer(net, "SGD")
    LipschitzRegularizer(optimizer, weight=5.0, adapters=find_lora_adapters(net))
    optimizer.step()
    assert_identical(net, make_net())


def test_weight_zero_is_bit_identical_to_training_without():
    net, plain = make_net(), make_net()
    optimizer = make_optimizer(net)
    LipschitzRegularizer(optimizer, weight=0.0, adapters=find_lora_adapters(net))
    assert not optimizer._optimizer_step_pre_hooks
    assert_identical(train(net, optimizer), train(plain, make_optimizer(plain)))


@pytest.mark.parametrize("form", ["delta", "factors"])
def test_metrics_equal_their_definition(form):
    net = make_net(torch.float32, use_dora=True)
    optimizer, adapters = make_optimizer(net), find_lora_adapters(net)
    runner = Reference(net, optimizer, form=form)
    regularizer = LipschitzRegularizer(optimizer, weight=WEIGHT, adapters=adapters, lora_form=form)
    train(net, optimizer, steps=3)
    penalty = runner.penalty()[0].item()
    train(net, optimizer, steps=1, first=3)
    squares = {f"lipschitz/distance/{adapter.name}": product(adapter).double().square().sum() for adapter in adapters}
    magnitudes = runner.plain[:3]
    moved = functional.penalty([p.detach().double() for p in magnitudes], runner.anchors[:3], [1.0] * 3)
    distance = math.sqrt(sum(squares.values()) + moved)
    norm = math.sqrt(
        sum(adapter.weight.double().square().sum() for adapter in adapters)
        + sum(anchor.square().sum() for anchor in runner.anchors[:3])
    )
    expected = {"lipschitz/distance": distance, "lipschitz/relative_distance": distance / norm}
    expected["lipschitz/penalty"] = penalty  # in the loss of the last step
    expected |= {name: square.sqrt().item() for name, square in squares.items()}
    metrics = regularizer.metrics(per_adapter=True)
    assert all(type(value) is float for value in metrics.values())
    assert metrics == pytest.approx(expected, rel=sum_error(sum(adapter.numel() for adapter in adapters)))
    assert regularizer.metrics().keys() == {"lipschitz/penalty", "lipschitz/distance", "lipschitz/relative_distance"}


def test_relative_distance_is_unknown_where_the_weight_is():
    adapter = LoraAdapter("x", nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.ones(2, 1)), 1.0)
    optimizer = torch.optim.SGD([adapter.down, adapter.up], lr=0.1)
    metrics = LipschitzRegularizer(optimizer, weight=1.0, adapters=[adapter]).metrics()
    assert metrics["lipschitz/distance"] == 2 and math.isnan(metrics["lipschitz/relative_distance"])


def test_metrics_warn_of_a_loop_that_bypasses_the_optimizer_and_not_of_adapters_that_were_loaded():
    net = make_net()
    regularizer = LipschitzRegularizer(make_optimizer(net), weight=1.0, adapters=find_lora_adapters(net))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regularizer.metrics()
    net.wide.lora_B["default"].weight.data.add_(1.0)
    with pytest.warns(UserWarning, match="step"):
        regularizer.metrics()


@pytest.mark.parametrize("form", ["delta", "factors"])
def test_resumed_training_is_bit_identical(form):
    def start():
        net = make_net(use_dora=True)
        optimizer = make_optimizer(net)
        return (
            net,
            optimizer,
            LipschitzRegularizer(optimizer, weight=WEIGHT, adapters=find_lora_adapters(net), lora_form=form),
        )

    net, optimizer, regularizer = start()
    train(net, optimizer)
    checkpoint = copy.deepcopy([net.state_dict(), optimizer.state_dict(), regularizer.state_dict()])
    train(net, optimizer, first=4)
    resumed, optimizer, regularizer = start()
    for part, state in zip((resumed, optimizer, regularizer), checkpoint, strict=True):
        part.load_state_dict(state)
    assert_identical(train(resumed, optimizer, first=4), net)


@pytest.mark.parametrize("form", ["delta", "factors"])
def test_copy_of_an_optimizer_penalizes_the_factors_of_the_copied_model(form):
    net = make_net(use_dora=True)
    optimizer = make_optimizer(net)
    LipschitzRegularizer(optimizer, weight=WEIGHT, adapters=find_lora_adapters(net), lora_form=form)
    train(net, optimizer, steps=2)
    copied, copied_optimizer = copy.deepcopy((net, optimizer))
    train(net, optimizer, steps=2, first=2)
    train(copied, copied_optimizer, steps=2, first=2)
    assert_identical(net, copied)
    plain = make_net(use_dora=True)
    assert distance(net, train(plain, make_optimizer(plain))) > 0.01


@pytest.mark.parametrize("change", ["base", "form"])
def test_checkpoint_of_another_base_or_form_is_refused(change):
    states = []
    for changed in (False, True):
        net = make_net()
        if changed and change == "base":
            net.wide.base_layer.weight.data[0, 0] += 1e-3
        form = "factors" if changed and change == "form" else "delta"
        regularizer = LipschitzRegularizer(
            make_optimizer(net), weight=1.0, adapters=find_lora_adapters(net), lora_form=form
        )
        states.append(regularizer.state_dict())
    with pytest.raises(ValueError, match="another base model"):
        regularizer.load_state_dict(states[0])


def test_removed_it_leaves_plain_training():
    net, plain = make_net(), make_net()
    optimizer = make_optimizer(net)
    regularizer = LipschitzRegularizer(optimizer, weight=WEIGHT, adapters=find_lora_adapters(net))
    regularizer.remove()
    assert_identical(train(net, optimizer), train(plain, make_optimizer(plain)))
    with pytest.raises(ValueError, match="remove"):
        regularizer.metrics()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "proximal"}, "no closed form"),
        ({"lora_form": "product"}, "delta, factors, not 'product'"),
        ({"mode": "projected", "radius": 1.0, "anchored": True}, "not their own anchors"),
        ({"lora_form": "factors", "anchored": True}, "not their own anchors"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message):
    net = make_net()
    adapters, (own, *_) = find_lora_adapters(net), find_lora_adapters(net)
    options = dict(options)
    anchors = {own.weight: own.weight.detach() + 1} if options.pop("anchored", False) else {}
    with pytest.raises(ValueError, match=message):
        LipschitzRegularizer(make_optimizer(net), weight=1.0, adapters=adapters, anchors=anchors, **options)


def test_weights_may_have_anchors_of_their_own():
    """As a fine-tuned base: what it has moved already counts, in adapters and in other parameters."""
    net, base = make_net(started=False), make_net(started=False)
    net.scale.requires_grad_()
    with torch.no_grad():
        net.wide.base_layer.weight.add_(0.3)
        net.scale.add_(0.5)
    anchors = {net.wide.base_layer.weight: base.wide.base_layer.weight.detach(), net.scale: base.scale.detach()}
    optimizer = make_optimizer(net, "SGD")
    regularizer = LipschitzRegularizer(optimizer, weight=5.0, anchors=anchors, adapters=find_lora_adapters(net))
    moved = 0.09 * net.wide.weight.numel()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = regularizer.metrics()
    assert metrics["lipschitz/distance"] == pytest.approx(math.sqrt(moved + 0.25), rel=1e-5)
    assert metrics["lipschitz/penalty"] == pytest.approx(5 * (0.09 + 0.25), rel=1e-5)
    net.scale.grad = torch.zeros_like(net.scale)
    regularizer.add_gradient()
    assert net.scale.grad.item() == pytest.approx(5 * 2 * 0.5)


def test_anchor_of_another_shape_is_refused():
    net = make_net()
    with pytest.raises(ValueError, match=r"shape \(2,\).*\(640, 6\)"):
        LipschitzRegularizer(
            make_optimizer(net),
            weight=1.0,
            anchors={net.wide.base_layer.weight: torch.zeros(2)},
            adapters=find_lora_adapters(net),
        )


def test_penalty_brings_weights_that_had_moved_back_to_their_anchor():
    """The base was moved by what LoRA of this rank can undo, and the anchor says how far."""
    net = make_net(started=False)
    weight, moved = net.wide.base_layer.weight, 0.05 * torch.randn(640, 2) @ torch.randn(2, 6)
    anchors = {weight: weight.detach() - moved}
    optimizer = torch.optim.Adam(trained(net), lr=0.02)
    regularizer = LipschitzRegularizer(optimizer, weight=1.0, anchors=anchors, adapters=find_lora_adapters(net))
    before = regularizer.metrics()["lipschitz/distance"]
    assert before == pytest.approx(moved.norm().item(), rel=1e-4)
    for _ in range(300):
        for parameter in trained(net):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert regularizer.metrics()["lipschitz/distance"] < 0.02 * before


def test_a_checkpoint_goes_on_after_the_adapters_were_merged_for_a_while():
    """Merging and unmerging rounds the weights, by which the base is known."""
    net, again = make_net(), make_net()
    regularizer, other = (
        LipschitzRegularizer(make_optimizer(n), weight=WEIGHT, adapters=find_lora_adapters(n)) for n in (net, again)
    )
    before = net.wide.base_layer.weight.clone()
    for merge in ("merge", "unmerge"):
        for layer in net.modules():
            if isinstance(layer, LoraLayer):
                getattr(layer, merge)()
    assert not torch.equal(net.wide.base_layer.weight, before)
    other.load_state_dict(regularizer.state_dict())


def test_adapters_that_share_a_factor_are_all_found():
    pair = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 7)])
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "1"]), pair)
    pair[1].lora_A.default.weight = pair[0].lora_A.default.weight
    assert len(lora.find_adapters([p for p in pair.parameters() if p.requires_grad])) == 2


def test_a_frozen_up_factor_is_not_moved_by_the_projection():
    net = make_net()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora_A" in name)
    adapters = find_lora_adapters(net)
    before = [(adapter.down.clone(), adapter.up.clone()) for adapter in adapters]
    regularizer = LipschitzRegularizer(
        make_optimizer(net, "SGD"), weight=1.0, mode="projected", radius=0.01, adapters=adapters
    )
    regularizer.optimizer.step()
    assert regularizer.metrics()["lipschitz/distance"] == pytest.approx(0.01, rel=1e-4)
    for adapter, (down, up) in zip(adapters, before, strict=True):
        assert torch.equal(adapter.up, up) and not torch.equal(adapter.down, down)
