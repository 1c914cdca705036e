"""Whether each prompt can be scored by the rewards that it goes to, asked before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.prompts import Prompt
from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.reward.routing import check_route, is_for


def check_prompts(
    rewards: RewardMix, metrics: RewardMix | None, train: Sequence[Prompt], val: Sequence[Prompt]
) -> None:
    """Refuses a prompt that goes to a reward which cannot score it.

    Args:
        rewards: the mixture that trains.
        metrics: the rewards of validation alone; None for none.
        train: prompts that are trained on.
        val: prompts of validation, `test` or `predict`.

    Raises:
        ConfigurationError: with file and line of the first such prompt.
    """
    mixtures = [(rewards, [*train, *val])] + ([] if metrics is None else [(metrics, list(val))])
    names = [name for mixture, _ in mixtures for name in mixture.terms]
    for mixture, prompts in mixtures:
        for prompt in prompts:
            try:
                check_route(prompt.metadata, rewards.terms, names)
                own = [name for name in mixture.terms if is_for(name, prompt.metadata)]
                mixture.check(prompt.text, prompt.metadata, own)
            except ConfigurationError as error:
                raise ConfigurationError(f"{prompt.source}: {error}") from error
