# The space of predictions, alone and with the others, against autograd on the written formula; and all that a replay
# must leave as it was. What is recorded is in test_recording.py.
import contextlib
import copy
import functools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
from denoiser import backward, draw, frozen_copy, make_denoiser, moved, record_denoiser, train, trained
from peft import LoraConfig, inject_adapter_in_model
from test_regularizer import assert_identical
from torch import nn

from lipschitz_reg import LipschitzRegularizer, find_lora_adapters, record


KINDS = ["full", "lora", "keys and values"]
WEIGHT = {"parameters": 5.0, "layers": 0.3, "predictions": 40.0}
SPACES = [["predictions"], ["layers"], ["parameters"], ["layers", "predictions"], list(WEIGHT)]
LR = 1e-2


def make_optimizer(model, name="SGD"):
    options = {"SGD": {"momentum": 0.9}, "SGD fused": {"momentum": 0.9, "fused": True}, "AdamW fused": {"fused": True}}
    return getattr(torch.optim, name.split()[0])(trained(model), lr=LR, **options.get(name, {}))


def adapters_of(model):
    return find_lora_adapters(model) if any("lora_" in name for name, _ in model.named_parameters()) else []


def attach(model, optimizer, spaces=("predictions",), recording=None, **options):
    adapters = adapters_of(model)
    weight = {space: WEIGHT[space] for space in spaces}
    if recording is None and set(spaces) != {"parameters"}:
        recording = record_denoiser(model)
    return LipschitzRegularizer(optimizer, weight=weight, adapters=adapters, recording=recording, **options)


class Replayed:
    """What a model is given in replays, by step: it is not in training then, and gradients are on."""

    def __init__(self, model):
        self.steps, self.model = [[]], model
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        if not module.training and torch.is_grad_enabled():
            self.steps[-1].append((args, kwargs))

    def next_step(self):
        self.steps.append([])


class Written:
    """The penalty as it is written, of a model and of what it was when this was built; differentiable."""

    def __init__(self, model, spaces, recording):
        self.model, self.spaces, self.recording = model, spaces, recording
        self.base, self.anchors = frozen_copy(model), {p: p.detach().clone() for p in trained(model)}

    def displacements(self):
        """By the parameters in which they are recorded."""
        adapters = adapters_of(self.model)
        if adapters:
            return {a.weight: a.scaling * a.up.flatten(1) @ a.down.flatten(1) for a in adapters}
        return {parameter: parameter - anchor for parameter, anchor in self.anchors.items()}

    def __call__(self, replayed):
        total, moments = torch.zeros((), dtype=torch.float64), {}
        if "layers" in self.spaces:
            moments = self.recording.moments()
        for parameter, displacement in self.displacements().items():
            if "parameters" in self.spaces:
                total = total + WEIGHT["parameters"] * displacement.square().mean()
            if "layers" in self.spaces:
                root, rest = (part.to(displacement) for part in moments[parameter])
                if root.numel():
                    moment = root @ root.T + rest * torch.eye(len(root)).to(root)
                    square = torch.trace(displacement @ moment @ displacement.T)
                else:
                    square = rest * displacement.square().sum()
                total = total + WEIGHT["layers"] * square / displacement.numel()
        if "predictions" in self.spaces:
            changes = []
            for args, kwargs in [*replayed]:  # these calls are noted, too
                answers = [model(*args, **kwargs)["sample"] for model in (self.model.eval(), self.base)]
                changes.append((answers[0] - answers[1]).square().mean())
            self.model.train()
            total = total + WEIGHT["predictions"] * torch.stack(changes).mean()
        return total

    def add_gradient(self, replayed):
        total, parameters = self(replayed), trained(self.model)
        for parameter, gradient in zip(parameters, torch.autograd.grad(total, parameters), strict=True):
            parameter.grad.add_(gradient)
        return total.item()


def assert_close(model, reference, tolerance=1e-9):
    for parameter, expected in zip(trained(model), trained(reference), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=tolerance, atol=tolerance)


