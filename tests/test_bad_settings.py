"""Bad values of every setting, by its kind, and bad TOML: each is one short error that names the key, at once."""

import math
import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fbl_flower import cli
from fbl_flower.config import DataConfig, Setting, flatten, parse_config, parse_toml, shortened, surface
from fbl_flower.config.options import LARGEST_INT, option
from fbl_flower.data.batches import antialiased
from fbl_flower.data.datasets import load_parts
from fbl_flower.device import pick_device
from fbl_flower.errors import ConfigError

SURFACE = {setting.key: setting for setting in surface()}
NUMBERS = [s for s in surface() if isinstance(s.default, (int, float)) and not isinstance(s.default, bool)]
TEXTS = [s for s in surface() if isinstance(s.default, str) and not s.limits.choices]
LONGEST_MESSAGE = 500
WRONG_TYPES: st.SearchStrategy[object] = st.sampled_from([None, [], {}, b"1", 1j, [[["a"] * 9000]]])


def bad_ints(setting: Setting) -> st.SearchStrategy[object]:
    limits = setting.limits
    large = st.integers(int(limits.high) + 1, 10**40) | st.sampled_from([2**63, 2**64, 10**5000])
    small = st.integers(-(10**40), int(limits.low) - 1) | st.just(-(10**5000))
    return large | small | st.booleans() | st.floats(allow_nan=True) | st.text() | st.just("9" * 100_000)


def bad_floats(setting: Setting) -> st.SearchStrategy[object]:
    limits = setting.limits
    large = st.floats(limits.high, exclude_min=True) | st.integers(math.floor(limits.high) + 1, 10**400)
    small = st.floats(max_value=limits.above) if limits.above > -math.inf else st.floats(max_value=limits.low, exclude_max=True)
    return large | small | st.sampled_from([math.nan, math.inf, -math.inf]) | st.booleans() | st.text() | st.just("1" * 100_000)


