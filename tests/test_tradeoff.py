# What benchmarks/tradeoff.py and plot_tradeoff.py promise: every result once, however often a run is stopped or
# shared out, and figures that follow from the results. How well any method does is not asked here.
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_quickly
from PIL import Image
from safetensors.torch import load_file


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import paper_table  # noqa: E402
import plot_tradeoff  # noqa: E402
import rivals  # noqa: E402
import tradeoff  # noqa: E402
from examine import other_things  # noqa: E402
from world import caption_of  # noqa: E402

from lipschitz_reg import record  # noqa: E402


pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.xdist_group("tradeoff")]

# Arithmetic


def line(points):
    return np.stack([points[:-1], points[1:]], axis=1)


def test_cost_at_a_fidelity_is_exact_where_the_curve_is_straight():
    fidelities = np.array([0.1, 0.5, 0.3, 0.9])
    points = np.stack([fidelities, 2 + 3 * fidelities], axis=1)
    asked = np.array([0.1, 0.2, 0.85, 0.9])
    assert plot_tradeoff.cost_at(asked, line(points)) == pytest.approx(2 + 3 * asked)


def test_cost_of_a_fidelity_is_that_of_more_fidelity_if_that_is_cheaper():
    points = np.array([[0.2, 5.0], [0.6, 3.0], [0.8, 7.0]])
    assert plot_tradeoff.cost_at(np.array([0.1, 0.4, 0.6, 0.7]), line(points)) == pytest.approx([3, 3, 3, 5])


def test_cost_of_a_fidelity_that_a_method_does_not_reach_is_infinite():
    points = np.array([[0.2, 1.0], [0.6, 5.0]])
    assert plot_tradeoff.cost_at(np.array([0.1, 0.61]), line(points)).tolist() == [1, np.inf]


def test_more_settings_never_raise_the_cost():
    rng = np.random.default_rng(0)
    first, second = line(rng.random((6, 2))), line(rng.random((6, 2)))
    fidelities = np.linspace(0, 1, 21)
    both = plot_tradeoff.cost_at(fidelities, np.concatenate([first, second]))
    assert (both == np.minimum(*(plot_tradeoff.cost_at(fidelities, lines) for lines in (first, second)))).all()


def test_neighbours_differ_in_one_thing_and_have_none_between_them():
    names = ("rate", "weight", "schedule", "stop", "share")
    rows = [(1, 10, "linear", 250, 1), (1, 1000, "linear", 250, 1), (1, 100, "linear", 250, 1)]
    rows += [(2, 100, "linear", 250, 1), (2, 100, "linear", 60, 1), (2, 100, "constant", 60, 1)]
    pairs = plot_tradeoff.find_neighbours([dict(zip(names, row)) for row in rows]).tolist()
    assert sorted(pairs) == sorted([[i, i] for i in range(6)] + [[0, 2], [2, 1], [2, 3], [4, 3]])


def test_bootstrap_of_a_mean_has_its_standard_error():
    values = np.random.default_rng(1).exponential(size=30)
    means = plot_tradeoff.bootstrap(30, lambda chosen: values[chosen].mean(-1), resamples=20_000)
    # The variance of the mean of n draws from n values is their variance over n.
    assert means.std() == pytest.approx(values.std() / np.sqrt(30), rel=0.02)
    assert means.mean() == pytest.approx(values.mean(), rel=0.01)


def test_interval_is_wider_than_the_middle_95_percent_for_few_subjects():
    # Student's t: P(|t| < 2.3646) = 95% with seven degrees of freedom, and P(z < -2.3646 sqrt(8 / 7)) = 0.574%.
    assert plot_tradeoff.tail(8) == pytest.approx(0.00574, rel=0.01)
    assert plot_tradeoff.tail(10**6) == pytest.approx(0.025, rel=1e-4)
    shuffled = np.random.default_rng(0).permutation(np.arange(1, 1001.0))
    assert plot_tradeoff.interval(shuffled, 8).tolist() == [6, 995]
    # Of means of eight normal numbers, 95% of the intervals hold the true mean.
    values = np.random.default_rng(1).normal(size=(1000, 8))
    held = [
        low <= 0 <= high
        for row in values
        for low, high in [plot_tradeoff.interval(plot_tradeoff.bootstrap(8, lambda drawn: row[drawn].mean(-1)), 8)]
    ]
    assert 0.93 < np.mean(held) < 0.97


