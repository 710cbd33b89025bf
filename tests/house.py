"""The house rules, each a function of the checkout's folder that gives the list of what breaks it.

tests/test_house.py holds the project to them, and shows for each that it can fail.
"""
import ast
import io
import json
import lzma
import re
import sys
import tokenize
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

RULES: dict[str, Callable[[Path], list[str]]] = {}
PACKAGE = 'riskscore'


def rule(check):
    "Registers a generator of problems as a rule."
    RULES[check.__name__] = lambda root: sorted(set(check(root)))
    return check


@dataclass(frozen=True)
class Cell:
    "One cell, with what a message needs to point at it."
    where: str
    kind: str
    source: str
    raw: dict

    @property
    def code(self) -> bool:
        return self.kind == 'code' and bool(self.source.strip())

    @property
    def exported(self) -> bool:
        return self.code and bool(re.search(r'(?m)^#\|\s*export', self.source))

    @property
    def lines(self) -> list[str]:
        return self.source.splitlines()

    @property
    def tree(self) -> ast.Module:
        return ast.parse('\n'.join('' if line.lstrip().startswith(('%', '!')) else line for line in self.lines))


def cells(path: Path) -> list[Cell]:
    "The cells of a notebook, numbered from 1."
    found = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [Cell(f'{path.name}, cell {i}', c['cell_type'], ''.join(c['source']), c) for i, c in enumerate(found, 1)]


def notebooks(root: Path, folder: str = '', pattern: str = '*.ipynb') -> list[Path]:
    return sorted(p for p in (root / 'nbs' / folder).glob(pattern) if not p.name.startswith('.'))


def libraries(root: Path) -> list[Path]:
    return notebooks(root, pattern='[0-9][0-9]_*.ipynb')


def tasks(root: Path) -> list[Path]:
    return notebooks(root, 'pipeline')


def views(root: Path) -> list[Path]:
    return notebooks(root, 'dashboard')


def everything(root: Path) -> list[Path]:
    return [*notebooks(root), *tasks(root), *views(root)]


def definitions(cell: Cell) -> list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    return [node for node in cell.tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]


