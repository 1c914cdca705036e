"""`lightning-fdfo doctor --config FILE`: builds all that a run needs, tries each part, and says what it found.

First what can be known without loading the model: its folder, the rewards' weights, the prompts, the arithmetic of an
epoch. Then, set up by the trainer of the configuration, on its device and in its precision: one pair is rolled out,
judged, and trained on without a step. It writes nothing but encoded texts, where the configuration caches them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from lightning_fdfo.commands.cli import FDFOCLI, as_list
from lightning_fdfo.data import PromptDataModule
from lightning_fdfo.errors import ConfigurationError, DivergenceError, RewardError
from lightning_fdfo.files import format_bytes
from lightning_fdfo.flows import DiffusersFlow
from lightning_fdfo.flows.base import Conditioning
from lightning_fdfo.flows.generate import uses_negatives
from lightning_fdfo.guards import memory
from lightning_fdfo.guards.learning import cannot_learn, nothing_learned
from lightning_fdfo.module import FDFOModule
from lightning_fdfo.objective import half_differences, velocity_objective
from lightning_fdfo.prompts import Prompt, read_prompts
from lightning_fdfo.reward.registry import as_reward
from lightning_fdfo.rollout.pairs import Rollout, roll_out
from lightning_fdfo.rollout.plan import BatchPlan
from lightning_fdfo.rollout.points import TrajectoryPoints, deal_points
from lightning_fdfo.rollout.scores import gather, judge
from lightning_fdfo.settings import Sampling

MAX_FAULTS = 5
"""Faulty prompts that are told one by one."""


class Finding(NamedTuple):
    """What was looked at, and how it is."""

    well: bool
    text: str


class DoctorCLI(FDFOCLI):
    """Builds what `fit` would build, with a trainer that examines instead of training."""

    def __init__(self, args: Sequence[str], examination: Callback) -> None:
        self.examination = examination
        self.faults: list[Finding] = []
        """Of the trainer that the configuration asks for."""
        super().__init__(args, run=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """A run's own record names what `fit` has beside the classes; it makes no difference here."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="not used")
        parser.add_argument("--weights_only", type=bool | None, default=None, help="not used")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The configuration's device, strategy and precision; nothing that writes, and no epoch."""
        self.callbacks = as_list(self._get(self.config_init, "trainer", default={}).get("callbacks"))
        silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        silent |= {"enable_model_summary": False, "barebones": False}
        options: dict[str, Any] = {**kwargs, **silent, "callbacks": [self.examination]}
        options |= {"max_epochs": 0, "max_steps": -1, "num_sanity_val_steps": 0}
        try:
            return _writing_nothing(super().instantiate_trainer(**options))
        except ConfigurationError as error:  # such as for a GPU that is not there
            problem = " ".join(str(error).removeprefix("trainer: ").split())
            asked = self._get(self.config_init, "trainer", default={})
            settings = ", ".join(f"{name} {asked.get(name)}" for name in ("accelerator", "devices", "strategy"))
            self.faults.append(
                Finding(
                    False,
                    f"trainer ({settings}): {problem}; run it where torch finds such devices, or "
                    "set --trainer.accelerator cpu; all else is looked at on the CPU",
                )
            )
        here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
        return _writing_nothing(super().instantiate_trainer(**options | here))


def _writing_nothing(trainer: Trainer) -> Trainer:
    """Without the command's own callbacks, for which the run's folder would be claimed."""
    own = "lightning_fdfo.callbacks."
    trainer.callbacks = [one for one in trainer.callbacks if not type(one).__module__.startswith(own)]  # type: ignore[attr-defined]
    return trainer