# The gradient and the value


@pytest.mark.parametrize("replays", [1, 5])
@pytest.mark.parametrize("spaces", SPACES, ids=" ".join)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_and_value_equal_autograd_on_the_written_formula(kind, spaces, replays):
    model = make_denoiser(kind)
    recording = record_denoiser(model)
    written = Written(model, spaces, recording)
    kept = recording if set(spaces) != {"parameters"} else None
    regularizer = attach(model, make_optimizer(model), spaces, kept, replays=replays)
    replayed = Replayed(model)
    moved(model)
    backward(model, 0)
    before = [parameter.grad.clone() for parameter in trained(model)]
    regularizer.add_gradient()
    rows = [tuple(row) for row in replayed.steps]
    assert [len(row) for row in rows] == [replays if "predictions" in spaces else 0]
    value = written(rows[0])
    expected = torch.autograd.grad(value, trained(model))
    for parameter, plain, change in zip(trained(model), before, expected, strict=True):
        assert change.abs().max() > 1e-6
        torch.testing.assert_close(parameter.grad, plain + change, rtol=1e-9, atol=1e-12)
    assert regularizer.penalty() == pytest.approx(value.item(), rel=1e-9)


def clip(model):
    torch.nn.utils.clip_grad_norm_(trained(model), 0.05)


def train_as(how, model, optimizer, add, seeds):
    """One step. `add` adds the penalty where the hook does not."""
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if "scaled" in how else None
    for seed in seeds if "accumulated" in how else seeds[:1]:
        backward(model, seed, scaler)
    if "clipped" in how and scaler:
        scaler.unscale_(optimizer)
    if "clipped first" in how:
        clip(model)
    add()
    if "clipped last" in how:
        clip(model)
    optimizer.step() if scaler is None else scaler.step(optimizer)


HOW = ["plain", "accumulated", "scaled", "clipped first", "clipped last", "scaled clipped last"]


@pytest.mark.parametrize("name", ["SGD", "AdamW fused"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_the_written_loss(kind, how, name):
    """With all spaces. The reference is never scaled."""
    model, reference = make_denoiser(kind), make_denoiser(kind)
    optimizer, plain = make_optimizer(model, name), make_optimizer(reference, name)
    spaces = list(WEIGHT)
    regularizer = attach(model, optimizer, spaces, replays=2)
    written = Written(reference, spaces, record_denoiser(reference))
    replayed = Replayed(model)
    for number in range(4):
        seeds = [3 * number, 3 * number + 1, 3 * number + 2]
        add = regularizer.add_gradient if "clipped last" in how else lambda: None
        train_as(how, model, optimizer, add, seeds)
        values, rows = [], replayed.steps[-1]
        by_hand = functools.partial(lambda values, rows: values.append(written.add_gradient(rows)), values, rows)
        train_as(how.replace("scaled", ""), reference, plain, by_hand, seeds)
        assert regularizer.penalty() == pytest.approx(values[0], rel=1e-6, abs=1e-15)
        replayed.next_step()
    assert_close(model, reference, 1e-8)
    untouched = make_denoiser(kind)
    assert any((p - q).abs().max() > 1e-4 for p, q in zip(trained(model), trained(untouched), strict=True))


def quantized_with_lora():
    """Two layers, the first of which has 4-bit weights and a LoRA."""
    torch.manual_seed(0)
    net = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32), nn.SiLU(), nn.Linear(64, 8))
    net.load_state_dict(nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 8)).state_dict())
    net.to("cpu").requires_grad_(False)  # which quantizes
    net[0].support_avx512bf16_for_cpu = False  # processors that have it would compute in bfloat16 in eval mode
    return inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"]), net)


