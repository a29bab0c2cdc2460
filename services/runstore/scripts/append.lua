#!lua
-- Appends one group, exactly once per draw.
-- KEYS state, log, index, leases, lease_info, lease_steps, reoffered, attempts
-- ARGV draw, attempt, kind, payload, sha256 of the payload, max_entries, max_bytes
-- -> {status} or {'OK', id, sequence}. Without allow-oom: a full server refuses the script before it starts.
local state, log, index, leases, lease_info, lease_steps, reoffered, attempts = unpack(KEYS)
local draw, attempt, kind, payload, digest, max_entries, max_bytes = unpack(ARGV)
local generation, next_draw, bytes = unpack(redis.call('HMGET', state, 'generation', 'next_draw', 'bytes'))
if not generation then return {'NOT_READY'} end

local info = redis.call('HGET', lease_info, draw)
if not info then
  local was_accepted = tonumber(draw) < tonumber(next_draw) and not redis.call('ZSCORE', reoffered, draw)
  return {was_accepted and 'DUPLICATE' or 'EXPIRED'}
end
-- No look at the deadline: until a sweep offers the draw again, a late group is as good as any.
if cjson.decode(info).attempt ~= tonumber(attempt) then return {'EXPIRED'} end

if redis.call('XLEN', log) >= tonumber(max_entries) or tonumber(bytes) + #payload > tonumber(max_bytes) then
  return {'FULL'}
end
local id, sequence = append_entry(state, log, index, kind, draw, payload, digest)
close(leases, lease_info, lease_steps, draw)
redis.call('HDEL', attempts, draw)
return {'OK', id, sequence}
