"""
The launcher: runs a training script unedited, with the penalty attached to the optimizers that it creates. Holds the
command line and the running of the script; what is attached to which optimizer, and when, is in launcher.py.

    python -m lipschitz_reg.run --lipschitz_weight 500 SCRIPT.py ...
    accelerate launch -m lipschitz_reg.run --lipschitz_weight 500 SCRIPT.py ...
"""

import argparse
import builtins
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path

from .commands import Parser, check_file, number
from .groups import SPACES
from .launcher import Launcher, Stop
from .modes import MODES


def parse_args(argv: Sequence[str] | None = None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser("run", "Run a training script unedited, with the penalty attached to the optimizers that it "
                    "creates. The options of this command stand before the script, those of the script after it."
                    )  # fmt: skip
    least_zero, above_zero = number(float, 0), number(float, 0, exclusive=True)
    parser.add_argument("--lipschitz_weight", type=least_zero, metavar="W", help="The paper's lambda, on the distance "
                        "of the parameters. If all weights are 0, nothing is changed.")  # fmt: skip
    parser.add_argument("--lipschitz_layers", type=least_zero, metavar="W", default=0.0, help="The weight of how much "
                        "the outputs of layers change. Needs a recording.")  # fmt: skip
    parser.add_argument("--lipschitz_predictions", type=least_zero, metavar="W", default=0.0, help="The weight of how "
                        "much the model's predictions change. Needs a recording.")  # fmt: skip
    parser.add_argument("--lipschitz_recording", type=Path, metavar="FILE", help="The base's: python -m "
                        "lipschitz_reg.record. Drift of its held-out calls is measured at the end.")  # fmt: skip
    parser.add_argument("--lipschitz_mode", choices=MODES, default="coupled", help="How it acts (coupled).")
    parser.add_argument("--lipschitz_radius", type=above_zero, metavar="R", help="The largest distance, in projected "
                        "mode.")  # fmt: skip
    parser.add_argument("--lipschitz_reduction", choices=["sum", "tensor_mean", "mean"], default="tensor_mean",
                        help="The paper's r_i (tensor_mean).")  # fmt: skip
    parser.add_argument("--lipschitz_lora", choices=["delta", "factors"], default="delta", help="What is penalized in "
                        "LoRA: the product, or each factor as in the authors' code (delta).")  # fmt: skip
    parser.add_argument("--lipschitz_include", action="append", metavar="PATTERN", help="Penalize only parameters "
                        "with such names, as 'UNet2DConditionModel.*attn*'. Can be repeated.")  # fmt: skip
    parser.add_argument("--lipschitz_exclude", action="append", metavar="PATTERN", help="Leave out parameters with "
                        "such names, as 'Discriminator.*'. Can be repeated.")  # fmt: skip
    parser.add_argument("--lipschitz_exclude_optimizer", action="append", metavar="PATTERN", help="Leave out "
                        "optimizers of such classes, as 'SGD', or 'AdamW.1': the second AdamW that is built. Can be "
                        "repeated.")  # fmt: skip
    parser.add_argument("--lipschitz_anchor", type=Path, metavar="FILE_OR_FOLDER", help="The base's weights, "
                        "safetensors, if the script loads others before it builds its optimizer.")  # fmt: skip
    parser.add_argument("--lipschitz_anchor_device", choices=["cpu", "disk"], help="Where the anchors are kept: in "
                        "host memory, or read at each step from the files of --lipschitz_anchor. Default: with the "
                        "parameters.")  # fmt: skip
    parser.add_argument("--lipschitz_log", type=Path, metavar="FILE.jsonl", help="Append the metrics to this file. A "
                        "running wandb run gets them, too.")  # fmt: skip
    parser.add_argument("--lipschitz_log_every", type=number(int, 1), default=50, metavar="N", help="Steps between "
                        "two metrics (50).")  # fmt: skip
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is a module, as for python -m.")
    parser.add_argument("script", metavar="SCRIPT", help="The training script.")
    parser.add_argument("script_args", metavar="...", nargs=argparse.REMAINDER, help="Its own arguments.")
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    parser, args = parse_args(argv)
    with parser.errors():
        check(args)
        module, read_code = find_module(args.script) if args.module else find_script(args.script)
        launcher = make_launcher(args)
    sys.argv = [module.__file__ if args.module else args.script, *args.script_args]
    if not args.module and not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(args.script))
    own, sys.modules["__main__"] = sys.modules["__main__"], module  # ours stays alive
    code = None
    try:
        code = read_code()
        if launcher is None:
            exec(code, vars(module))
        else:
            with launcher:
                exec(code, vars(module))
    except BaseException as error:
        if launcher and isinstance(error, ValueError) and raised_here(error):
            raise Stop(str(error)) from error
        hide_frames_before(code)
        raise
    del own


