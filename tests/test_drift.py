# The drift meter against its formula, along replayed calls and along a run; and the KL bound against closed forms.
import math
from types import SimpleNamespace

import pytest
import torch
from denoiser import TIMESTEPS, draw, frozen_copy, make_denoiser, moved, record_denoiser
from diffusers import DDPMScheduler
from torch import nn

from lipschitz_reg import Drift, kl_bound, record
from lipschitz_reg.drift import ancestral_weights


def runs(model, seeds=(2, 3), **options):
    """What `record_denoiser` holds out, once more."""
    return [draw(model, seed=seed, **options) for seed in seeds]


def changes(recording, model):
    """Of each held-out call: its timestep, and what the model and its base say to it, written out."""
    with torch.no_grad():
        for call in recording.calls:
            if call.held_out:
                yield int(call.args[1]), model.eval()(*call.args, **call.kwargs)["sample"], call.answer


def relative(now, base):
    return [((a - b).norm() / b.norm()).item() for a, b in zip(now, base, strict=True)]


def mean(numbers):
    return sum(numbers) / len(numbers)


def assert_same(drift, expected):
    for one, other in zip(drift, expected, strict=True):
        assert one == other if one is None or other is None else one == pytest.approx(other, rel=1e-9)


# Drift


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_base_has_not_drifted(kind):
    model = make_denoiser(kind)
    recording = record_denoiser(model)
    nothing = dict.fromkeys(sorted(TIMESTEPS), 0.0)
    for drift in (recording.drift(), recording.drift(run=lambda: runs(model))):
        assert isinstance(drift, Drift)
        assert drift.prediction == drift.guided_prediction == drift.largest_change == drift.dial == 0
        assert drift.by_timestep == drift.guided_by_timestep == nothing


@pytest.mark.parametrize("scale", [7.5, 1.0])
@pytest.mark.parametrize("kind", ["full", "lora", "keys and values"])
def test_drift_equals_its_formula(kind, scale):
    model = make_denoiser(kind)
    recording = record_denoiser(model, guidance_scale=scale)
    rows = list(changes(recording, moved(model)))
    plain, guided, of_calls, largest = {}, {}, [], 0.0
    for timestep, now, base in rows:
        plain.setdefault(timestep, []).extend(relative(now, base))
        without, with_prompt = zip(now.chunk(2), base.chunk(2), strict=True)
        pair = [u + scale * (c - u) for u, c in zip(without, with_prompt, strict=True)]
        guided.setdefault(timestep, []).extend(relative(*pair))
        of_calls.append(mean(relative(*pair)))
        largest = max(largest, (now - base).flatten(1).norm(dim=1).max().item())
    assert len(rows) == 6 and set(plain) == set(TIMESTEPS)
    drift = recording.drift()
    assert list(drift.by_timestep) == list(drift.guided_by_timestep) == sorted(TIMESTEPS)
    assert drift.prediction == pytest.approx(mean(sum(plain.values(), [])), rel=1e-9) and drift.prediction > 0.01
    assert drift.guided_prediction == pytest.approx(mean(sum(guided.values(), [])), rel=1e-9)
    assert drift.by_timestep == pytest.approx({t: mean(numbers) for t, numbers in plain.items()}, rel=1e-9)
    assert drift.guided_by_timestep == pytest.approx({t: mean(numbers) for t, numbers in guided.items()}, rel=1e-9)
    assert drift.largest_change == pytest.approx(largest, rel=1e-9)
    of_prompts = [mean(of_calls[:3]), mean(of_calls[3:])]
    assert (
        drift.standard_error == pytest.approx(abs(of_prompts[0] - of_prompts[1]) / 2, rel=1e-9)
        and drift.standard_error > 0
    )
    assert drift.dial == drift.guided_prediction + drift.standard_error
    with_one_scale = max(abs(drift.by_timestep[t] - drift.guided_by_timestep[t]) for t in TIMESTEPS)
    assert with_one_scale > 0


def test_without_pairs_there_is_no_guided_prediction():
    model = make_denoiser()
    with record(model) as recording, recording.held_out(), torch.no_grad():
        for timestep in TIMESTEPS:
            model(torch.randn(2, 4, 3).double(), torch.tensor(timestep), torch.randn(2, 2, 5).double())
    drift = recording.drift(moved(model))
    assert drift.guided_prediction is None and drift.guided_by_timestep == {}
    assert drift.standard_error == 0  # of one prompt it is not known
    assert drift.dial == drift.prediction > 0


