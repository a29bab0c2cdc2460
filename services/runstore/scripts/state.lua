#!lua flags=no-writes,allow-oom
-- One consistent look at everything small.    KEYS state, registry, tokens, log, leases, lease_info, reoffered
-- -> {now, state fields, registry fields, learner token, unread, reoffered, {draw, deadline, info, draw, ...}}
local state, registry, tokens, log, leases, lease_info, reoffered = unpack(KEYS)
local open = {}
local scores = redis.call('ZRANGE', leases, 0, -1, 'WITHSCORES')
for position = 1, #scores, 2 do
  table.insert(open, scores[position])
  table.insert(open, scores[position + 1])
  table.insert(open, redis.call('HGET', lease_info, scores[position]))
end
return {now_ms(), redis.call('HGETALL', state), redis.call('HGETALL', registry), redis.call('HGET', tokens, 'learner'),
  redis.call('XLEN', log), redis.call('ZRANGE', reoffered, 0, -1), open}
