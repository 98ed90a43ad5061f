"""
What the launcher finds in a running process: its models, and the names of parameters in them. And the weights of a
base in safetensors files, by those names. Holds no optimizers (launcher.py).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .calls import unwrapped_model
from .commands import one_line
from .lora import living_modules
from .recording import canonical


def find_models() -> list[nn.Module]:
    """All modules that are not part of another, largest first, out of their wrappers (DDP, torch.compile, peft)."""
    modules = living_modules()
    parts = {id(part) for module in modules for part in vars(module)["_modules"].values()}
    outer = {id(model): model for model in map(unwrapped_model, (m for m in modules if id(m) not in parts))}
    return sorted(outer.values(), key=lambda model: -sum(parameter.numel() for parameter in model.parameters()))


def names_in(models: Iterable[nn.Module]) -> dict[Tensor, tuple[nn.Module, str]]:
    """The first model that has a parameter, and the name that it has there in the base."""
    names: dict[Tensor, tuple[nn.Module, str]] = {}
    for model in models:
        for name, parameter in model.named_parameters():
            names.setdefault(parameter, (model, canonical(name)))
    return names


class BaseWeights:
    """
    The weights of a base: a safetensors file, or all those in a folder and its folders, as diffusers and transformers
    write them. Files are mapped into memory and read where they are used.

    Raises:
        `ValueError`: If there is no such file, or one cannot be read.
    """

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self.path = path
        self.folders: dict[Path, dict[str, Any]] = {}
        files = [path] if path.is_file() else path.rglob("*.safetensors")
        # Of model.safetensors and model.fp16.safetensors, the first.
        for file in sorted(files, key=lambda file: (len(file.name), file)):
            try:
                opened = safe_open(str(file), framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"--lipschitz_anchor: cannot read {file}: {one_line(error)}") from error
            keys = self.folders.setdefault(file.parent, {})
            for key in opened.keys():
                keys.setdefault(key, opened)
        if not self.folders:
            raise ValueError(f"--lipschitz_anchor: there is no .safetensors file in {path}.")

    def find(self, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """
        Tensors of one model by the names and shapes of its parameters, memory-mapped.

        Raises:
            `ValueError`: If they are in no folder, or in more than one.
        """
        missing = None
        for by_ending in (False, True):  # names of another version of the library may be longer or shorter in front
            matches = []
            for folder, keys in self.folders.items():
                found = {name: _key(keys, name, shape, by_ending) for name, shape in wanted.items()}
                if None not in found.values():
                    matches.append((folder, found))
                elif missing is None or list(found.values()).count(None) < missing[1]:
                    missing = next(n for n, key in found.items() if key is None), list(found.values()).count(None)
            if len(matches) > 1:
                raise ValueError(
                    f"--lipschitz_anchor: {matches[0][0]} and {matches[1][0]} both have the weights of this model: "
                    "give the folder of the one that it began as."
                )
            if matches:
                ((folder, found),) = matches
                return {name: self.folders[folder][key].get_tensor(key) for name, key in found.items()}
        raise ValueError(
            f"--lipschitz_anchor: {self.path} has no {missing[0]} of the shape {tuple(wanted[missing[0]])}. If it is "
            "not part of the base, leave it out with --lipschitz_exclude."
        )


def _key(keys: Mapping[str, Any], name: str, shape: tuple[int, ...], by_ending: bool) -> str | None:
    names = [name]
    if by_ending:
        names = [key for key in keys if key.endswith(f".{name}") or name.endswith(f".{key}")]
    fitting = [key for key in names if key in keys and tuple(keys[key].get_slice(key).get_shape()) == tuple(shape)]
    return fitting[0] if len(fitting) == 1 else None
