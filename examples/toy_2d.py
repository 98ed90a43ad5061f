"""Figure 1 of "Preserve and Personalize" (arXiv 2505.19519) in two dimensions, with numbers: a model of five classes
learns a sixth, and what becomes of the five is measured. Nothing here is about images.

    python examples/toy_2d.py                                        # about a minute on one core
    python examples/toy_2d.py --lipschitz_weight 50 500 5000         # several weights; the figure shows the first

The classes are Gaussians at the corners of a pentagon, the new one lies at its centre. The model is a conditional
denoiser; a class embedding stands for the prompt. Learned naively, the new class drags the others along. Prior
preservation replays samples of one old class, as DreamBooth does with the class of its subject; here it is the upper
corner. The penalty pulls at every parameter but the embedding, and needs no samples. Learning rate and weight are
those of the paper's authors.

Read along the two rivals in the table, which cost nothing. A tenth of the learning rate, without a penalty, moves the
old classes about as little; at that rate no weight tried was better than none. The embedding of
the new class trained alone moves no old class by construction, and in so small a world almost suffices.
"""

import argparse
import copy
import math
import statistics
from pathlib import Path

import matplotlib
import torch
from diffusers import DDIMScheduler
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from tqdm.auto import tqdm

from lipschitz_reg import LipschitzRegularizer


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


OLD, NEW, GUARDED = range(5), 5, 0
ANGLES = [math.pi / 2 + 2 * math.pi * i / 5 for i in OLD]
CENTRES = torch.tensor([[1.5 * math.cos(a), 1.5 * math.sin(a)] for a in ANGLES] + [[0.0, 0.0]])
STD = 0.15
BATCH = 128
SAMPLES = 400  # of each class, for the figure, the table and prior preservation
PRETRAINING_STEPS = 2500
COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#c1121f"]

# Not clipped: the plane has no range as pixels do. "trailing" begins at the timestep of pure noise.
SCHEDULER = DDIMScheduler(beta_schedule="linear", clip_sample=False, timestep_spacing="trailing")


class Denoiser(nn.Module):
    """Predicts the noise in points of shape (n, 2), given timesteps and classes of shape (n,); 40,000 parameters."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.classes = nn.Embedding(len(CENTRES), 16)
        self.network = nn.Sequential(
            nn.Linear(2 + 32 + 16, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, points: Tensor, timesteps: Tensor, classes: Tensor) -> Tensor:
        time = get_timestep_embedding(timesteps, 32)
        return self.network(torch.cat([points, time, self.classes(classes)], dim=1))


def draw(classes: Tensor) -> Tensor:
    """True points of these classes: (n,) to (n, 2)."""
    return CENTRES[classes] + STD * torch.randn(len(classes), 2)


def denoising_loss(model: Denoiser, points: Tensor, classes: Tensor) -> Tensor:
    noise = torch.randn_like(points)
    timesteps = torch.randint(SCHEDULER.config.num_train_timesteps, (len(points),))
    return (model(SCHEDULER.add_noise(points, noise, timesteps), timesteps, classes) - noise).square().mean()


@torch.no_grad()
def sample(model: Denoiser) -> Tensor:
    """Points of shape (6, SAMPLES, 2) by 50 DDIM steps, from the same noise for every model."""
    classes = torch.arange(len(CENTRES)).repeat_interleave(SAMPLES)
    points = torch.randn(len(classes), 2, generator=torch.Generator().manual_seed(0))
    SCHEDULER.set_timesteps(50)
    for timestep in SCHEDULER.timesteps:
        noise = model(points, timestep.expand(len(classes)), classes)
        points = SCHEDULER.step(noise, timestep, points).prev_sample
    return points.view(len(CENTRES), SAMPLES, 2)


def pretrain(seed: int, bar: tqdm) -> Denoiser:
    """A model of the five old classes; the embedding of the new one stays as it was initialized."""
    torch.manual_seed(seed)
    model = Denoiser()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PRETRAINING_STEPS)
    for _ in range(PRETRAINING_STEPS):
        classes = torch.randint(len(OLD), (2 * BATCH,))
        optimizer.zero_grad()
        denoising_loss(model, draw(classes), classes).backward()
        optimizer.step()
        schedule.step()
        bar.update()
    return model


def learn_new_class(
    base: Denoiser,
    seed: int,
    bar: tqdm,
    steps: int,
    learning_rate: float,
    lipschitz_weight: float = 0.0,
    replayed: Tensor | None = None,
    embedding_only: bool = False,
) -> Denoiser:
    """A copy of the base, trained on the new class; `replayed` holds the base's samples of the guarded class."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    # An embedding that was never trained has nothing to preserve. Those of the old classes get no gradient.
    groups = [{"params": model.classes.parameters(), "lipschitz_weight": 0.0}]
    if not embedding_only:
        groups.append({"params": model.network.parameters()})
    optimizer = torch.optim.Adam(groups, lr=learning_rate)
    LipschitzRegularizer(optimizer, weight=lipschitz_weight)
    new, guarded = torch.full((BATCH,), NEW), torch.full((BATCH,), GUARDED)
    for _ in range(steps):
        loss = denoising_loss(model, draw(new), new)
        if replayed is not None:
            loss = loss + denoising_loss(model, replayed[torch.randint(SAMPLES, (BATCH,))], guarded)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.update()
    return model


