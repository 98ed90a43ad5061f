# The two training scripts, and the launcher, under accelerate's FSDP2, on two processes; what the scripts tell
# DeepSpeed, which CI does not install. The penalty itself is in test_engines.py.
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DeepSpeedPlugin, DistributedType
from accelerate.data_loader import BatchSamplerShard
from diffusers import DiffusionPipeline
from engine_cases import saved_weights
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from lipschitz_reg import Recording, record_pipeline


ROOT = Path(__file__).parents[1]
# accelerate enables FSDP only with GPUs, but its FSDP2 code also runs on CPUs.
SHARDED = """
import importlib, sys
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState

def sharded(version, **options):
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=int(version[0]), auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BasicTransformerBlock"], cpu_ram_efficient_loading=version.endswith("+"),
        state_dict_type="SHARDED_STATE_DICT",
    )
    if options.get("mixed_precision", "no") != "no":
        plugin.set_mixed_precision(options["mixed_precision"])
    accelerator = Accelerator(fsdp_plugin=plugin, **options)
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator
"""
# One engine after the other on the same processes: to import all again for each takes longer than to train.
DRIVER = """
import functools, importlib, os, sys
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from sharded import sharded

script, (output, *engines), flags = importlib.import_module(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
script.DRAWING_STEPS = 3
end, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, lambda *_: None
for engine in engines:
    AcceleratorState._reset_state(reset_partial_state=True)
    version, _, precision = engine.partition(" ")
    script.Accelerator = functools.partial(sharded, version) if version != "0" else Accelerator
    options = [f"--output_dir={output}/{engine}", f"--mixed_precision={precision or 'no'}"]
    script.main(script.parse_args([*flags, *options]))
torch.distributed.barrier()
end()
# A process that had ended was once aborted while Python was being torn down ("terminate called without an active
# exception"), probably because Gloo's threads still held tensors: leave without tearing it down.
sys.stderr.flush()
os._exit(0)
"""
DDP, FSDP2, BF16 = "0", "2", "2 bf16"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run(command, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def launch(photos, tmp_path_factory):
    """Runs a script on two processes, `launch(script, engines, output, base, *flags)`; returns stderr."""
    folder = tmp_path_factory.mktemp("sharded")
    folder.joinpath("sharded.py").write_text(SHARDED)
    folder.joinpath("driver.py").write_text(DRIVER)
    folder.joinpath("prompts.txt").write_text("a photo of a cat\n\na red house\n")

    def call(script, engines, output, base, *flags):
        command = [*TORCHRUN, "driver.py", script, ",".join([str(output), *engines])]
        command += [f"--pretrained_model_name_or_path={base}", f"--instance_data_dir={photos}"]
        command += ["--instance_prompt=a photo of sks dog", "--resolution=16", "--train_batch_size=1", "--seed=7"]
        command += ["--learning_rate=1e-3", f"--lipschitz_prompts_file={folder}/prompts.txt"]
        return run([*command, *flags], folder)

    return call


SPACES = ["--lipschitz_weight=1", "--lipschitz_layers=1", "--lipschitz_predictions=1"]


def assert_near(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_full_fine_tuning_ends_where_ddp_ends(launch, script, tiny_sd, tmp_path, capsys):
    """With drift, pictures and a budget that takes something back, which run the sharded model; then resumed."""
    flags = [*SPACES, "--drift_every=2", "--drift_budget=0.002", "--checkpointing_steps=2", "--max_train_steps=4"]
    flags += ["--validation_prompt=a dog", "--num_validation_images=1", "--validation_steps=2"]
    said = launch("train_dreambooth_lipschitz", (DDP, FSDP2), tmp_path, tiny_sd, *flags)
    assert said.count("of the change of weights is kept") == said.count("Saved the result") == 2, said
    ended = saved_weights(tmp_path / FSDP2)
    assert_near(ended, saved_weights(tmp_path / DDP))
    (file,) = Path(tiny_sd, "unet").glob("*.safetensors")
    unet = DiffusionPipeline.from_pretrained(tmp_path / FSDP2).unet.state_dict()
    assert any(not torch.equal(unet[name], value) for name, value in load_file(file).items())

    flags += ["--resume_from_checkpoint=latest"]
    shutil.rmtree(tmp_path / FSDP2 / "checkpoint-4")
    launch("train_dreambooth_lipschitz", (FSDP2,), tmp_path, tiny_sd, *flags)
    assert all(torch.equal(value, ended[name]) for name, value in saved_weights(tmp_path / FSDP2).items())
    with pytest.raises(SystemExit):
        script.check_settings(tmp_path / FSDP2 / "checkpoint-4", {"engine": "DDP or one process"})
    assert "was trained with FSDP2 as its engine: use the same" in capsys.readouterr().err


def test_a_lora_of_sdxl_ends_where_ddp_ends(launch, tiny_sdxl, tmp_path):
    flags = [*SPACES, "--method=lora", "--rank=2", "--max_train_steps=3"]
    launch("train_dreambooth_lipschitz_sdxl", (DDP, FSDP2, BF16), tmp_path, tiny_sdxl, *flags)
    expected = saved_weights(tmp_path / DDP)
    assert_near(saved_weights(tmp_path / FSDP2), expected)
    # In bfloat16, what began at 0 is near where float32 takes it: a tenth of the squared distance.
    ended = saved_weights(tmp_path / BF16)
    pairs = [(ended[name], value) for name, value in expected.items() if "lora_B" in name]
    moved, away = (sum(x.square().sum() for x in xs) for xs in ([b for _, b in pairs], [a - b for a, b in pairs]))
    assert 0 < away < 0.1 * moved


RECORD = """
import sys
import torch
from diffusers import DiffusionPipeline
from lipschitz_reg import record_pipeline

torch.distributed.init_process_group("gloo")
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)
shared = record_pipeline(
    pipeline, ["a cat", "a dog", "a house"], ["a tree"], num_inference_steps=2, distributed=True, progress=False
)
shared.save(f"{torch.distributed.get_rank()}.safetensors")
torch.distributed.destroy_process_group()
"""


def test_processes_share_the_prompts_of_a_recording(tiny_sd, tmp_path):
    """Three prompts and a held-out one, which only one process draws: they get what one process records."""
    tmp_path.joinpath("record.py").write_text(RECORD)
    run([*TORCHRUN, "record.py", str(tiny_sd)], tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tiny_sd, dtype=torch.float32)
    alone = record_pipeline(pipeline, ["a cat", "a dog", "a house"], ["a tree"], num_inference_steps=2, progress=False)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys() and all(torch.equal(second[name], value) for name, value in first.items())
    shared = Recording.load(tmp_path / "0.safetensors", pipeline.unet)
    assert shared.share() == alone.share() and shared.drawn == alone.drawn and shared.splits == alone.splits
    assert [call.held_out for call in shared.calls] == [call.held_out for call in alone.calls]
    for one, other in zip(shared.calls, alone.calls, strict=True):
        torch.testing.assert_close(one.answer, other.answer, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.args[0], other.args[0], rtol=1e-5, atol=1e-6)
    assert shared.layers.keys() == alone.layers.keys()
    for name, moment in alone.layers.items():
        matrices = [m.root @ m.root.T + m.rest * torch.eye(len(m.root)) for m in (shared.layers[name], moment)]
        torch.testing.assert_close(*matrices, rtol=1e-3, atol=1e-4 * matrices[1].abs().max().item())


REFUSED = """
import sys
from accelerate.state import AcceleratorState
from sharded import sharded
import train_dreambooth_lipschitz as script

refused = [["--compile"], ["--use_8bit_adam"], ["--train_text_encoder"]]
refused += [["--method=custom_diffusion", "--modifier_token=<a>"]]
for engine, *flags in ["1"], *(["2", *flags] for flags in refused), ["2+"]:
    AcceleratorState._reset_state(reset_partial_state=True)
    script.Accelerator = lambda **options: sharded(engine, **options)
    try:
        script.main(script.parse_args([*sys.argv[1:], *flags]))
    except SystemExit:
        pass
"""


def test_what_it_cannot_do_is_refused(tiny_sd, photos, tmp_path):
    tmp_path.joinpath("sharded.py").write_text(SHARDED)
    tmp_path.joinpath("refused.py").write_text(REFUSED)
    flags = [f"--pretrained_model_name_or_path={tiny_sd}", f"--instance_data_dir={photos}"]
    flags += ["--instance_prompt=a photo of <a>", "--output_dir=model"]
    said = run([sys.executable, "refused.py", *flags], tmp_path)
    lines = [line.split("error: ")[1] for line in said.splitlines() if "error: " in line]
    expected = ["FSDP1 is not supported here: use FSDP2", "--compile is not supported with FSDP2"]
    expected += ["--use_8bit_adam is not supported with FSDP2"]
    expected += ["--train_text_encoder: with FSDP2"]
    expected += ["--modifier_token: with FSDP2", "FSDP2 needs fsdp_cpu_ram_efficient_loading: false"]
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("photos", [1, 5, 8])
def test_in_several_processes_each_photo_of_an_epoch_counts_once(script, photos, size, processes):
    """With the batches that accelerate shares out: their weighted mean is that over the batches of one process."""
    sampler = script.EpochSampler(photos, seed=7)
    order = [index for index, _ in sampler]
    shards = []
    for rank in range(processes):
        batches = BatchSampler(sampler, size, drop_last=False)
        accelerator = SimpleNamespace(num_processes=processes, process_index=rank, device="cpu")
        shard = BatchSamplerShard(batches, num_processes=processes, process_index=rank)
        rows = [[index for index, _ in batch] for batch in shard]
        shards.append([(row, sampler.weights(accelerator, step, len(row))) for step, row in enumerate(rows)])
    together = size * processes
    for step, parts in enumerate(zip(*shards, strict=True)):
        expected = order[step * together : (step + 1) * together]
        counts = torch.zeros(photos)
        for row, weights in parts:
            counts.index_add_(0, torch.tensor(row), weights / len(row) / processes)
        torch.testing.assert_close(
            counts, torch.zeros(photos).index_fill(0, torch.tensor(expected), 1 / len(expected))
        )


PHOTOS = ["--pretrained_model_name_or_path=base", "--instance_data_dir=photos", "--instance_prompt=a photo of sks dog"]
DEEPSPEED_MISTAKES = {
    "no ZeRO": ([], {"zero_stage": 0}, "DeepSpeed without ZeRO is not supported here"),
    "its own optimizer": (
        [],
        {"hf_ds_config": {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}},
        "DeepSpeed's configuration has its own optimizer",
    ),
    "a budget": (["--drift_budget=0.1"], {}, "--drift_budget is not supported with DeepSpeed"),
    "predictions, without weights": (
        ["--lipschitz_predictions=1"],
        {"zero_stage": 3},
        "--lipschitz_predictions is not supported with ZeRO 3",
    ),
    "weights in host memory": (
        ["--lipschitz_layers=1"],
        {"zero_stage": 3, "offload_param_device": "cpu"},
        "DeepSpeed's offload_param is not",
    ),
    "8-bit Adam": (["--use_8bit_adam"], {}, "--use_8bit_adam is not supported with ZeRO 2"),
    "two models": (["--train_text_encoder"], {}, "--train_text_encoder: with ZeRO 2"),
}


def with_deepspeed(**options):
    """What `check_engine` reads of an `Accelerator` of two processes whose configuration is for DeepSpeed."""
    state = SimpleNamespace(deepspeed_plugin=DeepSpeedPlugin(**options))
    kind = DistributedType.DEEPSPEED
    return SimpleNamespace(state=state, distributed_type=kind, num_processes=2, mixed_precision="bf16")


@pytest.mark.parametrize("name", DEEPSPEED_MISTAKES)
def test_what_cannot_be_with_deepspeed_is_refused(script, capsys, name):
    flags, options, message = DEEPSPEED_MISTAKES[name]
    with pytest.raises(SystemExit):
        script.check_engine(script.parse_args([*PHOTOS, *flags]), with_deepspeed(**options))
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_prodigy_which_would_find_a_rate_for_each_shard_is_refused(sdxl_script, capsys):
    with pytest.raises(SystemExit):
        sdxl_script.check_engine(sdxl_script.parse_args([*PHOTOS, "--optimizer=prodigy"]), with_deepspeed())
    assert "--optimizer prodigy is not supported with ZeRO 2" in capsys.readouterr().err


OWN = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}, "gradient_clipping": "auto"}


