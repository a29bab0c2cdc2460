#!lua flags=allow-oom
-- Drops an old version's manifest and makes it unknown. Never the current one. Its number stays taken, and (published)
-- a learner that repeats a step from `oldest_step` on still gets it back; older steps' numbers are dropped from there.
-- KEYS registry, versions, manifests, published    ARGV version, oldest_step    -> 1, or 0 when it is the current one
local registry, versions, manifests, published = unpack(KEYS)
if redis.call('HGET', registry, 'version') == ARGV[1] then return 0 end
redis.call('HDEL', versions, ARGV[1])
redis.call('HDEL', manifests, ARGV[1])
local oldest_step = tonumber(ARGV[2])
for _, pair in ipairs(redis.call('HKEYS', published)) do
  if tonumber(string.match(pair, '^%d+')) < oldest_step then
    local version = redis.call('HGET', published, pair)
    if redis.call('HEXISTS', versions, version) == 0 then redis.call('HDEL', published, pair) end
  end
end
return 1
