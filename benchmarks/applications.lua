-- For wrk: posts the lines of a file, one application each, in turn; prints what was measured as one line of JSON.
--   wrk -t1 -c16 -d10s --latency -s applications.lua http://127.0.0.1:8000/predict -- applications.jsonl
local bodies, at = {}, 0

function init(args)
  wrk.headers["Content-Type"] = "application/json"
  for line in io.lines(args[1]) do
    bodies[#bodies + 1] = wrk.format("POST", nil, nil, line)
  end
  math.randomseed(os.time())
  at = math.random(#bodies)  -- so that each run begins with somebody else
end

function request()
  at = at % #bodies + 1
  return bodies[at]
end

function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    'RESULT {"requests":%d,"seconds":%.6f,"p50":%.3f,"p99":%.3f,"p999":%.3f,"refused":%d,"broken":%d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency:percentile(99.9) / 1e3,
    e.status, e.connect + e.read + e.write + e.timeout))
end
