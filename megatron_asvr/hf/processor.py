"""The tokenizer and image processor that a stock folder needs to prepare its own inputs.

Both are stock classes. LlavaImageProcessor pads to a square with the mean colour (when asked to),
resizes with antialiased bicubic interpolation and normalises: within 6e-8 of the reference in
data/pil.py when its PIL form runs (measured: 16 sizes from 7x500 to 384x384). Where torchvision is
installed transformers prefers that, which differs by up to 2 of 255 in a few pixels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_asvr.config.schema import Config
from megatron_asvr.data.text import IMAGE_TOKEN, TextTokenizer
from megatron_asvr.errors import ConversionError, DataError
from megatron_asvr.hf.stock import transformers

TOKENIZER_FILE = "tokenizer.model"
MEAN = STD = 0.5  # SigLIP's
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC
# Texts on which a wrong rule would show: runs of spaces, compatibility characters, tabs, line
# ends, an image first and in the middle, special symbols.
_PROBES = (
    "Q: a  b",
    "Q: x \ufb01 \u00bd \u2460",
    "Q: a\tb\n\n c",
    f"Q: {IMAGE_TOKEN}\nWhat? {IMAGE_TOKEN}.",
    f"{IMAGE_TOKEN}{IMAGE_TOKEN} What?",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenIds:
    """The ids that configurations need."""

    bos: int
    eos: int
    pad: int
    image: int

    def special(self) -> dict[str, int]:
        """The fields of a transformers configuration."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A text tokenizer that fits a vocabulary size.

    Attributes:
        tokenizer: ours.
        tokens: every token, by id; ``<image>`` last where SentencePiece does not have it.
        ids: special ids.
    """

    tokenizer: TextTokenizer
    tokens: tuple[str, ...]
    ids: TokenIds


def read_text(path: str | Path, vocab_size: int) -> Text:
    """The SentencePiece model in ``path``.

    Raises:
        ConversionError: it is no such model, lacks a symbol, or is larger than the embeddings.
    """
    try:
        ours = TextTokenizer(path)
    except DataError as e:
        raise ConversionError(str(e)) from e
    if ours.vocab_size > vocab_size:
        raise ConversionError(
            f"{path} has {ours.vocab_size} tokens, {IMAGE_TOKEN} included, but the model's "
            f"vocabulary is {vocab_size}; this is not the tokenizer it was trained with"
        )
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokens = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    if ours.image_id == len(tokens):
        tokens.append(IMAGE_TOKEN)
    ids = TokenIds(bos=ours.bos_id, eos=ours.eos_id, pad=ours.pad_id, image=ours.image_id)
    return Text(tokenizer=ours, tokens=tuple(tokens), ids=ids)


def build_tokenizer(text: Text, folder: Path, max_length: int) -> Any:
    """The stock tokenizer of ``text``, proven to give the same ids; writes ``tokenizer.model``.

    Raises:
        ConversionError: some token or probe text gets other ids than ours.
    """
    (folder / TOKENIZER_FILE).write_bytes(text.tokenizer.path.read_bytes())
    tokens, ids = text.tokens, text.ids
    stock = transformers().LlamaTokenizer.from_pretrained(
        str(folder),
        unk_token=tokens[0],
        bos_token=tokens[ids.bos],
        eos_token=tokens[ids.eos],
        pad_token=tokens[ids.pad],
        add_bos_token=True,  # transformers 5.23 does not take it from the file
        add_eos_token=False,
        model_max_length=max_length,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )
    found = tuple(stock.convert_ids_to_tokens(list(range(len(stock)))))
    if found != tokens:
        wrong = [i for i, (a, b) in enumerate(zip(found, tokens, strict=False)) if a != b][:3]
        raise ConversionError(
            f"transformers reads {len(found)} tokens from {text.tokenizer.path}, wanted "
            f"{len(tokens)}; first ids that differ: {wrong}"
        )
    for probe in _PROBES:
        ours, theirs = [ids.bos, *text.tokenizer.encode(probe)], stock(probe).input_ids
        if ours != theirs:
            raise ConversionError(
                f"the text {probe!r} has ids {theirs} in transformers and {ours} in training; "
                "its tokenizer never normalises text: train SentencePiece with "
                "normalization_rule_name=identity, remove_extra_whitespaces=false, "
                "byte_fallback=true and model_type=bpe"
            )
    return stock


def build_processor(config: Config, tokenizer: Any, chat_template: str | None) -> Any:
    """The stock LLaVA processor that reproduces this project's preprocessing.

    Args:
        config: the run; its vision sizes and ``data.image_fit`` decide.
        tokenizer: a transformers tokenizer.
        chat_template: Jinja text, or None.
    """
    library, vision = transformers(), config.model.vision
    square = {"height": vision.image_size, "width": vision.image_size}
    images = library.models.llava.image_processing_pil_llava.LlavaImageProcessorPil(
        do_convert_rgb=True,
        do_pad=config.data.image_fit == "pad",
        do_resize=True,
        size=square,
        resample=BICUBIC,
        do_center_crop=False,
        crop_size=square,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    return library.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        num_additional_image_tokens=0,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        chat_template=chat_template,
    )
