"""Type of the activations of engines: fp16, or bf16 where a model leaves what fp16 holds.

    --engine-dtype fp16 | bf16       as asked
    --engine-dtype auto              one calibration sample in fp32 ──► largest activation ──► fp16 up to 3e4, else bf16

A network for TensorRT is strongly typed: the graph decides, and nothing decides again later.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

from mbq_export.blocks.largest import Largest, largest_activation
from mbq_export.calibrate.data import encode, read_manifest
from mbq_export.errors import UsageError
from mbq_export.export.lowerings import LOWERINGS
from mbq_export.families.base import LoadedModel
from mbq_export.pipeline.engine_options import AUTO, BF16, FP16
from mbq_export.pipeline.plan import Plan
from mbq_export.pipeline.request import DEFAULT_DATA
from mbq_export.reading import read_json
from mbq_export.schemes.base import QuantScheme
from mbq_export.writing import json_bytes, write_file

RECORD: Final = "activations.json"
SCHEMA: Final = 1

LARGEST_FP16_ACTIVATION: Final = 3e4
"""fp16 ends at 65504; one sample does not show the largest of all, so half of that is left to the others."""
END_OF_FP32: Final = 3.4e38
"""JSON has no infinity."""
DIGITS: Final = 3
"""Of the largest activation as it is recorded: its last bits differ between machines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineDtype:
    """The type that was chosen.

    Attributes:
        name: ``fp16`` or ``bf16``.
        asked: What was asked for.
        largest: Largest activation that was measured, 3 digits; None if nobody looked.
        place: Where it was.
    """

    name: str = FP16
    asked: str = AUTO
    largest: float | None = None
    place: str = ""

    @property
    def reason(self) -> str:
        """Why, in words; empty for the default that nobody measured."""
        if self.asked != AUTO:
            return f"--engine-dtype {self.asked}"
        if self.largest is None:
            return ""
        return (
            f"activations reach {self.largest:g} at {self.place}; fp16 is used up to "
            f"{LARGEST_FP16_ACTIVATION:g}"
        )

    def facts(self) -> dict[str, str]:
        """What a manifest says of it."""
        return {"name": self.name, "why": self.reason}

    def write(self, folder: Path) -> None:
        """Write it beside the channel scales."""
        write_file(folder / RECORD, json_bytes({**asdict(self), "schema": SCHEMA}))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Undo `write`; the default where a folder has none, as those of ``calibrate``.

        Raises:
            FormatError: E4314 if the file is malformed.
        """
        path = folder / RECORD
        found = read_json(path, code="E4314") if path.is_file() else {}
        return cls(**{name: found[name] for name in cls.__dataclass_fields__ if name in found})


def chosen_dtype(plan: Plan, model: LoadedModel) -> EngineDtype:
    """Choose the type of the engines that a plan has.

    Args:
        plan: What was asked for, and the data.
        model: In fp32; asked only if it decides.

    Raises:
        UsageError: E2002 if activations need bf16 and the lowering has no form in it.
    """
    asked = plan.request.engines.dtype
    # A model of codes has blocks that cannot be run; its plan has a scheme and no data.
    unseen = plan.scheme is not None and plan.data is None
    if plan.lowering is None or asked != AUTO or unseen:
        return EngineDtype(name=FP16 if asked == AUTO else asked, asked=asked)
    return of_largest(_measured(plan, model), lowering=plan.lowering, scheme=plan.scheme)


def known_dtype(plan: Plan, folder: Path) -> EngineDtype:
    """What was asked for, else what a calibration recorded in its folder."""
    asked = plan.request.engines.dtype
    return EngineDtype.read(folder) if asked == AUTO else EngineDtype(name=asked, asked=asked)


def of_largest(largest: Largest, *, lowering: str, scheme: QuantScheme | None) -> EngineDtype:
    """Choose by the largest activation.

    Raises:
        UsageError: E2002 if it needs bf16 and the lowering has no form in it.
    """
    size = float(f"{min(largest.size, END_OF_FP32):.{DIGITS}g}")
    if largest.size <= LARGEST_FP16_ACTIVATION:
        return EngineDtype(name=FP16, largest=size, place=largest.place)
    reason = LOWERINGS[lowering].misfit(scheme, "trt", BF16)
    if reason is not None:
        raise UsageError(
            "E2002",
            f"Activations reach {size:g} at {largest.place}: engines need bf16, which --lowering {lowering} cannot give.",
            why=f"fp16 ends at 65504, and one sample does not show the largest of all; {reason}",
            fix=("--lowering plugin", f"--engine-dtype {FP16} takes the risk"),
        )
    return EngineDtype(name=BF16, largest=size, place=largest.place)


def _measured(plan: Plan, model: LoadedModel) -> Largest:
    """The largest activation on a sample with a picture, if there is one."""
    data = plan.data or read_manifest(DEFAULT_DATA, samples=1, seed=plan.request.seed)
    sample = next((each for each in data.samples if each.images), data.samples[0])
    (inputs,) = encode([sample], model.processor, max_tokens=plan.text.max_positions)
    return largest_activation(model, inputs)
