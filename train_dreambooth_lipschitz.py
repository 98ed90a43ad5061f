# DreamBooth for Stable Diffusion 1.x and 2.x with the Lipschitz penalty: full fine-tuning, LoRA or Custom Diffusion.
# Flags and outputs of diffusers' train_dreambooth.py and train_dreambooth_lora.py, less what serves DeepFloyd IF; new
# words as in train_custom_diffusion.py, photos and captions as in train_dreambooth_lora_sdxl.py. Holds no SDXL.
# `make style` copies what it shares to train_dreambooth_lipschitz_sdxl.py and evaluate_dreambooth.py.
"""
Teaches Stable Diffusion a subject from 3-6 photos, and keeps the rest of the model where it was, by a penalty that
began with "Preserve and Personalize" (arXiv 2505.19519, Algorithm 1):

    accelerate launch train_dreambooth_lipschitz.py \
        --pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --instance_data_dir=photos --instance_prompt="a photo of sks dog" --output_dir=sks-dog \
        --train_batch_size=1 --learning_rate=2e-6 --max_train_steps=1000

The base first draws prompts about other things. Training then holds its layers' outputs and its predictions there.
`--lipschitz_weight` alone holds its weights instead, as the paper does.
`--method` says which parameters train: `full` all of the U-Net, `lora` small matrices added to its attention,
`custom_diffusion` its cross-attention's keys and values, and new words.
`--lipschitz_weight=0` is plain DreamBooth; add `--with_prior_preservation` for the classic alternative.
`grep -i lipschitz` on this file shows the whole method.
"""

import argparse
import copy
import functools
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import pickle
import random
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn


# diffusers imports torchao, bitsandbytes and image processors of torchvision for what is not used here. What these say
# about themselves on the way is nothing that a user can act on; `python -W default` shows it.
if not sys.warnoptions:
    for name, message in {
        "torchao": "Failed to load",
        "torchao.kernel.intmm": "Detected no triton",
        "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
        "torch.utils._pytree": "is an Enum subclass and is now natively supported",
        "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
        "transformers.utils.import_utils": "requires torchvision (not installed)",
        # It lists no modules, and says so.
        "diffusers.models.modeling_utils": "that should be kept in float32: []",
    }.items():
        logging.getLogger(name).addFilter(lambda record, message=message: message not in record.getMessage())

import numpy as np
from huggingface_hub import create_repo, hf_hub_download
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.ImageOps import exif_transpose
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm


def build_logger() -> logging.Logger:
    """The logger of this file. One process speaks for all."""
    logger = logging.getLogger(__name__)
    logger.addFilter(lambda record: os.environ.get("RANK", "0") == "0")
    return logger


logger = build_logger()

