# Measures what personalization did to Stable Diffusion or SDXL: subject, prompts, and drift from the base. One file.
# Draws and measures; trains nothing, and knows nothing of how the model was trained.
"""
Was the subject learned, are prompts still obeyed, and how far has the rest of the model moved? In one command:

    accelerate launch evaluate_dreambooth.py \
        --pretrained_model_name_or_path=sks-dog --base_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --instance_data_dir=photos --instance_token=sks --class_name=dog

The personalized model is a pipeline, a LoRA or a Custom Diffusion. Both models draw the same prompts from the same
noise. `--output_dir` gets report.html, metrics.json, images.csv, two picture grids and the pictures; a stopped run
goes on where it was. What the numbers mean: docs/evaluation.md.
"""

import argparse
import base64
import csv
import functools
import gc
import hashlib
import html
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable
from datetime import date, timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn


# Copied from train_dreambooth_lipschitz.py
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
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image, ImageCms, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.ImageOps import exif_transpose, fit
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm


# Copied from train_dreambooth_lipschitz.py
def build_logger() -> logging.Logger:
    """The logger of this file. One process speaks for all."""
    logger = logging.getLogger(__name__)
    logger.addFilter(lambda record: os.environ.get("RANK", "0") == "0")
    return logger


# Copied from train_dreambooth_lipschitz.py
logger = build_logger()

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Copied from train_dreambooth_lipschitz.py
LORA_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"
# Copied from train_dreambooth_lipschitz.py
KEYS_VALUES_FILE, TOKENS_FILE = "custom_diffusion.safetensors", "learned_embeds.safetensors"
# The file that a personalized model has says what kind it is.
KINDS = {"model_index.json": "pipeline", LORA_FILE: "lora", KEYS_VALUES_FILE: "custom_diffusion"}
MODELS = ("base", "personalized")
# Beside the pictures: what they were drawn with.
RECORD = "drawn_with.json"
FLAGS = {"base": "--base_model_name_or_path", "personalized": "--pretrained_model_name_or_path"}
TRAINED_PARTS = ("unet", "text_encoder", "text_encoder_2")
# Copied from train_dreambooth_lipschitz.py
# Raised when files are missing, broken or of another model.
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
# Copied from train_dreambooth_lipschitz.py
# Photos from phones. Pillow needs another package to read them.
HEIF_SUFFIXES = {".heic", ".heif", ".hif"}
# Copied from train_dreambooth_lipschitz.py
# Twice as many pixels are refused: 536 million, which cameras do not have yet.
Image.MAX_IMAGE_PIXELS = 1 << 28
MISFIT = "it was made for another base: name its own with --base_model_name_or_path"

# What is asked of the subject, when no --prompts_file is given. The first part is for all.
PLACES = [
    "a photo of a {token} {class}",
    "a {token} {class} under falling snow",
    "a {token} {class} among ferns in a rainforest",
    "a {token} {class} on wet sand, waves behind it",
    "a {token} {class} in front of a red brick wall",
    "a {token} {class} on a kitchen table",
    "a {token} {class} at night, lit by street lamps",
    "a {token} {class} on a mountain top above the clouds",
    "a {token} {class} in a field of lavender",
    "a {token} {class} on the steps of an old temple",
    "a {token} {class} in the back of a pickup truck",
    "an oil painting of a {token} {class}",
    "a pencil sketch of a {token} {class}",
]
SUBJECT_PROMPTS = {
    "object": [
        *PLACES,
        "a {token} {class} floating in a swimming pool",
        "a {token} {class} on a stack of books",
        "a {token} {class} half buried in autumn leaves",
        "a {token} {class} held in two hands",
        "a {token} {class} made of glass",
        "a blue {token} {class}",
        "a golden {token} {class}",
    ],
    "live": [
        *PLACES,
        "a {token} {class} swimming in a lake",
        "a {token} {class} asleep on a sofa",
        "a {token} {class} wearing a straw hat",
        "a {token} {class} wearing a green raincoat",
        "a {token} {class} dressed as an astronaut",
        "a {token} {class} jumping over a fence",
        "a blue {token} {class}",
    ],
}
# Prompts that do not name the subject: its class, where forgetting begins, and things far from it.
OTHER_PROMPTS = [
    "a photo of a {class}",
    "a {class} in a garden",
    "two of a kind: a {class} and another {class}",
    "a drawing of a {class}",
    "a portrait of an old fisherman",
    "a child on a swing",
    "a crowd at a train station",
    "a bowl of soup with bread beside it",
    "a slice of chocolate cake on a plate",
    "a bicycle leaning on a yellow door",
    "a sailing ship in a storm",
    "a lighthouse at dusk",
    "a street in the rain at night",
    "a wooden bridge over a river in autumn",
    "a desert under a starry sky",
    "a city seen from an airplane",
    "a horse running through shallow water",
    "an owl on a branch",
    "a bouquet of tulips in a jar",
    "an empty classroom",
    "a watercolor of a village by the sea",
    "an abstract painting in red and blue",
    "a robot playing chess",
    "a castle made of ice",
]


# Copied from train_dreambooth_lipschitz.py
def stop(message: str | Exception) -> NoReturn:
    """Ends the run because of a mistake that its user can mend: one line on stderr for all processes, exit code 2."""
    for bar in list(getattr(tqdm, "_instances", [])):  # or the message would follow the bar on its line
        bar.close()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        line = " ".join(str(message).split())
        line = line if len(line) <= 1000 else f"{line[:1000]} ..."  # libraries name each of a thousand tensors
        print(f"{Path(__file__).name}: error: {line}", file=sys.stderr)
    sys.exit(2)


# Copied from train_dreambooth_lipschitz.py
class DefaultsFormatter(argparse.HelpFormatter):
    """Adds the default to a help text that does not tell it."""

    def _get_help_string(self, action):
        # By identity: 0 is a default, and equal to False.
        none = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        if none or "default" in action.help.lower():
            return action.help
        return f"{action.help.rstrip('.')}; default: %(default)s."


# Copied from train_dreambooth_lipschitz.py
class OneLineParser(argparse.ArgumentParser):
    """Reports a bad argument without repeating the whole usage."""

    def __init__(self, **options):
        super().__init__(usage="%(prog)s [options]", formatter_class=DefaultsFormatter, **options)

    def error(self, message):
        stop(message)


# Copied from train_dreambooth_lipschitz.py
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


# Copied from train_dreambooth_lipschitz.py
positive_int, count = number(int, 1), number(int, 0)
# Copied from train_dreambooth_lipschitz.py
user_path = os.path.expanduser  # bash leaves the ~ of --flag=~/folder as it is


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description="Subject fidelity, prompt alignment and drift of a personalized model.")

    add = parser.add_argument_group("models").add_argument
    add(
        "--pretrained_model_name_or_path",
        type=user_path,
        required=True,
        help="Personalized model: folder or Hub name of an SD or SDXL pipeline, or of what goes onto the base: a LoRA"
        f" ({LORA_FILE}, or the path of its file) or a Custom Diffusion ({KEYS_VALUES_FILE}, {TOKENS_FILE}).",
    )
    add(
        "--base_model_name_or_path",
        type=user_path,
        required=True,
        help="The pipeline that it was made from: a folder or Hub name.",
    )
    add("--revision", help="Git revision of the base on the Hub.")
    add("--variant", help="Variant of the base's weight files, such as fp16.")

    add = parser.add_argument_group("subject").add_argument
    add("--instance_data_dir", type=user_path, required=True, help="Folder with the photos of the subject.")
    add("--instance_token", required=True, help="The word that names it: sks.")
    add("--class_name", required=True, help="What it is: dog.")
    add(
        "--subject_type",
        choices=list(SUBJECT_PROMPTS),
        default="object",
        help="Which of two lists of prompts: for things, or for people and animals.",
    )
    add(
        "--prompts_file",
        type=user_path,
        help='Prompts of your own, one a line: "a {token} {class} in the snow". {0} and {1} mean the same; the file'
        " prompts_and_classes.txt of the DreamBooth data set is understood.",
    )
    add(
        "--other_prompts_file",
        type=user_path,
        help="Prompts that do not name the subject, one a line, {class} allowed.",
    )

    add = parser.add_argument_group("pictures").add_argument
    add("--num_images_per_prompt", type=positive_int, default=4, help="Each from a seed of its own.")
    add("--num_inference_steps", type=positive_int, default=50, help="Denoising steps of a picture.")
    add("--guidance_scale", type=float, default=7.5, help="Classifier-free guidance.")
    add("--resolution", type=positive_int, help="Side of the pictures in pixels; by default the base's own.")
    add("--seed", type=int, default=0, help="First of the seeds of the pictures.")
    add("--batch_size", type=positive_int, default=4, help="Pictures at a time, per process.")
    add("--precision", choices=list(PRECISIONS), help="For drawing; default: fp16 on CUDA, else fp32.")

    add = parser.add_argument_group("measures").add_argument
    add(
        "--clip_model",
        type=user_path,
        default="openai/clip-vit-base-patch32",
        help="For CLIP-I, CLIP-T: a folder or Hub name.",
    )
    add(
        "--dino_model",
        type=user_path,
        default="facebook/dino-vits16",
        help="For DINO; any vision transformer with a class token.",
    )
    add(
        "--probes",
        type=positive_int,
        default=16,
        help="Prompts that do not name the subject, and as many that do, on which predictions are compared.",
    )
    add(
        "--probe_timesteps",
        type=number(int, 2),
        default=50,
        help="Denoising steps for each of these pictures; predictions are compared at all of them.",
    )

    add = parser.add_argument_group("output").add_argument
    add(
        "--output_dir",
        type=user_path,
        default="evaluation",
        help="Folder for the report, the figures and the pictures.",
    )
    add(
        "--base_images_dir",
        type=user_path,
        help="Folder of the base's pictures, which evaluations of many models can share.",
    )
    add("--overwrite", action="store_true", help="Draw afresh what was drawn with other models or settings.")
    add("--report_to", choices=["tensorboard", "wandb", "all"], help="Also log there, or to all that are installed.")
    # The words that a Custom Diffusion learned, with spaces between them: `check_models` finds them.
    parser.set_defaults(new_words="")
    args = parser.parse_args(input_args)
    for name in ("instance_token", "class_name"):
        if not getattr(args, name).strip():
            parser.error(f"--{name} must not be empty")
    if not math.isfinite(args.guidance_scale):
        parser.error(f"--guidance_scale must be a number, not {args.guidance_scale}")
    if args.resolution and args.resolution % 8:
        parser.error(f"--resolution must be a multiple of 8, not {args.resolution}")
    return args


