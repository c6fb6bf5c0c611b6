"""A ``tokenizer.json`` of Hugging Face (Llama 3, Qwen, SmolLM2): its ids and special tokens.

The ids are those of transformers' PreTrainedTokenizerFast for the same folder: the file itself goes
through the library that transformers uses, and what ``tokenizer_config.json`` (in older folders
``special_tokens_map.json`` and ``added_tokens.json``) says beyond it is added in the same order.
AutoTokenizer gives the same ids, unless the folder names a class that transformers 5 builds without
the file's rules (GPT2Tokenizer: spaces before digits). The model learned with the file.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from megatron_asvr.errors import DataError

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
# The order in which transformers adds those that the vocabulary lacks.
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_EXTRA = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class HubTokenizer:
    """What `TextTokenizer` needs of a ``tokenizer.json``.

    Args:
        file: the file; what lies beside it is read too.
        image_token: added as the next id where the vocabulary does not have it.

    Attributes:
        tokens: the token of every id; None where an id has none.
        named: the texts of ``bos_token``, ``eos_token``, ... as chat templates see them.
        bos_id: the token that is put before every text, None where none is.
        eos_id: the end of a text.
        pad_id: padding; the end token where there is none of its own (never attended).
        special: ids of the tokens that are cut out of a text before all else.
        has_image: whether the folder itself has the image token.
        fingerprint: hash of all that the ids depend on.

    Raises:
        DataError: a file is damaged, or the tokenizer has no end token or closes texts itself.
    """

    def __init__(self, file: Path, image_token: str) -> None:
        self._file, self._config = file, read_settings(file.parent)
        try:
            self._raw = file.read_bytes()
            self._tokenizer = Tokenizer.from_buffer(self._raw)
        except Exception as error:  # the library raises plain Exceptions
            raise DataError(f"model.text_tokenizer={file} cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.named = {
            name: text_of(self._config[name]) for name in _NAMED if self._config.get(name)
        }
        self._add_tokens()
        self.has_image = self._tokenizer.token_to_id(image_token) is not None
        self._tokenizer.add_special_tokens([AddedToken(image_token, normalized=False)])
        self.image_id = self._tokenizer.token_to_id(image_token)
        vocabulary = {i: token for token, i in self._tokenizer.get_vocab().items()}
        self.tokens = [vocabulary.get(i) for i in range(max(vocabulary) + 1)]
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items()}
        self.bos_id = self._begin()
        self.eos_id = self._id_of("eos_token")
        self.pad_id = self._id_of("pad_token") if "pad_token" in self.named else self.eos_id
        self._image_token = image_token
        # Tokenizers with a marker for spaces put one before a text, but not inside of it.
        self._anchored = self._ids("a") != self._ids(f"{image_token}a")[1:]
        facts = json.dumps(self._facts(), sort_keys=True).encode()
        self.fingerprint = hashlib.sha256(hashlib.sha256(self._raw).digest() + facts).hexdigest()

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        """Token ids of ``text``; see `TextTokenizer.encode`."""
        if at_start or not self._anchored:
            return self._ids(text)
        return self._ids(self._image_token + text)[1:]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens."""
        return self._tokenizer.decode(
            [i for i in ids if 0 <= i < len(self.tokens)], skip_special_tokens=True
        )

    def document(self, *, with_image: bool) -> bytes:
        """The file as it came, or with the image token; see `TextTokenizer.document`."""
        if self.has_image or not with_image:
            return self._raw
        return self._tokenizer.to_str(pretty=True).encode()

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _add_tokens(self) -> None:
        """Register what the settings name and the file does not, as transformers does."""
        listed = self._config.get("added_tokens_decoder", {})
        known = {t.content for t in self._tokenizer.get_added_tokens_decoder().values()}
        for i in sorted(listed, key=int):
            flags = {name: bool(listed[i].get(name, False)) for name in _FLAGS}
            token = text_of(listed[i])
            if token not in known:
                self._tokenizer.add_tokens([AddedToken(token, **flags)])
            if self._tokenizer.token_to_id(token) != int(i):
                raise DataError(
                    f"{self._file.parent}: {TOKENIZER_CONFIG} gives {token!r} the id {i}, "
                    f"{TOKENIZER_JSON} {self._tokenizer.token_to_id(token)}; restore both files"
                )
        extra: list[str] = []
        for name in _EXTRA:
            values = self._config.get(name) or []
            extra += map(text_of, values.values() if isinstance(values, dict) else values)
        for token in (*self.named.values(), *extra):
            self._tokenizer.add_special_tokens([AddedToken(token, normalized=False)])

    def _begin(self) -> int | None:
        """The token that the file's post-processor puts before every text.

        ``add_bos_token`` in the settings counts for nothing where there is such a file
        (transformers 5.23, tokenization_utils_base.py).
        """
        bare, whole = self._ids("a"), self._tokenizer.encode("a").ids
        start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        before, ends = whole[:start], whole[start + len(bare) :]
        if ends or len(before) > 1:
            raise DataError(
                f"model.text_tokenizer={self._file} puts more around a text than one begin token; "
                "a prompt could not be continued. Take the end token out of its post_processor"
            )
        return before[0] if before else None

    def _id_of(self, name: str) -> int:
        if name not in self.named:
            raise DataError(
                f"model.text_tokenizer={self._file}: {TOKENIZER_CONFIG} beside it names no {name}; "
                "give the folder of the language model"
            )
        return self._tokenizer.token_to_id(self.named[name])

    def _facts(self) -> dict[str, Any]:
        keys = (*_NAMED, *_EXTRA, "added_tokens_decoder")
        return {key: self._config[key] for key in keys if key in self._config}


def read_settings(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` with what older folders keep in files of their own.

    Raises:
        DataError: a file is no JSON object.
    """
    config = _read(folder / TOKENIZER_CONFIG)
    if "added_tokens_decoder" in config:
        return config
    config |= _read(folder / SPECIAL_TOKENS)
    added = _read(folder / ADDED_TOKENS)
    if added:
        named = {text_of(config[name]) for name in _NAMED if config.get(name)}
        config["added_tokens_decoder"] = {
            str(i): {"content": token, "special": token in named, "normalized": token not in named}
            for token, i in added.items()
        }
    return config


def text_of(token: Any) -> str:
    """The text of a token that a JSON file gives as such, or as an object with its flags."""
    return token["content"] if isinstance(token, dict) else str(token)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}; wanted an object")
    return value
