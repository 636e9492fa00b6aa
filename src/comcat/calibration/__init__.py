"""Statistics of a model's activations: how they are collected, what is kept, and whose they are."""
