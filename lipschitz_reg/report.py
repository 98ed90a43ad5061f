"""
What the launcher says: the first and the last line, metrics in a JSONL file and in a running wandb run. Holds no
optimizers (launcher.py).
"""

import functools
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .commands import one_line
from .recording import Recording
from .regularizer import LipschitzRegularizer


class Report:
    """
    Lines on stderr and metrics. Only the main process writes.

    Args:
        log (`Path`, *optional*): Gets a line of JSON every `log_every` steps.
    """

    def __init__(self, log: Path | None, log_every: int):
        self.is_main = int(os.environ.get("RANK", 0)) == 0
        self.log, self.log_every = log, log_every
        self.needs_all = False  # whether all processes must compute metrics, because parameters are sharded

    def say(self, line: str) -> None:
        """On a line of its own, also between the progress bars of tqdm."""
        if self.is_main:
            bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
            write = functools.partial(print, flush=True) if bars is None else bars.write
            write(f"lipschitz_reg: {line}", file=sys.stderr)

    def write(self, row: Mapping[str, Any]) -> None:
        """A line of the log. Each is written whole, so that it is there if the script is killed."""
        if self.log is not None and self.is_main:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def after_step(self, regularizers: Sequence[LipschitzRegularizer]) -> None:
        """Log the metrics, if it is time and anybody wants them."""
        due = regularizers[0].steps % self.log_every == 0
        wanted = self.is_main and (self.log is not None or _wandb_run() is not None)
        if due and (wanted or self.needs_all):
            self.log_metrics(regularizers[0].steps, all_metrics(regularizers))

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.write({"step": step, **finite})
        run = _wandb_run()
        if run is not None and self.is_main:
            run.log(dict(metrics), commit=False)  # joins the script's next line: wandb drops steps that go back

    def finish(self, regularizers: Sequence[LipschitzRegularizer], recording: Recording | None) -> None:
        """The last line, with the drift where a recording can measure it."""
        if not (self.is_main or self.needs_all):
            return
        metrics, steps = all_metrics(regularizers), regularizers[0].steps
        line = f"{steps} steps; distance from the base {metrics['lipschitz/distance']:.4g}"
        line += f", relative {metrics['lipschitz/relative_distance']:.3g}"
        if recording is not None and any(call.held_out for call in recording.calls):
            try:
                metrics["drift/prediction"] = recording.drift().prediction
                line += f"; drift of the predictions {metrics['drift/prediction']:.3g}"
            except Exception as error:  # the script may have left its model in any state
                line += f"; drift could not be measured: {one_line(error)}"
        if steps % self.log_every or "drift/prediction" in metrics:
            self.log_metrics(steps, metrics)
        self.say(line)


def all_metrics(regularizers: Sequence[LipschitzRegularizer]) -> dict[str, float]:
    """Those of `LipschitzRegularizer.metrics`, of several optimizers together."""
    rows = [regularizer.metrics() for regularizer in regularizers]
    if len(rows) == 1:
        return rows[0]
    names = penalty, distance, relative = tuple(rows[0])
    anchors = math.hypot(*(row[distance] / row[relative] for row in rows if row[relative] > 0))
    together = math.hypot(*(row[distance] for row in rows if row[distance] > 0))
    values = sum(row[penalty] for row in rows), together, together / anchors if anchors else math.nan
    return dict(zip(names, values, strict=True))


def describe(
    penalized: Sequence[Tensor],
    anchors: Mapping[Tensor, Tensor],
    adapters: int,
    regularizer: LipschitzRegularizer,
    on_disk: bool,
    notes: Sequence[str],
) -> str:
    """The first line. What is penalized without an anchor belongs to the adapters."""
    parts = [f"{len(anchors)} tensors ({sum(p.numel() for p in anchors):,} parameters)"] if anchors else []
    factors = [p for p in penalized if p not in anchors]
    if factors:
        parts.append(f"{adapters} LoRA adapters ({sum(p.numel() for p in factors):,} parameters)")
    spaces = " and ".join(f"{regularizer.weight[space]:g} on {space}" for space in regularizer.spaces)
    memory = "none"
    if anchors:
        size = sum(anchor.numel() * anchor.element_size() for anchor in anchors.values()) / 1e6
        memory = f"{size:,.1f} MB on {'disk' if on_disk else next(iter(anchors.values())).device}"
    line = f"penalizes {' and '.join(parts)}; weight {spaces}; mode {regularizer.mode}, reduction "
    return "; ".join([f"{line}{regularizer.reduction}; anchors: {memory}", *notes])


def _wandb_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)
