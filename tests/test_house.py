"The house rules of tests/house.py hold, and each of them can fail."
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from house import PACKAGE, RULES, libraries


@pytest.mark.parametrize('name', RULES)
def test_rule_holds(name, root):
    problems = RULES[name](root)
    assert not problems, f'{name}:\n  ' + '\n  '.join(problems)


# ---------------------------------------------------------------- a small project that keeps every rule

LIBRARY = [
    ('markdown', '# core\n\n> What the others need.'),
    ('code', '#| default_exp core'),
    ('code', '#| export\nimport json'),
    ('code', '#| export\ndef twice(\n    x:int, # a number\n)->int: # two of it\n    "Twice the number."\n    return 2 * x'),
    ('code', 'assert twice(2) == 4'),
]
TASK = [
    ('markdown', '# Ingest\n\nWhich rows are there?'),
    ('code', "upstream = None\nproduct = None\ncode = None"),
    ('code', 'from riskscore.core import twice'), ('code', 'a = 1'), ('code', 'b = twice(a)'), ('code', 'b'),
    ('code', "open(product['data'], 'w').write(str(b))"),
]
PIPELINE = '''
executor: {dotted_path: riskscore.dag.executor}
tasks:
  - name: ingest
    source: nbs/pipeline/10_ingest.ipynb
    product: {nb: reports/10_ingest.html, data: data/ingest.csv}
    static_analysis: strict
    on_finish: riskscore.reports.ingest_done
    params: {code: {dotted_path: 'riskscore.dag::code_digest', notebook: nbs/pipeline/10_ingest.ipynb}}
'''