def test_interval_leaves_out_what_says_nothing_and_counts_what_is_infinite():
    column = np.concatenate([np.arange(1, 997.0), np.full(4, np.inf), np.full(500, np.nan)])
    assert plot_tradeoff.interval(column, 8).tolist() == [6, 995]
    column[:996] = np.where(column[:996] > 990, np.inf, column[:996])
    assert plot_tradeoff.interval(column, 8).tolist() == [6, np.inf]


def test_fit_in_proportion_is_least_squares_through_the_origin():
    x = np.array([1.0, 2.0, 3.0])
    assert plot_tradeoff.proportional_fit(x, 4 * x) == pytest.approx([4, 0, 1])
    assert plot_tradeoff.proportional_fit(x, 4 * x**2)[2] == pytest.approx(2)
    noise = np.array([3.0, 0.0, -1.0])  # orthogonal to x
    slope, left, _ = plot_tradeoff.proportional_fit(x, 4 * x + noise)
    assert slope == pytest.approx(4)
    assert left == pytest.approx(np.sqrt(10 / (16 * 14 + 10)))


def test_selective_decay_undoes_growth_that_the_gradient_is_against():
    """SGD with momentum first moves a number from 0 to 1, and then on, whatever the gradient says."""
    ends = {}
    for name, second, strength in [("for", -0.5, 1.0), ("against", 0.5, 1.0), ("half", 0.5, 0.5)]:
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.9)
        rivals.SelectiveDecay(optimizer, strength)
        for gradient in (-1.0, second):
            parameter.grad = torch.tensor([gradient])
            optimizer.step()
        ends[name] = parameter.item()
    assert ends == pytest.approx({"for": 2.4, "against": 1.0, "half": 1.2})


def test_what_a_step_does_in_the_null_space_changes_no_output_on_the_leading_inputs():
    layer = torch.nn.Linear(6, 4)
    with record(layer) as recording:
        layer(torch.randn(50, 2) @ torch.randn(2, 6))  # inputs of two directions
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    rivals.NullSpace(optimizer, recording, 0.999)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    layer(torch.randn(5, 6)).square().sum().backward()
    optimizer.step()
    change = layer.weight.detach() - before["weight"]
    root = recording.layers["weight"].root
    assert change.norm() > 0.1 and (change @ root).norm() < 1e-4 * change.norm() * root.norm()
    assert torch.equal(layer.bias, before["bias"])


def test_eight_bits_are_within_half_a_step_of_what_they_round():
    tensor = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    error = (rivals.rounded_to_8_bits(tensor) - tensor).flatten().abs()
    assert 0 < error.max() <= tensor.abs().max() / 127 / 2 * 1.001


def test_output_preservation_adds_its_error_on_the_class_prompt():
    """At the base it is 0, elsewhere what the base and the model differ by on the same noisy latents."""
    script = tradeoff.load_script("train_dreambooth_lipschitz")
    pipeline = tradeoff.load(tradeoff.SD.base)
    plain = script.compute_loss
    script.attach_lipschitz = lambda *_: None
    rivals.class_preservation(script, 3.0, class_prompt="a photo of a mug")
    script.attach_lipschitz(None, None, pipeline)
    scheduler = script.DDPMScheduler.from_config(pipeline.scheduler.config)
    args = script.parse_args([*PATHS, "--lipschitz_weight=0"])
    embeds = script.encode_prompts(["a photo of a sks mug"], [pipeline.tokenizer], [pipeline.text_encoder])
    images, sizes = [[torch.rand(3, 64, 64)]], torch.zeros(1, 1, 6)

    def loss(compute):
        torch.manual_seed(0)
        with torch.no_grad():
            return compute(args, scheduler, pipeline.vae, pipeline.unet, embeds, images, sizes)[0]

    assert loss(script.compute_loss) == pytest.approx(loss(plain).item(), rel=1e-6)
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 0.1
    assert loss(script.compute_loss) - loss(plain) == pytest.approx(3 * 0.1**2, rel=1e-3)


