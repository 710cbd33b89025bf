"The guard in front of a tiny real server: what is slow, huge or too much is turned away while others are answered."
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
KEY = 'k' * 20
SERVER = '''
import asyncio, json, sys
import uvicorn
from riskscore.guard import Guard, GuardedProtocol, Limits
from riskscore.keys import parse_keys

seen = {'work': 0, 'most': 0, 'disconnected': 0, 'lengths': []}

async def app(scope, receive, send):
    if scope['type'] == 'lifespan':
        while True:
            kind = (await receive())['type']
            await send({'type': kind + '.complete'})
            if kind == 'lifespan.shutdown':
                return
    if scope['path'] == '/seen':
        return await answer(send, {**seen, 'counts': GuardedProtocol.counts, 'held': guard.held, 'waiting': guard.waiting - 1, 'streams': guard.streams})
    body, more = b'', True
    while more:
        message = await receive()
        if message['type'] == 'http.disconnect':
            seen['disconnected'] += 1
            return
        body, more = message['body'] if scope['path'] == '/batch' else body + message['body'], message['more_body']
    if scope['path'] == '/slow':
        seen['work'] += 1
        seen['most'] = max(seen['most'], seen['work'])
        await asyncio.sleep(0.4)
        seen['work'] -= 1
    if scope['path'] == '/fails':
        await send({'type': 'http.response.start', 'status': 200, 'headers': [(b'content-length', b'2')]})
        raise ValueError('between head and body')
    if scope['path'] == '/split':
        await send({'type': 'http.response.start', 'status': 200, 'headers': [(b'content-length', b'2'), (b'x', b'a\\r\\nset-cookie: b')]})
        return await send({'type': 'http.response.body', 'body': b'ok'})
    if scope['path'] == '/much':
        await send({'type': 'http.response.start', 'status': 200, 'headers': []})
        for _ in range(1000):
            await send({'type': 'http.response.body', 'body': b'x' * 100_000, 'more_body': True})
        return await send({'type': 'http.response.body', 'body': b''})
    seen['lengths'].append(len(body))
    await answer(send, {'length': len(body), 'id': scope['request_id']})

async def answer(send, value):
    body = json.dumps(value).encode()
    await send({'type': 'http.response.start', 'status': 200, 'headers': [(b'content-length', b'%d' % len(body))]})
    await send({'type': 'http.response.body', 'body': body})

given = json.loads(sys.argv[1])
limits = Limits(**{**dict(header_timeout=0.3, request_timeout=0.3, write_timeout=0.5, max_body=200_000, max_waiting=8, max_streams=2),
                   **given['limits'], 'streams': {'/batch': 3_000_000}, 'urgent': frozenset({'/seen'})})
guard = Guard(app, limits, admit=parse_keys(given['keys']).caller, open_paths=['/seen'], local=given['local'])
GuardedProtocol.limits = limits
config = uvicorn.Config(guard, port=0, loop='uvloop', http=GuardedProtocol, ws='none', log_level='critical', timeout_keep_alive=1)
server = uvicorn.Server(config)

async def main():
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await task

import uvloop
uvloop.run(main())
'''


class Server:
    "A running server and what a test asks of it."

    def __init__(self, keys=None, local=False, **limits):
        given = json.dumps({'limits': limits, 'keys': keys, 'local': local})
        self.process = subprocess.Popen([sys.executable, '-c', SERVER, given], stdout=subprocess.PIPE, text=True, cwd=ROOT,
                                        env=os.environ | {'PYTHONPATH': str(ROOT)})
        self.port = int(self.process.stdout.readline())

    def connect(self, *parts: bytes) -> socket.socket:
        "A raw connection that has sent these bytes."
        connection = socket.create_connection(('127.0.0.1', self.port), timeout=10)
        for part in parts:
            connection.sendall(part)
        return connection

    def ask(self, path='/', body=b'ab', method='POST', **headers):
        "One request on a connection of its own."
        return ask(http.client.HTTPConnection('127.0.0.1', self.port, timeout=10), path, body, method, **headers)

    def seen(self):
        return self.ask('/seen', method='GET', body=None)[2]

    def stop(self):
        self.process.terminate()
        self.process.wait(10)
        self.process.stdout.close()


