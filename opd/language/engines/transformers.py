"""A causal language model of `transformers` in this process: prompts to ids, ids to final hidden states."""

from __future__ import annotations

import inspect

import torch

from opd.language.attention import in_its_dtype
from opd.language.encoding import encode
from opd.language.engines.base import EncodedPrompt
from opd.language.engines.decoded import Decoded
from opd.language.model import ModelSettings, load_model, load_tokenizer
from opd.prompts import Prompt


class LanguageModel(Decoded):
    """Any `AutoModelForCausalLM`."""

    @classmethod
    def load(cls, settings: ModelSettings, device: torch.device | str, keep_adapter: bool = False) -> LanguageModel:
        tokenizer = load_tokenizer(settings)
        return cls(load_model(settings, device, keep_adapter), tokenizer, settings.template, settings.template_options)

    def encode(self, prompt: Prompt, column: str | None = None) -> EncodedPrompt:
        """int64 `[P]` ids of a prompt's view, up to where the completion starts; see `opd.language.encoding`."""
        name = column or prompt.column
        known = self.encoded.get(prompt.fields, name)
        if known is None:
            known = torch.tensor(encode(self, prompt, column), dtype=torch.int64)
            self.encoded.keep(prompt.fields, name, known, known.nbytes + 200)
        return known

    @torch.no_grad()
    def own_logits(self, context: EncodedPrompt, completion: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([self._text(context).to(self.device), completion[:-1].to(self.device)])[None]
        # Of a long prompt and a large vocabulary all logits would take gigabytes.
        few = "logits_to_keep" in inspect.signature(self.base.forward).parameters
        with self.quiet(), in_its_dtype(self.base):
            logits = self.base(input_ids=ids, **({"logits_to_keep": len(completion)} if few else {})).logits
        return logits[0, -len(completion) :].float()
