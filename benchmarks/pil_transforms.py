# Stands in for `torchvision.transforms` and its `functional` in diffusers' example scripts, where torchvision is not
# installed: what these scripts use of it, with Pillow. Knows no batches, no tensors as inputs and no antialiasing.
# `copy_script` makes a script use it.
import importlib.util
import random
import shutil
from enum import Enum
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps


def copy_script(script: Path, folder: Path) -> Path:
    """The script; where torchvision is not installed, a copy in the folder that imports this file in its place."""
    if importlib.util.find_spec("torchvision"):
        return script
    text = script.read_text(encoding="utf-8")
    text = text.replace("from torchvision import transforms\n", "import pil_transforms as transforms\n")
    text = text.replace("from torchvision.transforms.functional import crop\n", "from pil_transforms import crop\n")
    text = text.replace("from torchvision.transforms import functional as TF\n", "import pil_transforms as TF\n")
    shutil.copy(__file__, folder)
    copy = folder / script.name
    copy.write_text(text, encoding="utf-8")
    return copy


class InterpolationMode(Enum):
    NEAREST, BILINEAR, BICUBIC, LANCZOS = "nearest", "bilinear", "bicubic", "lanczos"


def resize(image, size, interpolation=InterpolationMode.BILINEAR):
    """To (height, width), or with its shorter side to a number."""
    if isinstance(size, int):
        scale = size / min(image.size)
        size = [round(image.height * scale), round(image.width * scale)]
    return image.resize((size[1], size[0]), getattr(Image.Resampling, interpolation.name))


def crop(image, top, left, height, width):
    return image.crop((left, top, left + width, top + height))


def center_crop(image, size):
    height, width = (size, size) if isinstance(size, int) else size
    return crop(image, (image.height - height) // 2, (image.width - width) // 2, height, width)


def to_tensor(image):
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)


def normalize(image, mean, std):
    return (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def hflip(image):
    return ImageOps.mirror(image)


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image


class Resize:
    def __init__(self, size, interpolation=InterpolationMode.BILINEAR):
        self.size, self.interpolation = size, interpolation

    def __call__(self, image):
        return resize(image, self.size, self.interpolation)


class CenterCrop:
    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        return center_crop(image, self.size)


class RandomCrop:
    def __init__(self, size):
        self.size = (size, size) if isinstance(size, int) else size

    @staticmethod
    def get_params(image, output_size):
        height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
        return random.randint(0, image.height - height), random.randint(0, image.width - width), height, width

    def __call__(self, image):
        return crop(image, *self.get_params(image, self.size))


class RandomHorizontalFlip:
    def __init__(self, p=0.5):
        self.p = p

    def __call__(self, image):
        return hflip(image) if random.random() < self.p else image


class Lambda:
    def __init__(self, function):
        self.function = function

    def __call__(self, image):
        return self.function(image)


class ToTensor:
    def __call__(self, image):
        return to_tensor(image)


class Normalize:
    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    def __call__(self, image):
        return normalize(image, self.mean, self.std)
