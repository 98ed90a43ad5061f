# What makes the scripts fast, as claims that no clock decides: what is imported when, what is computed once, and that
# the results are the same. The times are in docs/benchmarks.md.
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from test_train_dreambooth_lipschitz import distance, same_bits, scalars, weights
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lipschitz_reg import LipschitzRegularizer


pytestmark = pytest.mark.usefixtures("one_device")

ROOT = Path(__file__).parents[1]
SCRIPTS = ["train_dreambooth_lipschitz.py", "train_dreambooth_lipschitz_sdxl.py", "evaluate_dreambooth.py"]
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "torchao", "datasets", "wandb"}


# The start


def end_of(script, *flags):
    """What the script says, its exit code, and which heavy packages it had imported by its end."""
    code = "import atexit, json, runpy, sys\n"
    code += f"atexit.register(lambda: print('\\n' + json.dumps(sorted({HEAVY!r} & set(sys.modules)))))\n"
    code += f"sys.argv = {[script, *map(str, flags)]!r}\nrunpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    *told, imported = done.stdout.splitlines()
    return "\n".join([*told, done.stderr]), done.returncode, json.loads(imported)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy(script):
    told, code, imported = end_of(script, "--help")
    assert "--output_dir" in told and code == 0 and imported == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_are_checked_before_the_heavy_imports(script):
    told, code, imported = end_of(script, "--no_such_flag")
    assert f"{script}: error: " in told and code == 2 and imported == []


