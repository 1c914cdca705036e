"""The commands of `lightning-fdfo`, one per file, and what turns their errors into one line and an exit code."""
