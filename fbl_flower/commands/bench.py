"""`fbl-flower bench generator`: what filling costs on this machine, beside what training costs.

Each measurement is a process of its own: its largest resident set is then that of the task and nothing else. One thread with a memory
limit stands in for a small board; the electrical power is not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fbl_flower.commands.generator import configuration_of
from fbl_flower.commands.job_memory import memory_of
from fbl_flower.commands.json_file import check_place, write_json
from fbl_flower.config import RunConfig, flatten, parse_config
from fbl_flower.data.datasets import DataParts, load_parts
from fbl_flower.data.examples import Examples, concatenate
from fbl_flower.device import pick_device
from fbl_flower.errors import ConfigError, FBLError, RunFailed
from fbl_flower.generation.federated import initial_arrays, local_stream, train_locally
from fbl_flower.generation.loading import check_generator, load_generator
from fbl_flower.generation.memory import is_out_of_memory
from fbl_flower.seeding import derive
from fbl_flower.training.central import train_centrally

_SMALL_BOARDS_MB = (2048, 1024)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One task under one limit.

    Attributes:
        task: "generate", "epoch" (of the classifier) or "together" (an epoch of a generator that clients train together).
        threads: Of torch.
        limit_mb: Most private memory, in MiB; 0: no limit.
        seconds: Of the task itself, on the clock; None if it failed.
        load_seconds: Of loading images and generator, and making one batch, before it.
        peak_mb: Largest resident set of the process, in MiB.
        problem: Why it failed; empty otherwise.
    """

    task: str
    threads: int
    limit_mb: int
    seconds: float | None
    load_seconds: float | None
    peak_mb: float | None
    problem: str = ""


def bench_generator(
    config: RunConfig, *, num_images: int, epoch_images: int, threads: int, out: Path | None = None, tell: bool = True
) -> list[Measurement]:
    """Measure all tasks with `threads` threads, then with one thread and 2 and 1 GiB of memory; print a table.

    Args:
        config: Which generator, data, model and precision.
        num_images: Class-conditional images to make, classes in turn.
        epoch_images: Images of the training epoch, drawn from the public and private ones with repetition.
        threads: Of torch.
        out: JSON file to write.
        tell: Whether to print.

    Raises:
        ConfigError: `out` has no folder to lie in.
        RunFailed: A task failed without any limit, or `out` cannot be written.
    """
    check_place(out)
    parts = load_parts(config.data)
    found = []
    for count, limit in ((threads, 0), *((1, limit) for limit in _SMALL_BOARDS_MB)):
        for task, number in (("generate", num_images), ("epoch", epoch_images), ("together", epoch_images)):
            one = measure(config, parts, task=task, number=number, threads=count, limit_mb=limit)
            if one.problem and not limit:
                raise RunFailed(f"bench: {task} failed: {one.problem}")
            found.append(one)
            if tell:
                print(_row(one), file=sys.stderr, flush=True)
    report = {
        "images": num_images,
        "epoch_images": epoch_images,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.platform()},
        "measurements": [asdict(one) for one in found],
        "config": flatten(config),
    }
    if tell:
        print(as_markdown(found, num_images=num_images, epoch_images=epoch_images), flush=True)
    if out is not None:
        write_json(out, report)
    return found


def measure(config: RunConfig, parts: DataParts, *, task: str, number: int, threads: int, limit_mb: int = 0) -> Measurement:
    """Run one task in a process of its own, which is given the images that the task needs: a client has no whole data set."""
    nothing = parts.test.take(torch.zeros(0, dtype=torch.int64))
    needed = replace(parts, test=nothing, validation=nothing, private=nothing)
    if task != "generate":
        pool = concatenate(parts.public, parts.private)
        needed = replace(needed, public=nothing, private=pool.take(torch.arange(number) % len(pool)))
    with tempfile.TemporaryDirectory(prefix="fbl-bench-") as folder:
        images = Path(folder, "images.pickle")
        images.write_bytes(pickle.dumps(needed))
        job = {"task": task, "number": number, "threads": threads, "limit_mb": limit_mb, "images": str(images)}
        done = subprocess.run(
            [sys.executable, "-m", "fbl_flower.commands.bench"],
            input=json.dumps(job | {"config": flatten(config)}),
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
        )
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = done.stderr.strip().splitlines()
        answer = {"problem": lines[-1] if lines else f"the process ended with status {done.returncode}"}
    return Measurement(
        task=task,
        threads=threads,
        limit_mb=limit_mb,
        seconds=answer.get("seconds"),
        load_seconds=answer.get("load_seconds"),
        peak_mb=answer.get("peak_mb"),
        problem=answer.get("problem", ""),
    )


