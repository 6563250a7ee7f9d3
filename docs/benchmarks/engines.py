"""Make engines.json and engines.md beside this file: run ``python -m docs.benchmarks.engines --plugin-lib FILE``.

Builds the decoder of a random model with the sizes of Qwen2-0.5B for an RTX 4090, without one: W3 through the plugins, and
in fp16. Wall time and memory are those of the child that parses and builds.
"""

import argparse
import json
import os
import platform
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from mbq_export.backends import rtx
from mbq_export.backends.base import EngineRequest
from mbq_export.channel_scales import ChannelScales, Switches
from mbq_export.export import GraphForm, export
from mbq_export.export.record import GraphRecord
from mbq_export.families import FAMILIES
from mbq_export.families.base import LoadedModel
from mbq_export.pipeline.engine_options import EngineOptions
from mbq_export.pipeline.engines import engine_graph
from mbq_export.plugin_library import find_plugin_library
from mbq_export.progress import silent
from mbq_export.quantize import quantize
from mbq_export.schemes import SCHEMES
from mbq_export.target import Target

HERE: Final = Path(__file__).parent
SAMPLE: Final = HERE.parents[1] / "samples" / "tiny_vlm" / "weights"
PROCESSOR: Final = (
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
TARGET: Final = "rtx4090:rtx"
CONTEXT: Final = 1024
SIZES: Final = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}
PAGE: Final = """\
# Building a decoder of {layers} layers without a GPU

Made by `python -m docs.benchmarks.engines`. A random decoder of Qwen2-0.5B's sizes (hidden 896, 14 query and 2 key/value
heads, MLP 4864, vocabulary 151936), context {context}, one profile of 1 to 512 tokens, target {target}, {library}.
Wall time and peak memory are those of the process that parses and builds; the head stays in fp16 in both. Measured on
{cpus} cores with a load of {load:.1f} from other work, so times are upper bounds. Nothing here was run on a GPU.

| decoder | wall | peak memory | plan | layers | plugins |
|---|---|---|---|---|---|
{rows}
"""


def random_model(folder: Path, layers: int) -> LoadedModel:
    """Write a model of these sizes with random weights, its vision tower the sample's, and load it."""
    config: dict[str, Any] = json.loads((SAMPLE / "config.json").read_text())
    for key in ("architectures", "model_type", "transformers_version", "dtype"):
        config.pop(key)
    config["tie_word_embeddings"] = True
    config["text_config"] |= SIZES | {
        "layer_types": ["full_attention"] * layers,
        "num_hidden_layers": layers,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    }
    config["text_config"].pop("head_dim", None)
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**config))
    model.to(torch.float16).save_pretrained(folder)
    for name in PROCESSOR:
        if (SAMPLE / name).is_file():
            shutil.copyfile(SAMPLE / name, folder / name)
    return FAMILIES["llava_onevision"].load(folder)


def decoder_graph(model: LoadedModel, work: Path, scheme: str | None) -> GraphRecord:
    """Round (or keep) the weights and write the decoder for TensorRT into ``work/onnx``."""
    plain = ChannelScales(
        scales={}, sensitivity={}, calib={"switches": Switches(method="rtn").resolved()}
    )
    checkpoint = quantize(
        model,
        plain,
        scheme=None if scheme is None else SCHEMES[scheme],
        group_size=128,
        out=work / "weights",
    )
    form = GraphForm(
        lowering="qdq" if scheme is None else "plugin",
        target="trt",
        dtype="fp16",
        kv="static",
        logits="last",
        max_context=CONTEXT,
    )
    record = export(checkpoint, work / "onnx", family=FAMILIES["llava_onevision"], forms=(form,))
    return record.graph(form.file_name)


def measured(graph: GraphRecord, work: Path, plugin_lib: Path | None) -> dict[str, Any]:
    """Build the engine of a graph and say what it took."""
    library = find_plugin_library(named=plugin_lib, sms=(89,)) if graph.plugin_layers else None
    sizes = EngineOptions().decoder_sizes(CONTEXT)
    request = EngineRequest(
        graphs=(engine_graph("decoder", graph, work / "onnx", sizes),),
        target=Target.parse(TARGET),
        out=work / "engine",
        plugins=library,
    )
    record = rtx.build(request, silent)
    engine = record.engines["decoder"]
    return {
        "seconds": round(engine.seconds, 1),
        "peak_rss_mib": engine.peak_rss_bytes >> 20,
        "plan_mib": round(engine.size / 2**20, 1),
        "plan_sha256": engine.sha256,
        "layers": engine.layers,
        "plugins": sum(engine.plugin_layers.values()),
        "planned": sum(map(len, graph.plugin_layers.values())),
        "failed_checks": [check.name for check in record.failed],
    }


def page(document: dict[str, Any]) -> str:
    """The page of engines.json."""
    rows = "\n".join(
        f"| {name} | {each['seconds']} s | {each['peak_rss_mib']} MiB | {each['plan_mib']} MiB | {each['layers']} | "
        f"{each['plugins']} of {each['planned']} |"
        for name, each in document["engines"].items()
    )
    return PAGE.format(**document, rows=rows)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plugin-lib", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("-o", "--out", type=Path, default=HERE)
    options = parser.parse_args()
    engines = {}
    with TemporaryDirectory() as root:
        model = random_model(Path(root) / "model", options.layers)
        for name, scheme in (("W3, plugins", "w3a16"), ("fp16", None)):
            work = Path(root) / (scheme or "fp16")
            work.mkdir()
            graph = decoder_graph(model, work, scheme)
            engines[name] = measured(graph, work, options.plugin_lib)
            shutil.rmtree(work)
    document = {
        "layers": options.layers,
        "context": CONTEXT,
        "target": TARGET,
        "library": rtx.available().found,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "load": round(os.getloadavg()[0], 1),
        "engines": engines,
    }
    (options.out / "engines.json").write_text(json.dumps(document, indent=1) + "\n")
    (options.out / "engines.md").write_text(page(document))


if __name__ == "__main__":
    main()