# Sharing out and going on


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_are_disjoint_and_complete(count):
    items = list(range(50))
    shards = [tradeoff.shard_of(items, f"{i}/{count}") for i in range(1, count + 1)]
    assert sorted(item for shard in shards for item in shard) == items
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize(
    "flag", ["--shard=0/2", "--shard=3/2", "--shard=1", "--shard=a/b", "--others=0", "--per_scene=-1"]
)
def test_refuses_a_shard_that_is_none_and_no_pictures(flag, capsys):
    with pytest.raises(SystemExit):
        tradeoff.parse_args([flag])
    assert flag.partition("=")[0] in capsys.readouterr().err.splitlines()[-1]


def test_all_flags_of_the_grid_are_flags_of_the_script(script):
    for training in tradeoff.trainings_of(list(tradeoff.GRIDS))[1:]:
        args = script.parse_args([*training.flags, *PATHS, *(CLASS if "prior" in training.method else [])])
        assert (args.learning_rate, args.max_train_steps) == (training.rate, training.steps)


def test_nothing_that_is_measured_is_among_what_is_recorded():
    recorded = (tradeoff.TINYWORLD / "preserved_prompts.txt").read_text().splitlines()
    asked = {caption_of(*other) for count in (16, 32) for other in other_things(count)}
    asked |= set((tradeoff.TINYWORLD / "other_prompts.txt").read_text().splitlines())
    assert len(set(recorded)) == 64 and not asked & set(recorded)


PATHS = ["--pretrained_model_name_or_path=x", "--instance_data_dir=x", "--instance_prompt=x"]
CLASS = ["--class_prompt=x", "--class_data_dir=x"]


def test_what_is_in_two_parts_of_the_grid_is_measured_once():
    assert tradeoff.trainings_of(["lora", "lora"]) == tradeoff.trainings_of(["lora"])
    (both,) = [t for t in tradeoff.trainings_of(["methods", "lora"]) if t.method == "LoRA" and t.rate == 4e-3]
    assert both.shares == (0.5, 0.75)
    trainings = tradeoff.trainings_of(list(tradeoff.GRIDS))
    rows = [json.dumps([t.flags, t.weight, result]) for t in trainings for result in tradeoff.results_of(t)]
    assert len(set(rows)) == len(rows)


def test_a_line_that_was_cut_off_is_no_result_and_spoils_no_other(tmp_path):
    path = tmp_path / "results.jsonl"
    tradeoff.append_line(path, {"first": 1})
    with path.open("a") as file:
        file.write('{"second": ')
    tradeoff.append_line(path, {"third": 3})
    assert tradeoff.read_lines(path) == [{"first": 1}, {"third": 3}]


PRIOR = "--lipschitz_weight=0 --with_prior_preservation --num_class_images=1"
GRID = [
    tradeoff.Row("DreamBooth", (1e-3,), schedule="constant", steps=(2,), stops=(1,), shares=(0.5,)),
    tradeoff.Row("prior preservation", (1e-3,), flags=PRIOR, steps=(1,)),
    tradeoff.Row("LoRA", (1e-3,), (0,), tradeoff.LORA + tradeoff.PENALTY, "constant", (2,), (1,)),
    tradeoff.Row("Custom Diffusion", (1e-3,), (0,), tradeoff.CUSTOM + tradeoff.PENALTY, "constant", (2,), (1,)),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory, one_device):
    """The results when the first run was killed in the middle of the third line, and how many lines were whole."""
    folder = tmp_path_factory.mktemp("tradeoff")
    command = ["--grid=test", "--subjects=mug", "--seeds=0", "--others=2", "--per_scene=1", f"--output_dir={folder}"]
    append_line = tradeoff.append_line

    def killed(path, result):
        if len(tradeoff.read_lines(path)) == 2:
            with path.open("a") as file:
                file.write(json.dumps(result)[:50])
            raise KeyboardInterrupt
        append_line(path, result)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tradeoff.GRIDS, "test", GRID)
        patch.setattr("examine.generate", draw_quickly)
        patch.setattr(tradeoff, "ANCESTRAL_STEPS", 2)
        args = tradeoff.parse_args(command)
        patch.setattr(tradeoff, "append_line", killed)
        with pytest.raises(KeyboardInterrupt):
            tradeoff.main(args)
        before = tradeoff.read_lines(folder / "1-of-1.jsonl")
        patch.setattr(tradeoff, "append_line", append_line)
        tradeoff.main(args)
        content = folder.joinpath("1-of-1.jsonl").read_text()
        # Other shards know what this one has done.
        for shard in ("1/2", "2/2"):
            tradeoff.main(tradeoff.parse_args([*command, f"--shard={shard}"]))
    assert [path.name for path in folder.iterdir()] == ["1-of-1.jsonl"]
    assert folder.joinpath("1-of-1.jsonl").read_text() == content
    return before, tradeoff.read_lines(folder / "1-of-1.jsonl")


