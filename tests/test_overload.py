"A running service with small bounds under far too much: it says so, serves who it can, forgets no answer, and is itself again at once."
import asyncio
import contextlib
import json
import resource
import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy as sa
from running_service import Running, service
from small_bundle import applications, small_bundle

from riskscore.store import open_store

RAW = applications(100, seed=21, target=False)
BODIES = [json.dumps({name: values[i] for name, values in RAW.items()}).encode() for i in range(100)]
BOUNDS = {'max_waiting': 16, 'max_connections': 2500, 'max_body': 20_000, 'max_batch_bytes': 1_000_000, 'header_timeout': 2, 'request_timeout': 2}
CROWD, MEMORY = 2000, 60  # connections; MB that the service may grow by, whatever comes: 2500 connections of 16 KB each, and 20 MB of answers and works
GIGABYTE, PIECE = 10**9, bytes(65536)
HEAD = b'POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: %s\r\n'


@pytest.fixture(scope='module')
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp('overload')
    small_bundle(folder, explains=True)
    with service(folder / 'serving', folder / 'champion.json', **BOUNDS) as found:
        for _ in range(2):  # what is loaded at the first request is no growth
            assert all(found.client().post('/predict', body, Content_Type='application/json').status == 200 for body in BODIES)
        yield found


@pytest.fixture(autouse=True)
def many_files():
    "Allows a test as many connections as it needs."
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CROWD + 1000
    if soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            pytest.skip(f'this machine allows {hard} open files; {wanted} are needed')
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def peak(running: Running) -> float:
    "The most memory that the service ever had, in MB."
    status = Path(f'/proc/{running.process.pid}/status')
    if not status.exists():
        pytest.skip('this system does not tell how much memory a process had')
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith('VmHWM')) / 1000


@contextlib.contextmanager
def bounded(running: Running):
    "Within it the service does not grow, and after it it answers as ever."
    before = peak(running)
    yield
    client = running.client()
    for body in BODIES[:20]:
        assert client.post('/predict', body, Content_Type='application/json').status == 200
    assert client.get('/readyz').status == 200 and running.process.poll() is None
    assert (after := peak(running)) - before < MEMORY, f'{before:.0f} MB became {after:.0f}'


def stored(running: Running) -> set[str]:
    "Ids of all decisions in the log."
    store = open_store(f'sqlite:///{running.folder}/riskscore.db')
    try:
        with store.read() as connection:
            return set(connection.scalars(sa.select(store.tables['decisions'].c.request_id)))
    finally:
        store.close()


# ---------------------------------------------------------------- many callers

@dataclass
class Crowd:
    "What callers were told who ask without a pause."
    statuses: Counter = field(default_factory=Counter)
    answered: list[str] = field(default_factory=list)
    hasty: int = 0  # refusals that do not say when to come back

    async def caller(self, port: int, number: int, until: float) -> None:
        reader, writer = await asyncio.open_connection('127.0.0.1', port)
        head = HEAD % (b'/predict', b'application/json')
        while time.monotonic() < until:
            number += 1
            body = BODIES[number % len(BODIES)]
            writer.write(head + b'Content-Length: %d\r\n\r\n' % len(body) + body)
            told = await reader.readuntil(b'\r\n\r\n')
            headers = dict(line.split(b': ', 1) for line in told.split(b'\r\n')[1:-2])
            await reader.readexactly(int(headers[b'content-length']))
            status = int(told.split(b' ', 2)[1])
            self.statuses[status] += 1
            if status == 200:
                self.answered.append(headers[b'x-request-id'].decode())
            elif int(headers.get(b'retry-after', b'0')) < 1:
                self.hasty += 1
        writer.close()


def overload(running: Running, callers: int, seconds: float) -> Crowd:
    "Callers who ask again as soon as they are answered."
    crowd = Crowd()

    async def all_of_them():
        until = time.monotonic() + seconds
        await asyncio.gather(*(crowd.caller(running.port, 7 * i, until) for i in range(callers)))

    before = stored(running)
    with bounded(running):
        asyncio.run(all_of_them())
    assert set(crowd.statuses) <= {200, 429, 503} and not crowd.hasty
    assert len(set(crowd.answered)) == crowd.statuses[200]
    assert len(stored(running) - before - set(crowd.answered)) == 20  # what was asked afterwards, and nothing else
    assert set(crowd.answered) <= stored(running)
    return crowd


