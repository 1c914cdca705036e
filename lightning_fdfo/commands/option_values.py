"""Values of options that several commands have: a device, a reward's options, YAML."""

from __future__ import annotations

from typing import Any

import torch
import yaml

from lightning_fdfo.errors import ConfigurationError


def parse_device(text: str) -> torch.device:
    """The device that `--device` names; raises ConfigurationError unless this machine has it."""
    try:
        return torch.empty(0, device=text).device
    except Exception as error:  # torch raises RuntimeError, AssertionError and others of its own
        reason = str(error).strip().partition("\n")[0]
        raise ConfigurationError(f"--device: expected one like cpu or cuda, got {text!r}: {reason}") from error


def parse_init_args(text: str) -> dict[str, Any]:
    """A reward's options that `--init_args` gives; raises ConfigurationError unless they are a mapping in YAML.

    Example:
        >>> parse_init_args("{quality: 80}")
        {'quality': 80}
    """
    parsed = parse_yaml(text, "--init_args")
    if not isinstance(parsed, dict):
        raise ConfigurationError(f"--init_args: expected a mapping like '{{quality: 80}}', got {text!r}")
    return parsed


def parse_yaml(text: str, option: str) -> Any:
    """YAML on the command line; raises ConfigurationError, which names the option, for what is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{option}: not YAML: {text!r}") from error
