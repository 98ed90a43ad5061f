# What the methods of train_dreambooth_lipschitz.py promise: full, LoRA and Custom Diffusion, on the model of the drawn
# world. What they have in common is in test_train_dreambooth_lipschitz.py, the arithmetic of LoRA in test_lora.py.
import argparse
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_train_dreambooth_lipschitz import assert_one_clear_line, checkpoints, distance, same_bits, scalars, weights


ROOT = Path(__file__).parents[1]
BASE = ROOT / "examples" / "tinyworld" / "sd"
PRESERVED = ["a photo of a red cup", "a photo of a grey striped fish on a wooden floor"]
SUBJECTS = ROOT / "examples" / "tinyworld" / "subjects"
METHODS = {
    "full": ["--method=full", "--learning_rate=1e-4"],
    "lora": ["--method=lora", "--rank=3", "--lora_alpha=6", "--learning_rate=1e-2"],
    "lora with text encoder": [
        *["--method=lora", "--train_text_encoder", "--rank=2", "--lora_dropout=0.2", "--learning_rate=1e-2"],
        *["--lipschitz_layers=50", "--lipschitz_predictions"],
    ],
    "dora": ["--method=lora", "--use_dora", "--learning_rate=1e-2"],
    "custom_diffusion": [
        *["--method=custom_diffusion", "--learning_rate=1e-3", "--modifier_token=<new1>"],
        *["--initializer_token=red mug", "--instance_prompt=a photo of a <new1> mug"],
    ],
    "keys and values alone": ["--method=custom_diffusion", "--learning_rate=1e-3", "--lipschitz_layers=50"],
}

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.xdist_group("methods")]


@pytest.fixture(scope="session")
def train(run_script, script, prompts_flag):
    """
    Runs the script's `main` on five photos of one mug; flags given later win. Few prompts are recorded, in few steps.
    """
    flags = [f"--pretrained_model_name_or_path={BASE}", f"--instance_data_dir={SUBJECTS / 'mug'}", "--seed=7"]
    flags += ["--instance_prompt=a photo of a sks mug", "--resolution=64", "--train_batch_size=2"]

    def call(*more):
        records = any(flag.startswith(("--lipschitz_layers", "--lipschitz_predictions", "--drift_")) for flag in more)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "RECORDED_STEPS", 2)
            return run_script(*flags, *([prompts_flag] if records else []), *more)

    return call


@pytest.fixture(scope="session")
def prompts_flag(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PRESERVED))
    return f"--lipschitz_prompts_file={file}"


@pytest.fixture(scope="session")
def trained(train, tmp_path_factory):
    """Gives the output folder of a method; each is trained once."""
    folders = {}

    def call(method):
        if method not in folders:
            folders[method] = tmp_path_factory.mktemp("trained") / "model"
            flags = ["--max_train_steps=4", "--lipschitz_weight=50"]
            flags += ["--checkpointing_steps=1", "--checkpoints_total_limit=3"]
            flags += ["--validation_prompt=a photo of a <new1> mug", "--num_validation_images=1"]
            train(*METHODS[method], *flags, "--drift_every=2", f"--output_dir={folders[method]}")
        return folders[method]

    return call


def result(folder):
    """All that was trained, by file and name; not what checkpoints and recordings hold."""
    others = re.compile(r"(checkpoint|recording)-")
    files = [path for path in Path(folder).rglob("*.safetensors") if not others.match(str(path.relative_to(folder)))]
    return {f"{path.relative_to(folder)}: {key}": value for path in files for key, value in load_file(path).items()}


