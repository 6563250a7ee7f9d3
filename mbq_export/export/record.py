"""What an export is asked for (`GraphForm`) and what it wrote (`ExportRecord`, ``onnx/mbq_export.json``)."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, NoReturn, Self

from mbq_export.errors import FormatError, IncompatibleError, UsageError
from mbq_export.export import ops
from mbq_export.reading import read_json

SCHEMA: Final = "mbq-export/graphs"
SCHEMA_MAJOR: Final = 1
RECORD: Final = "mbq_export.json"
HOST_TENSORS: Final = "host_tensors.safetensors"
LIMIT_BYTES: Final = 16 << 20
MERGE: Final = "replace_rows"
"""How the host joins pictures and text: rows of `inputs_embeds` at image-token positions are replaced."""

TARGETS: Final = ("ort", "trt")
DTYPES: Final = ("fp32", "fp16", "bf16")
KV_MODES: Final = ("concat", "static")
LOGITS: Final = ("all", "last")


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphForm:
    """One decoder graph to write.

    Attributes:
        lowering: ``reference`` (mbq nodes with function bodies), ``qdq`` (standard ops on 4-bit constants) or
            ``plugin`` (mbq nodes on tiles, which only TensorRT with our plugins runs).
        target: Runtime the graph is for: ``ort`` or ``trt`` (any flavour of TensorRT).
        dtype: Type of activations: ``fp32``, ``fp16`` or ``bf16``.
        kv: ``concat`` appends to the cache, ``static`` writes into slots of a cache of ``max_context``.
        logits: ``all`` positions, or the ``last`` one.
        max_context: Slots of a static cache and rows of the rotary tables; None takes the model's own limit.
        op_level: ``auto``, or the name of a profile: ``opset20``, ``opset23-attention``, ..
    """

    lowering: str = "qdq"
    target: str = "ort"
    dtype: str = "fp32"
    kv: str = "concat"
    logits: str = "all"
    max_context: int | None = None
    op_level: str = "auto"

    def __post_init__(self) -> None:
        """Refuse values that do not exist and pairs that no runtime takes.

        Raises:
            UsageError: E2001 for an unknown value, E2002 for a combination that cannot work.
        """
        for name, value, known in (
            ("target", self.target, TARGETS),
            ("dtype", self.dtype, DTYPES),
            ("kv", self.kv, KV_MODES),
            ("logits", self.logits, LOGITS),
        ):
            if value not in known:
                raise UsageError(
                    "E2001",
                    f"Unknown {name} {value!r}.",
                    why=f"known: {', '.join(known)}",
                    fix=f"use one of {', '.join(known)}",
                )
        if (self.target, self.dtype) == ("trt", "fp32"):
            raise UsageError(
                "E2002",
                "A graph for TensorRT cannot be fp32.",
                why="TensorRT has no fp32 kernel for the Attention operator",
                fix="--dtype fp16",
            )
        if self.max_context is not None and self.max_context < 1:
            raise UsageError(
                "E2002",
                f"A context of {self.max_context} tokens holds nothing.",
                why="the cache needs at least one slot",
                fix="--max-context 4096",
            )

    @property
    def variant(self) -> str:
        """Middle part of the file name: ``reference``, ``qdq_ort``, ``qdq_trt`` or ``plugin``."""
        one_for_all = self.lowering in {"reference", "plugin"}
        return self.lowering if one_for_all else f"{self.lowering}_{self.target}"

    @property
    def file_name(self) -> str:
        """Name of the graph file: ``decoder_model_merged_<variant>[_<dtype>].onnx``."""
        return file_name(f"decoder_model_merged_{self.variant}", self.dtype)


def file_name(stem: str, dtype: str) -> str:
    """Graph file of a stem; fp32 is the unmarked case, as other tools expect."""
    return f"{stem}.onnx" if dtype == "fp32" else f"{stem}_{dtype}.onnx"


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """One input or output of a graph.

    Attributes:
        name: Tensor name.
        dtype: Numpy's name of the element type.
        shape: Sizes, or the symbol of a size that varies.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPart:
    """One linear of the original model inside a node.

    Attributes:
        module: Its module path.
        rows: First and last-plus-one of its columns in the node's output.
    """

    module: str
    rows: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearNode:
    """One matrix multiplication of the graph, quantized or not.

    Attributes:
        node: Name of the node that multiplies (``mbq`` op or MatMul).
        n: Output columns.
        k: Input columns.
        scheme: Number format, ``none`` if not quantized.
        group_size: Columns that share a scale; 0 if not quantized.
        parts: Original linears, in the order of the output columns.
    """

    node: str
    n: int
    k: int
    scheme: str
    group_size: int
    parts: tuple[LinearPart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRecord:
    """One graph file.

    Attributes:
        name: ``vision_encoder``, ``embed_tokens``, or ``decoder_model_merged``.
        file: Its file, beside the record.
        data: Its external data files.
        dtype: Type of activations.
        opset: Version of the standard operators.
        op_level: Name of the op level that it was written for; empty in files of earlier releases.
        inputs: In graph order.
        outputs: In graph order.
        nodes: Number of nodes by operator, with the domain where it is not the standard one.
        weight_bytes: Bytes of all constants.
        sha256: Hash of every file by name.
        form: How a decoder was written; None for the other graphs.
        scheme: Number format of a decoder's linears.
        layouts: Layout versions of packed constants.
        linears: A decoder's matrix multiplications.
        attention_layers: Attention nodes.
        kv_updates: Nodes that write into a static cache.
        declined: Rewrites that did not apply, with the reason.
        plugin_layers: Nodes that an engine of this graph must hold as plugin layers, by operator.
    """

    name: str
    file: str
    data: tuple[str, ...]
    dtype: str
    opset: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    nodes: dict[str, int]
    weight_bytes: int
    sha256: dict[str, str]
    form: GraphForm | None = None
    op_level: str = ""
    scheme: str = "none"
    layouts: dict[str, int] = field(default_factory=dict)
    linears: tuple[LinearNode, ...] = ()
    attention_layers: int = 0
    kv_updates: int = 0
    declined: tuple[str, ...] = ()
    plugin_layers: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRecord:
    """All graphs of a model.

    Attributes:
        family: Name of the model's family.
        scheme: Number format of the checkpoint.
        group_size: Columns that share a scale; 0 if nothing is quantized.
        graphs: One per file.
        host_tensors: Shapes of the tensors in ``host_tensors.safetensors``.
        versions: Packages that wrote the files.
    """

    family: str
    scheme: str
    group_size: int
    graphs: tuple[GraphRecord, ...]
    host_tensors: dict[str, tuple[int, ...]]
    versions: dict[str, str]

    def graph(self, file: str) -> GraphRecord:
        """Return the record of a file.

        Raises:
            KeyError: If no graph has that file name.
        """
        return {graph.file: graph for graph in self.graphs}[file]

    def as_json(self) -> dict[str, Any]:
        """Form of ``mbq_export.json``."""
        return {
            "schema": f"{SCHEMA}@{SCHEMA_MAJOR}",
            "merge": MERGE,
            "domain": {"name": ops.DOMAIN, "version": ops.DOMAIN_VERSION},
            **asdict(self),
        }

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read ``mbq_export.json`` of a folder of graphs.

        Raises:
            FormatError: E4604 if it is missing or malformed.
            IncompatibleError: E7004 for a newer schema.
        """
        path = folder / RECORD
        if not path.is_file():
            _malformed(f"there is no {RECORD} in {folder.name}")
        found = read_json(path, limit=LIMIT_BYTES, code="E4604")
        name, _, major = str(found.get("schema")).partition("@")
        if name != SCHEMA or not major.isdecimal():
            _malformed(f"its schema is {found.get('schema')!r}")
        if int(major) > SCHEMA_MAJOR:
            raise IncompatibleError(
                "E7004",
                f"{RECORD} has schema {found['schema']!r}.",
                why=f"this release reads up to {SCHEMA}@{SCHEMA_MAJOR}",
                fix="use the release of mbq-export that wrote it",
            )
        try:
            shapes = {name: tuple(shape) for name, shape in found["host_tensors"].items()}
            nested = {"graphs": tuple(map(_graph, found["graphs"])), "host_tensors": shapes}
            return cls(**_fields(cls, found) | nested)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            _malformed(f"a field is missing or of another kind ({error})")


def _graph(found: dict[str, Any]) -> GraphRecord:
    form = None if found["form"] is None else GraphForm(**_fields(GraphForm, found["form"]))
    nested = {
        "form": form,
        "inputs": tuple(map(_port, found["inputs"])),
        "outputs": tuple(map(_port, found["outputs"])),
        "linears": tuple(map(_linear, found["linears"])),
        # Not there in files of releases without plugins.
        "plugin_layers": {op: tuple(names) for op, names in found.get("plugin_layers", {}).items()},
    }
    return GraphRecord(**_fields(GraphRecord, found) | nested)


def _port(found: dict[str, Any]) -> Port:
    return Port(**_fields(Port, found) | {"shape": tuple(found["shape"])})


def _linear(found: dict[str, Any]) -> LinearNode:
    parts = tuple(
        LinearPart(module=part["module"], rows=tuple(part["rows"])) for part in found["parts"]
    )
    return LinearNode(**_fields(LinearNode, found) | {"parts": parts})


def _fields(kind: type[Any], found: dict[str, Any]) -> dict[str, Any]:
    """Entries that a class has a field for; lists become tuples, keys of a later minor release are left out."""
    names = {each.name for each in fields(kind)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in found.items()
        if name in names
    }


def _malformed(what: str) -> NoReturn:
    raise FormatError(
        "E4604",
        f"{RECORD} is malformed: {what}.",
        why=f"this release reads {SCHEMA}@{SCHEMA_MAJOR}",
        fix="export the model again",
    )
