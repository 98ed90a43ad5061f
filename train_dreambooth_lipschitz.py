# DreamBooth for Stable Diffusion 1.x and 2.x with the Lipschitz penalty: full fine-tuning, LoRA or Custom Diffusion.
# Flags and outputs of diffusers' train_dreambooth.py and train_dreambooth_lora.py, less what serves DeepFloyd IF; new
# words as in train_custom_diffusion.py, photos and captions as in train_dreambooth_lora_sdxl.py. Holds no SDXL.
"""
Teaches Stable Diffusion a subject from 3-6 photos, and keeps the rest of the model where it was, by the penalty of
"Preserve and Personalize" (arXiv 2505.19519, Algorithm 1):

    accelerate launch train_dreambooth_lipschitz.py \
        --pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --instance_data_dir=photos --instance_prompt="a photo of sks dog" --output_dir=sks-dog \
        --train_batch_size=1 --learning_rate=2e-6 --lipschitz_weight=500 --max_train_steps=1000

`--method` says which parameters train, what they are anchored to and what is saved: `full` all of the U-Net, `lora`
small matrices added to its attention, `custom_diffusion` its cross-attention's keys and values and new words.
With `--lipschitz_weight=0` it is plain DreamBooth; with `--with_prior_preservation` besides, the classic alternative.
`grep -i lipschitz` on this file shows the whole method.
"""

import argparse
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, broadcast, set_seed
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from diffusers.utils import check_min_version, is_wandb_available, is_xformers_available
from huggingface_hub import ModelCard, ModelCardData, create_repo, hf_hub_download, upload_folder
from PIL import Image
from PIL.ImageOps import exif_transpose
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lipschitz_reg import InputMoment, LipschitzRegularizer, find_lora_adapters, record_inputs


if is_wandb_available():
    import wandb

# The first release in which pipelines take `dtype`.
check_min_version("0.40.0")

logger = get_logger(__name__)

PRECISIONS = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Learning rates and folders of diffusers' scripts; weights of the paper's authors, and for LoRA one that was found in
# the drawn world (docs/methods.md).
DEFAULTS = {
    "full": {"learning_rate": 5e-6, "lipschitz_weight": 500.0, "output_dir": "dreambooth-model"},
    "lora": {"learning_rate": 5e-4, "lipschitz_weight": 1.0, "output_dir": "lora-dreambooth-model"},
    "custom_diffusion": {"learning_rate": 1e-5, "lipschitz_weight": 175.0, "output_dir": "custom-diffusion-model"},
}
LORA_TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
}
# What comes of files that are missing, broken or of another model.
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
INTERPOLATION = {mode.name.lower(): mode for mode in Image.Resampling}
# Where drift is measured unless --drift_prompts_file says otherwise: no subject is named. Guidance needs the last.
DRIFT_PROMPTS = [
    "a photo of a dog",
    "a portrait of a woman with grey hair",
    "two bicycles leaning on a fence",
    "a bowl of fruit on a table",
    "a harbour at sunset",
    "a busy street in the rain",
    "a watercolor of a mountain village",
    "",
]
DRIFT_TIMESTEPS = 5
# Of --lipschitz_inputs: enough to meet all noise levels; and weights that were found in the drawn world.
RECORDED_STEPS, INPUTS_WEIGHTS = 10, {"full": 5.0, "lora": 0.2, "custom_diffusion": 0.08}
LORA_FILE = "pytorch_lora_weights.safetensors"
KEYS_VALUES_FILE, TOKENS_FILE = "custom_diffusion.safetensors", "learned_embeds.safetensors"


