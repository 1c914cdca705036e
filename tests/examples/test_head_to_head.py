"""examples/head_to_head: each method's mathematics, and run, collect, plot at a small setting."""

import csv
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_fdfo import RewardMix, Sampling
from lightning_fdfo.commands.cli import FDFOCLI
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows.generate import encode_prompts
from lightning_fdfo.prompts import Prompt
from lightning_fdfo.reward.term import RewardTerm
from lightning_fdfo.rollout.algorithm import Context
from lightning_fdfo.rollout.pairs import start_rollout
from lightning_fdfo.rollout.points import TrajectoryPoints, allocate_points
from lightning_fdfo.sampling import churn_prior, churn_step
from tests.conftest import ToyFlow, brightness
from tests.test_module import Recorder

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "examples/head_to_head"
SMALL = [
    "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", "--model.batching.num_pairs=4",
    "--model.batching.batch_size=16", "--model.sampling.num_steps=4", "--model.batching.rollout_batch_size=4",
]  # fmt: skip
INDEPENDENT = {"num_steps": 4, "height": 2, "width": 2, "initial_churn": 1e9}


@pytest.fixture
def baselines(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY))
    import baselines

    yield baselines
    del sys.modules["baselines"]


def roll_out(churn, num_pairs=4, num_points=8):
    """A rollout of independent images with all its points, and what an algorithm may ask."""
    flow, sampling = ToyFlow(), Sampling(churn=churn, **INDEPENDENT)
    flow.load()
    prompts = [Prompt(text, "", {}, text) for text in ("a cat", "a cat", "the dog", "the dog")][:num_pairs]
    conditioning = encode_prompts(flow, prompts, 1.0, batch_size=4)
    points = allocate_points(range(num_pairs), 4, num_points, (3, 2, 2), seed=0, epoch=0)
    run = {"seed": 0, "epoch": 0, "sampling": sampling, "device": torch.device("cpu")}
    mix = RewardMix({"brightness": RewardTerm(brightness)})
    rollout = start_rollout(flow, mix, prompts, conditioning, range(num_pairs), points, **run).result()

    @torch.no_grad()
    def velocity(latents, sigma, pairs):
        return flow.velocity(latents, sigma, conditioning[pairs])

    totals = mix.total(rollout.scores).values
    rows = torch.arange(2 * num_pairs)
    texts, kept = [prompt.text for prompt in prompts], torch.ones(2 * num_pairs, dtype=torch.bool)
    return rollout, Context(totals, kept, texts, rows, velocity, sampling, 0, 0)


def as_batch(targets):
    """All points as a batch; nothing here looks at the conditioning."""
    flat = [each.flatten(0, 1) for each in targets]
    return TrajectoryPoints(*flat, conditioning=None)


@pytest.mark.parametrize("name", ["AWM", "NFT"])
def test_images_are_noised_again_along_straight_lines(baselines, name):
    rollout, context = roll_out(churn=0.0)
    found = getattr(baselines, name)().targets(rollout, context)
    line = found.direction if name == "NFT" else found.velocity - found.direction
    ends = found.latents - found.sigma[..., None, None, None] * line  # x0 = x - sigma * (noise - x0)
    branch = rollout.points.chosen[..., 0]
    expected = rollout.points.ends.view(4, 2, 3, 2, 2)[torch.arange(4)[:, None], branch]
    torch.testing.assert_close(ends, expected, rtol=1e-4, atol=1e-5)
    noise = (ends + line).flatten()
    assert abs(noise.mean()) < 0.2
    assert 0.8 < noise.std() < 1.2


def test_awm_follows_the_ratio_of_its_matching_errors(baselines):
    rollout, context = roll_out(churn=0.0)
    algorithm = baselines.AWM(clip_range=0.1)
    targets = algorithm.targets(rollout, context)
    batch = as_batch(targets)
    line = batch.old_velocity - batch.direction
    velocity = batch.old_velocity + 0.05 * torch.randn_like(batch.old_velocity)
    loss, logged = algorithm.loss(velocity, batch)
    missed = [(each - line).pow(2).flatten(1).mean(dim=1) for each in (batch.old_velocity, velocity)]
    ratio = (missed[0] - missed[1]).exp()
    assert logged["train/ratio"] == pytest.approx(ratio.mean().item(), rel=1e-5)
    advantage = batch.reward_difference
    torch.testing.assert_close(loss, -torch.minimum(advantage * ratio, advantage * ratio.clamp(0.9, 1.1)))


