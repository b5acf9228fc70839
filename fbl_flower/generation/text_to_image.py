"""The text-to-image generator: a prompt for the class, noise from the image's seed, a quantised Stable Diffusion."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fbl_flower.config import GeneratorConfig
from fbl_flower.device import return_freed_memory
from fbl_flower.errors import GeneratorError
from fbl_flower.generation.components import DTYPE, load_component, num_parameters
from fbl_flower.generation.memory import Batches, activation_bytes, fitting_batch
from fbl_flower.generation.prompts import Prompts
from fbl_flower.generation.protocol import check_request
from fbl_flower.generation.quantization import dequantize_
from fbl_flower.generation.schedulers import check_steps, make_scheduler, read_scheduler
from fbl_flower.generation.text_to_image_recipe import WAY_OUT, PipelineInfo, check_pipeline_files, read_pipeline_info
from fbl_flower.seeding import NOISE, derive, torch_generator

_SMALL = 50_000_000  # weights up to which a float twin is worth its memory: it is faster on a CPU
_BLANK = 2 / 255  # an image whose channels all vary less than this, in 0 .. 1, shows nothing
_log = logging.getLogger("fbl_flower.generation")  # not Flower's logger, whose lines may reach the server


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the images are for.

    Attributes:
        prompts: Of each class.
        image_size: Height and width that the classifier sees, in pixels.
        channels: 1 (grey) or 3 (RGB).
    """

    prompts: Prompts
    image_size: int
    channels: int


