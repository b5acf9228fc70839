"""The arguments of `fbl-flower deploy`. What the actions need is imported when one is called."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fbl_flower.config.methods import CAPABILITIES
from fbl_flower.errors import ConfigError, RunFailed

_FOLDER = Path("~/.fbl/federation")
_CONTROL = "127.0.0.1:8000"
_NODE_PORT = 9094


def add_deploy(commands: Any) -> None:
    """Add the command to those of `fbl-flower` (what `add_subparsers` returned)."""
    deploy = commands.add_parser("deploy", help="a federation of separate machines, over gRPC with TLS (docs/deployment.md)")
    actions = deploy.add_subparsers(required=True, metavar="ACTION")

    certs = _action(actions, "certs", _certs, "make an authority and the server's certificate, on the server's machine")
    certs.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="NAME",
        help="name or IP address under which nodes reach the server; repeatable",
    )
    certs.add_argument("--days", type=int, default=365, help="how long the server's certificate holds (default: 365)")
    certs.add_argument("--renew", action="store_true", help="a new server certificate only; nodes need nothing new")
    _add_what_is_there(certs)

    keys = _action(actions, "keys", _keys, "make a node's key pair, on the node's machine")
    keys.add_argument("nodes", nargs="+", metavar="NAME", help="the node's name, such as site-0")
    _add_what_is_there(keys)

    server = _action(actions, "server", _server, "start the server (flower-superlink) in this process")
    server.add_argument(
        "--listen", default="0.0.0.0:9092", metavar="HOST:PORT", help="gRPC for the nodes (default: 0.0.0.0:9092)"
    )
    server.add_argument(
        "--control",
        default=_CONTROL,
        metavar="HOST:PORT",
        help=f"HTTPS for the operator, who needs no password: keep it on this machine (default: {_CONTROL})",
    )
    _add_dry_run(server)

    node = _action(actions, "node", _node, "start a node (flower-supernode) in this process")
    node.add_argument("name", metavar="NAME", help="the node's name, that of its key")
    node.add_argument("--server", required=True, metavar="HOST[:9092]", help="where the server listens for nodes")
    node.add_argument("--partition-id", type=int, required=True, metavar="K", help="the node's number, from 0")
    node.add_argument("--num-partitions", type=int, required=True, metavar="N", help="number of nodes of the federation")
    node.add_argument("--data-path", type=Path, metavar="DIR", help="folder with this node's own images (docs/data.md)")
    node.add_argument(
        "--generator", type=Path, metavar="DIR", help="this node's generator folder (default: generator.path of the run)"
    )
    node.add_argument(
        "--state-dir", type=Path, metavar="DIR", help="for image cache and client state (default: the run's, ~/.fbl)"
    )
    node.add_argument(
        "--capability",
        choices=CAPABILITIES,
        help="full: balances; rich: discards nothing, fills every class to its largest; none: cannot generate (default: full)",
    )
    node.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="another node-config key, as a TOML value; repeatable"
    )
    node.add_argument(
        "--ca", type=Path, metavar="FILE", help="the authority's certificate (default: certificates/ca.crt in --dir)"
    )
    node.add_argument(
        "--port",
        type=int,
        default=_NODE_PORT,
        help=f"for the node's own processes; another for each node of a machine (default: {_NODE_PORT})",
    )
    _add_dry_run(node)

    register = _action(actions, "register", _register, "make nodes known to the server")
    register.add_argument(
        "nodes", nargs="+", metavar="NAME", help="node whose public key is keys/NAME.pub in --dir; or the path of a NAME.pub"
    )
    register.add_argument("--wait", type=float, default=60.0, metavar="S", help="seconds to wait for the server (default: 60)")
    _add_connection(register)

    run = _action(actions, "run", _run, "start a run, show its log, tell whether it worked; Ctrl-C stops it")
    run.add_argument("-c", "--config", action="append", default=[], metavar="'KEY=VALUE ...'", help="settings, or a TOML file")
    run.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on with a killed run: its run directory, on the server's machine"
    )
    run.add_argument("--app", type=Path, metavar="DIR", help="another directory with the Flower app")
    _add_connection(run)

    watch = _action(actions, "watch", _watch, "show nodes and active runs, whenever they change")
    watch.add_argument("--once", action="store_true", help="show them and end")
    watch.add_argument("--every", type=float, default=5.0, metavar="S", help="seconds between two looks (default: 5)")
    _add_connection(watch)

    stop = _action(actions, "stop", _stop, "stop runs; servers and nodes are stopped by Ctrl-C or their supervisor")
    stop.add_argument("runs", nargs="*", metavar="RUN", help="run ids (default: every active run)")
    _add_connection(stop)

    health = _action(actions, "health", _health, "say whether the server or a node on this machine answers, for supervisors")
    health.add_argument("what", choices=("server", "node"))
    health.add_argument("--port", type=int, default=_NODE_PORT, help=f"the node's port (default: {_NODE_PORT})")
    _add_connection(health)


def _certs(options: argparse.Namespace) -> None:
    from fbl_flower.commands.deploy import certificates
    from fbl_flower.commands.deploy.files import Folder

    folder = Folder(path=_path(options.dir))
    if options.renew and (options.if_missing or options.overwrite):
        raise ConfigError(["--renew: not together with --if-missing or --overwrite; it replaces server.crt and nothing else"])
    if options.renew:
        certificates.renew_server_certificate(folder, options.host, days=options.days)
        print(f"made {folder.server_certificate}; restart the server, which reads it at its start")
    elif options.if_missing and folder.certificates.exists():
        print(f"{folder.certificates} is there")
    else:
        print("Flower has no command for this; in an empty folder, OpenSSL makes the same with:")
        for line in certificates.openssl_lines(options.host, days=options.days):
            print(f"$ {line}")
        certificates.make_certificates(folder, options.host, days=options.days, overwrite=options.overwrite)
        print(f"made {folder.certificates}: ca.crt is for every machine, ca.key for nobody but you")
    if options.public is not None:
        certificates.publish(folder.ca, _path(options.public))


def _keys(options: argparse.Namespace) -> None:
    from fbl_flower.commands.deploy.certificates import publish
    from fbl_flower.commands.deploy.files import Folder
    from fbl_flower.commands.deploy.keys import make_keys, ssh_keygen_line

    folder = Folder(path=_path(options.dir))
    made = make_keys(folder, options.nodes, overwrite=options.overwrite, if_missing=options.if_missing)
    for node in options.nodes:
        if node in made:
            print(f"$ {ssh_keygen_line(folder, node)}")
        print(f"{'made' if node in made else 'there is'} {folder.key(node)}; its .pub is for the server")
        if options.public is not None:
            publish(folder.public_key(node), _path(options.public))


def _server(options: argparse.Namespace) -> None:
    from fbl_flower.commands.deploy.files import Folder
    from fbl_flower.commands.deploy.processes import server_command

    command = server_command(Folder(path=_path(options.dir)), listen=options.listen, control=options.control)
    command.show()
    if not options.dry_run:
        command.become()


def _node(options: argparse.Namespace) -> None:
    from fbl_flower.commands.deploy.files import Folder, checked_name
    from fbl_flower.commands.deploy.processes import node_command
    from fbl_flower.commands.overrides import read_overrides

    settings = read_overrides(options.set)
    given = {
        "partition-id": options.partition_id,
        "num-partitions": options.num_partitions,
        "name": checked_name(options.name),
        "data-path": _text(options.data_path),
        "generator-path": _text(options.generator),
        "state-dir": _text(options.state_dir),
        "capability": options.capability,
    }
    if twice := sorted(given.keys() & settings.keys()):
        raise ConfigError([f"--set {key}: this key has an option of its own, or is NAME" for key in twice])
    command = node_command(
        Folder(path=_path(options.dir)),
        options.name,
        server=options.server,
        ca=options.ca and _path(options.ca),
        port=options.port,
        settings={key: value for key, value in given.items() if value is not None} | settings,
    )
    command.show()
    if not options.dry_run:
        command.become()


def _register(options: argparse.Namespace) -> None:
    from fbl_flower.commands.deploy.files import Folder, checked_name
    from fbl_flower.commands.deploy.operator import register

    folder = Folder(path=_path(options.dir))
    files = {}
    for node in options.nodes:
        file = _path(Path(node)) if node.endswith(".pub") else folder.public_key(node)
        files[checked_name(file.name.removesuffix(".pub"))] = file
    register(_operator(options), files, wait=options.wait)


def _run(options: argparse.Namespace) -> None:
    from fbl_flower.commands.deploy.operator import run
    from fbl_flower.commands.overrides import chosen_config

    _, settings = chosen_config(options.config, resume=options.resume)
    run(_operator(options), settings, app=options.app)


def _watch(options: argparse.Namespace) -> None:
    from fbl_flower.commands.deploy.operator import watch

    if not options.every > 0:
        raise ConfigError([f"--every: got {options.every}; allowed: number > 0"])
    watch(_operator(options), every=None if options.once else options.every)


def _stop(options: argparse.Namespace) -> None:
    from fbl_flower.commands.deploy.operator import stop

    stop(_operator(options), options.runs)


def _health(options: argparse.Namespace) -> None:
    from fbl_flower.commands.deploy.files import Folder
    from fbl_flower.commands.deploy.operator import node_problem, server_problem, shown_certificate_state

    if options.what == "node":
        problem = node_problem(options.port)
    else:
        ca = options.ca or Folder(path=_path(options.dir)).ca
        problem = server_problem(options.address, ca)
    if problem:
        raise RunFailed(f"the {options.what} does not answer: {problem}")
    print(f"the {options.what} answers")
    if options.what == "server" and (warning := shown_certificate_state(options.address, ca)):
        print(f"warning: {warning}")


def _operator(options: argparse.Namespace) -> Any:
    from fbl_flower.commands.deploy.files import Folder
    from fbl_flower.commands.deploy.operator import connect

    return connect(Folder(path=_path(options.dir)), address=options.address, ca=options.ca and _path(options.ca))


def _path(path: Path) -> Path:
    return path.expanduser().absolute()  # programs start in other folders than the user's


def _text(path: Path | None) -> str | None:
    return None if path is None else str(_path(path))


def _action(actions: Any, name: str, handler: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text)
    parser.add_argument(
        "--dir", type=Path, default=_FOLDER, help=f"this machine's folder of the federation (default: {_FOLDER})"
    )
    parser.set_defaults(handler=handler)
    return parser


def _add_what_is_there(parser: argparse.ArgumentParser) -> None:
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--overwrite", action="store_true", help="replace what is there")
    choice.add_argument("--if-missing", action="store_true", help="leave what is there")
    parser.add_argument("--public", type=Path, metavar="DIR", help="also put there what other machines need and is no secret")


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="check and print Flower's command, and do not run it")


def _add_connection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", default=_CONTROL, metavar="HOST:PORT", help=f"the server's --control address (default: {_CONTROL})"
    )
    parser.add_argument(
        "--ca", type=Path, metavar="FILE", help="the authority's certificate (default: certificates/ca.crt in --dir)"
    )