def ask(connection, path='/', body=b'ab', method='POST', **headers):
    "Status, headers and document."
    connection.request(method, path, body, {k.replace('_', '-'): v for k, v in headers.items()})
    answer = connection.getresponse()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, json.loads(answer.read())


def rest(connection: socket.socket) -> bytes:
    "All that still comes until the other side closes."
    found = b''
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            found += piece
    return found


def send_on(connection: socket.socket, piece: bytes, times: int) -> int:
    "Sends a piece again and again; how many bytes went out before the other side closed."
    sent = 0
    with contextlib.suppress(ConnectionError):
        for _ in range(times):
            connection.sendall(piece)
            sent += len(piece)
    return sent


@pytest.fixture(scope='module')
def server():
    found = Server()
    yield found
    found.stop()


@pytest.fixture
def make():
    with contextlib.ExitStack() as stack:
        def start(**given):
            found = Server(**given)
            stack.callback(found.stop)
            return found
        yield start


def test_every_answer_has_the_headers_and_an_id_of_its_own(server):
    status, headers, document = server.ask()
    assert status == 200 and document['length'] == 2
    assert headers['x-request-id'] == document['id'] and len(document['id']) == 32
    for name, value in {'cache-control': 'no-store', 'x-content-type-options': 'nosniff', 'x-frame-options': 'DENY', 'referrer-policy': 'no-referrer',
                        'content-security-policy': "default-src 'none'; frame-ancestors 'none'"}.items():
        assert headers[name] == value
    assert server.ask()[1]['x-request-id'] != headers['x-request-id']


HEAD = b'POST / HTTP/1.1\r\nHost: localhost\r\n'
SLOW = {
    'nothing': b'', 'half a head': HEAD, 'an empty line': b'\r\n', 'half a body': HEAD + b'Content-Length: 100\r\n\r\nab',
    'no body': HEAD + b'Content-Length: 100\r\n\r\n', 'half a chunk': HEAD + b'Transfer-Encoding: chunked\r\n\r\n5\r\nab',
    'no last chunk': HEAD + b'Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n', 'half a batch': b'POST /batch HTTP/1.1\r\nContent-Length: 100\r\n\r\nab',
    'half a second head': b'GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HT',
    'a body that was asked for': HEAD + b'Content-Length: 100\r\nExpect: 100-continue\r\n\r\n',
}


def test_who_stops_half_way_is_cut_and_told(server):
    connections = {what: server.connect(sent) for what, sent in SLOW.items()}
    answers = {what: rest(connection) for what, connection in connections.items()} # each returns only when the server closes
    assert answers.pop('nothing') == b''
    assert answers.pop('half a second head').startswith(b'HTTP/1.1 200 ') # came in one packet: the time of an idle connection ends it
    for what, answer in answers.items():
        answer = answer.removeprefix(b'HTTP/1.1 100 Continue\r\n\r\n')
        assert answer.startswith(b'HTTP/1.1 408 Request Timeout\r\n'), what
        assert json.loads(answer.partition(b'\r\n\r\n')[2])['type'] == '/problems/slow', what


def test_slow_loris_holds_nobody_up(server):
    before = server.seen()['counts']
    heads = [server.connect(HEAD) for _ in range(150)]
    bodies = [server.connect(HEAD + b'Content-Length: 50\r\n\r\n') for _ in range(150)]
    answered, start = 0, time.monotonic()
    while time.monotonic() - start < 0.9: # three times the deadline
        for connection in heads + bodies: # a byte now and then, which puts off uvicorn's own time limits
            with contextlib.suppress(ConnectionError):
                connection.send(b'x')
        status, _, _ = server.ask()
        answered += status == 200
        assert status == 200 # more slow ones than there are places: none of them takes one
        time.sleep(0.02)
    after = server.seen()
    assert answered > 5
    assert after['counts']['head'] - before.get('head', 0) == 150 and after['counts']['body'] - before.get('body', 0) == 150
    assert after['waiting'] == 0
    for connection in heads + bodies:
        connection.close()


