"""Clients that keep sending different applications and note each answer; and what the log has to hold afterwards."""
import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from running_service import Client, Told
from small_bundle import applications

from riskscore.chain import fingerprint, ledger_key
from riskscore.ledger import Report, verify
from riskscore.store import open_store

_RAW = applications(200, seed=3, target=False)
ROWS = [{name: values[i] for name, values in _RAW.items()} for i in range(200)]


@dataclass
class Sent:
    "A request, and what came of it."
    body: bytes
    key: str | None
    client: int
    at: float  # sent, on the monotonic clock
    told: Told | None = None  # None: the connection broke
    error: str = ''
    done: float = 0.0  # when the answer was there

    @property
    def status(self) -> int:
        return self.told.status if self.told else 0

    @property
    def request_id(self) -> str:
        assert self.told
        return self.told.headers['x-request-id']


@dataclass
class Load:
    "Clients with a connection each, until the block ends."
    port: int
    clients: int = 6
    pause: float = 0.004  # seconds between two requests of a client: the load shall leave room for what is tested
    path: str = '/predict'
    name: str = ''  # begins the keys
    first: int = 0  # number of the first application
    keyed: bool = True  # gives a key to each second request
    rows: list[dict[str, Any]] = field(default_factory=lambda: ROWS)
    distinct: bool = True  # no application twice
    sent: list[Sent] = field(default_factory=list)

    def __enter__(self) -> 'Load':
        self._going, self._threads = True, [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._going = False
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads), 'a request was never answered'

    def _run(self, number: int) -> None:
        client, n = Client(self.port, timeout=50), self.first + number
        while self._going:
            row = self.rows[n % len(self.rows)]
            row = row | {'amount': round(100 + n * 0.01, 2)} if self.distinct else row
            key = f'{self.name}{number}-{n}' if self.keyed and (n - self.first) // self.clients % 2 else None
            sent = Sent(json.dumps(row).encode(), key, number, time.monotonic())
            try:
                sent.told = client.post(self.path, sent.body, Content_Type='application/json', **({'Idempotency_Key': key} if key else {}))
            except (OSError, http.client.HTTPException) as error:
                sent.error = type(error).__name__
                time.sleep(0.02)
            sent.done = time.monotonic()
            self.sent.append(sent)
            n += self.clients
            time.sleep(self.pause if sent.status in (0, 200) else 0.05)
        client.close()

    @property
    def answered(self) -> list[Sent]:
        return [s for s in self.sent if s.status == 200]

    @property
    def statuses(self) -> Counter:
        return Counter(s.status for s in self.sent)

    def reach(self, more: int, what: Callable[[Sent], bool] = lambda s: s.status == 200, wait: float = 60) -> None:
        "Waits until so many more requests came out like that."
        start, until = len(self.sent), time.monotonic() + wait
        while sum(map(what, self.sent[start:])) < more:
            assert time.monotonic() < until, f'{more} such answers did not come: {self.statuses}'
            time.sleep(0.02)


def resend(port: int, sent: Sent) -> Told:
    "The same request on a connection of its own."
    client = Client(port)
    try:
        return client.post('/predict', sent.body, Content_Type='application/json', **({'Idempotency_Key': sent.key} if sent.key else {}))
    finally:
        client.close()


def eventually(what: Callable[[], Any], wait: float = 60) -> Any:
    "Asks until the answer is yes."
    until = time.monotonic() + wait
    while not (found := what()):
        assert time.monotonic() < until, 'it did not come'
        time.sleep(0.05)
    return found


def walk(folder: Path, url: str = '') -> Report:
    "The log of a service, verified."
    store = open_store(url or f'sqlite:///{folder}/riskscore.db')
    try:
        return verify(store, ledger_key('', folder / 'ledger.key'), folder / 'anchors')
    finally:
        store.close()


def tables(folder: Path, url: str = '') -> dict[str, list[dict[str, Any]]]:
    "All rows of the log."
    store = open_store(url or f'sqlite:///{folder}/riskscore.db')
    with store.read() as connection:
        found = {name: [dict(row) for row in connection.execute(sa.select(table)).mappings()] for name, table in store.tables.items()}
    store.close()
    return found


def meant(text: str | bytes) -> str:
    "What an application says, however it is written: each field once, without nulls, 5 as 5.0."
    given = {k: float(v) if type(v) is int else v for k, v in json.loads(text).items() if v is not None}
    return json.dumps(given, sort_keys=True)


def check_log(folder: Path, sent: list[Sent], url: str = '') -> dict[str, list[dict[str, Any]]]:
    "Every answer is in the log as it was sent, the chains are whole, and there is nothing half or double; gives the rows."
    report = walk(folder, url)
    assert report.ok, [report.text, *report.findings[:5]]
    rows, secret = tables(folder, url), ledger_key(path=folder / 'ledger.key')
    decisions = {row['request_id']: row for row in rows['decisions']}
    people = {row['request_id']: row for row in rows['applications']}
    assert len(decisions) == len(rows['decisions']) and set(decisions) == set(people)
    for chain in rows['chains']:
        numbers = sorted(row['seq'] for name in ('decisions', 'audit') for row in rows[name] if row['writer'] == chain['writer'])
        assert numbers == list(range(1, len(numbers) + 1)), chain['writer']
    for s in sent:
        if s.status == 200:
            answer = s.told.json['request_id']
            assert decisions[answer]['answer'].encode() == s.told.body and meant(people[answer]['content']) == meant(s.body)
            assert decisions[answer]['idempotency'] == (s.key and fingerprint(secret, f'local\n{s.key}'.encode()))
    stored = Counter(meant(row['content']) for row in rows['applications'])
    tried = Counter(meant(s.body) for s in sent)
    assert not stored - tried, 'an application is stored more often than it was sent'
    keyed = {meant(s.body) for s in sent if s.key}
    assert all(n == 1 for body, n in stored.items() if body in keyed), 'an application with a key is stored twice'
    return rows
