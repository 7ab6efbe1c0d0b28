"""What combines: every pair of choices, in one recipe of a tiny task. `python -m benchmarks.combinations`."""
