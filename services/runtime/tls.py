"""TLS from files, on either side of HTTP and gRPC; and what its errors mean, in words that say what to do.

Files are read again when they have changed, for new connections; those that are open go on.
"""

import functools
import ssl
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from sapo_learner.errors import ConfigError
from services.runtime.watched import Watched

SCHEME = "https://"


@dataclass(frozen=True)
class Tls:
    """Paths of PEM files; "" where there is none.

    cert, key: this process' own certificate with its chain, and its key; a client has them for servers that ask.
    ca: whom a client believes; default: whom the system does. client_ca: whose certificates a server wants of clients.
    """

    cert: str = ""
    key: str = ""
    ca: str = ""
    client_ca: str = ""

    def __post_init__(self) -> None:
        if bool(self.cert) != bool(self.key):
            raise ConfigError(
                "one without the other", where="environment SAPO_TLS_CERT and SAPO_TLS_KEY", fix="set both"
            )
        if self.client_ca and not self.cert:
            fix = "set SAPO_TLS_CERT and SAPO_TLS_KEY, too: a server without TLS cannot ask for certificates"
            raise ConfigError("set without them", where="environment SAPO_TLS_CLIENT_CA", fix=fix)

    @property
    def serves(self) -> bool:
        """Whether servers of this process speak TLS."""
        return bool(self.cert)

    def _named(self, **paths: str) -> list[tuple[str, str]]:
        return [(f"SAPO_TLS_{name.upper()}", path) for name, path in paths.items() if path]

    # ---- servers

    def server_contexts(self) -> Callable[[], ssl.SSLContext]:
        """The context for the next connection to an HTTP server. Raises ConfigError."""

        files = self._named(cert=self.cert, key=self.key, client_ca=self.client_ca)
        return Watched(files, lambda _: self._server_context()).get

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server. Raises ConfigError."""

        def make(contents: list[bytes]) -> grpc.ServerCertificateConfiguration:
            self._server_context()  # for its errors: gRPC says nothing of files that it keeps the old ones for
            ca = contents[2] if self.client_ca else None
            return grpc.ssl_server_certificate_configuration([(contents[1], contents[0])], root_certificates=ca)

        watched = Watched(self._named(cert=self.cert, key=self.key, client_ca=self.client_ca), make)
        return grpc.dynamic_ssl_server_credentials(
            watched.get(), watched.get, require_client_authentication=bool(self.client_ca)
        )

    def _server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        _load(context, self.cert, self.key, self.client_ca)
        if self.client_ca:
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    # ---- clients

    def client_context(self) -> Callable[[], ssl.SSLContext]:
        """The context of an HTTP client, always the same one: to be asked for again before requests, which is when what
        has changed is loaded into it. Raises ConfigError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificates and names
        if not self.ca:
            context.load_default_certs()

        def make(_: list[bytes]) -> ssl.SSLContext:
            for each in (ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), context):  # first into one that may break
                _load(each, self.cert, self.key, self.ca)
            return context

        return Watched(self._named(cert=self.cert, key=self.key, ca=self.ca), make).get

    def channel(self, address: str, options: list[tuple[str, int]]) -> grpc.aio.Channel:
        """To HOST:PORT as it is, or with https:// before it under TLS. Raises ConfigError, the first time."""
        if not address.startswith(SCHEME):
            return grpc.aio.insecure_channel(address.removeprefix("http://"), options=options)
        return grpc.aio.secure_channel(address.removeprefix(SCHEME), self._channel_credentials.get(), options=options)

    @functools.cached_property
    def _channel_credentials(self) -> Watched[grpc.ChannelCredentials]:
        """Kept, for a channel that is made anew while files are half written."""
        files = self._named(cert=self.cert, key=self.key, ca=self.ca)

        def make(contents: list[bytes]) -> grpc.ChannelCredentials:
            _load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), self.cert, self.key, self.ca)  # for its errors
            found = {variable: content for (variable, _), content in zip(files, contents, strict=True)}
            return grpc.ssl_channel_credentials(*(found.get(f"SAPO_TLS_{name}") for name in ("CA", "KEY", "CERT")))

        return Watched(files, make)


