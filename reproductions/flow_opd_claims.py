"""What the reproduction of Flow-OPD is to decide, and the names of the arms that it compares."""

from __future__ import annotations

from opd.reproductions import Claim

EXPERTS = {task: f"expert {task}" for task in ("count", "glyph", "quality")}
MAIN, PLAIN, MERGE, MIX_ARM = "OPD", "OPD, no anchor", "merge only", "GRPO-Mix"
QUALITY = EXPERTS["quality"]
LONG = "GRPO-Mix, the experts' samples too"


def more(
    id: str, statement: str, metric: str, method: str, baseline: str, margin: float = 0.0, note: str = ""
) -> Claim:
    return Claim(id, statement, metric, "higher", method, baseline, margin=margin, note=note)


SPEED = "sampled_tokens_to_goal"
SHARED_SAMPLES = "samples are equal in all, so each reward has fewer of them"


def less(id: str, statement: str, metric: str, method: str, baseline: str, note: str = "") -> Claim:
    return Claim(id, statement, metric, "lower", method, baseline, note=note)


def equal(id: str, statement: str, metric: str, method: str, baseline: str, margin: float, note: str = "") -> Claim:
    return Claim(id, statement, metric, "higher", method, baseline, test="equivalent", margin=margin, note=note)


HEADLINE = (
    "main",
    "samples",
    "specialist-count",
    "specialist-glyph",
    "specialist-quality",
    "anchor-frechet",
    "own-experts",
    "scale",
)

