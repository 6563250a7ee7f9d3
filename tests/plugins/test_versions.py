"""What differs between versions of TensorRT's headers: one file knows it, and each of its branches compiles.

Headers of one version only can be installed here (kernel-lens: 10.14). What stands in for the others is its folder with
another NvInferVersion.h, in the two ways in which NVIDIA writes that file. So this shows that our branches compile and
say the right version, not that the interfaces of the other versions are those of 10.14: for that there is the list of
names below, and the registries in `test_registry`, which are real.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.plugins import compiled

ONLY_PLACE = "plugins/common/tensorrt.h"
MACROS = re.compile(r"\b(?:NV_TENSORRT_|TRT_MAJOR|TRT_MINOR|NV_INFER)\w*")
NAME = re.compile(r"nvinfer1::(\w+)")

IN_10_0 = frozenset({
    "DataType", "Dims", "DimsExprs", "DynamicPluginTensorDesc", "IDimensionExpr", "IExprBuilder", "ILoggerFinder",
    "IPluginCapability", "IPluginCreatorInterface", "IPluginCreatorV3One", "IPluginResourceContext", "IPluginV3",
    "IPluginV3OneBuild", "IPluginV3OneCore", "IPluginV3OneRuntime", "PluginCapabilityType", "PluginField",
    "PluginFieldCollection", "PluginFieldType", "PluginTensorDesc", "TensorFormat", "TensorRTPhase",
})  # fmt: skip
"""Names of TensorRT that the headers of 10.0 had already, by NVIDIA's documentation of that release."""


@dataclass(frozen=True, kw_only=True)
class Headers:
    """A version as NVIDIA's NvInferVersion.h says it.

    Attributes:
        version: Three numbers.
        macro: Part of the names of the macros that hold them; empty where the numbers stand for themselves.
    """

    version: str
    macro: str = ""

    @property
    def text(self) -> str:
        """Content of the file."""
        lines = ["#pragma once"]
        parts = ("MAJOR", "MINOR", "PATCH")
        for part, number in zip(parts, self.version.split("."), strict=True):
            value = f"TRT_{part}_{self.macro}" if self.macro else number
            lines += [f"#define {value} {number}"] * bool(self.macro)
            lines += [f"#define NV_TENSORRT_{part} {value} //!< TensorRT version."]
        return "\n".join([*lines, "#define NV_TENSORRT_BUILD 0", ""])

    def lay_out(self, folder: Path) -> Path:
        """The installed headers with this version: copies, because a header looks beside itself first."""
        folder.mkdir()
        for header in compiled.tensorrt_headers().glob("NvInfer*.h"):
            shutil.copyfile(header, folder / header.name)
        (folder / "NvInferVersion.h").write_text(self.text)
        return folder


SERVED = [
    Headers(version="10.3.0"),
    Headers(version="10.16.1", macro="ENTERPRISE"),
    Headers(version="11.4.0", macro="ENTERPRISE"),
    Headers(version="1.7.1", macro="RTX"),
]
REFUSED = [
    (Headers(version="10.2.9"), "TensorRT 10.3 or newer is needed"),
    (Headers(version="8.6.1"), "TensorRT 10.3 or newer is needed"),
    (Headers(version="1.7.1", macro="ENTERPRISE"), "TensorRT 10.3 or newer is needed"),
    (Headers(version="0.9.0", macro="RTX"), "TensorRT for RTX 1.0 or newer is needed"),
]


def command(headers: Path, *more: object) -> list[object]:
    own = [
        f"-I{compiled.ROOT / folder}" for folder in ("plugins", "plugins/common", "kernels/include")
    ]
    return [
        *(compiled.tool("g++"), "-std=c++17", "-fPIC", *compiled.WARNINGS, *own),
        *("-isystem", headers, "-isystem", compiled.cuda_headers(), *more),
    ]


@pytest.mark.parametrize("headers", SERVED, ids=lambda each: each.version)
def test_every_source_compiles_with_headers_that_name_a_served_version(
    headers: Headers, tmp_path: Path
) -> None:
    folder = headers.lay_out(tmp_path / "include")
    sources = [compiled.ROOT / source for source in compiled.PLUGIN_SOURCES]
    outcome = compiled.run(command(folder, "-fsyntax-only", *sources))
    assert outcome.returncode == 0, outcome.stderr
    built = tmp_path / "exports.o"
    outcome = compiled.run(
        command(folder, "-c", compiled.ROOT / "plugins/exports.cpp", "-o", built)
    )
    assert outcome.returncode == 0, outcome.stderr
    assert f'"trt_headers":"{headers.version}"'.encode() in built.read_bytes()


@pytest.mark.parametrize(("headers", "words"), REFUSED, ids=["10.2", "8.6", "1.7", "RTX 0.9"])
def test_other_versions_are_refused_by_a_sentence(
    headers: Headers, words: str, tmp_path: Path
) -> None:
    folder = headers.lay_out(tmp_path / "include")
    source = compiled.ROOT / "plugins/exports.cpp"
    outcome = compiled.run(command(folder, "-fsyntax-only", source))
    assert outcome.returncode != 0
    assert words in outcome.stderr


@pytest.mark.parametrize("headers", SERVED, ids=lambda each: each.version)
def test_cmake_reads_the_same_version(headers: Headers, tmp_path: Path) -> None:
    folder = headers.lay_out(tmp_path / "include")
    script = tmp_path / "say.cmake"
    module = compiled.ROOT / "plugins/cmake/TensorRTHeaders.cmake"
    script.write_text(
        f'include("{module}")\nmbq_find_tensorrt_headers(place version)\nmessage("${{place}} ${{version}}")\n'
    )
    outcome = compiled.run(
        [compiled.tool("cmake"), f"-DTENSORRT_INCLUDE_DIR={folder}", "-P", script]
    )
    assert outcome.stderr.split() == [str(folder), headers.version]


def sources() -> dict[str, str]:
    found = [*compiled.ROOT.glob("plugins/**/*.h"), *compiled.ROOT.glob("plugins/**/*.cpp")]
    return {path.relative_to(compiled.ROOT).as_posix(): path.read_text() for path in found}


def test_one_file_knows_that_there_are_versions() -> None:
    knowing = {name for name, text in sources().items() if MACROS.search(text)}
    assert knowing == {ONLY_PLACE}
    including = {name for name, text in sources().items() if "#include <NvInfer" in text}
    assert including == {ONLY_PLACE}


def test_every_name_that_is_used_is_older_than_the_oldest_version_served() -> None:
    """A newer one (IPluginV3OneBuildV2, say) would compile here and not on a Jetson."""
    assert {name for text in sources().values() for name in NAME.findall(text)} == IN_10_0


def test_one_module_asks_python_bindings_what_they_have() -> None:
    """Names that came and went are looked up by name, in one place."""
    asking = {
        path.name
        for path in (compiled.ROOT / "mbq_export/backends").glob("_trt*.py")
        if re.search(
            r"__members__|(?:has|get)attr\((?:trt|config|engine|error|builder)\b", path.read_text()
        )
    }
    assert asking == {"_trt_versions.py"}
