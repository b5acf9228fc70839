"""Stable Diffusion 1.5 in its real size: the configuration is the published one, the weights are random.

One test, of minutes, with a peak below 8 GB: every component is built, written, and dropped before the next.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_pipelines import save_index, save_scheduler, save_tokenizer

from fbl_flower.device import return_freed_memory

pytestmark = pytest.mark.slow

_UNET = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, "cross_attention_dim": 768, "attention_head_dim": 8,
}  # fmt: skip
_TEXT = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 77, "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip

# Every stage is a process of its own, so that its time and its peak are its own.
_REPORT = """
import json, pathlib, time
def peak():
    return int(next(l for l in pathlib.Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1]) * 1024
start = time.perf_counter(), time.process_time()
def report(**more):
    print(json.dumps(more | {"peak": peak(), "wall": time.perf_counter() - start[0], "cpu": time.process_time() - start[1]}))
"""
_QUANTIZE = """
import sys
from pathlib import Path
from fbl_flower.generation.pipeline_store import quantize_pipeline
info = quantize_pipeline(sys.argv[1], Path(sys.argv[2]), tiny_decoder=sys.argv[3])
report(parameters=info.num_parameters)
"""
_GENERATE = """
import hashlib, sys, time
from small_pipelines import load
generator = load(sys.argv[1], generator__resolution=256, generator__steps=2, generator__guidance=1, generator__batch_size=1)
_ = generator._components  # read when they are first needed
loaded = time.perf_counter() - start[0], time.process_time() - start[1]
image = generator.generate([3], [7])
report(load_wall=loaded[0], load_cpu=loaded[1], digest=hashlib.sha256(image.numpy().tobytes()).hexdigest(), shape=list(image.shape))
"""


def stage(script: str, *arguments: Path) -> dict:
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _REPORT + script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def write_source(folder: Path) -> None:
    """Write the pipeline in bf16 with random weights; one component is in memory at a time."""
    import torch
    from accelerate import init_empty_weights
    from diffusers import AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    save_tokenizer(folder / "tokenizer")
    save_scheduler(folder / "scheduler")
    save_index(folder, vae="AutoencoderTiny")
    stream = torch.Generator().manual_seed(0)
    builds = {
        "vae": AutoencoderTiny, "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**_TEXT)),
        "unet": lambda: UNet2DConditionModel(**_UNET),
    }  # fmt: skip
    for name, build in builds.items():
        with init_empty_weights(include_buffers=False):
            model = build()
        state = {}
        for key, tensor in model.state_dict().items():
            scale = 0.02 if tensor.ndim > 1 else 0.0
            state[key] = torch.randn(tensor.shape, generator=stream, dtype=torch.float32).mul_(scale).bfloat16()
            if key.endswith("weight") and tensor.ndim == 1:  # of a normalisation
                state[key].fill_(1.0)
        model.load_state_dict(state, strict=True, assign=True)
        model.save_pretrained(folder / name)
        del model, state


def test_stable_diffusion_of_real_size_in_four_bits(tmp_path):
    write_source(tmp_path / "source")
    return_freed_memory()
    made = stage(_QUANTIZE, tmp_path / "source", tmp_path / "sd", tmp_path / "source" / "vae")
    assert made["parameters"]["unet"] == 859_520_964  # as published
    num_bytes = sum(file.stat().st_size for file in (tmp_path / "sd").rglob("*") if file.is_file())
    assert num_bytes <= 0.2 * 4 * sum(made["parameters"].values())
    first, second = stage(_GENERATE, tmp_path / "sd"), stage(_GENERATE, tmp_path / "sd")
    print(json.dumps({"bytes": num_bytes, "quantize": made, "generate": first, "again": second}, indent=1))
    assert first["shape"] == [1, 1, 8, 8]
    assert first["digest"] == second["digest"]
    assert max(made["peak"], first["peak"], second["peak"]) < 8e9
