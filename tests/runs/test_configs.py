"""Every configuration in configs/ parses strictly and can be instantiated without network or weights."""

import re
import socket
from pathlib import Path

import pytest
import torch
import yaml

import lightning_fdfo.flows
from lightning_fdfo.commands.cli import FDFOCLI
from lightning_fdfo.commands.configuration.parser import FDFOArgumentParser
from lightning_fdfo.flows import DiffusersFlow
from lightning_fdfo.parallel import check_strategy
from lightning_fdfo.prompts import read_prompts
from lightning_fdfo.rollout.plan import BatchPlan

ROOT = Path(__file__).parents[2]
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}
SINGLE_GPU = ("single_gpu_24gb", "single_gpu_80gb")
PARALLEL = ("ddp", "fsdp2", "multi_node")
MIXTURES = ("legible_and_small", "legible_then_small", "legible_and_colorful")
OVERLAYS: dict[str, tuple[str, ...]] = dict.fromkeys(MIXTURES, ("quickstart",))
"""Files that are laid over another one, as their head says, and those that they are for."""
BASES = [name for name in CONFIGS if name not in (*OVERLAYS, *SINGLE_GPU, *PARALLEL, "guarded", "people")]
FULL_SIZE = [name for name in BASES if name != "quickstart"]
OVERLAYS["guarded"] = ("quickstart", "sd35_medium_pickscore")
OVERLAYS["people"] = ("quickstart",)
OVERLAYS |= dict.fromkeys(SINGLE_GPU, tuple(FULL_SIZE)) | dict.fromkeys(PARALLEL, ("flux_dev",))
STACKS = [(base,) for base in BASES] + [(base, overlay) for overlay, bases in OVERLAYS.items() for base in bases]
MEMORY_KEYS = {
    "model.flow.init_args.gradient_checkpointing",
    "model.flow.init_args.quantization",
    "model.flow.init_args.text_encoders",
    "model.flow.init_args.vae_slicing",
    "model.batching.rollout_batch_size",
    "model.batching.batch_size",
    "data.val_batch_size",
    "trainer.accelerator",
    "trainer.devices",
}
"""What an overlay for a card may set: nothing that is trained on differs by it."""


def read(name):
    return yaml.safe_load(CONFIGS[name].read_text(encoding="utf-8"))