# What this script trains, in the words that it shares with its sibling.
PIPELINE = "StableDiffusionPipeline"
FAMILY, TAG = "Stable Diffusion", "stable-diffusion"
SIBLINGS = {"StableDiffusionXLPipeline": "train_dreambooth_lipschitz_sdxl.py"}
TEXT_ENCODERS = ["text_encoder"]
RESOLUTION = 512
# Of diffusers' scripts. The first method is the default.
DEFAULTS = {
    "full": {"learning_rate": 5e-6, "output_dir": "dreambooth-model"},
    "lora": {"learning_rate": 5e-4, "output_dir": "lora-dreambooth-model"},
    "custom_diffusion": {"learning_rate": 1e-5, "output_dir": "custom-diffusion-model"},
}
# Weights of the flags that are given without a number. For the distance of parameters they are the authors', but that
# for LoRA; all others were found on the toy benchmark (docs/methods.md).
WEIGHTS = {
    "full": {"lipschitz_weight": 500.0, "lipschitz_layers": 4.0, "lipschitz_predictions": 1.0},
    "lora": {"lipschitz_weight": 1.0, "lipschitz_layers": 0.05, "lipschitz_predictions": 1.0},
    "custom_diffusion": {"lipschitz_weight": 175.0, "lipschitz_layers": 0.08, "lipschitz_predictions": 1.0},
}
# Of AdamW where there is no penalty.
WEIGHT_DECAY = 1e-2
METHOD_FLAGS = {
    "lora": ["rank", "lora_alpha", "lora_dropout", "use_dora", "output_kohya_format", "lipschitz_lora"],
    "custom_diffusion": ["modifier_token", "initializer_token"],
}
# The names of accelerate, each of the package that it needs.
TRACKERS = ["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]
# Packages that only these flags need.
PACKAGES = {"method=lora": "peft", "dataset_name": "datasets", "use_8bit_adam": "bitsandbytes"}
# The names of the models in files of kohya's trainer.
KOHYA_NAMES = {"unet": "lora_unet", "text_encoder": "lora_te"}

PRECISIONS = {"no": "float32", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
LORA_TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
    **dict.fromkeys(TEXT_ENCODERS, ["q_proj", "k_proj", "v_proj", "out_proj"]),
}
LORA_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"
KEYS_VALUES_FILE, TOKENS_FILE = "custom_diffusion.safetensors", "learned_embeds.safetensors"
# Folders of a pipeline.
PARTS = ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler", "safety_checker"]
PARTS += ["feature_extractor", "image_encoder"]
# These words mark a result of this script, and a class image that it drew; there the prompt follows them.
CARD_WORDS, CLASS_COMMENT = "personalized by DreamBooth", "Drawn for DreamBooth: "
# In a checkpoint: what it was trained with, and since when.
SETTINGS_FILE = "settings.json"
# What may differ when a run is resumed: paths, logging, speed, and what is changed on purpose, such as the number of
# steps. Behind the paths, photos, captions and the base are compared.
FREE_TO_CHANGE = {
    *["pretrained_model_name_or_path", "revision", "variant", "pretrained_config", "tokenizer_name"],
    *["pretrained_vae_model_name_or_path", "lipschitz_anchor_model", "instance_data_dir", "dataset_name"],
    *["dataset_config_name", "image_column", "caption_column", "cache_dir", "concepts_list", "class_data_dir"],
    *["lipschitz_recording", "lipschitz_prompts_file", "drift_budget", "output_dir", "resume_from_checkpoint"],
    *["dataloader_num_workers", "sample_batch_size"],
    *["prior_generation_precision", "num_train_epochs", "max_train_steps", "lr_warmup_steps", "checkpointing_steps"],
    *["checkpoints_total_limit", "lipschitz_anchor_device", "set_grads_to_none", "gradient_checkpointing"],
    *["enable_xformers_memory_efficient_attention", "allow_tf32", "compile", "validation_prompt"],
    *["num_validation_images", "validation_steps", "validation_epochs", "validation_scheduler", "drift_every"],
    *["report_to", "logging_dir", "push_to_hub", "hub_token", "hub_model_id", "output_kohya_format"],
}
# Steps whose losses are read from the device together, as reading waits for it.
READ_EVERY = 10
# Raised when files are missing, broken or of another model.
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
INTERPOLATION = {mode.name.lower(): mode for mode in Image.Resampling}
# Twice as many pixels are refused: 536 million, which cameras do not have yet.
Image.MAX_IMAGE_PIXELS = 1 << 28
# Photos from phones. Pillow needs another package to read them.
HEIF_SUFFIXES = {".heic", ".heif", ".hif"}
THINGS = [
    *["a dog", "a cat", "a horse", "a bird", "a woman with grey hair", "a man with a beard", "a child", "an old car"],
    *["a bicycle", "a boat", "a house", "a castle", "a bowl of fruit", "a teapot", "a vase of flowers", "boots"],
]
PLACES = [
    *["on the grass", "in the snow", "at night", "by the sea", "in a busy street", "in front of a brick wall"],
    *["in a forest", "at sunset"],
]
# What should stay as it is, unless --lipschitz_prompts_file says otherwise. None of them names a subject. Every second
# one is held out, and only measures drift.
PROMPTS = [
    f"{kind} {thing} {PLACES[(index + 2 * number) % len(PLACES)]}"
    for index, thing in enumerate(THINGS)
    for number, kind in enumerate(["a photo of", "a photo of", "a painting of", "a drawing of"])
]
# Enough to meet all noise levels.
RECORDED_STEPS = 10
DRAWING_STEPS = 25  # of a validation picture
SCALED_IMAGES = 256  # that are cropped at random and kept: about 1 GB at 1024 pixels


def stop(message: str | Exception) -> NoReturn:
    """Ends the run because of a mistake that its user can mend: one line on stderr for all processes, exit code 2."""
    for bar in list(getattr(tqdm, "_instances", [])):  # or the message would follow the bar on its line
        bar.close()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        line = " ".join(str(message).split())
        line = line if len(line) <= 1000 else f"{line[:1000]} ..."  # libraries name each of a thousand tensors
        print(f"{Path(__file__).name}: error: {line}", file=sys.stderr)
    sys.exit(2)


def warn(message: str) -> None:
    """Prints a one-line warning about a likely mistake, before there is a logger."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{Path(__file__).name}: warning: {message}", file=sys.stderr)


class DefaultsFormatter(argparse.HelpFormatter):
    """Adds the default to a help text that does not tell it."""

    def _get_help_string(self, action):
        # By identity: 0 is a default, and equal to False.
        none = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        if none or "default" in action.help.lower():
            return action.help
        return f"{action.help.rstrip('.')}; default: %(default)s."


class OneLineParser(argparse.ArgumentParser):
    """Reports a bad argument without repeating the whole usage."""

    def __init__(self, **options):
        super().__init__(usage="%(prog)s [options]", formatter_class=DefaultsFormatter, **options)

    def error(self, message):
        stop(message)


def number(convert, minimum, exclusive=False, below=math.inf):
    """An argparse type: a finite number that is at least, or `exclusive`ly above, the minimum, and `below` a limit."""

    def parse(text):
        value = convert(text)
        if not minimum <= value < below or (exclusive and value == minimum):  # NaN is neither
            bound = f"above {minimum}" if exclusive else f"at least {minimum}"
            bound += f" and below {below}" if math.isfinite(below) else ""
            raise argparse.ArgumentTypeError(f"must be a finite number {bound}, not {text}")
        return value

    # argparse names the type by this when `convert` itself fails.
    parse.__name__ = convert.__name__
    return parse


positive_int, count = number(int, 1), number(int, 0)
non_negative, positive, share = number(float, 0), number(float, 0, exclusive=True), number(float, 0, below=1)
user_path = os.path.expanduser  # bash leaves the ~ of --flag=~/folder as it is


def defaults_of(name: str) -> str:
    """The default of a flag for each method, for its help."""
    defaults = DEFAULTS if name in next(iter(DEFAULTS.values())) else WEIGHTS
    return ", ".join(f"{values[name]:g} for {method}" for method, values in defaults.items())


def add_model_arguments(parser: argparse.ArgumentParser) -> Callable:
    add = parser.add_argument_group("base model").add_argument
    add(
        "--pretrained_model_name_or_path",
        required=True,
        type=user_path,
        help=f"{FAMILY} pipeline: a folder, a name on the Hub, or one file, .safetensors or .ckpt.",
    )
    add("--revision", help="Git revision of the pipeline on the Hub.")
    add("--variant", help="Variant of the weight files, such as fp16; training is in float32 all the same.")
    add(
        "--pretrained_config",
        type=user_path,
        help="For a base in one file: a pipeline of the same kind (a folder or a name on the Hub) that gives tokenizer"
        " and configuration; default: the model on the Hub that the file was made from.",
    )
    return add


def add_method_arguments(parser: argparse.ArgumentParser) -> Callable:
    add = parser.add_argument_group("method").add_argument
    add(
        "--method",
        choices=list(DEFAULTS),
        default=next(iter(DEFAULTS)),
        help="What is trained. full: all weights. lora: small matrices added to attention weights."
        " custom_diffusion: keys and values of cross-attention, and the embeddings of --modifier_token. Default:"
        " %(default)s.",
    )
    add("--rank", type=positive_int, help="lora: rank of the added matrices; default: 4.")
    add("--lora_alpha", type=positive_int, help="lora: added matrices are scaled by this / rank; default: the rank.")
    add("--lora_dropout", type=share, help="lora: dropout on the inputs of the added matrices; default: 0.")
    add(
        "--use_dora",
        action="store_true",
        help="lora: train the magnitude and the direction of each weight row separately.",
    )
    add(
        "--output_kohya_format",
        action="store_true",
        help="lora: also save the result under kohya's key names, for programs other than diffusers.",
    )
    add("--modifier_token", help='custom_diffusion: new words, one for each subject: "<new1>+<new2>".')
    add(
        "--initializer_token",
        help="custom_diffusion: words whose embeddings the new words start from; default: ktn+pll+ucd.",
    )
    return add


def add_subject_arguments(parser: argparse.ArgumentParser) -> Callable:
    add = parser.add_argument_group("subject").add_argument
    add(
        "--instance_data_dir",
        type=user_path,
        help="Folder with the photos of the subject. A text file beside a photo, 1.txt for 1.jpg, is its caption.",
    )
    add(
        "--instance_prompt",
        help='What the photos show, with a rare word as name: "a photo of sks dog". Photos without captions use it.',
    )
    add(
        "--dataset_name",
        type=user_path,
        help="Photos that may have captions, instead of --instance_data_dir: a data set on the Hub, or a folder with"
        " photos and a metadata.jsonl with lines like"
        ' {"file_name": "1.jpg", "text": "a photo of sks dog in the snow"}. The split named train is read, or the only'
        " one.",
    )
    add("--dataset_config_name", help="Configuration of the data set, if it has several.")
    add("--image_column", default="image", help="The data set's column of photos (for a folder, image).")
    add(
        "--caption_column",
        help="The data set's column of captions; in the example above, text. A photo's caption is its prompt. Photos"
        " without one use --instance_prompt; without this flag, all photos do.",
    )
    add("--cache_dir", type=user_path, help="Folder for the downloaded data set.")
    add(
        "--concepts_list",
        type=user_path,
        help="Several subjects instead of one: a JSON list of objects with instance_data_dir and instance_prompt;"
        " for prior preservation, also class_data_dir and class_prompt.",
    )
    add(
        "--resolution",
        type=positive_int,
        default=RESOLUTION,
        help="Side of the square training images, in pixels; default: %(default)s.",
    )
    add(
        "--center_crop",
        action="store_true",
        help="Crop the central square of each image; without this flag, a random one each time.",
    )
    add("--random_flip", action="store_true", help="Mirror images left to right at random, anew each time.")
    add(
        "--image_interpolation_mode",
        choices=list(INTERPOLATION),
        default="lanczos",
        help="How images are scaled to the resolution.",
    )
    add("--repeats", type=positive_int, default=1, help="How often each photo is used in an epoch.")
    add("--dataloader_num_workers", type=count, default=0, help="Processes that read images; 0: the main one.")
    return add


def add_lipschitz_arguments(parser: argparse.ArgumentParser) -> Callable:
    add = parser.add_argument_group(
        "Lipschitz penalty",
        "If none of --lipschitz_weight, --lipschitz_layers and --lipschitz_predictions is given, the last two are on.",
    ).add_argument
    for name, what in {
        "weight": "how far weights have moved, as in the paper (arXiv 2505.19519). Alone, 0 is plain DreamBooth",
        "layers": "how much the outputs of layers change, on recorded inputs",
        "predictions": "how much the denoiser's predictions change, on recorded calls; each step repeats one",
    }.items():
        add(
            f"--lipschitz_{name}",
            type=non_negative,
            nargs="?",
            const=True,
            metavar="WEIGHT",
            help=f"Penalize {what}. Without a number the weight is {defaults_of(f'lipschitz_{name}')}.",
        )
    add(
        "--lipschitz_reduction",
        choices=["sum", "tensor_mean", "mean"],
        default="tensor_mean",
        help="How squared distances are summed. tensor_mean (the default, and what the default weights are for): each"
        " divided by the size of its tensor. sum: as they are. mean: divided by the size of the model.",
    )
    add(
        "--lipschitz_mode",
        choices=["coupled", "proximal", "projected"],
        default="coupled",
        help="coupled: the penalty's gradient is added to the loss's, as in the paper. proximal: a pull after each"
        " optimizer step, not rescaled by Adam. projected: no pull, but a bound on the distance, --lipschitz_radius.",
    )
    add(
        "--lipschitz_radius", type=positive, help="Largest L2 distance from the pretrained weights, in projected mode."
    )
    add(
        "--lipschitz_anchor_device",
        choices=["cpu"],
        help="cpu: keep the pretrained weights in host memory and copy them at each step: slower, less GPU memory.",
    )
    add(
        "--lipschitz_anchor_model",
        type=user_path,
        help=f"{FAMILY} pipeline to stay close to: a folder or a name on the Hub. If the base was personalized before,"
        " name its original here, so that drift does not add up; default: the base itself.",
    )
    add(
        "--lipschitz_lora",
        choices=["delta", "factors"],
        help="lora: penalize what is added to the weights (delta, the default), or its two factors separately"
        " (factors: the authors' way, with their weight of 1e-7 and --lipschitz_reduction sum).",
    )
    add(
        "--drift_budget",
        type=positive,
        help="The largest change of predictions that you accept, such as 0.05 for 5%%, on prompts that do not name the"
        " subject. What training changes beyond it is taken back at the end.",
    )
    add(
        "--lipschitz_recording",
        type=user_path,
        help="A recording of the base, made by `python -m lipschitz_reg.record` or by another run, which writes"
        " recording-*.safetensors into its --output_dir; default: the base is recorded before training.",
    )
    add(
        "--lipschitz_prompts_file",
        type=user_path,
        help="Prompts whose pictures should stay as they are, one per line; none of them should name the subject."
        f" Every second one only measures drift, and is drawn in fewer steps than the {RECORDED_STEPS} of the others."
        f" Default: {len(PROMPTS)} prompts about everyday things.",
    )
    return add


def add_prior_arguments(parser: argparse.ArgumentParser) -> Callable:
    add = parser.add_argument_group("prior preservation").add_argument
    add("--with_prior_preservation", action="store_true", help="Train on images of the subject's class too.")
    add(
        "--class_data_dir",
        type=user_path,
        help="Folder of class images. The base model draws those that are missing.",
    )
    add("--class_prompt", help='What the class images show: "a photo of dog".')
    add("--num_class_images", type=positive_int, default=100, help="Class images to train on.")
    add("--prior_loss_weight", type=non_negative, default=1.0, help="Weight of the class images in the loss.")
    add("--sample_batch_size", type=positive_int, default=4, help="Class images drawn at a time, per process.")
    add(
        "--prior_generation_precision",
        choices=list(PRECISIONS),
        help="Precision for drawing class images; default: fp16 on CUDA, else fp32.",
    )
    return add


def add_training_arguments(parser: argparse.ArgumentParser) -> Callable:
    add = parser.add_argument_group("training").add_argument
    add(
        "--output_dir",
        type=user_path,
        help="Folder for the result, checkpoints and logs; default: "
        + ", ".join(f"{values['output_dir']} for {method}" for method, values in DEFAULTS.items())
        + ".",
    )
    add("--seed", type=number(int, 0, below=2**32), help="Makes a run repeatable; on a GPU, up to rounding.")
    add("--train_text_encoder", action="store_true", help="Also train and penalize the text encoder; in SDXL, both.")
    add("--train_batch_size", type=positive_int, default=4, help="Photos in a batch, per process.")
    add(
        "--gradient_accumulation_steps",
        type=positive_int,
        default=1,
        help="Batches per optimizer step; the last step of an epoch may have fewer.",
    )
    add("--num_train_epochs", type=positive_int, default=1, help="Passes over the images.")
    add("--max_train_steps", type=positive_int, help="Optimizer steps; overrides --num_train_epochs.")
    add("--checkpointing_steps", type=positive_int, default=500, help="Optimizer steps between checkpoints.")
    add("--checkpoints_total_limit", type=positive_int, help="Checkpoints to keep; older ones are deleted.")
    add(
        "--resume_from_checkpoint",
        type=user_path,
        help='A checkpoint folder, or "latest" for the last one of the newest run in --output_dir. Photos, prompts and'
        " settings must be those of that run; the penalty still pulls to the pretrained model.",
    )
    add("--snr_gamma", type=positive, help="Min-SNR weighting of each sample's loss; 5.0 is usual.")
    return add


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> Callable:
    add = parser.add_argument_group("optimizer").add_argument
    add(
        "--learning_rate",
        type=non_negative,
        help=f"Peak learning rate; default: {defaults_of('learning_rate')}.",
    )
    add("--scale_lr", action="store_true", help="Multiply the rate by processes, accumulation steps and batch size.")
    schedules = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
    add("--lr_scheduler", choices=schedules, default="constant", help="How the learning rate changes.")
    add(
        "--lr_warmup_steps",
        type=count,
        help="Steps in which the learning rate rises, in all schedules but constant; default: 500, or half of the"
        " training steps if that is less.",
    )
    add("--lr_num_cycles", type=positive_int, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=non_negative, default=1.0, help="Exponent of the polynomial schedule.")
    add("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes; its state takes a quarter of the memory.")
    add("--adam_beta1", type=share, default=0.9, help="Decay of the mean of gradients.")
    add("--adam_beta2", type=share, default=0.999, help="Decay of the mean of their squares.")
    add(
        "--adam_weight_decay",
        type=non_negative,
        help=f"Weight decay, a pull towards zero; default: {WEIGHT_DECAY:g}, or 0 with the Lipschitz penalty, which"
        " pulls towards the pretrained weights instead.",
    )
    add("--adam_epsilon", type=positive, default=1e-8, help="Added to Adam's denominator.")
    add(
        "--max_grad_norm",
        type=non_negative,
        default=1.0,
        help="Norm to which gradients of the denoising loss are clipped; 0 turns clipping off.",
    )
    return add


def add_memory_arguments(parser: argparse.ArgumentParser) -> Callable:
    add = parser.add_argument_group("memory and speed").add_argument
    add("--gradient_checkpointing", action="store_true", help="Less memory for activations, slower steps.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Precision to compute in; default: accelerate's.")
    add(
        "--enable_xformers_memory_efficient_attention",
        action="store_true",
        help="Attention of xformers instead of PyTorch's own; CUDA only.",
    )
    add("--allow_tf32", action="store_true", help="Faster, less precise float32 products; CUDA only.")
    add("--compile", action="store_true", help="torch.compile the U-Net's transformer blocks. The first step is slow.")
    return add


def add_logging_arguments(parser: argparse.ArgumentParser) -> Callable:
    add = parser.add_argument_group("validation, logging, Hub").add_argument
    add("--validation_prompt", help="Draw images of this prompt during training and at its end.")
    add("--num_validation_images", type=positive_int, default=4, help="Images drawn each time.")
    add(
        "--drift_every",
        type=positive_int,
        help="Optimizer steps between measurements of drift; default: never. It logs drift/prediction,"
        " the mean relative change of predictions on held-out prompts; drift/guided_prediction, the same for what the"
        " sampler gets; with the penalty, drift/lipschitz_constant, the largest change divided by lipschitz/distance;"
        " and drift/seconds. Drift is measured from --lipschitz_anchor_model, if given. Measuring does not change"
        " training.",
    )
    add(
        "--report_to",
        default="tensorboard",
        help='Where to log: "tensorboard", "wandb", "comet_ml", "all" that are installed, or "none".',
    )
    add("--logging_dir", type=user_path, default="logs", help="Folder of the logs, inside --output_dir.")
    add("--push_to_hub", action="store_true", help="Upload the result.")
    add("--hub_token", help="Token for the upload; better, log in with `hf auth login`.")
    add("--hub_model_id", help="Repository to upload to; by default named after --output_dir.")
    return add


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description="DreamBooth for Stable Diffusion 1.x and 2.x with the Lipschitz penalty.")
    add = add_model_arguments(parser)
    add("--tokenizer_name", type=user_path, help="Folder or Hub name of a tokenizer to use instead of the pipeline's.")
    add_method_arguments(parser)
    add_subject_arguments(parser)
    add_lipschitz_arguments(parser)
    add_prior_arguments(parser)
    add = add_training_arguments(parser)
    add("--offset_noise", action="store_true", help="Add noise that is constant over an image, for its brightness.")
    add = add_optimizer_arguments(parser)
    add(
        "--set_grads_to_none",
        action="store_true",
        help="Does nothing: gradients are always freed between steps. Kept because diffusers' script has this flag.",
    )
    add_memory_arguments(parser)
    add = add_logging_arguments(parser)
    add("--validation_steps", type=positive_int, default=100, help="Optimizer steps between validations.")
    add("--validation_epochs", type=positive_int, help="Epochs between validations, instead of --validation_steps.")
    samplers = ["DPMSolverMultistepScheduler", "DDPMScheduler"]
    add(
        "--validation_scheduler",
        choices=samplers,
        default=samplers[0],
        help="Scheduler that draws the validation images, in 25 steps.",
    )

    args = parser.parse_args(input_args)
    check_method(args, parser.error)
    check_spaces(args, parser.error)
    for name, value in DEFAULTS[args.method].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.adam_weight_decay is None:
        args.adam_weight_decay = 0.0 if is_penalized(args) else WEIGHT_DECAY
    check_arguments(args, parser.error)
    return args


def check_arguments(args: argparse.Namespace, error: Callable[[str], NoReturn]) -> None:
    """Refuses flags that do not go together, whatever the method."""
    if (args.lipschitz_mode == "projected") != (args.lipschitz_radius is not None):
        error("--lipschitz_mode projected and --lipschitz_radius need each other")
    if args.concepts_list is not None:
        for flag in ("instance_data_dir", "dataset_name", "instance_prompt", "class_data_dir", "class_prompt"):
            if getattr(args, flag) is not None:
                error(f"--concepts_list has photos and prompts of its own: leave out --{flag}")
    elif args.instance_data_dir is None and args.dataset_name is None:
        error("--instance_data_dir is needed, or --dataset_name, or --concepts_list")
    elif args.instance_data_dir is not None and args.dataset_name is not None:
        error("--instance_data_dir and --dataset_name both give photos: leave out one")
    elif not (args.instance_prompt or "").strip():
        error("--instance_prompt is needed, what the photos show")
    elif args.with_prior_preservation:
        if args.class_data_dir is None:
            error("--with_prior_preservation needs --class_data_dir, a folder for the class images")
        if args.class_prompt is None:
            error("--with_prior_preservation needs --class_prompt, what the class images show")
    elif args.class_data_dir is not None or args.class_prompt is not None:
        warn("--class_data_dir and --class_prompt do nothing without --with_prior_preservation")
    for flag in ("dataset_config_name", "caption_column"):
        if getattr(args, flag) is not None and args.dataset_name is None:
            error(f"--{flag} is about a data set: add --dataset_name")
    for flag in ("lipschitz_prompts_file", "lipschitz_recording"):
        if getattr(args, flag) is not None and not needs_recording(args):
            error(f"--{flag} needs --drift_budget, --lipschitz_layers, --lipschitz_predictions or --drift_every")
    if args.lipschitz_prompts_file is not None and args.lipschitz_recording is not None:
        error("--lipschitz_recording has its prompts already: leave out --lipschitz_prompts_file")
    if args.drift_budget is not None and not is_penalized(args):
        error("--drift_budget needs a penalty: leave out --lipschitz_weight 0")
    if args.lr_scheduler == "polynomial" and args.learning_rate <= 1e-7:
        error("--lr_scheduler polynomial ends at a rate of 1e-7: --learning_rate must be above it")
    if args.learning_rate == 0:
        warn("--learning_rate 0 trains nothing")
    if args.with_prior_preservation and args.prior_loss_weight == 0:
        warn("--prior_loss_weight 0 draws class images and does not train on them")
    if args.hub_token is not None and args.report_to in ("wandb", "all"):
        error("--hub_token would be logged by wandb, for all to read: log in with `hf auth login` instead")


def check_method(args: argparse.Namespace, error: Callable[[str], NoReturn]) -> None:
    """Refuses flags that the method does not have, and fills in those that it has."""
    for method, names in METHOD_FLAGS.items():
        for name in names:
            if getattr(args, name) is not None and getattr(args, name) is not False and args.method != method:
                error(f"--{name} is for --method {method}, not for --method {args.method}")

    if args.method == "lora":
        args.rank = args.rank or 4
        args.lora_alpha = args.lora_alpha or args.rank
        args.lora_dropout = args.lora_dropout or 0.0
        args.lipschitz_lora = args.lipschitz_lora or "delta"
        if args.output_kohya_format and args.use_dora:
            error(
                "--output_kohya_format does not work with --use_dora, which other programs read differently: leave out"
                " one"
            )
        if args.lipschitz_lora == "delta" and args.lipschitz_mode == "proximal":
            error("--lipschitz_mode proximal has no closed form for LoRA: use coupled, or --lipschitz_lora factors")
    if args.method == "custom_diffusion":
        if args.train_text_encoder:
            error("--method custom_diffusion trains new words, not text encoders: leave out --train_text_encoder")
        if args.modifier_token is None and args.initializer_token is not None:
            error("--initializer_token needs --modifier_token, the new words that begin with it")
        if args.modifier_token is not None:
            args.initializer_token = args.initializer_token or "ktn+pll+ucd"
            tokens, initializers = args.modifier_token.split("+"), args.initializer_token.split("+")
            if "" in map(str.strip, tokens + initializers) or len(set(tokens)) < len(tokens):
                error('--modifier_token and --initializer_token: words joined by "+", none of them empty or twice')
            if len(initializers) < len(tokens):
                error(f"--initializer_token has {len(initializers)} words, for {len(tokens)} of --modifier_token")
    if args.lipschitz_anchor_model is not None:
        if args.lipschitz_weight == 0 and not (args.lipschitz_layers or args.lipschitz_predictions):
            error("--lipschitz_anchor_model does nothing with --lipschitz_weight 0")
        if args.method == "lora" and (
            args.use_dora or args.lipschitz_lora == "factors" or args.lipschitz_mode != "coupled"
        ):
            error(
                "--lipschitz_anchor_model and --method lora need --lipschitz_mode coupled and --lipschitz_lora delta,"
                " and do without --use_dora"
            )


def check_spaces(args: argparse.Namespace, error: Callable[[str], NoReturn]) -> None:
    """Fills in the weights of spaces, and refuses what they do not go with."""
    names = list(WEIGHTS[args.method])
    if args.lipschitz_weight is None and not (args.lipschitz_layers or args.lipschitz_predictions):
        # What only the paper's form has asks for it.
        papers = args.lipschitz_mode != "coupled" or args.lipschitz_lora == "factors"
        papers = papers or args.lipschitz_reduction != "tensor_mean"
        for name in names:
            if getattr(args, name) is None:  # not turned off
                setattr(args, name, papers == (name == "lipschitz_weight"))
    for name in names:
        weight = getattr(args, name) or 0.0
        if weight is True and name != "lipschitz_predictions" and args.lipschitz_reduction != "tensor_mean":
            error(f"--{name} has a default weight only for --lipschitz_reduction tensor_mean: give it a number")
        setattr(args, name, WEIGHTS[args.method][name] if weight is True else weight)
    if args.lipschitz_layers and (args.lipschitz_mode != "coupled" or args.lipschitz_lora == "factors"):
        error("--lipschitz_layers needs --lipschitz_mode coupled, and --lipschitz_lora delta")
    usual = WEIGHTS[args.method]["lipschitz_layers"]
    if args.lipschitz_reduction == "tensor_mean" and args.lipschitz_layers >= 20 * usual:
        warn(
            f"--lipschitz_layers {args.lipschitz_layers:g} is {args.lipschitz_layers / usual:.0f} times the default:"
            " its weights are on another scale than those of --lipschitz_weight"
        )


def is_penalized(args: argparse.Namespace) -> bool:
    return bool(args.lipschitz_weight or args.lipschitz_layers or args.lipschitz_predictions)


def needs_recording(args: argparse.Namespace) -> bool:
    asks = (args.lipschitz_layers, args.lipschitz_predictions, args.drift_budget, args.drift_every)
    return any(asks)


def read_text(flag: str, path: str | Path) -> str:
    """What is in a text file, UTF-8 with or without a byte-order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        stop(f"{flag}: cannot read {path}: {error}")


class Concept(NamedTuple):
    instance_data_dir: str | None
    instance_prompt: str
    class_data_dir: str | None
    class_prompt: str | None


def read_concepts(args: argparse.Namespace) -> list[Concept]:
    """The subjects: that of the flags, or those of `concepts_list`."""
    rows = [vars(args)]
    if args.concepts_list is not None:
        try:
            rows = json.loads(read_text("--concepts_list", args.concepts_list))
        except ValueError as error:
            stop(f"--concepts_list: cannot read {args.concepts_list}: {error}")
        needed = Concept._fields if args.with_prior_preservation else Concept._fields[:2]
        if not rows or not isinstance(rows, list):
            stop(f"--concepts_list: {args.concepts_list} is not a list of concepts")
        for index, row in enumerate(rows):
            texts = [name for name in needed if isinstance(row, dict) and isinstance(row.get(name), str)]
            missing = [name for name in needed if name not in texts or not row[name].strip()]
            if missing:
                stop(f"--concepts_list: concept {index} of {args.concepts_list} lacks {', '.join(missing)}")
            for name in ("instance_data_dir", "class_data_dir"):
                if isinstance(row.get(name), str):
                    row[name] = user_path(row[name])
    concepts = [Concept(*(row.get(name) for name in Concept._fields)) for row in rows]
    prompts = {}  # by folder
    for concept in concepts if args.with_prior_preservation else []:
        first = prompts.setdefault(os.path.realpath(concept.class_data_dir), concept.class_prompt)
        if first != concept.class_prompt:
            stop(
                f"--concepts_list: class images of {first!r} and of {concept.class_prompt!r} would both be in"
                f" {concept.class_data_dir}: give each class_prompt a class_data_dir of its own"
            )
    return concepts


class Example(NamedTuple):
    """An image to train on, a file or what is in one, and its prompt."""

    image: Path | bytes
    prompt: str


@functools.cache
def register_heif() -> bool:
    """Lets Pillow read photos from phones, if pillow-heif is installed. Returns whether it is."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    import pillow_heif

    pillow_heif.register_heif_opener()
    return True


@functools.lru_cache(maxsize=16)
def to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    """From the colours of a profile to sRGB. Raises `PyCMSError` or `OSError` if it is of another mode, or broken."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


class RangeError(ValueError):
    """The numbers of an image have no range that could be shown."""


def open_image(source: Path | bytes) -> Image.Image:
    """
    The image as a viewer shows it: upright, in sRGB, over white where it is transparent. Raises `RangeError` if its
    numbers have no range that could be shown, and what Pillow raises if it is broken.
    """
    register_heif()
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
        kind, profile, transparent = file.format, file.info.get("icc_profile"), file.has_transparency_data
        image = exif_transpose(file)
    alpha = None
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)
        if "transparency" in image.info:
            alpha = Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise RangeError(f"its pixel values ({image.mode}, {kind}) have no defined range: save it with 8 or 16 bits")
    elif transparent:
        alpha = image.convert("RGBA").getchannel("A")
        image = image.convert("L" if image.mode in ("L", "LA", "La") else "RGB")
    elif image.mode in ("1", "P", "PA"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    try:
        image = ImageCms.applyTransform(image, to_srgb(profile, image.mode)) if profile else image.convert("RGB")
    except (ImageCms.PyCMSError, OSError):  # broken, or for another kind of image: viewers show it without
        image = image.convert("RGB")
    return image if alpha is None else Image.composite(image, Image.new("RGB", image.size, "white"), alpha)


def fault_of(source: Path | bytes) -> str | None:
    """What is wrong with an image, or `None` if it can be shown."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            open_image(source)
    except Image.DecompressionBombError:
        return f"has more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} megapixels: scale it down"
    except UnidentifiedImageError:
        is_path = isinstance(source, Path)
        if not register_heif() and (source.suffix.lower() in HEIF_SUFFIXES if is_path else source[4:8] == b"ftyp"):
            return "is a HEIC photo, which needs pillow-heif: pip install pillow-heif"
        return "is not an image" if (source.stat().st_size if is_path else source) else "is empty"
    except Exception as error:  # Pillow's decoders raise almost anything
        return f"cannot be shown, {error}" if isinstance(error, RangeError) else f"is broken: {error}"
    return None


def check_images(flag: str, sources: dict[str, Path | bytes]) -> None:
    """Stops unless all of these images can be shown; names those that cannot."""
    faults = {name: fault_of(source) for name, source in sources.items()}
    if any(faults.values()):
        stop(f"{flag}: {'; '.join(f'{name} {fault}' for name, fault in faults.items() if fault)}")


def find_images(flag: str, folder: str | Path) -> list[Path]:
    """
    The images of a folder, sorted by name and known to open. Other things in it are named in a warning, once, but for
    text files of an image's name, which may be captions, and what file managers leave behind.
    """
    folder = Path(folder)
    if folder.is_file():
        stop(f"{flag}: {folder} is a file, not a folder")
    if not folder.is_dir():
        stop(f"{flag}: there is no folder {folder}")
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN} | HEIF_SUFFIXES
    images, others = [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in ("thumbs.db", "desktop.ini"):
            continue
        (images if path.is_file() and path.suffix.lower() in suffixes else others).append(path)
    check_images(flag, {str(path): path for path in images})
    captions = {path.with_suffix(".txt") for path in images}
    others = [path.name for path in others if path not in captions]
    if others:
        logger.warning(f"{flag}: ignored, because they are not images: {', '.join(others)}")
    return images


def read_captions(flag: str, images: list[Path], prompt: str) -> list[Example]:
    """The images, each with what is in the text file of its name, or else with the prompt."""
    texts = {image: image.with_suffix(".txt") for image in images}
    captions = {image: read_text(flag, text).strip() for image, text in texts.items() if text.is_file()}
    captions = {image: " ".join(caption.split()) for image, caption in captions.items() if caption}
    if captions:
        logger.info(f"{flag}: {len(captions)} of {len(images)} photos have a caption of their own, in a text file.")
    return [Example(image, captions.get(image, prompt)) for image in images]


def read_dataset(args: argparse.Namespace) -> list[Example]:
    """The photos of `dataset_name`, known to open, each with its caption or else the instance prompt."""
    import datasets

    datasets.disable_progress_bars()
    name = args.dataset_name
    try:
        parts = datasets.load_dataset(name, args.dataset_config_name, cache_dir=args.cache_dir)
    except Exception as error:  # as many kinds as there are formats and ways to fail on a network
        place = "" if os.path.isdir(name) else "there is no such folder, and from the Hub: "
        stop(f"--dataset_name: cannot load {name}: {place}{error}")
    if "train" not in parts and len(parts) > 1:
        stop(f"--dataset_name: {name} has no split train, only {', '.join(parts)}")
    # A split gets its name from whatever is in a path: photos below a folder "test" are the split test.
    dataset = parts["train"] if "train" in parts else next(iter(parts.values()))
    columns = {flag: getattr(args, flag) for flag in ("image_column", "caption_column") if getattr(args, flag)}
    for flag, column in columns.items():
        if column not in dataset.column_names:
            stop(f"--{flag}: {name} has no column {column}; it has {', '.join(dataset.column_names)}")
    if not isinstance(dataset.features[args.image_column], datasets.Image):
        stop(f"--image_column: {args.image_column} of {name} holds no images")
    texts = [key for key, feature in dataset.features.items() if getattr(feature, "dtype", None) == "string"]
    if texts and args.caption_column is None:
        logger.warning(
            f"--dataset_name: captions in {', '.join(texts)} are not used; to use them, add --caption_column"
            f" {texts[0]}"
        )
    # Files as they are: the data set would decode each one anew, and cannot say which is broken.
    dataset = dataset.select_columns(list(set(columns.values())))
    dataset = dataset.cast_column(args.image_column, datasets.Image(decode=False))
    examples, sources = [], {}
    for number, row in enumerate(dataset):
        file, caption = row[args.image_column], row.get(args.caption_column)
        if file is None:
            stop(f"--image_column: row {number} of {name} has no image")
        source, label = file["bytes"] or Path(file["path"]), file["path"] or f"row {number} of {name}"
        sources[f"{label} (row {number})" if label in sources else label] = source  # names may come twice
        if caption is not None and not isinstance(caption, str):
            stop(f"--caption_column: that of {label} is {caption!r}, which is no text")
        examples.append(Example(source, (caption or "").strip() or args.instance_prompt))
    check_images("--dataset_name", sources)
    return examples


def find_examples(args: argparse.Namespace, concepts: list[Concept]) -> tuple[list[list[Example]], list[list[Path]]]:
    """The photos of each concept with their prompts, and the class images that it has already."""
    photos, class_images = [], []
    for concept in concepts:
        flags = ["--concepts_list"] * 2 if args.concepts_list else ["--instance_data_dir", "--class_data_dir"]
        if args.dataset_name is not None:
            photos.append(read_dataset(args))
        else:
            paths = find_images(flags[0], concept.instance_data_dir)
            if not paths:
                stop(f"{flags[0]}: there is no image in {concept.instance_data_dir}")
            photos.append(read_captions(flags[0], paths, concept.instance_prompt))
        found = args.with_prior_preservation and os.path.exists(concept.class_data_dir)
        class_images.append(find_images(flags[1], concept.class_data_dir) if found else [])
        check_class_prompt(flags[1], concept, class_images[-1])
        warn_of_small_photos(args, photos[-1])
    prompts = distinct_prompts(photos)
    for token in args.modifier_token.split("+") if args.modifier_token else []:
        if not any(token in prompt for prompt in prompts):
            stop(f"--modifier_token: {token} is in no prompt of a photo, so that it would not be learned")
    return photos, class_images


def warn_of_small_photos(args: argparse.Namespace, photos: list[Example]) -> None:
    """Names the photos that are less than half as large as they are trained."""
    small = []
    for photo in photos:
        with Image.open(io.BytesIO(photo.image) if isinstance(photo.image, bytes) else photo.image) as image:
            if min(image.size) < args.resolution / 2:
                name = photo.image.name if isinstance(photo.image, Path) else "one of the data set"
                small.append(f"{name} ({image.width} x {image.height})")
    if small:
        logger.warning(f"Photos smaller than half of --resolution {args.resolution} train blurred: {', '.join(small)}")


def check_class_prompt(flag: str, concept: Concept, class_images: list[Path]) -> None:
    """Warns of class images that a run like this one drew, for another prompt: it is in their comment."""
    others = {}
    for path in class_images:
        with Image.open(path) as image:
            comment = image.info.get("comment", b"")
        prompt = comment.decode("utf-8", errors="replace") if isinstance(comment, bytes) else comment
        if prompt.startswith(CLASS_COMMENT) and prompt != CLASS_COMMENT + concept.class_prompt:
            others.setdefault(prompt.removeprefix(CLASS_COMMENT), []).append(path)
    for prompt, paths in others.items():
        logger.warning(
            f"{flag}: {len(paths)} images in {concept.class_data_dir} were drawn for the prompt {prompt!r}, not for"
            f" {concept.class_prompt!r}: choose another folder to draw new ones"
        )


def distinct_prompts(examples: list[list[Example]]) -> list[str]:
    return list(dict.fromkeys(example.prompt for group in examples for example in group))


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts that should stay as they are; every second one is held out."""
    if args.lipschitz_prompts_file is None:
        return PROMPTS
    lines = read_text("--lipschitz_prompts_file", args.lipschitz_prompts_file).splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    twice = next((prompt for prompt in prompts if prompts.count(prompt) > 1), None)
    if twice is not None:
        stop(f"--lipschitz_prompts_file: {twice!r} is there twice, and would be both recorded and held out")
    if len(prompts) < 2:
        stop(f"--lipschitz_prompts_file: {args.lipschitz_prompts_file} holds fewer than two prompts")
    return prompts


def describe_run(
    args: argparse.Namespace, concepts: list[Concept], photos: list[list[Example]], prompts: list[str]
) -> dict[str, Any]:
    """What makes a run what it is: the settings that change the result, and what it learns from, as JSON holds it."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    if args.with_prior_preservation:
        settings["class_prompt"] = [concept.class_prompt for concept in concepts]
    if needs_recording(args) and args.lipschitz_recording is None:
        settings["lipschitz_prompts_file"] = prompts
    digest, own = hashlib.sha256(), {concept.instance_prompt for concept in concepts}
    for image, _ in itertools.chain(*photos):
        data = image if isinstance(image, bytes) else image.read_bytes()
        digest.update(f"{len(data)}\n".encode())
        digest.update(data)
    captions = [prompt for _, prompt in itertools.chain(*photos) if prompt not in own]
    settings["photos"] = digest.hexdigest()
    settings["captions"] = hashlib.sha256(json.dumps(captions).encode()).hexdigest()
    return json.loads(json.dumps(settings))


def read_settings(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` knew of the run; nothing where it did not write it, or something else is there."""
    try:
        return dict(json.loads(Path(checkpoint, SETTINGS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def check_settings(checkpoint: Path | None, settings: dict[str, Any]) -> None:
    """Stops unless the checkpoint is of a run with these settings. Those that it does not know are not compared."""
    saved, differences = read_settings(checkpoint) if checkpoint else {}, []
    words = {"photos": "other photos", "captions": "other captions", "base": "another base model"}
    words |= {"recording": "another recording", "engine": f"{saved.get('engine')} as its engine"}
    for name in [name for name in settings if name in saved and saved[name] != settings[name]]:
        was, now = saved[name], settings[name]
        if isinstance(was, list) and isinstance(now, list):
            was, now = next(pair for pair in itertools.zip_longest(was, now) if pair[0] != pair[1])
        if isinstance(was, bool):
            differences.append(f"--{name}" if was else f"no --{name}")
        else:
            differences.append(words.get(name, f"--{name} {was} (now {now})"))
    if differences:
        stop(
            f"--resume_from_checkpoint: {checkpoint} was trained with {', '.join(differences[:3])}: use the"
            " same, or leave out --resume_from_checkpoint to start afresh"
        )


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders `checkpoint-<step>` of all runs: those of a run that began later are later, then by step."""
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output_dir).glob("checkpoint-*")}
    found = [path for path in steps if steps[path]]
    return sorted(found, key=lambda path: (read_settings(path).get("began", 0.0), int(steps[path][1])))


def locate_checkpoint(args: argparse.Namespace) -> Path | None:
    """The folder to resume from. There may be none yet of which it could be the latest."""
    if args.resume_from_checkpoint in (None, "latest"):
        return next(reversed(list_checkpoints(args.output_dir)), None) if args.resume_from_checkpoint else None
    places = [Path(args.output_dir, args.resume_from_checkpoint), Path(args.resume_from_checkpoint)]
    checkpoint = next((place for place in places if place.is_dir()), None)
    if checkpoint is None:
        stop(f"--resume_from_checkpoint: there is no folder {' and no '.join(map(str, dict.fromkeys(places)))}")
    if checkpoint not in list_checkpoints(checkpoint.parent):
        stop(f"--resume_from_checkpoint: {checkpoint} is not named checkpoint-<step>")
    return checkpoint


def check_recording(flag: str, path: str | Path) -> None:
    """Stops unless the file is a recording, by its header."""
    try:
        with safe_open(path, framework="np") as file:  # torch is imported later
            known = "recording" in (file.metadata() or {})
    except (OSError, SafetensorError) as error:
        how = "" if flag == "--lipschitz_recording" else "; name it with --lipschitz_recording"
        stop(f"{flag}: cannot read the recording {path}: {error}{how}")
    if not known:
        stop(f"{flag}: {path} is not a recording: make one with python -m lipschitz_reg.record")


def read_index(args: argparse.Namespace, flag: str) -> dict[str, Any]:
    """The index of a pipeline, the first file to be downloaded; of a base in one file that of its configuration."""
    source, index = getattr(args, flag[2:]), "model_index.json"
    revision = args.revision if source == args.pretrained_model_name_or_path else None
    if os.path.isfile(source):
        check_single_file(flag, source)
        source, revision = args.pretrained_config, None
        if source is None:
            return {"_class_name": PIPELINE}
        flag = "--pretrained_config"
    try:
        path = Path(source, index) if os.path.isdir(source) else hf_hub_download(source, index, revision=revision)
        parts = json.loads(Path(path).read_text(encoding="utf-8"))
        return {**parts, "_class_name": parts["_class_name"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = str(error) if os.path.isdir(source) else f"there is no such folder, and from the Hub: {error}"
        if any(Path(source, name).is_file() for name in (LORA_FILE, KEYS_VALUES_FILE)):
            why = "it holds what goes onto a base, not a base"
        stop(f"{flag}: found no {FAMILY} pipeline at {source}: {why}")


def check_single_file(flag: str, source: str) -> None:
    """Stops unless the file may be a model with all of its parts."""
    if Path(source).suffix not in (".safetensors", ".ckpt"):
        stop(f"{flag}: {source} is not a model: give a folder, a name on the Hub, or a .safetensors or .ckpt file")
    if Path(source).suffix == ".safetensors":
        try:
            with safe_open(source, framework="np") as file:
                keys = list(file.keys())
        except LOAD_ERRORS as error:
            stop(f"{flag}: {source} is broken: {error}")
        if not any(key.startswith("model.diffusion_model.") for key in keys):
            what = "a LoRA" if any("lora" in key for key in keys) else "one of its parts"
            stop(f"{flag}: {source} is not a whole model, perhaps {what}: give the file of a whole model, or a folder")


def check_base(args: argparse.Namespace, flag: str = "--pretrained_model_name_or_path") -> dict[str, Any]:
    """Stops unless it is a pipeline that can be trained here. Reads only its index, and returns it."""
    source, parts = getattr(args, flag[2:]), read_index(args, flag)
    if parts["_class_name"] != PIPELINE:
        sibling = SIBLINGS.get(parts["_class_name"])
        other = f": use {sibling}" if sibling else ""
        stop(f"{flag}: {source} is a {parts['_class_name']}, not a {PIPELINE}{other}")
    needed = ["unet", "vae", "scheduler", *TEXT_ENCODERS]
    lacking = [name for name in needed if name in parts and not (parts[name] and parts[name][0])]
    if lacking:
        stop(f"{flag}: {source} has no {' and no '.join(lacking)}, so that it cannot be trained here")
    return parts


def check_scheduler(args: argparse.Namespace, parts: dict[str, Any]) -> None:
    """Stops if the base was trained in another way than those that are known here."""
    if "EDM" in str(parts.get("scheduler")):
        base = args.pretrained_model_name_or_path
        stop(f"--pretrained_model_name_or_path: {base} has a scheduler of EDM, which is not trained here")


def check_apart(
    written: list[tuple[str, str | None]], read: list[tuple[str, str | None, Iterable[str]]], names: Iterable[str] = ()
) -> None:
    """
    Stops if what is written would stand among what is read, or take its place, whatever the folders are called.

    Args:
        written: Flag and folder.
        read: Flag, folder or file, and the names below it that are read besides what is in it; "*" for all.
        names: What is written below the first folder; a name that ends in "-" is the beginning of several.
    """
    for (flag, target), (other, source, below) in itertools.product(written, read):
        # A model that is not there is one on the Hub. Several subjects may share class images.
        if target is None or source is None or flag == other or not (os.path.exists(source) or target == source):
            continue
        target, source = Path(os.path.realpath(target)), Path(os.path.realpath(source))
        stands_in = target == source
        if source in target.parents:
            stands_in = "*" in below or target.relative_to(source).parts[0] in below
        if (flag, target) == (written[0][0], Path(os.path.realpath(written[0][1]))) and target in source.parents:
            first = source.relative_to(target).parts[0]
            stands_in = any(first.startswith(name) if name.endswith("-") else first == name for name in names)
        if stands_in:
            stop(f"{flag}: writing to {target} would change what {other} reads: choose another folder")


def check_folders(args: argparse.Namespace, concepts: list[Concept]) -> None:
    """Stops if the run would write into what it reads, or over what no run like this one wrote."""
    photos, classes = "--instance_data_dir", "--class_data_dir"
    if args.concepts_list:
        photos, classes = "--concepts_list, instance_data_dir", "--concepts_list, class_data_dir"
    models = ["pretrained_model_name_or_path", "pretrained_config", "pretrained_vae_model_name_or_path"]
    models += ["tokenizer_name", "lipschitz_anchor_model"]
    read = [(f"--{name}", getattr(args, name, None), PARTS) for name in models]
    read += [("--dataset_name", args.dataset_name, ["*"])]
    written = [("--output_dir", args.output_dir), ("--cache_dir", args.cache_dir)]
    for concept in concepts:
        read.append((photos, concept.instance_data_dir, []))
        if args.with_prior_preservation:
            written.append((classes, concept.class_data_dir))
            read.append((classes, concept.class_data_dir, []))
    check_apart(written, read, [*PARTS, *Path(args.logging_dir).parts[:1], "checkpoint-", "tmp-"])
    check_result(Path(args.output_dir))


def check_result(output_dir: Path) -> None:
    """Stops if there is what a run would replace and none like it wrote. Says so if it is to replace a result."""
    card = output_dir / "README.md"
    own = card.is_file() and CARD_WORDS in card.read_text(encoding="utf-8", errors="replace")
    names = [card.name, "model_index.json", LORA_FILE, KOHYA_FILE, KEYS_VALUES_FILE, TOKENS_FILE, *PARTS]
    found = [name for name in names if (output_dir / name).exists() and not own]
    found += [path.name for path in list_checkpoints(output_dir) if not read_settings(path)]
    if found:
        stop(f"--output_dir: {output_dir} holds {found[0]}, which these scripts did not write: choose another folder")
    if own:
        logger.warning(f"--output_dir: the result in {output_dir} will be replaced when this run is done.")


def check_writable(flag: str, folder: str) -> None:
    """Stops unless the folder can be written to, or made. Makes nothing."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        stop(f"{flag}: cannot write to {place}: choose another folder")


def check_packages(args: argparse.Namespace) -> None:
    """Stops unless the packages are installed that the arguments ask for."""
    asked = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if asked and importlib.util.find_spec("deepspeed") is None:
        stop("accelerate's configuration asks for DeepSpeed: pip install 'deepspeed>=0.19.8'")
    if args.report_to not in (*TRACKERS, "all", "none"):
        stop(f"--report_to: must be {', '.join(TRACKERS)}, all or none, not {args.report_to!r}")
    own = {f"report_to={args.report_to}": args.report_to} if args.report_to in TRACKERS else {}
    for flag, package in (PACKAGES | own).items():
        name, _, value = flag.partition("=")
        given = getattr(args, name)
        if given and value in ("", given) and importlib.util.find_spec(package) is None:
            stop(f"--{flag} needs {package}: pip install {package}")


class Inputs(NamedTuple):
    """What a run learns from, and the prompts that should stay as they are."""

    concepts: list[Concept]
    photos: list[list[Example]]
    class_images: list[list[Path]]
    preserved: list[str]


def check_inputs(args: argparse.Namespace) -> Inputs:
    """Finds what can be wrong with the arguments before anything is written or loaded."""
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    check_packages(args)
    concepts = read_concepts(args)
    args.instance_prompt = "; ".join(concept.instance_prompt for concept in concepts)  # in logs and model card
    check_writable("--output_dir", args.output_dir)
    locate_checkpoint(args)
    if args.lipschitz_recording and needs_recording(args):
        check_recording("--lipschitz_recording", args.lipschitz_recording)
    check_folders(args, concepts)
    check_scheduler(args, check_base(args))
    if args.lipschitz_anchor_model is not None:
        check_base(args, "--lipschitz_anchor_model")
    photos, class_images = find_examples(args, concepts)
    for concept, images in zip(concepts, class_images if args.with_prior_preservation else []):
        if len(images) < args.num_class_images:
            check_writable("--concepts_list" if args.concepts_list else "--class_data_dir", concept.class_data_dir)
    return Inputs(concepts, photos, class_images, read_prompts(args))


# A user hears of mistakes before the imports that take seconds.
if __name__ == "__main__":
    try:
        ARGS = parse_args()
        INPUTS = check_inputs(ARGS)
    except KeyboardInterrupt:  # nothing has been done yet
        sys.exit(130)

import diffusers
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
)
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_scheduler
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from diffusers.training_utils import compute_snr
from diffusers.utils import check_min_version, is_torch_version, is_xformers_available
from huggingface_hub import ModelCard, ModelCardData, upload_folder
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lipschitz_reg import (
    Drift,
    LipschitzRegularizer,
    Recording,
    draw_held_out,
    find_lora_adapters,
    record_pipeline,
)
from lipschitz_reg.anchors import fingerprint
from lipschitz_reg.budget import fit_share


# The first release in which pipelines take `dtype`.
check_min_version("0.40.0")

Pipeline = StableDiffusionPipeline
NoiseScheduler = DDPMScheduler
# While one process draws pictures or uploads the result, the others wait. NCCL would give up after ten minutes.
PATIENCE = timedelta(hours=6)


def accelerator_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"mixed_precision": args.mixed_precision, "kwargs_handlers": [InitProcessGroupKwargs(timeout=PATIENCE)]}


def check_processes(accelerator: Accelerator) -> None:
    """On a CPU, accelerate needs a variable that torchrun does not set: without it, each runs as the only one."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > accelerator.num_processes:
        stop(f"these {processes} processes do not find each other: start them by accelerate launch, not by torchrun")


def sharding_engine(accelerator: Accelerator) -> str | None:
    """What shards the weights or the optimizer's state."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO {accelerator.state.deepspeed_plugin.zero_stage}"
    return "FSDP2" if accelerator.is_fsdp2 else None


def check_engine(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Stops where several processes share the weights out in a way in which this script cannot train."""
    engine, name = accelerator.distributed_type.value, sharding_engine(accelerator)
    if engine in ("FSDP", "MEGATRON_LM") and name is None:
        name = "FSDP1" if engine == "FSDP" else engine
        stop(f"{name} is not supported here: use FSDP2 (fsdp_version: 2 in accelerate's configuration) or plain DDP")
    if name is None:
        return
    if accelerator.mixed_precision == "fp16":
        stop(f"--mixed_precision fp16 is not supported with {name}: use bf16 or no")
    for flag in ("compile", "use_8bit_adam", "lipschitz_anchor_model"):
        if getattr(args, flag):
            stop(f"--{flag} is not supported with {name}: leave it out, or use DDP")
    if getattr(args, "optimizer", "adamw") == "prodigy":  # each process would find a rate of its own
        stop(f"--optimizer prodigy is not supported with {name}: use adamw, or DDP")
    for flag in ("train_text_encoder", "modifier_token"):
        if getattr(args, flag):
            stop(f"--{flag}: with {name}, accelerate trains one model only: leave this flag out, or use DDP")
    if name != "FSDP2":
        set_deepspeed(args, accelerator)
    # Otherwise transformers loads weights in one process only, even for models that are not sharded.
    elif accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        stop("FSDP2 needs fsdp_cpu_ram_efficient_loading: false in accelerate's configuration")


def set_deepspeed(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Gives DeepSpeed what the arguments say; it accumulates, clips and steps by its own configuration."""
    plugin = accelerator.state.deepspeed_plugin
    if not plugin.zero_stage:
        stop("DeepSpeed without ZeRO is not supported here: zero_stage 1 to 3 in accelerate's configuration, or DDP")
    if args.drift_budget is not None:
        stop("--drift_budget is not supported with DeepSpeed, which keeps a second copy of the weights: use FSDP2")
    if plugin.zero_stage == 3 and args.lipschitz_predictions:
        stop(
            "--lipschitz_predictions is not supported with ZeRO 3: give --lipschitz_layers alone, or use zero_stage 2"
        )
    if plugin.offload_param_device not in (None, "none"):
        stop("DeepSpeed's offload_param is not supported here: offload_optimizer is")
    given = [name for name in ("optimizer", "scheduler") if name in plugin.deepspeed_config]
    if given:
        stop(f"DeepSpeed's configuration has its own {given[0]}: leave it out, this script builds one")
    transformers.integrations.unset_hf_deepspeed_config()  # by it, ZeRO 3 would share out frozen text encoders, too
    zero = plugin.deepspeed_config["zero_optimization"]
    for key in [key for key, value in zero.items() if value == "auto"]:
        del zero[key]  # accelerate would fill it in by a `hidden_size`, which a U-Net has not
    samples = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": args.train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "train_batch_size": samples,
        "gradient_clipping": args.max_grad_norm,
        "zero_force_ds_cpu_optimizer": False,  # with offloading, PyTorch's optimizer steps on the CPU
    }


def check_compile(accelerator: Accelerator) -> None:
    """Stops if torch.compile does not work on this machine, by a function of one operation."""
    if not is_torch_version(">=", "2.6"):
        stop("--compile needs PyTorch 2.6 or later: pip install -U torch")
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=accelerator.device))
    except Exception as error:  # raised by the platform, Triton or the C++ compiler, with different types
        stop(f"--compile: torch.compile does not work here: {(str(error).strip() or repr(error)).splitlines()[0]}")


