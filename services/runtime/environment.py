"""Where the services are, what a process may do, and how it proves that: from the environment, never from run.yaml."""

import os
from typing import Any

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from sapo_learner.errors import ConfigError
from services.runtime.auth import Credential, Tokens
from services.runtime.tls import Tls


class Environment(BaseSettings):
    """Variables SAPO_<FIELD>, such as SAPO_CONTROL_PLANE_URL.

    SAPO_SECRETS_DIR: a directory with a file for each that is not in the environment, as sapo_token and sapo_redis_url;
    what is mounted as a file shows up in no list of variables.
    """

    model_config = SettingsConfigDict(env_prefix="SAPO_", extra="ignore")

    control_plane_url: str = ""
    ingest_address: str = ""
    """HOST:PORT, or https://HOST:PORT under TLS."""
    redis_url: SecretStr = SecretStr("")
    token: SecretStr = SecretStr("")
    """Of a client. Of a server without SAPO_TOKENS_FILE: the one that it accepts."""
    token_file: str = ""
    """In place of SAPO_TOKEN: a file that holds it, read again when a server refuses the token."""
    tokens_file: str = ""
    """Of a server: the tokens that it accepts, with their roles."""
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""
    tls_client_ca: str = ""
    patience_seconds: float = Field(default=600.0, gt=0)
    """How long a service goes on trying to reach a peer that it needs before it gives up."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(_secrets_dir=os.environ.get("SAPO_SECRETS_DIR") or None, **values)
        except ValidationError as error:
            wrong = error.errors(include_input=False, include_url=False)[0]
            name = str(wrong["loc"][0]).removeprefix("sapo_").upper()
            raise ConfigError(wrong["msg"], where=f"environment SAPO_{name}", fix="set it anew, or unset it") from None
        except SettingsError:
            fix = "a directory with a text file for each secret"
            raise ConfigError("cannot be read", where="environment SAPO_SECRETS_DIR", fix=fix) from None

    def require(self, name: str) -> str:
        """The value of SAPO_<NAME>, or a ConfigError that says so."""
        value = getattr(self, name)
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if not text:
            raise ConfigError("not set", where=f"environment SAPO_{name.upper()}", fix=f"set it to {_MEANING[name]}")
        return str(text)

    def credential(self) -> Credential:
        """The token to send; one object for each peer. Raises ConfigError."""
        self._one_token()
        return Credential(file=self.token_file) if self.token_file else Credential(self.require("token"))

    def tokens(self) -> Tokens:
        """Those to accept. Raises ConfigError."""
        if self.tokens_file:
            return Tokens.in_file(self.tokens_file)
        self._one_token()
        return Tokens.of_token_file(self.token_file) if self.token_file else Tokens.one(self.require("token"))

    @property
    def tls(self) -> Tls:
        """Raises ConfigError when the files do not go together."""
        return Tls(self.tls_cert, self.tls_key, self.tls_ca, self.tls_client_ca)

    def _one_token(self) -> None:
        if self.token_file and self.token.get_secret_value():
            fix = "unset one: the file can be exchanged while a process runs"
            raise ConfigError("both are set", where="environment SAPO_TOKEN and SAPO_TOKEN_FILE", fix=fix)


_MEANING = {
    "control_plane_url": "the control plane's http://HOST:PORT",
    "ingest_address": "ingest's HOST:PORT",
    "redis_url": "the run's redis://HOST:PORT",
    "token": "the run's token (that of a `sapo up` is in services.json of its directory)",
}
OF_A_DEPLOYMENT = tuple(f"SAPO_{name}" for name in (
    "SECRETS_DIR", "TOKEN_FILE", "TOKENS_FILE", "TLS_CERT", "TLS_KEY", "TLS_CA", "TLS_CLIENT_CA"
))  # fmt: skip
"""What a `sapo up`, whose processes talk over the loopback interface under a token of its own, does not hand on."""
SECRET = ("SAPO_TOKEN", "SAPO_REDIS_URL", *OF_A_DEPLOYMENT)
"""What the code of a reward has no business with."""
