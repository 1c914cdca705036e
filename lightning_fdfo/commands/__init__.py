"""The commands of `lightning-fdfo`, one a file, and what turns their errors into one line and an exit code."""
