"""Text and pictures to the tensors a model takes, without torchvision.

The model's own chat template, tokenizer and picture settings are used as they lie in its folder; the
only thing done here is to expand each picture's placeholder to as many tokens as it has feature rows.
What people write is never read as a special token, so a prompt cannot forge a turn or an image row.
"""

import bisect
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mbq_export.errors import FormatError
from mbq_export.families.base import Config, ModelFamily, VisionShape
from mbq_export.families.chat import Piece, Skeleton, skeleton
from mbq_export.families.locate import read_config
from mbq_export.families.pictures import as_rgb, check_size
from mbq_export.families.processor_files import (
    read_eos_ids,
    read_image_token_id,
    read_picture_processor,
    read_template,
    read_tokenizer,
)

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """One sample, ready for a model.

    Attributes:
        input_ids: (T,), image tokens expanded; with an answer, its end-of-turn token is the last.
        pixel_values: (tiles, 3, h, w) float32, the tiles of all pictures one after the other;
            (0, 3, h, w) without pictures.
        image_sizes: (I, 2), height and width of each picture before any resizing.
        tiles_per_image: (I,).
        token_classes: (T,), constants of `families.base`.
    """

    input_ids: NDArray[np.int64]
    pixel_values: NDArray[np.float32]
    image_sizes: NDArray[np.int64]
    tiles_per_image: NDArray[np.int64]
    token_classes: NDArray[np.int8]

    def tensors(self) -> "dict[str, torch.Tensor]":
        """Arguments of the transformers model, as a batch of one."""
        import torch

        arguments = {"input_ids": torch.from_numpy(self.input_ids)[None]}
        if len(self.image_sizes):
            arguments["pixel_values"] = torch.from_numpy(self.pixel_values)
            arguments["image_sizes"] = torch.from_numpy(self.image_sizes)
            arguments["batch_num_images"] = torch.tensor([len(self.image_sizes)])
        return arguments


