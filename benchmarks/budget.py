# Whether a drift budget holds on captions that nothing has used, in the drawn world: over methods, rates and subjects.
# Trains with the default spaces of a budget, takes back what is beyond each budget, and measures what is left.
"""
python benchmarks/budget.py --subjects mug star heart        # and --sdxl; --shard 1/2 and 2/2 for two cores
python benchmarks/budget.py --table budget/*.jsonl

A stopped run goes on with the same command. Taking back is what `--drift_budget` does at the end of a training
(lipschitz_reg.budget); one training serves all budgets here.
"""

import argparse
import functools
import itertools
import math
import shutil
import statistics
from pathlib import Path

import torch
from tqdm.auto import tqdm
from tradeoff import (
    COMMON,
    CUSTOM,
    LOOKS,
    LORA,
    RECORDING,
    SD,
    SDXL,
    Ruler,
    Training,
    append_line,
    hash_of,
    read_lines,
    record_base,
    shard,
    shard_of,
    train,
    trained_unet,
)

from lipschitz_reg import Drift, Recording
from lipschitz_reg.budget import fit_share


SPACES = "--lipschitz_layers --lipschitz_predictions" + RECORDING
# Two rates each; without a penalty, the higher one breaks things.
METHODS = {
    "full": (SPACES, (5e-4, 1e-3)),
    "LoRA": (LORA + SPACES, (2e-3, 4e-3)),
    "Custom Diffusion": (CUSTOM + SPACES, (2e-3, 4e-3)),
    # To see what the spaces are worth: the same without a penalty, and with the paper's.
    "plain DreamBooth": ("--lipschitz_weight=0", (5e-4, 1e-3)),
    "distance": ("--lipschitz_weight=300", (1e-3,)),
}


def training_of(method: str, rate: float, steps: int) -> Training:
    flags, _ = METHODS[method]
    own = [*COMMON, *flags.split(), f"--learning_rate={rate}", "--lr_scheduler=linear"]
    return Training(method, rate, 0.0, "linear", steps, (*own, f"--max_train_steps={steps}"), (), ())


def measure(
    ruler: Ruler,
    unet: dict,
    training: Training,
    subject: str,
    folder: Path,
    path: Path,
    budgets: list[float],
    pictures: bool,
) -> list[dict]:
    """A line for the model as it was trained, and for what is left of it within each budget."""
    model, base = ruler.pipeline.unet, ruler.base
    model.load_state_dict(base)
    recording = Recording.load(path, model)

    @functools.cache  # all budgets begin with the whole displacement
    def drift_at(share: float) -> Drift:
        model.load_state_dict({name: torch.lerp(weight, unet[name], share) for name, weight in base.items()})
        return recording.drift()

    lines = []
    for budget in [None, *budgets]:
        share = 1.0 if budget is None else fit_share(lambda share: drift_at(share).dial, budget)[0]
        left = {name: torch.lerp(weight, unet[name], share) for name, weight in base.items()}
        held_out = drift_at(share)
        measured = ruler.measure(left, subject, training, folder, pictures)
        errors = {"held out": held_out.guided_prediction, "held out standard error": held_out.standard_error}
        lines.append({"budget": budget, "share": share, **errors, **measured})
    return lines


