"""The scoring service as its callers meet it: over HTTP, in a process of its own."""
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import time

import pytest
from running_service import LIGHT, service
from small_bundle import applications, small_bundle

from riskscore.bundle import load_bundle, write_pointer

KEYS = {name: f'{name}-key-of-sixteen' for name in ('desk', 'lab', 'ana', 'ben')}
ROLES = {'desk': 'score', 'lab': 'label', 'ana': 'operate', 'ben': 'operate'}
RAW = applications(200, seed=3, target=False)
ROWS = [{name: values[i] for name, values in RAW.items()} for i in range(200)]
ANSWER = ['request_id', 'received_at', 'purpose', 'status', 'pd', 'score', 'decision', 'knockout', 'value', 'currency', 'reasons', 'completeness', 'flags',
          'model_version', 'policy_version', 'supersedes']


def keys_text() -> str:
    return '; '.join(f'{name} {ROLES[name]} {key}' for name, key in KEYS.items())


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp('api')
    small_bundle(folder, explains=True)
    small_bundle(folder, trees=3, explains=True, pointer='challenger.json')
    return folder


@pytest.fixture(scope='module')
def running(home):
    with service(home / 'serving', home / 'champion.json', api_keys=keys_text(), challenger=home / 'challenger.json', max_body=20_000) as found:
        yield found


@pytest.fixture
def desk(running):
    return running.client(KEYS['desk'])


@pytest.fixture
def ana(running):
    return running.client(KEYS['ana'])


def decided(client, path='/predict', row=0, **headers):
    told = client.post(path, ROWS[row], **headers)
    assert told.status == 200, told
    return told.json


# ---------------------------------------------------------------- one application

def test_an_answer_has_all_that_was_promised(desk, home):
    told = desk.post('/predict', ROWS[0])
    answer = told.json
    assert told.status == 200 and list(answer) == ANSWER
    expected = load_bundle(home / 'champion.json').record(ROWS[0], explain=True)
    names = ('pd', 'score', 'decision', 'knockout', 'value')
    assert {k: answer[k] for k in names} == {k: expected[k] for k in names}
    assert [r['en'] for r in answer['reasons']] == [r['en'] for r in expected['reasons']] and all(r['es'] for r in answer['reasons'])
    assert re.fullmatch('[0-9a-f]{32}', answer['request_id']) and told.headers['x-request-id'] == answer['request_id']
    assert answer['model_version'] == load_bundle(home / 'champion.json').version


def test_what_is_missing_and_what_is_unusual_is_named(desk):
    answer = desk.post('/predict?explain=false', {'amount': 5000.0, 'job': 'astronaut', 'tenure': 999}).json
    assert answer['reasons'] is None
    assert answer['flags'] == [{'column': 'amount', 'rule': 'range'}, {'column': 'job', 'rule': 'unseen'}]
    assert answer['completeness'] == {'share': round(2 / 6, 4), 'given': 2, 'fields': 6, 'missing': ['income', 'tenure', 'channel', 'owner']}


def test_a_refusal_lists_everything_that_is_wrong(desk, ana):
    def refused():
        found = ana.get('/drift-status').json
        return found['refused'], {c['column']: c['rules'] for c in found['columns']}

    before, _ = refused()
    body = b'{"amount": -1, "income": NaN, "tenure": 1.5, "owner": "maybe", "channel": "moon", "colour": 3, "asked_on": 1e999}'
    told = desk.post('/predict', body, Content_Type='application/json')
    assert told.status == 422 and told.headers['content-type'] == 'application/problem+json'
    assert {(e['column'], e['rule']) for e in told.json['errors']} == {
        ('amount', 'hard_range'), ('income', 'type'), ('tenure', 'type'), ('owner', 'level'), ('channel', 'level'), ('colour', 'unknown'), ('asked_on', 'type')}
    assert told.json['status'] == 422 and told.json['request_id']
    until = time.monotonic() + 10
    while refused()[0] == before and time.monotonic() < until:
        time.sleep(0.1)
    after, columns = refused()
    assert after == before + 1 and columns['amount']['hard_range'] >= 1 and columns['other']['unknown'] >= 1 and 'colour' not in columns


