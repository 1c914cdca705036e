"""One, two processes, sharded or not: the same run, stopped and gone on with on any of them. On the CPU, by gloo."""

from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.parallel import check_strategy
from tests import processes

ROOT = Path(__file__).parents[2]
EPOCHS = 3
WAYS = {
    "one": ["--model.batching.batch_size=8"],  # two batches an update, as in each of the others: 7 is an upper bound
    "ddp": ["--model.batching.batch_size=7", "--config", "configs/ddp.yaml", "--trainer.devices=2"],
    "fsdp2": ["--model.batching.batch_size=4", "--config", "configs/fsdp2.yaml", "--trainer.devices=2"],
}


class Record(Callback):
    """Writes what each process has rolled out, epoch by epoch."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_rollout_end(self, trainer, pl_module, rollout, scores):
        self.folder.mkdir(parents=True, exist_ok=True)
        points = rollout.points
        order = (2 * points.chosen[..., 1] + points.chosen[..., 0]).argsort(dim=1)
        starts = [each[order[pair, :2]] for pair, each in enumerate(points.latents)]
        kept = {
            "pairs": list(rollout.pairs),
            "start": torch.cat(starts),
            "end": points.ends,
            "scores": {name: one.values for name, one in rollout.scores.items()},
            "texts": next(iter(rollout.conditioning.tensors.values())).sum(dim=(1, 2)),
            "bytes": points.latents.nbytes + points.velocities.nbytes,
        }
        torch.save(kept, self.folder / f"{pl_module.current_epoch}-{trainer.global_rank}.pt")

    def on_validation_end(self, trainer, pl_module):
        self.folder.mkdir(parents=True, exist_ok=True)
        scores = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        torch.save(scores, self.folder / f"val-{trainer.global_rank}.pt")


def overlay(folder, lora):
    config = {
        "model": {
            "rewards": {"Colorfulness": {"reward": "Colorfulness", "weight": 0.1, "scale": "std"}},
            "evaluation": {"metrics": None},
            "sampling": {"num_steps": 2},
            "batching": {"num_pairs": 4, "num_points_per_pair": None, "rollout_batch_size": 1},
            "lora": {"rank": 4, "alpha": 4},
            # Not Adam, which steps by a gradient's sign, however small: rounding would be as large as any step.
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0, "momentum": 0.9}},
        },
        "data": {"val": str(folder / "val.txt"), "val_batch_size": 2},
        "trainer": {
            "max_epochs": EPOCHS,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": EPOCHS,
            "enable_progress_bar": False,
            "logger": False,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {
                        "dirpath": "${trainer.default_root_dir}/checkpoints",
                        "filename": "{epoch}",
                        "every_n_epochs": 1,  # the shipped one keeps every tenth
                        "save_on_train_epoch_end": True,
                        "save_top_k": -1,
                        "enable_version_counter": False,
                    },
                },
                {"class_path": "lightning_fdfo.callbacks.EMA", "init_args": {"decay": 0.5}},
                {"class_path": "lightning_fdfo.callbacks.LoRAExport"},
                {"class_path": "tests.runs.test_parallel.Record", "init_args": {"folder": str(folder / "rollouts")}},
            ],
        },
    }
    if not lora:
        config["trainer"]["callbacks"] = [c for c in config["trainer"]["callbacks"] if "LoRA" not in c["class_path"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "val.txt").write_text("".join(f'"{number}" in red\n' for number in (1, 22, 333, 4444, 55)))
    path = folder / "overlay.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def fit(folder, way, *more, lora=True):
    arguments = ["--config", "configs/quickstart.yaml", "--config", str(overlay(folder, lora)), *WAYS[way], *more]
    processes.run_checked(
        ["fit", *arguments, f"--trainer.default_root_dir={folder / 'run'}"], devices=1 if way == "one" else 2
    )
    return folder


def checkpoint(folder, name="last"):
    return torch.load(folder / f"run/checkpoints/{name}.ckpt", weights_only=True)


def rollouts(folder, epoch):
    """Of all processes, joined."""
    parts = [torch.load(path, weights_only=True) for path in sorted((folder / "rollouts").glob(f"{epoch}-*.pt"))]
    joined = {name: torch.cat([part[name] for part in parts]) for name in ("start", "end", "texts")}
    scores = {name: torch.cat([part["scores"][name] for part in parts]) for name in parts[0]["scores"]}
    return joined | scores | {"pairs": [pair for part in parts for pair in part["pairs"]]}


def flat(value, prefix=""):
    """Every tensor and number of a checkpoint, by its path."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from flat(item, f"{prefix}.{name}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from flat(item, f"{prefix}.{index}")
    elif isinstance(value, torch.Tensor | int | float):
        yield prefix, torch.as_tensor(value)


def trained(saved):
    """What a run depends on when it goes on: weights, optimiser, scales, average, steps."""
    average = next(state for name, state in saved["callbacks"].items() if name.startswith("EMA"))
    steps = {"epoch": saved["epoch"], "step": saved["global_step"]}
    kept = {
        "weights": saved["state_dict"],
        "optimiser": saved["optimizer_states"],
        "scales": saved["reward_scales"],
        "average": average,
    }
    return dict(flat(kept | steps))


