"""Files that are never seen half written: exceptions, Ctrl-C, kill -9, full disks, many writers; and the small tools of core."""
import copy
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from generators import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from riskscore.core import RiskError, atomic_path, canonical_json, digest_bytes, digest_file, listing, suggest, write_text

ROOT = os.geteuid() == 0


def contents(folder: Path) -> dict[str, str]:
    "All files below a folder."
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob('*') if p.is_file()}


def write_folder(path: Path, text: str, files: int = 3) -> None:
    with atomic_path(path) as temporary:
        (temporary / 'deep').mkdir(parents=True)
        for i in range(files):
            (temporary / 'deep' / f'{i}.txt').write_text(text)


# ---------------------------------------------------------------- what goes wrong leaves the old file

@pytest.mark.parametrize('error', [KeyboardInterrupt, SystemExit, RuntimeError, MemoryError, GeneratorExit, OSError, RiskError('x')], ids=repr)
@pytest.mark.parametrize('existing', [None, 'file', 'folder'])
@pytest.mark.parametrize('written', ['nothing', 'file', 'folder'])
def test_any_exception_leaves_what_was_there(tmp_path, error, existing, written):
    target = tmp_path / 'product.csv'
    if existing == 'file':
        target.write_text('old')
    elif existing == 'folder':
        write_folder(target, 'old')
    before = contents(tmp_path)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        with atomic_path(target) as temporary:
            if written == 'file':
                temporary.write_text('half')
            elif written == 'folder':
                temporary.mkdir()
                (temporary / 'half.txt').write_text('half')
            raise error
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ([target.name] if existing else [])


def test_replacing_files_and_folders(tmp_path):
    target = tmp_path / 'product'
    write_text(target, 'a file')
    write_text(target, 'another')
    assert contents(tmp_path) == {'product': 'another'}
    write_folder(target, 'a folder where a file was')
    write_folder(target, 'another', files=1)
    assert contents(tmp_path) == {'product/deep/0.txt': 'another'}
    with pytest.raises(RiskError, match='Could not write .*product'):
        write_text(target, 'a file where a folder is')
    assert contents(tmp_path) == {'product/deep/0.txt': 'another'}
    assert [p.name for p in tmp_path.iterdir()] == ['product']


def test_the_suffixes_are_kept(tmp_path):
    for name in ('table.parquet', 'table.csv.gz', 'ñandú 😀.json', 'x' * 240 + '.csv.gz', 'é' * 120 + '.parquet', '.hidden', 'no suffix'):
        with atomic_path(tmp_path / name) as temporary:
            assert temporary.name.endswith(name[-12:]) and temporary.parent == tmp_path and temporary.name.startswith('.')
            temporary.write_text(name)
        assert (tmp_path / name).read_text() == name


def test_a_product_that_was_not_written_is_an_error(tmp_path):
    (tmp_path / 'old.txt').write_text('old')
    for name in ('old.txt', 'new.txt'):
        with pytest.raises(FileNotFoundError):
            with atomic_path(tmp_path / name):
                pass
    assert contents(tmp_path) == {'old.txt': 'old'}


def test_relative_paths_and_new_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text('note.txt', 'here')
    write_text('deep/er/note.txt', 'there')
    assert contents(tmp_path) == {'note.txt': 'here', 'deep/er/note.txt': 'there'}


def test_a_link_is_followed(tmp_path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'disk' / 'note.txt').write_text('old')
    (tmp_path / 'link.txt').symlink_to(tmp_path / 'disk' / 'note.txt')
    (tmp_path / 'broken.txt').symlink_to(tmp_path / 'disk' / 'new.txt')
    (tmp_path / 'folder').symlink_to(tmp_path / 'disk')
    write_text(tmp_path / 'link.txt', 'one')
    write_text(tmp_path / 'broken.txt', 'two')
    write_text(tmp_path / 'folder' / 'three.txt', 'three')
    assert contents(tmp_path / 'disk') == {'note.txt': 'one', 'new.txt': 'two', 'three.txt': 'three'}
    assert all((tmp_path / n).is_symlink() for n in ('link.txt', 'broken.txt', 'folder'))
    (tmp_path / 'loop.txt').symlink_to(tmp_path / 'loop.txt')
    write_text(tmp_path / 'loop.txt', 'no way round')
    assert (tmp_path / 'loop.txt').read_text() == 'no way round'


