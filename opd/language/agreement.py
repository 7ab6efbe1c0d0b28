"""What student and teacher must share: a tokenizer, a common vocabulary, and a way to end."""

from __future__ import annotations

from collections.abc import Sequence

from opd.errors import IncompatibleError
from opd.language.model import LanguageModel

PROBE = "Zoë paid 3.50 for 12 apples;\n  then left.\t<b>ok</b>"
"""Two tokenizers of one vocabulary are the same when they split this alike."""


def check_tokenizers(student: LanguageModel, teacher: LanguageModel, which: str) -> None:
    """Refuse a teacher whose tokenizer gives other ids; extra ids on one side only are allowed."""
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    by_id = {i: token for token, i in theirs.items()}
    common = min(len(ours), len(theirs))
    different = [(i, token, by_id.get(i)) for token, i in ours.items() if i < common and by_id.get(i) != token]
    if different:
        i, mine, other = min(different)
        raise IncompatibleError(
            f"{which} has another tokenizer than the student: {len(different)} of {common} ids differ (id {i} is "
            f"{mine!r} here and {other!r} there). Use a teacher of the student's family"
        )
    if student.tokenizer(PROBE)["input_ids"] != teacher.tokenizer(PROBE)["input_ids"]:
        raise IncompatibleError(
            f"{which} has the student's vocabulary but splits text differently; use the student's tokenizer for both "
            "(teacher.tokenizer)"
        )


def common_vocabulary(models: Sequence[LanguageModel]) -> int:
    """The number of leading ids that every head has: padded vocabularies of different sizes are cut to the smallest."""
    return min(int(model.base.get_output_embeddings().weight.shape[0]) for model in models)


def end_ids(model: LanguageModel) -> set[int]:
    """Ids that end a completion for this model: its generation config's, and its tokenizer's."""
    found: set[int] = set()
    config = getattr(model.base, "generation_config", None)
    for value in (getattr(config, "eos_token_id", None), model.tokenizer.eos_token_id):
        found |= set(value) if isinstance(value, list | tuple) else ({value} if value is not None else set())
    return found


def agree_on_end(
    student: LanguageModel, teachers: Sequence[tuple[str, LanguageModel]], given: Sequence[int] | None
) -> tuple[int, ...]:
    """The ids that end a completion: those given, or the student's, if every teacher can end that way too."""
    chosen = set(given) if given is not None else end_ids(student)
    if not chosen:
        raise IncompatibleError("the student names no end-of-text id; set end_tokens in the recipe to a list of ids")
    for which, teacher in teachers:
        theirs = end_ids(teacher)
        if given is None and theirs and not chosen & theirs:
            raise IncompatibleError(
                f"the student ends a completion with id {sorted(chosen)} and {which} with {sorted(theirs)}: it "
                f"would unlearn to stop. Set end_tokens to the teacher's, e.g. end_tokens={sorted(theirs)}"
            )
    return tuple(sorted(chosen))
