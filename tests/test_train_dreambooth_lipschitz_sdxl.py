# What train_dreambooth_lipschitz_sdxl.py promises, on a tiny random pipeline: its methods, what is SDXL's own, and
# that it runs alone. What it does in the same words as its sibling is in test_train_dreambooth_lipschitz.py.
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_vae
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file
from test_methods import load, loading_code, result
from test_train_dreambooth_lipschitz import (
    ROOT,
    TORCHRUN,
    checkpoints,
    copy_without_a_weight,
    distance,
    same_bits,
    scalars,
    weights,
)

from lipschitz_reg import Recording, draw_held_out


SCRIPT = "train_dreambooth_lipschitz_sdxl.py"
ENCODERS = ("text_encoder", "text_encoder_2")
METHODS = {
    "lora": ["--rank=3", "--lora_alpha=6", "--learning_rate=1e-2", "--output_kohya_format"],
    "lora with text encoders": [
        *["--train_text_encoder", "--rank=2", "--lora_dropout=0.2", "--learning_rate=1e-2", "--text_encoder_lr=1e-2"],
        "--output_kohya_format",
    ],
    "dora and another autoencoder": [
        "--use_dora",
        "--lipschitz_layers=50",
        "--learning_rate=1e-2",
        "--pretrained_vae_model_name_or_path={vae}",
    ],
    "full": [
        *["--method=full", "--train_text_encoder", "--learning_rate=1e-3", "--lipschitz_layers=5"],
        "--lipschitz_predictions=3",
    ],
    "custom_diffusion": [
        *["--method=custom_diffusion", "--learning_rate=1e-2", "--modifier_token=<new1>+<new2>"],
        *["--initializer_token=dog+red", "--instance_prompt=a photo of a <new1> <new2> dog"],
    ],
    "keys and values alone": [
        *["--method=custom_diffusion", "--learning_rate=1e-3", "--lipschitz_predictions=3"],
    ],
}
# These draw in bfloat16, or are the same as one of those above but for the optimizer. They have no seed, to which a
# resumed run could go back.
MORE_METHODS = {
    "full in bfloat16": ["--method=full", "--full_bf16", "--learning_rate=1e-3"],
    "prodigy": ["--optimizer=Prodigy"],
}

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.xdist_group("train_dreambooth_lipschitz_sdxl")]


@pytest.fixture(scope="module", autouse=True)
def compiler_as_it_was():
    """`--full_bf16` turns torch.compile off on a CPU."""
    yield
    torch.compiler.set_stance("default")


@pytest.fixture(scope="session")
def base_flags(tiny_sdxl, photos):
    return [
        *[f"--pretrained_model_name_or_path={tiny_sdxl}", f"--instance_data_dir={photos}"],
        *["--instance_prompt=a photo of sks dog", "--resolution=16", "--train_batch_size=2"],
    ]


@pytest.fixture(scope="session")
def train(run_sdxl_script, base_flags):
    return lambda *flags: run_sdxl_script(*base_flags, "--seed=7", *flags)


@pytest.fixture(scope="session")
def other_vae(tmp_path_factory):
    """Folder of an autoencoder whose latents are normalized, as that of Playground v2.5."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("vae")
    make_vae(latents_mean=[-0.3, 0.1, 0.2, 0.4], latents_std=[2.0, 3.0, 1.5, 0.5]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompts_flag(tmp_path_factory):
    """Few prompts that shall stay as they are: one is recorded, one held out."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a cat\n\na house at night\n")
    return f"--lipschitz_prompts_file={file}"


@pytest.fixture(scope="session")
def flags_of(other_vae, prompts_flag):
    flags = {method: ["--seed=7", *flags] for method, flags in METHODS.items()} | MORE_METHODS

    def call(method):
        recorded = any(flag.startswith(("--lipschitz_layers", "--lipschitz_pred")) for flag in flags[method])
        return [flag.format(vae=other_vae) for flag in flags[method]] + ([prompts_flag] if recorded else [])

    return call


FOUR_STEPS = ["--max_train_steps=4", "--lipschitz_weight=50", "--lr_scheduler=linear", "--lr_warmup_steps=0"]
PRIOR = ["--with_prior_preservation", "--class_prompt=a photo of dog", "--num_class_images=2", "--random_flip"]


@pytest.fixture(scope="session")
def trained(run_sdxl_script, base_flags, flags_of, tmp_path_factory):
    """Gives the output folder of a method; each is trained once, with class images that the base draws."""
    folders = {}

    def call(method):
        if method not in folders:
            folder = folders[method] = tmp_path_factory.mktemp("trained") / "model"
            flags = [*FOUR_STEPS, *PRIOR, f"--class_data_dir={folder.parent / 'class'}"]
            flags += ["--checkpointing_steps=1", "--checkpoints_total_limit=3"]
            flags += ["--validation_prompt=a photo of a <new1> dog", "--num_validation_images=1"]
            run_sdxl_script(*base_flags, *flags_of(method), *flags, f"--output_dir={folder}")
        return folders[method]

    return call


DRAW = """
import torch
from diffusers import DPMSolverMultistepScheduler

pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
generator = torch.Generator().manual_seed(7)
pipeline("a photo of a <new1> dog", num_inference_steps=3, generator=generator).images[0].save(file)
"""


@pytest.fixture(scope="session")
def drawn(trained, tiny_sdxl, tmp_path_factory):
    """A folder with what the calls of each model card draw, and the base, in a process that knows of no trainer."""
    folder = tmp_path_factory.mktemp("drawn")
    load_base = "import torch\nfrom diffusers import DiffusionPipeline\n"
    load_base += f"pipeline = DiffusionPipeline.from_pretrained({str(tiny_sdxl)!r}, dtype=torch.float32)\n"
    calls = {"base": load_base} | {method: loading_code(trained(method)) for method in METHODS}
    code = [lines + f"file = {name!r} + '.png'" + DRAW for name, lines in calls.items()]
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


# Each method