def main(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
        arguments: those of `fit`.

    Returns:
        0 if all is well, 1 with a fault.
    """
    examination = Examination()
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
    warnings.filterwarnings("ignore", message=".*`isinstance.treespec, LeafSpec.` is deprecated")  # Lightning's own
    cli = DoctorCLI(arguments, examination)
    findings = cli.faults + list(before_loading(cli.model, cli.datamodule, cli.trainer, cli.callbacks))
    if all(finding.well for finding in findings):
        try:
            cli.trainer.fit(cli.model, cli.datamodule)
            findings += examination.findings
        except Exception as error:  # whatever it is, what was found before it is told too
            known = isinstance(error, ConfigurationError | DivergenceError | RewardError)
            told = str(error) if known else f"{type(error).__name__}: {error}"
            findings += [*examination.findings, Finding(False, told)]
    if not cli.trainer.is_global_zero:
        return 0
    console = Console(highlight=False, soft_wrap=True)
    for finding in findings:
        mark = "[green]well [/green] " if finding.well else "[bold red]FAULT[/bold red] "
        text = escape(finding.text)
        console.print(mark + (text if finding.well else f"[red]{text}[/red]"))
    faults = sum(not finding.well for finding in findings)
    console.print(f"{faults} fault{'s' * (faults != 1)}" if faults else "Ready to train.")
    return int(faults > 0)


# Without the model


def before_loading(
    module: FDFOModule, data: PromptDataModule, trainer: Trainer, callbacks: Sequence[Callback] = ()
) -> Iterator[Finding]:
    """What can be known before the model is loaded."""
    module.trainer = trainer
    for callback in callbacks:
        if type(callback).__module__.startswith("lightning_fdfo."):
            check = partial(callback.setup, trainer, module, "fit")
            yield _tried(check, f"{type(callback).__name__} fits the configuration")
    yield _tried(
        module.flow.check, f"{getattr(module.flow, 'pretrained', 'the model')} is a model that the flow serves"
    )
    yield from _fits(module)
    yield _tried(module.fetch_weights, f"the weights of {', '.join(module.rewards.terms)} are here")
    if module.embedder is not None:
        yield _tried(module.embedder.fetch, f"the weights of {module.evaluation.diversity}, for diversity, are here")
    yield from _prompts(module, data)
    yield from (Finding(False, sentence) for sentence in cannot_learn(module, trainer.max_epochs))
    try:
        yield Finding(True, str(module.plan))
    except ConfigurationError as error:
        yield Finding(False, str(error))
    if module.updates_per_epoch == 1:
        yield Finding(True, "objective.clip_range has no effect with updates_per_epoch 1: a first update's ratio is 1")


def _fits(module: FDFOModule) -> Iterator[Finding]:
    """What `fit` refuses, or warns of, for a model's positions, a LoRA's rank and the memory here."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield _tried(partial(module.check_fits, "fit"), "sizes and counts fit the model, and the memory here")
    yield from (Finding(False, str(warning.message)) for warning in told if warning.category is UserWarning)


def _tried(function: Callable[[], Any], text: str) -> Finding:
    try:
        function()
    except ConfigurationError as error:
        return Finding(False, str(error))
    return Finding(True, text)


def _prompts(module: FDFOModule, data: PromptDataModule) -> Iterator[Finding]:
    """Whether each row has what the rewards need, and the metrics for validation."""
    files = {data.train_path: True, data.val_path: False, data.test_path: False}
    for path, train in files.items():
        if path is None:
            continue
        try:
            prompts = read_prompts(path)
        except ConfigurationError as error:
            yield Finding(False, str(error))
            continue
        faults = [fault for prompt in prompts if (fault := _fault(module, prompt, train))]
        yield from (Finding(False, fault) for fault in faults[:MAX_FAULTS])
        if len(faults) > MAX_FAULTS:
            yield Finding(False, f"{path}: {len(faults) - MAX_FAULTS} more such prompts")
        if not faults:
            yield Finding(True, f"{path}: {len(prompts)} prompts, each with what its rewards need")


def _fault(module: FDFOModule, prompt: Prompt, train: bool) -> str | None:
    try:
        module.check_prompts([prompt] if train else [], [] if train else [prompt])
    except ConfigurationError as error:
        return str(error)
    return None


# With the model


class Examination(Callback):
    """Tries the model when all is in place, before the first epoch would begin."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Examines; without `max_epochs` nothing follows."""
        self.findings += examine(cast(FDFOModule, pl_module), trainer.datamodule.train_prompts[0])  # type: ignore[attr-defined]


def examine(module: FDFOModule, prompt: Prompt) -> Iterator[Finding]:
    """Rolls out one pair, and looks at all that training would make of it.

    Args:
        module: attached to a trainer, its model loaded.
        prompt: to paint.
    """
    module.place()
    with module.trainer.precision_plugin.forward_context():
        yield _what_trains(module)
        conditioning = module.encode([prompt])
        yield _rollout_size(module, conditioning)
        yield _memory(module, conditioning)
        yield _without_churn(module, prompt, conditioning)
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)
        rollout = _pair(module, prompt, conditioning, module.sampling)
        yield _churn(module, rollout)
        yield from _scores(module, rollout)
        yield from _teaches(module, rollout)
        points = _points(module, rollout)
        yield _replay(module, points)
        yield _gradient(module, points)
    if module.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(module.device)
        yield Finding(True, f"while one pair was rolled out and trained on, {format_bytes(peak)} were taken at most")


