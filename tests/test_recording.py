# What record_inputs keeps of a layer, and the penalty measured in it, against layers run in float64 and autograd.
# The penalty without it is in test_functional.py, test_regularizer.py and test_lora.py.
import copy

import pytest
import torch
import torch.nn.functional as F
from test_functional import assert_rounded
from test_lora import absolute, product, random_offsets, terms_of, trained
from test_lora import make_net as make_lora_net
from test_regularizer import LR, OPTIMIZERS, assert_same_training
from torch import nn

from lipschitz_reg import (
    InputMoment,
    LipschitzRegularizer,
    LoraAdapter,
    find_lora_adapters,
    functional,
    lora,
    record_inputs,
)


WEIGHT = 3.0
LEAST = 1e-3  # of the mean, for every direction


class Net(nn.Module):
    """Strided, dilated and channels_last convolutions, a norm, linear layers with and without bias, 3-d inputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1).to(memory_format=torch.channels_last)
        self.dilated = nn.Conv2d(8, 8, (1, 3), padding=(0, 2), dilation=(1, 2))
        self.norm = nn.GroupNorm(2, 8)
        self.wide = nn.Linear(8, 24)
        self.mix = nn.Linear(24, 5, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        x = self.norm(self.dilated(self.conv(x)))
        return self.mix(self.wide(x.flatten(2).mT).tanh()) * self.scale


def make_net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def batches(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    # Smooth ones of different sizes: neighbouring pixels agree, as in a picture.
    for size in (2, 3):
        yield F.avg_pool2d(torch.randn(size, 3, 12, 14, generator=generator), 3, 1).to(dtype) + 0.3


def record(net, **options):
    with record_inputs(net, **options) as inputs:
        for batch in batches(net.scale.dtype):
            net(batch)
    return inputs


def dense(moment, rows):
    """M as a matrix (n, n) in float64."""
    return moment.factor.double() @ moment.factor.double().T + moment.rest.double() * torch.eye(rows).double()


def outputs_of(net, module):
    """What a layer gives for each batch while another net is run."""
    kept = []
    handle = module.register_forward_hook(lambda module, args, output: kept.append((args[0], output)))
    with torch.no_grad():
        for batch in batches(torch.float64):
            net(batch)
    handle.remove()
    return kept


@pytest.mark.parametrize(
    "name", ["conv.weight", "conv.bias", "dilated.weight", "dilated.bias", "wide.weight", "wide.bias", "mix.weight"]
)
def test_the_penalty_is_the_relative_change_of_what_a_layer_gives(name):
    """Measured by moving the parameter and running the layer, to the thousandth that is added for every direction."""
    net, (name, kind) = make_net(), name.split(".")
    exact = copy.deepcopy(net).double()
    layer, parameter = getattr(exact, name), getattr(getattr(net, name), kind)
    displacement = 0.1 * torch.randn_like(parameter, dtype=torch.float64)
    kept = outputs_of(exact, layer)
    with torch.no_grad():
        getattr(layer, kind).add_(displacement)
        change = sum((layer(given) - output).square().sum() for given, output in kept)
    expected = (change / sum(output.square().sum() for _, output in kept)).item()
    parameter_moment = record(net)[parameter]
    with torch.no_grad():
        parameter.add_(displacement)
    anchor = parameter.detach().double() - displacement
    square = functional.penalty([parameter.double()], [anchor], [1 / parameter.numel()], [parameter_moment])
    assert expected > 1e-3
    assert square.item() == pytest.approx(expected, rel=3 * LEAST)


def test_second_moments_are_those_of_the_inputs():
    net = make_net()
    inputs = record(net)
    exact = copy.deepcopy(net).double()
    (first, one), (second, two) = outputs_of(exact, exact.wide)
    rows, outputs = (torch.cat([t.flatten(0, 1) for t in pair]) for pair in ((first, second), (one, two)))
    second_moment = rows.T @ rows / len(rows)
    least = LEAST * second_moment.diagonal().mean() * torch.eye(8)
    expected = 8 * (second_moment + least) / outputs.square().mean()
    torch.testing.assert_close(dense(inputs[net.wide.weight], 8), expected, rtol=1e-3, atol=1e-4)


def test_a_layer_of_many_inputs_is_sketched():
    """Where they lie in as few directions as the sketch has, nothing is lost; elsewhere its trace is kept."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 4)
    directions = torch.randn(6, 40)
    for noise, tolerance in ((0.0, 3 * LEAST), (0.3, 0.2)):
        rows = torch.randn(500, 6) @ directions + noise * torch.randn(500, 40)
        with record_inputs(layer, rank=6) as inputs:
            layer(rows)
        moment = inputs[layer.weight]
        assert moment.factor.shape == (40, 6)
        exact = 40 * rows.T.double() @ rows.double() / 500 / layer(rows).detach().double().square().mean()
        approximate = dense(moment, 40)
        assert (approximate - exact).norm() < tolerance * exact.norm()
        assert approximate.trace() == pytest.approx(exact.trace().item(), rel=1.1 * LEAST)
        assert torch.linalg.eigvalsh(approximate)[0] >= 0.99 * LEAST * exact.diagonal().mean()


