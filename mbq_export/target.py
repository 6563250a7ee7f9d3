"""Where a bundle will run: the device's compute capability and the flavour of runtime that serves it."""

import difflib
from dataclasses import dataclass
from typing import Final, Self

from mbq_export.errors import UsageError

AUTO: Final = "auto"

DEVICES: Final[dict[str, int]] = {
    "orin": 87,
    "rtx4090": 89,
    "h100": 90,
    "thor": 110,
    **{f"sm{sm}": sm for sm in (75, 80, 86, 87, 89, 90, 110, 120, 121)},
}
"""Compute capability of every name; one digit of minor version, as in ``sm89``."""

SERVED: Final[dict[str, frozenset[int]]] = {
    "trt": frozenset(DEVICES.values()),
    "rtx": frozenset({75, 80, 86, 89, 120, 121}),
}
"""Devices each flavour can build for. TensorRT for RTX has no sm87, sm90, sm110."""

OP_LEVELS: Final[dict[str, tuple[tuple[tuple[int, int], int], ...]]] = {
    "rtx": (((1, 7), 2),),
    "trt": (((10, 3), 0), ((10, 14), 1), ((10, 15), 2)),
}
"""First version of each flavour that reads an op level: 0 primitives, 1 Attention-23, 2 rotary, norm and
cache-update ops."""

GRAPHS: Final = {
    0: "graphs of primitives (opset20), cache that grows",
    1: "graphs with Attention (opset23-attention), cache that grows",
    2: "graphs of opset24, cache updated in place",
}
"""What a target of each op level gets, in words; the levels themselves are in `export.profile`."""

VERSIONS: Final[dict[str, tuple[int, int]]] = {"rtx": (1, 7), "trt": (10, 13)}
JETPACK_6: Final = (10, 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One device and flavour.

    Attributes:
        name: As the user wrote it, without the flavour: ``rtx4090``.
        sm: Compute capability, 89 for ``sm89``; None for ``cpu``.
        flavour: ``trt`` (full TensorRT), ``rtx`` (TensorRT for RTX) or ``cpu``.
        version: Oldest version of the flavour to write graphs for.
    """

    name: str
    sm: int | None
    flavour: str
    version: tuple[int, int] = (0, 0)

    @classmethod
    def parse(cls, text: str, *, local_sm: int | None = None) -> Self:
        """Read ``NAME``, ``NAME:trt`` or ``NAME:rtx``.

        Args:
            text: For example ``rtx4090:rtx``. Without a flavour a device means full TensorRT.
            local_sm: Compute capability of this machine's GPU (`native.local_gpu`), which ``auto`` becomes;
                None turns ``auto`` into ``cpu``.

        Raises:
            UsageError: E2001 for an unknown name or flavour, E2012 if the flavour cannot serve the device.
        """
        name, colon, flavour = text.partition(":")
        if name == AUTO:
            name = "cpu" if local_sm is None else f"sm{local_sm}"
            if name == "cpu":
                colon = flavour = ""
        if name == "cpu" and not colon:
            return cls(name=name, sm=None, flavour="cpu")
        flavour = flavour if colon else "trt"
        sm = _sm_of(name, text)
        _check_flavour(flavour, sm, name)
        version = JETPACK_6 if (flavour, sm) == ("trt", 87) else VERSIONS[flavour]
        return cls(name=name, sm=sm, flavour=flavour, version=version)

    @property
    def op_level(self) -> int:
        """Highest op level a graph for this target may use; -1 for ``cpu``, which has no such limit."""
        levels = [
            level for first, level in OP_LEVELS.get(self.flavour, ()) if first <= self.version
        ]
        return max(levels, default=-1)

    @property
    def folder(self) -> str:
        """Name of this device's folder in a bundle: ``sm89``."""
        return "cpu" if self.sm is None else f"sm{self.sm}"

    def __str__(self) -> str:
        """Write it as `parse` reads it."""
        return self.name if self.sm is None else f"{self.name}:{self.flavour}"


def _sm_of(name: str, text: str) -> int:
    """Compute capability of a device name."""
    if name in DEVICES:
        return DEVICES[name]
    known = ("cpu", AUTO, *DEVICES)
    near = difflib.get_close_matches(name, known, n=1)
    raise UsageError(
        "E2001",
        f"Unknown target {text!r}.",
        why=f"known: {', '.join(known)}; each device may be followed by :trt or :rtx",
        fix=f"--target {near[0]}" if near else "use one of the known names",
    )


def _check_flavour(flavour: str, sm: int, name: str) -> None:
    """Refuse a flavour that is unknown or does not serve the device."""
    if flavour not in SERVED:
        raise UsageError(
            "E2001",
            f"Unknown flavour {flavour!r} in target {name}:{flavour}.",
            why=f"known: {', '.join(SERVED)}",
            fix=f"--target {name}:rtx",
        )
    if sm not in SERVED[flavour]:
        able = [other for other in SERVED if sm in SERVED[other]]
        raise UsageError(
            "E2012",
            f"{flavour} cannot build engines for {name} (sm{sm}).",
            why=f"{flavour} serves {', '.join(f'sm{each}' for each in sorted(SERVED[flavour]))}",
            fix=tuple(f"--target {name}:{other}" for other in able),
        )
