"""A double of full TensorRT's builder that records what is asked of it, in the two forms that versions differ in.

Full TensorRT cannot be installed where this project is tested. Real builds are those of TensorRT for RTX
(`test__trt_worker`, `test__trt_plugins`); here is only what is said to the builder, by the documented names.
"""

import os
import signal
import sys
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

from mbq_export.backends import _trt_worker

PLUGINS = ("layers.0.o_proj",)
FOREIGN = b"of another device"
DAMAGED = b"damaged"
DEADLY = b"deadly"
"""Timing caches that TensorRT does not take, cannot read, and dies of."""
TABLE = """\
Name: k, LayerType: kgen, Inputs: [], Constants: [], Outputs: [], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: n.y]
I/O Tensors:
 Name: x, IOMode: Input, DataType: Half, Dimensions: [-1,8]
"""
"""What a verbose build prints."""


class Flags10(IntEnum):
    """Builder flags of TensorRT 10."""

    FP16 = 0
    WEIGHT_STREAMING = 22


class Flags11(IntEnum):
    """Builder flags of TensorRT 11: other numbers, and no precisions."""

    WEIGHT_STREAMING = 17


class Typed10(IntEnum):
    """Network flags of 10.3: typing is a choice and has the number 1."""

    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class Typed11(IntEnum):
    """Network flags of 11: everything is typed."""

    PREFER_AOT_PYTHON_PLUGINS = 1


@dataclass
class Config:
    """IBuilderConfig."""

    said: dict[str, Any]

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self.said[pool] = size

    def set_flag(self, flag: IntEnum) -> None:
        self.said.setdefault("flags", []).append(flag)

    def create_timing_cache(self, data: bytes) -> bytes | None:
        return None if data == DAMAGED else data

    def set_timing_cache(self, cache: bytes, *, ignore_mismatch: bool) -> bool:
        self.said.setdefault("caches", []).append((cache, ignore_mismatch))
        return cache != FOREIGN

    def get_timing_cache(self) -> Any:
        times, _ = self.said["caches"][-1]
        if times == DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        return SimpleNamespace(serialize=lambda: times + b"measured;")

    def add_optimization_profile(self, profile: "Profile") -> int:
        self.said["profile"] = profile.shapes
        return 0


@dataclass
class Profile:
    """IOptimizationProfile."""

    shapes: dict[str, Any] = field(default_factory=dict)

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.shapes[name] = shapes


@dataclass
class Network:
    """INetworkDefinition after the parse: one layer between x and y, a plugin or not."""

    layer: str

    num_inputs = num_outputs = num_layers = 1

    def get_input(self, _: int) -> Any:
        return SimpleNamespace(name="x", shape=(-1, 128))

    def get_output(self, _: int) -> Any:
        return SimpleNamespace(name="y", shape=(-1, 128))

    def get_layer(self, _: int) -> Any:
        return SimpleNamespace(name=PLUGINS[0], type=self.layer)


@dataclass
class Builder:
    """IBuilder."""

    said: dict[str, Any]
    layer: str

    def get_plugin_registry(self) -> Any:
        def load(path: str) -> object:
            self.said["library"] = path
            return object()

        ours = SimpleNamespace(name="W3Linear", plugin_version="1", plugin_namespace="mbq")
        return SimpleNamespace(load_library=load, all_creators=[ours])

    def create_network(self, flags: int) -> Network:
        self.said["network"] = flags
        return Network(self.layer)

    def create_builder_config(self) -> Config:
        return Config(self.said)

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, _network: Network, _config: Config) -> Any:
        os.write(1, TABLE.encode())
        return memoryview(b"plan")


def module(major: int, said: dict[str, Any], *, layer: str = "LayerType.PLUGIN_V3") -> Any:
    """The module ``tensorrt`` of a major version, whose parser makes one layer."""
    return SimpleNamespace(
        __version__={10: "10.13.3.9", 11: "11.4.0.106"}[major],
        Logger=type("Logger", (), {"VERBOSE": 4, "__init__": lambda self, _: None}),
        Builder=lambda _logger: Builder(said, layer),
        OnnxParser=lambda _network, _logger: SimpleNamespace(parse_from_file=lambda _: True),
        NetworkDefinitionCreationFlag={10: Typed10, 11: Typed11}[major],
        BuilderFlag={10: Flags10, 11: Flags11}[major],
        ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
    )


def child(major: str, job: str) -> None:
    """Be the child of a build, with the double in TensorRT's place."""
    _trt_worker.loaded = lambda _: module(int(major), {}, layer="LayerType.ACTIVATION")
    _trt_worker.main(["", job])


if __name__ == "__main__":
    child(*sys.argv[1:])
