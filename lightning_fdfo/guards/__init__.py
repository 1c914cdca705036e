"""What refuses a run that cannot work, and ends one that has gone astray or is asked to stop."""
