"Counters over several workers: they add up, outlive a worker, and its state does not."
import os
import subprocess
import sys
from pathlib import Path

from riskscore.meters import prepare_folder

ROOT = Path(__file__).resolve().parents[1]
WORKER = '''
import sys
from riskscore.meters import Meters, flush, metrics_page, observer, show_model
meters = Meters()
watch = observer(meters)
for line in sys.stdin:
    if line == 'page\\n':
        print(metrics_page(meters)[0].decode() + 'END', flush=True)
        continue
    for _ in range(int(line)):
        watch({}, 200, 0.004)
        meters.decision('decision', 'refer', 612)
    meters.state('waiting', 7)
    meters.state('stopped', 1)
    show_model(meters, 'champion', 'm1')
    flush(meters)
    print('done', flush=True)
'''


def page(worker) -> list[str]:
    worker.stdin.write('page\n')
    worker.stdin.flush()
    lines = []
    while (line := worker.stdout.readline().rstrip()) != 'END':
        lines.append(line)
    return lines


def test_workers_add_up_and_a_dead_one_leaves_its_counts(tmp_path):
    environ = os.environ | prepare_folder(tmp_path / 'meters') | {'PYTHONPATH': str(ROOT)}
    workers = [subprocess.Popen([sys.executable, '-c', WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ) for _ in range(2)]
    for worker, n in zip(workers, (3, 40), strict=True):
        worker.stdin.write(f'{n}\n')
        worker.stdin.flush()
        assert worker.stdout.readline() == 'done\n'
    both = page(workers[0])
    assert {'riskscore_decisions_total{decision="refer",purpose="decision"} 43.0', 'riskscore_requests_total{path="other",status="200"} 43.0',
            'riskscore_request_seconds_bucket{le="0.005",path="other"} 43.0', 'riskscore_request_seconds_bucket{le="0.003",path="other"} 0.0',
            'riskscore_score_count 43.0', 'riskscore_score_sum 26316.0', 'riskscore_waiting 14.0', 'riskscore_stopped 1.0',
            'riskscore_model{model_version="m1",policy_version="",role="champion"} 1.0'} <= set(both)
    workers[1].kill()
    workers[1].communicate()
    one = page(workers[0])
    assert {'riskscore_score_count 43.0', 'riskscore_waiting 7.0'} <= set(one)
    workers[0].communicate()
