"""One frozen configuration tree, made from Flower's run config and validated once.

Every field below is a run-config key: `TrainConfig.learning_rate` is `train.learning-rate`. Its default here, its
default in `pyproject.toml` and its line in docs/configuration.md are the same; a test compares them.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any

from fbl_flower.deployment_options import PrepareConfig, TransportConfig
from fbl_flower.errors import ConfigError
from fbl_flower.method_options import (
    ClientsConfig,
    FedGenConfig,
    FedProxConfig,
    MethodConfig,
    MoonConfig,
    ScaffoldConfig,
    client_problems,
)
from fbl_flower.options import Value as Value
from fbl_flower.options import option

_PACKAGED = ("mnist5k", "digits")  # data sets that come with a package
_OWN = ("folder", "parquet")  # the user's own images
_NAMED = ("cifar10", "cifar100", "tiny-imagenet", "eurosat", "fashion-mnist")
DATA_NAMES = (*_PACKAGED, *_NAMED, *_OWN)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and who owns them."""

    name: str = option("mnist5k", "data set", choices=DATA_NAMES)
    path: str = option("", "file or folder of the data set; empty: as installed, or downloaded (see docs/data.md)")
    classes: str = option("", "names between commas, in the order of the labels; for folder and parquet")
    image_size: int = option(0, "height and width in pixels; 0: as the data set has it", low=0, high=1024)
    channels: int = option(0, "1: grey, 3: colour; 0: as the data set has it, and 3 for folder", low=0, high=3)
    num_test: int = option(-1, "test images, for the server; -1: the data set's own number", low=-1)
    num_public: int = option(-1, "public images, owned by no client; -1: the data set's own number", low=-1)
    num_validation: int = option(-1, "of the public images, those kept for tuning; -1: the data set's own number", low=-1)
    num_private: int = option(-1, "images of all clients together; -1: the data set's own number, or all that are left", low=-1)
    partition: str = option(
        "dirichlet",
        "what differs between clients: the mixture of classes, nothing, which classes they have, or their size",
        choices=("dirichlet", "iid", "classes", "quantity"),
    )
    alpha: float = option(0.1, "concentration of the partitions dirichlet and quantity: smaller is more skewed", above=0.0)
    classes_per_client: int = option(2, "classes of each client, in the partition classes", low=1)
    noise: float = option(0.0, "standard deviation of Gaussian noise on private images, whose pixels are 0 .. 1", low=0.0)
    wrong_labels: float = option(0.0, "share of private images that get the label of another class", low=0.0, high=1.0)
    evaluate_on: str = option(
        "test", "images that the accuracy is measured on; settings are tuned on validation", choices=("test", "validation")
    )

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names in `classes`, without the blanks around them; none where it is empty."""
        return tuple(name.strip() for name in self.classes.split(",")) if self.classes.strip() else ()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The classifier: features F, then a linear head H."""

    name: str = option("resnet18", "network; tiny is a small convolutional one for tests", choices=("resnet18", "tiny"))
    stem: str = option("imagenet", "first layers of ResNet-18: 7x7/2 and max-pool, or 3x3/1", choices=("imagenet", "32x32"))
    norm: str = option("group", "normalisation of ResNet-18", choices=("group", "batch"))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Local training on a client: stochastic gradient descent."""

    epochs: int = option(2, "passes over the client's balanced data in a round", low=1)
    batch_size: int = option(32, "images per step", low=1)
    learning_rate: float = option(0.05, "step size of the model", above=0.0)
    momentum: float = option(0.9, "momentum, from zero again in each round", low=0.0, high=0.999)
    weight_decay: float = option(0.0, "L2 penalty of the model's weights", low=0.0)
    clip_norm: float = option(5.0, "largest gradient norm of the model; 0: no clipping", low=0.0)
    augment: bool = option(True, "random shifts (and flips, for photographs), drawn anew for each batch")
    precision: str = option(
        "auto", "auto: bf16 where the machine has it in hardware, else fp32", choices=("auto", "fp32", "bf16")
    )


@dataclass(frozen=True, kw_only=True)
class BalancingConfig:
    """FBL. `enabled = false` is plain FedAvg; each part can be switched on its own."""

    enabled: bool = option(True, "balance each client's data before it trains")
    filling: bool = option(True, "knowledge filling: generate scarce and missing classes up to the balance point")
    max_filled_share: float = option(
        1.0,
        "largest share of a client's balanced set that may be synthetic; the rest is kept in real images",
        low=0.0,
        high=1.0,
    )
    filter: str = option(
        "none", "what leaves out implausible synthetic images, from round 2 on", choices=("none", "model", "neighbours")
    )
    filter_share: float = option(
        0.2,
        "share of a class's synthetic images that falls (model), or of real ones that would (neighbours)",
        low=0.0,
        high=1.0,
    )
    sampling: str = option(
        "loss", "knowledge sampling: which images of an excessive class stay", choices=("loss", "random", "none")
    )
    replay_period: int = option(5, "server rounds after which a client chooses its images anew; 0: never", low=0)
    replay_ratio: float = option(0.1, "gamma, the share of replayed images among the kept of a class", low=0.0, high=1.0)
    alignment: bool = option(True, "knowledge alignment: learn a vector per class that moves synthetic onto real features")
    drop: float = option(0.5, "knowledge drop: probability that a synthetic image loses its vector", low=0.0, high=1.0)
    embedding_learning_rate: float = option(0.05, "step size of the alignment vectors", low=0.0)
    average_embeddings: bool = option(
        False, "let the server average the alignment vectors; which of them moved tells it what a client lacks"
    )


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Where a client's synthetic images come from."""

    name: str = option(
        "diffusion",
        "class-conditional 4-bit diffusion, a quantised Stable Diffusion, or real public images in their place",
        choices=("diffusion", "text-to-image", "public-images"),
    )
    path: str = option(
        "", "directory of a generator; empty: the one that comes with the data set; text-to-image always needs a directory"
    )
    trained_on: str = option("", "data set that the generator was trained on; empty: the federation's own")
    steps: int = option(4, "denoising steps per image", low=1, high=1000)
    guidance: float = option(2.0, "classifier-free guidance; 1: none", low=1.0, high=20.0)
    batch_size: int = option(32, "images generated together; fewer where memory is short", low=1)
    memory_limit: int = option(0, "MiB for the images that are made together; 0: half of the free memory", low=0)
    time_budget: float = option(
        0.0,
        "seconds that a client may generate at its start; what is missing then is kept in real images; 0: no limit",
        low=0.0,
    )
    resolution: int = option(
        0, "text-to-image: height and width that the model makes, a multiple of 8; 0: what it was trained for", low=0, high=2048
    )
    scheduler: str = option(
        "auto",
        "text-to-image: how noise becomes an image; auto: the model's own way",
        choices=("auto", "dpm++", "unipc", "lcm", "euler", "euler-ancestral", "ddim"),
    )
    prompt: str = option(
        "", "text-to-image: prompt with {name} for the class, several separated by ' | '; empty: the data set's own"
    )
    image_to_image: bool = option(
        False, "text-to-image: start scarce classes from the client's own images; the results stay on the client"
    )
    strength: float = option(
        0.3, "text-to-image: how far such a start is turned to noise; small stays close to it", low=0.01, high=1.0
    )
    blur: float = option(
        0.0,
        "public-images: standard deviation, in pixels, of a Gaussian blur, for images of a worse domain",
        low=0.0,
        high=16.0,
    )
    noise: float = option(
        0.0, "public-images: standard deviation of Gaussian noise, after the blur; pixels are 0 .. 1", low=0.0, high=1.0
    )


