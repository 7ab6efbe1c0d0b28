"""What engines share whose model lies in this process: hidden states with a gradient, a head, and sampling."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.context import Context
from opd.distributions import EVERY_ID, Categorical, Head, Vocabulary
from opd.errors import IncompatibleError, ModelError
from opd.language.attention import in_its_dtype
from opd.language.encoding import WRITTEN
from opd.language.engines.base import Drawing, EncodedPrompt, Ended, Engine, Looker, PromptInputs, Row, Scorer
from opd.language.engines.batches import Batches
from opd.language.engines.cpu.packing import ATTENTION
from opd.language.engines.cpu.packing import Layout as PackedRow
from opd.language.engines.cpu.prepacked import FEWEST, prepacked
from opd.language.engines.layouts import Layout
from opd.language.engines.reading import Reading
from opd.language.engines.sampler import Sampler
from opd.language.engines.scorer import CachedScorer, WholeScorer
from opd.language.layers import decoder_of
from opd.language.logits import scale_and_softcap
from opd.language.memory import Memory
from opd.language.saving import base_of
from opd.language.tokens import tokens_of
from opd.prompts import Prompt
from opd.prompts.messages import Messages

if TYPE_CHECKING:
    from peft import PeftModel

    from opd.policies import Student
    from opd.teachers import LiveTeacher


class InProcess(torch.nn.Module, Engine):
    """A transformers model in this process, seen as `hidden states + head`; what students are trained as.

    An engine of a kind of model says how a prompt is encoded (`encode`) and how rows are computed (`forward`,
    `own_logits`); sampling and scoring follow.

    Args:
        model: the model, perhaps in a peft wrapper; None for a reader that holds a tokenizer alone.
    """

    caches: ClassVar[bool] = False
    """Whether the decoder alone (`get_decoder`) computes what ids behind a prompt come to, so that keys and values can
    be kept. Where it is not so, every token that is sampled costs a pass from the row's beginning."""

    reads_pictures: ClassVar[bool] = False
    """Whether a prompt's pictures are seen; a teacher that does not see them knows less than a student that does."""

    placeholders: tuple[int, ...] = ()
    """Ids that stand for other inputs than text: no distribution of a run holds them, so they are never drawn."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | None,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "chat",
        template_options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        # Nobody asks a reader for the model that it has not.
        self.model: PreTrainedModel | PeftModel = model  # type: ignore[assignment]
        self.tokenizer = tokenizer
        self.template = template
        self.template_options = dict(template_options or {})
        self.owner = "the model"
        self.notes: list[str] = []
        self.encoded: Memory[EncodedPrompt] = Memory(2**26)
        """Of prompts that were read, by their columns: at the start each is read for several reasons."""

    @abstractmethod
    def forward(
        self, contexts: Sequence[EncodedPrompt], completions: Sequence[torch.Tensor], layout: Layout = "auto"
    ) -> torch.Tensor:
        """Final hidden states `[N, D]` of the positions that predict the completions' tokens, packed in order.

        Args:
            contexts: B prompts; neighbours with the same prompt may be computed once.
            completions: B completions, int64 `[T_i]`; position t of a completion is predicted from the state before it.
            layout: one row without padding, or a batch padded on either side; the result does not depend on it.
        """

    @abstractmethod
    def own_logits(self, context: EncodedPrompt, completion: torch.Tensor) -> torch.Tensor:
        """float32 `[T, V]`: logits of the model's own forward pass, alone and in eval mode, that predict a completion;
        what start-up compares `forward` and the head with."""

    def length(self, prompt: Prompt, column: str | None = None) -> int:
        """P of a prompt's view."""
        return len(self.encode(prompt, column))

    def shown(self, prompt: Prompt) -> tuple[str | Messages, list[str]]:
        """The student's view of a prompt for people: its text or messages, and its pictures as `data:` addresses."""
        view = prompt.view()
        if not isinstance(view, str):
            view = [{key: value for key, value in message.items() if key != WRITTEN} for message in view]
        return view, []

    def clips(self, prompt: Prompt) -> list[dict[str, Any]]:
        """Of each video in the student's view `times`, seconds of some frames, and `images`, `data:` addresses."""
        return []

    def read_like(self, reader: InProcess) -> None:
        """Read prompts as the student's `reader` does where this engine was told nothing of its own."""

    def probes(self) -> list[dict[str, torch.Tensor]]:
        """Arguments of the model's own forward pass, besides ids of text, by which two copies of it are told apart."""
        return []

    def save_reader(self, folder: Path) -> None:
        """Write what the model reads with beside it."""
        self.tokenizer.save_pretrained(folder)

    def read(self, contexts: Sequence[EncodedPrompt]) -> Reading:
        """What the decoder is given of B prompts; asked of engines that keep keys and values (`caches`).

        Raises:
            ModelError: a prompt holds what this engine does not read.
        """
        return Reading([self._text(context) for context in contexts])

    def _text(self, context: EncodedPrompt) -> torch.Tensor:
        if isinstance(context, PromptInputs):
            raise ModelError(
                f"{self.owner} reads text alone, and a prompt has {sorted(context.inputs)} besides; take a model that "
                "reads them"
            )
        return context

    def padding(
        self, contexts: Sequence[EncodedPrompt], completions: Sequence[torch.Tensor], layout: Layout = "auto"
    ) -> torch.Tensor | None:
        """int64 `[B, L]`, 1 where `forward` is fed a token of these rows and 0 where padding; None without padding."""
        return None

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, without a peft wrapper."""
        return base_of(self.model)

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes of decoder layers, by which `accelerate` cuts a model into groups."""
        present = {type(part).__name__ for part in self.base.modules()}
        return sorted(present & set(self.base._no_split_modules or ()))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def family(self) -> str:
        """The model's kind, as messages name it."""
        return f"the family {getattr(self.base.config, 'model_type', type(self).__name__)!r}"

    def body(self, **inputs: object) -> Any:
        """The decoder without the head: `last_hidden_state` is final-normed."""
        with in_its_dtype(self.base):
            return decoder_of(self.base)(**inputs)

    def packed_body(self, row: PackedRow, read: Mapping[str, object] | None = None, **options: object) -> torch.Tensor:
        """Final hidden states `[1, L, D]` of a packed row; `read` is what the decoder is given in place of its ids."""
        decoder_of(self.base).config._attn_implementation = ATTENTION
        # A mask that is already four-dimensional is passed through; packed attention makes its own.
        nothing = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        given = {"input_ids": row.ids} if read is None else {**read}
        given |= {"position_ids": row.positions, "use_cache": False, **options}
        hidden = self.body(attention_mask=nothing, opd_layout=row, **given).last_hidden_state
        if not row.read.is_set():
            raise ModelError(
                f"the family {self.base.config.model_type!r} does not tell its attention where rows that share a batch "
                "lie; set attention: eager"
            )
        return hidden

    def head(self, temperature: float, vocabulary: Vocabulary = EVERY_ID) -> Head:
        """The output head over these ids as it is now, with a graph where its parameters are trained."""
        layer = self.base.get_output_embeddings()
        if layer is None:
            raise ModelError(f"model {self.base.config.name_or_path!r} has no output embeddings: not a causal LM")
        scale, softcap = scale_and_softcap(self.base.config)
        whole = Head(
            _effective_weight(layer),
            getattr(layer, "bias", None),
            scale=scale,
            softcap=softcap,
            temperature=temperature,
        )
        return whole.over(vocabulary, self.owner)

    def head_of(self, context: Context) -> Head:
        """The head at a run's temperature, over the ids that count there."""
        return self.head(context.temperature, tokens_of(context).vocabulary)

    def sampler(self, drawing: Drawing, packed: bool = False, candidates: int = 0) -> Sampler:
        """A sampler of the model as it is now, its large weights `packed` as they are too, which keeps so many
        `candidates` of each state."""
        head = self.head_of(drawing.context)
        return Sampler(self, head, tokens_of(drawing.context).end_ids, drawing.top_p, drawing.top_k, packed, candidates)

    @torch.no_grad()
    def sample(
        self,
        contexts: Sequence[EncodedPrompt],
        group: int,
        budget: int,
        seeds: Sequence[int],
        drawing: Drawing,
        looker: Looker | None = None,
        ended: Ended | None = None,
    ) -> list[Row]:
        # Prompts of one length share a batch with little padding; the order of the result is that of the prompts.
        waiting = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
        at_once = max(1, drawing.batch // group)
        pays = budget * -(-len(waiting) // at_once) >= FEWEST
        found: dict[int, Row] = {}
        with self.quiet():
            sampler = self.sampler(drawing, pays, 0 if looker is None else looker.candidates)
            unpacked = self.caches and sampler.decoder is None and pays
            with prepacked(decoder_of(self.base)) if unpacked else contextlib.nullcontext():
                batches = Batches(sampler, looker, budget, group, at_once * group)
                while waiting or batches.open:
                    joining = batches.free(len(waiting) * group) // group
                    if joining:
                        now, waiting = waiting[:joining], waiting[joining:]
                        rows = [i * group + g for i in now for g in range(group)]
                        batches.begin(rows, [contexts[i] for i in now], [seeds[r] for r in rows])
                    done = batches.extend(len(waiting) * group)
                    found |= done
                    if ended is not None:
                        for index, row in done.items():
                            ended(index, row)
        return [found[i] for i in range(len(found))]

    @torch.no_grad()
    def score(
        self, contexts: Sequence[EncodedPrompt], completions: Sequence[torch.Tensor], context: Context
    ) -> Categorical:
        with self.quiet():
            return Categorical(self(contexts, completions), self.head_of(context).detach())

    def scorer(self, contexts: Sequence[EncodedPrompt], context: Context) -> Scorer:
        if CachedScorer.fits(self):
            return CachedScorer(self, contexts, context)
        return WholeScorer(self, contexts, context)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, the model is in eval mode."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)


def language_of(part: Student | LiveTeacher, which: str) -> InProcess:
    """The language model of a built student or teacher; `which` names it.

    Raises:
        IncompatibleError: it has none in this process.
    """
    found = getattr(part, "language", None)
    if not isinstance(found, InProcess):
        raise IncompatibleError(
            f"{which} ({type(part).__name__}) has no language model in this process, and the rollout asks for it; take "
            "a student of policy causal_lm and teachers of kind local or self"
        )
    return found


def _effective_weight(layer: Any) -> torch.Tensor:
    """The head's matrix `[V, D]`; for a LoRA-adapted head the base plus the active adapters' product."""
    if not hasattr(layer, "lora_A"):
        return layer.weight
    weight = layer.base_layer.weight
    for name in layer.active_adapters:
        if name in layer.lora_A:
            product = layer.lora_B[name].weight @ layer.lora_A[name].weight
            weight = weight + layer.scaling[name] * product.to(weight.dtype)
    return weight
