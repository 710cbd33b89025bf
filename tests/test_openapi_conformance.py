"The description of the API and the service agree: an API tester makes requests out of the one and judges what the other answers."
import http.client
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_postgres
from running_service import service
from small_bundle import small_bundle

from riskscore.additive import Additive, Term
from riskscore.bundle import write_bundle, write_pointer
from riskscore.calibration import Calibration
from riskscore.contract import load_contract
from riskscore.expressions import col
from riskscore.features import FeaturePlan
from riskscore.policy import Policy

TESTS = Path(__file__).parent
cluster = test_postgres.cluster
KEYS = {'all': 'a-key-with-all-roles', 'desk': 'a-key-that-may-score'}
CONFIG = '''
hooks = "unique_keys"
continue-on-failure = true

[phases.coverage]
generate-duplicate-query-parameters = true

[phases.stateful.generation]
max-examples = {stories}
'''


def one_term_bundle(folder: Path, contract) -> Path:
    "A model of one column, for any contract; gives its pointer."
    name = next(c.name for c in contract.feature_columns if c.kind == 'number')
    model = Additive('scorecard', [name], 0.0, [Term(name, 'steps', (0.5,), (0.0, -1.0), 0.0)])
    policy = Policy(0.2, 0.6, contract.value, contract.currency, contract.amount)
    bundle = write_bundle(folder / 'models', model, FeaturePlan({name: col(name)}, {}), Calibration(0.0, 1.0), policy, contract, {}, {})
    write_pointer(folder / 'champion.json', bundle)
    return folder / 'champion.json'