# ---------------------------------------------------------------- places where nothing can be written

def test_devices_and_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'link').symlink_to('/dev/null')
    for path in ('/dev/null', '/dev/full', tmp_path / 'pipe', tmp_path / 'link'):
        with pytest.raises(RiskError, match='is a device or a pipe'):
            write_text(path, 'x')
    assert stat.S_ISCHR(os.stat('/dev/null').st_mode) and stat.S_ISFIFO(os.stat(tmp_path / 'pipe').st_mode)


@pytest.mark.parametrize('name', ['file.txt/note.txt', 'file.txt/deep/note.txt', 'y' * 300, 'z' * 300 + '/note.txt', '/proc/nowhere/note.txt'])
def test_impossible_places_are_said(tmp_path, name):
    (tmp_path / 'file.txt').write_text('old')
    with pytest.raises((RiskError, FileNotFoundError)) as caught:
        write_text(tmp_path / name, 'x')
    assert name.startswith('/proc') or isinstance(caught.value, RiskError) and 'Could not write' in str(caught.value)
    assert contents(tmp_path) == {'file.txt': 'old'}


@pytest.mark.skipif(ROOT, reason='a superuser may write everywhere')
def test_a_folder_without_permission_is_said(tmp_path):
    (tmp_path / 'closed').mkdir(mode=0o500)
    for name in ('closed/note.txt', 'closed/deep/note.txt'):
        with pytest.raises(RiskError, match='Permission denied'):
            write_text(tmp_path / name, 'x')


def test_a_fault_of_what_is_read_is_not_blamed_on_what_is_written(tmp_path):
    for error in (PermissionError(13, 'Permission denied', '/somewhere/input.csv'), OSError(5, 'Input/output error', '/somewhere/input.csv')):
        with pytest.raises(OSError, match='input.csv'):
            with atomic_path(tmp_path / 'out.csv'):
                raise error
    with pytest.raises(FileNotFoundError):
        with atomic_path(tmp_path / 'out.csv'):
            open(tmp_path / 'input.csv')


def command(code: str, *arguments) -> list[str]:
    "Python code in a process of its own that imports what this one does."
    return [sys.executable, '-c', f'import sys; sys.path[:0] = {sys.path!r}; from riskscore.core import *\n{code}', *map(str, arguments)]


