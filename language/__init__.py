"""Prompts: which token columns each word has, which words are nouns, and the sub-prompts that a prompt is taken apart into."""
