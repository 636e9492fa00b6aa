"""Files: written whole or not at all, read without trust, and a saved model made of them."""
