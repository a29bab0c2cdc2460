#!lua flags=allow-oom
-- Opens the registry, with the manifests that are on disk. Repeating it changes nothing.
-- KEYS tokens, registry, versions, manifests, published    ARGV token, then version, step, digest, manifest...
local tokens, registry, versions, manifests, published = unpack(KEYS)
local refusal = fenced(tokens, 'control-plane', ARGV[1])
if refusal then return refusal end
local newest = tonumber(redis.call('HGET', registry, 'version') or -1)
redis.call('HSETNX', registry, 'version', -1)
for position = 2, #ARGV, 4 do
  local version, step, digest, manifest = unpack(ARGV, position, position + 3)
  local pair = step .. ' ' .. digest
  redis.call('HSETNX', versions, version, pair)
  redis.call('HSETNX', manifests, version, manifest)
  if tonumber(version) > tonumber(redis.call('HGET', published, pair) or -1) then
    redis.call('HSET', published, pair, version)
  end
  if tonumber(version) > newest then
    newest = tonumber(version)
    redis.call('HSET', registry, 'version', version, 'step', step)
  end
end
return newest
