"""The demos of the command line: what ``comcat demo`` and ``comcat demo customize`` run, on data that they bring."""
