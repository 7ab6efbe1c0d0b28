"""Tiny image-text models of several families, with processors: made in memory, of random weights."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3VLProcessor,
)

from opd.vision.processor import picture_reader

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz +-=?.,#:\nABCDEFGHIJKLMNOPQRSTUVWXYZ"
QWEN = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
IDEFICS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
GEMMA = ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"]
PART = "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}"
CONTENT = (
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}" + PART + "{% endfor %}{% endif %}"
)
TURNS = "{% for message in messages %}START{{ message.role }}\n" + CONTENT + "END\n{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}STARTassistant\n{% endif %}"

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "idefics3", "gemma3", "llava")


def tokenizer_with(special: list[str], end: str, **named: str) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<bos>": 1, "<unk>": 2}
    vocabulary |= {c: i for i, c in enumerate(CHARACTERS, start=len(vocabulary))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=end,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>",
        extra_special_tokens=named,
    )


def written(start: str, end: str, image: str) -> str:
    return TEMPLATE.replace("IMAGE", image).replace("START", start).replace("END", end)


def tiny_vlm(family: str, seed: int = 0, layers: int = 3, scale: float = 0.3) -> tuple[Any, Any]:
    """`(model, processor)` of a family, float32, in eval mode."""
    torch.manual_seed(seed)
    processor, config = PARTS[family]()
    config.text_config.num_hidden_layers = layers
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # What reads pictures must matter, whatever a family begins with.
            if weight.dim() >= 2:
                weight.normal_(0, scale if "lm_head" not in name else 0.5)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return model, processor


def qwen(kind: Any, name: str, vision: dict[str, Any], text: dict[str, Any]) -> tuple[Any, Any]:
    tokenizer = tokenizer_with(QWEN, "<|im_end|>")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in QWEN}
    patch = vision["patch_size"]
    images = Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=2, temporal_patch_size=2, min_pixels=(2 * patch) ** 2, max_pixels=(8 * patch) ** 2
    )
    template = written("<|im_start|>", "<|im_end|>", "<|vision_start|><|image_pad|><|vision_end|>")
    config = AutoConfig.for_model(
        name,
        vision_config=vision,
        text_config={**TEXT, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, **text},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    return picture_reader(kind, images, tokenizer, template), config


def qwen2_5_vl() -> tuple[Any, Any]:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8}
    vision |= {"out_hidden_size": 32, "window_size": 32, "fullatt_block_indexes": [1]}
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 1, 1]}
    return qwen(Qwen2_5_VLProcessor, "qwen2_5_vl", vision, {"rope_parameters": rope})


def qwen3_vl() -> tuple[Any, Any]:
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8}
    vision |= {"out_hidden_size": 32, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    return qwen(Qwen3VLProcessor, "qwen3_vl", vision, {"rope_parameters": rope})


def qwen3_5() -> tuple[Any, Any]:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8}
    vision |= {"out_hidden_size": 32, "num_position_embeddings": 64}
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {"rope_parameters": rope | {"partial_rotary_factor": 1.0}}
    text |= {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    text |= {"linear_num_value_heads": 4}
    return qwen(Qwen3VLProcessor, "qwen3_5", vision, text)


def idefics3() -> tuple[Any, Any]:
    tokenizer = tokenizer_with(IDEFICS, "<end_of_utterance>")
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    )
    template = written("", "<end_of_utterance>", "<image>")
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    vision = {**TEXT, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    config = AutoConfig.for_model(
        "idefics3",
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        vision_config=vision,
        text_config={
            "model_type": "llama",
            **TEXT,
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
        },
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    return processor, config


def gemma3() -> tuple[Any, Any]:
    names = {"boi_token": GEMMA[2], "eoi_token": GEMMA[3], "image_token": GEMMA[4]}
    tokenizer = tokenizer_with(GEMMA, "<end_of_turn>", **names)
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    template = "<bos>" + written("<start_of_turn>", "<end_of_turn>", "<start_of_image>")
    processor = Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    config = AutoConfig.for_model(
        "gemma3",
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_id=tokenizer.image_token_id,
        vision_config={**TEXT, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 8,
        },
    )
    return processor, config


def llava() -> tuple[Any, Any]:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    tokenizer = tokenizer_with(IDEFICS, "<end_of_utterance>")
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    template = written("", "<end_of_utterance>", "<image>")
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )
    config = AutoConfig.for_model(
        "llava",
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_config={
            "model_type": "clip_vision_model",
            **TEXT,
            "num_hidden_layers": 2,
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": 32,
        },
        text_config={
            "model_type": "llama",
            **TEXT,
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_feature_layer=-1,
    )
    return processor, config


PARTS = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_5": qwen3_5,
    "idefics3": idefics3,
    "gemma3": gemma3,
    "llava": llava,
}


def picture(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    """Noise, of which no two parts are alike."""
    made = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(made.numpy())


def save_vlm(folder: Any, family: str, seed: int = 0, **options: Any) -> str:
    """A folder as `from_pretrained` reads it; its path as text."""
    model, processor = tiny_vlm(family, seed, **options)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
