"""What a bare import and a light command load of the packages that take long to import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "accelerate", "bitsandbytes", "deepspeed", "diffusers", "diffusers.pipelines", "fastapi", "lightning", "matplotlib",
    "onnxruntime", "pandas", "peft", "rapidocr", "scipy", "sklearn", "tensorboard", "tensorflow", "torch", "torchao",
    "torch._dynamo", "torchaudio", "torchmetrics", "torchvision", "transformers",
}  # fmt: skip

LIGHTNINGS = {
    "lightning",
    "torch",
    "torch._dynamo",  # lightning.fabric.wrappers
    "torchmetrics",  # lightning.fabric.utilities.imports asks for its version, and gets that by importing it
    "matplotlib",  # torchmetrics.utilities.plot
    "scipy",  # torchmetrics.functional.audio
    "transformers",  # torchmetrics.functional.text.bert
}
"""What `import lightning.pytorch` loads, whoever imports it, and why."""
OURS = {
    "diffusers",  # lightning_fdfo.flows: which classes a pipeline has; no pipeline itself
    "peft",  # lightning_fdfo.flows.lora
    "accelerate",  # peft
}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import lightning_fdfo", set()),
        ("from lightning_fdfo import Reward", {"torch"}),
        ("from lightning_fdfo.__main__ import main; main(['rewards'])", {"torch"}),
        ("import lightning_fdfo.commands.cli", LIGHTNINGS | OURS),
    ],
    ids=["package", "Reward", "rewards", "cli"],
)
def test_only_what_is_needed_is_loaded(code, expected):
    script = f"import sys\ntry:\n    {code}\nfinally:\n    print(*({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert set(done.stdout.splitlines()[-1].split()) == expected
