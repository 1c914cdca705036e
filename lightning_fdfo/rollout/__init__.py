"""An epoch: from prompts through scored pairs of images to points to train on."""
