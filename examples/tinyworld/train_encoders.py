"""Trains the drawn world's encoders for CLIP-I, CLIP-T and DINO, in the formats of transformers: `clip/` and `vit/`.

    python examples/tinyworld/train_encoders.py              # both, five minutes each on two cores
    python examples/tinyworld/train_encoders.py --examine    # only measure those that are there

They only measure likeness, for `evaluate_dreambooth.py`; the judge that reads what pictures show is in `judge.py`.
"""

import argparse
import os
from dataclasses import replace
from multiprocessing import Pool
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from examine import NEW_SCENES
from judge import SUBJECT_TRAITS, TRAITS, as_generated, label_tensor
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from train_tinyworld import MAX_TOKENS, draw_pictures, to_unit
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)
from world import SCENES, SUBJECT_SCENES, SUBJECTS, Look, caption_of, draw, random_look, subject_photos


HERE = Path(__file__).resolve().parent
CHUNK = 500  # things drawn from one seed
VISION = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 8,
}
# Pictures are fed in [-1, 1].
NORMALIZED = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _draw_chunk(seed: int) -> tuple[np.ndarray, list]:
    rng = Random(f"pairs {seed}")
    pictures, truths = [], []
    for _ in range(CHUNK):
        look = random_look(rng)
        for scene in rng.sample(SCENES, 2):
            pictures.append(np.asarray(draw(look, scene, rng)))
            truths.append((look, scene))
    return np.stack(pictures), truths