def leaves(tree, prefix=""):
    """Dotted keys and values."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.fixture
def build(monkeypatch):
    """Instantiates some configurations laid over each other, as `fit` does, on the CPU and without a network."""

    def refuse(*_):
        raise AssertionError("a configuration asked for the network")

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("sys.argv", ["lightning-fdfo"])
    built = []
    monkeypatch.setattr(FDFOCLI, "_run_subcommand", lambda self, subcommand: built.append(self))

    def run(names):
        files = (f"--config={CONFIGS[name]}" for name in names)
        FDFOCLI(["fit", *files, "--trainer.accelerator=cpu", "--trainer.devices=1"])
        return built[-1]

    return run


@pytest.mark.parametrize("names", STACKS, ids="+".join)
def test_configurations_can_be_built(names, build):
    cli = build(names)
    assert isinstance(cli._subcommand_parsers["fit"], FDFOArgumentParser)
    settings, flow = read(names[0]), cli.model.flow
    assert type(flow).__name__ == settings["model"]["flow"]["class_path"]  # an overlay does not change it
    assert not hasattr(flow, "transformer")
    assert cli.model.seed == settings["seed_everything"]
    cli.model.trainer = cli.trainer
    plan = cli.model.plan
    points = plan.num_pairs * plan.points_per_pair_and_update
    assert plan.batches_per_update * plan.batch_size * plan.world_size == points
    for prompts in (cli.datamodule.train_path, cli.datamodule.val_path):
        assert Path(prompts).is_relative_to("configs")
        assert len(read_prompts(prompts)) >= 16
    for name, value in dict(leaves(read(names[-1]))).items():
        if name.startswith("model.flow.init_args.") and not name.endswith(("pretrained", "dtype")):
            assert getattr(flow, name.rpartition(".")[2]) == value


@pytest.mark.parametrize("name", FULL_SIZE)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_totals_divide_over_the_devices_that_the_configuration_names(name, world_size):
    settings = read(name)["model"]
    assert "divide over 1, 2, 4 and 8" in CONFIGS[name].read_text(encoding="utf-8")
    plan = BatchPlan.derive(
        num_pairs=settings["batching"]["num_pairs"],
        updates_per_epoch=settings["batching"]["updates_per_epoch"],
        num_steps=settings["sampling"]["num_steps"],
        num_points_per_pair=settings["batching"].get("num_points_per_pair"),
        batch_size=settings["batching"]["batch_size"],
        world_size=world_size,
    )
    assert (plan.num_pairs, plan.updates_per_epoch) == (432, 4)


@pytest.mark.parametrize("name", ["sd35_medium_pickscore", "sd35_medium_combined"])
def test_the_papers_setting(name, build):
    model = build([name]).model
    assert (model.sampling.num_steps, model.sampling.height, model.sampling.width) == (40, 512, 512)
    assert (model.sampling.churn, model.sampling.initial_churn, model.sampling.guidance_scale) == (0.0025, None, 1.0)
    assert (model.lora.rank, model.lora.alpha, model.lora.targets) == (32, 64, None)
    batching = model.batching
    assert (batching.num_pairs, batching.updates_per_epoch, batching.num_points_per_pair) == (432, 4, None)
    assert (model.objective.clip_range, model.objective.normalization) == (0.03, "mean_square")
    (group,) = model.optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups
    assert (group["lr"], group["weight_decay"]) == (3e-5, 1e-4)
    weights = {name: term.weight for name, term in model.rewards.terms.items()}
    assert weights == {"PickScore": 1.0} | ({"VLMScore": 0.1} if name.endswith("combined") else {})
    assert read(name)["trainer"]["gradient_clip_val"] == 1.0


@pytest.mark.parametrize("name", SINGLE_GPU)
def test_overlays_for_a_card_set_memory_only(name):
    given = dict(leaves(read(name)))
    assert set(given) <= MEMORY_KEYS
    assert (given["trainer.accelerator"], given["trainer.devices"]) == ("gpu", 1)
    assert given["model.flow.init_args.text_encoders"] == "cache"


@pytest.mark.parametrize("name", PARALLEL)
def test_overlays_for_many_devices_say_where_it_runs_and_no_more(name, build):
    keys = {key.split(".")[1] for key in dict(leaves(read(name)))}
    assert keys <= {"strategy", "devices", "num_nodes"}
    cli = build(["quickstart", name])
    check_strategy(cli.trainer.strategy)
    if name == "fsdp2":
        assert cli.trainer.strategy._data_parallel_size == cli.trainer.world_size


@pytest.mark.parametrize("name", [*FULL_SIZE, *SINGLE_GPU, *PARALLEL])
def test_every_value_has_its_reason(name):
    """In a comment beside it, or beside the key that it lies below."""
    explained = {}  # indentation -> whether the key there says what is below it
    for number, line in enumerate(CONFIGS[name].read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        indent = len(line) - len(line.lstrip(" "))
        explained = {depth: said for depth, said in explained.items() if depth < indent}
        said = "#" in line or any(explained.values())
        is_group = re.fullmatch(r"\s*(- )?\w+:", line) is not None
        assert said or is_group, f"{CONFIGS[name].name}:{number}: {line.strip()}: why?"
        explained[indent] = said


def test_every_adapter_that_a_configuration_names_is_there():
    names = {read(name)["model"]["flow"]["class_path"] for name in BASES}
    assert all(issubclass(getattr(lightning_fdfo.flows, name), DiffusersFlow) for name in names)


def test_held_out_prompts_are_never_trained_on():
    for kind in ("digits", "photos"):
        train, held_out = (
            {prompt.text for prompt in read_prompts(ROOT / f"configs/prompts/{kind}_{part}.txt")}
            for part in ("train", "heldout")
        )
        assert not train & held_out
        assert len(held_out) >= 16


def test_held_out_numbers_are_never_trained_on():
    train, held_out = (read_prompts(ROOT / f"configs/prompts/digits_{name}.txt") for name in ("train", "heldout"))
    numbers = [{int(prompt.text.split('"')[1]) for prompt in prompts} for prompts in (train, held_out)]
    assert not any(number % 7 == 0 for number in numbers[0])
    assert all(number % 7 == 0 for number in numbers[1])
    assert len(train) >= 256
    assert len(held_out) == 256
