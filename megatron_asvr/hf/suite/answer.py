"""Answers of an exported model, asked through the folder's own processor and chat template."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import select

import torch

from megatron_asvr.data.pil import as_rgb
from megatron_asvr.errors import ConversionError
from megatron_asvr.hf.stock import transformers
from megatron_asvr.hf.verify import load_stock


class Answerer:
    """A model that answers greedily: fp32 on the CPU, bf16 on a GPU.

    Attributes:
        num_overlong: questions so far that are longer than the model's positions.
    """

    def __init__(self, folder: str) -> None:
        """Load the folder; what is missing or left over is an error."""
        platform, _ = select()
        self._model, self._processor = load_stock(folder, answer_dtype())
        self._model.to(platform.device)
        tokenizer = self._processor.tokenizer
        tokenizer.padding_side = "left"  # every answer begins where its question ends
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if not self._processor.chat_template:
            raise ConversionError(f"{folder} has no chat template, so its questions have no form")
        self._positions = self._model.config.get_text_config().max_position_embeddings
        self.num_overlong = 0

    @torch.no_grad()
    def answers(
        self,
        prompts: Sequence[str],
        pictures: Sequence[Sequence[Any]],
        *,
        max_new_tokens: int,
        until: Sequence[str] = (),
    ) -> list[str]:
        """An answer to each question, in one batch.

        Args:
            prompts: texts of the questions.
            pictures: images (PIL) of each, which stand before its text.
            max_new_tokens: longest answer.
            until: an answer ends before the first of these texts.
        """
        inputs = self._processor(
            text=[self._text(*asked) for asked in zip(prompts, pictures, strict=True)],
            images=[list(map(as_rgb, images)) for images in pictures if images] or None,
            padding=True,
            return_tensors="pt",
        )
        self.num_overlong += int((inputs["attention_mask"].sum(1) > self._positions).sum())
        inputs = inputs.to(self._model.device, self._model.dtype)
        out = self._model.generate(
            **inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens
        )
        new = out[:, inputs["input_ids"].shape[1] :]
        texts = self._processor.batch_decode(new, skip_special_tokens=True)
        return [_cut(text, until) for text in texts]

    def _text(self, prompt: str, images: Sequence[Any]) -> str:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
        message = {"role": "user", "content": content}
        return self._processor.apply_chat_template([message], add_generation_prompt=True)


def answer_dtype() -> torch.dtype:
    """The type that a model answers in on this platform."""
    return torch.float32 if select()[0].name == "cpu" else torch.bfloat16


def _cut(text: str, until: Sequence[str]) -> str:
    for end in until:
        text = text.split(end)[0]
    return text.strip()


def identity(folder: str) -> dict[str, str]:
    """What the answers of a folder depend on; equal folders have equal contents.

    Raises:
        ConversionError: the folder has no ``config.json``.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ConversionError(f"{path / 'config.json'} does not exist; give an exported folder")
    digest = hashlib.sha256()
    for file in sorted(file for file in path.iterdir() if file.is_file()):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.name}\0{content}\n".encode())
    return {
        "model_sha256": digest.hexdigest(),
        "dtype": str(answer_dtype()).removeprefix("torch."),
        "transformers": transformers().__version__,
    }