CLAIMS = [
    more("main", "One student of all experts beats GRPO on the mixture.", "mean", MAIN, MIX_ARM),
    *(
        more(
            f"specialist-{task}",
            f"The student is as good at {task} as that expert, within 3 points.",
            task,
            MAIN,
            stage,
            -0.03,
        )
        for task, stage in EXPERTS.items()
    ),
    more(
        "specialist-scene",
        "The student is as good at quality as that expert on the prompts of scene, where it hears it, within 3 points.",
        "scene_quality",
        MAIN,
        QUALITY,
        -0.03,
    ),
    more(
        "samples",
        "One student of all experts beats GRPO with as many samples as it and all of its experts.",
        "mean",
        MAIN,
        LONG,
    ),
    more(
        "generalist",
        "The student beats the expert of quality, which was rewarded for all and saw more samples than GRPO-Mix.",
        "mean",
        MAIN,
        QUALITY,
    ),
    more("merge", "The student beats the average that it began from.", "mean", MAIN, MERGE),
    more("sft", "The student beats flow matching on the experts' pictures.", "mean", MAIN, "SFT only"),
    more(
        "sft-then",
        "A start by flow matching on the experts' pictures is improved by OPD.",
        "mean",
        "OPD from SFT",
        "SFT only",
    ),
    more(
        "seesaw-count-2",
        "Count falls when glyph is rewarded too.",
        "count",
        "GRPO, 1 reward",
        "GRPO, 2 rewards",
        note=SHARED_SAMPLES,
    ),
    more(
        "seesaw-count-3",
        "Count falls again when quality is rewarded too.",
        "count",
        "GRPO, 2 rewards",
        MIX_ARM,
        note=SHARED_SAMPLES,
    ),
    more(
        "seesaw-glyph",
        "Glyph falls when quality is rewarded too.",
        "glyph",
        "GRPO, 2 rewards",
        MIX_ARM,
        note=SHARED_SAMPLES,
    ),
    more("seesaw-expert", "The expert of count writes worse than the base.", "glyph", "base", EXPERTS["count"]),
    more(
        "start-merge",
        "Merging is no worse a start than SFT (within 1 point).",
        "mean",
        PLAIN,
        "OPD from SFT",
        -0.01,
    ),
    more("start-merge-none", "Merging beats no cold start.", "mean", PLAIN, "OPD from base"),
    more("start-sft-none", "SFT beats no cold start.", "mean", "OPD from SFT", "OPD from base"),
    less(
        "start-merge-speed",
        "From the average OPD needs fewer samples to a goal than from the base.",
        SPEED,
        PLAIN,
        "OPD from base",
    ),
    more("start-grpo", "From the same start OPD beats GRPO.", "mean", PLAIN, "GRPO-Mix from merge"),
    less("anchor-frechet", "With the anchor pictures are nearer to their references.", "frechet", MAIN, PLAIN),
    more("anchor-sharpness", "With the anchor edges are sharper.", "sharpness", MAIN, PLAIN),
    more("anchor-entropy", "With the anchor backgrounds are more various.", "entropy", MAIN, PLAIN),
    more(
        "anchor-novelty",
        "With the anchor pictures are farther from the training pictures.",
        "novelty",
        MAIN,
        PLAIN,
        note="a clean picture of a task with few different ones is near too",
    ),
    more("anchor-quality", "With the anchor quality is higher.", "quality", MAIN, PLAIN),
    more(
        "anchor-quality-strong",
        "With four times the anchor's weight quality is higher than without it.",
        "quality",
        "OPD, anchor 0.08",
        PLAIN,
    ),
    equal("anchor-count", "With the anchor count stays within 2 points.", "count", MAIN, PLAIN, 0.02),
    equal("anchor-glyph", "With the anchor glyph stays within 2 points.", "glyph", MAIN, PLAIN, 0.02),
    less(
        "anchor-strong",
        "Four times the anchor's weight brings pictures nearer to their references.",
        "frechet",
        "OPD, anchor 0.08",
        MAIN,
    ),
    less(
        "anchor-strong-none",
        "With four times the anchor's weight pictures are nearer to their references than without it.",
        "frechet",
        "OPD, anchor 0.08",
        PLAIN,
    ),
    less(
        "anchor-teacher",
        "The expert of quality is a better anchor than the base.",
        "frechet",
        MAIN,
        "OPD, anchor is the base",
    ),
    more(
        "unseen-start",
        "On unseen triples OPD is no worse than its start (within 2 points).",
        "unseen",
        PLAIN,
        MERGE,
        -0.02,
    ),
    more(
        "unseen-grpo",
        "On unseen triples GRPO from the average is worse than the average.",
        "unseen",
        MERGE,
        "GRPO-Mix from merge",
    ),
    equal(
        "detached",
        "The detached estimator leaves the divergence where it was (within 10 %).",
        "log_kl",
        "OPD, pg_detached",
        MERGE,
        0.1,
        "Adam makes steps of full size of pure noise too",
    ),
    less(
        "sample-detached",
        "At one rate pg_sample comes nearer to the experts than the detached estimator.",
        "log_kl",
        "OPD, pg_sample",
        "OPD, pg_detached",
    ),
    less(
        "direct-detached",
        "kl_direct comes nearer to the experts than the detached estimator.",
        "log_kl",
        PLAIN,
        "OPD, pg_detached",
    ),
    less("direct", "kl_direct comes nearer to the experts than pg_sample.", "log_kl", PLAIN, "OPD, pg_sample"),
    more("direct-mean", "kl_direct makes a better student than pg_sample.", "mean", PLAIN, "OPD, pg_sample"),
    equal(
        "gradient-sample",
        "Where training begins the gradient of pg_sample goes as far along the divergence's as that itself (0.2).",
        "along",
        "gradient of pg_sample",
        "gradient of kl_direct",
        0.2,
    ),
    more(
        "own-experts",
        "The student's own states teach more than its experts' (from the average).",
        "mean",
        PLAIN,
        "OPD on experts' rollouts",
    ),
    less(
        "own-experts-kl",
        "On its own states the student comes nearer to the experts than on theirs (from the average).",
        "log_kl",
        PLAIN,
        "OPD on experts' rollouts",
    ),
    more(
        "own-experts-base",
        "The student's own states teach more than its experts' (from the base, which is farther from them).",
        "mean",
        "OPD from base",
        "OPD from base on experts' rollouts",
    ),
    less(
        "own-experts-base-kl",
        "On its own states the student comes nearer to the experts than on theirs (from the base).",
        "log_kl",
        "OPD from base",
        "OPD from base on experts' rollouts",
    ),
    more("own-data", "The student's own states teach more than noised data.", "mean", PLAIN, "OPD on noised data"),
    more(
        "surpassing",
        "The student wins against every expert on more prompts than the average does.",
        "wins",
        MAIN,
        MERGE,
    ),
    Claim(
        "scale",
        "Ten points over GRPO-Mix with Stable Diffusion 3.5 Medium at 512 pixels.",
        testable=False,
        note="That needs the paper's models and rewards: `recipes/flow_opd_sd3_5_medium.yaml`.",
    ),
    Claim(
        "preference",
        "Judges of human preference rise with the anchor.",
        testable=False,
        note="No such judge knows these drawings.",
    ),
]
