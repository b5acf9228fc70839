"""The configuration: defaults, round trips, and one clear error for everything that is wrong."""

import math
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fbl_flower.config import DATA_NAMES, RunConfig, flatten, parse_config, surface
from fbl_flower.errors import ConfigError, DataError, FBLError

SURFACE = {setting.key: setting for setting in surface()}


def problems_of(run_config: dict[str, object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(run_config)  # type: ignore[arg-type]
    return caught.value.problems


def test_nothing_given_is_all_defaults() -> None:
    config = parse_config({})
    assert config == RunConfig()
    assert (config.seed, config.num_clients, config.data.alpha, config.balancing.drop) == (0, 10, 0.1, 0.5)


def test_keys_are_the_fields_with_hyphens() -> None:
    config = parse_config({"train.learning-rate": 0.25, "num-server-rounds": 3, "data.name": "digits", "train.augment": False})
    assert config.train.learning_rate == 0.25
    assert config.num_server_rounds == 3
    assert config.data.name == "digits"
    assert config.train.augment is False


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        RunConfig().seed = 1  # type: ignore[misc]


def test_surface_lists_every_key_once_with_help_and_a_default_that_is_allowed() -> None:
    assert len(SURFACE) == len(surface())
    assert SURFACE.keys() == flatten(RunConfig()).keys()
    for setting in surface():
        assert setting.help and setting.allowed
        assert parse_config({setting.key: setting.default}) == RunConfig()
    assert SURFACE["balancing.drop"].default == 0.5
    assert SURFACE["balancing.drop"].allowed == "number >= 0 and <= 1"
    assert SURFACE["data.alpha"].allowed == "number > 0 and <= 1e+06"
    assert SURFACE["model.norm"].allowed == "group | batch"
    assert SURFACE["train.augment"].allowed == "true | false"
    assert SURFACE["train.epochs"].allowed == "whole number >= 1 and <= 10000"


OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**40),
        "num-clients": st.integers(1, 1000),
        "fraction-train": st.floats(0.001, 1.0),
        "output-dir": st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=10).filter(
            lambda text: not text.startswith("~")
        ),  # "~name" wants a home directory
        "data.alpha": st.floats(1e-6, 1e6),
        "data.partition": st.sampled_from(["dirichlet", "iid"]),
        "balancing.enabled": st.booleans(),
        "balancing.sampling": st.sampled_from(["loss", "random", "none"]),
        "balancing.replay-ratio": st.floats(0.0, 1.0),
        "train.batch-size": st.integers(1, 512),
        "warm-start.enabled": st.booleans(),
    },
)


@given(OVERRIDES)
def test_flatten_and_parse_are_inverse(overrides: dict[str, bool | int | float | str]) -> None:
    config = parse_config(overrides)
    flat = flatten(config)
    assert parse_config(flat) == config
    assert {key: flat[key] for key in overrides} == overrides
    assert {key: value for key, value in flat.items() if key not in overrides} == {
        key: SURFACE[key].default for key in flat if key not in overrides
    }


def test_a_whole_number_serves_where_a_number_is_wanted() -> None:
    config = parse_config({"fraction-train": 1, "train.learning-rate": 2})
    assert config.fraction_train == 1.0 and isinstance(config.fraction_train, float)
    assert config.train.learning_rate == 2.0 and isinstance(config.train.learning_rate, float)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("num-clients", "abc", "got 'abc' (str); allowed: whole number >= 1 and <= 100000"),
        ("num-clients", True, "got True (bool); allowed: whole number >= 1 and <= 100000"),
        ("num-clients", 2.0, "got 2.0 (float); allowed: whole number >= 1 and <= 100000"),
        ("num-clients", 0, "got 0 (int); allowed: whole number >= 1 and <= 100000"),
        ("data.alpha", "0.1", "got '0.1' (str); allowed: number > 0 and <= 1e+06"),
        ("data.alpha", True, "got True (bool); allowed: number > 0 and <= 1e+06"),
        ("data.alpha", 0.0, "got 0.0 (float); allowed: number > 0 and <= 1e+06"),
        ("data.alpha", 0, "got 0.0 (float); allowed: number > 0 and <= 1e+06"),
        ("data.alpha", math.nan, "got nan (float); allowed: number > 0 and <= 1e+06"),
        ("data.alpha", 1e308, "got 1e+308 (float); allowed: number > 0 and <= 1e+06"),
        ("data.alpha", math.inf, "got inf (float); allowed: number > 0 and <= 1e+06"),
        ("balancing.drop", 1.1, "got 1.1 (float); allowed: number >= 0 and <= 1"),
        ("balancing.drop", -0.1, "got -0.1 (float); allowed: number >= 0 and <= 1"),
        ("fraction-train", 0.0, "got 0.0 (float); allowed: number > 0 and <= 1"),
        ("train.momentum", 1.0, "got 1.0 (float); allowed: number >= 0 and <= 0.999"),
        ("data.num-test", -2, "got -2 (int); allowed: whole number >= -1 and <= 1000000000"),
        ("balancing.enabled", 1, "got 1 (int); allowed: true | false"),
        ("balancing.enabled", "true", "got 'true' (str); allowed: true | false"),
        ("data.name", "imagenet", f"got 'imagenet' (str); allowed: {' | '.join(DATA_NAMES)}"),
        (
            "generator.name",
            "gan",
            "got 'gan' (str); allowed: auto | diffusion | federated | text-to-image | public-images | own-images",
        ),
        ("balancing.sampling", True, "got True (bool); allowed: loss | random | none"),
        ("output-dir", 3, "got 3 (int); allowed: text of 1 to 4096 characters"),
        ("seed", 2**63, f"got {2**63}; Flower carries whole numbers of 64 bits, up to {2**63 - 1}"),
        ("data.num-private", 10**30, f"got {10**30}; Flower carries whole numbers of 64 bits, up to {2**63 - 1}"),
    ],
)
def test_a_wrong_value_is_one_problem_that_names_key_value_and_what_is_allowed(key: str, value: object, wanted: str) -> None:
    assert problems_of({key: value}) == [f"{key}: {wanted}"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("balancing.drop", 0.0), ("balancing.drop", 1.0), ("train.clip-norm", 0.0), ("seed", 0), ("seed", 2**63 - 1)],
)
def test_the_ends_of_a_range_are_allowed(key: str, value: float) -> None:
    assert flatten(parse_config({key: value}))[key] == value