@pytest.fixture(scope="module", params=list(WAYS))
def way(request):
    return request.param


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each way's undisturbed run, made when it is first asked for."""
    made = {}

    def run(way):
        if way not in made:
            made[way] = fit(tmp_path_factory.mktemp(way), way)
        return made[way]

    return run


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_roll_out_what_one_does(runs, way):
    one, two = runs("one"), runs(way)
    for epoch in range(EPOCHS):
        ours, theirs = rollouts(one, epoch), rollouts(two, epoch)
        assert ours["pairs"] == theirs["pairs"] == [0, 1, 2, 3]
        assert torch.equal(ours["start"], theirs["start"]), "latents and noise are functions of seed, epoch and pair"
        torch.testing.assert_close(ours["texts"], theirs["texts"], rtol=1e-5, atol=1e-5)
        for name in ("end", "Colorfulness"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(runs, way):
    one, two = checkpoint(runs("one")), checkpoint(runs(way))
    assert one["global_step"] == two["global_step"] == EPOCHS
    moved = checkpoint(runs("one"), "epoch=0")["state_dict"]
    assert max((one["state_dict"][name] - value).abs().max() for name, value in moved.items()) > 1e-3
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=0, atol=1e-5)
    average = [next(s for n, s in saved["callbacks"].items() if n.startswith("EMA"))["average"] for saved in (one, two)]
    for name, value in average[0].items():
        torch.testing.assert_close(average[1][name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_validation_counts_each_prompt_once(runs, way):
    """Five prompts on two processes: the second paints one twice."""
    one, two, other = (torch.load(runs(w) / f"rollouts/val-{rank}.pt") for w, rank in (("one", 0), (way, 0), (way, 1)))
    assert set(one) == {"val/reward", "val/Colorfulness"}
    assert two == other == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_the_exported_loras_are_the_same(runs, way):
    one, two = (load_file(runs(w) / "run/lora/pytorch_lora_weights.safetensors") for w in ("one", way))
    assert set(one) == set(two)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_a_process_holds_its_share_of_a_rollout(runs, way):
    (one,) = (torch.load(path)["bytes"] for path in (runs("one") / "rollouts").glob("0-*.pt"))
    two = [torch.load(path)["bytes"] for path in (runs(way) / "rollouts").glob("0-*.pt")]
    assert two == [one / 2, one / 2]


def test_a_run_that_stops_goes_on_to_the_bit(runs, way, tmp_path):
    fit(tmp_path, way, "--trainer.max_epochs=2")
    fit(tmp_path, way, "--ckpt_path=last")
    whole, resumed = trained(checkpoint(runs(way))), trained(checkpoint(tmp_path))
    assert set(whole) == set(resumed)
    differing = [name for name, value in whole.items() if not torch.equal(value, resumed[name])]
    assert differing == []


@pytest.mark.parametrize("other", ["ddp", "one"])
def test_a_run_goes_on_on_another_number_of_devices(runs, tmp_path, other):
    fit(tmp_path, "fsdp2", "--trainer.max_epochs=2")
    fit(tmp_path, other, f"--ckpt_path={tmp_path / 'run/checkpoints/last.ckpt'}")
    whole, resumed = checkpoint(runs("one")), checkpoint(tmp_path)
    assert resumed["global_step"] == EPOCHS
    for name, value in whole["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], value, rtol=0, atol=1e-5)


WHOLE = ["--model.lora=null", "--trainer.max_epochs=1", "--model.optimizer.init_args.lr=1e-3"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("training", ["lora", "all"])
def test_each_way_trains_each_thing_in_each_precision(tmp_path, training, precision):
    more = [f"--trainer.precision={precision}", *(["--trainer.max_epochs=1"] if training == "lora" else WHOLE)]
    if precision == "bf16-mixed" and training == "lora":
        more.append("--model.flow.init_args.dtype=bfloat16")
    trained = {}
    for way in WAYS:
        folder = fit(tmp_path / way, way, *more, lora=training == "lora")
        trained[way] = checkpoint(folder)["state_dict"]
    tolerance = 1e-5 if precision == "32-true" else 2e-2
    for way in ("ddp", "fsdp2"):
        assert set(trained[way]) == set(trained["one"])
        for name, value in trained["one"].items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(trained[way][name], value, rtol=0, atol=tolerance)


def test_fsdp1_is_refused_and_the_overlay_named():
    with pytest.raises(ConfigurationError, match=r"FSDP1 .* add configs/fsdp2.yaml after"):
        check_strategy(FSDPStrategy.__new__(FSDPStrategy))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_parallel_size": 2, "tensor_parallel_size": 1}, "save_distributed_checkpoint: false"),
        ({"save_distributed_checkpoint": False}, "data_parallel_size: the number of devices"),
        (
            {"data_parallel_size": 1, "tensor_parallel_size": 2, "save_distributed_checkpoint": False},
            "tensor_parallel_size: 1",
        ),
    ],
)
def test_a_mesh_that_cannot_work_is_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        check_strategy(ModelParallelStrategy(**options))


@pytest.mark.parametrize("name", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_processes_that_copy_this_one_are_refused(name):
    trainer = Trainer(accelerator="cpu", devices=2, strategy=name, logger=False, max_epochs=1)
    with pytest.raises(ConfigurationError, match=r"add configs/ddp\.yaml after"):
        check_strategy(trainer.strategy)


def test_deepspeed_is_refused():
    with pytest.raises(ConfigurationError, match="DeepSpeed accumulates and clips by a configuration of its own"):
        check_strategy(DeepSpeedStrategy.__new__(DeepSpeedStrategy))


def test_other_strategies_pass():
    check_strategy(Trainer(accelerator="cpu", devices=1, logger=False, barebones=False).strategy)
    check_strategy(
        ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    )
