# All that a CPU cannot show of this project, in one command. After 20 minutes it starts nothing new.
# Checks results on the GPU, and measures seconds and memory of steps at the sizes of SD1.5 and SDXL, offline.
"""
pip install '.[scripts,bitsandbytes,torchao,xformers]'
python benchmarks/gpu.py --output gpu.json             # and --resume, if it was stopped or the time was up
python benchmarks/gpu.py --table gpu.json              # the tables for docs/benchmarks.md
python benchmarks/gpu.py --rehearse --output try.json  # the toy benchmark's bases in place of large ones, on a CPU too

Each line of the JSON file is one check, training or table. What fails is a line too, with its error.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from full_size import (
    BF16,
    CASES,
    EIGHT_BIT,
    FULL_BF16,
    HELD,
    IN_HOST_MEMORY,
    LORA,
    PAPER,
    PLAIN,
    ROOT,
    Case,
    head,
    measure,
    reason,
    row,
)

from lipschitz_reg import LipschitzRegularizer, LoraAdapter, functional


CHECKPOINTING, FP16 = "--gradient_checkpointing", "--mixed_precision=fp16"
XFORMERS, COMPILED = "--enable_xformers_memory_efficient_attention", "--compile"
# Besides those of full_size.py.
ON_GPU = [
    Case("full, bf16, plain", "sd15", [*PLAIN, BF16]),
    Case("full, bf16, layers and predictions", "sd15", [*HELD, BF16]),
    Case("full, fp16 (GradScaler), 8-bit Adam, the paper's penalty", "sd15", [*PAPER, FP16, EIGHT_BIT]),
    Case("full, fp16 (GradScaler), 8-bit Adam, layers and predictions", "sd15", [*HELD, FP16, EIGHT_BIT]),
    Case("full, bf16, xformers, plain", "sd15", [*PLAIN, BF16, XFORMERS]),
    Case("full, bf16, compiled, layers and predictions", "sd15", [*HELD, BF16, COMPILED]),
    Case("LoRA, fp16, layers and predictions", "sd15", [*HELD, LORA, FP16]),
    Case("full in bf16, plain", "sdxl", [*PLAIN, "--method=full", FULL_BF16]),
    Case(
        "full in bf16, anchors in host memory, the paper's penalty",
        "sdxl",
        [*PAPER, "--method=full", FULL_BF16, IN_HOST_MEMORY],
    ),
    Case(
        "full in bf16, anchors in host memory, layers and predictions",
        "sdxl",
        [*HELD, "--method=full", FULL_BF16, IN_HOST_MEMORY],
    ),
]
# What a GPU has to do by itself; the others run in the rehearsal.
NEEDS_GPU = {FP16, XFORMERS, COMPILED}


def check_penalty(device: str) -> dict[str, float]:
    """The largest error of each operation in float32 on the device, relative to float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(320, 4, 3, 3), (640,), (1280, 320), (5,), (1300, 1300), *[(320,)] * 40, *[(64, 320)] * 3]
    anchors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    parameters = [anchor + 0.1 * torch.randn(anchor.shape, generator=generator).double() for anchor in anchors]
    coefficients = [500 / anchor.numel() for anchor in anchors]
    moments = []
    for anchor in anchors:
        n = anchor[0].numel()
        root = torch.randn(n, min(64, n), generator=generator) if anchor.dim() > 1 else torch.empty(1, 0)
        moments.append((root.double(), torch.ones((), dtype=torch.float64)))
    factors = [torch.randn(shape, generator=generator).double() for shape in [(4, 320), (640, 4)] * 3]

    def run_lora(place: str, dtype: torch.dtype) -> list[torch.Tensor]:
        own = [factor.to(place, dtype, copy=True).requires_grad_() for factor in factors]
        adapters = [LoraAdapter("", down, up, 0.5) for down, up in zip(own[::2], own[1::2], strict=True)]
        for factor in own:
            factor.grad = torch.zeros_like(factor)
        LipschitzRegularizer(torch.optim.SGD(own), weight=1.0, adapters=adapters).add_gradient()
        return [factor.grad.cpu().double() for factor in own]

    def run(kind: str, place: str, dtype: torch.dtype) -> list[torch.Tensor]:
        if kind == "LoRA":
            return run_lora(place, dtype)
        own, bases = ([tensor.to(place, dtype, copy=True) for tensor in ts] for ts in (parameters, anchors))
        gradients = [torch.zeros_like(parameter) for parameter in own]
        if kind == "coupled":
            functional.add_penalty_gradient_(gradients, own, bases, coefficients)
        elif kind == "layers":
            held = [functional.Moment(*(part.to(place, dtype) for part in moment)) for moment in moments]
            functional.add_penalty_gradient_(gradients, own, bases, coefficients, held)
        elif kind == "proximal":
            functional.proximal_step_(own, bases, [1e-3 * coefficient for coefficient in coefficients])
        else:
            functional.project_(own, bases, 10.0)
        return [tensor.cpu().double() for tensor in (gradients if kind in ("coupled", "layers") else own)]

    def error(kind: str) -> float:
        pairs = zip(run(kind, device, torch.float32), run(kind, "cpu", torch.float64), strict=True)
        return max(float((got - right).norm() / right.norm()) for got, right in pairs)

    return {kind: error(kind) for kind in ("coupled", "layers", "proximal", "projected", "LoRA")}


