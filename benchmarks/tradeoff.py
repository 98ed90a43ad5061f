# Fidelity against drift on the drawn world: every method, weight, learning rate and stop, each a line in a JSONL file.
# Trains and measures. The figures, and the numbers that settle the claims, plot_tradeoff.py draws from that file.
"""
python benchmarks/tradeoff.py --grid penalty dreambooth --subjects mug star --seeds 0
python benchmarks/tradeoff.py --shard 1/2      # all of it; 2/2 on another machine, or another core (OMP_NUM_THREADS=1)
python benchmarks/plot_tradeoff.py tradeoff/*.jsonl

A stopped run goes on with the same command. Minutes of each part: docs/benchmarks.md. A training is a call of `main`
of the training script in this process: what a launch of the script trains, less its start of 12 seconds.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import math
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm

from lipschitz_reg import record, record_pipeline


ROOT = Path(__file__).resolve().parents[1]
TINYWORLD = ROOT / "examples" / "tinyworld"
sys.path.insert(0, str(TINYWORLD))
GUIDANCE = 4.0  # of the pictures that are judged
ANCESTRAL_STEPS = 25  # in which the bound on the KL divergence is measured

from demo import BASE_NAME, SD, SDXL, Setup, hash_of, save_picture  # noqa: E402
from examine import Examiner, load, subject_prompt  # noqa: E402
from rivals import RIVALS  # noqa: E402
from world import LOOKS, SUBJECTS  # noqa: E402


class Row(NamedTuple):
    """
    Trainings that belong to one curve: one for each rate, weight and number of steps.

    `flags` go to the script, `{}` in them is the weight (or radius, or strength). With `stops`, checkpoints of a
    training are measured on the way; that is early stopping only at a constant rate, and with a falling one a stop
    is a training of its own, that is, another number in `steps`. With `shares`, so is base + share * (trained - base).
    """

    method: str
    rates: tuple[float, ...]
    weights: tuple[float, ...] = (0,)
    flags: str = "--lipschitz_weight={}"
    schedule: str = "linear"
    steps: tuple[int, ...] = (250,)
    stops: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()


NONE = "--lipschitz_weight=0"
PENALTY, PRIOR = "--lipschitz_weight={}", NONE + " --with_prior_preservation"
WORD = "<new1>"  # of Custom Diffusion, which begins as the token of the other methods
PROJECTED = "--lipschitz_weight=1 --lipschitz_mode=projected --lipschitz_radius={}"
FACTORS = PENALTY + " --lipschitz_lora=factors --lipschitz_reduction=sum"
# Of 32 captions of things, and 32 more to measure a budget by; none of them is measured here.
RECORDING = " --lipschitz_recording={recording}"
LAYERS, PREDICTIONS = "--lipschitz_layers={}" + RECORDING, "--lipschitz_predictions={}" + RECORDING
BOTH = LAYERS + " --lipschitz_predictions=1"
LORA = "--method=lora --rank=16 "
CUSTOM = f"--method=custom_diffusion --modifier_token={WORD} --initializer_token=sks "

GRIDS = {
    # The table of docs/methods.md: each method with the penalty and without.
    "methods": [
        Row("DreamBooth", (1.5e-3,)),
        Row("penalty", (1.5e-3,), (350,)),
        Row("LoRA", (4e-3,), flags=LORA + PENALTY),
        Row("LoRA, delta", (4e-3,), (1,), LORA + PENALTY),
        Row("Custom Diffusion", (4e-3,), flags=CUSTOM + PENALTY),
        Row("Custom Diffusion, penalty", (4e-3,), (3,), CUSTOM + PENALTY),
    ],
    # Claims 1, 2, 3 and 6: the penalty, and its rivals at their best. All do best with fewer steps than the demo's.
    "dreambooth": [
        Row("DreamBooth", (2e-4, 3e-4), steps=(120,)),
        Row("DreamBooth", (5e-4, 1e-3), steps=(120,), shares=(0.4, 0.7)),
    ],
    "early": [
        Row("DreamBooth, stopped early", (2e-4,), schedule="constant", steps=(120,), stops=(30, 60)),
        Row("DreamBooth, stopped early", (5e-4,), schedule="constant", steps=(60,), stops=(15, 30)),
    ],
    "penalty": [
        Row("penalty", (1e-3,), (100, 300, 1000), steps=(120,)),
        Row("penalty", (5e-4,), (100, 300), steps=(120,)),
        Row("penalty", (2e-4,), (100,), steps=(120,)),
    ],
    # Claims 2 and 5: the other spaces; layers also with the scripts' own prompts, which are of photographs and not of
    # the drawn world.
    "layers": [
        Row("penalty on layers", (1e-3,), (1, 4, 16), LAYERS, steps=(120,)),
        Row("penalty on layers, default prompts", (1e-3,), (4,), "--lipschitz_layers={}", steps=(120,)),
    ],
    "predictions": [
        Row("penalty on predictions", (1e-3,), (3, 10), PREDICTIONS, steps=(120,)),
        Row("layers and predictions", (1e-3,), (1, 4, 16), BOTH, steps=(120,), shares=(0.75,)),
    ],
    # The spaces side by side: the table in docs/methods.md.
    "spaces": [
        Row("DreamBooth", (1e-3,), steps=(120,)),
        Row("penalty", (1e-3,), (300,), steps=(120,)),
        Row("penalty on layers", (1e-3,), (4,), LAYERS, steps=(120,)),
        Row("penalty on predictions", (1e-3,), (3,), PREDICTIONS, steps=(120,)),
        Row("layers and predictions", (1e-3,), (4,), BOTH, steps=(120,)),
        Row("layers and predictions, weight 3", (1e-3,), (4,), LAYERS + " --lipschitz_predictions=3", steps=(120,)),
    ],
    # docs/results.md: for each method the settings that did best on the first eight subjects, for the other eight; and
    # of rivals some that came later, so that each reaches the fidelities that are compared.
    "claims": [
        Row("layers and predictions", (1e-3,), (1, 4), BOTH, steps=(120,), shares=(0.75,)),
        Row("penalty", (1e-3,), (300,), steps=(120,)),
        Row("penalty", (5e-4,), (300,), steps=(120,), shares=(0.75,)),
        Row("DreamBooth", (3e-4,), steps=(120,), shares=(0.75, 0.85)),
        Row("DreamBooth", (1e-3,), steps=(120,), shares=(0.4, 0.7)),
        Row("DreamBooth, stopped early", (2e-4,), (0,), NONE, "constant", (120,), (60,), (0.75,)),
        Row("DreamBooth, stopped early", (5e-4,), schedule="constant", steps=(60,), stops=(15, 30)),
        Row("prior preservation", (5e-4,), flags=PRIOR, steps=(120,)),
        Row("prior preservation", (1e-3,), (0.1,), PRIOR + " --prior_loss_weight={}", steps=(120,), shares=(0.75,)),
        Row("class preservation", (1e-3,), (0.3,), NONE, steps=(120,), shares=(0.5, 0.75)),
        Row("class preservation", (1e-3,), (1,), NONE, steps=(120,), shares=(0.75,)),
        Row("blank prompt preservation", (1e-3,), (1,), NONE, steps=(120,), shares=(0.75,)),
        Row("null space", (1e-3,), (0.9,), NONE, steps=(120,)),
        Row("null space", (1e-3,), (0.99,), NONE, steps=(120,), shares=(0.6, 0.75)),
        Row("selective projection decay", (1e-3,), (1,), NONE, steps=(120,)),
        Row("selective projection decay", (1e-3,), (2,), NONE, steps=(120,), shares=(0.75,)),
        Row("LoRA, layers and predictions", (4e-3,), (0.05,), LORA + BOTH, shares=(0.75,)),
        Row("LoRA", (4e-3,), flags=LORA + PENALTY, shares=(0.5, 0.75)),
        Row("LoRA, penalty", (4e-3,), (1,), LORA + PENALTY, shares=(0.75,)),
        Row("LoRA, stopped early", (4e-3,), (0,), LORA + PENALTY, "constant", (120,), (30, 60)),
        Row("LoRA, class preservation", (4e-3,), (3,), LORA + NONE),
        Row("LoRA, class preservation", (4e-3,), (0.3,), LORA + NONE, shares=(0.5, 0.75)),
        Row("LoRA, blank prompt preservation", (4e-3,), (1,), LORA + NONE, shares=(0.5, 0.75)),
        Row("Custom Diffusion, layers and predictions", (4e-3,), (0.02,), CUSTOM + BOTH, shares=(0.75,)),
        Row("Custom Diffusion, layers and predictions", (4e-3,), (0.08,), CUSTOM + BOTH),
        Row("Custom Diffusion", (4e-3,), flags=CUSTOM + PENALTY, shares=(0.5, 0.75)),
        Row("Custom Diffusion, penalty", (4e-3,), (3,), CUSTOM + PENALTY, shares=(0.75,)),
        Row("Custom Diffusion, stopped early", (4e-3,), (0,), CUSTOM + PENALTY, "constant", (120,), (30, 60)),
        Row("Custom Diffusion, prior preservation", (4e-3,), flags=CUSTOM + PRIOR, steps=(60,)),
        Row("Custom Diffusion, class preservation", (4e-3,), (3,), CUSTOM + NONE, shares=(0.5, 0.75)),
        Row("Custom Diffusion, null space", (4e-3,), (0.9,), CUSTOM + NONE, shares=(0.5, 0.75)),
    ],
    # What people use besides, and relatives of it (rivals.py).
    "rivals": [
        Row("class preservation", (5e-4, 1e-3), (1, 3), NONE, steps=(120,)),
        Row("class preservation", (1e-3,), (0.3,), NONE, steps=(120,)),
        Row("blank prompt preservation", (1e-3,), (1, 3), NONE, steps=(120,)),
        Row("null space", (1e-3,), (0.9, 0.99), NONE, steps=(120,)),
        Row("proximal with 8-bit anchors", (1e-3,), (1e6,), PENALTY + " --lipschitz_mode=proximal", steps=(120,)),
        Row("LoRA, class preservation", (4e-3,), (1, 3), LORA + NONE),
        Row("LoRA, blank prompt preservation", (4e-3,), (1,), LORA + NONE),
        Row("LoRA, null space", (4e-3,), (0.9,), LORA + NONE),
        Row("Custom Diffusion, class preservation", (4e-3,), (1, 3), CUSTOM + NONE),
        Row("Custom Diffusion, null space", (4e-3,), (0.9,), CUSTOM + NONE),
    ],
    "prior": [
        Row("prior preservation", (2e-4, 5e-4, 1e-3), flags=PRIOR, steps=(120,)),
        Row("prior preservation", (1e-3,), flags=PRIOR, steps=(250,)),
        Row("prior preservation", (1e-3,), (0.1, 0.3), PRIOR + " --prior_loss_weight={}", steps=(120,)),
    ],
    # Claim 6, for --draw: no penalty, the weight that is about right, and too much.
    "limits": [
        Row("DreamBooth", (2e-4, 1e-3), steps=(120,)),
        Row("penalty", (1e-3,), (300, 1000, 3000), steps=(120,)),
    ],
    # Claim 4: what reaches a fidelity in fewer steps.
    "short": [Row("penalty", (1e-3, 2e-3), (100,), steps=(60,))],
    # Claim 5: other forms of the penalty, beside "penalty", which is coupled and tensor_mean.
    "forms": [
        Row("proximal", (1e-3,), (3e5, 1e6), PENALTY + " --lipschitz_mode=proximal", steps=(120,)),
        Row("projected", (1e-3,), (4, 6), PROJECTED, steps=(120,)),
        Row("sum", (1e-3,), (3e-3, 1e-2), PENALTY + " --lipschitz_reduction=sum", steps=(120,)),
        Row("selective projection decay", (1e-3,), (1, 2, 4), NONE, steps=(120,)),
        Row("penalty, constant rate", (5e-4,), (300,), schedule="constant", steps=(120,)),
    ],
    "lora": [
        Row("LoRA", (2e-3,), flags=LORA + PENALTY),
        Row("LoRA", (4e-3,), flags=LORA + PENALTY, shares=(0.5, 0.75)),
        Row("LoRA, stopped early", (4e-3,), (0,), LORA + PENALTY, "constant", (120,), (30, 60)),
        Row("LoRA, delta", (4e-3,), (0.3, 1), LORA + PENALTY),
        Row("LoRA, factors", (4e-3,), (1e-4,), LORA + FACTORS),
        Row("LoRA, penalty on layers", (4e-3,), (0.05, 0.2), LORA + LAYERS),
        Row("LoRA, layers and predictions", (4e-3,), (0.05, 0.2), LORA + BOTH),
    ],
    "custom": [
        Row("Custom Diffusion", (1e-3,), flags=CUSTOM + PENALTY),
        Row("Custom Diffusion", (4e-3,), flags=CUSTOM + PENALTY, steps=(60,)),
        Row("Custom Diffusion", (4e-3,), flags=CUSTOM + PENALTY, shares=(0.5, 0.75)),
        Row("Custom Diffusion, stopped early", (4e-3,), (0,), CUSTOM + PENALTY, "constant", (120,), (30, 60)),
        Row("Custom Diffusion, penalty", (4e-3,), (3,), CUSTOM + PENALTY, steps=(60, 250)),
        Row("Custom Diffusion, penalty on layers", (4e-3,), (0.02, 0.08), CUSTOM + LAYERS),
        Row("Custom Diffusion, layers and predictions", (4e-3,), (0.02, 0.08), CUSTOM + BOTH),
        Row("Custom Diffusion, prior preservation", (4e-3,), flags=CUSTOM + PRIOR, steps=(60, 250)),
    ],
}  # fmt: skip

# No decay towards zero: it would be drift that no method asked for.
COMMON = ["--method=full", "--resolution=64", "--train_batch_size=4", "--lr_warmup_steps=0", "--adam_weight_decay=0"]


class Training(NamedTuple):
    """One of the trainings of a `Row`."""

    method: str
    rate: float
    weight: float
    schedule: str
    steps: int
    flags: tuple[str, ...]
    stops: tuple[int, ...]
    shares: tuple[float, ...]


NO_TRAINING = Training("base", 0.0, 0.0, "none", 0, (), (), ())


class Result(NamedTuple):
    """What is measured of a training: `stop` steps of it, and the `share` of the way from the base."""

    method: str
    stop: int
    share: float


def trainings_of(names: list[str]) -> list[Training]:
    """The trainings of some grids, each once with all that is measured of it; the base, which needs none, first."""
    trainings = {NO_TRAINING: ((), ())}
    for row in (row for name in names for row in GRIDS[name]):
        for rate, weight, steps in itertools.product(row.rates, row.weights, row.steps):
            own = row.flags.format(weight, recording="{recording}").split()
            flags = (*COMMON, *own, f"--learning_rate={rate}")
            flags += (f"--lr_scheduler={row.schedule}", f"--max_train_steps={steps}")
            training = Training(row.method, rate, weight, row.schedule, steps, flags, (), ())
            stops, shares = trainings.get(training, ((), ()))
            trainings[training] = (dict.fromkeys((*stops, *row.stops)), dict.fromkeys((*shares, *row.shares)))
    return [
        training._replace(stops=tuple(stops), shares=tuple(shares)) for training, (stops, shares) in trainings.items()
    ]


def results_of(training: Training) -> list[Result]:
    stops = [Result(training.method, stop, 1.0) for stop in (*training.stops, training.steps)]
    return stops + [Result(f"{training.method}, interpolated", training.steps, share) for share in training.shares]


def shard_of(items: list, shard: str) -> list:
    """Part i of n, by "i/n" with i from 1: the parts have no item in common, and together are the whole."""
    i, n = map(int, shard.split("/"))
    return items[i - 1 :: n]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The results in a file. A line that a killed run has left unfinished is none."""
    results = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return results


