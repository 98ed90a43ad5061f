"""
The command that records the base of a diffusers pipeline into a file. The recording itself is in pipelines.py.

    python -m lipschitz_reg.record PIPELINE --prompts FILE --output FILE.safetensors
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import recording
from .commands import (
    DTYPES,
    Parser,
    add_drawing_arguments,
    check_file,
    check_pipeline,
    drawing_options,
    load_pipeline,
    read_prompt_files,
)
from .pipelines import check_prompts, record_pipeline


def parse_args(argv: Sequence[str] | None = None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser("record", "Record what a base model does, once, for all trainings that should stay near it.")
    parser.add_argument("pipeline", metavar="PIPELINE", help="Folder of a diffusers pipeline, or its name on the Hub.")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="What the model should go on "
                        "drawing as it does, one prompt a line.")  # fmt: skip
    parser.add_argument("--held_out_prompts", type=Path, metavar="FILE", help="Prompts that only measure drift. "
                        "Default: every second line of --prompts.")  # fmt: skip
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE.safetensors", help="If it exists, it is replaced."
    )
    parser.add_argument("--text_encoders", action="store_true", help="Record the text encoders too, to train them.")
    add_drawing_arguments(parser)
    parser.add_argument("--precision", choices=DTYPES, help="Default: fp32 on a CPU, else bf16.")
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    parser, args = parse_args(argv)
    with parser.errors():
        prompts, held_out_prompts = read_prompt_files(args.prompts, args.held_out_prompts)
        check_prompts(prompts, held_out_prompts)
        check_file("--output", args.output)
        check_pipeline("PIPELINE", args.pipeline)
        pipeline = load_pipeline("PIPELINE", args.pipeline, args.precision)
        options = {**drawing_options(args), "text_encoders": args.text_encoders}
        made = record_pipeline(pipeline, prompts, held_out_prompts, **options)
        made.save(args.output)
    size = args.output.stat().st_size / 1e6
    layers = f"{len(made.layers)} layers with {made.share():.0%} of the weights"
    print(f"{args.output}: {layers}, {len(made.calls)} calls, {size:.1f} MB, {made.digest()}")


if __name__ == "__main__":
    main()
else:
    # `lipschitz_reg.record` is the function: an import would put this module in its place.
    sys.modules[__name__] = recording.record
