"""Policies that act: what they see, how actions are tokens, and the models that choose them."""
