"""Export: what a run has trained, as something to give away: a LoRA or a whole pipeline, with a model card."""
