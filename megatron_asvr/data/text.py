"""Text to token ids, the same ones as Hugging Face's tokenizer of the same language model.

A tokenizer is a ``tokenizer.json`` (``hub_text.py``) or a SentencePiece model. The latter's text
follows the rule of LlamaTokenizer (``legacy=False``), so that a trained model meets the ids it was
trained on: text is split at special symbols (control tokens and ``<image>``); spaces become U+2581;
only the very beginning of a text gets one in front, never the text after a special symbol.
SentencePiece's own dummy prefix cannot do that, so it is switched off in the loaded model.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

from megatron_asvr.data.hub_text import TOKENIZER_JSON, HubTokenizer, read_settings, text_of
from megatron_asvr.errors import DataError

IMAGE_TOKEN = "<image>"
SENTENCEPIECE_MODEL = "tokenizer.model"
SPACE = "\u2581"  # how SentencePiece writes a space

# ModelProto field 3 (normalizer_spec) with add_dummy_prefix (3) and remove_extra_whitespaces (4)
# set to false. Protobuf merges a repeated message into the earlier one, so appending these bytes
# to a serialised model overrides the two settings and nothing else.
_NO_DUMMY_PREFIX = b"\x1a\x04\x18\x00\x20\x00"


class Backend(Protocol):
    """One form of tokenizer file; see `HubTokenizer` for the attributes."""

    tokens: list[str | None]
    named: dict[str, str]
    bos_id: int | None
    eos_id: int
    pad_id: int
    image_id: int
    special: dict[str, int]
    has_image: bool
    fingerprint: str

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        """Token ids of ``text``."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens."""
        ...

    def document(self, *, with_image: bool) -> bytes:
        """The file's content; see `TextTokenizer.document`."""
        ...


