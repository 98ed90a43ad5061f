"""
Engines that share a model out between processes: what this process holds of each parameter, under FSDP2 (and all that
makes DTensors) and DeepSpeed's ZeRO 1 to 3. Without them, and under DDP, each process holds the whole. Holds no terms
(terms.py).

What is done element by element needs only the own piece. What sums up over a tensor is summed over the processes that
share it, and no others.
"""

import gc
import math
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import Coefficient, Moment, saturating_add_, squared_norm


class Piece:
    """
    What this process holds of a tensor: the elements of the flattened whole from `start` on. This one is the whole.

    Attributes:
        shape (`torch.Size`): Of the whole.
        bounds (`tuple[int, ...]`): Where the pieces of the processes begin, in the order of the group.
        group (`torch.distributed.ProcessGroup`, *optional*): The processes that share the tensor.
        part (`int`): Of the engine's step, in which the tensor is moved.
        flat (`bool`): Whether `value` has one dimension, whatever the shape, so that a row may be cut.
    """

    start, bounds, group, part, flat = 0, (0,), None, 0, False

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.shape = tensor.shape

    def value(self) -> Tensor:
        """What is held, as it is now; in place, this moves the tensor."""
        return self.tensor

    def gradient(self) -> Tensor | None:
        """Of what is held."""
        return self.tensor.grad

    def numel(self) -> int:
        """Of the whole."""
        return math.prod(self.shape)

    def cut(self, whole: Tensor) -> Tensor:
        """The same elements of another tensor of this shape."""
        if hasattr(whole, "full_tensor"):
            whole = whole.full_tensor()
        if self.group is None:
            return whole
        held = self.value()
        return whole.detach().reshape(-1)[self.start : self.start + held.numel()].view(held.shape)


