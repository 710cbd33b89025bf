"""What was answered is stored, whatever happens to the service: processes killed, disks full, databases locked or restarted.

Real processes are asked over HTTP by clients that do not stop when something breaks.
"""
import json
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from running_service import Running, service, start
from service_load import ROWS, Load, Sent, check_log, eventually, meant, resend, tables, walk
from small_bundle import small_bundle
from test_postgres import cluster, place  # noqa: F401


BROKEN = {'ConnectionResetError', 'RemoteDisconnected', 'BrokenPipeError', 'IncompleteRead'}


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('faults')
    small_bundle(folder)
    return folder / 'champion.json'


def workers_of(running: Running) -> list:
    "A client of each of two workers."
    found = {}

    def both() -> bool:
        client = running.client()
        found.setdefault(client.get('/health').json['started_at'], client)
        return len(found) == 2

    eventually(both)
    return list(found.values())


# ---------------------------------------------------------------- the whole service is killed

class Killed(NamedTuple):
    "What came of a service that was killed under load, started on the same folder, and so on."
    last: Path  # its folder as the last kill left it
    load: Load  # of the last time
    answered: int
    broken: int  # requests that broke off


def kill_again_and_again(folder: Path, model: Path, times: int) -> Killed:
    "After each start the log is held against all answers so far, and some requests are sent again; every fifth time there are two workers."
    dice, sent, load, writers = random.Random(times), [], Load(0), 0
    for number in range(times + 1):
        workers = 1 + (number % 5 == 4)
        running = start(folder / 'serving', model, workers=workers)
        try:
            writers += workers
            if workers == 2:
                workers_of(running)  # both have begun
            for s in dice.sample([s for s in load.answered if s.key], 5) if number else ():
                again = resend(running.port, s)
                assert again.body == s.told.body and again.headers['idempotent-replay'] == 'true'
            rows = check_log(running.folder, sent)
            if number < times:
                with Load(running.port, name=f'{number}-', first=number * 20_000, clients=8, pause=0) as load:
                    load.reach(100)
                    time.sleep(dice.random() * 0.3)
                    running.kill()
                assert set(load.statuses) == {0, 200} and {s.error for s in load.sent if not s.status} <= BROKEN | {'ConnectionRefusedError'}
                sent += load.sent
        finally:
            running.kill()
        if number == times - 1:
            shutil.copytree(running.folder, folder / 'last')
    assert len(rows['chains']) == writers
    return Killed(folder / 'last', load, sum(s.status == 200 for s in sent), sum(s.error in BROKEN for s in sent))


@pytest.fixture(scope='module')
def killed(tmp_path_factory, model):
    return kill_again_and_again(tmp_path_factory.mktemp('killed'), model, 3)


def test_killed_under_load_nothing_answered_is_lost(killed):
    assert killed.answered >= 300 and killed.broken >= 3  # there was something to lose each time


@pytest.mark.slow
def test_killed_twenty_times(tmp_path, model):
    found = kill_again_and_again(tmp_path, model, 20)
    print(f'20 kills: {found.answered} answers, {found.broken} requests broke off')
    assert found.answered >= 2000 and found.broken >= 20


def tampered(folder: Path, copy: Path, *statements: tuple) -> list:
    "What is found in a copy of the log after somebody changed it."
    shutil.copytree(folder, copy)
    with closing(sqlite3.connect(copy / 'riskscore.db')) as connection:
        for statement in statements:
            assert connection.execute(*statement).rowcount > 0
        connection.commit()
    report = walk(copy)
    assert not report.ok
    return report.findings


