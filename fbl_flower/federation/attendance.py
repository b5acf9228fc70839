"""Who is connected, round by round: nodes that leave, come back under another id, or come late; and the table of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from logging import INFO, WARNING
from typing import Any

from flwr.app import Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from fbl_flower.errors import RunFailed
from fbl_flower.federation.arrival import SMALL_ANSWER, Arrivals
from fbl_flower.federation.exchange import AWAY
from fbl_flower.federation.gate import read_description
from fbl_flower.federation.roster import Member, Roster, objection
from fbl_flower.federation.wire import DESCRIBE, NodeDescription
from fbl_flower.reporting.rundir import RunDirectory

_PATIENCE = 30.0  # seconds that a round's start waits for a new node to say who it is; after that it may say so during a round
_PAUSE = 0.5
NOT_ASKED = "not asked yet"


@dataclass(frozen=True, kw_only=True)
class NodeRow:
    """One node in the table: nothing in it comes from a client's data.

    Attributes:
        name, capability: As the node gave them; "not stated" where its node config has no capability.
        partition: Its place among the nodes.
        clients: Those that it hosts.
        connected: Whether it was at the last look.
        not_prepared: Why not, by client; empty when all its clients are prepared.
    """

    name: str
    partition: int
    clients: list[int]
    capability: str
    connected: bool
    not_prepared: dict[str, str]


class Attendance:
    """Keeps the roster up to date and writes nodes.json into the run directory, after what is there if the server was started again.

    Args:
        grid: Flower's way to the nodes.
        run: Where the table goes.
        roster: Of the start.

    Attributes:
        title: What a round is called in the log: "Round", or that of a generator's training.
        roster: As it is now.
        not_prepared: By client, why it was not prepared when the run, or the server again, started; prepared later or not.
    """

    def __init__(self, grid: Grid, run: RunDirectory, roster: Roster) -> None:
        self._grid, self._run, self.roster = grid, run, roster
        self._arrivals = Arrivals(grid)
        self.title = "Round"
        self._connected = {member.node for member in roster.members.values()}
        self._known = set(self._connected)  # nodes that said who they are, or are about to
        self._waited_for = set(self._connected)
        self._asked: dict[str, int] = {}  # messages that ask it, and to which node
        self._refused: dict[int, str] = {}  # why, by node
        self._unprepared = dict.fromkeys(range(roster.num_clients), NOT_ASKED)
        before = run.read_json("nodes.json")
        self._events: list[dict[str, Any]] = before.get("events", [])
        self.not_prepared: dict[str, str] = before.get("not_prepared", {})

    def present(self) -> list[int]:
        """Return the clients whose nodes are connected."""
        return [client for client, node in self.roster.node_of.items() if node in self._connected]

    def away(self) -> dict[int, str]:
        """Return the clients whose nodes were there and are not connected now, with that as the reason."""
        return {client: AWAY for client, node in self.roster.node_of.items() if node not in self._connected}

    def trains_generator(self, client: int) -> bool:
        """Return whether a client's node takes part in training a generator."""
        return self.roster.described[client].trains_generator

    def unprepared(self) -> set[int]:
        """Return the clients that are not prepared, as far as is known."""
        return set(self._unprepared)

    def prepared(self, clients: Iterable[int], failures: Mapping[int, str]) -> None:
        """Note which clients are prepared and why others are not, and write the table if that has changed."""
        before = dict(self._unprepared)
        for client in clients:
            self._unprepared.pop(client, None)
        self._unprepared |= {client: reason for client, reason in failures.items() if client in self._unprepared}
        for client, reason in failures.items():
            earlier = self.not_prepared.setdefault(str(client), reason)
            if reason not in earlier:
                self.not_prepared[str(client)] = f"{earlier}; {reason}"
        if self._unprepared != before:
            self._write()

    def log_table(self) -> None:
        """Log one line for each node."""
        rows = self.rows()
        width = max(len(row.name) for row in rows)
        log(INFO, "%s  %-10s  %-13s  %s", "node".ljust(width), "capability", "connection", "clients")
        for row in rows:
            reasons = "; ".join(f"client {client} is not prepared: {reason}" for client, reason in row.not_prepared.items())
            clients = ",".join(map(str, row.clients)) or "none"
            state = "connected" if row.connected else "not connected"
            log(
                INFO,
                "%s  %-10s  %-13s  %s",
                row.name.ljust(width),
                row.capability,
                state,
                f"{clients}: {reasons or 'prepared'}",
            )

    def rows(self) -> list[NodeRow]:
        """Return the table, by partition."""
        roster = self.roster
        places = {
            *range(min(roster.num_partitions, roster.num_clients)),
            *roster.members,
        }  # others host nobody and have not come
        return [self._row(place) for place in sorted(places)]

    def renew(self, server_round: int, *, timeout: float) -> None:
        """Look who is connected, take in new nodes, and wait up to `timeout` seconds as long as no client is there.

        Costs one call where nothing has changed.

        Raises:
            RunFailed: No client's node is connected.
        """
        deadline = time.monotonic() + timeout
        self._look(server_round, patience=min(_PATIENCE, timeout))
        while not self.present():
            if time.monotonic() >= deadline:
                raise RunFailed(
                    f"{self.title.lower()} {server_round}: no node that hosts a client is connected, after {timeout:g} s"
                )
            time.sleep(_PAUSE)
            self._look(server_round, patience=min(_PATIENCE, timeout))

    def _look(self, server_round: int, *, patience: float) -> None:
        nodes, before = set(self._grid.get_node_ids()), set(self._connected)
        self._connected = nodes
        for place, member in sorted(self.roster.members.items()):
            if member.node in before - nodes:
                self._event(server_round, place, "not connected")
        # Who was away may be another when it returns: a node that was restarted has its old id, and perhaps another partition or method.
        self._known &= nodes
        self._waited_for &= nodes
        if self._asked or nodes - self._known:
            self._welcome(nodes - self._known, server_round, patience=patience)
        if nodes != before:
            self._write()

    def _welcome(self, newcomers: set[int], server_round: int, *, patience: float) -> None:
        """Ask newcomers who they are; those who do not answer at once are heard in a later round."""
        for node in sorted(newcomers):
            message = Message(RecordDict(), dst_node_id=node, message_type=DESCRIBE)
            for message_id in filter(None, self._grid.push_messages([message])):
                self._asked[message_id] = node
                self._known.add(node)
        deadline = time.monotonic() + (patience if newcomers - self._waited_for else 0.0)
        self._waited_for |= newcomers
        while self._asked:
            for message_id, answer in self._arrivals.of(dict.fromkeys(self._asked, SMALL_ANSWER)):
                node = self._asked.pop(message_id)
                if isinstance(answer, str) or answer.has_error():
                    self._known.discard(node)  # to be asked again
                elif isinstance(description := read_description(answer.content), str):
                    self._refuse(node, f"node {node}", description, server_round)
                else:
                    self._admit(node, description, server_round)
            if not self._asked or time.monotonic() >= deadline:
                break
            time.sleep(_PAUSE)

    def _refuse(self, node: int, name: str, reason: str, server_round: int) -> None:
        if self._refused.get(node) != reason:
            log(WARNING, "%s %d: %s is refused: %s", self.title, server_round, name, reason)
            self._refused[node] = reason
        self._known.discard(node)  # to be asked again: what keeps it out may end

    def _admit(self, node: int, description: NodeDescription, server_round: int) -> None:
        """Give a node the place that it asks for, or none."""
        others = {place: member for place, member in self.roster.members.items() if member.node != node}
        if problem := self._objection(node, description):
            self._refuse(node, f"node {description.name}", problem, server_round)
            self.roster = replace(self.roster, members=others)
            return
        self._refused.pop(node, None)
        place, before = description.partition_id, self.roster.members.get(description.partition_id)
        what = "joined" if before is None else "connected again" if before.node == node else "came back under another id"
        if before is not None and before.description.name != description.name:
            what = f"took the place of {before.description.name}"
        self.roster = replace(self.roster, members=others | {place: Member(node=node, description=description)})
        self._event(server_round, place, what)

    def _objection(self, node: int, description: NodeDescription) -> str:
        place, roster = description.partition_id, self.roster
        if problem := objection(description, num_partitions=roster.num_partitions):
            return problem
        # A node that restarted without a key of its own has a new id and its old name, and its old id seems connected for up to a minute.
        holder = roster.members.get(place)
        if holder and holder.node != node and holder.node in self._connected and holder.description.name != description.name:
            return f"its partition-id, {place}, is that of {holder.description.name}, which is connected; give it its own"
        return ""

    def _event(self, server_round: int, place: int, what: str) -> None:
        row = self._row(place)
        clients = ",".join(map(str, row.clients))
        log(INFO, "%s %d: node %s (clients %s): %s", self.title, server_round, row.name, clients, what)
        self._events.append({self.title.lower(): server_round, "name": row.name, "event": what})
        self._write()

    def _row(self, place: int) -> NodeRow:
        clients, member = self.roster.clients_of(place), self.roster.members.get(place)
        return NodeRow(
            name=member.description.name if member else f"node-{place}",
            partition=place,
            clients=clients,
            capability=(member.description.capability if member else "") or "not stated",
            connected=member is not None and member.node in self._connected,
            not_prepared={str(client): self._unprepared[client] for client in clients if client in self._unprepared},
        )

    def _write(self) -> None:
        rows = [asdict(row) for row in self.rows()]
        self._run.write_json("nodes.json", {"nodes": rows, "events": self._events, "not_prepared": self.not_prepared})
