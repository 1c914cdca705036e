"""The conformance checks: good rewards pass, and each way of breaking the contract is found by its check."""

import itertools
import math
import os
import random
import re
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

from lightning_fdfo import PairReward, Reward
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.reward import load_reward
from lightning_fdfo.testing import ConformanceError, check_reward, reward_checks
from lightning_fdfo.testing.reward_checks import run_checks


class Redness(Reward):
    """A reward as it should be: a model that is made by setup, a generator of its own."""

    range = (-1.0, 1.0)
    required_metadata = ("text",)

    def __init__(self, gain=1.0):
        self.gain = gain

    def setup(self, device):
        self._model = nn.Conv2d(3, 1, 1, bias=False, device=device).requires_grad_(False)
        self._model.weight.copy_(torch.tensor([1.0, -0.5, -0.5])[None, :, None, None])

    def __call__(self, images, prompts, metadata):
        return self.gain * self._model(images).mean(dim=(1, 2, 3))


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Redness(gain=0.5),
        lambda: brightness,
        lambda: lambda images, prompts, metadata: images.amax(dim=(1, 2, 3)),
        lambda: load_reward("JPEGSize", quality=80),
        lambda: load_reward("Colorfulness"),
    ],
    ids=["class", "function", "lambda", "JPEGSize", "Colorfulness"],
)
def test_good_rewards_pass(make):
    check_reward(make())


# Bad ones: each is good but for one thing


class Module(Redness, nn.Module):
    def __init__(self):
        nn.Module.__init__(self)

    def setup(self, device): ...

    def __call__(self, images, prompts, metadata):
        return brightness(images, prompts, metadata)


class Shape(Redness):
    def __call__(self, images, prompts, metadata):
        return images.mean(dim=(2, 3))


class Numbers(Redness):
    def __call__(self, images, prompts, metadata):
        return images.mean(dim=(1, 2, 3)).tolist()


class Half(Redness):
    def __call__(self, images, prompts, metadata):
        return images.mean(dim=(1, 2, 3)).bfloat16()


class Complex(Redness):
    def __call__(self, images, prompts, metadata):
        return images.mean(dim=(1, 2, 3)).cfloat()


class NaN(Redness):
    """Of the black image alone."""

    def __call__(self, images, prompts, metadata):
        return images.mean(dim=(1, 2, 3)) / images.amax(dim=(1, 2, 3))


class Meta(Redness):
    def __call__(self, images, prompts, metadata):
        return torch.empty(len(images), device="meta")


class TooHigh(Redness):
    range = (0.0, 0.9)

    def __call__(self, images, prompts, metadata):
        return images.amax(dim=(1, 2, 3))


class TooLow(Redness):
    range = (0.1, 2.0)

    def __call__(self, images, prompts, metadata):
        return images.amax(dim=(1, 2, 3))


class BadRange(Redness):
    range = (1.0, -1.0)


class NoRange(Redness):
    range = (0.0, math.nan)


class Gradient(Redness):
    def setup(self, device):
        super().setup(device)
        self._model.requires_grad_(True)


class GradientsOff(Redness):
    def __call__(self, images, prompts, metadata):
        torch.set_grad_enabled(False)
        return super().__call__(images, prompts, metadata)


class Nondeterministic(Redness):
    def __init__(self):
        self.gain = 1.0
        self._count = itertools.count()

    def __call__(self, images, prompts, metadata):
        return brightness(images, prompts, metadata) * 0.5 ** (next(self._count) % 5)


class DrawsFromTorch(Redness):
    def __call__(self, images, prompts, metadata):
        torch.rand(())
        return super().__call__(images, prompts, metadata)


class DrawsFromNumpy(Redness):
    def __call__(self, images, prompts, metadata):
        np.random.rand()
        return super().__call__(images, prompts, metadata)


class DrawsFromPython(Redness):
    def __call__(self, images, prompts, metadata):
        random.random()
        return super().__call__(images, prompts, metadata)


class Clears(Redness):
    def __call__(self, images, prompts, metadata):
        prompts.clear()
        metadata[0].clear()
        return super().__call__(images, prompts, metadata)


class Leaves(Redness):
    def __call__(self, images, prompts, metadata):
        raise SystemExit(0)


