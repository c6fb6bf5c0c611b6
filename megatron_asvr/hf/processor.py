"""The tokenizer and image processor that a stock folder needs to prepare its own inputs.

Both are stock classes. LlavaImageProcessor pads to a square with the mean colour (when asked to),
resizes with antialiased bicubic interpolation and normalises: within 6e-8 of the reference in
data/pil.py when its PIL form runs (measured: 16 sizes from 7x500 to 384x384). Where torchvision is
installed transformers prefers that, which differs by up to 2 of 255 in a few pixels.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_asvr.config.schema import Config
from megatron_asvr.data.chat_template import TEMPLATE_FILE
from megatron_asvr.data.hub_text import (
    ADDED_TOKENS,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
)
from megatron_asvr.data.text import IMAGE_TOKEN, SENTENCEPIECE_MODEL, SPACE, TextTokenizer
from megatron_asvr.errors import ConversionError, DataError
from megatron_asvr.hf.files import read_json, write_json
from megatron_asvr.hf.resolution import stock_pinpoints
from megatron_asvr.hf.stock import transformers

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
_TEXT_FILES = (
    SENTENCEPIECE_MODEL,
    TOKENIZER_JSON,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    ADDED_TOKENS,
    TEMPLATE_FILE,
)
_WHY = (
    "; its tokenizer merges pairs and never normalises text: use a SentencePiece model with "
    "model_type=bpe, normalization_rule_name=identity, remove_extra_whitespaces=false and "
    "byte_fallback=true"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenIds:
    """The ids that configurations need."""

    bos: int | None
    eos: int
    pad: int
    image: int

    def special(self) -> dict[str, int | None]:
        """The fields of a transformers configuration."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A text tokenizer that fits a vocabulary size.

    Attributes:
        tokenizer: ours.
        tokens: every token, by id; None where an id has none.
        ids: special ids.
        with_image: whether the exported tokenizer knows ``<image>``.
        scores: SentencePiece's score of the tokens that merging characters can lead to.
        special: control tokens and ``<image>``, which are cut out of a text before all else.
        literal: the other symbols that are cut out (user-defined ones).
    """

    tokenizer: TextTokenizer
    tokens: tuple[str | None, ...]
    ids: TokenIds
    with_image: bool
    scores: dict[str, float] = field(default_factory=dict)
    special: tuple[str, ...] = ()
    literal: tuple[str, ...] = ()


def read_text(path: str | Path, vocab_size: int, *, needs_image: bool = True) -> Text:
    """The text tokenizer in ``path``.

    Args:
        path: see `TextTokenizer`.
        vocab_size: rows of the model's embeddings.
        needs_image: whether the model sees images; one that does not need not have a row for
            ``<image>``, and its tokenizer stays as it is then.

    Raises:
        ConversionError: it is no tokenizer, lacks a symbol, or is larger than the embeddings.
    """
    try:
        ours = TextTokenizer(path)
    except DataError as e:
        raise ConversionError(str(e)) from e
    with_image = needs_image or ours.has_image or ours.image_id < vocab_size
    tokens = ours.tokens if with_image else ours.tokens[: ours.image_id]
    if len(tokens) > vocab_size:
        raise ConversionError(
            f"{path} has {len(tokens)} tokens, {IMAGE_TOKEN} included, but the model's "
            f"vocabulary is {vocab_size}; this is not the tokenizer it was trained with"
        )
    ids = TokenIds(bos=ours.bos_id, eos=ours.eos_id, pad=ours.pad_id, image=ours.image_id)
    text = Text(tokenizer=ours, tokens=tokens, ids=ids, with_image=with_image)
    return _with_pieces(text) if ours.is_sentencepiece else text


def _with_pieces(text: Text) -> Text:
    """The same with what a stock tokenizer is built from instead of a SentencePiece model."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(text.tokenizer.path))
    tokens = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    special = [t for i, t in enumerate(tokens) if model.is_control(i) or model.is_unknown(i)]
    known = {t for i, t in enumerate(tokens) if t not in special and not model.is_byte(i)}
    # SentencePiece does not tell which symbols are user-defined: nothing can be merged to them.
    reachable = {t for t in known if len(t) == 1 or any(_pairs(t, known))}
    scores = {t: model.get_score(i) for i, t in enumerate(tokens) if t in reachable}
    return replace(
        text,
        scores=scores,
        special=(*special, *([IMAGE_TOKEN] if text.with_image else [])),
        literal=tuple(sorted(known - reachable - {IMAGE_TOKEN})),
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
    """The stock tokenizer of a SentencePiece model; prove it with `check_tokenizer` once saved.

    Args:
        text: from `read_text`.
        max_length: longest text in tokens that the model takes.
    """
    tokens, ids, library = [str(t) for t in text.tokens], text.ids, transformers()
    stock = library.LlamaTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges(text.scores),
        unk_token=tokens[0],
        bos_token=tokens[ids.bos or 0],
        eos_token=tokens[ids.eos],
        pad_token=tokens[ids.pad],
        add_bos_token=True,
        add_eos_token=False,
        model_max_length=max_length,
        **({"extra_special_tokens": {"image_token": IMAGE_TOKEN}} if text.with_image else {}),
    )
    for symbols, special in ((text.special, True), (text.literal, False)):
        added = [library.AddedToken(x, normalized=False, special=special) for x in symbols]
        stock.add_tokens(added, special_tokens=special)
    return stock


