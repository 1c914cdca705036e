"""What `lightning-fdfo test` computes."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_fdfo.errors import ConfigurationError


@dataclass(frozen=True)
class Evaluation:
    """What `test` computes beside rewards, metrics and image statistics.

    Args:
        base: also paints with the base model, from the same latents: its numbers, the differences, and win rates. Where
            the whole transformer was trained, the base's weights wait on the CPU.
        diversity: what embeds images, to tell how far those of a prompt are from each other: any CLIP of transformers,
            a hub name or a folder, such as `openai/clip-vit-large-patch14`; or `dreamsim`, if that package is
            installed. None leaves diversity out.
        confidence: of the win rates' intervals, in (0, 1).
        num_resamples: of their bootstrap.

    Raises:
        ConfigurationError: a setting out of its range.
    """

    base: bool = True
    diversity: str | None = None
    confidence: float = 0.95
    num_resamples: int = 9999

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1 or self.num_resamples < 1:
            raise ConfigurationError(f"evaluation: expected 0 < confidence < 1 and num_resamples >= 1, got {self}")
