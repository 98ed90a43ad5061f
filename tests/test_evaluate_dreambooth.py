# What evaluate_dreambooth.py promises: its arithmetic against independent references, its command as users run it.
# Judges and weights are random here; how well the drawn world's own judges see is in test_tinyworld.py.
import base64
import csv
import html
import io
import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_script, runner
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from lipschitz_reg import Drift


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "evaluate_dreambooth.py"
DOCS = ROOT / "docs" / "evaluation.md"
BASE = ROOT / "examples" / "tinyworld" / "sd"
PHOTOS = ROOT / "examples" / "tinyworld" / "subjects" / "mug"

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.xdist_group("evaluate_dreambooth")]


@pytest.fixture(scope="session")
def script(one_device):
    return load_script(SCRIPT.name)


@pytest.fixture(scope="session")
def judges(tmp_path_factory):
    """Folders of a random CLIP and a random ViT."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("judges")
    tokenizer = AutoTokenizer.from_pretrained(BASE / "tokenizer")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    picture = {**sizes, "image_size": 32, "patch_size": 8}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**sizes, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 32}
    CLIPModel(CLIPConfig(text_config=text, vision_config=picture, projection_dim=16)).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "clip"
    )
    ViTModel(ViTConfig(**picture), add_pooling_layer=False).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    return folder


def changed_copy(base, folder, file, change):
    """A copy of a pipeline with other weights in one file."""
    shutil.copytree(base, folder)
    weights = load_file(folder / file)
    save_file(change(weights), folder / file, metadata={"format": "pt"})
    return folder


def louder_middle(weights):
    return {name: 1.5 * weight if name.startswith("mid_block") else weight for name, weight in weights.items()}


UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def personalized(tmp_path_factory):
    return changed_copy(BASE, tmp_path_factory.mktemp("personalized") / "model", UNET, louder_middle)


@pytest.fixture(scope="session")
def flags(personalized, judges, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    folder.joinpath("subject.txt").write_text("a photo of a {token} {class} in the snow\na {token} {class} at night\n")
    folder.joinpath("other.txt").write_text("a photo of a {class}\na blue fish on the beach\n")
    return [
        f"--pretrained_model_name_or_path={personalized}",
        f"--base_model_name_or_path={BASE}",
        f"--instance_data_dir={PHOTOS}",
        "--instance_token=sks",
        "--class_name=mug",
        f"--prompts_file={folder / 'subject.txt'}",
        f"--other_prompts_file={folder / 'other.txt'}",
        "--num_images_per_prompt=2",
        "--num_inference_steps=2",
        "--batch_size=3",
        "--probes=2",
        "--probe_timesteps=3",
        f"--clip_model={judges / 'clip'}",
        f"--dino_model={judges / 'vit'}",
    ]


# Where the numbers do not matter.
SMALL = ["--num_images_per_prompt=1", "--num_inference_steps=1", "--probes=1", "--probe_timesteps=2"]
ACCELERATE = ["accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
ACCELERATE += ["--dynamo_backend=no"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def launch(flags, launcher=ACCELERATE):
    command = [sys.executable, "-m", *launcher, SCRIPT, *flags]
    return subprocess.run(list(map(str, command)), text=True, capture_output=True, timeout=600)


def test_processes_that_do_not_find_each_other_do_not_write_to_one_folder(flags, tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = launch([*flags, f"--output_dir={tmp_path / 'evaluation'}"], TORCHRUN)
    assert done.returncode != 0 and "2 processes do not find each other" in done.stderr
    assert not (tmp_path / "evaluation").exists()


@pytest.fixture
def evaluate(script, flags):
    """Runs the script's `main` in this process and returns its metrics; flags given later win."""

    def call(*more):
        runner(script)(*flags, *more)
        return read_metrics(script.parse_args([*flags, *map(str, more)]).output_dir)

    return call


@pytest.fixture
def refused(evaluate, capsys):
    """Runs it with flags that it must refuse, and returns the one line that it says."""

    def call(*more):
        with pytest.raises(SystemExit) as exit:
            evaluate(*more)
        assert exit.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "evaluate_dreambooth.py: error" in line]
        assert len(lines) == 1, lines
        return lines[0]

    return call


def read_metrics(folder):
    return json.loads(Path(folder, "metrics.json").read_text())


