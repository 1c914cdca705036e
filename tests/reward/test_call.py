"""A call into a reward's code: its own copies, what counts as scores, waits and time limits, whatever it raises."""

import copy
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from lightning_fdfo import Reward, RewardMix
from lightning_fdfo.errors import ConfigurationError, RewardError
from lightning_fdfo.objective import half_differences, score_differences
from lightning_fdfo.reward import load_reward
from lightning_fdfo.reward import waiting as reward_waiting
from lightning_fdfo.reward.routing import Route
from lightning_fdfo.reward.term import RewardTerm
from lightning_fdfo.rollout.run_context import RunContext
from lightning_fdfo.rollout.scores import gather
from lightning_fdfo.settings import Sampling
from tests.conftest import brightness

IMAGES = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c", "d"]
METADATA = [{"text": "427", "colours": ["red", {"deep": 1}]} for _ in range(4)]
CPU = torch.device("cpu")


class Vandal(Reward):
    """Writes into all that it gets."""

    def __init__(self, device=None):
        self.device = device

    def check(self, prompt, metadata):
        metadata.clear()

    def __call__(self, images, prompts, metadata):
        images.numpy()[:] = 0  # a view, which raises no version counter
        prompts[:] = [""] * len(prompts)
        for row in metadata:
            row["colours"][1]["deep"] = 2
            row.pop("text", None)
        return torch.zeros(len(images))


class Recorder(Reward):
    """Remembers what it was given."""

    def __call__(self, images, prompts, metadata):
        self.given = (images.clone(), list(prompts), copy.deepcopy(list(metadata)))
        return brightness(images, prompts, metadata)


@pytest.mark.parametrize("routed", [False, True])
def test_what_a_reward_writes_into_changes_nothing_for_others(routed):
    last = Recorder()
    mix = RewardMix({"first": RewardTerm(Vandal()), "last": RewardTerm(last)})
    images, prompts, metadata = IMAGES.clone(), list(PROMPTS), copy.deepcopy(METADATA)
    routes = {name: Route(torch.tensor([True, True, True, not routed]), torch.ones(4)) for name in mix.terms}
    mix.check("a", metadata[0])
    scores = mix(images, prompts, metadata, routes=routes)
    count = 3 if routed else 4
    assert torch.equal(last.given[0], IMAGES[:count])
    assert last.given[1:] == (PROMPTS[:count], METADATA[:count])
    assert torch.equal(images, IMAGES)
    assert (prompts, metadata) == (PROMPTS, METADATA)
    assert torch.equal(scores["last"].values[:count].float(), brightness(IMAGES, [], [])[:count])


@pytest.mark.filterwarnings("ignore:reward first. 16 of 16 pairs score alike")  # it is a vandal
def test_the_next_epoch_sees_the_same_prompts(toy_module, fit, tmp_path):
    rows = '{"prompt": "a cat", "text": "427", "colours": ["red", {"deep": 1}]}\n'
    (tmp_path / "train.jsonl").write_text(rows)
    last = Recorder()
    module = toy_module(rewards={"first": RewardTerm(Vandal()), "last": RewardTerm(last, weight=1.0)})
    fit(module, 2, train=str(tmp_path / "train.jsonl"))
    assert last.given[0].any()
    assert last.given[2][0] == METADATA[0]


def test_a_buffer_that_a_reward_uses_again_is_not_its_last_scores():
    class Thrifty(Reward):
        def __init__(self):
            self._buffer = torch.zeros(4)

        def __call__(self, images, prompts, metadata):
            return self._buffer.copy_(images.mean(dim=(1, 2, 3)))

    mix = RewardMix({"thrifty": RewardTerm(Thrifty())})
    first = mix(IMAGES, PROMPTS, METADATA)["thrifty"].values
    mix(IMAGES / 2, PROMPTS, METADATA)
    assert torch.equal(first.float(), IMAGES.mean(dim=(1, 2, 3)))


# Numbers


def scored(values):
    return RewardMix({"r": RewardTerm(lambda images, prompts, metadata: values)})(IMAGES, PROMPTS, METADATA)["r"].values


def test_only_real_numbers_are_scores():
    with pytest.raises(RewardError, match="expected real numbers, got complex64"):
        scored(torch.ones(4, dtype=torch.complex64))
    with pytest.raises(RewardError, match=r"score 1e\+39 for prompt 'b'"):
        scored(torch.tensor([0.0, 1e39, 0.0, 0.0], dtype=torch.float64))
    assert scored(torch.tensor([True, False, True, False])).tolist() == [1, 0, 1, 0]
    assert scored([1, 2, 3, 2**24 + 1]).tolist() == [1, 2, 3, 2**24 + 1]


