"""The compiled kernel library through its C ABI (``kernels/include/mbq/mbq.h``), by ctypes.

The same binding drives the library that nvcc makes and the one that runs the same sources on a CPU; pointers
are plain integers, so tensors of any framework will do (``tensor.data_ptr()``).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from mbq_export.errors import FormatError, MachineError
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.layouts.tiles import kernel_layout_of

if TYPE_CHECKING:
    from pathlib import Path

ABI: Final = 1
SCHEME_IDS: Final = {name: SCHEMES[name].number for name in ("w3a16", "w4a16", "w4a8")}
"""The schemes this library has kernels for."""
DTYPE_IDS: Final = {"float16": 1, "bfloat16": 2}
EPILOGUE_IDS: Final = {"none": 0, "silu_mul": 1}
ALIGNMENT: Final = 16
"""Bytes that every pointer must be a multiple of."""


class LinearStruct(ctypes.Structure):
    """``MbqLinear``."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("scheme", ctypes.c_uint32),
        ("layout_version", ctypes.c_uint32),
        ("dtype", ctypes.c_uint32),
        ("epilogue", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
    )


class DeviceStruct(ctypes.Structure):
    """``MbqDevice``."""

    _fields_ = (
        ("sm", ctypes.c_int32),
        ("sm_count", ctypes.c_int32),
        ("smem_optin", ctypes.c_int32),
        ("l2_bytes", ctypes.c_int32),
    )