@pytest.mark.parametrize("method", METHODS)
def test_calls_of_the_model_card_draw_the_last_validation_image(method, trained, drawn):
    pixels = [np.asarray(Image.open(path)) for path in (trained(method) / "image_0.png", drawn / f"{method}.png")]
    np.testing.assert_array_equal(*pixels)


def test_no_validation_image_is_that_of_the_base(trained, drawn):
    """Or the claim above would hold for calls that load nothing."""
    files = [drawn / "base.png", *(trained(method) / "image_0.png" for method in METHODS)]
    assert len({np.asarray(Image.open(file)).tobytes() for file in files}) == len(files)


@pytest.mark.parametrize("method", [*METHODS, *MORE_METHODS])
def test_resume_is_bit_identical_in_the_middle_of_an_epoch(
    method, trained, run_sdxl_script, base_flags, flags_of, tmp_path
):
    flags = [*base_flags, *flags_of(method), *FOUR_STEPS, *PRIOR, "--checkpointing_steps=3"]
    flags += [f"--class_data_dir={trained(method).parent / 'class'}", f"--output_dir={tmp_path}"]
    run_sdxl_script(*flags, f"--resume_from_checkpoint={trained(method) / 'checkpoint-2'}")
    assert checkpoints(tmp_path) == ["checkpoint-3"]  # none of the last step, 4
    again, whole = result(tmp_path), result(trained(method))
    assert whole and same_bits(again, whole)
    assert not same_bits(result(trained(method) / "checkpoint-2"), whole)


@pytest.mark.parametrize("method", METHODS)
def test_limit_keeps_the_newest_checkpoints(method, trained):
    assert checkpoints(trained(method)) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("method", METHODS)
def test_penalty_is_zero_in_the_first_step_and_only_there(method, trained):
    penalty = scalars(trained(method))[0]["lipschitz/penalty"]
    # A prediction that is made alone is rounded in another way than in the batch in which it was recorded.
    assert [step for step, value in penalty.items() if value < 1e-6 * penalty[4]] == [1]


STRONG = {"lora": "1e5", "full": "3e4"}


@pytest.mark.parametrize("method", STRONG)
def test_penalty_keeps_the_model_closer_to_the_base(method, train, flags_of, tmp_path):
    drifts = []
    for weight in ("1e-9", STRONG[method]):
        flags = [f"--lipschitz_weight={weight}", "--max_train_steps=6", f"--output_dir={tmp_path / weight}"]
        train(*flags_of(method), *flags)
        drifts.append(scalars(tmp_path / weight)[0]["lipschitz/distance"][6])
    assert 0 < drifts[1] < 0.9 * drifts[0]


def test_weight_zero_is_plain_dreambooth_bit_for_bit(train, sdxl_script, tiny_sdxl, photos, tmp_path, monkeypatch):
    """Against a loop written out here with diffusers alone, in which no line knows of the penalty."""
    monkeypatch.setattr(sdxl_script, "LipschitzRegularizer", None)
    flags = ["--method=full", "--learning_rate=1e-3", "--lipschitz_weight=0", "--max_train_steps=3"]
    train(*flags, f"--output_dir={tmp_path}")

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    unet, vae = pipeline.unet, pipeline.vae
    vae.enable_slicing()  # images one by one, as in the script, or the last bits are others
    noise_scheduler = DDPMScheduler.from_pretrained(tiny_sdxl, subfolder="scheduler")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt("a photo of sks dog")
    images = [sdxl_script.Example(path, "") for path in sorted(photos.iterdir()) if path.suffix != ".txt"]
    dataset, sampler = sdxl_script.DreamBoothDataset([images], [[]], 16), sdxl_script.EpochSampler(5, seed=7)
    torch.manual_seed(7)
    draws = list(sampler)
    for batch in (draws[:2], draws[2:4], draws[4:]):
        _, pixels, time_ids = zip(*[dataset[draw] for draw in batch])
        latents = (
            vae.encode(torch.stack([image for (image,) in pixels])).latent_dist.sample().detach()
            * vae.config.scaling_factor
        )
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(batch),))
        conditions = {"text_embeds": pooled.repeat(len(batch), 1), "time_ids": torch.cat(time_ids)}
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        text = embeds.repeat(len(batch), 1, 1)
        prediction = unet(noisy_latents, timesteps, text, added_cond_kwargs=conditions).sample
        (prediction - noise).square().mean((1, 2, 3)).mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert same_bits(weights(tmp_path), unet.state_dict())


@pytest.fixture(scope="session")
def personalized(tiny_sdxl, tmp_path_factory):
    """A base whose U-Net somebody has trained before."""
    folder = tmp_path_factory.mktemp("personalized")
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["full", "lora", "custom_diffusion"])
def test_penalty_counts_from_the_anchor_model(method, personalized, tiny_sdxl, train, tmp_path):
    before, anchor = weights(personalized), weights(tiny_sdxl)
    patterns = {"full": "", "lora": r"attn.\.to_(q|k|v|out\.0)\.weight", "custom_diffusion": r"attn2\.to_[kv]\."}
    keys = [key for key in anchor if re.search(patterns[method], key)]
    expected = sum((before[key].double() - anchor[key].double()).square().mean().item() for key in keys)
    flags = [f"--pretrained_model_name_or_path={personalized}", "--max_train_steps=1", f"--output_dir={tmp_path}"]
    train(f"--method={method}", *flags, f"--lipschitz_anchor_model={tiny_sdxl}", "--lipschitz_weight=7")
    assert scalars(tmp_path)[0]["lipschitz/penalty"][1] == pytest.approx(7 * expected, rel=1e-4)


