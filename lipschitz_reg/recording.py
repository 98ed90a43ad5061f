"""
`record`: what a base does while it draws prompts. It keeps the second moments of each layer's inputs, by which
displacements of its weights are measured, and the denoiser's calls with their answers. A `Recording` can be saved to a
file, made once for a base. Holds no penalty (terms.py, replay.py) and no drift (drift.py).

Layers. A layer ``y = W x + b`` whose W moves by D gives ``y + D x``. ``||D||^2`` bounds that change for the worst x;
for the x that the layer really gets it is ``E||D x||^2 = tr(D C D^T)`` with ``C = E[x x^T]``. The inputs of a layer in
a trained network lie mostly in a few directions. A displacement across them hardly changes what the base does.

This is the quantity that layerwise quantization and pruning keep small ("Optimal Brain Compression", arXiv 2208.11580)
and the input half of K-FAC (arXiv 1503.05671). In the penalty of "Preserve and Personalize" (arXiv 2505.19519,
Algorithm 1), ``tr(D M D^T)`` replaces ``||D||^2``. Here ``M = n C / E[y^2]``, n is the number of columns of W, and
``E[y^2]`` is the mean over the elements of y. With the reduction `tensor_mean` that is ``E||D x||^2 / E||y||^2``, the
relative change of the output; where all directions carry the same, it is ``||D||^2 / ||W||^2``.

M is kept as ``R R^T + rest * I``. R comes from a random sketch of C, of which only ``C G`` is ever held, for a matrix
G of orthonormal columns: ``C G (G^T C G)^(-1) G^T C``, the Nystroem approximation (Tropp et al. 2017, arXiv
1706.05736). What it misses of the trace of C is spread over all directions, and no direction counts less than a
thousandth of the mean: pictures that were not recorded may need directions that the recorded ones do not use.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calls import Call, Store, autocast_of, rows_agree
from .drift import Drift, measure_drift, rounding_drift
from .engines import is_shared
from .functional import Moment, squared_norm
from .lora import adapted_weight, lora_factors


_LEAST = 1e-3  # the least that a direction counts, relative to the mean
_CUTOFF = 1e-5  # eigenvalues of the sketch below this, relative to the largest, are taken for rounding errors
_SAMPLE = 64  # elements of each parameter by which a base is recognized
_MASKS = ("encoder_hidden_states_mask", "encoder_attention_mask", "attention_mask")  # what models call that of text
_FORMAT = "lipschitz_reg recording 1"
_WRAPPERS = re.compile(r"^((module|_orig_mod|base_model\.model)\.)+")


class Recording:
    """
    What a base does, for prompts that it should go on drawing as it does.

    Args:
        models (`Mapping[str, torch.nn.Module]`):
            The denoiser, under the name "", and other models, by names that precede those of their parameters.
        guidance_scale (`float`): Of classifier-free guidance, for `drift`.

    Attributes:
        layers (`dict[str, Moment]`): The moment of each layer's inputs, by the name of its parameter in the base.
        calls (`list[Call]`): The denoiser's calls, with their answers. Those that are `held_out` only measure drift.
        splits (`bool`): Whether the rows of a call's batch may be replayed one by one.
        drawn (`dict`): What `record_pipeline` drew: prompts, seed and options; otherwise empty.
    """

    def __init__(self, models: Mapping[str, nn.Module], guidance_scale: float = 7.5):
        self.models = dict(models)
        self.guidance_scale = guidance_scale
        self.layers: dict[str, Moment] = {}
        self.calls: list[Call] = []
        self.splits = False
        self.drawn: dict[str, Any] = {}
        self.base = {name: sample(parameter) for name, parameter in self.parameters().items()}
        self.holding_out = False
        self._digest: str | None = None

    @property
    def model(self) -> nn.Module:
        """The denoiser."""
        return self.models[""]

    def share(self) -> float:
        """The share of the elements of what trains, and of weights under LoRA adapters, whose layers were recorded."""
        parameters = self.parameters()
        adapted = {adapted_weight(module) for model in self.models.values() for module in model.modules()}
        counted = {n: p.numel() for n, p in parameters.items() if p.requires_grad or p in adapted or n in self.layers}
        return sum(n for name, n in counted.items() if name in self.layers) / max(sum(counted.values()), 1)

    @contextmanager
    def held_out(self) -> Iterator[None]:
        """Calls in this block are held out: the penalty does not use them, and `drift` uses only them."""
        self.holding_out = True
        try:
            yield
        finally:
            self.holding_out = False

    def parameters(self) -> dict[str, Tensor]:
        """The parameters of the models by their names in the base, whatever wraps them now; no LoRA factors."""
        return {name: p for prefix, model in self.models.items() for name, p in base_parameters(model, prefix).items()}

    def moments(self) -> dict[Tensor, Moment]:
        """`layers` by parameter, for the parameters that the models have."""
        parameters = self.parameters()
        return {parameters[name]: moment for name, moment in self.layers.items() if name in parameters}

    def drift(
        self, model: nn.Module | None = None, run: Callable[[], Any] | None = None, scheduler: Any = None
    ) -> Drift:
        """
        How far the predictions of a model have moved from the base's, on the held-out calls.

        Args:
            model (`torch.nn.Module`, *optional*): The denoiser; the recorded one by default, as it is now.
            run (`Callable`, *optional*):
                Draws the held-out prompts again, with the same kind of pipeline and the same seeds. The base's
                answers replace the model's, so that the model meets the same calls. Give it if a text encoder has
                changed too: by default calls are replayed with the embeddings of the base.
            scheduler (*optional*): The ancestral sampler of the held-out calls, for `Drift.kl_bound`: see `kl_bound`.

        Raises:
            `ValueError`: If no call was held out, or `run` makes other calls or gives them other inputs.
        """
        return measure_drift(self, self.model if model is None else model, run, scheduler)

    def rounding_drift(self) -> Drift:
        """
        The drift that rounding alone gives a model that has hardly moved: that of the base with its inputs changed by
        part of a rounding error. In bfloat16 it is a few percent. (The unchanged base rounds as before, and has none.)
        A smaller drift than this cannot be measured.

        Raises:
            `ValueError`: If no call was held out.
        """
        return rounding_drift(self, self.model)

    def digest(self) -> str:
        """A hash of everything that is recorded."""
        if self._digest is None:
            digest = hashlib.sha256()
            tensors, metadata = self._contents()
            for name in sorted(tensors):
                tensor = tensors[name].detach().cpu().contiguous()
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.flatten().view(torch.uint8).numpy().data)
            digest.update(json.dumps(metadata, sort_keys=True).encode())
            self._digest = digest.hexdigest()
        return self._digest

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all. Needs safetensors."""
        from safetensors.torch import save_file

        path = Path(path)
        tensors, metadata = self._contents()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.tmp")
        unfinished.unlink(missing_ok=True)
        unfinished.touch()
        mode = unfinished.stat().st_mode & 0o777  # of a new file here; safetensors would let only its owner read it
        save_file(tensors, unfinished, metadata={"format": "pt", "recording": json.dumps(metadata)})
        unfinished.chmod(mode)
        unfinished.replace(path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module,
        /,
        *,
        anchors: Mapping[Tensor, Tensor] | None = None,
        **others: nn.Module,
    ) -> "Recording":
        """
        Read what `save` wrote, for a model of the base that was recorded; `others` as in `record`. Parameters that
        have been trained since are recognized by their `anchors`.

        Raises:
            `ValueError`: If the file is not a recording, or is of another base or of other layers than the models'.
            `OSError`: If it cannot be read.
        """
        with _open(path) as (file, metadata):
            # In memory of their own, aligned as those that were recorded: sums come out the same to the last bit.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        recording = cls({"": model, **others}, metadata["guidance_scale"])
        for name, parameter in recording.parameters().items() if anchors else ():
            if parameter in anchors:
                recording.base[name] = sample(anchors[parameter])
        recording.splits, recording.drawn = metadata["splits"], metadata["drawn"]
        stored = {name.removeprefix("base/"): tensor for name, tensor in tensors.items() if name.startswith("base/")}
        recording._check(path, stored, metadata["models"])
        recording.base = stored
        for name in metadata["layers"]:
            recording.layers[name] = Moment(tensors[f"layers/{name}/root"], tensors[f"layers/{name}/rest"])
        store = Store({int(name[6:]): tensor for name, tensor in tensors.items() if name.startswith("calls/")})
        recording.calls = [Call.from_json(row, store) for row in metadata["calls"]]
        return recording

    @staticmethod
    def match(path: str | Path, models: Iterable[nn.Module]) -> dict[str, nn.Module]:
        """
        Find the recorded models among others, by the names of their parameters: the denoiser under "", as in `models`.

        Raises:
            `ValueError`: If the file is not a recording, or the denoiser is not among them.
            `OSError`: If it cannot be read.
        """
        with _open(path) as (file, metadata):
            recorded = {name.removeprefix("base/") for name in file.keys() if name.startswith("base/")}
        found = {}
        for prefix in sorted(metadata["models"], reverse=True):  # "" is last, and gets what is left
            own = {name for name in recorded if name.startswith(f"{prefix}." if prefix else "")}
            recorded -= own
            match = next((m for m in models if base_parameters(m, prefix).keys() == own), None)
            if match is not None:
                found[prefix] = match
        if "" not in found:
            raise ValueError(f"{path} was recorded of another architecture: no model here has the same parameters.")
        return found

    def attach(self, model: nn.Module, /, **others: nn.Module) -> "Recording":
        """Use it with other models that have the same layers: ones that began as this base and were trained since."""
        self.models = {"": model, **others}
        return self

    def check(self, parameter_values: Mapping[str, Tensor]) -> None:
        """Raise a ValueError unless these are parameters of the recorded base, by their names there."""
        for name, value in parameter_values.items():
            if name in self.base and not _same(self.base[name], sample(value)):
                raise ValueError(f"The recording was made of another base: {name} is not the same. Record this one.")

    def _check(self, path: str | Path, stored: Mapping[str, Tensor], recorded_models: list[str]) -> None:
        lacking = [name for name in self.models if name not in recorded_models]
        if lacking:
            raise ValueError(f"{path} has nothing of {lacking[0]}: record it too.")
        unused = tuple(f"{name}." for name in recorded_models if name not in self.models)
        needed = {name for name in stored if not (unused and name.startswith(unused))}
        differing = sorted(needed ^ self.base.keys())
        if differing:
            raise ValueError(f"{path} was recorded of another architecture: {differing[0]} is not in both.")
        for name in sorted(needed):
            if not _same(stored[name], self.base[name]):
                raise ValueError(f"{path} was recorded of another base: {name} is not the same. Record this one.")

    def _contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"base/{name}": sample for name, sample in self.base.items()}
        for name, moment in self.layers.items():
            tensors |= {f"layers/{name}/root": moment.root, f"layers/{name}/rest": moment.rest}
        store = Store()
        calls = [call.to_json(store) for call in self.calls]
        tensors |= {f"calls/{index}": tensor for index, tensor in store.tensors.items()}
        metadata = {"format": _FORMAT, "guidance_scale": self.guidance_scale, "splits": self.splits}
        metadata["drawn"] = self.drawn
        return tensors, {**metadata, "models": list(self.models), "layers": list(self.layers), "calls": calls}


