"""What choices for image-text models share: pictures of prompts, processors, and the engine."""
