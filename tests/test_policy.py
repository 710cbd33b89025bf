"""Rules, cut-offs and their versions: faults are found and worded, a table and a record are judged alike, a policy changes without its model."""
import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from generators import contracts, tables
from hypothesis import given, settings
from hypothesis import strategies as st
from small_bundle import applications, small_bundle, small_contract

from riskscore.batch import score_batch
from riskscore.bundle import load_bundle, write_policy, write_pointer
from riskscore.cli import main
from riskscore.contract import DECISIONS, check_frame, check_record, load_contract, parse_contract
from riskscore.core import RiskError
from riskscore.policy import Policy, appetite_table, compile_knockouts, fit_policy, judge, policy_from_dict, profit_curve

CONTRACT = yaml.safe_load('''
name: loans
amount: credit
value:
  approve: {good: 0.10, bad: -0.55}
  refer:   {good: 0.09, bad: -0.30, fixed: -20}
  decline: {good: 0, bad: 0}
derived: {burden: instalment / income}
knockouts:
  - {name: minor, when: age < 18, decision: decline, words: {en: You must be 18 or older, es: Debe tener 18 años o más}}
  - {name: sanctions, when: sanctioned == 1, decision: decline, words: {en: Your name is on a sanctions list, es: Su nombre figura en una lista de sanciones}}
  - {name: burden, when: instalment / income > 0.6, decision: refer, words: {en: Instalment above income, es: Cuota excesiva para los ingresos}}
groups:
  age: {words: {en: Age, es: Edad}}
  burden: {words: {en: Instalment against income, es: Cuota frente a ingresos}, features: [burden]}
columns:
  age: {kind: integer, group: age}
  income: {kind: number, mutable: up, monotone: down}
  instalment: {kind: number, mutable: any, monotone: up}
  credit: {kind: number, mutable: down, null: false}
  job: {kind: category, levels: [clerk, nurse], mutable: any}
  sanctioned: {kind: flag}
  bad: {kind: flag, role: target, bad: 1}
''')


def contract(**changes):
    return parse_contract(json.loads(json.dumps(CONTRACT)) | changes)


def test_a_contract_keeps_its_rules_on_the_way_through_json_and_yaml(tmp_path):
    whole = contract()
    (tmp_path / 'loans.yaml').write_text(yaml.safe_dump(whole.to_dict(), allow_unicode=True), encoding='utf-8')
    assert parse_contract(json.loads(whole.to_json())) == whole
    assert load_contract(tmp_path / 'loans.yaml').to_dict() == whole.to_dict()
    assert [r['name'] for r in whole.knockouts] == ['minor', 'sanctions', 'burden']
    assert (whole.columns['income'].monotone, whole.columns['job'].mutable) == ('down', 'any')


@pytest.mark.parametrize('changes, message', [
    ({'knockouts': ['age < 18']}, 'knock-out 1: expected {name: minor'),
    ({'knockouts': [{'name': 'a', 'when': 'age < 18', 'decision': 'approve', 'words': {'en': 'a', 'es': 'a'}}]}, "'approve' is not one of refer, decline"),
    ({'knockouts': [{'name': 'a', 'when': 18, 'decision': 'decline', 'words': {'en': 'a', 'es': 'a'}}]}, 'when must be text; got 18'),
    ({'knockouts': [{'name': 'a', 'when': 'age < 18'}]}, 'knock-out 1: words is missing'),
    ({'knockouts': [{'nmae': 'a'}]}, "unknown key 'nmae'. Did you mean 'name'?"),
    ({'groups': {'age': {'words': {'en': 1}}}}, "group age: words must be text by language"),
    ({'groups': {'aeg': {'words': {'en': 'Age'}}}}, "group aeg: no column and no feature belongs to it. Did you mean 'age'?"),
    ({'groups': {'age': ['burden']}}, 'group age: expected a name with'),
    ({'groups': {'x': {'features': ['age']}}}, 'group x: age is a column'),
    ({'groups': {'x': {'features': 'age'}}}, 'group x: features must be a list'),
])
def test_what_is_wrong_with_rules_and_groups_is_said(changes, message):
    with pytest.raises(RiskError, match=message.replace('{', r'\{').replace('?', r'\?').replace('(', r'\(')):
        contract(**changes)


