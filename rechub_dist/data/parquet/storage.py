"""File systems by the address of their files, used with retries."""

from __future__ import annotations

import errno
import os
import queue
import random
import re
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import SplitResult, parse_qsl, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from rechub_dist.config import StorageConfig
from rechub_dist.config.secrets import from_environment, refuse_secret_address
from rechub_dist.errors import UserError, one_line
from rechub_dist.skips import BadFileError

T = TypeVar("T")

_HADOOP = ("hdfs", "viewfs")
_BY_ARROW = (*_HADOOP, "gcs", "file")
_LOCAL = ("file", "local")
_AZURE = ("abfs", "abfss")
# What a device, or a server behind a mounted file system, may answer better later.
_PASSING = {
    *(errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOMEM, errno.ENFILE, errno.EMFILE),
    *(errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.EHOSTDOWN),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EREMOTEIO, errno.ENOLINK, errno.ECOMM),
}
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # seconds between attempts
# Errors of Arrow's S3 and Azure clients that no retry fixes; 408 (time-out) and 429 (too many requests) are not among
# them.
_REFUSED = re.compile(
    r"(HTTP status|Azure Error: \[\w*\]) (?!408|429)4\d\d|ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH"
)


@dataclass(frozen=True)
class Store:
    """A file system with its address prefix and retry settings.

    Attributes:
        filesystem: a pyarrow file system.
        prefix: what precedes its paths in addresses: `s3://`, for example; empty for local files.
        settings: time-outs and deadline.
    """

    filesystem: Any = field(repr=False)
    prefix: str
    settings: StorageConfig

    @property
    def remote(self) -> bool:
        """Whether requests are expensive, so that few large ones are better."""
        return not isinstance(self.filesystem, pafs.LocalFileSystem)

    def inside(self, path: str) -> str:
        """The file system's own path of a file, given its address."""
        return path.removeprefix(self.prefix)

    def open(self, path: str) -> Any:
        """A file of the file system, to read.

        Raises:
            BadFileError: it is no file; to open a pipe would be to wait for who writes to it.
            OSError: as the file system does.
        """
        if not self.remote:
            mode = os.stat(path).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            if not stat.S_ISREG(mode):
                raise BadFileError(f"{path}: it is a pipe, a socket or a device, not a file; name a file", "unreadable")
        return self.filesystem.open_input_file(path)

    def address(self, path: str) -> str:
        """The address of a path of the file system."""
        return self.prefix + path

    def with_retries(self, work: Callable[[int], T], what: str) -> T:
        """The result of `work(attempt)`, retried while the store fails, until the deadline.

        A local disk is asked once more, as `work` may read in another way then; only what a device or a mounted file
        system may answer better later is tried until the deadline.

        Attempts run in another thread, as not every file system can be told when to give up on a hanging
        request. The pauses between attempts double, and vary at random lest all ranks come back at once.

        Args:
            work: called with the number of the attempt, from 0. It must not touch what an attempt that hangs may use.
            what: names the object in errors.

        Raises:
            BadFileError: the file is missing or may not be read, a local one also for any other reason that stays, or
                `work` has found it bad.
            UserError: the store has failed up to the deadline, or refuses the request.
        """
        end = time.monotonic() + self.settings.deadline_seconds
        pause, attempt = _FIRST_PAUSE, 0
        while True:
            allowed = min(self.settings.attempt_seconds, max(0.0, end - time.monotonic()))
            try:
                return _within(allowed, lambda number=attempt: work(number))  # type: ignore[misc]
            except UserError:
                raise
            except FileNotFoundError as error:
                raise BadFileError(
                    f"{what} cannot be read ({_short(error)}); check that it is there and may be read", "missing"
                ) from error
            except PermissionError as error:
                raise BadFileError(
                    f"{what} cannot be read ({_short(error)}); check that it is there and may be read", "unreadable"
                ) from error
            except (NotADirectoryError, IsADirectoryError) as error:
                raise BadFileError(f"{what} cannot be read ({_short(error)}); check the path", "unreadable") from error
            except Exception as error:  # whichever the client library raises
                if _REFUSED.search(str(error)):
                    raise UserError(
                        f"{what} cannot be read, the store refuses it ({_short(error)}); check credentials, region "
                        "and permissions"
                    ) from error
                attempt += 1
                if not self.remote and not _may_pass(error):
                    if attempt < 2:
                        continue
                    raise BadFileError(
                        f"{what} cannot be read ({_short(error)}); check the file, and write it again if need be",
                        "unreadable",
                    ) from error
                pause_now = pause * random.uniform(0.5, 1.5)
                if time.monotonic() + pause_now >= end:
                    raise UserError(
                        f"{what} cannot be read: {attempt} attempts within {self.settings.deadline_seconds:g} s have "
                        f"failed, the last with: {_short(error)}; check the store and the network, or raise "
                        "data.storage.deadline_seconds (and distributed.timeout_seconds)"
                    ) from error
                time.sleep(pause_now)
                pause = min(2 * pause, _LONGEST_PAUSE)