@contextmanager
def _open(path: str | Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The file and what its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("recording", "{}"))
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path} is not a recording: make one with python -m lipschitz_reg.record.")
            yield file, metadata
    except SafetensorError as error:
        raise ValueError(f"{path} is not a recording, or broken: {error}") from error


def base_parameters(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The parameters by their names in the base, whatever wraps them now, without those of LoRA."""
    factors = {factor for module in model.modules() for factor in lora_factors(module)}
    named = {canonical(name): p for name, p in model.named_parameters() if p not in factors}
    return {f"{prefix}.{name}": p for name, p in named.items()} if prefix else named


def canonical(name: str) -> str:
    """The name of a parameter before peft, DDP or torch.compile wrapped its model."""
    name = _WRAPPERS.sub("", name).replace(
        "_checkpoint_wrapped_module.", ""
    )  # that of FSDP's activation checkpointing
    return name.replace("._orig_mod.", ".").replace(".base_layer.", ".")


@contextmanager
def record(
    model: nn.Module,
    /,
    *,
    rank: int = 64,
    layers: bool = True,
    guidance_scale: float = 7.5,
    device: torch.device | str | None = "cpu",
    distributed: bool = False,
    **others: nn.Module,
) -> Iterator[Recording]:
    """
    Record a base while it draws, for `LipschitzRegularizer`, and for measuring drift.

        with record(pipeline.unet) as recording:
            pipeline(prompts)  # pictures that the model should go on drawing as it does
            with recording.held_out():
                pipeline(other_prompts)  # drift is measured by these

    Any module that a pipeline calls will do: U-Nets and transformers, for pictures or videos.

    In layers, it records the parameters that train and the frozen weights that LoRA adapters add to: the weights of
    linear layers and of 2-d convolutions (padded with zeros), whose groups share the mean of their moments; and
    biases, embeddings, the weights of norms and the own parameters of a module with others inside, whose elements all
    count alike, by the size of the module's output. Everything else is left out, such as quantized weights, the
    magnitudes of DoRA, and layers that do not run or whose output is all zeros. If several layers share a weight, the
    first one counts. Padding of text is left out where the model is given a mask of it (Sana, Qwen-Image; SD3 and Flux
    have none, and look at padding). `Recording.share` says how much was recorded. A compiled model runs as it would
    without `torch.compile`. Frozen weights that adapters other than peft's add to need `requires_grad` inside the
    block.

    Args:
        model (`torch.nn.Module`): The denoiser as it was pretrained, with `requires_grad` as in the training.
        rank (`int`, *optional*, defaults to 64):
            The most columns that `Moment.root` may have. For a layer with no more inputs, the sketch is C itself. The
            roots take 4 bytes * rank * (in * kernel) a layer, and as much again while they are recorded.
        layers (`bool`, *optional*, defaults to `True`): Whether to record layers, or only calls.
        guidance_scale (`float`, *optional*, defaults to 7.5): Of classifier-free guidance, which `drift` applies.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where calls are kept, in host memory by default; with `None`, where they were made. A tensor that several
            calls share, such as the embeddings of a prompt, is kept once.
        distributed (`bool`, *optional*, defaults to `False`):
            Whether all processes of `torch.distributed`, which has to be initialized, record calls of their own inside
            the block, each with the whole base. All get the whole recording.
        others (`torch.nn.Module`):
            Other models that train, such as `text_encoder=text_encoder`: only their layers are recorded.

    Raises:
        `ValueError`: If the rank is below 1, or the model is compiled and torch is older than 2.6; at the end of the
            block, if an output was not finite.
    """
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, not {rank}.")
    recording = Recording({"": model, **others}, guidance_scale)
    store, bases = Store(device=device), {}
    recorders, handles = {}, []
    for prefix, other in recording.models.items() if layers else ():
        text = _Text()
        handles.append(other.register_forward_pre_hook(text, with_kwargs=True))
        modules = list(other.named_modules())
        factors = {factor for _, module in modules for factor in lora_factors(module)}
        weights = {adapted_weight(module) for _, module in modules}
        for name, module in modules:
            own = {key: p for key, p in module.named_parameters(recurse=False) if p not in factors}
            own = {key: p for key, p in own.items() if p.requires_grad or p in weights}
            # A module with others inside adds its own parameters to what they give, as a norm does.
            adds = isinstance(module, nn.Embedding) or any(True for _ in module.children())
            own = [key for key, p in own.items() if p.dim() == 1 or (adds and p.dim()) or p is _matrix(module)]
            if own:
                name = canonical(f"{name}.") if name else ""
                names = {key: f"{prefix}.{name}{key}".removeprefix(".") for key in own}
                recorder = _Recorder(recording, module, names, rank, bases, text)
                recorders[recorder] = None
                handles.append(module.register_forward_hook(recorder, with_kwargs=True))

    def remember(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        recording.calls.append(Call.of(store, args, kwargs, output, recording.holding_out, autocast_of(output)))

    handles.append(model.register_forward_hook(remember, with_kwargs=True))
    try:
        with _uncompiled(recording.models.values()):
            yield recording
    finally:
        for handle in handles:
            handle.remove()
    if distributed:
        gathered = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(gathered, recording.calls)
        recording.calls = sorted(itertools.chain(*gathered), key=lambda call: call.held_out)
        for recorder in recorders:
            recorder.sum_over_processes()
    broken = [call for call in recording.calls if not call.answer.isfinite().all()]
    if broken:
        raise ValueError(
            f"{type(model).__name__} gave NaN or infinity while it was recorded: run it in float32 or bfloat16."
        )
    for recorder in recorders:
        recording.layers |= recorder.moments()
        recorder.sketch = None  # frees its memory
    recording.splits = rows_agree(model, recording.calls)


@contextmanager
def _uncompiled(models: Iterable[nn.Module]) -> Iterator[None]:
    """What was compiled before the hooks came does not call them."""
    if not any(_is_compiled(module) for model in models for module in model.modules()):
        yield
        return
    if not hasattr(torch.compiler, "set_stance"):  # before torch 2.6
        raise ValueError("A compiled model keeps its layers from being recorded: record it before torch.compile.")
    with torch.compiler.set_stance("force_eager"):
        yield


def _is_compiled(module: nn.Module) -> bool:
    """By `torch.compile(module)`, `module.compile()` or a compiled `forward`."""
    compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    return compiled or hasattr(module.forward, "_torchdynamo_orig_callable")


class _Text:
    """
    The forward pre-hook of a model: which tokens of its text are not padding, as far as the call says so. Padding is
    thousands of equal rows that attention never looks at, and would make up most of a moment.
    """

    mask: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.mask = next((kwargs[name] for name in _MASKS if isinstance(kwargs.get(name), Tensor)), None)
        tokens = [t for t in (*args, kwargs.get("hidden_states")) if isinstance(t, Tensor) and t.is_floating_point()]
        if self.mask is None or self.mask.dim() != 2 or any(t.shape[1:-1] == self.mask.shape[1:] for t in tokens):
            self.mask = None  # or tokens of the picture could be taken for those of the text, as there are as many

    def without_padding(self, rows: Tensor) -> Tensor:
        """(batch, length, n) to (tokens, n) if this is of the text; anything else as it is."""
        if self.mask is None or rows.dim() != 3 or rows.shape[:2] != self.mask.shape:
            return rows
        return rows[self.mask.to(rows.device) > 0]


class _Recorder:
    """The forward hook of one layer: sums over its inputs and outputs."""

    def __init__(
        self,
        recording: Recording,
        module: nn.Module,
        names: dict[str, str],
        rank: int,
        bases: dict[int, Tensor],
        text: _Text,
    ):
        self.recording, self.names, self.rank, self.bases, self.text = recording, names, rank, bases, text
        self.module, matrix = module, _matrix(module)
        self.matrix = next((key for key in names if getattr(module, key) is matrix), None)
        self.outputs = self.squared_output = 0
        self.count = self.trace = 0
        self.sketch: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if isinstance(output, tuple | dict) and len(output) == 1:
            (output,) = output.values() if isinstance(output, dict) else output
        if not isinstance(output, Tensor) or self.recording.holding_out:
            return
        # Sums that began in inference mode could not go on outside it.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            output = self.text.without_padding(output)
            self.outputs += output.numel()
            self.squared_output = self.squared_output + squared_norm(output)
            if self.matrix is None:
                return
            for rows in _rows(module, self.text.without_padding(args[0] if args else next(iter(kwargs.values())))):
                rows = rows.float()
                projected = self._project(rows)
                if self.sketch is None:
                    self.sketch = rows.new_zeros(rows.shape[1], projected.shape[1])
                self.count += len(rows)
                self.trace = self.trace + squared_norm(rows)
                self.sketch.addmm_(rows.T, projected)

    @torch.no_grad()
    def sum_over_processes(self) -> None:
        weight = getattr(self.module, next(iter(self.names)) if self.matrix is None else self.matrix)
        sums = [float(value) for value in (self.outputs, self.squared_output, self.count, self.trace)]
        sums = torch.tensor(sums, dtype=torch.float64, device=weight.device)
        torch.distributed.all_reduce(sums)
        self.outputs, self.count = int(sums[0]), int(sums[2])
        self.squared_output, self.trace = sums[1], sums[3]
        if self.count:
            n = weight[0].numel()
            if self.sketch is None:  # this process has had no input of the layer
                self.sketch = torch.zeros(n, min(n, self.rank), device=weight.device)
            torch.distributed.all_reduce(self.sketch)

    def _project(self, rows: Tensor) -> Tensor:
        """The rows times (n, rank) orthonormal columns, the same in each run and process; as they are if n <= rank."""
        n = rows.shape[1]
        if n <= self.rank:
            return rows
        if n not in self.bases:
            basis = torch.linalg.qr(torch.randn(n, self.rank, generator=torch.Generator().manual_seed(0)))[0]
            self.bases[n] = basis.to(rows.device)
        return rows @ self.bases[n].to(rows)

    @torch.no_grad()
    def moments(self) -> dict[str, Moment]:
        if not self.outputs:
            return {}
        device = self.squared_output.device
        where = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        output = self.squared_output.to(where).double() / self.outputs
        if not torch.isfinite(output):
            name = next(iter(self.names.values())).rpartition(".")[0]
            raise ValueError(f"{name} gave NaN or infinity while it was recorded: run it in float32 or bfloat16.")
        if output == 0:
            return {}  # no change is small relative to 0
        result = {}
        for key, name in self.names.items():
            if key != self.matrix:
                result[name] = Moment(torch.zeros(1, 0, device=device), (1 / output).float().to(device))
            elif self.trace > 0:
                sketch, n = self.sketch.to(where).double() / self.count, len(self.sketch)
                core = self._project(sketch.T)
                values, vectors = torch.linalg.eigh((core + core.T) / 2)
                inverse = torch.where(values > _CUTOFF * values[-1], values, torch.inf).rsqrt()
                root = sketch @ vectors * inverse
                mean = self.trace.to(where).double() / self.count / n
                rest = torch.maximum(mean - root.square().sum() / n, _LEAST * mean)
                scale = n / output
                root, rest = root * scale.sqrt(), rest * scale
                result[name] = Moment(root.float().to(device), rest.float().to(device))
        return result


def _matrix(module: nn.Module) -> Tensor | None:
    """The weight, if its rows are multiplied by what `_rows` returns."""
    if isinstance(module, nn.Conv2d):
        return module.weight if module.padding_mode == "zeros" and not isinstance(module.padding, str) else None
    return module.weight if isinstance(module, nn.Linear) else None


def _rows(module: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """
    What a row of the weight is multiplied by, (positions, n); image by image for a convolution, whose groups count as
    positions: they share a moment, the mean of theirs.
    """
    if isinstance(module, nn.Linear):
        yield inputs.reshape(-1, inputs.shape[-1])
        return
    for image in inputs:
        columns = F.unfold(image[None], module.kernel_size, module.dilation, module.padding, module.stride)[0]
        yield columns.view(module.groups, -1, columns.shape[1]).mT.flatten(0, 1)


@torch.no_grad()
def sample(parameter: Tensor) -> Tensor:
    """A few elements, evenly spaced, float32, in host memory: they tell one base from another."""
    if is_shared(parameter):
        raise ValueError("Record a base, or load its recording, before FSDP2 or ZeRO 3 shards the model.")
    count = parameter.numel()
    indices = torch.arange(min(_SAMPLE, count)) * max(count // _SAMPLE, 1)
    flat = parameter.detach().reshape(-1)
    return flat[indices.to(flat.device)].float().cpu() if flat.is_floating_point() else torch.zeros(0)


def _same(recorded: Tensor, now: Tensor) -> bool:
    """Whether two samples have the same values, though one of them may be in a lower precision."""
    if recorded.shape != now.shape:
        return False
    dtypes = [torch.float32]
    for dtype in (torch.float16, torch.bfloat16):
        if any(torch.equal(sample.to(dtype).float(), sample) for sample in (recorded, now)):
            dtypes.append(dtype)
    # A value that was rounded twice may differ.
    return not len(now) or any((recorded.to(d) == now.to(d)).float().mean() > 0.95 for d in dtypes)
