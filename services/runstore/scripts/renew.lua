#!lua flags=allow-oom
-- Moves the deadline of every lease that made progress; never beyond its longest life.
-- KEYS leases, lease_info    ARGV worker, then draw, attempt, tokens since the last renewal...
-- -> the pairs draw, attempt... that are no longer this worker's
local leases, lease_info = unpack(KEYS)
local now, lost = now_ms(), {}
for position = 2, #ARGV, 3 do
  local draw, attempt, tokens = unpack(ARGV, position, position + 2)
  local info = redis.call('HGET', lease_info, draw)
  info = info and cjson.decode(info)
  if not info or info.attempt ~= tonumber(attempt) or info.worker ~= ARGV[1] then
    table.insert(lost, draw)
    table.insert(lost, attempt)
  elseif tonumber(tokens) > 0 then
    redis.call('ZADD', leases, math.min(now + info.lease_ms, info.granted + info.max_lease_ms), draw)
  end
end
return lost