class InPlace(Redness):
    def __call__(self, images, prompts, metadata):
        scores = super().__call__(images, prompts, metadata)
        images.mul_(2).sub_(1)
        return scores


class Relative(Redness):
    """Within the batch, as a group's advantage is."""

    def __call__(self, images, prompts, metadata):
        scores = super().__call__(images, prompts, metadata)
        return scores - scores.mean()


class SquaresOnly(Redness):
    def __call__(self, images, prompts, metadata):
        images + images.transpose(2, 3)
        return super().__call__(images, prompts, metadata)


class NaNElsewhere(Redness):
    def __call__(self, images, prompts, metadata):
        scores = super().__call__(images, prompts, metadata)
        return scores if images.shape[2] == images.shape[3] else scores * math.nan


class PublicWeights(Redness):
    def setup(self, device):
        super().setup(device)
        self.table = torch.zeros(50_000)


class Unpicklable(Redness):
    def __init__(self):
        self.gain = 1.0
        self.lock = threading.Lock()


class Forgetful(Redness):
    """Its option is in an attribute that does not travel."""

    def __init__(self):
        self._gain = 1.0

    @property
    def gain(self):
        return getattr(self, "_gain", 0.5)


class Lost(Forgetful):
    @property
    def gain(self):
        return self._gain


class NeverSetUp(Redness):
    def setup(self, device):
        raise OSError("no weights")


class SetUpOnce(Redness):
    def setup(self, device):
        if hasattr(self, "_model"):
            raise RuntimeError("set up already")
        super().setup(device)


class NeverFetched(Redness):
    def fetch(self):
        raise ConfigurationError("no network: copy the cache")


class Picky(Redness):
    required_metadata = ("text", "colour")


class Crash(Redness):
    def check(self, prompt, metadata):
        raise KeyError("colour")


class FailsToScore(Redness):
    def __call__(self, images, prompts, metadata):
        raise ZeroDivisionError("by nothing")


@pytest.fixture
def here(monkeypatch):
    """Without the check that starts a process, which imports torch: what it finds is tested below."""
    checks = tuple(pair for pair in reward_checks.CHECKS if pair[0] is not reward_checks._imports_cheaply)
    assert len(checks) == len(reward_checks.CHECKS) - 1
    monkeypatch.setattr(reward_checks, "CHECKS", checks)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("broken", "check", "problem"),
    [
        (
            Module,
            "keeps its state out of the module tree",
            r"must not be an nn\.Module: hold the model in an attribute",
        ),
        (Shape, "gives one finite number an image, or a pair", r"of shape \[4\], got \[4, 3\] of torch\.float32"),
        (Numbers, "gives one finite number an image, or a pair", r"expected a tensor, got list"),
        (
            Half,
            "gives one finite number an image, or a pair",
            r"got \[4\] of torch\.bfloat16; float32 is wanted, or float64",
        ),
        (Complex, "gives one finite number an image, or a pair", r"got \[4\] of torch\.complex64; float32 is wanted"),
        (Leaves, "gives one finite number an image, or a pair", r"raised SystemExit\(0\)"),
        (NaN, "gives one finite number an image, or a pair", r"got \[.*, nan, 1\.0\] for .* or give a finite score"),
        (Meta, "gives one finite number an image, or a pair", r"expected scores on cpu or the CPU, got them on meta"),
        (FailsToScore, "gives one finite number an image, or a pair", r"raised ZeroDivisionError\('by nothing'\)"),
        (TooHigh, "stays in its range", r"got \[1\.0, .*\], its range says 0\.0 … 0\.9"),
        (TooLow, "stays in its range", r"got \[1\.0, .* 0\.0, 1\.0\], its range says 0\.1 … 2\.0"),
        (BadRange, "stays in its range", r"expected range = \(lowest, highest\), got \(1\.0, -1\.0\)"),
        (NoRange, "stays in its range", r"expected range = \(lowest, highest\), got \(0\.0, nan\)"),
        (Gradient, "leaves no gradient on", r"requires_grad_\(False\), or score under torch\.no_grad\(\)"),
        (GradientsOff, "leaves no gradient on", r"turned gradients off for everybody: use `with torch\.no_grad"),
        (Nondeterministic, "gives the same scores again, and draws no global random numbers", r"got \[.*\], then \["),
        (DrawsFromTorch, "gives the same scores again, and draws no global random numbers", "with a seed"),
        (DrawsFromNumpy, "gives the same scores again, and draws no global random numbers", "with a seed"),
        (DrawsFromPython, "gives the same scores again, and draws no global random numbers", "with a seed"),
        (InPlace, "leaves images, prompts and metadata as they are", "changed the images; work on a copy: a mixture"),
        (Clears, "leaves images, prompts and metadata as they are", "changed the prompts and metadata; work on"),
        (Relative, "scores a batch as one by one", r"together \[.*\], alone \[0\.0, 0\.0, 0\.0, 0\.0\]"),
        (SquaresOnly, "scores images that are not square", r"it raised RuntimeError\(.*(48.*80|80.*48)"),
        (NaNElsewhere, "scores images that are not square", r"4 finite scores for images of 48 x 80, got \[nan, nan"),
        (PublicWeights, "pickles by its configuration, without weights", r"^- .*: 20\d{4} bytes: .* start with _"),
        (Unpicklable, "pickles by its configuration, without weights", r"cannot be pickled \(TypeError.*start with _"),
        (Forgetful, "pickles by its configuration, without weights", "set up again gives other scores"),
        (Lost, "pickles by its configuration, without weights", "no attribute '_gain'"),
        (NeverSetUp, "can be set up, and again", r"it raised OSError\('no weights'\)"),
        (SetUpOnce, "can be set up, and again", r"it raised RuntimeError\('set up already'\)"),
        (NeverFetched, "can be set up, and again", r": no network: copy the cache$"),
        (Picky, "accepts the sample's prompts and metadata", r"\['colour'\].*; give the check prompts= and metadata="),
        (Crash, "accepts the sample's prompts and metadata", r"it raised KeyError\('colour'\)"),
    ],
)
def test_what_breaks_the_contract_is_found_by_its_check(broken, check, problem):
    """By that one alone, except that a number which differs each time may fail others too."""
    with torch.enable_grad(), pytest.raises(ConformanceError) as caught:
        check_reward(broken())
    title, *lines = str(caught.value).splitlines()
    assert title == f"{broken.__name__} of the module {__name__}:"
    (line,) = [line for line in lines if line.startswith(f"- {check}: ")]
    assert re.search(problem, line), line
    assert lines == [line] or broken is Nondeterministic