@pytest.mark.parametrize('settings, message', [
    ({'kind': 'category', 'monotone': 'up'}, 'no order that monotone could follow'),
    ({'kind': 'category', 'mutable': 'down'}, 'write mutable: any'),
    ({'mutable': 'sideways'}, "'sideways' is not one of up, down, any"),
    ({'role': 'leak', 'monotone': 'up'}, 'belongs to columns with the role feature; its role is leak'),
])
def test_what_is_wrong_with_a_direction_is_said(settings, message):
    with pytest.raises(RiskError, match=message):
        contract(columns=CONTRACT['columns'] | {'age': settings | {'group': 'age'}})


# ---------------------------------------------------------------- rules before the model

def policy(**changes) -> Policy:
    return Policy(0.1, 0.3, CONTRACT['value'], 'EUR', 'credit', compile_knockouts(contract(**changes)))


def test_a_table_and_one_application_are_judged_alike():
    rng = np.random.default_rng(3)
    raw = {'age': rng.integers(15, 40, 300), 'income': np.where(rng.random(300) < 0.1, np.nan, rng.uniform(0, 100, 300)),
           'instalment': rng.uniform(0, 90, 300), 'credit': rng.uniform(100, 900, 300), 'sanctioned': rng.integers(0, 2, 300)}
    strict, typed, pd = policy(), check_frame(contract(), raw).frame, rng.random(300)
    decision, rule = judge(strict, pd, typed)
    fired = strict.knocked_out(typed)
    for i in range(300):
        one, _ = check_record(contract(), {name: values[i] for name, values in raw.items()})
        alone = judge(strict, pd[i:i + 1], one)
        assert (alone[0][0], alone[1][0]) == (decision[i], rule[i])
        assert [bool(v[0]) for v in strict.knocked_out(one).values()] == [bool(v[i]) for v in fired.values()]
    assert set(rule.tolist()) == {None, 'minor', 'sanctions', 'burden'}


def test_a_rule_only_ever_makes_a_decision_stricter_and_decline_beats_refer():
    typed = check_frame(contract(), {'age': [17, 30, 17, 30], 'income': [10, 10, 10, None], 'instalment': [9, 9, 9, 9], 'credit': [1] * 4}).frame
    assert policy().decide(np.full(4, 0.05), typed).tolist() == ['decline', 'refer', 'decline', 'approve']  # null does not fire
    assert policy().decide(np.full(4, 0.9), typed).tolist() == ['decline'] * 4
    rank = DECISIONS.index
    for pd in (0.05, 0.2, 0.9):
        free = Policy(0.1, 0.3, CONTRACT['value']).decide(np.full(4, pd))
        assert all(rank(a) >= rank(b) for a, b in zip(policy().decide(np.full(4, pd), typed), free, strict=True))


@pytest.mark.parametrize('when, message', [
    ('aeg < 18', "knock-out minor: there is no column 'aeg'. Did you mean 'age'"), ('bad == 1', 'has the role target'),
    ('job < 3', 'is a category'), ('age.__class__', 'not part of the grammar'), ('1 < 2', 'reads no column'),
])
def test_a_rule_that_cannot_be_computed_is_refused_in_words(when, message):
    rule = CONTRACT['knockouts'][0] | {'when': when}
    with pytest.raises(RiskError) as error:
        fit_policy(contract(knockouts=[rule]), np.array([0.1]), np.array([1.0]))
    assert message in str(error.value)


@pytest.mark.parametrize('name', ['home_credit', 'taiwan', 'pi_m5'])
def test_the_rules_of_the_committed_contracts_can_be_computed(root, name):
    rules = compile_knockouts(load_contract(root / f'data/contracts/{name}.yaml'))
    assert 'minor' in {rule['name'] for rule in rules}


@settings(max_examples=30)
@given(st.data())
def test_any_policy_survives_json_and_judges_any_table_as_its_rows(data):
    base = data.draw(contracts())
    numeric = [c.name for c in base.columns.values() if c.kind != 'category' and c.role not in ('target', 'leak')]
    rules = tuple({'name': f'r{i}', 'when': f'col({n!r}) > 1', 'decision': d, 'words': {'en': 'x', 'es': 'x'}}
                  for i, (n, d) in enumerate(zip(numeric, ['refer', 'decline'] * 3, strict=False)))
    whole = Policy(0.1, 0.3, CONTRACT['value'], knockouts=compile_knockouts(replace(base, knockouts=rules)))
    again = policy_from_dict(json.loads(json.dumps(whole.to_dict())))
    assert again == whole and again.version == whole.version
    typed = check_frame(base, data.draw(tables(base))).frame
    pd = np.linspace(0, 1, len(next(iter(typed.values()))))
    decision = again.decide(pd, typed)
    for i in range(len(pd)):
        assert again.decide(pd[i:i + 1], {n: v[i] for n, v in typed.items()})[0] == decision[i]