def bad_texts(setting: Setting) -> st.SearchStrategy[object]:
    letters = st.characters(categories=["Cc", "Cs"])
    odd = st.tuples(st.text(max_size=20), letters, st.text(max_size=20)).map("".join)
    long = st.integers(1, 100).map(lambda more: "\u2028x" * (setting.limits.longest // 2 + more))
    empty = [] if setting.limits.empty else [st.just("")]
    return st.one_of(odd, long, st.integers(), st.floats(), st.booleans(), *empty)


def bad_values(setting: Setting) -> st.SearchStrategy[object]:
    """Values that the setting does not allow: too small, too large, no number, of the wrong type, or text that no text setting takes."""
    if setting.limits.choices:
        return st.text().filter(lambda text: text not in setting.limits.choices) | st.integers() | st.booleans() | WRONG_TYPES
    if isinstance(setting.default, bool):
        return st.integers() | st.floats() | st.text() | WRONG_TYPES
    makers = {int: bad_ints, float: bad_floats, str: bad_texts}
    return makers[type(setting.default)](setting) | WRONG_TYPES


@pytest.mark.parametrize("key", SURFACE)
@given(data=st.data())
def test_bad_values_are_one_short_error(key: str, data: st.DataObject) -> None:
    value = data.draw(bad_values(SURFACE[key]))
    with pytest.raises(ConfigError) as caught:
        parse_config({key: value})  # type: ignore[dict-item]
    (problem,) = caught.value.problems
    assert (problem.startswith(f"{key}: got ") and "allowed: " in problem) or f"up to {LARGEST_INT}" in problem
    assert len(str(caught.value)) < LONGEST_MESSAGE
    assert str(caught.value).replace("\n  - ", "").isprintable()


def problem_with(key: str, value: object) -> str:
    """Return the message about a value; nothing if it is accepted as it is."""
    try:
        parsed = flatten(parse_config({key: value}))  # type: ignore[dict-item]
    except ConfigError as error:
        return str(error)
    assert parsed[key] == value
    return ""


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda setting: setting.key)
def test_values_at_the_bounds_are_accepted(setting: Setting) -> None:
    """What may be said of them is that they contradict the defaults of other settings."""
    limits, kind = setting.limits, type(setting.default)
    least = limits.low if math.isfinite(limits.low) else math.nextafter(limits.above, math.inf)
    for bound in (least, limits.high):
        problem = problem_with(setting.key, kind(bound))
        assert "allowed: whole number" not in problem and "allowed: number" not in problem
        assert len(problem) < LONGEST_MESSAGE


@pytest.mark.parametrize("setting", TEXTS, ids=lambda setting: setting.key)
def test_the_longest_text_is_accepted(setting: Setting) -> None:
    problem = problem_with(setting.key, "x" * setting.limits.longest)
    assert "text of" not in problem and len(problem) < LONGEST_MESSAGE


@pytest.mark.parametrize(
    "limits", [{}, {"low": 0}, {"high": 9}, {"low": 0, "high": math.inf}, {"above": 0.0}, {"high": math.nan}]
)
def test_a_number_cannot_be_declared_without_both_bounds(limits: dict[str, float]) -> None:
    with pytest.raises(TypeError, match="a number needs both"):
        option(1, "x", **limits)  # type: ignore[arg-type]
    option(True, "x")
    option(1, "x", low=0, high=2)


def test_defaults_and_bounds_are_of_the_settings_type() -> None:
    for setting in NUMBERS:
        if isinstance(setting.default, int):
            assert isinstance(setting.limits.high, int) and isinstance(setting.limits.low, int), setting.key
        assert setting.limits.low <= setting.default <= setting.limits.high  # type: ignore[operator]
    assert all(setting.limits.longest <= 1_000_000 for setting in TEXTS)
    assert not SURFACE["output-dir"].limits.empty and not SURFACE["state-dir"].limits.empty


@pytest.mark.parametrize("text", ["=1," * 2000, "moon=0.1," * 400, "x" * 4000, "moon=1e999", "moon=nan", ","])
def test_shares_of_methods_are_echoed_in_part(text: str) -> None:
    with pytest.raises(ConfigError, match="clients.methods: ") as caught:
        parse_config({"clients.methods": text})
    assert len(str(caught.value)) < LONGEST_MESSAGE


@pytest.mark.parametrize("names", [
    "[" * 100_000, '["a", ' + "9" * 5000 + "]", '["a\\u0000", "b"]', '["\\ud800", "b"]', '["' + "x" * 100_000, "[1e999]", "@", "@/", "@~nobody-here/x",
    "@/dev/zero", "@" + "x" * 4000,
])  # fmt: skip
def test_odd_lists_of_class_names(names: str) -> None:
    with pytest.raises(ConfigError, match="data.classes: got ") as caught:
        parse_config({"data.name": "folder", "data.path": "x", "data.classes": names})
    assert len(str(caught.value)) < 600  # with the forms that are allowed


def test_a_class_file_may_not_be_longer_than_the_setting(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("\n".join(f"class {i}" for i in range(100_000)))
    with pytest.raises(ConfigError, match="a list of [0-9]+ characters, more than 1000000"):
        parse_config({"data.name": "folder", "data.path": "x", "data.classes": f"@{tmp_path}/names"})


def test_unknown_keys_are_short_too() -> None:
    for key in ("x" * 100_000, "a\x1b[31m", "a\nb", "", "seed\0"):
        with pytest.raises(ConfigError, match="unknown key") as caught:
            parse_config({key: 1})
        assert len(str(caught.value)) < LONGEST_MESSAGE and str(caught.value).replace("\n  - ", "").isprintable()
    start = time.monotonic()
    with pytest.raises(ConfigError, match="and 19950 more") as caught:
        parse_config({f"train.key-{i}": 1 for i in range(20_000)})
    assert len(caught.value.problems) == 20_000 and time.monotonic() - start < 5


def test_what_is_long_is_shown_in_part() -> None:
    assert shortened("abc") == "'abc'" and shortened(3) == "3" and shortened("x" * 80) == repr("x" * 80)
    assert shortened("y" * 1000) == "'" + "y" * 79 + "... (1000 characters)"
    assert shortened(10**5000) == "a huge value of type int"


# Values that are fine alone, and too much for this machine or these images


def test_more_threads_than_the_cores_can_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert pick_device(parse_config({"num-threads": 32, "device": "cpu"})).type == "cpu"
    with pytest.raises(ConfigError, match="num-threads: got 33; this machine has 8 cores. Set at most 4 per core"):
        pick_device(parse_config({"num-threads": 33, "device": "cpu"}))


def test_images_that_memory_cannot_hold_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fbl_flower.data.datasets.free_bytes", lambda: 100 * 2**20)
    with pytest.raises(
        ConfigError, match=r"data.image-size: 1797 images of 1024 x 1024 pixels take 1.8 GiB, and 0.1 GiB are free"
    ):
        load_parts(DataConfig(name="digits", image_size=1024))
    assert load_parts(DataConfig(name="digits", image_size=12)).image_size == 12


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError("other")]
)
def test_memory_that_runs_out_is_a_setting(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("fbl_flower.data.datasets.antialiased", fail)
    wanted = RuntimeError if str(error) == "other" else ConfigError
    with pytest.raises(wanted):
        load_parts(DataConfig(name="digits", image_size=13))


def test_huge_images_are_resized_a_few_at_a_time_to_the_same_pixels() -> None:
    images = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(antialiased(images, 50), torch.cat([antialiased(piece, 50) for piece in images.split(2)]))


# TOML

N = 200_000


@pytest.mark.parametrize("text", [
    "a=" + "[" * N, "a=" + "{a=" * N, "a." * N + "a=1", "[" + "a." * N + "a]", '"a".' * N + "a=1", "a = " + "9" * N, "a='" + "\\'" * N, 'a="' + '\\"' * N,
    'a="""' + '""\\' * N, "a" * N, '"' * N, "a=1\na=2", "[a]\n[a]", "a=0x", "a='\0'", "a=1e", "a", "=", "[[a]]\n[a]", 'a="\\ud800"',
])  # fmt: skip
def test_odd_toml_is_refused_at_once(text: str) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError):
        parse_toml(text)
    assert time.monotonic() - start < 2


