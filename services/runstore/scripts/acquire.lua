#!lua flags=allow-oom
-- A token newer than every one before, here and (floor) in what the caller knows from disk.
-- KEYS tokens    ARGV role, floor    -> token
local newest = math.max(tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or 0), tonumber(ARGV[2])) + 1
redis.call('HSET', KEYS[1], ARGV[1], newest)
return newest
