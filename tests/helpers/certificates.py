"""What a server needs to offer TLS."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["self_signed"]


def self_signed(directory: Path) -> tuple[str, str]:
    """A key and a certificate for localhost and 127.0.0.1."""
    key, certificate = f"{directory}/key.pem", f"{directory}/cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-days", "2", "-keyout", key, "-out", certificate], check=True, capture_output=True, timeout=30)
    return key, certificate
