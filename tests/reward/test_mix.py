"""The mixture: weights, scales, devices, and what a failure looks like."""

import itertools
import threading

import numpy as np
import pytest
import torch

from lightning_fdfo import Reward, RewardMix
from lightning_fdfo.errors import ConfigurationError, RewardError
from lightning_fdfo.objective import half_differences
from lightning_fdfo.reward.running_std import RunningStd
from lightning_fdfo.reward.scores import Scores, compare
from lightning_fdfo.reward.term import Gate, RewardTerm


class Constant(Reward):
    required_metadata = ("answer",)

    def __init__(self, value: float = 1.0) -> None:
        self.value = value
        self.places = []

    def setup(self, device):
        self.places.append(device)

    def __call__(self, images, prompts, metadata):
        return torch.full((len(images),), self.value)


class Cost(Constant):
    """Brightness, as something to avoid."""

    higher_is_better = False

    def __call__(self, images, prompts, metadata):
        return images.mean(dim=(1, 2, 3))


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


HERE = f"{__name__}.Constant"
CPU = torch.device("cpu")
IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = (["p"] * 6, [{}] * 6)


# Weights


def test_the_total_is_the_weighted_sum_and_weight_zero_only_watches():
    mix = RewardMix(
        {
            "a": {"reward": {"class_path": HERE, "init_args": {"value": 2.0}}, "weight": 0.5},
            "b": {"reward": HERE, "weight": 3, "scale": 4},
            "watched": {"reward": {"class_path": HERE, "init_args": {"value": 100.0}}, "weight": 0, "scale": "std"},
        }
    )
    scores = mix(IMAGES, *ROWS)
    assert {name: term.values[0].item() for name, term in scores.items()} == {"a": 2, "b": 1, "watched": 100}
    assert mix.scales_known  # what is only watched needs none
    assert torch.equal(mix.total(scores).values, torch.full((6,), 0.5 * 2 + 3 * 1 / 4))


def test_a_positive_weight_on_a_cost_asks_for_less_of_it():
    mix = RewardMix({"cost": RewardTerm(Cost(), 2.0), "gain": RewardTerm(brightness, 0.5)})
    scores = mix(IMAGES, *ROWS)
    expected = brightness(IMAGES, *ROWS)
    assert torch.equal(scores["cost"].values, expected)  # logged as it is
    torch.testing.assert_close(mix.total(scores).values, (-2 + 0.5) * expected)
    torch.testing.assert_close(mix.contributions(scores, compare(scores))["cost"], -2 * half_differences(expected))
    assert torch.equal(mix.preference("cost", compare(scores)), -mix.preference("gain", compare(scores)))


def test_one_class_may_come_several_times():
    spec = {"reward": {"class_path": HERE, "init_args": {"value": 5.0}}}
    mix = RewardMix({"low": {"reward": HERE}, "high": spec})
    assert [scores.values[0].item() for scores in mix(IMAGES, *ROWS).values()] == [1, 5]


