# Both training scripts at the real sizes of SD1.5 and SDXL, with random weights: seconds of a step and peak memory.
# Runs on a GPU if there is one, else on the CPU; what the models would learn is not looked at.
"""
python benchmarks/full_size.py --shapes sd15 --resolution 256          # on a CPU: 19 GB of memory, 10 GB of disk
python benchmarks/full_size.py --shapes sdxl --resolution 256
python benchmarks/full_size.py --shapes tiny                           # a rehearsal with the toy benchmark's bases

Each training takes four steps; a recording is of two prompts. Beside the peak stands what docs/train.md's arithmetic
gives for weights, gradients, the optimizer's state, anchors and recording: the rest is activations, and on a CPU also
Python and its libraries. Seconds are those of the processor on a CPU: set OMP_NUM_THREADS=1.
"""

import argparse
import json
import os
import re
import resource
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


ROOT = Path(__file__).resolve().parents[1]
TINYWORLD = ROOT / "examples" / "tinyworld"
sys.path.insert(0, str(Path(__file__).parent))

from penalty import CONFIGS  # noqa: E402


SD_SCRIPT, SDXL_SCRIPT = ROOT / "train_dreambooth_lipschitz.py", ROOT / "train_dreambooth_lipschitz_sdxl.py"
# What the published config.json files say.
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
WAITED = "called a synchronizing CUDA operation"  # by torch.cuda.set_sync_debug_mode
PLAIN, PAPER, HELD = ["--lipschitz_weight=0"], ["--lipschitz_weight"], []


class Case(NamedTuple):
    """A training: the sizes of its base, and its script's flags beside those of all."""

    name: str
    shapes: str
    flags: list[str]


FULL_BF16, IN_HOST_MEMORY = "--full_bf16", "--lipschitz_anchor_device=cpu"
LORA, CUSTOM, EIGHT_BIT, BF16 = (
    "--method=lora",
    "--method=custom_diffusion",
    "--use_8bit_adam",
    "--mixed_precision=bf16",
)
CASES = [
    Case("full, plain", "sd15", PLAIN),
    Case("full, the paper's penalty", "sd15", PAPER),
    Case("full, 8-bit Adam, the paper's penalty", "sd15", [*PAPER, EIGHT_BIT]),
    Case("full, 8-bit Adam, layers and predictions", "sd15", [*HELD, EIGHT_BIT]),
    Case("LoRA, plain", "sd15", [*PLAIN, LORA]),
    Case("LoRA, layers and predictions", "sd15", [*HELD, LORA]),
    Case("Custom Diffusion, plain", "sd15", [*PLAIN, CUSTOM]),
    Case("Custom Diffusion, layers and predictions", "sd15", [*HELD, CUSTOM]),
    Case("LoRA, plain, bf16", "sdxl", [*PLAIN, LORA, BF16]),
    Case("LoRA, layers and predictions, bf16", "sdxl", [*HELD, LORA, BF16]),
    Case("Custom Diffusion, plain, bf16", "sdxl", [*PLAIN, CUSTOM, BF16]),
    Case("Custom Diffusion, layers and predictions, bf16", "sdxl", [*HELD, CUSTOM, BF16]),
]


def random_model(build: Any, dtype: torch.dtype) -> torch.nn.Module:
    """What `build` gives, with weights that keep activations finite."""
    with torch.device("meta"):
        model = build()
    buffers = {name: buffer.shape for name, buffer in model.named_buffers()}
    model = model.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=min(0.02, parameter[0].numel() ** -0.5))
            else:
                parameter.fill_(float(name.endswith("weight")))
        for name, shape in buffers.items():  # of positions
            model.get_buffer(name).copy_(torch.arange(shape[-1]).expand(shape))
    return model


