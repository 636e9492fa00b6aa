"""Tensors only: the closed forms, on which everything else stands."""
