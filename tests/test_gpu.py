"""What must hold on a GPU; the same tests run on the CPU. `make gpu` runs those marked `gpu`."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file

from opd.api import execute
from opd.checkpoints.store import folder_of, steps_stored
from opd.context import Context
from opd.distributions import Categorical, Head
from opd.divergences import ForwardKL, JensenShannon, ReverseKL, Target, divergence_loss
from opd.language.attention import installed
from opd.language.engines.layouts import usual_layout
from opd.language.engines.transformers import LanguageModel
from opd.language.own_outputs import check_logits
from opd.language.rollout import LanguageRollout
from opd.language.tokens import Tokens
from opd.policies.causal_lm import CausalLMStudent
from opd.rollouts import HeldOutSampler
from opd.rollouts.student import StudentRollout
from tests.conftest import save_tiny, tiny_model, trajectories_of
from tests.test_loop import recipe_for

cuda = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
on_each_device = pytest.mark.parametrize("device", ["cpu", cuda])


def forward_kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jensen_shannon(log_p, log_q):
    middle = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=log_p.dtype))
    return 0.5 * forward_kl(log_p, middle) + 0.5 * forward_kl(log_q, middle)


DEFINITIONS = {
    "forward_kl": (ForwardKL(), forward_kl),
    "reverse_kl": (ReverseKL(), lambda log_p, log_q: forward_kl(log_q, log_p)),
    "jensen_shannon": (JensenShannon(beta=0.5), jensen_shannon),
}


@on_each_device
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("kind", list(DEFINITIONS))
def test_loss_and_gradients_against_float64(kind, dtype, tolerance, device):
    """Several chunks, half of the positions masked, in the dtype that models have there."""
    divergence, definition = DEFINITIONS[kind]
    generator = torch.Generator().manual_seed(0)
    sizes = {"hidden": (300, 32), "weight": (640, 32), "teacher": (300, 48), "teacher_weight": (640, 48)}
    given = {name: torch.randn(*size, generator=generator).to(device, dtype) for name, size in sizes.items()}
    given["weight"] *= 32**-0.5
    given["teacher_weight"] *= 48**-0.5
    weights = (torch.rand(300, generator=generator) < 0.5).float().to(device) / 150
    mine = {name: given[name].clone().requires_grad_() for name in ("hidden", "weight")}
    target = Target(Categorical(given["teacher"], Head(given["teacher_weight"])))
    loss = divergence_loss(
        divergence,
        Categorical(mine["hidden"], Head(mine["weight"])),
        [target],
        weights,
        torch.zeros(300, dtype=torch.int64, device=device),
        torch.tensor([300]),
        rows=64,
    )
    loss.total.backward()

    exact = {name: value.double().requires_grad_(name in mine) for name, value in given.items()}
    log_q = torch.log_softmax(exact["hidden"] @ exact["weight"].T, -1)
    log_p = torch.log_softmax(exact["teacher"] @ exact["teacher_weight"].T, -1)
    total = (definition(log_p, log_q) * weights.double()).sum()
    total.backward()
    assert float(loss.total) == pytest.approx(float(total), rel=tolerance)
    for name, leaf in mine.items():
        error = (leaf.grad.double() - exact[name].grad).norm() / exact[name].grad.norm()
        assert error <= tolerance, (name, float(error))


@on_each_device
def test_rollouts_and_their_log_probabilities_are_those_of_the_cpu(device, student, prompts):
    """A row's draws belong to its seed, so they are the CPU's but where rounding decides."""
    there = copy.deepcopy(student.language).to(device)
    context = Context(torch.device(device), agreed=Tokens(end_ids=(0,)))
    rollouts = [
        HeldOutSampler(LanguageRollout(language, StudentRollout(), at), StudentRollout(), at)(prompts, 4, 24, stream=0)
        for language, at in ((student.language, student.context), (there, context))
    ]
    here, found = rollouts
    assert found.actions.device.type == device
    same = [torch.equal(a, b.cpu()) for a, b in zip(here.completions(), found.completions(), strict=True)]
    assert sum(same) >= 0.9 * len(same)
    # The policy's layout on a GPU is another one than the sampler's.
    scored = CausalLMStudent(there, None, context)(found)
    log_probs = scored.log_probs().gather(1, found.actions[:, None]).squeeze(1)
    assert (log_probs - found.behaviour_log_probs).abs().max() <= 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_without_padding_by_flash_attention_itself(tokenizer):
    if not installed("flash_attention_2"):
        pytest.skip("needs flash-attn, or kernels")
    model = tiny_model("qwen3", width=128).to("cuda", torch.bfloat16)
    model.set_attn_implementation("flash_attention_2")
    language = LanguageModel(model, tokenizer, "plain")
    assert usual_layout(model, "cuda") == "varlen"
    trajectories = trajectories_of([5, 1, 9, 3])
    check_logits(language, trajectories.contexts, trajectories.completions(), "the student")
    of_layouts = [language(trajectories.contexts, trajectories.completions(), way) for way in ("varlen", "right")]
    assert (of_layouts[0] - of_layouts[1]).abs().mean() <= 0.02 * of_layouts[1].abs().mean()


@pytest.fixture
def models(tmp_path):
    return save_tiny(tmp_path / "student", seed=1), save_tiny(tmp_path / "teacher", seed=2, vocabulary=72)


@on_each_device
def test_training_in_bf16_moves_the_student_to_the_teacher(device, models, tmp_path):
    recipe = recipe_for(models, tmp_path, hardware={"device": device, "precision": "bf16"}, steps=5)
    result = execute(recipe, quiet=True)
    assert result.summary["steps"] == 5
    assert result.after["reverse_kl"] < result.before["reverse_kl"]


@on_each_device
def test_a_run_goes_on_from_its_checkpoint(device, models, tmp_path):
    def recipe(name, steps):
        hardware, checkpoint = {"device": device}, {"every": 1, "keep_last": 1}
        return recipe_for(
            models, tmp_path, output=str(tmp_path / name), steps=steps, hardware=hardware, checkpoint=checkpoint
        )

    execute(recipe("whole", 4), quiet=True)
    execute(recipe("broken", 2), quiet=True)
    execute(recipe("broken", 4), quiet=True, resume=True)
    whole, broken = (
        load_file(folder_of(tmp_path / name, steps_stored(tmp_path / name)[0]) / "tensors.safetensors")
        for name in ("whole", "broken")
    )
    assert whole.keys() == broken.keys()
    for name, value in whole.items():
        # Kernels of a GPU may add up in another order each time.
        assert torch.allclose(value.double(), broken[name].double(), rtol=1e-4, atol=1e-5), name
