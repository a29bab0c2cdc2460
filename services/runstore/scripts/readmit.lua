#!lua flags=allow-oom
-- Draws that were set aside get another chance.    KEYS reoffered, refusals    -> number of them
local reoffered, refusals = unpack(KEYS)
local draws = redis.call('ZRANGEBYSCORE', reoffered, string.format('%d', SET_ASIDE), '+inf')
for _, draw in ipairs(draws) do redis.call('ZADD', reoffered, draw, draw) end
redis.call('DEL', refusals)
return #draws
