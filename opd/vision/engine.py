"""An image-text model of `transformers` in this process: prompts with pictures to ids and tensors, and to states."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin

from opd.errors import ModelError
from opd.language.attention import in_its_dtype
from opd.language.engines.base import EncodedPrompt, PromptInputs, ids_of
from opd.language.engines.decoded import Decoded
from opd.language.engines.in_process import InProcess
from opd.language.engines.layouts import Layout
from opd.language.engines.padding import pad
from opd.language.layers import decoder_of
from opd.language.memory import Memory
from opd.pictures import data_address
from opd.prompts import Prompt
from opd.prompts.messages import Messages
from opd.prompts.pictures import Limits
from opd.prompts.videos import Clip
from opd.vision.identity import processor_hash
from opd.vision.processor import placeholders_of, save_processor, tokenizer_of
from opd.vision.reading import PictureReading, Seen
from opd.vision.videos import VideoSettings
from opd.vision.view import inputs_of, view_of

if TYPE_CHECKING:
    from peft import PeftModel

OF_TOKENS = ("mm_token_type_ids", "token_type_ids")
"""What processors return of each token; text is 0."""
KNOWN = frozenset(
    [
        "attention_mask",
        "cache",
        "cache_position",
        "input_ids",
        "inputs_embeds",
        "past_key_values",
        "position_ids",
        "return_dict",
        "use_cache",
        "visual_pos_masks",
        "deepstack_visual_embeds",
    ]
)
"""What models hand their decoders."""
SHOWN, FRAME = 12, 96
"""Frames of a video that a logged row holds at most, and their longer side in pixels."""


class _Reached(Exception):  # noqa: N818 - it is no error
    """The model has come to its decoder; what it hands over."""

    def __init__(self, given: Mapping[str, Any]):
        self.given = given


@dataclass(frozen=True)
class Pictures:
    """How pictures are found in rows, and what they may take.

    Attributes:
        column: the student's pictures, one or a list; None where there are none but in messages.
        videos: how videos are read; None where there are none.
    """

    column: str | None = "image"
    limits: Limits = field(default_factory=Limits)
    videos: VideoSettings | None = None


class ImageTextModel(Decoded):
    """Any `AutoModelForImageTextToText` whose decoder gets embeddings, positions and at most features for its first
    layers: Qwen2-VL to Qwen3.5, Idefics3 and SmolVLM, Gemma 3, LLaVA and their kin.

    The model's own forward pass says what its decoder gets of a prompt: it runs up to there, once for each prompt, and
    from there on rows are laid out as those of text are.

    Args:
        processor: reads prompts; its tokenizer is the engine's.
        source: folder that the processor was loaded from, where it is one.
    """

    reads_pictures: ClassVar[bool] = True

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | None,
        processor: ProcessorMixin,
        template_options: Mapping[str, Any] | None = None,
        pictures: Pictures | None = None,
        source: Path | None = None,
    ):
        super().__init__(model, tokenizer_of(processor), "chat", template_options)
        self.processor = processor
        self.pictures = pictures or Pictures()
        self.source = source
        self.still = False
        """Whether what pictures come to never moves, so that it may be kept."""
        self.encoded = Memory()
        self.looked: Memory[Seen] = Memory()
        self.lengths: Memory[int] = Memory()
        self.addresses: Memory[tuple[str | Messages, list[str], list[dict[str, Any]]]] = Memory(2**26)
        self.masked: bool | None = None
        """Whether the decoder reads prompts with pictures under a mask of the model's own, once that is known."""
        config = None if model is None else self.base.config
        self.placeholders = placeholders_of(config, processor)
        self.marks = [str(token) for token in self.tokenizer.convert_ids_to_tokens(list(self.placeholders))]
        """The placeholders as they read: no prompt's own text may hold one."""
        found = getattr(config, "image_token_id", None)
        found = found if found is not None else getattr(config, "image_token_index", None)
        of_videos = getattr(config, "video_token_id", None)
        self.picture_ids = tuple(each for each in (found, of_videos) if each is not None)
        """Ids in whose places stands what is seen."""
        if model is not None and found is None:
            raise ModelError(f"{self.family} does not say which token stands for pictures (image_token_id)")

    def encode(self, prompt: Prompt, column: str | None = None) -> EncodedPrompt:
        """A prompt's view, up to where the completion starts.

        `column` names another text (or messages), or other pictures under the same text.
        """
        known = self.encoded.get(prompt.fields, column)
        if known is None:
            view = view_of(self, prompt, column)
            known = inputs_of(self, prompt, view)
            self.encoded.keep(prompt.fields, column, known, _size(known))
            self.lengths.keep(prompt.fields, column, len(known), 64)
        return known

    def length(self, prompt: Prompt, column: str | None = None) -> int:
        known = self.lengths.get(prompt.fields, column)
        return len(self.encode(prompt, column)) if known is None else known

    @property
    def processor_hash(self) -> str:
        return processor_hash(self.processor)

    def probes(self) -> list[dict[str, torch.Tensor]]:
        grey: Any = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        parts = [{"type": "image"}, {"type": "text", "text": "?"}]
        column = str(self.pictures.column)
        if self.pictures.column is None and self.pictures.videos is not None:
            parts[0], column = {"type": "video"}, self.pictures.videos.column
            grey = {"frames": np.stack([grey] * 4), "fps": self.pictures.videos.fps}
        prompt = Prompt("probe", {"prompt": [{"role": "user", "content": parts}], column: grey})
        none = self.pictures.column is None and self.pictures.videos is None
        wanted = None if none else self.encode(prompt)
        return [self._given([wanted])] if isinstance(wanted, PromptInputs) else []

    def save_reader(self, folder: Path) -> None:
        save_processor(folder, self.processor, self.source)

    def settle(self) -> None:
        """Find out whether what pictures come to can move in training."""
        self.still = not any(parameter.requires_grad for _, parameter in of_pictures(self.base))

    def shown(self, prompt: Prompt) -> tuple[str | Messages, list[str]]:
        return self._addresses(prompt)[:2]

    def clips(self, prompt: Prompt) -> list[dict[str, Any]]:
        return self._addresses(prompt)[2]

    def _addresses(self, prompt: Prompt) -> tuple[str | Messages, list[str], list[dict[str, Any]]]:
        known = self.addresses.get(prompt.fields, None)
        if known is None:
            view, text = view_of(self, prompt, None), prompt.view()
            pictures = [data_address(np.asarray(picture)) for picture in view.pictures]
            clips = [_shown_clip(clip) for clip in view.videos]
            known = (text if isinstance(text, str) else view.messages, pictures, clips)
            size = sum(len(each) for each in [*pictures, *(image for clip in clips for image in clip["images"])])
            self.addresses.keep(prompt.fields, None, known, size)
        return known

    def read_like(self, reader: InProcess) -> None:
        """Videos, where nothing was said of them, are read as the student reads them."""
        if self.pictures.videos is None and isinstance(reader, ImageTextModel):
            self.pictures = replace(self.pictures, videos=reader.pictures.videos)

    def read(self, contexts: Sequence[EncodedPrompt]) -> PictureReading:
        distinct = {id(c.inputs): c for c in contexts if isinstance(c, PromptInputs)}
        seen: dict[int, Seen] = {}
        for key, context in distinct.items():
            kept = self.looked.get(context.inputs, None) if self.still else None
            if kept is not None:
                seen[key] = kept
        new = [context for key, context in distinct.items() if key not in seen]
        for alike in _alike(new):
            for context, found in zip(alike, self._look(alike), strict=True):
                seen[id(context.inputs)] = found
                if self.still:
                    self.looked.keep(context.inputs, None, found, found.size)
        each = [seen[id(c.inputs)] if isinstance(c, PromptInputs) else None for c in contexts]
        return PictureReading([ids_of(c) for c in contexts], each, self.picture_ids, self.base)

    def padding(
        self, contexts: Sequence[EncodedPrompt], completions: Sequence[torch.Tensor], layout: Layout = "auto"
    ) -> torch.Tensor | None:
        pictures = any(isinstance(context, PromptInputs) for context in contexts)
        if pictures and self.masked is None:
            self.read(contexts[:1])
        padded = pictures and self.masked and layout not in ("left", "right")
        return super().padding(contexts, completions, "right" if padded else layout)

    @torch.no_grad()
    def own_logits(self, context: EncodedPrompt, completion: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([ids_of(context).cpu(), completion[:-1].cpu()])
        given = self._given([PromptInputs(ids, context.inputs if isinstance(context, PromptInputs) else {})])
        few = "logits_to_keep" in inspect.signature(self.base.forward).parameters
        with self.quiet(), in_its_dtype(self.base):
            logits = self.base(**given, **({"logits_to_keep": len(completion)} if few else {})).logits
        return logits[0, -len(completion) :].float()

    def _look(self, contexts: Sequence[PromptInputs]) -> list[Seen]:
        """What the decoder gets of prompts whose tensors can be joined."""
        given = self._given(contexts)
        with contextlib.nullcontext() if not self.still else torch.no_grad():
            handed = self._handed(given)
        strange = sorted(name for name, value in handed.items() if value is not None and name not in KNOWN)
        if strange:
            raise ModelError(
                f"{self.family} hands its decoder {', '.join(strange)} besides embeddings, and opd does not know how "
                "rows with that are put together; take another model"
            )
        # Such masks let tokens of one picture see each other.
        ids, embeds, positions = given["input_ids"], handed["inputs_embeds"], handed.get("position_ids")
        here = torch.isin(ids, torch.tensor(self.picture_ids, device=ids.device))
        counts = here.sum(1).tolist()
        layers = [torch.split(layer, counts) for layer in handed.get("deepstack_visual_embeds") or ()]
        types = next((name for name in OF_TOKENS if name in given), None)
        types = types if isinstance(handed.get("attention_mask"), dict) else None
        self.masked = types is not None
        if positions is not None and positions.dim() == 3 and len(positions) == 4:
            # The first of four counts tokens, as whoever lays out rows does.
            positions = positions[1:]
        found = []
        for i, context in enumerate(contexts):
            own = None
            if positions is not None:
                own = positions[..., i if positions.shape[-2] > 1 else 0, : len(context)].cpu()
            found.append(Seen(embeds[i, here[i]], own, tuple(layer[i] for layer in layers), types))
        return found

    def _handed(self, given: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
        """What the model's own forward pass hands its decoder."""

        def stop(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            raise _Reached({**dict(zip(("input_ids",), args, strict=False)), **kwargs})

        hook = decoder_of(self.base).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with in_its_dtype(self.base):
                self.outer(**given, use_cache=False)
        except _Reached as reached:
            return reached.given
        finally:
            hook.remove()
        raise ModelError(f"{self.family} does not call its decoder; take another model")

    @property
    def outer(self) -> PreTrainedModel:
        """The model below its head: what reads pictures, and the decoder."""
        found = getattr(self.base, self.base.base_model_prefix, None)
        return found if isinstance(found, PreTrainedModel) else self.base

    def _given(self, contexts: Sequence[PromptInputs]) -> dict[str, torch.Tensor]:
        """Arguments of the model's own forward pass: prompts padded on the right, their tensors joined."""
        ids, mask = pad([context.ids.cpu() for context in contexts], "right")
        # The filler must stand for no picture.
        ids[mask == 0] = next(i for i in range(len(self.placeholders) + 1) if i not in self.placeholders)
        given: dict[str, torch.Tensor] = {"input_ids": ids}
        if not bool(mask.all()):
            given["attention_mask"] = mask
        for name in contexts[0].inputs:
            parts = [context.inputs[name] for context in contexts]
            if name in OF_TOKENS:
                given[name] = torch.zeros_like(ids)
                for row, part in zip(given[name], parts, strict=True):
                    row[: part.shape[-1]] = part[0]
            else:
                given[name] = torch.cat(parts)
        return {name: value.to(self.device) for name, value in given.items()}


def of_pictures(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Names and parameters of what reads pictures: all that is neither the decoder's nor the head's."""
    head = model.get_output_embeddings()
    text = [*decoder_of(model).parameters(), *(head.parameters() if isinstance(head, torch.nn.Module) else ())]
    own = {id(parameter) for parameter in text}
    yield from ((name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in own)


def _shown_clip(clip: Clip) -> dict[str, Any]:
    """A few frames of a video, evenly, and their seconds."""
    places = sorted({round(i) for i in np.linspace(0, len(clip.frames) - 1, SHOWN)})
    return {
        "times": [round(clip.times[i], 2) for i in places],
        "images": [data_address(clip.frames[i], FRAME) for i in places],
    }


def _alike(contexts: Sequence[PromptInputs]) -> Iterator[list[PromptInputs]]:
    """Prompts in groups whose tensors can be joined along their first axis."""
    groups: dict[object, list[PromptInputs]] = {}
    for context in contexts:
        shapes = tuple(
            (name, None if name in OF_TOKENS else value.shape[1:]) for name, value in sorted(context.inputs.items())
        )
        groups.setdefault(shapes, []).append(context)
    yield from groups.values()


def _size(context: EncodedPrompt) -> int:
    tensors = [ids_of(context), *(context.inputs.values() if isinstance(context, PromptInputs) else ())]
    return sum(tensor.nbytes for tensor in tensors)
