#!lua flags=allow-oom
-- Keeps a worker's last report until its time is up; drops those whose time is.
-- KEYS workers, worker_expiry    ARGV worker, report, ttl_ms
local workers, expiry = unpack(KEYS)
local now = now_ms()
redis.call('HSET', workers, ARGV[1], string.format('%d ', now) .. ARGV[2])
redis.call('ZADD', expiry, now + tonumber(ARGV[3]), ARGV[1])
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', expiry, '-inf', string.format('%d', now))) do
  redis.call('HDEL', workers, worker)
  redis.call('ZREM', expiry, worker)
end
return 1