# A user hears of mistakes before the imports that take seconds.
if __name__ == "__main__":
    ARGS = parse_args()

import diffusers
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration, gather_object
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import check_min_version, is_wandb_available
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from lipschitz_reg import Drift, Recording, record


# The first release in which pipelines take `dtype`.
check_min_version("0.40.0")

PIPELINES = {cls.__name__: cls for cls in (StableDiffusionPipeline, StableDiffusionXLPipeline)}


# Copied from train_dreambooth_lipschitz.py
def check_processes(accelerator: Accelerator) -> None:
    """On a CPU, accelerate needs a variable that torchrun does not set: without it, each runs as the only one."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > accelerator.num_processes:
        stop(f"these {processes} processes do not find each other: start them by accelerate launch, not by torchrun")


def build_accelerator(args: argparse.Namespace) -> Accelerator:
    """The `Accelerator`; sets `args.precision` to what this machine draws in."""
    # One process may wait long for another that has more left to draw.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    try:
        accelerator = Accelerator(
            log_with=args.report_to,
            project_config=ProjectConfiguration(
                project_dir=args.output_dir, logging_dir=os.path.join(args.output_dir, "logs")
            ),
            kwargs_handlers=[patience],
        )
    except ValueError as error:
        stop(error)
    check_processes(accelerator)
    args.precision = args.precision or ("fp16" if accelerator.device.type == "cuda" else "fp32")
    if args.precision == "fp16" and accelerator.device.type == "cpu":
        stop("--precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    if args.report_to == "wandb" and not is_wandb_available():
        stop("--report_to wandb needs wandb: pip install wandb")
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    for library in (transformers, diffusers):
        library.utils.logging.disable_progress_bar()
        # What they log as an error, line by line, they also raise: `stop` says it in one.
        library.utils.logging.set_verbosity(logging.CRITICAL)
    return accelerator


# What is wrong with the input is found here, before anything is loaded


# Copied from train_dreambooth_lipschitz.py
def read_text(flag: str, path: str | Path) -> str:
    """What is in a text file, UTF-8 with or without a byte-order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        stop(f"{flag}: cannot read {path}: {error}")


# Copied from train_dreambooth_lipschitz.py
@functools.cache
def register_heif() -> bool:
    """Lets Pillow read photos from phones, if pillow-heif is installed. Returns whether it is."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    import pillow_heif

    pillow_heif.register_heif_opener()
    return True


# Copied from train_dreambooth_lipschitz.py
@functools.lru_cache(maxsize=16)
def to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    """From the colours of a profile to sRGB. Raises `PyCMSError` or `OSError` if it is of another mode, or broken."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


# Copied from train_dreambooth_lipschitz.py
class RangeError(ValueError):
    """The numbers of an image have no range that could be shown."""


# Copied from train_dreambooth_lipschitz.py
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


# Copied from train_dreambooth_lipschitz.py
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


# Copied from train_dreambooth_lipschitz.py
def check_images(flag: str, sources: dict[str, Path | bytes]) -> None:
    """Stops unless all of these images can be shown; names those that cannot."""
    faults = {name: fault_of(source) for name, source in sources.items()}
    if any(faults.values()):
        stop(f"{flag}: {'; '.join(f'{name} {fault}' for name, fault in faults.items() if fault)}")


# Copied from train_dreambooth_lipschitz.py
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


# Copied from train_dreambooth_lipschitz.py
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


def find_photos(folder: str) -> list[Path]:
    """The photos, sorted by name and known to open; other things in the folder are named in a warning."""
    photos = find_images("--instance_data_dir", folder)
    if not photos:
        stop(f"--instance_data_dir: there is no image in {folder}")
    if len(photos) == 1:
        logger.warning("With one photo, how alike photos are cannot be measured: what is compared to it stays empty.")
    return photos


def open_photo(path: Path) -> Image.Image:
    """The middle square of a photo, which is what training sees of it."""
    image = open_image(path)
    return fit(image, (min(image.size),) * 2)


def read_prompts(flag: str, path: str, subject_type: str) -> list[str]:
    """The templates in a file, with `{token}` and `{class}`, whether plain lines or DreamBooth's own format."""
    text = read_text(flag, path)
    if ".format(" in text:
        # prompts_and_classes.txt: two lists in Python under headings, after a table of classes.
        heading = "Live Subject Prompts" if subject_type == "live" else "Object Prompts"
        sections = re.split(r"^((?:Object|Live Subject) Prompts)\s*$", text, flags=re.MULTILINE)
        text = dict(zip(sections[1::2], sections[2::2])).get(heading, text)
        templates = [match[1] for match in re.findall(r"""(["'])(.+?)\1\.format\(""", text)]
    else:
        templates = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not templates:
        stop(f"{flag}: there is no prompt in {path}")
    return [template.replace("{0}", "{token}").replace("{1}", "{class}") for template in templates]


def fill(template: str, token: str, class_name: str) -> str:
    return " ".join(template.replace("{token}", token).replace("{class}", class_name).split())


def build_prompts(args: argparse.Namespace) -> dict[str, list[dict[str, str]]]:
    """
    The prompts of both kinds, "subject" and "other": each with `text`, which is drawn, and `clip_text`, which CLIP-T
    compares with: the same without the special token, as CLIP does not know it (DreamBooth, arXiv 2208.12242).
    """
    subject, other = SUBJECT_PROMPTS[args.subject_type], OTHER_PROMPTS
    if args.prompts_file:
        subject = read_prompts("--prompts_file", args.prompts_file, args.subject_type)
    if args.other_prompts_file:
        other = read_prompts("--other_prompts_file", args.other_prompts_file, args.subject_type)
    names = re.compile(rf"(?<!\w){re.escape(args.instance_token)}(?!\w)", re.IGNORECASE)
    for template in subject:
        for placeholder in ("{token}", "{class}"):
            if placeholder not in template:
                stop(f'--prompts_file: "{template}" lacks {placeholder}: write "a {{token}} {{class}} in the snow"')
    for template in other:
        if "{token}" in template or names.search(template):
            stop(f'--other_prompts_file: "{template}" names the subject, which no prompt there may do')
    for template in [*subject, *other]:
        unknown = set(re.findall(r"\{.*?\}", template)) - {"{token}", "{class}"}
        if unknown:
            stop(f'the prompt "{template}" holds {unknown.pop()}: only {{token}} and {{class}} are filled in')

    def both(templates):
        texts = [(fill(t, args.instance_token, args.class_name), fill(t, "", args.class_name)) for t in templates]
        return [{"text": text, "clip_text": clip_text} for text, clip_text in texts]

    return {"subject": both(subject), "other": both(other)}


def source_of(args: argparse.Namespace, model: str) -> tuple[str, str | None]:
    """Folder or Hub name of one of the two models, and its revision."""
    if model == "base":
        return args.base_model_name_or_path, args.revision
    return args.pretrained_model_name_or_path, None


def is_lora(path: str) -> bool:
    """Whether a file has weights of LoRA, by the names that any trainer gives them."""
    if Path(path).suffix != ".safetensors":
        return False
    try:
        with safe_open(path, framework="np") as file:
            return any("lora" in name.lower() for name in file.keys())
    except LOAD_ERRORS as error:
        stop(f"{FLAGS['personalized']}: {path} is broken: {error}")


def find_file(args: argparse.Namespace, model: str, name: str) -> Path | None:
    """
    A file of a model in a folder or on the Hub, or the model itself if it is a LoRA's file; `None` if the model, or
    offline its cache, has no such file.
    """
    source, revision = source_of(args, model)
    if os.path.isdir(source):
        return Path(source, name) if Path(source, name).is_file() else None
    if os.path.isfile(source):
        if model == "personalized" and is_lora(source):
            return Path(source) if name == LORA_FILE else None
        what = "save it as a folder, by diffusers' from_single_file and save_pretrained"
        stop(f"{FLAGS[model]}: {source} is a file: name the folder that it is in, or, if it is a whole model, {what}")
    try:
        return Path(hf_hub_download(source, name, revision=revision))
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        stop(f"{FLAGS[model]}: there is no folder {source}, and from the Hub: {error}")