def test_large_scores_with_a_small_signal_are_no_ties(toy_module, fit):
    """1e8 and 1e8 + 1 are one number in float32."""

    def large(images, prompts, metadata):
        return 1e8 + brightness(images, prompts, metadata).double()

    module, plain = (toy_module(rewards={"r": RewardTerm(reward)}) for reward in (large, brightness))
    trainer = fit(module, 1)
    fit(plain, 1)
    assert trainer.callback_metrics["reward/r/ties"] == 0
    torch.testing.assert_close(module.collector.scores.difference, plain.collector.scores.difference, atol=1e-7, rtol=0)
    assert module.collector.scores.difference.dtype == torch.float32


def test_differences_of_float32_scores_are_float32s_own_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    scale = torch.randint(-60, 60, (20000,), generator=generator).float().exp2()
    scores = torch.randn(20000, generator=generator) * scale
    assert torch.equal(score_differences(scores.double()), half_differences(scores))


def test_scores_cross_devices_without_float64(toy_module, fit, monkeypatch):
    """What is summed over devices are whole numbers, which every accelerator has."""
    module = toy_module(rewards={"r": RewardTerm(lambda images, *_: 1e8 + images.mean(dim=(1, 2, 3)).double())})
    kinds, seen = [], RunContext.all_sum

    def all_sum(self, values):
        kinds.append(values.dtype)
        return seen(self, values)

    rollouts = []

    class Keep(Callback):
        def on_rollout_end(self, trainer, pl_module, rollout, scores):
            rollouts.append(rollout)

    monkeypatch.setattr(RunContext, "all_sum", all_sum)
    fit(module, 1, callbacks=[Keep()])
    assert torch.int64 in kinds
    assert torch.float64 not in kinds
    (rollout,) = rollouts
    given, gathered = rollout.scores["r"].values, gather(rollout, torch.zeros(32, 1), 16, lambda values: values)
    assert torch.equal(gathered.scores["r"].values, given)
    assert given.dtype == torch.float64


# What it raises


@pytest.mark.parametrize("error", [SystemExit(0), GeneratorExit(), BaseException("odd"), MemoryError("full")])
@pytest.mark.parametrize("method", ["check", "fetch", "setup", "__call__"])
def test_whatever_a_reward_raises_is_its_failure(error, method):
    class Broken(Reward):
        def __call__(self, images, prompts, metadata):
            return brightness(images, prompts, metadata)

    def fail(self, *_):
        raise error

    setattr(Broken, method, fail)
    mix = RewardMix({"r": RewardTerm(Broken())})
    calls = {
        "check": lambda: mix.check("p", {}),
        "fetch": mix.fetch,
        "setup": lambda: mix.setup(CPU),
        "__call__": lambda: mix(IMAGES, PROMPTS, METADATA),
    }
    with pytest.raises(RewardError, match=rf"reward 'r' \(Broken of .*{type(error).__name__}"):
        calls[method]()


def test_ctrl_c_is_no_failure_of_a_reward():
    def interrupted(images, prompts, metadata):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RewardMix({"r": RewardTerm(interrupted)})(IMAGES, PROMPTS, METADATA)


def test_a_package_that_is_not_installed_is_named_with_pip():
    class Needy(Reward):
        def setup(self, device):
            import no_such_package.part  # noqa: F401

        def __call__(self, images, prompts, metadata): ...

    with pytest.raises(ConfigurationError, match=r"'r' \(Needy .* needs no_such_package, .*pip install no_such_pa"):
        RewardMix({"r": RewardTerm(Needy())}).setup(CPU)


# What is no reward, or nowhere


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("torch.mean", "'torch.mean': .*says nothing of its arguments.*def score\\(images, prompts, metadata\\)"),
        ("os.getcwd", "'os.getcwd': .*(says nothing|is no reward)"),
        ("shutil.copyfileobj", None),  # any function of three arguments may be one
        ("textwrap.dedent", "'textwrap.dedent': dedent.*is no reward: expected a function .*too many positional"),
        ("torch.nn.Linear", "expected a subclass of lightning_fdfo.Reward or PairReward, or a function"),
        ("torch.pi", "expected a subclass of lightning_fdfo.Reward or PairReward, or a function"),
        ("torch.no_such_name", "cannot be imported: AttributeError"),
        ("lightning_fdfo.Reward", "abstract"),
        (f"{__name__}.leaves", "cannot be imported: .*no attribute"),
    ],
)
def test_a_dotted_path_to_what_is_no_scorer(path, message):
    if message is None:
        load_reward(path)
        return
    for terms in ({path: 1.0}, {"r": {"reward": path}}, {"r": {"reward": {"class_path": path}}}):
        with pytest.raises(ConfigurationError, match=message):
            RewardMix(terms)


