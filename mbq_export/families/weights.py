"""The weight files of a model folder, checked before anybody loads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import torch

    from mbq_export.reading import TensorEntry


class SourceWeights:
    """Tensors of a model folder by module path, read one at a time."""

    @property
    def names(self) -> tuple[str, ...]:
        """Module paths of all tensors, sorted."""
        raise NotImplementedError

    def entry(self, name: str) -> TensorEntry:
        """Dtype and shape of a tensor."""
        raise NotImplementedError

    def read(self, name: str, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read one tensor, cast to `dtype` (default: as stored)."""
        raise NotImplementedError

    def under(self, prefix: str) -> Iterable[str]:
        """Module paths that start with ``prefix.``."""
        raise NotImplementedError

    def sha256(self, folder: Path) -> str:
        """Hash of all weight files, for fingerprints."""
        raise NotImplementedError