def check_models(args: argparse.Namespace) -> None:
    """
    Stops unless both are pipelines of one architecture, or the personalized one goes onto the base; reads
    configurations only. Sets `args.pipeline_class`, `args.scheduler_class`, `args.kind`, one of `KINDS`, and
    `args.new_words`.
    """

    def read(model, name):
        path = find_file(args, model, name)
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path else None
        except ValueError as error:
            stop(f"{FLAGS[model]}: {path} is broken: {error}")

    classes = {model: (read(model, "model_index.json") or {}).get("_class_name") for model in MODELS}
    found = [file for file in KINDS if find_file(args, "personalized", file)]
    if len(found) > 1:
        names = f"{FLAGS['personalized']}: {args.pretrained_model_name_or_path}"
        stop(f"{names} holds several models, {' and '.join(found)}: leave only one there")
    args.kind = KINDS[found[0] if found else "model_index.json"]
    for model in MODELS if args.kind == "pipeline" else MODELS[:1]:
        source, _ = source_of(args, model)
        if classes[model] is None:
            files = KINDS if model == "personalized" else ["model_index.json"]
            if os.path.isdir(source):
                more = " (for a LoRA, you can also give the file itself)" * (model == "personalized")
                stop(f"{FLAGS[model]}: {source} is no pipeline: it has no {' and no '.join(files)}{more}")
            there = f"nor a model of that name with {' or '.join(files)} on the Hub (offline: in its cache)"
            stop(f"{FLAGS[model]}: there is no folder {source}, {there}")
        if classes[model] not in PIPELINES:
            stop(f"{FLAGS[model]}: {source} is a {classes[model]}, not one of {', '.join(PIPELINES)}")
    scheduler = read("base", "scheduler/scheduler_config.json")
    if scheduler is None:
        stop(f"{FLAGS['base']}: {args.base_model_name_or_path} has no scheduler/scheduler_config.json")
    args.pipeline_class, args.scheduler_class = classes["base"], read("base", "model_index.json")["scheduler"][1]
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        stop(f"{FLAGS['base']}: it predicts {prediction_type}, not epsilon or v_prediction")
    most = scheduler.get("num_train_timesteps", 1000)
    for name in ("num_inference_steps", "probe_timesteps"):
        if getattr(args, name) > most:
            stop(f"--{name} must be at most {most}, which is all that the base has")
    if args.kind == "custom_diffusion":
        path, words = find_file(args, "personalized", KEYS_VALUES_FILE), []
        try:
            load_file(path)
            if path := find_file(args, "personalized", TOKENS_FILE):
                words = read_new_words(path)
        except (*LOAD_ERRORS, TypeError) as error:
            stop(f"{FLAGS['personalized']}: {path} is broken: {error}")
        if words and not set(words) & set(args.instance_token.split()):
            stop(f"--instance_token {args.instance_token} is none of the words that were learned: {', '.join(words)}")
        args.new_words = " ".join(words)
    if args.kind != "pipeline":
        return

    another = f"{FLAGS['base']}: {args.base_model_name_or_path} is of another architecture than the model"
    if classes["personalized"] != classes["base"]:
        stop(f"{another}: a {classes['base']}, not a {classes['personalized']}")
    for part in TRAINED_PARTS:
        base, personalized = (read(model, f"{part}/config.json") or {} for model in MODELS)
        # Versions of the libraries write more keys or fewer.
        shared = {key for key in base.keys() & personalized.keys() if not key.startswith("_")} - {"sample_size"}
        if part != "unet":
            shared &= {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
        for key in sorted(shared):
            if base[key] != personalized[key]:
                stop(f"{another}: its {part} has {key} {base[key]}, not {personalized[key]}")
    own_type = (read("personalized", "scheduler/scheduler_config.json") or {}).get("prediction_type", "epsilon")
    if own_type != prediction_type:
        stop(f"{another}: it predicts {prediction_type}, not {own_type}")


def read_new_words(path: Path) -> list[str]:
    """The words whose embeddings are in the file: SD's tensors bear their names, SDXL's have them in the metadata."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()["tokens"].split("+") if "clip_l" in file.keys() else list(file.keys())


def load_judges(args: argparse.Namespace) -> dict[str, tuple]:
    """The models that measure, "clip" and "dino": each with its image processor and CLIP's with its tokenizer."""
    judges = {}
    for judge, name in (("clip", args.clip_model), ("dino", args.dino_model)):
        flag, loaders = f"--{judge}_model", [AutoModel, AutoImageProcessor]
        try:
            config = AutoConfig.from_pretrained(name)
            if (judge == "clip") != hasattr(config, "text_config"):
                kind = "model of images and text" if judge == "clip" else "model of images alone"
                stop(f"{flag}: {name} is a {config.model_type}, not a {kind}")
            loaders += [AutoTokenizer] * (judge == "clip")
            model, *processors = (loader.from_pretrained(name) for loader in loaders)
        except LOAD_ERRORS as error:
            stop(f"{flag}: cannot load {name}: {error}")
        if judge == "dino" and not any(key.endswith("cls_token") for key, _ in model.named_parameters()):
            stop(f"{flag}: {name}, a {config.model_type}, has no class token: name a vision transformer that has one")
        judges[judge] = (model.float().eval(), *processors)
    return judges


# Pictures


# Copied from train_dreambooth_lipschitz.py
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


def load_pipeline(args: argparse.Namespace, model: str, dtype: torch.dtype) -> Any:
    """One of the two models, "base" or "personalized", on the CPU. The base's sampler draws for both."""
    whole = "personalized" if (model, args.kind) == ("personalized", "pipeline") else "base"
    source, revision = source_of(args, whole)
    options = {"safety_checker": None, "requires_safety_checker": False}
    if args.pipeline_class == "StableDiffusionXLPipeline":
        options = {"add_watermarker": False}
    options |= {"revision": revision, "variant": args.variant if whole == "base" else None, "dtype": dtype}
    files = {key: options[key] for key in ("dtype", "revision", "variant")}
    parts = json.loads(find_file(args, whole, "model_index.json").read_text(encoding="utf-8"))
    try:
        for name in [name for name in TRAINED_PARTS[1:] if name in parts]:
            options |= load_text_encoder(source, name, parts[name], **files)
        pipeline = PIPELINES[args.pipeline_class].from_pretrained(source, **options)
        if whole == "personalized":
            pipeline.scheduler = getattr(diffusers, args.scheduler_class).from_pretrained(
                args.base_model_name_or_path, subfolder="scheduler", revision=args.revision
            )
    except LOAD_ERRORS as error:
        stop(f"cannot load the {whole} model {source}: {error}")
    pipeline.set_progress_bar_config(disable=True)
    if model != whole:
        load_onto_base(args, pipeline)
    return pipeline


def load_onto_base(args: argparse.Namespace, pipeline: Any) -> None:
    """Puts a LoRA or a Custom Diffusion onto the base, in place."""
    try:
        (load_lora if args.kind == "lora" else load_custom_diffusion)(args, pipeline)
    except LOAD_ERRORS as error:
        error = MISFIT if "size mismatch" in str(error) else error
        names = args.pretrained_model_name_or_path, args.base_model_name_or_path
        stop("cannot load the personalized model {} onto {}: {}".format(*names, error))


def load_lora(args: argparse.Namespace, pipeline: Any) -> None:
    """Puts a LoRA onto the base. Raises `ValueError` if a part of it finds no place, which diffusers only warns of."""
    source = {"pretrained_model_name_or_path_or_dict": args.pretrained_model_name_or_path, "weight_name": LORA_FILE}
    pipeline.load_lora_weights(**source)
    in_file, *_ = pipeline.lora_state_dict(**source, unet_config=pipeline.unet.config)
    modules = [getattr(pipeline, part) for part in TRAINED_PARTS if hasattr(pipeline, part)]
    in_place = [name for module in modules for name, _ in module.named_parameters()]
    there, loaded = (sum("lora" in name for name in names) for names in (in_file, in_place))
    if not loaded or loaded < there:
        raise ValueError(f"{MISFIT} (of its {there} matrices, {loaded} have a place here)")


def load_custom_diffusion(args: argparse.Namespace, pipeline: Any) -> None:
    """
    Puts keys, values and new words in their places, by the calls that the model's card shows. The file of the words
    has SD's by their names, (width,). For SDXL it has those of both encoders, (words, width), as `clip_l` and
    `clip_g`. Raises `ValueError` if the base has no such place.
    """
    keys_values, tokens = (find_file(args, "personalized", file) for file in (KEYS_VALUES_FILE, TOKENS_FILE))
    unknown = pipeline.unet.load_state_dict(load_file(keys_values), strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"{MISFIT} (which has no {unknown[0]})")
    if tokens is None:
        return
    rows, words = load_file(tokens), read_new_words(tokens)
    if "clip_l" not in rows:
        pipeline.load_textual_inversion([rows[word] for word in words], token=words)
        return
    for name, suffix in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = (getattr(pipeline, part + suffix) for part in ("text_encoder", "tokenizer"))
        pipeline.load_textual_inversion(list(rows[name]), token=words, text_encoder=encoder, tokenizer=tokenizer)
    # Old configurations take the token of the highest number for the end of the prompt: a new word now.
    pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id


def wording(args: argparse.Namespace, model: str, text: str) -> str:
    """A prompt as this model is asked: the base without the words that Custom Diffusion learned and it cannot read."""
    if model == "base":
        for word in sorted(args.new_words.split(), key=len, reverse=True):  # as one may begin with another
            text = text.replace(word, "")
    return " ".join(text.split())


# Copied from train_dreambooth_lipschitz.py
def words_cut_off(prompt: str, tokenizers: list[PreTrainedTokenizerBase]) -> list[str]:
    """The words at the end of a prompt that a text encoder does not read in full."""
    words = prompt.split()
    kept = len(words)
    for tokenizer in tokenizers:
        while kept and len(tokenizer(" ".join(words[:kept]), verbose=False).input_ids) > tokenizer.model_max_length:
            kept -= 1
    return words[kept:]


def check_prompts(args: argparse.Namespace, pipeline: Any, images: list[dict[str, Any]]) -> None:
    """Warns of each prompt that the text encoder does not read to its end, and stops where that loses the subject."""
    tokenizers = [getattr(pipeline, name) for name in ("tokenizer", "tokenizer_2") if hasattr(pipeline, name)]
    for prompt, kind in {image["text"]: image["kind"] for image in images}.items():
        if not (cut := words_cut_off(prompt, tokenizers)):
            continue
        where = f"the text encoder ignores {' '.join(cut)!r} in {prompt!r}"
        if kind == "subject" and set(args.instance_token.split()) & set(cut):
            stop(f"--prompts_file: {where}, which names the subject: shorten it")
        logger.warning(f"{where[0].upper()}{where[1:]}.")


def plan_images(args: argparse.Namespace, prompts: dict[str, list[dict[str, str]]]) -> list[dict[str, Any]]:
    """What both models draw: kind, prompt, seed and file name of each picture. No picture depends on another one."""
    images = []
    for kind, texts in prompts.items():
        for prompt_index, prompt in enumerate(texts):
            for image_index in range(args.num_images_per_prompt):
                seed = args.seed + prompt_index * args.num_images_per_prompt + image_index
                file = f"{kind}/{prompt_index:03d}-{image_index}.png"
                images.append({"kind": kind, "prompt_index": prompt_index, **prompt, "seed": seed, "file": file})
    return images


def digest_weights(args: argparse.Namespace, model: str) -> str:
    """Tells a model from another one written to the same place later: a hash of its files, or its Hub commit."""
    source, _ = source_of(args, model)
    kind = args.kind if model == "personalized" else "pipeline"
    entry = find_file(args, model, next(file for file in KINDS if KINDS[file] == kind))
    if not os.path.exists(source):  # on the Hub
        return entry.parent.name
    files = [entry, *Path(source).glob(TOKENS_FILE)] if kind == "custom_diffusion" else [entry]
    if kind == "pipeline":
        parts = [Path(source, name) for name in sorted(json.loads(entry.read_text(encoding="utf-8")))]
        files = [path for part in parts if part.is_dir() for path in sorted(part.iterdir())]
    digest = hashlib.sha256()
    for path in [path for path in files if path.suffix in (".safetensors", ".bin", ".json")]:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:16]


