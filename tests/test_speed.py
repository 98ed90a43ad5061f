# What makes the scripts fast, as claims that no clock decides: what is imported when, what is computed once, and that
# the results are the same. The times are in docs/benchmarks.md.
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
SCRIPTS = ["train_dreambooth_lipschitz.py", "train_dreambooth_lipschitz_sdxl.py", "evaluate_dreambooth.py"]
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "torchao", "datasets", "wandb"}


# The start


def end_of(script, *flags):
    """What the script says, its exit code, and which heavy packages it had imported by its end."""
    code = "import atexit, json, runpy, sys\n"
    code += f"atexit.register(lambda: print('\\n' + json.dumps(sorted({HEAVY!r} & set(sys.modules)))))\n"
    code += f"sys.argv = {[script, *map(str, flags)]!r}\nrunpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    *told, imported = done.stdout.splitlines()
    return "\n".join([*told, done.stderr]), done.returncode, json.loads(imported)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy(script):
    told, code, imported = end_of(script, "--help")
    assert "--output_dir" in told and code == 0 and imported == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_are_checked_before_the_heavy_imports(script):
    told, code, imported = end_of(script, "--no_such_flag")
    assert f"{script}: error: " in told and code == 2 and imported == []


MISTAKES = {
    "no folder of photos": ("--instance_data_dir=nowhere", "--instance_data_dir: there is no folder nowhere"),
    "a base that is none": (
        "--pretrained_model_name_or_path={tmp}",
        "--pretrained_model_name_or_path: found no Stable",
    ),
    "a base in one broken file": ("--pretrained_model_name_or_path={tmp}/base.safetensors", "is broken"),
    "a photo that is none": ("--instance_data_dir={tmp}/photos", "1.png is not an image"),
    "no package": ("--report_to=aim", "--report_to=aim needs aim"),
    "no prompts": (
        "--drift_every=1 --lipschitz_prompts_file=nowhere",
        "--lipschitz_prompts_file: cannot read nowhere",
    ),
    "DeepSpeed": ("", "DEEPSPEED shards the weights"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("script", SCRIPTS[:2])
def test_inputs_are_checked_before_the_heavy_imports(script, name, tiny_sd, tiny_sdxl, photos, tmp_path, monkeypatch):
    flags, message = MISTAKES[name]
    tmp_path.joinpath("photos").mkdir()
    for file in ("photos/1.png", "base.safetensors"):
        tmp_path.joinpath(file).write_text("nothing of the kind")
    if name == "DeepSpeed":
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    base = tiny_sdxl if "sdxl" in script else tiny_sd
    needed = [f"--pretrained_model_name_or_path={base}", f"--instance_data_dir={photos}", "--instance_prompt=sks"]
    given = flags.format(tmp=tmp_path).split()
    told, code, imported = end_of(script, *needed, f"--output_dir={tmp_path / 'model'}", *given)
    assert message in told and code == 2 and imported == []
    assert not tmp_path.joinpath("model").exists()


def test_trackers_are_those_of_accelerate(script):
    from accelerate.utils import LoggerType

    assert set(script.TRACKERS) == {kind.value for kind in LoggerType} - {"all"}
