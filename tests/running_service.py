"""A scoring service in processes of its own, and a client that keeps its connection."""
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

LIGHT = {'RISKSCORE_LOG_LEVEL': 'warning'}


class Told(NamedTuple):
    "An answer."
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    "One connection, opened again when the server closed it."

    def __init__(self, port: int, key: str | None = None, timeout: float = 30):
        self.port, self.timeout = port, timeout
        self.headers = {'Authorization': f'Bearer {key}'} if key else {}
        self.connection: http.client.HTTPConnection | None = None

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Told:
        "Asks; a mapping or list is sent as JSON. Underscores in names of headers stand for hyphens."
        told = self.headers | {k.replace('_', '-'): v for k, v in headers.items()}
        if isinstance(body, dict | list):
            body, told = json.dumps(body).encode(), {'Content-Type': 'application/json'} | told
        self.connection = self.connection or http.client.HTTPConnection('127.0.0.1', self.port, timeout=self.timeout)
        try:
            self.connection.request(method, path, body, told)
            answer = self.connection.getresponse()
            found = Told(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        except (OSError, http.client.HTTPException):
            self.close()
            raise
        if found.headers.get('connection') == 'close':
            self.close()
        return found

    def get(self, path: str, **headers: str) -> Told:
        return self.ask('GET', path, **headers)

    def post(self, path: str, body: Any = None, **headers: str) -> Told:
        return self.ask('POST', path, body, **headers)

    def close(self) -> None:
        if self.connection:
            self.connection.close()
        self.connection = None


class Running(NamedTuple):
    "A running service."
    port: int
    folder: Path  # its database, key and anchors
    process: subprocess.Popen

    def client(self, key: str | None = None, timeout: float = 30) -> Client:
        return Client(self.port, key, timeout)

    def workers(self) -> list[int]:
        "Process ids of the worker processes below the supervisor."
        found = subprocess.run(['ps', '-ww', '--ppid', str(self.process.pid), '-o', 'pid=,args='], capture_output=True, text=True).stdout
        return [int(line.split()[0]) for line in found.splitlines() if 'spawn_main' in line]

    def kill(self) -> None:
        "Ends everything at once, without a chance to finish."
        if self.process.poll() is not None:
            return
        workers = self.workers()
        self.process.kill()  # the supervisor first: it would start others
        for pid in workers:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def stop(self) -> int:
        "Ends it as an operator does."
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


def start(folder: Path, model: Path, port: int | None = None, wait: float = 60, **settings: Any) -> Running:
    "Starts a service and waits until it is ready; settings by their names, such as workers=2."
    port = port or free_port()
    env = {k: v for k, v in os.environ.items() if not k.startswith('RISKSCORE_')} | LIGHT
    given = {'model': model, 'folder': folder, 'port': port} | settings
    env |= {f'RISKSCORE_{k.upper()}': str(v) for k, v in given.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'service.log', 'ab') as log:
        process = subprocess.Popen([sys.executable, '-c', 'from riskscore.cli import main; main()', 'serve'], env=env, stdout=log, stderr=log, cwd=folder)
    running, until = Running(port, folder, process), time.monotonic() + wait
    while time.monotonic() < until:
        client = Client(port, timeout=5)
        try:
            if client.get('/readyz').status == 200:
                return running
        except (OSError, http.client.HTTPException):
            pass
        finally:
            client.close()
        if process.poll() is not None:
            break
        time.sleep(0.05)
    running.kill()
    raise AssertionError(f'the service did not start: {(folder / "service.log").read_text()[-3000:]}')


@contextmanager
def service(folder: Path, model: Path, **settings: Any) -> Iterator[Running]:
    "A service for the length of a block."
    running = start(folder, model, **settings)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            try:
                running.stop()
            except subprocess.TimeoutExpired:
                running.kill()
