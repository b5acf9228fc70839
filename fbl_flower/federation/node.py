"""What a node says of itself: its node config, read and checked."""

from __future__ import annotations

from flwr.app import Context

from fbl_flower.errors import ConfigError
from fbl_flower.federation.gate import LONGEST_TEXT, one_line
from fbl_flower.federation.wire import NodeDescription, code_fingerprint

_KEEP_STATE_DAYS = 30.0


def describe_node(context: Context) -> NodeDescription:
    """Return which partition the node is, its name, what it states of its role, and which code it runs."""
    node = context.node_config
    partition_id = int(str(node.get("partition-id", 0)))
    name = one_line(str(node.get("name", "")), LONGEST_TEXT)
    return NodeDescription(
        partition_id=partition_id,
        num_partitions=int(str(node.get("num-partitions", 1))),
        code=code_fingerprint(),
        name=name or f"node-{partition_id}",
        capability=one_line(str(node.get("capability", "")), LONGEST_TEXT),
        method=one_line(str(node.get("method", "")), LONGEST_TEXT),
        trains_generator=trains_generator(context),
    )


def trains_generator(context: Context) -> bool:
    """Return whether the node trains a federated generator (`trains-generator` of its node config; it does unless told otherwise).

    Raises:
        ConfigError: It is neither true nor false.
    """
    given = context.node_config.get("trains-generator", True)
    if not isinstance(given, bool):
        raise ConfigError([f"trains-generator (node config): got {given!r}; allowed: true | false"])
    return given


def keep_state_days(context: Context) -> float:
    """Return after how many days the state of an untouched run is deleted (`keep-state-days` of the node config; 0: never).

    Raises:
        ConfigError: It is no number >= 0.
    """
    given = context.node_config.get("keep-state-days", _KEEP_STATE_DAYS)
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not given >= 0:
        raise ConfigError([f"keep-state-days (node config): got {given!r}; allowed: number >= 0, and 0 keeps all"])
    return float(given)