# ---------------------------------------------------------------- versions, files, other appetites

RULE = {'name': 'x', 'text': 'age < 18', 'when': ['column', 'age'], 'decision': 'decline', 'words': {'en': 'x', 'es': 'x'}}


@pytest.mark.parametrize('change, message', [
    ({'approve_below': 0.5, 'decline_from': 0.4}, 'cut-offs must satisfy'), ({'approve_below': 'low'}, 'is no policy'),
    ({'value': {}}, 'value: the money at stake is missing'), ({'value': {d: {'good': 'x', 'bad': 1} for d in DECISIONS}}, 'good must be a number'),
    ({'aprove_below': 1}, "unknown key 'aprove_below'. Did you mean 'approve_below'"),
    ({'knockouts': [RULE | {'when': ['os.system', 'ls']}]}, 'no expression'), ({'knockouts': [{}]}, 'is no policy'),
    ({'knockouts': [RULE, RULE]}, "the name 'x' stands more than once"), ({'knockouts': [RULE | {'decision': 'approve'}]}, "'approve' is not one of"),
    ({'knockouts': [RULE | {'when': ['number', 1]}]}, 'knock-out x reads no column'), ({'knockouts': 'all'}, 'is no policy'),
    ({'amount': 3}, 'amount must be text'),
])
def test_a_broken_policy_file_is_refused_in_words(change, message):
    with pytest.raises(RiskError) as error:
        policy_from_dict(policy().to_dict() | change)
    assert message in str(error.value)


def test_a_version_is_of_the_content():
    assert policy().version == policy().version != replace(policy(), note='new').version
    assert len(policy().version) == 12 and replace(policy(), approve_below=0.05).version != policy().version


@pytest.fixture
def champion(tmp_path):
    "A pointer to a model whose contract refuses amounts above 900."
    rule = {'name': 'large', 'when': 'amount > 900', 'decision': 'decline', 'words': {'en': 'Too large', 'es': 'Demasiado'}}
    small_bundle(tmp_path)
    old = load_bundle(tmp_path / 'champion.json')
    ruled = replace(old.policy, knockouts=compile_knockouts(replace(small_contract(), knockouts=(rule,))))
    write_pointer(tmp_path / 'champion.json', next(p for p in (tmp_path / 'models').iterdir()), write_policy(tmp_path, ruled))
    return tmp_path / 'champion.json'


def test_a_rule_flows_through_table_record_and_file(champion, tmp_path):
    import csv

    scorer, raw = load_bundle(champion), applications(200, 5)
    table = scorer.frame(check_frame(scorer.contract, raw).frame)
    large = np.array(raw['amount']) > 900
    assert large.any() and not large.all()
    assert [name == 'large' for name in table['knockout']] == large.tolist() and set(table['decision'][large]) == {'decline'}
    assert set(table['value'][large]) == {0.0}  # worth what its decision is worth
    for i in range(0, 200, 7):
        one = scorer.record({n: v[i] for n, v in raw.items()})
        assert (one['decision'], one['knockout'], one['value']) == (table['decision'][i], table['knockout'][i], table['value'][i])
    with open(tmp_path / 'in.csv', 'w', newline='') as file:
        csv.writer(file).writerows([raw, *zip(*raw.values(), strict=True)])
    score_batch(tmp_path / 'in.csv', champion, tmp_path / 'out.csv', 1, None)
    rows = list(csv.DictReader(open(tmp_path / 'out.csv')))
    assert [r['decision'] for r in rows] == table['decision'].tolist() and [r['knockout'] == 'large' for r in rows] == large.tolist()


