"""Adapters of fewer bytes: what every rank component is worth, and which are kept under a budget."""