def compile_blocks(unet: torch.nn.Module) -> None:
    """Compiles each transformer block, not the whole U-Net: equal blocks share compiled code, which is quicker."""
    # All widths, train and eval mode, and all batch sizes count towards one limit. Past it, blocks run uncompiled.
    torch._dynamo.config.cache_size_limit = 64
    unet.compile_repeated_blocks()


def build_accelerator(args: argparse.Namespace) -> Accelerator:
    """The `Accelerator`, once it is certain that this machine can do what the arguments ask for."""
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(
                project_dir=args.output_dir, logging_dir=os.path.join(args.output_dir, args.logging_dir)
            ),
            dataloader_config=DataLoaderConfiguration(non_blocking=True),
            **accelerator_options(args),
        )
    except ValueError as error:
        stop(f"--report_to: {error}" if "logging" in str(error) else error)
    check_processes(accelerator)
    check_engine(args, accelerator)
    # accelerate lets this pass, and trains in float32.
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        stop("--mixed_precision fp16 needs a GPU: use bf16 or no on a CPU")
    if args.allow_tf32 and accelerator.device.type != "cuda":
        stop(f"--allow_tf32 needs a CUDA GPU, this is {accelerator.device.type}: leave it out")
    if args.enable_xformers_memory_efficient_attention:
        if accelerator.device.type != "cuda":
            stop(
                f"--enable_xformers_memory_efficient_attention needs a CUDA GPU, this is {accelerator.device.type}:"
                " leave it out, PyTorch has memory-efficient attention of its own"
            )
        if not is_xformers_available():
            stop("--enable_xformers_memory_efficient_attention needs xformers: pip install xformers")

    if args.compile:
        check_compile(accelerator)

    for library in (transformers, diffusers):
        library.utils.logging.disable_progress_bar()
        if not accelerator.is_main_process:
            library.utils.logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator


