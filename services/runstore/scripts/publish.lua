#!lua flags=allow-oom
-- Gives (step, digest) its number and makes it current.
-- KEYS tokens, registry, versions, manifests, published    ARGV token, step, digest, manifest    -> {version, changed}
local tokens, registry, versions, manifests, published = unpack(KEYS)
local token, step, digest, manifest = unpack(ARGV)
local refusal = fenced(tokens, 'learner', token)
if refusal then return refusal end
local newest, newest_step = unpack(redis.call('HMGET', registry, 'version', 'step'))
-- Numbers never repeat: a server that lost its registry gives none until the control plane has restored it.
if not newest then return redis.error_reply('-UNRESTORED') end

-- A learner that went back to a checkpoint and repeats itself changes nothing: workers stay with the newest. But if the
-- newest comes from an abandoned branch and lies behind this step, pacing would stop there: then a new number.
local pair = step .. ' ' .. digest
local known = redis.call('HGET', published, pair)
if known and tonumber(step) <= tonumber(newest_step) then return {tonumber(known), 0} end

local version = tonumber(newest) + 1
redis.call('HSET', registry, 'version', version, 'step', step)
redis.call('HSET', published, pair, version)
redis.call('HSET', versions, version, pair)
redis.call('HSET', manifests, version, manifest)
return {version, 1}
