"""The web page of ``comcat ui``: customize, draw and compress with the mouse, through the commands' own code."""
