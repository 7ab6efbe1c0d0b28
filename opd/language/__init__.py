"""What token policies, teachers and rollouts share: a model with its tokenizer and head, and the sampler."""
