"""The report: what a run has left in its folder, as one page that needs nothing else."""
