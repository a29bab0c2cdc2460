#!lua flags=allow-oom
-- Drops an old version's manifest and makes it unknown. Never the current one. Its number stays taken (published).
-- KEYS registry, versions, manifests    ARGV version    -> 1, or 0 when it is the current one
local registry, versions, manifests = unpack(KEYS)
if redis.call('HGET', registry, 'version') == ARGV[1] then return 0 end
redis.call('HDEL', versions, ARGV[1])
redis.call('HDEL', manifests, ARGV[1])
return 1
