# What the README tells people to type has to work: its commands are taken by the scripts, its three lines run.
# What it promises about training is claimed in the other files.
import importlib.metadata
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import torch
from packaging.specifiers import SpecifierSet


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def parser_of(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.parse_args


def test_the_scripts_take_the_commands_of_the_readme():
    sd, sdxl, bf16 = (block for block in blocks("bash") if "--lipschitz_weight" in block)
    sd, sdxl, bf16 = (
        shlex.split(block[max(0, block.find("accelerate launch")) :].replace("\\\n", "")) for block in (sd, sdxl, bf16)
    )
    assert sd[:2] == sdxl[:2] == ["accelerate", "launch"]
    assert (sd[2], sdxl[2]) == ("train_dreambooth_lipschitz.py", "train_dreambooth_lipschitz_sdxl.py")
    parse_sd, parse_sdxl = parser_of("train_dreambooth_lipschitz"), parser_of("train_dreambooth_lipschitz_sdxl")
    args = parse_sd(sd[3:])
    assert (args.lipschitz_weight, args.learning_rate, args.train_batch_size) == (500.0, 2e-6, 1)
    assert args.method == "full"
    assert parse_sdxl(sdxl[3:]).method == "lora"
    last_two_lines = sdxl.index("--train_batch_size=1")
    assert parse_sdxl([*sdxl[3:last_two_lines], *bf16]).full_bf16
    for flags in re.findall(r"`(--[^`]+(?<!=\.\.\.))`", README):
        if re.fullmatch(r"--\w+", flags):  # named, without its value
            assert hasattr(args, flags[2:]), flags
            continue
        replaced = "--instance_data_dir" if "--dataset_name" in flags else None
        parse_sd([flag for flag in sd[3:] if flag.partition("=")[0] != replaced] + shlex.split(flags))


def test_the_tested_versions_run_on_the_python_that_the_readme_names():
    lowest = re.search(r"Python (3\.\d+) or later", README)[1]
    pins = re.findall(r"^([\w-]+)==", ROOT.joinpath("requirements.txt").read_text(), re.MULTILINE)
    for pin in pins:
        needed = importlib.metadata.metadata(pin)["Requires-Python"] or ""
        assert SpecifierSet(needed).contains(f"{lowest}.99"), pin


def test_the_table_of_grids_counts_what_they_train_and_measure():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import tradeoff

    rows = re.findall(
        r"^\| `(\w+)` \|.*\| (\d+), (\d+)\D", ROOT.joinpath("docs/benchmarks.md").read_text(), re.MULTILINE
    )
    counted = {}
    for name in tradeoff.GRIDS:
        trainings = tradeoff.trainings_of([name])[1:]
        counted[name] = (len(trainings), sum(len(tradeoff.results_of(training)) for training in trainings))
    assert {name: (int(trainings), int(results)) for name, trainings, results in rows} == counted


def test_the_three_lines_of_the_readme_run():
    (lines,) = [block for block in blocks("python") if "LipschitzRegularizer" in block]
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    names = {"optimizer": optimizer}
    exec(lines, names)
    assert names["regularizer"].metrics()["lipschitz/distance"] > 0


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
