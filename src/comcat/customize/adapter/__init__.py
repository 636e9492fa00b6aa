"""Products on a pipeline: where they go, how they get there and off again, and the words that go with them."""
