"""3  QuantCheckpoint -> ONNX graphs: vision, embedding, and one decoder per lowering.

::

    checkpoint ─┬─ decoder.py ── passes ── lowering ──► decoder_model_merged_<variant>.onnx
                ├─ embed.py ──────────────────────────► embed_tokens.onnx
                └─ vision.py, traced ─────────────────► vision_encoder.onnx

Every file is checked before the folder is published.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from mbq_export.checkpoint import KEPT
from mbq_export.errors import InternalError, UsageError, located
from mbq_export.export import decoder, embed, ops, vision
from mbq_export.export.check import ANY, Limits, check_graph, check_written
from mbq_export.export.fitting import PREFERRED, fitting_lowering
from mbq_export.export.graph import columns_of, packed_nodes, packed_source
from mbq_export.export.lowerings import LOWERINGS
from mbq_export.export.parser_ops import read_by
from mbq_export.export.passes import PASSES
from mbq_export.export.profile import FUSED, OpProfile, profile_for, traced_profile
from mbq_export.export.record import (
    DTYPES,
    HOST_TENSORS,
    RECORD,
    ExportRecord,
    GraphForm,
    GraphRecord,
    LinearNode,
    LinearPart,
    file_name,
)
from mbq_export.export.rounded_vision import packed
from mbq_export.export.save import constant_bytes, node_counts, ports_of, save_graph
from mbq_export.progress import Progress, silent
from mbq_export.reading import sha256_of
from mbq_export.schemes import SCHEMES
from mbq_export.tensor_file import write_tensors
from mbq_export.writing import (
    explained,
    json_bytes,
    partial_path,
    publish,
    refuse_existing,
    write_file,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import onnx_ir as ir

    from mbq_export.checkpoint import QuantCheckpoint
    from mbq_export.families.base import ModelFamily
    from mbq_export.schemes.base import QuantScheme

__all__ = [
    "PREFERRED",
    "SCHEMES",
    "ExportRecord",
    "GraphForm",
    "Limits",
    "check_graph",
    "export",
    "fitting_lowering",
]

logger = logging.getLogger(__name__)

PACKAGES: Final = ("numpy", "onnx", "onnx-ir", "onnxscript", "torch", "transformers")
"""Traced graphs have the same bytes only for the same versions of these."""


def export(
    checkpoint: QuantCheckpoint,
    out: Path,
    *,
    family: ModelFamily,
    forms: tuple[GraphForm, ...],
    force: bool = False,
    progress: Progress = silent,
) -> ExportRecord:
    """Write all graphs of a checkpoint into a fresh folder.

    One vision and one embedding graph are written per dtype that occurs in ``forms``.

    Args:
        checkpoint: What to export; without quantized linears the graphs hold plain MatMul weights.
        out: Folder to create (``onnx/`` of a bundle); published by one rename.
        family: The model's family.
        forms: Decoder graphs to write.
        force: Replace an earlier export once this one is complete.
        progress: Called after each graph.

    Returns:
        What was written, also in ``mbq_export.json``.

    Raises:
        UsageError: E2001 or E2002 for a form that does not exist for this checkpoint, E2009 for a context
            beyond the model's positions, E2011 if the folder exists.
        FormatError: E4005, E41xx for the model, E44xx if a written graph fails its checks.
        ResourceError: E5001 or E5008.
    """
    refuse_existing(out, record=RECORD, force=force)
    check_forms(checkpoint, forms, longest=family.text_shape(checkpoint.config).max_positions)
    staged = partial_path(out)
    with explained(staged):
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
    stage = _Export(checkpoint=checkpoint, family=family, folder=staged)
    dtypes = tuple(dict.fromkeys(form.dtype for form in forms))
    total = 2 * len(dtypes) + len(forms)
    graphs: list[GraphRecord] = []
    for record in stage.records(dtypes, forms):
        graphs.append(record)
        progress(len(graphs), total, record.file)
    newline = checkpoint.tensor(family.newline)
    write_tensors(staged / HOST_TENSORS, {ops.IMAGE_NEWLINE: newline})
    result = ExportRecord(
        family=family.name,
        scheme=checkpoint.scheme_name,
        group_size=checkpoint.group_size,
        graphs=tuple(graphs),
        host_tensors={ops.IMAGE_NEWLINE: newline.shape},
        versions={name: metadata.version(name) for name in PACKAGES},
    )
    write_file(staged / RECORD, json_bytes(result.as_json()))
    publish(staged, out)
    return result


def check_forms(checkpoint: QuantCheckpoint, forms: tuple[GraphForm, ...], *, longest: int) -> None:
    """Refuse what cannot be written, before anything is.

    Raises:
        UsageError: E2001 for an unknown lowering, E2002 for one without a form of this scheme, for an op level
            that lacks the cache, or for two forms of one file name, E2006 for one without a form of its groups,
            E2009 for more than ``longest`` positions.
    """
    for record in checkpoint.records.values():
        record.scheme.check_deployable()
    for form in forms:
        if form.max_context is not None and form.max_context > longest:
            raise UsageError(
                "E2009",
                f"A context of {form.max_context} tokens is longer than the model's {longest}.",
                why="its positions were never trained beyond that",
                fix=f"--max-context {longest}",
            )
        profile_for(form)
        kinds = {
            (record.scheme, record.group_size)
            for name, record in checkpoint.records.items()
            if name not in checkpoint.tower
        }
        for scheme, group_size in sorted(kinds, key=lambda kind: (kind[0].name, kind[1])):
            without = scheme.name not in ops.PLUGINS and not scheme.rounds_activations
            # An 8-bit head is written in standard operators beside the plugins.
            stand_in = without and form.lowering == "plugin"
            _check_scheme(replace(form, lowering="qdq") if stand_in else form, scheme, group_size)
        if not kinds:
            _check_dtype(form, None)
    names = [form.file_name for form in forms]
    if len(set(names)) < len(names):
        raise UsageError(
            "E2002",
            f"Two graphs would have the same file name: {', '.join(names)}.",
            why="the name tells lowering, target and dtype, but not cache form and logits",
            fix="ask for one of them",
        )


def _check_scheme(form: GraphForm, scheme: QuantScheme, group_size: int) -> None:
    """Refuse a form that cannot hold linears of a number format.

    Raises:
        UsageError: E2002, E2006.
    """
    lowering = LOWERINGS[form.lowering]
    reason = lowering.supports(scheme, form.target)
    lowering.check_group(scheme, group_size)
    if reason is not None:
        raise UsageError(
            "E2002",
            f"Lowering {form.lowering} cannot hold {scheme.name}: {reason}.",
            why="a lowering has a form for some schemes and targets only",
            fix="choose another --lowering",
        )
    _check_dtype(form, scheme)


def _check_dtype(form: GraphForm, scheme: QuantScheme | None) -> None:
    """Refuse a type that a form of a number format, None for plain linears, is not written in.

    Raises:
        UsageError: E2002.
    """
    lowering = LOWERINGS[form.lowering]
    misfit = lowering.misfit(scheme, form.target, form.dtype)
    if misfit is not None:
        raise UsageError(
            "E2002",
            f"Lowering {form.lowering} is not written in {form.dtype}.",
            why=misfit,
            fix=tuple(
                f"--dtype {dtype}"
                for dtype in lowering.dtypes
                if lowering.misfit(scheme, form.target, dtype) is None
            ),
        )


@dataclass(frozen=True, kw_only=True)
class _Export:
    """One export under way: writes graphs into a staged folder, one after the other."""

    checkpoint: QuantCheckpoint
    family: ModelFamily
    folder: Path

    def records(
        self, dtypes: tuple[str, ...], forms: tuple[GraphForm, ...]
    ) -> Iterator[GraphRecord]:
        levels = [self.profile(form) for form in forms if form.target == "trt"]
        profile = traced_profile(levels)
        for dtype in dtypes:
            table = embed.embed_graph(
                self.checkpoint, family=self.family, dtype=dtype, profile=profile
            )
            yield self.written(table, file_name(embed.GRAPH_NAME, dtype), dtype, profile)
        for form in forms:
            with located(form.file_name):
                yield self.decoder(form)
        # Last, because it takes longest: what else is wrong shows before.
        traced = vision.vision_graph(self.checkpoint, family=self.family, profile=profile)
        for dtype in sorted(dtypes, key=DTYPES.index):
            graph = traced if dtype == "fp32" else vision.halved(traced, dtype)
            linears: tuple[LinearNode, ...] = ()
            if self.checkpoint.tower:
                graph = packed(graph, self.checkpoint)
                linears = linear_nodes(graph)
                LOWERINGS["qdq"].lower(graph, "ort")  # which TensorRT reads, too: 8 bits are INT8
            file = file_name(vision.GRAPH_NAME, dtype)
            record = self.written(graph, file, dtype, profile, _traced_limits(levels))
            yield replace(record, linears=linears)

    def profile(self, form: GraphForm) -> OpProfile:
        """Op level of a decoder of this checkpoint."""
        return profile_for(form, packed=self.checkpoint.scheme_name != KEPT)

    def decoder(self, form: GraphForm) -> GraphRecord:
        shape = self.family.text_shape(self.checkpoint.config)
        form = replace(form, max_context=form.max_context or shape.max_positions)
        profile = self.profile(form)
        model = decoder.decoder_graph(
            self.checkpoint, family=self.family, form=form, profile=profile
        )
        declined = PASSES["fuse_projections"].run(model)
        for reason in declined:
            logger.info("%s: %s", form.file_name, reason)
        linears = linear_nodes(model)
        LOWERINGS[form.lowering].lower(model, form.target)
        limits = Limits(target=form.target, allowed=profile.ops)
        record = self.written(model, form.file_name, form.dtype, profile, limits)
        return replace(
            record,
            form=form,
            scheme=self.checkpoint.scheme_name,
            layouts=layouts_of(model),
            linears=linears,
            declined=tuple(declined),
            plugin_layers=_plugin_layers(model, linears) if form.lowering == "plugin" else {},
        )

    def written(
        self, model: ir.Model, file: str, dtype: str, profile: OpProfile, limits: Limits = ANY
    ) -> GraphRecord:
        """Save, check and describe one graph."""
        path = self.folder / file
        data = save_graph(model, path)
        nodes = node_counts(model)
        record = GraphRecord(
            name=str(model.graph.name),
            file=file,
            data=tuple(each.name for each in data),
            dtype=dtype,
            opset=model.opset_imports[""],
            op_level=profile.name,
            inputs=ports_of(model.graph.inputs),
            outputs=ports_of(model.graph.outputs),
            nodes=nodes,
            attention_layers=nodes.get("Attention", 0),
            kv_updates=nodes.get("TensorScatter", 0),
            weight_bytes=constant_bytes(model),
            sha256={each.name: sha256_of(each) for each in (path, *data)},
        )
        check_written(check_graph(path, limits), record)
        return record


def _traced_limits(levels: list[OpProfile]) -> Limits:
    """What the oldest parser that is to read a traced graph must know of it; nothing where it knows all that we write."""
    first = min((profile.first for profile in levels if profile.level < FUSED), default=None)
    return ANY if first is None else Limits(allowed=read_by(first))


def layouts_of(model: ir.Model) -> dict[str, int]:
    """Version of every layout that words of a graph have, by name."""
    found = {}
    for node in packed_nodes(model):
        found[node.attributes["layout"].as_string()] = node.attributes["layout_version"].as_int()
    return found


def _plugin_layers(model: ir.Model, planned: tuple[LinearNode, ...]) -> dict[str, tuple[str, ...]]:
    """Nodes that an engine must hold as plugins: every linear that one multiplies, as there were before lowering.

    Raises:
        InternalError: E9001 if a linear got lost on the way: an engine would lack it without a word.
    """
    wanted = ops.plugin_layers(
        (ops.OPS[linear.scheme].name, linear.node)
        for linear in planned
        if linear.scheme in ops.PLUGINS
    )
    if json.loads(model.metadata_props[ops.PLUGIN_LAYERS]) != wanted:
        raise InternalError("E9001", "The plugin graph lost a linear while it was lowered.")
    return {op: tuple(names) for op, names in wanted.items()}


def linear_nodes(model: ir.Model) -> tuple[LinearNode, ...]:
    """List a decoder's matrix multiplications before they are lowered; lowering keeps their names."""
    return tuple(_linear_node(node) for node in model.graph if ops.SOURCE in node.metadata_props)


def _linear_node(node: ir.Node) -> LinearNode:
    modules = node.metadata_props[ops.SOURCE].split(",")
    scheme, group_size = KEPT, 0
    n, k = columns_of(node.outputs[0]), columns_of(node.inputs[0])
    counts: tuple[int, ...] = (n,)
    if node.domain == ops.DOMAIN:
        source = packed_source(node)
        scheme, group_size, counts = (
            source.scheme,
            source.group_size,
            source.row_counts,
        )
    ends = list(accumulate(counts))
    return LinearNode(
        node=str(node.name),
        n=n,
        k=k,
        scheme=scheme,
        group_size=group_size,
        parts=tuple(
            LinearPart(module=module, rows=(end - count, end))
            for module, count, end in zip(modules, counts, ends, strict=True)
        ),
    )
