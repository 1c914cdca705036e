import torch

from lightning_fdfo.randomness import Stream, branch_normal, generator, prompt_rows, stack_normal


def draw(*arguments, **options):
    return torch.randn(4, generator=generator(*arguments, **options))


def test_numbers_depend_on_stream_seed_epoch_and_index_alone():
    torch.manual_seed(5)
    first = draw(Stream.LATENTS, 1, 2, 3)
    torch.manual_seed(6)
    assert torch.equal(draw(Stream.LATENTS, 1, 2, 3), first)
    for other in [
        (Stream.POINTS, 1, 2, 3),
        (Stream.LATENTS, 0, 2, 3),
        (Stream.LATENTS, 1, 3, 2),
        (Stream.LATENTS, 1, 2, 4),
    ]:
        assert not torch.equal(draw(*other), first)


def test_a_pairs_numbers_do_not_depend_on_its_batch():
    together = stack_normal([generator(Stream.LATENTS, 0, 0, pair) for pair in range(4)], 2, 3)
    alone = stack_normal([generator(Stream.LATENTS, 0, 0, 2)], 2, 3)
    assert torch.equal(together[2:3], alone)


def test_antithetic_branches_are_each_standard_normal():
    generators = [generator(Stream.LATENTS, 0, 0, pair) for pair in range(20_000)]
    for antithetic, correlation in ((False, 0.0), (True, -1.0)):
        first, second = branch_normal(generators, 3, antithetic=antithetic).reshape(-1, 2, 3).unbind(1)
        for branch in (first, second):
            assert branch.mean(0).abs().max() < 0.03
            assert (branch.var(0) - 1).abs().max() < 0.05
        assert abs((first * second).mean().item() - correlation) < 0.02


def test_every_prompt_comes_once_before_any_comes_twice():
    rows = prompt_rows(seed=3, first=0, count=21, num_prompts=7)
    assert [sorted(rows[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3
    assert rows[:7] != rows[7:14]


def test_devices_share_the_draws_among_them():
    whole = prompt_rows(seed=3, first=10, count=8, num_prompts=5)
    assert prompt_rows(3, 10, 4, 5) + prompt_rows(3, 14, 4, 5) == whole
