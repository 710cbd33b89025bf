"Bodies that nobody should send, against the service in this process: none makes it fail, and none is scored that the contract does not take."
import asyncio
import json
import math
import signal
from contextlib import contextmanager

import hypothesis.strategies as st
import pytest
import sqlalchemy as sa
from generators import examples
from hypothesis import HealthCheck, given, settings
from small_bundle import applications, small_bundle

from riskscore.api import create_app
from riskscore.bundle import load_bundle
from riskscore.contract import check_record
from riskscore.settings import Settings

RAW = applications(40, seed=11, target=False)
ROWS = [{name: values[i] for name, values in RAW.items()} for i in range(40)]
JSON = (b'content-type', b'application/json')
PATIENCE = 60  # seconds; not a speed that is asked for, but the end of a hang


class Inside:
    "The service without a network."

    def __init__(self, folder):
        small_bundle(folder, explains=True)
        self.scorer, self.loop = load_bundle(folder / 'champion.json'), asyncio.new_event_loop()
        self.app = create_app(Settings(model=str(folder / 'champion.json'), folder=str(folder / 'serving'), max_body=200_000, max_batch_bytes=400_000))
        self.service = self.app.app.service
        self.loop.run_until_complete(self.service.start())

    def close(self):
        self.loop.run_until_complete(self.service.close())
        self.loop.close()

    def ask(self, body, path='/predict', method='POST', query=b'', headers=(JSON,), pieces=1):
        "Status, headers and body of the answer."
        size = max(1, -(-len(body) // pieces))
        parts, sent = [body[i:i + size] for i in range(0, len(body), size)] or [b''], []

        async def receive():
            if not parts:
                await asyncio.Event().wait()  # the caller listens
            body = parts.pop(0)
            return {'type': 'http.request', 'body': body, 'more_body': bool(parts)}

        async def send(message):
            sent.append(message)

        scope = {'type': 'http', 'method': method, 'path': path, 'raw_path': path.encode('utf-8', 'replace'), 'query_string': query,
                 'scheme': 'http', 'root_path': '', 'http_version': '1.1', 'server': ('127.0.0.1', 80), 'client': ('127.0.0.1', 1),
                 'headers': [(b'host', b'localhost'), *headers]}
        with in_time():
            self.loop.run_until_complete(self.app(scope, receive, send))
        return sent[0]['status'], dict(sent[0]['headers']), b''.join(m.get('body', b'') for m in sent[1:])

    def stored(self) -> int:
        with self.service.store.read() as connection:
            return sum(connection.scalar(sa.select(sa.func.count()).select_from(self.service.store.tables[name])) for name in ('decisions', 'trials'))


@contextmanager
def in_time():
    "Ends what hangs, also where Python holds its lock between two lines."
    def late(*_):
        raise AssertionError(f'no answer within {PATIENCE} seconds')

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope='module')
def inside(tmp_path_factory):
    found = Inside(tmp_path_factory.mktemp('fuzz'))
    yield found
    found.close()


# ---------------------------------------------------------------- what is sent

TOKENS = ['NaN', 'Infinity', '-Infinity', 'nan', '1e999', '-1e999', '1e-999', '-0', '-0.0', '0x10', '01', '1.', '.5', '+1', '1_0', '1e', '"', "'a'", '""',
          '" "', 'null', 'true', 'false', 'None', 'undefined', '[]', '{}', '[[]]', '{"a":1}', '1' * 400, '9' * 5000, '-' + '9' * 30, '0.' + '3' * 2000,
          '1.5', '3.0', '999', '999.0', '"999"', '1e3', '1E+2', '9007199254740993', '1.7976931348623157e308', '1.7976931348623159e308', '5e-324', '"\\ud800"',
          '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"\\u001f"', '"\u200b"', '"\u202e"', '"Y"', '"y"', '"web"', '"WEB"',
          '"nurse"', '"2026-02-30"', '"2026-01-31"', '"1899-12-31"', '"0001-01-01T00:00:00+14:00"', '"9999-12-31T23:59:59-14:00"', '19000', '"19000"',
          '[' * 2000, '[' * 500 + ']' * 500, '{"a":' * 300 + '1' + '}' * 300, '"' + 'x' * 5000 + '"', '/* */ 1', '1 // 2']
NAMES = ['"colour"', '""', '"Amount"', '"amount "', '"ämount"', '"\\u0061mount"', '"bad"', '"\\ud800"', 'amount', "'amount'", '1', 'null', '"__proto__"',
         '"f0"', '"' + 'n' * 3000 + '"']
json_values = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6)
anything = st.one_of(st.sampled_from(TOKENS), st.sampled_from(TOKENS), json_values.map(json.dumps), st.text(max_size=6),
                     st.integers(-10**20, 10**20).map(str), st.floats().map(repr))


