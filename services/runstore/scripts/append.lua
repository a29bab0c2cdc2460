#!lua
-- Appends one group, exactly once per draw.
-- KEYS state, log, index, leases, lease_info, lease_steps, reoffered, attempts, refusals
-- ARGV draw, attempt, kind, payload, sha256 of the payload, max_entries, max_bytes
-- -> {status} or {'OK', id, sequence}. Without allow-oom: a full server refuses the script before it starts.
local state, log, index, leases, lease_info, lease_steps, reoffered, attempts, refusals = unpack(KEYS)
local draw, attempt, kind, payload, digest, max_entries, max_bytes = unpack(ARGV)
local over = fate(state, lease_info, reoffered, draw, attempt)
if over then return {over} end

local bytes = tonumber(redis.call('HGET', state, 'bytes'))
if redis.call('XLEN', log) >= tonumber(max_entries) or bytes + #payload > tonumber(max_bytes) then
  return {'FULL'}
end
local id, sequence = append_entry(state, log, index, kind, draw, payload, digest)
close(leases, lease_info, lease_steps, draw)
redis.call('HDEL', attempts, draw)
redis.call('HDEL', refusals, draw)
return {'OK', id, sequence}
