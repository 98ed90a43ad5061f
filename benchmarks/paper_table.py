# The paper's Table 1 on the drawn world: methods at one number of steps, measured by evaluate_dreambooth.py.
"""
python benchmarks/paper_table.py --subjects mug star --seeds 0
python benchmarks/paper_table.py --shard 1/2      # all of it; 2/2 on another machine, or another core
python benchmarks/paper_table.py --print docs/paper_table.jsonl

A stopped run goes on with the same command. Judges are the drawn world's CLIP and ViT. What the exact judge says of
the same trainings, and of many more: tradeoff.py.
"""

import argparse
import csv
import json
import shutil
from pathlib import Path

import numpy as np
from accelerate.state import AcceleratorState
from plot_tradeoff import bootstrap, interval, print_table, show
from tqdm.auto import tqdm
from tradeoff import (
    LOOKS,
    SD,
    SUBJECTS,
    TINYWORLD,
    Training,
    append_line,
    load_script,
    read_lines,
    shard,
    shard_of,
    train,
    trainings_of,
)


# Method, learning rate and weight of trainings of tradeoff.py: a rate at which DreamBooth breaks things,
# alone and with either penalty at its best weight; then the rivals at theirs.
CHOSEN = [
    ("DreamBooth", 1e-3, 0),
    ("penalty", 1e-3, 300),
    ("penalty on layers", 1e-3, 4),
    ("DreamBooth", 5e-4, 0),
    ("DreamBooth", 3e-4, 0),
    ("prior preservation", 5e-4, 0),
]
PROBES = ["--probes=8", "--probe_timesteps=25"]
DRAWING = ["--num_inference_steps=25", "--guidance_scale=4", "--batch_size=20"]
# By name in `metrics.json`: title, factor, digits, and where the same is said of the base.
NUMBERS = {
    "subject/personalized/dino": ("DINO", 1, 3, "subject/base/dino"),
    "subject/personalized/clip_i": ("CLIP-I", 1, 3, "subject/base/clip_i"),
    "subject/personalized/clip_t": ("CLIP-T", 1, 3, "subject/base/clip_t"),
    "subject/personalized/diversity": ("diversity", 1, 3, "subject/base/diversity"),
    "other/personalized/clip_t": ("others' CLIP-T", 1, 3, "other/base/clip_t"),
    "drift/dino_distance": ("drift, DINO", 1, 3, None),
    "drift/clip_distance": ("drift, CLIP", 1, 3, None),
    "drift/pixel_rms": ("drift, pixels", 1, 1, None),
    "drift/cmmd": ("drift, CMMD", 1, 2, None),
    "drift/frechet_dino": ("drift, Fréchet (DINO)", 1, 2, None),
    "prediction_drift/other/mean": ("drift of predictions, %", 100, 1, None),
    "prediction_drift/other/guided": ("drift of guided predictions, %", 100, 1, None),
    "prediction_drift/other/kl_bound": ("KL bound, nats", 1, 1, None),
}


def chosen_trainings() -> list[Training]:
    trainings = {training[:3]: training for training in trainings_of(["dreambooth", "penalty", "layers", "prior"])}
    return [trainings[key] for key in CHOSEN]


