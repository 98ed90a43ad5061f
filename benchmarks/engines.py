"""
Does DeepSpeed train like one process? Runs the cases of tests/engine_cases.py under ZeRO 1 to 3 on CPUs, with gloo,
and prints how far the weights and the metrics are from those of one process in float64.

    pip install deepspeed==0.19.8
    python benchmarks/engines.py --processes 2 3
    python benchmarks/engines.py --scripts    # the two training scripts, beside DDP

DDP and FSDP2, which need no further package, are tested by tests/test_engines.py.
"""

import argparse
import functools
import importlib
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing
from safetensors.torch import load_file


ROOT = Path(__file__).resolve().parents[1]
TINYWORLD = ROOT / "examples" / "tinyworld"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from engine_cases import (  # noqa: E402
    CASES,
    CLIP,
    STEPS,
    Case,
    differences,
    loss_of,
    make_model,
    make_optimizer,
    make_regularizer,
    outcome,
    record_base,
    run_alone,
    saved_weights,
)


CASES = {name: case for name, case in CASES.items() if case.clips != "both"}  # DeepSpeed clips in its step
CASES["lora, other anchors"] = Case(lora="delta", moved=True)  # DDP does nothing else there, FSDP2 cannot
ENGINES = {
    "ZeRO 0": {"stage": 0},
    "ZeRO 1": {"stage": 1},
    "ZeRO 2": {"stage": 2},
    "ZeRO 2, round robin": {"stage": 2, "round_robin_gradients": True},
    "ZeRO 2, CPU offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "ZeRO 3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "ZeRO 3, persistent": {"stage": 3},
    "ZeRO 3, sub-groups": {"stage": 3, "sub_group_size": 40},
    "ZeRO 3, CPU offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
}
RESUMED = CASES["coupled tensor_mean"]
EXACT = 2e-6  # of float32, relative to weights of about 1

STAGES = {"ZeRO 1": (1, "none"), "ZeRO 2": (2, "none"), "ZeRO 2, CPU offload": (2, "cpu"), "ZeRO 3": (3, "none")}
SD = ["train_dreambooth_lipschitz", "sd", "--method=full", "--lipschitz_weight=100", "--lipschitz_layers=4"]
CUSTOM = ["train_dreambooth_lipschitz", "sd", "--method=custom_diffusion"]
SDXL = ["train_dreambooth_lipschitz_sdxl", "sdxl", "--method=lora"]
WATCHED = ["--drift_every=2", "--validation_prompt=a red mug", "--num_validation_images=1", "--validation_steps=2"]
TRAININGS = {
    "full": [*SD, *WATCHED, "--checkpointing_steps=2"],
    "full, accumulated": [*SD, "--gradient_accumulation_steps=2"],
    "full, predictions": [*SD, "--lipschitz_predictions=1"],
    "Custom Diffusion, layers": [*CUSTOM, "--lipschitz_layers=0.08"],
    "LoRA, SDXL, layers": [*SDXL, "--lipschitz_layers=0.05"],
    "LoRA, SDXL, predictions": [*SDXL, "--lipschitz_predictions=1"],
    "full, bf16": [*SD, "--mixed_precision=bf16"],
}
CLOSE = 0.005  # of two trainings, the distance of their ends relative to how far they went
IN_BF16 = 0.05


def initialize(zero, case, dtype=torch.float32):
    """Engine, its regularizer, as users of DeepSpeed build them."""
    import deepspeed

    model = make_model(case, torch.float32)
    recording = record_base(model, case, torch.float32)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": CLIP if case.clips else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=make_optimizer(model, case), config=config)
    return engine, make_regularizer(model, optimizer, case, recording)


def train(engine, steps, rank, size, dtype=torch.float32):
    for step in steps:
        engine.backward(loss_of(engine, step, dtype, rank, size))
        engine.step()


def whole(parameter):
    import deepspeed

    if not hasattr(parameter, "ds_id"):
        return parameter
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def run_case(zero, case, rank, size):
    try:
        engine, regularizer = initialize(zero, case)
    except ValueError as error:
        return str(error)
    train(engine, range(STEPS), rank, size)
    return outcome(engine.module, regularizer, case, whole)


def run_checkpoint(zero, folder, rank, size):
    engine, regularizer = initialize(zero, RESUMED)
    train(engine, range(2), rank, size)
    engine.save_checkpoint(folder)
    state = regularizer.state_dict()
    engine, regularizer = initialize(zero, RESUMED)
    engine.load_checkpoint(folder)
    regularizer.load_state_dict(state)
    train(engine, range(2, STEPS), rank, size)
    return outcome(engine.module, regularizer, RESUMED, whole)


