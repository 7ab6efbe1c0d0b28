"""What student and teacher must share: a tokenizer, a common vocabulary, and a way to end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from opd.distributions import Vocabulary
from opd.errors import IncompatibleError
from opd.language.encoding import turn_end
from opd.language.identity import PROBE

if TYPE_CHECKING:
    from opd.language.engines.in_process import InProcess


def check_tokenizers(student: InProcess, teacher: InProcess, which: str) -> None:
    """Refuse a teacher whose tokenizer gives other ids; tokens on one side only are allowed."""
    ours, theirs = _tokens(student), _tokens(teacher)
    common = ours.keys() & theirs.keys()
    different = [i for i in common if ours[i] != theirs[i]]
    if different:
        i = min(different)
        raise IncompatibleError(
            f"{which} has another tokenizer than the student: {len(different)} of {len(common)} ids differ (id {i} is "
            f"{ours[i]!r} here and {theirs[i]!r} there). Set tokenizer: own on that teacher, which then reads texts in "
            "its own tokens, or use a teacher of the student's family"
        )
    if _split(student) != _split(teacher):
        raise IncompatibleError(
            f"{which} has the student's vocabulary but splits text differently; use the student's tokenizer for both "
            "(teacher.tokenizer), or set tokenizer: own on that teacher, which then reads texts in its own tokens"
        )


def _tokens(model: InProcess) -> dict[int, str]:
    """The token of every id. Of ids that read alike `get_vocab` tells of one alone, so the others are asked for."""
    tokenizer = model.tokenizer
    found = {i: token for token, i in sorted(tokenizer.get_vocab().items())}
    for i in range(max(found, default=-1)):
        if i not in found:
            token = tokenizer.convert_ids_to_tokens(i)
            if token and token != tokenizer.unk_token:
                found[i] = str(token)
    return found


def _split(model: InProcess) -> list[int]:
    """The probe's ids, without what a tokenizer puts around texts: that is a matter of each model's view."""
    return list(model.tokenizer(PROBE, add_special_tokens=False)["input_ids"])


def common_vocabulary(models: Sequence[InProcess], fixed: Sequence[Vocabulary] = ()) -> Vocabulary:
    """The ids for which every model's head has a row and every model's tokenizer a token that is no placeholder.

    Args:
        models: the student and its teachers; one that is only a tokenizer (without weights) has no head to ask.
        fixed: ids that others, who are not here, have answers for; with a slice among them the result is one.
    """
    rows = [int(m.base.get_output_embeddings().weight.shape[0]) for m in models if m.model is not None]
    known = set.intersection(*(set(_tokens(model)) for model in models)).difference(*(v.excluded for v in fixed))
    known -= {i for model in models for i in model.placeholders}
    bound = min([*rows, *(v.size for v in fixed if v.size is not None)])
    slices = [v.ids for v in fixed if v.ids is not None]
    if slices:
        return Vocabulary.of(i for i in known.intersection(*slices) if i < bound)
    size = max((i for i in known if i < bound), default=-1) + 1
    return Vocabulary(size, tuple(i for i in range(size) if i not in known))


def tokens_of_some(models: Sequence[InProcess]) -> dict[int, str]:
    """Tokens that some of the models' tokenizers have and others have not, by id."""
    each = [_tokens(model) for model in models]
    common = set.intersection(*(set(tokens) for tokens in each))
    return {i: token for tokens in each for i, token in tokens.items() if i not in common}


def end_ids(model: InProcess) -> set[int]:
    """Ids that end a completion for this model: its generation config's, its tokenizer's, and that with which its chat
    template ends an answer."""
    end = turn_end(model)
    return _named_ends(model) | ({end} if end is not None else set())


def _named_ends(model: InProcess) -> set[int]:
    found: set[int] = set()
    # A reader holds a tokenizer alone.
    config = None if model.model is None else getattr(model.base, "generation_config", None)
    for value in (getattr(config, "eos_token_id", None), model.tokenizer.eos_token_id):
        found |= set(value) if isinstance(value, list | tuple) else ({value} if value is not None else set())
    return found


def agree_on_end(
    student: InProcess, teachers: Sequence[tuple[str, InProcess]], given: Sequence[int] | None
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


def notes_on_end(
    student: InProcess,
    teachers: Sequence[tuple[str, InProcess]],
    chosen: Sequence[int],
    given: bool,
    vocabulary: Vocabulary,
) -> list[str]:
    """What a person should know of the end ids that were `chosen`, one sentence each.

    Raises:
        IncompatibleError: none of them is in the common vocabulary, so that no completion could end.
    """
    notes = []
    outside = [i for i in chosen if not vocabulary.holds(i)]
    if len(outside) == len(chosen):
        raise IncompatibleError(
            f"no completion could end: {_told(student, chosen)} is no token that student and teachers have in common; "
            "set end_tokens to ids that all of them have"
        )
    if outside:
        notes.append(f"{_told(student, outside)} ends no completion: not every tokenizer has that token")
    own = turn_end(student)
    if not given and own is not None and own not in _named_ends(student):
        notes.append(
            f"the student's chat template ends an answer with {_told(student, [own])}, which its generation config and "
            "tokenizer do not name: it ends completions too, and the saved student's generation config says so"
        )
    for which, teacher in teachers:
        theirs = end_ids(teacher)
        if theirs and (not set(chosen) & theirs if given else set(chosen) != theirs):
            notes.append(
                f"completions end with {_told(student, chosen)} and those of {which} with {_told(teacher, theirs)}: "
                "the student does not learn from it to end with what one of them alone uses; end_tokens sets the ids"
            )
    return notes


def _told(model: InProcess, ids: Iterable[int]) -> str:
    return ", ".join(f"{model.tokenizer.convert_ids_to_tokens(i)!r} (id {i})" for i in sorted(ids))
