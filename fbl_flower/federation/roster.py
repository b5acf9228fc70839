"""Which node hosts which client.

The federation has `num-clients` clients however many nodes connect: node p of n hosts the clients k with k mod n = p. So two
nodes, Flower's default, run the same ten clients as ten nodes do, only with less in parallel; and node ids, which
Flower draws anew each run, decide nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from logging import WARNING

from flwr.app import RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from fbl_flower.errors import RunFailed
from fbl_flower.federation.exchange import ask
from fbl_flower.federation.wire import DESCRIBE, NodeDescription, code_fingerprint
from fbl_flower.training.roles import stated_problems

_FIRST_PAUSE, _LAST_PAUSE = 0.05, 1.0  # seconds between two looks who is there


@dataclass(frozen=True, kw_only=True)
class Member:
    """One node: the id by which messages reach it, and what it said of itself."""

    node: int
    description: NodeDescription


@dataclass(frozen=True, kw_only=True)
class Roster:
    """Who has come.

    Attributes:
        num_clients: Clients of the federation.
        num_partitions: Nodes that the federation is laid out for.
        members: The nodes, by partition.
    """

    num_clients: int
    num_partitions: int
    members: dict[int, Member]

    @property
    def node_of(self) -> dict[int, int]:
        """The node id of each client that some node hosts, by client number."""
        places = {client: self.place_of(client) for client in range(self.num_clients)}
        return {client: self.members[place].node for client, place in places.items() if place in self.members}

    @property
    def described(self) -> dict[int, NodeDescription]:
        """What the node of each hosted client said of itself, by client number."""
        return {client: self.members[self.place_of(client)].description for client in self.node_of}

    @property
    def absent(self) -> list[int]:
        """Clients that no node hosts, because it did not come or did not answer."""
        return [client for client in range(self.num_clients) if self.place_of(client) not in self.members]

    def place_of(self, client: int) -> int:
        """Return the partition whose node hosts `client`."""
        return client % self.num_partitions

    def clients_of(self, place: int) -> list[int]:
        """Return the clients that the node of a partition hosts."""
        return list(range(place, self.num_clients, self.num_partitions))


def call_roll(grid: Grid, *, num_clients: int, timeout: float) -> Roster:
    """Wait for the nodes, ask each who it is, and give every client to a node.

    Raises:
        RunFailed: No node came, none described itself, two claim the same place or differ in how many there are, or one runs other code than the server or states a
            capability or a method that there is not.
    """
    deadline = time.monotonic() + timeout
    nodes = _wait_for_nodes(grid, 1, deadline)
    described = _describe(grid, nodes, deadline)
    expected = max(d.num_partitions for d in described.values())
    if len(nodes) < expected:
        nodes = _wait_for_nodes(grid, expected, deadline)
        described |= _describe(grid, [n for n in nodes if n not in described], deadline, others=True)
    if len({d.num_partitions for d in described.values()}) > 1:
        said = ", ".join(f"node {d.partition_id}: {d.num_partitions}" for _, d in sorted(described.items()))
        raise RunFailed(f"the nodes say different num-partitions ({said}); give all of them the number of nodes")
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
    members: dict[int, Member] = {}
    for node, description in sorted(described.items()):
        if description.partition_id in members:
            raise RunFailed(f"two nodes say that they are partition {description.partition_id}; give each its own partition-id")
        members[description.partition_id] = Member(node=node, description=description)
    roster = Roster(num_clients=num_clients, num_partitions=expected, members=members)
    if not roster.node_of:
        raise RunFailed(f"{len(nodes)} nodes connected, and none hosts a client; wanted partition-id from 0 to {expected - 1}")
    return roster


def _wait_for_nodes(grid: Grid, number: int, deadline: float) -> list[int]:
    """Return the connected nodes once there are `number` of them, or, at the deadline, those that came."""
    pause = _FIRST_PAUSE
    while len(nodes := list(grid.get_node_ids())) < number and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, _LAST_PAUSE)
    if not nodes:
        raise RunFailed("no node connected in time")
    return nodes


def _describe(grid: Grid, nodes: list[int], deadline: float, *, others: bool = False) -> dict[int, NodeDescription]:
    """Ask nodes who they are. A node that does not answer is absent, unless nobody does; `others` says that some did before."""
    if not nodes:
        return {}
    answers = ask(grid, {node: (node, RecordDict()) for node in nodes}, DESCRIBE, timeout=max(deadline - time.monotonic(), 1.0))
    for reason in answers.failures.values():
        log(WARNING, "A node did not say who it is: %s", reason)
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
