"""The small pretrained model that the quick start runs on; its folder is in diffusers' own format."""
