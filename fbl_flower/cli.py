"""The command `fbl-flower`. Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted: by Ctrl-C, SIGTERM, or a closed terminal.

Only the configuration and arguments are imported at the top: help and bad input must not wait for torch.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from fbl_flower.commands.deploy.arguments import add_deploy
from fbl_flower.commands.interruption import signals_interrupt
from fbl_flower.config import surface
from fbl_flower.errors import ConfigError, DataError, FBLError, GeneratorError
from fbl_flower.quiet import quiet_libraries


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: this process's) and return the exit code."""
    options = _parser().parse_args(arguments)
    quiet_libraries()
    with signals_interrupt():
        try:
            return int(options.handler(options) or 0)
        except (ConfigError, DataError, GeneratorError) as error:
            return _ended(2, str(error))
        except KeyboardInterrupt:
            return _ended(130, "interrupted")
        except (FBLError, OSError) as error:
            return _ended(1, f"failed: {error}")


def _ended(code: int, message: str) -> int:
    """Print the message and return the exit code.

    Where clients of the in-process engine are still at work, end with it here: Python itself would wait for them.
    """
    with contextlib.suppress(OSError):  # the terminal may be closed
        print(f"fbl-flower: {message}", file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try again at its end, and exit with a code of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    engine = sys.modules.get("fbl_flower.federation.local")
    if engine is not None and any(thread.name.startswith(engine.WORKER) for thread in threading.enumerate()):
        os._exit(code)
    return code


def configuration_table() -> str:
    """Return the page of all settings, in Markdown."""
    lines = [
        "# Configuration",
        "",
        "Every setting, in the order of `fbl_flower/config/`; this page is what `fbl-flower config` prints. They are",
        "given as in `flwr run . -c 'num-server-rounds=20 data.partition=\"iid\"'`: values are TOML, so text needs quotes.",
        "`fbl-flower run -c` takes the same, or TOML files. Text has no control characters. The upper bounds are generous:",
        "they are there for slips and for values that would crash, hang or fill the memory.",
        "",
        "| key | default | allowed | meaning |",
        "|---|---|---|---|",
    ]
    for setting in surface():
        default = str(setting.default).lower() if isinstance(setting.default, bool) else setting.default
        shown = f'`"{default}"`' if isinstance(default, str) and not isinstance(setting.default, bool) else f"`{default}`"
        allowed = setting.allowed.replace(" | ", ", ")
        lines.append(f"| `{setting.key}` | {shown} | {allowed} | {setting.help.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _run(options: argparse.Namespace) -> None:
    from fbl_flower.commands.overrides import chosen_config

    if options.engine == "local" and (options.nodes is not None or options.app is not None):
        raise ConfigError(
            ["--nodes, --app: only for --engine simulation; the local engine runs the installed package in this process"]
        )
    if options.nodes is not None and options.nodes < 1:
        raise ConfigError([f"--nodes: got {options.nodes}; allowed: whole number >= 1"])
    config, settings = chosen_config(options.config, resume=options.resume)
    from fbl_flower.federation.preflight import preflight

    preflight(config)
    if options.engine == "local":
        from fbl_flower.federation.local import run_local

        outcome = run_local(settings, workers=num_cores())
        print(f"run directory: {outcome.run_dir}")
        return
    import torch

    from fbl_flower.commands.simulation import run_simulation

    gpu = config.device != "cpu" and torch.cuda.is_available()
    run_simulation(settings, nodes=options.nodes or config.num_clients, app=options.app, gpu=gpu)


def _config(_: argparse.Namespace) -> None:
    print(configuration_table())


def _generator(options: argparse.Namespace) -> None:
    from fbl_flower.commands import generator as generator_commands

    match options.action:
        case "train":
            generator_commands.train(options)
        case "quantize":
            generator_commands.quantize(options)
        case "gallery":
            generator_commands.draw_gallery(options)
        case "tune":
            from fbl_flower.commands.quality import tune

            tune(options)
        case _:
            from fbl_flower.commands.quality import quality

            quality(options)


def _data(options: argparse.Namespace) -> None:
    from fbl_flower.commands import data as data_commands

    data_commands.plot(options)


def _sweep(options: argparse.Namespace) -> int:
    from fbl_flower.commands import sweep
    from fbl_flower.commands.overrides import absolute_paths, read_overrides

    return sweep.sweep_command(
        files=options.files,
        seeds=options.seeds,
        num_jobs=options.jobs,
        out=options.out,
        size=options.size,
        overrides=absolute_paths(read_overrides(options.config)),
        target=options.target_accuracy,
        note=options.note,
    )


def _bench(options: argparse.Namespace) -> None:
    from fbl_flower.commands.bench import bench

    bench(options)


def _superlink_stop(options: argparse.Namespace) -> None:
    from fbl_flower.commands.superlink import stop_superlink

    print(stop_superlink(force=options.force))


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def numbers(text: str) -> tuple[int, ...]:
    """Read whole numbers >= 0 between commas."""
    found = tuple(int(part) for part in text.split(","))
    if min(found) < 0 or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: whole numbers >= 0 between commas, each once")
    return found


def decimals(text: str) -> tuple[float, ...]:
    """Read numbers between commas."""
    return tuple(float(part) for part in text.split(","))


def widths(text: str) -> tuple[int, ...]:
    """Read whole numbers between commas, which may repeat."""
    return tuple(int(part) for part in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fbl-flower", description="Federated Balanced Learning on Flower.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="validate the settings, run a federation, show its progress, tell whether it worked")
    _add_config(run)
    run.add_argument(
        "--engine", choices=("simulation", "local"), default="simulation", help="Flower's simulation, or this process"
    )
    run.add_argument("--nodes", type=int, metavar="N", help="virtual SuperNodes of the simulation (default: num-clients)")
    run.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on with a killed run; -c may then only raise num-server-rounds"
    )
    run.add_argument("--app", type=Path, metavar="DIR", help="another directory with the Flower app")
    run.set_defaults(handler=_run)

    config = commands.add_parser("config", help="print every setting as a Markdown table")
    config.set_defaults(handler=_config)

    generator = commands.add_parser(
        "generator", help="train a generator on the public part, quantise a pretrained one, or measure one"
    )
    actions = generator.add_subparsers(required=True, metavar="ACTION", dest="action")
    train = actions.add_parser("train", help="train one and write its folder")
    train.add_argument("--out", type=Path, metavar="DIR", help="folder to make (default: ./DATA-SIZEpx)")
    train.add_argument(
        "--federated",
        action="store_true",
        help="on the clients' images, which they keep: the rounds of generator.name = 'federated' in this process, with -c "
        "federated-generator.* and the federation's settings; of the other options, --out, --seed, --threads and the data set's",
    )
    train.add_argument("--steps", type=int, help="optimiser steps")
    train.add_argument("--batch-size", type=int, help="images per step")
    train.add_argument("--learning-rate", type=float, help="peak of the step size")
    train.add_argument("--widths", type=widths, help="channels at each resolution, such as 64,96")
    train.add_argument(
        "--augmentation",
        type=float,
        metavar="X",
        help="0: no random deformation; 1: as for handwriting (default: 0 where images may be mirrored, which they then are, else 1)",
    )
    train.add_argument("--seed", type=int, default=0, help="of the weights and every draw")
    train.add_argument(
        "--weights", choices=("4bit", "8bit", "none"), default="4bit", help="none: floats, which `generator quantize` takes"
    )
    train.add_argument(
        "--compile", action="store_true", help="compile the network first: minutes, and a C++ compiler, for shorter steps"
    )
    train.add_argument(
        "--minutes", type=float, default=math.inf, metavar="M", help="stop after M minutes; the same command goes on from there"
    )
    train.add_argument(
        "--checkpoint-every",
        type=int,
        default=100,
        metavar="STEPS",
        help="steps between checkpoints, in DIR.training (default: 100)",
    )
    quantize = actions.add_parser(
        "quantize", help="store a Stable Diffusion pipeline, or a generator trained with --weights none, in 4 or 8 bits"
    )
    quantize.add_argument("source", metavar="SOURCE", help="name on the hub, or directory of a pipeline or generator")
    quantize.add_argument("dest", type=Path, metavar="DEST", help="folder to make, for generator.path")
    quantize.add_argument(
        "--weights", choices=("4bit", "8bit", "none"), default="4bit", help="of the network, and of a text encoder"
    )
    decoder = quantize.add_mutually_exclusive_group()
    decoder.add_argument(
        "--tiny-decoder",
        default="auto",
        metavar="SOURCE2",
        help="the AutoencoderTiny to store instead of the full autoencoder (default: madebyollin/taesd from the hub)",
    )
    decoder.add_argument("--full-decoder", action="store_true", help="keep the pipeline's own autoencoder")
    quantize.add_argument("--revision", metavar="R", help="commit, branch or tag of SOURCE on the hub")
    quantize.add_argument("--dtype", choices=("bf16", "fp32"), help="of what is not quantised in a pipeline (default: bf16)")
    quantize.add_argument("--threads", type=int, default=num_cores(), help="torch's threads (default: all cores)")
    quantize.set_defaults(handler=_generator)
    quality = actions.add_parser("quality", help="accuracy, diversity, and distance to the training images, as a table")
    quality.add_argument(
        "folders", nargs="*", type=Path, metavar="DIR", help="generators to compare (default: the bundled one)"
    )
    quality.add_argument("--seeds", type=numbers, default=(0, 1, 2), help="such as 0,1,2")
    quality.add_argument(
        "--clients",
        action="store_true",
        help="also measure, for each simulated client of the configuration (-c), whether the images tell which ones it has",
    )
    quality.add_argument("--evaluate-on", choices=("test", "validation"), default="test", help="the real images that judge")
    quality.add_argument("--out", type=Path, metavar="FILE.json", help="write the measurements there too")
    tune = actions.add_parser("tune", help="choose steps and guidance on validation images, and write them into recipe.json")
    tune.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="the generator (default: the bundled one)")
    tune.add_argument("--steps", type=numbers, default=(4, 8, 16), metavar="LIST", help="candidates (default: 4,8,16)")
    tune.add_argument(
        "--guidance", type=decimals, default=(1.0, 1.5, 2.0), metavar="LIST", help="candidates (default: 1,1.5,2)"
    )
    tune.add_argument("--seeds", type=numbers, default=(0, 1), help="of images and classifiers (default: 0,1)")
    tune.add_argument(
        "--images", type=int, default=0, metavar="N", help="for each candidate and seed (default: as many as public images)"
    )
    tune.add_argument("--dry-run", action="store_true", help="write nothing into recipe.json")
    tune.add_argument("--out", type=Path, metavar="FILE.json", help="write the measurements there too")
    pictures = actions.add_parser("gallery", help="real and synthetic images of each class, side by side, as PNG")
    pictures.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="the generator (default: the bundled one)")
    pictures.add_argument("--out", type=Path, default=Path("gallery.png"), metavar="FILE.png", help="picture to write")
    bench = commands.add_parser("bench", help="measure what things cost on this machine")
    of_generator = bench.add_subparsers(required=True, metavar="WHAT").add_parser(
        "generator", help="seconds and memory to make images, beside one epoch of local training"
    )
    of_generator.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="the generator (default: the bundled one)")
    of_generator.add_argument("--images", type=int, default=100, metavar="N", help="images to make (default: 100)")
    of_generator.add_argument("--epoch-images", type=int, default=2500, metavar="N", help="images of the epoch (default: 2500)")
    of_generator.add_argument("--out", type=Path, metavar="FILE.json", help="write the measurements there too")
    for action in (train, quality, tune, pictures, of_generator):
        action.add_argument("--data", default="mnist5k", metavar="NAME", help="data set (default: mnist5k)")
        action.add_argument("--data-path", metavar="FILE", help="its file or folder, if it needs one")
        action.add_argument(
            "--image-size", type=int, metavar="N", help="height and width in pixels (default: the data set's own)"
        )
        action.add_argument("--threads", type=int, default=num_cores(), help="torch's threads (default: all cores)")
        _add_config(action)
        action.set_defaults(handler=_bench if action is of_generator else _generator)

    data = commands.add_parser("data", help="what the clients would hold")
    plot = data.add_subparsers(required=True, metavar="ACTION").add_parser("plot", help="draw the partition, without a run")
    plot.add_argument(
        "--out", type=Path, default=Path("partition.png"), metavar="FILE.png", help="picture (default: partition.png)"
    )
    _add_config(plot)
    plot.set_defaults(handler=_data)

    sweep = commands.add_parser(
        "sweep", help="run the rows of a results table, each in processes of its own, and write the table"
    )
    sweep.add_argument("files", nargs="+", type=Path, metavar="FILE.toml", help="rows, or folders of rows")
    sweep.add_argument("--seeds", type=numbers, default=(0, 1, 2), help="such as 0,1,2 (the default)")
    sweep.add_argument("--jobs", type=int, default=num_cores(), help="processes at a time (default: all cores)")
    sweep.add_argument("--out", type=Path, metavar="DIR", help="results and table (default: results/FOLDER-SIZE of the rows)")
    sweep.add_argument("--size", choices=("cpu", "paper"), help="of rows that have both (default: cpu)")
    sweep.add_argument("--target-accuracy", type=float, metavar="A", help="0 .. 1: count rounds and bytes up to it")
    sweep.add_argument("--note", default="", metavar="TEXT", help="stands above the table, such as where the data comes from")
    _add_config(sweep)
    sweep.set_defaults(handler=_sweep)

    add_deploy(commands)

    superlink = commands.add_parser("superlink", help="the background SuperLink that `flwr run` leaves behind")
    stop = superlink.add_subparsers(required=True, metavar="ACTION").add_parser("stop", help="stop it")
    stop.add_argument("--force", action="store_true", help="also if runs are active; they are stopped first")
    stop.set_defaults(handler=_superlink_stop)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="'KEY=VALUE ...'", help="settings as TOML values, or a TOML file"
    )


if __name__ == "__main__":
    sys.exit(main())
