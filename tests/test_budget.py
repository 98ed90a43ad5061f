# A budget of drift: the share that meets it, the repair in closed form, and the command for finished models.
import math
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lipschitz_reg import Moment, draw_held_out, record_pipeline
from lipschitz_reg.budget import fit_share, main
from lipschitz_reg.repair import _RIDGE, Repair, repaired, weight


OPTIONS = {"num_inference_steps": 2, "rank": 4}
FLAGS = [f"--{name}={value}" for name, value in OPTIONS.items()]
LORA = "pytorch_lora_weights.safetensors"


class Measure:
    """A drift of the share, and the shares that were measured."""

    def __init__(self, drift):
        self.drift, self.shares = drift, []

    def __call__(self, share):
        self.shares.append(share)
        return self.drift(share)


@pytest.mark.parametrize(
    "drift, most",
    [
        (lambda share: 0.3 * share, 2),
        (lambda share: 0.3 * share + 0.1 * share**2, 5),
        (lambda share: 0.4 * share**2, 7),
        (lambda share: math.hypot(0.3 * share, 0.03), 8),
        (lambda share: share / (share + 0.01), 9),
        (lambda share: share**6, 12),
    ],
)
def test_a_share_meets_the_budget_in_few_measurements(drift, most):
    measure = Measure(drift)
    share, reached = fit_share(measure, 0.05)
    assert 0.0495 <= reached <= 0.05
    assert reached == drift(share) and measure.shares[-1] == share
    assert len(measure.shares) <= most


def test_what_is_within_the_budget_stays_whole():
    measure = Measure(lambda share: 0.05 * share)
    assert fit_share(measure, 0.05) == (1.0, 0.05)
    assert measure.shares == [1.0]


def test_where_rounding_makes_steps_the_largest_share_below_is_taken():
    measure = Measure(lambda share: 0.2 if share > 0.31 else 0.01 * share)
    share, drift = fit_share(measure, 0.05)
    assert share == pytest.approx(0.31, abs=0.01) and drift == 0.01 * share
    assert measure.shares[-1] == share


@pytest.mark.parametrize("budget", [0.0, -0.1, math.nan, math.inf])
def test_a_budget_that_is_no_number_above_0_is_refused_before_a_measurement(budget):
    measure = Measure(lambda share: share)
    with pytest.raises(ValueError, match="A budget must be a finite number above 0, not"):
        fit_share(measure, budget)
    assert not measure.shares


def test_a_budget_below_what_rounding_gives_is_refused():
    with pytest.raises(ValueError, match="A budget of 0.02 is below what rounding gives, a drift of 0.03"):
        fit_share(lambda share: math.hypot(0.3 * share, 0.03), 0.02)


def test_a_model_that_gives_nan_is_refused():
    with pytest.raises(ValueError, match="The drift is nan"):
        fit_share(lambda share: math.nan, 0.05)


def moment(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return Moment(torch.randn(n, 3, generator=generator), torch.rand((), generator=generator) + 0.1)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_the_repair_is_the_written_formula(share):
    subject, base = moment(12, 0), moment(12, 1)
    displacement = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    dense = [m.root.double() @ m.root.double().T + m.rest.double() * torch.eye(12).double() for m in (subject, base)]
    ridge = _RIDGE * dense[0].trace() / 12 * torch.eye(12).double()
    w = weight(share)
    expected = displacement.flatten(1) @ (dense[0] + ridge) @ torch.linalg.inv(dense[0] + ridge + w * dense[1])
    result = repaired(displacement, subject, base, share)
    torch.testing.assert_close(result.flatten(1), expected, rtol=1e-9, atol=1e-12)


def test_the_repair_goes_from_nothing_to_all_and_shares_what_has_no_directions():
    displacement, subject, base = torch.randn(5, 12), moment(12, 0), moment(12, 1)
    assert torch.equal(repaired(displacement, subject, base, 1.0), displacement)
    assert not repaired(displacement, subject, base, 0.0).any()
    alike = Moment(torch.zeros(1, 0), torch.ones(()))
    repair = Repair({"bias": alike, "lost": subject}, {"bias": alike})
    for name in ("bias", "lost"):
        assert torch.equal(repair(name, displacement, 0.25), 0.1 * displacement)  # w is 9


def load(folder):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)