@dataclass(frozen=True, kw_only=True)
class AggregationConfig:
    """FedAvg: the mean of the clients' models, weighted by their number of images."""

    weight_by: str = option("balanced", "count the balanced set or the client's real images", choices=("balanced", "real"))


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """Ours, for every method: the server first trains the initial model on images of the public generator."""

    enabled: bool = option(False, "start from a model trained on synthetic images")
    num_images: int = option(0, "synthetic images; 0: as many as the clients have real ones together", low=0)
    epochs: int = option(20, "passes over them", low=1)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    seed: int = option(0, "one number from which every random choice follows", low=0)
    num_server_rounds: int = option(5, "rounds of training", low=1)
    num_clients: int = option(10, "clients of the federation, spread over the nodes that connect", low=1)
    fraction_train: float = option(0.5, "share of the clients that train in a round", above=0.0, high=1.0)
    output_dir: str = option("~/.fbl/runs", "folder of the run directories, on the server")
    state_dir: str = option("~/.fbl", "folder for image cache and client state, on each client")
    resume: str = option(
        "",
        "run directory of a killed run to go on with; auto: the newest unfinished one in output-dir with these settings, if any",
    )
    checkpoint_every: int = option(5, "rounds between checkpoints; the last round always has one", low=1)
    pictures: bool = option(True, "draw the run's pictures at its end")
    timeout: float = option(3600.0, "seconds that the server waits for the clients in a round", above=0.0)
    num_threads: int = option(1, "torch's threads per client and for the server; part of what makes a run repeatable", low=1)
    device: str = option("auto", "auto: cuda where there is one", choices=("auto", "cpu", "cuda"))
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    balancing: BalancingConfig = field(default_factory=BalancingConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    fedprox: FedProxConfig = field(default_factory=FedProxConfig)
    moon: MoonConfig = field(default_factory=MoonConfig)
    scaffold: ScaffoldConfig = field(default_factory=ScaffoldConfig)
    fedgen: FedGenConfig = field(default_factory=FedGenConfig)
    clients: ClientsConfig = field(default_factory=ClientsConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of the configuration surface."""

    key: str
    default: Value
    help: str
    allowed: str


def surface() -> list[Setting]:
    """List every run-config key with its default, in the order of the tree."""
    return [
        Setting(key=key, default=f.default, help=f.metadata["help"], allowed=_allowed(kind, f.metadata))
        for key, (f, kind) in _leaves(RunConfig).items()
    ]


def parse_config(run_config: Mapping[str, Value], *, found: Sequence[str] = ()) -> RunConfig:
    """Turn Flower's flat run config into a validated `RunConfig`; keys left out take their defaults.

    Args:
        run_config: Settings by key.
        found: Problems that a caller found already, to be reported first and together with these.

    Raises:
        ConfigError: Lists every unknown key, wrong type and value out of range at once.
    """
    leaves = _leaves(RunConfig)
    problems = list(found)
    values: dict[str, Value] = {}
    for key, value in run_config.items():
        if key not in leaves:
            near = difflib.get_close_matches(key, leaves, n=1)
            problems.append(f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else ""))
            continue
        f, kind = leaves[key]
        try:
            values[key] = _checked(key, value, kind, f.metadata)
        except ValueError as problem:
            problems.append(str(problem))
    config = _build(RunConfig, values)
    refused = run_config.keys() - values.keys()
    problems += [text for keys, text in _conflicts(config) if not refused & set(keys)]
    if problems:
        raise ConfigError(problems)
    return config


def flatten(config: RunConfig) -> dict[str, Value]:
    """Turn a `RunConfig` back into flat run-config keys; `parse_config(flatten(c)) == c`."""
    flat: dict[str, Value] = {}

    def walk(node: Any, prefix: str) -> None:
        for f in fields(node):
            value, key = getattr(node, f.name), prefix + f.name.replace("_", "-")
            if is_dataclass(value):
                walk(value, key + ".")
            else:
                flat[key] = value

    walk(config, "")
    return flat


def _conflicts(config: RunConfig) -> list[tuple[tuple[str, ...], str]]:
    """Name the settings that are fine alone and wrong together, each problem with the keys that it is about."""
    d, b, g = config.data, config.balancing, config.generator
    found: list[tuple[tuple[str, ...], str]] = []
    if d.name in (*_OWN, "tiny-imagenet") and not d.path:
        text = f"data.path: empty; the data set {d.name!r} needs the path of its images (see docs/data.md)"
        found.append((("data.name", "data.path"), text))
    if d.name in _PACKAGED and d.path:
        text = f"data.path: got {d.path!r}; the data set {d.name!r} comes with a package and takes no path"
        found.append((("data.name", "data.path"), text))
    if d.name not in _OWN and d.class_names:
        text = f"data.classes: got {d.classes!r}; the data set {d.name!r} has its own; allowed with {' | '.join(_OWN)}"
        found.append((("data.name", "data.classes"), text))
    if "" in d.class_names or len(set(d.class_names)) < len(d.class_names):
        text = f"data.classes: got {d.classes!r}; allowed: names between commas, none empty and none twice"
        found.append((("data.classes",), text))
    if d.channels == 2:
        found.append((("data.channels",), "data.channels: got 2; allowed: 0 | 1 | 3"))
    if d.num_public >= 0 and d.num_validation > d.num_public:
        text = f"data.num-validation: got {d.num_validation}; it is a part of data.num-public, which is {d.num_public}"
        found.append((("data.num-validation", "data.num-public"), text))
    if b.average_embeddings and not b.alignment:
        text = "balancing.average-embeddings: true, but balancing.alignment is false: there are no vectors to average"
        found.append((("balancing.average-embeddings", "balancing.alignment"), text))
    if b.filter != "none" and (b.replay_period == 0 or not b.filling):
        text = (
            f"balancing.filter: {b.filter!r} works at replays, on synthetic images: balancing.replay-period >= 1, and filling"
        )
        found.append((("balancing.filter", "balancing.replay-period", "balancing.filling"), text))
    if g.name == "text-to-image" and not g.path:
        text = "generator.path: empty; text-to-image needs the directory that `fbl-flower generator quantize` made"
        found.append((("generator.name", "generator.path"), text))
    if g.resolution % 8:
        found.append((("generator.resolution",), f"generator.resolution: got {g.resolution}; allowed: 0, or a multiple of 8"))
    if g.image_to_image and g.name != "text-to-image":
        text = f"generator.image-to-image: true, but generator.name is {g.name!r}; only text-to-image can start from images"
        found.append((("generator.image-to-image", "generator.name"), text))
    for key, value in (("generator.blur", g.blur), ("generator.noise", g.noise)):
        if value and g.name != "public-images":
            text = f"{key}: got {value}; only public-images are degraded, and generator.name is {g.name!r}"
            found.append(((key, "generator.name"), text))
    return found + client_problems(config.clients, balancing=b.enabled)


def flat_table(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested tables into dotted keys, as Flower does."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flat_table(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def to_toml(values: Mapping[str, Value]) -> str:
    """Write flat settings as TOML, one `key = value` a line; Flower reads it with `flwr run -c FILE`."""
    return "".join(f"{key} = {_toml_value(value)}\n" for key, value in values.items())


def _toml_value(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's, but for this one
    return repr(value)


@functools.cache
def _leaves(cls: type, prefix: str = "") -> dict[str, tuple[Any, type]]:
    """Map every flat key to its dataclass field and type."""
    hints = typing.get_type_hints(cls)
    out: dict[str, tuple[Any, type]] = {}
    for f in fields(cls):
        key, kind = prefix + f.name.replace("_", "-"), hints[f.name]
        if isinstance(kind, type) and is_dataclass(kind):
            out |= _leaves(kind, key + ".")
        else:
            out[key] = (f, kind)
    return out


def _checked(key: str, value: Any, kind: type, meta: types.MappingProxyType[Any, Any]) -> Value:
    right_type = isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value, right_type = float(value) if abs(value) < 2**1000 else math.inf, True
    in_range = right_type and (kind in (bool, str) or (meta["low"] <= value <= meta["high"] and value > meta["above"]))
    if right_type and kind is float and not math.isfinite(value):
        in_range = False
    if meta["choices"] and value not in meta["choices"]:
        in_range = False
    if not (right_type and in_range):
        raise ValueError(f"{key}: got {value!r} ({type(value).__name__}); allowed: {_allowed(kind, meta)}")
    return value


def _allowed(kind: type, meta: types.MappingProxyType[Any, Any]) -> str:
    if meta["choices"]:
        return " | ".join(meta["choices"])
    if kind is bool:
        return "true | false"
    if kind is str:
        return "text"
    noun = "whole number" if kind is int else "number"
    bounds = [f"> {meta['above']:g}"] if meta["above"] > -math.inf else []
    bounds += [f">= {meta['low']:g}"] if meta["low"] > -math.inf else []
    bounds += [f"<= {meta['high']:g}"] if meta["high"] < math.inf else []
    return f"{noun} {' and '.join(bounds)}".strip()


def _build(cls: type, values: Mapping[str, Value], prefix: str = "") -> Any:
    arguments: dict[str, Any] = {}
    for f in fields(cls):
        key = prefix + f.name.replace("_", "-")
        if f.default is MISSING:  # a section: its default is made by its own class
            section: Any = f.default_factory
            arguments[f.name] = _build(section, values, key + ".")
        else:
            arguments[f.name] = values.get(key, f.default)
    return cls(**arguments)