@pytest.mark.parametrize(
    "given", [{}, {"gradient_accumulation_steps": 7, "gradient_clipping": 0.5}, {"hf_ds_config": OWN}]
)
def test_deepspeed_does_what_the_flags_say(script, given):
    """Whatever stands in its own configuration. Trainings under it: benchmarks/engines.py."""
    flags = ["--train_batch_size=3", "--gradient_accumulation_steps=2", "--max_grad_norm=0.1", "--lipschitz_layers=1"]
    accelerator = with_deepspeed(**given)
    script.check_engine(script.parse_args([*PHOTOS, *flags]), accelerator)
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    expected = {"train_batch_size": 12, "gradient_accumulation_steps": 2, "gradient_clipping": 0.1}
    assert {name: config[name] for name in expected} == expected
    assert "auto" not in config["zero_optimization"].values()


# A training loop like those of diffusers' scripts, without the penalty.
TRAIN = """
import sys
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import save_file
from sharded import sharded

engine, base, resume = sys.argv[1:]
accelerator = sharded(engine) if engine != "0" else Accelerator()
model = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
torch.manual_seed(0)
model.requires_grad_(False)
model.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"]))
model.conv_in.requires_grad_(True)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
model, optimizer = accelerator.prepare(model, optimizer)
begin = 0
if resume == "resume":
    accelerator.load_state(f"{engine}-start")
    begin = 2
for step in range(begin, 4):
    generator = torch.Generator().manual_seed(10 * step + accelerator.process_index)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    noise, text = torch.randn(latents.shape, generator=generator), torch.randn(1, 5, 16, generator=generator)
    loss = (model(latents + noise, torch.tensor([500]), text).sample - noise).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    if step == 1 and resume != "resume":
        accelerator.save_state(f"{engine}-start")
weights = accelerator.get_state_dict(model)
if accelerator.is_main_process:
    save_file({name: value.contiguous() for name, value in weights.items()}, f"{engine}-{resume}.safetensors")
accelerator.wait_for_everyone()  # a process that leaves right after its last collective may abort in Gloo's threads
accelerator.end_training()  # ends the group of processes
"""


