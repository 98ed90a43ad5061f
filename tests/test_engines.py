# Engines that train one model on several processes: the same weights, metrics and fingerprints as one process. Two
# real processes run every case of engine_cases.py under DDP and FSDP2, once for all tests here. DeepSpeed, which CI
# does not install, is tested by benchmarks/engines.py.
import os
import socket
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
import torch.multiprocessing
from engine_cases import (
    CASES,
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
    train,
)
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lipschitz_reg import LipschitzRegularizer, optim, run


ENGINES = ["DDP", "FSDP2", "accelerate's FSDP2"]
FEW = ["coupled mean", "lora coupled sum", "layers", "predictions"]
RESUMED = CASES["coupled tensor_mean"]
EXACT, ROUNDED = 1e-12, 1e-6  # weights are in float64, and norms of anchors in float32

pytestmark = pytest.mark.xdist_group("engines")


# In each of the two processes


def whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def shard(model, **options):
    from torch.distributed.fsdp import fully_shard

    for part in (model.first, model.last, model):
        fully_shard(part, **options)
    return model


def accelerated():
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Linear"]
    )
    accelerator = Accelerator(fsdp_plugin=plugin)
    # It looks for FSDP only where there are GPUs; what it does then works on CPUs, too.
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def start(engine, case):
    """Model, optimizer and regularizer, and the accelerator where there is one, as users build them."""
    model, accelerator = make_model(case, torch.float64), None
    recording = record_base(model, case, torch.float64)
    if engine == "DDP":
        model = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = make_optimizer(model, case)
    elif engine == "FSDP2":
        model = shard(model)
        optimizer = make_optimizer(model, case)
    else:
        accelerator = accelerated()
        model, optimizer = accelerator.prepare(model, make_optimizer(model, case))
        assert all(hasattr(parameter, "placements") for parameter in model.parameters())
    return model, optimizer, make_regularizer(model, optimizer, case, recording), accelerator


def run_case(engine, case, rank, size):
    model, optimizer, regularizer, *_ = start(engine, case)
    train(model, optimizer, regularizer, case, range(STEPS), torch.float64, rank, size)
    return outcome(model, regularizer, case, whole)


def run_copies(case, rank, size):
    """FSDP2 on a mesh of two copies, each of which is whole: sums must not be over the copies."""
    from torch.distributed.tensor import init_device_mesh

    model = make_model(case, torch.float64)
    recording = record_base(model, case, torch.float64)
    shard(model, mesh=init_device_mesh("cpu", (size, 1), mesh_dim_names=("copies", "shards")))
    optimizer = make_optimizer(model, case)
    regularizer = make_regularizer(model, optimizer, case, recording)
    train(model, optimizer, regularizer, case, range(STEPS), torch.float64, rank, size)
    return outcome(model, regularizer, case, whole)