def append_line(path: Path, result: dict[str, Any]) -> None:
    unfinished = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * unfinished + json.dumps(result) + "\n")


def identity(result: dict[str, Any]) -> str:
    """What tells a result from all others: who was trained how, and how it was measured."""
    names = ("subject", "seed", "method", "weight", "flags", "stop", "share", "settings")
    return json.dumps([result[name] for name in names])


def load_script(name: str) -> ModuleType:
    """A script of this repository as a module of its own, in which functions can be replaced."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def clock() -> float:
    """Seconds; on a CPU those of this process, so that what else runs there does not count."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def draw_class_images(script: ModuleType, args: argparse.Namespace) -> float:
    """Lets the script draw its class images, once for all trainings on a subject. Returns the seconds."""
    record = Path(f"{args.class_data_dir}.seconds")
    if not record.exists():
        # Of those that a killed run has drawn, the time is not known.
        shutil.rmtree(args.class_data_dir, ignore_errors=True)
        began = clock()
        script.sample_class_images(args, script.build_accelerator(args), script.read_concepts(args)[0], [])
        record.write_text(str(clock() - began))
    return float(record.read_text())


def record_base(setup: Setup, folder: Path) -> Path:
    """The recording of the base that all trainings share, made if it is missing."""
    path = folder / f"recording-{setup.base.name}.safetensors"
    if not path.exists():
        lines = (TINYWORLD / "preserved_prompts.txt").read_text().splitlines()
        recording = record_pipeline(load(setup.base), lines[::2], lines[1::2], guidance_scale=GUIDANCE)
        recording.save(path)
    return path