@pytest.mark.parametrize(('path', 'body', 'headers', 'status'), [
    ('/predict', b'{"amount": 500', {}, 400),
    ('/predict', b'[]', {}, 400),
    ('/predict', b'', {}, 400),
    ('/predict', b'\xff', {}, 400),
    ('/predict?purpose=fun', b'{}', {}, 422),
    ('/predict?explain=1', b'{}', {}, 422),
    ('/predict?colour=1', b'{}', {}, 422),
    ('/predict', b'{"amount": 500}', {'Content_Type': 'text/plain'}, 415),
    ('/predict', b'{"amount": 500}', {'Idempotency_Key': 'a b'}, 422),
    ('/predict', b'{"amount": 500}', {'Idempotency_Key': 'stopped:x'}, 422),
    ('/predict', b' ' * 20_001, {}, 413),
    ('/nowhere', b'', {}, 404),
    ('/livez', b'', {}, 405),
])
def test_other_requests_are_problems(desk, path, body, headers, status):
    told = desk.post(path, body, **({'Content_Type': 'application/json'} | headers))
    assert told.status == status, told
    assert told.headers['content-type'] == 'application/problem+json' and told.json['status'] == status and told.json['title']


def test_a_key_brings_the_first_answer_again(desk):
    first = desk.post('/predict', ROWS[1], Idempotency_Key='order-1')
    again = desk.post('/predict', ROWS[1], Idempotency_Key='order-1')
    assert again.body == first.body and again.headers['idempotent-replay'] == 'true' and 'idempotent-replay' not in first.headers
    other = desk.post('/predict', ROWS[2], Idempotency_Key='order-1')
    assert other.status == 422 and other.json['type'].endswith('key-reused')
    assert desk.post('/predict?purpose=what_if', ROWS[1], Idempotency_Key='order-1').status == 422


def test_only_decisions_are_in_the_log(desk, ana):
    before = ana.get('/drift-status').json['decisions']
    trial = decided(desk, '/predict?purpose=what_if')
    test = decided(desk, '/predict?purpose=backtest')
    real = decided(desk)
    assert [ana.get(f"/decisions/{a['request_id']}").status for a in (trial, test, real)] == [404, 404, 200]
    assert ana.get('/drift-status').json['decisions'] == before + 1
    assert trial['pd'] == real['pd']


def test_every_answer_carries_safe_headers(desk):
    for told in (desk.get('/livez'), desk.post('/predict', {}), desk.get('/nowhere')):
        assert told.headers['x-content-type-options'] == 'nosniff' and told.headers['cache-control'] == 'no-store'
        assert 'access-control-allow-origin' not in told.headers and 'server' not in told.headers


# ---------------------------------------------------------------- who may do what

ACCESS = {'score': {'POST /predict', 'POST /predict_batch', 'GET /model', 'GET /drift-status', 'GET /policy', 'GET /emergency-stop', 'GET /health'},
          'label': {'POST /outcomes', 'GET /model', 'GET /drift-status', 'GET /policy', 'GET /emergency-stop', 'GET /health'}}
ALL = {'POST /predict', 'POST /predict_batch', 'POST /outcomes', 'GET /decisions', 'GET /decisions/x', 'POST /decisions/x/review', 'GET /batches', 'GET /model',
       'POST /model/reload', 'GET /policy', 'POST /policy', 'POST /policy/approve', 'GET /drift-status', 'GET /alerts', 'GET /reviews', 'GET /emergency-stop',
       'POST /emergency-stop', 'POST /emergency-stop/resume', 'GET /health'}


@pytest.mark.parametrize('name', ['desk', 'lab', 'ana', 'nobody', ''])
def test_roles(running, name):
    client = running.client(KEYS.get(name, name) or None)
    for what in sorted(ALL):
        told = client.ask(*what.split(), b'nonsense')
        if name in ('nobody', ''):
            assert told.status == 401 and told.headers['www-authenticate'] == 'Bearer', what
        else:
            role = ROLES[name]
            allowed = what in ACCESS[role] if role in ACCESS else what not in ('POST /predict', 'POST /predict_batch', 'POST /outcomes')
            assert (told.status == 403) != allowed, (what, told)
    assert client.get('/livez').status == client.get('/readyz').status == 200


def test_without_keys_only_this_machine_is_answered(home, tmp_path):
    with service(tmp_path / 'serving', home / 'champion.json') as found:
        client = found.client()
        assert client.get('/decisions').status == 200
        assert client.get('/decisions', Host='bank.example').status == 421
        assert client.get('/decisions', Origin='https://evil.example').status == 403
    command = [sys.executable, '-c', 'from riskscore.cli import main; main()', 'serve', '--host', '0.0.0.0']
    told = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=LIGHT | {'PATH': '/usr/bin:/bin'})
    assert told.returncode == 2 and 'API keys are needed' in told.stderr


