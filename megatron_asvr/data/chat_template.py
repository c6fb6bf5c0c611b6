"""Hugging Face chat templates (Jinja) as conversation templates.

They are rendered as transformers does it, in a sandbox. What the assistant says is found by
rendering: the text up to an answer must be the beginning of the text with it, and that the
beginning of the whole. A template that rewrites what was said earlier (one that takes the reasoning
out of old answers, say) has no such prefixes and is refused.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_asvr.data.conversation import FLATTEN, Piece, Turn, user_text
from megatron_asvr.data.hub_text import read_settings
from megatron_asvr.data.text import IMAGE_TOKEN, TextTokenizer
from megatron_asvr.errors import ConfigError, DataError

TEMPLATE_FILE = "chat_template.jinja"
_USER, _ANSWER, _AGAIN = "What is this?", "A circle.", "Is it big?"
_PROBE = (
    Turn("user", f"{IMAGE_TOKEN}\n{_USER}"),
    Turn("assistant", _ANSWER),
    Turn("user", _AGAIN),
    Turn("assistant", "No."),
)


class ChatTemplate:
    """A Jinja chat template for one tokenizer; see `Template` of conversation.py.

    Args:
        source: the Jinja text.
        tokenizer: its ``named`` tokens are the template's variables.
        where: where the template is from, for messages.

    Raises:
        ConfigError: it cannot be rendered, depends on the date, loses an image or a word, rewrites
            earlier turns, or ends no answer with a special token.
    """

    def __init__(self, source: str, tokenizer: TextTokenizer, *, where: Path) -> None:
        self.text, self._where, self._tokenizer = source, where, tokenizer
        if "strftime_now" in source:
            raise self._refused(
                "writes today's date, so that the same sample would change with the day; copy it "
                "to a .jinja file with a fixed date"
            )
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise self._refused(f"is no Jinja template: {error}") from error
        self._names = dict(tokenizer.named)
        self._begin = "" if tokenizer.bos_id is None else str(tokenizer.tokens[tokenizer.bos_id])
        self._as_list = not self._takes_text()
        try:
            pieces = self.pieces(_PROBE, prompt=False)
        except DataError as error:
            raise ConfigError(str(error)) from error
        whole = "".join(piece.text for piece in pieces)
        if whole.count(IMAGE_TOKEN) != 1 or _USER not in whole:
            raise self._refused(f"loses {IMAGE_TOKEN} or words of a turn: {whole!r}")
        self.end_id = self._end_of(next(piece.text for piece in pieces if piece.supervised))

    def pieces(self, turns: Sequence[Turn], *, prompt: bool) -> list[Piece]:
        """See `Template`.

        Raises:
            DataError: the template refuses the conversation, or has no stable prefixes for it.
        """
        whole = self._render(turns, prompt)
        found, done = [], 0
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before = self._render(turns[:number], True) if number else ""
            said = self._render(turns[: number + 1], False)
            if not (said.startswith(before) and whole.startswith(said) and len(before) >= done):
                raise DataError(
                    f"the chat template {self._where} rewrites earlier turns (the text up to an "
                    "answer is not the beginning of the text with it), so the words to learn "
                    "cannot be told; use another data.template, such as chatml, or a copy of it "
                    "that leaves earlier turns alone"
                )
            answer = said[len(before) :]
            kept = answer.rstrip()
            found += [Piece(whole[done : len(before)], False), Piece(kept, True)]
            done = len(before) + len(kept)
        return [*found, Piece(whole[done:], False)]

    def chat_template(self, *, with_begin: bool) -> str:
        """See `Template`."""
        if with_begin:
            gap = "' '" if self._tokenizer.gap else "''"
            if not self._rendered(_PROBE, False, self._names).startswith(self._begin):
                return _after("{{ bos_token + " + gap + " }}", self.text)
            if self._tokenizer.gap and self._begin:
                return _after("{% set bos_token = bos_token + ' ' %}", self.text)
            return self.text
        begin = "{% set bos_token = '' %}" if self._begin else ""
        before = begin + ("" if self._as_list else FLATTEN)
        return _after(before, self.text) if before else self.text

    def _render(self, turns: Sequence[Turn], prompt: bool) -> str:
        """The text without the begin token that the tokenizer puts before it."""
        names = self._names | ({"bos_token": ""} if self._begin else {})
        text = self._rendered(turns, prompt, names)
        return text.removeprefix(self._begin) if self._begin else text

    def _rendered(self, turns: Sequence[Turn], prompt: bool, names: dict[str, str]) -> str:
        messages = [{"role": t.role, "content": self._content(t)} for t in turns]
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
                **names,
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise DataError(
                f"the chat template {self._where} refuses a conversation of "
                f"{', '.join(t.role for t in turns)}: {error}"
            ) from error

    def _content(self, turn: Turn) -> str | list[dict[str, str]]:
        text = user_text(turn) if turn.role == "user" else turn.text
        if not self._as_list:
            return text
        texts = [part.strip("\n") for part in text.split(IMAGE_TOKEN)]
        parts: list[dict[str, str]] = []
        for number, part in enumerate(texts):
            parts += [{"type": "image"}] if number else []
            parts += [{"type": "text", "text": part}] if part else []
        return parts

    def _takes_text(self) -> bool:
        """Whether a message's content is text, not a list of texts and images."""
        self._as_list = False
        try:
            text = self._render(_PROBE[:1], True)
        except DataError:
            return False
        return _USER in text and text.count(IMAGE_TOKEN) == 1

    def _end_of(self, answer: str) -> int:
        """The token that ends the first answer of the probe."""
        rest = answer.rpartition(_ANSWER)[2].strip()
        ids = self._tokenizer.encode(rest, at_start=False) if rest else []
        if len(ids) != 1 or self._tokenizer.special_id(rest) is None:
            raise self._refused(
                f"puts {rest!r} after an answer, which is not one special token of "
                f"model.text_tokenizer={self._tokenizer.path}: a model could not learn to stop"
            )
        return ids[0]

    def _refused(self, why: str) -> ConfigError:
        return ConfigError(f"the chat template {self._where} {why}")


def template_beside(file: Path) -> str:
    """The chat template in the folder of a tokenizer's file.

    Raises:
        ConfigError: there is none.
    """
    path = file.parent / TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = read_settings(file.parent).get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    if not found:
        raise ConfigError(
            f"data.template=tokenizer, but there is no chat template beside {file} "
            f"({TEMPLATE_FILE}, or chat_template in tokenizer_config.json); choose another template"
        )
    return found


def _after(before: str, text: str) -> str:
    """Jinja text that begins a line, as it did before: a line end after a block is not rendered."""
    return before + "{% set begun = true %}\n" + text


class _Generation(Extension):
    """``{% generation %}``, with which some templates mark what the assistant says: its content."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment in which transformers renders, without its clock."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    made.filters["tojson"] = lambda x, **options: json.dumps(
        x, **({"ensure_ascii": False} | options)
    )
    made.globals["raise_exception"] = _raise
    return made


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
