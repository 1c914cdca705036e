"""Rewards for lightning-fdfo, one a file; they are found through entry points."""
