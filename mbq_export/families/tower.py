"""Where a vision tower can be rounded to 8 bits, and where its modules are in what a family calls the tower."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from mbq_export.families.base import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerPlace:
    """Linears of a tower that read one value, and what makes it.

    Attributes:
        source: Module path of the norm or linear whose output channels a scale divides without changing the function;
            None where none commutes.
        into: Module paths of the linears.
    """

    source: str | None
    into: tuple[str, ...]


def siglip_places(*layers: str) -> tuple[TowerPlace, ...]:
    """Places of encoder layers, given by module path, as SigLIP and CLIP have them: two norms, as many value heads as query heads.

    The non-linear function between the two linears of the MLP lets no scale pass.
    """
    return tuple(place for layer in layers for place in _places(layer))


def _places(layer: str) -> tuple[TowerPlace, ...]:
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    return (
        TowerPlace(
            source=f"{layer}.layer_norm1",
            into=(f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
        ),
        TowerPlace(source=f"{attention}.v_proj", into=(f"{attention}.out_proj",)),
        TowerPlace(source=f"{layer}.layer_norm2", into=(f"{mlp}.fc1",)),
        TowerPlace(source=None, into=(f"{mlp}.fc2",)),
    )


def scopes_of(model: "LoadedModel", tower: "nn.Module") -> Mapping[str, str]:
    """Path inside a tower by module path of the model.

    Args:
        model: Loaded.
        tower: What ``family.vision_module`` made of it: its parts are the model's own modules.
    """
    paths = {id(module): path for path, module in model.module.named_modules()}
    return {
        paths[id(module)]: scope for scope, module in tower.named_modules() if id(module) in paths
    }