def evaluate(training: Training, subject: str, seed: int, work: Path) -> dict[str, dict]:
    """
    Trains, and returns the numbers of `metrics.json` as "metrics"; as "prompts", by prompt, the drift in pixels of
    those that do not name the subject and CLIP-T of those that do, means over the personalized model's pictures.
    """
    model, evaluation = work / "model", work / "evaluation"
    for folder in (model, evaluation):
        shutil.rmtree(folder, ignore_errors=True)
    train(SD, training, subject, seed, model)
    script = load_script("evaluate_dreambooth")
    flags = [f"--pretrained_model_name_or_path={model}", f"--base_model_name_or_path={SD.base}"]
    flags += [f"--instance_data_dir={TINYWORLD / 'subjects' / subject}", "--instance_token=sks"]
    flags += [f"--class_name={LOOKS[subject].kind}", f"--seed={seed}"]
    flags += [f"--{kind}_file={TINYWORLD / kind}.txt" for kind in ("prompts", "other_prompts")]
    flags += [f"--clip_model={TINYWORLD / 'clip'}", f"--dino_model={TINYWORLD / 'vit'}"]
    flags += [*PROBES, *DRAWING, f"--base_images_dir={work / f'base-{subject}-{seed}'}", f"--output_dir={evaluation}"]
    AcceleratorState._reset_state(reset_partial_state=True)  # which a script of its own process does not find
    script.main(script.parse_args(flags))
    metrics = json.loads((evaluation / "metrics.json").read_text())
    prompts = {}
    with (evaluation / "images.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["model"] == "personalized":
                text = row["prompt"].replace(f"sks {LOOKS[subject].kind}", "{subject}")
                text = text.replace(f"a photo of a {LOOKS[subject].kind}", "a photo of a {class}")
                measured = float(row["clip_t" if row["kind"] == "subject" else "pixel_rms"])
                prompts.setdefault(row["kind"], {}).setdefault(text, []).append(measured)
    return {
        "metrics": script.flatten({name: value for name, value in metrics.items() if name != "settings"}),
        "prompts": {kind: {text: float(np.mean(of)) for text, of in by.items()} for kind, by in prompts.items()},
    }


def print_results(lines: list[dict]) -> None:
    """
    Means over subjects and seeds, and how much more it is than with each method that has no penalty, with 95%
    confidence intervals by bootstrap over subjects; of the subjects and seeds that all methods have.
    """
    found = {}
    for line in lines:
        key = (line["method"], line["rate"], line["weight"])
        found.setdefault(key, {})[line["subject"], line["seed"]] = line
    complete = sorted(set.intersection(*map(set, found.values()))) if len(found) == len(CHOSEN) else []
    if not complete:
        raise SystemExit("paper_table.py: error: no subject and seed has been measured with all methods yet")
    subjects, seeds = (sorted(set(values)) for values in zip(*complete))
    print(f"Subjects: {', '.join(subjects)}; seeds: {', '.join(map(str, seeds))}.")

    def by_subject(key: tuple, name: str) -> np.ndarray:
        """(subjects,), means over seeds"""
        values = {pair: found[key][pair]["metrics"][name] for pair in complete}
        return np.array([np.mean([values[pair] for pair in complete if pair[0] == subject]) for subject in subjects])

    methods = [f"{name} at {rate:g}" + f", weight {weight:g}" * bool(weight) for name, rate, weight in CHOSEN]
    means, gains = [], {key: [] for key in CHOSEN if "penalty" not in key[0]}
    measured = set.intersection(*(set(found[key][pair]["metrics"]) for key in CHOSEN for pair in complete))
    for name, (title, factor, digits, of_base) in NUMBERS.items():
        if name not in measured:  # the last two are newer than our results
            continue
        values = [factor * by_subject(key, name) for key in CHOSEN]
        base = "0" if of_base is None else f"{factor * by_subject(CHOSEN[0], of_base).mean():.{digits}f}"
        means.append([title, base, *(f"{value.mean():.{digits}f}" for value in values)])
        for rival, rows in gains.items():
            cells = []
            for value in values:
                gain = value - values[CHOSEN.index(rival)]
                limits = interval(bootstrap(len(subjects), lambda chosen: gain[chosen].mean(-1)), len(subjects))
                cells.append(show(gain.mean(), limits, digits=digits))
            rows.append([title, *cells])
    print_table("Means", ["", "base", *methods], means)
    for rival, rows in gains.items():
        print_table(f"More than {methods[CHOSEN.index(rival)]}", ["", *methods], rows)
    for kind, title, digits in (("other", "drift in pixels", 1), ("subject", "CLIP-T", 3)):
        rows = []
        for text in found[CHOSEN[0]][complete[0]]["prompts"][kind]:
            values = [np.mean([found[key][pair]["prompts"][kind][text] for pair in complete]) for key in CHOSEN]
            rows.append([text, *(f"{value:.{digits}f}" for value in values)])
        print_table(f"By prompt: {title}", ["", *methods], rows)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train methods on the drawn world and evaluate them as users do.")
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=LOOKS, help="The first eight.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Of trainings and pictures.")
    parser.add_argument("--shard", type=shard, default="1/1", help="i/n: part i of n, for n machines or cores.")
    parser.add_argument("--output_dir", type=Path, default=Path("paper_table"), help="A file for each shard.")
    parser.add_argument("--print", nargs="+", type=Path, dest="files", help="Print the table of these files, no more.")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    if not args.files:
        name = args.shard.replace("/", "-of-")
        path, work = args.output_dir / f"{name}.jsonl", args.output_dir / f"work-{name}"
        work.mkdir(parents=True, exist_ok=True)
        pairs = shard_of([(seed, subject) for seed in args.seeds for subject in args.subjects], args.shard)
        todo = [(training, *pair) for pair in pairs for training in chosen_trainings()]
        for training, seed, subject in tqdm(todo, desc="trainings"):
            row = {"subject": subject, "seed": seed, **training._asdict()}
            row = {name: row[name] for name in ("subject", "seed", "method", "rate", "weight")}
            done = [line for file in args.output_dir.glob("*.jsonl") for line in read_lines(file)]
            if row not in [{name: line[name] for name in row} for line in done]:
                append_line(path, row | evaluate(training, subject, seed, work))
        shutil.rmtree(work)
    files = args.files or sorted(args.output_dir.glob("*.jsonl"))
    print_results([line for file in files for line in read_lines(file)])


if __name__ == "__main__":
    main(parse_args())