def test_only_held_out_calls_count():
    model = make_denoiser()
    recording = record_denoiser(model)
    moved(model)
    expected = recording.drift()
    recording.calls = [call for call in recording.calls if call.held_out]
    assert recording.drift() == expected


def test_another_model_may_be_measured():
    model = make_denoiser()
    recording = record_denoiser(model)
    other = moved(make_denoiser())
    assert recording.drift(other).prediction > 0 == recording.drift().prediction
    assert recording.drift(other) == recording.drift(moved(model))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_measures_what_replaying_does(kind):
    """And ends where the base's own ends, as the base's answers lead it."""
    model = make_denoiser(kind)
    expected = runs(frozen_copy(model))
    recording = record_denoiser(model)
    moved(model)
    ends = []
    drift = recording.drift(run=lambda: ends.extend(runs(model)))
    assert_same(drift, recording.drift())
    assert drift.prediction > 0.01
    assert all(torch.equal(one, other) for one, other in zip(ends, expected, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(runs(model), expected, strict=True))


@pytest.mark.parametrize("output", ["tensor", "tuple", "dict", "nested"])
def test_a_run_may_read_outputs_of_every_form(output):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            x = self.layer(x)
            return {"tensor": x, "tuple": (x, "more"), "dict": {"sample": x}, "nested": ([x, 1],)}[output]

    def run():
        x = torch.ones(1, 3)
        for _ in range(3):
            x = model(x)
            x = {"tensor": lambda: x, "tuple": lambda: x[0], "dict": lambda: x["sample"], "nested": lambda: x[0][0]}[
                output
            ]()
        ends.append(x.detach())

    model, ends = Wrapped(), []
    with record(model) as recording, recording.held_out():
        run()
    moved(model)
    assert_same(recording.drift(run=run), recording.drift())
    assert torch.equal(ends[1], ends[0])


def test_a_run_sees_a_text_encoder_that_has_changed():
    model, encoder = make_denoiser(), nn.Linear(5, 5).double()

    def run():
        generator = torch.Generator().manual_seed(4)
        sample, words = (torch.randn(1, *shape, generator=generator).double() for shape in ((4, 3), (2, 5)))
        model(sample, torch.tensor(600), encoder(words))

    with record(model, text_encoder=encoder) as recording, recording.held_out(), torch.no_grad():
        run()
    with torch.no_grad():
        encoder.bias.add_(1.0)
    assert recording.drift().prediction == 0 < recording.drift(run=run).prediction


@pytest.mark.parametrize(
    "run",
    [
        lambda model: runs(model, pictures=3),
        lambda model: runs(model, seeds=(2, 3, 4)),
        lambda model: runs(model, seeds=(2,)),
        lambda model: None,
        lambda model: runs(model, seeds=(2, 4)),
        lambda model: runs(model, scale=3.0),
    ],
    ids=["other shapes", "more", "fewer", "none", "other seeds", "other guidance"],
)
def test_another_run_is_refused(run):
    model = make_denoiser()
    recording = record_denoiser(model)
    with pytest.raises(ValueError, match="This run .* draw") as error:
        recording.drift(run=lambda: run(model))
    assert "\n" not in str(error.value) and not model._forward_hooks and model.training


def test_measuring_leaves_modes_random_numbers_and_gradients():
    model = make_denoiser(dropout=0.5)
    recording = record_denoiser(model)
    model.blocks[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert recording.drift().prediction == 0
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_recording_without_held_out_calls_is_refused():
    model = make_denoiser()
    with record(model) as recording:
        draw(model)
    with pytest.raises(ValueError, match="no calls that were held out") as error:
        recording.drift()
    assert "\n" not in str(error.value)


# The KL bound


class Gaussian(nn.Module):
    """The best prediction of noise or velocity where pictures are Gaussian, of a mean that the prompt adds to."""

    def __init__(self, scheduler, mean, variance=0.25):
        super().__init__()
        self.scheduler, self.variance = scheduler, variance
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))

    def forward(self, sample, timestep, shift=None):
        a = self.scheduler.alphas_cumprod[timestep].double()
        mean = self.mean if shift is None else self.mean * (1 + shift)
        noise = (1 - a).sqrt() * (sample - a.sqrt() * mean) / (a * self.variance + 1 - a)
        picture = (sample - (1 - a).sqrt() * noise) / a.sqrt()
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        return a.sqrt() * noise - (1 - a).sqrt() * picture if velocity else noise


