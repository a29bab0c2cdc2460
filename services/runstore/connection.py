"""One connection to the run's server: scripts, time limits, retries, and Redis' errors as ours."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from typing import Any, Self
from urllib.parse import urlsplit

import tenacity
from redis import asyncio as redis_asyncio
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from sapo_learner.errors import ConfigError, Corrupt, Fenced, SapoError, Unauthenticated, Unavailable
from services.runstore.keys import Keys

OLDEST_SERVER = (7, 0)
_REFUSED = (exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError)
# A server that is down, starting, loading its file, or a replica about to be promoted.
_TRANSIENT = (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ReadOnlyError)


# What a server answers that refuses for now: it lacks replicas or its disk, runs a long script, or is failing over.
_FOR_NOW = frozenset({"NOREPLICAS", "MISCONF", "BUSY", "LOADING", "CLUSTERDOWN", "TRYAGAIN", "MASTERDOWN", "READONLY"})


class OutOfMemory(Unavailable):
    """The server reached its maxmemory."""


class Connection:
    """Base of the parts of RunStore. Every call is idempotent, so it is repeated for up to `timeout` seconds."""

    def __init__(self, url: str, run: str, *, timeout: float) -> None:
        self.run, self.timeout = run, timeout
        self._keys = Keys(run)
        self._sources: dict[str, Any] = {}
        try:
            self.address = _address(url)
            self._redis: Any = redis_asyncio.Redis.from_url(
                url,
                protocol=2,  # pinned: redis-py's replies differ between protocols
                decode_responses=False,  # payloads are bytes
                socket_timeout=timeout,
                socket_connect_timeout=timeout,
                retry=Retry(NoBackoff(), 0),  # retries are ours: one place, one limit
                health_check_interval=30,
            )
            pool = self._redis.connection_pool
            pool.connection_class(**pool.connection_kwargs)  # of options that are none, connections hear first
        except (ValueError, TypeError, AttributeError, exceptions.RedisError):
            # Not what they say: they quote what they took for the port, and that may be of the password.
            raise ConfigError(
                "not a Redis address, or with an option behind ? that is none",
                fix="SAPO_REDIS_URL=redis://:PASSWORD@HOST:PORT/0, in the password % and two hexadecimal digits for "
                "each of :/?#[]@%",
            ) from None

    @classmethod
    async def connect(
        cls,
        url: str,
        run: str,
        *,
        timeout: float = 10.0,
        patience: float | None = None,
        waiting: Callable[[str | None], None] = lambda _: None,
    ) -> Self:
        """Wait up to `patience` seconds (default: `timeout`) for the server, check that it is fit, use it for `run`.

        waiting: told why it takes so long, and None once the server has answered. Raises Unavailable when it does not,
        ConfigError when it is too old or may evict keys, Unauthenticated.
        """
        patience = timeout if patience is None else patience
        store = cls(url, run, timeout=min(timeout, patience / 2) if patience < timeout else timeout)
        try:
            store._check_server(await store._call(store._ask_info, patience=patience, waiting=waiting))
        except BaseException:
            await store.close()
            raise
        return store

    async def close(self) -> None:
        await self._redis.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _check_server(self, info: dict[str, Any]) -> None:
        version = str(info["redis_version"])  # Valkey reports the Redis version it is compatible with
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_SERVER:
            raise ConfigError(
                f"the server is version {version}",
                where=f"Redis at {self.address}",
                fix="Redis 7.0 or newer, or Valkey 8 or newer, is needed",
            )
        policy = str(info.get("maxmemory_policy", "noeviction"))
        if policy != "noeviction":
            raise ConfigError(
                f"maxmemory-policy is {policy}: the server may delete what nobody has read",
                where=f"Redis at {self.address}",
                fix="set maxmemory-policy to noeviction",
            )

    async def _info(self) -> dict[str, Any]:
        info: dict[str, Any] = await self._call(self._ask_info)
        return info

    async def _ask_info(self) -> Any:
        return await self._redis.info("server", "memory")

    async def _script(self, name: str, keys: Sequence[str], *args: str | int | float | bytes) -> Any:
        """Run scripts/NAME.lua on the run's keys of these names."""
        if name not in self._sources:
            self._sources[name] = self._redis.register_script(_source(name))
        return await self._call(lambda: self._sources[name](keys=self._keys(*keys), args=args))

    async def _command(self, name: str, key: str, *args: str | int | bytes) -> Any:
        return await self._call(lambda: self._redis.execute_command(name, *self._keys(key), *args))

    async def _write(self, role: str, token: int, command: str, key: str, *args: str) -> None:
        """One command on one key, refused unless `token` is the newest of its role."""
        await self._script("write", ["tokens", key], role, token, command, *args)

    async def _call(
        self,
        action: Callable[[], Awaitable[Any]],
        *,
        patience: float | None = None,
        waiting: Callable[[str | None], None] = lambda _: None,
    ) -> Any:
        """Repeat `action` with back-off while the server cannot be reached, for up to `patience` (default `timeout`)
        seconds; its errors as ours."""
        patience = self.timeout if patience is None else patience

        def failed(state: tenacity.RetryCallState) -> None:
            waiting(f"Redis at {self.address}: {state.outcome.exception() if state.outcome else ''}")

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_is_transient),
            wait=tenacity.wait_random_exponential(multiplier=0.02, max=1.0),
            stop=tenacity.stop_after_delay(patience),
            before_sleep=lambda state: waiting(
                f"Redis at {self.address}: {state.outcome and state.outcome.exception()}"
            ),
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    result = await _uncancelled(action())
                    waiting(None)
                    return result
        except exceptions.RedisError as error:
            raise self._translated(error, patience) from error

    def _translated(self, error: exceptions.RedisError, patience: float) -> SapoError:
        where, message = f"Redis at {self.address}", str(error)
        code, _, detail = message.partition(" ")
        if isinstance(error, exceptions.NoPermissionError):
            return Unauthenticated(message, where=where, fix="allow that user what docs/security.md lists")
        if _refused(error):
            return Unauthenticated(message, where=where, fix="check the user and password in SAPO_REDIS_URL")
        if _is_transient(error):
            return Unavailable(
                f"no answer within {patience:g} s: {message}",
                where=where,
                fix="is it running, and is SAPO_REDIS_URL its address?",
            )
        if isinstance(error, exceptions.OutOfMemoryError):
            return OutOfMemory(message, where=where, fix="raise maxmemory, or lower the limits of the log")
        where = f"run {self.run!r}, {where}"
        if code == "FENCED":
            return Fenced(f"a newer writer (token {detail}) has taken over", where=where, fix="stop this process")
        if code == "FORKED":
            return Corrupt(f"the log there is not the archived one: {detail}", where=where, fix="rebuild it")
        if code == "NOTREADY":
            return Unavailable("the log has no generation", where=where, fix="the learner rebuilds it")
        if code == "UNRESTORED":
            return Unavailable("the policy registry is not restored", where=where, fix="the control plane restores it")
        return SapoError(message, where=where)


async def _uncancelled(action: Awaitable[Any]) -> Any:
    """Await `action`, and see to it that a cancellation that came meanwhile is not lost.

    redis-py writes under asyncio.wait_for, which on Python 3.11 swallows a cancellation when the write is done already.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    result = await action
    if task and task.cancelling() > before:
        raise asyncio.CancelledError
    return result


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, exceptions.ResponseError) and str(error).partition(" ")[0] in _FOR_NOW:
        return True
    return isinstance(error, _TRANSIENT) and not _refused(error)


def _refused(error: BaseException) -> bool:
    return isinstance(error, _REFUSED)


def _source(name: str) -> str:
    """scripts/NAME.lua with the prelude behind its first line, which holds the flags."""
    scripts = resources.files(__package__) / "scripts"
    flags, _, body = (scripts / f"{name}.lua").read_text().partition("\n")
    return f"{flags}\n{(scripts / 'prelude.lua').read_text()}\n{body}"


def _address(url: str) -> str:
    """The address for messages: without user and password."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2] or parts.path or "?"
