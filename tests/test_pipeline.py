"The whole pipeline in a copy of the project: it builds, builds nothing twice, reruns what an edit touches, repeats its bytes, and says what is wrong."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from riskscore.bundle import load_bundle

ROOT = Path(__file__).resolve().parents[1]
PLOOMBER = [sys.executable, '-c', 'from ploomber_cli.cli import cmd_router; cmd_router()']
REPORTS = ['10_ingest', '20_split', '30_features', '35_gate', '40_train', '45_scorecard', '50_evaluate', '52_fairness', '53_reasons', '54_segments',
           '56_rejects', '58_card', '60_score', '70_value', '80_monitor', '90_retrain']
TASKS = [name[3:] for name in REPORTS]
DUE = """import json; from ploomber.spec import DAGSpec
dag = DAGSpec('pipeline.yaml').to_dag().render()
print(json.dumps([name for name in dag if dag[name].exec_status.name != 'Skipped']))"""


def run(folder: Path, *command: str, text: str | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | {'PYTHONPATH': str(folder), 'PLOOMBER_ENV_FILENAME': 'env.tiny.yaml'}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, input=text, timeout=600)


def build(folder: Path, **settings: object) -> subprocess.CompletedProcess:
    return run(folder, *PLOOMBER, 'build', *(word for name, value in settings.items() for word in (f'--env--{name}', str(value))))


def due(folder: Path) -> set[str]:
    "Tasks that a build would run."
    found = run(folder, sys.executable, '-c', DUE)
    assert found.returncode == 0, found.stderr[-3000:]
    return set(json.loads(found.stdout.splitlines()[-1]))


@pytest.fixture(scope='module')
def project(tmp_path_factory) -> Path:
    "A copy of the checkout, built on 1,000 synthetic applicants of history."
    folder = tmp_path_factory.mktemp('project')
    for name in ('nbs', 'riskscore', 'data/contracts', 'data/candidates', 'pipeline.yaml', 'settings.ini'):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, folder / name)
    env = yaml.safe_load((ROOT / 'env.smoke.yaml').read_text()) | {'rows': 1400, 'future': 400, 'n_trials': 2}
    (folder / 'env.tiny.yaml').write_text(yaml.safe_dump(env))
    built = build(folder)
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    return folder


def product(folder: Path, name: str) -> Path:
    return folder / 'data/smoke' / name


def test_a_build_leaves_reports_scores_and_a_champion(project):
    reports = sorted(p.name for p in (project / 'reports/smoke').glob('*.html'))
    assert reports == [f'{name}.html' for name in REPORTS]
    for name in reports:
        page = (project / 'reports/smoke' / name).read_text()
        assert 'has not finished' not in page and '<script' not in page and 'http' not in page
    scorer = load_bundle(product(project, 'models/champion.json'))
    scored = pq.ParquetFile(product(project, 'score/predictions.parquet')).read()
    assert scored.num_rows == 400 and set(scored['model_version'].to_pylist()) == {scorer.version}
    assert len(product(project, 'value/business_value.csv').read_text().splitlines()) == 401
    run_id = json.loads(product(project, 'train/run.json').read_text())['run_id']
    files = {p.name for p in (project / 'data/mlartifacts' / run_id).rglob('*') if p.is_file()}
    assert {*reports, 'manifest.json', 'plan.json', 'reasons.json', 'card.md', 'card.html'} <= files
    assert '1 run' not in build(project).stdout and due(project) == set()


CODE = '\n\ndef _edited() -> int:\n    "Nothing."\n    return 1\n'
PROSE = '\n# A comment changes no result.\n'
TRAINED = ['train', 'scorecard', 'evaluate', 'fairness', 'reasons', 'segments', 'card', 'score', 'value', 'monitor', 'retrain']
SCORED = ['score', 'value', 'monitor', 'retrain']
FROM = {'ingest': TASKS, 'split': TASKS[1:], 'features': TASKS[2:], 'gate': ['gate', *TRAINED], 'train': TRAINED, 'score': SCORED}
EDITS = [('core', CODE, FROM['ingest']), ('synthetic', CODE, FROM['ingest']), ('split', CODE, FROM['split']), ('feature_sets', CODE, FROM['features']),
         ('monotone', CODE, FROM['features']), ('leakage', CODE, FROM['gate']), ('infer', CODE, FROM['gate']), ('tuning', CODE, FROM['train']),
         ('forest', CODE, FROM['train']), ('importance', CODE, ['evaluate', 'card']), ('fairness', CODE, ['fairness', 'card', 'retrain']),
         ('swap', CODE, ['scorecard', 'retrain']), ('rejects', CODE, ['rejects', 'card']), ('card', CODE, ['card']), ('batch', CODE, FROM['score']),
         ('value', CODE, ['value']), ('drift_report', CODE, ['monitor', 'retrain']), ('retrain_report', CODE, ['retrain']),
         ('cli', CODE, []), ('core', PROSE, [])]
