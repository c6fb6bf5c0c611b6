"""The templates that ``data.template`` can name: a table, and a way to those of others."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_asvr.data.chat_template import ChatTemplate, template_beside
from megatron_asvr.data.conversation import FLATTEN, Piece, Template, Turn, render, user_text
from megatron_asvr.data.text import IMAGE_TOKEN, TextTokenizer
from megatron_asvr.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Wording:
    """The text around the turns.

    Attributes:
        system: text before the first turn.
        user: put before the user's text.
        user_end: put after the user's text.
        assistant: put before the assistant's text; a generation prompt ends with it.
        gap: between ``assistant`` and the answer; part of what the model has to produce.
        end: the token that ends an answer; the tokenizer's end token where it is empty.
        after: put after that token, not supervised.
        keep_user_text: false keeps only the images of the user's turn (captioning).
    """

    system: str = ""
    user: str = ""
    user_end: str = ""
    assistant: str = ""
    gap: str = ""
    end: str = ""
    after: str = ""
    keep_user_text: bool = True


TEMPLATES = {
    "vicuna_v1": Wording(
        system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        ),
        user="USER: ",
        assistant=" ASSISTANT:",
        gap=" ",
    ),
    "vicuna_short": Wording(user="USER: ", assistant=" ASSISTANT:", gap=" "),
    "plain": Wording(keep_user_text=False),
    "mistral": Wording(user="[INST] ", user_end=" [/INST]", gap=" "),
    "llama3": Wording(
        user="<|start_header_id|>user<|end_header_id|>\n\n",
        user_end="<|eot_id|>",
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
    ),
    "chatml": Wording(
        system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        user="<|im_start|>user\n",
        user_end="<|im_end|>\n",
        assistant="<|im_start|>assistant\n",
        end="<|im_end|>",
        after="\n",
    ),
}
FROM_TOKENIZER = "tokenizer"  # data.template: the chat template of the tokenizer's folder
_PROBE = (
    Turn("user", f"What is this? {IMAGE_TOKEN}"),
    Turn("assistant", "A red (small) circle"),
    Turn("user", "Is it big?"),
    Turn("assistant", "42 is no answer."),
)


def find_template(name: str, tokenizer: TextTokenizer) -> Template:
    """The template that ``data.template`` means, for one tokenizer.

    Args:
        name: one of ``TEMPLATES``, "tokenizer", or the path of a ``.jinja`` file.
        tokenizer: of the language model.

    Raises:
        ConfigError: there is none of that name, or it does not work with this tokenizer.
    """
    template: Template
    if name in TEMPLATES:
        template = Written(name, tokenizer)
    elif name == FROM_TOKENIZER:
        template = ChatTemplate(template_beside(tokenizer.path), tokenizer, where=tokenizer.path)
    elif name.endswith(".jinja"):
        template = ChatTemplate(_read(name), tokenizer, where=Path(name))
    else:
        known = ", ".join(sorted(TEMPLATES))
        raise ConfigError(
            f"data.template={name!r} is unknown; use {known}, {FROM_TOKENIZER} (the chat template "
            "of model.text_tokenizer's folder) or the path of a .jinja file"
        )
    _check_joins(name, template, tokenizer)
    return template


class Written:
    """A template of the table; see `Template`."""

    def __init__(self, name: str, tokenizer: TextTokenizer) -> None:
        self.text, self._wording = name, TEMPLATES[name]
        self._tokenizer = tokenizer
        words = self._wording
        around = words.system + words.user + words.user_end + words.assistant + words.end
        for token in dict.fromkeys(re.findall(r"<\|\w+\|>", around)):
            if tokenizer.special_id(token) is None:
                raise ConfigError(
                    f"data.template={name!r} needs the token {token!r}, which model.text_tokenizer="
                    f"{tokenizer.path} does not have; use the template that the language model "
                    f"was trained with (data.template={FROM_TOKENIZER}, if its folder has one)"
                )
        self._end = words.end or str(tokenizer.tokens[tokenizer.eos_id])
        found = tokenizer.special_id(self._end)
        self.end_id = tokenizer.eos_id if found is None else found

    def pieces(self, turns: Sequence[Turn], *, prompt: bool) -> list[Piece]:
        """See `Template`."""
        words = self._wording
        found = [Piece(words.system, False)]
        for turn in turns:
            if turn.role == "user":
                text = words.user + user_text(turn, keep_words=words.keep_user_text)
                found.append(Piece(text + words.user_end, False))
            else:
                found.append(Piece(words.assistant, False))
                found.append(Piece(words.gap + turn.text + self._end, True))
                found.append(Piece(words.after, False))
        if prompt:
            found.append(Piece(words.assistant, False))
        return found

    def chat_template(self, *, with_begin: bool) -> str:
        """See `Template`."""
        words = self._wording
        begin = ""
        if with_begin and self._tokenizer.begin:
            begin = "{{ bos_token + " + _jinja(self._tokenizer.gap) + " }}"
        said = "message['content']"
        if not words.keep_user_text:
            said = f"'{IMAGE_TOKEN}' * message['content'].count('{IMAGE_TOKEN}')"
        return (
            FLATTEN + begin + "{{ " + _jinja(words.system) + " }}"
            "{% for message in messages %}{% if message['role'] == 'user' %}"
            "{{ " + _jinja(words.user) + " + " + said + " + "
            "" + _jinja(words.user_end) + " }}{% else %}"
            "{{ " + _jinja(words.assistant + words.gap) + " + message['content'] + "
            "" + _jinja(self._end + words.after) + " }}"
            "{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ " + _jinja(words.assistant) + " }}{% endif %}"
        )


def _check_joins(name: str, template: Template, tokenizer: TextTokenizer) -> None:
    """Return when pieces have the ids of the whole text, which is what transformers encodes."""
    apart = [i for s in render(_PROBE, template, tokenizer) for i in s.ids]
    whole = "".join(piece.text for piece in template.pieces(_PROBE, prompt=False))
    if apart != tokenizer.encode(whole):
        raise ConfigError(
            f"data.template={name!r}: model.text_tokenizer={tokenizer.path} joins the end of a "
            "prompt with the first characters of the answer into one token, so that no prompt "
            "could ask for what was trained; end the prompt with a special token or a new line"
        )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.template={path!r} cannot be read: {error}") from error


def _jinja(text: str) -> str:
    """``text`` as a Jinja literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