def test_a_function_that_cannot_be_pickled_stays_in_its_process(here):
    lock = threading.Lock()

    def locked(images, prompts, metadata):
        with lock:
            return brightness(images, prompts, metadata)

    check_reward(locked)


@pytest.mark.parametrize(("tolerance", "passes"), [(1e-4, False), (1e-2, True)])
def test_the_tolerance_is_relative_for_large_scores(here, tolerance, passes):
    def drifting(images, prompts, metadata):
        return 1000 * (1 + images.mean(dim=(1, 2, 3))) * (1 + 0.001 * len(images))

    results = {result.check: result.problem for result in run_checks(drifting, tolerance=tolerance)}
    assert (results["scores a batch as one by one"] is None) == passes


def test_prompts_and_metadata_of_ones_own(here):
    seen = []

    class Spy(Picky):
        def __call__(self, images, prompts, metadata):
            seen.append((tuple(prompts), tuple(row["colour"] for row in metadata)))
            return super().__call__(images, prompts, metadata)

    rows = [{"text": "", "colour": number} for number in range(4)]
    problems = [result.problem for result in run_checks(Spy(), prompts=["a", "b", "c", "d"], metadata=rows)]
    assert problems[:-1] == [None] * 11  # the last one: a class within a function does not pickle
    assert (("a", "b", "c", "d"), (0, 1, 2, 3)) in seen
    assert (("c",), (2,)) in seen


# What is told


def test_all_failures_are_told(here):
    class Both(Relative):
        range = (5.0, 6.0)

    with pytest.raises(ConformanceError) as caught:
        check_reward(Both())
    questions = [line.split(":")[0] for line in str(caught.value).splitlines()[1:]]
    assert questions == [
        "- stays in its range",
        "- scores a batch as one by one",
        "- pickles by its configuration, without weights",
    ]


