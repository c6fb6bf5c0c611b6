"""The tokenizer and image processor that a stock folder needs to prepare its own inputs.

Both are stock classes. LlavaImageProcessor pads to a square with the mean colour (when asked to),
resizes with antialiased bicubic interpolation and normalises: within 6e-8 of the reference in
data/pil.py when its PIL form runs (measured: 16 sizes from 7x500 to 384x384). Where torchvision is
installed transformers prefers that, which differs by up to 2 of 255 in a few pixels.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_asvr.config.schema import Config
from megatron_asvr.data.text import IMAGE_TOKEN, SPACE, TextTokenizer
from megatron_asvr.errors import ConversionError, DataError
from megatron_asvr.hf.stock import transformers

TOKENIZER_FILE = "tokenizer.model"
MEAN = STD = 0.5  # SigLIP's
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC
# Texts on which a wrong rule would show: runs of spaces, compatibility characters, tabs, line
# ends, an image first and in the middle.
_PROBES = (
    "Q: a  b   c      d",
    "Q: x \ufb01 \u00bd \u2460",
    "Q: a\tb\n\n c",
    f"Q: {IMAGE_TOKEN}\nWhat? {IMAGE_TOKEN}.",
    f"{IMAGE_TOKEN}{IMAGE_TOKEN} What?",
)
_PROBED_PIECES = 2000


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
        scores: SentencePiece's score of the tokens that merging characters can lead to.
        special: control tokens and ``<image>``, which are cut out of a text before all else.
        literal: the other symbols that are cut out (user-defined ones).
        ids: special ids.
    """

    tokenizer: TextTokenizer
    tokens: tuple[str, ...]
    scores: dict[str, float]
    special: tuple[str, ...]
    literal: tuple[str, ...]
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
    special = [t for i, t in enumerate(tokens) if model.is_control(i) or model.is_unknown(i)]
    known = {t for i, t in enumerate(tokens) if t not in special and not model.is_byte(i)}
    # SentencePiece does not tell which symbols are user-defined: nothing can be merged to them.
    reachable = {t for t in known if len(t) == 1 or any(_pairs(t, known))}
    scores = {t: model.get_score(i) for i, t in enumerate(tokens) if t in reachable}
    if ours.image_id == len(tokens):
        tokens.append(IMAGE_TOKEN)
    return Text(
        tokenizer=ours,
        tokens=tuple(tokens),
        scores=scores,
        special=(*special, IMAGE_TOKEN),
        literal=tuple(sorted(known - reachable - {IMAGE_TOKEN})),
        ids=TokenIds(bos=ours.bos_id, eos=ours.eos_id, pad=ours.pad_id, image=ours.image_id),
    )


def _pairs(piece: str, known: Container[str]) -> Iterator[int]:
    """Places where ``piece`` splits into two known pieces."""
    return (i for i in range(1, len(piece)) if piece[:i] in known and piece[i:] in known)


def merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merge rules of byte-pair encoding, best first, from SentencePiece's scores.

    Pairs of equal score are ordered by length, longest first: applied one at a time, that joins a
    run (of spaces, say) from the left, as SentencePiece does. transformers 5.23 orders the rules
    of a bare ``tokenizer.model`` by id instead, and so splits runs of spaces differently from
    Llama's and Mistral's own tokenizers.
    """
    pairs = [
        (score, i, len(piece) - i, piece)
        for piece, score in scores.items()
        for i in _pairs(piece, scores)
    ]
    pairs.sort(key=lambda pair: pair[:3], reverse=True)
    return [(piece[:i], piece[i:]) for _, i, _, piece in pairs]


def build_tokenizer(text: Text, max_length: int) -> Any:
    """The stock tokenizer of ``text``; prove it with `check_tokenizer` once it is saved.

    Args:
        text: from `read_text`.
        max_length: longest text in tokens that the model takes.
    """
    tokens, ids, library = text.tokens, text.ids, transformers()
    stock = library.LlamaTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges(text.scores),
        unk_token=tokens[0],
        bos_token=tokens[ids.bos],
        eos_token=tokens[ids.eos],
        pad_token=tokens[ids.pad],
        add_bos_token=True,
        add_eos_token=False,
        model_max_length=max_length,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )
    for symbols, special in ((text.special, True), (text.literal, False)):
        added = [library.AddedToken(x, normalized=False, special=special) for x in symbols]
        stock.add_tokens(added, special_tokens=special)
    return stock


def tokenizer_loader(kind: str, family: str) -> str:
    """The class of transformers that loads the tokenizer of an exported folder.

    AutoTokenizer takes Qwen's own tokenizer for every language model with Qwen2's architecture,
    whatever the folder says (transformers 5.23, tokenization_auto.py).
    """
    return "LlamaTokenizer" if (kind, family) == ("text", "qwen2") else "AutoTokenizer"


def check_tokenizer(folder: Path, text: Text, loader: str) -> None:
    """Return when the tokenizer saved in ``folder``, loaded by ``loader``, gives our ids.

    Raises:
        ConversionError: a token or a probe text has other ids.
    """
    stock = getattr(transformers(), loader).from_pretrained(str(folder), local_files_only=True)
    found = tuple(stock.convert_ids_to_tokens(list(range(len(stock)))))
    if found != text.tokens:
        pairs = zip(found, text.tokens, strict=False)
        wrong = [i for i, (a, b) in enumerate(pairs) if a != b][:3]
        raise ConversionError(
            f"transformers knows {len(found)} tokens of {text.tokenizer.path}, wanted "
            f"{len(text.tokens)}; first ids that differ: {wrong}"
        )
    pieces = [*text.scores, *text.literal]
    many = "".join(pieces[:: max(1, len(pieces) // _PROBED_PIECES)]).replace(SPACE, " ")
    for probe in (*_PROBES, f"Q:{many}"):
        ours, theirs = [text.ids.bos, *text.tokenizer.encode(probe)], stock(probe).input_ids
        if ours != theirs:
            raise ConversionError(
                f"the text {probe[:40]!r} has ids {theirs[:20]} in transformers and {ours[:20]} in "
                "training; its tokenizer merges pairs and never normalises text: use a "
                "SentencePiece model with model_type=bpe, normalization_rule_name=identity, "
                "remove_extra_whitespaces=false and byte_fallback=true"
            )


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
