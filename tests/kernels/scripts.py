"""Load a script that lies beside the packages: `kernels/` is no package and must not look like one."""

import importlib.util
import sys
from types import ModuleType

from tests.kernels.emulated import ROOT


def script(name: str) -> ModuleType:
    """The module of ``kernels/<name>.py``."""
    spec = importlib.util.spec_from_file_location(
        f"kernels_{name}", ROOT / "kernels" / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
