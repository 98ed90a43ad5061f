# What the training scripts promise against what goes wrong for real users: no training is lost, nothing else
# is trained than was asked, photos are what a viewer shows, mistakes are told. On train_dreambooth_lipschitz.py;
# utils/copies.py holds its sibling to the same text, and what can differ there is tried on both.
import io
import json
import logging
import math
import os
import runpy
import shutil
import struct

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file, save_file
from single_file import save_single_file
from test_train_dreambooth_lipschitz import (
    ROOT,
    assert_one_clear_line,
    checkpoints,
    files_below,
    same_bits,
    scalars,
    weights,
)


pytestmark = pytest.mark.usefixtures("one_device")

NEEDED = ["--pretrained_model_name_or_path=x", "--instance_data_dir=x", "--instance_prompt=a sks dog"]
LORA_FILE, KEYS_VALUES_FILE = "pytorch_lora_weights.safetensors", "custom_diffusion.safetensors"


@pytest.fixture
def flags(photos):
    return [f"--instance_data_dir={photos}", "--instance_prompt=a sks dog", "--resolution=16", "--seed=7"]


@pytest.fixture
def train(run_script, flags, tiny_sd):
    """Runs the script's `main` for a step at a high rate; flags given later win."""
    base = [f"--pretrained_model_name_or_path={tiny_sd}", "--learning_rate=1e-3", "--max_train_steps=1"]
    return lambda *more: run_script(*base, *flags, "--train_batch_size=2", *more)


@pytest.fixture
def train_sdxl(run_sdxl_script, flags, tiny_sdxl):
    base = [f"--pretrained_model_name_or_path={tiny_sdxl}", "--learning_rate=1e-3", "--max_train_steps=1"]
    return lambda *more: run_sdxl_script(*base, *flags, "--method=full", "--train_batch_size=2", *more)


