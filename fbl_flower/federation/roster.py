"""Which node hosts which client.

The federation has `num-clients` clients however many nodes connect: node p of n hosts the clients k with k mod n = p. So two
nodes, Flower's default, run the same ten clients as ten nodes do, only with less in parallel; and node ids, which
Flower draws anew each run, decide nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from logging import WARNING

from flwr.app import RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from fbl_flower.errors import RunFailed
from fbl_flower.federation.exchange import Answers, ask
from fbl_flower.federation.gate import read_description
from fbl_flower.federation.wire import DESCRIBE, NodeDescription, code_fingerprint
from fbl_flower.training.roles import stated_problems

OTHER_CODE = "it runs other code than the server"
_OTHER_FOLDER = (
    "In simulation, clients import from the folder in which Flower's background SuperLink was first started; stop it with "
    "`fbl-flower superlink stop` and run again. In a deployment, install the same version on every machine."
)
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


def objection(description: NodeDescription, *, num_partitions: int) -> str:
    """Say why a node cannot take part, whoever else does; empty: it can."""
    if description.code != code_fingerprint():
        return OTHER_CODE
    if description.num_partitions != num_partitions:
        return (
            f"its num-partitions is {description.num_partitions}, and not {num_partitions}; give all nodes the number of nodes"
        )
    return "; ".join(stated_problems(description.capability, description.method))


def call_roll(grid: Grid, *, num_clients: int, timeout: float) -> Roster:
    """Wait for the nodes, ask each who it is, and give every client to a node.

    A node that cannot take part is refused by name, and the others go on without it. Of two nodes that claim one partition, the
    one that came first has it. How many nodes there are is what most of them say.

    Raises:
        RunFailed: No node came, or none can take part, or as many nodes say one number of nodes as another.
    """
    deadline = time.monotonic() + timeout
    described: dict[int, NodeDescription] = {}
    silent: dict[int, str] = {}  # why, by node
    nodes = _wait_for_nodes(grid, 1, deadline)
    while newcomers := [node for node in nodes if node not in described and node not in silent]:
        answers = _describe(grid, newcomers, deadline)
        described, silent = described | answers.values, silent | answers.failures
        said = _most_said(described)
        # Not for all that the first of them says there are: it may be wrong, and the others tell.
        number = min(max(said, default=1), 2 * len(nodes) if len(said) == 1 else len(nodes) + 1)
        if len(nodes) < number:
            nodes = _wait_for_nodes(grid, number, deadline)
    for node, reason in silent.items():
        log(WARNING, "Node %d did not say who it is: %s", node, reason)
    if not described:
        reasons = "; ".join(sorted(set(silent.values())))
        raise RunFailed(f"none of {len(nodes)} nodes described itself as an FBL client: {reasons}. {_OTHER_FOLDER}")
    said = _most_said(described)
    if len(said) > 1:
        numbers = ", ".join(f"{d.name}: {d.num_partitions}" for d in described.values())
        raise RunFailed(f"the nodes say different num-partitions ({numbers}); give all of them the number of nodes")
    members, refused = _seated(described, num_partitions=said[0])
    for name, reason in refused:
        log(WARNING, "Node %s is refused: %s", name, reason)
    roster = Roster(num_clients=num_clients, num_partitions=said[0], members=members)
    if not roster.node_of:
        if all(reason == OTHER_CODE for _, reason in refused) and refused:
            raise RunFailed(f"every node is refused: {OTHER_CODE}. {_OTHER_FOLDER}")
        if refused:
            raise RunFailed("nothing was trained; " + "; ".join(f"{name}: {reason}" for name, reason in refused))
        raise RunFailed(f"{len(nodes)} nodes connected, and none hosts a client; wanted partition-id from 0 to {said[0] - 1}")
    return roster


def _seated(
    described: Mapping[int, NodeDescription], *, num_partitions: int
) -> tuple[dict[int, Member], list[tuple[str, str]]]:
    """Return the nodes by partition, and the name of each that is refused with the reason."""
    members: dict[int, Member] = {}
    refused: list[tuple[str, str]] = []
    for node, description in described.items():
        holder = members.get(description.partition_id)
        problem = objection(description, num_partitions=num_partitions)
        if holder and not problem:
            problem = f"its partition-id, {description.partition_id}, is that of {holder.description.name}; give it its own"
        if problem:
            refused.append((description.name, problem))
        else:
            members[description.partition_id] = Member(node=node, description=description)
    return members, refused


def _most_said(described: Mapping[int, NodeDescription]) -> list[int]:
    """Return the number of nodes that most nodes of this code say there are, or several that equally many say."""
    same_code = [d for d in described.values() if d.code == code_fingerprint()]
    votes = Counter(d.num_partitions for d in same_code or described.values())
    return [number for number, count in votes.items() if count == max(votes.values())]


def _wait_for_nodes(grid: Grid, number: int, deadline: float) -> list[int]:
    """Return the connected nodes once there are `number` of them, or, at the deadline, those that came."""
    pause = _FIRST_PAUSE
    while len(nodes := list(grid.get_node_ids())) < number and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, _LAST_PAUSE)
    if not nodes:
        raise RunFailed("no node connected in time")
    return nodes


def _describe(grid: Grid, nodes: list[int], deadline: float) -> Answers[NodeDescription]:
    """Ask nodes who they are."""
    requests = {node: (node, RecordDict()) for node in nodes}
    timeout = max(deadline - time.monotonic(), 1.0)
    return ask(grid, requests, DESCRIBE, read=lambda _, content: read_description(content), timeout=timeout)
