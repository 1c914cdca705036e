"""The report: what a run has left in its folder, as one self-contained page."""
