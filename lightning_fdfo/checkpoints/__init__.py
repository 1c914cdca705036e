"""What a run leaves to go on from: its folder, its checkpoints and their settings."""
