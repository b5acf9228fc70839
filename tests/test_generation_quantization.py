"""Four-bit weights: what is quantised, and that files come back bit for bit or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_generation_support import read_only_install, tiny_generator
from torch import nn

from fbl_flower.errors import GeneratorError
from fbl_flower.generation.diffusion import DiffusionGenerator
from fbl_flower.generation.quantization import (
    LAYERS,
    WEIGHTS,
    _PythonKernels,
    dequantize_,
    load_quantized,
    quantize_,
    save_quantized,
)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.ModuleDict({"conv_in": nn.Conv2d(3, 32, 3), "conv": nn.Conv2d(32, 64, 3), "linear": nn.Linear(64, 8)})


def forward(module, x):
    return module["linear"](module["conv"](module["conv_in"](x)).mean((2, 3)))


@pytest.fixture
def stored(tmp_path):
    module = quantize_(network())
    save_quantized(module, tmp_path)
    return module, tmp_path


def test_unpacking_by_hand():
    # quanto puts row i and row i + n/2 into one byte: low and high half
    packed = torch.tensor([[0x31], [0x42]], dtype=torch.uint8)
    assert _PythonKernels.unpack(packed, 4).tolist() == [[1], [2], [3], [4]]
    assert _PythonKernels.unpack(torch.tensor([[0b11100100]], dtype=torch.uint8), 2).tolist() == [[0], [1], [2], [3]]


def test_weights_take_sixteen_values_and_excluded_layers_stay(stored):
    module, folder = stored
    rows = module["linear"].weight.dequantize()  # 64 inputs: one scale for each row
    assert 8 < max(len(row.unique()) for row in rows) <= 16
    assert (rows - network()["linear"].weight).abs().max() < 0.02  # the range is 0.25 in 15 steps, halved: 0.0083
    assert torch.equal(module["conv_in"].weight, network()["conv_in"].weight)
    floats = sum(parameter.numel() * 4 for parameter in network().parameters())
    assert (folder / WEIGHTS).stat().st_size < floats / 4


def test_a_round_trip_changes_no_bit(stored):
    module, folder = stored
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    again = load_quantized(network, folder)
    assert torch.equal(forward(again, x), forward(module, x))
    for name, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_float_twin_has_the_same_values(stored):
    module, folder = stored
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = forward(module, x)
    twin = dequantize_(load_quantized(network, folder))
    assert type(twin["conv"]) is nn.Conv2d and type(twin["linear"]) is nn.Linear
    assert torch.equal(twin["conv"].weight, module["conv"].weight.dequantize())
    torch.testing.assert_close(forward(twin, x), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("lacking", ["compiler", "write permission"])
def test_a_fresh_process_on_a_lean_machine_makes_the_same_images(tmp_path, lacking):
    """quanto would compile an extension at first use, into the folder where it is installed."""
    folder = tiny_generator(tmp_path)
    script = (
        "import sys, hashlib, pathlib, torch; torch.set_num_threads(int(sys.argv[2]));"
        "from fbl_flower.generation.diffusion import DiffusionGenerator;"
        "g = DiffusionGenerator.load(pathlib.Path(sys.argv[1]), steps=2, guidance=1.5, batch_size=4);"
        "print(g.fingerprint, hashlib.sha256(g.generate([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]).numpy().tobytes()).hexdigest())"
    )
    here = DiffusionGenerator.load(folder, steps=2, guidance=1.5, batch_size=4)
    digest = hashlib.sha256(here.generate([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]).numpy().tobytes()).hexdigest()
    prefix = [] if lacking == "compiler" else read_only_install()
    there = subprocess.run(
        [*prefix, sys.executable, "-c", script, str(folder), str(torch.get_num_threads())],
        env={**os.environ, **({"PATH": "/nonexistent"} if lacking == "compiler" else {})},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert there.returncode == 0, there.stderr
    assert there.stdout.split() == [here.fingerprint, digest]


@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_a_truncated_file_is_refused(stored, keep):
    _, folder = stored
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(GeneratorError, match=f"{WEIGHTS} is damaged"):
        load_quantized(network, folder)


@pytest.mark.parametrize(
    "dropped", ["linear.bias", "conv.weight._data._data", "conv.weight._scale", "linear.weight._shift", "conv_in.weight"]
)
def test_a_file_without_a_tensor_is_refused(stored, dropped):
    _, folder = stored
    state = load_file(folder / WEIGHTS)
    assert dropped in state
    save_file({name: tensor for name, tensor in state.items() if name != dropped}, folder / WEIGHTS)
    with pytest.raises(GeneratorError, match=f"{WEIGHTS} does not fit the network"):
        load_quantized(network, folder)


def test_a_file_with_one_tensor_more_is_refused(stored):
    _, folder = stored
    save_file(load_file(folder / WEIGHTS) | {"linear.weight_of_another": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(GeneratorError, match=f"{WEIGHTS} does not fit the network.*linear.weight_of_another"):
        load_quantized(network, folder)


def test_weights_of_another_network_are_refused(stored):
    _, folder = stored
    for foreign in ({"other.weight": torch.zeros(2, 2), "other.bias": torch.zeros(2)}, {"x": torch.zeros(1)}):
        save_file(foreign, folder / WEIGHTS)
        with pytest.raises(GeneratorError, match=f"{WEIGHTS} does not fit the network"):
            load_quantized(network, folder)


@pytest.mark.parametrize("text", ["{", json.dumps({"nowhere": {"weights": "qint4", "activations": "none"}}), "[]", "{}"])
def test_a_wrong_list_of_layers_is_refused(stored, text):
    _, folder = stored
    (folder / LAYERS).write_text(text)
    with pytest.raises(GeneratorError, match=f"{LAYERS}|{WEIGHTS}"):
        load_quantized(network, folder)


@pytest.mark.parametrize("name", [WEIGHTS, LAYERS])
def test_a_missing_file_is_named(stored, name):
    _, folder = stored
    (folder / name).unlink()
    with pytest.raises(GeneratorError, match=f"{name} is missing"):
        load_quantized(network, folder)