def test_a_batch_that_trickles_is_cut(server):
    before = server.seen()['counts'].get('body', 0)
    connection = server.connect(b'POST /batch HTTP/1.1\r\nContent-Length: 100000\r\n\r\n')
    start = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - start < 5:
            connection.sendall(b'x')
            time.sleep(0.1)
    assert time.monotonic() - start < 4.5 and server.seen()['counts']['body'] == before + 1
    assert server.seen()['streams'] == 0


def test_a_batch_that_keeps_coming_may_take_longer_than_a_request(server):
    connection = server.connect(b'POST /batch HTTP/1.1\r\nContent-Length: 100000\r\nConnection: close\r\n\r\n')
    for _ in range(10):
        connection.sendall(b'x' * 10000)
        time.sleep(0.08)
    assert rest(connection).startswith(b'HTTP/1.1 200 ')


def test_who_does_not_take_the_answer_is_cut(server):
    before = server.seen()['counts'].get('write', 0)
    connection = server.connect(b'GET /much HTTP/1.1\r\n\r\n')
    start = time.monotonic()
    while server.seen()['counts'].get('write', 0) == before and time.monotonic() - start < 8:
        time.sleep(0.05)
    assert server.seen()['counts']['write'] == before + 1 and server.seen()['waiting'] == 0
    assert 0 < len(rest(connection)) < 100_000_000


@pytest.mark.parametrize('path', ['/', '/batch'])
@pytest.mark.parametrize('how', ['length', 'chunked', 'unannounced'])
def test_a_body_of_a_gigabyte_is_not_read(server, path, how):
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    head = b'POST %s HTTP/1.1\r\nHost: localhost\r\n' % path.encode()
    if how == 'length':
        connection = server.connect(head + b'Content-Length: 1000000000\r\n\r\n')
        answer = connection.recv(65536)
        assert answer.startswith(b'HTTP/1.1 413 ') and b'connection: close' in answer # before a byte of it was sent
        sent = send_on(connection, b'x' * 100_000, 10_000)
    elif how == 'chunked':
        connection = server.connect(head + b'Transfer-Encoding: chunked\r\n\r\n')
        sent = send_on(connection, b'186a0\r\n' + b'x' * 100_000 + b'\r\n', 10_000)
    else: # the sender reads the answer only at the end
        connection = server.connect(head + b'Content-Length: 1000000000\r\n\r\n')
        sent = send_on(connection, b'x' * 100_000, 10_000)
    assert sent < 50_000_000 # what fits into the buffers of two sockets, and the little that is read
    assert process.memory_info().rss - before < 20_000_000
    assert server.ask()[0] == 200 and server.seen()['held'] == 0 and server.seen()['streams'] == 0


def test_the_peak_of_memory_stays_small_after_all_that(server):
    status = Path(f'/proc/{server.process.pid}/status')
    if not status.exists():
        pytest.skip('the peak is read from /proc')
    for size in (200_000, 2_999_999):
        assert server.ask('/batch' if size > 200_000 else '/', b'x' * size)[0] == 200
    peak = int(status.read_text().partition('VmHWM:')[2].split()[0]) * 1024
    assert peak < psutil.Process(server.process.pid).memory_info().rss + 40_000_000


def test_a_body_at_the_limit_is_read_and_one_byte_more_is_not(server):
    for size, status in ((200_000, 200), (200_001, 413)):
        assert server.ask('/', b'x' * size)[0] == status
        chunks = (b'x' * n for n in (100_000, size - 100_000)) # of no known length, so sent in chunks
        assert server.ask('/', chunks)[0] == status


