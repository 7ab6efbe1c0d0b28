"""What flow-matching policies, teachers and rollouts share: a model with its prompt encoder, and the sampler."""
