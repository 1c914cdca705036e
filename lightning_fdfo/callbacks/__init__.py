"""Callbacks that monitor a run, and write pictures, tables and files into its folder."""

from lightning_fdfo.callbacks.before_after import BeforeAfter
from lightning_fdfo.callbacks.curves import Curves
from lightning_fdfo.callbacks.ema import EMA
from lightning_fdfo.callbacks.epoch_progress import EpochProgress
from lightning_fdfo.callbacks.image_writer import ImageWriter
from lightning_fdfo.callbacks.lora_export import LoRAExport
from lightning_fdfo.callbacks.metrics_writer import MetricsWriter
from lightning_fdfo.callbacks.pair_gallery import PairGallery
from lightning_fdfo.callbacks.pair_log import PairLog
from lightning_fdfo.callbacks.reward_hacking_monitor import Band, RewardHackingMonitor
from lightning_fdfo.callbacks.sample_strip import SampleStrip
from lightning_fdfo.callbacks.slurm_requeue import SLURMRequeue

__all__ = [
    "EMA",
    "Band",
    "BeforeAfter",
    "Curves",
    "EpochProgress",
    "ImageWriter",
    "LoRAExport",
    "MetricsWriter",
    "PairGallery",
    "PairLog",
    "RewardHackingMonitor",
    "SLURMRequeue",
    "SampleStrip",
]
