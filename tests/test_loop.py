"""The whole loop as those who run it live it: through the command line and HTTP alone, with nothing imported from the package.

Serve, traffic, a broken feed, an automatic stop, resume, outcomes of another world, retrain, promote, reload, rollback.
"""
import csv
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from running_service import Client, service

ROOT = Path(__file__).resolve().parents[1]
PLOOMBER = [sys.executable, '-c', 'from ploomber_cli.cli import cmd_router; cmd_router()']
RISKSCORE = [sys.executable, '-c', 'from riskscore.cli import main; main()']
WINDOW = 2  # seconds


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith('RISKSCORE_')} | {'PYTHONPATH': str(folder)} | environment
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


def riskscore(folder: Path, *words: str, code: int = 0) -> str:
    "A command; gives what it says."
    told = run(folder, *RISKSCORE, *words, RISKSCORE_WINDOW_SECONDS=str(WINDOW))
    assert told.returncode == code, (told.returncode, told.stdout[-3000:], told.stderr[-3000:])
    return told.stdout


@pytest.fixture(scope='module')
def project(tmp_path_factory) -> Path:
    "A copy of the checkout with a champion of 1,500 synthetic applicants, and 3,000 more who will apply."
    folder = tmp_path_factory.mktemp('loop')
    for name in ('nbs', 'riskscore', 'data/contracts', 'data/candidates', 'pipeline.yaml', 'settings.ini'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    env = yaml.safe_load((ROOT / 'env.smoke.yaml').read_text()) | {'rows': 1900, 'future': 400, 'tune': 'none', 'candidates': 'logistic'}
    (folder / 'env.tiny.yaml').write_text(yaml.safe_dump(env))
    built = run(folder, *PLOOMBER, 'build', '--partially', 'train', PLOOMBER_ENV_FILENAME='env.tiny.yaml')
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    riskscore(folder, 'data', 'synthetic', '--rows', '3000', '--seed', '77', '-o', 'applicants.csv')
    return folder


def applicants(folder: Path) -> list[dict[str, str]]:
    "People of whom history knows nothing: numbers of their own."
    with open(folder / 'applicants.csv', newline='') as file:
        return [row | {'SK_ID_CURR': str(10_000_000 + i)} for i, row in enumerate(csv.DictReader(file))]


def decide(client: Client, rows: list[dict[str, str]]) -> list[dict]:
    "Sends applications as one file that is to be decided; gives the answers."
    text = io.StringIO()
    writer = csv.DictWriter(text, [name for name in rows[0] if name != 'TARGET'], extrasaction='ignore')
    writer.writeheader()
    writer.writerows(rows)
    told = client.post('/predict_batch?purpose=decision&explain=false&format=json', text.getvalue().encode(), Content_Type='text/csv')
    assert told.status == 200, told.body[:500]
    return told.json['results']


def close_windows(folder: Path, code: int) -> str:
    "Waits until the open window is over, and lets the monitor close it."
    time.sleep(WINDOW + 2.5)
    return riskscore(folder, 'monitor', '--once', '--folder', 'serving', '--model', 'data/smoke/models/champion.json', code=code)


def version(client: Client) -> str:
    return client.get('/model').json['model_version']


def follows(client: Client, wanted: str) -> bool:
    "Does the service answer with this model before long?"
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if version(client) == wanted:
            return True
        time.sleep(0.1)
    return False


def outcomes_of_another_world(rows: list[dict[str, str]], answers: list[dict]) -> list[dict]:
    "Loans that were granted go bad as never before: where the second outside score is high."
    chance, told = random.Random(1), []
    for row, answer in zip(rows, answers, strict=True):
        if answer['decision'] == 'approve':
            height = max(0.0, float(row['EXT_SOURCE_2'] or 0.5) - 0.5)
            told.append({'request_id': answer['request_id'], 'observed_at': answer['received_at'], 'bad': int(chance.random() < 0.02 + 0.7 * height)})
    return told


def test_the_loop_from_a_broken_feed_to_a_new_model_and_back(project):
    pointer, rows = project / 'data/smoke/models/champion.json', applicants(project)
    first = json.loads(pointer.read_text())['version']
    with service(project / 'serving', pointer, window_seconds=WINDOW, keep_alive=900) as running:
        client = running.client()
        assert version(client) == first

        # calm traffic
        answers = decide(client, rows[:500])
        assert {a['status'] for a in answers} == {'scored'} and {a['model_version'] for a in answers} == {first}
        assert 'look like history' in close_windows(project, code=0)

        # a feed changes its unit: found, and decisions stop without anybody's doing
        shocked = [row | {'AMT_INCOME_TOTAL': str(1000 * float(row['AMT_INCOME_TOTAL']))} for row in rows[500:900]]
        assert {a['status'] for a in decide(client, shocked)} == {'scored'}
        assert 'AMT_INCOME_TOTAL' in close_windows(project, code=3)
        assert client.get('/drift-status').json['stopped'] and client.get('/alerts').json[0]['kind'] == 'stopped'
        one = application(rows[900])
        held = client.post('/predict', one, Idempotency_Key='held')
        assert held.status == 503 and 'retry-after' in held.headers
        assert {a['status'] for a in decide(client, rows[901:911])} == {'stopped'}
        assert 'broken' in riskscore(project, 'retrain', *places(project), code=3), 'a broken feed is never learnt'

        # a person has the feed repaired
        assert client.post('/emergency-stop/resume', {'reason': 'the bureau sends units again'}).json['changed']
        again = client.post('/predict', one, Idempotency_Key='held').json
        assert again['status'] == 'scored' and again['supersedes'] == held.json['request_id']

        # another world: the outcomes of good-looking applicants turn bad
        answers = decide(client, rows[911:])
        told = client.post('/outcomes', outcomes_of_another_world(rows[911:], answers))
        assert told.status == 200 and set(told.json['counts']) == {'new'}
        assert 'outcomes' in close_windows(project, code=1)
        said = run(project, *RISKSCORE, 'retrain', *places(project), '--json', 'evidence.json').stdout
        evidence = json.loads((project / 'evidence.json').read_text())
        assert (evidence['decision'], evidence['cause']['kind']) == ('promoted', 'concept'), said
        second = json.loads(pointer.read_text())['version']
        assert second == evidence['challenger']['version'] != first
        assert follows(client, second), 'the service follows the pointer'
        assert client.post('/predict', application(rows[0])).json['model_version'] == second

        # and back
        riskscore(project, 'rollback', '--model', str(pointer), '--reason', 'a drill')
        assert json.loads(pointer.read_text())['version'] == first and follows(client, first)
        assert client.post('/predict', application(rows[1])).json['model_version'] == first
    assert 'nothing was changed or removed' in riskscore(project, 'verify', '--folder', 'serving')


def places(project: Path) -> list[str]:
    return ['--history', 'data/smoke/split/history.parquet', '--folder', 'serving', '--model', 'data/smoke/models/champion.json', '--threads', '1']


def application(row: dict[str, str]) -> dict:
    "A row of the file as JSON has it."
    def value(text: str) -> object:
        try:
            return float(text)
        except ValueError:
            return text or None
    return {name: value(text) for name, text in row.items() if name != 'TARGET'}
