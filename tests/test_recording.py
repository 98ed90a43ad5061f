# What `record` keeps of layers and calls, the space of layers against layers in float64 and autograd, and the file.
# Calls are replayed in test_replay.py and measured in test_drift.py.
import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import make_text_config, make_tokenizer, make_unet
from denoiser import draw, make_denoiser, moved, record_denoiser
from denoiser import train as train_denoiser
from diffusers import SanaTransformer2DModel
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import save_file
from test_functional import assert_rounded
from test_lora import Net as LoraNet
from test_lora import make_net as make_lora_net
from test_lora import product
from test_regularizer import LR, OPTIMIZERS, assert_identical, assert_same_training
from torch import nn
from transformers import CLIPTextModel

from lipschitz_reg import LipschitzRegularizer, LoraAdapter, Moment, Recording, find_lora_adapters, functional, record
from lipschitz_reg.recording import canonical


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


def record_net(net, **options):
    with record(net, **options) as recording, torch.no_grad():
        for batch in batches(net.scale.dtype):
            net(batch)
    return recording


def dense(moment, rows):
    """M as a matrix (n, n) in float64."""
    return moment.root.double() @ moment.root.double().T + moment.rest.double() * torch.eye(rows).double()


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
    parameter_moment = record_net(net).moments()[parameter]
    with torch.no_grad():
        parameter.add_(displacement)
    anchor = parameter.detach().double() - displacement
    square = functional.penalty([parameter.double()], [anchor], [1 / parameter.numel()], [parameter_moment])
    assert expected > 1e-3
    assert square.item() == pytest.approx(expected, rel=3 * LEAST)


def test_second_moments_are_those_of_the_inputs():
    net = make_net()
    inputs = record_net(net).moments()
    exact = copy.deepcopy(net).double()
    (first, one), (second, two) = outputs_of(exact, exact.wide)
    rows, outputs = (torch.cat([t.flatten(0, 1) for t in pair]) for pair in ((first, second), (one, two)))
    second_moment = rows.T @ rows / len(rows)
    least = LEAST * second_moment.diagonal().mean() * torch.eye(8)
    expected = 8 * (second_moment + least) / outputs.square().mean()
    torch.testing.assert_close(dense(inputs[net.wide.weight], 8), expected, rtol=1e-3, atol=1e-4)


def test_groups_of_a_convolution_share_the_mean_of_their_moments():
    """Which is the relative change of what the layer gives, on average over displacements of its groups."""
    torch.manual_seed(0)
    grouped = nn.Conv2d(6, 12, 3, padding=1, groups=3)
    given = torch.randn(2, 6, 5, 4) * torch.tensor([1.0, 1, 2, 2, 3, 3])[:, None, None]
    with record(grouped) as recording:
        outputs = grouped(given)
    windows = F.unfold(given, 3, padding=1).double()  # two pictures, (6 * 9, positions)
    of_groups = [g @ g.mT for g in windows.view(2, 3, 18, 20).permute(1, 2, 0, 3).flatten(2)]
    mean = sum(of_groups) / (3 * 2 * 20)
    expected = 18 * (mean + LEAST * mean.diagonal().mean() * torch.eye(18)) / outputs.double().square().mean()
    torch.testing.assert_close(dense(recording.layers["weight"], 18), expected, rtol=1e-2, atol=1e-2)

    def change(displacement):
        return F.conv2d(given, displacement, padding=1, groups=3).square().sum() / outputs.square().sum()

    displacements = 0.1 * torch.randn(400, *grouped.weight.shape)
    measured = sum(change(one) for one in displacements).item()
    moment, factor = recording.layers["weight"], 1 / grouped.weight.numel()
    computed = sum(functional.penalty([d], [torch.zeros_like(d)], [factor], [moment]) for d in displacements).item()
    assert computed == pytest.approx(measured, rel=0.05)