def find_checkpoint(args: argparse.Namespace, accelerator: Accelerator, settings: dict[str, Any]) -> Path | None:
    """The complete checkpoint to resume from, of a run with these settings, or `None` to start afresh."""
    checkpoint = locate_checkpoint(args)
    if checkpoint is None:
        if args.resume_from_checkpoint:
            accelerator.print(f"No checkpoint in {args.output_dir} to resume from: training starts afresh.")
        return None

    check_settings(checkpoint, settings)
    needed = [SETTINGS_FILE, "optimizer.bin", "scheduler.bin", "random_states_0.pkl"]
    needed += ["custom_checkpoint_0.pkl"] if is_penalized(args) else []
    if args.method == "full":
        needed += ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
        if args.train_text_encoder:
            needed += [f"{name}/{file}" for name in TEXT_ENCODERS for file in ("config.json", "model.safetensors")]
    elif args.method == "lora":
        needed += [LORA_FILE]
    else:
        needed += [KEYS_VALUES_FILE, TOKENS_FILE] if args.modifier_token else [KEYS_VALUES_FILE]
    if sharding_engine(accelerator):  # accelerate names the files of weights and optimizer
        needed = [SETTINGS_FILE, "scheduler.bin", "random_states_0.pkl"]
    missing = [name for name in needed if not Path(checkpoint, name).is_file()]
    if missing:
        stop(f"--resume_from_checkpoint: {checkpoint} is incomplete, it lacks {', '.join(missing)}")
    processes = len(list(checkpoint.glob("random_states_*.pkl")))
    if processes != accelerator.num_processes:
        how = f"{processes} processes, not {accelerator.num_processes}: accelerate launch --num_processes={processes}"
        stop(f"--resume_from_checkpoint: {checkpoint} was saved by a run with {how}")
    return checkpoint


def create_hub_repository(args: argparse.Namespace) -> str:
    """Creates the repository to push to, if there is none, before hours go into training. Returns its full name."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return create_repo(name, exist_ok=True, token=args.hub_token).repo_id
    except Exception as error:  # no connection, no login, no right, no valid name: each of another kind
        stop(f"--push_to_hub: cannot create {name} on the Hub: {error}")


def base_options(args: argparse.Namespace, flag: str, dtypes: dict[str, torch.dtype]) -> dict[str, Any]:
    """What to load the base with: without safety checker, and with another tokenizer if asked for."""
    options = {"safety_checker": None, "requires_safety_checker": False}
    if args.tokenizer_name and getattr(args, flag[2:]) == args.pretrained_model_name_or_path:
        try:
            options["tokenizer"] = AutoTokenizer.from_pretrained(args.tokenizer_name, revision=args.revision)
        except LOAD_ERRORS as error:
            stop(f"--tokenizer_name: cannot load {args.tokenizer_name}: {error}")
    return options


def add_result_parts(args: argparse.Namespace, pipeline: Pipeline) -> None:
    """Adds the base's safety checker, which only the result needs. Where it is missing, the result has none."""
    source, name = args.pretrained_model_name_or_path, "safety_checker"
    parts = {} if os.path.isfile(source) else read_index(args, "--pretrained_model_name_or_path")
    if parts.get(name, [None])[0] is None:
        return
    options = {"revision": args.revision, "variant": args.variant, "dtype": torch.float32}
    try:
        checker = StableDiffusionSafetyChecker.from_pretrained(source, subfolder=name, **options)
    except LOAD_ERRORS:
        logger.warning(f"{source} names a safety checker that cannot be loaded: the result will have none.")
        return
    pipeline.register_modules(safety_checker=checker)
    pipeline.register_to_config(requires_safety_checker=parts.get("requires_safety_checker", True))


def load_text_encoder(source: str, name: str, kind: list[str], **options) -> dict[str, torch.nn.Module]:
    """
    A text encoder of a pipeline by its name, if its index says that it is one of transformers'. Raises `ValueError` if
    its file lacks a weight: transformers would only warn, and take random numbers.
    """
    loader = getattr(transformers, kind[1], None)
    if loader is None:
        return {}
    options |= {"subfolder": name, "output_loading_info": True}
    try:
        model, info = loader.from_pretrained(source, **options)
    except OSError:
        if options.get("variant") is None:
            raise
        # As for a whole pipeline: parts without the variant are loaded without it.
        model, info = loader.from_pretrained(source, **options | {"variant": None})
    if info["missing_keys"]:
        lacking = min(info["missing_keys"])
        raise ValueError(f"its {name} lacks {lacking}: its file is incomplete or of another version")
    return {name: model}


def dtype_of(part: str, dtypes: dict[str, torch.dtype]) -> torch.dtype:
    return dtypes.get(part, dtypes["default"])


