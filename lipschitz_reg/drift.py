"""
The drift meter: how far the predictions of any denoiser have moved from those of its base, on calls that nothing else
uses. Holds no recording (recording.py).

The relative change of a prediction is ``||f - f_base|| / ||f_base||``, in the model's own target: noise, velocity or
flow. What a sampler gets is the guided prediction, ``u + g (c - u)`` of the prediction without prompt u and with it c.

`kl_bound` is about whole pictures. Ancestral sampling is the chain ``x_s ~ N(mu(x_t), sigma_t^2)``. By the chain rule,
along the chain of the base, ``KL(base || model) = sum_t E ||mu_base - mu_model||^2 / (2 sigma_t^2)``, in nats, for the
paths; by the data processing inequality it is at least the KL divergence of their end points. "Preserve and
Personalize" (arXiv 2505.19519) bounds a term of this sum by ``||theta - theta_base||^2``.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .calls import Call, answer_of, evaluating, map_tensors, replace_answer
from .engines import forget_gathered


if TYPE_CHECKING:
    from .recording import Recording


_ROUNDING = 1e-2  # how much a sample may differ, relative to its norm, where a model is led along its base's path


class Drift(NamedTuple):
    """
    How far predictions have moved.

    Args:
        prediction (`float`): The mean relative change of a prediction.
        guided_prediction (`float`, *optional*):
            The same for the guided prediction; `None` where calls are not made both with and without a prompt.
        by_timestep (`dict[float, float]`): `prediction` at each timestep.
        guided_by_timestep (`dict[float, float]`): `guided_prediction` at each timestep.
        standard_error (`float`):
            Of the mean over the prompts of `guided_prediction`, or of `prediction` where that is `None`; 0 with one.
        largest_change (`float`): The largest ``||f - f_base||`` of a prediction.
        kl_bound (`float`, *optional*): What `kl_bound` returns, if a scheduler was given.
    """

    prediction: float
    guided_prediction: float | None
    by_timestep: dict[float, float]
    guided_by_timestep: dict[float, float]
    standard_error: float
    largest_change: float
    kl_bound: float | None = None

    @property
    def dial(self) -> float:
        """
        What a budget is about: the change of what the sampler gets, the guided prediction where there is one, plus
        its standard error: the margin for prompts that were not measured.
        """
        change = self.prediction if self.guided_prediction is None else self.guided_prediction
        return change + self.standard_error


class _Answer(NamedTuple):
    """What a model and its base answered to one call."""

    call: Call
    timestep: float | None
    now: Tensor
    base: Tensor


def measure_drift(
    recording: "Recording", model: nn.Module, run: Callable[[], Any] | None = None, scheduler: Any = None
) -> Drift:
    """What `Recording.drift` returns."""
    answers = _answers(recording, model, run)
    drift = average(answers, recording.guidance_scale)
    if scheduler is None:
        return drift
    return drift._replace(kl_bound=_bound(answers, recording.guidance_scale, scheduler))


def rounding_drift(recording: "Recording", model: nn.Module) -> Drift:
    """What `Recording.rounding_drift` returns."""
    generator = torch.Generator().manual_seed(0)
    held_out = next((call for call in recording.calls if call.held_out), None)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if held_out is not None and held_out.autocast[1]:
        dtype = held_out.autocast[2]
    size = torch.finfo(dtype).eps / 8  # some of the numbers are rounded the other way then

    def nudged(tensor: Tensor) -> Tensor:
        # Sizes of pictures and timesteps are not rounded; what is in few bits already is moved by one of them.
        if not tensor.is_floating_point() or tensor.dim() < 2 or bool((tensor == tensor.round()).all()):
            return tensor
        own = torch.finfo(tensor.dtype).eps
        # The same for the rows with a prompt and those without, or guidance would multiply it.
        noise = torch.randn(tensor.shape[1:], generator=generator) * (own / 2 if own > size else size)
        return tensor * (1 + noise).to(tensor)

    def nudge(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return map_tensors(nudged, args), map_tensors(nudged, kwargs)

    handle = model.register_forward_pre_hook(nudge, with_kwargs=True)
    try:
        return measure_drift(recording, model)
    finally:
        handle.remove()


def average(answers: Sequence[_Answer], guidance_scale: float) -> Drift:
    plain = [(a.timestep, *rows) for a in answers for rows in zip(a.now, a.base, strict=True)]
    guided = [(a.timestep, *pair) for a in answers for pair in _guided(a, guidance_scale)]
    drifts, by_timestep = _relative(plain)
    guided_drifts, guided_by_timestep = _relative(guided)
    return Drift(
        prediction=_mean(drifts),
        guided_prediction=_mean(guided_drifts) if guided else None,
        by_timestep=by_timestep,
        guided_by_timestep=guided_by_timestep,
        standard_error=_standard_error([_mean(_drifts(chain, guidance_scale)) for chain in _chains(answers)]),
        largest_change=max((now - base).norm().item() for _, now, base in plain),
    )


def kl_bound(
    recording: "Recording", scheduler: Any, model: nn.Module | None = None, run: Callable[[], Any] | None = None
) -> float:
    """
    An upper bound on the KL divergence, in nats, from the base's pictures to the model's, as latents: the mean over
    the held-out chains of ``sum_t ||mu_base - mu_model||^2 / (2 sigma_t^2)`` with the guided prediction.

    It holds for ancestral sampling: the held-out calls have to be those of diffusers' `DDPMScheduler` (or of DDIM with
    eta 1), from pure noise, with the recording's `guidance_scale` and the prompts that were drawn. The last step,
    which adds no noise, is left out: the bound is for the latents before it. Most of it comes from the least noisy
    steps, and it grows with the square of the change.

    Args:
        scheduler: That of the held-out calls: its `alphas_cumprod` and `config.prediction_type` are read.
        model, run: As in `Recording.drift`, which gives both from one pass: ``recording.drift(scheduler=scheduler)``.

    Raises:
        `ValueError`: If the scheduler predicts neither noise nor velocity, or calls do not form chains.
    """
    return measure_drift(recording, recording.model if model is None else model, run, scheduler).kl_bound


def _bound(answers: Sequence[_Answer], guidance_scale: float, scheduler: Any) -> float:
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"The bound is for models that predict noise or velocity, not {prediction_type}.")
    if any(answer.timestep is None for answer in answers):
        raise ValueError("The recorded calls have no timesteps.")
    total, pictures = 0.0, 0
    for chain in _chains(answers):
        if len(chain) < 2:
            raise ValueError("The recorded calls are not those of ancestral sampling: in a chain the timesteps fall.")
        timesteps = [int(answer.timestep) for answer in chain]
        weights = ancestral_weights(scheduler.alphas_cumprod, timesteps, prediction_type)
        for answer, weight in zip(chain, weights):  # none for the last
            pairs = _guided(answer, guidance_scale) or list(zip(answer.now, answer.base, strict=True))
            total += weight * sum((now - base).square().sum().item() for now, base in pairs)
        pictures += len(pairs)
    return total / pictures


def ancestral_weights(alphas_cumprod: Tensor, timesteps: Sequence[int], prediction_type: str) -> list[float]:
    """
    The weight of ``||f - f_base||^2`` in `kl_bound` at each timestep but the last: ``(d mu / d f)^2 / (2 sigma^2)``.

    With ``a`` and ``b`` the `alphas_cumprod` of a timestep and of the next: ``sigma^2 = (1 - b) / (1 - a) *
    (1 - a / b)`` and ``d mu / d x_0 = sqrt(b) (1 - a / b) / (1 - a)`` ("Denoising Diffusion Probabilistic Models",
    arXiv 2006.11239, equations 6 and 7); ``d x_0 / d f = -sqrt((1 - a) / a)`` for noise, ``-sqrt(1 - a)`` for
    velocity.
    """
    weights = []
    for t, s in zip(timesteps[:-1], timesteps[1:], strict=True):
        if s >= t:
            raise ValueError("The timesteps of a chain have to fall.")
        a, b = (float(alphas_cumprod[step].double()) for step in (t, s))
        variance = (1 - b) / (1 - a) * (1 - a / b)
        to_mean = b**0.5 * (1 - a / b) / (1 - a) * (1 - a) ** 0.5
        to_mean /= a**0.5 if prediction_type == "epsilon" else 1.0
        weights.append(to_mean**2 / (2 * variance))
    return weights


def _answers(recording: "Recording", model: nn.Module, run: Callable[[], Any] | None) -> list[_Answer]:
    calls = [call for call in recording.calls if call.held_out]
    if not calls:
        raise ValueError("The recording holds no calls that were held out, by which drift is measured.")
    forget_gathered(model)
    with evaluating(model), torch.no_grad():
        if run is None:
            given = ((call, call.again(model)) for call in calls)
        else:
            given = zip(calls, _forced(model, calls, run), strict=True)
        return [
            _Answer(call, call.timestep(model), answer.cpu().double(), call.answer.cpu().double())
            for call, answer in given
        ]


def _forced(model: nn.Module, calls: list[Call], run: Callable[[], Any]) -> list[Tensor]:
    """The model's answers while it is led along the path of its base."""
    answers: list[Tensor] = []

    def lead(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        answer = answer_of(output)
        if len(answers) >= len(calls) or answer.shape != calls[len(answers)].answer.shape:
            raise ValueError("This run makes other calls than those that were held out: draw the same prompts.")
        call = calls[len(answers)]
        if not _agree(_sample(args, kwargs, answer), _sample(call.args, call.kwargs, call.answer)):
            raise ValueError("This run meets other inputs than its base did: draw with the same sampler and seeds.")
        answers.append(answer.detach().cpu())
        return replace_answer(output, call.answer.to(answer))

    handle = model.register_forward_hook(lead, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    if len(answers) < len(calls):
        raise ValueError("This run makes fewer calls than those that were held out: draw the same prompts.")
    return answers


def _sample(args: tuple, kwargs: dict[str, Any], answer: Tensor) -> Tensor | None:
    """The noisy sample: the first tensor given to the model that has the answer's shape, or else the first one."""
    tensors: list[Tensor] = []
    map_tensors(tensors.append, (args, kwargs))
    alike = [tensor for tensor in tensors if tensor.dim() and tensor.shape[1:] == answer.shape[1:]]
    return next(iter(alike or tensors), None)


def _agree(now: Tensor | None, recorded: Tensor | None) -> bool:
    """Whether two samples are the same but for rounding. Those of another sampler or seed differ by far more."""
    if now is None or recorded is None:
        return now is recorded
    if now.shape != recorded.shape:
        return False
    recorded = recorded.to(now.device).float()
    return bool((now.float() - recorded).norm() <= _ROUNDING * recorded.norm())


def _guided(answer: _Answer, scale: float) -> list[tuple[Tensor, Tensor]]:
    """Guided predictions of the model and of the base, for a batch whose second half is the first with prompts."""
    half = len(answer.base) // 2
    sample = _sample(answer.call.args, answer.call.kwargs, answer.base)
    if half == 0 or len(answer.base) % 2 or sample is None or len(sample) != len(answer.base):
        return []
    if not torch.equal(sample[:half], sample[half:]):
        return []
    now, base = (rows[:half] + scale * (rows[half:] - rows[:half]) for rows in (answer.now, answer.base))
    return list(zip(now, base, strict=True))


def _chains(answers: Sequence[_Answer]) -> list[list[_Answer]]:
    """The calls of each prompt, whose timesteps fall; a call without a timestep is one of its own."""
    chains: list[list[_Answer]] = []
    for answer in answers:
        last = chains[-1][-1].timestep if chains else None
        if last is None or answer.timestep is None or answer.timestep >= last:
            chains.append([])
        chains[-1].append(answer)
    return chains


def _drifts(chain: Sequence[_Answer], guidance_scale: float) -> list[float]:
    """The relative changes of a chain: of the guided predictions, where there are any."""
    guided = [(a.timestep, *pair) for a in chain for pair in _guided(a, guidance_scale)]
    return _relative(guided or [(a.timestep, *rows) for a in chain for rows in zip(a.now, a.base, strict=True)])[0]


def _standard_error(numbers: Sequence[float]) -> float:
    if len(numbers) < 2:
        return 0.0
    mean = _mean(numbers)
    return (sum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1) / len(numbers)) ** 0.5


def _relative(rows: Sequence[tuple[float | None, Tensor, Tensor]]) -> tuple[list[float], dict[float, float]]:
    """The relative change of each, and the mean at each timestep."""
    drifts = [((now - base).norm() / base.norm()).item() for _, now, base in rows]
    by_timestep: dict[float, list[float]] = {}
    for (timestep, *_), drift in zip(rows, drifts, strict=True):
        if timestep is not None:
            by_timestep.setdefault(timestep, []).append(drift)
    return drifts, {timestep: _mean(by_timestep[timestep]) for timestep in sorted(by_timestep)}


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else float("nan")
