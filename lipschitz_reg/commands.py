"""
What the commands of this package have in common: errors in one line, prompts from files, pipelines from folders or the
Hub. Holds no command (record.py, budget.py). diffusers is imported where a pipeline is loaded.
"""

import argparse
import contextlib
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage; the exit code is 2."""

    def __init__(self, command: str, description: str):
        super().__init__(f"python -m lipschitz_reg.{command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """What is raised in this block about the user's input ends the command in one line."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.error(str(error))


def number(convert: Callable[[str], Any], least: float, exclusive: bool = False) -> Callable[[str], Any]:
    """A finite number of at least `least`, or above it, for `argparse`."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= least and not (exclusive and value == least)):
            kind = "a whole number" if convert is int else "a number"
            kind += "" if least == -math.inf else f" {'above' if exclusive else 'of at least'} {least}"
            raise argparse.ArgumentTypeError(f"must be {kind}, not {text!r}")
        return value

    return parse


def add_drawing_arguments(parser: argparse.ArgumentParser) -> None:
    """How the prompts are drawn."""
    least_one = number(int, 1)
    parser.add_argument("--num_inference_steps", type=least_one, default=10, help="Steps for each prompt (10).")
    parser.add_argument("--guidance_scale", type=number(float, -math.inf), help="Default: the pipeline's.")
    parser.add_argument("--height", type=least_one, help="In pixels. Default: the pipeline's.")
    parser.add_argument("--width", type=least_one, help="In pixels. Default: the pipeline's.")
    parser.add_argument("--num_frames", type=least_one, help="Frames of a video. Default: the pipeline's.")
    parser.add_argument("--rank", type=least_one, default=64, help="Directions kept of each layer's inputs (64).")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the noise that drawing starts from (0).")


def drawing_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `record_pipeline` from those of `add_drawing_arguments`."""
    names = ("num_inference_steps", "guidance_scale", "height", "width", "num_frames", "rank", "seed")
    return {name: getattr(args, name) for name in names}


def read_prompts(flag: str, path: Path) -> list[str]:
    """
    The lines of a file, each once, without empty ones.

    Raises:
        `ValueError`: If it cannot be read or is empty.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag}: {path} is not a text file in UTF-8.") from error
    except OSError as error:
        raise ValueError(f"{flag}: cannot read {path}: {error.strerror}.") from error
    prompts = list(dict.fromkeys(line for line in lines if line))
    if not prompts:
        raise ValueError(f"{flag}: {path} is empty.")
    return prompts


def read_prompt_files(prompts: Path, held_out: Path | None) -> tuple[list[str], list[str]]:
    """
    The prompts to hold and those that measure: every second line, where these have no file.

    Raises:
        `ValueError`: If a file cannot be read or is empty, or there is one prompt, which cannot do both.
    """
    lines = read_prompts("--prompts", prompts)
    if held_out is not None:
        return lines, read_prompts("--held_out_prompts", held_out)
    if len(lines) == 1:
        raise ValueError(
            f"--prompts: {prompts} has one prompt, and every second one only measures: add some, or give "
            "--held_out_prompts."
        )
    return lines[::2], lines[1::2]


def check_file(flag: str, path: Path) -> None:
    """Raise a ValueError unless a file can be written there."""
    if path.is_dir():
        raise ValueError(f"{flag}: {path} is a folder: name a file in it.")
    _check_writable(flag, path.parent)


def check_new_folder(flag: str, path: Path) -> None:
    """Raise a ValueError unless a folder can be made there: nothing is there, or an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{flag}: {path} is there already: name a folder that is new or empty.")
    _check_writable(flag, path.parent)


def check_pipeline(flag: str, source: str) -> None:
    """Raise a ValueError unless the source is the folder of a pipeline, or can be a name on the Hub."""
    path = Path(source)
    if path.is_file():
        raise ValueError(
            f"{flag}: {source} is a file: give the folder of a diffusers pipeline, or its name on the Hub."
        )
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ValueError(f"{flag}: {source} is not a diffusers pipeline: it has no model_index.json.")
    if not path.exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise ValueError(f"{flag}: there is no {source}.")


def load_pipeline(flag: str, source: str, precision: str | None = None) -> Any:
    """
    A pipeline, on the accelerator where there is one.

    Raises:
        `ValueError`: If there is none, or it cannot be loaded.
    """
    device = best_device()
    precision = precision or ("fp32" if device == "cpu" else "bf16")
    with quiet():
        try:
            from diffusers import DiffusionPipeline

            pipeline = DiffusionPipeline.from_pretrained(source, dtype=DTYPES[precision])
        except ImportError as error:
            raise ValueError(f"A package is missing: {error}") from error
        except Exception as error:  # of whatever class the Hub, diffusers or transformers raise
            raise ValueError(f"{flag}: cannot load {source}: {error}") from error
    return pipeline.to(device)


def best_device() -> str:
    return next((name for name in ("cuda", "mps", "xpu") if getattr(torch, name).is_available()), "cpu")


def one_line(message: str) -> str:
    return " ".join(str(message).split())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What diffusers and transformers log about packages that are not used here helps nobody. Errors are raised."""
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING) if not sys.warnoptions else disabled)
    try:
        yield
    finally:
        logging.disable(disabled)


def _check_writable(flag: str, folder: Path) -> None:
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{flag}: cannot write to {there}.")