def run_bfloat16(case, rank, size):
    """Weights in float32, the model in bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = make_model(case, torch.float32)
    recording = record_base(model, case, torch.float32)
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer = make_optimizer(model, case)
    regularizer = make_regularizer(model, optimizer, case, recording)
    train(model, optimizer, regularizer, case, range(STEPS), torch.float32, rank, size)
    return regularizer.metrics()


def run_distributed_checkpoint(folder, rank, size):
    """Half a training, and the other half by new objects that load its checkpoint."""
    model, optimizer, regularizer, _ = start("FSDP2", RESUMED)
    train(model, optimizer, regularizer, RESUMED, range(2), torch.float64, rank, size)
    checkpoint.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer))), checkpoint_id=folder)
    state = regularizer.state_dict()
    model, optimizer, regularizer, _ = start("FSDP2", RESUMED)
    load(model, optimizer, regularizer, state, folder)
    train(model, optimizer, regularizer, RESUMED, range(2, STEPS), torch.float64, rank, size)
    return {"state": state, "outcome": outcome(model, regularizer, RESUMED, whole)}


def load(model, optimizer, regularizer, state, folder):
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    checkpoint.load(states, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    regularizer.load_state_dict(state)


def run_accelerate_checkpoint(folder, rank, size):
    model, optimizer, regularizer, accelerator = start("accelerate's FSDP2", RESUMED)
    accelerator.register_for_checkpointing(regularizer)
    train(model, optimizer, regularizer, RESUMED, range(2), torch.float64, rank, size)
    accelerator.save_state(folder)
    model, optimizer, regularizer, accelerator = start("accelerate's FSDP2", RESUMED)
    accelerator.register_for_checkpointing(regularizer)
    accelerator.load_state(folder)
    train(model, optimizer, regularizer, RESUMED, range(2, STEPS), torch.float64, rank, size)
    return outcome(model, regularizer, RESUMED, whole)


def pull(rank, size):
    """Distances and drift before and after a pull of three quarters. A model sharded as one unit stays gathered."""
    from torch.distributed.fsdp import fully_shard

    case = CASES["layers"]
    model = make_model(case, torch.float64)
    recording = record_base(model, case, torch.float64)
    fully_shard(model)
    optimizer = make_optimizer(model, case)
    regularizer = make_regularizer(model, optimizer, case, recording)
    train(model, optimizer, regularizer, case, range(STEPS), torch.float64, rank, size)
    before = regularizer.metrics()["lipschitz/distance"], recording.drift().prediction
    regularizer.pull(0.75)
    return before, (regularizer.metrics()["lipschitz/distance"], recording.drift().prediction)


UNSEEDED = """
import torch
torch.manual_seed(torch.distributed.get_rank())
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model = torch.nn.parallel.DistributedDataParallel(model)
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
"""


def refusals(rank, size):
    """What each of these mistakes raises."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.optim import SGD

    def sharded_after(case):
        model = make_model(case, torch.float64)
        optimizer = make_optimizer(model, case)
        LipschitzRegularizer(optimizer, weight=1.0)
        shard(model)
        for group, parameters in zip(optimizer.param_groups, make_optimizer(model, case).param_groups, strict=True):
            group["params"] = parameters["params"]
        loss_of(model, 0, torch.float64).backward()
        optimizer.step()

    def by_columns(case):
        mesh = init_device_mesh("cpu", (size,))
        parameter = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
        LipschitzRegularizer(SGD([parameter], lr=0.1), weight=1.0)

    def copied(case):
        mesh = init_device_mesh("cpu", (size,))
        parameter = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Replicate()]))
        LipschitzRegularizer(SGD([parameter], lr=0.1), weight=1.0)
        raise ValueError("nothing")

    def moved_under_lora(case):
        start("FSDP2", Case(lora="delta", moved=True))

    def recorded_late(case):
        record_base(shard(make_model(case, torch.float64)), CASES["layers"], torch.float64)

    def step_under_ddp(optimizer, model):
        model = torch.nn.parallel.DistributedDataParallel(model)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    def other_weights(case, seed=rank):
        torch.manual_seed(seed)
        model = torch.nn.Linear(2, 2)
        optimizer = SGD(model.parameters(), lr=0.1)
        LipschitzRegularizer(optimizer, weight=1.0)
        step_under_ddp(optimizer, model)

    def other_weights_by_name(case):
        torch.manual_seed(rank)
        model = torch.nn.Linear(2, 2)
        step_under_ddp(optim.SGD(model.parameters(), lr=0.1, lipschitz_weight=1.0), model)

    def other_weights_in_a_script(case):
        with TemporaryDirectory() as folder:
            script = Path(folder, "train.py")
            script.write_text(UNSEEDED)
            run.main(["--lipschitz_weight=1", str(script)])

    other_weights(RESUMED, seed=0)  # is none
    said = {}
    mistakes = [sharded_after, by_columns, copied, moved_under_lora, recorded_late]
    for mistake in [*mistakes, other_weights, other_weights_by_name, other_weights_in_a_script]:
        try:
            mistake(RESUMED)
        except (ValueError, SystemExit) as error:
            said[mistake.__name__] = str(error)
    return said