def imports(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    "Each import as (module, imported names)."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield '.' * node.level + (node.module or ''), [alias.name for alias in node.names]


# ---------------------------------------------------------------- every notebook

@rule
def cell_ids_are_unique(root):
    for path in everything(root):
        seen = {}
        for cell in cells(path):
            if (cell_id := cell.raw.get('id')) is None:
                yield f'{cell.where}: has no id (save it with nbformat 4.5)'
            elif cell_id in seen:
                yield f'{cell.where}: id {cell_id!r} is also that of cell {seen[cell_id]}'
            seen.setdefault(cell_id, cell.where.rpartition(' ')[2])


@rule
def notebooks_hold_no_outputs(root):
    for path in everything(root):
        for cell in cells(path):
            if cell.raw.get('outputs') or cell.raw.get('execution_count'):
                yield f'{cell.where}: holds outputs or an execution count; clear them before you commit'


@rule
def no_cell_is_over_60_lines(root):
    for path in everything(root):
        for cell in cells(path):
            if len(cell.lines) > 60:
                yield f'{cell.where}: {len(cell.lines)} lines; split it'


@rule
def no_star_imports(root):
    for path in everything(root):
        for cell in filter(lambda c: c.code, cells(path)):
            for module, names in imports(cell.tree):
                if '*' in names and module != 'fastcore.test':
                    yield f'{cell.where}: from {module} import *; name what is used'


@rule
def kernels_are_called_python3(root):
    for path in everything(root):
        kernel = json.loads(path.read_text(encoding='utf-8'))['metadata'].get('kernelspec', {}).get('name')
        if kernel != 'python3':
            yield f'{path.name}: kernelspec is {kernel!r}; a name that only one machine knows stops the build elsewhere'


# ---------------------------------------------------------------- library notebooks

@rule
def libraries_begin_with_name_and_sentence(root):
    for path in libraries(root):
        name = path.stem[3:]
        found = cells(path)
        if not re.fullmatch(rf'# {re.escape(name)}\n\n> [^\n]+[.!?]', found[0].source.strip()) or found[0].kind != 'markdown':
            yield f"{found[0].where}: expected '# {name}', a blank line and '> one sentence.'"
        if len(found) < 2 or found[1].source.strip() != f'#| default_exp {name}':
            yield f"{path.name}, cell 2: expected '#| default_exp {name}' and nothing else"


@rule
def libraries_import_only_lower_numbers(root):
    number = {path.stem[3:]: path.stem[:2] for path in libraries(root)}
    for path in libraries(root):
        for cell in filter(lambda c: c.code, cells(path)):
            for module, names in imports(cell.tree):
                if module == PACKAGE:
                    wanted = [name for name in names if not name.startswith('__')]
                elif module.startswith('.'):
                    yield f"{cell.where}: a relative import; write 'from {PACKAGE}.x import y', nbdev makes it relative"
                    continue
                else:
                    wanted = [module.split('.')[1]] if module.startswith(f'{PACKAGE}.') else []
                for name in wanted:
                    if name not in number:
                        yield f'{cell.where}: imports {name}, which no notebook exports'
                    elif number[name] >= path.stem[:2] and (cell.exported or name != path.stem[3:]):
                        yield f'{cell.where}: imports {name}, which is number {number[name]} and not lower'


@rule
def one_exported_definition_a_cell(root):
    for path in libraries(root):
        for cell in filter(lambda c: c.exported, cells(path)):
            if len(found := definitions(cell)) > 1:
                yield f'{cell.where}: exports {", ".join(d.name for d in found)}; one definition a cell'


@rule
def functions_are_25_lines_at_most(root):
    for path in libraries(root):
        for cell in filter(lambda c: c.exported, cells(path)):
            for node in ast.walk(cell.tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    lines = node.end_lineno - node.body[0].lineno + 1
                    if lines > 25:
                        yield f'{cell.where}: the body of {node.name} has {lines} lines; split it'


@rule
def public_functions_are_documented(root):
    "A one-line docstring, and one parameter a line with its meaning beside it."
    for path in libraries(root):
        for cell in filter(lambda c: c.exported, cells(path)):
            for node in definitions(cell):
                if not node.name.startswith('_'):
                    yield from _documentation(cell, node)


def _documentation(cell, node):
    text = ast.get_docstring(node)
    if not text or '\n' in text.strip():
        yield f'{cell.where}: {node.name} needs a docstring of one line'
    if isinstance(node, ast.ClassDef):
        return
    commented = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(cell.source).readline) if t.type == tokenize.COMMENT}
    arguments = [a for a in [*node.args.posonlyargs, *node.args.args, node.args.vararg, *node.args.kwonlyargs, node.args.kwarg] if a]
    for argument in arguments:
        if argument.arg not in ('self', 'cls') and not commented & set(range(argument.lineno, _last_line(node, argument) + 1)):
            yield f'{cell.where}: say beside parameter {argument.arg} of {node.name} what it means'
    on_lines = [a.lineno for a in arguments if a.arg not in ('self', 'cls')]
    if len(set(on_lines)) < len(on_lines):
        yield f'{cell.where}: one parameter a line in {node.name}'


def _last_line(node, argument):
    "The last line of an argument: its default may go on over several."
    defaults = [d for d in [*node.args.defaults, *node.args.kw_defaults] if d]
    return max([argument.end_lineno, *(d.end_lineno for d in defaults if d.lineno == argument.end_lineno)])


@rule
def public_definitions_are_used_below(root):
    "A definition without an example under it is unfinished; a class may show itself as what another definition takes or gives."
    for path in libraries(root):
        found = cells(path)
        for i, cell in enumerate(found):
            for node in definitions(cell) if cell.exported else []:
                if any(re.search(r'\.(command|group)\b', ast.unparse(d)) for d in node.decorator_list):
                    continue # called by its name on the command line
                is_class = isinstance(node, ast.ClassDef)
                uses = [c.source for c in found[0 if is_class else i + 1:] if c.code and c is not cell and (is_class or not c.exported)]
                if not node.name.startswith('_') and not re.search(rf'\b{node.name}\b', '\n'.join(uses)):
                    yield f'{cell.where}: no example below uses {node.name}'


