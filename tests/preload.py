"""What a run imports: loaded once, in the process that `tests/processes.py` forks commands from."""

import diffusers.pipelines.stable_diffusion_3  # noqa: F401 - of the shipped model
import lightning_fdfo_rewards.clip
import lightning_fdfo_rewards.ocr  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import scipy.stats  # noqa: F401
import torch._dynamo
import torch.utils.tensorboard  # noqa: F401
import torchmetrics  # noqa: F401
from transformers import CLIPTextModelWithProjection, CLIPTokenizer  # noqa: F401

import lightning_fdfo.commands.cli  # noqa: F401 - before its parts, as the command does: help lists classes in this order
