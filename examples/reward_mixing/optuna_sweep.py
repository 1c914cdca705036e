"""The weights as Optuna chooses them: legible and small, both as good as can be. Needs `pip install optuna`.

python examples/reward_mixing/optuna_sweep.py --trials 20
"""

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def trial_of(out: Path, options: list[str]) -> Any:
    """An objective for Optuna: trains with a trial's weights, and gives the share read and the kilobytes."""

    def objective(trial: Any) -> tuple[float, float]:
        folder = out / f"trial-{trial.number}"
        weights = {name: trial.suggest_float(name, 0.0, 1.0) for name in ("OCR", "small", "red")}
        moved = [f"--model.rewards.{name}.weight={weight}" for name, weight in weights.items()]
        configs = ["--config", "configs/quickstart.yaml", "--config", str(HERE / "study.yaml")]
        command = ["lightning-fdfo", "fit", *configs, *moved, f"--trainer.default_root_dir={folder}", *options]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(HERE)})
        after = json.loads((folder / "before_after.json").read_text(encoding="utf-8"))["after"]
        return after["exact_match"], -after["small"]

    return objective


def main() -> None:
    """Adds trials to a study that lies on disk, and prints those that no other beats in both."""
    import optuna

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/reward_mixing_optuna"))
    own, options = parser.parse_known_args()
    own.out.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name="reward_mixing",
        storage=f"sqlite:///{own.out / 'study.db'}",
        directions=["maximize", "minimize"],
        load_if_exists=True,
    )
    study.optimize(trial_of(own.out, options), n_trials=own.trials)
    for trial in study.best_trials:
        read, kilobytes = trial.values
        print(f"{read:.1%} read, {kilobytes:.2f} kB: {trial.params}")


if __name__ == "__main__":
    main()
