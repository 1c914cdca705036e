"""docs/dashboards.md names every number that is logged, and none that is not."""

import csv
import re
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_fdfo import Objective, Sampling
from lightning_fdfo.callbacks import EMA
from lightning_fdfo.reward.term import Gate, RewardTerm
from lightning_fdfo.schedules import AdaptiveChurn
from tests.conftest import brightness
from tests.rollout.test_algorithm import AsFDFO
from tests.rollout.test_gradients import Bright

PAGE = (Path(__file__).parents[2] / "docs/dashboards.md").read_text(encoding="utf-8")
NAMES = re.findall(r"^\| `([^`]+)` \|", PAGE, flags=re.MULTILINE)
LIGHTNINGS = {"epoch", "step"}


def redness(images, prompts, metadata):
    return images[:, 0].mean(dim=(1, 2))


def blueness(images, prompts, metadata):
    return images[:, 2].mean(dim=(1, 2))


def pattern(name):
    """`NAME` stands for one word of a name."""
    return re.compile(r"[^/]+".join(map(re.escape, name.split("NAME"))))


@pytest.fixture
def logged(fit, toy_module, tmp_path, prompts_file):
    """Names that a run logs whose configuration switches everything on."""
    module = toy_module(
        rewards={
            "brightness": RewardTerm(brightness),
            "redness": RewardTerm(redness, weight=0.5, scale="std"),
            "bright": RewardTerm(Bright(), gradient=True),
            "watched": RewardTerm(blueness, weight=0, gate=Gate("brightness", above=0.0)),
        },
        objective=Objective(
            normalization="root_mean_square", kl_weight=0.1, kl_target=0.1, trust_region=0.1, reward_scale="std"
        ),
        sampling=Sampling(num_steps=4, height=2, width=2, churn=AdaptiveChurn(target_distance=0.1, churn=0.1)),
        on_reward_error="drop_pair",
        metrics={"blueness": RewardTerm(blueness)},
    )
    names = set()
    for one, options in ((module, {"val": str(prompts_file)}), (toy_module(algorithm=AsFDFO()), {})):
        logger = CSVLogger(tmp_path, name="csv")
        folder = {"default_root_dir": logger.log_dir}
        fit(one, 2, logger=logger, callbacks=[EMA()], log_every_n_steps=1, **folder, **options)
        with (Path(logger.log_dir) / "metrics.csv").open(encoding="utf-8") as file:
            names |= set(next(csv.reader(file)))
    return names - LIGHTNINGS


def test_every_number_is_explained(logged):
    assert len(logged) > 30
    unexplained = [name for name in logged if not any(pattern(known).fullmatch(name) for known in NAMES)]
    assert not unexplained


def test_every_number_that_is_explained_is_logged(logged):
    assert len(NAMES) == len(set(NAMES)) > 20
    plain = [known for known in NAMES if "NAME" not in known]
    assert set(plain) <= logged
    for known in set(NAMES) - set(plain):
        others = logged - set(plain)
        assert any(pattern(known).fullmatch(name) for name in others), known