def load_pipeline(
    args: argparse.Namespace,
    flag: str = "--pretrained_model_name_or_path",
    dtypes: dict[str, torch.dtype] | None = None,
    **options,
) -> Pipeline:
    """The base in the dtypes given for its parts by name ("default": all other parts), whatever its files hold."""
    source, given, dtypes = getattr(args, flag[2:]), options.keys(), dtypes or {"default": torch.float32}
    options = {**base_options(args, flag, dtypes), **options}
    try:
        if os.path.isfile(source):
            pipeline = Pipeline.from_single_file(source, config=args.pretrained_config, **options)  # in float32
            for name, part in pipeline.components.items():
                own = dtype_of(name, dtypes)
                if isinstance(part, torch.nn.Module) and name not in given and own != torch.float32:
                    part.to(own)
        else:
            files = {}
            if source == args.pretrained_model_name_or_path:
                files = {"revision": args.revision, "variant": args.variant}
            parts = read_index(args, flag)
            for name in [name for name in TEXT_ENCODERS if name not in options]:
                options |= load_text_encoder(source, name, parts[name], dtype=dtype_of(name, dtypes), **files)
            pipeline = Pipeline.from_pretrained(source, dtype=dtypes, **files, **options)
    except LOAD_ERRORS as error:
        more = ""
        if os.path.isfile(source) and args.pretrained_config is None:
            more = " (name a pipeline folder of its kind with --pretrained_config)"
        stop(f"{flag}: cannot load {source}: {error}{more}")
    for part, module in pipeline.components.items():
        loaded = isinstance(module, torch.nn.Module) and part not in given
        weights = module.named_parameters() if loaded else []
        lacking = [name for name, weight in weights if weight.is_meta]
        if lacking:
            stop(f"{flag}: the {part} of {source} lacks {lacking[0]}: its file is incomplete or of another version")
    channels, latent = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if channels != latent:
        stop(
            f"{flag}: the U-Net of {source} takes {channels} channels, not {latent}: it is for inpainting or another"
            " task, not text-to-image, and cannot be trained here"
        )
    # Images go through it one by one: in float32 at 1024 pixels, each takes gigabytes.
    pipeline.vae.enable_slicing()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_class_images(
    args: argparse.Namespace, accelerator: Accelerator, concept: Concept, images: list[Path]
) -> list[Path]:
    """As many class images as asked for: those in `class_data_dir`, and by the base those that are missing."""
    folder, missing = Path(concept.class_data_dir), args.num_class_images - len(images)
    if missing <= 0:
        return images[: args.num_class_images]

    accelerator.wait_for_everyone()
    logger.info(f"Drawing {missing} class images.")
    taken = {path.name.split("-")[0] for path in images}
    indices = list(itertools.islice((i for i in itertools.count() if str(i) not in taken), missing))
    default = "fp16" if accelerator.device.type == "cuda" else "fp32"
    dtype = getattr(torch, PRECISIONS[args.prior_generation_precision or default])
    pipeline = load_pipeline(args, dtypes={"default": dtype})
    pipeline.to(accelerator.device)
    folder.mkdir(parents=True, exist_ok=True)
    with accelerator.split_between_processes(indices) as own:
        batches = [own[i : i + args.sample_batch_size] for i in range(0, len(own), args.sample_batch_size)]
        for batch in tqdm(batches, desc="Class images", disable=not accelerator.is_main_process):
            # A seed for each image, not for each process: no image comes twice, and drawing can stop and go on.
            generators = None
            if args.seed is not None:
                generators = [torch.Generator().manual_seed(args.seed + index) for index in batch]
            drawn = pipeline([concept.class_prompt] * len(batch), generator=generators).images
            for index, image in zip(batch, drawn):
                name = f"{index}-{hashlib.sha1(image.tobytes(), usedforsecurity=False).hexdigest()}.jpg"
                image.save(folder / f".{name}", comment=f"{CLASS_COMMENT}{concept.class_prompt}".encode())
                os.replace(folder / f".{name}", folder / name)
    accelerator.wait_for_everyone()
    # As a resumed run will find them.
    return sorted(images + [path for index in indices for path in folder.glob(f"{index}-*.jpg")])


class NewTokenEmbedding(torch.nn.Module):
    """
    A token embedding with rows for new tokens, those from `first` on. They are a parameter of their own, `new`, so
    that no other row can change.
    """

    def __init__(self, embedding, first, new):
        super().__init__()
        self.embedding = embedding
        self.first = first
        self.new = torch.nn.Parameter(new)

    def forward(self, tokens):
        is_new = tokens >= self.first
        old = self.embedding(tokens.masked_fill(is_new, 0))
        new = F.embedding((tokens - self.first).clamp(min=0), self.new)
        return torch.where(is_new.unsqueeze(-1), new.to(old.dtype), old)


def is_new_token(name: str) -> bool:
    """Whether a parameter of the text encoder is the `new` of a `NewTokenEmbedding`."""
    return name.endswith("token_embedding.new")


def tokenizers_of(pipeline: Pipeline) -> list[PreTrainedTokenizerBase]:
    """Those of `TEXT_ENCODERS`."""
    return [getattr(pipeline, name.replace("text_encoder", "tokenizer")) for name in TEXT_ENCODERS]


def text_encoders_of(pipeline: Pipeline) -> list[torch.nn.Module]:
    return [getattr(pipeline, name) for name in TEXT_ENCODERS]


def add_tokens(args: argparse.Namespace, pipeline: Pipeline) -> None:
    """Teaches tokenizers and text encoders the new tokens, which begin as the mean of their initializer's tokens."""
    for tokenizer, text_encoder in zip(tokenizers_of(pipeline), text_encoders_of(pipeline)):
        embedding = text_encoder.get_input_embeddings()
        ids, rows = [], []
        for token, initializer in zip(args.modifier_token.split("+"), args.initializer_token.split("+")):
            rows.append(embedding.weight[tokenizer.encode(initializer, add_special_tokens=False)].detach().mean(0))
            known = token in tokenizer.get_vocab()
            tokenizer.add_tokens(token)
            ids += tokenizer.encode(token, add_special_tokens=False)
            if known or len(ids) != len(rows):
                stop(f"--modifier_token: {token} is not a new word for the base's tokenizer: choose another")
        text_encoder.set_input_embeddings(NewTokenEmbedding(embedding, ids[0], torch.stack(rows)))
        # Text encoders of SD and SDXL were published with a wrong id of the end of a prompt, for which they take the
        # highest id to be the end: a new word, and SDXL's embedding of a prompt would not know what comes after it.
        getattr(text_encoder, "text_model", text_encoder).eos_token_id = tokenizer.eos_token_id


def words_cut_off(prompt: str, tokenizers: list[PreTrainedTokenizerBase]) -> list[str]:
    """The words at the end of a prompt that a text encoder does not read in full."""
    words = prompt.split()
    kept = len(words)
    for tokenizer in tokenizers:
        while kept and len(tokenizer(" ".join(words[:kept]), verbose=False).input_ids) > tokenizer.model_max_length:
            kept -= 1
    return words[kept:]


def check_prompts(
    args: argparse.Namespace,
    pipeline: Pipeline,
    concepts: list[Concept],
    examples: list[list[Example]],
    preserved: list[str],
) -> None:
    """
    Warns of each prompt that the text encoder does not read to its end. Stops where that loses a new word, or what an
    instance prompt calls the subject: a word that the class prompt, if there is one, does not have.
    """
    tokenizers = tokenizers_of(pipeline)
    limit = min(tokenizer.model_max_length for tokenizer in tokenizers)
    subjects = {concept.instance_prompt: set((concept.class_prompt or "").split()) for concept in concepts}
    new_words = args.modifier_token.split("+") if args.modifier_token else []
    others = [args.validation_prompt] if args.validation_prompt else []
    others += preserved if needs_recording(args) and args.lipschitz_recording is None else []
    prompts = distinct_prompts(examples)
    for prompt in dict.fromkeys(prompts + others):
        cut = words_cut_off(prompt, tokenizers)
        if not cut:
            continue
        kept = set(prompt.split()[: -len(cut)])
        where = f"the text encoder reads only {limit} tokens and ignores {' '.join(cut)!r} in"
        lost = [word for word in new_words if any(word in part for part in cut)]
        if prompt in subjects:
            lost += [word for word in cut if word not in kept | subjects[prompt]]
        if lost and prompt in prompts:
            stop(f"{lost[0]} would not be learned: {where} {prompt!r}: shorten it")
        logger.warning(f"{where[0].upper()}{where[1:]} {prompt!r}.")


def add_lora(args: argparse.Namespace, trained: dict[str, torch.nn.Module]) -> None:
    from peft import LoraConfig

    if args.seed is not None:
        set_seed(args.seed)  # one factor begins at random
    for name, model in trained.items():
        config = LoraConfig(
            r=args.rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            use_dora=args.use_dora,
            init_lora_weights="gaussian",
            target_modules=LORA_TARGETS[name],
        )
        model.add_adapter(config)


def choose_parameters(args: argparse.Namespace, pipeline: Pipeline, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """
    Makes the parameters that the method trains, and only those, require gradients. They get the dtype of
    `trained_dtype`; the others of these models go to `dtype`, but for a method that trains all. Returns the models in
    which something is trained, by name.
    """
    trained = {"unet": pipeline.unet}
    if args.train_text_encoder or args.modifier_token:
        trained |= dict(zip(TEXT_ENCODERS, text_encoders_of(pipeline)))
    if args.method != "full":
        for model in trained.values():
            model.requires_grad_(False)
    if args.method == "lora":
        add_lora(args, trained)
    if args.method == "custom_diffusion":
        for name, parameter in pipeline.unet.named_parameters():
            parameter.requires_grad_(re.search(r"\.attn2\.to_[kv]\.", name) is not None)
        if args.modifier_token:
            add_tokens(args, pipeline)
    dtypes = {True: trained_dtype(args), False: dtype}
    for model in trained.values():
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtypes[parameter.requires_grad])
    return trained


def trained_dtype(args: argparse.Namespace) -> torch.dtype:
    return torch.float32


def choose_schedulers(args: argparse.Namespace, pipeline: Pipeline) -> NoiseScheduler:
    """Returns the scheduler for training, and puts the one for validation into the pipeline."""
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    pipeline.scheduler = getattr(diffusers, args.validation_scheduler).from_config(pipeline.scheduler.config)
    return noise_scheduler


def probe_scheduler(pipeline: Pipeline) -> Any:
    """Draws the pictures of `record_base`, whatever --validation_scheduler is."""
    return DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)


def loaded_dtypes(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """
    The dtypes to load the base in: float32 for what trains, as fewer bits would lose small updates, and that of mixed
    precision for the rest, which it is cast to anyway. The script itself casts the autoencoder.
    """
    full_bits = ["vae"] if args.method == "lora" else ["vae", "unet"]
    if args.modifier_token or (args.train_text_encoder and args.method != "lora"):
        full_bits += TEXT_ENCODERS
    return {"default": dtype, **dict.fromkeys(full_bits, torch.float32)}


def load_models(
    args: argparse.Namespace, dtype: torch.dtype
) -> tuple[Pipeline, NoiseScheduler, dict[str, torch.nn.Module], str]:
    """
    The base, with the validation scheduler in place; the scheduler for training; the models to train, by name; and the
    fingerprint of the base.
    """
    pipeline = load_pipeline(args, dtypes=loaded_dtypes(args, dtype))
    models = [model for model in pipeline.components.values() if isinstance(model, torch.nn.Module)]
    # Of each tensor the beginning: bases differ everywhere, and a whole SDXL would take a while.
    base = fingerprint(weight.flatten()[:4096] for model in models for weight in model.parameters())
    noise_scheduler = choose_schedulers(args, pipeline)
    if noise_scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        stop(f"the base predicts {noise_scheduler.config.prediction_type}, which cannot be trained here")
    pipeline.vae.requires_grad_(False)
    trained = choose_parameters(args, pipeline, dtype)
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
        for name in TEXT_ENCODERS:
            if name in trained:
                # The other kind has no gradient where the inputs of the first layer have none, as in LoRA.
                enable = getattr(trained[name], "activation_checkpointing_enable", None)
                (enable or trained[name].gradient_checkpointing_enable)({"use_reentrant": False})
    if args.enable_xformers_memory_efficient_attention:
        try:
            pipeline.unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError, RuntimeError) as error:
            stop(f"--enable_xformers_memory_efficient_attention: xformers does not run here: {error}")
    return pipeline, noise_scheduler, trained, base


class DreamBoothDataset(Dataset):
    """
    The photos of all concepts, each paired with a class image of its concept if there are any. An item is asked for by
    its index and the seed of its crops and flips; it is the prompts of the one or two images; for each image its
    pixels, a float tensor (3, size, size) in [-1, 1], or what `keep_encoded` has kept of them; and their sizes, of
    which SDXL is told, a float tensor (1 or 2, 6): height and width of the file, top and left of this very crop in the
    scaled image, height and width of the crop, in pixels.
    """

    def __init__(self, photos, class_images, size, center_crop=False, random_flip=False, interpolation="lanczos"):
        self.size = size
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.interpolation = INTERPOLATION[interpolation]
        self.encoded, self.scaled = {}, {}
        self.rows = []
        for kinds in zip(photos, class_images):
            kinds = [examples for examples in kinds if examples]
            self.rows += [
                [examples[index % len(examples)] for examples in kinds] for index in range(max(map(len, kinds)))
            ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, draw):
        index, seed = draw
        rng = random.Random(seed)
        examples = self.rows[index]
        images, sizes = zip(*[self.load(example.image, rng) for example in examples])
        return [example.prompt for example in examples], list(images), torch.tensor(sizes)

    def load(self, source, rng):
        if source in self.encoded:
            image, original, scaled = self.encoded[source]
        else:
            image, original = self.scaled.get(source) or self.scale(source)
            scaled = image.size
        mirrored = self.random_flip and rng.random() < 0.5
        left, top = self.place(scaled, rng)
        image = image[mirrored] if source in self.encoded else self.crop(image, mirrored, left, top)
        return image, [float(side) for side in (*original, top, left, self.size, self.size)]

    def keep_encoded(self, source, encode):
        """
        Keeps what `encode` makes of an image's pixels, mirrored too if that occurs. Returns whether it did: not for an
        image that is cropped at random. Of that it keeps the scaled image, which takes longer to read than to crop.
        """
        image, original = self.scale(source)
        if not self.center_crop and image.size != (self.size, self.size):
            if len(self.scaled) < SCALED_IMAGES:
                self.scaled[source] = image, original
            return False
        place = self.place(image.size, random.Random())
        kinds = [encode(self.crop(image, mirrored, *place)) for mirrored in range(1 + self.random_flip)]
        self.encoded[source] = kinds, original, image.size
        return True

    def scale(self, source):
        """The image in the size from which a square is cropped, and height and width of the file."""
        image = open_image(source)
        scale = self.size / min(image.size)
        scaled = [max(self.size, int(side * scale)) for side in image.size]
        return image.resize(scaled, self.interpolation), (image.height, image.width)

    def place(self, scaled, rng):
        """Left and top of a crop."""
        free = [side - self.size for side in scaled]
        return [side // 2 if self.center_crop else rng.randint(0, side) for side in free]

    def crop(self, image, mirrored, left, top):
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def collate(rows: list[tuple]) -> tuple[list, list, torch.Tensor]:
    """A batch of items of `DreamBoothDataset`: prompts by kind, a list of the images of each item, and sizes."""
    prompts, images, sizes = zip(*rows)
    return list(zip(*prompts)), list(images), torch.stack(sizes)


class EpochSampler(Sampler):
    """
    Shuffled pairs of an index and a seed for crops and flips. They depend on nothing but `seed` and `epoch`: a resumed
    run, which knows its epoch and how far it had come, goes on with the very images and crops that were next.
    """

    def __init__(self, length, seed):
        self.length = length
        self.seed = seed
        self.epoch = 0

    def __len__(self):
        return self.length

    def __iter__(self):
        rng = random.Random(f"{self.seed} {self.epoch}")
        for index in rng.sample(range(self.length), self.length):
            yield index, rng.getrandbits(32)

    def weights(self, accelerator, index, size):
        """
        Of each sample in the `size` samples of this process' batch `index` of an epoch: where accelerate fills up the
        last batches of several processes with samples that the epoch has had, 0, so that the mean over all processes
        is one over the others.
        """
        everywhere = accelerator.num_processes * size
        places = index * everywhere + accelerator.process_index * size + torch.arange(size, device=accelerator.device)
        return (places < self.length) * (everywhere / min(everywhere, self.length - index * everywhere))


def build_dataloader(
    args: argparse.Namespace, accelerator: Accelerator, photos: list[list[Example]], class_images: list[list[Example]]
) -> tuple[DataLoader, EpochSampler]:
    dataset = DreamBoothDataset(
        [examples * args.repeats for examples in photos],
        class_images,
        args.resolution,
        args.center_crop,
        args.random_flip,
        args.image_interpolation_mode,
    )
    sampler = EpochSampler(len(dataset), seed=args.seed or 0)
    dataloader = DataLoader(
        dataset,
        batch_size=args.train_batch_size,
        sampler=sampler,
        num_workers=args.dataloader_num_workers,
        collate_fn=collate,
        pin_memory=accelerator.device.type == "cuda",  # copied to the GPU without waiting for it
        # Every iterator draws a number from it; from the global generator, that would shift a resumed run's noise.
        generator=torch.Generator(),
    )
    return accelerator.prepare(dataloader), sampler


def place_frozen_models(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: Pipeline,
    trained: dict[str, torch.nn.Module],
    dtype: torch.dtype,
) -> None:
    """Puts what is not trained on the device, in the dtype of mixed precision if it is right in that."""
    pipeline.vae.to(accelerator.device)
    if vae_is_right_in_half(args) and dtype != torch.float32:  # diffusers warns of every cast
        pipeline.vae.to(dtype)
    if TEXT_ENCODERS[0] not in trained:
        for text_encoder in text_encoders_of(pipeline):
            text_encoder.to(accelerator.device, dtype=dtype)


def vae_is_right_in_half(args: argparse.Namespace) -> bool:
    return True


def rate_and_decay(args: argparse.Namespace, name: str) -> tuple[float, float]:
    """Learning rate and weight decay of one of the models."""
    return args.learning_rate, args.adam_weight_decay


def group_parameters(
    args: argparse.Namespace, accelerator: Accelerator, trained: dict[str, torch.nn.Module]
) -> list[dict]:
    """The param groups. The penalty leaves new tokens alone: they have no pretrained value to be kept at."""
    scale = 1
    if args.scale_lr:
        scale = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    groups = []
    for name, model in trained.items():
        rate, decay = rate_and_decay(args, name)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups.append({"params": parameters, "lr": rate * scale, "weight_decay": decay})
        if name in TEXT_ENCODERS and args.modifier_token:
            groups[-1]["lipschitz_weight"] = 0.0
    return groups


def build_optimizer(args: argparse.Namespace, accelerator: Accelerator, groups: list[dict]) -> torch.optim.Optimizer:
    options = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **options)
    return build_adamw(accelerator, groups, options)


