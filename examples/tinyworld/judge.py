"""The exact judge: a small network that reads class, colours, pattern, decoration and scene from a picture.

Run as a program it is trained on drawn pictures and examined on fresh ones. Generating pictures is not its business.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from train_tinyworld import draw_pictures, to_unit
from world import CLASSES, COLOURS, DECORATIONS, PATTERNS, SCENES, UNNAMED_PATTERNS, Look


TRAITS = {
    "class": CLASSES,
    "colour": tuple(COLOURS),
    "pattern": PATTERNS + UNNAMED_PATTERNS,
    "second": ("white", *COLOURS),
    "decoration": DECORATIONS,
    "scene": SCENES,
}
SUBJECT_TRAITS = ("class", "colour", "pattern", "second", "decoration")  # what makes a subject itself in any scene
WEIGHTS = Path(__file__).parent / "judge.safetensors"


def traits_of(look: Look, scene: str) -> dict[str, str]:
    """The truth about a drawn picture, in the judge's words. A plain thing has no second colour."""
    traits = {
        "class": look.kind,
        "colour": look.colour,
        "pattern": look.pattern,
        "second": look.second,
        "decoration": look.decoration,
        "scene": scene,
    }
    if look.pattern == "plain":
        del traits["second"]
    return traits


class Judge(nn.Module):
    """Reads the traits of pictures: float32 of shape (n, 3, 64, 64) in [-1, 1] goes in, logits by trait come out."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 192)
        blocks = [
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in zip(widths, widths[1:])
        ]
        self.body = nn.Sequential(*blocks, nn.Flatten(), nn.Dropout(0.2))
        self.heads = nn.ModuleDict({name: nn.Linear(192 * 4 * 4, len(values)) for name, values in TRAITS.items()})

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.body(pictures)
        return {name: head(features) for name, head in self.heads.items()}

    @classmethod
    def from_pretrained(cls, path: Path = WEIGHTS) -> "Judge":
        judge = cls()
        judge.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
        return judge.eval()

    @torch.no_grad()
    def read(self, pictures: list[Image.Image]) -> list[dict[str, str]]:
        """Reads RGB pictures of 64 x 64 pixels: for each, a dictionary such as {"class": "mug", "second": "red"}."""
        pixels = torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]))
        logits = self.eval()(to_unit(pixels.permute(0, 3, 1, 2)))
        read = {name: [TRAITS[name][i] for i in values.argmax(1).tolist()] for name, values in logits.items()}
        return [{name: read[name][i] for name in TRAITS} for i in range(len(pictures))]


def label_tensor(truths: list) -> torch.Tensor:
    """Index of the true value of each trait, shape (n, traits); -100, which cross_entropy skips, where it has none."""
    rows = [traits_of(look, scene) for look, scene in truths]
    return torch.tensor([[TRAITS[name].index(row[name]) if name in row else -100 for name in TRAITS] for row in rows])


def as_generated(pictures: torch.Tensor) -> torch.Tensor:
    """Softens and disturbs pictures a little, as an autoencoder does."""
    soft = torch.lerp(
        pictures, F.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False), torch.rand(())
    )
    return soft + 0.08 * torch.rand(()) * torch.randn_like(soft)


def train(pictures: int, steps: int, device: str) -> Judge:
    torch.manual_seed(0)
    images, truths = draw_pictures(pictures)
    labels = label_tensor(truths)
    judge = Judge().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="judge", mininterval=10):
        picked = torch.randint(len(images), (128,))
        logits = judge(as_generated(to_unit(images[picked]).to(device)))
        target = labels[picked].to(device)
        loss = sum(F.cross_entropy(logits[name], target[:, i]) for i, name in enumerate(TRAITS))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return judge.cpu().eval()


def examine(judge: Judge, pictures: int = 4000) -> dict[str, float]:
    """The judge's accuracy on freshly drawn pictures that it was not trained on, by trait."""
    images, truths = draw_pictures(pictures, first=10_000)
    read = judge.read([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images])
    accuracy = {}
    for name in TRAITS:
        pairs = [(r[name], t[name]) for r, t in zip(read, (traits_of(*truth) for truth in truths)) if name in t]
        accuracy[name] = sum(a == b for a, b in pairs) / len(pairs)
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the exact judge, or with --examine only examine it.")
    parser.add_argument("--examine", action="store_true")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--pictures", type=int, default=60_000)
    parser.add_argument("--steps", type=int, default=1700)
    args = parser.parse_args()
    if not args.examine:
        judge = train(args.pictures, args.steps, "cuda" if torch.cuda.is_available() else "cpu")
        weights = judge.to(memory_format=torch.contiguous_format).state_dict()
        save_file({name: w.half() if w.is_floating_point() else w for name, w in weights.items()}, args.output)
    for name, share in examine(Judge.from_pretrained(args.output)).items():
        print(f"{name:12s}{100 * share:6.1f}%")


if __name__ == "__main__":
    main()
