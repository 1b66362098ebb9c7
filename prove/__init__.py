"""Methods judged on anybody's checkpoint: a suite of prompts, pictures at the same seeds, scores, and a report to send back."""