def test_two_processes_run_the_script_alone_and_save_once(base_flags, prompts_flag, tiny_sdxl, tmp_path):
    """
    With no other file of this project but the plugin, and a text encoder whose last layer gets no gradient. Five
    photos are three steps an epoch.
    """
    folder, packages = tmp_path / "alone", tmp_path / "packages"
    folder.mkdir(), packages.mkdir()
    shutil.copy(ROOT / SCRIPT, folder)
    packages.joinpath("lipschitz_reg").symlink_to(ROOT / "lipschitz_reg")
    flags = [*base_flags, "--train_text_encoder", "--train_batch_size=1", "--max_train_steps=4", "--output_dir=model"]
    flags += ["--checkpointing_steps=1", "--checkpoints_total_limit=2", "--drift_budget=1000", prompts_flag]
    flags += ["--validation_epochs=1", "--validation_prompt=a dog", "--num_validation_images=1"]
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    done = subprocess.run([*TORCHRUN, SCRIPT, *flags], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Saved the result") == 1
    assert checkpoints(folder / "model") == ["checkpoint-3", "checkpoint-4"]
    values, images = scalars(folder / "model")
    assert images == {3, 4} and [*values["lipschitz/distance"]] == [3, 4] and [*values["loss"]] == [1, 2, 3, 4]
    ups = [tensor for key, tensor in result(folder / "model").items() if "lora_B" in key]
    assert any(tensor.any() for tensor in ups)


# What is trained and saved


def test_result_is_small_and_safetensors_only(trained):
    lora = {"pytorch_lora_weights.safetensors"}
    kohya = {*lora, "pytorch_lora_weights_kohya.safetensors"}
    keys_values = {"custom_diffusion.safetensors"}
    files = {"lora": kohya, "lora with text encoders": kohya, "dora and another autoencoder": lora}
    files |= {"custom_diffusion": {*keys_values, "learned_embeds.safetensors"}, "keys and values alone": keys_values}
    for method, expected in files.items():
        names = {path.name for path in trained(method).iterdir() if path.is_file()}
        names -= {path.name for path in trained(method).glob("recording-*")}
        assert names == expected | {"README.md", "image_0.png"}
        assert sum((trained(method) / name).stat().st_size for name in expected) < 1e6


def test_lora_of_the_unet_alone_is_all_that_its_file_holds(trained):
    keys = load_file(trained("lora") / "pytorch_lora_weights.safetensors").keys()
    assert keys and all(re.fullmatch(r"unet\..*\.lora_[AB]\.weight", key) for key in keys)


def test_lora_file_holds_all_models_and_its_alpha(trained):
    keys = load_file(trained("lora with text encoders") / "pytorch_lora_weights.safetensors").keys()
    assert {key.split(".")[0] for key in keys} == {"unet", *ENCODERS}
    layer = load(trained("lora")).unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2.to_k
    assert set(layer.scaling.values()) == {2.0}


@pytest.mark.parametrize("method", ["lora", "lora with text encoders"])
def test_kohya_file_draws_what_the_other_file_draws(method, trained, tiny_sdxl):
    latents = []
    for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors", None):
        pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
        pipeline.set_progress_bar_config(disable=True)
        if name is not None:
            pipeline.load_lora_weights(trained(method), weight_name=name)
        options = {"num_inference_steps": 2, "generator": torch.manual_seed(1), "output_type": "latent"}
        latents.append(pipeline("a photo of sks dog", **options).images)
    torch.testing.assert_close(latents[1], latents[0])
    assert (latents[2] - latents[0]).abs().max() > 1e-2
    keys = load_file(trained(method) / "pytorch_lora_weights_kohya.safetensors").keys()
    prefixes = ["lora_unet_down_blocks_", "lora_te1_text_model_encoder_", "lora_te2_text_model_encoder_"]
    assert all(any(key.startswith(prefix) for key in keys) for prefix in prefixes[: 1 if method == "lora" else 3])


def test_custom_diffusion_changes_keys_and_values_of_cross_attention_only(trained, tiny_sdxl):
    before, after = weights(tiny_sdxl), load(trained("custom_diffusion")).unet.state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed == {key for key in after if "attn2.to_k" in key or "attn2.to_v" in key}


def test_custom_diffusion_trains_the_keys_and_values_of_the_70_blocks_of_sdxl(sdxl_script):
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )
    args = sdxl_script.parse_args([*NEEDED, "--method=custom_diffusion"])
    pipeline = type("Pipeline", (), {"unet": unet})
    sdxl_script.choose_parameters(args, pipeline, torch.float32)
    shapes = [tuple(parameter.shape) for parameter in unet.parameters() if parameter.requires_grad]
    assert len(shapes) == 2 * 70 and {shape[1] for shape in shapes} == {2048}


def test_rows_of_other_tokens_keep_every_bit(train, flags_of, sdxl_script, tiny_sdxl, tmp_path, monkeypatch):
    """In both text encoders; in training itself, with weight decay; and after loading."""
    seen = {}
    save = sdxl_script.save_trained
    monkeypatch.setattr(
        sdxl_script,
        "save_trained",
        lambda args, trained, *folder: (seen.update(trained), save(args, trained, *folder)),
    )
    flags = ["--max_train_steps=2", "--adam_weight_decay=0.1", f"--output_dir={tmp_path}"]
    train(*flags_of("custom_diffusion"), *flags)
    before, pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl), load(tmp_path)
    for name in ENCODERS:
        old = getattr(before, name).get_input_embeddings().weight
        embedding = seen[name].get_input_embeddings()
        loaded = getattr(pipeline, name).get_input_embeddings().weight
        assert torch.equal(embedding.embedding.weight, old) and torch.equal(loaded[: len(old)], old)
        assert torch.equal(loaded[len(old) :], embedding.new) and len(embedding.new) == 2
        tokenizer = before.tokenizer if name == "text_encoder" else before.tokenizer_2
        starts = [old[tokenizer.encode(word, add_special_tokens=False)].mean(0) for word in ("dog", "red")]
        assert all((0 < (row - start).abs().max() < 0.1) for row, start in zip(embedding.new, starts))
        others, start = seen[name].state_dict(), getattr(before, name).state_dict()
        unchanged = [key for key in start if "token_embedding" not in key]
        assert unchanged and all(torch.equal(others[key], start[key]) for key in unchanged)