def test_setup_and_check_reach_each_reward():
    mix = RewardMix({HERE: 1.0})
    mix.setup(CPU)
    assert mix.rewards[HERE].places == [CPU]
    with pytest.raises(ConfigurationError, match=r"Constant needs metadata \['answer'\], got keys \['question'\]"):
        mix.check("p", {"question": 1})


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({}, "expected at least one"),
        ({"x": "heavy"}, "rewards.x: expected a weight or"),
        ({"x": True}, "rewards.x: expected a weight or"),
        ({"x": {"weight": 1}}, "rewards.x: expected a weight or"),
        ({"x": {"reward": HERE, "wieght": 1}}, "wieght"),
        ({"x": {"reward": HERE, "weight": "1"}}, "got weight '1'"),
        ({"x": {"reward": HERE, "scale": "sdt"}}, "scale none, std or a number above 0, got scale 'sdt'"),
        ({"x": {"reward": HERE, "scale": 0}}, "got scale 0"),
        ({"x": {"reward": HERE, "scale": -2}}, "got scale -2"),
        ({"x": {"reward": HERE, "scale": None}}, "got scale None"),
        ({"x": {"reward": HERE, "scale": [1]}}, "got scale"),
        ({"x": {"reward": HERE, "device": "gpu7"}}, "expected a device like cpu or cuda:1, got 'gpu7'"),
        ({"x": {"reward": {"class": HERE}}}, "got reward {'class'"),
        ({"x": {"reward": 7}}, "got reward 7"),
        ({"Nothing": 1.0}, "unknown reward 'Nothing'"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(terms, message):
    with pytest.raises(ConfigurationError, match=message):
        RewardMix(terms)


# Scales


def test_std_is_the_root_mean_square_of_half_differences_over_epochs():
    """The reference is one concatenation."""
    epochs = [torch.randn(6, generator=torch.Generator().manual_seed(epoch)) for epoch in range(3)]
    running = RunningStd()
    for epoch, values in enumerate(epochs):
        running.update(epoch, half_differences(values))
    everything = half_differences(torch.cat(epochs)).double()
    assert running.std == pytest.approx(everything.std(correction=0).item(), rel=1e-6)


def test_an_epoch_that_is_rolled_out_again_counts_once():
    first, second, changed = (torch.tensor([value, -value]) for value in (1.0, 3.0, 5.0))
    running = RunningStd()
    running.update(0, first)
    running.update(1, second)
    copy = RunningStd()
    copy.load_state_dict(running.state_dict())
    copy.update(1, changed)
    assert copy.std == pytest.approx((0.5 * (1 + 25)) ** 0.5)


def test_scaled_terms_have_differences_of_one_deviation():
    """Whatever a reward's unit: a thousandfold changes nothing."""

    def corner(gain):
        return lambda images, *_: gain * images[:, 0, 0, 0]

    differences = []
    for gain in (1.0, 1000.0):
        mix = RewardMix({"a": RewardTerm(brightness, 1.0), "b": RewardTerm(corner(gain), 2.0, "std")})
        scores = mix(IMAGES, *ROWS)
        assert not mix.scales_known
        with pytest.raises(ValueError, match="the scale of reward 'b' is not known yet"):
            mix.total(scores)
        mix.update_scales(0, compare(scores))
        assert mix.scales_known
        differences.append(mix.contributions(scores, compare(scores)))
        total = half_differences(mix.total(scores).values)
        torch.testing.assert_close(total, sum(differences[-1].values()), rtol=1e-4, atol=1e-5)
    assert differences[0]["b"].square().mean().sqrt().item() == pytest.approx(2.0, rel=1e-5)
    torch.testing.assert_close(differences[0]["b"], differences[1]["b"])


def test_a_reward_of_ties_has_no_say_and_divides_by_nothing():
    mix = RewardMix({"flat": RewardTerm(Constant(), 1.0, "std")})
    scores = mix(IMAGES, *ROWS)
    mix.update_scales(0, compare(scores))
    assert torch.equal(mix.contributions(scores, compare(scores))["flat"], torch.zeros(6))


def test_scales_are_kept_and_new_terms_start_their_own():
    mix, other = (RewardMix({name: RewardTerm(brightness, 1.0, "std") for name in names}) for names in ("ab", "bc"))
    mix.update_scales(0, compare(mix(IMAGES, *ROWS)))
    other.load_state_dict(mix.state_dict())
    assert other.running["b"].std == mix.running["b"].std
    assert other.running["c"].std is None


# Clip, schedule, route and gate

SCORES = {
    "a": Scores.of(torch.tensor([3.0, 1.0, 0.0, 4.0, 5.0, 5.0, 2.0, 0.0])),  # half differences of rows 2i: 1, -2, 0, 1
    "b": Scores.of(torch.tensor([10.0, 30.0, 0.0, 20.0, 7.0, 1.0, 4.0, 4.0])),  # -10, -10, 3, 0
}


def contributions(mix, scores, epoch=0):
    return mix.contributions(scores, compare(scores), epoch)


def first(parts):
    """Rows 2i."""
    return {name: part[::2].tolist() for name, part in parts.items()}


def test_clip_bounds_what_is_scaled_and_before_it_is_weighed():
    mix = RewardMix({"a": RewardTerm(brightness, -3.0, clip=1.5), "b": RewardTerm(brightness, 0.5, 4.0, clip=2)})
    assert first(contributions(mix, SCORES)) == {"a": [-3, 4.5, 0, -3], "b": [-1, -1, 0.375, 0]}
    total = -3 * SCORES["a"].values + 0.5 / 4 * SCORES["b"].values  # of images: it is not clipped
    assert torch.equal(mix.total(SCORES).values, total)


def test_a_clip_in_deviations_leaves_the_deviation_as_it_is():
    scores = {"a": Scores.of(torch.tensor([1.0, -1.0, 1.0, -1.0, 100.0, -100.0]))}
    mix = RewardMix({"a": RewardTerm(brightness, 2.0, "std", clip=1.0)})
    mix.update_scales(0, compare(scores))
    std = np.sqrt((1 + 1 + 100**2) / 3)
    assert mix.running["a"].std == pytest.approx(std)
    expected = 2 * np.clip(np.array([1, 1, 100]) / std, -1, 1)
    assert first(contributions(mix, scores))["a"] == pytest.approx(list(expected))


def test_weights_are_those_of_the_epoch():
    mix = RewardMix({"a": RewardTerm(brightness, {0: 1, 10: 3}), "b": RewardTerm(brightness, {5: 0, 6: 1}, "std")})
    mix.update_scales(0, compare(SCORES))
    assert first(contributions(mix, SCORES, epoch=5)) == {"a": [2, -4, 0, 2], "b": [0, 0, 0, 0]}
    torch.testing.assert_close(mix.total(SCORES, epoch=5).values, 2 * SCORES["a"].values)
    assert mix.factor("b", 6) == pytest.approx(1 / np.sqrt((100 + 100 + 9) / 4))


def routed(values, multiplier):
    """Scores of a reward, which is not asked where the multiplier is NaN."""
    asked = ~multiplier.isnan()
    return Scores(torch.where(asked, values, 0.0), asked, asked, multiplier.nan_to_num(0.0))


def test_a_route_multiplies_and_a_gate_asks_both_branches():
    gated = RewardTerm(brightness, 2.0, gate=Gate("b", above=3.5))
    mix = RewardMix({"a": gated, "b": RewardTerm(brightness, 0)})
    assert mix.passes("a", SCORES)[::2].tolist() == [True, False, False, True]
    scores = SCORES | {"a": routed(SCORES["a"].values, torch.tensor([0.5, 0.5, 1, 1, 1, 1, torch.nan, torch.nan]))}
    assert first(contributions(mix, scores))["a"] == [0.5 * 2 * 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("gate", "passes"),
    [
        (Gate("b", above=4.0), [True, False, False, False]),  # 4 is not above 4
        (Gate("b", below=10.0), [False, False, True, True]),
        (Gate("b", above=0.5, below=8.0), [False, False, True, True]),
    ],
)
def test_gates_are_open_between_their_bounds(gate, passes):
    mix = RewardMix({"a": RewardTerm(brightness, gate=gate), "b": RewardTerm(brightness)})
    assert mix.passes("a", SCORES)[::2].tolist() == passes
    assert mix.passes("b", SCORES).all()


OPTIONS = list(
    itertools.product(
        (1.0, -2.0, {0: 1.0, 4: -3.0}),
        ("none", "std", 0.1),
        (None, 0.5),
        (None, Gate("b", above=0.3), Gate("b", below=0.7)),
    )
)


@pytest.mark.parametrize(("weight", "scale", "clip", "gate"), OPTIONS)
def test_the_branches_of_a_pair_are_opposite_whatever_the_options(weight, scale, clip, gate):
    """And the total is what plain numpy, pair by pair, makes of the formula."""
    random = np.random.default_rng(0)
    scores = {name: Scores.of(torch.from_numpy(random.random(40)).float()) for name in "ab"}
    pairs = random.choice([0.0, 0.5, 2.0, np.nan], 20)
    scores["a"] = routed(scores["a"].values, torch.from_numpy(np.repeat(pairs, 2)).float())
    mix = RewardMix({"a": RewardTerm(Cost(), weight, scale, clip=clip, gate=gate), "b": RewardTerm(brightness, 0.1)})
    mix.update_scales(3, compare(scores))
    parts = contributions(mix, scores, epoch=3)
    total = torch.stack(list(parts.values())).sum(dim=0)
    assert torch.equal(total[::2], -total[1::2])
    assert total.isfinite().all()
    assert total[::2].any()

    values = torch.where(scores["a"].scored, scores["a"].values.double(), torch.nan)
    one, two = (values.numpy()[branch::2] for branch in (0, 1))
    half = (one - two) / 2
    divisor = {"none": 1.0, "std": np.sqrt(np.nanmean(half**2)), 0.1: 0.1}[scale]
    for pair in range(20):
        bounded = -half[pair] / divisor  # a cost
        if clip is not None:
            bounded = min(max(bounded, -clip), clip)
        passing = [gate is None or gate.above < scores["b"].values[2 * pair + branch] < gate.below for branch in (0, 1)]
        weighed = (-2.0 if isinstance(weight, dict) else weight) * pairs[pair] * bounded
        expected = weighed if all(passing) and not np.isnan(pairs[pair]) else 0.0
        assert parts["a"][2 * pair].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


# Devices


class Place(Reward):
    """Notes where and how it is called."""

    def __init__(self, device=None, barrier=None):
        self.device = device
        self.barrier = barrier
        self.seen = []

    def __call__(self, images, prompts, metadata):
        if self.barrier is not None:
            self.barrier.wait(timeout=10)  # breaks unless the others run at the same time
        self.seen.append((images.device, threading.get_ident(), torch.is_grad_enabled()))
        return images.mean(dim=(1, 2, 3))


def test_terms_elsewhere_run_in_threads_beside_those_here():
    """`cpu:0` stands for another device than the images' `cpu`: it is reached in the same way."""
    barrier = threading.Barrier(3)
    here, cpu_one, cpu_two = Place(None, barrier), Place("cpu:0", barrier), Place(None, barrier)
    mix = RewardMix({"one": RewardTerm(cpu_one), "here": RewardTerm(here), "two": RewardTerm(cpu_two, device="cpu:0")})
    mix.setup(CPU)
    scores = mix(IMAGES, *ROWS)
    assert list(scores) == ["one", "here", "two"]
    assert all(torch.equal(score.values, brightness(IMAGES, *ROWS)) for score in scores.values())
    assert here.seen[0][:2] == (CPU, threading.get_ident())
    for reward in (cpu_one, cpu_two):
        (device, thread, gradients) = reward.seen[0]
        assert device.type == "cpu"
        assert thread != threading.get_ident()
        assert not gradients


def test_the_mixtures_device_goes_before_the_rewards_own():
    mix = RewardMix({"a": RewardTerm(Constant(), device="cpu:0"), "b": RewardTerm(Constant())})
    mix.setup(CPU)
    assert mix.rewards["a"].places == [torch.device("cpu:0")]
    assert mix.rewards["b"].places == [CPU]


def test_a_failure_in_a_thread_is_told():
    def broken(images, prompts, metadata):
        raise OSError("no engine")

    mix = RewardMix({"fine": RewardTerm(brightness), "broken": RewardTerm(broken, device="cpu:0")})
    mix.setup(CPU)
    with pytest.raises(RewardError, match=r"'broken'.*OSError\('no engine'\)"):
        mix(IMAGES, *ROWS)


# Failures


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.tensor([1.0, float("nan"), 0, 0, 0, 0]), "score nan for prompt 'p'"),
        (torch.tensor([1.0, float("-inf"), 0, 0, 0, 0]), "score -inf"),
        (torch.zeros(3), r"expected \[6\] scores, got shape \[3\]"),
        (torch.zeros(6, 1), r"got shape \[6, 1\]"),
        (torch.zeros(6, device="meta"), r"failed on images on cpu: .*meta"),
        ("good", r"failed on images on cpu: TypeError"),
        (None, r"failed on images on cpu: "),
    ],
)
def test_a_failure_is_never_a_score(scores, message):
    def broken(images, prompts, metadata):
        return scores

    mix = RewardMix({"r": RewardTerm(broken)})
    with pytest.raises(RewardError, match=rf"reward 'r' \(broken of the module {__name__}\).*{message}") as raised:
        mix(IMAGES, *ROWS)
    assert "`lightning_fdfo.testing.check_reward(...)` shows what" in str(raised.value)


