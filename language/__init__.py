"""Prompts as words: which token columns each word has, and which words are nouns."""