class TextToImageGenerator:
    """Made by `TextToImageGenerator.load`.

    The models themselves are loaded when the first image is made: who finds all images on disk, as a client of a deployment does in a
    new process for every round, needs no gigabytes of them.

    The model always runs on whole batches, because the shape of a batch changes the rounding of its images: a short last
    batch is filled up, and what was filled in is thrown away.

    An image that comes out blank or not finite is made once more, from a seed derived of its own; whatever comes then is kept,
    and counted if it is blank again.

    Attributes:
        info: The contents of the folder's `recipe.json`.
        num_blank: Images since loading that were blank twice.
        fingerprint, batch_size: As `ImageGenerator` has them.
        image_fingerprint: As `ImageToImage` has it.
    """

    def __init__(
        self,
        load_components: Callable[[], Mapping[str, Any]],
        own_scheduler: Mapping[str, Any],
        info: PipelineInfo,
        target: Target,
        settings: GeneratorConfig,
        *,
        device: str,
    ) -> None:
        self.info = info
        self.num_blank = 0
        self._load_components = load_components
        self._loaded: Mapping[str, Any] = {}
        self._loading = threading.Lock()
        self._own_scheduler = own_scheduler
        self._target = target
        self._settings = settings
        self._resolution = settings.resolution or info.resolution
        self._device = torch.device(device)
        self._dtype = DTYPE[info.dtype]
        self._sizes = Batches(
            lambda: fitting_batch(
                settings.batch_size,
                bytes_per_image=self._bytes_per_image,
                limit_mb=settings.memory_limit,
                device=self._device,
            )
        )
        self._tokenizing = threading.Lock()  # the tokenizer's padding is a setting of the shared object
        # Of n steps only the share `strength` is made when an image is the start; one at least must remain.
        self._image_steps = next(n for n in range(settings.steps, settings.steps + 200) if int(n * settings.strength) >= 1)
        check_steps(self._scheduler(), max(settings.steps, self._image_steps if settings.image_to_image else 0))
        decisive = {
            "files": dict(sorted(info.files.items())),
            "noise": NOISE,
            "scheduler": settings.scheduler,
            "steps": settings.steps,
            "guidance": float(settings.guidance),
            "batch_size": settings.batch_size,
            "resolution": self._resolution,
            "image": [target.channels, target.image_size],
            "prompts": [target.prompts.templates, target.prompts.names],
            "device": self._device.type,
            "threads": torch.get_num_threads(),  # rounding, and so pixels, may differ with these three
            "versions": [torch.__version__, *(importlib.metadata.version(name) for name in ("diffusers", "transformers"))],
        }
        self.fingerprint = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
        self.image_fingerprint = hashlib.sha256(f"{self.fingerprint}/{settings.strength!r}".encode()).hexdigest()

    @classmethod
    def load(cls, folder: Path, settings: GeneratorConfig, target: Target, *, device: str = "cpu") -> TextToImageGenerator:
        """Open a generator's folder, with every file's sum verified.

        Args:
            folder: As `quantize_pipeline` writes it.
            settings: Steps, guidance, scheduler, resolution, batch size, strength.
            target: Prompts and shape of the images.
            device: Where the model runs.

        Raises:
            GeneratorError: A file is missing, damaged or foreign, or the scheduler cannot make so many steps. (Whole files of models that do
                not fit them: with the first image.)
        """
        info = read_pipeline_info(folder)
        if problems := check_pipeline_files(folder, info):
            raise GeneratorError("\n".join(problems))
        own_scheduler = read_scheduler(folder / "scheduler", info.components["scheduler"])
        return cls(
            lambda: _read_components(folder, info, target.prompts, device), own_scheduler, info, target, settings, device=device
        )

    @property
    def _components(self) -> Mapping[str, Any]:
        with self._loading:
            self._loaded = self._loaded or self._load_components()
            return self._loaded

    @property
    def batch_size(self) -> int:
        return self._sizes.now()

    def _bytes_per_image(self) -> int:
        """Return what one evaluation of the UNet takes, or of the decoder if that is more; the two follow each other."""
        unet, vae = self._components["unet"], self._components["vae"]
        text = self._components["text_encoder"].config
        side = self._resolution // self.info.vae_scale
        x = torch.zeros(1, unet.config["in_channels"], side, side).to(self._device, self._dtype)
        states = torch.zeros(1, text.max_position_embeddings, text.hidden_size).to(self._device, self._dtype)
        in_unet = activation_bytes(unet, lambda: unet(x, 0, encoder_hidden_states=states))
        in_decoder = activation_bytes(vae, lambda: vae.decode(x))
        return max(in_decoder, in_unet if self._settings.guidance == 1 else 2 * in_unet)

    def generate(self, labels: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        """Return uint8 [M, C, H, W] on the CPU; see `ImageGenerator.generate`."""
        return self._generate(labels, seeds, None)

    def generate_from(self, labels: Sequence[int], seeds: Sequence[int], images: torch.Tensor) -> torch.Tensor:
        """Return uint8 [M, C, H, W] on the CPU; see `ImageToImage.generate_from`."""
        expected = (len(labels), self._target.channels, self._target.image_size, self._target.image_size)
        if images.dtype != torch.uint8 or tuple(images.shape) != expected:
            raise TypeError(f"images: got {images.dtype} {tuple(images.shape)}; wanted uint8 {list(expected)}")
        return self._generate(labels, seeds, images)

    def _generate(self, labels: Sequence[int], seeds: Sequence[int], sources: torch.Tensor | None) -> torch.Tensor:
        check_request(labels, seeds, num_classes=len(self._target.prompts.names))
        images, blank = self._batches(labels, seeds, sources)
        if again := torch.nonzero(blank).flatten().tolist():
            images[again], still = self._batches(
                [labels[place] for place in again],
                [derive(seeds[place], "again") for place in again],
                None if sources is None else sources[again],
            )
            if num_blank := int(still.sum()):
                self.num_blank += num_blank
                _log.warning(
                    "text-to-image: %d of %d images are blank, and were so twice; check generator.guidance and steps",
                    num_blank,
                    len(labels),
                )
        return images

    def _batches(
        self, labels: Sequence[int], seeds: Sequence[int], sources: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images, uint8 [M, C, H, W], and which of them are blank, bool [M]."""
        num, size = len(labels), self._target.image_size
        images = torch.empty(num, self._target.channels, size, size, dtype=torch.uint8)
        blank = torch.empty(num, dtype=torch.bool)

        def make(start: int, stop: int) -> None:
            chunk, used = slice(start, stop), stop - start
            padding = [0] * (self._sizes.size - used)
            given = None if sources is None else torch.cat([sources[chunk], sources[[start] * len(padding)]])
            pixels = self._batch([*labels[chunk], *padding], [*seeds[chunk], *padding], given)[:used].float().cpu()
            finite = pixels.isfinite().flatten(1).all(1)
            pixels = pixels.nan_to_num(0.0, 1.0, 0.0)
            blank[chunk] = ~finite | ((pixels.amax((2, 3)) - pixels.amin((2, 3))).amax(1) < _BLANK)
            images[chunk] = self._reduced(pixels)

        self._sizes.run(num, make)
        return images, blank

    @torch.no_grad()  # not inference_mode, which quanto's tensors refuse
    def _batch(self, labels: list[int], seeds: list[int], sources: torch.Tensor | None) -> torch.Tensor:
        """Make one whole batch: float [N, 3, resolution, resolution] in 0 .. 1."""
        from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

        # a pipeline of its own for each batch, because a scheduler counts steps and threads may share this generator
        cls: Any = StableDiffusionPipeline if sources is None else StableDiffusionImg2ImgPipeline
        pipeline: Any = cls(
            **self._components, scheduler=self._scheduler(), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        texts = [self._target.prompts.text(label, seed) for label, seed in zip(labels, seeds, strict=True)]
        with self._tokenizing:
            positive, negative = pipeline.encode_prompt(texts, self._device, 1, self._settings.guidance > 1)
        streams = [torch_generator(seed) for seed in seeds]
        arguments: dict[str, Any]
        if sources is None:
            side = self._resolution // self.info.vae_scale
            shape = (pipeline.unet.config.in_channels, side, side)
            noise = torch.stack([torch.randn(shape, generator=stream) for stream in streams])
            arguments = {
                "latents": noise.to(self._device, self._dtype),
                "height": self._resolution,
                "width": self._resolution,
                "num_inference_steps": self._settings.steps,
            }
        else:
            arguments = {
                "image": self._enlarged(sources),
                "strength": self._settings.strength,
                "num_inference_steps": self._image_steps,
            }
        images: torch.Tensor = pipeline(
            prompt_embeds=positive,
            negative_prompt_embeds=negative,
            guidance_scale=self._settings.guidance,
            generator=streams,
            output_type="pt",
            **arguments,
        ).images
        return images

    def _scheduler(self) -> Any:
        return make_scheduler(self._settings.scheduler, self.info.components["scheduler"], self._own_scheduler)

    def _reduced(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn float [N, 3, R, R] in 0 .. 1 into uint8 [N, C, H, W] of the data set's size."""
        size = (self._target.image_size,) * 2
        small = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
        if self._target.channels == 1:
            small = small.mean(1, keepdim=True)
        return (small.clamp(0, 1) * 255).round().to(torch.uint8)

    def _enlarged(self, images: torch.Tensor) -> torch.Tensor:
        """Turn uint8 [N, C, H, W] into float [N, 3, R, R] in 0 .. 1 of the model's size."""
        size = (self._resolution,) * 2
        large = F.interpolate(images.float() / 255, size=size, mode="bicubic", antialias=True, align_corners=False)
        return large.clamp(0, 1).expand(-1, 3, -1, -1)


def _read_components(folder: Path, info: PipelineInfo, prompts: Prompts, device: str) -> dict[str, Any]:
    """Read tokenizer and models; raise `GeneratorError` where a prompt is too long for them.

    On a CPU, models of more than 50 million weights stay quantised in memory; all others become float ones with the same values, once.
    """
    components: dict[str, Any] = {"tokenizer": _read_tokenizer(folder / "tokenizer")}
    _check_lengths(prompts, components["tokenizer"])
    for name in ("vae", "text_encoder", "unet"):
        weights = "none" if name == "vae" else info.weights
        try:
            model = load_component(info.components[name], folder / name, weights=weights)
        except GeneratorError as error:
            raise GeneratorError(f"{error}{_other_versions(info)}") from error
        # On an accelerator quanto's packed weights need kernels that it compiles at first use; floats need none.
        if weights != "none" and (num_parameters(model) <= _SMALL or device != "cpu"):
            dequantize_(model)
        components[name] = nn.Module.to(model, torch.device(device))
    return_freed_memory()
    return components


def _read_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers' library raises bare ones
        raise GeneratorError(f"generator: {folder} holds no tokenizer that can be read ({error}); {WAY_OUT}") from error


def _check_lengths(prompts: Prompts, tokenizer: Any) -> None:
    """Refuse a prompt of which the model would read only the beginning: what is cut off is often the class itself."""
    most = int(tokenizer.model_max_length)
    for text in (prompts.filled_in(template, name) for template in prompts.templates for name in prompts.names):
        if (length := len(tokenizer(text).input_ids)) > most:
            raise GeneratorError(
                f"generator.prompt, generator.class-words: {text!r} has {length} tokens, and the model reads {most}; shorten it",
                public=f"a prompt has {length} tokens, and the model reads {most}; shorten generator.prompt or generator.class-words",
            )


def _other_versions(info: PipelineInfo) -> str:
    """Say which libraries are not those that wrote the folder: they may name weights differently."""
    here = {name: importlib.metadata.version(name) for name in info.versions}
    others = [f"{name} {info.versions[name]} (here {here[name]})" for name in here if here[name] != info.versions[name]]
    return f"; it was written with {', '.join(others)}" if others else ""