def _load(context: ssl.SSLContext, cert: str, key: str, ca: str) -> None:
    try:
        if cert:
            context.load_cert_chain(cert, key)
    except (ssl.SSLError, OSError) as error:
        what = f"not a certificate and its key: {_reason(error)}"
        raise ConfigError(what, where=f"{cert} and {key}", fix="PEM files that belong together") from None
    try:
        if ca:
            context.load_verify_locations(ca)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"no certificates: {_reason(error)}", where=ca, fix="a file of PEM certificates") from None


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


# What OpenSSL and gRPC say, in lower case -> what it means, what to do. The first that is found counts.
_Meaning = tuple[str, str]
_AT_A_CLIENT: dict[tuple[str, ...], _Meaning] = {
    ("certificate has expired", "certificate_expired"): (
        "the server's certificate has expired", "renew it there: it is taken up without a restart"),
    ("hostname mismatch", "ip address mismatch", "hostname verification", "peer name"): (
        "the server's certificate is another name's", "use a name that stands in the certificate"),
    ("certificate required", "certificate_required", "handshake failure", "bad certificate"): (
        "the server wants a certificate of its clients", "set SAPO_TLS_CERT and SAPO_TLS_KEY to one that it knows"),
    ("alert unknown ca", "alert certificate unknown", "alert certificate expired", "alert decrypt error"): (
        "the server does not accept this client's certificate",
        "set SAPO_TLS_CERT and SAPO_TLS_KEY to a valid one of the CA that it knows"),
    ("certificate verify failed", "certificate_verify_failed", "certificate signature failure"): (
        "the server's certificate is of no CA that is known here", "set SAPO_TLS_CA to the file of its CA"),
    ("wrong version number", "wrong_version_number", "record layer failure", "unknown protocol"): (
        "the server speaks no TLS there", "leave https:// out, or turn TLS on there with SAPO_TLS_CERT"),
    ("illegal status line", "server disconnected without", "http2 settings", "http/2 settings"): (
        "the server speaks no plain text there", "does it want https:// before its address?"),
    ("socket closed",): (  # all that gRPC says of several things
        "it ends the connection", "does it want https:// before its address, or a certificate (SAPO_TLS_CERT)?"),
}  # fmt: skip
_AT_A_SERVER: dict[tuple[str, ...], _Meaning] = {
    ("http_request", "http request", "wrong version number", "unsupported protocol", "packet length too long"): (
        "it speaks no TLS", "give it an https:// address"),
    ("did_not_return_a_certificate", "did not return a certificate"): (
        "it has no certificate", "set SAPO_TLS_CERT and SAPO_TLS_KEY there"),
    ("certificate has expired",): ("its certificate has expired", "renew it"),
    ("certificate verify failed",): ("its certificate is of no CA in SAPO_TLS_CLIENT_CA", "sign it with that CA"),
    ("alert unknown ca",): ("it does not know the CA of our certificate", "set SAPO_TLS_CA there"),
    ("alert certificate expired",): ("it finds our certificate expired", "renew the file at SAPO_TLS_CERT"),
    ("alert",): ("it does not accept our certificate", "set SAPO_TLS_CA there, and use a name of the certificate"),
}  # fmt: skip


def meaning_for_client(said: str) -> _Meaning | None:
    """Of what a library says to a client: what is wrong, and what to do; None: it is not about TLS."""
    return _meaning(_AT_A_CLIENT, said)


def meaning_for_server(said: str) -> _Meaning | None:
    """The same of a handshake that failed at a server."""
    return _meaning(_AT_A_SERVER, said)


def _meaning(table: dict[tuple[str, ...], _Meaning], said: str) -> _Meaning | None:
    text = said.lower()
    return next((meaning for signs, meaning in table.items() if any(sign in text for sign in signs)), None)
