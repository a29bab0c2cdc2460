#!lua flags=allow-oom
-- Hands draws back: they are offered again at once.
-- KEYS leases, lease_info, lease_steps, reoffered    ARGV worker, then draw, attempt...    -> number handed back
local leases, lease_info, lease_steps, reoffered = unpack(KEYS)
local released = 0
for position = 2, #ARGV, 2 do
  local draw, attempt = ARGV[position], ARGV[position + 1]
  local info = redis.call('HGET', lease_info, draw)
  info = info and cjson.decode(info)
  if info and info.attempt == tonumber(attempt) and info.worker == ARGV[1] then
    redis.call('ZADD', reoffered, draw, draw)
    close(leases, lease_info, lease_steps, draw)
    released = released + 1
  end
end
return released
