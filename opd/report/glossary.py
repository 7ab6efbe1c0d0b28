"""What the logged names mean: titles, units and which direction is better. A name that is not here still shows.

A key that ends with `/` describes all names that begin with it; the rest of the name follows its title.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Meaning:
    title: str
    unit: str = ""
    about: str = ""
    better: Literal["lower", "higher", ""] = ""


MEANINGS = {
    "held_out/forward_kl": Meaning(
        "forward KL", "nats a token", "KL(teacher || student) on the student's own held-out answers", "lower"
    ),
    "held_out/reverse_kl": Meaning(
        "reverse KL", "nats a token", "KL(student || teacher) on the student's own held-out answers", "lower"
    ),
    "held_out/forward_kl_top_k": Meaning(
        "forward KL, top K", "nats a token", "over the teacher's K tokens and the bucket of all others", "lower"
    ),
    "held_out/reverse_kl_top_k": Meaning(
        "reverse KL, top K", "nats a token", "over the teacher's K tokens and the bucket of all others", "lower"
    ),
    "held_out/reverse_kl_sampled": Meaning(
        "reverse KL, sampled", "nats a token", "mean of log q - log p over the tokens that the student drew", "lower"
    ),
    "held_out/top1_agreement": Meaning(
        "top-1 agreement", "share of tokens", "states where both find the same token most likely", "higher"
    ),
    "held_out/student_entropy": Meaning("student's entropy", "nats a token"),
    "held_out/teacher_entropy": Meaning("teacher's entropy", "nats a token", "on the student's answers"),
    "held_out/length": Meaning("length", "tokens"),
    "held_out/truncated": Meaning("truncated", "share of answers", "cut off by the token budget", "lower"),
    "held_out/accuracy": Meaning(
        "accuracy",
        "share of answers",
        "as the verifier or the environment judged; with several samples a prompt Avg@k",
        "higher",
    ),
    "held_out/pass_at_k": Meaning(
        "Pass@k", "share of prompts", "with a right answer among evaluation.k samples", "higher"
    ),
    "held_out/greedy_accuracy": Meaning("greedy accuracy", "share of answers", "of greedy decoding", "higher"),
    "held_out/greedy_length": Meaning("greedy length", "tokens", "of greedy decoding"),
    "held_out/accuracy_low": Meaning("accuracy, lower end", "share of episodes", "of Wilson's interval of 95 %"),
    "held_out/accuracy_high": Meaning("accuracy, upper end", "share of episodes", "of Wilson's interval of 95 %"),
    "held_out/accuracy/": Meaning("accuracy on task", "share of answers", "by the rows' column `task`", "higher"),
    "held_out/steps": Meaning("steps", "", "of an episode: of the environment, or turns of a language agent", "lower"),
    "held_out/reverse_kl/": Meaning(
        "reverse KL at", "nats", "of image models at a step of the sampler, summed over the latent", "lower"
    ),
    "report/teacher_answers": Meaning("teacher's answers for the report", "answers", "asked for once, before training"),
    "report/teacher_tokens": Meaning("tokens of the teacher's answers for the report", "tokens"),
    "train/loss": Meaning("loss", "", "what the optimiser descends, after weights and reduction"),
    "train/divergence": Meaning(
        "value of the first objective",
        "nats a token",
        "its divergence, of sft the negative log-likelihood, of grpo the surrogate: mean over the tokens that it "
        "counts, unweighted",
    ),
    "train/nll": Meaning(
        "negative log-likelihood",
        "nats a token",
        "of the tokens that objective sft imitates, under the student",
        "lower",
    ),
    "train/squared_error": Meaning(
        "squared error", "", "of the velocity that objective sft imitates, mean over latents", "lower"
    ),
    "train/objective/": Meaning(
        "objective", "a token", "value of one of several objectives, mean over the tokens that it counts, unweighted"
    ),
    "train/positions": Meaning("positions", "tokens", "of the step, that some objective counts"),
    "train/alignment/single_bytes": Meaning(
        "another tokenizer: compared as distributions",
        "share of bytes",
        "in pieces that are one token on both sides",
        "higher",
    ),
    "train/alignment/span_bytes": Meaning(
        "another tokenizer: compared by the chain rule", "share of bytes", "in pieces of several tokens on a side"
    ),
    "train/alignment/uncompared_bytes": Meaning(
        "another tokenizer: not compared", "share of bytes", "of texts that the budget cut", "lower"
    ),
    "train/alignment/single_spans": Meaning(
        "another tokenizer: one token on both sides", "share of pieces", "between boundaries that both have", "higher"
    ),
    "train/alignment/common_mass": Meaning(
        "another tokenizer: probability on common tokens",
        "share",
        "of the teacher's, where distributions are compared; the rest is one bucket",
        "higher",
    ),
    "train/alignment/left_out": Meaning(
        "another tokenizer: left out",
        "share of rollouts",
        "whose text the teacher's tokenizer does not give back",
        "lower",
    ),
    "train/alignment/": Meaning("another tokenizer", "share", "of a teacher, a route or an expert of this name"),
    "train/clipped": Meaning("clipped", "share of tokens", "where the divergence is beyond the objective's clip"),
    "train/invalid": Meaning(
        "without an answer",
        "share of rollouts",
        "that a teacher was asked about in vain, or whose episode was lost: they are in nothing else of the step",
        "lower",
    ),
    "train/agent/turns": Meaning("turns", "of an episode", "mean over the step"),
    "train/agent/ended_by_itself": Meaning("ended by itself", "share of episodes", "that their environment ended"),
    "train/agent/ended_by_turns": Meaning("out of turns", "share of episodes", "that ended by rollout.turns", "lower"),
    "train/agent/ended_by_context": Meaning(
        "out of context", "share of episodes", "that ended by rollout.max_context_tokens", "lower"
    ),
    "train/agent/faults": Meaning(
        "unreadable calls", "share of turns", "in which something that begins like a tool's call is none", "lower"
    ),
    "train/agent/seconds": Meaning("environments", "seconds", "of the step in which environments were waited for"),
    "train/agent/restarts": Meaning("restarts", "worlds", "that were made again since they failed", "lower"),
    "train/simulator_steps": Meaning("simulators: steps", "a step", "of environments, in training episodes"),
    "train/simulator_seconds": Meaning(
        "simulators: time", "seconds", "of the step in which simulators were waited for"
    ),
    "train/simulator_restarts": Meaning("simulators: restarts", "worlds", "made again since they failed", "lower"),
    "train/empty": Meaning("empty", "", "1 where the step had nothing to learn and was not taken"),
    "train/skipped": Meaning(
        "skipped", "", "1 where loss or gradient was not finite: the weights did not move", "lower"
    ),
    "train/schedule/": Meaning("schedule of", "", "the number that this key of the recipe had at the step"),
    "train/curriculum/rung": Meaning("rung", "", "of the length ladder, from 0"),
    "train/curriculum/length": Meaning("rung's length", "tokens", "budget of a trajectory on this rung"),
    "train/curriculum/window": Meaning("window", "tokens", "budget of each of the step's rollouts"),
    "train/curriculum/hits": Meaning(
        "hits", "share of rollouts", "whose effective length came near enough to the window's end"
    ),
    "train/curriculum/effective_length": Meaning(
        "effective length", "tokens", "of a rollout until drift has used its weight up, mean over the step"
    ),
    "train/curriculum/effective_length_least": Meaning("effective length, least", "tokens", "of the step's rollouts"),
    "train/curriculum/effective_length_most": Meaning("effective length, most", "tokens", "of the step's rollouts"),
    "train/overlap": Meaning(
        "overlap", "share of tokens", "of student's and teacher's likeliest that both have, mean over positions"
    ),
    "train/weighted_overlap": Meaning(
        "overlap by probability",
        "share",
        "of the student's probability on its likeliest tokens that lies on the teacher's, mean over positions",
    ),
    "train/acceptance_length": Meaning(
        "acceptance length", "tokens", "that a pass of the target adds while it verifies a block", "higher"
    ),
    "held_out/acceptance_length": Meaning(
        "acceptance length", "tokens", "that a pass of the target adds while it verifies a block", "higher"
    ),
    "train/accepted_proposals": Meaning("accepted proposals", "of a block", "", "higher"),
    "held_out/accepted_proposals": Meaning("accepted proposals", "of a block", "", "higher"),
    "train/target_passes": Meaning("passes of the target", "rows", "that read the prompts and verified", "lower"),
    "train/written_tokens": Meaning("written by the target", "tokens"),
    "train/passes_saved": Meaning(
        "passes of the target saved", "share", "of those that it takes alone, one a token", "higher"
    ),
    "train/accepted_at/": Meaning("proposals that stood at slot", "share of blocks", "", "higher"),
    "held_out/accepted_at/": Meaning("proposals that stood at slot", "share of blocks", "", "higher"),
    "train/accepted": Meaning("accepted", "share of tokens", "that are among the teacher's likeliest of a given mass"),
    "train/drifted": Meaning("drift events", "share of positions", "where student and teacher part"),
    "train/reliable": Meaning("reliable", "share of positions", "up to the drift event that uses the weight up"),
    "train/curriculum/prompts/": Meaning("prompts with right answers", "prompts", "by how many answers were right"),
    "train/curriculum/repeats/": Meaning("repeats", "", "of a prompt with so many right answers, in the balanced set"),
    "train/route/": Meaning(
        "route",
        "",
        "of a routed teacher, over its own prompts alone: trajectories of the step, their length in tokens and reward, "
        "divergence in nats a token, and what shapings measure",
    ),
    "train/curriculum/balanced/": Meaning(
        "balanced prompts with right answers", "prompts", "the same in the balanced set, copies counted"
    ),
    "train/curriculum/prompts_balanced": Meaning("balanced set", "prompts", "each as often as it stands in it"),
    "train/curriculum/round": Meaning("round", "", "of focusing, from 1"),
    "train/curriculum/judged": Meaning("prompts with a verdict", "prompts", "on the teacher's answers"),
    "train/curriculum/reliable": Meaning("reliable", "share of prompts", "the teacher's mean reward is high enough"),
    "train/curriculum/drawn": Meaning("prompts of the round", "prompts"),
    "train/curriculum/reliability": Meaning("reliability", "reward", "the teacher's, mean of the round's prompts"),
    "train/curriculum/student": Meaning("student's reward", "reward", "as the round began, mean of its prompts"),
    "train/curriculum/disagreement": Meaning("disagreement", "", "of teacher and student, mean of the round's prompts"),
    "train/recall_at_0.3": Meaning("recall at IoU 0.3", "share of answers", "whose interval overlaps so far", "higher"),
    "train/recall_at_0.5": Meaning("recall at IoU 0.5", "share of answers", "whose interval overlaps so far", "higher"),
    "train/recall_at_0.7": Meaning("recall at IoU 0.7", "share of answers", "whose interval overlaps so far", "higher"),
    "held_out/recall_at_0.3": Meaning(
        "recall at IoU 0.3", "share of answers", "whose interval overlaps so far", "higher"
    ),
    "held_out/recall_at_0.5": Meaning(
        "recall at IoU 0.5", "share of answers", "whose interval overlaps so far", "higher"
    ),
    "held_out/recall_at_0.7": Meaning(
        "recall at IoU 0.7", "share of answers", "whose interval overlaps so far", "higher"
    ),
    "train/parsed": Meaning("answers with an interval", "share of answers", "", "higher"),
    "held_out/parsed": Meaning("answers with an interval", "share of answers", "", "higher"),
    "held_out/teacher_accuracy": Meaning("the teacher's accuracy", "share of answers", "of its own greedy answers"),
    "train/curriculum/solved_before": Meaning(
        "solved before", "share of answers", "right ones before training, to this step's prompts"
    ),
    "train/margin/": Meaning(
        "margin",
        "",
        "returns of right less those of wrong trajectories: before and after calibration, lam is what was missing "
        "(nats a token), delta the least that is asked for, p10 to p90 percentiles over the groups with both outcomes; "
        "mixed, calibrated and inverted: shares of groups; raised, lowered and masked: of trajectories",
    ),
    "train/group_margin": Meaning("margin", "nats a token", "of the token's prompt, mean over tokens"),
    "train/group_margin_after": Meaning("margin after", "nats a token", "the same after calibration"),
    "train/inverted": Meaning(
        "inverted", "share of tokens", "of answers whose return is on the wrong side of one of the other outcome"
    ),
    "train/margin_kept": Meaning("kept by the mask", "share of tokens"),
    "train/outcome_kept": Meaning("kept by the balancer", "share of tokens"),
    "train/balance/": Meaning(
        "balance", "share of trajectories", "right ones, those kept, and right ones among those kept"
    ),
    "train/return": Meaning("return", "nats a token", "mean log p(token) - log q(token) of the token's trajectory"),
    "train/bonus": Meaning("bonus", "nats a token", "that the outcome added to the token's log-probability"),
    "train/bonus/": Meaning("bonus", "share of groups", "with both outcomes, which alone get one"),
    "train/importance": Meaning("importance", "ratio", "q(token) now over then, cut at the limit; mean over tokens"),
    "train/importance_cut": Meaning("importance cut", "share of tokens", "whose ratio is beyond the limit"),
    "train/gated": Meaning("gated", "share of tokens", "left out for their log-ratio"),
    "train/length": Meaning("length", "tokens"),
    "train/truncated": Meaning("truncated", "share of rollouts"),
    "train/stopped": Meaning("stopped", "share of rollouts", "ended by the rollout's watch"),
    "train/reward": Meaning("reward", "", "mean of what the verifier, or the environment, said of outcomes"),
    "train/code/": Meaning(
        "programs", "share of programs", "that met their time, their memory, or were stopped for something else"
    ),
    "train/engine/staleness": Meaning(
        "engine: age of the weights", "steps", "behind those that learn, of what was written ahead", "lower"
    ),
    "train/engine/score_gap": Meaning(
        "engine: gap after the weights were sent", "nats", "median over 32 tokens behind a known text", "lower"
    ),
    "train/engine/push_seconds": Meaning("engine: time of sending weights", "s", "", "lower"),
    "train/engine/pushes": Meaning("engine: times that weights were sent"),
    "train/engine/waited": Meaning("engine: wait for what was written ahead", "s", "", "lower"),
    "train/engine/rewritten": Meaning(
        "engine: rows written anew", "rows", "since other weights than the student's had written them", "lower"
    ),
    "train/engine/retried": Meaning("engine: requests tried again", "", "", "lower"),
    "train/engine/acceptance_length": Meaning(
        "engine: acceptance length",
        "tokens",
        "that a pass of the student adds while it verifies; of held-out answers since the step before too",
        "higher",
    ),
    "train/engine/target_passes": Meaning(
        "engine: passes of the student", "rows", "that read prompts and verified proposals", "lower"
    ),
    "train/engine/written_tokens": Meaning("engine: written with a drafter's help", "tokens"),
    "train/engine/passes_saved": Meaning(
        "engine: passes of the student saved",
        "share",
        "of those that it takes alone, one a token",
        "higher",
    ),
    "train/engine/drafter_loss": Meaning(
        "engine: drafter's loss",
        "nats",
        "of what is trained beside the student, on a step's blocks",
        "lower",
    ),
    "train/engine/drafter_gradient_norm": Meaning("engine: gradient norm of the drafter", "", "before clipping"),
    "train/rollout_gap": Meaning(
        "rollout gap",
        "nats a token",
        "mean absolute difference of the sampler's and the trainer's log-probabilities; should be near zero",
    ),
    "held_out/drift": Meaning(
        "drift", "ratio", "mean of q(token) now over then, on held-out completions of the student that wrote the store"
    ),
    "held_out/drift_std": Meaning("drift, spread", "ratio", "standard deviation of the same"),
    "train/drift": Meaning("drift", "ratio", "mean of q(token) now over when the store was written, on this step's"),
    "train/drift_std": Meaning("drift, spread", "ratio", "standard deviation of the same"),
    "train/advantage": Meaning("advantage", "nats a token", "log p(token) - log q(token), mean over the step"),
    "train/advantage_size": Meaning("size of advantage", "nats a token", "mean of its absolute value"),
    "train/clamped": Meaning("clamped", "share of tokens", "whose advantage was cut at the bound"),
    "train/teacher_hit_rate": Meaning("hit rate", "share", "of positions whose answers the teacher had already"),
    "train/gradient_norm": Meaning("gradient norm", "", "before clipping; of a private update that of the noisy mean"),
    "train/epsilon": Meaning("epsilon", "", "of the privacy that was spent so far; smaller is more private", "lower"),
    "train/scaled_down": Meaning("scaled down", "share of trajectories", "whose gradient a private update clipped"),
    "train/gradient_median": Meaning("median gradient", "norm", "of a private step's trajectories, before clipping"),
    "train/examples": Meaning("drawn", "trajectories a step", "whose number a private update varies at random"),
    "train/one_by_one": Meaning(
        "one by one", "", "1 where each trajectory of a private step had a backward pass of its own"
    ),
    "train/expert_load_max": Meaning(
        "load of the busiest expert",
        "",
        "its share of a layer's choices times the number of experts; 1 is even",
        "lower",
    ),
    "train/router_loss": Meaning("routers' auxiliary loss", "", "before its coefficient"),
    "train/learning_rate": Meaning("learning rate"),
    "train/cpu_seconds": Meaning("CPU time", "seconds a step", "of the main process, evaluations not counted"),
    "train/sampled_tokens": Meaning("sampled tokens", "a step", "positions that a model drew in the rollout"),
    "train/teacher_tokens": Meaning("teacher tokens", "a step", "positions that teachers scored"),
    "train/debate/held": Meaning("debates held", "prompts", "since the step before, those of held-out prompts too"),
    "train/debate/tokens": Meaning("debate tokens", "since the step before", "that experts wrote", "lower"),
    "train/debate/read_tokens": Meaning(
        "debate: tokens read", "since the step before", "prompts and transcripts, before what was written", "lower"
    ),
    "train/debate/hit_rate": Meaning("debates that were there", "share of prompts", "asked about in this step"),
    "train/debate/untagged": Meaning(
        "debates without weights", "share", "some expert did not say how sure it is, so all count alike", "lower"
    ),
    "train/debate/weight/": Meaning("weight of expert", "", "mean over the step's debates"),
    "train/debate/sure/": Meaning("confidence of expert", "of 100", "mean over the step's debates; 0 without a tag"),
    "train/seconds/": Meaning("wall time", "seconds a step", "of this phase; `step` is all of them"),
    "train/tokens_per_second": Meaning("speed", "trained tokens a second"),
}


def glossary() -> dict[str, dict[str, Any]]:
    return {name: asdict(meaning) for name, meaning in MEANINGS.items()}