def test_bounds_do_not_look_into_texts_and_comments() -> None:
    many = "[" * 50 + "a.b" * 50
    text = f"""a = '{many}' # don't {many}\nb = "\\"{many}"\nc = '''\n{many}'\n'''\nd = \"\"\"\n{many}"\n\\\"\"\"\"\n[x.'{many}']\ny = [[1.5], [2]]\n"""
    assert parse_toml(text)["x"][many] == {"y": [[1.5], [2]]}


# The command line

SETTINGS = [
    ("seed=" + "9" * 5000, "seed: "), ("seed=0x" + "f" * 9000, "seed: "), ("seed=" + "[" * 5000, "seed: "), ("seed=" + "[" * 9 + "]" * 9, "seed: "),
    ("seed=" + "{a=" * 500 + "1" + "}" * 500, "seed: "), ("a." * 40 + "a=1", "a.a."), ("a." * 5000 + "a=1", "-c: got "), ("x" * 100_000, "-c: got "), ("x" * 100_000 + "=1", "-c: got "),
    ("num-threads=100000", "num-threads: "), ("num-clients=1000000", "num-clients: "), ("num-server-rounds=9999999999", "num-server-rounds: "),
    ("train.batch-size=4611686018427387904", "train.batch-size: "), ("model.projection-width=1000000", "model.projection-width: "),
    ("fedgen.hidden-width=1000000", "fedgen.hidden-width: "), ("train.learning-rate=1e300", "train.learning-rate: "), ("timeout=inf", "timeout: "),
    ("timeout=nan", "timeout: "), ("timeout=1e999", "timeout: "), ("data.noise=1e300", "data.noise: "), ("output-dir=''", "output-dir: "),
    ("state-dir=''", "state-dir: "), ("output-dir='a\0b'", "output-dir: "), ('output-dir="a\\u0000b"', "output-dir: "), ('data.path="a\\u001b[31m"', "data.path: "),
    ("data.path='" + "x" * 100_000 + "'", "data.path: "), ("data.classes='" + "x" * 100_000 + "'", "data.classes: "), ("seed=1979-05-27", "seed: "),
    ("seed=[1, 2]", "seed: "), ("data=1", "data: "), ("seed.x=1", "seed.x: "), ("model.width='\u202e'", "model.width: "),
    ("clients.methods='" + "x=1," * 9000 + "'", "clients.methods: "), ("data.background='" + "x" * 4000 + "'", "data.background: "),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "named"), SETTINGS, ids=[named + str(i) for i, (_, named) in enumerate(SETTINGS)])
