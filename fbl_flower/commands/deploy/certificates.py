"""`fbl-flower deploy certs`: a certificate authority of one's own, and the server's certificate."""

from __future__ import annotations

import datetime
import ipaddress
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fbl_flower.commands.deploy.files import Folder, private_folder, write_whole
from fbl_flower.errors import ConfigError

# The SuperLink starts a process of its own that calls it at 127.0.0.1 over TLS: without these names runs stay pending.
_OWN_NAMES = ("localhost", "127.0.0.1", "::1")
_CA_DAYS = 3650
_EARLIER = datetime.timedelta(days=1)  # devices have clocks that are late
_DNS_NAME = re.compile(
    r"(?=.{1,253}$)([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?)(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)
_SOON_DAYS = 30


def make_certificates(folder: Folder, hosts: Sequence[str], *, days: int, overwrite: bool = False) -> None:
    """Make a new authority and a server certificate that it signed; all four files appear at once.

    Args:
        folder: Gets `certificates/`.
        hosts: Names and IP addresses under which machines reach the server; this machine's own are added.
        days: How long the server's certificate holds, from now.
        overwrite: Replace certificates that are there. All machines then need the new `ca.crt`.

    Raises:
        ConfigError: A host is none, `days` is not positive, or there are certificates.
    """
    names = _names(hosts)
    _check_days(days)
    if folder.certificates.exists() and not overwrite:
        raise ConfigError(
            [
                f"{folder.certificates}: is there; --renew makes a new server certificate under the same authority, "
                "--overwrite replaces all, and --if-missing leaves it"
            ]
        )
    ca_key, server_key = _new_key(), _new_key()
    ca = _ca_certificate(ca_key)
    private_folder(folder.path)
    with tempfile.TemporaryDirectory(prefix=".certificates-", dir=folder.path) as temporary:
        made = Folder(path=Path(temporary))
        write_whole(made.ca_key, _pem(ca_key), mode=0o600)
        write_whole(made.ca, ca.public_bytes(serialization.Encoding.PEM), mode=0o644)
        write_whole(made.server_key, _pem(server_key), mode=0o600)
        _write_server_certificate(made, server_key.public_key(), ca_key, ca, names, days)
        if folder.certificates.exists():
            folder.certificates.rename(Path(temporary, "old"))
        made.certificates.rename(folder.certificates)


def renew_server_certificate(folder: Folder, hosts: Sequence[str], *, days: int) -> None:
    """Replace `server.crt`; the authority and the server's key stay, so that no other machine needs anything new.

    Args:
        folder: With its authority.
        hosts: As in `make_certificates`, beside those of the present certificate, by which nodes know the server.
        days: From now.

    Raises:
        ConfigError: A file of the authority is missing or damaged, or as in `make_certificates`.
    """
    _check_days(days)
    try:
        ca_key = serialization.load_pem_private_key(folder.ca_key.read_bytes(), None)
        server_key = serialization.load_pem_private_key(folder.server_key.read_bytes(), None)
        ca, present = _read(folder.ca), _read(folder.server_certificate)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            [f"--renew: {folder.certificates} is no whole set of ca.crt, ca.key, server.crt, server.key: {error}"]
        ) from error
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey) or not isinstance(server_key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            [f"--renew: {folder.certificates} has keys that this command did not make; renew with the tool that made them"]
        )
    if ca.public_key() != ca_key.public_key():
        raise ConfigError([f"--renew: {folder.ca_key} is not the key of {folder.ca}"])
    try:
        names = list(present.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        names = []
    added = _names(hosts) if hosts or not names else []
    _write_server_certificate(folder, server_key.public_key(), ca_key, ca, names + [n for n in added if n not in names], days)


def certificate_state(path: Path, *, now: datetime.datetime | None = None) -> str:
    """Return "" for a certificate that holds for a while, and a warning for one that ends soon.

    Raises:
        ConfigError: It is damaged, or does not hold now.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    try:
        certificate = _read(path)
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: cannot be read as a certificate: {error}"]) from error
    return validity(certificate, str(path), now=now)


def validity(certificate: x509.Certificate, name: str, *, now: datetime.datetime) -> str:
    """As `certificate_state`, for a certificate that was read; `name` is what messages call it."""
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not first <= now <= last:
        raise ConfigError(
            [f"{name}: holds from {first:%Y-%m-%d} to {last:%Y-%m-%d}, and this machine's clock says {now:%Y-%m-%d}; "
             "set the clock, or make a new one with `fbl-flower deploy certs --renew`"]
        )  # fmt: skip
    if last - now > datetime.timedelta(days=_SOON_DAYS):
        return ""
    return f"{name}: ends on {last:%Y-%m-%d}; make a new one with `fbl-flower deploy certs --renew`, then restart the server"


def openssl_lines(hosts: Sequence[str], *, days: int) -> list[str]:
    """Return commands of OpenSSL 3 that make the same files in the current directory."""
    names = ",".join(f"IP:{n.value}" if isinstance(n, x509.IPAddress) else f"DNS:{n.value}" for n in _names(hosts))
    new_key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc"
    plain = "openssl req -x509 -config /dev/null"
    return [
        f"{plain} {new_key} -days {_CA_DAYS} -subj '/CN=FBL federation' -addext basicConstraints=critical,CA:TRUE,pathlen:0 "
        "-addext keyUsage=critical,keyCertSign,cRLSign -addext subjectKeyIdentifier=hash -keyout ca.key -out ca.crt",
        f"{plain} -CA ca.crt -CAkey ca.key {new_key} -days {days} -subj '/CN={_common_name(_names(hosts))}' "
        "-addext basicConstraints=critical,CA:FALSE -addext keyUsage=critical,digitalSignature -addext extendedKeyUsage=serverAuth "
        f"-addext subjectKeyIdentifier=hash -addext authorityKeyIdentifier=keyid -addext subjectAltName={names} -keyout server.key -out server.crt",
        "chmod 600 ca.key server.key",
    ]  # fmt: skip


def publish(file: Path, folder: Path) -> None:
    """Copy a file that is no secret to where other machines may take it from."""
    write_whole(folder / file.name, file.read_bytes(), mode=0o644)


def _names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Return the subject's alternative names, the given hosts first, each once."""
    found: dict[str, x509.GeneralName] = {}
    problems = []
    for host in [*hosts, *_OWN_NAMES]:
        try:
            address = ipaddress.ip_address(host)
            found[str(address)] = x509.IPAddress(address)
        except ValueError:
            if not _DNS_NAME.fullmatch(host) or re.fullmatch(r"[0-9.]+", host):
                problems.append(
                    f"--host: got {host!r}; wanted a name such as fbl.example.org or an IP address, without port and scheme"
                )
                continue
            found[host.lower()] = x509.DNSName(host.lower())
    if problems:
        raise ConfigError(problems)
    return list(found.values())


def _common_name(names: Sequence[x509.GeneralName]) -> str:
    return str(names[0].value)[:64]  # X.509's limit; clients read the alternative names


def _check_days(days: int) -> None:
    if not 1 <= days <= _CA_DAYS:
        raise ConfigError([f"--days: got {days}; allowed: 1 to {_CA_DAYS}"])


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _ca_certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FBL federation")])
    return (
        _builder(key.public_key(), name, name, _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def _write_server_certificate(
    folder: Folder,
    public_key: ec.EllipticCurvePublicKey,
    ca_key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    names: Sequence[x509.GeneralName],
    days: int,
) -> None:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _common_name(names))])
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    certificate = (
        _builder(public_key, subject, ca.subject, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(authority, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    write_whole(folder.server_certificate, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)


def _builder(
    public_key: ec.EllipticCurvePublicKey, subject: x509.Name, issuer: x509.Name, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature, key_cert_sign=key_cert_sign, crl_sign=crl_sign, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())
