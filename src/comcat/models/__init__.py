"""Somebody's model: opening, describing, rebuilding and running it."""
