"""The champion is replaced under load: no request fails, and every answer names the model that made it and is that model's, bit for bit."""
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from running_service import Running, service
from service_load import ROWS, Load, check_log, eventually, tables
from small_bundle import small_bundle
from test_service_faults import locked, workers_of

from riskscore.bundle import load_bundle, write_pointer

NAMES = ('pd', 'score', 'decision', 'knockout', 'value', 'policy_version')


@pytest.fixture
def home(tmp_path) -> Path:
    small_bundle(tmp_path, explains=True)
    small_bundle(tmp_path, trees=7, explains=True, pointer='other.json')
    return tmp_path


def bundles(home: Path) -> list[Path]:
    "The two models."
    return [home / 'models' / load_bundle(home / name).version for name in ('champion.json', 'other.json')]


def broken(home: Path, bundle: Path) -> Path:
    "A copy of a bundle with a changed file."
    copy = home / 'models' / ('0' * 16)
    shutil.copytree(bundle, copy)
    (copy / 'policy.json').write_text('{}')
    return copy


def expected(models: list[Path]) -> dict[tuple[str, bytes], dict[str, Any]]:
    "What each model says to each application."
    scorers = [load_bundle(path) for path in models]
    told = {(s.version, json.dumps(row).encode()): s.record(row, explain=True) for s in scorers for row in ROWS}
    one, other = (s.version for s in scorers)
    assert all(t['pd'] != told[other, body]['pd'] for (version, body), t in told.items() if version == one)  # an answer of the other would be seen
    return told


def check_answers(load: Load, models: list[Path]) -> Counter:
    "Every answer is what the model that it names gives; counts the answers of each."
    assert set(load.statuses) == {200}, load.statuses
    told = expected(models)
    for s in load.sent:
        answer = s.told.json
        due = told[answer['model_version'], s.body]
        assert {name: answer[name] for name in NAMES} == {name: due[name] for name in NAMES}
        assert [r['en'] for r in answer['reasons']] == [r['en'] for r in due['reasons']]
    return Counter(s.told.json['model_version'] for s in load.sent)


def serving(running: Running, clients: list, version: str) -> None:
    "Waits until all workers answer with a model."
    eventually(lambda: all(client.get('/health').json['model_version'] == version for client in clients))


def test_a_champion_is_replaced_again_and_again_under_load(home):
    models, changes = bundles(home), 6
    with service(home / 'serving', home / 'champion.json') as running:
        client = running.client()
        with Load(running.port, clients=8, distinct=False, keyed=False) as load:
            for number in range(1, changes + 1):
                load.reach(30)
                if number == 4:
                    write_pointer(home / 'champion.json', broken(home, models[0]))
                    told = client.post('/model/reload')
                    assert told.status == 409 and client.get('/health').json['model_version'] == models[1].name
                    load.reach(30)
                write_pointer(home / 'champion.json', models[number % 2])
                assert client.post('/model/reload').json['model_version'] == models[number % 2].name
                since = len(load.sent)
                load.reach(30)
                told = [s for s in load.sent[since:] if s.at > load.sent[since - 1].done]
                assert {s.told.json['model_version'] for s in told} == {models[number % 2].name}  # none of the old one once the new one is said to be in place
        assert min(check_answers(load, models).values()) >= 30 * changes // 2
        rows = check_log(running.folder, load.sent)
        events = [(row['event'], json.loads(row['content'])['version']) for row in sorted(rows['audit'], key=lambda row: row['seq'])]
        loaded = [version for event, version in events if event == 'model_loaded']
        assert loaded == [models[number % 2].name for number in range(changes + 1)] and Counter(e for e, _ in events)['model_refused'] == 1


@pytest.mark.slow
def test_two_workers_follow_the_pointer_under_load(home):
    models = bundles(home)
    with service(home / 'serving', home / 'champion.json', workers=2) as running:
        clients = workers_of(running)
        with Load(running.port, clients=8, distinct=False, keyed=False) as load:
            for number in range(1, 6):
                if number == 3:
                    write_pointer(home / 'champion.json', broken(home, models[0]))
                    eventually(lambda: all(client.get('/model').json['problem'] for client in clients))
                write_pointer(home / 'champion.json', models[number % 2])
                serving(running, clients, models[number % 2].name)
                load.reach(20)
        assert len(check_answers(load, models)) == 2
        rows = check_log(running.folder, load.sent)
        assert len({row['writer'] for row in rows['decisions']}) == 2
        loaded = Counter(row['writer'] for row in rows['audit'] if row['event'] == 'model_loaded')
        assert sorted(loaded.values()) == [6, 6] and sum(row['event'] == 'model_refused' for row in rows['audit']) == 2


@pytest.mark.slow
def test_a_model_that_came_while_the_store_was_locked_is_on_the_audit_trail(home):
    models = bundles(home)
    with service(home / 'serving', home / 'champion.json', request_timeout=1) as running:
        client = running.client()
        with locked(running.folder, running):
            write_pointer(home / 'champion.json', models[1])
            serving(running, [client], models[1].name)

        def loaded() -> list[str]:
            found = [row for row in tables(running.folder)['audit'] if row['event'] == 'model_loaded']
            return [json.loads(row['content'])['version'] for row in sorted(found, key=lambda row: row['seq'])]

        eventually(lambda: loaded() == [models[0].name, models[1].name])
        assert client.post('/predict', ROWS[0]).json['model_version'] == models[1].name
