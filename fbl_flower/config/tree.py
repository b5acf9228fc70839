"""The whole tree of settings, and which of them contradict each other."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from fbl_flower.config.attack import AttackConfig, attack_problems, rule_problems
from fbl_flower.config.machines import PrepareConfig, TransportConfig
from fbl_flower.config.methods import (
    ClientsConfig,
    FedDynConfig,
    FedGenConfig,
    FedLCConfig,
    FedProxConfig,
    LogitAdjustmentConfig,
    MethodConfig,
    MoonConfig,
    ScaffoldConfig,
    client_problems,
    method_shares,
)
from fbl_flower.config.options import LARGEST_INT, option, shortened
from fbl_flower.config.privacy import PrivacyConfig, privacy_problems
from fbl_flower.config.sections import (
    AUTO,
    FEDERATED,
    OWN,
    OWN_IMAGES,
    PACKAGED,
    AggregationConfig,
    BalancingConfig,
    DataConfig,
    FederatedGeneratorConfig,
    GeneratorConfig,
    ModelConfig,
    TrainConfig,
    WarmStartConfig,
)
from fbl_flower.config.server import ServerConfig, ServerTuningConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    seed: int = option(0, "one number from which every random choice follows", low=0, high=LARGEST_INT)
    num_server_rounds: int = option(
        5, "rounds of training; 0: the clients only train a generator together", low=0, high=1_000_000
    )
    num_clients: int = option(10, "clients of the federation, spread over the nodes that connect", low=1, high=100_000)
    fraction_train: float = option(0.5, "share of the clients that train in a round", above=0.0, high=1.0)
    output_dir: str = option("~/.fbl/runs", "folder of the run directories, on the server", empty=False)
    state_dir: str = option("~/.fbl", "folder for image cache and client state, on each client", empty=False)
    resume: str = option(
        "",
        "run directory of a killed run to go on with; auto: the newest unfinished one in output-dir with these settings, if any",
    )
    checkpoint_every: int = option(5, "rounds between checkpoints; the last round always has one", low=1, high=1_000_000)
    pictures: bool = option(True, "draw the run's pictures at its end")
    timeout: float = option(3600.0, "seconds that the server waits for the clients in a round", above=0.0, high=1e8)
    num_threads: int = option(
        1, "torch's threads per client and for the server; part of what makes a run repeatable", low=1, high=1024
    )
    device: str = option("auto", "auto: cuda where there is one", choices=("auto", "cpu", "cuda"))
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    balancing: BalancingConfig = field(default_factory=BalancingConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    federated_generator: FederatedGeneratorConfig = field(default_factory=FederatedGeneratorConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    server_tuning: ServerTuningConfig = field(default_factory=ServerTuningConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    fedprox: FedProxConfig = field(default_factory=FedProxConfig)
    moon: MoonConfig = field(default_factory=MoonConfig)
    scaffold: ScaffoldConfig = field(default_factory=ScaffoldConfig)
    fedgen: FedGenConfig = field(default_factory=FedGenConfig)
    logit_adjustment: LogitAdjustmentConfig = field(default_factory=LogitAdjustmentConfig)
    fedlc: FedLCConfig = field(default_factory=FedLCConfig)
    feddyn: FedDynConfig = field(default_factory=FedDynConfig)
    clients: ClientsConfig = field(default_factory=ClientsConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)

    @property
    def server_generates(self) -> bool:
        """Whether the server needs a generator."""
        return self.warm_start.generates or self.server_tuning.generates

    @property
    def clients_fill(self) -> bool:
        """Whether clients that can generate need a generator."""
        return self.balancing.enabled and self.balancing.filling and self.generator.name != OWN_IMAGES


def rounded_up(share: float, number: int) -> int:
    """Return how many of `number` a share of them is, rounded up; 0.28 of 25 is 7, although 0.28 * 25 = 7.000000000000001."""
    return math.ceil(round(share * number, 9))


def conflicts(config: RunConfig) -> list[tuple[tuple[str, ...], str]]:
    """Name the settings that are fine alone and wrong together, each problem with the keys that it is about."""
    d, b, g = config.data, config.balancing, config.generator
    found: list[tuple[tuple[str, ...], str]] = []
    places = {"output-dir": config.output_dir, "state-dir": config.state_dir, "resume": config.resume}
    for key, place in (places | {"data.path": d.path, "generator.path": g.path}).items():
        try:
            Path(place).expanduser()
        except RuntimeError:
            found.append(
                ((key,), f"{key}: got {shortened(place)}; this machine knows no such home directory; give the whole path")
            )
    if d.name in (*OWN, "tiny-imagenet") and not d.path:
        text = f"data.path: empty; the data set {d.name!r} needs the path of its images (see docs/data.md)"
        found.append((("data.name", "data.path"), text))
    if d.name in PACKAGED and d.path:
        text = f"data.path: got {shortened(d.path)}; the data set {d.name!r} comes with a package and takes no path"
        found.append((("data.name", "data.path"), text))
    if d.name not in OWN and d.class_names:
        text = f"data.classes: got {shortened(d.classes)}; the data set {d.name!r} has its own; allowed with {' | '.join(OWN)}"
        found.append((("data.name", "data.classes"), text))
    if "" in d.class_names or len(set(d.class_names)) < len(d.class_names):
        text = f"data.classes: got {shortened(d.classes)}; allowed: names, none empty and none twice; names with commas go in a JSON list or @FILE"
        found.append((("data.classes",), text))
    if not re.fullmatch(r"white|black|#[0-9a-fA-F]{6}", d.background):
        text = f"data.background: got {shortened(d.background)}; allowed: white | black | #rrggbb"
        found.append((("data.background",), text))
    if d.channels == 2:
        found.append((("data.channels",), "data.channels: got 2; allowed: 0 | 1 | 3"))
    if config.model.width % 8:
        found.append((("model.width",), f"model.width: got {config.model.width}; allowed: a multiple of 8"))
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
    if g.name == OWN_IMAGES:
        text = f"generator.name: {OWN_IMAGES!r} repeats a client's own images"
        if b.filter != "none":
            problem = f"{text}, and balancing.filter judges synthetic ones. Set balancing.filter = 'none'."
            found.append((("generator.name", "balancing.filter"), problem))
        if config.warm_start.generates:
            problem = (
                f"{text}; the server has none for its warm start. Choose another generator, or warm-start.images = 'public'."
            )
            found.append((("generator.name", "warm-start.enabled", "warm-start.images"), problem))
        if config.server_tuning.generates:
            problem = f"{text}; the server has none to tune on. Choose another generator, or server-tuning.part = 'none'."
            found.append((("generator.name", "server-tuning.part"), problem))
    if config.warm_start.enabled and config.warm_start.images == "public" and config.warm_start.num_images:
        text = f"warm-start.num-images: got {config.warm_start.num_images}; warm-start.images = 'public' takes all of them: 0"
        found.append((("warm-start.num-images", "warm-start.images", "warm-start.enabled"), text))
    if g.name == "text-to-image" and not g.path:
        text = "generator.path: empty; text-to-image needs the directory that `fbl-flower generator quantize` made"
        found.append((("generator.name", "generator.path"), text))
    if config.num_server_rounds == 0 and g.name not in (AUTO, FEDERATED):
        text = f"num-server-rounds: got 0, which trains a generator only, and generator.name is {g.name!r}; allowed then: {FEDERATED}"
        found.append((("num-server-rounds", "generator.name"), text))
    if g.resolution % 8:
        found.append((("generator.resolution",), f"generator.resolution: got {g.resolution}; allowed: 0, or a multiple of 8"))
    if 0 < g.guidance < 1:
        text = f"generator.guidance: expected 0 (the generator's own) or 1 to 20, got {g.guidance}"
        found.append((("generator.guidance",), text))
    if g.image_to_image and g.name != "text-to-image":
        text = f"generator.image-to-image: true, but generator.name is {g.name!r}; only text-to-image can start from images"
        found.append((("generator.image-to-image", "generator.name"), text))
    for key, value in (("generator.blur", g.blur), ("generator.noise", g.noise)):
        if value and g.name != "public-images":
            text = f"{key}: got {value}; only public-images are degraded, and generator.name is {g.name!r}"
            found.append(((key, "generator.name"), text))
    found += privacy_problems(
        config.privacy,
        num_clients=config.num_clients,
        classifies=config.num_server_rounds > 0,
        weight_by=config.aggregation.weight_by,
        methods=_methods(config),
        average_embeddings=b.average_embeddings,
        batch_norm=config.model.name == "resnet18" and config.model.norm == "batch",
    )
    cohorts = {"fraction-train": config.fraction_train} if config.num_server_rounds else {}
    if g.name == FEDERATED:
        cohorts["federated-generator.fraction-train"] = config.federated_generator.fraction_train
    found += rule_problems(
        config.aggregation,
        cohorts={key: rounded_up(fraction, config.num_clients) for key, fraction in cohorts.items()},
        methods=_methods(config) if config.num_server_rounds else set(),
        average_embeddings=b.average_embeddings,
        private=config.privacy.clip_norm > 0,
    )
    found += attack_problems(config.attack, num_clients=config.num_clients)
    return found + client_problems(config.clients, num_clients=config.num_clients, balancing=b.enabled)


def _methods(config: RunConfig) -> set[str]:
    """Return the methods of the clients, as far as `clients.methods` can be read."""
    try:
        shares = dict(method_shares(config.clients.methods))
    except ValueError:
        shares = {}
    return {config.method.name} | {name for name, share in shares.items() if share > 0}