def test_pooled_embedding_knows_what_comes_after_a_new_word(sdxl_script, flags_of, trained, tiny_sdxl):
    """In training as with the calls of the model card; not so without its last one, on SDXL as it was published."""
    args = sdxl_script.parse_args([*NEEDED, *flags_of("custom_diffusion")])
    pipelines = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl), load(trained("custom_diffusion"))
    sdxl_script.add_tokens(args, pipelines[0])
    for pipeline in pipelines:
        tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
        prompts = ["a <new1> dog at night", "a <new1> dog in snow"]
        with torch.no_grad():
            text_encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
            pooled = sdxl_script.encode_prompts(prompts, tokenizers, text_encoders)["pooled_embeds"]
        assert (pooled[0] - pooled[1]).abs().max() > 1e-3
    pipeline.text_encoder_2.text_model.eos_token_id = 2
    with torch.no_grad():
        text_encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
        pooled = sdxl_script.encode_prompts(prompts, tokenizers, text_encoders)["pooled_embeds"]
    assert torch.allclose(pooled[0], pooled[1], atol=1e-6)


# Precision and optimizers


@pytest.mark.parametrize("given_vae", [False, True])
def test_only_what_needs_it_is_in_float32(given_vae, train, sdxl_script, other_vae, tmp_path, monkeypatch):
    """What is trained, and SDXL's own autoencoder, which overflows in float16, out of reach of autocast."""
    seen, encode, decode = {}, sdxl_script.encode_images, AutoencoderKL.decode
    attach = sdxl_script.attach_lipschitz

    def spy_on_encode(vae, images):
        seen["encode"] = vae.dtype
        return encode(vae, images)

    def spy_on_decode(vae, latents, **options):
        seen["decode"] = latents.dtype
        assert not torch.is_autocast_enabled("cpu")
        return decode(vae, latents, **options)

    def spy_on_models(args, accelerator, pipeline, optimizer, trained, *rest):
        seen["models"] = trained
        return attach(args, accelerator, pipeline, optimizer, trained, *rest)

    monkeypatch.setattr(sdxl_script, "encode_images", spy_on_encode)
    monkeypatch.setattr(sdxl_script, "attach_lipschitz", spy_on_models)
    monkeypatch.setattr(AutoencoderKL, "decode", spy_on_decode)
    flags = ["--mixed_precision=bf16", "--use_8bit_adam", "--gradient_checkpointing", "--train_text_encoder"]
    flags += ["--validation_prompt=a dog", "--num_validation_images=1", "--max_train_steps=2"]
    flags += [f"--pretrained_vae_model_name_or_path={other_vae}"] if given_vae else []
    train(*flags, f"--output_dir={tmp_path}")
    parameters = [parameter for model in seen["models"].values() for parameter in model.parameters()]
    assert {p.dtype for p in parameters if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in parameters if not p.requires_grad} == {torch.bfloat16}
    assert {seen["encode"], seen["decode"]} == {torch.bfloat16 if given_vae else torch.float32}
    assert {value.dtype for value in result(tmp_path).values()} == {torch.float32}


def test_gradient_checkpointing_changes_no_result(train, flags_of, tmp_path):
    """Nor does keeping the anchors in host memory."""
    flags = [*flags_of("full"), "--max_train_steps=2", "--lipschitz_weight=50"]
    for name, more in {"with": ["--gradient_checkpointing", "--lipschitz_anchor_device=cpu"], "without": []}.items():
        train(*flags, *more, f"--output_dir={tmp_path / name}")
    for part in ("unet", *ENCODERS):
        after, other = weights(tmp_path / "with", part), weights(tmp_path / "without", part)
        assert distance(after, other) < 1e-4 * distance(after, {key: torch.zeros(()) for key in after})


def test_small_updates_add_up_in_bfloat16(sdxl_script, base_flags):
    """Next to 1, bfloat16 has steps of 2**-8; 64 updates of 1e-6 are a sixtieth of one."""
    accelerator = sdxl_script.Accelerator(cpu=True)
    moves = {}
    for name, flags in {"full_bf16": ["--full_bf16"], "adamw": [], "8bit": ["--use_8bit_adam"]}.items():
        args = sdxl_script.parse_args([*base_flags, "--method=full", "--learning_rate=1e-6", *flags])
        parameter = torch.nn.Parameter(torch.ones(256, 256, dtype=torch.bfloat16))
        groups = [{"params": [parameter], "lr": args.learning_rate, "weight_decay": 0.0}]
        optimizer = sdxl_script.build_optimizer(args, accelerator, groups)
        torch.manual_seed(0)
        for _ in range(64):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        moves[name] = (1 - parameter.double()).mean().item()
    assert moves["adamw"] == moves["8bit"] == 0
    assert moves["full_bf16"] == pytest.approx(64e-6, rel=0.15)


def test_full_bf16_trains_and_saves_weights_of_bfloat16(trained, tiny_sdxl):
    after, before = weights(trained("full in bfloat16")), weights(tiny_sdxl)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert distance(after, {key: tensor.bfloat16() for key, tensor in before.items()}) > 0
    assert scalars(trained("full in bfloat16"))[0]["lipschitz/penalty"][1] == 0
    optimizer = torch.load(trained("full in bfloat16") / "checkpoint-2" / "optimizer.bin", weights_only=False)
    states = optimizer["state"].values()
    assert {"OptimState8bit"} == {
        type(state["exp_avg"]).__name__ for state in states if state["exp_avg"].numel() > 8191
    }


def test_learning_rates_and_decays_are_those_of_the_parts(train, sdxl_script, tmp_path, monkeypatch):
    seen, build = [], sdxl_script.build_optimizer
    monkeypatch.setattr(sdxl_script, "build_optimizer", lambda *a: seen.extend(map(dict, a[2])) or build(*a))
    flags = ["--train_text_encoder", "--scale_lr", "--gradient_accumulation_steps=3", "--max_train_steps=1"]
    flags += ["--learning_rate=1e-4", "--text_encoder_lr=1e-5", "--lipschitz_weight=0"]
    train(*flags, f"--output_dir={tmp_path}")
    assert [group["lr"] for group in seen] == pytest.approx([6e-4, 6e-5, 6e-5])
    assert [group["weight_decay"] for group in seen] == [1e-4, 1e-3, 1e-3]