MISTAKES = {
    "no folder of photos": ("--instance_data_dir=nowhere", "--instance_data_dir: there is no folder nowhere"),
    "a base that is none": (
        "--pretrained_model_name_or_path={tmp}",
        "--pretrained_model_name_or_path: found no Stable",
    ),
    "a base in one broken file": ("--pretrained_model_name_or_path={tmp}/base.safetensors", "is broken"),
    "a photo that is none": ("--instance_data_dir={tmp}/photos", "1.png is not an image"),
    "no package": ("--report_to=aim", "--report_to=aim needs aim"),
    "no prompts": (
        "--drift_every=1 --lipschitz_prompts_file=nowhere",
        "--lipschitz_prompts_file: cannot read nowhere",
    ),
    "no checkpoint": ("--resume_from_checkpoint=nowhere", "--resume_from_checkpoint: there is no folder"),
    "no recording": ("--lipschitz_recording=nowhere", "--lipschitz_recording: cannot read the recording nowhere"),
    "a recording that is none": ("--lipschitz_recording={tmp}/base.safetensors", "--lipschitz_recording: cannot read"),
    "unknown tracker": ("--report_to=tensorboar", "--report_to: must be aim, "),
    "DeepSpeed": ("", "configuration asks for DeepSpeed: pip install 'deepspeed>=0.19.8'"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("script", SCRIPTS[:2])
def test_inputs_are_checked_before_the_heavy_imports(script, name, tiny_sd, tiny_sdxl, photos, tmp_path, monkeypatch):
    flags, message = MISTAKES[name]
    tmp_path.joinpath("photos").mkdir()
    for file in ("photos/1.png", "base.safetensors"):
        tmp_path.joinpath(file).write_text("nothing of the kind")
    if name == "DeepSpeed":
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    base = tiny_sdxl if "sdxl" in script else tiny_sd
    needed = [f"--pretrained_model_name_or_path={base}", f"--instance_data_dir={photos}", "--instance_prompt=sks"]
    given = flags.format(tmp=tmp_path).split()
    told, code, imported = end_of(script, *needed, f"--output_dir={tmp_path / 'model'}", *given)
    assert message in told and code == 2 and imported == []
    assert not tmp_path.joinpath("model").exists()


def test_trackers_are_those_of_accelerate(script):
    from accelerate.utils import LoggerType

    assert set(script.TRACKERS) == {kind.value for kind in LoggerType} - {"all"}


# What is frozen runs once


@pytest.fixture
def train(tiny_sd, tiny_sdxl, photos, script, run_script, sdxl_script, run_sdxl_script, tmp_path):
    """Runs one of the scripts for six steps of two photos, and returns the weights of its U-Net."""

    def call(kind, name, *flags):
        base, run = (tiny_sd, run_script) if kind == "sd" else (tiny_sdxl, run_sdxl_script)
        needed = [f"--pretrained_model_name_or_path={base}", f"--instance_data_dir={photos}", "--seed=7"]
        needed += ["--instance_prompt=a photo of sks dog", "--resolution=16", "--method=full", "--learning_rate=1e-3"]
        needed += ["--train_batch_size=2", "--max_train_steps=6", f"--output_dir={tmp_path / name}"]
        run(*needed, *flags)
        return None if "--method=lora" in flags else weights(tmp_path / name)

    return call


@pytest.fixture
def encoded(monkeypatch):
    """The number of images in each call of an autoencoder's encoder."""
    calls, encode = [], AutoencoderKL._encode

    def spy(vae, pixels):
        calls.append(len(pixels))
        return encode(vae, pixels)

    monkeypatch.setattr(AutoencoderKL, "_encode", spy)
    return calls


CLASS = ["--with_prior_preservation", "--class_prompt=a dog", "--num_class_images=3"]
RUNS = {
    "plain": ([], 5),
    "mirrored": (["--random_flip", "--gradient_accumulation_steps=2"], 10),
    "class images, in other processes": ([*CLASS, "--dataloader_num_workers=1"], 8),
    "bf16": (["--mixed_precision=bf16"], 5),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_images_are_encoded_once_and_the_result_is_bit_identical(
    kind, name, train, script, sdxl_script, encoded, tmp_path, monkeypatch
):
    """To encoding them at each use, as the script did before: the same draws from the same distributions."""
    flags, images = RUNS[name]
    flags = [*flags, "--center_crop", *([f"--class_data_dir={tmp_path / 'class'}"] if CLASS[0] in flags else [])]
    if CLASS[0] in flags:
        train(kind, "draws the class images", *flags, "--max_train_steps=1")
        encoded.clear()
    once = train(kind, "once", *flags)
    assert encoded == [1] * images
    monkeypatch.setattr(script if kind == "sd" else sdxl_script, "encode_images_once", lambda *_: None)
    assert same_bits(once, train(kind, "each time", *flags))
    assert len(encoded) > 2 * images or "processes" in name


def test_photos_that_are_cropped_at_random_are_encoded_at_each_use_and_the_log_says_so(
    train, script, encoded, tmp_path, monkeypatch, caplog
):
    """Among others that are not: the class images, which are drawn square, are encoded once."""
    flags = [*CLASS, f"--class_data_dir={tmp_path / 'class'}"]
    train("sd", "draws the class images", *flags, "--max_train_steps=1")
    encoded.clear()
    mixed = train("sd", "mixed", *flags)
    assert "5 of 8 images are cropped at random, and encoded again at each use" in caplog.text
    assert len(encoded) == 3 + 10  # 6 steps are two epochs of 5 photos
    monkeypatch.setattr(script, "encode_images_once", lambda *_: None)
    assert same_bits(mixed, train("sd", "each time", *flags))


def test_short_training_encodes_only_what_it_uses(train, encoded):
    train("sd", "short", "--center_crop", "--max_train_steps=2")
    assert encoded == [1] * 4


def test_training_resumed_in_the_middle_of_an_epoch_is_bit_identical(train):
    """Also where it is resumed for so few steps that its images are not encoded before."""
    flags = ["--center_crop", "--random_flip", "--checkpointing_steps=4"]
    whole = train("sd", "whole", *flags)
    train("sd", "stopped", *flags, "--max_train_steps=4")
    assert same_bits(whole, train("sd", "stopped", *flags, "--resume_from_checkpoint=latest"))


@torch.no_grad()
def test_latents_are_drawn_from_the_distribution_of_each_image(script, tiny_sd):
    """By mean and deviation of many draws, whether an image comes as pixels or encoded; each draw is another."""
    vae = AutoencoderKL.from_pretrained(tiny_sd, subfolder="vae")
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    kept = [script.encode_image(vae, image) for image in pixels]
    expected = vae.encode(pixels).latent_dist
    torch.manual_seed(0)
    for image in (pixels[0], kept[0]):
        draws = script.encode_images(vae, [image, kept[1]] * 4000).view(4000, 2, 4, 8, 8) / vae.config.scaling_factor
        deviation = expected.std / 4000**0.5
        assert ((draws.mean(0) - expected.mean).abs() < 5 * deviation).all()
        assert ((draws.std(0) - expected.std).abs() < 5 * deviation).all()
    torch.manual_seed(1)
    drawn = script.encode_images(vae, kept)
    torch.manual_seed(1)
    assert torch.equal(drawn, script.encode_images(vae, pixels))
    torch.manual_seed(1)
    torch.testing.assert_close(drawn, expected.sample() * vae.config.scaling_factor)


def test_autoencoder_is_away_in_training_and_back_for_drawing(train, script, tmp_path, monkeypatch):
    """On a CPU there is one device only: what it is moved to is written down instead. Drift is measured without it."""
    moves, to = [], AutoencoderKL.to

    def spy(vae, *arguments, **options):
        moves.append(str(arguments[0]))
        return to(vae, *arguments, **options)

    losses, decode = script.compute_loss, script.decode_latents
    monkeypatch.setattr(AutoencoderKL, "to", spy)
    monkeypatch.setattr(script, "encode_image", lambda *_: moves.append("encode") or torch.zeros(8, 8, 8))
    monkeypatch.setattr(script, "compute_loss", lambda *rest: moves.append("step") or losses(*rest))
    monkeypatch.setattr(script, "decode_latents", lambda *rest: moves.append("decode") or decode(*rest))
    tmp_path.joinpath("prompts.txt").write_text("a red box\na green fish\n")
    flags = [f"--lipschitz_prompts_file={tmp_path / 'prompts.txt'}", "--lipschitz_weight=50", "--drift_every=1"]
    flags += ["--center_crop", "--max_train_steps=3", "--validation_prompt=a", "--num_validation_images=1"]
    train("sd", "model", *flags)
    recording, encoding, drawing = ["cpu"] * 2, [*["encode"] * 5, "cpu"], ["cpu", "decode", "cpu"]
    assert moves == ["cpu", *recording, *encoding, *["step"] * 3, *drawing]


# The penalty reads param groups when they change


def test_param_groups_are_read_again_only_when_they_change(monkeypatch):
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lipschitz_weight": 2.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    regularizer = LipschitzRegularizer(optimizer, weight=1.0, mode="proximal", reduction="sum")
    reads, read = [], regularizer._terms._read_rows
    monkeypatch.setattr(regularizer._terms, "_read_rows", lambda *rest: reads.append(rest) or read(*rest))

    def rows_after(change=lambda: None):
        change()
        return [(row.coefficient, row.rate) for row in regularizer._rows()], len(reads)

    assert rows_after() == rows_after() == ([(1.0, 0.1), (2.0, 0.1), (2.0, 0.1)], 1)
    assert rows_after(lambda: optimizer.param_groups[0].update(lr=0.5)) == ([(1.0, 0.5), (2.0, 0.1), (2.0, 0.1)], 1)
    weigh = lambda: optimizer.param_groups[1].update(lipschitz_weight=3.0)  # noqa: E731
    assert rows_after(weigh) == ([(1.0, 0.5), (3.0, 0.1), (3.0, 0.1)], 2)
    assert rows_after(lambda: setattr(regularizer, "weight", 4.0)) == ([(4.0, 0.5), (3.0, 0.1), (3.0, 0.1)], 3)
    state = optimizer.state_dict()
    state["param_groups"][0].update(lr=0.7, lipschitz_weight=0.0)
    assert rows_after(lambda: optimizer.load_state_dict(state)) == ([(3.0, 0.1), (3.0, 0.1)], 4)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    with pytest.raises(ValueError, match="without an anchor"):
        regularizer._rows()


# Logging


class Reads(TorchDispatchMode):
    """Counts what is read from tensors, which waits for a device. What torch itself reads is in RAM."""

    READING = {getattr(torch.ops.aten, name).default for name in ("_local_scalar_dense", "nonzero", "equal")}

    def __init__(self):
        super().__init__()
        self.count = 0

    def add(self):
        files = [frame.filename.replace(os.sep, "/") for frame in traceback.extract_stack()]
        self.count += not any(part in file for file in files for part in ("torch/optim/", "torch/utils/data/"))

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in self.READING:
            self.add()
        return operation(*args, **kwargs or {})


class Copies(TorchFunctionMode):
    """Counts as reads what on a CPU is no operation."""

    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("tolist", "numpy", "cpu"):
            self.reads.add()
        return function(*args, **kwargs or {})


READERS = {
    "the paper's penalty": ("sd", ["--lipschitz_weight=50"]),
    "no penalty": ("sd", ["--lipschitz_weight=0"]),
    "layers and predictions": ("sd", ["--lipschitz_layers", "--lipschitz_predictions"]),
    "LoRA": ("sd", ["--method=lora", "--lipschitz_layers", "--lipschitz_predictions"]),
    "text encoder": ("sd", ["--lipschitz_weight=50", "--train_text_encoder"]),
    "SDXL": ("sdxl", ["--lipschitz_weight=50"]),
}


@pytest.mark.parametrize("name", READERS)
def test_nothing_is_read_from_the_device_between_logged_steps(name, train, script, sdxl_script, tmp_path, monkeypatch):
    """Yet each step is logged, with its own loss."""
    kind, flags = READERS[name]
    script = script if kind == "sd" else sdxl_script
    tmp_path.joinpath("prompts.txt").write_text("a red box\na green fish\n")
    if "--lipschitz_layers" in flags:
        flags = [*flags, f"--lipschitz_prompts_file={tmp_path / 'prompts.txt'}"]
    flags = [*flags, "--center_crop", "--max_train_steps=25"]
    reads, compute_loss, counts = Reads(), script.compute_loss, []

    def spy(*rest):
        counts.append(reads.count)
        return compute_loss(*rest)

    monkeypatch.setattr(script, "compute_loss", spy)
    with reads, Copies(reads):
        train(kind, "model", *flags)
    assert counts[1] == counts[2] == counts[10]  # the first step is told at once
    assert counts[11] > counts[10] and counts[11] == counts[20] < counts[21] == counts[24]
    logged = scalars(tmp_path / "model")[0]
    assert all(sorted(logged[name]) == [*range(1, 26)] for name in ("loss", "denoising_loss", "lr"))
    monkeypatch.setattr(script, "READ_EVERY", 1)
    train(kind, "at once", *flags)
    assert scalars(tmp_path / "at once")[0]["loss"] == logged["loss"]


def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """What torch.nn.functional.scaled_dot_product_attention computes, by its definition."""
    assert not dropout_p
    scores = query @ key.mT * (scale or query.shape[-1] ** -0.5)
    if is_causal:
        attn_mask = torch.ones_like(scores, dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ value


def test_fused_steps_and_attention_change_no_result(train, tiny_sd, script, monkeypatch):
    flags = ["--lipschitz_weight=50", "--max_grad_norm=0", "--adam_epsilon=1e-3"]  # 1e-8 would take rounding for more
    fast = train("sd", "fast", *flags)
    seen = []

    def build_adamw(accelerator, groups, options):
        seen.append("AdamW")
        return torch.optim.AdamW(groups, **options, foreach=False, fused=False)

    def spy(*args, **kwargs):
        seen.append("attention")
        return attend(*args, **kwargs)

    monkeypatch.setattr(script, "build_adamw", build_adamw)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    plain, base = train("sd", "plain", *flags), weights(tiny_sd)
    assert {*seen} == {"AdamW", "attention"}
    assert 0 < distance(fast, plain) < 1e-4 * distance(fast, base)


def test_penalty_tensor_is_the_penalty(train):
    parameter = torch.nn.Parameter(torch.ones(3))
    regularizer = LipschitzRegularizer(torch.optim.SGD([parameter], lr=0.1), weight=2.0, reduction="sum")
    with torch.no_grad():
        parameter += 1
    assert regularizer.penalty_tensor().shape == () and regularizer.penalty_tensor().item() == 6.0
    parameter.grad = torch.zeros(3)
    regularizer.optimizer.step()
    assert regularizer.penalty_tensor().item() == regularizer.penalty() == 6.0


# The benchmark for a GPU


def test_the_benchmark_for_a_gpu_is_rehearsed(tmp_path):
    """It goes on where it was stopped, and every kind of result that it has to write is there without a GPU."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    output = tmp_path / "gpu.json"
    output.write_text(json.dumps({"what": "machine", "head": "of the run before"}) + "\n")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), f"--output={output}", "--rehearse", "--resume"]
    command += ["--cases", "8-bit Adam, the paper"]
    done = subprocess.run([*command, "--minutes=0"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and len(output.read_text().splitlines()) == 1
    assert "The time was up: --resume goes on with what is left, checks; tiny-sd: full, 8-bit Adam" in done.stdout
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    machine, checks, training, penalty = map(json.loads, output.read_text().splitlines())
    assert machine["head"] == "of the run before" and machine["head"] in done.stdout
    assert set(checks["errors"]) == {"coupled", "layers", "proximal", "projected", "LoRA"}
    assert max(checks["errors"].values()) < 1e-5
    assert len(training["seconds"]) == 3 and min(training["seconds"]) > 0 and 0.1 < training["peak"] < 4
    assert "| coupled, layers |" in penalty["table"]


def test_the_scripts_take_the_flags_of_every_case_for_a_gpu(script, sdxl_script, monkeypatch):
    """Also of those that are not rehearsed: the first GPU that anyone has should not end in a mistyped flag."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from gpu import CASES, ON_GPU

    needed = ["--pretrained_model_name_or_path=base", "--instance_data_dir=photos", "--instance_prompt=a photo of sks"]
    for case in CASES + ON_GPU:
        (sdxl_script if case.shapes == "sdxl" else script).parse_args([*needed, "--output_dir=new", *case.flags])


def test_the_arithmetic_of_full_size_counts_what_is_trained():
    """Full: 8 bytes of weights and gradients, 8 of Adam, 4 of anchors, for the 859.5 million parameters of SD1.5."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from full_size import CASES, arithmetic
        from penalty import CONFIGS
    finally:
        sys.path.pop(0)
    of = {case.name: arithmetic(case, CONFIGS["sd15"], 0) for case in CASES if case.shapes == "sd15"}
    assert of["full, plain"] == pytest.approx(0.8595 * 16, rel=1e-3)
    assert of["full, the paper's penalty"] == pytest.approx(0.8595 * 20, rel=1e-3)
    assert of["full, 8-bit Adam, layers and predictions"] == pytest.approx(0.8595 * 14 + 0.19, rel=1e-2)
    # Rank 4 on the attention: 0.8 million parameters beside the frozen ones, which nobody else counts here.
    assert of["LoRA, plain"] == pytest.approx(0.8595 * 4 + 16e-3 * 0.797, rel=1e-2)