@rule
def libraries_return_and_do_not_print(root):
    "Printing, figures on the screen and log handlers are for the entry points, numbers 50 and up."
    forbidden = {'print', 'basicConfig', 'addHandler', 'show'}
    for path in libraries(root):
        for cell in filter(lambda c: c.exported and path.stem < '50', cells(path)):
            for node in ast.walk(cell.tree):
                name = (getattr(node.func, 'attr', None) or getattr(node.func, 'id', None)) if isinstance(node, ast.Call) else None
                if name in forbidden:
                    yield f'{cell.where}: calls {name}(); return the value'


@rule
def nothing_asks_whether_a_dtype_is_object(root):
    "It is true in one pandas major and false in the next."
    for path in sorted((root / PACKAGE).glob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Compare):
                sides = [getattr(s, 'attr', getattr(s, 'id', getattr(s, 'value', None))) for s in [node.left, *node.comparators]]
                if {'dtype', 'dtypes'} & set(map(str, sides)) and {'object', 'object_', 'O'} & set(map(str, sides)):
                    yield f'{path.name}, line {node.lineno}: compares a dtype with object'


# ---------------------------------------------------------------- floors

@rule
def floors_0_and_1_name_only_the_base_install(root):
    "What runs in production imports the standard library, what the base install asks for, and its own floors."
    allowed = {'numpy', 'lightgbm', 'yaml', 'click', 'fastapi', 'pydantic', 'starlette', 'uvicorn', 'msgspec', 'sqlalchemy', 'prometheus_client', PACKAGE,
               *sys.stdlib_module_names}
    for path in libraries(root):
        for cell in filter(lambda c: c.exported and path.stem < '20', cells(path)):
            for module, _ in imports(cell.tree):
                if module.split('.')[0] not in allowed:
                    yield f'{cell.where}: imports {module}, which the base install does not bring for us'


# ---------------------------------------------------------------- tasks

