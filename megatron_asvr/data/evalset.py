"""Questions with reference answers, each to be asked alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_asvr.config.schema import SourceConfig
from megatron_asvr.data.conversation import Turn
from megatron_asvr.data.records import read_records
from megatron_asvr.data.text import IMAGE_TOKEN
from megatron_asvr.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalItem:
    """One question.

    Attributes:
        id: the record's id, with the question's number where it holds several.
        turns: what has been said so far; the last turn is the question. In a dialogue the earlier
            answers are the reference ones.
        images: paths of the images shown in ``turns``.
        reference: the wanted answer.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    reference: str

    @property
    def question(self) -> str:
        """The question's words."""
        return self.turns[-1].text.replace(IMAGE_TOKEN, " ").strip()


def read_questions(sources: Sequence[SourceConfig]) -> list[EvalItem]:
    """Every answered question of LLaVA-format files, in order.

    Conversations of one record are independent; none sees another.

    Raises:
        DataError: a file or record has the wrong form, or nothing is asked.
    """
    items = []
    for record in read_records(sources):
        asked = [
            (turns, place)
            for turns in record.conversations
            for place in range(1, len(turns))
            if turns[place].role == "assistant"
        ]
        for number, (turns, place) in enumerate(asked):
            so_far = turns[:place]
            shown = sum(turn.text.count(IMAGE_TOKEN) for turn in so_far)
            items.append(
                EvalItem(
                    id=record.id if len(asked) == 1 else f"{record.id}#{number}",
                    turns=so_far,
                    images=record.images[:shown],
                    reference=turns[place].text,
                )
            )
    if not items:
        files = ", ".join(source.path for source in sources)
        raise DataError(f"{files}: no question with an answer; nothing can be evaluated")
    return items
