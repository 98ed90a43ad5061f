# The two training scripts under accelerate's FSDP2, on two processes. The penalty itself is in test_engines.py.
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file


ROOT = Path(__file__).parents[1]
# accelerate looks for FSDP only where there are GPUs; what it does then works on CPUs, too.
DRIVER = """
import importlib, sys
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState

def sharded(**options):
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=int(sys.argv[2]), auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BasicTransformerBlock"], cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = Accelerator(fsdp_plugin=plugin, **options)
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator

script = importlib.import_module(sys.argv[1])
if int(sys.argv[2]):
    script.Accelerator = sharded
script.main(script.parse_args(sys.argv[3:]))
"""
DDP, FSDP1, FSDP2 = "0", "1", "2"


@pytest.fixture(scope="module")
def launch(photos, tmp_path_factory):
    """Runs a script on two processes, `launch(script, engine, base, *flags)`; returns stderr, or that of a failure."""
    folder = tmp_path_factory.mktemp("sharded")
    folder.joinpath("driver.py").write_text(DRIVER)
    folder.joinpath("prompts.txt").write_text("a photo of a cat\n\na red house\n")

    def call(script, engine, base, *flags, fails=False):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "driver.py"]
        command += [script, engine, f"--pretrained_model_name_or_path={base}", f"--instance_data_dir={photos}"]
        command += ["--instance_prompt=a photo of sks dog", "--resolution=16", "--train_batch_size=1", "--seed=7"]
        command += ["--learning_rate=1e-3", f"--lipschitz_prompts_file={folder}/prompts.txt"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run([*command, *flags], cwd=folder, env=environment, capture_output=True, text=True)
        assert (done.returncode != 0) == fails, done.stderr
        return done.stderr

    return call


def weights(folder):
    """All that a run saved, but for checkpoints and recordings."""
    files = [path for path in folder.rglob("*.safetensors") if "-" not in str(path.relative_to(folder))]
    return {f"{path.relative_to(folder)} {key}": value for path in files for key, value in load_file(path).items()}


SPACES = ["--lipschitz_weight=1", "--lipschitz_layers=1", "--lipschitz_predictions=1"]


def assert_near(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_full_fine_tuning_ends_where_ddp_ends(launch, tiny_sd, tmp_path):
    """With drift, pictures and a budget that takes something back, all of which run the sharded model; and resumed."""
    flags = [*SPACES, "--drift_every=2", "--drift_budget=0.002", "--checkpointing_steps=2", "--max_train_steps=4"]
    flags += ["--validation_prompt=a dog", "--num_validation_images=1", "--validation_steps=2"]
    for engine in (DDP, FSDP2):
        said = launch("train_dreambooth_lipschitz", engine, tiny_sd, *flags, f"--output_dir={tmp_path / engine}")
        assert "of the change of weights is kept" in said and said.count("Saved the result") == 1, said
    ended = weights(tmp_path / FSDP2)
    assert_near(ended, weights(tmp_path / DDP))
    (file,) = Path(tiny_sd, "unet").glob("*.safetensors")
    unet = DiffusionPipeline.from_pretrained(tmp_path / FSDP2).unet.state_dict()
    assert any(not torch.equal(unet[name], value) for name, value in load_file(file).items())

    flags += ["--resume_from_checkpoint=latest", f"--output_dir={tmp_path / FSDP2}"]
    shutil.rmtree(tmp_path / FSDP2 / "checkpoint-4")
    launch("train_dreambooth_lipschitz", FSDP2, tiny_sd, *flags)
    assert all(torch.equal(value, ended[name]) for name, value in weights(tmp_path / FSDP2).items())
    said = launch("train_dreambooth_lipschitz", DDP, tiny_sd, *flags, fails=True)
    assert "was trained with FSDP2: use the same" in said


def test_a_lora_of_sdxl_ends_where_ddp_ends(launch, tiny_sdxl, tmp_path):
    flags = [*SPACES, "--method=lora", "--rank=2", "--max_train_steps=3"]
    for engine in (DDP, FSDP2):
        launch("train_dreambooth_lipschitz_sdxl", engine, tiny_sdxl, *flags, f"--output_dir={tmp_path / engine}")
    assert_near(weights(tmp_path / FSDP2), weights(tmp_path / DDP))


def test_what_it_cannot_do_is_refused(launch, tiny_sd, tmp_path):
    flags = ["--lipschitz_layers", f"--output_dir={tmp_path / 'model'}"]
    said = launch("train_dreambooth_lipschitz", FSDP1, tiny_sd, *flags, fails=True)
    assert "FSDP1 is not supported here: use FSDP2" in said
    said = launch("train_dreambooth_lipschitz", FSDP2, tiny_sd, *flags, "--train_text_encoder", fails=True)
    assert "--train_text_encoder: with FSDP2" in said
    assert not (tmp_path / "model").exists()
