#!lua flags=allow-oom
-- One command on one key, for the current holder of a role only.
-- KEYS tokens, key    ARGV role, token, command, arguments...
local refusal = fenced(KEYS[1], ARGV[1], ARGV[2])
if refusal then return refusal end
return redis.call(ARGV[3], KEYS[2], unpack(ARGV, 4))