def check_folders(args: argparse.Namespace, images: list[dict[str, Any]]) -> dict[Path, dict[str, Any]]:
    """
    The folders that are to be emptied before drawing, and the record of settings that each then gets. Stops if one
    holds pictures of another model or other settings, unless they are to be overwritten, or files of someone else.
    """
    names = ("num_images_per_prompt", "seed", "num_inference_steps", "guidance_scale", "resolution", "precision")
    settings, stale = {name: getattr(args, name) for name in names}, {}
    for model, folder in picture_folders(args).items():
        for kind in ("subject", "other"):
            texts = [wording(args, model, image["text"]) for image in images if image["kind"] == kind]
            settings[f"{kind} prompts"] = texts
        settings[f"{model} model"] = digest_weights(args, model)
        # A folder's digest is that of all its variants; a result has one of its own.
        settings["variant"] = None if (model, args.kind) == ("personalized", "pipeline") else args.variant
        record, files = folder / RECORD, [path for path in folder.rglob("*") if path.is_file()]
        if files and record not in files:
            stop(f"{folder} holds files that this script has not written: choose another folder")
        if len(files) > 1:
            old = json.loads(record.read_text())
            changed = [name for name in settings if old.get(name) != settings[name]]
            if not changed:
                continue
            was, now = old.get(changed[0]), settings[changed[0]]
            if isinstance(now, list):
                was, now = next(pair for pair in zip_longest(was or [], now) if pair[0] != pair[1])
            remedy = "choose another --output_dir, or add --overwrite to draw them afresh"
            if model == "base" and args.base_images_dir:
                remedy = "choose another --base_images_dir; --overwrite would delete what other evaluations share"
            if not args.overwrite:
                stop(f"{folder} holds pictures that were drawn with another {changed[0]} ({was}, now {now}): {remedy}")
        stale[folder] = dict(settings)
    return stale


def prepare_folders(stale: dict[Path, dict[str, Any]]) -> None:
    """Empties the folders that `check_folders` found and leaves the records there; for one process to call."""
    for folder, settings in stale.items():
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            folder.joinpath(RECORD).write_text(json.dumps(settings))
        except OSError as error:
            stop(f"cannot write to {folder}, choose another one: {error}")


def picture_folders(args: argparse.Namespace) -> dict[str, Path]:
    pictures = Path(args.output_dir, "images")
    return {"base": Path(args.base_images_dir or pictures / "base"), "personalized": pictures / "personalized"}


