# The claim of examples/toy_2d.py, run as a reader runs it, on one seed.
# How large the effect is, and how its rivals do, is in the README and not tested here.
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Rows of the printed table: method to its numbers. The last four are moved, spread, new: off, new: spread."""
    figure = tmp_path_factory.mktemp("toy") / "toy_2d.png"
    command = [sys.executable, ROOT / "examples" / "toy_2d.py", "--seeds=0", f"--output={figure}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # Its bar, and no warnings.
    assert all("%|" in line for line in re.split(r"[\r\n]+", result.stderr.strip())), result.stderr
    assert figure.read_bytes().startswith(b"\x89PNG")
    rows = re.findall(r"^(\S.*?)((?:\s+\d+\.\d\d){9})$", result.stdout, re.MULTILINE)
    return {name: [float(number) for number in numbers.split()] for name, numbers in rows}


def test_old_classes_move_less_with_the_penalty_while_the_new_one_is_learned(table):
    naive, penalized = table["naive"], table["penalty, weight 50"]
    assert penalized[-4] < 0.75 * naive[-4]
    for row in (naive, penalized):
        assert row[-2] < 1.0 and 0.6 < row[-1] < 1.4


def test_prior_preservation_guards_its_class_and_not_the_others(table):
    naive, guarded = table["naive"], table["prior preservation"]
    assert guarded[0] < 0.5 * naive[0]
    assert min(guarded[1:5]) > 3 * guarded[0]


def test_the_new_embedding_alone_moves_no_old_class(table):
    assert table["new embedding alone"][:6] == [0.0] * 6


@pytest.mark.parametrize(
    "flags, said", [(["--lipschitz_weight", "50", "-1"], "at least 0"), (["--steps=0"], "at least 1")]
)
def test_a_value_that_cannot_be_meant_is_refused_in_one_line(flags, said):
    command = [sys.executable, ROOT / "examples" / "toy_2d.py", *flags]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 2 and said in result.stderr.splitlines()[-1]
