"""What differs between the TensorRT that a child has imported and its other versions: 10.3 to 11.4, and RTX 1.7.

Numbers of flags moved between 10 and 11, names came and went; so everything is looked up by name, here and nowhere
else. ``trt`` is the imported module throughout. Full TensorRT 10 and 11 follow their documented API; of them only what
the lean runtimes have (`tests/backends/recorded_tensorrt.py`) and TensorRT for RTX 1.7 were run.
"""

from pathlib import Path
from typing import Any

import numpy as np

from mbq_export.backends._trt_job import Refused
from mbq_export.tensor_file import BFLOAT16


def network_flags(trt: Any) -> int:
    """Strong typing where it is a choice: its number is 1 in 10.3 and ignored from 11 on, where all is typed."""
    flag = trt.NetworkDefinitionCreationFlag.__members__.get("STRONGLY_TYPED")
    return 0 if flag is None else 1 << int(flag)


def devices(trt: Any) -> tuple[str, ...]:
    """Devices that the library can build for without having them, as ``SM89``; none in full TensorRT."""
    known = getattr(trt, "ComputeCapability", None)
    return () if known is None else tuple(n for n in known.__members__ if n.startswith("SM"))


def set_devices(trt: Any, config: Any, wanted: tuple[str, ...]) -> None:
    """Choose the devices of a plan; an empty choice leaves it to the GPU of this machine.

    Raises:
        Refused: ``trt-target`` for a device that the library has no code for.
    """
    if not wanted:
        return
    known = getattr(trt, "ComputeCapability", None)
    members = {} if known is None else known.__members__
    missing = [name for name in wanted if name not in members]
    if not missing:
        config.num_compute_capabilities = len(wanted)
        missing = [
            name
            for index, name in enumerate(wanted)
            if not config.set_compute_capability(members[name], index)
        ]
    if missing:
        told = f"it knows {', '.join(devices(trt)) or 'only the GPU it runs on'}"
        raise Refused("trt-target", f"The library cannot build for {missing[0]}.", (told,))


def set_flags(trt: Any, config: Any, wanted: tuple[str, ...]) -> None:
    """Set builder flags by name.

    Raises:
        Refused: ``trt-option`` for a flag that this version does not have.
    """
    for name in wanted:
        flag = trt.BuilderFlag.__members__.get(name)
        if flag is None:
            raise Refused(
                "trt-option", f"This version has no builder flag {name}.", (str(trt.__version__),)
            )
        config.set_flag(flag)


def read_timing_cache(config: Any, file: Path) -> str:
    """Begin with the times in a file, or with none: old times save time and decide nothing else.

    Returns:
        Why the file is not used; empty if it is, or if there is none.

    Raises:
        Refused: ``trt-option`` if not even an empty cache is taken.
    """
    data = file.read_bytes() if file.is_file() else b""
    unused = ""
    for content in (data, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return unused
        unused = "it is damaged" if cache is None else "it is of another version or device"
    raise Refused("trt-option", "TensorRT takes no timing cache, not even an empty one.")


def write_timing_cache(config: Any, file: Path) -> None:
    """Keep the times that a build measured."""
    file.write_bytes(memoryview(config.get_timing_cache().serialize()))


def parser_error(error: Any) -> str:
    """One parser error: node, operator, text, and the function it happened in where the version tells."""
    described = getattr(error, "local_function_stack", None)
    stack = [] if described is None else [str(name) for name in described()]
    inside = f" in function {' > '.join(stack)}" if stack else ""
    return f"node {error.node_name()!r} ({error.node_operator()}){inside}: {error.desc()}"


def set_streaming_budget(engine: Any, budget: int) -> None:
    """Set how many bytes of weights stay on the device; 11 has only the name with ``v2``, 10.3 may lack it."""
    name = "weight_streaming_budget_v2"
    setattr(engine, name if hasattr(engine, name) else "weight_streaming_budget", budget)


def array_type(trt: Any, dtype: Any) -> np.dtype[Any]:
    """Element type of arrays for a tensor; the bindings know none for bfloat16 and raise TypeError there."""
    if dtype == getattr(trt.DataType, "BF16", None):
        return BFLOAT16
    found: np.dtype[Any] = np.dtype(trt.nptype(dtype))
    return found


def aliased_input(engine: Any, output: str) -> str | None:
    """Input that an output must share its address with (cache updates, from 10.15), or None."""
    ask = getattr(engine, "get_aliased_input_tensor", None)
    return None if ask is None else (ask(output) or None)
