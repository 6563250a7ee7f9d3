"""Text and a picture to tensors, the long way round: tokenizer and picture processor by hand.

Needs no torchvision. It is written without the package's own `Processor` on purpose: the two, and
`AutoProcessor` where it can be imported, check each other in tests.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from mbq_export.families.base import ANSWER, PROMPT, VISION
from mbq_export.families.inputs import ModelInputs

IMAGE_TOKENS = 78
"""36 of the base view, 6 rows of 6 patches and a newline of the only tile."""


class HandMade:
    """Inputs of tiny-llava-ov for one question about one picture."""

    def __init__(self, folder: Path) -> None:
        """Read tokenizer and picture settings of a model folder."""
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.pictures: Any = LlavaOnevisionImageProcessorPil.from_pretrained(folder)

    def inputs(
        self, prompt: str, image: NDArray[np.uint8], answer: str | None = None
    ) -> ModelInputs:
        """Build the inputs of one turn; `answer` is teacher-forced, None ends with ``<a>``.

        Args:
            prompt: The question.
            image: (48, 48, 3) uint8.
            answer: What the model is to say.
        """
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        question = self._ids(text.replace("<image>", "<image>" * IMAGE_TOKENS))
        said = [] if answer is None else self._ids(f"{answer} <eos>")
        image_token = self.tokenizer.convert_tokens_to_ids("<image>")
        classes = [VISION if token == image_token else PROMPT for token in question]
        seen = self.pictures([Image.fromarray(image)], return_tensors="np")
        tiles = seen["pixel_values"][0]
        return ModelInputs(
            input_ids=np.array(question + said, np.int64),
            pixel_values=np.asarray(tiles, np.float32),
            image_sizes=np.asarray(seen["image_sizes"], np.int64).reshape(1, 2),
            tiles_per_image=np.array([len(tiles)], np.int64),
            token_classes=np.array(classes + [ANSWER] * len(said), np.int8),
        )

    def decode(self, ids: torch.Tensor) -> str:
        """Turn ids into text without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)
