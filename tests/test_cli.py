"""The command: every path a person takes, exit codes, messages without tracebacks, nothing but the base install at import."""
import csv
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_bundle import applications, small_bundle, small_contract
from test_batch import write_csv

from riskscore import __version__
from riskscore.cli import main
from riskscore.contract import load_contract
from riskscore.core import write_text

ROOT = Path(__file__).parents[1]
CALL = [sys.executable, '-W', 'ignore', '-c', 'from riskscore.cli import main; main(prog_name="riskscore")']


def call(*args: object):
    "Runs the command in this process."
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A working directory with a model, a contract and applications."
    import yaml

    monkeypatch.chdir(tmp_path)
    small_bundle(tmp_path / 'data')
    os.rename(tmp_path / 'data' / 'champion.json', tmp_path / 'data' / 'models' / 'champion.json')
    pointer = (tmp_path / 'data' / 'models' / 'champion.json')
    pointer.write_text(pointer.read_text().replace('models/', ''))
    (tmp_path / 'data' / 'contracts').mkdir()
    write_text(tmp_path / 'data' / 'contracts' / 'small.yaml', yaml.safe_dump(small_contract().to_dict()))
    write_csv(tmp_path / 'loans.csv', applications(200))
    return tmp_path


def test_version_and_help():
    assert call('--version').output == f'riskscore, version {__version__}\n'
    for path in ('', 'contract', 'data'):
        assert 'Commands:' in call(*path.split(), '--help').output
    for path in ('contract infer', 'contract check', 'score', 'data synthetic', 'data kaggle'):
        assert f'Example: riskscore {path} ' in call(*path.split(), '--help').output


def test_score_writes_answers_keeps_a_copy_and_says_what_happened(project):
    done = call('score', 'loans.csv', '-o', 'predictions.csv')
    assert done.exit_code == 0, done.output
    assert done.output.startswith('Scored 200 of 200 applications in loans.csv with model ')
    for said in ('approve ', 'expected value ', ' EUR.', 'Answers: predictions.csv; a copy stays in data/batches/'):
        assert said in done.output
    assert len(list(csv.DictReader(open('predictions.csv')))) == 200
    assert len(list(csv.DictReader(open('data/batches/log.csv')))) == 1
    assert call('score', 'loans.csv', '-o', 'predictions.parquet', '--no-archive', '--threads', 1).exit_code == 0
    assert len(list(csv.DictReader(open('data/batches/log.csv')))) == 1


def test_score_says_which_file_of_a_folder_and_what_was_set_aside(project):
    Path('inbox').mkdir()
    write_csv(Path('inbox/old.csv'), applications(5))
    os.utime('inbox/old.csv', (1e9, 1e9))
    write_csv(Path('inbox/new.csv'), applications(6) | {'amount': [-1.0, 5000.0] + [200.0] * 4, 'job': ['astronaut'] * 6})
    done = call('score', 'inbox', '-o', 'out.csv')
    assert done.exit_code == 0
    assert done.output.splitlines()[0] == 'Note: new.csv is the newest of 2 files in inbox.'
    assert '1 rows were set aside, see out.rejected.csv: amount: impossible (1).' in done.output
    assert 'Flagged: job unseen (5), amount range (1).' in done.output


def test_score_ends_with_1_when_nothing_could_be_scored(project):
    write_csv(Path('bad.csv'), applications(3) | {'amount': [-1.0] * 3})
    assert call('score', 'bad.csv', '-o', 'out.csv').exit_code == 1


