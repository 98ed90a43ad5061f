# Anchors: copies of the pretrained parameters in as few bytes as give back every bit, and the fingerprint that tells them apart.
# Holds no arithmetic of the penalty and nothing about optimizers.
import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


# Part of what a fingerprint means: changing either makes every saved fingerprint a stranger.
_FINGERPRINT_BLOCK = 1 << 18
_FINGERPRINT_MULTIPLIER = 0x5851F42D4C957F2D

_SAME_WIDTH_INTEGER = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def smallest_lossless_dtype(tensor: Tensor) -> torch.dtype:
    """
    The narrowest of float16, bfloat16, float32 and float64 from which every bit of the tensor comes back.

    Bits are compared, not values: the sign of a zero and the payload of a NaN count. Weights published in float16 and loaded in
    float32 need 2 bytes an element; weights that were trained in float32 need 4.
    """
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        if dtype.itemsize < tensor.dtype.itemsize and _survives(tensor, dtype):
            return dtype
    return tensor.dtype


def _survives(tensor: Tensor, dtype: torch.dtype) -> bool:
    integer = _SAME_WIDTH_INTEGER[tensor.dtype]
    # Block by block: weights of full precision betray themselves in the first one.
    return all(
        torch.equal(block.to(dtype).to(block.dtype).view(integer), block.view(integer)) for block in _blocks(tensor)
    )


def _blocks(tensor: Tensor) -> Iterable[Tensor]:
    return tensor.detach().reshape(-1).split(_FINGERPRINT_BLOCK) if tensor.numel() else ()


@torch.no_grad()
def make_anchor(parameter: Tensor, device: torch.device | str | None = None) -> Tensor:
    """
    A copy of the parameter as it is now, in its `smallest_lossless_dtype` and with its memory layout.

    Args:
        parameter (`torch.Tensor`): float16, bfloat16, float32 or float64.
        device (`torch.device` or `str`, *optional*):
            Where to keep it; the parameter's own device by default. On `"cpu"` the memory is pinned if there is a CUDA device,
            so that it can be copied there without waiting.
    """
    device = parameter.device if device is None else torch.device(device)
    pin = device.type == "cpu" and parameter.device.type == "cuda"
    anchor = torch.empty_like(
        parameter, dtype=smallest_lossless_dtype(parameter), device=device, pin_memory=pin, requires_grad=False
    )
    return anchor.copy_(parameter)


@torch.no_grad()
def fingerprint(anchors: Iterable[Tensor]) -> str:
    """
    A digest of the anchors' shapes and values, in order; the same on every device, and in every dtype and memory layout that
    holds the same values.

    The bit patterns of each block of elements, widened to float32 where they are narrower, are multiplied by numbers that
    depend on the position and summed in 64-bit integers, which is exact in whatever order it is done; the sums are hashed.
    """
    digest = hashlib.sha256()
    for anchor in anchors:
        dtype = torch.promote_types(anchor.dtype, torch.float32)
        integer = _SAME_WIDTH_INTEGER[dtype]
        factors = torch.arange(1, min(anchor.numel(), _FINGERPRINT_BLOCK) + 1, device=anchor.device)
        factors = factors * _FINGERPRINT_MULTIPLIER | 1
        sums = [(block.to(dtype).view(integer) * factors[: block.numel()]).sum() for block in _blocks(anchor)]
        digest.update(repr((tuple(anchor.shape), torch.stack(sums).tolist() if sums else [])).encode())
    return digest.hexdigest()
