"""Bundles: same inputs give the same bytes, a changed byte is refused, loading runs no code, one record scores as a table does."""
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from time import process_time
from timeit import repeat

import lightgbm as lgb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from house import is_pickled
from small_bundle import applications, small_bundle, small_scorer

from riskscore.bundle import add_documents, load_bundle, pointed_policy, read_document, write_bundle, write_pointer, write_policy
from riskscore.contract import check_frame
from riskscore.core import RiskError
from riskscore.trees import Trees

FILES = ['model.txt', 'plan.json', 'calibration.json', 'policy.json', 'contract.json', 'metadata.json', 'manifest.json']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bundle')
    small_bundle(folder)
    return folder


@pytest.fixture(scope='module')
def bundle(folder):
    return next((folder / 'models').iterdir())


@pytest.fixture(scope='module')
def scorer(folder):
    return load_bundle(folder / 'champion.json')


def test_same_inputs_give_the_same_bytes(folder, bundle, tmp_path):
    again = small_bundle(tmp_path)
    assert again.name == bundle.name
    assert sorted(p.name for p in again.iterdir()) == sorted([*FILES, 'run.json'])
    for name in FILES:
        assert (again / name).read_bytes() == (bundle / name).read_bytes(), name


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_any_changed_byte_is_refused_through_the_pointer(folder, bundle, name, where, change):
    path = bundle / name
    original = path.read_bytes()
    changed = bytearray(original)
    changed[int(where * len(changed))] ^= change
    path.write_bytes(changed)
    try:
        with pytest.raises(RiskError):
            load_bundle(folder / 'champion.json')
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('damage', ['missing', 'empty', 'longer'])
def test_a_damaged_file_is_refused(folder, bundle, tmp_path, name, damage):
    copy = shutil.copytree(bundle, tmp_path / bundle.name)
    write_pointer(tmp_path / 'champion.json', copy)
    path = copy / name
    content = path.read_bytes()
    path.unlink()
    if damage != 'missing':
        path.write_bytes(b'' if damage == 'empty' else content + b'\n')
    with pytest.raises(RiskError, match='no complete bundle' if damage == 'missing' else 'no complete bundle|was changed'):
        load_bundle(tmp_path / 'champion.json')


def test_a_manifest_made_to_fit_a_changed_file_is_refused_through_the_pointer(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / bundle.name)
    write_pointer(tmp_path / 'champion.json', copy)
    policy = json.loads((copy / 'policy.json').read_text())
    (copy / 'policy.json').write_text(json.dumps(policy | {'approve_below': 1.0}))
    manifest = json.loads((copy / 'manifest.json').read_text())
    manifest['files']['policy.json'] = hashlib.sha256((copy / 'policy.json').read_bytes()).hexdigest()
    (copy / 'manifest.json').write_text(json.dumps(manifest))
    with pytest.raises(RiskError, match='manifest.json'):
        load_bundle(tmp_path / 'champion.json')


def test_facts_of_a_run_do_not_change_the_version(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / bundle.name)
    (copy / 'run.json').write_text('{"seconds": 99}')
    assert load_bundle(copy).version == bundle.name


@pytest.mark.parametrize(('content', 'match'), [('', 'no model'), ('[]', 'no model'), ('{"version": "x"}', 'no model'),
                                                ('{"version": "x", "path": "nowhere"}', 'no complete bundle')])
def test_a_broken_pointer_is_refused_in_words(tmp_path, content, match):
    (tmp_path / 'champion.json').write_text(content)
    with pytest.raises(RiskError, match=match):
        load_bundle(tmp_path / 'champion.json')


def test_the_pointer_moves_with_its_folder(folder, tmp_path, scorer):
    shutil.copytree(folder, tmp_path / 'elsewhere')
    assert load_bundle(tmp_path / 'elsewhere' / 'champion.json').version == scorer.version


