"""Captioners that look at the picture, as in the paper (arXiv 2503.09368, §4): BLIP-2 and Molmo2.

A captioner loads its network at its first call. Only compression needs captioners.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

from PIL import Image

from percov2.container.captions import Captioner, NoCaptioner, TextCaptioner, check_captioner
from percov2.extras import require
from percov2.images import to_rgb

__all__ = ["Blip2Captioner", "Molmo2Captioner", "open_captioner", "tidy"]

MAX_TOKENS = 32
"""Largest length of a caption, in the captioner's own tokens, as in the paper."""


class _NetworkCaptioner(ABC):
    """A captioner with the network at ``location``, which decodes greedily."""

    default_location: str
    kind: str

    def __init__(self, location: str, device: str, batch: int) -> None:
        self.location, self.device, self.batch = location, device, batch
        self.dtype = "float32" if device == "cpu" else "bfloat16"

    @cached_property
    def _networks(self) -> tuple[Any, Any]:
        require("torch", "a captioner", "torch", "transformers")
        import transformers

        kind = getattr(transformers, self.kind)
        form = {"dtype": self.dtype, "use_safetensors": True}
        try:
            # Without trust_remote_code, the library asks the user.
            prepare = transformers.AutoProcessor.from_pretrained
            processor = prepare(self.location, trust_remote_code=False)
            network = kind.from_pretrained(self.location, **form)
            return processor, network.to(self.device).eval()
        except MemoryError:
            raise
        except Exception as error:  # the library raises exceptions of many types
            raise ValueError(f"cannot load the captioner {self.location}: {error}") from error

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """Return one caption of at most 32 tokens per image.

        Raises ValueError if the network cannot be loaded.
        """
        processor, network = self._networks
        import torch

        form = {"do_sample": False, "num_beams": 1, "max_new_tokens": MAX_TOKENS}
        generate = partial(network.generate, **form)
        pictures = [Image.fromarray(to_rgb(image)) for image in images]
        captions: list[str] = []
        for i in range(0, len(pictures), self.batch):
            with torch.inference_mode():
                words = self._words(processor, generate, pictures[i : i + self.batch])
            captions += processor.tokenizer.batch_decode(words, skip_special_tokens=True)
        return [tidy(caption) for caption in captions]

    @property
    def _placed(self) -> dict[str, Any]:
        import torch

        return {"device": self.device, "dtype": getattr(torch, self.dtype)}

    @abstractmethod
    def _words(self, processor: Any, generate: Any, pictures: list[Image.Image]) -> Any:
        """Return the tokens of a caption per picture."""


class Blip2Captioner(_NetworkCaptioner):
    """A captioner that decodes BLIP-2 (arXiv 2301.12597) greedily.

    The weights are float32 on the CPU and bfloat16 elsewhere.

    Args:
        location: hub id or folder of a ``Blip2ForConditionalGeneration`` with its processor.
        device: device of the network.
        batch: largest number of pictures per call of the network. It bounds the memory.
    """

    default_location = "Salesforce/blip2-opt-2.7b-coco"
    kind = "Blip2ForConditionalGeneration"

    def __init__(
        self, location: str = default_location, device: str = "cpu", batch: int = 8
    ) -> None:
        super().__init__(location, device, batch)

    def _words(self, processor: Any, generate: Any, pictures: list[Image.Image]) -> Any:
        pixels = processor.image_processor(pictures, return_tensors="pt").pixel_values
        return generate(pixel_values=pixels.to(**self._placed))


class Molmo2Captioner(_NetworkCaptioner):
    """A captioner that greedily decodes Molmo2's answer to a question about each picture.

    Args:
        location: hub id or folder of a ``Molmo2ForConditionalGeneration`` with its processor.
        device, batch: as for ``Blip2Captioner``.
        question: the question.
    """

    default_location = "allenai/Molmo2-8B"
    kind = "Molmo2ForConditionalGeneration"

    def __init__(
        self,
        location: str = default_location,
        device: str = "cpu",
        batch: int = 4,
        question: str = "Describe this image in one short sentence.",
    ) -> None:
        super().__init__(location, device, batch)
        self.question = question

    def _words(self, processor: Any, generate: Any, pictures: list[Image.Image]) -> Any:
        inputs = processor.apply_chat_template(
            [self._conversation(picture) for picture in pictures],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(**self._placed)
        return generate(**inputs)[:, inputs["input_ids"].shape[1] :]

    def _conversation(self, image: Image.Image) -> list[dict[str, Any]]:
        content = [{"type": "image", "image": image}, {"type": "text", "text": self.question}]
        return [{"role": "user", "content": content}]


def open_captioner(
    name: str, text: str = "", location: str | None = None, device: str = "cpu"
) -> Captioner:
    """Return a captioner by name. It loads its network at its first call.

    Args:
        name: "none", "text" (returns the given text), "blip2" or "molmo2".
        text: the caption, only for "text".
        location: hub id or folder of the network, only for "blip2" and "molmo2". None means the
            published weights.
        device: device of the network.

    Raises:
        ValueError: the name is unknown, or the captioner does not take one of the arguments.
    """
    check_captioner(name, text, location)
    if name in ("none", "text"):
        return TextCaptioner(text) if text else NoCaptioner()
    kind = Blip2Captioner if name == "blip2" else Molmo2Captioner
    return kind(location or kind.default_location, device)


def tidy(caption: str) -> str:
    """Return a text on one line, without control characters or repeated spaces."""
    printable = "".join(c if c.isprintable() else " " for c in caption)
    return " ".join(printable.split())
