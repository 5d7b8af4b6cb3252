-- Load for wrk: one POST, the same for every peer. Arguments after "--":
--   1 file with the body   2 the Authorization header's key   3... texts every answer must contain (a verifying run)
-- A verifying run looks into every answer, which costs the load generator time; a measuring run doesn't.

local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  local file = assert(io.open(args[1], "rb"))
  wrk.method = "POST"
  wrk.body = file:read("*a")
  file:close()
  wrk.headers["Content-Type"] = "application/json"
  wrk.headers["Authorization"] = "Bearer " .. args[2]
  wrong = 0
  local texts = {}
  for i = 3, #args do
    table.insert(texts, args[i])
  end
  if #texts > 0 then
    response = function(status, headers, body)
      for _, text in ipairs(texts) do
        if not string.find(body, text, 1, true) then
          wrong = wrong + 1
          return
        end
      end
    end
  end
end

function done(summary, latency, requests)
  local wrong_total = 0
  for _, thread in ipairs(threads) do
    wrong_total = wrong_total + thread:get("wrong")
  end
  local errors = summary.errors
  io.write(string.format(
    'RESULT {"requests": %d, "duration_us": %d, "bytes": %d, "p50_us": %d, "p99_us": %d, "wrong": %d, '
      .. '"status_errors": %d, "socket_errors": %d, "timeouts": %d}\n',
    summary.requests, summary.duration, summary.bytes, latency:percentile(50), latency:percentile(99), wrong_total,
    errors.status, errors.connect + errors.read + errors.write, errors.timeout))
end
