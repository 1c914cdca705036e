"""An epoch: prompts in, scored pairs of images in between, points to train on out."""
