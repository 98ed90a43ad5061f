# What a step of the penalty costs in time and memory, beside a copy of all weights and the penalty by autograd.
# Tensors have the shapes of a published U-Net and constant values, which the time does not depend on; no model is run.
"""
python benchmarks/penalty.py                # Stable Diffusion 1.5: 11 GB of memory, 14 GB with autograd
python benchmarks/penalty.py --model sdxl --skip_autograd --device cuda
python benchmarks/penalty.py --model tinyworld --rounds 40      # 326 small tensors
python benchmarks/penalty.py --model sdxl --count        # bytes and operations from the shapes; nothing is run
"""

import argparse
import itertools
import json
import re
import statistics
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from lipschitz_reg import LipschitzRegularizer, functional


TINYWORLD = Path(__file__).parents[1] / "examples" / "tinyworld" / "sd" / "unet" / "config.json"
# What the published unet/config.json files say where they differ from diffusers' defaults.
CONFIGS = {
    "tinyworld": {key: value for key, value in json.loads(TINYWORLD.read_text()).items() if key[0] != "_"},
    "sd15": {"sample_size": 64, "cross_attention_dim": 768},
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=CONFIGS, default="sd15")
    parser.add_argument("--anchor_dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="All variants run in each; medians count.")
    parser.add_argument("--skip_autograd", action="store_true", help="It needs as much memory again as the weights.")
    parser.add_argument("--count", action="store_true", help="What the space of layers takes, from shapes alone.")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA GPU here")
    return args


def make_tensors(args):
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in UNet2DConditionModel(**CONFIGS[args.model]).parameters()]
    options = {"device": args.device, "dtype": getattr(torch, args.anchor_dtype)}
    anchors = [torch.full(shape, 1 / 3, **options) for shape in shapes]  # which fewer bits would round
    parameters = [torch.nn.Parameter(anchor.float() + 1e-3) for anchor in anchors]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return parameters, anchors


def count(model, rank=64):
    """Gigabytes of a recording of layers, and operations (2 for a product and a sum) of a step, by arithmetic."""
    size, config = CONFIGS[model]["sample_size"], CONFIGS[model]
    with torch.device("meta"), FlopCounterMode(display=False) as step:
        unet = UNet2DConditionModel(**config)
        conditions = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        text = torch.empty(1, 77, config["cross_attention_dim"])
        output = unet(torch.empty(1, 4, size, size), torch.zeros(1), text, added_cond_kwargs=conditions)
        output.sample.sum().backward()
    weights = {name: p for name, p in unet.named_parameters() if p.dim() > 1}
    columns = {name: min(rank, p[0].numel()) for name, p in weights.items()}
    attention = [name for name in weights if re.search(r"to_(q|k|v|out\.0)\.weight", name)]
    for what, names in {"all weights": list(weights), "LoRA on attention": attention}.items():
        gigabytes = 4e-9 * sum(weights[name][0].numel() * columns[name] for name in names)
        print(f"{model}: recorded layers, {what}: {gigabytes:.2f} GB")
    # Two products: the logged penalty comes from them.
    penalty = 4e-12 * sum(p.numel() * columns[name] for name, p in weights.items())
    print(f"{model}: a step of all weights in the space of layers {penalty:.1f} TFLOP; ", end="")
    print(f"the U-Net, {8 * size} pixels, batch 1, forward and backward {1e-12 * step.get_total_flops():.1f} TFLOP")


def make_moments(parameters, rank=64):
    """Of the shapes that `record` gives for them."""
    moments = []
    for parameter in parameters:
        n = parameter[0].numel()
        shape = (n, min(rank, n)) if parameter.dim() > 1 else (1, 0)
        moments.append(functional.Moment(parameter.new_ones(shape), parameter.new_ones(())))
    return moments


@torch.no_grad()
def copy(sources, targets):
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def autograd(parameters, anchors, coefficients):
    functional.penalty(parameters, anchors, coefficients).backward()


def regularize(parameters, anchors):
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    return LipschitzRegularizer(optimizer, weight=500.0, anchors=dict(zip(parameters, anchors, strict=True)))


def step(regularizer):
    """What the regularizer adds to a step of the training scripts."""
    regularizer.add_gradient()
    regularizer.penalty()


def memory(device, start):
    """At the start nothing; at the end the bytes that were in use at the most since then."""
    if device == "cuda":
        return torch.cuda.reset_peak_memory_stats() if start else torch.cuda.max_memory_allocated()
    if start:
        return Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure(function, device):
    """Seconds, and bytes beyond those in use before. On a CPU, of the process: what else runs there does not count."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    memory(device, start=True)
    before = memory(device, start=False)
    if device == "cuda":
        torch.cuda.synchronize()
    begin = clock()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begin, memory(device, start=False) - before


def main():
    args = parse_args()
    if args.count:
        count(args.model)
        return
    parameters, anchors = make_tensors(args)
    moments = make_moments(parameters)
    gradients = [parameter.grad for parameter in parameters]
    numels = [parameter.numel() for parameter in parameters]
    coefficients = [500.0 * r for r in functional.reductions(numels, "tensor_mean")]
    steps = [2e-6 * c for c in coefficients]
    # Smaller each time, so that the projection always has to act.
    radii = (1e-3 * sum(numels) ** 0.5 * 0.9**k for k in itertools.count(1))
    variants = {
        "copy of all weights": lambda: copy(parameters, gradients),
        "autograd, second model": lambda: autograd(parameters, anchors, coefficients),
        "coupled": lambda: functional.add_penalty_gradient_(gradients, parameters, anchors, coefficients),
        "coupled, layers": lambda: functional.add_penalty_gradient_(
            gradients, parameters, anchors, coefficients, moments
        ),
        "proximal": lambda: functional.proximal_step_(parameters, anchors, steps),
        "projected": lambda: functional.project_(parameters, anchors, next(radii)),
        "distance, for metrics()": lambda: functional.squared_distances(parameters, anchors),
    }
    if args.skip_autograd:
        del variants["autograd, second model"]
    if args.model == "tinyworld":  # it would need as much memory again as the anchors
        regularizer = regularize(parameters, anchors)
        variants["coupled, by LipschitzRegularizer, and logged"] = lambda: step(regularizer)
    measured = {name: [] for name in variants}
    for _ in range(args.rounds):
        for name, function in variants.items():
            measured[name].append(measure(function, args.device))
    copies = [seconds for seconds, _ in measured["copy of all weights"]]

    where = f"{torch.get_num_threads()} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    total = sum(numels)
    print(f"{args.model}: {len(numels)} tensors, {total / 1e6:.1f}M parameters in float32")
    anchor_bytes = total * anchors[0].element_size()
    print(f"largest tensor {4e-6 * max(numels):.0f} MB; anchors in {args.anchor_dtype}: {anchor_bytes / 1e9:.2f} GB")
    print(f"recorded layers: {4e-9 * sum(moment.root.numel() for moment in moments):.2f} GB")
    print(f"torch {torch.__version__}, {where}; medians of {args.rounds} rounds, and quartiles\n")
    print("| | ms | copies | temporary MB |\n|---|---|---|---|")
    for name, rounds in measured.items():
        times, extra = [seconds for seconds, _ in rounds], max(extra for _, extra in rounds)
        ratios = sorted(seconds / copy for seconds, copy in zip(times, copies, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        middle = f"{statistics.median(ratios):.2f} ({low:.2f}-{high:.2f})"
        print(f"| {name} | {1e3 * statistics.median(times):.1f} | {middle} | {extra / 1e6:.0f} |")


if __name__ == "__main__":
    main()