def test_an_unknown_key_gets_the_nearest_known_one() -> None:
    assert problems_of({"train.learning_rate": 0.1}) == ["train.learning_rate: unknown key; did you mean train.learning-rate?"]
    assert problems_of({"zzz": 1}) == ["zzz: unknown key"]


def test_several_problems_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(
            {
                "zzz": 1,
                "num-clients": "many",
                "data.alpha": -1.0,
                "balancing.alignment": False,
                "balancing.average-embeddings": True,
            }
        )
    error = caught.value
    assert [problem.split(":")[0] for problem in error.problems] == [
        "zzz", "num-clients", "data.alpha", "balancing.average-embeddings",
    ]  # fmt: skip
    assert str(error).startswith("4 problems in the configuration:\n  - zzz: unknown key\n  - num-clients: got 'many'")
    assert error.public == str(error)
    assert str(ConfigError(["x: y"])).startswith("1 problem in the configuration:")


@pytest.mark.parametrize(
    ("run_config", "wanted"),
    [
        (
            {"data.name": "folder", "data.classes": "a,b"},
            "data.path: empty; the data set 'folder' needs the path of its images",
        ),
        ({"data.name": "tiny-imagenet"}, "data.path: empty; the data set 'tiny-imagenet' needs the path"),
        (
            {"data.classes": "cat,dog"},
            "data.classes: got 'cat,dog'; the data set 'mnist5k' has its own; allowed with folder | parquet",
        ),
        (
            {"data.name": "folder", "data.path": "x", "data.classes": "cat, dog,cat"},
            "data.classes: got 'cat, dog,cat'; allowed: names",
        ),
        (
            {"data.name": "parquet", "data.path": "x", "data.classes": "cat,,dog"},
            "data.classes: got 'cat,,dog'; allowed: names",
        ),
        ({"data.channels": 2}, "data.channels: got 2; allowed: 0 | 1 | 3"),
        ({"data.path": "x.parquet"}, "data.path: got 'x.parquet'; the data set 'mnist5k' comes with a package"),
        ({"data.num-public": 10, "data.num-validation": 11}, "data.num-validation: got 11"),
        ({"balancing.alignment": False, "balancing.average-embeddings": True}, "balancing.average-embeddings: true"),
        (
            {"output-dir": "~no-such-user/runs"},
            "output-dir: got '~no-such-user/runs'; this machine knows no such home directory",
        ),
        (
            {"data.name": "folder", "data.path": "~no-such-user"},
            "data.path: got '~no-such-user'; this machine knows no such home",
        ),
    ],
)
def test_settings_that_contradict_each_other(run_config: dict[str, object], wanted: str) -> None:
    (problem,) = problems_of(run_config)
    assert problem.startswith(wanted)


def test_what_leaves_the_machine_of_an_error_is_its_name_unless_said_otherwise() -> None:
    assert DataError("client 3 has no class 7").public == "DataError"
    assert FBLError("secret", public="for all").public == "for all"
    assert str(DataError("client 3 has no class 7")) == "client 3 has no class 7"