def locate(address: str, settings: StorageConfig) -> tuple[Store, str]:
    """The store of a path or address, and the path in its file system (without the options after a `?`).

    Raises:
        UserError: an unknown kind of address, one that contains a secret, a missing package, or invalid settings.
    """
    if "://" not in address:
        return Store(pafs.LocalFileSystem(), "", settings), address
    refuse_secret_address(address)
    base, _, query = address.partition("?")
    options = {**dict(parse_qsl(query)), **from_environment(settings.options)}
    scheme = urlsplit(base).scheme
    try:
        if scheme in ("s3", "gs"):
            path = base.removeprefix(f"{scheme}://")
            filesystem = _s3(path, settings, options) if scheme == "s3" else _gcs(settings, options)
        elif scheme in _AZURE:
            filesystem, path = _azure(urlsplit(base), settings, options)
        elif scheme in _BY_ARROW:
            filesystem, path = pafs.FileSystem.from_uri(base + (f"?{_query(options)}" if options else ""))
        else:
            filesystem, path = _fsspec(base, options)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"{address}: {one_line(error)}; install the package that serves {scheme}:// addresses"
        ) from None
    except Exception as error:  # whatever a client's constructor raises
        hadoop = (
            " the Hadoop client (JAVA_HOME, HADOOP_HOME, CLASSPATH, ARROW_LIBHDFS_DIR)," if scheme in _HADOOP else ""
        )
        raise UserError(
            f"{address}: {scheme}:// cannot be reached ({_short(error)}); check{hadoop} the address, data.storage and "
            "the credentials in the environment"
        ) from error
    prefix = base[: len(base) - len(path)] if base.endswith(path) else f"{scheme}://"
    return Store(filesystem, "" if scheme == "file" else prefix, settings), path


def is_remote(address: str) -> bool:
    """Whether an address means the same on all hosts; a path means each host's own disk."""
    return "://" in address and urlsplit(address).scheme not in _LOCAL


def local_path(address: str) -> str | None:
    """The local path (or pattern) of a path or `file://` address; None for other addresses.

    Raises:
        UserError: an invalid address.
    """
    if is_remote(address):
        return None
    if "://" not in address:
        return address
    pattern = address.replace("[", "%5B").replace("]", "%5D")  # which URIs do not allow
    return locate(pattern, StorageConfig())[1]


def join(root: str, name: str) -> str:
    """`name` below `root`; `name` itself if it is an address or an absolute path."""
    if "://" in name or name.startswith("/"):
        return name
    base, mark, options = root.partition("?") if "://" in root else (root, "", "")
    return f"{base.rstrip('/')}/{name}{mark}{options}"


def read_text(path: str, settings: StorageConfig) -> str | None:
    """A small text file wherever it lies; returns as `read_bytes`, and raises as it does and for what is not UTF-8."""
    found = read_bytes(path, settings)
    try:
        return None if found is None else found.decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; write it again as UTF-8") from None


def read_bytes(path: str, settings: StorageConfig) -> bytes | None:
    """The content of a small file at a path or address; None if there is no such file.

    Raises:
        UserError: it cannot be read.
    """
    store, inside = locate(path, settings)

    def fetch(_attempt: int) -> bytes | None:
        if store.filesystem.get_file_info(inside).type != pafs.FileType.File:
            return None
        with store.open(inside) as source:
            return source.read()

    return store.with_retries(fetch, path)


def exists(path: str, settings: StorageConfig) -> bool:
    """Whether a file or folder exists. Raises UserError if the store fails."""
    store, inside = locate(path, settings)
    kind = store.with_retries(lambda _: store.filesystem.get_file_info(inside.rstrip("/") or "/").type, path)
    return kind != pafs.FileType.NotFound


def _s3(path: str, settings: StorageConfig, options: dict[str, Any]) -> Any:
    given: dict[str, Any] = {
        "anonymous": settings.anonymous,
        "connect_timeout": settings.connect_timeout_seconds,
        # on Linux this is the time that a request may stall, not a socket time-out
        "request_timeout": settings.request_timeout_seconds,
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=settings.client_attempts),
    }
    if settings.endpoint:
        scheme, _, host = settings.endpoint.rpartition("://")
        given |= {"endpoint_override": host, "scheme": scheme or "https"}
    if settings.region:
        given["region"] = settings.region
    given |= options
    if (
        not {"region", "endpoint_override"} & given.keys()
        and not {"AWS_REGION", "AWS_DEFAULT_REGION"} & os.environ.keys()
    ):
        given["region"] = pafs.resolve_s3_region(path.partition("/")[0])
    return pafs.S3FileSystem(**given)


