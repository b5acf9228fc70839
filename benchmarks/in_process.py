"""What a federation costs beyond local training, in process: 20 clients x 20 rounds of a tiny model.

    python benchmarks/in_process.py [--repeats 3]

Everything but the clients' own training counts as overhead: validation, messages, records, state on disk, aggregation, evaluation,
metrics and checkpoints. The first run, which imports and loads, is not counted; pictures are off.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from typing import Any

from fbl_flower.federation import client
from fbl_flower.federation.local import run_local


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    logging.getLogger("flwr").setLevel(logging.WARNING)
    training = [0.0]
    run_local_round = client.run_local_round

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = run_local_round(*args, **kwargs)
        training[0] += time.perf_counter() - started
        return result

    client.run_local_round = timed
    for fraction in (0.5, 1.0):
        overheads = []
        with tempfile.TemporaryDirectory() as folder:
            settings: dict[str, bool | int | float | str] = {
                "data.name": "digits", "model.name": "tiny", "generator.name": "public-images", "num-clients": 20,
                "num-server-rounds": 20, "fraction-train": fraction, "pictures": False, "output-dir": folder, "state-dir": folder,
            }  # fmt: skip
            for _ in range(repeats + 1):
                training[0] = 0.0
                started = time.perf_counter()
                run_local(settings)
                overheads.append(time.perf_counter() - started - training[0])
                print(f"local training {training[0]:.2f} s, everything else {overheads[-1]:.2f} s")
        share = "half of the clients" if fraction < 1 else "all clients"
        middle = statistics.median(overheads[1:])
        print(f"20 clients x 20 rounds, {share} a round: {middle:.2f} s beyond local training (median of {repeats})")


if __name__ == "__main__":
    main()