class _DTensorPiece(Piece):
    """Of a DTensor whose rows are shared out, as FSDP2 does it."""

    def __init__(self, tensor: Any):
        super().__init__(tensor)
        placements, mesh = tensor.placements, tensor.device_mesh
        shared = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
        by_rows = [dim for dim in shared if type(placements[dim]).__name__ == "Shard" and placements[dim].dim == 0]
        if shared != by_rows or len(shared) > 1:
            raise ValueError(
                f"A parameter that is sharded as {placements} cannot be penalized, only one whose rows are shared out "
                "over one dimension of the mesh, as FSDP2 does it: set `lipschitz_weight` to 0 in its param group."
            )
        for dim in shared:
            rows, columns, size = self.shape[0], math.prod(self.shape[1:]), mesh.size(dim)
            self.group = mesh.get_group(dim)
            self.bounds = tuple(min(k * -(-rows // size), rows) * columns for k in range(size))
            self.start = self.bounds[mesh.get_local_rank(dim)]

    @torch.no_grad()  # without it, `to_local` is an operation for autograd
    def value(self) -> Tensor:
        return self.tensor.to_local()

    @torch.no_grad()
    def gradient(self) -> Tensor | None:
        gradient = self.tensor.grad
        if gradient is not None and gradient.placements != self.tensor.placements:
            raise ValueError(
                f"A gradient that is sharded as {gradient.placements} is for a parameter that is sharded as "
                f"{self.tensor.placements}: the penalty works where both are the same, as with FSDP2."
            )
        return None if gradient is None else gradient.to_local()


class _ZeroPiece(Piece):
    """A stretch of a flat tensor in which DeepSpeed keeps the pieces of many parameters."""

    flat = True

    def __init__(
        self, tensor: Tensor, buffer: Tensor, offset: int, bounds: Sequence[int], group: Any, part: int | None = None
    ):
        super().__init__(tensor)
        self.shape = getattr(tensor, "ds_shape", tensor.shape)  # ZeRO 3 leaves an empty tensor
        self.group = torch.distributed.group.WORLD if group is None else group
        self.bounds = tuple(min(max(bound, 0), self.numel()) for bound in bounds)
        rank = torch.distributed.get_rank(self.group)
        self.start = self.bounds[rank]
        self.stretch = slice(offset, offset + [*self.bounds, self.numel()][rank + 1] - self.start)
        self.buffer = buffer
        self.part = part or 0

    def value(self) -> Tensor:
        return self.buffer.detach()[self.stretch]

    def gradient(self) -> Tensor | None:
        return None if self.buffer.grad is None else self.buffer.grad[self.stretch]


class Engine:
    """
    What steps an optimizer. This one is torch, alone, under DDP or under FSDP2.

    Attributes:
        parts (`int`): How many times the optimizer's `step` is called in a step of the training.
        replays (`bool`): Whether calls of the model can be replayed when the optimizer steps.
    """

    parts = 1
    is_deepspeed = False
    replays = True

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    def groups(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """The param groups as they are now, each with the parameters of the model."""
        return [(group, group["params"]) for group in self.optimizer.param_groups]

    def part(self) -> int:
        """Which part of the step is being taken."""
        return 0

    @contextmanager
    def whole_gradients(self, parameters: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """Those of the parameters that have a gradient, as `parameter.grad`; what is added to it counts."""
        yield [parameter for parameter in parameters if parameter.grad is not None]

    def add_kept_gradients(self) -> None:
        """What was added in `whole_gradients` to parameters that are stepped in this part."""

    def piece(self, tensor: Tensor) -> Piece:
        """What this process holds of a tensor of the model."""
        if hasattr(tensor, "placements"):
            return _DTensorPiece(tensor)
        if hasattr(tensor, "ds_tensor"):  # ZeRO 3, of a frozen one
            size = tensor.ds_tensor.ds_numel
            count = torch.distributed.get_world_size(tensor.ds_process_group)
            return _ZeroPiece(tensor, tensor.ds_tensor, 0, [k * size for k in range(count)], tensor.ds_process_group)
        return Piece(tensor)


class Zero(Engine):
    """
    DeepSpeed's ZeRO 1 to 3. It steps flat tensors, of each param group in turn, in which the parameters of the model
    lie one after the other, cut wherever the share of a process ends. Their places are in attributes of DeepSpeed that
    it does not document.
    """

    is_deepspeed = True

    def __init__(self, optimizer: torch.optim.Optimizer, zero: Any):
        super().__init__(optimizer)
        self.pieces: dict[Tensor, Piece] = {}
        self._groups = list(optimizer.param_groups)
        self._kept: dict[Tensor, Tensor] = {}
        stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
        self.replays = not stage3  # in which the model has no parameters while it is stepped
        try:
            self._check(zero, stage3)
            (self._read_stage3 if stage3 else self._read_stages12)(zero)
        except AttributeError as error:
            raise ValueError(
                f"This version of DeepSpeed keeps its partitions elsewhere than 0.19.8, which works: {error}"
            ) from error
        self.parts = len(self._buffers)

    def _check(self, zero: Any, stage3: bool) -> None:
        swaps = stage3 and (zero.swap_optimizer or hasattr(zero, "backup_optimizer"))
        if swaps or getattr(zero, "zenflow", False) or type(zero).__name__.startswith("SuperOffload"):
            raise ValueError(
                "DeepSpeed's offload of the optimizer to NVMe, in parts (`ratio`), by ZenFlow or by SuperOffload "
                "cannot be penalized: offload it to the CPU, or not at all."
            )

    def _read_stages12(self, zero: Any) -> None:
        self._buffers = list(zero.single_partition_of_fp32_groups)
        self._trained = list(zero.bit16_groups)
        for part, buffer in enumerate(self._buffers):
            group, size = zero.real_dp_process_group[part], zero.partition_size[part]
            count, own = torch.distributed.get_world_size(group), torch.distributed.get_rank(group) * size
            offsets = zip(zero.round_robin_bit16_groups[part], zero.round_robin_bit16_offsets[part], strict=True)
            for parameter, offset in offsets:
                bounds = [k * size - offset for k in range(count)]
                place = max(offset - own, 0)
                self.pieces[parameter] = _ZeroPiece(parameter, buffer, place, bounds, group, part)

    def _read_stage3(self, zero: Any) -> None:
        self._buffers = list(zero.fp32_partitioned_groups_flat)
        self._trained = [[] for _ in self._groups]
        for part, (buffer, parameters) in enumerate(zip(self._buffers, zero.fp16_groups, strict=True)):
            self._trained[zero.sub_group_to_group_id[part]] += parameters
            group, offset = zero.sub_group_process_groups[part], 0
            count = torch.distributed.get_world_size(group)
            for parameter in parameters:
                size = parameter.ds_tensor.ds_numel
                bounds = [k * size for k in range(count)]
                self.pieces[parameter] = _ZeroPiece(parameter, buffer, offset, bounds, group, part)
                offset += size

    def groups(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        now = self.optimizer.param_groups
        if len(now) == len(self._groups):
            self._groups = list(now)
        else:  # while ZeRO 1 and 2 step one of them
            self._groups[self.part()] = now[0]
        return list(zip(self._groups, self._trained, strict=True))

    def part(self) -> int:
        stepped = [id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]]
        return next((part for part, buffer in enumerate(self._buffers) if id(buffer) in stepped), 0)

    @contextmanager
    def whole_gradients(self, parameters: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        yield parameters
        for parameter, gradient in zip(parameters, before, strict=True):
            self._kept[parameter] = self.pieces[parameter].cut(parameter.grad).clone()
            parameter.grad = gradient

    def add_kept_gradients(self) -> None:
        part = self.part()
        for parameter in [parameter for parameter in self._kept if self.pieces[parameter].part == part]:
            gradient = self.pieces[parameter].gradient()
            saturating_add_(gradient, self._kept.pop(parameter).to(gradient))

    def piece(self, tensor: Tensor) -> Piece:
        return self.pieces[tensor] if tensor in self.pieces else super().piece(tensor)


def unwrapped(optimizer: Any) -> Any:
    """The optimizer that accelerate's or DeepSpeed's wrapper steps."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def engine_of(optimizer: torch.optim.Optimizer) -> Engine:
    """
    The engine that steps an optimizer. DeepSpeed's is found among the objects of this process.

    Raises:
        `ValueError`: If it is one of DeepSpeed's other than ZeRO 1 to 3.
    """
    base = sys.modules.get("deepspeed.runtime.base_optimizer")
    if base is None:
        return Engine(optimizer)
    wrappers = [thing for thing in gc.get_objects() if issubclass(type(thing), base.DeepSpeedOptimizer)]
    zero = next((wrapper for wrapper in wrappers if getattr(wrapper, "optimizer", None) is optimizer), None)
    if zero is None:
        return Engine(optimizer)
    if not (hasattr(zero, "single_partition_of_fp32_groups") or hasattr(zero, "fp32_partitioned_groups_flat")):
        raise ValueError(
            f"DeepSpeed's {type(zero).__name__} cannot be penalized: use ZeRO 1, 2 or 3 (ZeRO 1 with gradients "
            "accumulated in the precision of the model)."
        )
    return Zero(optimizer, zero)


def trained_by(optimizer: Any) -> list[Tensor]:
    """The parameters of the model that an optimizer trains, whatever the engine keeps in its place."""
    return [parameter for _, parameters in engine_of(unwrapped(optimizer)).groups() for parameter in parameters]


def ddp_groups(tensors: Sequence[Tensor]) -> dict[Any, list[Tensor]]:
    """
    The process groups in which DDP keeps some of the tensors equal, with these tensors. Its wrappers are searched for
    in this process.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return {}
    wrappers = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.parallel.DistributedDataParallel)]
    of = {parameter: wrapper.process_group for wrapper in wrappers for parameter in wrapper.parameters()}
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:  # in an order that is the same in all processes
        if tensor in of:
            groups.setdefault(of[tensor], []).append(tensor)
    return groups


def is_shared(tensor: Tensor) -> bool:
    """Whether a parameter may be held in pieces: a DTensor, or one of ZeRO 3."""
    return hasattr(tensor, "placements") or hasattr(tensor, "ds_tensor")


def forget_gathered(model: nn.Module) -> None:
    """
    Make the next forward pass gather the weights again. Without a backward pass, FSDP2 keeps those that it gathered
    before, even if they have changed.
    """
    for module in model.modules():
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):  # known without an import of it
            module.reshard()


def all_reduce_(tensor: Tensor, group: Any) -> Tensor:
    """The sum over the group, in place."""
    # With offload to the CPU, numbers are there, but NCCL is not.
    on_gpu = tensor.cuda() if not tensor.is_cuda and torch.distributed.get_backend(group) == "nccl" else tensor
    torch.distributed.all_reduce(on_gpu, group=group)
    return tensor if on_gpu is tensor else tensor.copy_(on_gpu)


def sum_over(groups: Sequence[Hashable | None], values: Sequence[Tensor]) -> list[Tensor]:
    """Each value, of no dimensions, summed over the processes of its group. There is one transfer for each group."""
    values = list(values)
    for group in dict.fromkeys(group for group in groups if group is not None):
        own = [index for index, other in enumerate(groups) if other is group]
        sums = all_reduce_(torch.stack([values[index].to(values[own[0]].device) for index in own]), group)
        for index, total in zip(own, sums.unbind(), strict=True):
            values[index] = total
    return values


@torch.no_grad()
def whole_of(pieces: Sequence[Piece]) -> list[Tensor]:
    """The whole tensors, for small ones: every process gets them all, in one transfer for each group."""
    tensors = [piece.value() for piece in pieces]
    kinds = defaultdict(list)
    for index, piece in enumerate(pieces):
        if piece.group is not None:
            kinds[piece.group, tensors[index].dtype, tensors[index].device].append(index)
    for (group, dtype, device), own in kinds.items():
        buffer = torch.zeros(sum(pieces[index].numel() for index in own), dtype=dtype, device=device)
        parts = buffer.split([pieces[index].numel() for index in own])
        for index, part in zip(own, parts, strict=True):
            held, start = tensors[index].reshape(-1), pieces[index].start
            part[start : start + held.numel()] = held
        all_reduce_(buffer, group)
        for index, part in zip(own, parts, strict=True):
            tensors[index] = part.view(pieces[index].shape)
    return tensors


class PieceMoment:
    """
    `Moment` for a flat piece, whose first and last rows other processes may have a part of. ``D root`` of such a row
    is the sum of what these processes have.
    """

    def __init__(self, moment: Moment, piece: Piece):
        self.moment, self.piece = moment, piece

    def squared_norm(self, displacement: Tensor) -> Tensor:
        """`Moment.squared_norm` of the whole is the sum of this over the group."""
        if not self.moment.root.numel():
            return self.moment.squared_norm(displacement)
        product = self._product(displacement)
        return squared_norm(displacement) * self.moment.rest.to(displacement) + self._square(product)

    def gradient(self, displacement: Tensor, c: Coefficient) -> tuple[Tensor, Tensor]:
        """`Moment.gradient` of the piece, and what sums up over the group."""
        if not self.moment.root.numel():
            return self.moment.gradient(displacement, c)
        rest, product = self.moment.rest.to(displacement), self._product(displacement)
        square = squared_norm(displacement) * rest + self._square(product)
        along = (product @ self.moment.root.to(displacement).T).flatten()[self._front :][: len(displacement)]
        return (displacement * rest + along) * (2 * c), c * square

    @property
    def _front(self) -> int:
        """How much of the first row is elsewhere."""
        return self.piece.start % len(self.moment.root)

    def _product(self, displacement: Tensor) -> Tensor:
        """``D root``, of the rows of which this process has a part."""
        n, first = len(self.moment.root), self.piece.start // len(self.moment.root)
        padded = F.pad(displacement, (self._front, -(self.piece.start + len(displacement)) % n))
        product = padded.view(len(padded) // n, n) @ self.moment.root.to(displacement)
        cut = sorted({bound // n for bound in self.piece.bounds if bound % n})
        if cut:
            own = [(index, row - first) for index, row in enumerate(cut) if 0 <= row - first < len(product)]
            indices, rows = [index for index, _ in own], [row for _, row in own]
            sums = product.new_zeros(len(cut), product.shape[1])
            sums[indices] = product[rows]
            product[rows] = all_reduce_(sums, self.piece.group)[indices]
        return product

    def _square(self, product: Tensor) -> Tensor:
        """A row counts where it begins."""
        return squared_norm(product[1:] if self._front else product)
