"A hook of the API tester: no two requests have one idempotency key, because the second would rightly be refused."
from itertools import count

import schemathesis

_NUMBER = count()


@schemathesis.hook
def before_call(context, case, kwargs):
    key = (case.headers or {}).get('Idempotency-Key')
    if isinstance(key, str) and 0 < len(key) < 150 and key.isascii():
        case.headers['Idempotency-Key'] = f'{key}{next(_NUMBER)}'
