"""A causal language model of `transformers` in this process: prompts to ids, ids to final hidden states."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import ClassVar

import torch

from opd.errors import ModelError
from opd.language.attention import attention_of, in_its_dtype
from opd.language.encoding import encode
from opd.language.engines.base import EncodedPrompt, PromptInputs
from opd.language.engines.cpu.packing import pack
from opd.language.engines.in_process import InProcess
from opd.language.engines.layouts import Layout, can_flatten, flatten, usual_layout
from opd.language.engines.padding import pad
from opd.language.model import ModelSettings, load_model, load_tokenizer
from opd.prompts import Prompt


class LanguageModel(InProcess):
    """Any `AutoModelForCausalLM`. Where family and attention allow it rows share a pass without padding."""

    caches: ClassVar[bool] = True

    @classmethod
    def load(cls, settings: ModelSettings, device: torch.device | str, keep_adapter: bool = False) -> LanguageModel:
        tokenizer = load_tokenizer(settings)
        return cls(load_model(settings, device, keep_adapter), tokenizer, settings.template, settings.template_options)

    def encode(self, prompt: Prompt, column: str | None = None) -> torch.Tensor:
        """int64 `[P]` ids of a prompt's view, up to where the completion starts; see `opd.language.encoding`."""
        return torch.tensor(encode(self, prompt, column), dtype=torch.int64)

    def forward(
        self, contexts: Sequence[EncodedPrompt], completions: Sequence[torch.Tensor], layout: Layout = "auto"
    ) -> torch.Tensor:
        texts = [self._text(context) for context in contexts]
        layout = self._layout(layout)
        if layout == "packed":
            return self._packed(texts, completions)
        if layout == "varlen":
            return self._flat(texts, completions)
        # The last token of a completion predicts nothing that is scored, so it is not fed.
        rows = [torch.cat([c.cpu(), y[:-1].cpu()]) for c, y in zip(texts, completions, strict=True)]
        ids, mask = pad(rows, "left" if layout == "left" else "right")
        # What is asked of numbers is asked here, where nobody waits for a device.
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        attention = None if bool(mask.all()) else mask.to(self.device)
        hidden = self.body(
            input_ids=ids.to(self.device),
            attention_mask=attention,
            position_ids=positions.to(self.device),
            use_cache=False,
        ).last_hidden_state
        scored = torch.zeros_like(mask, dtype=torch.bool)
        for i, (context, row) in enumerate(zip(texts, rows, strict=True)):
            shift = ids.shape[1] - len(row) if layout == "left" else 0
            scored[i, shift + len(context) - 1 : shift + len(row)] = True
        return hidden.flatten(0, 1)[scored.flatten().nonzero().squeeze(1).to(self.device)]

    def padding(
        self, contexts: Sequence[EncodedPrompt], completions: Sequence[torch.Tensor], layout: Layout = "auto"
    ) -> torch.Tensor | None:
        layout = self._layout(layout)
        if layout in ("packed", "varlen"):
            return None
        fed = [torch.ones(len(c) + len(y) - 1) for c, y in zip(contexts, completions, strict=True)]
        return pad(fed, "left" if layout == "left" else "right")[1].to(self.device)

    def _layout(self, layout: Layout) -> Layout:
        """The layout itself, or what stands for it with this model."""
        if layout == "auto" or (layout == "varlen" and not can_flatten(self.base)):
            return usual_layout(self.base, self.device.type)
        return layout

    def _flat(self, contexts: Sequence[torch.Tensor], completions: Sequence[torch.Tensor]) -> torch.Tensor:
        row = flatten(contexts, completions)
        given = row.inputs(attention_of(self.base), self.device)
        hidden: torch.Tensor = self.body(**given, use_cache=False).last_hidden_state
        return hidden[0, row.scored.to(self.device)]

    def _packed(self, contexts: Sequence[torch.Tensor], completions: Sequence[torch.Tensor]) -> torch.Tensor:
        row = pack(contexts, completions).to(self.device)
        return self.packed_body(row)[0, row.scored]

    @torch.no_grad()
    def own_logits(self, context: EncodedPrompt, completion: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([self._text(context).to(self.device), completion[:-1].to(self.device)])[None]
        # Of a long prompt and a large vocabulary all logits would take gigabytes.
        few = "logits_to_keep" in inspect.signature(self.base.forward).parameters
        with self.quiet(), in_its_dtype(self.base):
            logits = self.base(input_ids=ids, **({"logits_to_keep": len(completion)} if few else {})).logits
        return logits[0, -len(completion) :].float()

    def _text(self, context: EncodedPrompt) -> torch.Tensor:
        if isinstance(context, PromptInputs):
            raise ModelError(
                f"{self.owner} reads text alone, and a prompt has {sorted(context.inputs)} besides; take a model that "
                "reads them"
            )
        return context
