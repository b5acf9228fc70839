"""The parts of a Stable Diffusion pipeline: from a source in full precision, into a folder, and out of it again."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fbl_flower.errors import GeneratorError
from fbl_flower.generation.quantization import BITS, load_quantized, quantize_, save_quantized

FLOAT_WEIGHTS = "model.safetensors"  # of a component that is not quantised
FLOAT_LAYERS = ("conv_in", "conv_out")  # of a quantised UNet: they see the image, and cost the most quality
DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}
_CONFIG = "config.json"


def class_of(name: str) -> Any:
    """Return the class of a component by its name, from the library that has it.

    Raises:
        GeneratorError: Neither library has it, or it is no model, tokenizer or scheduler.
    """
    import diffusers
    import transformers

    if name in ("CLIPTextModel", "CLIPTokenizer"):
        return getattr(transformers, name)
    found = getattr(diffusers, name, None)
    kinds = (diffusers.ModelMixin, diffusers.SchedulerMixin)
    if not (isinstance(found, type) and issubclass(found, kinds)):
        raise GeneratorError(f"generator: the class {name} is no model and no scheduler of diffusers {diffusers.__version__}")
    return found


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Leave out what the hub's client says of each retry, and its advice: what failed in the end is an error of ours."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="huggingface_hub")
            yield
    finally:
        logger.setLevel(before)


def read_source(
    source: str, component: str | None, class_name: str, *, revision: str | None = None, dtype: torch.dtype | None = None
) -> Any:
    """Load one component in full precision.

    Args:
        source: Name on the hub, or directory.
        component: Its folder in the source; None: the source itself.
        class_name: As `class_of` takes it.
        revision: Commit, branch or tag on the hub.
        dtype: What its weights are cast to; None for a tokenizer or a scheduler, which have none.

    Raises:
        GeneratorError: It is missing, damaged, of another class, holds pickled weights only, or lacks some weights.
    """
    cls, where = class_of(class_name), f"{source}/{component}" if component else source
    arguments: dict[str, Any] = {"revision": revision}
    if component:
        arguments["subfolder"] = component
    try:
        with quiet_hub():
            if dtype is None:
                return cls.from_pretrained(source, **arguments)
            if issubclass(cls, _diffusers_model()):
                arguments["torch_dtype"] = dtype
            model, report = cls.from_pretrained(source, **arguments, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # both libraries and the hub's client raise whatever they like
        raise GeneratorError(
            f"quantize: {where} cannot be loaded as {class_name} from safetensors ({_short(error)})"
            + ("" if Path(source).is_dir() else "; there is no such model, no access, or no network")
            + "; correct the source, or download it and give the directory"
        ) from error
    if missing := sorted(report["missing_keys"]):  # both libraries would leave them at random, with a warning
        raise GeneratorError(
            f"quantize: {where} lacks {len(missing)} weights of its own configuration, such as {missing[0]}; download it again"
        )
    return nn.Module.to(model, dtype).eval().requires_grad_(False)


def save_component(model: Any, folder: Path, *, weights: str = "none", float_layers: tuple[str, ...] = ()) -> None:
    """Write a model's configuration and weights into `folder`, which is made; with 4bit or 8bit it is quantised in place."""
    from safetensors.torch import save_file

    folder.mkdir()
    if weights == "none":
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
            folder / FLOAT_WEIGHTS,
            metadata={"format": "pt"},
        )
    else:
        save_quantized(quantize_(model, weights=BITS[weights], exclude=float_layers), folder)
    if hasattr(model, "save_config"):  # a model of diffusers: what its constructor does not take would only be warned of
        taken = inspect.signature(type(model).__init__).parameters
        config = {key: value for key, value in model.config.items() if key in taken}
        (folder / _CONFIG).write_text(json.dumps({"_class_name": type(model).__name__, **config}, indent=2), encoding="utf-8")
    else:
        model.config.to_json_file(folder / _CONFIG)


def load_component(class_name: str, folder: Path, *, weights: str = "none") -> nn.Module:
    """Load what `save_component` wrote, on the CPU; the float weights of a quantised model are never allocated.

    Raises:
        GeneratorError: A file is missing or damaged, or belongs to another network.
    """
    cls = class_of(class_name)
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GeneratorError(
            f"generator: {folder / _CONFIG} cannot be read ({error}); copy or make the generator again"
        ) from error

    def build() -> nn.Module:
        model: nn.Module = cls.from_config(config) if hasattr(cls, "from_config") else cls(cls.config_class.from_dict(config))
        return model

    return (_load_float if weights == "none" else load_quantized)(_guarded(build, folder), folder)


def num_parameters(model: nn.Module) -> int:
    """Return how many numbers the weights of `model` are; packed ones count each."""
    return sum(parameter.numel() for parameter in model.parameters())


def _load_float(build: Callable[[], nn.Module], folder: Path) -> nn.Module:
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / FLOAT_WEIGHTS
    try:
        state = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise GeneratorError(f"generator: {file} cannot be read ({error}); copy or make the generator again") from error
    with init_empty_weights(include_buffers=False):  # buffers that no file holds must be real
        model = build()
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise GeneratorError(
            f"generator: {file} does not fit the network beside it ({_short(error)}); copy or make the generator again"
        ) from error
    return model.eval().requires_grad_(False)


def _guarded(build: Callable[[], nn.Module], folder: Path) -> Callable[[], nn.Module]:
    """Name the file whose configuration gives no network."""

    def guarded() -> nn.Module:
        try:
            return build()
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, ZeroDivisionError) as error:
            raise GeneratorError(
                f"generator: {folder / _CONFIG} describes no network ({_short(error)}); copy or make the generator again"
            ) from error

    return guarded


def _diffusers_model() -> type:
    from diffusers import ModelMixin

    return ModelMixin


def _short(error: BaseException) -> str:
    """Return the first line of an error, after its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
