"API keys: what is admitted, what is refused, and that no key is ever shown."
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from riskscore.core import RiskError
from riskscore.keys import ACCESS, LOCAL, key_line, new_key, parse_keys

TOKEN = st.text('abcdefghijklmnopqrstuvwxyzABCXYZ0123456789-_', min_size=16, max_size=60)


@given(st.lists(TOKEN, min_size=1, max_size=8, unique=True), st.data())
def test_exactly_the_keys_of_the_file_are_admitted(tokens, data):
    roles = [data.draw(st.lists(st.sampled_from(ACCESS), min_size=1, unique=True)) for _ in tokens]
    keys = parse_keys('\n'.join(f'c{i} {",".join(r)} {t}' if i % 2 else key_line(f'c{i}', r, t)
                                for i, (t, r) in enumerate(zip(tokens, roles, strict=True))))
    for i, token in enumerate(tokens):
        for caller in (keys.caller(b'Bearer ' + token.encode(), None), keys.caller(None, token.encode())):
            assert caller.name == f'c{i}' and caller.roles == set(roles[i])
    other = data.draw(TOKEN.filter(lambda t: t not in tokens))
    assert keys.caller(None, other.encode()) is None
    assert keys.caller(None, tokens[0].encode()[:-1]) is None


def test_the_digest_of_a_key_is_not_a_key():
    keys = parse_keys(key_line('desk', ['score'], 'k' * 20))
    assert keys.caller(None, hashlib.sha256(b'k' * 20).hexdigest().encode()) is None
    assert keys.caller(None, b'sha256:' + hashlib.sha256(b'k' * 20).hexdigest().encode()) is None


@pytest.mark.parametrize('header', [b'', b'Bearer', b'Bearer ', b'bearer\t' + b'k' * 20, b'Basic ' + b'k' * 20, b'\xff\xfe', b'k' * 20,
                                    b'Bearer ' + b'k' * 10**6])
def test_odd_headers_admit_nobody(header):
    keys = parse_keys(f'desk score {"k" * 20}')
    assert keys.caller(header, None) is None
    assert parse_keys(None).caller(header, None) is LOCAL


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused_and_never_opens_the_service(text):
    try:
        assert not parse_keys(text).keyless
    except RiskError as error:
        assert error.problems


@given(TOKEN)
def test_no_message_and_no_repr_shows_a_key(token):
    token = f'q{token}'
    for text in (f'desk {token} score', f'{token}', f'desk score,{token} {token}', f'9 score {token}', f'desk score sha256:{token}', f'a b c {token}',
                 f'desk score {token}\nana score {token}'):
        with pytest.raises(RiskError) as caught:
            parse_keys(text)
        assert token not in str(caught.value)
    assert token not in repr(parse_keys(f'desk score {token}'))


def test_a_name_or_a_key_stands_once():
    with pytest.raises(RiskError) as caught:
        parse_keys(f'desk score {"a" * 20}\ndesk score {"b" * 20}\nana score {"a" * 20}')
    assert caught.value.problems == ['line 2: this name stands in line 1 already.', 'line 3: this key stands in line 1 already.']


def test_new_keys_differ():
    assert len({new_key() for _ in range(100)}) == 100
