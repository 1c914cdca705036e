"""Export: what a run has trained: a LoRA or a complete pipeline, with a model card."""
