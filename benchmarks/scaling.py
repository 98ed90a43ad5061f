"""
Memory and communication of a card by engine, space and place of the anchors: arithmetic on the shapes of the published
models; nothing is run. docs/scaling.md explains the formulas.

    python benchmarks/scaling.py                       # Markdown tables, for 1, 8, 64 and 256 cards
    python benchmarks/scaling.py --cards 16 --models flux
"""

import argparse
import re
import sys
from pathlib import Path

import diffusers
import torch


sys.path.insert(0, str(Path(__file__).parent))

from penalty import CONFIGS  # noqa: E402


# What the published config.json files say where they differ from diffusers' defaults.
MODELS = {
    "sd15": ("UNet2DConditionModel", CONFIGS["sd15"]),
    "sdxl": ("UNet2DConditionModel", CONFIGS["sdxl"]),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
    ),
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
}
RANK = 64  # of a recording
LORA = 16
ATTENTION = re.compile(r"(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)\.weight$")


def shapes_of(name):
    kind, config = MODELS[name]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def sizes(shapes):
    """Numbers of elements: of the model, of LoRA on attention; and bytes of the recorded layers."""
    numel = sum(shape.numel() for shape in shapes.values())
    matrices = {name: (shape[0], shape[1:].numel()) for name, shape in shapes.items() if len(shape) > 1}
    lora = sum(LORA * sum(matrix) for name, matrix in matrices.items() if ATTENTION.search(name))
    return numel, lora, sum(4 * columns * min(RANK, columns) for _, columns in matrices.values())


def full_memory(numel, cards):
    """Bytes of a card: weights, gradients and AdamW's state, for training the whole model."""
    return {
        "DDP": 16 * numel,  # float32: weights, gradients, two moments
        "FSDP2": 16 * numel / cards,
        "ZeRO 1": (2 + 2) * numel + 12 * numel / cards,  # weights and gradients in bfloat16; float32: weights, moments
        "ZeRO 2": 2 * numel + 14 * numel / cards,
        "ZeRO 3": 16 * numel / cards,
    }


def lora_memory(numel, lora, cards):
    """The frozen model in bfloat16; the factors as above."""
    trained = full_memory(lora, cards)
    frozen = {name: 2 * numel / (cards if name in ("FSDP2", "ZeRO 3") else 1) for name in trained}
    return {name: frozen[name] + trained[name] for name in trained}


def anchor_memory(numel, cards):
    """Of weights that were published in 16 bits: with their parameters."""
    return {name: 2 * numel / (1 if name == "DDP" else cards) for name in full_memory(numel, cards)}


def traffic(numel, lora, cards):
    """Bytes that a card sends in a step: for the engine itself, and for the penalty by space."""
    ring = (cards - 1) / cards  # an all-reduce sends twice this of its bytes, a gather or a scatter once
    own = {"DDP": 2 * 4, "FSDP2": 2 * 2 + 4, "ZeRO 1": 2 * 2, "ZeRO 2": 2 * 2, "ZeRO 3": 3 * 2}
    return {
        name: {
            "the engine": ring * count * numel,
            # ZeRO 3 refuses; with ZeRO 1 and 2 each card keeps its share of a gradient that all compute
            "predictions": None if name == "ZeRO 3" else ring * 8 * numel if name in ("DDP", "FSDP2") else 0.0,
            "LoRA": 0.0 if name == "DDP" else ring * 2 * 4 * lora,
        }
        for name, count in own.items()
    }


def gigabytes(value):
    return "no" if value is None else f"{value / 1e9:.2f}" if value < 1e10 else f"{value / 1e9:.0f}"


def table(head, rows):
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--cards", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    known = {name: sizes(shapes_of(name)) for name in args.models}
    print("Sizes\n")
    table(
        ["model", "parameters, millions", f"LoRA of rank {LORA} on attention, millions", "recorded layers, GB"],
        [[name, f"{n / 1e6:.0f}", f"{lora / 1e6:.1f}", gigabytes(r)] for name, (n, lora, r) in known.items()],
    )
    engines = list(full_memory(1, 1))
    for cards in args.cards:
        shown = engines if cards > 1 else engines[:1]  # alone, all are the same
        print(f"GB of a card, {cards} cards: training, + the anchors where they are on the card\n")
        rows = []
        for name, (numel, lora, _) in known.items():
            memory, anchors = full_memory(numel, cards), anchor_memory(numel, cards)
            rows.append([f"{name}, whole", *(f"{gigabytes(memory[e])} + {gigabytes(anchors[e])}" for e in shown)])
            of_lora = lora_memory(numel, lora, cards)
            rows.append([f"{name}, LoRA", *(gigabytes(of_lora[e]) for e in shown)])
        table(["model", *shown], rows)
    cards = max(args.cards)
    print(f"GB that a card sends in a step, {cards} cards: training whole; the penalty on predictions; that on LoRA\n")
    rows = []
    for name, (numel, lora, _) in known.items():
        sent = traffic(numel, lora, cards)
        rows.append([name, *("; ".join(gigabytes(value) for value in sent[e].values()) for e in engines)])
    table(["model", *engines], rows)


if __name__ == "__main__":
    main()
