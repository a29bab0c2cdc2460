-- Put in front of every script by connection.py.

-- Milliseconds by the server's clock, the only clock that leases know.
local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- An error reply when a newer writer of this role exists. A token newer than the stored one is stored: a server that
-- lost its state learns it again from the first write of whoever is alive.
local function fenced(tokens, role, token)
  local newest = tonumber(redis.call('HGET', tokens, role) or 0)
  if tonumber(token) < newest then
    return redis.error_reply('-FENCED ' .. string.format('%d', newest))
  end
  if tonumber(token) > newest then redis.call('HSET', tokens, role, token) end
end

-- Drops a lease, without saying what becomes of its draw.
local function close(leases, lease_info, lease_steps, draw)
  redis.call('ZREM', leases, draw)
  redis.call('HDEL', lease_info, draw)
  redis.call('ZREM', lease_steps, draw)
end

-- Draws of `reoffered` with a score from here on are open, but not offered: they were refused too often.
local SET_ASIDE = 2 ^ 52

-- Why a group can no longer be appended (NOT_READY, DUPLICATE, EXPIRED); else nil, and its lease.
local function fate(state, lease_info, reoffered, draw, attempt)
  local generation, next_draw = unpack(redis.call('HMGET', state, 'generation', 'next_draw'))
  if not generation then return 'NOT_READY' end
  local info = redis.call('HGET', lease_info, draw)
  if not info then
    local was_accepted = tonumber(draw) < tonumber(next_draw) and not redis.call('ZSCORE', reoffered, draw)
    return was_accepted and 'DUPLICATE' or 'EXPIRED'
  end
  info = cjson.decode(info)
  -- No look at the deadline: until a sweep offers the draw again, a late group is as good as any.
  if info.attempt ~= tonumber(attempt) then return 'EXPIRED' end
  return nil, info
end

-- The next entry of the log: XADD first, the only command here that can fail. Returns id and sequence.
local function append_entry(state, log, index, kind, draw, payload, digest)
  local generation, sequence, chain = unpack(redis.call('HMGET', state, 'generation', 'sequence', 'chain'))
  local next_sequence = tonumber(sequence) + 1
  local id = generation .. '-' .. string.format('%d', next_sequence)
  chain = redis.sha1hex(table.concat({chain, id, kind, digest}, '\n'))
  redis.call('XADD', log, id, 'kind', kind, 'draw', draw, 'chain', chain, 'payload', payload)
  redis.call('RPUSH', index, #payload .. ' ' .. chain)
  redis.call('HSET', state, 'sequence', next_sequence, 'chain', chain)
  redis.call('HINCRBY', state, 'bytes', #payload)
  return id, next_sequence
end