def test_a_layer_of_many_inputs_is_sketched():
    """Where they lie in as few directions as the sketch has, nothing is lost; elsewhere its trace is kept."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 4)
    directions = torch.randn(6, 40)
    for noise, tolerance in ((0.0, 3 * LEAST), (0.3, 0.2)):
        rows = torch.randn(500, 6) @ directions + noise * torch.randn(500, 40)
        with record(layer, rank=6) as recording:
            layer(rows)
        moment = recording.layers["weight"]
        assert moment.root.shape == (40, 6)
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
    with record(layer) as recording:
        layer(given)
    along, across = torch.zeros(2, 4, 10)
    along[:, 3] = across[:, 7] = 1
    costs = [recording.layers["weight"].squared_norm(displacement) for displacement in (along, across)]
    assert 0 < costs[1] < 2 * LEAST * costs[0]


@pytest.mark.parametrize("output", [(None,), ("x",), [None]], ids=repr)
def test_a_block_that_gives_no_tensor_is_left_out(output):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return output

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.layer = Block(), nn.Linear(2, 2)

        def forward(self, x):
            self.block(x)
            return self.layer(x)

    model = Model()
    with record(model) as recording:
        model(torch.ones(1, 2))
    assert [*recording.layers] == ["layer.weight", "layer.bias"]


def test_an_embedding_counts_by_the_size_of_its_rows():
    words = nn.Embedding(5, 8)
    with record(words) as recording:
        words(torch.arange(5))
    displacement = torch.randn(5, 8)
    expected = (displacement.square().sum() / words.weight.detach().square().sum()).item()
    assert recording.layers["weight"].squared_norm(displacement).item() / 40 == pytest.approx(expected, rel=1e-5)


def test_rounding_errors_are_no_directions():
    """Inputs of few directions leave a sketch of more columns to be inverted where it is nothing."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 4)
    rows = torch.randn(500, 3) @ torch.randn(3, 40)
    with record(layer, rank=6) as recording:
        layer(rows)
    exact = 40 * rows.T.double() @ rows.double() / 500 / layer(rows).detach().double().square().mean()
    assert (dense(recording.layers["weight"], 40) - exact).norm() < 3 * LEAST * exact.norm()


def test_recording_leaves_autocast():
    torch.manual_seed(0)
    layer, given = nn.Linear(10, 4), torch.randn(50, 10)
    with record(layer) as plain:
        layer(given)
    with record(layer) as under_autocast, torch.autocast("cpu", dtype=torch.bfloat16):
        layer(given)  # rounds its outputs, but not what it is given
    output = layer(given).square().mean() / layer(given.bfloat16().float()).bfloat16().float().square().mean()
    roots = [recording.layers["weight"].root for recording in (plain, under_autocast)]
    one, other = (root @ root.T for root in roots)
    torch.testing.assert_close(one * output.detach(), other, rtol=2e-3, atol=2e-3)


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
    with record(pair, other=layer) as recording:
        pair(given), layer(given)
    assert set(recording.layers) == {"layer.weight", "layer.bias", "other.weight", "other.bias"}
    assert set(recording.moments()) == {*pair.layer.parameters(), *layer.parameters()}
    assert torch.equal(recording.layers["layer.weight"].root, recording.layers["other.weight"].root)


