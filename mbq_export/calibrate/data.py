"""Calibration data: choose samples, look at their pictures, turn them into a model's inputs.

    manifest ──► permutation by seed ──► 128 samples + 32 held out, no picture in both ──► ModelInputs

Everything is a function of the manifest, its pictures and the seed.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from PIL import Image

from mbq_export.calibrate.manifest import Sample, read_samples
from mbq_export.calibrate.shapes import CalibrationMix, Example, calibration_samples
from mbq_export.errors import FormatError, UsageError, located
from mbq_export.families.base import ANSWER, PROMPT, VISION
from mbq_export.families.inputs import ModelInputs
from mbq_export.families.pictures import as_rgb, read_picture
from mbq_export.progress import Progress, silent
from mbq_export.reading import LINES_SHOWN, contained

logger = logging.getLogger(__name__)

BUILTIN: Final = {
    "builtin:shapes": CalibrationMix.MIXED,
    "builtin:shapes-captions": CalibrationMix.CAPTIONS,
}
MOST_BAD: Final = 1000
SMALLEST_SHARE: Final = 0.05


class Encoder(Protocol):
    """What `encode` needs of `families.inputs.Processor`."""

    def inputs(
        self,
        prompt: str,
        images: Sequence[Image.Image] = (),
        answer: str | None = None,
        *,
        earlier: Sequence[tuple[str, str]] = (),
    ) -> ModelInputs:
        """Build the inputs of one conversation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationData:
    """Chosen samples.

    Attributes:
        name: The manifest's file name, or the builtin set.
        samples: What statistics are taken from; pictures are paths or, for a builtin set, in memory.
        held_out: What results may be compared on; no picture is in both.
        sha256: Hash of everything chosen: texts and pixels, in order.
        skipped: Lines left out because a picture could not be used.
        sizes: Width and height of each picture of `samples`.
    """

    name: str
    samples: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    sha256: str
    skipped: int
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenShares:
    """Tokens per class.

    Attributes:
        vision: Rows of image features.
        prompt: Everything people and templates write before an answer.
        answer: Answers and what ends them.
    """

    vision: int
    prompt: int
    answer: int

    @property
    def shares(self) -> dict[str, float]:
        """Share of each class, adding up to 1."""
        counts = {"vision": self.vision, "prompt": self.prompt, "answer": self.answer}
        return {name: count / max(1, sum(counts.values())) for name, count in counts.items()}

    def __str__(self) -> str:
        """Say the shares in a line: ``vision 71 % · prompt 12 % · answer 17 %``."""
        return " · ".join(
            f"{name} {share:.0%}".replace("%", " %") for name, share in self.shares.items()
        )


def read_manifest(
    path: str | Path,
    *,
    samples: int = 128,
    held_out: int = 32,
    seed: int = 0,
    text_only_ok: bool = False,
    skip_bad: int = 0,
) -> CalibrationData:
    """Choose samples and check every picture of theirs by decoding it.

    Args:
        path: A JSON Lines file, or one of `BUILTIN`.
        samples: How many to calibrate on.
        held_out: How many more to keep apart.
        seed: Decides which, by ``numpy.random.default_rng(seed).permutation(n)``.
        text_only_ok: Accept data without any picture.
        skip_bad: Lines with unusable pictures to leave out.

    Raises:
        UsageError: E2001 for an unknown builtin set.
        FormatError: E4301 to E4303 for the manifest, E4304 and E4306 for pictures, E4305 for a path that
            leaves the folder, E4308 for data without pictures, E4311 for too few samples.
    """
    name = str(path)
    if name.startswith("builtin:"):
        pool = _builtin(name, samples + held_out, seed)
        order = np.arange(len(pool))
        folder = Path()
    else:
        name, folder = Path(path).name, Path(path).parent
        with located(name):
            pool = read_samples(Path(path))
        order = np.random.default_rng(seed).permutation(len(pool))
    with located(name):
        if not text_only_ok and not any(sample.images for sample in pool):
            raise _text_only()
        choice = _Choice(folder=folder, skip_bad=skip_bad)
        for index in order:
            if choice.full(samples, held_out):
                break
            choice.consider(pool[index], samples)
        choice.finish(samples, held_out)
    _warn_of_duplicates(choice.keys[:samples])
    return CalibrationData(
        name=name,
        samples=tuple(choice.chosen),
        held_out=tuple(choice.held),
        sha256=choice.digest(),
        skipped=len(choice.bad),
        sizes=tuple(choice.sizes),
    )


