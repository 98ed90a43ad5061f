# What the results of tradeoff.py say: three figures, and tables of the numbers that settle the claims.
# Reads its JSONL files and nothing else; trains and measures nothing.
"""
python benchmarks/plot_tradeoff.py tradeoff/*.jsonl --output_dir figures > claims.md

Every method at its best: what a fidelity costs is the least of its settings and, where they differ in one thing alone
(rate, weight, stop or share), of the lines between neighbours. More settings can only help a method; a bad one does it
no harm. In brackets: 95% confidence intervals, by bootstrap over subjects. A dash: no setting of the method that was
measured gets there.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import matplotlib
import numpy as np


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


# What prompts ask for: the subject's scene, and all of other things.
OBEYED = ("subject scene", "other scene", "other class", "other colour", "other pattern")
COSTS = {
    "drift": "drift of pictures (RMS, grey levels)",
    "prediction drift": "drift of predictions",
    "guided drift": "drift of guided predictions",
    "parameter drift": "drift of parameters (L2)",
    "class drift": "drift of pictures of the class itself",
    "worst drift": "drift of the picture that moved most",
    "KL bound": "bound on the KL divergence, nats",
    "disobeyed": "what prompts ask for and is missing",
    "total seconds": "seconds, class images included",
}
# What Custom Diffusion and LoRA reach on the toy benchmark, and what full fine-tuning does.
FIDELITIES = (0.5, 0.55, 0.75, 0.8)
HEADS = {
    "drift": "pictures",
    "prediction drift": "predictions",
    "guided drift": "guided predictions",
    "class drift": "pictures of the class",
    "worst drift": "the worst picture",
    "KL bound": "KL bound, nats",
}  # no seconds: results may come from several machines
SHARES = ("drift", "prediction drift", "guided drift")
DIGITS = {"prediction drift": 3, "guided drift": 3, "KL bound": 0}
MEASURES = ("fidelity", "alignment", *OBEYED, "seconds", "class seconds", *COSTS)


# Arithmetic


def cost_at(fidelities: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """
    The least cost at which a method has a fidelity or more.

    Args:
        fidelities (`np.ndarray`): (..., n)
        segments (`np.ndarray`): (segments, 2, ..., 2), two points (fidelity, cost) each, which may be the same one.

    Returns:
        `np.ndarray`: (..., n), infinite where no segment gets there.
    """
    # (segments, ..., 1): the end of lower fidelity, then the other one.
    order = np.argsort(segments[..., 0], axis=1)[..., None]
    ends = np.moveaxis(np.take_along_axis(segments, order, axis=1), (1, -1), (0, 1))
    (f0, c0), (f1, c1) = ends[..., None]
    rise = np.where(f1 > f0, f1 - f0, 1.0)
    entered = c0 + (c1 - c0) * np.clip((fidelities - f0) / rise, 0, 1)
    return np.where(f1 >= fidelities, np.minimum(entered, c1), np.inf).min(axis=0)


def bootstrap(count: int, statistic: Callable[[np.ndarray], np.ndarray], resamples: int = 4000) -> np.ndarray:
    """
    The statistic, a function of indices (..., count), of `count` indices drawn with replacement: (resamples, ...). The
    same ones are drawn at every call.
    """
    return statistic(np.random.default_rng(0).integers(count, size=(resamples, count)))


def tail(count: int) -> float:
    """
    The share of resamples to leave out at each end of a 95% interval, given how many subjects are resampled.
    Resamples of a few vary too little: with eight, 2.5% at each end would give only 88% confidence (Hesterberg 2015,
    "What teachers should know about the bootstrap", the expanded percentile interval).
    """
    if count < 2:
        return 0.0
    z, v = NormalDist().inv_cdf(0.975), count - 1
    # Of Student's t: Abramowitz and Stegun, 26.7.5.
    quantile = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    quantile += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return NormalDist().cdf(-quantile * (count / v) ** 0.5)


def interval(samples: np.ndarray, count: int) -> np.ndarray:
    """The 95% interval by resamples of `count` subjects, along the first axis: (2, ...). Infinity counts, NaN not."""
    ordered, left_out = np.sort(samples, axis=0), tail(count)  # NaN last
    known = np.isfinite(samples).sum(0) + np.isinf(samples).sum(0)
    ranks = [np.clip(np.ceil(q * known).astype(int) - 1, 0, None) for q in (left_out, 1 - left_out)]
    return np.stack([np.take_along_axis(ordered, rank[None], axis=0)[0] for rank in ranks])


def proportional_fit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """
    Of x and y, (..., n), along the last axis: the slope of the least-squares line through the origin, the RMS of what
    it leaves over the RMS of y, and the slope of the line through their logarithms, which is a power; (..., 3).
    """
    slope = (x * y).sum(-1) / np.square(x).sum(-1)
    rest = np.sqrt(np.square(y - slope[..., None] * x).sum(-1) / np.square(y).sum(-1))
    log_x, log_y = (np.log(values) - np.log(values).mean(-1, keepdims=True) for values in (x, y))
    return np.stack([slope, rest, (log_x * log_y).sum(-1) / np.square(log_x).sum(-1)], axis=-1)


# Results


class Curve(NamedTuple):
    """The settings of a method, and what was measured of them: (settings, subjects, MEASURES), a mean over seeds."""

    settings: list[dict[str, Any]]
    values: np.ndarray
    neighbours: np.ndarray  # (segments, 2), indices of settings; a setting is its own neighbour, too

    def of(self, measure: str) -> np.ndarray:
        """(settings, subjects)"""
        return self.values[:, :, MEASURES.index(measure)]


class Results(NamedTuple):
    subjects: list[str]
    seeds: list[int]
    curves: dict[str, Curve]

    def segments(self, method: str, cost: str, subjects: np.ndarray | list[int] | slice = slice(None)) -> np.ndarray:
        """
        Fidelity and cost, as means over subjects (..., n), of neighbouring settings: (segments, 2, ..., 2), as in
        `cost_at`.
        """
        both = [MEASURES.index("fidelity"), MEASURES.index(cost)]
        curve = self.curves[method]
        return curve.values[:, :, both][:, subjects].mean(-2)[curve.neighbours]

    def ease(self, family: str) -> np.ndarray:
        """
        How much more fidelity than the average subject each one gets, over all settings: (subjects,). A resample of
        subjects that are easy is compared at a fidelity that is higher by so much; else it would be another question.
        """
        methods = [method for part in self.families()[family] for method in part]
        means = np.concatenate([self.curves[method].of("fidelity") for method in methods]).mean(0)
        return means - means.mean()

    def families(self) -> dict[str, tuple[list[str], list[str]]]:
        """For "full", "lora" and "custom_diffusion": the methods with the penalty, and their rivals without it."""
        families = {}
        for method, curve in self.curves.items():
            flags = curve.settings[0]["flags"]
            kind = ["full", *(flag.partition("=")[2] for flag in flags if flag.startswith("--method="))][-1]
            families.setdefault(kind, ([], []))["--lipschitz_weight=0" in flags].append(method)
        return families

    def compared(self, family: str) -> tuple[list[str], list[str]]:
        """Ours and the others: with layers or predictions held, or, if there are none, with any penalty."""
        ours, rivals = self.families()[family]
        held = [m for m in ours if any("_recording=" in flag for flag in self.curves[m].settings[0]["flags"])]
        return (held, [m for m in ours if m not in held] + rivals) if held else (ours, rivals)

    def penalized(self) -> list[str]:
        return [method for ours, _ in self.families().values() for method in ours]


def read_results(paths: list[Path], seeds: list[int] | None = None) -> tuple[Results, int]:
    """
    The results, of these seeds or of all, of settings that were measured for all subjects and seeds that the base was,
    and the number of other settings, which are left out: means over different subjects do not compare.
    """
    rows = []
    for line in (line for path in paths for line in path.read_text().splitlines()):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # of a run that was killed
            continue
    if not all("settings" in row for row in rows):
        raise SystemExit("plot_tradeoff.py: error: not all of these files are results of tradeoff.py")
    rows = [row for row in rows if seeds is None or row["seed"] in seeds]
    newest = rows[-1]["settings"] if rows else None
    groups = {}
    for row in (row for row in rows if row["settings"] == newest):
        row["alignment"] = float(np.mean([row[name] for name in OBEYED]))
        row["disobeyed"] = 1 - row["alignment"]
        row["total seconds"] = row["seconds"] + row["class seconds"]
        names = ("method", "rate", "weight", "schedule", "steps", "stop", "share", "flags")
        setting = {name: row[name] for name in names}
        # A share below 1 counts as a setting: any trained model can be interpolated towards its base.
        setting["method"] = setting["method"].removesuffix(", interpolated")
        _, found = groups.setdefault(json.dumps(setting), (setting, {}))
        # Earlier results lack what was not measured yet.
        found[row["subject"], row["seed"]] = [row.get(name, np.nan) for name in MEASURES]
    everyone = next((found.keys() for setting, found in groups.values() if setting["method"] == "base"), None)
    if everyone is None:
        raise SystemExit("plot_tradeoff.py: error: no result of the base in these files: let tradeoff.py run first")
    subjects, seeds = (sorted(set(values)) for values in zip(*everyone))
    curves, incomplete = {}, 0
    for setting, found in groups.values():
        if not everyone <= found.keys():
            incomplete += 1
            continue
        means = [np.mean([found[pair] for pair in everyone if pair[0] == subject], axis=0) for subject in subjects]
        curve = curves.setdefault(setting["method"], ([], []))
        curve[0].append(setting)
        curve[1].append(means)
    del curves["base"]
    curves = {
        method: Curve(settings, np.array(values), find_neighbours(settings))
        for method, (settings, values) in curves.items()
    }
    return Results(subjects, seeds, curves), incomplete


def find_neighbours(settings: list[dict[str, Any]]) -> np.ndarray:
    """Pairs of settings, (pairs, 2), that differ in one thing alone with none between them; and each with itself."""
    pairs = [(i, i) for i in range(len(settings))]
    for knob in ("rate", "weight", "stop", "share"):
        # At a constant rate, a stop of a longer run and a run of as many steps are the same.
        others = {"rate", "weight", "schedule", "stop", "share"} - {knob}
        lines = {}
        for i, setting in enumerate(settings):
            lines.setdefault(tuple(setting[name] for name in sorted(others)), []).append(i)
        for line in lines.values():
            line.sort(key=lambda i: settings[i][knob])
            pairs += zip(line, line[1:])
    return np.array(pairs)


# Claims


def print_table(title: str, head: list[str], rows: list[list[str]]) -> None:
    print(f"\n### {title}\n")
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")


def show(value: float, limits: np.ndarray, scale: float = 1.0, digits: int = 1) -> str:
    if not np.isfinite(value):
        return "–"
    low, high = (f"{scale * limit:.{digits}f}".replace("inf", "∞") for limit in limits)
    return f"{scale * value:.{digits}f} [{low}, {high}]"


def print_settings(results: Results) -> None:
    """All that was measured: mean and standard deviation over subjects."""
    columns = {"fidelity": 100, "alignment": 100, "other colour": 100, "drift": 1, "prediction drift": 100}
    columns |= {"parameter drift": 1, "seconds": 1}
    rows = []
    for method, curve in results.curves.items():
        for setting, values in zip(curve.settings, curve.values):
            cells = [scale * values[:, MEASURES.index(name)] for name, scale in columns.items()]
            setup = [f"{setting['rate']:g}", f"{setting['weight']:g}", str(setting["stop"]), f"{setting['share']:g}"]
            rows.append([method, *setup, *(f"{cell.mean():.1f} ± {cell.std():.1f}" for cell in cells)])
    names = [name + (", %" if scale == 100 else "") for name, scale in columns.items()]
    print_table("All settings", ["method", "rate", "weight", "steps", "share", *names], rows)


def print_equal_fidelities(results: Results, family: str, fidelities: Sequence[float]) -> None:
    """
    For each fidelity, what each method costs there, and what the first of ours costs as a share of each rival, and of
    the best of all. If a method has no result at so low a fidelity, or in too many resamples none, its cost is an
    upper bound (≤). A share is then a lower bound (≥) if that is the rival, an upper bound (≤) if it is ours, and
    neither (~) if both.
    """
    ours, rivals = results.compared(family)
    methods, ease = ours + rivals, results.ease(family)
    # Earlier results lack some.
    costs = [cost for cost in HEADS if not any(np.isnan(results.curves[m].of(cost)).any() for m in methods)]

    def measure(subjects):
        """(..., fidelities, methods and the best rival, costs and whether no setting has so low a fidelity)"""
        asked = np.array(fidelities) + ease[subjects].mean(-1)[..., None]
        found = np.array([[cost_at(asked, results.segments(m, c, subjects)) for c in costs] for m in methods])
        lowest = [results.segments(m, costs[0], subjects)[..., 0].min((0, 1)) for m in methods]
        below = asked < np.array(lowest)[..., None]
        found = np.concatenate([found, np.where(np.isinf(found[:, :1]), False, below[:, None])], axis=1)
        rivals_found = found[len(ours) :]
        best = [rivals_found[:, :-1].min(axis=0, initial=np.inf), rivals_found[:, -1:].max(axis=0, initial=0)]
        return np.moveaxis(np.concatenate([found, np.concatenate(best)[None]]), (0, 1), (-2, -1))

    samples = bootstrap(len(results.subjects), measure)
    for n, (fidelity, values) in enumerate(zip(fidelities, measure(slice(None)))):
        print_equal_fidelity(results, family, fidelity, costs, values, samples[:, n])


def print_equal_fidelity(
    results: Results, family: str, fidelity: float, costs: list[str], values: np.ndarray, samples: np.ndarray
) -> None:
    """The table of one fidelity, by what `print_equal_fidelities` measures: `values`, and those of each resample."""
    ours, rivals = results.compared(family)
    methods, count = ours + rivals, len(results.subjects)
    reached = np.isfinite(values).all(1)
    if not reached[: len(ours)].any() and not reached[-1]:
        return
    below = (values[:, -1] > 0) | (samples[..., -1].mean(0) > tail(count))
    with np.errstate(invalid="ignore", divide="ignore"):  # neither reaches this fidelity
        shares, resampled = 100 * values[0] / values, 100 * samples[:, :1] / samples
    shares[~reached] = np.nan
    shown = [costs.index(name) for name in SHARES if name in costs]
    rows = []
    for k, method in enumerate([*methods, "the best rival"] if rivals else methods):
        cells = [
            "≤ " * bool(below[k] and reached[k]) + show(values[k, c], limits, digits=DIGITS.get(cost, 1))
            for c, (cost, limits) in enumerate(zip(costs, interval(samples[:, k], count).T))
        ]
        for c in shown if k >= len(ours) else ():
            mark = ("", "≤ ", "≥ ", "~ ")[below[0] + 2 * below[k]]
            cell = show(shares[k, c], interval(resampled[:, k, c], count), digits=0)
            cells.append(cell if cell == "–" else mark + cell)
        rows.append([method, *cells, *[""] * (len(costs) + len(shown) - len(cells))])
    names = [f"{ours[0]}: % of its {HEADS[costs[c]]}" for c in shown] if rivals else []
    print_table(f"{family}: costs at a fidelity of {fidelity:.0%}", ["", *(HEADS[c] for c in costs), *names], rows)


def print_same_settings(results: Results) -> None:
    """Claims 1 and 6: the penalty against none with all else equal, as in the paper's Table 1; minus: it hurts."""

    columns = ("fidelity", "alignment", *OBEYED)

    def key(setting):
        flags = [flag for flag in setting["flags"] if not flag.startswith(("--lipschitz_", "--drift_"))]
        return json.dumps([sorted(flags), setting["stop"], setting["share"]])

    plain, rows = {}, []
    for _, rivals in results.families().values():
        for curve in (results.curves[method] for method in rivals):
            plain |= {key(s): curve.values[i] for i, s in enumerate(curve.settings) if s["weight"] == 0}
    for method in results.penalized():
        curve = results.curves[method]
        for setting, values in zip(curve.settings, curve.values):
            if key(setting) not in plain:
                continue
            gains = values - plain[key(setting)]
            limits = interval(bootstrap(len(gains), lambda subjects: gains[subjects].mean(-2)), len(gains))
            what = f"{method}, {setting['schedule']} rate {setting['rate']:g}, {setting['stop']} steps"
            cells = [show(gains[:, k].mean(), limits[:, k], 100) for k in map(MEASURES.index, columns)]
            rows.append([what, f"{setting['weight']:g}", *cells])
    title = (
        "Claim 1: gain over no penalty with all else equal, in points of a hundred (alignment: the mean of the rest)"
    )
    print_table(title, ["", "weight", *columns], rows)


