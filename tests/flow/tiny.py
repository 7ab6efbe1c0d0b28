"""Tiny flow transformers that read five words, recipes around them, and Gaussian steps of random velocities."""

from __future__ import annotations

import torch

from opd.assembly import assemble
from opd.distributions.transition import transition
from opd.flow.denoising import Denoising, pack
from opd.language.creation import symbol_tokenizer
from opd.monitor import Monitor
from opd.prompts import Prompt
from opd.recipe import parse_recipe

WORDS = ("red", "green", "blue", "square", "circle")
PROMPTS = [f"{colour} {shape}" for colour in WORDS[:3] for shape in WORDS[3:]]
PIXELS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 230)}
TIMES = torch.tensor([1.0, 0.960, 0.913, 0.858, 0.790, 0.707, 0.602, 0.465, 0.278, 0.009, 0.0])


def step_of(velocity, x, t=0.6, following=0.4, noise=0.7):
    each = torch.full((len(x),), 1.0)
    return transition(x, velocity, t * each, following * each, noise * each)


def walk(count, steps, shape=(1, 2, 2), seed=0, rewards=None, group=1):
    """Trajectories of random latents at the grid's times."""
    g = torch.Generator().manual_seed(seed)
    actions = torch.randn(count, steps, *shape, generator=g)
    rows = [Denoising(None, torch.zeros(shape), TIMES[: steps + 1], 0.7, 1.0, actions[i, -1]) for i in range(count)]
    prompts = [Prompt(f"p{i}", {"prompt": "x"}) for i in range(count // group)]
    made = pack(prompts, group, rows, actions, torch.zeros(count, steps), "student")
    if rewards is None:
        return made
    known = torch.tensor(rewards)
    return made.rewarded(known, float(known.std(correction=0)))


def block_for(models, output, **changes):
    data = {
        "name": "t",
        "output": str(output),
        "steps": 3,
        "student": {"kind": "flow_transformer", "model": models[0]},
        "teacher": {"kind": "flow", "model": models[1]},
        "prompts": {"kind": "inline", "prompts": [{"prompt": text, "id": text} for text in PROMPTS]},
        "rollout": {"kind": "sde", "steps": 4},
        "objective": "gaussian_kl",
        "batch": {"prompts": 4, "group": 2, "micro": 8},
        "update": {"learning_rate": 1e-2},
        "evaluation": {"held_out": 2, "samples": 1, "steps": 3},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
    }
    for key, value in changes.items():
        extends = isinstance(value, dict) and isinstance(data.get(key), dict) and "kind" not in value
        data[key] = {**data[key], **value} if extends else value
    return data


def recipe_for(models, output, **changes):
    return parse_recipe(block_for(models, output, **changes))


def built(recipe):
    recipe.directory.mkdir(parents=True, exist_ok=True)
    return assemble(recipe, Monitor(recipe.directory, quiet=True))


def tiny_pipeline(seed=0, size=8):
    """A StableDiffusion3Pipeline of a few thousand numbers, with a VAE that halves nothing and two CLIP encoders."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    text = {
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 8,
        "max_position_embeddings": 77,
        "eos_token_id": 1,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    encoders = [CLIPTextModelWithProjection(CLIPTextConfig(**text)) for _ in range(2)]
    tokenizer = symbol_tokenizer(WORDS, words=True)
    tokenizer.model_max_length = 77
    transformer = SD3Transformer2DModel(
        sample_size=size,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=size // 2,
    )
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=1.5,
        shift_factor=0.1,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
