"""Certificates for tests of TLS: an authority, what it has signed, and what it has not.

made = Certificates(tmp_path)
Tls(*made.pair("ingest"), ca=made.ca)
"""

import datetime
from pathlib import Path

import trustme


class Certificates:
    """Files in `directory`. `ca`: path of the authority's own certificate."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self._directory, self._authority, self._other = directory, trustme.CA(), trustme.CA()
        self.ca = str(directory / "ca.pem")
        self._authority.cert_pem.write_to_path(self.ca)

    def pair(self, name: str, *, days: float = 1, host: str = "127.0.0.1", foreign: bool = False) -> tuple[str, str]:
        """Paths of a certificate and its key, made anew with every call. days: until it expires. foreign: of another
        authority."""
        ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
        made = (self._other if foreign else self._authority).issue_cert(host, not_after=ends)
        cert, key = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        made.private_key_pem.write_to_path(str(key))
        cert.write_bytes(b"".join(each.bytes() for each in made.cert_chain_pems))
        return str(cert), str(key)