def run(code: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(command(code, *arguments), capture_output=True, text=True, timeout=60)


def start(code: str, *arguments) -> subprocess.Popen:
    return subprocess.Popen(command(code, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


LIMITED = '''
import resource
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
kind, target = sys.argv[1], Path(sys.argv[2])
try:
    with atomic_path(target) as temporary:
        if kind == 'folder':
            temporary.mkdir()
            (temporary / 'small.txt').write_text('small')
            temporary = temporary / 'large.txt'
        temporary.write_text('x' * 200_000)
except RiskError as error:
    print(error)
'''


@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_a_file_that_may_not_grow_is_said_and_nothing_is_lost(tmp_path, kind):
    target = tmp_path / 'product'
    write_text(target, 'old') if kind == 'file' else write_folder(target, 'old')
    before = contents(tmp_path)
    done = run(LIMITED, kind, target)
    assert f'Could not write {target}: File too large. Free space or choose another place.' in done.stdout, done
    assert contents(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ['product']


@pytest.fixture
def tiny_disk(tmp_path):
    "A disk of 1 MB; only a superuser can mount one."
    disk = tmp_path / 'disk'
    disk.mkdir()
    if not ROOT or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(disk)], capture_output=True).returncode:
        pytest.skip('mounting a small disk is not allowed here')
    yield disk
    subprocess.run(['umount', '-l', str(disk)], check=True)


def test_a_full_disk_is_said_and_nothing_is_lost(tiny_disk):
    target = tiny_disk / 'product.csv'
    write_text(target, 'old' * 100_000)
    before = contents(tiny_disk)
    for _ in range(3):
        with pytest.raises(RiskError, match='Could not write .*: No space left on device. Free space or choose another place.'):
            write_text(target, 'new' * 400_000)
        assert contents(tiny_disk) == before and [p.name for p in tiny_disk.iterdir()] == ['product.csv']
    write_text(target, 'new' * 100_000)
    assert target.read_text() == 'new' * 100_000


# ---------------------------------------------------------------- killed, interrupted, many at once

WRITING = '''
import time
from pathlib import Path
target = Path(sys.argv[1])
try:
    with atomic_path(target) as temporary:
        with open(temporary, 'w') as file:
            file.write('half')
            file.flush()
            print('writing', flush=True)
            time.sleep(60)
except KeyboardInterrupt:
    print('interrupted', flush=True)
'''


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_writer_that_dies_leaves_the_old_file(tmp_path, how):
    target = tmp_path / 'product.csv'
    target.write_text('old')
    process = start(WRITING, target)
    assert process.stdout.readline() == 'writing\n'
    process.send_signal(how)
    process.communicate(timeout=30)
    assert target.read_text() == 'old'
    left = [p.name for p in tmp_path.iterdir() if p != target]
    assert not left if how == signal.SIGINT else len(left) == 1 and left[0].startswith('.'), 'what a killed writer leaves is hidden'
    write_text(target, 'new')
    assert target.read_text() == 'new'


SWAPPING = '''
import os
from pathlib import Path
from riskscore import core
target, rename, calls = Path(sys.argv[1]), os.rename, []
def dying(a, b):
    calls.append(a)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), 9) if sys.argv[3] == 'killed' else exec("raise KeyboardInterrupt")
    rename(a, b)
os.rename = dying
with atomic_path(target) as temporary:
    temporary.mkdir()
    (temporary / 'note.txt').write_text('new')
'''


@pytest.mark.parametrize('how', ['killed', 'interrupted'])
@pytest.mark.parametrize('call', [1, 2])
def test_a_folder_is_never_half_old_and_half_new(tmp_path, call, how):
    target = tmp_path / 'bundle'
    write_folder(target, 'old', files=2)
    run(SWAPPING, target, call, how)
    if how == 'interrupted' or call == 1:
        assert contents(target) == {'deep/0.txt': 'old', 'deep/1.txt': 'old'}
    else:
        aside, = (p for p in tmp_path.iterdir() if '.old.' in p.name)
        assert not target.exists() and contents(aside) == {'deep/0.txt': 'old', 'deep/1.txt': 'old'}, 'the old one is beside, whole'
    write_folder(target, 'newer', files=1)
    assert contents(target) == {'deep/0.txt': 'newer'}


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    target, rename = tmp_path / 'bundle', os.rename
    write_folder(target, 'old', files=1)

    def failing(a, b):
        if '.partial.' in str(a):
            raise OSError(28, 'No space left on device', str(a))
        rename(a, b)

    monkeypatch.setattr(os, 'rename', failing)
    with pytest.raises(RiskError, match='No space left'):
        write_folder(target, 'new')
    assert contents(tmp_path) == {'bundle/deep/0.txt': 'old'}


WRITING_OFTEN = '''
import sys
from pathlib import Path
target, folder, name = Path(sys.argv[1]), sys.argv[2] == 'folder', sys.argv[3]
for i in range(15):
    with atomic_path(target) as temporary:
        if folder:
            (temporary / 'deep').mkdir(parents=True)
        for path in [temporary / 'deep' / f'{n}.txt' for n in range(3)] if folder else [temporary]:
            path.write_text(f'{name} {i} ' * 1000)
'''


@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_many_writers_and_readers_see_only_whole_files(tmp_path, kind):
    "Four processes write one file or folder while this one reads it."
    target, torn, seen = tmp_path / 'product', [], 0
    assert run(WRITING_OFTEN, target, kind, 'first').returncode == 0
    writers = [start(WRITING_OFTEN, target, kind, f'writer{i}') for i in range(4)]
    while any(w.poll() is None for w in writers):
        try:
            texts = contents(target) if kind == 'folder' else {'': target.read_text()}
        except (FileNotFoundError, NotADirectoryError):
            assert kind == 'folder', 'a file is always there'
            continue
        seen += 1
        torn += [t for t in texts.values() if len(set(t.split())) != 2 or len(t) < 8000]
    assert [w.communicate()[1] for w in writers] == [''] * 4
    assert not torn and seen
    assert [p.name for p in tmp_path.iterdir()] == ['product'], 'nothing is left over'
    assert len(contents(target) if kind == 'folder' else [target]) == (3 if kind == 'folder' else 1)


def test_threads_do_not_meet(tmp_path):
    errors = []

    def work(number: int) -> None:
        try:
            for i in range(20):
                write_text(tmp_path / 'shared.txt', f'{number} {i}')
                write_text(tmp_path / f'{number}.txt', str(i))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert {p.name for p in tmp_path.iterdir()} == {'shared.txt', *(f'{n}.txt' for n in range(6))}


def test_nested_use(tmp_path):
    with atomic_path(tmp_path / 'outer') as outer:
        outer.mkdir()
        with atomic_path(outer / 'inner.txt') as inner:
            inner.write_text('x')
        write_text(tmp_path / 'beside.txt', 'y')
    assert contents(tmp_path) == {'outer/inner.txt': 'x', 'beside.txt': 'y'}


# ---------------------------------------------------------------- the small tools

plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                     lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4), max_leaves=20)


