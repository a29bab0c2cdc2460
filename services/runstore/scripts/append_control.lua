#!lua
-- Appends an entry that is no group (config, end). The nonce makes a repeated call harmless.
-- KEYS tokens, state, log, index    ARGV token, nonce, kind, payload, sha256 of the payload
local tokens, state, log, index = unpack(KEYS)
local token, nonce, kind, payload, digest = unpack(ARGV)
local refusal = fenced(tokens, 'learner', token)
if refusal then return refusal end
if not redis.call('HGET', state, 'generation') then return {'NOT_READY'} end

local done = redis.call('HGET', state, 'control')
if done then
  local stored, id, sequence = done:match('^(%S+) (%S+) (%S+)$')
  if stored == nonce then return {'OK', id, tonumber(sequence)} end
end
local id, sequence = append_entry(state, log, index, kind, '-1', payload, digest)
redis.call('HSET', state, 'control', table.concat({nonce, id, string.format('%d', sequence)}, ' '))
return {'OK', id, sequence}