def test_web_pages_may_call_only_from_the_origins_that_were_named(home, tmp_path, desk):
    asked = {'Origin': 'https://desk.example', 'Access_Control_Request_Method': 'POST', 'Access_Control_Request_Headers': 'authorization'}
    assert 'access-control-allow-origin' not in desk.ask('OPTIONS', '/predict', **asked).headers
    with service(tmp_path / 'serving', home / 'champion.json', cors_origins='https://desk.example', api_keys=keys_text()) as found:
        client = found.client(KEYS['desk'])
        told = client.ask('OPTIONS', '/predict', **asked)
        assert told.status == 200 and told.headers['access-control-allow-origin'] == 'https://desk.example'
        assert client.post('/predict', ROWS[0], Origin='https://desk.example').headers['access-control-allow-origin'] == 'https://desk.example'
        assert 'access-control-allow-origin' not in client.post('/predict', ROWS[0], Origin='https://evil.example').headers


def test_secrets_and_applicants_are_in_no_log(running, desk, ana):
    desk.post('/predict', {'amount': 'Jane Doe 4711'})
    desk.get('/decisions?applicant=A000001')
    ana.get('/decisions?applicant=A000001')
    text = (running.folder / 'service.log').read_text()
    assert not any(word in text for word in (*KEYS.values(), 'Jane Doe', 'A000001', (running.folder / 'ledger.key').read_text().strip()))


# ---------------------------------------------------------------- the log

def test_the_log_page_by_page_and_as_csv(desk, ana):
    mine = [decided(desk, row=i)['request_id'] for i in range(7)]
    found, cursor = [], ''
    while cursor is not None:
        page = ana.get('/decisions?limit=3' + (f'&cursor={cursor}' if cursor else '')).json
        found += [row['request_id'] for row in page['decisions']]
        cursor = page['next_cursor']
    assert found[:7] == mine[::-1] and len(found) == len(set(found))
    text = ana.get('/decisions?format=csv&decision=approve')
    listed = list(csv.DictReader(io.StringIO(text.body.decode())))
    assert text.headers['content-type'].startswith('text/csv') and {row['decision'] for row in listed} == {'approve'}
    assert {row['request_id'] for row in listed} <= set(found)
    assert [r['request_id'] for r in ana.get('/decisions?applicant=A000001').json['decisions']]
    assert ana.get('/decisions?decision=maybe').status == ana.get('/decisions?colour=1').status == 422


def test_a_person_decides_and_overrides(desk, ana, running):
    answers = [decided(desk, row=i) for i in range(60)]
    refer, approve = (next(a for a in answers if a['decision'] == d) for d in ('refer', 'approve'))
    for case, decision, event in ((refer, 'approve', 'reviewed'), (approve, 'decline', 'overridden')):
        told = ana.post(f"/decisions/{case['request_id']}/review", {'reviewer': 'M. Ruiz', 'decision': decision, 'reason': 'payslip seen'})
        assert told.status == 200 and told.json['event'] == event
        receipt = ana.get(f"/decisions/{case['request_id']}").json
        assert receipt['answer'] == case and receipt['final'] == decision and receipt['reviews'][0]['reviewer'] == 'M. Ruiz'
        assert receipt['reviews'][0]['actor'] == 'ana' and receipt['application']['app'].startswith('A')
    assert ana.post('/decisions/none/review', {'reviewer': 'M', 'decision': 'approve', 'reason': 'because'}).status == 404
    assert ana.post(f"/decisions/{refer['request_id']}/review", {'reviewer': 'M', 'decision': 'refer', 'reason': ''}).status == 422
    rates = ana.get('/reviews').json
    assert rates['overridden'] >= 1 and 0 < rates['override_rate'] < 1


def test_outcomes_that_arrive_later(desk, ana, running):
    lab, one = running.client(KEYS['lab']), decided(desk)['request_id']
    trial = decided(desk, '/predict?purpose=what_if')['request_id']
    day = time.strftime('%Y-%m-%d', time.gmtime())

    def send(*rows):
        return [r['status'] for r in lab.post('/outcomes', [{'request_id': i, 'bad': b, 'observed_at': day} for i, b in rows]).json['results']]

    assert send((one, 1), ('none', 0), (trial, 1)) == ['new', 'unknown', 'not_a_decision']
    assert send((one, 1)) == ['unchanged'] and send((one, 0)) == ['corrected']
    assert [o['bad'] for o in ana.get(f'/decisions/{one}').json['outcomes']] == [1, 0]
    assert lab.post('/outcomes', [{'request_id': one, 'bad': 2, 'observed_at': day}]).status == 422