def spread(points: Tensor) -> Tensor:
    """The standard deviation of each class, over both axes: (classes, n, 2) to (classes,)."""
    return points.var(dim=1).mean(dim=1).sqrt()


def measure(points: Tensor, base: Tensor) -> dict[str, float]:
    """The columns of the table, which says what they mean, from samples of a model and of the base."""
    moved = ((points.mean(dim=1) - base.mean(dim=1)).norm(dim=1) / spread(base))[: len(OLD)]
    # Either way, so that one class grown and another shrunk do not cancel.
    factor = (spread(points) / spread(base)).log().abs().exp()[: len(OLD)]
    return {f"corner {index + 1}": float(moved[index]) for index in OLD} | {
        "moved": float(moved.mean()),
        "spread": float(factor.mean()),
        "new: off": float(points[NEW].mean(dim=0).norm() / STD),
        "new: spread": float(spread(points)[NEW] / STD),
    }


def print_table(rows: dict[str, list[dict[str, float]]]) -> None:
    """Means over the seeds and, where there are several, the standard deviation between them."""
    titles = list(rows["naive"][0])
    print(f"\n{'':26s}" + "".join(f"{title:>{10 if 'corner' in title else 14}s}" for title in titles))
    for name, measured in rows.items():
        cells = ""
        for title in titles:
            values = [row[title] for row in measured]
            if "corner" in title:
                cells += f"{statistics.mean(values):10.2f}"
            else:
                between = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
                cells += f"{f'{statistics.mean(values):.2f}{between}':>14s}"
        print(f"{name:26s}{cells}")
    print(
        "\ncorner: how far the mean of this old class is from the base's, in the class's own standard deviations;"
        "\n  corner 1 is the one that prior preservation guards. moved: the mean over the five."
        "\nspread: by what factor the standard deviations of the old classes changed, up or down; 1 is best."
        "\nnew: off, how far the mean of the new class is from where it should be, in standard deviations;"
        "\n  new: spread, its standard deviation over the true one."
    )


def save_figure(panels: dict[str, tuple[Tensor, str]], base: Tensor, path: Path) -> None:
    """A panel for each method: its samples, and where the base had the old classes (two standard deviations)."""
    figure, axes = plt.subplots(1, len(panels), figsize=(3 * len(panels), 3.55), layout="constrained")
    for axis, (name, (points, caption)) in zip(axes, panels.items()):
        for index in (*OLD, NEW)[: len(OLD) if points is base else None]:
            axis.scatter(*points[index].T, s=7, color=COLOURS[index], alpha=0.45, linewidths=0)
        for centre, std in zip(base.mean(dim=1)[: len(OLD)].tolist(), spread(base).tolist()):
            axis.add_patch(
                plt.Circle(centre, 2 * std, fill=False, color="black", linewidth=1.1, linestyle=(0, (3, 2)))
            )
        axis.set(xlim=(-2.1, 2.1), ylim=(-2.0, 2.2), xticks=[], yticks=[], aspect="equal")
        axis.set_title(name, fontsize=15)
        axis.set_xlabel(caption, fontsize=12)
        axis.spines[:].set_color("#bbbbbb")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="A sixth Gaussian is learned; what becomes of the other five?")
    parser.add_argument("--lipschitz_weight", type=float, nargs="+", default=[50.0], help="Weights of the penalty.")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="Of Adam, while the new class is learned.")
    parser.add_argument("--steps", type=int, default=1000, help="How long the new class is learned.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="The figure shows the first.")
    parser.add_argument("--output", type=Path, default=Path("toy_2d.png"), help="File of the figure.")
    args = parser.parse_args()
    if not all(0 <= weight < float("inf") for weight in args.lipschitz_weight):
        parser.error(f"--lipschitz_weight: weights must be finite and at least 0, not {args.lipschitz_weight}")
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, not {args.steps}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # faster at this size, and the same result on every number of cores

    rates = {"learning_rate": args.learning_rate}
    penalized = {f"penalty, weight {w:g}": rates | {"lipschitz_weight": w} for w in args.lipschitz_weight}
    rivals = {
        "naive, a tenth of the rate": {"learning_rate": args.learning_rate / 10},
        "new embedding alone": {"learning_rate": 5 * args.learning_rate, "embedding_only": True},
    }
    methods = {"naive": rates, "prior preservation": rates, **penalized, **rivals}
    drawn = list(methods)[:3]

    rows, panels = {}, {}
    bar = tqdm(total=len(args.seeds) * (PRETRAINING_STEPS + len(methods) * args.steps), desc="steps")
    for seed in args.seeds:
        base_model = pretrain(seed, bar)
        base = sample(base_model)
        panels.setdefault("base", (base, "five classes, before the sixth"))
        for name, settings in methods.items():
            replayed = base[GUARDED] if name == "prior preservation" else None
            points = sample(learn_new_class(base_model, seed, bar, args.steps, replayed=replayed, **settings))
            rows.setdefault(name, []).append(measure(points, base))
            if seed == args.seeds[0] and name in drawn:
                panels[name] = (points, f"old classes moved by {rows[name][0]['moved']:.1f} std")
    bar.close()
    print_table(rows)
    save_figure(panels, panels["base"][0], args.output)
    print(f"\nthe figure: {args.output}")


if __name__ == "__main__":
    main()