def _trainable(module: FDFOModule) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _what_trains(module: FDFOModule) -> Finding:
    count = f"{sum(parameter.numel() for parameter in _trainable(module)):,} weights train".replace(",", " ")
    if module.lora is None:
        return Finding(True, f"the whole transformer: {count}")
    layers = {name.split(".lora_")[0] for name, p in module.flow.named_parameters() if p.requires_grad}
    return Finding(bool(layers), f"LoRA of rank {module.lora.rank} bound {len(layers)} layers: {count}")


def _pair(module: FDFOModule, prompt: Prompt, conditioning: Conditioning, sampling: Sampling) -> Rollout:
    return roll_out(
        module.flow,
        module.rewards,
        [prompt],
        conditioning,
        [0],
        seed=module.seed,
        epoch=0,
        sampling=sampling,
        device=module.device,
    )


def _without_churn(module: FDFOModule, prompt: Prompt, conditioning: Conditioning) -> Finding:
    sampling = replace(module.sampling, churn=0.0, initial_churn=0.0, num_steps=min(4, module.sampling.num_steps))
    ends = _pair(module, prompt, conditioning, sampling).trajectories.latents[:, -1]
    largest = half_differences(ends).abs().max().item()
    text = f"without churn the two latents of a pair differ by at most {largest:.2g}"
    if largest <= 1e-3 * ends.abs().mean().item():
        return Finding(True, text)
    return Finding(
        False, f"{text}: the velocity is not a function of its arguments; is a dropout on in the transformer?"
    )


def _churn(module: FDFOModule, rollout: Rollout) -> Finding:
    difference = half_differences(rollout.trajectories.latents[:, -1]).square().mean().sqrt().item()
    size = rollout.trajectories.latents[:, -1].square().mean().sqrt().item()
    text = (
        f"with churn {module.sampling.churn} they differ by {difference / size:.1%} (root mean square, half difference)"
    )
    enough = difference > 1e-6 * size  # less is rounding
    return Finding(enough, text if enough else f"{text}: sampling.churn must be above 0")


def _scores(module: FDFOModule, rollout: Rollout) -> Iterator[Finding]:
    """A reward that raises ends the examination with its own message."""
    for name, scores in rollout.scores.items():
        if bool(rollout.routes[name].isnan().all()):
            yield Finding(True, f"{name}: not tried, the first prompt's rewards do not name it")
            continue
        low, high = as_reward(module.rewards.terms[name].reward).range
        given = ", ".join(f"{score:.4g}" for score in scores.tolist())
        slack = 1e-4 * (1 + scores.abs())
        well = bool(scores.isfinite().all() and (scores >= low - slack).all() and (scores <= high + slack).all())
        yield Finding(well, f"{name}: {given} for two images; its range is {low:g} … {high:g}")


def _teaches(module: FDFOModule, rollout: Rollout) -> Iterator[Finding]:
    """What `fit` would report of an epoch of this one pair; a tie is no fault yet, other pairs may differ."""
    scored = gather(rollout, 1, lambda sums: sums)
    if bool(scored.whole.all()):
        judged = judge(scored, module.rewards, 0)
        found = nothing_learned(judged, module.rewards, 0)
        yield from (Finding(True, f"in this one pair: {text}") for _, text in found)


def _points(module: FDFOModule, rollout: Rollout) -> TrajectoryPoints:
    """A batch as training has it, of this one pair's points, some of them several times if need be."""
    num_steps = module.sampling.num_steps
    plan = BatchPlan.derive(
        num_pairs=1, updates_per_epoch=1, num_steps=num_steps, num_points_per_pair=None, batch_size=2 * num_steps,
        world_size=1,
    )  # fmt: skip
    (batch,) = deal_points(
        rollout,
        torch.tensor([1.0, -1.0]),
        plan,
        seed=module.seed,
        epoch=0,
        normalization=module.objective.normalization,
    )
    rows = torch.arange(module.batch_size) % (2 * num_steps)
    chosen: list[Any] = [values[rows].to(module.device) for values in batch]
    return TrajectoryPoints(*chosen)