def test_a_killed_run_goes_on_and_measures_nothing_twice(results):
    before, after = results
    assert len(before) == 2 and after[:2] == before
    found = [(row["method"], row["stop"], row["share"]) for row in after]
    assert sorted(found) == sorted(
        [
            ("base", 0, 1.0),
            ("DreamBooth", 1, 1.0),
            ("DreamBooth", 2, 1.0),
            ("DreamBooth, interpolated", 2, 0.5),
            ("prior preservation", 1, 1.0),
            *((method, stop, 1.0) for method in ("LoRA", "Custom Diffusion") for stop in (1, 2)),
        ]
    )


def test_the_base_has_drifted_nowhere_and_took_no_time(results):
    (base,) = [row for row in results[1] if row["method"] == "base"]
    names = ("drift", "prediction drift", "parameter drift", "seconds", "class seconds")
    assert [base[name] for name in names] == [0] * 5


def test_half_of_the_way_is_half_of_the_parameter_drift(results):
    half, whole = (
        next(row for row in results[1] if "DreamBooth" in row["method"] and (row["stop"], row["share"]) == (2, a))
        for a in (0.5, 1.0)
    )
    assert half["parameter drift"] == pytest.approx(whole["parameter drift"] / 2, rel=1e-4)
    assert 0 < half["prediction drift"] < whole["prediction drift"]


@pytest.mark.parametrize("method", ["DreamBooth", "LoRA", "Custom Diffusion"])
def test_an_early_stop_takes_its_part_of_the_time_and_class_images_their_own(results, method):
    first, second = (next(row for row in results[1] if row["method"] == method and row["stop"] == n) for n in (1, 2))
    (prior,) = [row for row in results[1] if row["method"] == "prior preservation"]
    assert 0 < first["parameter drift"] < second["parameter drift"]
    assert first["seconds"] > 0
    if method != "DreamBooth":  # whose run was killed, and whose second line is of a second training
        assert first["seconds"] == pytest.approx(second["seconds"] / 2)
    assert second["class seconds"] == 0 and prior["class seconds"] > 0


def test_trains_the_weights_that_a_launch_of_the_script_trains(tmp_path):
    training = tradeoff.trainings_of(["penalty"])[1]
    training = training._replace(flags=[*training.flags, "--max_train_steps=1"])
    tradeoff.train(tradeoff.SD, training, "mug", 3, tmp_path / "here")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", BENCHMARKS.parent / "train_dreambooth_lipschitz.py"]
    command += [*training.flags, f"--pretrained_model_name_or_path={tradeoff.SD.base}", "--seed=3"]
    command += [f"--instance_data_dir={tradeoff.TINYWORLD / 'subjects' / 'mug'}"]
    command += ["--instance_prompt=a photo of a sks mug", f"--output_dir={tmp_path / 'launched'}"]
    launched = subprocess.run(list(map(str, command)), text=True, capture_output=True)
    assert launched.returncode == 0, launched.stderr
    file = Path("unet", "diffusion_pytorch_model.safetensors")
    here, there = (load_file(tmp_path / name / file) for name in ("here", "launched"))
    assert all(torch.equal(here[name], there[name]) for name in there) and here.keys() == there.keys()