@st.composite
def texts(draw):
    "An application whose members were changed, doubled, lost or made up."
    row = draw(st.sampled_from(ROWS))
    members = [[json.dumps(name), json.dumps(value)] for name, value in row.items()]
    for _ in range(draw(st.integers(0, 3))):
        at, what = draw(st.integers(0, len(members) - 1)), draw(st.integers(0, 9))
        if what < 6:
            members[at][1] = draw(anything)
        elif what == 6:
            members[at][0] = draw(st.sampled_from(NAMES))
        elif what == 7:
            members.append([members[at][0], draw(anything)])  # the last of two counts
        elif len(members) > 1:
            members.pop(at)
    colon, comma = draw(st.sampled_from([(':', ','), (' : ', ' ,\n'), (':', ',,'), ('=', ',')] if draw(st.integers(0, 9)) == 0 else [(':', ',')]))
    return '{' + comma.join(f'{name}{colon}{value}' for name, value in members) + '}'


SIGNS = [b'"', b'{', b'}', b'[', b']', b'\\', b',', b'\x00', b'\xff', b'\xed\xa0\x80', b'\xef\xbb\xbf', b'\xc0\x80']


def changed(draw, body: bytes) -> bytes:
    "Some bytes of a body flipped, lost, doubled or put in."
    for _ in range(draw(st.integers(1, 3))):
        at, what = draw(st.integers(0, len(body))), draw(st.integers(0, 5))
        if what == 0:
            body = body[:at]
        elif what == 1:
            body = body[:at] + draw(st.binary(min_size=1, max_size=4)) + body[at:]
        elif what == 2:
            body = body[:at] + body[at + draw(st.integers(1, 20)):]
        elif what == 3:
            body = body[:at] + body[at // 2:at] + body[at:]
        elif what == 4 and at < len(body):
            body = body[:at] + bytes([body[at] ^ (1 << draw(st.integers(0, 7)))]) + body[at + 1:]
        else:
            body = body[:at] + draw(st.sampled_from(SIGNS)) + body[at:]
    return body


@st.composite
def bodies(draw):
    "A body, in most cases near one that would be taken."
    kind = draw(st.integers(0, 19))
    if kind == 0:
        return draw(st.binary(max_size=60))
    if kind == 1:
        return json.dumps(draw(json_values)).encode()
    body = draw(texts()).encode('utf-8', 'surrogatepass')
    body = changed(draw, body) if kind < 9 else body
    return body.decode('utf-8', 'replace').encode(draw(st.sampled_from(['utf-16', 'utf-32', 'utf-8-sig', 'cp1252']))
                                                  if kind == 19 else 'utf-8', 'replace') if kind >= 18 else body


# ---------------------------------------------------------------- what is expected

def taken(contract, body: bytes) -> dict | None:
    "The application when it is to be scored, by plain JSON and `check_record`; None otherwise."
    try:
        raw = json.loads(body.decode(), parse_constant=lambda text: (text,))
        json.dumps(raw, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    if not isinstance(raw, dict) or any(v.severity == 'hard' for v in check_record(contract, raw)[1]):
        return None
    name = raw.get('app')
    return None if isinstance(name, str) and (len(name) > 400 or any(ord(c) < 32 or ord(c) == 127 for c in name)) else raw


def fuzz(inside, count: int) -> dict[int, int]:
    "How many bodies had which status."
    seen: dict[int, int] = {}
    before = inside.stored()

    @settings(max_examples=count, suppress_health_check=list(HealthCheck))
    @given(bodies(), st.integers(1, 5), st.sampled_from([b'', b'purpose=what_if', b'explain=false']))
    def check(body, pieces, query):
        status, headers, text = inside.ask(body, query=query, pieces=pieces)
        told, raw = json.loads(text), taken(inside.scorer.contract, body)
        assert (status == 200) == (raw is not None) and status in (200, 400, 422), (status, told)
        seen[status] = seen.get(status, 0) + 1
        if status == 200:
            expected = inside.scorer.record(raw)
            assert all(told[k] == expected[k] for k in ('pd', 'score', 'decision', 'value')) and 0 <= told['pd'] <= 1 and math.isfinite(told['pd'])
            assert told['request_id'] == headers[b'x-request-id'].decode()
        else:
            assert headers[b'content-type'] == b'application/problem+json' and told['status'] == status and len(text) < 50_000

    check()
    assert inside.stored() - before == seen[200]
    return seen


def test_a_thousand_bodies(inside):
    seen = fuzz(inside, examples(1000))
    assert seen.keys() == {200, 400, 422} and min(seen.values()) > 50 * examples(1), seen


@pytest.mark.slow
def test_ten_thousand_bodies(inside):
    seen = fuzz(inside, 10_000)
    assert sum(seen.values()) >= 9000 and min(seen.values()) > 500, seen


# ---------------------------------------------------------------- addresses, headers and batches

WORDS = [b'application/json', b'text/csv', b'purpose=decision', b'purpose=what_if&explain=false', b'explain=maybe', b'a=1', b'purpose=%64ecision', b'%ff',
         b'stopped:x', b'k\r\nX-Made-Up: 1', b'k' * 201, b'x-1', b'\xe9']
PATHS = ['/predict', '/predict_batch', '/decisions', '/reviews', '/outcomes', '/policy', '/emergency-stop/resume', '/decisions/\0',
         '/..//etc', '/predict\udce9']
METHODS = ['POST', 'POST', 'GET', 'HEAD', 'OPTIONS', 'TRACE', 'PUT']
word = st.one_of(st.binary(max_size=12), st.sampled_from(WORDS))


@settings(max_examples=examples(300), suppress_health_check=list(HealthCheck))
@given(st.sampled_from(PATHS), st.sampled_from(METHODS), word, word, word, st.sampled_from([b'{"amount": 500}', b'[]', b'', b'{', b'\xff']))
def test_any_address_and_header_has_an_answer(inside, path, method, query, kind, key, body):
    status, headers, text = inside.ask(body, path, method, query, [(b'content-type', kind), (b'idempotency-key', key)])
    assert status in (200, 400, 404, 405, 415, 422), (status, text)
    assert not any(c in part for pair in headers.items() for part in pair for c in b'\r\n\0') and b'x-made-up' not in headers
    if status != 200:
        assert headers[b'content-type'] == b'application/problem+json' and json.loads(text)['status'] == status


def as_csv(rows) -> bytes:
    return (','.join(ROWS[0]) + '\n' + ''.join(','.join('' if v is None else str(v) for v in row.values()) + '\n' for row in rows)).encode()


FORMS = {b'application/json': lambda rows: json.dumps(rows).encode(), b'text/csv': as_csv,
         b'application/x-ndjson': lambda rows: '\n'.join(map(json.dumps, rows)).encode()}


@st.composite
def uploads(draw):
    "A batch with something wrong in it."
    kind = draw(st.sampled_from(sorted(FORMS)))
    body = FORMS[kind](draw(st.lists(st.sampled_from(ROWS), min_size=1, max_size=4)))
    if kind == b'application/x-ndjson' and draw(st.booleans()):
        body = b'\n'.join(draw(st.lists(bodies(), max_size=4)))
    return kind, changed(draw, body) if draw(st.integers(0, 3)) else body


@settings(max_examples=examples(250), suppress_health_check=list(HealthCheck))
@given(uploads(), st.integers(1, 5), st.sampled_from([b'json', b'ndjson', b'csv']))
def test_any_batch_has_an_answer_for_each_row(inside, upload, pieces, form):
    kind, body = upload
    status, headers, text = inside.ask(body, '/predict_batch', query=b'format=' + form, headers=[(b'content-type', kind)], pieces=pieces)
    assert status in (200, 422), (status, text)
    if status == 200:
        rows, scored, refused, failed = (int(headers[f'x-{name}'.encode()]) for name in ('rows', 'scored', 'refused', 'failed'))
        assert rows == scored + refused and not failed
        if form == b'json':
            assert [r['row'] for r in json.loads(text)['results']] == list(range(1, rows + 1))