def test_what_the_inputs_do_not_have_is_nearly_free():
    torch.manual_seed(0)
    layer = nn.Linear(10, 4)
    given = torch.randn(200, 10)
    given[:, 7] = 0
    with record_inputs(layer) as inputs:
        layer(given)
    along, across = torch.zeros(2, 4, 10)
    along[:, 3] = across[:, 7] = 1
    costs = [inputs[layer.weight].squared_norm(displacement) for displacement in (along, across)]
    assert 0 < costs[1] < 2 * LEAST * costs[0]


def test_an_embedding_counts_by_the_size_of_its_rows():
    words = nn.Embedding(5, 8)
    with record_inputs(words) as inputs:
        words(torch.arange(5))
    displacement = torch.randn(5, 8)
    expected = (displacement.square().sum() / words.weight.detach().square().sum()).item()
    assert inputs[words.weight].squared_norm(displacement).item() / 40 == pytest.approx(expected, rel=1e-5)


def test_rounding_errors_are_no_directions():
    """Inputs of few directions leave a sketch of more columns to be inverted where it is nothing."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 4)
    rows = torch.randn(500, 3) @ torch.randn(3, 40)
    with record_inputs(layer, rank=6) as inputs:
        layer(rows)
    exact = 40 * rows.T.double() @ rows.double() / 500 / layer(rows).detach().double().square().mean()
    assert (dense(inputs[layer.weight], 40) - exact).norm() < 3 * LEAST * exact.norm()


def test_recording_leaves_autocast():
    torch.manual_seed(0)
    layer, given = nn.Linear(10, 4), torch.randn(50, 10)
    with record_inputs(layer) as inputs:
        layer(given)
    with record_inputs(layer) as under_autocast, torch.autocast("cpu", dtype=torch.bfloat16):
        layer(given)  # rounds its outputs, but not what it is given
    output = layer(given).square().mean() / layer(given.bfloat16().float()).bfloat16().float().square().mean()
    factors = [m[layer.weight].factor @ m[layer.weight].factor.T for m in (inputs, under_autocast)]
    torch.testing.assert_close(factors[0] * output.detach(), factors[1], rtol=2e-3, atol=2e-3)


def test_inputs_by_keyword_and_outputs_that_are_no_tensor():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.shift = nn.Linear(3, 2), nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.layer(input=x), self.shift

    pair, layer = Pair(), nn.Linear(3, 2)
    layer.load_state_dict(pair.layer.state_dict())
    given = torch.randn(4, 3)
    with record_inputs(pair, layer) as inputs:
        pair(given), layer(given)
    assert set(inputs) == {*pair.layer.parameters(), *layer.parameters()}
    assert torch.equal(inputs[pair.layer.weight].factor, inputs[layer.weight].factor)


def test_recording_twice_gives_the_same_bits():
    first, second = (record(make_net(), rank=4) for _ in range(2))
    for one, other in zip(first.values(), second.values(), strict=True):
        assert torch.equal(one.factor, other.factor) and torch.equal(one.rest, other.rest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_models_of_other_dtypes_are_recorded(dtype):
    exact, inputs = record(make_net()), record(make_net(dtype))
    for one, other in zip(exact.values(), inputs.values(), strict=True):
        assert other.factor.dtype == other.rest.dtype == torch.float32
        assert (one.factor @ one.factor.T - other.factor @ other.factor.T).norm() <= 0.05 * one.factor.norm() ** 2


def test_a_record_that_began_in_inference_mode_goes_on_outside_it():
    net, first = make_net(), next(batches())
    with record_inputs(net) as inputs:
        with torch.inference_mode():
            net(first)
        with torch.no_grad():
            net(first)
    with record_inputs(net) as expected:
        net(first)
    for one, other in zip(inputs.values(), expected.values(), strict=True):
        one, other = one.factor @ one.factor.T, other.factor @ other.factor.T
        # An eigenvalue at the cutoff, 1e-5 of the largest, may fall on either side of it.
        assert (one - other).norm() <= 1e-4 * other.norm()


def test_recorded_is_what_trains():
    net = make_net()
    assert set(record(net)) == {parameter for parameter in net.parameters() if parameter.dim()}
    net.conv.requires_grad_(False)
    net.wide.bias.requires_grad_(False)
    expected = {net.dilated.weight, net.dilated.bias, net.norm.weight, net.norm.bias, net.wide.weight, net.mix.weight}
    assert set(record(net)) == expected
    assert not any(module._forward_hooks for module in net.modules())


def test_what_has_no_matrix_of_inputs_or_does_not_run_is_left_out():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.unused = nn.Embedding(5, 8), nn.Linear(8, 8)
            self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
            self.mirrored = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
            self.same = nn.Conv2d(8, 8, 3, padding="same")
            self.silent, self.idle = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
            nn.init.zeros_(self.silent.weight)

        def forward(self, ids):
            x = self.same(self.mirrored(self.grouped(self.words(ids).mT[..., None].expand(-1, -1, -1, 4))))
            return self.idle(self.silent(x.flatten(2).mT))

    odd = Odd()
    with record_inputs(odd) as inputs:
        odd(torch.arange(5)[None, :4])
    expected = {odd.words.weight, odd.grouped.bias, odd.mirrored.bias, odd.same.bias, odd.idle.bias}
    assert set(inputs) == expected  # what is given nothing but zeros has no moment


def test_weight_zero_takes_inputs_and_attaches_nothing():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    assert LipschitzRegularizer(optimizer, weight=0.0, inputs=record(net)).penalty() == 0
    assert not optimizer._optimizer_step_pre_hooks


def test_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="`rank` must be at least 1"), record_inputs(nn.Linear(2, 2), rank=0):
        pass


def test_hooks_are_gone_after_an_error():
    net = make_net()
    with pytest.raises(KeyError), record_inputs(net):
        raise KeyError
    assert not any(module._forward_hooks for module in net.modules())


def test_numbers_that_are_not_finite_are_refused():
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="Linear gave NaN or infinity"), record_inputs(layer):
        layer(torch.full((1, 3), torch.nan))


def difference_of(dtype, columns):
    """Gradient, parameter and anchor of a convolution's weight, and a moment of so many columns."""
    generator = torch.Generator().manual_seed(0)
    gradient, anchor, shift = (torch.randn(4, 3, 3, 3, generator=generator).to(dtype) for _ in range(3))
    parameter = (anchor.float() + 0.1 * shift.float()).to(dtype).to(memory_format=torch.channels_last)
    factor = torch.randn(27, columns, generator=generator)
    return gradient, parameter, anchor, InputMoment(factor, torch.tensor(0.3))