@pytest.mark.parametrize('what', [
    HEAD + b'X: ' + b'y' * 10**6, b'GET /' + b'y' * 10**6, HEAD + b'x: y\r\n' * 200_000,
    HEAD + b'Transfer-Encoding: chunked\r\n\r\n1;' + b'e' * 10**6, HEAD + b'Transfer-Encoding: chunked\r\n\r\n0\r\n' + b'T: y\r\n' * 200_000,
], ids=['a header', 'an address', 'many headers', 'a chunk extension', 'trailers'])
def test_an_endless_head_is_cut(server, what):
    connection = socket.create_connection(('127.0.0.1', server.port), timeout=10)
    send_on(connection, what, 1)
    assert b'HTTP/1.1 431' in rest(connection)[:20] or server.seen()['counts']['size']
    assert server.ask()[0] == 200


def test_too_many_headers_are_refused_and_the_connection_goes_on(server):
    connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=10)
    assert ask(connection, **{f'x_{i}': '1' for i in range(110)})[0] == 431
    assert ask(connection)[0] == 200


def test_what_is_not_http_gets_a_problem(server):
    answer = rest(server.connect(b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n'))
    assert answer.startswith(b'HTTP/1.1 400 ') and b'application/problem+json' in answer


def test_keep_alive_goes_on_after_refusals(make):
    server = make(keys=f'desk score {KEY}', max_body=1000)
    connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=10)
    connection.connect()
    ours = connection.sock.getsockname()
    for _ in range(3):
        status, headers, document = ask(connection)
        assert status == 401 and headers['www-authenticate'] == 'Bearer' and document['type'] == '/problems/key'
        assert ask(connection, authorization='Bearer ' + 'j' * 20)[0] == 401
        assert ask(connection, authorization=f'Bearer {KEY}')[0] == 200
        assert ask(connection, body=b'x' * 1000, x_api_key=KEY)[0] == 200
    assert connection.sock.getsockname() == ours
    assert ask(connection, body=b'x' * 1001, x_api_key=KEY)[1]['connection'] == 'close'


def test_answers_in_one_write_keep_to_http(server):
    for path in ('/a', '/b'):
        both = server.connect(b'GET %s HTTP/1.1\r\n\r\n' % path.encode() * 2 + b'GET / HTTP/1.1\r\nConnection: close\r\n\r\n')
        answers = rest(both)
        assert answers.count(b'HTTP/1.1 200 OK\r\n') == 3 and answers.count(b'connection: close') == 1 # each in its turn, then the end
    connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=10)
    connection.request('HEAD', '/')
    answer = connection.getresponse()
    assert answer.status == 200 and int(answer.getheader('content-length')) > 10 and answer.read() == b''
    assert ask(connection)[0] == 200
    assert rest(server.connect(b'GET / HTTP/1.0\r\n\r\n')).startswith(b'HTTP/1.1 200 OK\r\n')


def test_a_failure_between_head_and_body_is_a_500(server):
    assert rest(server.connect(b'GET /fails HTTP/1.1\r\n\r\n')).startswith(b'HTTP/1.1 500 ')
    assert b'set-cookie' not in rest(server.connect(b'GET /split HTTP/1.1\r\n\r\n'))
    assert server.ask()[0] == 200 and server.seen()['waiting'] == 0


def test_without_keys_other_names_and_other_pages_are_refused(make):
    server = make(local=True)
    connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=10)
    assert ask(connection)[0] == 200
    assert ask(connection, host='rebound.example')[0] == 421
    assert ask(connection, host='localhost', origin='https://evil.example')[0] == 403
    assert ask(connection, host='localhost', origin='null')[0] == 403
    assert ask(connection, host='localhost', origin='http://localhost:8866')[0] == 200
    assert rest(server.connect(b'GET / HTTP/1.0\r\n\r\n')).startswith(b'HTTP/1.1 421 ')


