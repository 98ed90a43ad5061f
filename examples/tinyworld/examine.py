"""Measures a pipeline of the drawn world against the truth: what its pictures show, and what they were asked to show.

    python examples/tinyworld/examine.py    # the base: 400 prompts, 25 DDIM steps, guidance 4

The training and the pictures for people are in `demo.py`.
"""

import argparse
from pathlib import Path
from random import Random

import diffusers
import numpy as np
import quiet  # noqa: F401
import torch
import transformers
from diffusers import DiffusionPipeline
from judge import SUBJECT_TRAITS, Judge, traits_of
from PIL import Image
from tqdm.auto import tqdm
from world import CLASSES, COLOURS, LOOKS, PATTERNS, SCENES, SUBJECT_SCENES, Look, caption_of


BASE = Path(__file__).resolve().parent / "sd"
NAMED_TRAITS = ("scene", "class", "colour", "pattern")  # what prompts can ask for
NEW_SCENES = [scene for scene in SCENES if scene not in SUBJECT_SCENES]


def generate(pipeline: DiffusionPipeline, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
    """One picture a prompt, 25 DDIM steps, guidance 4; the same seed starts from the same noise in every model."""
    pictures = []
    for start in range(0, len(prompts), 20):
        part = slice(start, start + 20)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        pictures += pipeline(prompts[part], num_inference_steps=25, guidance_scale=4.0, generator=generators).images
    return pictures


def load(folder: Path) -> DiffusionPipeline:
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def other_things(count: int) -> list[tuple[Look, str]]:
    """Things that are no subject, evenly over classes, colours, patterns and scenes; the same ones at every call."""
    rng = Random("other things")
    axes = [
        rng.sample(list(values) * (count // len(values) + 1), count) for values in (CLASSES, COLOURS, PATTERNS, SCENES)
    ]
    return [(Look(kind, colour, pattern, "white", "none"), scene) for kind, colour, pattern, scene in zip(*axes)]


def share_right(read: list[dict], truths: list[dict], traits: tuple[str, ...]) -> float:
    """The share of the traits that the judge reads as the truth has them."""
    right = [r[name] == truth[name] for r, truth in zip(read, truths) for name in traits if name in truth]
    return float(np.mean(right))


def subject_prompt(look: Look, scene: str, token: str = "sks") -> str:
    return f"a photo of a {token} {look.kind} {scene}".strip()


def distance(first: Image.Image, second: Image.Image) -> float:
    """The root mean square difference of two pictures, in grey levels (0 to 255)."""
    return float(np.sqrt(np.mean((np.asarray(first, float) - np.asarray(second, float)) ** 2)))


class Examiner:
    """Measures a model against the truth, and against the pictures that the base makes from the same seeds.

    Args:
        others (`int`): How many prompts that do not name a subject.
        per_scene (`int`): How many pictures of the subject in each scene that its photos do not show.
        seed (`int`): Shifts the seeds of all pictures.
    """

    def __init__(self, others: int, per_scene: int, seed: int):
        self.judge, self.seed, self.per_scene = Judge.from_pretrained(), seed, per_scene
        self.others = other_things(others)
        self.other_prompts = [caption_of(look, scene) for look, scene in self.others]
        self.base, self.base_of_class = None, {}

    def draw_others(self, pipeline: DiffusionPipeline) -> list[Image.Image]:
        """A picture of each other thing; `base` is what it gives for the base."""
        return generate(pipeline, self.other_prompts, [1000 * self.seed + i for i in range(len(self.others))])

    def draw_class(self, pipeline: DiffusionPipeline, kind: str) -> list[Image.Image]:
        """Pictures of the class itself, `"a photo of a mug"`; `base_of_class` has what they are for the base."""
        return generate(pipeline, [f"a photo of a {kind}"] * 4, [1000 * self.seed + 800 + i for i in range(4)])

    def examine(self, pipeline: DiffusionPipeline, subject: str, token: str = "sks") -> dict[str, float]:
        """Shares (0 to 1), and drift: the root mean square difference from the base's pictures (0 to 255)."""
        pictures = self.draw_others(pipeline)
        if self.base is None:
            self.base = pictures
        read, truths = self.judge.read(pictures), [traits_of(*other) for other in self.others]
        look = LOOKS[subject]
        drifts = [distance(*pair) for pair in zip(pictures, self.base)]
        of_class = self.base_of_class.get(look.kind, [])
        class_drifts = [
            distance(*pair) for pair in zip(self.draw_class(pipeline, look.kind) if of_class else [], of_class)
        ]
        scenes = [scene for scene in NEW_SCENES for _ in range(self.per_scene)]
        prompts = [subject_prompt(look, scene, token) for scene in scenes]
        mine = generate(pipeline, prompts, [1000 * self.seed + 500 + i for i in range(len(scenes))])
        mine_read, mine_truths = self.judge.read(mine), [traits_of(look, scene) for scene in scenes]
        return {
            "fidelity": share_right(mine_read, mine_truths, SUBJECT_TRAITS),
            "subject scene": share_right(mine_read, mine_truths, ("scene",)),
            **{f"other {name}": share_right(read, truths, (name,)) for name in NAMED_TRAITS},
            "drift": float(np.mean(drifts)),
            "worst drift": max(drifts),
            **({"class drift": float(np.mean(class_drifts))} if of_class else {}),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Read the pictures that a pipeline of the drawn world makes.")
    parser.add_argument("--model", type=Path, default=BASE, help="Folder of the pipeline.")
    parser.add_argument("--prompts", type=int, default=400)
    args = parser.parse_args()
    if not (args.model / "model_index.json").is_file():
        parser.error(f"--model: there is no pipeline in {args.model}")
    others, pipeline, pictures = other_things(args.prompts), load(args.model), []
    for start in tqdm(range(0, args.prompts, 20), desc="pictures"):
        part = range(args.prompts)[start : start + 20]
        pictures += generate(pipeline, [caption_of(*others[i]) for i in part], list(part))
    read, truths = Judge.from_pretrained().read(pictures), [traits_of(*other) for other in others]
    for name in NAMED_TRAITS:
        print(f"{name:12s}{100 * share_right(read, truths, (name,)):6.1f}%")


if __name__ == "__main__":
    main()