def test_a_set_up_that_fails_names_the_reward_and_its_device():
    class NoDriver(Constant):
        def setup(self, device):
            raise RuntimeError("no driver")

    with pytest.raises(
        RewardError, match=r"'r' \(NoDriver of .*: cannot be set up on cpu: RuntimeError\('no driver'\)"
    ):
        RewardMix({"r": RewardTerm(NoDriver())}).setup(CPU)


def test_rewards_are_scored_outside_of_the_trainers_autocast():
    weights = torch.randn(3 * 8 * 8, 1)
    mix = RewardMix({"linear": RewardTerm(lambda images, *_: (images.flatten(1) @ weights)[:, 0])})
    with torch.autocast("cpu", torch.bfloat16):
        assert (IMAGES.flatten(1) @ weights).dtype == torch.bfloat16
        inside = mix(IMAGES, *ROWS)["linear"].values
    assert torch.equal(inside, mix(IMAGES, *ROWS)["linear"].values)


@pytest.mark.parametrize("method", ["check", "fetch"])
def test_foreign_code_that_breaks_early_is_named_too(method):
    class Broken(Constant):
        required_metadata = ()

    def fail(self, *_):
        raise KeyError("surprise")

    setattr(Broken, method, fail)
    mix = RewardMix({"r": RewardTerm(Broken())})
    with pytest.raises(RewardError, match=r"'r' \(Broken of .*cannot .*'surprise'.*check_reward"):
        mix.check("p", {}) if method == "check" else mix.fetch()
