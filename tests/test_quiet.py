"""Lines of other libraries that are left out of every log, and what is not."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest

from fbl_flower.quiet import quiet_libraries

NUMPY = "__array__ implementation doesn't accept a copy keyword"
RAY = "Tip: In future versions of Ray, Ray will no longer override"


def test_only_named_warnings_are_left_out() -> None:
    cases: list[tuple[str, type[Warning], str, bool]] = [
        (NUMPY, DeprecationWarning, "diffusers.schedulers.scheduling_dpmsolver_multistep", False),
        ("old", FutureWarning, "torch", False),
        ("old", PendingDeprecationWarning, "transformers.models.clip", False),
        (RAY, FutureWarning, "ray._private.worker", False),
        ("Another tip", FutureWarning, "ray._private.worker", True),
        (RAY, UserWarning, "ray._private.worker", True),
        ("old", DeprecationWarning, "torchaudio", True),  # begins like torch
        ("no gradient", UserWarning, "torch.nn.modules", True),
        ("old", DeprecationWarning, "fbl_flower.params", True),
        ("overflow", RuntimeWarning, "numpy", True),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # as Flower's Ray code does for deprecations
        quiet_libraries()
        for text, category, module, _ in cases:
            warnings.warn_explicit(text, category, "x.py", 1, module=module)
    shown = [(str(warning.message), warning.category) for warning in caught]
    assert shown == [(text, category) for text, category, _, is_shown in cases if is_shown]


@pytest.mark.parametrize(
    ("logger", "text"),
    [
        ("torch.utils.cpp_extension", "No CUDA runtime is found, using CUDA_HOME='%s'"),
        ("matplotlib.font_manager", "Matplotlib is building the font cache; this may take a moment."),
        ("flwr", "Manually terminating %s"),
    ],
)
def test_only_named_log_lines_are_left_out(logger: str, text: str, caplog: pytest.LogCaptureFixture) -> None:
    quiet_libraries()
    quiet_libraries()
    source = logging.getLogger(logger)
    assert len([f for f in source.filters if type(f).__module__ == "fbl_flower.quiet"]) == 1
    with caplog.at_level(logging.WARNING, logger=logger):
        source.addHandler(caplog.handler)
        try:
            source.warning(text, *["x"] * text.count("%s"))
            source.error("Failed: %s", text)
            source.warning("something else")
        finally:
            source.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {f"Failed: {text}", "something else"}


def test_flowers_processes_are_quiet_before_torch() -> None:
    """Ray's note comes while the server's thread imports; so the filters are there before anything slow is imported."""
    code = (
        "import sys, warnings\nimport fbl_flower.federation\n"
        f"assert 'torch' not in sys.modules and 'flwr' not in sys.modules\n"
        f"warnings.warn_explicit({RAY!r}, FutureWarning, 'x.py', 1, module='ray._private.worker')\n"
        "warnings.warn_explicit('stays', FutureWarning, 'x.py', 1, module='ray._private.worker')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "x.py:1: FutureWarning: stays\n"
