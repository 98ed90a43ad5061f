# What `python -m lipschitz_reg.run` promises: any training script, unedited. Its main paths as users run them, the
# others by its `main` in this process. Holds no test of the penalty's arithmetic.
import functools
import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lipschitz_reg import LipschitzRegularizer, run


ROOT = Path(__file__).parents[1]
ADD_PARAM_GROUP = torch.optim.Optimizer.add_param_group

MODEL = """
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
"""
OPTIMIZER = "optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)\n"
STEPS = """
def loss():
    optimizer.zero_grad()
    loss = (model(torch.ones(2, 4)) - 3).square().mean()
    loss.backward()
    return loss
for _ in range(3):
    loss()
    optimizer.step()
"""
TRAIN = MODEL + OPTIMIZER + STEPS
LORA = MODEL + "import peft\nmodel = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=['0', '1']))\n"
WEIGHT = "--lipschitz_weight=50"


@pytest.fixture
def launch(tmp_path, monkeypatch, capsys):
    """Runs a script, given as text or as a path, by `main` in this process. Returns its names, its code and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])

    def call(script, *options, args=()):
        if isinstance(script, str):
            Path("train.py").write_text(script)
            script = "train.py"
        capsys.readouterr()
        before, code, message = sys.modules["__main__"], 0, ""
        try:
            run.main([*map(str, options), str(script), *map(str, args)])
        except SystemExit as end:
            code, message = (end.code, "") if isinstance(end.code, int) else (1, end.code or "")
        assert torch.optim.Optimizer.add_param_group is ADD_PARAM_GROUP
        now = sys.modules["__main__"]
        names = SimpleNamespace(**(vars(now) if now is not before else {}))
        return names, code, capsys.readouterr().err + message

    return call


def refused(result):
    """The one line of a run that was stopped."""
    _, code, err = result
    line = err.strip().splitlines()[-1]
    assert code and line.startswith("python -m lipschitz_reg.run: error: "), err
    return line


def weights(script):
    return [parameter.detach() for parameter in script.model.parameters()]


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def reference(text, optimizer=OPTIMIZER, **options):
    """The same script with the library in it."""
    names = {}
    head, tail = text.split(OPTIMIZER)
    exec(head + optimizer, names)
    regularizer = LipschitzRegularizer(names["optimizer"], weight=50.0, **options)
    exec(tail, names)
    return [parameter.detach() for parameter in names["model"].parameters()], regularizer


# As users run it


PARITY = f"""
import json, os, sys
{TRAIN}
print(sys.argv, __name__, __file__, __spec__, __package__, sys.path[0], sys.modules["__main__"].TRAINED
      if hasattr(sys.modules["__main__"], "TRAINED") else sorted(globals()))
print([parameter.double().sum().item() for parameter in model.parameters()])
def fail():
    try:
        {{}}[1]
    except KeyError:
        raise RuntimeError("of the script")
if "fail" in sys.argv:
    fail()
