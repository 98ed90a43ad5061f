# The wheel as a user gets it: only lipschitz_reg, needing torch alone and quick to import; and the method card's code.
# What the package computes is in the tests of its modules.
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy: setuptools leaves build/ and *.egg-info/ behind.
    source = folder / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).is_file():
            (source / name).write_bytes((ROOT / name).read_bytes())
    (source / "lipschitz_reg").mkdir()
    for file in (ROOT / "lipschitz_reg").glob("*.py"):
        (source / "lipschitz_reg" / file.name).write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "-q", "-w", folder]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel):
    target = wheel.parent / "installed"
    command = [sys.executable, "-m", "pip", "install", wheel, "--no-deps", "--no-index", "-q", "--target", target]
    subprocess.run(command, check=True)
    return target


def run(folder, code):
    """Run code in a process of its own, elsewhere, with the packages of `folder` before all others."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wheel_holds_lipschitz_reg_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"lipschitz_reg", f"lipschitz_reg-{wheel.name.split('-')[1]}.dist-info"}
    assert {Path(name).name for name in names if name.startswith("lipschitz_reg/")} == {
        path.name for path in (ROOT / "lipschitz_reg").glob("*.py")
    }


def test_wheel_requires_torch_only(wheel):
    name = next(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("METADATA"))
    metadata = zipfile.ZipFile(wheel).read(name).decode()
    requirements = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    assert [line for line in requirements if "extra ==" not in line] == ["torch>=2.4"]
    extras = set(re.findall(r"^Provides-Extra: (.*)$", metadata, re.MULTILINE))
    options = {"bitsandbytes", "datasets", "heif", "wandb", "prodigy", "torchao", "xformers"}
    assert extras == {"scripts", "demo", "test"} | options


def test_installed_wheel_trains_with_torch_alone(installed):
    """Of the modules that importing the package adds, all are Python's own, torch's or the package's."""
    code = """
import torch
blocked = "diffusers transformers accelerate peft datasets bitsandbytes wandb PIL safetensors".split()
sys.modules.update(dict.fromkeys(blocked))  # importing one of them fails now
before = set(sys.modules)
import lipschitz_reg
added = {name.split(".")[0] for name in set(sys.modules) - before}
assert added <= sys.stdlib_module_names | {"torch", "lipschitz_reg"}, added

layer = torch.nn.Linear(3, 3)
with lipschitz_reg.record(layer) as recording:
    layer(torch.ones(1, 3))
    with recording.held_out():
        layer(torch.ones(1, 3))
optimizer = torch.optim.AdamW(layer.parameters())
weight = {"parameters": 1.0, "layers": 1.0, "predictions": 1.0}
regularizer = lipschitz_reg.LipschitzRegularizer(optimizer, weight=weight, recording=recording)
for _ in range(2):
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
assert regularizer.metrics()["lipschitz/distance"] > 0 and regularizer.penalty() > 0
assert recording.drift().prediction > 0 and regularizer.state_dict()["recording"]
print(lipschitz_reg.__file__, lipschitz_reg.__version__)
"""
    file, version = run(installed, code).split()
    assert Path(file).is_relative_to(installed)
    assert (installed / f"lipschitz_reg-{version}.dist-info").is_dir()


def test_import_takes_less_than_50_ms_on_top_of_torch(installed):
    code = "import time, torch; t = time.perf_counter(); import lipschitz_reg; print(time.perf_counter() - t)"
    # The best of three, in processes of their own: a busy machine is no fault of the package.
    assert min(float(run(installed, code)) for _ in range(3)) < 0.05


def test_messages_name_no_flag_of_a_script():
    """Who uses the package alone has no command line but those of its own commands."""
    for path in (ROOT / "lipschitz_reg").glob("*.py"):
        text = path.read_text()
        if "argparse" not in text and path.name not in ("launcher.py", "found.py"):  # parts of run.py
            assert not re.findall(r"--[a-z]\w*", text), path.name


def test_code_of_the_method_card_runs():
    card = (ROOT / "docs" / "lipschitz_reg.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    assert blocks
    run(ROOT, "\n".join(blocks))