def token_of(training: Training) -> str:
    return WORD if f"--modifier_token={WORD}" in training.flags else "sks"


def train(setup: Setup, training: Training, subject: str, seed: int, folder: Path) -> dict[str, float]:
    """
    Personalizes the base, into `folder`, with checkpoints where it is to be measured. Returns the seconds, without
    those of the recording, which all trainings share.
    """
    script, kind = load_script(setup.script.stem), LOOKS[subject].kind
    # Results say nothing of the folder that they were made in.
    recording = functools.partial(record_base, setup, folder.parent)
    flags = [flag.format(recording=recording()) if "{recording}" in flag else flag for flag in training.flags]
    flags += [f"--pretrained_model_name_or_path={setup.base}"]
    flags += [f"--seed={seed}", f"--output_dir={folder}"]
    flags += [f"--instance_data_dir={TINYWORLD / 'subjects' / subject}"]
    flags += [f"--instance_prompt={subject_prompt(LOOKS[subject], '', token_of(training))}"]
    if training.stops:
        flags += [f"--checkpointing_steps={math.gcd(*training.stops)}"]
    if "--with_prior_preservation" in flags:
        class_images = folder.with_name(f"class-{subject}")
        flags += [f"--class_prompt=a photo of a {kind}", f"--class_data_dir={class_images}"]
    args = script.parse_args(flags)
    if rival := RIVALS.get(training.method.rpartition(", ")[2]):
        rival(script, training.weight, class_prompt=f"a photo of a {kind}", recording=recording)
    class_seconds = draw_class_images(script, args) if args.with_prior_preservation else 0.0
    began = clock()
    script.main(args)
    return {"seconds": clock() - began, "class seconds": class_seconds}


