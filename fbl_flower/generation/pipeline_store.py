"""Make a text-to-image generator's folder, once, from a pipeline in full precision.

Clients load the folder and never the full-precision weights: with 4 bits, Stable Diffusion 1.5 has about a seventh of its
32-bit size. Components are loaded, quantised and written one after another, so that only one is in memory.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fbl_flower.device import return_freed_memory
from fbl_flower.errors import GeneratorError
from fbl_flower.generation.components import (
    DTYPE,
    FLOAT_LAYERS,
    class_of,
    num_parameters,
    quiet_hub,
    read_source,
    save_component,
)
from fbl_flower.generation.new_folder import new_folder, unwritable
from fbl_flower.generation.recipe import file_sha256
from fbl_flower.generation.text_to_image_recipe import COMPONENTS, DTYPES, WEIGHTS, PipelineInfo, write_pipeline_info

_LIBRARIES = ("torch", "diffusers", "transformers", "optimum-quanto")
AUTO = "auto"  # the tiny decoder below, where the pipeline has a full one
_TINY_DECODER = "madebyollin/taesd"  # for the latents of Stable Diffusion 1 and 2
_MORE_THAN_TEXT = ("num_class_embeds", "class_embed_type", "addition_embed_type", "encoder_hid_dim_type")
_IGNORED = {"safety_checker", "feature_extractor", "image_encoder"}  # parts of a pipeline that have no say in the pixels


def quantize_pipeline(
    source: str,
    out: Path,
    *,
    weights: str = "4bit",
    tiny_decoder: str = "",
    revision: str | None = None,
    dtype: str = "bf16",
    progress: Callable[[str], None] | None = None,
) -> PipelineInfo:
    """Write a generator's folder from a pipeline of the Stable Diffusion 1 and 2 families.

    Args:
        source: Name on the hub, or directory.
        out: The folder to make. It appears whole or not at all.
        weights: 4bit, 8bit or none, for UNet and text encoder. The autoencoder always stays in float.
        tiny_decoder: Hub name or directory of an AutoencoderTiny to store instead of the pipeline's own autoencoder: with a
            thirtieth of its weights, it decodes in an eighteenth of the operations. "auto": TAESD from the hub, unless the pipeline has a
            tiny one; empty: the pipeline's own.
        revision: Commit, branch or tag of the source on the hub.
        dtype: bf16 or fp32, of everything that is not quantised.
        progress: Is given a line of text for each component.

    Returns:
        What was written to `recipe.json`.

    Raises:
        GeneratorError: `out` is there already, the source is missing, of another architecture, or damaged, or the disk is full.
    """
    out = out.expanduser()
    for name, value, allowed in (("--weights", weights, WEIGHTS), ("--dtype", dtype, DTYPES)):
        if value not in allowed:
            raise GeneratorError(f"quantize: {name}: got {value!r}; allowed: {' | '.join(allowed)}")
    if out.exists():
        raise GeneratorError(f"quantize: {out} is there already; remove it, or choose another folder")
    source, tiny_decoder = _local(source), tiny_decoder if tiny_decoder == AUTO else _local(tiny_decoder)
    classes, commit = _read_index(source, revision)
    chosen_here = tiny_decoder == AUTO
    if chosen_here:
        tiny_decoder = _TINY_DECODER if classes["vae"] == "AutoencoderKL" else ""
    if tiny_decoder:
        classes["vae"] = "AutoencoderTiny"
    shape = _Shape()
    with new_folder(out) as folder:
        for component in ("scheduler", "tokenizer"):
            part = read_source(source, component, classes[component], revision=commit)
            shape.note(component, part, source)
            try:
                part.save_pretrained(folder / component)
            except Exception as error:  # the tokenizers' library raises bare ones
                raise unwritable(out, error) from error
        for component in ("vae", "text_encoder", "unet"):
            if progress:
                progress(f"{component}: {classes[component]}")
            tiny = component == "vae" and tiny_decoder
            try:
                model = read_source(
                    tiny_decoder if tiny else source,
                    None if tiny else component,
                    classes[component],
                    revision=None if tiny else commit,
                    dtype=DTYPE[dtype],
                )
            except GeneratorError as error:
                if tiny and chosen_here:
                    raise GeneratorError(f"{error}; or give --tiny-decoder DIR, or --full-decoder") from error
                raise
            shape.note(component, model, source)
            save_component(
                model,
                folder / component,
                weights="none" if component == "vae" else weights,
                float_layers=FLOAT_LAYERS if component == "unet" else (),
            )
            del model
            return_freed_memory()
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        info = PipelineInfo(
            source=_public_name(source),
            revision=commit or "",
            tiny_decoder=_public_name(tiny_decoder),
            components=classes,
            dtype=dtype,
            weights=weights,
            float_layers=FLOAT_LAYERS if weights != "none" else (),
            resolution=shape.latent_side * shape.vae_scale,
            vae_scale=shape.vae_scale,
            num_parameters=shape.num_parameters,
            versions={name: importlib.metadata.version(name) for name in _LIBRARIES},
            files={file.relative_to(folder).as_posix(): file_sha256(file) for file in files},
        )
        write_pipeline_info(folder, info)
    return info


class _Shape:
    """What the models of a pipeline must agree on, noted while each is in memory."""

    def __init__(self) -> None:
        self.num_parameters: dict[str, int] = {}
        self.latent_side = self.vae_scale = self._latent_channels = self._text_width = self._num_tokens = 0

    def note(self, component: str, model: Any, source: str) -> None:
        """Raise `GeneratorError` where a part does not fit those before it, or the UNet asks for what no text gives."""
        if component == "tokenizer":
            self._num_tokens = len(model)
        if component in ("scheduler", "tokenizer"):
            return
        self.num_parameters[component] = num_parameters(model)
        config = model.config
        problem = ""
        match component:
            case "vae":
                self._latent_channels = config.latent_channels
                self.vae_scale = 2 ** (len(config.block_out_channels) - 1)
            case "text_encoder":
                self._text_width = config.hidden_size
                if self._num_tokens > config.vocab_size:
                    raise GeneratorError(
                        f"quantize: the text encoder of {source} knows {config.vocab_size} tokens, and its tokenizer {self._num_tokens}; "
                        "give a whole pipeline"
                    )
            case _:
                self.latent_side = config.sample_size
                strange = [name for name in _MORE_THAN_TEXT if config.get(name) is not None]
                if strange:
                    problem = f"it needs more than a text ({', '.join(f'{name}: {config[name]}' for name in strange)})"
                elif not isinstance(config.sample_size, int):
                    problem = f"its sample_size is {config.sample_size}; wanted one number, for square images"
                elif config.in_channels != self._latent_channels or config.out_channels != self._latent_channels:
                    problem = f"it has {config.in_channels} latent channels, and the autoencoder {self._latent_channels}"
                elif config.cross_attention_dim != self._text_width:
                    problem = (
                        f"it reads texts of width {config.cross_attention_dim}, and the text encoder's have {self._text_width}"
                    )
        if problem:
            raise GeneratorError(f"quantize: the UNet of {source} does not fit: {problem}; give a plain text-to-image pipeline")


def _local(source: str) -> str:
    """Expand the path of a directory, and refuse what can be neither a directory nor a name on the hub."""
    path = Path(source).expanduser()
    if source and path.is_dir():
        return str(path)
    if source and (path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise GeneratorError(f"quantize: no directory at {source}; give a directory, or a name on the hub such as owner/model")
    return source


def _public_name(source: str) -> str:
    """Return what the folder may tell its readers: of a directory its name, for its path says more than they need."""
    return Path(source).resolve().name if source and Path(source).is_dir() else source


def _read_index(source: str, revision: str | None) -> tuple[dict[str, str], str | None]:
    """Return the class of each component, and the commit on the hub (None for a directory)."""
    from diffusers import DiffusionPipeline

    local = Path(source).is_dir()
    if local and revision:
        raise GeneratorError(f"quantize: --revision: got {revision!r}; the directory {source} has no revisions; leave it out")
    try:
        with quiet_hub():
            index, commit = DiffusionPipeline.load_config(source, revision=revision, return_commit_hash=True)
    except Exception as error:  # the hub's client raises many kinds
        if local:
            raise GeneratorError(
                f"quantize: {source} is no pipeline: its model_index.json is missing or damaged; give the directory of one"
            ) from error
        raise GeneratorError(
            f"quantize: {source} cannot be read from the hub ({type(error).__name__}): no such model, no access, or no network; "
            "correct the name, or download it where there is a network and give the local directory"
        ) from error
    if not isinstance(index, dict):
        raise GeneratorError(f"quantize: {source} is no pipeline: its model_index.json is no object; give the directory of one")
    parts = {
        name: value[1] for name, value in index.items() if isinstance(value, (list, tuple)) and len(value) == 2 and value[1]
    }
    problems = [f"{name}: missing" for name in COMPONENTS if name not in parts]
    problems += [f"{name}: {parts[name]}" for name in parts if name not in COMPONENTS and name not in _IGNORED]
    classes = {}
    for name, allowed in COMPONENTS.items():
        got = str(parts.get(name, "")).removesuffix("Fast") if name == "tokenizer" else str(parts.get(name, ""))
        classes[name] = got
        if got and allowed and got not in allowed:
            problems.append(f"{name}: {got}")
    if problems:
        wanted = ", ".join(f"{name}: {' or '.join(allowed)}" for name, allowed in COMPONENTS.items() if allowed)
        raise GeneratorError(
            f"quantize: {source} is {index.get('_class_name')}, which is not of the Stable Diffusion 1 and 2 families "
            f"({'; '.join(problems)}); wanted {wanted}, and a scheduler"
        )
    class_of(classes["scheduler"])
    return classes, None if local else commit or revision
