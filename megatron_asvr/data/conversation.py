"""Conversation templates: turns in, text pieces with their supervision out.

One table of templates serves training, generation and the Jinja chat template of the Hugging Face
export, so that the three cannot drift apart. Loss is on the assistant's words and the end token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_asvr.data.text import IMAGE_TOKEN, TextTokenizer
from megatron_asvr.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Turn:
    """One utterance; ``text`` is stripped and holds its ``<image>`` placeholders in place."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class Segment:
    """Token ids that are all supervised or all not; ``<image>`` is one id, not yet expanded."""

    ids: tuple[int, ...]
    supervised: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """The text around the turns.

    Attributes:
        system: text before the first turn.
        user: put before the user's text.
        assistant: put before the assistant's text; a generation prompt ends with it.
        gap: between ``assistant`` and the answer; part of what the model has to produce.
        keep_user_text: false keeps only the images of the user's turn (captioning).
    """

    system: str = ""
    user: str = ""
    assistant: str = ""
    gap: str = ""
    keep_user_text: bool = True


TEMPLATES = {
    "vicuna_v1": Template(
        system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        ),
        user="USER: ",
        assistant=" ASSISTANT:",
        gap=" ",
    ),
    "vicuna_short": Template(user="USER: ", assistant=" ASSISTANT:", gap=" "),
    "plain": Template(keep_user_text=False),
}


def find_template(name: str) -> Template:
    """The template called ``name``.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"data.template={name!r} is unknown; use {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


def user_text(turn: Turn, template: Template) -> str:
    """The user's text as the template shows it.

    A single image goes to the front of its turn, as LLaVA does; several stay where they are.
    """
    count = turn.text.count(IMAGE_TOKEN)
    if not template.keep_user_text:
        return IMAGE_TOKEN * count
    if count != 1:
        return turn.text
    words = turn.text.replace(IMAGE_TOKEN, " ").strip()
    return f"{IMAGE_TOKEN}\n{words}" if words else IMAGE_TOKEN


def render(
    turns: Sequence[Turn], template: Template, tokenizer: TextTokenizer, *, prompt: bool = False
) -> list[Segment]:
    """The conversation as segments, without BOS.

    Args:
        turns: in order.
        template: from :func:`find_template`.
        tokenizer: gives the ids.
        prompt: add the words that make the assistant answer, after a last user turn.
    """
    segments: list[Segment] = []
    pending = template.system  # unsupervised text is encoded in one call, as one text

    def flush() -> None:
        nonlocal pending
        if pending:
            ids = tokenizer.encode(pending, at_start=not segments)
            segments.append(Segment(tuple(ids), supervised=False))
            pending = ""

    for turn in turns:
        if turn.role == "user":
            pending += template.user + user_text(turn, template)
            continue
        pending += template.assistant
        flush()
        ids = tokenizer.encode(template.gap + turn.text, at_start=not segments)
        segments.append(Segment((*ids, tokenizer.eos_id), supervised=True))
    if prompt:
        pending += template.assistant
    flush()
    return segments


def prompt_ids(
    turns: Sequence[Turn], template: Template, tokenizer: TextTokenizer
) -> tuple[int, ...]:
    """BOS and the ids of a conversation that waits for the assistant's next answer."""
    segments = render(turns, template, tokenizer, prompt=True)
    return (tokenizer.bos_id, *(i for segment in segments for i in segment.ids))


def prompt_text(turn: Turn, template: Template) -> str:
    """The text that asks one question, each image as one placeholder, without BOS."""
    return template.system + template.user + user_text(turn, template) + template.assistant


def chat_template(name: str) -> str:
    """The same text as a Jinja chat template for Hugging Face (BOS is the tokenizer's affair).

    Messages hold a string, or a list of ``{"type": "image"}`` and ``{"type": "text", "text": ..}``;
    listed images go to the front of their turn.
    """
    template = find_template(name)
    words = "{{ ns.text }}" if template.keep_user_text else ""
    newline = "\\n" if template.keep_user_text else ""
    return (
        "{{ " + _jinja_string(template.system) + " }}"
        "{% for message in messages %}"
        "{% set ns = namespace(text='', images=0) %}"
        "{% if message['content'] is string %}{% set ns.text = message['content'] %}"
        "{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{% set ns.text = ns.text + part['text'] %}"
        "{% elif part['type'] == 'image' %}{% set ns.images = ns.images + 1 %}{% endif %}"
        "{% endfor %}{% endif %}"
        "{% set ns.text = ns.text | trim %}"
        "{% if message['role'] == 'user' %}"
        "{{ " + _jinja_string(template.user) + " }}"
        "{% for i in range(ns.images) %}"
        f"{{{{ '{IMAGE_TOKEN}' }}}}"
        "{% if not loop.last or ns.text %}{{ '" + newline + "' }}{% endif %}"
        "{% endfor %}" + words + "{% else %}"
        "{{ " + _jinja_string(template.assistant + template.gap) + " + ns.text + eos_token }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ " + _jinja_string(template.assistant) + " }}{% endif %}"
    )


def _jinja_string(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