def write_notebook(path: Path, cells: list[tuple[str, str]], kernel: str = 'python3', tag: str = 'parameters') -> None:
    "The second cell of a task carries the tag."
    found = []
    for i, (kind, source) in enumerate(cells):
        tagged = {'tags': [tag]} if 'pipeline' in path.parts and i == 1 else {}
        cell = {'cell_type': kind, 'id': f'cell-{i}', 'metadata': tagged, 'source': source.splitlines(keepends=True)}
        found.append(cell | ({'outputs': [], 'execution_count': None} if kind == 'code' else {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({'cells': found, 'metadata': {'kernelspec': {'name': kernel}}, 'nbformat': 4, 'nbformat_minor': 5}))


def edit(path: Path, change: Callable[[dict], None]) -> None:
    notebook = json.loads(path.read_text())
    change(notebook)
    path.write_text(json.dumps(notebook))


@pytest.fixture
def project(tmp_path) -> Path:
    write_notebook(tmp_path / 'nbs/00_core.ipynb', LIBRARY)
    tables = [(kind, source.replace('core', 'tables').replace('twice', 'thrice')) for kind, source in LIBRARY]
    tables[2] = 'code', '#| export\nfrom riskscore.core import twice'
    write_notebook(tmp_path / 'nbs/20_tables.ipynb', tables)
    write_notebook(tmp_path / 'nbs/pipeline/10_ingest.ipynb', TASK)
    write_notebook(tmp_path / 'nbs/dashboard/10_live.ipynb', [('markdown', '# Live'), ('code', 'a = 1')])
    for folder in ('pipeline', 'dashboard'):
        (tmp_path / 'nbs' / folder / '.notest').touch()
    (tmp_path / 'pipeline.yaml').write_text(PIPELINE)
    (tmp_path / 'data/contracts').mkdir(parents=True)
    (tmp_path / 'data/contracts/loans.yaml').write_text('columns: {ID: {}, LOAN_AMT: {}, puntaje: {}}\n')
    (tmp_path / 'data/table.csv').write_text('ID,LOAN_AMT\n1,2\n')
    (tmp_path / PACKAGE).mkdir()
    (tmp_path / PACKAGE / 'core.py').write_text('def twice(x):\n    return 2 * x\n')
    (tmp_path / PACKAGE / 'synthetic.py').write_text("COLUMNS = ['ID', 'LOAN_AMT', 'puntaje']\n")
    return tmp_path


@pytest.mark.parametrize('name', RULES)
def test_rule_accepts_a_good_project(name, project):
    assert RULES[name](project) == []


# ---------------------------------------------------------------- each rule can fail

def cell(notebook: str, source: str, at: int = -1, **raw) -> Callable[[Path], None]:
    "Plants a code cell (an exported one when it says so) or changes fields of one that is there."
    def plant(project):
        def change(nb):
            new = {'cell_type': 'code', 'id': 'planted', 'metadata': {}, 'outputs': [], 'execution_count': None, 'source': [source]}
            nb['cells'].insert(at if at >= 0 else len(nb['cells']), new | raw)
        edit(project / 'nbs' / notebook, change)
    return plant


def change(notebook: str, at: int, **fields) -> Callable[[Path], None]:
    return lambda project: edit(project / 'nbs' / notebook, lambda nb: nb['cells'][at].update(fields))


def append(path: str, text: str) -> Callable[[Path], None]:
    def plant(project):
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        (project / path).write_text(((project / path).read_text() if (project / path).exists() else '') + text)
    return plant


def replace(path: str, old: str, new: str) -> Callable[[Path], None]:
    def plant(project):
        text = (project / path).read_text()
        assert old in text
        (project / path).write_text(text.replace(old, new))
    return plant


def objects(project):
    np.save(project / 'data/objects.npy', np.array([{}, None], dtype=object))


def parameters(text: str) -> Callable[[Path], None]:
    return change(STEP, 1, source=[text])


LIB, LATER, STEP = '00_core.ipynb', '20_tables.ipynb', 'pipeline/10_ingest.ipynb'
GOOD = '#| export\ndef f(\n    x:int, # meaning\n)->int:\n    "Text."\n    return x\n'
PLANTS: list[tuple[str, Callable[[Path], None], str]] = [
    ('cell_ids_are_unique', cell(LIB, 'a = 1', id='cell-1'), 'also that of cell 2'),
    ('cell_ids_are_unique', change(STEP, 3, id=None), 'has no id'),
    ('notebooks_hold_no_outputs', change(STEP, 2, outputs=[{'output_type': 'stream'}]), 'holds outputs'),
    ('notebooks_hold_no_outputs', change(LIB, 4, execution_count=3), 'execution count'),
    ('no_cell_is_over_60_lines', cell(LIB, 'a = 1\n' * 61), '61 lines'),
    ('no_star_imports', cell(LIB, 'from numpy import *'), 'from numpy import *'),
    ('kernels_are_called_python3', lambda p: write_notebook(p / 'nbs' / STEP, TASK, kernel='my-venv'), "'my-venv'"),
    ('libraries_begin_with_name_and_sentence', change(LIB, 0, source=['# Core module']), "expected '# core'"),
    ('libraries_begin_with_name_and_sentence', change(LIB, 1, source=['#| default_exp cores']), 'default_exp core'),
    ('libraries_import_only_lower_numbers', cell(LIB, '#| export\nfrom riskscore.tables import thrice'), 'number 20 and not lower'),
    ('libraries_import_only_lower_numbers', cell(LIB, '#| export\nfrom riskscore import tables'), 'number 20 and not lower'),
    ('libraries_import_only_lower_numbers', cell(LATER, '#| export\ndef f():\n    from riskscore.none import x'), 'no notebook exports'),
    ('libraries_import_only_lower_numbers', cell(LATER, '#| export\nfrom .core import twice'), 'relative import'),
    ('one_exported_definition_a_cell', cell(LIB, '#| export\ndef _f(): pass\n\ndef _g(): pass'), '_f, _g'),
    ('functions_are_25_lines_at_most', cell(LIB, '#| export\ndef _f():\n' + '    a = 1\n' * 26), '26 lines'),
    ('functions_are_25_lines_at_most', cell(LIB, '#| export\nclass _C:\n    def f(self):\n' + '        a = 1\n' * 26), 'body of f'),
    ('public_functions_are_documented', cell(LIB, GOOD.replace('"Text."', 'pass')), 'docstring of one line'),
    ('public_functions_are_documented', cell(LIB, GOOD.replace('"Text."', '"""Text.\n\n    More."""')), 'docstring of one line'),
    ('public_functions_are_documented', cell(LIB, GOOD.replace(' # meaning', '')), 'beside parameter x'),
    ('public_functions_are_documented', cell(LIB, GOOD.replace('x:int, #', 'x:int, y:int, #')), 'one parameter a line'),
    ('public_definitions_are_used_below', cell(LIB, GOOD), 'no example below uses f'),
    ('libraries_return_and_do_not_print', cell(LIB, "#| export\ndef _f(): print('hello')"), 'calls print()'),
    ('libraries_return_and_do_not_print', cell(LIB, '#| export\nimport logging\nlogging.basicConfig()'), 'calls basicConfig()'),
    ('nothing_asks_whether_a_dtype_is_object', append('riskscore/core.py', 'ok = values.dtype == object\n'), 'line 3'),
    ('floors_0_and_1_name_only_the_base_install', cell(LIB, '#| export\ndef _f():\n    import pandas as pd'), 'imports pandas'),
    ('floors_0_and_1_name_only_the_base_install', cell(LIB, '#| export\nfrom scipy.stats import chi2'), 'imports scipy.stats'),
    ('tasks_have_a_parameters_cell', lambda p: write_notebook(p / 'nbs' / STEP, TASK, tag='params'), '0 cells with the tag'),
    ('tasks_have_a_parameters_cell', parameters('upstream = None\nproduct = None'), 'code is not among'),
    ('tasks_have_a_parameters_cell', parameters('upstream = None\nproduct = None\ncode = None\nrows = 20000'), 'rows is not None'),
    ('tasks_are_thin', cell(STEP, 'def f(): pass'), 'defines f'),
    ('tasks_are_thin', cell(STEP, '#| export\na = 1'), 'exports'),
    ('tasks_are_thin', cell(STEP, 'a = 1\n' * 9), '9 lines'),
    ('tasks_are_thin', lambda p: write_notebook(p / 'nbs' / STEP, TASK[:4]), '3 code cells'),
    ('tasks_are_thin', lambda p: write_notebook(p / 'nbs' / STEP, TASK + 7 * [('code', 'a')]), '13 code cells'),
    ('views_are_thin', lambda p: write_notebook(p / 'nbs/dashboard/10_live.ipynb', 7 * [('code', 'a')]), '7 code cells'),
    ('views_are_thin', cell('dashboard/10_live.ipynb', 'class A: pass'), 'defines A'),
    ('tasks_begin_with_a_title', change(STEP, 0, source=['Ingest']), 'expected a title'),
    ('tasks_take_paths_from_upstream_and_product', cell(STEP, "open('data/ingest.csv')"), "'data/ingest.csv'"),
    ('tested_folders_leave_out_tasks_and_views', lambda p: (p / 'nbs/pipeline/.notest').unlink(), 'is missing'),
    ('the_pipeline_is_as_agreed', lambda p: write_notebook(p / 'nbs/pipeline/20_split.ipynb', TASK), 'is not among the tasks'),
    ('the_pipeline_is_as_agreed', replace('pipeline.yaml', 'notebook: nbs/pipeline/10', 'notebook: nbs/pipeline/20'), 'not the digest'),
    ('the_pipeline_is_as_agreed', replace('pipeline.yaml', '    on_finish: riskscore.reports.ingest_done\n', ''), 'no on_finish'),
    ('the_pipeline_is_as_agreed', replace('pipeline.yaml', 'strict', 'regular'), 'not strict'),
    ('the_pipeline_is_as_agreed', replace('pipeline.yaml', 'reports/10_ingest', 'reports/ingest'), 'not called 10_ingest.html'),
    ('the_pipeline_is_as_agreed', replace('pipeline.yaml', 'executor:', 'config:'), 'names no executor'),
    ('no_column_name_of_a_contract_is_in_the_code', append('riskscore/core.py', '# not for LOAN_AMT\n'), 'line 3: LOAN_AMT'),
    ('no_column_name_of_a_contract_is_in_the_code', append('riskscore/core.py', "ratio = 'LOAN_AMT / 2'\n"), 'LOAN_AMT'),
    ('no_column_name_of_a_contract_is_in_the_code', append('riskscore/core.py', "row['ID']\n"), 'line 3: ID'),
    ('no_column_name_of_a_contract_is_in_the_code', append('riskscore/core.py', 'frame.puntaje\n'), 'line 3: puntaje'),
    ('no_code_pickles', cell(LIB, 'import joblib'), 'imports joblib'),
    ('no_code_pickles', append('benchmarks/speed.py', 'def f():\n    from cloudpickle import dumps\n'), 'imports cloudpickle'),
    ('no_code_pickles', append('riskscore/core.py', 'import pickle\n'), 'imports pickle'),
    ('no_code_pickles', append('tests/test_x.py', 'import pickle\npickle.dumps(1)\n'), 'pickle.dumps'),
    ('no_code_pickles', append('riskscore/core.py', 'np.load(path, allow_pickle=True)\n'), 'allow_pickle'),
    ('no_code_pickles', append('riskscore/core.py', "frame.to_pickle('x')\n"), 'to_pickle'),
    ('no_code_pickles', append('riskscore/core.py', 'torch.save(net, path)\n'), 'torch.save'),
    ('no_product_is_a_pickle', append('data/models/model.pkl', ''), 'is called .pkl'),
    ('no_product_is_a_pickle', lambda p: (p / 'data/model.bin').write_bytes(b'\x80\x04\x95\x00.'), 'begins like a pickle'),
    ('no_product_is_a_pickle', lambda p: (p / 'data/model.bin').write_bytes(zlib.compress(b'\x80\x05K\x01.')), 'begins like a pickle'),
    ('no_product_is_a_pickle', objects, 'pickled objects in an array'),
]


@pytest.mark.parametrize(('name', 'plant', 'message'), PLANTS, ids=[f'{name}-{message}' for name, _, message in PLANTS])
def test_rule_can_fail(name, plant, message, project):
    plant(project)
    assert any(message in problem for problem in RULES[name](project)), RULES[name](project)


def test_every_rule_is_shown_to_fail():
    assert set(RULES) == {name for name, _, _ in PLANTS}


# ---------------------------------------------------------------- floors 0 and 1 run on the base install

GATEKEEPER = '''
import importlib, sys

allowed = set({allowed!r}) | set(sys.stdlib_module_names)

class Refuse:
    "Nothing outside the base install can be imported, as if it were not installed."
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] not in allowed and not name.startswith('_sysconfigdata'):
            raise ModuleNotFoundError(f'{{name}} is not part of the base install', name=name)

sys.meta_path.insert(0, Refuse())
for module in {modules!r}:
    importlib.import_module(module)
'''


def base_install(root: Path) -> set[str]:
    "Modules that `pip install .` brings: the requirements of settings.ini and what they require in turn."
    from configparser import ConfigParser

    from packaging.requirements import Requirement
    settings = ConfigParser(delimiters=['='], interpolation=None)
    settings.read(root / 'settings.ini')
    found, waiting = set(), [Requirement(r) for r in settings['DEFAULT']['requirements'].split()]
    while waiting:
        name = waiting.pop().name.lower()
        if name not in found:
            found.add(name)
            needed = [Requirement(r) for r in metadata.requires(name) or []]
            waiting += [r for r in needed if r.marker is None or r.marker.evaluate({'extra': ''})]
    modules = metadata.packages_distributions()
    return {module for module, owners in modules.items() if {o.lower().replace('_', '-') for o in owners} & found}


def import_on_base(modules: list[str], path: Path, allowed: set[str]) -> subprocess.CompletedProcess:
    script = GATEKEEPER.format(allowed=sorted(allowed | {PACKAGE}), modules=modules)
    environment = os.environ | {'PYTHONPATH': str(path)}
    return subprocess.run([sys.executable, '-c', script], cwd=path, env=environment, capture_output=True, text=True, timeout=120)


def test_floors_0_and_1_import_with_the_base_install_alone(root):
    modules = [f'{PACKAGE}.{path.stem[3:]}' for path in libraries(root) if path.stem < '20']
    assert modules
    done = import_on_base(modules, root, base_install(root))
    assert done.returncode == 0, done.stderr


def test_a_floor_that_needs_more_is_found(project):
    (project / PACKAGE / 'core.py').write_text('import pandas\n')
    done = import_on_base([f'{PACKAGE}.core'], project, {'numpy'})
    assert 'pandas is not part of the base install' in done.stderr


def test_the_base_install_is_small(root):
    heavy = {'pandas', 'pyarrow', 'sklearn', 'mlflow', 'shap', 'IPython', 'optuna', 'matplotlib', 'ploomber'}
    assert not heavy & base_install(root)