@pytest.mark.parametrize("columns", [5, 0], ids=["matrix", "number"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_gradient_and_square_equal_autograd(dtype, columns):
    gradient, parameter, anchor, moment = difference_of(dtype, columns)
    point = parameter.detach().double().requires_grad_()
    rows = (point - anchor.double()).flatten(1)
    penalty = 0.7 * torch.trace(rows @ dense(moment, 27) @ rows.T)
    expected = gradient.double() + torch.autograd.grad(penalty, point)[0]
    sizes = rows.detach().abs() @ dense(InputMoment(moment.factor.abs(), moment.rest), 27)
    size, terms = 0.7 * (sizes * rows.abs()).sum(), 27 + columns
    (square,) = functional.squared_distances([parameter], [anchor], [moment])
    assert_rounded([square], [penalty / 0.7], [size / 0.7], terms * 4)
    reference = functional.penalty([parameter.double()], [anchor.double()], [0.7], [moment])
    assert_rounded([reference], [penalty], [size], terms * 4)
    functional.add_penalty_gradient_([gradient], [parameter], [anchor], [0.7], [moment])
    size = (expected - 2 * 0.7 * (rows @ dense(moment, 27)).view_as(expected)).abs() + 2 * 0.7 * sizes.view_as(
        expected
    )
    assert_rounded([gradient], [expected], [size], terms)


def test_autocast_costs_no_digits():
    results = []
    for enabled in (False, True):
        gradient, parameter, anchor, moment = difference_of(torch.float32, 5)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            functional.add_penalty_gradient_([gradient], [parameter], [anchor], [0.7], [moment])
            results.append((gradient, *functional.squared_distances([parameter], [anchor], [moment])))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def with_moments(adapters):
    generator = torch.Generator().manual_seed(1)
    rows = [adapter.down[0].numel() for adapter in adapters]
    moments = [InputMoment(torch.randn(n, 3, generator=generator), torch.tensor(0.2)) for n in rows]
    return [
        lora.LoraAdapter(a.name, a.down, a.up, a.scaling, a.weight, a.offset, moment)
        for a, moment in zip(adapters, moments, strict=True)
    ]


@pytest.mark.parametrize("with_offset", [False, True], ids=["", "offset"])
def test_of_lora_gradient_and_square_equal_autograd_on_the_formed_product(with_offset):
    adapters = find_lora_adapters(make_lora_net())
    adapters = with_moments(random_offsets(adapters) if with_offset else adapters)
    coefficients = [0.5 + i for i in range(len(adapters))]
    pairs = [(torch.randn_like(adapter.down), torch.randn_like(adapter.up)) for adapter in adapters]

    def reference(adapter, c):
        down, up = (factor.detach().double().requires_grad_() for factor in (adapter.down, adapter.up))
        delta = adapter.scaling * up.flatten(1) @ down.flatten(1)
        delta = delta if adapter.offset is None else delta + adapter.offset.flatten(1).double()
        term = c * torch.trace(delta @ dense(adapter.moment, delta.shape[1]) @ delta.T)
        return term.detach(), torch.autograd.grad(term, (down, up))

    squares, before = lora.squared_deltas(adapters), copy.deepcopy(pairs)
    lora.add_lora_penalty_gradient_(pairs, adapters, coefficients)
    for index, (adapter, c) in enumerate(zip(adapters, coefficients, strict=True)):
        (term, changes), (size, sizes) = reference(adapter, c), reference(absolute([adapter])[0], c)
        values = [c * squares[index].double(), lora.lora_penalty([adapter], [c])]
        assert_rounded([value.float() for value in values], [term] * 2, [size] * 2, adapter.numel())
        expected = [start.double() + change for start, change in zip(before[index], changes, strict=True)]
        sizes = [start.double().abs() + change for start, change in zip(before[index], sizes, strict=True)]
        assert_rounded(pairs[index], expected, sizes, terms_of(adapter))


def backward(net, seed):
    generator = torch.Generator().manual_seed(seed)
    net(torch.randn(2, 3, 12, 14, generator=generator).to(net.scale.dtype)).square().mean().backward()


def train(net, optimizer, before_step=lambda: None, steps=4):
    for seed in range(steps):
        optimizer.zero_grad()
        backward(net, seed)
        before_step()
        optimizer.step()
    return [parameter.detach().double() for parameter in net.parameters()]


@pytest.mark.parametrize("name", ["SGD", "Adam foreach", "AdamW fused", "AdamW8bit"])
def test_training_equals_autograd(name):
    """Parameters that were not recorded, here the scale, have the term that they have without."""
    net, reference, plain = make_net(), make_net(), make_net()
    optimizer = OPTIMIZERS[name](net.parameters())
    regularizer = LipschitzRegularizer(optimizer, weight=WEIGHT, inputs=record(net))
    after = train(net, optimizer)

    moments = record(reference)
    anchors = {parameter: parameter.detach().double() for parameter in reference.parameters()}

    def penalty(points):
        total = 0.0
        for point, (parameter, anchor) in zip(points, anchors.items(), strict=True):
            difference, moment = point - anchor, moments.get(parameter)
            if moment is None or not moment.factor.numel():
                factor = 1.0 if moment is None else moment.rest.double()
                total = total + WEIGHT * factor * difference.square().mean()
            else:
                rows = difference.flatten(1)
                total = total + WEIGHT / rows.numel() * torch.trace(rows @ dense(moment, rows.shape[1]) @ rows.T)
        return total

    def add():
        points = [parameter.detach().double().requires_grad_() for parameter in anchors]
        for parameter, gradient in zip(anchors, torch.autograd.grad(penalty(points), points), strict=True):
            parameter.grad.copy_(parameter.grad.double() + gradient)

    train(reference, OPTIMIZERS[name](reference.parameters()), add)
    train(plain, OPTIMIZERS[name](plain.parameters()))
    assert_same_training(net, reference, name, plain)
    metrics = regularizer.metrics()
    drift = sum((one - anchor).square().sum() for one, anchor in zip(after, anchors.values())).sqrt().item()
    assert metrics["lipschitz/penalty"] == regularizer.penalty() == pytest.approx(penalty(after).item(), rel=1e-4)
    assert metrics["lipschitz/drift"] == pytest.approx(drift, rel=1e-5)  # in parameters, as without


def test_lora_layers_are_recorded_through_the_weights_that_they_act_on():
    net = make_lora_net(started=False)
    with record_inputs(net) as inputs:
        net(torch.randn(2, 3, 5, 5))
    adapters = find_lora_adapters(net)
    assert set(inputs) == {adapter.weight for adapter in adapters}
    optimizer = torch.optim.SGD(trained(net), lr=LR)
    regularizer = LipschitzRegularizer(optimizer, weight=WEIGHT, adapters=adapters, inputs=inputs)
    for seed in range(3):
        optimizer.zero_grad()
        net(torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        optimizer.step()
    expected = 0.0
    for adapter in adapters:
        delta = product(adapter).double()
        moment = dense(inputs[adapter.weight], delta.shape[1])
        expected += WEIGHT / delta.numel() * torch.trace(delta @ moment @ delta.T).item()
    assert 0 < regularizer.penalty() == pytest.approx(expected, rel=1e-4)
    assert regularizer.metrics(per_adapter=True)["lipschitz/drift/wide"] == pytest.approx(
        product(adapters[-1]).norm().item(), rel=1e-5
    )


def test_adapters_that_are_not_of_peft_are_recorded_by_weights_that_require_a_gradient():
    class Layer(nn.Linear):
        def __init__(self):
            super().__init__(6, 4, bias=False)
            self.weight.requires_grad_(False)
            self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(4, 2))

    layer = Layer()
    with record_inputs(layer) as inputs:
        layer(torch.randn(5, 6))
    assert not inputs
    with record_inputs(layer.requires_grad_(True)) as inputs:
        layer(torch.randn(5, 6))
    assert set(inputs) == {layer.weight}
    adapter = LoraAdapter("layer", layer.lora_A, layer.lora_B, 1.0, layer.weight)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=LR)
    regularizer = LipschitzRegularizer(optimizer, weight=WEIGHT, adapters=[adapter], inputs=inputs)
    with torch.no_grad():
        layer.lora_B += 1
    delta = (layer.lora_B @ layer.lora_A).detach().double()
    expected = WEIGHT / 24 * torch.trace(delta @ dense(inputs[layer.weight], 6) @ delta.T).item()
    assert regularizer.penalty() == pytest.approx(expected, rel=1e-4)


def test_moments_of_adapters_are_not_dropped():
    factors = [nn.Parameter(torch.ones(2, 6)), nn.Parameter(torch.ones(4, 2))]
    moment = InputMoment(torch.ones(6, 1), torch.tensor(1.0))
    adapter = LoraAdapter("layer", *factors, 1.0, moment=moment)
    with pytest.raises(ValueError, match="Give the moments of adapters in `inputs`"):
        LipschitzRegularizer(torch.optim.SGD(factors, lr=LR), weight=WEIGHT, adapters=[adapter])


def test_of_dora_the_magnitudes_are_not_recorded():
    net = make_lora_net(use_dora=True)
    with record_inputs(net) as inputs:
        net(torch.randn(2, 3, 5, 5))
    assert set(inputs) == {adapter.weight for adapter in find_lora_adapters(net)}


def test_copy_of_an_optimizer_is_measured_by_the_same_inputs():
    net, plain = make_net(), make_net()
    optimizer = OPTIMIZERS["SGD"](net.parameters())
    regularizer = LipschitzRegularizer(optimizer, weight=WEIGHT, inputs=record(net))
    train(net, optimizer)
    copied_net, copied_optimizer, copied = copy.deepcopy((net, optimizer, regularizer))
    assert 0 < copied.penalty() == regularizer.penalty()
    after, other = train(net, optimizer), train(copied_net, copied_optimizer)
    assert all(torch.equal(one, two) for one, two in zip(after, other, strict=True))
    train(plain, OPTIMIZERS["SGD"](plain.parameters()), steps=8)
    assert regularizer.penalty() == copied.penalty()
    assert any((one - two).abs().max() > 1e-3 for one, two in zip(after, plain.parameters(), strict=True))


def test_state_tells_training_with_inputs_from_training_without():
    regularizers = []
    for with_inputs in (False, True):
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=LR)
        inputs = record(net) if with_inputs else None
        regularizers.append(LipschitzRegularizer(optimizer, weight=WEIGHT, inputs=inputs))
    without, with_them = regularizers
    with_them.load_state_dict(with_them.state_dict())
    with pytest.raises(ValueError, match="trained with `inputs`: give"):
        without.load_state_dict(with_them.state_dict())
    with pytest.raises(ValueError, match="trained without `inputs`: leave out"):
        with_them.load_state_dict(without.state_dict())
    old = without.state_dict()
    del old["inputs"]  # of version 0.1.0 and before
    without.load_state_dict(old)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "proximal"}, "need mode 'coupled'"),
        ({"mode": "projected", "radius": 1.0}, "need mode 'coupled'"),
        ({"lora_form": "factors"}, "`lora_form` 'delta'"),
        ({"inputs": {}}, "hold nothing of what is penalized"),
        ({"inputs": "of another model"}, "hold nothing of what is penalized"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message):
    net = make_net()
    inputs = record(net)
    if options.get("inputs") == "of another model":
        options = {"inputs": record(make_net())}
    with pytest.raises(ValueError, match=message):
        LipschitzRegularizer(torch.optim.SGD(net.parameters(), lr=LR), weight=WEIGHT, **{"inputs": inputs, **options})