"""


def python(folder, *command, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True,
                            text=True, timeout=300, **options)  # fmt: skip
    return result.returncode, result.stdout, result.stderr


def test_with_weight_0_all_is_as_without_the_launcher(tmp_path):
    folder = tmp_path / "scripts"
    folder.mkdir()
    folder.joinpath("train.py").write_text(PARITY)
    script = "scripts/train.py", "--lipschitz_weight", "3", "fail", "--", "-m"
    plain = python(tmp_path, *script)
    assert plain[0] == 1 and "RuntimeError: of the script" in plain[2]
    assert python(tmp_path, "-m", "lipschitz_reg.run", "--lipschitz_weight", "0", *script) == plain
    code, out, err = python(tmp_path, "-m", "lipschitz_reg.run", WEIGHT, *script)
    assert (code, out.splitlines()[0]) == (1, plain[1].splitlines()[0])
    assert err.endswith(plain[2]) and err.count("\n") == plain[2].count("\n") + 1
    assert out != plain[1]


def test_a_signal_ends_the_script_as_without_the_launcher(tmp_path):
    tmp_path.joinpath("train.py").write_text(f"{TRAIN}\nimport time\nprint('trained', flush=True)\ntime.sleep(60)")
    command = [sys.executable, "-m", "lipschitz_reg.run", WEIGHT, "train.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # In the background of a shell, SIGINT is ignored, and children inherit that.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, preexec_fn=heard, **pipes)
    assert process.stdout.readline() == "trained\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    _, header, first, *_ = err.splitlines()
    assert header == "Traceback (most recent call last):" and first.startswith(
        f'  File "{tmp_path / "train.py"}", line'
    )


# What is penalized


@pytest.mark.parametrize("mode", ["coupled", "proximal", "projected"])
def test_it_gives_the_bits_of_the_library(launch, mode):
    options = {"mode": mode, "reduction": "sum", "radius": 0.01 if mode == "projected" else None}
    flags = [f"--lipschitz_mode={mode}", "--lipschitz_reduction=sum"]
    flags += ["--lipschitz_radius=0.01"] if mode == "projected" else []
    script, code, err = launch(TRAIN, WEIGHT, *flags)
    expected, regularizer = reference(TRAIN, **options)
    assert code == 0 and same_bits(weights(script), expected)
    assert f"3 steps; distance from the base {regularizer.metrics()['lipschitz/distance']:.4g}" in err


@pytest.mark.parametrize(
    "kind, name, method",
    [
        ("", "train_dreambooth_lipschitz", "full"),
        ("", "train_dreambooth_lipschitz", "lora"),
        ("xl", "train_dreambooth_lipschitz_sdxl", "lora"),
    ],
)
def test_it_gives_the_bits_of_our_own_script(launch, request, photos, tmp_path, kind, name, method):
    run_script = request.getfixturevalue(f"run_{'sdxl_' if kind else ''}script")
    base = request.getfixturevalue(f"tiny_sd{kind}")
    flags = [f"--pretrained_model_name_or_path={base}", f"--instance_data_dir={photos}", "--seed=7"]
    flags += [f"--method={method}"]
    flags += ["--instance_prompt=a photo of sks dog", "--resolution=16", "--learning_rate=1e-3"]
    flags += ["--max_train_steps=2", "--adam_weight_decay=0", "--checkpointing_steps=100"]

    def trained(name):
        (file,) = Path(tmp_path, name, "unet" if method == "full" else "").glob("*.safetensors")
        return load_file(file)

    run_script(*flags, "--lipschitz_weight=50", f"--output_dir={tmp_path / 'own'}")
    run_script(*flags, "--lipschitz_weight=0", f"--output_dir={tmp_path / 'plain'}")
    reset_accelerate()
    flags += ["--lipschitz_weight=0", f"--output_dir={tmp_path / 'launched'}"]
    _, code, err = launch(ROOT / f"{name}.py", WEIGHT, args=flags)
    assert code == 0, err
    own, plain, launched = map(trained, ("own", "plain", "launched"))
    assert same_bits(launched.values(), own.values()) and not same_bits(launched.values(), plain.values())


def reset_accelerate():
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_the_product_of_lora_is_penalized_and_anchors_are_not_taken_of_frozen_weights(launch):
    script, code, err = launch(LORA + OPTIMIZER + STEPS, WEIGHT)
    assert code == 0 and "penalizes 2 LoRA adapters (48 parameters)" in err and "anchors: none" in err
    regularizer = script.optimizer.defaults.regularizer
    product = [
        layer.lora_B.default.weight @ layer.lora_A.default.weight * 4 for layer in script.model.base_model.model
    ]
    distance = torch.stack([p.norm() for p in product]).norm().item()
    assert regularizer.metrics()["lipschitz/distance"] == pytest.approx(distance)


KOHYA = """
class Lora(torch.nn.Module):
    def __init__(self, layer, rank, alpha):
        super().__init__()
        self.lora_down = torch.nn.Linear(layer.in_features, rank, bias=False)
        self.lora_up = torch.nn.Linear(rank, layer.out_features, bias=False)
        torch.nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.scale, self.multiplier, self.org_forward = alpha / rank, 1.0, layer.forward
        layer.forward = self.forward
    def forward(self, x):
        return self.org_forward(x) + self.lora_up(self.lora_down(x)) * self.scale * self.multiplier