def make_scheduler(prediction_type="epsilon"):
    scheduler = DDPMScheduler(num_train_timesteps=50, clip_sample=False, prediction_type=prediction_type)
    scheduler.set_timesteps(5)
    return scheduler


def sample_chain(model, scheduler, pictures, scale=None):
    """Ancestral sampling, with guidance if there is a scale."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(pictures, 2, dtype=torch.float64, generator=generator)
    for timestep in scheduler.timesteps:
        if scale is None:
            answer = model(x, timestep)
        else:
            shift = torch.cat([torch.zeros_like(x), torch.ones_like(x)])
            without, with_prompt = model(torch.cat([x, x]), timestep, shift).chunk(2)
            answer = without + scale * (with_prompt - without)
        x = scheduler.step(answer, timestep, x, generator=generator).prev_sample
    return x


def path_of(scheduler, mean, variance=0.25):
    """Mean and covariance of one coordinate of all latents of a chain but the last, by the steps of DDPM."""
    timesteps = scheduler.timesteps.tolist()
    means, covariance = [0.0], torch.ones(1, 1, dtype=torch.float64)
    for t, s in zip(timesteps[:-1], timesteps[1:], strict=True):
        a, b = (scheduler.alphas_cumprod[step].double().item() for step in (t, s))
        # x_0 given x_t is gain * x_t + offset; x_s given both is N(of_picture * x_0 + of_latent * x_t, noise).
        gain = math.sqrt(a) * variance / (a * variance + 1 - a)
        offset = mean * (1 - a) / (a * variance + 1 - a)
        of_picture = math.sqrt(b) * (1 - a / b) / (1 - a)
        of_latent = math.sqrt(a / b) * (1 - b) / (1 - a)
        noise = (1 - b) / (1 - a) * (1 - a / b)
        slope = of_picture * gain + of_latent
        means.append(slope * means[-1] + of_picture * offset)
        row = slope * covariance[-1]
        corner = (slope * row[-1] + noise).view(1, 1)
        covariance = torch.cat([torch.cat([covariance, row[:, None]], 1), torch.cat([row[None], corner], 1)])
    return torch.tensor(means, dtype=torch.float64), covariance


def kl(base, model):
    """Of two Gaussians, in nats, in two coordinates that are alike."""
    first, second = (torch.distributions.MultivariateNormal(*gaussian) for gaussian in (base, model))
    return 2 * torch.distributions.kl_divergence(first, second).item()


def last(path):
    return path[0][-1:], path[1][-1:, -1:]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_kl_bound_is_the_divergence_of_the_paths(prediction_type):
    """Closed forms, of Gaussian pictures with one mean and with another."""
    scheduler = make_scheduler(prediction_type)
    model = Gaussian(scheduler, 1.0)
    with record(model) as recording, recording.held_out(), torch.no_grad():
        sample_chain(model, scheduler, 3)
    assert kl_bound(recording, scheduler) == 0
    bound = kl_bound(recording, scheduler, Gaussian(scheduler, 1.3))
    base, other = path_of(scheduler, 1.0), path_of(scheduler, 1.3)
    assert bound == pytest.approx(kl(base, other), rel=1e-5)  # alphas_cumprod is float32
    assert 0 < kl(last(base), last(other)) < bound


def test_kl_bound_where_the_change_depends_on_the_latent_is_that_of_the_paths():
    """A mean over the base's chains, here over 4,000 pictures."""
    scheduler = make_scheduler()
    model = Gaussian(scheduler, 1.0)
    with record(model) as recording, recording.held_out(), torch.no_grad():
        sample_chain(model, scheduler, 4000)
    bound = kl_bound(recording, scheduler, Gaussian(scheduler, 1.0, variance=0.5))
    base, other = path_of(scheduler, 1.0), path_of(scheduler, 1.0, variance=0.5)
    assert bound == pytest.approx(kl(base, other), rel=0.05)
    assert 0 < kl(last(base), last(other)) < bound


