"""The oracle: the transformers model with dequantized weights, run through the ports of the ONNX graphs.

`kernel_engines` is the other way to run a checkpoint with torch: its decoder reads the packed weights.

    checkpoint ── fake_quant_model ──► LoadedModel ──┬── vision_engine    pixel_values -> image_features
                                                     ├── embed_engine     input_ids -> inputs_embeds
                                                     └── decoder_engine   embeddings, cache -> logits, cache

Everything downstream is compared with it. Quantized linears hold ``(u - z) * s``, which float32 holds
exactly (at most 4 + 11 bits), or sum integers where the scheme rounds activations (`_torch_int8`); all other
tensors are the stored ones. The decoder is the model's own code, masks included, with a cache that is
concatenated, as in the graphs for ONNX Runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from mbq_export.backends._feeds import checked_feeds
from mbq_export.backends.base import Availability, Backend, TensorSpec
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.families import FAMILIES
from mbq_export.families.weights import SourceWeights, StoredTensor
from mbq_export.reading import TensorEntry
from mbq_export.schemes.oracle import dequantized

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType

    import torch
    from numpy.typing import NDArray

    from mbq_export.families.base import LoadedModel

    Act = Callable[[Mapping[str, torch.Tensor]], tuple[torch.Tensor, ...]]

FLOAT: Final = "float32"
BATCH: Final = "batch_size"
SEQUENCE: Final = "sequence_length"
PAST: Final = "past_sequence_length"
TOTAL: Final = "total_sequence_length"
TILES: Final = "num_tiles"


def fake_quant_model(checkpoint: QuantCheckpoint) -> LoadedModel:
    """Build the transformers model that a checkpoint stands for, in float32.

    Raises:
        FormatError: E40xx and E42xx for the files beside the weights, E4103 for missing tensors.
    """
    family = FAMILIES[checkpoint.info["model"]["family"]]
    loaded = family.load(checkpoint.folder, weights=_dequantizing(checkpoint))
    _round_activations(loaded, checkpoint)
    return loaded


def _round_activations(
    loaded: LoadedModel, checkpoint: QuantCheckpoint, *, but: str | None = None
) -> None:
    """Let linears round their inputs where their scheme does, but for those under a module path."""
    if any(record.scheme.rounds_activations for record in checkpoint.records.values()):
        from mbq_export.backends._torch_int8 import round_activations

        round_activations(loaded.module, checkpoint, but=but)


@dataclass(frozen=True, kw_only=True)
class DequantizedWeights(SourceWeights):
    """A checkpoint that looks like the files of a float32 model.

    Attributes:
        checkpoint: Where the tensors come from.
    """

    checkpoint: QuantCheckpoint

    def read(self, name: str, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read or dequantize one tensor; float32 unless another dtype is asked for.

        Raises:
            FormatError: E4103 or E4411.
        """
        import torch

        linear = name.removesuffix(".weight")
        if linear in self.checkpoint.records:
            values = dequantized(self.checkpoint.packed(linear)).astype(np.float32)
        else:
            values = np.array(self.checkpoint.tensor(name), np.float32)
        tensor = torch.from_numpy(values)
        return tensor if dtype is None else tensor.to(dtype)


class TorchEngine:
    """A part of a transformers model behind the ports of a graph."""

    def __init__(
        self,
        name: str,
        *,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        act: Act,
    ) -> None:
        """Join ports and function.

        Args:
            name: For messages.
            inputs: What `run` takes.
            outputs: What it returns.
            act: Tensors by input name to tensors in the order of ``outputs``.
        """
        self.name = name
        self._inputs = inputs
        self._outputs = outputs
        self._act: Act | None = act

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` wants, in graph order."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` returns, in graph order."""
        return self._outputs

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once.

        Raises:
            FormatError: E4102 if an array is missing, superfluous, or has a wrong dtype or shape.
            ValueError: If the engine is closed.
        """
        import torch

        if self._act is None:
            raise ValueError(f"{self.name} is closed")
        checked = checked_feeds(self._inputs, feeds, name=self.name)
        with torch.no_grad():
            # A copy: torch warns about read-only arrays, and must not write into a caller's.
            found = self._act({name: torch.from_numpy(np.array(v)) for name, v in checked.items()})
        return {
            spec.name: tensor.float().cpu().numpy()
            for spec, tensor in zip(self._outputs, found, strict=True)
        }

    def close(self) -> None:
        """Let go of the model. Closing twice is allowed."""
        self._act = None

    def __enter__(self) -> Self:
        """Return the engine."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the engine."""
        self.close()


def vision_engine(model: LoadedModel) -> TorchEngine:
    """Tower and projector: (tiles, 3, h, w) to (tiles, tokens_per_tile, hidden)."""
    shape = model.vision
    tower = model.family.vision_module(model)
    device = next(tower.parameters()).device
    size = (TILES, shape.channels, shape.image_size, shape.image_size)
    features = (TILES, shape.tokens_per_tile, model.text.hidden)
    return TorchEngine(
        "vision_encoder",
        inputs=(TensorSpec(name="pixel_values", dtype=FLOAT, shape=size),),
        outputs=(TensorSpec(name="image_features", dtype=FLOAT, shape=features),),
        act=lambda feeds: (tower(feeds["pixel_values"].to(device)),),
    )


@dataclass(frozen=True, kw_only=True)
class KernelEngines:
    """The three parts of a model whose decoder runs on the kernels.

    Attributes:
        vision: On the same device, float32.
        embed: On the host.
        decoder: Keeps its keys and values to itself.
        device: ``cpu`` or ``cuda``.
    """

    vision: TorchEngine
    embed: TorchEngine
    decoder: TorchEngine
    device: str