def make_pipeline(shapes: str, resolution: int, folder: Path) -> Path:
    """A pipeline of the published shapes that draws pictures of `resolution` pixels, in float32 or (SDXL) float16."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    is_xl = shapes == "sdxl"
    tiny = TINYWORLD / ("sdxl" if is_xl else "sd")
    dtype = torch.float16 if is_xl else torch.float32

    def text_encoder(kind, sizes, **options):
        config = CLIPTextConfig(
            **sizes, projection_dim=sizes["hidden_size"], bos_token_id=0, eos_token_id=1, **options
        )
        return random_model(lambda: kind(config), dtype)

    # Of few words: what a prompt says does not matter, its length does.
    tokenizers = [CLIPTokenizer.from_pretrained(tiny / "tokenizer", model_max_length=77) for _ in range(1 + is_xl)]
    config = {**CONFIGS[shapes], "sample_size": resolution // 8}
    parts = {
        "unet": random_model(lambda: UNet2DConditionModel(**config), dtype),
        "vae": random_model(lambda: AutoencoderKL(**VAE, scaling_factor=0.13025 if is_xl else 0.18215), dtype),
        "text_encoder": text_encoder(CLIPTextModel, CLIP_L, hidden_act="quick_gelu"),
        "tokenizer": tokenizers[0],
        "scheduler": DDIMScheduler.from_pretrained(tiny / "scheduler"),
    }
    if is_xl:
        parts |= {"text_encoder_2": text_encoder(CLIPTextModelWithProjection, CLIP_BIG_G, hidden_act="gelu")}
        pipeline = StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizers[1])
    else:
        parts |= dict.fromkeys(["safety_checker", "feature_extractor"])
        pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    return folder


def arithmetic(case: Case, unet_config: dict, others: int) -> float:
    """Gigabytes by the shapes alone: `others` are the parameters of the autoencoder and the text encoders."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        shapes = {name: p.shape for name, p in UNet2DConditionModel(**unet_config).named_parameters()}
    method = next((flag for flag in case.flags if flag in (LORA, CUSTOM)), None)
    pattern = {LORA: r"\.to_([qkv]|out\.0)\.weight", CUSTOM: r"\.attn2\.to_[kv]\.weight", None: ""}[method]
    held = {name: shape for name, shape in shapes.items() if re.search(pattern, name)}
    total = sum(shape.numel() for shape in shapes.values())
    if method == LORA:  # of rank 4, beside the weights
        trained, frozen = sum(4 * sum(shape) for shape in held.values()), total
    else:
        trained = sum(shape.numel() for shape in held.values())
        frozen = total - trained
    plain, bf16 = PLAIN[0] in case.flags, FULL_BF16 in case.flags
    state = (4 if bf16 else 8) + (2 if bf16 or EIGHT_BIT in case.flags else 8)
    anchors = 0 if plain or method == LORA or IN_HOST_MEMORY in case.flags else 2 if case.shapes == "sdxl" else 4
    halves = bf16 or any(flag.startswith("--mixed_precision") for flag in case.flags)
    columns = [shape[1:].numel() for shape in held.values() if len(shape) > 1]
    recorded = 0 if plain or PAPER[0] in case.flags else sum(4 * n * min(64, n) for n in columns)
    return 1e-9 * (trained * (state + anchors) + (frozen + others) * (2 if halves else 4) + recorded)


def reason(done: subprocess.CompletedProcess) -> str:
    """Why a process failed, by its last line; one that was killed may have left none."""
    return ([f"exit code {done.returncode}"] + done.stderr.strip().splitlines())[-1]


def train(script: Path, flags: list[str], folder: Path) -> dict[str, Any]:
    """Launches a script in a process of its own; seconds of each step, and gigabytes at the peak."""
    output = folder / "measured.json"
    output.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--child", str(output), str(script), *flags]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        return {"error": reason(done)}
    return json.loads(output.read_text())


def child(output: Path, script: str, flags: list[str]) -> None:
    """Runs the script as it is; writes down when each step of its optimizer ended, and where a GPU was waited for."""
    on_gpu, times, waits, show = torch.cuda.is_available(), [], [0], warnings.showwarning

    def stepped(*_) -> None:
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() if on_gpu else time.process_time())
        waits.append(0)

    def count(message: Warning | str, *rest: Any) -> None:
        if WAITED in str(message):
            waits[-1] += 1
        else:
            show(message, *rest)

    register_optimizer_step_post_hook(stepped)
    if on_gpu:
        warnings.showwarning = count
        warnings.filterwarnings("always", f".*{WAITED}")
        torch.cuda.set_sync_debug_mode("warn")
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = [after - before for before, after in zip(times, times[1:])]
    # The first step is logged at once and the last saves: what is between them is like any other step.
    between = {"waits": waits[2]} if on_gpu and len(waits) > 3 else {}
    output.write_text(json.dumps({"seconds": seconds, "peak": 1e-9 * peak, **between}))