def test_a_plugin_that_exits_while_it_is_imported(tmp_path, monkeypatch):
    (tmp_path / "leaving.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError, match=r"'leaving.Score' cannot be imported: SystemExit\(0\)"):
        load_reward("leaving.Score")


@pytest.mark.parametrize("device", ["cuda:7", "cuda", "mps", "xpu:1"])
@pytest.mark.parametrize("owner", ["term", "reward"])
def test_a_device_that_is_not_here_is_told_before_anything_is_fetched(device, owner):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    own = device if owner == "reward" else None
    mix = RewardMix({"r": RewardTerm(Vandal(own), device=device if owner == "term" else None)})
    with pytest.raises(ConfigurationError, match=rf"reward 'r': expected a device like cpu or cuda:0, got '{device}'"):
        mix.fetch()


# Waits


@pytest.fixture
def release():
    """Hung rewards wait for it."""
    event = threading.Event()
    yield event
    event.set()


class Hanging(Reward):
    """Does not return for prompts of some words until it is released."""

    def __init__(self, release, words=("c",), device=None, seconds=60.0):
        self._release, self.words, self.device, self.seconds = release, words, device, seconds
        self.threads = []

    def __call__(self, images, prompts, metadata):
        self.threads.append(threading.current_thread())
        if set(self.words) & set(prompts):
            self._release.wait(self.seconds)
        return brightness(images, prompts, metadata)


def test_a_reward_that_is_waited_for_is_named_ever_more_rarely(monkeypatch, caplog):
    monkeypatch.setattr(reward_waiting, "FIRST_REPORT", 0.2)
    monkeypatch.setattr(reward_waiting, "MAX_POLL", 0.02)
    monkeypatch.setattr(reward_waiting, "_watching_process", None)  # a watcher that has these settings

    def slow(images, prompts, metadata):
        time.sleep(1.2)
        return brightness(images, prompts, metadata)

    with caplog.at_level(logging.WARNING):
        RewardMix({"slow": RewardTerm(slow), "quick": RewardTerm(brightness)})(IMAGES, PROMPTS, METADATA)
    reports = [record.getMessage() for record in caplog.records]
    assert len(reports) == 3  # after 0.2, 0.4 and 0.8 s
    assert all("reward 'slow' (slow of" in report and "scores 4 images on cpu" in report for report in reports)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_time_limit_turns_a_wait_into_a_failure(release, device):
    reward = Hanging(release, device=device)
    mix = RewardMix({"hung": RewardTerm(reward, time_limit=0.2), "light": RewardTerm(brightness, time_limit=60)})
    mix.setup(CPU)
    start = time.monotonic()
    with pytest.raises(
        RewardError, match=r"reward 'hung' \(Hanging .*no scores of 4 images within its time_limit of 0"
    ):
        mix(IMAGES, PROMPTS, METADATA)
    assert time.monotonic() - start < 5  # not once more for each image
    assert all(thread.daemon for thread in reward.threads)  # none keeps the process alive
    with pytest.raises(RewardError, match="an earlier call, which was overdue, still runs"):
        mix(IMAGES[:1], ["a"], [{}])
    assert len(reward.threads) == 1
    release.set()
    assert torch.equal(mix(IMAGES[:1], ["a"], [{}])["hung"].values.float(), brightness(IMAGES[:1], [], []))


def test_pairs_that_a_time_limit_ends_may_be_dropped(toy_module, fit, prompts_file, release):
    prompts_file.write_text("a\nb\nc\nd\n")
    module = toy_module(
        rewards={"hung": RewardTerm(Hanging(release, seconds=0.3), time_limit=0.2)},
        sampling=Sampling(num_steps=4, height=2, width=2, churn=0.1),
        rollout_batch_size=1,
        on_reward_error="drop_pair",
        max_dropped=0.9,
    )
    with pytest.warns(UserWarning, match=r"dropped, with their pairs: 2 images: reward 'hung'.*time_limit"):
        fit(module, 1)
    assert 0 < module.collector.scores.kept.sum() < 16


@pytest.mark.parametrize("limit", [0, -1, float("nan"), "soon", True])
def test_a_time_limit_is_a_number_of_seconds(limit):
    with pytest.raises(ConfigurationError, match=r"rewards\.r: expected time_limit null or seconds above 0"):
        RewardMix({"r": {"reward": "JPEGSize", "time_limit": limit}})


def test_a_process_ends_though_a_reward_hangs():
    script = (
        "import threading, torch\nfrom lightning_fdfo import RewardMix\n"
        "from lightning_fdfo.reward.term import RewardTerm\n"
        "hang = lambda images, prompts, metadata: threading.Event().wait()\n"
        "RewardMix({'r': RewardTerm(hang, time_limit=0.1)})(torch.zeros(1, 3, 2, 2), ['p'], [{}])\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "no scores of 1 images within its time_limit of 0.1 s" in done.stderr