def test_what_was_answered_cannot_be_cut_off_changed_or_taken_out(killed, tmp_path):
    folder, load = killed.last, killed.load
    rows = tables(folder)
    assert walk(folder).ok
    chain = {row['request_id']: row for row in rows['decisions']}
    answered = sorted((chain[s.request_id] for s in load.answered), key=lambda row: row['seq'])
    writer, last, middle = answered[0]['writer'], answered[-1]['seq'], answered[len(answered) // 2]
    cut = tampered(folder, tmp_path / 'cut', ('DELETE FROM decisions WHERE writer = ? AND seq >= ?', (writer, last)))
    assert [(f.kind, f.writer, f.seq) for f in cut] == [('tail', writer, last)]
    half = tampered(folder, tmp_path / 'half', ('DELETE FROM decisions WHERE writer = ? AND seq >= ?', (writer, middle['seq'])))
    assert [(f.kind, f.writer, f.seq) for f in half] == [('tail', writer, middle['seq'])]
    changed = tampered(folder, tmp_path / 'changed', ('UPDATE decisions SET pd = pd + 1e-9 WHERE request_id = ?', (middle['request_id'],)))
    assert ('changed', writer, middle['seq'], middle['request_id']) in [(f.kind, f.writer, f.seq, f.request_id) for f in changed]
    assert {f.request_id for f in changed} == {middle['request_id']}
    gap = tampered(folder, tmp_path / 'gap', ('DELETE FROM decisions WHERE request_id = ?', (middle['request_id'],)))
    assert ('gap', writer, middle['seq'] + 1) in [(f.kind, f.writer, f.seq) for f in gap]
    application = tampered(folder, tmp_path / 'application', ("UPDATE applications SET content = content || ' ' WHERE request_id = ?",
                                                              (middle['request_id'],)))
    assert [(f.kind, f.request_id) for f in application] == [('content', middle['request_id'])]


# ---------------------------------------------------------------- the store does not take anything

@contextmanager
def full_tmpfs(folder: Path, running: Running):
    "A disk that is full to the last byte."
    with open(folder / 'ballast', 'wb', buffering=0) as ballast:
        with pytest.raises(OSError, match='No space left'):
            while True:
                ballast.write(b'0' * 4096)
        yield
    (folder / 'ballast').unlink()


@contextmanager
def full_by_limit(folder: Path, running: Running):
    "No file of the service may grow."
    processes = [running.process.pid, *running.workers()]
    before = [resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in processes]
    for pid, (_, hard) in zip(processes, before, strict=True):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, ((folder / 'riskscore.db-wal').stat().st_size, hard))
    yield
    for pid, limit in zip(processes, before, strict=True):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)


@contextmanager
def locked(folder: Path, running: Running):
    "Another process keeps everybody from writing."
    with closing(sqlite3.connect(folder / 'riskscore.db', isolation_level=None)) as other:
        other.execute('BEGIN IMMEDIATE')
        yield


@pytest.fixture
def disk(tmp_path):
    "A small disk of our own and how it is filled; a limit on the size of files where none can be mounted."
    folder = tmp_path / 'disk'
    folder.mkdir()
    if os.geteuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=24m', 'none', folder], capture_output=True).returncode:
        yield folder, full_by_limit
    else:
        yield folder, full_tmpfs
        subprocess.run(['umount', '-l', folder], check=True)


def refuses_and_recovers(folder: Path, running: Running, fault, load: Load) -> None:
    "Under load: a fault comes, everything is refused with a status, the process lives; the fault goes, and answers come again."
    load.reach(60)
    with fault(folder, running):
        load.reach(5, lambda s: s.status == 503)
        client = running.client()
        for path in ('/livez', '/readyz', '/health', '/model', '/policy', '/drift-status', '/emergency-stop', '/metrics', '/decisions', '/batches', '/nowhere'):
            assert client.get(path).status in (200, 404, 503), path
        assert client.get('/livez').status == 200
        since = time.monotonic()
        load.reach(5, lambda s: s.status == 503 and s.at > since)
        until = time.monotonic()
    load.reach(100)
    eventually(lambda: running.client().get('/readyz').status == 200)
    during = [s for s in load.sent if since < s.at and s.status == 200 and s.at < until]
    assert all(s.at > until - 5 for s in during)  # whoever waited for a lock when it went


def check_refusals(folder: Path, load: Load) -> None:
    "What was refused says so in the standard form, and is not stored."
    refused = [s for s in load.sent if s.status == 503]
    assert refused and set(load.statuses) == {200, 503}
    for s in refused:
        assert s.told.headers['content-type'] == 'application/problem+json' and float(s.told.headers['retry-after']) > 0, s.told
        assert s.told.json['type'].rpartition('/')[2] in ('store', 'overload') and s.told.json['status'] == 503
    rows = check_log(folder, load.sent)
    stored = {meant(row['content']) for row in rows['applications']}
    assert len(rows['applications']) == len(load.answered) and not stored & {meant(s.body) for s in refused}
    def counted() -> int:
        return sum(row['n'] for row in tables(folder)['windows'] if row['name'] == 'requests' and row['item'] == 'decision')

    eventually(lambda: counted() >= len(load.answered))  # they are counted once a second
    assert counted() == len(load.answered)  # what was rolled back is not counted either


@pytest.mark.parametrize('fault', [locked, pytest.param(full_by_limit, marks=pytest.mark.slow)])
def test_a_store_that_takes_nothing_is_said_and_got_over(tmp_path, model, fault):
    with service(tmp_path / 'serving', model, request_timeout=0.8) as running:
        with Load(running.port) as load:
            refuses_and_recovers(running.folder, running, fault, load)
        check_refusals(running.folder, load)
        s = next(s for s in load.sent if s.status == 503 and s.key)
        assert resend(running.port, s).status == 200


