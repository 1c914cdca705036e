"""What refuses a run that cannot work, and ends one that has diverged or is asked to stop."""