@pytest.fixture
def refused(capsys):
    """Calls what must end in one line with this message, and exit code 2."""

    def call(message, train, *flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            train(*flags)
        assert end.value.code == 2
        assert_one_clear_line(capsys.readouterr().err.splitlines(keepends=True)[-1], message)

    return call


# A finished training is not lost


def test_result_needs_nothing_of_a_base_that_is_gone_by_then(train, script, tiny_sd, tmp_path, monkeypatch):
    base = shutil.copytree(tiny_sd, tmp_path / "base")
    compute_loss = script.compute_loss

    def lose_base(*rest):
        shutil.rmtree(base, ignore_errors=True)
        return compute_loss(*rest)

    monkeypatch.setattr(script, "compute_loss", lose_base)
    train(f"--pretrained_model_name_or_path={base}", "--mixed_precision=bf16", f"--output_dir={tmp_path / 'model'}")
    assert not base.exists()
    assert ModelCard.load(tmp_path / "model" / "README.md").data.base_model is None  # it never was one of the Hub
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert not same_bits(pipeline.unet.state_dict(), weights(tiny_sd))
    for part in ("vae", "text_encoder", "safety_checker"):
        assert same_bits(weights(tmp_path / "model", part), weights(tiny_sd, part))


def test_base_without_the_safety_checker_that_it_names_is_trained_and_saved(train, tiny_sd, tmp_path, caplog):
    base = shutil.copytree(tiny_sd, tmp_path / "base")
    shutil.rmtree(base / "safety_checker")
    train(f"--pretrained_model_name_or_path={base}", f"--output_dir={tmp_path / 'model'}")
    assert "names a safety checker that cannot be loaded" in caplog.text
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert pipeline.safety_checker is None and not same_bits(weights(tmp_path / "model"), weights(tiny_sd))


PLAIN = ["--lipschitz_weight=0", "--max_train_steps=12", "--checkpointing_steps=2", "--checkpoints_total_limit=1"]


def test_training_that_breaks_leaves_what_was_good(train, refused, tmp_path):
    output = f"--output_dir={tmp_path}"
    train(*PLAIN, "--max_train_steps=3", output)
    before = {
        path: time for path, time in files_below(tmp_path).items() if path.is_file() and "logs" not in path.parts
    }
    assert tmp_path / "checkpoint-2" / "optimizer.bin" in before and tmp_path / "model_index.json" in before
    refused(
        "The loss is NaN or infinite at step 2. The likely cause is", train, *PLAIN, "--learning_rate=1e18", output
    )
    after = files_below(tmp_path)
    assert {path: after.get(path) for path in before} == before
    assert not list(tmp_path.glob("tmp-*")) and checkpoints(tmp_path) == ["checkpoint-2"]


def test_weights_that_broke_in_the_last_step_are_not_saved(train, train_sdxl, tmp_path, capsys, monkeypatch):
    step = torch.optim.AdamW.step

    def step_and_break(optimizer, *rest, **options):
        step(optimizer, *rest, **options)
        with torch.no_grad():
            optimizer.param_groups[-1]["params"][-1][0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", step_and_break)
    for run, name in ((train, "sd"), (train_sdxl, "sdxl")):
        with pytest.raises(SystemExit):
            run("--lipschitz_weight=0", f"--output_dir={tmp_path / name}")
        assert "error: A weight is NaN or infinite at step 1" in capsys.readouterr().err
        assert {path.name for path in (tmp_path / name).iterdir()} == {"logs"}


@torch.no_grad()
def test_min_snr_weighs_pure_noise_by_its_limit(script, tiny_sd):
    """The last timestep of a schedule without any signal left: min(SNR, gamma) / SNR is 1 there, not 0 / 0."""
    config = StableDiffusionPipeline.from_pretrained(tiny_sd).scheduler.config
    noise_scheduler = DDPMScheduler.from_config(config, rescale_betas_zero_snr=True)
    assert noise_scheduler.alphas_cumprod[-1] == 0
    noise_scheduler.config.num_train_timesteps = 1  # all timesteps are drawn from
    noise_scheduler.alphas_cumprod = noise_scheduler.alphas_cumprod[-1:]
    latents, noise = torch.randn(2, 3, 4, 8, 8)
    losses = script.diffusion_losses(noise_scheduler, lambda noisy, _: 0 * noisy, latents, noise, 5.0)
    torch.testing.assert_close(losses, noise.square().mean((1, 2, 3)))


FOLDERS = {
    "output below a data set": (
        "--dataset_name={world}/photos --output_dir={world}/photos/new",
        "--dataset_name reads",
    ),
    "output and base": ("--output_dir={world}/base", "would change what --pretrained_model_name_or_path reads"),
    "output and photos": ("--output_dir={world}/photos", "what --instance_data_dir reads"),
    "by a link": ("--output_dir={world}/link", "what --instance_data_dir reads"),
    "by ..": ("--output_dir={world}/base/../photos/", "what --instance_data_dir reads"),
    "class images and photos": (
        "--with_prior_preservation --class_prompt=dog --class_data_dir={world}/link",
        "--class_data_dir: writing to {world}/photos would change what --instance_data_dir reads",
    ),
    "class images and output": (
        "--with_prior_preservation --class_prompt=dog --class_data_dir={world}/new --output_dir={world}/new",
        "what --class_data_dir reads",
    ),
    "photos where the result has a part": (
        "--output_dir={world} --instance_data_dir={world}/unet",
        "--output_dir: writing to",
    ),
    "pipeline of somebody else": (
        "--output_dir={world}/other",
        "holds model_index.json, which these scripts did",
    ),
    "README of somebody else": (
        "--method=lora --output_dir={world}/notes",
        "holds README.md, which these scripts did",
    ),
    "part of the base": ("--output_dir={world}/base/unet", "what --pretrained_model_name_or_path reads"),
    "checkpoint of somebody else": ("--output_dir={world}/theirs", "holds checkpoint-50, which these scripts did not"),
    "what a killed run left beside it": ("--output_dir={world}/left", "holds unet, which these scripts did not write"),
    "folder of somebody else": ("--output_dir={world}/mine", "holds vae, which these scripts did not write"),
}


@pytest.fixture
def world(tmp_path, tiny_sd, photos):
    shutil.copytree(tiny_sd, tmp_path / "base")
    shutil.copytree(tiny_sd, tmp_path / "other")
    shutil.copytree(photos, tmp_path / "photos")
    shutil.copytree(photos, tmp_path / "unet")
    (tmp_path / "mine" / "vae").mkdir(parents=True)
    (tmp_path / "theirs" / "checkpoint-50").mkdir(parents=True)
    for name in ("tmp-pipeline", "unet"):
        (tmp_path / "left" / name).mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("Mine.")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    return tmp_path


@pytest.mark.parametrize("mistake", FOLDERS)
def test_folders_that_would_be_written_over_are_refused(mistake, run_script, world, refused):
    flags, message = (text.format(world=world) for text in FOLDERS[mistake])
    before = files_below(world)
    own = [f"--pretrained_model_name_or_path={world / 'base'}", "--instance_prompt=a sks dog"]
    own += [] if "dataset_name" in flags else [f"--instance_data_dir={world / 'photos'}"]
    refused(message, run_script, *own, f"--output_dir={world / 'new'}", *flags.split())
    assert files_below(world) == before


def test_concepts_must_not_draw_class_images_among_photos(run_script, world, tiny_sd, refused):
    row = {"instance_prompt": "a sks dog", "class_prompt": "a dog"}
    row |= {"instance_data_dir": str(world / "photos"), "class_data_dir": str(world / "link")}
    (world / "concepts.json").write_text(json.dumps([row]))
    flags = [
        f"--pretrained_model_name_or_path={tiny_sd}",
        "--with_prior_preservation",
        f"--output_dir={world / 'new'}",
    ]
    message = "--concepts_list, class_data_dir: writing to"
    refused(message, run_script, *flags, f"--concepts_list={world / 'concepts.json'}")


def test_class_images_of_two_prompts_do_not_share_a_folder(script, tmp_path, refused):
    row = {"instance_data_dir": "photos", "instance_prompt": "a sks dog", "class_data_dir": "classes"}
    rows = [{**row, "class_prompt": "a dog"}, {**row, "class_prompt": "a cat"}]
    (tmp_path / "concepts.json").write_text(json.dumps(rows))
    flags = ["--pretrained_model_name_or_path=x", f"--concepts_list={tmp_path / 'concepts.json'}"]

    def read(*flags):
        return script.read_concepts(script.parse_args([*flags]))

    refused("class images of 'a dog' and of 'a cat' would both be in", read, *flags, "--with_prior_preservation")
    (tmp_path / "concepts.json").write_text(json.dumps([{**row, "class_data_dir": None}]))
    assert read(*flags)[0].class_data_dir is None


def test_logs_may_lie_beside_the_result(train, tmp_path):
    train("--method=lora", "--logging_dir=.", f"--output_dir={tmp_path}")
    assert (tmp_path / LORA_FILE).is_file()


def test_what_a_killed_run_left_gets_into_no_result(train, tmp_path):
    """Its half of a pipeline, whatever is trained next."""
    (tmp_path / "tmp-pipeline" / "vae").mkdir(parents=True)
    (tmp_path / "tmp-pipeline" / "model_index.json").write_text("{}")
    train("--method=lora", f"--output_dir={tmp_path}")
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", LORA_FILE, "logs"}


def test_result_that_will_be_replaced_is_told(train, tmp_path, caplog):
    train("--method=lora", f"--output_dir={tmp_path}")
    assert "will be replaced" not in caplog.text
    train("--method=lora", f"--output_dir={tmp_path}")
    assert f"the result in {tmp_path} will be replaced when this run is done" in caplog.text


def test_run_that_is_killed_while_it_replaces_a_result_can_be_started_again(train, script, tmp_path, monkeypatch):
    train(f"--output_dir={tmp_path}")
    replace, moved = script.Path.replace, []

    def die(path, target):
        if len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(path)
        return replace(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script.Path, "replace", die)
        train(f"--output_dir={tmp_path}")
    assert not (tmp_path / "model_index.json").exists()
    train(f"--output_dir={tmp_path}")
    DiffusionPipeline.from_pretrained(tmp_path)


def test_output_beside_photos_and_below_them_is_allowed(train, world):
    train(f"--instance_data_dir={world / 'photos'}", f"--output_dir={world / 'photos' / 'model'}")
    assert (world / "photos" / "model" / "model_index.json").is_file()


# What is trained is what was asked


@pytest.fixture
def one_photo(photos, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copy(photos / "1.png", tmp_path / "one")
    return f"--instance_data_dir={tmp_path / 'one'}"


def test_one_photo_trains_alike_however_many_batches_are_accumulated(train, train_sdxl, one_photo, tmp_path):
    """Its windows hold one batch each, by which they are divided, so that the penalty keeps its share of the loss."""
    for run, name in ((train, "sd"), (train_sdxl, "sdxl")):
        for steps in (1, 8):
            flags = ["--max_train_steps=3", "--train_batch_size=1", f"--gradient_accumulation_steps={steps}"]
            run(one_photo, *flags, f"--output_dir={tmp_path / name / str(steps)}")
        assert same_bits(weights(tmp_path / name / "1"), weights(tmp_path / name / "8"))


def test_gradient_of_a_short_window_is_the_mean_over_its_batches(train, script, tmp_path, monkeypatch):
    """Five photos in threes of batches of one: a window of three and one of two, also after a resumption."""
    gradients, seen, compute_loss = [], [], script.compute_loss

    def spy(args, scheduler, vae, unet, *rest):
        losses = compute_loss(args, scheduler, vae, unet, *rest)
        weight = unet.conv_in.bias
        seen.append((torch.autograd.grad(losses[0], weight, retain_graph=True)[0], weight))
        return losses

    step = torch.optim.AdamW.step

    def spy_on_step(optimizer, *rest, **options):
        gradients.append((torch.stack([gradient for gradient, _ in seen]), seen[-1][1].grad.clone()))
        seen.clear()
        return step(optimizer, *rest, **options)

    monkeypatch.setattr(script, "compute_loss", spy)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy_on_step)
    flags = ["--train_batch_size=1", "--gradient_accumulation_steps=3", "--max_grad_norm=0", "--lipschitz_weight=0"]
    flags += ["--max_train_steps=4", "--checkpointing_steps=1", f"--output_dir={tmp_path}"]
    train(*flags)
    train(*flags, "--resume_from_checkpoint=checkpoint-3")
    assert [len(each) for each, _ in gradients] == [3, 2, 3, 2, 2]
    for each, gradient in gradients:
        torch.testing.assert_close(gradient, each.mean(0))


def test_no_norm_means_no_clipping(train, tmp_path):
    for norm in ("0", "1e30", "1e-3"):
        flags = ["--lipschitz_weight=0", "--adam_epsilon=1", f"--max_grad_norm={norm}"]
        train(*flags, f"--output_dir={tmp_path / norm}")
    free, large, small = (weights(tmp_path / norm) for norm in ("0", "1e30", "1e-3"))
    assert same_bits(free, large) and not same_bits(free, small)


@pytest.mark.parametrize("flag", ["--snr_gamma=0", "--adam_epsilon=0"])
def test_numbers_that_would_turn_training_off_are_refused(flag, script, refused):
    refused(
        f"{flag.split('=')[0]}: must be a finite number above 0",
        lambda *flags: script.parse_args([*flags]),
        *NEEDED,
        flag,
    )


def test_polynomial_schedule_below_its_end_is_refused(script, refused):
    flags = [*NEEDED, "--lr_scheduler=polynomial", "--learning_rate=1e-8"]
    refused("--lr_scheduler polynomial ends at a rate of 1e-7", lambda: script.parse_args(flags))


def test_warm_up_that_nobody_asked_for_leaves_the_rate_its_peak(train, tmp_path, caplog):
    for warmup in ([], ["--lr_warmup_steps=5"], ["--lr_warmup_steps=100"]):
        flags = ["--lr_scheduler=constant_with_warmup", "--max_train_steps=10", "--learning_rate=1e-5", *warmup]
        train(*flags, f"--output_dir={tmp_path / str(len(warmup)) / ''.join(warmup)}")
    paths = [tmp_path / "0", tmp_path / "1" / "--lr_warmup_steps=5", tmp_path / "1" / "--lr_warmup_steps=100"]
    rates = [scalars(path)[0]["lr"] for path in paths]
    assert rates[0] == rates[1] and rates[0][10] == pytest.approx(1e-5)
    assert rates[2][10] == pytest.approx(9e-7)
    assert caplog.text.count("rate only reaches 9% of --learning_rate") == 1


def test_warm_up_of_long_trainings_is_that_of_diffusers(script):
    accelerator = type("Accelerator", (), {"num_processes": 1})
    args = script.parse_args([*NEEDED, "--lr_scheduler=linear"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = script.build_lr_scheduler(args, accelerator, optimizer, 2000)
    assert [scheduler.lr_lambdas[0](step) for step in (250, 500)] == [0.5, 1]


# Resuming

RUN = ["--max_train_steps=3", "--checkpointing_steps=2", "--lipschitz_weight=50"]
OTHERS = {
    "--learning_rate=2e-3": "was trained with --learning_rate 0.001 (now 0.002): use the same",
    "--lipschitz_weight=60": "was trained with --lipschitz_weight 50.0 (now 60.0)",
    "--lipschitz_reduction=sum": "was trained with --lipschitz_reduction tensor_mean (now sum)",
    "--lipschitz_mode=proximal": "was trained with --lipschitz_mode coupled (now proximal)",
    "--instance_prompt=a sks cat": "was trained with --instance_prompt a sks dog (now a sks cat): use the same",
    "--instance_data_dir={one}": "was trained with other photos: use the same",
    "--max_train_steps=1": "checkpoint-2 has more than 1 steps: raise --max_train_steps",
    "--pretrained_model_name_or_path={base}": "was trained with another base model",
    "--pretrained_model_name_or_path={folder}/other autoencoder": "was trained with another base model",
    "--train_batch_size=1": "was trained with --train_batch_size 2 (now 1)",
    "--snr_gamma=5": "was trained with --snr_gamma None (now 5.0)",
    "--use_8bit_adam": "was trained with no --use_8bit_adam",
}


@pytest.fixture(scope="session")
def run_to_resume(run_script, tiny_sd, photos, tmp_path_factory):
    """Output folder and flags of a run, and another base."""
    folder = tmp_path_factory.mktemp("run")
    flags = [f"--pretrained_model_name_or_path={tiny_sd}", f"--instance_data_dir={photos}", "--resolution=16"]
    flags += ["--instance_prompt=a sks dog", "--seed=7", "--learning_rate=1e-3", "--train_batch_size=2", *RUN]
    run_script(*flags, f"--output_dir={folder / 'model'}")
    for part, name in {"unet": "base", "vae": "other autoencoder"}.items():
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
        with torch.no_grad():
            next(getattr(pipeline, part).parameters()).view(-1)[0] += 0.5
        pipeline.save_pretrained(folder / name)
    (folder / "one").mkdir()
    shutil.copy(photos / "1.png", folder / "one")
    return folder, flags


@pytest.mark.parametrize("other", OTHERS)
def test_checkpoint_of_another_run_is_refused(other, run_to_resume, run_script, refused):
    folder, flags = run_to_resume
    before = files_below(folder)
    other_flag = other.format(one=folder / "one", base=folder / "base", folder=folder)
    resume = ["--resume_from_checkpoint=latest", f"--output_dir={folder / 'model'}"]
    refused(OTHERS[other], run_script, *flags, *resume, other_flag)
    assert files_below(folder) == before


def test_other_base_is_refused_without_the_penalty_too(run_to_resume, train, refused, tmp_path):
    folder, _ = run_to_resume
    flags = ["--lipschitz_weight=0", "--checkpointing_steps=1", f"--output_dir={tmp_path}"]
    train(*flags)
    base = f"--pretrained_model_name_or_path={folder / 'base'}"
    refused("was trained with another base model", train, *flags, base, "--resume_from_checkpoint=latest")


@pytest.fixture
def prompts_flag(tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\na cat\n")
    return f"--lipschitz_prompts_file={tmp_path / 'prompts.txt'}"


def test_recorded_prompts_are_those_of_the_checkpoint(train, refused, prompts_flag, tmp_path):
    flags = ["--lipschitz_layers", "--checkpointing_steps=1", f"--output_dir={tmp_path / 'model'}", prompts_flag]
    train(*flags)
    (tmp_path / "prompts.txt").write_text("a dog\ntwo cats\n")
    message = "with --lipschitz_prompts_file a cat (now two cats)"
    refused(message, train, *flags, "--resume_from_checkpoint=latest")


def test_what_may_change_changes(run_to_resume, run_script, prompts_flag, tmp_path):
    """Where things lie, what is logged and measured: and the result is that of the run in one go."""
    folder, flags = run_to_resume
    moved = shutil.copytree(flags[1].split("=")[1], tmp_path / "moved")
    shutil.copytree(folder / "model" / "checkpoint-2", tmp_path / "model" / "checkpoint-2")
    more = ["--checkpointing_steps=1", "--validation_prompt=a dog", "--num_validation_images=1", "--report_to=none"]
    more += ["--lipschitz_anchor_device=cpu", f"--instance_data_dir={moved}", "--resume_from_checkpoint=latest"]
    more += ["--drift_every=1", prompts_flag]
    run_script(*flags, *more, f"--output_dir={tmp_path / 'model'}")
    assert same_bits(weights(tmp_path / "model"), weights(folder / "model"))


def test_latest_is_of_the_newest_run_whatever_its_steps(run_to_resume, train, tmp_path, script):
    """And the older run's are deleted first."""
    folder, _ = run_to_resume
    shutil.copytree(folder / "model" / "checkpoint-2", tmp_path / "checkpoint-9")
    flags = ["--instance_prompt=a sks cat", f"--output_dir={tmp_path}", "--checkpointing_steps=1"]
    train(*flags, "--max_train_steps=2")
    assert [path.name for path in script.list_checkpoints(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-1",
        "checkpoint-2",
    ]
    train(*flags, "--max_train_steps=3", "--resume_from_checkpoint=latest", "--checkpoints_total_limit=2")
    assert list(scalars(tmp_path)[0]["loss"])[-1] == 3
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_every_setting_that_may_change_is_a_flag(script, sdxl_script):
    """Of one script at least: a name that is misspelt would be compared."""
    flags = {name for module in (script, sdxl_script) for name in vars(module.parse_args(NEEDED))}
    assert script.FREE_TO_CHANGE <= flags


def test_card_tells_what_was_trained(run_to_resume):
    folder, _ = run_to_resume
    saved = json.loads((folder / "model" / "checkpoint-2" / "settings.json").read_text())
    front = ModelCard.load(folder / "model" / "README.md").data.to_dict()
    assert saved["lipschitz_weight"] == front["lipschitz_weight"] == 50


# A result replaces an earlier one


def test_result_of_another_method_takes_the_place_of_all_of_the_earlier_one(train, tmp_path):
    (tmp_path / "mine.txt").write_text("Mine.")
    images = ["--validation_prompt=a dog", "--num_validation_images=2"]
    train("--method=full", *images, f"--output_dir={tmp_path}")
    assert (tmp_path / "vae").is_dir() and (tmp_path / "image_1.png").is_file()
    results = {
        "lora": {LORA_FILE, "pytorch_lora_weights_kohya.safetensors"},
        "custom_diffusion": {KEYS_VALUES_FILE, "learned_embeds.safetensors"},
    }
    more = {"lora": ["--output_kohya_format"]}
    more["custom_diffusion"] = ["--modifier_token=<new>", "--instance_prompt=a <new> dog"]
    for method, files in results.items():
        train(f"--method={method}", *more[method], f"--output_dir={tmp_path}")
        assert {path.name for path in tmp_path.iterdir()} == files | {"README.md", "logs", "mine.txt"}
    train(f"--output_dir={tmp_path}")
    assert not list(tmp_path.glob("*.safetensors")) and (tmp_path / "mine.txt").is_file()


def test_only_the_result_is_uploaded(script, monkeypatch, tmp_path, train):
    pushed = {}
    monkeypatch.setattr(script, "create_hub_repository", lambda args: "me/model")
    monkeypatch.setattr(script, "upload_folder", lambda **options: pushed.update(options))
    (tmp_path / "photos of my home").mkdir(parents=True)
    (tmp_path / "photos of my home" / "README.md").write_text("Mine.")
    for method, inside in {"full": "unet/diffusion_pytorch_model.safetensors", "lora": LORA_FILE}.items():
        train(f"--method={method}", "--push_to_hub", f"--output_dir={tmp_path}", "--checkpointing_steps=1")
        files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
        # As huggingface_hub's own upload_folder chooses.
        uploaded = set(filter_repo_objects(files, allow_patterns=pushed["allow_patterns"]))
        others = {file for file in files if file.startswith(("checkpoint-", "logs/", "photos of my home/"))}
        assert {inside, "README.md"} <= uploaded and uploaded == set(files) - others and others


def test_upload_that_fails_leaves_the_result_and_says_so(script, monkeypatch, tmp_path, train, refused):
    monkeypatch.setattr(script, "create_hub_repository", lambda args: "me/model")
    refused("was not uploaded", train, "--method=lora", "--push_to_hub", f"--output_dir={tmp_path}")
    assert (tmp_path / LORA_FILE).is_file()


# Prompts


def prompt_of(letters):
    """The tiny tokenizer spells: it reads 30 letters."""
    return " ".join("abcde" for _ in range(letters // 5)) + " " + "f" * (letters % 5)


def test_prompts_that_are_cut_are_named_once_each(train, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(f"--validation_prompt={prompt_of(32)}", "--num_validation_images=1", f"--output_dir={tmp_path}")
    assert caplog.text.count("The text encoder reads only 32 tokens and ignores 'ff' in") == 1
    caplog.clear()
    train(f"--validation_prompt={prompt_of(30)}", "--num_validation_images=1", f"--output_dir={tmp_path}")
    assert "text encoder reads" not in caplog.text


CUT = {
    "new word": ["--method=custom_diffusion", "--modifier_token=<new>", f"--instance_prompt={prompt_of(30)} <new>"],
    "subject": [f"--instance_prompt={prompt_of(30)} sks"],
    "half of the subject": [f"--instance_prompt={prompt_of(28).strip()} sks"],
}


@pytest.mark.parametrize("case", CUT)
def test_subject_that_is_cut_off_stops_the_run(case, train, refused, tmp_path):
    word = "<new>" if case == "new word" else "sks"
    refused(
        f"{word} would not be learned: the text encoder reads only 32",
        train,
        *CUT[case],
        f"--output_dir={tmp_path / 'a'}",
    )
    assert not (tmp_path / "a").exists()


def test_words_of_the_class_may_be_cut_off(train, tmp_path, caplog):
    flags = ["--with_prior_preservation", "--num_class_images=1", f"--class_data_dir={tmp_path / 'class'}"]
    train(
        *flags, f"--instance_prompt=sks {prompt_of(30)}", f"--class_prompt={prompt_of(30)}", f"--output_dir={tmp_path}"
    )
    assert "ignores 'abcde' in 'sks abcde" in caplog.text


def test_captions_that_are_not_used_are_told(script, tmp_path, caplog, photos):
    Image.new("RGB", (16, 16)).save(tmp_path / "1.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "2.png")
    rows = [{"file_name": "1.png", "text": "a dog"}, {"file_name": "2.png", "text": "  "}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    flags = ["--pretrained_model_name_or_path=x", "--instance_prompt=a sks dog", f"--dataset_name={tmp_path}"]
    flags += [f"--cache_dir={tmp_path.parent / 'cache'}"]
    script.read_dataset(script.parse_args(flags))
    assert "captions in text are not used; to use them, add --caption_column text" in caplog.text
    examples = script.read_dataset(script.parse_args([*flags, "--caption_column=text"]))
    assert [example.prompt for example in examples] == ["a dog", "a sks dog"]


def test_text_files_beside_photos_are_their_captions(script, tmp_path, caplog):
    for name in ("1.png", "2.jpg", "3.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    (tmp_path / "1.txt").write_text("a sks dog,\n à table\n", encoding="utf-8-sig")
    (tmp_path / "2.txt").write_text(" \n")
    (tmp_path / "notes.txt").write_text("Mine.")
    args = script.parse_args([*NEEDED, f"--instance_data_dir={tmp_path}"])
    with caplog.at_level(logging.INFO):
        (photos,), _ = script.find_examples(args, script.read_concepts(args))
    assert [photo.prompt for photo in photos] == ["a sks dog, à table", "a sks dog", "a sks dog"]
    assert "ignored, because they are not images: notes.txt" in caplog.text
    assert "1 of 3 photos have a caption of their own" in caplog.text


def test_class_images_of_another_prompt_are_warned_of(train, tmp_path, caplog):
    flags = ["--with_prior_preservation", "--num_class_images=2", f"--class_data_dir={tmp_path / 'class'}"]
    for prompt in ("a dog, été", "a dog, été", "a cat"):
        caplog.clear()
        train(*flags, f"--class_prompt={prompt}", f"--output_dir={tmp_path / 'model'}")
        told = "2 images in" in caplog.text and "drawn for the prompt 'a dog, été', not for 'a cat'" in caplog.text
        assert told == (prompt == "a cat")


# Photos


def display_p3(gamma=None):
    """A colour profile (ICC.1:2022) of Apple's screens: the primaries of DCI-P3, D65, and by default sRGB's curve."""
    fixed = lambda *numbers: b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)  # noqa: E731
    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    if gamma:
        curve = b"para" + bytes(4) + struct.pack(">HH", 0, 0) + fixed(gamma)
    xyz = lambda *numbers: b"XYZ " + bytes(4) + fixed(*numbers)  # noqa: E731
    text = b"mluc" + bytes(4) + struct.pack(">II2s2sII", 1, 12, b"en", b"US", 4, 28) + "P3".encode("utf-16-be")
    tags = {b"desc": text, b"cprt": text, b"wtpt": xyz(0.9642, 1.0, 0.8249)}
    tags |= {b"rXYZ": xyz(0.51512, 0.24120, -0.00105), b"gXYZ": xyz(0.29198, 0.69225, 0.04189)}
    tags |= {b"bXYZ": xyz(0.15710, 0.06657, 0.78407), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    table, data = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        tag += bytes(-len(tag) % 4)
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(tag))
        data += tag
    head = struct.pack(
        ">I4sI4s4s4s", 132 + 12 * len(tags) + len(data), bytes(4), 0x04300000, b"mntr", b"RGB ", b"XYZ "
    )
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + fixed(0.9642, 1.0, 0.8249)
    return head + bytes(128 - len(head)) + table + data


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels_of(script, data):
    image = script.open_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_transparent_pixels_are_white(script):
    colours = np.zeros((1, 4, 4), np.uint8)
    colours[0, :, 0], colours[0, :, 3] = 200, (0, 255, 128, 255)  # red, of these opacities
    white, red, half = [255, 255, 255], [200, 0, 0], [round(128 / 255 * c + 127 / 255 * 255) for c in (200, 0, 0)]
    assert np.abs(pixels_of(script, encoded(Image.fromarray(colours, "RGBA")))[0] - [white, red, half, red]).max() <= 1
    # A palette with a transparent entry, grey with opacity, and a grey that stands for nothing.
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([200, 0, 0, 0, 0, 200])
    assert pixels_of(script, encoded(palette, transparency=0)).tolist() == [[white, [0, 0, 200]]]
    grey = Image.fromarray(np.array([[[50, 0], [50, 255]]], np.uint8), "LA")
    assert pixels_of(script, encoded(grey)).tolist() == [[white, [50] * 3]]
    assert pixels_of(script, encoded(grey.getchannel("L"), transparency=50)).tolist() == [[white, white]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_has_its_own_range(script, kind):
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    assert pixels_of(script, encoded(Image.fromarray(values), kind))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_colours_are_those_of_a_screen(script):
    """By hand: linear light by the curve, from P3 to sRGB by the matrix of their primaries, back by sRGB's curve."""
    red = Image.new("RGB", (2, 2), (230, 60, 60))
    assert np.abs(pixels_of(script, encoded(red)).astype(int) - (230, 60, 60)).max() == 0
    for kind in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        found = pixels_of(script, encoded(red, kind, icc_profile=display_p3(), **options)).astype(int)
        assert np.abs(found - (250, 31, 49)).max() <= 1
    found = pixels_of(script, encoded(red, icc_profile=display_p3(gamma=2.2))).astype(int)
    assert np.abs(found - (251, 25, 45)).max() <= 1
    clear = red.convert("RGBA")
    clear.putpixel((0, 0), (230, 60, 60, 0))
    found = pixels_of(script, encoded(clear, icc_profile=display_p3())).astype(int)
    assert found[0, 0].tolist() == [255, 255, 255] and np.abs(found[1, 1] - (250, 31, 49)).max() <= 1
    # Of another kind of image, and none at all: viewers show the picture without.
    for profile in (display_p3(), b"no profile"):
        assert pixels_of(script, encoded(Image.new("L", (2, 2), 90), icc_profile=profile))[0, 0].tolist() == [90] * 3


def test_evaluation_reads_photos_by_the_same_rules(script, tmp_path):
    from conftest import load_script

    evaluation = load_script("evaluate_dreambooth.py")
    (tmp_path / "1.png").write_bytes(encoded(Image.new("RGBA", (3, 2), (230, 60, 60, 0))))
    (tmp_path / "2.png").write_bytes(encoded(Image.new("RGB", (3, 2), (230, 60, 60)), icc_profile=display_p3()))
    shown = [np.asarray(evaluation.open_photo(path)) for path in evaluation.find_photos(str(tmp_path))]
    assert shown[0].min() == 255 and np.abs(shown[1].astype(int) - (250, 31, 49)).max() <= 1
    assert [image.shape for image in shown] == [(2, 2, 3)] * 2


def test_photos_from_phones_are_read(script, tmp_path):
    import pillow_heif

    script.register_heif.cache_clear()
    file = pillow_heif.from_pillow(Image.new("RGB", (64, 32), (30, 160, 90)))
    file.save(tmp_path / "IMG_1.HEIC", quality=-1)
    (path,) = script.find_images("--instance_data_dir", tmp_path)
    found = np.asarray(script.open_image(path)).astype(int)
    assert found.shape == (32, 64, 3) and np.abs(found - (30, 160, 90)).max() <= 3


def test_photo_from_a_phone_says_what_it_needs(train, script, refused, tmp_path, monkeypatch):
    find_spec = script.importlib.util.find_spec
    monkeypatch.setattr(
        script.importlib.util, "find_spec", lambda name: None if name == "pillow_heif" else find_spec(name)
    )
    script.register_heif.cache_clear()
    (tmp_path / "IMG_1.heic").write_bytes(b"")
    refused(
        "IMG_1.heic is a HEIC photo, which needs pillow-heif: pip install pillow-heif",
        train,
        f"--instance_data_dir={tmp_path}",
    )
    script.register_heif.cache_clear()


def test_photo_of_200_megapixels_is_read_and_larger_ones_are_named_so(train, script, refused, tmp_path):
    Image.new("1", (20000, 10000)).save(tmp_path / "1.png")
    assert len(script.find_images("--instance_data_dir", tmp_path)) == 1
    Image.new("1", (30000, 20000)).save(tmp_path / "1.png")
    refused("1.png has more than 536 megapixels: scale it down", train, f"--instance_data_dir={tmp_path}")


def test_all_broken_photos_are_named_at_once(train, refused, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "c.png").write_bytes(encoded(Image.new("RGB", (40, 40)))[:60])
    message = f"{tmp_path / 'a.jpg'} is empty; {tmp_path / 'b.png'} is not an image; {tmp_path / 'c.png'} is broken: "
    refused(message, train, f"--instance_data_dir={tmp_path}", f"--output_dir={tmp_path / 'model'}")


def test_small_photos_are_told_and_what_file_managers_leave_is_not(train, tmp_path, caplog):
    (tmp_path / "1.png").write_bytes(encoded(Image.new("RGB", (40, 7))))
    for name in (".DS_Store", "Thumbs.db", "raw.cr2"):
        (tmp_path / name).write_bytes(b"0")
    train(f"--instance_data_dir={tmp_path}", f"--output_dir={tmp_path / 'model'}")
    assert "Photos smaller than half of --resolution 16 train blurred: 1.png (40 x 7)" in caplog.text
    assert "not images: raw.cr2" in caplog.text and "Thumbs" not in caplog.text and "DS_Store" not in caplog.text


def test_photos_of_one_name_in_a_data_set_are_each_looked_at(script, tmp_path, capsys):
    import datasets

    whole = encoded(Image.new("RGB", (16, 16)))
    images = [{"bytes": data, "path": "photo.png"} for data in (whole, whole[:40], whole)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(tmp_path / "train.parquet")
    flags = ["--pretrained_model_name_or_path=x", "--instance_prompt=x", f"--dataset_name={tmp_path}"]
    with pytest.raises(SystemExit):
        script.read_dataset(script.parse_args([*flags, f"--cache_dir={tmp_path.parent / 'cache'}"]))
    assert "--dataset_name: photo.png (row 1) is not an image" in capsys.readouterr().err


def test_numbers_without_a_range_are_refused_by_name(train, refused, tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "depth.tiff")
    message = "depth.tiff cannot be shown, its pixel values (F, TIFF) have no defined range"
    refused(message, train, f"--instance_data_dir={tmp_path}", f"--output_dir={tmp_path / 'model'}")


# Text, paths, permissions, logs


def test_all_text_is_utf8_with_or_without_a_mark(script, tmp_path, monkeypatch):
    """Whatever the locale says."""
    read_text = script.Path.read_text
    monkeypatch.setattr(
        script.Path, "read_text", lambda path, encoding="latin-1", **options: read_text(path, encoding, **options)
    )
    rows = [{"instance_data_dir": "x", "instance_prompt": "un été"}]
    needed = ["--pretrained_model_name_or_path=x", f"--concepts_list={tmp_path / 'concepts.json'}"]
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "concepts.json").write_text(json.dumps(rows, ensure_ascii=False), encoding=encoding)
        (concept,) = script.read_concepts(script.parse_args(needed))
        assert concept.instance_prompt == "un été"


def test_tilde_is_the_home_folder(script, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["pretrained_model_name_or_path", "pretrained_config", "tokenizer_name", "instance_data_dir"]
    names += ["class_data_dir", "output_dir", "logging_dir", "cache_dir", "lipschitz_prompts_file"]
    names += ["lipschitz_anchor_model", "resume_from_checkpoint"]
    flags = [*NEEDED, *(f"--{name}=~/{name}" for name in names), "--drift_every=1", "--with_prior_preservation"]
    args = script.parse_args([*flags, "--class_prompt=dog"])
    assert {name: getattr(args, name) for name in names} == {name: f"{tmp_path}/{name}" for name in names}
    recording = script.parse_args([*NEEDED, "--drift_every=1", "--lipschitz_recording=~/base"]).lipschitz_recording
    assert recording == f"{tmp_path}/base"
    (tmp_path / "list.json").write_text('[{"instance_data_dir": "~/photos", "instance_prompt": "a dog"}]')
    args = script.parse_args(["--pretrained_model_name_or_path=x", "--concepts_list=~/list.json"])
    assert script.read_concepts(args)[0].instance_data_dir == f"{tmp_path}/photos"


@pytest.mark.parametrize("method", ["full", "lora", "custom_diffusion"])
def test_files_have_the_permissions_of_the_umask(method, train, prompts_flag, tmp_path):
    old = os.umask(0o027)
    try:
        recorded = ["--drift_every=1", prompts_flag] if method == "lora" else []
        train(f"--method={method}", "--checkpointing_steps=1", f"--output_dir={tmp_path / 'model'}", *recorded)
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert any(name.startswith("recording-") for name in modes) == bool(recorded)
    assert any(name.endswith(".safetensors") for name in modes) and set(modes.values()) == {0o640}, modes


def test_run_without_logs(train, tmp_path):
    train("--report_to=none", f"--output_dir={tmp_path}")
    assert (tmp_path / "model_index.json").is_file() and not (tmp_path / "logs").exists()


def test_learning_rate_is_logged_as_of_its_step(train, tmp_path):
    train("--lr_scheduler=linear", "--lr_warmup_steps=0", "--max_train_steps=4", f"--output_dir={tmp_path}")
    assert [*scalars(tmp_path)[0]["lr"].values()] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


# Messages


@pytest.mark.parametrize("name", ["train_dreambooth_lipschitz.py", "train_dreambooth_lipschitz_sdxl.py"])
def test_interrupted_run_says_how_to_go_on(name, tiny_sd, tiny_sdxl, flags, tmp_path, monkeypatch, capsys):
    def interrupt(*rest, **options):
        raise KeyboardInterrupt

    base = tiny_sdxl if "sdxl" in name else tiny_sd
    monkeypatch.setattr(torch.optim.AdamW, "step", interrupt)
    own = [f"--pretrained_model_name_or_path={base}", f"--output_dir={tmp_path}"]
    monkeypatch.setattr("sys.argv", [name, "--lipschitz_weight", *own, *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    assert end.value.code == 130
    assert f"{name}: warning: stopped; --resume_from_checkpoint=latest goes on" in capsys.readouterr().err


def test_help_tells_every_default(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for told in (
        "0: the main one; default: 0.",
        "Optimizer steps between checkpoints; default: 500.",
        "per process; default: 4.",
        "default: tensorboard",
    ):
        assert told in text
    assert "default: None" not in text and "default: False" not in text


def test_tracker_that_is_not_installed_is_refused(train, refused, tmp_path):
    refused("--report_to=aim needs aim: pip install aim", train, "--report_to=aim", f"--output_dir={tmp_path / 'a'}")


def test_lora_is_no_base(train, refused, tmp_path):
    (tmp_path / LORA_FILE).write_bytes(b"")
    flags = [f"--pretrained_model_name_or_path={tmp_path}", f"--output_dir={tmp_path / 'a'}"]
    refused("it holds what goes onto a base, not a base", train, *flags)


def test_inpainting_model_in_a_plain_folder_is_refused(train, tiny_sd, refused, tmp_path):
    from conftest import make_unet

    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    blocks["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.register_modules(unet=make_unet(**blocks, cross_attention_dim=16, in_channels=9))
    pipeline.save_pretrained(tmp_path / "base")
    flags = [f"--pretrained_model_name_or_path={tmp_path / 'base'}", f"--output_dir={tmp_path / 'model'}"]
    refused("takes 9 channels, not 4: it is for inpainting", train, *flags)


def test_base_without_a_part_is_refused(run_sdxl_script, tiny_sdxl, flags, tmp_path, capsys):
    """As the refiner of SDXL, which has one text encoder."""
    index = json.loads((tiny_sdxl / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None]}))
    with pytest.raises(SystemExit):
        run_sdxl_script(f"--pretrained_model_name_or_path={tmp_path}", *flags, f"--output_dir={tmp_path / 'model'}")
    assert f"{tmp_path} has no text_encoder, so that it cannot be trained" in capsys.readouterr().err


def test_text_encoder_that_lacks_a_weight_is_refused(train, tiny_sd, refused, tmp_path):
    """transformers would take random numbers for it, and say so in a warning."""
    base = shutil.copytree(tiny_sd, tmp_path / "base")
    (file,) = (base / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    lacking = next(name for name in tensors if "fc1.weight" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lacking}, file, metadata={"format": "pt"})
    flags = [f"--pretrained_model_name_or_path={base}", f"--output_dir={tmp_path / 'model'}"]
    refused("its text_encoder lacks", train, *flags)
    assert not (tmp_path / "model").exists()


def test_variant_that_only_some_parts_have_is_loaded(train, tiny_sd, tmp_path):
    base = shutil.copytree(tiny_sd, tmp_path / "base")
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    flags = [f"--pretrained_model_name_or_path={base}", "--variant=fp16", f"--output_dir={tmp_path / 'model'}"]
    train(*flags)
    assert same_bits(weights(tmp_path / "model", "text_encoder"), weights(tiny_sd, "text_encoder"))


def test_message_of_a_library_is_cut(script, capsys):
    with pytest.raises(SystemExit):
        script.stop(ValueError("size mismatch " * 3000))
    assert len(capsys.readouterr().err) < 1100


# A base in one file


@pytest.fixture(scope="session")
def single_file(tiny_sd, tmp_path_factory):
    """Its path without the suffix."""
    file, pipeline = tmp_path_factory.mktemp("single") / "model", StableDiffusionPipeline.from_pretrained(tiny_sd)
    for suffix in (".safetensors", ".ckpt"):
        save_single_file(pipeline, file.with_suffix(suffix))
    return file


@pytest.mark.parametrize("method, suffix", [("full", ".safetensors"), ("lora", ".safetensors"), ("lora", ".ckpt")])
def test_base_in_one_file_trains_as_the_folder_does(method, suffix, single_file, tiny_sd, train, tmp_path):
    flags = [f"--method={method}", "--validation_prompt=a sks dog", "--num_validation_images=1"]
    train(*flags, f"--output_dir={tmp_path / 'folder'}")
    own = [f"--pretrained_model_name_or_path={single_file}{suffix}", f"--pretrained_config={tiny_sd}"]
    train(*flags, *own, f"--output_dir={tmp_path / 'file'}")
    files = list((tmp_path / "file").rglob("*.safetensors"))
    assert files
    for path in files:
        assert same_bits(load_file(path), load_file(tmp_path / "folder" / path.relative_to(tmp_path / "file")))
    code = (tmp_path / "file" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code, names)
    assert isinstance(names["pipeline"], StableDiffusionPipeline)


def test_base_in_one_file_without_a_configuration_says_what_to_give(single_file, train, refused, tmp_path):
    flags = [f"--pretrained_model_name_or_path={single_file}.safetensors", f"--output_dir={tmp_path / 'model'}"]
    refused("(name a pipeline folder of its kind with --pretrained_config)", train, *flags)


def test_other_files_are_no_base(train, refused, tmp_path, tiny_sd):
    (tmp_path / "model.zip").write_bytes(b"")
    refused("model.zip is not a model: give", train, f"--pretrained_model_name_or_path={tmp_path / 'model.zip'}")
    (part,) = (tiny_sd / "unet").glob("*.safetensors")
    refused("is not a whole model, perhaps one of its parts", train, f"--pretrained_model_name_or_path={part}")


# Files for other programs


def test_kohya_file_draws_what_the_other_file_draws(train, tiny_sd, tmp_path):
    flags = ["--method=lora", "--train_text_encoder", "--rank=2", "--lora_alpha=6", "--learning_rate=1e-2"]
    train(*flags, "--output_kohya_format", "--max_train_steps=3", "--lipschitz_weight=0", f"--output_dir={tmp_path}")
    kohya, latents = "pytorch_lora_weights_kohya.safetensors", []
    for name in (LORA_FILE, kohya, None):
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
        pipeline.set_progress_bar_config(disable=True)
        if name is not None:
            pipeline.load_lora_weights(tmp_path, weight_name=name)
        options = {"num_inference_steps": 2, "generator": torch.manual_seed(1), "output_type": "latent"}
        latents.append(pipeline("a sks dog", **options).images)
    torch.testing.assert_close(latents[1], latents[0])
    assert (latents[2] - latents[0]).abs().max() > 1e-2
    tensors = load_file(tmp_path / kohya)
    layers = {name.split(".")[0] for name in tensors}
    assert {name.rsplit("_layers_")[0] for name in layers if name.startswith("lora_te_")} == {
        "lora_te_text_model_encoder"
    }
    assert any(
        name.startswith("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q") for name in layers
    )
    assert all(tensors[f"{layer}.alpha"] == 6 and len(tensors[f"{layer}.lora_down.weight"]) == 2 for layer in layers)