def test_recording_twice_gives_the_same_bits():
    first, second = (record_net(make_net(), rank=4) for _ in range(2))
    assert first.layers.keys() == second.layers.keys() and first.digest() == second.digest()
    for one, other in zip(first.layers.values(), second.layers.values(), strict=True):
        assert torch.equal(one.root, other.root) and torch.equal(one.rest, other.rest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_models_of_other_dtypes_are_recorded(dtype):
    exact, other = record_net(make_net()).layers, record_net(make_net(dtype)).layers
    for name, moment in exact.items():
        assert other[name].root.dtype == other[name].rest.dtype == torch.float32
        one, two = (m.root @ m.root.T for m in (moment, other[name]))
        assert (one - two).norm() <= 0.05 * moment.root.norm() ** 2


def test_a_record_that_began_in_inference_mode_goes_on_outside_it():
    net, first = make_net(), next(batches())
    with record(net) as recording:
        with torch.inference_mode():
            net(first)
        with torch.no_grad():
            net(first)
    with record(net) as expected:
        net(first)
    for one, other in zip(recording.layers.values(), expected.layers.values(), strict=True):
        one, other = one.root @ one.root.T, other.root @ other.root.T
        # An eigenvalue at the cutoff, 1e-5 of the largest, may fall on either side of it.
        assert (one - other).norm() <= 1e-4 * other.norm()
    net.conv.weight.square().sum().add(recording.calls[0].answer.sum()).backward()  # no inference tensor was kept


def test_held_out_calls_are_not_in_the_layers():
    net, first = make_net(), next(batches())
    with record(net) as recording:
        with recording.held_out():
            net(1e3 * first)
        net(first)
        with recording.held_out():
            net(-1e3 * first)
    with record(net) as expected:
        net(first)
    assert [call.held_out for call in recording.calls] == [True, False, True]
    for name, moment in expected.layers.items():
        assert all(torch.equal(one, other) for one, other in zip(recording.layers[name], moment, strict=True))


def test_recorded_is_what_trains():
    net = make_net()
    names = {name for name, parameter in net.named_parameters() if parameter.dim()}
    assert set(record_net(net).layers) == names
    net.conv.requires_grad_(False)
    net.wide.bias.requires_grad_(False)
    assert set(record_net(net).layers) == names - {"conv.weight", "conv.bias", "wide.bias"}
    assert not any(module._forward_hooks for module in net.modules())


def test_what_has_no_matrix_of_inputs_or_does_not_run_is_left_out():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.unused = nn.Embedding(5, 8), nn.Linear(8, 8)
            self.mirrored = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
            self.same = nn.Conv2d(8, 8, 3, padding="same")
            self.silent, self.idle = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
            nn.init.zeros_(self.silent.weight)

        def forward(self, ids):
            x = self.same(self.mirrored(self.words(ids).mT[..., None].expand(-1, -1, -1, 4)))
            return self.idle(self.silent(x.flatten(2).mT))

    odd = Odd()
    with record(odd) as recording:
        odd(torch.arange(5)[None, :4])
    expected = {"words.weight", "mirrored.bias", "same.bias", "idle.bias"}
    recorded, everything = [
        sum(p.numel() for n, p in odd.named_parameters() if n in e or not e) for e in (expected, ())
    ]
    assert recording.share() == recorded / everything
    assert set(recording.layers) == expected  # what is given nothing but zeros has no moment


def compile_forward(net):
    net.forward = torch.compile(net.forward, backend="eager")
    return net


def compile_in_place(net):
    net.compile(backend="eager")
    return net


def compile_layers(net):
    for layer in net.children():
        layer.compile(backend="eager")
    return net


COMPILED = {
    "wrapped": lambda net: torch.compile(net, backend="eager"),
    "in place": compile_in_place,
    "layers": compile_layers,
    "forward": compile_forward,
}


@pytest.mark.parametrize("how", COMPILED)
def test_a_model_that_has_run_compiled_is_recorded_whole(how):
    plain, net = record_net(make_net()), make_net()
    compiled = COMPILED[how](net)
    compiled(next(batches()))
    with record(compiled) as recording, torch.no_grad():
        for batch in batches():
            compiled(batch)
    assert recording.digest() == plain.digest()
    assert recording.share() == plain.share() == 1 - 1 / sum(p.numel() for p in net.parameters())


def test_compiled_repeated_blocks_of_diffusers_are_recorded_whole():
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    unet = make_unet(**blocks, cross_attention_dim=8)
    unet.compile_repeated_blocks(backend="eager")
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(5), torch.randn(1, 3, 8)
    unet(*inputs)
    with record(unet) as recording, torch.no_grad():
        unet(*inputs)
    assert recording.share() == 1


def test_a_compiled_model_is_refused_where_torch_cannot_run_it_uncompiled(monkeypatch):
    monkeypatch.delattr(torch.compiler, "set_stance")  # as before torch 2.6
    with pytest.raises(ValueError, match="before torch.compile"), record(COMPILED["layers"](make_net())):
        pass


@pytest.mark.parametrize("weight", [0.0, {"layers": 0.0, "predictions": 0.0}], ids=["number", "by space"])
def test_weight_zero_takes_a_recording_and_attaches_nothing(weight):
    net = make_net()
    optimizer, recording = torch.optim.SGD(net.parameters(), lr=LR), record_net(net)
    assert LipschitzRegularizer(optimizer, weight=weight, recording=recording).penalty() == 0
    assert not any(module._forward_hooks for module in net.modules())
    assert not optimizer._optimizer_step_pre_hooks


def test_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="`rank` must be at least 1"), record(nn.Linear(2, 2), rank=0):
        pass


def test_hooks_are_gone_after_an_error():
    net = make_net()
    with pytest.raises(KeyError), record(net):
        raise KeyError
    assert not any(module._forward_hooks for module in net.modules())


def record_text(model, make_call, padding):
    """Two texts of three and five tokens, filled up by padding, in a model that is given the mask."""
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    mask = torch.cat([mask, torch.zeros(2, padding, dtype=mask.dtype)], 1)
    with record(model.eval(), rank=4) as recording, torch.no_grad():
        make_call(mask)
    return recording


