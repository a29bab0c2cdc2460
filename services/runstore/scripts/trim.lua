#!lua flags=allow-oom
-- Forgets the entries up to `through`, which the caller has archived: its chain there must be the log's.
-- KEYS tokens, state, log, index    ARGV token, through, chain    -> number of entries removed
local tokens, state, log, index = unpack(KEYS)
local token, through, chain = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local refusal = fenced(tokens, 'learner', token)
if refusal then return refusal end
local generation, sequence = unpack(redis.call('HMGET', state, 'generation', 'sequence'))
if not generation then return redis.error_reply('-NOTREADY') end

local unread = redis.call('LLEN', index)
local count = through - (tonumber(sequence) - unread)
if count <= 0 then return 0 end
if count > unread then return redis.error_reply('-FORKED the log ends at entry ' .. sequence) end
local archived = redis.call('LINDEX', index, count - 1):match(' (.+)$')
if archived ~= chain then return redis.error_reply('-FORKED the chain at that entry is ' .. archived) end

redis.call('XTRIM', log, 'MINID', '=', generation .. '-' .. string.format('%d', through + 1))
local bytes = 0
for _, entry in ipairs(redis.call('LPOP', index, count)) do
  bytes = bytes + tonumber(entry:match('^(%d+)'))
end
redis.call('HSET', state, 'trimmed_chain', chain)
redis.call('HINCRBY', state, 'bytes', -bytes)
return count
