# What train_dreambooth_lipschitz.py promises, on a tiny random pipeline; its main paths as users run them.
# Holds no test of the penalty's arithmetic, and none of what images look like after training.
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import with_penalty
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from lipschitz_reg import Drift, Recording, draw_held_out, record_pipeline


ROOT = Path(__file__).parents[1]
SCRIPT = "train_dreambooth_lipschitz.py"
# So large that a few steps move the tiny model visibly.
LEARNING_RATE = 1e-3

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.xdist_group("train_dreambooth_lipschitz")]


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """A folder with nothing but the script, and another, for the module path, with nothing but `lipschitz_reg`."""
    folder, packages = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("packages")
    shutil.copy(ROOT / SCRIPT, folder)
    packages.joinpath("lipschitz_reg").symlink_to(ROOT / "lipschitz_reg")
    return folder, packages


def start(alone, launcher, flags, **options):
    folder, packages = alone
    environment = {**os.environ, "PYTHONPATH": str(packages), "WANDB_MODE": "offline"}
    return subprocess.Popen(
        [*launcher, SCRIPT, *with_penalty(flags)],
        cwd=folder,
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
        **options,
    )


def run(alone, launcher, flags):
    process = start(alone, launcher, flags)
    _, stderr = process.communicate(timeout=600)
    return process.returncode, stderr


PYTHON = [sys.executable]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--mixed_precision=no"]
ACCELERATE += ["--num_machines=1", "--dynamo_backend=no"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture
def train(run_script, base_flags):
    return lambda *flags: run_script(*base_flags, *flags)


@pytest.fixture(scope="session")
def base_flags(tiny_sd, photos):
    return [
        f"--pretrained_model_name_or_path={tiny_sd}",
        f"--instance_data_dir={photos}",
        "--instance_prompt=a photo of sks dog",
        "--resolution=16",
        "--train_batch_size=2",
        f"--learning_rate={LEARNING_RATE}",
        "--seed=7",
    ]


PRIOR = ["--with_prior_preservation", "--class_prompt=a photo of dog", "--num_class_images=3"]
SIX_STEPS = "--max_train_steps=6"


@pytest.fixture(scope="session")
def prompts_flag(tmp_path_factory):
    """Few prompts that shall stay as they are: one is recorded, one held out."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a photo of a cat\n\na red house\n")
    return f"--lipschitz_prompts_file={file}"


@pytest.fixture(scope="session")
def penalty(prompts_flag):
    """The penalty in all its spaces."""
    return ["--lipschitz_weight=50", "--lipschitz_layers=1", "--lipschitz_predictions=1", prompts_flag]


@pytest.fixture(scope="session")
def trained(alone, base_flags, penalty, tmp_path_factory):
    """Output folder and stderr of the run that most claims below are about. Its budget is not reached."""
    output = tmp_path_factory.mktemp("trained") / "model"
    flags = [*base_flags, *penalty, SIX_STEPS, f"--output_dir={output}", "--checkpointing_steps=2"]
    flags += ["--validation_prompt=a photo of dog", "--num_validation_images=2", "--validation_steps=3"]
    flags += ["--drift_every=3", "--drift_budget=1000"]
    code, stderr = run(alone, ACCELERATE, flags)
    assert code == 0, stderr
    return output, stderr


def weights(folder, name="unet"):
    (file,) = Path(folder, name).glob("*.safetensors")
    return load_file(file)


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a, b):
    return math.sqrt(sum((a[name].double() - b[name].double()).square().sum().item() for name in a))


def scalars(output):
    """What tensorboard was given: {name: {step: value}}, and the steps of images."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(output / "logs" / "dreambooth"))
    log.Reload()
    values = {tag: {event.step: event.value for event in log.Scalars(tag)} for tag in log.Tags()["scalars"]}
    return values, {event.step for tag in log.Tags()["images"] for event in log.Images(tag)}


def names_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def copy_checkpoint(output, name, target):
    """A checkpoint and the recording that it names."""
    shutil.copytree(output / name, target / name)
    for file in output.glob("recording-*"):
        shutil.copy(file, target)


def checkpoints(output):
    return sorted(path.name for path in Path(output).iterdir() if "checkpoint" in path.name)


# What is written


@pytest.mark.parametrize("options", [{}, {"safety_checker": None}], ids=["as it is", "without safety checker"])
def test_saved_folder_loads_as_a_pipeline_and_draws(options, trained):
    pipeline = DiffusionPipeline.from_pretrained(trained[0], **options)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline, StableDiffusionPipeline)
    assert pipeline("a photo of sks dog", num_inference_steps=1).images[0].size == (16, 16)


def test_saved_folder_holds_the_trained_unet_and_the_other_parts_of_the_base(trained, tiny_sd):
    assert not same_bits(weights(trained[0]), weights(tiny_sd))
    for part in ("vae", "text_encoder", "safety_checker"):
        assert same_bits(weights(trained[0], part), weights(tiny_sd, part))
    name = "feature_extractor/preprocessor_config.json"
    assert trained[0].joinpath(name).read_text() == tiny_sd.joinpath(name).read_text()


def test_saved_pipeline_holds_safetensors_only(trained):
    names = [name for name in names_below(trained[0]) if not name.startswith(("checkpoint-", "logs"))]
    suffixes = {Path(name).suffix for name in names if (trained[0] / name).is_file()}
    assert suffixes == {".safetensors", ".json", ".md", ".png"}


def test_nothing_unfinished_is_left(trained):
    assert not list(trained[0].glob("*tmp*"))
    assert len(list(trained[0].glob("recording-*"))) == 1


def test_unet_of_a_checkpoint_loads_into_the_base(trained, tiny_sd):
    unet = UNet2DConditionModel.from_pretrained(trained[0], subfolder="checkpoint-2/unet")
    pipeline = DiffusionPipeline.from_pretrained(tiny_sd, unet=unet)
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a photo of sks dog", num_inference_steps=1)


def test_model_card_tells_prompt_and_penalty(trained):
    card = ModelCard.load(trained[0] / "README.md")
    front = card.data.to_dict()
    assert {"dreambooth", "lipschitz", "stable-diffusion"} <= set(front["tags"])
    assert front["instance_prompt"] == "a photo of sks dog"
    assert front["lipschitz_weight"] == 50 and front["lipschitz_mode"] == "coupled"
    assert front["lipschitz_layers"] == 1 and front["drift_budget"] == 1000
    assert (trained[0] / "image_1.png").is_file() and "image_1.png" in card.text


