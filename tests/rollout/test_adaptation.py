"""What a run adapts: alone, in runs, and on a resume."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_fdfo import Objective, Sampling
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.reward.term import RewardTerm
from lightning_fdfo.rollout.adaptation import Adaptation
from lightning_fdfo.schedules import AdaptiveChurn, Interval
from tests.conftest import brightness, trainable
from tests.test_module import Recorder

ADAPTIVE = Sampling(num_steps=4, height=2, width=2, churn=AdaptiveChurn(target_distance=0.1, churn=0.5))
STEERED = Objective(normalization="root_mean_square", kl_weight=0.1, kl_target=0.02, reward_scale="std", reward_clip=1)


def test_pairs_come_to_the_distance_that_is_asked_for(toy_module, fit):
    for churn in (0.5, Interval(2.0, low=0.3, high=1.0)):
        recorder = Recorder()
        sampling = Sampling(num_steps=4, height=2, width=2, churn=AdaptiveChurn(target_distance=0.1, churn=churn))
        fit(toy_module(sampling=sampling, num_pairs=64), 16, callbacks=[recorder])
        distances = [epoch["rollout/pair_distance"] for epoch in recorder.epochs]
        assert distances[0] > 0.2
        assert sum(distances[8:]) / 8 == pytest.approx(0.1, rel=0.05)
        assert recorder.epochs[0]["rollout/churn_factor"] == 1


@pytest.mark.parametrize(
    ("drift", "factor"), [(0.0, 0.5), (0.066, 0.5), (0.067, 1.0), (0.15, 1.0), (0.1501, 2.0), (9.0, 2.0)]
)
def test_the_weight_of_the_kl_term_follows_the_drift(drift, factor):
    adaptation = Adaptation(Sampling(), Objective(kl_weight=0.25, kl_target=0.1))
    for _ in range(2):  # an epoch that is trained again moves it once
        adaptation.steer_kl(0, drift)
        assert adaptation.kl_weight == 0.25 * factor
    adaptation.steer_kl(1, drift)
    assert adaptation.kl_weight == 0.25 * factor**2
    for epoch in range(2, 40):
        adaptation.steer_kl(epoch, drift)
    assert adaptation.kl_weight == 0.25 * {0.5: 1 / 8, 1.0: 1.0, 2.0: 64.0}[factor]


def test_the_total_is_scaled_by_all_pairs_so_far_and_clipped():
    adaptation = Adaptation(Sampling(), Objective(reward_scale="std", reward_clip=1.5))
    kept = torch.tensor([True, True, True, True, False, False])
    scaled = adaptation.scale(0, torch.tensor([3.0, -3.0, 0.5, -0.5, 100.0, -100.0]), kept)
    assert scaled.tolist() == pytest.approx([3 / 2.15058, -3 / 2.15058, 0.5 / 2.15058, -0.5 / 2.15058, 1.5, -1.5], 1e-4)
    again = adaptation.scale(1, torch.tensor([8.0, -8.0]), torch.tensor([True, True]))  # 6 numbers so far
    assert again.tolist() == [1.5, -1.5]
    assert adaptation.scale(1, torch.tensor([1.0, -1.0]), torch.tensor([True, True]))[0] == pytest.approx(
        (6 / 20.5) ** 0.5  # the epoch replaces itself
    )
    assert Adaptation(Sampling(), Objective()).scale(0, kept.float(), kept).tolist() == kept.float().tolist()


def test_with_a_scale_the_weight_of_a_single_reward_does_not_matter(toy_module, fit):
    ends = []
    for weight in (1.0, 64.0):  # powers of 2: no rounding
        module = toy_module(
            rewards={"brightness": RewardTerm(brightness, weight)}, objective=Objective(reward_scale="std")
        )
        fit(module, 3)
        ends.append(trainable(module))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_run_that_resumes_adapts_on(toy_module, fit, tmp_path):
    ends, logged = [], []
    for runs in ([(4, None)], [(2, None), (4, "last")]):
        for epochs, ckpt_path in runs:
            recorder, module = Recorder(), toy_module(sampling=ADAPTIVE, objective=STEERED)
            folder, options = tmp_path / str(len(runs)), {"enable_checkpointing": True}
            saved = ModelCheckpoint(folder / "c", every_n_epochs=1, save_on_train_epoch_end=True, save_last=True)
            fit(module, epochs, ckpt_path, callbacks=[saved, recorder], default_root_dir=folder, **options)
        ends.append(trainable(module))
        logged.append(recorder.epochs[-1])
    names = ("rollout/churn_factor", "train/kl_weight", "rollout/pair_distance")
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert [logged[0][name] for name in names] == [logged[1][name] for name in names]
    assert logged[0]["rollout/churn_factor"] != 1
    assert logged[0]["train/kl_weight"] != 0.1


def test_what_is_not_adapted_is_the_configurations():
    assert Adaptation(Sampling(), Objective(kl_weight=0.5)).state_dict() == {}
    with pytest.raises(ConfigurationError, match="expected a kl_weight above 0 to start from"):
        Objective(kl_target=0.1)