@pytest.mark.parametrize("name", ["script", "sdxl_script"])
def test_equal_runs_write_equal_bytes(name, request, tmp_path):
    """safetensors and sets have an order of chance, another one in each of their instances or processes."""
    script = request.getfixturevalue(name)
    unet = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet").requires_grad_(False)
    modules = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=2, target_modules=modules))
    args = argparse.Namespace(method="lora")
    contents = set()
    for _ in range(8):
        script.save_trained(args, {"unet": unet}, tmp_path)
        contents.add((tmp_path / script.LORA_FILE).read_bytes())
    assert len(contents) == 1
    with safe_open(tmp_path / script.LORA_FILE, "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config["unet.target_modules"] == sorted(modules)
    state = load_file(tmp_path / script.LORA_FILE)
    assert all(torch.equal(state[f"unet.{key}"], own) for key, own in get_peft_model_state_dict(unet).items())


def loading_code(folder):
    """The calls that the model card shows."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


def load(folder):
    names = {}
    exec(loading_code(folder), names)
    return names["pipeline"]


DRAW = """
import torch
from diffusers import DPMSolverMultistepScheduler

pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
generator = torch.Generator().manual_seed(7)
pipeline("a photo of a <new1> mug", num_inference_steps=3, generator=generator).images[0].save(file)
"""


@pytest.fixture(scope="session")
def drawn(trained, tmp_path_factory):
    """A folder with what the calls of each model card draw, and the base, in a process that knows of no trainer."""
    folder = tmp_path_factory.mktemp("drawn")
    load_base = "import torch\nfrom diffusers import DiffusionPipeline\n"
    load_base += f"pipeline = DiffusionPipeline.from_pretrained({str(BASE)!r}, dtype=torch.float32)\n"
    calls = {"base": load_base} | {method: loading_code(trained(method)) for method in METHODS}
    code = [lines + f"file = {name!r} + '.png'" + DRAW for name, lines in calls.items()]
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_calls_of_the_model_card_draw_the_last_validation_image(method, trained, drawn):
    pixels = [np.asarray(Image.open(path)) for path in (trained(method) / "image_0.png", drawn / f"{method}.png")]
    np.testing.assert_array_equal(*pixels)


def test_no_validation_image_is_that_of_the_base(trained, drawn):
    """Or the claim above would hold for calls that load nothing."""
    files = [drawn / "base.png", *(trained(method) / "image_0.png" for method in METHODS)]
    assert len({np.asarray(Image.open(file)).tobytes() for file in files}) == len(files)


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_bit_identical(method, trained, train, tmp_path):
    """And its drift is that from the base, not from the checkpoint."""
    flags = ["--max_train_steps=4", "--lipschitz_weight=50", "--drift_every=3", f"--output_dir={tmp_path}"]
    train(*METHODS[method], *flags, f"--resume_from_checkpoint={trained(method) / 'checkpoint-2'}")
    again, whole = result(tmp_path), result(trained(method))
    assert whole and same_bits(again, whole)
    assert not same_bits(result(trained(method) / "checkpoint-2"), whole)
    drifts = [scalars(folder)[0]["drift/prediction"] for folder in (tmp_path, trained(method))]
    assert drifts[0] == {3: drifts[0][3], 4: drifts[1][4]}


@pytest.mark.parametrize("method", METHODS)
def test_limit_keeps_the_newest_checkpoints(method, trained):
    assert checkpoints(trained(method)) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("method", METHODS)
def test_penalty_is_zero_in_the_first_step_and_only_there(method, trained):
    penalty = scalars(trained(method))[0]["lipschitz/penalty"]
    # A prediction that is made alone is rounded in another way than in the batch in which it was recorded.
    assert [step for step, value in penalty.items() if value < 1e-6 * penalty[4]] == [1]


def test_logged_distance_of_lora_is_that_of_the_saved_products(trained):
    saved = load_file(trained("lora") / "pytorch_lora_weights.safetensors")
    pairs = [(saved[key.replace("lora_B", "lora_A")], saved[key]) for key in saved if "lora_B" in key]
    squares = sum((6 / 3 * up.double() @ down.double()).square().sum().item() for down, up in pairs)
    assert scalars(trained("lora"))[0]["lipschitz/distance"][4] == pytest.approx(squares**0.5, rel=1e-5)


@torch.no_grad()
def prediction_changes(pipeline, base, seed):
    """
    ||f - f_base|| and ||f_base|| at each call of the base while it draws the prompt that is held out, with the
    embeddings that each of them has: of predictions with and without prompt, and of the guided ones.
    """
    base.scheduler = DPMSolverMultistepScheduler.from_config(base.scheduler.config)
    calls = []
    hook = base.unet.register_forward_hook(lambda *call: calls.append((*call[1], call[2][0])))
    generator = torch.Generator().manual_seed(seed)
    base(PRESERVED[1], num_inference_steps=2, generator=generator, output_type="latent")
    hook.remove()
    embeds, negative = pipeline.encode_prompt(PRESERVED[1], "cpu", 1, do_classifier_free_guidance=True)
    plain, guided = [], []
    for sample, timestep, predicted in calls:
        now = pipeline.unet(sample, timestep, torch.cat([negative, embeds])).sample
        plain += [((now - predicted)[row].norm().item(), predicted[row].norm().item()) for row in (0, 1)]
        guide = [rows[0] + 7.5 * (rows[1] - rows[0]) for rows in (now, predicted)]
        guided.append(((guide[0] - guide[1]).norm().item(), guide[1].norm().item()))
    assert len(calls) == 2
    return np.array(plain).T, np.array(guided).T


@pytest.mark.parametrize("method", METHODS)
def test_logged_drift_of_predictions_is_that_of_the_loaded_model(method, trained):
    base = StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32)
    base.set_progress_bar_config(disable=True)
    recorded = [flag for flag in METHODS[method] if "layers" in flag]  # before it, and else nothing
    plain, guided = prediction_changes(load(trained(method)), base, seed=len(recorded))
    values, _ = scalars(trained(method))
    for name in ("prediction", "guided_prediction", "lipschitz_constant", "seconds"):
        assert list(values[f"drift/{name}"]) == [2, 4]
    assert values["drift/prediction"][4] == pytest.approx((plain[0] / plain[1]).mean(), rel=1e-3)
    assert values["drift/guided_prediction"][4] == pytest.approx((guided[0] / guided[1]).mean(), rel=1e-3)
    expected = plain[0].max() / values["lipschitz/distance"][4]
    assert values["drift/lipschitz_constant"][4] == pytest.approx(expected, rel=1e-3)


STRONG = {
    "lora": ["--lipschitz_weight=1e5"],
    "lora by its factors": ["--lipschitz_lora=factors", "--lipschitz_reduction=sum", "--lipschitz_weight=100"],
    "custom_diffusion": ["--lipschitz_weight=1e5"],
    "lora by its layers": ["--lipschitz_layers=1e3"],
}


@pytest.fixture(scope="session")
def distance_after(train, tmp_path_factory):
    """Gives how far six steps lead from the base, for a method and flags; each is trained once."""
    distances = {}

    def call(method, *flags):
        if (method, flags) not in distances:
            folder = tmp_path_factory.mktemp("distance")
            train(*METHODS[method], *flags, "--max_train_steps=6", f"--output_dir={folder}")
            distances[method, flags] = scalars(folder)[0]["lipschitz/distance"][6]
        return distances[method, flags]

    return call


@pytest.mark.parametrize("case", STRONG)
def test_penalty_keeps_the_model_closer_to_the_base(case, distance_after):
    method = case.split()[0]
    assert 0 < distance_after(method, *STRONG[case]) < 0.9 * distance_after(method, "--lipschitz_weight=1e-9")


# What is trained and saved


def test_folder_is_named_as_by_the_script_of_diffusers_for_the_method(script):
    names = {"full": "dreambooth-model", "lora": "lora-dreambooth-model", "custom_diffusion": "custom-diffusion-model"}
    needed = ["--pretrained_model_name_or_path=x", "--instance_data_dir=x", "--instance_prompt=x"]
    assert {method: script.parse_args([*needed, f"--method={method}"]).output_dir for method in names} == names


@pytest.mark.parametrize("method", METHODS)
def test_base_is_loaded_in_few_bits_where_it_does_not_train(script, method):
    """A whole SDXL in float32 would not fit into the memory of a small machine; what trains keeps every bit."""
    given = [f"--pretrained_model_name_or_path={BASE}", "--instance_data_dir=photos", "--instance_prompt=a mug"]
    args = script.parse_args([*given, *METHODS[method]])
    exact = StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32, safety_checker=None)
    loaded = script.load_pipeline(args, dtypes=script.loaded_dtypes(args, torch.bfloat16))
    dtypes = {name: getattr(loaded, name).dtype for name in ("unet", "text_encoder", "vae")}
    few = {"unet": "lora" in method or method == "dora", "text_encoder": method != "custom_diffusion", "vae": False}
    assert dtypes == {name: torch.bfloat16 if is_few else torch.float32 for name, is_few in few.items()}
    pipeline, _, models, _ = script.load_models(args, torch.bfloat16)
    for name in ("unet", "text_encoder"):
        # LoRA renames the layers that it wraps; added weights have no counterpart.
        own = {key.replace(".base_layer", ""): p for key, p in getattr(pipeline, name).named_parameters()}
        for key, before in getattr(exact, name).named_parameters():
            after = own[key if key in own else key.replace("token_embedding", "token_embedding.embedding")]
            assert after.requires_grad == (after.dtype == torch.float32) or name not in models
            assert torch.equal(after, before.to(after.dtype))


def test_result_is_small_and_safetensors_only(trained):
    files = {"custom_diffusion": {"custom_diffusion.safetensors", "learned_embeds.safetensors"}}
    files["keys and values alone"] = {"custom_diffusion.safetensors"}
    for method in list(METHODS)[1:]:
        names = {path.name for path in trained(method).iterdir() if path.is_file()}
        expected = files.get(method, {"pytorch_lora_weights.safetensors"})
        others = {name for name in names if name.startswith("recording-")}
        assert len(others) == 1 and names - others == expected | {"README.md", "image_0.png"}
        assert sum((trained(method) / name).stat().st_size for name in expected) < 4e6


def test_lora_of_the_unet_alone_is_all_that_its_file_holds(trained):
    keys = load_file(trained("lora") / "pytorch_lora_weights.safetensors").keys()
    assert keys and all(re.fullmatch(r"unet\..*\.lora_[AB]\.weight", key) for key in keys)


def test_lora_file_holds_both_models_and_its_alpha(trained):
    keys = load_file(trained("lora with text encoder") / "pytorch_lora_weights.safetensors").keys()
    assert {key.split(".")[0] for key in keys} == {"unet", "text_encoder"}
    pipeline = load(trained("lora"))
    layer = pipeline.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2.to_k
    assert set(layer.scaling.values()) == {2.0}


def test_custom_diffusion_changes_keys_and_values_of_cross_attention_only(trained):
    before, after = weights(BASE), load(trained("custom_diffusion")).unet.state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key].float())}
    assert changed == {key for key in after if "attn2.to_k" in key or "attn2.to_v" in key}


def test_rows_of_other_tokens_keep_every_bit(train, script, tmp_path, monkeypatch):
    """In training itself, with weight decay; and after loading."""
    seen = {}
    save = script.save_trained
    monkeypatch.setattr(
        script, "save_trained", lambda args, trained, *folder: (seen.update(trained), save(args, trained, *folder))
    )
    train(*METHODS["custom_diffusion"], "--max_train_steps=2", "--adam_weight_decay=0.1", f"--output_dir={tmp_path}")
    before = StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32)
    old = before.text_encoder.get_input_embeddings().weight
    embedding, pipeline = seen["text_encoder"].get_input_embeddings(), load(tmp_path)
    loaded = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(embedding.embedding.weight, old) and torch.equal(loaded[: len(old)], old)
    assert torch.equal(loaded[len(old) :], embedding.new)
    start = old[before.tokenizer.encode("red mug", add_special_tokens=False)].mean(0)
    assert 0 < (embedding.new[0] - start).abs().max() < 0.1
    others = seen["text_encoder"].state_dict()
    unchanged = [key for key in before.text_encoder.state_dict() if "token_embedding" not in key]
    assert unchanged and all(torch.equal(others[key], before.text_encoder.state_dict()[key]) for key in unchanged)


@pytest.mark.parametrize("method", ["lora with text encoder", "custom_diffusion"])
def test_frozen_weights_are_in_bfloat16_and_trained_ones_in_float32(
    method, train, tiny_sd, script, tmp_path, monkeypatch
):
    """With what else saves memory: a step is taken with the 8-bit optimizer and gradient checkpointing."""
    seen = {}
    attach = script.attach_lipschitz
    monkeypatch.setattr(
        script,
        "attach_lipschitz",
        lambda *arguments: seen.update(arguments[4]) or attach(*arguments),
    )
    flags = ["--mixed_precision=bf16", "--use_8bit_adam", "--gradient_checkpointing", "--max_train_steps=2"]
    flags += ["--validation_prompt=a mug", "--num_validation_images=1", "--validation_scheduler=DDPMScheduler"]
    flags += [f"--pretrained_model_name_or_path={tiny_sd}", "--resolution=16"]  # bfloat16 is slow on many CPUs
    train(*METHODS[method], *flags, f"--output_dir={tmp_path}")
    parameters = [parameter for model in seen.values() for parameter in model.parameters()]
    assert len(seen) == 2
    assert {p.dtype for p in parameters if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in parameters if not p.requires_grad} == {torch.bfloat16}
    assert {value.dtype for value in result(tmp_path).values()} == {torch.float32}


def test_gradient_checkpointing_changes_no_result(train, tmp_path):
    """The text encoder's too, where the first layer's inputs need no gradients."""
    for name, flags in {"with": ["--gradient_checkpointing"], "without": []}.items():
        train(
            *METHODS["lora with text encoder"],
            *["--lora_dropout=0", "--max_train_steps=2", f"--output_dir={tmp_path / name}"],
            *flags,
        )
    after, other = result(tmp_path / "with"), result(tmp_path / "without")
    assert distance(after, other) < 1e-3 * distance(after, {key: torch.zeros(()) for key in after})


def test_compiled_blocks_change_no_result(train, tiny_sd, tmp_path, monkeypatch):
    """Uses a backend that needs no C++ compiler. Base, drift and pictures are drawn by the same blocks, uncompiled."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    (tmp_path / "prompts.txt").write_text("a photo of a cat\n\na red house\n")
    flags = ["--method=lora", "--lora_dropout=0", "--gradient_checkpointing", "--max_train_steps=2"]
    flags += ["--lipschitz_layers=1", "--lipschitz_predictions=1", "--drift_every=1"]
    flags += [f"--lipschitz_prompts_file={tmp_path / 'prompts.txt'}", "--validation_prompt=a mug"]
    flags += ["--num_validation_images=1", "--validation_steps=1"]
    flags += [f"--pretrained_model_name_or_path={tiny_sd}", "--resolution=16"]
    compiled = torch._dynamo.utils.counters["frames"]
    for name, more in {"with": ["--compile"], "without": []}.items():
        train(*flags, *more, f"--output_dir={tmp_path / name}")
        assert compiled["ok"] > 0 and compiled["ok"] == compiled["total"]
    after, other = result(tmp_path / "with"), result(tmp_path / "without")
    assert distance(after, other) < 1e-3 * distance(after, {key: torch.zeros(()) for key in after})


# Several concepts


@pytest.fixture
def concepts(tmp_path):
    """A list of a dark and a light subject, each with class images."""
    rows = []
    for name, brightness in {"dark": 40, "light": 200}.items():
        for kind, count in {"photos": 2, "class": 3}.items():
            (tmp_path / f"{name} {kind}").mkdir()
            for index in range(count):
                shade = brightness + (20 if kind == "class" else 0)
                Image.new("RGB", (64, 64), (shade,) * 3).save(tmp_path / f"{name} {kind}" / f"{index}.png")
        rows.append(
            {
                "instance_data_dir": str(tmp_path / f"{name} photos"),
                "instance_prompt": f"a <{name}> mug",
                "class_data_dir": str(tmp_path / f"{name} class"),
                "class_prompt": f"a {name} mug",
            }
        )
    (tmp_path / "concepts.json").write_text(json.dumps(rows))
    return tmp_path / "concepts.json"


SEVERAL = ["--method=custom_diffusion", "--modifier_token=<dark>+<light>", "--initializer_token=mug+ball"]
PRIOR = ["--with_prior_preservation", "--num_class_images=3"]


def test_each_photo_of_several_concepts_comes_with_its_prompt(concepts, run_script, script, tmp_path, monkeypatch):
    seen, encoded = [], []
    compute_loss, encode_prompts = script.compute_loss, script.encode_prompts

    def spy_on_loss(args, scheduler, vae, unet, conditions, images, *rest):
        seen.append((conditions["prompt_embeds"].detach(), encoded[-1], images))
        return compute_loss(args, scheduler, vae, unet, conditions, images, *rest)

    def spy_on_prompts(prompts, *rest):
        conditions = encode_prompts(prompts, *rest)
        encoded.append(dict(zip(prompts, conditions["prompt_embeds"], strict=True)))
        return conditions

    monkeypatch.setattr(script, "compute_loss", spy_on_loss)
    monkeypatch.setattr(script, "encode_prompts", spy_on_prompts)
    monkeypatch.setattr(script, "encode_images_once", lambda *_: None)  # images are told apart by their pixels
    flags = [f"--pretrained_model_name_or_path={BASE}", f"--concepts_list={concepts}", *SEVERAL, *PRIOR, "--seed=3"]
    flags += ["--resolution=64", "--train_batch_size=2", "--max_train_steps=6", f"--output_dir={tmp_path / 'model'}"]
    run_script(*flags, "--learning_rate=1e-3")
    prompts = {40: "a <dark> mug", 200: "a <light> mug", 60: "a dark mug", 220: "a light mug"}
    found = set()
    for rows, table, images in seen:
        in_order = [image for kind in zip(*images) for image in kind]
        for row, image in zip(rows, in_order, strict=True):
            prompt = prompts[round((image.mean().item() + 1) * 127.5)]
            assert torch.equal(row, table[prompt])
            found.add(prompt)
    assert found == {*prompts.values()}
    tokens = load_file(tmp_path / "model" / "learned_embeds.safetensors")
    assert "a <dark> mug; a <light> mug" in (tmp_path / "model" / "README.md").read_text()
    assert tokens.keys() == {"<dark>", "<light>"}
    assert not torch.equal(tokens["<dark>"], tokens["<light>"])


def test_concepts_of_one_class_folder_share_its_images(concepts, run_script, tmp_path):
    rows, folder = json.loads(concepts.read_text()), tmp_path / "mugs"
    concepts.write_text(json.dumps([{**row, "class_data_dir": str(folder), "class_prompt": "a mug"} for row in rows]))
    flags = [f"--pretrained_model_name_or_path={BASE}", f"--concepts_list={concepts}", *SEVERAL, *PRIOR]
    run_script(*flags, "--resolution=64", "--max_train_steps=1", f"--output_dir={tmp_path / 'model'}")
    assert len(list(folder.iterdir())) == 3


# One personalization after another


@pytest.fixture(scope="session")
def personalized(tmp_path_factory):
    """A base whose U-Net somebody has trained before."""
    folder = tmp_path_factory.mktemp("personalized")
    pipeline = StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["full", "lora", "custom_diffusion"])