def test_quantized_weights_under_lora_are_replayed():
    photo, other = torch.randn(4, 64), torch.randn(1, 64)
    ends = []
    for how in ("attached", "written", "neither"):
        net = quantized_with_lora()
        optimizer = torch.optim.SGD(trained(net), lr=0.5)
        with record(net, layers=False) as recording, torch.no_grad():
            base = net(other)
        if how == "attached":
            attach(net, optimizer, recording=recording)
        for _ in range(5):
            optimizer.zero_grad()
            loss = (net(photo) - 1).square().mean()
            if how == "written":
                loss = loss + WEIGHT["predictions"] * (net(other) - base).square().mean()
            loss.backward()
            optimizer.step()
        ends.append(net.state_dict())
    assert_near(ends[0], ends[1])
    with pytest.raises(AssertionError):
        assert_near(ends[0], ends[2])


def assert_near(state, expected):
    for name, value in expected.items():
        if "lora_" in name:
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["proximal", "projected"])
def test_predictions_are_coupled_in_every_mode(mode):
    """The value is what they add, and what the mode has of parameters."""
    model = make_denoiser()
    optimizer = make_optimizer(model)
    spaces = ["parameters", "predictions"]
    recording = record_denoiser(model)
    written = Written(model, ["predictions"], recording)
    weights = Written(model, ["parameters"], None)
    regularizer = attach(model, optimizer, spaces, recording, mode=mode, radius=0.3)
    replayed = Replayed(model)
    moved(model, 0.01)
    backward(model, 0)
    before = [parameter.grad.clone() for parameter in trained(model)]
    point = [parameter.detach().clone() for parameter in trained(model)]
    optimizer.step()
    expected_after = weights(()).item() if mode == "proximal" else 0.0
    now = [parameter.detach().clone() for parameter in trained(model)]
    gradients = [parameter.grad.clone() for parameter in trained(model)]
    with torch.no_grad():
        for parameter, value in zip(trained(model), point, strict=True):
            parameter.copy_(value)
    value = written(replayed.steps[0])
    for gradient, plain, change in zip(gradients, before, torch.autograd.grad(value, trained(model)), strict=True):
        torch.testing.assert_close(gradient, plain + change, rtol=1e-9, atol=1e-12)
    assert regularizer.penalty() == pytest.approx(value.item() + expected_after, rel=1e-6)
    distance = torch.cat([(one - anchor).flatten() for one, anchor in zip(now, weights.anchors.values())]).norm()
    assert mode == "proximal" or distance <= 0.3 * (1 + 1e-6)


def test_penalty_before_the_first_step_is_without_predictions():
    model = make_denoiser()
    regularizer = attach(model, make_optimizer(model), ["layers", "predictions"])
    written = Written(model, ["layers"], regularizer.recording)
    moved(model)
    assert regularizer.penalty() == pytest.approx(written(()).item(), rel=1e-6)


def test_predictions_stay_nearer_with_it():
    drifts = []
    for weight in (1e-9, 300.0):
        model = make_denoiser()
        optimizer, recording = make_optimizer(model, "AdamW fused"), record_denoiser(model)
        LipschitzRegularizer(optimizer, weight={"predictions": weight}, recording=recording, replays=4)
        train(model, optimizer, steps=30)
        drifts.append(recording.drift().prediction)
    assert drifts[1] < 0.5 * drifts[0]


# Groups


def test_group_of_weight_0_gets_no_gradient_of_replays():
    model, plain = make_denoiser(), make_denoiser()
    first, rest = list(model.blocks[0].parameters()), [p for n, p in model.named_parameters() if "blocks.0" not in n]
    groups = [{"params": first, "lipschitz_weight": {"predictions": 0.0}}, {"params": rest}]
    regularizer = attach(model, torch.optim.SGD(groups, lr=LR))
    replayed, written = Replayed(model), Written(model, ["predictions"], regularizer.recording)
    moved(model), moved(plain)
    backward(model, 0), backward(plain, 0)
    before = [parameter.grad.clone() for parameter in trained(model)]
    regularizer.add_gradient()
    expected = torch.autograd.grad(written(replayed.steps[0]), trained(model))
    for (name, parameter), plain_gradient, change in zip(model.named_parameters(), before, expected, strict=True):
        total = plain_gradient if "blocks.0" in name else plain_gradient + change
        torch.testing.assert_close(parameter.grad, total, rtol=1e-9, atol=0 if "blocks.0" in name else 1e-12)