def disturb(model, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * parameter.std().nan_to_num(1.0) * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat\na dog\na house\na bird\n")
    return path


@pytest.fixture(scope="module")
def recording_file(tiny_sd, tmp_path_factory):
    path = tmp_path_factory.mktemp("recording") / "base.safetensors"
    pipeline = load(tiny_sd)
    record_pipeline(pipeline, ["a cat", "a dog", "a house"], ["a bird"], progress=False, **OPTIONS).save(path)
    return path


@pytest.fixture(scope="module")
def personalized(tiny_sd, tmp_path_factory):
    """Folder of a pipeline whose U-Net was trained, stored in float16, with what training leaves behind."""
    folder = tmp_path_factory.mktemp("models") / "full"
    shutil.copytree(tiny_sd, folder)
    unet = load(tiny_sd).unet
    disturb(unet, 0.1)
    unet.half().save_pretrained(folder / "unet")
    folder.joinpath("checkpoint-10").mkdir()
    return folder


@pytest.fixture(scope="module")
def lora(tiny_sd, tmp_path_factory):
    """Folder of a LoRA of the U-Net and the text encoder, with the keys of peft and its configuration."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    folder = tmp_path_factory.mktemp("models") / "lora"
    pipeline = load(tiny_sd)
    layers, generator = {}, torch.Generator().manual_seed(0)
    for name, targets in {"unet": ["to_q", "to_v", "conv1"], "text_encoder": ["q_proj"]}.items():
        model = getattr(pipeline, name)
        model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets))
        state = get_peft_model_state_dict(model)
        layers[name] = {key: 0.3 * torch.randn(t.shape, generator=generator) for key, t in state.items()}
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=pipeline.text_encoder.peft_config["default"].to_dict(),
    )
    return folder


def renamed(tensors, kind):
    """The tensors with the older keys of diffusers, or those of the U-Net as kohya's trainers write them."""
    if kind == "diffusers":
        pairs = [(f"{part}.lora_{a}", new) for a, b in (("A", "down"), ("B", "up")) for part, new in (
            ("q_proj", f"q_proj.lora_linear_layer.{b}"), ("to_q", f"to_q.lora.{b}"),
            ("to_v", f"to_v.lora.{b}"), ("conv1", f"conv1.lora.{b}"),
        )]  # fmt: skip
        return {next(key.replace(old, new) for old, new in pairs if old in key): t for key, t in tensors.items()}
    result = {}
    for key, tensor in tensors.items():
        if key.startswith("unet."):
            layer, factor = key.removeprefix("unet.").removesuffix(".weight").rsplit(".", 1)
            layer = "lora_unet_" + layer.replace(".", "_")
            result[f"{layer}.{'lora_down' if factor == 'lora_A' else 'lora_up'}.weight"] = tensor
            result[f"{layer}.alpha"] = torch.tensor(4.0)
    return result


def drift_of(pipeline, tiny_sd, prompts=("a bird",)):
    """Of a finished pipeline, by a recording of its own: with its text encoder, on other noise."""
    recording = record_pipeline(load(tiny_sd), None, list(prompts), seed=3, progress=False, **OPTIONS)
    recording.attach(pipeline.unet)
    return recording.drift(run=lambda: draw_held_out(pipeline, recording)).dial


def share_in(line):
    return float(line.split("share ")[1].split(",")[0])


def test_the_command_brings_a_full_model_to_its_budget(tiny_sd, personalized, prompts, tmp_path):
    folder = tmp_path / "result"
    command = [sys.executable, "-m", "lipschitz_reg.budget", tiny_sd, personalized, "--budget=0.05"]
    command += [f"--prompts={prompts}", f"--output={folder}", *FLAGS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{folder}: drift ") and done.stdout.count("\n") == 1
    assert 0.0495 <= float(done.stdout.rsplit("drift ", 1)[1]) <= 0.05
    before, after, result = (load_weights(path) for path in (tiny_sd, personalized, folder))
    for name, tensor in result.items():
        expected = before[name] + share_in(done.stdout) * (after[name].float() - before[name])
        assert tensor.dtype == torch.float16
        torch.testing.assert_close(tensor.float(), expected, rtol=2e-3, atol=1e-4)
    assert {path.name for path in folder.iterdir()} == {path.name for path in tiny_sd.iterdir()}
    assert same_files(folder, personalized, "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json")
    assert 0.03 < drift_of(load(folder), tiny_sd) < 0.08
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def load_weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def same_files(a, b, *names):
    files = [file for name in names for file in [b / name, *b.joinpath(name).rglob("*")] if file.is_file()]
    return all(a.joinpath(file.relative_to(b)).read_bytes() == file.read_bytes() for file in files)


def test_a_text_encoder_that_trained_counts_and_moves_with_the_denoiser(
    tiny_sd, personalized, recording_file, tmp_path, capsys
):
    model, folder = tmp_path / "model", tmp_path / "result"
    shutil.copytree(personalized, model)
    pipeline = load(model)
    pipeline.tokenizer.add_tokens("<new1>")
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))
    disturb(pipeline.text_encoder, 0.3)
    for part in ("text_encoder", "tokenizer"):
        getattr(pipeline, part).save_pretrained(model / part)
    main([str(tiny_sd), str(model), "--budget=0.05", f"--recording={recording_file}", f"--output={folder}", *FLAGS])
    share = share_in(capsys.readouterr().out)
    result, base = load(folder), load(tiny_sd)
    rows = [p.text_encoder.get_input_embeddings().weight for p in (base, pipeline, result)]
    torch.testing.assert_close(rows[2][:-1], rows[0] + share * (rows[1][:-1] - rows[0]), rtol=1e-3, atol=1e-4)
    assert torch.equal(rows[2][-1], rows[1][-1])  # of the new token
    assert 0.02 < drift_of(result, tiny_sd) < 0.1