class SentencePieceTokenizer:
    """What `TextTokenizer` needs of a SentencePiece model; attributes as in `HubTokenizer`."""

    def __init__(self, file: Path) -> None:
        try:
            model = file.read_bytes()
            sp = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
        except OSError as error:
            raise DataError(f"model.text_tokenizer={file} cannot be read: {error}") from error
        except RuntimeError as error:
            raise DataError(
                f"model.text_tokenizer={file} is not a SentencePiece model ({len(model)} bytes); "
                f"give the tokenizer.model file or the folder (with {TOKENIZER_JSON}) of the "
                "language model"
            ) from error
        self._sp, self._model = sp, model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        if min(sp.bos_id(), sp.eos_id()) < 0:
            raise DataError(f"model.text_tokenizer={file} has no <s> or no </s>; both are needed")
        self.bos_id: int | None = sp.bos_id()
        self.eos_id = sp.eos_id()
        self.pad_id = sp.pad_id() if sp.pad_id() >= 0 else sp.unk_id()
        pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
        self.tokens: list[str | None] = [*pieces]
        self.has_image = IMAGE_TOKEN in pieces
        if not self.has_image:
            self.tokens.append(IMAGE_TOKEN)
        self.image_id = self.tokens.index(IMAGE_TOKEN)
        _check_added(file, self.tokens)
        ids = {"bos": sp.bos_id(), "eos": sp.eos_id(), "unk": sp.unk_id(), "pad": sp.pad_id()}
        self.named = {f"{name}_token": pieces[i] for name, i in ids.items() if i >= 0}
        control = (i for i in range(len(pieces)) if sp.is_control(i) or sp.is_unknown(i))
        self.special = {pieces[i]: i for i in control} | {IMAGE_TOKEN: self.image_id}
        self._text_ids = frozenset(range(len(pieces))) - set(self.special.values())
        longest_first = sorted(self.special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        """Token ids of ``text``; see `TextTokenizer.encode`."""
        ids: list[int] = []
        for number, piece in enumerate(self._split.split(text)):
            if number % 2:
                ids.append(self.special[piece])
            elif piece:
                leads = at_start and number == 0 and not piece.startswith((" ", SPACE))
                ids.extend(self._sp.encode(SPACE + piece if leads else piece))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens."""
        return self._sp.decode([i for i in ids if i in self._text_ids])

    def document(self, *, with_image: bool) -> bytes:
        """The model as it came; see `TextTokenizer.document`."""
        return self._model


class TextTokenizer:
    """The tokenizer of a language model, from a SentencePiece model or a ``tokenizer.json``.

    Args:
        path: such a file, or a folder in Hugging Face format that holds one. A folder with both
            means ``tokenizer.model``.

    Attributes:
        path: the file.
        bos_id: the token that begins every sequence; None for a tokenizer that puts none (Qwen).
        eos_id: end of a text.
        pad_id: padding (never attended); another special token where there is none of its own.
        image_id: ``<image>``; the first id after the vocabulary where that does not have it.
        has_image: whether the vocabulary has it.
        vocab_size: ids in use, ``<image>`` included.
        tokens: the token of every id.
        named: texts of ``bos_token``, ``eos_token``, ... for chat templates.
        fingerprint: hash of all that the ids depend on.

    Raises:
        DataError: a file is missing or damaged, or a token that is needed does not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = tokenizer_file(path)
        hub = self.path.suffix == ".json"
        backend: Backend = (
            HubTokenizer(self.path, IMAGE_TOKEN) if hub else SentencePieceTokenizer(self.path)
        )
        self._backend, self.is_sentencepiece = backend, not hub
        self.bos_id, self.eos_id, self.pad_id = backend.bos_id, backend.eos_id, backend.pad_id
        self.image_id, self.has_image = backend.image_id, backend.has_image
        self.tokens, self.named = tuple(backend.tokens), dict(backend.named)
        self.vocab_size = len(self.tokens)
        self.fingerprint = backend.fingerprint

    @property
    def begin(self) -> tuple[int, ...]:
        """What a sequence begins with: the begin token, or nothing."""
        return () if self.bos_id is None else (self.bos_id,)

    @property
    def gap(self) -> str:
        """What stands between a begin token written as text and a text with its own ids.

        A tokenizer that marks spaces puts a mark before a text, but not after a special token.
        """
        alone = self.encode("a") == self.encode("a", at_start=False)
        return "" if alone else " "

    def special_id(self, token: str) -> int | None:
        """Id of a token that is cut out of texts whole; None where there is no such token."""
        return self._backend.special.get(token)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        path: str | Path,
        *,
        vocab_size: int,
        max_sentence_bytes: int = 65536,
    ) -> "TextTokenizer":
        """A byte-fallback BPE tokenizer trained on ``texts`` and written to ``path``.

        The same texts give the same file. ``<image>`` is a symbol of its own.

        Args:
            texts: training text; an item is one sentence.
            path: model file to write.
            vocab_size: largest number of ids (fewer when the texts do not hold more pieces).
            max_sentence_bytes: longer texts are left out by SentencePiece.

        Raises:
            DataError: SentencePiece cannot train on these texts.
        """
        writer = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=writer,
                model_type="bpe",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                byte_fallback=True,
                character_coverage=1.0,
                split_digits=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                user_defined_symbols=[IMAGE_TOKEN],
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
                num_threads=1,
                max_sentence_length=max_sentence_bytes,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise DataError(
                f"SentencePiece cannot train a tokenizer of {vocab_size} ids on these texts: "
                f"{error}; 300 is about the least (256 bytes and the characters in use)"
            ) from error
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(writer.getvalue())
        return cls(target)

    def encode(self, text: str, *, at_start: bool = True) -> list[int]:
        """Token ids of ``text``, without BOS or EOS.

        Args:
            text: may contain ``<image>`` and control tokens, which become their single id.
            at_start: whether the text begins a sequence (then it gets the leading space marker);
                false for text that continues one.
        """
        return self._backend.encode(text, at_start=at_start)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens and without one leading space."""
        return self._backend.decode([int(i) for i in ids]).removeprefix(" ")

    def document(self, *, with_image: bool) -> bytes:
        """Content of the file for an export.

        Args:
            with_image: a ``tokenizer.json`` gains ``<image>`` where it does not have it (a
                SentencePiece model never does: its stock tokenizer is built elsewhere).
        """
        return self._backend.document(with_image=with_image)


def tokenizer_file(path: str | Path) -> Path:
    """The file that ``model.text_tokenizer`` means.

    Raises:
        DataError: a folder holds none, or only one that lacks tokens of the model.
    """
    found = Path(path)
    if not found.is_dir():
        return found
    if (found / SENTENCEPIECE_MODEL).is_file():
        return found / SENTENCEPIECE_MODEL
    if (found / TOKENIZER_JSON).is_file():
        return found / TOKENIZER_JSON
    raise DataError(
        f"model.text_tokenizer={path} holds neither {SENTENCEPIECE_MODEL} nor {TOKENIZER_JSON}; "
        "give the folder of the language model"
    )


def _check_added(file: Path, tokens: Sequence[str | None]) -> None:
    """Refuse a model beside which files add tokens that it does not have (padding is no loss)."""
    known = dict(enumerate(tokens))
    settings = read_settings(file.parent)
    pad = text_of(settings.get("pad_token", ""))
    for i, entry in settings.get("added_tokens_decoder", {}).items():
        token = text_of(entry)
        if token not in (pad, "<pad>", known.get(int(i))):
            raise DataError(
                f"{file.parent} adds {token!r} as id {i}, which {file.name} does not have there; "
                f"set model.text_tokenizer to the folder's {TOKENIZER_JSON}"
            )