@pytest.mark.parametrize(('args', 'said'), [
    (['score', 'nowhere.csv', '-o', 'out.csv'], 'no data at nowhere.csv'),
    (['score', 'loans.csv', '-o', 'out.xlsx'], '.csv or .parquet'),
    (['score', 'loans.csv', '-o', 'loans.csv'], 'would destroy them'),
    (['score', 'loans.csv', '-o', 'out.csv', '--model', 'none.json'], 'There is no model at none.json'),
    (['score', 'loans.csv', '-o', 'out.csv', '--threads', '0'], '--threads'),
    (['contract', 'check', 'loans.csv', '--contract', 'smal'], "Did you mean 'small'?"),
    (['contract', 'check', 'loans.csv', '--contract', 'nowhere.yaml'], 'Cannot read the contract nowhere.yaml'),
    (['contract', 'infer', 'loans.csv', '--target', 'badd'], "Did you mean 'bad'?"),
    (['contract', 'infer', 'nowhere.csv', '--target', 'bad'], 'no data at nowhere.csv'),
    (['data', 'synthetic', '--rows', '3', '-o', 'out.doc'], '.csv'),
])
def test_mistakes_end_with_2_and_a_message_without_traceback(project, args, said):
    done = subprocess.run([*CALL, *args], capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(ROOT)})
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr and 'Traceback' not in done.stderr and not done.stdout
    assert not Path('out.csv').exists()


def test_infer_check_and_edit(project):
    assert call('contract', 'infer', 'loans.csv', '--target', 'bad', '-o', 'data/contracts/mine.yaml').exit_code == 0
    before = Path('data/contracts/mine.yaml').read_text()
    assert load_contract('data/contracts/mine.yaml').target.name == 'bad'
    again = call('contract', 'infer', 'loans.csv', '--target', 'bad', '-o', 'data/contracts/mine.yaml')
    assert again.exit_code == 2 and 'edited by hand' in again.stderr
    assert call('contract', 'infer', 'loans.csv', '--target', 'bad').output == before, 'without -o it is printed'
    checked = call('contract', 'check', 'loans.csv', '--contract', 'mine')
    assert checked.exit_code == 0 and 'Nothing hard was found.' in checked.output


def test_check_lists_hard_and_soft_apart_with_rows(project):
    raw = applications(10) | {'amount': [200.0] * 10, 'job': ['clerk'] * 10}
    raw['amount'][1], raw['amount'][4], raw['amount'][7] = -1.0, 5000.0, 'many'
    raw['job'][2], raw['owner'][3], raw['app'][9] = 'astronaut', 'perhaps', raw['app'][8]
    write_csv(Path('odd.csv'), raw)
    checked = call('contract', 'check', 'odd.csv')
    assert checked.exit_code == 1
    hard, soft = checked.output.split('Soft, scored and flagged')
    assert hard.startswith('odd.csv against the contract small: 10 rows, 11 columns.')
    for said in ('amount: 1 value impossible in row 2', 'amount: 1 value unreadable in row 8', 'owner: 1 value not a known level in row 4',
                 'app: 1 value given more than once in row 10'):
        assert said in hard
    for said in ('amount: 1 value outside the usual range in row 5', 'job: 1 value of an unknown level in row 3'):
        assert said in soft


def test_check_finds_unknown_and_missing_columns_and_a_broken_formula(project):
    raw = applications(5)
    write_csv(Path('odd.csv'), {('incme' if n == 'income' else n): v for n, v in raw.items() if n != 'amount'})
    checked = call('contract', 'check', 'odd.csv', '--contract', 'small')
    assert checked.exit_code == 1
    assert 'incme is not in the contract' in checked.output and "Did you mean 'income'?" in checked.output
    assert 'amount is required and missing' in checked.output
    contract = Path('data/contracts/small.yaml')
    contract.write_text(contract.read_text().replace('amount / income', 'amount / incom'))
    checked = call('contract', 'check', 'loans.csv', '--contract', 'small')
    assert checked.exit_code == 1 and "there is no column 'incom'" in checked.output


def test_check_names_a_feature_that_is_always_null(project):
    contract = Path('data/contracts/small.yaml')
    contract.write_text(contract.read_text().replace('amount / income', 'log(0 - amount)'))
    checked = call('contract', 'check', 'loans.csv', '--contract', 'small')
    assert checked.exit_code == 0 and 'feature burden: null in all of the first 200 rows' in checked.output


