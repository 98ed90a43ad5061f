# The optimizers by name, as trainers get them: against the plain ones with a regularizer by hand, on adapters of peft
# and of LyCORIS. What a regularizer does is in test_regularizer.py and test_lora.py.
import ast
import copy
import gc
import importlib
import math
import pickle
import subprocess
import sys

import pytest
import torch
from denoiser import backward, make_denoiser, record_denoiser, trained
from lycoris.modules.locon import LoConModule
from torch import nn

from lipschitz_reg import LipschitzRegularizer, find_lora_adapters, optim
from lipschitz_reg.lora import find_adapters


# The class that each is, and what a trainer passes on to it.
# All of them, with arguments that let four steps move the weights.
CLASSES = dict.fromkeys(optim._MODULES, "lr=1e-2") | {
    "SGD": "lr=1e-2 momentum=0.9",
    "SGD8bit": "lr=1e-2 momentum=0.9",
    "Prodigy": "lr=1.0 d0=1e-2",
    "RAdamScheduleFree": "lr=1e-2 silent_sgd_phase=False",
    "Adafactor": "lr=1e-2 relative_step=False scale_parameter=False",
    **{name: "lr=1.0" for name in optim._MODULES if name.startswith("DAdapt")},
}


def load(name, parameters, arguments):
    """As kohya's trainers do: the class by its dotted name, each argument by `ast.literal_eval`."""
    options = dict(argument.split("=") for argument in arguments.split())
    options = {key: ast.literal_eval(value) for key, value in options.items()}
    module, _, name = name.rpartition(".")
    optimizer = getattr(importlib.import_module(module), name)(parameters, **options)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def ours(name, parameters, arguments="lipschitz_weight=3.0"):
    return load(f"lipschitz_reg.optim.{name}", parameters, f"{CLASSES[name]} {arguments}")


def plain(name, parameters, arguments=""):
    return load(f"{optim._MODULES[name]}.{name}", parameters, f"{CLASSES[name]} {arguments}")


def train(model, optimizer, steps=4):
    for seed in range(steps):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def assert_equal(first, second):
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", CLASSES)
def test_weight_zero_is_the_optimizer_itself(name):
    model, other = make_denoiser(dtype=torch.float32), make_denoiser(dtype=torch.float32)
    optimizer = ours(name, model.parameters(), "lipschitz_weight=0")
    assert optimizer.regularizer is None
    assert_equal(train(model, optimizer), train(other, plain(name, other.parameters())))


@pytest.mark.parametrize("name", CLASSES)
def test_it_is_the_optimizer_with_a_regularizer(name):
    model, other = make_denoiser(dtype=torch.float32), make_denoiser(dtype=torch.float32)
    optimizer = ours(name, [{"params": list(model.parameters()), "lr": 1e-3}])
    assert isinstance(optimizer, getattr(importlib.import_module(optim._MODULES[name]), name))
    assert type(optimizer).__name__ == name and optimizer.param_groups[0]["lr"] == 1e-3
    by_hand = plain(name, [{"params": list(other.parameters()), "lr": 1e-3}], "weight_decay=0.0")
    LipschitzRegularizer(by_hand, weight=3.0)
    assert_equal(train(model, optimizer), train(other, by_hand))
    assert optimizer.regularizer.metrics()["lipschitz/penalty"] > 0


@pytest.mark.parametrize("mode", ["proximal", "projected"])
@pytest.mark.parametrize("name", CLASSES)
def test_it_is_held_after_its_steps_or_refused(name, mode):
    model, other = make_denoiser(dtype=torch.float32), make_denoiser(dtype=torch.float32)
    start = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def distance(parameters):
        return (torch.cat([parameter.flatten() for parameter in parameters]) - start).norm().item()

    free = distance(train(other, plain(name, other.parameters(), "weight_decay=0.0")))
    options = f"lipschitz_weight=10.0 lipschitz_reduction='sum' lipschitz_mode='{mode}'"
    options += f" lipschitz_radius={free / 2}" if mode == "projected" else ""
    if name.startswith("DAdapt") or name.endswith("ScheduleFree") or (name, mode) == ("Prodigy", "proximal"):
        with pytest.raises(ValueError, match="mode 'coupled'"):
            ours(name, model.parameters(), options)
        return
    held = distance(train(model, ours(name, model.parameters(), options)))
    assert held == pytest.approx(free / 2, rel=1e-3) if mode == "projected" else 0.1 * free < held < 0.9 * free


