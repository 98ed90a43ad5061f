# Recordings of whole pipelines: the command, the function under it, and what comes of it for U-Nets and transformers.
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import make_text_config, make_tokenizer, make_vae

from lipschitz_reg import LipschitzRegularizer, Recording, draw_held_out, record, record_pipeline
from lipschitz_reg.pipelines import denoiser_of


PROMPTS = ["a cat", "a dog", "a house", "a bird", "a tree"]
FAST = ["--num_inference_steps=2", "--rank=8", "--height=16", "--width=16"]


def make_t5(width):
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = [(letter, -1.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    vocab = [(special, 0.0) for special in ("<pad>", "</s>", "<unk>")] + letters
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=16)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config), tokenizer


@pytest.fixture(scope="module")
def tiny_sd3(tmp_path_factory):
    """Folder of a `StableDiffusion3Pipeline` of 16 x 16 pixels."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    clip = [CLIPTextModelWithProjection(make_text_config(tokenizer, projection_dim=8)) for _ in range(2)]
    t5, t5_tokenizer = make_t5(32)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    )
    folder = tmp_path_factory.mktemp("tiny-sd3")
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=make_vae(),
        text_encoder=clip[0],
        tokenizer=tokenizer,
        text_encoder_2=clip[1],
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_flux(tmp_path_factory):
    """Folder of a `FluxPipeline` with embedded guidance."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    t5, t5_tokenizer = make_t5(16)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    folder = tmp_path_factory.mktemp("tiny-flux")
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=make_vae(),
        text_encoder=CLIPTextModel(make_text_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def load(folder):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)


def call(monkeypatch, *flags):
    """The command in this process: an import of its file would not be it."""
    monkeypatch.setattr(sys, "argv", ["record", *map(str, flags)])
    runpy.run_module("lipschitz_reg.record", run_name="__main__")


def record_quickly(pipeline, prompts=PROMPTS[:2], held_out_prompts=PROMPTS[2:3], **options):
    options = {"num_inference_steps": 2, "rank": 4, "progress": False, **options}
    return record_pipeline(pipeline, prompts, held_out_prompts, **options)