def _replay(module: FDFOModule, points: TrajectoryPoints) -> Finding:
    """The ratio is what training sees of a difference: it must stay well inside the clip range."""
    with torch.no_grad():
        velocity = module.velocity(points)
    ratio = velocity_objective(velocity, points.old_velocity, points.direction, points.reward_difference).ratio
    largest = (velocity - points.old_velocity).abs().max().item()
    off = (ratio - 1).abs().max().item()
    text = (
        f"replayed in {module.trainer.precision}, the velocity of {len(velocity)} stored points differs from the "
        f"rollout's by at most {largest:.2g}: ratios leave 1 by {off:.2g}, clip_range is {module.objective.clip_range}"
    )
    return Finding(off <= module.objective.clip_range / 10, text)


def _gradient(module: FDFOModule, points: TrajectoryPoints) -> Finding:
    """By autograd.grad: no gradient is left behind, and no strategy's hooks are called."""
    loss, _ = velocity_objective(
        module.velocity(points), points.old_velocity, points.direction, points.reward_difference
    )
    parameters = _trainable(module)
    gradients = [
        gradient for gradient in torch.autograd.grad(loss.mean(), parameters, allow_unused=True) if gradient is not None
    ]
    norm = torch.nn.utils.get_total_norm(gradients).item() if gradients else 0.0
    reached = f"{len(gradients)} of {len(parameters)} tensors"
    text = f"a batch of {len(loss)} points gives a gradient of norm {norm:.3g} to {reached}"
    return Finding(0 < norm < float("inf"), text)


def _rollout_size(module: FDFOModule, conditioning: Conditioning) -> Finding:
    sampling, plan = module.sampling, module.plan
    latent = torch.Size(module.flow.latent_shape(sampling.height, sampling.width)).numel()
    row = sum(tensor[0].nbytes for tensor in conditioning.tensors.values())
    size = memory.rollout_bytes(plan.pairs_per_device, sampling.num_steps, latent, row)
    return Finding(True, f"an epoch's rollout takes {format_bytes(size)} of main memory, for each device")


def _memory(module: FDFOModule, conditioning: Conditioning) -> Finding:
    """The estimate, held against what a CUDA device has."""
    parts = estimate(module, conditioning)
    total = sum(parts.values())
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    text = f"estimated memory of a device, rewards left out: {format_bytes(total)} ({listed})"
    if module.device.type != "cuda":
        return Finding(True, text)
    available = torch.cuda.get_device_properties(module.device).total_memory
    return Finding(total <= available, f"{text}, of {format_bytes(available)}")


def estimate(module: FDFOModule, conditioning: Conditioning) -> dict[str, int]:
    """Bytes on a device by what takes them, while training; for a flow of diffusers.

    Args:
        module: loaded.
        conditioning: of one prompt.
    """
    trainable = _trainable(module)
    trained = {id(parameter) for parameter in trainable}
    frozen = [p for p in module.flow.transformer.parameters() if id(p) not in trained]
    parts = {
        "frozen weights": sum(p.nbytes for p in frozen),
        "what trains": memory.training_state_bytes(sum(p.numel() for p in trainable)),
    }
    if isinstance(module.flow, DiffusersFlow):
        pipeline = module.flow.pipeline
        parts["VAE"] = sum(p.nbytes for p in pipeline.vae.parameters())
        if module.flow.text_encoders == "keep":
            parts["text encoders"] = sum(p.nbytes for part in module.flow.text_modules for p in part.parameters())
        sampling = module.sampling
        parts["activations of a batch"] = memory.activation_bytes(
            len(module.flow.blocks),
            module.batch_size * (2 if uses_negatives(module.flow, sampling.guidance_scale) else 1),
            module.flow.num_tokens(sampling.height, sampling.width, conditioning),
            module.flow.width,
            bytes_per_value=4 if module.trainer.precision == "32-true" else 2,
            checkpointing=module.flow.gradient_checkpointing,
        )
    return parts
