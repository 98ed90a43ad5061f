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
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "docs/train.md", "docs/methods.md")}
README = PAGES["README.md"]


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def parser_of(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.parse_args


def test_the_scripts_take_the_commands_of_readme_and_docs():
    (sd,) = [block for block in blocks("bash") if "train_dreambooth_lipschitz.py" in block]
    sdxl, bf16, *_ = blocks("bash", "docs/train.md")
    sd, sdxl, bf16 = (
        shlex.split(block[max(0, block.find("accelerate launch")) :].replace("\\\n", "")) for block in (sd, sdxl, bf16)
    )
    assert sd[:2] == sdxl[:2] == ["accelerate", "launch"]
    assert (sd[2], sdxl[2]) == ("train_dreambooth_lipschitz.py", "train_dreambooth_lipschitz_sdxl.py")
    parse_sd, parse_sdxl = parser_of("train_dreambooth_lipschitz"), parser_of("train_dreambooth_lipschitz_sdxl")
    args = parse_sd(sd[3:])
    assert (args.method, args.learning_rate, args.train_batch_size) == ("full", 2e-6, 1)
    assert (args.lipschitz_weight, args.lipschitz_layers, args.lipschitz_predictions) == (0.0, 4.0, 1.0)
    args_sdxl = parse_sdxl(sdxl[3:])
    assert args_sdxl.method == "lora"
    last_two_lines = sdxl.index("--train_batch_size=1")
    assert parse_sdxl([*sdxl[3:last_two_lines], *bf16]).full_bf16
    text = PAGES["README.md"] + PAGES["docs/train.md"]
    inline, lines = (
        re.findall(r"`(--[^`]+(?<!\.\.\.))`", text),
        re.findall(r"(?m)^    (--.+)", "".join(PAGES.values())),
    )
    for flags in inline + lines:
        if re.fullmatch(r"--\w+", flags):  # named, without its value
            known = hasattr(args, flags[2:]) or hasattr(args_sdxl, flags[2:])
            assert known or flags in ("--sdxl", "--count", "--prompts", "--help"), flags
            continue
        replaced = "--instance_data_dir" if "--dataset_name" in flags or "--concepts_list" in flags else None
        replaced = {replaced, "--instance_prompt"} if "--concepts_list" in flags else {replaced}
        parse_sd([flag for flag in sd[3:] if flag.partition("=")[0] not in replaced] + shlex.split(flags))


def test_readme_fits_on_a_page():
    assert len(README.splitlines()) <= 100


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


def test_the_loop_of_the_readme_runs():
    (lines,) = [block for block in blocks("python") if "LipschitzRegularizer" in block]
    model = torch.nn.Linear(4, 4)
    model(torch.ones(1, 4)).sum().backward()
    names = {"torch": torch, "model": model}
    exec(lines, names)
    assert names["regularizer"].metrics()["lipschitz/distance"] > 0


def test_files_that_the_pages_name_exist():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (ROOT / page).parent.joinpath(target).exists(), (page, target)


def test_headings_that_the_pages_point_to_exist():
    for page, text in PAGES.items():
        for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text):
            pointed = (ROOT / page).parent.joinpath(target).read_text() if target else text
            headings = re.findall(r"^#+ (.+)$", pointed, re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}, heading