def table(lines: list[dict]) -> None:
    """Drift on fresh captions beside the budget, and which number best follows the drift of pictures."""
    print("| | rate | steps | budget | share kept | guided | plain | guided over budget | fidelity | pictures |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    keys = ("method", "rate", "steps", "budget")
    groups = {}
    for line in lines:
        groups.setdefault(tuple(line[key] for key in keys), []).append(line)
    for (method, rate, steps, budget), rows in sorted(groups.items(), key=str):
        mean = {}
        for name in ("share", "guided drift", "prediction drift", "fidelity", "drift"):
            if name in rows[0]:
                mean[name] = statistics.mean(row[name] for row in rows if name in row)
        of = [row["guided drift"] / budget for row in rows if budget and row["share"] < 1]
        ratios = f"{min(of):.2f} to {max(of):.2f}" if of else ""
        what = f"{budget:.0%}" if budget else "none"
        pictures = f"{mean['fidelity']:.0%} | {mean['drift']:.1f}" if "drift" in mean else " | "
        print(
            f"| {method} | {rate:g} | {steps} | {what} | {mean['share']:.0%} | {mean['guided drift']:.2%} |"
            f" {mean['prediction drift']:.2%} | {ratios} | {pictures} |"
        )
    print("\n| base | method | guided over budget | mean | models |\n|---|---|---|---|---|")
    over = {}
    for line in lines:
        if line["budget"] and line["share"] < 1:  # the others were within the budget as they were trained
            for method in (line["method"], "together"):
                over.setdefault((line["base"], method), []).append(line["guided drift"] / line["budget"])
    for (base, method), of in sorted(over.items()):
        print(f"| {base} | {method} | {min(of):.2f} to {max(of):.2f} | {statistics.mean(of):.2f} | {len(of)} |")
    for base, rows in itertools.groupby(sorted(lines, key=lambda row: row["base"]), lambda row: row["base"]):
        rows = list(rows)
        for name in ("prediction drift", "guided drift"):
            logs = [math.log(row["drift"] / row[name]) for row in rows if row.get("drift") and row[name] > 0]
            if len(logs) > 1:
                print(f"{base}: drift of pictures over {name}: scatter {math.exp(statistics.stdev(logs)) - 1:.1%}")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Does a drift budget hold on captions that nothing has used?")
    parser.add_argument("--sdxl", action="store_true", help="Personalize the tiny SDXL.")
    parser.add_argument("--subjects", nargs="+", default=["mug", "star", "heart"], choices=LOOKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS)[:3], choices=METHODS)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.03, 0.05, 0.08])
    parser.add_argument("--steps", nargs="+", type=int, default=[120])
    parser.add_argument("--no_pictures", dest="pictures", action="store_false", help="Measure predictions alone.")
    parser.add_argument("--shard", type=shard, default="1/1", help="i/n: part i of n, for n cores.")
    parser.add_argument("--output_dir", type=Path, default=Path("budget"))
    parser.add_argument("--table", nargs="+", type=Path, help="Print what these results say; nothing is trained.")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    if args.table:
        return table([line for path in args.table for line in read_lines(path)])
    setup = SDXL if args.sdxl else SD
    settings = {"base": hash_of(setup.base), "others": 53, "per_scene": 4}  # 53 captions that are not recorded
    name = args.shard.replace("/", "-of-") + ("-sdxl" if args.sdxl else "")
    path, work = args.output_dir / f"{name}.jsonl", args.output_dir / f"work-{name}"
    work.mkdir(parents=True, exist_ok=True)
    recording = record_base(setup, work)
    keys = ("base", "subject", "method", "rate", "steps", "budget")
    done = [[line[key] for key in keys] for file in args.output_dir.glob("*.jsonl") for line in read_lines(file)]
    runs = [
        (training_of(method, rate, steps), subject)
        for subject in args.subjects
        for steps in args.steps
        for method in args.methods
        for rate in METHODS[method][1]
    ]
    ruler = None
    for training, subject in tqdm(shard_of(runs, args.shard), desc="trainings"):
        what = {"base": setup.base.name, "subject": subject}
        what |= {"method": training.method, "rate": training.rate, "steps": training.steps}
        missing = [budget for budget in args.budgets if [*what.values(), budget] not in done]
        if not missing:
            continue
        ruler = ruler or Ruler(setup, settings, seed=0)
        folder = work / "model"
        shutil.rmtree(folder, ignore_errors=True)
        seconds = train(setup, training, subject, 0, folder)["seconds"]
        unet = trained_unet(setup, training, folder)
        for line in measure(ruler, unet, training, subject, folder, recording, missing, args.pictures):
            append_line(path, {**what, "seconds": seconds, **line})
    shutil.rmtree(work)


if __name__ == "__main__":
    main(parse_args())
