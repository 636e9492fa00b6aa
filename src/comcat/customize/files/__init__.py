"""Adapter files: header, tensors, and reading both without trust."""