@pytest.mark.parametrize(
    ("part", "pattern"), [("lora", r"attn\d\.to_(q|k|v|out\.0)\.weight"), ("custom", r"attn2\.to_[kv]\.weight")]
)
def test_what_goes_onto_the_base_is_measured_in_place(part, pattern, tmp_path):
    training = tradeoff.trainings_of([part])[1]
    training = training._replace(flags=[*training.flags, "--max_train_steps=1"])
    tradeoff.train(tradeoff.SD, training, "mug", 0, tmp_path)
    base = tradeoff.load(tradeoff.SD.base).unet.state_dict()
    unet = tradeoff.trained_unet(tradeoff.SD, training, tmp_path)
    assert unet.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], unet[name])}
    assert changed == {name for name in base if re.search(pattern, name)}


def test_draws_one_picture_of_all_trainings_of_a_subject(tmp_path, monkeypatch):
    monkeypatch.setitem(tradeoff.GRIDS, "test", [tradeoff.Row("penalty", (1e-3,), (1,), steps=(1, 2))])
    monkeypatch.setattr("demo.generate", draw_quickly)
    command = ["--draw", "--grid=test", "--subjects=mug", "--seeds=0", f"--output_dir={tmp_path}"]
    tradeoff.main(tradeoff.parse_args(command))
    assert [path.name for path in tmp_path.iterdir()] == ["mug-0.png"]
    width, height = Image.open(tmp_path / "mug-0.png").size
    # Photos, base and two trainings; seven columns.
    assert height == pytest.approx(width * 4 * 1.75 / (7 * 1.6), rel=0.01)


def test_draws_nothing_that_is_no_whole_pipeline(capsys):
    with pytest.raises(SystemExit):
        tradeoff.parse_args(["--draw", "--grid", "lora"])
    assert "--draw is for full fine-tuning" in capsys.readouterr().err


# Figures and claims


def synthetic_results(path):
    """
    DreamBooth's drift is 20 times its fidelity, the penalty's half of that; predictions drift by a tenth of it. Prior
    preservation takes three times as long.
    """
    rng = np.random.default_rng(0)
    for subject in ("mug", "star", "boat"):
        for seed in (0, 1):
            methods = [("base", 0.0, 0.0), *(("DreamBooth", rate, 0) for rate in (1e-4, 2e-4, 4e-4))]
            methods += [("penalty", 4e-4, weight) for weight in (1, 2, 4)] + [("prior preservation", 1e-4, 0)]
            for method, rate, weight in methods:
                fidelity = {"base": 0.0, "penalty": 0.9 / max(weight, 1)}.get(method, 2000 * rate)
                fidelity *= rng.uniform(0.9, 1.1)
                drift = fidelity * (10 if weight else 20)
                row = {"subject": subject, "seed": seed, "method": method, "rate": rate, "weight": weight}
                prior = method == "prior preservation"
                flags = [f"--learning_rate={rate}", f"--lipschitz_weight={weight}"]
                row |= {"flags": flags + ["--with_prior_preservation"] * prior, "settings": {}}
                row |= {"schedule": "linear", "steps": 250, "stop": 250, "share": 1.0, "fidelity": fidelity}
                row |= {"drift": drift, "prediction drift": drift / 50, "parameter drift": drift / 5}
                row |= {"seconds": 60.0, "class seconds": 120.0 * prior} | dict.fromkeys(plot_tradeoff.OBEYED, 1.0)
                tradeoff.append_line(path, row)