# ---------------------------------------------------------------- batches

def as_csv(rows) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROWS[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


FORMS = {'application/json': lambda rows: json.dumps(rows).encode(), 'application/x-ndjson': lambda rows: '\n'.join(map(json.dumps, rows)).encode(),
         'text/csv': as_csv}


@pytest.mark.parametrize('kind', FORMS)
def test_a_batch_gives_each_row_what_it_gets_alone(desk, ana, kind):
    rows = [*ROWS[:150], ROWS[150] | {'amount': -5.0}, ROWS[151]]
    told = desk.post('/predict_batch?format=json', FORMS[kind](rows), Content_Type=kind)
    assert told.status == 200, told
    summary, results = told.json['summary'], told.json['results']
    assert (summary['rows'], summary['scored'], summary['refused'], summary['purpose']) == (152, 151, 1, 'backtest')
    assert results[150]['status'] == 'refused' and results[150]['errors'][0]['column'] == 'amount' and results[150]['row'] == 151
    for i in (0, 77, 151):
        alone = decided(desk, '/predict?purpose=what_if&explain=false', row=i)
        assert {k: results[i][k] for k in ('pd', 'score', 'decision', 'flags')} == {k: alone[k] for k in ('pd', 'score', 'decision', 'flags')}
    run = ana.get('/batches').json[0]
    assert (run['batch'], run['rows'], run['scored'], run['digest']) == (summary['batch'], 152, 151, summary['digest'])
    assert ana.get(f"/decisions?batch={summary['batch']}").json['decisions'] == []


def test_a_batch_of_decisions_is_in_the_log_once(desk, ana):
    for _ in range(2):
        address = '/predict_batch?purpose=decision&format=csv&explain=true&language=es'
        told = desk.post(address, as_csv(ROWS[:30]), Content_Type='text/csv', Idempotency_Key='may')
        listed = list(csv.DictReader(io.StringIO(told.body.decode())))
        assert told.headers['x-scored'] == '30' and len(listed) == 30
    batches = [b['batch'] for b in ana.get('/batches').json[:2]]
    assert sorted(len(ana.get(f'/decisions?batch={b}').json['decisions']) for b in batches) == [0, 30]


@pytest.mark.parametrize(('kind', 'body', 'status'), [('text/csv', b'colour\n1\n', 422), ('text/plain', b'', 422), ('application/json', b'{}', 422),
                                                     ('application/x-ndjson', b'', 200)])
def test_a_file_that_is_no_batch(desk, kind, body, status):
    told = desk.post('/predict_batch', body, Content_Type=kind)
    assert told.status == status, told


# ---------------------------------------------------------------- operators

def test_an_emergency_stop_keeps_every_application(desk, ana, running):
    first = desk.post('/predict', ROWS[5], Idempotency_Key='before')
    assert ana.post('/emergency-stop', {'reason': 'bureau feed is empty'}).json['changed']
    try:
        assert not ana.post('/emergency-stop', {'reason': 'again'}).json['changed']
        told = [desk.post('/predict', ROWS[6], Idempotency_Key='during') for _ in range(2)]
        assert [t.status for t in told] == [503, 503] and told[0].headers['retry-after']
        assert told[0].json['decision'] == 'refer' and told[0].json['request_id'] == told[1].json['request_id']
        assert desk.post('/predict', ROWS[5], Idempotency_Key='before').body == first.body
        assert desk.post('/predict?purpose=what_if', ROWS[6]).status == 200
        row, = [r for r in ana.get('/decisions?status=stopped').json['decisions'] if r['request_id'] == told[0].json['request_id']]
        assert row['decision'] == 'refer' and row['pd'] is None
        assert running.client(KEYS['lab']).get('/emergency-stop').json['by'] == 'ana'
        assert desk.get('/readyz').status == 200
        rows = desk.post('/predict_batch?purpose=decision', FORMS['application/x-ndjson'](ROWS[:3]), Content_Type='application/x-ndjson')
        assert rows.headers['x-scored'] == '0'
    finally:
        assert ana.post('/emergency-stop/resume', {'reason': 'feed is back'}).json['changed']
    after = desk.post('/predict', ROWS[6], Idempotency_Key='during')
    assert after.status == 200 and after.json['supersedes'] == told[0].json['request_id'] and after.json['pd'] is not None
    assert desk.post('/predict', ROWS[6], Idempotency_Key='during').body == after.body
    assert ana.get(f"/decisions/{told[0].json['request_id']}").json['superseded_by'] == after.json['request_id']


def test_cut_offs_need_four_eyes(desk, running, ana, home):
    ben, before = running.client(KEYS['ben']), ana.get('/policy').json['in_force']
    assert ana.post('/policy', {'approve_below': 0.9, 'decline_from': 0.1, 'note': 'wrong way'}).status == 409
    proposal = ana.post('/policy', {'approve_below': 0.05, 'note': 'board of May'}).json
    assert ana.post('/policy/approve', {'version': proposal['version']}).status == 403
    assert ben.post('/policy/approve', {'version': '0' * 12}).status == 409
    assert decided(desk)['policy_version'] == before['version']
    try:
        assert ben.post('/policy/approve', {'version': proposal['version']}).json['policy_version'] == proposal['version']
        assert decided(desk)['policy_version'] == proposal['version'] == load_bundle(home / 'champion.json').policy.version
        assert ben.post('/policy/approve', {'version': proposal['version']}).status == 409
    finally:
        write_pointer(home / 'champion.json', home / 'models' / load_bundle(home / 'champion.json').version)
        assert ana.post('/model/reload').json['policy_version'] == before['version']


def test_a_model_is_replaced_by_its_pointer_and_a_bad_one_refused(desk, ana, home):
    old = ana.get('/model').json
    assert old['family'] == 'lightgbm' and old['digests']['model.txt'] and old['challenger']['model_version'] != old['model_version']
    new = small_bundle(home, trees=7, explains=True, pointer='other.json')
    try:
        broken = home / 'models' / ('0' * 16)
        shutil.copytree(new, broken, dirs_exist_ok=True)
        (broken / 'policy.json').write_text('{}')
        write_pointer(home / 'champion.json', broken)
        told = ana.post('/model/reload')
        assert told.status == 409 and 'was changed after it was written' in told.json['detail']
        assert decided(desk)['model_version'] == old['model_version']
        write_pointer(home / 'champion.json', new)
        until = time.monotonic() + 10  # nobody says so: the pointer is watched
        while decided(desk)['model_version'] != new.name and time.monotonic() < until:
            time.sleep(0.1)
        assert decided(desk)['model_version'] == new.name
    finally:
        write_pointer(home / 'champion.json', home / 'models' / old['model_version'])
        assert ana.post('/model/reload').json['model_version'] == old['model_version']


def settled(client) -> int:
    "How many answers were compared when no more come."
    last, now = -1, client.get('/model').json['challenger']['compared']
    while last != now:
        time.sleep(0.4)
        last, now = now, client.get('/model').json['challenger']['compared']
    return now


def test_a_challenger_is_scored_and_never_answered(desk, ana, home):
    challenger = load_bundle(home / 'challenger.json')
    before = settled(ana)
    answers = [decided(desk, row=i) for i in range(20)]
    assert {a['model_version'] for a in answers} == {load_bundle(home / 'champion.json').version}
    assert settled(ana) == before + 20
    found = ana.get('/model').json['challenger']
    assert found['model_version'] == challenger.version and found['dropped'] == 0
    assert 0 <= found['agree'] <= 1 and found['mean_difference'] is not None


# ---------------------------------------------------------------- a restart

def test_a_restart_forgets_nothing(home, tmp_path):
    settings = {'folder': tmp_path / 'serving', 'model': home / 'champion.json'}
    with service(**settings) as found:
        client = found.client()
        first = client.post('/predict', ROWS[0], Idempotency_Key='k')
        client.post('/emergency-stop', {'reason': 'a test'})
    assert found.process.returncode in (0, -15)  # uvicorn hands the signal on when it has finished
    with service(**settings) as found:
        client = found.client()
        assert client.get('/emergency-stop').json['stopped'] and client.post('/predict', ROWS[1]).status == 503
        again = client.post('/predict', ROWS[0], Idempotency_Key='k')
        assert again.body == first.body and again.headers['idempotent-replay'] == 'true'
        client.post('/emergency-stop/resume', {'reason': 'the end'})
        assert client.post('/predict', ROWS[1]).status == 200
    command = [sys.executable, '-c', 'from riskscore.cli import main; main()', 'verify', '--folder', str(tmp_path / 'serving'), '--replay', '--models',
               str(home / 'models')]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0 and '2 chains' in told.stdout and '2 as they were (2 to the last bit), 0 otherwise' in told.stdout, told


def test_without_a_model_it_says_what_to_do(tmp_path):
    with pytest.raises(AssertionError, match='There is no model at'), service(tmp_path / 'serving', tmp_path / 'none.json'):
        pass
