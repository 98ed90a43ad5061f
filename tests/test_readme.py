# What the README tells people to type has to work: its command is taken by the script, its three lines run.
# What it promises about training is claimed in the other files.
import importlib.util
import re
import shlex
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_script_takes_the_command_of_the_readme():
    spec = importlib.util.spec_from_file_location("script", ROOT / "train_dreambooth_lipschitz.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (command,) = [block for block in blocks("bash") if "accelerate launch" in block]
    words = shlex.split(command[command.index("accelerate launch") :].replace("\\\n", ""))
    assert words[:3] == ["accelerate", "launch", "train_dreambooth_lipschitz.py"]
    args = script.parse_args(words[3:])
    assert (args.lipschitz_weight, args.learning_rate, args.train_batch_size) == (500.0, 2e-6, 1)
    for flags in re.findall(r"`(--[^`]+)`", README):
        script.parse_args([*words[3:], *shlex.split(flags)])


def test_the_three_lines_of_the_readme_run():
    (lines,) = [block for block in blocks("python") if "LipschitzRegularizer" in block]
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    names = {"optimizer": optimizer}
    exec(lines, names)
    assert names["regularizer"].metrics()["lipschitz/drift"] > 0


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
