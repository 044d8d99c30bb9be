"""HTTP calls to a server that may be away for a while: they wait, say so now and then, and give up in the end."""

from __future__ import annotations

import http.client
import json
import logging
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from kdrl_pl.errors import TeacherLost
from kdrl_pl.text import printable

log = logging.getLogger(__name__)

TOKEN_VARIABLE = "KDRL_TEACHER_TOKEN"
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 15.0  # seconds between two attempts; doubled each time, with jitter
CONNECT = 15.0  # seconds in which a connection must come about
REMIND = 60.0  # seconds between two warnings
_AWAY = (408, 425, 429, 500, 502, 503, 504)  # statuses of a server that may answer later


class Refused(ValueError):
    """The server understood and said no; asking again would not help.

    Args:
        status: HTTP status.
        message: what it said.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def read_token(file: str | Path | None) -> str | None:
    """The bearer token: of the file, else of the environment variable KDRL_TEACHER_TOKEN, else None.

    Never from the command line, which every user of the machine can read.

    Raises:
        ValueError: what should be a token is none.
        OSError: the file cannot be read.
    """
    where = f"${TOKEN_VARIABLE}" if file is None else str(file)
    token = os.environ.get(TOKEN_VARIABLE, "") if file is None else Path(file).expanduser().read_text(encoding="utf-8")
    token = token.strip()
    if file is None and not token:
        return None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"{where} holds no token; expected one line of printable characters without spaces")
    return token


class _Away(Refused):
    """The server answered that it cannot answer now."""


class Server:
    """A server that is called from several threads over connections that stay open.

    Args:
        url: http://host:port or https://host:port, a path before that of the calls allowed.
        token: bearer token, if it wants one.
        timeout: seconds without a byte from it after which a call is made anew.
        patience: seconds without any answer after which calls fail.
        should_stop: polled while waiting; once true, calls fail at once.

    Raises:
        ValueError: the URL is none.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout: float = 600.0,
        patience: float = 1800.0,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ValueError(f"{url!r} is no URL of a server; expected http://host:port or https://host:port")
        self.url, self.token, self.timeout, self.patience = url.rstrip("/"), token, timeout, patience
        self.should_stop = should_stop
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._random = random.Random()  # the global one belongs to the run
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._busy: set[http.client.HTTPConnection] = set()
        self._away_since: float | None = None
        self._warned = self._answered = 0.0
        self.absences = 0  # times that it was away and came back, or may have been: it closed a connection

    @property
    def is_exposed(self) -> bool:
        """Whether the token crosses a network in clear."""
        return self.token is not None and self._tls is None and self._host not in ("localhost", "127.0.0.1", "::1")

    def get(self, path: str) -> bytes:
        """The body of the answer; see `call`."""
        return self.call("GET", path)

    def post(self, path: str, body: bytes) -> bytes:
        """The body of the answer; see `call`."""
        return self.call("POST", path, body)

    def post_once(self, path: str, body: bytes) -> bytes:
        """The same without patience, for what a healthy server may answer with an error.

        Raises:
            Refused: any answer but a good one.
            OSError, HTTPException: no answer.
        """
        return self._once("POST", path, body)

    def call(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """The body of a good answer, however long it takes.

        Raises:
            Refused: the server says no.
            TeacherLost: there was no answer for `patience` seconds, or a signal arrived.
        """
        pause = FIRST_PAUSE
        while True:
            began = time.monotonic()
            try:
                answer = self._once(method, path, body)
            except ssl.SSLCertVerificationError as error:
                raise Refused(0, f"{self.url} shows a certificate that this machine does not trust: {error}") from None
            except _Away as error:
                self._note_absence(str(error), began)
            except (OSError, http.client.HTTPException) as error:
                self._note_absence(f"{type(error).__name__}: {error}", began)
            else:
                self._note_presence()
                return answer
            self._wait(pause * (0.5 + self._random.random() / 2))
            pause = min(2 * pause, LONGEST_PAUSE)

    def interrupt(self) -> None:
        """Make calls that wait for an answer in other threads fail now; `should_stop` must be true."""
        with self._lock:
            for connection in self._busy:
                if connection.sock is not None:
                    with suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def _once(self, method: str, path: str, body: bytes | None) -> bytes:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is not None:
            try:
                return self._exchange(connection, method, path, body, headers)
            except TimeoutError:
                raise
            except (OSError, http.client.HTTPException):
                self._check_stop()  # else the server closed a connection that was idle for long, or is a new one
                with self._lock:
                    self.absences += 1
        wait = min(self.timeout, CONNECT)
        if self._tls is None:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=wait)
        else:
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=wait, context=self._tls)
        connection.connect()
        connection.sock.settimeout(self.timeout)
        return self._exchange(connection, method, path, body, headers)

    def _exchange(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None, headers: dict
    ) -> bytes:
        with self._lock:
            self._busy.add(connection)
        content = None
        try:
            self._check_stop()  # from here on `interrupt` finds it
            connection.request(method, f"{self._path}{path}", body, headers)
            response = connection.getresponse()
            content = response.read()
        finally:
            with self._lock:
                self._busy.discard(connection)
                is_open = content is not None and connection.sock is not None  # the server may have closed its end
                if is_open:
                    self._idle.append(connection)
            if not is_open:
                connection.close()
        if response.status == 200:
            return content
        said = _said(content)
        if response.status in _AWAY:
            raise _Away(response.status, f"status {response.status}: {said}")
        raise Refused(response.status, f"{self.url} refuses the request with status {response.status}: {said}")

    def _note_absence(self, reason: str, began: float) -> None:
        self._check_stop()
        reason = printable(reason)
        with self._lock:
            now = time.monotonic()
            if self._away_since is None:
                self._away_since, self._warned = max(began, self._answered), -REMIND
            waited = now - self._away_since
            remind = now - self._warned >= REMIND
            self._warned = now if remind else self._warned
        if waited >= self.patience:
            raise TeacherLost(
                f"the teacher at {self.url} has not answered for {waited:.0f} s ({reason}); start it again, then "
                "resume this run; model.teacher.init_args.patience says how long a run waits"
            )
        if remind:
            log.warning(
                "the teacher at %s does not answer (%s); the run waits for it, %.0f s more",
                self.url,
                reason,
                self.patience - waited,
            )

    def _note_presence(self) -> None:
        with self._lock:
            since, self._away_since, self._answered = self._away_since, None, time.monotonic()
            self.absences += since is not None
        if since is not None:
            log.info("the teacher at %s answers again after %.0f s", self.url, time.monotonic() - since)

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._check_stop()
            time.sleep(min(left, 0.1))

    def _check_stop(self) -> None:
        if self.should_stop():
            raise TeacherLost(f"stopped while waiting for the teacher at {self.url}")


def _said(content: bytes) -> str:
    """The reason in an error's body, short and safe to print: it comes from the network."""
    text = content[:2000].decode(errors="replace")
    try:
        told = json.loads(text)
        told = told.get("detail") or told.get("error") or told.get("message") or told
        text = str(told.get("message", told) if isinstance(told, dict) else told)
    except (ValueError, AttributeError, RecursionError):
        pass
    return printable(" ".join(text.split())[:300]) or "without a reason"