def test_ten_times_too_many_callers(running):
    crowd = overload(running, 10 * BOUNDS['max_waiting'], 3)
    assert crowd.statuses[200] > 100 and crowd.statuses[503] > 100, crowd.statuses


@pytest.mark.slow
def test_ten_times_too_many_callers_for_a_minute(running):
    crowd = overload(running, 10 * BOUNDS['max_waiting'], 60)
    assert crowd.statuses[200] > 2000 and crowd.statuses[503] > 2000, crowd.statuses


# ---------------------------------------------------------------- slow callers

def test_two_thousand_slow_callers_take_nobodys_place(running):
    head = HEAD % (b'/predict', b'application/json')
    begun = [b'', b'POST /predict HT', head + b'X-Slow: ', head + b'Content-Length: 500\r\n\r\n{"amount"',
             head + b'Transfer-Encoding: chunked\r\n\r\n4\r\n{"am']
    with bounded(running), contextlib.ExitStack() as stack:
        crowd = []
        for i in range(CROWD):
            crowd.append(stack.enter_context(contextlib.closing(socket.create_connection(('127.0.0.1', running.port), timeout=10))))
            crowd[-1].sendall(begun[i % len(begun)])
        client = running.client()
        for body in BODIES[:50]:
            assert client.post('/predict', body, Content_Type='application/json').status == 200
        assert still_open(running) > CROWD / 2
        until = time.monotonic() + 30
        while (open_ := still_open(running)) > 1 and time.monotonic() < until:
            for connection in crowd[2::5]:  # a byte now and then buys no time
                with contextlib.suppress(OSError):
                    connection.send(b'T')
            assert client.post('/predict', BODIES[0], Content_Type='application/json').status == 200
            time.sleep(0.1)
        assert open_ <= 1  # the one that asks
        told = Counter(first_line(connection) for connection in crowd)
    assert told == {b'': CROWD / 5, b'HTTP/1.1 408 Request Timeout': CROWD * 4 / 5}, told  # who said nothing is told nothing


def still_open(running: Running) -> int:
    "Connections that the service holds."
    sockets = {inode for line in Path(f'/proc/{running.process.pid}/net/tcp').read_text().splitlines()[1:]
               if (parts := line.split())[1].endswith(f':{running.port:04X}') and parts[3] == '01' and (inode := parts[9]) != '0'}
    return len(sockets)


def first_line(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536).partition(b'\r\n')[0]
    except ConnectionResetError:
        return b''


# ---------------------------------------------------------------- large bodies

@pytest.mark.parametrize('chunked', [False, True])
@pytest.mark.parametrize(('path', 'kind'), [(b'/predict', b'application/json'), (b'/predict_batch', b'text/csv'), (b'/predict_batch', b'application/json')])
def test_a_gigabyte_is_refused_long_before_its_end(running, path, kind, chunked):
    length = b'Transfer-Encoding: chunked\r\n\r\n' if chunked else b'Content-Length: %d\r\n\r\n' % GIGABYTE
    begin = b'[{"amount": "' if kind == b'application/json' else b'amount\n'
    piece = b'%x\r\n%s\r\n' % (len(PIECE), PIECE.replace(b'\0', b'1')) if chunked else PIECE.replace(b'\0', b'1')
    sent = 0
    with bounded(running), contextlib.closing(socket.create_connection(('127.0.0.1', running.port), timeout=10)) as connection:
        connection.sendall(HEAD % (path, kind) + length + (b'%x\r\n%s\r\n' % (len(begin), begin) if chunked else begin))
        with contextlib.suppress(ConnectionError):
            while sent < GIGABYTE:
                connection.sendall(piece)
                sent += len(piece)
        assert sent < 20_000_000
        told = b''
        with contextlib.suppress(ConnectionError):
            while found := connection.recv(65536):
                told += found
    assert not told or told.startswith(b'HTTP/1.1 413 ')  # the answer may be lost when the caller goes on sending


def test_whoever_listens_is_told_that_it_is_too_much(running):
    client = running.client()
    assert client.post('/predict', b' ' * 30_000, Content_Type='application/json').status == 413
    told = running.client().post('/predict_batch', b'amount\n' + b'500\n' * 300_000, Content_Type='text/csv')
    assert told.status == 413 and 'up to 1,000,000 bytes' in told.json['detail']
    batch = running.client().post('/predict_batch', b'amount\n' + b'500\n' * 1000, Content_Type='text/csv')
    assert batch.status == 200 and batch.headers['x-scored'] == '1000'