def stop(message: str | Exception) -> NoReturn:
    """Ends the run because of a mistake that its user can mend: one line on stderr for all processes, exit code 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{Path(__file__).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


class OneLineParser(argparse.ArgumentParser):
    """Reports a bad argument without repeating the whole usage."""

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


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description="DreamBooth for Stable Diffusion 1.x and 2.x with the Lipschitz penalty.")

    add = parser.add_argument_group("base model").add_argument
    add(
        "--pretrained_model_name_or_path",
        required=True,
        help="Stable Diffusion pipeline: a folder, or a name on the Hub.",
    )
    add("--revision", help="Git revision of the pipeline on the Hub.")
    add("--variant", help="Variant of its weight files, such as fp16; training is in float32 all the same.")
    add("--tokenizer_name", help="Folder or Hub name of another tokenizer than the pipeline's.")

    add = parser.add_argument_group("method").add_argument
    add(
        "--method",
        choices=list(DEFAULTS),
        default="full",
        help="What is trained. full: all weights. lora: small matrices that are added to those of attention."
        " custom_diffusion: keys and values of cross-attention, and the embeddings of --modifier_token.",
    )
    add("--rank", type=positive_int, help="lora: rank of the added matrices; default: 4.")
    add("--lora_alpha", type=positive_int, help="lora: they are scaled by this over the rank; default: the rank.")
    add("--lora_dropout", type=share, help="lora: share of their inputs left out in training; default: 0.")
    add("--use_dora", action="store_true", help="lora: train the lengths of the weights' rows apart from directions.")
    add("--modifier_token", help='custom_diffusion: new words, one for each concept: "<new1>+<new2>".')
    add("--initializer_token", help="custom_diffusion: words whose meaning they begin with; default: ktn+pll+ucd.")

    add = parser.add_argument_group("subject").add_argument
    add("--instance_data_dir", help="Folder with the photos of the subject.")
    add("--instance_prompt", help='What they show, a rare word included: "a photo of sks dog".')
    add(
        "--dataset_name",
        help="Photos that may have captions of their own, instead of --instance_data_dir: a data set on the Hub, or a"
        " folder with photos and metadata.jsonl, whose lines are as"
        ' {"file_name": "1.jpg", "text": "a photo of sks dog in the snow"}. Its part train is read, or its only one.',
    )
    add("--dataset_config_name", help="Configuration of the data set, where it has several.")
    add("--image_column", default="image", help="Its column of photos; in a folder, image.")
    add(
        "--caption_column",
        help="Its column of captions, above text. A photo's caption is its prompt; one without a caption, and all"
        " photos where this is not given, have --instance_prompt.",
    )
    add("--cache_dir", help="Folder for what of the data set is downloaded.")
    add(
        "--concepts_list",
        help="Several subjects instead of one: a JSON list of objects with instance_data_dir and instance_prompt, and"
        " for prior preservation class_data_dir and class_prompt.",
    )
    add("--resolution", type=positive_int, default=512, help="Side of the square training images, in pixels.")
    add(
        "--center_crop",
        action="store_true",
        help="Crop the middle of an image; otherwise a new random part each time.",
    )
    add("--random_flip", action="store_true", help="Mirror an image left to right, or not, by chance each time.")
    add(
        "--image_interpolation_mode",
        choices=list(INTERPOLATION),
        default="lanczos",
        help="How images are scaled to the resolution.",
    )
    add("--repeats", type=positive_int, default=1, help="Times that each photo comes in an epoch.")
    add("--dataloader_num_workers", type=count, default=0, help="Processes that read images; 0: the main one.")

    add = parser.add_argument_group("Lipschitz penalty").add_argument
    add(
        "--lipschitz_weight",
        type=non_negative,
        help="Strength of the pull towards the pretrained weights, lambda in the paper. Too small: other prompts start"
        " to show the subject; too large: the subject is not learned. 0 attaches nothing: plain DreamBooth. Default:"
        " 500 for full, 1 for lora, 175 for custom_diffusion.",
    )
    add(
        "--lipschitz_reduction",
        choices=["sum", "tensor_mean", "mean"],
        default="tensor_mean",
        help="Squared distances are summed as they are (sum), divided by the size of their tensor (tensor_mean: the"
        " authors' weights and the default mean this), or divided by the size of the model (mean).",
    )
    add(
        "--lipschitz_mode",
        choices=["coupled", "proximal", "projected"],
        default="coupled",
        help="coupled: the penalty's gradient joins that of the loss, as in the paper. proximal: a pull after each"
        " optimizer step, not rescaled by Adam. projected: no pull, but a bound on the distance, --lipschitz_radius.",
    )
    add(
        "--lipschitz_radius", type=positive, help="Largest L2 distance from the pretrained weights, in projected mode."
    )
    add(
        "--lipschitz_anchor_device",
        choices=["cpu"],
        help="cpu: keep the pretrained weights in host memory and stream them at each step; slower, saves GPU memory.",
    )
    add(
        "--lipschitz_anchor_model",
        help="Stable Diffusion pipeline to stay near to, a folder or a name on the Hub, where the base has been"
        " personalized before and drift shall not add up; default: the base itself.",
    )
    add(
        "--lipschitz_lora",
        choices=["delta", "factors"],
        help="lora: penalize what is added to the weights (delta, the default), or its two factors one by one"
        " (factors: the authors' way, with their weight of 1e-7 and --lipschitz_reduction sum).",
    )

    add(
        "--lipschitz_inputs",
        action="store_true",
        help="Measure the way of a weight from the base by how much it changes what its layer gives, for the inputs"
        " that the layer gets while the model draws --drift_prompts_file before training, in"
        f" {RECORDED_STEPS} steps each. In the drawn world other prompts drift less by that. The default weight is"
        f" then {', '.join(f'{weight:g} for {method}' for method, weight in INPUTS_WEIGHTS.items())}.",
    )

    add = parser.add_argument_group("prior preservation").add_argument
    add("--with_prior_preservation", action="store_true", help="Train on images of the subject's class too.")
    add("--class_data_dir", help="Folder of class images; those that are missing are drawn by the base model.")
    add("--class_prompt", help='What the class images show: "a photo of dog".')
    add("--num_class_images", type=positive_int, default=100, help="Class images to train on.")
    add("--prior_loss_weight", type=non_negative, default=1.0, help="Weight of the class images in the loss.")
    add("--sample_batch_size", type=positive_int, default=4, help="Class images drawn at a time, per process.")
    add(
        "--prior_generation_precision", choices=list(PRECISIONS), help="For drawing; default: fp16 on CUDA, else fp32."
    )

    add = parser.add_argument_group("training").add_argument
    add(
        "--output_dir",
        help="Folder for the result, checkpoints and logs; default: dreambooth-model, for lora lora-dreambooth-model,"
        " for custom_diffusion custom-diffusion-model.",
    )
    add("--seed", type=number(int, 0, below=2**32), help="Makes a run repeatable.")
    add("--train_text_encoder", action="store_true", help="Train, and penalize, the text encoder too.")
    add("--train_batch_size", type=positive_int, default=4, help="Photos in a batch, per process.")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="Batches per optimizer step.")
    add("--num_train_epochs", type=positive_int, default=1, help="Passes over the images.")
    add("--max_train_steps", type=positive_int, help="Optimizer steps; overrides --num_train_epochs.")
    add("--checkpointing_steps", type=positive_int, default=500, help="Optimizer steps between checkpoints.")
    add("--checkpoints_total_limit", type=positive_int, help="Checkpoints to keep; older ones are deleted.")
    add(
        "--resume_from_checkpoint",
        help='A checkpoint folder, or "latest" for the last one in --output_dir. The settings of optimizer and penalty'
        " are the checkpoint's then; the penalty still pulls to the pretrained model, which must be the same.",
    )
    add("--snr_gamma", type=non_negative, help="Min-SNR weighting of each sample's loss; 5.0 is usual.")
    add("--offset_noise", action="store_true", help="Add noise that is constant over an image, for its brightness.")
    add("--local_rank", type=int, default=-1, help="Set by some launchers; the variable LOCAL_RANK is what counts.")

    add = parser.add_argument_group("optimizer").add_argument
    add(
        "--learning_rate",
        type=non_negative,
        help="Peak learning rate; default: 5e-6, for lora 5e-4, for custom_diffusion 1e-5.",
    )
    add("--scale_lr", action="store_true", help="Multiply it by processes, accumulation steps and batch size.")
    schedules = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
    add("--lr_scheduler", choices=schedules, default="constant", help="How the learning rate changes.")
    add("--lr_warmup_steps", type=count, default=500, help="Steps of rising rate, in schedules that have them.")
    add("--lr_num_cycles", type=positive_int, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=non_negative, default=1.0, help="Exponent of polynomial.")
    add("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes, with a quarter of the state.")
    add("--adam_beta1", type=share, default=0.9, help="Decay of the mean of gradients.")
    add("--adam_beta2", type=share, default=0.999, help="Decay of the mean of their squares.")
    add(
        "--adam_weight_decay",
        type=non_negative,
        help="Pull towards zero. 1e-2, or 0 with the Lipschitz penalty, which pulls towards the pretrained weights.",
    )
    add("--adam_epsilon", type=non_negative, default=1e-8, help="Added to the denominator.")
    add(
        "--max_grad_norm",
        type=non_negative,
        default=1.0,
        help="Norm to which gradients of the denoising loss are clipped.",
    )
    add("--set_grads_to_none", action="store_true", help="Free gradients between steps instead of zeroing them.")

    add = parser.add_argument_group("memory and speed").add_argument
    add("--gradient_checkpointing", action="store_true", help="Less memory for activations, slower steps.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Overrides the configuration of accelerate.")
    add(
        "--enable_xformers_memory_efficient_attention",
        action="store_true",
        help="In place of PyTorch's own; CUDA only.",
    )
    add("--allow_tf32", action="store_true", help="Faster float32 products with a shorter mantissa; CUDA only.")

    add = parser.add_argument_group("validation, logging, Hub").add_argument
    add("--validation_prompt", help="Draw images of this prompt during training and at its end.")
    add("--num_validation_images", type=positive_int, default=4, help="Images drawn each time.")
    add("--validation_steps", type=positive_int, default=100, help="Optimizer steps from one time to the next.")
    add("--validation_epochs", type=positive_int, help="Epochs from one time to the next, in place of steps.")
    add(
        "--drift_every",
        type=positive_int,
        help="Optimizer steps from one measurement of drift to the next; default: never. Before training, the base"
        " draws a picture for each of a few prompts that do not name the subject; what it predicts on them, noised to"
        f" {DRIFT_TIMESTEPS} timesteps, is kept. Logged are drift/prediction, the mean change of that relative to its"
        " norm; with the penalty, drift/lipschitz, the largest change over lipschitz/drift; and drift/seconds. The"
        " base is --lipschitz_anchor_model, if there is one. Training goes the same way with and without.",
    )
    add(
        "--drift_prompts_file",
        help="Prompts for --drift_every and --lipschitz_inputs, one a line; default:"
        f" {len(DRIFT_PROMPTS)} of everyday things. Each costs 25 and {RECORDED_STEPS} steps of drawing, once, and"
        f" {DRIFT_TIMESTEPS} predictions in each measurement.",
    )
    samplers = ["DPMSolverMultistepScheduler", "DDPMScheduler"]
    add("--validation_scheduler", choices=samplers, default=samplers[0], help="What draws them, in 25 steps.")
    add("--report_to", default="tensorboard", help='"tensorboard", "wandb", "comet_ml", or "all" that are installed.')
    add("--logging_dir", default="logs", help="Folder of the logs, inside --output_dir.")
    add("--push_to_hub", action="store_true", help="Upload the trained pipeline.")
    add("--hub_token", help="Token for it; better, log in with `hf auth login`.")
    add("--hub_model_id", help="Repository to upload to; by default named after --output_dir.")

    args = parser.parse_args(input_args)

    check_method(args, parser.error)
    check_inputs(args, parser.error)
    for name, value in DEFAULTS[args.method].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if (args.lipschitz_mode == "projected") != (args.lipschitz_radius is not None):
        parser.error("--lipschitz_mode projected and --lipschitz_radius need each other")
    if args.adam_weight_decay is None:
        args.adam_weight_decay = 0.0 if args.lipschitz_weight > 0 else 1e-2
    if args.concepts_list is not None:
        for flag in ("instance_data_dir", "dataset_name", "instance_prompt", "class_data_dir", "class_prompt"):
            if getattr(args, flag) is not None:
                parser.error(f"--concepts_list has photos and prompts of its own: leave out --{flag}")
    elif args.instance_data_dir is None and args.dataset_name is None:
        parser.error("--instance_data_dir is needed, or --dataset_name, or --concepts_list")
    elif args.instance_data_dir is not None and args.dataset_name is not None:
        parser.error("--instance_data_dir and --dataset_name both give photos: leave out one")
    elif args.instance_prompt is None:
        parser.error("--instance_prompt is needed, what the photos show")
    elif args.with_prior_preservation:
        if args.class_data_dir is None:
            parser.error("--with_prior_preservation needs --class_data_dir, a folder for the class images")
        if args.class_prompt is None:
            parser.error("--with_prior_preservation needs --class_prompt, what the class images show")
    elif args.class_data_dir is not None or args.class_prompt is not None:
        warnings.warn("--class_data_dir and --class_prompt do nothing without --with_prior_preservation")
    for flag in ("dataset_config_name", "caption_column"):
        if getattr(args, flag) is not None and args.dataset_name is None:
            parser.error(f"--{flag} is about a data set: add --dataset_name")
    if args.drift_prompts_file is not None and args.drift_every is None and not args.lipschitz_inputs:
        parser.error("--drift_prompts_file does nothing without --drift_every or --lipschitz_inputs")
    if args.hub_token is not None and args.report_to in ("wandb", "all"):
        parser.error("--hub_token would be logged by wandb, for all to read: log in with `hf auth login` instead")
    return args


def check_method(args: argparse.Namespace, error: Callable[[str], NoReturn]) -> None:
    """Refuses flags that the method does not have, and fills in those that it has."""
    flags = {
        "lora": ["rank", "lora_alpha", "lora_dropout", "use_dora", "lipschitz_lora"],
        "custom_diffusion": ["modifier_token", "initializer_token"],
    }
    for method, names in flags.items():
        for name in names:
            if getattr(args, name) is not None and getattr(args, name) is not False and args.method != method:
                error(f"--{name} is for --method {method}, not for --method {args.method}")

    if args.method == "lora":
        args.rank = args.rank or 4
        args.lora_alpha = args.lora_alpha or args.rank
        args.lora_dropout = args.lora_dropout or 0.0
        args.lipschitz_lora = args.lipschitz_lora or "delta"
        if args.lipschitz_lora == "delta" and args.lipschitz_mode == "proximal":
            error("--lipschitz_mode proximal has no closed form for LoRA: use coupled, or --lipschitz_lora factors")
    if args.method == "custom_diffusion":
        if args.train_text_encoder:
            error("--method custom_diffusion trains new words, not the text encoder: leave out --train_text_encoder")
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
        if args.lipschitz_weight == 0:
            error("--lipschitz_anchor_model does nothing with --lipschitz_weight 0")
        if args.method == "lora" and (
            args.use_dora or args.lipschitz_lora == "factors" or args.lipschitz_mode != "coupled"
        ):
            error(
                "--lipschitz_anchor_model and --method lora need --lipschitz_mode coupled and --lipschitz_lora delta,"
                " and do without --use_dora"
            )


def check_inputs(args: argparse.Namespace, error: Callable[[str], NoReturn]) -> None:
    """What --lipschitz_inputs goes with, and its weight, which has a scale of its own."""
    if not args.lipschitz_inputs:
        return
    if args.lipschitz_mode != "coupled" or args.lipschitz_lora == "factors":
        error("--lipschitz_inputs needs --lipschitz_mode coupled, and --lipschitz_lora delta")
    usual = INPUTS_WEIGHTS[args.method]
    if args.lipschitz_weight is None:
        if args.lipschitz_reduction != "tensor_mean":
            error("--lipschitz_inputs has a default weight for --lipschitz_reduction tensor_mean: give one of yours")
        args.lipschitz_weight = usual
    elif args.lipschitz_weight == 0:
        error("--lipschitz_inputs does nothing with --lipschitz_weight 0")
    elif args.lipschitz_weight >= 20 * usual and args.lipschitz_reduction == "tensor_mean":
        warnings.warn(
            f"--lipschitz_inputs has weights of another scale: {args.lipschitz_weight:g} is"
            f" {args.lipschitz_weight / usual:.0f} times the default; leave out --lipschitz_weight to take that"
        )


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
            rows = json.loads(Path(args.concepts_list).read_text())
        except (OSError, ValueError) as error:
            stop(f"--concepts_list: cannot read {args.concepts_list}: {error}")
        needed = Concept._fields if args.with_prior_preservation else Concept._fields[:2]
        if not rows or not isinstance(rows, list):
            stop(f"--concepts_list: {args.concepts_list} is not a list of concepts")
        for index, row in enumerate(rows):
            missing = [name for name in needed if not (isinstance(row, dict) and isinstance(row.get(name), str))]
            if missing:
                stop(f"--concepts_list: concept {index} of {args.concepts_list} lacks {', '.join(missing)}")
    return [Concept(*(row.get(name) for name in Concept._fields)) for row in rows]


def build_accelerator(args: argparse.Namespace) -> Accelerator:
    """The `Accelerator`, once it is certain that this machine has what the arguments ask for."""
    # Before accelerate advises to install what is refused then.
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        stop("DEEPSPEED shards the weights, which this script does not support")
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=args.report_to,
            project_config=ProjectConfiguration(
                project_dir=args.output_dir, logging_dir=os.path.join(args.output_dir, args.logging_dir)
            ),
        )
    except ValueError as error:
        stop(error)
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        stop(f"{accelerator.distributed_type.value} shards the weights, which this script does not support")
    # accelerate lets this pass, and trains in float32.
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        stop("--mixed_precision fp16 needs a GPU: use bf16 or no on a CPU")
    if args.report_to == "wandb" and not is_wandb_available():
        stop("--report_to wandb needs wandb: pip install wandb")
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        stop("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes")
    if args.dataset_name is not None and importlib.util.find_spec("datasets") is None:
        stop("--dataset_name needs datasets: pip install datasets")
    if args.method == "lora" and importlib.util.find_spec("peft") is None:
        stop("--method lora needs peft: pip install peft")
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

    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    for library in (transformers, diffusers):
        library.utils.logging.disable_progress_bar()
        if not accelerator.is_main_process:
            library.utils.logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator


class Example(NamedTuple):
    """An image to train on, a file or what is in one, and its prompt."""

    image: Path | bytes
    prompt: str


def open_image(source: Path | bytes) -> Image.Image:
    """The image upright, as a camera meant it, and in RGB."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return exif_transpose(image).convert("RGB")


