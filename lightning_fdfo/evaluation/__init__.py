"""Numbers about images that no reward asks for: what they look like, how they differ, which of two models wins."""
