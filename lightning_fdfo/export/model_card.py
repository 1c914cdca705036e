"""The model card: what was trained, on what, for which rewards, what came of it, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, model_info
from huggingface_hub.errors import HfHubHTTPError
from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows import DiffusersFlow, resolve_pretrained
from lightning_fdfo.hub import is_hub_name
from lightning_fdfo.report.page import settings_of
from lightning_fdfo.report.run_files import RunFiles
from lightning_fdfo.reward.mix import RewardMix

PAPER = "arxiv:2603.12893"


def model_card(
    run: RunFiles, flow: DiffusersFlow, repository: str | None, pictures: list[str], merged: bool
) -> ModelCard:
    """The card of an exported folder.

    Args:
        run: the run's files.
        flow: the run's flow; it need not be loaded.
        repository: hub name under which it will be loaded; None for the folder itself.
        pictures: names of those that lie beside the card.
        merged: whether a whole pipeline lies in `pipeline/`.
    """
    base = base_name(run.config)
    on_hub = is_hub_name(base) and not Path(flow.pretrained).is_dir()
    has_lora = (run.config["model"].get("lora")) is not None
    data = ModelCardData(
        base_model=base if on_hub else None,
        license=base_licence(flow.pretrained),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "lightning-fdfo", PAPER, *(["lora"] if has_lora else [])],
    )
    environment = Environment(
        loader=PackageLoader("lightning_fdfo.export", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = cell
    environment.filters["number"] = lambda value: "" if value is None else f"{value:.4g}"
    content = environment.get_template("model_card.md").render(
        front=data.to_yaml(),
        name=(repository or run.folder.resolve().name).rpartition("/")[2],
        base=base,
        licence=data.license or "see the base model's",
        rewards=rewards_of(run.config),
        settings=settings_of(run.config),
        before_after=run.before_after,
        tests=list(run.tests.values())[-1:],
        pictures=pictures,
        code=loading_code(run.config, flow, repository, has_lora),
        merged=merged,
        has_lora=has_lora,
        epochs=max((epoch for points in run.history.values() for epoch, _ in points), default=None),
    )
    return ModelCard(content)


def base_name(config: Mapping[str, Any]) -> str:
    """What the configuration calls the base model; of a local folder its name alone."""
    pretrained = str(config["model"]["flow"]["init_args"]["pretrained"])
    return Path(pretrained).name if Path(pretrained).expanduser().is_absolute() else pretrained


def base_licence(pretrained: str) -> str | None:
    """The base model's licence, as its own card states it: in its folder, or on the hub if that can be reached."""
    card = Path(pretrained) / "README.md"
    if card.is_file():
        with suppress(ValueError, OSError, yaml.YAMLError):
            return ModelCard.load(card).data.license  # type: ignore[no-any-return]
    if Path(pretrained).is_dir() or not is_hub_name(pretrained):
        return None
    with suppress(HfHubHTTPError, OSError):
        found = model_info(pretrained, timeout=10).card_data
        return None if found is None else found.license
    return None


def rewards_of(config: Mapping[str, Any]) -> list[dict[str, str]]:
    """The mixture, a row per term: name, class, weight, scale, and the licence of what it loads."""
    terms = config["model"]["rewards"]
    try:
        mix = RewardMix(terms)
    except ConfigurationError:  # a plugin that is not installed here
        return [
            {"name": name, "reward": "", "weight": cell(term), "scale": "", "licence": ""}
            for name, term in terms.items()
        ]
    return [
        {
            "name": name,
            "reward": mix.rewards[name].name,
            "weight": str(term.weight),
            "scale": str(term.scale),
            "licence": ", ".join(f"{part.source} ({part.licence})" for part in mix.rewards[name].hub_files)
            or mix.rewards[name].packaged_weights
            or "none",
        }
        for name, term in mix.terms.items()
    ]


def loading_code(config: Mapping[str, Any], flow: DiffusersFlow, repository: str | None, has_lora: bool) -> str:
    """Python that generates an image with the export, in plain diffusers: from the hub, or in the export's folder."""
    sampling, pipeline = config["model"]["sampling"], flow.source.pipeline_class.__name__
    num_steps = (config["model"].get("evaluation") or {}).get("num_steps") or sampling["num_steps"]
    shipped = str(config["model"]["flow"]["init_args"]["pretrained"]) != resolve_pretrained(base_name(config))
    source = f"resolve_pretrained({base_name(config)!r})" if shipped else repr(base_name(config))
    absent = [f"{name}=None" for name in flow.source.absent_texts] if has_lora else []
    call = {
        "height": sampling["height"],
        "width": sampling["width"],
        "num_inference_steps": num_steps,
        **{
            name: value
            for name, value in flow.pipeline_call(sampling["guidance_scale"], None).items()
            if value is not None
        },
    }
    where = repr(repository or ".")
    loads = ", ".join([source if has_lora else where, *absent])
    arguments = ", ".join([repr(_prompt(config)), *(f"{name}={value!r}" for name, value in call.items())])
    lines = [
        f"from diffusers import {pipeline}",
        *(["from lightning_fdfo.flows import resolve_pretrained"] if shipped and has_lora else []),
        "",
        f"pipeline = {pipeline}.from_pretrained({loads})",
        *([f"pipeline.load_lora_weights({where})"] if has_lora else []),
        f"image = pipeline({arguments}).images[0]",
        'image.save("image.png")',
    ]
    return "\n".join(lines)


def _prompt(config: Mapping[str, Any]) -> str:
    """A prompt to try: the first one for validation, if its file is on this machine."""
    from lightning_fdfo.prompts import read_prompts

    with suppress(ConfigurationError, TypeError):
        return read_prompts(config["data"]["val"] or config["data"]["train"])[0].text
    return "a prompt"


def cell(value: Any) -> str:
    """Text for a Markdown table: on one line, without markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(str(value).split()))


def shareable(value: Any) -> Any:
    """A configuration without the machine's folders: of an absolute path the last name stays.

    Example:
        >>> shareable({"data": {"val": "/home/me/prompts.txt", "train": "prompts.txt"}})
        {'data': {'val': 'prompts.txt', 'train': 'prompts.txt'}}
    """
    if isinstance(value, Mapping):
        return {key: shareable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shareable(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value