def check_image(flag: str, source: Path | bytes, name: str | Path) -> None:
    try:
        open_image(source)
    except Exception as error:  # Pillow's decoders raise almost anything
        stop(f"{flag}: {name} is broken or no image: {error}")


def find_images(flag: str, folder: str | Path) -> list[Path]:
    """The images of a folder, sorted by name and known to open; other things in it are named in a warning, once."""
    folder = Path(folder)
    if not folder.is_dir():
        stop(f"{flag}: there is no folder {folder}")
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    images, others = [], []
    for path in sorted(folder.iterdir()):
        is_image = path.is_file() and path.suffix.lower() in suffixes and not path.name.startswith(".")
        (images if is_image else others).append(path)
    for path in images:
        check_image(flag, path, path)
    if others:
        logger.warning(f"{flag}: ignored, as they are no images: {', '.join(path.name for path in others)}")
    return images


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
        stop(f"--dataset_name: {name} has no part train, but {', '.join(parts)}")
    # A part gets its name from whatever stands in a path: photos below a folder "test" are the part test.
    dataset = parts["train"] if "train" in parts else next(iter(parts.values()))
    columns = {flag: getattr(args, flag) for flag in ("image_column", "caption_column") if getattr(args, flag)}
    for flag, column in columns.items():
        if column not in dataset.column_names:
            stop(f"--{flag}: {name} has no column {column}; it has {', '.join(dataset.column_names)}")
    if not isinstance(dataset.features[args.image_column], datasets.Image):
        stop(f"--image_column: {args.image_column} of {name} holds no images")
    # Files as they are: the data set would decode each one anew, and cannot say which is broken.
    dataset = dataset.select_columns(list(set(columns.values())))
    dataset = dataset.cast_column(args.image_column, datasets.Image(decode=False))
    examples = []
    for number, row in enumerate(dataset):
        file, caption = row[args.image_column], row.get(args.caption_column)
        if file is None:
            stop(f"--image_column: row {number} of {name} has no image")
        source, label = file["bytes"] or Path(file["path"]), file["path"] or f"row {number} of {name}"
        check_image("--dataset_name", source, label)
        if caption is not None and not isinstance(caption, str):
            stop(f"--caption_column: that of {label} is {caption!r}, which is no text")
        examples.append(Example(source, caption or args.instance_prompt))
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
            photos.append([Example(path, concept.instance_prompt) for path in paths])
        found = args.with_prior_preservation and os.path.exists(concept.class_data_dir)
        class_images.append(find_images(flags[1], concept.class_data_dir) if found else [])
    prompts = distinct_prompts(photos)
    for token in args.modifier_token.split("+") if args.modifier_token else []:
        if not any(token in prompt for prompt in prompts):
            stop(f"--modifier_token: {token} is in no prompt of a photo, so that it would not be learned")
    return photos, class_images


