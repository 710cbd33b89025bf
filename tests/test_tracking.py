"""The MLflow store: offline, quick to open, movable, and honest about what is wrong with it."""
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from riskscore.core import RiskError
from riskscore.tracking import Tracking, champion_version, log_metrics, log_report, log_training, open_tracking, register_champion

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def empty(tmp_path_factory):
    "A new database, made once."
    folder = tmp_path_factory.mktemp('empty')
    open_tracking(folder / 'mlflow.db', folder / 'mlartifacts')
    return folder / 'mlflow.db'


@pytest.fixture
def place(tmp_path, empty, monkeypatch):
    "A project folder with an empty store and a bundle, as the working directory."
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data').mkdir()
    shutil.copy(empty, tmp_path / 'data/mlflow.db')
    (tmp_path / 'bundle/texts').mkdir(parents=True)
    (tmp_path / 'bundle/model.txt').write_text('tree')
    (tmp_path / 'bundle/texts/en.json').write_text('{}')
    return tmp_path


def train(store, **changes):
    given = {'experiment': 'demo', 'parameters': {'num_leaves': 31}, 'metrics': {'auc': 0.75}, 'folds': {'auc': [0.7, 0.8]},
             'bundle': 'bundle', 'data_digest': 'cd' * 32}
    return log_training(store, **{**given, **changes})


def mlflow(code, folder):
    "Runs MLflow's own client in a fresh process in a folder, as a user would."
    env = {**os.environ, 'MLFLOW_TRACKING_URI': 'sqlite:///data/mlflow.db', 'MLFLOW_DISABLE_TELEMETRY': 'true'}
    done = subprocess.run([sys.executable, '-c', code], cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_moved_project_keeps_its_files(place, tmp_path_factory, monkeypatch):
    store = open_tracking('data/mlflow.db', 'data/mlartifacts')
    run_id = train(store)
    champion = register_champion(store, 'demo', run_id, 'v1')
    moved = tmp_path_factory.mktemp('elsewhere') / 'project'
    shutil.move(place, moved)
    monkeypatch.chdir(moved)
    code = '''import mlflow, os
print(*sorted(a.path for a in mlflow.MlflowClient().list_artifacts("%s", "bundle")))
print(*sorted(os.listdir(mlflow.artifacts.download_artifacts("models:/demo@champion", dst_path="out"))))'''
    assert mlflow(code % run_id, moved) == ['bundle/model.txt', 'bundle/texts', 'model.txt', 'texts']
    assert champion_version(open_tracking('data/mlflow.db', 'data/mlartifacts'), 'demo').run_id == champion.run_id


def test_runs_models_and_reports_add_up(place):
    store = open_tracking('data/mlflow.db', 'data/mlartifacts')
    first, second = train(store), train(store, parameters={f'p{i}': i for i in range(250)}, tags={'seed': 42}, description='**Taiwan**')
    assert register_champion(store, 'demo', first, 'v1').number == 1
    assert register_champion(store, 'demo', second, 'v2').number == 2
    assert champion_version(store, 'demo')[:3] == (2, second, 'v2')
    (place / 'report.html').write_text('old')
    log_report(store, second, 'report.html')
    (place / 'report.html').write_text('new')
    log_report(store, second, 'report.html')
    assert (store.files(second) / 'reports/report.html').read_text() == 'new'
    log_metrics(store, second, {'auc': 0.7}, prefix='future_')
    code = '''import mlflow; r = mlflow.get_run("%s"); print(len(r.data.params), r.data.metrics["future_auc"], r.data.tags["seed"],
r.inputs.dataset_inputs[0].dataset.digest[:4], mlflow.search_runs(experiment_names=["demo"]).shape[0])'''
    assert mlflow(code % second, place) == ['250', '0.7', '42', 'cdcd', '2']


def test_a_failed_record_is_marked(place):
    store = open_tracking('data/mlflow.db', 'data/mlartifacts')
    with pytest.raises(RiskError, match='no-bundle'):
        train(store, bundle='no-bundle')
    with sqlite3.connect('data/mlflow.db') as connection:
        assert connection.execute('SELECT status FROM runs').fetchall() == [('FAILED',)]


def test_a_locked_store_is_reported_and_freed(place):
    holder = sqlite3.connect('data/mlflow.db', check_same_thread=False)
    holder.execute('BEGIN EXCLUSIVE')
    with pytest.raises(RiskError, match='locked'):
        open_tracking('data/mlflow.db', 'data/mlartifacts', patience=0.2)
    threading.Timer(0.5, holder.rollback).start()
    assert open_tracking('data/mlflow.db', 'data/mlartifacts', patience=10)


def test_a_store_of_another_mlflow_is_reported(place):
    with sqlite3.connect('data/mlflow.db') as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    with pytest.raises(RiskError, match='schema'):
        train(open_tracking('data/mlflow.db', 'data/mlartifacts'))


@pytest.mark.parametrize('db', ['bundle', 'bundle/model.txt', 'bundle/model.txt/mlflow.db'])
def test_bad_places_are_reported(place, db):
    with pytest.raises(RiskError, match='model.txt|bundle'):
        open_tracking(db, 'data/mlartifacts')
    assert (place / 'bundle/model.txt').read_text() == 'tree'


def test_an_interrupted_creation_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr('riskscore.tracking.shutil.copyfile', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        open_tracking(tmp_path / 'mlflow.db', tmp_path / 'mlartifacts')
    assert [p.name for p in tmp_path.iterdir()] == ['mlartifacts']


OFFLINE = '''
import socket, sys
def refuse(*args, **kwargs): raise AssertionError('a socket was opened')
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from riskscore.tracking import *
quick = 'mlflow' not in sys.modules
store = open_tracking('data/mlflow.db', 'data/mlartifacts')
run_id = log_training(store, 'demo', {}, {'auc': 0.7}, {}, 'bundle', 'ab' * 32)
register_champion(store, 'demo', run_id, 'v1')
import threading, time; time.sleep(0.5)
print(quick, [t.name for t in threading.enumerate() if 'elemetry' in t.name])
'''


def test_offline_quiet_and_quick_to_import(place):
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    for name in ('MLFLOW_DISABLE_TELEMETRY', 'DO_NOT_TRACK'):
        env.pop(name, None)
    done = subprocess.run([sys.executable, '-c', OFFLINE], cwd=place, env=env, capture_output=True, text=True, timeout=120)
    assert (done.stdout.split(), done.stderr) == (['True', '[]'], '')


def test_nothing_of_the_store_is_a_pickle(place):
    store = open_tracking('data/mlflow.db', 'data/mlartifacts')
    register_champion(store, 'demo', train(store), 'v1')
    assert {p.name for p in Path('data/mlartifacts').rglob('*') if p.is_file()} == {'model.txt', 'en.json'}


def test_a_report_for_no_run(tmp_path):
    with pytest.raises(RiskError, match='no run abc'):
        log_report(Tracking(tmp_path / 'mlflow.db', tmp_path), 'abc', 'report.html')
