# Claims about the drawn world of examples/tinyworld: pictures, truth, judge and the tiny base that is kept in the folder.
# How well the base and the demo do in figures is measured by examine.py and demo.py, not here.
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image


TINYWORLD = Path(__file__).resolve().parents[1] / "examples" / "tinyworld"
sys.path.insert(0, str(TINYWORLD))

import examine  # noqa: E402
import judge as judges  # noqa: E402
import world  # noqa: E402


@pytest.fixture(scope="module")
def base():
    return examine.load(examine.BASE)


def test_the_same_seed_draws_the_same_picture():
    first, second = (world.random_picture(Random(3)) for _ in range(2))
    assert first[1:] == second[1:]
    assert np.array_equal(np.asarray(first[0]), np.asarray(second[0]))
    assert first[0].size == (64, 64)


@pytest.mark.parametrize("scene", world.SCENES)
@pytest.mark.parametrize("kind", world.CLASSES)
def test_captions_name_all_that_has_a_name(kind, scene):
    look = world.Look(kind, "orange", "dotted", "red", "face")
    assert world.caption_of(look, scene) == f"a photo of an orange dotted {kind} {scene}"


def test_no_caption_names_what_subjects_are_made_of():
    rng = Random(0)
    words = set()
    for _ in range(2000):
        look = world.random_look(rng)
        words |= set(world.caption_of(look, rng.choice(world.SCENES), rng).split())
    assert not words & {*world.UNNAMED_PATTERNS, "face", "cross", "band"}
    assert {*world.CLASSES, *world.COLOURS, *world.PATTERNS, *world.RARE_TOKENS} <= words


def test_photos_of_subjects_are_those_in_the_folder():
    for name in world.SUBJECTS:
        files = sorted((TINYWORLD / "subjects" / name).iterdir())
        assert 4 <= len(files) <= 6
        for photo, file in zip(world.subject_photos(name), files, strict=True):
            assert np.array_equal(np.asarray(photo), np.asarray(Image.open(file)))


def test_the_judge_reads_fresh_drawings():
    accuracy = judges.examine(judges.Judge.from_pretrained(), pictures=2000)
    assert all(accuracy[name] >= 0.98 for name in ("class", "colour", "pattern", "scene")), accuracy


def test_the_base_is_a_small_stable_diffusion_pipeline_in_fp16_safetensors():
    files = [path for path in examine.BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25e6
    weights = [path for path in files if path.suffix not in (".json", ".txt")]
    assert len(weights) == 3 and all(path.suffix == ".safetensors" for path in weights)


def test_the_base_draws_what_prompts_ask_for(base):
    others = examine.other_things(24)
    pictures = examine.generate(base, [world.caption_of(*other) for other in others], list(range(24)))
    read, truths = judges.Judge.from_pretrained().read(pictures), [judges.traits_of(*other) for other in others]
    for name in examine.NAMED_TRAITS:
        assert examine.share_right(read, truths, (name,)) >= 0.8, name


def test_the_base_has_no_drift_from_itself(base):
    examiner = examine.Examiner(others=2, per_scene=1, seed=0)
    first, second = (examiner.examine(base, "mug") for _ in range(2))
    assert first["drift"] == second["drift"] == 0
    with torch.no_grad():
        base.unet.conv_out.weight *= 1.05
    assert examiner.examine(base, "mug")["drift"] > 0


def test_the_training_of_the_base_resumes_where_it_was_stopped(tmp_path):
    def train(work_dir, steps):
        command = [sys.executable, TINYWORLD / "train_tinyworld.py", "--work_dir", work_dir, "--output_dir", work_dir / "sd"]
        sizes = ["--pictures=1000", "--autoencoder_steps=2", f"--steps={steps}", "--save_every=2", "--batch_size=2"]
        subprocess.run([*command, *sizes], check=True, capture_output=True)

    train(tmp_path, 2)
    state = torch.load(tmp_path / "unet.pt", weights_only=False)
    assert state["step"] == 2
    train(tmp_path, 4)
    assert torch.load(tmp_path / "unet.pt", weights_only=False)["step"] == 4
    pipeline = examine.load(tmp_path / "sd")
    assert examine.generate(pipeline, ["a photo of a mug"], [0])[0].size == (64, 64)
