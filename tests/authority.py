"""A certificate authority for tests, whose certificates may be as wrong as a test wants them."""

from __future__ import annotations

import datetime as dt
import ipaddress
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

VALID = (-1, 1)
EXPIRED = (-2, -1)
NOT_YET = (1, 2)


class Authority:
    """Signs certificates and writes them into a directory.

    Attributes:
        pem: The authority's own certificate.
        file: The path of a file of it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, directory.name)])
        self.pem = self._sign(self._name, self._key, None, VALID, authority=True)
        path = directory / "ca.pem"
        path.write_bytes(self.pem)
        self.file = str(path)

    def issue(
        self, name: str, *, ip: str | None = "127.0.0.1", days: tuple[int, int] = VALID
    ) -> tuple[str, str]:
        """Paths of a certificate and its key, valid from and to that many days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives: list[x509.GeneralName] = [x509.DNSName(name)]
        if ip is not None:
            alternatives.append(x509.IPAddress(ipaddress.ip_address(ip)))
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        certificate = self.directory / f"{name}.pem"
        certificate.write_bytes(self._sign(subject, key, alternatives, days))
        private = self.directory / f"{name}.key"
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return str(certificate), str(private)

    def _sign(
        self, subject: x509.Name, key: Any, alternatives: Any, days: Any, *, authority: bool = False
    ) -> bytes:
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + dt.timedelta(days=days[0]))
            .not_valid_after(now + dt.timedelta(days=days[1]))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if alternatives:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(alternatives), critical=False
            )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