def table_of(model: str, device: str) -> dict[str, str]:
    """What penalty.py prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / "penalty.py"), f"--model={model}", f"--device={device}"]
    done = subprocess.run([*command, "--skip_autograd"], capture_output=True, text=True)
    return {"error": reason(done)} if done.returncode else {"table": done.stdout}


def show(lines: list[dict[str, Any]]) -> None:
    print(lines[0]["head"])
    for line in lines:
        if "shapes" in line:
            print(row(line))
    for line in lines:
        if "errors" in line:
            print("\nrelative errors of the penalty on the device:", json.dumps(line["errors"]))
        elif "table" in line:
            print(f"\n{line['table']}")
        elif "shapes" not in line and "error" in line:
            print(f"\n{line['what']} failed: {line['error']}")


def main() -> None:
    parser = argparse.ArgumentParser(description="All that a CPU cannot show, in one command.")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="A line of JSON for each result.")
    parser.add_argument("--resume", action="store_true", help="Go on with the file of a run that was stopped.")
    parser.add_argument("--minutes", type=float, default=20, help="Start nothing new after this many minutes.")
    parser.add_argument("--rehearse", action="store_true", help="Small models, and no GPU needed.")
    parser.add_argument("--cases", nargs="+", default=[""], help="Only cases whose name contains one of these.")
    parser.add_argument("--table", type=Path, help="Print the tables of a file; nothing is measured.")
    args = parser.parse_args()
    if args.table and not args.table.is_file():
        parser.error(f"--table: there is no {args.table}")
    if args.table:
        return show([json.loads(line) for line in args.table.read_text().splitlines()])
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.rehearse:
        parser.error("there is no CUDA GPU here: --rehearse runs small models on the CPU")
    if args.output.exists() and not args.resume:
        parser.error(f"{args.output} exists: --resume goes on with it, --output names another")
    lines = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    device, began, left = "cuda" if on_gpu else "cpu", time.monotonic(), []

    def add(what: str, result: Callable[[], dict[str, Any]]) -> None:
        if what in [line["what"] for line in lines]:
            return
        if lines and time.monotonic() - began > 60 * args.minutes:
            left.append(what)
        else:
            lines.append({"what": what, **result()})
            whole = args.output.with_name(args.output.name + ".tmp")  # so that a stop leaves no half of a line
            whole.write_text("".join(json.dumps(line) + "\n" for line in lines))
            whole.replace(args.output)

    add("machine", lambda: {"head": head()})
    add("checks", lambda: {"errors": check_penalty(device)})
    tiny = {"sd15": "tiny-sd", "sdxl": "tiny-sdxl"}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES + ON_GPU:
            if not any(part in case.name for part in args.cases):
                continue
            if not on_gpu and NEEDS_GPU & {*case.flags}:
                continue
            case = case._replace(shapes=tiny[case.shapes]) if args.rehearse else case
            resolution = 64 if args.rehearse else {"sd15": 512, "sdxl": 1024}[case.shapes]
            for flags in ([CHECKPOINTING], []) if case.name == "full, bf16, plain" else ([CHECKPOINTING],):
                name = case.name if flags else f"{case.name}, without gradient checkpointing"
                one = case._replace(name=name)
                add(f"{case.shapes}: {name}", lambda: measure([one], resolution, Path(folder), flags)[0])  # noqa: B023
    for model in ["tinyworld"] if args.rehearse else ["sd15", "sdxl", "tinyworld"]:
        add(f"penalty at the shapes of {model}", lambda: table_of(model, device))  # noqa: B023
    show(lines)
    if left:
        print(f"\nThe time was up: --resume goes on with what is left, {'; '.join(left)}.")


if __name__ == "__main__":
    main()