def test_weight_decay_is_what_was_given_and_otherwise_zero():
    parameters = [nn.Parameter(torch.ones(2))]
    for arguments, decay in (("lipschitz_weight=1", 0.0), ("lipschitz_weight=1 weight_decay=0.1", 0.1)):
        assert ours("AdamW", parameters, arguments).param_groups[0]["weight_decay"] == decay
    assert ours("AdamW", parameters, "lipschitz_weight=0").param_groups[0]["weight_decay"] == 0.01


def test_arguments_may_be_the_strings_of_a_command_line():
    options = {"weight": "{'parameters': 2}", "mode": "projected", "radius": "0.5", "reduction": "'sum'"}
    options |= {"anchor_device": "cpu", "lora_form": "delta", "recording": "None"}
    parameter = nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([parameter], lr=1.0, **{f"lipschitz_{name}": value for name, value in options.items()})
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert math.isclose((parameter - 1).norm().item(), 0.5, rel_tol=1e-6)
    assert optimizer.regularizer.weight["parameters"] == 2 and optimizer.regularizer.reduction == "sum"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`lipschitz_weight` is missing"),
        ({"lipschitz_weight": "much"}, "`lipschitz_weight` must be a number, not 'much'"),
        ({"lipschitz_weight": {"layers": "much"}}, "`lipschitz_weight` must be a number, not 'much'"),
        ({"lipschitz_weight": -1}, "`weight` must be a finite number"),
        ({"lipschitz_weight": 1, "lipschitz_radius": "big"}, "`lipschitz_radius` must be a number"),
        ({"lipschitz_weight": 1, "lipschitz_strength": 1}, "There is no `lipschitz_strength`, only lipschitz_weight,"),
        ({"lipschitz_weight": 1, "lipschitz_mode": "near"}, "`mode` must be one of coupled, proximal, projected"),
        ({"lipschitz_weight": {"layers": 1.0}}, "needs a `recording`"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        optim.AdamW([nn.Parameter(torch.ones(1))], **options)


def test_unknown_names_and_missing_packages_are_said(monkeypatch):
    with pytest.raises(AttributeError, match="has no AdamX. It has: AdamW,"):
        optim.AdamX
    monkeypatch.setitem(sys.modules, "dadaptation", None)
    monkeypatch.delitem(vars(optim), "DAdaptAdam", raising=False)
    with pytest.raises(ImportError, match="pip install dadaptation"):
        optim.DAdaptAdam
    assert "Prodigy" in dir(optim)


def test_packages_are_imported_when_they_are_used():
    code = """
import sys, lipschitz_reg.optim as optim, lipschitz_reg.integrations
heavy = set("bitsandbytes transformers prodigyopt schedulefree lion_pytorch lightning pytorch_lightning".split())
optim.AdamW, dir(optim)
assert not heavy & set(sys.modules), heavy & set(sys.modules)
optim.Prodigy
assert "prodigyopt" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_is_penalized_too(duplicate):
    model = make_denoiser()
    optimizer = ours("AdamW", model.parameters(), "lipschitz_weight=3.0")
    model_copy, optimizer_copy = duplicate((model, optimizer))
    assert_equal(train(model, optimizer), train(model_copy, optimizer_copy))
    assert optimizer_copy.regularizer.metrics() == optimizer.regularizer.metrics()


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Prodigy"])
def test_resumed_training_is_bit_identical_and_another_base_is_refused(name, tmp_path):
    record_denoiser(make_denoiser(dtype=torch.float32)).save(tmp_path / "base.safetensors")
    options = (
        f"lipschitz_weight={{'parameters':3.0,'predictions':1.0}} lipschitz_recording='{tmp_path}/base.safetensors'"
    )
    results = []
    for stops in (False, True):
        model = make_denoiser(dtype=torch.float32)
        optimizer = ours(name, model.parameters(), options)
        train(model, optimizer, steps=2)
        if stops:
            torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
            model = make_denoiser(dtype=torch.float32)
            optimizer = ours(name, model.parameters(), options)
            states = torch.load(tmp_path / "state.pt", weights_only=True)
            model.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
        results.append(train(model, optimizer, steps=2))
    assert_equal(*results)
    other = ours(name, make_denoiser(dtype=torch.float32, seed=1).parameters())
    with pytest.raises(ValueError, match="another base model"):
        other.load_state_dict(states[1])


def test_the_state_of_plain_training_loads():
    model, other = make_denoiser(dtype=torch.float32), make_denoiser(dtype=torch.float32)
    before = plain("AdamW", other.parameters())
    train(other, before)
    optimizer = ours("AdamW", model.parameters())
    optimizer.load_state_dict(before.state_dict())
    train(model, optimizer)
    before.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("first", ["optimizer", "hooks"])
@pytest.mark.parametrize("steps", [False, True], ids=["never steps", "steps without gradients"])
def test_a_fused_backward_pass_is_refused(steps, first):
    model = make_denoiser()
    optimizer = ours("SGD", model.parameters()) if first == "optimizer" else None

    def step(parameter):
        parameter.data.sub_(0.1 * parameter.grad)
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    optimizer = optimizer or ours("SGD", model.parameters())
    with pytest.raises(ValueError, match="without step\\(\\) of the optimizer"):
        for seed in range(3):
            backward(model, seed)
            if steps:
                optimizer.step()


def test_a_parameter_without_a_gradient_does_not_hide_a_fused_backward_pass():
    unused, used = nn.Linear(1, 1), nn.Linear(4, 4)
    ours("SGD", [*unused.parameters(), *used.parameters()])

    def step(parameter):
        parameter.data.sub_(0.1 * parameter.grad)

    for parameter in used.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    with pytest.raises(ValueError, match="without step\\(\\) of the optimizer"):
        for _ in range(2):
            used(torch.ones(1, 4)).sum().backward()


def test_a_dropped_batch_is_no_fused_backward_pass():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = ours("SGD", [*first.parameters(), *second.parameters()])
    first(torch.ones(1, 4)).sum().backward()
    optimizer.zero_grad()
    for _ in range(2):
        second(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    assert optimizer.regularizer.metrics()["lipschitz/distance"] > 0


def test_accumulated_gradients_and_loaded_weights_are_no_fused_backward_pass():
    model = make_denoiser()
    optimizer = ours("SGD", model.parameters())
    state = {name: value + 0.01 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    for seed in range(6):
        backward(model, seed)
        if seed % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.regularizer.metrics()["lipschitz/distance"] > 0
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_peft_adapters_pay_for_their_product():
    model, other = make_denoiser("lora"), make_denoiser("lora")
    optimizer = ours("AdamW", trained(model))
    by_hand = plain("AdamW", trained(other), "weight_decay=0.0")
    LipschitzRegularizer(by_hand, weight=3.0, adapters=find_lora_adapters(other))
    assert_equal(train(model, optimizer), train(other, by_hand))
    names = [name for name in optimizer.regularizer.metrics(per_adapter=True) if "distance/" in name]
    assert "lipschitz/distance/blocks.0.to_q" in names


def add_lycoris(model, **options):
    """LyCORIS' LoRA beside the linear layers of a model, as trainers apply it; returns what holds it."""
    model.requires_grad_(False)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    network = nn.ModuleDict()
    for name, layer in layers.items():
        name = name.replace(".", "_")
        network[name] = LoConModule(f"lora_unet_{name}", layer, lora_dim=2, alpha=3, **options).to(layer.weight)
        network[name].apply_to()
    return network


@torch.no_grad()
def products(network):
    return [m.scale * m.multiplier * m.lora_up.weight @ m.lora_down.weight for m in network.values()]


@pytest.mark.parametrize("multiplier", [1.0, 0.5])
def test_adapters_beside_the_model_pay_for_their_product(multiplier):
    distances = []
    for weight in (300.0, 1e-12):
        model = make_denoiser()
        network = add_lycoris(model, multiplier=multiplier)
        optimizer = ours("AdamW", network.parameters(), f"lipschitz_weight={weight}")
        train(model, optimizer, steps=12)
        metrics = optimizer.regularizer.metrics(per_adapter=True)
        distances.append(metrics["lipschitz/distance"])
        expected = torch.cat([product.flatten() for product in products(network)]).norm().item()
        assert math.isclose(distances[-1], expected, rel_tol=1e-6)
        assert metrics["lipschitz/relative_distance"] > 0  # the weights that they act on are known
        assert metrics["lipschitz/distance/lora_unet_blocks_0_to_q"] > 0
    assert distances[0] < 0.5 * distances[1]


def test_adapters_that_are_no_product_are_parameters():
    model = make_denoiser()
    network = add_lycoris(model, use_scalar=True)
    assert not find_adapters(network.parameters())
    optimizer = ours("SGD", network.parameters())
    train(model, optimizer)
    assert optimizer.regularizer.metrics()["lipschitz/distance"] > 0


def test_adapters_come_in_the_order_of_the_parameters_and_those_of_others_do_not():
    first, second = add_lycoris(make_denoiser()), add_lycoris(make_denoiser())
    modules = [*second.values()][::-1]
    found = find_adapters([p for module in modules for p in module.parameters()])
    assert [a.down for a in found] == [module.lora_down.weight for module in modules]
    assert all(a.down is not module.lora_down.weight for a in found for module in first.values())


@pytest.mark.parametrize("kind", ["full", "lora", "lycoris"])
def test_a_recording_is_found_its_model_by_the_names(kind, tmp_path):
    base = make_denoiser()
    record_denoiser(base).save(tmp_path / "base.safetensors")
    drifts = []
    twin = make_denoiser()  # it has the same names, but does not train
    for weight in ({"layers": 20.0, "predictions": 20.0}, {"layers": 1e-12, "predictions": 1e-12}):
        model = make_denoiser("lora" if kind == "lora" else "full")
        parameters = add_lycoris(model).parameters() if kind == "lycoris" else trained(model)
        weight = str(weight).replace(" ", "")
        options = f"lipschitz_weight={weight} lipschitz_recording='{tmp_path / 'base.safetensors'}'"
        optimizer = ours("AdamW", parameters, options)
        recording = optimizer.regularizer.recording
        assert recording.model is model and recording.model is not twin
        train(model, optimizer, steps=6)
        drifts.append(recording.drift().prediction)
    assert 0 < drifts[0] < 0.6 * drifts[1]


@pytest.mark.parametrize("kind", ["lora", "lycoris"])
def test_predictions_move_adapters_by_their_weight_wherever_they_are(kind, tmp_path):
    """With one weight and twice that, the gradient of the term alone is once and twice as large."""
    record_denoiser(make_denoiser()).save(tmp_path / "base.safetensors")
    gradients = []
    for weight in (1.0, 2.0):
        model = make_denoiser("lora" if kind == "lora" else "full")
        network = add_lycoris(model) if kind == "lycoris" else model
        with torch.no_grad():
            for parameter in trained(network):
                parameter.add_(0.05)
        options = f"lipschitz_weight={{'predictions':{weight}}} lipschitz_recording='{tmp_path / 'base.safetensors'}'"
        optimizer = ours("SGD", trained(network), options)
        for parameter in trained(network):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.regularizer.add_gradient()
        gradients.append([parameter.grad for parameter in trained(network)])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(2 * first, second)
    assert sum(gradient.abs().sum() for gradient in gradients[0]) > 0


def test_a_recording_of_another_architecture_is_refused(tmp_path):
    record_denoiser(make_denoiser()).save(tmp_path / "base.safetensors")
    gc.collect()
    options = {"lipschitz_weight": {"layers": 1.0}, "lipschitz_recording": str(tmp_path / "base.safetensors")}
    with pytest.raises(ValueError, match="another architecture"):
        optim.AdamW(nn.Linear(2, 2).parameters(), **options)
