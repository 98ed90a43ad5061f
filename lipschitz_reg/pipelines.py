"""
Recording a diffusers pipeline, whatever its architecture: which of its parts is the denoiser, and the drawing of
prompts. Holds no command (record.py). Pipelines are recognized by their attributes: diffusers is not imported here.
"""

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .calls import evaluating
from .recording import Recording, record


# Drift differs more from prompt to prompt than from step to step: few steps leave time for many prompts.
_HELD_OUT_STEPS = 4


def denoiser_of(pipeline: Any) -> nn.Module:
    """
    The U-Net or transformer of a pipeline.

    Raises:
        `ValueError`: If it has neither, or does not draw from a prompt.
    """
    kind = type(pipeline).__name__
    denoiser = next((p for p in (getattr(pipeline, n, None) for n in ("unet", "transformer")) if p is not None), None)
    if not isinstance(denoiser, nn.Module):
        found = ", ".join(name for name, part in getattr(pipeline, "components", {}).items() if part is not None)
        raise ValueError(f"{kind} has neither a unet nor a transformer to record. It has: {found or 'nothing'}.")
    if not {"prompt", "output_type"} <= _call_defaults(pipeline).keys():
        raise ValueError(f"{kind} does not draw from a prompt.")
    return denoiser


def text_encoders_of(pipeline: Any) -> dict[str, nn.Module]:
    """The text encoders of a pipeline by name: `text_encoder`, `text_encoder_2`, ..."""
    names = sorted(name for name in getattr(pipeline, "components", {}) if name.startswith("text_encoder"))
    parts = {name: getattr(pipeline, name) for name in names}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def record_pipeline(
    pipeline: Any,
    prompts: Sequence[str] | None,
    held_out_prompts: Sequence[str] | None,
    *,
    num_inference_steps: int = 10,
    guidance_scale: float | None = None,
    rank: int = 64,
    layers: bool = True,
    seed: int = 0,
    text_encoders: bool = False,
    device: torch.device | str | None = "cpu",
    distributed: bool = False,
    progress: bool = True,
    **options: Any,
) -> Recording:
    """
    Record the base of a diffusers pipeline while it draws prompts. The pictures are not decoded.

    Prompt i starts from noise of the seed `seed + i`, whatever the other prompts are; held-out prompts continue the
    count. No other random number is drawn.

    Args:
        pipeline: On the device and in the precision in which it should run, with `requires_grad` as in the training.
        prompts (`Sequence[str]`): What the model should go on drawing as it does.
            With `None`, the recording only measures.
        held_out_prompts (`Sequence[str]`):
            Drift is measured by these alone. None of them may be in `prompts`. With `None`, it cannot be measured.
        num_inference_steps (`int`, *optional*, defaults to 10):
            Steps a prompt, with the pipeline's own scheduler; of a held-out prompt 4 at most.
        guidance_scale (`float`, *optional*): By default, that of the pipeline's call.
        rank, layers, device: As in `record`.
        seed (`int`, *optional*, defaults to 0): Of the noise.
        text_encoders (`bool`, *optional*, defaults to `False`):
            Record the layers of the text encoders too, under their names in the pipeline, for training them.
        distributed (`bool`, *optional*, defaults to `False`):
            Whether each process of `torch.distributed` draws a part of the prompts; all must call this, each with the
            whole pipeline, and all get the whole recording, to rounding as from one process.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar. Needs tqdm.
        options: Other arguments of the pipeline's call, such as `height`. `None` is the pipeline's default.

    Raises:
        `ValueError`: If there are no prompts, a prompt is in both lists, or the pipeline cannot be recorded.
    """
    check_prompts(prompts, held_out_prompts)
    prompts, held_out_prompts = list(prompts or ()), list(held_out_prompts or ())
    denoiser = denoiser_of(pipeline)
    defaults = _call_defaults(pipeline)
    options = {"guidance_scale": guidance_scale, **options}
    options = {name: value for name, value in options.items() if value is not None}
    unknown = next((name for name in options if name not in defaults), None)
    if unknown:
        raise ValueError(f"{type(pipeline).__name__} has no {unknown}.")
    guidance = options.get("guidance_scale", defaults.get("guidance_scale"))
    guidance = 1.0 if guidance is None else float(guidance)
    if not math.isfinite(guidance):
        raise ValueError(f"`guidance_scale` must be a finite number, not {guidance}.")
    others = text_encoders_of(pipeline) if text_encoders else {}
    drawn = {
        "prompts": prompts,
        "held_out_prompts": held_out_prompts,
        "seed": seed,
        "options": {"num_inference_steps": num_inference_steps, **options},
        "held_out_options": {"num_inference_steps": min(num_inference_steps, _HELD_OUT_STEPS), **options},
        "scheduler": type(getattr(pipeline, "scheduler", None)).__name__,
    }
    numbers, kept = list(range(len(prompts) + len(held_out_prompts))), len(prompts)
    if distributed:
        numbers = [*_own_part(numbers[:kept]), *_own_part(numbers[kept:])]
    how = {"rank": rank, "layers": layers, "guidance_scale": guidance, "device": device, "distributed": distributed}
    with record(denoiser, **how, **others) as recording:
        recording.drawn = drawn
        with _bar(numbers, progress) as bar:
            for number in bar:
                if number < kept:
                    _draw(pipeline, prompts[number], seed + number, drawn["options"])
                else:
                    with recording.held_out():
                        _draw(pipeline, held_out_prompts[number - kept], seed + number, drawn["held_out_options"])
    return recording


