"""The configuration of a run: its parser, what a command line changes in it, and what is built from it."""
