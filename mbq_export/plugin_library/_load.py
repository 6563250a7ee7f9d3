"""The child that loads a plugin library and lists what it offers: ``python -I _load.py LIBRARY RESULT``.

It imports nothing of this project, so that whatever a library does happens to it alone. Creators are C++ objects: an
address of a table of functions (Itanium C++ ABI, 2.5), in the order of TensorRT's version-1 interfaces:

    0 getAPILanguage   1 getInterfaceInfo   2, 3 destructors   4 createPlugin   5 getFieldNames
    6 getPluginName    7 getPluginVersion   8 getPluginNamespace
"""

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any, Final

EXPORTS: Final = ("getCreators", "setLoggerFinder")
KIND: Final = "PLUGIN CREATOR_V3ONE"
INTERFACE_INFO: Final = 1
NAME, VERSION, NAMESPACE = 6, 7, 8
MOST_CREATORS: Final = 64


class InterfaceInfo(ctypes.Structure):
    """``nvinfer1::InterfaceInfo``."""

    _fields_ = (("kind", ctypes.c_char_p), ("major", ctypes.c_int32), ("minor", ctypes.c_int32))


def offered(path: str) -> dict[str, Any]:
    """Load a library and ask its creators for their names.

    Returns:
        ``creators``: name, version and namespace of each; or ``refused``: why it cannot be loaded; or ``wrong``: why
        what it offers is not what registries take.
    """
    try:
        library = ctypes.CDLL(path, mode=os.RTLD_NOW | os.RTLD_LOCAL)
        get, set_finder = (library[name] for name in EXPORTS)
    except (OSError, AttributeError) as error:
        return {"refused": str(error)}
    set_finder.argtypes, set_finder.restype = [ctypes.c_void_p], None
    set_finder(None)
    count = ctypes.c_int32(0)
    get.argtypes, get.restype = [ctypes.c_void_p], ctypes.POINTER(ctypes.c_void_p)
    creators = get(ctypes.byref(count))
    if not creators or not 0 < count.value <= MOST_CREATORS:
        return {"wrong": f"getCreators returned {count.value} creators at {bool(creators)}"}
    found = []
    for address in creators[: count.value]:
        kind = _call(address, INTERFACE_INFO, InterfaceInfo).kind
        if kind != KIND.encode():
            return {"wrong": f"a creator is a {kind!r}, wanted {KIND}"}
        names = (_call(address, slot, ctypes.c_char_p) for slot in (NAME, VERSION, NAMESPACE))
        found.append([name.decode(errors="replace") for name in names])
    return {"creators": found}


def _call(address: int, slot: int, result: Any) -> Any:
    table = ctypes.cast(address, ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p)))[0]
    return ctypes.CFUNCTYPE(result, ctypes.c_void_p)(table[slot] or 0)(address)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(offered(sys.argv[1])), encoding="utf-8")
    os._exit(0)  # what a library does at the end of a process is not asked for
