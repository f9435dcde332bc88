"""Tasks: prompts to decode, and a score for the text that comes back."""
