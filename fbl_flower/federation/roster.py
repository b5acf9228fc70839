"""Which node hosts which client.

The federation has `num-clients` clients however many nodes connect: node p of n hosts the clients k with k mod n = p. So two
nodes, Flower's default, run the same ten clients as ten nodes do, only with less in parallel; and node ids, which
Flower draws anew each run, decide nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from flwr.app import RecordDict
from flwr.serverapp import Grid

from fbl_flower.errors import RunFailed
from fbl_flower.federation.exchange import ask
from fbl_flower.federation.wire import DESCRIBE, NodeDescription, code_fingerprint
from fbl_flower.training.roles import stated_problems

_PAUSE = 0.05


@dataclass(frozen=True, kw_only=True)
class Roster:
    """Who is there.

    Attributes:
        node_of: The node id of each client that some node hosts, by client number.
        absent: Clients that no node hosts, because it did not come or did not answer.
        described: What each client's node says of itself, by client number.
    """

    node_of: dict[int, int]
    absent: list[int]
    described: dict[int, NodeDescription] = field(default_factory=dict)


def call_roll(grid: Grid, *, num_clients: int, timeout: float) -> Roster:
    """Wait for the nodes, ask each who it is, and give every client to a node.

    Raises:
        RunFailed: No node came, none described itself, two claim the same place, or one runs other code than the server or states a
            capability or a method that there is not.
    """
    deadline = time.monotonic() + timeout
    nodes = _wait_for_nodes(grid, 1, deadline)
    described = _describe(grid, nodes, deadline)
    expected = max(d.num_partitions for d in described.values())
    if len(nodes) < expected:
        nodes = _wait_for_nodes(grid, expected, deadline)
        described |= _describe(grid, [n for n in nodes if n not in described], deadline, others=True)
    for description in described.values():
        if description.code != code_fingerprint():
            raise RunFailed(
                f"node {description.partition_id} runs other code than the server. In simulation, clients import from the folder in which "
                "Flower's background SuperLink was first started; stop it with `fbl-flower superlink stop` and run again. "
                "In a deployment, install the same version on every machine."
            )
    wrong = [
        f"node {d.partition_id}: {problem}"
        for _, d in sorted(described.items())
        for problem in stated_problems(d.capability, d.method)
    ]
    if wrong:
        raise RunFailed("nothing was trained; " + "; ".join(wrong))
    place: dict[int, int] = {}
    for node, description in sorted(described.items()):
        if description.partition_id in place:
            raise RunFailed(f"two nodes say that they are partition {description.partition_id}; give each its own partition-id")
        place[description.partition_id] = node
    hosts = {client: place[client % expected] for client in range(num_clients) if client % expected in place}
    if not hosts:
        raise RunFailed(f"{len(nodes)} nodes connected, and none hosts a client; wanted partition-id from 0 to {expected - 1}")
    return Roster(
        node_of=hosts,
        absent=[client for client in range(num_clients) if client not in hosts],
        described={client: described[node] for client, node in hosts.items()},
    )


def _wait_for_nodes(grid: Grid, number: int, deadline: float) -> list[int]:
    """Return the connected nodes once there are `number` of them, or, at the deadline, those that came."""
    while len(nodes := list(grid.get_node_ids())) < number and time.monotonic() < deadline:
        time.sleep(_PAUSE)
    if not nodes:
        raise RunFailed("no node connected in time")
    return nodes


def _describe(grid: Grid, nodes: list[int], deadline: float, *, others: bool = False) -> dict[int, NodeDescription]:
    """Ask nodes who they are. A node that does not answer is absent, unless nobody does; `others` says that some did before."""
    if not nodes:
        return {}
    answers = ask(grid, {node: (node, RecordDict()) for node in nodes}, DESCRIBE, timeout=max(deadline - time.monotonic(), 1.0))
    descriptions: dict[int, NodeDescription] = {}
    for node, content in answers.contents.items():
        if "node" in content:
            descriptions[node] = NodeDescription.from_record(content)
    if len(descriptions) < len(answers.contents) or (not descriptions and not others):
        reasons = "; ".join(sorted(set(answers.failures.values()))) or "they answered as another app"
        raise RunFailed(
            f"{len(nodes) - len(descriptions)} of {len(nodes)} nodes did not describe themselves as FBL clients: {reasons}. "
            "In simulation, Flower's background SuperLink may have been started in another project's folder; stop it "
            "with `fbl-flower superlink stop` and run again."
        )
    return descriptions
