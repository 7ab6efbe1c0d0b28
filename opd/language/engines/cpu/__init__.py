"""The fast path of language models on a CPU: rows without padding, weights ordered once, a decoder without modules."""