@pytest.mark.parametrize('workers', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_is_said_and_got_over(disk, model, workers):
    folder, fault = disk
    with service(folder / 'serving', model, workers=workers) as running:
        if workers == 2:
            workers_of(running)  # both have begun
        before = running.workers()
        with Load(running.port) as load:
            refuses_and_recovers(running.folder, running, fault, load)
        check_refusals(running.folder, load)
        assert running.workers() == before  # nobody died of it


# ---------------------------------------------------------------- the emergency stop

@pytest.fixture(scope='module')
def pair(tmp_path_factory, model):
    "A service of two workers, and what was sent to it."
    with service(tmp_path_factory.mktemp('pair') / 'serving', model, workers=2) as running:
        yield running, []


def test_nothing_is_decided_after_a_stop_was_answered(pair):
    running, sent = pair
    clients, stops, own = workers_of(running), [], Load(running.port)
    with Load(running.port, clients=8) as load:
        for number in range(8):
            load.reach(5)
            one, other = clients[number % 2], clients[number // 2 % 2]
            told = one.post('/emergency-stop', {'reason': 'a test'})
            began = time.monotonic()
            assert told.status == 200 and told.json['stopped'], told
            for client in clients:
                own.sent.append(Sent(json.dumps(ROWS[0]).encode(), None, 0, began, client.post('/predict', ROWS[0])))
            load.reach(5, lambda s: s.status == 503)
            stops.append((began, time.monotonic()))
            assert other.post('/emergency-stop/resume', {'reason': 'a test'}).status == 200
    assert set(own.statuses) == {503} and set(load.statuses) == {200, 503}
    assert not [s for s in load.answered for began, ended in stops if began < s.at and s.done < ended]
    sent += load.sent + own.sent
    rows = check_log(running.folder, sent)
    assert sum(row['status'] == 'stopped' for row in rows['decisions']) == load.statuses[503] + own.statuses[503]
    events = [row['event'] for row in sorted(rows['audit'], key=lambda row: row['at'])]
    assert [event for event in events if event in ('stopped', 'resumed')] == ['stopped', 'resumed'] * len(stops)


# ---------------------------------------------------------------- one worker dies

def sockets(pid: int) -> int:
    "How many sockets a process holds."
    found = 0
    for path in Path(f'/proc/{pid}/fd').iterdir():
        try:
            found += os.readlink(path).startswith('socket:')
        except OSError:
            continue
    return found


def counted(page: bytes, name: str, **labels: str) -> float:
    "The sum of a metric over the labels that are not given."
    total = 0.0
    for line in page.decode().splitlines():
        found = re.fullmatch(name + r'(?:\{(.*)\})? (\S+)', line)
        if found and set(labels.items()) <= set(re.findall(r'(\w+)="([^"]*)"', found[1] or '')):
            total += float(found[2])
    return total


def answers_counted(running: Running) -> float:
    client = running.client()
    page = client.get('/metrics')
    client.close()
    assert page.status == 200
    return counted(page.body, 'riskscore_requests_total', path='/predict', status='200')


def writers(folder: Path, table: str) -> set[str]:
    "The chains that have rows in a table, or are begun."
    with closing(sqlite3.connect(folder / 'riskscore.db')) as connection:
        return {writer for writer, in connection.execute(f'SELECT DISTINCT writer FROM {table}')}


def until_decided(running: Running, chains: set[str]) -> list[Sent]:
    "Sends on new connections, each of which is served by any worker, until all of these chains have decided."
    sent = []
    while not chains <= writers(running.folder, 'decisions'):
        sent.append(Sent(json.dumps(ROWS[0]).encode(), None, -1, time.monotonic()))
        sent[-1].told = resend(running.port, sent[-1])
    return sent


def test_a_worker_dies_and_the_others_go_on(pair):
    running, sent = pair
    workers_of(running)  # both have begun
    sent += until_decided(running, writers(running.folder, 'chains'))
    with Load(running.port, name='dies-', first=20_000, clients=10) as load:
        load.reach(100)
        before, seen, old = running.workers(), answers_counted(running), writers(running.folder, 'chains')
        victim = max(before, key=sockets)
        os.kill(victim, signal.SIGKILL)
        load.reach(100)
        new, = eventually(lambda: writers(running.folder, 'chains') - old)
        load.sent += until_decided(running, {new})
    assert len(running.workers()) == 2 and victim not in running.workers()
    assert set(load.statuses) == {0, 200}
    broken = Counter(s.client for s in load.sent if s.status == 0)
    assert max(broken.values(), default=0) <= 1, broken  # once each, those of the dead one; a new connection was never refused
    assert {s.error for s in load.sent if s.status == 0} <= BROKEN
    sent += load.sent
    rows = check_log(running.folder, sent)
    last = {writer: max(row['received_at'] for row in rows['decisions'] if row['writer'] == writer) for writer in old}
    dead = min(last, key=lambda writer: last[writer])
    answered = {s.request_id for s in sent if s.status == 200}
    alive = sum(row['writer'] != dead for row in rows['decisions'] if row['request_id'] in answered)
    eventually(lambda: answers_counted(running) >= alive)  # each hands over its counts once a second
    assert seen <= answers_counted(running) <= len(answered)  # what the dead one had handed over stays


@pytest.mark.slow
def test_a_worker_hangs_and_is_replaced(tmp_path, model):
    with service(tmp_path / 'serving', model, workers=2) as running:
        workers_of(running)  # both have begun
        with Load(running.port, clients=10) as load:
            load.reach(100)
            before = running.workers()
            victim = max(before, key=sockets)
            os.kill(victim, signal.SIGSTOP)
            eventually(lambda: set(running.workers()) - set(before))
            load.reach(100)
        assert victim not in running.workers() and max(Counter(s.client for s in load.sent if s.status == 0).values()) == 1
        assert set(load.statuses) <= {0, 200, 503}
        check_log(running.folder, load.sent)


@pytest.mark.slow
def test_a_worker_dies_while_the_store_takes_nothing(tmp_path, model):
    with service(tmp_path / 'serving', model, workers=2, request_timeout=1) as running:
        workers_of(running)  # both have begun
        with Load(running.port, clients=10) as load:
            load.reach(50)
            before = running.workers()
            with locked(running.folder, running):
                load.reach(5, lambda s: s.status == 503)
                os.kill(max(before, key=sockets), signal.SIGKILL)
                load.reach(30, lambda s: s.status == 503)  # the other one still says so, however often a new one cannot begin
            load.reach(100)
            eventually(lambda: set(running.workers()) - set(before))
            eventually(lambda: len(running.workers()) == 2 and running.client().get('/readyz').status == 200)
        assert running.process.poll() is None
        check_log(running.folder, load.sent)


# ---------------------------------------------------------------- PostgreSQL is restarted

@pytest.mark.slow
def test_a_restarted_postgresql_is_said_and_got_over(place, tmp_path, model):  # noqa: F811
    with service(tmp_path / 'serving', model, store=place.url, request_timeout=4) as running:
        with Load(running.port) as load:
            load.reach(100)
            for mode in ('fast', 'immediate'):
                place.cluster.control('stop', '-m', mode)
                load.reach(10, lambda s: s.status == 503)
                assert running.client().get('/livez').status == 200
                place.cluster.control('start')
                load.reach(100)
        assert set(load.statuses) == {200, 503}
        assert all(float(s.told.headers['retry-after']) > 0 for s in load.sent if s.status == 503)
        rows = check_log(running.folder, load.sent, place.url)
        assert len(rows['chains']) == 1 and len(rows['applications']) >= len(load.answered)
        for s in load.sent[-20:]:
            if s.key and s.status == 200:
                assert resend(running.port, s).body == s.told.body


# ---------------------------------------------------------------- a stop of the service

@pytest.mark.slow
def test_a_supervisor_dies_and_its_workers_end(tmp_path, model):
    with service(tmp_path / 'serving', model, workers=2) as running:
        workers_of(running)  # both have begun
        workers = running.workers()
        with Load(running.port, clients=10) as load:
            load.reach(100)
            running.process.kill()
            eventually(lambda: not any(Path(f'/proc/{pid}').exists() for pid in workers))  # or nobody could start the service again
        assert len(check_log(running.folder, load.sent)['decisions']) == len(load.answered)
    with service(tmp_path / 'serving', model, port=running.port) as again:
        assert again.client().post('/predict', ROWS[0]).status == 200


@pytest.mark.slow
def test_it_ends_also_while_the_store_takes_nothing(tmp_path, model):
    running = start(tmp_path / 'serving', model, request_timeout=1)
    with Load(running.port) as load:
        load.reach(50)
        with locked(running.folder, running):
            load.reach(5, lambda s: s.status == 503)
            running.stop()
    assert len(check_log(running.folder, load.sent)['decisions']) == len(load.answered)


@pytest.mark.parametrize('workers', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_was_accepted_is_answered_before_the_end(tmp_path, model, workers):
    running = start(tmp_path / 'serving', model, workers=workers)
    if workers == 2:
        workers_of(running)  # both have begun
    with Load(running.port, clients=12, pause=0) as load:
        load.reach(200)
        assert running.stop() in (0, -signal.SIGTERM)
    assert set(load.statuses) <= {0, 200, 503}
    rows = check_log(running.folder, load.sent)
    # whoever was not answered was not accepted: a connection that waits for a request may close, and nothing of it is decided
    assert len(rows['decisions']) == len(load.answered)
    assert rows['audit'] and walk(running.folder).ok