def build_adamw(accelerator: Accelerator, groups: list[dict], options: dict[str, Any]) -> torch.optim.AdamW:
    # Fused, a step takes a third of the time on a CPU, and no temporary copies on a GPU. With a GradScaler, accelerate
    # would not see that a step was skipped.
    fused = accelerator.scaler is None and accelerator.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, **options, fused=fused or None)


def build_lr_scheduler(
    args: argparse.Namespace, accelerator: Accelerator, optimizer: torch.optim.Optimizer, max_train_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of the learning rate. A warm-up that is not asked for takes half of the training at most."""
    warmup = args.lr_warmup_steps
    if warmup is None:
        warmup = min(500, max_train_steps // 2)
    elif warmup >= max_train_steps and args.lr_scheduler != "constant":
        logger.warning(
            f"--lr_warmup_steps {warmup} is not shorter than the training of {max_train_steps} steps: the learning"
            f" rate only reaches {(max_train_steps - 1) / warmup:.0%} of --learning_rate"
        )
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        # accelerate advances the schedule once per process at each step.
        num_warmup_steps=warmup * accelerator.num_processes,
        num_training_steps=max_train_steps * accelerator.num_processes,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


def load_anchor_model(args: argparse.Namespace, accelerator: Accelerator, pipeline: Pipeline) -> Pipeline:
    """The model to stay near: `lipschitz_anchor_model`, or the base."""
    if args.lipschitz_anchor_model is None:
        return pipeline
    anchor_model = load_pipeline(args, "--lipschitz_anchor_model")
    anchor_model.scheduler = pipeline.scheduler
    return anchor_model.to(accelerator.device)


def record_base(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: Pipeline,
    anchor_model: Pipeline,
    trained: dict[str, torch.nn.Module],
    prompts: list[str],
    checkpoint: Path | None,
) -> Recording | None:
    """
    The recording of the anchor model on the prompts, the same in all processes and in all runs that resume from a
    checkpoint; `None` if nothing needs it. It is written to `output_dir` under a name of its own.
    """
    if not needs_recording(args):
        return None
    path, held = find_recording(args, checkpoint), args.lipschitz_layers or args.lipschitz_predictions
    anchor_model.unet.to(accelerator.device)
    # New words train in the text encoders, too, but nothing there is held.
    others = {name: getattr(anchor_model, name) for name in TEXT_ENCODERS if args.train_text_encoder}
    try:
        if path is None:
            options = {"layers": bool(args.lipschitz_layers), "text_encoders": args.train_text_encoder}
            options |= {"num_inference_steps": RECORDED_STEPS, "progress": accelerator.is_main_process}
            options |= {"distributed": accelerator.num_processes > 1}
            with drawing(accelerator, anchor_model):
                recording = record_pipeline(anchor_model, prompts[::2] if held else None, prompts[1::2], **options)
            path = Path(args.output_dir, recording_file(recording.digest()))
            if accelerator.is_main_process:
                recording.save(path)
        (path,) = broadcast_object_list([path])
        recording = Recording.load(path, anchor_model.unet, **others)
    except (ValueError, OSError, KeyError) as error:
        how = (
            " (--mixed_precision bf16 or no)" if accelerator.mixed_precision == "fp16" and "NaN" in str(error) else ""
        )
        stop(f"--lipschitz_recording: {error}{how}")
    check_settings(checkpoint, {"recording": recording.digest()})
    held_out = sum(call.held_out for call in recording.calls)
    if args.drift_budget is not None or args.drift_every is not None:
        if not held_out:
            stop(f"--lipschitz_recording: {path} holds no calls that are held out, by which drift is measured")
        if others and not recording.drawn:
            stop(f"--lipschitz_recording: {path} does not know its prompts, which a text encoder that trains needs")
    if args.drift_budget is not None and (least := 2 * recording.rounding_drift().dial) > args.drift_budget:
        how = " or train in float32" if accelerator.mixed_precision != "no" else ""
        stop(
            f"--drift_budget: rounding alone changes predictions by {least / 2:.2g}, which cannot be undone: choose"
            f" at least {least:.2g}{how}"
        )
    own = Path(args.output_dir, path.name)
    if accelerator.is_main_process and args.lipschitz_recording is None and not own.exists():
        recording.save(own)  # that of a checkpoint elsewhere, for the checkpoints of this run
    calls = len(recording.calls) - held_out
    what = f"the outputs of {len(recording.layers)} layers, {calls} predictions, and {held_out} to measure drift by"
    logger.info(f"Recorded from the base: {what}.")
    recording = recording.attach(pipeline.unet, **{name: trained[name] for name in others})
    # Only full fine-tuning can get back from the base to another anchor model.
    if args.drift_budget is not None and anchor_model is not pipeline and args.method != "full":
        if (drift := recording.drift().dial) >= args.drift_budget:
            stop(
                f"--drift_budget: the base itself is {drift:.2g} from --lipschitz_anchor_model, which"
                f" --method={args.method} cannot undo: choose a larger budget, or train from the anchor model"
            )
    return recording


def find_recording(args: argparse.Namespace, checkpoint: Path | None) -> Path | None:
    """The file that was made before, by this run if it is resumed; `None` if the base has yet to be recorded."""
    path, flag = args.lipschitz_recording, "--lipschitz_recording"
    if path is None and checkpoint and (digest := read_settings(checkpoint).get("recording")):
        path, flag = Path(checkpoint.parent, recording_file(digest)), "--resume_from_checkpoint"
    if path is None or not needs_recording(args):
        return None
    check_recording(flag, path)
    return Path(path)


def recording_file(digest: str) -> str:
    return f"recording-{digest[:16]}.safetensors"


def read_lipschitz_anchors(
    args: argparse.Namespace, trained: dict[str, torch.nn.Module], anchor_model: Pipeline
) -> dict[torch.Tensor, torch.Tensor]:
    """The anchors of parameters, and of weights that LoRA moves, from `lipschitz_anchor_model`."""
    anchors = {}
    for name, model in trained.items():
        weights = getattr(anchor_model, name).state_dict()
        for key, parameter in model.named_parameters():
            # LoRA moves weights that are frozen themselves.
            moves = ".base_layer.weight" in key if args.method == "lora" else parameter.requires_grad
            if not moves or is_new_token(key):
                continue
            key = key.replace(".base_layer.", ".")
            shape = tuple(weights[key].shape) if key in weights else "missing"
            if shape != tuple(parameter.shape):
                stop(
                    f"--lipschitz_anchor_model: {args.lipschitz_anchor_model} has another shape than the base: {key}"
                    f" of its {name} is {shape}, not {tuple(parameter.shape)}"
                )
            # In the dtype of the base: what both models lost in rounding is no distance.
            anchors[parameter] = weights[key].to(parameter.dtype)
    return anchors


def attach_lipschitz(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: Pipeline,
    optimizer: torch.optim.Optimizer,
    trained: dict[str, torch.nn.Module],
    anchor_model: Pipeline,
    recording: Recording | None,
) -> LipschitzRegularizer | None:
    """
    The penalty. It holds weights near their present values, or near those of another anchor model, and outputs near
    the recorded ones.
    """
    if not is_penalized(args):
        return None
    layers, predictions, adapters = args.lipschitz_layers, args.lipschitz_predictions, []
    if args.method == "lora":
        adapters = [adapter for name in trained for adapter in find_lora_adapters(trained[name], prefix=name)]
    try:
        lipschitz = LipschitzRegularizer(
            optimizer,
            weight={"parameters": args.lipschitz_weight, "layers": layers, "predictions": predictions},
            reduction=args.lipschitz_reduction,
            mode=args.lipschitz_mode,
            radius=args.lipschitz_radius,
            anchor_device=args.lipschitz_anchor_device,
            anchors={} if anchor_model is pipeline else read_lipschitz_anchors(args, trained, anchor_model),
            adapters=adapters,
            lora_form=args.lipschitz_lora or "delta",
            recording=recording if layers or predictions else None,
        )
    except ValueError as error:
        stop(f"--lipschitz_recording: {error}" if args.lipschitz_recording else error)
    accelerator.register_for_checkpointing(lipschitz)
    if layers:
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        held |= {adapter.weight for adapter in adapters}
        names = [name for name, weight in recording.parameters().items() if weight in held and weight.dim() > 1]
        lacking = [name for name in names if name not in recording.layers]
        if len(lacking) > len(names) / 10:
            logger.warning(
                f"--lipschitz_recording: it lacks {len(lacking)} of {len(names)} weights that train, such as"
                f" {lacking[0]}, as it was made for others: they are held by their own distance. Make one of all with"
                " python -m lipschitz_reg.record."
            )
    return lipschitz


def encode_prompts(
    prompts: list[str], tokenizers: list[PreTrainedTokenizerBase], text_encoders: list[torch.nn.Module]
) -> dict[str, torch.Tensor]:
    """What the U-Net is given of the prompts: `prompt_embeds`, (prompts, tokens, width)."""
    (tokenizer,), (text_encoder,) = tokenizers, text_encoders
    tokens = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    device = next(text_encoder.parameters()).device
    ids = tokens.input_ids.to(device, non_blocking=device.type == "cuda")
    return {"prompt_embeds": text_encoder(ids, return_dict=False)[0]}


def encode_for_pipeline(pipeline: Pipeline, prompt: str | None) -> dict[str, torch.Tensor]:
    """What the pipeline takes in place of a prompt, and of none for guidance."""
    models = tokenizers_of(pipeline), text_encoders_of(pipeline)
    embeds, negative_embeds = (encode_prompts([text], *models)["prompt_embeds"] for text in (prompt or "", ""))
    return {"prompt_embeds": embeds, "negative_prompt_embeds": negative_embeds}


@torch.no_grad()
def encode_once(
    args: argparse.Namespace, pipeline: Pipeline, prompts: list[str]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    What `encode_prompts` gives for all prompts of a run, and `encode_for_pipeline` for that of validation. What
    encodes them is frozen, and makes room then.
    """
    models = tokenizers_of(pipeline), text_encoders_of(pipeline)
    encoded = [encode_prompts(prompts[start : start + 16], *models) for start in range(0, len(prompts), 16)]
    conditions = {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}
    validation_embeds = encode_for_pipeline(pipeline, args.validation_prompt)
    del models
    for name in TEXT_ENCODERS:
        setattr(pipeline, name, None)
    gc.collect()
    torch.cuda.empty_cache()
    return conditions, validation_embeds


def predict(
    unet: torch.nn.Module,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditions: dict[str, torch.Tensor],
    sizes: torch.Tensor,
) -> torch.Tensor:
    """The U-Net's output. It is not told of sizes."""
    return unet(noisy_latents, timesteps, conditions["prompt_embeds"], return_dict=False)[0]


def latent_statistics(vae: AutoencoderKL, device: torch.device) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Mean and deviation of the latents, each (channels, 1, 1), by which some autoencoders have them normalized."""
    mean, deviation = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is None or deviation is None:
        return 0.0, 1.0
    rows = (torch.tensor(row).to(device, non_blocking=device.type == "cuda") for row in (mean, deviation))
    return tuple(row.view(-1, 1, 1) for row in rows)


@torch.no_grad()
def encode_image(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """
    The distribution of an image's latents: mean and logarithm of the variance, (2 * channels, height, width), in the
    dtype of the autoencoder, which is the same whenever it is computed.
    """
    return vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist.parameters[0]


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Iterable[torch.Tensor]) -> torch.Tensor:
    """
    Float32 latents of a batch, drawn at random from the distribution of each image. An image is its pixels, or what
    `encode_image` gave for them.
    """
    encoded = [encode_image(vae, image) if len(image) == vae.config.in_channels else image for image in images]
    latents = DiagonalGaussianDistribution(torch.stack(encoded)).sample().float()
    mean, deviation = latent_statistics(vae, latents.device)
    return (latents - mean) * vae.config.scaling_factor / deviation


def encode_images_once(
    args: argparse.Namespace,
    accelerator: Accelerator,
    vae: AutoencoderKL,
    dataset: DreamBoothDataset,
    max_train_steps: int,
) -> None:
    """
    Encodes the images before training, each once, so that only drawing from their distributions is left for each use,
    and the autoencoder makes room. An image that is cropped at random is encoded at each use; so are all in a training
    that is too short to use every one.
    """
    sources = list(dict.fromkeys(example.image for row in dataset.rows for example in row))
    batch = args.train_batch_size * (1 + args.with_prior_preservation)
    if len(sources) * (1 + args.random_flip) > max_train_steps * args.gradient_accumulation_steps * batch:
        return
    silent = not accelerator.is_main_process
    progress = tqdm(sources, desc="Encoding images", leave=False, delay=5, disable=silent)
    once = sum(dataset.keep_encoded(source, lambda pixels: encode_image(vae, pixels).cpu()) for source in progress)
    if once < len(sources):
        logger.info(
            f"{len(sources) - once} of {len(sources)} images are cropped at random, and encoded again at each use:"
            " crop them to squares, or add --center_crop, to train faster."
        )
        return
    vae.to("cpu")
    torch.cuda.empty_cache()


@torch.no_grad()
def decode_latents(pipeline: Pipeline, latents: torch.Tensor) -> list[Image.Image]:
    """
    What the pipeline itself does, but out of reach of autocast, in which SDXL's autoencoder gives NaN: float16 cannot
    hold its activations.
    """
    mean, deviation = latent_statistics(pipeline.vae, latents.device)
    latents = latents.float() * deviation / pipeline.vae.config.scaling_factor + mean
    images = pipeline.vae.decode(latents.to(pipeline.vae.dtype), return_dict=False)[0]
    return pipeline.image_processor.postprocess(images)


def compute_loss(
    args: argparse.Namespace,
    noise_scheduler: NoiseScheduler,
    vae: AutoencoderKL,
    unet: torch.nn.Module,
    conditions: dict[str, torch.Tensor],
    images: Sequence[Sequence[torch.Tensor]],
    sizes: torch.Tensor,
    weights: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The denoising loss of a batch.

    Args:
        conditions: What `encode_prompts` gives, first for all photos, then for all class images.
        images, sizes: (batch, 1 or 2) images and (batch, 1 or 2, 6), as the dataset gives them.
        weights: (batch,), of each photo and its class image in the means.

    Returns:
        The losses on the photos and on the class images (zero if there are none), each a mean over its samples.
    """
    batch_size, kinds = sizes.shape[:2]
    # All photos come first, then all class images: one pass through the models for both.
    images, sizes = list(itertools.chain(*zip(*images))), sizes.transpose(0, 1).flatten(0, 1)

    def denoise(noisy_latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return predict(unet, noisy_latents, timesteps, conditions, sizes).float()

    losses = sample_losses(args, noise_scheduler, denoise, encode_images(vae, images))
    instance_loss, *prior_loss = (weights * losses.view(kinds, batch_size)).mean(1)
    return instance_loss, prior_loss[0] if prior_loss else torch.zeros_like(instance_loss)


def sample_losses(
    args: argparse.Namespace,
    noise_scheduler: NoiseScheduler,
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
) -> torch.Tensor:
    """The loss of each sample."""
    noise = torch.randn_like(latents)
    if args.offset_noise:
        noise += 0.1 * torch.randn_like(latents[:, :, :1, :1])
    return diffusion_losses(noise_scheduler, denoise, latents, noise, args.snr_gamma)


def diffusion_losses(
    noise_scheduler: DDPMScheduler,
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    noise: torch.Tensor,
    snr_gamma: float | None,
) -> torch.Tensor:
    """The loss of each sample: the error of the predicted noise or velocity, at a timestep of its own."""
    timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, latents.shape[:1], device=latents.device)
    prediction = denoise(noise_scheduler.add_noise(latents, noise, timesteps), timesteps)
    v_prediction = noise_scheduler.config.prediction_type == "v_prediction"
    target = noise_scheduler.get_velocity(latents, noise, timesteps) if v_prediction else noise
    losses = F.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)
    if snr_gamma is not None:
        # Min-SNR (arXiv 2303.09556), for each sample by its own timestep. A loss on v is the loss on the image times
        # SNR + 1; one on the noise, times SNR. Where nothing is left of the image, SNR is 0, and min(SNR, gamma) / SNR
        # is the limit, 1.
        snr = compute_snr(noise_scheduler, timesteps)
        weights = snr.clamp(max=snr_gamma) / (snr + 1) if v_prediction else (snr_gamma / snr).clamp(max=1)
        losses = losses * weights
    return losses


