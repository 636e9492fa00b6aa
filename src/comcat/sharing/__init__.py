"""Giving a compressed model to others: the Hub, and the card that goes with it."""