@pytest.mark.parametrize("kind", ["Sana", "CLIP"])
def test_padding_of_text_does_not_count(kind):
    torch.manual_seed(0)
    if kind == "Sana":
        sizes = {"num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2, "num_cross_attention_heads": 2}
        sizes |= {"cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": 8, "sample_size": 8}
        model = SanaTransformer2DModel(in_channels=4, out_channels=4, **sizes)
        sample, text, timestep = torch.randn(2, 4, 8, 8), torch.randn(2, 40, 8), torch.tensor([5, 5])

        def call(mask):
            model(
                sample, encoder_hidden_states=text[:, : mask.shape[1]], timestep=timestep, encoder_attention_mask=mask
            )

    else:
        model = CLIPTextModel(make_text_config(make_tokenizer()))
        ids = torch.randint(100, (2, 32))

        def call(mask):
            model(ids[:, : mask.shape[1]], attention_mask=mask)

    short, long = (record_text(model, call, padding) for padding in (0, 20))
    assert short.layers.keys() == long.layers.keys()
    for name, moment in short.layers.items():
        if "position_embedding" not in name:  # of as many positions as there are, padding or not
            rows = max(len(moment.root), 1)
            torch.testing.assert_close(dense(moment, rows), dense(long.layers[name], rows), rtol=1e-3, atol=1e-3)
    assert short.share() == 1  # of Sana also the depthwise convolutions, and the parameters of blocks


def test_tokens_of_a_picture_are_not_taken_for_those_of_a_text():
    model = make_denoiser(dtype=torch.float32)
    forward = model.forward
    model.forward = lambda *args, encoder_attention_mask, **kwargs: forward(*args, **kwargs)
    recordings = []
    for mask in (torch.ones(2, 4), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])):  # four tokens, as the sample has
        with record(model) as recording:
            model(torch.ones(2, 4, 3), torch.tensor(5), torch.ones(2, 4, 5), encoder_attention_mask=mask)
        recordings.append(recording)
    assert all(torch.equal(recordings[0].layers[n].root, m.root) for n, m in recordings[1].layers.items())


def test_numbers_that_are_not_finite_are_refused():
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="Linear gave NaN or infinity"), record(layer):
        layer(torch.full((1, 3), torch.nan))


def difference_of(dtype, columns):
    """Gradient, parameter and anchor of a convolution's weight, and a moment of so many columns."""
    generator = torch.Generator().manual_seed(0)
    gradient, anchor, shift = (torch.randn(4, 3, 3, 3, generator=generator).to(dtype) for _ in range(3))
    parameter = (anchor.float() + 0.1 * shift.float()).to(dtype).to(memory_format=torch.channels_last)
    factor = torch.randn(27, columns, generator=generator)
    return gradient, parameter, anchor, Moment(factor, torch.tensor(0.3))


