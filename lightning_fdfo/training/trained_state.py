"""The weights that train, and only they, in a checkpoint: saved, and restored strictly.

A checkpoint without the frozen weights is small, and Lightning's own strict loading would refuse it: names, shapes and
the settings that the weights mean nothing without are compared here instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.finite import check_finite_checkpoint, check_finite_weights
from lightning_fdfo.flows.lora import LoRA
from lightning_fdfo.parallel import reshard
from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.rollout.adaptation import Adaptation

ENTRY = "fdfo"
"""The key in a checkpoint for what this package adds."""


class TrainedState(LightningModule):
    """A LightningModule whose checkpoints hold what trains, and what the run has adapted; `FDFOModule` is one."""

    rewards: RewardMix
    adaptation: Adaptation
    lora: LoRA | None
    seed: int
    has_trained: bool

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the trainable weights only, see `dump`, and adds the rewards' scales and what is adapted."""
        dump(checkpoint, self, identity(self.seed, self.lora))
        checkpoint["reward_scales"] = self.rewards.state_dict()
        checkpoint["adaptation"] = self.adaptation.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint is this module's, see `check_restored`, and takes what was added."""
        settings, goes_on = identity(self.seed, self.lora), self.trainer.training
        if not goes_on:
            settings.pop("seed")  # evaluating with other latents is fine, resuming with others is not
        check_restored(checkpoint, self, settings, goes_on=goes_on, path=self.trainer.ckpt_path)
        self.has_trained = True
        self.rewards.load_state_dict(checkpoint.get("reward_scales", {}))
        self.adaptation.load_state_dict(checkpoint.get("adaptation", {}))


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; sharded ones as shards, see `reshard`, so that they can be written to.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = layer.bias.requires_grad_(False)
        >>> list(trainable(layer))
        ['weight']
    """
    reshard(module)
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Shapes by name.

    Example:
        >>> shapes(trainable(nn.Linear(2, 1)))
        {'weight': [1, 2], 'bias': [1]}
    """
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def identity(seed: int, lora: LoRA | None) -> dict[str, float | None]:
    """Settings that trained weights depend on, beside their names and shapes; None for those of a LoRA without one.

    Example:
        >>> identity(0, None)["lora.rank"]
    """
    names = ("rank", "alpha", "rslora", "dora")
    return {"seed": seed, **{f"lora.{name}": getattr(lora, name, None) for name in names}}


def dump(checkpoint: dict[str, Any], module: nn.Module, settings: Mapping[str, Any]) -> None:
    """Keeps of a checkpoint's weights those that train, and notes what they mean nothing without.

    Args:
        checkpoint: Lightning's; its `state_dict` is replaced, and the settings and shapes are added.
        module: whose weights they are.
        settings: that must be the same when the weights are loaded.

    Raises:
        DivergenceError: a weight is not finite; no file is written.
    """
    own = trainable(module)
    checkpoint[ENTRY] = {**checkpoint.get(ENTRY, {}), **settings}
    checkpoint["shapes"] = shapes(own)
    weights = checkpoint["state_dict"]  # empty but on the first process, where weights are sharded
    checkpoint["state_dict"] = {name: weights[name] for name in own if name in weights}
    check_finite_weights(checkpoint["state_dict"])


def check_restored(
    checkpoint: Mapping[str, Any], module: nn.Module, settings: Mapping[str, Any], *, goes_on: bool, path: object
) -> None:
    """Checks that a checkpoint's weights are this module's; Lightning, or the strategy, loads them.

    Args:
        checkpoint: as it was read.
        module: whose weights they are to be.
        settings: that the weights depend on, as `dump` has noted them.
        goes_on: whether `fit` goes on from it, which takes the optimiser's state too.
        path: of the checkpoint, for messages.

    Raises:
        ConfigurationError: settings, names or shapes differ, a number is not finite, or `fit` lacks the optimiser.
    """
    if goes_on:
        check_complete(checkpoint, path)
    check_settings(checkpoint.get(ENTRY, {}), settings)
    own = trainable(module)
    check_weights(checkpoint.get("shapes", {}), shapes(own))
    if "state_dict" in checkpoint:  # where weights are sharded, the strategy has loaded it already
        check_weights(shapes(checkpoint["state_dict"]), shapes(own))
    check_finite_checkpoint(checkpoint.get("state_dict") or own, "weights")
    if goes_on:
        check_finite_checkpoint(optimizer_tensors(checkpoint), "optimiser's state")


def check_complete(checkpoint: Mapping[str, Any], path: object) -> None:
    """Raises ConfigurationError for a checkpoint from which no run can resume: it holds weights and no optimiser.

    Example:
        >>> check_complete({"state_dict": {}, "optimizer_states": []}, "a.ckpt")
    """
    if "optimizer_states" not in checkpoint:
        raise ConfigurationError(
            f"checkpoint {path} holds weights only, as save_weights_only writes them, and fit cannot resume from it; "
            "validate, test and predict take it, and a new run begins with a LoRA's file by --model.lora.init_lora"
        )


def check_settings(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Compares settings without which a checkpoint's weights mean something else.

    Raises:
        ConfigurationError: some differ; the message names them with both values.

    Example:
        >>> check_settings({"seed": 0, "lora.alpha": 4.0}, {"seed": 0})
    """
    has = saved if isinstance(saved, Mapping) else {}
    differing = [
        f"with {name}={has.get(name)}, the configuration says {value}"
        for name, value in own.items()
        if has.get(name) != value
    ]
    if differing:
        raise ConfigurationError(
            f"the checkpoint was written {'; '.join(differing)}: use the configuration that it was written with"
        )


def check_weights(saved: Mapping[str, Sequence[int]], own: Mapping[str, Sequence[int]]) -> None:
    """Compares names and shapes of a checkpoint's weights with those that train here.

    The frozen weights are not in a checkpoint, so that Lightning's own strict loading would not do.

    Raises:
        ConfigurationError: they are not the same; the message has the first that differs, with both.

    Example:
        >>> check_weights({"B": [8, 4]}, {"B": [8, 4]})
    """
    differing = [name for name in sorted({*saved, *own}) if list(saved.get(name, ())) != list(own.get(name, ()))]
    if differing:
        first = differing[0]
        has, needs = (list(shapes[first]) if first in shapes else "nothing" for shapes in (saved, own))
        raise ConfigurationError(
            f"the checkpoint is of another model or LoRA: {len(differing)} weights differ in name or shape, "
            f"first {first}: it has {has}, expected {needs}; use the configuration that it was written with"
        )


def optimizer_tensors(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint's optimisers, by a name that says which."""
    return {
        f"{key} of weight {number}": value
        for optimizer in checkpoint.get("optimizer_states", ())
        for number, state in optimizer.get("state", {}).items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
