#!lua flags=allow-oom
-- A group that must not enter the log: ends its lease and offers the draw again, until it was refused too often.
-- KEYS state, leases, lease_info, lease_steps, reoffered, refusals    ARGV worker, draw, attempt, max_refusals
-- -> {what append would have said: DUPLICATE, EXPIRED, NOT_READY; else INVALID, refusals of the draw so far}
local state, leases, lease_info, lease_steps, reoffered, refusals = unpack(KEYS)
local worker, draw, attempt, max_refusals = unpack(ARGV)
local over, info = fate(state, lease_info, reoffered, draw, attempt)
if over then return {over, 0} end
-- Nobody ends another worker's lease.
if info.worker ~= worker then return {'INVALID', 0} end

local count = redis.call('HINCRBY', refusals, draw, 1)
local score = count < tonumber(max_refusals) and draw or string.format('%d', draw + SET_ASIDE)
redis.call('ZADD', reoffered, score, draw)
close(leases, lease_info, lease_steps, draw)
return {'INVALID', count}
