# What somebody sees who runs the demo or a script for the first time: what is being done, one bar and the result. No
# test of what the result is.
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
TINYWORLD = ROOT / "examples" / "tinyworld"


def run(*command):
    """What a script writes to stdout and to stderr; bars start their lines anew with a carriage return."""
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode(), result.stderr.decode()


def lines_of(stderr):
    """The lines as they stand on the screen in the end."""
    return [line.split("\r")[-1] for line in stderr.removesuffix("\n").split("\n")]


def test_scripts_begin_with_their_own_words():
    """
    With all packages of requirements.txt in reach, those of no use to the script, too. The training scripts begin with
    the same lines (utils/copies.py), and one of them trains below.
    """
    script = ROOT / "evaluate_dreambooth.py"
    stdout, stderr = run(script, "--help")
    assert stdout.startswith(f"usage: {script.name}") and stderr == ""


def test_a_training_says_that_it_trains_and_where_the_result_is(tmp_path):
    flags = [f"--pretrained_model_name_or_path={TINYWORLD / 'sd'}", f"--output_dir={tmp_path}", "--resolution=64"]
    flags += [f"--instance_data_dir={TINYWORLD / 'subjects' / 'mug'}", "--instance_prompt=a photo of a sks mug"]
    flags += ["--max_train_steps=1", "--train_batch_size=1", f"--lipschitz_prompts_file={tmp_path / 'prompts.txt'}"]
    (tmp_path / "prompts.txt").write_text("a photo of a blue box\na photo of a red fish\n")
    stdout, stderr = run(ROOT / "train_dreambooth_lipschitz.py", *flags)
    recording, recorded, start, bar, end = lines_of(stderr)
    assert recording.startswith("Recording: 100%") and "10 predictions" in recorded
    assert "INFO" in start and "Training from step 0 to 1 on 5 photos" in start
    assert bar.startswith("Steps: 100%")
    assert "INFO" in end and str(tmp_path) in end and stdout == ""


# The demo with one step of training, and one picture in place of many.
SHORT_DEMO = f"""
import sys
sys.path.insert(0, {str(TINYWORLD)!r})
import demo, examine
draw = examine.generate
examine.generate = demo.generate = lambda model, prompts, seeds: draw(model, prompts[:1], seeds[:1]) * len(prompts)
demo.COMMON.append("--max_train_steps=1")
demo.main()
"""


def test_the_demo_shows_what_it_does_one_bar_the_picture_and_the_table(tmp_path):
    stdout, stderr = run("-c", SHORT_DEMO, f"--output_dir={tmp_path}", "--methods", "DreamBooth", "--others=1")
    (bar,) = lines_of(stderr)
    assert bar.startswith("done: 100%")
    first, _, picture, *table = stdout.splitlines()
    assert "on five pictures of a mug: DreamBooth" in first
    assert picture == f"the picture: {tmp_path / 'mug-0.png'}" and (tmp_path / "mug-0.png").is_file()
    assert [line[:24].strip() for line in table[2:4]] == ["base, untrained", "DreamBooth"]
