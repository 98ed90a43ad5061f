# Fixtures for the tests of the scripts: a tiny Stable Diffusion pipeline, an SDXL one and a few photos, made by code
# in seconds, and the scripts as modules. Holds no tests. Weights are random, images mean nothing: the tests are about
# how training behaves.
import importlib.util
import os
from pathlib import Path

import pytest


# Before anything imports the Hub's client, and for the subprocesses too: no test may wait for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Sums over one thread and over two differ in their last bits; some launchers set this and some do not.
os.environ["OMP_NUM_THREADS"] = "1"


def make_tokenizer(**special):
    """A tokenizer that spells: its words are the bytes, within and at the end of a word."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=32, **special)


def make_text_config(tokenizer, **options):
    from transformers import CLIPTextConfig

    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **options,
    }
    return CLIPTextConfig(**options)


def make_vae(**options):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        sample_size=16,
        **options,
    )


def make_unet(**options):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
        **options,
    )


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """
    Folder of a `StableDiffusionPipeline` in float32, with a safety checker as SD 1.5: 16 x 16 pixels, 4 x 8 x 8
    latents, about 0.1M parameters.
    """
    import torch
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text_encoder = CLIPTextModel(make_text_config(tokenizer))
    vae = make_vae()
    unet = make_unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    safety_checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config={**vision, "image_size": 16, "patch_size": 8}, projection_dim=8)
    )
    folder = tmp_path_factory.mktemp("tiny-sd")
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=safety_checker,
        feature_extractor=CLIPImageProcessor(size=16, crop_size=16),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """Folder of a `StableDiffusionXLPipeline` in float32: 16 x 16 pixels, 4 x 8 x 8 latents, about 0.1M parameters."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizers = make_tokenizer(), make_tokenizer(pad_token="!")
    # As SDXL was published: a wrong id of the end, by which the highest id of a prompt counts as its end.
    config = make_text_config(tokenizers[1], hidden_size=24, projection_dim=20, eos_token_id=2)
    unet = make_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=16 + 24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
        use_linear_projection=True,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    folder = tmp_path_factory.mktemp("tiny-sdxl")
    StableDiffusionXLPipeline(
        vae=make_vae(force_upcast=True),
        text_encoder=CLIPTextModel(make_text_config(tokenizers[0])),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=scheduler,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Folder of five photos of one subject: other sizes, formats and colour modes, and a README that is no image."""
    from PIL import Image, ImageDraw

    folder = tmp_path_factory.mktemp("photos")
    kinds = [("RGB", "0.jpg"), ("RGB", "1.png"), ("RGBA", "2.png"), ("L", "3.jpg"), ("RGB", "4.webp")]
    for index, (mode, name) in enumerate(kinds):
        image = Image.new(mode, (20 + 4 * index, 32 - 3 * index), "gray")
        ImageDraw.Draw(image).ellipse((2, 2, 12 + index, 14), fill="white")
        image.save(folder / name)
    folder.joinpath("README.txt").write_text("Where these photos come from.")
    return folder


@pytest.fixture(scope="session")
def one_device():
    """Bit for bit: on the CPU, even where there is a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


def load_script(name):
    path = Path(__file__).parents[1] / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_penalty(flags):
    """
    Flags of a training, as strings. What does not ask for another form of the penalty gets the paper's: by default the
    base would draw 64 prompts first.
    """
    flags = [*map(str, flags)]
    forms = ("--lipschitz_weight", "--lipschitz_layers", "--lipschitz_predictions", "--lipschitz_prompts_file")
    return (
        flags if any(flag.startswith((*forms, "--drift_budget")) for flag in flags) else ["--lipschitz_weight", *flags]
    )


def draw_quickly(pipeline, prompts, seeds):
    """In place of `generate` of the toy benchmark, in 2 steps for 25."""
    import torch

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(prompts, num_inference_steps=2, guidance_scale=4.0, generator=generators).images


def load_training_script(name):
    """The script as a module, that draws validation pictures in 3 steps for 25."""
    script = load_script(name)
    script.DRAWING_STEPS = 3
    return script


def runner(script):
    """Runs the script's `main` in this process; flags given later win."""
    from accelerate.state import AcceleratorState, GradientState

    def call(*flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        flags = with_penalty(flags) if hasattr(script, "WEIGHTS") else [*map(str, flags)]
        script.main(script.parse_args(flags))

    return call


@pytest.fixture(scope="session")
def script(one_device):
    """train_dreambooth_lipschitz.py as a module, to call what is in it, what logs too."""
    from accelerate import PartialState

    PartialState()
    return load_training_script("train_dreambooth_lipschitz.py")


@pytest.fixture(scope="session")
def run_script(script):
    return runner(script)


@pytest.fixture(scope="session")
def sdxl_script(one_device):
    """train_dreambooth_lipschitz_sdxl.py as a module, to call what is in it."""
    return load_training_script("train_dreambooth_lipschitz_sdxl.py")


@pytest.fixture(scope="session")
def run_sdxl_script(sdxl_script):
    return runner(sdxl_script)