def trained_unet(setup: Setup, training: Training, folder: Path) -> dict[str, torch.Tensor]:
    """The U-Net of a result or a checkpoint, float32: with a LoRA merged, with a Custom Diffusion in place."""
    if (folder / "unet").is_dir():
        return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    pipeline = load(setup.base)
    if "--method=lora" in training.flags:
        pipeline.load_lora_weights(folder)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    else:
        pipeline.unet.load_state_dict(load_file(folder / "custom_diffusion.safetensors"), strict=False)
    return {name: weight.cpu() for name, weight in pipeline.unet.state_dict().items()}


class Ruler:
    """
    Measures U-Nets with the judge of the drawn world, and by their predictions and parameters. Pictures of one seed
    begin with the same noise in all models. Predictions are compared in the steps of drawing other things, and for
    the bound on the KL divergence in those of ancestral sampling.
    """

    def __init__(self, setup: Setup, settings: dict[str, Any], seed: int):
        self.evaluation, self.setup, self.pipeline = load_script("evaluate_dreambooth"), setup, load(setup.base)
        self.base = {name: weight.cpu().clone() for name, weight in self.pipeline.unet.state_dict().items()}
        self.examiner = Examiner(settings["others"], settings["per_scene"], seed)
        self.examiner.base = self.examiner.draw_others(self.pipeline)
        prompts = self.examiner.other_prompts
        options = {"guidance_scale": GUIDANCE, "seed": 1000 * seed, "progress": False}
        self.recording = record_pipeline(self.pipeline, None, prompts, layers=False, **options)
        # The bound on the KL divergence holds for ancestral sampling.
        scheduler, self.pipeline.scheduler = self.pipeline.scheduler, self.evaluation.probe_scheduler(self.pipeline)
        self.ancestral_scheduler = self.pipeline.scheduler
        generators = [torch.Generator().manual_seed(1000 * seed + number) for number in range(len(prompts[:4]))]
        with record(self.pipeline.unet, layers=False, guidance_scale=GUIDANCE) as self.ancestral:
            with self.ancestral.held_out():
                steps = {"num_inference_steps": ANCESTRAL_STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"}
                self.pipeline(prompts[:4], generator=generators, **steps)
        self.pipeline.scheduler = scheduler

    def measure(
        self, unet: dict[str, torch.Tensor], subject: str, training: Training, folder: Path, pictures: bool = True
    ) -> dict[str, float]:
        """
        `folder` is that of the result or checkpoint, from which a new word is read if it learned one. Without
        `pictures`, only predictions and parameters are measured.
        """
        kind = LOOKS[subject].kind
        if pictures and kind not in self.examiner.base_of_class:
            self.pipeline.unet.load_state_dict(self.base)
            self.examiner.base_of_class[kind] = self.examiner.draw_class(self.pipeline, kind)
        self.pipeline.unet.load_state_dict(unet)
        drift = self.recording.drift()
        squares = [(unet[name].double() - weight.double()).square().sum() for name, weight in self.base.items()]
        measured = {
            "prediction drift": drift.prediction,
            "guided drift": drift.guided_prediction,
            "parameter drift": float(sum(squares) ** 0.5),
        }
        if not pictures:
            return measured
        measured["KL bound"] = self.ancestral.drift(scheduler=self.ancestral_scheduler).kl_bound
        pipeline, token = self.pipeline, token_of(training)
        if token == WORD:
            pipeline = load(self.setup.base)
            source = argparse.Namespace(pretrained_model_name_or_path=str(folder), instance_token=WORD)
            self.evaluation.load_custom_diffusion(source, pipeline)
            pipeline.unet = self.pipeline.unet
        return {**self.examiner.examine(pipeline, subject, token), **measured}


def draw(setup: Setup, trainings: list[Training], subject: str, seed: int, work: Path, path: Path) -> None:
    """The demo's picture with a row for each of these trainings, which have to be of all weights."""
    models = {BASE_NAME: setup.base}
    several = {field for field in ("schedule", "steps") if len({getattr(t, field) for t in trainings}) > 1}
    for training in tqdm(trainings, desc=f"trainings on {subject}"):
        name = f"{training.method} at {training.rate:g}"
        name += f", weight {training.weight:g}" if training.weight else ""
        name += f", {training.schedule}" if "schedule" in several else ""
        name += f", {training.steps} steps" if "steps" in several else ""
        models[name] = work / name
        train(setup, training, subject, seed, models[name])
    save_picture(subject, seed, models, path)


def shard(text: str) -> str:
    i, n = map(int, text.split("/"))
    if not 1 <= i <= n:
        raise ValueError
    return text


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train and measure a grid of methods on the drawn world.")
    parser.add_argument("--sdxl", action="store_true", help="Personalize the tiny SDXL.")
    parser.add_argument("--grid", nargs="+", default=list(GRIDS), choices=GRIDS, help="Parts of the grid; all.")
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=LOOKS, help="The first eight.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Of trainings and pictures.")
    parser.add_argument("--others", type=positive, default=16, help="Pictures that do not show the subject.")
    parser.add_argument("--per_scene", type=positive, default=2, help="Pictures of it in each of five new scenes.")
    parser.add_argument("--shard", type=shard, default="1/1", help="i/n: part i of n, for n machines or cores.")
    parser.add_argument(
        "--output_dir", type=Path, help="A file of results for each shard; default: tradeoff, or tradeoff/sdxl."
    )
    parser.add_argument("--draw", action="store_true", help="A picture of each subject and seed; nothing is measured.")
    args = parser.parse_args(input_args)
    if args.draw and not {"methods", "lora", "custom"}.isdisjoint(args.grid):
        parser.error("--draw is for full fine-tuning: choose another --grid")
    args.output_dir = args.output_dir or Path("tradeoff", "sdxl" if args.sdxl else "")
    return args


