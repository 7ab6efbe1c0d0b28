"""Who holds a language model: reads prompts, writes completions, scores completions. One file an engine."""