@pytest.mark.parametrize("kind", ["peft", "diffusers", "kohya"])
def test_a_lora_gets_smaller_up_factors_and_keeps_the_rest(kind, tiny_sd, lora, recording_file, tmp_path, capsys):
    source, output = lora / LORA, tmp_path / "result" / "small.safetensors"
    if kind != "peft":
        source = tmp_path / "lora.safetensors"
        save_file(renamed(load_file(lora / LORA), kind), source, metadata={"ss_network_dim": "2"})
    flags = ["--budget=0.04", f"--recording={recording_file}", f"--output={output}", *FLAGS]
    main([str(tiny_sd), str(source), *flags])
    line = capsys.readouterr().out
    before, after = load_file(source), load_file(output)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        share = share_in(line) if any(up in key for up in ("lora_B", "lora_up", ".up.")) else 1
        torch.testing.assert_close(after[key], share * tensor, rtol=1e-3, atol=0)
    with safe_open(source, "pt") as a, safe_open(output, "pt") as b:
        assert a.metadata() == b.metadata()
    pipeline = load(tiny_sd)
    pipeline.load_lora_weights(output.parent, weight_name=output.name)
    assert 0.02 < drift_of(pipeline, tiny_sd) < 0.08
    assert float(line.rsplit("drift ", 1)[1]) <= 0.04


def test_the_repair_brings_both_kinds_to_the_budget(tiny_sd, personalized, lora, recording_file, tmp_path, capsys):
    flags = ["--budget=0.05", f"--recording={recording_file}", "--subject_prompt=a sks cat", *FLAGS]
    for model in (personalized, lora):
        folder = tmp_path / model.name
        main([str(tiny_sd), str(model), f"--output={folder}", *flags])
        line = capsys.readouterr().out
        assert ", w = " in line and 0.0495 <= float(line.rsplit("drift ", 1)[1]) <= 0.05
    before, after = load_file(lora / LORA), load_file(tmp_path / "lora" / LORA)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor) == ("lora_B" in key)
    pipeline = load(tiny_sd)
    pipeline.load_lora_weights(tmp_path / "lora")
    assert 0.03 < drift_of(pipeline, tiny_sd) < 0.09
    assert 0.03 < drift_of(load(tmp_path / "full"), tiny_sd) < 0.09