@pytest.fixture(scope="module")
def claims(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plot")
    synthetic_results(folder / "results.jsonl")
    command = [sys.executable, BENCHMARKS / "plot_tradeoff.py", folder / "results.jsonl", f"--output_dir={folder}"]
    result = subprocess.run([*command, "--fidelities", "0.5", "0.7"], text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in folder.glob("*.png")} == {"tradeoff.png", "tradeoff_more.png", "drift.png"}
    return result.stdout


def cells_of(claims, title, first):
    table = claims[claims.index(title) :].split("\n\n")[1]
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {first} |")]
    return line.strip("| ").split(" | ")[1:]


def test_half_of_the_drift_at_equal_fidelity_is_found(claims):
    for title in ("full: costs at a fidelity of 50%", "full: costs at a fidelity of 70%"):
        for rival in ("DreamBooth", "the best rival"):
            assert cells_of(claims, title, rival)[-2:] == ["50 [50, 50]"] * 2
        assert cells_of(claims, title, "prior preservation") == ["–"] * 4


def test_time_that_class_images_take_is_found(claims):
    title = "Claim 4: full, how many times as long as these prior preservation takes"
    rows = claims[claims.index(title) :].split("\n\n")[1].splitlines()[2:]
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert [(row[2], *row[-2:]) for row in cells] == [(weight, "60", "3.0 [3.0, 3.0]") for weight in "124"]


def test_a_bound_is_called_one(tmp_path, capsys):
    """Of a fidelity between those of the mildest DreamBooth, 0.2, and the heaviest penalty, 0.22, and of less."""
    synthetic_results(tmp_path / "results.jsonl")
    results, _ = plot_tradeoff.read_results([tmp_path / "results.jsonl"])
    marks = {"penalty": [], "DreamBooth": [], "the best rival": []}
    for fidelity in (0.1, 0.212, 0.5):
        plot_tradeoff.print_equal_fidelities(results, "full", [fidelity])
        printed = capsys.readouterr().out
        for method, found in marks.items():
            cells = cells_of(printed, "full: costs", method)
            found.append([cell[:1] if cell[:1] in "≤~≥" else "" for cell in (cells[0], *cells[2:3])])
    assert marks["penalty"] == [["≤"], ["≤"], [""]]
    assert marks["DreamBooth"] == marks["the best rival"] == [["≤", "~"], ["", "≤"], ["", ""]]


def test_drift_that_falls_with_the_weight_and_in_proportion_is_found(claims):
    falls = cells_of(claims, "Claim 3: drift against the weight", "penalty, linear rate 0.0004, 250 steps")
    assert falls == ["1, 2, 4", "yes; 100%", "yes; 100%"]
    in_proportion = ["3", "10.00 [10.00, 10.00]", "0.0 [0.0, 0.0]", "1.00 [1.00, 1.00]"]
    assert cells_of(claims, "Claim 3: predictions", "penalty") == in_proportion


def test_interpolation_ends_at_the_training_itself(tmp_path):
    path, shares = tmp_path / "results.jsonl", {1.0: 0.9, 0.5: 0.6}
    fixed = {"subject": "mug", "seed": 0, "weight": 0, "schedule": "linear", "steps": 9, "stop": 9, "settings": {}}
    fixed |= dict.fromkeys(plot_tradeoff.OBEYED, 1.0) | {"rate": 1e-3, "seconds": 1.0, "class seconds": 0.0}
    fixed |= {"prediction drift": 0.1, "parameter drift": 1.0, "flags": ["--lipschitz_weight=0"]}
    tradeoff.append_line(path, {**fixed, "method": "base", "share": 1.0, "fidelity": 0.2, "drift": 0.0})
    for share, fidelity in shares.items():
        method = "DreamBooth" if share == 1 else "DreamBooth, interpolated"
        row = {"method": method, "share": share, "fidelity": fidelity, "drift": 100 * fidelity}
        tradeoff.append_line(path, fixed | row)
    results, _ = plot_tradeoff.read_results([path])
    segments = results.segments("DreamBooth", "drift")
    assert plot_tradeoff.cost_at(np.array([0.75, 0.9]), segments) == pytest.approx([75, 90])


def test_settings_that_lack_a_subject_are_left_out(tmp_path):
    path = tmp_path / "results.jsonl"
    synthetic_results(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:-2], lines[-1]]))
    results, incomplete = plot_tradeoff.read_results([path])
    assert incomplete == 1 and [s["weight"] for s in results.curves["penalty"].settings] == [1, 2]