DUE_AFTER = """import json, pathlib, sys; from ploomber.spec import DAGSpec
for module, text, expected in json.load(sys.stdin):
    path = pathlib.Path('riskscore', f'{module}.py')
    before = path.read_bytes()
    path.write_bytes(before + text.encode())
    dag = DAGSpec('pipeline.yaml').to_dag().render()
    path.write_bytes(before)
    print(json.dumps([module, [name for name in dag if dag[name].exec_status.name != 'Skipped']]))"""


def test_an_edit_reruns_exactly_what_depends_on_it(project):
    found = run(project, sys.executable, '-c', DUE_AFTER, text=json.dumps(EDITS))
    assert found.returncode == 0, found.stderr[-3000:]
    answers = [json.loads(line) for line in found.stdout.splitlines() if line.startswith('["')]
    assert [(module, sorted(tasks)) for module, tasks in answers] == [(module, sorted(expected)) for module, _, expected in EDITS]


def test_an_edit_in_a_notebook_reruns_what_depends_on_it(project):
    library, task = project / 'nbs/31_value.ipynb', project / 'nbs/pipeline/60_score.ipynb'
    module, before = project / 'riskscore/value.py', {p: p.read_bytes() for p in (library, task, project / 'riskscore/value.py')}
    book = json.loads(library.read_text())
    cell = next(c for c in book['cells'] if ''.join(c['source']).startswith('#| export\ndef business_value'))
    cell['source'] = ''.join(cell['source']).replace('    return values | ', '    values["checked"] = values["pd"]\n    return values | ')
    library.write_text(json.dumps(book))
    export = "from nbdev.export import nb_export; nb_export('nbs/31_value.ipynb', lib_path='riskscore')"
    assert run(project, sys.executable, '-c', export).returncode == 0 and module.read_bytes() != before[module]
    assert due(project) == {'value'}
    book = json.loads(task.read_text())
    book['cells'][-1]['source'] = ['print(run.rows)\n', *book['cells'][-1]['source']]
    task.write_text(json.dumps(book))
    assert due(project) == set(SCORED)
    for path, content in before.items():
        path.write_bytes(content)
    assert due(project) == set()


def test_same_inputs_same_bytes(project):
    built = build(project, out='data/again', reports='reports/again')
    assert built.returncode == 0, built.stderr[-3000:]
    for name in ('ingest/table.parquet', 'split/history.parquet', 'features/history.parquet', 'features/plan.json', 'train/bundle.json',
                 'train/out_of_fold.parquet', 'score/predictions.parquet', 'value/business_value.csv', 'evaluate/metrics.json'):
        assert (project / 'data/again' / name).read_bytes() == product(project, name).read_bytes(), name
    bundles = [{p.name: p.read_bytes() for p in (folder / 'models' / load_bundle(folder / 'models/champion.json').version).iterdir() if p.name != 'run.json'}
               for folder in (project / 'data/smoke', project / 'data/again')]
    assert bundles[0] == bundles[1]


@pytest.mark.parametrize('settings, said', [
    ({'data_path': 'nowhere.csv'}, 'There is no data at nowhere.csv'),
    ({'contract': 'data/contracts/home_credti.yaml'}, "home_credit.yaml"),
    ({'contract': 'typo.yaml'}, "Did you mean 'range'?"),
    ({'data_path': 'one_class.csv'}, 'there must be good and bad outcomes'),
    ({'n_trials': 0}, 'n_trials must be a whole number of 1 or more'),
])
def test_a_mistake_is_told_and_leaves_the_products(project, settings, said):
    (project / 'typo.yaml').write_text((project / 'data/contracts/home_credit.yaml').read_text().replace('range:', 'rnage:', 1))
    lines = next((project / 'data/raw').glob('*.csv')).read_text().splitlines()
    (project / 'one_class.csv').write_text('\n'.join([lines[0], *(line for line in lines[1:] if line.split(',')[1] == '0')]) + '\n')
    version = load_bundle(product(project, 'models/champion.json')).version
    failed = build(project, **settings)
    assert failed.returncode != 0
    assert said in failed.stdout + failed.stderr
    assert 'Traceback' not in failed.stderr or 'TaskBuildError' in failed.stderr
    assert load_bundle(product(project, 'models/champion.json')).version == version