@pytest.mark.parametrize("columns", [5, 0], ids=["matrix", "number"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_gradient_and_square_equal_autograd(dtype, columns):
    gradient, parameter, anchor, moment = difference_of(dtype, columns)
    point = parameter.detach().double().requires_grad_()
    rows = (point - anchor.double()).flatten(1)
    penalty = 0.7 * torch.trace(rows @ dense(moment, 27) @ rows.T)
    expected = gradient.double() + torch.autograd.grad(penalty, point)[0]
    sizes = rows.detach().abs() @ dense(Moment(moment.root.abs(), moment.rest), 27)
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
    regularizer = LipschitzRegularizer(optimizer, weight={"layers": WEIGHT}, recording=record_net(net))
    after = train(net, optimizer)

    moments = record_net(reference).moments()
    anchors = {parameter: parameter.detach().double() for parameter in reference.parameters()}
    penalties = []

    def penalty(points):
        total = 0.0
        for point, (parameter, anchor) in zip(points, anchors.items(), strict=True):
            difference, moment = point - anchor, moments.get(parameter)
            if moment is None or not moment.root.numel():
                factor = 1.0 if moment is None else moment.rest.double()
                total = total + WEIGHT * factor * difference.square().mean()
            else:
                rows = difference.flatten(1)
                total = total + WEIGHT / rows.numel() * torch.trace(rows @ dense(moment, rows.shape[1]) @ rows.T)
        return total

    def add():
        points = [parameter.detach().double().requires_grad_() for parameter in anchors]
        penalties.append(penalty(points))
        for parameter, gradient in zip(anchors, torch.autograd.grad(penalties[-1], points), strict=True):
            parameter.grad.copy_(parameter.grad.double() + gradient)

    train(reference, OPTIMIZERS[name](reference.parameters()), add)
    train(plain, OPTIMIZERS[name](plain.parameters()))
    assert_same_training(net, reference, name, plain)
    metrics = regularizer.metrics()
    distance = sum((one - anchor).square().sum() for one, anchor in zip(after, anchors.values())).sqrt().item()
    rel = 0.05 if name == "AdamW8bit" else 1e-3  # of the last step, in trainings that part by roundings
    assert metrics["lipschitz/penalty"] == regularizer.penalty() == pytest.approx(penalties[-1].item(), rel=rel)
    assert metrics["lipschitz/distance"] == pytest.approx(distance, rel=1e-5)  # in parameters, as without


@pytest.mark.parametrize("recorded", ["before the adapters", "with the adapters"])
def test_lora_layers_are_recorded_through_the_weights_that_they_act_on(recorded):
    net, given = make_lora_net(started=False), torch.randn(2, 3, 5, 5)
    if recorded == "before the adapters":
        net = LoraNet().requires_grad_(False)
        for layer in (net.conv, net.mix, net.wide):
            layer.requires_grad_(True)
    with record(net) as recording:
        net(given)
    if recorded == "before the adapters":
        inject_adapter_in_model(LoraConfig(r=4, target_modules=["conv", "mix", "wide"]), net)
    adapters, moments = find_lora_adapters(net), recording.moments()
    assert {"conv.weight", "mix.weight", "wide.weight"} <= set(recording.layers)
    assert {adapter.weight for adapter in adapters} <= set(moments)
    optimizer = torch.optim.SGD([factor for a in adapters for factor in (a.down, a.up)], lr=LR)
    regularizer = LipschitzRegularizer(optimizer, weight={"layers": WEIGHT}, adapters=adapters, recording=recording)

    def penalty():
        total = 0.0
        for adapter in adapters:
            delta = product(adapter).double()
            moment = dense(moments[adapter.weight], delta.shape[1])
            total += WEIGHT / delta.numel() * torch.trace(delta @ moment @ delta.T).item()
        return total

    for seed in range(3):
        optimizer.zero_grad()
        net(torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        expected = penalty()
        optimizer.step()
    assert 0 < regularizer.penalty() == pytest.approx(expected, rel=1e-4)
    metrics = regularizer.metrics(per_adapter=True)
    assert metrics["lipschitz/distance/wide"] == pytest.approx(product(adapters[-1]).norm().item(), rel=1e-5)


def test_adapters_that_are_not_of_peft_are_recorded_by_weights_that_require_a_gradient():
    class Layer(nn.Linear):
        def __init__(self):
            super().__init__(6, 4, bias=False)
            self.weight.requires_grad_(False)
            self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(4, 2))

    layer = Layer()
    with record(layer) as recording:
        layer(torch.randn(5, 6))
    assert not recording.layers
    with record(layer.requires_grad_(True)) as recording:
        layer(torch.randn(5, 6))
    assert set(recording.layers) == {"weight"}
    adapter = LoraAdapter("layer", layer.lora_A, layer.lora_B, 1.0, layer.weight)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=LR)
    options = {"adapters": [adapter], "recording": recording}
    regularizer = LipschitzRegularizer(optimizer, weight={"layers": WEIGHT}, **options)
    with torch.no_grad():
        layer.lora_B += 1
    delta = (layer.lora_B @ layer.lora_A).detach().double()
    expected = WEIGHT / 24 * torch.trace(delta @ dense(recording.layers["weight"], 6) @ delta.T).item()
    assert regularizer.penalty() == pytest.approx(expected, rel=1e-4)


def test_of_dora_the_magnitudes_are_not_recorded():
    net = make_lora_net(use_dora=True)
    with record(net) as recording:
        net(torch.randn(2, 3, 5, 5))
    assert set(recording.moments()) == {adapter.weight for adapter in find_lora_adapters(net)}
    assert set(recording.layers) == {"conv.weight", "mix.weight", "wide.weight"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "proximal"}, "needs mode 'coupled'"),
        ({"mode": "projected", "radius": 1.0}, "needs mode 'coupled'"),
        ({"lora_form": "factors"}, "`lora_form` 'delta'"),
        ({"weight": 1.0}, "`recording` does nothing in the space of parameters"),
        ({"recording": None}, "space of layers needs a `recording`"),
        ({"recording": "of another model"}, "holds nothing of the layers that are penalized"),
        ({"recording": "of nothing"}, "holds nothing of the layers that are penalized"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message):
    net = make_net()
    if options.get("recording") == "of another model":
        options = {"recording": record_net(make_net())}
    if options.get("recording") == "of nothing":
        with record(net) as recording:
            pass
        options = {"recording": recording}
    options = {"weight": {"layers": WEIGHT}, "recording": record_net(net), **options}
    with pytest.raises(ValueError, match=message) as error:
        LipschitzRegularizer(torch.optim.SGD(net.parameters(), lr=LR), **options)
    assert_one_line(error)


