# Whole runs of a training script beside one of diffusers' scripts, in turn: same base, photos, seed and settings.
# Measures seconds and memory of what a user would launch; what the models are like is for tradeoff.py.
"""
python benchmarks/end_to_end.py --peer diffusers/examples/dreambooth/train_dreambooth.py
python benchmarks/end_to_end.py --peer diffusers/examples/dreambooth/train_dreambooth_lora.py --flags="--method=lora"
python benchmarks/end_to_end.py --peer diffusers/examples/dreambooth/train_dreambooth.py --prior --rounds 1
python benchmarks/end_to_end.py --peer diffusers/examples/dreambooth/train_dreambooth.py --full_size \\
    --resolution 256 --steps 4 --rounds 2 --both_flags="--gradient_checkpointing" --forms none paper  # 24 GB of memory

Each script runs for 1 step and for `--steps`: the difference is what steps take. Seconds are those of the processor,
which other programs change less; on a GPU the clock's. With `--prior` the peer draws 100 class images first, in its
longer run: there only the seconds for all compare, not the milliseconds of a step.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from full_size import make_pipeline
from pil_transforms import copy_script


ROOT = Path(__file__).resolve().parents[1]
TINYWORLD = ROOT / "examples" / "tinyworld"


PHOTOS = {".png", ".jpg", ".jpeg", ".webp"}
FORMS = {
    "none": "this, without a penalty",
    "paper": "this, the paper's penalty",
    "default": "this, layers and predictions",
}


class Run(NamedTuple):
    seconds: float
    megabytes: float


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compares a training script with one of diffusers'.")
    parser.add_argument("--peer", type=Path, required=True, help="A script of diffusers' examples/dreambooth.")
    parser.add_argument("--script", type=Path, default=ROOT / "train_dreambooth_lipschitz.py")
    parser.add_argument("--base", default=TINYWORLD / "sd", help="Pipeline; default: that of the toy benchmark.")
    parser.add_argument("--full_size", action="store_true", help="In place of --base, SD1.5's sizes, random weights.")
    parser.add_argument("--photos", type=Path, default=TINYWORLD / "subjects" / "mug")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=41)
    parser.add_argument("--rounds", type=int, default=3, help="All variants run in each; medians count.")
    parser.add_argument(
        "--forms", nargs="+", choices=FORMS, default=[*FORMS], help="Which forms of the penalty to measure."
    )
    parser.add_argument("--weight", default="500", help="Of the paper's penalty; for LoRA, 1 is its default.")
    parser.add_argument("--flags", default="", help="More flags of the script, such as --method=lora.")
    parser.add_argument("--peer_flags", default="", help="More flags of the peer.")
    parser.add_argument("--both_flags", default="", help="More flags of both, such as --gradient_checkpointing.")
    parser.add_argument("--prior", action="store_true", help="Prior preservation for the peer: 100 class images.")
    args = parser.parse_args()
    if not args.photos.is_dir() or not any(path.suffix.lower() in PHOTOS for path in args.photos.iterdir()):
        parser.error(f"--photos: there are no {', '.join(sorted(PHOTOS))} in {args.photos}")
    return args


def launch(script: Path, flags: list[str], log: Path) -> Run:
    """Seconds, and the most memory, of a launch of the script: of its processor if there is no GPU."""
    began = time.perf_counter()
    with log.open("w") as file:
        actions = [(os.POSIX_SPAWN_DUP2, file.fileno(), 1), (os.POSIX_SPAWN_DUP2, file.fileno(), 2)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(script), *flags]
        child = os.posix_spawn(sys.executable, command, environment, file_actions=actions)
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"{script.name} failed:\n{log.read_text()[-3000:]}")
    seconds = time.perf_counter() - began if torch.cuda.is_available() else usage.ru_utime + usage.ru_stime
    return Run(seconds, usage.ru_maxrss / 1024)


def show(values: list[float], digits: int = 2) -> str:
    """The median, with the lowest and the highest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        few = []
        if args.full_size:
            args.base = make_pipeline("sd15", args.resolution, folder / "base")
            folder.joinpath("prompts.txt").write_text("a red box\na green fish\n")  # all of them would take hours
            few = [f"--lipschitz_prompts_file={folder / 'prompts.txt'}"]
            # One photo: in a longer training, too, nearly all steps use photos that were encoded before.
            photo = min(path for path in args.photos.iterdir() if path.suffix.lower() in PHOTOS)
            args.photos = folder / "photo"
            args.photos.mkdir()
            shutil.copy(photo, args.photos)
        common = [f"--pretrained_model_name_or_path={args.base}", f"--instance_data_dir={args.photos}"]
        common += ["--instance_prompt=a photo of a sks mug", f"--resolution={args.resolution}", "--seed=0"]
        common += [f"--train_batch_size={args.batch}", "--learning_rate=5e-6", "--lr_warmup_steps=0"]
        common += [f"--output_dir={folder / 'model'}", *args.both_flags.split()]
        prior = ["--with_prior_preservation", "--class_prompt=a photo of a mug", "--num_class_images=100"]
        peer, own = copy_script(args.peer.absolute(), folder), args.flags.split()
        form_flags = {"none": ["--lipschitz_weight=0"], "paper": [f"--lipschitz_weight={args.weight}"], "default": few}
        variants = {"diffusers": (peer, args.peer_flags.split())}
        variants |= {FORMS[form]: (args.script, [*own, *form_flags[form]]) for form in args.forms}
        if args.prior:
            variants["diffusers, prior preservation"] = (peer, [*args.peer_flags.split(), *prior])
        runs = {name: [] for name in variants}
        for number in range(args.rounds):
            for name, (script, flags) in variants.items():
                own_flags = [*flags, f"--class_data_dir={folder / f'class-{number}'}"] if prior[0] in flags else flags
                of_round = []
                # The longer first: it draws the class images.
                for steps in (args.steps, 1):
                    shutil.rmtree(folder / "model", ignore_errors=True)
                    more = [f"--max_train_steps={steps}"]
                    of_round.append(launch(script, [*common, *own_flags, *more], folder / "log"))
                runs[name].append(of_round)

    rival = "diffusers, prior preservation" if args.prior else "diffusers"
    print(f"torch {torch.__version__}, {args.rounds} rounds of {args.steps} steps: medians (lowest-highest),")
    print(f"times as fast as {rival}\n")
    head = ["", "ms a step", "times as fast", "s for 1 step", "s for all", "times as fast", "MB"]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    per_step = {
        name: [1e3 * (long.seconds - short.seconds) / (args.steps - 1) for long, short in rounds]
        for name, rounds in runs.items()
    }
    for name, rounds in runs.items():
        faster = [theirs / ours for theirs, ours in zip(per_step[rival], per_step[name], strict=True)]
        whole = [theirs[0].seconds / ours[0].seconds for theirs, ours in zip(runs[rival], rounds, strict=True)]
        cells = [show(per_step[name], 0), show(faster), show([short.seconds for _, short in rounds], 1)]
        cells += [show([long.seconds for long, _ in rounds], 1), show(whole)]
        print(f"| {name} | {' | '.join(cells)} | {max(long.megabytes for long, _ in rounds):.0f} |")


if __name__ == "__main__":
    main()
