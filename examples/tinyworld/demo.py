"""Both halves of the promise in one picture and one table: the subject is learned, the rest of the model stays.

    python examples/tinyworld/demo.py                                # one subject, six minutes on two cores
    python examples/tinyworld/demo.py --subjects all --seeds 0 1     # all of them: as long for each of 16 pairs
    python examples/tinyworld/demo.py --sdxl                         # the same on the tiny SDXL

Trains the tiny model with the script for it and measures it; how it trains is that script's business.
"""

import argparse
import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from examine import BASE, NEW_SCENES, Examiner, generate, load, other_things, subject_prompt
from tqdm.auto import tqdm
from world import LOOKS, SUBJECTS, Look, caption_of, subject_photos


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


ROOT = Path(__file__).resolve().parents[2]
BASE_NAME = "base, untrained"

# Good settings for the tiny model; what is not named is the script's own default, which for the decay of weights is
# 0.01 without the penalty and 0 with it.
COMMON = ["--resolution=64", "--train_batch_size=4", "--learning_rate=1e-3", "--max_train_steps=120"]
# Falling to zero, so that the last steps settle where fit and penalty balance.
COMMON += ["--lr_scheduler=linear", "--lr_warmup_steps=0"]
METHODS = {
    "DreamBooth": ["--lipschitz_weight=0"],
    "prior preservation": ["--lipschitz_weight=0", "--with_prior_preservation", "--num_class_images=32"],
    "the paper's penalty": ["--lipschitz_weight=300"],
    "layers and predictions": [f"--lipschitz_prompts_file={BASE.with_name('preserved_prompts.txt')}"],
}


@dataclass(frozen=True)
class Setup:
    """What is personalized, and how."""

    base: Path
    script: Path
    common: list[str]
    methods: dict[str, list[str]]


SD = Setup(BASE, ROOT / "train_dreambooth_lipschitz.py", COMMON, METHODS)
SDXL = Setup(BASE.with_name("sdxl"), ROOT / "train_dreambooth_lipschitz_sdxl.py", ["--method=full", *COMMON], METHODS)


def train(setup: Setup, subject: str, method: str, seed: int, folder: Path, bar: tqdm) -> float:
    """Personalizes the base by running the script; returns the seconds that it took, start included."""
    photos = folder / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    for i, photo in enumerate(subject_photos(subject)):
        photo.save(photos / f"{i}.png")
    kind = LOOKS[subject].kind
    command = [sys.executable, str(setup.script)]
    command += [f"--pretrained_model_name_or_path={setup.base}", f"--instance_data_dir={photos}", f"--seed={seed}"]
    command += [f"--instance_prompt={subject_prompt(LOOKS[subject], '')}", f"--output_dir={folder / method}"]
    command += [f"--class_prompt=a photo of a {kind}", f"--class_data_dir={folder / 'class pictures'}"]
    command += [*setup.common, *setup.methods[method]]
    started = time.time()
    log = folder / f"{method}.log"
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        while process.poll() is None:
            time.sleep(0.5)
            now = re.findall(
                r"(?:Steps|Class images|Recording): .*?(\d+/\d+) \[", log.read_text(errors="replace")[-500:]
            )
            bar.set_postfix_str(now[-1] if now else "starting")  # and its clock goes on
    bar.set_postfix_str("")
    if process.returncode != 0:
        bar.close()
        reason = "\n".join(log.read_text().splitlines()[-10:])
        sys.exit(f"{reason}\nTraining {subject!r} by {method!r} failed. Full log: {log}")
    return time.time() - started


