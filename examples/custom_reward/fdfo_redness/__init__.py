"""How red an image is: a reward in twenty lines."""

from lightning_fdfo import Reward
from lightning_fdfo.errors import ConfigurationError


class Redness(Reward):
    """Mean of red - (green + blue) / 2, from -1 to 1, times `gain`."""

    range = (-1.0, 1.0)

    def __init__(self, gain: float = 1.0) -> None:
        if gain <= 0:
            raise ConfigurationError(f"Redness: expected gain > 0, got {gain}")
        self.gain = gain
        self.range = (-gain, gain)

    def __call__(self, images, prompts, metadata):
        """Images [N, 3, H, W] in [0, 1], N strings and N mappings -> [N]."""
        red, green, blue = images.mean(dim=(2, 3)).unbind(dim=1)
        return self.gain * (red - (green + blue) / 2)
