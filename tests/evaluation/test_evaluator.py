"""The Evaluator's own: what it keeps between batches, and for how long."""

from contextlib import contextmanager

import torch

from lightning_fdfo import Evaluation, FDFOModule, Sampling
from lightning_fdfo.flows.generate import generate
from lightning_fdfo.prompts import IndexedPrompt, Prompt
from lightning_fdfo.reward.term import RewardTerm
from tests.conftest import ToyFlow, brightness


class CountingFlow(ToyFlow):
    """Notes what is encoded."""

    def __init__(self):
        super().__init__()
        self.encoded = []

    @contextmanager
    def encoding(self):
        yield

    def encode(self, prompts, negative_prompts=None):
        self.encoded.append(list(prompts))
        return super().encode(prompts)


def batch(*texts):
    return [IndexedPrompt(index, Prompt(text, "", {}, "p:1")) for index, text in enumerate(texts)]


def test_a_batch_that_comes_again_is_encoded_once_in_a_command():
    module = FDFOModule(CountingFlow(), {"brightness": RewardTerm(brightness)}, Sampling(2, 2, 2))
    module.flow.load()
    evaluator = module.evaluator
    with torch.inference_mode():  # as Lightning validates
        first = [evaluator.encode_once(batch("a cat", "the dog")).tensors["embeds"] for _ in range(2)]
    assert torch.equal(*first)
    assert not first[0].is_inference()
    evaluator.encode_once(batch("some bird"))
    assert module.flow.encoded == [["a cat", "the dog"], ["some bird"]]
    evaluator.expect([])  # the next command, which may have another precision
    evaluator.encode_once(batch("some bird"))
    assert module.flow.encoded[2:] == [["some bird"]]


def test_what_comes_once_is_not_kept(toy_module):
    """A test's prompts may be many, and their conditioning large."""
    module = toy_module()
    module.flow.load()
    module.evaluator.generate(batch("a cat"), torch.device("cpu"))
    assert not module.evaluator._encoded


def test_evaluation_may_take_other_steps_than_rollouts(toy_module):
    module = toy_module(evaluation=Evaluation(num_steps=9))
    module.flow.load()
    assert module.sampling.num_steps == 4
    rows, cpu = batch("a cat", "the dog"), torch.device("cpu")
    images = module.evaluator.generate(rows, cpu)
    few, many = (
        generate(module.flow, [row.prompt for row in rows], [0, 1], seed=0, sampling=Sampling(steps, 2, 2), device=cpu)
        for steps in (4, 9)
    )
    assert torch.equal(images, many)
    assert not torch.equal(images, few)
