"""The command `lightning-fdfo export RUN_DIR`: a LoRA or a pipeline with a model card, in a folder or on the hub."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import diffusers
import transformers
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lightning_fdfo.commands.function_parser import run_function
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.export.model_card import model_card, shareable
from lightning_fdfo.export.trained import flow_of, write_lora, write_pipeline
from lightning_fdfo.files import atomic_folder
from lightning_fdfo.report.run_files import RunFiles

PICTURES = ("before.png", "after.png")


def main(arguments: Sequence[str]) -> None:
    """Runs `lightning-fdfo export …`; raises ConfigurationError for what the user can fix."""
    for library in (transformers, diffusers):
        library.logging.set_verbosity_error()
    run_function(export, "lightning-fdfo export", arguments)


def export(
    folder: Path,
    output: Path | None = None,
    ckpt_path: Path | None = None,
    merge: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
) -> None:
    """Puts what a run has trained into a folder, with a model card.

    Args:
        folder: of a run: its trainer.default_root_dir
        output: a new folder; default: export in that folder
        ckpt_path: a checkpoint of the run, in place of what it ended with
        merge: also the whole pipeline, with the LoRA merged into it
        push_to_hub: uploads it to owner/name, as whom `hf auth login` says
        private: makes the repository private, if it is new

    Raises:
        ConfigurationError: nobody is logged in, before any model is loaded; or see `write_export` and `push`.
    """
    if push_to_hub:
        check_login(push_to_hub)
    output = write_export(folder, output, ckpt_path, merge, push_to_hub)
    print(f"Written to {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    if push_to_hub:
        print(push(output, push_to_hub, private))


def write_export(
    run: Path,
    output: Path | None = None,
    checkpoint: Path | None = None,
    merge: bool = False,
    repository: str | None = None,
) -> Path:
    """Writes a run's export into a new folder, which is complete or not there.

    Args:
        run: the run's folder.
        output: None for `export` in it.
        checkpoint: None for what the run ended with.
        merge: also writes the whole pipeline, with the LoRA merged; full fine-tuning always does.
        repository: hub name from which the card's code loads.

    Returns:
        Where it is.

    Raises:
        ConfigurationError: no run, nothing trained, a folder in the way, a model that cannot be loaded.
    """
    files = RunFiles.read(run)
    folder = output or run / "export"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"{folder} is there already: remove it, or choose another --output")
    has_lora = (files.config.get("model") or {}).get("lora") is not None
    checkpoint = checkpoint if has_lora or checkpoint else run / "checkpoints" / "last.ckpt"
    if checkpoint is not None and not checkpoint.is_file():
        raise ConfigurationError(f"--ckpt_path: expected a checkpoint's file, {checkpoint} is not there")
    flow = flow_of(files.config)
    flow.validate()
    with atomic_folder(folder) as partial:
        if has_lora:
            write_lora(flow, run, files.config, checkpoint, partial)
        if merge or not has_lora:
            lora, target = (partial, partial / "pipeline") if has_lora else (None, partial)
            write_pipeline(flow_of(files.config), lora, checkpoint, target)
        pictures = [name for name in PICTURES if (run / name).is_file()]
        for name in pictures:
            shutil.copyfile(run / name, partial / name)
        config = yaml.safe_dump(shareable(files.config), sort_keys=False, allow_unicode=True)
        (partial / "config.yaml").write_text(config, encoding="utf-8")
        card = model_card(files, flow, repository, pictures, merged=merge)
        card.save(partial / "README.md")
    return folder


def check_login(repository: str) -> None:
    """Raises ConfigurationError unless the name can be one, and someone is logged in; before any model is loaded."""
    try:
        validate_repo_id(repository)
        HfApi().whoami()
    except HFValidationError as error:
        raise ConfigurationError(f"--push_to_hub: expected owner/name, got {repository}: {error}") from error
    except LocalTokenNotFoundError as error:
        raise ConfigurationError("--push_to_hub: nobody is logged in to the hub: run `hf auth login`") from error
    except (HfHubHTTPError, OSError) as error:
        raise ConfigurationError(f"--push_to_hub: the hub does not answer, or does not know you: {error}") from error


def push(folder: Path, repository: str, private: bool) -> str:
    """Uploads a folder, with the token of the user's own login; returns where it is."""
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Export of a lightning-fdfo run")
    except (HfHubHTTPError, OSError) as error:
        raise ConfigurationError(f"--push_to_hub: {repository} was not uploaded; {folder} holds it: {error}") from error
    return f"https://huggingface.co/{repository}"
