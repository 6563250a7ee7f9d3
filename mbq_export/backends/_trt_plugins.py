"""Plugins in the child: the library is loaded before the graph is read, and every plugin is counted after it.

A wrong namespace or a missing attribute makes the parser take a function body instead of a plugin, and says nothing:
the engine would be right and slow. So the exporter's list of plugin nodes is compared with what the parser made.
"""

from collections.abc import Mapping
from typing import Any, Final

from mbq_export.backends._trt_job import Job, Refused

NAMESPACE: Final = "mbq"
VERSION: Final = "1"
LAYER_TYPE: Final = "PLUGIN_V3"
SHOWN: Final = 3


def load_plugins(registry: Any, job: Job) -> None:
    """Load the library of a job, if it has one, and look its creators up.

    Raises:
        Refused: ``plugin-load`` if the registry does not take it, ``plugin-creator`` if it lacks an operator.
    """
    if not job.plugins:
        return
    if registry.load_library(job.plugins) is None:
        raise Refused("plugin-load", "TensorRT does not load the plugin library.")
    found = {
        (each.plugin_namespace, each.plugin_version, each.name) for each in registry.all_creators
    }
    lacking = [op for op in job.plugin_layers if (NAMESPACE, VERSION, op) not in found]
    if lacking:
        known = ", ".join("::".join(each) for each in sorted(found)) or "none"
        raise Refused(
            "plugin-creator",
            f"The plugin library has no creator of {', '.join(lacking)}.",
            (f"creators registered: {known}",),
        )


def count_plugins(network: Any, planned: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """Count the plugin layers of a parsed network by operator.

    Args:
        network: What the parser made.
        planned: Node names by operator, as the exporter wrote them.

    Raises:
        Refused: ``plugin-count`` if a planned node is no plugin layer, or a plugin layer was not planned.
    """
    layers = (network.get_layer(index) for index in range(network.num_layers))
    found = {layer.name for layer in layers if str(layer.type).endswith(LAYER_TYPE)}
    wanted = {name for names in planned.values() for name in names}
    lost, extra = sorted(wanted - found), sorted(found - wanted)
    if lost or extra:
        raise Refused(
            "plugin-count",
            f"The network has {len(found & wanted)} of {len(wanted)} planned plugin layers.",
            (
                f"no plugin: {_some(lost)}",
                *([f"not planned: {_some(extra)}"] if extra else []),
            ),
        )
    return {op: len(names) for op, names in planned.items()}


def _some(names: list[str]) -> str:
    more = f", .. ({len(names)} in all)" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "none") + more