def _own_part(numbers: list[int]) -> list[int]:
    """Of what all processes do together, in their order."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return numbers[rank * len(numbers) // size : (rank + 1) * len(numbers) // size]


def draw_held_out(pipeline: Any, recording: Recording) -> None:
    """
    Draw the held-out prompts of `record_pipeline` again, with their seeds and the kind of scheduler that drew them,
    for `recording.drift(run=...)`.

    Raises:
        `ValueError`: If the recording is not from `record_pipeline`, or the pipeline cannot use its scheduler.
    """
    if not recording.drawn:
        raise ValueError("The recording does not know its prompts: make one with python -m lipschitz_reg.record.")
    first = recording.drawn["seed"] + len(recording.drawn["prompts"])
    scheduler = getattr(pipeline, "scheduler", None)
    pipeline.scheduler = _scheduler_of(scheduler, recording.drawn["scheduler"])
    try:
        for number, prompt in enumerate(recording.drawn["held_out_prompts"]):
            _draw(pipeline, prompt, first + number, recording.drawn["held_out_options"])
    finally:
        pipeline.scheduler = scheduler


def check_prompts(prompts: Sequence[str] | None, held_out_prompts: Sequence[str] | None) -> None:
    """Raise a ValueError if one of the lists is empty, or a prompt is in both."""
    for kind, given in (("", prompts), ("held-out ", held_out_prompts)):
        if given is not None and not given:
            raise ValueError(f"There are no {kind}prompts.")
    common = next((prompt for prompt in held_out_prompts or () if prompt in set(prompts or ())), None)
    if common is not None:
        raise ValueError(f"A held-out prompt only measures, but this one is among the others too: {common}")


def _draw(pipeline: Any, prompt: str, seed: int, options: dict[str, Any]) -> None:
    kept = getattr(pipeline, "_progress_bar_config", None)
    pipeline.set_progress_bar_config(disable=True)
    try:
        with ExitStack() as stack, torch.no_grad():
            for part in (denoiser_of(pipeline), *text_encoders_of(pipeline).values()):
                stack.enter_context(evaluating(part))
            generator = torch.Generator().manual_seed(seed)
            pipeline(prompt=prompt, generator=generator, output_type="latent", **options)
    finally:
        pipeline.set_progress_bar_config(**(kept or {}))


def _scheduler_of(scheduler: Any, name: str) -> Any:
    """The scheduler, or one of the named kind with the same configuration."""
    kinds = {kind.__name__: kind for kind in (type(scheduler), *getattr(scheduler, "compatibles", ()))}
    if name not in kinds:
        raise ValueError(f"The recording was drawn with {name}, which {type(scheduler).__name__} cannot stand for.")
    return scheduler if name == type(scheduler).__name__ else kinds[name].from_config(scheduler.config)


def _call_defaults(pipeline: Any) -> dict[str, Any]:
    """The arguments of the pipeline's call with their defaults."""
    return {name: p.default for name, p in inspect.signature(type(pipeline).__call__).parameters.items()}


@contextmanager
def _bar(items: Sequence[int], progress: bool) -> Iterator[Iterable[int]]:
    if not progress:
        yield items
        return
    from tqdm.auto import tqdm

    with tqdm(items, desc="Recording", unit="prompt") as bar:
        yield bar
