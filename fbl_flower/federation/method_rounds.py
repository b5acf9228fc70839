"""The methods of a federation as the server's loop sees them: who runs which, what goes out with the model, what comes back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from logging import INFO, WARNING

from flwr.app import ArrayRecord
from flwr.common.logger import log

from fbl_flower.config import RunConfig
from fbl_flower.config.methods import METHODS
from fbl_flower.federation.roster import Roster
from fbl_flower.federation.wire import Reply, array_record
from fbl_flower.methods.server import ServerState, Update
from fbl_flower.training.roles import Role, role_of


def roles_of(config: RunConfig, roster: Roster) -> dict[int, Role]:
    """Return the role of every client, by number: what its node states, else what the seed draws."""
    roles = {}
    for client in range(config.num_clients):
        node = roster.described.get(client)
        roles[client] = (
            role_of(config, client, capability=node.capability, method=node.method) if node else role_of(config, client)
        )
    return roles


def announce(roles: Mapping[int, Role], *, balancing: bool) -> None:
    """Say in the server's log which methods and capabilities there are, where they differ, and warn of what FedGen sends."""
    methods, capabilities = (Counter(kinds) for kinds in zip(*((r.method, r.capability) for r in roles.values()), strict=True))
    if len(methods) > 1:
        log(INFO, "Methods of the clients: %s", _in_words(methods))
    if balancing and capabilities.keys() != {"full"}:
        log(INFO, "Capabilities of the clients: %s", _in_words(capabilities))
    if methods["fedgen"]:
        log(
            WARNING, "FedGen: its clients send their label counts to the server, as published; class counts do not stay on them"
        )


def packed_state(state: ServerState) -> dict[str, dict[str, ArrayRecord]]:
    """Pack what goes to the clients of each method, once for all of them; what is the server's own is left out."""
    return {method: {method: array_record(arrays)} for method, arrays in state.items() if method in METHODS}


def update_of(reply: Reply, role: Role) -> Update:
    """Return what a client sent, as its method sees it."""
    return Update(method=role.method, arrays=reply.arrays, extra=reply.extras.get(role.method, {}))


def _in_words(kinds: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(kinds.items()))