def test_nft_pulls_good_images_in_and_pushes_bad_ones_away(baselines):
    """At v = v_old the gradient is that of matching, times 2 r - 1, over the mean absolute error."""
    rollout, context = roll_out(churn=0.0)
    algorithm = baselines.NFT(beta=0.5, largest=2.0)
    batch = as_batch(algorithm.targets(rollout, context))
    velocity = batch.old_velocity.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(algorithm.loss(velocity, batch)[0].sum(), velocity)
    good = 0.5 + (batch.reward_difference / 4).clamp(-0.5, 0.5)
    sigma = batch.sigma[:, None, None, None].clamp(min=1e-3)
    missed = sigma * (batch.old_velocity - batch.direction)
    size = missed.abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-5)
    expected = (2 * good - 1)[:, None, None, None] * 0.5 * 2 / 12 * sigma * missed / size
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_flow_grpo_knows_the_density_of_each_step(baselines):
    """The noise that is drawn again leads from each state to the next; the ratio is that of two normal densities."""
    rollout, context = roll_out(churn=0.3)
    algorithm = baselines.FlowGRPO(clip_range=10.0)
    targets = algorithm.targets(rollout, context)
    chosen, sigmas = rollout.points.chosen, rollout.sigmas
    noise = algorithm._noise(rollout, context, 4)
    states = {(p, *chosen[p, n].tolist()): targets.latents[p, n] for p in range(4) for n in range(8)}
    olds = {(p, *chosen[p, n].tolist()): targets.velocity[p, n] for p in range(4) for n in range(8)}
    batch = as_batch(targets)
    velocity = batch.old_velocity + 0.1 * torch.randn_like(batch.old_velocity)
    _, logged = algorithm.loss(velocity, batch)
    ratios = []
    for row, (pair, number) in enumerate((p, n) for p in range(4) for n in range(8)):
        branch, step = chosen[pair, number].tolist()
        x, old, fresh = states[pair, branch, step], olds[pair, branch, step], noise[pair, step, branch]
        following = churn_step(
            x[None], old[None], sigmas[step], sigmas[step + 1], rollout.churns[step + 1], fresh[None]
        )
        if step < 3:
            torch.testing.assert_close(following[0], states[pair, branch, step + 1], rtol=1e-4, atol=1e-5)
        nothing = torch.zeros_like(x)[None]
        means = [
            churn_step(x[None], v[None], sigmas[step], sigmas[step + 1], rollout.churns[step + 1], nothing)[0]
            for v in (old, velocity[row])
        ]
        std = (sigmas[step + 1] * (1 - 1 / (1 + rollout.churns[step + 1]) ** 2).sqrt()).item()
        logs = [-((following[0] - mean) ** 2).mean() / (2 * std**2) if std else torch.zeros(()) for mean in means]
        ratios.append((logs[1] - logs[0]).exp())
    assert logged["train/ratio"] == pytest.approx(torch.stack(ratios).mean().item(), rel=1e-3)
    assert float(torch.stack(ratios).std()) > 0.01


def test_flow_grpo_does_not_know_antithetic_noise(baselines):
    rollout, context = roll_out(churn=0.3)
    context = context._replace(sampling=replace(context.sampling, antithetic=True))
    with pytest.raises(ConfigurationError, match=r"expected sampling\.antithetic: false"):
        baselines.FlowGRPO().targets(rollout, context)


def test_independent_images_share_nothing_but_the_prompt():
    latents, noise = torch.randn(1000, 3), torch.randn(1000, 3)
    churned = churn_prior(latents, 1e9, noise)
    torch.testing.assert_close(churned, noise, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "churn"), [("AWM", 0.0), ("NFT", 0.0), ("FlowGRPO", 0.3)])
def test_each_of_them_learns(baselines, toy_module, fit, name, churn):
    recorder = Recorder()
    module = toy_module(
        algorithm=getattr(baselines, name)(),
        sampling=Sampling(churn=churn, **INDEPENDENT),
        num_pairs=32,
        pairs_per_prompt=4,
        updates_per_epoch=1,
        batch_size=256,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    )
    fit(module, 15 if churn == 0 else 40, callbacks=[recorder])
    assert recorder.mean_reward(5) > recorder.epochs[0]["reward/mean"] + 0.05


VARIANTS = {"antithetic", "adaptive", "averaged", "together"}
METHODS = re.search(r"METHODS:-([a-z_ ]+)", (STUDY / "run.sh").read_text())[1].split()


@pytest.mark.parametrize("method", [*METHODS, *sorted(VARIANTS)])
def test_each_method_of_the_study_is_a_configuration(baselines, monkeypatch, tmp_path, method):
    """By the folder's files; built as `fit` does, with nothing loaded."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lightning-fdfo"])
    files = ["configs/quickstart.yaml", "examples/head_to_head/study.yaml", f"examples/head_to_head/{method}.yaml"]
    words = [word for file in files for word in ("--config", file)]
    model = FDFOCLI([*words, f"--trainer.default_root_dir={tmp_path}"], run=False).model
    assert (model.algorithm is None) == (method.startswith("fdfo") or method in VARIANTS)
    assert model.sampling.antithetic == (method in {"fdfo_plus", "antithetic", "together"})
    assert model.batching.num_pairs == 48


def test_three_commands_from_methods_to_a_picture(python, tmp_path, capsys):
    """One of them in full, by the files that are shipped: two starts of the command."""
    prompts = tmp_path / "heldout.txt"
    prompts.write_text("".join((ROOT / "configs/prompts/digits_heldout.txt").read_text().splitlines(True)[:2]))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"OUT": str(tmp_path), "METHODS": "nft@2e-3", "SEEDS": "3", "JOBS": "1", "PATH": path}

    def run():
        words = [str(STUDY / "run.sh"), *SMALL, f"--data.val={prompts}"]
        return subprocess.run(words, cwd=ROOT, env=os.environ | own, capture_output=True, text=True)

    done = run()
    assert done.returncode == 0, done.stderr + "".join(log.read_text() for log in tmp_path.glob("*/log.txt"))[-3000:]
    assert done.stdout.split() == [str(tmp_path / "nft@2e-3-3")]
    assert run().stdout == ""  # it is complete
    python("collect.py", tmp_path)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], float(row["lr"])) for row in rows] == [("nft", "3", 2e-3)]
    assert all(float(row["diversity"]) > 0 for row in rows)
    python("plot.py", tmp_path)
    assert "| DiffusionNFT | 0.002 |" in capsys.readouterr().out
    with Image.open(tmp_path / "methods.png") as picture:
        assert picture.width > 1000
