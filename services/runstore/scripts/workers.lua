#!lua flags=no-writes,allow-oom
-- KEYS workers, worker_expiry    -> {now, worker, 'seen report', worker, ...} of those alive
local now = now_ms()
local reply = {now}
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. string.format('%d', now), '+inf')) do
  table.insert(reply, worker)
  table.insert(reply, redis.call('HGET', KEYS[1], worker))
end
return reply