def run_accelerate(stage, folder, rank, size):
    """The same by accelerate's own calls."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

    def start():
        AcceleratorState._reset_state(True)  # of the stage before
        plugin = DeepSpeedPlugin(zero_stage=stage)
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        plugin.deepspeed_config |= {"zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}  # default: 1.0
        gloo = InitProcessGroupKwargs(backend="gloo")  # it looks for the backends of accelerators only
        accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[gloo])
        assert accelerator.distributed_type == "DEEPSPEED"
        model = make_model(RESUMED, torch.float32)
        model, optimizer = accelerator.prepare(model, make_optimizer(model, RESUMED))
        regularizer = make_regularizer(model.module, optimizer, RESUMED, None)
        accelerator.register_for_checkpointing(regularizer)
        return accelerator, model, regularizer

    def steps(accelerator, model, numbers):
        for step in numbers:
            accelerator.backward(loss_of(model, step, torch.float32, rank, size))

    accelerator, model, regularizer = start()
    steps(accelerator, model, range(2))
    accelerator.save_state(folder)
    accelerator, model, regularizer = start()
    accelerator.load_state(folder)
    steps(accelerator, model, range(2, STEPS))
    return outcome(model.module, regularizer, RESUMED, whole)


def run_bf16(zero, rank, size):
    try:
        engine, regularizer = initialize(zero, RESUMED, torch.bfloat16)
    except ValueError as error:
        return str(error)
    train(engine, range(STEPS), rank, size, torch.bfloat16)
    return regularizer.metrics()


def start_zero(stage, offload, kwargs_handlers=None, **options):
    """accelerate's `Accelerator` as its configuration makes it with DeepSpeed, on CPUs."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

    plugin = DeepSpeedPlugin(zero_stage=stage, offload_optimizer_device=offload)
    gloo = [InitProcessGroupKwargs(backend="gloo")]
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=gloo, **options)
    assert accelerator.distributed_type == "DEEPSPEED"
    return accelerator