def pictures_of(sample: Sample) -> list[Image.Image]:
    """Decode a sample's pictures.

    Raises:
        FormatError: E4304 or E4306.
    """
    return [
        as_rgb(image) if isinstance(image, Image.Image) else read_picture(Path(image))
        for image in sample.images
    ]


def encode(
    samples: Iterable[Sample],
    processor: Encoder,
    *,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> list[ModelInputs]:
    """Turn samples into a model's inputs.

    Args:
        samples: Of `CalibrationData`.
        processor: The model's processor.
        max_tokens: Cut longer samples at the end of their answer; None cuts nothing.
        progress: Called after each sample.

    Raises:
        FormatError: E4309 for a sample without answer tokens, E4313 for one whose picture alone is too long,
            E42xx and E4307 from the processor.
    """
    todo = list(samples)
    encoded: list[ModelInputs] = []
    cut = 0
    for index, sample in enumerate(todo):
        with located(f"sample {sample.id}" + (f", line {sample.line}" if sample.line else "")):
            inputs = processor.inputs(
                sample.prompt, pictures_of(sample), sample.answer, earlier=sample.earlier
            )
            shortened = inputs if max_tokens is None else _shortened(inputs, max_tokens)
            if not (shortened.token_classes == ANSWER).any():
                raise FormatError(
                    "E4309",
                    "No answer token is left in the sample.",
                    why="sensitivities are gradients of the answer's likelihood",
                    fix=("give the sample an answer", "shorten its prompt or use smaller pictures"),
                )
        cut += shortened is not inputs
        encoded.append(shortened)
        progress(index + 1, len(todo))
    if cut:
        logger.warning(
            "MBQ-W4312: %d of %d answers were cut to %s tokens", cut, len(todo), max_tokens
        )
    return encoded


def token_shares(inputs: Sequence[ModelInputs]) -> TokenShares:
    """Count tokens per class, and warn (W4310) where one modality hardly appears."""
    classes = np.concatenate([sample.token_classes for sample in inputs])
    found = TokenShares(
        vision=int((classes == VISION).sum()),
        prompt=int((classes == PROMPT).sum()),
        answer=int((classes == ANSWER).sum()),
    )
    vision = found.shares["vision"]
    for name, share in (("vision", vision), ("text", 1 - vision)):
        if share < SMALLEST_SHARE:
            logger.warning(
                "MBQ-W4310: %s tokens are %.1f %% of the calibration data (%s); scales will hardly see them: "
                "mix the samples as the deployment does",
                name,
                100 * share,
                found,
            )
    return found


def _builtin(name: str, count: int, seed: int) -> list[Sample]:
    """Generate a builtin set.

    Raises:
        UsageError: E2001.
    """
    if name not in BUILTIN:
        raise UsageError(
            "E2001",
            f"Unknown data set {name[:80]!a}.",
            why=f"known: {', '.join(BUILTIN)}",
            fix="--data builtin:shapes",
        )
    return generated_samples(calibration_samples(count, seed=seed, mix=BUILTIN[name]))


def generated_samples(examples: Iterable[Example]) -> list[Sample]:
    """Turn generated questions into samples; their pictures stay in memory."""
    return [
        Sample(
            id=example.id,
            images=(Image.fromarray(example.image),),
            prompt=example.prompt,
            answer=example.answer,
        )
        for example in examples
    ]


class _Choice:
    """Samples as they are chosen, one after the other."""

    def __init__(self, *, folder: Path, skip_bad: int) -> None:
        self.chosen: list[Sample] = []
        self.held: list[Sample] = []
        self.bad: list[FormatError] = []
        self.keys: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self._seen: set[str] = set()
        self._folder = folder
        self._skip_bad = skip_bad

    def full(self, samples: int, held_out: int) -> bool:
        """Say whether there are enough, or more bad lines than are worth reading on for."""
        enough = len(self.chosen) == samples and len(self.held) == held_out
        return enough or len(self.bad) >= self._skip_bad + LINES_SHOWN or len(self.bad) > MOST_BAD

    def consider(self, sample: Sample, samples: int) -> None:
        """Choose a sample, hold it out, or pass it by.

        Raises:
            FormatError: E4305 for a picture outside the folder.
        """
        try:
            with located(f"line {sample.line}"):
                found = replace(
                    sample, images=tuple(self._inside(image) for image in sample.images)
                )
                pictures = pictures_of(found)
        except FormatError as error:
            if error.code == "E4305":
                raise
            self.bad.append(error)
            return
        hashes = {_pixels(picture) for picture in pictures} or {f"text {sample.prompt}"}
        if len(self.chosen) < samples:
            self.chosen.append(found)
            self.sizes += [picture.size for picture in pictures]
            self._seen |= hashes
        elif not hashes & self._seen:
            self.held.append(found)
        else:
            return
        texts = [list(turn) for turn in (*sample.earlier, (sample.prompt, sample.answer))]
        self.keys.append(json.dumps([texts, [_pixels(picture) for picture in pictures]]))

    def finish(self, samples: int, held_out: int) -> None:
        """Check that what was asked for was found.

        Raises:
            FormatError: E4304 or E4306 for more unusable pictures than may be skipped, E4311 for too few
                samples.
        """
        if len(self.bad) > self._skip_bad:
            listed = "; ".join(
                f"{error.where[0]}: {error.message}" for error in self.bad[:LINES_SHOWN]
            )
            raise FormatError(
                self.bad[0].code,
                f"{'1 sample has' if len(self.bad) == 1 else f'{len(self.bad)} samples have'} pictures that "
                f"cannot be used: {listed}",
                why=self.bad[0].why,
                fix=("mend or remove the lines", f"--skip-bad {len(self.bad)}"),
            )
        found = len(self.chosen) + len(self.held)
        if found < samples + held_out:
            raise FormatError(
                "E4311",
                f"There are {found} usable samples, {samples} + {held_out} held out were asked for.",
                why="samples are never used twice, and no picture is both used and held out",
                fix=(f"--samples {max(1, found - held_out)}", "add lines to the data"),
            )

    def digest(self) -> str:
        """Hash what was chosen."""
        digest = hashlib.sha256(f"{len(self.chosen)} {len(self.held)}\n".encode())
        for key in self.keys:
            digest.update(key.encode() + b"\n")
        return digest.hexdigest()

    def _inside(self, image: "str | Path | Image.Image") -> "Path | Image.Image":
        if isinstance(image, Image.Image):
            return image
        return contained(self._folder, str(image), code="E4305", missing="E4304")


def _pixels(picture: Image.Image) -> str:
    """Hash what is seen, whatever the file it comes from."""
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


def _shortened(inputs: ModelInputs, most: int) -> ModelInputs:
    """Cut the end of a sample that is too long.

    Raises:
        FormatError: E4313 if an image block would be cut.
    """
    length = len(inputs.input_ids)
    if length <= most:
        return inputs
    if (inputs.token_classes[most:] == VISION).any():
        raise FormatError(
            "E4313",
            f"The sample has {length} tokens, and its pictures alone do not fit into {most}.",
            why="a picture is never cut",
            fix=("use smaller pictures", "give the sample fewer pictures"),
        )
    return replace(
        inputs, input_ids=inputs.input_ids[:most], token_classes=inputs.token_classes[:most]
    )


def _warn_of_duplicates(keys: Sequence[str]) -> None:
    duplicates = len(keys) - len(set(keys))
    if duplicates:
        logger.warning(
            "MBQ-W4311: %d of %d calibration samples are duplicates (%.0f %%)",
            duplicates,
            len(keys),
            100 * duplicates / len(keys),
        )


def _text_only() -> FormatError:
    return FormatError(
        "E4308",
        "The calibration data has no picture.",
        why="without image tokens the ratio of text to image gradients is undefined, and text-only data has "
        "cost other users of low-bit models most of their accuracy",
        fix=(
            "add samples with pictures",
            "--text-only-ok quantizes for text alone",
        ),
    )
