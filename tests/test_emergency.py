"""After a stop is acknowledged no automated decision is made, whatever the service is and whatever becomes of it; and no application is lost.

64 clients keep sending to two workers. What the store holds is compared with the moment of the acknowledgement.
"""
import json
import sqlite3
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from running_service import Client, Running, service, start
from service_load import ROWS, Load, Sent, check_log, eventually, meant, resend, tables
from test_live_drift import model, pointer  # noqa: F401
from test_service_faults import BROKEN, workers_of

from riskscore.chain import now

CLIENTS = 64


def stopped_at(client: Client, reason: str = 'a test') -> str:
    "Stops; gives the time of the acknowledgement."
    told = client.post('/emergency-stop', {'reason': reason})
    assert told.status == 200 and told.json['stopped'], told
    return now()


def decided(folder: Path) -> set[str]:
    "Automated decisions in the store, at this moment."
    with closing(sqlite3.connect(folder / 'riskscore.db')) as connection:
        return {name for name, in connection.execute("SELECT request_id FROM decisions WHERE status = 'scored'")}


def chained_stops(rows: dict) -> None:
    "In the chain of who stopped there is no automated decision between the stop and the next change."
    for stop in (row for row in rows['audit'] if row['event'] == 'stopped'):
        later = [row['seq'] for row in rows['audit'] if row['writer'] == stop['writer'] and row['seq'] > stop['seq'] and row['event'] == 'resumed']
        numbers = [row['seq'] for row in rows['decisions'] if row['writer'] == stop['writer'] and row['status'] == 'stopped' and row['seq'] > stop['seq']]
        last = min(later, default=max(numbers, default=stop['seq']))
        assert not [row for row in rows['decisions'] if row['writer'] == stop['writer'] and row['status'] == 'scored' and stop['seq'] < row['seq'] < last]


def decided_between(rows: dict, begin: str, end: str = '~') -> list[dict]:
    "Automated decisions that the store received in a time."
    return [row for row in rows['decisions'] if row['status'] == 'scored' and begin < row['received_at'] < end]


def check_stop(rows: dict, sent: list[Sent], begin: str, end: str = '~') -> None:
    "Nothing was decided in a stop; each application that was put aside is stored once, as one for a person."
    assert not decided_between(rows, begin, end)
    held = [row for row in rows['decisions'] if row['status'] == 'stopped']
    assert {row['decision'] for row in held} <= {'refer'} and {(row['pd'], row['score']) for row in held} <= {(None, None)}
    refused = [s for s in sent if s.status == 503]
    content = {row['request_id']: meant(row['content']) for row in rows['applications']}
    stored = Counter(content[row['request_id']] for row in held)
    assert set(stored) <= {meant(s.body) for s in sent} and {meant(s.body) for s in refused} <= set(stored)
    keyed = {meant(s.body) for s in sent if s.key}
    assert all(n == 1 for body, n in stored.items() if body in keyed)  # also where it was sent again
    for s in refused:
        assert s.told.json['decision'] == 'refer' and float(s.told.headers['retry-after']) > 0
        assert content[s.told.json['request_id']] == meant(s.body)


def refused_again(running: Running, load: Load, many: int) -> list[Sent]:
    "Sends again what was put aside, with the same key."
    found = []
    for s in [s for s in load.sent if s.status == 503 and s.key][:many]:
        again = Sent(s.body, s.key, -1, time.monotonic(), resend(running.port, s))
        assert again.status == 503 and again.told.json['request_id'] == s.told.json['request_id']
        found.append(again)
    return found


def stop_under_load(folder: Path, pointer: Path, stops: int, kill: bool) -> None:  # noqa: F811
    "Stops, again and again; the last time everything is killed and started again."
    running, sent, times = start(folder, pointer, workers=2, max_waiting=CLIENTS * 2), [], []
    try:
        clients = workers_of(running)
        for number in range(stops):
            with Load(running.port, name=f'{number}-', first=number * 50_000, clients=CLIENTS, pause=0.01) as load:
                load.reach(CLIENTS)
                begin = stopped_at(clients[number % 2])
                before = decided(folder)  # an answer may come late; a decision may not
                load.reach(CLIENTS, lambda s: s.status == 503)
                if kill and number == stops - 1:
                    running.kill()
            sent += load.sent
            assert set(load.statuses) <= {200, 503} | ({0} if kill else set())
            assert {s.error for s in load.sent if not s.status} <= BROKEN | {'ConnectionRefusedError'}
            if kill and number == stops - 1:
                running = start(folder, pointer, port=running.port, workers=2)
                clients = workers_of(running)
                assert all(c.get('/emergency-stop').json['stopped'] for c in clients)
                with Load(running.port, name='after-', first=900_000, clients=8) as after:
                    after.reach(20, lambda s: s.status == 503)
                assert set(after.statuses) == {503}
                sent += after.sent
            sent += refused_again(running, load, 10)
            end = now()
            assert decided(folder) == before
            assert clients[(number + 1) % 2].post('/emergency-stop/resume', {'reason': 'looked at'}).status == 200
            times.append((begin, end))
        rows = check_log(folder, sent)
        for begin, end in times:
            check_stop(rows, sent, begin, end)
        if stops == 1:
            chained_stops(rows)
        events = [row['event'] for row in sorted(rows['audit'], key=lambda row: row['at']) if row['event'] in ('stopped', 'resumed')]
        assert events == ['stopped', 'resumed'] * stops
        scored_later(running, load)
    finally:
        running.kill()


def scored_later(running: Running, load: Load) -> None:
    "With the same key an application is scored after the stop, and linked."
    s = next(s for s in load.sent if s.status == 503 and s.key)
    told = resend(running.port, s)
    assert told.status == 200 and told.json['supersedes'] == s.told.json['request_id']
    again = resend(running.port, s)
    assert again.body == told.body and again.headers['idempotent-replay'] == 'true'


def test_after_a_stop_nothing_is_decided_and_kills_change_nothing(tmp_path, pointer):  # noqa: F811
    stop_under_load(tmp_path / 'serving', pointer, 1, True)


@pytest.mark.slow
def test_after_many_stops_nothing_is_decided(tmp_path, pointer):  # noqa: F811
    for number in range(3):
        stop_under_load(tmp_path / f'serving{number}', pointer, 6, True)


@pytest.mark.slow
def test_what_a_batch_holds_is_stopped_too(tmp_path, pointer):  # noqa: F811
    with service(tmp_path / 'serving', pointer, workers=2) as running:
        body = '\n'.join(json.dumps(ROWS[i % 200] | {'amount': 100 + i * 0.01}) for i in range(6000)).encode()
        path, headers = '/predict_batch?purpose=decision', {'Content_Type': 'application/x-ndjson', 'Idempotency_Key': 'one-batch'}
        told = []

        def send() -> None:
            told.append(Client(running.port, timeout=60).post(path, body, **headers))

        thread = threading.Thread(target=send)
        thread.start()
        eventually(lambda: len(tables(running.folder)['decisions']) > 500)
        begin = stopped_at(running.client())
        thread.join(60)
        counts = {k: int(told[0].headers[f'x-{k}']) for k in ('rows', 'scored', 'refused', 'failed')}
        rows = tables(running.folder)
        assert counts['rows'] == 6000 == len(rows['decisions']) and 500 < counts['scored'] < 6000
        held = [row for row in rows['decisions'] if row['status'] == 'stopped']
        assert len(held) and not decided_between(rows, begin)
        again = Client(running.port, timeout=60).post(path, body, **headers)  # each row has a key of its own
        assert again.status == 200 and len(tables(running.folder)['decisions']) == 6000