def test_two_thousand_connections_are_held_and_others_answered(make):
    server = make(header_timeout=20, request_timeout=20)
    connections = [server.connect() for _ in range(1000)] + [server.connect(HEAD) for _ in range(1000)]
    assert [server.ask()[0] for _ in range(20)] == [200] * 20
    for connection in connections[1000:1020]: # they are alive: the rest of a head is answered
        connection.sendall(b'Content-Length: 2\r\n\r\nab')
        assert connection.recv(100).startswith(b'HTTP/1.1 200 ')
    assert server.seen()['counts'].get('head', 0) == 0
    for connection in connections:
        connection.close()


def test_a_new_connection_takes_the_place_of_one_that_waits(make):
    server = make(max_connections=20, header_timeout=20, request_timeout=20)
    idle = [server.connect() for _ in range(20)]
    assert [server.ask()[0] for _ in range(10)] == [200] * 10
    later = [server.connect(HEAD + b'Content-Length: 2\r\n\r\nab') for _ in range(9)]
    assert all(c.recv(100).startswith(b'HTTP/1.1 200 ') for c in later)
    assert server.seen()['counts']['idle'] == 10 # nine, and one to be asked
    closed = 0
    for connection in idle:
        connection.settimeout(0.05)
        with contextlib.suppress(TimeoutError):
            closed += connection.recv(10) == b''
    assert closed == 10
    for connection in later: # none of those that were answered since
        connection.settimeout(0.01)
        with pytest.raises(TimeoutError):
            while connection.recv(1000):
                pass
    for connection in idle + later:
        connection.close()


def test_when_all_connections_are_busy_a_new_one_is_told_to_come_back(make):
    server = make(max_connections=4)
    busy = [server.connect(b'POST /slow HTTP/1.1\r\nContent-Length: 2\r\n\r\nab') for _ in range(4)]
    time.sleep(0.1)
    answer = rest(server.connect())
    assert answer.startswith(b'HTTP/1.1 503 ') and b'retry-after: 1' in answer
    assert all(c.recv(100).startswith(b'HTTP/1.1 200 ') for c in busy)


def test_more_in_work_than_there_are_places(server):
    connections = [server.connect(b'POST /slow HTTP/1.1\r\nContent-Length: 2\r\n\r\nab') for _ in range(40)]
    answers = [c.recv(2000) for c in connections]
    assert sorted(a.split()[1] for a in answers) == [b'200'] * 8 + [b'503'] * 32
    refused = [a for a in answers if a.split()[1] == b'503']
    assert all(b'retry-after: 1\r\n' in a and b'/problems/overload' in a and b'connection: close' not in a for a in refused)
    for connection, answer in zip(connections, answers, strict=True): # all of them may ask again on the same connection
        if answer.split()[1] == b'503':
            connection.sendall(b'GET / HTTP/1.1\r\n\r\n')
            assert connection.recv(100).startswith(b'HTTP/1.1 200 ')
    seen = server.seen()
    assert seen['most'] == 8 and seen['waiting'] == 0


def test_large_bodies_together_are_bounded(make):
    server = make(max_body=10**6, max_held=10**6, max_waiting=100, request_timeout=5, header_timeout=5)
    parts = []
    for number in range(10):
        parts.append(server.connect(HEAD + b'Content-Length: 900000\r\n\r\n', b'x' * 500_000))
        while number < 2 and server.seen()['held'] < (number + 1) * (500_000 - 65_536):  # two fit, and are read before others come
            time.sleep(0.01)
    time.sleep(0.3)
    small = server.ask()
    assert small[0] == 200
    refused = []
    for connection in parts:
        connection.settimeout(0.05)
        with contextlib.suppress(TimeoutError):
            refused.append(connection.recv(2000))
    assert len(refused) == 8 and all(a.startswith(b'HTTP/1.1 503 ') and b'connection: close' in a for a in refused)
    for connection in parts:
        connection.close()
    time.sleep(0.2)
    assert server.seen()['held'] == 0 and server.ask('/', b'x' * 900_000)[0] == 200
