# A denoiser and a pipeline in a few lines, for the tests of recordings, replays and drift. Holds no tests.
import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lipschitz_reg import record


TIMESTEPS = (900, 600, 300)


class Block(nn.Module):
    """Cross-attention of one head, and dropout."""

    def __init__(self, dropout):
        super().__init__()
        self.to_q, self.to_k = nn.Linear(8, 8, bias=False), nn.Linear(5, 8, bias=False)
        self.to_v, self.to_out = nn.Linear(5, 8, bias=False), nn.Linear(8, 8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, words):
        attention = (self.to_q(x) @ self.to_k(words).mT).softmax(-1)
        return x + self.dropout(self.to_out(attention @ self.to_v(words)))


class Denoiser(nn.Module):
    """Samples (batch, 4, 3), one timestep or one for each, and embeddings (batch, 2, 5) of prompts."""

    def __init__(self, dropout=0.0, checkpointing=None):
        super().__init__()
        self.checkpointing = checkpointing
        self.conv_in, self.time, self.conv_out = nn.Linear(3, 8), nn.Linear(1, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([Block(dropout), Block(dropout)])

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        time = (timestep.to(sample) / 1000).expand(len(sample))
        x = self.conv_in(sample) + self.time(time[:, None, None])
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, encoder_hidden_states, use_reentrant=self.checkpointing == "reentrant")
            else:
                x = block(x, encoder_hidden_states)
        x = self.conv_out(x.tanh())
        return {"sample": x} if return_dict else (x,)


def make_denoiser(kind="full", dtype=torch.float64, seed=0, **options):
    """`kind` says what trains: all parameters, LoRA, or the keys and values as in Custom Diffusion."""
    torch.manual_seed(seed)
    model = Denoiser(**options)
    if kind == "keys and values":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("to_k" in name or "to_v" in name)
    if kind == "lora":
        from peft import LoraConfig, inject_adapter_in_model  # slow, and not for each process

        model.requires_grad_(False)
        config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_k", "to_v", "to_out", "conv_in"])
        inject_adapter_in_model(config, model)
    return model.to(dtype).train()


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def draw(model, seed=1, pictures=2, scale=7.5):
    """As a pipeline does: without prompt and with it in one batch, and each prediction leads to the next sample."""
    generator = torch.Generator().manual_seed(seed)
    parameter = next(model.parameters())
    sample, words = (torch.randn(pictures, *shape, generator=generator).to(parameter) for shape in ((4, 3), (2, 5)))
    none = torch.linspace(-1, 1, 10).view(1, 2, 5).to(words).expand_as(words)
    words, training = torch.cat([none, words]), model.training
    model.eval()
    for timestep in TIMESTEPS:
        answer = model(torch.cat([sample] * 2), torch.tensor(timestep), encoder_hidden_states=words)["sample"]
        without, with_prompt = answer.chunk(2)
        sample = sample - 0.3 * (without + scale * (with_prompt - without))
    model.train(training)
    return sample


def record_denoiser(model, **options):
    """Three calls that are replayed, of four rows each, and six by which drift is measured."""
    with record(model, **options) as recording:
        draw(model)
        with recording.held_out():
            draw(model, seed=2)
            draw(model, seed=3)
    return recording


def backward(model, seed, scaler=None):
    """The gradients of a loss on a batch that the seed determines."""
    generator = torch.Generator().manual_seed(seed)
    parameter = next(model.parameters())
    sample, words, noise = (
        torch.randn(3, *shape, generator=generator).to(parameter) for shape in ((4, 3), (2, 5), (4, 3))
    )
    timesteps = torch.randint(1000, (3,), generator=generator)
    loss = (model(sample, timesteps, words)["sample"] - noise).square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()


def train(model, optimizer, steps=3, first=0):
    for seed in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()
    return model


def moved(model, size=0.1):
    """Each parameter that trains away from where it is, in place."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def frozen_copy(model):
    """What the model is now, to be asked later."""
    return copy.deepcopy(model).eval().requires_grad_(False)