NEEDED = ["--pretrained_model_name_or_path=x", "--instance_data_dir=x", "--instance_prompt=<new1> <new2>"]


def test_defaults_are_those_of_the_method(sdxl_script):
    names = ("learning_rate", "text_encoder_lr", "lipschitz_weight", "adam_weight_decay", "output_dir")
    names += ("lipschitz_layers", "lipschitz_predictions")
    lora, full, custom_diffusion = "lora-dreambooth-model", "dreambooth-model", "custom-diffusion-model"
    expected = {
        (): [1e-4, 5e-6, 0, 0, lora, 0.05, 1],
        ("--lipschitz_weight",): [1e-4, 5e-6, 1, 0, lora, 0, 0],
        ("--lipschitz_weight=0",): [1e-4, 5e-6, 0, 1e-4, lora, 0, 0],
        ("--method=full",): [1e-6, 1e-6, 0, 0, full, 4, 1],
        ("--method=full", "--learning_rate=2e-6"): [2e-6, 2e-6, 0, 0, full, 4, 1],
        ("--method=full", "--lipschitz_weight"): [1e-6, 1e-6, 500, 0, full, 0, 0],
        ("--method=custom_diffusion", "--lipschitz_weight"): [1e-4, 1e-4, 50, 0, custom_diffusion, 0, 0],
        ("--optimizer=prodigy",): [1, 1, 0, 0, lora, 0.05, 1],
        ("--method=full", "--lipschitz_layers"): [1e-6, 1e-6, 0, 0, full, 4, 0],
        ("--lipschitz_layers", "--lipschitz_weight=2"): [1e-4, 5e-6, 2, 0, lora, 0.05, 0],
        ("--lipschitz_predictions=0",): [1e-4, 5e-6, 0, 0, lora, 0.05, 0],
        ("--drift_budget=0.05",): [1e-4, 5e-6, 0, 0, lora, 0.05, 1],
        ("--drift_budget=0.05", "--lipschitz_predictions=1"): [1e-4, 5e-6, 0, 0, lora, 0, 1],
        ("--drift_budget=0.05", "--lipschitz_weight=2"): [1e-4, 5e-6, 2, 0, lora, 0, 0],
    }
    for flags, values in expected.items():
        args = sdxl_script.parse_args([*NEEDED, *flags])
        assert [getattr(args, name) for name in names] == values, flags
    assert (args.method, args.resolution, args.rank, args.lora_alpha) == ("lora", 1024, 4, 4)
    assert args.prodigy_decouple is True
    assert sdxl_script.parse_args([*NEEDED, "--prodigy_decouple=False"]).prodigy_decouple is False


# The loss


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(5)
    time_ids = torch.randint(0, 64, (3, 2, 6)).float()
    conditions = {"prompt_embeds": torch.randn(6, 32, 40), "pooled_embeds": torch.randn(6, 20)}
    return conditions, torch.rand(3, 2, 3, 16, 16) * 2 - 1, time_ids