def tokenizer_loader(kind: str, family: str, *, sentencepiece: bool) -> str:
    """The class of transformers that loads the tokenizer of an exported folder.

    AutoTokenizer takes Qwen's own tokenizer for every language model with Qwen2's architecture,
    whatever the folder says (transformers 5.23, tokenization_auto.py).
    """
    wrong = sentencepiece and (kind, family) == ("text", "qwen2")
    return "LlamaTokenizer" if wrong else "AutoTokenizer"


def write_through(text: Text, target: Path) -> None:
    """Write a ``tokenizer.json`` and its settings as they came, ``<image>`` added.

    The chat template is left out: the export has its own file for it.

    Args:
        text: from `read_text`.
        target: folder to write to.
    """
    source = text.tokenizer.path.parent
    (target / TOKENIZER_JSON).write_bytes(text.tokenizer.document(with_image=text.with_image))
    for name in (SPECIAL_TOKENS, ADDED_TOKENS):
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if (source / TOKENIZER_CONFIG).is_file():
        settings |= read_json(source / TOKENIZER_CONFIG)
    settings.pop("chat_template", None)
    listed = settings.get("added_tokens_decoder")
    if text.with_image and isinstance(listed, dict):
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        image = {"content": IMAGE_TOKEN, **flags, "special": True}
        settings["added_tokens_decoder"] = {str(text.ids.image): image} | listed
    write_json(target / TOKENIZER_CONFIG, settings)


def check_tokenizer(folder: Path, text: Text, loader: str) -> None:
    """Return when the tokenizer saved in ``folder``, loaded by ``loader``, gives our ids.

    Raises:
        ConversionError: a token or a probe text has other ids.
    """
    stock = load_tokenizer(folder, loader)
    found = tuple(stock.convert_ids_to_tokens(list(range(len(text.tokens)))))
    if found != text.tokens or len(stock) != sum(token is not None for token in text.tokens):
        pairs = zip(found, text.tokens, strict=False)
        wrong = [i for i, (a, b) in enumerate(pairs) if a != b][:3]
        raise ConversionError(
            f"transformers knows {len(stock)} tokens of {text.tokenizer.path}, wanted "
            f"{len(text.tokens)}; first ids that differ: {wrong}"
        )
    pieces = [*text.scores, *text.literal]
    step = max(1, len(text.tokens) // _PROBED_PIECES)
    if not text.tokenizer.is_sentencepiece:
        pieces = [text.tokenizer.decode([i]) for i in range(0, len(text.tokens), step)]
        step = 1
    many = "".join(pieces[::step]).replace(SPACE, " ")
    begin = text.tokenizer.begin
    for probe in (*_PROBES, f"Q:{many}"):
        if IMAGE_TOKEN in probe and not text.with_image:
            continue
        ours, theirs = [*begin, *text.tokenizer.encode(probe)], stock(probe).input_ids
        if ours != theirs:
            raise ConversionError(
                f"the text {probe[:40]!r} has ids {theirs[:20]} in transformers and {ours[:20]} in "
                f"training{_WHY if text.tokenizer.is_sentencepiece else ''}"
            )


def load_tokenizer(folder: Path, loader: str = "AutoTokenizer") -> Any:
    """The tokenizer in ``folder`` as transformers loads it.

    Raises:
        ConversionError: it does not load.
    """
    try:
        kind = getattr(transformers(), loader)
        return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as e:  # transformers raises many types here, all of them about this folder
        raise ConversionError(f"the tokenizer in {folder} does not load: {e}") from e


def copy_tokenizer(source: Path, target: Path) -> TextTokenizer | None:
    """The text tokenizer of a language model's folder, copied to ``target``; None without one.

    Raises:
        ConversionError: it is damaged, or transformers gives other ids for the same folder.
    """
    if not any((source / name).is_file() for name in (SENTENCEPIECE_MODEL, TOKENIZER_JSON)):
        return None
    for name in _TEXT_FILES:
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())
    try:
        copied = TextTokenizer(target)
        text = read_text(copied.path, copied.vocab_size, needs_image=False)
    except DataError as e:
        raise ConversionError(str(e)) from e
    if not copied.is_sentencepiece:
        bare = replace(text, with_image=copied.has_image)
        if not copied.has_image:
            bare = replace(bare, tokens=text.tokens[: copied.image_id])
        check_tokenizer(source, bare, "AutoTokenizer")
    return copied


def build_processor(config: Config, tokenizer: Any, chat_template: str | None) -> Any:
    """The stock processor of LLaVA or LLaVA-NeXT that reproduces this project's preprocessing.

    Args:
        config: the run; its vision sizes and ``data.image_fit`` decide.
        tokenizer: a transformers tokenizer.
        chat_template: Jinja text, or None.
    """
    library, vision = transformers(), config.model.vision
    pinpoints = stock_pinpoints(config.model)
    square = {"height": vision.image_size, "width": vision.image_size}
    if pinpoints is None:
        form = library.models.llava.image_processing_pil_llava.LlavaImageProcessorPil
        kind, own = library.LlavaProcessor, {"do_pad": config.data.image_fit == "pad"}
    else:
        form = library.models.llava_next.image_processing_pil_llava_next.LlavaNextImageProcessorPil
        # Its do_pad gives images of a batch the same number of views.
        kind, own = library.LlavaNextProcessor, {"do_pad": True, "image_grid_pinpoints": pinpoints}
    images = form(
        **own,
        do_convert_rgb=True,
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
    return kind(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        num_additional_image_tokens=0,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        chat_template=chat_template,
    )
