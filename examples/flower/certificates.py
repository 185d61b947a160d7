"""Make what TLS and the authentication of nodes need.

Each once:

    python certificates.py server fl.example.org 192.0.2.10 --folder server
    python certificates.py node hospital-a --folder hospital-a

``server`` makes an authority of its own and the server's certificate for the given names and
addresses. The server keeps ``ca.key``, ``server.key`` and ``server.pem``; every hospital gets
``ca.pem``. ``node`` makes a hospital's key pair, in the hospital: the private key ``NAME`` never
leaves it, and ``NAME.pub`` goes to the server, which registers it. Run again, ``server`` renews the
server's certificate under the same authority.
"""

import argparse
import ipaddress
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_DAYS = 3650
SERVER_DAYS = 397  # a year, and a month to renew in
OWN_HOSTS = ("localhost", "127.0.0.1")
"""The superlink's own processes connect to it by these."""

Key = ec.EllipticCurvePrivateKey


def make_server(folder: Path, hosts: list[str]) -> None:
    """Write an authority, unless there is one, and a certificate for the server."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "ca.key").exists():
        authority_key = _read_key(folder / "ca.key")
        authority = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    else:
        authority_key = ec.generate_private_key(ec.SECP384R1())
        authority = _authority(authority_key)
        _write_secret(folder / "ca.key", _pem(authority_key))
        (folder / "ca.pem").write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = _server_certificate(authority, authority_key, key, hosts)
    _write_secret(folder / "server.key", _pem(key))
    (folder / "server.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    print(f"{folder / 'ca.pem'}: for every hospital; fingerprint to compare by telephone:")
    print(authority.fingerprint(hashes.SHA256()).hex(":"))
    print(f"{folder / 'server.pem'}: until {certificate.not_valid_after_utc:%Y-%m-%d}")


def make_node(folder: Path, name: str) -> None:
    """Write a node's key pair in OpenSSH's format, which Flower reads."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / name).exists():
        raise SystemExit(f"{folder / name}: there must be no key yet; name another folder")
    key = ec.generate_private_key(ec.SECP384R1())
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    _write_secret(folder / name, secret)
    (folder / f"{name}.pub").write_bytes(public + f" {name}\n".encode())
    print(f"{folder / name}: stays here; {folder / f'{name}.pub'}: for the server")


def _authority(key: Key) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sdq federation")])
    return (
        _builder(name, name, key, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .sign(key, hashes.SHA384())
    )


def _server_certificate(
    authority: x509.Certificate, authority_key: Key, key: Key, hosts: list[str]
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
    names = [_host(host) for host in dict.fromkeys((*hosts, *OWN_HOSTS))]
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return (
        _builder(name, authority.subject, key, SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
        .add_extension(x509.SubjectAlternativeName(names), False)
        .add_extension(issuer, False)
        .sign(authority_key, hashes.SHA384())
    )


def _builder(subject: x509.Name, issuer: x509.Name, key: Key, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority, key_cert_sign=authority, crl_sign=authority,
        content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _pem(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _read_key(path: Path) -> Key:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SystemExit(f"{path}: must be a key on an elliptic curve; name another folder")
    return key


def _write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read, from its first byte on."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    part.replace(path)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Certificates and keys of a federation.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    server = verbs.add_parser("server", help="an authority, and the server's certificate")
    server.add_argument("hosts", nargs="+", help="names and addresses that nodes connect to")
    node = verbs.add_parser("node", help="the key pair of one hospital's node")
    node.add_argument("name")
    for each in (server, node):
        each.add_argument("--folder", type=Path, default=Path())
    asked = parser.parse_args()
    if asked.verb == "server":
        make_server(asked.folder, asked.hosts)
    else:
        make_node(asked.folder, asked.name)


if __name__ == "__main__":
    main()
