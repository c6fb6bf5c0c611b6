"""Conversations: turns in, text pieces with their supervision out, and their ids.

A `Template` writes a conversation; `templates.py` has the known ones and `chat_template.py` those
of Hugging Face folders. Each serves training, generation and the chat template of the Hugging Face
export, so that the three cannot drift apart. Loss is on the assistant's words and the token that
ends them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_asvr.data.text import IMAGE_TOKEN, TextTokenizer


@dataclass(frozen=True, slots=True)
class Turn:
    """One utterance; ``text`` is stripped and holds its ``<image>`` placeholders in place."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is all supervised or all not."""

    text: str
    supervised: bool


@dataclass(frozen=True, slots=True)
class Segment:
    """Token ids that are all supervised or all not; ``<image>`` is one id, not yet expanded."""

    ids: tuple[int, ...]
    supervised: bool


class Template(Protocol):
    """A way of writing conversations, for one tokenizer.

    Attributes:
        end_id: the token that ends an answer.
        text: all that the way of writing depends on, to tell two of them apart.
    """

    end_id: int
    text: str

    def pieces(self, turns: Sequence[Turn], *, prompt: bool) -> list[Piece]:
        """The conversation's text, without the begin token that the tokenizer puts before it.

        Args:
            turns: in order.
            prompt: add the words that make the assistant answer, after a last user turn.
        """
        ...

    def chat_template(self, *, with_begin: bool) -> str:
        """The same text as a Jinja chat template for Hugging Face.

        Args:
            with_begin: write the begin token, for ``tokenizer.apply_chat_template``, which puts
                none; a processor puts it itself. Only then are images left out of account.
        """
        ...


def user_text(turn: Turn, *, keep_words: bool = True) -> str:
    """The user's text as templates show it.

    A single image goes to the front of its turn, as LLaVA does; several stay where they are.
    """
    count = turn.text.count(IMAGE_TOKEN)
    if not keep_words:
        return IMAGE_TOKEN * count
    if count != 1:
        return turn.text
    words = turn.text.replace(IMAGE_TOKEN, " ").strip()
    return f"{IMAGE_TOKEN}\n{words}" if words else IMAGE_TOKEN


def render(
    turns: Sequence[Turn], template: Template, tokenizer: TextTokenizer, *, prompt: bool = False
) -> list[Segment]:
    """The conversation as segments, without the begin token.

    Args:
        turns: in order.
        template: from `templates.find_template`.
        tokenizer: gives the ids.
        prompt: add the words that make the assistant answer, after a last user turn.
    """
    joined: list[Piece] = []  # neighbours of one kind are encoded in one call, as one text
    for piece in template.pieces(turns, prompt=prompt):
        if joined and joined[-1].supervised == piece.supervised:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.supervised)
        elif piece.text:
            joined.append(piece)
    return [
        Segment(tuple(tokenizer.encode(piece.text, at_start=number == 0)), piece.supervised)
        for number, piece in enumerate(joined)
    ]


def prompt_ids(
    turns: Sequence[Turn], template: Template, tokenizer: TextTokenizer
) -> tuple[int, ...]:
    """The ids of a conversation that waits for the assistant's next answer, begin token first."""
    segments = render(turns, template, tokenizer, prompt=True)
    return (*tokenizer.begin, *(i for segment in segments for i in segment.ids))


def prompt_text(turns: Sequence[Turn], template: Template) -> str:
    """The text of `prompt_ids`, each image as one placeholder, without a begin token."""
    return "".join(piece.text for piece in template.pieces(turns, prompt=True))


# Jinja: the messages with plain text as content, placeholders where their images are: in front of
# a turn with a single one, as `user_text` does.
FLATTEN = (
    "{% set ns = namespace(messages=[]) %}{% for message in messages %}"
    "{% set part = namespace(text='') %}"
    "{% if message['content'] is string %}{% set part.text = message['content'] %}"
    "{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}"
    f"{{% set leads = not part.text.replace('{IMAGE_TOKEN}\\n', '') %}}"
    f"{{% set part.text = part.text + ('{IMAGE_TOKEN}\\n' if leads else '{IMAGE_TOKEN}') %}}"
    "{% elif item['type'] == 'text' %}{% set part.text = part.text + item['text'] %}"
    "{% endif %}{% endfor %}{% endif %}"
    "{% set text = part.text | trim %}"
    f"{{% if message['role'] == 'user' and text.count('{IMAGE_TOKEN}') == 1 %}}"
    f"{{% set words = text.replace('{IMAGE_TOKEN}', ' ') | trim %}}"
    f"{{% set text = '{IMAGE_TOKEN}' + ('\\n' + words if words else '') %}}{{% endif %}}"
    "{% set ns.messages = ns.messages + [dict(message, content=text)] %}"
    "{% endfor %}{% set messages = ns.messages %}"
)