def weight_series(results: Results) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By name, of each penalty at one rate, schedule and stop: the weights, rising, and their values as in `Curve`."""
    series = {}
    for method in results.penalized():
        for setting, values in zip(results.curves[method].settings, results.curves[method].values):
            if "--lipschitz_mode=projected" not in setting["flags"]:  # has a radius
                name = f"{method}, {setting['schedule']} rate {setting['rate']:g}, {setting['stop']} steps"
                series.setdefault(name, {})[setting["weight"]] = values
    return {
        name: (np.array(sorted(found)), np.array([found[weight] for weight in sorted(found)]))
        for name, found in series.items()
        if len(found) > 1
    }


def print_monotone(results: Results) -> None:
    """Claim 3: does drift fall with the weight, and do predictions move in proportion to parameters?"""
    rows = []
    for name, (weights, values) in weight_series(results).items():
        cells = [name, ", ".join(f"{weight:g}" for weight in weights)]
        for measure in ("parameter drift", "prediction drift"):
            drift = values[:, :, MEASURES.index(measure)]
            answer = "yes" if (np.diff(drift.mean(1)) < 0).all() else "no"
            cells.append(f"{answer}; {(np.diff(drift, axis=0) < 0).mean():.0%}")
        rows.append(cells)
    head = ["falls at every step of the weight; share of the steps of single subjects", "weights"]
    print_table("Claim 3: drift against the weight", [*head, "parameters", "predictions"], rows)
    rows = []
    for method, curve in results.curves.items():
        drifts = [curve.of(measure).T for measure in ("parameter drift", "prediction drift")]  # (subjects, settings)

        def fit(subjects):
            return proportional_fit(*(drift[subjects].reshape(*subjects.shape[:-1], -1) for drift in drifts))

        if len(curve.settings) > 1:
            limits = interval(bootstrap(len(results.subjects), fit), len(results.subjects)).T
            cells = map(show, fit(np.arange(len(results.subjects))), limits, (100, 100, 1), (2, 1, 2))
            rows.append([method, str(len(curve.settings)), *cells])
    head = ["", "settings", "prediction drift, %, per unit of parameter drift", "RMS error, % of the RMS"]
    title = "Claim 3: predictions in proportion to parameters, and the power that fits best (1: in proportion)"
    print_table(title, [*head, "power"], rows)


def print_times(results: Results, family: str) -> None:
    """Claim 4: what takes prior preservation, where it learns most, to the time of settings that learn as much."""
    ours, rivals = results.families()[family]
    for rival in (name for name in rivals if "--with_prior_preservation" in results.curves[name].settings[0]["flags"]):
        fidelities, times = (results.curves[rival].of(name) for name in ("fidelity", "total seconds"))
        best, rows = fidelities.mean(1).argmax(), []
        for method in ours:
            curve = results.curves[method]
            for setting, *both in zip(curve.settings, curve.of("fidelity"), curve.of("total seconds")):
                fidelity, seconds = both
                if fidelity.mean() < fidelities[best].mean():
                    continue

                def ratio(subjects):
                    return times[best][subjects].mean(-1) / seconds[subjects].mean(-1)

                limits = interval(bootstrap(len(results.subjects), ratio), len(results.subjects))
                setup = [method, f"{setting['rate']:g}", f"{setting['weight']:g}", str(setting["stop"])]
                cells = [f"{100 * fidelity.mean():.1f}", f"{seconds.mean():.0f}", show(ratio(slice(None)), limits)]
                rows.append([*setup, *cells])
        title = f"Claim 4: {family}, how many times as long as these {rival} takes, class images included"
        title += f", with a fidelity of {fidelities[best].mean():.1%} in {times[best].mean():.0f} s"
        print_table(title, ["", "rate", "weight", "steps", "fidelity, %", "seconds", "times as long"], rows)


def print_subjects(results: Results, family: str) -> None:
    """Claim 6: each subject alone, at nine tenths of what its best rival reaches: where does it hurt?"""
    ours, rivals = results.compared(family)
    rows = []
    for i, subject in enumerate(results.subjects if rivals else []):
        fidelity = 0.9 * max(results.curves[method].of("fidelity")[:, i].max() for method in rivals)
        costs = {m: cost_at(np.array([fidelity]), results.segments(m, "drift", [i]))[0] for m in ours + rivals}
        best = min(rivals, key=costs.get)
        hurts = {m: " (hurts)" * bool(costs[m] > costs[best]) for m in ours}
        cells = ["–" if np.isinf(costs[m]) else f"{costs[m]:.1f}{hurts[m]}" for m in ours]
        rows.append([subject, f"{fidelity:.0%}", f"{best}: {costs[best]:.1f}", *cells])
    title = f"Claim 6: {family}, {COSTS['drift']}, at nine tenths of the best rival's fidelity"
    print_table(title, ["subject", "fidelity", "best rival", *ours], rows)


# Figures


def name_in_family(method: str) -> str:
    """A method's name where it is clear whether all weights, a LoRA or a Custom Diffusion trains."""
    for family in ("LoRA", "Custom Diffusion", "DreamBooth"):
        if method == family:
            return "plain"
        method = method.removeprefix(f"{family}, ")
    return {"penalty": "the paper's penalty", "layers and predictions": "layers and predictions, ours"}.get(
        method, method
    )