def test_model_card_names_a_base_from_the_hub(script, tmp_path):
    args = script.parse_args(
        ["--pretrained_model_name_or_path=some/model", "--instance_data_dir=x", "--instance_prompt=y"]
    )
    script.save_model_card(script.describe_result(args, None), None, [], tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "some/model"


def test_model_card_has_the_flags_of_the_penalty_that_were_given(script, tmp_path):
    flags = ["--pretrained_model_name_or_path=x", "--instance_data_dir=x", "--instance_prompt=y"]
    expected = {
        "": ((0.0, 4.0, 1.0), {}),
        "--lipschitz_weight=0": ((0.0, 0.0, 0.0), {}),
        "--lipschitz_layers --lipschitz_prompts_file=some.txt": (
            (0.0, 4.0, 0.0),
            {"lipschitz_prompts_file": "some.txt"},
        ),
        "--drift_budget=0.05 --method=lora": (
            (0.0, 0.05, 1.0),
            {"lipschitz_lora": "delta", "drift_budget": 0.05},
        ),
        "--drift_budget=0.05 --lipschitz_weight=2": ((2.0, 0.0, 0.0), {"drift_budget": 0.05}),
    }
    for more, (weights, others) in expected.items():
        names = ("lipschitz_weight", "lipschitz_layers", "lipschitz_predictions")
        settings = {name: weight for name, weight in zip(names, weights) if weight} | others
        card = script.describe_result(script.parse_args([*flags, *more.split()]), None)
        script.save_model_card(card, None, [], tmp_path)
        front = ModelCard.load(tmp_path / "README.md").data.to_dict()
        found = {key: value for key, value in front.items() if key.startswith(("lipschitz_", "drift_"))}
        assert found == {"lipschitz_reduction": "tensor_mean", "lipschitz_mode": "coupled", **settings}


def test_prompts_are_the_lines_that_are_not_empty(script, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a photo of a cat\n\n a dog \n", encoding="utf-8-sig")  # with the mark that Windows editors add
    flags = ["--pretrained_model_name_or_path=x", "--instance_data_dir=x", "--instance_prompt=y", "--drift_every=1"]
    args = script.parse_args([*flags, f"--lipschitz_prompts_file={file}"])
    assert script.read_prompts(args) == ["a photo of a cat", "a dog"]


@pytest.mark.parametrize(
    "flags, weights",
    {
        "": (0, 4, 1),
        "--lipschitz_weight": (500, 0, 0),
        "--lipschitz_predictions": (0, 0, 1),
        "--lipschitz_layers --lipschitz_weight=3": (3, 4, 0),
        "--lipschitz_mode=proximal": (500, 0, 0),
        "--method=lora": (0, 0.05, 1),
    }.items(),
)
def test_layers_and_predictions_are_held_unless_another_form_is_asked_for(script, flags, weights):
    needed = ["--pretrained_model_name_or_path=x", "--instance_data_dir=x", "--instance_prompt=y"]
    args = script.parse_args([*needed, *flags.split()])
    assert (args.lipschitz_weight, args.lipschitz_layers, args.lipschitz_predictions) == weights


@pytest.mark.parametrize("flags, usual", [("", 4), ("--method=custom_diffusion", 0.08)])
def test_a_weight_of_the_scale_of_parameters_is_warned_of(script, flags, usual, capsys):
    needed = ["--pretrained_model_name_or_path=x", "--instance_data_dir=x", "--instance_prompt=y"]
    flags = [*needed, *flags.split()]
    weight = script.parse_args([*flags, "--lipschitz_weight"]).lipschitz_weight
    script.parse_args([*flags, f"--lipschitz_layers={4 * usual}"])
    assert capsys.readouterr().err == ""
    script.parse_args([*flags, f"--lipschitz_layers={weight}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--lipschitz_layers {weight:g} is {weight / usual:.0f} times the default" in line


def test_loss_is_logged_at_each_step_as_the_sum_of_its_parts(trained):
    values, _ = scalars(trained[0])
    assert list(values["loss"]) == [1, 2, 3, 4, 5, 6]
    for step, loss in values["loss"].items():
        parts = values["denoising_loss"][step] + values["lipschitz/penalty"][step]
        assert loss == pytest.approx(parts, rel=1e-6)
        assert values["lr"][step] == pytest.approx(LEARNING_RATE)


def test_penalty_is_zero_at_the_base_and_only_there(trained):
    """But for the rounding of a prediction that is made alone, and not in the batch in which it was recorded."""
    penalty = scalars(trained[0])[0]["lipschitz/penalty"]
    assert [step for step, value in penalty.items() if value < 1e-6 * penalty[6]] == [1]


def test_validation_logs_images_and_the_distance_from_the_base(trained, tiny_sd):
    values, images = scalars(trained[0])
    assert images == {3, 6}
    base = weights(tiny_sd)
    size = distance(base, dict.fromkeys(base, torch.zeros(())))
    assert values.keys() == {
        *("loss", "denoising_loss", "lr"),
        *("lipschitz/penalty", "lipschitz/distance", "lipschitz/relative_distance"),
        *("drift/prediction", "drift/guided_prediction", "drift/lipschitz_constant", "drift/seconds"),
    }
    for name, unit in {"lipschitz/distance": 1, "lipschitz/relative_distance": size}.items():
        assert list(values[name]) == [3, 6]
        assert values[name][6] * unit == pytest.approx(distance(weights(trained[0]), base), rel=1e-4)
    assert all(list(steps) == [3, 6] for name, steps in values.items() if name.startswith("drift/"))


def test_other_files_among_the_photos_are_named_once(trained):
    assert trained[1].count("README.txt") == 1


def test_wandb_gets_validation_images_at_their_steps(train, tmp_path, monkeypatch, capfd):
    import wandb

    wandb.teardown()  # it keeps the first folder of a process
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    flags = ["--max_train_steps=3", f"--output_dir={tmp_path / 'model'}", "--report_to=wandb"]
    train(*flags, "--validation_prompt=a photo of dog", "--num_validation_images=1", "--validation_steps=2")
    stderr = capfd.readouterr().err
    (log,) = tmp_path.glob("wandb/offline-run-*")
    steps = {path.name.split("_")[1] for path in log.glob("files/media/images/validation_*.png")}
    assert steps == {"2", "3"}
    # wandb says so when it drops what comes with an earlier step.
    assert "step" not in "".join(line for line in stderr.splitlines() if "wandb: WARNING" in line)
    assert all(name in stderr for name in ("denoising_loss", "lipschitz/penalty", "lipschitz/distance"))


# The method


def test_weight_zero_is_plain_dreambooth_bit_for_bit(train, script, tiny_sd, photos, tmp_path, monkeypatch):
    """Against a loop written out here with diffusers alone, in which no line knows of the penalty."""
    monkeypatch.setattr(script, "LipschitzRegularizer", None)
    train("--lipschitz_weight=0", "--max_train_steps=4", f"--output_dir={tmp_path}")

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    unet, vae = pipeline.unet, pipeline.vae
    vae.enable_slicing()  # images one by one, as in the script, or the last bits are others
    noise_scheduler = DDPMScheduler.from_pretrained(tiny_sd, subfolder="scheduler")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, weight_decay=1e-2, fused=True)
    tokens = pipeline.tokenizer(
        "a photo of sks dog", padding="max_length", max_length=pipeline.tokenizer.model_max_length, return_tensors="pt"
    )
    with torch.no_grad():
        embeds = pipeline.text_encoder(tokens.input_ids)[0]
    images = sorted(path for path in photos.iterdir() if path.suffix != ".txt")
    dataset, sampler = photo_dataset(script, images, 16), script.EpochSampler(5, seed=7)
    torch.manual_seed(7)
    step = 0
    for sampler.epoch in range(2):
        draws = list(sampler)
        for batch in (draws[:2], draws[2:4], draws[4:]):
            if step == 4:
                break
            step += 1
            pixels = torch.stack([dataset[draw][1][0] for draw in batch])
            latents = vae.encode(pixels).latent_dist.sample().detach() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, 1000, (len(batch),))
            noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
            prediction = unet(noisy_latents, timesteps, embeds.repeat(len(batch), 1, 1)).sample
            (prediction - noise).square().mean((1, 2, 3)).mean().backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    assert same_bits(weights(tmp_path), unet.state_dict())


def test_every_mode_and_space_keeps_the_model_closer_to_the_base(train, prompts_flag, tiny_sd, tmp_path):
    settings = {
        "plain": ["--lipschitz_weight=0", "--adam_weight_decay=0"],
        "coupled": ["--lipschitz_weight=3000"],
        "proximal": ["--lipschitz_weight=3e5", "--lipschitz_mode=proximal"],
        "sum": ["--lipschitz_weight=1", "--lipschitz_reduction=sum"],
        "projected": ["--lipschitz_mode=projected", "--lipschitz_radius=0.1"],
        "predictions": ["--lipschitz_predictions=3000", prompts_flag],
    }
    drift = {}
    for name, flags in settings.items():
        train(*flags, "--max_train_steps=5", f"--output_dir={tmp_path / name}")
        drift[name] = distance(weights(tmp_path / name), weights(tiny_sd))
    assert all(drift[name] < 0.9 * drift["plain"] for name in settings if name != "plain"), drift
    assert drift["projected"] <= 0.1 * (1 + 1e-5)


def test_text_encoder_is_trained_and_penalized(train, tiny_sd, tmp_path):
    for weight in (0, 3000):
        train(
            "--train_text_encoder",
            f"--lipschitz_weight={weight}",
            "--max_train_steps=4",
            f"--output_dir={tmp_path / str(weight)}",
        )
    free, held = (
        distance(weights(tmp_path / name, "text_encoder"), weights(tiny_sd, "text_encoder")) for name in ("0", "3000")
    )
    assert 0 < held < free


LORA = ["--method=lora", "--train_text_encoder", "--lora_dropout=0.3"]


@pytest.mark.parametrize("method", [[], LORA], ids=["full", "lora"])
def test_untrained_model_has_no_drift_at_all(method, train, prompts_flag, tmp_path):
    """In mixed precision, with dropout; and nothing is divided by a distance of zero."""
    flags = ["--mixed_precision=bf16", "--learning_rate=0", "--max_train_steps=2", f"--output_dir={tmp_path}"]
    train(*method, prompts_flag, "--drift_every=1", *flags)
    values, _ = scalars(tmp_path)
    assert values["drift/prediction"] == values["drift/guided_prediction"] == {1: 0, 2: 0}
    assert "drift/lipschitz_constant" not in values


def test_recording_replays_and_measuring_change_nothing_but_the_penalty(train, prompts_flag, tmp_path):
    """No random number of the training is drawn for them, of dropout least of all."""
    settings = {
        "with": ["--lipschitz_layers=1e-30", "--lipschitz_predictions=1e-30", prompts_flag, "--drift_every=1"],
        "without": ["--lipschitz_weight=1e-30"],
        "measured": ["--lipschitz_weight=1e-30", prompts_flag, "--drift_every=1"],
    }
    for name, flags in settings.items():
        train(*LORA, *flags, "--max_train_steps=3", f"--output_dir={tmp_path / name}")
    results = [load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in settings]
    assert same_bits(results[0], results[1]) and same_bits(results[2], results[1])
    for name in ("with", "measured"):
        drift = scalars(tmp_path / name)[0]["drift/prediction"]
        assert list(drift) == [1, 2, 3] and 0 < drift[3]


def test_penalty_of_layers_is_what_the_plugin_gives_for_the_recording(train, prompts_flag, tiny_sd, tmp_path):
    flags = ["--lipschitz_layers=50", prompts_flag, "--max_train_steps=2", "--checkpointing_steps=1"]
    train(*flags, f"--output_dir={tmp_path}")
    unet = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
    (file,) = tmp_path.glob("recording-*")
    recording, moved, expected = Recording.load(file, unet), weights(tmp_path / "checkpoint-1"), 0.0
    for name, parameter in unet.named_parameters():
        moment, move = recording.layers.get(name), moved[name] - parameter.detach()
        square = move.square().sum() if moment is None else moment.squared_norm(move)
        expected += 50 * square.item() / parameter.numel()
    assert scalars(tmp_path)[0]["lipschitz/penalty"][2] == pytest.approx(expected, rel=1e-3)
    assert len(recording.layers) > 50 and [call.held_out for call in recording.calls] == [False] * 10 + [True] * 4


def test_weight_decay_towards_zero_is_for_plain_dreambooth(script):
    flags = ["--pretrained_model_name_or_path=x", "--instance_data_dir=x", "--instance_prompt=x"]
    assert script.parse_args(flags).adam_weight_decay == 0
    assert script.parse_args([*flags, "--lipschitz_weight=0"]).adam_weight_decay == 1e-2
    assert script.parse_args([*flags, "--adam_weight_decay=0.1"]).adam_weight_decay == 0.1


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weighs_each_sample_by_its_own_timestep(script, tiny_sd, prediction_type):
    """Also with prior preservation: photos and class images are weighed apart. By hand, from the formula."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    args = script.parse_args(
        ["--pretrained_model_name_or_path=x", "--instance_data_dir=x", "--instance_prompt=x", "--snr_gamma=0.5"]
    )
    batch, rows = torch.rand(3, 2, 3, 16, 16) * 2 - 1, torch.randn(6, 32, 16)
    torch.manual_seed(1)
    with torch.no_grad():
        conditions, sizes = {"prompt_embeds": rows}, torch.zeros(3, 2, 6)
        losses = script.compute_loss(args, noise_scheduler, pipeline.vae, pipeline.unet, conditions, batch, sizes)

        pipeline.vae.enable_slicing()  # images one by one, as in the script, or noise comes in another order
        torch.manual_seed(1)
        latents = pipeline.vae.encode(torch.cat([batch[:, 0], batch[:, 1]])).latent_dist.sample()
        latents = latents * pipeline.vae.config.scaling_factor
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (6,))
        alpha = noise_scheduler.alphas_cumprod[timesteps]
        a, s = alpha.sqrt()[:, None, None, None], (1 - alpha).sqrt()[:, None, None, None]
        prediction = pipeline.unet(a * latents + s * noise, timesteps, rows).sample
        target = noise if prediction_type == "epsilon" else a * noise - s * latents
        snr = alpha / (1 - alpha)
        weight = snr.clamp(max=0.5) / (snr if prediction_type == "epsilon" else snr + 1)
        each = weight * (prediction - target).square().mean((1, 2, 3))
    assert len(set(weight.tolist())) > 3
    torch.testing.assert_close(losses[0], each[:3].mean())
    torch.testing.assert_close(losses[1], each[3:].mean())


# Photos and class images


def photo_dataset(script, paths, size, **options):
    """The script's data set, of these photos and without class images."""
    return script.DreamBoothDataset([[script.Example(path, "") for path in paths]], [[]], size, **options)


def epochs_of(script, dataset, epochs):
    """The only image of a data set, as it comes in each of the epochs."""
    sampler, images = script.EpochSampler(1, seed=3), []
    for sampler.epoch in epochs:
        images += [dataset[draw][1][0] for draw in sampler]
    return images


def test_crops_differ_from_epoch_to_epoch_and_repeat_with_the_seed(script, photos):
    dataset = photo_dataset(script, [photos / "1.png"], 16)
    epochs = epochs_of(script, dataset, range(8))
    assert len({epoch.numpy().tobytes() for epoch in epochs}) > 1
    assert torch.equal(epochs_of(script, dataset, [5])[0], epochs[5])


def test_what_is_cropped_at_random_is_read_once(script, photos, tmp_path):
    """A photo of a phone takes longer to read and scale than a step on a GPU."""
    shutil.copy(photos / "1.png", tmp_path)
    dataset = photo_dataset(script, [tmp_path / "1.png"], 16)
    before = epochs_of(script, dataset, range(8))
    assert not dataset.keep_encoded(tmp_path / "1.png", encode=None)
    (tmp_path / "1.png").unlink()
    assert all(map(torch.equal, epochs_of(script, dataset, range(8)), before))


def test_flips_differ_from_epoch_to_epoch_and_repeat_with_the_seed(script, photos):
    paths = [photos / "1.png"]
    (image,) = epochs_of(script, photo_dataset(script, paths, 16, center_crop=True), [0])
    dataset = photo_dataset(script, paths, 16, center_crop=True, random_flip=True)
    epochs = epochs_of(script, dataset, range(8))
    mirrored = [torch.equal(epoch, image.flip(-1)) for epoch in epochs]
    assert not torch.equal(image, image.flip(-1)) and 0 < sum(mirrored) < 8
    assert all(torch.equal(epoch, image) for epoch, is_mirrored in zip(epochs, mirrored) if not is_mirrored)
    assert torch.equal(epochs_of(script, dataset, [5])[0], epochs[5])


def test_images_are_scaled_as_the_interpolation_mode_says(script, tmp_path):
    Image.fromarray(np.arange(36, dtype=np.uint8).reshape(6, 6) * 7).save(tmp_path / "0.png")
    for mode in ("nearest", "bilinear", "lanczos"):
        (image,) = epochs_of(script, photo_dataset(script, [tmp_path / "0.png"], 4, interpolation=mode), [0])
        with Image.open(tmp_path / "0.png") as file:
            expected = np.asarray(file.convert("RGB").resize((4, 4), Image.Resampling[mode.upper()]))
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected / 127.5 - 1, atol=1e-6)


CAPTIONS = {0: "a dog at night", 80: "a dog on grass", 160: "", 240: "a dog in the snow"}


@pytest.fixture(scope="session")
def captioned(tmp_path_factory):
    """A folder of grey photos and their captions by shade, of which one is empty."""
    folder = tmp_path_factory.mktemp("captioned")
    lines = []
    for shade, caption in CAPTIONS.items():
        Image.new("RGB", (24, 16), (shade,) * 3).save(folder / f"shade-{shade}.png")
        lines.append(json.dumps({"file_name": f"shade-{shade}.png", "text": caption, "stars": 5}))
    # In another order than that of the names.
    folder.joinpath("metadata.jsonl").write_text("\n".join(lines[::-1]))
    return folder


@pytest.fixture(scope="session")
def dataset_flags(tiny_sd, tmp_path_factory):
    flags = [f"--pretrained_model_name_or_path={tiny_sd}", f"--cache_dir={tmp_path_factory.mktemp('cache')}"]
    return [*flags, "--instance_prompt=a photo of sks dog", "--resolution=16", "--train_batch_size=2", "--seed=7"]


def shade_of(image):
    return round((image.mean().item() + 1) * 127.5)


def test_each_photo_comes_with_its_caption(
    run_script, dataset_flags, captioned, tiny_sd, script, tmp_path, monkeypatch
):
    """And as often as `--repeats` says; where there is no caption, with the instance prompt."""
    seen, compute_loss = [], script.compute_loss

    def spy(args, scheduler, vae, unet, conditions, images, *rest):
        rows = zip(images, conditions["prompt_embeds"], strict=True)
        seen.extend((shade_of(image[0]), embeds) for image, embeds in rows)
        return compute_loss(args, scheduler, vae, unet, conditions, images, *rest)

    monkeypatch.setattr(script, "compute_loss", spy)
    flags = [f"--dataset_name={captioned}", "--caption_column=text", "--repeats=2", "--random_flip"]
    run_script(*dataset_flags, *flags, f"--output_dir={tmp_path}")
    assert sorted(shade for shade, _ in seen) == sorted([*CAPTIONS] * 2)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    for shade, embeds in seen:
        prompt = CAPTIONS[shade] or "a photo of sks dog"
        expected, _ = pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
        torch.testing.assert_close(embeds, expected[0])


def test_data_set_that_holds_its_images_reads_as_a_folder_does(script, dataset_flags, captioned, tmp_path):
    """As data sets on the Hub do; with columns of other names, and without captions."""
    import datasets

    images = [Image.open(captioned / f"shade-{shade}.png") for shade in CAPTIONS]
    columns = {"picture": images, "caption": [*CAPTIONS.values()]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
    for flags in (["--caption_column=caption"], []):
        args = script.parse_args(
            [*dataset_flags, f"--dataset_name={tmp_path}", "--image_column=picture", *flags, f"--cache_dir={tmp_path}"]
        )
        examples = script.read_dataset(args)
        assert [np.asarray(script.open_image(example.image))[0, 0, 0] for example in examples] == [*CAPTIONS]
        expected = CAPTIONS.values() if flags else [""] * 4
        assert [example.prompt for example in examples] == [text or "a photo of sks dog" for text in expected]


def test_images_come_upright_square_and_in_range(script, tmp_path):
    pixels = np.zeros((30, 60, 3), np.uint8)
    pixels[:, 30:] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    _, (image,), _ = photo_dataset(script, [tmp_path / "turned.png"], 20, center_crop=True)[0, 0]
    assert image.shape == (3, 20, 20) and image.dtype == torch.float32
    assert image[:, :, 0].eq(1).all() and image[:, :, -1].eq(-1).all()


def test_only_missing_class_images_are_drawn(train, photos, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    shutil.copy(photos / "1.png", folder / "1-mine.png")
    before = (folder / "1-mine.png").read_bytes()
    prior = [*PRIOR, "--num_class_images=12", "--seed=0"]
    train(*prior, f"--class_data_dir={folder}", "--max_train_steps=2", f"--output_dir={tmp_path / 'a'}")
    names = {path.name.split("-")[0] for path in folder.iterdir()}
    assert names == {*map(str, range(12))} and (folder / "1-mine.png").read_bytes() == before
    drawn = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    train(*prior, f"--class_data_dir={folder}", "--max_train_steps=2", f"--output_dir={tmp_path / 'b'}")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == drawn
    # In the order in which they were paired with photos then.
    first, second = (weights(tmp_path / name) for name in "ab")
    assert same_bits(first, second)
    assert set(scalars(tmp_path / "b")[0]) >= {"loss", "denoising_loss", "prior_loss"}


# Precision and optimizers


def test_base_saved_in_float16_is_trained_in_float32(train, tiny_sd, tmp_path):
    half = tmp_path / "half"
    StableDiffusionPipeline.from_pretrained(tiny_sd, dtype=torch.float16).save_pretrained(half)
    for name in ("unet", "text_encoder"):
        assert {tensor.dtype for tensor in weights(half, name).values() if tensor.is_floating_point()} == {
            torch.float16
        }
    flags = [
        "--train_text_encoder",
        "--learning_rate=1e-7",
        "--max_train_steps=1",
        f"--output_dir={tmp_path / 'model'}",
    ]
    train(f"--pretrained_model_name_or_path={half}", *flags)
    for name in ("unet", "text_encoder"):
        after, before = weights(tmp_path / "model", name), weights(half, name)
        assert {tensor.dtype for tensor in after.values() if tensor.is_floating_point()} == {torch.float32}
        # Steps that float16 could not have held.
        assert any(
            (after[key] != before[key].float()).any() and torch.equal(after[key].half(), before[key]) for key in after
        )


def test_8bit_adam_bf16_and_gradient_checkpointing_train_together(train, tiny_sd, tmp_path):
    flags = ["--use_8bit_adam", "--mixed_precision=bf16", "--gradient_checkpointing", "--train_text_encoder"]
    flags += ["--offset_noise", "--snr_gamma=5", "--set_grads_to_none", "--lr_scheduler=cosine", "--lr_warmup_steps=1"]
    flags += ["--validation_prompt=a dog", "--num_validation_images=1", "--validation_scheduler=DDPMScheduler"]
    train(*flags, "--max_train_steps=3", "--checkpointing_steps=2", f"--output_dir={tmp_path}")
    assert not same_bits(weights(tmp_path), weights(tiny_sd))
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.float32}
    state = torch.load(tmp_path / "checkpoint-2" / "optimizer.bin", weights_only=False)["state"]
    assert "torch.uint8" in {str(tensor.dtype) for entry in state.values() for tensor in tensors_in(entry)}


def tensors_in(entry):
    for value in entry.values():
        yield from tensors_in(value) if isinstance(value, dict) else [value] if torch.is_tensor(value) else []


def test_gradient_checkpointing_changes_no_result(train, tmp_path):
    for name, flags in {"with": ["--gradient_checkpointing"], "without": []}.items():
        train("--train_text_encoder", *flags, "--max_train_steps=2", f"--output_dir={tmp_path / name}")
    after, other = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert distance(after, other) < 1e-4 * distance(after, {key: torch.zeros(()) for key in after})


# Checkpoints


def test_resume_after_a_kill_is_bit_identical(alone, base_flags, penalty, trained, train, tmp_path):
    """
    Killed while it writes a checkpoint. The run that was not killed wrote fewer, drew validation images, measured
    drift and had a budget.
    """
    flags = [*penalty, SIX_STEPS, f"--output_dir={tmp_path}", "--checkpointing_steps=1"]
    process = start(alone, PYTHON, [*base_flags, *flags])
    while not (tmp_path / "checkpoint-1").is_dir():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    # Stopped for each look, it cannot finish a checkpoint between the look and the kill.
    process.send_signal(signal.SIGSTOP)
    while not (tmp_path / "tmp-checkpoint").is_dir():
        process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
        assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGSTOP)
    process.kill()
    process.communicate()
    whole = names_below(trained[0] / "checkpoint-2")
    found = [names_below(path) for path in tmp_path.glob("checkpoint-*")]
    assert found and all(names == whole for names in found)

    train(*flags, "--resume_from_checkpoint=latest")
    assert same_bits(weights(tmp_path), weights(trained[0]))
    assert not list(tmp_path.glob("tmp-*"))


def test_resume_is_bit_identical_in_the_middle_of_an_epoch(run_script, base_flags, tmp_path):
    """
    With all that has a state: text encoder, class images, random crops, flips, accumulation and a schedule. And
    without a seed, to which a resumed run could go back.
    """
    flags = [
        *(flag for flag in base_flags if not flag.startswith("--seed")),
        "--train_text_encoder",
        "--random_flip",
        *PRIOR,
        f"--class_data_dir={tmp_path / 'class'}",
        "--gradient_accumulation_steps=2",
    ]
    flags += ["--train_batch_size=1", "--lr_scheduler=linear", "--lr_warmup_steps=2", "--max_train_steps=5"]
    run_script(*flags, f"--output_dir={tmp_path / 'whole'}", "--checkpointing_steps=2")
    assert checkpoints(tmp_path / "whole") == ["checkpoint-2", "checkpoint-4"]  # none of the last step, 5
    run_script(
        *flags,
        f"--output_dir={tmp_path / 'resumed'}",
        f"--resume_from_checkpoint={tmp_path / 'whole' / 'checkpoint-2'}",
        "--dataloader_num_workers=1",
    )
    for name in ("unet", "text_encoder"):
        assert same_bits(weights(tmp_path / "resumed", name), weights(tmp_path / "whole", name))


def test_resumed_run_is_anchored_to_the_base(train, trained, penalty, tiny_sd, tmp_path):
    """Not to the checkpoint: a crushing penalty without learning brings the weights back to the base."""
    copy_checkpoint(trained[0], "checkpoint-4", tmp_path)
    state = torch.load(tmp_path / "checkpoint-4" / "custom_checkpoint_0.pkl", weights_only=False)
    crushing = {"weight": {"parameters": 1e9, "layers": 0.0, "predictions": 0.0}, "mode": "proximal"}
    torch.save({**state, **crushing}, tmp_path / "checkpoint-4" / "custom_checkpoint_0.pkl")
    moved = distance(weights(tmp_path / "checkpoint-4"), weights(tiny_sd))
    train(*penalty, "--max_train_steps=5", "--resume_from_checkpoint=checkpoint-4", f"--output_dir={tmp_path}")
    assert distance(weights(tmp_path), weights(tiny_sd)) < 0.05 * moved


def test_limit_keeps_the_newest_checkpoints_of_a_resumed_run(train, penalty, trained, tmp_path):
    for name in ("checkpoint-2", "checkpoint-4"):
        copy_checkpoint(trained[0], name, tmp_path)
    (tmp_path / "mine.txt").write_text("Mine.")
    flags = [*penalty, "--max_train_steps=8", f"--output_dir={tmp_path}", "--checkpointing_steps=2"]
    train(*flags, "--resume_from_checkpoint=checkpoint-4", "--checkpoints_total_limit=2")
    assert checkpoints(tmp_path) == ["checkpoint-6", "checkpoint-8"]
    assert (tmp_path / "mine.txt").read_text() == "Mine."


def test_new_checkpoint_survives_older_ones_of_later_steps(train, trained, tmp_path):
    shutil.copytree(trained[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    train("--max_train_steps=2", f"--output_dir={tmp_path}", "--checkpointing_steps=2", "--checkpoints_total_limit=1")
    assert checkpoints(tmp_path) == ["checkpoint-2"]


def test_second_run_replaces_the_pipeline_of_the_first(train, tmp_path):
    train("--max_train_steps=1", f"--output_dir={tmp_path}")
    first = weights(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_text("Of an older run.")
    train("--max_train_steps=2", f"--output_dir={tmp_path}")
    assert not same_bits(weights(tmp_path), first)  # there is one file of weights, or this fails
    DiffusionPipeline.from_pretrained(tmp_path)


def test_latest_without_a_checkpoint_starts_afresh(train, capsys, tmp_path):
    train("--max_train_steps=1", f"--output_dir={tmp_path / 'new'}", "--resume_from_checkpoint=latest")
    assert "starts afresh" in capsys.readouterr().out
    assert (tmp_path / "new" / "model_index.json").is_file()


def test_resumed_run_that_was_complete_trains_no_further(train, trained, penalty, tmp_path):
    """And logs again what comes at the end."""
    copy_checkpoint(trained[0], "checkpoint-4", tmp_path)
    flags = [*penalty, "--max_train_steps=4", "--resume_from_checkpoint=latest", f"--output_dir={tmp_path}"]
    train(*flags, "--drift_every=3", "--validation_prompt=a photo of dog", "--num_validation_images=1")
    assert same_bits(weights(tmp_path), weights(trained[0] / "checkpoint-4"))
    values, images = scalars(tmp_path)
    assert list(values["lipschitz/distance"]) == list(values["drift/prediction"]) == [4] and images == {4}


def test_epochs_decide_the_length_where_steps_are_not_given(train, tmp_path):
    # Five photos in batches of two: three batches, and with accumulation over two of them two steps an epoch.
    flags = ["--num_train_epochs=3", "--gradient_accumulation_steps=2", "--checkpointing_steps=6"]
    train(*flags, f"--output_dir={tmp_path}")
    assert list(scalars(tmp_path)[0]["loss"]) == [1, 2, 3, 4, 5, 6]
    assert checkpoints(tmp_path) == ["checkpoint-6"]


def test_validation_comes_by_epochs_where_they_are_given(train, tmp_path):
    # Five photos in batches of two: three steps an epoch.
    flags = ["--validation_epochs=2", "--max_train_steps=8", "--validation_prompt=a photo of dog"]
    train(*flags, "--num_validation_images=1", f"--output_dir={tmp_path}")
    assert scalars(tmp_path)[1] == {6, 8}


def test_learning_rate_scales_with_the_samples_of_a_step(train, tmp_path):
    train("--scale_lr", "--gradient_accumulation_steps=3", "--max_train_steps=1", f"--output_dir={tmp_path}")
    assert scalars(tmp_path)[0]["lr"][1] == pytest.approx(2 * 3 * LEARNING_RATE)


# The script with what each process has in the end.
TWO_PROCESSES = """
import torch
import train_dreambooth_lipschitz as script

seen, attach = {}, script.attach_lipschitz
def spy(args, accelerator, pipeline, optimizer, trained, anchor_model, recording):
    patience = torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    seen.update(rank=accelerator.process_index, unet=trained["unet"], recording=recording, patience=patience)
    return attach(args, accelerator, pipeline, optimizer, trained, anchor_model, recording)

script.attach_lipschitz = spy
script.main(script.parse_args())
torch.save([seen["unet"].state_dict(), seen["recording"].digest(), seen["patience"]], f"{seen['rank']}.pt")
"""


def test_two_processes_train_one_model_and_save_it_once(alone, base_flags, penalty, tiny_sd, tmp_path):
    """By one recording, with the same bits in each process, and with hours for the one that draws."""
    flags = [*base_flags, *penalty, *PRIOR, f"--class_data_dir={tmp_path / 'class'}"]
    flags += [f"--output_dir={tmp_path / 'model'}", "--train_batch_size=1", "--max_train_steps=3"]
    flags += ["--checkpointing_steps=2", "--drift_every=1"]
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    folder, packages = alone
    environment = {**os.environ, "PYTHONPATH": f"{packages}:{folder}"}
    command = [*TORCHRUN, "two.py", *flags]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (first, recorded, patience), (second, other, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert patience > 3600
    assert same_bits(first, second) and same_bits(first, weights(tmp_path / "model")) and recorded == other
    assert not same_bits(first, weights(tiny_sd))
    assert len(list((tmp_path / "class").iterdir())) == 3
    states = sorted(path.name for path in (tmp_path / "model" / "checkpoint-2").glob("random_states_*"))
    assert states == ["random_states_0.pkl", "random_states_1.pkl"]
    assert done.stderr.count("Saved the result") == 1 and done.stderr.count("README.txt") == 1
    values, _ = scalars(tmp_path / "model")
    assert list(values["loss"]) == list(values["drift/prediction"]) == [1, 2, 3]


def test_processes_that_do_not_find_each_other_do_not_train_in_one_folder(alone, base_flags, tmp_path):
    folder, packages = alone
    environment = {**os.environ, "PYTHONPATH": str(packages), "CUDA_VISIBLE_DEVICES": ""}
    del environment["ACCELERATE_USE_CPU"]
    command = [*TORCHRUN, SCRIPT, *base_flags, f"--output_dir={tmp_path / 'model'}"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.count("2 processes do not find each other") == 1, done.stderr
    assert not (tmp_path / "model").exists()


# A budget, and recordings

BUDGET = 0.02
BUDGETED = {
    "full": ["--train_text_encoder"],
    "lora": ["--method=lora", "--train_text_encoder", "--rank=2", "--lora_dropout=0.2", "--learning_rate=3e-2"],
    "custom_diffusion": [
        *["--method=custom_diffusion", "--learning_rate=1e-1", "--modifier_token=<new>"],
        "--instance_prompt=a photo of a <new> cup",
    ],
}


@pytest.fixture(scope="session")
def recorded(tiny_sd, tmp_path_factory):
    """A recording that no training made, with the base's own scheduler."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    file = tmp_path_factory.mktemp("recorded") / "tiny.safetensors"
    options = {"num_inference_steps": 2, "progress": False}
    record_pipeline(pipeline, ["a cup", "a house"], ["a tree", "two dogs"], **options).save(file)
    return file


@pytest.fixture(scope="session")
def budgeted(run_script, base_flags, prompts_flag, recorded, tmp_path_factory):
    """Gives the output folder of a method, and its flags. Only `full` makes its recording; `lora` has the same."""
    folders = {}

    def call(method):
        if method not in folders:
            folder = tmp_path_factory.mktemp("budgeted") / "model"
            flags = [*base_flags, *BUDGETED[method], f"--drift_budget={BUDGET}", "--max_train_steps=4"]
            if method == "full":
                flags.append(prompts_flag)
            else:
                file = recorded if method == "custom_diffusion" else recording_in(call("full")[0])
                flags.append(f"--lipschitz_recording={file}")
            run_script(*flags, "--drift_every=4", "--checkpointing_steps=2", f"--output_dir={folder}")
            folders[method] = folder, flags
        return folders[method]

    return call


def recording_in(folder):
    (file,) = folder.glob("recording-*.safetensors")
    return file


def trained_in(folder):
    """All tensors that a run saved, but those of checkpoints and recordings."""
    files = [path for path in folder.rglob("*.safetensors") if "-" not in str(path.relative_to(folder))]
    return {f"{path.relative_to(folder)} {key}": value for path in files for key, value in load_file(path).items()}


@pytest.fixture
def keep_budget(script):
    """Takes back what a parameter that was trained to 2 from 1 may not keep; gives what was said, and its values."""

    def call(budget, drift_of, dtype=torch.float32):
        parameter = torch.nn.Parameter(torch.ones(1000, dtype=dtype))
        lipschitz = script.LipschitzRegularizer(torch.optim.SGD([parameter]), weight=1.0)
        parameter.data.fill_(2)
        args = script.argparse.Namespace(drift_budget=budget)
        said = script.keep_budget(
            args, lambda: Drift(0.01, drift_of(float(parameter.detach().mean())), {}, {}, 0.0, 1.0), lipschitz
        )
        return said, parameter.detach()

    return call


def test_a_budget_that_takes_nothing_back_says_that_more_of_it_is_of_no_use(keep_budget):
    said, value = keep_budget(0.5, lambda value: 0.021)
    assert "changed predictions by 2.10%, within the budget of 0.5: nothing was taken back" in said
    assert value.eq(2).all()


def test_a_budget_that_cannot_be_kept_leaves_the_training_as_it_is(keep_budget):
    said, value = keep_budget(0.01, lambda value: 0.02)
    assert "was not kept: A budget of 0.01 is below" in said and "Nothing was taken back" in said
    assert value.eq(2).all()


def test_rounding_does_not_add_up_over_the_shares_that_are_tried(keep_budget):
    said, value = keep_budget(0.3, lambda value: (value - 1) ** 3, torch.bfloat16)
    share = float(re.search(r"; ([\d.]+)% of the change", said).group(1)) / 100
    assert share == pytest.approx(0.3 ** (1 / 3), abs=0.01)
    assert (value.float() - 1 - share).abs().max() <= 2**-8 + 5e-4  # half a step of bfloat16, and of what was said


def test_budgets_that_cannot_be_kept_are_refused_before_training(train, prompts_flag, tiny_sd, tmp_path, capsys):
    other = other_base(tiny_sd, tmp_path / "other")
    flags = ["--max_train_steps=1", prompts_flag, f"--output_dir={tmp_path / 'new'}"]
    for more, message in {
        ("--mixed_precision=bf16", "--drift_budget=0.001"): "rounding alone changes predictions by",
        ("--method=lora", f"--lipschitz_anchor_model={other}", "--drift_budget=0.01"): "which --method=lora cannot",
    }.items():
        with pytest.raises(SystemExit) as end:
            train(*flags, *more)
        assert end.value.code == 2
        assert_one_clear_line(capsys.readouterr().err.splitlines(keepends=True)[-1], message)
    assert not (tmp_path / "new" / "README.md").exists()


@pytest.mark.parametrize("method", BUDGETED)
def test_finished_model_has_drifted_by_the_budget(method, budgeted, tiny_sd, recorded):
    """As it is loaded with the calls of its model card, text encoder and all."""
    folder, flags = budgeted(method)
    card = (folder / "README.md").read_text()
    assert "layers and predictions held near the base's" in card and "Lipschitz penalty" not in card
    assert re.search(
        r"Drift budget, .*% of the change of weights is kept, and predictions now differ by [12]\.\d\d%", card
    )
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {}
    exec(code, names)
    loaded, base = names["pipeline"], StableDiffusionPipeline.from_pretrained(tiny_sd)
    file = recorded if method == "custom_diffusion" else recording_in(budgeted("full")[0])
    recording = Recording.load(file, base.unet)
    drift = recording.drift(loaded.unet, lambda: draw_held_out(loaded, recording))
    logged = scalars(folder)[0]
    assert 0.95 * BUDGET <= drift.dial <= 1.001 * BUDGET
    assert logged["drift/guided_prediction"] == {4: pytest.approx(drift.guided_prediction, rel=1e-3)}
    assert logged["drift/prediction"] == {4: pytest.approx(drift.prediction, rel=1e-3)}
    if "--train_text_encoder" in flags:  # which took its part
        assert recording.drift(loaded.unet).dial != pytest.approx(drift.dial, rel=1e-3)


@pytest.mark.parametrize("method", BUDGETED)
def test_checkpoint_of_a_run_with_a_budget_leads_to_the_same_result(method, budgeted, run_script, tmp_path):
    """It is not made smaller itself. The recording goes along, unless it lies elsewhere."""
    folder, flags = budgeted(method)
    resume = f"--resume_from_checkpoint={folder / 'checkpoint-2'}"
    run_script(*flags, resume, "--checkpointing_steps=3", f"--output_dir={tmp_path}")
    again, whole = trained_in(tmp_path), trained_in(folder)
    assert len(whole) > 3 and same_bits(again, whole)
    names = [path.name for path in folder.glob("recording-*")]
    assert [path.name for path in tmp_path.glob("recording-*")] == names and len(names) == (method == "full")
    settings = json.loads((tmp_path / "checkpoint-3" / "settings.json").read_text())
    assert settings == json.loads((folder / "checkpoint-2" / "settings.json").read_text())
    assert settings["lipschitz_weight"] == 0 and settings["lipschitz_predictions"] == 1
    assert settings["recording"].startswith(names[0][10:26] if names else "")


def test_recording_of_another_method_is_warned_of(train, prompts_flag, tmp_path, caplog):
    flags = ["--method=custom_diffusion", "--lipschitz_layers", prompts_flag, "--max_train_steps=1"]
    train(*flags, f"--output_dir={tmp_path}")
    assert "weights that train" not in caplog.text
    file = f"--lipschitz_recording={recording_in(tmp_path)}"
    train("--lipschitz_layers", file, "--max_train_steps=1", f"--output_dir={tmp_path / 'b'}")
    assert "weights that train, such as conv_in.weight, as it was made for others" in caplog.text


def test_recordings_that_do_not_fit_end_in_one_line(train, trained, penalty, recorded, world, tiny_sd, capsys):
    refused = {
        "Lost": ([], "--resume_from_checkpoint: cannot read the recording"),
        "Another": ([f"--lipschitz_recording={recorded}"], "was trained with another recording: use the same"),
    }
    (world / "checkpoint-4").rename(world / "moved")
    (world / "lost").mkdir()
    (world / "moved").rename(world / "lost" / "checkpoint-4")
    for more, message in refused.values():
        flags = [*penalty[:3], *(more or penalty[3:]), "--max_train_steps=6", f"--output_dir={world / 'new'}"]
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            train(*flags, f"--resume_from_checkpoint={world / 'lost' / 'checkpoint-4'}")
        assert end.value.code == 2
        assert_one_clear_line(capsys.readouterr().err.splitlines(keepends=True)[-1], message)
    base = other_base(tiny_sd, world / "other")
    with pytest.raises(SystemExit):
        flags = [f"--pretrained_model_name_or_path={base}", "--lipschitz_layers", f"--lipschitz_recording={recorded}"]
        train(*flags, f"--output_dir={world / 'new'}")
    line = capsys.readouterr().err.splitlines(keepends=True)[-1]
    assert_one_clear_line(line, "was recorded of another base: conv_in.bias is not the same")
    assert not (world / "new").exists()


# Bad input


@pytest.fixture
def world(tmp_path, tiny_sd, photos, trained):
    """Things to go wrong with, under short names. `base` has an index and no weights: loading it fails."""
    index = json.loads((tiny_sd / "model_index.json").read_text())
    for name, kind in {"base": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}.items():
        tmp_path.joinpath(name).mkdir()
        tmp_path.joinpath(name, "model_index.json").write_text(json.dumps({**index, "_class_name": kind}))
    tmp_path.joinpath("vit").mkdir()
    tmp_path.joinpath("vit", "config.json").write_text("{}")
    tmp_path.joinpath("empty").mkdir()
    tmp_path.joinpath("strays").mkdir()
    tmp_path.joinpath("strays", "notes.txt").write_text("No image.")
    tmp_path.joinpath("strays", "blank.txt").write_text("\n\n")
    shutil.copytree(photos, tmp_path / "broken")
    tmp_path.joinpath("broken", "1.png").write_bytes((photos / "1.png").read_bytes()[:90])
    torn = tmp_path / "torn" / "checkpoint-4"
    shutil.copytree(trained[0] / "checkpoint-4", torn)
    (torn / "optimizer.bin").unlink()
    copy_checkpoint(trained[0], "checkpoint-4", tmp_path)
    shutil.copytree(trained[0] / "checkpoint-4", tmp_path / "two" / "checkpoint-4")
    tmp_path.joinpath("one.txt").write_text("a cup\n")
    tmp_path.joinpath("twice.txt").write_text("a cup\na tree\na cup\n")
    shutil.copy(tmp_path / "checkpoint-4" / "random_states_0.pkl", tmp_path / "two/checkpoint-4/random_states_1.pkl")
    return tmp_path


MISTAKES = {
    "no photos folder": ("--instance_data_dir={world}/absent", "there is no folder"),
    "empty photos folder": ("--instance_data_dir={world}/empty", "there is no image in"),
    "no image among the photos": ("--instance_data_dir={world}/strays", "there is no image in"),
    "broken photo": ("--instance_data_dir={world}/broken", "broken/1.png is broken"),
    "negative weight": ("--lipschitz_weight=-1", "--lipschitz_weight: must be a finite number"),
    "NaN weight": ("--lipschitz_weight=nan", "--lipschitz_weight: must be a finite number"),
    "infinite weight": ("--lipschitz_weight=inf", "--lipschitz_weight: must be a finite number"),
    "weight that is no number": ("--lipschitz_weight=much", "--lipschitz_weight: invalid float value"),
    "negative radius": ("--lipschitz_mode=projected --lipschitz_radius=-1", "--lipschitz_radius: must be"),
    "NaN radius": ("--lipschitz_mode=projected --lipschitz_radius=nan", "--lipschitz_radius: must be"),
    "infinite radius": ("--lipschitz_mode=projected --lipschitz_radius=inf", "--lipschitz_radius: must be"),
    "no radius": ("--lipschitz_mode=projected", "--lipschitz_radius"),
    "radius in another mode": ("--lipschitz_radius=1", "--lipschitz_mode projected"),
    "unknown mode": ("--lipschitz_mode=elastic", "--lipschitz_mode: invalid choice"),
    "unknown reduction": ("--lipschitz_reduction=max", "--lipschitz_reduction: invalid choice"),
    "unknown flag": ("--lipschitz_lambda=1", "--lipschitz_lambda"),
    "steps of zero": ("--checkpointing_steps=0", "--checkpointing_steps: must be"),
    "negative seed": ("--seed=-1", "--seed: must be a finite number at least 0"),
    "negative workers": ("--dataloader_num_workers=-1", "--dataloader_num_workers: must be"),
    "gradients that are never forgotten": (
        "--adam_beta1=1",
        "--adam_beta1: must be a finite number at least 0 and below 1",
    ),
    "output folder that is a file": (
        "--output_dir={world}/broken/1.png",
        "--output_dir: cannot write to {world}/broken/1.png",
    ),
    "class folder in a file": (
        "--with_prior_preservation --class_prompt=dog --class_data_dir={world}/broken/1.png/class",
        "--class_data_dir: cannot write to {world}/broken/1.png",
    ),
    "no class prompt": ("--with_prior_preservation --class_data_dir={world}/class", "--class_prompt"),
    "no class folder": ("--with_prior_preservation --class_prompt=dog", "--class_data_dir"),
    "broken class image": (
        "--with_prior_preservation --class_prompt=dog --class_data_dir={world}/broken",
        "--class_data_dir: {world}/broken/1.png is broken",
    ),
    "xformers on a CPU": ("--enable_xformers_memory_efficient_attention", "needs a CUDA GPU"),
    "TF32 on a CPU": ("--allow_tf32", "--allow_tf32 needs a CUDA GPU"),
    "float16 on a CPU": ("--mixed_precision=fp16", "fp16"),
    "unknown tracker": ("--report_to=paper", "paper"),
    "token that wandb would log": ("--report_to=wandb --hub_token=x", "--hub_token"),
    "base without an index": ("--pretrained_model_name_or_path={world}/vit", "found no Stable Diffusion pipeline at"),
    "SDXL base": ("--pretrained_model_name_or_path={world}/sdxl", "use train_dreambooth_lipschitz_sdxl.py"),
    "base that is nowhere": ("--pretrained_model_name_or_path=no/such-model", "found no Stable Diffusion pipeline at"),
    "base without weights": ("", "cannot load {world}/base"),
    "no checkpoint folder": ("--resume_from_checkpoint=checkpoint-9", "there is no folder"),
    "checkpoint without a step": ("--resume_from_checkpoint={world}/empty", "is not named checkpoint-<step>"),
    "incomplete checkpoint": (
        "{penalty} --resume_from_checkpoint={world}/torn/checkpoint-4",
        "is incomplete, it lacks optimizer.bin",
    ),
    "checkpoint of two processes": (
        "{penalty} --resume_from_checkpoint={world}/two/checkpoint-4",
        "was saved by a run with 2 processes, not 1: accelerate launch --num_processes=2",
    ),
    "checkpoint with the penalty, run without": (
        "--resume_from_checkpoint={world}/checkpoint-4 --lipschitz_weight=0",
        "was trained with --lipschitz_weight 50.0 (now 0.0), --lipschitz_layers 1.0 (now 0.0)",
    ),
    "folder and data set": ("--dataset_name={world}/broken", "--instance_data_dir and --dataset_name both give"),
    "captions without a data set": ("--caption_column=text", "--caption_column is about a data set"),
    "unknown interpolation": ("--image_interpolation_mode=magic", "--image_interpolation_mode: invalid choice"),
    "prompts that are not there": (
        "--drift_every=1 --lipschitz_prompts_file={world}/absent.txt",
        "--lipschitz_prompts_file: cannot read",
    ),
    "no prompts": (
        "--drift_every=1 --lipschitz_prompts_file={world}/strays/blank.txt",
        "--lipschitz_prompts_file: {world}/strays/blank.txt holds fewer than two prompts",
    ),
    "one prompt": (
        "--lipschitz_layers --lipschitz_prompts_file={world}/one.txt",
        "--lipschitz_prompts_file: {world}/one.txt holds fewer than two prompts",
    ),
    "prompt twice": (
        "--lipschitz_predictions --lipschitz_prompts_file={world}/twice.txt",
        "--lipschitz_prompts_file: 'a cup' is there twice",
    ),
    "prompts for nothing": (
        "--lipschitz_weight=0 --lipschitz_prompts_file={world}/one.txt",
        "--lipschitz_prompts_file needs --drift_budget, --lipschitz_layers, --lipschitz_predictions or --drift_every",
    ),
    "recording for nothing": (
        "--lipschitz_recording={world}/absent",
        "--lipschitz_recording needs --drift_budget, --lipschitz_layers",
    ),
    "recording and prompts": (
        "--drift_every=1 --lipschitz_recording={world}/absent --lipschitz_prompts_file={world}/one.txt",
        "--lipschitz_recording has its prompts already: leave out --lipschitz_prompts_file",
    ),
    "recording that is not there": (
        "--lipschitz_layers --lipschitz_recording={world}/absent",
        "--lipschitz_recording: cannot read the recording {world}/absent",
    ),
    "recording that is text": (
        "--drift_every=1 --lipschitz_recording={world}/one.txt",
        "--lipschitz_recording: cannot read the recording {world}/one.txt",
    ),
    "recording that is a model": (
        "--drift_budget=1 --lipschitz_recording={world}/two/checkpoint-4/unet/diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors is not a recording",
    ),
    "budget of nothing": ("--drift_budget=0", "--drift_budget: must be a finite number above 0"),
    "negative budget": ("--drift_budget=-1", "--drift_budget: must be a finite number above 0"),
    "NaN budget": ("--drift_budget=nan", "--drift_budget: must be a finite number above 0"),
    "budget without a penalty": ("--drift_budget=1 --lipschitz_weight=0", "--drift_budget needs a penalty"),
    "negative weight of layers": ("--lipschitz_layers=-1", "--lipschitz_layers: must be a finite number"),
    "push without the Hub": ("--push_to_hub", "--push_to_hub: cannot create"),
}


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def assert_one_clear_line(stderr, message):
    (line,) = stderr.splitlines()
    assert line.startswith(f"{SCRIPT}: error: ") and message in line


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_in_one_line_before_anything_is_loaded_or_written(mistake, train, world, penalty, capsys):
    flags, message = (text.format(world=world, penalty=" ".join(penalty)) for text in MISTAKES[mistake])
    before = files_below(world)
    with pytest.raises(SystemExit) as end:
        train(f"--pretrained_model_name_or_path={world / 'base'}", f"--output_dir={world / 'new'}", *flags.split())
    assert end.value.code == 2
    assert_one_clear_line(capsys.readouterr().err, message)
    assert files_below(world) == before


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_broken_weights_end_in_one_line(part, train, tiny_sd, tmp_path, capsys):
    base = shutil.copytree(tiny_sd, tmp_path / "base")
    (file,) = (base / part).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SystemExit):
        train(f"--pretrained_model_name_or_path={base}", f"--output_dir={tmp_path / 'new'}")
    assert_one_clear_line(capsys.readouterr().err, f"--pretrained_model_name_or_path: cannot load {base}")
    assert not (tmp_path / "new").exists()


def copy_without_a_weight(base, folder):
    """A copy of a pipeline whose U-Net lacks `conv_in.bias`."""
    shutil.copytree(base, folder)
    (file,) = (folder / "unet").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["conv_in.bias"]
    save_file(tensors, file)
    return folder


def test_base_that_lacks_a_weight_is_refused(train, tiny_sd, tmp_path, capsys):
    base = copy_without_a_weight(tiny_sd, tmp_path / "base")
    with pytest.raises(SystemExit):
        train(f"--pretrained_model_name_or_path={base}", f"--output_dir={tmp_path / 'new'}")
    last = capsys.readouterr().err.splitlines(keepends=True)[-1]
    assert_one_clear_line(last, f"the unet of {base} lacks conv_in.bias")


DATASET_MISTAKES = {
    "no such data set": ("{world}/absent", "", "there is no such folder, and from the Hub: "),
    "empty folder": ("{world}/empty", "", "--dataset_name: cannot load {world}/empty"),
    "no rows": ("{world}/none", "", "--dataset_name: cannot load {world}/none"),
    "row without an image": ("{world}/gap", "", "--image_column: row 1 of {world}/gap has no image"),
    "parts, and none to train on": ("{world}/parts", "", "{world}/parts has no split train, only validation, test"),
    "unknown caption column": (
        "{captioned}",
        "--caption_column=caption",
        "no column caption; it has image, text, stars",
    ),
    "unknown image column": ("{captioned}", "--image_column=img", "--image_column: {captioned} has no column img"),
    "image column without images": ("{captioned}", "--image_column=text", "text of {captioned} holds no images"),
    "captions that are numbers": ("{captioned}", "--caption_column=stars", "is 5, which is no text"),
    "broken photo": ("{world}/broken", "", "--dataset_name: {world}/broken/1.png is broken"),
    "new word in no caption": (
        "{captioned}",
        "--caption_column=text --method=custom_diffusion --modifier_token=<dog>",
        "--modifier_token: <dog> is in no prompt of a photo",
    ),
}


@pytest.mark.parametrize("mistake", DATASET_MISTAKES)
def test_bad_data_set_ends_in_one_line(mistake, run_script, dataset_flags, captioned, world, capsys):
    import datasets

    for name in ("none", "gap", "parts"):
        (world / name).mkdir()
    for part in ("validation", "test"):
        shutil.copy(captioned / "shade-0.png", world / "parts" / f"{part}.png")
    features = datasets.Features({"image": datasets.Image()})
    for name, images in {"none": [], "gap": [str(captioned / "shade-0.png"), None]}.items():
        datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(world / name / "train.parquet")
    name, flags, message = (text.format(world=world, captioned=captioned) for text in DATASET_MISTAKES[mistake])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_script(*dataset_flags, f"--dataset_name={name}", *flags.split(), f"--output_dir={world / 'new'}")
    assert end.value.code == 2 and not (world / "new").exists()
    assert_one_clear_line(capsys.readouterr().err, message)


def other_base(base, folder):
    """A pipeline that is hardly another one."""
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    with torch.no_grad():
        pipeline.unet.conv_in.bias[:8] += 0.5
    pipeline.save_pretrained(folder)
    return folder


def test_checkpoint_of_another_base_is_refused(train, world, penalty, tiny_sd, capsys):
    other = other_base(tiny_sd, world / "other")
    before = files_below(world)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train(
            f"--pretrained_model_name_or_path={other}",
            f"--output_dir={world / 'new'}",
            f"--resume_from_checkpoint={world / 'checkpoint-4'}",
            *penalty,
        )
    assert end.value.code == 2
    assert_one_clear_line(capsys.readouterr().err, "another base model")
    assert files_below(world) == before
