"""What keeps a run right: guards, checkpoints, trained state."""