def distinct_prompts(examples: list[list[Example]]) -> list[str]:
    return list(dict.fromkeys(example.prompt for group in examples for example in group))


def read_drift_prompts(args: argparse.Namespace) -> list[str]:
    if args.drift_prompts_file is None:
        return DRIFT_PROMPTS
    try:
        lines = Path(args.drift_prompts_file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        stop(f"--drift_prompts_file: cannot read {args.drift_prompts_file}: {error}")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        stop(f"--drift_prompts_file: {args.drift_prompts_file} holds no prompts")
    return prompts


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders `checkpoint-<step>` of a run, by step."""
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output_dir).glob("checkpoint-*")}
    return sorted((path for path in found if found[path]), key=lambda path: int(found[path][1]))


def find_checkpoint(args: argparse.Namespace, accelerator: Accelerator) -> Path | None:
    """The complete checkpoint to resume from, or `None` to start afresh."""
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint == "latest":
        checkpoints = list_checkpoints(args.output_dir)
        if not checkpoints:
            accelerator.print(f"No checkpoint in {args.output_dir} to resume from: training starts afresh.")
            return None
        checkpoint = checkpoints[-1]
    else:
        places = [Path(args.output_dir, args.resume_from_checkpoint), Path(args.resume_from_checkpoint)]
        checkpoint = next((place for place in places if place.is_dir()), None)
        if checkpoint is None:
            stop(f"--resume_from_checkpoint: there is no folder {' and no '.join(map(str, dict.fromkeys(places)))}")
        if checkpoint not in list_checkpoints(checkpoint.parent):
            stop(f"--resume_from_checkpoint: {checkpoint} is not named checkpoint-<step>")

    needed = ["optimizer.bin", "scheduler.bin", "random_states_0.pkl"]
    if args.method == "full":
        needed += ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
        if args.train_text_encoder:
            needed += ["text_encoder/config.json", "text_encoder/model.safetensors"]
    elif args.method == "lora":
        needed += [LORA_FILE]
    else:
        needed += [KEYS_VALUES_FILE, TOKENS_FILE] if args.modifier_token else [KEYS_VALUES_FILE]
    missing = [name for name in needed if not Path(checkpoint, name).is_file()]
    if missing:
        stop(f"--resume_from_checkpoint: {checkpoint} is incomplete, it lacks {', '.join(missing)}")
    processes = len(list(checkpoint.glob("random_states_*.pkl")))
    if processes != accelerator.num_processes:
        how = f"{processes} processes, not {accelerator.num_processes}: accelerate launch --num_processes={processes}"
        stop(f"--resume_from_checkpoint: {checkpoint} is of a run of {how}")
    lipschitz_state = Path(checkpoint, "custom_checkpoint_0.pkl")
    if lipschitz_state.is_file() != (args.lipschitz_weight > 0):
        how = "without the penalty: add" if args.lipschitz_weight > 0 else "with the penalty: leave out"
        stop(f"--resume_from_checkpoint: {checkpoint} was trained {how} --lipschitz_weight 0")
    if args.lipschitz_weight > 0:
        try:
            lipschitz_inputs = torch.load(lipschitz_state, weights_only=True).get("inputs", False)
        except (*LOAD_ERRORS, EOFError, pickle.UnpicklingError) as error:
            stop(f"--resume_from_checkpoint: cannot resume from {checkpoint}: {error}")
        if lipschitz_inputs != args.lipschitz_inputs:
            how = "with --lipschitz_inputs: add it" if lipschitz_inputs else "without --lipschitz_inputs: leave it out"
            stop(f"--resume_from_checkpoint: {checkpoint} was trained {how}")
    return checkpoint


def check_base(args: argparse.Namespace, flag: str = "--pretrained_model_name_or_path") -> None:
    """Stops unless it is a Stable Diffusion pipeline. Reads only its index, the first file to be downloaded."""
    source, index = getattr(args, flag[2:]), "model_index.json"
    revision = args.revision if source == args.pretrained_model_name_or_path else None
    try:
        path = Path(source, index) if os.path.isdir(source) else hf_hub_download(source, index, revision=revision)
        name = json.loads(Path(path).read_text())["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        stop(f"{flag}: found no Stable Diffusion pipeline at {source}: {error}")
    if name != "StableDiffusionPipeline":
        other = ": use train_dreambooth_lipschitz_sdxl.py" if name == "StableDiffusionXLPipeline" else ""
        stop(f"{flag}: {source} is a {name}, not a StableDiffusionPipeline (1.x or 2.x){other}")


def check_writable(flag: str, folder: str) -> None:
    """Stops unless the folder can be written to, or made. Makes nothing."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        stop(f"{flag}: cannot write to {place}: choose another folder")


def create_hub_repository(args: argparse.Namespace) -> str:
    """Creates the repository to push to, if there is none, before hours go into training. Returns its full name."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return create_repo(name, exist_ok=True, token=args.hub_token).repo_id
    except Exception as error:  # no connection, no login, no right, no valid name: each of another kind
        stop(f"--push_to_hub: cannot create {name} on the Hub: {error}")


def load_pipeline(
    args: argparse.Namespace, flag: str = "--pretrained_model_name_or_path", **options
) -> StableDiffusionPipeline:
    """The base, in float32 whatever its files hold: small updates would be lost in weights of fewer bits."""
    source = getattr(args, flag[2:])
    options = {"dtype": torch.float32, **options}
    try:
        if source == args.pretrained_model_name_or_path:
            options = {"revision": args.revision, "variant": args.variant, **options}
            if args.tokenizer_name:
                options["tokenizer"] = AutoTokenizer.from_pretrained(args.tokenizer_name, revision=args.revision)
        pipeline = StableDiffusionPipeline.from_pretrained(source, **options)
    except LOAD_ERRORS as error:
        stop(f"{flag}: cannot load {source}: {error}")
    for part, module in pipeline.components.items():
        weights = module.named_parameters() if isinstance(module, torch.nn.Module) else []
        lacking = [name for name, weight in weights if weight.is_meta]
        if lacking:
            stop(f"{flag}: the {part} of {source} lacks {lacking[0]}: its file is incomplete or of another version")
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
    dtype = PRECISIONS[args.prior_generation_precision or default]
    pipeline = load_pipeline(args, dtype=dtype, safety_checker=None, requires_safety_checker=False)
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
                image.save(folder / f".{name}")
                os.replace(folder / f".{name}", folder / name)
    accelerator.wait_for_everyone()
    return images + [path for index in indices for path in folder.glob(f"{index}-*.jpg")]


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


def add_tokens(args: argparse.Namespace, pipeline: StableDiffusionPipeline) -> None:
    """Teaches tokenizer and text encoder the new tokens, which begin as the mean of their initializer's tokens."""
    tokenizer, embedding = pipeline.tokenizer, pipeline.text_encoder.get_input_embeddings()
    ids, rows = [], []
    for token, initializer in zip(args.modifier_token.split("+"), args.initializer_token.split("+")):
        rows.append(embedding.weight[tokenizer.encode(initializer, add_special_tokens=False)].detach().mean(0))
        known = token in tokenizer.get_vocab()
        tokenizer.add_tokens(token)
        ids += tokenizer.encode(token, add_special_tokens=False)
        if known or len(ids) != len(rows):
            stop(f"--modifier_token: {token} is no new word to the tokenizer of the base, choose another")
    pipeline.text_encoder.set_input_embeddings(NewTokenEmbedding(embedding, ids[0], torch.stack(rows)))


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


def choose_parameters(
    args: argparse.Namespace, pipeline: StableDiffusionPipeline, dtype: torch.dtype
) -> dict[str, torch.nn.Module]:
    """
    Makes the parameters that the method trains, and only those, require gradients. They stay in float32; the others of
    these models go to `dtype`. Returns the models in which something is trained, by name.
    """
    trained = {"unet": pipeline.unet}
    if args.train_text_encoder or args.modifier_token:
        trained["text_encoder"] = pipeline.text_encoder
    if args.method == "full":
        return trained
    for model in trained.values():
        model.requires_grad_(False)
    if args.method == "lora":
        add_lora(args, trained)
    else:
        for name, parameter in pipeline.unet.named_parameters():
            parameter.requires_grad_(re.search(r"\.attn2\.to_[kv]\.", name) is not None)
        if args.modifier_token:
            add_tokens(args, pipeline)
    for model in trained.values():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    return trained


def load_models(
    args: argparse.Namespace, dtype: torch.dtype
) -> tuple[StableDiffusionPipeline, DDPMScheduler, dict[str, torch.nn.Module]]:
    """The base, with the validation scheduler in place; the scheduler for training; the models to train, by name."""
    pipeline = load_pipeline(args, safety_checker=None, requires_safety_checker=False)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    if noise_scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        stop(f"the base predicts {noise_scheduler.config.prediction_type}, which cannot be trained here")
    pipeline.scheduler = getattr(diffusers, args.validation_scheduler).from_config(pipeline.scheduler.config)
    pipeline.vae.requires_grad_(False)
    trained = choose_parameters(args, pipeline, dtype)
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
        if "text_encoder" in trained:
            # The other kind has no gradient where the inputs of the first layer have none, as in LoRA.
            pipeline.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    if args.enable_xformers_memory_efficient_attention:
        try:
            pipeline.unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError, RuntimeError) as error:
            stop(f"--enable_xformers_memory_efficient_attention: xformers does not run here: {error}")
    return pipeline, noise_scheduler, trained


