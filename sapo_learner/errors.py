"""Every error that a user, a peer process or a file can cause, as one tree.

    SapoError                    exit  gRPC / HTTP
    ├── ConfigError                 2  INVALID_ARGUMENT / 422      run.yaml, --set, environment
    ├── InvalidTrajectory           3  INVALID_ARGUMENT / 422      a group that must not enter the log
    ├── Unauthenticated             4  UNAUTHENTICATED / 401       wrong or missing token
    ├── NotFound                    5  NOT_FOUND / 404             no such run, version, blob, file
    ├── Mismatch                    6  FAILED_PRECONDITION / 409   digests, tokenizer or model differ from the run's
    ├── Fenced                      7  ABORTED / 409               a newer writer holds the token
    ├── Unavailable                 8  UNAVAILABLE / 503           a peer cannot be reached or is not ready yet
    ├── Corrupt                     9  DATA_LOSS / 500             a file or a log that does not check out
    └── Forbidden                  10  PERMISSION_DENIED / 403     a token whose role does not allow this

Add a class only when a caller must treat it differently. Its docstring is what `sapo --help` says of its exit code.
The message says what is wrong, where, and what to do.
"""


class SapoError(Exception):
    """Base of the tree. `code` is the canonical gRPC status name; HTTP status and exit code follow from the class."""

    code = "UNKNOWN"
    http_status = 500
    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__((f"{where}: " if where else "") + what + (f" ({fix})" if fix else ""))


class ConfigError(SapoError):
    """a setting, an argument or the environment is wrong"""

    code, http_status, exit_code = "INVALID_ARGUMENT", 422, 2


class InvalidTrajectory(SapoError):
    """a trajectory group that must not enter the log"""

    code, http_status, exit_code = "INVALID_ARGUMENT", 422, 3


class Unauthenticated(SapoError):
    """wrong or missing token"""

    code, http_status, exit_code = "UNAUTHENTICATED", 401, 4


class NotFound(SapoError):
    """no such run, policy, version, blob or file"""

    code, http_status, exit_code = "NOT_FOUND", 404, 5


class Mismatch(SapoError):
    """digests, tokenizer or model differ from the run's"""

    code, http_status, exit_code = "FAILED_PRECONDITION", 409, 6


class Fenced(SapoError):
    """a newer writer has taken over"""

    code, http_status, exit_code = "ABORTED", 409, 7


class Unavailable(SapoError):
    """a peer cannot be reached or is not ready yet, or disk or memory is full; trying again may help"""

    code, http_status, exit_code = "UNAVAILABLE", 503, 8


class Corrupt(SapoError):
    """a file or the log does not check out"""

    code, http_status, exit_code = "DATA_LOSS", 500, 9


class Forbidden(SapoError):
    """the token's role does not allow this"""

    code, http_status, exit_code = "PERMISSION_DENIED", 403, 10
