"""What a message costs, and the model in 16 bits on its way back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from fbl_flower.config import parse_config
from fbl_flower.data.datasets import load_parts
from fbl_flower.federation.cost import Traffic, payload_bytes
from fbl_flower.federation.local import run_local
from fbl_flower.federation.transport import restore, shrink
from fbl_flower.federation.wire import array_record
from fbl_flower.models import new_classifier


def test_payload_by_hand() -> None:
    """An array of 6 float32 is 24 bytes behind numpy's header of 128, its name 1; text is 2 + 3, numbers 1 + 8 each, a list 1 + 16."""
    content = RecordDict(
        {
            "a": array_record({"w": np.zeros((2, 3), np.float32)}),
            "c": ConfigRecord({"äx": "y", "b": b"zz", "l": [1, 2]}),
            "m": MetricRecord({"n": 1, "f": 0.5}),
        }
    )
    assert payload_bytes(content) == (1 + 128 + 24) + (3 + 1) + (1 + 2) + (1 + 16) + 2 * (1 + 8)


def test_waiting_is_what_was_not_computing_and_all_of_it_for_a_client_that_failed() -> None:
    traffic = Traffic(sent={}, received={}, elapsed={0: 5.0, 1: 7.0, 2: 9.0})
    assert traffic.waiting({0: 3.0, 1: 7.5}) == {0: 2.0, 1: 0.0, 2: 9.0}


def test_the_bytes_of_a_round_are_in_the_metrics_and_of_each_client_in_the_timings(tmp_path: Path) -> None:
    """All arrays of the model, each with numpy's header and its name; two clients of four a round."""
    settings = quick(tmp_path, num_server_rounds=2)
    run_dir = run_local(settings).run_dir
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timings = [json.loads(line) for line in (run_dir / "timings.jsonl").read_text().splitlines()]
    config = parse_config(settings)
    model = new_classifier(config.model, channels=load_parts(config.data).info.channels, num_classes=10, seed=0)
    tensors = model.state_dict()
    of_arrays = sum(len(name) + 128 + 4 * tensor.numel() for name, tensor in tensors.items())
    names = "run" + "client" + "server-round" + "checkpoint-round" + "last-round" + "generator" + "generator-id"
    of_request = len(names) + 22 + 4 * 8 + len("public-images")
    of_reply = len("num-examples" + "num-real" + "train-loss" + "seconds" + "forgot" + "other-generator") + 6 * 8
    assert "bytes_to_clients" not in rows[0]
    for row, timing in zip(rows[1:], timings[1:], strict=True):
        assert row["bytes_to_clients"] == 2 * (of_arrays + of_request)
        assert row["bytes_from_clients"] == 2 * (of_arrays + of_reply)
        assert timing["bytes_to_client"] == {str(k): of_arrays + of_request for k in row["clients"]}
        assert timing["bytes_from_client"] == {str(k): of_arrays + of_reply for k in row["clients"]}
        assert all(timing["waiting_seconds"][k] >= 0 for k in map(str, row["clients"]))


FLOATS = arrays_of.arrays(np.float32, (7,), elements=st.floats(-4, 4, width=32))


@given(FLOATS, FLOATS)
def test_the_error_is_of_the_change_not_of_the_weight(received: np.ndarray, trained: np.ndarray) -> None:
    """Half a unit in the last place of fp16, 2^-11 of the change, or 2^-25 where it is small; then two roundings in float32."""
    start, end = {"w": received}, {"w": trained}
    back = restore(shrink(end, start, precision="fp16"), start, precision="fp16")["w"]
    change = np.abs(trained.astype(np.float64) - received)
    allowed = np.maximum(change * 2.0**-11, 2.0**-25) + 2.0**-22 * np.maximum(np.abs(trained) + np.abs(received), 1e-30)
    assert back.dtype == np.float32
    assert (np.abs(back.astype(np.float64) - trained) <= allowed).all()


def test_fp32_and_counters_are_untouched_and_too_large_changes_are_infinite() -> None:
    received = {"w": np.float32([1, 2]), "n": np.array(7), "d": np.float64([0.1])}
    trained = {"w": np.float32([1e6, 2]), "n": np.array(9), "d": np.float64([0.3])}
    assert all(shrink(trained, received, precision="fp32")[name] is trained[name] for name in trained)
    sent = shrink(trained, received, precision="fp16")
    assert sent["w"].dtype == np.float16 and sent["n"] is trained["n"] and sent["d"] is trained["d"]
    back = restore(sent, received, precision="fp16")
    assert np.isinf(back["w"][0]) and back["w"][1] == 2 and back["n"] == 9 and back["d"] == 0.3


def test_fp16_halves_what_clients_send_and_hardly_changes_the_model(tmp_path: Path) -> None:
    full = run_local(quick(tmp_path / "a"))
    half = run_local(quick(tmp_path / "b", transport__precision="fp16"))
    rows = [json.loads((o.run_dir / "metrics.jsonl").read_text().splitlines()[-1]) for o in (full, half)]
    assert rows[0]["bytes_to_clients"] == rows[1]["bytes_to_clients"]
    num_numbers = 2 * (16 * 9 + 16 + 32 * 16 * 9 + 32 + 32 * 10 + 10)
    assert rows[0]["bytes_from_clients"] - rows[1]["bytes_from_clients"] == 2 * num_numbers
    assert rows[0]["loss"] != rows[1]["loss"] and abs(rows[0]["loss"] - rows[1]["loss"]) < 0.01