class DreamBoothDataset(Dataset):
    """
    The photos of all concepts, each paired with a class image of its concept if there are any. An item is asked for by
    its index and the seed of its crops and flips; it is the prompts of the one or two images, and the images as a
    float tensor (1 or 2, 3, size, size) in [-1, 1].
    """

    def __init__(self, photos, class_images, size, center_crop=False, random_flip=False, interpolation="lanczos"):
        self.size = size
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.interpolation = INTERPOLATION[interpolation]
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
        return [example.prompt for example in examples], torch.stack([self.load(e.image, rng) for e in examples])

    def load(self, source, rng):
        image = open_image(source)
        scale = self.size / min(image.size)
        width, height = (max(self.size, int(side * scale)) for side in image.size)
        image = image.resize((width, height), self.interpolation)
        if self.random_flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        free = (width - self.size, height - self.size)
        left, top = (side // 2 if self.center_crop else rng.randint(0, side) for side in free)
        image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


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
        # Every iterator draws a number from it; from the global generator, that would shift a resumed run's noise.
        generator=torch.Generator(),
    )
    return accelerator.prepare(dataloader), sampler


def group_parameters(trained: dict[str, torch.nn.Module]) -> list[dict]:
    """The param groups. The penalty leaves new tokens alone: they have no pretrained value to be kept at."""
    named = [row for model in trained.values() for row in model.named_parameters() if row[1].requires_grad]
    groups = [{"params": [parameter for name, parameter in named if not is_new_token(name)]}]
    new = [parameter for name, parameter in named if is_new_token(name)]
    return groups + ([{"params": new, "lipschitz_weight": 0.0}] if new else [])


def build_optimizer(args: argparse.Namespace, accelerator: Accelerator, groups: list[dict]) -> torch.optim.Optimizer:
    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        import bitsandbytes

        optimizer_class = bitsandbytes.optim.AdamW8bit
    learning_rate = args.learning_rate
    if args.scale_lr:
        learning_rate *= args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    return optimizer_class(
        groups,
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def record_lipschitz_inputs(
    accelerator: Accelerator,
    pipeline: StableDiffusionPipeline,
    trained: dict[str, torch.nn.Module],
    prompts: list[str],
) -> dict[torch.Tensor, InputMoment]:
    """What the layers that train get while the base draws the prompts, the same in all processes."""
    try:
        with record_inputs(*trained.values()) as lipschitz_inputs:
            draw_latents(accelerator, pipeline, prompts, RECORDED_STEPS, torch.Generator().manual_seed(0))
    except ValueError as error:
        stop(f"--lipschitz_inputs: {error}")
    logger.info(f"Recorded what {len(lipschitz_inputs)} weights and biases get.")
    # Each process rounds in its own way, and from other penalties the copies of the model would part.
    return dict(zip(lipschitz_inputs, broadcast(list(lipschitz_inputs.values()))))


def attach_lipschitz(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: StableDiffusionPipeline,
    optimizer: torch.optim.Optimizer,
    trained: dict[str, torch.nn.Module],
    drift_prompts: list[str],
) -> LipschitzRegularizer:
    """The penalty, which pulls towards the weights as they are now, or to those of `lipschitz_anchor_model`."""
    adapters, lipschitz_anchors, lipschitz_inputs = [], {}, None
    if args.lipschitz_inputs:
        lipschitz_inputs = record_lipschitz_inputs(accelerator, pipeline, trained, drift_prompts)
    if args.method == "lora":
        adapters = [adapter for name in trained for adapter in find_lora_adapters(trained[name], prefix=name)]
    if args.lipschitz_anchor_model is not None:
        anchor_model = load_pipeline(
            args, "--lipschitz_anchor_model", safety_checker=None, requires_safety_checker=False
        )
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
                        f"--lipschitz_anchor_model: {args.lipschitz_anchor_model} has another shape than the base:"
                        f" {key} of its {name} is {shape}, not {tuple(parameter.shape)}"
                    )
                # In the bits of the base: what both models lost in rounding is no drift.
                lipschitz_anchors[parameter] = weights[key].to(parameter.dtype)
    return LipschitzRegularizer(
        optimizer,
        weight=args.lipschitz_weight,
        reduction=args.lipschitz_reduction,
        mode=args.lipschitz_mode,
        radius=args.lipschitz_radius,
        anchor_device=args.lipschitz_anchor_device,
        anchors=lipschitz_anchors,
        adapters=adapters,
        lora_form=args.lipschitz_lora or "delta",
        inputs=lipschitz_inputs,
    )


