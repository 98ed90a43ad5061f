# What utils/copies.py promises: `make quality` fails where what the scripts share has parted, `make style` mends it.
import difflib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
SDXL = "train_dreambooth_lipschitz_sdxl.py"


@pytest.fixture
def copy(tmp_path):
    """The scripts and the tool elsewhere, to part them."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("examples/*/*.py"), ROOT / "utils" / "copies.py"]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(path, target)
    return tmp_path


def run(folder, *flags):
    command = [sys.executable, folder / "utils" / "copies.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stderr


def change(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_what_the_scripts_share_is_the_same(copy):
    before = (copy / SDXL).read_text()
    assert run(copy) == (0, "")
    assert run(copy, "--write") == (0, "") and (copy / SDXL).read_text() == before


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("stop", "    sys.exit(2)\n", "    sys.exit(3)\n"),
        ("THINGS", '"a bowl of fruit", ', ""),
        ("PARTS", 'PARTS += ["feature_extractor", "image_encoder"]', 'PARTS += ["feature_extractor"]'),
        ("PROMPTS", "None of them names a subject.", "None is about a subject."),
    ],
    ids=["function", "constant", "constant of two statements", "comment above it"],
)
def test_copy_that_has_parted_is_found_and_mended(copy, name, old, new):
    before = (copy / SDXL).read_text()
    change(copy / SDXL, old, new)
    code, stderr = run(copy)
    assert code == 1 and f"{SDXL}: {name} differs from train_dreambooth_lipschitz.py" in stderr
    assert run(copy, "--write") == (0, "") and (copy / SDXL).read_text() == before


def test_source_that_changes_takes_its_copies_along(copy):
    change(copy / "train_dreambooth_lipschitz.py", "    sys.exit(2)\n", "    sys.exit(4)\n")
    assert run(copy)[1].count("stop differs from") == 2  # in the evaluation too
    assert run(copy, "--write") == (0, "")
    assert "    sys.exit(4)\n" in (copy / SDXL).read_text()


@pytest.mark.parametrize("write", [[], ["--write"]])
def test_equal_text_without_a_mark_and_a_mark_without_a_source_are_found(copy, write):
    mark = "# Copied from train_dreambooth_lipschitz.py\n"
    change(copy / SDXL, mark + "def stop(", "def stop(")
    change(copy / SDXL, "def compile_or_not(", mark + "def compile_or_not(")
    code, stderr = run(copy, *write)
    assert (
        code == 1 and f"{SDXL}: stop is the same as in train_dreambooth_lipschitz.py: put `{mark.strip()}`" in stderr
    )
    assert "compile_or_not is said to be copied from train_dreambooth_lipschitz.py, which has none" in stderr


def test_what_has_one_name_and_is_no_copy_differs():
    """A near-copy is where a fault that is mended gets lost: what the scripts have alike is a function of its own."""
    sys.path.insert(0, str(ROOT / "utils"))
    import copies

    here, there = (copies.blocks((ROOT / name).read_text()) for name in ("train_dreambooth_lipschitz.py", SDXL))
    ratios = {}
    for name in [name for name, block in there.items() if name in here and block.source is None]:
        if "def " in there[name].text and len(there[name].text) > 250:
            ratios[name] = difflib.SequenceMatcher(None, here[name].text, there[name].text, autojunk=False).ratio()
    assert len(ratios) > 5 and max(ratios.values()) < 0.85, ratios