def work(rank, size, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.distributed.init_process_group("gloo")
    results = {
        (engine, name): run_case(engine, case, rank, size) for engine in ENGINES for name, case in CASES.items()
    }
    results["copies"] = {name: run_copies(CASES[name], rank, size) for name in FEW}
    results["bfloat16"] = {name: run_bfloat16(CASES[name], rank, size) for name in FEW}
    results["checkpoint"] = run_distributed_checkpoint(f"{folder}/distributed", rank, size)
    results["accelerate"] = run_accelerate_checkpoint(f"{folder}/accelerate", rank, size)
    results["pull"] = pull(rank, size)
    results["refusals"] = refusals(rank, size)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


# The tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(2, port, str(folder)), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """What each process computed."""
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone():
    """What one process computes."""
    return {name: run_alone(case) for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_like_one(engine, name, results, alone):
    result = results[0][engine, name]
    weights, metrics = differences(result, alone[name])
    assert weights < EXACT and metrics < ROUNDED
    assert result["state"] == alone[name]["state"]  # with the fingerprint of the base


@pytest.mark.parametrize("name", CASES)
def test_the_penalty_matters_in_every_case(name, alone):
    free = run_alone(CASES[name], strength=1e-9)
    assert differences(free, alone[name])[0] > 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_all_processes_get_the_same_metrics(engine, results):
    for name in CASES:
        assert str(results[0][engine, name]["metrics"]) == str(results[1][engine, name]["metrics"])


@pytest.mark.parametrize("name", FEW)
def test_sums_are_over_the_processes_that_share_a_parameter(name, results, alone):
    weights, metrics = differences(results[0]["copies"][name], alone[name])
    assert weights < EXACT and metrics < ROUNDED


@pytest.mark.parametrize("name", FEW)
def test_in_bfloat16_two_processes_train_nearly_like_one(name, results, alone):
    distance, expected = (m["lipschitz/distance"] for m in (results[0]["bfloat16"][name], alone[name]["metrics"]))
    assert distance == pytest.approx(expected, rel=0.02)


def test_checkpoints_of_two_processes_resume_on_two(results, alone):
    for result in (results[0]["checkpoint"]["outcome"], results[0]["accelerate"]):
        assert differences(result, alone["coupled tensor_mean"])[0] < EXACT
        assert result["state"]["steps"] == STEPS


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoints_of_two_processes_resume_on_one(folder, results, alone):
    model = make_model(RESUMED, torch.float64)
    optimizer = make_optimizer(model, RESUMED)
    regularizer = make_regularizer(model, optimizer, RESUMED, None)
    load(model, optimizer, regularizer, results[0]["checkpoint"]["state"], folder / "distributed")
    train(model, optimizer, regularizer, RESUMED, range(2, STEPS), torch.float64)
    assert differences(outcome(model, regularizer, RESUMED), alone["coupled tensor_mean"])[0] < EXACT


def test_sharded_parameters_are_pulled(results):
    (distance, drift), (rest, less) = results[0]["pull"]
    assert rest == pytest.approx(distance / 4)
    assert less < 0.9 * drift  # the next forward pass sees it


def test_what_cannot_be_right_is_refused(results):
    said = results[0]["refusals"]
    assert "after `accelerator.prepare`" in said["sharded_after"]
    assert "Shard(dim=1)" in said["by_columns"]
    assert "nothing" in said["copied"]
    assert "LoRA on sharded weights" in said["moved_under_lora"]
    assert "before FSDP2" in said["recorded_late"]
    assert "The processes have different anchors" in said["other_weights"]
    assert "The processes have different anchors" in said["other_weights_by_name"]
    assert said["other_weights_in_a_script"].startswith("python -m lipschitz_reg.run: error: The processes have")
