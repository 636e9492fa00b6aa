"""What a compression did, as tables for the terminal and as figures."""