class ConfigStruct(ctypes.Structure):
    """``MbqConfig``."""

    _fields_ = tuple(
        (name, ctypes.c_int32)
        for name in ("id", "family", "n_tiles", "warps", "depth", "rows", "splits")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCall:
    """Everything but the activations of one linear, as addresses on the device.

    Attributes:
        scheme: ``w3a16``, ``w4a16`` or ``w4a8``.
        dtype: ``float16`` or ``bfloat16``: type of x, y, bias and residual.
        n: Output features, not padded.
        k: Input features, not padded.
        group_size: Columns that share a scale; 0 for one scale per output channel.
        codes: Address of the tiles.
        scales: Address of the scales in the tile layout.
        zeros: Address of the zero points; 0 for symmetric schemes.
        bias: Address of (N,) in ``dtype``, or 0.
        residual: Address of what is added before rounding, shaped as y, or 0.
        epilogue: ``none`` or ``silu_mul``.
    """

    scheme: str
    dtype: str
    n: int
    k: int
    group_size: int
    codes: int
    scales: int
    zeros: int = 0
    bias: int = 0
    residual: int = 0
    epilogue: str = "none"

    def as_struct(self) -> LinearStruct:
        """The C descriptor."""
        scheme = SCHEMES[self.scheme]
        return LinearStruct(
            struct_size=ctypes.sizeof(LinearStruct),
            scheme=SCHEME_IDS[self.scheme],
            layout_version=kernel_layout_of(scheme).version,
            dtype=DTYPE_IDS[self.dtype],
            epilogue=EPILOGUE_IDS[self.epilogue],
            flags=0,
            n=self.n,
            k=self.k,
            group=self.group_size,
            codes=self.codes or None,
            scales=self.scales or None,
            zeros=self.zeros or None,
            bias=self.bias or None,
            residual=self.residual or None,
        )


_P = ctypes.c_void_p
_LINEAR = ctypes.POINTER(LinearStruct)
_DEVICE = ctypes.POINTER(DeviceStruct)
_RUN = (_LINEAR, ctypes.c_int, _P, _P, _P, ctypes.c_size_t, _P)
_SIGNATURES: Final = {
    "mbq_abi": (ctypes.c_int, ()),
    "mbq_status": (ctypes.c_char_p, (ctypes.c_int,)),
    "mbq_linear": (ctypes.c_int, _RUN),
    "mbq_linear_config": (ctypes.c_int, (*_RUN, ctypes.c_int)),
    "mbq_linear_workspace": (ctypes.c_size_t, (_LINEAR, ctypes.c_int)),
    "mbq_select": (ctypes.c_int, (_LINEAR, ctypes.c_int, ctypes.c_int)),
    "mbq_select_on": (ctypes.c_int, (_LINEAR, ctypes.c_int, _DEVICE)),
    "mbq_config": (ctypes.c_int, (ctypes.c_int, ctypes.POINTER(ConfigStruct))),
    "mbq_config_count": (ctypes.c_int, ()),
    "mbq_config_legal": (ctypes.c_int, (_LINEAR, ctypes.c_int, ctypes.c_int, _DEVICE)),
    "mbq_quant_act": (
        ctypes.c_int,
        (ctypes.c_int, ctypes.c_int, ctypes.c_int, _P, _P, _P, _P),
    ),
    "mbq_dequant": (ctypes.c_int, (_LINEAR, _P, _P)),
    "mbq_read_bw": (ctypes.c_int, (_P, ctypes.c_size_t, _P, _P)),
}


class KernelLibrary:
    """One loaded library. Methods that launch return when the launch is queued."""

    def __init__(self, cdll: ctypes.CDLL, path: Path) -> None:
        """Wrap a loaded library; `load` is the way in."""
        self.cdll = cdll
        self.path = path
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(cdll, name)
            function.restype, function.argtypes = result, arguments

    @classmethod
    def load(cls, path: Path) -> Self:
        """Load a library and check its ABI number.

        Raises:
            MachineError: E3005 if the file is missing, no such library, or of another ABI.
        """
        build = "python kernels/build.py"
        if not path.is_file():
            raise MachineError(
                "E3005",
                f"There is no kernel library at {path}.",
                why="it is compiled from sources",
                fix=build,
            )
        try:
            library = cls(ctypes.CDLL(str(path)), path)
        except (OSError, AttributeError) as error:
            raise MachineError(
                "E3005", f"{path} is no kernel library.", why=str(error), fix=build
            ) from error
        found = library.cdll.mbq_abi()
        if found != ABI:
            raise MachineError(
                "E3005", f"{path} has ABI {found}.", why=f"this release calls ABI {ABI}", fix=build
            )
        return library

    def status(self, code: int) -> str:
        """What a status means."""
        text: bytes = self.cdll.mbq_status(code)
        return text.decode()

    def check(self, code: int, *, what: str) -> None:
        """Turn a status into an error.

        Raises:
            FormatError: E4121 for a refused argument.
            MachineError: E3016 for an error of the CUDA runtime.
        """
        if code == 0:
            return
        if code < 0:
            raise FormatError("E4121", f"{what}: status {code}.", why=self.status(code))
        raise MachineError(
            "E3016", f"{what}: CUDA error {code}.", why=self.status(code), fix="mbq-export doctor"
        )

    def linear(
        self,
        call: LinearCall,
        *,
        m: int,
        x: int,
        y: int,
        workspace: tuple[int, int] = (0, 0),
        stream: int = 0,
        config: int | None = None,
    ) -> None:
        """Queue y (M, N) = x (M, K) W^T.

        Args:
            call: The weight.
            m: Rows of x.
            x: Address of row-major activations.
            y: Address of the result.
            workspace: Address and bytes of scratch; see `workspace_bytes`.
            stream: A CUDA stream; 0 is the default one.
            config: Config id; None lets the library choose.

        Raises:
            FormatError: E4121 if an argument is refused.
            MachineError: E3016 if the launch fails.
        """
        struct, (scratch, size) = call.as_struct(), workspace
        arguments = (
            ctypes.byref(struct),
            m,
            x or None,
            y or None,
            scratch or None,
            size,
            stream or None,
        )
        code = (
            self.cdll.mbq_linear(*arguments)
            if config is None
            else self.cdll.mbq_linear_config(*arguments, config)
        )
        self.check(code, what=f"{call.scheme} linear {call.n} x {call.k}, M = {m}")

    def workspace_bytes(self, call: LinearCall, *, max_m: int) -> int:
        """Scratch that suffices for every M up to ``max_m`` under every config."""
        return int(self.cdll.mbq_linear_workspace(ctypes.byref(call.as_struct()), max_m))

    def select(self, call: LinearCall, *, m: int, sm: int) -> int:
        """Config id for the nominal device of an SM; negative if the problem is refused."""
        return int(self.cdll.mbq_select(ctypes.byref(call.as_struct()), m, sm))

    def select_on(self, call: LinearCall, *, m: int, device: DeviceStruct) -> int:
        """Config id for a device."""
        return int(self.cdll.mbq_select_on(ctypes.byref(call.as_struct()), m, ctypes.byref(device)))

    def legal(self, call: LinearCall, *, m: int, config: int, device: DeviceStruct) -> int:
        """0 if a config may run a problem on a device, else the status that refuses it."""
        struct = call.as_struct()
        return int(
            self.cdll.mbq_config_legal(ctypes.byref(struct), m, config, ctypes.byref(device))
        )

    def configs(self) -> list[dict[str, int]]:
        """Every config of this release."""
        found = []
        for index in range(self.cdll.mbq_config_count()):
            struct = ConfigStruct()
            self.cdll.mbq_config(index, ctypes.byref(struct))
            found.append({name: int(getattr(struct, name)) for name, *_ in ConfigStruct._fields_})
        return found

    def quant_act(
        self, *, dtype: str, m: int, k: int, x: int, xq: int, sx: int, stream: int = 0
    ) -> None:
        """Queue the quantization of activations (M, K) to int8 (M, 128 * ceil(K / 128)) and scales (M,).

        Raises:
            FormatError: E4121 if an argument is refused.
            MachineError: E3016 if the launch fails.
        """
        code = self.cdll.mbq_quant_act(DTYPE_IDS[dtype], m, k, x, xq, sx, stream or None)
        self.check(code, what=f"quant_act {m} x {k}")

    def dequant(self, call: LinearCall, *, weights: int, stream: int = 0) -> None:
        """Queue row-major weights (N, K) in the call's dtype.

        Raises:
            FormatError: E4121 if an argument is refused.
            MachineError: E3016 if the launch fails.
        """
        struct = call.as_struct()
        code = self.cdll.mbq_dequant(ctypes.byref(struct), weights, stream or None)
        self.check(code, what=f"{call.scheme} dequant {call.n} x {call.k}")

    def read_bw(self, *, data: int, size: int, total: int, stream: int = 0) -> None:
        """Queue one pass over ``size`` bytes; the uint32 at ``total`` becomes the sum of their words.

        Raises:
            FormatError: E4121 if an argument is refused.
            MachineError: E3016 if the launch fails.
        """
        self.check(
            self.cdll.mbq_read_bw(data, size, total, stream or None), what=f"read {size} bytes"
        )
