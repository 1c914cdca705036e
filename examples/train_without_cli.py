"""The quick start in plain Python: python examples/train_without_cli.py [FOLDER] [EPOCHS]."""

import sys
from functools import partial

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.optim import AdamW

from lightning_fdfo import Batching, Evaluation, FDFOModule, LoRA, Objective, PromptDataModule, Sampling
from lightning_fdfo.callbacks import BeforeAfter, Curves, LoRAExport
from lightning_fdfo.checkpoints.checkpoint_io import SafeCheckpointIO
from lightning_fdfo.flows import StableDiffusion3

folder, epochs = sys.argv[1] if len(sys.argv) > 1 else "runs/plain", int(sys.argv[2]) if len(sys.argv) > 2 else 100
module = FDFOModule(
    flow=StableDiffusion3("tiny-digits", max_sequence_length=0),
    rewards={"OCR": 1.0},
    sampling=Sampling(num_steps=10, height=32, width=64, churn=0.05),
    batching=Batching(num_pairs=48, updates_per_epoch=1, num_points_per_pair=4, batch_size=192, rollout_batch_size=48),
    objective=Objective(normalization="root_mean_square"),
    lora=LoRA(rank=32, alpha=64),
    optimizer=partial(AdamW, lr=1e-3, weight_decay=1e-4),
    evaluation=Evaluation({"exact_match": {"reward": {"class_path": "OCR", "init_args": {"score": "exact_match"}}}}),
)  # fmt: skip
kept = ModelCheckpoint(  # to go back to; fit itself writes checkpoints/last.ckpt at every epoch's end
    f"{folder}/checkpoints", "{epoch}", every_n_epochs=10, save_on_train_epoch_end=True, save_top_k=-1
)
trainer = Trainer(
    default_root_dir=folder, accelerator="cpu", max_epochs=epochs, gradient_clip_val=1.0, num_sanity_val_steps=-1,
    check_val_every_n_epoch=20, log_every_n_steps=1, enable_model_summary=False, plugins=[SafeCheckpointIO()],
    logger=[TensorBoardLogger(folder, name="", version=""), CSVLogger(folder, name="csv", flush_logs_every_n_steps=1)],
    callbacks=[kept, BeforeAfter(), Curves(), LoRAExport()],
)  # fmt: skip
trainer.fit(module, PromptDataModule("configs/prompts/digits_train.txt", "configs/prompts/digits_heldout.txt"))