def main(args: argparse.Namespace) -> None:
    name = args.shard.replace("/", "-of-")
    path, work = args.output_dir / f"{name}.jsonl", args.output_dir / f"work-{name}"
    work.mkdir(parents=True, exist_ok=True)
    setup = SDXL if args.sdxl else SD
    settings = {"base": hash_of(setup.base), "others": args.others, "per_scene": args.per_scene}
    # Another number of shards, or a file from elsewhere: what is done is done.
    done = {identity(result) for file in args.output_dir.glob("*.jsonl") for result in read_lines(file)}
    if args.draw:
        for seed, subject in itertools.product(args.seeds, args.subjects):
            path = args.output_dir / f"{subject}-{seed}.png"
            draw(setup, trainings_of(args.grid)[1:], subject, seed, work, path)
        shutil.rmtree(work)
        return
    # All subjects of a training in turn, so that every shard gets some of each training.
    pairs = [(seed, subject) for seed in args.seeds for subject in args.subjects]
    trainings = [(i, training, *pair) for i, training in enumerate(trainings_of(args.grid)) for pair in pairs]
    # Subject by subject, so that a comparison is complete before the next begins.
    own = sorted(shard_of(trainings, args.shard), key=lambda item: (pairs.index(item[2:]), item[0]))
    ruler = None
    for _, training, seed, subject in tqdm(own, desc="trainings"):
        rows = []
        for result in results_of(training):
            row = {"subject": subject, "seed": seed, **training._asdict(), **result._asdict(), "settings": settings}
            del row["stops"], row["shares"]
            rows += [row] if identity(row) not in done else []
        if not rows:
            continue
        if ruler is None or ruler.examiner.seed != seed:
            ruler = Ruler(setup, settings, seed)
        folder = work / "model"
        shutil.rmtree(folder, ignore_errors=True)
        seconds = {"seconds": 0.0, "class seconds": 0.0}
        if training != NO_TRAINING:
            seconds = train(setup, training, subject, seed, folder)
        for row in rows:
            trained = folder if row["stop"] == training.steps else folder / f"checkpoint-{row['stop']}"
            unet = ruler.base if training == NO_TRAINING else trained_unet(setup, training, trained)
            if row["share"] != 1:
                unet = {key: torch.lerp(base, unet[key], row["share"]) for key, base in ruler.base.items()}
            measured = ruler.measure(unet, subject, training, trained)
            # A training that is stopped early takes that part of the time.
            part = row["stop"] / training.steps if training.steps else 0.0
            times = {"seconds": part * seconds["seconds"], "class seconds": seconds["class seconds"]}
            append_line(path, {**row, **measured, **times})
    shutil.rmtree(work)


if __name__ == "__main__":
    main(parse_args())