def test_penalty_counts_from_the_anchor_model(method, personalized, train, tmp_path):
    before, anchor = weights(personalized), weights(BASE)
    patterns = {"full": "", "lora": r"attn.\.to_(q|k|v|out\.0)\.weight", "custom_diffusion": r"attn2\.to_[kv]\."}
    keys = [key for key in anchor if re.search(patterns[method], key)]
    expected = sum((before[key].double() - anchor[key].double()).square().mean().item() for key in keys)
    flags = [f"--pretrained_model_name_or_path={personalized}", "--max_train_steps=1", f"--output_dir={tmp_path}"]
    train(*METHODS[method], *flags, f"--lipschitz_anchor_model={BASE}", "--lipschitz_weight=7")
    assert scalars(tmp_path)[0]["lipschitz/penalty"][1] == pytest.approx(7 * expected, rel=1e-4)


def test_drift_of_predictions_counts_from_the_anchor_model(personalized, train, tmp_path):
    flags = [f"--pretrained_model_name_or_path={personalized}", f"--lipschitz_anchor_model={BASE}", "--drift_every=2"]
    flags += ["--lipschitz_weight=1", "--learning_rate=0", "--max_train_steps=1", f"--output_dir={tmp_path}"]
    train(*METHODS["full"], *flags)
    models = [StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32) for folder in (personalized, BASE)]
    plain, _ = prediction_changes(*models, seed=0)
    assert scalars(tmp_path)[0]["drift/prediction"][1] == pytest.approx((plain[0] / plain[1]).mean(), rel=1e-3)


