"""Judging adapters: what they draw against photos of the subject, against the prompts, and against the base."""
