"""Token ids to rows of the stored table, in both dtypes."""

from pathlib import Path

import numpy as np
import pytest

from mbq_export.backends.ort import open_graph
from mbq_export.export.embed import embed_graph
from mbq_export.export.profile import OPSET23
from mbq_export.export.save import save_graph
from tests.export import decoders


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_every_id_gives_its_row(dtype: str, tmp_path: Path) -> None:
    checkpoint = decoders.checkpoint()
    table = checkpoint.tensor("model.language_model.embed_tokens.weight")
    model = embed_graph(checkpoint, family=decoders.FAMILY, dtype=dtype, profile=OPSET23)
    save_graph(model, tmp_path / "g.onnx")
    ids = np.arange(len(table)).reshape(2, -1)
    with open_graph(tmp_path / "g.onnx", threads=1) as engine:
        found = engine.run({"input_ids": ids})["inputs_embeds"]
    assert found.dtype == {"fp32": np.float32, "fp16": np.float16}[dtype]
    np.testing.assert_array_equal(found, table[ids].astype(found.dtype))