def draw_pairs(count: int) -> tuple[torch.Tensor, list[tuple[Look, str]]]:
    """Draws `count` things, rounded up to whole chunks, each in two scenes: pictures 2i and 2i + 1 show one thing.

    Returns:
        `tuple`: uint8 tensor of shape (2 * count, 3, 64, 64), and the look and scene of each picture.
    """
    with Pool(os.cpu_count()) as pool:
        chunks = list(pool.imap(_draw_chunk, range(-(-count // CHUNK))))
    images = torch.from_numpy(np.concatenate([images for images, _ in chunks])).permute(0, 3, 1, 2).contiguous()
    return images, [truth for _, truths in chunks for truth in truths]


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    text = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS}
    text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=128))


def build_vit() -> ViTModel:
    return ViTModel(ViTConfig(**VISION), add_pooling_layer=False)


class TraitHeads(nn.Module):
    """Reads traits from features during training, and is thrown away: it makes details matter from the first steps."""

    def __init__(self, traits: tuple[str, ...]):
        super().__init__()
        self.columns = [list(TRAITS).index(name) for name in traits]
        self.heads = nn.ModuleList(nn.Linear(VISION["hidden_size"], len(TRAITS[name])) for name in traits)

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy; features (n, 128), labels (n, traits) as `label_tensor` gives them."""
        losses = [F.cross_entropy(head(features), labels[:, i]) for head, i in zip(self.heads, self.columns)]
        return torch.stack(losses).mean()


def clip_loss(model: CLIPModel, tokenizer: CLIPTokenizer, pictures: torch.Tensor, captions: list[str]):
    """CLIP's loss in both directions, and the vision features (n, 128). Equal captions are all right for a picture."""
    tokens = tokenizer(captions, padding=True, return_tensors="pt").to(pictures.device)
    output = model(**tokens, pixel_values=pictures)
    same = torch.tensor([[a == b for a in captions] for b in captions], device=pictures.device).float()
    target, logits = same / same.sum(1, keepdim=True), output.logits_per_image
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, output.vision_model_output.pooler_output


def pair_loss(model: ViTModel, pictures: torch.Tensor):
    """
    NT-Xent (arXiv 2002.05709), temperature 0.1, and the class tokens (n, 128): neighbours 2i and 2i + 1, one thing in
    two scenes, shall be alike, and unlike all other pictures.
    """
    features = model(pictures).last_hidden_state[:, 0]
    unit = F.normalize(features, dim=1)
    partner = torch.arange(len(unit), device=unit.device) ^ 1
    return F.cross_entropy((unit @ unit.T / 0.1).fill_diagonal_(-torch.inf), partner), features


def train(name: str, things: int, steps: int, batch_size: int) -> None:
    """Trains one of the two from random weights on `batch_size` pictures a step, and saves it in float16."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "sd" / "tokenizer")
    images, truths = draw_pairs(things)
    labels = label_tensor(truths)
    model = (build_clip(tokenizer) if name == "clip" else build_vit()).to(device)
    heads = TraitHeads(tuple(TRAITS) if name == "clip" else SUBJECT_TRAITS).to(device)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    rng = Random(0)
    for _ in tqdm(range(steps), desc=name, mininterval=10):
        if name == "clip":
            picked = torch.randint(len(images), (batch_size,))
        else:
            first = 2 * torch.randperm(len(images) // 2)[: batch_size // 2]
            picked = torch.stack([first, first + 1], dim=1).flatten()
        pictures = as_generated(to_unit(images[picked]).to(device))
        if name == "clip":
            captions = [caption_of(*truths[i], rng) for i in picked.tolist()]
            loss, features = clip_loss(model, tokenizer, pictures, captions)
        else:
            loss, features = pair_loss(model, pictures)
        (loss + heads(features, labels[picked].to(device))).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.cpu().half().save_pretrained(HERE / name)
    if name == "clip":
        tokenizer.save_pretrained(HERE / name)
        processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, **NORMALIZED)
    else:
        processor = ViTImageProcessor(size={"height": 64, "width": 64}, **NORMALIZED)
    processor.save_pretrained(HERE / name)


@torch.no_grad()
def examine_clip(pictures: int = 1000) -> dict[str, float]:
    """The share of fresh drawings whose own caption is the nearest of the captions of all (equal texts count)."""
    model = CLIPModel.from_pretrained(HERE / "clip", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "clip")
    images, truths = draw_pictures(pictures, first=20_000)
    captions = [caption_of(*truth) for truth in truths]
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    logits = model(**tokens, pixel_values=to_unit(images)).logits_per_image
    named = [captions[i] == captions[j] for i, j in enumerate(logits.argmax(1).tolist())]
    found = [captions[i] == captions[j] for j, i in enumerate(logits.argmax(0).tolist())]
    return {"picture to caption": float(np.mean(named)), "caption to picture": float(np.mean(found))}


@torch.no_grad()
def examine_vit(drawings: int = 50, strangers: int = 20) -> dict[str, float]:
    """
    The share of fresh drawings of the subjects, in scenes that their photos do not show, whose nearest picture is a
    photo of that very subject: among the photos of all subjects, and among those of `strangers` of its class.
    """
    model = ViTModel.from_pretrained(HERE / "vit", add_pooling_layer=False, dtype=torch.float32).eval()

    def encode(pictures: list[Image.Image]) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
        return F.normalize(model(to_unit(pixels)).last_hidden_state[:, 0], dim=1)

    rng = Random("fresh drawings")
    photos = {name: encode(subject_photos(name)) for name in SUBJECTS}
    among_subjects, among_strangers = [], []
    for name, look in SUBJECTS.items():
        fresh = encode([draw(look, NEW_SCENES[i % len(NEW_SCENES)], rng) for i in range(drawings)])
        nearest = {other: (fresh @ features.T).amax(1) for other, features in photos.items()}
        among_subjects.append((nearest[name] >= torch.stack(list(nearest.values())).amax(0)).float())
        looks = [replace(random_look(rng), kind=look.kind) for _ in range(strangers)]
        theirs = encode([draw(other, scene, rng) for other in looks if other != look for scene in SUBJECT_SCENES])
        among_strangers.append((nearest[name] > (fresh @ theirs.T).amax(1)).float())
    return {
        "among 8 subjects": torch.cat(among_subjects).mean().item(),
        f"among {strangers} of its class": torch.cat(among_strangers).mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train or examine the encoders of the drawn world.")
    parser.add_argument("names", nargs="*", default=["clip", "vit"], help="clip, vit, or both.")
    parser.add_argument("--examine", action="store_true", help="Only measure.")
    parser.add_argument("--things", type=int, default=16_000, help="Things drawn to learn from, in two scenes each.")
    parser.add_argument("--steps", type=int, default=380)
    parser.add_argument("--batch_size", type=int, default=256)
    args = parser.parse_args()
    for name in args.names:
        if not args.examine:
            train(name, args.things, args.steps, args.batch_size)
        for what, share in (examine_clip if name == "clip" else examine_vit)().items():
            print(f"{name:6s}{what:24s}{100 * share:6.1f}%")


if __name__ == "__main__":
    main()