def test_the_command_changes_the_policy_and_not_the_model(champion):
    before = load_bundle(champion)
    done = CliRunner().invoke(main, ['policy', 'set', '--approve-below', '0.15', '--note', 'Board', '--model', str(champion)])
    after = load_bundle(champion)
    assert done.exit_code == 0 and after.policy.version in done.output
    assert (after.version, after.policy.approve_below, after.policy.decline_from) == (before.version, 0.15, before.policy.decline_from)
    assert after.policy.knockouts == before.policy.knockouts
    shown = CliRunner().invoke(main, ['policy', 'show', '--model', str(champion)]).output
    assert 'Board' in shown and 'below a pd of 0.15' in shown and 'Knock-out large: decline when amount > 900 (Too large)' in shown
    refused = CliRunner().invoke(main, ['policy', 'set', '--approve-below', '0.9', '--model', str(champion)])
    assert refused.exit_code == 2 and 'cut-offs must satisfy' in refused.output
    assert load_bundle(champion).policy.version == after.policy.version


def test_a_policy_file_takes_the_place_of_the_bundles_own(champion, tmp_path):
    other = replace(load_bundle(champion).policy, value={d: {'good': 1.0, 'bad': -9.0} for d in DECISIONS}, currency='USD')
    (tmp_path / 'mine.json').write_text(json.dumps(other.to_dict()))
    assert load_bundle(champion, policy=tmp_path / 'mine.json').policy == other
    stranger = replace(other, knockouts=policy().knockouts)
    (tmp_path / 'stranger.json').write_text(json.dumps(stranger.to_dict()))
    with pytest.raises(RiskError, match='column age'):
        load_bundle(champion, policy=tmp_path / 'stranger.json')
    changed = next((tmp_path / 'policies').iterdir())
    changed.write_text(changed.read_text().replace('0.5', '0.6'))
    with pytest.raises(RiskError, match='was changed after it was written'):
        load_bundle(champion)


def test_no_other_appetite_is_worth_more_than_the_contracts_own():
    rng = np.random.default_rng(0)
    pd, amount = rng.beta(1, 8, 4000), rng.uniform(100, 1000, 4000)
    table = appetite_table(contract(), pd, amount)
    assert table['value'].argmax() == table['bad_loss_factor'].tolist().index(1.0)
    assert all(a >= b for a, b in zip(table['approved'], table['approved'][1:], strict=False))
    known = appetite_table(contract(), pd, amount, (rng.random(4000) < pd).astype(float))
    np.testing.assert_array_equal(known['approve_below'], table['approve_below'])
    np.testing.assert_allclose(known['bad_rate'], table['bad_rate'], atol=0.02)


def test_the_profit_curve_is_what_approving_below_each_cut_off_is_worth():
    rng = np.random.default_rng(1)
    pd, amount = np.round(rng.beta(1, 8, 500), 2), rng.uniform(100, 1000, 500)
    amount[:5] = np.nan
    curve = profit_curve(contract(), pd, amount)
    kept = np.isfinite(amount)
    for cut, share, rate, value in zip(*curve.values(), strict=True):
        below = (pd[kept] < cut) | (share == 1)
        assert share == pytest.approx(below.mean())
        assert np.isnan(rate) if not below.any() else rate == pytest.approx(pd[kept][below].mean())
        gain = amount[kept] * ((1 - pd[kept]) * 0.10 - pd[kept] * 0.55)
        assert value == pytest.approx(gain[below].sum(), abs=1e-6)


@pytest.mark.parametrize('change, message', [
    ({'knockouts': lambda r: [r | {'text': 'amount > 9000'}]}, r'does not compute what its text says \(amount > 9000\)'),
    ({'knockouts': lambda r: [r | {'when': ['where', ['gt', ['column', 'amount'], ['number', 901]], ['number', 1], ['number', 0]]}]}, 'does not compute'),
    ({'knockouts': lambda r: [r | {'text': 'job < 3', 'when': ['lt', ['column', 'job'], ['number', 3]]}]}, 'job'),
    ({'knockouts': lambda r: [r | {'text': 'amount >'}]}, 'Cannot read the expression'),
    ({'amount': lambda _: 'job'}, 'column job is a category; an amount must be a number'),
    ({'amount': lambda _: 'asked_on'}, 'column asked_on is a date; an amount must be a number'),
])
def test_a_policy_means_what_it_says(champion, tmp_path, change, message):
    own = load_bundle(champion).policy.to_dict()
    key, edit = next(iter(change.items()))
    (tmp_path / 'edited.json').write_text(json.dumps(own | {key: edit(own['knockouts'][0])}))
    with pytest.raises(RiskError, match=message):
        load_bundle(champion, policy=tmp_path / 'edited.json')
    (tmp_path / 'same.json').write_text(json.dumps(own))
    assert load_bundle(champion, policy=tmp_path / 'same.json').policy.to_dict() == own
