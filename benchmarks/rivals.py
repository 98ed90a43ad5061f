# What people use against drift besides lower rates and prior preservation, as changes to a training script.
# Trains and measures nothing: tradeoff.py does.
"""
Each rival gets the training script as a module of its own, replaces functions of it, and is then as good as built in.
The base's predictions come from a copy of the base, which is what switching a LoRA off or a cache would give.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

from lipschitz_reg import Recording
from lipschitz_reg.lora import find_adapters


class SelectiveDecay:
    """
    Selective Projection Decay (Tian et al. 2024, arXiv 2411.01713): a tensor is pulled back only if its gradient asks
    for that, pointing the same way as its displacement from where it began. The pull undoes, times `strength`, that
    by which the step has made the displacement longer; at 1 it is a projection.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, strength: float):
        self.strength = strength
        self.anchors = {parameter: parameter.detach().clone() for parameter in parameters_of(optimizer)}
        optimizer.register_step_pre_hook(self.before_step)
        optimizer.register_step_post_hook(self.after_step)

    @torch.no_grad()
    def before_step(self, *_) -> None:
        self.lengths = {}
        for parameter, anchor in self.anchors.items():
            displacement = parameter - anchor
            if parameter.grad is not None and (parameter.grad * displacement).sum() > 0:
                self.lengths[parameter] = displacement.norm()

    @torch.no_grad()
    def after_step(self, *_) -> None:
        for parameter, length in self.lengths.items():
            growth = (1 - length / (parameter - self.anchors[parameter]).norm()).clamp(min=0)
            parameter.lerp_(self.anchors[parameter], (self.strength * growth).clamp(max=1))


class NullSpace:
    """
    Projects what each step does to a weight onto the null space of the inputs that its layer had on other prompts, as
    AlphaEdit (arXiv 2410.02355) and its relatives do: onto what is orthogonal to the leading directions of the inputs,
    as many as hold the share `energy` of them. The input of a bias is 1, and has no null space: it stays, as do norms.
    Of a LoRA, the factor that gets the inputs begins in the null space.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, recording: Recording, energy: float):
        self.directions, self.frozen = {}, []
        moments = recording.moments()
        adapters = find_adapters(parameters_of(optimizer))
        moments |= {adapter.down: moments[adapter.weight] for adapter in adapters}
        free = {adapter.up for adapter in adapters}
        for parameter in parameters_of(optimizer):
            moment = moments.get(parameter)
            if parameter in free or moment is None:  # such as a new word
                continue
            if not moment.root.numel():
                self.frozen.append(parameter)
                continue
            vectors, values, _ = torch.linalg.svd(moment.root.double(), full_matrices=False)
            held = values.square().cumsum(0) / (values.square().sum() + len(moment.root) * moment.rest.double())
            count = min(int((held < energy).sum()) + 1, int((values > 1e-3 * values[0]).sum()))
            self.directions[parameter] = vectors[:, :count].float()
        self.before = {adapter.down: torch.zeros_like(adapter.down) for adapter in adapters}
        self.after_step()
        optimizer.register_step_pre_hook(self.before_step)
        optimizer.register_step_post_hook(self.after_step)

    @torch.no_grad()
    def before_step(self, *_) -> None:
        for parameter in self.frozen:
            parameter.grad = None
        self.before = {parameter: parameter.detach().clone() for parameter in self.directions}

    @torch.no_grad()
    def after_step(self, *_) -> None:
        for parameter, before in self.before.items():
            change, directions = (parameter - before).flatten(1), self.directions[parameter]
            parameter.sub_((change @ directions @ directions.T).view_as(parameter))


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def selective_decay(script: ModuleType, strength: float, **_) -> None:
    build_optimizer = script.build_optimizer

    def build(*arguments):
        optimizer = build_optimizer(*arguments)
        SelectiveDecay(optimizer, strength)
        return optimizer

    script.build_optimizer = build


def null_space(script: ModuleType, energy: float, recording: Callable[[], Path], **_) -> None:
    attach_lipschitz = script.attach_lipschitz

    def attach(args, accelerator, pipeline, optimizer, *rest):
        NullSpace(optimizer.optimizer, Recording.load(recording(), pipeline.unet), energy)
        return attach_lipschitz(args, accelerator, pipeline, optimizer, *rest)

    script.attach_lipschitz = attach


def output_preservation(script: ModuleType, multiplier: float, prompt: str) -> None:
    """
    Differential output preservation, as ai-toolkit has it for LoRA (`diff_output_preservation`): on the noisy latents
    of the step, with another prompt, the prediction of the base is the target of a second pass, and its mean squared
    error is added to the loss.
    """
    attach_lipschitz, compute_loss, predict = script.attach_lipschitz, script.compute_loss, script.predict
    known, calls = {}, []

    def attach(args, accelerator, pipeline, *rest):
        known["base"] = copy.deepcopy(pipeline.unet).requires_grad_(False).eval()
        models = script.tokenizers_of(pipeline), script.text_encoders_of(pipeline)
        with torch.no_grad():
            known["conditions"] = script.encode_prompts([prompt], *models)
        return attach_lipschitz(args, accelerator, pipeline, *rest)

    def remember(unet, noisy_latents, timesteps, conditions, sizes):
        calls.append((unet, noisy_latents, timesteps, sizes))
        return predict(unet, noisy_latents, timesteps, conditions, sizes)

    def compute(*arguments):
        calls.clear()
        instance_loss, prior_loss = compute_loss(*arguments)
        ((unet, noisy_latents, timesteps, sizes),) = calls
        conditions = {
            name: embeds.expand(len(timesteps), *embeds.shape[1:]) for name, embeds in known["conditions"].items()
        }
        with torch.no_grad():
            target = predict(known["base"], noisy_latents, timesteps, conditions, sizes)
        answer = predict(unet, noisy_latents, timesteps, conditions, sizes)
        return instance_loss + multiplier * F.mse_loss(answer.float(), target.float()), prior_loss

    script.attach_lipschitz, script.compute_loss, script.predict = attach, compute, remember


def class_preservation(script: ModuleType, multiplier: float, class_prompt: str, **_) -> None:
    output_preservation(script, multiplier, class_prompt)


def blank_preservation(script: ModuleType, multiplier: float, **_) -> None:
    output_preservation(script, multiplier, "")


def eight_bit_anchors(script: ModuleType, weight: float, **_) -> None:
    """Anchors as trainers keep them to save memory: 8-bit numbers, with a scale for each 128 of them."""
    regularizer = script.LipschitzRegularizer

    def attach(optimizer, **options):
        anchors = {parameter: rounded_to_8_bits(parameter.detach()) for parameter in parameters_of(optimizer)}
        return regularizer(optimizer, **{**options, "anchors": anchors})

    script.LipschitzRegularizer = attach


def rounded_to_8_bits(tensor: torch.Tensor, block: int = 128) -> torch.Tensor:
    flat = tensor.flatten()
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return ((blocks / scale).round() * scale).flatten()[: len(flat)].view_as(tensor)


# By the last part of a method's name. Called with the script, the weight of the row, and what else there is.
RIVALS: dict[str, Callable[..., None]] = {
    "selective projection decay": selective_decay,
    "null space": null_space,
    "class preservation": class_preservation,
    "blank prompt preservation": blank_preservation,
    "proximal with 8-bit anchors": eight_bit_anchors,
}