def _gcs(settings: StorageConfig, options: dict[str, Any]) -> Any:
    given: dict[str, Any] = {
        "anonymous": settings.anonymous,
        "retry_time_limit": timedelta(seconds=settings.attempt_seconds),
    }
    if settings.endpoint:
        scheme, _, host = settings.endpoint.rpartition("://")
        given |= {"endpoint_override": host, "scheme": scheme or "https"}
    return pafs.GcsFileSystem(**(given | options))


def _azure(address: SplitResult, settings: StorageConfig, options: dict[str, Any]) -> tuple[Any, str]:
    """The file system of `abfs://container@account.dfs.core.windows.net/path` or `abfs://container/path`, and the path.

    The environment variables of Azure's own tools supply what neither the address nor the options give.
    """
    account, _, _ = (address.hostname or "").partition(".")
    given = {
        name: os.environ[variable]
        for name, variable in (
            ("account_name", "AZURE_STORAGE_ACCOUNT"),
            ("account_key", "AZURE_STORAGE_KEY"),
            ("sas_token", "AZURE_STORAGE_SAS_TOKEN"),
        )
        if variable in os.environ and not (name != "account_name" and {"account_key", "sas_token"} & options.keys())
    }
    if address.username:
        given["account_name"] = account
    if settings.endpoint:
        scheme, _, host = settings.endpoint.rpartition("://")
        for service in ("blob", "dfs"):
            given |= {f"{service}_storage_authority": host, f"{service}_storage_scheme": scheme or "https"}
    given |= options
    if "account_name" not in given:
        raise UserError(
            f"{address.geturl()}: no storage account is given; write "
            "abfs://container@account.dfs.core.windows.net/path, or set AZURE_STORAGE_ACCOUNT or "
            "data.storage.options.account_name"
        )
    filesystem, path = pafs.AzureFileSystem(**given), address.path.lstrip("/")
    if address.username:  # the path is relative to the container
        return pafs.SubTreeFileSystem(address.username, filesystem), path
    return filesystem, f"{address.netloc}/{path}".rstrip("/")


def _query(options: dict[str, Any]) -> str:
    return "&".join(f"{name}={value}" for name, value in options.items())


def _fsspec(base: str, options: dict[str, Any]) -> tuple[Any, str]:
    """The file system and path of any other address, through fsspec."""
    try:
        from fsspec.core import url_to_fs  # noqa: PLC0415 - optional
    except ImportError:
        raise UserError(f"{base}: addresses of this kind need the package fsspec: pip install fsspec") from None
    filesystem, path = url_to_fs(base, **options)
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


class _Helper:
    """A thread that works for another one, which may stop waiting for it."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        # it references only the queues, so that it ends when the helper is garbage-collected
        threading.Thread(target=_serve, args=(self._tasks, self._answers), name="rechub-dist-io", daemon=True).start()

    def __del__(self) -> None:
        self._tasks.put(None)

    def do(self, work: Callable[[], Any], seconds: float) -> tuple[Any, BaseException | None]:
        """(result, exception) of `work`. Raises queue.Empty after `seconds`; the helper is then unusable."""
        self._tasks.put(work)
        return self._answers.get(timeout=seconds)


def _serve(tasks: queue.SimpleQueue[Any], answers: queue.SimpleQueue[Any]) -> None:
    answer: tuple[Any, BaseException | None]
    while (work := tasks.get()) is not None:
        try:
            answer = (work(), None)
        except BaseException as error:  # it is raised where the work was requested
            answer = (None, error)
        answers.put(answer)
        del work, answer  # else they would live until the next task


_helpers = threading.local()


def _within(seconds: float, work: Callable[[], T]) -> T:
    """The result of `work`, run in a thread. Raises TimeoutError after `seconds`, and abandons the thread."""
    helper = _helpers.__dict__.pop("own", None) or _Helper()
    try:
        result, error = helper.do(work, seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:.3g} s") from None
    _helpers.own = helper  # only now: one that was abandoned, or interrupted, may still answer
    if error is not None:
        raise error
    return result


def _may_pass(error: BaseException) -> bool:
    """Whether a local disk may answer better later, by the error's number; what Arrow cannot decode has none."""
    return isinstance(error, TimeoutError) or getattr(error, "errno", None) in _PASSING


def _short(error: BaseException) -> str:
    """The first line of an error's message, or its class name."""
    if isinstance(error, pa.ArrowException | OSError) and not str(error).strip():
        return type(error).__name__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
