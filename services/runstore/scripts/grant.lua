#!lua flags=allow-oom
-- Sweeps expired leases, then leases draws one by one while pacing allows (design 4.1).
-- KEYS tokens, state, registry, leases, lease_info, lease_steps, reoffered, attempts
-- ARGV token, worker, count, worker_step, groups_per_step, lookahead, max_policy_age, steps, lease_ms, max_lease_ms
-- -> {waiting_for or '', draw, attempt, deadline, granted, draw, ...}
local tokens, state, registry, leases, lease_info, lease_steps, reoffered, attempts = unpack(KEYS)
local token, worker, count, worker_step, batch, lookahead, max_age, steps, lease_ms, max_lease_ms = unpack(ARGV)
local refusal = fenced(tokens, 'control-plane', token)
if refusal then return refusal end
local generation, sequence, uncounted, next_draw =
  unpack(redis.call('HMGET', state, 'generation', 'sequence', 'uncounted', 'next_draw'))
local published = redis.call('HGET', registry, 'step')
if not generation or not published then return {'not ready'} end

local now = now_ms()
for _, draw in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', '(' .. string.format('%d', now))) do
  redis.call('ZADD', reoffered, draw, draw)
  close(leases, lease_info, lease_steps, draw)
end

-- Which rule forbids one more lease. An entry at index i (from 0) is used by step i / batch, and no open lease can end
-- beyond index accepted + open - 1: so a bound on that sum bounds how old every group can be when it is used.
local function stopped_by()
  local ahead = tonumber(sequence) - tonumber(uncounted) + redis.call('ZCARD', leases)
  local oldest = tonumber(worker_step)
  local slowest = redis.call('ZRANGE', lease_steps, 0, 0, 'WITHSCORES')
  if slowest[2] then oldest = math.min(oldest, tonumber(slowest[2])) end
  if ahead >= steps * batch then return 'steps' end
  if ahead >= (published + lookahead + 1) * batch then return 'lookahead' end
  if ahead >= (oldest + max_age + 1) * batch then return 'max_policy_age' end
end

local reply, waiting_for = {''}, nil
for _ = 1, tonumber(count) do
  waiting_for = stopped_by()
  if waiting_for then break end
  local draw = redis.call('ZRANGEBYSCORE', reoffered, '-inf', '(' .. string.format('%d', SET_ASIDE), 'LIMIT', 0, 1)[1]
  if draw then
    redis.call('ZREM', reoffered, draw)
  else
    draw = next_draw
    next_draw = string.format('%d', next_draw + 1)
    redis.call('HSET', state, 'next_draw', next_draw)
  end
  -- Attempts of another generation must never be taken for ours: a lost server cannot know how many there were.
  redis.call('HSETNX', attempts, draw, (generation - 1) * 1000)
  local attempt = redis.call('HINCRBY', attempts, draw, 1)
  local deadline = now + math.min(tonumber(lease_ms), tonumber(max_lease_ms))
  redis.call('ZADD', leases, deadline, draw)
  redis.call('ZADD', lease_steps, worker_step, draw)
  redis.call('HSET', lease_info, draw, cjson.encode({worker = worker, attempt = attempt, step = tonumber(worker_step),
    granted = now, lease_ms = tonumber(lease_ms), max_lease_ms = tonumber(max_lease_ms)}))
  for _, value in ipairs({draw, attempt, deadline, now}) do table.insert(reply, value) end
end
reply[1] = waiting_for or ''
return reply