def takes_part(accelerator: Accelerator) -> bool:
    """Whether this process also runs the models for drift and pictures: the main one, or all that share them."""
    return accelerator.is_main_process or sharding_engine(accelerator) is not None


@contextmanager
def evaluating(pipeline: Pipeline, draws: bool = True) -> Iterator[None]:
    """
    No dropout, and no gradients, in the models of the pipeline that may be in training, and all on one device if it
    draws. Compiled blocks run uncompiled: to compile them for a few pictures takes longer than to draw those.
    """
    models = [model for model in (pipeline.unet, *text_encoders_of(pipeline)) if model is not None]
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    home = pipeline.vae.device
    if draws:
        pipeline.vae.to(pipeline.unet.device)
    compiled = any(module._compiled_call_impl is not None for module in pipeline.unet.modules())
    with torch.no_grad(), torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield
    if draws:
        pipeline.vae.to(home)
    for model, mode in zip(models, modes):
        model.train(mode)


@contextmanager
def drawing(accelerator: Accelerator, pipeline: Pipeline) -> Iterator[None]:
    """Sets the pipeline up to draw what is recorded, whatever --validation_scheduler is."""
    scheduler, pipeline.scheduler = pipeline.scheduler, probe_scheduler(pipeline)
    with evaluating(pipeline), accelerator.autocast():
        yield
    pipeline.scheduler = scheduler


def measure_drift(
    args: argparse.Namespace, accelerator: Accelerator, pipeline: Pipeline, recording: Recording
) -> Drift:
    """How far predictions have moved from the base's, on the held-out prompts, with the present embeddings."""
    run = functools.partial(draw_held_out, pipeline, recording) if args.train_text_encoder else None
    with drawing(accelerator, pipeline) if run else evaluating(pipeline, draws=False):
        drift = recording.drift(run=run)
    if sharding_engine(accelerator):  # all processes must act on exactly the same numbers
        (drift,) = broadcast_object_list([drift])
    return drift


def log_drift(
    accelerator: Accelerator,
    measure: Callable[[], Drift],
    lipschitz: LipschitzRegularizer | None,
    global_step: int,
) -> None:
    """Sends to the trackers what `--drift_every` says."""
    if not takes_part(accelerator):
        return
    began, drift = time.perf_counter(), measure()
    logs = {"drift/prediction": drift.prediction}
    if drift.guided_prediction is not None:
        logs["drift/guided_prediction"] = drift.guided_prediction
    distance = lipschitz.metrics()["lipschitz/distance"] if lipschitz else 0.0
    if distance > 0:
        # The denoiser's Lipschitz constant in its parameters (arXiv 2505.19519) cannot be below it.
        logs["drift/lipschitz_constant"] = drift.largest_change / distance
    accelerator.log({**logs, "drift/seconds": time.perf_counter() - began}, step=global_step)


def keep_budget(args: argparse.Namespace, measure: Callable[[], Drift], lipschitz: LipschitzRegularizer) -> str:
    """Takes back what the training has changed beyond `drift_budget`. Returns what there is to say of it."""
    # Each share starts again from the trained weights, or rounding would add up. If sharded: this process's part.
    moved = [p.detach() for group in lipschitz.optimizer.param_groups for p in group["params"] if p.requires_grad]
    moved = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in moved]
    learned, changes = [weight.to("cpu", copy=True) for weight in moved], []

    def move_to(share: float) -> None:
        for weight, value in zip(moved, learned):
            weight.copy_(value)
        if share < 1:
            lipschitz.pull(1 - share)

    def change_at(share: float) -> float:
        move_to(share)
        changes.append(measure().dial)
        return changes[-1]

    try:
        share, change = fit_share(change_at, args.drift_budget)
    except ValueError as error:
        move_to(1)
        said = f"{error} Nothing was taken back"
        logger.warning(f"--drift_budget: {said}.")
        return f"The drift budget was not kept: {said}."
    said = f"training changed predictions by {changes[0]:.2%}"
    if share == 1:
        said += f", within the budget of {args.drift_budget:g}: nothing was taken back, and more budget would change"
        said += " nothing. To learn more, train longer or at a higher rate"
    else:
        said += f"; {share:.1%} of the change of weights is kept, and predictions now differ by {change:.2%}"
    logger.info(f"--drift_budget: {said}")
    return f"Drift budget, on prompts that do not name the subject: {said}."


def empty_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy on the meta device, without values. It can be saved, which a model that is sharded cannot."""
    empty = {id(tensor): tensor.detach().to("meta") for tensor in model.buffers()}
    for parameter in model.parameters():
        empty[id(parameter)] = torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return copy.deepcopy(model, empty)


def gather(accelerator: Accelerator, trained: dict[str, torch.nn.Module], whole: dict[str, torch.nn.Module]) -> None:
    """Fills the empty copies with the weights that train, in the main process. All processes must call this."""
    for name, model in trained.items():
        weights = accelerator.get_state_dict(model) if accelerator.is_fsdp2 else zero_state_dict(accelerator, model)
        if accelerator.is_main_process:
            whole[name].load_state_dict(weights, assign=True, strict=accelerator.is_fsdp2)


def zero_state_dict(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights that DeepSpeed trains, in the float32 in which it shares them out; only in the main process."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weight = safe_get_full_fp32_param(parameter)  # by all processes together
            if accelerator.is_main_process:
                weights[name] = weight.cpu()
    return weights


def trained_keys_values(unet: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


def save_trained(args: argparse.Namespace, trained: dict[str, torch.nn.Module], folder: str | Path) -> None:
    """Writes what was trained, in safetensors that diffusers' own calls read; the model card shows those calls."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if args.method == "full":
        for name, model in trained.items():
            model.save_pretrained(folder / name)
    elif args.method == "lora":
        from peft import get_peft_model_state_dict

        layers, configs = {}, {}
        for name, model in trained.items():
            layers[f"{name}_lora_layers"] = get_peft_model_state_dict(model)
            # diffusers takes the rank for alpha where it finds none, and draws with the dropout that it finds.
            config = {**model.peft_config["default"].to_dict(), "lora_dropout": 0.0}
            config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
            configs[f"{name}_lora_adapter_metadata"] = config
        Pipeline.save_lora_weights(folder, weight_name=LORA_FILE, **layers, **configs)
        sort_metadata(folder / LORA_FILE)
    else:
        weights = {name: parameter.detach() for name, parameter in trained_keys_values(trained["unet"]).items()}
        save_file(weights, folder / KEYS_VALUES_FILE, metadata={"format": "pt"})
        if args.modifier_token:
            save_tokens(args, trained, folder / TOKENS_FILE)


def sort_metadata(file: Path) -> None:
    """Lets equal runs write equal files: safetensors shuffles its metadata."""
    with open(file, "r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        stream.seek(8)
        stream.write(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size))


def save_tokens(args: argparse.Namespace, trained: dict[str, torch.nn.Module], file: Path) -> None:
    rows = trained["text_encoder"].get_input_embeddings().new.detach().clone()
    save_file(dict(zip(args.modifier_token.split("+"), rows.unbind())), file, metadata={"format": "pt"})


@torch.no_grad()
def load_trained(args: argparse.Namespace, trained: dict[str, torch.nn.Module], folder: str | Path) -> None:
    """Reads back what `save_trained` wrote. Raises ValueError, KeyError or RuntimeError if it was of another run."""
    if args.method == "full":
        for name, model in trained.items():
            model.load_state_dict(type(model).from_pretrained(folder, subfolder=name).state_dict())
    elif args.method == "lora":
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        weights = load_file(Path(folder, LORA_FILE))
        for name, model in trained.items():
            own = {key.removeprefix(f"{name}."): weights[key] for key in weights if key.startswith(f"{name}.")}
            if own.keys() != get_peft_model_state_dict(model).keys():
                raise ValueError("its LoRA is of other parts than the one that trains")
            set_peft_model_state_dict(model, own, adapter_name="default")
    else:
        weights = load_file(Path(folder, KEYS_VALUES_FILE))
        for name, parameter in trained_keys_values(trained["unet"]).items():
            parameter.copy_(weights[name])
        if args.modifier_token:
            load_tokens(args, trained, Path(folder, TOKENS_FILE))


def load_tokens(args: argparse.Namespace, trained: dict[str, torch.nn.Module], file: Path) -> None:
    tokens = load_file(file)
    rows = [tokens[token] for token in args.modifier_token.split("+")]
    trained["text_encoder"].get_input_embeddings().new.copy_(torch.stack(rows))


def save_kohya(args: argparse.Namespace, folder: str | Path) -> None:
    """Writes a LoRA that `save_trained` wrote once more, with the names of kohya's trainer."""
    factors = {"lora_A": "lora_down", "lora_B": "lora_up"}
    renamed = {}
    for key, weight in load_file(Path(folder, LORA_FILE)).items():
        model, *layer, factor, _ = key.split(".")
        if model in TEXT_ENCODERS and layer[0] != "text_model":
            layer.insert(0, "text_model")  # some versions of transformers leave it out
        name = "_".join([KOHYA_NAMES[model], *layer])
        renamed[f"{name}.{factors[factor]}.weight"] = weight
        renamed[f"{name}.alpha"] = torch.tensor(float(args.lora_alpha))
    save_file(renamed, Path(folder, KOHYA_FILE), metadata={"format": "pt"})


def register_checkpoint_format(
    args: argparse.Namespace, accelerator: Accelerator, trained: dict[str, torch.nn.Module]
) -> None:
    """Makes accelerate's checkpoints hold what `save_trained` writes. Where it shards, they stay in its own format."""
    if sharding_engine(accelerator):
        return

    def save(models, weights, folder):
        # What stays in these lists, accelerate would save or load once more.
        weights.clear()
        if accelerator.is_main_process:
            save_trained(args, trained, folder)

    def load(models, folder):
        models.clear()
        load_trained(args, trained, folder)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> int:
    """Restores a run and returns the step that it had reached."""
    try:
        accelerator.load_state(str(checkpoint))
    except (*LOAD_ERRORS, EOFError, pickle.UnpicklingError, AssertionError) as error:
        stop(f"--resume_from_checkpoint: cannot resume from {checkpoint}: {error}")
    return int(checkpoint.name.split("-")[1])