def by_hand(pipeline, batch, seed):
    """Latents of a batch in the order of the loss, and a U-Net that knows its conditions."""
    given, images, time_ids = batch
    embeds, pooled = given.values()
    pipeline.vae.enable_slicing()  # images one by one, as in the script, or noise comes in another order
    torch.manual_seed(seed)
    latents = pipeline.vae.encode(torch.cat([images[:, 0], images[:, 1]])).latent_dist.sample()
    conditions = {"text_embeds": pooled, "time_ids": torch.cat([time_ids[:, 0], time_ids[:, 1]])}
    unet = lambda noisy, timesteps: pipeline.unet(noisy, timesteps, embeds, added_cond_kwargs=conditions).sample  # noqa: E731
    return latents * pipeline.vae.config.scaling_factor, unet


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_min_snr_weighs_each_sample_by_its_own_timestep(sdxl_script, tiny_sdxl, batch, prediction_type):
    """Also with prior preservation: photos and class images are weighed apart. By hand, from the formula."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    args = sdxl_script.parse_args([*NEEDED, "--snr_gamma=0.5"])
    torch.manual_seed(1)
    losses = sdxl_script.compute_loss(args, noise_scheduler, pipeline.vae, pipeline.unet, *batch)

    latents, unet = by_hand(pipeline, batch, seed=1)
    noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (6,))
    alpha = noise_scheduler.alphas_cumprod[timesteps]
    a, s = alpha.sqrt()[:, None, None, None], (1 - alpha).sqrt()[:, None, None, None]
    target = noise if prediction_type == "epsilon" else a * noise - s * latents
    snr = alpha / (1 - alpha)
    weight = snr.clamp(max=0.5) / (snr if prediction_type == "epsilon" else snr + 1)
    each = weight * (unet(a * latents + s * noise, timesteps) - target).square().mean((1, 2, 3))
    assert len(set(weight.tolist())) > 3
    torch.testing.assert_close(losses[0], each[:3].mean())
    torch.testing.assert_close(losses[1], each[3:].mean())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_edm_style_loss_of_a_plain_base(sdxl_script, tiny_sdxl, batch, prediction_type):
    """That of its noise; that of its velocity over sigma**2 + 1, which is 1 / alpha. By hand, without sigmas."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    noise_scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    args = sdxl_script.parse_args([*NEEDED, "--do_edm_style_training"])
    torch.manual_seed(1)
    losses = sdxl_script.compute_loss(args, noise_scheduler, pipeline.vae, pipeline.unet, *batch)

    latents, unet = by_hand(pipeline, batch, seed=1)
    timesteps, noise = 999 - torch.randint(0, 1000, (6,)), torch.randn_like(latents)
    alpha = noise_scheduler.alphas_cumprod[timesteps]
    a, s = alpha.sqrt()[:, None, None, None], (1 - alpha).sqrt()[:, None, None, None]
    target = noise if prediction_type == "epsilon" else a * noise - s * latents
    each = (unet(a * latents + s * noise, timesteps) - target).square().mean((1, 2, 3))
    each = each if prediction_type == "epsilon" else alpha * each
    torch.testing.assert_close(torch.stack(losses), each.view(2, 3).mean(1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_edm_style_loss_of_a_base_of_edm(sdxl_script, tiny_sdxl, batch):
    """The error of D = c_skip x + c_out F(c_in x, c_noise), by hand from table 1 of the paper."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    noise_scheduler = EDMEulerScheduler(sigma_data=0.5)
    args = sdxl_script.parse_args([*NEEDED, "--do_edm_style_training"])
    torch.manual_seed(1)
    losses = sdxl_script.compute_loss(args, noise_scheduler, pipeline.vae, pipeline.unet, *batch)

    latents, unet = by_hand(pipeline, batch, seed=1)
    sigma = noise_scheduler.sigmas[torch.randint(0, 1000, (6,))][:, None, None, None]
    noisy = latents + sigma * torch.randn_like(latents)
    total = sigma**2 + 0.5**2
    output = unet(noisy / total.sqrt(), sigma.flatten().log() / 4)
    denoised = 0.5**2 / total * noisy + 0.5 * sigma / total.sqrt() * output
    each = (denoised - latents).square().mean((1, 2, 3))
    torch.testing.assert_close(torch.stack(losses), each.view(2, 3).mean(1))


@pytest.fixture(scope="session")
def playground(tiny_sdxl, other_vae, tmp_path_factory):
    """A base as Playground v2.5: a scheduler of EDM, latents that are normalized."""
    folder = tmp_path_factory.mktemp("playground")
    vae, scheduler = AutoencoderKL.from_pretrained(other_vae), EDMDPMSolverMultistepScheduler()
    StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, vae=vae, scheduler=scheduler).save_pretrained(folder)
    return folder


def test_base_of_edm_is_trained_and_drawn_with_its_own_kind_of_scheduler(
    playground, train, sdxl_script, tmp_path, monkeypatch
):
    seen, draw, compute_loss = [], sdxl_script.log_validation, sdxl_script.compute_loss
    monkeypatch.setattr(
        sdxl_script, "log_validation", lambda *rest: seen.append(type(rest[2].scheduler)) or draw(*rest)
    )
    monkeypatch.setattr(
        sdxl_script, "compute_loss", lambda args, *rest: seen.append(type(rest[0])) or compute_loss(args, *rest)
    )
    flags = [f"--pretrained_model_name_or_path={playground}", "--validation_prompt=a dog", "--max_train_steps=1"]
    train(*flags, "--num_validation_images=1", f"--output_dir={tmp_path}")
    assert seen == [EDMEulerScheduler, EDMDPMSolverMultistepScheduler]
    assert math.isfinite(scalars(tmp_path)[0]["loss"][1])


# Drift in training


def test_measuring_drift_changes_no_training(playground, train, prompts_flag, tmp_path):
    """On a base of EDM, whose denoiser is called in another way."""
    for name, more in {"moved": ["--drift_every=2", prompts_flag], "not": []}.items():
        flags = [f"--pretrained_model_name_or_path={playground}", "--max_train_steps=3", "--lipschitz_weight=1", *more]
        train(*flags, f"--output_dir={tmp_path / name}")
    moved = scalars(tmp_path / "moved")[0]["drift/prediction"]
    assert list(moved) == [2, 3] and 0 < moved[2] < 1
    assert same_bits(result(tmp_path / "moved"), result(tmp_path / "not"))


@pytest.mark.parametrize("method", ["full", "lora with text encoders"])
def test_finished_model_has_drifted_by_the_budget(method, train, flags_of, prompts_flag, tiny_sdxl, tmp_path):
    """As it is loaded with the calls of its model card, text encoders and all."""
    flags = [*flags_of(method), "--drift_budget=0.02", prompts_flag, "--learning_rate=3e-2", "--text_encoder_lr=1e-2"]
    train(*flags, "--drift_every=3", "--max_train_steps=3", f"--output_dir={tmp_path}")
    loaded, base = load(tmp_path), StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    assert "of the change of weights is kept, and predictions now differ by" in (tmp_path / "README.md").read_text()
    (file,) = tmp_path.glob("recording-*")
    recording = Recording.load(file, base.unet, **{name: getattr(base, name) for name in ENCODERS})
    drift = recording.drift(loaded.unet, lambda: draw_held_out(loaded, recording))
    assert 0.95 * 0.02 <= drift.dial <= 1.001 * 0.02
    assert scalars(tmp_path)[0]["drift/guided_prediction"][3] == pytest.approx(drift.dial, rel=1e-3)


# Photos, captions and sizes


@pytest.fixture
def ramps(tmp_path):
    """A wide and a tall picture in which brightness tells the column, or the row, doubled."""
    wide = np.tile(np.arange(40, dtype=np.uint8), (20, 1))
    Image.fromarray(2 * wide).save(tmp_path / "wide.png")
    Image.fromarray(2 * np.tile(np.arange(60, dtype=np.uint8)[:, None], (1, 20))).save(tmp_path / "tall.png")
    return tmp_path


@pytest.mark.parametrize("options", [{}, {"center_crop": True}])
def test_sizes_are_those_of_this_very_crop(options, ramps, sdxl_script):
    """Of the photo and of the class image, each its own; drawn anew for each use."""
    rows = [[sdxl_script.Example(ramps / name, "")] for name in ("wide.png", "tall.png")]
    dataset = sdxl_script.DreamBoothDataset(rows[:1], rows[1:], 20, **options)
    found = set()
    for seed in range(8):
        _, images, time_ids = dataset[0, seed]
        first, last = ((image + 1) * 127.5 / 2 for image in images)
        left, top = round(first[0, 0, 0].item()), round(last[0, 0, 0].item())
        assert time_ids.tolist() == [[20, 40, 0, left, 20, 20], [60, 20, top, 0, 20, 20]]
        found.add((left, top))
    assert found == {(10, 20)} if options else len(found) > 4


def test_flipped_image_keeps_the_sizes_of_its_crop(ramps, sdxl_script):
    dataset = sdxl_script.DreamBoothDataset(
        [[sdxl_script.Example(ramps / "wide.png", "")]], [[]], 20, random_flip=True
    )
    kinds = set()
    for seed in range(8):
        _, (image,), (time_ids,) = dataset[0, seed]
        columns = ((image[0, 0] + 1) * 127.5 / 2).round().int().tolist()
        flipped = columns[0] > columns[-1]
        assert time_ids.tolist() == [20, 40, 0, 39 - columns[0] if flipped else columns[0], 20, 20]
        kinds.add(flipped)
    assert kinds == {True, False}


CAPTIONS = {0: "a dog at night", 120: "a dog on grass", 240: ""}


@pytest.mark.parametrize("how", ["frozen text encoders, folder", "trained text encoders, Parquet file with images"])
def test_each_photo_comes_with_its_caption(how, run_sdxl_script, sdxl_script, tiny_sdxl, tmp_path, monkeypatch):
    """In both of its embeddings; where there is no caption, with the instance prompt."""
    images, data = [Image.new("RGB", (24, 16), (shade,) * 3) for shade in CAPTIONS], tmp_path / "data"
    data.mkdir()
    if "Parquet" in how:
        import datasets

        columns = {"image": images, "text": [*CAPTIONS.values()]}
        datasets.Dataset.from_dict(columns).to_parquet(data / "train.parquet")
    else:
        for image, shade in zip(images, CAPTIONS):
            image.save(data / f"{shade}.png")
        lines = [json.dumps({"file_name": f"{shade}.png", "text": text}) for shade, text in CAPTIONS.items()]
        data.joinpath("metadata.jsonl").write_text("\n".join(lines))
    seen, compute_loss = [], sdxl_script.compute_loss

    def spy(args, scheduler, vae, unet, conditions, images, time_ids, *rest):
        embeds, pooled = (conditions[name].detach() for name in ("prompt_embeds", "pooled_embeds"))
        seen.extend(zip([image for (image,) in images], embeds, pooled, time_ids, strict=True))
        return compute_loss(args, scheduler, vae, unet, conditions, images, time_ids, *rest)

    monkeypatch.setattr(sdxl_script, "compute_loss", spy)
    flags = [f"--pretrained_model_name_or_path={tiny_sdxl}", f"--dataset_name={data}", "--caption_column=text"]
    flags += ["--instance_prompt=a photo of sks dog", "--repeats=2", "--learning_rate=0", "--text_encoder_lr=0"]
    flags += [f"--cache_dir={tmp_path / 'cache'}", f"--output_dir={tmp_path / 'model'}", "--resolution=16"]
    run_sdxl_script(*flags, *(["--train_text_encoder"] if "trained" in how else []))
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    shades = []
    for image, embeds, pooled, time_ids in seen:
        shades.append(round((image.mean().item() + 1) * 127.5))
        prompt = CAPTIONS[shades[-1]] or "a photo of sks dog"
        with torch.no_grad():
            expected = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        torch.testing.assert_close(embeds, expected[0][0])
        torch.testing.assert_close(pooled, expected[2][0])
        assert time_ids[0, :2].tolist() == [16, 24]
    assert sorted(shades) == sorted([*CAPTIONS] * 2)


# Bad input


def assert_one_clear_line(stderr, message):
    (line,) = stderr.splitlines()
    assert line.startswith(f"{SCRIPT}: error: ") and message in line


FULL, CUSTOM = "--method=full", "--method=custom_diffusion"
MISTAKES = {
    "SD base": ("--pretrained_model_name_or_path={world}/sd", "XLPipeline: use train_dreambooth_lipschitz.py"),
    "refiner": ("--pretrained_model_name_or_path={world}/refiner", "is a StableDiffusionXLImg2ImgPipeline, not a"),
    "base that is nowhere": ("--pretrained_model_name_or_path=no/such-model", "found no Stable Diffusion XL pipeline"),
    "base without weights": ("", "cannot load {world}/base"),
    "no such autoencoder": (
        "--pretrained_vae_model_name_or_path={world}/none",
        "--pretrained_vae_model_name_or_path: cannot load",
    ),
    "budget without the penalty": ("--drift_budget=1 --lipschitz_weight=0", "--drift_budget needs a penalty"),
    "layers and a bound": (
        "--lipschitz_layers --lipschitz_mode=projected --lipschitz_radius=1",
        "needs --lipschitz_mode coupled",
    ),
    "recording that is not there": (
        "--lipschitz_layers --lipschitz_recording={world}/none",
        "--lipschitz_recording: cannot read the recording {world}/none",
    ),
    "SD anchor model": ("--lipschitz_anchor_model={world}/sd", "--lipschitz_anchor_model: {world}/sd is a Stable"),
    "min-SNR and EDM": ("--snr_gamma=5 --do_edm_style_training", "--snr_gamma weighs a loss that EDM-style training"),
    "min-SNR and a base of EDM": (
        "--snr_gamma=5 --pretrained_model_name_or_path={world}/edm",
        "--snr_gamma weighs a loss that EDM-style training",
    ),
    "modifier token with LoRA": ("--modifier_token=<new1>", "--modifier_token is for --method custom_diffusion"),
    "DoRA with full": (f"{FULL} --use_dora", "--use_dora is for --method lora, not for --method full"),
    "kohya with full": (f"{FULL} --output_kohya_format", "--output_kohya_format is for --method lora"),
    "kohya of DoRA": ("--output_kohya_format --use_dora", "does not work with --use_dora"),
    "bfloat16 weights of LoRA": ("--full_bf16", "--full_bf16 is for --method full, not for --method lora"),
    "bfloat16 weights in float16": (f"{FULL} --full_bf16 --mixed_precision=fp16", "leave out --mixed_precision fp16"),
    "two 8-bit optimizers": (f"{FULL} --full_bf16 --use_8bit_adam", "leave out --use_8bit_adam"),
    "share that bfloat16 loses": (f"{FULL} --full_bf16 --drift_budget=0.1", "is too coarse to keep only a part"),
    "pull that bfloat16 loses": (f"{FULL} --full_bf16 --lipschitz_mode=proximal", "lose the small pulls"),
    "prodigy in 8 bits": ("--optimizer=prodigy --use_8bit_adam", "--optimizer prodigy has no --use_8bit_adam"),
    "prodigy in bfloat16": (f"{FULL} --optimizer=prodigy --full_bf16", "--optimizer prodigy has no --full_bf16"),
    "prodigy with two rates": (
        "--optimizer=prodigy --train_text_encoder --text_encoder_lr=0.5",
        "one learning rate for all",
    ),
    "proximal prodigy": (f"{FULL} --optimizer=prodigy --lipschitz_mode=proximal", "prodigy finds its own"),
    "unknown optimizer": ("--optimizer=sgd", "--optimizer: invalid choice"),
    "neither true nor false": ("--prodigy_decouple=maybe", "--prodigy_decouple: invalid boolean value"),
    "text encoders with custom diffusion": (f"{CUSTOM} --train_text_encoder", "leave out --train_text_encoder"),
    "new word in no prompt": (f"{CUSTOM} --modifier_token=<a>", "<a> is in no prompt of a photo"),
    "negative weight": ("--lipschitz_weight=-1", "--lipschitz_weight: must be a finite number"),
    "negative seed": ("--seed=-1", "--seed: must be a finite number at least 0"),
    "gradients that are never forgotten": ("--adam_beta1=1", "--adam_beta1: must be a finite number at least 0"),
    "output folder that is a file": ("--output_dir={world}/sd/model_index.json", "--output_dir: cannot write to"),
    "xformers on a CPU": ("--enable_xformers_memory_efficient_attention", "needs a CUDA GPU"),
    "float16 on a CPU": ("--mixed_precision=fp16", "fp16"),
    "no class prompt": ("--with_prior_preservation --class_data_dir={world}/class", "--class_prompt"),
    "folder and data set": ("--dataset_name={world}", "--instance_data_dir and --dataset_name both give photos"),
    "checkpoint of another method": (
        f"{FULL} --resume_from_checkpoint={{lora}}/checkpoint-2",
        "was trained with --method lora (now full)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_in_one_line_before_anything_is_loaded(mistake, train, trained, tiny_sdxl, tmp_path, capsys):
    index = json.loads((tiny_sdxl / "model_index.json").read_text())
    kinds = {"base": {}, "edm": {"scheduler": ["diffusers", "EDMEulerScheduler"]}}
    kinds |= {"sd": {"_class_name": "StableDiffusionPipeline"}}
    kinds |= {"refiner": {"_class_name": "StableDiffusionXLImg2ImgPipeline"}}
    for name, entries in kinds.items():  # an index without weights: loading it fails otherwise
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(json.dumps({**index, **entries}))
    places = {"world": tmp_path, "lora": trained("lora")}
    flags, message = (text.format(**places) for text in MISTAKES[mistake])
    capsys.readouterr()
    base = f"--pretrained_model_name_or_path={tmp_path / 'base'}"
    with pytest.raises(SystemExit) as end:
        train(base, f"--output_dir={tmp_path / 'new'}", *flags.split())
    assert end.value.code == 2
    assert_one_clear_line(capsys.readouterr().err, message)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "package, flags", [("torchao", [FULL, "--full_bf16"]), ("prodigyopt", ["--optimizer=prodigy"])]
)
def test_optimizer_that_is_not_installed_is_named(package, flags, train, sdxl_script, tmp_path, capsys, monkeypatch):
    find_spec = sdxl_script.importlib.util.find_spec
    monkeypatch.setattr(
        sdxl_script.importlib.util,
        "find_spec",
        lambda name, *rest: find_spec(name, *rest) if name != package else None,
    )
    with pytest.raises(SystemExit):
        train(*flags, f"--output_dir={tmp_path / 'new'}")
    assert_one_clear_line(capsys.readouterr().err, f"needs {package}: pip install {package}")


def test_bfloat16_weights_on_several_gpus_are_refused(train, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        train(FULL, "--full_bf16", f"--output_dir={tmp_path / 'new'}")
    assert_one_clear_line(capsys.readouterr().err, "would drift apart: accelerate launch --num_processes=1")


def test_base_that_lacks_a_weight_is_refused(train, tiny_sdxl, tmp_path, capsys):
    base = copy_without_a_weight(tiny_sdxl, tmp_path / "base")
    with pytest.raises(SystemExit):
        train(f"--pretrained_model_name_or_path={base}", f"--output_dir={tmp_path / 'new'}")
    last = capsys.readouterr().err.splitlines(keepends=True)[-1]
    assert_one_clear_line(last, f"the unet of {base} lacks conv_in.bias")


OTHERS = {
    "lora": (["--train_text_encoder"], "was trained with no --train_text_encoder"),
    "custom_diffusion": (["--modifier_token=<new2>"], "with --modifier_token <new1>+<new2> (now <new2>)"),
}


@pytest.mark.parametrize("method", OTHERS)
def test_checkpoint_of_other_parts_is_refused(method, trained, train, flags_of, tmp_path, capsys):
    flags, message = OTHERS[method]
    resume = f"--resume_from_checkpoint={trained(method) / 'checkpoint-2'}"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        prior = [*PRIOR, f"--class_data_dir={trained(method).parent / 'class'}"]
        train(*flags_of(method), *FOUR_STEPS, *prior, *flags, resume, f"--output_dir={tmp_path / 'new'}")
    assert_one_clear_line(capsys.readouterr().err, message)
