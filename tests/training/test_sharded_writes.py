"""FSDP2's root keeps what a forward has gathered, and loses what is written there: here, on a mesh of one process."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_fdfo.callbacks import EMA
from lightning_fdfo.parallel import placed_as, reshard
from lightning_fdfo.training.best_weights import BestWeights
from lightning_fdfo.training.trained_state import trainable
from lightning_fdfo.training.trust_region import TrustRegion

NAME = "0.weight"


def test_weights_that_fsdp2_has_gathered_are_sharded_before_they_are_written(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer = nn.Linear(2, 2, bias=False)
        module, given = nn.Sequential(layer), torch.ones(1, 2)
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        ema, kept = EMA(0.5, rollouts=True), BestWeights()
        kept.begin(module, trainable(module))
        start = layer.weight.full_tensor().clone()
        ema.average = {name: placed_as(torch.full((2, 2), 7.0), weight) for name, weight in trainable(module).items()}
        ema.num_updates = 1
        with torch.no_grad():
            module(given)  # gathers the root
            ema.on_rollout_batch_start(None, module)
            assert module(given).tolist() == [[14.0, 14.0]]
            ema.on_rollout_end(None, module)
            torch.testing.assert_close(module(given), start.sum(dim=1)[None])
            trainable(module)[NAME].fill_(3.0)
            assert module(given).tolist() == [[6.0, 6.0]]
            kept.restore(module)
            torch.testing.assert_close(module(given), start.sum(dim=1)[None])

            def drift():
                away = (module(given) - start.sum(dim=1)).abs().mean().item()
                reshard(module)
                return away

            module(given)
            region = TrustRegion(0.5, list(trainable(module).values()), drift)
            with region.around_update():
                trainable(module)[NAME].add_(4.0)
            assert 0.35 <= (module(given) - start.sum(dim=1)).abs().mean() <= 0.5
    finally:
        torch.distributed.destroy_process_group()