@settings(max_examples=examples(100))
@given(plain)
def test_canonical_json_is_json_and_one_spelling(value):
    text = canonical_json(value)
    assert json.loads(text) == value and '\n' not in text
    assert canonical_json(json.loads(text)) == text
    if isinstance(value, dict):
        assert canonical_json(dict(reversed(value.items()))) == text


@pytest.mark.parametrize('value', [float('nan'), float('inf'), {'a': [float('-inf')]}, {1, 2}, b'x', object(), {(1, 2): 3}, {'a': 1, 2: 3}, 1j])
def test_what_cannot_be_stored(value):
    with pytest.raises(RiskError, match='can be stored as JSON'):
        canonical_json(value)


def test_digests(tmp_path):
    (tmp_path / 'large').write_bytes(b'x' * 3_000_001)
    assert digest_file(tmp_path / 'large') == digest_bytes(b'x' * 3_000_001)
    assert digest_bytes(b'abc') == 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'  # FIPS 180-4


def test_an_error_travels_between_processes():
    error = RiskError('It does not fit.', (f'row {i}' for i in range(3)))
    again = copy.deepcopy(error)  # rebuilds it the way it is sent to another process
    assert (str(again), again.message, again.problems) == ('It does not fit.\n  - row 0\n  - row 1\n  - row 2', error.message, error.problems)
    assert isinstance(again, ValueError) and str(RiskError('Alone.')) == 'Alone.'


@pytest.mark.parametrize('word', [None, 5, '', 'x' * 10**6, '\ud800', ('a',)])
def test_any_word_may_be_wrong(word):
    begin = time.perf_counter()
    assert suggest(word, ['range', 'role', 'x' * 50]) == ''
    assert time.perf_counter() - begin < 1


def test_suggestions():
    assert suggest('LIMIT_BALL', ['LIMIT_BAL', 'BILL_AMT1']) == " Did you mean 'LIMIT_BAL'?"
    assert suggest('anything', []) == ''


@settings(max_examples=examples(60))
@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 2000))
def test_listings_add_up(named, show, more):
    "What is named and what is counted is the total."
    text = listing(range(1, named + 1), total=named + more, show=show)
    counted = int(text.split(' and ')[1].split(' more')[0].replace(',', '')) if ' and ' in text else 0
    shown = [p for p in text.split(' and ')[0].split(', ') if p]
    assert len(shown) + counted == named + more and len(shown) <= show