def check(args: argparse.Namespace) -> None:
    """Raise a ValueError where options do not go together or name files that are not there."""
    recorded = [f"--lipschitz_{space}" for space in SPACES[1:] if getattr(args, f"lipschitz_{space}")]
    if args.lipschitz_weight is None and not recorded:
        raise ValueError("give a weight: --lipschitz_weight, --lipschitz_layers or --lipschitz_predictions.")
    if recorded and args.lipschitz_recording is None:
        raise ValueError(f"{recorded[0]} needs --lipschitz_recording.")
    if args.lipschitz_layers and (args.lipschitz_mode != "coupled" or args.lipschitz_lora != "delta"):
        raise ValueError("--lipschitz_layers needs --lipschitz_mode coupled and --lipschitz_lora delta.")
    if (args.lipschitz_mode == "projected") != (args.lipschitz_radius is not None):
        raise ValueError("--lipschitz_mode projected and --lipschitz_radius need each other.")
    if args.lipschitz_anchor_device == "disk" and args.lipschitz_anchor is None:
        raise ValueError("--lipschitz_anchor_device disk needs --lipschitz_anchor.")
    if args.lipschitz_anchor is not None and not args.lipschitz_anchor.exists():
        raise ValueError(f"--lipschitz_anchor: there is no {args.lipschitz_anchor}.")
    if args.lipschitz_recording is not None and not args.lipschitz_recording.is_file():
        raise ValueError(f"--lipschitz_recording: there is no {args.lipschitz_recording}.")
    if args.lipschitz_log is not None:
        check_file("--lipschitz_log", args.lipschitz_log)
    for name in ("lipschitz_anchor", "lipschitz_recording", "lipschitz_log"):
        if getattr(args, name) is not None:  # scripts may change the folder
            setattr(args, name, getattr(args, name).absolute())


def make_launcher(args: argparse.Namespace) -> Launcher | None:
    """`None` if all weights are 0."""
    weights = [args.lipschitz_weight or 0.0, args.lipschitz_layers, args.lipschitz_predictions]
    if not any(weights):
        return None
    return Launcher(
        dict(zip(SPACES, weights, strict=True)),
        recording=args.lipschitz_recording,
        include=args.lipschitz_include or (),
        exclude=args.lipschitz_exclude or (),
        exclude_optimizers=args.lipschitz_exclude_optimizer or (),
        anchor=args.lipschitz_anchor,
        anchor_device=args.lipschitz_anchor_device,
        log=args.lipschitz_log,
        log_every=args.lipschitz_log_every,
        mode=args.lipschitz_mode,
        radius=args.lipschitz_radius,
        reduction=args.lipschitz_reduction,
        lora_form=args.lipschitz_lora,
    )


def find_script(script: str) -> tuple[types.ModuleType, Callable[[], types.CodeType]]:
    """The module `__main__` as Python itself would make it for the script, and a function that compiles it."""
    if not os.path.isfile(script):
        raise ValueError(f"SCRIPT: there is no {script}.")
    module = types.ModuleType("__main__")
    path = os.path.abspath(script)
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    # Without a spec: processes that multiprocessing spawns find the script by its file.
    vars(module).update(__file__=path, __loader__=loader, __builtins__=builtins, __cached__=None, __annotations__={})
    return module, lambda: compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)


def find_module(name: str) -> tuple[types.ModuleType, Callable[[], types.CodeType]]:
    """The same for a module, as `python -m` would."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError:
        spec = None
    if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
        raise ValueError(f"SCRIPT: there is no module {name} that can be run.")
    module = types.ModuleType("__main__")
    names = {"__file__": spec.origin, "__loader__": spec.loader, "__package__": spec.parent, "__spec__": spec}
    vars(module).update(names, __builtins__=builtins, __cached__=spec.cached)
    return module, lambda: spec.loader.get_code(spec.name)


def hide_frames_before(code: types.CodeType | None) -> None:
    """Let the traceback of an error that nobody catches begin in the script, as if Python had started it."""
    shown = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        while trace is not None and trace.tb_frame.f_code is not code:
            trace = trace.tb_next
        shown(kind, error.with_traceback(trace), trace)

    sys.excepthook = show


def raised_here(error: BaseException) -> bool:
    """Whether this package raised it, about what the user asked for."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return os.path.dirname(trace.tb_frame.f_code.co_filename) == os.path.dirname(__file__)


if __name__ == "__main__":
    main()