@pytest.mark.parametrize(
    ("broken", "last"),
    [
        (Picky, "accepts the sample's prompts and metadata"),
        (NeverSetUp, "can be set up, and again"),
        (Shape, "gives one finite number an image, or a pair"),
    ],
)
def test_after_a_fatal_failure_no_check_is_run(here, broken, last):
    results = list(run_checks(broken()))
    assert results[-1].check == last
    assert [result.problem is None for result in results] == [True] * (len(results) - 1) + [False]


def test_a_reward_that_keeps_the_contract_passes_every_check(here):
    results = list(run_checks(Redness()))
    assert len(results) == len(reward_checks.CHECKS)
    assert all(problem is None for _, problem in results)


def test_the_samples_images_are_different_and_in_range():
    images = reward_checks.sample_images(48, 80)
    assert images.shape == (4, 3, 48, 80)
    assert (images.amin(), images.amax()) == (0, 1)
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(images, 2))
    assert torch.equal(images, reward_checks.sample_images(48, 80))


# Imports


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Writes a module where this process and its children find it, and returns what it defines as `scorer`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    written = []

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        written.append(name)
        return load_reward(f"{name}.scorer")

    yield write
    for name in written:
        del sys.modules[name]


def imports(reward):
    """The problem that the check of imports tells."""
    results = {result.check: result.problem for result in run_checks(reward)}
    return results["imports nothing heavy with its module"]


SCORER = "\ndef scorer(images, prompts, metadata):\n    return images.mean(dim=(1, 2, 3))\n"


@pytest.mark.parametrize("line", ["import transformers, json", "from transformers.utils import logging"])
def test_a_heavy_import_is_named(plugin, line):
    problem = imports(plugin("heavy_plugin", line + SCORER))
    assert problem == "`import heavy_plugin` imports transformers: import them in setup()"


def test_a_light_module_passes_although_this_process_has_imported_transformers(plugin):
    assert "lightning" in sys.modules
    assert imports(plugin("light_plugin", "import torch, numpy, PIL" + SCORER)) is None


def test_a_module_that_fails_in_a_fresh_process_is_told(plugin, monkeypatch):
    monkeypatch.setenv("PLUGIN_PARENT", str(os.getpid()))
    only_here = "import os\nif os.environ['PLUGIN_PARENT'] != str(os.getpid()):\n    raise OSError('not here')\n"
    problem = imports(plugin("failing_plugin", only_here + SCORER))
    assert problem == "`import failing_plugin` fails in a fresh process: OSError: not here"


def test_what_no_process_can_import_is_not_asked():
    scope = {"__name__": "__main__"}
    exec("def scorer(images, prompts, metadata): return images.mean(dim=(1, 2, 3))", scope)
    assert imports(scope["scorer"]) is None
    scope["scorer"].__module__ = "no_such_package.no_such_module"
    assert imports(scope["scorer"]) is None


# Rewards that compare two images


class Brighter(PairReward):
    """As good as any."""

    def __call__(self, first, second, prompts, metadata):
        return (first - second).mean(dim=(1, 2, 3))


class FirstImage(PairReward):
    """Looks at one of them."""

    def __call__(self, first, second, prompts, metadata):
        return first.mean(dim=(1, 2, 3))


class TooSure(Brighter):
    """Says more than it may."""

    def __call__(self, first, second, prompts, metadata):
        return 3 * super().__call__(first, second, prompts, metadata)


class OnePair(Brighter):
    """Sees the batch."""

    def __call__(self, first, second, prompts, metadata):
        return super().__call__(first, second, prompts, metadata)[:1]


class Painter(Brighter):
    """Writes into its arguments."""

    def __call__(self, first, second, prompts, metadata):
        found = super().__call__(first, second, prompts, metadata)
        second.zero_()
        return found


class ACost(Brighter):
    """Turns its sign twice."""

    higher_is_better = False


def test_a_pair_reward_keeps_its_contract():
    check_reward(Brighter())


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (FirstImage, r"says the opposite with the images swapped: got \[.*ask both ways"),
        (TooSure, "stays in its range"),
        (OnePair, r"gives one finite number an image, or a pair: expected a tensor of shape \[4\], got \[1\]"),
        (Painter, "it changed the images"),
        (ACost, "a PairReward is not differentiable, and higher_is_better: leave both as they are"),
    ],
)
def test_a_pair_reward_that_breaks_it_is_named(reward, message):
    with pytest.raises(ConformanceError, match=message):
        check_reward(reward())
