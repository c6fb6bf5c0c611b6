"""Text to token ids with SentencePiece, the same ids as Hugging Face's LlamaTokenizer.

The rule of LlamaTokenizer (``legacy=False``), followed here so that a trained model meets the ids
it was trained on: text is split at special symbols (control tokens and ``<image>``); spaces become
U+2581; only the very beginning of a text gets one in front, never the text after a special symbol.
SentencePiece's own dummy prefix cannot do that, so it is switched off in the loaded model.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from megatron_asvr.errors import DataError

IMAGE_TOKEN = "<image>"
SPACE = "\u2581"  # how SentencePiece writes a space

# ModelProto field 3 (normalizer_spec) with add_dummy_prefix (3) and remove_extra_whitespaces (4)
# set to false. Protobuf merges a repeated message into the earlier one, so appending these bytes
# to a serialised model overrides the two settings and nothing else.
_NO_DUMMY_PREFIX = b"\x1a\x04\x18\x00\x20\x00"


class TextTokenizer:
    """A SentencePiece model and the ids of its special tokens.

    Attributes:
        path: the model file.
        bos_id: begin of sequence.
        eos_id: end of an answer.
        pad_id: padding; the unknown token where the model has none of its own (never attended).
        image_id: ``<image>``; the first id after the vocabulary where the model does not have it.
        vocab_size: ids in use, ``<image>`` included.
        fingerprint: hash of the model file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            model = self.path.read_bytes()
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
        except OSError as error:
            raise DataError(f"model.text_tokenizer={path} cannot be read: {error}") from error
        except RuntimeError as error:
            raise DataError(
                f"model.text_tokenizer={path} is not a SentencePiece model ({len(model)} bytes); "
                "give the tokenizer.model file of the language model"
            ) from error
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.bos_id, self.eos_id = self._sp.bos_id(), self._sp.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise DataError(f"model.text_tokenizer={path} has no <s> or no </s>; both are needed")
        pieces = [self._sp.id_to_piece(i) for i in range(self._sp.get_piece_size())]
        self.image_id = pieces.index(IMAGE_TOKEN) if IMAGE_TOKEN in pieces else len(pieces)
        self.vocab_size = max(len(pieces), self.image_id + 1)
        self.pad_id = self._sp.pad_id() if self._sp.pad_id() >= 0 else self._sp.unk_id()
        control = (
            i for i in range(len(pieces)) if self._sp.is_control(i) or self._sp.is_unknown(i)
        )
        self._special = {pieces[i]: i for i in control} | {IMAGE_TOKEN: self.image_id}
        self._text_ids = frozenset(range(len(pieces))) - set(self._special.values())
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

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
        ids: list[int] = []
        for number, piece in enumerate(self._split.split(text)):
            if number % 2:
                ids.append(self._special[piece])
            elif piece:
                leads = at_start and number == 0 and not piece.startswith((" ", SPACE))
                ids.extend(self._sp.encode(SPACE + piece if leads else piece))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens and without one leading space."""
        text = self._sp.decode([int(i) for i in ids if int(i) in self._text_ids])
        return text.removeprefix(" ")