def own_shard(value: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that FSDP2 or ZeRO 3 shards; of others, the whole."""
    if hasattr(value, "to_local"):
        return value.to_local()
    if not hasattr(value, "ds_tensor"):
        return value
    begin = torch.distributed.get_rank(value.ds_process_group) * value.ds_tensor.numel()
    return value.ds_tensor[: max(0, value.ds_numel - begin)]  # the rest is padding, of any value


def stop_if_not_finite(args: argparse.Namespace, values: Iterable[float | torch.Tensor], what: str, step: int) -> None:
    """Stops a training that is lost, before it takes the place of a checkpoint or a result."""
    # One transfer from the device. Where weights are sharded, each process checks its own shard.
    values = [torch.as_tensor(value) for value in values]
    own = [own_shard(value) for value in values]
    finite = torch.stack([value.isfinite().all() for value in own]).all().float()
    if any(shard is not value for shard, value in zip(own, values)):
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    if finite:
        return
    if int(os.environ.get("RANK", "0")) == 0:
        shutil.rmtree(Path(args.output_dir, "tmp-pipeline"), ignore_errors=True)
    how = " or float16, which overflows: try --mixed_precision bf16" if args.mixed_precision == "fp16" else ""
    stop(
        f"{what} is NaN or infinite at step {step}. The likely cause is too high a learning rate, here"
        f" {args.learning_rate:g}{how}. Checkpoints and an earlier result in {args.output_dir} are unchanged"
    )


class StepLogs(NamedTuple):
    """Of a step, what is logged; the losses on photos and class images, and the penalty, are on the device still."""

    step: int
    learning_rate: float
    losses: torch.Tensor
    lipschitz_penalty: torch.Tensor | None


def log_steps(args: argparse.Namespace, accelerator: Accelerator, unread: list[StepLogs], progress_bar: tqdm) -> None:
    """Reads from the device what steps have left there, in one transfer, and sends it to the trackers step by step."""
    zero = torch.zeros((), device=accelerator.device)
    penalties = [zero if logs.lipschitz_penalty is None else logs.lipschitz_penalty.to(zero) for logs in unread]
    rows = torch.stack([torch.cat([logs.losses, term[None]]) for logs, term in zip(unread, penalties)]).tolist()
    for (step, learning_rate, _, term), (instance_loss, prior_loss, lipschitz_penalty) in zip(unread, rows):
        logs = {"denoising_loss": instance_loss + args.prior_loss_weight * prior_loss}
        logs["loss"] = logs["denoising_loss"] + lipschitz_penalty
        if args.with_prior_preservation:
            logs["prior_loss"] = prior_loss
        if term is not None:
            logs["lipschitz/penalty"] = lipschitz_penalty
        logs["lr"] = learning_rate
        stop_if_not_finite(args, [logs["loss"]], "The loss", step)
        accelerator.log(logs, step=step)
    progress_bar.set_postfix(loss=logs["loss"], lr=logs["lr"])
    unread.clear()


def trained_parameters(trained: dict[str, torch.nn.Module]) -> list[torch.nn.Parameter]:
    return [parameter for model in trained.values() for parameter in model.parameters() if parameter.requires_grad]


def save_checkpoint(
    args: argparse.Namespace,
    accelerator: Accelerator,
    trained: dict[str, torch.nn.Module],
    settings: dict[str, Any],
    global_step: int,
) -> None:
    """
    Writes `checkpoint-<step>`, then deletes what is beyond the limit. A folder has that name only while it is
    complete: a run that is killed leaves complete checkpoints only.
    """
    stop_if_not_finite(args, trained_parameters(trained), "A weight", global_step)
    checkpoint = Path(args.output_dir, f"checkpoint-{global_step}")
    unfinished = Path(args.output_dir, "tmp-checkpoint")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unfinished.joinpath(SETTINGS_FILE).write_text(json.dumps(settings, indent=1), encoding="utf-8")
        set_permissions(unfinished)
        if checkpoint.exists():
            delete_checkpoint(checkpoint)
        unfinished.rename(checkpoint)
        # An earlier run may have left checkpoints of later steps; the new one stays in any case.
        others = [path for path in list_checkpoints(args.output_dir) if path != checkpoint]
        for path in others[: max(0, len(others) + 1 - (args.checkpoints_total_limit or math.inf))]:
            delete_checkpoint(path)
        logger.info(f"Saved {checkpoint}")


def delete_checkpoint(checkpoint: Path) -> None:
    deleted = checkpoint.with_name("tmp-deleted")
    shutil.rmtree(deleted, ignore_errors=True)
    checkpoint.rename(deleted)
    shutil.rmtree(deleted)


def set_permissions(folder: Path) -> None:
    """Gives all files the permissions that a new file has here: safetensors lets only its owner read one."""
    new = folder / "tmp-new"
    new.touch()
    mode = new.stat().st_mode & 0o777
    new.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def log_state(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: Pipeline,
    lipschitz: LipschitzRegularizer | None,
    validation_embeds: dict[str, torch.Tensor] | None,
    global_step: int,
) -> list[Image.Image]:
    """Sends to the trackers how far the parameters have moved, and draws the validation images, which it returns."""
    if not takes_part(accelerator):
        return []
    if lipschitz:
        distances = {name: value for name, value in lipschitz.metrics().items() if "distance" in name}
        accelerator.log(distances, step=global_step)
    if args.validation_prompt is None:
        return []
    return log_validation(args, accelerator, pipeline, validation_embeds, global_step)


def log_validation(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: Pipeline,
    prompt_embeds: dict[str, torch.Tensor] | None,
    global_step: int,
) -> list[Image.Image]:
    """
    Draws the validation images, sends them to the trackers as of this step, and returns them. `prompt_embeds` are
    those of `encode_for_pipeline`; where what encodes is there still, as it is trained, they are made anew.
    """
    # A generator of its own: training goes the same way with and without validation.
    generator = torch.Generator(accelerator.device)
    generator.manual_seed(args.seed) if args.seed is not None else generator.seed()
    images = []
    with evaluating(pipeline):
        if text_encoders_of(pipeline)[0] is not None:
            prompt_embeds = encode_for_pipeline(pipeline, args.validation_prompt)
        hidden = not accelerator.is_main_process
        for _ in tqdm(range(args.num_validation_images), desc="Validation images", leave=False, disable=hidden):
            with accelerator.autocast():
                options = {"num_inference_steps": DRAWING_STEPS, "generator": generator, "output_type": "latent"}
                output = pipeline(**prompt_embeds, **options)
            images += decode_latents(pipeline, output.images)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_images("validation", np.stack(images), global_step, dataformats="NHWC")
        if tracker.name == "wandb":
            import wandb

            captioned = [
                wandb.Image(image, caption=f"{i}: {args.validation_prompt}") for i, image in enumerate(images)
            ]
            tracker.log({"validation": captioned}, step=global_step)
    return images


def base_code(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """What else to import from diffusers, and to give, to load the base."""
    return [], []


def tokens_code(args: argparse.Namespace) -> list[str]:
    """The lines that load the new words."""
    return [
        f'tokens = load_file(f"{{folder}}/{TOKENS_FILE}")',
        "pipeline.load_textual_inversion(list(tokens.values()), token=list(tokens))",
    ]


def loading_code(args: argparse.Namespace, repo_id: str | None) -> str:
    """The calls that load what was trained, for someone who has diffusers and not this file."""
    base, result = args.pretrained_model_name_or_path, json.dumps(repo_id or args.output_dir)
    (names, more), loader, call = base_code(args), "DiffusionPipeline", "from_pretrained"
    if args.method == "full":  # the whole pipeline has all inside
        names, options = [], [result]
    elif os.path.isfile(base):
        loader, call, kinds = PIPELINE, "from_single_file", [("config", args.pretrained_config)]
    else:
        kinds = [(name, getattr(args, name)) for name in ("revision", "variant")]
    if args.method != "full":
        options = [json.dumps(base), *(f"{name}={json.dumps(value)}" for name, value in kinds if value is not None)]
        options += more
    lines = ["import torch", f"from diffusers import {', '.join([*names, loader])}"]
    loading = f"pipeline = {loader}.{call}({', '.join(options)}, dtype=torch.float32)"
    if args.method == "full":
        return "\n".join([*lines, "", loading])
    if args.method == "lora":
        return "\n".join([*lines, "", loading, f"pipeline.load_lora_weights({result})"])
    lines += ["from huggingface_hub import snapshot_download"] if repo_id else []
    lines += ["from safetensors.torch import load_file", ""]
    lines += [f"folder = snapshot_download({result})" if repo_id else f"folder = {result}"]
    lines += [loading, f'pipeline.unet.load_state_dict(load_file(f"{{folder}}/{KEYS_VALUES_FILE}"), strict=False)']
    return "\n".join(lines + (tokens_code(args) if args.modifier_token else []))


def describe_result(args: argparse.Namespace, repo_id: str | None) -> str:
    """The model card without its pictures, made before training: where the base is may have changed at the end."""
    base, name = args.pretrained_model_name_or_path, repo_id or Path(args.output_dir).resolve().name
    names = ("lipschitz_", "drift_budget")
    settings = {key: value for key, value in vars(args).items() if value and key.startswith(names)}
    prompt = json.dumps(f"{args.instance_prompt} in the snow", ensure_ascii=False)
    drawing = "" if args.concepts_list else f". Draw with all of it: `pipeline({prompt}).images[0]`"
    tags = ["text-to-image", "dreambooth", "lipschitz", TAG, f"{TAG}-diffusers", "diffusers-training"]
    method = {"full": [], "lora": ["dora" if args.use_dora else "lora"]}.get(args.method, [args.method])
    data = ModelCardData(
        # The Hub refuses a base that is not on it.
        base_model=None if os.path.exists(base) else base,
        library_name="diffusers",
        tags=tags + method,
        instance_prompt=args.instance_prompt,
        **settings,
    )
    paper = "the Lipschitz penalty of [Preserve and Personalize](https://arxiv.org/abs/2505.19519)"
    held = [name for name in ("layers", "predictions") if getattr(args, f"lipschitz_{name}")]
    forms = [paper] * bool(args.lipschitz_weight) + [f"its {' and '.join(held)} held near the base's"] * bool(held)
    parts = {
        "full": "U-Net",
        "lora": f"LoRA of rank {args.rank} on the U-Net",
        "custom_diffusion": "keys and values of cross-attention",
    }
    encoders = " and the text encoder" + ("s" if len(TEXT_ENCODERS) > 1 else "")
    trained = parts[args.method] + (encoders if args.train_text_encoder else "")
    trained += f", and the new words `{args.modifier_token}`" if args.modifier_token else ""
    text = f"""# {name}

`{base}`, {CARD_WORDS} {"with " + ", and ".join(forms) if forms else "without a penalty"}.
Prompt of the subject: `{args.instance_prompt}`{drawing}

```python
{loading_code(args, repo_id)}
```

Trained: {trained}. Penalty: `{json.dumps(settings)}`
"""
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def save_model_card(card: str, prompt: str | None, images: list[Image.Image], folder: Path) -> None:
    """Writes the card of `describe_result` and the validation images of the prompt below it."""
    for index, image in enumerate(images):
        image.save(Path(folder, f"image_{index}.png"))
    gallery = "\n".join(f"![{prompt}](./image_{index}.png)" for index in range(len(images)))
    ModelCard(f"{card}\n{gallery}".strip() + "\n").save(Path(folder, "README.md"))


def save_frozen_parts(args: argparse.Namespace, trained: dict[str, torch.nn.Module]) -> None:
    """
    Writes all of a whole pipeline that is not trained to `tmp-pipeline`, before training: at its end nothing is needed
    of the base, which may be gone by then.
    """
    unfinished = Path(args.output_dir, "tmp-pipeline")
    unfinished.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):  # training goes the same way, whatever loading draws
        pipeline = load_pipeline(args, **trained)
        add_result_parts(args, pipeline)
    for name, part in pipeline.components.items():
        if part is not None and name not in trained:
            part.save_pretrained(unfinished / name)
    pipeline.save_config(unfinished)


def delete_result(output_dir: Path) -> None:
    """Deletes all files of an earlier result, first the index, without which no pipeline loads."""
    index, card = output_dir / "model_index.json", output_dir / "README.md"
    rows = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    parts = [name for name, value in rows.items() if isinstance(value, list)]
    images = re.findall(r"\(\./(image_\d+\.png)\)", card.read_text(encoding="utf-8")) if card.is_file() else []
    # The card last: by it the rest is known as a result, also of a run that is killed here.
    for name in [index.name, LORA_FILE, KOHYA_FILE, KEYS_VALUES_FILE, TOKENS_FILE, *images, *parts, card.name]:
        path = output_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def save_result(
    args: argparse.Namespace,
    trained: dict[str, torch.nn.Module],
    images: list[Image.Image],
    card: str,
) -> list[str]:
    """
    Writes the whole pipeline, or what LoRA or Custom Diffusion adds to the base, and its model card to `output_dir`,
    in place of a result that is there. The index, without which no pipeline loads, goes first from the old one and
    comes last with the new one, so that what loads is complete; the card, by which a result is known, goes last and
    comes first. Returns the names of what was written.
    """
    output_dir, unfinished = Path(args.output_dir), Path(args.output_dir, "tmp-pipeline")
    save_trained(args, trained, unfinished)
    if args.output_kohya_format:
        save_kohya(args, unfinished)
    save_model_card(card, args.validation_prompt, images, unfinished)
    set_permissions(unfinished)
    delete_result(output_dir)
    order = {"README.md": -1, "model_index.json": 1}
    written = sorted(unfinished.iterdir(), key=lambda path: order.get(path.name, 0))
    for path in written:
        target = output_dir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    unfinished.rmdir()
    return [path.name for path in written]


def push_result(args: argparse.Namespace, repo_id: str, names: list[str]) -> None:
    """Uploads what the run wrote, and nothing else that lies in `output_dir`."""
    try:
        upload_folder(
            repo_id=repo_id,
            folder_path=args.output_dir,
            commit_message="DreamBooth with the Lipschitz penalty",
            allow_patterns=[*names, *(f"{name}/*" for name in names)],
            token=args.hub_token,
        )
    except Exception as error:  # no connection, no right, no space: each of another kind
        stop(f"--push_to_hub: the result is in {args.output_dir}, but was not uploaded: {error}")


def main(args: argparse.Namespace, inputs: Inputs | None = None) -> None:
    concepts, photos, class_images, preserved = inputs or check_inputs(args)
    accelerator = build_accelerator(args)
    args.mixed_precision = accelerator.mixed_precision
    settings = describe_run(args, concepts, photos, preserved)
    sharded = sharding_engine(accelerator)
    settings["engine"] = sharded or "DDP or one process"  # their checkpoints differ
    checkpoint = find_checkpoint(args, accelerator, settings)
    find_recording(args, checkpoint)
    repo_id = create_hub_repository(args) if args.push_to_hub and accelerator.is_main_process else None

    if args.with_prior_preservation:
        folders = {}  # concepts may share one
        for concept, images in zip(concepts, class_images):
            if concept.class_data_dir not in folders:
                folders[concept.class_data_dir] = sample_class_images(args, accelerator, concept, images)
        class_images = [[Example(path, c.class_prompt) for path in folders[c.class_data_dir]] for c in concepts]

    weight_dtype = getattr(torch, PRECISIONS.get(accelerator.mixed_precision, "float32"))
    pipeline, noise_scheduler, trained, base = load_models(args, weight_dtype)
    check_prompts(args, pipeline, concepts, photos + class_images, preserved)
    check_settings(checkpoint, {"base": base})
    settings |= {"base": base, "began": read_settings(checkpoint)["began"] if checkpoint else time.time()}
    dataloader, sampler = build_dataloader(args, accelerator, photos, class_images)
    steps_per_epoch = math.ceil(len(dataloader) / args.gradient_accumulation_steps)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    if checkpoint and int(checkpoint.name.split("-")[1]) > max_train_steps:
        stop(f"--resume_from_checkpoint: {checkpoint} has more than {max_train_steps} steps: raise --max_train_steps")
    validation_steps = args.validation_epochs * steps_per_epoch if args.validation_epochs else args.validation_steps

    optimizer = build_optimizer(args, accelerator, group_parameters(args, accelerator, trained))
    lr_scheduler = build_lr_scheduler(args, accelerator, optimizer, max_train_steps)
    register_checkpoint_format(args, accelerator, trained)
    place_frozen_models(args, accelerator, pipeline, trained, weight_dtype)
    anchor_model = load_anchor_model(args, accelerator, pipeline)
    record = functools.partial(record_base, args, accelerator, pipeline, anchor_model, trained, preserved, checkpoint)
    # DeepSpeed casts the weights, but not what the model is given.
    if accelerator.distributed_type == DistributedType.DEEPSPEED and weight_dtype != torch.float32:
        autocast = torch.autocast(accelerator.device.type, dtype=weight_dtype)
        pipeline.unet.forward = autocast(pipeline.unet.forward)
    # Recorded after `prepare`, under its autocast; before, where no process may have whole weights afterwards.
    recording = record() if sharded else None
    whole = {name: empty_copy(model) for name, model in trained.items()} if sharded else trained
    *prepared, optimizer, lr_scheduler = accelerator.prepare(*trained.values(), optimizer, lr_scheduler)
    models = dict(zip(trained, prepared))
    recording = recording or record()
    settings |= {"recording": recording.digest()} if recording else {}

    # Before the checkpoint is loaded: the lipschitz anchors are the pretrained weights.
    lipschitz = attach_lipschitz(args, accelerator, pipeline, optimizer, trained, anchor_model, recording)
    del anchor_model, record  # another anchor model needs not stay in memory
    if args.compile:  # after recording: its hooks do not fire in compiled blocks
        compile_blocks(pipeline.unet)
    measure = functools.partial(measure_drift, args, accelerator, pipeline, recording)
    prompts, validation_embeds = distinct_prompts(photos + class_images), None
    tokenizers = tokenizers_of(pipeline)
    if TEXT_ENCODERS[0] not in trained:
        # Each prompt is encoded once in the whole run.
        conditions, validation_embeds = encode_once(args, pipeline, prompts)
    encode_images_once(args, accelerator, pipeline.vae, dataloader.dataset, max_train_steps)

    # Each process draws noise of its own.
    if args.seed is not None:
        set_seed(args.seed, device_specific=True)
    global_step = load_checkpoint(accelerator, checkpoint) if checkpoint else 0
    os.makedirs(args.output_dir, exist_ok=True)
    card = describe_result(args, repo_id)
    if accelerator.is_main_process:
        shutil.rmtree(Path(args.output_dir, "tmp-pipeline"), ignore_errors=True)  # of a run that was killed
        if args.method == "full":
            save_frozen_parts(args, whole)
    config = {key: value for key, value in vars(args).items() if key != "hub_token"}
    accelerator.init_trackers("dreambooth", config=config)
    logger.info(f"Training from step {global_step} to {max_train_steps} on {sum(map(len, photos))} photos.")

    progress_bar = tqdm(
        total=max_train_steps, initial=global_step, desc="Steps", disable=not accelerator.is_main_process
    )
    first_epoch, done = divmod(global_step, steps_per_epoch)
    parameters = trained_parameters(trained)
    losses, unread, first_step, accumulated = [], [], global_step + 1, args.gradient_accumulation_steps
    for model in prepared:
        model.train()
    for epoch in range(first_epoch, math.ceil(max_train_steps / steps_per_epoch)):
        sampler.epoch = epoch
        skipped = done * accumulated if epoch == first_epoch else 0
        for index, batch in enumerate(accelerator.skip_first_batches(dataloader, skipped), skipped):
            if global_step >= max_train_steps:
                break
            batch_prompts, batch_images, sizes = batch
            with accelerator.accumulate(*prepared):
                batch_prompts = [prompt for kind in batch_prompts for prompt in kind]  # photos, then class images
                if TEXT_ENCODERS[0] in trained:
                    prompts = list(dict.fromkeys(batch_prompts))
                    conditions = encode_prompts(prompts, tokenizers, [models[name] for name in TEXT_ENCODERS])
                rows = [prompts.index(prompt) for prompt in batch_prompts]
                given = {name: torch.stack([embeds[row] for row in rows]) for name, embeds in conditions.items()}
                weights = sampler.weights(accelerator, index, len(batch_images))
                instance_loss, prior_loss = compute_loss(
                    args, noise_scheduler, pipeline.vae, models["unet"], given, batch_images, sizes, weights
                )
                # accelerate divides by all accumulated batches, but the last ones of an epoch may be fewer.
                fewer = min(accumulated, len(dataloader) - index // accumulated * accumulated)
                accelerator.backward((instance_loss + args.prior_loss_weight * prior_loss) * (accumulated / fewer))
                losses.append(torch.stack([instance_loss, prior_loss]).detach())
                if accelerator.sync_gradients and args.max_grad_norm > 0:
                    accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                learning_rate = float(lr_scheduler.get_last_lr()[0])  # of this step; torchao's is a tensor
                lr_scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue

            global_step += 1
            reduced = accelerator.reduce(torch.stack(losses).mean(0), "mean")
            losses.clear()
            lipschitz_penalty = lipschitz.penalty_tensor() if lipschitz else None
            unread.append(StepLogs(global_step, learning_rate, reduced, lipschitz_penalty))
            progress_bar.update(1)
            saves, draws = global_step % args.checkpointing_steps == 0, global_step % validation_steps == 0
            measures = args.drift_every and global_step % args.drift_every == 0
            is_last = global_step == max_train_steps
            if len(unread) == READ_EVERY or global_step == first_step or saves or draws or measures or is_last:
                log_steps(args, accelerator, unread, progress_bar)

            if saves:
                save_checkpoint(args, accelerator, trained, settings, global_step)
            if draws and not is_last:
                log_state(args, accelerator, pipeline, lipschitz, validation_embeds, global_step)
            if measures and not is_last:
                log_drift(accelerator, measure, lipschitz, global_step)

    progress_bar.close()
    accelerator.wait_for_everyone()
    if takes_part(accelerator):
        stop_if_not_finite(args, parameters, "A weight", global_step)
        if args.drift_budget is not None:
            card += f"\n{keep_budget(args, measure, lipschitz)}\n"
        images = log_state(args, accelerator, pipeline, lipschitz, validation_embeds, global_step)
        if args.drift_every is not None:
            log_drift(accelerator, measure, lipschitz, global_step)
    if sharded:
        gather(accelerator, trained, whole)
    if accelerator.is_main_process:
        names = save_result(args, whole, images, card)
        logger.info(f"Saved the result in {args.output_dir}")
        if args.push_to_hub:
            push_result(args, repo_id, names)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(ARGS, INPUTS)
    except KeyboardInterrupt:
        warn("stopped; --resume_from_checkpoint=latest goes on from the last checkpoint, if there is one")
        sys.exit(130)
