"""
Does DeepSpeed train like one process? Runs the cases of tests/engine_cases.py under ZeRO 1 to 3 on CPUs, with gloo,
and prints how far the weights and the metrics are from those of one process in float64.

    pip install deepspeed==0.19.8
    python benchmarks/engines.py --processes 2 3

DDP and FSDP2, which need no further package, are tested by tests/test_engines.py.
"""

import argparse
import os
import socket
import sys
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing


sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from engine_cases import (  # noqa: E402
    CASES,
    CLIP,
    STEPS,
    differences,
    loss_of,
    make_model,
    make_optimizer,
    make_regularizer,
    outcome,
    record_base,
    run_alone,
)


CASES = {name: case for name, case in CASES.items() if case.clips != "both"}  # DeepSpeed clips in its step
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


def work(rank, size, port, folder, engines, cases):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_DEEPSPEED": "true"}
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    args = parser.parse_args()
    alone, right = {name: run_alone(case) for name, case in CASES.items()}, True
    for size in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            torch.multiprocessing.spawn(work, args=(size, port, folder, args.engines, args.cases), nprocs=size)
            results = torch.load(f"{folder}/0.pt")
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