network = torch.nn.ModuleList([Lora(layer, 2, 3) for layer in model])
"""


def test_adapters_of_kohya_and_lycoris_are_known_by_their_attributes(launch):
    script, code, err = launch(MODEL + KOHYA + OPTIMIZER.replace("model.", "network.") + STEPS, WEIGHT)
    assert code == 0 and "penalizes 2 LoRA adapters (48 parameters)" in err
    metrics = script.optimizer.defaults.regularizer.metrics()
    product = [lora.lora_up.weight @ lora.lora_down.weight * 1.5 for lora in script.network]
    assert metrics["lipschitz/distance"] == pytest.approx(torch.stack([p.norm() for p in product]).norm().item())
    base = torch.stack([layer.weight.norm() for layer in script.model]).norm().item()
    assert metrics["lipschitz/relative_distance"] == pytest.approx(metrics["lipschitz/distance"] / base)


def test_parameters_and_optimizers_are_chosen_by_patterns(launch, tmp_path):
    text = TRAIN + "other = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())\nother.step()\n"
    flags = [WEIGHT, f"--lipschitz_log={tmp_path / 'log.jsonl'}", "--lipschitz_exclude=*.bias"]
    flags += ["--lipschitz_exclude=Sequential.1.*", "--lipschitz_exclude_optimizer=AdamW.1", "--lipschitz_exclude=odd"]
    _, code, err = launch(text, *flags)
    assert code == 0 and "penalizes 1 tensors (32 parameters)" in err and "nothing matches 'odd'" in err
    start = json.loads(tmp_path.joinpath("log.jsonl").read_text().splitlines()[0])
    assert start["penalized"] == ["Sequential.0.weight"] and "Sequential.1.weight" in start["left_out"]
    _, _, err = launch(text, WEIGHT, "--lipschitz_include=*.bias", "--lipschitz_exclude_optimizer=AdamW")
    assert "nothing was penalized: all that trained was left out" in err


def test_a_group_that_comes_later_is_penalized_too(launch):
    text = MODEL + OPTIMIZER.replace("model.", "model[0].") + STEPS
    text += "optimizer.add_param_group({'params': model[1].parameters(), 'lr': 1.0})\n" + STEPS
    script, code, err = launch(text, "--lipschitz_weight=1e9", "--lipschitz_mode=proximal")
    assert code == 0 and "6 steps" in err
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    torch.testing.assert_close(weights(script), [p.detach() for p in base.parameters()], rtol=0, atol=1e-5)


def test_one_optimizer_for_each_parameter(launch):
    text = MODEL + "optimizers = [torch.optim.SGD([p], lr=1e-2) for p in model.parameters()]\n"
    text += STEPS.replace("    optimizer.step()", "    [optimizer.step() for optimizer in optimizers]")
    text = text.replace("optimizer.zero_grad()", "model.zero_grad()")
    script, code, err = launch(text, WEIGHT)
    expected, _ = reference(TRAIN, optimizer=OPTIMIZER.replace("AdamW", "SGD"))
    assert code == 0 and same_bits(weights(script), expected)
    assert err.count("penalizes") == 1 and "penalizes 4 tensors (76 parameters)" in err
    assert "span all parameters" in refused(launch(text, WEIGHT, "--lipschitz_reduction=mean"))


NESTED = """
class Outer(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.inner, self.failed = torch.optim.AdamW(self.param_groups[0]["params"], lr=1e-2, weight_decay=0.0), False
        self.param_groups[0].update({k: v for k, v in self.inner.param_groups[0].items() if k != "params"})
    def step(self, closure=None):
        if not self.failed:
            self.failed = True
            raise MemoryError
        self.inner.step(closure)
optimizer = Outer(model.parameters())
try:
    optimizer.step()
except MemoryError:
    pass
"""


def test_of_nested_optimizers_the_outermost_acts_even_after_one_that_raised(launch):
    script, code, _ = launch(MODEL + NESTED + STEPS, WEIGHT)
    expected, _ = reference(TRAIN)
    assert code == 0 and same_bits(weights(script), expected)


def test_closures_are_wrapped(launch):
    script, code, _ = launch(TRAIN.replace("    loss()\n    optimizer.step()", "    optimizer.step(loss)"), WEIGHT)
    expected, _ = reference(TRAIN)
    assert code == 0 and same_bits(weights(script), expected)


def test_a_model_that_is_gone_is_not_kept_in_memory(launch):
    again = "import gc, weakref\ngone = weakref.ref(model)\n" + TRAIN.replace("import torch", "")
    text = TRAIN + again + "gc.collect()\nassert gone() is None\n"
    _, code, err = launch(text, WEIGHT)
    assert code == 0, err


# Recordings


def test_a_recording_holds_layers_and_predictions(launch, tmp_path):
    from denoiser import draw, make_denoiser

    from lipschitz_reg import Recording, record

    base = make_denoiser(dtype=torch.float32)
    with record(base) as recording:
        draw(base)
        with recording.held_out():
            draw(base)
    recording.save(tmp_path / "base.safetensors")
    text = f"import sys\nsys.path.append({str(ROOT / 'tests')!r})\nimport copy, torch\nfrom denoiser import *\n"
    text += "model = make_denoiser(dtype=torch.float32)\naverage = copy.deepcopy(model)\n" + OPTIMIZER
    text += STEPS.replace("model(torch.ones(2, 4)) - 3", "model.conv_out.weight - 3").replace("loss.backward()",
            "(loss + sum(p.sum() for p in model.parameters())).backward()")  # fmt: skip
    flags = ["--lipschitz_layers=3", "--lipschitz_predictions=2", "--lipschitz_recording=base.safetensors"]
    script, code, err = launch(text, *flags)
    assert code == 0 and "weight 3 on layers and 2 on predictions" in err, err

    names = {}
    exec(text.split(OPTIMIZER)[0] + OPTIMIZER, names)
    loaded = Recording.load(tmp_path / "base.safetensors", names["model"])
    LipschitzRegularizer(names["optimizer"], weight={"layers": 3.0, "predictions": 2.0}, recording=loaded)
    exec(text.split(OPTIMIZER)[1], names)
    assert same_bits(weights(script), list(names["model"].parameters()))
    assert f"drift of the predictions {loaded.drift().prediction:.3g}" in err

    other = text.replace("make_denoiser(", "make_denoiser(seed=1, ")
    assert "was recorded of another base" in refused(launch(other, *flags))


def test_a_recording_of_another_architecture_is_one_line(launch, tmp_path):
    from lipschitz_reg import record

    base = nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 13), nn.Linear(13, 17))  # like none of other tests
    with record(base) as recording:
        base(torch.ones(1, 7))
    recording.save(tmp_path / "base.safetensors")
    del recording, base
    flags = ["--lipschitz_layers=3", "--lipschitz_recording=base.safetensors"]
    assert "was recorded of another architecture" in refused(launch(TRAIN, *flags))


# Checkpoints


RESUME = f"""
import os, sys
{MODEL}
torch.save(model.state_dict(), "base.pt")
checkpoint = torch.load("checkpoint.pt") if os.path.exists("checkpoint.pt") else None
if checkpoint and "early" in sys.argv:
    model.load_state_dict(checkpoint["model"])
{OPTIMIZER}
if checkpoint:
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
{STEPS}
torch.save({{"model": model.state_dict(), "optimizer": optimizer.state_dict()}}, "checkpoint.pt")
"""


@pytest.mark.parametrize("device", [None, "cpu", "disk"])
@pytest.mark.parametrize("order", ["early", "late"])
def test_a_resumed_script_has_the_anchors_of_its_base(launch, tmp_path, order, device):
    expected, _ = reference(TRAIN + STEPS)
    launch(RESUME, WEIGHT)
    save_file(torch.load(tmp_path / "base.pt"), tmp_path / "base.safetensors")
    flags = ["--lipschitz_anchor=base.safetensors"] if order == "early" or device == "disk" else []
    flags += [f"--lipschitz_anchor_device={device}"] if device else []
    script, code, err = launch(RESUME, WEIGHT, *flags, args=[order])
    assert code == 0 and same_bits(weights(script), expected), err


def test_the_base_is_found_in_a_pipeline_by_names_and_shapes(launch, tmp_path):
    expected, _ = reference(TRAIN)
    names = {}
    exec(MODEL, names)
    state = {f"of_an_older_version.{name}": value for name, value in names["model"].state_dict().items()}
    for folder, tensors in (("unet", state), ("vae", {"0.weight": torch.zeros(3, 3)})):
        tmp_path.joinpath("base", folder).mkdir(parents=True)
        save_file(tensors, tmp_path / "base" / folder / "model.safetensors")
    script, code, err = launch(TRAIN, WEIGHT, "--lipschitz_anchor=base")
    assert code == 0 and same_bits(weights(script), expected), err
    assert "has no 0.weight of the shape (8, 4)" in refused(launch(TRAIN, WEIGHT, "--lipschitz_anchor=base/vae"))
    tmp_path.joinpath("base", "ema").mkdir()
    save_file(state, tmp_path / "base" / "ema" / "model.safetensors")
    assert "both have the weights of this model" in refused(launch(TRAIN, WEIGHT, "--lipschitz_anchor=base"))


def test_a_checkpoint_of_another_base_or_of_none_stops_with_one_line(launch, tmp_path):
    assert launch(RESUME, "--lipschitz_weight=0")[1] == 0
    assert "saved without this launcher" in refused(launch(RESUME, WEIGHT))
    save_file(torch.load(tmp_path / "base.pt"), tmp_path / "base.safetensors")
    _, code, err = launch(RESUME, WEIGHT, "--lipschitz_anchor=base.safetensors")
    assert code == 0, err
    assert launch(RESUME, WEIGHT)[1] == 0  # it has the fingerprint now
    other = RESUME.replace("manual_seed(0)", "manual_seed(1)")
    assert "was trained from another base" in refused(launch(other, WEIGHT))
    assert "Trainer does), name the base's" in refused(launch(RESUME, WEIGHT, args=["early"]))


QUANTIZED = """
import bitsandbytes, peft, sys, torch
torch.manual_seed(SEED)
model = torch.nn.Sequential(bitsandbytes.nn.Linear4bit(64, 4, compute_dtype=torch.float32))
model.load_state_dict(torch.nn.Sequential(torch.nn.Linear(64, 4)).state_dict())
model = peft.get_peft_model(model.to("cpu"), peft.LoraConfig(r=2, target_modules=["0"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
if sys.argv[1:]:
    optimizer.load_state_dict(torch.load("optimizer.pt"))
for _ in range(2):
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
torch.save(optimizer.state_dict(), "optimizer.pt")
"""


def test_a_quantized_base_is_recognized(launch):
    assert launch(QUANTIZED.replace("SEED", "0"), WEIGHT)[1] == 0
    assert launch(QUANTIZED.replace("SEED", "0"), WEIGHT, args=["resume"])[1] == 0
    other = launch(QUANTIZED.replace("SEED", "1"), WEIGHT, args=["resume"])
    assert "was trained from another base" in refused(other)


TRAINER = """
import sys, torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
torch.manual_seed(0)
sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
model = BertForSequenceClassification(BertConfig(**sizes))
model.save_pretrained("base")
if "lora" in sys.argv:
    import peft
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query", "value"]))
data = [{"input_ids": torch.tensor([i % 9, 2]), "labels": i % 2} for i in range(8)]
options = {"save_steps": 2, "max_steps": 4, "learning_rate": 1e-2, "report_to": "none", "disable_tqdm": True}
trainer = Trainer(model, TrainingArguments("out", use_cpu=True, seed=0, **options), train_dataset=data)
trainer.train(resume_from_checkpoint="out/checkpoint-2" if "resume" in sys.argv else None)
"""


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_trainer_resumes_only_with_the_base_where_it_loads_weights_first(launch, kind):
    script, code, err = launch(TRAINER, WEIGHT, args=[kind])
    assert code == 0 and "4 steps" in err, err
    if kind == "full":
        reset_accelerate()
        assert "--lipschitz_anchor" in refused(launch(TRAINER, WEIGHT, args=[kind, "resume"]))
    reset_accelerate()
    flags = ["--lipschitz_anchor=base"] if kind == "full" else []
    resumed, code, err = launch(TRAINER, WEIGHT, *flags, args=[kind, "resume"])
    assert code == 0 and same_bits(weights(resumed), weights(script)), err


def test_lora_that_does_not_begin_at_0_needs_the_base(launch, tmp_path):
    pissa = LORA.replace("r=2,", "r=2, init_lora_weights='pissa',") + OPTIMIZER
    pissa = pissa.replace("import peft", "import peft, copy\nbase = copy.deepcopy(model.state_dict())") + STEPS
    assert "was not 0 when its optimizer was built" in refused(launch(pissa, WEIGHT))
    names = {}
    exec(MODEL, names)
    save_file(names["model"].state_dict(), tmp_path / "base.safetensors")
    script, code, err = launch(pissa, WEIGHT, "--lipschitz_anchor=base.safetensors")
    assert code == 0
    layers = script.model.merge_and_unload()
    moved = torch.stack([(layers[i].weight - script.base[f"{i}.weight"]).norm() for i in (0, 1)]).norm().item()
    shown = float(err.rpartition("distance from the base ")[2].partition(",")[0])
    assert shown == pytest.approx(moved, rel=1e-3)


# Loud failures


LOMO = """
class LOMO(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {})
        for parameter in self.param_groups[0]["params"]:
            parameter.register_hook(lambda gradient, data=parameter.data: data.sub_(gradient) * 0)
optimizer = LOMO(model.parameters())
for _ in range(STEPS):
    model(torch.ones(2, 4)).square().mean().backward()
"""


def test_a_parameter_without_a_gradient_does_not_hide_a_loop_that_never_steps(launch):
    unused = MODEL.replace("Sequential(", "ModuleList([torch.nn.Linear(1, 1), ").replace("8, 4))", "8, 4)])")
    text = (unused + LOMO.replace("STEPS", "1")).replace(
        "model(torch.ones(2, 4))", "model[2](model[1](torch.ones(2, 4)))"
    )
    assert "step() of its optimizer was never called" in refused(launch(text, WEIGHT))


@pytest.mark.parametrize("steps", [1, 3])
def test_a_loop_that_never_steps_is_an_error(launch, steps):
    line = refused(launch(MODEL + LOMO.replace("STEPS", str(steps)), WEIGHT))
    assert "step() of its optimizer was never called" in line
    assert "step() of its optimizer was never called" in refused(
        launch(MODEL + LOMO.replace("STEPS", str(steps)) + "raise SystemExit(0)", WEIGHT)
    )


def test_a_script_without_an_optimizer_is_an_error_unless_it_ends_itself(launch):
    assert "no optimizer was built in this process" in refused(launch("print(1)", WEIGHT))
    _, code, err = launch("import argparse\nargparse.ArgumentParser().parse_args()", WEIGHT, args=["--help"])
    assert code == 0 and "nothing was penalized" in err
    assert launch("raise SystemExit(7)", WEIGHT)[1:] == (7, "")


# The second optimizer is built when the first has stepped, which goes on.
TWO = (
    MODEL
    + """
def train(index):
    model(torch.ones(2, 4)).sum().backward()
    optimizers[index].step()
optimizers = [torch.optim.SGD(model[0].parameters(), lr=1e-2)]
train(0)
optimizers.append(torch.optim.SGD(model[1].parameters(), lr=1e-2))
"""
)


@pytest.mark.parametrize(
    "text, flags, line",
    [
        (TWO + "train(0)\ntrain(1)", ["--lipschitz_mode=projected", "--lipschitz_radius=1"], "several optimizers"),
        (TWO + "train(1)\ntrain(0)", ["--lipschitz_reduction=mean"], "several optimizers"),
        (TRAIN.replace("OPT", ""), ["--lipschitz_anchor=nowhere"], "there is no nowhere"),
        (TRAIN, ["--lipschitz_anchor=."], "there is no .safetensors file in"),
        (TRAIN, ["--lipschitz_anchor_device=disk"], "--lipschitz_anchor_device disk needs --lipschitz_anchor"),
        (TRAIN, ["--lipschitz_layers=1"], "--lipschitz_layers needs --lipschitz_recording"),
        (TRAIN, ["--lipschitz_recording=none"], "there is no none"),
        (TRAIN, ["--lipschitz_mode=projected"], "need each other"),
        (TRAIN, ["--lipschitz_weight=-1"], "must be a number of at least 0"),
        (TRAIN, ["--lipschitz_log=."], "is a folder"),
        (MODEL + OPTIMIZER + "import lipschitz_reg as l\nl.LipschitzRegularizer(optimizer, weight=1)\n" + STEPS, [],
         "has a LipschitzRegularizer already"),
        (LORA + OPTIMIZER + STEPS, ["--lipschitz_mode=proximal"], "no closed form"),
        (MODEL + "model[0].requires_grad_(False)\n" + OPTIMIZER + "model[0].requires_grad_(True)\n" + STEPS, [],
         "Sequential.0.weight was frozen when its optimizer was built"),
        (MODEL + OPTIMIZER + "model[0] = torch.nn.Linear(4, 8)\noptimizer.param_groups[0]['params'] = "
         "list(model.parameters())\n" + STEPS, [], "were replaced after it was built"),
        (MODEL.replace("Linear(4, 8)", "Linear(4, 8, device='meta')") + OPTIMIZER, [], "is on the meta device"),
    ],
)  # fmt: skip
def test_what_a_user_gets_wrong_is_one_line(launch, text, flags, line):
    assert line in refused(launch(text, WEIGHT, *flags))


def test_a_script_that_is_not_there_is_one_line(launch):
    assert "SCRIPT: there is no nowhere.py" in refused(launch(Path("nowhere.py"), WEIGHT))
    assert "there is no module nowhere" in refused(launch(Path("nowhere"), WEIGHT, "-m"))
    assert "give a weight" in refused(launch(TRAIN))


# Others


def test_a_module_is_run_as_by_python_m(launch, tmp_path, monkeypatch):
    package = tmp_path / "trainer"
    package.mkdir()
    package.joinpath("__init__.py").write_text("")
    package.joinpath("data.py").write_text("import torch")
    package.joinpath("__main__.py").write_text(f"import sys\nfrom .data import torch\n{TRAIN}\nargv = sys.argv")
    monkeypatch.syspath_prepend(tmp_path)
    script, code, err = launch(Path("trainer"), WEIGHT, "-m", args=["--flag"])
    assert code == 0 and "penalizes 4 tensors" in err
    assert script.argv == [str(package / "__main__.py"), "--flag"] and script.__spec__.name == "trainer.__main__"


def test_a_running_wandb_run_gets_the_metrics(launch, monkeypatch, request):
    import wandb

    # Or it would get those of other tests; and wandb keeps the first folder of a process.
    request.addfinalizer(lambda: (wandb.run and wandb.run.finish(), wandb.teardown()))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    head, tail = TRAIN.rsplit("    optimizer.step()\n", 1)
    steps = f"{head}    optimizer.step()\n    wandb.log({{'loss': 1.0}})\n{tail}"
    script, code, err = launch(f"import wandb\nrun = wandb.init()\n{steps}", WEIGHT, "--lipschitz_log_every=1")
    assert code == 0, err
    assert script.run.summary["lipschitz/distance"] > 0 and script.run.step == 3  # the script's own steps


def test_a_base_that_is_loaded_after_the_optimizer_was_built_stops_with_one_line(launch, tmp_path):
    late = (
        MODEL + OPTIMIZER + "state = {k: v + 1 for k, v in model.state_dict().items()}\nmodel.load_state_dict(state)\n"
    )
    assert "changed between its construction and its first step" in refused(launch(late + STEPS, WEIGHT))
    script, code, err = launch(late + "torch.save(state, 'base.pt')", "--lipschitz_weight=0")
    save_file(script.state, tmp_path / "base.safetensors")
    assert launch(late + STEPS, WEIGHT, "--lipschitz_anchor=base.safetensors")[1] == 0
    cast = "model.to(torch.bfloat16)\n" + STEPS.replace("(2, 4)", "(2, 4, dtype=torch.bfloat16)")
    assert launch(MODEL + OPTIMIZER + cast, WEIGHT)[1] == 0  # which only rounds


def test_weights_that_training_moved_are_not_taken_for_a_base_that_came_late(launch):
    far = STEPS.replace("range(3)", "range(30)")
    assert launch(MODEL + OPTIMIZER + far + OPTIMIZER + far, "--lipschitz_weight=0.1")[1] == 0  # a second phase
    save = "torch.save([model.state_dict(), optimizer.state_dict()], 'checkpoint.pt')\n"
    assert launch(MODEL + OPTIMIZER + far + save, "--lipschitz_weight=0.1")[1] == 0
    # As torch.distributed.checkpoint resumes: the optimizer takes a step of nothing before its state is loaded.
    resume = """
weights, state = torch.load('checkpoint.pt')
model.load_state_dict(weights)
for p in model.parameters():
    p.grad = torch.zeros_like(p)
optimizer.param_groups[0]['lr'] = 0.0
optimizer.step()
optimizer.load_state_dict(state)
"""
    _, code, err = launch(MODEL + OPTIMIZER + resume + STEPS, "--lipschitz_weight=0.1")
    assert code == 0, err


def test_a_model_that_does_not_train_is_free_to_go_before_the_first_step(launch):
    gone = "import gc, weakref\nencoder = torch.nn.Linear(4, 4)\n" + OPTIMIZER
    gone += "kept = weakref.ref(encoder)\ndel encoder\ngc.collect()\nkept = kept() is not None\n"
    script, code, err = launch(MODEL + gone + STEPS, WEIGHT)
    assert code == 0 and not script.kept, err


def test_models_are_looked_for_once_for_an_optimizer_however_many_groups_it_has(launch, monkeypatch):
    walks, get_objects = [], gc.get_objects
    monkeypatch.setattr(gc, "get_objects", lambda: walks.append(1) or get_objects())
    counts = []
    for groups in (2, 4):
        walks.clear()
        size = f"[{{'params': ps[i::{groups}]}} for i in range({groups})]"
        optimizer = (
            f"ps = list(model.parameters())\noptimizer = torch.optim.AdamW({size}, lr=1e-2, weight_decay=0.0)\n"
        )
        assert launch(MODEL + optimizer + STEPS, WEIGHT)[1] == 0
        counts.append(len(walks))
    assert counts[0] == counts[1] > 0


def test_a_script_that_changes_the_folder_finds_its_files(launch, tmp_path):
    change = "import os\nos.mkdir('away')\nos.chdir('away')\n"
    assert launch(change + TRAIN, WEIGHT, "--lipschitz_log=log.jsonl")[1] == 0
    assert (tmp_path / "log.jsonl").is_file() and not list((tmp_path / "away").iterdir())


def test_adapters_of_three_factors_are_held_to_their_initial_values(launch):
    ada = LORA.replace("LoraConfig(r=2,", "AdaLoraConfig(total_step=9, init_r=2, target_r=1,")
    optimizer = OPTIMIZER.replace("model.parameters()", "[p for p in model.parameters() if p.requires_grad]")
    _, code, err = launch(ada + optimizer + STEPS, WEIGHT)
    assert code == 0 and "penalizes 6 tensors" in err, err
