"""
A budget in place of a weight: the largest drift that is accepted. Also the command that brings a finished model,
anyone's, to a budget. How a model is made of its base and a displacement is in personalized.py.

    python -m lipschitz_reg.budget BASE PERSONALIZED --budget 0.05 --prompts FILE --output FOLDER
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .commands import (
    DTYPES,
    Parser,
    add_drawing_arguments,
    check_file,
    check_new_folder,
    check_pipeline,
    drawing_options,
    load_pipeline,
    number,
    read_prompt_files,
    read_prompts,
)
from .functional import Moment
from .personalized import LORA_FILE, FullModel, LoraModel
from .pipelines import check_prompts, denoiser_of, draw_held_out, record_pipeline
from .recording import Recording
from .repair import Repair, scaled, weight


_MOST = 20  # measurements
_SUBJECT_SEEDS = 4  # pictures of the subject by which the repair knows it


def fit_share(measure: Callable[[float], float], budget: float, tolerance: float = 0.01) -> tuple[float, float]:
    """
    The largest share of a displacement that stays within a budget of drift.

    Drift rises with the share, nearly in proportion to it, so that regula falsi needs two to four measurements. (It
    is the Illinois form, for functions that bend.)

    Args:
        measure (`Callable[[float], float]`):
            Moves the model to base + share * (trained - base), and returns its drift. The last call is with the share
            that is returned.
        budget (`float`): The largest drift, above 0.
        tolerance (`float`, *optional*, defaults to 0.01): How far below the budget is near enough, relative to it.

    Returns:
        `tuple[float, float]`: The share and its drift: 1 if all of it is within the budget, and else a share with a
        drift between ``(1 - tolerance) * budget`` and the budget; where rounding leaves none there, the largest share
        that was found below the budget.

    Raises:
        `ValueError`: If the budget is not a finite number above 0, or rounding alone gives even the base more drift
            than that, or a drift is not finite.
    """
    check_budget(budget)
    drift = _finite(measure(1.0))
    if drift <= budget:
        return 1.0, drift
    aim = (1 - tolerance / 2) * budget
    # A share on each side of the aim, and by how much its drift is off it. Share 0 is taken to have no drift at first.
    below, above = [0.0, -aim], [1.0, drift - aim]
    last, least = None, drift
    for count in range(_MOST):
        share = below[0] - below[1] * (above[0] - below[0]) / (above[1] - below[1])
        if count == 2 and below[0] == 0:
            share = 0.0  # does the base itself have drift?
        drift = _finite(measure(share))
        if (1 - tolerance) * budget <= drift <= budget:
            return share, drift
        if share == 0 and drift > budget:
            raise _too_small(budget, drift)
        side, other = (below, above) if drift < aim else (above, below)
        side[:] = share, drift - aim
        if drift > budget:
            least = drift
        if side is last:
            other[1] /= 2
        last = side
    share, drift = below[0], _finite(measure(below[0]))
    if drift == 0:
        raise _too_small(budget, least)
    return share, drift


def check_budget(budget: float) -> None:
    """Raise a ValueError unless the budget is a finite number above 0."""
    if not (math.isfinite(budget) and budget > 0):
        raise ValueError(f"A budget must be a finite number above 0, not {budget:g}.")


def _too_small(budget: float, drift: float) -> ValueError:
    return ValueError(f"A budget of {budget:g} is below what rounding gives, a drift of {drift:.2g}.")


def _finite(drift: float) -> float:
    if not math.isfinite(drift):
        raise ValueError(f"The drift is {drift}: the model gives NaN or infinity.")
    return drift


def parse_args(argv: Sequence[str] | None = None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser("budget", "Bring a finished model back towards its base, until its drift is within a budget.")
    parser.add_argument(
        "base", metavar="BASE", help="Folder of the base's diffusers pipeline, or its name on the Hub."
    )
    parser.add_argument("personalized", type=Path, metavar="PERSONALIZED", help="What was made of it: the folder of a "
                        "pipeline, or a LoRA: a .safetensors file or a folder with one.")  # fmt: skip
    parser.add_argument("--budget", type=number(float, 0, exclusive=True), required=True, help="The largest change of "
                        "the base's predictions, relative to their size, such as 0.05.")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help="A new folder. For a LoRA, it may be a file.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--recording", type=Path, metavar="FILE", help="The base's: python -m lipschitz_reg.record.")
    source.add_argument("--prompts", type=Path, metavar="FILE", help="What should stay as it is, one prompt a line.")
    parser.add_argument("--held_out_prompts", type=Path, metavar="FILE", help="Prompts that only measure drift. "
                        "Default: all of --prompts; with --subject_prompt, every second line of it.")  # fmt: skip
    parser.add_argument("--subject_prompt", help="The subject's, such as 'a photo of sks dog': keep what it "
                        "needs, layer by layer, instead of an equal share of everything.")  # fmt: skip
    add_drawing_arguments(parser)
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="Of the weights here (fp32). A lower "
                        "one takes less memory, but may round away what was trained.")  # fmt: skip
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    parser, args = parse_args(argv)
    with parser.errors():
        kind, source = _find(args.personalized)
        output = args.output
        if kind is LoraModel and output.suffix == ".safetensors":
            check_file("--output", output)
        else:
            check_new_folder("--output", output)
            output = output / source.name if kind is LoraModel else output
        if args.recording and not args.recording.is_file():
            raise ValueError(f"--recording: there is no {args.recording}.")
        prompts = None if args.recording else _read_prompts(args)
        check_pipeline("BASE", args.base)
        base = load_pipeline("BASE", args.base, args.precision)
        recording = _recording(args, base, prompts)
        model = LoraModel(base, source) if kind is LoraModel else FullModel(base, source, args.precision)
        pipeline, denoiser = model.pipeline, denoiser_of(model.pipeline)
        run = (lambda: draw_held_out(pipeline, recording)) if model.text_encoders else None
        reduce = scaled
        if args.subject_prompt:
            reduce = Repair(_subject_moments(args, pipeline), recording.layers)
        drifts = []

        def measure(share: float) -> float:
            model.move(share, reduce)
            drifts.append(recording.drift(denoiser, run).dial)
            print(f"share {share:.4g}: drift {drifts[-1]:.4g}", file=sys.stderr)
            return drifts[-1]

        share, drift = fit_share(measure, args.budget)
        model.save(output, share)
    how = f"w = {weight(share):.3g}" if args.subject_prompt and share else f"share {share:.4g}"
    print(f"{args.output}: drift {drifts[0]:.4g} before, {how}, drift {drift:.4g}")


def _find(personalized: Path) -> tuple[type[FullModel] | type[LoraModel], Path]:
    """Which kind of model it is, and the folder or the file of its weights."""
    if personalized.is_file():
        return LoraModel, personalized
    if (personalized / "model_index.json").is_file():
        return FullModel, personalized
    if (personalized / LORA_FILE).is_file():
        return LoraModel, personalized / LORA_FILE
    what = f"{personalized} has neither model_index.json nor {LORA_FILE}" if personalized.is_dir() else ""
    raise ValueError(f"PERSONALIZED: {what or f'there is no {personalized}'}.")


def _read_prompts(args: argparse.Namespace) -> tuple[list[str] | None, list[str]]:
    """The prompts that should stay, which only the repair needs, and those that measure drift."""
    if args.subject_prompt:
        prompts, held_out_prompts = read_prompt_files(args.prompts, args.held_out_prompts)
        check_prompts(prompts, held_out_prompts)
        return prompts, held_out_prompts
    if args.held_out_prompts:
        return None, read_prompts("--held_out_prompts", args.held_out_prompts)
    return None, read_prompts("--prompts", args.prompts)


def _recording(args: argparse.Namespace, base: Any, prompts: tuple[list[str] | None, list[str]] | None) -> Recording:
    if prompts is not None:
        return record_pipeline(base, *prompts, **drawing_options(args))
    recording = Recording.load(args.recording, denoiser_of(base))
    if args.subject_prompt and not recording.layers:
        raise ValueError(f"--recording: {args.recording} has no layers, which --subject_prompt needs.")
    return recording


def _subject_moments(args: argparse.Namespace, pipeline: Any) -> dict[str, Moment]:
    """The moments of the personalized model's layers when it draws its subject."""
    options = {**drawing_options(args), "progress": False}
    return record_pipeline(pipeline, [args.subject_prompt] * _SUBJECT_SEEDS, None, **options).layers


if __name__ == "__main__":
    main()
