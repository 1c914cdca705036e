"""What a run leaves for a resume: its folder, its checkpoints and their settings."""