@rule
def tasks_have_a_parameters_cell(root):
    for path in tasks(root):
        tagged = [c for c in cells(path) if 'parameters' in c.raw['metadata'].get('tags', [])]
        if len(tagged) != 1 or tagged[0].kind != 'code':
            yield f'{path.name}: {len(tagged)} cells with the tag `parameters`; exactly one code cell has it'
            continue
        assigned = [node for node in tagged[0].tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
        values = {ast.unparse(target): node.value for node in assigned for target in getattr(node, 'targets', None) or [node.target]}
        for name in {'upstream', 'product', 'code'} - set(values):
            yield f'{tagged[0].where}: {name} is not among the parameters'
        for name, value in values.items():
            if name != 'upstream' and not (isinstance(value, ast.Constant) and value.value is None):
                yield f'{tagged[0].where}: {name} is not None; values come from env.yaml through pipeline.yaml'


@rule
def tasks_are_thin(root):
    for path in tasks(root):
        code = [c for c in cells(path) if c.code]
        if not 6 <= len(code) <= 12:
            yield f'{path.name}: {len(code)} code cells; 6 to 12'
        for cell in code:
            if len(cell.lines) > 8 and not _is_list(cell):
                yield f'{cell.where}: {len(cell.lines)} lines; 8 at the most'
            yield from _no_definitions(cell)


def _is_list(cell):
    "Parameters and imports: a list to look things up in, one a line, and no step to follow."
    return 'parameters' in cell.raw['metadata'].get('tags', []) or all(isinstance(node, ast.Import | ast.ImportFrom) for node in cell.tree.body)


@rule
def views_are_thin(root):
    for path in views(root):
        code = [c for c in cells(path) if c.code]
        if len(code) > 6:
            yield f'{path.name}: {len(code)} code cells; 6 at the most'
        for cell in code:
            yield from _no_definitions(cell)


def _no_definitions(cell):
    if re.search(r'(?m)^#\|\s*export', cell.source):
        yield f'{cell.where}: exports; that belongs in a library notebook'
    for node in ast.walk(cell.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield f'{cell.where}: defines {node.name}; that belongs in a library notebook'


@rule
def tasks_begin_with_a_title(root):
    for path in tasks(root):
        first = cells(path)[0]
        if first.kind != 'markdown' or not first.source.startswith('# '):
            yield f'{first.where}: expected a title: which question, what comes out'


@rule
def tasks_take_paths_from_upstream_and_product(root):
    for path in tasks(root):
        for cell in filter(lambda c: c.code, cells(path)):
            for node in ast.walk(cell.tree):
                text = node.value if isinstance(node, ast.Constant) else None
                if isinstance(text, str) and re.match(r'(\.{0,2}/|~|data/|reports/|nbs/)', text):
                    yield f'{cell.where}: the path {text!r}; paths come from upstream[...] and product[...]'


@rule
def tested_folders_leave_out_tasks_and_views(root):
    for folder in ('pipeline', 'dashboard'):
        if (root / 'nbs' / folder).is_dir() and not (root / 'nbs' / folder / '.notest').exists():
            yield f'nbs/{folder}/.notest is missing: nbdev_test would run those notebooks'


@rule
def the_pipeline_is_as_agreed(root):
    found = tasks(root)
    if not found:
        return
    path = root / 'pipeline.yaml'
    spec = yaml.safe_load(path.read_text(encoding='utf-8')) if path.exists() else {'tasks': []}
    listed = {task['source']: task for task in spec['tasks']}
    for notebook in found:
        source = f'nbs/pipeline/{notebook.name}'
        if (task := listed.pop(source, None)) is None:
            yield f'pipeline.yaml: {source} is not among the tasks'
            continue
        yield from _task(source, notebook, task)
    yield from (f'pipeline.yaml: {source} does not exist' for source in listed)
    if 'executor' not in spec:
        yield 'pipeline.yaml: names no executor; without riskscore.dag.executor two builds may run at once'


def _task(source, notebook, task):
    name = f"pipeline.yaml, task {task.get('name', source)}"
    code = task.get('params', {}).get('code')
    if not isinstance(code, dict) or code.get('notebook') != source:
        yield f'{name}: its parameter `code` is not the digest of {source}'
    if not task.get('on_finish'):
        yield f'{name}: has no on_finish; nothing checks what it wrote'
    if task.get('static_analysis') != 'strict':
        yield f'{name}: static_analysis is not strict; a forgotten parameter would be found only half way'
    product = task.get('product')
    if not isinstance(product, dict) or Path(str(product.get('nb'))).name != f'{notebook.stem}.html':
        yield f'{name}: its report (product nb) is not called {notebook.stem}.html'


# ---------------------------------------------------------------- one contract, no code

OWN_COLUMNS = {'synthetic.py', 'feature_sets.py'} # the synthetic generator and the declared feature functions


@rule
def no_column_name_of_a_contract_is_in_the_code(root):
    """A new data set needs a contract and not one line of code.

    A long or structured name (AMT_CREDIT, PAY_0, plazo_meses) may not occur anywhere in the text, comments included.
    A word of up to three letters, or of small letters only (ID, AGE, puntaje), may not be a whole string or an attribute.
    """
    contracts = [yaml.safe_load(path.read_text(encoding='utf-8')) for path in sorted((root / 'data/contracts').glob('*.yaml'))]
    names = {name for contract in contracts for name in _columns(contract)}
    plain = {name for name in names if re.fullmatch(r'[A-Za-z]{1,3}|[a-z]+', name)}
    pattern = re.compile(r'(?<![\w.])(' + '|'.join(map(re.escape, sorted(names - plain, key=len, reverse=True))) + r')(?!\w)')
    for path in sorted((root / PACKAGE).glob('*.py')):
        if path.name in OWN_COLUMNS:
            continue
        text = path.read_text(encoding='utf-8')
        for i, line in enumerate(text.splitlines(), 1):
            yield from (f'{path.name}, line {i}: {name} is a column of a contract' for name in pattern.findall(line) if names - plain)
        for node in ast.walk(ast.parse(text)):
            word = node.value if isinstance(node, ast.Constant) else getattr(node, 'attr', None)
            if isinstance(word, str) and word in plain:
                yield f'{path.name}, line {node.lineno}: {word} is a column of a contract'


def _columns(contract):
    "Column names of a contract and of the related tables it names."
    yield from contract.get('columns', {})
    for related in contract.get('related') or []:
        if isinstance(related, dict):
            yield from related.get('columns', {})


# ---------------------------------------------------------------- no pickle

PICKLERS = {'pickle', '_pickle', 'cPickle', 'joblib', 'cloudpickle', 'dill', 'shelve', 'marshal', 'pickletools'}
PICKLING = {'to_pickle', 'read_pickle', 'allow_pickle'}


def sources(root: Path) -> Iterator[tuple[str, ast.Module]]:
    "Every piece of Python of the project."
    for path in everything(root):
        yield from ((cell.where, cell.tree) for cell in cells(path) if cell.code)
    scripts = [root / 'setup.py', root / '.ci/readme', *(p for d in (PACKAGE, 'tests', 'benchmarks') for p in (root / d).rglob('*.py'))]
    for path in sorted(p for p in scripts if p.exists()):
        yield str(path.relative_to(root)), ast.parse(path.read_text(encoding='utf-8'))


@rule
def no_code_pickles(root):
    for where, tree in sources(root):
        refusing = where.startswith('tests/') # a test may take hold of pickle to make it refuse
        for module, names in imports(tree):
            if module.split('.')[0] in PICKLERS - ({'pickle'} if refusing else set()):
                yield f'{where}: imports {module}; models and plans are stored as text, arrays and JSON'
            elif module in ('torch', 'numpy') and {'load', 'save'} & set(names):
                yield f'{where}: imports load or save from {module}, which can pickle'
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ('dump', 'dumps', 'Pickler') and getattr(node.value, 'id', '') == 'pickle':
                yield f'{where}: pickle.{node.attr}; nothing is pickled, not even in a test'
            word = getattr(node, 'attr', None) or (node.arg if isinstance(node, ast.keyword) else None)
            value = getattr(node.value, 'value', None) if isinstance(node, ast.keyword) else None
            if word in PICKLING and value is not False:
                yield f'{where}: {word}; loading a pickle runs code from it'
            if isinstance(node, ast.Attribute) and node.attr in ('load', 'save') and getattr(node.value, 'id', '') == 'torch':
                yield f'{where}: torch.{node.attr} pickles; use safetensors'


def is_pickled(path: Path) -> str:
    "How a file is pickled, by its first bytes and its name, or an empty string."
    if path.suffix in ('.pkl', '.pickle', '.joblib', '.dill', '.pt', '.pth'):
        return f'is called {path.suffix}'
    with open(path, 'rb') as file:
        head = file.read(65536)
    for unpack in (lambda b: b, lambda b: zlib.decompressobj().decompress(b, 64), lambda b: zlib.decompressobj(31).decompress(b, 64),
                   lambda b: lzma.LZMADecompressor().decompress(b, 64)):
        try:
            start = unpack(head)
        except (zlib.error, lzma.LZMAError, EOFError):
            continue
        if re.match(rb'\x80[\x02-\x05]', start):
            return 'begins like a pickle'
    if head.startswith(b'\x93NUMPY') and re.search(rb"'descr':\s*'\|O'", head[:4096]):
        return 'holds pickled objects in an array'
    if head.startswith(b'PK') and re.search(rb'(data\.pkl|\.pkl|\.pickle)', head):
        return 'holds a pickle in a zip'
    return ''


@rule
def no_product_is_a_pickle(root):
    for folder in ('data', 'reports', 'mlruns'):
        for path in sorted((root / folder).rglob('*')):
            if path.is_file() and not path.is_symlink() and (why := is_pickled(path)):
                yield f'{path.relative_to(root)}: {why}'