def in_batches(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def own_share(accelerator: Accelerator, items: list) -> list:
    """This process's part; the parts of all, one after the other, are the whole, each item once."""
    i, n = accelerator.process_index, accelerator.num_processes
    return items[len(items) * i // n : len(items) * (i + 1) // n]


def draw(args: argparse.Namespace, pipeline: Any, model: str, images: list[dict], steps: int, output_type: str) -> Any:
    """Draws some of the planned pictures, together: a seed for each, and noise from the CPU."""
    return pipeline(
        [wording(args, model, image["text"]) for image in images],
        num_inference_steps=steps,
        guidance_scale=args.guidance_scale,
        height=args.resolution,
        width=args.resolution,
        generator=[torch.Generator().manual_seed(image["seed"]) for image in images],
        output_type=output_type,
    ).images


def draw_images(
    args: argparse.Namespace, accelerator: Accelerator, pipeline: Any, model: str, images: list[dict], folder: Path
) -> None:
    """
    Draws the pictures that are not on disk. Each comes out the same for any number of processes, and up to rounding
    for any batch size and device.
    """
    # Always the same batches, as a picture's last bits depend on its batch: equal models draw equal pictures.
    missing = [
        batch
        for batch in in_batches(images, args.batch_size)
        if not all((folder / image["file"]).is_file() for image in batch)
    ]
    # Before any process has drawn more of them.
    accelerator.wait_for_everyone()
    own, broken = own_share(accelerator, missing), []
    for batch in tqdm(own, desc=f"{model}: pictures", disable=not accelerator.is_main_process):
        arrays = draw(args, pipeline, model, batch, args.num_inference_steps, "np")
        if not np.isfinite(arrays).all():
            broken.append(f'draws NaN instead of pictures ("{batch[0]["text"]}")')
            break
        for image, array in zip(batch, arrays):
            path = folder / image["file"]
            path.parent.mkdir(exist_ok=True)
            unfinished = path.with_name(f".{path.name}")
            Image.fromarray((array * 255).round().astype(np.uint8)).save(unfinished, format="png")
            unfinished.replace(path)
    stop_at_nan(args, model, broken)


def stop_at_nan(args: argparse.Namespace, model: str, broken: list[str]) -> None:
    """Stops all processes if any of them says what was no number. The weights are, as `check_weights` found."""
    broken = gather_object(broken)
    if broken:
        remedy = "draw in --precision bf16 or fp32" if args.precision == "fp16" else "an earlier checkpoint may do"
        stop(f"the {model} model {broken[0]}: its numbers overflow in {args.precision}; {remedy}")


# Drift of predictions, and distance of parameters


NAN = "predicts NaN instead of noise"


def plan_probes(args: argparse.Namespace, images: list[dict]) -> list[list[dict]]:
    """Batches of one kind each: `probes` of its pictures, evenly chosen. Predictions are compared along the way."""
    batches = []
    for kind in ("other", "subject"):
        those = [image for image in images if image["kind"] == kind]
        count = min(args.probes, len(those))
        batches += in_batches([those[i * len(those) // count] for i in range(count)], args.batch_size)
    return batches


def probe_scheduler(base: Any) -> Any:
    """
    DDPM's ancestral sampler, for which `kl_bound` holds. It would clip latents unless told not to. A base with an EDM
    sampler, which has no `alphas_cumprod`, keeps its own.
    """
    if not hasattr(base.scheduler, "alphas_cumprod"):
        return base.scheduler
    exact = {"clip_sample": False, "thresholding": False, "variance_type": "fixed_small"}
    return DDPMScheduler.from_config(base.scheduler.config, **exact)


def show_progress(accelerator: Accelerator, model: str, batches: list) -> Iterable:
    return tqdm(batches, desc=f"{model}: predictions", disable=not accelerator.is_main_process)


def record_base(
    args: argparse.Namespace, accelerator: Accelerator, base: Any, batches: list[list[dict]]
) -> list[Recording]:
    """What the base predicts while it draws each batch of pictures."""
    recordings, broken = [], []
    for batch in show_progress(accelerator, "base", batches):
        try:
            with record(base.unet, layers=False, guidance_scale=args.guidance_scale) as recording:
                with recording.held_out():
                    draw(args, base, "base", batch, args.probe_timesteps, "latent")
        except ValueError:  # not finite
            broken.append(NAN)
            break
        recordings.append(recording)
    stop_at_nan(args, "base", broken)
    return recordings


def measure_drift(
    args: argparse.Namespace,
    accelerator: Accelerator,
    personalized: Any,
    batches: list[list[dict]],
    recordings: list[Recording],
) -> list[tuple[str, int, Drift]]:
    """
    The kind and number of the pictures in each batch, and how far predictions have moved while these are drawn. The
    personalized model gets its own words and is led along the base's path.
    """
    scheduler = personalized.scheduler
    measured = []
    for batch, recording in zip(show_progress(accelerator, "personalized", batches), recordings):
        run = functools.partial(draw, args, personalized, "personalized", batch, args.probe_timesteps, "latent")
        kind = batch[0]["kind"]
        bounded = kind == "other" and isinstance(scheduler, DDPMScheduler)
        try:
            drift = recording.drift(personalized.unet, run=run, scheduler=scheduler if bounded else None)
        except ValueError as error:
            stop(f"the personalized model cannot be compared with its base: {error}")
        measured.append((kind, len(batch), drift))
    stop_at_nan(args, "personalized", [NAN for *_, drift in measured if not math.isfinite(drift.prediction)])
    return measured


def average_drift(measured: list[tuple[str, int, Drift]]) -> dict[str, dict]:
    """Means over pictures by kind: of predictions, of guided predictions, and of the bound for other prompts."""
    result = {}
    for kind in ("other", "subject"):
        sizes, drifts = zip(*((size, drift) for its_kind, size, drift in measured if its_kind == kind))

        def mean(value: Callable[[Drift], float | None]) -> float | None:
            values = [value(drift) for drift in drifts]
            return None if None in values else float(np.average(values, weights=sizes))

        by_timestep = {t: mean(lambda drift: drift.by_timestep[t]) for t in drifts[0].by_timestep}
        result[kind] = {
            "mean": mean(lambda drift: drift.prediction),
            "guided": mean(lambda drift: drift.guided_prediction),
            "by_timestep": {int(t) if t == int(t) else t: value for t, value in by_timestep.items()},
        }
        if kind == "other":
            result[kind]["kl_bound"] = mean(lambda drift: drift.kl_bound)
    return result


def block_of(name: str) -> str:
    """The block of a parameter: "down_blocks.0", "mid_block", "layers.3", "embeddings", ..."""
    first, second, *_ = name.removeprefix("text_model.").removeprefix("encoder.").split(".")
    return f"{first}.{second}" if second.isdigit() else first


def check_weights(args: argparse.Namespace, model: str, pipeline: Any) -> None:
    """Stops if a weight is missing, NaN or infinite, before it has cost hours of drawing."""
    name, _ = source_of(args, model)
    modules = {part: module for part, module in pipeline.components.items() if isinstance(module, torch.nn.Module)}
    for part, module in modules.items():
        for key, weight in module.named_parameters():
            if weight.is_meta:
                stop(f"{FLAGS[model]}: the {part} of {name} lacks {key}: its file is incomplete or of another version")
            if not weight.isfinite().all():
                stop(f"{FLAGS[model]}: the {part} of {name} is NaN or infinite in {key}: take an earlier checkpoint")


def parameter_drift(args: argparse.Namespace) -> dict[str, dict]:
    """
    How far the weights of U-Net and text encoders have moved, as `compare_parameters` has it. In float32 on the CPU, a
    LoRA merged into the base; new words, of which the base knows nothing, do not count. What goes onto the base is put
    onto the one copy of it, and only the weights that it changes are held twice.
    """
    pipeline = load_pipeline(args, "base", torch.float32)
    check_weights(args, "base", pipeline)
    parts = [part for part in TRAINED_PARTS if hasattr(pipeline, part)]
    anchors = {part: dict(getattr(pipeline, part).named_parameters()) for part in parts}
    if args.kind == "pipeline":
        pipeline = load_pipeline(args, "personalized", torch.float32)
    else:
        sizes = {
            part: getattr(pipeline, part).get_input_embeddings().num_embeddings for part in parts if part != "unet"
        }
        if args.kind == "custom_diffusion":
            keys_values = load_file(find_file(args, "personalized", KEYS_VALUES_FILE)).keys() & anchors["unet"].keys()
            anchors["unet"] |= {name: anchors["unet"][name].detach().clone() for name in keys_values}
        load_onto_base(args, pipeline)
    check_weights(args, "personalized", pipeline)
    if args.kind == "lora":
        for part in parts:
            for name, module in getattr(pipeline, part).named_modules():
                if hasattr(module, "base_layer"):
                    weights = module.base_layer.named_parameters()
                    anchors[part] |= {f"{name}.{key}": weight.detach().clone() for key, weight in weights}
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    result = {}
    for part in parts:
        module = getattr(pipeline, part)
        if args.kind == "custom_diffusion" and part != "unet":
            module.resize_token_embeddings(sizes[part])
        moved = dict(module.named_parameters())
        if {name: p.shape for name, p in anchors[part].items()} != {name: p.shape for name, p in moved.items()}:
            stop(f"{FLAGS['base']}: its {part} is of another architecture than the personalized model's")
        result[part] = compare_parameters(anchors[part], moved)
    return result


def compare_parameters(base: dict[str, torch.Tensor], moved: dict[str, torch.Tensor]) -> dict[str, Any]:
    """`distance`, in L2, and `relative`, the distance over the base's norm; the same by block in `blocks`."""
    squares = {}
    for name, parameter in moved.items():
        anchor = base[name].detach().double()
        totals = squares.setdefault(block_of(name), [0.0, 0.0])
        totals[0] += (parameter.detach().double() - anchor).square().sum().item()
        totals[1] += anchor.square().sum().item()
    blocks = {name: distances(*totals) for name, totals in squares.items()}
    return {**distances(*map(sum, zip(*squares.values()))), "blocks": blocks}


def distances(squared_distance: float, squared_norm: float) -> dict[str, float]:
    distance = math.sqrt(squared_distance)
    return {"distance": distance, "relative": distance / math.sqrt(squared_norm) if squared_norm > 0 else 0.0}


# Likeness: what the judges see


@torch.no_grad()
def encode(
    args: argparse.Namespace, accelerator: Accelerator, judge: str, loaded: tuple, pictures: dict, texts: list[str]
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """
    Features of `pictures`, a list of paths for each set, and of texts if the judge is "clip": float64, (pictures or
    texts, width), not normalized. CLIP's are its projections; DINO's the class token after the last layer. `loaded` is
    this judge as `load_judges` has it.
    """
    model, processor, *tokenizer = loaded
    model.to(accelerator.device)

    def image_features(paths: list[Path]) -> torch.Tensor:
        images = [open_photo(path) for path in paths]
        pixels = processor(images=images, return_tensors="pt").pixel_values.to(accelerator.device)
        if judge == "dino":
            return model(pixels).last_hidden_state[:, 0]
        return projection(model.get_image_features(pixel_values=pixels))

    features, text_features = {}, None
    for set_name, paths in pictures.items():
        own = own_share(accelerator, in_batches(paths, args.batch_size))
        bar = tqdm(own, desc=f"{judge}: {set_name}", disable=not accelerator.is_main_process)
        rows = [row for batch in bar for row in image_features(batch).cpu().double().numpy()]
        features[set_name] = np.stack(gather_object(rows))
    if judge == "clip":
        rows = []
        for batch in in_batches(texts, args.batch_size):
            tokens = tokenizer[0](batch, padding="max_length", truncation=True, return_tensors="pt")
            rows.append(projection(model.get_text_features(**tokens.to(accelerator.device))).cpu().double().numpy())
        text_features = np.concatenate(rows)
    if not all(np.isfinite(rows).all() for rows in features.values()):
        stop(f"--{judge}_model makes NaN of pictures: name another")
    return features, text_features


def projection(output: Any) -> torch.Tensor:
    """The features themselves: from version 5 on, transformers wraps them."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


# Arithmetic: features are float64, (samples, width)


def unit(features: np.ndarray) -> np.ndarray:
    """Rows divided by their L2 norm."""
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def cosine_distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """1 - cosine, row by row, as half of the squared distance of unit vectors: exactly 0 for equal rows."""
    return 0.5 * np.square(unit(x) - unit(y)).sum(axis=1)


def inner_products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x @ y.T row by row: for y = x BLAS would take another route than for a copy of x, and round otherwise."""
    return np.stack([y @ row for row in x])


def cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """
    CMMD (arXiv 2401.09603): squared maximum mean discrepancy of unit vectors under a Gaussian kernel of bandwidth 10,
    times 1000. It is the estimate over all pairs, as in the paper's code: not negative, and 0 for equal sets.
    """
    x, y = unit(x), unit(y)

    def mean_kernel(a, b):
        return np.exp((inner_products(a, b) - 1) / 10**2).mean()

    return 1000 * float(mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float | None:
    """
    Squared Frechet distance of two Gaussians with the means and covariances of the samples (arXiv 1706.08500); `None`
    for fewer than two. The trace of (Sx Sy)^(1/2) is the nuclear norm of the product of the centred samples, which
    needs no square root of a covariance, singular as it is with fewer samples than dimensions.
    """
    if min(len(x), len(y)) < 2:
        return None
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)

    def trace(a, b):
        return np.linalg.svd(inner_products(a, b), compute_uv=False).sum() / math.sqrt((len(a) - 1) * (len(b) - 1))

    x, y = x - mean_x, y - mean_y
    return float(np.square(mean_x - mean_y).sum() + trace(x, x) + trace(y, y) - 2 * trace(x, y))


def pixel_rms(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square difference of two pictures, in grey levels of 0 to 255."""
    return float(np.sqrt(np.square(a.astype(np.float64) - b).mean()))


def mean_of_pairs(groups: list[list[int]], distance) -> float | None:
    """Mean of `distance(i, j)` over the pairs inside each group, then over groups; `None` without pairs."""
    means = []
    for group in groups:
        pairs = [(i, j) for i in group for j in group if i < j]
        if pairs:
            means.append(np.mean([distance(i, j) for i, j in pairs]))
    return float(np.mean(means)) if means else None


def share_of_way(value: float, start: float | None, end: float | None) -> float | None:
    """How far `value` is on the way from start (0) to end (1); `None` where the way leads nowhere or backwards."""
    return None if start is None or end is None or end <= start else (value - start) / (end - start)


def measure_images(
    images: list[dict], photos: list[Path], folders: dict[str, Path], clip: dict, texts: np.ndarray, dino: dict
) -> tuple[dict[str, Any], list[dict]]:
    """
    All that is measured on pictures.

    Args:
        images (`list[dict]`): What was drawn, as `plan_images` gives it.
        clip, dino (`dict[str, np.ndarray]`): Features of "photos", and of `images` by "base" and "personalized".
        texts (`np.ndarray`): CLIP's features of the texts of `images`.

    Returns:
        `tuple`: Metrics by group, and a row for each picture of each model.
    """
    kinds = {kind: [i for i, image in enumerate(images) if image["kind"] == kind] for kind in ("subject", "other")}
    groups = {kind: {} for kind in kinds}
    for i, image in enumerate(images):
        groups[image["kind"]].setdefault(image["prompt_index"], []).append(i)
    groups = {kind: list(by_prompt.values()) for kind, by_prompt in groups.items()}
    u_clip, u_dino = ({name: unit(rows) for name, rows in features.items()} for features in (clip, dino))
    u_texts = unit(texts)
    # From here on (pictures, photos), and (pictures,) for the text.
    to_photos = {
        "dino": {model: u_dino[model] @ u_dino["photos"].T for model in MODELS},
        "clip_i": {model: u_clip[model] @ u_clip["photos"].T for model in MODELS},
    }
    clip_t = {model: (u_clip[model] * u_texts).sum(axis=1) for model in MODELS}

    among_photos = {"dino": None, "clip_i": None}
    closest = None
    if len(photos) > 1:
        others = ~np.eye(len(photos), dtype=bool)
        likeness = {"dino": u_dino["photos"] @ u_dino["photos"].T, "clip_i": u_clip["photos"] @ u_clip["photos"].T}
        among_photos = {name: float(matrix[others].mean()) for name, matrix in likeness.items()}
        closest = float(likeness["dino"][others].max())

    subject, other = {"photos": {**among_photos, "nearest_photo": closest}}, {}
    for model in MODELS:
        rows = kinds["subject"]
        nearest = to_photos["dino"][model][rows].max(axis=1)
        subject[model] = {
            "dino": float(to_photos["dino"][model][rows].mean()),
            "clip_i": float(to_photos["clip_i"][model][rows].mean()),
            "clip_t": float(clip_t[model][rows].mean()),
            "diversity": mean_of_pairs(groups["subject"], lambda i, j: 1 - u_dino[model][i] @ u_dino[model][j]),
            "nearest_photo": float(nearest.mean()),
            "copies": None if closest is None else float((nearest > closest).mean()),
        }
        rows = kinds["other"]
        other[model] = {
            "clip_t": float(clip_t[model][rows].mean()),
            "dino": float(to_photos["dino"][model][rows].mean()),
        }
    # What CLIP-T gives to pictures and texts that do not belong together: the end of the scale.
    different = np.array(
        [[images[i]["clip_text"] != images[j]["clip_text"] for j in kinds["subject"]] for i in kinds["subject"]]
    )
    unrelated = u_clip["base"][kinds["subject"]] @ u_texts[kinds["subject"]].T
    subject["unrelated"] = {"clip_t": float(unrelated[different].mean()) if different.any() else None}

    paired = {
        "clip_distance": cosine_distance(clip["base"], clip["personalized"]),
        "dino_distance": cosine_distance(dino["base"], dino["personalized"]),
    }
    pixels = {model: [np.asarray(Image.open(folders[model] / image["file"])) for image in images] for model in MODELS}
    paired["pixel_rms"] = np.array([pixel_rms(*pair) for pair in zip(pixels["base"], pixels["personalized"])])
    rows = kinds["other"]
    drift = {name: float(values[rows].mean()) for name, values in paired.items()}
    drift["cmmd"] = cmmd(clip["base"][rows], clip["personalized"][rows])
    drift["frechet_clip"] = frechet_distance(clip["base"][rows], clip["personalized"][rows])
    drift["frechet_dino"] = frechet_distance(dino["base"][rows], dino["personalized"][rows])
    drift["between_seeds"] = {
        "clip_distance": mean_of_pairs(groups["other"], lambda i, j: 1 - u_clip["base"][i] @ u_clip["base"][j]),
        "dino_distance": mean_of_pairs(groups["other"], lambda i, j: 1 - u_dino["base"][i] @ u_dino["base"][j]),
        "pixel_rms": mean_of_pairs(groups["other"], lambda i, j: pixel_rms(pixels["base"][i], pixels["base"][j])),
    }

    summary = {
        "learned": share_of_way(subject["personalized"]["dino"], subject["base"]["dino"], subject["photos"]["dino"]),
        "obeyed": share_of_way(
            subject["personalized"]["clip_t"], subject["unrelated"]["clip_t"], subject["base"]["clip_t"]
        ),
        "moved": share_of_way(drift["dino_distance"], 0.0, drift["between_seeds"]["dino_distance"]),
        "copies": subject["personalized"]["copies"],
    }
    table = []
    for model in MODELS:
        for i, image in enumerate(images):
            likeness = to_photos["dino"][model][i]
            row = {"model": model, "kind": image["kind"], "prompt": image["text"], "seed": image["seed"]}
            row |= {"file": str(folders[model] / image["file"]), "clip_t": clip_t[model][i], "dino": likeness.mean()}
            row |= {"clip_i": to_photos["clip_i"][model][i].mean(), "nearest_photo": photos[likeness.argmax()].name}
            row |= {"nearest_photo_dino": likeness.max(), **{name: values[i] for name, values in paired.items()}}
            table.append(row)
    return {"summary": summary, "subject": subject, "other": other, "drift": drift}, table


# What people look at

STYLE = """
:root { --ink: #1d2329; --soft: #5c6670; --line: #dfe3e8; --paper: #fff; --back: #f4f5f7; --bar: #3b6fb6;
  --good: #1f7a4d; --fair: #a86a00; --poor: #b3362b; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 40px 0 8px; }
p { margin: 6px 0; max-width: 75ch; }
.soft, figcaption, small { color: var(--soft); }
small { font-size: 13px; line-height: 1.4; display: block; }
.card, .panel { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
.card h3 { font-size: 15px; margin: 0; }
.card .value { font-size: 34px; font-weight: 650; line-height: 1.25; }
.card .word { font-weight: 600; }
.good { color: var(--good); } .fair { color: var(--fair); } .poor { color: var(--poor); }
.track { height: 8px; border-radius: 4px; background: var(--line); margin: 6px 0 10px; overflow: hidden; }
.track i { display: block; height: 100%; background: currentColor; }
.panel:has(> table:first-child) { padding: 6px 18px; }
table { border-collapse: collapse; width: 100%; font-size: 15px; }
th, td { text-align: left; padding: 9px 16px 9px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
th { font-size: 13px; color: var(--soft); font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td:first-child { white-space: nowrap; }
.dense td, .dense th { padding: 3px 8px 3px 0; border: 0; }
.cards, .wide, .prompts, .pair { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(var(--width), 100%), 1fr)); }
.cards { --width: 240px; margin-top: 24px; }
.wide { --width: 420px; margin-top: 16px; }
.prompts { --width: calc(var(--pictures) * 250px); }
.pair { --width: calc(var(--pictures) * 110px); }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 15px; margin-bottom: 4px; }
img { display: block; max-width: 100%; border-radius: 6px; }
.photos { display: flex; flex-wrap: wrap; gap: 8px; }
.photos img { width: min(160px, 50% - 4px); }
@media (max-width: 700px) {
  table:not(.dense) tr { display: flex; flex-wrap: wrap; padding: 9px 0; border-bottom: 1px solid var(--line); }
  table:not(.dense) tr:first-child { display: none; }
  table:not(.dense) tr:last-child { border: 0; }
  table:not(.dense) td { border: 0; padding: 0; flex: 1 0 100%; }
  table:not(.dense) td.n { flex: 1; text-align: left; }
  td[data-label]::before { content: attr(data-label); display: block; font-size: 13px; color: var(--soft); }
  table:not(.dense) td:first-child { font-weight: 600; }
}
details { margin-top: 40px; }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 12px; fill: var(--soft); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; }
"""
TITLES = {"personalized": "personalized", "base": "base, same seeds"}
THUMBNAIL, GAP = 160, 8
SHOWN_PROMPTS, SHOWN_IMAGES = 8, 4


def strip_of(paths: list[Path]) -> Image.Image:
    """Pictures in one row."""
    strip = Image.new("RGB", (len(paths) * (THUMBNAIL + GAP) - GAP, THUMBNAIL), "white")
    for i, path in enumerate(paths):
        thumbnail = open_photo(path).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        strip.paste(thumbnail, (i * (THUMBNAIL + GAP), 0))
    return strip


def build_strips(images: list[dict], folders: dict[str, Path], kind: str) -> list[tuple[str, dict[str, Image.Image]]]:
    """Some of the prompts, evenly chosen, each with a row of pictures by each model."""
    prompts = sorted({image["prompt_index"] for image in images if image["kind"] == kind})
    count = min(SHOWN_PROMPTS, len(prompts))
    strips = []
    for index in [prompts[i * len(prompts) // count] for i in range(count)]:
        chosen = [image for image in images if (image["kind"], image["prompt_index"]) == (kind, index)][:SHOWN_IMAGES]
        by_model = {model: strip_of([folders[model] / image["file"] for image in chosen]) for model in MODELS}
        strips.append((chosen[0]["text"], by_model))
    return strips


def stack_strips(strips: list[tuple[str, dict[str, Image.Image]]]) -> Image.Image:
    """A grid of all rows, each under its prompt: the personalized model's pictures, then the base's."""
    font, head, width = ImageFont.load_default(15), 26, strips[0][1]["base"].width + 3 * GAP
    grid = Image.new("RGB", (2 * width, len(strips) * (THUMBNAIL + head + GAP) + head), "white")
    pen = ImageDraw.Draw(grid)
    for x, (model, title) in zip((GAP, GAP + width), TITLES.items()):
        pen.text((x, 4), title, "black", font)
        for i, (text, by_model) in enumerate(strips):
            y = head + i * (THUMBNAIL + head + GAP)
            grid.paste(by_model[model], (x, y + head))
            if model == "personalized":
                pen.text((x, y + 3), text, "gray", font)
    return grid


def show(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}%"


def card(title: str, value: float | None, good: float, fair: float, words: tuple[str, str, str], what: str) -> str:
    """One of the answers at the top; it is good at or beyond `good`, fair at or beyond `fair`, in their direction."""
    if value is None:
        grade, word, number, width = "soft", "cannot be said with these pictures", "–", 0
    else:
        sign = 1 if good > fair else -1
        grade = "good" if sign * value >= sign * good else "fair" if sign * value >= sign * fair else "poor"
        word = words[("good", "fair", "poor").index(grade)]
        number, width = f"{100 * value:.0f}%", 100 * min(max(value, 0.0), 1.0)
    return (
        f'<div class="card"><h3>{title}</h3><div class="value {grade}">{number}</div>'
        f'<div class="track {grade}"><i style="width:{width:.0f}%"></i></div>'
        f'<div class="word {grade}">{word}</div><small>{what}</small></div>'
    )


def html_table(head: list[str], rows: list[list[str]]) -> str:
    """Name, numbers, and in the last column what they mean. Narrow screens show `data-label` above each number."""

    def cells(tag, values):
        numbers = [f'<{tag} class="n" data-label="{n}">{v}</{tag}>' for n, v in list(zip(head, values))[1:-1]]
        return f"<{tag}>{values[0]}</{tag}>{''.join(numbers)}<{tag}>{values[-1]}</{tag}>"

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="panel"><table><tr>{cells("th", head)}</tr>{body}</table></div>'


def timestep_chart(prediction: dict[str, dict]) -> str:
    """Prediction drift by timestep as a drawing in SVG: other prompts and the subject."""
    width, height, left, bottom = 440, 300, 46, 40
    largest = max(max(curve["by_timestep"].values()) for curve in prediction.values()) or 1.0
    timesteps = sorted({timestep for curve in prediction.values() for timestep in curve["by_timestep"]})
    # Noise levels of EDM may be below 0.
    first, last = min(0, timesteps[0]), timesteps[-1]
    # Three to six lines at round numbers.
    power = 10 ** math.floor(math.log10(largest))
    step = power * (0.5 if largest < 2 * power else 1 if largest < 5 * power else 2)
    ticks = [i * step for i in range(math.ceil(largest / step) + 1)]

    def place(timestep, drift):
        share = drift / ticks[-1]
        along = (timestep - first) / (last - first)
        return left + (width - left - 12) * along, height - bottom - (height - bottom - 28) * share

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Prediction drift by timestep">']
    for tick in ticks:
        y = place(0, tick)[1]
        parts.append(f'<line x1="{left}" x2="{width - 12}" y1="{y}" y2="{y}" stroke="#dfe3e8"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{100 * tick:.6g}%</text>')
    for kind, colour, x in (("other", "#3b6fb6", left), ("subject", "#c77d0a", left + 190)):
        points = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in prediction[kind]["by_timestep"].items())
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        label = "other prompts" if kind == "other" else "the subject"
        parts.append(
            f'<rect x="{x}" y="4" width="14" height="10" fill="{colour}"/><text x="{x + 20}" y="13">{label}</text>'
        )
    for timestep in timesteps[:: math.ceil(len(timesteps) / 10)]:
        x = place(timestep, 0)[0]
        parts.append(f'<text x="{x:.0f}" y="{height - bottom + 16}" text-anchor="middle">{timestep:.3g}</text>')
    parts.append(
        f'<text x="{left}" y="{height - 4}">timestep: little noise at the left, pure noise at the right</text>'
    )
    return "".join(parts) + "</svg>"


def block_chart(parameters: dict[str, dict]) -> str:
    """Relative distance as a table with bars: of every part, and of the blocks of those that have moved."""
    largest = max(block["relative"] for part in parameters.values() for block in part["blocks"].values()) or 1.0
    digits = max(0, -math.floor(math.log10(largest)))  # three digits of the largest per cent
    rows = []
    for part, values in parameters.items():
        number = f'<td class="n">{100 * values["relative"]:.{digits}f}%</td>'
        rows.append(f"<tr><th>{part}</th><th></th>{number}</tr>")
        blocks = values["blocks"] if values["distance"] > 0 else ()
        # In the order of the data: the U-Net registers its middle last but for the output.
        for name in sorted(blocks, key=lambda name: name.startswith(("up_blocks", "conv_norm_out", "conv_out"))):
            share = 100 * blocks[name]["relative"] / largest
            bar = f'<div class="track" style="color:var(--bar)"><i style="width:{share:.0f}%"></i></div>'
            number = f'<td class="n">{100 * blocks[name]["relative"]:.{digits}f}%</td>'
            rows.append(f'<tr><td>{name}</td><td style="width:45%">{bar}</td>{number}</tr>')
    return f'<table class="dense">{"".join(rows)}</table>'


def write_report(
    args: argparse.Namespace, metrics: dict[str, Any], photos: list[Path], strips: dict[str, list], path: Path
) -> None:
    """The page: answers first, then every number beside the base's with what it means, then pictures."""

    def picture(image: Image.Image, text: str) -> str:
        file = io.BytesIO()
        image.save(file, format="jpeg", quality=88)
        data = base64.b64encode(file.getvalue()).decode()
        return f'<img src="data:image/jpeg;base64,{data}" alt="{html.escape(text)}">'

    def figure(text: str, by_model: dict[str, Image.Image]) -> str:
        sides = [f"<div><small>{title}</small>{picture(by_model[m], title)}</div>" for m, title in TITLES.items()]
        return f'<figure><figcaption>{html.escape(text)}</figcaption><div class="pair">{"".join(sides)}</div></figure>'

    summary, subject, other, drift = (metrics[name] for name in ("summary", "subject", "other", "drift"))
    ours, base, own, unrelated = (subject[name] for name in ("personalized", "base", "photos", "unrelated"))
    seeds, prediction = drift["between_seeds"], metrics["prediction_drift"]
    others, asked = prediction["other"], prediction["subject"]
    answers = [
        ["Was the subject learned?", summary["learned"], 0.6, 0.3, ("yes", "in part", "hardly"),
         "By DINO: 0% is what the base draws, 100% as alike as the photos are among themselves. Needs two photos."],
        ["Are prompts still obeyed?", summary["obeyed"], 0.9, 0.7,
         ("as the base does, or better", "less than the base does", "often ignored"),
         "By CLIP-T, on pictures of the subject: 0% as if text and picture were unrelated, 100% as the base does."
         " Needs two prompts."],
        ["Has the rest moved?", summary["moved"], 0.25, 0.6,
         ("hardly", "visibly", "nearly as much as another seed, or more"),
         "By DINO, on prompts that do not name the subject: 0% the base's very pictures, 100% as different as the"
         " base's with another seed. Needs two pictures of a prompt."],
        ["Are photos copied?", summary["copies"], 0.1, 0.5, ("hardly", "some pictures", "most pictures"),
         "Pictures of the subject closer to a photo than any two photos are to each other. Needs two photos."],
    ]  # fmt: skip
    fidelity = [
        ["DINO", show(ours["dino"]), show(base["dino"]), show(own["dino"]),
         "Likeness to the photos: of this very subject. Higher is better, up to the photos' own."],
        ["CLIP-I", show(ours["clip_i"]), show(base["clip_i"]), show(own["clip_i"]),
         "Likeness to the photos in what they show: less strict about details. Higher is better."],
        ["CLIP-T", show(ours["clip_t"]), show(base["clip_t"]), "–",
         "Agreement of picture and prompt. Higher is better; falling below the base means prompts are ignored."
         f" Unrelated texts get {show(unrelated['clip_t'])}."],
        ["diversity", show(ours["diversity"]), show(base["diversity"]), "–",
         "How different pictures of one prompt are (DINO distance). Much below the base: always the same picture."],
        ["nearest photo", show(ours["nearest_photo"]), show(base["nearest_photo"]), show(own["nearest_photo"]),
         "DINO likeness to the closest photo. Above that of the two closest photos, it is a copy."],
        ["other prompts: CLIP-T", show(other["personalized"]["clip_t"]), show(other["base"]["clip_t"]), "–",
         "The same agreement on prompts that do not name the subject. Should be the base's."],
        ["other prompts: DINO", show(other["personalized"]["dino"]), show(other["base"]["dino"]), "–",
         "Their likeness to the photos. Above the base: the subject leaks into pictures that were not to show it."],
    ]  # fmt: skip
    distance = [
        ["CLIP distance", show(drift["clip_distance"], 4), show(seeds["clip_distance"], 4),
         "Change of what is seen, picture by picture from the same seed. 0: unchanged."],
        ["DINO distance", show(drift["dino_distance"], 4), show(seeds["dino_distance"], 4),
         "The same by DINO, which minds details more."],
        ["pixels, RMS", show(drift["pixel_rms"], 1), show(seeds["pixel_rms"], 1),
         "Grey levels of 255. Sensitive to any shift of a thing, even a harmless one."],
        ["CMMD", show(drift["cmmd"]), "–",
         "Distance of all pictures as a whole, not one by one: has the kind of pictures changed? 0: no. Has no"
         " yardstick here, as all below: compare with other models, drawn with the same prompts and judges."],
        ["Fréchet, CLIP", show(drift["frechet_clip"], 2), "–", "The same question by mean and covariance."],
        ["Fréchet, DINO", show(drift["frechet_dino"], 2), "–", "And in DINO's features."],
        ["predictions", percent(others["mean"]), "–",
         "Change of a prediction, relative to its size, along the base's path from noise to a picture."
         f" With the subject in the prompt, where change was wanted: {percent(asked['mean'])}."],
        ["guided predictions", percent(others["guided"]), "–",
         f"The same with guidance {args.guidance_scale:g}, which is what the sampler gets."
         f" With the subject in the prompt: {percent(asked['guided'])}."],
        ["KL bound, nats", show(others["kl_bound"], 1), "–",
         "Upper bound on the KL divergence from the base's pictures to the model's, as latents, for ancestral sampling"
         f" in {args.probe_timesteps} steps with guidance {args.guidance_scale:g}, without the last step, which adds"
         " no noise. Good for comparing models; not a difference that you can see."],
    ]  # fmt: skip
    figures = {kind: "".join(figure(*strip) for strip in rows) for kind, rows in strips.items()}
    shown = f'style="--pictures:{min(args.num_images_per_prompt, SHOWN_IMAGES)}"'
    thumbnails = "".join(picture(strip_of([photo]), photo.name) for photo in photos[:SHOWN_PROMPTS])
    kind = {"pipeline": "A pipeline", "lora": "A LoRA", "custom_diffusion": "Custom Diffusion"}[args.kind]
    about = (
        f"{kind}, {args.pretrained_model_name_or_path}, against its base, {args.base_model_name_or_path}."
        f" {len(photos)} photo{'s' * (len(photos) > 1)}, and {metrics['images']} pictures of each model from the same"
        f" prompts and seeds, in {args.num_inference_steps} steps with guidance {args.guidance_scale:g}; judged by"
        f" {args.clip_model} and {args.dino_model}. {metrics['settings']['date']}."
    )
    if args.new_words:
        about += f" The base cannot read {args.new_words}: asked without, its pictures show any {args.class_name}."
    title = f"{Path(args.pretrained_model_name_or_path).name}: “{args.instance_token} {args.class_name}”"
    title, about = html.escape(title), html.escape(about)
    settings = html.escape(json.dumps(metrics["settings"], indent=1))
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: evaluation</title><style>{STYLE}</style></head><body><main>
<h1>{title}</h1>
<p class="soft">{about}</p>
<div class="cards">{"".join(card(*answer) for answer in answers)}</div>
<p><small>The words are rules of thumb, the numbers are measured. Look at the pictures too.</small></p>
<h2>Subject and prompts</h2>
{html_table(["", "personalized", "base", "photos", "what it means"], fidelity)}
<h2>Drift from the base, on prompts that do not name the subject</h2>
{html_table(["", "drift", "another seed", "what it means"], distance)}
<div class="wide"><div class="panel"><b>Predictions, by timestep</b>
{timestep_chart(prediction)}</div><div class="panel"><b>Weights, by block, relative to the base's norm</b>
{block_chart(metrics["parameter_drift"])}</div></div>
<h2>The photos</h2><div class="panel photos">{thumbnails}</div>
<h2>The subject</h2><div class="panel prompts" {shown}>{figures["subject"]}</div>
<h2>Other prompts: the two sides should look alike</h2><div class="panel prompts" {shown}>{figures["other"]}</div>
<details><summary>Settings</summary><pre>{settings}</pre></details>
</main></body></html>
"""
    path.write_text(page, encoding="utf-8")


def flatten(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers by path, "drift/between_seeds/pixel_rms": what trackers take."""
    flat = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            flat[f"{prefix}{name}"] = value
    return flat


def write_results(
    args: argparse.Namespace,
    accelerator: Accelerator,
    metrics: dict[str, Any],
    table: list[dict],
    images: list[dict],
    photos: list[Path],
    folders: dict[str, Path],
) -> None:
    output_dir = Path(args.output_dir)
    output_dir.joinpath("metrics.json").write_text(json.dumps(metrics, indent=2, allow_nan=False))
    with output_dir.joinpath("images.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    strips = {kind: build_strips(images, folders, kind) for kind in ("subject", "other")}
    grids = {kind: stack_strips(rows) for kind, rows in strips.items()}
    for kind, grid in grids.items():
        grid.save(output_dir / f"{kind}.png")
    write_report(args, metrics, photos, strips, output_dir / "report.html")
    accelerator.log(flatten({name: value for name, value in metrics.items() if name != "settings"}), step=0)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            for kind, grid in grids.items():
                tracker.writer.add_image(kind, np.asarray(grid), 0, dataformats="HWC")
        if tracker.name == "wandb":
            import wandb

            tracker.log({kind: wandb.Image(grid) for kind, grid in grids.items()}, step=0)
    summary = {name: "–" if value is None else f"{100 * value:.0f}%" for name, value in metrics["summary"].items()}
    logger.info(", ".join(f"{name} {value}" for name, value in summary.items()))
    logger.info(f"The report: {output_dir / 'report.html'}")


def main(args: argparse.Namespace) -> None:
    # What can be wrong is found, as far as loading shows it, before anything is written or drawn.
    accelerator = build_accelerator(args)
    check_apart([("--output_dir", args.output_dir)], [("--instance_data_dir", args.instance_data_dir, [])])
    photos = find_photos(args.instance_data_dir)
    images = plan_images(args, build_prompts(args))
    check_models(args)
    judges = load_judges(args)
    settings = {**vars(args), "date": date.today().isoformat()}
    folders = picture_folders(args)
    parameters = None
    if accelerator.is_main_process:
        stale = check_folders(args, images)
        parameters = parameter_drift(args)
        prepare_folders(stale)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("evaluation", config=settings)

    # One model at a time: what the base predicts is kept, and the base makes room.
    batches = own_share(accelerator, plan_probes(args, images))
    for model in MODELS:
        pipeline = load_pipeline(args, model, getattr(torch, PRECISIONS[args.precision])).to(accelerator.device)
        if model == "base":
            check_prompts(args, pipeline, images)
        draw_images(args, accelerator, pipeline, model, images, folders[model])
        pipeline.scheduler = probe_scheduler(pipeline)
        if model == "base":
            recordings = record_base(args, accelerator, pipeline, batches)
        else:
            measured = measure_drift(args, accelerator, pipeline, batches, recordings)
        pipeline.unet.to("meta")  # the recordings refer to it, but need no weights
        del pipeline
        gc.collect()
        torch.cuda.empty_cache()
    prediction_drift = average_drift(gather_object(measured))

    files = {"photos": photos, **{model: [folders[model] / image["file"] for image in images] for model in MODELS}}
    texts = [image["clip_text"] for image in images]
    clip, text_features = encode(args, accelerator, "clip", judges["clip"], files, texts)
    dino, _ = encode(args, accelerator, "dino", judges["dino"], files, texts)

    if accelerator.is_main_process:
        metrics, table = measure_images(images, photos, folders, clip, text_features, dino)
        metrics |= {"prediction_drift": prediction_drift, "parameter_drift": parameters}
        metrics |= {"images": len(images), "photos": len(photos), "settings": settings}
        write_results(args, accelerator, metrics, table, images, photos, folders)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(ARGS)
