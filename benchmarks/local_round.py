"""Images per second from a client's message in to its reply out, as ratios to loops without a federation.

    python benchmarks/local_round.py [--images 500] [--repeats 3] [-c key=value ...]

Three things are timed in turn, `repeats` times, in one process, and the medians compared:
- ours: the ClientApp's `train` handler, with everything that it does (unpack, balance, augment, train, pack);
- bare: forward, backward and SGD step over the same batches, already float and in memory, at the same precision and layout;
- stock: the loop of a stock Flower quickstart (DataLoader over PIL images, ToTensor and Normalize for each, fp32).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import tomllib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from fbl_flower.config import RunConfig, flatten, parse_config
from fbl_flower.data.batches import to_float
from fbl_flower.data.datasets import load_parts
from fbl_flower.device import autocast, memory_format, pick_device
from fbl_flower.federation import client
from fbl_flower.federation.wire import TRAIN, Reply, Request
from fbl_flower.models import Classifier, fitted, new_classifier
from fbl_flower.params import to_arrays
from fbl_flower.training.prepare import client_examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-c", action="append", default=[], metavar="KEY=VALUE", help="run-config keys, as for flwr run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as state_dir:
        run_config = {
            "num-clients": 1, "data.num-private": args.images, "data.partition": "iid", "state-dir": state_dir,
        }  # fmt: skip
        for text in args.c:
            key, _, value = text.partition("=")
            run_config[key] = tomllib.loads(f"v = {value}")["v"]
        config = parse_config(run_config)
        torch.set_num_threads(config.num_threads)
        compare(config, repeats=args.repeats)


def compare(config: RunConfig, *, repeats: int) -> None:
    """Time the three and print a small table."""
    num_images = config.train.epochs * config.data.num_private
    candidates: dict[str, Callable[[], None]] = {"ours": ours(config), "bare": bare(config), "stock": stock(config)}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            if repeat:  # the first pass warms up
                seconds[name].append(time.perf_counter() - started)
    speed = {name: num_images / statistics.median(s) for name, s in seconds.items()}
    print(
        f"{config.data.num_private} images x {config.train.epochs} epochs, {config.num_threads} thread(s), median of {repeats}"
    )
    print("| loop | images/s | ratio to bare |\n|---|---|---|")
    for name, value in speed.items():
        print(f"| {name} | {value:.0f} | {value / speed['bare']:.2f} |")


def ours(config: RunConfig) -> Callable[[], None]:
    """Return a call of the client's handler on a message as the server sends it."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    context = Context(
        run_id=1,
        node_id=1,
        node_config={"partition-id": 0, "num-partitions": 1},
        state=RecordDict(),
        run_config=dict(flatten(config)),
    )
    arrays = to_arrays(_model(config).state_dict())
    rounds = iter(range(1, 10_000))

    def run() -> None:
        request = Request(run="benchmark", client=0, server_round=next(rounds), arrays=arrays)
        message = Message(request.to_record(), dst_node_id=1, message_type=TRAIN)
        message.metadata.__dict__["_message_id"] = "1"
        Reply.from_record(client.app(message=message, context=context).content)

    return run


def bare(config: RunConfig) -> Callable[[], None]:
    """Return a plain PyTorch loop over float batches in memory."""
    device = pick_device(config)
    examples = client_examples(config, load_parts(config.data), 0)
    model = _model(config).to(device)
    layout = memory_format(model, device)
    model.to(memory_format=layout)
    images = to_float(examples.images).to(device).contiguous(memory_format=layout)
    batches = list(
        zip(images.split(config.train.batch_size), examples.labels.to(device).split(config.train.batch_size), strict=True)
    )

    def run() -> None:
        optimizer = torch.optim.SGD(
            model.parameters(), lr=config.train.learning_rate, momentum=config.train.momentum, fused=True
        )
        for _ in range(config.train.epochs):
            for x, y in batches:
                with autocast(config.train.precision, device):
                    logits = model(x)
                loss = F.cross_entropy(logits.float(), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    return run


def stock(config: RunConfig) -> Callable[[], None]:
    """Return the loop of a stock quickstart: a DataLoader that turns each PIL image into a tensor."""
    examples = client_examples(config, load_parts(config.data), 0)
    channels = examples.images.shape[1]
    pictures = [transforms.functional.to_pil_image(image) for image in examples.images]
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * channels, (0.5,) * channels)])
    loader = DataLoader(
        _Pictures(pictures, examples.labels.tolist(), transform), batch_size=config.train.batch_size, shuffle=True
    )
    device = pick_device(config)
    model = _model(config).to(device)

    def run() -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=config.train.learning_rate, momentum=config.train.momentum)
        for _ in range(config.train.epochs):
            for batch in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(batch["image"].to(device)), batch["label"].to(device)).backward()
                optimizer.step()

    return run


class _Pictures(Dataset[dict[str, object]]):
    def __init__(self, pictures: list[object], labels: list[int], transform: Callable[[object], torch.Tensor]) -> None:
        self.pictures, self.labels, self.transform = pictures, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"image": self.transform(self.pictures[index]), "label": self.labels[index]}


def _model(config: RunConfig) -> Classifier:
    parts = load_parts(config.data)
    info, network = parts.info, fitted(config.model, image_size=parts.image_size, device=pick_device(config))
    return new_classifier(network, channels=info.channels, num_classes=info.num_classes, seed=config.seed)


if __name__ == "__main__":
    main()