def judged(running, folder: Path, examples: int, stories: int, seed: int = 1) -> dict:
    "What the API tester found, with all its checks."
    (folder / 'schemathesis.toml').write_text(CONFIG.format(stories=stories))
    command = [sys.executable, '-c', 'from schemathesis.cli import schemathesis; schemathesis()', 'run', f'http://127.0.0.1:{running.port}/openapi.json',
               '--header', f'X-API-Key: {KEYS["all"]}', '--checks', 'all', '--max-examples', str(examples), '--seed', str(seed),
               '--generation-database', 'none', '--report', 'json', '--report-json-path', 'told.json', '--no-color']
    told = subprocess.run(command, cwd=folder, env=os.environ | {'PYTHONPATH': str(TESTS)}, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout[-6000:] + told.stderr[-2000:]
    return json.loads((folder / 'told.json').read_text())


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp('conformance')
    small_bundle(folder, explains=True)
    return folder


@pytest.fixture(scope='module')
def running(home):
    keys = f'all score,label,operate {KEYS["all"]}; desk score {KEYS["desk"]}'
    with service(home / 'serving', home / 'champion.json', api_keys=keys) as found:
        yield found


def check(told: dict, cases: int) -> None:
    "Every operation was tried in every way, and wherever that can be, something was taken."
    assert told['complete'] and told['operations']['tested'] == told['operations']['total'] >= 21 and told['operations']['errored'] == 0
    assert {p['status'] for p in told['phases'].values()} == {'success'} and len(told['phases']) == 4
    assert told['test_cases']['generated'] >= cases and told['test_cases']['with_failures'] == 0
    ways = {name: [sum(way[k] for way in ways.values()) for k in ('accepted', 'rejected')] for name, ways in told['valid_rates'].items()}
    assert not any(rejected for _, rejected in ways.values()), ways
    assert {name for name, (accepted, _) in ways.items() if not accepted} <= {'POST /policy/approve'}  # four eyes, and the tester has two


def test_the_service_does_what_its_description_says(running, tmp_path):
    check(judged(running, tmp_path, 2, 2), 900)


@pytest.mark.slow
def test_the_service_does_what_its_description_says_of_very_many_requests(running, tmp_path):
    check(judged(running, tmp_path, 400, 100, seed=2), 8000)


@pytest.mark.slow
def test_a_contract_of_a_hundred_columns_is_described_as_exactly(tmp_path, root):
    pointer = one_term_bundle(tmp_path, load_contract(root / 'data/contracts/home_credit.yaml'))
    with service(tmp_path / 'serving', pointer, api_keys=f'all score,label,operate {KEYS["all"]}') as found:
        check(judged(found, tmp_path, 100, 30), 3000)


@pytest.mark.slow
def test_the_same_over_postgresql(cluster, home, tmp_path):
    with service(tmp_path / 'serving', home / 'champion.json', store=cluster.database(), api_keys=f'all score,label,operate {KEYS["all"]}') as found:
        for body, status in ODD.values():
            assert found.client(KEYS['all']).post('/predict', body, **JSON).status == status
        check(judged(found, tmp_path, 15, 15, seed=3), 1200)


# ---------------------------------------------------------------- what the tester does not think of

JSON = {'Content_Type': 'application/json'}
ODD = {
    'half of a surrogate pair': (b'{"amount": 500, "job": "\\ud800"}', 400),
    'half of a surrogate pair as a name': (b'{"amount": 500, "\\udc00": 1}', 400),
    'bytes that are not UTF-8': (b'{"amount": 500, "job": "\xed\xa0\x80"}', 400),
    'a NUL in text': (b'{"amount": 500, "job": "a\\u0000b"}', 200),
    'a NUL in the id': (b'{"amount": 500, "app": "a\\u0000b"}', 422),
    'an id that no index holds': (b'{"amount": 500, "app": "' + b'a' * 401 + b'"}', 422),
    'a raw NUL': (b'{"amount": 500, "job": "a\x00b"}', 400),
    'a byte order mark': (b'\xef\xbb\xbf{"amount": 500}', 400),
    'the largest number': (b'{"amount": 1.7976931348623157e308}', 200),
    'more than the largest number': (b'{"amount": 1.7976931348623159e308}', 422),
    'the least number': (b'{"amount": 5e-324}', 200),
    'less than the least': (b'{"amount": 1e-400}', 200),
    'minus nothing': (b'{"amount": -0.0}', 200),
    'more digits than Python reads': (b'{"amount": ' + b'9' * 5000 + b'}', 400),
    'a fraction that rounds to a whole number': (b'{"amount": 500, "tenure": 1.00000000000000000001}', 200),
    'not a number': (b'{"amount": NaN}', 422),
    'infinity': (b'{"amount": 500, "income": Infinity}', 422),
    'a name twice': (b'{"amount": 500, "amount": 600}', 200),
    'the first day': (b'{"amount": 500, "asked_on": "1900-01-01"}', 200),
    'the day before it': (b'{"amount": 500, "asked_on": "1899-12-31"}', 422),
    'a zone before the first year': (b'{"amount": 500, "asked_on": "0001-01-01T00:00:00+14:00"}', 422),
    'a zone after the last year': (b'{"amount": 500, "asked_on": "9999-12-31T23:59:59-14:00"}', 422),
    'nested deeply': (b'{"amount": ' + b'[' * 5000 + b']' * 5000 + b'}', 400),
    'a comment': (b'{"amount": 500} // yes', 400),
    'two documents': (b'{"amount": 500}{"amount": 500}', 400),
}


@pytest.mark.parametrize('what', ODD)
def test_an_odd_application_is_taken_or_refused(running, what):
    body, status = ODD[what]
    told = running.client(KEYS['desk']).post('/predict', body, **JSON)
    assert told.status == status, told
    assert running.client(KEYS['desk']).post('/predict?explain=false&purpose=backtest', b'{"amount": 500}', **JSON).status == 200


@pytest.mark.parametrize(('method', 'path', 'body', 'status'), [
    ('POST', '/predict?explain=true&explain=false', b'{"amount": 500}', 422),
    ('POST', '/predict?' + 'a&' * 15_000, b'{"amount": 500}', 422),
    ('POST', '/predict_batch?purpse=decision', b'[{"amount": 500}]', 422),
    ('POST', '/predict_batch?purpose=decision&purpose=backtest', b'[{"amount": 500}]', 422),
    ('GET', '/decisions?limit=1&limit=2', None, 422),
    ('GET', '/decisions?' + 'a&' * 15_000, None, 422),
    ('GET', '/decisions?min_pd=' + '0' * 1500 + '_1', None, 200),
    ('GET', '/decisions?applicant=%00', None, 422),
    ('GET', '/decisions?applicant=%FF', None, 200),
    ('GET', '/decisions?applicant=%C2%A0', None, 200),
    ('GET', '/decisions?from=0001-01-01T00:00:00%2B14:00', None, 422),
    ('GET', '/decisions?to=9999-12-31', None, 422),
    ('GET', '/reviews?from=1900-01-01T00:00:00%2B14:00&to=2199-12-31T23:59:59-14:00', None, 200),
    ('GET', '/livez?verbose', None, 422),
    ('GET', '/decisions/..%2f..%2fetc%2fpasswd', None, 404),
    ('GET', '/decisions/%00', None, 404),
    ('HEAD', '/predict', None, 405),
    ('GET', '/predict', None, 405),
    ('OPTIONS', '/predict', None, 405),
    ('TRACE', '/decisions', None, 405),
    ('PUT', '/policy', None, 405),
    ('POST', '/outcomes', b'[{"request_id": "x", "bad": true, "observed_at": "2026-01-01"}]', 422),
    ('POST', '/outcomes', b'[{"request_id": "\\ud800", "bad": 1, "observed_at": "2026-01-01"}]', 422),
    ('POST', '/outcomes', b'[{"request_id": "x", "bad": 1.0, "observed_at": "2026-01-01"}]', 200),
    ('POST', '/outcomes', b'[{"request_id": "x", "bad": ' + b'1' * 5000 + b', "observed_at": "2026-01-01"}]', 400),
    ('POST', '/outcomes', b'[' * 50_000, 400),
    ('POST', '/emergency-stop/resume', b'{"reason": "\\u3000\\u00a0\\u2003\\u1680"}', 422),
    ('POST', '/emergency-stop/resume', b'{"reason": "abc\\u0000"}', 422),
    ('POST', '/emergency-stop/resume', b'{"reason": "abc\\ud800"}', 422),
    ('POST', '/emergency-stop/resume', b'{"reason": "' + b'a' * 2001 + b'"}', 422),
    ('POST', '/policy', b'{"approve_below": NaN, "note": "a test"}', 422),
    ('POST', '/policy', b'{"approve_below": 1e400, "note": "a test"}', 422),
])
def test_an_odd_request_is_a_problem_and_no_fault(running, method, path, body, status):
    told = running.client(KEYS['all']).ask(method, path, body, **(JSON if body else {}))
    assert told.status == status, told
    if status != 200:
        assert told.headers['content-type'] == 'application/problem+json' and len(told.body) < 20_000
        assert ('allow' in told.headers) == (status == 405)


def test_a_row_that_is_wrong_in_very_many_ways_is_told_the_first(running):
    told = running.client(KEYS['desk']).post('/predict_batch', [{f'x{i}': 1 for i in range(300)}, {'amount': 500}])
    errors = told.json['results'][0]['errors']
    assert len(errors) == 51 and errors[0]['column'] == 'x0' and errors[-1] == {'message': 'and 251 more'}
    assert told.json['results'][1]['status'] == 'scored'


@pytest.mark.parametrize('name', ['Host', 'X-API-Key', 'Idempotency-Key', 'Content-Type', 'Accept'])
def test_what_says_one_thing_is_said_once(running, name):
    given = {'Host': 'localhost', 'X-API-Key': KEYS['desk'], 'Idempotency-Key': f'once-{name}', 'Content-Type': 'application/json', 'Accept': '*/*'}
    connection = http.client.HTTPConnection('127.0.0.1', running.port, timeout=30)
    connection.putrequest('POST', '/predict', skip_host=True)
    for key, value in [*given.items(), (name, given[name]), ('Content-Length', '15')]:
        connection.putheader(key, value)
    connection.endheaders(b'{"amount": 500}')
    told = connection.getresponse()
    detail = json.loads(told.read()).get('detail')
    assert (told.status, detail) == ((200, None) if name == 'Accept' else (400, f'The header {name.lower()} is given more than once.'))
    connection.close()


@pytest.mark.parametrize(('kind', 'status'), [('application/json; charset=utf-8', 200), ('Application/JSON', 200), ('application/jsonx', 415),
                                             ('application/json-patch+json', 415), ('text/plain', 415), ('', 415)])
def test_an_application_is_sent_as_json(running, kind, status):
    assert running.client(KEYS['desk']).post('/predict', b'{"amount": 500}', Content_Type=kind).status == status