def kernel_engines(checkpoint: QuantCheckpoint, *, device: str, slots: int) -> KernelEngines:
    """Load a checkpoint without unpacking its decoder.

    Args:
        checkpoint: Opened.
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU if there is one.
        slots: Positions of the decoder's cache.

    Raises:
        UsageError: E2001 for another device.
        MachineError: E3001 if there is no GPU that torch can use.
        FormatError: E4005 for a kind of decoder that the kernels do not run, and as `fake_quant_model`.
    """
    from mbq_export.backends._torch_decoder import device_of, dtype_on, open_kernel_decoder

    where = device_of(device)
    family = FAMILIES[checkpoint.info["model"]["family"]]
    weights = _dequantizing(checkpoint)
    model = family.load(checkpoint.folder, weights=weights, meta_blocks=True)
    _round_activations(model, checkpoint, but=family.blocks)
    family.vision_module(model).to(where)
    return KernelEngines(
        vision=vision_engine(model),
        embed=embed_engine(model),
        decoder=open_kernel_decoder(
            checkpoint, device=where, dtype=dtype_on(where, checkpoint), slots=slots
        ),
        device=where.type,
    )


def embed_engine(model: LoadedModel) -> TorchEngine:
    """Token embedding: (B, T) ids to (B, T, hidden)."""
    table = model.module.get_submodule(model.family.embed)
    rows = (BATCH, SEQUENCE, model.text.hidden)
    return TorchEngine(
        "embed_tokens",
        inputs=(TensorSpec(name="input_ids", dtype="int64", shape=(BATCH, SEQUENCE)),),
        outputs=(TensorSpec(name="inputs_embeds", dtype=FLOAT, shape=rows),),
        act=lambda feeds: (table(feeds["input_ids"]),),
    )


def decoder_engine(model: LoadedModel) -> TorchEngine:
    """Blocks, final norm and head over new positions, with the keys and values of those before.

    Batches are padded on the left; positions are always given. Logits of all new positions.
    """
    text = model.text
    past = (BATCH, text.kv_heads, PAST, text.head_dim)
    present = (BATCH, text.kv_heads, TOTAL, text.head_dim)
    parts = [(layer, part) for layer in range(text.layers) for part in ("key", "value")]
    return TorchEngine(
        "decoder",
        inputs=(
            TensorSpec(name="inputs_embeds", dtype=FLOAT, shape=(BATCH, SEQUENCE, text.hidden)),
            TensorSpec(name="attention_mask", dtype="int64", shape=(BATCH, TOTAL)),
            TensorSpec(name="position_ids", dtype="int64", shape=(BATCH, SEQUENCE)),
            *(
                TensorSpec(name=f"past_key_values.{n}.{p}", dtype=FLOAT, shape=past)
                for n, p in parts
            ),
        ),
        outputs=(
            TensorSpec(name="logits", dtype=FLOAT, shape=(BATCH, SEQUENCE, text.vocab)),
            *(TensorSpec(name=f"present.{n}.{p}", dtype=FLOAT, shape=present) for n, p in parts),
        ),
        act=lambda feeds: _decode(model, feeds),
    )


def _decode(model: LoadedModel, feeds: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    from transformers import DynamicCache

    family, module = model.family, model.module
    decoder: Any = module.get_submodule(family.blocks.rpartition(".")[0])
    cache: Any = DynamicCache(config=decoder.config)
    for layer in range(model.text.layers):
        keys = feeds[f"past_key_values.{layer}.key"]
        if keys.shape[2]:
            cache.update(keys, feeds[f"past_key_values.{layer}.value"], layer)
    found = decoder(
        inputs_embeds=feeds["inputs_embeds"],
        attention_mask=feeds["attention_mask"],
        position_ids=feeds["position_ids"],
        past_key_values=cache,
        use_cache=True,
    )
    logits = module.get_submodule(family.head)(found.last_hidden_state)
    return (logits, *(kept for layer in cache.layers for kept in (layer.keys, layer.values)))


def _dequantizing(checkpoint: QuantCheckpoint) -> DequantizedWeights:
    shapes = {name: checkpoint.tensor(name).shape for name in checkpoint.tensors}
    for record in checkpoint.records.values():
        shapes[f"{record.name}.weight"] = (record.n, record.k)
        if record.bias:
            shapes[f"{record.name}.bias"] = (record.n,)
    tensors = {
        name: StoredTensor(
            path=checkpoint.folder,
            # Not a place in a file: what `read` will return.
            entry=TensorEntry(dtype="F32", shape=tuple(shape), start=0, end=0),
        )
        for name, shape in sorted(shapes.items())
    }
    paths = {file.path: file.path.stat() for file in checkpoint.files.values()}
    stamps = {path: (stat.st_size, stat.st_mtime_ns) for path, stat in paths.items()}
    return DequantizedWeights(
        folder=checkpoint.folder, tensors=tensors, stamps=stamps, checkpoint=checkpoint
    )


def available() -> Availability:
    """Torch and transformers are dependencies of the package, so this says which they are."""
    found = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    return Availability(ok=True, found=found, needed="torch, transformers")


def open_decoder(path: Path) -> TorchEngine:
    """Load a checkpoint folder and return its decoder.

    Raises:
        FormatError: As `QuantCheckpoint.open` and `fake_quant_model`.
    """
    return decoder_engine(fake_quant_model(QuantCheckpoint.open(path, verify=False)))


BACKEND: Final = Backend(
    name="torch", lowerings=(), isolated=False, available=available, open=open_decoder
)