@pytest.fixture
def broken(tiny_sd, tiny_sdxl, lora, tmp_path, monkeypatch):
    """Models that are none, by name, in the folder where the test runs."""
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("empty").mkdir()
    tmp_path.joinpath("text.safetensors").write_text("no weights")
    tmp_path.joinpath("sdxl").symlink_to(tiny_sdxl)
    tmp_path.joinpath("base").symlink_to(tiny_sd)
    tmp_path.joinpath("lora").symlink_to(lora)
    factors = load_file(lora / LORA)
    key = next(key for key in factors if "lora_B" in key)
    save_file({**factors, key.replace("lora_B", "lora_magnitude_vector"): torch.ones(2)}, "dora.safetensors")
    save_file({**factors, "norm.diff": torch.ones(2)}, "more.safetensors")
    save_file({"weight": torch.ones(2)}, "other.safetensors")
    save_file({f"unet.foreign{key[4:]}": tensor for key, tensor in factors.items()}, "foreign.safetensors")


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"--budget": "0"}, "argument --budget: must be a number above 0, not '0'"),
        ({"--budget": "-1"}, "argument --budget: must be a number above 0, not '-1'"),
        ({"--budget": "nan"}, "argument --budget: must be a number above 0, not 'nan'"),
        ({"--budget": "1e-12"}, "A budget of 1e-12 is below what rounding gives, a drift of "),
        ({"PERSONALIZED": "nowhere"}, "PERSONALIZED: there is no nowhere."),
        ({"PERSONALIZED": "empty"}, f"PERSONALIZED: empty has neither model_index.json nor {LORA}."),
        ({"PERSONALIZED": "base"}, "PERSONALIZED: base is not trained: its weights are those of BASE."),
        ({"PERSONALIZED": "sdxl"}, "PERSONALIZED: unet is of another architecture than in BASE: see "),
        ({"PERSONALIZED": "text.safetensors"}, "text.safetensors is not a safetensors file, or broken"),
        ({"PERSONALIZED": "other.safetensors"}, "other.safetensors is not a LoRA: it has no up factors."),
        ({"PERSONALIZED": "dora.safetensors"}, "dora.safetensors is a DoRA, which no number makes smaller: "),
        ({"PERSONALIZED": "more.safetensors"}, "more.safetensors has more than the factors of a LoRA: norm.diff."),
        ({"PERSONALIZED": "foreign.safetensors"}, "PERSONALIZED: "),
        ({"--output": "lora"}, "--output: lora is there already: name a folder that is new or empty."),
        ({"--recording": "nowhere"}, "--recording: there is no nowhere."),
        ({"--recording": "text.safetensors"}, "text.safetensors is not a recording, or broken"),
        ({"BASE": "empty"}, "BASE: empty is not a diffusers pipeline: it has no model_index.json."),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(flags, message, broken, recording_file, tmp_path, capsys):
    given = {"BASE": "base", "PERSONALIZED": "lora", "--budget": "0.05", "--output": "result"}
    given |= {"--recording": recording_file, **flags}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        main([given.pop("BASE"), given.pop("PERSONALIZED"), *(f"{flag}={value}" for flag, value in given.items())])
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert exit.value.code == 2
    assert len(errors) == 1 and message in errors[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_the_drift_of_bad_models_is_reported_as_such(tiny_sd, personalized, recording_file, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(personalized, model)
    weights = load_weights(model)
    next(iter(weights.values())).fill_(math.nan)
    save_file(weights, model / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(SystemExit):
        main(
            [str(tiny_sd), str(model), "--budget=0.05", f"--recording={recording_file}", f"--output={tmp_path / 'o'}"]
        )
    assert "The drift is nan: the model gives NaN or infinity." in capsys.readouterr().err
    assert not tmp_path.joinpath("o").exists()