def run_script(engine, training, folder, *flags):
    """A training by a script, under an engine of STAGES or DDP; what it says if it is refused."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # of the training before
    name, base, *given = TRAININGS[training]
    script = importlib.import_module(name)
    # Without this variable there is no DDP on CPUs, and with it no DeepSpeed.
    os.environ.update(ACCELERATE_USE_CPU=str(engine == "DDP"), ACCELERATE_USE_DEEPSPEED=str(engine != "DDP"))
    script.Accelerator = Accelerator if engine == "DDP" else functools.partial(start_zero, *STAGES[engine])
    refused = []
    script.stop = lambda message: (refused.append(str(message)), sys.exit(2))
    common = [f"--pretrained_model_name_or_path={TINYWORLD / base}", f"--output_dir={folder}", "--seed=1"]
    common += [f"--instance_data_dir={TINYWORLD / 'subjects' / 'mug'}", "--instance_prompt=a photo of sks mug"]
    common += ["--lipschitz_prompts_file=" + str(folder.parent / "prompts.txt"), "--learning_rate=1e-4"]
    common += ["--resolution=64", "--train_batch_size=1", "--max_train_steps=4", "--report_to=none"]
    try:
        script.main(script.parse_args([*common, *given, *flags]))
    except SystemExit:
        return refused[0]
    return None


def work_scripts(folder):
    """All trainings under all engines, into a folder each; a resumed one beside that of "full"."""
    end, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, lambda *_: None
    refused = {}
    for training in TRAININGS:
        for engine in ["DDP", *STAGES]:
            refused[engine, training] = run_script(engine, training, Path(folder, f"{engine}, {training}"))
    for engine in STAGES:
        ended, again = Path(folder, f"{engine}, full"), Path(folder, f"{engine}, resumed")
        if torch.distributed.get_rank() == 0:
            shutil.copytree(ended, again)
            shutil.rmtree(again / "checkpoint-4")
        torch.distributed.barrier()
        refused[engine, "resumed"] = run_script(engine, "full", again, "--resume_from_checkpoint=latest")
    torch.distributed.destroy_process_group = end
    return refused


def work(rank, size, port, folder, engines, cases):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_DEEPSPEED": "true"}
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    if cases is None:
        torch.save(work_scripts(folder), f"{folder}/{rank}.pt")
        torch.distributed.destroy_process_group()
        return
    results = {}
    for name in engines:
        zero = ENGINES[name]
        for case in cases:
            results[name, case] = run_case(zero, CASES[case], rank, size)
        results[name, "checkpoint"] = run_checkpoint(zero, f"{folder}/{name}", rank, size)
        results[name, "bf16"] = run_bf16(zero, rank, size)
    for stage in (1, 2, 3):
        results[f"accelerate, ZeRO {stage}"] = run_accelerate(stage, f"{folder}/accelerate {stage}", rank, size)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def is_refused(zero, case):
    """What the documentation says is refused."""
    if case == "bf16":
        return zero["stage"] == 0
    case = CASES.get(case, RESUMED)
    if case.moved and case.lora and zero["stage"] == 3:
        return True
    in_parts = "sub_group_size" in zero and (case.mode == "projected" or case.lora == "delta")
    return in_parts or zero["stage"] == 3 and case.space == "predictions"


def say(what, result, expected, case):
    """A line of the table, and whether it is as it should be: with the fingerprint of the base, too."""
    weights, metrics = differences(result, expected)
    right = weights < EXACT and metrics < 100 * EXACT
    # The weights under adapters are float32 here, and float64 in the reference.
    right = right and (case.lora is not None or result["state"]["anchors"] == expected["state"]["anchors"])
    print(f"{what:50s} {weights:8.1e} {metrics:8.1e}  {'' if right else 'WRONG'}")
    return right


def say_scripts(refused, folder):
    """A line for each training of the scripts: how far from DDP's end, in parts of the way that DDP's went."""
    right = True
    for (engine, training), said in refused.items():
        if engine == "DDP":
            assert said is None, said
            continue
        what, resumed = f"{engine}, {training}", training == "resumed"
        if said is not None:
            print(f"{what:50s} refused: {said}")
            right = right and engine == "ZeRO 3" and "predictions" in training
            continue
        ended, expected = (
            saved_weights(folder / f"{name}, {'full' if resumed else training}") for name in (engine, "DDP")
        )
        ended = saved_weights(folder / what) if resumed else ended
        files = load_file(TINYWORLD / "sd" / "unet" / "diffusion_pytorch_model.safetensors")
        base = {key: files.get(key.split()[-1], torch.zeros(())) for key in expected}
        base |= {key: value for key, value in expected.items() if "lora_A" in key}  # drawn at random
        assert ended.keys() == expected.keys()
        away, went = (
            sum((one[key] - other[key]).double().square().sum() for key in expected).sqrt().item()
            for one, other in ((ended, expected), (expected, base))
        )
        near = away <= (IN_BF16 if "bf16" in training else CLOSE) * went
        right = right and near and went > 0
        print(f"{what:50s} {away / went:8.1e}  {'' if near else 'WRONG'}")
    return right


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument(
        "--scripts", action="store_true", help="The two training scripts in place of --engines, --cases."
    )
    args = parser.parse_args()
    cases = None if args.scripts else args.cases
    alone, right = {name: run_alone(case) for name, case in CASES.items()} if cases else {}, True
    for size in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            Path(folder, "prompts.txt").write_text("a photo of a cat\n\na red house\n")
            torch.multiprocessing.spawn(work, args=(size, port, folder, args.engines, cases), nprocs=size)
            results = torch.load(f"{folder}/0.pt")
            if args.scripts:
                print(f"\n{size} processes: distance from where DDP ends, in parts of the distance that DDP went")
                right = say_scripts(results, Path(folder)) and right
                continue
        print(f"\n{size} processes: largest difference of a weight, and of a metric (relative)")
        for key, result in results.items():
            if isinstance(result, str):
                print(f"{', '.join(key):50s} refused: {result}")
                right = right and is_refused(ENGINES[key[0]], key[1])
            elif key[1] == "bf16":
                distance = alone["coupled tensor_mean"]["metrics"]["lipschitz/distance"]
                near = abs(result["lipschitz/distance"] / distance - 1) < 0.05
                print(f"{', '.join(key):50s} distance {result['lipschitz/distance']:.3f}, in float64 {distance:.3f}")
                right = right and near
            else:
                what = key if isinstance(key, str) else ", ".join(key)
                name = key[1] if key[1] in CASES else "coupled tensor_mean"
                right = say(what, result, alone[name], CASES[name]) and right
    sys.exit(not right)


if __name__ == "__main__":
    main()