def test_the_command_line_refuses_at_once(argument: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    assert cli.main(["run", "-c", argument]) == 2
    assert time.monotonic() - start < 1
    text = capsys.readouterr().err
    assert f"- {named}" in text or f"- '{named}" in text, text
    assert "Traceback" not in text and len(text) < 900


@pytest.mark.parametrize("make", [
    lambda path: path.mkdir(), lambda path: None, lambda path: path.write_bytes(b"seed = 1\n\xff"), lambda path: path.write_bytes(b"a = '\0'"),
    lambda path: path.write_text("seed = 1\n" * 500_000), lambda path: path.write_text("seed = 1\nseed = 2"), lambda path: os.mkfifo(path),
    lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path), lambda path: path.write_text("a = " + "[" * 100_000),
    lambda path: path.write_text("seed = " + "9" * 100_000), lambda path: path.write_bytes("seed = 1".encode("utf-16")),
], ids=["directory", "missing", "not-utf8", "nul", "huge", "twice", "pipe", "endless", "loop", "deep", "digits", "utf16"])  # fmt: skip
def test_a_file_that_is_no_toml_is_one_error(make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "x.toml")
    start = time.monotonic()
    assert cli.main(["run", "-c", f"{tmp_path}/x.toml"]) == 2
    assert time.monotonic() - start < 1
    text = capsys.readouterr().err
    assert "x.toml: cannot be read as TOML: " in text and "Traceback" not in text and len(text) < LONGEST_MESSAGE


@pytest.mark.parametrize("name", ["~nobody-here/x.toml", "x" * 5000 + ".toml", "a\0.toml", "\udcff.toml"])
def test_a_path_that_is_none_is_one_error(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "-c", name]) == 2
    text = capsys.readouterr().err
    assert "cannot be read as TOML: " in text and "Traceback" not in text and len(text) < LONGEST_MESSAGE


@pytest.mark.parametrize("content", [
    "base = " + "[" * 9000, "title = " + "9" * 9000, "note = [" + "1," * 9000 + "]", "config = [" + "1," * 9000 + "]", "small = '" + "x" * 9000 + "'",
    "[config]\n" + "x" * 9000 + " = 1", "[config]\nseed = [" + "1," * 9000 + "]", "x" * 9000 + " = 1",
    'title = "a\\u001b[31m"', "title = '" + "x" * 9000 + "'", "kind = [" + "1," * 9000 + "]", "report-rounds = [" + "1," * 9000 + "]", "target-accuracy = '" + "x" * 9000 + "'",
])  # fmt: skip
def test_odd_experiment_rows_are_a_short_error(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "row.toml").write_text(content)
    assert cli.main(["sweep", str(tmp_path / "row.toml")]) == 2
    text = capsys.readouterr().err
    assert "row.toml: " in text and "Traceback" not in text and len(text) < 1500


@pytest.mark.parametrize("base", ["a\\u0000b", "x" * 9000, "/dev/zero", "."])
def test_odd_bases_of_experiment_rows(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "_base.toml").write_text(f'base = "{base}"')
    (tmp_path / "row.toml").write_text("title = 'x'")
    assert cli.main(["sweep", str(tmp_path / "row.toml")]) == 2
    assert "Traceback" not in capsys.readouterr().err
