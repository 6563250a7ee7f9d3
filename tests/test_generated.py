"""Files that programs write are the ones that the programs would write now."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mbq_export.errors import InternalError, UsageError
from mbq_export.export import op_names, ops
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.layouts import header, w3t, w4t

ROOT = Path(__file__).parents[1]
INCLUDE = ROOT / "kernels" / "include"
HEADER = INCLUDE / "mbq" / "layout.h"
OP_NAMES = ROOT / "plugins" / "common" / "op_names.h"

USER = """\
#include "mbq/mbq.h"
#include "mbq/layout.h"
static const int order[4] = MBQ_BYTE_ORDER;
int main(void) {
    const int numbers[3][2] = {{MBQ_SCHEME_W3A16, MBQ_W3A16}, {MBQ_SCHEME_W4A16, MBQ_W4A16},
                               {MBQ_SCHEME_W4A8, MBQ_W4A8}};
    int wrong = order[1] != 2, i;
    for (i = 0; i < 3; ++i) wrong += numbers[i][0] != numbers[i][1];
    return wrong;
}
"""
"""The header beside the hand-written ABI, which numbers the schemes a second time."""


def test_the_header_is_what_its_constants_say() -> None:
    assert HEADER.read_text() == header.text(), f"{HEADER} is stale; run: {header.COMMAND}"


def test_the_header_says_the_sizes_and_numbers_of_the_formats() -> None:
    for line in (
        "MBQ_LAYOUT_VERSION = 1", "MBQ_W3T_TILE_BYTES = 768", "MBQ_W4T_TILE_BYTES = 1024",
        "MBQ_SCHEME_W3A16 = 1", "MBQ_SCHEME_W4A16 = 2", "MBQ_SCHEME_W4A8 = 3",
        "MBQ_W3A16_GROUPS = 224", "MBQ_W4A8_GROUPS = 128", "MBQ_W4A8_CHANNEL = 1",
        "MBQ_W4A8_LARGEST_K = 132104",
    ):  # fmt: skip
        assert f"    {line}" in header.text()


def test_every_scheme_with_a_kernel_and_tile_layout_is_in_the_header() -> None:
    found = header.text()
    for name, scheme in SCHEMES.members().items():
        tiled = scheme.kernel_layout in {module.LAYOUT.name for module in header.TILES}
        assert tiled == (scheme.kernel_layout is not None)
        assert (f"MBQ_SCHEME_{name.upper()} = {scheme.number}" in found) == tiled
    numbers = [scheme.number for scheme in SCHEMES.members().values() if scheme.number]
    assert len(set(numbers)) == len(numbers)


def test_a_changed_constant_makes_another_header(monkeypatch: pytest.MonkeyPatch) -> None:
    before = header.text()
    monkeypatch.setattr(w3t, "TILE_BYTES", 816)
    assert "MBQ_W3T_TILE_BYTES = 816" in header.text()
    assert header.text() != before


def test_layouts_of_two_versions_have_no_common_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w4t, "LAYOUT", replace(w4t.LAYOUT, version=2))
    with pytest.raises(InternalError, match="several versions"):
        header.text()


def test_the_command_writes_the_header(tmp_path: Path) -> None:
    header.main([str(tmp_path / "layout.h")])
    assert (tmp_path / "layout.h").read_bytes() == HEADER.read_bytes()


def test_the_command_takes_one_path() -> None:
    with pytest.raises(UsageError, match=r"0 paths were given\.") as caught:
        header.main([])
    assert caught.value.fix == (header.COMMAND,)


@pytest.mark.parametrize(
    ("compiler", "standard", "suffix"), [("cc", "c99", "c"), ("c++", "c++17", "cpp")]
)
def test_the_header_compiles_beside_the_abi_and_agrees_with_it(
    tmp_path: Path, compiler: str, standard: str, suffix: str
) -> None:
    found = shutil.which(compiler)
    if found is None:
        pytest.skip(f"{compiler} is not on PATH")
    source, program = tmp_path / f"user.{suffix}", tmp_path / "user"
    source.write_text(USER)
    flags = ["-Wall", "-Wextra", "-Werror", "-pedantic", f"-std={standard}", f"-I{INCLUDE}"]
    subprocess.run([found, *flags, str(source), "-o", str(program)], check=True, timeout=60)
    assert subprocess.run([program], check=False, timeout=10).returncode == 0


def test_the_names_of_the_plugins_are_those_of_the_graphs() -> None:
    assert OP_NAMES.read_text() == op_names.text(), f"{OP_NAMES} is stale; run: {op_names.COMMAND}"


def test_another_field_or_operator_makes_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    before = op_names.text()
    monkeypatch.setattr(ops, "PLUGIN_FIELDS", (*ops.PLUGIN_FIELDS, "row_order"))
    assert 'kFieldRowOrder[] = "row_order";' in op_names.text()
    assert "kFieldCount = 9" in op_names.text()
    assert op_names.text() != before


def test_the_command_writes_the_names(tmp_path: Path) -> None:
    op_names.main([str(tmp_path / "op_names.h")])
    assert (tmp_path / "op_names.h").read_bytes() == OP_NAMES.read_bytes()
    with pytest.raises(UsageError, match=r"2 paths were given\."):
        op_names.main(["a", "b"])


PLUGIN_USER = """\
#include <cstdio>
#include "mbq/mbq.h"
#include "mbq/layout.h"
#include "op_names.h"
static_assert(mbq::kW3Linear.scheme == MBQ_W3A16 && mbq::kW4A16Linear.scheme == MBQ_W4A16, "");
static_assert(mbq::kW4A8Linear.scheme == MBQ_W4A8 && !mbq::kW4A8Linear.has_zeros, "");
static_assert(4 * mbq::kW3Linear.tile_words == MBQ_W3T_TILE_BYTES, "");
static_assert(4 * mbq::kW4A8Linear.tile_words == MBQ_W4T_TILE_BYTES, "");
int main() {
    for (const auto &op : mbq::kOps) {
        if (op.layout_version != MBQ_LAYOUT_VERSION) return 1;
        std::printf("%s %d\\n", op.name, op.inputs);
    }
    for (const char *field : mbq::kFields) std::printf("%s ", field);
}
"""


def test_the_names_compile_and_agree_with_the_abi_of_the_kernels(tmp_path: Path) -> None:
    found = shutil.which("c++")
    if found is None:
        pytest.skip("c++ is not on PATH")
    source, program = tmp_path / "user.cpp", tmp_path / "user"
    source.write_text(PLUGIN_USER)
    flags = ["-Wall", "-Wextra", "-Werror", "-std=c++17", f"-I{INCLUDE}", f"-I{OP_NAMES.parent}"]
    subprocess.run([found, *flags, str(source), "-o", str(program)], check=True, timeout=60)
    printed = subprocess.run([program], check=True, timeout=10, capture_output=True, text=True)
    assert printed.stdout.splitlines() == [
        "W3Linear 4",
        "W4A16Linear 4",
        "W4A8Linear 3",
        " ".join(ops.PLUGIN_FIELDS) + " ",
    ]