def test_groups_of_other_weights_are_refused():
    model = make_denoiser()
    rest = [p for n, p in model.named_parameters() if "blocks.0" not in n]
    groups = [{"params": model.blocks[0].parameters(), "lipschitz_weight": 1.0}, {"params": rest}]
    optimizer = torch.optim.SGD(groups, lr=LR)
    attach(model, optimizer)
    backward(model, 0)
    with pytest.raises(ValueError, match="all param groups need one weight, or 0"):
        optimizer.step()


def test_number_of_a_group_is_for_the_one_space_there_is_and_refused_where_there_are_several():
    model = make_denoiser()
    groups = [{"params": trained(model), "lipschitz_weight": 2.0}]
    regularizer = attach(model, torch.optim.SGD(groups, lr=LR))
    assert regularizer.spaces == ["predictions"]
    regularizer.remove()
    message = "param group 0` must say for which space it is, such as {'layers': 2.0}"
    with pytest.raises(ValueError, match=message):
        attach(model, torch.optim.SGD(groups, lr=LR), ["layers", "predictions"])


def test_parameters_of_other_models_and_of_no_gradient_are_left_alone():
    model, encoder = make_denoiser(), nn.Linear(3, 3)
    optimizer = torch.optim.SGD([*trained(model), *encoder.parameters()], lr=LR)
    regularizer = attach(model, optimizer)
    moved(model)
    encoder(torch.ones(3)).sum().backward()
    before = encoder.weight.grad.clone()
    regularizer.add_gradient()
    assert all(parameter.grad is None for parameter in model.parameters())
    backward(model, 0)
    model.conv_in.weight.grad = None
    regularizer.add_gradient()
    assert torch.equal(encoder.weight.grad, before) and model.conv_in.weight.grad is None


# What a replay leaves as it was


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [0.0, dict.fromkeys(WEIGHT, 0.0)], ids=["number", "by space"])
def test_weight_zero_is_bit_identical_to_training_without(weight, kind):
    model, plain = (make_denoiser(kind, dropout=0.2) for _ in range(2))
    recording = record_denoiser(model)
    optimizer = make_optimizer(model)
    LipschitzRegularizer(optimizer, weight=weight, recording=recording)
    assert not optimizer._optimizer_step_pre_hooks and not any(m._forward_hooks for m in model.modules())
    for one, other in ((model, optimizer), (plain, make_optimizer(plain))):
        torch.manual_seed(5)
        train(one, other)
    assert_identical(model, plain)


def snapshot(model):
    return {
        "modes": [module.training for module in model.modules()],
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [id(parameter.grad) for parameter in model.parameters()],
        "memory": [p.grad.data_ptr() for p in model.parameters() if p.grad is not None],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        "random": hash(torch.get_rng_state().numpy().tobytes()),
    }


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
@pytest.mark.parametrize("kind", KINDS)
def test_replay_leaves_all_but_the_numbers_of_gradients(kind, fails):
    model = make_denoiser(kind, dropout=0.5)
    model.blocks[1].eval()  # a part that is not in training stays so
    regularizer = attach(model, make_optimizer(model))
    moved(model)
    backward(model, 0)
    woken = []
    for parameter in trained(model):
        parameter.register_hook(lambda gradient: woken.append(gradient))
        parameter.register_post_accumulate_grad_hook(lambda parameter: woken.append(parameter))
    before, gradients = snapshot(model), [parameter.grad.clone() for parameter in trained(model)]
    if fails:
        handle = model.conv_out.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            regularizer.add_gradient()
        handle.remove()
    else:
        regularizer.add_gradient()
    assert snapshot(model) == before and not woken
    changed = [not torch.equal(p.grad, start) for p, start in zip(trained(model), gradients, strict=True)]
    assert all(changed) != fails and any(changed) != fails
    backward(model, 1)
    assert len(woken) == 2 * len(trained(model))  # in training they are woken as before


