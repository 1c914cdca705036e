"""Rewards for lightning-fdfo, one per file; they are found through entry points."""