def test_check_needs_no_outcome_for_applications(project):
    write_csv(Path('new.csv'), applications(5, target=False))
    assert call('contract', 'check', 'new.csv').exit_code == 0


def test_synthetic_data_and_its_truth(project):
    made = call('data', 'synthetic', '--rows', 50, '--seed', 1, '-o', 'a.csv', '--truth', 'truth.csv')
    assert made.exit_code == 0 and made.output == 'Wrote 50 synthetic applicants to a.csv, and what is true about them to truth.csv.\n'
    call('data', 'synthetic', '--rows', 50, '--seed', 1, '-o', 'b.csv')
    assert Path('a.csv').read_bytes() == Path('b.csv').read_bytes()
    assert len(Path('a.csv').read_text().splitlines()) == len(Path('truth.csv').read_text().splitlines()) == 51


def test_kaggle_without_credentials_says_what_to_do(project, monkeypatch):
    for name in ('KAGGLE_API_TOKEN', 'KAGGLE_USERNAME', 'KAGGLE_KEY'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('KAGGLE_CONFIG_DIR', str(project))
    done = call('data', 'kaggle', '-o', 'raw')
    assert done.exit_code == 2 and 'No Kaggle credentials' in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(project):
    draft = ' '.join(f"'{part}'" for part in [*CALL, 'contract', 'infer', 'loans.csv', '--target', 'bad'])
    done = subprocess.run(['bash', '-c', f'{draft} | true'], capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(ROOT)})
    assert 'Traceback' not in done.stderr and 'Broken' not in done.stderr


BLOCKED = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {absent!r}:
            raise ModuleNotFoundError(f'No module named {{name}}', name=name)
sys.meta_path.insert(0, Absent())
"""
EXTRAS = ['pyarrow', 'pandas', 'sklearn', 'scipy', 'mlflow', 'ploomber', 'tqdm', 'openpyxl', 'kagglehub', 'matplotlib', 'IPython',
          'optuna', 'shap', 'numba']


def without_extras(code: str) -> subprocess.CompletedProcess:
    "Runs code where only the base install can be imported."
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', BLOCKED.format(absent=EXTRAS) + code], capture_output=True, text=True,
                          env=os.environ | {'PYTHONPATH': str(ROOT)})


@pytest.mark.parametrize('args', [['score', 'loans.csv', '-o', 'out.csv'], ['contract', 'infer', 'loans.csv', '--target', 'bad'],
                                  ['contract', 'check', 'loans.csv'], ['data', 'synthetic', '-o', 'out.csv']])
def test_a_missing_extra_is_one_line_with_the_command_to_install_it(project, args):
    done = without_extras(f'from riskscore.cli import main; main({args!r}, prog_name="riskscore")')
    assert done.returncode == 2, done.stderr
    assert done.stderr.count('\n') == 1 and "not installed: pip install 'riskscore[pipeline]'" in done.stderr


def test_help_and_version_need_only_the_base_install_and_load_no_model_library():
    done = without_extras('import socket\n'
                          'def refuse(*a, **k): raise AssertionError("network")\n'
                          'socket.socket.connect = socket.getaddrinfo = refuse\n'
                          'from riskscore.cli import main\n'
                          'main(["--version"], standalone_mode=False)\n'
                          'assert "lightgbm" not in sys.modules')
    assert done.returncode == 0 and done.stdout.startswith('riskscore, version'), done.stderr


def test_progress_is_for_terminals_only(project):
    command = [*CALL, 'score', 'loans.csv', '-o', 'out.csv', '--no-archive']
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    piped = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert piped.returncode == 0 and piped.stderr == ''
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
    shown = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=follower, env=environment)
    shown.communicate()
    bar = os.read(leader, 100_000).decode()
    os.close(follower)
    os.close(leader)
    assert shown.returncode == 0 and 'scoring' in bar