def draw_tradeoff(results: Results, costs: tuple[str, ...], path: Path) -> None:
    """What fidelity costs (the paper's Figure 4): a column for full, LoRA, Custom Diffusion, a row for each cost."""
    families = results.families()
    names = dict.fromkeys(name_in_family(m) for ours, rivals in families.values() for m in ours + rivals)
    colours = {name: f"C{index % 10}" for index, name in enumerate(names)}
    size = (6 * len(families), 4.6 * len(costs))
    figure, axes = plt.subplots(len(costs), len(families), figsize=size, squeeze=False)
    handles = {}
    for column, (family, (ours, rivals)) in zip(axes.T, families.items()):
        ease = results.ease(family)
        for axis, cost in zip(column, costs):
            for method in ours + rivals:
                points, name = results.segments(method, cost), name_in_family(method)
                grid = np.linspace(points[:, :, 0].min(), points[:, :, 0].max(), 60)

                def curve(subjects):
                    asked = grid + ease[subjects].mean(-1)[..., None]
                    least = cost_at(asked, results.segments(method, cost, subjects))
                    return np.where(np.isinf(least), np.nan, least)

                samples = bootstrap(len(results.subjects), curve, 1000)
                # What prompts ask for and is missing, drawn as what is not missing.
                least, limits, dots = (
                    1 - values if cost == "disobeyed" else values
                    for values in (curve(slice(None)), interval(samples, len(ease)), points[..., 1])
                )
                line = {"color": colours[name], "linestyle": "-", "linewidth": 3}
                line |= {} if method in ours else {"linestyle": "--", "linewidth": 1.5}
                axis.fill_between(grid, *limits, alpha=0.08, linewidth=0, color=colours[name])
                axis.plot(grid, least, **line)
                axis.plot(points[..., 0].ravel(), dots.ravel(), "o", markersize=5, color=colours[name])
                (handles[name],) = axis.plot([], [], marker="o", markersize=5, **line)
            axis.set_xlabel("subject fidelity")
            axis.set_ylabel("share of what prompts ask for that is drawn" if cost == "disobeyed" else COSTS[cost])
            axis.grid(alpha=0.25)
            if cost != "disobeyed":
                axis.set_ylim(bottom=0)
        column[0].set_title({"full": "full fine-tuning", "lora": "LoRA"}.get(family, "Custom Diffusion"))
    figure.legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def draw_drift(results: Results, path: Path) -> None:
    """Drift of parameters and predictions against the weight, and one against the other (the paper's Figure 2)."""
    figure, axes = plt.subplots(1, 3, figsize=(18, 7))
    for index, (name, (weights, values)) in enumerate(weight_series(results).items()):
        for axis, measure in zip(axes, ("parameter drift", "prediction drift")):
            drift = values[:, :, MEASURES.index(measure)]
            limits = interval(bootstrap(len(drift.T), lambda subjects: drift.T[subjects].mean(-2)), len(drift.T))
            axis.fill_between(weights, *limits, color=f"C{index}", alpha=0.15, linewidth=0)
            axis.semilogx(weights, drift.mean(1), "o-", color=f"C{index}", label=name)
            axis.set_xlabel("weight of the penalty")
            axis.set_ylabel(COSTS[measure])
    for index, (method, curve) in enumerate(results.curves.items()):
        x, y = (curve.of(name).mean(1) for name in ("parameter drift", "prediction drift"))
        axes[2].plot(x, y, "o^sDvPX*"[index // 10], color=f"C{index % 10}", alpha=0.7, label=method)
    axes[2].set_xlabel(COSTS["parameter drift"])
    axes[2].set_ylabel(COSTS["prediction drift"])
    axes[2].set_xlim(left=0)  # in proportion: on one line through the origin
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
    # Beside the curves; the first two have the same.
    axes[0].legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.12))
    axes[2].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Figures and claims from the results of tradeoff.py.")
    parser.add_argument("results", nargs="+", type=Path, help="JSONL files of tradeoff.py.")
    parser.add_argument("--seeds", nargs="+", type=int, help="All.")
    parser.add_argument("--fidelities", nargs="+", type=float, default=FIDELITIES, help="To compare at, 0 to 1.")
    parser.add_argument("--output_dir", type=Path, default=Path("tradeoff"), help="Folder of the figures.")
    args = parser.parse_args()
    for path in args.results:
        if not path.is_file():
            parser.error(f"there are no results in {path}: let tradeoff.py run first")
    results, incomplete = read_results(args.results, args.seeds)
    counted = f"Subjects: {', '.join(results.subjects)}; seeds: {', '.join(map(str, results.seeds))}"
    print(f"{counted}. Settings not measured on all of them, and left out: {incomplete}.")
    print_settings(results)
    print_same_settings(results)
    for family in results.families():
        print_equal_fidelities(results, family, args.fidelities)
    print_monotone(results)
    for family in results.families():
        print_times(results, family)
    for family in results.families():
        print_subjects(results, family)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    draw_tradeoff(results, ("drift",), args.output_dir / "tradeoff.png")
    draw_tradeoff(results, ("prediction drift", "disobeyed"), args.output_dir / "tradeoff_more.png")
    draw_drift(results, args.output_dir / "drift.png")


if __name__ == "__main__":
    main()