def test_loading_and_scoring_never_unpickle(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('something was unpickled')

    for name in ('load', 'loads', 'Unpickler', '_Unpickler', '_load', '_loads'):
        monkeypatch.setattr(pickle, name, refuse)
    with pytest.raises(AssertionError):
        pickle.Unpickler(io.BytesIO())
    scorer = load_bundle(folder / 'champion.json')
    assert scorer.record({'amount': 500.0})['decision'] in ('approve', 'refer', 'decline')


def test_no_file_of_a_bundle_is_a_pickle_and_every_one_is_text(bundle):
    for path in bundle.iterdir():
        assert path.read_text(encoding='utf-8') and not is_pickled(path)


def test_loading_is_quiet(folder, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load_bundle(folder / 'champion.json')
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ('', '')


def test_no_file_stays_open(folder):
    before = len(os.listdir('/proc/self/fd'))
    load_bundle(folder / 'champion.json')
    assert len(os.listdir('/proc/self/fd')) <= before


@pytest.mark.parametrize('seed', range(3))
def test_one_record_scores_as_the_table_does_bit_for_bit(scorer, seed):
    raw = applications(200, seed)
    table = scorer.frame(check_frame(scorer.contract, raw).frame)
    for i in range(200):
        one = scorer.record({name: values[i] for name, values in raw.items()})
        assert one['pd'] == table['pd'][i] and one['score'] == table['score'][i] and one['decision'] == table['decision'][i]
        assert one['value'] == table['value'][i]


def test_threads_and_the_size_of_a_block_change_no_bit(scorer):
    typed = check_frame(scorer.contract, applications(3000, 7)).frame
    whole = scorer.frame(typed)
    two = scorer.frame(typed, threads=2)
    parts = [scorer.frame({n: v[i:i + 700] for n, v in typed.items()}) for i in range(0, 3000, 700)]
    for name in ('pd', 'value'):
        np.testing.assert_array_equal(whole[name], two[name])
        np.testing.assert_array_equal(whole[name], np.concatenate([p[name] for p in parts]))


def test_an_empty_table_scores_to_an_empty_answer(scorer):
    assert {n: len(v) for n, v in scorer.frame(check_frame(scorer.contract, applications(0)).frame).items()} == {
        'pd': 0, 'score': 0, 'decision': 0, 'knockout': 0, 'value': 0}


def test_bundles_of_two_processes_do_not_disturb_each_other(tmp_path):
    first, second = small_scorer(tmp_path / 'a'), load_bundle(small_bundle(tmp_path / 'b', trees=5))
    assert first.version != second.version


TAMPER = r"""
import sys
import numpy as np
from riskscore.core import RiskError
from riskscore.trees import Trees

def attempt(text):
    "Loads and scores, as a tampered bundle would; 1 when it is refused."
    try:
        model = Trees('lightgbm', text)
    except RiskError:
        return 1
    x = np.random.default_rng(1).normal(size=(50, model.width)).astype(np.float32)
    assert model.margin(x).shape == (50,) and model.contributions(x).shape == (50, model.width + 1)
    return 0

text, rng = open(sys.argv[1], encoding='utf-8').read(), np.random.default_rng(0)
start, end = text.index('Tree=0'), text.index('end of trees')
first = text.index('left_child=') + len('left_child=')
word = text[first:].split(' ', 1)[0]
print(attempt(text), attempt(text[:first] + '0'.rjust(len(word), '0') + text[first + len(word):]), attempt(text[:(start + end) // 2]),
      attempt(text[:first] + '0 ' + text[first:]), attempt(text[:start] + text[start + 1:]), attempt(text.replace('is_linear=0', 'is_linear=1')))
refused = 0
for _ in range(200):
    changed = list(text)
    for place in rng.integers(0 if rng.random() < 0.3 else start, end, rng.integers(1, 4)):
        changed[place] = chr(rng.choice([*b'0123456789-. =e', rng.integers(1, 127)]))
    refused += attempt(''.join(changed))
print(refused)
"""


def varied_trees(rounds, leaves=8):
    "Boosted trees over numbers, missing values and a category."
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 5)).astype(np.float32)
    x[:, 2], x[rng.random(x.shape) < 0.1] = rng.integers(0, 60, len(x)), np.nan
    odds = np.nan_to_num(x[:, 0]) + rng.normal(0, 0.4, 60)[np.nan_to_num(x[:, 2]).astype(int)]
    settings = {'objective': 'binary', 'verbosity': -1, 'num_threads': 1, 'num_leaves': leaves, 'monotone_constraints': [1, 0, 0, 0, 0]}
    data = lgb.Dataset(x, rng.random(len(x)) < 1 / (1 + np.exp(-odds)), categorical_feature=[2], params=settings)
    return lgb.train(settings, data, rounds), x


