"""
A finished model as its base plus a displacement that can be made smaller: a whole pipeline, or a LoRA. Holds no
measure of drift and no budget (budget.py). diffusers and safetensors are imported where they are needed.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .commands import load_pipeline, one_line, quiet
from .pipelines import denoiser_of, text_encoders_of
from .recording import canonical
from .repair import scaled


LORA_FILE = "pytorch_lora_weights.safetensors"

# Takes the name of a weight, its displacement and the share; returns what the displacement becomes.
Reduce = Callable[[str, Tensor, float], Tensor]

# Keys of diffusers, of peft and of kohya's trainers.
_UP = re.compile(r"(\.lora_B(\.[\w-]+)?|[._]lora[._]up|\.lora_linear_layer\.up)\.(weight|bias)$")
_DOWN = re.compile(r"(\.lora_A(\.[\w-]+)?|[._]lora[._]down|\.lora_linear_layer\.down)\.weight$")
_DORA = re.compile(r"\.(dora_scale|lora_magnitude_vector)\b")


class FullModel:
    """
    A pipeline whose denoiser, and perhaps text encoders, were trained.

    Args:
        base: The pipeline that it began as, in the same precision. It may be moved off the accelerator.
        folder (`Path`): Of the personalized pipeline.

    Attributes:
        pipeline: The personalized one, which `move` changes.
        text_encoders (`bool`): Whether text encoders moved too.

    Raises:
        `ValueError`: If it is of another architecture, or nothing was trained.
    """

    def __init__(self, base: Any, folder: Path, precision: str):
        self.folder = folder
        base.to("cpu")
        self.pipeline = load_pipeline("PERSONALIZED", str(folder), precision)
        self.pipeline.scheduler = base.scheduler  # to draw as the base does
        name = next(name for name in ("unet", "transformer") if getattr(base, name, None) is denoiser_of(base))
        parts = {name: denoiser_of(base), **text_encoders_of(base)}
        self.moved = {}
        for part, model in parts.items():
            moved = _displaced(part, model, getattr(self.pipeline, part, None))
            if moved:
                self.moved[part] = moved
        if not self.moved:
            raise ValueError(f"PERSONALIZED: {folder} is not trained: its weights are those of BASE.")
        self.denoiser, self.text_encoders = name, bool(self.moved.keys() - {name})

    @torch.no_grad()
    def move(self, share: float, reduce: Reduce = scaled) -> None:
        """Put the denoiser at base + reduce(displacement); text encoders at base + share * displacement."""
        for part, rows in self.moved.items():
            for name, target, base, trained in rows:
                displacement = trained.to(target.device) - base.to(target.device)
                change = (reduce if part == self.denoiser else scaled)(name, displacement, share)
                target.copy_(base.to(target.device) + change)

    def save(self, folder: Path, share: float) -> None:
        """Write the pipeline as it is now: what moved in the precision of the personalized one, the rest copied."""
        unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
        unfinished.mkdir(parents=True)
        shutil.copy2(self.folder / "model_index.json", unfinished)
        for part in self.pipeline.components:
            if part in self.moved:
                dtype = _stored_dtype(self.folder / part)
                with quiet():
                    getattr(self.pipeline, part).to(dtype).save_pretrained(unfinished / part)
            elif (self.folder / part).is_dir():
                shutil.copytree(self.folder / part, unfinished / part)
        if folder.exists():
            folder.rmdir()  # empty
        unfinished.rename(folder)


class LoraModel:
    """
    A LoRA on its base.

    Args:
        base: The pipeline, to which the adapter is added.
        file (`Path`): Of its weights, with the keys of diffusers, peft or kohya's trainers.

    Attributes as in `FullModel`.

    Raises:
        `ValueError`: If it is not a LoRA, or does not fit the base.
    """

    def __init__(self, base: Any, file: Path):
        self.file, self.pipeline = file, base
        self.tensors, self.metadata = _read(file)
        _check_keys(file, self.tensors)
        try:
            with quiet():
                base.load_lora_weights(str(file.parent), weight_name=file.name)
        except Exception as error:  # of whatever class diffusers or peft raise
            raise ValueError(f"PERSONALIZED: cannot load {file} on this base: {one_line(str(error))}") from error
        denoiser = denoiser_of(base)
        self.rows = [row for model in (denoiser, *text_encoders_of(base).values()) for row in _lora_rows(model)]
        of_denoiser = len(_lora_rows(denoiser))
        self.text_encoders = len(self.rows) > of_denoiser
        if not self.rows:
            raise ValueError(f"PERSONALIZED: {file} has nothing for this base: it is of another architecture.")
        self.of_denoiser = {row.down for row in self.rows[:of_denoiser]}
        self.key_of: dict[Tensor, str] = {}

    @torch.no_grad()
    def move(self, share: float, reduce: Reduce = scaled) -> None:
        """
        Multiply the up factors by the share; or with another `reduce`, which takes the names of the denoiser's
        weights, set the down factors to what it returns.
        """
        if reduce is not scaled and not self.key_of:
            self.key_of = self._match()
        for name, down, ups, trained_down, trained_ups in self.rows:
            if reduce is not scaled:
                down.copy_((reduce if down in self.of_denoiser else scaled)(name, trained_down, share))
            for up, trained in zip(ups, trained_ups, strict=True):
                up.copy_(trained if reduce is not scaled and up.dim() > 1 else share * trained)

    def save(self, path: Path, share: float) -> None:
        """Write the file with the same keys and precision."""
        from safetensors.torch import save_file

        tensors = dict(self.tensors)
        if self.key_of:
            downs = {key: down for down, key in self.key_of.items()}
            tensors |= {key: down.detach().to("cpu", tensors[key].dtype).contiguous() for key, down in downs.items()}
        for key, tensor in self.tensors.items():
            if _UP.search(key) and not (self.key_of and key.endswith("weight")):
                tensors[key] = (share * tensor.float()).to(tensor.dtype)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
        save_file(tensors, unfinished, metadata=self.metadata)
        unfinished.replace(path)

    def _match(self) -> dict[Tensor, str]:
        """The key in the file of each down factor: diffusers renames layers, but not what is in them."""
        keys: dict[bytes, str] = {}
        for key, tensor in self.tensors.items():
            if _DOWN.search(key):
                keys[_bytes(tensor.to(self.rows[0].down.dtype))] = key
        found = {row.down: keys.get(_bytes(row.down)) for row in self.rows}
        if None in found.values() or len(set(found.values())) < len(found):
            raise ValueError(
                f"PERSONALIZED: the layers of {self.file} are not those of diffusers, which the repair needs: convert "
                "it, or do without the repair."
            )
        return found


class _LoraRow(NamedTuple):
    """An adapter in a model: the weight that it adds to, its factors, a bias after the up factor too, and copies."""

    name: str
    down: Tensor
    ups: list[Tensor]
    trained_down: Tensor
    trained_ups: list[Tensor]


def _lora_rows(model: nn.Module) -> list[_LoraRow]:
    rows = []
    for name, module in model.named_modules():
        for adapter in getattr(module, "lora_A", None) or ():
            down, ups = module.lora_A[adapter].weight, list(module.lora_B[adapter].parameters())
            copies = down.detach().clone(), [up.detach().clone() for up in ups]
            rows.append(_LoraRow(canonical(f"{name}.weight"), down, ups, *copies))
    return rows


def _displaced(part: str, base: nn.Module, trained: nn.Module | None) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """
    The tensors that were trained: name, where the model has it, and its values in the base and after training, in host
    memory. Rows that an embedding has for new tokens are not among them: these have no base.
    """
    if type(base) is not type(trained):
        found = "no such part" if trained is None else f"a {type(trained).__name__}"
        raise ValueError(f"PERSONALIZED: {part} is {found}, and a {type(base).__name__} in BASE.")
    before, after = base.state_dict(), trained.state_dict()
    rows = []
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after or before[name].shape[1:] != after[name].shape[1:]:
            raise ValueError(f"PERSONALIZED: {part} is of another architecture than in BASE: see {name}.")
        old, new = before[name], after[name]
        if len(new.shape) and len(new) > len(old) and "embed" in name:
            new = new[: len(old)]
        if old.shape != new.shape:
            raise ValueError(f"PERSONALIZED: {part} is of another architecture than in BASE: see {name}.")
        if new.is_floating_point() and not torch.equal(old.cpu(), new.cpu()):
            rows.append((name, new, old.cpu(), new.detach().cpu().clone()))
    return rows


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()
    except SafetensorError as error:
        raise ValueError(f"PERSONALIZED: {file} is not a safetensors file, or broken: {error}") from error


def _check_keys(file: Path, keys: Iterable[str]) -> None:
    if not any(_UP.search(key) for key in keys):
        raise ValueError(f"PERSONALIZED: {file} is not a LoRA: it has no up factors.")
    for key in keys:
        if _DORA.search(key):
            raise ValueError(f"PERSONALIZED: {file} is a DoRA, which no number makes smaller: {key}.")
        if not (_UP.search(key) or _DOWN.search(key) or key.endswith(".alpha")):
            raise ValueError(f"PERSONALIZED: {file} has more than the factors of a LoRA: {key}.")


def _stored_dtype(folder: Path) -> torch.dtype:
    """The precision of the weights in a folder; float32 where they are not safetensors."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as opened:
            for key in opened.keys():
                dtype = opened.get_tensor(key).dtype
                if dtype.is_floating_point:
                    return dtype
    return torch.float32


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy()).digest()