def test_personalized_model_is_pulled_back_to_the_anchor_model(personalized, train, tmp_path):
    flags = [f"--pretrained_model_name_or_path={personalized}", "--max_train_steps=2", f"--output_dir={tmp_path}"]
    flags += ["--lipschitz_mode=proximal", "--lipschitz_weight=1e15"]
    train(*METHODS["full"], *flags, f"--lipschitz_anchor_model={BASE}")
    assert distance(weights(tmp_path), weights(BASE)) < 0.01 * distance(weights(personalized), weights(BASE))


def test_anchor_model_of_another_shape_is_refused(tiny_sd, train, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(f"--lipschitz_anchor_model={tiny_sd}", f"--output_dir={tmp_path / 'new'}")
    assert_one_clear_line(
        capsys.readouterr().err, "has another shape than the base: conv_in.weight of its unet is (16"
    )
    assert not (tmp_path / "new").exists()


# Bad input

CUSTOM = "--method=custom_diffusion"
MISTAKES = {
    "rank with full": ("--rank=8", "--rank is for --method lora, not for --method full"),
    "alpha with full": ("--lora_alpha=8", "--lora_alpha is for --method lora"),
    "dropout with custom diffusion": (f"{CUSTOM} --lora_dropout=0.1", "--lora_dropout is for --method lora"),
    "DoRA with full": ("--use_dora", "--use_dora is for --method lora"),
    "form of LoRA with full": ("--lipschitz_lora=delta", "--lipschitz_lora is for --method lora"),
    "modifier token with LoRA": ("--method=lora --modifier_token=<new1>", "--modifier_token is for --method custom"),
    "initializer token with full": ("--initializer_token=mug", "--initializer_token is for --method custom"),
    "initializer token alone": (f"{CUSTOM} --initializer_token=mug", "--initializer_token needs --modifier_token"),
    "text encoder with custom diffusion": (f"{CUSTOM} --train_text_encoder", "leave out --train_text_encoder"),
    "more new words than initializers": (
        f"{CUSTOM} --modifier_token=<a>+<b> --initializer_token=mug",
        "--initializer_token has 1 words, for 2 of --modifier_token",
    ),
    "new word twice": (f"{CUSTOM} --modifier_token=<a>+<a>", "none of them empty or twice"),
    "empty new word": (f"{CUSTOM} --modifier_token=<a>+", "none of them empty or twice"),
    "new word in no prompt": (f"{CUSTOM} --modifier_token=<a>", "<a> is in no prompt of a photo"),
    "dropout of everything": (
        "--method=lora --lora_dropout=1",
        "--lora_dropout: must be a finite number at least 0 and below 1",
    ),
    "rank of zero": ("--method=lora --rank=0", "--rank: must be a finite number at least 1"),
    "unknown method": ("--method=hypernetwork", "--method: invalid choice"),
    "proximal LoRA": ("--method=lora --lipschitz_mode=proximal", "no closed form for LoRA"),
    "layers and a pull": ("--lipschitz_layers --lipschitz_mode=proximal", "needs --lipschitz_mode coupled"),
    "checkpoint without layers": (
        "--lipschitz_layers --resume_from_checkpoint={full}/checkpoint-2",
        "was trained with --lipschitz_weight 50.0 (now 0.0), --lipschitz_layers 0.0 (now 4.0)",
    ),
    "layers and another reduction": (
        "--lipschitz_layers --lipschitz_reduction=sum",
        "a default weight only for --lipschitz_reduction tensor_mean: give it a number",
    ),
    "layers of factors": ("--method=lora --lipschitz_layers --lipschitz_lora=factors", "and --lipschitz_lora delta"),
    "anchor model without the penalty": ("--lipschitz_anchor_model={base} --lipschitz_weight=0", "does nothing with"),
    "anchor model with DoRA": (
        "--method=lora --use_dora --lipschitz_anchor_model={base}",
        "do without --use_dora",
    ),
    "anchor model that is nowhere": ("--lipschitz_anchor_model={world}/none", "--lipschitz_anchor_model: found no"),
    "anchor model of SDXL": ("--lipschitz_anchor_model={world}/sdxl", "is a StableDiffusionXLPipeline"),
    "concepts and a prompt": ("--concepts_list={world}/concepts.json", "leave out --instance_data_dir"),
    "checkpoint of another method": (
        "--method=lora --resume_from_checkpoint={full}/checkpoint-2",
        "was trained with --method full (now lora)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_in_one_line_before_anything_is_loaded(mistake, train, trained, tmp_path, capsys):
    index = json.loads((BASE / "model_index.json").read_text())
    for name, kind in {"base": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}.items():
        (tmp_path / name).mkdir()  # an index without weights: loading it fails otherwise
        (tmp_path / name / "model_index.json").write_text(json.dumps({**index, "_class_name": kind}))
    places = {"world": tmp_path, "base": tmp_path / "base", "full": trained("full")}
    flags, message = (text.format(**places) for text in MISTAKES[mistake])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train(
            f"--pretrained_model_name_or_path={tmp_path / 'base'}", f"--output_dir={tmp_path / 'new'}", *flags.split()
        )
    assert end.value.code == 2
    assert_one_clear_line(capsys.readouterr().err, message)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "rows, message",
    [
        ("{", "cannot read"),
        ("[]", "is not a list of concepts"),
        ('{"instance_prompt": "x"}', "is not a list of concepts"),
        ('[{"instance_prompt": "x"}]', "concept 0 of"),
        ('["x"]', "lacks instance_data_dir, instance_prompt"),
        ('[{"instance_prompt": "x", "instance_data_dir": "nowhere"}]', "--concepts_list: there is no folder nowhere"),
    ],
)
def test_bad_concepts_end_in_one_line(rows, message, run_script, tmp_path, capsys):
    (tmp_path / "concepts.json").write_text(rows)
    flags = [f"--pretrained_model_name_or_path={BASE}", f"--concepts_list={tmp_path / 'concepts.json'}"]
    with pytest.raises(SystemExit) as end:
        run_script(*flags, f"--output_dir={tmp_path / 'new'}")
    assert end.value.code == 2
    assert_one_clear_line(capsys.readouterr().err, message)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rank=5"], "was trained with --rank 3 (now 5): use the same"),
        (["--train_text_encoder"], "was trained with no --train_text_encoder: use"),
        (["--use_dora"], "was trained with no --use_dora: use"),
    ],
)
def test_checkpoint_of_another_lora_is_refused(flags, message, trained, train, tmp_path, capsys):
    checkpoint = f"--resume_from_checkpoint={trained('lora') / 'checkpoint-2'}"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train(*METHODS["lora"], "--lipschitz_weight=50", *flags, checkpoint, f"--output_dir={tmp_path / 'new'}")
    assert_one_clear_line(capsys.readouterr().err, message)


def test_new_word_that_the_base_knows_is_refused(train, tmp_path, capsys):
    flags = ["--method=custom_diffusion", "--modifier_token=mug</w>", "--instance_prompt=a mug</w>"]
    with pytest.raises(SystemExit):
        train(*flags, f"--output_dir={tmp_path / 'new'}")
    assert_one_clear_line(capsys.readouterr().err, "mug</w> is not a new word for the base")