def as_markdown(found: Sequence[Measurement], *, num_images: int, epoch_images: int) -> str:
    """Return a table with a row for each setting of threads and memory."""
    rows = [
        f"| threads | memory limit | {num_images} images | peak memory | one epoch of {epoch_images} images | peak memory | ratio "
        "| one epoch of a federated generator | peak memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for made, trained, together in zip(found[::3], found[1::3], found[2::3], strict=True):
        limit = f"{made.limit_mb / 1024:g} GiB" if made.limit_mb else "none"
        both = made.seconds is not None and trained.seconds is not None
        ratio = f"{(made.seconds or 0) / (trained.seconds or 1):.2f}" if both else ""
        cells = [str(made.threads), limit, *_cells(made), *_cells(trained), ratio, *_cells(together)]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cells(one: Measurement) -> list[str]:
    if one.seconds is None or one.peak_mb is None:
        return [f"failed: {one.problem}", ""]
    return [f"{one.seconds:.1f} s", f"{one.peak_mb:.0f} MiB"]


def _row(one: Measurement) -> str:
    limit = f", at most {one.limit_mb} MiB" if one.limit_mb else ""
    return f"{one.task}, {one.threads} thread(s){limit}: " + ", ".join(filter(None, _cells(one)))


def bench(options: argparse.Namespace) -> None:
    """Check the options and run the benchmark."""
    numbers = {"--images": options.images, "--epoch-images": options.epoch_images}
    problems = [f"{name}: got {number}; allowed: whole number >= 1" for name, number in numbers.items() if number < 1]
    config = configuration_of(options, folder=options.folder, found=problems)
    if problems := check_generator(config, load_parts(config.data)):
        raise ConfigError(problems)
    bench_generator(
        config, num_images=options.images, epoch_images=options.epoch_images, threads=options.threads, out=options.out
    )


def _run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Do what `measure` asked for, in this process."""
    started = time.perf_counter()
    torch.set_num_threads(job["threads"])
    config = parse_config(job["config"])
    parts: DataParts = pickle.loads(Path(job["images"]).read_bytes())  # written by `measure`, a moment ago
    number = job["number"]
    if job["task"] == "generate":
        generator = load_generator(config, parts)
        generator.generate([0], [0])  # loads the network
        loaded = time.perf_counter()
        labels = [place % parts.info.num_classes for place in range(number)]
        generator.generate(labels, [derive(config.seed, "bench", place) for place in range(number)])
    elif job["task"] == "together":
        arrays = initial_arrays(parts.info, parts.image_size, seed=config.seed)
        settings = replace(config.federated_generator, epochs=1)

        def train(images: Examples) -> None:
            stream = local_stream(config.seed, 0, 1)
            device, precision = pick_device(config).type, config.train.precision
            train_locally(
                arrays, images, parts.info, settings, server_round=1, stream=stream, device=device, precision=precision
            )

        train(parts.private.take(torch.arange(min(number, settings.batch_size))))
        loaded = time.perf_counter()
        train(parts.private)
    else:
        first = parts.private.take(torch.arange(min(number, config.train.batch_size)))
        train_centrally(config, parts, first, epochs=1, seed=config.seed)  # imports, and what is set up once
        loaded = time.perf_counter()
        train_centrally(config, parts, parts.private, epochs=1, seed=config.seed)
    return {
        "seconds": time.perf_counter() - loaded,
        "load_seconds": loaded - started,
        "peak_mb": _peak_mb(),
    }


def _peak_mb() -> float:
    memory = memory_of(os.getpid())
    if memory is not None:  # on Linux, because getrusage there begins with the peak of the process that started this one
        return memory[1] / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _main() -> int:
    job = json.load(sys.stdin)
    if job["limit_mb"]:
        limit = job["limit_mb"] * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # private memory; the libraries' code is not in it
    try:
        answer = _run_job(job)
    except FBLError as error:
        answer = {"problem": str(error)}
    except (MemoryError, RuntimeError) as error:
        text = str(error).splitlines()[0] if str(error) else ""
        short = is_out_of_memory(error) or "memory" in text
        answer = {"problem": "out of memory" if short else f"{type(error).__name__}: {text}"}
    except (ImportError, OSError):
        if not job["limit_mb"]:
            raise
        answer = {"problem": "the libraries cannot be loaded in so little memory"}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
