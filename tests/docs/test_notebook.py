"""Training in a Jupyter notebook, where Lightning's bar is rich's live one."""

from pathlib import Path

import nbclient
import nbformat

ROOT = Path(__file__).parents[2]
CELL = """
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import {bar}
from lightning_fdfo import Batching, FDFOModule, PromptDataModule, Sampling
from lightning_fdfo.flows import StableDiffusion3

flow = StableDiffusion3("tiny-digits", max_sequence_length=0)
sampling = Sampling(num_steps=2, height=32, width=64, churn=0.05)
batching = Batching(num_pairs=4, updates_per_epoch=1, batch_size=4, rollout_batch_size=2)
module = FDFOModule(flow, {{"JPEGSize": 1.0}}, sampling, batching)
data = PromptDataModule("{root}/configs/prompts/digits_train.txt")
trainer = Trainer(max_epochs=2, accelerator="cpu", logger=False, callbacks=[{bar}()], default_root_dir="{bar}")
trainer.fit(module, data)
trainer.global_step
"""


def test_fit_runs_under_each_bar(tmp_path):
    bars = ("RichProgressBar", "TQDMProgressBar")
    cells = [nbformat.v4.new_code_cell(CELL.format(bar=bar, root=ROOT)) for bar in bars]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert [cell.outputs[-1]["data"]["text/plain"] for cell in notebook.cells] == ["2", "2"]
