"""One text under two tokenizers: where both have a boundary, and which of their tokens are the same bytes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from opd.distributions import Vocabulary
from opd.distributions.spans import Span, spans_of
from opd.language.encoding import turn_end
from opd.language.engines.in_process import InProcess
from opd.language.token_bytes import TokenBytes, token_bytes

CONTROL = "a control token within the text"
NO_TEXT = "bytes that are no text"
NOT_GIVEN_BACK = "a text that the teacher's tokenizer does not give back"


@dataclass(frozen=True)
class Reading:
    """A completion as the teacher reads it.

    Attributes:
        ids: the teacher's, its end of turn where the student's ends.
        spans: in order; tokens behind the last one have no counterpart. Together they hold every byte before that once.
    """

    ids: list[int]
    spans: list[Span]


@dataclass(frozen=True)
class Side:
    """One of two tokenizers.

    Attributes:
        texts: bytes of its ids.
        end: the id that ends a turn; None where the model names none.
        ends: all that end a completion.
        vocabulary: the ids that its distributions are over.
    """

    texts: TokenBytes
    end: int | None
    ends: frozenset[int]
    vocabulary: Vocabulary

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """As `TokenBytes.ids`, of ids that distributions hold."""
        return {piece: i for piece, i in self.texts.ids.items() if self.vocabulary.holds(i)}


def side_of(model: InProcess, ends: Sequence[int], vocabulary: Vocabulary, texts: TokenBytes | None = None) -> Side:
    """What a model reads with; `ends` are the ids that end its completions, of which its template's own counts first,
    then its tokenizer's."""
    first = (turn_end(model), model.tokenizer.eos_token_id)
    end = next((i for i in first if i in ends), min(ends, default=None))
    return Side(texts or token_bytes(model.tokenizer, model.owner), end, frozenset(ends), vocabulary)


class Pair:
    """A student's tokenizer and a teacher's."""

    def __init__(self, student: Side, teacher: Side):
        self.student, self.teacher = student, teacher

    @cached_property
    def control(self) -> dict[int, int]:
        """The teacher's control token for a student's: what ends a turn for what ends a turn, and of all others those
        of the same name."""
        both: dict[int, int] = {}
        if self.student.end is not None and self.teacher.end is not None:
            both[self.student.end] = self.teacher.end
        for name, i in self.student.texts.control.items():
            j = self.teacher.texts.control.get(name)
            if j is not None and i not in both and j not in both.values():
                both[i] = j
        return {i: j for i, j in both.items() if self.student.vocabulary.holds(i) and self.teacher.vocabulary.holds(j)}

    @cached_property
    def common(self) -> tuple[list[int], list[int]]:
        """Ids of the tokens that both sides have, the student's in ascending order and the teacher's beside them: those
        of the same bytes, and control tokens."""
        both = [(i, self.teacher.ids[piece]) for piece, i in self.student.ids.items() if piece in self.teacher.ids]
        ours, theirs = zip(*sorted([*both, *self.control.items()]), strict=True) if both or self.control else ((), ())
        return list(ours), list(theirs)

    def read(self, actions: Sequence[int]) -> Reading | str:
        """A student's completion as the teacher reads it, or why it cannot: `CONTROL`, `NO_TEXT`, `NOT_GIVEN_BACK`.

        What a budget cut is read as far as it is text. Its last tokens have no counterpart where the teacher has a
        token that begins with their bytes and that the student lacks: had the text gone on, it might have been read as
        that token.
        """
        ids: list[int] = []
        spans: list[Span] = []
        start = 0
        for stop, action in enumerate([*actions, None]):
            if action in self.student.texts.of:
                continue
            found = self._read_text(actions[start:stop], cut=action is None)
            if isinstance(found, str):
                return found
            spans += [Span(a + start, b + start, c + len(ids), d + len(ids)) for a, b, c, d in found.spans]
            ids += found.ids
            start = stop + 1
            if action is None:
                break
            theirs = self._control_of(action, last=stop == len(actions) - 1)
            if theirs is None:
                return CONTROL
            spans.append(Span(stop, stop + 1, len(ids), len(ids) + 1))
            ids.append(theirs)
        return Reading(ids, spans)

    def _control_of(self, action: int, last: bool) -> int | None:
        """The teacher's token for a control token that the student drew; whatever ends its turn ends the teacher's."""
        if last and action in self.student.ends:
            return self.teacher.end
        return None if action == self.student.texts.unknown else self.control.get(action)

    def _read_text(self, own: Sequence[int], cut: bool) -> Reading | str:
        """Tokens between control tokens; `cut` where no such token stands behind them."""
        data = b"".join(self.student.texts.of[i] for i in own)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            if not cut or error.end < len(data) or error.reason != "unexpected end of data":
                return NO_TEXT
            text = data[: error.start].decode()
        ids = self.teacher.texts.encode(text)
        if ids is None:
            return NOT_GIVEN_BACK
        theirs = [len(self.teacher.texts.of[i]) for i in ids]
        spans = spans_of([len(self.student.texts.of[i]) for i in own], theirs)
        settled = len(ids) - (self._unsettled(ids) if cut else 0)
        return Reading(ids, [span for span in spans if span.last <= settled])

    @cached_property
    def _teachers_alone(self) -> list[bytes]:
        """Tokens that the teacher has and the student lacks, sorted."""
        return sorted(piece for piece in self.teacher.ids if piece not in self.student.ids)

    def _unsettled(self, ids: Sequence[int]) -> int:
        """How many of the teacher's last tokens of a text might be others if it went on."""
        alone, behind, count = self._teachers_alone, b"", 0
        for n, i in enumerate(reversed(ids), start=1):
            behind = self.teacher.texts.of[i] + behind
            if len(behind) >= self._longest:
                break
            place = bisect_left(alone, behind)
            if place < len(alone) and alone[place] == behind:
                place += 1
            if place < len(alone) and alone[place].startswith(behind):
                count = n
        return count

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._teachers_alone), default=0)


@dataclass(frozen=True)
class Shares:
    """How a text compares under two tokenizers.

    Attributes:
        common: tokens that both have.
        of: by name, the tokens that student and teacher have.
        single: share of the text's bytes in spans of one token on both sides.
        several: share of them in spans of several.
        tokens: the teacher's tokens over the student's.
    """

    common: int
    of: Mapping[str, int]
    single: float
    several: float
    tokens: float


def shares(pair: Pair, texts: Sequence[str]) -> Shares:
    """How `texts`, encoded by the student, compare; texts that either side does not give back count as neither."""
    size = alone = several = 0
    ours = theirs = 0
    for text in texts:
        size += len(text.encode())
        ids = pair.student.texts.encode(text)
        end = [] if pair.student.end is None else [pair.student.end]
        reading = None if ids is None else pair.read([*ids, *end])
        if ids is None or reading is None or isinstance(reading, str):
            continue
        ours, theirs = ours + len(ids), theirs + len(reading.ids)
        for span in reading.spans:
            of = pair.student.texts.of
            count = sum(len(of.get(i, b"")) for i in ids[span.start : span.stop])
            alone, several = (alone + count, several) if span.single else (alone, several + count)
    return Shares(
        len(pair.common[0]) - len(pair.control),
        {"student": len(pair.student.ids), "teacher": len(pair.teacher.ids)},
        alone / max(1, size),
        several / max(1, size),
        theirs / max(1, ours),
    )
