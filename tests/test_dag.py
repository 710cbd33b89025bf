"The pipeline's frame with real notebooks and the real command: one build at a time, Ctrl-C, what reruns, no network."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ploomber.exceptions import DAGBuildError
from ploomber.spec import DAGSpec

ROOT = Path(__file__).resolve().parents[1]
PLOOMBER = [sys.executable, '-c', 'from ploomber_cli.cli import cmd_router; cmd_router()']
WAIT = """import pathlib, time
pathlib.Path('second_began').touch()
while pathlib.Path('wait').exists(): time.sleep(0.1)
open(product['data'], 'w').write('2')"""
TASKS = {
    'first': (None, 'from riskscore.core import digest_bytes\ndigest_bytes(code.encode())', "open(product['data'], 'w').write('1')"),
    'second': (['first'], 'print(upstream, code)', WAIT),
}


def notebook(path: Path, sources: list[str]) -> None:
    cell = {'cell_type': 'code', 'outputs': [], 'execution_count': None}
    cells = [cell | {'id': f'c{i}', 'metadata': {'tags': [] if i else ['parameters']}, 'source': s} for i, s in enumerate(sources)]
    kernel = {'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({'cells': cells, 'metadata': kernel, 'nbformat': 4, 'nbformat_minor': 5}))


@pytest.fixture
def pipeline(tmp_path, monkeypatch) -> Path:
    "Two tasks; the second waits as long as there is a file `wait`."
    lines = ['executor: {dotted_path: riskscore.dag.executor}', 'tasks:']
    for name, (upstream, *sources) in TASKS.items():
        notebook(tmp_path / f'nbs/{name}.ipynb', [f'upstream = {upstream}\nproduct = None\ncode = None', *sources])
        lines.append(f'  - {{source: nbs/{name}.ipynb, name: {name}, product: {{nb: reports/{name}.html, data: data/{name}.txt}}, '
                     f'static_analysis: strict, on_finish: riskscore.dag.check_products, '
                     f"params: {{code: {{dotted_path: 'riskscore.dag::code_digest', notebook: nbs/{name}.ipynb}}}}}}")
    (tmp_path / 'pipeline.yaml').write_text('\n'.join(lines) + '\n')
    monkeypatch.setenv('PYTHONPATH', f'{ROOT / "tests/blocked"}{os.pathsep}{ROOT}')
    monkeypatch.chdir(tmp_path) # Ploomber looks for env.yaml here
    monkeypatch.setenv('BLOCKED_LOG', str(tmp_path / 'blocked.log'))
    for name in ('PLOOMBER_STATS_ENABLED', 'PLOOMBER_VERSION_CHECK_DISABLED', 'MLFLOW_DISABLE_TELEMETRY', 'DO_NOT_TRACK', 'CI'):
        monkeypatch.delenv(name, raising=False) # a new user has none of them
    return tmp_path


def ploomber(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*PLOOMBER, *arguments], cwd=folder, capture_output=True, text=True, timeout=120)


def build(folder: Path, capsys) -> str:
    "Builds in this process, which spares the seconds that the command takes to begin; gives the console."
    DAGSpec(str(folder / 'pipeline.yaml')).to_dag().build()
    return capsys.readouterr().out


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    "Starts a build that stops in its second task, and comes back when it is there."
    (folder / 'wait').touch()
    process = subprocess.Popen([*PLOOMBER, 'build', *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for _ in range(600):
        if (folder / 'second_began').exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    assert process.poll() is None, process.communicate()[0]
    return process


def kernels(folder: Path) -> list[int]:
    "Processes that run in the folder, other than a build itself."
    found = []
    for process in Path('/proc').glob('[0-9]*'):
        try:
            if os.readlink(process / 'cwd') == str(folder) and b'ipykernel' in (process / 'cmdline').read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def test_one_build_at_a_time_and_no_network(pipeline, capsys):
    running = start(pipeline)
    second = ploomber(pipeline, 'build')
    assert second.returncode == 1
    assert f'process {running.pid} on' in second.stderr and 'task second since' in second.stderr
    assert 'Traceback' not in second.stderr
    status = ploomber(pipeline, 'status')
    assert status.returncode == 0 and 'second' in status.stdout
    (pipeline / 'wait').unlink()
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 0 and '[2/2] second       done in' in out and 'Reports: reports' in out
    assert '0 run in' in build(pipeline, capsys)
    assert not (pipeline / 'blocked.log').exists(), (pipeline / 'blocked.log').read_text()


@pytest.mark.parametrize('how', [signal.SIGINT, *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGTERM, signal.SIGKILL))])
def test_a_stopped_build_leaves_no_kernel_and_no_lock_and_can_be_built_again(pipeline, how, capsys):
    running = start(pipeline)
    running.send_signal(how)
    out, _ = running.communicate(timeout=60)
    assert running.returncode != 0
    if how == signal.SIGINT:
        assert 'Stopped by Ctrl-C in task second' in out and 'Traceback' not in out
    for _ in range(100):
        if not kernels(pipeline):
            break
        time.sleep(0.1)
    assert not kernels(pipeline)
    (pipeline / 'wait').unlink()
    again = build(pipeline, capsys)
    assert '[1/2] first        up to date' in again and '[2/2] second       done in' in again


def test_products_are_of_the_code_that_is_there(pipeline, capsys):
    "A task that failed half way is not up to date when its code is put back, and a product of an earlier run does not pass for a new one."
    path = pipeline / 'nbs/second.ipynb'
    source = path.read_text()
    build(pipeline, capsys)
    path.write_text(source.replace("write('2')", "write('half'); 1 / 0"))
    with pytest.raises(DAGBuildError, match='ZeroDivisionError'):
        build(pipeline, capsys)
    assert (pipeline / 'data/second.txt').read_text() == 'half'
    path.write_text(source)
    assert '1 run in' in build(pipeline, capsys)
    assert (pipeline / 'data/second.txt').read_text() == '2'

    path = pipeline / 'nbs/first.ipynb'
    path.write_text(path.read_text().replace("open(product['data'], 'w').write('1')", "print('forgot')"))
    with pytest.raises(DAGBuildError, match=r'data \(.*first.txt\) was left by an earlier run'):
        build(pipeline, capsys)
    assert '[2/2] second       left out' in capsys.readouterr().out
