# The callbacks in the real trainers of transformers and Lightning: against a regularizer attached by hand, from
# checkpoints, and on adapters of peft. What a regularizer does is in test_regularizer.py; accelerate is there too.
import os
import subprocess
import sys
import warnings
from pathlib import Path

import lightning
import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lipschitz_reg import LipschitzRegularizer, integrations
from lipschitz_reg.lora import find_adapters


WEIGHT = 20.0
STEPS = 8  # and a checkpoint after half of them
OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


class Callback(lightning.Callback):
    pass


class Points(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        return {"x": x, "labels": x.flip(0)}


class Net(nn.Module):
    """It returns its loss, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x, labels):
        return {"loss": (self.last(self.first(x).tanh()) - labels).square().mean()}


def make_net(kind="full", seed=0):
    torch.manual_seed(seed)
    net = Net()
    if kind == "lora":
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["first", "last"]), net)
    return net


def trained(net):
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def values(net):
    return [parameter.detach().clone() for parameter in net.parameters()]


def assert_equal(first, second):
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def attach(optimizer, net):
    LipschitzRegularizer(optimizer, weight=WEIGHT, adapters=find_adapters(net.parameters()))
    return optimizer


def run_transformers(net, folder, callback=None, optimizer="AdamW", resumes=False, batch=4, processes=1):
    """Without a callback, with a regularizer by hand. Returns the net."""
    optimizer = OPTIMIZERS[optimizer](trained(net))
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=batch, save_steps=STEPS // 2, seed=0,
        report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    callbacks = [callback] if callback else []
    trainer = transformers.Trainer(
        net, args, train_dataset=Points(), optimizers=(optimizer, None), callbacks=callbacks
    )
    if callback is None:
        attach(optimizer, net)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}") if resumes else None)
    return net


class Module(lightning.LightningModule):
    def __init__(self, net, optimizer):
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def training_step(self, batch, index):
        return self.net(**batch)["loss"]

    def configure_optimizers(self):
        return OPTIMIZERS[self.optimizer](trained(self.net))


def run_lightning(net, folder, callback=None, optimizer="AdamW", resumes=False, batch=4, processes=1):
    """Without a callback, in a loop by hand: the penalty comes after clipping. Returns the net."""
    batches = DataLoader(Points(), batch_size=batch)
    if callback is None:
        optimizer = attach(OPTIMIZERS[optimizer](trained(net)), net)
        for step in range(STEPS):
            optimizer.zero_grad()
            net(**[*batches][step % len(batches)])["loss"].backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        return net
    saver = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, "{step}", every_n_train_steps=STEPS // 2, save_top_k=-1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about workers, and checkpoints within an epoch
        trainer = lightning.Trainer(
            accelerator="cpu", max_steps=STEPS, logger=False, enable_progress_bar=False, gradient_clip_val=1.0,
            enable_model_summary=False, callbacks=[saver, callback], devices=processes,
        )  # fmt: skip
        checkpoint = folder / f"step={STEPS // 2}.ckpt" if resumes else None
        trainer.fit(Module(net, optimizer), batches, ckpt_path=checkpoint)
    return net


TRAINERS = {
    "transformers": (run_transformers, "TransformersCallback"),
    "lightning": (run_lightning, "LightningCallback"),
}


@pytest.fixture(params=TRAINERS)
def run(request):
    return TRAINERS[request.param][0]


@pytest.fixture
def make(run):
    (name,) = [name for other, name in TRAINERS.values() if other is run]
    return getattr(integrations, name)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_is_a_regularizer_attached_by_hand(optimizer, kind, run, make, tmp_path):
    callback = make(WEIGHT)
    net = run(make_net(kind), tmp_path / "1", callback, optimizer)
    other = run(make_net(kind), tmp_path / "2", None, optimizer)
    assert_equal(values(net), values(other))
    (regularizer,) = callback.regularizers
    assert regularizer.metrics()["lipschitz/penalty"] > 0


def test_weight_zero_attaches_nothing(run, make, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "WEIGHT", 0.0)
    callback = make(0.0)
    assert_equal(values(run(make_net(), tmp_path / "1", callback)), values(run(make_net(), tmp_path / "2")))
    assert not callback.regularizers[0].optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_resumed_it_is_anchored_to_the_base(kind, run, make, tmp_path):
    """Both trainers load a checkpoint before there is an optimizer, or into one that is there."""
    callback = make(WEIGHT)
    whole = run(make_net(kind), tmp_path, callback)
    again = make(WEIGHT)
    resumed = run(make_net(kind), tmp_path, again, resumes=True)
    assert_equal(values(resumed), values(whole))
    assert again.regularizers[0].state_dict() == callback.regularizers[0].state_dict()
    assert again.regularizers[0].metrics() == callback.regularizers[0].metrics()


def test_checkpoints_of_another_base_are_refused(run, make, tmp_path):
    run(make_net(), tmp_path / "penalized", make(WEIGHT))
    with pytest.raises(ValueError, match="another base model"):
        run(make_net(seed=1), tmp_path / "penalized", make(WEIGHT), resumes=True)


def test_a_checkpoint_without_the_callback_is_refused(run, make, tmp_path):
    run(make_net(), tmp_path, Callback() if run is run_lightning else None)
    with pytest.raises(ValueError, match=f"saved by a training without {make.__name__}"):
        run(make_net(), tmp_path, make(WEIGHT), resumes=True)


def test_a_second_training_keeps_the_base(run, make, tmp_path):
    callback, net, start = make(WEIGHT), make_net(), values(make_net())
    run(net, tmp_path / "1", callback)
    run(net, tmp_path / "2", callback)
    distance = sum((p - q).square().sum().item() for p, q in zip(values(net), start, strict=True)) ** 0.5
    assert callback.regularizers[-1].metrics()["lipschitz/distance"] == pytest.approx(distance, rel=1e-5)


def test_another_optimizer_of_the_same_trainer_keeps_the_base(tmp_path):
    callback, net, start = integrations.TransformersCallback(WEIGHT), make_net(), values(make_net())
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=STEPS, seed=0, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(net, args, train_dataset=Points(), callbacks=[callback])
    for _ in range(2):
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.train()
    distance = sum((p - q).square().sum().item() for p, q in zip(values(net), start, strict=True)) ** 0.5
    assert callback.regularizers[-1].metrics()["lipschitz/distance"] == pytest.approx(distance, rel=1e-5)


def test_options_are_those_of_the_regularizer(run, make, tmp_path):
    callback, start = make(1.0, mode="projected", radius=0.05), values(make_net())
    net = run(make_net(), tmp_path, callback)
    distance = sum((p - q).square().sum().item() for p, q in zip(values(net), start, strict=True)) ** 0.5
    assert distance == pytest.approx(0.05, rel=1e-4)


# In each of two processes: each trainer, and then with weights that DDP has to make equal.
TWO = """
import sys, warnings
import torch
import test_integrations as tests
from pathlib import Path

warnings.simplefilter("ignore")
ends = {}
for name, (run, callback) in tests.TRAINERS.items():
    callback = getattr(tests.integrations, callback)
    net = run(tests.make_net(), Path(name), callback(tests.WEIGHT), "SGD", batch=8, processes=2)
    rank = torch.distributed.get_rank()
    try:
        run(tests.make_net(seed=rank), Path(name, "unseeded"), callback(tests.WEIGHT), processes=2)
    except ValueError as error:
        ends[name] = tests.values(net), str(error)
torch.save(ends, f"{rank}.pt")
torch.distributed.barrier()  # Lightning leaves the group open: a process that goes while the other talks may abort
torch.distributed.destroy_process_group()
"""


def test_two_processes_train_like_one(tmp_path):
    tmp_path.joinpath("two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "two.py"]
    folders = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    environment = {**os.environ, "PYTHONPATH": folders, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for name, (run, callback) in TRAINERS.items():
        callback = getattr(integrations, callback)(WEIGHT)
        alone = run(make_net(), tmp_path / f"{name} alone", callback, "SGD", batch=len(Points()))
        for rank in range(2):
            ended, error = torch.load(tmp_path / f"{rank}.pt")[name]
            for value, other in zip(ended, values(alone), strict=True):
                torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)
            assert "The processes have different anchors" in error


def test_unknown_callbacks_are_said():
    with pytest.raises(AttributeError, match="It has: TransformersCallback, LightningCallback."):
        integrations.KerasCallback