def read_rows(folder):
    with open(Path(folder, "images.csv"), newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def evaluated(flags, tmp_path_factory):
    """Output folder and stderr of the run that most claims below are about."""
    output = tmp_path_factory.mktemp("evaluated") / "out"
    result = launch([*flags, f"--output_dir={output}", "--report_to=tensorboard"])
    assert result.returncode == 0, result.stderr
    return output, result.stderr


def numbers(metrics):
    return {name: value for name, value in metrics.items() if name != "settings"}


# The arithmetic


def samples(seed, count, width=6):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


def cmmd_by_hand(x, y):
    def kernel(a, b):
        a, b = a / math.sqrt(sum(a * a)), b / math.sqrt(sum(b * b))
        return math.exp(-sum((a - b) ** 2) / (2 * 10**2))

    def mean(a, b):
        return sum(kernel(row, other) for row in a for other in b) / (len(a) * len(b))

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def test_cmmd_is_the_mean_over_all_pairs_of_the_gaussian_kernel(script):
    x, y = samples(0, 7), samples(1, 5)
    assert script.cmmd(x, y) == pytest.approx(cmmd_by_hand(x, y), rel=1e-9)


def with_moments(mean, covariance, count, seed):
    """Samples whose mean and covariance are exactly these."""
    rows = np.random.default_rng(seed).normal(size=(count, len(mean)))
    rows -= rows.mean(0)
    whitened = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows.T))).T
    return whitened @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians_with_diagonal_covariances_is_the_closed_form(script):
    means, deviations = np.array([[0.0, 1, 2], [1, 1, -1]]), np.array([[1.0, 2, 3], [2, 2, 0.5]])
    x, y = (with_moments(m, np.diag(s**2), 40 + i, i) for i, (m, s) in enumerate(zip(means, deviations)))
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert script.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def frechet_by_torchmetrics(x, y):
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Features(torch.nn.Module):
        num_features = x.shape[1]

        def forward(self, images):
            return images.flatten(1)

    metric = fid.FrechetInceptionDistance(feature=Features(), normalize=True, input_img_size=(1, 2, x.shape[1] // 2))
    metric.set_dtype(torch.float64)
    for rows, real in ((x, True), (y, False)):
        metric.update(torch.from_numpy(rows).view(len(rows), 1, 2, -1), real=real)
    return metric.compute().item()


@pytest.mark.parametrize("counts", [(50, 40), (4, 5)], ids=["many samples", "fewer samples than dimensions"])
def test_frechet_distance_is_that_of_torchmetrics(script, counts):
    x, y = (samples(seed, count) for seed, count in enumerate(counts))
    assert script.frechet_distance(x, y) == pytest.approx(frechet_by_torchmetrics(x, y), rel=1e-4)


def test_prediction_drift_is_averaged_over_pictures_by_kind_and_timestep(script):
    measured = [
        ("other", 3, Drift(0.1, 0.2, {5.0: 0.1, 9.0: 0.3}, {}, 0.0, 1.0, 8.0)),
        ("other", 1, Drift(0.5, 0.4, {5.0: 0.5, 9.0: 0.7}, {}, 0.0, 1.0, 4.0)),
        ("subject", 2, Drift(0.3, None, {-0.5: 0.3}, {}, 0.0, 1.0)),
    ]
    curve = {5: pytest.approx(0.2), 9: pytest.approx(0.4)}
    other = {"mean": pytest.approx(0.2), "guided": pytest.approx(0.25), "by_timestep": curve, "kl_bound": 7.0}
    subject = {"mean": 0.3, "guided": None, "by_timestep": {-0.5: 0.3}}
    assert script.average_drift(measured) == {"other": other, "subject": subject}


def test_cosine_distance_is_that_of_torch(script):
    x, y = samples(0, 5), samples(1, 5)
    expected = 1 - torch.nn.functional.cosine_similarity(torch.from_numpy(x), torch.from_numpy(y))
    assert script.cosine_distance(x, y) == pytest.approx(expected.numpy(), abs=1e-12)


def test_distances_of_a_set_from_a_copy_of_it_are_exactly_zero(script):
    x = samples(0, 30, width=64)
    assert script.cmmd(x, x.copy()) == 0
    assert script.frechet_distance(x, x.copy()) == 0
    assert not script.cosine_distance(x, x.copy()).any()


def test_distances_that_need_two_are_empty_with_one(script):
    assert script.frechet_distance(samples(0, 1), samples(1, 4)) is None
    assert script.mean_of_pairs([[0], [1]], lambda i, j: 1.0) is None


def test_mean_of_pairs_weighs_groups_alike(script):
    values = [0.0, 1.0, 5.0, 5.0, 8.0]
    mean = script.mean_of_pairs([[0, 1], [2, 3, 4]], lambda i, j: abs(values[i] - values[j]))
    assert mean == pytest.approx((1 + (0 + 3 + 3) / 3) / 2)


REQUIRED = (
    "pretrained_model_name_or_path",
    "base_model_name_or_path",
    "instance_data_dir",
    "instance_token",
    "class_name",
)


def test_the_scripts_take_the_commands_of_the_documentation(script):
    training = load_script("train_dreambooth_lipschitz.py")
    blocks = "".join(re.findall(r"```bash\n(.*?)```", DOCS.read_text(), re.DOTALL)).replace("\\\n", "")
    commands = re.findall(r"(train|evaluate)_dreambooth\w*.py (.*)", blocks)
    assert [name for name, _ in commands] == ["evaluate", "train", "evaluate", "train"]
    for name, flags in commands:
        {"train": training, "evaluate": script}[name].parse_args(shlex.split(flags))


# Drift of predictions


def drift_by_hand(base, personalized, scheduler, prompts, seeds, steps, guidance):
    """
    The numbers of other prompts with nothing but diffusers: the base draws, and at each of its steps the other model
    predicts, too. The bound by the difference of the two next latents, which have the same noise in them.
    """
    plain, guided, bound = {}, [], 0.0
    for prompt, seed in zip(prompts, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        scheduler.set_timesteps(steps)
        latents = torch.randn(1, 4, *(base.unet.config.sample_size,) * 2, generator=generator)
        options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        embeds = [torch.cat(pipeline.encode_prompt(prompt, **options)[::-1]) for pipeline in (base, personalized)]
        for t in scheduler.timesteps:
            with torch.no_grad():
                theirs, ours = (
                    pipeline.unet(torch.cat([latents] * 2), t, embed).sample
                    for pipeline, embed in zip((base, personalized), embeds, strict=True)
                )
            plain.setdefault(str(int(t)), []).extend(
                (ours - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
            )
            both = [rows[:1] + guidance * (rows[1:] - rows[:1]) for rows in (theirs, ours)]
            guided.append((both[1] - both[0]).norm() / both[0].norm())
            state, after = generator.get_state(), []
            for prediction in both:
                generator.set_state(state)
                after.append(scheduler.step(prediction, t, latents, generator=generator).prev_sample)
            if t != scheduler.timesteps[-1]:
                bound += (after[1] - after[0]).square().sum() / (2 * scheduler._get_variance(t)) / len(prompts)
            latents = after[0]
    by_timestep = {t: float(np.mean(plain[t])) for t in sorted(plain, key=int)}
    mean = np.mean(list(by_timestep.values()))
    return {"mean": mean, "guided": float(np.mean(guided)), "kl_bound": float(bound)}, by_timestep


def load_by_hand(folder):
    return StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)


def test_prediction_drift_and_the_bound_are_those_of_a_direct_computation(evaluated, personalized):
    measured = read_metrics(evaluated[0])["prediction_drift"]
    base, moved = load_by_hand(BASE), load_by_hand(personalized)
    scheduler = DDPMScheduler.from_config(base.scheduler.config, clip_sample=False)
    for kind, curves in measured.items():
        rows = [row for row in read_rows(evaluated[0]) if (row["model"], row["kind"]) == ("base", kind)][::2]
        prompts, seeds = [row["prompt"] for row in rows], [int(row["seed"]) for row in rows]
        expected, by_timestep = drift_by_hand(base, moved, scheduler, prompts, seeds, 3, 7.5)
        assert curves.pop("by_timestep") == pytest.approx(by_timestep, rel=1e-3) and len(by_timestep) == 3
        if kind == "subject":
            del expected["kl_bound"]
        assert curves == pytest.approx(expected, rel=1e-3) and min(curves.values()) > 0


@pytest.fixture
def drift_of(script):
    """The numbers of two pipelines and two prompts, one of them of the subject."""

    def call(base, personalized, token="sks", **options):
        args = script.parse_args([f"--{name}=x" for name in REQUIRED])
        args.probe_timesteps, args.new_words = 2, options.pop("new_words", "")
        vars(args).update(options)
        texts = {"other": "a blue fish on the beach", "subject": f"a photo of a {token} mug"}
        images = [{"kind": kind, "text": text, "seed": 7} for kind, text in texts.items()]
        accelerator, batches = script.Accelerator(cpu=True), script.plan_probes(args, images)
        for pipeline in (base, personalized):
            pipeline.set_progress_bar_config(disable=True)
        base.scheduler = script.probe_scheduler(base)
        recordings = script.record_base(args, accelerator, base, batches)
        personalized.scheduler = options.get("scheduler") or script.probe_scheduler(personalized)
        return script.average_drift(script.measure_drift(args, accelerator, personalized, batches, recordings))

    return call


def test_a_base_has_no_prediction_drift_from_itself_and_a_changed_text_encoder_counts(drift_of):
    base, personalized = load_by_hand(BASE), load_by_hand(BASE)
    for curves in drift_of(base, personalized).values():
        assert curves.pop("by_timestep") == {499: 0, 999: 0} and not any(curves.values())
    with torch.no_grad():
        personalized.text_encoder.get_input_embeddings().weight *= 1.1
    for curves in drift_of(base, personalized).values():
        assert min(curves["mean"], curves["guided"], *curves["by_timestep"].values()) > 0


def test_the_base_predicts_without_words_that_only_custom_diffusion_knows(drift_of):
    pipeline = load_by_hand(BASE)
    drift = drift_of(pipeline, pipeline, token="<new1>", new_words="<new1>")
    assert drift["other"]["mean"] == 0 and drift["subject"]["mean"] > 0


def test_the_way_is_ancestral_whatever_sampler_the_base_has(script):
    """Unclipped, though the configuration of a PNDM does not say so: latents are not pixels."""
    base = load_by_hand(BASE)
    base.scheduler = PNDMScheduler(beta_schedule="scaled_linear", steps_offset=1)
    scheduler = script.probe_scheduler(base)
    assert isinstance(scheduler, DDPMScheduler) and scheduler.config.beta_schedule == "scaled_linear"
    assert not scheduler.config.clip_sample and scheduler.config.variance_type == "fixed_small"


def test_a_base_of_edm_keeps_its_sampler_and_has_no_bound(script, drift_of):
    base, personalized = load_by_hand(BASE), load_by_hand(BASE)
    base.scheduler, personalized.scheduler = EDMEulerScheduler(), EDMEulerScheduler()
    with torch.no_grad():
        personalized.unet.conv_out.weight *= 1.1
    drift = drift_of(base, personalized)
    assert drift["other"]["kl_bound"] is None and drift["other"]["guided"] > 0
    assert min(drift["other"]["by_timestep"]) < 0  # the noise levels of EDM are logarithms
    assert all(0 <= float(x) <= 440 for x in re.findall(r"([\d.-]+),[\d.-]+", script.timestep_chart(drift)))


def test_without_guidance_there_is_no_guided_prediction(drift_of):
    base, personalized = load_by_hand(BASE), load_by_hand(BASE)
    with torch.no_grad():
        personalized.unet.conv_out.weight *= 1.1
    drift = drift_of(base, personalized, guidance_scale=1.0)
    assert drift["other"]["guided"] is None and drift["other"]["mean"] > 0 and drift["other"]["kl_bound"] > 0


def test_a_model_on_another_way_than_its_base_is_refused(drift_of, capsys):
    base, personalized = load_by_hand(BASE), load_by_hand(BASE)
    with pytest.raises(SystemExit):
        drift_of(base, personalized, scheduler=personalized.scheduler)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.endswith("draw with the same sampler and seeds.")


@pytest.mark.parametrize("broken", ["base", "personalized"])
def test_stops_where_a_model_predicts_nan(drift_of, capsys, broken):
    models = {name: load_by_hand(BASE) for name in ("base", "personalized")}
    torch.nn.init.constant_(models[broken].unet.conv_norm_out.weight, 3e38)
    with pytest.raises(SystemExit):
        drift_of(*models.values(), precision="fp32")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert f"the {broken} model predicts NaN" in line and "fp32" in line


# Prompts


def prompts_of(script, **options):
    given = [f"--{name}=x" for name in REQUIRED[:3]] + ["--instance_token=sks", "--class_name=dog"]
    return script.build_prompts(script.parse_args([*given, *(f"--{name}={value}" for name, value in options.items())]))


@pytest.mark.parametrize("subject_type", ["object", "live"])
def test_clip_compares_with_the_prompt_without_the_special_token(script, subject_type):
    prompts = prompts_of(script, subject_type=subject_type)
    assert len(prompts["subject"]) >= 16 and len(prompts["other"]) >= 16
    assert {"text": "a photo of a sks dog", "clip_text": "a photo of a dog"} in prompts["subject"]
    for prompt in prompts["subject"]:
        assert prompt["text"].replace("sks ", "") == prompt["clip_text"]
    assert all("sks" not in prompt["text"] for prompt in prompts["other"])


DREAMBOOTH_FORMAT = """Classes

subject_name,class
backpack,backpack

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in a box'.format(unique_token, class_token),
'a {0} {1} on a shelf'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in a hat'.format(unique_token, class_token),
"a {0} {1} on the king's sofa".format(unique_token, class_token)
]
"""


def test_the_prompts_file_of_the_dreambooth_data_set_is_understood(script, tmp_path):
    file = tmp_path / "prompts_and_classes.txt"
    file.write_text(DREAMBOOTH_FORMAT)

    def texts(subject_type):
        prompts = prompts_of(script, prompts_file=file, subject_type=subject_type)
        return [prompt["text"] for prompt in prompts["subject"]]

    assert texts("object") == ["a sks dog in a box", "a sks dog on a shelf"]
    assert texts("live") == ["a sks dog in a hat", "a sks dog on the king's sofa"]


# What is written


def test_every_picture_has_a_row_and_a_file(evaluated):
    rows = read_rows(evaluated[0])
    assert len(rows) == 2 * (2 + 2) * 2
    assert len({row["file"] for row in rows}) == len(rows)
    for row in rows:
        assert Image.open(row["file"]).size == (64, 64)


def test_long_work_shows_a_bar(evaluated):
    work = [*(f"{model}: {what}" for model in ("base", "personalized") for what in ("pictures", "predictions"))]
    work += [f"{judge}: {pictures}" for judge in ("clip", "dino") for pictures in ("photos", "base", "personalized")]
    assert [bar for bar in work if not re.search(rf"{bar}: 100%\|.*\d+/\d+", evaluated[1])] == []


def test_pictures_are_those_of_the_pipeline_alone(evaluated):
    """Drawn by hand, one by one: neither the batch nor the other pictures matter, but for rounding."""
    pipeline = StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    for row in [row for row in read_rows(evaluated[0]) if row["model"] == "base"][::3]:
        generator = torch.Generator().manual_seed(int(row["seed"]))
        image = pipeline(row["prompt"], num_inference_steps=2, guidance_scale=7.5, generator=generator).images[0]
        difference = np.abs(np.asarray(image, float) - np.asarray(Image.open(row["file"]), float))
        assert difference.max() <= 1


@pytest.fixture(scope="session")
def by_hand(evaluated, judges):
    """
    Unit features of the photos and of each row of the table, with nothing but transformers: (CLIP's, ViT's) of a
    picture, CLIP's of a prompt. At last, those of the rows' pictures as they are.
    """
    rows = read_rows(evaluated[0])
    clip, vit = CLIPModel.from_pretrained(judges / "clip").eval(), ViTModel.from_pretrained(judges / "vit").eval()
    see = {name: AutoImageProcessor.from_pretrained(judges / name) for name in ("clip", "vit")}
    tokenizer = AutoTokenizer.from_pretrained(judges / "clip")

    @torch.no_grad()
    def encode(path):
        image = Image.open(path)
        seen = clip.visual_projection(clip.vision_model(**see["clip"](image, return_tensors="pt")).pooler_output)
        token = vit(**see["vit"](image, return_tensors="pt")).last_hidden_state[:, 0]
        return seen[0].double().numpy(), token[0].double().numpy()

    @torch.no_grad()
    def read(text):
        output = clip.text_model(**tokenizer(text.replace("sks ", ""), return_tensors="pt")).pooler_output
        return torch.nn.functional.normalize(clip.text_projection(output).double(), dim=1)[0].numpy()

    drawn = [row["file"] for row in rows]
    photos, pictures = ([encode(path) for path in paths] for paths in (sorted(PHOTOS.iterdir()), drawn))
    units = ([[seen / np.linalg.norm(seen) for seen in pair] for pair in pairs] for pairs in (photos, pictures))
    return rows, *units, [read(row["prompt"]) for row in rows], pictures


def rows_of(rows, model, kind):
    return [i for i, row in enumerate(rows) if (row["model"], row["kind"]) == (model, kind)]


def test_fidelity_and_alignment_are_mean_cosines_of_the_features(evaluated, by_hand):
    rows, photos, pictures, texts, _ = by_hand
    measured = read_metrics(evaluated[0])["subject"]
    for model in ("base", "personalized"):
        chosen = rows_of(rows, model, "subject")
        for name, judge in (("clip_i", 0), ("dino", 1)):
            mean = np.mean([pictures[i][judge] @ photo[judge] for i in chosen for photo in photos])
            assert measured[model][name] == pytest.approx(mean, abs=1e-5)
        alignment = np.mean([pictures[i][0] @ texts[i] for i in chosen])
        assert measured[model]["clip_t"] == pytest.approx(alignment, abs=1e-5)
    for name, judge in (("clip_i", 0), ("dino", 1)):
        among = [photos[i][judge] @ photos[j][judge] for i in range(5) for j in range(5) if i != j]
        assert measured["photos"][name] == pytest.approx(np.mean(among), abs=1e-5)
    # Pictures of the base with texts that they were not drawn from.
    chosen = rows_of(rows, "base", "subject")
    pairs = [(i, j) for i in chosen for j in chosen if rows[i]["prompt"] != rows[j]["prompt"]]
    unrelated = np.mean([pictures[i][0] @ texts[j] for i, j in pairs])
    assert measured["unrelated"]["clip_t"] == pytest.approx(unrelated, abs=1e-5)


def test_pictures_of_other_prompts_are_compared_with_their_texts_and_with_the_photos(evaluated, by_hand):
    rows, photos, pictures, texts, _ = by_hand
    for model, measured in read_metrics(evaluated[0])["other"].items():
        chosen = rows_of(rows, model, "other")
        alignment = np.mean([pictures[i][0] @ texts[i] for i in chosen])
        likeness = np.mean([pictures[i][1] @ photo[1] for i in chosen for photo in photos])
        assert measured == pytest.approx({"clip_t": alignment, "dino": likeness}, abs=1e-5)


def test_the_table_has_what_was_measured_on_each_picture(evaluated, by_hand):
    rows, photos, pictures, texts, _ = by_hand
    twin = {(row["model"], row["prompt"], row["seed"]): i for i, row in enumerate(rows)}
    for i, row in enumerate(rows):
        other = pictures[
            twin[{"base": "personalized", "personalized": "base"}[row["model"]], row["prompt"], row["seed"]]
        ]
        expected = {
            "clip_t": pictures[i][0] @ texts[i],
            "clip_i": np.mean([pictures[i][0] @ photo[0] for photo in photos]),
            "dino": np.mean([pictures[i][1] @ photo[1] for photo in photos]),
            "nearest_photo_dino": max(pictures[i][1] @ photo[1] for photo in photos),
            "clip_distance": 1 - pictures[i][0] @ other[0],
            "dino_distance": 1 - pictures[i][1] @ other[1],
        }
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, abs=1e-5)


def test_the_summary_is_the_way_between_the_yardsticks(evaluated):
    measured = read_metrics(evaluated[0])
    subject, drift, summary = (measured[name] for name in ("subject", "drift", "summary"))
    ours, base = subject["personalized"], subject["base"]
    learned = (ours["dino"] - base["dino"]) / (subject["photos"]["dino"] - base["dino"])
    unrelated = subject["unrelated"]["clip_t"]
    obeyed = (ours["clip_t"] - unrelated) / (base["clip_t"] - unrelated)
    moved = drift["dino_distance"] / drift["between_seeds"]["dino_distance"]
    # The judges are random: where a yardstick is upside down, there is no way to go.
    expected = {
        "learned": learned if subject["photos"]["dino"] > base["dino"] else None,
        "obeyed": obeyed if base["clip_t"] > unrelated else None,
        "moved": moved,
        "copies": ours["copies"],
    }
    assert summary == pytest.approx(expected)
    assert moved > 0 and expected["learned"] is not None


@pytest.mark.parametrize(
    "value, limits, grade",
    [(0.6, (0.6, 0.3), "good"), (0.59, (0.6, 0.3), "fair"), (0.29, (0.6, 0.3), "poor")]
    + [(0.25, (0.25, 0.6), "good"), (0.26, (0.25, 0.6), "fair"), (0.61, (0.25, 0.6), "poor"), (None, (1, 0), "soft")],
)
def test_the_word_of_an_answer_is_that_of_its_limits(script, value, limits, grade):
    words = dict(zip(("good", "fair", "poor"), ("well", "so-so", "badly")), soft="cannot be said with these pictures")
    found = re.search(
        r'<div class="word (\w+)">([^<]*)</div>', script.card("", value, *limits, tuple(words.values())[:3], "")
    )
    assert found.groups() == (grade, words[grade])


def test_diversity_and_nearest_photo_are_in_dino_space(evaluated, by_hand):
    rows, photos, pictures, *_ = by_hand
    measured = read_metrics(evaluated[0])["subject"]["personalized"]
    chosen = rows_of(rows, "personalized", "subject")
    a, b, c, d = (pictures[i][1] for i in chosen)
    assert measured["diversity"] == pytest.approx(((1 - a @ b) + (1 - c @ d)) / 2, abs=1e-5)
    nearest = [max(pictures[i][1] @ photo[1] for photo in photos) for i in chosen]
    assert measured["nearest_photo"] == pytest.approx(np.mean(nearest), abs=1e-5)
    closest = max(photos[i][1] @ photos[j][1] for i in range(5) for j in range(i))
    assert measured["copies"] == np.mean(np.array(nearest) > closest)
    for i, similarity in zip(chosen, nearest):
        photo = sorted(path.name for path in PHOTOS.iterdir()).index(rows[i]["nearest_photo"])
        assert pictures[i][1] @ photos[photo][1] == pytest.approx(similarity, abs=1e-9)


def test_drift_of_pictures_pairs_those_of_one_prompt_and_seed(evaluated, by_hand):
    rows, _, pictures, _, as_they_are = by_hand
    measured = read_metrics(evaluated[0])["drift"]
    of = {(row["model"], row["prompt"], row["seed"]): i for i, row in enumerate(rows) if row["kind"] == "other"}
    pairs = [(i, of["personalized", text, seed]) for (model, text, seed), i in of.items() if model == "base"]
    for name, judge in (("clip_distance", 0), ("dino_distance", 1)):
        mean = np.mean([1 - pictures[i][judge] @ pictures[j][judge] for i, j in pairs])
        assert measured[name] == pytest.approx(mean, abs=1e-5) and mean > 0
    pixels = [np.asarray(Image.open(row["file"]), float) for row in rows]
    rms = np.mean([math.sqrt(((pixels[i] - pixels[j]) ** 2).mean()) for i, j in pairs])
    assert measured["pixel_rms"] == pytest.approx(rms)
    # Of one prompt, the base's own two pictures.
    seeds = itertools.combinations(rows_of(rows, "base", "other"), 2)
    seeds = [(i, j) for i, j in seeds if rows[i]["prompt"] == rows[j]["prompt"]]
    assert len(seeds) == 2
    between = {
        "clip_distance": np.mean([1 - pictures[i][0] @ pictures[j][0] for i, j in seeds]),
        "dino_distance": np.mean([1 - pictures[i][1] @ pictures[j][1] for i, j in seeds]),
        "pixel_rms": np.mean([math.sqrt(((pixels[i] - pixels[j]) ** 2).mean()) for i, j in seeds]),
    }
    assert measured["between_seeds"] == pytest.approx(between, abs=1e-5)
    # The sets as a whole.
    base, ours = (
        [np.array([as_they_are[i][judge] for i in rows_of(rows, model, "other")]) for judge in (0, 1)]
        for model in ("base", "personalized")
    )
    assert measured["cmmd"] == pytest.approx(cmmd_by_hand(base[0], ours[0]), rel=1e-3) and measured["cmmd"] > 0
    for name, judge in (("frechet_clip", 0), ("frechet_dino", 1)):
        expected = frechet_by_torchmetrics(base[judge], ours[judge])
        assert measured[name] == pytest.approx(expected, rel=1e-2) and expected > 0


def test_parameters_have_drifted_where_they_were_changed(evaluated):
    measured = read_metrics(evaluated[0])["parameter_drift"]
    weights = load_file(BASE / UNET)
    norm = math.sqrt(sum(w.double().square().sum() for n, w in weights.items() if n.startswith("mid_block")))
    blocks = measured["unet"]["blocks"]
    assert blocks.pop("mid_block") == pytest.approx({"distance": 0.5 * norm, "relative": 0.5}, rel=1e-3)
    assert len(blocks) > 8 and all(block["distance"] == 0 for block in blocks.values())
    assert measured["unet"]["distance"] == pytest.approx(0.5 * norm, rel=1e-3)
    assert measured["text_encoder"]["distance"] == 0


def test_the_report_needs_no_other_file(evaluated):
    page = evaluated[0].joinpath("report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page) and "<script" not in page
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(pictures) == 5 + 2 * (2 + 2)
    for data in pictures:
        Image.open(io.BytesIO(base64.b64decode(data))).load()


def test_the_report_shows_the_numbers_beside_those_of_the_base(evaluated):
    page, measured = evaluated[0].joinpath("report.html").read_text(), read_metrics(evaluated[0])
    subject, other, drift = (measured[name] for name in ("subject", "other", "drift"))
    expected = {
        title: [f"{group[model][name]:.3f}" for model in ("personalized", "base")]
        for group, rows in (
            (subject, {"DINO": "dino", "CLIP-I": "clip_i", "CLIP-T": "clip_t", "diversity": "diversity"}),
            (subject, {"nearest photo": "nearest_photo"}),
            (other, {"other prompts: CLIP-T": "clip_t", "other prompts: DINO": "dino"}),
        )
        for title, name in rows.items()
    }
    for title, name, digits in (
        ("CLIP", "clip_distance", 4),
        ("DINO", "dino_distance", 4),
        ("pixels", "pixel_rms", 1),
    ):
        title = "pixels, RMS" if title == "pixels" else f"{title} distance"
        expected[title] = [f"{values[name]:.{digits}f}" for values in (drift, drift["between_seeds"])]
    predictions = measured["prediction_drift"]["other"]
    expected["predictions"] = [f"{100 * predictions['mean']:.2f}%", "–"]
    expected["guided predictions"] = [f"{100 * predictions['guided']:.2f}%", "–"]
    expected["KL bound, nats"] = [f"{predictions['kl_bound']:.1f}", "–"]
    for title, cells in expected.items():
        row = re.search(rf"<td>{title}</td>(.*?)</tr>", page, re.DOTALL)[1]
        assert re.findall(r'<td class="n"[^>]*>([^<]*)</td>', row)[:2] == cells, title


def test_tensorboard_gets_numbers_and_grids(evaluated):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(evaluated[0] / "logs" / "evaluation"))
    log.Reload()
    numbers = {"drift/dino_distance", "subject/personalized/dino", "prediction_drift/other/kl_bound"}
    assert numbers <= set(log.Tags()["scalars"])
    assert set(log.Tags()["images"]) == {"subject", "other"}


def test_wandb_gets_numbers_and_grids(evaluate, monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    evaluate("--report_to=wandb", f"--output_dir={tmp_path / 'out'}", *SMALL)
    wandb.teardown()  # waits for wandb's own process, which writes the file
    pictures = {path.name.split("_")[0] for path in tmp_path.glob("wandb/offline-run-*/files/media/images/*.png")}
    assert pictures == {"subject", "other"}
    (record,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"prediction_drift/other/mean" in record.read_bytes()


def test_charts_are_labelled_with_round_numbers_in_the_order_of_the_model(script):
    curve = {"by_timestep": {250: 0.447, 750: 0.02}}
    labels = re.findall(r">([^<]*%)</text>", script.timestep_chart({"other": curve, "subject": curve}))
    assert labels == ["0%", "10%", "20%", "30%", "40%", "50%"]
    blocks = {
        name: {"relative": r} for name, r in (("up_blocks.0", 0.038), ("mid_block", 0.00122), ("conv_out", 0.03))
    }
    chart = script.block_chart({"unet": {"distance": 1.0, "relative": 0.02, "blocks": blocks}})
    assert re.findall(r"<td>(\w+)", chart) == ["mid_block", "up_blocks", "conv_out"]
    assert re.findall(r">([^<]*%)</td>", chart) == ["2.00%", "0.12%", "3.80%", "3.00%"]


@pytest.fixture
def browse(tmp_path):
    """Runs Chromium on a page, with a new profile."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    flags = ["headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"]
    flags += ["disable-component-update", "disable-sync", "hide-scrollbars", "window-size=1200,1600"]
    command = [browser, *(f"--{flag}" for flag in flags), f"--user-data-dir={tmp_path / 'profile'}"]

    def call(page, flag):
        result = subprocess.run([*command, flag, page.as_uri()], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return call


def test_the_report_looks_right_in_a_browser(evaluated, browse, tmp_path):
    screenshot = tmp_path / "report.png"
    browse(evaluated[0] / "report.html", f"--screenshot={screenshot}")
    pixels = np.asarray(Image.open(screenshot).convert("RGB"), dtype=int)
    assert pixels.shape == (1600, 1200, 3)
    # The paper of the cards on the grey page, and nothing that runs over the margin.
    white, ink = (pixels == 255).all(axis=2), pixels.max(axis=2) < 100
    assert 0.2 < white.mean() < 0.9 and (pixels[0, 0] == (244, 245, 247)).all()
    margin = pixels[:, -20:]
    assert (margin == margin[0, 0]).all()
    # Words from the title down to the last number of the tables, and four cards side by side with theirs.
    words = pixels.max(axis=2) < 140  # in grey, too
    assert all(words[top : top + 160].sum() > 2000 for top in range(0, 1600, 160))
    assert all(ink[:500, left : left + 270].sum() > 500 for left in range(60, 1140, 270))
    # The bars of the answers, and further down the curves, have colours.
    assert ((pixels.max(axis=2) - pixels.min(axis=2)) > 60).sum() > 1000


def test_nothing_in_the_report_is_wider_than_the_screen_or_cut_off(evaluated, browse, tmp_path):
    """In frames, as the window of a browser has a least width of its own."""
    report = html.escape(evaluated[0].joinpath("report.html").read_text())
    measure = """
      onload = () => document.title = Array.from(frames, frame => {
        const all = [...frame.document.querySelectorAll("html, body *:not(svg *)")];
        const wide = e => e.getBoundingClientRect().right > frame.innerWidth || e.scrollWidth > e.clientWidth + 1;
        const names = all.filter(e => e.clientWidth && wide(e)).map(e => e.tagName + "." + e.className);
        return [frame.innerWidth, ...names].join(" ");
      }).join(", ")"""
    framed = "".join(f'<iframe width="{width}" srcdoc="{report}" style="border:0"></iframe>' for width in (1200, 400))
    page = tmp_path / "page.html"
    page.write_text(f"<title></title><script>{measure}</script>{framed}")
    assert re.search("<title>(.*?)</title>", browse(page, "--dump-dom"))[1] == "1200, 400"


# How it is run


def test_two_processes_measure_what_one_does(evaluated, flags, tmp_path):
    result = launch([*flags, f"--output_dir={tmp_path / 'out'}"], TORCHRUN)
    assert result.returncode == 0, result.stderr
    files = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.png"))
    assert len(files) == 16 + 2
    for file in files:
        assert np.array_equal(*(np.asarray(Image.open(folder / file)) for folder in (tmp_path / "out", evaluated[0])))
    assert numbers(read_metrics(tmp_path / "out")) == numbers(read_metrics(evaluated[0]))


def test_only_what_is_missing_is_drawn_again(evaluated, evaluate, tmp_path):
    shutil.copytree(evaluated[0], tmp_path / "out")
    pictures = sorted((tmp_path / "out" / "images").rglob("*.png"))
    before = {path: path.stat().st_mtime_ns for path in pictures}
    lost = tmp_path / "out" / "images" / "personalized" / "other" / "001-1.png"
    lost.unlink()
    metrics = evaluate(f"--output_dir={tmp_path / 'out'}")
    drawn = {path for path in pictures if path.stat().st_mtime_ns != before[path]}
    # Batches of three out of eight pictures: the last two come together.
    assert drawn == {lost, lost.with_name("001-0.png")}
    assert numbers(metrics) == numbers(read_metrics(evaluated[0]))


def test_pictures_of_other_settings_are_refused_or_drawn_afresh(evaluated, evaluate, refused, tmp_path):
    shutil.copytree(evaluated[0], tmp_path / "out")
    line = refused(f"--output_dir={tmp_path / 'out'}", "--guidance_scale=2")
    assert "guidance_scale" in line and "--overwrite" in line
    assert numbers(read_metrics(tmp_path / "out")) == numbers(read_metrics(evaluated[0]))
    fresh = evaluate(f"--output_dir={tmp_path / 'out'}", "--guidance_scale=2", "--overwrite", *SMALL)
    assert fresh["subject"]["base"] != read_metrics(evaluated[0])["subject"]["base"]


def test_pictures_of_another_variant_of_the_base_are_refused(evaluated, refused, tmp_path):
    shared = f"--base_images_dir={evaluated[0] / 'images' / 'base'}"
    assert "another variant" in refused(f"--output_dir={tmp_path / 'out'}", shared, "--variant=fp16")


def test_as_many_pictures_as_the_docs_say(script, flags):
    flags = [flag for flag in flags if "prompts_file" not in flag and "per_prompt" not in flag]
    args = script.parse_args(flags)
    pictures = 2 * len(script.plan_images(args, script.build_prompts(args)))
    assert f"{pictures} pictures in all" in (ROOT / "docs" / "evaluation.md").read_text()


def test_a_shared_folder_of_other_prompts_is_named_with_what_has_changed(evaluated, refused, tmp_path):
    shared = f"--base_images_dir={evaluated[0] / 'images' / 'base'}"
    line = refused(f"--output_dir={tmp_path / 'out'}", shared, "--instance_token=xyz")
    assert "another --base_images_dir" in line and "another --output_dir" not in line
    assert "a photo of a sks mug in the snow" in line and "a photo of a xyz mug in the snow" in line


def test_pictures_of_a_model_that_was_trained_anew_are_refused(evaluated, refused, tmp_path):
    shutil.copytree(evaluated[0], tmp_path / "out")
    retrained = changed_copy(BASE, tmp_path / "model", UNET, lambda weights: {n: 0.9 * w for n, w in weights.items()})
    line = refused(f"--output_dir={tmp_path / 'out'}", f"--pretrained_model_name_or_path={retrained}")
    assert "personalized model" in line


def test_a_folder_of_other_files_is_never_emptied(refused, tmp_path):
    tmp_path.joinpath("thesis.txt").write_text("all of it")
    assert "not written" in refused(f"--output_dir={tmp_path / 'out'}", f"--base_images_dir={tmp_path}", "--overwrite")
    assert tmp_path.joinpath("thesis.txt").exists()


def test_an_untrained_copy_of_the_base_has_exactly_no_drift(evaluated, evaluate, tmp_path):
    """With the base's pictures taken from another evaluation."""
    shutil.copytree(BASE, tmp_path / "copy")
    base_images = evaluated[0] / "images" / "base"
    before = {path: path.stat().st_mtime_ns for path in base_images.rglob("*")}
    metrics = evaluate(
        f"--pretrained_model_name_or_path={tmp_path / 'copy'}",
        f"--output_dir={tmp_path / 'out'}",
        f"--base_images_dir={base_images}",
    )
    assert before == {path: path.stat().st_mtime_ns for path in base_images.rglob("*")}
    assert_no_drift(metrics)
    assert metrics["summary"]["moved"] == 0
    assert metrics["subject"]["base"] == metrics["subject"]["personalized"]


def assert_no_drift(metrics):
    drift = metrics["drift"]
    assert all(value == 0 for name, value in drift.items() if name != "between_seeds"), drift
    assert all(value > 0 for value in drift["between_seeds"].values())
    for curves in metrics["prediction_drift"].values():
        assert not any([*curves.pop("by_timestep").values(), *curves.values()])
    assert all(part["distance"] == 0 for part in metrics["parameter_drift"].values())


def lora_of(pipeline, folder, scale):
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    layers = get_peft_model_state_dict(pipeline.unet)
    type(pipeline).save_lora_weights(folder, unet_lora_layers=layers)
    pairs = zip(*([w.double() for n, w in sorted(layers.items()) if part in n] for part in ("lora_A", "lora_B")))
    return math.sqrt(sum((b @ a).square().sum() for a, b in pairs))


@pytest.fixture
def parameter_drift(script):
    def call(base, model, token="sks"):
        args = script.parse_args([f"--{name}={token}" for name in REQUIRED])
        args.base_model_name_or_path, args.pretrained_model_name_or_path = str(base), str(model)
        script.check_models(args)
        return script.parameter_drift(args)

    return call


@pytest.mark.parametrize("architecture", ["sd", "sdxl"])
def test_parameters_of_a_lora_are_measured_on_top_of_the_base(architecture, parameter_drift, tiny_sdxl, tmp_path):
    pytest.importorskip("peft")
    base = BASE if architecture == "sd" else tiny_sdxl
    expected = lora_of(DiffusionPipeline.from_pretrained(base), tmp_path / "lora", 0.05)
    parameters = parameter_drift(base, tmp_path / "lora")
    assert parameters["unet"]["distance"] == pytest.approx(expected, rel=1e-3) and expected > 0
    # Other trainers name the file as they like.
    file = tmp_path.joinpath("lora", "pytorch_lora_weights.safetensors").rename(tmp_path / "sks.safetensors")
    assert parameter_drift(base, file) == parameters


def test_refuses_a_lora_of_which_a_part_has_no_place(refused, tmp_path):
    pytest.importorskip("peft")
    lora_of(StableDiffusionPipeline.from_pretrained(BASE), tmp_path / "lora", 0.05)
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    weights = {name.replace("down_blocks.1", "down_blocks.7"): weight for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    line = refused(f"--pretrained_model_name_or_path={file.parent}", f"--output_dir={tmp_path / 'out'}")
    assert "another base" in line and "--base_model_name_or_path" in line
    named = file.rename(tmp_path / "lora" / "sks.safetensors")
    assert "can also give the file itself" in refused(f"--pretrained_model_name_or_path={named.parent}")
    assert "another base" in refused(f"--pretrained_model_name_or_path={named}", f"--output_dir={tmp_path / 'out'}")
    assert "name the folder" in refused(f"--pretrained_model_name_or_path={BASE / UNET}")
    named.write_bytes(b"broken")
    assert "is broken" in refused(f"--pretrained_model_name_or_path={named}")


def custom_diffusion_of(base, folder, words=()):
    """Half of the weights of all attn2.to_k and attn2.to_v are added; each word has the embedding 0.1, 0.1, ..."""
    folder.mkdir()
    weights = load_file(base / UNET)
    chosen = {name: 1.5 * weights[name].float() for name in weights if re.search(r"attn2\.to_[kv]\.", name)}
    save_file(chosen, folder / "custom_diffusion.safetensors")
    config = json.loads(base.joinpath("text_encoder", "config.json").read_text())
    rows = {word: torch.full((config["hidden_size"],), 0.1) for word in words}
    if rows:
        save_file(rows, folder / "learned_embeds.safetensors")
    return math.sqrt(sum((weight.double() / 3).square().sum() for weight in chosen.values()))


def test_parameters_of_custom_diffusion_are_measured_on_top_of_the_base(parameter_drift, tmp_path):
    expected = custom_diffusion_of(BASE, tmp_path / "model", ["<new1>"])
    parameters = parameter_drift(BASE, tmp_path / "model", "<new1>")
    assert parameters["unet"]["distance"] == pytest.approx(expected, rel=1e-3) and expected > 0
    assert parameters["unet"]["blocks"]["conv_in"]["distance"] == 0 and parameters["text_encoder"]["distance"] == 0


def test_the_base_is_asked_without_words_that_only_custom_diffusion_knows(script, flags, tmp_path):
    """So that models with words of their own share its pictures."""
    pipeline = StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32, safety_checker=None)

    def plan(word):
        custom_diffusion_of(BASE, tmp_path / word, ["<new1>", word])
        own = [f"--pretrained_model_name_or_path={tmp_path / word}", f"--output_dir={tmp_path / 'out' / word}"]
        shared = [f"--base_images_dir={tmp_path / 'base'}", "--precision=fp32", f"--instance_token={word}"]
        args = script.parse_args([*flags, *own, *shared])
        script.check_models(args)
        images = script.plan_images(args, script.build_prompts(args))
        return args, images, script.check_folders(args, images)

    args, images, stale = plan("<new1>")
    script.prepare_folders(stale)
    script.draw_images(args, script.Accelerator(cpu=True), pipeline, "base", images[:1], tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a photo of a mug in the snow", num_inference_steps=2, generator=generator).images[0]
    drawn = Image.open(tmp_path / "base" / "subject" / "000-0.png")
    assert np.array_equal(np.asarray(image), np.asarray(drawn))
    assert list(plan("<new10>")[2]) == [tmp_path / "out" / "<new10>" / "images" / "personalized"]


def test_custom_diffusion_is_loaded_as_its_model_card_loads_it(script, tmp_path):
    custom_diffusion_of(BASE, tmp_path / "model", ["<new1>", "<new2>"])
    args = script.parse_args([f"--{name}=<new2>" for name in REQUIRED])
    args.pretrained_model_name_or_path, args.base_model_name_or_path = str(tmp_path / "model"), str(BASE)
    script.check_models(args)
    ours = script.load_pipeline(args, "personalized", torch.float32)
    card = StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32)
    card.unet.load_state_dict(load_file(tmp_path / "model" / "custom_diffusion.safetensors"), strict=False)
    tokens = load_file(tmp_path / "model" / "learned_embeds.safetensors")
    card.load_textual_inversion(list(tokens.values()), token=list(tokens))
    for part in ("unet", "text_encoder"):
        states = [getattr(pipeline, part).state_dict() for pipeline in (ours, card)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    assert ours.tokenizer("a <new2> mug").input_ids == card.tokenizer("a <new2> mug").input_ids


def test_new_words_of_sdxl_go_to_both_encoders(script, tiny_sdxl, tmp_path):
    custom_diffusion_of(tiny_sdxl, tmp_path / "model")
    rows = {name: torch.randn(2, 16) for name in ("clip_l", "clip_g")}
    save_file(rows, tmp_path / "model" / "learned_embeds.safetensors", metadata={"tokens": "<new1>+<new2>"})
    args = script.parse_args([f"--{name}=<new2>" for name in REQUIRED])
    args.pretrained_model_name_or_path, args.base_model_name_or_path = str(tmp_path / "model"), str(tiny_sdxl)
    script.check_models(args)
    pipeline = script.load_pipeline(args, "personalized", torch.float32)
    parts = (pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)
    for (tokenizer, encoder), expected in zip(parts, rows.values()):
        words = tokenizer("<new1> <new2>", add_special_tokens=False).input_ids
        assert torch.equal(encoder.get_input_embeddings().weight[words], expected)


def test_a_new_word_of_sdxl_is_not_taken_for_the_end_of_the_prompt(script, tiny_sdxl, tmp_path):
    """In the published encoders, whose configuration says 2."""
    custom_diffusion_of(tiny_sdxl, tmp_path / "model")
    rows = {name: torch.randn(1, 16) for name in ("clip_l", "clip_g")}
    save_file(rows, tmp_path / "model" / "learned_embeds.safetensors", metadata={"tokens": "<new1>"})
    base = shutil.copytree(tiny_sdxl, tmp_path / "base")
    config = base / "text_encoder_2" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 2}))
    args = script.parse_args([f"--{name}=<new1>" for name in REQUIRED])
    args.pretrained_model_name_or_path, args.base_model_name_or_path = str(tmp_path / "model"), str(base)
    script.check_models(args)
    pipeline = script.load_pipeline(args, "personalized", torch.float32)
    tokens = pipeline.tokenizer_2("a <new1> mug", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        output = pipeline.text_encoder_2(tokens)
    end = output.last_hidden_state[0, tokens[0].tolist().index(pipeline.tokenizer_2.eos_token_id)]
    assert torch.allclose(output.text_embeds[0], pipeline.text_encoder_2.text_projection(end), atol=1e-5)


def test_refuses_a_token_that_custom_diffusion_did_not_learn(refused, tmp_path):
    custom_diffusion_of(BASE, tmp_path / "model", ["<new1>"])
    line = refused(f"--pretrained_model_name_or_path={tmp_path / 'model'}", f"--output_dir={tmp_path / 'out'}")
    assert "error: --instance_token" in line and "<new1>" in line and not tmp_path.joinpath("out").exists()


def test_refuses_custom_diffusion_of_another_architecture_before_anything_is_written(refused, tiny_sd, tmp_path):
    custom_diffusion_of(tiny_sd, tmp_path / "model")
    line = refused(f"--pretrained_model_name_or_path={tmp_path / 'model'}", f"--output_dir={tmp_path / 'out'}")
    assert "another base" in line and "--base_model_name_or_path" in line and "size mismatch" not in line
    assert not tmp_path.joinpath("out").exists()


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """Folder of a random `StableDiffusionXLPipeline` of 32 x 32 pixels, with the tokenizer of the drawn world."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE / "tokenizer")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=32, projection_dim=16, **sizes, **special
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=32,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        sample_size=32,
    )
    folder = tmp_path_factory.mktemp("tiny-sdxl")
    StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
    ).save_pretrained(folder)
    return folder


def test_sdxl_is_measured_too_and_a_copy_of_it_has_no_drift(evaluate, tiny_sdxl, tmp_path):
    shutil.copytree(tiny_sdxl, tmp_path / "copy")
    both = [f"--base_model_name_or_path={tiny_sdxl}", f"--pretrained_model_name_or_path={tmp_path / 'copy'}"]
    metrics = evaluate(*both, f"--output_dir={tmp_path / 'out'}")
    assert_no_drift(metrics)
    assert set(metrics["parameter_drift"]) == {"unet", "text_encoder", "text_encoder_2"}


@pytest.fixture(scope="session")
def trainers():
    names = {"sd": "train_dreambooth_lipschitz.py", "sdxl": "train_dreambooth_lipschitz_sdxl.py"}
    return {architecture: runner(load_script(name)) for architecture, name in names.items()}


TRAINED = {
    "full": [],
    "lora": ["--rank=2"],
    "custom_diffusion": ["--modifier_token=<new1>", "--initializer_token=mug"],
}


@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("architecture", ["sd", "sdxl"])
def test_what_the_training_scripts_write_is_measured(architecture, method, trainers, evaluate, tiny_sdxl, tmp_path):
    """Two steps at a rate that is high enough to be seen."""
    base = tiny_sdxl if architecture == "sdxl" else BASE
    token = "<new1>" if method == "custom_diffusion" else "sks"
    model = tmp_path / "model"
    train = [f"--pretrained_model_name_or_path={base}", f"--method={method}", *TRAINED[method]]
    train += [f"--instance_data_dir={PHOTOS}", f"--output_dir={model}", f"--instance_prompt=a photo of a {token} mug"]
    train += ["--resolution=64", "--max_train_steps=2", "--seed=0", "--learning_rate=1e-2", "--lr_warmup_steps=0"]
    trainers[architecture](*train, "--lipschitz_weight=0")
    both = [f"--base_model_name_or_path={base}", f"--pretrained_model_name_or_path={model}"]
    metrics = evaluate(*both, f"--instance_token={token}", f"--output_dir={tmp_path / 'out'}", *SMALL)
    assert metrics["parameter_drift"]["unet"]["distance"] > 0
    assert metrics["drift"]["pixel_rms"] > 0 and metrics["prediction_drift"]["other"]["mean"] > 0
    page = tmp_path.joinpath("out", "report.html").read_text()
    assert ("The base cannot read &lt;new1&gt;" in page) == (method == "custom_diffusion")


def test_one_photo_and_one_picture_a_prompt_leave_empty_what_needs_two(evaluate, tmp_path, caplog):
    tmp_path.joinpath("photos").mkdir()
    shutil.copy(PHOTOS / "0.png", tmp_path / "photos")
    metrics = evaluate(f"--instance_data_dir={tmp_path / 'photos'}", f"--output_dir={tmp_path / 'out'}", *SMALL)
    subject = metrics["subject"]
    assert subject["photos"] == {"dino": None, "clip_i": None, "nearest_photo": None}
    assert subject["personalized"]["diversity"] is None and subject["personalized"]["copies"] is None
    assert subject["personalized"]["dino"] is not None and metrics["drift"]["dino_distance"] > 0
    assert metrics["summary"]["learned"] is None and metrics["summary"]["moved"] is None
    assert (
        len([message for message in caplog.messages if message.endswith("what is compared to it stays empty.")]) == 1
    )
    page = tmp_path.joinpath("out", "report.html").read_text()
    assert "–" in page and "Needs two pictures of a prompt" in page


# What is refused, each in one line, with exit code 2


@pytest.mark.parametrize(
    "flag, said",
    [
        ("--instance_token=", "--instance_token must not be empty"),
        ("--class_name= ", "--class_name must not be empty"),
        ("--guidance_scale=nan", "--guidance_scale must be a number"),
        ("--num_inference_steps=2000", "--num_inference_steps must be at most 1000"),
        ("--probe_timesteps=2000", "--probe_timesteps must be at most 1000"),
        ("--probe_timesteps=1", "--probe_timesteps: must be a finite number at least 2"),
        ("--report_to=csv", "--report_to: invalid choice: 'csv'"),
        ("--pretrained_model_name_or_path=sks-dog", "there is no folder sks-dog"),
    ],
)
def test_refuses_values_that_cannot_be_meant(refused, flag, said):
    assert said in refused(flag)


def test_refuses_a_folder_without_an_image(refused, tmp_path):
    tmp_path.joinpath("notes.txt").write_text("none yet")
    assert "no image" in refused(f"--instance_data_dir={tmp_path}")
    assert "no folder" in refused(f"--instance_data_dir={tmp_path / 'missing'}")


def test_refuses_to_write_its_pictures_among_the_photos(refused, tmp_path):
    photos = shutil.copytree(PHOTOS, tmp_path / "photos")
    (tmp_path / "link").symlink_to(photos)
    said = refused(f"--instance_data_dir={photos}", f"--output_dir={tmp_path / 'link'}")
    assert f"writing to {photos} would change what --instance_data_dir reads" in said


def test_refuses_a_folder_with_two_models(refused, tmp_path):
    """The LoRA of an earlier training beside a Custom Diffusion: neither may be taken for the other."""
    model = tmp_path / "model"
    custom_diffusion_of(BASE, model, ["<new1>"])
    shutil.copy(model / "custom_diffusion.safetensors", model / "pytorch_lora_weights.safetensors")
    said = refused(f"--pretrained_model_name_or_path={model}", "--instance_token=<new1>")
    assert "holds several models, pytorch_lora_weights.safetensors and custom_diffusion.safetensors" in said


def test_prompts_that_the_text_encoder_does_not_read_to_their_end_are_told(script, flags, refused, tmp_path, caplog):
    long = " ".join(["very"] * 40)
    (tmp_path / "subject.txt").write_text(f"{long} {{token}} {{class}}\n")
    (tmp_path / "other.txt").write_text(f"a photo of a {{class}} {long} blue\n", encoding="utf-8-sig")
    said = refused(f"--prompts_file={tmp_path / 'subject.txt'}", f"--output_dir={tmp_path / 'out'}")
    assert "which names the subject: shorten it" in said
    args = script.parse_args([*flags, f"--other_prompts_file={tmp_path / 'other.txt'}"])
    script.check_prompts(args, load_by_hand(BASE), script.plan_images(args, script.build_prompts(args)))
    (warning,) = [line for line in caplog.messages if "The text encoder ignores" in line]
    assert warning.endswith(f"in 'a photo of a mug {long} blue'.") and "very blue'" in warning


def test_tilde_is_the_home_folder(script, flags, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["pretrained_model_name_or_path", "base_model_name_or_path", "instance_data_dir", "prompts_file"]
    names += ["other_prompts_file", "clip_model", "dino_model", "output_dir", "base_images_dir"]
    args = script.parse_args([*flags, *(f"--{name}=~/{name}" for name in names)])
    assert {getattr(args, name) for name in names} == {f"{tmp_path}/{name}" for name in names}


def test_refuses_a_broken_photo(refused, tmp_path):
    tmp_path.joinpath("0.png").write_bytes(b"no picture")
    assert "0.png" in refused(f"--instance_data_dir={tmp_path}")


@pytest.mark.parametrize(
    "flag, text, said",
    [
        ("--prompts_file", "a dog in the snow", "lacks {token}"),
        ("--prompts_file", "a {token} in the snow", "lacks {class}"),
        ("--prompts_file", "a {token} {class} {place}", "{place}"),
        ("--prompts_file", "\n# nothing\n", "no prompt"),
        ("--other_prompts_file", "a {token} {class}", "names the subject"),
        ("--other_prompts_file", "a photo of SKS mug", "names the subject"),
    ],
)
def test_refuses_prompts_that_cannot_be_meant(refused, tmp_path, flag, text, said):
    tmp_path.joinpath("prompts.txt").write_text(text)
    line = refused(f"{flag}={tmp_path / 'prompts.txt'}")
    assert flag in line or "{place}" in line
    assert said in line


def test_refuses_a_folder_that_is_no_pipeline(refused, tmp_path):
    line = refused(f"--pretrained_model_name_or_path={tmp_path}")
    assert "--pretrained_model_name_or_path" in line and "no pipeline" in line
    assert "--base_model_name_or_path" in refused(f"--base_model_name_or_path={tmp_path}")
    assert "some/model" in refused("--base_model_name_or_path=some/model")


def test_refuses_a_base_without_a_scheduler(refused, tmp_path):
    base = shutil.copytree(BASE, tmp_path / "base", ignore=shutil.ignore_patterns("scheduler"))
    assert "has no scheduler/scheduler_config.json" in refused(f"--base_model_name_or_path={base}")


def test_refuses_an_output_folder_that_cannot_be_made_before_anything_is_drawn(refused, tmp_path):
    tmp_path.joinpath("file").write_text("in the way")
    line = refused(f"--output_dir={tmp_path / 'file'}")
    assert "cannot write to" in line and str(tmp_path / "file") in line


def test_refuses_a_base_of_another_architecture(refused, tiny_sd, tiny_sdxl):
    assert "another architecture" in refused(f"--base_model_name_or_path={tiny_sd}")
    assert "another architecture" in refused(f"--base_model_name_or_path={tiny_sdxl}")


def test_refuses_a_lora_of_another_architecture_before_anything_is_written(refused, tiny_sd, tmp_path):
    pytest.importorskip("peft")
    lora_of(StableDiffusionPipeline.from_pretrained(tiny_sd), tmp_path / "lora", 0.05)
    line = refused(f"--pretrained_model_name_or_path={tmp_path / 'lora'}", f"--output_dir={tmp_path / 'out'}")
    assert "another base" in line and "--base_model_name_or_path" in line and "size mismatch" not in line
    assert not tmp_path.joinpath("out").exists()


VAE = "vae/diffusion_pytorch_model.safetensors"


def filled(name, value=math.nan):
    """Writes `value` all over one weight."""
    return lambda weights: weights | {name: torch.full_like(weights[name], value, dtype=torch.float32)}


def renamed(name):
    return lambda weights: {"old." * (n == name) + n: w for n, w in weights.items()}


@pytest.mark.parametrize(
    "flag, file, change, said",
    [
        ("--pretrained_model_name_or_path", UNET, filled("conv_in.bias"), "NaN or infinite in conv_in.bias"),
        ("--pretrained_model_name_or_path", VAE, filled("decoder.conv_out.bias"), "NaN or infinite in decoder"),
        ("--base_model_name_or_path", VAE, filled("encoder.conv_in.bias"), "NaN or infinite in encoder"),
        ("--base_model_name_or_path", UNET, renamed("conv_in.bias"), "lacks conv_in.bias"),
    ],
)
def test_refuses_weights_that_are_nan_or_missing_before_anything_is_written(
    refused, tmp_path, flag, file, change, said
):
    model = changed_copy(BASE, tmp_path / "model", file, change)
    line = refused(f"{flag}={model}", f"--output_dir={tmp_path / 'out'}")
    assert f"error: {flag}" in line and str(model) in line and said in line
    assert not tmp_path.joinpath("out").exists()


def test_refuses_a_new_word_that_is_nan_before_anything_is_written(refused, tmp_path):
    custom_diffusion_of(BASE, tmp_path / "model", ["<new1>"])
    words = tmp_path / "model" / "learned_embeds.safetensors"
    save_file(filled("<new1>")(load_file(words)), words)
    flags = [f"--pretrained_model_name_or_path={words.parent}", "--instance_token=<new1>"]
    assert "NaN" in refused(*flags, f"--output_dir={tmp_path / 'out'}") and not tmp_path.joinpath("out").exists()


@pytest.mark.parametrize("file", ["custom_diffusion.safetensors", "learned_embeds.safetensors"])
def test_refuses_what_is_torn_of_a_custom_diffusion(file, refused, tmp_path):
    custom_diffusion_of(BASE, tmp_path / "model", ["<new1>"])
    torn = tmp_path / "model" / file
    torn.write_bytes(torn.read_bytes()[:-10])
    flags = [f"--pretrained_model_name_or_path={torn.parent}", "--instance_token=<new1>"]
    assert f"{torn} is broken" in refused(*flags, f"--output_dir={tmp_path / 'out'}")


def test_stops_where_weights_so_large_that_numbers_overflow_draw_nan(refused, tmp_path):
    base = changed_copy(BASE, tmp_path / "base", VAE, filled("decoder.conv_norm_out.weight", 3e38))
    flags = [f"--base_model_name_or_path={base}", f"--output_dir={tmp_path / 'out'}", "--num_inference_steps=1"]
    line = refused(*flags)
    assert "base model draws NaN" in line and "fp32" in line and "--precision" not in line
    # Nothing was drawn: a command with other settings is as welcome as the first.
    assert refused(*flags, "--guidance_scale=2") == line


def test_refuses_judges_that_are_not_there_or_of_the_wrong_kind(refused, judges, tmp_path):
    assert "some/clip" in refused("--clip_model=some/clip")
    assert "--clip_model" in refused(f"--clip_model={judges / 'vit'}")
    assert "--dino_model" in refused(f"--dino_model={judges / 'clip'}")
    ConvNextModel(ConvNextConfig(hidden_sizes=[4] * 4, depths=[1] * 4)).save_pretrained(tmp_path / "convnext")
    shutil.copy(judges / "vit" / "preprocessor_config.json", tmp_path / "convnext")
    assert "no class token" in refused(f"--dino_model={tmp_path / 'convnext'}", f"--output_dir={tmp_path / 'out'}")
    broken = shutil.copytree(judges / "vit", tmp_path / "vit") / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    assert "--dino_model" in refused(f"--dino_model={broken.parent}", f"--output_dir={tmp_path / 'out'}")
    assert not tmp_path.joinpath("out").exists()


def test_a_mistake_is_one_line_under_accelerate(flags, tmp_path):
    result = launch([*flags, f"--instance_data_dir={tmp_path}"])
    (line,) = [line for line in result.stderr.splitlines() if "evaluate_dreambooth.py: error" in line]
    assert "no image" in line and result.returncode != 0


def test_a_mistake_on_the_command_line_is_one_line_too(script, capsys):
    with pytest.raises(SystemExit) as exit:
        script.parse_args(["--seed=1"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("evaluate_dreambooth.py: error") and exit.value.code == 2
