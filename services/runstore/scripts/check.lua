#!lua flags=no-writes,allow-oom
-- Does the log go on from the archive's head?  '' or why not.    KEYS state, index    ARGV sequence, chain of the head
local state, index = unpack(KEYS)
local head, chain = tonumber(ARGV[1]), ARGV[2]
local generation, sequence, trimmed_chain = unpack(redis.call('HMGET', state, 'generation', 'sequence', 'trimmed_chain'))
if not generation then return 'the log has no generation' end
sequence = tonumber(sequence)
if sequence < head then return string.format('the log ends at entry %d, behind the archived %d', sequence, head) end

local trimmed = sequence - redis.call('LLEN', index)
if head < trimmed then return string.format('the log begins after entry %d, the archive ends at %d', trimmed, head) end
local there = trimmed_chain
if head > trimmed then there = redis.call('LINDEX', index, head - trimmed - 1):match(' (.+)$') end
if there ~= chain then return string.format('the log does not chain to the archived entry %d', head) end
return ''