def test_the_launcher_follows_parameters_into_fsdp2(tiny_sd, tmp_path):
    """Anchors are taken before sharding, all three spaces work after it, and checkpoints resume."""
    tmp_path.joinpath("sharded.py").write_text(SHARDED)
    tmp_path.joinpath("train.py").write_text(TRAIN)
    pipeline = DiffusionPipeline.from_pretrained(tiny_sd)
    recording = record_pipeline(pipeline, ["a photo of a cat"], ["a house"], num_inference_steps=2, progress=False)
    recording.save(tmp_path / "base.safetensors")
    options = ["-m", "lipschitz_reg.run", "--lipschitz_weight=50", "--lipschitz_layers=1", "--lipschitz_predictions=1"]
    options += ["--lipschitz_recording=base.safetensors", "train.py"]
    last = {}
    for engine, resume in (DDP, "start"), (FSDP2, "start"), (FSDP2, "resume"):
        said = run([*TORCHRUN, *options, engine, str(tiny_sd), resume], tmp_path)
        (last[engine, resume],) = re.findall(
            "4 steps; distance from the base (.*); drift of the predictions (.*)", said
        )
    assert len(set(last.values())) == 1, last
    ended = load_file(tmp_path / "2-start.safetensors")
    assert_near(ended, load_file(tmp_path / "0-start.safetensors"))
    assert_near(load_file(tmp_path / "2-resume.safetensors"), ended)