def measure(cases: list[Case], resolution: int, folder: Path, more: list[str]) -> list[dict[str, Any]]:
    """Trains the cases in turn, on bases that are made when the first of them needs one; a line for each."""
    (folder / "prompts.txt").write_text("a photo of a red house on the grass\na photo of a blue fish under water\n")
    photo = folder / "photo"  # one, which is encoded before the first step, as photos are in any longer training
    photo.mkdir(exist_ok=True)
    shutil.copy(TINYWORLD / "subjects" / "mug" / "0.png", photo)
    lines = []
    for case in cases:
        tiny = TINYWORLD / ("sdxl" if "xl" in case.shapes else "sd")
        base = tiny if case.shapes.startswith("tiny") else folder / case.shapes
        if not base.exists():
            make_pipeline(case.shapes, resolution, base)
        flags = [f"--pretrained_model_name_or_path={base}", f"--instance_data_dir={photo}"]
        flags += ["--instance_prompt=a photo of a sks mug", f"--resolution={resolution}", "--train_batch_size=1"]
        flags += ["--max_train_steps=4", "--seed=0", f"--output_dir={folder / 'model'}", "--lr_warmup_steps=0"]
        flags += [f"--lipschitz_prompts_file={folder / 'prompts.txt'}"] * (not {*PLAIN, *PAPER} & {*case.flags})
        measured = train(SDXL_SCRIPT if "xl" in case.shapes else SD_SCRIPT, [*flags, *case.flags, *more], folder)
        if not case.shapes.startswith("tiny"):
            folders = [path for path in base.iterdir() if path.is_dir() and path.name not in ("unet", "scheduler")]
            sizes = [file.stat().st_size for path in folders for file in path.glob("*.safetensors")]
            others = sum(sizes) // (2 if case.shapes == "sdxl" else 4)
            measured["arithmetic"] = arithmetic(case, CONFIGS[case.shapes], others)
        lines.append({**case._asdict(), "resolution": resolution, **measured})
        print(row(lines[-1]), flush=True)
    return lines


def row(line: dict[str, Any]) -> str:
    if "error" in line:
        return f"| {line['shapes']} | {line['name']} | failed: {line['error']} |"
    arithmetic = f"{line['arithmetic']:.1f}" if "arithmetic" in line else ""
    # A GradScaler may skip all of the first steps.
    seconds = f"{statistics.median(line['seconds']):.2f}" if line["seconds"] else "–"
    cells = [line["shapes"], line["name"], seconds, f"{line['peak']:.1f}", arithmetic, str(line.get("waits", ""))]
    return f"| {' | '.join(cells)} |"


def head() -> str:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    columns = ["", "", "s a step", "GB at the peak", "by arithmetic", "waits for the GPU in a step"]
    return f"torch {torch.__version__}, {where}\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds and memory of both scripts at the sizes of SD1.5 and SDXL.")
    parser.add_argument("--shapes", nargs="+", choices=["sd15", "sdxl", "tiny"], default=["sd15", "sdxl"])
    parser.add_argument("--cases", nargs="+", default=[""], help="Only cases whose name contains one of these.")
    parser.add_argument("--resolution", type=int, default=512, help="Of photos and pictures, in pixels.")
    parser.add_argument("--flags", default="--gradient_checkpointing", help="More flags of the scripts.")
    args = parser.parse_args()
    cases = [case for case in CASES if case.shapes in args.shapes]
    if "tiny" in args.shapes:
        tiny = {"sd15": "tiny-sd", "sdxl": "tiny-sdxl"}
        cases += [case._replace(shapes=tiny[case.shapes]) for case in CASES]
    cases = [case for case in cases if any(part in case.name for part in args.cases)]
    if not cases:
        parser.error(f"--cases: no case of {' '.join(args.shapes)} has {' or '.join(args.cases)} in its name")
    print(head())
    with tempfile.TemporaryDirectory() as folder:
        measure(cases, args.resolution, Path(folder), args.flags.split())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main()