def hash_of(base: Path) -> str:
    """Tells one base from another: results of an earlier one are no results of this one."""
    return hashlib.sha256((base / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()[:8]


def save_picture(subject: str, seed: int, models: dict[str, Path], path: Path) -> None:
    """Rows: the photos, the base and each model; columns: the subject in four scenes and three other things."""
    look = LOOKS[subject]
    another = Look(look.kind, "blue" if look.colour != "blue" else "red", "dotted", "white", "none")
    strangers = [other for other in other_things(48) if other[0].kind != look.kind][:2]
    prompts = [subject_prompt(look, scene) for scene in NEW_SCENES[:4]]
    prompts += [caption_of(*other) for other in [(another, "in the sky"), *strangers]]
    rows = {"the photos": subject_photos(subject)}
    for name, folder in models.items():
        rows[name] = generate(load(folder), prompts, [1000 * seed + 900 + i for i in range(len(prompts))])
    figure, axes = plt.subplots(len(rows), len(prompts), figsize=(1.6 * len(prompts), 1.75 * len(rows)))
    for line, (name, pictures) in zip(axes, rows.items()):
        for column, axis in enumerate(line):
            axis.set_axis_off()
            if column < len(pictures):
                axis.imshow(pictures[column], interpolation="lanczos")
            if name == BASE_NAME:
                axis.set_title(textwrap.fill(prompts[column].removeprefix("a photo of "), 20), fontsize=8)
        label = textwrap.fill(name, 20)
        line[0].text(-0.08, 0.5, label, rotation=90, ha="right", va="center", transform=line[0].transAxes, fontsize=9)
    figure.subplots_adjust(left=0.04, right=0.995, bottom=0.005, top=0.995, wspace=0.04, hspace=0.16)
    figure.savefig(path, dpi=110)
    plt.close(figure)


COLUMNS = {
    "fidelity": "subject fidelity",
    "subject scene": "its scene right",
    "other scene": "others: scene",
    "other class": "others: class",
    "other colour": "others: colour",
    "other pattern": "others: pattern",
    "drift": "drift",
    "seconds": "seconds",
}


def print_table(results: list[dict]) -> None:
    """Mean over the results of each method, and where there are several the standard deviation between them."""
    print(f"\n{'':24s}" + "".join(f"{title:>17s}" for title in COLUMNS.values()))
    present = {result["method"] for result in results}
    for method in (name for name in (BASE_NAME, *METHODS) if name in present):
        cells = ""
        for name in COLUMNS:
            scale = 1 if name in ("drift", "seconds") else 100
            values = [scale * result[name] for result in results if result["method"] == method]
            spread = f" ± {np.std(values):.1f}" if len(values) > 1 else ""
            cells += f"{f'{np.mean(values):.1f}{spread}':>17s}"
        print(f"{method:24s}{cells}")
    print(
        "\nsubject fidelity: % of the subject's five traits that the judge reads in pictures of it in new scenes."
        "\nits scene right: % of those pictures in which the scene is the one asked for."
        "\nothers: % of pictures of other things in which scene, class, colour, pattern are those asked for."
        "\ndrift: how far those pictures are from the base's with the same seeds (RMS grey levels, 0 to 255)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train with each form of the penalty and without; draw and measure the difference."
    )
    parser.add_argument("--sdxl", action="store_true", help="Personalize the tiny SDXL.")
    parser.add_argument("--subjects", nargs="+", default=["mug"], choices=[*LOOKS, "all"], metavar="NAME")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="Seeds of the trainings and of the pictures."
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="Which ones to train.")
    parser.add_argument("--others", type=int, default=32, help="How many prompts that do not name the subject.")
    parser.add_argument(
        "--output_dir", type=Path, help="Folder of the picture and results.jsonl; default: demo, or demo/sdxl."
    )
    args = parser.parse_args()
    setup = SDXL if args.sdxl else SD
    args.output_dir = args.output_dir or Path("demo", "sdxl" if args.sdxl else "")
    subjects = list(SUBJECTS) if "all" in args.subjects else args.subjects
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "results.jsonl"
    names = (BASE_NAME, *args.methods)
    base = hash_of(setup.base)
    flags = {name: [*setup.common, *setup.methods[name]] for name in args.methods} | {BASE_NAME: []}
    settings = {name: {"base": base, "flags": flags[name], "others": args.others} for name in names}
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    # What was measured in another way is measured again; its line stays in the file.
    results = [result for result in results if result["settings"] == settings.get(result["method"])]
    done = {(result["subject"], result["seed"], result["method"]) for result in results}
    things, model = " and of a ".join(subjects), "SDXL" if args.sdxl else "Stable Diffusion"
    print(f"Personalizes a tiny {model} on five pictures of a {things}: {', '.join(args.methods)}.", flush=True)
    # For each pair of subject and seed: all trainings, all measurements and the picture.
    parts = len(args.methods) + len(names) + 1
    # Without the time that is left: a training takes many times as long as a picture.
    layout = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
    bar = tqdm(total=len(subjects) * len(args.seeds) * parts, bar_format=layout)
    for seed in args.seeds:
        examiner = Examiner(args.others, per_scene=4, seed=seed)
        for subject in subjects:
            folder = args.output_dir / f"{subject}-{seed}"
            models = {name: folder / name for name in args.methods}
            if {(subject, seed, name) for name in names} <= done:
                bar.update(parts)
                continue
            shutil.rmtree(folder, ignore_errors=True)
            for name in names:
                seconds = 0.0
                if name != BASE_NAME:
                    bar.set_description(f"training, {name}")
                    seconds = train(setup, subject, name, seed, folder, bar)
                    bar.update()
                bar.set_description(f"measuring, {name}")
                measured = examiner.examine(load(models.get(name, setup.base)), subject)
                bar.update()
                if (subject, seed, name) not in done:
                    result = {"subject": subject, "seed": seed, "method": name, **measured, "seconds": seconds}
                    results.append({**result, "settings": settings[name]})
                    with path.open("a") as file:
                        print(json.dumps(results[-1]), file=file)
            bar.set_description("drawing the picture")
            save_picture(subject, seed, {BASE_NAME: setup.base, **models}, folder.with_suffix(".png"))
            shutil.rmtree(folder)
            bar.update()
    bar.set_description("done")
    bar.close()
    print()
    for seed, subject in itertools.product(args.seeds, subjects):
        print(f"the picture: {args.output_dir / f'{subject}-{seed}.png'}")
    print_table([result for result in results if result["subject"] in subjects and result["seed"] in args.seeds])


if __name__ == "__main__":
    main()
