"""Knock-outs and reason groups of a contract: what is wrong with them is found and worded; decisions obey them in a table and in a record alike."""
import json

import pytest
import yaml

from riskscore.contract import load_contract, parse_contract
from riskscore.core import RiskError

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
  - {name: burden, when: instalment / income > 0.6, decision: refer, words: {en: Instalment too high for the income, es: Cuota demasiado alta para los ingresos}}
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