def test_kl_bound_is_of_the_guided_prediction():
    """Guidance leads away from the mean without prompt, 1, past that with it, 2."""
    scheduler = make_scheduler()
    model = Gaussian(scheduler, 1.0)
    with record(model, guidance_scale=3.0) as recording, recording.held_out(), torch.no_grad():
        sample_chain(model, scheduler, 3, scale=3.0)
    bound = kl_bound(recording, scheduler, Gaussian(scheduler, 1.1))
    assert bound == pytest.approx(kl(path_of(scheduler, 4.0), path_of(scheduler, 4.4)), rel=1e-5)


def test_kl_bound_comes_with_the_drift_and_along_a_run():
    scheduler = make_scheduler()
    model = Gaussian(scheduler, 1.0)
    with record(model) as recording, recording.held_out(), torch.no_grad():
        sample_chain(model, scheduler, 3)
    model.mean.data.fill_(1.3)
    drifts = [recording.drift(scheduler=scheduler)]
    drifts.append(recording.drift(run=lambda: sample_chain(model, scheduler, 3), scheduler=scheduler))
    bounds = [drift.kl_bound for drift in drifts]
    bounds.append(kl_bound(recording, scheduler, run=lambda: sample_chain(model, scheduler, 3)))
    assert bounds == pytest.approx([kl_bound(recording, scheduler)] * 3, rel=1e-9)
    assert drifts[0]._replace(kl_bound=None) == recording.drift()


def test_kl_bound_is_the_mean_over_chains():
    scheduler, bounds = make_scheduler(), []
    model = Gaussian(scheduler, 1.0)
    for batches in ((2,), (2, 4)):
        with record(model) as recording, recording.held_out(), torch.no_grad():
            for pictures in batches:
                sample_chain(model, scheduler, pictures)
        bounds.append(kl_bound(recording, scheduler, Gaussian(scheduler, 1.3)))
    assert bounds[1] == pytest.approx(bounds[0], rel=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_kl_bound_counts_steps_as_the_scheduler_takes_them(prediction_type):
    """By moving the prediction and looking at where the step leads, and at how far two steps part by their noise."""
    scheduler = make_scheduler(prediction_type)
    timesteps = scheduler.timesteps.tolist()
    weights = ancestral_weights(scheduler.alphas_cumprod, timesteps, prediction_type)
    x, change = torch.randn(10000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 0.1
    for timestep, weight in zip(timesteps[:-1], weights, strict=True):
        steps = [
            scheduler.step(answer, timestep, x, generator=torch.Generator().manual_seed(seed)).prev_sample
            for answer, seed in ((x * 0, 1), (x * 0 + change, 1), (x * 0, 2))
        ]
        moved_by, variance = (steps[1] - steps[0]).mean(), (steps[2] - steps[0]).var() / 2
        assert weight * change**2 == pytest.approx((moved_by**2 / (2 * variance)).item(), rel=0.03)


@pytest.mark.parametrize(
    "prediction_type, timesteps, message",
    [
        ("sample", [40, 30], "predict noise or velocity, not sample"),
        ("flow_prediction", [40, 30], "predict noise or velocity, not flow_prediction"),
        ("epsilon", [40], "not those of ancestral sampling"),
        ("epsilon", [30, 30, 30], "not those of ancestral sampling"),
        ("epsilon", None, "have no timesteps"),
    ],
)
def test_kl_bound_of_what_has_none_is_refused(prediction_type, timesteps, message):
    class Timeless(nn.Linear):
        def forward(self, x, noise_level):
            return super().forward(x)

    scheduler = make_scheduler()
    model = Gaussian(scheduler, 1.0) if timesteps else Timeless(2, 2).double()
    with record(model) as recording, recording.held_out(), torch.no_grad():
        for timestep in timesteps or [40, 30]:
            model(torch.randn(1, 2, dtype=torch.float64), torch.tensor(timestep))
    config = SimpleNamespace(prediction_type=prediction_type)
    stand_in = SimpleNamespace(config=config, alphas_cumprod=scheduler.alphas_cumprod)
    with pytest.raises(ValueError, match=message) as error:
        kl_bound(recording, stand_in)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_drift_is_that_of_a_model_that_has_hardly_moved(dtype):
    model = make_denoiser(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        recording = record_denoiser(model)
    assert recording.drift().dial == 0
    rounding = recording.rounding_drift().dial
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    moved = recording.drift().dial
    assert recording.drift().dial == moved  # nothing is left behind
    assert recording.rounding_drift() == recording.rounding_drift()
    if dtype == torch.bfloat16:
        assert 0.3 * moved < rounding < 3 * moved
    else:
        assert rounding < 1e-5 < moved