def encode_prompts(
    prompts: list[str], tokenizer: PreTrainedTokenizerBase, text_encoder: torch.nn.Module
) -> torch.Tensor:
    """Embeddings (prompts, tokens, width) of the prompts."""
    tokens = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    ids = tokens.input_ids.to(next(text_encoder.parameters()).device)
    # In parts: a data set may have thousands of captions.
    return torch.cat([text_encoder(part, return_dict=False)[0] for part in ids.split(64)])


def compute_loss(
    args: argparse.Namespace,
    noise_scheduler: DDPMScheduler,
    vae: AutoencoderKL,
    unet: torch.nn.Module,
    prompt_embeds: torch.Tensor,
    images: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The denoising loss of a batch.

    Args:
        prompt_embeds: (images, tokens, width), first of all photos, then of all class images.
        images: (batch, 1 or 2, 3, height, width), as the dataset gives them.

    Returns:
        The losses on the photos and on the class images (zero if there are none), each a mean over its samples.
    """
    batch_size, kinds = images.shape[:2]
    # All photos come first, then all class images: one pass through the models for both.
    images = images.transpose(0, 1).flatten(0, 1)
    with torch.no_grad():
        latents = vae.encode(images.to(vae.dtype)).latent_dist.sample().float() * vae.config.scaling_factor
    noise = torch.randn_like(latents)
    if args.offset_noise:
        noise += 0.1 * torch.randn_like(latents[:, :, :1, :1])
    timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, latents.shape[:1], device=latents.device)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    prediction = unet(noisy_latents, timesteps, prompt_embeds, return_dict=False)[0].float()

    v_prediction = noise_scheduler.config.prediction_type == "v_prediction"
    target = noise_scheduler.get_velocity(latents, noise, timesteps) if v_prediction else noise
    losses = F.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)
    if args.snr_gamma is not None:
        # Min-SNR (arXiv 2303.09556), for each sample by its own timestep. A loss on v is the loss on the image times
        # SNR + 1; one on the noise, times SNR.
        snr = compute_snr(noise_scheduler, timesteps)
        losses = losses * snr.clamp(max=args.snr_gamma) / (snr + 1 if v_prediction else snr)
    instance_loss = losses[:batch_size].mean()
    return instance_loss, losses[batch_size:].mean() if kinds == 2 else torch.zeros_like(instance_loss)


@contextmanager
def evaluating(pipeline: StableDiffusionPipeline) -> Iterator[None]:
    """No dropout, and no gradients, in the models of the pipeline that may be in training."""
    models = [model for model in (pipeline.unet, pipeline.text_encoder) if model is not None]
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    with torch.no_grad():
        yield
    for model, mode in zip(models, modes):
        model.train(mode)


def draw_latents(
    accelerator: Accelerator,
    base: StableDiffusionPipeline,
    prompts: list[str],
    num_inference_steps: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """A picture of each prompt before it is decoded: (prompts, channels, height, width), float32."""
    latents, validation_scheduler = [], base.scheduler
    base.scheduler = DPMSolverMultistepScheduler.from_config(base.scheduler.config)  # whatever draws the validation
    with evaluating(base), accelerator.autocast():
        *embeds, unconditional = encode_prompts([*prompts, ""], base.tokenizer, base.text_encoder).split(1)
        options = {"num_inference_steps": num_inference_steps, "generator": generator, "output_type": "latent"}
        for row in tqdm(embeds, desc="Base draws", disable=not accelerator.is_main_process):
            latents.append(base(prompt_embeds=row, negative_prompt_embeds=unconditional, **options).images.float())
    base.scheduler = validation_scheduler
    return torch.cat(latents)


class Probes(NamedTuple):
    """
    The points at which predictions are compared with the base's: a latent for each prompt, noised to each timestep.

    Args:
        prompt_embeds: (prompts, tokens, width), from the text encoder as it was before training.
        timesteps: (prompts * timesteps), those of the first prompt first.
        noisy_latents: (prompts * timesteps, channels, height, width), float32.
        base_noise: The noise that the base sees in them.
    """

    prompts: list[str]
    prompt_embeds: torch.Tensor
    timesteps: torch.Tensor
    noisy_latents: torch.Tensor
    base_noise: torch.Tensor | None = None


def build_probes(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: StableDiffusionPipeline,
    noise_scheduler: DDPMScheduler,
    prompts: list[str],
) -> Probes:
    """
    The probes, on latents that the base itself draws for the prompts: they are as it meets them, and away from the
    photos. They are the same in all runs from this base. Call it while the weights are those of the base.
    """
    began = time.perf_counter()
    base = pipeline
    if args.lipschitz_anchor_model is not None:
        base = load_pipeline(args, "--lipschitz_anchor_model", safety_checker=None, requires_safety_checker=False)
        base.scheduler = pipeline.scheduler
        base.to(accelerator.device)
    # A generator of its own: training goes the same way with and without probes.
    generator = torch.Generator().manual_seed(0)
    latents = draw_latents(accelerator, base, prompts, 25, generator).repeat_interleave(DRIFT_TIMESTEPS, dim=0)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    steps = noise_scheduler.config.num_train_timesteps
    timesteps = [int((i + 0.5) * steps / DRIFT_TIMESTEPS) for i in range(DRIFT_TIMESTEPS)] * len(prompts)
    timesteps = torch.tensor(timesteps, device=latents.device)
    with evaluating(pipeline), accelerator.autocast():
        prompt_embeds = encode_prompts(prompts, pipeline.tokenizer, pipeline.text_encoder)
    probes = Probes(prompts, prompt_embeds, timesteps, noise_scheduler.add_noise(latents, noise, timesteps))
    probes = probes._replace(base_noise=predict_noise(args, accelerator, base, noise_scheduler, probes))
    logger.info(f"The base's predictions on {len(latents)} probes took {time.perf_counter() - began:.1f} s.")
    return probes


def predict_noise(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: StableDiffusionPipeline,
    noise_scheduler: DDPMScheduler,
    probes: Probes,
) -> torch.Tensor:
    """The noise that the pipeline sees in the noisy latents of the probes: of their shape, float64, on the CPU."""
    prompt_embeds, noisy, timesteps = probes.prompt_embeds, probes.noisy_latents, probes.timesteps
    with evaluating(pipeline), accelerator.autocast():
        if pipeline.text_encoder is not None:
            prompt_embeds = encode_prompts(probes.prompts, pipeline.tokenizer, pipeline.text_encoder)
        prompt_embeds = prompt_embeds.repeat_interleave(DRIFT_TIMESTEPS, dim=0)
        # No more at a time than in training, which the memory is known to hold.
        batches = zip(*(rows.split(args.train_batch_size) for rows in (noisy, timesteps, prompt_embeds)))
        output = torch.cat([pipeline.unet(*batch, return_dict=False)[0].float() for batch in batches])
    if noise_scheduler.config.prediction_type == "v_prediction":
        # v = sqrt(a) noise - sqrt(1 - a) latents (arXiv 2202.00512), noisy = sqrt(a) latents + sqrt(1 - a) noise.
        a = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        output = a.sqrt() * output + (1 - a).sqrt() * noisy
    return output.cpu().double()


def measure_drift(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: StableDiffusionPipeline,
    noise_scheduler: DDPMScheduler,
    probes: Probes,
    lipschitz: LipschitzRegularizer | None,
) -> dict[str, float]:
    """
    How far predictions have moved from the base's: `drift/prediction`, the mean of ||eps - eps_base|| / ||eps_base||
    over the probes; with the penalty `drift/lipschitz`, the largest ||eps - eps_base|| / ||theta - theta_base||, which
    the denoiser's Lipschitz constant in its parameters (arXiv 2505.19519) cannot be below; `drift/seconds` it took.
    """
    began = time.perf_counter()
    noise = predict_noise(args, accelerator, pipeline, noise_scheduler, probes)
    change, size = (row.flatten(1).norm(dim=1) for row in (noise - probes.base_noise, probes.base_noise))
    logs = {"drift/prediction": (change / size).mean().item()}
    lipschitz_drift = lipschitz.metrics()["lipschitz/drift"] if lipschitz else 0.0
    if lipschitz_drift > 0:
        logs["drift/lipschitz"] = change.max().item() / lipschitz_drift
    return {**logs, "drift/seconds": time.perf_counter() - began}


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
            configs[f"{name}_lora_adapter_metadata"] = {**model.peft_config["default"].to_dict(), "lora_dropout": 0.0}
        StableDiffusionPipeline.save_lora_weights(folder, weight_name=LORA_FILE, **layers, **configs)
    else:
        weights = {name: parameter.detach() for name, parameter in trained_keys_values(trained["unet"]).items()}
        save_file(weights, folder / KEYS_VALUES_FILE, metadata={"format": "pt"})
        if args.modifier_token:
            rows = trained["text_encoder"].get_input_embeddings().new.detach().clone()
            tokens = dict(zip(args.modifier_token.split("+"), rows.unbind()))
            save_file(tokens, folder / TOKENS_FILE, metadata={"format": "pt"})


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
                raise ValueError("its LoRA is of other parts: compare --train_text_encoder and --use_dora")
            set_peft_model_state_dict(model, own, adapter_name="default")
    else:
        weights = load_file(Path(folder, KEYS_VALUES_FILE))
        for name, parameter in trained_keys_values(trained["unet"]).items():
            parameter.copy_(weights[name])
        if args.modifier_token:
            tokens = load_file(Path(folder, TOKENS_FILE))
            rows = [tokens[token] for token in args.modifier_token.split("+")]
            trained["text_encoder"].get_input_embeddings().new.copy_(torch.stack(rows))


def register_checkpoint_format(
    args: argparse.Namespace, accelerator: Accelerator, trained: dict[str, torch.nn.Module]
) -> None:
    """Makes accelerate's states hold what was trained as `save_trained` writes it."""

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
    except (*LOAD_ERRORS, EOFError, pickle.UnpicklingError) as error:
        stop(f"--resume_from_checkpoint: cannot resume from {checkpoint}: {error}")
    return int(checkpoint.name.split("-")[1])


def save_checkpoint(args: argparse.Namespace, accelerator: Accelerator, global_step: int) -> None:
    """
    Writes `checkpoint-<step>`, then deletes what is beyond the limit. A folder has such a name from when it is
    complete until it begins to be deleted: a run that is killed leaves complete checkpoints only.
    """
    checkpoint = Path(args.output_dir, f"checkpoint-{global_step}")
    unfinished = Path(args.output_dir, "tmp-checkpoint")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
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


def validation_prompts(args: argparse.Namespace) -> list[str]:
    return [args.validation_prompt or "", ""]


def log_validation(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: StableDiffusionPipeline,
    prompt_embeds: torch.Tensor | None,
    global_step: int,
) -> list[Image.Image]:
    """
    Draws the validation images, sends them to the trackers as of this step, and returns them. `prompt_embeds` are
    those of `validation_prompts`; where the text encoder is there still, as it is trained, they are encoded anew.
    """
    # A generator of its own: training goes the same way with and without validation.
    generator = torch.Generator(accelerator.device)
    generator.manual_seed(args.seed) if args.seed is not None else generator.seed()
    with evaluating(pipeline):
        if pipeline.text_encoder is not None:
            prompt_embeds = encode_prompts(validation_prompts(args), pipeline.tokenizer, pipeline.text_encoder)
        with accelerator.autocast():
            images = [
                pipeline(
                    prompt_embeds=prompt_embeds[:1],
                    negative_prompt_embeds=prompt_embeds[1:],
                    num_inference_steps=25,
                    generator=generator,
                ).images[0]
                for _ in range(args.num_validation_images)
            ]
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_images("validation", np.stack(images), global_step, dataformats="NHWC")
        if tracker.name == "wandb":
            captioned = [
                wandb.Image(image, caption=f"{i}: {args.validation_prompt}") for i, image in enumerate(images)
            ]
            tracker.log({"validation": captioned}, step=global_step)
    return images


def loading_code(args: argparse.Namespace, repo_id: str | None) -> str:
    """The calls that load what was trained, for someone who has diffusers and not this file."""
    base, result = json.dumps(args.pretrained_model_name_or_path), json.dumps(repo_id or args.output_dir)
    lines = ["import torch", "from diffusers import DiffusionPipeline"]
    source = result
    if args.method != "full":
        kinds = [(name, getattr(args, name)) for name in ("revision", "variant")]
        source = ", ".join([base, *(f"{name}={json.dumps(value)}" for name, value in kinds if value is not None)])
    loading = f"pipeline = DiffusionPipeline.from_pretrained({source}, dtype=torch.float32)"
    if args.method == "full":
        return "\n".join([*lines, "", loading])
    if args.method == "lora":
        return "\n".join([*lines, "", loading, f"pipeline.load_lora_weights({result})"])
    lines += ["from huggingface_hub import snapshot_download"] if repo_id else []
    lines += ["from safetensors.torch import load_file", ""]
    lines += [f"folder = snapshot_download({result})" if repo_id else f"folder = {result}"]
    lines += [loading, f'pipeline.unet.load_state_dict(load_file(f"{{folder}}/{KEYS_VALUES_FILE}"), strict=False)']
    if args.modifier_token:
        lines += [f'tokens = load_file(f"{{folder}}/{TOKENS_FILE}")']
        lines += ["pipeline.load_textual_inversion(list(tokens.values()), token=list(tokens))"]
    return "\n".join(lines)


def save_model_card(args: argparse.Namespace, repo_id: str | None, images: list[Image.Image], folder: Path) -> None:
    base, name = args.pretrained_model_name_or_path, repo_id or Path(args.output_dir).resolve().name
    given = {key: value for key, value in vars(args).items() if value is not None and value is not False}
    settings = {key: value for key, value in given.items() if key.startswith("lipschitz_")}
    if args.lipschitz_inputs and args.drift_prompts_file is not None:
        settings["drift_prompts_file"] = args.drift_prompts_file
    tags = "text-to-image dreambooth lipschitz stable-diffusion stable-diffusion-diffusers diffusers-training"
    data = ModelCardData(
        # The Hub refuses a base that is not on it.
        base_model=None if os.path.isdir(base) else base,
        library_name="diffusers",
        tags=tags.split() + ([args.method] if args.method != "full" else []),
        instance_prompt=args.instance_prompt,
        **settings,
    )
    for index, image in enumerate(images):
        image.save(Path(folder, f"image_{index}.png"))
    how = "with" if args.lipschitz_weight > 0 else "without"
    gallery = "\n".join(f"![{args.validation_prompt}](./image_{index}.png)" for index in range(len(images)))
    parts = {
        "full": "U-Net",
        "lora": f"LoRA of rank {args.rank} on the U-Net",
        "custom_diffusion": "keys and values of cross-attention",
    }
    trained = parts[args.method] + (" and the text encoder" if args.train_text_encoder else "")
    trained += f", and the new words `{args.modifier_token}`" if args.modifier_token else ""
    text = f"""# {name}

`{base}`, personalized by DreamBooth {how} the Lipschitz penalty of
[Preserve and Personalize](https://arxiv.org/abs/2505.19519). Prompt of the subject: `{args.instance_prompt}`

```python
{loading_code(args, repo_id)}
```

Trained: {trained}. Penalty: `{json.dumps(settings)}`

{gallery}
"""
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n").save(Path(folder, "README.md"))


def save_result(
    args: argparse.Namespace, trained: dict[str, torch.nn.Module], images: list[Image.Image], repo_id: str | None
) -> None:
    """
    Writes the whole pipeline, or what LoRA or Custom Diffusion adds to the base, and its model card to `output_dir`,
    in place of one that is there. The index, without which no pipeline loads, goes first from the old one and comes
    last with the new one: what loads is complete.
    """
    output_dir, unfinished = Path(args.output_dir), Path(args.output_dir, "tmp-pipeline")
    shutil.rmtree(unfinished, ignore_errors=True)
    if args.method == "full":
        load_pipeline(args, **trained).save_pretrained(unfinished)
    else:
        save_trained(args, trained, unfinished)
    save_model_card(args, repo_id, images, unfinished)
    output_dir.joinpath("model_index.json").unlink(missing_ok=True)
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "model_index.json"):
        target = output_dir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    unfinished.rmdir()