def assert_one_line(error):
    assert "\n" not in str(error.value)


# Calls


class Odd(nn.Module):
    """Takes what it is given in lists, tuples and dicts, as video and 3d denoisers do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, times, contexts, extra=None, *, name="", factor=1.0):
        assert isinstance(times, tuple) and isinstance(contexts, list) and name == "odd"
        x = self.layer(x) + times[1] * contexts[1][0] + extra["nested"]["shift"]
        return [x * factor * len(extra["none"] or "one"), contexts]


def odd_call(model):
    torch.manual_seed(0)
    contexts = [torch.randn(3), [torch.randn(3, dtype=torch.bfloat16)]]
    extra = {"nested": {"shift": torch.tensor(2.0)}, "none": None, "mask": torch.tensor([True, False])}
    return model(torch.randn(2, 4, 3), (1, 0.5), contexts, extra=extra, name="odd", factor=2)


def test_arguments_in_lists_tuples_and_dicts_come_back(tmp_path):
    model = Odd()
    with record(model) as recording:
        expected = odd_call(model)[0]
    recording.save(tmp_path / "odd.safetensors")
    for kept in (recording, Recording.load(tmp_path / "odd.safetensors", model)):
        (call,) = kept.calls
        assert torch.equal(call.answer, expected) and torch.equal(call.again(model), expected)
        assert call.args[1] == (1, 0.5) and call.kwargs["name"] == "odd" and call.kwargs["extra"]["none"] is None
        assert call.kwargs["extra"]["mask"].tolist() == [True, False]
        assert call.args[2][1][0].dtype == torch.bfloat16


def test_what_cannot_be_in_a_file_is_said_when_it_is_saved(tmp_path):
    class Strange(nn.Linear):
        def forward(self, x, what):
            return super().forward(x)

    model = Strange(2, 2)
    with record(model) as recording:
        model(torch.ones(1, 2), object())
    with pytest.raises(ValueError, match="argument of type object cannot be saved") as error:
        recording.save(tmp_path / "strange.safetensors")
    assert_one_line(error)
    assert not any(tmp_path.iterdir())


def test_a_class_without_an_argument_that_was_none_gives_the_same_answer():
    """kohya's U-Net has the weights of diffusers' and fewer arguments."""

    class Whole(nn.Linear):
        def forward(self, x, unused=None, flag=None):
            return super().forward(x) * (1 if flag is None else flag)

    model, other = Whole(3, 3), nn.Linear(3, 3)
    other.load_state_dict(model.state_dict())
    with record(model) as recording, recording.held_out():
        model(torch.ones(1, 3), unused=None)
        model(torch.ones(1, 3), flag=2)
    assert torch.equal(recording.calls[0].again(other), recording.calls[0].answer)
    assert torch.equal(recording.calls[0].again(model), recording.calls[0].answer)
    with pytest.raises(TypeError, match="flag"):
        recording.calls[1].again(other)


def test_what_a_call_was_given_is_kept_though_it_is_overwritten():
    layer, given = nn.Linear(3, 2), torch.ones(1, 3)
    with record(layer) as recording, torch.no_grad():
        answer = layer(given)
        expected = answer.clone()
        given.zero_(), answer.zero_()
    assert recording.calls[0].args[0].tolist() == [[1, 1, 1]] and torch.equal(recording.calls[0].answer, expected)


class Mixed(nn.Linear):
    """Takes a list with an item for each row, or lets rows of a batch see each other."""

    def forward(self, x, kind):
        if isinstance(kind, list):
            return super().forward(x) * torch.stack(kind)[:, None]
        return super().forward(x - x.mean(0) if kind == "norm" else x)


@pytest.mark.parametrize(
    "kind, splits", [("plain", True), ("norm", False), ([torch.tensor(1.0), torch.tensor(2.0)], False)]
)
def test_rows_are_taken_alone_only_where_that_gives_the_same(kind, splits):
    model = Mixed(3, 2)
    with record(model) as recording:
        model(torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), kind)
    assert recording.splits is splits


# The file


@pytest.fixture
def saved(tmp_path):
    """A recording of a denoiser, and the file."""
    recording = record_denoiser(make_denoiser(dtype=torch.float32))
    recording.save(tmp_path / "folder" / "base.safetensors")
    return recording, tmp_path / "folder" / "base.safetensors"


def test_file_gives_back_all_that_was_recorded(saved):
    recording, path = saved
    assert [file.name for file in path.parent.iterdir()] == ["base.safetensors"]  # no unfinished one
    loaded = Recording.load(path, make_denoiser(dtype=torch.float32))
    assert loaded.digest() == recording.digest()
    assert loaded.splits is recording.splits is True and loaded.guidance_scale == recording.guidance_scale
    assert loaded.drift(moved(loaded.model)) == recording.drift(moved(recording.model)) == recording.drift()
    assert loaded.drift().prediction > 0.01


@pytest.mark.parametrize("weight", [{"layers": 3.0}, {"predictions": 30.0}, {"layers": 3.0, "predictions": 30.0}])
def test_training_with_the_file_is_bit_identical(saved, weight):
    recording, path = saved
    models = recording.model, make_denoiser(dtype=torch.float32), make_denoiser(dtype=torch.float32)
    for model, kept in zip(models, (recording, Recording.load(path, models[1]), None), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        if kept is not None:
            LipschitzRegularizer(optimizer, weight=weight, recording=kept)
        train_denoiser(model, optimizer)
    assert_identical(*models[:2])
    with pytest.raises(AssertionError):
        assert_identical(*models[1:])


def test_embeddings_that_come_again_are_in_the_file_once(saved):
    """Nine calls with their samples and answers, three sorts of embeddings and three timesteps."""
    _, path = saved
    with safe_open(path, framework="pt") as file:
        calls = [file.get_tensor(name) for name in file.keys() if name.startswith("calls/")]
    assert len(calls) == 9 * 2 + 3 + 3
    assert sum(tensor.shape == (4, 2, 5) for tensor in calls) == 3


def test_digest_sees_every_part(saved):
    recording, path = saved
    digests = {recording.digest()}
    for change in ("layers", "calls", "guidance_scale", "held_out", "base"):
        other = Recording.load(path, make_denoiser(dtype=torch.float32))
        if change == "layers":
            other.layers["conv_in.weight"].root[0, 0] += 1e-3
        elif change == "calls":
            other.calls[0].answer[0, 0] += 1e-3
        elif change == "guidance_scale":
            other.guidance_scale = 5.0
        elif change == "held_out":
            other.calls[0] = other.calls[0]._replace(held_out=True)
        else:
            other.base["conv_in.weight"][0] += 1e-3
        digests.add(other.digest())
    assert len(digests) == 6


def test_file_of_another_base_is_refused(saved):
    with pytest.raises(ValueError, match="recorded of another base: .* is not the same. Record this one") as error:
        Recording.load(saved[1], make_denoiser(dtype=torch.float32, seed=1))
    assert_one_line(error)


def test_file_of_another_architecture_is_refused(saved):
    model = make_denoiser(dtype=torch.float32)
    model.blocks.append(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"another architecture: blocks\.2\.bias is not in both") as error:
        Recording.load(saved[1], model)
    assert_one_line(error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_copy_of_the_base_in_another_dtype_is_the_base(saved, dtype):
    copied = make_denoiser(dtype=torch.float32).to(dtype)
    drift = Recording.load(saved[1], copied).drift()
    assert drift.prediction < (0.02 if dtype == torch.bfloat16 else 3e-3)
    saved[0].check({name: parameter.to(dtype) for name, parameter in copied.named_parameters()})


def test_check_knows_parameters_by_name(saved):
    recording, _ = saved
    values = dict(make_denoiser(dtype=torch.float32).named_parameters())
    recording.check({"conv_in.weight": values["conv_in.weight"], "unknown": torch.ones(2)})
    with pytest.raises(ValueError, match="made of another base: conv_in.weight") as error:
        recording.check({"conv_in.weight": values["conv_in.weight"] * 1.01})
    assert_one_line(error)


def test_attached_to_a_model_that_has_moved_it_measures_that_one(saved):
    recording, path = saved
    trained_model = moved(make_denoiser(dtype=torch.float32))
    with pytest.raises(ValueError, match="another base"):
        Recording.load(path, trained_model)
    expected = recording.drift(trained_model)
    assert recording.attach(trained_model) is recording
    assert recording.drift() == expected and expected.prediction > 0.01
    assert set(recording.moments()) <= set(trained_model.parameters())


@pytest.mark.parametrize("wrapper", ["adapters", "peft", "DDP", "compile", "compile of DDP"])
def test_file_is_for_the_base_whatever_wraps_it(saved, wrapper):
    _, path = saved
    model = make_denoiser("lora" if wrapper == "adapters" else "full", dtype=torch.float32)
    base = {p for p in model.parameters() if p.requires_grad or wrapper == "adapters"}
    config = LoraConfig(r=2, target_modules=["to_q", "conv_in"])
    store = torch.distributed.HashStore()
    if wrapper == "peft":
        model = get_peft_model(model, config)
    if "DDP" in wrapper:
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        model = nn.parallel.DistributedDataParallel(model)
    if "compile" in wrapper:
        model = torch.compile(model)
    try:
        recording = Recording.load(path, model)
        assert len(recording.moments()) == len(recording.layers) and set(recording.moments()) <= base
    finally:
        if "DDP" in wrapper:
            torch.distributed.destroy_process_group()
    if wrapper in ("adapters", "peft"):
        assert {adapter.weight for adapter in find_lora_adapters(model)} <= set(recording.moments())


@pytest.mark.parametrize(
    "name",
    [
        "module.conv.weight",
        "_orig_mod.module.conv.weight",
        "module._orig_mod.conv.weight",
        "base_model.model.conv.base_layer.weight",
        "module.base_model.model.conv.base_layer.weight",
        "conv._orig_mod.weight",
        "_checkpoint_wrapped_module.conv._checkpoint_wrapped_module.weight",
    ],
)
def test_names_are_those_of_the_base(name):
    assert canonical(name) == "conv.weight"


def test_other_models_are_in_the_file_and_may_be_left_out(tmp_path):
    path = tmp_path / "base.safetensors"

    def make():
        torch.manual_seed(3)
        return make_denoiser(dtype=torch.float32), nn.Linear(4, 5)

    model, encoder = make()
    with record(model, text_encoder=encoder) as recording:
        encoder(torch.randn(2, 4))
        draw(model)
    recording.save(path)
    assert {"text_encoder.weight", "text_encoder.bias", "conv_in.weight"} <= set(recording.layers)
    model, encoder = make()
    assert {*encoder.parameters()} <= set(Recording.load(path, model, text_encoder=encoder).moments())
    assert not {*encoder.parameters()} & set(Recording.load(path, model).moments())
    with pytest.raises(ValueError, match="has nothing of image_encoder: record it too") as error:
        Recording.load(path, model, image_encoder=encoder)
    assert_one_line(error)


@pytest.mark.parametrize("content", ["cut in the header", "cut in the data", "empty", "text", "other tensors"])
def test_file_that_is_no_recording_is_refused(saved, content):
    _, path = saved
    data = path.read_bytes()
    if content == "other tensors":
        save_file({"weight": torch.ones(2)}, path)
    else:
        kept = {"cut in the header": data[:100], "cut in the data": data[:-100], "empty": b"", "text": b"a" * 1000}
        path.write_bytes(kept[content])
    with pytest.raises(ValueError, match="is not a recording") as error:
        Recording.load(path, make_denoiser(dtype=torch.float32))
    assert_one_line(error)


def test_file_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        Recording.load(tmp_path / "none.safetensors", make_denoiser())


class ByName(nn.Linear):
    def forward(self, features):
        return super().forward(features)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = ByName(4, 4)

    def forward(self, pair):
        return self.layer(features=pair.first + pair.second)


def test_layers_called_by_other_names_and_named_tuples_are_recorded(tmp_path):
    model = Named()
    with record(model) as recording, torch.no_grad():
        model(Pair(torch.ones(2, 4), torch.randn(2, 4)))
    assert "layer.weight" in recording.layers
    (call,) = recording.calls
    assert torch.equal(call.again(model), call.answer)
    with pytest.raises(ValueError, match="argument of type Pair cannot be saved"):
        recording.save(tmp_path / "named.safetensors")
