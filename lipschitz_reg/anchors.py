"""
Anchors: copies of the pretrained parameters in as few bytes as give back every bit, and a fingerprint of them. Holds
no arithmetic of the penalty and nothing about optimizers.
"""

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .engines import Piece, all_reduce_


# Both belong to the meaning of a fingerprint: with another value, no saved one would match.
_BLOCK = 1 << 18
_MULTIPLIER = 0x5851F42D4C957F2D  # odd, with bits of no pattern

_INTEGER = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


@torch.no_grad()
def smallest_lossless_dtype(tensor: Tensor) -> torch.dtype:
    """
    The narrowest of float16, bfloat16, float32 and float64 from which every bit of the tensor comes back.

    Bits are compared, not values: the sign of a zero and the payload of a NaN count. Weights published in float16 and
    loaded in float32 need 2 bytes an element; weights trained in float32 need 4.
    """
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        if dtype.itemsize < tensor.dtype.itemsize and _survives(tensor, dtype):
            return dtype
    return tensor.dtype


def check_whole(parameter: Tensor) -> None:
    """Raise a ValueError if the parameter is a piece of FSDP1, which looks like a whole one with `use_orig_params`."""
    if getattr(parameter, "_fsdp_flattened", False):
        raise ValueError(
            "Parameters of FullyShardedDataParallel (FSDP1) cannot be penalized, because each process has other "
            "pieces of them: use DDP or FSDP2 (`fully_shard`)."
        )


@torch.no_grad()
def make_anchor(parameter: Tensor, device: torch.device | str | None = None) -> Tensor:
    """
    A copy of the parameter as it is now, in its `smallest_lossless_dtype` and its memory layout.

    Args:
        parameter (`torch.Tensor`): float16, bfloat16, float32 or float64, of any shape.
        device (`torch.device` or `str`, *optional*):
            Where the copy is kept; with the parameter by default. If this is the CPU and there is a CUDA device, the
            memory is pinned, so that the copy can be sent to that device without waiting.

    Raises:
        `ValueError`: If the parameter is of another dtype, sparse or a DTensor.
    """
    check_whole(parameter)
    if parameter.dtype not in _INTEGER or parameter.layout != torch.strided or hasattr(parameter, "to_local"):
        raise ValueError(
            f"A parameter of {parameter.dtype}, {parameter.layout} and type {type(parameter).__name__} cannot be "
            "penalized, only dense float16, bfloat16, float32 and float64 tensors that are not sharded: set "
            "`lipschitz_weight` to 0 in its param group."
        )
    pin_memory = device is not None and torch.device(device).type == "cpu" and torch.cuda.is_available()
    dtype = smallest_lossless_dtype(parameter)
    return torch.empty_like(parameter, dtype=dtype, device=device, pin_memory=pin_memory).copy_(parameter)


@torch.no_grad()
def fingerprint(anchors: Iterable[Tensor | tuple[Tensor, Piece]]) -> str:
    """
    A digest of the anchors' shapes and values, in order. It is the same on every device, in every memory layout, and
    in every dtype up to float32 that holds the same values. Of an anchor that several processes share, each has its
    piece, all have to call this, and the digest is that of the whole.

    The bits of each block, two float32 numbers to an integer of 64 bits, are multiplied by factors that depend on the
    position and summed modulo 2**64, where every order gives the same sum. The sums are hashed.
    """
    digest = hashlib.sha256()
    for anchor in anchors:
        anchor, piece = anchor if isinstance(anchor, tuple) else (anchor, Piece(anchor))
        numel = piece.numel()
        positions = torch.arange(min(numel + numel % 2, _BLOCK), device=anchor.device)
        factors = (positions * _MULTIPLIER) | 1
        sums = torch.zeros(max(math.ceil(numel / _BLOCK), 1), dtype=torch.int64, device=anchor.device)
        for index, block in _blocks_of(piece, anchor):
            wide = block.to(torch.promote_types(block.dtype, torch.float32))
            bits = torch.nn.functional.pad(wide, (0, len(wide) % 2)).view(torch.int64)
            sums[index] = (bits * factors[: len(bits)]).sum()
        if piece.group is not None:
            all_reduce_(sums, piece.group)
        digest.update(f"{tuple(piece.shape)} {sums.tolist()}".encode())
    return digest.hexdigest()


def _blocks_of(piece: Piece, anchor: Tensor) -> Iterable[tuple[int, Tensor]]:
    """The blocks of the whole that a piece reaches, with zeros for what others have, which add nothing to a sum."""
    if piece.group is None:
        return enumerate(_blocks(anchor))
    numel, stop = piece.numel(), piece.start + anchor.numel()
    first, last = piece.start // _BLOCK * _BLOCK, min(math.ceil(stop / _BLOCK) * _BLOCK, numel)
    padded = torch.nn.functional.pad(anchor.reshape(-1), (piece.start - first, last - stop))
    return enumerate(padded.split(_BLOCK), first // _BLOCK) if anchor.numel() else ()


def _survives(tensor: Tensor, dtype: torch.dtype) -> bool:
    integer = _INTEGER[tensor.dtype]
    # Weights of full precision betray themselves in the first block.
    return all(torch.equal(b.to(dtype).to(b.dtype).view(integer), b.view(integer)) for b in _blocks(tensor))


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.reshape(-1).split(_BLOCK)