def test_held_out_calls_are_never_replayed():
    model = make_denoiser()
    regularizer = attach(model, make_optimizer(model), replays=4)
    replayed = Replayed(model)
    for _ in range(6):
        backward(model, 0)
        regularizer.optimizer.step()
    held_out = torch.cat([call.args[0] for call in regularizer.recording.calls if call.held_out])
    rows = [args[0] for args, _ in replayed.steps[0]]
    assert len(rows) == 24 and all(len(row) == 1 for row in rows)
    assert not any(torch.equal(row[0], other) for row in rows for other in held_out)


def test_calls_whose_rows_do_not_stand_alone_are_replayed_whole():
    model = make_denoiser()
    recording = record_denoiser(model)
    recording.splits = False
    regularizer = attach(model, make_optimizer(model), recording=recording)
    replayed = Replayed(model)
    written = Written(model, ["predictions"], recording)
    moved(model)
    backward(model, 0)
    regularizer.add_gradient()
    assert [len(args[0]) for args, _ in replayed.steps[0]] == [4]
    assert regularizer.penalty() == pytest.approx(written(replayed.steps[0]).item(), rel=1e-9)


# Draws and checkpoints


def drawn(replayed):
    """The prompts and the samples in each call of a row."""
    calls = [(kwargs["encoder_hidden_states"], args[0]) for args, kwargs in replayed.steps[0]]
    return [tuple(torch.cat([part.flatten() for part in call]).tolist()) for call in calls]


@pytest.mark.parametrize("replays", [1, 3, 5])
def test_draws_are_without_replacement_and_new_in_each_round(replays):
    model = make_denoiser()
    regularizer = attach(model, make_optimizer(model), replays=replays)
    replayed = Replayed(model)
    while len(replayed.steps[0]) < 36:  # 3 calls of 4 rows
        backward(model, 0)
        regularizer.optimizer.step()
    rows = drawn(replayed)
    rounds = [rows[:12], rows[12:24], rows[24:36]]
    assert all(len(set(part)) == 12 for part in rounds)
    assert rounds[0] != rounds[1] != rounds[2] != rounds[0]


def test_draws_depend_on_the_step_only():
    """Not on the random numbers of the training, nor on who adds the gradient."""
    rows = []
    for seed in (0, 1):
        model = make_denoiser(dropout=0.1)
        regularizer = attach(model, make_optimizer(model))
        replayed = Replayed(model)
        torch.manual_seed(seed)
        for step in range(5):
            backward(model, seed + step)
            if seed:
                regularizer.add_gradient()
            regularizer.optimizer.step()
        rows.append(drawn(replayed))
    assert rows[0] == rows[1]


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("spaces", SPACES, ids=" ".join)
def test_resumed_training_is_bit_identical(spaces, kind):
    def start():
        model = make_denoiser(kind, dtype=torch.float32)
        optimizer = make_optimizer(model, "AdamW fused")
        return model, optimizer, attach(model, optimizer, spaces)

    model, optimizer, regularizer = start()
    train(model, optimizer)
    checkpoint = copy.deepcopy([part.state_dict() for part in (model, optimizer, regularizer)])
    train(model, optimizer, first=3)
    resumed = start()
    for part, state in zip(resumed, checkpoint, strict=True):
        part.load_state_dict(state)
    train(*resumed[:2], first=3)
    assert_identical(model, resumed[0])


def test_resumed_training_replays_as_many_calls():
    states = []
    for replays in (3, 1):
        model = make_denoiser()
        regularizer = attach(model, make_optimizer(model), replays=replays)
        states.append(regularizer.state_dict())
    regularizer.load_state_dict(states[0])
    replayed = Replayed(model)
    backward(model, 0)
    regularizer.optimizer.step()
    assert len(replayed.steps[0]) == 3