def test_tampered_trees_are_refused_and_neither_hang_nor_crash(tmp_path):
    booster, x = varied_trees(10)
    text = booster.model_to_string()
    assert re.search('\nnum_cat=[1-9]', text)
    np.testing.assert_array_equal(Trees('lightgbm', text).margin(x), booster.predict(x, raw_score=True))
    (tmp_path / 'model.txt').write_text(text, encoding='utf-8')
    done = subprocess.run([sys.executable, '-c', TAMPER, tmp_path / 'model.txt'], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    known, *_, refused = done.stdout.splitlines() # LightGBM may warn in between
    assert known == '0 1 1 1 1 1' and int(refused) > 50


def test_checking_trees_costs_little_beside_reading_them():
    text = varied_trees(50, 31)[0].model_to_string()
    works = (lambda: Trees('lightgbm', text), lambda: lgb.Booster(model_str=text))
    checked, unchecked = (min(repeat(work, number=1, repeat=15, timer=process_time)) for work in works)
    assert checked < 10 * unchecked


@pytest.mark.parametrize('listed', [[], None, 'model.txt', [['model.txt', 'x']]])
def test_a_manifest_without_a_list_of_digests_is_refused(bundle, tmp_path, listed):
    copy = tmp_path / 'copy'
    shutil.copytree(bundle, copy)
    content = json.loads((copy / 'manifest.json').read_text())
    (copy / 'manifest.json').write_text(json.dumps(content | {'files': listed}))
    with pytest.raises(RiskError, match='no complete bundle'):
        load_bundle(copy)


def test_a_model_that_is_no_text_is_refused_though_its_digest_fits(bundle, tmp_path):
    copy = tmp_path / 'copy'
    shutil.copytree(bundle, copy)
    (copy / 'model.txt').write_bytes(b'\xff\xfe')
    content = json.loads((copy / 'manifest.json').read_text())
    content['files']['model.txt'] = hashlib.sha256(b'\xff\xfe').hexdigest()
    (copy / 'manifest.json').write_text(json.dumps(content))
    with pytest.raises(RiskError, match='a text that is none'):
        load_bundle(copy)


@pytest.mark.parametrize('name', ['model.txt', 'policy.json', 'manifest.json', 'run.json', 'documents.json', '../card.md', '/a.md', 'a/b.md', '', '.', '..'])
def test_no_document_takes_the_place_of_a_file_or_leaves_the_bundle(bundle, tmp_path, name):
    copy = tmp_path / 'models' / bundle.name
    shutil.copytree(bundle, copy)
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    with pytest.raises(RiskError, match='cannot be documents'):
        add_documents(copy, {'card.md': 'good', name: 'bad'})
    assert {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == before


@pytest.mark.parametrize('content', ['', '[]', 'null', '{"card.md":', '3'])
def test_a_broken_list_of_documents_is_refused_in_words(tmp_path, content):
    (tmp_path / 'documents.json').write_text(content)
    for use in (lambda: read_document(tmp_path, 'card.md'), lambda: add_documents(tmp_path, {'card.md': 'x'})):
        with pytest.raises(RiskError, match='no list of documents'):
            use()


def test_a_rebuilt_model_keeps_the_policy_in_force(tmp_path):
    bundle, pointer = small_bundle(tmp_path), tmp_path / 'champion.json'
    assert pointed_policy(pointer, bundle) is None
    careful = replace(load_bundle(pointer).policy, approve_below=0.01)
    write_pointer(pointer, bundle, write_policy(tmp_path, careful))
    again = small_bundle(tmp_path / 'again')
    assert again.name == bundle.name
    write_pointer(pointer, bundle, pointed_policy(pointer, again))
    assert load_bundle(pointer).policy == careful
    assert pointed_policy(pointer, bundle.with_name('0' * 16)) is None and pointed_policy(tmp_path / 'none.json', bundle) is None


def test_a_bundle_keeps_what_monitoring_compares_with(tmp_path):
    "Reference and performance are under the manifest's digests like all else; a bundle without them loads too."
    plain = load_bundle(small_bundle(tmp_path / 'plain'))
    assert plain.drift is None and plain.performance is None
    path = write_bundle(tmp_path / 'models', plain.predictor, plain.plan, plain.calibration, plain.policy, plain.contract, {}, {},
                        drift=b'\x00\xff', performance={'bins': [1, 2]})
    scorer = load_bundle(path)
    assert (scorer.drift, scorer.performance) == (b'\x00\xff', {'bins': [1, 2]})
    for name in ('drift.bin', 'performance.json'):
        kept = (path / name).read_bytes()
        (path / name).write_bytes(kept[:-1] + b'3')
        with pytest.raises(RiskError, match=name):
            load_bundle(path)
        (path / name).write_bytes(kept)
