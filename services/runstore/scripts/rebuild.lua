#!lua flags=allow-oom
-- Begins a new generation that goes on from the archive. The nonce keeps a repeated call from emptying what came since.
-- KEYS tokens, state, log, index, leases, lease_info, lease_steps, reoffered, attempts
-- ARGV token, nonce, generation, sequence, chain of the head, next_draw, uncounted, open draws...   -> generation
local tokens, state, reoffered = KEYS[1], KEYS[2], KEYS[8]
local token, nonce, head_generation, sequence, chain, next_draw, uncounted = unpack(ARGV, 1, 7)
local refusal = fenced(tokens, 'learner', token)
if refusal then return refusal end
local stored, done = unpack(redis.call('HMGET', state, 'generation', 'rebuild'))
if done == nonce then return tonumber(stored) end

local generation = math.max(tonumber(stored or 0), tonumber(head_generation)) + 1
for key = 2, #KEYS do redis.call('DEL', KEYS[key]) end
redis.call('HSET', state, 'generation', generation, 'sequence', sequence, 'chain', chain, 'trimmed_chain', chain,
  'next_draw', next_draw, 'uncounted', uncounted, 'bytes', 0, 'rebuild', nonce)
for position = 8, #ARGV do redis.call('ZADD', reoffered, ARGV[position], ARGV[position]) end
return generation
