"""What pictures and what reads them are known by: hashes that do not depend on files or machine."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from PIL import Image
from transformers import ProcessorMixin

NO_PICTURES = ("video", "audio", "chat_template", "name_or_path", "version", "auto_map")
"""Parts of the names of settings that change nothing of what a picture comes to, or have a hash of their own."""


def pixels_hash(picture: Image.Image) -> str:
    """`sha256:...` over a picture's size and its pixels in RGB, whatever file they came from."""
    found = hashlib.sha256(f"{picture.width} x {picture.height} RGB\n".encode())
    found.update(picture.convert("RGB").tobytes())
    return f"sha256:{found.hexdigest()}"


def processor_hash(processor: ProcessorMixin) -> str:
    """`sha256:...` over all settings by which a processor makes a model's inputs of pictures, its tokenizer and its
    template aside."""
    text = json.dumps(_settings(processor.to_dict()), sort_keys=True, ensure_ascii=False, default=str)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _settings(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _settings(each)
            for name, each in value.items()
            if not name.startswith("_") and not any(part in name for part in NO_PICTURES)
        }
    return value