@pytest.mark.parametrize(
    "saved, loaded, message",
    [
        ("another recording", ["layers", "predictions"], "trained with another recording"),
        (["parameters"], ["layers"], "trained with no recording"),
        (["layers"], ["parameters"], "trained with a recording"),
        (["layers"], ["predictions"], "trained in the space of layers"),
        (["parameters", "layers"], ["layers"], "trained in the space of parameters"),
    ],
)
def test_state_of_another_recording_or_space_is_refused(saved, loaded, message):
    regularizers = []
    for spaces in (saved, loaded):
        model = make_denoiser()
        recording = record_denoiser(model)
        if spaces == "another recording":
            spaces = loaded
            recording = record_denoiser(model, guidance_scale=3.0)
        kept = None if spaces == ["parameters"] else recording
        regularizers.append(attach(model, make_optimizer(model), spaces, kept))
    with pytest.raises(ValueError, match=message) as error:
        regularizers[1].load_state_dict(regularizers[0].state_dict())
    assert "\n" not in str(error.value)
    regularizers[1].load_state_dict(regularizers[1].state_dict())


def test_state_is_small_and_loads_without_trusting_pickle(tmp_path):
    model = make_denoiser()
    regularizer = attach(model, make_optimizer(model), list(WEIGHT))
    torch.save(regularizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(pickle.dumps(state)) < 700
    regularizer.load_state_dict(state)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("spaces", SPACES, ids=" ".join)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_copy_of_an_optimizer_trains_as_the_optimizer_does(kind, spaces, duplicate):
    model = make_denoiser(kind, dtype=torch.float32)
    optimizer = make_optimizer(model)
    attach(model, optimizer, spaces)
    train(model, optimizer, steps=2)
    copied_model, copied_optimizer = duplicate((model, optimizer))
    copied = copied_optimizer.defaults.regularizer
    assert copied.recording is None or copied.recording.model is copied_model
    train(model, optimizer, steps=3, first=2)
    train(copied_model, copied_optimizer, steps=3, first=2)
    assert_identical(model, copied_model)
    assert copied.penalty() == optimizer.defaults.regularizer.penalty() > 0


def test_removed_it_leaves_plain_training():
    model, plain = make_denoiser(), make_denoiser()
    optimizer = make_optimizer(model)
    regularizer = attach(model, optimizer, list(WEIGHT))
    regularizer.remove()
    assert not any(module._forward_hooks for module in model.modules()) and regularizer.recording is None
    train(model, optimizer), train(plain, make_optimizer(plain))
    assert_identical(model, plain)
    with pytest.raises(ValueError, match="remove"):
        regularizer.metrics()


# Precision, checkpointing, processes


def test_replays_run_under_the_autocast_of_the_training():
    """Also where it is turned on inside the forward pass, as accelerate does, and unlike in the recording."""
    model = make_denoiser(dtype=torch.float32)
    regularizer = attach(model, make_optimizer(model))
    seen, cached = [], []
    model.conv_out.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    model.conv_out.register_forward_hook(lambda *_: cached.append(torch.is_autocast_cache_enabled()))
    forward = type(model).forward

    def under_autocast(*args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return forward(model, *args, **kwargs)

    model.forward = under_autocast
    backward(model, 0)
    del model.forward
    regularizer.add_gradient()
    assert seen == [torch.bfloat16] * 2
    assert cached == [True, False]  # or it would keep copies of all weights, beside the gradients


@pytest.mark.parametrize("how", ["under autocast", "in its parameters"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_the_gradient_is_that_of_float32_in_fewer_digits(dtype, how):
    changes = []
    for in_16_bits in (False, True):
        kept = dtype if in_16_bits and how == "in its parameters" else torch.float32
        model = make_denoiser(dtype=torch.float32).to(dtype).to(kept)  # both with the same values
        regularizer = attach(model, make_optimizer(model), replays=12)
        moved(model).to(dtype).to(kept)
        with torch.autocast("cpu", dtype=dtype, enabled=in_16_bits and kept == torch.float32):
            backward(model, 0)
        for parameter in trained(model):
            parameter.grad.zero_()  # in 16 bits, a large one would swallow what is added
        regularizer.add_gradient()
        changes.append(torch.cat([parameter.grad.flatten().float() for parameter in trained(model)]))
        assert all(parameter.grad.dtype == kept for parameter in trained(model))
    error = (changes[1] - changes[0]).norm() / changes[0].norm()
    assert 0 < error < {torch.bfloat16: 0.05, torch.float16: 5e-3}[dtype]


def replay_in_float16(shift):
    """The changes of gradients by a model whose last layer passes little back, and whose answers are this far away."""
    model = make_denoiser(dtype=torch.float32)
    with torch.no_grad():
        model.conv_out.weight.mul_(1e-4)
    recording = record_denoiser(model)
    regularizer = attach(model, make_optimizer(model), recording=recording, replays=12)
    written, replayed = Written(model, ["predictions"], recording), Replayed(model)
    with torch.no_grad():
        model.conv_out.bias.add_(shift)
    with torch.autocast("cpu", dtype=torch.float16):
        backward(model, 0)
    for parameter in trained(model):
        parameter.grad.zero_()
    regularizer.add_gradient()
    return model, regularizer, torch.autograd.grad(written(replayed.steps[0]), trained(model))


def test_in_float16_small_gradients_do_not_vanish():
    model, _, expected = replay_in_float16(0.05)
    for parameter, gradient in zip(trained(model), expected, strict=True):
        assert (parameter.grad - gradient).norm() < 0.05 * gradient.norm()
    assert expected[0].abs().max() < WEIGHT["predictions"] * torch.finfo(torch.float16).tiny


def test_in_float16_a_gradient_that_overflows_is_left_out_and_the_next_is_scaled_less():
    model, regularizer, _ = replay_in_float16(3e4)
    assert all(parameter.grad.isfinite().all() for parameter in trained(model))
    state = regularizer.state_dict()
    assert state["loss_scale"] == 2**15
    other, resumed, _ = replay_in_float16(0.0)
    assert resumed.state_dict()["loss_scale"] == 2**16
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", ["reentrant", "not reentrant"])
def test_gradient_checkpointing_trains_the_same(checkpointing, kind):
    models = [make_denoiser(kind, checkpointing=how) for how in (None, checkpointing)]
    for model in models:
        if kind == "keys and values" and checkpointing == "reentrant":
            # It needs an input that requires a gradient, as in all training with it.
            model.conv_in.bias.requires_grad_(True)
        optimizer = make_optimizer(model)
        attach(model, optimizer, list(WEIGHT), replays=2)
        train(model, optimizer)
    assert_close(models[1], models[0])


PROCESS = """
import sys
import torch
from torch import nn
from denoiser import make_denoiser, backward, record_denoiser, trained
from lipschitz_reg import LipschitzRegularizer

rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
for dtype in (torch.float32, torch.float64):
    model = make_denoiser(dtype=dtype)
    recording = record_denoiser(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    weight = {"parameters": 5.0, "layers": 0.3, "predictions": 40.0}
    regularizer = LipschitzRegularizer(optimizer, weight=weight, recording=recording)
    for step in range(4):
        optimizer.zero_grad()
        backward(parallel, 2 * step + rank)
        optimizer.step()
    torch.save((model.state_dict(), regularizer.penalty()), f"{rank} {dtype}.pt")
torch.distributed.destroy_process_group()
"""


def test_processes_keep_the_same_bits_and_train_as_one(tmp_path):
    """One process has the batches of both."""
    folder = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{folder.parent}"}
    commands = [[sys.executable, "-c", PROCESS, str(rank), str(tmp_path / "store")] for rank in (0, 1)]
    processes = [subprocess.Popen(command, cwd=tmp_path, env=environment) for command in commands]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    for dtype in (torch.float32, torch.float64):
        (first, value), (second, other) = (torch.load(tmp_path / f"{rank} {dtype}.pt") for rank in (0, 1))
        assert value == other and all(torch.equal(first[name], second[name]) for name in first)
        model = make_denoiser(dtype=dtype)
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        regularizer = attach(model, optimizer, list(WEIGHT))
        for step in range(4):
            optimizer.zero_grad()
            backward(model, 2 * step), backward(model, 2 * step + 1)
            for parameter in trained(model):
                parameter.grad.div_(2)
            optimizer.step()
        tolerance = 1e-4 if dtype == torch.float32 else 1e-8
        assert value == pytest.approx(regularizer.penalty(), rel=10 * tolerance)
        for name, parameter in model.state_dict().items():
            torch.testing.assert_close(first[name], parameter, rtol=tolerance, atol=tolerance)


# What is refused


def test_no_replays_are_refused():
    model = make_denoiser()
    with pytest.raises(ValueError, match="`replays` must be at least 1, not 0"):
        attach(model, make_optimizer(model), replays=0)


@pytest.mark.parametrize("recorded", ["nothing", "held out only"])
def test_recording_without_calls_to_replay_is_refused(recorded):
    model = make_denoiser()
    with record(model) as recording:
        if recorded == "held out only":
            with recording.held_out():
                draw(model)
    with pytest.raises(ValueError, match="holds no calls of the denoiser to replay") as error:
        attach(model, make_optimizer(model), recording=recording)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["coupled", "proximal"])
def test_a_step_with_a_closure_gives_the_same_bits(mode):
    def train(with_closure):
        model = make_denoiser()
        optimizer = make_optimizer(model)
        attach(model, optimizer, mode=mode)

        def closure():
            optimizer.zero_grad()
            loss = sum(parameter.square().sum() for parameter in model.parameters())
            loss.backward()
            return loss

        for _ in range(2):
            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(train(True), train(False), strict=True))


class TimeInFloat32(nn.Module):
    """Embeds its timestep before anything else, as diffusers' models do, and hands it on in the sample's dtype."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, sample, timestep):
        time = (timestep.flatten()[:, None] * torch.arange(1, 5) / 10).sin()
        return self.linear(sample + time.to(sample.dtype))


class TimeInItsOwnDtype(TimeInFloat32):
    def forward(self, sample, timestep):
        return self.linear(sample + self.linear(timestep.flatten()[:, None].expand(-1, 4)))


def test_a_model_that_does_not_cast_its_timestep_is_replayed_in_another_dtype():
    model = TimeInItsOwnDtype()
    with record(model, guidance_scale=None) as recording, torch.no_grad():
        model(torch.randn(2, 4), torch.full((2,), 0.3))
    (call,) = recording.calls
    assert call.again(model.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_timesteps_keep_their_bits_in_a_model_of_few(shape):
    """In bfloat16 a timestep of 901 would be 900, and a model that has not moved would seem to have drifted."""
    torch.manual_seed(0)
    model = TimeInFloat32().to(torch.bfloat16)
    with record(model, guidance_scale=None) as recording, torch.no_grad():
        for held_out in (False, True):
            with recording.held_out() if held_out else contextlib.nullcontext():
                model(torch.randn(2, 4, dtype=torch.bfloat16), torch.full(shape, 901.0))
    wrapped = torch.nn.parallel.DataParallel(model)  # whose forward does not name the timestep
    assert recording.drift(wrapped).dial == 0
    assert recording.rounding_drift().dial > 0
    regularizer = LipschitzRegularizer(
        torch.optim.SGD(model.parameters(), lr=LR), weight={"predictions": 1.0}, recording=recording
    )
    model(torch.ones(2, 4, dtype=torch.bfloat16), torch.full(shape, 1.0)).sum().backward()
    regularizer.optimizer.step()
    assert regularizer.penalty() == 0
    assert recording.splits


def test_a_copy_of_the_model_does_not_carry_the_recording():
    model = make_denoiser()
    attach(model, make_optimizer(model))
    carried = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in carried:
        hooks = [hook for module in other.modules() for hook in module._forward_hooks.values()]
        assert hooks and all(hook.replay is None for hook in hooks)
        draw(other)  # they do nothing