def test_the_command_records_a_pipeline_and_says_what(tiny_sd, prompts_file, tmp_path):
    file = tmp_path / "new" / "base.safetensors"
    command = [sys.executable, "-m", "lipschitz_reg.record", tiny_sd, f"--prompts={prompts_file}", f"--output={file}"]
    done = subprocess.run([*command, *FAST], capture_output=True, text=True, check=True)
    pipeline = load(tiny_sd)
    recording = Recording.load(file, pipeline.unet)
    # PNDM makes one call more than it has steps. Every second prompt measures.
    assert [call.held_out for call in recording.calls] == [False] * 9 + [True] * 6
    assert recording.drawn["held_out_prompts"] == PROMPTS[1::2]
    assert recording.guidance_scale == 7.5
    assert recording.layers.keys() == {name for name, _ in pipeline.unet.named_parameters()}
    assert recording.drift().dial < 1e-5
    line = f"{file}: {len(recording.layers)} layers with 100% of the weights, 15 calls, "
    assert done.stdout == f"{line}{file.stat().st_size / 1e6:.1f} MB, {recording.digest()}\n"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def train(model, recording, weight):
    """Ten steps of a plain loop towards noise; returns the drift."""
    recording.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    LipschitzRegularizer(optimizer, weight=weight, recording=recording)
    example = recording.calls[0]
    target = torch.randn(example.answer.shape, generator=torch.Generator().manual_seed(0))
    for _ in range(10):
        (example.again(model) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return recording.drift().dial


@pytest.mark.parametrize("name", ["tiny_sd3", "tiny_flux"])
def test_a_transformer_that_trains_on_its_recording_drifts_less(
    name, prompts_file, tmp_path, monkeypatch, request, capsys
):
    folder = request.getfixturevalue(name)
    file = tmp_path / "base.safetensors"
    call(monkeypatch, folder, f"--prompts={prompts_file}", f"--output={file}", *FAST)
    drifts = []
    for weight in ({"layers": 4.0, "predictions": 3.0}, 0.0):
        transformer = load(folder).transformer
        recording = Recording.load(file, transformer)
        drifts.append(train(transformer, recording, weight))
    assert "66 layers with 100% of the weights, 10 calls" in capsys.readouterr().out
    assert drifts[0] < 0.8 * drifts[1]


def test_text_encoders_are_recorded_under_their_names(tiny_sdxl):
    pipeline = load(tiny_sdxl)
    recording = record_quickly(pipeline, text_encoders=True)
    for name in ("text_encoder", "text_encoder_2"):
        assert recording.models[name] is getattr(pipeline, name)
        assert any(layer.startswith(f"{name}.") and "q_proj" in layer for layer in recording.layers)
    assert recording.guidance_scale == 5.0


def test_the_calls_of_a_prompt_do_not_depend_on_the_others(tiny_sd):
    pipeline = load(tiny_sd)
    one, other = (record_quickly(pipeline, [first, "a dog"]) for first in ("a cat", "a house of stone"))
    for a, b in zip(one.calls[3:], other.calls[3:], strict=True):
        assert torch.equal(a.answer, b.answer)
    assert not torch.equal(one.calls[0].answer, other.calls[0].answer)


def test_recording_decodes_nothing_and_leaves_no_trace(tiny_sd, monkeypatch):
    pipeline = load(tiny_sd)
    pipeline.set_progress_bar_config(desc="mine")
    monkeypatch.setattr(pipeline.vae, "decode", lambda *_, **__: pytest.fail("pictures were decoded"))
    state = torch.get_rng_state()
    record_quickly(pipeline)
    assert torch.equal(torch.get_rng_state(), state)
    assert pipeline._progress_bar_config == {"desc": "mine"}


def test_held_out_prompts_can_be_drawn_again_with_a_text_encoder_that_changed(tiny_sd):
    pipeline = load(tiny_sd)
    recording = record_quickly(pipeline)
    assert recording.drift(run=lambda: draw_held_out(pipeline, recording)).dial == 0
    with torch.no_grad():
        for parameter in pipeline.text_encoder.parameters():
            parameter.mul_(1.1)
    assert recording.drift(run=lambda: draw_held_out(pipeline, recording)).dial > 1e-4
    assert recording.drift().dial == 0


def test_importing_the_command_does_not_hide_the_function():
    import lipschitz_reg.record

    sys.modules.pop("lipschitz_reg.record")  # or `call` would warn
    assert lipschitz_reg.record is record


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"--prompts": "nowhere"}, "--prompts: cannot read nowhere: No such file or directory."),
        ({"--prompts": "empty"}, "--prompts: empty is empty."),
        ({"--prompts": "binary"}, "--prompts: binary is not a text file in UTF-8."),
        ({"--prompts": "one"}, "--prompts: one has one prompt, and every second one only measures"),
        ({"--held_out_prompts": "three"}, "this one is among the others too: a cat"),
        ({"--output": "."}, "--output: . is a folder: name a file in it."),
        ({"--output": "three/base.safetensors"}, "--output: cannot write to "),
        ({"PIPELINE": "."}, "PIPELINE: . is not a diffusers pipeline: it has no model_index.json."),
        ({"PIPELINE": "three"}, "PIPELINE: three is a file: give the folder of a diffusers pipeline"),
        ({"PIPELINE": "no/such/folder"}, "PIPELINE: there is no no/such/folder."),
        ({"PIPELINE": "no/model"}, "PIPELINE: cannot load no/model: "),
        ({"--rank": "0"}, "argument --rank: must be a whole number of at least 1, not '0'"),
        ({"--guidance_scale": "nan"}, "argument --guidance_scale: must be a number, not 'nan'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, message, prompts_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("empty").write_text("\n \n")
    tmp_path.joinpath("binary").write_bytes(b"\xff\xfe\xfd")
    tmp_path.joinpath("three").write_text("\n".join(PROMPTS[:3]))
    tmp_path.joinpath("one").write_text(PROMPTS[0])
    given = {"PIPELINE": "no/model", "--prompts": prompts_file, "--output": "base.safetensors", **flags}
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, given.pop("PIPELINE"), *(f"{flag}={value}" for flag, value in given.items()))
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert message in error and error.count("\n") == 1
    assert not tmp_path.joinpath("base.safetensors").exists()


def test_what_cannot_be_recorded_is_refused(tiny_sd):
    pipeline = load(tiny_sd)
    with pytest.raises(ValueError, match="There are no prompts"):
        record_quickly(pipeline, [])
    with pytest.raises(ValueError, match="There are no held-out prompts"):
        record_quickly(pipeline, held_out_prompts=[])
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no num_frames"):
        record_quickly(pipeline, num_frames=3)
    with pytest.raises(ValueError, match="neither a unet nor a transformer to record. It has: prior"):
        denoiser_of(SimpleNamespace(components={"prior": pipeline.vae}))
    with pytest.raises(ValueError, match="does not draw from a prompt"):
        denoiser_of(type("Pipeline", (), {"unet": pipeline.unet, "__call__": lambda self, image: None})())
    with pytest.raises(ValueError, match="does not know its prompts"):
        draw_held_out(pipeline, Recording({"": pipeline.unet}))