@dataclass(frozen=True, kw_only=True)
class Processor:
    """Tokenizer, picture processor and chat template of one model folder.

    Attributes:
        family: Whose hooks count feature rows and classify tokens.
        config: The model's config.
        shape: Tile sizes.
        tokenizer: The model's tokenizer.
        pictures: The model's picture processor.
        template: The processor's chat template; the tokenizer's own if None.
        image_token_id: Id of the token that stands for one row of image features.
        eos_ids: Tokens that end a turn.
    """

    family: ModelFamily
    config: Config
    shape: VisionShape
    tokenizer: "PreTrainedTokenizerBase"
    pictures: "BaseImageProcessor"
    template: str | None
    image_token_id: int
    eos_ids: frozenset[int]

    @classmethod
    def from_folder(cls, folder: Path, family: ModelFamily) -> "Processor":
        """Read config.json, tokenizer, chat template and picture settings.

        Raises:
            FormatError: E4201 for the tokenizer, E4202 for its image token, E4203 for picture settings of
                another model, E4205 for the chat template, E40xx for the config.
        """
        config = read_config(folder)
        shape = family.vision_shape(config)
        tokenizer = read_tokenizer(folder, vocab=family.text_shape(config).vocab)
        return cls(
            family=family,
            config=config,
            shape=shape,
            tokenizer=tokenizer,
            pictures=read_picture_processor(folder, config, shape),
            template=read_template(folder, tokenizer),
            image_token_id=read_image_token_id(folder, config, tokenizer),
            eos_ids=read_eos_ids(folder, config, tokenizer),
        )

    def inputs(
        self,
        prompt: str,
        images: "Sequence[Image]" = (),
        answer: str | None = None,
        *,
        earlier: Sequence[tuple[str, str]] = (),
    ) -> ModelInputs:
        """Build the inputs of one conversation.

        Args:
            prompt: The user's last text.
            images: Pictures of any mode; they stand before the text of the first prompt.
            answer: Teacher-forced answer; None ends with the generation prompt.
            earlier: Prompts and answers before; their answers count as answers too.

        Raises:
            FormatError: E4204 if placeholders and pictures differ in number, E4306 for a picture that is
                too large, E4307 for one too thin to be laid out in tiles.
        """
        form = self._skeleton(len(images), len(earlier))
        pieces = form.fill(earlier, prompt)
        ids, is_answer = self._encode(pieces, start=True)
        if answer is not None:
            ending = [
                Piece(text=form.lead, origin="template"),
                Piece(text=answer, origin="answer"),
                Piece(text=form.ending, origin="template"),
            ]
            last, _ = self._encode(ending, start=False)
            last = self._ended(last)
            ids, is_answer = ids + last, is_answer + [True] * len(last)
        pixels, sizes, tiles = self._tiles(images)
        rows = [self.rows(size, count) for size, count in zip(sizes, tiles, strict=True)]
        input_ids, answers = self._expanded(ids, is_answer, rows)
        return ModelInputs(
            input_ids=input_ids,
            pixel_values=pixels,
            image_sizes=sizes,
            tiles_per_image=tiles,
            token_classes=self.family.token_masks(input_ids, answer=answers, config=self.config),
        )

    def rows(self, size: Sequence[int], tiles: int) -> int:
        """Count the feature rows of one picture: the length of what `merge_images` makes of it.

        Args:
            size: Height and width in pixels.
            tiles: Tiles the picture was cut into.

        Raises:
            FormatError: E4307 for a picture too thin to be laid out in tiles.
        """
        merged = self.family.merge_images(
            np.empty((tiles, self.shape.tokens_per_tile, 0), np.float32),
            image_sizes=np.array([size], np.int64),
            tiles_per_image=np.array([tiles], np.int64),
            newline=np.empty(0, np.float32),
            config=self.config,
        )
        return int(merged.shape[0])

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens left out."""
        return str(self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    @functools.cached_property
    def _special(self) -> tuple[str, ...]:
        return tuple(self.tokenizer.get_added_vocab())

    @functools.cached_property
    def _skeleton(self) -> Callable[[int, int], Skeleton]:
        return functools.cache(
            lambda images, turns: skeleton(
                self.tokenizer, self.template, images=images, turns=turns
            )
        )

    def _encode(self, pieces: Sequence[Piece], *, start: bool) -> tuple[list[int], list[bool]]:
        """Tokenize pieces; tell for each token whether it belongs to an answer.

        Joined as one text, as training did, unless a person wrote the name of a special token: then piece
        by piece, that person's words as plain text.
        """
        written = [piece.text for piece in pieces if piece.origin != "template"]
        if not any(token in text for text in written for token in self._special):
            return self._encode_joined(pieces, start=start)
        ids: list[int] = []
        answers: list[bool] = []
        for piece in pieces:
            found = self._plain(piece.text) if piece.origin != "template" else self._ids(piece.text)
            ids += found
            answers += [piece.origin == "answer"] * len(found)
        return ids, self._with_turn_ends(ids, answers)

    def _encode_joined(
        self, pieces: Sequence[Piece], *, start: bool
    ) -> tuple[list[int], list[bool]]:
        text = "".join(piece.text for piece in pieces)
        bos = self.tokenizer.bos_token
        encoded = self.tokenizer(
            text,
            # As transformers' processors do: the template may have written the first token itself.
            add_special_tokens=start and not (bos is not None and text.startswith(bos)),
            return_offsets_mapping=True,
        )
        ends = list(itertools.accumulate(len(piece.text) for piece in pieces))
        answers = [
            begin < end
            and any(
                piece.origin == "answer"
                for piece in pieces[
                    bisect.bisect_right(ends, begin) : bisect.bisect_left(ends, end) + 1
                ]
            )
            for begin, end in encoded["offset_mapping"]
        ]
        ids = [int(i) for i in encoded["input_ids"]]
        return ids, self._with_turn_ends(ids, answers)

    def _ids(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def _plain(self, text: str) -> list[int]:
        """Tokenize a person's words without looking for special tokens in them.

        Raises:
            FormatError: E4204 if the tokenizer finds one all the same.
        """
        found = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        forged = sorted(special.intersection(found))
        if forged:
            raise FormatError(
                "E4204",
                f"The text holds the special token {self.tokenizer.convert_ids_to_tokens(forged[0])!r}.",
                why="this tokenizer cannot read it as plain text, and a prompt must not forge tokens",
                fix="write the text without it",
            )
        return [int(i) for i in found]

    def _with_turn_ends(self, ids: Sequence[int], answers: Sequence[bool]) -> list[bool]:
        """Count the token that ends an answer to the answer."""
        result = list(answers)
        for index in range(1, len(ids)):
            if answers[index - 1] and not answers[index] and ids[index] in self.eos_ids:
                result[index] = True
        return result

    def _ended(self, ids: list[int]) -> list[int]:
        """Cut what the template writes after the end of the turn.

        Raises:
            FormatError: E4205 if nothing ends the turn.
        """
        for index, token in enumerate(ids):
            if token in self.eos_ids:
                return ids[: index + 1]
        raise FormatError(
            "E4205",
            "The chat template does not end an answer with an end-of-turn token.",
            why=f"one of the ids {sorted(self.eos_ids)} should follow it",
            fix="download chat_template.jinja and generation_config.json again",
        )

    def _tiles(
        self, images: "Sequence[Image]"
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        """Cut, resize and normalize: pixels of all tiles, sizes, tiles of each picture.

        Raises:
            FormatError: E4304 or E4306 for a picture of no or too many pixels.
        """
        side = self.shape.image_size
        if not images:
            empty = np.empty((0, self.shape.channels, side, side), np.float32)
            return empty, np.empty((0, 2), np.int64), np.empty(0, np.int64)
        for number, image in enumerate(images, 1):
            check_size(image, f"picture {number}", padded=len(images) > 1)
        made: Mapping[str, Any] = self.pictures.preprocess(
            [[as_rgb(image) for image in images]], return_tensors=None
        )
        tiles = [np.asarray(image, np.float32) for image in made["pixel_values"]]
        return (
            np.concatenate(tiles),
            np.array(made["image_sizes"], np.int64).reshape(-1, 2),
            np.array([len(image) for image in tiles], np.int64),
        )

    def _expanded(
        self, ids: Sequence[int], answers: Sequence[bool], rows: Sequence[int]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Repeat each picture's placeholder once per feature row.

        Raises:
            FormatError: E4204.
        """
        compact = np.array(ids, np.int64)
        places = compact == self.image_token_id
        if int(places.sum()) != len(rows):
            raise FormatError(
                "E4204",
                f"The conversation has {int(places.sum())} image placeholders for {len(rows)} pictures.",
                why="the chat template writes one placeholder per picture",
                fix="download chat_template.jinja again",
            )
        repeats = np.ones(len(compact), np.int64)
        repeats[places] = rows
        return np.repeat(compact, repeats), np.repeat(np.array(answers, bool), repeats)