def main(args: argparse.Namespace) -> None:
    # What can be wrong with the arguments is found before anything is written or loaded.
    accelerator = build_accelerator(args)
    concepts = read_concepts(args)
    args.instance_prompt = "; ".join(concept.instance_prompt for concept in concepts)  # in logs and model card
    checkpoint = find_checkpoint(args, accelerator)
    photos, class_images = find_examples(args, concepts)
    drift_prompts = read_drift_prompts(args)
    check_writable("--output_dir", args.output_dir)
    for concept, images in zip(concepts, class_images if args.with_prior_preservation else []):
        if len(images) < args.num_class_images:
            check_writable("--concepts_list" if args.concepts_list else "--class_data_dir", concept.class_data_dir)
    check_base(args)
    if args.lipschitz_anchor_model is not None:
        check_base(args, "--lipschitz_anchor_model")
    repo_id = create_hub_repository(args) if args.push_to_hub and accelerator.is_main_process else None

    if args.with_prior_preservation:
        folders = {}  # concepts may share one
        for concept, images in zip(concepts, class_images):
            if concept.class_data_dir not in folders:
                folders[concept.class_data_dir] = sample_class_images(args, accelerator, concept, images)
        class_images = [[Example(path, c.class_prompt) for path in folders[c.class_data_dir]] for c in concepts]

    weight_dtype = PRECISIONS.get(accelerator.mixed_precision, torch.float32)
    pipeline, noise_scheduler, trained = load_models(args, weight_dtype)
    dataloader, sampler = build_dataloader(args, accelerator, photos, class_images)
    steps_per_epoch = math.ceil(len(dataloader) / args.gradient_accumulation_steps)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    validation_steps = args.validation_epochs * steps_per_epoch if args.validation_epochs else args.validation_steps

    groups = group_parameters(trained)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = build_optimizer(args, accelerator, groups)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        # accelerate advances the schedule once per process at each step.
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=max_train_steps * accelerator.num_processes,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    register_checkpoint_format(args, accelerator, trained)
    *prepared, optimizer, lr_scheduler = accelerator.prepare(*trained.values(), optimizer, lr_scheduler)
    models = dict(zip(trained, prepared))

    pipeline.vae.to(accelerator.device)
    if weight_dtype != torch.float32:  # diffusers warns of every cast
        pipeline.vae.to(weight_dtype)
    if "text_encoder" not in trained:
        pipeline.text_encoder.to(accelerator.device, dtype=weight_dtype)
    lipschitz = None
    if args.lipschitz_weight > 0:
        # Before the checkpoint is loaded: the anchors are the pretrained weights.
        lipschitz = attach_lipschitz(args, accelerator, pipeline, optimizer, trained, drift_prompts)
        accelerator.register_for_checkpointing(lipschitz)
    probes = None
    if args.drift_every is not None and accelerator.is_main_process:
        # Before the checkpoint is loaded, as the lipschitz anchors: predictions of the pretrained weights.
        probes = build_probes(args, accelerator, pipeline, noise_scheduler, drift_prompts)
    prompts = distinct_prompts(photos + class_images)
    validation_embeds = None
    if "text_encoder" not in trained:
        # Each prompt is encoded once in the whole run, and the text encoder makes room.
        with torch.no_grad():
            prompt_embeds = encode_prompts(prompts, pipeline.tokenizer, pipeline.text_encoder)
            validation_embeds = encode_prompts(validation_prompts(args), pipeline.tokenizer, pipeline.text_encoder)
        pipeline.text_encoder = None
        gc.collect()
        torch.cuda.empty_cache()

    # Each process draws noise of its own.
    if args.seed is not None:
        set_seed(args.seed, device_specific=True)
    global_step = load_checkpoint(accelerator, checkpoint) if checkpoint else 0
    os.makedirs(args.output_dir, exist_ok=True)
    config = {key: value for key, value in vars(args).items() if key != "hub_token"}
    accelerator.init_trackers("dreambooth", config=config)
    logger.info(f"Training from step {global_step} to {max_train_steps} on {sum(map(len, photos))} photos.")

    progress_bar = tqdm(
        total=max_train_steps, initial=global_step, desc="Steps", disable=not accelerator.is_main_process
    )
    first_epoch, done = divmod(global_step, steps_per_epoch)
    losses, images = [], []
    for model in prepared:
        model.train()
    for epoch in range(first_epoch, math.ceil(max_train_steps / steps_per_epoch)):
        sampler.epoch = epoch
        skipped = done * args.gradient_accumulation_steps if epoch == first_epoch else 0
        for batch_prompts, batch in accelerator.skip_first_batches(dataloader, skipped):
            if global_step >= max_train_steps:
                break
            with accelerator.accumulate(*prepared):
                batch_prompts = [prompt for kind in batch_prompts for prompt in kind]  # photos, then class images
                if "text_encoder" in trained:
                    prompts = list(dict.fromkeys(batch_prompts))
                    prompt_embeds = encode_prompts(prompts, pipeline.tokenizer, models["text_encoder"])
                rows = [prompts.index(prompt) for prompt in batch_prompts]
                instance_loss, prior_loss = compute_loss(
                    args, noise_scheduler, pipeline.vae, models["unet"], prompt_embeds[rows], batch
                )
                accelerator.backward(instance_loss + args.prior_loss_weight * prior_loss)
                losses.append(torch.stack([instance_loss, prior_loss]).detach())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                    lipschitz_penalty = lipschitz.penalty() if lipschitz else 0.0
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad(set_to_none=args.set_grads_to_none)
            if not accelerator.sync_gradients:
                continue

            global_step += 1
            instance_loss, prior_loss = accelerator.reduce(torch.stack(losses).mean(0), "mean").tolist()
            losses.clear()
            logs = {"denoising_loss": instance_loss + args.prior_loss_weight * prior_loss}
            logs["loss"] = logs["denoising_loss"] + lipschitz_penalty
            if args.with_prior_preservation:
                logs["prior_loss"] = prior_loss
            if lipschitz:
                logs["lipschitz/penalty"] = lipschitz_penalty
            logs["lr"] = lr_scheduler.get_last_lr()[0]
            accelerator.log(logs, step=global_step)
            progress_bar.update(1)
            progress_bar.set_postfix(loss=logs["loss"], lr=logs["lr"])

            if global_step % args.checkpointing_steps == 0:
                save_checkpoint(args, accelerator, global_step)
            if global_step % validation_steps == 0 or global_step == max_train_steps:
                if lipschitz:
                    lipschitz_drift = {name: value for name, value in lipschitz.metrics().items() if "drift" in name}
                    accelerator.log(lipschitz_drift, step=global_step)
                if args.validation_prompt is not None and accelerator.is_main_process:
                    images = log_validation(args, accelerator, pipeline, validation_embeds, global_step)
            if probes and (global_step % args.drift_every == 0 or global_step == max_train_steps):
                drift = measure_drift(args, accelerator, pipeline, noise_scheduler, probes, lipschitz)
                accelerator.log(drift, step=global_step)

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_result(args, trained, images, repo_id)
        logger.info(f"Saved the result in {args.output_dir}")
        if args.push_to_hub:
            upload_folder(
                repo_id=repo_id,
                folder_path=args.output_dir,
                commit_message="DreamBooth with the Lipschitz penalty",
                ignore_patterns=["checkpoint-*", "tmp-*"],
                token=args.hub_token,
            )
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