def test_what_the_docs_say_of_the_trade_off_follows_from_the_committed_results(tmp_path):
    docs = BENCHMARKS.parent / "docs"
    plot = [sys.executable, BENCHMARKS / "plot_tradeoff.py", f"--output_dir={tmp_path}"]
    commands = [[*plot, docs / "claims.jsonl"], [*plot, docs / "tradeoff.jsonl"]]
    commands += [[*plot, docs / "claims.jsonl", "--fidelities", "0.44", "0.7"]]
    commands += [[sys.executable, BENCHMARKS / "paper_table.py", "--print", docs / "paper_table.jsonl"]]
    said = [subprocess.run(command, text=True, capture_output=True, check=True).stdout for command in commands]
    text, demo, _ = docs.joinpath("results.md").read_text().partition("\n## The demo\n")
    assert demo
    for cell, least in ((r"-?\d[\d.]* \[[^\]]+\]", 150), (r"[\d.]+ ± \d+\.\d", 4)):
        written, measured = (re.findall(cell, part) for part in (text, "".join(said)))
        assert len(written) >= least and set(written) - set(measured) == set()
    table = said[0][said[0].index("### Claim 6: full") :].split("\n\n")[1]
    assert table.strip() in text


def test_only_the_seeds_that_were_asked_for_count(tmp_path):
    path = tmp_path / "results.jsonl"
    synthetic_results(path)
    whole, _ = plot_tradeoff.read_results([path])
    halves = [plot_tradeoff.read_results([path], [seed])[0] for seed in (0, 1)]
    assert [half.seeds for half in halves] == [[0], [1]]
    means = np.mean([half.curves["penalty"].values for half in halves], axis=0)
    assert whole.curves["penalty"].values == pytest.approx(means, nan_ok=True)


def test_results_of_another_program_are_refused_in_one_line():
    with pytest.raises(SystemExit, match="not all of these files are results of tradeoff.py"):
        plot_tradeoff.read_results([BENCHMARKS.parent / "docs" / "paper_table.jsonl"])


# The evaluation's own numbers


def test_the_table_of_the_evaluation_is_measured_once_and_is_that_of_the_evaluation(tmp_path, monkeypatch, capsys):
    assert [training[:3] for training in paper_table.chosen_trainings()] == paper_table.CHOSEN
    chosen = [
        training._replace(flags=(*training.flags, "--max_train_steps=1"))
        for training in paper_table.chosen_trainings()[:2]
    ]
    monkeypatch.setattr(paper_table, "CHOSEN", paper_table.CHOSEN[:2])
    monkeypatch.setattr(paper_table, "chosen_trainings", lambda: chosen)
    quick = ["--num_inference_steps=1", "--guidance_scale=1", "--num_images_per_prompt=2", "--batch_size=30"]
    quick += ["--probes=1", "--probe_timesteps=2"]
    monkeypatch.setattr(paper_table, "DRAWING", quick)
    args = paper_table.parse_args(["--subjects", "mug", f"--output_dir={tmp_path}"])
    paper_table.main(args)
    printed = capsys.readouterr().out
    lines = tradeoff.read_lines(tmp_path / "1-of-1.jsonl")
    assert [(line["method"], line["weight"]) for line in lines] == [("DreamBooth", 0), ("penalty", 300)]
    first, second = (line["metrics"] for line in lines)
    gain = second["drift/pixel_rms"] - first["drift/pixel_rms"]
    row = cells_of(printed, "More than DreamBooth at 0.001", "drift, pixels")
    assert row == ["0.0 [0.0, 0.0]", f"{gain:.1f} [{gain:.1f}, {gain:.1f}]"]
    dino = [first["subject/base/dino"], *(metrics["subject/personalized/dino"] for metrics in (first, second))]
    assert cells_of(printed, "Means", "DINO") == [f"{value:.3f}" for value in dino]
    by_prompt = lines[0]["prompts"]
    assert np.mean(list(by_prompt["other"].values())) == pytest.approx(first["drift/pixel_rms"])
    assert np.mean(list(by_prompt["subject"].values())) == pytest.approx(first["subject/personalized/clip_t"])
    monkeypatch.delattr(paper_table, "train")
    paper_table.main(args)
    assert capsys.readouterr().out == printed
