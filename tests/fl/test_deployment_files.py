"""Certificates, compose files and documented commands: right without starting anything."""

import re
import shlex
import ssl
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("flwr")

from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.supercore.primitives.asymmetric import uses_nist_ec_curve
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "flower"
PAGE = ROOT / "docs" / "how-to-deploy-a-federation.md"
PARSERS = {
    "flower-superlink": _parse_args_run_superlink,
    "flower-supernode": _parse_args_run_supernode,
}


def certify(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE / "certificates.py"), *words], cwd=folder, text=True,
        capture_output=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    for place in ("mine", "other"):
        done = certify(folder, "server", "fl.example.org", "192.0.2.10", "--folder", place)
        assert done.returncode == 0, done.stderr
    assert certify(folder, "node", "hospital-a", "--folder", "keys").returncode == 0
    return folder


def handshake(server: Path, authority: Path, host: str) -> None:
    """Shake hands in memory, as a node does; ssl.SSLError if it refuses the server."""
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(server / "server.pem", server / "server.key")
    mine = ssl.create_default_context(cafile=str(authority / "ca.pem"))
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        mine.wrap_bio(down, up, server_hostname=host), theirs.wrap_bio(up, down, server_side=True)
    ]  # fmt: skip
    left = list(sides)
    while left:
        for side in list(left):
            try:
                side.do_handshake()
                left.remove(side)
            except ssl.SSLWantReadError:
                pass


@pytest.mark.parametrize("host", ["fl.example.org", "192.0.2.10", "localhost", "127.0.0.1"])
def test_a_node_believes_the_server(made: Path, host: str) -> None:
    handshake(made / "mine", made / "mine", host)


@pytest.mark.parametrize(
    ("authority", "host"), [("other", "fl.example.org"), ("mine", "evil.example.org")]
)
def test_a_node_refuses_another_authority_or_name(made: Path, authority: str, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(made / "mine", made / authority, host)


def test_a_renewed_certificate_is_believed_by_those_who_have_the_authority(tmp_path: Path) -> None:
    assert certify(tmp_path, "server", "a.org", "--folder", "s").returncode == 0
    before = {name: (tmp_path / "s" / name).read_bytes() for name in ("ca.pem", "server.pem")}
    assert certify(tmp_path, "server", "b.org", "--folder", "s").returncode == 0
    assert (tmp_path / "s" / "ca.pem").read_bytes() == before["ca.pem"]
    assert (tmp_path / "s" / "server.pem").read_bytes() != before["server.pem"]
    handshake(tmp_path / "s", tmp_path / "s", "b.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path / "s", tmp_path / "s", "a.org")


def test_secrets_are_their_owners(made: Path) -> None:
    for secret in ("mine/ca.key", "mine/server.key", "keys/hospital-a"):
        assert stat.S_IMODE((made / secret).stat().st_mode) == 0o600, secret


def test_a_nodes_keys_are_a_pair_that_flower_takes(made: Path) -> None:
    private: Any = load_ssh_private_key((made / "keys" / "hospital-a").read_bytes(), None)
    public: Any = load_ssh_public_key((made / "keys" / "hospital-a.pub").read_bytes())
    assert private.public_key().public_numbers() == public.public_numbers()
    assert uses_nist_ec_curve(public)
    before = (made / "keys" / "hospital-a").read_bytes()
    again = certify(made, "node", "hospital-a", "--folder", "keys")
    assert again.returncode == 1
    assert "there must be no key yet" in again.stderr
    assert (made / "keys" / "hospital-a").read_bytes() == before


def documented() -> list[list[str]]:
    found = re.findall(r"^(?:flower-super\w+) .*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [shlex.split(line) for line in found]


def composed(name: str) -> dict[str, Any]:
    text = (EXAMPLE / "deployment" / name).read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def test_documented_commands_are_flowers() -> None:
    commands = documented()
    assert sorted(words[0] for words in commands) == ["flower-superlink", "flower-supernode"]
    for program, *words in commands:
        PARSERS[program]().parse_args(words)


def options(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


@pytest.mark.parametrize(
    ("file", "service"), [("server.yml", "superlink"), ("hospital.yml", "supernode")]
)
def test_compose_files_start_the_documented_commands(file: str, service: str) -> None:
    program, *words = composed(file)["services"][service]["command"]
    PARSERS[program]().parse_args(words)
    (page,) = (found for found in documented() if found[0] == program)
    assert options(words) == options(page)


def test_only_the_gate_is_reached_from_outside() -> None:
    services = composed("server.yml")["services"]
    assert [name for name, s in services.items() if "ports" in s] == ["gate"]
    assert services["superlink"]["networks"] == ["inside"]
    assert composed("server.yml")["networks"]["inside"] == {"internal": True}
    assert "ports" not in composed("hospital.yml")["services"]["supernode"]
    gate = (EXAMPLE / "deployment" / "gate.conf").read_text(encoding="utf-8")
    assert re.findall(r"location (\S+) ", gate) == ["/v1/fleet/", "/"]
    assert gate.rstrip().endswith("location / {\n        return 403;\n    }\n}")


def test_what_is_mounted_is_named_where_it_is_used() -> None:
    for file in ("server.yml", "hospital.yml"):
        for name, service in composed(file)["services"].items():
            inside = [v.split(":")[1] for v in service["volumes"]]
            used = re.findall(r"=\"?(/[\w./-]+)", " ".join(service.get("command", [])))
            for path in used:
                assert any(path.startswith(place) for place in inside), (name, path)
