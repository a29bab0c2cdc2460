#!lua flags=allow-oom
-- A finished group found the log full: its lease lives on while its worker keeps trying. The longest life bounds
-- sampling, which is over, so it does not count here; a worker that stops trying loses the draw one lease later.
-- KEYS leases, lease_info    ARGV draw, attempt
local leases, lease_info = unpack(KEYS)
local draw, attempt = unpack(ARGV)
local info = redis.call('HGET', lease_info, draw)
info = info and cjson.decode(info)
if info and info.attempt == tonumber(attempt) then
  redis.call('ZADD', leases, 'GT', now_ms() + info.lease_ms, draw)
end
return 1
