# Runs diffusers' own training scripts, unedited, under the launcher, on tiny pipelines with random weights: does the
# penalty hold them, do they resume, does their result load and draw? Prints a row for each script.
#
#     python benchmarks/launcher.py PATH_OF_DIFFUSERS/examples [--scripts dreambooth_sd3 ...]
#
# Where torchvision is not installed, a copy of the script imports pil_transforms.py in its place.
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from conftest import make_text_config, make_tokenizer, make_vae  # noqa: E402
from pil_transforms import copy_script  # noqa: E402


SIZE = 32  # pixels
STEPS = 8
PROMPT = "a photo of sks dog"
DREAMBOOTH = [f"--instance_prompt={PROMPT}", f"--resolution={SIZE}", "--train_batch_size=1", "--lr_warmup_steps=0"]
DREAMBOOTH += ["--lr_scheduler=constant", "--instance_data_dir=photos"]
SHORT = [*DREAMBOOTH, "--max_sequence_length=16"]
IMAGES = [f"--resolution={SIZE}", "--train_batch_size=1", "--train_data_dir=captioned", "--caption_column=text"]
CUSTOM = [f"--resolution={SIZE}", "--train_batch_size=1", "--concepts_list=concepts.json", "--modifier_token=<new1>"]
CUSTOM += ["--no_safe_serialization"]

# Script, pipeline, weight, flags.
SCRIPTS = {
    "dreambooth_lora_sd3": ("dreambooth", "sd3", 1e4, [*SHORT, "--learning_rate=1e-2"]),
    "dreambooth_sd3": ("dreambooth", "sd3", 1e4, [*SHORT, "--learning_rate=1e-3"]),
    "dreambooth_lora_flux": ("dreambooth", "flux", 1e4, [*SHORT, "--learning_rate=1e-2"]),
    "dreambooth_flux": ("dreambooth", "flux", 1e4, [*SHORT, "--learning_rate=1e-3"]),
    "dreambooth_lora_sana": ("dreambooth", "sana", 1e4, [*DREAMBOOTH, "--learning_rate=1e-2"]),
    "dreambooth_lora_qwen_image": ("dreambooth", "qwen", 1e4, [*SHORT, "--learning_rate=1e-2"]),
    "text_to_image": ("text_to_image", "sd", 1e4, [*IMAGES, "--learning_rate=1e-4"]),
    "text_to_image_lora": ("text_to_image", "sd", 1e4, [*IMAGES, "--learning_rate=1e-2"]),
    "custom_diffusion": ("custom_diffusion", "sd", 1e4, [*CUSTOM, "--learning_rate=1e-3"]),
}


def make_clip(kind=CLIPTextModelWithProjection):
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 77
    return tokenizer, kind(make_text_config(tokenizer, projection_dim=16, max_position_embeddings=77))


def make_t5():
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((chr(c), -2.0) for c in range(97, 123))]
    tokenizer = T5Tokenizer(vocab=letters, extra_ids=0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": len(tokenizer)}
    return tokenizer, T5EncoderModel(T5Config(**sizes))


def make_sd3():
    (tokenizer, clip), (tokenizer_2, clip_2), (tokenizer_3, t5) = make_clip(), make_clip(), make_t5()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(shift_factor=0.06),
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=clip_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=t5,
        tokenizer_3=tokenizer_3,
    )


def make_flux():
    (tokenizer, clip), (tokenizer_2, t5) = make_clip(CLIPTextModel), make_t5()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8],
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=make_vae(shift_factor=0.06),
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=tokenizer_2,
    )


def make_sana():
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = GemmaTokenizer(vocab={token: index for index, token in enumerate(special)}, merges=[])
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
    )
    return SanaPipeline(tokenizer, Gemma2Model(Gemma2Config(**sizes)), vae, transformer,
                        FlowMatchEulerDiscreteScheduler(shift=3.0))  # fmt: skip


def make_qwen():
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    text["rope_scaling"] = {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    channels = 4
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=channels,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    return QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, encoder, tokenizer, transformer)


def make_pipeline(kind, folder):
    torch.manual_seed(0)
    if kind == "sd":
        shutil.copytree(ROOT / "examples" / "tinyworld" / "sd", folder)
        return
    {"sd3": make_sd3, "flux": make_flux, "sana": make_sana, "qwen": make_qwen}[kind]().save_pretrained(folder)


def make_data(folder):
    photos = sorted((ROOT / "examples" / "tinyworld" / "subjects" / "mug").glob("*.png"))
    for name in ("photos", "captioned"):
        folder.joinpath(name).mkdir()
        for photo in photos:
            Image.open(photo).convert("RGB").save(folder / name / f"{photo.stem}.png")
    rows = [{"file_name": f"{photo.stem}.png", "text": PROMPT} for photo in photos]
    folder.joinpath("captioned", "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    concept = {"instance_prompt": "photo of a <new1> mug", "instance_data_dir": "photos"}
    folder.joinpath("concepts.json").write_text(json.dumps([concept | {"class_prompt": "", "class_data_dir": ""}]))


def launch(script, folder, weight, flags):
    """Returns the distance from the base at the end, as the launcher prints it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--cpu", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", "-m", "lipschitz_reg.run"]
    command += [f"--lipschitz_weight={weight}", str(script), *flags, f"--max_train_steps={STEPS}", "--seed=0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{script.name}:\n{result.stdout[-1000:]}\n{result.stderr[-5000:]}")
    lines = [line for line in result.stderr.splitlines() if line.startswith("lipschitz_reg: ")]
    print("\n".join(lines), file=sys.stderr)
    return float(re.search(r"distance from the base ([\d.e+-]+)", lines[-1])[1])


def draws(pipeline_folder, output):
    """Whether plain diffusers calls draw with the result."""
    full = output / "model_index.json"
    source = output if full.exists() else pipeline_folder
    pipeline = DiffusionPipeline.from_pretrained(source, dtype=torch.float32)
    if not full.exists() and (custom := output / "pytorch_custom_diffusion_weights.bin").exists():
        pipeline.unet.load_attn_procs(output, weight_name=custom.name)
        pipeline.load_textual_inversion(output, weight_name="<new1>.bin")
    elif not full.exists():
        pipeline.load_lora_weights(output)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(PROMPT, num_inference_steps=2, height=SIZE, width=SIZE).images[0]
    return "yes" if image.size == (SIZE, SIZE) else "no"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("examples", type=Path, help="The folder `examples` of a checkout of diffusers.")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    args = parser.parse_args()
    print(
        "| script | distance, weight 1e-12 | weight | distance | resumed at half | draws |\n|---|---|---|---|---|---|"
    )
    for name in args.scripts:
        group, kind, weight, flags = SCRIPTS[name]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make_data(folder)
            make_pipeline(kind, folder / "base")
            script = copy_script(args.examples.absolute() / group / f"train_{name}.py", folder)
            flags = [*flags, "--pretrained_model_name_or_path=base", f"--checkpointing_steps={STEPS // 2}"]
            free = launch(script, folder, 1e-12, [*flags, "--output_dir=free"])
            held = launch(script, folder, weight, [*flags, "--output_dir=held"])
            half = f"checkpoint-{STEPS // 2}"
            shutil.copytree(folder / "held" / half, folder / "resumed" / half)
            more = ["--output_dir=resumed", "--resume_from_checkpoint=latest"]
            resumed = launch(script, folder, weight, [*flags, *more])
            drawn = draws(folder / "base", folder / "held")
        print(f"| {name} | {free:.3g} | {weight:g} | {held:.3g} | {resumed:.3g} | {drawn} |", flush=True)


if __name__ == "__main__":
    main()
